"""Book of a ledger, from its lines: a charge for each key, the writers of each run."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from core.errors import LedgerError
from core.privacy.ledger.file import Chain, Entry
from core.privacy.ledger.terms import Event, Key, Terms
from core.privacy.plan.budget import RunBudget

UNBOUNDED = (
    " A selection of an earlier version is charged to this data set without its claim: it counts "
    "as unbounded, as the sum of its trials would tell their secret number."
)


@dataclass(frozen=True)
class Reservation:
    """Leave to run `events` once; handed to `commit`."""

    key: Key
    events: tuple[Event, ...]


@dataclass
class Charge:
    """One key's state: the whole counts while it is open, then the committed steps alone."""

    events: tuple[Event, ...]
    note: str
    time: str
    within: RunBudget | None = None
    open: bool = True
    committed: int | None = None

    @property
    def settled(self) -> tuple[Event, ...]:
        """What was executed."""
        return () if self.committed is None else _executed(self.events, self.committed)

    @property
    def counted(self) -> tuple[Event, ...]:
        """What counts against the budget."""
        return self.events if self.open else self.settled

    @property
    def reserved(self) -> tuple[Event, ...]:
        """What was ever to run, unless it was voided."""
        return self.events if self.counted else ()

    @property
    def target(self) -> float:
        """Epsilon of the one release, as of `RunBudget`, whose trial it is; else 0.

        Infinite where an earlier version charged it, which recorded no target: what its trials
        come to would tell their secret number.
        """
        if self.within is None:
            return math.inf if self.note == "scope selection" else 0.0
        return self.within.epsilon if self.within.is_one_release else 0.0

    @property
    def is_secret(self) -> bool:
        """Whether it is a trial of a selection, whose number stays inside."""
        return bool(self.target) and not (self.within and self.within.tuning_trials)

    @property
    def state(self) -> str:
        """`reserved`, `committed` or `void`."""
        if self.open:
            return "reserved"
        return "void" if self.committed is None else "committed"


@dataclass
class Book:
    """What the lines add up to.

    Attributes:
        charges: by key.
        leases: for each run its last token and owner.
        selected: for each selection the trial of it that leaves.
        losses: time and reason of each loss of lines that the owner accepted.
    """

    charges: dict[Key, Charge] = field(default_factory=dict[Key, Charge])
    leases: dict[str, tuple[int, str]] = field(default_factory=dict[str, tuple[int, str]])
    selected: dict[str, str] = field(default_factory=dict[str, str])
    losses: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    begun: bool = False

    def of_run(self, run: str) -> list[Charge]:
        """The charges of one run."""
        return [charge for key, charge in self.charges.items() if key.run == run]

    @property
    def apart(self) -> list[Charge]:
        """The charges that are releases each; those of `together` are one."""
        return [charge for charge in self.charges.values() if not charge.target]

    @property
    def together(self) -> dict[str, list[Charge]]:
        """The charges of each run that is one release: a selection, or trials below references.

        Privacy: how many there are of a selection is for the owner alone.
        """
        runs = {key.run: None for key, charge in self.charges.items() if charge.target}
        return {run: self.of_run(run) for run in runs}

    def targets(self, part: Callable[[Charge], tuple[Event, ...]]) -> list[float]:
        """The target of each run that is one release and of which any `part` is there."""
        groups = self.together.values()
        return [max(c.target for c in group) for group in groups if any(map(part, group))]

    @property
    def selections(self) -> list[str]:
        """The runs that are selections."""
        return [run for run, group in self.together.items() if any(c.is_secret for c in group)]

    def charge(self, reservation: Reservation) -> Charge:
        """The charge that `reserve` made for this reservation."""
        found = self.charges.get(reservation.key)
        if found is None or found.events != reservation.events:
            raise LedgerError(
                f"{reservation.key} was never reserved with these releases: reserve it before "
                "anything runs"
            )
        return found


def stated_terms(path: Path, chain: Chain) -> Terms:
    """The terms in the first line, or in that after an accepted loss of all lines."""
    first = next((entry for entry in chain.entries if entry.get("kind") != "loss"), None)
    if first is None:
        raise LedgerError(
            f"the ledger '{path}' holds an accepted loss alone: the next run on this data begins it"
        )
    names = ("fingerprint", "num_examples", "delta", "neighboring_relation", "budget")
    try:
        return Terms(**{name: first[name] for name in names}, family=first.get("family"))
    except (KeyError, TypeError):
        raise _unknown(path) from None


_added_up: dict[Path, tuple[int, str, Book]] = {}
"""Of each ledger how many lines this process added up last, the last one's hash, and the book."""


def add_up(path: Path, chain: Chain) -> Book:
    """Reads all lines, in order; the book is to be read while the lock is held.

    Lines whose hash, and so all before them, this process has added up before are not added up
    again, so that a call does not take longer with every trial.
    """
    afresh = (0, "", Book())
    count, last, book = _added_up.pop(path, afresh)
    if count > len(chain.entries) or chain.entries[count - 1]["hash"] != last:
        count, last, book = afresh
    for entry in chain.entries[count:]:
        try:
            _enter(book, entry)
        except (KeyError, TypeError):
            raise _unknown(path) from None
    _added_up[path] = (len(chain.entries), chain.entries[-1]["hash"], book)
    return book


def _enter(book: Book, entry: Entry) -> None:
    if entry["kind"] == "lease":
        book.leases[entry["run"]] = (entry["token"], entry["owner"])
        return
    if entry["kind"] == "select":
        book.selected[entry["run"]] = entry["trial"]
        return
    if entry["kind"] == "loss":
        book.losses.append({"time": entry["time"], "reason": entry["reason"]})
        return
    if entry["kind"] == "open" and not book.begun:
        book.begun = True
        return
    key = Key(**entry["key"])
    if entry["kind"] == "reserve":
        events = tuple(Event(**event) for event in entry["events"])
        within = entry.get("within")
        budget = RunBudget(**within) if within else None
        new = Charge(events, entry["note"], entry["time"], budget)
        book.charges.setdefault(key, new).open = True
    elif entry["kind"] in ("commit", "void"):
        book.charges[key].open = False
        if entry["kind"] == "commit":
            book.charges[key].committed = entry["executed_steps"]
    else:
        raise KeyError(entry["kind"])


def _unknown(path: Path) -> LedgerError:
    return LedgerError(
        f"a line of the ledger '{path}' is of a form that this version does not know: use the "
        "version that wrote it"
    )


def dp_sgd_steps(events: Iterable[Event]) -> int:
    """DP-SGD steps of all events."""
    return sum(event.count for event in events if event.kind == "dp_sgd")


def _executed(events: Iterable[Event], steps: int) -> tuple[Event, ...]:
    """`events` with the DP-SGD count replaced; at 0 steps that event is left out."""
    kept = (event for event in events if steps or event.kind != "dp_sgd")
    return tuple(
        replace(e, count=steps) if e.kind == "dp_sgd" and e.count != steps else e for e in kept
    )
