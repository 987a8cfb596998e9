"""Whether a run computes by kernels of this project, which are asked first if they are right."""
# torch's operators have no types:
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import functools
import logging

import torch
import torch.nn.functional as F
from torch import nn

from core.config import Config
from core.device import config_device
from core.privacy.mechanisms import convolution_gradients

_LOG = logging.getLogger("core")


def fused_kernels(config: Config) -> bool:
    """Whether a run computes by kernels of this project: on a GPU on which they are right."""
    wanted = config.runtime.fused_kernels and config_device(config) == "cuda"
    return wanted and kernels_are_right(torch.device("cuda", torch.cuda.current_device()))


@functools.cache
def kernels_are_right(device: torch.device) -> bool:
    """Whether kernels compute on a device what they do elsewhere: asked once, of a tiny batch.

    Why not is told in one line.
    """
    try:  # Triton is optional.
        for dtype in (torch.float32, torch.bfloat16):
            _check_convolution(device, dtype)
            _check_norm(device, dtype)
        _check_draws(device)
    except Exception as error:  # Whatever Triton, its compiler or the driver lack.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        _LOG.warning("computing without the kernels of this project, thus slower: %s", reason)
        return False
    return True


def _check_convolution(device: torch.device, dtype: torch.dtype) -> None:
    """On small whole numbers, whose products and sums no precision rounds, it equals torch."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (
        torch.randint(-2, 3, (4, channels, 5, 6), generator=generator).float().to(device)
        for channels in (20, 17)
    )
    layer = nn.Conv2d(20, 17, 3, padding=1, device="meta")  # Its shape alone.
    expected = convolution_gradients.shifted(layer, x, grad, 2)[0]
    found = convolution_gradients.by_kernel(layer, x.to(dtype), grad.to(dtype), 2)[0]
    if not torch.equal(found, expected):
        raise ValueError(f"convolutions differ from torch in {dtype}")


def _check_norm(device: torch.device, dtype: torch.dtype) -> None:
    """Within a rounding to the type it is torch's, one image at a time, with SiLU or without."""
    from core.diffusion import norm_kernel

    generator = torch.Generator().manual_seed(0)
    x, grad, (weight, bias) = (
        torch.randn(shape, generator=generator).to(device)
        for shape in ((3, 36, 9, 10), (3, 36, 9, 10), (2, 36))
    )
    x, grad = (
        each.to(dtype).contiguous(memory_format=torch.channels_last) for each in (3 * x + 1, grad)
    )
    rounding = 2**-8 if dtype == torch.bfloat16 else 2**-16
    for silu in (False, True):
        out, means, deviations = norm_kernel.forward(x, weight, bias, 6, 1e-5, silu)
        sums = norm_kernel.backward(grad, x, means, deviations, weight, bias, silu)
        for image in range(len(x)):
            inputs = [
                each.float().requires_grad_() for each in (x[image : image + 1], weight, bias)
            ]
            with torch.enable_grad():
                one = F.group_norm(inputs[0], 6, inputs[1], inputs[2], 1e-5)
                one = F.silu(one) if silu else one
            expected = (one, *torch.autograd.grad(one, inputs, grad[image : image + 1].float()))
            for found, other in zip((out, *sums), expected, strict=True):
                error = (found[image].float() - other.squeeze(0)).norm() / other.norm()
                if not error < (rounding if found.dtype == dtype else 2**-16):
                    raise ValueError(f"group norm differs from torch in {dtype}")


def _check_draws(device: torch.device) -> None:
    """The answer to a known key."""
    from core.diffusion import draws_kernel

    key, numbers = draws_kernel.KNOWN
    drawn = draws_kernel.normal(torch.tensor([key], device=device), len(numbers))
    if not torch.allclose(drawn.cpu()[0], torch.tensor(numbers), atol=1e-5):
        raise ValueError("draws are not those of their key")
