"""Findings of the search: which parameter mattered, and which points no budget can pay."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
RESAMPLES = 100
"""Of the settings, for intervals."""
_LEVEL = 0.95
_FOREST = {"n_trees": 64}
_SMALL_FOREST = {"n_trees": 16, "max_depth": 4}
"""For a resample: its trees differ more, so the intervals are wider rather than too narrow."""
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


@dataclass(frozen=True)
class Importance:
    """Of one parameter.

    Attributes:
        share: of the objective's variance.
        low, high: interval of what the share exceeds that of shuffled scores by.
    """

    share: float
    low: float
    high: float

    @property
    def is_effect(self) -> bool:
        """Whether the interval excludes zero; no share is ever below what chance gives."""
        return self.low > 0


def importance(sweep: SweepConfig, rows: Sequence[Row]) -> dict[str, Importance] | str:
    """Share of the objective's variance by key (fANOVA, Hutter et al. 2014), or why not.

    A forest gives every key some share, whatever the scores are. So the intervals are of the
    difference to the share after the scores were shuffled among the settings: 95 % of those that
    resampled settings give (bootstrap, Efron 1979), with all trials of a setting together.

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
    settings: dict[tuple[Any, ...], list[float]] = {}
    for row in scored:
        values = flatten(row.config)
        settings.setdefault(tuple(values[key] for key in space), []).append(row.scores[metric])
    places, scores = list(settings), list(settings.values())
    shares = _shares(space, places, scores, _FOREST)
    rng, line, excess = np.random.default_rng(0), ProgressLine(), list[list[float]]()
    for number in range(RESAMPLES):
        line.show(f"what each parameter explains: {number}/{RESAMPLES}")
        drawn, shuffled = rng.integers(len(places), size=len(places)), rng.permutation(len(places))
        at = [places[i] for i in drawn]
        real = _shares(space, at, [scores[i] for i in drawn], _SMALL_FOREST)
        chance = _shares(space, at, [scores[shuffled[i]] for i in drawn], _SMALL_FOREST)
        excess.append([real[key] - chance[key] for key in shares])
    low, high = np.quantile(excess, ((1 - _LEVEL) / 2, (1 + _LEVEL) / 2), axis=0)
    return {
        key: Importance(share, float(low[i]), float(high[i]))
        for i, (key, share) in enumerate(shares.items())
    }


def _shares(
    space: Mapping[str, optuna.distributions.BaseDistribution],
    places: Sequence[tuple[Any, ...]],
    scores: Sequence[Sequence[float]],
    forest: Mapping[str, int],
) -> dict[str, float]:
    """Of each key, the largest first; 0 where every tree saw equal scores.

    Args:
        places: values of the keys of each setting.
        scores: of the trials of each setting.
    """
    study = optuna.create_study()
    study.add_trials(
        [
            optuna.trial.create_trial(
                params=dict(zip(space, place, strict=True)), distributions=dict(space), value=score
            )
            for place, each in zip(places, scores, strict=True)
            for score in each
        ]
    )
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0, **forest)
    try:
        return optuna.importance.get_param_importances(study, evaluator=evaluator)
    except RuntimeError:  # The total variance is zero.
        return dict.fromkeys(space, 0.0)


def told_of_importance(found: Mapping[str, Importance], metric: str) -> list[str]:
    """The intervals in words: an effect is what its interval excludes from zero, nothing else."""
    lines = [
        f"{key} has an effect on {metric}: {each.share:.0%} of its variance, {100 * each.low:.0f} "
        f"to {100 * each.high:.0f} points more than by chance."
        for key, each in found.items()
        if each.is_effect
    ]
    if rest := [key for key, each in found.items() if not each.is_effect]:
        lines.append(f"Not told from chance: {', '.join(rest)}.")
    return lines


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
