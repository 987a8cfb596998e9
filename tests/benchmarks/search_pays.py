"""Whether a private search pays at one end-to-end epsilon: `make search-pays DATA=folder`.

Beside the preset alone stands what two searches release that spend the same epsilon in all: the
best of a secret number of trials, and the run after tuning trials. Both choose by the private
`dp_accuracy`. Finished sweeps stay in `runs/search_pays.json` and are not run again; a stopped
command goes on. Prints Markdown, and draws it beside the file of rows.

Scores on the real test set are computed for the table and chose nothing. The hours of scope
`selection` tell of its secret number of trials, which is harmless on public data alone.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scipy.stats import ttest_ind

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cells import Cell, command, make_cell, parsed, run_cells
from rows import Row, Rows, cell, effect, half_width

from sweep.config.sweep import SweepConfig
from sweep.costs.usage import read_usage
from sweep.results.table import claimed_row, load_rows

EPSILONS = (10.0, 1.0)
NUM_TRIALS = 16
"""Of tuning trials; the mean of the secret number."""
NOISE = {10.0: (3.0, 40.0), 1.0: (8.0, 80.0)}
"""Searched noise multipliers; points that a scope cannot pay are never trained."""
SPACE: dict[str, dict[str, Any]] = {
    "central_images.num_clusters": {"low": 1, "high": 20, "log": True},
    "stage_split": {"low": 0.0, "high": 0.5},
}
TUNING_EPSILON = {10.0: 0.6, 1.0: 0.15}
PRIVATE_SCORE = {"privacy.dp_accuracy_stddev": 200.0}
"""Images of 60,000: a third of a per cent, which costs next to nothing."""
PRESET, SELECTION, TUNED = "preset", "selection", "tune_then_train"
WAYS = (PRESET, SELECTION, TUNED)
SCORES = {"accuracy": (100, 1, "accuracy, %"), "fid_cnn": (1, 1, "fid_cnn")}
"""Factor, decimals and title of each."""


def cells_of(options: argparse.Namespace) -> Iterator[Cell]:
    """Every sweep: all ways at all epsilons with the first seed before the second seed."""
    for seed, epsilon, way in itertools.product(options.seeds, EPSILONS, WAYS):
        fixed: Row = {"privacy.target_epsilon": epsilon}
        low, high = NOISE[epsilon]
        noise = {"central_images.noise_multiplier": {"low": low, "high": high, "log": True}}
        search: Row = {"search_space": SPACE | noise, "objective": "dp_accuracy"}
        if way == PRESET:
            search = {"search_space": {"seed": {"choices": [seed]}}, "num_trials": 1}
        elif way == SELECTION:  # Which draws the seeds, and how many trials there are.
            fixed |= {"privacy.scope": way, "privacy.selection_mean": NUM_TRIALS, **PRIVATE_SCORE}
            search |= {"sampler": "random"}
        else:
            tuning = {"privacy.tuning_epsilon": TUNING_EPSILON[epsilon]}
            fixed |= {"privacy.scope": way, "seed": seed, **tuning, **PRIVATE_SCORE}
            search |= {"sampler": "tpe", "num_trials": NUM_TRIALS, "search_seed": seed}
        names = {"epsilon": epsilon, "way": way, "repeat": seed}
        yield make_cell(options, names, search, fixed, epsilon)


def figures_of(sweep: SweepConfig) -> Row:
    """Scores of what a complete sweep releases, and the hours of all its trials."""
    released, reason = claimed_row(sweep, load_rows(sweep))
    if released is None:
        raise SystemExit(f"{sweep.folder}: {reason}")
    scores = {name: released.scores[name] for name in SCORES}
    return scores | {"seconds": read_usage(sweep.folder).device_seconds}


def difference(mine: list[float], preset: list[float], scale: float, digits: int) -> str:
    """The difference of two means with its 95 % interval (Welch 1947); no effect if that holds 0.

    Empty where one side has a single value.
    """
    if min(len(mine), len(preset)) < 2:
        return ""
    low, high = ttest_ind(mine, preset, equal_var=False).confidence_interval(0.95)
    mean = sum(mine) / len(mine) - sum(preset) / len(preset)
    low, high = scale * low, scale * high
    return (
        f"{scale * mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f}){effect(low, high)}"
    )


def groups_of(kept: Rows, cells: list[Cell]) -> dict[tuple[float, str], list[Row]]:
    """Finished rows by epsilon and way."""
    groups: dict[tuple[float, str], list[Row]] = {}
    for asked in (row for each in cells for row in each.asked):
        if (row := kept.find(asked)) is not None:
            groups.setdefault((row["epsilon"], row["way"]), []).append(row)
    return groups


def table(groups: dict[tuple[float, str], list[Row]]) -> str:
    """Means and intervals over the repeats as Markdown, a line for each epsilon and way."""
    titles = [text for *_, title in SCORES.values() for text in (title, "to the preset")]
    heads = ["epsilon in all", "way", *titles, "core hours", "repeats"]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for (epsilon, way), mine in groups.items():
        cells = [f"{epsilon:g}", way]
        for name, (scale, digits, _) in SCORES.items():
            values = [row[name] for row in mine]
            preset = [row[name] for row in groups.get((epsilon, PRESET), [])]
            to_preset = "" if way == PRESET else difference(values, preset, scale, digits)
            cells += [cell(values, scale, digits), to_preset]
        cells += [cell([row["seconds"] for row in mine], 1 / 3600, 1), str(len(mine))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(groups: dict[tuple[float, str], list[Row]], path: Path) -> None:
    """The same as a picture: means with their intervals, and every repeat as a point."""
    from matplotlib.figure import Figure  # It comes with MLflow, and is slow to load.

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, len(SCORES), squeeze=False)[0]
    for panel, (name, (scale, _, title)) in zip(panels, SCORES.items(), strict=True):
        for number, epsilon in enumerate(EPSILONS):
            colour = f"C{number}"
            for place, way in enumerate(WAYS):
                values = [scale * row[name] for row in groups.get((epsilon, way), [])]
                if not values:
                    continue
                x = place + 0.2 * (number - (len(EPSILONS) - 1) / 2)
                mean, half = sum(values) / len(values), half_width(values) or 0.0
                panel.errorbar(x, mean, half, fmt="o", color=colour, capsize=4)
                panel.plot([x + 0.05] * len(values), values, ".", color=colour, alpha=0.5)
            panel.plot([], [], "o", color=colour, label=f"epsilon {epsilon:g} in all")
        panel.set_xticks(range(len(WAYS)), WAYS)
        panel.set_ylabel(title)
        panel.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> int:
    """Runs what is missing, prints and draws all; returns 3 where something is left."""
    options = parsed(__doc__, "search_pays.json", 1.0)
    kept, cells = Rows(options.out), [*cells_of(options)]
    whole = run_cells(cells, kept, options.end, figures_of)
    groups = groups_of(kept, cells)
    draw(groups, picture := options.out.with_suffix(".png"))
    print(f"`{command(options, 'search-pays')}`, {options.dataset}\n\n{table(groups)}\n")
    print(f"![means and intervals of the table]({picture.name})")
    return 0 if whole else 3


if __name__ == "__main__":
    sys.exit(main())
