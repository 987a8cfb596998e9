"""Class-balanced generation of synthetic images, shared among ranks."""

import math
import time
from pathlib import Path

import torch
from torch import nn

from core import distributed
from core.config import Config
from core.data import Split, from_model_range
from core.diffusion.sampler import sample
from core.errors import StoppedError


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
    dataset = config.dataset
    labels = torch.arange(num_images) % dataset.num_classes
    shape = (dataset.channels, dataset.image_size, dataset.image_size)
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
            generator = torch.Generator(device).manual_seed(config.seed * 1_000_003 + number)
            part, drawn = chunks[number].to(device), drawn + 1
            images = sample(denoiser, part, shape, config.sampler, dataset.num_classes, generator)
            mine[number] = (from_model_range(images) * 255).round().to(torch.uint8).cpu()
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(mine[number], path.with_suffix(".tmp"))
                path.with_suffix(".tmp").replace(path)
        return mine

    parts: dict[int, torch.Tensor] = {}
    for share in distributed.all_gather_object(distributed.together(draw_mine)):
        parts.update(share)
    return Split(torch.cat([parts[number] for number in sorted(parts)]), labels)
