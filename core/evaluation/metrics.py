"""Scores of synthetic images against real ones; only `dp_accuracy` is private."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from core.config import EvaluationConfig
from core.data import Dataset, Split
from core.errors import DataError
from core.evaluation.classifiers import (
    EpochScorer,
    accuracy,
    count_correct,
    predictions,
    synthetic_split,
    train_classifier,
)
from core.evaluation.fid import frechet_distance
from core.evaluation.kid import kernel_distance
from core.evaluation.precision_recall import precision_and_recall
from core.evaluation.reference import real_reference
from core.evaluation.summary import summarize
from core.privacy.keys import KeyedStream
from core.privacy.plan.releases import ScorePlan

_log = logging.getLogger(__name__)
FEWEST_IMAGES = 2048
"""Images below which the covariance of as many Inception features is singular."""


def downstream_classifier(
    synthetic: Split,
    config: EvaluationConfig,
    num_classes: int,
    device: torch.device | str,
    network: str = "cnn",
    repeat: int = 0,
    judge: EpochScorer | None = None,
) -> nn.Module:
    """A classifier that saw synthetic images alone; its epoch is chosen on held-out ones.

    Args:
        judge: chooses the epoch instead; then all synthetic images train.
        network: one of `evaluation.classifiers`.
        repeat: number of the training, from 0; each has a seed of its own.

    Raises:
        ConfigError: too few synthetic images to hold some out.

    Privacy: post-processing of the synthetic images, hence free, but for what `judge` reads.
    """
    train, validation = synthetic, judge
    if validation is None:
        train, validation = synthetic_split(synthetic.images, synthetic.labels)
    return train_classifier(
        train,
        validation,
        num_classes,
        config.classifier_epochs,
        config.classifier_batch_size,
        config.seed + repeat,
        device,
        network=network,
    )


def downstream_accuracy(
    model: nn.Module, synthetic: Split, dataset: Dataset, config: EvaluationConfig
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


def confusion(
    model: nn.Module, dataset: Dataset, num_classes: int, batch_size: int
) -> list[list[int]]:
    """Real test images by their class (rows) and the class that a classifier takes them for.

    Privacy: a non-private metric, like `downstream_accuracy`.
    """
    test = dataset.test
    places = num_classes * test.labels.cpu() + predictions(model, test, batch_size)
    return places.bincount(minlength=num_classes**2).view(num_classes, num_classes).tolist()


def dp_accuracy(
    model: nn.Module,
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


def distribution_metrics(
    synthetic: Split,
    dataset: Dataset,
    config: EvaluationConfig,
    num_classes: int,
    device: torch.device | str,
    cache: Path,
) -> tuple[dict[str, float], dict[str, Any]]:
    """How like the synthetic images are to the real training images.

    Args:
        synthetic: generated images, of the shape of the real ones.
        dataset: only `dataset.train` is read.
        config: with the seed of the `cnn` extractor, under which alone its scores compare.
        cache: folder of what depends on real images alone, see `real_reference`.

    Returns:
        `fid` (Heusel et al. 2017), `kid` with `kid_stddev` (Binkowski et al. 2018), `precision`
        and `recall` (Kynkaanniemi et al. 2019), named `fid_cnn` and so on with the small network;
        and what must be equal for two scores to compare.

    Raises:
        ConfigError: the Inception weights cannot be had.
        DataError: synthetic and real images differ in shape, or are too few.

    Privacy: non-private metrics: they read the private training images without protection, and no
        epsilon covers them or a choice made by them.
    """
    _require_same_shape(synthetic, dataset.train)
    reference = real_reference(dataset, config, num_classes, device, cache)
    extractor, real = reference.extractor, reference.real
    ours = summarize(
        extractor, synthetic.images, config.batch_size, device, config.num_features, config.seed
    )
    generator = torch.Generator().manual_seed(config.seed)
    kid, kid_stddev = kernel_distance(real.features, ours.features, generator)
    precision, recall = precision_and_recall(real.features, ours.features)
    suffix = extractor.suffix
    values = {
        f"fid{suffix}": frechet_distance(ours.moments, real.moments),
        f"kid{suffix}": kid,
        f"kid{suffix}_stddev": kid_stddev,
        f"precision{suffix}": precision,
        f"recall{suffix}": recall,
    }
    notes: list[str] = []
    if ours.moments.count < FEWEST_IMAGES:
        notes.append(
            f"fid{suffix} of {ours.moments.count} images, fewer than {FEWEST_IMAGES:,}, is biased "
            f"upwards: raise evaluation.num_images, or read kid{suffix}"
        )
        _log.warning(notes[0])
    record = {
        "extractor": extractor.what,
        "num_images": ours.moments.count,
        "num_real_images": real.moments.count,
        "num_features": len(ours.features),
        "num_real_features": len(real.features),
        "real_statistics": reference.digest,
        "notes": notes,
    }
    return values, record


def _require_same_shape(synthetic: Split, real: Split) -> None:
    ours, theirs = list(synthetic.images.shape[1:]), list(real.images.shape[1:])
    if ours != theirs:
        raise DataError(f"synthetic images are {ours}, real ones {theirs} (channels, H, W)")
