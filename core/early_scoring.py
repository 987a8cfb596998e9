"""The score of a small sample during training, shared among ranks."""

from pathlib import Path

from torch import nn

from core import distributed
from core.config import Config
from core.data import Dataset
from core.device import config_device
from core.evaluation.metrics import (
    downstream_accuracy,
    downstream_classifier,
    dp_accuracy,
    likeness,
)
from core.generate import generate
from core.privacy.keys import KeyedStream
from core.privacy.plan import PrivacyPlan


def early_score_of(
    config: Config,
    plan: PrivacyPlan,
    model: nn.Module,
    dataset: Dataset,
    noise: KeyedStream,
    release: int,
) -> float:
    """The score of a small sample by `early_scores.metric`, the same on all ranks.

    Accuracies are those of the first of `evaluation.classifiers`, trained once.

    Privacy: computed from real images; `plan.tag(plan.early_metric)` says whether it is private.
    """
    device, settings = config_device(config), config.evaluation
    num_classes, metric = config.dataset.num_classes, config.early_scores.metric
    synthetic = generate(model, config, config.early_scores.num_images, device)

    def score() -> float:
        if metric not in ("accuracy", "dp_accuracy"):
            cache = Path(config.runtime.cache)
            values, _ = likeness(synthetic, dataset, settings, num_classes, device, cache)
            return values[config.early_metric.removeprefix("early_")]
        network = settings.classifiers[0]
        classifier = downstream_classifier(synthetic, settings, num_classes, device, network)
        if metric == "accuracy":
            return downstream_accuracy(classifier, synthetic, dataset, settings)
        assert plan.score is not None
        return dp_accuracy(classifier, dataset, settings, plan.score, noise, release)

    return distributed.on_rank_0(score)
