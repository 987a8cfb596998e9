"""Class-balanced generation of synthetic images, shared among ranks, and the released generator."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from core import distributed, yaml_subset
from core.config import Config, load, load_yaml, merge, nested
from core.data import Split, from_model_range
from core.diffusion.denoiser import Denoiser, build_denoiser
from core.diffusion.sampler import sample
from core.errors import ConfigError
from core.reporting import write_grid

_SEEDS = 1_000_003
"""Seeds that one public seed stands for: one for each chunk of images, the last for pictures."""
_PICTURE_CLASSES, _PICTURE_COLUMNS = 10, 5
GENERATOR = "generator"
"""Folder of a bundle that holds the weights."""
_PUBLIC = ("image_size", "channels", "num_classes")
_SECTIONS = ("model", "diffusion", "sampler")


def generate(denoiser: nn.Module, config: Config, num_images: int, device: str) -> Split:
    """Draws `num_images` images, image i of class `i % num_classes`, the same on all ranks.

    Each chunk has a seed of its own, so the result does not depend on the number of ranks.

    Privacy: post-processing of a private model.
    """
    labels = torch.arange(num_images) % config.dataset.num_classes
    mine: dict[int, torch.Tensor] = {}
    for number, part in enumerate(labels.split(config.evaluation.batch_size)):
        if number % distributed.world_size() == distributed.rank():
            mine[number] = draw_images(denoiser, part, config, config.seed, number, device)
    parts: dict[int, torch.Tensor] = {}
    for share in distributed.all_gather_object(mine):
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
        labels: int64 `[B]`, each in [0, num_classes).
        seed: public, at least 0.
        number: of the chunk, in [0, 1,000,003); each has random numbers of its own.

    Privacy: post-processing of a private model.
    """
    dataset = config.dataset
    shape = (dataset.channels, dataset.image_size, dataset.image_size)
    generator = torch.Generator(device).manual_seed((seed * _SEEDS + number) % 2**63)
    images = sample(
        denoiser, labels.to(device), shape, config.sampler, dataset.num_classes, generator
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
        if step in steps and distributed.rank() == 0:
            images = draw_images(denoiser, labels, config, config.seed, _SEEDS - 1, device)
            write_grid(folder / f"{step:08d}.png", images, labels)

    return draw


def write_generator(folder: Path, denoiser: Denoiser, config: Config) -> None:
    """Writes weights and the settings that drawing from them needs, nothing else of the run.

    Privacy: post-processing of what the central images and DP-SGD released.
    """
    folder.mkdir()
    state = {name: value.cpu().contiguous() for name, value in denoiser.state_dict().items()}
    torch.save(state, folder / "weights.pt")
    settings = nested(config)
    kept: dict[str, Any] = {name: settings[name] for name in _SECTIONS}
    kept["dataset"] = {name: settings["dataset"][name] for name in _PUBLIC}
    (folder / "config.yaml").write_text(yaml_subset.dump(kept))


def load_generator(bundle: Path, overrides: Mapping[str, Any]) -> tuple[Config, Denoiser]:
    """The generator of a bundle; call `verify_release` first.

    Args:
        overrides: dotted keys, such as `seed`, `sampler.num_steps` or `runtime.device`.

    Raises:
        ConfigError: the bundle holds none, or weights and settings do not belong together.
    """
    folder = bundle / GENERATOR
    if not (folder / "weights.pt").exists():
        raise ConfigError(f"'{bundle}' holds no generator: release it with --formats generator")
    kept = load_yaml(folder / "config.yaml")
    num_classes = kept["dataset"]["num_classes"]
    # What a configuration must have, but drawing does not use.
    unused = {"evaluation.num_images": max(4, 2 * num_classes), "central_images.image_size": 2}
    config = load(merge(kept, unused), overrides)
    denoiser = build_denoiser(config).eval()
    state = torch.load(folder / "weights.pt", map_location="cpu", weights_only=True)
    try:
        denoiser.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"'{folder}' holds weights of another network ({reason}): leave out model.* overrides"
        ) from None
    return config, denoiser
