"""Scores during training, on a small sample, by which a sweep may stop a trial early.

They draw from streams and generators of their own, so that the training is the same to the bit with
and without them.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from core import distributed
from core.config import Config
from core.reporting import Report, write_json

FILE = "early_scores.json"
STAGE = "early_score"
"""What a report of such a score has as its stage."""
STOPPED, ENDED_EARLY = "stopped.json", "stopped"
"""What a run that was stopped leaves in place of an evaluation, and its last report's stage."""
PROGRESS = "progress"
"""Share of all steps: the logical time of such a report."""
GoesOn = Callable[[float], bool]
"""Asked on rank 0 with the share of the steps that are done: whether the run shall go on."""


class StoppedEarlyError(Exception):
    """The run was asked to stop; raised on all ranks after the same step."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step


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
        run_dir: Path,
        identity: str,
        score: Callable[[nn.Module, int], float],
        report: Report,
        logged: Report,
        goes_on: GoesOn,
    ) -> None:
        self._steps = config.early_steps
        self._name = config.early_metric
        self._path = run_dir / FILE
        self._identity = identity
        self._score, self._report, self._logged, self._goes_on = score, report, logged, goes_on
        self._told: set[int] = set()
        self._resumed: int | None = None
        self._kept: dict[int, float] = distributed.on_rank_0(self._load) if self._steps else {}

    def __call__(self, step: int, model: nn.Module) -> None:
        """To be called on all ranks when `step` steps are done, also where a run is resumed.

        Raises:
            StoppedEarlyError: the run shall not go on.
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
                self._kept[point] = self._score(model, place)
                distributed.on_rank_0(self._store)
            tell = self._report if known and point <= self._resumed else self._logged
            score = {self._name: self._kept[point]}
            tell({"step": point, "stage": STAGE, PROGRESS: share, **score})
            if point == step and not distributed.on_rank_0(
                lambda share=share: self._goes_on(share)
            ):
                raise StoppedEarlyError(step)

    def last(self) -> dict[str, float]:
        """The last score by its name."""
        return {self._name: self._kept[max(self._kept)]}

    def _load(self) -> dict[int, float]:
        kept = json.loads(self._path.read_text()) if self._path.exists() else {}
        if kept.get("identity") != self._identity:
            return {}
        return {
            point: kept["scores"][share]
            for share, point in self._shares()
            if share in kept["scores"]
        }

    def _store(self) -> None:
        scores = {
            share: self._kept[point] for share, point in self._shares() if point in self._kept
        }
        content = {"identity": self._identity, "metric": self._name, "scores": scores}
        write_json(self._path, content)

    def _shares(self) -> list[tuple[str, int]]:
        return [(str(share), point) for point, share in self._steps.items()]


def stored_scores(run_dir: Path) -> dict[float, float]:
    """Early scores of a run by the share of the steps, in their order."""
    path = run_dir / FILE
    kept: dict[str, Any] = json.loads(path.read_text())["scores"] if path.exists() else {}
    return {float(share): value for share, value in kept.items()}
