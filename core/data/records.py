"""Records that every reader hands over, and the processing that each image receives."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from core.config import DatasetConfig
from core.data.parallel import on_all_cores
from core.errors import DataError, printable
from core.io.files import write_whole

_SHOWN = 12
"""Classes that an error names."""


@dataclass(frozen=True)
class Split:
    """Images with labels.

    Attributes:
        images: uint8 `[N, C, H, W]`.
        labels: int64 `[N]`, in [0, number of classes).
    """

    images: torch.Tensor
    labels: torch.Tensor

    def write(self, path: Path) -> None:
        """Writes `images` and `labels` as a compressed NumPy archive."""
        images, labels = self.images.numpy(), self.labels.numpy()
        write_whole(path, lambda file: np.savez_compressed(file, images=images, labels=labels))

    @classmethod
    def read(cls, path: Path) -> "Split":
        """Reads what `write` wrote."""
        with np.load(path) as stored:
            return cls(torch.from_numpy(stored["images"]), torch.from_numpy(stored["labels"]))


@dataclass(frozen=True)
class Dataset:
    """A data set in memory, or mapped into it.

    Attributes:
        train: private training images.
        test: private test images, used by scores alone.
        fingerprint: SHA-256 of the training records as they are stored, before any cropping or
            resizing: the ledger is theirs, however they are used. Hexadecimal digits; enters
            every key. Whoever knows all records but one can test for that one: never publish it.
        class_names: of label 0, 1, ...; public, as the list of classes is a public constant.
    """

    train: Split
    test: Split
    fingerprint: str
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Records:
    """The records of a split as they are stored.

    Attributes:
        labels: integers `[N]` in [0, number of classes).
        images: yields the N images in the order of the labels, uint8 `[C, H, W]` or, as some
            files hold grey ones, `[H, W]`; raises DataError with the name of a damaged file.
    """

    labels: np.ndarray
    images: Callable[[], Iterator[np.ndarray]]


@dataclass(frozen=True)
class Parts:
    """The records of both splits, and the public names of the labels 0, 1, ..."""

    train: Records
    test: Records
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """Where a data set lies, and how it is read.

    Attributes:
        files: all files that decide its content.
        read: opens them.
        left_out: in words, what lies among the images and is not read; empty if nothing does.
    """

    files: tuple[Path, ...]
    read: Callable[[], Parts]
    left_out: str = ""


def fingerprint_of_labels(labels: np.ndarray) -> Any:
    """The beginning of a fingerprint; `fitted` adds the images."""
    return hashlib.sha256(f"{labels.shape}".encode() + labels.astype("<i8").tobytes())


def fitted(
    records: Records, config: DatasetConfig, split: str, digest: Any = None
) -> Iterator[np.ndarray]:
    """Yields each image at the size of the configuration, uint8 `[C, image_size, image_size]`.

    Args:
        split: `training` or `test`, for people.
        digest: SHA-256 that is given every image as it is stored.

    Raises:
        DataError: an image has other channels than the configuration says, or is damaged.
    """
    size, channels = config.image_size, config.channels

    def stored() -> Iterator[np.ndarray]:
        for image in map(np.ascontiguousarray, records.images()):
            if digest is not None:
                digest.update(f"{image.shape}".encode())
                digest.update(image.tobytes())
            if (found := 1 if image.ndim == 2 else len(image)) != channels:
                raise DataError(
                    f"the {split} images of '{config.path or config.name}' have shape "
                    f"{(found, size, size)}, not {(channels, size, size)}: set "
                    "dataset.channels to what the data is"
                )
            yield image.reshape(channels, *image.shape[-2:])

    return on_all_cores(lambda image: fit(torch.from_numpy(image), size).numpy(), stored())


def fit(image: torch.Tensor, size: int) -> torch.Tensor:
    """Crops uint8 `[C, H, W]` to the central square and resizes it with antialiasing."""
    height, width = image.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    image = image[..., top : top + side, left : left + side]
    if side == size:
        return image
    resized = F.interpolate(
        image[None].to(torch.float32), size=(size, size), mode="bilinear", antialias=True
    )
    return resized[0].round().clamp(0, 255).to(torch.uint8)


def check_counts(
    labels: np.ndarray, class_names: Sequence[str], source: Source, config: DatasetConfig
) -> None:
    """Refuses training labels that differ from the public facts; needs no image.

    Raises:
        DataError: N is another, with the count of each class, or classes have no image.
    """
    where, counts = config.path or config.name, np.bincount(labels, minlength=config.num_classes)
    if len(labels) != config.num_examples:
        held = [f"{name} {count}" for name, count in zip(class_names, counts, strict=True)]
        held = held[:_SHOWN] + ["..."] * (len(held) > _SHOWN)
        unread = f" ({source.left_out} left out)" if source.left_out else ""
        raise DataError(
            f"dataset.num_examples={config.num_examples}, but '{where}' holds {len(labels)} "
            f"training images{unread}, of which {', '.join(held)}: N is a public constant that "
            "every privacy figure rests on, so state it or choose the right data"
        )
    if empty := [name for name, count in zip(class_names, counts, strict=True) if not count]:
        raise DataError(
            f"class {', '.join(empty[:_SHOWN])} of '{where}' has no training image: add some, or "
            f"lower dataset.num_classes={config.num_classes}"
        )


def first_label(train: np.ndarray, config: DatasetConfig) -> int:
    """1 where the training labels run from 1 to the number of classes, as EMNIST's; else 0."""
    from_1 = len(train) > 0 and (train.min(), train.max()) == (1, config.num_classes)
    return int(from_1)


def checked_labels(
    path: Path, labels: np.ndarray, config: DatasetConfig, first: int = 0
) -> np.ndarray:
    """The labels, counted from 0, if all lie among the stated classes; `first` is the lowest."""
    last = first + config.num_classes - 1
    for label in (labels.min(), labels.max()) if len(labels) else ():
        if not first <= label <= last:
            raise DataError(
                f"'{path}' holds label {label}, which must lie in [{first}, {last}], as "
                f"dataset.num_classes={config.num_classes}: correct it, or repair the labels"
            )
    return labels.astype(np.int64) - first


def names_of(known: Sequence[str], config: DatasetConfig, first: int = 0) -> tuple[str, ...]:
    """One name for each class: the known ones in order; of labels without one, the number."""
    numbers = [str(first + label) for label in range(config.num_classes)]
    names = (*known[: config.num_classes], *numbers[len(known) :])
    if odd := next((name for name in names if printable(name) != name), None):
        raise DataError(f"class name '{odd}' holds control characters or odd bytes: rename it")
    return names


def folder_of(config: DatasetConfig) -> Path:
    """The folder at `dataset.path`."""
    if not config.path:
        raise DataError(f"dataset.name={config.name} needs a folder: set dataset.path=FOLDER")
    folder = Path(os.path.expanduser(config.path))  # Which leaves the unknown user of `~user`.
    if folder.is_file():
        raise DataError(
            f"dataset.path='{folder}' is a file: unpack it, and name the folder of what it held"
        )
    if not folder.is_dir():
        raise DataError(f"no folder at dataset.path='{folder}': correct the path")
    return folder


def existing(path: Path, config: DatasetConfig) -> Path:
    """The path, if something lies there."""
    if not path.exists():
        raise DataError(
            f"dataset.name={config.name} needs '{path}', which is missing: `python -m core prepare "
            f"--dataset {config.name}` says where it comes from, or correct dataset.path"
        )
    return path
