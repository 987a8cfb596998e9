"""Improved precision and recall: realism of the images, and coverage of the real ones."""

import torch

from core.errors import DataError

NEIGHBORS = 3
"""k of Kynkaanniemi et al. (2019)."""
_BLOCK = 1024
"""Rows of a distance matrix at once; bounds the memory and does not change the result."""


def precision_and_recall(real: torch.Tensor, synthetic: torch.Tensor) -> tuple[float, float]:
    """Precision and recall of Kynkaanniemi et al. (2019), equations 1 and 2, each in [0, 1].

    A set is pictured as the union of balls around its features, each with the distance to the
    `NEIGHBORS`-th nearest other feature of the set as its radius. Precision is the share of
    synthetic features within the real balls, recall that of real features within the synthetic
    ones. Both depend on the number of features of either side: compare at equal numbers alone.

    Args:
        real: features `[N, D]`.
        synthetic: features `[M, D]`.

    Raises:
        DataError: a side has no more features than `NEIGHBORS`.
    """
    smaller = min(len(real), len(synthetic))
    if smaller <= NEIGHBORS:
        raise DataError(
            f"precision and recall need more than {NEIGHBORS} images on either side, not {smaller}"
        )
    real, synthetic = real.double(), synthetic.double()
    return _covered(synthetic, real), _covered(real, synthetic)


def _covered(points: torch.Tensor, centers: torch.Tensor) -> float:
    """Share of `points` within a ball around one of `centers`."""
    radii = torch.cat(
        [
            # The nearest of all is the feature itself.
            squared_distances(block, centers).topk(NEIGHBORS + 1, largest=False).values[:, -1]
            for block in centers.split(_BLOCK)
        ]
    )
    inside = [
        (squared_distances(block, centers) <= radii).any(dim=1) for block in points.split(_BLOCK)
    ]
    return torch.cat(inside).double().mean().item()


def squared_distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Squared Euclidean distances, `[n, m]`, >= 0, of `[n, D]` and `[m, D]`."""
    squares = x.square().sum(1)[:, None] + y.square().sum(1)
    return torch.addmm(squares, x, y.T, alpha=-2).clamp_(min=0)
