"""How the ranks of a run share the work of scoring it."""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from core import distributed
from core.config import Config
from core.data import Dataset, Split
from core.evaluation.classifiers import Classifier
from core.evaluation.metrics import (
    downstream_accuracy,
    downstream_classifier,
    dp_accuracy,
    fid_score,
)
from core.generate import generate
from core.privacy.keys import KeyedStream
from core.privacy.plan import PrivacyPlan
from core.training import config_device


def my_scores(
    config: Config,
    plan: PrivacyPlan,
    synthetic: Split,
    dataset: Dataset,
    kept_accuracy: Callable[[Classifier], float],
) -> dict[str, float]:
    """This rank's share of accuracies and Frechet distance; together the ranks have all.

    Args:
        kept_accuracy: the private accuracy of a classifier.

    Privacy: all are computed from real images; `plan.tag` says which are private.
    """
    num_classes, device = config.dataset.num_classes, config_device(config)

    def accuracies() -> dict[str, float]:
        model = downstream_classifier(synthetic, config.evaluation, num_classes, device)
        scores = {"accuracy": downstream_accuracy(model, synthetic, dataset, config.evaluation)}
        if plan.score is not None:
            scores["dp_accuracy"] = kept_accuracy(model)
        return scores

    def fid() -> dict[str, float]:
        cache = Path(config.runtime.cache)
        name, value = fid_score(synthetic, dataset, config.evaluation, num_classes, device, cache)
        return {name: value}

    mine: dict[str, float] = {}
    for number, task in enumerate((accuracies, fid)):
        if number % distributed.world_size() == distributed.rank():
            mine.update(task())
    return mine


def early_score_of(
    config: Config,
    plan: PrivacyPlan,
    model: nn.Module,
    dataset: Dataset,
    noise: KeyedStream,
    release: int,
) -> float:
    """The score of a small sample by `early_scores.metric`, the same on all ranks.

    Privacy: computed from real images; `plan.tag(plan.early_metric)` says whether it is private.
    """
    device, settings = config_device(config), config.evaluation
    num_classes = config.dataset.num_classes
    synthetic = generate(model, config, config.early_scores.num_images, device)

    def score() -> float:
        if config.early_scores.metric == "fid":
            cache = Path(config.runtime.cache)
            return fid_score(synthetic, dataset, settings, num_classes, device, cache)[1]
        classifier = downstream_classifier(synthetic, settings, num_classes, device)
        if config.early_scores.metric == "accuracy":
            return downstream_accuracy(classifier, synthetic, dataset, settings)
        assert plan.score is not None
        return dp_accuracy(classifier, dataset, settings, plan.score, noise, release)

    return distributed.on_rank_0(score)
