"""Mean scores of settings that were tried more than once, and which of them noise tells apart.

Scores of one setting differ by noise alone. Its variance, taken as the same for every setting, is
estimated from all such differences together. Intervals are of 95 %: those of means by Student's
distribution, those of differences by the studentized range (Tukey 1949, Kramer 1956), so that all
differences hold together, whichever setting turned out best.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

Place = tuple[Any, ...]
"""Values of the searched keys."""
_LEVEL = 0.95
FIGURES = ("setting_mean", "setting_low", "setting_high", "setting_trials")
"""Mean score of a setting, both ends of its interval, and of how many trials they are."""


@dataclass(frozen=True)
class Setting:
    """Scores of the trials at one place; `trial` is the first of them."""

    place: Place
    trial: str
    scores: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Estimate of what the next trial scores."""
        return sum(self.scores) / len(self.scores)


@dataclass(frozen=True)
class Estimates:
    """All settings, the recommended one first.

    That is the best mean at the less favourable end of its interval, so that a setting with fewer
    trials needs a better one.

    Attributes:
        noise: standard deviation of a trial's score at one setting.
        degrees: of freedom of that estimate.
    """

    settings: tuple[Setting, ...]
    noise: float
    degrees: int

    def half_width(self, setting: Setting) -> float:
        """Half of the interval of a setting's mean."""
        return self.noise * _student(self.degrees) / math.sqrt(len(setting.scores))

    def half_width_between(self, one: Setting, other: Setting) -> float:
        """Half of the interval of a difference of two means."""
        factor = _studentized_range(max(2, len(self.settings)), self.degrees)
        return self.noise * factor * math.sqrt((1 / len(one.scores) + 1 / len(other.scores)) / 2)

    def at(self, place: Place) -> Setting:
        """The setting at a place."""
        return next(each for each in self.settings if each.place == place)

    def interval(self, setting: Setting) -> str:
        """Mean of a setting, with half of its interval."""
        return f"{setting.mean:.4g} +- {self.half_width(setting):.2g}"

    def figures(self, setting: Setting) -> dict[str, float]:
        """The same as numbers by the names of `FIGURES`."""
        half = self.half_width(setting)
        ends = (setting.mean - half, setting.mean + half)
        return dict(zip(FIGURES, (setting.mean, *ends, len(setting.scores)), strict=True))


def estimates(
    scores: Sequence[tuple[Place, str, float]], maximize: bool = True
) -> Estimates | None:
    """What replicates tell; None where there are none.

    Args:
        scores: place, name and score of each trial.
        maximize: whether more is better.
    """
    groups: dict[Place, list[tuple[str, float]]] = {}
    for place, trial, score in scores:
        groups.setdefault(place, []).append((trial, score))
    settings = [
        Setting(place, group[0][0], tuple(score for _, score in group))
        for place, group in groups.items()
    ]
    degrees = len(scores) - len(settings)
    if not degrees:
        return None
    squares = sum((score - each.mean) ** 2 for each in settings for score in each.scores)
    found = Estimates((), math.sqrt(squares / degrees), degrees)
    sign = 1 if maximize else -1
    settings.sort(key=lambda each: found.half_width(each) - sign * each.mean)
    return Estimates(tuple(settings), found.noise, degrees)


def sentences(found: Estimates, metric: str, preset: Place) -> list[str]:
    """The estimates in words; what an interval does not tell apart is called no effect.

    Args:
        metric: name of the score.
        preset: place of the settings to compare with.
    """
    first, others = found.settings[0], found.settings[1:]
    lines = [
        f"recommended setting: that of {first.trial} ({metric} {found.interval(first)}, the "
        f"mean of {len(first.scores)}); the best trial's score is partly luck",
        f"noise of one {metric}: {found.noise:.2g} (standard deviation, {found.degrees} degrees "
        "of freedom)",
    ]
    apart = [
        each for each in others
        if abs(first.mean - each.mean) > found.half_width_between(first, each)
    ]  # fmt: skip
    for each in others:
        if each.place == preset:
            told = "better than" if each in apart else "within noise of"
            difference, half = abs(first.mean - each.mean), found.half_width_between(first, each)
            lines.append(f"{told} the preset: by {difference:.2g} +- {half:.2g}")
    if others:
        lines.append(
            f"its differences to {len(others) - len(apart)} of {len(others)} other settings are "
            "within noise"
        )
    return lines


@lru_cache(maxsize=64)
def _student(degrees: int) -> float:
    from scipy import stats  # Slow to load.

    return float(stats.t.ppf((1 + _LEVEL) / 2, degrees))


@lru_cache(maxsize=64)
def _studentized_range(groups: int, degrees: int) -> float:
    from scipy import stats

    return float(stats.studentized_range.ppf(_LEVEL, groups, degrees))
