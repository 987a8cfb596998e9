"""Writes pictures in folders, and what their readers are asked."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.config import DatasetConfig
from core.data import load_dataset
from core.errors import DataError


def config(folder: Path | None, **changes: object) -> DatasetConfig:
    settings = {"name": "idx", "image_size": 6, "num_classes": 3, "num_examples": 30} | changes
    return DatasetConfig(path=None if folder is None else str(folder), **settings)  # type: ignore[arg-type]


def refuses(settings: DatasetConfig, *parts: str | Path) -> None:
    """The error is one sentence that holds all `parts` in this order."""
    pattern = ".*".join(re.escape(str(part)) for part in parts)
    with pytest.raises(DataError, match=pattern) as caught:
        load_dataset(settings)
    assert "\n" not in str(caught.value)


def picture(path: Path, array: np.ndarray, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array.astype(np.uint8)).save(path, **options)


def write_folder(folder: Path, classes: int = 2, each: int = 20, colour: bool = False) -> None:
    shape = (6, 6, 3) if colour else (6, 6)
    for label in range(classes):
        for number in range(each):
            pixels = np.full(shape, 100 * label + number)
            picture(folder / f"class{label}" / f"{number:03}.png", pixels)


def folder_config(folder: Path, **changes: object) -> DatasetConfig:
    facts = {"name": "image_folder", "num_classes": 2, "num_examples": 35}  # Of `write_folder`.
    return config(folder, **facts | changes)
