"""Observers of the trials, and what Ray Tune calls to tell them all."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from ray import tune

from core.config import short_digest
from sweep.config.sweep import SweepConfig


class TrialObserver(Protocol):
    """Who is told how the trials of a driver go; a trial is named as its folder is."""

    def started(self, trial: str, point: dict[str, Any]) -> None:
        """A trial begins, or begins again after its process died.

        Args:
            point: what the search chose, by dotted key.
        """

    def reported(self, trial: str, report: Mapping[str, Any]) -> None:
        """A trial reports `stage`, `step` and numbers; last its result, or `failure`."""

    def ended(self, trial: str, last: Mapping[str, Any]) -> None:
        """A trial has ended; `last` is its last report, with `failure` if it failed."""

    def died(self, trial: str) -> None:
        """The process of a trial died; it begins again."""


class Relay(tune.Callback):
    """Tells all observers what Tune tells."""

    def __init__(self, sweep: SweepConfig, observers: Sequence[TrialObserver]) -> None:
        self._sweep, self._observers = sweep, observers
        self._names: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune stores its callbacks, but neither a terminal nor a thread can be stored."""
        return {}

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        """Tune starts a trial, or starts it again."""
        self._names[trial.trial_id] = short_digest(self._sweep.trial_config(trial.config))
        for each in self._observers:
            each.started(self._names[trial.trial_id], trial.config)

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        """Tune has a report of a trial."""
        for each in self._observers:
            each.reported(self._name(trial), result)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        """A trial has returned, or Tune has stopped it."""
        for each in self._observers:
            each.ended(self._name(trial), trial.last_result)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        """A trial is given up."""
        for each in self._observers:
            each.ended(self._name(trial), {"failure": "its process died too often"})

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        """The process of a trial died."""
        for each in self._observers:
            each.died(self._name(trial))

    def _name(self, trial: Any) -> str:
        if trial.trial_id not in self._names:  # Its process died before it began.
            self.on_trial_start(0, [], trial)
        return self._names[trial.trial_id]


class Stopper(tune.Stopper):
    """Asks, many times a second, whether the whole search must stop."""

    def __init__(self, is_over: Callable[[], bool]) -> None:
        self._is_over = is_over

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No trial is stopped alone."""
        return False

    def stop_all(self) -> bool:
        """Whether all trials must stop."""
        return self._is_over()
