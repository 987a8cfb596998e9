"""Triton kernel of the weight gradients of each example: an implicit matrix product.

With channels last, the gradient of a tap is a product over all positions of an example's copies,
of the outputs' gradients with the inputs that the tap saw there. Nothing is copied or unfolded,
and sums are float32.
"""
# Triton's language has no types:
# pyright: basic

from typing import Any

import torch
import triton
import triton.language as tl

_MOST_OUTPUTS, _MOST_INPUTS = 64, 128
"""Channels of a tile; with 8 KiB positions of either they fit three times into shared memory."""


@triton.jit
def _tap_gradient(
    x,
    grad,
    out,
    positions,
    height,
    width,
    inputs,
    outputs,
    rows: tl.constexpr,
    columns: tl.constexpr,
    block: tl.constexpr,
    inputs_block: tl.constexpr,
    outputs_block: tl.constexpr,
    precision: tl.constexpr,
):
    """One tile, `[outputs_block, inputs_block]`, of one tap of one example.

    Args:
        positions: of an example, K * height * width.
        height, width: of an image; what a tap would see beyond them is zero.
        rows, columns: of taps; odd.
        block: positions at once.
    """
    taps: tl.constexpr = rows * columns
    # Neighbours in the grid are taps of an example, which read the same.
    tap, example = tl.program_id(0) % taps, tl.program_id(0) // taps
    tiles = (inputs + inputs_block - 1) // inputs_block
    c = tl.program_id(1) % tiles * inputs_block + tl.arange(0, inputs_block)
    o = tl.program_id(1) // tiles * outputs_block + tl.arange(0, outputs_block)
    down, right = tap // columns - rows // 2, tap % columns - columns // 2
    x += example.to(tl.int64) * positions * inputs
    grad += example.to(tl.int64) * positions * outputs
    total = tl.full((outputs_block, inputs_block), 0.0, tl.float32)
    for start in range(0, positions, block):
        position = start + tl.arange(0, block)
        row, column = position // width % height + down, position % width + right
        there = position < positions
        seen = there & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        of_outputs = tl.load(
            grad + position[None, :] * outputs + o[:, None],
            mask=there[None, :] & (o < outputs)[:, None],
            other=0.0,
        )
        of_inputs = tl.load(
            x + (position + down * width + right)[:, None] * inputs + c[None, :],
            mask=seen[:, None] & (c < inputs)[None, :],
            other=0.0,
        )
        total = tl.dot(of_outputs, of_inputs, total, input_precision=precision)
    place = (example.to(tl.int64) * outputs + o[:, None]) * inputs + c[None, :]
    tl.store(out + place * taps + tap, total, mask=(o < outputs)[:, None] & (c < inputs)[None, :])


def tile(inputs: int, outputs: int, bytes_each: int) -> dict[str, int]:
    """Sizes of a tile, and how it is computed, for channels of so many bytes each value."""

    def channels(count: int, most: int) -> int:
        return min(most, max(16, triton.next_power_of_2(count)))

    return {
        "block": 128 // bytes_each,
        "inputs_block": channels(inputs, _MOST_INPUTS),
        "outputs_block": channels(outputs, _MOST_OUTPUTS),
        "num_warps": 2 * bytes_each,
        "num_stages": 3,
    }


def weight_gradients(
    x: torch.Tensor, grad: torch.Tensor, copies: int, size: tuple[int, int]
) -> torch.Tensor:
    """Of a convolution with stride 1 that keeps the side, summed over the copies of each example.

    Args:
        x: inputs `[B * K, C, H, W]`; of float32, products are TF32 where cuDNN's may be.
        grad: gradients of the outputs, `[B * K, O, H, W]`, of the same type.
        copies: K.
        size: of the taps, odd.

    Returns:
        float32 `[B, O, C, *size]`.
    """
    x, grad = (each.contiguous(memory_format=torch.channels_last) for each in (x, grad))
    (count, inputs, height, width), outputs = x.shape, grad.shape[1]
    out = torch.empty((count // copies, outputs, inputs, *size), device=x.device)
    settings = tile(inputs, outputs, x.element_size())
    tiles = triton.cdiv(inputs, settings["inputs_block"])
    tiles *= triton.cdiv(outputs, settings["outputs_block"])
    launch: Any = _tap_gradient[(len(out) * size[0] * size[1], tiles)]
    launch(
        *(x, grad, out, copies * height * width, height, width, inputs, outputs, *size),
        precision="tf32" if torch.backends.cudnn.allow_tf32 else "ieee",
        **settings,
    )
    return out
