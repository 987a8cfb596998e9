"""What is composed: Poisson-subsampled Gaussian mechanisms, and the grids of their losses."""

import math
from collections.abc import Iterable, Sequence

Mechanism = tuple[float, float, int]
"""Sample rate, noise multiplier, count of a Poisson-subsampled Gaussian mechanism."""
RELATIONS = ("zero_out", "replace_one")
"""Neighbouring relations: a record becomes an empty one, or any other."""
COARSE, FINE = 1e-3, 1e-4
"""Grids of privacy losses; the finer is that of all that a plan states."""
_COARSEST = 5e-3
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


def quick_grid(mechanisms: Iterable[Mechanism]) -> float:
    """A grid on which epsilon is at most about 0.1 % too large, and fast: to search and to show.

    Connecting the dots adds to the variance of each release's privacy loss a part of the grid's
    square; so the grid is a fifteenth of that loss's deviation, sqrt(chi^2), over all releases.
    """
    variance = total = 0.0
    for sample_rate, noise_multiplier, count in mechanisms:
        variance += count * sample_rate**2 * math.expm1(min(noise_multiplier**-2, 50.0))
        total += count
    return min(max(math.sqrt(variance / total) / 15, FINE), _COARSEST)


def discretization_for(mechanisms: Sequence[Mechanism], scale: float) -> float:
    """The grid on which a composition of about epsilon `scale` takes a second or less."""
    count = len(mechanisms)
    return FINE if count <= FEW or count * scale <= _FINE_WORK else COARSE
