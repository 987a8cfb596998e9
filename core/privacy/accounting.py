"""From what the two stages release to epsilon, by privacy loss distributions (PLD).

The accountant of record is `dp_accounting.pld.PLDAccountant` (Koskela et al. 2020; Doroshenko et
al. 2022), discretised at 1e-4. RDP (Mironov 2017) brackets the search and cross-checks.
"""
# scipy has no types, and those of dp_accounting come without stubs:
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import cast

from dp_accounting import dp_event
from dp_accounting.pld import pld_privacy_accountant, privacy_loss_distribution
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from dp_accounting.rdp import rdp_privacy_accountant
from scipy import optimize

from core.errors import InfeasibleError
from core.privacy import renyi
from core.privacy.loss_distribution import RELATIONS, one_release, quick_epsilon
from core.privacy.renyi import Mechanism

COARSE, FINE = 1e-3, 1e-4
_COARSEST = 5e-3
_MOST_SECANTS = 6
MAX_NOISE_MULTIPLIER = 1e4
_LEAST = 0.02
_DECIMALS = 4
# Up to so many mechanisms the figures are those of a plan, to the last digit.
_FEW = 4
# Up to this product of mechanisms and epsilon the fine discretisation is fast; above it the
# coarse one decides, whose figures are a little larger.
_FINE_WORK = 400

_find_root = cast(Callable[..., float], optimize.brentq)


def subsampled_gaussian(
    sample_rate: float, noise_multiplier: float, count: int
) -> dp_event.DpEvent:
    """`count` releases of a Poisson-subsampled Gaussian mechanism.

    A record belongs to one class, so one central image for each class is one release, not many.
    """
    step = dp_event.PoissonSampledDpEvent(sample_rate, dp_event.GaussianDpEvent(noise_multiplier))
    return dp_event.SelfComposedDpEvent(step, count)


def pld_accountant(
    relation: str, discretization: float = FINE
) -> pld_privacy_accountant.PLDAccountant:
    """A fresh PLD accountant for `relation` ('zero_out' or 'replace_one')."""
    return pld_privacy_accountant.PLDAccountant(RELATIONS[relation], discretization)


@lru_cache(maxsize=256)
def _composed(
    events: tuple[dp_event.DpEvent, ...], relation: str, discretization: float
) -> pld_privacy_accountant.PLDAccountant:
    accountant = pld_accountant(relation, discretization)
    for event in events:
        accountant.compose(event)
    return accountant


def epsilon_of(
    events: Sequence[dp_event.DpEvent], delta: float, relation: str, discretization: float = FINE
) -> float:
    """Epsilon at `delta` of all `events` together; 0 when there are none."""
    if not events:
        return 0.0
    return float(_composed(tuple(events), relation, discretization).get_epsilon(delta))


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
    return FINE if count <= _FEW or count * scale <= _FINE_WORK else COARSE


@lru_cache(maxsize=4096)
def epsilon_of_mechanisms(
    mechanisms: tuple[Mechanism, ...], delta: float, relation: str, discretization: float
) -> float:
    """Epsilon at `delta` of many mechanisms together, as of `grouped`; 0 when there are none."""
    if not mechanisms:
        return 0.0
    if any(noise_multiplier == 0 for _, noise_multiplier, _ in mechanisms):
        return math.inf  # A release without noise.
    if len(mechanisms) <= _FEW and discretization > FINE:
        return quick_epsilon(mechanisms, delta, relation, discretization)
    if len(mechanisms) <= _FEW:
        events = [subsampled_gaussian(*mechanism) for mechanism in mechanisms]
        return epsilon_of(events, delta, relation, discretization)
    total = _composed_in_binary(mechanisms, relation, discretization)
    return float(total.get_epsilon_for_delta(delta))


def _composed_in_binary(
    mechanisms: Sequence[Mechanism], relation: str, discretization: float
) -> PrivacyLossDistribution:
    """What the accountant composes, in a tenth of its time where the mechanisms are many.

    The counts are read in binary from the highest bit: square the total, then compose one
    release of each mechanism that has this bit. Tails cut off on the way, at most about 1e-15
    for each release, count as infinite loss, so the result stays an upper bound.
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


def rdp_epsilon_of(events: Sequence[dp_event.DpEvent], delta: float, relation: str) -> float:
    """Epsilon by Renyi DP, the cross-check: never smaller than by PLD beyond rounding."""
    accountant = rdp_privacy_accountant.RdpAccountant(renyi.ORDERS, RELATIONS[relation])
    for event in events:
        accountant.compose(event)
    return float(accountant.get_epsilon(delta))


def check_room(
    spent: Sequence[Mechanism],
    sample_rate: float,
    num_steps: int,
    target_epsilon: float,
    delta: float,
    relation: str,
) -> None:
    """Whether the largest noise multiplier keeps the total within the target; see the solver.

    Raises:
        InfeasibleError: it does not.
    """
    cheapest = (*spent, (sample_rate, MAX_NOISE_MULTIPLIER, num_steps))
    if epsilon_of_mechanisms(cheapest, delta, relation, quick_grid(cheapest)) > target_epsilon:
        raise InfeasibleError(too_little(f"epsilon {target_epsilon:g}"))


def solve_noise_multiplier(
    spent: Sequence[Mechanism],
    sample_rate: float,
    num_steps: int,
    target_epsilon: float,
    delta: float,
    relation: str,
) -> tuple[float, float]:
    """Finds the smallest DP-SGD noise multiplier that keeps the total within the target.

    Args:
        spent: mechanisms already fixed (those of the easy stage, a private score).
        sample_rate: Poisson sample rate q of DP-SGD, in (0, 1].
        num_steps: DP-SGD steps, at least 1.

    Returns:
        The noise multiplier, rounded up to four decimals, and the total epsilon it spends,
        evaluated at the fine discretisation and asserted to be within the target.

    Raises:
        InfeasibleError: no noise multiplier up to 10,000 keeps the total within the target.
    """

    guess = _guess(spent, sample_rate, num_steps, target_epsilon, delta, relation)
    grid = 2 * quick_grid([*spent, (sample_rate, guess, num_steps)])  # Its error is removed.

    def quick(noise_multiplier: float, discretization: float) -> float:
        dp_sgd = (sample_rate, noise_multiplier, num_steps)
        return quick_epsilon([*spent, dp_sgd], delta, relation, discretization)

    def excess(noise_multiplier: float) -> float:
        return quick(noise_multiplier, grid) - target_epsilon

    low, high = _bracket(excess, guess, target_epsilon)
    coarse = _find_root(excess, low, high, rtol=2e-3)
    # The grid's error falls with its square, so that of a quarter of it is about a fifteenth of
    # the difference. One Newton step, then up to four decimals, and a proof on the finest grid.
    at_root, finer = excess(coarse), quick(coarse, grid / 4) - target_epsilon
    slope = (excess(1.005 * coarse) - at_root) / (0.005 * coarse)
    fine = coarse - (finer - (at_root - finer) / 15) / slope
    noise_multiplier = math.ceil(fine * 10**_DECIMALS) / 10**_DECIMALS
    while True:
        dp_sgd = (sample_rate, noise_multiplier, num_steps)
        epsilon = _proven_beside(spent, dp_sgd, delta, relation)
        if epsilon <= target_epsilon:
            return noise_multiplier, epsilon
        step = max((epsilon - target_epsilon) / -slope, 10.0**-_DECIMALS)
        noise_multiplier = math.ceil((noise_multiplier + step) * 10**_DECIMALS) / 10**_DECIMALS
        if noise_multiplier > MAX_NOISE_MULTIPLIER:
            raise InfeasibleError(too_little(f"epsilon {target_epsilon:g}"))


def _proven_beside(
    spent: Sequence[Mechanism],
    another: Mechanism,
    delta: float,
    relation: str,
) -> float:
    """Epsilon, by the accountant of record, of `spent` and one more mechanism.

    What is spent is kept composed for the next call.
    """
    events = tuple(subsampled_gaussian(*mechanism) for mechanism in spent)
    accountant = copy.deepcopy(_composed(events, relation, FINE))
    accountant.compose(subsampled_gaussian(*another))
    return float(accountant.get_epsilon(delta))


def estimated_noise_multiplier(
    spent: Sequence[Mechanism],
    sample_rate: float,
    num_steps: int,
    target_epsilon: float,
    delta: float,
    relation: str,
) -> float:
    """As `solve_noise_multiplier`, to about 0.3 % and in a tenth of its time: to show, not to use.

    Secants in logarithms, where epsilon is nearly a power of the noise multiplier: mostly one.

    Raises:
        InfeasibleError: the spent mechanisms leave too little.
    """

    guess = _guess(spent, sample_rate, num_steps, target_epsilon, delta, relation)
    grid = quick_grid([*spent, (sample_rate, guess, num_steps)])

    def excess(log_noise: float) -> float:
        dp_sgd = (sample_rate, math.exp(log_noise), num_steps)
        return math.log(quick_epsilon([*spent, dp_sgd], delta, relation, grid) / target_epsilon)

    one = math.log(0.94 * guess)
    at_one = excess(one)
    if abs(at_one) < 1e-9:
        return math.exp(one)
    other = one + at_one  # As if epsilon were inverse to the noise.
    for _ in range(_MOST_SECANTS):
        at_other = excess(other)
        slope = (at_other - at_one) / (other - one)
        if slope > -0.4:  # More noise hardly helps: the rest has spent nearly all.
            break
        found = other - at_other / slope
        if abs(found - other) < 0.04:  # Where epsilon is a power, to the second order of this.
            return math.exp(found)
        one, at_one, other = other, at_other, found
    check_room(spent, sample_rate, num_steps, target_epsilon, delta, relation)
    return solve_noise_multiplier(spent, sample_rate, num_steps, target_epsilon, delta, relation)[0]


def _bracket(
    excess: Callable[[float], float], guess: float, target_epsilon: float
) -> tuple[float, float]:
    """Interval that holds the root of `excess`; RDP, cheap, over-estimates it by 1-14 %."""
    low, high = 0.7 * guess, 1.01 * guess
    while excess(high) > 0:
        low, high = high, 2 * high
        if high > MAX_NOISE_MULTIPLIER:
            raise InfeasibleError(too_little(f"epsilon {target_epsilon:g}"))
    while excess(low) < 0:
        low, high = low / 2, low
        if low < 1e-3:
            raise InfeasibleError(
                f"epsilon {target_epsilon:g} is so large that DP-SGD would need no noise; lower "
                "privacy.target_epsilon"
            )
    return low, high


def _guess(
    spent: Sequence[Mechanism],
    sample_rate: float,
    num_steps: int,
    target_epsilon: float,
    delta: float,
    relation: str,
) -> float:
    """The noise multiplier by Renyi DP for the zero-out relation; 1 where that finds none.

    Replacing a record moves a sum twice as far as leaving it out, and costs about twice.
    """

    def excess(log_noise: float) -> float:
        mechanisms = [*spent, (sample_rate, math.exp(log_noise), num_steps)]
        return renyi.epsilon(mechanisms, delta) - target_epsilon

    low, high = math.log(_LEAST), math.log(MAX_NOISE_MULTIPLIER)
    if excess(high) >= 0 or excess(low) <= 0:
        return 1.0
    found = math.exp(_find_root(excess, low, high, xtol=1e-3))
    return found if relation == "zero_out" else 2 * found


def too_little(budget: str) -> str:
    """Why no DP-SGD noise fits into what the other releases leave of `budget`."""
    return (
        f"the other releases leave too little of {budget} for DP-SGD, whose noise multiplier would "
        f"exceed {MAX_NOISE_MULTIPLIER:g}: lower central_images.per_class, or raise "
        "central_images.noise_multiplier or, of method feta_pro, frequency.noise_multiplier"
    )
