"""Account of a run at the ledger: reserved before the data is opened, settled when the run ends."""
# pyright: reportUnknownMemberType=false

import hashlib
import json
import logging
import os
import secrets
import socket
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from core.config import Config, flatten
from core.errors import ConfigError, DataError, LedgerError, storage_errors
from core.io.files import write_whole
from core.privacy.ledger.file import keep_copy, traces
from core.privacy.ledger.ledger import Ledger, Reservation, events_of
from core.privacy.ledger.names import charged_to, ledger_path
from core.privacy.ledger.sources import Source, Sources
from core.privacy.ledger.terms import Key, Terms
from core.privacy.plan.budget import run_budget
from core.privacy.plan.plan import PrivacyPlan
from core.record.folder import STEPS_BEGUN

RELEASE_ID = "release_id"
"""File in the folder `charged` with the identity of the one release that a selection is."""
_LOG = logging.getLogger("core")
_CHARGED = "charged"
_BLOCK = 25
"""Steps that are noted together; a stopped run pays for at most so many too many."""


class Account(Protocol):
    """What one run asks of the ledger: `Spending`, or what passes the questions on to one.

    Every answer has reached the disk before it is given. Used on rank 0 alone, but for
    `begins_block`.
    """

    def known_fingerprint(self) -> str | None:
        """Fingerprint that this source had when a run opened it last."""
        ...

    def reserve(
        self, fingerprint: str, identity: str, central: str = "", resumed: int = 0
    ) -> Reservation:
        """Charges the whole plan, or finds that this run has done so before."""
        ...

    def begins_block(self, step: int) -> bool:
        """Whether `count` must be called before this step: the same on all ranks."""
        ...

    def count(self, step: int) -> None:
        """Notes that a step is about to begin."""
        ...

    def commit(self, fingerprint: str, reservation: Reservation) -> int:
        """Settles all steps that ever began; returns how many."""
        ...

    def remember(self, fingerprint: str) -> None:
        """Notes the source's fingerprint."""
        ...


@dataclass
class Spending:
    """The account of a run in files that this process reads and writes.

    The ledger of a data set is known by the fingerprint of its content, which is known without
    opening the data from the second run on: the folder remembers which source had which content.

    The DP-SGD steps that ever began are counted beside the ledger while the reservation is open,
    and in the run's folder; before and after, the ledger itself knows them. The largest of all
    that is found counts, so that neither an emptied folder of a run nor an older copy of the
    ledger's makes them fewer; where the count beside the ledger is lost, all steps count.

    Whoever reserves leases the trial until another does: the count names its holder. A worker that
    was given up, or a call of it that comes late, can neither count nor settle beside its heir.

    Args:
        folder: of the ledgers, `runtime.ledger`.
        run: name of the sweep or of the single run.
        run_dir: folder of the run, which notes the last line of its data set's ledger.
        charged: folder in which the runs of a sweep note the same together.
        lease: token of the sweep's driver, which takes the run over from older ones.
    """

    config: Config
    plan: PrivacyPlan
    folder: Path
    run: str
    run_dir: Path
    charged: Path
    lease: int | None = None
    _counted: bool = field(default=False, init=False)
    _counters: tuple[Path, Path] = field(default=(Path(), Path()), init=False)
    _begun: int = field(default=0, init=False)
    _holder: str = field(default_factory=lambda: secrets.token_hex(8), init=False)

    def known_fingerprint(self) -> str | None:
        """Fingerprint that this source had when a run opened it last."""
        source = self._sources.read().get(_source(self.config))
        return source.fingerprint if source else None

    def reserve(
        self, fingerprint: str, identity: str, central: str = "", resumed: int = 0
    ) -> Reservation:
        """Charges the whole plan, or finds that this run has done so before.

        Args:
            fingerprint: of the data set's content.
            identity: of the trial; masks and noise are drawn from it.
            central: identity of central images that trials of the sweep share; else empty.
            resumed: DP-SGD steps of the checkpoint from which the run goes on.

        Raises:
            BudgetExceededError: the data set's budget cannot pay; nothing was opened or changed.
            LedgerError: the ledger is lost, damaged or another than this run or its folder knows.
        """
        within = run_budget(self.config, self._selection())
        own, path = self.run_dir / _CHARGED, self._path(fingerprint)
        noted = (own / path.stem).exists()
        ledger = self._ledger(fingerprint)
        if self.lease is not None:
            ledger.take_over(self.run, f"{socket.gethostname()}:{os.getpid()}", self.lease)
        part, steps = self.config.privacy.part, self.plan.dp_sgd.num_steps
        key = Key(self.run, identity, part, 0, steps)
        settled, is_open, may_be_lost = ledger.begun(key)
        trial = self.run_dir.name  # As tables name it; a single run is named after its folder.
        of_trial = "" if trial == self.run else f", trial {trial}"
        reservation = ledger.reserve(
            key,
            events_of(self.plan, central),
            note=f"scope {self.config.privacy.scope}{of_trial}",
            within=within,
        )
        name = hashlib.sha256(json.dumps(asdict(key)).encode()).hexdigest()[:16]
        counter = ledger.path.with_name(f"{ledger.path.stem}-{name}{STEPS_BEGUN}")
        self._counters = (counter, own / counter.name)
        counts = {place: _read_count(place) for place in self._counters if place.exists()}
        lost = (noted and may_be_lost) or None in counts.values()
        if is_open:  # Then one lies beside the ledger.
            lost |= counter not in counts or (counts[counter] or 0) < settled
        begun = max(settled, *(count or 0 for count in counts.values()), 0)
        if lost or not resumed <= begun <= key.end_step:
            _LOG.warning("how many steps began is not known any more: all %d count", key.end_step)
            begun = key.end_step
        self._write_count(begun)
        return reservation

    def commit(self, fingerprint: str, reservation: Reservation) -> int:
        """Settles what ran: all steps that ever began, by this process or one before it.

        Returns:
            How many they are.

        Raises:
            LedgerError: another process has begun the trial since.
        """
        if self._counters[0].exists():  # Else settled: the ledger refuses fewer steps than that.
            self._require_lease()
        self._ledger(fingerprint).commit(reservation, self._begun)
        self._counters[0].unlink(missing_ok=True)
        return self._begun

    def begins_block(self, step: int) -> bool:
        """Whether `count` must be called before this step: the same on all ranks."""
        first, self._counted = not self._counted, True  # A resumed run begins inside a block.
        return first or step % _BLOCK == 0 or step in self._ends

    @property
    def _ends(self) -> list[int]:
        """DP-SGD steps after which the run may be stopped."""
        return [point - self.config.warm_up_steps for point in self.config.early_steps]

    def count(self, step: int) -> None:
        """Notes that a step is about to begin, in blocks: the file is never behind.

        Raises:
            StorageError: it cannot be noted, so the step must not run.
            LedgerError: another process has begun the trial since.
        """
        self._require_lease()
        # Where the run may be stopped, no later step is noted: it would be paid in vain.
        ends = [end for end in self._ends if end > step]
        end = min(step - step % _BLOCK + _BLOCK, self.plan.dp_sgd.num_steps, *ends)
        if self._begun < end:
            self._write_count(end)

    def _write_count(self, steps: int) -> None:
        for place in self._counters:
            with storage_errors(place.parent):
                write_whole(place, f"{steps} {self._holder}".encode(), private=True)
        self._begun = steps

    def _require_lease(self) -> None:
        path = self._counters[0]
        text = path.read_text(errors="replace") if path.exists() else " nobody, as it is settled"
        if text.partition(" ")[2] not in ("", self._holder):  # Earlier versions named none.
            raise LedgerError(
                f"another process has begun '{self.run_dir}' since, or a copy of it: this one "
                "stops, and what it ran is counted there; run one of them at a time"
            )

    def remember(self, fingerprint: str) -> None:
        """Notes the source's fingerprint, so that the next run is refused before it opens it."""
        dataset = self.config.dataset
        path = _absolute(dataset.path)
        source = Source(fingerprint, path, dataset.family, self.plan.is_private)
        self._sources.remember(_source(self.config), source)

    @property
    def _sources(self) -> Sources:
        return Sources(self.folder)

    def _path(self, fingerprint: str) -> Path:
        keep_copy(self.folder, self.config.runtime.ledger_copy)  # A lost folder is back after it.
        return ledger_path(self.folder, charged_to(fingerprint, self.config.dataset.family))

    def _ledger(self, fingerprint: str) -> Ledger:
        privacy, dataset = self.config.privacy, self.config.dataset
        account = charged_to(fingerprint, dataset.family)
        terms = Terms(
            account,
            dataset.num_examples,
            privacy.target_delta,
            privacy.neighboring_relation,
            privacy.data_set_budget,
            dataset.family,
        )
        for source in self._sources.read().values():
            is_this = source.charged and source.fingerprint == fingerprint
            if is_this and source.family != dataset.family:
                raise LedgerError(
                    f"dataset.family={dataset.family!r}, but this data set was charged with "
                    f"{source.family!r} before, where its charges are: restore that; a family is "
                    "named before its first run"
                )
        single = ledger_path(self.folder, fingerprint)
        if dataset.family and traces(single):
            raise LedgerError(
                f"dataset.family={dataset.family!r}, but this data set was charged alone before, "
                f"in '{single}': leave the family out; a family is named before its first run"
            )
        path = self._path(fingerprint)
        folders = (self.charged, self.run_dir / _CHARGED)
        earlier = [mark for folder in folders if (mark := folder / account[:16]).exists()]
        notes = dict.fromkeys([*(folder / path.stem for folder in folders), *earlier])
        for parent in (Path(self.config.runtime.cache).parent, Path("runs")):
            other = ledger_path(parent / "ledger", account)
            if not other.exists() or other.resolve() == path.resolve():
                continue
            remedy = f"move '{other.stem}.*' from there to '{self.folder}'"
            if path.exists():
                remedy = f"move the one away whose charges '{path}' holds too"
            raise LedgerError(
                f"this data set has a ledger '{other}', where earlier versions kept it: set "
                f"runtime.ledger='{other.parent}', or {remedy}"
            )
        # A run or sweep that has begun must find the ledger that it was charged to, not a new one.
        known = path in self._sources.ledgers
        return Ledger.open(self.folder, terms, self.lease, [*notes], known)

    def _selection(self) -> str:
        """Identity of the selection: one begun anew under the same name is another release.

        Raises:
            ConfigError: the sweep's folder does not hold it.
        """
        path = self.charged / RELEASE_ID
        if not self.config.privacy.covers.is_secret:
            return ""
        if not path.exists():
            raise ConfigError(
                f"'{path}' is missing, which tells this selection from others: restore it, or "
                "begin the sweep under another name"
            )
        return path.read_text()


def ledger_of_run(config: Config, run_dir: Path, fingerprint: str) -> Ledger:
    """The ledger that a run was charged to.

    Args:
        fingerprint: of the data set's content, as the run's result states it.

    Raises:
        LedgerError: it is missing, damaged, or another than the run's folder or the owner noted.
    """
    account, folder = charged_to(fingerprint, config.dataset.family), Path(config.runtime.ledger)
    keep_copy(folder, config.runtime.ledger_copy)
    path = ledger_path(folder, account)
    return Ledger.at(path, [run_dir / _CHARGED / path.stem])


def _source(config: Config) -> str:
    """Digest of all that says where a data set lies and how it is read."""
    settings: dict[str, Any] = flatten(config.dataset)
    del settings["family"]  # Which decides nothing of its content.
    if config.dataset.path is not None:
        settings["path"] = _absolute(config.dataset.path)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().resolve())


def _read_count(path: Path) -> int | None:
    """What the file counts; None where it says no number of steps."""
    try:
        count = int(path.read_text().partition(" ")[0])
    except ValueError:
        return None
    return count if count >= 0 else None


def require_same_data(stated: str, found: str, config: Config) -> None:
    """Refuses data of another content than the one whose budget was reserved.

    Raises:
        DataError: it differs; what was reserved stays reserved.
    """
    if stated != found:
        raise DataError(
            f"the content of '{config.dataset.path or config.dataset.name}' differs from what it "
            "was when it was last used, or from what another machine holds (SHA-256): restore it, "
            "or put new data at another path, where it gets a ledger of its own"
        )
