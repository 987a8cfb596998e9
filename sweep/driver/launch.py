"""Runs the search on a Ray cluster: what is missing of a sweep, and its final run."""

import logging
import os
import sys
from collections.abc import Collection, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from core.config import flatten
from core.errors import ConfigError, UserError
from core.io.code_digest import code_digest
from core.io.terminal import log_to
from core.privacy.keys import MasterSecret
from core.record.folder import RunFolder
from sweep.config.scope import count_trials, final_point, settings_entropy
from sweep.config.sweep import SweepConfig
from sweep.costs.usage import Meter
from sweep.driver.cluster import (
    DRIVER_RESOURCE,
    check_places,
    join_cluster,
    max_concurrent,
    node_resources,
    wait_for_room,
)
from sweep.driver.progress import Progress
from sweep.results.claim import claim, driver_lock, release_id
from sweep.results.table import (
    Row,
    best,
    final_row,
    load_rows,
    released_row,
    stored_result,
    write_card,
)
from sweep.search.feasible import with_num_trials
from sweep.tracking.content import Place, record_end, record_start, record_summary, record_sweep
from sweep.trials.trial import ENDS, Context, Train, run_trial

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
        ConfigError: MLflow cannot be used, the folder holds another sweep of this name, another
            driver runs it, the cluster cannot run it, or the folder would not last.
    """
    from sweep.tracking import client

    check_places(sweep)
    sweep = with_num_trials(sweep)
    master = MasterSecret.load()  # Created at the latest here: no two workers create their own.
    storage = Path(sweep.storage_path)
    uri = client.tracking_uri(storage)
    # Refused before anything is claimed; if it goes away later, trials go on without it.
    experiment_id = client.open_experiment(uri, sweep.experiment, storage)
    with driver_lock(sweep.folder) as token, log_to("sweep", sweep.folder / "sweep.log"):
        os.chdir(sweep.folder)  # That of a submitted job vanishes while it is being stopped.
        claim(sweep)
        total = count_trials(sweep.run, sweep.num_trials, master, release_id(sweep))
        context = Context(sweep, token, train=train)
        return _run(context, total, uri, experiment_id, verbosity)


def _run(context: Context, total: int, uri: str, experiment_id: str, verbosity: int) -> Outcome:
    from sweep.tracking import client
    from sweep.tracking.outbox import Outbox

    sweep = context.sweep
    rows = load_rows(sweep)
    _require_same_code(sweep, rows)
    complete = _is_complete(sweep, rows, total)
    if complete and not _waiting(sweep, rows):
        known = client.recorded(uri, experiment_id, sweep.name)
        if sweep.name in known and not _missing(sweep, rows, known):
            if sweep.run.privacy.scope == "selection" and (row := released_row(sweep, rows)):
                write_card(sweep, rows, row, complete)  # Its ledger may be of an earlier version.
            return Outcome(rows, [], "", True, uri)
    with client.usable(uri):
        run_id = client.Tracker(uri, experiment_id, sweep.name).run_id
    place = Place(sweep.name, uri, experiment_id, run_id)
    parent = Outbox(sweep.folder, uri, experiment_id, sweep.name)
    with _records():
        _catch_up(sweep, rows, place, parent)
    if complete:
        with _records():
            _record_summary(parent, place, sweep, rows, complete)
            parent.finish("FINISHED")
        return Outcome(rows, [], "", True, uri)
    with _records():
        record_sweep(parent, run_id, sweep, total)
    status = "KILLED"
    try:
        outcome = _search(context, place, rows, total, verbosity)
        with _records():
            _record_summary(parent, place, sweep, outcome.rows, outcome.complete)
            status = "KILLED" if outcome.stopped else "FINISHED"
        return outcome
    finally:
        with _records():
            parent.finish(status)
            parent.flush(_PATIENCE)
        if count := _waiting(sweep, load_rows(sweep)):
            print(
                f"MLflow at {client.without_user(uri)} does not answer: records of {count} runs "
                "wait in the sweep's folder; the same command sends them when it does",
                file=sys.stderr,
            )


def _record_summary(
    parent: Any, place: Place, sweep: SweepConfig, rows: Sequence[Row], complete: bool
) -> None:
    """The summary; of a selection first the one trial that leaves, as if it had been the only one.

    Privacy: of a selection that is not complete MLflow is told nothing.
    """
    from sweep.tracking.outbox import Outbox

    if sweep.run.privacy.scope == "selection":
        if not complete:
            return
        if (released := released_row(sweep, rows)) is not None:
            write_card(sweep, rows, released, complete)  # First: the ledger may refuse it.
            box = Outbox(released.run_dir, *place.run_of(released.trial))
            record_start(box, sweep, released.config)
            record_end(box, sweep, released.run_dir, stored_result(released))
    record_summary(parent, sweep, rows, complete)


@contextmanager
def _records() -> Generator[None]:
    """Records are not what a sweep fails for: that some are missing is told, and why is logged.

    Raises:
        UserError: the block raised it, as where the ledger and what is told disagree.
    """
    from sweep.tracking.client import reason

    try:
        yield
    except UserError:
        raise
    except Exception as error:
        logging.getLogger("sweep").exception("not recorded")
        print(
            f"warning: MLflow has not recorded all ({reason(error)}): the sweep's folder holds it, "
            "and the same command tries again",
            file=sys.stderr,
        )


def _catch_up(sweep: SweepConfig, rows: Sequence[Row], place: Place, parent: Any) -> None:
    """Records what MLflow has missed of trials that ended, and those it does not know."""
    from sweep.tracking import client
    from sweep.tracking.outbox import Backoff, Outbox

    backoff = Backoff()
    boxes = {r.trial: Outbox(r.run_dir, *place.run_of(r.trial), backoff=backoff) for r in rows}
    for box in (*boxes.values(), parent):
        box.flush()
    # Now, as who sends opens the run again.
    client.kill_stale(place.uri, place.experiment_id, place.parent_id, sweep.name)
    if sweep.run.privacy.scope == "selection":
        return  # At the end MLflow is told of the one trial that leaves.
    known = client.recorded(place.uri, place.experiment_id, sweep.name)
    for row in _missing(sweep, rows, known):
        with _records():  # What hinders one shall not hinder all.
            record_start(boxes[row.trial], sweep, row.config)
            record_end(boxes[row.trial], sweep, row.run_dir, stored_result(row))


def _missing(sweep: SweepConfig, rows: Sequence[Row], known: Collection[str]) -> list[Row]:
    """Trials that ended, but whose driver could not say so, or said so elsewhere."""
    ended = [row for row in rows if row.state in ("finished", "stopped")]
    if sweep.run.privacy.scope == "selection":
        ended = [row for row in ended if row == released_row(sweep, rows)]
    return [row for row in ended if f"{sweep.name}/{row.trial}" not in known]


def _waiting(sweep: SweepConfig, rows: Sequence[Row]) -> int:
    """Runs of which MLflow has not received everything."""
    from sweep.tracking.outbox import OUTBOX

    folders = (sweep.folder, *(row.run_dir for row in rows))
    return sum((folder / OUTBOX).exists() for folder in folders)


def _search(context: Context, place: Place, rows: list[Row], total: int, verbosity: int) -> Outcome:
    import ray

    from sweep.search.search import FeasibleSearch
    from sweep.tracking.recorder import Recorder

    sweep, uri = context.sweep, place.uri
    meter = Meter(sweep)
    if meter.tick():
        return Outcome(rows, [], meter.reason, False, uri, limited=True)
    join_cluster()
    secret = sweep.run.privacy.scope == "selection"
    before = sum(_is_done(sweep, row) for row in rows)
    progress = Progress(sweep, total, before, secret, verbosity)
    recorder = Recorder(sweep, context.launch, place, progress.note)
    # Of a selection MLflow is told at the end, of the one trial that leaves.
    observers = (progress, meter) if secret else (progress, recorder, meter)
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
            from sweep.search.asha import Asha, start_verdicts

            context = replace(context, verdicts=start_verdicts())
            done = [row for row in rows if _is_done(sweep, row)]
            scheduler = Asha(sweep, context.verdicts, done)
        stopped = ""
        grew = wait_for_room(sweep, progress.note)
        if total > before:
            concurrent = max_concurrent(sweep, node_resources(), grew)
            finished = _fit(
                context, observers, meter, total - before, search, scheduler=scheduler,
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
                given = final_point(point, sweep.final)
                if not _fit(last, observers, meter, 1, param_space=given):
                    stopped = "interrupted"
    except KeyboardInterrupt:
        stopped = "interrupted"
    finally:
        progress.close()
        meter.note()
        ray.shutdown()
        with _records():
            recorder.close(_PATIENCE)
    limited = bool(stopped and meter.reason)
    stopped = meter.reason if limited else stopped
    rows = load_rows(sweep)
    complete = not stopped and _is_complete(sweep, rows, total)
    return Outcome(rows, pruned, stopped, complete, uri, limited)


def _fit(
    context: Context,
    observers: Sequence[Any],
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
            callbacks=[observer.callback() for observer in observers],
            stop=meter.stopper(),
            # A trial whose process died; its own failures it reports instead.
            failure_config=tune.FailureConfig(max_failures=sweep.max_failures),
            verbose=0,
        ),
    )
    results = tuner.fit()
    # A signal makes fit() return as if all were done: trials without score or error were cut off.
    whole = all(
        r.error or "failure" in (r.metrics or {}) or (r.metrics or {}).get("stage") in ENDS
        for r in results
    )
    return whole and len(results) >= num_samples


def _require_same_code(sweep: SweepConfig, rows: Sequence[Row]) -> None:
    """Refuses a selection that other code began: a trial that cannot go on would rank last.

    Raises:
        ConfigError: a trial has a checkpoint of other code.
    """
    for row in rows if sweep.run.privacy.scope == "selection" else ():
        begun = row.state == "unfinished" and any(row.folder.checkpoints.glob("*.pt"))
        if begun and row.folder.begun_with()[1] not in ("", code_digest()):
            raise ConfigError(
                f"the checkpoint of trial {row.trial} in '{row.run_dir}' is of other code of core: "
                "restore that, or remove the trial's folder, which draws new noise and is charged "
                "again"
            )


def _is_done(sweep: SweepConfig, row: Row) -> bool:
    """Whether a trial is not tried again; a failed draw of a selection has the worst score, and
    one that failed for good would do so again."""
    if final_row(sweep, [row]) is not None:
        return False
    return row.state in ("finished", "stopped") or (
        row.state == "failed" and (row.for_good or row.config.privacy.scope == "selection")
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
    folders = map(RunFolder, (sweep.folder / "trials").glob("*/"))
    paths = [folder.traceback for folder in folders if folder.traceback.exists()]
    newest = max(paths, key=lambda path: path.stat().st_mtime_ns, default=None)
    return newest.read_text().rstrip() if newest else "the trials left no traceback"
