"""Finder of sweeps and trials by name in a storage folder."""

import json
from collections.abc import Sequence
from pathlib import Path

from core.config import validate
from core.errors import ConfigError
from sweep.config.sweep import SweepConfig
from sweep.results.table import Row, best, load_rows

SWEEP_FILE, JOURNAL = "sweep.json", "optuna.journal"


def sweep_names(storage: Path) -> list[str]:
    """Every sweep of a storage folder, in alphabetical order."""
    return sorted(path.parent.name for path in storage.glob(f"*/{SWEEP_FILE}"))


def open_sweep(storage: Path, name: str) -> SweepConfig:
    """The sweep as it was last started, wherever its folder lies now.

    Raises:
        ConfigError: the storage folder holds no such sweep, or its file is damaged.
    """
    names = sweep_names(storage)
    if name not in names:
        held = f"one of {', '.join(names)}" if names else "none at all"
        raise ConfigError(
            f"no sweep '{name}' in '{storage}', which holds {held}: name another folder with "
            "--storage"
        )
    path = storage / name / SWEEP_FILE
    try:
        content = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"'{path}' is damaged ({error}): start the sweep again") from None
    sweep = validate(SweepConfig, content)
    return sweep.model_copy(update={"storage_path": str(storage.absolute())})


def find_trial(storage: Path, name: str) -> tuple[SweepConfig, Row]:
    """A trial by `SWEEP/TRIAL` or `TRIAL`; the trial as `best` or by the first digits of its id.

    Raises:
        ConfigError: none or several match.
    """
    sweep_name, _, trial = name.rpartition("/")
    found: list[tuple[SweepConfig, Row]] = []
    for each in [sweep_name] if sweep_name else sweep_names(storage):
        sweep = open_sweep(storage, each)
        found += [(sweep, row) for row in _matching(sweep, load_rows(sweep), trial)]
    if len(found) != 1:
        several = ", ".join(f"{sweep.name}/{row.trial}" for sweep, row in found)
        problem = f"names {len(found)} trials ({several})" if found else "names no trial"
        raise ConfigError(
            f"'{name}' {problem} in '{storage}': name one as SWEEP/TRIAL, where TRIAL is 'best' "
            "or the first digits of its id"
        )
    return found[0]


def _matching(sweep: SweepConfig, rows: Sequence[Row], trial: str) -> list[Row]:
    if trial == "best":
        winner = best(sweep, list(rows))
        return [winner] if winner else []
    return [row for row in rows if trial and row.trial.startswith(trial)]
