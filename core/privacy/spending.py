"""One run's dealings with the ledger: reserve before the data is opened, settle when it ends."""
# pyright: reportUnknownMemberType=false

import hashlib
import json
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.config import Config, flatten
from core.errors import ConfigError, DataError, stored
from core.privacy.ledger import Ledger, Reservation, events_of
from core.privacy.ledger_file import Key, Terms
from core.privacy.plan import PrivacyPlan
from core.privacy.scopes import run_budget

RELEASE_ID = "release_id"
"""File in the folder `charged` with the identity of the one release that a selection is."""
_SOURCES = "sources.json"
_BLOCK = 25
"""Steps that are noted together; a stopped run pays for at most so many too many."""


@dataclass
class Spending:
    """What one run asks of the ledger; used on rank 0 alone.

    The ledger of a data set is named by the fingerprint of its content, which is known without
    opening the data from the second run on: the folder remembers which source had which content.

    Args:
        folder: of the ledgers, `runtime.ledger`.
        run: name of the sweep or of the single run.
        begun: file in the run's folder that counts the DP-SGD steps that ever began.
        charged: folder in which the runs of a sweep note the data sets that they were charged to.
        lease: token of the sweep's driver, which takes the run over from older ones.
    """

    config: Config
    plan: PrivacyPlan
    folder: Path
    run: str
    begun: Path
    charged: Path
    lease: int | None = None
    _counted: bool = field(default=False, init=False)

    def known_fingerprint(self) -> str | None:
        """Fingerprint that this source had when a run opened it last."""
        return self._sources().get(self._source())

    def reserve(self, fingerprint: str, identity: str, central: str = "") -> Reservation:
        """Charges the whole plan, or finds that this run has done so before.

        Args:
            fingerprint: of the data set's content.
            identity: of the trial; masks and noise are drawn from it.
            central: identity of central images that trials of the sweep share; else empty.

        Raises:
            BudgetExceededError: the data set's budget cannot pay; nothing was opened or changed.
        """
        within = run_budget(self.config, self._selection())
        ledger = self._ledger(fingerprint)
        if self.lease is not None:
            ledger.take_over(self.run, f"{socket.gethostname()}:{os.getpid()}", self.lease)
        reservation = ledger.reserve(
            self._key(identity),
            events_of(self.plan, central),
            note=f"scope {self.config.privacy.scope}",
            within=within,
        )
        self._mark(fingerprint).parent.mkdir(parents=True, exist_ok=True)
        self._mark(fingerprint).touch()
        if not self.begun.exists():
            self._write_begun(0)
        return reservation

    def settle(self, fingerprint: str, reservation: Reservation) -> None:
        """Settles what ran: all steps that ever began, by this process or one before it."""
        self._ledger(fingerprint).commit(reservation, steps_begun(self.begun))

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
        """
        # Where the run may be stopped, no later step is noted: it would be paid in vain.
        ends = [end for end in self._ends if end > step]
        end = min(step - step % _BLOCK + _BLOCK, self.plan.dp_sgd.num_steps, *ends)
        if steps_begun(self.begun) < end:
            with stored(self.begun.parent):
                self._write_begun(end)

    def _write_begun(self, steps: int) -> None:
        self.begun.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.begun.with_suffix(".tmp")
        with temporary.open("w") as file:
            file.write(str(steps))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.begun)

    def remember(self, fingerprint: str) -> None:
        """Notes the source's fingerprint, so that the next run is refused before it opens it."""
        sources = self._sources()
        if sources.get(self._source()) != fingerprint:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = self.folder / f"{_SOURCES}.{os.getpid()}.tmp"
            temporary.write_text(json.dumps({**sources, self._source(): fingerprint}, indent=1))
            temporary.replace(self.folder / _SOURCES)

    def _sources(self) -> dict[str, str]:
        path = self.folder / _SOURCES
        return json.loads(path.read_text()) if path.exists() else {}

    def _source(self) -> str:
        settings: dict[str, Any] = flatten(self.config.dataset)
        if self.config.dataset.path is not None:
            settings["path"] = str(Path(self.config.dataset.path).expanduser().resolve())
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def _ledger(self, fingerprint: str) -> Ledger:
        privacy = self.config.privacy
        terms = Terms(
            fingerprint,
            self.config.dataset.num_examples,
            privacy.target_delta,
            privacy.neighboring_relation,
            privacy.data_set_budget,
        )
        # A run or sweep that has begun must find the ledger that it was charged to, not a new one.
        was_charged = self.begun.exists() or self._mark(fingerprint).exists()
        opened = Ledger.open_existing if was_charged else Ledger.open
        return opened(self.folder, terms, self.lease)

    def _selection(self) -> str:
        """Identity of the selection: one begun anew under the same name is another release.

        Raises:
            ConfigError: the sweep's folder does not hold it.
        """
        path = self.charged / RELEASE_ID
        if self.config.privacy.scope != "selection":
            return ""
        if not path.exists():
            raise ConfigError(
                f"'{path}' is missing, which tells this selection from others: restore it, or "
                "begin the sweep under another name"
            )
        return path.read_text()

    def _mark(self, fingerprint: str) -> Path:
        return self.charged / fingerprint[:16]

    def _key(self, identity: str) -> Key:
        return Key(self.run, identity, "all", 0, self.plan.dp_sgd.num_steps)


def steps_begun(path: Path) -> int:
    """DP-SGD steps of a run that ever began; 0 where none did."""
    return int(path.read_text()) if path.exists() else 0


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
