"""Accountant of record: privacy loss distributions of dp-accounting, composed.

It is `dp_accounting.pld.PLDAccountant` (Koskela et al. 2020; Doroshenko et
al. 2022). Loads dp-accounting, so only who composes imports this: most workers need a plan's
numbers alone.
"""
# dp_accounting's types come without stubs:
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportPrivateUsage=false

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

from core.privacy.accounting.mechanism import LARGEST, Mechanism
from core.privacy.accounting.quick import library_release, one_release


def exact_epsilon(
    mechanisms: Sequence[Mechanism], delta: float, relation: str, discretization: float
) -> float:
    """Epsilon at `delta` of `mechanisms` together: what the accountant of record says, to the bit.

    Its distribution of one release takes up to seconds and is kept, whatever that is composed with.
    """
    total = privacy_loss_distribution.identity(discretization)
    for sample_rate, noise_multiplier, count in mechanisms:
        release = library_release(sample_rate, noise_multiplier, relation, discretization)
        total = total.compose(release.self_compose(count))
    return epsilon_of(total, delta)


def epsilon_of_many(
    mechanisms: Sequence[Mechanism], delta: float, relation: str, discretization: float
) -> float:
    """The same in a tenth of its time where the mechanisms are many, and a little larger."""
    return epsilon_of(composed(mechanisms, relation, discretization), delta)


def composed(
    mechanisms: Sequence[Mechanism], relation: str, discretization: float
) -> PrivacyLossDistribution:
    """The loss distribution of at least one mechanism, rounded pessimistically.

    The counts are read in binary from the highest bit: square the total, then compose one
    release of each mechanism that has this bit. Tails cut off on the way, at most about 1e-15
    for each release, count as infinite loss, so what follows from it stays an upper bound.
    """
    total = privacy_loss_distribution.identity(discretization)
    for bit in reversed(range(max(count for *_, count in mechanisms).bit_length())):
        parts = [
            one_release(sample_rate, noise_multiplier, relation, discretization)
            for sample_rate, noise_multiplier, count in mechanisms
            if count >> bit & 1
        ]
        parts.append(total.compose(total))
        while len(parts) > 1:  # In pairs, as the time of one composition grows with both sizes.
            pairs = zip(parts[::2], parts[1::2], strict=False)
            parts = [one.compose(other) for one, other in pairs] + parts[len(parts) & ~1 :]
        total = parts[0]
    return total


def epsilon_of(total: PrivacyLossDistribution, delta: float) -> float:
    """The library's conversion; where exp(-loss) vanishes in it, what is a little more.

    There it is the loss that is exceeded with probability at most `delta`.
    """
    with np.errstate(over="ignore"):
        epsilon = float(total.get_epsilon_for_delta(delta))
    if epsilon <= LARGEST:
        return epsilon
    quantiles: list[float] = []
    for pmf in (total._pmf_remove, total._pmf_add):
        dense: Any = pmf.to_dense_pmf()
        above = dense._infinity_mass + np.cumsum(dense._probs[::-1])
        place = len(above) - int(np.searchsorted(above, delta, side="right"))
        quantiles.append((dense._lower_loss + place - 1) * dense._discretization)
    return math.inf if total._pmf_remove._infinity_mass > delta else max(quantiles)
