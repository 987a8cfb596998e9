"""Reader of the handwritten digits that come with scikit-learn."""

import importlib.util
from pathlib import Path

import numpy as np

from core.config import DatasetConfig
from core.data.records import Parts, Records, Source, checked_labels, names_of
from core.errors import DataError


def digits(config: DatasetConfig) -> Source:
    """Scikit-learn's 1,797 digits of 8x8 pixels (Alpaydin and Kaynak 1998); every fifth tests."""
    if config.path is not None:
        raise DataError(
            f"dataset.name=digits reads no folder, but dataset.path='{config.path}': set "
            "dataset.name to idx or image_folder, or leave dataset.path out"
        )
    spec = importlib.util.find_spec("sklearn")  # Finds the file without the cost of the import.
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "dataset.name=digits reads a file of scikit-learn, which is not installed: "
            "pip install scikit-learn, or choose another data set"
        )
    path = Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    return Source((path,), lambda: _read(path, config))


def _read(path: Path, config: DatasetConfig) -> Parts:
    try:
        table = np.loadtxt(path, delimiter=",")
    except (OSError, ValueError) as error:
        raise DataError(f"'{path}' cannot be read ({error}): reinstall scikit-learn") from None
    pixels = np.rint(table[:, :64] * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    labels = checked_labels(path, table[:, 64].astype(np.int64), config)
    test = np.arange(len(labels)) % 5 == 0
    return Parts(
        Records(labels[~test], lambda: iter(pixels[~test])),
        Records(labels[test], lambda: iter(pixels[test])),
        names_of((), config),
    )
