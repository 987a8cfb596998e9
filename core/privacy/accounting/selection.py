"""The best of a secret number of trials: its delta, from the privacy profile of one trial.

**Setting.** A trial with its score has the law Q on a data set and P on its neighbour. Scores are
totally ordered, ties broken by independent uniform numbers. K trials run, independent and alike,
and only the best leaves. K is secret, independent of the trials, with generating function
phi(z) = E z^K and mean m = phi'(1); where K = 0, nothing leaves. Let H(t) = sup over S of
Q(S) - t P(S) be the hockey-stick divergence, and R(v) = sup {Q(S): P(S) <= v} the largest
probability under Q of what has at most v under P; as Q(S) <= t P(S) + H(t), R(v) <= t v + H(t) for
every t >= 0, with equality at the best t (Dong, Roth and Su 2022, proposition 2.12).

**Theorem.** For every epsilon >= 0 the best of K is (epsilon, delta)-close between the two, with
    delta <= D(g) = E_P g(dQ/dP) + m Q(dP = 0),
    g(l) = sup over v in [0, 1] of (phi'(R(v)) l - exp(epsilon) phi'(v))_+ .

*Proof.* With the tie-breaker part of the outcome, no two trials are equally good. Of K = k trials
any may be the best, the others then lie below it: the best has the density k F_Q(y)^(k-1) dQ(y),
where F_Q(y) = Q(outcomes below y), and so over all k the density phi'(F_Q(y)) dQ(y); likewise
phi'(F_P(y)) dP(y) on the neighbour. The event that nothing leaves is as probable on both and adds
nothing, as epsilon >= 0. So the hockey-stick divergence of the best at exp(epsilon) is the integral
of (phi'(F_Q) dQ - exp(epsilon) phi'(F_P) dP)_+. Where dP = 0 it is at most m Q(dP = 0), as phi' is
increasing and F_Q <= 1. Elsewhere F_Q(y) <= R(F_P(y)), because the outcomes below y are one S; as
phi' is increasing, the integrand is at most g(dQ/dP) dP. QED. Nothing is assumed about scores.

**Any dominating pair.** g is a supremum of increasing affine functions: convex, increasing, with
slopes from 0 to m. So D(g) = g'(0) + the integral of H(t) dg'(t), a mixture of hockey sticks with
weights that are not negative, and it grows with H; and R and with it g grow with H. So H may be
replaced by any function that is nowhere below it.

**Trials of different settings.** A setting is drawn alike in every trial and is part of its
outcome, so a trial is a mixture: its H is the mean of those of the settings, and at most any
function that bounds each of them. So all are bounded by one profile, fixed and public beforehand.

**On a grid.** H is given at t = exp(i step) for -n <= i <= n (`core.privacy.accounting.profile`).
Between two points v < w of any partition of [0, 1] the supremum is at most that with phi'(R(w)) and
phi'(v); a convex g is at most its chords between the points t; beyond the last its slope is at most
m. With the chords' slopes s, D(g) <= sum of s (H(t) - H(next t)) + m H(last t). Each step is an
upper bound. With K = 1, phi' = 1, and delta at a point of the grid is that of one trial.

Both directions, Q against P and P against Q, are evaluated; the larger delta counts.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from core.privacy.accounting import renyi
from core.privacy.accounting.profile import Profile, hockey_sticks

_CELLS, _CHORDS = 2**14, 2**10
"""Most cells of [0, 1], and most chords: finer, delta would fall by less than 1 %."""

Array = NDArray[np.float64]


def derivative(law: str, mean: float) -> Callable[[Array], Array]:
    """phi'(z) of the law of the number of trials, as a function of 1 - z (Papernot and Steinke
    2022, definition 1).

    Args:
        law: `geometric` or `logarithmic`.
        mean: of the number of trials, above 1.
    """
    gamma = renyi.halting_probability(law, mean)
    if law == "geometric":
        return lambda rest: gamma / (gamma + (1 - gamma) * rest) ** 2
    factor = (1 - gamma) / -math.log(gamma)
    return lambda rest: factor / (gamma + (1 - gamma) * rest)


def selection_delta(
    deltas: Profile, step: float, epsilon: float, phi: Callable[[Array], Array]
) -> float:
    """Delta at `epsilon` of the best of a secret number of trials: the theorem's upper bound.

    Args:
        deltas: profile that bounds those of all settings of a trial, in both directions.
        step: of the profile.
        epsilon: at least 0, below 700.
        phi: derivative of the generating function of the number of trials, see `derivative`.
    """
    return max(_one_way(forth, back, step, epsilon, phi) for forth, back in (deltas, deltas[::-1]))


def _one_way(
    forth: Array, back: Array, step: float, epsilon: float, phi: Callable[[Array], Array]
) -> float:
    ratios, sticks = hockey_sticks(forth, back, step)
    upper, lower = _lines(ratios, sticks, math.exp(epsilon), phi)
    # Chords, from the least ratio where g is not 0; left of it H is at most 1.
    first = max(0, int(np.searchsorted(ratios * (upper / lower).max(), 1.0)) - 1)
    chosen = _some(np.arange(first, len(ratios)), _CHORDS)
    ratios, sticks = ratios[chosen], sticks[chosen]
    values = np.array([(upper * ratio - lower).max() for ratio in ratios]).clip(min=0)
    slopes = np.diff(values, prepend=0.0) / np.diff(ratios, prepend=0.0)
    falls = -np.diff(sticks, prepend=1.0)
    most = float(phi(np.zeros(1))[0])
    return float(slopes @ falls + most * sticks[-1])


def _lines(
    ratios: Array, sticks: Array, factor: float, phi: Callable[[Array], Array]
) -> tuple[Array, Array]:
    """phi'(R(w)) and `factor` phi'(v) of all cells from v to w.

    The ends of the cells are where the best t of R changes; any would do, as R is bounded at them.
    """
    ends = -np.diff(sticks)[::-1] / np.diff(ratios)[::-1]
    ends = np.maximum.accumulate(ends.clip(0.0, 1.0))
    reach = np.minimum(
        ratios[:0:-1] * ends + sticks[:0:-1], ratios[-2::-1] * ends + sticks[-2::-1]
    ).clip(max=1.0)
    chosen = _some(np.arange(len(ends)), _CELLS)
    ends, reach = ends[chosen], reach[chosen]
    below, above = np.concatenate([[0.0], ends]), np.concatenate([reach, [1.0]])
    return phi(1 - above), factor * phi(1 - below)


def _some(places: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Up to `most` of them, evenly, with the first and the last."""
    few = np.linspace(0, len(places) - 1, min(most, len(places)))
    return places[few.round().astype(int)]
