"""Data sets in their published formats, and the errors that name a damaged file."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from published_files import (
    save,
    write_camelyon17,
    write_celeba,
    write_cifar,
    write_eurosat,
    write_parquet,
)

from core.__main__ import main
from core.config import DatasetConfig
from core.data import load_dataset
from core.errors import DataError


def config(name: str, folder: Path, **changes: Any) -> DatasetConfig:
    facts = {"image_size": 32, "channels": 3, "num_classes": 2}
    return DatasetConfig(name=name, path=str(folder), **(facts | changes))  # type: ignore[arg-type]


def refuses(settings: DatasetConfig, *parts: str | Path) -> None:
    pattern = ".*".join(re.escape(str(part)) for part in parts)
    with pytest.raises(DataError, match=pattern) as caught:
        load_dataset(settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "count"), [("cifar10", 50), ("cifar100", 10)])
def test_cifar_is_read_to_the_byte(tmp_path, monkeypatch, name, count):
    pixels = write_cifar(tmp_path, name, monkeypatch)
    settings = config(name, tmp_path, num_classes=3, num_examples=count)
    dataset = load_dataset(settings)
    assert np.array_equal(dataset.train.images.numpy(), pixels[:count])
    assert np.array_equal(dataset.test.images.numpy(), pixels[count:])
    assert dataset.train.labels[:10].tolist() == [i % 3 for i in range(10)]
    half = load_dataset(settings.model_copy(update={"image_size": 16}))
    assert half.train.images.shape == (count, 3, 16, 16)
    assert half.fingerprint == dataset.fingerprint


def test_a_damaged_cifar_file_is_named(tmp_path, monkeypatch):
    write_cifar(tmp_path, "cifar10", monkeypatch)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    settings = config("cifar10", tmp_path, num_classes=3, num_examples=50)
    refuses(settings, path, "is damaged: its MD5 is not the published", "fetch it again")
    path.unlink()
    refuses(settings, path, "missing", "prepare --dataset cifar10", "correct dataset.path")


def test_eurosat_is_split_23_to_4_by_name(tmp_path):
    write_eurosat(tmp_path)
    dataset = load_dataset(config("eurosat", tmp_path, num_examples=46))
    assert dataset.train.images.shape == (46, 3, 32, 32)
    assert len(dataset.test.labels) == 8
    values = [
        {round(float(image.float().mean())) for image in split.images}
        for split in (dataset.train, dataset.test)
    ]
    assert values[0] | values[1] == {*range(27), *range(100, 127)}
    assert values[0].isdisjoint(values[1])
    for split in (dataset.train, dataset.test):
        means = split.images.float().mean((1, 2, 3))
        assert ((means > 60).long() == split.labels).all()


@pytest.mark.parametrize("size", [32, 64, 128])
def test_celeba_has_its_own_split_and_the_gender_label(tmp_path, monkeypatch, size):
    write_celeba(tmp_path, monkeypatch)
    dataset = load_dataset(config("celeba", tmp_path, num_examples=6, image_size=size))
    assert dataset.train.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert dataset.test.labels.tolist() == [0, 1, 0]
    assert dataset.train.images.shape == (6, 3, size, size)
    assert dataset.train.images[:, 0, 0, 0].tolist() == [20 * i for i in range(6)]
    assert dataset.test.images[:, 2, -1, -1].tolist() == [160, 180, 200]


def test_damaged_celeba_files_are_named(tmp_path, monkeypatch):
    write_celeba(tmp_path, monkeypatch)
    face = tmp_path / "celeba" / "img_align_celeba" / "000003.jpg"
    whole = face.read_bytes()
    face.write_bytes(whole[: len(whole) // 2])
    settings = config("celeba", tmp_path, num_examples=6)
    refuses(settings, face, "repair or remove it")
    table = tmp_path / "celeba" / "list_eval_partition.txt"
    table.write_text(table.read_text().replace("000001.jpg 0", "000001.jpg 2"))
    refuses(settings, table, "MD5")


def test_camelyon17_holds_two_hospitals_out(tmp_path):
    write_camelyon17(tmp_path)
    dataset = load_dataset(config("camelyon17", tmp_path, num_examples=5))
    assert dataset.train.images[:, 0, 0, 0].tolist() == [0, 1, 120, 121, 160]
    assert dataset.train.labels.tolist() == [0, 1, 0, 1, 0]
    assert dataset.test.images[:, 0, 9, 9].tolist() == [80, 81]
    assert dataset.test.images.shape == (2, 3, 32, 32)


def test_damaged_camelyon17_files_are_named(tmp_path):
    write_camelyon17(tmp_path)
    patch = tmp_path / "patches" / "patient_003_node_1" / "patch_patient_003_node_1_x_30_y_15.png"
    patch.write_bytes(patch.read_bytes()[:40])
    settings = config("camelyon17", tmp_path, num_examples=5)
    refuses(settings, patch, "repair or remove it")
    table = tmp_path / "metadata.csv"
    table.write_text(table.read_text().replace("tumor", "tumour", 1))
    refuses(settings, table, "no column 'tumor'", "commas, or fetch it again")
    table.unlink()
    refuses(settings, table, "is missing", "prepare --dataset camelyon17")


def test_parquet_of_several_files(tmp_path):
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", [0, 1, 0, 1, 1])
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", [1, 0])
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", [1, 0, 0])
    dataset = load_dataset(config("parquet", tmp_path, num_examples=7, image_size=8))
    assert dataset.train.labels.tolist() == [0, 1, 0, 1, 1, 1, 0]
    assert dataset.train.images[:, 1, 3, 3].tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert dataset.test.labels.tolist() == [1, 0, 0]


def test_parquet_columns_have_other_names(tmp_path):
    for name in ("train", "validation"):
        write_parquet(tmp_path / f"{name}.parquet", [0, 1, 1, 0], "img", "fine_label")
    settings = config("parquet", tmp_path, num_examples=4, image_size=8)
    refuses(settings, "no column 'label'", "dataset.label_column", "img, fine_label")
    settings = settings.model_copy(update={"label_column": "fine_label"})
    refuses(settings, "no column 'image'", "dataset.image_column", "img, fine_label")
    settings = settings.model_copy(update={"image_column": "img"})
    assert load_dataset(settings).train.labels.tolist() == [0, 1, 1, 0]


def test_damaged_parquet_files_are_named(tmp_path):
    for name in ("train", "test"):
        write_parquet(tmp_path / f"{name}.parquet", [0, 1])
    settings = config("parquet", tmp_path, num_examples=4, image_size=8)
    train = tmp_path / "train.parquet"
    write_parquet(train, [0, None])
    refuses(settings, "column 'label'", train, "not an integer in each row")
    write_parquet(train, [0, -1])
    refuses(settings, train, "label -1")
    train.write_bytes(train.read_bytes()[:-9])
    refuses(settings, train, "no readable parquet file", "fetch it again")
    train.unlink()
    refuses(settings, tmp_path, "no train*.parquet")


def place(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "eurosat":
        write_eurosat(root, each=7)
    elif name == "celeba":
        write_celeba(root, monkeypatch)
    elif name == "camelyon17":
        write_camelyon17(root / "camelyon17_v1.0")
    else:
        write_cifar(root, name, monkeypatch)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "eurosat", "camelyon17"])
def test_prepare_finds_what_was_placed_by_hand(tmp_path, monkeypatch, capsys, name):
    place(name, tmp_path, monkeypatch)
    assert main(["prepare", "--dataset", name, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    folder = re.search(r"ready  dataset\.path=(\S+)", out)
    assert folder is not None
    facts = {"cifar10": 50, "cifar100": 10, "eurosat": 12, "camelyon17": 5}
    classes = 3 if "cifar" in name else 2
    settings = config(name, Path(folder[1]), num_examples=facts[name], num_classes=classes)
    assert len(load_dataset(settings).train.labels) == facts[name]


@pytest.mark.parametrize("name", ["mnist", "cifar10", "celeba"])
def test_prepare_says_what_to_place_where(tmp_path, monkeypatch, capsys, name):
    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", offline)
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", offline)
    monkeypatch.setattr("torchvision.datasets.celeba.download_file_from_google_drive", offline)
    assert main(["prepare", "--dataset", name, "--out", str(tmp_path)]) == 2
    out, error = capsys.readouterr()
    assert error.count("\n") == 1
    assert "place the files as listed above" in error
    count = 3 if name == "celeba" else 4
    assert len(re.findall(rf"MD5 [0-9a-f]{{32}}  {tmp_path}/", out)) >= count
    assert "https://" in out


def test_prepare_refuses_a_damaged_file(tmp_path, monkeypatch, capsys):
    write_cifar(tmp_path, "cifar10", monkeypatch)
    path = tmp_path / "cifar-10-batches-py" / "test_batch"
    path.write_bytes(b"")
    assert main(["prepare", "--dataset", "cifar10", "--out", str(tmp_path)]) == 2
    assert f"'{path}' is damaged" in capsys.readouterr().err
    assert main(["prepare", "--dataset", "mnits"]) == 2
    assert "choose of mnist, fashion_mnist" in capsys.readouterr().err


def test_a_grey_image_among_colours_is_named(tmp_path):
    write_eurosat(tmp_path, each=7)
    odd = tmp_path / "eurosat" / "2750" / "Forest" / "Forest_2.jpg"
    save(odd, np.zeros((64, 64)))
    refuses(config("eurosat", tmp_path, num_examples=12), f"'{odd}' is grey", "convert")
