"""Scoring of a run across ranks, with what must be equal for scores to compare."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from core import distributed
from core.config import Config, EvaluationConfig
from core.data import Dataset, Split
from core.errors import NotFiniteError
from core.evaluation.metrics import distribution_metrics, downstream_accuracy, downstream_classifier
from core.evaluation.networks import NETWORKS
from core.evaluation.private_scores import PrivateScores
from core.privacy.keys import MasterSecret

_CHOSEN_ON = {
    "synthetic": "synthetic images held out from training",
    "dp": "private training images, with noise on the number of hits",
}


@dataclass(frozen=True)
class Scores:
    """Scores by name, and how they were computed.

    Attributes:
        record: plain data; scores compare where it is equal, but for single accuracies.
    """

    values: dict[str, float]
    record: dict[str, Any]


def score(
    config: Config,
    synthetic: Split,
    dataset: Dataset,
    device: str,
    master: MasterSecret,
    private: PrivateScores | None = None,
) -> Scores:
    """Scores synthetic images; every rank does a share and returns all.

    `accuracy` is the mean over all `evaluation.classifiers` and repeats; where several are named,
    `accuracy_NAME` is the mean of one. `accuracy_stddev` is the deviation between the means of
    `evaluation.num_repeats` trainings with other seeds.

    Args:
        master: keys the digest of the real side, which else would confirm a guess of the data.
        private: gives the first classifier's `dp_accuracy` and, where the configuration says so,
            chooses all classifiers' epochs.

    Raises:
        NotFiniteError: a score is NaN or infinite.

    Privacy: all but `dp_accuracy` are computed from real images without protection.
    """
    settings, num_classes = config.evaluation, config.dataset.num_classes

    def trained(network: str, repeat: int) -> dict[str, Any]:
        judge = None
        if private is not None and private.choose_epochs:
            judge = partial(private.of_epoch, network, repeat)
        model = downstream_classifier(
            synthetic, settings, num_classes, device, network, repeat, judge
        )
        found: dict[str, Any] = {
            f"{network}/{repeat}": downstream_accuracy(model, synthetic, dataset, settings)
        }
        if private is not None and (network, repeat) == (settings.classifiers[0], 0):
            found["dp_accuracy"] = private.at_end(model)
        return found

    def compared() -> dict[str, Any]:
        cache = Path(config.runtime.cache)
        values, record = distribution_metrics(
            synthetic, dataset, settings, num_classes, device, cache
        )
        real = master.keyed(record["real_statistics"])
        return {"likeness": (values, record | {"real_statistics": real})}

    first, *others = [(n, r) for r in range(settings.num_repeats) for n in settings.classifiers]
    tasks = [lambda: trained(*first), compared]  # The private accuracy belongs to rank 0.
    tasks += [lambda pair=pair: trained(*pair) for pair in others]

    def mine() -> dict[str, Any]:
        share: dict[str, Any] = {}
        for task in tasks[distributed.rank() :: distributed.world_size()]:
            share.update(task())
        return share

    found: dict[str, Any] = {}
    for part in distributed.all_gather_object(distributed.on_all_ranks(mine)):
        found.update(part)
    return _gathered(found, settings)


def _gathered(found: dict[str, Any], settings: EvaluationConfig) -> Scores:
    """Means of the single accuracies, and all else that was found."""
    single = {
        network: [found[f"{network}/{repeat}"] for repeat in range(settings.num_repeats)]
        for network in settings.classifiers
    }
    means = [statistics.fmean(values) for values in zip(*single.values(), strict=True)]
    values = {"accuracy": statistics.fmean(means)}
    if settings.num_repeats > 1:
        values["accuracy_stddev"] = statistics.stdev(means)
    if len(single) > 1:
        values |= {f"accuracy_{name}": statistics.fmean(each) for name, each in single.items()}
    if "dp_accuracy" in found:
        values["dp_accuracy"] = found["dp_accuracy"]
    distribution, record = found["likeness"]
    classifiers = {
        name: {"network": NETWORKS[name].what, "accuracies": each} for name, each in single.items()
    }
    values |= distribution
    require_finite(values)
    chosen = _CHOSEN_ON[settings.epoch_chosen_on]
    how = {"classifiers": classifiers, "epoch_chosen_on": chosen, "seed": settings.seed}
    return Scores(values, how | record)


def require_finite(scores: Mapping[str, float]) -> None:
    """Refuses scores that nothing can be compared with.

    Raises:
        NotFiniteError: names the first score that is NaN or infinite.

    Privacy: of finite features each score is finite, in float64, whatever the images.
    """
    for name, value in scores.items():
        if not math.isfinite(value):
            raise NotFiniteError(
                f"the score {name} is {value}, so the run has failed and no score of it is kept: "
                "look at its images, and start anew with another evaluation.fid_extractor or seed"
            )
