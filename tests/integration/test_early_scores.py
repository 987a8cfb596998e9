"""Scores during training: they change nothing of it, are paid for, and may end a run early."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from two_ranks import tiny_run

from core.config import load
from core.errors import ConfigError
from core.evaluation import metrics
from core.pipeline import early_scores, identity
from core.privacy.ledger.account import Spending
from core.privacy.ledger.ledger import Ledger
from core.privacy.plan.plan import make_plan

EARLY = {
    "early_scores.at": [0.25, 0.5, 0.75],
    "early_scores.num_images": 40,
    "training.num_steps": 16,
    "stage_split": 0.5,
    "runtime.checkpoint_every": 3,
    "runtime.log_every": 1,
}


class KillError(Exception):
    """Stands for a run that is interrupted."""


def entry_of(folder: Path) -> dict:
    (path,) = (folder / "ledger").glob("*.jsonl")
    (entry,) = Ledger.at(path).summary()["entries"]
    return entry


def early(reports: list[dict]) -> list[dict]:
    return [report for report in reports if report["stage"] == "early_score"]


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored")
    return folder, tiny_run(folder, **EARLY)


def test_scores_come_where_asked_and_are_tagged(scored):
    folder, reports = scored
    assert [(r["step"], r["progress"]) for r in early(reports)] == [(4, 0.25), (8, 0.5), (12, 0.75)]
    assert all(0 <= report["early_accuracy"] <= 1 for report in early(reports))
    tags = json.loads((folder / "evaluation.json").read_text())["tags"]
    assert tags["early_accuracy"] == "non-private"
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()]
    assert steps == sorted(steps)


def test_training_is_the_same_to_the_bit_with_and_without(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "_NOT_IDENTITY", (*identity._NOT_IDENTITY, "early_scores."))
    tiny_run(tmp_path / "with", **EARLY)
    tiny_run(tmp_path / "without", **EARLY | {"early_scores.at": []})
    models = [torch.load(tmp_path / name / "model.pt") for name in ("with", "without")]
    for name, value in models[0].items():
        assert torch.equal(value, models[1][name]), name


@pytest.mark.parametrize("step", [5, 8, 12])
def test_an_interrupted_run_tells_its_scores_again_unchanged(scored, tmp_path, step):
    """Among others killed right after a score was told, before it was decided upon."""
    whole, reports = scored

    def stop(report: dict) -> None:
        told = report["stage"] == "early_score" or report["step"] == 5
        if told and report["step"] == step:
            raise KillError

    with pytest.raises(KillError):
        tiny_run(tmp_path, stop, **EARLY)
    again = tiny_run(tmp_path, **EARLY)
    assert early(again) == early(reports)
    expected, found = torch.load(whole / "model.pt"), torch.load(tmp_path / "model.pt")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert (tmp_path / "metrics.jsonl").read_text().count('"early_accuracy"') == 3


@pytest.mark.parametrize(("share", "executed"), [(0.5, 0), (0.75, 4)])
def test_a_stopped_run_pays_for_the_steps_that_it_ran(tmp_path, share, executed):
    asked = []

    def should_continue(progress: float) -> bool:
        asked.append(progress)
        return progress < share

    reports = tiny_run(tmp_path, should_continue=should_continue, **EARLY)
    assert asked[-1] == share
    last = reports[-1]
    assert last["stage"] == "stopped"
    assert last["step"] == round(share * 16)
    assert not (tmp_path / "model.pt").exists()
    entry = entry_of(tmp_path)
    assert (entry["state"], entry["executed_steps"]) == ("committed", executed)
    assert entry["epsilon"] == pytest.approx(last["epsilon"], rel=1e-3)
    assert last["epsilon"] < 1.0
    stopped = json.loads((tmp_path / "stopped.json").read_text())
    assert stopped["tags"]["early_accuracy"] == "non-private"
    # It is over: a worker that is started again tells the same and computes nothing.
    assert tiny_run(tmp_path, should_continue=should_continue, **EARLY) == [last]
    assert entry_of(tmp_path) == entry


def test_the_score_of_the_step_where_it_stopped_counts(tmp_path, monkeypatch):
    """A run that is resumed from before a later score, and is stopped there this time."""
    drawn = iter([0.1, 0.2, 0.3])
    monkeypatch.setattr(early_scores, "downstream_accuracy", lambda *_: next(drawn))
    settings = EARLY | {"runtime.checkpoint_every": 500}  # So that the last is the warm-up's.

    def kill(report: dict) -> None:
        if report["stage"] == "early_score" and report["step"] == 12:
            raise KillError

    with pytest.raises(KillError):
        tiny_run(tmp_path, kill, **settings)
    last = tiny_run(tmp_path, should_continue=lambda share: share < 0.5, **settings)[-1]
    assert (last["stage"], last["step"], last["early_accuracy"]) == ("stopped", 8, 0.2)
    assert json.loads((tmp_path / "stopped.json").read_text())["early_accuracy"] == 0.2
    assert tiny_run(tmp_path, **settings) == [last]


def test_a_stopped_run_whose_count_was_lost_tells_what_the_ledger_counts(tmp_path, monkeypatch):
    def die(report: dict) -> None:
        if report["step"] == 13:
            raise KillError

    with monkeypatch.context() as killed:
        killed.setattr(Spending, "commit", lambda *_: 0)
        with pytest.raises(KillError):
            tiny_run(tmp_path, die, **EARLY)
    shutil.rmtree(tmp_path / "checkpoints")
    (counter,) = (tmp_path / "ledger").glob("*.begun")
    counter.unlink()
    last = tiny_run(tmp_path, should_continue=lambda _: False, **EARLY)[-1]
    assert (last["stage"], last["step"]) == ("stopped", 4)
    entry = entry_of(tmp_path)
    assert entry["executed_steps"] == entry["end_step"] == 8
    assert entry["epsilon"] == pytest.approx(last["epsilon"], rel=1e-3)
    assert last["epsilon"] > 0.99  # Of all steps, not of none.


def test_private_scores_are_paid_by_the_plan_and_drawn_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "count_correct", lambda *_: 700)  # So that they differ by noise.
    monkeypatch.setattr(metrics, "round", float, raising=False)  # Whole numbers may coincide.
    settings = EARLY | {"early_scores.metric": "dp_accuracy", "privacy.dp_accuracy_stddev": 100.0}
    reports = tiny_run(tmp_path, **settings)
    values = [report["early_dp_accuracy"] for report in early(reports)]
    assert len({*values, reports[-1]["dp_accuracy"]}) == 4
    events = {event["kind"]: event for event in entry_of(tmp_path)["events"]}
    assert (events["dp_accuracy"]["noise_multiplier"], events["dp_accuracy"]["count"]) == (100.0, 4)
    assert reports[-1]["epsilon"] <= 1.0
    tags = json.loads((tmp_path / "evaluation.json").read_text())["tags"]
    assert tags["early_dp_accuracy"].startswith("dp(epsilon +")
    kept = json.loads((tmp_path / "early_scores.json").read_text())["scores"]
    assert list(kept.values()) == values


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"early_scores.at": [0.5, 0.25]}, r"at=\[0\.5, 0\.25\] must ascend"),
        ({"early_scores.at": [0.5, 0.51]}, r"must ascend and name different steps .* are \[8\]"),
        ({"early_scores.at": [1.0]}, r"early_scores\.at"),
        ({"early_scores.num_images": 3}, r"early_scores\.num_images=3 must be at least 20"),
        ({"early_scores.metric": "dp_accuracy"}, r"set privacy\.dp_accuracy_stddev"),
    ],
)
def test_scores_that_cannot_be_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_run(tmp_path, **EARLY | changes)


def test_a_plan_without_early_scores_is_as_it_was(scored):
    folder, _ = scored
    config = load(folder / "config.yaml", {"early_scores.at": []})
    plan = make_plan(config)
    assert plan.early_metric == ""
    summary = plan.summary()
    del summary["early_metric"]  # As a file of an earlier version.
    assert type(plan).restored(summary) == plan
