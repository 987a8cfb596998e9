"""Hypothesis tests with a stated error rate: a right value fails once in a million runs."""

import numpy as np
import torch
from scipy import stats

from core.privacy.keys import KeyedStream

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


def box_muller(stream: KeyedStream, step: int, count: int) -> torch.Tensor:
    """The standard normal numbers of a stream, unrounded: float64 `[count]`, made by hand."""
    pairs = (count + 1) // 2
    bits = (stream.bits(step, 2 * pairs) >> np.uint64(11)).astype(np.float64)
    first, second = np.split((bits + 0.5) / 2**53, 2)
    radius, angle = np.sqrt(-2 * np.log(first)), 2 * np.pi * second
    numbers = np.concatenate((radius * np.cos(angle), radius * np.sin(angle)))[:count]
    return torch.from_numpy(numbers)


def is_binomial(successes: int, trials: int, probability: float) -> bool:
    """Whether `successes` of `trials` agree with `probability`."""
    return stats.binomtest(successes, trials, probability).pvalue > ALPHA
