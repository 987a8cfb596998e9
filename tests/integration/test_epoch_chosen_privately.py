"""A classifier's epoch chosen on the private images, with noise: charged, drawn once, kept."""

import json
from pathlib import Path

import pytest
import torch
from two_ranks import tiny_run

from core.config import Config, load
from core.data import Dataset, Split
from core.errors import ConfigError
from core.evaluation import private_scores
from core.evaluation.metrics import downstream_classifier
from core.evaluation.networks import Classifier
from core.evaluation.private_scores import PrivateScores
from core.privacy.keys import KeyedStream
from core.privacy.ledger.ledger import Ledger
from core.privacy.plan.plan import make_plan

CHOSEN = {
    "evaluation.epoch_chosen_on": "dp",
    "evaluation.classifier_epochs": 3,
    "evaluation.num_repeats": 2,
    "privacy.dp_accuracy_stddev": 30.0,
}
TRAININGS = 2


def scores(folder: Path, config: Config) -> PrivateScores:
    train = Split(torch.zeros((40, 1, 8, 8), dtype=torch.uint8), torch.zeros(40, dtype=torch.int64))
    data, noise = Dataset(train, train, ""), KeyedStream(b"k" * 32)
    return PrivateScores(config, make_plan(config), data, noise, folder, "identity")


def test_every_epoch_is_charged(tmp_path):
    score = make_plan(load({}, CHOSEN)).score
    assert score is not None
    assert score.num_releases == 1 + TRAININGS * 3
    reports = tiny_run(tmp_path, **CHOSEN)
    (path,) = (tmp_path / "ledger").glob("*.jsonl")
    (entry,) = Ledger.at(path).summary()["entries"]
    counts = {event["kind"]: event["count"] for event in entry["events"]}
    assert counts["dp_accuracy"] == 1 + TRAININGS * 3
    kept = {path.stem for path in (tmp_path / "dp_scores").iterdir()}
    epochs = {f"cnn-{repeat}-epoch-{epoch}" for repeat in (0, 1) for epoch in (1, 2, 3)}
    assert kept == {"dp_accuracy", *epochs}
    stored = json.loads((tmp_path / "evaluation.json").read_text())
    assert "private training images" in stored["scored"]["epoch_chosen_on"]
    assert stored["dp_accuracy"] == reports[-1]["dp_accuracy"]


def test_no_two_scores_of_a_run_share_their_noise(tmp_path, monkeypatch):
    config, places = load({}, {**CHOSEN, "evaluation.classifiers": ["cnn", "mlp"]}), []
    monkeypatch.setattr(private_scores, "dp_accuracy", lambda *a: places.append(a[-1]) or 0.5)
    one, model = scores(tmp_path, config), Classifier(1, (8, 8), 10, torch.Generator())
    one.at_end(model)
    for network in ("cnn", "mlp"):
        for repeat in (0, 1):
            for epoch in (1, 2, 3):
                one.of_epoch(network, repeat, model, epoch)
    assert len(set(places)) == len(places) == one.plan.score.num_releases


def test_a_score_is_drawn_once_whatever_is_scored(tmp_path):
    one = scores(tmp_path, load({}, CHOSEN))
    first = Classifier(1, (8, 8), 10, torch.Generator().manual_seed(0))
    other = Classifier(1, (8, 8), 10, torch.Generator().manual_seed(1))
    kept = one.of_epoch("cnn", 0, first, 1)
    (tmp_path / "cnn-0-epoch-1.json").write_text(
        json.dumps({"identity": "identity", "dp_accuracy": kept + 0.25})
    )
    assert one.of_epoch("cnn", 0, other, 1) == kept + 0.25


def test_the_epoch_with_the_best_noisy_score_is_taken():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 1, 8, 8), generator=generator, dtype=torch.uint8)
    synthetic = Split(images, torch.arange(40) % 10)
    config = load({}, CHOSEN).evaluation
    after: list[torch.Tensor] = []

    def judge(model: torch.nn.Module, epoch: int) -> float:
        after.append(next(model.parameters()).detach().clone())
        return [0.1, 0.7, 0.3][epoch - 1]

    model = downstream_classifier(synthetic, config, 10, "cpu", judge=judge)
    assert len(after) == 3
    assert torch.equal(next(model.parameters()), after[1])
    assert not torch.equal(after[1], after[2])


def test_without_noise_there_is_no_such_choice():
    with pytest.raises(ConfigError, match=r"evaluation.epoch_chosen_on='dp' needs its noise"):
        make_plan(load({}, {"evaluation.epoch_chosen_on": "dp"}))
