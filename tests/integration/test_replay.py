"""A run killed anywhere and resumed: the same numbers to the bit, and nothing charged twice."""

import os
import signal
from pathlib import Path

import pytest
import torch
from two_ranks import StopRunError, in_processes, stop_at, tiny_run

from core.errors import ConfigError
from core.pipeline import run as pipeline
from core.privacy.keys import MasterSecret
from core.privacy.ledger.ledger import Ledger

SETTINGS = {
    "training.num_steps": 16,
    "runtime.checkpoint_every": 3,
    "runtime.log_every": 1,
}
# Before the first checkpoint, between two of each stage, at the change, and while scoring.
KILLS = {"warm_up": (2, 5), "private_training": (9, 14), "evaluation": (16,)}


def run_and_die(folder: Path, stage: str, step: int) -> None:
    """Runs in a process of its own; dies as if the machine had."""

    def die(report: dict) -> None:
        if report["stage"] == stage and report["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    tiny_run(folder, die, **SETTINGS)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, tiny_run(folder, **SETTINGS)


def summary_of(folder: Path) -> dict:
    (path,) = (folder / "ledger").glob("*.jsonl")
    return Ledger.at(path).summary()


@pytest.mark.parametrize(
    ("stage", "step"), [(stage, step) for stage, steps in KILLS.items() for step in steps]
)
def test_killed_and_resumed_is_as_undisturbed(undisturbed, tmp_path, stage, step):
    whole, reports = undisturbed
    assert in_processes(run_and_die, (tmp_path, stage, step)) == [-signal.SIGKILL]
    assert not (tmp_path / "model.pt").exists()
    (entry,) = summary_of(tmp_path)["entries"]
    assert entry["state"] == ("committed" if stage == "evaluation" else "reserved")
    again = tiny_run(tmp_path, **SETTINGS)
    expected, found = torch.load(whole / "model.pt"), torch.load(tmp_path / "model.pt")
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    images = [(f / "central_images" / "grid.png").read_bytes() for f in (whole, tmp_path)]
    assert images[0] == images[1]
    for name in ("accuracy", "fid_cnn", "epsilon", "noise_multiplier"):
        assert again[-1][name] == reports[-1][name]
    once, twice = (summary_of(folder) for folder in (whole, tmp_path))
    assert len(once["entries"]) == len(twice["entries"]) == 1
    assert twice["epsilon_committed"] == once["epsilon_committed"]
    assert twice["epsilon_committed_and_reserved"] == once["epsilon_committed"]
    assert (tmp_path / "metrics.jsonl").read_text().count('"step": 12,') == 1


def test_a_lost_key_is_refused_before_it_is_charged(undisturbed, tmp_path, monkeypatch):
    with pytest.raises(StopRunError):
        tiny_run(tmp_path, stop_at(12), **SETTINGS)
    before = summary_of(tmp_path)
    monkeypatch.setattr("two_ranks.MasterSecret", lambda _: MasterSecret(b"x" * 32))
    with monkeypatch.context() as closed:
        closed.setattr(pipeline, "load_dataset", lambda _: pytest.fail("the data was opened"))
        with pytest.raises(ConfigError, match=r"another run \(master secret changed\): "):
            tiny_run(tmp_path, **SETTINGS)
    assert summary_of(tmp_path) == before
