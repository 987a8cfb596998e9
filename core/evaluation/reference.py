"""Real side of the distribution metrics, computed once for all runs on the same data."""

import hashlib
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from core.config import EvaluationConfig
from core.data import Dataset
from core.evaluation.classifiers import synthetic_split
from core.evaluation.features import (
    WEIGHTS_SHA256,
    CnnExtractor,
    FeatureExtractor,
    InceptionExtractor,
)
from core.evaluation.fid import Moments
from core.evaluation.summary import Summary, summarize
from core.io.files import write_whole

_VERSION = 4
"""Raised whenever extractor, transform or summary change, so that no old file is taken."""


@dataclass(frozen=True)
class Reference:
    """What synthetic images are held against.

    Attributes:
        real: summary of the real training images.
        digest: SHA-256 of all that `real` depends on: equal digests compare.
    """

    extractor: FeatureExtractor
    real: Summary
    digest: str


def real_reference(
    dataset: Dataset,
    config: EvaluationConfig,
    num_classes: int,
    device: torch.device | str,
    cache: Path,
) -> Reference:
    """The extractor and the summary of the real training images.

    Args:
        dataset: only `dataset.train` and the fingerprint are read.
        config: with the seed of the `cnn` extractor and of the features that are kept.
        cache: folder that keeps both by a digest of all that they depend on; files that are
            damaged or of another digest are made anew.

    Raises:
        ConfigError: the Inception weights cannot be had.

    Privacy: computed from the private images without protection: the folder must not be released,
        and its files are their owner's alone. The digest confirms a guess of the data: show it
        keyed.
    """
    inception, seed = None, config.seed
    content = [dataset.fingerprint, list(dataset.train.images.shape)]
    origin: list[object] = [_VERSION, torch.__version__, content, config.fid_extractor]
    origin += [config.num_features, seed]
    if config.fid_extractor == "inception":
        inception = InceptionExtractor(config.inception_weights, device)
        origin.append(WEIGHTS_SHA256)
    else:
        origin += [num_classes, config.extractor_epochs, config.classifier_batch_size]
    digest = hashlib.sha256(json.dumps(origin).encode()).hexdigest()
    path = cache / f"{config.fid_extractor}-{digest[:16]}.pt"
    stored = torch.load(path, map_location=device, weights_only=True) if path.exists() else None
    if stored is not None and stored["digest"] == digest:
        extractor = inception or CnnExtractor.restored(
            stored["network"], dataset.train, num_classes, device
        )
        summary = Summary(Moments.restored(stored["moments"]), stored["features"])
        return Reference(extractor, summary, digest)
    real = dataset.train
    if inception is None:
        train, validation = synthetic_split(real.images, real.labels)
        settings = (config.extractor_epochs, config.classifier_batch_size, seed, device)
        extractor = CnnExtractor(train, validation, num_classes, *settings)
        network = extractor.state_dict()
    else:
        extractor, network = inception, {}
    summary = summarize(
        extractor, real.images, config.batch_size, device, config.num_features, seed
    )
    kept = {"digest": digest, "network": network, "features": summary.features}
    kept |= {"moments": summary.moments.state_dict()}
    write_whole(path, partial(torch.save, kept), private=True, by_many=True)
    return Reference(extractor, summary, digest)
