"""Whether a run's folder can hold what the run will write."""

import shutil
from pathlib import Path

import torch

from core.config import Config
from core.diffusion.denoiser import build_denoiser
from core.diffusion.ema import NUM_SNAPSHOTS, TRACKED
from core.errors import StorageError, storage_errors

_PICTURES = 2**20
"""Bytes for what else a run writes: picture grids, metrics, records."""


def needed_bytes(config: Config) -> int:
    """What a run writes at most: three checkpoints, the model and, twice, the images.

    One checkpoint beside that which it replaces, and the warm-up's last for other trials. Drawn
    images are kept in chunks until the file of all is written.
    """
    with torch.device("meta"):
        model = sum(
            v.numel() * v.element_size() for v in build_denoiser(config).state_dict().values()
        )
    checkpoint = 4 * model  # Parameters, their average, and two moments of Adam.
    data = config.dataset
    images = config.evaluation.num_images * data.channels * data.image_size**2
    snapshots = 0
    if config.training.posthoc_ema:
        checkpoint += len(TRACKED) * model
        snapshots = NUM_SNAPSHOTS * len(TRACKED) * model
    return 3 * checkpoint + snapshots + model + 2 * images + _PICTURES


def require_space(run_dir: Path, config: Config) -> None:
    """Refuses a run that its folder could not hold, before anything is charged.

    Raises:
        StorageError: the folder cannot be written, or has too little space.
    """
    with storage_errors(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / "probe"
        probe.write_text("written")
        probe.unlink()
        free = shutil.disk_usage(run_dir).free
    if free < (needed := needed_bytes(config)):
        raise StorageError(
            f"'{run_dir}' has {free / 1e6:.1f} MB free, a run needs {needed / 1e6:.1f} MB for "
            "checkpoints and images: free space, or choose another storage folder; nothing more "
            "was spent"
        )
