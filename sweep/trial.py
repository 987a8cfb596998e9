"""One trial: a Tune function that runs a Ray Train group of `core.pipeline.run` workers."""

import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.config import Config, flatten, nested
from core.errors import UserError
from sweep.config import SweepConfig, trial_id_of
from sweep.scope import shares_central_images

CURVES = ("loss", "seconds_per_step")


class TrialError(Exception):
    """A trial ended without a result; the text is for the sweep's table."""


@dataclass(frozen=True)
class Context:
    """What every trial of one sweep shares; small, as it is sent to each.

    Attributes:
        launch: token of the driver that started this; the ledger refuses workers of an older one.
        is_final: whether this is the run on sensitive data after a search on public data.
    """

    sweep: SweepConfig
    launch: int
    uri: str
    experiment_id: str
    parent_id: str
    is_final: bool = False

    def run_dir(self, trial_id: str) -> Path:
        """Folder of a trial."""
        return self.sweep.folder / "trials" / trial_id


def run_trial(parameters: dict[str, Any], context: Context) -> None:
    """Trains one point of the search space; reports progress and, last, the scores to Tune.

    Raises:
        TrialError: the workers failed more often than allowed, or refused the configuration.
    """
    from ray import tune

    from sweep.tracking import Tracker

    config = context.sweep.trial_config(parameters)
    trial_id = trial_id_of(config)
    run_dir = context.run_dir(trial_id)
    tracker = Tracker(
        context.uri, context.experiment_id, f"{context.sweep.name}/{trial_id}", context.parent_id
    )
    tracker.log_params(flatten(config))
    status = "FAILED"
    try:
        result: dict[str, Any] | None = None
        for metrics in _train(context, config, trial_id):
            if "refused" in metrics:
                raise TrialError(metrics["refused"])
            if metrics["stage"] == "done":
                result = metrics
            else:
                curves = {f"{metrics['stage']}/{k}": metrics[k] for k in CURVES if k in metrics}
                tracker.log_step(metrics["step"], curves)
                tune.report({**metrics, "trial": trial_id})
        if result is None:
            raise TrialError("the workers ended without a result")
        record_result(tracker, run_dir, result)
        status = "FINISHED"
        tracker.finish(status)
        tune.report({**result, "trial": trial_id})
    except SystemExit:  # How Tune stops a trial.
        status = "KILLED"
        raise
    except TrialError as error:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "error.txt").write_text(f"{error}\n")
        raise
    finally:
        if status != "FINISHED":
            tracker.finish(status)


def record_result(tracker: Any, run_dir: Path, result: Mapping[str, Any]) -> None:
    """Logs what a finished trial has: scores with their tags, the plan, the pictures."""
    figures = {k: v for k, v in result.items() if isinstance(v, float)}
    tracker.log_metrics(figures, result["step"])
    tags = json.loads((run_dir / "evaluation.json").read_text())["tags"]
    tracker.log_tags({f"privacy.{name}": tag for name, tag in tags.items()})
    for name in ("config.yaml", "privacy.json"):
        tracker.log_file(run_dir / name)
    tracker.log_file(run_dir / "synthetic" / "grid.png", "synthetic")
    tracker.log_file(run_dir / "central_images" / "grid.png", "central_images")


def _train(context: Context, config: Config, trial_id: str) -> Iterator[dict[str, Any]]:
    """Yields what rank 0 reports, while Ray Train supervises the workers."""
    import ray.train
    from ray.train.torch import TorchTrainer
    from ray.util.queue import Empty, Queue

    sweep = context.sweep
    reports = Queue(maxsize=256, actor_options={"num_cpus": 0})
    resources = {"CPU": sweep.cpus_per_worker}
    if sweep.gpus_per_worker:
        resources["GPU"] = sweep.gpus_per_worker
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "config": nested(config),
            "run_dir": str(context.run_dir(trial_id)),
            "name": sweep.name,
            "charged": str(sweep.folder / "charged"),
            "shared": str(sweep.folder / "shared") if shares_central_images(config) else None,
            "launch": context.launch,
            "threads": max(1, int(sweep.cpus_per_worker)),
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=sweep.workers_per_trial,
            use_gpu=sweep.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        run_config=ray.train.RunConfig(
            name=f"{trial_id}-{context.launch}",
            storage_path=str(sweep.folder / "ray" / "train"),
            callbacks=[_relay(reports)],
            failure_config=ray.train.FailureConfig(max_failures=sweep.max_failures),
        ),
    )
    failure: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    running = True
    while running:
        running = thread.is_alive()  # Before the queue is read, so that nothing is missed.
        try:
            while True:
                yield reports.get(timeout=0.5 if running else 0.01)
        except Empty:
            pass
    reports.shutdown()
    if failure:
        raise TrialError(_reason(failure[0])) from failure[0]


def _relay(reports: Any) -> Any:
    import ray.train

    class Relay(ray.train.UserCallback):
        """Hands rank 0's reports from the Train controller to the trial."""

        def after_report(self, run_context: Any, metrics: list[dict], checkpoint: Any) -> None:
            reports.put(metrics[0])

    return Relay()


def train_worker(settings: dict[str, Any]) -> None:
    """What each Ray Train worker runs: the core, reporting through Ray.

    A user's error is reported, not raised: it would be the same after a restart.
    """
    import ray.train
    import torch

    from core import distributed
    from core.config import load
    from core.pipeline import run
    from core.privacy.keys import MasterSecret

    torch.set_num_threads(settings["threads"])
    try:
        run(
            load(settings["config"]),
            Path(settings["run_dir"]),
            master=distributed.together(lambda: MasterSecret.load(create=False)),
            name=settings["name"],
            report=ray.train.report,
            lease=settings["launch"],
            charged=Path(settings["charged"]),
            shared=Path(settings["shared"]) if settings["shared"] else None,
        )
    except UserError as error:
        ray.train.report({"refused": str(error), "stage": "refused", "step": 0})


def _reason(error: BaseException) -> str:
    """The line of a nested remote traceback that a person wants to read first."""
    causes = getattr(error, "worker_failures", None) or {}
    first = next(iter(causes.values()), error)
    lines = [line.strip() for line in str(first).strip().splitlines() if line.strip()]
    return lines[-1] if lines else type(first).__name__
