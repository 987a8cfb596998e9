"""One rule for all encoded pictures: what is converted, and what is refused by name."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from picture_files import folder_config, picture, refuses, write_folder
from PIL import Image

from core.data import load_dataset


def test_grey_and_colour_do_not_mix(tmp_path):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "test")
    odd = tmp_path / "train" / "class1" / "007.png"
    picture(odd, np.zeros((6, 6, 3)))
    first = tmp_path / "train" / "class0" / "000.png"
    refuses(
        folder_config(tmp_path, num_examples=40),
        f"'{first}' is grey and '{odd}' is in colour",
        "convert the files to one kind",
    )


@pytest.mark.parametrize(("channels", "found"), [(1, "colours"), (3, "one channel")])
def test_files_with_other_channels_than_stated(tmp_path, channels, found):
    write_folder(tmp_path, colour=channels == 1)
    refuses(
        folder_config(tmp_path, channels=channels),
        tmp_path / "class0",
        f"has {found}: set dataset.channels={4 - channels}",
    )


@pytest.mark.parametrize("kind", ["LA", "RGBA", "P", "L", "I;16", "CMYK"])
def test_transparency_and_odd_formats_are_refused(tmp_path, kind):
    write_folder(tmp_path, colour=kind not in ("L", "LA", "I;16"))
    path = next(iter(sorted((tmp_path / "class0").iterdir())))
    if kind == "CMYK":
        path.unlink()
        Image.new("CMYK", (6, 6)).save(path := path.with_suffix(".jpg"))
    else:
        transparent = {"transparency": 0} if kind in ("P", "L") else {}
        Image.new(kind, (6, 6)).save(path, **transparent)
    channels = 1 if kind in ("L", "LA", "I;16") else 3
    refuses(
        folder_config(tmp_path, channels=channels),
        path,
        f"pixel format {kind}",
        "convert it to one frame of 8-bit grey or RGB without transparency",
    )


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n1234", "half"])
def test_corrupt_image(tmp_path, content):
    write_folder(tmp_path)
    path = tmp_path / "class1" / "003.png"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    refuses(folder_config(tmp_path), path, "repair or remove it")


def place(folder: Path, content: bytes, name: str) -> Path:
    """One of forty training images becomes this one."""
    write_folder(folder / "train", colour=True)
    write_folder(folder / "test", colour=True)
    (folder / "train" / "class0" / "000.png").unlink()
    path = folder / "train" / "class0" / f"000.{name}"
    path.write_bytes(content)
    return path


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_viewers_show_them(tmp_path, kind, orientation):
    shown = np.zeros((6, 6), np.uint8)
    shown[:3], shown[:3, 3:] = 255, 128
    stored = {
        1: shown,
        2: shown[:, ::-1],
        3: shown[::-1, ::-1],
        4: shown[::-1],
        5: shown.T,
        6: np.rot90(shown),
        7: shown[::-1, ::-1].T,
        8: np.rot90(shown, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    quality = {"JPEG": {"quality": 100}, "WEBP": {"lossless": True}}.get(kind, {})
    image = Image.fromarray(np.ascontiguousarray(stored)).convert("RGB")
    place(tmp_path, encoded(image, kind, exif=exif, **quality), kind.lower())
    train = load_dataset(folder_config(tmp_path, channels=3, num_examples=40)).train
    assert np.abs(train.images[0].numpy().astype(int) - shown).max() <= 3


def frames(kind: str) -> bytes:
    images = [Image.new("RGB", (6, 6), (value, 0, 0)) for value in (10, 200)]
    return encoded(images[0], kind, save_all=True, append_images=images[1:])


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_several_frames_are_refused(tmp_path, kind):
    path = place(tmp_path, frames(kind), kind.lower())
    settings = folder_config(tmp_path, channels=3, num_examples=40)
    refuses(settings, path, "has 2 frames", "convert it to one frame")


def test_of_a_cameras_file_with_previews_the_photograph_is_read(tmp_path):
    path = place(tmp_path, frames("MPO"), "jpg")
    train = load_dataset(folder_config(tmp_path, channels=3, num_examples=40)).train
    kept = sorted(path.parent.iterdir()).index(path)
    assert (train.images[kept, 0].float() - 10).abs().max() <= 3


def png16() -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    rows = b"".join(b"\0" + np.arange(18, dtype=">u2").tobytes() for _ in range(6))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 6, 6, 16, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + body


def tiff16() -> bytes:
    values = {256: 6, 257: 6, 258: 0, 259: 1, 262: 2, 273: 0, 277: 3, 278: 6, 279: 216}
    after = 8 + 2 + 12 * len(values) + 4
    entries = b""
    for tag, value in values.items():
        count, value = (3, after) if tag == 258 else (1, after + 6 if tag == 273 else value)
        kind = 3 if tag == 258 else 4
        entries += struct.pack("<HHII", tag, kind, count, value)
    head = b"II*\0" + struct.pack("<IH", 8, len(values))
    return head + entries + bytes(4) + struct.pack("<HHH", 16, 16, 16) + bytes(216)


@pytest.mark.parametrize(
    ("content", "suffix"),
    [
        (png16(), "png"),
        (tiff16(), "tif"),
        (b"P6 6 6 65535\n" + bytes(216), "ppm"),
        (b"P6 6 6 1023\n" + bytes(216), "ppm"),
    ],
    ids=["png", "tiff", "ppm", "ppm of 10 bits"],
)
def test_colours_of_16_bits_are_refused(tmp_path, content, suffix):
    path = place(tmp_path, content, suffix)
    settings = folder_config(tmp_path, channels=3, num_examples=40)
    refuses(settings, path, "of 16 bits", "convert it to one frame of 8-bit")


def test_a_bitmap_that_packs_colours_into_16_bits_is_read(tmp_path):
    header = b"BM" + struct.pack("<IHHI", 54 + 72, 0, 0, 54)
    header += struct.pack("<IiiHHIIiiII", 40, 6, 6, 1, 16, 0, 72, 0, 0, 0, 0)
    place(tmp_path, header + b"\xff\x7f" * 36, "bmp")
    train = load_dataset(folder_config(tmp_path, channels=3, num_examples=40)).train
    assert (train.images[0] == 255).all()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_palette_without_colours_goes_with_grey_and_with_colour(tmp_path, kind, channels):
    write_folder(tmp_path / "train", colour=channels == 3)
    write_folder(tmp_path / "test", colour=channels == 3)
    path = tmp_path / "train" / "class0" / "003.png"
    path.unlink()
    image = Image.new("P", (6, 6), 1)
    image.putpalette([7, 7, 7, 90, 90, 90])
    path.with_suffix(f".{kind.lower()}").write_bytes(encoded(image, kind))
    train = load_dataset(folder_config(tmp_path, channels=channels, num_examples=40)).train
    assert (train.images[3] == 90).all()


def test_a_palette_of_colours_is_their_colours(tmp_path):
    image = Image.new("P", (6, 6), 1)
    image.putpalette([7, 8, 9, 90, 91, 92])
    place(tmp_path, encoded(image, "PNG"), "png")
    train = load_dataset(folder_config(tmp_path, channels=3, num_examples=40)).train
    assert train.images[0, :, 2, 3].tolist() == [90, 91, 92]


def test_bits_are_black_and_white(tmp_path):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "test")
    bits = np.eye(6, dtype=bool)
    Image.fromarray(bits).save(tmp_path / "train" / "class0" / "000.png")
    train = load_dataset(folder_config(tmp_path, num_examples=40)).train
    assert np.array_equal(train.images[0, 0], 255 * bits)


@pytest.mark.parametrize(
    "content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 6\n", b"P6 9 9 "]
)
def test_other_formats_under_a_known_suffix_are_no_images(tmp_path, content):
    path = place(tmp_path, content, "png")
    settings = folder_config(tmp_path, channels=3, num_examples=40)
    refuses(settings, path, "is no readable image", "repair or remove it")


def test_an_image_that_would_fill_the_memory_is_refused(tmp_path):
    path = place(tmp_path, encoded(Image.new("1", (20000, 20000)), "PNG"), "png")
    settings = folder_config(tmp_path, channels=3, num_examples=40)
    refuses(settings, path, "is no readable image", "exceeds limit")


def test_sizes_may_differ_and_folders_be_called_like_pictures(tmp_path):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "test")
    picture(tmp_path / "train" / "class0" / "000.png", np.full((1, 1), 9))
    picture(tmp_path / "train" / "class0" / "001.png", np.full((300, 7), 8))
    (tmp_path / "train" / "class0" / "folder.png").mkdir()
    train = load_dataset(folder_config(tmp_path, num_examples=40)).train
    assert (train.images[0] == 9).all()
    assert (train.images[1] == 8).all()
