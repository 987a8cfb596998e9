"""Image data sets of the Hugging Face hub in their parquet files."""

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from core.config import DatasetConfig
from core.data.images import decoded
from core.data.records import Records, Source, checked_labels, folder_of
from core.errors import DataError

_BATCH = 256


def parquet(config: DatasetConfig) -> Source:
    """`train*.parquet` and `test*.parquet` (or `valid*`) anywhere below `dataset.path`.

    An image is a struct with its encoded `bytes`, or these alone; a label is an integer.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise DataError("dataset.name=parquet needs pyarrow: pip install pyarrow")
    folder = folder_of(config)
    train = _files(folder, "train")
    test = _files(folder, "test") or _files(folder, "valid")
    for files, name in ((train, "train*.parquet"), (test, "test*.parquet or valid*.parquet")):
        if not files:
            raise DataError(
                f"'{folder}' holds no {name}: put the parquet files of both splits there"
            )

    def records(files: Sequence[Path]) -> Records:
        labels = [checked_labels(path, _labels(path, config), config) for path in files]
        return Records(np.concatenate(labels), lambda: decoded(_encoded(files, config), config))

    return Source((*train, *test), lambda: (records(train), records(test)))


def _files(folder: Path, prefix: str) -> list[Path]:
    return sorted(folder.rglob(f"{prefix}*.parquet"))


def _open(path: Path, column: str, key: str) -> Any:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path)
    except (ArrowException, OSError) as error:
        raise DataError(f"'{path}' is no readable parquet file ({error}): fetch it again") from None
    if column not in file.schema_arrow.names:
        raise DataError(
            f"'{path}' has no column '{column}': set {key} to one of "
            f"{', '.join(file.schema_arrow.names)}"
        )
    return file


def _labels(path: Path, config: DatasetConfig) -> np.ndarray:
    from pyarrow import ArrowException

    column = config.label_column
    file = _open(path, column, "dataset.label_column")
    try:
        labels = file.read(columns=[column]).column(column).to_numpy()
    except (ArrowException, OSError) as error:
        raise DataError(f"'{path}' is damaged ({error}): fetch it again") from None
    if labels.dtype.kind not in "iub":
        raise DataError(
            f"column '{column}' of '{path}' holds {labels.dtype} and not an integer in each row: "
            "set dataset.label_column to that of the class numbers"
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
