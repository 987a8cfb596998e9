"""From what the two stages release to epsilon, and back to the DP-SGD noise that the budget leaves.

By privacy loss distributions (PLD), discretised at 1e-4; RDP (Mironov 2017) brackets the search.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

from core.errors import InfeasibleError
from core.privacy.accounting import renyi
from core.privacy.accounting.mechanism import FEW, FINE, Mechanism, quick_grid
from core.privacy.accounting.rounding import upward

_MOST_SECANTS = 6
MAX_NOISE_MULTIPLIER = 1e4
_LEAST = 0.02
_DECIMALS = 4


@lru_cache(maxsize=4096)
def epsilon_of_mechanisms(
    mechanisms: tuple[Mechanism, ...],
    delta: float,
    relation: str,
    discretization: float,
    of_record: bool = True,
) -> float:
    """Epsilon at `delta` of many mechanisms together, as of `grouped`; 0 when there are none.

    Args:
        of_record: whether on the fine grid the figure of a few is that of the accountant of
            record; else it is so to about 2e-6, in a tenth of the time: to show.
    """
    if not mechanisms:
        return 0.0
    if any(noise_multiplier == 0 for _, noise_multiplier, _ in mechanisms):
        return math.inf  # A release without noise.
    # Imported here, as the accountant of record takes a second for it.
    if len(mechanisms) > FEW:
        from core.privacy.accounting.exact import epsilon_of_many as epsilon_of
    elif of_record and discretization <= FINE:
        from core.privacy.accounting.exact import exact_epsilon as epsilon_of
    else:
        from core.privacy.accounting.quick import quick_epsilon as epsilon_of
    return epsilon_of(mechanisms, delta, relation, discretization)


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
        raise InfeasibleError(too_little(f"epsilon {upward(target_epsilon)}"))


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
    from core.privacy.accounting.exact import exact_epsilon
    from core.privacy.accounting.quick import quick_epsilon

    guess = _guess(spent, sample_rate, num_steps, target_epsilon, delta, relation)
    grid = 2 * quick_grid([*spent, (sample_rate, guess, num_steps)])  # Its error is removed.

    def quick(noise_multiplier: float, discretization: float) -> float:
        dp_sgd = (sample_rate, noise_multiplier, num_steps)
        return quick_epsilon([*spent, dp_sgd], delta, relation, discretization)

    def excess(noise_multiplier: float) -> float:
        return quick(noise_multiplier, grid) - target_epsilon

    low, high = _bracket(excess, guess, target_epsilon)
    coarse = renyi.find_root(excess, low, high, rtol=2e-3)
    # The grid's error falls with its square, so that of a quarter of it is about a fifteenth of
    # the difference. One Newton step, then up to four decimals, and a proof on the finest grid.
    at_root, finer = excess(coarse), quick(coarse, grid / 4) - target_epsilon
    slope = (excess(1.005 * coarse) - at_root) / (0.005 * coarse)
    fine = coarse - (finer - (at_root - finer) / 15) / slope
    noise_multiplier = math.ceil(fine * 10**_DECIMALS) / 10**_DECIMALS
    while True:
        dp_sgd = (sample_rate, noise_multiplier, num_steps)
        epsilon = exact_epsilon([*spent, dp_sgd], delta, relation, FINE)
        if epsilon <= target_epsilon:
            return noise_multiplier, epsilon
        step = max((epsilon - target_epsilon) / -slope, 10.0**-_DECIMALS)
        noise_multiplier = math.ceil((noise_multiplier + step) * 10**_DECIMALS) / 10**_DECIMALS
        if noise_multiplier > MAX_NOISE_MULTIPLIER:
            raise InfeasibleError(too_little(f"epsilon {upward(target_epsilon)}"))


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
    from core.privacy.accounting.quick import quick_epsilon

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
            raise InfeasibleError(too_little(f"epsilon {upward(target_epsilon)}"))
    while excess(low) < 0:
        low, high = low / 2, low
        if low < 1e-3:
            raise InfeasibleError(
                f"epsilon {upward(target_epsilon)} is so large that DP-SGD would need no noise; "
                "lower privacy.target_epsilon"
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
    found = math.exp(renyi.find_root(excess, low, high, xtol=1e-3))
    return found if relation == "zero_out" else 2 * found


def too_little(budget: str) -> str:
    """Why no DP-SGD noise fits into what the other releases leave of `budget`."""
    return (
        f"the other releases leave too little of {budget} for DP-SGD, whose noise multiplier would "
        f"exceed {MAX_NOISE_MULTIPLIER:g}: lower central_images.per_class, or raise "
        "central_images.noise_multiplier or, of method feta_pro, frequency.noise_multiplier"
    )
