"""Data sets as uint8 tensors, each checked against what the configuration states."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from core.config import DatasetConfig
from core.data.cache import decoded, decoded_once
from core.data.digits import digits
from core.data.folders import eurosat, image_folder
from core.data.idx import idx
from core.data.parquet import parquet
from core.data.published import cifar
from core.data.records import Dataset, Source, check_counts
from core.data.records import Split as Split
from core.data.tables import camelyon17, celeba
from core.errors import DataError
from core.io.terminal import Report

_LOG = logging.getLogger("core")
READERS: dict[str, Callable[[DatasetConfig], Source]] = {
    "digits": digits,
    "idx": idx,
    "image_folder": image_folder,
    "cifar10": cifar,
    "cifar100": cifar,
    "eurosat": eurosat,
    "celeba": celeba,
    "camelyon17": camelyon17,
    "parquet": parquet,
}


def load_dataset(
    config: DatasetConfig, cache: Path | None = None, report: Report = lambda _: None
) -> Dataset:
    """Reads a data set and checks it against the public facts of the configuration.

    Images are cropped to their central square and resized with antialiasing.

    Args:
        cache: folder that keeps the decoded images for the next process; None decodes into memory.
        report: told about every second how many of all files or images are done: `stage`
            (`hashing` or `decoding`), `step` and `total`.

    Raises:
        DataError: a file is missing or malformed, or the data differs from the configuration.

    Privacy: opens the private data; call only after the plan has been made.
    """
    try:
        source = READERS[config.name](config)
        if cache is None:
            dataset = decoded(source, config, report)
        else:
            dataset = decoded_once(source, config, cache, report)
    except OSError as error:
        raise DataError(
            f"'{error.filename or config.path}' cannot be read ({error.strerror or error}): "
            "correct its permissions, or dataset.path"
        ) from None
    # Again, as what lies in the cache may have been decoded under other facts.
    check_counts(dataset.train.labels.numpy(), dataset.class_names, source, config)
    if source.left_out:
        _LOG.warning(
            "'%s' is read without some of its files (%s left out)", config.path, source.left_out
        )
    return dataset


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 in [0, 255] to float32 in [0, 1]."""
    return images.to(torch.float32) / 255


def to_model_range(images: torch.Tensor) -> torch.Tensor:
    """[0, 1] to [-1, 1], the range of the diffusion model."""
    return images * 2 - 1


def from_model_range(images: torch.Tensor) -> torch.Tensor:
    """[-1, 1] to [0, 1], clamped."""
    return ((images + 1) / 2).clamp(0.0, 1.0)
