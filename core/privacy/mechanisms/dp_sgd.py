"""DP-SGD (Abadi et al. 2016): clip each example over all parameters, sum, noise once, divide."""
# Opacus has no stubs, and its constructor's types are incomplete:
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from opacus.optimizers import DPOptimizer
from torch.optim import Optimizer

from core.privacy.keys import KeyedStream
from core.privacy.plan.releases import DpSgdPlan

_norm = cast(Callable[..., torch.Tensor], torch.linalg.vector_norm)
_PIECE = {"cpu": 2**20, "cuda": 2**25}
"""Values that are float64 at once: a copy of all gradients would take twice their memory."""
_JOINED = {"cpu": 0, "cuda": 2**22}
"""Values below which parameters' gradients lie side by side, as a call costs more than a copy."""


class DpSgdOptimizer(DPOptimizer):
    """Opacus's `DPOptimizer` with noise from a keyed stream and any number of ranks.

    One logical step is any number of `accumulate()` calls, none included, on each rank, and one
    `release(step)` on all ranks. The result depends on neither the number of ranks nor the size
    of the physical batches, up to float32 rounding, and is bit-identical on all ranks.

    Args:
        optimizer: what the noisy gradient is given to.
        plan: clip norm, noise multiplier and divisor; the only source of these numbers.
        noise: secret stream; step s always draws the same noise, so a replay is no new release.

    Privacy: the sum has L2 sensitivity `plan.max_grad_norm`; its noise has standard deviation
    `plan.noise_stddev`; the divisor is public. Norms, factors, sums and noise are float64, so that
    no clipped example exceeds the bound by more than 1e-9 of it; what is released is rounded to
    float32 once, after the noise.
    """

    def __init__(self, optimizer: Optimizer, plan: DpSgdPlan, noise: KeyedStream) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=plan.noise_multiplier,
            max_grad_norm=plan.max_grad_norm,
            expected_batch_size=plan.expected_batch_size,
        )
        self._noise = noise
        self._step = -1

    @property
    def params(self) -> list[Any]:
        """The parameters; Opacus keeps `grad_sample` and `summed_grad` as attributes of them."""
        return super().params

    def accumulate(self) -> None:
        """Clips the per-example gradients of one physical batch and adds them to the sum."""
        self.clip_and_accumulate()
        for parameter in self.params:
            parameter.grad_sample = None

    def release(self, step: int) -> None:
        """Sums over ranks, adds the noise of `step` once, divides, and updates the parameters."""
        self._step = step
        self.add_noise()
        self.scale_grad()
        self.original_optimizer.step()
        self.zero_grad(set_to_none=True)

    def clip_and_accumulate(self) -> None:
        """Adds `sum_i g_i * min(1, C / |g_i|)` over the physical batch to `summed_grad`.

        An example whose gradient is not finite counts as zero: one record must not be able to
        destroy, abort or reveal itself in the step. All sums change or, where memory runs out,
        none.
        """
        samples = zip(self.params, self.grad_samples, strict=True)
        gradients = {parameter: each.flatten(1) for parameter, each in samples}
        blocks = _blocks(gradients)
        rows = [_pieces([gradients[parameter] for parameter in block]) for block in blocks]
        norms = _norm(torch.stack([_norms(pieces) for pieces in rows]), dim=0)
        finite = torch.isfinite(norms)
        factors = torch.where(finite, (self.max_grad_norm / norms).clamp(max=1.0), 0.0)
        sums: list[torch.Tensor] = []
        for block, pieces in zip(blocks, rows, strict=True):
            total = _summed(block)
            parts = torch.split(factors, [len(piece) for piece in pieces])
            for part, piece in zip(parts, pieces, strict=True):
                # Zero times NaN is NaN.
                finite_piece = piece.double().nan_to_num_(0.0, 0.0, 0.0)
                total += part @ finite_piece
            sums.append(total)
        for block, total in zip(blocks, sums, strict=True):
            parts = torch.split(total, [parameter.numel() for parameter in block])
            for parameter, part in zip(block, parts, strict=True):
                parameter.summed_grad = part.view_as(parameter)

    def add_noise(self) -> None:
        """Adds noise of standard deviation `noise_multiplier * max_grad_norm` to the global sum.

        Every rank holds the same sum after the reduction and draws the same noise, so the noise
        enters once and all ranks stay bit-identical.
        """
        flat = _summed(self.params)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(flat, op=dist.ReduceOp.SUM)
        noise = self._noise.normal(self._step, flat.numel()).to(flat.device)
        flat = flat + (self.noise_multiplier * self.max_grad_norm) * noise
        parts = torch.split(flat, [parameter.numel() for parameter in self.params])
        for parameter, part in zip(self.params, parts, strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.dtype)

    def scale_grad(self) -> None:
        """Divides by the public expected batch size, never by the size of the batch at hand."""
        for parameter in self.params:
            parameter.grad /= self.expected_batch_size


def _blocks(gradients: dict[Any, torch.Tensor]) -> list[list[Any]]:
    """Parameters whose gradients share a call: small ones together, every other alone."""
    small = [p for p, each in gradients.items() if each.numel() < _JOINED[each.device.type]]
    alone = [[p] for p, each in gradients.items() if each.numel() >= _JOINED[each.device.type]]
    return [*alone, small] if small else alone


def _pieces(block: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Puts gradients `[B, n]` of some parameters side by side and splits them by examples."""
    rows = torch.cat(block, dim=1) if block[1:] else block[0]
    return torch.split(rows, max(1, _PIECE[rows.device.type] // rows.shape[1]))


def _summed(parameters: list[Any]) -> torch.Tensor:
    """A copy of their sums so far, one after the other, float64."""
    sums = [torch.zeros_like(p) if p.summed_grad is None else p.summed_grad for p in parameters]
    return torch.cat([each.flatten() for each in sums]).double()


def _norms(pieces: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """L2 norms `[B]` in float64, where no square overflows: float32 is off by up to 1e-4."""
    return torch.cat([_norm(piece, dim=1, dtype=torch.float64) for piece in pieces])
