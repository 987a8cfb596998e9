"""Runs the search on a Ray cluster: what is missing of a sweep, and its final run."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.config import flatten
from core.errors import ConfigError
from core.io.code_digest import code_digest
from core.io.terminal import counted, log_to
from core.privacy.keys import MasterSecret
from core.record.folder import RunFolder
from sweep.config.scope import count_trials, final_point, settings_entropy
from sweep.config.sweep import SweepConfig, require_as_loaded
from sweep.costs.usage import Meter
from sweep.driver.cluster import DRIVER_RESOURCE, check_places, join_cluster, leave_cluster
from sweep.driver.kept_folder import bring, kept
from sweep.driver.machines import Patience, billed, grows, other_sweeps, wait_for_room
from sweep.driver.observers import TrialObserver
from sweep.driver.progress import Progress
from sweep.driver.room import max_concurrent, node_resources, unused_gpus
from sweep.driver.stop import Stop
from sweep.results.claim import claim, driver_lock, release_id
from sweep.results.export import frame
from sweep.results.folder_copy import forget_trials
from sweep.results.table import (
    CARD,
    Row,
    best,
    claimed_row,
    final_row,
    load_rows,
    num_left,
    recommended,
    released_row,
    withdraw_card,
    write_card,
)
from sweep.search.feasible import with_num_trials
from sweep.trials.notice import ask_to_keep
from sweep.trials.trial import ENDS, Context, Train, run_trial

if TYPE_CHECKING:
    import pandas

_MLFLOW_TIMEOUT_S = 10.0
"""Seconds that the end of a sweep waits for MLflow."""


@dataclass(frozen=True)
class Outcome:
    """How a sweep ended.

    Attributes:
        sweep: with its folder.
        rows: one for each trial, in the order in which they were tried.
        stopped: interrupted, or given up, with the reason.
        complete: whether nothing is left to do.
        uri: of MLflow's store.
        limited: whether what stopped it is a limit of its configuration.
    """

    sweep: SweepConfig
    rows: list[Row]
    stopped: str
    complete: bool
    uri: str
    limited: bool = False

    @property
    def trials(self) -> "pandas.DataFrame":
        """One line a trial: `trial`, `state`, scores, epsilons, `seconds`, `error`, `run_dir` and
        every key of the configuration.

        Privacy: for the owner alone. Scores are not private, and under scope `selection` the
            number of lines is secret.
        """
        return frame(self.sweep, self.rows)

    @property
    def best(self) -> Row | None:
        """The trial with the best first objective; its `run_dir`, `config`, `plan` and `scores`."""
        return best(self.sweep, self.rows)

    @property
    def released(self) -> Row | None:
        """The trial that may be published: the best one, or the final run; None without a claim."""
        return claimed_row(self.sweep, self.rows)[0]

    @property
    def card(self) -> str:
        """The privacy card as Markdown; empty until the sweep claims anything."""
        path = self.sweep.folder / CARD
        return path.read_text() if path.exists() else ""


def run_sweep(sweep: SweepConfig, verbosity: int = 0, train: Train | None = None) -> Outcome:
    """Runs what is missing of a sweep, as `python sweep/run.py` does; shows a complete one.

    Ctrl-C ends it as `stopped`, and the same call goes on.

    Args:
        sweep: as of `load_sweep`.
        verbosity: of the progress: -1 none, 0 a table or sparse lines, 1 a line for each report.
        train: what trains a trial, in place of a group of Ray Train; leaves the same files.

    Raises:
        ConfigError: the configuration was changed after it was loaded, MLflow cannot be used, the
            folder holds another sweep of this name, another driver runs it, the cluster cannot run
            it, or the folder would not last.
        LedgerError: the ledger is missing or damaged.
        StorageError: the store of `storage_path` does not answer.

    Privacy: each trial reserves its whole plan in the ledger before its data is opened.
    """
    from sweep.tracking import client

    require_as_loaded(sweep)
    check_places(sweep)
    bring(sweep)
    sweep = with_num_trials(sweep)
    master = MasterSecret.load()  # Created at the latest here: no two workers create their own.
    storage = Path(sweep.storage_path)
    uri = client.tracking_uri(storage)
    # Refused before anything is claimed; if it goes away later, trials go on without it.
    client.open_experiment(
        uri, sweep.experiment, storage, create=not sweep.run.privacy.covers.is_secret
    )
    log = log_to("sweep", sweep.folder / "sweep.log")
    with _left_as_found(), driver_lock(sweep.folder) as token, log:
        os.chdir(sweep.folder)  # That of a submitted job vanishes while it is being stopped.
        if claim(sweep):
            client.forget_runs(uri, sweep.experiment, sweep.name)
            if sweep.storage_address:
                forget_trials(sweep)
        total = count_trials(sweep.run, sweep.num_trials, master, release_id(sweep))
        context = Context(sweep, token, train=train)
        with kept(sweep, token) as observers:
            return _run(context, observers, total, uri, verbosity)


@contextmanager
def _left_as_found() -> Iterator[None]:
    """Gives a caller back the working directory, and what SIGTERM does, which Ray sets, too."""
    folder, answer = os.getcwd(), signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        with suppress(OSError):  # It may be gone.
            os.chdir(folder)
        if answer is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, answer)


def _run(
    context: Context, observers: Sequence[TrialObserver], total: int, uri: str, verbosity: int
) -> Outcome:
    """Runs what is missing.

    Privacy: of a selection MLflow is told once it is complete, of the one trial that leaves, as if
        that had been the only one.
    """
    from sweep.tracking.client import usable, without_user
    from sweep.tracking.mirror import Mirror, lacking

    sweep, secret = context.sweep, context.sweep.run.privacy.covers.is_secret
    rows = load_rows(sweep)
    _require_same_code(sweep, rows)
    released, complete = released_row(sweep, rows), _is_complete(sweep, rows, total)
    behind: list[Row] = []
    if complete or not secret:
        with usable(uri):
            told = [row for row in rows if row == released or not secret]
            behind, is_behind = lacking(sweep, told, uri)
        if complete and not behind and not is_behind:
            if secret and released is not None:
                write_card(sweep, rows, released, complete)  # Its ledger may be an earlier one's.
            return Outcome(sweep, rows, "", True, uri)
    mirror, status = Mirror(sweep, context.launch, uri, total), "KILLED"
    outcome = Outcome(sweep, rows, "", True, uri)
    try:
        if not secret:
            mirror.begin(behind)
        if not complete:
            withdraw_card(sweep, rows)
            observers = [*observers, *([] if secret else [mirror])]
            outcome = _search(context, observers, rows, total, uri, verbosity)
        if outcome.complete or not secret:
            _summarize(mirror, sweep, outcome)
        status = "KILLED" if outcome.stopped else "FINISHED"
        return outcome
    finally:
        if count := mirror.close(_MLFLOW_TIMEOUT_S, status):
            print(
                f"MLflow at {without_user(uri)} lacks something of {counted(count, 'run')} "
                f"({mirror.trouble}): the sweep's folder holds it, and the same command tells it",
                file=sys.stderr,
            )


def _summarize(mirror: Any, sweep: SweepConfig, outcome: Outcome) -> None:
    """Writes the card, which the ledger may refuse, and hands MLflow the results.

    A sweep that was cut off claims nothing, unless its scope holds at any time.
    """
    rows = outcome.rows
    released = released_row(sweep, rows)
    card = None
    if released and not (sweep.run.privacy.covers.claims_each and num_left(sweep, rows)):
        card = write_card(sweep, rows, released, outcome.complete)
    mirror.summarize(rows, card)
    if sweep.run.privacy.covers.is_secret:
        mirror.begin([row for row in rows if row == released])


def _search(
    context: Context,
    observers: Sequence[TrialObserver],
    rows: list[Row],
    total: int,
    uri: str,
    verbosity: int,
) -> Outcome:
    """Joins or starts a cluster, and lets it run the missing trials."""
    from sweep.trials.keeper import start_keeper

    sweep, meter = context.sweep, Meter(context.sweep)
    if meter.tick():
        return Outcome(sweep, rows, meter.reason, False, uri, limited=True)
    join_cluster()
    context = replace(context, keeper=start_keeper())
    meter.machines = billed
    before = sum(_is_done(sweep, row) for row in rows)
    secret = sweep.run.privacy.covers.is_secret
    progress = Progress(sweep, total, before, secret, verbosity)
    patience = Patience(sweep, progress.note)
    ask = partial(ask_to_keep, sweep.name, context.launch)
    stop = Stop(lambda: meter.tick() or patience.tick(), ask, progress.note)
    try:
        with stop.at_signals():
            watching = [progress, *observers, meter, patience, stop]
            tune = partial(_fit, stop=stop, observers=watching)
            stopped = _search_trials(context, tune, rows, total - before, progress, stop)
            if (point := _final_point(sweep)) and not stopped:
                whole = tune(replace(context, is_final=True), num_samples=1, param_space=point)
                stopped = "" if whole else "interrupted"
    except KeyboardInterrupt:
        stopped = "interrupted"
    finally:
        progress.close()
        meter.note()
        leave_cluster()
    limit = meter.reason or patience.reason
    limited = bool(stopped and limit)
    stopped = limit if limited else stopped
    rows = load_rows(sweep)
    complete = not stopped and _is_complete(sweep, rows, total)
    return Outcome(sweep, rows, stopped, complete, uri, limited)


def _final_point(sweep: SweepConfig) -> dict[str, Any]:
    """The final run's parameters: the recommended ones, or those of the one that has begun.

    Empty where there is to be none, or no trial has a score.
    """
    rows = load_rows(sweep) if sweep.final else []
    if not sweep.final or (winner := final_row(sweep, rows) or recommended(sweep, rows)) is None:
        return {}
    point = {key: flatten(winner.config)[key] for key in sweep.search_space}
    return final_point(sweep.run.privacy.covers, point, sweep.final)


def _search_trials(
    context: Context,
    tune: Callable[..., bool],
    rows: Sequence[Row],
    missing: int,
    progress: Progress,
    stop: Stop,
) -> str:
    """Runs the missing trials of the search; returns why it ended before them, or nothing."""
    from sweep.search.search import FeasibleSearch

    sweep = context.sweep
    done = [row for row in rows if _is_done(sweep, row)]
    entropy = settings_entropy(
        sweep.run, sweep.search_seed, MasterSecret.load(create=False), release_id(sweep)
    )
    ended = {row.trial: _values(sweep, row) for row in done}
    search = FeasibleSearch(sweep, ended, progress.pruned, entropy, stop.is_asked)
    scheduler = None
    if sweep.scheduler == "asha":
        from sweep.search.asha import Asha, start_verdicts

        context = replace(context, verdicts=start_verdicts())
        scheduler = Asha(sweep, context.verdicts, done)
    for command in other_sweeps():
        progress.note(f"another sweep shares this cluster's machines and head: {command}")
    wait_for_room(sweep, progress.note, stop.is_asked)
    if unused := unused_gpus(sweep, node_resources()):
        progress.note(unused)
    if missing <= 0:
        return ""
    concurrent = max_concurrent(sweep, node_resources(), grows())
    finished = tune(
        context,
        num_samples=missing,
        search_alg=search,
        scheduler=scheduler,
        concurrent=concurrent,
    )
    if search.same_error:
        progress.note(_last_traceback(sweep))
    return search.gave_up or ("" if finished else "interrupted")


def _fit(
    context: Context,
    *,
    stop: Stop,
    observers: Sequence[TrialObserver],
    num_samples: int,
    search_alg: Any = None,
    param_space: dict[str, Any] | None = None,
    scheduler: Any = None,
    concurrent: int = 1,
) -> bool:
    """Lets Tune run `num_samples` trials; False if it was cut off."""
    from ray import tune

    from sweep.driver.observers import Relay, Stopper

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
            callbacks=[Relay(sweep, observers)],
            stop=Stopper(stop.is_due),
            # A trial whose process died; its own failures it reports instead.
            failure_config=tune.FailureConfig(max_failures=sweep.max_failures),
            verbose=0,
        ),
    )
    results = tuner.fit()
    # It returns as if all were done, also when stopped: trials without score or error were cut off.
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
    for row in rows if sweep.run.privacy.covers.is_secret else ():
        # A checkpoint at an address is not fetched, so any beginning there may have one.
        may_have_one = sweep.storage_address or any(row.folder.checkpoints.glob("*.pt"))
        begun = row.state == "unfinished" and may_have_one
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
        row.state == "failed" and (row.for_good or row.config.privacy.covers.is_secret)
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
