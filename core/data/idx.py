"""Reader of the IDX format: MNIST and its kin."""

import gzip
import hashlib
import math
import re
import zlib
from pathlib import Path

import numpy as np

from core.config import DatasetConfig
from core.data.layout import listing
from core.data.records import (
    Parts,
    Records,
    Source,
    checked_labels,
    first_label,
    folder_of,
    names_of,
)
from core.errors import DataError

_SPLITS = ("train", "t10k")
_NAME = re.compile(
    r"(?P<set>.+-)?(?P<split>train|t10k|test)-(?P<kind>images|labels)[-.]idx[13]-ubyte(\.gz)?",
    re.IGNORECASE,
)
_FASHION_MNIST = "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7"
"""SHA-256 of its published training labels, by which its classes have their names."""
_CLOTHES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


def idx(config: DatasetConfig) -> Source:
    """The four files of MNIST and its kin (LeCun et al. 1998), plain or, failing that, gzipped.

    Named as published, also with `.idx3`, with `emnist-letters-` or the like before, or each in a
    folder of its own name, as some archivers unpack them. EMNIST's stay transposed, as stored.
    """
    folder = folder_of(config)
    found = found_files(folder)
    pairs: list[tuple[Path, Path]] = []
    for split in _SPLITS:
        names = (f"{split}-images-idx3-ubyte", f"{split}-labels-idx1-ubyte")
        if missing := next((name for name in names if name not in found), None):
            raise DataError(
                f"'{folder}' holds neither '{missing}' nor '{missing}.gz': fetch it, or correct "
                "dataset.path"
            )
        pairs.append((found[names[0]], found[names[1]]))

    def read() -> Parts:
        (train, train_labels), (test, test_labels) = (_read_pair(*pair) for pair in pairs)
        first = first_label(train_labels, config)
        published = hashlib.sha256(train_labels.tobytes()).hexdigest() == _FASHION_MNIST
        return Parts(
            Records(checked_labels(pairs[0][1], train_labels, config, first), lambda: iter(train)),
            Records(checked_labels(pairs[1][1], test_labels, config, first), lambda: iter(test)),
            names_of(_CLOTHES if published else (), config, first),
        )

    return Source(tuple(path for pair in pairs for path in pair), read)


def found_files(folder: Path) -> dict[str, Path]:
    """Files by the names under which MNIST's are published."""
    folders, files = listing(folder)
    for each in folders:
        if _NAME.fullmatch(each.name):
            files += listing(each)[1]
    found: dict[str, Path] = {}
    sets: set[str] = set()
    for path in sorted(files, key=lambda path: path.suffix.lower() == ".gz"):  # Plain ones first.
        if (match := _NAME.fullmatch(path.name)) is None:
            continue
        sets.add((match["set"] or "").lower())
        split = "train" if match["split"].lower() == "train" else "t10k"
        kind = {"images": "images-idx3", "labels": "labels-idx1"}[match["kind"].lower()]
        found.setdefault(f"{split}-{kind}-ubyte", path)
    if len(sets) > 1:
        raise DataError(
            f"'{folder}' holds several data sets, whose files begin with "
            f"{', '.join(repr(name) for name in sorted(sets))}: give each a folder of its own"
        )
    return found


def _read_pair(images_path: Path, labels_path: Path) -> tuple[np.ndarray, np.ndarray]:
    images, labels = _read_idx(images_path, 3), _read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise DataError(
            f"'{images_path}' holds {len(images)} images, but '{labels_path}' {len(labels)} "
            "labels: they do not belong together: fetch both again"
        )
    return images, labels


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix.lower() == ".gz" else content
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
