"""The real side of a Frechet distance, computed once for all runs on the same data."""

import hashlib
import json
import os
from pathlib import Path

import torch

from core.config import EvaluationConfig
from core.data import Dataset
from core.evaluation.classifiers import synthetic_split
from core.evaluation.features import CnnExtractor, FeatureExtractor, InceptionExtractor
from core.evaluation.fid import Moments, image_moments

_VERSION = 2
"""Raised whenever extractor, transform or moments change, so that no old file is taken."""


def real_reference(
    dataset: Dataset,
    config: EvaluationConfig,
    num_classes: int,
    seed: int,
    device: torch.device | str,
    cache: Path,
) -> tuple[FeatureExtractor, Moments]:
    """The extractor and the moments of the real training images.

    Args:
        dataset: only `dataset.train` and the fingerprint are read.
        seed: of the `cnn` extractor.
        cache: folder that keeps both by a digest of all that they depend on; files that are
            damaged or of another digest are made anew.

    Raises:
        ConfigError: the Inception weights cannot be had.

    Privacy: computed from the private images without protection: the folder must not be released.
    """
    inception = None
    content = [dataset.fingerprint, list(dataset.train.images.shape)]
    origin: list[object] = [_VERSION, torch.__version__, content, config.fid_extractor]
    if config.fid_extractor == "inception":
        inception = InceptionExtractor(config.inception_weights, device)
        origin.append(inception.digest)
    else:
        origin += [num_classes, config.extractor_epochs, config.classifier_batch_size, seed]
    digest = hashlib.sha256(json.dumps(origin).encode()).hexdigest()
    path = cache / f"{config.fid_extractor}-{digest[:16]}.pt"
    stored = torch.load(path, map_location=device, weights_only=True) if path.exists() else None
    if stored is not None and stored["digest"] == digest:
        extractor = inception or CnnExtractor.restored(
            stored["network"], dataset.train, num_classes, device
        )
        return extractor, Moments.restored(stored["moments"])
    real = dataset.train
    if inception is None:
        train, validation = synthetic_split(real.images, real.labels)
        settings = (config.extractor_epochs, config.classifier_batch_size, seed, device)
        extractor = CnnExtractor(train, validation, num_classes, *settings)
        network = extractor.state_dict()
    else:
        extractor, network = inception, {}
    moments = image_moments(extractor, real.images, config.batch_size, device)
    cache.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    torch.save({"digest": digest, "network": network, "moments": moments.state_dict()}, temporary)
    temporary.replace(path)
    return extractor, moments
