"""Augmentation of the central images; they are public by then, so all of it is free."""

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F

from core.errors import ConfigError

_OPERATIONS, _MAGNITUDE = 2, 9


def augment(images: torch.Tensor, kind: str, generator: torch.Generator) -> torch.Tensor:
    """Returns a randomly changed copy of each image.

    Args:
        images: float32 `[B, C, H, W]` in [-1, 1].
        kind: `none`; `shift` (up to a sixteenth of the side); `affine` (shift, rotation up to 10
            degrees, shear and scale up to 10 %, then a random tone curve); `rand_augment`
            (Cubuk et al. 2020: two operations of a random magnitude up to 9 of 30).
        generator: source of all randomness, on the CPU.
    """
    if kind == "none":
        return images
    if kind == "rand_augment":
        return _rand_augment(images, generator)
    batch = len(images)

    def uniform(limit: float) -> torch.Tensor:
        return (torch.rand(batch, generator=generator) * 2 - 1) * limit

    zero = torch.zeros(batch)
    matrices = torch.eye(2).repeat(batch, 1, 1)
    if kind == "affine":
        angle, shear, scale = uniform(0.17), uniform(0.1), 1 + uniform(0.1)
        rotation = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), dim=1).view(
            batch, 2, 2
        )
        slant = torch.stack((scale, shear, zero, 1 + uniform(0.1)), dim=1).view(batch, 2, 2)
        matrices = rotation @ slant
    shift = torch.stack((uniform(0.125), uniform(0.125)), dim=1)[..., None]
    theta = torch.cat((matrices, shift), dim=2).to(images.device)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    changed = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    if kind == "affine":
        changed = _tone_curve((changed + 1) / 2, uniform) * 2 - 1
    return changed.clamp(-1.0, 1.0)


def _tone_curve(light: torch.Tensor, uniform: Callable[[float], torch.Tensor]) -> torch.Tensor:
    """Stretches a random range of brightness: a mean image becomes one of many crisp objects.

    A mean's grey rim is where only some objects reach; each cut through it is a possible outline.
    Black stays black: most backgrounds are.
    """

    def column(values: torch.Tensor) -> torch.Tensor:
        return values.view(-1, 1, 1, 1).to(light.device)

    peak = light.amax((1, 2, 3), keepdim=True).clamp(min=1e-3)
    low, width = column(0.15 + uniform(0.15)), column(0.45 + uniform(0.25))
    return ((light / peak - low) / width).clamp(0.0, 1.0) * column(0.85 + uniform(0.4))


def _rand_augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image by operations of its own; torchvision draws them from a seed of the generator."""
    if importlib.util.find_spec("torchvision") is None:
        raise ConfigError(
            "warm_up.augmentation='rand_augment' needs torchvision: pip install torchvision, or "
            "choose 'affine'"
        )
    from torchvision.transforms import RandAugment

    pixels = ((images + 1) * 127.5).round().to(torch.uint8).cpu()
    magnitudes = torch.randint(_MAGNITUDE + 1, (len(images),), generator=generator).tolist()
    seed = int(torch.randint(2**31, (1,), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        changed = [
            RandAugment(_OPERATIONS, magnitude)(image)
            for image, magnitude in zip(pixels, magnitudes, strict=True)
        ]
    return (torch.stack(changed).float() / 127.5 - 1).to(images.device)
