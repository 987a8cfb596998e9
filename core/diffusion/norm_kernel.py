"""Triton kernels of group norm with SiLU behind it, forward and backward, channels last.

A program holds whole groups of one image, so that its statistics, and the sums that gradients of
scale and shift are made of, are that image's alone. All arithmetic is float32, whatever the inputs.
Each reads its inputs twice, the second time from a cache; what SiLU needs is computed again.
"""
# Triton's language has no types:
# pyright: basic

from typing import Any

import torch
import triton
import triton.language as tl

_CHANNELS = 32
"""Of a program, at most, unless a group is larger: with bfloat16, 64 bytes of each position."""
_TILE = 2048
"""Values of a program at once."""


@triton.jit
def _of_group(values, lane, size: tl.constexpr):
    """The sum over the group of each channel, for each channel of a program."""
    same = lane[:, None] // size == lane[None, :] // size
    return tl.sum(tl.where(same, values[None, :], 0.0), 1)


@triton.jit
def _forward(
    x,
    weight,
    bias,
    out,
    means,
    deviations,
    positions,
    channels,
    groups,
    eps,
    size: tl.constexpr,
    whole: tl.constexpr,
    lanes: tl.constexpr,
    block: tl.constexpr,
    silu: tl.constexpr,
):
    """Whole groups of one image.

    Args:
        means, deviations: of each image and group; the latter are inverse, as torch saves them.
        positions: of an image, H * W.
        size: channels of a group.
        whole: channels of a program; `lanes` is the power of two from there.
        block: positions at once.
    """
    parts = (channels + whole - 1) // whole
    image, lane = (tl.program_id(0) // parts).to(tl.int64), tl.arange(0, lanes)
    c = tl.program_id(0) % parts * whole + lane
    there = (lane < whole) & (c < channels)
    x += image * positions * channels
    out += image * positions * channels
    # Around the first value of a channel, so that no large mean cancels the squares.
    first = tl.load(x + c, mask=there, other=0.0).to(tl.float32)
    total = tl.full((block, lanes), 0.0, tl.float32)
    squares = tl.full((block, lanes), 0.0, tl.float32)
    for start in range(0, positions, block):
        position = start + tl.arange(0, block)
        seen = (position < positions)[:, None] & there[None, :]
        value = tl.load(x + position[:, None] * channels + c[None, :], mask=seen, other=0.0)
        value = tl.where(seen, value.to(tl.float32) - first[None, :], 0.0)
        total += value
        squares += value * value
    own = tl.sum(total, 0) / positions
    spread = tl.sum(squares, 0) - positions * own * own
    own += first
    mean = _of_group(own, lane, size) / size
    off = tl.where(there, own - mean, 0.0)
    variance = _of_group(spread + positions * off * off, lane, size) / (size * positions)
    deviation = 1.0 / tl.sqrt(variance + eps)
    one = there & (lane % size == 0)
    tl.store(means + image * groups + c // size, mean, mask=one)
    tl.store(deviations + image * groups + c // size, deviation, mask=one)
    scale = tl.load(weight + c, mask=there, other=0.0) * deviation
    shift = tl.load(bias + c, mask=there, other=0.0)
    for start in range(0, positions, block):
        position = start + tl.arange(0, block)
        seen = (position < positions)[:, None] & there[None, :]
        place = position[:, None] * channels + c[None, :]
        value = tl.load(x + place, mask=seen, other=0.0).to(tl.float32)
        value = (value - mean[None, :]) * scale[None, :] + shift[None, :]
        if silu:
            value = value / (1.0 + tl.exp(-value))
        tl.store(out + place, value, mask=seen)


@triton.jit
def _before_silu(x, grad, place, seen, mean, deviation, scale, shift, silu: tl.constexpr):
    """Normalised values, and the gradients of what SiLU was given."""
    value = tl.load(x + place, mask=seen, other=0.0).to(tl.float32)
    value = (value - mean[None, :]) * deviation[None, :]
    gradient = tl.load(grad + place, mask=seen, other=0.0).to(tl.float32)
    if silu:
        given = value * scale[None, :] + shift[None, :]
        sigmoid = 1.0 / (1.0 + tl.exp(-given))
        gradient *= sigmoid * (1.0 + given * (1.0 - sigmoid))
    return value, gradient


@triton.jit
def _backward(
    x,
    grad,
    weight,
    bias,
    means,
    deviations,
    grad_x,
    scales,
    shifts,
    positions,
    channels,
    groups,
    size: tl.constexpr,
    whole: tl.constexpr,
    lanes: tl.constexpr,
    block: tl.constexpr,
    silu: tl.constexpr,
):
    """Whole groups of one image, whose sums `scales` and `shifts` take, `[N, C]`."""
    parts = (channels + whole - 1) // whole
    image, lane = (tl.program_id(0) // parts).to(tl.int64), tl.arange(0, lanes)
    c = tl.program_id(0) % parts * whole + lane
    there = (lane < whole) & (c < channels)
    x += image * positions * channels
    grad += image * positions * channels
    grad_x += image * positions * channels
    mean = tl.load(means + image * groups + c // size, mask=there, other=0.0)
    deviation = tl.load(deviations + image * groups + c // size, mask=there, other=0.0)
    scale = tl.load(weight + c, mask=there, other=0.0)
    shift = tl.load(bias + c, mask=there, other=0.0)
    of_scale = tl.full((block, lanes), 0.0, tl.float32)
    of_shift = tl.full((block, lanes), 0.0, tl.float32)
    for start in range(0, positions, block):
        position = start + tl.arange(0, block)
        seen = (position < positions)[:, None] & there[None, :]
        place = position[:, None] * channels + c[None, :]
        value, gradient = _before_silu(x, grad, place, seen, mean, deviation, scale, shift, silu)
        of_scale += gradient * value
        of_shift += gradient
    sum_of_scale, sum_of_shift = tl.sum(of_scale, 0), tl.sum(of_shift, 0)
    tl.store(scales + image * channels + c, sum_of_scale, mask=there)
    tl.store(shifts + image * channels + c, sum_of_shift, mask=there)
    through_deviation = _of_group(scale * sum_of_scale, lane, size) / (size * positions)
    through_mean = _of_group(scale * sum_of_shift, lane, size) / (size * positions)
    for start in range(0, positions, block):
        position = start + tl.arange(0, block)
        seen = (position < positions)[:, None] & there[None, :]
        place = position[:, None] * channels + c[None, :]
        value, gradient = _before_silu(x, grad, place, seen, mean, deviation, scale, shift, silu)
        gradient = gradient * scale[None, :] - through_mean[None, :]
        gradient = deviation[None, :] * (gradient - value * through_deviation[None, :])
        tl.store(grad_x + place, gradient, mask=seen)


def tile(channels: int, groups: int) -> dict[str, int]:
    """Sizes of a program's part of an image."""
    size = channels // groups
    whole = size * max(1, min(groups, _CHANNELS // size))
    lanes = triton.next_power_of_2(whole)
    return {"size": size, "whole": whole, "lanes": lanes, "block": max(1, _TILE // lanes)}


def forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float, silu: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Group norm, then SiLU if so asked.

    Args:
        x: `[N, C, H, W]`, channels last.
        weight, bias: scale and shift, `[C]`.

    Returns:
        The same shape, order and type as `x`; then means and inverse standard deviations, float32
        `[N, groups]`, for `backward`.
    """
    count, channels, height, width = x.shape
    sizes = tile(channels, groups)
    out = torch.empty_like(x)
    means, deviations = torch.empty((2, count, groups), device=x.device)
    launch: Any = _forward[(count * triton.cdiv(channels, sizes["whole"]),)]
    launch(
        *(x, weight, bias, out, means, deviations, height * width, channels, groups, eps),
        **(sizes | {"silu": silu}),
    )
    return out, means, deviations


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    means: torch.Tensor,
    deviations: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    silu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `x`, and of scale and shift for each image, float32 `[N, C]`.

    Args:
        grad: of the outputs, in order and type of `x`.
    """
    (count, channels, height, width), groups = x.shape, means.shape[1]
    sizes = tile(channels, groups)
    grad_x = torch.empty_like(x)
    scales, shifts = torch.empty((2, count, channels), device=x.device)
    launch: Any = _backward[(count * triton.cdiv(channels, sizes["whole"]),)]
    launch(
        *(x, grad, weight, bias, means, deviations, grad_x, scales, shifts),
        *(height * width, channels, groups),
        **(sizes | {"silu": silu}),
    )
    return grad_x, scales, shifts
