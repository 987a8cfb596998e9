"""Mirror of a sweep's folders in MLflow, kept by the driver in a thread beside the search.

What MLflow lacks is found by looking at both, so that a trial that runs, an absent server, a killed
driver and a resumed trial are one case: look again. Trials and their workers need neither MLflow
nor a way to its server; one that is slow or away delays none of them.
"""

import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.config import Config
from core.record.folder import RunFolder
from sweep.config.sweep import SweepConfig
from sweep.results.claim import newest_launch
from sweep.results.table import Row
from sweep.tracking.client import (
    UNREACHABLE,
    Tracker,
    is_temporary,
    kill_stale,
    known_runs,
    reason,
    status_of,
)
from sweep.tracking.content import last_step, tell_summary, tell_sweep, tell_trial
from sweep.tracking.store import find_experiment

_LOG = logging.getLogger("sweep")
_INTERVAL = 3.0
"""Seconds between two looks at the folders: what trials reported meanwhile is one call each."""
_LONGEST_PAUSE = 30.0
"""Seconds after which a server that is away is asked again; at first one, then doubled."""
_LONGEST_CLOSE = 300.0
"""Seconds in which a server that answers may catch up at the end."""

_WHOLE = ("FINISHED", "STOPPED", "DELETED")


def lacking(sweep: SweepConfig, rows: Sequence[Row], uri: str) -> tuple[list[Row], bool]:
    """Trials of which MLflow does not have all, and whether it lacks something of the sweep itself.

    What was deleted stays so, unless something is still written to it.
    """
    known = known_runs(uri, sweep.experiment, sweep.name)

    def lacks(row: Row) -> bool:
        run = known.get(f"{sweep.name}/{row.trial}")
        status = status_of(run) if run is not None else ""
        if row.state in ("finished", "stopped") or status in _WHOLE:
            return status not in _WHOLE
        if run is None or status not in ("FAILED", "KILLED"):
            return True
        return run.data.metrics.get("step", -1) < last_step(row.run_dir)

    parent = known.get(sweep.name)
    return [row for row in rows if lacks(row)], parent is None or status_of(parent) not in _WHOLE


@dataclass
class _Watched:
    """A run of MLflow that may lack something.

    Attributes:
        folder: that `tell` reads.
        tell: logs all that there is; ends the run with the status it is given, if any.
        status: with which the run ends; empty while it goes on.
        seen: state of the folder when it was told last.
        refused: whether MLflow refused it, and would again.
    """

    folder: Path
    tell: Callable[[Tracker, str], None]
    status: str = ""
    tracker: Tracker | None = None
    seen: Any = ()
    refused: bool = False

    def state(self) -> Any:
        """Of the file that grows while a trial runs."""
        try:
            found = RunFolder(self.folder).metrics.stat()
        except FileNotFoundError:
            return None
        return found.st_size, found.st_mtime_ns


class Mirror:
    """Brings MLflow up to date; an observer of the trials.

    Args:
        launch: token of the driver; once a newer one runs, nothing is told any more.
        total: trials of the sweep.
    """

    def __init__(self, sweep: SweepConfig, launch: int, uri: str, total: int) -> None:
        self._sweep, self._launch, self._uri = sweep, launch, uri
        self._place: tuple[str, str] | None = None
        self._summary: Callable[[Tracker], None] = lambda _: None
        self._runs: dict[str, _Watched] = {}
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._patience, self._has_said = 0.0, False
        self.trouble = ""
        """Why MLflow lacks something at the end: the last error, or that the time was over."""
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)

        def tell(tracker: Tracker, status: str) -> None:
            tell_sweep(tracker, sweep, total)
            if status:
                self._summary(tracker)
                tracker.finish(status)

        self._parent = _Watched(sweep.folder, tell)

    def begin(self, behind: Sequence[Row]) -> None:
        """Begins with the parent, and with trials of earlier drivers."""
        self._runs[self._sweep.name] = self._parent
        for row in behind:
            self._watch(row.trial, row.config, "FAILED" if row.state == "failed" else "KILLED")
        self._thread.start()

    def started(self, trial: str, point: dict[str, Any]) -> None:
        """A trial begins, or begins again."""
        self._watch(trial, self._sweep.trial_config(point))

    def reported(self, trial: str, report: Mapping[str, Any]) -> None:
        """Nothing: its folder is looked at."""

    def ended(self, trial: str, last: Mapping[str, Any]) -> None:
        """A trial has ended; how, its folder says, unless it was cut off or failed."""
        self._end(f"{self._sweep.name}/{trial}", "FAILED" if "failure" in last else "KILLED")

    def died(self, trial: str) -> None:
        """Nothing: it begins again."""

    def summarize(self, rows: Sequence[Row], card: Mapping[str, Any] | None) -> None:
        """At the end the parent is told of these results, as of `tell_summary`."""
        self._summary = lambda tracker: tell_summary(tracker, self._sweep, rows, card)

    def close(self, patience: float, status: str) -> int:
        """Waits until all is told; ends the runs of trials that were cut off, and the parent's.

        Args:
            patience: seconds in which a server that does not answer is asked again.

        Returns:
            Runs of which MLflow still lacks something; `trouble` says why.
        """
        self.trouble, self._patience = f"it took longer than {_LONGEST_CLOSE:.0f} s", patience
        for key, each in list(self._runs.items()):
            self._end(key, each.status or "KILLED")
        self._end(self._sweep.name, status)
        self._closing.set()
        if self._runs:
            self._thread.join(_LONGEST_CLOSE)
        return len(self._runs)

    def _watch(self, trial: str, config: Config, status: str = "") -> None:
        folder = self._sweep.folder / "trials" / trial

        def tell(tracker: Tracker, status: str) -> None:
            tell_trial(tracker, self._sweep, config, folder, status)

        with self._lock:  # One of which an earlier end is not told yet goes on.
            key = f"{self._sweep.name}/{trial}"
            each = self._runs.setdefault(key, _Watched(folder, tell))
            each.status, each.refused = status, False

    def _end(self, key: str, status: str) -> None:
        with self._lock:
            if (each := self._runs.get(key)) is not None:
                each.status, each.refused = status, False

    def _work(self) -> None:
        """In the thread: looks every few seconds, at the end until all is told or refused."""
        pause, give_up_at = 1.0, math.inf
        while self._is_newest():
            closing = self._closing.is_set()
            answers = self._look(closing)
            if answers or not closing:
                give_up_at = math.inf
            elif give_up_at == math.inf:  # What is slow, but answers, uses up no patience.
                give_up_at = time.monotonic() + self._patience
            left = give_up_at - time.monotonic()
            waiting = not all(each.refused for each in list(self._runs.values()))
            if closing and (not waiting or (not answers and left <= 0)):
                return
            if answers:
                pause = 1.0
                self._closing.wait(_INTERVAL)
            else:
                (time.sleep if closing else self._closing.wait)(min(pause, max(0.0, left)))
                pause = min(2 * pause, _LONGEST_PAUSE)
        self._runs.clear()

    def _is_newest(self) -> bool:
        try:
            return newest_launch(self._sweep.folder) == self._launch
        except OSError:  # The storage is away.
            return True

    def _look(self, closing: bool) -> bool:
        """Tells what is new, the parent's end last; False as soon as MLflow does not answer."""
        with self._lock:
            trials = {key: each for key, each in self._runs.items() if each is not self._parent}
        return (
            (closing or self._tell(self._sweep.name, self._parent, ""))
            and all(self._tell(key, each, each.status) for key, each in trials.items())
            and (not closing or self._tell(self._sweep.name, self._parent, self._parent.status))
        )

    def _tell(self, key: str, each: _Watched, status: str) -> bool:
        """Brings a run up to date; False if MLflow does not answer."""
        try:
            state = each.state()
            if not each.refused and (status or each.seen != state):
                self._attempt(key, each, status)
                each.seen = state
                if status:
                    each.tracker, each.seen = None, ()  # A trial that begins again opens it again.
                    with self._lock:
                        if each.status == status:
                            del self._runs[key]
        except Exception as error:
            if isinstance(error, UNREACHABLE) and is_temporary(error):
                each.tracker = None  # What was stored whose answer was lost is then known.
                self._note(key, error)
                return False
            self._refuse(key, each, status, error)
        return True

    def _note(self, key: str, error: Exception) -> None:
        if (why := reason(error)) != self.trouble:  # Once of an outage.
            _LOG.warning("%s: MLflow does not take it: %s", key, why)
        self.trouble = why

    def _attempt(self, key: str, each: _Watched, status: str) -> None:
        if self._place is None:
            storage = Path(self._sweep.storage_path)
            experiment = find_experiment(self._uri, self._sweep.experiment, storage)
            assert experiment is not None
            parent = Tracker(self._uri, experiment.experiment_id, self._sweep.name)
            self._place = experiment.experiment_id, parent.run_id
            kill_stale(self._uri, experiment.name, parent.run_id, self._sweep.name)
        experiment_id, parent_id = self._place
        parent = () if each is self._parent else (parent_id,)
        each.tracker = each.tracker or Tracker(self._uri, experiment_id, key, *parent)
        try:
            each.tell(each.tracker, status)
        except UNREACHABLE as error:
            if is_temporary(error) or not each.tracker.restored():
                raise
            each.tracker = None  # It had been deleted.
            self._attempt(key, each, status)

    def _refuse(self, key: str, each: _Watched, status: str, error: Exception) -> None:
        each.refused = True
        self._note(key, error)
        _LOG.error("%s: not recorded whole", key, exc_info=error)
        if status and each.tracker is not None:
            with suppress(Exception):
                each.tracker.finish("KILLED")  # The next driver tells it again.
        if not self._has_said:
            self._has_said = True
            print(
                f"warning: MLflow has not recorded all of {key} ({reason(error)}): the sweep's "
                "folder holds it, and the same command tries again",
                file=sys.stderr,
            )
