"""Decoder of single image files, which refuses damaged or ambiguous ones by name."""

import importlib.util
import io
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from core.config import DatasetConfig
from core.data.parallel import by_processes
from core.errors import DataError

SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".webp", ".tif", ".tiff", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF", "PPM")
_REMEDY = "convert it to one frame of 8-bit grey or RGB without transparency"


def decoded(
    items: Callable[[], Iterable[tuple[str | Path, bytes | None]]], config: DatasetConfig
) -> Iterator[np.ndarray]:
    """Yields each image as uint8 `[C, H, W]`, C as `dataset.channels` says.

    One rule for all data sets of encoded images: turned as its EXIF orientation says; bits and
    palettes become the grey or the colours they stand for (a palette without colours is either);
    colour profiles are not applied; of a camera's JPEG with previews behind the photograph that is
    read; other files of several frames, more than 8 bits, transparency and other colour spaces are
    refused.

    Args:
        items: opens the names of all images, with their encoded bytes unless the name is a file's;
            can be pickled.

    Raises:
        DataError: an image is damaged or refused, or grey and colour mix; names it.
    """
    if importlib.util.find_spec("PIL") is None:
        raise DataError(f"dataset.name={config.name} needs Pillow: pip install pillow")
    kinds: dict[int, str | Path] = {}
    for name, kind, array in by_processes(partial(_decode, channels=config.channels), items):
        kinds.setdefault(kind, name)
        if len(kinds) > 1:
            raise DataError(
                f"'{kinds[1]}' is grey and '{kinds[3]}' is in colour: convert the files to one kind"
            )
        if config.channels not in kinds:
            raise DataError(
                f"'{name}' has {'one channel' if kind == 1 else 'colours'}: set "
                f"dataset.channels={kind}, or convert the files"
            )
        yield array


def _decode(
    item: tuple[str | Path, bytes | None], channels: int
) -> tuple[str | Path, int, np.ndarray]:
    """Name, true number of channels and values `[C, H, W]` at the number that is asked for."""
    from PIL import Image, ImageOps

    name, content = item
    try:
        file: Any
        where = Path(name) if content is None else io.BytesIO(content)
        with Image.open(where, formats=_FORMATS) as file:
            # What follows a camera's photograph in its file (MPO) are previews and maps of it.
            frames = 1 if file.format == "MPO" else getattr(file, "n_frames", 1)
            deep = _is_deep(file)
            file.load()
            # All of GIF's are palettes, of which Pillow calls some grey.
            has_palette = file.mode == "P" or file.format == "GIF"
            image = ImageOps.exif_transpose(file)
    except FileNotFoundError:
        raise DataError(f"'{name}' is missing: fetch it, or take it from its list") from None
    except Exception as error:  # A decoder may raise anything on a damaged file.
        raise DataError(f"'{name}' is no readable image ({error}): repair or remove it") from None
    if frames > 1:
        raise DataError(f"'{name}' has {frames} frames: {_REMEDY}")
    if deep or image.mode not in ("1", "L", "RGB", "P") or "transparency" in image.info:
        more = " of 16 bits" if deep else " with transparency" * ("transparency" in image.info)
        raise DataError(f"'{name}' has pixel format {image.mode}{more}: {_REMEDY}")
    grey = _is_grey(image)
    kind = channels if grey and has_palette else 1 if grey else 3
    array = np.array(image.convert("L" if channels == 1 else "RGB"))
    return name, kind, array.reshape(image.height, image.width, -1).transpose(2, 0, 1)


def _is_deep(file: Any) -> bool:
    """Whether the decoder would cut colours of more than 8 bits without a word."""
    for codec, _, _, arguments in file.tile[:1]:
        parts = arguments if isinstance(arguments, tuple) else (arguments,)
        raw = str(parts[0])
        if codec.startswith("ppm"):
            return parts[-1] > 255
        return ";16" in raw and not raw.startswith("BGR")  # Which BMP packs into 16 bits.
    return False


def _is_grey(image: Any) -> bool:
    if image.mode != "P":
        return image.mode in ("1", "L")
    palette = np.array(image.getpalette("RGB")).reshape(-1, 3)
    return bool((palette == palette[:, :1]).all())
