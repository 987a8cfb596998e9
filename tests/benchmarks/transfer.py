"""Whether ranks of settings transfer from one epsilon to another: `make transfer DATA=folder`.

Trains every setting at every epsilon with several seeds, around the small preset that starts from
moments, and correlates the ranks of the settings' mean scores between epsilons. Finished trials
stay in `runs/transfer.json` and are not run again; a stopped command goes on. Prints Markdown.

Settings that differ in the stage split alone would share a release, and each sweep draws its own.
So a sweep has one stage split, one epsilon and one seed, and no two scores share any noise.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cells import Cell, command, make_cell, parsed, run_cells
from rows import Row, Rows, effect, half_width

EPSILONS = (0.6, 1.0, 10.0)
"""0.6 is what a tuning trial of scope `tune_then_train` spends."""
PRESET = 10.0
"""Epsilon of the preset around which all settings lie, at every epsilon."""
SETTINGS: dict[str, tuple[Any, ...]] = {
    "central_images.num_clusters": (1, 5, 20),
    "central_images.noise_multiplier": (8.0, 14.0, 24.0),
    "stage_split": (0.0, 0.4),
}
"""All combinations, which even the smallest epsilon can pay. Each key needs six lines or more, on
which the other keys stay the same: Student's interval over fewer finds effects where none are."""
APART = "stage_split"
"""One sweep for each of its values."""
SCORES = ("accuracy", "fid_cnn")
SIZE = 0.25
RESAMPLES = 10_000


def cells_of(options: argparse.Namespace) -> Iterator[Cell]:
    """Every sweep: all epsilons of the first seed before the second seed."""
    searched = {key: {"choices": [*v]} for key, v in SETTINGS.items() if key != APART}
    search = {"sampler": "grid", "search_space": searched, "objective": SCORES[0]}
    for seed, epsilon, apart in itertools.product(options.seeds, EPSILONS, SETTINGS[APART]):
        names = {"epsilon": epsilon, APART: apart, "seed": seed}
        fixed = {"privacy.target_epsilon": epsilon, APART: apart, "seed": seed}
        yield make_cell(options, names, search, fixed, PRESET, each_trial=True)


def correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation (1904) along the last axis; nan where one side is constant."""
    ranks = (rankdata(each, axis=-1) for each in (x, y))
    a, b = (each - each.mean(-1, keepdims=True) for each in ranks)
    scale = np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
    return np.divide((a * b).sum(-1), scale, out=np.full(scale.shape, np.nan), where=scale > 0)


def over_settings(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """The correlation over all settings, with the 95 % interval of resampled ones (Efron 1979).

    Args:
        x, y: mean scores of the settings at two epsilons; any shape.
    """
    x, y = x.ravel(), y.ravel()
    drawn = np.random.default_rng(0).integers(len(x), size=(RESAMPLES, len(x)))
    low, high = np.nanquantile(correlation(x[drawn], y[drawn]), (0.025, 0.975))
    return float(correlation(x, y)), float(low), float(high)


def along_key(x: np.ndarray, y: np.ndarray, axis: int) -> tuple[float, float, float]:
    """The correlation along one key: its mean over the lines on which the other keys stay the same.

    The marginal means of two or three values would have a correlation of 1 or -1 by chance. The
    interval is Student's, of 95 %, over the lines, which share no trial. A line without ranks, as
    all of its scores are equal, does not count.

    Args:
        x, y: mean scores, with an axis for each key.
        axis: of the key.
    """
    lines = correlation(np.moveaxis(x, axis, -1), np.moveaxis(y, axis, -1)).ravel()
    values = [float(each) for each in lines if not np.isnan(each)]
    if not values:
        return np.nan, np.nan, np.nan
    mean, half = statistics.fmean(values), half_width(values)
    half = np.inf if half is None else half
    return mean, max(-1.0, mean - half), min(1.0, mean + half)


def agreement_of_seeds(scores: np.ndarray) -> float:
    """Mean correlation, at one epsilon, of a seed's scores with the means of the others.

    Between epsilons no more can be expected: noise alone keeps ranks from agreeing better.

    Args:
        scores: with the seeds along the first axis.
    """
    flat = scores.reshape(len(scores), -1)
    others = (flat.sum(0) - flat) / (len(flat) - 1)
    return float(correlation(flat, others).mean())


def scores_of(kept: Rows, cells: list[Cell], score: str) -> tuple[list[int], np.ndarray]:
    """The seeds with which every trial has finished, and their scores.

    Returns:
        Scores of shape [epsilons, seeds, values of the first key, of the second, ...].
    """
    asked = [row for cell in cells for row in cell.asked]
    found: dict[tuple[Any, ...], Row | None] = {
        (row["epsilon"], row["seed"], *(row[key] for key in SETTINGS)): kept.find(row)
        for row in asked
    }
    lacking = {place[1] for place, row in found.items() if row is None}
    seeds = [each for each in dict.fromkeys(row["seed"] for row in asked) if each not in lacking]
    values = [
        row[score]
        for place in itertools.product(EPSILONS, seeds, *SETTINGS.values())
        if (row := found[place]) is not None
    ]
    sizes = [len(each) for each in SETTINGS.values()]
    return seeds, np.array(values).reshape(len(EPSILONS), len(seeds), *sizes)


def told(found: tuple[float, float, float]) -> str:
    """A correlation with its interval; where that holds zero, there is no effect."""
    mean, low, high = found
    if np.isnan(mean):
        return "no ranks"
    return f"{mean:.2f} ({low:.2f} to {high:.2f}){effect(low, high)}"


def table(kept: Rows, cells: list[Cell]) -> str:
    """The correlations as Markdown, a line for each score and key."""
    pairs = [*itertools.combinations(range(len(EPSILONS)), 2)]
    heads = [f"epsilon {EPSILONS[a]:g} and {EPSILONS[b]:g}" for a, b in pairs]
    lines = [f"| score | ranks of | {' | '.join(heads)} |", f"|{' --- |' * (2 + len(pairs))}"]
    ceilings: list[str] = []
    seeds: list[int] = []
    for score in SCORES:
        seeds, scores = scores_of(kept, cells, score)
        if not seeds:
            return "No seed has all its trials: the same command goes on."
        means = scores.mean(1)
        found = [over_settings(means[a], means[b]) for a, b in pairs]
        lines.append(f"| {score} | all settings | {' | '.join(map(told, found))} |")
        for axis, key in enumerate(SETTINGS):
            found = [along_key(means[a], means[b], axis) for a, b in pairs]
            lines.append(f"| {score} | `{key}` | {' | '.join(map(told, found))} |")
        if len(seeds) > 1:
            each = zip(EPSILONS, map(agreement_of_seeds, scores), strict=True)
            text = ", ".join(f"{value:.2f} at {epsilon:g}" for epsilon, value in each)
            ceilings.append(f"{score} {text}")
    settings = np.prod([len(each) for each in SETTINGS.values()])
    lines += ["", f"{cells[0].asked[0]['dataset']}, {settings} settings, seeds {seeds}."]
    if ceilings:
        of = "One seed with the mean of the others at the same epsilon"
        lines.append(f"{of}: {'; '.join(ceilings)}.")
    return "\n".join(lines)


def main() -> int:
    """Runs what is missing, and prints all; returns 3 where something is left."""
    options = parsed(__doc__, "transfer.json", SIZE)
    kept, cells = Rows(options.out), [*cells_of(options)]
    whole = run_cells(cells, kept, options.end)
    print(f"`{command(options, 'transfer')}`\n\n{table(kept, cells)}")
    return 0 if whole else 3


if __name__ == "__main__":
    sys.exit(main())
