"""What a run leaves and shows: metrics.jsonl, progress lines; without torch, as drivers use it."""

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from core.io.files import to_json, write_json

NON_PRIVATE = "non_private"
"""Folder of a run for its owner's eyes: real images and attacks. Neither bundle nor MLflow may
hold it."""
SELECTED = "selected.json"
"""What a complete sweep leaves in the folder of its best trial: the objective that chose it."""
FAILED = "failed.json"
"""What a run leaves that met numbers that are not finite, and would meet them again: the error."""
CLASSES = "classes.json"
"""What a run and whatever holds its generator say of their labels: the names, in order."""
Report = Callable[[dict[str, Any]], None]


class MetricsLog:
    """Appends reports to `metrics.jsonl`; a resumed run first drops what it will repeat."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if _step_of(line) <= resumed_step]
        path.write_text("".join(line + "\n" for line in kept))
        self._file = path.open("a")

    def __call__(self, metrics: Mapping[str, Any]) -> None:
        """Appends one line."""
        self._file.write(to_json(metrics) + "\n")
        self._file.flush()


def _step_of(line: str) -> float:
    """Step of a line; infinite for one that was cut off or comes again after every resumption."""
    try:
        metrics = json.loads(line)
        return math.inf if metrics["stage"] == "evaluation" else metrics["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


@contextmanager
def log_to(name: str, path: Path) -> Iterator[None]:
    """Appends what the logger of that name is told to a file, with the time, until the block ends.

    Privacy: losses and scores among it are not private; the file stays in the run's folder.
    """
    logger = logging.getLogger(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield
    except BaseException as error:
        logger.error("stopped by %s: %s", type(error).__name__, error)
        raise
    finally:
        logger.removeHandler(handler)
        handler.close()


class ProgressLine:
    """One line that is written over on a terminal; elsewhere sparse lines of their own.

    Args:
        verbosity: -1 shows nothing, 0 as above, 1 every line, each on its own.
        interval: seconds between lines that are not on a terminal.
    """

    def __init__(self, verbosity: int = 0, interval: float = 10.0) -> None:
        self._verbosity = verbosity
        self._interval = 0.0 if verbosity > 0 else interval
        self._printed = -math.inf
        self._over = sys.stderr.isatty() and verbosity == 0

    def show(self, text: str, important: bool = False) -> None:
        """Shows `text`; not on a terminal, only if `important` or the interval has passed."""
        now = time.monotonic()
        if self._verbosity < 0:
            return
        if self._over:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
        elif important or now - self._printed >= self._interval:
            self._printed = now
            print(text, file=sys.stderr, flush=True)

    def keep(self, text: str) -> None:
        """Prints `text` as a line that stays."""
        if self._verbosity >= 0:
            print(f"\r\033[K{text}" if self._over else text, file=sys.stderr, flush=True)


class Console:
    """The progress of one run, with the time left.

    Args:
        verbosity: as of `ProgressLine`.
    """

    def __init__(self, total_steps: int, verbosity: int = 0) -> None:
        self._total = total_steps
        self._line = ProgressLine(verbosity)
        self._start: tuple[float, int] | None = None
        self._stage = ""

    def __call__(self, metrics: dict[str, Any]) -> None:
        """Shows `step`, `stage` and, where given, `loss` and a `note`."""
        now, step, stage = time.monotonic(), int(metrics["step"]), str(metrics["stage"])
        changed = stage != self._stage
        if changed:
            self._start, self._stage = (now, step), stage
        assert self._start is not None
        text = report_line(metrics, self._total)
        done = step - self._start[1]
        if done > 0 and stage == "private_training":
            left = (now - self._start[0]) / done * (self._total - step)
            text += f"  about {left:.0f} s of training left"
        if "note" in metrics:
            self._line.keep(metrics["note"])
        if stage == "done":
            self._line.keep(text)
        else:
            self._line.show(text, important=changed)


def report_line(metrics: Mapping[str, Any], total_steps: int) -> str:
    """Stage, step and, where given, loss of a report, as one line."""
    parts = [f"{metrics['stage']:<17} step {metrics['step']}/{total_steps}"]
    parts += [f"loss {metrics['loss']:.4f}"] if "loss" in metrics else []
    return "  ".join(parts)


def write_class_names(folder: Path, names: Sequence[str]) -> None:
    """Writes what the labels 0, 1, ... mean. The list of classes is a public constant."""
    write_json(folder / CLASSES, {"class_names": list(names)})


def class_names(folder: Path, num_classes: int) -> list[str]:
    """What the labels mean; numbers where the run is older than the file."""
    path = folder / CLASSES
    if not path.exists():
        return [str(label) for label in range(num_classes)]
    return json.loads(path.read_text())["class_names"]
