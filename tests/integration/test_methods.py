"""What is compared: DP-SGD alone, a ceiling without privacy; and runs in short time slots."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from two_ranks import TINY, tiny_run

from core.__main__ import main
from core.commands import reproduce
from core.config import Config, load
from core.data import Split, to_float, to_model_range
from core.diffusion.denoiser import build_denoiser
from core.diffusion.loss import draw, edm_loss
from core.errors import ConfigError, StoppedError
from core.privacy.keys import KeyedStream
from core.privacy.ledger.ledger import Ledger
from core.privacy.plan.plan import PrivacyPlan, composed_epsilon, make_plan
from core.training.stages import non_private_stage
from sweep.config.sweep import load_sweep

SMALL = {
    "central_images__expected_batch_size": 30,
    "private_training__noise_multiplicity": 4,
    "runtime__device": "cpu",
}
QUICKSTART = "tests/data/sweep.yaml"


def config(**changes: object) -> Config:
    return load({}, TINY | {key.replace("__", "."): value for key, value in changes.items()})


def test_dpdm_is_dp_sgd_alone_whatever_the_split():
    alone, without = config(method="dpdm", stage_split=0.5), config(stage_split=0.0)
    assert (alone.warm_up_steps, alone.private_steps) == (0, 6)
    ours, theirs = make_plan(alone), make_plan(without)
    assert ours == theirs
    assert ours.central is None


@pytest.fixture(scope="module")
def ceiling(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ceiling")
    return folder, tiny_run(folder / "run", method="non_private")[-1]


def test_a_ceiling_says_that_it_is_not_private_and_enters_no_ledger(ceiling, capsys):
    folder, result = ceiling
    assert result["epsilon"] == math.inf
    assert result["noise_multiplier"] == 0
    plan = json.loads((folder / "run" / "privacy.json").read_text())
    assert plan["epsilon"] == plan["dp_sgd"]["max_grad_norm"] == "Infinity"  # Strict JSON.
    assert PrivacyPlan.restored(plan) == make_plan(load(folder / "run" / "config.yaml"))
    assert "NOT private" in plan["statement"]
    stored = json.loads((folder / "run" / "evaluation.json").read_text())
    assert set(stored["tags"].values()) == {"non-private"}
    assert stored["epsilon"] == "Infinity"
    assert tiny_run(folder / "run", method="non_private") == [result]  # As it was when it ended.
    assert not list(folder.rglob("*.jsonl.head")) + list(
        (folder / "run" / "ledger").glob("*.jsonl")
    )
    release = ["release", "--run-dir", str(folder / "run"), "--out", str(folder / "bundle")]
    assert main(release) == 2
    assert "method=non_private, whose epsilon is infinite" in capsys.readouterr().err
    assert not (folder / "bundle").exists()
    assert main(["account", "--config", "core/configs/digits.yaml", "method=non_private"]) == 0
    assert "NOT private" in capsys.readouterr().out


def test_a_private_trial_beside_a_ceiling_is_not_private_either():
    plans = [make_plan(config()), make_plan(config(method="non_private"))]
    assert composed_epsilon(plans) == math.inf


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"privacy__scope": "sweep"}, "privacy.scope='sweep' excludes: set that to trial"),
        ({"privacy__dp_accuracy_stddev": 50}, "dp_accuracy_stddev=50.0 excludes: set that to null"),
        ({"privacy__data_set_budget": 20}, "privacy.data_set_budget=20.0 excludes"),
    ],
)
def test_a_ceiling_cannot_stand_under_a_promise(changes, text):
    with pytest.raises(ConfigError, match=re.escape(text)):
        config(method="non_private", **changes)


def test_a_sweep_searches_over_private_methods_alone():
    sweep = load_sweep(QUICKSTART, {"search_space.method.choices": ["dp_feta", "dpdm"]})
    assert sweep.trial_config({"method": "dpdm", "stage_split": 0.5}).warm_up_steps == 0
    assert sweep.trial_config({"method": "dp_feta", "stage_split": 0.5}).warm_up_steps > 0
    for overrides in (
        {"search_space.method.choices": ["dp_feta", "non_private"]},
        {"method": "non_private"},
    ):
        with pytest.raises(ConfigError, match="no epsilon that a sweep could state"):
            load_sweep(QUICKSTART, overrides)


def test_a_step_of_the_ceiling_is_that_of_plain_autograd(monkeypatch):
    monkeypatch.setattr(torch.optim, "Adam", lambda params, lr: torch.optim.SGD(params, lr=1.0))
    settings = config(method="non_private", dataset__num_examples=60, **SMALL)
    pixels = torch.randint(0, 256, (60, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    split = Split(pixels.byte(), torch.arange(60) % 10)
    denoiser, twin = build_denoiser(settings), build_denoiser(settings)
    for network in (denoiser, twin):  # Zero-initialised layers would hide those below.
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    plan = make_plan(settings).dp_sgd
    masks = KeyedStream(b"m" * 32)
    non_private_stage(settings, denoiser, split, plan, masks).step(0)
    from core.privacy.mechanisms.sampling import PoissonSampler

    ids = PoissonSampler(masks, 60, plan.sample_rate).indices(0)
    assert len(ids) > settings.private_training.max_physical_batch_size  # Several parts.
    draws = draw(f"{settings.seed}/non_private_training", 0, ids, 4, (1, 8, 8), "cpu")
    clean = to_model_range(to_float(split.images[ids]))
    loss = edm_loss(twin, clean, split.labels[ids], draws, settings.diffusion, 0.1, 10).mean()
    loss.backward()
    for ours, theirs in zip(denoiser.parameters(), twin.parameters(), strict=True):
        assert theirs.grad is not None
        assert torch.allclose(ours, theirs - theirs.grad, atol=1e-5)


def test_a_run_in_shortest_slots_is_that_in_one_and_charged_once(tmp_path):
    whole = tiny_run(tmp_path / "whole")[-1]
    stops: list[str] = []
    again: list[dict] = []
    for _ in range(20):
        try:
            again = tiny_run(tmp_path / "slots", **{"runtime.max_seconds": 1e-6})
            break
        except StoppedError as stop:
            stops.append(str(stop))
    assert again[-1]["stage"] == "done"
    assert any("in warm_up at step 2 of 3" in stop for stop in stops)
    assert any("in private_training at step 1 of 3" in stop for stop in stops)
    assert any(re.search(r"at image 16 of 40: the same command goes on", stop) for stop in stops)
    for name in ("accuracy", "fid_cnn", "epsilon", "noise_multiplier"):
        assert again[-1][name] == whole[name]
    first, second = (torch.load(tmp_path / name / "model.pt") for name in ("whole", "slots"))
    for name, value in first.items():
        assert torch.equal(second[name], value)
    (path,) = (tmp_path / "slots" / "ledger").glob("*.jsonl")
    summary = Ledger.at(path).summary()
    assert len(summary["entries"]) == 1
    assert summary["epsilon_committed_and_reserved"] == pytest.approx(whole["epsilon"], rel=1e-3)
    assert not list((tmp_path / "slots" / "synthetic").glob("parts*"))


@pytest.mark.parametrize(
    ("text", "seconds"), [("600", 600), ("90s", 90), ("1.5m", 90), ("2h", 7200)]
)
def test_a_budget_is_a_time(text, seconds):
    assert reproduce.seconds_of(text) == seconds
    for wrong in ("", "0", "-3", "2d", "h"):
        with pytest.raises(ConfigError, match="is no time: give seconds"):
            reproduce.seconds_of(wrong)


def test_reproduce_goes_on_in_slots_and_adds_one_row(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "PRESETS", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "toy.yaml").write_text("seed: 1\n")
    (tmp_path / "toy_small.yaml").write_text("inherits: toy.yaml\n")
    tiny = TINY | {"training.num_steps": 3, "evaluation.batch_size": 40}
    pairs = [f"{key}={value}" for key, value in tiny.items()]
    command = ["reproduce", "--dataset", "toy", "--epsilon", "1", "--budget", "0.000001", *pairs]
    codes = []
    while len(codes) < 20 and 0 not in codes:
        codes.append(main(command))
    assert set(codes[:-1]) == {3}
    assert codes[-1] == 0
    assert "no GPU here: toy_small.yaml in place of toy.yaml" in capsys.readouterr().err
    text = Path("RESULTS.md").read_text()
    (row,) = (line for line in text.splitlines() if line.startswith("| toy"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:2] == ["toy_small", "dp_feta"]
    assert 0.99 < float(cells[2]) <= 1
    assert cells[5].startswith("fid_cnn ")
    assert "CPU" in cells[7]
    assert "make reproduce DATASET=toy EPSILON=1 BUDGET=0.000001" in cells[9]
    assert main(command) == 0
    assert Path("RESULTS.md").read_text() == text
    assert main(["reproduce", "--dataset", "nothing"]) == 2
    assert "no preset 'nothing': choose of toy, toy_small" in capsys.readouterr().err
