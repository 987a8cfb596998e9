"""Records of MLflow: all that the folders of a sweep and of its trials say, told again at any time.

The tracker leaves out what MLflow has.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from core.config import Config, flatten
from core.record.early import ENDED_EARLY
from core.record.folder import Result, RunFolder
from sweep.config.sweep import SweepConfig
from sweep.results.table import (
    CARD,
    EPSILONS,
    Row,
    best,
    released_row,
    score_estimates,
    three_figures,
    winners,
)
from sweep.tracking.charts import (
    charts,
    compared_figures,
    compared_params,
    pictures,
    points,
    public_facts,
    shared_params,
)
from sweep.tracking.client import STATE, Tracker

_STATEMENT = "privacy.statement"
_SETTINGS = 50
"""Of so many settings the intervals fit into a tag."""


def last_step(folder: Path) -> int:
    """Step of the last point that a run's folder holds; -1 without any."""
    return _last(points(RunFolder(folder).reports()))


def _last(known: Iterable[tuple[str, int, float]]) -> int:
    return max((step for _, step, _ in known), default=-1)


def tell_trial(
    tracker: Tracker, sweep: SweepConfig, config: Config, folder: Path, status: str = ""
) -> None:
    """Logs what a trial is compared by, its data set, and all that its folder says.

    Args:
        status: with which the run ends, unless the folder holds a result; empty: the trial runs.
    """
    tracker.log_params(compared_params(sweep, config))
    tracker.log_dataset(config.dataset.name, public_facts(config))
    kept = RunFolder(folder)
    known = list(points(kept.reports()))
    tracker.log_points(known)
    if status and (result := kept.result()) is not None:
        _tell_result(tracker, sweep, kept, result)
        return
    # That of the last step may be half written.
    for picture in pictures(folder, _last(known) - 1, finished=False):
        tracker.log_picture(*picture)
    if status:
        tracker.finish(status)


def _tell_result(tracker: Tracker, sweep: SweepConfig, folder: RunFolder, result: Result) -> None:
    """Logs scores with their tags, plan and pictures of a trial that ended; ends its run."""
    stopped, step = result.is_stopped, result.report["step"]
    tracker.log_points((k, step, v) for k, v in compared_figures(sweep, result.report).items())
    tags = {f"privacy.{name}": tag for name, tag in result.tags.items()}
    tracker.log_tags({**tags, STATE: ENDED_EARLY if stopped else "finished"})
    for path in (folder.config_file, folder.plan_file):
        tracker.log_file(path)
    for path in (folder.grid, folder.central_grid, folder.frequency_grid):
        tracker.log_file(path, path.parent.name)
    for picture in pictures(folder.path, step, finished=not stopped):
        tracker.log_picture(*picture)
    tracker.finish("KILLED" if stopped else "FINISHED")


def tell_sweep(tracker: Tracker, sweep: SweepConfig, total: int) -> None:
    """Logs what is known before a sweep begins, and the charts in which to compare its trials."""
    space = {
        f"search_space.{key}": dimension.model_dump(exclude_defaults=True)
        for key, dimension in sweep.search_space.items()
    }
    secret = sweep.run.privacy.covers.is_secret
    search = {"num_trials": "secret" if secret else total, "objective": ", ".join(sweep.metrics)}
    tracker.log_params({**shared_params(sweep), **search, **space})
    tracker.log_tags({_STATEMENT: "not finished: nothing is claimed yet"})  # Until the summary.
    tracker.withdraw_figures(EPSILONS)  # That an earlier end of it stated.
    tracker.log_dataset(sweep.run.dataset.name, public_facts(sweep.run))
    tracker.log_charts(sweep.name, charts(sweep, tracker.run_id))
    tracker.log_file(sweep.folder / "sweep.json")


def tell_settings(tracker: Tracker, sweep: SweepConfig, rows: Sequence[Row]) -> None:
    """Logs mean and interval of the recommended setting, and in a tag those of others; nothing
    without replicates.

    Privacy: of a selection nothing, as it would tell of the trials that stay inside.
    """
    found = score_estimates(sweep, rows)
    if found is None or sweep.run.privacy.covers.is_secret:
        return
    first, shown = found.settings[0], found.settings[:_SETTINGS]
    tracker.log_figures({**found.figures(first), "score_noise": found.noise})
    means = "; ".join(f"{each.trial}: {found.interval(each)}" for each in shown)
    tracker.log_tags({"recommended_trial": first.trial, "setting_means": means})


def tell_summary(
    tracker: Tracker, sweep: SweepConfig, rows: Sequence[Row], card: Mapping[str, Any] | None
) -> None:
    """Logs the best trial, the three epsilons and the card; registers what may be published.

    Args:
        card: as `write_card` wrote it; None where there is nothing yet that it could claim.
    """
    if (winner := best(sweep, rows)) is None:
        return
    result, point = winner.folder.result(), flatten(winner.config)
    assert result is not None
    searched = {k: point[k] for k in sweep.search_space if isinstance(point[k], int | float)}
    tracker.log_figures({**searched, **compared_figures(sweep, result.report)})
    tracker.log_tags({"best_trial": ", ".join(row.trial for row in winners(sweep, rows))})
    tell_settings(tracker, sweep, rows)
    tracker.log_file(winner.folder.grid, "synthetic")
    released = released_row(sweep, rows)
    if card is None or released is None:
        return
    tracker.log_figures(three_figures(card))
    tracker.log_tags({_STATEMENT: card["statement"]})
    for path in ((card_file := sweep.folder / CARD).with_suffix(".json"), card_file):
        tracker.log_file(path)
    # Marked where the sweep is complete; its owner may have removed the model.
    if released.folder.selected.exists() and released.folder.model.exists():
        scope, statement = card["scope"], card["statement"]
        tracker.register_generator(released.trial, released.run_dir, scope, statement)
