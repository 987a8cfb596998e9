"""One process and several gloo ranks: the same model, the same noise, once."""

import json
from pathlib import Path

import pytest
import torch
from checks import is_normal
from two_ranks import start_ranks, tiny_run

from core.pipeline import identity

TWO_LEVELS = {"model.channel_multipliers": [1, 2]}
"""A network with all that networks here consist of, but for attention."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return folder, tiny_run(folder, **TWO_LEVELS)


def run_ranks(folder: Path, world_size: int) -> list[dict]:
    start_ranks(folder, world_size, **TWO_LEVELS)
    return [torch.load(folder / f"rank_{rank}.pt") for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_give_the_model_of_one_process(alone, tmp_path, world_size):
    ranks = run_ranks(tmp_path, world_size)
    single, reports = alone
    expected = torch.load(single / "model.pt")
    found = torch.load(tmp_path / "run" / "model.pt")
    assert found.keys() == expected.keys()
    moved = 0.0
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)
        moved += float(value.abs().sum())
    assert moved > 0
    for outcome in ranks:
        assert torch.equal(outcome["noise"], ranks[0]["noise"])
        assert outcome["reports"][-1] == ranks[0]["reports"][-1]
        assert outcome["reports"][-1]["epsilon"] == reports[-1]["epsilon"]
    noise = ranks[0]["noise"].numpy()
    assert is_normal(noise, 1.0)
    for wrong in (0.0001, world_size**-0.5, world_size**0.5, 1 / world_size, world_size):
        assert not is_normal(noise, wrong)


@pytest.mark.parametrize("step", [2, 5])
def test_one_process_goes_on_where_two_ranks_stopped(alone, tmp_path, step):
    single, reports = alone
    start_ranks(tmp_path, 2, step, **TWO_LEVELS)
    run = tmp_path / "run"
    assert torch.load(run / "checkpoints" / "last.pt")["step"] == (step - 1 if step <= 3 else 1)
    again = tiny_run(run, **TWO_LEVELS)
    for name, value in torch.load(single / "model.pt").items():
        torch.testing.assert_close(torch.load(run / "model.pt")[name], value, rtol=0, atol=1e-5)
    assert again[-1]["epsilon"] == reports[-1]["epsilon"]
    workers = [json.loads(line)["workers"] for line in (run / "metrics.jsonl").open()]
    assert (workers[0], workers[-1]) == (2, 1)


def test_physical_batch_size_does_not_change_the_model(tmp_path, monkeypatch):
    # Its own identity draws its own noise; here the same, to compare the sums.
    key = "private_training.max_physical_batch_size"
    monkeypatch.setattr(identity, "_NOT_IDENTITY", (*identity._NOT_IDENTITY, key))
    for size in (5, 16):
        tiny_run(tmp_path / str(size), **TWO_LEVELS | {key: size})
    expected = torch.load(tmp_path / "16" / "model.pt")
    for name, value in torch.load(tmp_path / "5" / "model.pt").items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5)


def test_interrupted_run_goes_on_bit_for_bit(alone, tmp_path):
    single, _ = alone

    class StopRunError(Exception):
        pass

    def tiny_interrupted(at: int) -> None:
        def report(metrics: dict) -> None:
            if metrics["step"] >= at and metrics["stage"] != "evaluation":
                raise StopRunError

        tiny_run(tmp_path, report, **TWO_LEVELS | {"runtime.checkpoint_every": 1})

    for at in (2, 4):
        with pytest.raises(StopRunError):
            tiny_interrupted(at)
    tiny_run(tmp_path, **TWO_LEVELS)
    for name, value in torch.load(single / "model.pt").items():
        assert torch.equal(torch.load(tmp_path / "model.pt")[name], value)
    again = tiny_run(tmp_path, **TWO_LEVELS)
    assert len(again) == 1
    assert again[0]["stage"] == "done"


def test_another_configuration_in_the_same_folder_is_refused(alone):
    from core.errors import ConfigError

    with pytest.raises(ConfigError, match=r"stage_split: 0\.5 -> 0\.25"):
        tiny_run(alone[0], stage_split=0.25, **TWO_LEVELS)
