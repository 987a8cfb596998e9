"""Epsilon and delta of what a ledger's charges release together."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from core.privacy.accounting import solve
from core.privacy.accounting.mechanism import (
    COARSE,
    FEW,
    FINE,
    LARGEST,
    Mechanism,
    discretization_for,
    fitting_grid,
    grouped,
    least_delta,
)
from core.privacy.ledger.book import Book, Charge
from core.privacy.ledger.terms import Event, Terms
from core.privacy.plan.budget import RunBudget

_QUICK_ERROR = 1e-5
"""More than what figures that are not of record may be too small by."""


@dataclass(frozen=True)
class Totals:
    """The accountant of one ledger: at its delta, of its neighbouring relation."""

    terms: Terms

    def within(self, budget: RunBudget, charges: Sequence[Charge]) -> float:
        """Epsilon of trials that share a budget, as that adds up."""
        executed = _mechanisms(event for charge in charges for event in charge.counted)
        reserved = _mechanisms(event for charge in charges for event in charge.reserved)
        return budget.total(executed, reserved, self.terms.delta, self.terms.neighboring_relation)

    def together(
        self, book: Book, part: Callable[[Charge], tuple[Event, ...]], grid: float
    ) -> tuple[float, float]:
        """Epsilon and delta of all releases together, of the `part` of each charge that counts.

        Privacy: what is charged by its mechanisms is composed by PLD at the ledger's delta. A
            selection, of which nothing but the best trial leaves, or a run whose trials have
            references, is (target, delta)-private as a whole, and its epsilon and delta are added
            (basic composition, Dwork et al. 2006, valid for adaptive choices too): the sum of both
            deltas bounds what exceeds the sum of both epsilons, whatever the number of its trials
            was.
        """
        events = [event for charge in book.apart for event in part(charge)]
        targets = book.targets(part)
        count = max(1, bool(events) + len(targets))
        delta = float(count * Decimal(repr(self.terms.delta)))  # 3e-05, not 3.0000000000000004e-05.
        return self.epsilon(events, grid) + sum(targets), delta

    def members_found(
        self, events: Sequence[Event], targets: Sequence[float], false_alarms: float
    ) -> float:
        """Largest share of members that an attack on `events` and selections together finds.

        With all sums over the selections of targets e and deltas d, H of `tradeoff` for both is at
        exp(e) t at most H(t) + d: but for d, what a selection gives is at most exp(e) times as
        probable with the record, and what the events then give t times, but for H(t).
        """
        from core.privacy.accounting import tradeoff  # Loads the accountant, which takes a second.

        alarms = min(1.0, math.exp(min(sum(targets), 700.0)) * false_alarms)
        found = tradeoff.members_found(_mechanisms(events), self.terms.neighboring_relation, alarms)
        return min(1.0, found + len(targets) * self.terms.delta)

    def admitted(self, book: Book, grid: float, kept: Path) -> tuple[float, str]:
        """Epsilon of all that counts, as of `together`, and what composes it, in words.

        Args:
            kept: file of the composition of what was settled, so that of many mechanisms only
                those that are open are composed now.
        """
        counted = [event for charge in book.apart for event in charge.counted]
        mechanisms, delta = _mechanisms(counted), self.terms.delta
        scale, relation = self._scale(mechanisms), self.terms.neighboring_relation
        if scale is not None and delta >= least_delta(mechanisms):
            from core.privacy.accounting.kept import epsilon_beside

            closed = [charge for charge in book.apart if not charge.open]
            settled = _mechanisms(event for charge in closed for event in charge.counted)
            fine = fitting_grid(mechanisms, grid, scale)
            epsilon = epsilon_beside(kept, settled, mechanisms, delta, relation, fine)
            if epsilon <= LARGEST:
                named = solve.accountant_of(epsilon, mechanisms, delta, relation, grid, scale)
                return epsilon + sum(book.targets(lambda charge: charge.counted)), named
        total, _ = self.together(book, lambda charge: charge.counted, grid)
        return total, self.accountant(counted, grid)

    def largest(self, plans: Iterable[tuple[Event, ...]]) -> float:
        """The largest epsilon that one of the plans spends alone; 0 without any."""
        quick = {plan: self.epsilon(plan, FINE, of_record=False) for plan in plans}
        # Of record, which takes seconds, only what may be the largest.
        near = [plan for plan in quick if quick[plan] > max(quick.values()) - _QUICK_ERROR]
        return max((self.epsilon(plan, FINE) for plan in near), default=0.0)

    def discretization(self, events: Iterable[Event]) -> float:
        """The grid of the accountant that suits all figures of these events."""
        scale = self.terms.budget or self.epsilon(events, COARSE)
        return discretization_for(_mechanisms(events), scale)

    def epsilon(
        self, events: Iterable[Event], discretization: float, of_record: bool = True
    ) -> float:
        """Their composition at the ledger's delta; not of record to about 2e-6."""
        mechanisms = _mechanisms(events)
        delta, relation = self.terms.delta, self.terms.neighboring_relation
        return solve.epsilon_of_mechanisms(
            mechanisms, delta, relation, discretization, of_record, self._scale(mechanisms)
        )

    def accountant(self, events: Iterable[Event], discretization: float) -> str:
        """What composes them, in words."""
        delta, relation = self.terms.delta, self.terms.neighboring_relation
        epsilon, mechanisms = self.epsilon(events, discretization), _mechanisms(events)
        scale = self._scale(mechanisms)
        return solve.accountant_of(epsilon, mechanisms, delta, relation, discretization, scale)

    def _scale(self, mechanisms: tuple[Mechanism, ...]) -> float | None:
        """The budget, where many mechanisms are composed: it never changes, nor does the grid."""
        budget = self.terms.budget
        return budget if budget and budget < LARGEST and len(mechanisms) > FEW else None


def _mechanisms(events: Iterable[Event]) -> tuple[Mechanism, ...]:
    """The only way from a ledger's plain data to what the accountant composes.

    Privacy: what several trials have from one release counts once, as later uses of it are
        post-processing.
    """
    once: dict[tuple[str, Event | int], Event] = {}
    for number, event in enumerate(events):
        once[(event.release, event) if event.release else ("", number)] = event
    return grouped((e.sample_rate, e.noise_multiplier, e.count) for e in once.values())
