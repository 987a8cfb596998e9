"""Tells MLflow what the trials report, from the driver alone and beside the search.

Trials and their workers need neither MLflow nor a way to its server nor the credentials for it. A
server that is slow or away delays none of them.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.config import Config
from sweep.config.sweep import SweepConfig, trial_id_of
from sweep.results.claim import newest_launch
from sweep.tracking.content import Place, record_end, record_start, record_step
from sweep.tracking.outbox import Backoff, Outbox
from sweep.trials.trial import ENDS

_LOG = logging.getLogger("sweep")
_LONGEST_CLOSE = 300.0
"""Seconds in which a server that answers may catch up at the end; then the rest is kept."""


@dataclass
class _Trial:
    """One that this driver began; `seen` are the pictures that were logged."""

    name: str
    config: Config
    run_dir: Path
    box: Outbox
    seen: set[Any] = field(default_factory=set[Any])


class Recorder:
    """Records the trials of one driver in the order of their reports, in a thread of its own.

    Args:
        launch: token of the driver; once a newer one runs, nothing is recorded any more.
        note: shows a line of text to the user.
    """

    def __init__(
        self, sweep: SweepConfig, launch: int, place: Place, note: Callable[[str], None]
    ) -> None:
        self._sweep, self._launch, self._place, self._note = sweep, launch, place, note
        self._backoff = Backoff()
        self._trials: dict[str, _Trial] = {}
        self._late: deque[Outbox] = deque()  # Of trials that have ended; some may wait.
        self._refused: Exception | None = None
        self._thread = ThreadPoolExecutor(1, "mlflow")

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune stores its callbacks, but a thread cannot be stored."""
        return {}

    def started(self, number: str, point: dict[str, Any]) -> None:
        """A trial begins, or begins again after its process died.

        Args:
            number: Tune's name of the trial.
        """
        if number in self._trials:
            return
        config = self._sweep.trial_config(point)
        name = trial_id_of(config)
        run_dir = self._sweep.folder / "trials" / name
        box = Outbox(run_dir, *self._place.run_of(name), backoff=self._backoff)
        trial = self._trials[number] = _Trial(name, config, run_dir, box)
        self._record(trial, lambda: record_start(box, self._sweep, config))

    def reported(self, number: str, report: Mapping[str, Any]) -> None:
        """A trial reports a step or a score; its last report is for `ended`."""
        if report.get("stage") in (None, *ENDS):
            return
        trial = self._trials[number]
        self._record(trial, lambda: record_step(trial.box, trial.run_dir, report, trial.seen))

    def ended(self, number: str, last: Mapping[str, Any]) -> None:
        """A trial has ended.

        Args:
            last: its last report: a result, a `failure`, or another one if it was cut off.
        """
        trial = self._trials.pop(number)

        def end() -> None:
            try:
                if last.get("stage") in ENDS:
                    record_end(trial.box, self._sweep, trial.run_dir, last)
                else:
                    trial.box.finish("FAILED" if "failure" in last else "KILLED")
            except Exception:
                trial.box.finish("KILLED")  # The next driver records it again.
                raise
            finally:
                self._late.append(trial.box)

        self._record(trial, end)

    def close(self, patience: float) -> None:
        """Ends the runs of trials that were cut off; waits until all is sent, or kept in outboxes.

        Args:
            patience: seconds in which a server that does not answer is asked again.

        Raises:
            Exception: the first with which a record was refused, other than by an absent server.
        """
        for number in list(self._trials):
            self.ended(number, {})
        try:
            self._thread.submit(self._send_late, patience).result(_LONGEST_CLOSE)
        except (TimeoutError, KeyboardInterrupt) as error:
            self._backoff.give_up()  # The rest goes to the outboxes, which takes no time.
            if isinstance(error, KeyboardInterrupt):
                raise
        finally:
            self._thread.shutdown()
        if self._refused is not None:
            raise self._refused

    def _record(self, trial: _Trial, act: Callable[[], None]) -> None:
        self._thread.submit(self._act, trial, act)

    def _act(self, trial: _Trial, act: Callable[[], None]) -> None:
        """In the thread: one record; then what the server has missed of trials that ended."""
        try:
            if newest_launch(self._sweep.folder) != self._launch:
                return
            act()
            while self._late and self._late[0].flush():
                self._late.popleft()
            self._late.rotate(-1)  # What hinders one shall not hinder all.
        except Exception as error:
            _LOG.exception("trial %s: not recorded", trial.name)
            if self._refused is None:
                reason = f"{type(error).__name__}: {error}"
                self._note(f"in MLflow trial {trial.name} is not recorded whole: {reason}")
            self._refused = self._refused or error

    def _send_late(self, patience: float) -> None:
        deadline = time.monotonic() + patience
        for box in self._late:
            box.flush(max(0.0, deadline - time.monotonic()))

    def callback(self) -> Any:
        """What Tune tells about trials."""
        from ray import tune

        recorder = self

        class Callback(tune.Callback):
            def on_trial_start(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
                recorder.started(trial.trial_id, trial.config)

            def on_trial_result(
                self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **_: Any
            ) -> None:
                recorder.reported(trial.trial_id, result)

            def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
                recorder.ended(trial.trial_id, trial.last_result)

            def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
                recorder.started(trial.trial_id, trial.config)  # It may have died before.
                recorder.ended(trial.trial_id, {"failure": "its process died too often"})

        return Callback()
