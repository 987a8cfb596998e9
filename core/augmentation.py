"""Augmentation of the central images; they are public by then, so all of it is free."""

import torch
import torch.nn.functional as F


def augment(images: torch.Tensor, kind: str, generator: torch.Generator) -> torch.Tensor:
    """Returns a randomly changed copy of each image.

    Args:
        images: float32 `[B, C, H, W]` in [-1, 1].
        kind: `none`; `shift` (up to an eighth of the side); `affine` (shift, rotation up to 10
            degrees, shear and scale up to 10 %, brightness and contrast up to 15 %).
        generator: source of all randomness, on the CPU.
    """
    if kind == "none":
        return images
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
        contrast = (1 + uniform(0.15)).view(-1, 1, 1, 1).to(images.device)
        brightness = uniform(0.15).view(-1, 1, 1, 1).to(images.device)
        dark = (changed + 1) * contrast - 1  # Black stays black: most backgrounds are.
        changed = dark + brightness * (changed > -0.9)
    return changed.clamp(-1.0, 1.0)
