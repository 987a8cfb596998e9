"""The easy stage: what it trains on, drawn once, and the warm-up, which trials may share.

Each optimisation step of the warm-up is a function of the state before it and its number, so a
trial that starts from another's state of step s ends where it would have ended alone.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from core import distributed
from core.config import Config, flatten
from core.data import Split, to_float
from core.generation.png import write_grid
from core.io.locks import locked
from core.privacy.mechanisms.central_images import CentralImages, release_central_images
from core.privacy.mechanisms.frequency import FourierFeatures, release_features
from core.privacy.plan.releases import CentralPlan, FrequencyPlan
from core.run.context import Run
from core.training.checkpoint import Checkpoints
from core.training.feature_generator import fitted_images
from core.training.loop import Loop
from core.training.stages import WarmUpData, warm_up_stage

_LOG = logging.getLogger("core")
_KEPT = 6
"""States of one trajectory on disk; each is as large as a checkpoint."""
_LOCK_TIMEOUT_S = 600.0
"""Seconds in which other trials may be drawing or writing the same."""
_DECIDES = ("seed", "model.", "diffusion.", "warm_up.", "training.", "runtime.channels_last")
_LENGTH = "training.num_steps"


def released_lessons(run: Run, images: Split) -> list[WarmUpData]:
    """What the easy stage trains on: central images, then those of the frequency stage, if any."""
    config, plan, lessons = run.config, run.plan, list[WarmUpData]()
    if plan.central is not None:
        central = kept_central_images(run, images, plan.central)
        steps = config.warm_up_steps - config.frequency_steps
        lessons.append(WarmUpData(steps, central.images, central.labels))
    if plan.frequency is not None:
        fitted = kept_frequency_images(run, images, plan.frequency)
        lessons.append(WarmUpData(config.frequency_steps, to_float(fitted.images), fitted.labels))
    return lessons


def kept_central_images(run: Run, images: Split, plan: CentralPlan) -> CentralImages:
    """The central images of an identity: drawn by the first who asks, the same file ever after.

    Privacy: one release for all ranks, all trials of the identity and all restarts. Nothing is
        summed a second time, which on another machine could differ in its last digits.
    """
    folder = (run.link.shared or run.folder.checkpoints) / "central_images"
    store = _store(folder, run.identity.central)

    def keep() -> CentralImages:
        with locked(store.path.with_suffix(".lock"), _LOCK_TIMEOUT_S):
            kept = store.load()
            if kept is None:
                drawn = release_central_images(
                    images,
                    run.config.dataset.num_classes,
                    run.config.central_images,
                    plan,
                    masks=run.stream("central_images", "mask"),
                    noise=run.stream("central_images", "noise"),
                )
                kept = {"images": drawn.images, "labels": drawn.labels}
                store.save(kept)
        central = CentralImages(**kept)
        pixels = (central.images * 255).round().to(torch.uint8)
        write_grid(run.folder.central_grid, pixels, central.labels)
        return central

    return distributed.on_rank_0(keep)  # Its errors are everyone's, so that no rank waits.


def kept_frequency_images(run: Run, images: Split, plan: FrequencyPlan) -> Split:
    """The images fitted to the noisy features of a run: made once, the same file ever after.

    Privacy: one release for all ranks and all restarts; see `kept_central_images`. The images are
        post-processing of it.
    """
    config = run.config
    store = _store(run.folder.checkpoints / "frequency", run.identity.run)

    def keep() -> Split:
        kept = store.load() or {}
        if "images" not in kept:
            features = FourierFeatures(config, run.device)
            if "features" not in kept:
                num_classes, noise = config.dataset.num_classes, run.stream("frequency", "noise")
                kept = {"features": release_features(images, features, num_classes, plan, noise)}
                store.save(kept)
            _LOG.info("fits a generator to the frequency features")
            fitted = fitted_images(config, features, kept["features"])
            kept |= {"images": fitted.images, "labels": fitted.labels}
            store.save(kept)
        found = Split(kept["images"], kept["labels"])
        write_grid(run.folder.frequency_grid, found.images, found.labels)
        return found

    return distributed.on_rank_0(keep)


def _store(folder: Path, identity: str) -> Checkpoints:
    """Where a release is kept, each identity in a file of its own."""
    return Checkpoints(folder, identity, f"{identity[:16]}.pt")


def warm_up(run: Run, loop: Loop, lessons: Sequence[WarmUpData]) -> None:
    """Trains on the lessons, from where another trial of the trajectory left them.

    Observers are not called for the steps that another trial did.
    """
    stage = warm_up_stage(run.config, loop.model.denoiser, lessons)
    shared, trajectory = run.link.shared, None
    if shared is not None and run.plan.frequency is None:  # Whose images are a trial's own.
        trajectory = trajectory_of(shared, run.config, run.identity.central)
        distributed.on_rank_0(lambda: trajectory.start(loop.checkpoints, stage.num_steps))
    loop.run(stage)
    if trajectory is not None:
        distributed.on_rank_0(lambda: trajectory.keep(loop.checkpoints))


@dataclass
class Trajectory:
    """The kept states of the warm-up on certain central images with certain settings.

    Args:
        folder: that trials share; `<step>.pt` lie in a folder of it for each trajectory.
        identity: of the trajectory, see `trajectory_of`.

    Privacy: post-processing of the central images alone.
    """

    folder: Path
    identity: str

    def start(self, checkpoints: Checkpoints, num_steps: int) -> None:
        """Lets a run that has not begun go on from the latest state within its warm-up."""
        if checkpoints.load() is not None:
            return
        usable = [step for step in self._steps() if step <= num_steps]
        state = self._at(max(usable)).load() if usable else None
        if state is not None:  # Another trial may have put a better one in its place.
            checkpoints.save(state)

    def keep(self, checkpoints: Checkpoints) -> None:
        """Keeps the state with which a run ends its warm-up."""
        state = checkpoints.load()
        assert state is not None
        with locked(self.folder / f"{self.identity[:16]}.lock", _LOCK_TIMEOUT_S):
            if state["step"] not in self._steps():
                self._at(state["step"]).save(state)
            steps = self._steps()
            if len(steps) > _KEPT:  # The one that saves the fewest steps goes; never the longest.
                gaps = zip(steps[:-1], [0, *steps], strict=False)
                least = min(gaps, key=lambda gap: gap[0] - gap[1])[0]
                self._at(least).path.unlink()

    def _at(self, step: int) -> Checkpoints:
        return Checkpoints(self.folder / self.identity[:16], self.identity, f"{step}.pt")

    def _steps(self) -> list[int]:
        found = (self.folder / self.identity[:16]).glob("*.pt")
        return sorted(int(path.stem) for path in found)


def trajectory_of(folder: Path, config: Config, central: str) -> Trajectory:
    """The trajectory of a run.

    Args:
        folder: that the trials of a sweep share.
        central: identity of the central images.
    """
    settings: dict[str, Any] = {
        key: value
        for key, value in flatten(config).items()
        if key.startswith(_DECIDES) and key != _LENGTH
    }
    # Other ranks sum in another order: equal only to rounding.
    parts = [settings, central, distributed.world_size()]
    text = json.dumps(parts, sort_keys=True)
    return Trajectory(folder / "warm_up", hashlib.sha256(text.encode()).hexdigest())
