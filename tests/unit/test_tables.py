"""Data sets whose tables say which picture is what, as published and as others copied them."""

import re
from pathlib import Path

import pytest
from picture_files import refuses
from published_files import published as config
from published_files import write_camelyon17, write_celeba

from core.__main__ import main
from core.data import load_dataset


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
    lines = table.read_text().splitlines()
    table.write_text("\n".join([*lines, lines[1]]))  # One record would count as two.
    refuses(settings, f"line {len(lines) + 1} of", table, "again")
    table.write_text("\n".join(lines).replace("tumor", "tumour", 1))
    refuses(settings, table, "no column 'tumor'", "commas, or fetch it again")
    table.unlink()
    refuses(settings, table, "is missing", "prepare --dataset camelyon17")


def as_kaggle_has_it(root: Path) -> None:
    """Tables with commas, nothing below `celeba/`, the pictures one folder deeper."""
    attributes = (root / "celeba" / "list_attr_celeba.txt").read_text().splitlines()
    names = ",".join(["image_id", *attributes[1].split()])
    rows = [",".join(line.split()) for line in attributes[2:]]
    (root / "list_attr_celeba.csv").write_text("\n".join([names, *rows]) + "\n")
    parts = (root / "celeba" / "list_eval_partition.txt").read_text().split()
    rows = [f"{name},{part}" for name, part in zip(parts[::2], parts[1::2], strict=True)]
    table = "\r\n".join(["image_id,partition", *rows])
    (root / "list_eval_partition.csv").write_text(table, newline="")
    pictures = root / "img_align_celeba"
    pictures.mkdir()
    (root / "celeba" / "img_align_celeba").rename(pictures / "img_align_celeba")
    for path in (root / "celeba").iterdir():
        path.unlink()
    (root / "celeba").rmdir()


def test_celeba_as_kaggle_has_it_is_the_same(tmp_path, monkeypatch):
    write_celeba(tmp_path, monkeypatch)
    settings = config("celeba", tmp_path, num_examples=6)
    ours = load_dataset(settings)
    assert ours.class_names == ("not Male", "Male")
    as_kaggle_has_it(tmp_path)
    again = load_dataset(settings)
    assert again.fingerprint == ours.fingerprint
    assert again.test.labels.tolist() == ours.test.labels.tolist()
    path = tmp_path / "list_attr_celeba.csv"
    whole = path.read_text()
    for change, told in (
        (("000003.jpg,-1,-1", "000003.jpg,-1,0"), "Male=0 of '000003.jpg'"),
        (("000003.jpg", "../3.jpg"), "'../3.jpg'"),
        (("000003.jpg", "000002.jpg"), "'000002.jpg', which must be there once"),
        (("000003.jpg", "000099.jpg"), "'000003.jpg' is in one of"),
        (("Male", "Female"), "no column 'Male'"),
        ((",", ";"), "no column 'image_id'"),
    ):
        path.write_text(whole.replace(*change))
        refuses(settings, told, "fetch")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_line_ends_and_marked_encodings_do_not_matter(tmp_path, monkeypatch, encoding):
    write_celeba(tmp_path, monkeypatch)
    write_camelyon17(tmp_path)
    tables = [*(tmp_path / "celeba").glob("*.txt"), tmp_path / "metadata.csv"]
    for path in tables:
        path.write_bytes(path.read_text().replace("\n", "\r\n").encode(encoding))
    assert len(load_dataset(config("celeba", tmp_path, num_examples=6)).test.labels) == 3
    assert len(load_dataset(config("camelyon17", tmp_path, num_examples=5)).test.labels) == 2


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda text: text.encode("utf-16-le"), "perhaps UTF-16"),
        (lambda text: text.encode() + "\u00e9".encode("latin-1"), "perhaps Latin-1"),
        (lambda text: text.replace("\n0,", '\n"0,').encode() + b"x" * 140_000, "is no table"),
        (lambda text: text.replace("\n3,", '\n"3,').encode(), "is no table"),
        (lambda text: text.replace(",", ";").encode(), "commas"),
        (lambda text: text.replace("\n3,001", "\n3,one").encode(), "'one'"),
        (lambda text: text[:-12].encode(), "NoneType"),
        (lambda text: b"", "no column 'patient'"),
    ],
)
def test_what_is_wrong_with_a_table_is_told(tmp_path, change, told):
    write_camelyon17(tmp_path)
    path = tmp_path / "metadata.csv"
    path.write_bytes(change(path.read_text()))
    refuses(config("camelyon17", tmp_path, num_examples=5), path, told)


def test_a_folder_in_the_place_of_a_table(tmp_path, monkeypatch):
    write_camelyon17(tmp_path)
    write_celeba(tmp_path, monkeypatch)
    for name, path in (
        ("camelyon17", tmp_path / "metadata.csv"),
        ("celeba", tmp_path / "celeba" / "list_attr_celeba.txt"),
    ):
        path.unlink()
        path.mkdir()
        refuses(config(name, tmp_path), path, "Is a directory")


def test_patients_without_their_zeros_are_the_same(tmp_path):
    write_camelyon17(tmp_path)
    path = tmp_path / "metadata.csv"
    path.write_text(re.sub(r",00(\d,.,)", r",\1", path.read_text()))
    assert "0,0,0,00,05" in path.read_text()
    dataset = load_dataset(config("camelyon17", tmp_path, num_examples=5))
    assert dataset.class_names == ("no tumor", "tumor")


@pytest.mark.parametrize("kaggle", [False, True])
def test_prepare_asks_of_celeba_only_for_what_is_read(tmp_path, monkeypatch, capsys, kaggle):
    write_celeba(tmp_path, monkeypatch)
    if kaggle:
        as_kaggle_has_it(tmp_path)
    assert main(["prepare", "--dataset", "celeba", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"ready  dataset.path={tmp_path}" in out
    for unread in ("identity", "bbox", "landmarks"):
        assert unread not in out
