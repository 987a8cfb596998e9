"""Starts or joins a Ray cluster and runs the search on it."""

import logging
import os
import secrets
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.config import flatten, load
from core.errors import ConfigError
from core.privacy.keys import MasterSecret
from core.reporting import ProgressLine, write_json
from sweep.config import SweepConfig, dump_sweep, flat, trial_id_of
from sweep.results import Row, best, load_rows, sweep_epsilon

DRIVER_RESOURCE = "trial_driver"
"""Trials hold this and no CPU: a trial that held CPUs could keep its own workers from starting."""
_LOCAL_DRIVERS = 64

# Ray reads these when it is imported.
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


@dataclass(frozen=True)
class Outcome:
    """How a sweep ended.

    Attributes:
        rows: one for each trial, in the order in which they were tried.
        pruned: points that were never trained, with the reason.
        stopped: interrupted, or given up, with the reason.
    """

    rows: list[Row]
    pruned: list[tuple[dict[str, Any], str]]
    stopped: str
    uri: str


def run_sweep(sweep: SweepConfig) -> Outcome:
    """Runs what is missing of a sweep.

    Raises:
        ConfigError: the folder holds another sweep of this name, or the cluster cannot run it.
    """
    MasterSecret.load()  # Created here at the latest, so that no two workers create their own.
    _claim(sweep)
    rows = load_rows(sweep)
    missing = sweep.num_trials - sum(row.state == "finished" for row in rows)
    from sweep import tracking

    storage = Path(sweep.storage_path)
    uri = tracking.tracking_uri(storage)
    if missing <= 0:
        return Outcome(rows, [], "", uri)
    experiment_id = tracking.open_experiment(uri, sweep.experiment, storage)
    parent = tracking.Tracker(uri, experiment_id, sweep.name)
    tracking.kill_stale(uri, experiment_id, parent.run_id, sweep.name)
    parent.log_params({**flatten(load(sweep.base, sweep.fixed)), **_sweep_params(sweep)})
    parent.log_file(sweep.folder / "sweep.json")
    status = "KILLED"
    try:
        outcome = _search(sweep, rows, missing, uri, experiment_id, parent.run_id)
        _log_summary(parent, sweep, outcome)
        if not outcome.stopped:
            status = "FINISHED"
        return outcome
    finally:
        parent.finish(status)


def _search(
    sweep: SweepConfig,
    rows: list[Row],
    missing: int,
    uri: str,
    experiment_id: str,
    parent_id: str,
) -> Outcome:
    import ray
    from ray import tune

    from sweep.space import FeasibleSearch
    from sweep.trial import Context, run_trial

    _join_cluster()
    concurrent = _max_concurrent(sweep, ray.cluster_resources())
    metric = sweep.objective.metric
    pruned: list[tuple[dict[str, Any], str]] = []
    progress = _Progress(sweep, missing)

    def on_pruned(point: dict[str, Any], reason: str) -> None:
        pruned.append((point, reason))
        progress.pruned(point, reason)

    search = FeasibleSearch(
        sweep,
        {row.trial: row.scores[metric] for row in rows if row.state == "finished"},
        on_pruned,
    )
    launch = time.strftime("%Y%m%d-%H%M%S")
    context = Context(sweep, launch, _release_id(sweep), uri, experiment_id, parent_id)
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(run_trial, context=context), {DRIVER_RESOURCE: 1}),
        tune_config=tune.TuneConfig(
            metric=metric,
            mode="max" if sweep.objective.direction == "maximize" else "min",
            search_alg=search,
            num_samples=missing,
            max_concurrent_trials=concurrent,
            trial_name_creator=lambda trial: trial.trial_id,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=launch,
            storage_path=str(sweep.folder / "ray" / "tune"),
            callbacks=[progress.callback()],
            verbose=0,
        ),
    )
    try:
        results = tuner.fit()
    except KeyboardInterrupt:
        return Outcome(load_rows(sweep), pruned, "interrupted", uri)
    finally:
        ray.shutdown()
    rows = load_rows(sweep)
    stopped = search.gave_up
    if not stopped and len(results) < missing:
        stopped = "interrupted"
    # A signal makes fit() return as if all were done: trials without score or error were cut off.
    if not stopped and any(metric not in (r.metrics or {}) and not r.error for r in results):
        stopped = "interrupted"
    return Outcome(rows, pruned, stopped, uri)


def _claim(sweep: SweepConfig) -> None:
    """Writes the resolved sweep, or compares it with the one this name began with."""
    import json

    path, now = sweep.folder / "sweep.json", dump_sweep(sweep)
    if not path.exists():
        sweep.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, now)
        return
    earlier = json.loads(path.read_text())
    free = ("num_trials", "max_concurrent_trials", "cpus_per_worker", "storage_path")
    old, new = flat(earlier), flat(now)
    changed = [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in sorted(old | new)
        if old.get(key) != new.get(key) and not key.startswith((*free, "base.runtime."))
    ]
    if changed:
        raise ConfigError(
            f"'{sweep.folder}' holds another sweep named '{sweep.name}' ({'; '.join(changed)}): "
            "choose another name=..., or restore what it was started with"
        )
    write_json(path, now)


def _release_id(sweep: SweepConfig) -> str:
    """Random and kept: a sweep begun anew in an empty folder draws new masks and noise."""
    path = sweep.folder / "release_id"
    if not path.exists():
        path.write_text(secrets.token_hex(16))
    return path.read_text()


def _join_cluster() -> None:
    """Joins the cluster of RAY_ADDRESS (set for submitted jobs), or starts a local one.

    Raises:
        ConfigError: the cluster does not offer the resource that trials hold.
    """
    import ray

    warnings.filterwarnings("ignore", module="ray")
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # The table tells of failed trials.
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    shared: dict[str, Any] = {
        "runtime_env": {"env_vars": {"PYTHONPATH": path}},
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": True,
    }
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**shared)
        if not ray.cluster_resources().get(DRIVER_RESOURCE):
            raise ConfigError(
                f"the cluster at RAY_ADDRESS offers no '{DRIVER_RESOURCE}' resource, which trials "
                f"hold: start its head with --resources '{{\"{DRIVER_RESOURCE}\": 64}}'"
            )
    else:
        ray.init(address="local", resources={DRIVER_RESOURCE: _LOCAL_DRIVERS}, **shared)


def _max_concurrent(sweep: SweepConfig, resources: Mapping[str, float]) -> int:
    """As many trials as the cluster has room for, at least one."""
    if sweep.max_concurrent_trials is not None:
        return sweep.max_concurrent_trials
    rooms = [resources.get("CPU", 0) / (sweep.workers_per_trial * sweep.cpus_per_worker)]
    if sweep.gpus_per_worker:
        rooms.append(resources.get("GPU", 0) / (sweep.workers_per_trial * sweep.gpus_per_worker))
    rooms.append(resources.get(DRIVER_RESOURCE, 1))
    return max(1, int(min(rooms)))


def _sweep_params(sweep: SweepConfig) -> dict[str, Any]:
    space = {
        f"search_space.{key}": dimension.model_dump(exclude_defaults=True)
        for key, dimension in sweep.search_space.items()
    }
    return {"num_trials": sweep.num_trials, "objective": sweep.objective.metric, **space}


def _log_summary(parent: Any, sweep: SweepConfig, outcome: Outcome) -> None:
    if (winner := best(sweep, outcome.rows)) is not None:
        parent.log_metrics(
            {
                **winner.scores,
                "epsilon": winner.plan.epsilon,
                "epsilon_sweep": sweep_epsilon(outcome.rows),
            }
        )
        parent.log_tags({"best_trial": winner.trial})
        parent.log_file(winner.run_dir / "synthetic" / "grid.png", "synthetic")


class _Progress:
    """One line for the whole sweep: trials done, and where the running ones are."""

    def __init__(self, sweep: SweepConfig, missing: int) -> None:
        self._sweep = sweep
        self._before = sweep.num_trials - missing
        self._ended = self._failed = self._pruned = 0
        self._began = self._last_end = time.monotonic()
        self._running: dict[str, str] = {}
        self._line = ProgressLine()
        if self._before:
            self._line.keep(f"{self._before} of {sweep.num_trials} trials had finished before")

    def pruned(self, point: dict[str, Any], reason: str) -> None:
        self._pruned += 1
        self._line.keep(f"pruned without compute: {_short(point)}: {reason}")

    def moved(self, point: dict[str, Any], where: str) -> None:
        """Shows where a running trial is."""
        self._running[self._name(point)] = where
        self._show()

    def ended(self, point: dict[str, Any], text: str, failed: bool) -> None:
        """Keeps a line about a trial that has ended."""
        name = self._name(point)
        self._running.pop(name, None)
        self._ended += 1
        self._failed += failed
        self._last_end = time.monotonic()
        self._line.keep(f"trial {name} {text} ({_short(point)})")

    def _name(self, point: dict[str, Any]) -> str:
        return trial_id_of(self._sweep.trial_config(point))

    def _show(self) -> None:
        total = self._sweep.num_trials
        parts = [f"trials {self._before + self._ended}/{total}"]
        parts += [f"{self._failed} failed"] if self._failed else []
        parts += [f"{self._pruned} pruned"] if self._pruned else []
        if self._ended:
            each = (self._last_end - self._began) / self._ended
            since = time.monotonic() - self._last_end
            left = max(0.0, each * (total - self._before - self._ended) - since)
            parts.append(f"about {left / 60:.0f} min left")
        parts += [f"[{name} {where}]" for name, where in self._running.items()]
        self._line.show("  ".join(parts))

    def callback(self) -> Any:
        """What Tune calls."""
        from ray import tune

        progress, metric = self, self._sweep.objective.metric
        steps = load(self._sweep.base, self._sweep.fixed).training.num_steps

        class Callback(tune.Callback):
            def on_trial_start(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
                progress.moved(trial.config, "starting")

            def on_trial_result(
                self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **_: Any
            ) -> None:
                total = trial.config.get("training.num_steps", steps)
                progress.moved(trial.config, f"{result['stage']} {result['step']}/{total}")

            def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
                result = trial.last_result
                if metric in result:
                    text = f"finished: {metric} {result[metric]:.4g}, {result['seconds']:.0f} s"
                    progress.ended(trial.config, text, failed=False)

            def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
                progress.ended(trial.config, "failed", failed=True)

        return Callback()


def _short(point: dict[str, Any]) -> str:
    """A point in one line, keys without their sections."""
    return ", ".join(
        f"{key.rsplit('.', 1)[-1]}={value:.4g}"
        if isinstance(value, float)
        else f"{key.rsplit('.', 1)[-1]}={value}"
        for key, value in point.items()
    )
