"""Sweeps of an experiment, each a cell that is begun once and goes on in time slots."""

import argparse
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from methods import STARTED, config_of
from rows import Row, Rows, add_options, digest_of, settings_of

from core.config import flatten, nested
from sweep import load_sweep, run_sweep
from sweep.config.grid import grid_points
from sweep.config.sweep import SweepConfig
from sweep.driver.launch import Outcome
from sweep.results.table import load_rows

LEAST = 120.0
"""Seconds of a slot in which a sweep is still begun: it takes some to start."""


@dataclass(frozen=True)
class Cell:
    """One sweep of the experiment.

    Attributes:
        asked: what names its rows: one, or one for each trial of a grid.
        content: of the sweep's file.
    """

    asked: list[Row]
    content: dict[str, Any]

    def is_done(self, kept: Rows) -> bool:
        """Whether the file of rows has all that the sweep gives."""
        return all(kept.find(row) for row in self.asked)


def parsed(document: str | None, out: str, size: float) -> argparse.Namespace:
    """The command line, of which `budget` becomes the end of the slot by the monotonic clock.

    Args:
        document: of the command.
        out: name of the file that keeps its rows.
        size: of the training, if it is not given.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # A script's background ignores it.
    parser = argparse.ArgumentParser(description=document)
    add_options(parser, out)
    text = "number of steps, in those of the preset"
    parser.add_argument("--size", type=float, default=size, help=text)
    parser.add_argument("--budget", type=float, help="minutes after which it stops, to go on later")
    options = parser.parse_args()
    options.end = time.monotonic() + 60 * options.budget if options.budget is not None else None
    return options


def make_cell(
    options: argparse.Namespace,
    names: Row,
    search: Row,
    fixed: Row,
    preset: float,
    each_trial: bool = False,
) -> Cell:
    """A sweep around the preset that starts from moments.

    Args:
        names: of the cell, beside the data set and a digest of all settings.
        search: keys of the sweep.
        fixed: keys of the run.
        preset: epsilon of the preset.
        each_trial: whether each point of a grid is a row, rather than what the sweep releases.
    """
    settings = {**fixed, **settings_of(options), "runtime.checkpoint_every": 25}
    config = config_of(options.dataset, preset, STARTED, options.size, settings)
    names = {"dataset": options.dataset, **names, "digest": digest_of(config, search)}
    content = {
        **search,
        "name": "-".join(map(str, names.values())),
        "base": nested(config),
        "workers_per_trial": 1,
        "gpus_per_worker": 0,
        "storage_path": str(options.out.with_suffix("").absolute()),
    }
    choices = {key: each["choices"] for key, each in search["search_space"].items() if each_trial}
    return Cell([names | point for point in grid_points(choices)], content)


def run_cells(
    cells: Iterable[Cell],
    kept: Rows,
    end: float | None,
    figures: Callable[[Outcome], Row] | None = None,
) -> bool:
    """Runs what is missing; whether nothing is left.

    Args:
        end: of the slot, by the monotonic clock; None: there is none.
        figures: of a complete sweep, which is one row; None: each finished trial is one.
    """
    whole = True
    for cell in cells:
        if cell.is_done(kept):
            continue
        if end is not None and end - time.monotonic() < LEAST:
            return False
        print(cell.content["name"], file=sys.stderr, flush=True)
        sweep = load_sweep(cell.content)
        outcome = _run_until(sweep, end)
        if figures is None:
            _keep_trials(cell, kept, outcome)
        elif outcome.complete:
            kept.add(cell.asked[0] | figures(outcome))
        if outcome.stopped == "interrupted":
            return False
        if not cell.is_done(kept):
            print(f"{sweep.folder} lacks trials: see its table", file=sys.stderr)
            whole = False
    return whole


def _run_until(sweep: SweepConfig, end: float | None) -> Outcome:
    """Runs a sweep or goes on with it, to its end or, as if by Ctrl-C, to that of the slot."""
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    if end is not None:
        signal.setitimer(signal.ITIMER_REAL, end - time.monotonic())
    try:
        return run_sweep(sweep)
    except KeyboardInterrupt:
        return Outcome(sweep, load_rows(sweep), "interrupted", False, "")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _keep_trials(cell: Cell, kept: Rows, outcome: Outcome) -> None:
    finished = [row for row in outcome.rows if row.state == "finished"]
    for asked in (row for row in cell.asked if kept.find(row) is None):
        for row in finished:
            values = flatten(row.config)
            if all(asked[key] == values[key] for key in outcome.sweep.search_space):
                kept.add(asked | row.scores | {"seconds": row.seconds})


def command(options: argparse.Namespace, target: str) -> str:
    """What others type to do the same."""
    seeds, settings = " ".join(map(str, options.seeds)), " ".join(options.set)
    own = f"--dataset {options.dataset} --seeds {seeds} --size {options.size:g}"
    return f"make {target} DATA=folder SET='{own}{settings and f' --set {settings}'}'"
