"""Per-example weight gradients of a convolution, by the way that fits its shape."""
# torch's operators have no types:
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from typing import Any

import torch
from torch import nn

convolution_backward: Any = torch.ops.aten.convolution_backward
Gradients = tuple[torch.Tensor, torch.Tensor]

_WORTH_A_CALL = {"cpu": 2**25, "cuda": 2**30}
"""Multiplications for one example from which a call for each example costs less than one grouped
convolution: measured on a CPU; for a GPU, what keeps it busy for as long as a call takes."""


def settings(layer: nn.Conv2d) -> list[Any]:
    """Stride, padding, dilation, transposed and output padding, as `convolution_backward` wants."""
    return [layer.stride, layer.padding, layer.dilation, False, [0, 0]]


def weight_and_bias(
    layer: nn.Conv2d, x: torch.Tensor, grad: torch.Tensor, copies: int
) -> Gradients:
    """Gradients of each example, summed over its copies.

    Args:
        layer: without groups, zero-padded.
        x: inputs `[B * K, C, H, W]`, the K copies of an example next to each other.
        grad: gradients of the outputs `[B * K, O, H', W']`, in the memory format of `x`.
        copies: K.

    Returns:
        `[B, *layer.weight.shape]` and `[B, O]`, in the precision of `x`.
    """
    if layer.kernel_size == layer.stride == (1, 1) and layer.padding == (0, 0):
        rows_x, rows_grad = (
            t.permute(0, 2, 3, 1).reshape(len(x) // copies, -1, t.shape[1]) for t in (x, grad)
        )
        weight, bias = products(rows_x, rows_grad)
        return weight[..., None, None], bias
    work = copies * grad[0, 0].numel() * layer.weight.numel()
    way = one_by_one if work >= _WORTH_A_CALL[x.device.type] else grouped
    return way(layer, x, grad, copies)


def products(rows_x: torch.Tensor, rows_grad: torch.Tensor) -> Gradients:
    """Gradients of `y = W x + b` from x and dL/dy at the rows of each example, `[B, rows, ...]`."""
    return torch.bmm(rows_grad.mT, rows_x), rows_grad.sum(1)


def one_by_one(layer: nn.Conv2d, x: torch.Tensor, grad: torch.Tensor, copies: int) -> Gradients:
    """The ordinary weight gradient, called for the copies of one example after the other."""
    weight = layer.weight.detach().to(x.dtype)
    arguments = [[len(weight)], *settings(layer), 1, [False, True, True]]
    parts = [
        convolution_backward(g, one, weight, *arguments)[1:]
        for g, one in zip(grad.split(copies), x.split(copies), strict=True)
    ]
    return torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts])


def grouped(layer: nn.Conv2d, x: torch.Tensor, grad: torch.Tensor, copies: int) -> Gradients:
    """All examples as one grouped convolution, a group for each example.

    Rochette et al. (2019) with the roles of copies and channels swapped: `[K, B * C, H, W]` makes
    K the batch over which a group sums.
    """
    batch, shape = len(x) // copies, layer.weight.shape
    rows_x, rows_grad = (
        t.unflatten(0, (batch, copies)).transpose(0, 1).reshape(copies, -1, *t.shape[2:])
        for t in (x, grad)
    )
    only_its_shape = x.new_empty(1).expand(batch * shape[0], *shape[1:])
    arguments = [None, *settings(layer), batch, [False, True, False]]
    weight = convolution_backward(rows_grad, rows_x, only_its_shape, *arguments)[1]
    bias = grad.sum((2, 3)).view(batch, copies, -1).sum(1)
    return weight.view(batch, *shape), bias
