"""Data sets: what is read, and errors that name the file and the remedy."""

import gzip
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from idx_files import TEST_IMAGES, TEST_LABELS, TRAIN_IMAGES, TRAIN_LABELS, write_idx
from picture_files import config, refuses

from core.config import DatasetConfig
from core.data import from_model_range, load_dataset, to_float, to_model_range


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_is_read_to_the_byte(tmp_path, zipped):
    write_idx(tmp_path, zipped)
    dataset = load_dataset(config(tmp_path))
    random = np.random.default_rng(0)
    train = random.integers(0, 256, (30, 6, 6)).astype(np.uint8)
    test = random.integers(0, 256, (12, 6, 6)).astype(np.uint8)
    assert np.array_equal(dataset.train.images.numpy()[:, 0], train)
    assert np.array_equal(dataset.test.images.numpy()[:, 0], test)
    assert dataset.train.labels.tolist() == [i % 3 for i in range(30)]
    assert dataset.test.labels.tolist() == [i % 3 for i in range(12)]
    assert (dataset.train.images.dtype, dataset.train.labels.dtype) == (torch.uint8, torch.int64)


def test_idx_images_are_cropped_to_their_centre_and_resized(tmp_path):
    images = np.zeros((30, 6, 10))
    images[:, :, 2:8] = 200
    write_idx(tmp_path, train_images=images)
    for size in (4, 6, 12):
        train = load_dataset(config(tmp_path, image_size=size)).train
        assert train.images.shape == (30, 1, size, size)
        assert (train.images == 200).all()


def test_fingerprint_is_that_of_the_content(tmp_path):
    write_idx(tmp_path / "plain")
    write_idx(tmp_path / "zipped", zipped=True)
    plain = load_dataset(config(tmp_path / "plain")).fingerprint
    assert re.fullmatch("[0-9a-f]{64}", plain)
    assert load_dataset(config(tmp_path / "zipped")).fingerprint == plain
    # One pixel or one label of a training record changes it; nothing else does.
    changes = ((TRAIN_IMAGES, 500, False), (TEST_IMAGES, 100, True), (TEST_LABELS, 10, True))
    for name, place, same in changes:
        folder = tmp_path / f"{name}-changed"
        write_idx(folder)
        content = bytearray((folder / name).read_bytes())
        content[place] = (content[place] + 1) % (256 if "images" in name else 3)
        (folder / name).write_bytes(content)
        assert (load_dataset(config(folder)).fingerprint == plain) == same
    for size in (4, 12):
        assert load_dataset(config(tmp_path / "plain", image_size=size)).fingerprint == plain
    swapped = np.arange(30) % 3
    swapped[[0, 1]] = swapped[[1, 0]]
    write_idx(tmp_path / "swapped", train_labels=swapped)
    assert load_dataset(config(tmp_path / "swapped")).fingerprint != plain


@pytest.mark.parametrize("path", [None, ""])
def test_missing_path(path):
    settings = config(None).model_copy(update={"path": path})
    refuses(settings, "dataset.name=idx needs a folder", "set dataset.path=FOLDER")


def test_missing_folder(tmp_path):
    refuses(config(tmp_path / "nowhere"), tmp_path / "nowhere", "correct the path")
    refuses(config(Path("~nobody-of-that-name/data")), "~nobody-of-that-name", "correct the path")
    refuses(config(Path("x" * 300)), "xxx", "too long", "dataset.path")


@pytest.mark.parametrize("name", [TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS])
def test_missing_file(tmp_path, name):
    write_idx(tmp_path)
    (tmp_path / name).unlink()
    refuses(config(tmp_path), tmp_path, f"neither '{name}' nor '{name}.gz'", "fetch it")


@pytest.mark.parametrize("zipped", [False, True])
def test_wrong_magic_number(tmp_path, zipped):
    write_idx(tmp_path, zipped)
    suffix = ".gz" if zipped else ""
    shutil.copy(tmp_path / f"{TRAIN_LABELS}{suffix}", tmp_path / f"{TRAIN_IMAGES}{suffix}")
    refuses(
        config(tmp_path),
        tmp_path / f"{TRAIN_IMAGES}{suffix}",
        "magic number 0x00000801, not 0x00000803",
        "put an IDX file of unsigned bytes in 3 dimensions there",
    )


@pytest.mark.parametrize("size", [0, 3, 10, 16, 400])
def test_truncated_file(tmp_path, size):
    write_idx(tmp_path)
    path = tmp_path / TEST_IMAGES
    path.write_bytes(path.read_bytes()[:size])
    refuses(config(tmp_path), path, f"truncated: {size} bytes", "fetch it again")


def test_truncated_gzip(tmp_path):
    write_idx(tmp_path, zipped=True)
    path = tmp_path / f"{TRAIN_IMAGES}.gz"
    whole = path.read_bytes()
    for content in (whole[:-20], whole[:-8], whole[:30], b"", whole[:40] + b"\xff" * 9, b"text"):
        path.write_bytes(content)
        refuses(config(tmp_path), path, "fetch it again")
    path.write_bytes(gzip.compress(gzip.decompress(whole)[:99]))
    refuses(config(tmp_path), path, "truncated: 99 bytes where its header says 1096")


def test_too_long_file(tmp_path):
    write_idx(tmp_path)
    path = tmp_path / TRAIN_LABELS
    path.write_bytes(path.read_bytes() + b"\x00")
    refuses(config(tmp_path), path, "too long: 39 bytes where its header says 38", "fetch it again")


def test_images_without_pixels(tmp_path):
    write_idx(tmp_path, train_images=np.zeros((30, 0, 6)))
    refuses(config(tmp_path), tmp_path / TRAIN_IMAGES, "0x6 pixels", "fetch it again")


def test_counts_that_differ(tmp_path):
    write_idx(tmp_path, train_labels=np.arange(29) % 3)
    refuses(
        config(tmp_path),
        f"'{tmp_path / TRAIN_IMAGES}' holds 30 images",
        f"'{tmp_path / TRAIN_LABELS}' 29",
        "do not belong together: fetch both again",
    )


def test_label_out_of_range(tmp_path):
    write_idx(tmp_path, test_labels=np.arange(12) % 4)
    refuses(
        config(tmp_path),
        tmp_path / TEST_LABELS,
        "label 3, which must lie in [0, 2], as dataset.num_classes=3",
        "correct it, or repair the labels",
    )


def test_class_without_training_images(tmp_path):
    write_idx(tmp_path)
    refuses(config(tmp_path, num_classes=4), "class 3", tmp_path, "lower dataset.num_classes=4")
    write_idx(tmp_path, test_labels=np.zeros(12))  # The test split need not have every class.
    assert len(load_dataset(config(tmp_path)).test.labels) == 12


def test_split_without_images(tmp_path):
    write_idx(tmp_path, test_images=np.zeros((0, 9, 9)), test_labels=np.zeros(0))
    refuses(config(tmp_path), tmp_path, "no test image: add some")


def test_stated_number_of_examples_must_be_that_of_the_data(tmp_path):
    write_idx(tmp_path)
    refuses(config(tmp_path, num_examples=31), "num_examples=31", tmp_path, "30", "state it")


def test_stated_channels_must_be_those_of_the_data(tmp_path):
    write_idx(tmp_path)
    refuses(config(tmp_path, channels=3), tmp_path, "(1, 6, 6), not (3, 6, 6)", "dataset.channels")


@pytest.mark.parametrize("layout", ["dots", "folders", "capitals", "emnist"])
def test_usual_names_of_idx_files_are_taken(tmp_path, layout):
    write_idx(tmp_path / "plain")
    found = load_dataset(config(tmp_path / "plain"))
    write_idx(tmp_path / "other", zipped=layout == "emnist")
    for path in list((tmp_path / "other").iterdir()):
        name = path.name
        if layout == "dots":  # As 7-Zip names them, beside empty folders as Kaggle has them.
            path.rename(path.with_name(name.replace("-idx", ".idx")))
            path.mkdir()
        elif layout == "folders":
            path.rename(tmp_path / name)
            path.mkdir()
            (tmp_path / name).rename(path / name)
        elif layout == "capitals":
            path.rename(path.with_name(name.upper()))
        else:
            path.rename(path.with_name("emnist-digits-" + name.replace("t10k", "test")))
    (tmp_path / "other" / f"._{TRAIN_IMAGES}").write_bytes(b"no data")
    assert load_dataset(config(tmp_path / "other")).fingerprint == found.fingerprint


def test_several_sets_in_one_folder_are_refused(tmp_path):
    write_idx(tmp_path)
    for path in list(tmp_path.iterdir()):
        shutil.copy(path, tmp_path / f"emnist-letters-{path.name}")
    refuses(config(tmp_path), tmp_path, "several data sets", "'emnist-letters-'", "its own")


def test_labels_that_count_from_1_are_taken(tmp_path):
    labels = {"train_labels": 1 + np.arange(30) % 3, "test_labels": 1 + np.arange(12) % 3}
    write_idx(tmp_path, **labels)
    dataset = load_dataset(config(tmp_path))
    assert dataset.train.labels.tolist() == [i % 3 for i in range(30)]
    assert dataset.test.labels.tolist() == [i % 3 for i in range(12)]
    assert dataset.class_names == ("1", "2", "3")
    write_idx(tmp_path, **labels | {"test_labels": np.arange(12) % 3})
    refuses(config(tmp_path), tmp_path / TEST_LABELS, "label 0, which must lie in [1, 3]")


def test_digits_have_every_class():
    dataset = load_dataset(DatasetConfig())
    assert dataset.train.images.shape == (1437, 1, 8, 8)
    assert dataset.test.images.shape == (360, 1, 8, 8)
    for split in (dataset.train, dataset.test):
        assert split.labels.unique().tolist() == list(range(10))
        assert (int(split.images.min()), int(split.images.max())) == (0, 255)


def test_digits_read_no_folder(tmp_path):
    refuses(DatasetConfig(path=str(tmp_path)), "digits", tmp_path, "set dataset.name to idx or")


def test_ranges_are_those_of_bytes_and_of_the_model():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert to_float(images).tolist() == pytest.approx([0.0, 0.2, 1.0])
    assert to_model_range(to_float(images)).tolist() == pytest.approx([-1.0, -0.6, 1.0])
    again = from_model_range(to_model_range(to_float(images))) * 255
    assert torch.equal(again.round().byte(), images)
    assert from_model_range(torch.tensor([-3.0, 3.0])).tolist() == [0.0, 1.0]
