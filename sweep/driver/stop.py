"""Stop of a sweep in good order: trials that train keep their state first."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from core.io.terminal import counted

_GRACE_S = 20.0
"""Seconds that trials have at most; what stops a job waits for a minute."""


class Stop:
    """Asked for by a signal, or at a limit; an observer of the trials.

    Args:
        over: whether a limit is reached.
        ask: asks the trials to keep their state, see `sweep.trials.notice`.
        note: shows a line.
    """

    def __init__(
        self, over: Callable[[], bool], ask: Callable[[], None], note: Callable[[str], None]
    ) -> None:
        self._over, self._ask, self._note, self._training = over, ask, note, set[str]()
        self._signalled, self._since = False, 0.0

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune stores the search, which asks whether to go on."""
        return {}

    @contextmanager
    def at_signals(self) -> Iterator[None]:
        """Meanwhile Ctrl-C, or SIGTERM, asks for it; another one interrupts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def take_note(*_: Any) -> None:
            self._signalled = True
            for each in before:
                signal.signal(each, signal.default_int_handler)

        before = {each: signal.signal(each, take_note) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for each, answer in before.items():
                signal.signal(each, answer)

    def is_asked(self) -> bool:
        """Whether nothing new is to begin."""
        return self._signalled or self._over()

    def is_due(self) -> bool:
        """Whether all trials must end now."""
        if not self.is_asked():
            return False
        if not self._since:
            self._since = time.monotonic()
            if count := len(self._training):
                self._note(f"stopping: {counted(count, 'trial')} may keep the state until now")
                self._ask()
        return not self._training or time.monotonic() - self._since >= _GRACE_S

    def started(self, trial: str, point: dict[str, Any]) -> None:
        """A trial begins, or begins again, and does not train yet."""
        self._training.discard(trial)

    def reported(self, trial: str, report: Mapping[str, Any]) -> None:
        """A trial trains; or it has kept its state, or does something else."""
        if "loss" not in report:
            self._training.discard(trial)
        elif not self._since:
            self._training.add(trial)

    def ended(self, trial: str, last: Mapping[str, Any]) -> None:
        """A trial has nothing more to keep."""
        self._training.discard(trial)

    def died(self, trial: str) -> None:
        """The same: it begins again from what it has kept."""
        self._training.discard(trial)
