"""Norms by this project's kernel while images are drawn, when no gradient is asked for."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn


@contextmanager
def fused_norms(network: nn.Module) -> Iterator[None]:
    """Lets all group norms of a network on a GPU, with SiLU or without, be one kernel each.

    Inputs are `[N, C, H, W]`; under autocast, norms keep its precision with float32 statistics.
    """
    from core.diffusion import norm_kernel  # Triton is optional.

    def normed(norm: nn.GroupNorm, silu: bool, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x = x.contiguous(memory_format=torch.channels_last)
        return norm_kernel.forward(x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu)[0]

    norms = [layer for layer in network.modules() if isinstance(layer, nn.GroupNorm)]
    for norm in norms:
        vars(norm).update(
            forward=partial(normed, norm, False), with_silu=partial(normed, norm, True)
        )
    try:
        yield
    finally:
        for norm in norms:
            del vars(norm)["forward"], vars(norm)["with_silu"]
