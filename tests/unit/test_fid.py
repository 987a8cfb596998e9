"""Frechet distance, its moments, and the extractors that feed it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from core.config import EvaluationConfig
from core.data import Dataset, Split
from core.errors import ConfigError, DataError
from core.evaluation import features, metrics, reference
from core.evaluation.features import CnnExtractor, InceptionExtractor, find_weights
from core.evaluation.fid import Moments, frechet_distance
from core.evaluation.summary import summarize


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _moments(values: torch.Tensor) -> Moments:
    moments = Moments(values.shape[1])
    moments.update(values)
    return moments


def _correlated(count: int, dimension: int, seed: int) -> torch.Tensor:
    generator = _generator(seed)
    mixing = torch.randn(dimension, dimension, dtype=torch.float64, generator=generator)
    offset = torch.randn(dimension, dtype=torch.float64, generator=generator)
    noise = torch.randn(count, dimension, dtype=torch.float64, generator=generator)
    return noise @ mixing + offset


def _cross(mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Points `mean +- c std_i e_i`, whose unbiased covariance is exactly `diag(std^2)`."""
    arms = torch.diag(std) * ((2 * len(std) - 1) / 2) ** 0.5
    return torch.cat((mean + arms, mean - arms))


def _images(count: int, seed: int, channels: int = 1) -> Split:
    generator = _generator(seed)
    shape = (count, channels, 8, 8)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return Split(images, torch.arange(count) % 2)


def test_diagonal_gaussians_have_the_closed_form() -> None:
    generator = _generator()
    mean1, mean2 = torch.randn(2, 16, dtype=torch.float64, generator=generator)
    std1, std2 = torch.rand(2, 16, dtype=torch.float64, generator=generator)
    distance = frechet_distance(_moments(_cross(mean1, std1)), _moments(_cross(mean2, std2)))
    expected = (mean1 - mean2).square().sum() + (std1 - std2).square().sum()
    assert distance == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dimension", [64, 192])
def test_agrees_with_pytorch_fid(dimension: int) -> None:
    fid_score = pytest.importorskip("pytorch_fid.fid_score")
    one, two = _correlated(500, dimension, seed=1), _correlated(400, dimension, seed=2)
    means = [values.numpy().mean(0) for values in (one, two)]
    covariances = [np.cov(values.numpy(), rowvar=False) for values in (one, two)]
    expected = fid_score.calculate_frechet_distance(
        means[0], covariances[0], means[1], covariances[1]
    )
    distance = frechet_distance(_moments(one), _moments(two))
    assert distance == pytest.approx(float(expected), rel=1e-6)


def test_rank_deficient_covariances_keep_the_distance_of_their_subspace() -> None:
    one, two = _correlated(50, 5, seed=1), _correlated(60, 5, seed=2)
    square = torch.randn(64, 64, dtype=torch.float64, generator=_generator(3))
    basis = torch.linalg.qr(square).Q[:5]
    embedded = frechet_distance(_moments(one @ basis), _moments(two @ basis))
    assert embedded == pytest.approx(frechet_distance(_moments(one), _moments(two)), rel=1e-5)


def test_fewer_images_than_features_give_a_finite_distance() -> None:
    one, two = _moments(_correlated(3, 64, seed=1)), _moments(_correlated(2, 64, seed=2))
    assert 0 < frechet_distance(one, two) < float("inf")
    constant = _moments(torch.ones(4, 64))
    assert frechet_distance(constant, constant) == 0


def test_distance_is_zero_to_itself_and_symmetric() -> None:
    one, two = _moments(_correlated(300, 32, seed=1)), _moments(_correlated(300, 32, seed=2))
    scale = one.covariance.trace().item()
    assert frechet_distance(one, one) < 1e-9 * scale
    assert frechet_distance(one, two) == pytest.approx(frechet_distance(two, one), rel=1e-9)
    assert frechet_distance(one, two) > 0.01 * scale


def test_streamed_moments_equal_those_of_the_whole() -> None:
    values = _correlated(101, 6, seed=0) + 1e6
    moments = Moments(6)
    for batch in values.split([1, 0, 40, 7, 53]):
        moments.update(batch)
    assert moments.count == 101
    np.testing.assert_allclose(moments.mean.numpy(), values.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(
        moments.covariance.numpy(), np.cov(values.numpy(), rowvar=False), rtol=1e-8
    )


def test_moments_refuse_what_they_cannot_describe() -> None:
    moments = Moments(3)
    with pytest.raises(ValueError, match="NaN"):
        moments.update(torch.full((2, 3), float("nan")))
    with pytest.raises(ValueError, match=r"not \[B, 3\]"):
        moments.update(torch.zeros(2, 4))
    moments.update(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="at least 2"):
        _ = moments.covariance
    with pytest.raises(ValueError, match="dimension"):
        frechet_distance(_moments(torch.zeros(2, 3)), _moments(torch.zeros(2, 4)))


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty torch.hub cache and no network; returns where the cached file would lie."""

    def fail(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    return tmp_path / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"


def test_missing_weights_are_an_error_with_remedies(offline: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        find_weights(None)
    for part in (str(offline), "no route to host", "inception_weights=", "fid_extractor=cnn"):
        assert part in str(caught.value)


def test_damaged_cached_weights_are_not_used(offline: Path) -> None:
    offline.parent.mkdir(parents=True)
    offline.write_bytes(b"half a file")
    with pytest.raises(ConfigError, match="damaged"):
        find_weights(None)


def test_cached_weights_are_found(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline.parent.mkdir(parents=True)
    offline.write_bytes(b"weights")
    monkeypatch.setattr(features, "WEIGHTS_SHA256", features._sha256(offline))
    assert find_weights(None) == offline
    assert find_weights(offline) == offline


def test_only_the_published_weights_score_as_fid(tmp_path: Path) -> None:
    other = tmp_path / "other.pth"
    other.write_bytes(b"other weights")
    with pytest.raises(ConfigError) as caught:
        find_weights(other)
    for part in (str(other), features._sha256(other), features.WEIGHTS_SHA256, "fid_extractor=cnn"):
        assert part in str(caught.value)
    assert len(features.WEIGHTS_SHA256) == 64
    assert features.WEIGHTS_URL.endswith(f"-{features.WEIGHTS_SHA256[:8]}.pth")


def test_a_given_path_is_never_replaced_by_the_cache(offline: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.inception_weights='/absent\.pth'"):
        find_weights("/absent.pth")


def test_a_file_without_inception_weights_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pytorch_fid")
    path = tmp_path / "other.pth"
    torch.save({"weight": torch.zeros(1)}, path)
    monkeypatch.setattr(features, "WEIGHTS_SHA256", features._sha256(path))
    with pytest.raises(ConfigError, match=r"other\.pth.*does not hold"):
        InceptionExtractor(path, "cpu")


@pytest.fixture(scope="module")
def random_inception(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, torch.nn.Module]:
    """A file of random weights, and pytorch-fid's network that holds them."""
    inception = pytest.importorskip("pytorch_fid.inception")
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *_: None)
        network = inception.fid_inception_v3()
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight.data.mul_(6**0.5)  # Keeps the scale of activations with depth.
        patch.setattr(inception, "fid_inception_v3", lambda: network)
        reference = inception.InceptionV3([3]).eval()
    torch.save(network.state_dict(), path)
    return path, reference


def test_inception_weights_load_from_a_path(
    random_inception: tuple[Path, torch.nn.Module], offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, reference = random_inception
    monkeypatch.setattr(features, "WEIGHTS_SHA256", features._sha256(path))
    state = torch.get_rng_state()
    extractor = InceptionExtractor(path, "cpu")
    assert torch.equal(torch.get_rng_state(), state)
    grey = _images(2, seed=0).images
    found = extractor(grey)
    expected = reference(grey.repeat(1, 3, 1, 1) / 255)[0].flatten(1)
    assert found.shape == (2, extractor.dimension)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * expected.max().item())
    assert (found[0] - found[1]).abs().max() > 1e-3 * expected.max()
    with pytest.raises(ValueError, match="1 or 3"):
        extractor(torch.zeros(1, 2, 8, 8, dtype=torch.uint8))


def test_the_metric_is_named_after_its_extractor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Pixels:
        suffix, dimension, what = "", 64, "pixels"

        def __init__(self, weights: str | None, device: str) -> None:
            assert weights == "weights.pth"

        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1).float()

    monkeypatch.setattr(reference, "InceptionExtractor", Pixels)
    dataset = Dataset(_images(40, seed=0), _images(8, seed=1), "")
    inception = EvaluationConfig(inception_weights="weights.pth", batch_size=7)
    cnn = EvaluationConfig(fid_extractor="cnn", extractor_epochs=1, batch_size=7)
    for config, expected in ((inception, "fid"), (cnn, "fid_cnn")):
        same, _ = metrics.distribution_metrics(dataset.train, dataset, config, 2, "cpu", tmp_path)
        suffix = expected[3:]
        others = {f"{name}{suffix}" for name in ("kid", "precision", "recall")}
        assert set(same) == {expected, *others, f"kid{suffix}_stddev"}
        assert same[expected] == pytest.approx(0, abs=1e-6)
        darker = Split(dataset.train.images // 2, dataset.train.labels)
        changed, _ = metrics.distribution_metrics(darker, dataset, config, 2, "cpu", tmp_path)
        assert changed[expected] > 1e-3


def test_what_a_score_rests_on_is_recorded_and_few_images_are_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Wide:
        suffix, dimension, what = "", 64, "pixels"

        def __init__(self, *_: object) -> None:
            pass

        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1).float()

    monkeypatch.setattr(reference, "InceptionExtractor", Wide)
    dataset = Dataset(_images(90, seed=0), _images(8, seed=1), "a")
    config = EvaluationConfig(num_features=40)
    _, few = metrics.distribution_metrics(
        _images(2047, seed=2), dataset, config, 2, "cpu", tmp_path
    )
    assert few["extractor"] == "pixels"
    assert (few["num_images"], few["num_real_images"]) == (2047, 90)
    assert (few["num_features"], few["num_real_features"]) == (40, 40)
    assert "fid of 2047 images, fewer than 2,048, is biased upwards" in few["notes"][0]
    assert few["notes"][0] in caplog.text
    _, enough = metrics.distribution_metrics(
        _images(2048, seed=2), dataset, config, 2, "cpu", tmp_path
    )
    assert enough["notes"] == []
    assert enough["real_statistics"] == few["real_statistics"]
    other = Dataset(dataset.train, dataset.test, "b")
    _, elsewhere = metrics.distribution_metrics(
        _images(2048, seed=2), other, config, 2, "cpu", tmp_path
    )
    assert elsewhere["real_statistics"] != enough["real_statistics"]


def test_inception_never_falls_back_to_the_cnn(offline: Path, tmp_path: Path) -> None:
    pytest.importorskip("pytorch_fid")
    dataset = Dataset(_images(8, seed=0), _images(8, seed=1), "")
    with pytest.raises(ConfigError, match="no Inception weights"):
        metrics.distribution_metrics(dataset.train, dataset, EvaluationConfig(), 2, "cpu", tmp_path)


def test_images_of_another_shape_are_refused(tmp_path: Path) -> None:
    dataset = Dataset(_images(8, seed=0), _images(8, seed=1), "")
    colour = _images(8, seed=2, channels=3)
    with pytest.raises(DataError, match=r"\[3, 8, 8\].*\[1, 8, 8\]"):
        metrics.distribution_metrics(colour, dataset, EvaluationConfig(), 2, "cpu", tmp_path)


def test_the_real_side_is_kept_for_the_same_data_and_settings_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = Dataset(_images(40, seed=0), _images(8, seed=1), "a")
    other = Dataset(_images(40, seed=5), _images(8, seed=1), "b")
    cnn = EvaluationConfig(fid_extractor="cnn", extractor_epochs=1, batch_size=7)
    images = _images(20, seed=2)
    first = metrics.distribution_metrics(images, dataset, cnn, 2, "cpu", tmp_path)
    fresh = metrics.distribution_metrics(images, other, cnn, 2, "cpu", tmp_path)
    assert fresh != first
    seeded = cnn.model_copy(update={"seed": 1})
    assert metrics.distribution_metrics(images, dataset, seeded, 2, "cpu", tmp_path) != first
    assert len(list(tmp_path.glob("cnn-*.pt"))) == 3

    def refuse(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(features, "train_classifier", refuse)
    assert metrics.distribution_metrics(images, dataset, cnn, 2, "cpu", tmp_path) == first
    assert metrics.distribution_metrics(images, other, cnn, 2, "cpu", tmp_path) == fresh


def test_cnn_features_are_those_of_their_seed() -> None:
    train, validation, new = _images(40, 0), _images(8, 1), _images(9, 2)

    def extract(seed: int) -> torch.Tensor:
        return CnnExtractor(train, validation, 2, 1, 16, seed, "cpu")(new.images)

    one = extract(0)
    assert one.shape == (9, CnnExtractor.dimension)
    assert torch.equal(one, extract(0))
    assert not torch.allclose(one, extract(1))


def test_batches_do_not_change_the_summary() -> None:
    train = _images(40, 0)
    extractor = CnnExtractor(train, _images(8, 1), 2, 1, 16, 0, "cpu")
    whole, parts = (
        summarize(extractor, train.images, size, "cpu", 25, seed=3) for size in (100, 7)
    )
    torch.testing.assert_close(
        whole.moments.covariance, parts.moments.covariance, rtol=1e-4, atol=1e-6
    )
    assert whole.features.shape == (25, CnnExtractor.dimension)
    torch.testing.assert_close(whole.features, parts.features)


def test_what_was_kept_for_the_distance_is_dropped_by_new_features():
    first, second, ours = (torch.randn(40, 3, dtype=torch.float64) for _ in range(3))
    grown, fresh, other = Moments(3), Moments(3), Moments(3)
    other.update(ours)
    grown.update(first)
    alone = frechet_distance(other, grown)
    grown.update(second)
    for part in (first, second):
        fresh.update(part)
    assert frechet_distance(other, grown) == frechet_distance(other, fresh) != alone
