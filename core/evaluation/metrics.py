"""The scores of a set of synthetic images against the real ones; none of them is private."""

import torch

from core.config import EvaluationConfig
from core.data import Dataset, Split
from core.errors import ConfigError, DataError
from core.evaluation.classifiers import accuracy, train_classifier
from core.evaluation.features import CnnExtractor, FeatureExtractor, InceptionExtractor
from core.evaluation.fid import frechet_distance, image_moments

DIRECTIONS = {"accuracy": "maximize", "fid": "minimize", "fid_cnn": "minimize"}
"""Every metric and the direction in which it improves."""


def synthetic_split(
    images: torch.Tensor, labels: torch.Tensor, fraction: float = 1 / 12
) -> tuple[Split, Split]:
    """Divides images into training and validation, class by class, without chance.

    Validation takes evenly spaced images of each class: `fraction` of them, rounded, at least
    one and never all; a class of one image is left to training. The default is that of
    DPImageBench (Gong et al. 2025): 55,000 of 60,000 images train, 5,000 validate.

    Args:
        images: uint8 `[N, C, H, W]`.
        labels: int64 `[N]`.
        fraction: share of validation, in (0, 1).

    Returns:
        Training and validation split, both in the original order.

    Raises:
        ConfigError: no class has two images.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction={fraction} must lie in (0, 1)")
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten().cpu()
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        spaced = (torch.arange(count, dtype=torch.float64) + 0.5) * (len(members) / max(count, 1))
        held_out[members[spaced.long()]] = True
    if not held_out.any():
        raise ConfigError(
            f"{len(labels)} images give no class two, so none can be held out for validation: "
            "raise evaluation.num_images to at least twice dataset.num_classes"
        )
    held_out = held_out.to(labels.device)
    return Split(images[~held_out], labels[~held_out]), Split(images[held_out], labels[held_out])


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
) -> tuple[str, float]:
    """Frechet distance (Heusel et al. 2017) of synthetic images to the real training images.

    Args:
        synthetic: generated images, at least two, of the shape of the real ones.
        dataset: only `dataset.train` is read.
        seed: of the `cnn` extractor; values of `fid_cnn` are comparable under one seed alone.

    Returns:
        `("fid", value)` with the Inception extractor, `("fid_cnn", value)` with the small network.

    Raises:
        ConfigError: the Inception weights cannot be had.
        DataError: synthetic and real images differ in shape.

    Privacy: a non-private metric: it reads the private training images without protection, and no
        epsilon covers it or a choice made by it.
    """
    real = dataset.train
    _require_same_shape(synthetic, real)
    extractor: FeatureExtractor
    if config.fid_extractor == "inception":
        extractor = InceptionExtractor(config.inception_weights, device)
    else:
        train, validation = synthetic_split(real.images, real.labels)
        extractor = CnnExtractor(
            train,
            validation,
            num_classes,
            config.classifier_epochs,
            config.classifier_batch_size,
            seed,
            device,
        )
    ours, theirs = (
        image_moments(extractor, images, config.batch_size, device)
        for images in (synthetic.images, real.images)
    )
    return extractor.name, frechet_distance(ours, theirs)


def _require_same_shape(synthetic: Split, real: Split) -> None:
    ours, theirs = list(synthetic.images.shape[1:]), list(real.images.shape[1:])
    if ours != theirs:
        raise DataError(f"synthetic images are {ours}, real ones {theirs} (channels, H, W)")
