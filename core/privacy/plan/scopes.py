"""Scopes: what the target epsilon covers beyond one trial, and the share of one trial.

`trial`: each trial spends the target. `public`: likewise, by the only run on the data. `sweep`: all
trials together. `selection`: the best of a secret number of trials. Under the last two a trial's
share is that of a Gaussian mechanism, at one or two orders of Renyi DP: whatever the trials
release, the sum over them (`sweep`) or the largest of them (`selection`) keeps its bound.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from core.config import Config, PrivacyConfig
from core.errors import InfeasibleError
from core.privacy.accounting import renyi, solve
from core.privacy.accounting.mechanism import Mechanism, discretization_for, grouped
from core.privacy.accounting.rounding import upward

STAYS_INSIDE = (
    "For the owner of the data alone, to stay inside: this tells of a selection's trials, whose "
    "number must be secret for its guarantee to hold."
)
"""Stands above whatever gives the number of a selection's trials away."""


@dataclass(frozen=True)
class Share:
    """A bound on what one trial releases: at each of `orders`, at most the divergence of a
    Gaussian mechanism whose sensitivity is `mu` standard deviations.
    """

    orders: tuple[int, ...]
    mu: float

    def used(self, mechanisms: Sequence[Mechanism]) -> float:
        """The part of the share that `mechanisms` take; at most 1 is allowed."""
        return max(
            renyi.divergence(mechanisms, order) / (order * self.mu**2 / 2) for order in self.orders
        )

    def solve_noise_multiplier(self, problem: solve.Problem) -> float:
        """The smallest DP-SGD noise multiplier within the share, rounded up to four decimals.

        Args:
            problem: of one trial; its target, delta and relation are those of the share.

        Raises:
            InfeasibleError: none up to 10,000 is.
        """

        def excess(noise_multiplier: float) -> float:
            return self.used(problem.with_noise(noise_multiplier)) - 1

        if excess(solve.MAX_NOISE_MULTIPLIER) > 0:
            raise InfeasibleError(
                solve.too_little("the trial's share of the budget", problem.spent)
            )
        low, high = solve.MIN_NOISE_MULTIPLIER, solve.MAX_NOISE_MULTIPLIER
        if excess(low) < 0:
            raise InfeasibleError(solve.too_much("the trial's share of the budget"))
        found = renyi.find_root(excess, low, high, xtol=1e-9, rtol=1e-8)
        noise_multiplier = solve.rounded_up(found)
        while excess(noise_multiplier) > 0:
            noise_multiplier = solve.rounded_up(noise_multiplier * (1 + 1e-6))
        return noise_multiplier


def share_of(privacy: PrivacyConfig) -> Share | None:
    """The share of one trial; None where PLD composes what was fixed beforehand.

    Both depend on public numbers alone, so all trials of a sweep have the same.

    Raises:
        InfeasibleError: the bound itself takes the whole target.
    """
    if not privacy.needs_filter:
        return None
    return _selection_share(privacy) if privacy.covers.is_secret else _filter_share(privacy)


def _filter_share(privacy: PrivacyConfig) -> Share:
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
    return Share((order,), math.sqrt(2 * room / order / privacy.num_shares))


def _selection_share(privacy: PrivacyConfig) -> Share:
    """The pair of orders that leaves a Gaussian mechanism the most room; see `renyi`."""
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
    return Share(orders, math.sqrt(mu_squared(*orders)))


@dataclass(frozen=True)
class RunBudget:
    """What all trials of one run may spend together, or of a selection what its one release is.

    Attributes:
        epsilon: the target.
        adaptive: whether the noise of a trial may depend on results of others. If so, what was
            executed is added up by the filter at one fixed order; if not, all that was ever
            reserved is composed by PLD, as the theorem covers no stopping by results.
        alone: whether no other run may have used the data before.
        selection: identity of the selection that the run is; empty under the other scopes. Its
            trials together are one (epsilon, delta)-private release and have no budget.
    """

    epsilon: float
    adaptive: bool
    alone: bool = False
    selection: str = ""

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
