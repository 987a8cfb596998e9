"""Solver of a plan: from releases to epsilon, and from the budget to the noise of DP-SGD.

By privacy loss distributions (PLD), discretised at about 1e-4; RDP (Mironov 2017) brackets the
search, and gives the figure where PLD ends: above epsilon 600, and below the delta that its Fourier
transforms resolve.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import metadata
from typing import NoReturn

from core.errors import InfeasibleError
from core.privacy.accounting import renyi
from core.privacy.accounting.mechanism import (
    FEW,
    FINE,
    LARGEST,
    Mechanism,
    fitting_grid,
    least_delta,
    quick_grid,
)
from core.privacy.accounting.rounding import upward

_MOST_SECANTS = 6
MIN_NOISE_MULTIPLIER, MAX_NOISE_MULTIPLIER = 1e-4, 1e4
_DIGITS = 4
_END = 0.999 * LARGEST
"""Where PLD solves for what is above its end, so that rounding does not lead beyond it."""
_LARGEST_SCALE = 1e5
"""Where PLD alone is proven, what would exceed this is not composed."""
_MOST_RELEASES = 2_000_000
"""Beyond so many the library takes minutes; the quick figure, equal to about 2e-6, is taken."""


@lru_cache(maxsize=4096)
def epsilon_of_mechanisms(
    mechanisms: tuple[Mechanism, ...],
    delta: float,
    relation: str,
    discretization: float,
    of_record: bool = True,
    scale: float | None = None,
) -> float:
    """Epsilon at `delta` of many mechanisms together, as of `grouped`; 0 when there are none.

    By PLD, and where that ends by Renyi DP, which is proven here for the zero-out relation alone:
    `accountant_of` names it.

    Args:
        discretization: grid of PLD; made to fit, see `fitting_grid`.
        of_record: whether on the fine grid the figure of a few is that of the accountant of
            record; else it is so to about 2e-6, in a tenth of the time: to show.
        scale: about what epsilon is, which decides the grid; if not given, by Renyi DP.
    """
    if not mechanisms:
        return 0.0
    if any(noise_multiplier == 0 for _, noise_multiplier, _ in mechanisms):
        return math.inf  # A release without noise.
    # Cheap, and never far below the figure of PLD, of which it bounds the cost.
    bound, proven = renyi.epsilon(mechanisms, delta), relation == "zero_out"
    if proven and (delta < least_delta(mechanisms) or bound > 2 * LARGEST):
        return bound
    if bound > _LARGEST_SCALE:
        return math.inf
    # Imported here, as the accountant of record takes a second for it.
    from core.privacy.accounting.exact import epsilon_of_many, exact_epsilon

    if len(mechanisms) > FEW:
        epsilon_of = epsilon_of_many
    elif of_record and discretization <= FINE and sum(n for *_, n in mechanisms) <= _MOST_RELEASES:
        epsilon_of = exact_epsilon
    else:
        from core.privacy.accounting.quick import quick_epsilon as epsilon_of
    grid = fitting_grid(mechanisms, discretization, scale or bound)
    epsilon = epsilon_of(mechanisms, delta, relation, grid)
    if epsilon > LARGEST and proven:
        return bound
    # Infinite: the quick figure beyond its end.
    return epsilon if epsilon < math.inf else epsilon_of_many(mechanisms, delta, relation, grid)


def accountant_of(
    epsilon: float,
    mechanisms: Sequence[Mechanism],
    delta: float,
    relation: str,
    discretization: float | None = None,
    scale: float | None = None,
) -> str:
    """What gave `epsilon`, a figure of `epsilon_of_mechanisms`: PLD, or Renyi DP where that ends.

    Args:
        discretization, scale: what `epsilon_of_mechanisms` was given, to name the grid.
    """
    least = least_delta(mechanisms)
    if relation == "zero_out" and (LARGEST < epsilon < math.inf or delta < least):
        return (
            f"Renyi DP (Mironov 2017), as PLD ends at epsilon {LARGEST:g} and, for so many "
            f"releases, delta {least:.2g}"
        )
    name = f"PLD, dp-accounting {metadata.version('dp-accounting')}"
    if discretization is None:
        return name
    if mechanisms:
        scale = scale or renyi.epsilon(mechanisms, delta)
        discretization = fitting_grid(mechanisms, discretization, scale)
    return f"{name}, discretization {discretization:g}"


def check_reach(
    target_epsilon: float, mechanisms: Sequence[Mechanism], delta: float, relation: str
) -> None:
    """Whether some accountant reaches a target.

    Raises:
        InfeasibleError: PLD ends before it, and Renyi DP is proven for another relation.
    """
    least = least_delta(mechanisms)
    if relation != "zero_out" and (target_epsilon > LARGEST or delta < least):
        raise InfeasibleError(
            f"epsilon {upward(target_epsilon)} at delta {upward(delta, 6)} is out of reach of PLD, "
            f"which ends at epsilon {LARGEST:g} and, for so many releases, delta {least:.2g}, and "
            "Renyi DP is proven here for privacy.neighboring_relation='zero_out' alone: choose "
            "that, lower privacy.target_epsilon or raise privacy.target_delta to what PLD reaches"
        )


@dataclass(frozen=True)
class Problem:
    """Which noise multiplier of one release, mostly DP-SGD, keeps the total within a target.

    Attributes:
        spent: mechanisms already fixed (those of the easy stage, a private score).
        sample_rate: Poisson sample rate q of DP-SGD, in (0, 1].
        num_steps: DP-SGD steps, at least 1.
        sought: what messages call the release.
        remedy: what to change where the target is too little.
    """

    spent: tuple[Mechanism, ...]
    sample_rate: float
    num_steps: int
    target_epsilon: float
    delta: float
    relation: str
    sought: str = "DP-SGD"
    remedy: str = "raise privacy.target_epsilon"

    def with_noise(self, noise_multiplier: float) -> tuple[Mechanism, ...]:
        """All that is released at this noise multiplier of DP-SGD."""
        return (*self.spent, (self.sample_rate, noise_multiplier, self.num_steps))

    def epsilon(self, noise_multiplier: float, discretization: float | None = None) -> float:
        """The total at this noise multiplier, by default on the quick grid."""
        mechanisms = self.with_noise(noise_multiplier)
        grid = discretization or quick_grid(mechanisms)
        return epsilon_of_mechanisms(mechanisms, self.delta, self.relation, grid)

    def refuse_too_little(self, budget: str = "") -> NoReturn:
        """Raises `InfeasibleError`: the target is too little for any noise that is solved for.

        Args:
            budget: what is too little, if that is not the target.
        """
        budget = budget or f"epsilon {upward(self.target_epsilon)}"
        left = f"the other releases leave too little of {budget} for {self.sought}"
        raise InfeasibleError(
            f"{left if self.spent else f'{budget} is too little for {self.sought}'}, whose noise "
            f"multiplier would exceed {MAX_NOISE_MULTIPLIER:g}: {self.remedy}"
        )

    def refuse_too_much(self) -> NoReturn:
        """Raises `InfeasibleError`: the target is too much for it."""
        raise InfeasibleError(
            f"epsilon {upward(self.target_epsilon)} is so large that the noise "
            f"multiplier of {self.sought} would fall below {MIN_NOISE_MULTIPLIER:g}, the least "
            "that is solved for: lower privacy.target_epsilon"
        )


def check_room(problem: Problem) -> None:
    """Whether the largest noise multiplier keeps the total within the target.

    Raises:
        InfeasibleError: it does not.
    """
    if problem.epsilon(MAX_NOISE_MULTIPLIER) > problem.target_epsilon:
        problem.refuse_too_little()


@lru_cache(maxsize=1024)
def solve_noise_multiplier(problem: Problem) -> tuple[float, float]:
    """Finds the smallest DP-SGD noise multiplier that keeps the total within the target.

    Returns:
        The noise multiplier, rounded up to four decimals, and the total epsilon it spends,
        evaluated at the fine discretisation and asserted to be within the target.

    Raises:
        InfeasibleError: no noise multiplier up to 10,000 keeps the total within the target.
    """
    from core.privacy.accounting.quick import quick_epsilon

    beyond = _beyond_pld(problem)
    if beyond is not None:
        return beyond, problem.epsilon(beyond, FINE)
    problem = replace(problem, target_epsilon=min(problem.target_epsilon, _END))
    target_epsilon = problem.target_epsilon

    def excess(noise_multiplier: float, part: float = 1.0) -> float:
        mechanisms = problem.with_noise(noise_multiplier)
        grid = 2 * quick_grid(mechanisms) * part  # Its error is removed below.
        epsilon = quick_epsilon(mechanisms, problem.delta, problem.relation, grid)
        return min(epsilon, 4 * LARGEST) - target_epsilon

    low, high = bracket(excess, problem)
    coarse = renyi.find_root(excess, low, high, rtol=2e-3)
    # The grid's error falls with its square, so that of a quarter of it is about a fifteenth of
    # the difference. One Newton step, then rounded up, and a proof on the finest grid.
    at_root, finer = excess(coarse), excess(coarse, 0.25)
    slope = (excess(1.005 * coarse) - at_root) / (0.005 * coarse)
    fine = coarse - (finer - (at_root - finer) / 15) / slope if slope < 0 else coarse
    noise_multiplier = rounded_up(fine if low < fine < high else coarse)
    while (epsilon := problem.epsilon(noise_multiplier, FINE)) > target_epsilon:
        step = (epsilon - target_epsilon) / -slope if slope < 0 else math.inf
        step = min(step, 0.02 * noise_multiplier)
        noise_multiplier = rounded_up(noise_multiplier * (1 + 1e-9) + step)
        if noise_multiplier > MAX_NOISE_MULTIPLIER:
            problem.refuse_too_little()
    return noise_multiplier, epsilon


def estimated_noise_multiplier(problem: Problem) -> float:
    """As `solve_noise_multiplier`, to about 0.3 % and in a tenth of its time: to show, not to use.

    Secants in logarithms, where epsilon is nearly a power of the noise multiplier: mostly one.

    Raises:
        InfeasibleError: the spent mechanisms leave too little.
    """
    from core.privacy.accounting.quick import quick_epsilon

    beyond = _beyond_pld(problem)
    if beyond is not None:
        return beyond
    problem = replace(problem, target_epsilon=min(problem.target_epsilon, _END))

    def excess(log_noise: float) -> float:
        mechanisms = problem.with_noise(math.exp(log_noise))
        grid = quick_grid(mechanisms)
        epsilon = quick_epsilon(mechanisms, problem.delta, problem.relation, grid)
        return math.log(max(epsilon, 1e-12) / problem.target_epsilon)

    one = math.log(0.94 * _guess(problem))
    at_one = excess(one)
    if abs(at_one) < 1e-9:
        return math.exp(one)
    # As if epsilon were inverse to the noise; at most halved, as little noise takes long.
    other = one + max(at_one, -math.log(2))
    for _ in range(_MOST_SECANTS if math.isfinite(at_one) else 0):  # Infinite: beyond PLD.
        at_other = excess(other)
        if math.isinf(at_other):
            other = (one + other) / 2
            continue
        slope = (at_other - at_one) / (other - one)
        if slope > -0.4:  # More noise hardly helps: the rest has spent nearly all.
            break
        found = other - min(at_other / slope, math.log(2))
        if abs(found - other) < 0.04:  # Where epsilon is a power, to the second order of this.
            return math.exp(found)
        one, at_one, other = other, at_other, found
    check_room(problem)
    return solve_noise_multiplier(problem)[0]


def bracket(excess: Callable[[float], float], problem: Problem) -> tuple[float, float]:
    """Interval that holds the root of `excess`; RDP, cheap, over-estimates it by 1-14 %.

    Raises:
        InfeasibleError: the root lies beyond the noise multipliers that are solved for.
    """
    guess = _guess(problem)
    low, high = 0.7 * guess, 1.01 * guess
    while excess(high) > 0:
        low, high = high, 2 * high
        if high > MAX_NOISE_MULTIPLIER:
            problem.refuse_too_little()
    while excess(low) < 0:
        low, high = low / 2, low
        if low < MIN_NOISE_MULTIPLIER:
            problem.refuse_too_much()
    return low, high


def _guess(problem: Problem) -> float:
    """The noise multiplier by Renyi DP for the zero-out relation; 1 where that finds none.

    Replacing a record moves a sum twice as far as leaving it out, and costs about twice.
    """
    try:
        found = _by_renyi(problem, 1e-3)
    except InfeasibleError:
        return 1.0
    return found if problem.relation == "zero_out" else 2 * found


def _beyond_pld(problem: Problem) -> float | None:
    """The noise multiplier by Renyi DP, rounded up; None where PLD solves for one.

    Above `LARGEST` Renyi DP may ask for more noise than PLD at that: then PLD solves, for less
    than the target.

    Raises:
        InfeasibleError: PLD does not reach the target, and Renyi DP is proven for another
            relation; or no noise multiplier up to 10,000 keeps the total within the target.
    """
    some = problem.with_noise(1.0)
    check_reach(problem.target_epsilon, some, problem.delta, problem.relation)
    too_fine = problem.delta < least_delta(some)
    if not too_fine and problem.target_epsilon <= LARGEST:
        return None
    found = rounded_up(_by_renyi(problem, 1e-9) * (1 + 1e-8))
    return found if too_fine or problem.epsilon(found) > LARGEST else None


def _by_renyi(problem: Problem, tolerance: float) -> float:
    """The noise multiplier at which Renyi DP gives the target, to a relative `tolerance`.

    Raises:
        InfeasibleError: there is none between the least and the largest that are solved for.
    """

    def excess(log_noise: float) -> float:
        mechanisms = problem.with_noise(math.exp(log_noise))
        return renyi.epsilon(mechanisms, problem.delta) - problem.target_epsilon

    low, high = math.log(MIN_NOISE_MULTIPLIER), math.log(MAX_NOISE_MULTIPLIER)
    if excess(high) > 0:
        problem.refuse_too_little()
    if excess(low) < 0:
        problem.refuse_too_much()
    return math.exp(renyi.find_root(excess, low, high, xtol=tolerance))


def rounded_up(noise_multiplier: float, digits: int | None = None) -> float:
    """To so many digits; by default to four decimals, or to four digits where those are fewer."""
    decimals = (digits or _DIGITS) - 1 - math.floor(math.log10(noise_multiplier))
    decimals = max(_DIGITS, decimals) if digits is None else decimals
    return round(math.ceil(noise_multiplier * 10**decimals) / 10**decimals, decimals)
