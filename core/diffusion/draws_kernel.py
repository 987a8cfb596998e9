"""Triton kernel that draws normal numbers for many examples at once, each from its own stream."""
# Triton's language has no types:
# pyright: basic

from typing import Any

import torch
import triton
import triton.language as tl

KNOWN = (2**40 + 7, (1.1494415, 0.6939592, 0.2492289, -2.1817131))
"""A key and the first numbers of its stream, up to the rounding of logarithm and cosine."""
_BLOCK = 256


@triton.jit
def _normal(keys, out, count, block: tl.constexpr):
    """Four numbers for each counter of a row's key, by Philox (Salmon et al. 2011)."""
    row = tl.program_id(0).to(tl.int64)
    counter = tl.program_id(1) * block + tl.arange(0, block)
    first, second, third, fourth = tl.randn4x(tl.load(keys + row), counter)
    place = 4 * counter
    out += row * count + place
    tl.store(out, first, mask=place < count)
    tl.store(out + 1, second, mask=place + 1 < count)
    tl.store(out + 2, third, mask=place + 2 < count)
    tl.store(out + 3, fourth, mask=place + 3 < count)


def normal(keys: torch.Tensor, count: int) -> torch.Tensor:
    """Standard normal numbers, float32 `[B, count]`.

    Args:
        keys: int64 `[B]`, of a stream each; what a row holds depends on its key alone.
    """
    out = torch.empty((len(keys), count), device=keys.device)
    launch: Any = _normal[(len(keys), triton.cdiv(count, 4 * _BLOCK))]
    launch(keys, out, count, block=_BLOCK)
    return out
