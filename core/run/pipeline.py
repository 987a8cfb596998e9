"""One run, top to bottom: plan, data, easy stage, DP-SGD, generation, scores."""

import logging
import math
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from core import distributed
from core.config import Config
from core.data import load_dataset, to_float
from core.device import config_device, device_name
from core.diffusion.denoiser import build_denoiser
from core.diffusion.ema import Ema
from core.diffusion.posthoc_ema import keep_snapshot
from core.errors import ConfigError, NotFiniteError, stored
from core.evaluation.features import find_weights
from core.evaluation.private_scores import PrivateScores
from core.evaluation.scoring import score
from core.generation.draw import generate, sample_pictures
from core.generation.png import write_grid
from core.io.files import private_folder, write_whole
from core.io.locks import held
from core.io.terminal import Report, log_to, report_line
from core.privacy.keys import KeyedStream, MasterSecret
from core.privacy.ledger.account import Spending, require_same_data
from core.record.early import ENDED_EARLY, GoesOn, StoppedEarlyError
from core.record.folder import MetricsLog, Result, RunFolder, write_class_names
from core.run.disk_space import require_space
from core.run.early_scores import EarlyScores, early_score_of
from core.run.identity import SHOWN, identify
from core.run.released import kept_central_images, kept_frequency_images, trajectory_of, warm_up
from core.training.checkpoint import Checkpoints
from core.training.loop import Lesson, non_private_stage, private_stage, train

_LOG = logging.getLogger("core")
_PATIENCE = 15.0
"""Seconds in which a worker that was given up by its supervisor may still let the folder go."""
_SWEEP_PATIENCE = 120.0


def run(
    config: Config,
    run_dir: Path,
    *,
    master: MasterSecret,
    name: str,
    report: Report,
    lease: int | None = None,
    charged: Path | None = None,
    shared: Path | None = None,
    goes_on: GoesOn = lambda _: True,
) -> dict[str, Any]:
    """Trains, generates and scores one model; call it on every rank of a process group.

    A finished run returns its stored result, one that failed for good raises its error again; an
    interrupted one goes on from its checkpoint, replaying the same masks and noise, so it releases
    nothing new. What must be the same for that, and what a replay may differ in, see
    `core.run.identity`.

    Args:
        run_dir: folder that all ranks see; receives everything the run writes.
        master: root of all keys.
        name: of the sweep or the single run, in the ledger.
        report: called on all ranks with the same metrics: `step`, `stage` and numbers.
        lease: token of the driver that started this; the ledger refuses older ones of a sweep.
        charged: folder in which the trials of a sweep note that their data set's ledger was begun.
        shared: folder of a sweep whose trials with the same central images have them from one
            release, which is charged once, and share one warm-up; None: the run has its own.
        goes_on: asked after each early score; a run that is stopped by it pays for what it ran.

    Returns:
        The last reported metrics: scores, epsilons, noise multiplier and seconds.

    Raises:
        InfeasibleError: the budget of the trial or of the data set cannot pay; nothing ran.
        ConfigError: the folder holds a run of another configuration, a checkpoint of other code or
            packages, or another process runs it.
        DataError: the data set is missing, malformed or not what the configuration states.
        NotFiniteError: the training diverged, or its images or scores are not finite; what ran is
            settled, and nothing of it is a result.
    """
    folder = RunFolder(run_dir)
    with ExitStack() as stack:
        # In a sweep the holder is a worker of the same trial that was given up.
        lock = held(folder.lock, _PATIENCE if lease is None else _SWEEP_PATIENCE)

        def enter() -> None:
            with stored(run_dir):
                stack.enter_context(lock)
                stack.enter_context(log_to("core", folder.log))

        distributed.on_rank_0(enter)
        charged = charged or folder.charged
        return _run(config, folder, master, name, report, lease, charged, shared, goes_on, stack)


def _run(
    config: Config,
    folder: RunFolder,
    master: MasterSecret,
    name: str,
    report: Report,
    lease: int | None,
    charged: Path,
    shared: Path | None,
    goes_on: GoesOn,
    stack: ExitStack,
) -> dict[str, Any]:
    began, run_dir = time.monotonic(), folder.path
    deadline = began + (config.runtime.max_seconds or math.inf)
    plan, begun = distributed.on_rank_0(lambda: folder.agreed_plan(config))
    if config.evaluation.fid_extractor == "inception":
        distributed.on_rank_0(lambda: find_weights(config.evaluation.inception_weights))
    if not begun:
        environment = _environment(config)
        distributed.on_rank_0(lambda: folder.claim(config, plan, environment))
    distributed.on_rank_0(stored(run_dir)(lambda: private_folder(folder.checkpoints)))
    spending = Spending(config, plan, Path(config.runtime.ledger), name, run_dir, charged, lease)
    dataset, cache = None, Path(config.runtime.cache)
    if (fingerprint := distributed.on_rank_0(spending.known_fingerprint)) is None:
        dataset = distributed.together(lambda: load_dataset(config.dataset, cache))
        fingerprint = distributed.broadcast_object(dataset.fingerprint)
    found = identify(config, plan, fingerprint, master.public_id, folder, shared)
    identity, changed = found.run, found.changed
    finished = distributed.on_rank_0(lambda: _finished(folder, identity, fingerprint))
    if finished is not None:
        same = finished.identity == identity
        _telling(report, [] if same else [SHOWN.format("; ".join(changed))])(finished.report)
        return finished.report
    checkpoints = Checkpoints(folder.checkpoints, identity, changed=changed)
    distributed.on_rank_0(checkpoints.check)  # Refused before it is charged.
    distributed.on_rank_0(lambda: require_space(run_dir, config))
    reservation = None
    if plan.is_private:
        reservation = distributed.on_rank_0(
            lambda: spending.reserve(
                fingerprint, identity, found.shared_central, _private_steps(checkpoints)
            )
        )
    stack.enter_context(
        _failure_noted(
            folder, identity, lambda: reservation and spending.settle(fingerprint, reservation)
        )
    )
    notes = found.note(folder, shared)
    dataset = dataset or distributed.together(lambda: load_dataset(config.dataset, cache))
    read, names = dataset.fingerprint, dataset.class_names
    distributed.together(lambda: require_same_data(fingerprint, read, config))
    distributed.on_rank_0(stored(run_dir)(lambda: write_class_names(run_dir, names)))
    distributed.on_rank_0(lambda: spending.remember(fingerprint))

    def stream(stage: str, purpose: str) -> KeyedStream:
        trial = found.central if stage == "central_images" else identity
        return KeyedStream(
            master.derive(fingerprint=fingerprint, trial=trial, stage=stage, purpose=purpose)
        )

    report = _telling(report, notes)
    plainly, report = report, _logged(report, folder, checkpoints, config)
    denoiser = build_denoiser(config).to(config_device(config))
    distributed.broadcast_module(denoiser)
    ema = Ema(denoiser, config.training.ema_decay, config.training.posthoc_ema)
    pictures = sample_pictures(ema.module, config, folder.samples, config_device(config))

    def early_score(model: nn.Module, place: int) -> float:
        noise = stream("evaluation", "noise")
        return early_score_of(config, plan, model, dataset, noise, place + 1)

    early = EarlyScores(config, folder, identity, early_score, plainly, report, goes_on)

    def after_step(step: int, model: nn.Module) -> None:
        pictures(step)
        if ema.power is not None:
            keep_snapshot(ema.power, step, config.training.num_steps, folder.snapshots)
        early(step, model)

    def stopped(end: StoppedEarlyError) -> dict[str, Any]:
        """Pays for what ran; a run that was stopped never goes on."""
        result = None
        if distributed.rank() == 0:
            steps = spending.settle(fingerprint, reservation) if reservation is not None else 0
            result = {
                "step": end.step,
                "stage": ENDED_EARLY,
                **early.at(end.step),
                "epsilon": plan.epsilon_after(steps),
                "noise_multiplier": plan.noise_multiplier,
                "seconds": time.monotonic() - began,
            }
            tags = {metric: plan.tag(metric) for metric in (plan.early_metric, "loss")}
            folder.end(Result(result, identity, fingerprint, name, tags))
        result = distributed.broadcast_object(result)
        report(result)
        return result

    lessons: list[Lesson] = []
    if plan.central is not None:
        central = kept_central_images(
            config,
            dataset.train,
            plan.central,
            (shared or folder.checkpoints) / "central_images",
            found.central,
            masks=stream("central_images", "mask"),
            noise=stream("central_images", "noise"),
            picture=folder.central_grid,
        )
        steps = config.warm_up_steps - config.frequency_steps
        lessons.append(Lesson(steps, central.images, central.labels))
    if plan.frequency is not None:
        images = kept_frequency_images(
            config,
            dataset.train,
            plan.frequency,
            folder.checkpoints / "frequency",
            identity,
            noise=stream("frequency", "noise"),
            picture=folder.frequency_grid,
        )
        lessons.append(Lesson(config.frequency_steps, to_float(images.images), images.labels))
    if lessons and not _is_past_warm_up(checkpoints):
        trajectory = None
        if shared is not None and plan.frequency is None:  # Whose images are a trial's own.
            trajectory = trajectory_of(shared, config, found.central)
        try:
            warm_up(
                config,
                denoiser,
                ema,
                lessons,
                checkpoints,
                report,
                trajectory,
                after_step,
                deadline,
            )
        except StoppedEarlyError as end:
            return stopped(end)

    def count(step: int) -> None:
        if spending.begins_block(step):  # On all ranks, as all must stop where it cannot be noted.
            distributed.on_rank_0(lambda: spending.count(step))

    if plan.is_private:
        stage = private_stage(
            config,
            denoiser,
            dataset.train,
            plan.dp_sgd,
            masks=stream("private_training", "mask"),
            noise=stream("private_training", "noise"),
            before_step=count,
        )
    else:
        masks = stream("non_private_training", "mask")
        stage = non_private_stage(config, denoiser, dataset.train, plan.dp_sgd, masks)
    try:
        offset = config.warm_up_steps
        train(stage, denoiser, ema, offset, checkpoints, report, config, after_step, deadline)
    except StoppedEarlyError as end:
        return stopped(end)
    finally:
        if reservation is not None and distributed.rank() == 0:
            spending.settle(fingerprint, reservation)

    report({"step": config.training.num_steps, "stage": "evaluation"})
    kept = folder.parts(identity)
    number, device = config.evaluation.num_images, config_device(config)
    synthetic = generate(ema.module, config, number, device, kept, deadline)
    private = None
    if plan.score is not None:
        noise = stream("evaluation", "noise")
        private = PrivateScores(config, plan, dataset, noise, folder.private_scores, identity)
    scores = score(config, synthetic, dataset, device, master, private)
    result = {
        "step": config.training.num_steps,
        "stage": "done",
        **scores.values,
        "epsilon": plan.epsilon,
        "epsilon_central": plan.epsilon_central,
        "epsilon_frequency": plan.epsilon_frequency,
        "epsilon_dp_sgd": plan.epsilon_dp_sgd,
        "noise_multiplier": plan.noise_multiplier,
        "seconds": time.monotonic() - began,
    }
    result = distributed.broadcast_object(result)  # One clock: that of rank 0.

    def store() -> None:
        metrics = [*scores.values, *filter(None, [plan.early_metric]), "loss"]
        tags = {metric: plan.tag(metric) for metric in metrics}
        with stored(run_dir):
            write_grid(folder.grid, synthetic.images, synthetic.labels)
            synthetic.write(folder.images)
            write_whole(folder.model, partial(torch.save, ema.module.state_dict()))
        folder.end(Result(result, identity, fingerprint, name, tags, scores.record))
        shutil.rmtree(kept, ignore_errors=True)

    distributed.on_rank_0(store)
    report(result)
    return result


def _environment(config: Config) -> dict[str, Any]:
    """What a run begins on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "device": config_device(config),
        "device_name": device_name(config),
        "world_size": distributed.world_size(),
    }


@contextmanager
def _failure_noted(
    folder: RunFolder, identity: str, settle: Callable[[], object]
) -> Iterator[None]:
    """Settles what ran, then notes that the run has failed for good."""
    try:
        yield
    except NotFiniteError as error:
        if distributed.rank() == 0:
            settle()
            folder.fail(identity, str(error))
        raise


def _finished(folder: RunFolder, identity: str, fingerprint: str) -> Result | None:
    """How the run ended; raises what it failed with.

    A result is shown whatever computed it: to train again would be charged again.
    """
    if (result := folder.result()) is None:
        # What other code failed with says nothing of this.
        if (failure := folder.failure()) is not None and failure[0] == identity:
            raise NotFiniteError(failure[1])
    elif result.fingerprint != fingerprint:
        raise ConfigError(f"'{folder.path}' holds a run on other data: choose a new run folder")
    return result


def _telling(report: Report, notes: list[str]) -> Report:
    """The same, with the notes in the first report."""
    left = [{"note": "; ".join(notes)}] if notes else []
    if distributed.rank() == 0:
        for note in notes:
            _LOG.warning(note)
    return lambda metrics: report({**metrics, **(left.pop() if left else {})})


def _logged(report: Report, folder: RunFolder, checkpoints: Checkpoints, config: Config) -> Report:
    if distributed.rank() != 0:
        return report
    state = checkpoints.load()
    resumed = 0
    if state is not None:
        offset = config.warm_up_steps if state["stage"] == "private_training" else 0
        resumed = offset + state["step"]
    log = MetricsLog(folder, resumed)
    _LOG.info("begins after step %d of %d", resumed, config.training.num_steps)

    def both(metrics: dict[str, Any]) -> None:
        log({**metrics, "workers": distributed.world_size()})  # Which may change on a resumption.
        _LOG.info(report_line(metrics, config.training.num_steps))
        report(metrics)

    return both


def _is_past_warm_up(checkpoints: Checkpoints) -> bool:
    state = distributed.on_rank_0(checkpoints.load)
    return state is not None and state["stage"] == "private_training"


def _private_steps(checkpoints: Checkpoints) -> int:
    """DP-SGD steps whose outcome the checkpoint holds."""
    state = checkpoints.load()
    return state["step"] if state is not None and state["stage"] == "private_training" else 0
