"""Flat record of a trial for scripts, tables of other programs, and comparisons."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.config import flatten
from core.config.metrics import DIRECTIONS
from core.errors import ConfigError
from core.io.files import to_json
from sweep.config.sweep import SweepConfig
from sweep.results.replicates import FIGURES
from sweep.results.table import Row, setting_figures

if TYPE_CHECKING:
    import pandas

FORMATS = (".csv", ".json", ".parquet")


def record(row: Row) -> dict[str, Any]:
    """State, scores (None where there is none), costs and every key of the configuration."""
    return {
        "trial": row.trial,
        "state": row.state,
        **{name: row.scores.get(name) for name in DIRECTIONS},
        "early_score": row.early_score,
        "epsilon": row.epsilon,
        "epsilon_central": row.plan.epsilon_central,
        "epsilon_frequency": row.plan.epsilon_frequency,
        "noise_multiplier": row.plan.noise_multiplier,
        "seconds": row.seconds,
        "error": row.error,
        "run_dir": str(row.run_dir),
        **flatten(row.config),
    }


def records(sweep: SweepConfig, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Those of all trials, each with the mean score of its setting (None without replicates)."""
    figures, none = setting_figures(sweep, rows), dict.fromkeys(FIGURES)
    return [{**record(row), **none, **figures.get(row.trial, {})} for row in rows]


def frame(sweep: SweepConfig, rows: Sequence[Row]) -> "pandas.DataFrame":
    """One line a trial, as of `records`."""
    import pandas

    return pandas.DataFrame(records(sweep, rows))


def differences(first: Row, second: Row) -> dict[str, tuple[Any, Any]]:
    """What differs between two trials by key, but for where they lie."""
    a, b = record(first), record(second)
    return {
        key: (a[key], b[key])
        for key in a
        if a[key] != b[key] and key not in ("trial", "run_dir") and not key.startswith("runtime.")
    }


def export(sweep: SweepConfig, rows: Sequence[Row], path: Path) -> None:
    """Writes one record a trial, in the format that the suffix names.

    Raises:
        ConfigError: the suffix is none of csv, json and parquet.

    Privacy: the records hold scores, which are not private.
    """
    if path.suffix not in FORMATS:
        raise ConfigError(f"--out {path} must end in one of {', '.join(FORMATS)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(to_json(records(sweep, rows), indent=2) + "\n")
    elif path.suffix == ".csv":
        frame(sweep, rows).to_csv(path, index=False)
    else:
        frame(sweep, rows).to_parquet(path, index=False)
