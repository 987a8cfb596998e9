"""One trial: a Tune function that runs a Ray Train group of `core.pipeline.run.run` workers."""

import threading
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

from core.config import Config, nested, short_digest
from core.errors import StorageError, UserError
from core.io.terminal import Report
from core.record.early import ENDED_EARLY
from core.record.folder import RunFolder
from sweep.config.scope import shares_central_images
from sweep.config.sweep import SweepConfig
from sweep.costs.usage import WAITING
from sweep.results.claim import newest_launch, require_newest_launch
from sweep.results.folder_copy import copy_of_trial, fetch_trial

Train = Callable[["Context", Config, str], Iterator[dict[str, Any]]]
IN_DANGER = "about to lose a machine"
"""Stage of the report that a notice of that was given."""
KEPT = "kept"
"""Stage of the report that there is more of a trial at the sweep's address."""
_KEPT_FOR_STOP = "kept for a stop"
"""Stage of the report that its state was kept for a stop."""
ENDS = ("done", ENDED_EARLY)
"""Stages of a trial's last report, which holds its result."""


class TrialError(Exception):
    """A trial ended without a result; the text is for the sweep's table."""


class _LostError(Exception):
    """Workers were lost, or what supervises them; others go on from the checkpoint.

    Attributes:
        noticed: whether the cloud had said that it takes a machine away.
    """

    def __init__(self, reason: str, noticed: bool) -> None:
        super().__init__(reason)
        self.noticed = noticed


@dataclass(frozen=True)
class Context:
    """What every trial of one sweep shares; small, as it is sent to each.

    Attributes:
        launch: token of the driver that started this; the ledger refuses workers of an older one.
        keeper: actor that writes the ledgers for all workers.
        is_final: whether this is the one run after the search.
        verdicts: where workers ask after each early score whether to go on; None without.
        train: what trains a trial and yields its reports; None: a group of Ray Train.
    """

    sweep: SweepConfig
    launch: int
    keeper: Any = None
    is_final: bool = False
    verdicts: Any = None
    train: "Train | None" = None

    def run_dir(self, digest: str) -> Path:
        """Folder of a trial."""
        return self.sweep.folder / "trials" / digest


def run_trial(parameters: dict[str, Any], context: Context) -> None:
    """Trains one point of the search space; reports progress and, last, the scores to Tune.

    A trial that fails reports `failure`, the reason, as its last result: what Tune sees raised is
    the death of this process, after which it starts the trial again.
    """
    from ray import tune

    config = context.sweep.trial_config(parameters)
    digest = short_digest(config)
    result: dict[str, Any] | None = None
    try:
        for metrics in (context.train or _supervised)(context, config, digest):
            if metrics["stage"] in ENDS:
                result = metrics  # Reported when the workers have ended.
            else:
                tune.report({**metrics, "trial": digest})
        if result is None:
            raise TrialError("the workers ended without a result")
        tune.report({**result, "trial": digest})
    except TrialError as error:
        if newest_launch(context.sweep.folder) == context.launch:  # Else it is another's trial.
            _note_failure(context.run_dir(digest), error)
        tune.report({"failure": str(error), "trial": digest})


def _note_failure(run_dir: Path, error: TrialError) -> None:
    """Privacy: a traceback may quote values computed from private data; it stays in the folder."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        folder = RunFolder(run_dir)
        folder.error.write_text(f"{error}\n")
        folder.traceback.write_text(f"{error.__cause__ or error}\n")
    except OSError:
        pass  # The storage is what failed: the sweep's output says so.


def _supervised(context: Context, config: Config, digest: str) -> Iterator[dict[str, Any]]:
    """Yields what rank 0 reports; begins again when workers or their supervisor were lost.

    Here and not in Ray Train, which counts a machine that was taken away with notice as a failure
    if a worker elsewhere sees that first, by its broken connection.

    Raises:
        TrialError: the run was refused, or more was lost than allowed.
    """
    allowed = {False: context.sweep.max_failures, True: context.sweep.max_preemptions}
    while True:
        try:
            yield from _train(context, config, digest)
            return
        except _LostError as error:
            allowed[error.noticed] -= 1
            if allowed[error.noticed] < 0:
                raise TrialError(str(error)) from error.__cause__


def _train(context: Context, config: Config, digest: str) -> Iterator[dict[str, Any]]:
    """Yields what rank 0 reports, while Ray Train supervises the workers; raises `_LostError`."""
    from ray.util.queue import Empty

    reports, attempt = _queue(), uuid.uuid4().hex
    trainer = _trainer(context, config, digest, partial(_tell, reports, attempt))
    failure: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    running, refused, noticed = True, "", False
    while running:
        running = thread.is_alive()  # Before the queue is read, so that nothing is missed.
        try:
            while True:
                sender, metrics = reports.get(timeout=0.5 if running else 0.01)
                if sender == attempt:  # Else of a controller that died since.
                    refused = metrics.get("refused", "")
                    noticed |= metrics.get("stage") == IN_DANGER
                    if metrics.get("stage") == KEPT:
                        with suppress(StorageError):  # At the end it must be there.
                            fetch_trial(context.sweep, digest, patience=0)
                    elif not refused:
                        yield metrics
        except Empty:
            pass
    if context.sweep.storage_address and not failure:
        try:
            fetch_trial(context.sweep, digest)
        except StorageError as error:
            refused = refused or str(error)
    # Only now: else the supervisor is killed before it has given back what it had asked the cluster
    # for, which then counts as in use for minutes. How the workers ended then does not matter.
    if refused:
        raise TrialError(refused)
    if failure:
        raise _LostError(_reason(failure[0], noticed), noticed) from failure[0]


def _trainer(context: Context, config: Config, digest: str, tell: Report) -> Any:
    """The group of workers of a trial.

    Args:
        tell: hands the trial a report, from any process.
    """
    import ray.train

    from sweep.trials.ray_train import Presence, Trainer

    sweep, address = context.sweep, context.sweep.storage_address
    resources = {"CPU": sweep.cpus_per_worker}
    if sweep.gpus_per_worker:
        resources["GPU"] = sweep.gpus_per_worker
    return Trainer(
        train_worker,
        train_loop_config={
            "config": nested(config),
            "run_dir": str(context.run_dir(digest)),
            "name": sweep.name,
            "folder": str(sweep.folder),
            # Only a folder that all see says which trial was first to draw them.
            "shares": not address and shares_central_images(config, sweep.replicates),
            "address": address,
            "copy": copy_of_trial(sweep, digest, context.launch) if address else None,
            "launch": context.launch,
            "keeper": context.keeper,
            "verdicts": context.verdicts,
            "trial": digest,
            "tell": tell,
            "gpus": sweep.gpus_per_worker,
            "threads": max(1, int(sweep.cpus_per_worker)),
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=sweep.num_workers,
            use_gpu=sweep.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        run_config=ray.train.RunConfig(
            name=f"{digest}-{context.launch}",
            storage_path=str(sweep.folder / "ray" / "train"),
            callbacks=[_relay(tell), cast(Any, Presence(tell, WAITING))],
            failure_config=ray.train.FailureConfig(max_failures=0, max_preemption_failures=0),
        ),
    )


@cache
def _queue() -> Any:
    """From the controllers of this process's trials to it; an actor, so kept for the next trial.

    Beside this process, as Ray sends actors without resources anywhere: the loss of one trial's
    machine would end another trial.
    """
    import ray
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Queue(maxsize=256, actor_options={"num_cpus": 0, "scheduling_strategy": here})


def _tell(reports: Any, attempt: str, metrics: dict[str, Any]) -> None:
    reports.put((attempt, metrics))


def _relay(tell: Report) -> Any:
    import ray.train

    class Relay(ray.train.UserCallback):
        """Hands rank 0's reports from the Train controller to the trial."""

        def after_report(self, run_context: Any, metrics: list[dict], checkpoint: Any) -> None:
            tell(metrics[0])

    return Relay()


def train_worker(settings: dict[str, Any]) -> None:
    """What each Ray Train worker runs: the core, reporting through Ray.

    A user's error is reported, not raised: it would be the same after a restart. All ranks see
    it, as a report waits for all.
    """
    import ray.train
    import torch

    from core import distributed
    from core.pipeline.context import SweepLink
    from core.pipeline.run import run
    from core.privacy.keys import MasterSecret
    from core.privacy.ledger.account import Spending
    from sweep.trials.keeper import KeptAccount, asking
    from sweep.trials.machine import MachineUse
    from sweep.trials.own_folder import own_folder_of
    from sweep.trials.ray_train import use_own_device

    torch.set_num_threads(settings["threads"])
    folder, launch = Path(settings["folder"]), settings["launch"]

    def account(own: Spending) -> KeptAccount:  # Its notes lie beside the ledger's keeper.
        return KeptAccount(
            replace(own, run_dir=Path(settings["run_dir"])), asking(settings["keeper"])
        )

    def should_continue(progress: float) -> bool:
        verdicts = settings["verdicts"]
        return verdicts is None or ray.get(verdicts.ask.remote(settings["trial"], progress))

    def report(metrics: dict[str, Any]) -> None:
        if own.copy is None:  # Else it finds out where it keeps its folder.
            distributed.on_rank_0(lambda: require_newest_launch(folder, launch))
        elif metrics["stage"] in ENDS:
            distributed.on_rank_0(own.keep)
        ray.train.report(metrics)

    notice = _notice(settings)
    kept = partial(settings["tell"], {"stage": KEPT, "step": 0})
    try:
        with own_folder_of(settings, ray.train.get_context().get_local_rank() == 0, kept) as own:
            distributed.on_all_ranks(lambda: use_own_device(settings["gpus"]))
            run(
                own.config,
                own.path,
                master=distributed.on_all_ranks(lambda: MasterSecret.load(create=False)),
                name=settings["name"],
                report=report,
                link=SweepLink(
                    lease=launch,
                    account=account,
                    charged=folder / "charged",
                    shared=folder / "shared" if settings["shares"] else None,
                    should_continue=should_continue,
                    in_danger=notice,
                    measure=MachineUse(),
                    reading=settings["tell"],  # Ray's own reports wait for all ranks.
                    keep=own.keep,
                ),
            )
    except UserError as error:
        ray.train.report({"refused": str(error), "stage": "refused", "step": 0})
    distributed.leave()


def _notice(settings: dict[str, Any]) -> Callable[[], bool]:
    """Of the machines of all workers; to be called on each."""
    import ray

    from core import distributed
    from sweep.trials.notice import Notice

    nodes = distributed.all_gather_object(ray.get_runtime_context().get_node_id())
    note = "the cloud takes a machine of it away: its state is kept"
    lost = partial(settings["tell"], {"stage": IN_DANGER, "step": 0, "note": note})
    kept = partial(settings["tell"], {"stage": _KEPT_FOR_STOP, "step": 0})
    return Notice(settings["name"], settings["launch"], nodes, lost, kept)


def _reason(error: BaseException, noticed: bool = False) -> str:
    """The line of a nested remote traceback that a person wants to read first."""
    from ray.exceptions import OutOfMemoryError, RayActorError

    if noticed:
        return (
            "the cloud took its machines away, more often than max_preemptions allows: raise that, "
            "or take machines on demand"
        )
    causes = list((getattr(error, "worker_failures", None) or {}).values())
    causes = [getattr(cause, "health_check_failure", cause) for cause in causes]
    # When a process dies, the others fail too, as they lose the connection to it.
    if any(isinstance(cause, RayActorError | OutOfMemoryError) for cause in causes):
        return (
            "a worker's process was killed, more often than max_failures allows; if memory ran out "
            "(the system's log says so), set private_training.max_physical_batch_size=auto or "
            "lower, or give each worker more memory"
        )
    if causes:
        return traceback.format_exception_only(causes[0])[-1].strip()
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
