"""Images as PNG files, alone and in grids."""

import struct
import zlib
from pathlib import Path

import torch

from core.io.files import write_whole


def write_grid(
    path: Path,
    images: torch.Tensor,
    labels: torch.Tensor,
    columns: int = 10,
    side: int = 56,
    private: bool = False,
) -> None:
    """Writes a PNG with a row for each class and up to `columns` images in it.

    Args:
        images: uint8 `[N, C, H, W]`, C 1 or 3.
        labels: int64 `[N]`.
        side: images are enlarged by a whole factor to about this many pixels.
        private: whether the file is its owner's alone.
    """
    _, channels, height, width = images.shape
    factor = max(1, side // max(height, width))
    rows: list[torch.Tensor] = []
    classes = labels.unique().tolist()
    columns = min(columns, max(int((labels == label).sum()) for label in classes))
    for label in classes:
        chosen = images[labels == label][:columns]
        padding = chosen.new_zeros((columns - len(chosen), channels, height, width))
        big = torch.cat((chosen, padding)).repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        framed = torch.nn.functional.pad(big, (1, 1, 1, 1), value=64)
        rows.append(torch.cat(list(framed), dim=2))
    write_whole(path, encode_png(torch.cat(rows, dim=1)), private)


def encode_png(image: torch.Tensor) -> bytes:
    """Encodes uint8 `[C, H, W]`, C 1 or 3, as PNG (ISO/IEC 15948), without an image library."""
    channels, height, width = image.shape
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    raw = b"".join(b"\x00" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2}[channels], 0, 0, 0)

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + checksum

    signature = b"\x89PNG\r\n\x1a\n"
    return (
        signature
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(raw))
        + chunk(b"IEND", b"")
    )
