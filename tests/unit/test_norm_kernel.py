"""The kernels of group norm with SiLU: interpreted on the CPU, compiled for GPUs without one."""
# ruff: noqa: E402

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

triton = pytest.importorskip("triton")

from compiled_kernel import compiled_without_spills
from triton.compiler import ASTSource

from core.diffusion import norm_kernel
from core.diffusion.unet import norm_silu
from core.privacy.mechanisms import kernels
from core.privacy.mechanisms.per_example_gradients import PerExampleGradients

ROOT, HERE = Path(__file__).resolve().parents[2], Path(__file__).resolve().parent
BATCH, COPIES = 3, 2
CASES = [  # Channels, groups, sides, SiLU, precision.
    (12, 3, (5, 6), True, torch.float32),
    (12, 3, (5, 6), False, torch.float32),
    (36, 6, (9, 10), True, torch.float32),  # Groups of no power of two, two programs an image.
    (66, 11, (3, 3), True, torch.float32),
    (40, 1, (4, 4), True, torch.float32),  # A group larger than a program's usual channels.
    (8, 2, (1, 1), True, torch.float32),
    (64, 16, (14, 14), True, torch.bfloat16),
    (64, 16, (14, 14), False, torch.bfloat16),
]
Case = tuple[int, int, tuple[int, int], bool, torch.dtype]


class Normed(nn.Module):
    """A norm, with SiLU behind it or without."""

    def __init__(self, channels: int, groups: int, silu: bool) -> None:
        super().__init__()
        self.norm, self.silu = nn.GroupNorm(groups, channels), silu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return norm_silu(self.norm, x) if self.silu else self.norm(x)


def of(case: Case) -> tuple[Normed, torch.Tensor, torch.Tensor]:
    """A network, its inputs, and the gradients of its outputs."""
    channels, groups, sides, silu, dtype = case
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(BATCH * COPIES, channels, *sides, generator=generator) for _ in range(2))
    network = Normed(channels, groups, silu)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(channels, generator=generator))
    return network, (2 * x + 3).to(dtype), grad.to(dtype)


def by_kernel(case: Case, spoiled: float | None = None) -> list[torch.Tensor]:
    """Outputs, and gradients of x and, of each example, of scale and shift.

    Args:
        spoiled: all that the second example holds.
    """
    network, x, grad = of(case)
    if spoiled is not None:
        x[COPIES : 2 * COPIES] = spoiled
    wrapped, low = PerExampleGradients(network, COPIES, fused=True), x.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
        out = wrapped(x.requires_grad_())
    out.backward(grad)
    assert x.grad is not None
    return [out.detach(), x.grad, network.norm.weight.grad_sample, network.norm.bias.grad_sample]


def save(path: str) -> None:
    """In a process that interprets kernels, which Triton decides when it is loaded."""
    found = [[by_kernel(case, spoiled) for spoiled in (None, float("nan"))] for case in CASES]
    for dtype in (torch.float32, torch.bfloat16):
        kernels._check_norm(torch.device("cpu"), dtype)
    torch.save(found, path)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    path = tmp_path_factory.mktemp("norm") / "norm.pt"
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/tests:{HERE}"}
    code = f"from test_norm_kernel import save; save({str(path)!r})"
    subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, check=True)
    return dict(zip(CASES, torch.load(path), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients_are_those_of_one_example_at_a_time(case, interpreted):
    found, low = interpreted[case][0], case[-1] == torch.bfloat16
    assert [each.dtype for each in found] == [case[-1]] * 2 + [torch.float32] * 2
    network, x, grad = of(case)
    for example in range(BATCH):
        part = slice(example * COPIES, (example + 1) * COPIES)
        inputs = x[part].float().requires_grad_()
        out = network(inputs)
        gradients = torch.autograd.grad(out, [inputs, *network.parameters()], grad[part].float())
        rounding = 2**-7 if low else 1e-5  # The interpreter cuts bits off.
        for one, other in zip(found[:2], (out, gradients[0]), strict=True):
            torch.testing.assert_close(one[part].float(), other, rtol=rounding, atol=rounding)
        for one, other in zip(found[2:], gradients[1:], strict=True):
            torch.testing.assert_close(one[example], other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_example_sees_another(case, interpreted):
    before, after = interpreted[case]
    assert after[0].chunk(BATCH)[1].isnan().all()
    for one, other in zip(before, after, strict=True):
        for example in (0, 2):
            assert torch.equal(one.chunk(BATCH)[example], other.chunk(BATCH)[example])


def test_remove_hooks_gives_the_layers_their_own_way_back():
    network, x, _ = of(CASES[0])
    before = network(x)
    PerExampleGradients(network, COPIES, fused=True).remove_hooks()
    assert torch.equal(network(x), before)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("kernel", ["_forward", "_backward"])
@pytest.mark.parametrize("arch", [80, 86, 90])
@pytest.mark.parametrize("channels", [64, 192])  # Groups of 4, and of 6.
def test_it_compiles_for_a_gpu_without_spilling_registers(
    channels, arch, kernel, dtype, tmp_path, monkeypatch
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function: Any = getattr(norm_kernel, kernel)
    constants = norm_kernel.tile(channels, min(32, channels // 4)) | {"silu": True}
    types = dict.fromkeys(("x", "grad", "out", "grad_x"), f"*{dtype}") | {"eps": "fp32"}
    types |= dict.fromkeys(("positions", "channels", "groups"), "i32")
    types |= dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "*fp32") for name in function.arg_names}
    aligned = [n for n, kind in enumerate(signature.values()) if kind not in ("constexpr", "fp32")]
    attributes = {(number,): [["tt.divisibility", 16]] for number in aligned}
    source = ASTSource(function, signature, constants, attributes)
    compiled_without_spills(source, arch, tmp_path)
