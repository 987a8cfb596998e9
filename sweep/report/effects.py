"""Findings of the search: which parameter mattered, and which points no budget can pay."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import optuna

from core.config import Config, flatten, load, nested
from core.config.keys import NOISE
from core.errors import ConfigError, InfeasibleError
from core.io.terminal import ProgressLine
from core.privacy.plan.plan import check_feasible
from sweep.config.dimension import Dimension
from sweep.config.sweep import SweepConfig
from sweep.results.table import Row, scored_rows
from sweep.search.study import distributions

MIN_TRIALS = 10
"""Below, a forest over three parameters explains chance."""
_COUNTS = 5
"""Where the edge is located; between them it is almost straight on logarithmic axes."""
_TOLERANCE = 1.06
"""Factor to which the least affordable noise is located; finer cannot be seen on a plot."""


@dataclass(frozen=True)
class Boundary:
    """The least noise multiplier that the budget can pay, for some counts of central images.

    Attributes:
        noises: by count; None where even the largest of the space cannot be paid.
        low: the least noise multiplier of the space.
    """

    counts: list[int]
    noises: list[float | None]
    low: float

    @property
    def excludes_something(self) -> bool:
        """Whether any point of the space cannot be paid."""
        return any(noise is None or noise > self.low for noise in self.noises)


def importance(sweep: SweepConfig, rows: Sequence[Row]) -> dict[str, float] | str:
    """Share of the objective's variance by key (fANOVA, Hutter et al. 2014), or why not.

    Args:
        rows: any; those of the search that have finished count.
    """
    metric, scored = sweep.objective.metric, scored_rows(sweep, rows)
    if len(scored) < MIN_TRIALS:
        return (
            f"Importance needs at least {MIN_TRIALS} finished trials to tell it from chance; this "
            f"sweep has {len(scored)}. Raise num_trials and start the same sweep again."
        )
    if len({row.scores[metric] for row in scored}) == 1:
        return f"All trials have the same {metric}: nothing to explain."
    space = distributions(sweep)
    study = optuna.create_study(direction=sweep.objective.direction)
    for row in scored:
        values = flatten(row.config)
        study.add_trial(
            optuna.trial.create_trial(
                params={key: values[key] for key in space},
                distributions=space,
                value=row.scores[metric],
            )
        )
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return optuna.importance.get_param_importances(study, evaluator=evaluator)


def affordable(sweep: SweepConfig, around: Config) -> Boundary | None:
    """The edge of what can be paid over count x noise, all else as in `around`.

    None where the two are not searched over intervals. Takes some seconds; reads no data.
    """
    intervals = [_interval(sweep.search_space.get(key)) for key in (sweep.count_key, NOISE)]
    if None in intervals:
        return None
    (fewest, most), (low, high) = (each for each in intervals if each)
    counts = sorted({round(value) for value in np.geomspace(fewest, most, _COUNTS)})
    noises: list[float | None] = []
    progress = ProgressLine()
    least = low
    for number, each in enumerate(counts):
        progress.show(f"what the budget can pay: {number}/{len(counts)}")
        found = None
        if None not in noises:
            found = _least_noise(load(nested(around), {sweep.count_key: each}), least, high)
        noises.append(found)
        least = found or least  # More images never need less noise.
    return Boundary(counts, noises, low)


def _least_noise(config: Config, low: float, high: float) -> float | None:
    """Bisection in the logarithm, from above, as accounting for little noise takes long."""

    def pays(noise: float) -> bool:
        try:
            check_feasible(load(nested(config), {NOISE: noise}))
        except (InfeasibleError, ConfigError):
            return False
        return True

    if not pays(high):
        return None
    lowest = low
    while high / low > _TOLERANCE:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if pays(middle) else (middle, high)
    return lowest if low == lowest else high


def _interval(dimension: Dimension | None) -> tuple[float, float] | None:
    if dimension is None or dimension.low is None or dimension.high is None:
        return None
    return float(dimension.low), float(dimension.high)
