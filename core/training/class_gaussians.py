"""Mixtures of Gaussians at full size, made of released moments."""

import math

import torch
import torch.nn.functional as F

from core.config import Config
from core.data import from_model_range
from core.diffusion.gaussians import Gaussians
from core.privacy.mechanisms.moments import Moments
from core.privacy.plan.releases import MomentsPlan
from core.seeds import public_seed

_SHOWN = 5
"""Pictures of each class: at most so many means of clusters, the largest first, and draws."""
_NEVER = -1e30
"""Logarithm of the weight of a cluster that is left out."""


def gaussians_of(moments: Moments, plan: MomentsPlan, config: Config) -> Gaussians:
    """The mixtures at full size, in [-1, 1].

    Clusters of too few images for a mean are left out, unless they are all that a class has.

    Privacy: post-processing of the release.
    """
    dataset, means = config.dataset, moments.means.double()
    counts = _counts(moments.counts.double(), plan.smallest_count)
    shares = counts / counts.sum(1, keepdim=True) / len(counts)
    seconds = moments.seconds.double()
    inside = (shares * _per_image(seconds, counts).diagonal(dim1=2, dim2=3).sum(2)).sum()
    inside = inside + (shares * means.square().sum(2)).sum()
    stddev = plan.stddev(float(moments.reach) ** 2, plan.second_share)
    covariances = _covariances(seconds, counts, stddev, config.central_images.eigenvalue_floor)
    size = (dataset.image_size, dataset.image_size)
    center, basis = (
        _up_scaled(part.double(), size) for part in (moments.mean[None], moments.basis)
    )
    full, change = torch.linalg.qr(basis.T)
    means, covariances = means @ change.T, change @ covariances @ change.T
    mean = (shares[..., None] * means).sum((0, 1))
    apart = (shares.sqrt()[..., None] * (means - mean)).flatten(0, 1)
    together = (shares[..., None, None] * covariances).sum((0, 1)) + apart.T @ apart
    values, axes = torch.linalg.eigh(_and_last(covariances, together))
    clusters, components = means.shape[1:]
    only = torch.zeros(clusters, dtype=torch.float64)
    only[0] = 1.0
    outside = (moments.variance.double() - inside) / max(moments.mean.numel() - components, 1)
    found = Gaussians(center.numel(), components, dataset.num_classes, clusters)
    state = {
        "center": 2 * center[0] - 1,
        "basis": full.T,
        "log_weights": _and_last(shares * len(shares), only).log().clamp(min=_NEVER),
        "means": 2 * _and_last(means, mean),
        "axes": axes,
        "variances": 4 * values.clamp(min=0),
        "ambiguity": found.ambiguity,
        "outside": (4 * outside).clamp(min=config.diffusion.sigma_outside**2),
    }
    found.load_state_dict({name: value.float() for name, value in state.items()})
    found.measure(torch.Generator().manual_seed(public_seed("ambiguity", 0)))
    return found


def _counts(noisy: torch.Tensor, smallest: float) -> torch.Tensor:
    """Numbers of images of clusters, float64 `[num_classes, J]`; 0 of those that are left out."""
    largest = torch.nn.functional.one_hot(noisy.argmax(1), noisy.shape[1]).bool()
    kept = largest | (noisy >= smallest)
    return torch.where(kept, noisy.clamp(min=smallest), 0.0)


def _per_image(seconds: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Second moments of what is left in; zero for the rest."""
    divided = seconds / counts.clamp(min=1.0)[..., None, None]
    return torch.where(counts[..., None, None] > 0, divided, 0.0)


def _covariances(
    seconds: torch.Tensor, counts: torch.Tensor, stddev: float, floor: float
) -> torch.Tensor:
    """Covariances of clusters `[num_classes, J, k, k]`, with variances >= 0.

    Each is drawn towards the mean of its class as far as chance explains its distance from that
    (the positive-part rule of James and Stein 1961), chance being the noise of the release and the
    choice of images. Variances below `floor` times the largest that the noise makes count as zero.
    """
    found, components = _per_image(seconds, counts), seconds.shape[-1]
    pooled = (counts[..., None, None] * found).sum(1, keepdim=True)
    pooled = pooled / counts.sum(1)[:, None, None, None]
    images = counts.clamp(min=1.0)
    noise = stddev / images
    trace = pooled.diagonal(dim1=2, dim2=3).sum(2).clamp(min=0)
    chance = noise**2 * components * (components + 1) / 2 + trace**2 / images
    distance = (found - pooled).square().sum((2, 3))
    drawn = (chance / distance).nan_to_num(nan=1.0).clamp(max=1.0)
    found = torch.lerp(found, pooled, drawn[..., None, None])
    left = (counts > 0).sum(1, keepdim=True).sqrt() * stddev
    of_pooled = left / counts.sum(1, keepdim=True)
    # The largest eigenvalue of the noise alone (Wigner 1958).
    edge = torch.hypot((1 - drawn) * noise, drawn * of_pooled) * math.sqrt(2 * components)
    values, axes = torch.linalg.eigh(found)
    values = torch.where(values > (floor * edge)[..., None], values, 0.0).clamp(min=0.0)
    return (axes * values[..., None, :]) @ axes.mT


def _and_last(of_clusters: torch.Tensor, together: torch.Tensor) -> torch.Tensor:
    """`[num_classes, J, ...]` with a further row: `[...]` for each cluster of it."""
    row = together.expand(of_clusters.shape[1:])
    return torch.cat((of_clusters, row[None]))


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
    """For each class the means of its largest clusters, and as many draws.

    Returns:
        uint8 `[B, C, H, W]` and the labels, int64 `[B]`.
    """
    shown = min(_SHOWN, gaussians.means.shape[1])
    classes = torch.arange(config.dataset.num_classes)
    largest = gaussians.log_weights[:-1].topk(shown).indices
    means = gaussians.means[classes[:, None], largest] @ gaussians.basis + gaussians.center
    labels = classes.repeat_interleave(_SHOWN)
    drawn = gaussians.draw(labels, torch.Generator().manual_seed(public_seed("pictures", 0)))
    flat = torch.cat((means, drawn.view(len(classes), _SHOWN, -1)), dim=1).flatten(0, 1)
    pictures = (_images(config, flat) * 255).round().to(torch.uint8)
    return pictures, classes.repeat_interleave(shown + _SHOWN)


def _images(config: Config, flat: torch.Tensor) -> torch.Tensor:
    dataset = config.dataset
    shape = (dataset.channels, dataset.image_size, dataset.image_size)
    return from_model_range(flat.view(-1, *shape))


def _up_scaled(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """`[B, C, h, w]` at full size, flat: a linear map."""
    if images.shape[-2:] != size:
        images = F.interpolate(images, size=size, mode="bilinear")
    return images.flatten(1)
