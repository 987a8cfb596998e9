"""Class-balanced generation of synthetic images, shared among ranks."""

import torch
from torch import nn

from core import distributed
from core.config import Config
from core.data import Split, from_model_range
from core.diffusion.sampler import sample


def generate(denoiser: nn.Module, config: Config, num_images: int, device: str) -> Split:
    """Draws `num_images` images, image i of class `i % num_classes`, the same on all ranks.

    Each chunk has a seed of its own, so the result does not depend on the number of ranks.

    Privacy: post-processing of a private model.
    """
    dataset = config.dataset
    labels = torch.arange(num_images) % dataset.num_classes
    shape = (dataset.channels, dataset.image_size, dataset.image_size)
    mine: dict[int, torch.Tensor] = {}
    for number, part in enumerate(labels.split(config.evaluation.batch_size)):
        if number % distributed.world_size() == distributed.rank():
            generator = torch.Generator(device).manual_seed(config.seed * 1_000_003 + number)
            images = sample(
                denoiser, part.to(device), shape, config.sampler, dataset.num_classes, generator
            )
            mine[number] = (from_model_range(images) * 255).round().to(torch.uint8).cpu()
    parts: dict[int, torch.Tensor] = {}
    for share in distributed.all_gather_object(mine):
        parts.update(share)
    return Split(torch.cat([parts[number] for number in sorted(parts)]), labels)
