"""Cache of decoded images, mapped into memory by all runs and workers that see its folder."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch

from core.config import DatasetConfig, flatten
from core.data.records import (
    Dataset,
    Parts,
    Source,
    Split,
    check_counts,
    fingerprint_of_labels,
    fitted,
)
from core.errors import DataError
from core.io.code_digest import data_code_digest
from core.io.files import private_folder, private_opener, whole_folder
from core.io.locks import locked
from core.io.terminal import Report

_NO_TRANSFORM = ("path", "num_examples", "public", "family")
_FEW = 64
"""Up to so many files are known by their content, which is quickly read; more by the time of
their last change."""
_LOCK_TIMEOUT_S = 3600.0
"""Seconds in which another process may be decoding the same."""
_INTERVAL = 1.0
"""Seconds between two reports."""
Item = TypeVar("Item")


def decoded(source: Source, config: DatasetConfig, report: Report) -> Dataset:
    """Everything in the memory of this process.

    Raises:
        DataError: a file is missing or damaged, or a split is empty.
    """
    parts = source.read()
    check_parts(parts, source, config)
    train, test = parts.train, parts.test
    digest = fingerprint_of_labels(train.labels)
    number, total = len(train.labels), len(train.labels) + len(test.labels)
    images = [
        np.stack([*told(fitted(train, config, "training", digest), "decoding", total, report)]),
        np.stack([*told(fitted(test, config, "test"), "decoding", total, report, number)]),
    ]
    splits = [
        Split(torch.from_numpy(array), torch.from_numpy(records.labels))
        for array, records in zip(images, (train, test), strict=True)
    ]
    return Dataset(splits[0], splits[1], digest.hexdigest(), parts.class_names)


def decoded_once(source: Source, config: DatasetConfig, cache: Path, report: Report) -> Dataset:
    """The same from `cache`, where the first process that asks for it puts it.

    A process that dies while it writes leaves nothing that another would take.

    Raises:
        DataError: a file is missing or damaged, a split is empty, or the folder cannot be written.
        ConfigError: another process holds the folder for longer than decoding takes.

    Privacy: the folder holds the private images unprotected, readable by their owner alone; it
        must not be released. Its name is a digest of the source, which is not shown.
    """
    folder = cache / f"images-{_key(source, config, report)}"
    try:
        private_folder(cache)
        with locked(cache / f"{folder.name}.lock", _LOCK_TIMEOUT_S):
            if (dataset := _mapped(folder, config)) is None:
                _write(source, config, folder, report)
                dataset = _mapped(folder, config)
    except OSError as error:
        raise DataError(
            f"'{cache}' cannot hold the decoded images ({error}): free some space there, or set "
            "runtime.cache to another folder"
        ) from None
    assert dataset is not None
    return dataset


def _key(source: Source, config: DatasetConfig, report: Report) -> str:
    """Digest of all that decides the images: of what a run's identity holds, none may be older."""
    settings = {k: v for k, v in flatten(config).items() if k not in _NO_TRANSFORM}
    made_by = [data_code_digest(), torch.__version__]
    digest = hashlib.sha256(json.dumps([made_by, settings], sort_keys=True).encode())
    for path in told(source.files, "hashing", len(source.files), report):
        try:
            if len(source.files) <= _FEW:
                with path.open("rb") as file:
                    state: Any = hashlib.file_digest(file, "sha256").hexdigest()
            else:
                status = path.stat()
                state = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        except OSError as error:
            raise DataError(f"'{path}' cannot be read ({error}): fetch it again") from None
        digest.update(json.dumps([str(path.absolute()), state]).encode())
    return digest.hexdigest()[:32]


def check_parts(parts: Parts, source: Source, config: DatasetConfig) -> None:
    """Checks what a source has read, before any image of it is opened.

    Raises:
        DataError: a split is empty, or the labels differ from the public facts.
    """
    for records, split in ((parts.train, "training"), (parts.test, "test")):
        if len(records.labels) == 0:
            raise DataError(
                f"'{config.path or config.name}' holds no {split} image: add some, or choose "
                "another data set"
            )
    check_counts(parts.train.labels, parts.class_names, source, config)


def _write(source: Source, config: DatasetConfig, folder: Path, report: Report) -> None:
    parts = source.read()
    check_parts(parts, source, config)
    train, test = parts.train, parts.test
    shutil.rmtree(folder, ignore_errors=True)  # Of which something is damaged.
    with whole_folder(folder, private=True) as temporary:
        digest = fingerprint_of_labels(train.labels)
        done, total = 0, len(train.labels) + len(test.labels)
        for records, split, sum_of in ((train, "training", digest), (test, "test", None)):
            with _private(temporary / f"{split}_labels.npy") as file:
                np.save(file, records.labels)
            shape = (len(records.labels), config.channels, config.image_size, config.image_size)
            with _private(temporary / f"{split}_images.npy") as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                images = fitted(records, config, split, sum_of)
                for image in told(images, "decoding", total, report, done):
                    file.write(image.tobytes())
                file.flush()
                os.fsync(file.fileno())
            done += len(records.labels)
        with _private(temporary / "class_names") as file:
            file.write(json.dumps(parts.class_names).encode())
        with _private(temporary / "fingerprint") as file:
            file.write(digest.hexdigest().encode())


def told(
    items: Iterable[Item], stage: str, total: int, report: Report, done: int = 0
) -> Iterator[Item]:
    """Yields the items, and reports now and then how many of all were yielded."""
    next_report = 0.0
    for step, item in enumerate(items, done):
        if (now := time.monotonic()) >= next_report:
            next_report = now + _INTERVAL
            report({"stage": stage, "step": step, "total": total})
        yield item


def _private(path: Path) -> BinaryIO:
    return open(path, "wb", opener=private_opener)


def _mapped(folder: Path, config: DatasetConfig) -> Dataset | None:
    """What lies in the folder; None where there is nothing, or a damaged file."""
    try:
        train, test = (_split(folder, name) for name in ("training", "test"))
        class_names = tuple(json.loads((folder / "class_names").read_text()))
        fingerprint = (folder / "fingerprint").read_text()
    except (FileNotFoundError, ValueError, EOFError):
        return None
    complete = all(len(split.images) == len(split.labels) for split in (train, test))
    if not complete or len(fingerprint) != 64:
        return None
    return Dataset(train, test, fingerprint, class_names)


def _split(folder: Path, name: str) -> Split:
    # Pages are shared until somebody writes to them: "c" is copy on write.
    images = np.load(folder / f"{name}_images.npy", mmap_mode="c")
    return Split(torch.from_numpy(images), torch.from_numpy(np.load(folder / f"{name}_labels.npy")))
