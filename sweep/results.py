"""What a sweep has to show: read from the trials' folders, printed as a table."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from core.config import DIRECTIONS, Config, flatten, load, load_yaml
from core.privacy.ledger import Ledger, ledger_path
from core.privacy.plan import PrivacyPlan, composed_epsilon
from sweep.config import SweepConfig


@dataclass(frozen=True)
class Row:
    """One trial.

    Attributes:
        state: `finished`, `failed` or `unfinished`.
        scores: metrics by name; empty unless finished.
        error: why it failed.
    """

    trial: str
    run_dir: Path
    config: Config
    state: str
    scores: dict[str, float]
    plan: PrivacyPlan
    seconds: float
    error: str


def load_rows(sweep: SweepConfig) -> list[Row]:
    """Every trial that has a folder, in the order in which they began."""
    folders = (sweep.folder / "trials").glob("*/")
    rows = [_row(folder) for folder in folders if (folder / "config.yaml").exists()]
    return sorted(rows, key=lambda row: (row.run_dir / "config.yaml").stat().st_mtime_ns)


def _row(folder: Path) -> Row:
    config = load(load_yaml(folder / "config.yaml"))
    plan = PrivacyPlan.restored(json.loads((folder / "privacy.json").read_text()))
    evaluation, error = folder / "evaluation.json", folder / "error.txt"
    result: dict[str, Any] = {}
    state, reason = "unfinished", ""
    if evaluation.exists():
        result, state = json.loads(evaluation.read_text()), "finished"
    elif error.exists():
        state, reason = "failed", error.read_text().strip()
    return Row(
        trial=folder.name,
        run_dir=folder,
        config=config,
        state=state,
        scores={name: result[name] for name in DIRECTIONS if name in result},
        plan=plan,
        seconds=float(result.get("seconds", 0.0)),
        error=reason,
    )


def best(sweep: SweepConfig, rows: list[Row]) -> Row | None:
    """The finished trial with the best objective."""
    metric = sweep.objective.metric
    finished = [row for row in rows if metric in row.scores]
    if not finished:
        return None
    sign = 1 if sweep.objective.direction == "maximize" else -1
    return max(finished, key=lambda row: sign * row.scores[metric])


def sweep_epsilon(rows: Sequence[Row]) -> float:
    """Epsilon of publishing everything that the trials computed, unfinished ones in full.

    Privacy: composition of the whole plan of each trial that began.
    """
    return composed_epsilon([row.plan for row in rows])


def print_results(sweep: SweepConfig, rows: list[Row], pruned: int, ui: str) -> None:
    """Prints the table, the best trial, the epsilons and where to look next."""
    winner = best(sweep, rows)
    metrics = [name for name in DIRECTIONS if any(name in row.scores for row in rows)]
    total = sweep_epsilon(rows)
    print(f"sweep {sweep.name}: {len(rows)} trials, {pruned} points pruned without compute")
    width = max(Console().width, _WIDTH)  # A narrow terminal wraps, rather than hides, figures.
    Console(width=width).print(results_table(sweep, rows, winner, metrics, total))
    for row in rows:
        if row.state == "failed":
            print(f"trial {row.trial} failed: {row.error}")
    if winner is None:
        return
    scores = ", ".join(f"{name} {winner.scores[name]:.4g}" for name in metrics)
    print(f"best trial: {winner.trial} ({scores}; scores are not private)")
    print(
        f"privacy: each trial alone is ({winner.plan.epsilon:.4g}, "
        f"{winner.config.privacy.target_delta:g})-differentially private. The choice among "
        f"{len(rows)} trials used their results and scores that are not private: the end-to-end "
        f"guarantee is not that epsilon but {total:.4g} by composition, and does not cover the "
        "scores."
    )
    spent = _data_set_epsilon(winner)
    print(f"all runs recorded on this data set: epsilon {spent:.4g} (python -m core ledger show)")
    print(f"samples: {winner.run_dir / 'synthetic' / 'grid.png'}")
    print(f"compare: {ui}")


def _data_set_epsilon(row: Row) -> float:
    result = json.loads((row.run_dir / "evaluation.json").read_text())
    path = ledger_path(Path(row.config.runtime.ledger), result["fingerprint"])
    return Ledger.at(path).summary()["epsilon_committed_and_reserved"]


def results_table(
    sweep: SweepConfig, rows: list[Row], winner: Row | None, metrics: list[str], total: float
) -> Table:
    """One line for each trial; the best one is starred."""
    table = Table(box=box.SIMPLE)
    columns = ["trial", "count", "noise", "split"]
    others = [k for k in sweep.search_space if k not in _SHOWN]
    columns += [key.rsplit(".", 1)[-1] for key in others]
    columns += ["DP-SGD noise", "eps trial", "eps sweep", *metrics, "seconds"]
    for name in columns:
        first = name == "trial"
        table.add_column(name, justify="left" if first else "right", no_wrap=first)
    for row in rows:
        flat = flatten(row.config)
        cells = [row.trial + (" *" if row is winner else "")]
        cells += [
            str(flat["central_images.per_class"]) if row.config.warm_up_steps else "-",
            f"{flat['central_images.noise_multiplier']:.3g}" if row.config.warm_up_steps else "-",
            f"{flat['stage_split']:.2f}",
        ]
        cells += [f"{flat[k]:.3g}" if isinstance(flat[k], float) else str(flat[k]) for k in others]
        cells += [f"{row.plan.noise_multiplier:.4f}", f"{row.plan.epsilon:.4g}", f"{total:.4g}"]
        cells += [
            f"{row.scores[m]:.4g}" if m in row.scores else row.state for m in metrics or ["state"]
        ][: len(metrics)]
        cells += [f"{row.seconds:.0f}" if row.seconds else row.state]
        table.add_row(*cells)
    return table


_WIDTH = 104
_SHOWN = ("central_images.per_class", "central_images.noise_multiplier", "stage_split")
