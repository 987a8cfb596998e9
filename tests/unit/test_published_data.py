"""Data sets in their published formats, and the errors that name a damaged file."""

import re
from pathlib import Path

import numpy as np
import pytest
from picture_files import refuses
from published_files import published as config
from published_files import (
    save,
    write_camelyon17,
    write_celeba,
    write_cifar,
    write_eurosat,
)

from core.__main__ import main
from core.data import load_dataset


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
    where = tmp_path / "runs" / "data"
    assert main(["prepare", "--dataset", name, "--out", str(where)]) == 2
    assert not list(tmp_path.iterdir()), "no empty folder is left"
    out, error = capsys.readouterr()
    assert error.count("\n") == 1
    assert "place the files as listed above" in error
    count = 3 if name == "celeba" else 4
    assert len(re.findall(rf"MD5 [0-9a-f]{{32}}  {where}/", out)) >= count
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
