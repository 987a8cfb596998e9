"""Parquet files as the Hub lays them out: which split is which, labels, names, odd columns."""

from pathlib import Path

import pyarrow
import pytest
from picture_files import refuses
from published_files import published as config
from published_files import write_parquet
from pyarrow import parquet

from core.data import load_dataset


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


def settings_of(folder: Path, number: int = 4, **changes: object):
    return config("parquet", folder, num_examples=number, image_size=8, **changes)


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("default/train/0000.parquet", "default/test/0000.parquet"),
        ("train.parquet", "val.parquet"),
        ("TRAIN.PARQUET", "Validation.Parquet"),
        ("data/train-00000-of-00001-0a1b2c.parquet", "data/dev-00000-of-00001.parquet"),
        ("train.parquet/part-00000.parquet", "test.parquet/part-00000.parquet"),
        ("training/a.parquet", "testing/a.parquet"),
    ],
)
def test_layouts_of_the_hub_and_of_others(tmp_path, train, test):
    write_parquet(tmp_path / train, [0, 1, 1, 0])
    write_parquet(tmp_path / test, [1, 0])
    dataset = load_dataset(settings_of(tmp_path))
    assert dataset.train.labels.tolist() == [0, 1, 1, 0]
    assert dataset.test.labels.tolist() == [1, 0]


@pytest.mark.parametrize("labels", [[-1, -1], [None, None], None])
def test_validation_stands_in_for_a_test_split_without_labels(tmp_path, labels):
    write_parquet(tmp_path / "train.parquet", [0, 1, 1, 0])
    write_parquet(tmp_path / "test.parquet", labels)
    refuses(settings_of(tmp_path), tmp_path / "test.parquet")
    write_parquet(tmp_path / "validation.parquet", [1, 0, 1])
    for cache in (None, tmp_path / "cache"):
        assert load_dataset(settings_of(tmp_path), cache).test.labels.tolist() == [1, 0, 1]
    write_parquet(tmp_path / "test.parquet", [1, 1])
    assert load_dataset(settings_of(tmp_path)).test.labels.tolist() == [1, 1]


@pytest.mark.parametrize(
    "copy", [".ipynb_checkpoints/train-checkpoint", "__MACOSX/train", "._train"]
)
def test_hidden_copies_are_not_read_twice(tmp_path, copy):
    write_parquet(tmp_path / "train.parquet", [0, 1, 1, 0])
    write_parquet(tmp_path / "test.parquet", [0, 1])
    write_parquet(tmp_path / f"{copy}.parquet", [0, 1, 1, 0])
    assert len(load_dataset(settings_of(tmp_path)).train.labels) == 4


def test_a_split_in_two_places_is_refused_as_images_may_count_twice(tmp_path):
    for place in ("one/train", "two/train", "one/test"):
        write_parquet(tmp_path / f"{place}.parquet", [0, 1, 1, 0])
    refuses(settings_of(tmp_path, 8), tmp_path / "one", tmp_path / "two", "dataset.path name one")
    assert len(load_dataset(settings_of(tmp_path / "one")).train.labels) == 4
    write_parquet(tmp_path / "one" / "training.parquet", [0, 1])
    refuses(settings_of(tmp_path / "one", 6), "train*", "training*", "may count twice")


def test_names_of_classes_are_those_that_datasets_stores(tmp_path):
    write_parquet(tmp_path / "train.parquet", [0, 1, 1, 0], names=["cat", "dog"])
    write_parquet(tmp_path / "test.parquet", [0, 1])
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        assert load_dataset(settings_of(tmp_path), cache).class_names == ("cat", "dog")
    write_parquet(tmp_path / "test.parquet", [0, 1], names=["dog", "cat"])
    refuses(settings_of(tmp_path), tmp_path / "test.parquet", "other class names", "fetch both")


def test_labels_may_count_from_1_unless_they_have_names(tmp_path):
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", [1, 2, 2, 1])
    dataset = load_dataset(settings_of(tmp_path))
    assert dataset.train.labels.tolist() == [0, 1, 1, 0]
    assert dataset.class_names == ("1", "2")
    write_parquet(tmp_path / "train.parquet", [1, 2, 2, 1], names=["none", "cat", "dog"])
    refuses(settings_of(tmp_path), "label 2", "correct it, or repair the labels")


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (["cat", "dog", "cat", "dog"], "holds string"),
        ([0.0, 1.0, 0.0, 1.0], "holds double"),
        ([[0], [1], [0], [1]], "holds list<"),
        ([{"a": 0}] * 4, "holds struct<"),
        ([0, None, None, 1], "2 rows without a value"),
        ([None] * 4, "4 rows without a value"),
    ],
)
def test_labels_that_are_no_integers_are_named(tmp_path, labels, told):
    write_parquet(tmp_path / "train.parquet", labels)
    write_parquet(tmp_path / "test.parquet", [0, 1])
    path = tmp_path / "train.parquet"
    refuses(settings_of(tmp_path), "column 'label'", path, told, "dataset.label_column")


@pytest.mark.parametrize(
    "images",
    [
        [None] * 4,
        [{"bytes": None, "path": "a.png"}] * 4,
        ["a.png"] * 4,
        [[1, 2, 3]] * 4,
        [7] * 4,
    ],
)
def test_columns_without_encoded_images_are_named(tmp_path, images):
    path = tmp_path / "train.parquet"
    parquet.write_table(pyarrow.table({"image": images, "label": [0, 1, 1, 0]}), path)
    write_parquet(tmp_path / "test.parquet", [0, 1])
    refuses(settings_of(tmp_path), "row 0", path, "no encoded image", "dataset.image_column")


def test_images_may_be_bytes_alone_and_are_judged_as_files_are(tmp_path):
    write_parquet(tmp_path / "test.parquet", [0, 1])
    rows = parquet.read_table(tmp_path / "test.parquet").column("image").to_pylist()
    content = [row["bytes"] for row in rows] * 2
    path = tmp_path / "train.parquet"
    parquet.write_table(pyarrow.table({"image": content, "label": [0, 1, 1, 0]}), path)
    assert load_dataset(settings_of(tmp_path)).train.images[1, 0, 0, 0] == 1
    content[2] = content[2][:40]
    parquet.write_table(pyarrow.table({"image": content, "label": [0, 1, 1, 0]}), path)
    refuses(settings_of(tmp_path), f"{path}, row 2", "no readable image", "repair or remove it")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PK"])
def test_files_that_are_no_parquet_are_named(tmp_path, content):
    write_parquet(tmp_path / "test.parquet", [0, 1])
    (tmp_path / "train.parquet").write_bytes(content)
    refuses(settings_of(tmp_path), tmp_path / "train.parquet", "no readable parquet file")
