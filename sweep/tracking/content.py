"""What MLflow is told of a sweep and of its trials: before they begin, step by step, at their end.

Trackers are handed in: a `Tracker`, or an `Outbox` in its place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.config import Config, flatten
from core.record.early import ENDED_EARLY, STAGE
from core.record.folder import RunFolder
from sweep.config.sweep import SweepConfig
from sweep.results.table import (
    Row,
    best,
    released_row,
    stored_result,
    three_figures,
    winners,
    write_card,
)
from sweep.tracking.charts import (
    charts,
    compared_figures,
    compared_params,
    curves,
    pictures,
    public_facts,
    shared_params,
)


@dataclass(frozen=True)
class Place:
    """Where MLflow keeps a sweep: its experiment and the run that is the parent of its trials'."""

    sweep: str
    uri: str
    experiment_id: str
    parent_id: str

    def run_of(self, trial: str) -> tuple[str, str, str, str]:
        """Arguments of a trial's `Tracker` and of the `Outbox` in its place."""
        return self.uri, self.experiment_id, f"{self.sweep}/{trial}", self.parent_id


def record_start(tracker: Any, sweep: SweepConfig, config: Config) -> None:
    """Logs what is known before a trial begins: what it is compared by, and its data set."""
    tracker.log_params(compared_params(sweep, config))
    tracker.log_dataset(config.dataset.name, public_facts(config))


def record_step(tracker: Any, run_dir: Path, metrics: Mapping[str, Any], seen: set[Any]) -> None:
    """Logs a report of a trial: a point of its curves and the pictures that are new, or a score.

    Args:
        seen: pictures that were logged earlier; receives the new ones.
    """
    if metrics["stage"] == STAGE:
        score = {k: v for k, v in metrics.items() if k.startswith("early_")}
        tracker.log_once(metrics["step"], score)
        return
    use = {k: v for k, v in metrics.items() if k.startswith("system/")}
    tracker.log_step(metrics["step"], curves(metrics) | use)
    for picture in pictures(run_dir, metrics["step"], finished=False):
        if picture not in seen:
            seen.add(picture)
            tracker.log_picture(*picture)


def record_end(tracker: Any, sweep: SweepConfig, run_dir: Path, result: Mapping[str, Any]) -> None:
    """Logs what a trial that ended has, scores with their tags, plan, pictures; ends its run."""
    folder, ended = RunFolder(run_dir), RunFolder(run_dir).result()
    assert ended is not None
    tracker.log_missing_steps(folder.metrics)
    tracker.log_metrics(compared_figures(sweep, result), result["step"])
    stopped = result["stage"] == ENDED_EARLY
    state = {"sweep.state": ENDED_EARLY if stopped else "finished"}
    tracker.log_tags({f"privacy.{name}": tag for name, tag in ended.tags.items()} | state)
    for path in (folder.config_file, folder.plan_file):
        tracker.log_file(path)
    for path in (folder.grid, folder.central_grid, folder.frequency_grid):
        tracker.log_file(path, path.parent.name)
    for picture in pictures(run_dir, result["step"], finished=not stopped):
        tracker.log_picture(*picture)
    tracker.finish("KILLED" if stopped else "FINISHED")


def _sweep_params(sweep: SweepConfig, total: int) -> dict[str, Any]:
    space = {
        f"search_space.{key}": dimension.model_dump(exclude_defaults=True)
        for key, dimension in sweep.search_space.items()
    }
    secret = sweep.run.privacy.scope == "selection"
    trials = "secret" if secret else total
    return {"num_trials": trials, "objective": ", ".join(sweep.metrics), **space}


def record_sweep(parent: Any, run_id: str, sweep: SweepConfig, total: int) -> None:
    """Logs what is known before a sweep begins, and the charts in which to compare its trials."""
    parent.log_params({**shared_params(sweep), **_sweep_params(sweep, total)})
    parent.log_dataset(sweep.run.dataset.name, public_facts(sweep.run))
    parent.log_charts(sweep.name, charts(sweep, run_id))
    parent.log_file(sweep.folder / "sweep.json")


def record_summary(parent: Any, sweep: SweepConfig, rows: Sequence[Row], complete: bool) -> None:
    """Logs the best trial, the three epsilons and the card; registers what may be published.

    Privacy: before the final run, after a search on public data, there is no card, as there is
        nothing yet for it to be about.
    """
    if (winner := best(sweep, rows)) is None:
        return
    released = released_row(sweep, rows)
    # Written before MLflow is told anything, which may refuse it.
    card = write_card(sweep, rows, released, complete) if released is not None else None
    result, point = stored_result(winner), flatten(winner.config)
    searched = {k: point[k] for k in sweep.search_space if isinstance(point[k], int | float)}
    figures = compared_figures(sweep, result)
    parent.log_metrics({**searched, **figures})
    front = ", ".join(row.trial for row in winners(sweep, rows))
    parent.log_tags({"best_trial": front})
    parent.log_file(winner.folder.grid, "synthetic")
    if released is None or card is None:
        return
    parent.log_metrics(three_figures(card))
    parent.log_tags({"privacy.statement": card["statement"]})
    for name in ("privacy_card.json", "privacy_card.md"):
        parent.log_file(sweep.folder / name)
    if complete and released.folder.model.exists():  # Its owner may have removed it.
        scope, statement = card["scope"], card["statement"]
        parent.register_generator(released.trial, released.run_dir, scope, statement)
