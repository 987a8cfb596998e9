"""Class moments: noisy means and second moments of all private images, class by class.

Four Gaussian mechanisms on all records, each of which may depend on what those before it released:
the mean of all images; their second moment about it, whose leading eigenvectors span the subspace
of principal components (Dwork et al. 2014, "Analyze Gauss"); and in this subspace the mean and the
second moment of each class. Every image is taken at a small side, in [0, 1]. The product of an
image with itself is a symmetric matrix, of which the upper triangle is released; entries off the
diagonal are scaled by sqrt(2), so that the vector has the norm of the matrix.

Dividing by public expected counts and everything later is post-processing. With d values of an
image at the small side, the second moment takes about 40 d^2 bytes and N d^2 operations.
"""
# scipy has no types:
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportMissingTypeStubs=false, reportUnknownArgumentType=false

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from core.config import CentralImagesConfig
from core.data import Split
from core.privacy.keys import KeyedStream
from core.privacy.mechanisms.central_images import clipped, down_scaled
from core.privacy.plan.releases import MomentsPlan

_CHUNK = 1024


@dataclass(frozen=True)
class Moments:
    """Released moments of images in [0, 1] at the small side, safe to publish; float32.

    Attributes:
        mean: of all images, `[C, h, w]`, in [0, 1].
        basis: orthonormal principal components, `[k, C, h, w]`, the leading one first.
        class_means: of the classes, less `mean`, in the basis: `[num_classes, k]`.
        class_seconds: second moments about `mean`, in the basis: `[num_classes, k, k]`.
        variance: of all images about `mean`, summed over pixels, as the noisy trace tells it: `[]`.
    """

    mean: torch.Tensor
    basis: torch.Tensor
    class_means: torch.Tensor
    class_seconds: torch.Tensor
    variance: torch.Tensor


def release_moments(
    train: Split,
    num_classes: int,
    config: CentralImagesConfig,
    plan: MomentsPlan,
    noise: KeyedStream,
) -> Moments:
    """Draws the noisy moments; call once per trial and keep the result.

    Args:
        train: private images uint8 `[N, C, H, W]` with labels in [0, num_classes).
        plan: noise, norms and divisors; the only source of these numbers.
        noise: secret stream of the Gaussian noise.

    Privacy: each record adds a vector of at most the stated norm to each of four sums, and of those
    of the classes to the row of its own; every entry gets noise of `plan.stddev` in float64. Sums
    and noise are rounded once, together; all after that is post-processing.
    """

    def noisy(number: int, sums: torch.Tensor, norm: float, share: float) -> torch.Tensor:
        drawn = noise.normal(number, sums.numel()).view_as(sums)
        return (sums + plan.stddev(norm, share) * drawn).float()

    shape = (train.images.shape[1], config.image_size, config.image_size)
    mean = noisy(0, mean_sum(train, config, plan), plan.mean_norm, plan.mean_share)
    mean = (mean / plan.num_examples + config.pixel_center).clamp(0.0, 1.0)
    second = second_sum(train, mean, config, plan)
    second = noisy(1, second, plan.max_norm**2, plan.subspace_share) / plan.num_examples
    matrix = from_triangle(second.double())
    basis = leading(matrix, config.num_components)
    firsts, seconds = class_sums(train, mean, basis, num_classes, config, plan)
    firsts = noisy(2, firsts, plan.max_norm, plan.class_mean_share)
    seconds = noisy(3, seconds, plan.max_norm**2, plan.class_second_share)
    return Moments(
        mean=mean.view(shape),
        basis=basis.view(-1, *shape).float(),
        class_means=firsts / plan.expected_class_count,
        class_seconds=from_triangle(seconds / plan.expected_class_count),
        variance=matrix.trace().float(),
    )


def mean_sum(train: Split, config: CentralImagesConfig, plan: MomentsPlan) -> torch.Tensor:
    """The first sensitive statistic: the sum of centred images, float64 `[d]`.

    Privacy: not private by itself. Each image adds a vector of norm at most `plan.mean_norm`.
    """
    total = torch.zeros(_size(train, config), dtype=torch.float64)
    for rows, _ in _rows(train, config, config.pixel_center, plan.mean_norm):
        total += rows.sum(0)
    return total


def second_sum(
    train: Split, mean: torch.Tensor, config: CentralImagesConfig, plan: MomentsPlan
) -> torch.Tensor:
    """The second one: the sum of products about the released mean, float64 `[d (d + 1) / 2]`.

    Privacy: not private by itself. Each image adds a vector of norm at most `plan.max_norm**2`.
    """
    size = _size(train, config)
    total = torch.zeros((size, size), dtype=torch.float64)
    for rows, _ in _rows(train, config, mean.double(), plan.max_norm):
        total.addmm_(rows.T, rows)
    return to_triangle(total)


def class_sums(
    train: Split,
    mean: torch.Tensor,
    basis: torch.Tensor,
    num_classes: int,
    config: CentralImagesConfig,
    plan: MomentsPlan,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The last two: sums of coordinates in the basis, and of their products, for each class.

    Args:
        basis: orthonormal rows, float64 `[k, d]`.

    Returns:
        float64 `[num_classes, k]` and `[num_classes, k (k + 1) / 2]`.

    Privacy: not private by themselves. Each image adds to the rows of its own class vectors of norm
    at most `plan.max_norm` and `plan.max_norm**2`, and nothing to the others.
    """
    firsts = torch.zeros((num_classes, len(basis)), dtype=torch.float64)
    seconds = torch.zeros((num_classes, len(basis), len(basis)), dtype=torch.float64)
    for rows, labels in _rows(train, config, mean.double(), plan.max_norm):
        coordinates = rows @ basis.T
        firsts.index_add_(0, labels, coordinates)
        for label in labels.unique().tolist():
            mine = coordinates[labels == label]
            seconds[label].addmm_(mine.T, mine)
    return firsts, to_triangle(seconds)


def leading(matrix: torch.Tensor, count: int) -> torch.Tensor:
    """Orthonormal eigenvectors of the largest eigenvalues of a symmetric `[d, d]`: `[count, d]`."""
    from scipy.linalg import eigh  # Of all eigenvectors, torch would compute every one.

    size = len(matrix)
    vectors = eigh(matrix.numpy(), subset_by_index=[size - count, size - 1])[1]
    return torch.from_numpy(vectors.T[::-1].copy())


def to_triangle(matrices: torch.Tensor) -> torch.Tensor:
    """The upper triangles of symmetric `[..., d, d]` as `[..., d (d + 1) / 2]` of equal norm."""
    rows, columns, scale = _places(matrices.shape[-1])
    return matrices[..., rows, columns] * scale.to(matrices.dtype)


def from_triangle(vectors: torch.Tensor) -> torch.Tensor:
    """Inverse of `to_triangle`."""
    size = int((2 * vectors.shape[-1]) ** 0.5)
    rows, columns, scale = _places(size)
    values = vectors / scale.to(vectors.dtype)
    matrices = vectors.new_empty((*vectors.shape[:-1], size, size))
    matrices[..., rows, columns] = values
    matrices[..., columns, rows] = values
    return matrices


def _places(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows and columns of the upper triangle, and what its entries are scaled by."""
    rows, columns = torch.triu_indices(size, size)
    scale = torch.full((len(rows),), 2.0**0.5, dtype=torch.float64)
    return rows, columns, scale.masked_fill_(rows == columns, 1.0)


def _size(train: Split, config: CentralImagesConfig) -> int:
    return train.images.shape[1] * config.image_size**2


def _rows(
    train: Split, config: CentralImagesConfig, center: torch.Tensor | float, max_norm: float
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields centred, clipped images, float64 `[B, d]`, with their labels."""
    parts = zip(torch.split(train.images, _CHUNK), torch.split(train.labels, _CHUNK), strict=True)
    for images, labels in parts:
        if len(images):
            rows = down_scaled(images, config).double().flatten(1) - center
            yield clipped(rows, max_norm), labels
