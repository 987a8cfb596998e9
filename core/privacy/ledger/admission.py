"""Admission of reservations: refusal of malformed requests and of what a budget cannot pay."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from core.errors import InfeasibleError, LedgerError
from core.privacy.accounting.rounding import upward
from core.privacy.ledger.book import UNBOUNDED, Book, Charge, Reservation
from core.privacy.ledger.terms import require
from core.privacy.ledger.totals import Totals
from core.privacy.plan.budget import RunBudget


class BudgetExceededError(InfeasibleError):
    """The data set's budget cannot pay for a reservation; the ledger is unchanged."""


def check_request(asked: Reservation) -> None:
    """Refuses what is no plan of one key."""
    key, counts = asked.key, [e.count for e in asked.events if e.kind == "dp_sgd"]
    require(bool(asked.events), "events", asked.events, "at least one event")
    require(len(counts) <= 1, "events of kind dp_sgd", len(counts), "at most one")
    require(key.first_step >= 0, "first_step", key.first_step, "at least 0")
    steps = key.end_step - key.first_step
    require(steps == sum(counts), "steps of the key", steps, f"the DP-SGD count {sum(counts)}")


def check_run(totals: Totals, book: Book, asked: Reservation, within: RunBudget | None) -> None:
    """Refuses what the budget that the run's trials share cannot pay."""
    run = asked.key.run
    charges = book.of_run(run)
    for charge in charges:
        if charge.within != within:
            raise LedgerError(
                f"run {run} was begun within {charge.within}, not {within}, which never "
                "changes: restore privacy.scope, its settings and the sweep's folder, or "
                "choose another name"
            )
    if (noted := book.selected.get(run)) is not None:
        raise LedgerError(selected_before(run, noted))
    if within is None or within.selection:
        return
    if within.tuning_trials:
        _check_number(book, asked, within)
        return
    before = [key.run for key, charge in book.charges.items() if charge.counted]
    if within.alone and (others := {*before} - {run}):
        raise BudgetExceededError(
            f"the data was used by {len(others)} other runs, such as {min(others)}: scope "
            "public claims that its one run is the only one; choose scope trial, whose card "
            "says what all come to"
        )
    others = [book.charges[key] for key in book.charges if key.run == run and key != asked.key]
    total = totals.within(within, [*others, Charge(asked.events, "", "")])
    if total > within.epsilon * (1 + 1e-9):
        raise BudgetExceededError(
            f"trial {asked.key.trial[:16]} would bring run {run} to epsilon "
            f"{upward(total, 6)} of its budget {upward(within.epsilon, 6)}, of which "
            f"{len(others)} trials have {upward(totals.within(within, others), 6)}: it "
            "pays for privacy.num_shares trials, which were set before the first (scope "
            "public: for one)"
        )


def _check_number(book: Book, asked: Reservation, within: RunBudget) -> None:
    """Refuses more trials than have references, which bound each and pay for all together."""
    key, trials = asked.key, within.tuning_trials
    most, paid = {"all": trials}, f"{trials} trials"
    if within.has_final_run:
        most, paid = {"tuning": trials, "final run": 1}, f"{trials} tuning trials and one final run"
    of_run = [(k, charge) for k, charge in book.charges.items() if k.run == key.run and k != key]
    others = sum(k.stage == key.stage and bool(charge.counted) for k, charge in of_run)
    if others >= most.get(key.stage, 0):
        raise BudgetExceededError(
            f"trial {key.trial[:16]} would be number {others + 1} of stage {key.stage!r} of run "
            f"{key.run}, whose budget pays for {paid}: they were fixed before the first by "
            "privacy.num_shares"
        )


def admit(
    totals: Totals, book: Book, asked: Reservation, within: RunBudget | None, kept: Path
) -> dict[str, Any]:
    """The new total and its accountant, for the record; None where no budget asks for it.

    Args:
        kept: file of the composition of what was settled.

    Privacy: a selection and trials with references are charged whole, with the first. Later ones
        are never refused; of a selection that would bound their secret number, and no figure
        depends on it.
    """
    budget = totals.terms.budget
    if budget is None:
        return {"epsilon_after": None, "accountant": None}
    others = replace(book, charges={k: c for k, c in book.charges.items() if k != asked.key})
    new = {asked.key: Charge(asked.events, "", "", within)}
    after = replace(book, charges=others.charges | new)
    apart = [event for charge in after.apart for event in charge.counted]
    grid = totals.discretization(apart)

    def counted(part: Book) -> float:
        return totals.admitted(part, grid, kept)[0]

    total, accountant = totals.admitted(after, grid, kept)
    paid = (
        within is not None
        and within.is_one_release
        and any(charge.counted for charge in others.of_run(asked.key.run))
    )
    if paid or total <= budget:
        return {"epsilon_after": total, "accountant": accountant}
    raise BudgetExceededError(
        f"reserving epsilon {upward(counted(replace(book, charges=new)), 6)} for {asked.key} "
        f"would bring its data set to {upward(total, 6)} of its budget {upward(budget, 6)} "
        f"(spent or reserved {upward(counted(others), 6)}): plan fewer steps, more noise or "
        f"fewer trials, as a budget is never raised{f'.{UNBOUNDED}' if total == math.inf else ''}"
    )


def selected_before(run: str, noted: str) -> str:
    """Why no other trial of a selection may leave."""
    return (
        f"selection {run} has ended with trial {noted[:16]}, the only one of it that may leave: "
        "release that, or choose another name for another selection"
    )
