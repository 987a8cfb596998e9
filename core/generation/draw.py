"""Class-balanced generation of synthetic images, shared among ranks."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import nn

from core import distributed
from core.config import Config
from core.data import Split, from_model_range
from core.diffusion.fused_norms import fused_norms
from core.diffusion.gaussians import Gaussians
from core.diffusion.sampler import sample
from core.errors import NotFiniteError, StoppedError, storage_errors
from core.generation.png import write_grid
from core.io.files import write_whole
from core.privacy.mechanisms.kernels import fused_kernels
from core.training.feature_generator import AuxiliaryGenerator

_SEEDS = 1_000_003
"""Seeds that one public seed stands for: one for each chunk of images, the last for pictures."""
_PICTURE_CLASSES, _PICTURE_COLUMNS = 10, 5


def generate(
    denoiser: nn.Module,
    config: Config,
    num_images: int,
    device: str,
    kept: Path | None = None,
    deadline: float = math.inf,
) -> Split:
    """Draws `num_images` images, image i of class `i % num_classes`, the same on all ranks.

    Each chunk has a seed of its own, so the result does not depend on the number of ranks.

    Args:
        kept: folder of this model that keeps finished chunks until all are there; None keeps none.
        deadline: by this machine's monotonic clock; after it the next chunk is the last.

    Raises:
        StoppedError: the deadline has passed; what was drawn is kept.

    Privacy: post-processing of a private model.
    """
    labels = torch.arange(num_images) % config.dataset.num_classes
    chunks = labels.split(config.evaluation.batch_size)

    def draw_mine() -> dict[int, torch.Tensor]:
        mine: dict[int, torch.Tensor] = {}
        drawn = 0
        for number in range(distributed.rank(), len(chunks), distributed.world_size()):
            path = kept and kept / f"{number}.pt"
            if path and path.exists():
                mine[number] = torch.load(path, weights_only=True)
                continue
            if drawn and time.monotonic() > deadline:  # At least one, or none would ever end.
                raise StoppedError(f"at image {number * len(chunks[0])} of {num_images}")
            drawn += 1
            mine[number] = draw_images(
                denoiser, chunks[number], config, config.seed, number, device
            )
            if path:
                with storage_errors(path.parent):
                    write_whole(path, partial(torch.save, mine[number]))
        return mine

    parts: dict[int, torch.Tensor] = {}
    for share in distributed.all_gather_object(distributed.on_all_ranks(draw_mine)):
        parts.update(share)
    return Split(torch.cat([parts[number] for number in sorted(parts)]), labels)


def draw_images(
    denoiser: nn.Module,
    labels: torch.Tensor,
    config: Config,
    seed: int,
    number: int,
    device: str,
) -> torch.Tensor:
    """One image for each label: uint8 `[B, C, H, W]` on the CPU.

    Args:
        denoiser: or, of a method that trains none, what draws images itself.
        labels: int64 `[B]`, each in [0, num_classes).
        seed: public, at least 0.
        number: of the chunk, in [0, 1,000,003); each has random numbers of its own.

    Raises:
        NotFiniteError: a pixel is NaN or infinite, which would be shown as black.

    Privacy: post-processing of a private model.
    """
    dataset = config.dataset
    shape = (dataset.channels, dataset.image_size, dataset.image_size)
    generator = torch.Generator(device).manual_seed((seed * _SEEDS + number) % 2**63)
    labels = labels.to(device)
    if isinstance(denoiser, (Gaussians, AuxiliaryGenerator)):
        images = denoiser.draw(labels, generator).view(-1, *shape)
    else:
        fused = device == "cuda" and fused_kernels(config)
        with fused_norms(denoiser) if fused else nullcontext():
            images = sample(denoiser, labels, shape, config.sampler, dataset.num_classes, generator)
    if not images.isfinite().all():
        raise NotFiniteError(
            "the network draws images that are not finite, so nothing of it can be used: train "
            "anew with a lower learning rate, or with sampler settings nearer to the defaults"
        )
    return (from_model_range(images) * 255).round().to(torch.uint8).cpu()


def sample_pictures(
    denoiser: nn.Module, config: Config, folder: Path, device: str
) -> Callable[[int], None]:
    """What draws `folder/STEP.png` on rank 0 after each of `runtime.num_pictures` steps.

    All are drawn from the same seed, so that the pictures of a run, and of runs, compare.

    Args:
        denoiser: the averaged model, as it will be at the step.

    Privacy: post-processing of a model that is private after every step, whose cost is charged.
    """
    total, count = config.training.num_steps, config.runtime.num_pictures
    steps = {round(total * (k + 1) / (count + 1)) for k in range(count)} - {0, total}
    classes = torch.arange(min(config.dataset.num_classes, _PICTURE_CLASSES))
    labels = classes.repeat_interleave(_PICTURE_COLUMNS)

    def draw(step: int) -> None:
        images = draw_images(denoiser, labels, config, config.seed, _SEEDS - 1, device)
        write_grid(folder / f"{step:08d}.png", images, labels)

    def draw_if_due(step: int) -> None:
        if step in steps:
            distributed.on_rank_0(lambda: draw(step))  # Its errors are everyone's.

    return draw_if_due
