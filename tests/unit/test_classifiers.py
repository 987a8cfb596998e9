"""The classifier, its training, and the accuracy of those who learn from synthetic images."""

from collections.abc import Iterator

import pytest
import torch

from core.config import DIRECTIONS, DatasetConfig, EvaluationConfig
from core.data import Dataset, Split, load_dataset
from core.errors import ConfigError, DataError
from core.evaluation import classifiers
from core.evaluation.classifiers import (
    Classifier,
    accuracy,
    learning_rate_factor,
    train_classifier,
)
from core.evaluation.metrics import downstream_accuracy, downstream_classifier, synthetic_split


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
    reported: list[tuple[int, float]] = []

    def scripted(model: Classifier, split: Split, batch_size: int) -> float:
        assert split is validation
        states.append({key: value.clone() for key, value in model.state_dict().items()})
        return scores[len(states) - 1]

    monkeypatch.setattr(classifiers, "accuracy", scripted)
    model = train_classifier(
        train, validation, 10, 3, 32, 0, "cpu", lambda *report: reported.append(report)
    )
    found = model.state_dict()
    same = [all(torch.equal(state[key], found[key]) for key in found) for state in states]
    assert same == [number == chosen for number in (1, 2, 3)]
    assert reported == list(enumerate(scores, start=1))
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
        assert model.penultimate(images).shape == (2, classifiers.FEATURES)


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
    with pytest.raises(ValueError, match="fraction"):
        synthetic_split(torch.zeros(4, 1, 8, 8), torch.zeros(4).long(), 1.0)


def test_images_of_another_shape_are_refused(digits: Dataset) -> None:
    larger = Split(torch.zeros(4, 1, 16, 16, dtype=torch.uint8), torch.zeros(4).long())
    with pytest.raises(DataError, match=r"\[1, 16, 16\].*\[1, 8, 8\]"):
        _score(larger, digits)


def test_every_metric_has_a_direction() -> None:
    assert DIRECTIONS == {
        "accuracy": "maximize",
        "dp_accuracy": "maximize",
        "fid": "minimize",
        "fid_cnn": "minimize",
    }
