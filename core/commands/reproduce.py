"""`python -m core reproduce`: one published run in time slots, and its row in RESULTS.md."""

import argparse
import platform
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

from core.commands.run import run_dir_of
from core.config import Config, load, parse_overrides, short_digest
from core.device import config_device
from core.errors import ConfigError, StoppedError
from core.io.files import read_json, write_json
from core.pipeline.single import run
from core.privacy.accounting.rounding import upward
from core.record.folder import RunFolder

PRESETS = Path(__file__).parents[1] / "configs"
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}
_SILENT = ("dataset.path", "runtime.")
_COLUMNS = "preset | method | epsilon (PLD) | delta | accuracy | Frechet distance | hours | device"
_COLUMNS += " | config | command"
_HEADER = f"""# Results

Each row is one run of the command beside it. Scores are computed on real images and are not
private. `fid` is of the Inception network and compares with published figures, `fid_cnn` of a small
network trained on the real images and compares with nothing else. A preset whose name ends in
`_small` is for a CPU and says nothing of the published method at full size.

| {_COLUMNS} |
|{" --- |" * (1 + _COLUMNS.count("|"))}
"""


def reproduce(options: argparse.Namespace) -> None:
    """Trains and scores a preset until the slot is over; a finished run becomes a row.

    Raises:
        StoppedError: the slot is over; the same command goes on.
        ConfigError: there is no such preset, or the budget is no time.
    """
    path, given = _preset(options.dataset), parse_overrides(options.overrides)
    limits = {"privacy.target_epsilon": options.epsilon}
    limits["runtime.max_seconds"] = seconds_of(options.budget)
    config = load(path, {**limits, **given})
    run_dir = run_dir_of(str(path), config)
    folder = RunFolder(run_dir)
    slots, finished = folder.slots, folder.evaluation.exists()
    before: list[float] = read_json(slots)["seconds"] if slots.exists() else []
    began = time.monotonic()
    try:
        result = run(config, run_dir).report
    except StoppedError:
        print(f"{sum(before) + time.monotonic() - began:.0f} s so far, in {run_dir}")
        raise
    finally:
        if run_dir.exists() and not finished:
            before = [*before, time.monotonic() - began]
            write_json(slots, {"seconds": before})
    command = _command(options.dataset, options.epsilon, options.budget, given)
    row = row_of(path.stem, config, result, sum(before), command)
    _append(options.results, row, f"| {_device(config)} | {short_digest(config)} |")
    print(f"{options.results}: {row}")


def seconds_of(budget: str) -> float:
    """`600`, `90s`, `20m` or `2h` in seconds.

    Raises:
        ConfigError: it is no positive time.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", budget.strip())
    if match is None or float(match[1]) == 0:
        raise ConfigError(
            f"the budget '{budget}' is no time: give seconds, or a number with s, m or h, as 20m"
        )
    return float(match[1]) * _UNITS[match[2]]


def row_of(
    preset: str, config: Config, result: dict[str, Any], seconds: float, command: str
) -> str:
    """One line of the table; epsilon is infinite for a run without privacy."""
    metric = next(name for name in result if name.startswith("fid"))
    cells = (
        preset,
        "dpdm" if config.method == "dp_feta" and config.is_plain else config.method,
        upward(result["epsilon"]),
        upward(config.privacy.target_delta, 6),
        f"{100 * result['accuracy']:.1f} %",
        f"{metric} {result[metric]:.4g}",
        f"{seconds / 3600:.2f}",
        _device(config),
        short_digest(config),
        f"`{command}`",
    )
    return f"| {' | '.join(cells)} |"


def _preset(name: str) -> Path:
    """The preset's file; on a machine without a GPU the small one, if there is one, and says so."""
    path, small = PRESETS / f"{name}.yaml", PRESETS / f"{name}_small.yaml"
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in PRESETS.glob("*.yaml")))
        raise ConfigError(f"there is no preset '{name}': choose of {known}")
    if torch.cuda.is_available() or not small.exists():
        return path
    print(
        f"no GPU here: {small.name} in place of {path.name}, with a small network; its row is "
        "labelled so and does not compare with published figures",
        file=sys.stderr,
    )
    return small


def _device(config: Config) -> str:
    if config_device(config) == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads, {platform.machine()}"


def _command(dataset: str, epsilon: float, budget: str, given: dict[str, Any]) -> str:
    """What to type again; folders of this machine are left out."""
    more = [f"{key}={value}" for key, value in given.items() if not key.startswith(_SILENT)]
    extra = f' SET="{" ".join(more)}"' if more else ""
    data = " DATA=FOLDER" if "dataset.path" in given else ""
    return f"make reproduce DATASET={dataset} EPSILON={epsilon:g} BUDGET={budget}{data}{extra}"


def _append(results: Path, row: str, mark: str) -> None:
    text = results.read_text() if results.exists() else _HEADER
    if mark not in text:  # The command of a finished run may be given again.
        results.write_text(f"{text}{row}\n")
