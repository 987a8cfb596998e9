"""Folders of pictures: which files count, in which split, of which class."""

import hashlib
import json
import logging
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from picture_files import folder_config, picture, refuses, write_folder

from core.data import load_dataset


def in_test(name: str) -> bool:
    """Whether a file in no folder of a split belongs to the fixed fifth."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 5 == 0


@pytest.mark.parametrize("channels", [1, 3])
def test_image_folder_with_train_and_test(tmp_path, channels):
    write_folder(tmp_path / "train", colour=channels == 3)
    write_folder(tmp_path / "test", each=3, colour=channels == 3)
    dataset = load_dataset(folder_config(tmp_path, channels=channels, num_examples=40))
    assert dataset.train.images.shape == (40, channels, 6, 6)
    assert dataset.train.labels.tolist() == [0] * 20 + [1] * 20
    assert dataset.test.labels.tolist() == [0] * 3 + [1] * 3
    values = dataset.train.images[:, 0, 0, 0].tolist()
    assert values == [*range(20), *range(100, 120)]
    assert (dataset.train.images == dataset.train.images[:, :1, :1, :1]).all()


def test_colours_keep_their_channels(tmp_path):
    write_folder(tmp_path / "train", colour=True)
    write_folder(tmp_path / "test", colour=True)
    picture(tmp_path / "train" / "class0" / "000.png", np.tile([10, 20, 30], (6, 6, 1)))
    train = load_dataset(folder_config(tmp_path, channels=3, num_examples=40)).train
    assert train.images[0, :, 2, 4].tolist() == [10, 20, 30]


def test_images_are_cropped_to_their_centre_and_resized(tmp_path):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "test")
    tall, wide = np.zeros((40, 12)), np.zeros((12, 40))
    tall[14:26], wide[:, 14:26] = 77, 88
    picture(tmp_path / "train" / "class0" / "000.png", tall)
    picture(tmp_path / "train" / "class0" / "001.png", wide)
    halves = np.zeros((12, 12))
    halves[:, 6:] = 200
    picture(tmp_path / "train" / "class0" / "002.png", halves)
    images = load_dataset(folder_config(tmp_path, num_examples=40)).train.images
    assert (images[0] == 77).all()
    assert (images[1] == 88).all()
    assert (images[2, :, :, :2] == 0).all()
    assert (images[2, :, :, 4:] == 200).all()


def split_of(folder: Path, **changes: object) -> tuple[set[int], set[int]]:
    """Pixel values, which name the images, of the training and the test split."""
    dataset = load_dataset(folder_config(folder, **changes))
    return (
        set(dataset.train.images[:, 0, 0, 0].tolist()),
        set(dataset.test.images[:, 0, 0, 0].tolist()),
    )


def test_fixed_fifth_does_not_depend_on_the_other_files(tmp_path):
    write_folder(tmp_path, each=60)
    train, test = split_of(tmp_path, num_examples=99)
    assert (len(train), len(test)) == (99, 21)
    assert train.isdisjoint(test)
    for number in range(0, 60, 2):
        (tmp_path / "class0" / f"{number:03}.png").unlink()
    left = {*range(1, 60, 2), *range(100, 160)}
    fewer = split_of(tmp_path, num_examples=len(train & left))
    assert fewer == (train & left, test & left)
    assert len(test & left) < len(test)


def test_other_files_and_hidden_folders_are_not_images(tmp_path):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "test")
    (tmp_path / "train" / ".thumbnails").mkdir()
    (tmp_path / "train" / "class0" / "notes.txt").write_text("no image")
    dataset = load_dataset(folder_config(tmp_path, num_examples=40))
    assert len(dataset.train.labels) == 40


def test_class_folder_without_images(tmp_path):
    write_folder(tmp_path)
    shutil.rmtree(tmp_path / "class1")
    (tmp_path / "class1").mkdir()
    refuses(folder_config(tmp_path), tmp_path / "class1", "holds no image: remove it or fill it")


@pytest.mark.parametrize("classes", [0, 1, 3])
def test_wrong_number_of_class_folders(tmp_path, classes):
    write_folder(tmp_path, classes)
    refuses(
        folder_config(tmp_path),
        tmp_path,
        f"{classes} class folders, not dataset.num_classes=2: correct",
    )


def test_train_and_test_must_have_the_same_classes(tmp_path):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "test")
    (tmp_path / "test" / "class1").rename(tmp_path / "test" / "other")
    refuses(folder_config(tmp_path), "'class1'", tmp_path, "give both the same classes")


def test_image_folder_without_test_images(tmp_path):
    for label in (0, 1):
        names = [f"class{label}/{number}.png" for number in range(20)]
        picture(tmp_path / next(name for name in names if not in_test(name)), np.zeros((6, 6)))
    refuses(folder_config(tmp_path), tmp_path, "no test image: add some")


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Train", "Test"),
        ("TRAIN", "val"),
        ("training", "validation"),
        ("Training", "Testing"),
        ("train", "Valid"),
        ("train_32", "test_32"),
        ("train2017", "val2017"),
        ("training_set", "test_set"),
        ("train", "dev"),
    ],
)
def test_usual_names_of_splits_are_known(tmp_path, train, test):
    write_folder(tmp_path / train)
    write_folder(tmp_path / test, each=3)
    dataset = load_dataset(folder_config(tmp_path, num_examples=40))
    assert (len(dataset.train.labels), len(dataset.test.labels)) == (40, 6)
    assert dataset.class_names == ("class0", "class1")


def test_test_goes_before_validation_unless_it_has_no_labels(tmp_path):
    for split, each in (("train", 20), ("val", 5), ("test", 3)):
        write_folder(tmp_path / split, each=each)
    assert len(load_dataset(folder_config(tmp_path, num_examples=40)).test.labels) == 6
    shutil.rmtree(tmp_path / "test")
    picture(tmp_path / "test" / "000.png", np.zeros((6, 6)))
    assert len(load_dataset(folder_config(tmp_path, num_examples=40)).test.labels) == 10


@pytest.mark.parametrize(
    "names", [("Train", "Test"), ("test", "cat"), ("val", "dog"), ("train", "x")]
)
def test_a_split_is_never_taken_for_a_class(tmp_path, names):
    for name in names:
        for number in range(20):
            picture(tmp_path / name / f"{number}.png", np.full((6, 6), number))
    if "Test" in names:
        refuses(
            folder_config(tmp_path),
            tmp_path / "Train",
            "0 class folders",
            "20 files of suffix .png",
        )
    else:
        odd = next(name for name in names if name in ("test", "val", "train"))
        refuses(folder_config(tmp_path), tmp_path / odd, "has the name of a split", "rename")


def test_two_folders_for_one_split_are_refused(tmp_path):
    for split in ("train", "Training", "test"):
        write_folder(tmp_path / split)
    refuses(folder_config(tmp_path), "both look like the train split: rename one")


def test_inside_a_split_a_class_may_have_any_name(tmp_path):
    for split in ("train", "test"):
        write_folder(tmp_path / split)
        (tmp_path / split / "class1").rename(tmp_path / split / "train")
    dataset = load_dataset(folder_config(tmp_path, num_examples=40))
    assert dataset.class_names == ("class0", "train")


def test_what_systems_leave_is_no_part_of_the_data(tmp_path):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "test")
    clean = load_dataset(folder_config(tmp_path, num_examples=40))
    for place in (tmp_path, tmp_path / "train", tmp_path / "train" / "class0"):
        for name in (".ipynb_checkpoints", "__MACOSX", "@eaDir", ".thumbnails"):
            picture(place / name / "000.png", np.zeros((6, 6)))
        for name in ("._000.png", ".DS_Store", "Thumbs.db", "desktop.ini", ".hidden.png"):
            (place / name).write_bytes(b"\0\5\x16\7")
    dataset = load_dataset(folder_config(tmp_path, num_examples=40))
    assert dataset.fingerprint == clean.fingerprint
    assert len(dataset.test.labels) == len(clean.test.labels)


def test_numbers_go_by_their_value_and_names_are_kept(tmp_path):
    for split in ("train", "test"):
        for name in ("1", "2", "10", "zebra"):
            value = int(name) if name.isdecimal() else 99
            for number in range(3):
                picture(tmp_path / split / name / f"{number}.png", np.full((6, 6), value))
    settings = folder_config(tmp_path, num_classes=4, num_examples=12)
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        dataset = load_dataset(settings, cache)
        assert dataset.class_names == ("1", "2", "10", "zebra")
        assert dataset.train.images[::3, 0, 0, 0].tolist() == [1, 2, 10, 99]
        assert dataset.train.labels.tolist() == [label for label in range(4) for _ in range(3)]


def test_accents_stored_in_two_ways_give_one_split_and_one_fingerprint(tmp_path):
    classes = ("zebra", "\u00e1rbol", "\u00e9toile")
    names = [f"{name}/\u00e0{number}-\u0151.png" for name in classes for number in range(20)]
    found = []
    for form in ("NFC", "NFD"):
        for number, name in enumerate(names):
            path = tmp_path / form / unicodedata.normalize(form, name)
            picture(path, np.full((6, 6), number))
        count = sum(not in_test(name) for name in names)
        settings = folder_config(tmp_path / form, num_classes=3, num_examples=count)
        found.append(load_dataset(settings))
    assert {path.name for path in (tmp_path / "NFC").iterdir()} == set(classes)
    assert found[0].fingerprint == found[1].fingerprint
    assert found[0].class_names == found[1].class_names == classes
    assert np.array_equal(found[0].test.images, found[1].test.images)


def test_one_name_stored_in_two_ways_is_refused(tmp_path):
    write_folder(tmp_path)
    for name in ("\u00e9.png", "e\u0301.png"):
        picture(tmp_path / "class1" / name, np.zeros((6, 6)))
    refuses(folder_config(tmp_path), tmp_path / "class1", "'\u00e9.png' twice", "remove one")


def test_files_that_are_not_read_are_counted_and_named(tmp_path, caplog):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "test")
    folder = tmp_path / "train" / "class0"
    for number, name in enumerate(("a.avif", "b.HEIC", "c", "d.npy")):
        (folder / f"{number:03}.png").rename(folder / name)
    (tmp_path / "test" / "class1" / "more").mkdir()
    picture(tmp_path / "train" / "lost.png", np.zeros((6, 6)))
    told = "(5 files of suffix .avif, .heic, .npy, .png, none and 1 folder left out)"
    refuses(folder_config(tmp_path, num_examples=40), "36 training images", told)
    with caplog.at_level(logging.WARNING, "core"):
        assert len(load_dataset(folder_config(tmp_path, num_examples=36)).train.labels) == 36
    assert told in caplog.text
    for path in folder.glob("*.png"):
        path.rename(path.with_suffix(".npy"))
    refuses(folder_config(tmp_path), folder, "holds no image", "(in it: 20 files of suffix .avif")


def test_what_lies_beside_the_splits_is_counted(tmp_path):
    for name in ("train", "test", "val", "unlabeled"):
        write_folder(tmp_path / name)
    picture(tmp_path / "lost.png", np.zeros((6, 6)))
    (tmp_path / "README.md").touch()
    told = "40 training images (1 file of suffix .png and 2 folders left out)"
    refuses(folder_config(tmp_path, num_examples=60), told)


@pytest.mark.parametrize("kind", ["GIF", "PPM", "JPEG", "BMP", "WEBP", "TIFF"])
def test_all_usual_suffixes_are_read(tmp_path, kind):
    suffixes = {"GIF": ".gif", "PPM": ".PGM", "JPEG": ".jfif", "TIFF": ".TIF"}
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "test")
    (tmp_path / "train" / "class0" / "003.png").unlink()
    path = tmp_path / "train" / "class0" / f"003{suffixes.get(kind, '.' + kind)}"
    picture(path, np.full((6, 6), 3), format=kind)
    if kind == "WEBP":  # Which has colours alone.
        refuses(folder_config(tmp_path, num_examples=40), path, "in colour")
    else:
        train = load_dataset(folder_config(tmp_path, num_examples=40)).train
        assert (train.images[3].float() - 3).abs().max() <= 1


def write_archive(folder: Path, count: int = 40) -> list[list[object]]:
    """As EDM and DPImageBench pack images: chunks of files, labels in `dataset.json`."""
    pairs: list[list[object]] = []
    for number in range(count):
        name = f"{number // 20:05d}/img{number:08d}.png"
        picture(folder / name, np.full((6, 6), 100 * (number % 2) + number // 2))
        pairs.append([name, number % 2])
    (folder / "dataset.json").write_text(json.dumps({"labels": pairs}))
    return pairs


@pytest.mark.parametrize("split", [False, True])
def test_labels_of_an_archive_stand_in_its_index(tmp_path, split):
    for name in ("train_32", "test_32") if split else (".",):
        write_archive(tmp_path / name)
    count = 40 if split else sum(not in_test(str(pair[0])) for pair in write_archive(tmp_path))
    dataset = load_dataset(folder_config(tmp_path, num_examples=count))
    for part in (dataset.train, dataset.test):
        assert ((part.images[:, 0, 0, 0] >= 100).long() == part.labels).all()
    assert dataset.class_names == ("0", "1")


def test_labels_of_an_archive_may_count_from_1(tmp_path):
    for name in ("train", "test"):
        pairs = [[pair[0], 1 + int(str(pair[1]))] for pair in write_archive(tmp_path / name)]
        (tmp_path / name / "dataset.json").write_text(json.dumps({"labels": pairs}))
    dataset = load_dataset(folder_config(tmp_path, num_examples=40))
    assert dataset.train.labels.unique().tolist() == [0, 1]
    assert dataset.class_names == ("1", "2")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "holds no list `labels`"),
        ('{"labels": null}', "holds no list `labels`"),
        ('{"name": "x"}', "'labels', which is not there"),
        ("[1, 2]", "holds no list `labels`"),
        ('{"labels": [["00000/img00000000.png", 0.5]]}', "label 0.5"),
        ('{"labels": [["00000/img00000000.png", [0, 1]]]}', "label [0, 1]"),
        ('{"labels": [["../secret.png", 1]]}', "'../secret.png', which is not there"),
        ('{"labels": [["00000/img00000001.png", 1], ["00000/img00000001.png", 0]]}', "there twice"),
    ],
)
def test_a_damaged_index_is_named(tmp_path, content, told):
    write_archive(tmp_path / "data")
    picture(tmp_path / "secret.png", np.zeros((6, 6)))
    index = tmp_path / "data" / "dataset.json"
    index.write_text(content)
    refuses(folder_config(tmp_path / "data"), index, told, "repair it, or remove it")


def test_pictures_that_an_index_does_not_list_are_counted(tmp_path):
    for name in ("train", "test"):
        write_archive(tmp_path / name)
    picture(tmp_path / "train" / "00001" / "extra.png", np.zeros((6, 6)))
    refuses(folder_config(tmp_path, num_examples=41), "40", "(1 file of suffix .png left out)")


@pytest.mark.parametrize(
    "name", ["a b.png", "\U0001f600.png", "tab\tand\nline.png", "\udcff\udcfe.png"]
)
def test_odd_names_of_files_are_read_and_told_on_one_line(tmp_path, name):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "test")
    path = tmp_path / "train" / "class1" / name
    picture(path, np.full((6, 6), 250))
    for cache in (None, tmp_path / "cache"):
        settings = folder_config(tmp_path, num_examples=41)
        assert (load_dataset(settings, cache).train.images == 250).any()
    path.write_bytes(b"")
    refuses(folder_config(tmp_path, num_examples=41), "is no readable image")
    write_folder(tmp_path / "flat")
    picture(tmp_path / "flat" / "class1" / name, np.zeros((6, 6)))
    refuses(folder_config(tmp_path / "flat", num_examples=4), "num_examples=4")


@pytest.mark.parametrize("name", ["two\nlines", "\udcff"])
def test_class_names_are_printable(tmp_path, name):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "test")
    for split in ("train", "test"):
        (tmp_path / split / "class1").rename(tmp_path / split / name)
    refuses(folder_config(tmp_path, num_examples=40), "class name", "rename it")


@pytest.mark.parametrize("name", ["data.zip", "data.npz", "data.npy"])
def test_a_file_given_for_a_folder(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK")
    for reader in ("image_folder", "idx", "parquet", "eurosat", "celeba", "camelyon17", "cifar10"):
        refuses(
            folder_config(tmp_path / name, name=reader), tmp_path / name, "is a file: unpack it"
        )
    refuses(folder_config(tmp_path), "0 class folders", f"1 file of suffix {Path(name).suffix}")


def test_links_that_lead_nowhere_or_in_circles(tmp_path):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "test")
    (tmp_path / "train" / "class0" / "round").symlink_to(tmp_path / "train")
    refuses(folder_config(tmp_path, num_examples=4), "(1 folder left out)")
    (tmp_path / "train" / "class1" / "loop").symlink_to("loop")
    refuses(folder_config(tmp_path), tmp_path / "train" / "class1" / "loop", "cannot be read")
    (tmp_path / "train" / "class1" / "loop").unlink()
    (tmp_path / "train" / "class1" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    refuses(folder_config(tmp_path, num_examples=41), "gone.png", "is missing: fetch it")


def test_folders_that_may_not_be_read_are_named(tmp_path, monkeypatch):
    write_folder(tmp_path)

    def scandir(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", scandir)
    refuses(folder_config(tmp_path), tmp_path, "Permission denied", "correct its permissions")
