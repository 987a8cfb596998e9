"""A trained generator leaves as a model that draws the run's own images, and holds no more."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import pyfunc
from mlflow.tracking import MlflowClient
from two_ranks import tiny_run

from core.config import load
from core.errors import ConfigError
from core.generation.generator import Generator, load_generator, write_generator
from core.record.folder import CLASSES, class_names
from sweep.tracking.client import Tracker, open_experiment


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generator") / "run"
    tiny_run(folder, **{"seed": 5, "runtime.num_pictures": 4})
    return folder


def written(run_dir: Path, folder: Path) -> Generator:
    config = load(run_dir / "config.yaml")
    write_generator(folder, run_dir / "model.pt", config, class_names(run_dir, 10))
    config, denoiser = load_generator(folder)
    return Generator(denoiser, config)


def test_it_draws_the_images_that_the_run_was_scored_with(finished, tmp_path):
    generator = written(finished, tmp_path / "generator")
    files = {p.name for p in (tmp_path / "generator").iterdir()}
    assert files == {"classes.json", "settings.json", "weights.safetensors"}
    text = (tmp_path / "generator" / "settings.json").read_text()
    for folder in (str(finished), os.environ["FETA_SWEEP_TEST_CACHE"]):
        assert folder not in text
    with np.load(finished / "synthetic" / "images.npz") as stored:
        drawn = generator.predict(stored["labels"])
        assert np.array_equal(drawn, stored["images"])
    other = generator.predict(np.arange(10), {"seed": 6})
    assert other.shape == (10, 1, 8, 8)
    assert not np.array_equal(other, drawn[:10])


def test_a_machine_without_gpu_hands_on_what_a_gpu_trained(finished, tmp_path):
    config = load(finished / "config.yaml", {"runtime.device": "cuda"})
    write_generator(tmp_path / "generator", finished / "model.pt", config, list("0123456789"))
    assert load_generator(tmp_path / "generator")[0].runtime.device == "auto"


@pytest.mark.parametrize("labels", [[], [10], [-1]])
def test_labels_out_of_range_are_refused(finished, tmp_path, labels):
    generator = written(finished, tmp_path / "generator")
    with pytest.raises(ConfigError, match=r"\[0, 9\]"):
        generator.predict(np.array(labels))
    with pytest.raises(ConfigError, match="seed=-1"):
        generator.predict(np.array([0]), {"seed": -1})


def test_the_registered_model_is_the_same_and_registered_once(finished, tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    experiment = open_experiment(uri, "e", tmp_path)
    parent = Tracker(uri, experiment, "s")
    trial = Tracker(uri, experiment, "s/t", parent.run_id)
    trial.finish("FINISHED")
    for _ in range(2):
        parent.register_generator("t", finished, "trial", "a statement")
    client = MlflowClient(tracking_uri=uri)
    (version,) = client.search_model_versions("name = 's'")
    assert version.description == "a statement"
    assert version.run_id == trial.run_id
    assert version.tags == {"trial": "t", "privacy.scope": "trial"}
    assert client.get_model_version_by_alias("s", "best").version == version.version
    run = client.get_run(trial.run_id)
    assert run.info.status == "FINISHED"
    assert [output.model_id in version.source for output in run.outputs.model_outputs] == [True]

    model = pyfunc.load_model(version.source)
    labels = np.arange(40) % 10
    with np.load(finished / "synthetic" / "images.npz") as stored:
        assert np.array_equal(model.predict(labels), stored["images"])
    names = json.loads((finished / CLASSES).read_text())
    assert model.metadata.metadata == names == {"class_names": list("0123456789")}
    signature = model.metadata.signature
    assert signature.outputs.inputs[0].shape == (-1, 1, 8, 8)
    assert signature.params.params[0].default == 5
    digest = next((finished / "ledger").glob("*.jsonl")).stem
    root = tmp_path / "mlartifacts"
    assert not [p for p in root.rglob("*") if p.is_file() and digest.encode() in p.read_bytes()]
    assert not [p for p in root.rglob("*") if p.suffix == ".pyc"]


def test_pictures_while_training_change_nothing(finished, tmp_path):
    tiny_run(tmp_path / "run", **{"seed": 5, "runtime.num_pictures": 0})
    assert not (tmp_path / "run" / "samples").exists()
    assert sorted(p.name for p in (finished / "samples").iterdir()) == [
        f"{step:08d}.png" for step in (1, 2, 4, 5)
    ]
    with_pictures, without = (torch.load(f / "model.pt") for f in (finished, tmp_path / "run"))
    for name, value in with_pictures.items():
        assert torch.equal(value, without[name]), name
