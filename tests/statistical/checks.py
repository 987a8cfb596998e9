"""Hypothesis tests with a stated error rate: a right value fails once in a million runs."""

import numpy as np
from scipy import stats

ALPHA = 1e-6


def is_normal(values: np.ndarray, stddev: float) -> bool:
    """Whether `values` look like independent N(0, stddev^2): chi-square of the scale, KS of shape.

    200,000 values reject a scale that is off by 2 %.
    """
    values = np.asarray(values, dtype=np.float64).ravel()
    n = values.size
    scale = stats.chi2.cdf(np.sum((values / stddev) ** 2), n)
    shape = stats.kstest(values / stddev, "norm").pvalue
    return bool(ALPHA / 2 < scale < 1 - ALPHA / 2 and shape > ALPHA)


def is_binomial(successes: int, trials: int, probability: float) -> bool:
    """Whether `successes` of `trials` agree with `probability`."""
    return stats.binomtest(successes, trials, probability).pvalue > ALPHA
