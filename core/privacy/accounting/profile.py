"""Privacy profile of a composition: delta at every epsilon of a grid, in both directions.

Row 0 bounds what adding the record can change, sup over S of Q(S) - exp(epsilon) P(S) for the law
Q of all that is released with it and P without it; row 1 is the same of P against Q. Column i
stands for epsilon = i * step, and the last one for all above it, too.

A profile is that of losses on the grid, and so is linear in exp(epsilon) between its points. So
two profiles on one grid need to be compared at its points alone, without any error of the grid:
where one is not above the other there, it is so at every epsilon. Negative ones follow from the
other row, as delta_QP(-e) = 1 - exp(-e) (1 - delta_PQ(e)).
"""

import numpy as np
from numpy.typing import NDArray

from core.privacy.accounting.mechanism import Mechanism, least_delta, quick_grid
from core.privacy.accounting.quick import Losses, composed_losses

Profile = NDArray[np.float64]
"""Deltas, shape (2, points)."""
Deltas = NDArray[np.float64]
_EXACT = 1e-2
"""Part of the delta that PLD resolves to 0.1 %, ten times the error of its transforms."""
_LEAST = 700.0
"""Far below the loss minus this, the law without the record counts as 0 there: it only adds."""


def profile_step(mechanisms: tuple[Mechanism, ...]) -> float:
    """A grid for the profiles that are compared with that of `mechanisms`."""
    return quick_grid(mechanisms) / 2


def profile(
    mechanisms: tuple[Mechanism, ...], relation: str, step: float, points: int | None = None
) -> Profile:
    """An upper bound of the privacy profile of all mechanisms together.

    Args:
        step: between two epsilons.
        points: how many; by default as many as it takes until delta hardly falls any further.

    Returns:
        Deltas in [0, 1], at most the transforms' error too large, never too small.
    """
    ways = composed_losses(mechanisms, relation, step)
    if points is None:
        points = max(way.first + len(way.probabilities) for way in ways) + 1
    epsilons = step * np.arange(max(2, points), dtype=float)
    deltas = np.stack([deltas_at(way, step, epsilons) for way in ways])
    return deltas + transform_error(mechanisms)


def transform_error(mechanisms: tuple[Mechanism, ...]) -> float:
    """What the transforms may be wrong by in a delta."""
    return _EXACT * least_delta(mechanisms)


def hockey_sticks(forth: Deltas, back: Deltas, step: float) -> tuple[Deltas, Deltas]:
    """The ratios t = exp(i step) of -n < i < n, and sup over S of Q(S) - t P(S) at each.

    Args:
        forth: the row of a profile that is of Q against P; n deltas.
        back: its other row.
    """
    places = np.arange(1 - len(forth), len(forth))
    ratios = np.exp(places * step)
    negative = 1 - ratios[: len(forth) - 1] * (1 - back[:0:-1])
    return ratios, np.minimum(np.concatenate([negative, forth]), 1.0)


def deltas_at(way: Losses, step: float, epsilons: Deltas) -> Deltas:
    """Of one direction, at any epsilon: of what is on the grid no rounding is left."""
    losses = (way.first + np.arange(len(way.probabilities))) * step
    without = np.where(losses < -_LEAST, 0.0, way.probabilities * np.exp(-losses.clip(-_LEAST)))
    upper, lower = (  # From the far end, where the terms are small.
        np.append(np.cumsum(masses[::-1])[::-1], 0.0) for masses in (way.probabilities, without)
    )
    above = (np.floor(epsilons / step) + 1 - way.first).clip(0, len(losses)).astype(int)
    deltas = way.infinite + upper[above] - np.exp(epsilons.clip(max=_LEAST)) * lower[above]
    return deltas.clip(way.infinite, 1.0)
