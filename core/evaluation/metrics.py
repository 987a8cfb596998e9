"""The scores of a set of synthetic images against the real ones; only `dp_accuracy` is private."""

from pathlib import Path

import torch

from core.config import EvaluationConfig
from core.data import Dataset, Split
from core.errors import DataError
from core.evaluation.classifiers import (
    Classifier,
    accuracy,
    count_correct,
    synthetic_split,
    train_classifier,
)
from core.evaluation.fid import frechet_distance, image_moments
from core.evaluation.reference import real_reference
from core.privacy.keys import KeyedStream
from core.privacy.plan import ScorePlan


def downstream_classifier(
    synthetic: Split, config: EvaluationConfig, num_classes: int, device: torch.device | str
) -> Classifier:
    """A classifier that saw synthetic images alone; its epoch is chosen on held-out ones.

    Raises:
        ConfigError: too few synthetic images to hold some out.

    Privacy: post-processing of the synthetic images, hence free.
    """
    train, validation = synthetic_split(synthetic.images, synthetic.labels)
    return train_classifier(
        train,
        validation,
        num_classes,
        config.classifier_epochs,
        config.classifier_batch_size,
        config.seed,
        device,
    )


def downstream_accuracy(
    model: Classifier, synthetic: Split, dataset: Dataset, config: EvaluationConfig
) -> float:
    """Accuracy in [0, 1] of `downstream_classifier` on the real test images, which it uses once.

    Args:
        synthetic: what the model was trained on, of the shape of the real images.
        dataset: only `dataset.test` is read.

    Raises:
        DataError: synthetic and real images differ in shape.

    Privacy: a non-private metric: it reads real test images without protection, and no epsilon
        covers it or a choice made by it.
    """
    _require_same_shape(synthetic, dataset.test)
    return accuracy(model, dataset.test, config.batch_size)


def dp_accuracy(
    model: Classifier,
    dataset: Dataset,
    config: EvaluationConfig,
    plan: ScorePlan,
    noise: KeyedStream,
    release: int = 0,
) -> float:
    """Accuracy in [0, 1] on the private training images, with noise on the number it gets right.

    Args:
        dataset: only `dataset.train` is read; its size N is public.
        noise: secret stream; one number is drawn from it.
        release: place of this score among those of the run, each with noise of its own.

    Privacy: a Gaussian mechanism: one image changes the number by at most 1, and the plan charges
        `plan.noise_stddev` standard deviations once. The result must be stored before it is shown:
        the same noise on another number would give the difference away.
    """
    correct = count_correct(model, dataset.train, config.batch_size)
    # Whole numbers alone: the digits of a float would tell which number the noise was added to.
    noisy = round(correct + plan.noise_stddev * float(noise.normal(release, 1)))
    return min(max(noisy / len(dataset.train.labels), 0.0), 1.0)


def fid_score(
    synthetic: Split,
    dataset: Dataset,
    config: EvaluationConfig,
    num_classes: int,
    device: torch.device | str,
    cache: Path,
) -> tuple[str, float]:
    """Frechet distance (Heusel et al. 2017) of synthetic images to the real training images.

    Args:
        synthetic: generated images, at least two, of the shape of the real ones.
        dataset: only `dataset.train` is read.
        config: with the seed of the `cnn` extractor, under which alone `fid_cnn` compares.
        cache: folder of what depends on real images alone, see `real_reference`.

    Returns:
        `("fid", value)` with the Inception extractor, `("fid_cnn", value)` with the small network.

    Raises:
        ConfigError: the Inception weights cannot be had.
        DataError: synthetic and real images differ in shape.

    Privacy: a non-private metric: it reads the private training images without protection, and no
        epsilon covers it or a choice made by it.
    """
    _require_same_shape(synthetic, dataset.train)
    extractor, real = real_reference(dataset, config, num_classes, config.seed, device, cache)
    ours = image_moments(extractor, synthetic.images, config.batch_size, device)
    return extractor.name, frechet_distance(ours, real)


def _require_same_shape(synthetic: Split, real: Split) -> None:
    ours, theirs = list(synthetic.images.shape[1:]), list(real.images.shape[1:])
    if ours != theirs:
        raise DataError(f"synthetic images are {ours}, real ones {theirs} (channels, H, W)")
