"""Grids of a trial's images as data that stands in the page itself."""

import base64
import io
from pathlib import Path

from PIL import Image

from core.config import Config

CLASSES = 10
"""Rows of a grid that are shown; a grid has one for each class."""
_SIDE = 56  # As of `core.reporting.write_grid`.


def picture(path: Path, config: Config, width: int) -> str | None:
    """A grid as a data URI, its first rows, at most `width` pixels wide; None if there is none."""
    if not path.exists():
        return None
    size = config.dataset.image_size
    tile = size * max(1, _SIDE // size) + 2
    with Image.open(path) as image:
        image.load()
    image = image.crop((0, 0, image.width, min(image.height, CLASSES * tile)))
    if image.width > width:
        image = image.resize(
            (width, round(image.height * width / image.width)), Image.Resampling.BOX
        )
    content = io.BytesIO()
    image.convert("RGB").save(content, "WEBP", quality=80, method=6)
    return "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()
