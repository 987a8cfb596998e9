"""What the labels mean goes with the run, the report, the bundle and the generator."""

import csv
import hashlib
import importlib
import json
import subprocess
import sys

import numpy as np
import pytest
import yaml
from idx_files import write_idx
from picture_files import config, picture
from published_files import published, write_cifar, write_eurosat
from pyarrow import parquet

from core.__main__ import main
from core.config import DatasetConfig
from core.data import load_dataset
from core.generation.generator import GENERATOR
from core.publish.dataset_card import dataset_card
from core.record.folder import CLASSES, class_names, write_class_names

NAMES = ["1", "2", "10", 'a "zebra": |x|\\']
CARD = {
    **{"statement": "x", "delta": 1e-5, "unit": "x", "neighboring_relation_in_words": "x"},
    **{"epsilon_trial": 1.0, "epsilon_computed": 1.0, "epsilon_released_with_selection": 1.0},
    **{"delta_released_with_selection": 1e-5, "delta_all_on_this_data_set": 1e-5},
    "attack": {"epsilon_released_with_selection": "x"},
    "audit": "not audited",
}


def test_names_that_are_known(tmp_path, monkeypatch):
    assert load_dataset(DatasetConfig()).class_names == tuple("0123456789")
    write_idx(tmp_path / "idx")
    assert load_dataset(config(tmp_path / "idx")).class_names == ("0", "1", "2")
    write_eurosat(tmp_path)
    eurosat = load_dataset(published("eurosat", tmp_path, num_examples=46))
    assert eurosat.class_names == ("AnnualCrop", "Forest")
    write_cifar(tmp_path, "cifar10", monkeypatch)
    settings = published("cifar10", tmp_path, num_examples=50, num_classes=3)
    assert load_dataset(settings).class_names == ("a", "b", "c")


def test_fashion_mnist_is_known_by_its_labels(tmp_path, monkeypatch):
    labels = np.arange(30) % 10
    write_idx(tmp_path, train_labels=labels)
    reader = importlib.import_module("core.data.idx")
    digest = hashlib.sha256(labels.astype(np.uint8).tobytes()).hexdigest()
    monkeypatch.setattr(reader, "_FASHION_MNIST", digest)
    names = load_dataset(config(tmp_path, num_classes=10)).class_names
    assert (names[0], names[9]) == ("T-shirt/top", "Ankle boot")
    write_idx(tmp_path, train_labels=labels[::-1])
    assert load_dataset(config(tmp_path, num_classes=10)).class_names == tuple("0123456789")


def test_a_run_of_before_has_numbers(tmp_path):
    assert class_names(tmp_path, 3) == ["0", "1", "2"]
    write_class_names(tmp_path / "run", ["a", "b"])
    assert class_names(tmp_path / "run", 2) == ["a", "b"]


@pytest.mark.parametrize("name", ["yes", "null", "1", "", " a ", "'", '"', "\\", "# x", "é: ü 😀"])
def test_any_name_stands_in_the_front_matter_as_it_is(name):
    text = dataset_card(CARD, 10, [name, "other"], ["parquet"], "unknown")
    _, label = yaml.safe_load(text.split("---\n")[1])["dataset_info"]["features"]
    assert label["dtype"]["class_label"]["names"] == {"0": name, "1": "other"}


def test_names_go_from_the_folders_to_all_that_is_released(tmp_path):
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in NAMES:
            for number in range(10):
                pixels = random.integers(0, 256, (8, 8))
                picture(tmp_path / "data" / split / name / f"{number}.png", pixels)
    run = tmp_path / "run"
    settings = {
        **{"dataset.name": "image_folder", "dataset.path": tmp_path / "data"},
        **{"dataset.num_classes": 4, "dataset.num_examples": 40, "training.num_steps": 4},
        **{"private_training.expected_batch_size": 10, "central_images.per_class": 1},
        **{"central_images.expected_batch_size": 10, "model.base_channels": 8},
        **{"sampler.num_steps": 2, "evaluation.num_images": 16, "privacy.target_epsilon": 1},
        **{"evaluation.classifier_epochs": 1, "evaluation.extractor_epochs": 1},
        **{"runtime.cache": tmp_path / "cache", "runtime.ledger": tmp_path / "ledger"},
    }
    command = ["run", "--config", "core/configs/digits.yaml", "-q", "--run-dir", str(run)]
    command += [f"{key}={value}" for key, value in settings.items()]
    subprocess.run([sys.executable, "-m", "core", *command], check=True, capture_output=True)
    assert json.loads((run / CLASSES).read_text()) == {"class_names": NAMES}
    bundle = tmp_path / "bundle"
    assert main(["release", "--run-dir", str(run), "--out", str(bundle)]) == 0
    assert class_names(bundle / GENERATOR, 4) == NAMES
    readme = (bundle / "README.md").read_text()
    assert all(f"- {label}: {name}" in readme for label, name in enumerate(NAMES))
    with (bundle / "images" / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16
    assert all(row["class"] == NAMES[int(row["label"])] for row in rows)
    metadata = parquet.read_schema(next((bundle / "data").iterdir())).metadata
    stored = json.loads(metadata[b"huggingface"])["info"]["features"]["label"]
    assert stored["names"] == NAMES
    again = published("parquet", bundle, num_examples=16)  # The bundle is a data set itself.
    (bundle / "data" / "test.parquet").write_bytes(next((bundle / "data").iterdir()).read_bytes())
    again = again.model_copy(update={"num_classes": 4, "channels": 1})
    assert load_dataset(again).class_names == tuple(NAMES)
