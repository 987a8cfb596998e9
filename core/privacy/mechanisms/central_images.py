"""Central images: the easy stage's release, noisy aggregates of random private samples.

DP-FETA (Li et al. 2024), section on central images. For each class c and release j the released
object is `(sum over the Poisson sample j of class c of h(x)) + N(0, (sigma * S)^2 I)`; dividing by
the public expected class count and everything later is post-processing.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from core.config import CentralImagesConfig
from core.data import Split, to_float
from core.privacy.keys import KeyedStream
from core.privacy.mechanisms.sampling import PoissonSampler
from core.privacy.plan.releases import CentralPlan

_CHUNK = 4096


@dataclass(frozen=True)
class CentralImages:
    """Released images, safe to publish.

    Attributes:
        images: float32 `[per_class * num_classes, C, H, W]` in [0, 1].
        labels: int64 `[per_class * num_classes]`.
    """

    images: torch.Tensor
    labels: torch.Tensor


def release_central_images(
    train: Split,
    num_classes: int,
    config: CentralImagesConfig,
    plan: CentralPlan,
    masks: KeyedStream,
    noise: KeyedStream,
) -> CentralImages:
    """Draws and noises the central images; call once per trial and broadcast the result.

    Args:
        train: private images uint8 `[N, C, H, W]` with labels in [0, num_classes).
        plan: sample rate, noise and divisor; the only source of these numbers.
        masks: secret stream of the Poisson samples.
        noise: secret stream of the Gaussian noise.

    Returns:
        Images at the side of the private images, in [0, 1].

    Privacy: each record adds at most `plan.sensitivity` in L2 norm to one class's sum of each
    release it is sampled into; every entry of every class gets noise of `plan.noise_stddev`.
    """
    size = (train.images.shape[2], train.images.shape[3])
    released = [
        _aggregate(noisy, config, plan.expected_class_count)
        for noisy in noisy_class_sums(train, num_classes, config, plan, masks, noise)
    ]
    labels = torch.arange(num_classes).repeat(plan.num_releases)
    return CentralImages(_restore(torch.cat(released), size, config), labels)


def noisy_class_sums(
    train: Split,
    num_classes: int,
    config: CentralImagesConfig,
    plan: CentralPlan,
    masks: KeyedStream,
    noise: KeyedStream,
) -> Iterator[torch.Tensor]:
    """Yields the released sums, float32 of the shape of `class_sums`, one for each release.

    Privacy: the subsampled Gaussian mechanism itself; everything made of its output is free. Sums
    and noise are float64 and rounded once, together.
    """
    small = down_scaled(train.images, config)
    sampler = PoissonSampler(masks, len(small), plan.sample_rate)
    for release in range(plan.num_releases):
        chosen = sampler.indices(release)
        sums = class_sums(small[chosen], train.labels[chosen], num_classes, config)
        drawn = noise.normal(release, sums.numel()).view_as(sums)
        yield (sums + plan.noise_stddev * drawn).float()


def down_scaled(images: torch.Tensor, config: CentralImagesConfig) -> torch.Tensor:
    """Down-scales uint8 `[N, C, H, W]` to float32 `[N, C, h, w]` in [0, 1].

    Privacy: acts on each image alone; the final clamp is what bounds a record's norm.
    """
    size = (config.image_size, config.image_size)
    parts: list[torch.Tensor] = []
    for part in torch.split(images, _CHUNK):
        small = to_float(part)
        if small.shape[-2:] != size:
            small = F.interpolate(small, size=size, mode="bilinear", antialias=True)
        parts.append(torch.nan_to_num(small, nan=0.0).clamp(0.0, 1.0))
    return torch.cat(parts)


def class_sums(
    small: torch.Tensor, labels: torch.Tensor, num_classes: int, config: CentralImagesConfig
) -> torch.Tensor:
    """The sensitive statistic: a sum of bounded features for each class, before any noise.

    Args:
        small: sampled images in [0, 1], `[B, C, h, w]`.
        labels: their classes `[B]`.

    Returns:
        float64 `[num_classes, C, h, w]` for mean images, `[num_classes, bins, C, h, w]` for mode.

    Privacy: not private by itself. Each image adds a vector of L2 norm at most the plan's
    sensitivity to the row of its own class and nothing to the others.
    """
    if config.kind == "mean":
        features = clipped(small.double() - config.pixel_center, config.max_norm)
    else:
        bins = (small * config.num_bins).long().clamp(max=config.num_bins - 1)
        features = F.one_hot(bins, config.num_bins).movedim(-1, 1)
    sums = torch.zeros((num_classes, *features.shape[1:]), dtype=torch.float64)
    return sums.index_add_(0, labels, features.double())


def clipped(features: torch.Tensor, max_norm: float | None) -> torch.Tensor:
    """Scales each of float64 `[B, ...]` whose L2 norm exceeds `max_norm` down to it, if given.

    Privacy: acts on each image alone. One whose norm is not finite counts as zero.
    """
    if max_norm is None:
        return features
    norms = features.flatten(1).square().sum(1).sqrt().view(-1, *[1] * (features.ndim - 1))
    scaled = features * (max_norm / norms).clamp(max=1.0)  # Norm 0: infinity, clamped to 1.
    return torch.where(torch.isfinite(norms), scaled, 0.0)


def _aggregate(
    noisy: torch.Tensor, config: CentralImagesConfig, expected_class_count: float
) -> torch.Tensor:
    """Post-processing of one release into images in [0, 1], `[num_classes, C, h, w]`."""
    if config.kind == "mean":
        return (noisy / expected_class_count + config.pixel_center).clamp(0.0, 1.0)
    return (noisy.argmax(dim=1).float() + 0.5) / config.num_bins


def _restore(
    images: torch.Tensor, size: tuple[int, int], config: CentralImagesConfig
) -> torch.Tensor:
    """Post-processing: full size, less noise by a median, sharper edges."""
    images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
    if config.median_filter:
        padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
        windows = padded.unfold(2, 3, 1).unfold(3, 3, 1).flatten(-2)
        images = windows.median(dim=-1).values
    if config.sharpen:  # The kernel of Pillow's SHARPEN: 2 at the centre, -1/8 around it.
        padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
        images = 2.125 * images - 1.125 * F.avg_pool2d(padded, 3, stride=1)
    return images.clamp(0.0, 1.0)
