"""Released generator in a folder of its own: labels in, images out.

The folder holds the averaged weights as safetensors, and as JSON the names of the classes and what
drawing needs of the configuration: no code, no optimizer, no key, no ledger, no path. Bundles hold
one, and so does MLflow's model, which loads it by `_load_pyfunc`, without a line of MLflow here.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from core.config import Config, load, merge, nested
from core.data import Split
from core.device import config_device
from core.diffusion.denoiser import build_denoiser
from core.diffusion.gaussians import Gaussians
from core.errors import ConfigError, NotFiniteError
from core.generation.draw import draw_images, generate
from core.io.files import read_json, write_json
from core.record.bundle import DIGESTS, verify_release
from core.record.folder import RunFolder, write_class_names
from core.training.feature_generator import AuxiliaryGenerator

GENERATOR = "generator"
"""Folder of a bundle that holds the weights."""
WEIGHTS, SETTINGS = "weights.safetensors", "settings.json"
_WHOLE = ("seed", "model", "diffusion", "sampler")
_PARTS = {
    "dataset": ("image_size", "channels", "num_classes"),
    "central_images": ("kind", "image_size", "num_components"),
    "evaluation": ("batch_size",),
}
"""With the seed, the size of a batch gives the very images that the run was scored with."""


class Generator:
    """Draws images for labels.

    Privacy: post-processing of a private model.
    """

    def __init__(self, denoiser: nn.Module, config: Config) -> None:
        self._denoiser, self._config = denoiser, config

    @classmethod
    def load(cls, folder: str | Path, overrides: Mapping[str, Any] | None = None) -> "Generator":
        """The generator of a released bundle, which is verified first, or of a finished run.

        Args:
            overrides: dotted keys, such as `seed`, `sampler.num_steps` or `runtime.device`.

        Raises:
            ConfigError: the folder holds none, or the bundle is not as it was released.
            NotFiniteError: a weight is NaN or infinite.
        """
        path = Path(folder)
        if (path / DIGESTS).exists():
            verify_release(path)
            config, denoiser = load_generator(path / GENERATOR, overrides)
        else:
            config, denoiser = load_run(path, overrides)
        return cls(denoiser, config)

    def draw(self, num_images: int) -> Split:
        """Images of all classes in equal numbers, image i of class `i % num_classes`.

        As many as the run was scored with, with its settings and on its kind of machine, are the
        very images that it was scored with.

        Returns:
            `images`, uint8 `[N, C, H, W]`, and `labels`, int64 `[N]`: tensors on the CPU.

        Raises:
            ConfigError: `num_images` is below 1.
        """
        if num_images < 1:
            raise ConfigError(f"num_images={num_images} must be at least 1")
        return generate(self._denoiser, self._config, num_images, self._device)

    @property
    def _device(self) -> str:
        return next(iter(self._denoiser.state_dict().values())).device.type

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
        parts = wanted.split(config.evaluation.batch_size)
        drawn = [
            draw_images(self._denoiser, part, config, seed, number, self._device)
            for number, part in enumerate(parts)
        ]
        return torch.cat(drawn).numpy()


def load_denoiser(config: Config, weights: Path, device: str) -> nn.Module:
    """The averaged model of a finished run, or what else it draws with; the file says which.

    Raises:
        NotFiniteError: a weight is NaN or infinite.
    """
    if weights.name == WEIGHTS:
        state = {name: value.to(device) for name, value in load_file(weights).items()}
    else:
        state = torch.load(weights, map_location=device, weights_only=True)
    denoiser = _built_for(config, state).to(device).eval()
    denoiser.load_state_dict(state)
    if not all(value.isfinite().all() for value in state.values()):
        raise NotFiniteError(
            f"'{weights}' holds weights that are not finite: train anew with a lower learning rate"
        )
    return denoiser


def _built_for(config: Config, state: Mapping[str, torch.Tensor]) -> nn.Module:
    dataset = config.dataset
    if "dense.weight" in state:
        return AuxiliaryGenerator(dataset.channels, dataset.image_size, dataset.num_classes)
    if "basis" in state:
        components, pixels = state["basis"].shape
        return Gaussians(pixels, components, dataset.num_classes, state["means"].shape[1])
    of = state.get("gaussians.means", torch.zeros(0, 0, 0))
    return build_denoiser(config, of.shape[2], of.shape[1])


def write_generator(
    folder: Path, weights: Path, config: Config, class_names: Sequence[str]
) -> None:
    """Writes a run's weights, what drawing from them needs and what labels mean, nothing else.

    On the CPU: a run on GPUs may be handed on by a machine without one.

    Privacy: post-processing of what the central images and DP-SGD released.
    """
    denoiser = load_denoiser(config, weights, "cpu")
    folder.mkdir(parents=True)
    state = {name: value.contiguous() for name, value in denoiser.state_dict().items()}
    save_file(state, folder / WEIGHTS, {"format": "pt"})
    settings = nested(config)
    kept: dict[str, Any] = {name: settings[name] for name in _WHOLE}
    for section, names in _PARTS.items():
        kept[section] = {name: settings[section][name] for name in names}
    write_json(folder / SETTINGS, kept)
    write_class_names(folder, class_names)


def load_generator(
    folder: Path, overrides: Mapping[str, Any] | None = None
) -> tuple[Config, nn.Module]:
    """What `write_generator` wrote, on the GPU if there is one.

    Args:
        overrides: dotted keys, such as `seed`, `sampler.num_steps` or `runtime.device`.

    Raises:
        ConfigError: the folder holds none, or weights and settings do not belong together.
    """
    if not (folder / WEIGHTS).exists():
        raise ConfigError(f"'{folder}' holds no generator: release it with --formats generator")
    kept = {"central_images": {"image_size": 2}} | read_json(folder / SETTINGS)
    # What a configuration must have, but drawing does not use.
    unused = {"evaluation.num_images": max(4, 2 * kept["dataset"]["num_classes"])}
    config = load(merge(kept, unused), overrides or {})
    try:
        return config, load_denoiser(config, folder / WEIGHTS, config_device(config))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"'{folder}' holds weights of another network ({reason}): leave out model.* overrides"
        ) from None


def load_run(run_dir: Path, overrides: Mapping[str, Any] | None = None) -> tuple[Config, nn.Module]:
    """Configuration and averaged model of a finished run, as of `finished_config`."""
    config = finished_config(run_dir, overrides)
    return config, load_denoiser(config, RunFolder(run_dir).model, config_device(config))


def finished_config(run_dir: Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Configuration of a finished run, whose weights are not read.

    Raises:
        ConfigError: the folder holds no finished run.
    """
    folder = RunFolder(run_dir)
    if not folder.model.exists():
        raise ConfigError(
            f"'{run_dir}' holds no finished run (no {folder.model.name}) and no released bundle "
            f"(no {DIGESTS}): finish the run first, or name another folder"
        )
    return folder.config(overrides)


def _load_pyfunc(path: str) -> Generator:
    """The name by which MLflow asks."""
    config, denoiser = load_generator(Path(path))
    return Generator(denoiser, config)
