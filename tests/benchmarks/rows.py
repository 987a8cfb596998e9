"""Runs of a benchmark's table, kept in one file: a finished one is not run again."""

import hashlib
import json
from pathlib import Path
from typing import Any

from core.config import Config, flatten

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


def digest_of(config: Config) -> str:
    """Names a row's settings by those that are not at their default, wherever the data lie."""
    default = flatten(Config())
    changed = {key: value for key, value in flatten(config).items() if value != default[key]}
    kept = {k: v for k, v in changed.items() if k != "dataset.path" and k[:8] != "runtime."}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:8]
