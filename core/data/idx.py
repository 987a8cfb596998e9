"""The format of MNIST and its kin."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from core.config import DatasetConfig
from core.data.records import Records, Source, checked_labels, folder_of
from core.errors import DataError

_SPLITS = ("train", "t10k")


def idx(config: DatasetConfig) -> Source:
    """The four files of MNIST and its kin (LeCun et al. 1998), plain or, failing that, gzipped."""
    folder = folder_of(config)
    pairs = [
        (_find(folder, f"{name}-images-idx3-ubyte"), _find(folder, f"{name}-labels-idx1-ubyte"))
        for name in _SPLITS
    ]

    def read() -> tuple[Records, Records]:
        train, test = (_read_pair(images, labels, config) for images, labels in pairs)
        return train, test

    return Source(tuple(path for pair in pairs for path in pair), read)


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            return path
    raise DataError(
        f"'{folder}' holds neither '{name}' nor '{name}.gz': fetch it, or correct dataset.path"
    )


def _read_pair(images_path: Path, labels_path: Path, config: DatasetConfig) -> Records:
    images, labels = _read_idx(images_path, 3), _read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise DataError(
            f"'{images_path}' holds {len(images)} images, but '{labels_path}' {len(labels)} "
            "labels: they do not belong together: fetch both again"
        )
    return Records(checked_labels(labels_path, labels, config), lambda: iter(images))


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"'{path}' is damaged or unreadable ({error}): fetch it again") from None
    header = 4 + 4 * dimensions
    magic = int.from_bytes(content[:4], "big")
    if len(content) >= 4 and magic != 0x800 + dimensions:
        raise DataError(
            f"'{path}' begins with magic number {magic:#010x}, not {0x800 + dimensions:#010x}: "
            f"put an IDX file of unsigned bytes in {dimensions} dimensions there"
        )
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4)]
    expected = header + math.prod(shape)
    if len(content) != expected or len(content) < header:
        state = "truncated" if len(content) < expected else "too long"
        raise DataError(
            f"'{path}' is {state}: {len(content)} bytes where its header says {expected}; fetch "
            "it again"
        )
    if 0 in shape[1:]:
        raise DataError(f"'{path}' holds images of {shape[1]}x{shape[2]} pixels: fetch it again")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()
