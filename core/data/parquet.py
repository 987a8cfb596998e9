"""Reader of parquet files of the Hugging Face Hub."""

import importlib.util
import json
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from core.config import DatasetConfig
from core.data.images import decoded
from core.data.layout import is_hidden, plain, split_named
from core.data.records import (
    Parts,
    Records,
    Source,
    checked_labels,
    first_label,
    folder_of,
    names_of,
)
from core.errors import DataError

_BATCH = 32
"""Rows with encoded images in memory at once, in each process that decodes."""


def parquet(config: DatasetConfig) -> Source:
    """`train*.parquet` and `test*.parquet`, or files in folders of these names, below the path.

    A test split without labels (absent, null or all -1), or none, gives way to `valid*`. An image
    is a struct with its encoded `bytes`, or these alone; a label is an integer; its names are
    those that `datasets` stores.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise DataError("dataset.name=parquet needs pyarrow: pip install pyarrow")
    folder = folder_of(config)
    splits = split_files(folder)
    train = splits.get("train", [])
    held_out = [splits[name] for name in ("test", "validation") if name in splits]
    for files, name in ((train, "train*.parquet"), (held_out, "test*.parquet or valid*.parquet")):
        if not files:
            raise DataError(
                f"'{folder}' holds no {name}: put the parquet files of both splits there"
            )

    def read() -> Parts:
        test = next((files for files in held_out[:-1] if _has_labels(files, config)), held_out[-1])
        names = {path: _class_names(path, config) for path in (*train, *test)}
        known = names[train[0]]
        if odd := next((path for path, each in names.items() if each not in (known, ())), None):
            raise DataError(
                f"'{odd}' has other class names than '{train[0]}', so that its labels mean other "
                "classes: fetch both again"
            )
        labels = {path: _labels(path, config) for path in (*train, *test)}
        whole = np.concatenate([labels[path] for path in train])
        first = 0 if known else first_label(whole, config)

        def records(files: Sequence[Path]) -> Records:
            parts = [checked_labels(path, labels[path], config, first) for path in files]
            encoded = partial(_encoded, files, config)
            return Records(np.concatenate(parts), lambda: decoded(encoded, config))

        return Parts(records(train), records(test), names_of(known, config, first))

    return Source((*train, *(path for files in held_out for path in files)), read)


def likely_columns(folder: Path) -> dict[str, str]:
    """Keys of the two columns that are the only ones of encoded images or of integers."""
    from pyarrow import types

    files = [path for split in split_files(folder).values() for path in split]
    if not files:
        return {}
    schema = _opened(files[0]).schema_arrow

    def encodes(kind: Any) -> bool:
        return types.is_binary(kind) or (
            types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        )

    found = {
        "image_column": [each.name for each in schema if encodes(each.type)],
        "label_column": [each.name for each in schema if types.is_integer(each.type)],
    }
    return {key: names[0] for key, names in found.items() if len(names) == 1}


def split_files(folder: Path) -> dict[str, list[Path]]:
    """The files of each split, by the first word of their names or of a folder around them.

    Raises:
        DataError: those of a split lie in several places, as copies or other configurations do.
    """
    found: dict[str, list[Path]] = {}
    places: dict[str, set[str]] = {}
    for path in sorted(folder.rglob("*"), key=lambda path: [plain(part) for part in path.parts]):
        place = path.relative_to(folder)
        if path.suffix.lower() != ".parquet" or any(map(is_hidden, place.parts)):
            continue
        for part in (place, *place.parents[:-1]):
            word = re.split("[^a-z]", part.name.lower(), maxsplit=1)[0]
            if (split := split_named(word)) and path.is_file():
                found.setdefault(split, []).append(path)
                places.setdefault(split, set()).add(str(folder / part.parent / f"{word}*"))
                break
    for split, several in places.items():
        if len(several) > 1:
            raise DataError(
                f"'{min(several)}' and '{max(several)}' both hold a {split} split, so that images "
                "may count twice: let dataset.path name one, or put all files of a split together"
            )
    return found


def _opened(path: Path) -> Any:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(path)
    except (ArrowException, OSError) as error:
        raise DataError(f"'{path}' is no readable parquet file ({error}): fetch it again") from None


def _open(path: Path, column: str, key: str) -> Any:
    file = _opened(path)
    if column not in file.schema_arrow.names:
        raise DataError(
            f"'{path}' has no column '{column}': set {key} to one of "
            f"{', '.join(file.schema_arrow.names)}"
        )
    return file


def _class_names(path: Path, config: DatasetConfig) -> tuple[str, ...]:
    """The names that `datasets` stores with the schema; none without."""
    column = config.label_column
    stored = _open(path, column, "dataset.label_column").schema_arrow.metadata or {}
    try:
        names = json.loads(stored[b"huggingface"])["info"]["features"][column]["names"]
        return tuple(str(name) for name in names)
    except (KeyError, TypeError, ValueError):
        return ()


def _column(path: Path, config: DatasetConfig) -> Any:
    from pyarrow import ArrowException

    column = config.label_column
    file = _open(path, column, "dataset.label_column")
    try:
        return file.read(columns=[column]).column(column)
    except (ArrowException, OSError) as error:
        raise DataError(f"'{path}' is damaged ({error}): fetch it again") from None


def _has_labels(files: Sequence[Path], config: DatasetConfig) -> bool:
    for path in files:
        file = _open(path, config.image_column, "dataset.image_column")
        named = config.label_column in file.schema_arrow.names
        if named and {*_column(path, config).unique().to_pylist()} - {-1, None}:
            return True
    return False


def _labels(path: Path, config: DatasetConfig) -> np.ndarray:
    column = _column(path, config)
    labels = column.to_numpy()
    if labels.dtype.kind not in "iub":
        held = f"{column.null_count} rows without a value" if column.null_count else column.type
        raise DataError(
            f"column '{config.label_column}' of '{path}' holds {held} and not an integer in each "
            "row: set dataset.label_column to that of the class numbers"
        )
    return labels.astype(np.int64)


def _encoded(files: Sequence[Path], config: DatasetConfig) -> Iterator[tuple[str, bytes]]:
    from pyarrow import ArrowException

    column = config.image_column
    for path in files:
        row = 0
        try:
            file = _open(path, column, "dataset.image_column")
            for batch in file.iter_batches(batch_size=_BATCH, columns=[column]):
                for value in batch.column(0).to_pylist():
                    content = value.get("bytes") if isinstance(value, dict) else value
                    if not isinstance(content, bytes):
                        raise DataError(
                            f"row {row} of '{path}' holds no encoded image in column '{column}': "
                            "remove the row, or set dataset.image_column"
                        )
                    yield f"{path}, row {row}", content
                    row += 1
        except (ArrowException, OSError) as error:
            raise DataError(f"'{path}' is damaged ({error}): fetch it again") from None
