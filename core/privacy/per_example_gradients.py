"""Per-example gradients, summed over the K noise draws of an example inside the backward pass.

Each supported layer's backward gives the input gradient as usual and, in place of the batch's
weight gradient, one weight gradient for each example over its K copies, put into
`parameter.grad_sample` where Opacus's optimizers look for it. The gradient of a single copy never
exists, so memory is 1/K of that of hooks on `K * B` examples.
"""
# Opacus has no stubs, and torch's iterators over a module have no types:
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Callable
from types import MethodType
from typing import Any, cast

import torch
import torch.nn.functional as F
from opacus.grad_sample.gsm_base import AbstractGradSampleModule
from torch import nn

from core.errors import ConfigError


class PerExampleGradients(AbstractGradSampleModule):
    """Wraps a module whose inputs are `[K * B, ...]`, copy-major, and fills `grad_sample`.

    After a backward pass of a loss, `parameter.grad_sample` is `[B, *parameter.shape]`: the
    gradient of that loss with respect to the parameter, through the K copies of each example.

    Args:
        module: network of Conv2d, Linear, GroupNorm and Embedding layers.
        copies: noise multiplicity K, at least 1.

    Raises:
        ConfigError: a layer with parameters is of no supported kind, or mixes examples.

    Privacy: valid only because no layer mixes examples of a batch.
    """

    def __init__(self, module: nn.Module, copies: int) -> None:
        super().__init__(module)
        self.copies = copies
        self._layers: list[nn.Module] = []
        for name, layer in module.named_modules():
            if not any(True for _ in layer.parameters(recurse=False)):
                continue
            function = _FUNCTIONS.get(type(layer))
            if function is None:
                raise ConfigError(
                    f"layer '{name}' ({type(layer).__name__}) has no per-example gradient; "
                    f"supported: {', '.join(kind.__name__ for kind in _FUNCTIONS)}"
                )
            if isinstance(layer, nn.Conv2d) and (
                layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str)
            ):
                raise ConfigError(f"layer '{name}': only plain zero-padded convolutions supported")
            layer.forward = MethodType(_forward(function, copies), layer)
            self._layers.append(layer)

    def remove_hooks(self) -> None:
        """Restores the layers' own forward."""
        for layer in self._layers:
            del layer.forward
        self._layers = []


def _forward(function: Any, copies: int) -> Callable[..., torch.Tensor]:
    def forward(layer: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        if inputs.shape[0] % copies:
            raise ValueError(f"batch of {inputs.shape[0]} is no multiple of K={copies}")
        return function.apply(inputs, layer.weight, getattr(layer, "bias", None), layer, copies)

    return forward


def _store(parameter: nn.Parameter | None, grad_sample: torch.Tensor) -> None:
    if parameter is None or not parameter.requires_grad:
        return
    earlier = getattr(parameter, "grad_sample", None)
    cast(Any, parameter).grad_sample = grad_sample if earlier is None else earlier + grad_sample


class _Conv2d(torch.autograd.Function):
    """Weight gradient of all examples as one grouped convolution, a group for each example.

    Rochette et al. (2019) with the roles of copies and channels swapped: `[K * B, C, H, W]` viewed
    as `[K, B * C, H, W]` makes K the batch over which a group sums.
    """

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, layer: nn.Conv2d, copies: int) -> Any:
        ctx.save_for_backward(x, weight)
        ctx.layer, ctx.copies = layer, copies
        return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight = ctx.saved_tensors
        layer, copies, grad = ctx.layer, ctx.copies, grads[0].contiguous()
        batch = x.shape[0] // copies
        shape = [layer.stride, layer.padding, layer.dilation, False, [0, 0]]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.aten.convolution_backward(
                grad, x, weight, None, *shape, 1, [True, False, False]
            )[0]
        grouped = torch.ops.aten.convolution_backward(
            grad.reshape(copies, -1, *grad.shape[2:]),
            x.contiguous().reshape(copies, -1, *x.shape[2:]),
            weight.new_empty(1).expand(batch * len(weight), *weight.shape[1:]),  # Shape alone.
            None, *shape, batch, [False, True, False],
        )[1]  # fmt: skip
        _store(layer.weight, grouped.view(batch, *weight.shape))
        if layer.bias is not None:
            _store(layer.bias, grad.sum((2, 3)).view(copies, batch, -1).sum(0))
        return grad_x, None, None, None, None


class _Linear(torch.autograd.Function):
    """Weight gradient by a batched product over copies and positions."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, layer: nn.Linear, copies: int) -> Any:
        ctx.save_for_backward(x, weight)
        ctx.layer, ctx.copies = layer, copies
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight = ctx.saved_tensors
        grad, copies = grads[0], ctx.copies
        batch = x.shape[0] // copies
        rows_x = x.reshape(copies, batch, -1, x.shape[-1])
        rows_grad = grad.reshape(copies, batch, -1, grad.shape[-1])
        _store(ctx.layer.weight, torch.einsum("kbto,kbti->boi", rows_grad, rows_x))
        if ctx.layer.bias is not None:
            _store(ctx.layer.bias, rows_grad.sum((0, 2)))
        return grad @ weight if ctx.needs_input_grad[0] else None, None, None, None, None


class _GroupNorm(torch.autograd.Function):
    """Scale and shift gradients from two sums over positions, without storing `x_hat`."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, layer: nn.GroupNorm, copies: int) -> Any:
        x = x.contiguous()
        n, c = x.shape[:2]
        out, mean, rstd = torch.native_group_norm(
            x, weight, bias, n, c, x[0, 0].numel(), layer.num_groups, layer.eps
        )
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.layer, ctx.copies = layer, copies
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, mean, rstd = ctx.saved_tensors
        layer, copies, grad = ctx.layer, ctx.copies, grads[0].contiguous()
        n, c = x.shape[:2]
        positions = x[0, 0].numel()
        grad_x = torch.ops.aten.native_group_norm_backward(
            grad, x, mean, rstd, weight, n, c, positions, layer.num_groups, [True, False, False]
        )[0]
        per_group = c // layer.num_groups
        shift = grad.reshape(n, c, -1).sum(2)
        scale = (grad * x).reshape(n, c, -1).sum(2)
        mean = mean.view(n, -1).repeat_interleave(per_group, 1)
        rstd = rstd.view(n, -1).repeat_interleave(per_group, 1)
        scale = (scale - shift * mean) * rstd
        _store(layer.weight, scale.view(copies, -1, c).sum(0))
        _store(layer.bias, shift.view(copies, -1, c).sum(0))
        return grad_x, None, None, None, None


class _Embedding(torch.autograd.Function):
    """Row gradients as a product with the one-hot labels."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, layer: nn.Embedding, copies: int) -> Any:
        ctx.save_for_backward(x)
        ctx.layer, ctx.copies = layer, copies
        return F.embedding(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        grad, rows = grads[0], ctx.layer.num_embeddings
        hot = F.one_hot(x, rows).to(grad.dtype).view(ctx.copies, -1, rows)
        grad = grad.reshape(ctx.copies, hot.shape[1], -1)
        _store(ctx.layer.weight, torch.einsum("kbv,kbd->bvd", hot, grad))
        return None, None, None, None, None


_FUNCTIONS: dict[type[nn.Module], Any] = {
    nn.Conv2d: _Conv2d,
    nn.Linear: _Linear,
    nn.GroupNorm: _GroupNorm,
    nn.Embedding: _Embedding,
}
