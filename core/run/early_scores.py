"""Scores during training, on a small sample, by which a sweep may stop a trial early.

They draw from streams and generators of their own, so that the training is the same to the bit with
and without them.
"""

from collections.abc import Callable
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
from core.evaluation.scoring import require_finite
from core.generation.draw import generate
from core.io.terminal import Report
from core.privacy.keys import KeyedStream
from core.privacy.plan.plan import PrivacyPlan
from core.record.early import PROGRESS, STAGE, GoesOn, StoppedEarlyError
from core.record.folder import RunFolder


class EarlyScores:
    """Scores the model after the steps that the configuration names, and asks whether to go on.

    A score is kept before it is shown: a run that is resumed tells it again, unchanged.

    Args:
        score: of the averaged model; called on all ranks, gives all of them the same number, drawn
            for the point of the given place in the order.
        report, logged: both tell the supervisor; the second writes into the run's log, too.
        goes_on: see `GoesOn`.

    Privacy: the file holds scores of real images; the plan's tag says whether they are private.
    """

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        identity: str,
        score: Callable[[nn.Module, int], float],
        report: Report,
        logged: Report,
        goes_on: GoesOn,
    ) -> None:
        self._steps = config.early_steps
        self._name = config.early_metric
        self._folder = folder
        self._identity = identity
        self._score, self._report, self._logged, self._goes_on = score, report, logged, goes_on
        self._told: set[int] = set()
        self._resumed: int | None = None
        self._kept: dict[int, float] = distributed.on_rank_0(self._load) if self._steps else {}

    def __call__(self, step: int, model: nn.Module) -> None:
        """To be called on all ranks when `step` steps are done, also where a run is resumed.

        Raises:
            StoppedEarlyError: the run shall not go on.
            NotFiniteError: the score is NaN or infinite.
        """
        if self._resumed is None:
            self._resumed = step  # The log still holds what was told up to here.
        for place, (point, share) in enumerate(self._steps.items()):
            if point in self._told or point > step:
                continue
            self._told.add(point)
            known = point in self._kept
            if not known and point < step:
                continue  # Its model is gone.
            if not known:
                score = self._score(model, place)
                require_finite({self._name: score})
                self._kept[point] = score
                distributed.on_rank_0(self._store)
            tell = self._report if known and point <= self._resumed else self._logged
            tell({"step": point, "stage": STAGE, PROGRESS: share, **self.at(point)})
            if point == step and not distributed.on_rank_0(
                lambda share=share: self._goes_on(share)
            ):
                raise StoppedEarlyError(step)

    def at(self, step: int) -> dict[str, float]:
        """The score at a step by its name; a resumed run may have kept those of later steps."""
        return {self._name: self._kept[step]}

    def _load(self) -> dict[int, float]:
        kept = self._folder.early_scores(self._identity)
        return {point: kept[share] for point, share in self._steps.items() if share in kept}

    def _store(self) -> None:
        scores = {
            share: self._kept[point] for point, share in self._steps.items() if point in self._kept
        }
        self._folder.keep_early_scores(self._identity, self._name, scores)


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
