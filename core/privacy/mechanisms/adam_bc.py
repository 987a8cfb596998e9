"""DP-AdamBC: Adam without the variance that DP-SGD's noise adds to its second moment.

Tang, Shpilevskiy and Lecuyer (2024), "DP-AdamBC: Your DP-Adam Is Actually DP-SGD (Unless You Apply
Bias Correction)", algorithm 1. The second moment of a noisy gradient is that of the gradient plus
the noise's variance; where the noise is larger, Adam divides all coordinates by nearly the same
number. Subtracting that public variance restores a scale for each coordinate.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from core.privacy.plan.plan import DpSgdPlan

_BETAS = (0.9, 0.999)
_EPS = 1e-8


class DpAdamBc(Optimizer):
    """Moves each parameter by `-lr * m / (sqrt(max(v - phi, floor * phi)) + 1e-8)`.

    m and v are Adam's first and second moments, corrected for their start at zero; phi is the
    variance of the noise on a released gradient. The paper's floor is an absolute gamma'; as a
    share of phi it needs no other value when batch, clip norm or noise change. Without noise phi
    is 0, so that there is no floor and the step is exactly Adam's.

    Args:
        plan: of the releases that the gradients come from; the only source of phi.
        floor: smallest second moment over phi, in (0, 1]; steps are at most `1 / sqrt(floor)`
            times those of m over the noise's standard deviation.

    Privacy: post-processing of noisy gradients with public numbers, hence free.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, plan: DpSgdPlan, floor: float
    ) -> None:
        super().__init__(parameters, {"lr": lr})
        self._noise_variance = (plan.noise_stddev / plan.expected_batch_size) ** 2
        self._least = floor * self._noise_variance

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Updates all parameters that have a gradient; there is no closure."""
        first, second = _BETAS
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state: dict[str, Any] = self.state[parameter]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["step"] += 1
                mean = state["exp_avg"].lerp_(parameter.grad, 1 - first)
                square = state["exp_avg_sq"].mul_(second)
                square.addcmul_(parameter.grad, parameter.grad, value=1 - second)
                signal = square / (1 - second ** state["step"]) - self._noise_variance
                scale = signal.clamp(min=self._least).sqrt_().add_(_EPS)
                parameter.addcdiv_(mean, scale, value=-group["lr"] / (1 - first ** state["step"]))
