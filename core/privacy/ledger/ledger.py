"""The privacy ledger of one data set: every release is reserved before it and settled after it.

What is not reserved may not run; a reservation counts in full until it is settled; the budget, if
there is one, bounds everything that counts. `file` stores, locks and detects edits, `book` adds the
lines up, `admission` refuses, `totals` composes.
"""

import operator
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from core.errors import LedgerError
from core.privacy.ledger.admission import admit, check_request, check_run, selected_before
from core.privacy.ledger.book import (
    Book,
    Reservation,
    add_up,
    dp_sgd_steps,
    stated_terms,
)
from core.privacy.ledger.file import Chain, locked
from core.privacy.ledger.names import ledger_path, shown_name
from core.privacy.ledger.terms import Event, Key, Terms, require
from core.privacy.ledger.totals import Totals
from core.privacy.plan.budget import RunBudget
from core.privacy.plan.plan import PrivacyPlan

UNIT = "one image with its label"


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
        self._totals = Totals(terms)

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
        check_request(asked)
        with self._locked() as chain:
            book = self._writable_book(chain, key)
            earlier = book.charges.get(key)
            if earlier is not None and earlier.events != asked.events:
                raise LedgerError(
                    f"{key} was reserved for other releases than those now asked for: a key "
                    "stands for one plan, so restore the configuration or choose a new run folder"
                )
            if earlier is None or earlier.counted != asked.events:
                check_run(self._totals, book, asked, within)
                kept = self.path.with_suffix(".composed")
                figures = admit(self._totals, book, asked, within, kept)
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

        All other releases count in full. What ran is recorded also where it had been voided, as
        earlier versions could.

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
                raise LedgerError(selected_before(run, noted))

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
            return self._totals.within(within, charges)
        counted = [event for charge in charges for event in charge.counted]
        return self._totals.epsilon(counted, self._totals.discretization(counted))

    def members_found(self, false_alarms: float, run: str | None = None) -> float:
        """The largest share of members that any attack finds that sees all of a run, or of all.

        Args:
            false_alarms: share of non-members that it is wrong about, in [0, 1].
            run: one whose trials PLD composes; None: everything that was ever charged.
        """
        with self._locked() as chain:
            book = self._book(chain)
        charges = book.apart if run is None else book.of_run(run)
        # Within a budget all that was to run, as PLD covers no stopping by results.
        parts = [each.reserved if run and each.within else each.counted for each in charges]
        events = [event for part in parts for event in part]
        targets = () if run else book.targets(lambda charge: charge.counted)
        return self._totals.members_found(events, targets, false_alarms)

    def largest_epsilon(self, run: str) -> float:
        """The largest epsilon that the plan of one trial of a run spends alone; 0 without any."""
        with self._locked() as chain:
            plans = {charge.reserved for charge in self._book(chain).of_run(run)}
        return self._totals.largest(plans)

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
            `delta_committed_and_reserved`; `num_releases`, in which a run that is charged as a
            whole is one of `num_wholes`; `accountant`; `selections`, the runs that are one;
            `sweeps`, the runs that a sweep's driver took over; `losses`: time and reason of each
            loss of lines that the owner accepted; and `entries`: for each key its state, events and
            the `epsilon` of it alone, to about 2e-6.

        Privacy: all but the entries is the same whatever the number of a selection's trials.
        """
        with self._locked() as chain:
            book = self._book(chain)
        # One for all figures, so that they compare.
        apart = [event for charge in book.apart for event in charge.counted]
        grid = self._totals.discretization(apart)
        committed, _ = self._totals.together(book, lambda charge: charge.settled, grid)
        everything, delta = self._totals.together(book, lambda charge: charge.counted, grid)
        entries = [
            {
                **asdict(key),
                "state": charge.state,
                "executed_steps": charge.committed,
                "epsilon": self._totals.epsilon(charge.counted, grid, of_record=False),
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
            "num_releases": len(book.apart) + len(book.together),
            "accountant": self._totals.accountant(apart, grid),
            "selections": list(book.selections),
            "num_wholes": len(book.together),
            "sweeps": list(book.leases),
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


def _taken_over(run: str, owner: str, token: int, mine: int | None) -> str:
    return (
        f"another sweep took over run {run} ({owner} holds token {token}, this process "
        f"{mine or 'none'}): stop this process, or resume the run in it"
    )


def events_of(plan: PrivacyPlan, central: str = "") -> tuple[Event, ...]:
    """All that one trial releases, in the order in which it runs.

    Args:
        central: identity of the release of central images, if other trials have them from it too.
    """
    return tuple(
        Event(each.kind, *each.mechanism, release=central if each.is_shared else "")
        for each in plan.releases
    )
