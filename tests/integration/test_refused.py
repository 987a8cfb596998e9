"""What was refused before anything was charged claims nothing: other settings may follow."""

from contextlib import suppress
from pathlib import Path

import pytest
from idx_files import write_idx
from picture_files import write_folder
from two_ranks import TINY, StopRunError

from core.config import load
from core.errors import ConfigError, DataError
from core.io.files import write_json
from core.pipeline.run import run
from core.privacy.keys import MasterSecret
from core.record.folder import RunFolder
from sweep.config.sweep import SweepConfig, load_sweep
from sweep.results.claim import claim


def start(folder: Path, **facts: object) -> list[dict]:
    """Runs until the first step is trained; returns what was told."""
    told: list[dict] = []

    def report(metrics: dict) -> None:
        told.append(metrics)
        if "loss" in metrics:
            raise StopRunError

    facts = {f"dataset.{key}": value for key, value in facts.items()}
    places = {"runtime.ledger": str(folder / "ledger"), "runtime.cache": str(folder / "cache")}
    small = {"private_training.expected_batch_size": 8, "central_images.expected_batch_size": 8}
    small |= {"central_images.image_size": 4}
    config = load({}, TINY | small | places | facts)
    with suppress(StopRunError):
        run(config, folder / "run", master=MasterSecret(b"s" * 32), name="run", report=report)
    return told


def test_a_run_with_a_wrong_n_is_refused_by_labels_alone_and_leaves_its_name_free(tmp_path):
    write_folder(tmp_path / "photos")
    for path in (tmp_path / "photos").rglob("*.png"):
        path.write_bytes(b"no image")  # Whatever opened one would name it.
    facts = {"name": "image_folder", "path": str(tmp_path / "photos"), "num_classes": 2}
    with pytest.raises(DataError, match="holds 35 training images, of which class0 18, class1 17:"):
        start(tmp_path, **facts, num_examples=40, image_size=4)
    write_idx(tmp_path / "idx")
    facts = {"name": "idx", "path": str(tmp_path / "idx"), "num_classes": 3, "image_size": 6}
    assert start(tmp_path, **facts, num_examples=30)
    assert RunFolder(tmp_path / "run").is_charged
    with pytest.raises(ConfigError, match="holds a run of another configuration"):
        start(tmp_path, **facts, num_examples=29)


def test_all_classes_without_an_image_are_named(tmp_path):
    write_idx(tmp_path / "idx")
    facts = {"name": "idx", "path": str(tmp_path / "idx"), "image_size": 6, "num_examples": 30}
    with pytest.raises(DataError, match=r"class 3, 4 of .* has no training image"):
        start(tmp_path, **facts, num_classes=5)


def test_a_run_tells_how_far_its_data_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("core.data.cache._INTERVAL", 0.0)
    write_idx(tmp_path / "idx")
    facts = {"name": "idx", "path": str(tmp_path / "idx"), "num_classes": 3, "image_size": 6}
    told = start(tmp_path, **facts, num_examples=30)
    for stage, total in (("hashing", 4), ("decoding", 42)):
        found = [(each["step"], each["total"]) for each in told if each["stage"] == stage]
        assert found == [(step, total) for step in range(total)]


def test_a_refused_sweep_leaves_its_name_free(tmp_path):
    def sweep_of(**changes: object) -> SweepConfig:
        keys = {"storage_path": str(tmp_path), **changes}
        return load_sweep("sweep/configs/quickstart.yaml", keys)

    assert not claim(sweep_of())
    refused = RunFolder(tmp_path / "quickstart" / "trials" / "a")
    refused.path.mkdir(parents=True)
    assert claim(sweep_of(seed=1))
    assert not refused.path.exists()
    assert not claim(sweep_of(seed=1))
    refused.path.mkdir(parents=True)
    write_json(refused.identity, {})
    with pytest.raises(ConfigError, match=r"holds another sweep .*base\.seed: 1 -> 2"):
        claim(sweep_of(seed=2))
    assert refused.path.exists()
