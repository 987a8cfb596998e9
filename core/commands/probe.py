"""Probe of this machine: seconds of a step of each stage, on random images, not on data."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from core.config import Config, load, nested
from core.data import Split
from core.device import config_device
from core.diffusion.denoiser import build_denoiser
from core.generation.draw import generate
from core.privacy.keys import KeyedStream
from core.privacy.plan.plan import make_plan
from core.training.loop import Stage
from core.training.stages import WarmUpData, private_stage, warm_up_stage

_SECONDS, _STEPS = 2.0, 20
"""A stage is measured for as many seconds, or as many steps if they are done before."""


@dataclass(frozen=True)
class StageSeconds:
    """Seconds of one worker that does its share of the batch, without talking to the others.

    Attributes:
        warm_up: of a step; 0 where there is no easy stage.
        private_training: of a step; 0, like all, for a method that trains nothing.
        image: of drawing one synthetic image.
    """

    warm_up: float
    private_training: float
    image: float


def measure(config: Config, workers: int) -> StageSeconds:
    """Times a few steps of each stage and a batch of generation in this process.

    Raises:
        InfeasibleError: the budget cannot pay for the configuration.

    Privacy: images, masks and noise are made up; neither data set nor secret is opened.
    """
    share = load(
        nested(config), {"warm_up.batch_size": max(1, config.warm_up.batch_size // workers)}
    )
    plan = make_plan(config)
    if config.trains_nothing:
        return StageSeconds(0.0, 0.0, 0.0)
    device = config_device(config)
    denoiser = build_denoiser(config).to(device)
    warm_up = 0.0
    if config.warm_up_steps:
        warm_up = _seconds_of(warm_up_stage(share, denoiser, [_warm_up_data(config)]), device)
    stage = private_stage(
        config,
        denoiser,
        _images(config),
        replace(plan.dp_sgd, sample_rate=plan.dp_sgd.sample_rate / workers),
        masks=KeyedStream(b"probe of masks".ljust(32)),
        noise=KeyedStream(b"probe of noise".ljust(32)),
        before_step=lambda _: None,
    )
    private_training = _seconds_of(stage, device)
    count = min(config.evaluation.batch_size, config.evaluation.num_images)
    # Another network, as in a run: that of DP-SGD takes batches of K noise draws for each image.
    average = build_denoiser(config).to(device).eval()
    image = _timed(lambda: generate(average, config, count, device), device) / count
    return StageSeconds(warm_up, private_training, image)


def _warm_up_data(config: Config) -> WarmUpData:
    dataset = config.dataset
    labels = torch.arange(dataset.num_classes)
    shape = (len(labels), dataset.channels, dataset.image_size, dataset.image_size)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    return WarmUpData(1 + _STEPS, images, labels)  # However few the run takes.


def _images(config: Config) -> Split:
    """As many images as the data set has; all are one, so that they take no memory."""
    dataset = config.dataset
    shape = (dataset.num_examples, dataset.channels, dataset.image_size, dataset.image_size)
    labels = torch.arange(dataset.num_examples) % dataset.num_classes
    return Split(torch.full((1, *shape[1:]), 128, dtype=torch.uint8).expand(shape), labels)


def _seconds_of(stage: Stage, device: str) -> float:
    stage.step(0)  # The first one allocates memory and chooses kernels.
    spent, steps = 0.0, 0
    while steps < _STEPS and spent < _SECONDS:
        steps += 1
        number = steps
        spent += _timed(lambda number=number: stage.step(number), device)
    return spent / steps


def _timed(work: Callable[[], object], device: str) -> float:
    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    began = now()
    work()
    return now() - began
