"""Sweeps of an experiment, each a cell that is begun once and goes on in time slots."""

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from methods import STARTED, config_of
from rows import ROOT, Row, Rows, add_options, digest_of, settings_of

from core.config import flatten, nested, yaml_subset
from core.io.files import write_whole
from sweep.config.grid import grid_points
from sweep.config.sweep import SweepConfig, load_sweep
from sweep.results.driver import running_driver, stop_driver
from sweep.results.table import load_rows

COMMAND = [sys.executable, str(ROOT / "sweep" / "run.py")]
"""Each sweep has a process of its own, so that none can take the others down."""
INTERRUPTED = 130
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
    for number in (signal.SIGINT, signal.SIGTERM):  # A script's background ignores the first.
        signal.signal(number, signal.default_int_handler)
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
    figures: Callable[[SweepConfig], Row] | None = None,
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
        code = _run_until(cell.content, end)
        sweep = load_sweep(cell.content)
        if figures is None:
            _keep_trials(cell, kept, sweep)
        elif code == 0:
            kept.add(cell.asked[0] | figures(sweep))
        if code == INTERRUPTED:
            return False
        if not cell.is_done(kept):
            print(f"{sweep.folder} lacks trials: see its table", file=sys.stderr)
            whole = False
    return whole


def _run_until(content: dict[str, Any], end: float | None) -> int:
    """Runs a sweep or goes on with it, until its end or that of the slot; its exit code."""
    folder = Path(content["storage_path"])
    _stop_orphan(folder / content["name"])
    file = folder / f"{content['name']}.yaml"
    write_whole(file, yaml_subset.dump(content))
    print(content["name"], file=sys.stderr, flush=True)
    # In a session of its own, so that Ctrl-C reaches it once, from here.
    process = subprocess.Popen(
        [*COMMAND, "--config", str(file)], stdout=sys.stderr, start_new_session=True
    )
    try:
        code = process.wait(None if end is None else end - time.monotonic())
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.send_signal(signal.SIGINT)
        process.wait()
        code = INTERRUPTED
    if code == 2:
        raise SystemExit(code)  # It has said why.
    return code


def _stop_orphan(folder: Path) -> None:
    """Stops the sweep if it still runs, as one does whose command was killed."""
    if running_driver(folder) is not None:
        stop_driver(folder)
        while running_driver(folder) is not None:
            time.sleep(0.5)


def _keep_trials(cell: Cell, kept: Rows, sweep: SweepConfig) -> None:
    finished = [row for row in load_rows(sweep) if row.state == "finished"]
    for asked in (row for row in cell.asked if kept.find(row) is None):
        for row in finished:
            values = flatten(row.config)
            if all(asked[key] == values[key] for key in sweep.search_space):
                kept.add(asked | row.scores | {"seconds": row.seconds})


def command(options: argparse.Namespace, target: str) -> str:
    """What others type to do the same."""
    seeds, settings = " ".join(map(str, options.seeds)), " ".join(options.set)
    own = f"--dataset {options.dataset} --seeds {seeds} --size {options.size:g}"
    return f"make {target} DATA=folder SET='{own}{settings and f' --set {settings}'}'"
