"""What each method gives in a given time, beside the cheapest: `make methods DATA=folder`.

Trains every method on MNIST or Fashion-MNIST with the settings of its small preset, at one epsilon,
with shorter and longer trainings and several seeds, and scores 8,000 images by the small CNN. Rows
that are finished stay in `runs/methods.json` and are not run again; a stopped one goes on from its
checkpoint. Prints means with 95 % intervals of Student's t over the seeds as a Markdown table.

Masks, noise and classifier are others with each seed. Minutes are those of training, sampling and
scoring on this machine, without decoding: run nothing beside it where they shall be compared.
"""

import argparse
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rows import ROOT, Row, Rows, add_options, cell, digest_of, settings_of

from core.config import Config, load
from core.pipeline.single import run
from core.privacy.plan.plan import make_plan

CONFIGS = ROOT / "core/configs"
STARTED = "dp_feta from moments"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "moments": ("moments_small", {"method": "moments"}),
    "dp_merf": ("small", {"method": "dp_merf"}),
    "dpdm": ("small", {"method": "dpdm"}),
    "dp_feta from mean images": ("small", {}),
    STARTED: ("moments_small", {}),
}
"""Preset, after the name of the data set, and changes to it."""
UNTRAINED = ("moments", "dp_merf")
FIGURES = ("accuracy", "fid_cnn", "precision_cnn", "recall_cnn")


def config_of(
    dataset: str, epsilon: float, method: str, size: float, settings: dict[str, Any]
) -> Config:
    """A row's configuration.

    Args:
        size: number of steps, in those of the preset.
    """
    preset, changes = METHODS[method]
    names = [f"{dataset}_{preset}_epsilon_{epsilon:g}.yaml", f"{dataset}_{preset}.yaml"]
    path = next(CONFIGS / name for name in names if (CONFIGS / name).exists())
    settings = {"privacy.target_epsilon": epsilon, **changes, **settings}
    steps = load(path, settings).training.num_steps
    return load(path, {**settings, "training.num_steps": max(1, round(size * steps))})


def rows_of(options: argparse.Namespace, settings: dict[str, Any]) -> Iterator[tuple[Row, Config]]:
    """What names each row, and its configuration: every method once before the second seed."""
    for seed in options.seeds:
        for epsilon in options.epsilon:
            for size in options.sizes:
                for method in options.methods:
                    if method in UNTRAINED and size != options.sizes[0]:
                        continue
                    named = {"dataset": options.dataset, "epsilon": epsilon, "method": method}
                    config = config_of(
                        options.dataset, epsilon, method, size, {**settings, "seed": seed}
                    )
                    named |= {"size": size, "seed": seed, "digest": digest_of(config)}
                    yield named, config


def table(rows: Iterable[Row]) -> str:
    """Means and intervals over seeds, as Markdown; a line for each method and size."""
    lines = [
        "| data set | epsilon | method | DP-SGD steps | minutes | accuracy, % | fid_cnn "
        "| precision_cnn | recall_cnn | seeds |",
        f"|{' --- |' * 10}",
    ]
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = (row["dataset"], row["epsilon"], row["method"], row["steps"])
        groups.setdefault(key, []).append(row)
    for (dataset, epsilon, method, steps), mine in sorted(groups.items()):
        parts = [
            cell([row[name] for row in mine], *form)
            for name, form in zip(
                ("seconds", *FIGURES),
                ((1 / 60, 1), (100, 1), (1, 1), (1, 2), (1, 2)),
                strict=True,
            )
        ]
        parts[0] = parts[0].split(" ")[0]  # Of minutes, no interval.
        cells = (dataset, f"{epsilon:g}", method, str(steps), *parts, str(len(mine)))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Runs what is missing, and prints all."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, "methods.json")
    parser.add_argument("--epsilon", type=float, nargs="+", default=[10.0, 1.0])
    parser.add_argument("--sizes", type=float, nargs="+", default=[1.0], help="of the training")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--budget", type=float, help="minutes after which no row is begun")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = options.out.with_suffix("")
    settings = settings_of(options)
    kept, shown, began = Rows(options.out), [], time.monotonic()
    for named, config in rows_of(options, settings):
        row = kept.find(named)
        over = options.budget is not None and time.monotonic() - began > 60 * options.budget
        if row is None and not over:
            print(named, file=sys.stderr, flush=True)
            result = run(config, folder / named["digest"]).report
            plan = make_plan(config)
            row = named | {
                "steps": plan.dp_sgd.num_steps,
                "seconds": result["seconds"],
                **{name: result[name] for name in FIGURES},
            }
            kept.add(row)
        shown += [row] if row else []
    print(table(shown))


if __name__ == "__main__":
    main()
