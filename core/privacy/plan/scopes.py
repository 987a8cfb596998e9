"""Scopes: what the target epsilon covers beyond one trial, and the share of one trial.

`trial`: each trial spends the target. `public`: likewise, by the only run on the data. `sweep`: all
trials together; where they learn from results, each stays below one privacy profile, fixed
beforehand, or has a share at one order of Renyi DP, whose sum keeps the bound whatever they
release. `tune_then_train`: tuning trials and one final run, each below a privacy profile of its
own. `selection`: the best of a secret number of trials; all stay below one privacy profile.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import TYPE_CHECKING, ClassVar

from core.config import Config, PrivacyConfig
from core.config.privacy import mechanisms_of
from core.config.scopes import COMPOSED
from core.errors import ConfigError, InfeasibleError
from core.privacy.accounting import renyi, solve
from core.privacy.accounting.mechanism import LARGEST, Mechanism, discretization_for, grouped
from core.privacy.accounting.rounding import upward

if TYPE_CHECKING:
    from core.privacy.accounting.profile import Profile
    from core.privacy.accounting.references import Reference

RELATION = "zero_out"
"""What the shares are proven for."""
_SLACK = 0.01
"""Part of the delta of a trial, delta / mean, that is added to the reference's profile."""
_LEAST_DELTA = 1e-9
"""Smaller ones of a trial are too close to the error of PLD's transforms."""
_CUT = 0.25
"""Part of the tail that a reference's own delta falls below at the last point of its profile."""
_COMPOSED_SLACK = 4e-4
"""Part of the delta of all that the tails of composed references have, and `_CUT` times more."""
_LEAST_COMPOSED_DELTA = 4e-9
"""Smaller ones of a trial are too close to the error of PLD's transforms."""
_MANY = 1e9
_LARGEST_EXPONENT = 700.0
_RATIOS = 32
"""Epsilons up to the target at which an attack on what has a privacy profile is bounded."""
_ROUNDING = 1e-6
"""By how much another version's accountant may find another delta for a reference."""
STAYS_INSIDE = (
    "For the owner of the data alone, to stay inside: this tells of a selection's trials, whose "
    "number must be secret for its guarantee to hold."
)
"""Stands above whatever gives the number of a selection's trials away."""


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


def share_of(privacy: PrivacyConfig) -> Share | None:
    """The share of one trial; None where PLD composes what was fixed beforehand.

    It depends on public numbers alone, so all trials of a sweep have the same; of a selection once
    the sweep has fixed `selection_reference`.

    Raises:
        InfeasibleError: the bound itself takes the whole target, or the reference exceeds it.
    """
    if not privacy.has_shares:
        return None
    if privacy.covers.tunes_first:
        return _tuning_share(privacy)
    if privacy.covers.splits_target:
        return _sweep_share(privacy) if privacy.tuning_reference else filter_share(privacy)
    if not has_profile(privacy):
        return _selection_share(privacy)
    alike = SelectionShare(
        _within_pld(privacy), privacy.target_delta, privacy.selection_law, privacy.selection_mean
    )
    reference = mechanisms_of(privacy.selection_reference)
    return _bounded(alike, reference, "selection_reference", replace(alike, reference=reference))


def _within_pld(privacy: PrivacyConfig) -> float:
    return min(privacy.target_epsilon, LARGEST / 2)


def alike_share(privacy: PrivacyConfig) -> SweepShare | None:
    """The share of a sweep's trial if all release the same, from which a reference follows; None
    where PLD does not reach.
    """
    delta, trials = privacy.target_delta, privacy.num_shares
    if delta / trials < _LEAST_COMPOSED_DELTA:
        return None
    return SweepShare(_within_pld(privacy), delta, trials)


def _sweep_share(privacy: PrivacyConfig) -> ProfileShare:
    """The share of a trial below the one reference of a sweep; see `SweepShare`."""
    alike, reference = alike_share(privacy), mechanisms_of(privacy.tuning_reference)
    if alike is None:
        raise InfeasibleError(
            f"privacy.tuning_reference cannot bound {privacy.num_shares} trials at "
            f"privacy.target_delta={upward(privacy.target_delta, 6)}, where PLD ends: leave it out"
        )
    return _bounded(alike, reference, "tuning_reference", replace(alike, reference=reference))


def _tuning_share(privacy: PrivacyConfig) -> ProfileShare:
    """The share of a tuning trial or of the final run; see `TuningShare`."""
    delta, trials = privacy.target_delta, privacy.num_shares
    if delta / trials < _LEAST_COMPOSED_DELTA:
        raise InfeasibleError(
            f"privacy.target_delta={upward(delta, 6)} is below {_LEAST_COMPOSED_DELTA * trials:g}, "
            f"where PLD proves {trials} tuning trials and a final run: raise it, or choose "
            "another privacy.scope"
        )
    tuning, final = map(mechanisms_of, (privacy.tuning_reference, privacy.final_reference))
    if not tuning:
        raise ConfigError(
            f"privacy.scope={privacy.scope!r} needs trials before its final run: start a sweep, "
            "which solves for privacy.tuning_reference"
        )
    if not final and not privacy.is_final_run:
        raise ConfigError(
            "a tuning trial needs privacy.final_reference, which leaves it its share: start a "
            "sweep, which solves for it"
        )
    alike = TuningShare(_within_pld(privacy), delta, trials, tuning)
    last = privacy.is_final_run
    bounded = replace(alike, final=final, is_final=last, reference=final if last else tuning)
    return _bounded(alike, final, "final_reference", bounded)


def _bounded(
    alike: ProfileShare, reference: tuple[Mechanism, ...], key: str, bounded: ProfileShare
) -> ProfileShare:
    """What bounds a trial by a reference, if there is one; it must itself be within the target."""
    if not reference:
        return alike
    if (used := _used(alike, reference)) > 1 + _ROUNDING:
        raise InfeasibleError(
            f"what trials like privacy.{key} release has {used:.4g} times the delta "
            f"{upward(alike.delta, 6)} at epsilon {upward(alike.epsilon)}: leave the reference to "
            "the sweep, which solves for it"
        )
    return bounded


@lru_cache(maxsize=8)
def _used(share: ProfileShare, reference: tuple[Mechanism, ...]) -> float:
    return share.used(reference)


def members_found(privacy: PrivacyConfig, false_alarms: float) -> float:
    """Largest share of members that any attack finds on all trials that the target covers.

    Where privacy profiles bound the trials it is that of these. Under the filter's order a,
    at which the divergence is at most r, it is (exp(r) false_alarms)^(1 - 1/a) (Mironov 2017,
    proposition 10). All are at most what the target's epsilon and delta say, and where trials have
    no shares it is that.

    Args:
        false_alarms: share of non-members that it is wrong about, in [0, 1].
    """
    epsilon, delta, share = privacy.target_epsilon, privacy.target_delta, share_of(privacy)
    bounds = [1.0, math.exp(min(epsilon, _LARGEST_EXPONENT)) * false_alarms + delta]
    if isinstance(share, ProfileShare) and share.reference:
        bounds.append(share.members_found(false_alarms))
    elif share is not None and privacy.covers.splits_target:
        order = renyi.best_order(epsilon, delta)
        exponent = min(epsilon - renyi.offset(order, delta), _LARGEST_EXPONENT)
        bounds.append((math.exp(exponent) * false_alarms) ** (1 - 1 / order))
    return min(bounds)


def has_profile(privacy: PrivacyConfig) -> bool:
    """Whether a selection's bound is that of privacy profiles, as far as PLD is exact.

    Below, at deltas under 1e-9 times the mean number of trials, it is that of Renyi DP. Above
    epsilon 300 the profiles spend 300.
    """
    return (
        privacy.covers.is_secret and privacy.target_delta / privacy.selection_mean >= _LEAST_DELTA
    )


def filter_share(privacy: PrivacyConfig) -> RenyiShare:
    """One of `num_shares` parts of what a filter at the best order leaves."""
    epsilon, delta = privacy.target_epsilon, privacy.target_delta
    order = renyi.best_order(epsilon, delta)
    room = epsilon - renyi.offset(order, delta)
    if room <= 0:
        raise InfeasibleError(
            f"at delta {upward(delta, 6)} the bound on adaptively chosen trials takes all of "
            f"epsilon {upward(epsilon)}: raise privacy.target_epsilon or privacy.target_delta, "
            "or search with sampler=random or grid"
        )
    return RenyiShare(
        (order,), math.sqrt(2 * room / order / privacy.num_shares), privacy.covers.theorem
    )


def _selection_share(privacy: PrivacyConfig) -> RenyiShare:
    """The pair of orders that leaves a Gaussian mechanism the most room; see `renyi`.

    Whatever the trials release, the largest of them keeps the bound.
    """
    shape = renyi.SHAPES[privacy.selection_law]
    mean, delta = privacy.selection_mean, privacy.target_delta

    def mu_squared(first: int, second: int) -> float:
        taken = renyi.selection_epsilon(
            (0.0, 0.0), (first, second), privacy.selection_law, mean, delta
        )
        return 2 * (privacy.target_epsilon - taken) / (first + (1 + shape) * (second - 1))

    pairs = [(one, other) for one in renyi.ORDERS for other in renyi.ORDERS]
    orders = max(pairs, key=lambda pair: mu_squared(*pair))
    if mu_squared(*orders) <= 0:
        raise InfeasibleError(
            f"selecting among {mean:g} trials on average takes all of epsilon "
            f"{upward(privacy.target_epsilon)}: raise privacy.target_epsilon or lower "
            "privacy.selection_mean"
        )
    return RenyiShare(orders, math.sqrt(mu_squared(*orders)), privacy.covers.theorem)


@dataclass(frozen=True)
class RunBudget:
    """What all trials of one run may spend together, or of a selection what its one release is.

    Attributes:
        epsilon: the target.
        adaptive: whether the noise of a trial may depend on results of others. If so, what was
            executed is added up by the filter at one fixed order; if not, all that was ever
            reserved is composed by PLD, as the theorem covers no stopping by results; where
            references bound the trials the whole target counts from the first one on.
        alone: whether no other run may have used the data before.
        selection: identity of the selection that the run is; empty under the other scopes. Its
            trials together are one (epsilon, delta)-private release and have no budget.
        tuning_trials: how many trials have a reference, the final run aside; 0 where none has.
        references: of these trials and of the final run, in words.
        has_final_run: whether one comes beside these trials.
    """

    epsilon: float
    adaptive: bool
    alone: bool = False
    selection: str = ""
    tuning_trials: int = 0
    references: str = ""
    has_final_run: bool = True

    @property
    def is_one_release(self) -> bool:
        """Whether its trials are charged as a whole with the first of them."""
        return bool(self.selection or self.tuning_trials)

    def total(
        self,
        executed: Sequence[Mechanism],
        reserved: Sequence[Mechanism],
        delta: float,
        relation: str,
    ) -> float:
        """Epsilon of the sweep.

        Args:
            executed: what counts: executed steps of trials that ended, all of those that run.
            reserved: the same with all steps that were ever reserved.
        """
        if self.tuning_trials:
            return self.epsilon if reserved else 0.0
        if not self.adaptive:
            mechanisms = grouped(reserved)
            grid = discretization_for(mechanisms, self.epsilon)
            return solve.epsilon_of_mechanisms(mechanisms, delta, relation, grid)
        order = renyi.best_order(self.epsilon, delta)
        return renyi.divergence(executed, order) + renyi.offset(order, delta)


def run_budget(config: Config, selection: str = "") -> RunBudget | None:
    """The budget of a run; None under scope `trial`, which caps each trial alone.

    The one run that `public` allows has no second trial to adapt, and no run before it; its search
    on public data has no budget.

    Args:
        selection: identity of the sweep's release, under scope `selection`.
    """
    privacy = config.privacy
    if privacy.covers.is_secret:
        return RunBudget(privacy.target_epsilon, adaptive=False, selection=selection)
    last = privacy.covers.tunes_first
    if last or (privacy.has_shares and privacy.tuning_reference):
        references = f"tuning {list(privacy.tuning_reference)}"
        references += f", final {list(privacy.final_reference)}" if last else ""
        return RunBudget(
            privacy.target_epsilon,
            adaptive=True,
            tuning_trials=privacy.num_shares,
            references=references,
            has_final_run=last,
        )
    if privacy.covers.splits_target:
        return RunBudget(privacy.target_epsilon, privacy.adaptive)
    if privacy.covers.chosen_on_public_data and not config.dataset.public:
        return RunBudget(privacy.target_epsilon, adaptive=False, alone=True)
    return None


def num_trials_at(uniform: float, law: str, mean: float) -> int:
    """The number of trials, at least 1, at a quantile of Papernot and Steinke's (2022) law.

    Args:
        uniform: quantile in (0, 1); drawn from a secret stream, it gives the secret number.
        law: `geometric` or `logarithmic`.
        mean: of the law, above 1.

    Privacy: the number must stay secret, as the guarantee rests on its being random.
    """
    gamma = renyi.halting_probability(law, mean)
    if law == "geometric":
        return 1 + math.floor(math.log1p(-uniform) / math.log1p(-gamma))
    number, weight, below = 1, (1 - gamma) / -math.log(gamma), 0.0
    while below + weight <= uniform:
        below += weight
        weight *= (1 - gamma) * number / (number + 1)
        number += 1
        if weight < 1e-18:  # Past all 53 bits of the quantile.
            break
    return number
