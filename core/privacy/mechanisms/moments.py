"""Clustered class moments: noisy counts, means and second moments of the clusters of each class.

Gaussian mechanisms on all records, each of which may depend on what those before it released: the
mean of all images; their second moment about it, whose leading eigenvectors span the subspace of
principal components (Dwork et al. 2014, "Analyze Gauss"); in this subspace rounds of Lloyd's
algorithm within each class, which release the count and the sum of each cluster (Blum et al. 2005,
"Practical privacy: the SuLQ framework"); and the second moment of each cluster about its released
mean. Every image is taken at a small side, in [0, 1]. The product of an image with itself is a
symmetric matrix, of which the upper triangle is released; entries off the diagonal are scaled by
sqrt(2), so that the vector has the norm of the matrix.

Means and all that follows are post-processing. With d values of an image at the small side, the
second moment takes about 40 d^2 bytes and N d^2 operations.
"""
# scipy has no types:
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportMissingTypeStubs=false, reportUnknownArgumentType=false

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from core.config import CentralImagesConfig
from core.data import Split
from core.privacy.keys import KeyedStream
from core.privacy.mechanisms.central_images import clipped, down_scaled
from core.privacy.plan.releases import MomentsPlan
from core.seeds import public_seed

_CHUNK = 1024
_SPREAD, _NEARBY = 0.7, 0.3
"""Standard deviations, of those within classes, at which clusters begin and begin anew."""
_REACH, _LEAST_WITHIN = 1.25, 0.05
"""Norm to which differences from clusters are clipped, of their root mean square; and the least
part of all variance that is taken to lie within clusters."""


@dataclass(frozen=True)
class Moments:
    """Released moments of images in [0, 1] at the small side, safe to publish; float32.

    Attributes:
        mean: of all images, `[C, h, w]`, in [0, 1].
        basis: orthonormal principal components, `[k, C, h, w]`, the leading one first.
        counts: noisy numbers of images of the clusters of each class, `[num_classes, J]`; those of
            small ones may be negative.
        means: of the clusters, less `mean`, in the basis: `[num_classes, J, k]`.
        seconds: sums of products about `means`, in the basis: `[num_classes, J, k, k]`.
        reach: norm to which differences from `means` are clipped, `[]`.
        variance: of all images about `mean`, summed over pixels, as the noisy trace tells it: `[]`.
    """

    mean: torch.Tensor
    basis: torch.Tensor
    counts: torch.Tensor
    means: torch.Tensor
    seconds: torch.Tensor
    reach: torch.Tensor
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

    Privacy: each record adds a vector of at most the stated norm to each sum, and of those of the
        clusters to the row of one; every entry gets noise of `plan.stddev` in float64. Sums and
        noise are rounded once, together; all after that is post-processing.
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
    points = coordinates(train, mean, basis, config, plan)
    spread = (basis @ matrix @ basis.T).diagonal()

    def one_round(
        number: int, centers: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        clusters = nearest(points, train.labels, centers)
        sums = cluster_sums(points, train.labels, clusters, centers, plan)
        sums = noisy(2 + number, sums, plan.cluster_norm, plan.round_share).double()
        return clusters, sums, next_centers(centers, sums, spread, number, plan)

    clusters, sums, centers = one_round(0, points.new_zeros((num_classes, 1, len(basis))))
    for number in range(1, plan.num_rounds):
        clusters, sums, centers = one_round(number, centers)
    reach = reach_of(centers, sums, spread, plan)
    seconds = cluster_seconds(points, train.labels, clusters, centers, reach)
    seconds = noisy(2 + plan.num_rounds, seconds, reach**2, plan.second_share)
    return Moments(
        mean=mean.view(shape),
        basis=basis.view(-1, *shape).float(),
        counts=(sums[..., 0] / plan.count_norm).float(),
        means=centers.float(),
        seconds=from_triangle(seconds),
        reach=torch.tensor(reach),
        variance=matrix.trace().float(),
    )


def mean_sum(train: Split, config: CentralImagesConfig, plan: MomentsPlan) -> torch.Tensor:
    """The first sensitive statistic: the sum of centred images, float64 `[d]`.

    Privacy: not private by itself. Each image adds a vector of norm at most `plan.mean_norm`.
    """
    total = torch.zeros(_size(train, config), dtype=torch.float64)
    for rows in _rows(train, config, config.pixel_center, plan.mean_norm):
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
    for rows in _rows(train, config, mean.double(), plan.max_norm):
        total.addmm_(rows.T, rows)
    return to_triangle(total)


def coordinates(
    train: Split,
    mean: torch.Tensor,
    basis: torch.Tensor,
    config: CentralImagesConfig,
    plan: MomentsPlan,
) -> torch.Tensor:
    """Of each image less the released mean, clipped, in the basis, float64 `[N, k]`.

    Args:
        basis: orthonormal rows, float64 `[k, d]`.

    Privacy: not private. Each row depends on one image alone, to the last bit, as every product has
        as many rows: a cluster that changed with the rounding of others would escape the bounds.
    """
    points = torch.zeros((len(train.labels), len(basis)), dtype=torch.float64)
    for start, rows in enumerate(_rows(train, config, mean.double(), plan.max_norm)):
        padded = torch.nn.functional.pad(rows, (0, 0, 0, _CHUNK - len(rows)))
        begin = start * _CHUNK
        points[begin : begin + len(rows)] = (padded @ basis.T)[: len(rows)]
    return points


def nearest(points: torch.Tensor, labels: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
    """The nearest of the centers `[num_classes, J, k]` of each point's class, the first of equals.

    Returns:
        int64 `[N]`, in [0, J).

    Privacy: not private. Each depends on one image alone.
    """
    parts = zip(points.split(_CHUNK), labels.split(_CHUNK), strict=True)
    found = [(rows[:, None] - centers[own]).square().sum(2).argmin(1) for rows, own in parts]
    return torch.cat(found)


def cluster_sums(
    points: torch.Tensor,
    labels: torch.Tensor,
    clusters: torch.Tensor,
    centers: torch.Tensor,
    plan: MomentsPlan,
) -> torch.Tensor:
    """Counts, times `plan.count_norm`, and sums of the clusters, float64 `[num_classes, J, 1 + k]`.

    Privacy: not private by itself. Each image adds to the row of one cluster of its own class a
    vector of norm at most `plan.cluster_norm`, and nothing to the others.
    """
    classes, size = centers.shape[:2]
    sums = points.new_zeros((classes * size, 1 + points.shape[1]))
    ones = points.new_full((len(points), 1), plan.count_norm)
    sums.index_add_(0, labels * size + clusters, torch.cat((ones, points), dim=1))
    return sums.view(classes, size, -1)


def cluster_seconds(
    points: torch.Tensor,
    labels: torch.Tensor,
    clusters: torch.Tensor,
    centers: torch.Tensor,
    reach: float,
) -> torch.Tensor:
    """The last: sums of products about `centers`, float64 `[num_classes, J, k (k + 1) / 2]`.

    Privacy: not private by itself. Each image adds to the row of one cluster of its own class a
    vector of norm at most `reach**2`, and nothing to the others.
    """
    classes, size, count = centers.shape
    apart = clipped(points - centers[labels, clusters], reach)
    seconds = points.new_zeros((classes * size, count, count))
    for number, matrix in enumerate(seconds):
        mine = apart[labels * size + clusters == number]
        matrix.addmm_(mine.T, mine)
    return to_triangle(seconds).view(classes, size, -1)


def reach_of(
    means: torch.Tensor, sums: torch.Tensor, spread: torch.Tensor, plan: MomentsPlan
) -> float:
    """To which norm differences from clusters are clipped: about their own, in (0, C].

    Their mean square is the variance of all images less that of the means, of which the noise is
    taken off; both are released.

    Args:
        means: of the clusters, `[num_classes, J, k]`.
        sums: as released, of `cluster_sums` in the last round.
        spread: variance of all images along each component, `[k]`.

    Privacy: post-processing.
    """
    counts = sums[..., 0] / plan.count_norm
    counts = torch.where(counts >= plan.smallest_count, counts, 0.0)
    noise = plan.stddev(plan.cluster_norm, plan.round_share) / counts.clamp(min=1.0)
    squares = means.square().sum(2) - means.shape[2] * noise**2
    between = (counts * squares).sum() / counts.sum().clamp(min=1.0)
    everything = spread.clamp(min=0).sum()
    within = torch.maximum(everything - between, _LEAST_WITHIN * everything)
    return min(max(_REACH * math.sqrt(within), 1e-3 * plan.max_norm), plan.max_norm)


def next_centers(
    centers: torch.Tensor, sums: torch.Tensor, spread: torch.Tensor, number: int, plan: MomentsPlan
) -> torch.Tensor:
    """Centers of clusters after the sums of round `number`, float64 `[num_classes, J, k]`.

    Those of the first round are the classes, about whose means the clusters begin. A cluster too
    small for a mean keeps its center in the last round and begins anew beside the largest before.

    Args:
        sums: as released, of `cluster_sums`.
        spread: variance of all images along each component, `[k]`.

    Privacy: post-processing.
    """
    counts, firsts = sums[..., 0] / plan.count_norm, sums[..., 1:]
    large = (counts >= plan.smallest_count)[..., None]
    means = torch.where(large, firsts / counts.clamp(min=plan.smallest_count)[..., None], centers)
    if number == plan.num_rounds - 1:
        return means
    of_class = firsts.sum(1) / counts.sum(1).clamp(min=plan.smallest_count)[:, None]
    within = (spread - of_class.var(0, correction=0)).clamp(min=0).sqrt()
    generator = torch.Generator().manual_seed(public_seed("clusters", number))
    shape = (len(means), plan.num_clusters, means.shape[2])
    drawn = within * torch.randn(shape, generator=generator, dtype=torch.float64)
    if number == 0:
        return means + _SPREAD * drawn
    largest = means[torch.arange(len(means)), counts.argmax(1)][:, None]
    return torch.where(large, means, largest + _NEARBY * drawn)


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
) -> Iterator[torch.Tensor]:
    """Yields centred, clipped images, float64 `[B, d]`."""
    for images in torch.split(train.images, _CHUNK):
        if len(images):
            rows = down_scaled(images, config).double().flatten(1) - center
            yield clipped(rows, max_norm)
