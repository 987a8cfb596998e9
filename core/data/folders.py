"""Readers of one file per image: folders of classes, an archive's index, EuroSAT."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from core.config import DatasetConfig
from core.data.images import SUFFIXES, decoded
from core.data.layout import FOLDER, in_words, is_hidden, listing, plain, split_named, suffixes
from core.data.records import (
    Parts,
    Records,
    Source,
    checked_labels,
    existing,
    first_label,
    folder_of,
    names_of,
)
from core.errors import DataError

Items = Sequence[tuple[Path, int]]
INDEX = "dataset.json"
_EUROSAT_TEST, _EUROSAT = 4000, 27000


@dataclass(frozen=True)
class _Listing:
    """Pictures and labels of a folder.

    Attributes:
        class_names: of label 0, 1, ...; none where numbers alone are known.
        unread: numbers of files that lie among them, by suffix.
        tables: files that decide the labels.
    """

    items: Items
    class_names: tuple[str, ...]
    unread: Counter[str]
    tables: tuple[Path, ...] = ()


def image_folder(config: DatasetConfig) -> Source:
    """`class/name.png`, or the pictures that `dataset.json` lists with their labels.

    Both below a folder for training and one for test or, where that has no labels or there is
    none, validation, in all usual names; else a fixed fifth, by name, tests.
    """
    folder = folder_of(config)
    if (splits := _splits(folder)) is None:
        whole = _listed(folder, config)
        train, test = _parted(whole, [_digest(folder, p) % 5 == 0 for p, _ in whole.items])
    else:
        train, test = (_listed(split, config) for split in splits)
        if odd := sorted({*train.class_names} ^ {*test.class_names}):
            raise DataError(
                f"class '{odd[0]}' of '{folder}' is not in both {splits[0].name} and "
                f"{splits[1].name}: give both the same classes"
            )
        folders, files = listing(folder)
        beside = suffixes(file for file in files if file.suffix.lower() in SUFFIXES)
        beside[FOLDER] += len(folders) - len(splits)
        train = replace(train, unread=train.unread + beside)
    return _source(train, test, folder, config)


def eurosat(config: DatasetConfig) -> Source:
    """The 27,000 RGB tiles of EuroSAT (Helber et al. 2019), as torchvision stores them.

    It has no published split: the 4,000 of 27,000 tiles whose names have the smallest SHA-256
    test, the other 23,000 train, as many as in DPImageBench (Gong et al. 2025).
    """
    folder = existing(folder_of(config) / "eurosat" / "2750", config)
    whole = _class_folders(folder, config)
    ranks = np.argsort(np.argsort([f"{_digest(folder, p):064x}" for p, _ in whole.items]))
    num_test = len(whole.items) * _EUROSAT_TEST // _EUROSAT
    train, test = _parted(whole, [rank < num_test for rank in ranks.tolist()])
    return _source(train, test, folder, config)


def records(items: Items, where: Path, config: DatasetConfig, first: int = 0) -> Records:
    """Records of single files; `first` is the lowest label."""
    labels = np.array([label for _, label in items], dtype=np.int64)
    files = [(path, None) for path, _ in items]
    return Records(
        checked_labels(where, labels, config, first), lambda: decoded(partial(iter, files), config)
    )


def _source(train: _Listing, test: _Listing, where: Path, config: DatasetConfig) -> Source:
    def read() -> Parts:
        numbers = np.array([label for _, label in train.items])
        first = 0 if train.class_names else first_label(numbers, config)
        return Parts(
            records(train.items, where, config, first),
            records(test.items, where, config, first),
            names_of(train.class_names, config, first),
        )

    tables = {*train.tables, *test.tables}
    files = (*sorted(tables), *(path for path, _ in (*train.items, *test.items)))
    return Source(files, read, in_words(train.unread + test.unread))


def _parted(whole: _Listing, held_out: Sequence[bool]) -> tuple[_Listing, _Listing]:
    pairs = list(zip(whole.items, held_out, strict=True))
    train, test = ([item for item, out in pairs if out == flag] for flag in (False, True))
    return (
        _Listing(train, whole.class_names, whole.unread, whole.tables),
        _Listing(test, whole.class_names, Counter(), whole.tables),
    )


def _digest(folder: Path, path: Path) -> int:
    name = plain(path.relative_to(folder).as_posix()).encode("utf-8", "surrogateescape")
    return int(hashlib.sha256(name).hexdigest(), 16)


def num_class_folders(config: DatasetConfig) -> int | None:
    """How many folders are the classes; None where labels are listed."""
    folder = folder_of(config)
    if config.name == "eurosat":
        folder = existing(folder / "eurosat" / "2750", config)
    elif config.name != "image_folder":
        return None
    elif splits := _splits(folder):
        folder = splits[0]
    return None if (folder / INDEX).is_file() else len(listing(folder)[0])


def _splits(folder: Path) -> tuple[Path, Path] | None:
    """Folders of training and test images; None where none has the name of a split."""
    if (folder / INDEX).is_file():
        return None
    found: dict[str, Path] = {}
    for path in listing(folder)[0]:
        if (split := split_named(path.name)) is None:
            continue
        if split in found:
            raise DataError(
                f"'{found[split]}' and '{path}' both look like the {split} split: rename one"
            )
        found[split] = path
    if not found:
        return None
    held_out = [found[name] for name in ("test", "validation") if name in found]
    if "train" not in found or not held_out:
        wanted, instead = "training", ""
        if "train" in found:
            wanted, instead = "testing", ", or let dataset.path name it to hold a fifth of it out"
        raise DataError(
            f"'{next(iter(found.values()))}' has the name of a split, but no folder for {wanted} "
            f"stands beside it: add that, rename it if it is a class{instead}"
        )
    has_labels = [(path / INDEX).is_file() or bool(listing(path)[0]) for path in held_out]
    return found["train"], held_out[has_labels.index(True) if any(has_labels) else 0]


def _listed(folder: Path, config: DatasetConfig) -> _Listing:
    index = folder / INDEX
    return _indexed(index) if index.is_file() else _class_folders(folder, config)


def _class_folders(folder: Path, config: DatasetConfig) -> _Listing:
    classes, beside = listing(folder)
    if len(classes) != config.num_classes:
        held = [f"'{path.name}'" for path in classes[:3]] + ["..."] * (len(classes) > 3)
        held += filter(None, [in_words(suffixes(beside))])
        raise DataError(
            f"'{folder}' holds {len(classes)} class folders, not dataset.num_classes="
            f"{config.num_classes}: correct dataset.num_classes or dataset.path (in it: "
            f"{', '.join(held) or 'nothing'})"
        )
    items: list[tuple[Path, int]] = []
    unread = suffixes(path for path in beside if path.suffix.lower() in SUFFIXES)
    for label, path in enumerate(classes):
        folders, files = listing(path)
        images = [file for file in files if file.suffix.lower() in SUFFIXES]
        odd = suffixes(file for file in files if file.suffix.lower() not in SUFFIXES)
        odd[FOLDER] += len(folders)
        if not images:
            held = f" (in it: {in_words(odd)})" if odd.total() else ""
            raise DataError(f"class folder '{path}' holds no image: remove it or fill it{held}")
        items.extend((file, label) for file in images)
        unread += odd
    return _Listing(items, tuple(plain(path.name) for path in classes), unread)


def _indexed(index: Path) -> _Listing:
    """The pictures that the `dataset.json` of EDM, StyleGAN or DPImageBench lists with labels."""
    there = {
        plain(path.relative_to(index.parent).as_posix()): path
        for path in index.parent.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and not any(map(is_hidden, path.relative_to(index.parent).parts))
    }
    items: list[tuple[Path, int]] = []
    try:
        pairs: list[Any] = json.loads(index.read_text("utf-8"))["labels"]
        for name, label in pairs:
            if type(label) is not int:
                raise TypeError(f"label {label!r}")
            items.append((there.pop(plain(name)), label))
    except KeyError as error:
        raise DataError(
            f"'{index}' names {error}, which is not there or there twice: repair it, or remove it "
            "if the folders are the classes"
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"'{index}' holds no list `labels` of [name, number] ({error}): repair it, or remove "
            "it if the folders are the classes"
        ) from None
    items.sort(key=lambda item: plain(str(item[0])))
    return _Listing(items, (), suffixes(there.values()), (index,))
