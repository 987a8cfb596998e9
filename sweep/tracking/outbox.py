"""What a tracking server has not received yet: kept in a file, sent when the server answers again.

No point of a curve is lost because MLflow is away: what cannot be sent is appended to a file beside
the trial, in order, and sent before anything newer. What is left when a sweep ends is sent by the
next run of the same command.
"""

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from core.io.files import to_json, write_whole
from sweep.tracking.client import UNREACHABLE, Tracker, is_temporary

OUTBOX = "mlflow_outbox.jsonl"
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0
"""Seconds between attempts."""


class Backoff:
    """When a server that did not answer is asked again; one for all that ask the same server."""

    def __init__(self) -> None:
        self._pause, self.next_attempt = _FIRST_PAUSE, 0.0

    def failed(self) -> None:
        """No attempt for a while; each failure doubles it."""
        self.next_attempt = max(self.next_attempt, time.monotonic() + self._pause)
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def give_up(self) -> None:
        """No attempt any more: what is not sent yet stays for the next run of the command."""
        self.next_attempt = math.inf

    def answered(self) -> None:
        """The next failure is a first one."""
        self._pause = _FIRST_PAUSE


class Outbox:
    """A `Tracker` whose calls are delayed, not refused, while the server does not answer.

    Offers every method of `Tracker` that returns nothing, such as `log_step`.

    Args:
        folder: of the sweep or the trial; in it a file holds what is not sent yet, also what an
            earlier process left.
        run: arguments of `Tracker`. The run is found anew after every failure, so that what a
            call had stored whose answer was lost is known and not stored twice.
        backoff: shared with other outboxes of the server; None: its own.

    Privacy: the file holds metrics, some of which are not private; it lies in the run's folder,
        as `metrics.jsonl` does.
    """

    def __init__(self, folder: Path, *run: Any, backoff: Backoff | None = None) -> None:
        self._path, self._run = folder / OUTBOX, run
        self._tracker: Tracker | None = None
        self._backoff = backoff or Backoff()
        if self.waiting:  # The process that wrote it may have been killed inside a line.
            whole = [line for line in self._lines() if line.endswith("\n")]
            self._rewrite(whole)

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("_") or not callable(getattr(Tracker, name, None)):
            raise AttributeError(name)
        return lambda *arguments: self._call(name, arguments)

    @property
    def waiting(self) -> bool:
        """Whether something is not sent yet."""
        return self._path.exists()

    def flush(self, patience: float = 0.0) -> bool:
        """Sends what waits, unless the last attempt has just failed; True if nothing is left.

        Args:
            patience: seconds in which failed attempts are repeated.
        """
        deadline = time.monotonic() + patience
        while self.waiting and not self._send_waiting():
            if (now := time.monotonic()) >= deadline:
                return False
            time.sleep(max(0.0, min(self._backoff.next_attempt, deadline) - now))
        return True

    def _call(self, name: str, arguments: tuple[Any, ...]) -> None:
        if not (self.flush() and self._attempt(name, arguments)):
            record = to_json([name, [_plain(each) for each in arguments]])
            # A full disk stops the workers, who say so; records are not what it should fail for.
            with contextlib.suppress(OSError):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._path.open("a") as file:
                    file.write(f"{record}\n")

    def _send_waiting(self) -> bool:
        lines = self._lines()
        for number, line in enumerate(lines):
            try:
                name, arguments = json.loads(line)
                sent = self._attempt(name, [_restored(each) for each in arguments])
            except Exception as error:  # Would fail again: the rest must not wait.
                text = f"{self._path}: {line[:60].rstrip()} was refused: {error}"
                logging.getLogger(__name__).warning(text)
                continue
            if not sent:
                if number:
                    self._rewrite(lines[number:])
                return False
        self._path.unlink()
        return True

    def _lines(self) -> list[str]:
        return self._path.read_text().splitlines(keepends=True)

    def _rewrite(self, lines: list[str]) -> None:
        write_whole(self._path, "".join(lines))

    def _attempt(self, name: str, arguments: Any) -> bool:
        if time.monotonic() < self._backoff.next_attempt:
            return False
        try:
            self._tracker = self._tracker or Tracker(*self._run)
            getattr(self._tracker, name)(*arguments)
        except UNREACHABLE as error:
            if not is_temporary(error):
                if self._tracker is not None and self._tracker.restored():
                    self._tracker = None
                    return self._attempt(name, arguments)
                raise
            self._tracker = None
            self._backoff.failed()
            return False
        self._backoff.answered()
        return True


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return {"path": str(value)}
    if isinstance(value, Mapping):
        return {
            "mapping": {k: v if isinstance(v, int | float) else str(v) for k, v in value.items()}
        }
    return value


def _restored(value: Any) -> Any:
    if isinstance(value, dict):
        return Path(value["path"]) if "path" in value else value["mapping"]
    return value
