"""One training loop for both stages; the step, plain or private, is injected.

Every random number is drawn from a counter, never from a generator's running state, so a step
can be replayed exactly and does not depend on the number of ranks.
"""

import math
import time
from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from core import distributed
from core.config import Config
from core.data import Split, to_float, to_model_range
from core.device import config_device
from core.diffusion.denoiser import Denoiser
from core.diffusion.ema import Ema
from core.diffusion.loss import draw, edm_loss
from core.errors import NotFiniteError, StoppedError
from core.io.terminal import Report
from core.privacy.keys import KeyedStream
from core.privacy.mechanisms.adam_bc import DpAdamBc
from core.privacy.mechanisms.dp_sgd import DpSgdOptimizer
from core.privacy.mechanisms.per_example_gradients import PerExampleGradients
from core.privacy.mechanisms.sampling import PoissonSampler, rank_share
from core.privacy.plan.releases import DpSgdPlan
from core.seeds import public_seed
from core.training.augmentation import augment
from core.training.checkpoint import Checkpoints
from core.training.physical_batch import PhysicalBatches

AfterStep = Callable[[int, nn.Module], None]


@dataclass
class Stage:
    """One of the two stages: how long, what a step does, and the optimizer whose state counts.

    Attributes:
        step: takes the number of the step within the stage, returns the mean loss of the batch
            over all ranks as a tensor.
        public_loss: of what the step has released, on public input, `[1]`; None where the loss of
            the step itself may decide whether the run goes on.
    """

    name: str
    num_steps: int
    step: Callable[[int], torch.Tensor]
    optimizer: torch.optim.Optimizer
    public_loss: Callable[[int], torch.Tensor] | None = None


@dataclass(frozen=True)
class Lesson:
    """What some steps of the easy stage train on; released, so that training on it is free.

    Attributes:
        images: float32 `[N, C, H, W]` in [0, 1].
        labels: int64 `[N]`.
    """

    num_steps: int
    images: torch.Tensor
    labels: torch.Tensor


def train(
    stage: Stage,
    denoiser: Denoiser,
    ema: Ema,
    offset: int,
    checkpoints: Checkpoints,
    report: Report,
    config: Config,
    after_step: AfterStep = lambda *_: None,
    deadline: float = math.inf,
) -> None:
    """Runs a stage from its last checkpoint, if there is one, to its end.

    Args:
        offset: steps of earlier stages; reports count over all stages.
        after_step: called with the number of all steps done and the averaged model, at the start
            as well; what it raises ends the stage. It must not change anything that is trained,
            nor any state of a random generator.
        deadline: by the monotonic clock of rank 0; after it the next step is the last.

    Raises:
        StoppedError: the deadline has passed; the state is kept.
        NotFiniteError: see `_require_finite`; the state is neither kept nor shown.
    """
    start = 0
    state = distributed.on_rank_0(checkpoints.load)
    if state is not None and state["stage"] == stage.name:
        start = state["step"]
        denoiser.load_state_dict(state["denoiser"])
        ema.load_state_dict(state["ema"])
        stage.optimizer.load_state_dict(state["optimizer"])

    def after(done: int) -> None:
        try:
            after_step(offset + done, ema.module)
        except NotFiniteError as error:  # Of a picture or a score.
            raise NotFiniteError(f"{_place(stage, done)} {error}") from error

    _require_finite(stage, start, _kept(stage, denoiser, ema))
    after(start)
    runtime, began = config.runtime, time.monotonic()
    for number in range(start, stage.num_steps):
        loss = stage.step(number)
        ema.update(denoiser)
        done = number + 1
        decides = loss if stage.public_loss is None else stage.public_loss(number)
        _require_finite(stage, done, [*denoiser.parameters(), decides])
        last = done == stage.num_steps
        late = deadline < math.inf and distributed.on_rank_0(lambda: time.monotonic() > deadline)
        if done % runtime.log_every == 0 or last or done == start + 1:
            seconds = (time.monotonic() - began) / (done - start)
            report(
                {
                    "step": offset + done,
                    "stage": stage.name,
                    "loss": float(loss),
                    "seconds_per_step": seconds,
                }
            )
        # After the report: killed in between, a run reports again rather than never.
        if done % runtime.checkpoint_every == 0 or last or late:
            _require_finite(stage, done, _kept(stage, denoiser, ema))
            _save(checkpoints, stage, done, denoiser, ema)
        scoring = time.monotonic()
        after(done)
        began += time.monotonic() - scoring  # Not a part of the step.
        if late and not last:
            raise StoppedError(_place(stage, done))


def _place(stage: Stage, done: int) -> str:
    return f"in {stage.name} at step {done} of {stage.num_steps}"


def _kept(stage: Stage, denoiser: Denoiser, ema: Ema) -> list[torch.Tensor]:
    """Parameters, averages and moments: what a checkpoint holds."""
    state = [*denoiser.parameters(), *ema.module.parameters()]
    state += [] if ema.power is None else [ema.power.values]
    for moments in stage.optimizer.state.values():
        state += [each for each in moments.values() if torch.is_tensor(each) and each.ndim]
    return state


def _require_finite(stage: Stage, done: int, state: Sequence[torch.Tensor]) -> None:
    """Refuses, on all ranks alike, a state on which every later step would only spend budget.

    Args:
        done: steps of the stage.
        state: what may decide: what was released, or follows from it; no private loss or gradient.

    Raises:
        NotFiniteError: a number of it is NaN or infinite.
    """
    largest = nn.utils.get_total_norm([each.detach() for each in state], math.inf)
    if distributed.sum_over_ranks((~largest.isfinite()).float()):
        section = "warm_up" if stage.name == "warm_up" else "private_training"
        rate = stage.optimizer.param_groups[0]["lr"]
        raise NotFiniteError(
            f"{_place(stage, done)} the training diverged: its loss or parameters are not finite, "
            "so the run has failed and nothing of it can be used; start anew with "
            f"{section}.learning_rate below {rate:g}"
        )


def _save(checkpoints: Checkpoints, stage: Stage, step: int, denoiser: Denoiser, ema: Ema) -> None:
    """Raises `StorageError` on all ranks where rank 0 cannot write: none trains on unsaved."""
    distributed.on_rank_0(
        lambda: checkpoints.save(
            {
                "stage": stage.name,
                "step": step,
                "denoiser": denoiser.state_dict(),
                "ema": ema.state_dict(),
                "optimizer": stage.optimizer.state_dict(),
            }
        )
    )


def warm_up_stage(config: Config, denoiser: Denoiser, lessons: Sequence[Lesson]) -> Stage:
    """The easy stage: ordinary training, data-parallel, on one lesson after the other."""
    device, settings = config_device(config), config.warm_up
    lessons = [
        Lesson(each.num_steps, to_model_range(each.images).to(device), each.labels.to(device))
        for each in lessons
    ]
    ends = list(accumulate(lesson.num_steps for lesson in lessons))
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=settings.learning_rate)
    network: nn.Module = denoiser
    if distributed.world_size() > 1:
        network = DistributedDataParallel(denoiser)
    stream = f"{config.seed}/warm_up"

    def step(number: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(public_seed(stream, number))
        batch = settings.batch_size
        lesson = lessons[bisect(ends, number)]
        images, labels = lesson.images, lesson.labels
        chosen = torch.randint(len(images), (batch,), generator=generator)
        batch_images = augment(images[chosen.to(device)], settings.augmentation, generator)
        share = rank_share(torch.arange(batch), distributed.rank(), distributed.world_size())
        draws = draw(stream, number, share, 1, images.shape[1:], device)
        share = share.to(device)
        loss = _loss(config, network, batch_images[share], labels[chosen.to(device)][share], draws)
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
    per_example = PerExampleGradients(denoiser, settings.noise_multiplicity)
    optimizer = DpSgdOptimizer(adam, plan, noise)
    sampler = PoissonSampler(masks, len(train_split.labels), plan.sample_rate)
    batches = PhysicalBatches(config, device)
    stream = f"{config.seed}/private_training"

    def step(number: int) -> torch.Tensor:
        before_step(number)
        total = torch.zeros(2, device=device)
        chosen = sampler.indices(number)
        share = rank_share(chosen, distributed.rank(), distributed.world_size())

        def compute(part: torch.Tensor) -> torch.Tensor:
            images = to_model_range(to_float(train_split.images[part])).to(device)
            labels = train_split.labels[part].to(device)
            draws = draw(
                stream, number, part, settings.noise_multiplicity, images.shape[1:], device
            )
            loss = _loss(config, per_example, images, labels, draws)
            loss.sum().backward()
            result = loss.detach().sum()
            optimizer.accumulate()  # Last: a part whose gradients count is not computed again.
            return result

        for loss in batches.run(compute, share, give_up=per_example.set_grad_sample_to_none):
            total[0] += loss
        total[1] = len(share)
        optimizer.release(number)
        total = distributed.sum_over_ranks(total)
        return total[0] / total[1].clamp(min=1)

    @torch.no_grad()
    def public_loss(number: int) -> torch.Tensor:
        first = torch.zeros(1, dtype=torch.long)
        grey = torch.zeros((1, *train_split.images.shape[1:]), device=device)
        draws = draw(stream, number, first, settings.noise_multiplicity, grey.shape[1:], device)
        return _loss(config, per_example, grey, first.to(device), draws)

    return Stage("private_training", plan.num_steps, step, adam, public_loss)


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
    sampler = PoissonSampler(masks, len(train_split.labels), plan.sample_rate)
    batches = PhysicalBatches(config, device)
    stream = f"{config.seed}/non_private_training"

    def step(number: int) -> torch.Tensor:
        chosen = sampler.indices(number)
        share = rank_share(chosen, distributed.rank(), distributed.world_size())
        sums = [torch.zeros_like(parameter) for parameter in parameters]

        def compute(part: torch.Tensor) -> torch.Tensor:
            images = to_model_range(to_float(train_split.images[part])).to(device)
            copies, shape = settings.noise_multiplicity, images.shape[1:]
            draws = draw(stream, number, part, copies, shape, device)
            labels = train_split.labels[part].to(device)
            loss = _loss(config, denoiser, images, labels, draws).sum()
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


def _loss(
    config: Config, network: nn.Module, images: torch.Tensor, labels: torch.Tensor, draws: Any
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
        )
