"""The kernel of weight gradients: interpreted on the CPU, and compiled for GPUs without one."""
# ruff: noqa: E402

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

triton = pytest.importorskip("triton")

from compiled_kernel import compiled_without_spills
from plain_norm import backward, forward, of_another_group, over_the_batch
from triton.compiler import ASTSource
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

from core.diffusion import draws_kernel, norm_kernel
from core.privacy.mechanisms import convolution_gradients, convolution_kernel, kernels
from core.privacy.mechanisms.convolution_gradients import by_kernel, one_by_one, shifted
from core.privacy.mechanisms.per_example_gradients import PerExampleGradients

BATCH, COPIES = 3, 2
CPU = torch.device("cpu")
KERNEL = convolution_kernel._tap_gradient


def product(self: Any, a: Any, b: Any, total: Any, *_: Any) -> Any:
    """Of bfloat16 as well, whose bits Triton's own multiplies as whole numbers."""
    values = [
        (each.data.astype(np.uint32) << 16).view(np.float32)
        if each.data.dtype == np.uint16
        else each.data
        for each in (a, b)
    ]
    return TensorHandle(values[0] @ values[1] + total.data, total.dtype.scalar)


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(InterpreterBuilder, "create_dot", product)
    monkeypatch.setattr(convolution_kernel, "_tap_gradient", InterpretedFunction(KERNEL.fn))


def case(
    channels: int, outputs: int, shape: tuple[int, int], size: tuple[int, int]
) -> tuple[nn.Conv2d, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, grad = (
        torch.randn(BATCH * COPIES, count, *shape, generator=generator)
        for count in (channels, outputs)
    )
    padding = (size[0] // 2, size[1] // 2)
    return nn.Conv2d(channels, outputs, size, padding=padding), x, grad


CASES = [
    (12, 8, (10, 10), (3, 3)),
    (1, 40, (8, 8), (3, 3)),
    (17, 1, (7, 9), (3, 3)),
    (131, 66, (4, 4), (3, 3)),  # Two tiles of either.
    (5, 6, (6, 5), (1, 3)),
    (5, 6, (6, 7), (5, 3)),
    (4, 4, (1, 1), (3, 3)),
]


@pytest.mark.parametrize("way", [by_kernel, shifted])
@pytest.mark.parametrize("sizes", CASES, ids=str)
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_the_gradients_are_those_of_one_example_at_a_time(sizes, way, order, interpreted):
    layer, x, grad = case(*sizes)
    x, grad = x.contiguous(memory_format=order), grad.contiguous(memory_format=order)
    found, expected = way(layer, x, grad, COPIES), one_by_one(layer, x, grad, COPIES)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


def test_no_example_sees_another(interpreted):
    layer, x, grad = case(6, 5, (4, 4), (3, 3))
    before = by_kernel(layer, x, grad, COPIES)[0]
    x[COPIES : 2 * COPIES] = 1e30
    after = by_kernel(layer, x, grad, COPIES)[0]
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[2], after[2])
    assert not torch.isclose(before[1], after[1]).any()


def test_sums_of_bfloat16_are_float32(interpreted):
    layer, x, grad = case(9, 8, (14, 14), (3, 3))
    x, grad = x.bfloat16(), grad.bfloat16()
    found = by_kernel(layer, x, grad, COPIES)[0]
    assert found.dtype == torch.float32
    expected = one_by_one(layer, x.float(), grad.float(), COPIES)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_it_is_taken_where_it_is_right_and_else_one_line_says_why_not(
    interpreted, monkeypatch, caplog
):
    key, numbers = draws_kernel.KNOWN
    known = torch.tensor([numbers])
    monkeypatch.setattr(draws_kernel, "normal", lambda keys, _: known * (keys == key))
    monkeypatch.setattr(norm_kernel, "forward", forward)
    monkeypatch.setattr(norm_kernel, "backward", backward)
    asked = kernels.kernels_are_right.__wrapped__
    assert asked(CPU)
    assert not caplog.records
    monkeypatch.setattr(convolution_kernel, "_MOST_INPUTS", 16)  # Several tiles are right as well.
    assert asked(CPU)
    right = convolution_kernel.weight_gradients
    for dtype in ("float32", "bfloat16"):
        off = lambda x, *rest, d=dtype: right(x, *rest) + (str(x.dtype) == f"torch.{d}")  # noqa: E731
        monkeypatch.setattr(convolution_kernel, "weight_gradients", off)
        assert not asked(CPU)
        (line,) = (record.getMessage() for record in caplog.records)
        told = f"slower: convolutions differ from torch in torch.{dtype}"
        assert line == f"computing without the kernels of this project, thus {told}"
        caplog.clear()
    monkeypatch.setattr(convolution_kernel, "weight_gradients", right)
    for name, wrong in (("forward", of_another_group), ("backward", over_the_batch)):
        with monkeypatch.context() as patch:
            patch.setattr(norm_kernel, name, wrong)
            assert not asked(CPU)
        told = "group norm differs from torch in torch.float32"
        assert caplog.records.pop().getMessage().endswith(told)
    monkeypatch.setattr(draws_kernel, "normal", lambda *_: known + 1e-3)
    assert not asked(CPU)
    assert caplog.records.pop().getMessage().endswith("slower: draws are not those of their key")
    monkeypatch.setattr(convolution_kernel, "_tap_gradient", KERNEL)  # Not interpreted.
    assert not asked(CPU)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("fused", [True, False])
def test_the_switch_is_obeyed_on_a_gpu(fused, monkeypatch):
    from pretended_gpu import memory, pretended_gpu

    layer, x, _ = case(4, 5, (6, 6), (3, 3))
    taken: list[str] = []
    for name in ("by_kernel", "shifted"):
        monkeypatch.setattr(
            convolution_gradients, name, lambda *a, n=name: (taken.append(n), shifted(*a))[1]
        )
    with pretended_gpu():
        network = PerExampleGradients(layer.to("cuda"), COPIES, fused)
        network(x.to("cuda")).square().sum().backward()
        found = memory(layer.weight.grad_sample)
    assert taken == ["by_kernel" if fused else "shifted"]
    assert found.shape == (BATCH, *layer.weight.shape)


POINTERS, COUNTS = ("x", "grad", "out"), ("positions", "height", "width", "inputs", "outputs")


@pytest.mark.parametrize("precision", ["tf32", "ieee", "bf16"])
@pytest.mark.parametrize(("arch", "shared"), [(80, 163), (86, 99), (90, 227)])
def test_it_compiles_for_a_gpu_without_spilling_registers(
    arch, shared, precision, tmp_path, monkeypatch
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    low = precision == "bf16"
    settings = convolution_kernel.tile(128, 64, 2 if low else 4)
    options = {key: settings.pop(key) for key in ("num_warps", "num_stages")}
    constants = settings | {"rows": 3, "columns": 3, "precision": "tf32" if low else precision}
    types = dict.fromkeys(POINTERS[:2], "*bf16" if low else "*fp32") | {"out": "*fp32"}
    signature = {
        name: types.get(name, "i32" if name in COUNTS else "constexpr") for name in KERNEL.arg_names
    }
    aligned = ("x", "grad", "out", "positions", "inputs", "outputs")
    attributes = {(KERNEL.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(KERNEL, signature, constants, attributes)
    compiled = compiled_without_spills(source, arch, tmp_path, options)
    assert compiled.metadata.shared <= shared * 1024
    if precision != "ieee":
        assert any(word in compiled.asm["ptx"] for word in ("mma.sync", "wgmma"))  # Tensor cores.
