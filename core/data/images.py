"""Decoding of single image files: what is damaged or ambiguous is refused by name."""

import importlib.util
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from core.config import DatasetConfig
from core.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")


def decoded(
    items: Iterable[tuple[str | Path, bytes | None]], config: DatasetConfig
) -> Iterator[np.ndarray]:
    """Yields each image as uint8 `[C, H, W]`, C as `dataset.channels` says.

    Args:
        items: name of each image, and its encoded bytes unless the name is a file's.

    Raises:
        DataError: an image is damaged, has transparency or an odd pixel format, or grey and colour
            mix; names it.
    """
    if importlib.util.find_spec("PIL") is None:
        raise DataError(f"dataset.name={config.name} needs Pillow: pip install pillow")
    kinds: dict[int, str | Path] = {}
    for name, content in items:
        yield _decode(name, content, config, kinds)


def _decode(
    name: str | Path, content: bytes | None, config: DatasetConfig, kinds: dict[int, str | Path]
) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(Path(name) if content is None else io.BytesIO(content)) as file:
            file.load()
            image: Any = file.copy()
    except Exception as error:  # A decoder may raise anything on a damaged file.
        raise DataError(f"'{name}' is no readable image ({error}): repair or remove it") from None
    if image.mode not in ("1", "L", "RGB", "P") or "transparency" in image.info:
        alpha = " with transparency" if "transparency" in image.info else ""
        raise DataError(
            f"'{name}' has pixel format {image.mode}{alpha}: convert it to 8-bit grey or RGB "
            "without transparency"
        )
    kinds.setdefault(1 if image.mode in ("1", "L") else 3, name)
    if len(kinds) > 1:
        raise DataError(
            f"'{kinds[1]}' is grey and '{kinds[3]}' is in colour: convert the files to one kind"
        )
    if config.channels not in kinds:
        found = next(iter(kinds))
        raise DataError(
            f"'{name}' has {'one channel' if found == 1 else 'colours'}: set "
            f"dataset.channels={found}, or convert the files"
        )
    array = np.array(image.convert("L" if config.channels == 1 else "RGB"))
    return array.reshape(image.height, image.width, -1).transpose(2, 0, 1)
