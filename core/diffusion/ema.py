"""Moving averages of parameters: exponential with warm-up, and power functions of time."""

import copy

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector

TRACKED = (0.05, 0.2)
"""Lengths of the two tracked averages."""
NUM_SNAPSHOTS = 12
"""That a run keeps of both, evenly over its steps."""


class Ema:
    """Keeps an averaged copy of a module.

    The decay at update t is `min(decay, (1 + t) / (10 + t))`, so early averages follow the
    parameters. Post-processing of parameters that are private already, hence free.

    Args:
        posthoc: whether power-function averages are tracked as well, in `power`.
    """

    def __init__(self, module: nn.Module, decay: float, posthoc: bool = False) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self._decay = decay
        self._updates = 0
        self.power = PowerAverages(module) if posthoc else None

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Moves the average towards the module's parameters."""
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        self._updates += 1
        averages, parameters = list(self.module.parameters()), list(module.parameters())
        torch._foreach_lerp_(averages, parameters, 1 - decay)  # type: ignore[attr-defined]
        if self.power is not None:
            self.power.update(module)

    def state_dict(self) -> dict[str, object]:
        """Averages and the update counter."""
        power = {} if self.power is None else {"power": self.power.state_dict()}
        return {"module": self.module.state_dict(), "updates": self._updates, **power}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Restores what `state_dict` gave."""
        self.module.load_state_dict(state["module"])  # type: ignore[arg-type]
        self._updates = int(state["updates"])  # type: ignore[call-overload]
        if self.power is not None:
            self.power.load_state_dict(state["power"])  # type: ignore[arg-type]


def exponent(sigma_rel: float) -> float:
    """The exponent g >= 0 whose weights have relative width `sigma_rel`, in (0, 0.288].

    Inverts `sigma_rel = sqrt((g+1) / (g+3)) / (g+2)` by bisection; it falls as g grows.
    """
    low, high = 0.0, 1 / sigma_rel
    for _ in range(60):
        middle = (low + high) / 2
        wide = ((middle + 1) / (middle + 3)) ** 0.5 / (middle + 2) > sigma_rel
        low, high = (middle, high) if wide else (low, middle)
    return low


def weights(sigma_rel: float, update: int, num_updates: int) -> np.ndarray:
    """What the parameters of each update weigh in the average after `update`: `[num_updates]`."""
    grown = (np.arange(num_updates + 1) / update) ** (exponent(sigma_rel) + 1)
    return np.where(np.arange(num_updates) < update, np.diff(grown), 0.0)


class PowerAverages:
    """The tracked averages of a module's parameters: `values`, float32 `[2, parameters]`.

    Karras et al. (2024), "EDM2", section 3.1. The average after update t weighs the parameters of
    update s by `(s^(g+1) - (s-1)^(g+1)) / t^(g+1)`; its length `sigma_rel` is the standard
    deviation of these weights over t.
    """

    def __init__(self, module: nn.Module) -> None:
        self.values = parameters_to_vector(module.parameters()).detach().repeat(len(TRACKED), 1)
        self._updates = 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Moves the averages towards the module's parameters; the first is all of them."""
        self._updates += 1
        now = parameters_to_vector(module.parameters())
        for average, length in zip(self.values, TRACKED, strict=True):
            decay = (1 - 1 / self._updates) ** (exponent(length) + 1)
            average.lerp_(now, 1 - decay)

    def state_dict(self) -> dict[str, object]:
        """Averages and the update counter."""
        return {"values": self.values, "updates": self._updates}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Restores what `state_dict` gave."""
        self.values.copy_(state["values"])  # type: ignore[arg-type]
        self._updates = int(state["updates"])  # type: ignore[call-overload]
