"""Nearest real training image of each synthetic one, in features and in pixels."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from core.data import to_float
from core.evaluation.precision_recall import squared_distances

Space = Callable[[torch.Tensor], torch.Tensor]
"""Maps images, uint8 `[B, C, H, W]`, to vectors `[B, D]`."""


@dataclass(frozen=True)
class Neighbors:
    """For each query the nearest of the searched images.

    Attributes:
        distances: Euclidean, float64 `[Q]`.
        indices: int64 `[Q]`.
    """

    distances: torch.Tensor
    indices: torch.Tensor


def pixels(images: torch.Tensor) -> torch.Tensor:
    """Pixels in [0, 1], so that a distance is that of the pictures."""
    return to_float(images).flatten(1)


def nearest(
    queries: torch.Tensor, searched: torch.Tensor, space: Space, batch_size: int
) -> Neighbors:
    """Searches every image of `searched`, in batches.

    Args:
        queries: uint8 `[Q, C, H, W]`.
        searched: uint8 `[N, C, H, W]`, N >= 1.
        space: in which to measure.

    Privacy: of real images, the result is not private.
    """
    points = torch.cat([space(batch).double() for batch in queries.split(batch_size)])
    best = points.new_full((len(points),), float("inf"))
    indices = torch.zeros(len(points), dtype=torch.int64, device=points.device)
    for number, batch in enumerate(searched.split(batch_size)):
        found = squared_distances(points, space(batch).double()).min(dim=1)
        closer = found.values < best
        best = torch.where(closer, found.values, best)
        indices = torch.where(closer, found.indices + number * batch_size, indices)
    return Neighbors(best.sqrt().cpu(), indices.cpu())
