"""What the trials of one sweep may spend together, and the private score, through whole runs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from checks import is_normal
from two_ranks import TINY, StopRunError, stop_at, tiny_run

from core.config import EvaluationConfig, load
from core.data import Dataset, Split
from core.errors import LedgerError
from core.evaluation import metrics, private_scores
from core.evaluation.classifiers import count_correct
from core.evaluation.networks import Classifier
from core.pipeline import run as pipeline
from core.privacy.keys import KeyedStream
from core.privacy.ledger.admission import BudgetExceededError
from core.privacy.ledger.ledger import Ledger
from core.privacy.ledger.terms import Event, Key
from core.privacy.plan.budget import run_budget
from core.privacy.plan.plan import ScorePlan, sweep_reference


def ledger_of(folder: Path) -> Ledger:
    (path,) = (folder / "ledger").glob("*.jsonl")
    return Ledger.at(path)


def settings(folder: Path, **privacy: object) -> dict[str, object]:
    shared = {f"privacy.{key}": value for key, value in privacy.items()}
    return {"runtime.ledger": str(folder / "ledger"), **shared}


@pytest.fixture
def unopened(monkeypatch):
    def stop_opening() -> None:
        def refuse(*_: object) -> None:
            raise AssertionError("the data was opened")

        monkeypatch.setattr(pipeline, "load_dataset", refuse)

    return stop_opening


@pytest.mark.parametrize("adaptive", [True, False])
def test_a_sweep_cannot_spend_more_than_its_shares(tmp_path, unopened, adaptive):
    shared = settings(tmp_path, scope="sweep", num_shares=2, adaptive=adaptive)
    for i in range(2):
        epsilon = tiny_run(tmp_path / str(i), seed=i, **shared)[-1]["epsilon"]
        assert epsilon < 0.9
    total = ledger_of(tmp_path).epsilon_of_run("tiny")
    assert 0.99 < total <= 1.0 + 1e-6
    before = ledger_of(tmp_path).path.read_bytes()
    unopened()
    with pytest.raises(BudgetExceededError, match=r"run tiny to epsilon 1\.\d+ of its budget 1,"):
        tiny_run(tmp_path / "2", seed=2, **shared)
    other = settings(tmp_path, scope="sweep", num_shares=9, adaptive=adaptive, target_epsilon=4.0)
    with pytest.raises(LedgerError, match=r"run tiny was begun within RunBudget\(epsilon=1\.0"):
        tiny_run(tmp_path / "3", seed=3, **other)
    assert ledger_of(tmp_path).path.read_bytes() == before


def test_a_sweep_below_references_is_charged_as_a_whole_and_has_no_trial_more(tmp_path, unopened):
    shared = settings(tmp_path, scope="sweep", num_shares=2)
    config = load({}, TINY | shared)
    shared |= sweep_reference(config, [])
    for i, split in enumerate((0.5, 0.25)):
        trial = shared | {"stage_split": split}
        epsilon = tiny_run(tmp_path / str(i), seed=i, **trial)[-1]["epsilon"]
        assert epsilon < 0.9
        assert ledger_of(tmp_path).epsilon_of_run("tiny") == 1.0
    unopened()
    with pytest.raises(BudgetExceededError, match=r"number 3 of stage 'all' .* pays for 2 trials"):
        tiny_run(tmp_path / "2", seed=2, **shared)


@pytest.mark.parametrize(("adaptive", "goes_on"), [(True, True), (False, False)])
def test_a_stopped_trial_leaves_room_where_the_filter_allows_it(tmp_path, adaptive, goes_on):
    shared = settings(tmp_path, scope="sweep", num_shares=2, adaptive=adaptive)
    shared |= {"training.num_steps": 60, "stage_split": 0.05, "runtime.checkpoint_every": 1}
    shared |= {"central_images.per_class": 1, "runtime.log_every": 1}

    for i in range(2):
        with pytest.raises(StopRunError):
            tiny_run(tmp_path / str(i), stop_at(6), seed=i, **shared)
    shared |= {"runtime.checkpoint_every": 60, "runtime.log_every": 60}
    if goes_on:
        assert tiny_run(tmp_path / "2", seed=2, **shared)[-1]["stage"] == "done"
        assert ledger_of(tmp_path).epsilon_of_run("tiny") <= 1.0
    else:
        with pytest.raises(BudgetExceededError):
            tiny_run(tmp_path / "2", seed=2, **shared)


def test_a_sweep_does_not_begin_its_budget_anew(tmp_path):
    shared = settings(tmp_path, scope="sweep", num_shares=1)
    tiny_run(tmp_path / "0", **shared)
    kept = tmp_path / "kept"
    (tmp_path / "ledger").rename(kept)
    with pytest.raises(LedgerError, match="no ledger at"):
        tiny_run(tmp_path / "1", seed=1, **shared)
    (tmp_path / "ledger").mkdir()
    elsewhere = shared | {"runtime.ledger": str(tmp_path / "elsewhere")}
    with pytest.raises(LedgerError, match="no ledger at"):
        tiny_run(tmp_path / "2", seed=2, **elsewhere)
    assert not (tmp_path / "1" / "model.pt").exists()


def test_public_data_has_a_budget_too_where_the_card_claims_one(tmp_path):
    shared = settings(tmp_path, scope="sweep", num_shares=1) | {"dataset.public": True}
    tiny_run(tmp_path / "0", **shared)
    with pytest.raises(BudgetExceededError, match="run tiny to epsilon"):
        tiny_run(tmp_path / "1", seed=1, **shared)


def test_the_only_run_is_the_only_one_whatever_its_name(tmp_path):
    tiny_run(tmp_path / "0", **settings(tmp_path))
    (ledger,) = (tmp_path / "ledger").glob("*.jsonl")
    budget = run_budget(load({}, {"privacy.scope": "public"}))
    with pytest.raises(BudgetExceededError, match="used by 1 other runs, such as tiny"):
        Ledger.at(ledger).reserve(
            Key("another", "t", "all", 0, 1), [Event("dp_sgd", 0.1, 9.0, 1)], within=budget
        )


def test_public_scope_allows_one_run_on_the_data(tmp_path, unopened):
    shared = settings(tmp_path, scope="public")
    assert tiny_run(tmp_path / "0", **shared)[-1]["epsilon"] > 0.99
    unopened()
    with pytest.raises(BudgetExceededError, match="scope public: for one"):
        tiny_run(tmp_path / "1", seed=1, **shared)


def test_a_private_score_is_charged_drawn_once_and_kept(tmp_path, monkeypatch):
    shared = settings(tmp_path, dp_accuracy_stddev=20.0)
    first = tiny_run(tmp_path / "run", **shared)[-1]
    assert 0 <= first["dp_accuracy"] <= 1
    (entry,) = ledger_of(tmp_path).summary()["entries"]
    assert entry["events"][-1] == {
        "kind": "dp_accuracy", "sample_rate": 1.0, "noise_multiplier": 20.0, "count": 1,
        "release": "",
    }  # fmt: skip
    assert entry["epsilon"] == pytest.approx(first["epsilon"], rel=4e-6)
    stored = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert stored["tags"]["accuracy"] == "non-private"
    assert stored["tags"]["dp_accuracy"].startswith("dp(epsilon +")
    (tmp_path / "run" / "evaluation.json").unlink()

    def refuse(*_: object) -> float:
        raise AssertionError("drawn a second time")

    monkeypatch.setattr(private_scores, "dp_accuracy", refuse)
    assert tiny_run(tmp_path / "run", **shared)[-1]["dp_accuracy"] == first["dp_accuracy"]


def test_another_way_to_score_is_another_release(tmp_path):
    """Its noise must be new: the same on another number would give both away."""
    identities = set()
    for i, epochs in enumerate((1, 2)):
        changes = settings(tmp_path, dp_accuracy_stddev=20.0)
        tiny_run(tmp_path / str(i), **changes | {"evaluation.classifier_epochs": epochs})
        stored = json.loads((tmp_path / str(i) / "evaluation.json").read_text())
        identities.add(stored["identity"])
    assert len(identities) == len(ledger_of(tmp_path).summary()["entries"]) == 2


def test_noise_of_the_private_accuracy_has_the_scale_of_the_plan(monkeypatch):
    count, number, stddev = 20_000, 10_000, 50.0
    monkeypatch.setattr(metrics, "count_correct", lambda *_: number // 2)
    labels = torch.zeros(number, dtype=torch.int64)
    dataset = Dataset(Split(labels, labels), Split(labels, labels), "")
    model = Classifier(1, (8, 8), 2, torch.Generator())
    values = [
        metrics.dp_accuracy(
            model,
            dataset,
            EvaluationConfig(),
            ScorePlan(stddev),
            KeyedStream(i.to_bytes(32, "big")),
        )
        for i in range(count)
    ]
    noise = np.array(values) * number - number // 2
    # The digits must not tell 5,000 from 5,001 hits: only whole numbers are released.
    assert np.abs(noise - noise.round()).max() < 1e-6
    assert is_normal(noise, stddev)
    assert not is_normal(noise, stddev * 1.06)
    assert not is_normal(noise, stddev / 1.06)


def test_one_record_moves_the_number_by_at_most_one():
    generator = torch.Generator().manual_seed(0)
    model = Classifier(1, (8, 8), 10, generator)
    images = torch.randint(0, 256, (50, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (50,), generator=generator)
    whole = count_correct(model, Split(images, labels), 7)
    for i in range(50):
        keep = torch.arange(50) != i
        assert 0 <= whole - count_correct(model, Split(images[keep], labels[keep]), 7) <= 1
    assert whole > 0
