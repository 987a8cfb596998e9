"""Reader of CIFAR as torchvision stores it, and published digests that torchvision knows."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from core.config import DatasetConfig
from core.data.records import (
    Parts,
    Records,
    Source,
    checked_labels,
    existing,
    folder_of,
    names_of,
)
from core.errors import DataError

CLASSES = {
    "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "eurosat": "EuroSAT",
    "celeba": "CelebA",
}
"""Name here of the torchvision class."""
CELEBA_TABLES = ("list_attr_celeba.txt", "list_eval_partition.txt")


def torchvision_class(name: str) -> Any:
    """The class that reads and fetches a data set.

    Raises:
        DataError: torchvision is not installed.
    """
    if importlib.util.find_spec("torchvision") is None:
        raise DataError(f"data set {name} needs torchvision: pip install torchvision")
    return getattr(importlib.import_module("torchvision.datasets"), CLASSES[name])


def digests_of(name: str) -> dict[str, str]:
    """Published MD5 of each file that is read below `dataset.path`, archives left out."""
    kind = torchvision_class(name)
    if name == "celeba":
        pairs = [(file, md5) for _, md5, file in kind.file_list if file in CELEBA_TABLES]
    else:
        pairs = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
    return {f"{kind.base_folder}/{file}": md5 for file, md5 in pairs}


def read_published(config: DatasetConfig, folder: Path, **split: Any) -> Any:
    """One split of a data set of torchvision, after every file's digest.

    Raises:
        DataError: a file is missing or differs from the published one; names it.
    """
    from torchvision.datasets.utils import check_integrity

    for file, md5 in digests_of(config.name).items():
        path = existing(folder / file, config)
        if not check_integrity(path, md5):
            raise DataError(
                f"'{path}' is damaged: its MD5 is not the published {md5}; fetch it again"
            )
    try:
        return torchvision_class(config.name)(str(folder), **split)
    except (OSError, RuntimeError, ValueError, KeyError, EOFError) as error:
        raise DataError(f"'{folder}' cannot be read ({error}): fetch it again") from None


def cifar(config: DatasetConfig) -> Source:
    """CIFAR-10, or CIFAR-100 with its fine labels (Krizhevsky 2009), in the Python version."""
    folder = folder_of(config)

    def read() -> Parts:
        train, test = (read_published(config, folder, train=flag) for flag in (True, False))
        names = names_of(train.classes, config)
        return Parts(_records(config, folder, train), _records(config, folder, test), names)

    return Source(tuple(existing(folder / f, config) for f in digests_of(config.name)), read)


def _records(config: DatasetConfig, folder: Path, part: Any) -> Records:
    labels = checked_labels(folder, np.array(part.targets, dtype=np.int64), config)
    return Records(labels, lambda: (image.transpose(2, 0, 1) for image in part.data))
