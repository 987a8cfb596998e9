"""Poisson-subsampled Gaussian mechanisms, and the grids of their losses."""

import math
from collections.abc import Iterable, Sequence

Mechanism = tuple[float, float, int]
"""Sample rate, noise multiplier, count of a Poisson-subsampled Gaussian mechanism."""
RELATIONS = ("zero_out", "replace_one")
"""Neighbouring relations: a record becomes an empty one, or any other."""
COARSE, FINE = 1e-3, 1e-4
"""Grids of privacy losses; the finer is that of all that a plan states."""
_FINEST, _COARSEST, _POINTS = 1e-9, 5e-3, 2**16
LARGEST = 600.0
"""Largest epsilon that PLD gives: exp(-epsilon) of a small probability is nearly 0."""
FEW = 4
"""Up to so many mechanisms the figures are those of a plan, to the last digit."""
# Up to this product of mechanisms and epsilon the fine discretisation is fast; above it the
# coarse one decides, whose figures are a little larger.
_FINE_WORK = 400


def grouped(mechanisms: Iterable[Mechanism]) -> tuple[Mechanism, ...]:
    """Equal mechanisms as one each, with their counts added, in the order of first use."""
    counts: dict[tuple[float, float], int] = {}
    for sample_rate, noise_multiplier, count in mechanisms:
        key = (sample_rate, noise_multiplier)
        counts[key] = counts.get(key, 0) + count
    return tuple((*key, count) for key, count in counts.items())


def least_delta(mechanisms: Iterable[Mechanism]) -> float:
    """Delta that PLD resolves to about 0.1 %.

    A Fourier transform is exact to 1e-16, and its power to the number of releases times that.
    """
    return 1e-12 + 1e-14 * sum(count for *_, count in mechanisms)


def quick_grid(mechanisms: Iterable[Mechanism], coarsest: float = _COARSEST) -> float:
    """A grid on which epsilon is at most about 0.1 % too large, and fast: to search and to show.

    Connecting the dots adds to the variance of each release's privacy loss a part of the grid's
    square; so the grid is a fifteenth of that loss's deviation, sqrt(chi^2), over all releases,
    but not so fine that the largest loss of one of them is out of reach, and at most `coarsest`.
    """
    variance = total = largest = 0.0
    for sample_rate, noise_multiplier, count in mechanisms:
        variance += count * sample_rate**2 * math.expm1(min(noise_multiplier**-2, 50.0))
        total += count
        far = min(0.5 * noise_multiplier**-2 + 10 / noise_multiplier, _COARSEST * _POINTS)
        largest = max(largest, math.log1p(sample_rate * math.expm1(far)))
    return min(max(math.sqrt(variance / total) / 15, largest / _POINTS, _FINEST), coarsest)


def fitting_grid(mechanisms: Sequence[Mechanism], discretization: float, scale: float) -> float:
    """`discretization` times a power of 2: more where epsilon, about `scale`, is so large that
    seconds would be spent on digits that nobody sees; less of the fine grid for the smallest.
    """
    enough = quick_grid(mechanisms)
    grid = max(discretization, min(FINE * scale / 20, max(enough, scale / 2**20)))
    if discretization == FINE:
        grid = min(grid, enough)
    return discretization * 2.0 ** round(math.log2(grid / discretization))


def discretization_for(mechanisms: Sequence[Mechanism], scale: float) -> float:
    """The grid on which a composition of about epsilon `scale` takes a second or less."""
    count = len(mechanisms)
    return FINE if count <= FEW or count * scale <= _FINE_WORK else COARSE
