"""Writes small data sets in the formats in which the large ones are published."""

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet
from torchvision import datasets

from core.config import DatasetConfig


def published(name: str, folder: Path, **changes: Any) -> DatasetConfig:
    facts = {"image_size": 32, "channels": 3, "num_classes": 2}
    return DatasetConfig(name=name, path=str(folder), **(facts | changes))  # type: ignore[arg-type]


def save(path: Path, pixels: np.ndarray, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path, **options)


def write_cifar(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Ten training images a batch and ten test images; the published digests become theirs."""
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    key = "labels" if name == "cifar10" else "fine_labels"
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    arrays = []

    def dump(file: str, content: dict[str, Any]) -> list[str]:
        (folder / file).write_bytes(pickle.dumps(content))
        return [file, hashlib.md5((folder / file).read_bytes()).hexdigest()]

    def batch(file: str) -> list[str]:
        data = random.integers(0, 256, (10, 3072)).astype(np.uint8)
        arrays.append(data)
        return dump(
            file, {"data": data, key: [i % 3 for i in range(10)], "coarse_labels": [0] * 10}
        )

    for attribute in ("train_list", "test_list"):
        files = [batch(file) for file, _ in getattr(kind, attribute)]
        monkeypatch.setattr(kind, attribute, files)
    names = {kind.meta["key"]: ["a", "b", "c"]}
    _, md5 = dump(kind.meta["filename"], names)
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5})
    return np.concatenate(arrays).reshape(-1, 3, 32, 32)


def write_eurosat(root: Path, each: int = 27) -> None:
    for label, name in enumerate(("AnnualCrop", "Forest")):
        for number in range(each):
            pixels = np.full((64, 64, 3), 100 * label + number)
            save(root / "eurosat" / "2750" / name / f"{name}_{number + 1}.jpg", pixels)


def write_celeba(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six faces to train, two to validate, three to test; every second is male."""
    folder, parts = root / "celeba", [0] * 6 + [1] * 2 + [2] * 3
    names = [f"{number:06}.jpg" for number in range(1, len(parts) + 1)]
    for number, name in enumerate(names):
        save(folder / "img_align_celeba" / name, np.full((218, 178, 3), 20 * number), quality=95)
    male = [2 * (number % 2) - 1 for number in range(len(names))]
    rows = {
        "list_attr_celeba.txt": [
            str(len(names)),
            "5_o_Clock_Shadow Male Young ",
            *(f"{name} -1 {sign:2}  1" for name, sign in zip(names, male, strict=True)),
        ],
        "list_eval_partition.txt": [f"{n} {part}" for n, part in zip(names, parts, strict=True)],
    }
    published = []
    for file, lines in rows.items():
        (folder / file).write_text("\n".join(lines) + "\n")
        published.append(("", hashlib.md5((folder / file).read_bytes()).hexdigest(), file))
    monkeypatch.setattr(
        datasets.CelebA, "file_list", [("", "", "img_align_celeba.zip"), *published]
    )


def write_camelyon17(root: Path) -> None:
    """Patches of five hospitals, two each; hospital 1 validates, hospital 2 tests."""
    lines = [",patient,node,x_coord,y_coord,tumor,slide,center,split"]
    for center in range(5):
        for tumor in (0, 1):
            split = int(center == 4 and tumor == 1)  # One of them validates in its own hospital.
            place = f"patient_{center:03}_node_{tumor}"
            where = f"{center:03},{tumor},{center}0,{tumor}5"
            lines.append(f"{len(lines) - 1},{where},{tumor},0,{center},{split}")
            path = root / "patches" / place / f"patch_{place}_x_{center}0_y_{tumor}5.png"
            save(path, np.full((96, 96, 3), 40 * center + tumor))
    (root / "metadata.csv").write_text("\n".join(lines) + "\n")


def write_parquet(
    path: Path,
    labels: list[Any] | None,
    image: str = "image",
    label: str = "label",
    names: list[str] | None = None,
) -> None:
    """As `datasets` writes it: encoded bytes in a struct; image i is all of value i.

    Four images without labels if there are none.
    """
    numbers = range(4 if labels is None else len(labels))
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = []
    for number in numbers:
        save(path.with_suffix(".png"), np.full((8, 8, 3), number))
        encoded.append({"bytes": path.with_suffix(".png").read_bytes(), "path": None})
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    columns = {image: pyarrow.array(encoded, kind)}
    table = pyarrow.table(columns if labels is None else {**columns, label: pyarrow.array(labels)})
    if names is not None:
        features = {label: {"names": names, "_type": "ClassLabel"}}
        stored = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": stored})
    parquet.write_table(table, path, row_group_size=4)
    path.with_suffix(".png").unlink()
