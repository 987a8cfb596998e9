"""Writes data sets in the format of MNIST, byte by byte."""

import gzip
from pathlib import Path

import numpy as np

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


def idx(array: np.ndarray) -> bytes:
    """Two zero bytes, type 8 (unsigned byte), number of dimensions, big-endian sizes, values."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def write_idx(folder: Path, zipped: bool = False, **replaced: np.ndarray) -> None:
    random = np.random.default_rng(0)
    arrays = {
        "train_images": random.integers(0, 256, (30, 6, 6)),
        "train_labels": np.arange(30) % 3,
        "test_images": random.integers(0, 256, (12, 6, 6)),
        "test_labels": np.arange(12) % 3,
    } | replaced
    folder.mkdir(exist_ok=True)
    names = (TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS)
    for name, array in zip(names, arrays.values(), strict=True):
        content = idx(array)
        path = folder / (f"{name}.gz" if zipped else name)
        path.write_bytes(gzip.compress(content) if zipped else content)
