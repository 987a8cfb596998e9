"""Data sets of one file for each image: a folder of classes, EuroSAT, CelebA, Camelyon17."""

import csv
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from core.config import DatasetConfig
from core.data.images import SUFFIXES, decoded
from core.data.published import digests_of, read_published
from core.data.records import Records, Source, checked_labels, existing, folder_of
from core.errors import DataError

Items = Sequence[tuple[Path, int]]
_EUROSAT_TEST, _EUROSAT = 4000, 27000
_CAMELYON_TEST_CENTER, _CAMELYON_VALIDATION_CENTER = 2, 1


def image_folder(config: DatasetConfig) -> Source:
    """`class/name.png`, below `train/` and `test/` or with a fixed fifth, by name, as test."""
    folder = folder_of(config)
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        train, test = (
            _list_classes(folder / "train", config),
            _list_classes(folder / "test", config),
        )
        names = [{path.parent.name for path, _ in items} for items in (train, test)]
        if odd := sorted(names[0] ^ names[1]):
            raise DataError(
                f"class folder '{odd[0]}' of '{folder}' is not in both train and test: give both "
                "the same classes"
            )
    else:
        everything = _list_classes(folder, config)
        held_out = [_digest_of_name(folder, path) % 5 == 0 for path, _ in everything]
        train, test = _parted(everything, held_out)
    return _source(train, test, folder, config)


def eurosat(config: DatasetConfig) -> Source:
    """The 27,000 RGB tiles of EuroSAT (Helber et al. 2019), as torchvision stores them.

    It has no published split: the 4,000 of 27,000 tiles whose names have the smallest SHA-256
    test, the other 23,000 train, as many as in DPImageBench (Gong et al. 2025).
    """
    folder = existing(folder_of(config) / "eurosat" / "2750", config)
    everything = _list_classes(folder, config)
    ranks = np.argsort(np.argsort([f"{_digest_of_name(folder, p):064x}" for p, _ in everything]))
    num_test = len(everything) * _EUROSAT_TEST // _EUROSAT
    train, test = _parted(everything, [rank < num_test for rank in ranks.tolist()])
    return _source(train, test, folder, config)


def celeba(config: DatasetConfig) -> Source:
    """The aligned faces of CelebA (Liu et al. 2015) in its own split; label 1 is `Male`."""
    folder = folder_of(config)
    pictures = existing(folder / "celeba" / "img_align_celeba", config)
    tables = [existing(folder / name, config) for name in digests_of(config.name)]

    def records(name: str) -> Records:
        part = read_published(config, folder, split=name)
        labels = part.attr[:, part.attr_names.index("Male")].tolist()
        items = [(pictures / f, label) for f, label in zip(part.filename, labels, strict=True)]
        return _records(items, pictures, config)

    files = (*tables, *sorted(pictures.glob("*.jpg")))
    return Source(files, lambda: (records("train"), records("test")))


def camelyon17(config: DatasetConfig) -> Source:
    """The 96x96 patches of Camelyon17-WILDS (Koh et al. 2021) in its official split.

    Label 1 is tumour tissue in the central 32x32 pixels. As in the package `wilds`, the split
    column holds for all hospitals but the two that are held out, of which number 2 tests.
    """
    folder = folder_of(config)
    table = existing(folder / "metadata.csv", config)
    train: list[tuple[Path, int]] = []
    test: list[tuple[Path, int]] = []
    with table.open(newline="") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            try:
                place = f"patient_{row['patient']}_node_{row['node']}"
                name = f"patch_{place}_x_{row['x_coord']}_y_{row['y_coord']}.png"
                item = (folder / "patches" / place / name, int(row["tumor"]))
                center, split = int(row["center"]), int(float(row["split"]))
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(
                    f"line {number} of '{table}' cannot be read ({error!r}): fetch it again"
                ) from None
            if center == _CAMELYON_TEST_CENTER:
                test.append(item)
            elif center != _CAMELYON_VALIDATION_CENTER and split == 0:
                train.append(item)
    return _source(train, test, table, config, (table,))


def _source(
    train: Items, test: Items, where: Path, config: DatasetConfig, tables: tuple[Path, ...] = ()
) -> Source:
    files = (*tables, *(path for path, _ in (*train, *test)))
    return Source(files, lambda: (_records(train, where, config), _records(test, where, config)))


def _records(items: Items, where: Path, config: DatasetConfig) -> Records:
    labels = np.array([label for _, label in items], dtype=np.int64)
    files = [(path, None) for path, _ in items]
    return Records(checked_labels(where, labels, config), lambda: decoded(files, config))


def _parted(items: Items, held_out: Sequence[bool]) -> tuple[Items, Items]:
    pairs = list(zip(items, held_out, strict=True))
    return [item for item, test in pairs if not test], [item for item, test in pairs if test]


def _digest_of_name(folder: Path, path: Path) -> int:
    return int(hashlib.sha256(path.relative_to(folder).as_posix().encode()).hexdigest(), 16)


def _list_classes(folder: Path, config: DatasetConfig) -> list[tuple[Path, int]]:
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(classes) != config.num_classes:
        raise DataError(
            f"'{folder}' holds {len(classes)} class folders, not dataset.num_classes="
            f"{config.num_classes}: correct dataset.num_classes or dataset.path"
        )
    items: list[tuple[Path, int]] = []
    for label, path in enumerate(classes):
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
        if not files:
            raise DataError(f"class folder '{path}' holds no image: remove it or fill it")
        items.extend((file, label) for file in files)
    return items
