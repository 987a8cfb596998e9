"""The stages of training: the easy one, DP-SGD, and a ceiling for it without privacy."""

from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from core import distributed
from core.config import Config
from core.data import Split, to_float, to_model_range
from core.device import config_device
from core.diffusion.denoiser import Denoiser, MomentsDenoiser
from core.diffusion.loss import Draws, Weight, draw, edm_loss
from core.privacy.keys import KeyedStream
from core.privacy.mechanisms.adam_bc import DpAdamBc
from core.privacy.mechanisms.dp_sgd import DpSgdOptimizer
from core.privacy.mechanisms.kernels import fused_kernels
from core.privacy.mechanisms.per_example_gradients import PerExampleGradients
from core.privacy.mechanisms.sampling import PoissonSampler, rank_share
from core.privacy.plan.releases import DpSgdPlan
from core.seeds import public_seed
from core.training.augmentation import augment
from core.training.loop import Stage
from core.training.physical_batch import PhysicalBatches

_RESIDENT = 0.05
"""Share of a GPU's memory up to which the data set, as uint8, is kept there."""


@dataclass(frozen=True)
class WarmUpData:
    """What some steps of the easy stage train on; released, so that training on it is free.

    Attributes:
        images: float32 `[N, C, H, W]` in [0, 1].
        labels: int64 `[N]`.
    """

    num_steps: int
    images: torch.Tensor
    labels: torch.Tensor


def warm_up_stage(config: Config, denoiser: Denoiser, data: Sequence[WarmUpData]) -> Stage:
    """The easy stage: ordinary training, data-parallel, on one set after the other."""
    device, settings = config_device(config), config.warm_up
    data = [
        WarmUpData(each.num_steps, to_model_range(each.images).to(device), each.labels.to(device))
        for each in data
    ]
    ends = list(accumulate(each.num_steps for each in data))
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=settings.learning_rate)
    network, weight_of, fused = denoiser, _weight_of(denoiser), fused_kernels(config)
    if distributed.world_size() > 1:
        network = DistributedDataParallel(denoiser)
    stream = f"{config.seed}/warm_up"

    def step(number: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(public_seed(stream, number))
        batch = settings.batch_size
        now = data[bisect(ends, number)]
        images, labels = now.images, now.labels
        chosen = torch.randint(len(images), (batch,), generator=generator)
        batch_images = augment(images[chosen.to(device)], settings.augmentation, generator)
        share = rank_share(torch.arange(batch), distributed.rank(), distributed.world_size())
        draws = draw(stream, number, share, 1, images.shape[1:], device, fused)
        share = share.to(device)
        labels_of_share = labels[chosen.to(device)][share]
        loss = _loss(config, network, weight_of, batch_images[share], labels_of_share, draws)
        # DDP averages over ranks: the factor makes the result that of the whole batch.
        (loss.sum() * distributed.world_size() / batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return distributed.sum_over_ranks(loss.detach().sum()) / batch

    return Stage("warm_up", ends[-1], step, optimizer)


def private_stage(
    config: Config,
    denoiser: Denoiser,
    train_split: Split,
    plan: DpSgdPlan,
    masks: KeyedStream,
    noise: KeyedStream,
    before_step: Callable[[int], None],
) -> Stage:
    """The hard stage: DP-SGD on the private images.

    Args:
        before_step: called with a step's number before anything of it is computed.

    Privacy: one global Poisson mask a step; per-example gradients averaged over K noise draws,
    clipped over all parameters, summed over ranks and noised once. The reported loss is not
    private and decides nothing: that of a grey image, under the network that a step released, does.
    """
    device, settings = config_device(config), config.private_training
    adam = torch.optim.Adam(denoiser.parameters(), lr=settings.learning_rate)
    if settings.optimizer == "adam_bc":
        rate, floor = settings.learning_rate, settings.adam_bc_floor
        adam = DpAdamBc(denoiser.parameters(), rate, plan, floor)
    fused = fused_kernels(config)
    per_example = PerExampleGradients(denoiser, settings.noise_multiplicity, fused)
    optimizer = DpSgdOptimizer(adam, plan, noise)
    train_split = resident(train_split, device)
    sampler = PoissonSampler(masks, len(train_split.labels), plan.sample_rate)
    batches, weight_of = PhysicalBatches(config, device), _weight_of(denoiser)
    stream = f"{config.seed}/private_training"

    def step(number: int) -> torch.Tensor:
        before_step(number)
        total = torch.zeros((), device=device)
        chosen = sampler.indices(number)
        share = rank_share(chosen, distributed.rank(), distributed.world_size())

        def compute(part: torch.Tensor) -> torch.Tensor:
            loss = _loss_of_part(config, per_example, weight_of, train_split, part, stream, number)
            loss.backward()
            optimizer.accumulate()  # Last: a part whose gradients count is not computed again.
            return loss.detach()

        for loss in batches.run(compute, share, give_up=per_example.set_grad_sample_to_none):
            total += loss
        optimizer.release(number)
        return distributed.sum_over_ranks(total) / max(len(chosen), 1)

    @torch.no_grad()
    def public_loss(number: int) -> torch.Tensor:
        first = torch.zeros(1, dtype=torch.long)
        grey = torch.zeros((1, *train_split.images.shape[1:]), device=device)
        copies, shape = settings.noise_multiplicity, grey.shape[1:]
        draws = draw(stream, number, first, copies, shape, device, fused)
        return _loss(config, per_example, weight_of, grey, first.to(device), draws)

    return Stage("private_training", plan.num_steps, step, adam, public_loss, config.warm_up_steps)


def non_private_stage(
    config: Config,
    denoiser: Denoiser,
    train_split: Split,
    plan: DpSgdPlan,
    masks: KeyedStream,
) -> Stage:
    """A ceiling for the hard stage: the same batches and draws without clipping and noise.

    Privacy: none. The network that comes out depends on every image without bound.
    """
    device, settings = config_device(config), config.private_training
    parameters = list(denoiser.parameters())
    adam = torch.optim.Adam(parameters, lr=settings.learning_rate)
    train_split = resident(train_split, device)
    sampler = PoissonSampler(masks, len(train_split.labels), plan.sample_rate)
    batches, weight_of = PhysicalBatches(config, device), _weight_of(denoiser)
    stream = f"{config.seed}/non_private_training"

    def step(number: int) -> torch.Tensor:
        chosen = sampler.indices(number)
        share = rank_share(chosen, distributed.rank(), distributed.world_size())
        sums = [torch.zeros_like(parameter) for parameter in parameters]

        def compute(part: torch.Tensor) -> torch.Tensor:
            loss = _loss_of_part(config, denoiser, weight_of, train_split, part, stream, number)
            for total, gradient in zip(sums, torch.autograd.grad(loss, parameters), strict=True):
                total += gradient
            return loss.detach()

        total = torch.zeros((), device=device)
        for loss in batches.run(compute, share, give_up=lambda: None):
            total += loss
        count = max(len(chosen), 1)
        for parameter, gradient in zip(parameters, sums, strict=True):
            parameter.grad = distributed.sum_over_ranks(gradient) / count
        adam.step()
        return distributed.sum_over_ranks(total) / count

    return Stage("non_private_training", plan.num_steps, step, adam)


def _weight_of(denoiser: Denoiser) -> Weight | None:
    """The weight of the loss; None: EDM's."""
    return denoiser.weight if isinstance(denoiser, MomentsDenoiser) else None


def _loss_of_part(
    config: Config,
    network: nn.Module,
    weight_of: Weight | None,
    split: Split,
    part: torch.Tensor,
    stream: str,
    number: int,
) -> torch.Tensor:
    """Summed over a part of the batch of step `number`."""
    device, copies = config_device(config), config.private_training.noise_multiplicity
    images, labels = chosen_records(split, part, device)
    fused = fused_kernels(config)
    draws = draw(stream, number, part, copies, images.shape[1:], device, fused)
    return _loss(config, network, weight_of, images, labels, draws).sum()


def resident(split: Split, device: str) -> Split:
    """A data set on the GPU that it is used on, unless it would fill that: then as it is."""
    if device == "cuda":
        memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        if split.images.numel() <= _RESIDENT * memory:
            return Split(split.images.to(device), split.labels.to(device))
    return split


def chosen_records(
    split: Split, part: torch.Tensor, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images in [-1, 1], float32 `[len(part), C, H, W]`, and labels of some records, on the device.

    The host does not wait for a GPU: CUDA copies pageable memory aside before it returns.
    """
    part = part.to(split.images.device, non_blocking=True)
    images, labels = (
        each[part].to(device, non_blocking=True) for each in (split.images, split.labels)
    )
    return to_model_range(to_float(images)), labels


def _loss(
    config: Config,
    network: nn.Module,
    weight_of: Weight | None,
    images: torch.Tensor,
    labels: torch.Tensor,
    draws: Draws,
) -> torch.Tensor:
    low = config.training.precision == "bfloat16"
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=low):
        return edm_loss(
            network,
            images,
            labels,
            draws,
            config.diffusion,
            config.training.label_dropout,
            config.dataset.num_classes,
            weight_of,
        )
