"""Per-example gradients, summed over the K noise draws of an example inside the backward pass.

Each supported layer's backward gives the input gradient as usual and, in place of the batch's
weight gradient, one weight gradient for each example over its K copies, put into
`parameter.grad_sample` where Opacus's optimizers look for it. The gradient of a single copy never
exists, so memory is 1/K of that of hooks on `B * K` examples.
"""
# Opacus has no stubs, and torch's iterators over a module have no types:
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from opacus.grad_sample.gsm_base import AbstractGradSampleModule
from torch import nn

from core.errors import ConfigError
from core.privacy.mechanisms.convolution_gradients import (
    convolution_backward,
    products,
    settings,
    weight_and_bias,
)


class PerExampleGradients(AbstractGradSampleModule):
    """Wraps a module whose inputs are `[B * K, ...]` and fills `grad_sample`.

    The K copies of an example lie next to each other, so that an example is a slice. After a
    backward pass of a loss, `parameter.grad_sample` is `[B, *parameter.shape]`: the gradient of
    that loss with respect to the parameter, through the K copies of each example. Under autocast
    it is what autocast's precision makes of it; norms and sums of it are taken in float32.

    Args:
        module: network of Conv2d, Linear, GroupNorm, Embedding and FreeParameter layers.
        copies: noise multiplicity K, at least 1.
        fused: whether layers on a GPU use the kernels of this project (`kernels.fused_kernels`).

    Raises:
        ConfigError: a layer with parameters is of no supported kind, or mixes examples.

    Privacy: valid only because no layer mixes examples of a batch.
    """

    def __init__(self, module: nn.Module, copies: int, fused: bool = False) -> None:
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
            more = (fused,) if isinstance(layer, nn.Conv2d) else ()
            if fused and isinstance(layer, nn.GroupNorm):
                function, more = _FusedGroupNorm, (False,)
                vars(layer)["with_silu"] = MethodType(_forward(function, copies, True), layer)
            layer.forward = MethodType(_forward(function, copies, *more), layer)
            self._layers.append(layer)

    def remove_hooks(self) -> None:
        """Restores the layers' own forward."""
        for layer in self._layers:
            del layer.forward
            vars(layer).pop("with_silu", None)
        self._layers = []


class FreeParameter(nn.Module):
    """A parameter that belongs to no other layer, one row for each row of a batch.

    Networks must use it in place of a bare `nn.Parameter`, of which only the sum of the gradients
    over a batch could be seen.

    Args:
        value: initial value.
    """

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(value)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """`[N, *value.shape]` for a batch `[N, ...]`."""
        return self.weight.expand(len(batch), *self.weight.shape)


def _forward(function: Any, copies: int, *more: bool) -> Callable[..., torch.Tensor]:
    def forward(layer: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        if inputs.shape[0] % copies:
            raise ValueError(f"batch of {inputs.shape[0]} is no multiple of K={copies}")
        device = inputs.device.type
        if torch.is_autocast_enabled(device) and inputs.is_floating_point():
            # What autocast does inside of a layer, but for group norm, which is float32 here.
            low = torch.get_autocast_dtype(device)
            inputs = inputs.to(torch.float32 if function is _GroupNorm else low)
        bias = getattr(layer, "bias", None)
        return function.apply(inputs, layer.weight, bias, layer, copies, *more)

    return forward


def _store(layer: Any, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """Adds gradients `[B, *shape]` to those of earlier uses of the layer in the same pass."""
    for parameter, grad_sample in ((layer.weight, weight), (getattr(layer, "bias", None), bias)):
        if parameter is None or grad_sample is None or not parameter.requires_grad:
            continue
        earlier = parameter.grad_sample
        parameter.grad_sample = grad_sample if earlier is None else earlier + grad_sample


class _Conv2d(torch.autograd.Function):
    """Input gradient as usual, weight gradients in `convolution_gradients`."""

    @staticmethod
    def forward(
        ctx: Any, x: Any, weight: Any, bias: Any, layer: nn.Conv2d, copies: int, fused: bool
    ) -> Any:
        ctx.save_for_backward(x, weight)
        ctx.layer, ctx.copies, ctx.fused = layer, copies, fused
        return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight = ctx.saved_tensors
        layer = ctx.layer
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        order = torch.channels_last if channels_last else torch.contiguous_format
        grad, x = grads[0].contiguous(memory_format=order), x.contiguous(memory_format=order)
        grad_x = None
        if ctx.needs_input_grad[0]:
            arguments = [None, *settings(layer), 1, [True, False, False]]
            grad_x = convolution_backward(grad, x, weight.to(x.dtype), *arguments)[0]
        _store(layer, *weight_and_bias(layer, x, grad, ctx.copies, ctx.fused))
        return grad_x, None, None, None, None, None


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
        grad, batch = grads[0], len(x) // ctx.copies
        rows_x, rows_grad = (t.reshape(batch, -1, t.shape[-1]) for t in (x, grad))
        _store(ctx.layer, *products(rows_x, rows_grad))
        grad_x = grad @ weight.to(grad.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None, None


class _GroupNorm(torch.autograd.Function):
    """Scale and shift gradients of each image from the kernel of the batch's backward."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, layer: nn.GroupNorm, copies: int) -> Any:
        n, c = x.shape[:2]
        # CUDA's kernels know this order alone, and before torch 2.14 they refuse another.
        x = x if x.device.type == "cpu" else x.contiguous()
        out, mean, rstd = torch.native_group_norm(
            x, weight, bias, n, c, x[0, 0].numel(), layer.num_groups, layer.eps
        )
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.layer, ctx.copies = layer, copies
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, mean, rstd = ctx.saved_tensors
        layer, copies, grad = ctx.layer, ctx.copies, grads[0]
        groups, parts = layer.num_groups, list[Any]()
        if x.device.type == "cpu" and not x.is_contiguous():  # Channels-last, with a kernel.
            grad_x = torch.empty_like(x)
            examples = (t.split(copies) for t in (grad_x, grad, x, mean, rstd))
            sizes = [copies, x.shape[1], x[0, 0].numel(), groups, [True, True, True]]
            for out, *example in zip(*examples, strict=True):
                one, *sums = _group_norm_backward(*example, weight, *sizes)
                out.copy_(one)  # At once, while it is in the cache.
                parts.append(sums)
            _store(layer, *(torch.stack(sums) for sums in zip(*parts, strict=True)))
        else:
            most = max(1, _MOST_GROUPS // groups)
            for some in zip(*(t.split(most) for t in (grad, x, mean, rstd)), strict=True):
                parts.append(_as_one_image(some, weight, groups))
            # Together again, without a copy where there is one part.
            whole = (
                part[0] if len(part) == 1 else torch.cat(part) for part in zip(*parts, strict=True)
            )
            grad_x, *sums_of_images = whole
            _store(layer, *(sums.unflatten(0, (-1, copies)).sum(1) for sums in sums_of_images))
        return grad_x, None, None, None, None


_group_norm_backward = torch.ops.aten.native_group_norm_backward
_MOST_GROUPS = 65_535
"""Of one call: CUDA's kernel counts them in the second dimension of its grid."""


def _as_one_image(images: Any, weight: Any, groups: int) -> Any:
    """Gradients of x, and of scale and shift for each image, `[n, c]`.

    Of one image of n * c channels, sums over "the batch" are those of each image.

    Args:
        images: `[n, c, ...]` of the gradient and of x, `[n, groups]` of means and deviations.
    """
    n, c = images[0].shape[:2]
    grad, x, mean, rstd = (t.reshape(1, n * t.shape[1], -1) for t in images)
    sizes = [1, n * c, x.shape[2], n * groups, [True, True, True]]
    one = _group_norm_backward(grad, x, mean[..., 0], rstd[..., 0], weight.repeat(n), *sizes)
    return one[0].view(images[1].shape), one[1].view(n, c), one[2].view(n, c)


class _FusedGroupNorm(torch.autograd.Function):
    """By `norm_kernel`, in the precision of the inputs, with SiLU where it follows."""

    @staticmethod
    def forward(
        ctx: Any, x: Any, weight: Any, bias: Any, layer: nn.GroupNorm, copies: int, silu: bool
    ) -> Any:
        from core.diffusion import norm_kernel  # Triton is optional.

        x = x.contiguous(memory_format=torch.channels_last)
        out, *kept = norm_kernel.forward(x, weight, bias, layer.num_groups, layer.eps, silu)
        ctx.save_for_backward(x, *kept, weight, bias)
        ctx.layer, ctx.copies, ctx.silu = layer, copies, silu
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        from core.diffusion import norm_kernel

        grad = grads[0].contiguous(memory_format=torch.channels_last)
        x, means, deviations, weight, bias = ctx.saved_tensors
        grad_x, *sums_of_images = norm_kernel.backward(
            grad, x, means, deviations, weight, bias, ctx.silu
        )
        _store(ctx.layer, *(s.unflatten(0, (-1, ctx.copies)).sum(1) for s in sums_of_images))
        return grad_x, None, None, None, None, None


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
        hot = F.one_hot(x, rows).to(grad.dtype).view(len(x) // ctx.copies, -1, rows)
        _store(ctx.layer, torch.bmm(hot.mT, grad.reshape(*hot.shape[:2], -1)))
        return None, None, None, None, None


class _FreeParameter(torch.autograd.Function):
    """Sum over the copies of an example, as no other layer has summed them."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, layer: Any, copies: int) -> Any:
        ctx.layer, ctx.copies = layer, copies
        return weight.expand(len(x), *weight.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        _store(ctx.layer, grads[0].unflatten(0, (-1, ctx.copies)).sum(1))
        return None, None, None, None, None


_FUNCTIONS: dict[type[nn.Module], Any] = {
    nn.Conv2d: _Conv2d,
    nn.Linear: _Linear,
    nn.GroupNorm: _GroupNorm,
    nn.Embedding: _Embedding,
    FreeParameter: _FreeParameter,
}
