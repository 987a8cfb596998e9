"""Progress on the terminal, and log files."""

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Report = Callable[[dict[str, Any]], None]


def counted(number: int, noun: str) -> str:
    """A number of things in words: 1 trial, 2 trials."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


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
    except KeyboardInterrupt:
        logger.info("interrupted")
        raise
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
    """

    def __init__(self, verbosity: int = 0) -> None:
        self._verbosity = verbosity
        self._interval = 0.0 if verbosity > 0 else 10.0  # Seconds.
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
        """Shows `step`, `stage` and, where given, `total`, `loss` and a `note`."""
        now, step, stage = time.monotonic(), int(metrics["step"]), str(metrics["stage"])
        changed = stage != self._stage
        if changed:
            self._start, self._stage = (now, step), stage
        assert self._start is not None
        text = report_line(metrics, self._total)
        done = step - self._start[1]
        total = metrics.get("total", self._total)
        if done > 0 and step < total and ("total" in metrics or stage == "private_training"):
            left = (now - self._start[0]) / done * (total - step)
            text += f"  about {left:.0f} s of {'it' if 'total' in metrics else 'training'} left"
        if "note" in metrics:
            self._line.keep(metrics["note"])
        if stage == "done":
            self._line.keep(text)
        else:
            self._line.show(text, important=changed)


def report_line(metrics: Mapping[str, Any], total_steps: int) -> str:
    """Stage, step and, where given, loss of a report, as one line; `total` is of no steps."""
    done = f"step {metrics['step']}/{total_steps}"
    done = f"{metrics['step']}/{metrics['total']}" if "total" in metrics else done
    parts = [f"{metrics['stage']:<17} {done}"]
    parts += [f"loss {metrics['loss']:.4f}"] if "loss" in metrics else []
    return "  ".join(parts)
