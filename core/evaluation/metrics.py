"""The scores of a set of synthetic images against the real ones; none of them is private."""

from pathlib import Path

import torch

from core.config import EvaluationConfig
from core.data import Dataset, Split
from core.errors import DataError
from core.evaluation.classifiers import accuracy, synthetic_split, train_classifier
from core.evaluation.fid import frechet_distance, image_moments
from core.evaluation.reference import real_reference


def downstream_accuracy(
    synthetic: Split,
    dataset: Dataset,
    config: EvaluationConfig,
    num_classes: int,
    seed: int,
    device: torch.device | str,
) -> float:
    """Accuracy in [0, 1] on real test images of a classifier that saw synthetic images alone.

    The epoch is chosen on held-out synthetic images; the test images are used once.

    Args:
        synthetic: generated images, of the shape of the real ones.
        dataset: only `dataset.test` is read.
        seed: of the classifier.

    Raises:
        ConfigError: too few synthetic images to hold some out.
        DataError: synthetic and real images differ in shape.

    Privacy: a non-private metric: it reads real test images without protection, and no epsilon
        covers it or a choice made by it.
    """
    _require_same_shape(synthetic, dataset.test)
    train, validation = synthetic_split(synthetic.images, synthetic.labels)
    model = train_classifier(
        train,
        validation,
        num_classes,
        config.classifier_epochs,
        config.classifier_batch_size,
        seed,
        device,
    )
    return accuracy(model, dataset.test, config.batch_size)


def fid_score(
    synthetic: Split,
    dataset: Dataset,
    config: EvaluationConfig,
    num_classes: int,
    seed: int,
    device: torch.device | str,
    cache: Path,
) -> tuple[str, float]:
    """Frechet distance (Heusel et al. 2017) of synthetic images to the real training images.

    Args:
        synthetic: generated images, at least two, of the shape of the real ones.
        dataset: only `dataset.train` is read.
        seed: of the `cnn` extractor; values of `fid_cnn` are comparable under one seed alone.
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
    extractor, real = real_reference(dataset, config, num_classes, seed, device, cache)
    ours = image_moments(extractor, synthetic.images, config.batch_size, device)
    return extractor.name, frechet_distance(ours, real)


def _require_same_shape(synthetic: Split, real: Split) -> None:
    ours, theirs = list(synthetic.images.shape[1:]), list(real.images.shape[1:])
    if ours != theirs:
        raise DataError(f"synthetic images are {ours}, real ones {theirs} (channels, H, W)")
