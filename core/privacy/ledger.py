"""The privacy ledger of one data set: every release is reserved before it and settled after it.

What is not reserved may not run; a reservation counts in full until it is settled; the budget, if
there is one, bounds everything that counts. Charges are composed by PLD with equal mechanisms
grouped, an upper bound at any discretisation. `ledger_file` stores, locks and detects edits.
"""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from core.errors import InfeasibleError
from core.privacy import accounting
from core.privacy.ledger_book import Book, Reservation, add_up, dp_sgd_steps, stated_terms
from core.privacy.ledger_file import Chain, Event, Key, LedgerError, Terms, locked, require
from core.privacy.plan import PrivacyPlan

UNIT = "one image with its label"


class BudgetExceededError(InfeasibleError):
    """The data set's budget cannot pay for a reservation; the ledger is unchanged."""


class Ledger:
    """The spending on one data set, in `<folder>/<first 16 digits of the fingerprint>.jsonl`.

    Every call locks the file, verifies every line and works on what it then finds, so any number
    of processes may use one file; every call raises `LedgerError` where the file is missing,
    edited or truncated. `lease` is the fencing token of the run that this process writes for.

    Privacy: holds no data and no secret.
    """

    def __init__(self, path: Path, terms: Terms, lease: int | None = None) -> None:
        self.path = path
        self.terms = terms
        self.lease = lease

    @classmethod
    def open(cls, folder: Path, terms: Terms, lease: int | None = None) -> "Ledger":
        """Opens the ledger of a data set, or begins it.

        Raises:
            LedgerError: it was begun with other terms.
        """
        ledger = cls(ledger_path(folder, terms.fingerprint), terms, lease)
        with locked(ledger.path, create=True) as chain:
            if not chain.entries:
                chain.append("open", {**asdict(terms), "unit": UNIT})
            ledger._book(chain)
        return ledger

    @classmethod
    def open_existing(cls, folder: Path, terms: Terms, lease: int | None = None) -> "Ledger":
        """Opens the ledger that must be there, as when a run is resumed; never begins one.

        Raises:
            LedgerError: there is none, or it was begun with other terms.
        """
        ledger = cls(ledger_path(folder, terms.fingerprint), terms, lease)
        ledger.verify()
        return ledger

    @classmethod
    def at(cls, path: Path) -> "Ledger":
        """Opens an existing file on the terms that it states, to show or to verify it."""
        with locked(path) as chain:
            return cls(path, stated_terms(path, chain))

    def acquire_lease(self, run: str, owner: str) -> int:
        """Makes this process the writer of `run`; whoever holds an older token is refused.

        Args:
            owner: who takes over, for people; such as host and process number.

        Returns:
            A token larger than all before, which the workers of the run need as `lease`.
        """
        with locked(self.path) as chain:
            leases = self._book(chain).leases
            token = 1 + max((token for token, _ in leases.values()), default=0)
            chain.append("lease", {"run": run, "owner": owner, "token": token})
        self.lease = token
        return token

    def reserve(self, key: Key, events: Sequence[Event], note: str = "") -> Reservation:
        """Charges `events` before anything is released; to be called first on every start.

        The same key and events give the earlier reservation and no new charge, unless that was
        voided or settled at fewer steps: then the whole is charged, as the rest is about to run.

        Args:
            events: all that the key will release, with at most one event of kind `dp_sgd`.
            note: for people; nothing that depends on the data.

        Raises:
            BudgetExceededError: the budget cannot pay; the ledger is unchanged.
            LedgerError: the key was reserved for other events, or another process took over.

        Privacy: the total is the composition of all that counts now. That composition of
        mechanisms fixed beforehand is tight by PLD (Koskela et al. 2020); where the noise of
        later trials is chosen from earlier results, the proven filter is that of Renyi DP
        (Feldman and Zrnic 2021).
        """
        asked = Reservation(key, tuple(events))
        _check_request(asked)
        with locked(self.path) as chain:
            book = self._writable_book(chain, key)
            earlier = book.charges.get(key)
            if earlier is not None and earlier.events != asked.events:
                raise LedgerError(
                    f"{key} was reserved for other releases than those now asked for: a key "
                    "stands for one plan, so restore the configuration or choose a new run folder"
                )
            if earlier is None or earlier.counted != asked.events:
                figures = self._admit(book, asked)
                plain = [asdict(event) for event in asked.events]
                body = {"key": asdict(key), "events": plain, "note": note, **figures}
                chain.append("reserve", body)
        return asked

    def commit(self, reservation: Reservation, executed_steps: int) -> None:
        """Settles a reservation: of its DP-SGD steps only the executed ones count from now on.

        Central images count in full. What ran is recorded even where it had been voided.

        Args:
            executed_steps: DP-SGD steps of the key that ever began, in [0, reserved] and not
                fewer than committed before. The caller vouches that no later step began; where
                that is unknown, the reservation must stay as it is.

        Raises:
            LedgerError: never reserved, out of that range, or another process took over.
        """
        key = reservation.key
        with locked(self.path) as chain:
            charge = self._writable_book(chain, key).charge(reservation)
            least, most = charge.committed or 0, dp_sgd_steps(charge.events)
            allowed = f"in [{least}, {most}], from what was committed to what was reserved"
            in_range = least <= operator.index(executed_steps) <= most
            require(in_range, f"executed_steps of {key}", executed_steps, allowed)
            if charge.open or charge.committed != executed_steps:
                chain.append("commit", {"key": asdict(key), "executed_steps": executed_steps})

    def void(self, reservation: Reservation) -> None:
        """Takes a reservation back, as if it had never been.

        Only if zero steps ran and no central image was drawn. The ledger cannot know this, the
        caller must: never void what another process had reserved, not even a dead one's.

        Raises:
            LedgerError: never reserved, committed before, or another process took over.
        """
        key = reservation.key
        with locked(self.path) as chain:
            charge = self._writable_book(chain, key).charge(reservation)
            if charge.committed is not None:
                raise LedgerError(
                    f"{key} has {charge.committed} committed steps: only what never ran can be "
                    "voided, so commit it instead"
                )
            if charge.open:
                chain.append("void", {"key": asdict(key)})

    def epsilon_of_run(self, run: str) -> float:
        """Epsilon of all that one run, such as a sweep, has reserved or settled."""
        with locked(self.path) as chain:
            charges = self._book(chain).charges
        counted = [e for key, c in charges.items() if key.run == run for e in c.counted]
        return self._epsilon(counted, self._discretization(counted))

    def verify(self) -> int:
        """Checks every line, the head and the terms; returns the number of lines."""
        with locked(self.path) as chain:
            self._book(chain)
            return len(chain.entries)

    def summary(self) -> dict[str, Any]:
        """What was spent, as plain data.

        Returns:
            The terms and the unit; `epsilon_committed` (settled steps), a part of
            `epsilon_committed_and_reserved` (all that counts against the budget); `accountant`;
            and `entries`: for each key its state, events and the `epsilon` of it alone.
        """
        with locked(self.path) as chain:
            charges = self._book(chain).charges
        counted = [event for charge in charges.values() for event in charge.counted]
        settled = [event for charge in charges.values() for event in charge.settled]
        grid = self._discretization(counted)  # One for all figures, so that they compare.
        entries = [
            {
                **asdict(key),
                "state": charge.state,
                "executed_steps": charge.committed,
                "epsilon": self._epsilon(charge.counted, grid),
                "events": [asdict(event) for event in charge.events],
                "note": charge.note,
                "time": charge.time,
            }
            for key, charge in charges.items()
        ]
        return {
            **asdict(self.terms),
            "unit": UNIT,
            "epsilon_committed": self._epsilon(settled, grid),
            "epsilon_committed_and_reserved": self._epsilon(counted, grid),
            "accountant": _accountant(grid),
            "entries": entries,
        }

    def _book(self, chain: Chain) -> Book:
        """Adds up the lines, after the first has shown that they are of these terms."""
        stated, asked = asdict(stated_terms(self.path, chain)), asdict(self.terms)
        for name, value in stated.items():
            if asked[name] != value:
                raise LedgerError(
                    f"{name}={asked[name]!r}, but the ledger '{self.path}' was begun with "
                    f"{value!r}, which never changes: ask for that, or for another ledger folder, "
                    "whose figures then leave out what is recorded here"
                )
        return add_up(self.path, chain)

    def _writable_book(self, chain: Chain, key: Key) -> Book:
        """The same, if no other process took over the run of `key`."""
        book = self._book(chain)
        token, owner = book.leases.get(key.run, (self.lease, ""))
        if token != self.lease:
            raise LedgerError(
                f"another sweep took over run {key.run} ({owner} holds token {token}, this "
                f"process {self.lease or 'none'}): stop this process, or resume the run in it"
            )
        return book

    def _admit(self, book: Book, asked: Reservation) -> dict[str, Any]:
        """The new total and its accountant, for the record; None where no budget asks for it."""
        budget = self.terms.budget
        if budget is None:
            return {"epsilon_after": None, "accountant": None}
        others = [charge for key, charge in book.charges.items() if key != asked.key]
        counted = [*(event for charge in others for event in charge.counted), *asked.events]
        grid = self._discretization(counted)
        total = self._epsilon(counted, grid)
        if total <= budget:
            return {"epsilon_after": total, "accountant": _accountant(grid)}
        spent = [event for charge in book.charges.values() for event in charge.settled]
        held = [event for charge in others if charge.open for event in charge.events]
        raise BudgetExceededError(
            f"reserving epsilon {self._epsilon(asked.events, grid):.6g} for {asked.key} would "
            f"bring data set {self.terms.fingerprint[:6]} to {total:.6g} of its budget "
            f"{budget:g} (spent {self._epsilon(spent, grid):.6g}, reserved "
            f"{self._epsilon(held, grid):.6g}): plan fewer steps, more noise or fewer trials, as "
            "a budget is never raised"
        )

    def _discretization(self, events: Iterable[Event]) -> float:
        scale = self.terms.budget or self._epsilon(events, accounting.COARSE)
        return accounting.discretization_for(_mechanisms(events), scale)

    def _epsilon(self, events: Iterable[Event], discretization: float) -> float:
        delta, relation = self.terms.delta, self.terms.neighboring_relation
        return accounting.epsilon_of_mechanisms(
            _mechanisms(events), delta, relation, discretization
        )


def ledger_path(folder: Path, fingerprint: str) -> Path:
    """Where the ledger of a data set lies."""
    return folder / f"{fingerprint[:16]}.jsonl"


def events_of(plan: PrivacyPlan) -> tuple[Event, ...]:
    """All that one trial releases, in the order in which it runs."""
    dp_sgd = Event("dp_sgd", *plan.dp_sgd.mechanism)
    if plan.central is None:
        return (dp_sgd,)
    return Event("central_images", *plan.central.mechanism), dp_sgd


def _mechanisms(events: Iterable[Event]) -> tuple[accounting.Mechanism, ...]:
    """The only way from a ledger's plain data to what the accountant composes."""
    return accounting.grouped((e.sample_rate, e.noise_multiplier, e.count) for e in events)


def _check_request(asked: Reservation) -> None:
    key, counts = asked.key, [e.count for e in asked.events if e.kind == "dp_sgd"]
    require(bool(asked.events), "events", asked.events, "at least one event")
    require(len(counts) <= 1, "events of kind dp_sgd", len(counts), "at most one")
    require(key.first_step >= 0, "first_step", key.first_step, "at least 0")
    steps = key.end_step - key.first_step
    require(steps == sum(counts), "steps of the key", steps, f"the DP-SGD count {sum(counts)}")


def _accountant(discretization: float) -> str:
    version = metadata.version("dp-accounting")
    return f"PLD, dp-accounting {version}, discretization {discretization:g}"
