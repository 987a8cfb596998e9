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
from core.data import Split
from core.device import config_device
from core.diffusion.denoiser import Denoiser
from core.diffusion.ema import Ema
from core.generation.png import write_grid
from core.io.locks import held
from core.io.terminal import Report
from core.privacy.keys import KeyedStream
from core.privacy.mechanisms.central_images import CentralImages, release_central_images
from core.privacy.mechanisms.frequency import FourierFeatures, release_features
from core.privacy.plan.releases import CentralPlan, FrequencyPlan
from core.training.checkpoint import Checkpoints
from core.training.feature_generator import fitted_images
from core.training.loop import AfterStep, Lesson, train, warm_up_stage

_LOG = logging.getLogger("core")
_KEPT = 6
"""States of one trajectory on disk; each is as large as a checkpoint."""
_PATIENCE = 600.0
"""Seconds in which other trials may be drawing or writing the same."""
_DECIDES = ("seed", "model.", "diffusion.", "warm_up.", "training.", "runtime.channels_last")
_LENGTH = "training.num_steps"


def kept_central_images(
    config: Config,
    train_split: Split,
    plan: CentralPlan,
    folder: Path,
    identity: str,
    masks: KeyedStream,
    noise: KeyedStream,
    picture: Path,
) -> CentralImages:
    """The central images of an identity: drawn by the first who asks, the same file ever after.

    Args:
        folder: where they are kept, each identity in a file of its own.
        identity: of the release; `masks` and `noise` are drawn from it.
        picture: receives a grid of them.

    Privacy: one release for all ranks, all trials of the identity and all restarts. Nothing is
        summed a second time, which on another machine could differ in its last digits.
    """

    def keep() -> CentralImages:
        store = Checkpoints(folder, identity, f"{identity[:16]}.pt")
        with held(folder / f"{identity[:16]}.lock", _PATIENCE):
            kept = store.load()
            if kept is None:
                drawn = release_central_images(
                    train_split,
                    config.dataset.num_classes,
                    config.central_images,
                    plan,
                    masks=masks,
                    noise=noise,
                )
                kept = {"images": drawn.images, "labels": drawn.labels}
                store.save(kept)
        central = CentralImages(**kept)
        pixels = (central.images * 255).round().to(torch.uint8)
        write_grid(picture, pixels, central.labels)
        return central

    return distributed.on_rank_0(keep)  # Its errors are everyone's, so that no rank waits.


def kept_frequency_images(
    config: Config,
    train_split: Split,
    plan: FrequencyPlan,
    folder: Path,
    identity: str,
    noise: KeyedStream,
    picture: Path,
) -> Split:
    """The images fitted to the noisy features of a run: made once, the same file ever after.

    Args:
        folder: where features and images are kept.
        identity: of the run; `noise` is drawn from it.
        picture: receives a grid of the images.

    Privacy: one release for all ranks and all restarts; see `kept_central_images`. The images are
        post-processing of it.
    """

    def keep() -> Split:
        store = Checkpoints(folder, identity, f"{identity[:16]}.pt")
        kept = store.load() or {}
        if "images" not in kept:
            features = FourierFeatures(config, config_device(config))
            if "features" not in kept:
                num_classes = config.dataset.num_classes
                released = release_features(train_split, features, num_classes, plan, noise)
                kept = {"features": released}
                store.save(kept)
            _LOG.info("fits a generator to the frequency features")
            fitted = fitted_images(config, features, kept["features"])
            kept |= {"images": fitted.images, "labels": fitted.labels}
            store.save(kept)
        images = Split(kept["images"], kept["labels"])
        write_grid(picture, images.images, images.labels)
        return images

    return distributed.on_rank_0(keep)


def warm_up(
    config: Config,
    denoiser: Denoiser,
    ema: Ema,
    lessons: Sequence[Lesson],
    checkpoints: Checkpoints,
    report: Report,
    trajectory: "Trajectory | None",
    after_step: AfterStep,
    deadline: float,
) -> None:
    """Trains on the lessons, from where another trial of the trajectory left them.

    Args:
        lessons: central images, then those of the frequency stage, as far as there are any.
        after_step: see `train`; not called for the steps that another trial did.
    """
    stage = warm_up_stage(config, denoiser, lessons)
    if trajectory is not None:
        distributed.on_rank_0(lambda: trajectory.start(checkpoints, stage.num_steps))
    train(stage, denoiser, ema, 0, checkpoints, report, config, after_step, deadline)
    if trajectory is not None:
        distributed.on_rank_0(lambda: trajectory.keep(checkpoints))


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
        with held(self.folder / f"{self.identity[:16]}.lock", _PATIENCE):
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
