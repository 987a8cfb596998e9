"""Releasing the best of a secret number of trials: the law, and the bound on a toy mechanism."""

import math

import numpy as np
import pytest
from checks import ALPHA
from scipy import stats

from core.privacy.accounting import renyi
from core.privacy.keys import KeyedStream
from core.privacy.plan.scopes import num_trials_at

DRAWS = 200_000


def mass(law: str, gamma: float, k: np.ndarray) -> np.ndarray:
    """Probability of k runs (Papernot and Steinke 2022, definition 1)."""
    if law == "geometric":
        return gamma * (1 - gamma) ** (k - 1)
    return (1 - gamma) ** k / (k * math.log(1 / gamma))


def follows(draws: np.ndarray, law: str, mean: float) -> bool:
    """Chi-square of the counts against the law, the tail as one cell."""
    k = np.arange(1, 60)
    expected = mass(law, renyi.halting_probability(law, mean), k) * len(draws)
    counts = np.bincount(np.minimum(draws, 60), minlength=61)[1:]
    return stats.chisquare(counts, np.append(expected, len(draws) - expected.sum())).pvalue > ALPHA


@pytest.mark.parametrize("law", ["geometric", "logarithmic"])
def test_the_number_of_trials_follows_its_law_and_no_other(law):
    stream = KeyedStream(b"k" * 32)
    uniforms = ((stream.bits(0, DRAWS) >> np.uint64(11)).astype(float) + 0.5) * 2.0**-53
    draws = np.array([num_trials_at(u, law, 16.0) for u in uniforms])
    assert draws.min() == 1
    assert follows(draws, law, 16.0)
    assert not follows(draws, law, 16.8)  # 5 % off.
    assert not follows(draws, law, 15.2)
    other = {"geometric": "logarithmic", "logarithmic": "geometric"}[law]
    assert not follows(draws, other, 16.0)
    k = np.arange(1, 100_000)
    pmf = mass(law, renyi.halting_probability(law, 16.0), k)
    assert pmf.sum() == pytest.approx(1.0, abs=1e-9)
    assert (k * pmf).sum() == pytest.approx(16.0, rel=1e-6)


def hockey_stick(p: np.ndarray, q: np.ndarray, epsilon: float) -> float:
    return float(np.clip(p - math.exp(epsilon) * q, 0, None).sum())


@pytest.mark.parametrize("law", ["geometric", "logarithmic"])
@pytest.mark.parametrize("mean", [2.0, 16.0])
def test_the_best_of_a_secret_number_stays_within_the_bound(law, mean):
    """Exact: a Gaussian score is its own output, so the best of K has the law of a maximum.

    The probability generating function of K gives the distribution of the maximum of K draws.
    """
    mu, delta = 1.0, 1e-5
    grid = np.linspace(-12.0, 14.0, 26_001)
    gamma = renyi.halting_probability(law, mean)

    def of_the_best(shift: float) -> np.ndarray:
        below = stats.norm.cdf(grid - shift)
        if law == "geometric":
            cumulative = gamma * below / (1 - (1 - gamma) * below)
        else:
            cumulative = np.log1p(-(1 - gamma) * below) / math.log(gamma)
        return np.diff(cumulative)

    with_record, without = of_the_best(mu), of_the_best(0.0)
    bound = min(
        renyi.selection_epsilon(
            (one * mu**2 / 2, other * mu**2 / 2), (one, other), law, mean, delta
        )
        for one in renyi.ORDERS[:60]
        for other in renyi.ORDERS[:60]
    )
    exact = max(
        hockey_stick(with_record, without, bound), hockey_stick(without, with_record, bound)
    )
    assert exact <= delta
    single = renyi.epsilon([(1.0, 1 / mu, 1)], delta)
    # Seen to reject: what one trial costs is no bound for the best of many.
    assert hockey_stick(with_record, without, 0.6 * single) > delta
    assert bound > single
