"""Shares: what one trial may release, of what the target epsilon covers with others."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, ClassVar

from core.config.scopes import COMPOSED
from core.privacy.accounting import renyi, solve
from core.privacy.accounting.mechanism import LARGEST, Mechanism
from core.privacy.accounting.rounding import upward

if TYPE_CHECKING:
    from core.privacy.accounting.profile import Profile
    from core.privacy.accounting.references import Reference

RELATION = "zero_out"
"""What the shares are proven for."""
_SLACK = 0.01
"""Part of the delta of a trial, delta / mean, that is added to the reference's profile."""
_CUT = 0.25
"""Part of the tail that a reference's own delta falls below at the last point of its profile."""
_COMPOSED_SLACK = 4e-4
"""Part of the delta of all that the tails of composed references have, and `_CUT` times more."""
_MANY = 1e9
_RATIOS = 32
"""Epsilons up to the target at which an attack on what has a privacy profile is bounded."""


class Share:
    """A bound on what one trial releases.

    Attributes:
        measure: what `used` is a part of, before "epsilon" and the target.
    """

    measure: ClassVar[str]

    @property
    def budget(self) -> str:
        """What messages call it."""
        return "the trial's share of the budget"

    @property
    def accountant(self) -> str:
        """What it is proven by, with the theorem."""
        raise NotImplementedError

    def used(self, mechanisms: Sequence[Mechanism]) -> float:
        """The part of the share that `mechanisms` take; at most 1 is allowed."""
        raise NotImplementedError

    def check_room(self, problem: solve.Problem) -> None:
        """Whether the largest noise multiplier keeps a trial within the share.

        Raises:
            InfeasibleError: it does not.
        """
        if self.used(problem.with_noise(solve.MAX_NOISE_MULTIPLIER)) > 1:
            problem.refuse_too_little(self.budget)

    def solve_noise_multiplier(self, problem: solve.Problem) -> float:
        """The smallest DP-SGD noise multiplier within the share, rounded up to four decimals.

        Args:
            problem: of one trial; its target, delta and relation are those of the share.

        Raises:
            InfeasibleError: none up to 10,000 is.
        """

        @cache
        def excess(noise_multiplier: float) -> float:
            return math.log(min(self.used(problem.with_noise(noise_multiplier)), _MANY))

        self.check_room(problem)
        low, high = solve.bracket(excess, problem)
        found = renyi.find_root(excess, low, high, xtol=1e-9, rtol=1e-8)
        noise_multiplier = solve.rounded_up(found * (1 - 1e-7))  # A reference may be just above it.
        while excess(noise_multiplier) > 0:
            noise_multiplier = solve.rounded_up(noise_multiplier * (1 + 1e-6))
        return noise_multiplier


@dataclass(frozen=True)
class RenyiShare(Share):
    """At each of `orders`, at most the divergence of a Gaussian mechanism whose sensitivity is
    `mu` standard deviations.
    """

    measure = "the trial's share of"
    orders: tuple[int, ...]
    mu: float
    theorem: str

    @property
    def accountant(self) -> str:
        """As of `Share`."""
        return f"Renyi DP at order {' and '.join(map(str, self.orders))} ({self.theorem})"

    def used(self, mechanisms: Sequence[Mechanism]) -> float:
        """As of `Share`."""
        return max(
            renyi.divergence(mechanisms, order) / (order * self.mu**2 / 2) for order in self.orders
        )


class ProfileShare(Share):
    """At every epsilon and in both directions, at most the delta of `reference`, fixed beforehand;
    without one, what all that the target covers may spend if each trial releases the same.

    With probability `tail` the reference gives the record away: so the far tail of a trial may be
    heavier than its own.
    """

    reference: tuple[Mechanism, ...]
    epsilon: float
    delta: float

    @property
    def tail(self) -> float:
        """See above."""
        raise NotImplementedError

    @property
    def step(self) -> float | None:
        """Grid on which a trial is compared with the reference; None: that of the reference."""
        return None

    @property
    def largest(self) -> tuple[Mechanism, ...]:
        """What each trial that has this share releases at most: a reference of `delta_of_all`."""
        return self.reference

    def delta_of_all(self, alike: tuple[Mechanism, ...], epsilon: float) -> float:
        """Delta at `epsilon`, at most, if each trial that has this share releases `alike`."""
        raise NotImplementedError

    def members_found(self, false_alarms: float) -> float:
        """Largest share of members that any attack on all of it finds: see `tradeoff`."""
        epsilons = [self.epsilon * part / _RATIOS for part in range(_RATIOS + 1)]
        return min(
            math.exp(epsilon) * false_alarms + self.delta_of_all(self.largest, epsilon)
            for epsilon in epsilons
        )

    def used(self, mechanisms: Sequence[Mechanism]) -> float:
        """As of `Share`."""
        from core.privacy.accounting import profile

        composed = tuple(mechanisms)
        if renyi.epsilon(composed, self.delta) > 2 * LARGEST:
            return math.inf
        if not self.reference:
            return self.delta_of_all(composed, self.epsilon) / self.delta
        step, bound = _bound(self.reference, self.tail, self.step)
        deltas = profile.profile(composed, RELATION, step, bound.shape[1])
        return float((deltas / bound).max())


@dataclass(frozen=True)
class SelectionShare(ProfileShare):
    """Of a trial of which the best of a secret number leaves."""

    measure = "the delta that selecting the best leaves each trial of"
    epsilon: float
    delta: float
    law: str
    mean: float
    reference: tuple[Mechanism, ...] = ()

    @property
    def accountant(self) -> str:
        """As of `Share`."""
        return (
            "PLD of the best of a secret number of trials, each bounded by one privacy profile, as "
            "proven in core/privacy/accounting/selection.py"
        )

    @property
    def budget(self) -> str:
        """As of `Share`."""
        if not self.reference:
            return f"epsilon {upward(self.epsilon)}"
        return "the privacy profile that bounds every trial of the selection"

    @property
    def tail(self) -> float:
        """As of `ProfileShare`."""
        return _SLACK * self.delta / self.mean

    def delta_of_all(self, alike: tuple[Mechanism, ...], epsilon: float) -> float:
        """As of `ProfileShare`."""
        from core.privacy.accounting import selection

        step, bound = _bound(alike, self.tail)
        phi = selection.derivative(self.law, self.mean)
        return selection.selection_delta(bound, step, epsilon, phi)


class ComposedShare(ProfileShare):
    """Of one of several trials whose references are composed; see `accounting.references`."""

    measure = "the delta that its privacy profile leaves a trial of"

    @property
    def place(self) -> int:
        """Which of the references is its own."""
        raise NotImplementedError

    def references(self, largest: tuple[Mechanism, ...]) -> tuple["Reference", ...]:
        """Those of all trials together, if what `largest` is for has this one."""
        raise NotImplementedError

    @property
    def accountant(self) -> str:
        """As of `Share`."""
        return (
            "PLD of one privacy profile for each trial, which bounds it and was fixed beforehand "
            f"({COMPOSED}), as in core/privacy/accounting/references.py"
        )

    @property
    def tail(self) -> float:
        """As of `ProfileShare`: trials that share a reference share an equal part of the whole."""
        found = self.references(self.largest)
        return _COMPOSED_SLACK / len(found) * self.delta / found[self.place][1]

    @property
    def step(self) -> float:
        """As of `ProfileShare`."""
        from core.privacy.accounting import references

        return references.grids(self.references(self.largest))[self.place]

    def delta_of_all(self, alike: tuple[Mechanism, ...], epsilon: float) -> float:
        """As of `ProfileShare`."""
        from core.privacy.accounting import references

        composed = references.composed_delta(self.references(alike), RELATION, epsilon)
        # Past the last point a trial may keep its delta there, while that of the pair falls.
        return composed + (1 + _CUT) * _COMPOSED_SLACK * self.delta


@dataclass(frozen=True)
class SweepShare(ComposedShare):
    """Of one of `trials`, which all have the same reference."""

    epsilon: float
    delta: float
    trials: int
    reference: tuple[Mechanism, ...] = ()

    @property
    def place(self) -> int:
        """As of `ComposedShare`."""
        return 0

    @property
    def budget(self) -> str:
        """As of `Share`."""
        if not self.reference:
            return f"epsilon {upward(self.epsilon)} of {self.trials} trials"
        return "the privacy profile that bounds every trial of the sweep"

    def references(self, largest: tuple[Mechanism, ...]) -> tuple["Reference", ...]:
        """As of `ComposedShare`."""
        return ((largest, self.trials),)


@dataclass(frozen=True)
class TuningShare(ComposedShare):
    """Of one of the tuning `trials`, which all have the reference `tuning`, or of the final run,
    whose own is `final`.
    """

    epsilon: float
    delta: float
    trials: int
    tuning: tuple[Mechanism, ...]
    final: tuple[Mechanism, ...] = ()
    is_final: bool = True
    reference: tuple[Mechanism, ...] = ()

    @property
    def budget(self) -> str:
        """As of `Share`."""
        if not self.reference:
            return f"epsilon {upward(self.epsilon)} beside {self.trials} tuning trials"
        which = "the final run" if self.is_final else "every tuning trial"
        return f"the privacy profile that bounds {which}"

    @property
    def place(self) -> int:
        """As of `ComposedShare`."""
        return int(self.is_final)

    @property
    def largest(self) -> tuple[Mechanism, ...]:
        """As of `ProfileShare`."""
        return self.final

    def references(self, largest: tuple[Mechanism, ...]) -> tuple["Reference", ...]:
        """As of `ComposedShare`."""
        return (self.tuning, self.trials), (largest, 1)


@lru_cache(maxsize=8)
def _bound(
    reference: tuple[Mechanism, ...], tail: float, step: float | None = None
) -> tuple[float, "Profile"]:
    """Grid and profile of `reference`, with the tail added, where it is more than that."""
    from core.privacy.accounting import profile

    step = step or profile.profile_step(reference)
    deltas = profile.profile(reference, RELATION, step)
    points = 1 + int((deltas > _CUT * tail).any(axis=0).sum())
    deltas = deltas[:, : max(2, points)]
    return step, deltas + tail * (1 - deltas)
