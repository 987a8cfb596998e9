"""The privacy ledger of one data set: every release is reserved before it and settled after it.

What is not reserved may not run; a reservation counts in full until it is settled; the budget, if
there is one, bounds everything that counts. Charges are composed by PLD, or where that ends by
Renyi DP, with equal mechanisms grouped, an upper bound at any discretisation. `ledger_file` stores,
locks and detects edits.
"""

import hashlib
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from core.errors import InfeasibleError
from core.privacy.accounting import solve
from core.privacy.accounting.mechanism import COARSE, FINE, Mechanism, discretization_for, grouped
from core.privacy.accounting.rounding import upward
from core.privacy.ledger.book import Book, Charge, Reservation, add_up, dp_sgd_steps, stated_terms
from core.privacy.ledger.file import Chain, Event, Key, LedgerError, Terms, locked, require
from core.privacy.ledger.names import ledger_path, shown_name
from core.privacy.plan.plan import PrivacyPlan
from core.privacy.plan.scopes import RunBudget

UNIT = "one image with its label"
UNBOUNDED = (
    ". A selection of an earlier version is charged to this data set without its claim: it counts "
    "as unbounded, as the sum of its trials would tell their secret number"
)
_QUICK_ERROR = 1e-5
"""More than what figures that are not of record may be too small by."""


class BudgetExceededError(InfeasibleError):
    """The data set's budget cannot pay for a reservation; the ledger is unchanged."""


class Ledger:
    """The spending on one data set, in a file of a folder, named by `ledger_path`.

    Every call locks the file, verifies every line and works on what it then finds, so any number
    of processes may use one file; every call raises `LedgerError` where the file is missing,
    edited or truncated. `lease` is the fencing token of the run that this process writes for.

    Privacy: holds no data and no secret.
    """

    def __init__(
        self, path: Path, terms: Terms, lease: int | None = None, notes: Sequence[Path] = ()
    ) -> None:
        self.path = path
        self.terms = terms
        self.lease = lease
        self.notes = notes

    @classmethod
    def open(
        cls,
        folder: Path,
        terms: Terms,
        lease: int | None = None,
        notes: Sequence[Path] = (),
        known: bool = False,
    ) -> "Ledger":
        """Opens the ledger of a data set, or begins it.

        Args:
            notes: files that note its last line; where one exists, so must the ledger.
            known: whether anything else tells that the ledger was begun: it must then be there.

        Raises:
            LedgerError: it is lost, another than noted, or was begun with other terms.
        """
        ledger = cls(ledger_path(folder, terms.fingerprint), terms, lease, notes)
        with ledger._locked(create=not known) as chain:
            if all(entry["kind"] == "loss" for entry in chain.entries):
                body = {name: value for name, value in asdict(terms).items() if name != "family"}
                family = {"family": terms.family} if terms.family else {}
                chain.append("open", {**body, **family, "unit": UNIT})
            ledger._book(chain)
        return ledger

    @classmethod
    def open_existing(cls, folder: Path, terms: Terms, lease: int | None = None) -> "Ledger":
        """Opens the ledger that must be there; never begins one.

        Raises:
            LedgerError: there is none, or it was begun with other terms.
        """
        return cls.open(folder, terms, lease, known=True)

    @classmethod
    def at(cls, path: Path, notes: Sequence[Path] = ()) -> "Ledger":
        """Opens an existing file on the terms that it states, to show or to verify it."""
        with locked(path, notes=notes) as chain:
            return cls(path, stated_terms(path, chain), notes=notes)

    def _locked(self, create: bool = False) -> AbstractContextManager[Chain]:
        return locked(self.path, create, self.notes)

    @property
    def name(self) -> str:
        """What the data set is called wherever something is printed."""
        stem, account = self.path.stem, self.terms.fingerprint
        return shown_name(account) if stem == account[:16] else stem

    def take_over(self, run: str, owner: str, token: int) -> None:
        """Makes the holders of `token` the writers of `run`; those of older tokens are refused.

        Args:
            owner: who takes over, for people; such as host and process number.
            token: positive, larger than those of earlier drivers of the run; workers of one driver
                share it.

        Raises:
            LedgerError: a larger token took the run over.
        """
        with self._locked() as chain:
            current, by = self._book(chain).leases.get(run, (0, ""))
            require(token > 0, "token", token, "positive")
            if token < current:
                raise LedgerError(_taken_over(run, by, current, token))
            if token > current:
                chain.append("lease", {"run": run, "owner": owner, "token": token})
        self.lease = token

    def reserve(
        self,
        key: Key,
        events: Sequence[Event],
        note: str = "",
        within: RunBudget | None = None,
    ) -> Reservation:
        """Charges `events` before anything is released; to be called first on every start.

        The same key and events give the earlier reservation and no new charge, unless that was
        voided or settled at fewer steps: then the whole is charged, as the rest is about to run.

        Args:
            events: all that the key will release, with at most one event of kind `dp_sgd`.
            note: for people; nothing that depends on the data.
            within: the budget that all trials of the run share; the same for each of them.

        Raises:
            BudgetExceededError: a budget cannot pay; the ledger is unchanged.
            LedgerError: the key was reserved for other events, the run for another budget, or
                another process took over.

        Privacy: the data set's total is the composition by PLD of all that counts now, which is
        tight for mechanisms fixed beforehand (Koskela et al. 2020). What a run may spend `within`
        its budget is proven also where the noise of later trials is chosen from earlier results.
        """
        asked = Reservation(key, tuple(events))
        _check_request(asked)
        with self._locked() as chain:
            book = self._writable_book(chain, key)
            earlier = book.charges.get(key)
            if earlier is not None and earlier.events != asked.events:
                raise LedgerError(
                    f"{key} was reserved for other releases than those now asked for: a key "
                    "stands for one plan, so restore the configuration or choose a new run folder"
                )
            if earlier is None or earlier.counted != asked.events:
                self._check_run(book, asked, within)
                figures = self._admit(book, asked, within)
                plain = [asdict(event) for event in asked.events]
                body = {"key": asdict(key), "events": plain, "note": note, **figures}
                body["within"] = asdict(within) if within else None
                chain.append("reserve", body)
        return asked

    def begun(self, key: Key) -> tuple[int, bool, bool]:
        """What is known of the DP-SGD steps of a key.

        Returns:
            How many were settled; whether it is open, so that more may have run; and whether its
            charge may have been lost: there is none, and a loss of lines was accepted.
        """
        with self._locked() as chain:
            book = self._book(chain)
        charge = book.charges.get(key)
        if charge is None:
            return 0, False, bool(book.losses)
        return charge.committed or 0, charge.open, False

    def commit(self, reservation: Reservation, executed_steps: int) -> None:
        """Settles a reservation: of its DP-SGD steps only the executed ones count from now on.

        All other releases count in full. What ran is recorded even where it had been voided.

        Args:
            executed_steps: DP-SGD steps of the key that ever began, in [0, reserved] and not
                fewer than committed before. The caller vouches that no later step began; where
                that is unknown, the reservation must stay as it is.

        Raises:
            LedgerError: never reserved, out of that range, or another process took over.
        """
        key = reservation.key
        with self._locked() as chain:
            charge = self._writable_book(chain, key).charge(reservation)
            least, most = charge.committed or 0, dp_sgd_steps(charge.events)
            allowed = f"in [{least}, {most}], from what was committed to what was reserved"
            in_range = least <= operator.index(executed_steps) <= most
            require(in_range, f"executed_steps of {key}", executed_steps, allowed)
            if charge.open or charge.committed != executed_steps:
                chain.append("commit", {"key": asdict(key), "executed_steps": executed_steps})

    def void(self, reservation: Reservation) -> None:
        """Takes a reservation back, as if it had never been.

        Only if zero steps ran and nothing was drawn before them. The ledger cannot know this, the
        caller must: never void what another process had reserved, not even a dead one's.

        Raises:
            LedgerError: never reserved, committed before, or another process took over.
        """
        key = reservation.key
        with self._locked() as chain:
            charge = self._writable_book(chain, key).charge(reservation)
            if charge.committed is not None:
                raise LedgerError(
                    f"{key} has {charge.committed} committed steps: only what never ran can be "
                    "voided, so commit it instead"
                )
            if charge.open:
                chain.append("void", {"key": asdict(key)})

    def select(self, run: str, trial: str) -> None:
        """Notes the one trial of a selection that leaves, before anything of it does.

        Raises:
            LedgerError: another trial of it was noted before.

        Privacy: that the others never leave is why the selection counts as one release.
        """
        with self._locked() as chain:
            noted = self._book(chain).selected.get(run)
            if noted is None:
                chain.append("select", {"run": run, "trial": trial})
            elif noted != trial:
                raise LedgerError(_selected_before(run, noted))

    def selected(self, run: str) -> str | None:
        """The trial of a selection that may leave; None before its end, or where it is none."""
        with self._locked() as chain:
            return self._book(chain).selected.get(run)

    def epsilon_of_run(self, run: str) -> float:
        """Epsilon of all that one run, such as a sweep, has reserved or settled.

        Within a budget that its trials share, as that adds up; else the composition by PLD.
        """
        with self._locked() as chain:
            charges = self._book(chain).of_run(run)
        within = charges[0].within if charges else None
        if within is not None:
            return self._total_within(within, charges)
        counted = [event for charge in charges for event in charge.counted]
        return self._epsilon(counted, self._discretization(counted))

    def largest_epsilon(self, run: str) -> float:
        """The largest epsilon that the plan of one trial of a run spends alone; 0 without any."""
        with self._locked() as chain:
            plans = {charge.reserved for charge in self._book(chain).of_run(run)}
        quick = {plan: self._epsilon(plan, FINE, of_record=False) for plan in plans}
        # Of record, which takes seconds, only what may be the largest.
        near = [plan for plan in plans if quick[plan] > max(quick.values()) - _QUICK_ERROR]
        return max((self._epsilon(plan, FINE) for plan in near), default=0.0)

    def verify(self) -> int:
        """Checks every line, the head and the terms; returns the number of lines."""
        with self._locked() as chain:
            self._book(chain)
            return len(chain.entries)

    def summary(self) -> dict[str, Any]:
        """What was spent, as plain data.

        Returns:
            The terms and the unit; `epsilon_committed` (settled steps), a part of
            `epsilon_committed_and_reserved` (all that counts against the budget), which holds at
            `delta_committed_and_reserved`; `num_releases`, in which a selection is one;
            `accountant`; `selections`, the runs that are one; `losses`: time and reason of each
            loss of lines that the owner accepted; and `entries`: for each key its state, events
            and the `epsilon` of it alone, to about 2e-6.

        Privacy: all but the entries is the same whatever the number of a selection's trials.
        """
        with self._locked() as chain:
            book = self._book(chain)
        # One for all figures, so that they compare.
        apart = [event for charge in book.apart for event in charge.counted]
        grid = self._discretization(apart)
        committed, _ = self._together(book, lambda charge: charge.settled, grid)
        everything, delta = self._together(book, lambda charge: charge.counted, grid)
        entries = [
            {
                **asdict(key),
                "state": charge.state,
                "executed_steps": charge.committed,
                "epsilon": self._epsilon(charge.counted, grid, of_record=False),
                "events": [asdict(event) for event in charge.events],
                "note": charge.note,
                "time": charge.time,
            }
            for key, charge in book.charges.items()
        ]
        return {
            **asdict(self.terms),
            "name": self.name,
            "unit": UNIT,
            "epsilon_committed": committed,
            "epsilon_committed_and_reserved": everything,
            "delta_committed_and_reserved": delta,
            "num_releases": len(book.apart) + len(book.selections),
            "accountant": self._accountant(self._epsilon(apart, grid), apart, grid),
            "selections": list(book.selections),
            "entries": entries,
            "losses": [*book.losses],
        }

    def _book(self, chain: Chain) -> Book:
        """Adds up the lines, after the first has shown that they are of these terms."""
        stated, asked = asdict(stated_terms(self.path, chain)), asdict(self.terms)
        if self.terms.family:  # Its data sets differ in size; all else is shared.
            stated.pop("num_examples")
        for name, value in stated.items():
            if asked[name] != value:
                if name == "fingerprint":
                    raise LedgerError(f"'{self.path}' is of another data set: restore its own")
                raise LedgerError(
                    f"{name}={asked[name]!r}, but the ledger '{self.path}' was begun with "
                    f"{value!r}, which never changes: ask for that, or for another ledger folder, "
                    "whose figures then leave out what is recorded here"
                )
        return add_up(self.path, chain)

    def _writable_book(self, chain: Chain, key: Key) -> Book:
        """The same, if no other process took over the run of `key`."""
        book = self._book(chain)
        held = book.leases.get(key.run)
        if held is not None and held[0] != self.lease:
            token, owner = held
            raise LedgerError(_taken_over(key.run, owner, token, self.lease))
        return book

    def _check_run(self, book: Book, asked: Reservation, within: RunBudget | None) -> None:
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
            raise LedgerError(_selected_before(run, noted))
        if within is None or within.selection:
            return
        before = [key.run for key, charge in book.charges.items() if charge.counted]
        if within.alone and (others := {*before} - {run}):
            raise BudgetExceededError(
                f"the data was used by {len(others)} other runs, such as {min(others)}: scope "
                "public claims that its one run is the only one; choose scope trial, whose card "
                "says what all come to"
            )
        others = [book.charges[key] for key in book.charges if key.run == run and key != asked.key]
        total = self._total_within(within, [*others, Charge(asked.events, "", "")])
        if total > within.epsilon * (1 + 1e-9):
            raise BudgetExceededError(
                f"trial {asked.key.trial[:16]} would bring run {run} to epsilon "
                f"{upward(total, 6)} of its budget {upward(within.epsilon, 6)}, of which "
                f"{len(others)} trials have {upward(self._total_within(within, others), 6)}: it "
                "pays for privacy.num_shares trials, which were set before the first (scope "
                "public: for one)"
            )

    def _total_within(self, within: RunBudget, charges: Sequence[Charge]) -> float:
        executed = _mechanisms(event for charge in charges for event in charge.counted)
        reserved = _mechanisms(event for charge in charges for event in charge.reserved)
        return within.total(executed, reserved, self.terms.delta, self.terms.neighboring_relation)

    def _admit(self, book: Book, asked: Reservation, within: RunBudget | None) -> dict[str, Any]:
        """The new total and its accountant, for the record; None where no budget asks for it.

        Privacy: a selection is charged whole, with its first trial. Later ones are never refused,
            which would bound their secret number, and no figure depends on it.
        """
        budget = self.terms.budget
        if budget is None:
            return {"epsilon_after": None, "accountant": None}
        others = replace(book, charges={k: c for k, c in book.charges.items() if k != asked.key})
        new = {asked.key: Charge(asked.events, "", "", within)}
        after = replace(book, charges=others.charges | new)
        apart = [event for charge in after.apart for event in charge.counted]
        grid = self._discretization(apart)

        def counted(part: Book) -> float:
            return self._together(part, lambda charge: charge.counted, grid)[0]

        total = counted(after)
        paid = (
            within is not None
            and within.selection
            and any(charge.counted for charge in others.of_run(asked.key.run))
        )
        if paid or total <= budget:
            accountant = self._accountant(self._epsilon(apart, grid), apart, grid)
            return {"epsilon_after": total, "accountant": accountant}
        raise BudgetExceededError(
            f"reserving epsilon {upward(counted(replace(book, charges=new)), 6)} for {asked.key} "
            f"would bring its data set to {upward(total, 6)} of its budget {upward(budget, 6)} "
            f"(spent or reserved {upward(counted(others), 6)}): plan fewer steps, more noise or "
            f"fewer trials, as a budget is never raised{UNBOUNDED if total == math.inf else ''}"
        )

    def _together(
        self, book: Book, part: Callable[[Charge], tuple[Event, ...]], grid: float
    ) -> tuple[float, float]:
        """Epsilon and delta of all releases together, of the `part` of each charge that counts.

        Privacy: what is charged by its mechanisms is composed by PLD at the ledger's delta. A
            selection, of which nothing but the best trial leaves, is (target, delta)-private as a
            whole, and its epsilon and delta are added (basic composition, Dwork et al. 2006, valid
            for adaptive choices too): the sum of both deltas bounds what exceeds the sum of both
            epsilons, whatever the number of its trials was.
        """
        events = [event for charge in book.apart for event in part(charge)]
        selections = book.selections.values()
        targets = [max(c.target for c in group) for group in selections if any(map(part, group))]
        count = max(1, bool(events) + len(targets))
        delta = float(count * Decimal(repr(self.terms.delta)))  # 3e-05, not 3.0000000000000004e-05.
        return self._epsilon(events, grid) + sum(targets), delta

    def _discretization(self, events: Iterable[Event]) -> float:
        scale = self.terms.budget or self._epsilon(events, COARSE)
        return discretization_for(_mechanisms(events), scale)

    def _epsilon(
        self, events: Iterable[Event], discretization: float, of_record: bool = True
    ) -> float:
        delta, relation = self.terms.delta, self.terms.neighboring_relation
        return solve.epsilon_of_mechanisms(
            _mechanisms(events), delta, relation, discretization, of_record
        )

    def _accountant(self, epsilon: float, events: Iterable[Event], discretization: float) -> str:
        delta, relation = self.terms.delta, self.terms.neighboring_relation
        mechanisms = _mechanisms(events)
        return solve.accountant_of(epsilon, mechanisms, delta, relation, discretization)


def _taken_over(run: str, owner: str, token: int, mine: int | None) -> str:
    return (
        f"another sweep took over run {run} ({owner} holds token {token}, this process "
        f"{mine or 'none'}): stop this process, or resume the run in it"
    )


def _selected_before(run: str, noted: str) -> str:
    return (
        f"selection {run} has ended with trial {noted[:16]}, the only one of it that may leave: "
        "release that, or choose another name for another selection"
    )


def charged_to(fingerprint: str, family: str | None) -> str:
    """What names the ledger of a data set: its own fingerprint, or the digest of its family's name.

    Privacy: all charges of a family are composed, which bounds what they tell together of a record
        that lies in every one of its data sets.
    """
    return hashlib.sha256(f"family {family}".encode()).hexdigest() if family else fingerprint


def events_of(plan: PrivacyPlan, central: str = "") -> tuple[Event, ...]:
    """All that one trial releases, in the order in which it runs.

    Args:
        central: identity of the release of central images, if other trials have them from it too.
    """
    return tuple(
        Event(each.kind, *each.mechanism, release=central if each.is_shared else "")
        for each in plan.releases
    )


def _mechanisms(events: Iterable[Event]) -> tuple[Mechanism, ...]:
    """The only way from a ledger's plain data to what the accountant composes.

    Privacy: what several trials have from one release counts once, as later uses of it are
        post-processing.
    """
    once: dict[tuple[str, Event | int], Event] = {}
    for number, event in enumerate(events):
        once[(event.release, event) if event.release else ("", number)] = event
    return grouped((e.sample_rate, e.noise_multiplier, e.count) for e in once.values())


def _check_request(asked: Reservation) -> None:
    key, counts = asked.key, [e.count for e in asked.events if e.kind == "dp_sgd"]
    require(bool(asked.events), "events", asked.events, "at least one event")
    require(len(counts) <= 1, "events of kind dp_sgd", len(counts), "at most one")
    require(key.first_step >= 0, "first_step", key.first_step, "at least 0")
    steps = key.end_step - key.first_step
    require(steps == sum(counts), "steps of the key", steps, f"the DP-SGD count {sum(counts)}")
