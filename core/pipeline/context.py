"""The state that the parts of one run share, and its tie to the sweep that it is a trial of."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core import distributed
from core.config import Config
from core.device import config_device
from core.io.terminal import Report, report_line
from core.pipeline.identity import Identity
from core.privacy.keys import KeyedStream, MasterSecret
from core.privacy.ledger.account import Account, Spending
from core.privacy.ledger.ledger import Reservation
from core.privacy.plan.plan import PrivacyPlan
from core.record.folder import MetricsLog, Result, RunFolder
from core.training.checkpoint import Checkpoints

_LOG = logging.getLogger("core")


@dataclass(frozen=True)
class SweepLink:
    """What a run takes from the sweep that it is a trial of; a single run takes nothing.

    Attributes:
        lease: token of the driver that started this; the ledger refuses older ones of a sweep.
        account: passes what the run asks of its account on to whoever keeps the sweep's ledgers.
        charged: folder in which the trials note that their data set's ledger was begun.
        shared: folder of a sweep whose trials with the same central images have them from one
            release, which is charged once, and share one warm-up; None: the run has its own.
        should_continue: asked on rank 0 after each early score, with the share of the steps that
            are done; a run that is stopped by it pays for what it ran.
        in_danger: asked on rank 0 after each step of training: whether a machine of the run is
            about to be taken away, so that its state is kept at once; None: nobody knows.
        measure: gives what each line of `metrics.jsonl` holds beside the report.
        reading: told how far the data are read, by the one rank that does; None: the run's report.
        keep: called on rank 0 before the run is charged, and whenever its folder holds something
            that must outlast its machine, as it may not be drawn twice or is gone on from.
    """

    lease: int | None = None
    account: Callable[[Spending], Account] = lambda own: own
    charged: Path | None = None
    shared: Path | None = None
    should_continue: Callable[[float], bool] = lambda _: True
    in_danger: Callable[[], bool] | None = None
    measure: Callable[[], dict[str, float]] = dict
    reading: Report | None = None
    keep: Callable[[], None] = lambda: None


ALONE = SweepLink()
"""Of a run that is no trial."""


class Reporter:
    """Tells the supervisor and, where a log was begun, writes into that; called on all ranks."""

    def __init__(self, report: Report, num_steps: int, link: SweepLink = ALONE) -> None:
        self._report, self._num_steps, self._measure = report, num_steps, link.measure
        self.reading = link.reading or report
        self._notes: list[str] = []
        self._log: MetricsLog | None = None

    def note(self, notes: Sequence[str]) -> None:
        """Says something in the log, and in the next report."""
        self._notes += notes
        for note in notes if distributed.rank() == 0 else ():
            _LOG.warning(note)

    def begin_log(self, folder: RunFolder, step: int) -> None:
        """Keeps reports from now on; earlier ones of later steps than `step` will come again."""
        if distributed.rank() == 0:
            self._log = MetricsLog(folder, step)
            _LOG.info("begins after step %d of %d", step, self._num_steps)

    def tell(self, metrics: dict[str, Any]) -> None:
        """Tells the supervisor alone."""
        notes, self._notes = self._notes, []
        self._report({**metrics, "note": "; ".join(notes)} if notes else metrics)

    def __call__(self, metrics: dict[str, Any]) -> None:
        """Keeps a report, and tells it."""
        if self._log is not None:
            workers = distributed.world_size()  # Which may change on a resumption.
            self._log({**metrics, "workers": workers, **self._measure()})
            _LOG.info(report_line(metrics, self._num_steps))
        self.tell(metrics)


@dataclass(frozen=True)
class Run:
    """One run, on one rank.

    Attributes:
        fingerprint: of the data's content.
        master: root of all keys.
        name: of the sweep or the single run, in the ledger.
        began: by the monotonic clock.
        reservation: what it was charged; None before, and without privacy.
        reached: stage and step of the checkpoint from which it goes on.
    """

    config: Config
    plan: PrivacyPlan
    folder: RunFolder
    identity: Identity
    account: Account
    fingerprint: str
    master: MasterSecret
    name: str
    report: Reporter
    link: SweepLink
    began: float
    reservation: Reservation | None = None
    reached: tuple[str, int] = ("", 0)

    @property
    def device(self) -> str:
        """`cpu` or `cuda`."""
        return config_device(self.config)

    @property
    def deadline(self) -> float:
        """By the monotonic clock."""
        return self.began + (self.config.runtime.max_seconds or math.inf)

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.began

    @property
    def checkpoints(self) -> Checkpoints:
        """Its latest state."""
        identity, keep = self.identity, self.link.keep
        return Checkpoints(
            self.folder.checkpoints, identity.run, changed=identity.changed, keep=keep
        )

    def stream(self, stage: str, purpose: str) -> KeyedStream:
        """Secret random numbers, to be asked for only where they are used."""
        trial = self.identity.central if stage == "central_images" else self.identity.run
        key = self.master.derive(
            fingerprint=self.fingerprint, trial=trial, stage=stage, purpose=purpose
        )
        return KeyedStream(key)

    def count(self, step: int) -> None:
        """Notes that a DP-SGD step is about to begin; on all ranks, as all stop where it fails."""
        if self.account.begins_block(step):
            distributed.on_rank_0(lambda: self.account.count(step))

    def commit(self) -> int:
        """Settles the steps that ever began; returns how many, on rank 0.

        Without a collective operation: it runs in a `finally`, where other ranks may be gone.
        """
        if self.reservation is None or distributed.rank() != 0:
            return 0
        return self.account.commit(self.fingerprint, self.reservation)

    def end(
        self, report: dict[str, Any], metrics: Sequence[str], scored: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Keeps how the run ended, tells and returns it.

        Args:
            report: the last one; that of rank 0 counts.
            metrics: names in it, or in earlier reports, whose privacy is kept with it.
            scored: how its scores were computed.
        """
        report = distributed.broadcast_object(report)  # One clock: that of rank 0.
        tags = {metric: self.plan.tag(metric) for metric in metrics}
        result = Result(report, self.identity.run, self.fingerprint, self.name, tags, scored)
        distributed.on_rank_0(lambda: self.folder.end(result))
        if not self.config.runtime.keep_checkpoints:
            distributed.on_rank_0(self.folder.drop_checkpoints)
        self.report(report)
        return report
