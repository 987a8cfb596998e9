"""Survey of a folder of images: layout, classes, counts, sizes, and a few images to look at."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.config import DatasetConfig, validate
from core.config.schema import MOST_CLASSES
from core.data import READERS
from core.data.cache import check_parts, told
from core.data.folders import INDEX, num_class_folders
from core.data.idx import found_files
from core.data.images import SUFFIXES
from core.data.layout import is_hidden, listing
from core.data.parquet import likely_columns, split_files
from core.data.records import Parts, Source, Split, fit
from core.errors import DataError
from core.io.terminal import Report

_SIGNS = (
    ("cifar10", ("cifar-10-batches-py",)),
    ("cifar100", ("cifar-100-python",)),
    ("eurosat", ("eurosat/2750",)),
    ("celeba", ("celeba/img_align_celeba",)),
    ("celeba", ("img_align_celeba",)),
    ("camelyon17", ("metadata.csv", "patches")),
)
"""What lies, all of it, below the folder of a published data set."""
_SHOWN, _SHOWN_CLASSES = 8, 20
"""Images of a class, and classes, that are kept to look at."""
_LARGEST = 512
"""Side to which they are scaled: 160 photographs as they are stored fill a memory."""


@dataclass(frozen=True)
class Survey:
    """What lies in a folder. All of it is private until its owner publishes it.

    Attributes:
        config: how to read it, with the counts; `image_size` is left at its default.
        class_names: of label 0, 1, ...
        train, test: labels, int64 `[N]`.
        sizes: images by width and height as stored.
        samples: some training images with their labels, uint8 `[C, H, W]` each, of photographs the
            central square at the largest size of a run.
        source: where it lies.
    """

    config: DatasetConfig
    class_names: tuple[str, ...]
    train: np.ndarray
    test: np.ndarray
    sizes: Counter[tuple[int, int]]
    samples: list[tuple[np.ndarray, int]]
    source: Source

    def picture(self, side: int) -> Split:
        """The samples, cropped and resized as a run sees them at this side."""
        images = [fit(torch.from_numpy(image.copy()), side) for image, _ in self.samples]
        return Split(torch.stack(images), torch.tensor([label for _, label in self.samples]))


def survey(path: Path, settings: Mapping[str, Any], report: Report) -> Survey:
    """Reads every image once, which finds damaged and odd ones before anything is planned.

    Args:
        path: folder, or one around it that holds nothing else.
        settings: keys of the section `dataset` that are known beforehand.
        report: as of `load_dataset`.

    Raises:
        DataError: no known layout lies there, or something in it is damaged or ambiguous.

    Privacy: for the owner alone. Nothing is charged, as nothing of it may be used unless the
        owner publishes it.
    """
    folder = path.expanduser().absolute()
    facts = {"path": str(folder), "name": "image_folder", **settings}
    if "name" not in settings and folder.is_dir():
        folder = _unwrapped(folder)
        facts |= {"path": str(folder), "name": layout_of(folder)}
    if facts["name"] == "parquet":
        facts = {**likely_columns(folder), **facts}
    facts["num_classes"] = _num_classes(facts)
    source, parts, channels = _readable(facts)
    facts |= {"channels": channels, "num_examples": len(parts.train.labels)}
    config = validate(DatasetConfig, facts)
    check_parts(parts, source, config)
    sizes: Counter[tuple[int, int]] = Counter()
    samples: list[tuple[np.ndarray, int]] = []
    shown: Counter[int] = Counter()
    total, done = len(parts.train.labels) + len(parts.test.labels), 0
    for records in (parts.train, parts.test):
        for label, image in zip(
            records.labels.tolist(),
            told(records.images(), "reading", total, report, done),
            strict=True,
        ):
            sizes[(image.shape[-1], image.shape[-2])] += 1
            if records is parts.train and label < _SHOWN_CLASSES and shown[label] < _SHOWN:
                samples.append((_small(image.reshape(channels, *image.shape[-2:])), label))
                shown[label] += 1
        done += len(records.labels)
    names, (train, test) = parts.class_names, (parts.train.labels, parts.test.labels)
    return Survey(config, names, train, test, sizes, samples, source)


def _small(image: np.ndarray) -> np.ndarray:
    if max(image.shape[-2:]) <= _LARGEST:
        return image
    side = min(_LARGEST, *image.shape[-2:])
    return fit(torch.from_numpy(image.copy()), side).numpy()


def layout_of(folder: Path) -> str:
    """`dataset.name` of what lies in a folder; `image_folder` where nothing tells another."""
    for name, signs in _SIGNS:
        if all((folder / sign).exists() for sign in signs):
            return name
    if found_files(folder):
        return "idx"
    inside = {
        path.suffix.lower()
        for path in folder.rglob("*")
        if not any(map(is_hidden, path.relative_to(folder).parts))
    }
    if ".parquet" in inside and ("train" in split_files(folder) or inside.isdisjoint(SUFFIXES)):
        return "parquet"  # Else it tells of the pictures.
    return "image_folder"


def _unwrapped(folder: Path) -> Path:
    """The folder, or the only one in it, as archives unpack, if that is more than a class."""
    folders, files = listing(folder)
    if files or len(folders) != 1 or layout_of(folder) != "image_folder":
        return folder
    inner = folders[0]
    is_more = listing(inner)[0] or (inner / INDEX).is_file() or layout_of(inner) != "image_folder"
    return _unwrapped(inner) if is_more else folder


def _num_classes(facts: Mapping[str, Any]) -> int:
    """Classes by folders or names, or by the labels, which begin with 0 or with 1."""
    widest = validate(DatasetConfig, {**facts, "num_classes": MOST_CLASSES})
    if (folders := num_class_folders(widest)) is not None:
        if not folders:
            raise DataError(
                f"'{facts['path']}' holds neither a folder for each class, as cat/001.png, nor "
                "another known layout: `core/configs/README.md` lists them"
            )
        return folders
    parts = READERS[widest.name](widest).read()
    named = sum(name != str(label) for label, name in enumerate(parts.class_names))
    labels = parts.train.labels
    if not len(labels):
        raise DataError(f"'{facts['path']}' holds no training image: name another folder")
    return max(named, int(labels.max()) + int(labels.min() == 0))


def _readable(facts: Mapping[str, Any]) -> tuple[Source, Parts, int]:
    """Source, records and channels: those with which the first image can be read."""
    problem: DataError | None = None
    for channels in (3, 1):
        config = validate(DatasetConfig, {**facts, "channels": channels})
        source = READERS[config.name](config)
        parts = source.read()
        try:
            first = next(iter(parts.train.images()), None)
        except DataError as error:
            problem = problem or error
            continue
        if first is not None and (1 if first.ndim == 2 else len(first)) == channels:
            return source, parts, channels
    raise problem or DataError(
        f"'{facts['path']}' holds no training image of 1 or 3 channels: add some, or convert them"
    )
