"""Which keys a run draws masks and noise from: each use its own, and never one used before."""

import itertools

import numpy as np
import pytest
import torch
from idx_files import write_idx

from core.config import load
from core.pipeline import identity
from core.pipeline.run import run
from core.privacy.keys import KeyedStream, MasterSecret

SETTINGS = {
    "dataset.name": "idx",
    "dataset.num_examples": 30,
    "dataset.num_classes": 3,
    "central_images.per_class": 1,
    "central_images.expected_batch_size": 15,
    "training.num_steps": 2,
    "private_training.expected_batch_size": 3,
    "privacy.target_epsilon": 0.5,
    "model.base_channels": 4,
    "evaluation.fid_extractor": "cnn",
    "runtime.device": "cpu",
}
BASE = {
    "trial": "a",
    "secret": b"s",
    "pixel": 0,
    "seed": 0,
    "learning_rate": 1e-3,
    "physical_batch": 64,
    "classifier_epochs": 10,
    "torch": torch.__version__,
    "numpy": np.__version__,
    "code": "c",
    "opacus": "o",
    "machine": "m",
    "channels_last": False,
    "products": "highest",
}


class StopRunError(Exception):
    pass


@pytest.fixture
def streams_of(tmp_path, monkeypatch):
    """First numbers of every secret stream of a run, which is stopped at its first DP-SGD step."""
    begin, folders = KeyedStream.__init__, itertools.count()
    starts: list[bytes] = []

    def record(self: KeyedStream, key: bytes) -> None:
        begin(self, key)
        starts.append(self.bits(0, 4).tobytes())

    def report(metrics: dict) -> None:
        if metrics["stage"] == "private_training":
            raise StopRunError

    def start(**changes: object) -> list[bytes]:
        choice = BASE | changes
        folder = tmp_path / str(next(folders))
        images = np.random.default_rng(0).integers(0, 256, (30, 8, 8))
        images[0, 0, 0] = choice["pixel"]
        write_idx(folder, train_images=images, test_images=images[:12])
        chosen = {
            "dataset.path": str(folder),
            "runtime.ledger": str(folder / "ledger"),
            "seed": choice["seed"],
            "private_training.learning_rate": choice["learning_rate"],
            "private_training.max_physical_batch_size": choice["physical_batch"],
            "evaluation.classifier_epochs": choice["classifier_epochs"],
            "runtime.channels_last": choice["channels_last"],
        }
        monkeypatch.setattr(torch, "__version__", choice["torch"])
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: choice["products"])
        monkeypatch.setattr(np, "__version__", choice["numpy"])
        monkeypatch.setattr(identity, "code_digest", lambda: choice["code"])
        monkeypatch.setattr(identity, "_version", lambda _: choice["opacus"])
        monkeypatch.setattr(identity.platform, "machine", lambda: choice["machine"])
        (folder / "run").mkdir()
        if choice["trial"] is not None:
            (folder / "run" / "trial_id").write_text(choice["trial"])
        config, master = load({}, SETTINGS | chosen), MasterSecret(choice["secret"] * 32)
        starts.clear()
        with pytest.raises(StopRunError):
            run(config, folder / "run", master=master, name="run", report=report)
        return list(starts)

    monkeypatch.setattr(KeyedStream, "__init__", record)
    return start


def test_every_use_has_a_key_of_its_own_and_a_replay_has_the_same(streams_of):
    first = streams_of()
    assert len(first) == len(set(first)) == 4  # Masks and noise of either stage.
    assert streams_of() == first


@pytest.mark.parametrize(
    "change",
    [
        {"trial": "b"},
        {"trial": None},  # A new or emptied folder.
        {"secret": b"t"},
        {"pixel": 1},
        {"seed": 1},
        {"learning_rate": 2e-3},
        # These change the sums by their last digits, or what is scored.
        {"physical_batch": 7},
        {"classifier_epochs": 3},
        {"torch": "0.0"},
        {"numpy": "0.0"},
        {"opacus": "0.0"},
        {"machine": "another"},
        {"channels_last": True},
        {"products": "high"},
        # With one line of the loss changed, the difference of two sums is that of the gradients.
        {"code": "d"},
    ],
)
def test_another_run_shares_no_key(streams_of, change):
    """With shared noise, the difference of two models would hold no noise at all."""
    assert not set(streams_of()) & set(streams_of(**change))
