"""A trained generator in a folder of its own: labels in, images out.

The folder holds the averaged weights and the public configuration: no optimizer, no key, no ledger,
no path. MLflow loads it by `_load_pyfunc`, without a line of MLflow here.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from core import yaml_subset
from core.config import Config, load, nested
from core.device import config_device
from core.diffusion.denoiser import build_denoiser
from core.errors import ConfigError
from core.generate import draw_images


class Generator:
    """Draws images for labels.

    Privacy: post-processing of a private model.
    """

    def __init__(self, denoiser: nn.Module, config: Config) -> None:
        self._denoiser, self._config = denoiser, config

    def predict(self, labels: np.ndarray, params: Mapping[str, Any] | None = None) -> np.ndarray:
        """One image for each label.

        The labels 0, 1, ..., num_classes - 1, 0, ... with the run's own seed give the images that
        the run was scored with.

        Args:
            labels: whole numbers `[B]` in [0, num_classes).
            params: `seed`, at least 0; that of the run if not given.

        Returns:
            uint8 `[B, C, H, W]`.

        Raises:
            ConfigError: a label or the seed is out of range.
        """
        config, count = self._config, self._config.dataset.num_classes
        wanted = torch.as_tensor(np.asarray(labels)).reshape(-1).long()
        if len(wanted) == 0 or wanted.min() < 0 or wanted.max() >= count:
            raise ConfigError(f"labels must be at least one whole number in [0, {count - 1}]")
        seed = int((params or {}).get("seed", config.seed))
        if seed < 0:
            raise ConfigError(f"seed={seed} must be at least 0")
        device = next(self._denoiser.parameters()).device.type
        parts = wanted.split(config.evaluation.batch_size)
        drawn = [
            draw_images(self._denoiser, part, config, seed, number, device)
            for number, part in enumerate(parts)
        ]
        return torch.cat(drawn).numpy()


def load_denoiser(config: Config, weights: Path) -> nn.Module:
    """The averaged model of a finished run, on the configuration's device."""
    device = config_device(config)
    denoiser = build_denoiser(config).to(device).eval()
    denoiser.load_state_dict(torch.load(weights, map_location=device, weights_only=True))
    return denoiser


def save_generator(run_dir: Path, folder: Path) -> None:
    """Copies what a finished run's generator needs into a new folder."""
    config = load(run_dir / "config.yaml")
    public = load(nested(config), {"dataset.path": None, "evaluation.inception_weights": None})
    content = {key: value for key, value in nested(public).items() if key != "runtime"}
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml_subset.dump(content))
    shutil.copyfile(run_dir / "model.pt", folder / "model.pt")


def load_generator(folder: Path) -> Generator:
    """What `save_generator` wrote, on the GPU if there is one."""
    config = load(folder / "config.yaml")
    return Generator(load_denoiser(config, folder / "model.pt"), config)


def _load_pyfunc(path: str) -> Generator:
    """The name by which MLflow asks."""
    return load_generator(Path(path))
