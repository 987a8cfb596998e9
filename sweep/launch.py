"""Runs the search on a Ray cluster: what is missing of a sweep, and its final run."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from core.config import flatten
from core.early import ENDED_EARLY
from core.privacy.keys import MasterSecret
from core.reporting import log_to
from sweep.claim import claim, driver_lock, release_id
from sweep.cluster import (
    DRIVER_RESOURCE,
    check_storage,
    join_cluster,
    max_concurrent,
    node_resources,
    wait_for_room,
)
from sweep.comparison import charts, compared_figures, public_facts, shared_params
from sweep.config import SweepConfig
from sweep.feasibility import with_num_trials
from sweep.limits import Meter
from sweep.progress import Progress
from sweep.results import (
    Row,
    best,
    final_row,
    load_rows,
    released_row,
    stored_result,
    three_figures,
    winners,
    write_card,
)
from sweep.scope import count_trials, final_point, settings_entropy
from sweep.trial import TRACEBACK, Context, Train, record_result, run_trial

_PATIENCE = 10.0
"""Seconds that the end of a sweep waits for MLflow."""


@dataclass(frozen=True)
class Outcome:
    """How a sweep ended.

    Attributes:
        rows: one for each trial, in the order in which they were tried.
        pruned: points that were never trained, with the reason.
        stopped: interrupted, or given up, with the reason.
        limited: whether what stopped it is a limit of its configuration.
        complete: whether nothing is left to do.
    """

    rows: list[Row]
    pruned: list[tuple[dict[str, Any], str]]
    stopped: str
    complete: bool
    uri: str
    limited: bool = False


def run_sweep(sweep: SweepConfig, verbosity: int = 0, train: Train | None = None) -> Outcome:
    """Runs what is missing of a sweep.

    Args:
        verbosity: of the progress: -1 none, 0 a table or sparse lines, 1 a line for each report.
        train: what trains a trial, in place of a group of Ray Train; leaves the same files.

    Raises:
        ConfigError: the folder holds another sweep of this name, another driver runs it, the
            cluster cannot run it, or the folder would not last.
    """
    check_storage(sweep.storage_path)
    sweep = with_num_trials(sweep)
    master = MasterSecret.load()  # Created at the latest here: no two workers create their own.
    with driver_lock(sweep.folder) as token, log_to("sweep", sweep.folder / "sweep.log"):
        os.chdir(sweep.folder)  # That of a submitted job vanishes while it is being stopped.
        claim(sweep)
        total = count_trials(sweep.run, sweep.num_trials, master, release_id(sweep))
        return _run(sweep, total, token, verbosity, train)


def _run(
    sweep: SweepConfig, total: int, token: int, verbosity: int, train: Train | None
) -> Outcome:
    from sweep import tracking
    from sweep.outbox import Outbox

    rows = load_rows(sweep)
    storage = Path(sweep.storage_path)
    uri = tracking.tracking_uri(storage)
    complete = _is_complete(sweep, rows, total)
    tracking.reachable(uri)  # Refused now; if it goes away later, trials go on without it.
    experiment_id = tracking.open_experiment(uri, sweep.experiment, storage)
    pending = tracking.unfinished(uri, experiment_id, sweep.name)
    if complete and not pending and not _waiting(sweep, rows):
        return Outcome(rows, [], "", True, uri)
    run_id = tracking.Tracker(uri, experiment_id, sweep.name).run_id
    parent = Outbox(sweep.folder, uri, experiment_id, sweep.name)
    tracking.kill_stale(uri, experiment_id, run_id, sweep.name)
    for row in rows:  # What the server had missed when the trial ended.
        Outbox(row.run_dir, uri, experiment_id, f"{sweep.name}/{row.trial}", run_id).flush()
    parent.flush()
    pending = tracking.unfinished(uri, experiment_id, sweep.name)
    for row in rows:  # Finished, but the driver was stopped before it could say so.
        key = f"{sweep.name}/{row.trial}"
        if row.state in ("finished", "stopped") and key in pending:
            tracker = tracking.Tracker(uri, experiment_id, key, run_id)
            record_result(tracker, sweep, row.run_dir, stored_result(row))
            tracker.finish("FINISHED" if row.state == "finished" else "KILLED")
    if complete:
        record_summary(parent, sweep, rows, complete)
        parent.finish("FINISHED")
        return Outcome(rows, [], "", True, uri)
    record_sweep(parent, run_id, sweep, total)
    status = "KILLED"
    try:
        context = Context(sweep, token, uri, experiment_id, run_id, train=train)
        outcome = _search(context, rows, total, verbosity)
        record_summary(parent, sweep, outcome.rows, outcome.complete)
        if not outcome.stopped:
            status = "FINISHED"
        return outcome
    finally:
        parent.finish(status)
        parent.flush(_PATIENCE)
        if count := _waiting(sweep, load_rows(sweep)):
            print(
                f"MLflow at {uri} does not answer: records of {count} runs wait in the sweep's "
                "folder; the same command sends them when it does",
                file=sys.stderr,
            )


def _waiting(sweep: SweepConfig, rows: Sequence[Row]) -> int:
    """Runs of which MLflow has not received everything."""
    from sweep.outbox import OUTBOX

    folders = (sweep.folder, *(row.run_dir for row in rows))
    return sum((folder / OUTBOX).exists() for folder in folders)


def _search(context: Context, rows: list[Row], total: int, verbosity: int) -> Outcome:
    import ray

    from sweep.space import FeasibleSearch

    sweep, uri = context.sweep, context.uri
    meter = Meter(sweep)
    if meter.tick():
        return Outcome(rows, [], meter.reason, False, uri, limited=True)
    join_cluster()
    secret = sweep.run.privacy.scope == "selection"
    before = sum(_is_done(sweep, row) for row in rows)
    progress = Progress(sweep, total, before, secret, verbosity)
    pruned: list[tuple[dict[str, Any], str]] = []

    def on_pruned(point: dict[str, Any], reason: str) -> None:
        pruned.append((point, reason))
        progress.pruned(point, reason)

    try:
        ended = {row.trial: _values(sweep, row) for row in rows if _is_done(sweep, row)}
        entropy = settings_entropy(
            sweep.run, sweep.search_seed, MasterSecret.load(create=False), release_id(sweep)
        )
        search = FeasibleSearch(sweep, ended, on_pruned, entropy)
        scheduler = None
        if sweep.scheduler == "asha":
            from sweep.stopping import Asha, start_verdicts

            context = replace(context, verdicts=start_verdicts())
            done = [row for row in rows if _is_done(sweep, row)]
            scheduler = Asha(sweep, context.verdicts, done)
        stopped = ""
        grew = wait_for_room(sweep, progress.note)
        if total > before:
            concurrent = max_concurrent(sweep, node_resources(), grew)
            finished = _fit(
                context, progress, meter, total - before, search, scheduler=scheduler,
                concurrent=concurrent,
            )  # fmt: skip
            stopped = search.gave_up or ("" if finished else "interrupted")
            if search.same_error:
                progress.note(_last_traceback(sweep))
        if not stopped and sweep.final:
            winner = best(sweep, load_rows(sweep))
            if winner is not None:
                point = {key: flatten(winner.config)[key] for key in sweep.search_space}
                last = replace(context, is_final=True, verdicts=None)
                if not _fit(last, progress, meter, 1, param_space=final_point(point, sweep.final)):
                    stopped = "interrupted"
    except KeyboardInterrupt:
        stopped = "interrupted"
    finally:
        progress.close()
        meter.note()
        ray.shutdown()
    limited = bool(stopped and meter.reason)
    stopped = meter.reason if limited else stopped
    rows = load_rows(sweep)
    complete = not stopped and _is_complete(sweep, rows, total)
    return Outcome(rows, pruned, stopped, complete, uri, limited)


def _fit(
    context: Any,
    progress: Progress,
    meter: Meter,
    num_samples: int,
    search_alg: Any = None,
    param_space: dict[str, Any] | None = None,
    scheduler: Any = None,
    concurrent: int = 1,
) -> bool:
    """Lets Tune run `num_samples` trials; False if it was cut off."""
    from ray import tune

    sweep = context.sweep
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(run_trial, context=context), {DRIVER_RESOURCE: 1}),
        param_space=param_space,
        tune_config=tune.TuneConfig(
            search_alg=search_alg,
            scheduler=scheduler,
            num_samples=num_samples,
            max_concurrent_trials=concurrent,
            reuse_actors=True,  # The next trial finds its packages imported.
            trial_name_creator=lambda trial: trial.trial_id,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=f"{context.launch}{'-final' if context.is_final else ''}",
            storage_path=str(sweep.folder / "ray" / "tune"),
            callbacks=[progress.callback(), meter.callback()],
            stop=meter.stopper(),
            # A trial whose process died; its own failures it reports instead.
            failure_config=tune.FailureConfig(max_failures=sweep.max_failures),
            verbose=0,
        ),
    )
    results = tuner.fit()
    # A signal makes fit() return as if all were done: trials without score or error were cut off.
    ends = {"done", ENDED_EARLY}
    whole = all(
        r.error or "failure" in (r.metrics or {}) or (r.metrics or {}).get("stage") in ends
        for r in results
    )
    return whole and len(results) >= num_samples


def _is_done(sweep: SweepConfig, row: Row) -> bool:
    """Whether a trial is not tried again; a failed draw of a selection has the worst score."""
    if final_row(sweep, [row]) is not None:
        return False
    return row.state in ("finished", "stopped") or (
        row.state == "failed" and row.config.privacy.scope == "selection"
    )


def _values(sweep: SweepConfig, row: Row) -> list[float] | None:
    """What the study is told of a trial that ended: of one stopped early its last score."""
    if row.early_score is not None:
        return [row.early_score]
    scored = set(sweep.metrics) <= set(row.scores)
    return [row.scores[metric] for metric in sweep.metrics] if scored else None


def _is_complete(sweep: SweepConfig, rows: list[Row], total: int) -> bool:
    if sum(_is_done(sweep, row) for row in rows) < total:
        return False
    final = final_row(sweep, rows)
    return not sweep.final or (final is not None and final.state == "finished")


def _last_traceback(sweep: SweepConfig) -> str:
    """Of the trial that failed last."""
    paths = (sweep.folder / "trials").glob(f"*/{TRACEBACK}")
    newest = max(paths, key=lambda path: path.stat().st_mtime_ns, default=None)
    return newest.read_text().rstrip() if newest else "the trials left no traceback"


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


def record_summary(parent: Any, sweep: SweepConfig, rows: list[Row], complete: bool) -> None:
    """Logs the best trial, the three epsilons and the card; registers what may be published.

    Privacy: before the final run, after a search on public data, there is no card, as there is
        nothing yet for it to be about.
    """
    if (winner := best(sweep, rows)) is None:
        return
    result, point = stored_result(winner), flatten(winner.config)
    searched = {k: point[k] for k in sweep.search_space if isinstance(point[k], int | float)}
    figures = compared_figures(sweep, result)
    parent.log_metrics({**searched, **figures})
    front = ", ".join(row.trial for row in winners(sweep, rows))
    parent.log_tags({"best_trial": front})
    parent.log_file(winner.run_dir / "synthetic" / "grid.png", "synthetic")
    if (released := released_row(sweep, rows)) is None:
        return
    card = write_card(sweep, rows, released, complete)
    parent.log_metrics(three_figures(card))
    parent.log_tags({"privacy.statement": card["statement"]})
    for name in ("privacy_card.json", "privacy_card.md"):
        parent.log_file(sweep.folder / name)
    if complete and (released.run_dir / "model.pt").exists():  # Its owner may have removed it.
        scope, statement = card["scope"], card["statement"]
        parent.register_generator(released.trial, released.run_dir, scope, statement)
