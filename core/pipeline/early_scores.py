"""Scores during training, on a small sample, by which a sweep may stop a trial early.

They draw from streams and generators of their own, so that the training is the same to the bit with
and without them.
"""

from pathlib import Path

from core import distributed
from core.data import Dataset, Split
from core.evaluation.metrics import (
    distribution_metrics,
    downstream_accuracy,
    downstream_classifier,
    dp_accuracy,
)
from core.evaluation.scoring import require_finite
from core.generation.draw import generate
from core.pipeline.context import Run
from core.record.early import PROGRESS, STAGE, StoppedEarlyError
from core.training.loop import Model


class EarlyScores:
    """Scores the model after the steps that the configuration names, and asks whether to go on.

    A score is kept before it is shown: a run that is resumed tells it again, unchanged.

    Privacy: the file holds scores of real images; the plan's tag says whether they are private.
    """

    def __init__(self, run: Run, model: Model, dataset: Dataset) -> None:
        self._run, self._model, self._dataset = run, model, dataset
        self._steps, self._name = run.config.early_steps, run.config.early_metric
        self._told: set[int] = set()
        self._resumed: int | None = None
        self._kept: dict[int, float] = distributed.on_rank_0(self._load) if self._steps else {}

    def __call__(self, step: int) -> None:
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
                score = self._score(place)
                require_finite({self._name: score})
                self._kept[point] = score
                distributed.on_rank_0(self._store)
            report, scores = self._run.report, {self._name: self._kept[point]}
            tell = report.tell if known and point <= self._resumed else report
            tell({"step": point, "stage": STAGE, PROGRESS: share, **scores})
            if point == step and not distributed.on_rank_0(
                lambda share=share: self._run.link.should_continue(share)
            ):
                raise StoppedEarlyError(step, scores)

    def _load(self) -> dict[int, float]:
        kept = self._run.folder.early_scores(self._run.identity.run)
        return {point: kept[share] for point, share in self._steps.items() if share in kept}

    def _store(self) -> None:
        steps, kept = self._steps.items(), self._kept
        scores = {share: kept[point] for point, share in steps if point in kept}
        self._run.folder.keep_early_scores(self._run.identity.run, self._name, scores)
        self._run.link.keep()

    def _score(self, place: int) -> float:
        """The score of a small sample by `early_scores.metric`, the same on all ranks.

        Args:
            place: of the point among all.

        Privacy: computed from real images; `plan.tag(plan.early_metric)` says whether it is
            private.
        """
        config, averaged = self._run.config, self._model.ema.module
        number = config.early_scores.num_images
        synthetic = generate(averaged, config, number, self._run.device)
        return distributed.on_rank_0(lambda: self._score_of(synthetic, place))

    def _score_of(self, synthetic: Split, place: int) -> float:
        """Accuracies are those of the first of `evaluation.classifiers`, trained once."""
        config, settings = self._run.config, self._run.config.evaluation
        device, num_classes = self._run.device, config.dataset.num_classes
        metric = config.early_scores.metric
        if metric not in ("accuracy", "dp_accuracy"):
            cache = Path(config.runtime.cache)
            values, _ = distribution_metrics(
                synthetic, self._dataset, settings, num_classes, device, cache
            )
            return values[config.early_metric.removeprefix("early_")]
        network = settings.classifiers[0]
        classifier = downstream_classifier(synthetic, settings, num_classes, device, network)
        if metric == "accuracy":
            return downstream_accuracy(classifier, synthetic, self._dataset, settings)
        plan, noise = self._run.plan.score, self._run.stream("evaluation", "noise")
        assert plan is not None
        return dp_accuracy(classifier, self._dataset, settings, plan, noise, place + 1)
