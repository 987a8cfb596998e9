"""Runs of a benchmark's table, kept in one file: a finished one is not run again."""

import argparse
import hashlib
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from core.config import Config, flatten, parse_overrides

ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, Any]


class Rows:
    """Rows of figures in a JSON file, each with what names it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[Row] = json.loads(path.read_text()) if path.exists() else []

    def find(self, asked: Row) -> Row | None:
        """The row that has all that is asked."""
        return next((row for row in self._rows if asked.items() <= row.items()), None)

    def add(self, row: Row) -> None:
        """Keeps a row; a stopped command never leaves half a file."""
        self._rows.append(row)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._rows, indent=1) + "\n")
        temporary.replace(self._path)


def digest_of(config: Config, search: Mapping[str, Any] | None = None) -> str:
    """Names a row's settings by those that are not at their default, wherever the data lie.

    Args:
        search: what else decides the row.
    """
    default = flatten(Config())
    changed = {key: value for key, value in flatten(config).items() if value != default[key]}
    kept = {k: v for k, v in changed.items() if k != "dataset.path" and k[:8] != "runtime."}
    text = json.dumps([kept, search] if search else kept, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def add_options(parser: argparse.ArgumentParser, out: str) -> None:
    """Options of a command that trains for hours on a real data set, and can be stopped.

    Args:
        out: name of the file that keeps its rows.
    """
    parser.add_argument("--data", required=True, help="folder with the data set's IDX files")
    parser.add_argument("--dataset", choices=("fashion_mnist", "mnist"), default="fashion_mnist")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / out)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="for all rows")


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Settings of all rows: those given, and folders of the command's own, with its ledger."""
    folder = options.out.with_suffix("").absolute()
    return parse_overrides(options.set) | {
        "dataset.path": str(Path(options.data).expanduser().absolute()),
        "runtime.cache": str(folder / f"cache-{options.dataset}"),
        "runtime.ledger": str(folder / "ledger"),
        "runtime.num_pictures": 0,
    }


def half_width(values: list[float]) -> float | None:
    """Half the width of the 95 % interval of the mean; None for a single value."""
    if len(values) < 2:
        return None
    error = statistics.stdev(values) / len(values) ** 0.5
    return float(student.ppf(0.975, len(values) - 1)) * error


def cell(values: list[float], scale: float, digits: int) -> str:
    """Mean and interval."""
    mean, half = scale * statistics.fmean(values), half_width(values)
    return f"{mean:.{digits}f}" + (f" ± {scale * half:.{digits}f}" if half is not None else "")


def effect(low: float, high: float) -> str:
    """What is said beside an interval that holds zero; else nothing."""
    return "" if low > 0 or high < 0 else ", no effect"
