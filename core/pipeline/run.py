"""One run, top to bottom: plan, data, easy stage, DP-SGD, generation, scores."""

import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from core import distributed
from core.config import Config, load, nested
from core.data import Dataset, Split, load_dataset
from core.device import config_device, device_name
from core.diffusion.denoiser import MomentsDenoiser, build_denoiser
from core.diffusion.ema import Ema
from core.diffusion.posthoc_ema import keep_snapshot
from core.errors import ConfigError, NotFiniteError, storage_errors
from core.evaluation.features import find_weights
from core.evaluation.private_scores import PrivateScores
from core.evaluation.scoring import score
from core.generation.draw import generate, sample_pictures
from core.generation.png import write_grid
from core.io.files import private_folder, write_whole
from core.io.locks import locked
from core.io.terminal import Report, log_to
from core.pipeline.context import ALONE, Reporter, Run, SweepLink
from core.pipeline.disk_space import require_space
from core.pipeline.early_scores import EarlyScores
from core.pipeline.identity import SHOWN, identify
from core.pipeline.released import kept_gaussians, released_data, released_model, warm_up
from core.privacy.keys import MasterSecret
from core.privacy.ledger.account import Spending, require_same_data
from core.privacy.plan.plan import PrivacyPlan
from core.record.early import ENDED_EARLY, StoppedEarlyError
from core.record.folder import Result, RunFolder, write_class_names
from core.training.loop import Loop, Model, Observer, Stage
from core.training.stages import non_private_stage, private_stage

_LOCK_TIMEOUT_S = 15.0
"""Seconds in which a worker that was given up by its supervisor may still let the folder go."""
_SWEEP_LOCK_TIMEOUT_S = 120.0


def run(
    config: Config,
    run_dir: Path,
    *,
    master: MasterSecret,
    name: str,
    report: Report,
    link: SweepLink = ALONE,
) -> dict[str, Any]:
    """Trains, generates and scores one model; call it on every rank of a process group.

    A finished run returns its stored result, one that failed for good raises its error again; an
    interrupted one goes on from its checkpoint, replaying the same masks and noise, so it releases
    nothing new. What must be the same for that, and what a replay may differ in, see
    `core.pipeline.identity`.

    Args:
        run_dir: folder that all ranks see; receives everything the run writes.
        master: root of all keys.
        name: of the sweep or the single run, in the ledger.
        report: called on all ranks with the same metrics: `step`, `stage` and numbers; while data
            are decoded, without a `link` that is told of it, by the rank that does.
        link: to the sweep that the run is a trial of.

    Returns:
        The last reported metrics: scores, epsilons, noise multiplier and seconds.

    Raises:
        InfeasibleError: the budget of the trial or of the data set cannot pay; nothing ran.
        ConfigError: the folder holds a run of another configuration, a checkpoint of other code or
            packages, or another process runs it; the scope is that of a sweep's trials, which the
            sweep alone counts, and there is no `link`.
        DataError: the data set is missing, malformed or not what the configuration states.
        NotFiniteError: the training diverged, or its images or scores are not finite; what ran is
            settled, and nothing of it is a result.
    """
    if link is ALONE and (config.privacy.covers.is_secret or config.privacy.covers.tunes_first):
        raise ConfigError(
            f"privacy.scope={config.privacy.scope!r}: one run alone is no search; run a sweep, or "
            "choose another scope"
        )
    folder = RunFolder(run_dir)
    with _opened(folder, link):
        reporter = Reporter(report, config.training.num_steps, link)
        current, dataset = _planned(config, folder, master, name, reporter, link)
        if (ended := distributed.on_rank_0(lambda: _ended(current))) is not None:
            return _told_again(current, ended)
        current = _charged(current)
        with _failure_noted(current):
            dataset = _loaded(current, dataset)
            try:
                made = _released if config.trains_nothing else _trained
                model = made(current, dataset)
            except StoppedEarlyError as stop:
                return _stopped(current, stop)
            return _published(current, dataset, model)


def rehearse(
    config: Config, plan: PrivacyPlan, images: Split, folder: Path, report: Report
) -> Split:
    """The images that a run of the plan draws after training on made-up images, kept in memory.

    It has keys of its own and is charged like any run, to a ledger of its own. It opens no data
    set, and draws the public seed anew, so that nothing depends on the places of the images.

    Args:
        plan: of the run; a record of its N that is not among the images is an empty one.
        images: any number of them, which stand in place of the training images.
        folder: receives all that it writes; to be removed afterwards.
    """
    changes = {
        **{"runtime.ledger": str(folder / "ledger"), "runtime.max_seconds": None},
        **{"runtime.num_pictures": 0, "early_scores.at": [], "dataset.family": None},
        **{"privacy.scope": "trial", "privacy.data_set_budget": None},
        "seed": int.from_bytes(os.urandom(7), "big"),
    }
    config, place = load(nested(config), changes), RunFolder(folder)
    master, made_up = MasterSecret(os.urandom(32)), os.urandom(32).hex()
    account = Spending(config, plan, folder / "ledger", folder.name, folder, place.charged)
    identity = identify(config, plan, made_up, master.public_id, place, None)
    reporter, began = Reporter(report, config.training.num_steps), time.monotonic()
    run = Run(
        config, plan, place, identity, account, made_up, master, folder.name, reporter, ALONE, began
    )
    made = _released if config.trains_nothing else _trained
    model = made(_charged(run), Dataset(images, images, made_up))
    return generate(model, config, config.evaluation.num_images, run.device)


@contextmanager
def _opened(folder: RunFolder, link: SweepLink) -> Iterator[None]:
    """Holds the folder and logs into it, on rank 0."""
    with ExitStack() as stack:
        # In a sweep the holder is a worker of the same trial that was given up.
        lock = locked(folder.lock, _LOCK_TIMEOUT_S if link.lease is None else _SWEEP_LOCK_TIMEOUT_S)

        def enter() -> None:
            with storage_errors(folder.path):
                stack.enter_context(lock)
                stack.enter_context(log_to("core", folder.log))

        distributed.on_rank_0(enter)
        yield


def _planned(
    config: Config,
    folder: RunFolder,
    master: MasterSecret,
    name: str,
    report: Reporter,
    link: SweepLink,
) -> tuple[Run, Dataset | None]:
    """What the run is, and its data set where only that tells; nothing is charged or drawn yet."""
    began = time.monotonic()
    plan, begun = distributed.on_rank_0(lambda: folder.agreed_plan(config))
    if config.evaluation.fid_extractor == "inception":
        distributed.on_rank_0(lambda: find_weights(config.evaluation.inception_weights))
    if not begun:
        distributed.on_rank_0(lambda: folder.claim(config, plan, _environment(config)))
    distributed.on_rank_0(storage_errors(folder.path)(lambda: private_folder(folder.checkpoints)))
    ledger, charged = Path(config.runtime.ledger), link.charged or folder.charged
    account = link.account(Spending(config, plan, ledger, name, folder.path, charged, link.lease))
    dataset = None
    if (fingerprint := distributed.on_rank_0(account.known_fingerprint)) is None:
        dataset = _read(config, report)
        fingerprint = distributed.broadcast_object(dataset.fingerprint)
    identity = identify(config, plan, fingerprint, master.public_id, folder, link.shared)
    return Run(
        config, plan, folder, identity, account, fingerprint, master, name, report, link, began
    ), dataset


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


def _read(config: Config, report: Reporter) -> Dataset:
    cache = Path(config.runtime.cache)
    return distributed.on_all_ranks(lambda: load_dataset(config.dataset, cache, report.reading))


def _ended(run: Run) -> Result | None:
    """How the run ended before; raises what it failed with.

    A result is shown whatever computed it: to train again would be charged again.
    """
    if (result := run.folder.result()) is None:
        # What other code failed with says nothing of this.
        if (failure := run.folder.failure()) is not None and failure[0] == run.identity.run:
            raise NotFiniteError(failure[1])
    elif result.fingerprint != run.fingerprint:
        raise ConfigError(f"'{run.folder.path}' holds a run on other data: choose a new run folder")
    return result


def _told_again(run: Run, ended: Result) -> dict[str, Any]:
    if ended.identity != run.identity.run:
        run.report.note([SHOWN.format("; ".join(run.identity.changed))])
    run.report.tell(ended.report)
    return ended.report


def _charged(run: Run) -> Run:
    """The run with its reservation; refused before that is what could not go on or be stored."""
    reached = stage, step = distributed.on_rank_0(run.checkpoints.reached)
    distributed.on_rank_0(lambda: require_space(run.folder.path, run.config))
    if not run.plan.is_private:
        return replace(run, reached=reached)
    resumed = step if stage == "private_training" else 0
    identity = run.identity
    distributed.on_rank_0(run.link.keep)  # Its origin: another one would be charged again.
    reservation = distributed.on_rank_0(
        lambda: run.account.reserve(run.fingerprint, identity.run, identity.shared_central, resumed)
    )
    return replace(run, reservation=reservation, reached=reached)


@contextmanager
def _failure_noted(run: Run) -> Iterator[None]:
    """Settles what ran, then notes that the run has failed for good."""
    try:
        yield
    except NotFiniteError as error:
        if distributed.rank() == 0:
            run.commit()
            run.folder.fail(run.identity.run, str(error))
        raise


def _loaded(run: Run, dataset: Dataset | None) -> Dataset:
    """The data set, which is opened only now, and is the one that was charged."""
    run.report.note(run.identity.note(run.folder, run.link.shared))
    found = dataset or _read(run.config, run.report)
    distributed.on_all_ranks(
        lambda: require_same_data(run.fingerprint, found.fingerprint, run.config)
    )
    path = run.folder.path
    distributed.on_rank_0(storage_errors(path)(lambda: write_class_names(path, found.class_names)))
    distributed.on_rank_0(lambda: run.account.remember(run.fingerprint))
    stage, step = run.reached
    offset = run.config.warm_up_steps if stage == "private_training" else 0
    run.report.begin_log(run.folder, offset + step)
    return found


def _released(run: Run, dataset: Dataset) -> nn.Module:
    """What a method without training draws with."""
    try:
        return released_model(run, dataset.train)
    finally:
        run.commit()


def _trained(run: Run, dataset: Dataset) -> nn.Module:
    """The averaged model after both stages; what ran of DP-SGD is settled however it ends."""
    config, training = run.config, run.config.training
    denoiser, gaussians = build_denoiser(config), None
    if isinstance(denoiser, MomentsDenoiser) and run.plan.moments is not None:
        denoiser.gaussians = gaussians = kept_gaussians(run, dataset.train, run.plan.moments)
    data = released_data(run, dataset.train, gaussians)
    denoiser = denoiser.to(run.device)
    distributed.broadcast_module(denoiser)
    model = Model(denoiser, Ema(denoiser, training.ema_decay, training.posthoc_ema))
    observers = _observers(run, model, dataset)
    danger = run.link.in_danger
    loop = Loop(config, model, run.checkpoints, run.report, observers, run.deadline, danger)
    if data and run.reached[0] != "private_training":
        warm_up(run, loop, data)
    stage = _hard_stage(run, model, dataset.train)
    try:
        loop.run(stage)
    finally:
        run.commit()
    return model.ema.module


def _observers(run: Run, model: Model, dataset: Dataset) -> list[Observer]:
    """Pictures, snapshots of averages, and early scores, which may stop the run."""
    ema, num_steps = model.ema, run.config.training.num_steps
    observers = [sample_pictures(ema.module, run.config, run.folder.samples, run.device)]
    if (averages := ema.power) is not None:
        snapshots = run.folder.snapshots
        observers.append(lambda step: keep_snapshot(averages, step, num_steps, snapshots))
    return [*observers, EarlyScores(run, model, dataset)]


def _hard_stage(run: Run, model: Model, images: Split) -> Stage:
    """DP-SGD, or what stands for it in a run without privacy."""
    config, denoiser, plan = run.config, model.denoiser, run.plan.dp_sgd
    if not run.plan.is_private:
        masks = run.stream("non_private_training", "mask")
        return non_private_stage(config, denoiser, images, plan, masks)
    return private_stage(
        config,
        denoiser,
        images,
        plan,
        masks=run.stream("private_training", "mask"),
        noise=run.stream("private_training", "noise"),
        before_step=run.count,
    )


def _stopped(run: Run, stop: StoppedEarlyError) -> dict[str, Any]:
    """Pays for what ran; a run that was stopped never goes on."""
    plan, steps = run.plan, distributed.on_rank_0(run.commit)
    result = {
        "step": stop.step,
        "stage": ENDED_EARLY,
        **stop.scores,
        "epsilon": plan.epsilon_after(steps),
        "noise_multiplier": plan.noise_multiplier,
        "seconds": run.seconds,
    }
    return run.end(result, [plan.early_metric, "loss"])


def _published(run: Run, dataset: Dataset, model: nn.Module) -> dict[str, Any]:
    """Draws and scores the images, and keeps them with the model."""
    config, plan, folder = run.config, run.plan, run.folder
    run.report({"step": config.training.num_steps, "stage": "evaluation"})
    number, parts = config.evaluation.num_images, folder.parts(run.identity.run)
    synthetic = generate(model, config, number, run.device, parts, run.deadline)
    private = None
    if plan.score is not None:
        noise, kept = run.stream("evaluation", "noise"), folder.private_scores
        private = PrivateScores(config, plan, dataset, noise, kept, run.identity.run, run.link.keep)
    scores = score(config, synthetic, dataset, run.device, run.master, private)
    result = {
        "step": config.training.num_steps,
        "stage": "done",
        **scores.values,
        "epsilon": plan.epsilon,
        "epsilon_central": plan.epsilon_central,
        "epsilon_frequency": plan.epsilon_frequency,
        "epsilon_dp_sgd": plan.epsilon_dp_sgd,
        "noise_multiplier": plan.noise_multiplier,
        "seconds": run.seconds,
    }

    def keep() -> None:
        with storage_errors(folder.path):
            write_grid(folder.grid, synthetic.images, synthetic.labels)
            synthetic.write(folder.images)
            write_whole(folder.model, partial(torch.save, model.state_dict()))
        shutil.rmtree(parts, ignore_errors=True)

    distributed.on_rank_0(keep)
    metrics = [*scores.values, *filter(None, [plan.early_metric]), "loss"]
    return run.end(result, metrics, scores.record)
