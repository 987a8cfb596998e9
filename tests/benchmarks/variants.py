"""One optimisation step in several engines, on the same network and the same noisy images.

Each variant is `step(batch)`: forward, backward, and for the private ones clipping and noise, then
Adam. The network is that of `core/configs/mnist.yaml` unless told otherwise.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from torch import nn

from core.config import Config, load
from core.diffusion.denoiser import build_denoiser
from core.diffusion.loss import Draws, draw, edm_loss
from core.privacy.keys import KeyedStream
from core.privacy.mechanisms.dp_sgd import DpSgdOptimizer
from core.privacy.mechanisms.kernels import fused_kernels
from core.privacy.mechanisms.per_example_gradients import PerExampleGradients
from core.privacy.plan.plan import DpSgdPlan

ROOT = Path(__file__).resolve().parents[2]
PLAN = DpSgdPlan(
    num_steps=1, sample_rate=0.1, noise_multiplier=1.5, max_grad_norm=1.0, expected_batch_size=64
)
_OPACUS = {
    "noise_multiplier": PLAN.noise_multiplier,
    "max_grad_norm": PLAN.max_grad_norm,
    "expected_batch_size": PLAN.expected_batch_size,
    "loss_reduction": "sum",
}


@dataclass(frozen=True)
class Batch:
    """B images with K noise draws each."""

    images: torch.Tensor
    labels: torch.Tensor
    draws: Draws

    def copies_as_examples(self) -> "Batch":
        """The same noisy images as B * K examples of one draw each."""
        copies = self.draws.noise.shape[1]
        noise = self.draws.noise.flatten(0, 1)[:, None]
        draws = Draws(self.draws.log_sigma.view(-1, 1), noise, self.draws.dropout.view(-1, 1))
        images, labels = (t.repeat_interleave(copies, 0) for t in (self.images, self.labels))
        return Batch(images, labels, draws)


Step = Callable[[Batch], Any]


def preset(path: str = "core/configs/mnist.yaml", **overrides: Any) -> Config:
    """A configuration of the repository; double underscores in keys are dots."""
    return load(ROOT / path, {key.replace("__", "."): value for key, value in overrides.items()})


def make_batch(config: Config, examples: int, copies: int, device: str = "cpu") -> Batch:
    """Random images of the data set's shape."""
    size, channels = config.dataset.image_size, config.dataset.channels
    shape = (channels, size, size)
    images = torch.rand(examples, *shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ids = torch.arange(examples)
    labels = (ids % config.dataset.num_classes).to(device)
    return Batch(images.to(device), labels, draw("benchmark", 0, ids, copies, shape, device))


def network(config: Config, device: str) -> nn.Module:
    """The denoiser with its zero-initialised layers moved, so that all gradients are at work."""
    denoiser = build_denoiser(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return denoiser.to(device)


def loss_of(config: Config, module: nn.Module, batch: Batch) -> torch.Tensor:
    """Loss of each example, `[B]`, in the precision of the configuration."""
    low = config.training.precision == "bfloat16"
    with torch.autocast(batch.images.device.type, dtype=torch.bfloat16, enabled=low):
        return edm_loss(
            module, batch.images, batch.labels, batch.draws, config.diffusion,
            config.training.label_dropout, config.dataset.num_classes,
        )  # fmt: skip


def adam(module: nn.Module) -> torch.optim.Adam:
    """The optimizer of all variants."""
    return torch.optim.Adam(module.parameters(), lr=1e-4)


def sgd(config: Config, device: str = "cpu") -> Step:
    """A step without privacy."""
    module = network(config, device)
    optimizer = adam(module)

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        loss_of(config, module, batch).sum().backward()
        optimizer.step()

    return step


def ours(config: Config, copies: int, device: str = "cpu") -> Step:
    """This project's step; returns the bytes held by per-example gradients."""
    module = network(config, device)
    wrapped = PerExampleGradients(module, copies, device == "cuda" and fused_kernels(config))
    optimizer = DpSgdOptimizer(adam(module), PLAN, KeyedStream(b"k" * 32))

    def step(batch: Batch) -> int:
        loss_of(config, wrapped, batch).sum().backward()
        held = held_bytes(module)
        optimizer.accumulate()
        optimizer.release(0)
        return held

    return step


def opacus(config: Config, copies: int, device: str = "cpu", functorch: bool = False) -> Step:
    """Opacus's hooks on B * K examples, their gradients then summed over K; returns bytes held."""
    module = network(config, device)
    wrapped = GradSampleModule(
        module, loss_reduction="sum", strict=False, force_functorch=functorch
    )
    optimizer = DPOptimizer(adam(module), **_OPACUS)

    def step(batch: Batch) -> int:
        loss_of(config, wrapped, batch).sum().backward()
        held = held_bytes(module)
        for parameter in module.parameters():
            summed = parameter.grad_sample.unflatten(0, (-1, copies)).sum(1)
            parameter.grad_sample = summed
        optimizer.step()
        optimizer.zero_grad()
        return held

    return step


def opacus_ghost(config: Config, device: str = "cpu") -> Step:
    """Opacus's ghost clipping, which cannot sum over K: it clips each copy by itself."""
    module = network(config, device)
    wrapped = GradSampleModuleFastGradientClipping(
        module, loss_reduction="sum", strict=False, max_grad_norm=PLAN.max_grad_norm
    )
    optimizer = DPOptimizerFastGradientClipping(adam(module), **_OPACUS)

    def step(batch: Batch) -> None:
        losses = loss_of(config, wrapped, batch.copies_as_examples())
        DPTensorFastGradientClipping(wrapped, optimizer, losses, "sum").backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def held_bytes(module: nn.Module) -> int:
    """Bytes of all per-example gradients."""
    held: list[torch.Tensor] = [parameter.grad_sample for parameter in module.parameters()]
    return sum(gradient.numel() * gradient.element_size() for gradient in held)


def interleaved(
    steps: dict[str, Step], batch: Batch, repeats: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """Median CPU seconds of each step, the steps taking turns after a warm-up each.

    Returns:
        The seconds, and what each step returned in its warm-up.
    """
    returned = {name: step(batch) for name, step in steps.items()}
    return taking_turns(steps, batch, repeats), returned


def taking_turns(steps: dict[str, Step], batch: Batch, repeats: int) -> dict[str, float]:
    """Median CPU seconds of each step that has run before, the steps taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            began = time.process_time()
            step(batch)
            seconds[name].append(time.process_time() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}
