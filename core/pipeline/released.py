"""The easy stage: what it trains on, drawn once, and the warm-up, which trials may share.

Each optimisation step of the warm-up is a function of the state before it and its number, so a
trial that starts from another's state of step s ends where it would have ended alone.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from core import distributed
from core.config import Config, flatten
from core.data import Split, to_float
from core.diffusion.gaussians import Gaussians
from core.generation.png import write_grid
from core.io.locks import locked
from core.pipeline.context import Run
from core.privacy.mechanisms.central_images import CentralImages, release_central_images
from core.privacy.mechanisms.frequency import FourierFeatures, release_features
from core.privacy.mechanisms.moments import Moments, release_moments
from core.privacy.plan.releases import CentralPlan, FrequencyPlan, MomentsPlan
from core.training.checkpoint import Checkpoints
from core.training.class_gaussians import drawn_images, gaussians_of, pictures_of
from core.training.feature_generator import AuxiliaryGenerator, fitted_images
from core.training.loop import Loop
from core.training.stages import WarmUpData, warm_up_stage

_LOG = logging.getLogger("core")
_KEPT = 6
"""States of one trajectory on disk; each is as large as a checkpoint."""
_LOCK_TIMEOUT_S = 600.0
"""Seconds in which other trials may be drawing or writing the same."""
_DECIDES = ("seed", "model.", "diffusion.", "warm_up.", "training.", "runtime.channels_last")
_LENGTH = "training.num_steps"


def released_data(run: Run, images: Split, gaussians: Gaussians | None) -> list[WarmUpData]:
    """What the easy stage trains on: central images, then those of the frequency stage, if any.

    Args:
        gaussians: of released moments, of which images are drawn in place of central ones.
    """
    config, plan, data = run.config, run.plan, list[WarmUpData]()
    steps = config.warm_up_steps - config.frequency_steps
    if plan.central is not None:
        central = kept_central_images(run, images, plan.central)
        data.append(WarmUpData(steps, central.images, central.labels))
    elif gaussians is not None and steps:
        data.append(WarmUpData(steps, *drawn_images(config, gaussians)))
    if plan.frequency is not None:
        fitted, _ = kept_frequency_images(run, images, plan.frequency)
        data.append(WarmUpData(config.frequency_steps, to_float(fitted.images), fitted.labels))
    return data


def released_model(run: Run, images: Split) -> nn.Module:
    """What a method without training draws with: class Gaussians, or the frequency generator."""
    if run.plan.moments is not None:
        return kept_gaussians(run, images, run.plan.moments).to(run.device)
    assert run.plan.frequency is not None
    dataset = run.config.dataset
    _, state = kept_frequency_images(run, images, run.plan.frequency)
    model = AuxiliaryGenerator(dataset.channels, dataset.image_size, dataset.num_classes)
    model.load_state_dict(state)
    return model.to(run.device)


def kept_central_images(run: Run, images: Split, plan: CentralPlan) -> CentralImages:
    """The central images of an identity: drawn by the first who asks, the same file ever after."""

    def draw() -> CentralImages:
        return release_central_images(
            images,
            run.config.dataset.num_classes,
            run.config.central_images,
            plan,
            masks=run.stream("central_images", "mask"),
            noise=run.stream("central_images", "noise"),
        )

    def keep() -> CentralImages:
        central = CentralImages(**_kept_release(run, draw))
        pixels = (central.images * 255).round().to(torch.uint8)
        write_grid(run.folder.central_grid, pixels, central.labels)
        return central

    return distributed.on_rank_0(keep)  # Its errors are everyone's, so that no rank waits.


def kept_gaussians(run: Run, images: Split, plan: MomentsPlan) -> Gaussians:
    """The class Gaussians of the moments of an identity, which are kept like central images."""
    config = run.config

    def draw() -> Moments:
        noise, classes = run.stream("central_images", "noise"), config.dataset.num_classes
        return release_moments(images, classes, config.central_images, plan, noise)

    def keep() -> Gaussians:
        gaussians = gaussians_of(Moments(**_kept_release(run, draw)), plan, config)
        write_grid(run.folder.central_grid, *pictures_of(config, gaussians))
        return gaussians

    return distributed.on_rank_0(keep)


def _kept_release(run: Run, draw: Callable[[], CentralImages | Moments]) -> dict[str, Any]:
    """The tensors of what trials of one identity share, drawn only where no file holds them.

    Privacy: one release for all ranks, all trials of the identity and all restarts. Nothing is
        summed a second time, which on another machine could differ in its last digits.
    """
    folder = (run.link.shared or run.folder.checkpoints) / "central_images"
    store = _store(run, folder, run.identity.central)
    with locked(store.path.with_suffix(".lock"), _LOCK_TIMEOUT_S):
        kept = store.load()
        if kept is None:
            kept = dict(vars(draw()))
            store.save(kept)
    return kept


def kept_frequency_images(
    run: Run, images: Split, plan: FrequencyPlan
) -> tuple[Split, dict[str, torch.Tensor]]:
    """The images fitted to the noisy features of a run: made once, the same file ever after.

    Returns:
        The images, and the weights of the generator that drew them.

    Privacy: one release for all ranks and all restarts; see `_kept_release`. Images and generator
        are post-processing of it.
    """
    config = run.config
    store = _store(run, run.folder.checkpoints / "frequency", run.identity.run)

    def keep() -> tuple[Split, dict[str, torch.Tensor]]:
        kept: dict[str, Any] = store.load() or {}
        if "images" not in kept:
            features = FourierFeatures(config, run.device)
            if "features" not in kept:
                num_classes, noise = config.dataset.num_classes, run.stream("frequency", "noise")
                kept = {"features": release_features(images, features, num_classes, plan, noise)}
                store.save(kept)
            _LOG.info("fits a generator to the frequency features")
            fitted, generator = fitted_images(config, features, kept["features"])
            kept |= {"images": fitted.images, "labels": fitted.labels}
            kept["generator"] = generator.state_dict()
            store.save(kept)
        found = Split(kept["images"], kept["labels"])
        write_grid(run.folder.frequency_grid, found.images, found.labels)
        return found, kept["generator"]

    return distributed.on_rank_0(keep)


def _store(run: Run, folder: Path, identity: str) -> Checkpoints:
    """Where a release is kept, each identity in a file of its own."""
    return Checkpoints(folder, identity, f"{identity[:16]}.pt", keep=run.link.keep)


def warm_up(run: Run, loop: Loop, data: Sequence[WarmUpData]) -> None:
    """Trains on the released data, from where another trial of the trajectory left them.

    Observers are not called for the steps that another trial did.
    """
    stage = warm_up_stage(run.config, loop.model.denoiser, data)
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
