"""Memory traffic of a DP-SGD step on a GPU: counted, so that it cannot grow unseen."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pretended_gpu import Gpu, pretended_gpu

from core.config import load
from core.diffusion import unet
from core.diffusion.denoiser import build_denoiser
from core.diffusion.loss import Draws
from core.privacy.keys import KeyedStream
from core.privacy.mechanisms.dp_sgd import DpSgdOptimizer
from core.privacy.mechanisms.per_example_gradients import PerExampleGradients
from core.privacy.plan.releases import DpSgdPlan
from core.training import stages

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "tests" / "benchmarks" / "README.md"
PLAN = DpSgdPlan(1, 0.5, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=64)
IMAGES = 64
PRECISIONS = ("float32", "bfloat16")


class Kernel:
    """In place of one of Triton: it touches what it is given."""

    def __init__(self, gpu: Gpu, name: str) -> None:
        self.gpu, self.name = gpu, name

    def __getitem__(self, grid: Any) -> Any:
        return lambda *given, **_: self.gpu.touch(self.name, *given)


def attention_of(gpu: Gpu) -> Any:
    """Attention as one kernel, which writes no products of queries and keys."""

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: Any, key: Any, value: Any) -> Any:
            out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
            ctx.save_for_backward(query, key, value, out)
            gpu.touch("attention", query, key, value, out)
            return out

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            *inputs, out = ctx.saved_tensors
            found = tuple(torch.empty_like(each) for each in inputs)
            gpu.touch("attention_backward", *inputs, out, *grads, *found)
            return found

    def attention(*inputs: torch.Tensor) -> Any:
        low = torch.is_autocast_enabled("cuda")
        return Attention.apply(*(each.bfloat16() if low else each for each in inputs))

    return attention


def bytes_of_a_step(folder: Path, precision: str, fused: bool) -> Counter[str]:
    """Of each operation, for one noisy image of the full-size network."""
    settings = {"runtime.cache": str(folder), "training.precision": precision}
    config = load(ROOT / "core" / "configs" / "mnist.yaml", settings)
    copies, sizes = config.private_training.noise_multiplicity, config.dataset
    shape = (sizes.channels, sizes.image_size, sizes.image_size)
    with pretended_gpu("meta") as gpu, pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attention_of(gpu))
        if fused:
            from core.diffusion import norm_kernel
            from core.privacy.mechanisms import convolution_kernel

            patch.setattr(convolution_kernel, "_tap_gradient", Kernel(gpu, "tap_gradient"))
            for name in ("_forward", "_backward"):
                patch.setattr(norm_kernel, name, Kernel(gpu, f"norm{name}"))
        denoiser = build_denoiser(config).to("cuda")
        network = PerExampleGradients(denoiser, copies, fused)
        adam = torch.optim.Adam(denoiser.parameters())
        optimizer = DpSgdOptimizer(adam, PLAN, KeyedStream(b"n" * 32))
        drawn = torch.empty(IMAGES, copies, device="cuda")
        draws = Draws(drawn, torch.empty(IMAGES, copies, *shape, device="cuda"), drawn)
        images = torch.empty(IMAGES, *shape, device="cuda")
        labels = torch.zeros(IMAGES, dtype=torch.long, device="cuda")
        gpu.bytes.clear()
        stages._loss(config, network, None, images, labels, draws).sum().backward()
        optimizer.accumulate()
    return Counter({name: count // (IMAGES * copies) for name, count in gpu.bytes.items()})


def stated(row: str) -> list[str]:
    """Cells of the row of `tests/benchmarks/README.md` that begins so."""
    (line,) = (line for line in README.read_text().splitlines() if line.startswith(f"| {row} |"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_moves_the_bytes_that_are_stated(precision, fused, tmp_path):
    if fused:
        pytest.importorskip("triton")
    found = bytes_of_a_step(tmp_path, precision, fused)
    row = "this project's kernels" if fused else "torch's kernels"
    expected = float(stated(row)[PRECISIONS.index(precision)])
    assert found.total() / 1e6 == pytest.approx(expected, rel=0.01), found.most_common(12)


def test_norms_and_silu_apart_are_seen(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(unet, "norm_silu", lambda norm, x: F.silu(norm(x)))
    found = bytes_of_a_step(tmp_path, "bfloat16", fused=True).total() / 1e6
    assert found > 1.1 * float(stated("this project's kernels")[1])
