"""One run, top to bottom: plan, data, easy stage, DP-SGD, generation, scores."""

import json
import logging
import math
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from core import distributed
from core.config import Config, flatten, load_yaml, nested, yaml_subset
from core.data import Split, load_dataset, to_float
from core.device import config_device, device_name
from core.diffusion.denoiser import build_denoiser
from core.diffusion.ema import Ema
from core.diffusion.posthoc_ema import FOLDER as SNAPSHOTS
from core.diffusion.posthoc_ema import keep_snapshot
from core.errors import ConfigError, NotFiniteError, stored
from core.evaluation.features import find_weights
from core.evaluation.private_scores import PrivateScores
from core.evaluation.scoring import score
from core.generation.draw import generate, sample_pictures
from core.generation.png import write_grid
from core.io.locks import held
from core.io.private_files import private_folder, private_opener
from core.io.terminal import (
    FAILED,
    MetricsLog,
    Report,
    log_to,
    numbers,
    read_json,
    report_line,
    write_class_names,
    write_json,
)
from core.privacy.keys import KeyedStream, MasterSecret
from core.privacy.ledger.account import Spending, require_same_data
from core.privacy.plan.plan import PrivacyPlan, kept_plan, make_plan
from core.record.early import ENDED_EARLY, STOPPED, GoesOn, StoppedEarlyError
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
_ENDS = ("evaluation.json", STOPPED)
_ORIGIN = ("fingerprint", "name", "tags", "scored")


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
    measure: Callable[[], dict[str, float]] = dict,
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
        measure: gives what each line of `metrics.jsonl` holds beside the report.

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
    with ExitStack() as stack:
        # In a sweep the holder is a worker of the same trial that was given up.
        lock = held(run_dir / "run.lock", _PATIENCE if lease is None else _SWEEP_PATIENCE)

        def enter() -> None:
            with stored(run_dir):
                stack.enter_context(lock)
                stack.enter_context(log_to("core", run_dir / "run.log"))

        distributed.on_rank_0(enter)
        charged = charged or run_dir / "charged"
        return _run(
            config, run_dir, master, name, report, lease, charged, shared, goes_on, measure, stack
        )


def _run(
    config: Config,
    run_dir: Path,
    master: MasterSecret,
    name: str,
    report: Report,
    lease: int | None,
    charged: Path,
    shared: Path | None,
    goes_on: GoesOn,
    measure: Callable[[], dict[str, float]],
    stack: ExitStack,
) -> dict[str, Any]:
    began = time.monotonic()
    deadline = began + (config.runtime.max_seconds or math.inf)
    begun = distributed.on_rank_0(lambda: _has_begun(run_dir, config))
    plan = distributed.on_rank_0(lambda: _plan_of(run_dir, config, begun))
    if config.evaluation.fid_extractor == "inception":
        distributed.on_rank_0(lambda: find_weights(config.evaluation.inception_weights))
    if not begun:
        distributed.on_rank_0(stored(run_dir)(lambda: _claim(run_dir, config, plan)))
    distributed.on_rank_0(stored(run_dir)(lambda: private_folder(run_dir / "checkpoints")))
    spending = Spending(config, plan, Path(config.runtime.ledger), name, run_dir, charged, lease)
    dataset, cache = None, Path(config.runtime.cache)
    if (fingerprint := distributed.on_rank_0(spending.known_fingerprint)) is None:
        dataset = distributed.together(lambda: load_dataset(config.dataset, cache))
        fingerprint = distributed.broadcast_object(dataset.fingerprint)
    found = identify(config, plan, fingerprint, master.public_id, run_dir, shared)
    identity, changed = found.run, found.changed
    finished = distributed.on_rank_0(lambda: _finished(run_dir, identity, fingerprint))
    if finished is not None:
        same = finished.pop("identity") == identity
        _telling(report, [] if same else [SHOWN.format("; ".join(changed))])(finished)
        return finished
    checkpoints = Checkpoints(run_dir / "checkpoints", identity, changed=changed)
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
            run_dir, identity, lambda: reservation and spending.settle(fingerprint, reservation)
        )
    )
    notes = found.note(run_dir, shared)
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
    plainly, report = report, _logged(report, run_dir, checkpoints, config, measure)
    denoiser = build_denoiser(config).to(config_device(config))
    distributed.broadcast_module(denoiser)
    ema = Ema(denoiser, config.training.ema_decay, config.training.posthoc_ema)
    pictures = sample_pictures(ema.module, config, run_dir / "samples", config_device(config))

    def early_score(model: nn.Module, place: int) -> float:
        noise = stream("evaluation", "noise")
        return early_score_of(config, plan, model, dataset, noise, place + 1)

    early = EarlyScores(config, run_dir, identity, early_score, plainly, report, goes_on)

    def after_step(step: int, model: nn.Module) -> None:
        pictures(step)
        if ema.power is not None:
            keep_snapshot(ema.power, step, config.training.num_steps, run_dir / SNAPSHOTS)
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
            origin = _origin(identity, fingerprint, name, plan, [plan.early_metric, "loss"])
            write_json(run_dir / STOPPED, {**result, **origin}, opener=private_opener)
        result = distributed.broadcast_object(result)
        report(result)
        return result

    lessons: list[Lesson] = []
    if plan.central is not None:
        central = kept_central_images(
            config,
            dataset.train,
            plan.central,
            (shared or run_dir / "checkpoints") / "central_images",
            found.central,
            masks=stream("central_images", "mask"),
            noise=stream("central_images", "noise"),
            picture=run_dir / "central_images" / "grid.png",
        )
        steps = config.warm_up_steps - config.frequency_steps
        lessons.append(Lesson(steps, central.images, central.labels))
    if plan.frequency is not None:
        images = kept_frequency_images(
            config,
            dataset.train,
            plan.frequency,
            run_dir / "checkpoints" / "frequency",
            identity,
            noise=stream("frequency", "noise"),
            picture=run_dir / "frequency" / "grid.png",
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
    kept = run_dir / "synthetic" / f"parts-{identity[:16]}"
    number, device = config.evaluation.num_images, config_device(config)
    synthetic = generate(ema.module, config, number, device, kept, deadline)
    private = None
    if plan.score is not None:
        noise, folder = stream("evaluation", "noise"), run_dir / "dp_scores"
        private = PrivateScores(config, plan, dataset, noise, folder, identity)
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
        origin = _origin(identity, fingerprint, name, plan, metrics)
        origin["scored"] = scores.record
        with stored(run_dir):
            _store(run_dir, synthetic, ema, {**result, **origin})
        shutil.rmtree(kept, ignore_errors=True)

    distributed.on_rank_0(store)
    report(result)
    return result


def _origin(
    identity: str, fingerprint: str, name: str, plan: PrivacyPlan, metrics: Sequence[str]
) -> dict[str, Any]:
    """What a result is kept with: where it came from, and how private its metrics are."""
    tags = {metric: plan.tag(metric) for metric in metrics}
    return {"identity": identity, "fingerprint": fingerprint, "name": name, "tags": tags}


def _has_begun(run_dir: Path, config: Config) -> bool:
    """Whether the folder holds this run; refuses one of another configuration."""
    path = run_dir / "config.yaml"
    if not path.exists():
        if any((run_dir / name).exists() for name in _ENDS):
            raise ConfigError(
                f"'{run_dir}' holds a result without its config.yaml: restore it, or choose a new "
                "run folder"
            )
        return False
    earlier, now = flatten(type(config).model_validate(load_yaml(path))), flatten(config)
    changed = [
        f"{key}: {earlier.get(key)} -> {now[key]}"
        for key in now
        if earlier.get(key) != now[key] and not key.startswith("runtime.")
    ]
    if changed:
        raise ConfigError(
            f"'{run_dir}' holds a run of another configuration ({'; '.join(changed)}): "
            "choose a new run folder"
        )
    return True


def _plan_of(run_dir: Path, config: Config, begun: bool) -> PrivacyPlan:
    if not begun:
        return make_plan(config)
    path = run_dir / "privacy.json"
    try:
        return kept_plan(config, PrivacyPlan.restored(json.loads(path.read_text())))
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"'{path}' cannot be read ({reason}): restore it, or choose a new run folder"
        ) from error


def _claim(run_dir: Path, config: Config, plan: PrivacyPlan) -> None:
    """Writes the plan and, last, the resolved configuration."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / "privacy.json", plan.summary())
    environment = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "device": config_device(config),
        "device_name": device_name(config),
        "world_size": distributed.world_size(),
    }
    write_json(run_dir / "environment.json", environment)
    path = run_dir / "config.yaml"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(yaml_subset.dump(nested(config)))
    temporary.replace(path)


@contextmanager
def _failure_noted(run_dir: Path, identity: str, settle: Callable[[], object]) -> Iterator[None]:
    """Settles what ran, then notes that the run has failed for good."""
    try:
        yield
    except NotFiniteError as error:
        if distributed.rank() == 0:
            settle()
            write_json(run_dir / FAILED, {"identity": identity, "error": str(error)})
        raise


def _finished(run_dir: Path, identity: str, fingerprint: str) -> dict[str, Any] | None:
    """The stored end of the run, with its identity; raises on all ranks what it failed with.

    A result is shown whatever computed it: to train again would be charged again.
    """
    ends = [path for name in (*_ENDS, FAILED) if (path := run_dir / name).exists()]
    if not ends:
        return None
    found = read_json(ends[0])
    if "error" in found:
        if found["identity"] != identity:
            return None  # What other code failed with says nothing of this.
        raise NotFiniteError(found["error"])
    if found["fingerprint"] != fingerprint:
        raise ConfigError(f"'{run_dir}' holds a run on other data: choose a new run folder")
    return numbers({key: value for key, value in found.items() if key not in _ORIGIN})


def _telling(report: Report, notes: list[str]) -> Report:
    """The same, with the notes in the first report."""
    left = [{"note": "; ".join(notes)}] if notes else []
    if distributed.rank() == 0:
        for note in notes:
            _LOG.warning(note)
    return lambda metrics: report({**metrics, **(left.pop() if left else {})})


def _logged(
    report: Report,
    run_dir: Path,
    checkpoints: Checkpoints,
    config: Config,
    measure: Callable[[], dict[str, float]],
) -> Report:
    if distributed.rank() != 0:
        return report
    state = checkpoints.load()
    resumed = 0
    if state is not None:
        offset = config.warm_up_steps if state["stage"] == "private_training" else 0
        resumed = offset + state["step"]
    log = MetricsLog(run_dir / "metrics.jsonl", resumed)
    _LOG.info("begins after step %d of %d", resumed, config.training.num_steps)

    def both(metrics: dict[str, Any]) -> None:
        # Workers may change on a resumption.
        log({**metrics, "workers": distributed.world_size(), **measure()})
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


def _store(run_dir: Path, synthetic: Split, ema: Ema, result: dict[str, Any]) -> None:
    write_grid(run_dir / "synthetic" / "grid.png", synthetic.images, synthetic.labels)
    np.savez_compressed(
        run_dir / "synthetic" / "images.npz",
        images=synthetic.images.numpy(),
        labels=synthetic.labels.numpy(),
    )
    torch.save(ema.module.state_dict(), run_dir / "model.pt")
    write_json(run_dir / "evaluation.json", result, opener=private_opener)
