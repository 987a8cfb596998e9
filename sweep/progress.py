"""One line for a whole sweep: trials done, and where the running ones are."""

import time
from typing import Any

from core.reporting import ProgressLine
from sweep.config import SweepConfig, trial_id_of


class Progress:
    """One line for the whole sweep: trials done, and where the running ones are."""

    def __init__(self, sweep: SweepConfig, total: int, before: int, secret: bool) -> None:
        """Begins the line of a sweep of `total` trials, `before` of them done earlier.

        A `secret` total is not shown.
        """
        self._sweep, self._total, self._before, self._secret = sweep, total, before, secret
        self._ended = self._failed = self._pruned = 0
        self._began = self._last_end = time.monotonic()
        self._running: dict[str, str] = {}
        self._line = ProgressLine()
        if self._before:
            self._line.keep(f"{before} of {self._of} trials had finished before")

    @property
    def _of(self) -> str:
        return "?" if self._secret else str(self._total)

    def pruned(self, point: dict[str, Any], reason: str) -> None:
        """Keeps a line about a point that was not tried."""
        self._pruned += 1
        self._line.keep(f"pruned without compute: {_short(point)}: {reason}")

    def note(self, text: str) -> None:
        """Keeps a line about the sweep."""
        self._line.keep(text)

    def moved(self, point: dict[str, Any], where: str) -> None:
        """Shows where a running trial is."""
        self._running[self._name(point)] = where
        self._show()

    def ended(self, point: dict[str, Any], text: str, failed: bool) -> None:
        """Keeps a line about a trial that has ended."""
        name = self._name(point)
        self._running.pop(name, None)
        self._ended += 1
        self._failed += failed
        self._last_end = time.monotonic()
        self._line.keep(f"trial {name} {text} ({_short(point)})")

    def _name(self, point: dict[str, Any]) -> str:
        return trial_id_of(self._sweep.trial_config(point))

    def _show(self) -> None:
        parts = [f"trials {self._before + self._ended}/{self._of}"]
        parts += [f"{self._failed} failed"] if self._failed else []
        parts += [f"{self._pruned} pruned"] if self._pruned else []
        if self._ended and not self._secret:
            each = (self._last_end - self._began) / self._ended
            since = time.monotonic() - self._last_end
            left = max(0.0, each * (self._total - self._before - self._ended) - since)
            parts.append(f"about {left / 60:.0f} min left")
        parts += [f"[{name} {where}]" for name, where in self._running.items()]
        self._line.show("  ".join(parts))

    def callback(self) -> Any:
        """What Tune calls."""
        from ray import tune

        progress, metric = self, self._sweep.objective.metric
        steps = self._sweep.run.training.num_steps

        class Callback(tune.Callback):
            def on_trial_start(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
                progress.moved(trial.config, "starting")

            def on_trial_result(
                self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **_: Any
            ) -> None:
                if "failure" in result:
                    return
                total = trial.config.get("training.num_steps", steps)
                progress.moved(trial.config, f"{result['stage']} {result['step']}/{total}")

            def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
                result = trial.last_result
                if "failure" in result:
                    progress.ended(trial.config, f"failed: {result['failure']}", failed=True)
                elif metric in result:
                    text = f"finished: {metric} {result[metric]:.4g}, {result['seconds']:.0f} s"
                    progress.ended(trial.config, text, failed=False)

            def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
                progress.ended(trial.config, "failed: its process died too often", failed=True)

            def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
                progress.note(f"trial {progress._name(trial.config)}: its process died, restarted")

        return Callback()


def _short(point: dict[str, Any]) -> str:
    """A point in one line, keys without their sections."""
    return ", ".join(
        f"{key.rsplit('.', 1)[-1]}={value:.4g}"
        if isinstance(value, float)
        else f"{key.rsplit('.', 1)[-1]}={value}"
        for key, value in point.items()
    )
