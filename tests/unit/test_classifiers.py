"""The classifier, its training, and the accuracy of those who learn from synthetic images."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import get_args

import pytest
import torch

from core.config import DatasetConfig, EvaluationConfig, load
from core.config.metrics import DIRECTIONS, HEADLINES
from core.data import Dataset, Split, load_dataset
from core.errors import ConfigError, DataError
from core.evaluation import classifiers, networks, residual
from core.evaluation.classifiers import (
    accuracy,
    learning_rate_factor,
    train_classifier,
)
from core.evaluation.metrics import downstream_accuracy, downstream_classifier, synthetic_split
from core.evaluation.networks import NETWORKS, Classifier
from core.evaluation.private_scores import PrivateScores
from core.evaluation.scoring import score
from core.privacy.keys import KeyedStream, MasterSecret
from core.privacy.plan.plan import make_plan
from sweep.config.sweep import Objective

MASTER = MasterSecret(b"s" * 32)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset(DatasetConfig())


def _shuffled(split: Split) -> Split:
    order = torch.randperm(len(split.labels), generator=torch.Generator().manual_seed(0))
    return Split(split.images, split.labels[order])


def _few(split: Split, count: int) -> Split:
    return Split(split.images[:count], split.labels[:count])


def _score(synthetic: Split, dataset: Dataset, epochs: int = 4) -> float:
    config = EvaluationConfig(classifier_epochs=epochs, classifier_batch_size=64)
    model = downstream_classifier(synthetic, config, 10, "cpu")
    return downstream_accuracy(model, synthetic, dataset, config)


def test_learns_digits(digits: Dataset) -> None:
    assert _score(digits.train, digits) > 0.9


def test_learns_nothing_from_shuffled_labels(digits: Dataset) -> None:
    assert _score(_shuffled(digits.train), digits) < 0.3


def test_downstream_accuracy_learns_from_synthetic_images_alone(digits: Dataset) -> None:
    """Real training images are not read, and wrong synthetic labels are believed."""
    wrong = Split(digits.train.images, (digits.train.labels + 1) % 10)
    nothing = Split(digits.train.images[:0], digits.train.labels[:0])
    assert _score(wrong, Dataset(nothing, digits.test, "")) < 0.1


def test_same_seed_same_weights_and_untouched_global_state(digits: Dataset) -> None:
    train, validation = _few(digits.train, 200), _few(digits.test, 50)

    def weights(seed: int) -> torch.Tensor:
        model = train_classifier(train, validation, 10, 2, 64, seed, "cpu")
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    with torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state()
        one = weights(0)
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(7)
        assert torch.equal(one, weights(0))
    assert not torch.allclose(one, weights(1))


@pytest.mark.parametrize(
    ("scores", "chosen"), [([0.1, 0.9, 0.2], 2), ([0.5, 0.4, 0.3], 1), ([0.7, 0.7, 0.1], 2)]
)
def test_returns_the_epoch_with_the_best_validation_accuracy(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch, scores: list[float], chosen: int
) -> None:
    train, validation = _few(digits.train, 100), _few(digits.test, 30)
    states: list[dict[str, torch.Tensor]] = []

    def scripted(model: Classifier, split: Split, batch_size: int) -> float:
        assert split is validation
        states.append({key: value.clone() for key, value in model.state_dict().items()})
        return scores[len(states) - 1]

    monkeypatch.setattr(classifiers, "accuracy", scripted)
    model = train_classifier(train, validation, 10, 3, 32, 0, "cpu")
    found = model.state_dict()
    same = [all(torch.equal(state[key], found[key]) for key in found) for state in states]
    assert same == [number == chosen for number in (1, 2, 3)]
    assert not model.training


def test_trains_inside_no_grad_and_on_a_last_batch_of_one(digits: Dataset) -> None:
    with torch.no_grad():
        model = train_classifier(_few(digits.train, 33), digits.test, 10, 1, 32, 0, "cpu")
    assert 0 <= accuracy(model, digits.test, 500) <= 1


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (33, 17), (64, 64)])
def test_accepts_grey_and_colour_of_any_size(size: tuple[int, int]) -> None:
    for channels in (1, 3):
        model = Classifier(channels, size, 4, torch.Generator().manual_seed(0)).eval()
        images = torch.rand(2, channels, *size)
        assert model(images).shape == (2, 4)
        assert model.penultimate(images).shape == (2, networks.FEATURES)


def test_number_of_parameters_at_28_pixels() -> None:
    model = Classifier(1, (28, 28), 10, torch.Generator())
    assert 100_000 < sum(p.numel() for p in model.parameters()) < 200_000


def test_impossible_arguments_are_refused(digits: Dataset) -> None:
    with pytest.raises(ValueError, match="at least 8x8"):
        Classifier(1, (8, 7), 10, torch.Generator())
    with pytest.raises(ValueError, match="epochs=0"):
        train_classifier(digits.train, digits.test, 10, 0, 32, 0, "cpu")
    with pytest.raises(ValueError, match="at least one image"):
        train_classifier(digits.train, _few(digits.test, 0), 10, 1, 32, 0, "cpu")
    with pytest.raises(ValueError, match="at least one image"):
        accuracy(torch.nn.Linear(1, 1), _few(digits.test, 0), 32)


def test_accuracy_counts_every_batch_and_keeps_the_mode() -> None:
    class BySum(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            bright = x.mean(dim=(1, 2, 3))
            return torch.stack((0.5 - bright, bright - 0.5), dim=1)

    images = torch.tensor([0, 255, 0, 255, 255], dtype=torch.uint8).view(5, 1, 1, 1)
    split = Split(images, torch.tensor([0, 1, 0, 1, 0]))
    for training in (True, False):
        model = BySum().train(training)
        assert accuracy(model, split, 2) == pytest.approx(0.8)
        assert model.training is training


@pytest.mark.parametrize("total", [1, 2, 3, 10, 1000])
def test_learning_rate_rises_and_falls(total: int) -> None:
    factors = [learning_rate_factor(step, total) for step in range(total)]
    assert all(0 < factor <= 1 for factor in factors)
    assert max(factors) == pytest.approx(1)
    peak = factors.index(max(factors))
    assert factors[:peak] == sorted(factors[:peak])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)


def test_split_is_stratified_complete_and_repeatable() -> None:
    labels = torch.cat((torch.zeros(120), torch.ones(24), torch.full((2,), 2), torch.tensor([3])))
    labels = labels.long()[torch.randperm(147, generator=torch.Generator().manual_seed(0))]
    images = torch.arange(147, dtype=torch.uint8).view(-1, 1, 1, 1)
    train, validation = synthetic_split(images, labels)
    assert validation.labels.bincount(minlength=4).tolist() == [10, 2, 1, 0]
    assert sorted((*train.images.flatten().tolist(), *validation.images.flatten().tolist())) == [
        *range(147)
    ]
    assert torch.equal(labels[validation.images.flatten().long()], validation.labels)
    assert torch.equal(labels[train.images.flatten().long()], train.labels)
    again = synthetic_split(images, labels)[1]
    assert torch.equal(again.images, validation.images)


def test_split_holds_out_a_twelfth() -> None:
    labels = torch.arange(10).repeat(120)
    train, validation = synthetic_split(torch.zeros(1200, 1, 1, 1, dtype=torch.uint8), labels)
    assert (len(train.labels), len(validation.labels)) == (1100, 100)


def test_split_needs_a_class_of_two() -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.num_images"):
        synthetic_split(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.arange(3))


def test_images_of_another_shape_are_refused(digits: Dataset) -> None:
    larger = Split(torch.zeros(4, 1, 16, 16, dtype=torch.uint8), torch.zeros(4).long())
    with pytest.raises(DataError, match=r"\[1, 16, 16\].*\[1, 8, 8\]"):
        _score(larger, digits)


def test_every_metric_has_a_direction() -> None:
    best_high = {"accuracy", "dp_accuracy", "precision", "recall"}
    assert {name.removesuffix("_cnn") for name in DIRECTIONS} == best_high | {"fid", "kid"}
    for name, direction in DIRECTIONS.items():
        high = name.removesuffix("_cnn") in best_high
        assert direction == ("maximize" if high else "minimize")
    assert set(HEADLINES) <= set(DIRECTIONS)
    assert set(get_args(Objective.model_fields["metric"].annotation)) == set(DIRECTIONS)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("resnet", 1.7), ("wrn", 36.5), ("resnext", 34.4)],  # As their papers say, 32x32 in colour.
)
def test_residual_networks_have_the_published_number_of_parameters(
    name: str, millions: float
) -> None:
    model = NETWORKS[name].build(3, (32, 32), 10, torch.Generator())
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("name", list(NETWORKS))
def test_networks_take_grey_and_colour_of_any_size_and_are_those_of_their_seed(name: str) -> None:
    def logits(seed: int, images: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        model = NETWORKS[name].build(images.shape[1], tuple(images.shape[2:]), 4, generator)
        return model.eval()(images)

    grey, colour = torch.rand(2, 1, 8, 8), torch.rand(2, 3, 28, 28)
    assert logits(0, colour).shape == (2, 4)
    assert torch.equal(logits(0, grey), logits(0, grey))
    assert not torch.allclose(logits(0, grey), logits(1, grey))


@pytest.mark.parametrize(("name", "epochs", "at_least"), [("logistic", 8, 0.85), ("mlp", 8, 0.88)])
def test_networks_without_convolution_learn_digits(
    digits: Dataset, name: str, epochs: int, at_least: float
) -> None:
    config = EvaluationConfig(classifier_epochs=epochs, classifier_batch_size=64)
    model = downstream_classifier(digits.train, config, 10, "cpu", name)
    assert downstream_accuracy(model, digits.train, digits, config) > at_least


def test_a_small_residual_network_of_each_kind_learns_digits(digits: Dataset) -> None:
    for block in (residual.BasicBlock, residual.PreActivationBlock, residual.GroupedBottleneck):
        build = partial(residual.ResidualNetwork, block, 1, (16, 32, 64))
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(NETWORKS, "resnet", networks.Network(build, 3e-3, "small"))
            config = EvaluationConfig(classifier_epochs=3, classifier_batch_size=64)
            model = downstream_classifier(digits.train, config, 10, "cpu", "resnet")
        assert downstream_accuracy(model, digits.train, digits, config) > 0.85


def test_scores_are_means_over_classifiers_and_repeats(digits: Dataset, tmp_path: Path) -> None:
    config = load(
        {},
        {
            "evaluation.classifiers": ["mlp", "logistic"],
            "evaluation.num_repeats": 2,
            "evaluation.classifier_epochs": 1,
            "evaluation.extractor_epochs": 1,
            "evaluation.fid_extractor": "cnn",
            "runtime.cache": str(tmp_path),
        },
    )
    asked: list[torch.nn.Module] = []

    class Private(PrivateScores):
        def at_end(self, model: torch.nn.Module) -> float:
            asked.append(model)
            return 0.25

    synthetic, noise = _few(digits.train, 300), KeyedStream(b"k" * 32)
    private = Private(config, make_plan(config), digits, noise, tmp_path, "")
    found = score(config, synthetic, digits, "cpu", MASTER, private)
    values, single = found.values, found.record["classifiers"]
    each = {name: single[name]["accuracies"] for name in ("mlp", "logistic")}
    assert each["mlp"][0] != each["mlp"][1]
    assert values["accuracy_mlp"] == pytest.approx(sum(each["mlp"]) / 2)
    assert values["accuracy"] == pytest.approx((sum(each["mlp"]) + sum(each["logistic"])) / 4)
    means = [(a + b) / 2 for a, b in zip(each["mlp"], each["logistic"], strict=True)]
    assert values["accuracy_stddev"] == pytest.approx(abs(means[0] - means[1]) / 2**0.5)
    assert values["dp_accuracy"] == 0.25
    (model,) = asked  # One release for one charge.
    again = downstream_classifier(synthetic, config.evaluation, 10, "cpu", "mlp")
    assert downstream_accuracy(model, synthetic, digits, config.evaluation) == each["mlp"][0]
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    assert {"fid_cnn", "kid_cnn", "kid_cnn_stddev", "precision_cnn", "recall_cnn"} <= set(values)


def test_one_classifier_trained_once_has_one_accuracy(digits: Dataset, tmp_path: Path) -> None:
    config = load(
        {},
        {
            "evaluation.classifiers": ["logistic"],
            "evaluation.classifier_epochs": 1,
            "evaluation.extractor_epochs": 1,
            "evaluation.fid_extractor": "cnn",
            "runtime.cache": str(tmp_path),
        },
    )
    values = score(config, _few(digits.train, 300), digits, "cpu", MASTER).values
    assert [name for name in values if "accuracy" in name] == ["accuracy"]
    with pytest.raises(ConfigError, match="names one twice"):
        load({}, {"evaluation.classifiers": ["cnn", "cnn"]})
    with pytest.raises(ConfigError, match="one of 'cnn', 'resnet'"):
        load({}, {"evaluation.classifiers": ["vgg"]})
