"""Renyi DP: adaptive composition, private selection, and figures where PLD ends.

PLD is tighter but composes only mechanisms that were fixed beforehand, and ends at large epsilons
and small deltas. Where the noise of a later trial depends on earlier results, the proven filter is
that of Renyi DP at one fixed order (Feldman and Zrnic 2021, theorem 4.3). For the best of a secret
number of runs it has a theorem, too (Papernot and Steinke 2022, theorem 2), for small deltas.
"""
# scipy has no types:
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, cast

import numpy as np

from core.privacy.accounting.mechanism import Mechanism

ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 512, 1024)
"""Integers, at which the divergence is a finite sum."""
SMALL_ORDERS = tuple(1 + 1e-3 * 1.25**k for k in range(31))
"""Between 1 and 2, at which a bound is taken: the best where epsilon is far above 10."""
SHAPES = {"geometric": 1.0, "logarithmic": 0.0}
"""Shape of the truncated negative binomial law of the number of runs."""


def find_root(function: Callable[[float], float], low: float, high: float, **within: Any) -> float:
    """Where `function` is 0 between `low` and `high`, by Brent's method.

    Args:
        within: `xtol` and `rtol`, as scipy takes them.
    """
    from scipy import optimize  # Slow to load, and most workers only need a plan's numbers.

    return cast(float, optimize.brentq(function, low, high, **within))


def divergence(mechanisms: Iterable[Mechanism], order: float) -> float:
    """Renyi divergence at `order` of Poisson-subsampled Gaussian mechanisms, composed.

    Mironov, Talwar and Zhang (2019), section 3.3, for the zero-out (add or remove) relation: the
    logarithm of sum_k C(a, k) (1-q)^(a-k) q^k exp(k (k-1) / (2 sigma^2)), over a-1. The terms are
    taken less the binomial's own, whose sum is 1, so that small divergences keep their digits.

    Args:
        order: integer a >= 2, or real in (1, 2): then an upper bound, as of `_small`.
    """
    return sum(count * _one(rate, sigma, order) for rate, sigma, count in mechanisms)


@lru_cache(maxsize=2**16)
def _one(sample_rate: float, noise_multiplier: float, order: float) -> float:
    if sample_rate == 1:
        return order / (2 * noise_multiplier**2)
    if not isinstance(order, int):
        return _small(sample_rate, noise_multiplier, order)
    k, log_binomial = _binomial(order)
    exponent = k * (k - 1) / (2 * noise_multiplier**2)
    small = np.log(np.expm1(np.minimum(exponent, 1.0)))
    log_expm1 = np.where(exponent > 1, exponent + np.log1p(-np.exp(-exponent)), small)
    log_weights = (order - k) * math.log1p(-sample_rate) + k * math.log(sample_rate)
    terms = log_binomial + log_weights + log_expm1
    largest = terms.max()
    total = largest + math.log(np.exp(terms - largest).sum())
    return float(np.logaddexp(0.0, total)) / (order - 1)


def _small(sample_rate: float, noise_multiplier: float, order: float) -> float:
    """An upper bound at orders a in (1, 2): the smaller of two, for little and for much noise.

    With r the ratio of the densities of N(1, sigma^2) and N(0, sigma^2), the divergence is
    log E (1-q + q r)^a / (a-1) under the latter (Mironov, Talwar and Zhang 2019, section 3.2: no
    other direction is worse). For u >= v >= 0 Taylor's series in v / u, whose next term is
    negative, gives (u + v)^a <= u^a + a u^(a-1) v + a (a-1) / 2 u^(a-2) v^2; so each side of r at
    which q r = 1-q is a sum of moments of r, that of r^k being exp(k (k-1) / (2 sigma^2)) times
    the part of N(k, sigma^2) that lies there. And with w = q (r-1), for which E w = 0, (1 + w)^a <=
    1 + a w + a (a-1) / 2 w^2, but for w < 0, where -w^3 <= q w^2, what the next term comes to.
    """
    from scipy import special

    log_rest, log_rate = math.log1p(-sample_rate), math.log(sample_rate)
    middle = 0.5 + noise_multiplier**2 * (log_rest - log_rate)
    j = np.arange(3)
    log_factor = np.log([1.0, order, order * (order - 1) / 2])
    terms = [
        log_factor
        + (order - power) * log_rest
        + power * log_rate
        + power * (power - 1) / (2 * noise_multiplier**2)
        + special.log_ndtr(side * (middle - power) / noise_multiplier)
        for power, side in ((j, 1.0), (order - j, -1.0))
    ]
    few = max(0.0, float(np.logaddexp.reduce(terms, axis=None)))
    if noise_multiplier < 0.05:  # The other's square overflows, and is far more.
        return few / (order - 1)
    square = sample_rate**2 * math.expm1(noise_multiplier**-2)
    next_term = (2 - order) / 3 * sample_rate * (1 - sample_rate) ** (order - 3)
    much = math.log1p(order * (order - 1) / 2 * square * (1 + next_term))
    without_sampling = order / (2 * noise_multiplier**2)
    return min(few / (order - 1), much / (order - 1), without_sampling)


@lru_cache(maxsize=256)
def _binomial(order: int) -> tuple[np.ndarray, np.ndarray]:
    """k = 2 to `order`, and the logarithm of C(order, k)."""
    from scipy import special

    k = np.arange(2, order + 1)
    log_binomial = (
        special.gammaln(order + 1) - special.gammaln(k + 1) - special.gammaln(order - k + 1)
    )
    return k, log_binomial


def offset(order: float, delta: float) -> float:
    """What epsilon at `delta` exceeds the divergence by (Canonne et al. 2020, proposition 12)."""
    return math.log1p(-1 / order) - math.log(delta * order) / (order - 1)


def epsilon(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """Epsilon at `delta` of all mechanisms together, by the order at which it is least."""
    orders = (*SMALL_ORDERS, *ORDERS)
    return min(divergence(mechanisms, order) + offset(order, delta) for order in orders)


def best_order(target: float, delta: float) -> int:
    """The order that leaves Gaussian mechanisms the most room within (target, delta).

    It depends on public numbers alone and is fixed before anything runs, as the filter demands.
    """
    return max(ORDERS, key=lambda order: (target - offset(order, delta)) / order)


@lru_cache(maxsize=64)
def halting_probability(law: str, mean: float) -> float:
    """Parameter gamma in (0, 1) of the law of the number of runs, of which `mean` is the mean.

    Args:
        law: `geometric` or `logarithmic`.
        mean: of the number of runs, above 1.
    """
    if law == "geometric":
        return 1 / mean

    def excess(log_gamma: float) -> float:
        return math.expm1(-log_gamma) / -log_gamma - mean

    return math.exp(find_root(excess, -700.0, -1e-9, xtol=1e-13))


def selection_epsilon(
    divergences: tuple[float, float], orders: tuple[int, int], law: str, mean: float, delta: float
) -> float:
    """Epsilon of releasing the best of a secret number of runs, each drawn alike.

    Papernot and Steinke (2022), theorem 2, with the conversion of `offset`.

    Args:
        divergences: of one run with its score, at the two `orders`.
        orders: lambda of the result, and the order of the bound's constant term.
        law: of the number of runs, `geometric` or `logarithmic`.
        mean: of the number of runs, above 1.
    """
    first, second = orders
    constant = (1 + SHAPES[law]) * (
        (1 - 1 / second) * divergences[1] - math.log(halting_probability(law, mean)) / second
    )
    return divergences[0] + math.log(mean) / (first - 1) + constant + offset(first, delta)
