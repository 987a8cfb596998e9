"""Grids of a trial's images as data inside the page."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from core.config import Config

CLASSES = 10
"""Rows of a grid that are shown; a grid has one for each class."""
_SIDE = 56  # As of `core.generation.png.write_grid`.


@dataclass(frozen=True)
class Picture:
    """A grid of images.

    Attributes:
        uri: data URI.
        columns: images in a row.
    """

    uri: str
    columns: int


def picture(path: Path, config: Config, width: int) -> Picture | None:
    """The first rows of a grid, at most `width` pixels wide; None if there is no such file."""
    if not path.exists():
        return None
    size = config.dataset.image_size
    tile = size * max(1, _SIDE // size) + 2
    with Image.open(path) as image:
        image.load()
    columns = image.width // tile
    image = image.crop((0, 0, image.width, min(image.height, CLASSES * tile)))
    if image.width > width:
        image = image.resize(
            (width, round(image.height * width / image.width)), Image.Resampling.BOX
        )
    content = io.BytesIO()
    image.convert("RGB").save(content, "WEBP", quality=80, method=6)
    uri = "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()
    return Picture(uri, columns)
