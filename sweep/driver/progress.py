"""Progress of a sweep: a live table on a terminal, else plain lines; sweep.log has all."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table

from core.io.terminal import ProgressLine
from core.privacy.accounting.rounding import figure
from core.privacy.plan.scopes import STAYS_INSIDE
from core.record.early import ENDED_EARLY
from sweep.config.sweep import SweepConfig

_LOG = logging.getLogger("sweep")
_OTHER_LINES = 6
"""Lines of the table that are no trials."""


@dataclass
class _Trial:
    """A line of the table; `began` is when and at which step its stage was first seen.

    Attributes:
        num_steps: of the whole trial.
        total: what `step` counts to: these, or what the stage counts in their place.
    """

    point: dict[str, Any]
    num_steps: int
    total: int
    stage: str = ""
    step: int = 0
    score: str = ""
    began: tuple[float, int] = (0.0, 0)
    ended: bool = False

    @property
    def where(self) -> str:
        """Stage and step in words; while the data are read with the time left, too."""
        reading = self.total != self.num_steps and self.left
        return f"{self.stage} {self.step}/{self.total}" + (f", {self.left} left" if reading else "")

    @property
    def left(self) -> str:
        """Time to the end of training, or of reading, once two steps tell how long one takes."""
        done = self.step - self.began[1]
        if self.ended or done <= 0 or self.step >= self.total:
            return ""
        return _short_time((time.monotonic() - self.began[0]) / done * (self.total - self.step))


class Progress:
    """The trials of a sweep: how many are done, where the running ones are, how long it will take.

    An observer of the trials.

    Args:
        total: trials of the sweep, `before` of them done earlier.
        secret: whether the total is not shown, and what is shown must stay inside.
        verbosity: -1 shows nothing, 0 a table or sparse lines, 1 a line for each report.
    """

    def __init__(
        self, sweep: SweepConfig, total: int, before: int, secret: bool, verbosity: int = 0
    ) -> None:
        self._sweep, self._total, self._before, self._secret = sweep, total, before, secret
        self._verbosity = verbosity
        self._failed = self._pruned = self._ended = 0
        self._began = self._last_end = time.monotonic()
        self._trials: dict[str, _Trial] = {}
        self._line = ProgressLine(verbosity)
        self._console = Console(stderr=True)
        self._live: Live | None = None
        if self._console.is_terminal and verbosity == 0:
            self._live = Live(
                console=self._console,
                get_renderable=self._table,
                refresh_per_second=2,
                transient=True,
            )
            self._live.start()
        if secret:
            self.note(STAYS_INSIDE)
        if before:
            self.note(f"{before} of {self._of} trials had finished before")

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune stores the search, which tells of points that it prunes."""
        return {}

    def close(self) -> None:
        """Takes the table away; lines that were kept stay."""
        if self._live is not None:
            self._live.stop()

    @property
    def _of(self) -> str:
        return "?" if self._secret else str(self._total)

    def note(self, text: str) -> None:
        """Keeps a line about the sweep."""
        _LOG.info(text)
        if self._live is not None:
            self._console.print(text, markup=False, highlight=False)
        else:
            self._line.keep(text)

    def pruned(self, point: dict[str, Any], reason: str) -> None:
        """Keeps a line about a point that was not tried."""
        self._pruned += 1
        self.note(f"pruned without compute: {_short(point)}: {reason}")

    def started(self, trial: str, point: dict[str, Any]) -> None:
        """A trial begins, or begins again."""
        total = point.get("training.num_steps", self._sweep.run.training.num_steps)
        self._trials.setdefault(trial, _Trial(point, total, total))
        self.reported(trial, {"stage": "starting"})

    def reported(self, trial: str, report: Mapping[str, Any]) -> None:
        """Shows where a running trial is; a `note` of its report is kept."""
        if "failure" in report:
            return
        line, stage, step = self._trials[trial], report["stage"], int(report.get("step", 0))
        if "note" in report:
            self.note(f"trial {trial}: {report['note']}")
        if stage != line.stage or line.ended:
            line.began = (time.monotonic(), step)
            _LOG.info("trial %s: %s, step %d (%s)", trial, stage, step, _short(line.point))
        line.stage, line.step, line.ended = stage, step, False
        line.total = report.get("total", line.num_steps)
        if self._live is None:
            running = {name: each for name, each in self._trials.items() if not each.ended}
            parts = [f"[{n} {each.where}]" for n, each in running.items()]
            self._line.show("  ".join([self._summary(), *parts]))

    def ended(self, trial: str, last: Mapping[str, Any]) -> None:
        """Keeps a line about a trial that has ended; one that was cut off has not."""
        metrics = (*self._sweep.metrics, self._sweep.run.early_metric)
        scores = [f"{name} {last[name]:.4g}" for name in metrics if name in last]
        failed = "failure" in last
        if failed:
            text = f"failed: {last['failure']}"
        elif "seconds" in last and scores:
            how = "stopped early" if last["stage"] == ENDED_EARLY else "finished"
            text = f"{how}: {', '.join(scores)}, {last['seconds']:.0f} s"
        else:
            return
        line = self._trials[trial]
        line.ended, line.score = True, "" if failed else scores[0].split()[-1]
        line.stage = "failed" if failed else "finished"
        self._ended += 1
        self._failed += failed
        self._last_end = time.monotonic()
        self.note(f"trial {trial} {text} ({_short(line.point)})")

    def died(self, trial: str) -> None:
        """Keeps a line about a trial whose process died."""
        self.note(f"trial {trial}: its process died, restarted")

    def _summary(self) -> str:
        parts = [f"trials {self._before + self._ended}/{self._of}"]
        parts += [f"{self._failed} failed"] if self._failed else []
        parts += [f"{self._pruned} pruned"] if self._pruned else []
        if self._ended and not self._secret:
            each = (self._last_end - self._began) / self._ended
            since = time.monotonic() - self._last_end
            left = each * (self._total - self._before - self._ended) - since
            # Once a trial takes longer than those before, nothing tells how much.
            parts += [f"about {_short_time(left)} left"] if left > 0 else []
        return "  ".join(parts)

    def _table(self) -> Table:
        """The running trials, and above them as many of the ended ones as there is room for."""
        table = Table(
            box=box.SIMPLE, title=f"{self._sweep.name}  {self._summary()}", title_justify="left"
        )
        for name in ("trial", "stage"):
            table.add_column(name)
        for name in ("step", self._sweep.objective.metric, "left"):
            table.add_column(name, justify="right")
        ended = [item for item in self._trials.items() if item[1].ended]
        running = [item for item in self._trials.items() if not item[1].ended]
        room = max(0, self._console.height - _OTHER_LINES - len(running))
        for name, trial in [*ended[max(0, len(ended) - room) :], *running]:
            step = f"{trial.step}/{trial.total}"
            table.add_row(name, trial.stage, step, trial.score, trial.left)
        return table


def _short_time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _short(point: dict[str, Any]) -> str:
    """A point in one line."""
    return ", ".join(f"{key}={figure(key, value)}" for key, value in point.items())
