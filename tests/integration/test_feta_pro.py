"""Method feta_pro end to end: one release, charged; exact replay over the change of lessons."""

import json
from pathlib import Path

import pytest
import torch
from two_ranks import StopRunError, start_ranks, stop_at, tiny_run

from core.config import load, nested
from core.data import Split
from core.pipeline import released
from core.privacy.accounting.mechanism import FINE
from core.privacy.accounting.solve import epsilon_of_mechanisms
from core.privacy.ledger.ledger import Ledger
from core.training.stages import WarmUpData, warm_up_stage
from sweep.config.sweep import load_sweep

PRO = {
    "method": "feta_pro",
    "privacy.target_epsilon": 3.0,
    "frequency.noise_multiplier": 2.0,
    "frequency.num_features": 50,
    "frequency.num_steps": 4,
    "frequency.batch_size": 20,
    "frequency.num_images": 40,
    "training.num_steps": 10,
    "runtime.checkpoint_every": 1,
    "runtime.log_every": 1,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, tiny_run(folder, **PRO)


def events(folder: Path) -> list[dict]:
    (path,) = (folder / "ledger").glob("*.jsonl")
    (entry,) = Ledger.at(path).summary()["entries"]
    return entry["events"]


def test_everything_that_is_released_is_charged_and_stated(whole):
    folder, reports = whole
    plan = json.loads((folder / "privacy.json").read_text())
    assert [event["kind"] for event in events(folder)] == ["central_images", "frequency", "dp_sgd"]
    mechanisms = [(e["sample_rate"], e["noise_multiplier"], e["count"]) for e in events(folder)]
    assert mechanisms[1] == (1.0, 2.0, 1)
    found = epsilon_of_mechanisms(tuple(mechanisms), plan["delta"], "zero_out", FINE)
    assert found == pytest.approx(reports[-1]["epsilon"], rel=1e-6)
    assert found <= 10
    assert reports[-1]["epsilon_frequency"] == plan["epsilon_frequency"] > 1
    assert (folder / "frequency" / "grid.png").exists()


@pytest.mark.parametrize("step", [2, 4, 7])
def test_interrupted_in_any_lesson_it_goes_on_bit_for_bit(whole, tmp_path, monkeypatch, step):
    with pytest.raises(StopRunError):
        tiny_run(tmp_path, stop_at(step), **PRO)
    monkeypatch.setattr(released, "release_features", lambda *_: pytest.fail("released again"))
    tiny_run(tmp_path, **PRO)
    for name, value in torch.load(whole[0] / "model.pt").items():
        assert torch.equal(torch.load(tmp_path / "model.pt")[name], value), name
    pictures = [(f / "frequency" / "grid.png").read_bytes() for f in (whole[0], tmp_path)]
    assert pictures[0] == pictures[1]
    assert events(tmp_path) == events(whole[0])


def test_interrupted_before_the_generator_the_release_stays(whole, tmp_path, monkeypatch):
    fitted = released.fitted_images

    def fail(*_: object) -> Split:
        raise RuntimeError("the machine is gone")

    monkeypatch.setattr(released, "fitted_images", fail)
    with pytest.raises(RuntimeError, match="gone"):
        tiny_run(tmp_path, **PRO)
    monkeypatch.setattr(released, "fitted_images", fitted)
    monkeypatch.setattr(released, "release_features", lambda *_: pytest.fail("released again"))
    tiny_run(tmp_path, **PRO)
    for name, value in torch.load(whole[0] / "model.pt").items():
        assert torch.equal(torch.load(tmp_path / "model.pt")[name], value), name


def test_two_ranks_give_the_model_of_one(whole, tmp_path):
    start_ranks(tmp_path, 2, **PRO)
    found = torch.load(tmp_path / "run" / "model.pt")
    for name, value in torch.load(whole[0] / "model.pt").items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)


def test_lessons_follow_each_other():
    """Each step sees the images of its own lesson alone: their first pixel tells which."""
    config = load({}, {"warm_up.augmentation": "none", "warm_up.batch_size": 4})

    class Seen(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.labels: list[set[int]] = []

        def forward(self, x: torch.Tensor, _: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            self.labels.append(set(labels.tolist()) - {10})
            return x * self.weight

    seen, images = Seen(), torch.zeros((3, 1, 8, 8))
    lessons = [WarmUpData(n, images, torch.full((3,), n)) for n in (2, 3)]
    stage = warm_up_stage(config, seen, lessons)
    assert stage.num_steps == 5
    for number in range(5):
        stage.step(number)
    assert [labels | {n} for labels, n in zip(seen.labels, (2, 2, 3, 3, 3), strict=True)] == [
        {2}, {2}, {3}, {3}, {3}
    ]  # fmt: skip


def test_trials_share_their_central_images_but_no_warm_up(tmp_path):
    for name, method in (("pro", "feta_pro"), ("plain", "dp_feta")):
        settings = PRO | {"runtime.ledger": str(tmp_path / "ledger"), "method": method}
        reports = tiny_run(tmp_path / name, shared=tmp_path / "shared", **settings)
        assert min(report["step"] for report in reports if report["stage"] == "warm_up") == 1
    grids = [(tmp_path / n / "central_images" / "grid.png").read_bytes() for n in ("pro", "plain")]
    assert grids[0] == grids[1]
    (path,) = (tmp_path / "ledger").glob("*.jsonl")
    kinds = [e for t in Ledger.at(path).summary()["entries"] for e in t["events"]]
    assert len({e["release"] for e in kinds if e["kind"] == "central_images"}) == 1
    assert [e["release"] for e in kinds if e["kind"] == "frequency"] == [""]


def test_a_sweep_searches_the_method():
    choices = ["dp_feta", "feta_pro", "dpdm"]
    space = {"search_space.method.choices": choices, "search_space.frequency.share.low": 0.2}
    space |= {"search_space.frequency.share.high": 0.8}
    sweep = load_sweep(Path("tests/data/sweep.yaml"), space)
    for method in choices:
        config = sweep.trial_config({"method": method, "frequency.share": 0.5})
        assert config.method == method
        assert (config.frequency_steps > 0) == (method == "feta_pro")
        assert load(nested(config), {}) == config
