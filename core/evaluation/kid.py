"""Kernel inception distance between two sets of features."""

import torch

from core.errors import DataError

SUBSETS = 100
SUBSET_SIZE = 1000
"""Of Binkowski et al. (2018): the mean over 100 subsets of 1,000 features."""


def kernel_distance(
    real: torch.Tensor, synthetic: torch.Tensor, generator: torch.Generator
) -> tuple[float, float]:
    """Squared maximum mean discrepancy, and its standard deviation over random subsets.

    Unbiased whatever the number of images, unlike a Frechet distance, and so possibly below 0
    (Binkowski et al. 2018, equation 4, with the polynomial kernel of section 4).

    Args:
        real: features `[N, D]`.
        synthetic: features `[M, D]`.
        generator: CPU generator that chooses the subsets: `SUBSET_SIZE` features of either side,
            or half of the smaller side where that is less, so that subsets differ.

    Returns:
        Mean and standard deviation over `SUBSETS` subsets; the deviation tells what the choice of
        images changes, not what another training would.

    Raises:
        DataError: a side has fewer than 4 features.
    """
    smaller = min(len(real), len(synthetic))
    if smaller < 4:
        raise DataError(f"kid needs at least 4 images on either side, not {smaller}")
    size = min(SUBSET_SIZE, smaller // 2)
    distances: list[torch.Tensor] = []
    for _ in range(SUBSETS):
        x, y = (
            side[torch.randperm(len(side), generator=generator)[:size].to(side.device)].double()
            for side in (real, synthetic)
        )
        distances.append(_unbiased(x, y))
    values = torch.stack(distances)
    return values.mean().item(), values.std().item()


def _unbiased(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The U-statistic of one pair of subsets, float64 `[n, D]` each."""
    n = len(x)
    within = sum(k.sum() - k.diagonal().sum() for k in (_kernel(x, x), _kernel(y, y)))
    return within / (n * (n - 1)) - 2 * _kernel(x, y).mean()


def _kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """k(x, y) = (x.y / D + 1)^3, `[n, m]`."""
    return (x @ y.T / x.shape[1] + 1) ** 3
