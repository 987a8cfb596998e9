"""Class Gaussians at full size, made of released moments."""

import math

import torch
import torch.nn.functional as F

from core.config import Config
from core.data import from_model_range
from core.diffusion.gaussians import Gaussians
from core.privacy.mechanisms.moments import Moments
from core.privacy.plan.releases import MomentsPlan
from core.seeds import public_seed

_AXES = 4
"""Of each class that are shown."""


def gaussians_of(moments: Moments, plan: MomentsPlan, config: Config) -> Gaussians:
    """The class Gaussians at full size, in [-1, 1].

    Variances that the noise alone would make, `central_images.eigenvalue_floor`, count as zero.

    Privacy: post-processing of the release.
    """
    dataset, floor = config.dataset, config.central_images.eigenvalue_floor
    means, seconds = moments.class_means.double(), moments.class_seconds.double()
    count = means.shape[1]
    # The largest eigenvalue of the noise alone (Wigner 1958).
    edge = plan.class_second_stddev / plan.expected_class_count * math.sqrt(2 * count)
    covariances = seconds - means[:, :, None] * means[:, None, :]
    values, axes = torch.linalg.eigh(covariances)
    values = torch.where(values > max(floor * edge, 0.0), values, 0.0)
    covariances = (axes * values[:, None]) @ axes.mT
    size = (dataset.image_size, dataset.image_size)
    center, basis = (
        _up_scaled(part.double(), size) for part in (moments.mean[None], moments.basis)
    )
    full, change = torch.linalg.qr(basis.T)
    means, covariances = means @ change.T, change @ covariances @ change.T
    apart = means - means.mean(0)
    together = covariances.mean(0) + apart.T @ apart / len(means)
    means = torch.cat((means, means.mean(0, keepdim=True)))
    values, axes = torch.linalg.eigh(torch.cat((covariances, together[None])))
    small = moments.mean.numel()
    residual = moments.variance.double() - seconds.diagonal(dim1=1, dim2=2).sum(1).mean()
    residual = residual / max(small - count, 1)
    outside = config.diffusion.sigma_outside**2
    found = Gaussians(center.numel(), count, dataset.num_classes)
    state = {
        "center": 2 * center[0] - 1,
        "basis": full.T,
        "means": 2 * means,
        "axes": axes,
        "variances": 4 * values.clamp(min=0),
        "outside": torch.tensor(outside),
        "residual": (4 * residual).clamp(min=outside),
    }
    found.load_state_dict({name: value.float() for name, value in state.items()})
    return found


def drawn_images(config: Config, gaussians: Gaussians) -> tuple[torch.Tensor, torch.Tensor]:
    """Images drawn for the warm-up, `central_images.per_class` of each class, and their labels.

    Returns:
        float32 `[B, C, H, W]` in [0, 1] and int64 `[B]`.

    Privacy: post-processing of the release, as of the public seed.
    """
    labels = torch.arange(config.dataset.num_classes).repeat(config.central_images.per_class)
    generator = torch.Generator().manual_seed(public_seed(f"{config.seed}/moments", 0))
    return _images(config, gaussians.draw(labels, generator)), labels


def pictures_of(config: Config, gaussians: Gaussians) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of each class, and it moved by 2 standard deviations both ways on its main axes.

    Returns:
        uint8 `[B, C, H, W]` and the labels, int64 `[B]`.
    """
    components = gaussians.means.shape[1]
    axes = torch.eye(components).flip(0)[:_AXES]  # The last have the largest variance.
    moved = torch.stack((-2 * axes, 2 * axes), dim=1).flatten(0, 1)
    deviations = torch.cat((torch.zeros(1, components), moved))
    classes = torch.arange(config.dataset.num_classes)
    labels = classes.repeat_interleave(len(deviations))
    flat = gaussians.along(labels, deviations.repeat(len(classes), 1))
    return (_images(config, flat) * 255).round().to(torch.uint8), labels


def _images(config: Config, flat: torch.Tensor) -> torch.Tensor:
    dataset = config.dataset
    shape = (dataset.channels, dataset.image_size, dataset.image_size)
    return from_model_range(flat.view(-1, *shape))


def _up_scaled(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """`[B, C, h, w]` at full size, flat: a linear map."""
    if images.shape[-2:] != size:
        images = F.interpolate(images, size=size, mode="bilinear")
    return images.flatten(1)
