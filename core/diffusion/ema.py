"""Exponential moving average of parameters, with warm-up."""

import copy

import torch
from torch import nn


class Ema:
    """Keeps an averaged copy of a module.

    The decay at update t is `min(decay, (1 + t) / (10 + t))`, so early averages follow the
    parameters. Post-processing of parameters that are private already, hence free.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self._decay = decay
        self._updates = 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Moves the average towards the module's parameters."""
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        self._updates += 1
        for average, parameter in zip(self.module.parameters(), module.parameters(), strict=True):
            average.lerp_(parameter, 1 - decay)

    def state_dict(self) -> dict[str, object]:
        """Averages and the update counter."""
        return {"module": self.module.state_dict(), "updates": self._updates}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Restores what `state_dict` gave."""
        self.module.load_state_dict(state["module"])  # type: ignore[arg-type]
        self._updates = int(state["updates"])  # type: ignore[call-overload]
