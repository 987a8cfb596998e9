"""Data sets as uint8 tensors in memory, each checked against what the configuration states."""

import gzip
import hashlib
import importlib.util
import math
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from core.config import DatasetConfig
from core.errors import DataError

_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")


@dataclass(frozen=True)
class Split:
    """Images with labels.

    Attributes:
        images: uint8 `[N, C, H, W]`.
        labels: int64 `[N]`, in [0, number of classes).
    """

    images: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class Dataset:
    """A data set in memory.

    Attributes:
        train: private training images.
        test: private test images, used by scores alone.
        fingerprint: SHA-256 of the training records as they are stored, before any cropping or
            resizing: the ledger is theirs, however they are used. Hexadecimal digits; enters
            every key. Whoever knows all records but one can test for that one: never publish it.
    """

    train: Split
    test: Split
    fingerprint: str


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 in [0, 255] to float32 in [0, 1]."""
    return images.to(torch.float32) / 255


def to_model_range(images: torch.Tensor) -> torch.Tensor:
    """[0, 1] to [-1, 1], the range of the diffusion model."""
    return images * 2 - 1


def from_model_range(images: torch.Tensor) -> torch.Tensor:
    """[-1, 1] to [0, 1], clamped."""
    return ((images + 1) / 2).clamp(0.0, 1.0)


def load_dataset(config: DatasetConfig) -> Dataset:
    """Reads a data set and checks it against the public facts of the configuration.

    Raises:
        DataError: a file is missing or malformed, or the data differs from the configuration.

    Privacy: opens the private data; call only after the plan has been made.
    """
    train, test, fingerprint = LOADERS[config.name](config)
    for name, split in (("training", train), ("test", test)):
        _check(name, split, config)
    if len(train.labels) != config.num_examples:
        raise DataError(
            f"dataset.num_examples={config.num_examples}, but '{config.path or config.name}' holds "
            f"{len(train.labels)} training images: N is a public constant that every privacy "
            "figure rests on, so state it or choose the right data"
        )
    missing = sorted(set(range(config.num_classes)) - set(train.labels.unique().tolist()))
    if missing:
        raise DataError(
            f"class {missing[0]} of '{config.path or config.name}' has no training image: add "
            f"some, or lower dataset.num_classes={config.num_classes}"
        )
    return Dataset(train, test, fingerprint)


def _check(name: str, split: Split, config: DatasetConfig) -> None:
    source = config.path or config.name
    if len(split.labels) == 0:
        raise DataError(f"'{source}' holds no {name} image: add some, or choose another data set")
    expected = (config.channels, config.image_size, config.image_size)
    if tuple(split.images.shape[1:]) != expected:
        raise DataError(
            f"the {name} images of '{source}' have shape {tuple(split.images.shape[1:])}, not "
            f"{expected}: set dataset.channels to what the data is"
        )


def _check_labels(path: Path, labels: np.ndarray, config: DatasetConfig) -> torch.Tensor:
    if len(labels) and labels.max() >= config.num_classes:
        raise DataError(
            f"'{path}' holds label {labels.max()}, which must lie in [0, dataset.num_classes="
            f"{config.num_classes}): raise dataset.num_classes, or repair the labels"
        )
    return torch.from_numpy(labels.astype(np.int64))


def _fingerprint(images: Iterable[np.ndarray], labels: np.ndarray) -> str:
    digest = hashlib.sha256(f"{labels.shape}".encode() + labels.astype("<i8").tobytes())
    for image in images:
        digest.update(f"{image.shape}".encode())
        digest.update(np.ascontiguousarray(image).tobytes())
    return digest.hexdigest()


def _fit(images: torch.Tensor, size: int) -> torch.Tensor:
    """Crops uint8 `[N, C, H, W]` to the central square and resizes it with antialiasing."""
    height, width = images.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    images = images[..., top : top + side, left : left + side]
    if side == size or not len(images):
        return images
    resized = F.interpolate(
        images.to(torch.float32), size=(size, size), mode="bilinear", antialias=True
    )
    return resized.round().clamp(0, 255).to(torch.uint8)


def _load_digits(config: DatasetConfig) -> tuple[Split, Split, str]:
    """Scikit-learn's 1,797 digits of 8x8 pixels (Alpaydin and Kaynak 1998); every fifth tests."""
    if config.path is not None:
        raise DataError(
            f"dataset.name=digits reads no folder, but dataset.path='{config.path}': set "
            "dataset.name to idx or image_folder, or leave dataset.path out"
        )
    spec = importlib.util.find_spec("sklearn")  # Finds the file without the cost of the import.
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "dataset.name=digits reads a file of scikit-learn, which is not installed: "
            "pip install scikit-learn, or choose another data set"
        )
    path = Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    try:
        table = np.loadtxt(path, delimiter=",")
    except (OSError, ValueError) as error:
        raise DataError(f"'{path}' cannot be read ({error}): reinstall scikit-learn") from None
    pixels = np.rint(table[:, :64] * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    images = _fit(torch.from_numpy(pixels), config.image_size)
    labels = _check_labels(path, table[:, 64].astype(np.int64), config)
    test = torch.arange(len(labels)) % 5 == 0
    kept = ~test.numpy()
    fingerprint = _fingerprint(pixels[kept], labels.numpy()[kept])
    return Split(images[~test], labels[~test]), Split(images[test], labels[test]), fingerprint


def _load_idx(config: DatasetConfig) -> tuple[Split, Split, str]:
    """The four files of MNIST and its kin (LeCun et al. 1998), plain or, failing that, gzipped.

    Images are cropped to their central square and resized with antialiasing.
    """
    folder = _folder(config)
    splits: list[Split] = []
    fingerprints: list[str] = []
    for prefix in ("train", "t10k"):
        images_path, images = _read_idx(folder, f"{prefix}-images-idx3-ubyte", 3)
        labels_path, labels = _read_idx(folder, f"{prefix}-labels-idx1-ubyte", 1)
        if len(images) != len(labels):
            raise DataError(
                f"'{images_path}' holds {len(images)} images, but '{labels_path}' {len(labels)} "
                "labels: they do not belong together: fetch both again"
            )
        pixels = _fit(torch.from_numpy(images[:, None]), config.image_size)
        splits.append(Split(pixels, _check_labels(labels_path, labels, config)))
        fingerprints.append(_fingerprint(images, labels))
    return splits[0], splits[1], fingerprints[0]


def _folder(config: DatasetConfig) -> Path:
    if not config.path:
        raise DataError(f"dataset.name={config.name} needs a folder: set dataset.path=FOLDER")
    folder = Path(config.path).expanduser()
    if not folder.is_dir():
        raise DataError(f"no folder at dataset.path='{folder}': correct the path")
    return folder


def _read_idx(folder: Path, name: str, dimensions: int) -> tuple[Path, np.ndarray]:
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.exists()), None)
    if path is None:
        raise DataError(
            f"'{folder}' holds neither '{name}' nor '{name}.gz': fetch it, or correct dataset.path"
        )
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
    return path, np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()


def _load_image_folder(config: DatasetConfig) -> tuple[Split, Split, str]:
    """`class/name.png`, below `train/` and `test/` or with a fixed fifth, by name, as test.

    Images are cropped to their central square and resized with antialiasing.
    """
    folder = _folder(config)
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        train, test = (
            _list_classes(folder / "train", config),
            _list_classes(folder / "test", config),
        )
        names = [{path.parent.name for path, _ in items} for items in (train, test)]
        if odd := sorted(names[0] ^ names[1]):
            raise DataError(
                f"class folder '{odd[0]}' of '{folder}' is not in both train and test: give both "
                "the same classes"
            )
    else:
        everything = _list_classes(folder, config)
        held_out = [
            int(hashlib.sha256(path.relative_to(folder).as_posix().encode()).hexdigest(), 16) % 5
            == 0
            for path, _ in everything
        ]
        train = [item for item, test in zip(everything, held_out, strict=True) if not test]
        test = [item for item, test in zip(everything, held_out, strict=True) if test]
    stored = [_read_images(items, config) for items in (train, test)]
    return stored[0][0], stored[1][0], stored[0][1]


def _list_classes(folder: Path, config: DatasetConfig) -> list[tuple[Path, int]]:
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(classes) != config.num_classes:
        raise DataError(
            f"'{folder}' holds {len(classes)} class folders, not dataset.num_classes="
            f"{config.num_classes}: correct dataset.num_classes or dataset.path"
        )
    items: list[tuple[Path, int]] = []
    for label, path in enumerate(classes):
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in _IMAGE_SUFFIXES)
        if not files:
            raise DataError(f"class folder '{path}' holds no image: remove it or fill it")
        items.extend((file, label) for file in files)
    return items


def _read_images(items: list[tuple[Path, int]], config: DatasetConfig) -> tuple[Split, str]:
    if importlib.util.find_spec("PIL") is None:
        raise DataError("dataset.name=image_folder needs Pillow: pip install pillow")
    shape = (config.channels, config.image_size, config.image_size)
    images = torch.empty((len(items), *shape), dtype=torch.uint8)
    kinds: dict[int, Path] = {}
    labels = torch.tensor([label for _, label in items], dtype=torch.int64)

    def decoded() -> Iterable[np.ndarray]:
        for row, (path, _) in enumerate(items):
            image = _read_image(path, config, kinds)
            images[row] = _fit(image[None], config.image_size)[0]
            yield image.numpy()

    fingerprint = _fingerprint(decoded(), labels.numpy())  # As they are read: one at a time.
    return Split(images, labels), fingerprint


def _read_image(path: Path, config: DatasetConfig, kinds: dict[int, Path]) -> torch.Tensor:
    from PIL import Image

    try:
        with Image.open(path) as file:
            file.load()
            image: Any = file.copy()
    except Exception as error:  # A decoder may raise anything on a damaged file.
        raise DataError(f"'{path}' is no readable image ({error}): repair or remove it") from None
    if image.mode not in ("1", "L", "RGB", "P") or "transparency" in image.info:
        alpha = " with transparency" if "transparency" in image.info else ""
        raise DataError(
            f"'{path}' has pixel format {image.mode}{alpha}: convert it to 8-bit grey or RGB "
            "without transparency"
        )
    kinds.setdefault(1 if image.mode in ("1", "L") else 3, path)
    if len(kinds) > 1:
        raise DataError(
            f"'{kinds[1]}' is grey and '{kinds[3]}' is in colour: convert the files to one kind"
        )
    if config.channels not in kinds:
        found = next(iter(kinds))
        raise DataError(
            f"'{path}' has {'one channel' if found == 1 else 'colours'}: set "
            f"dataset.channels={found}, or convert the files"
        )
    array = np.array(image.convert("L" if config.channels == 1 else "RGB"))
    return torch.from_numpy(array).view(image.height, image.width, -1).permute(2, 0, 1)


LOADERS: dict[str, Callable[[DatasetConfig], tuple[Split, Split, str]]] = {
    "digits": _load_digits,
    "idx": _load_idx,
    "image_folder": _load_image_folder,
}
