"""EMA of any length after training (Karras et al. 2024, "EDM2", section 3).

Two power-function averages are tracked while training and snapshots of both kept; the average of
another length is the linear combination of the snapshots whose weights come closest to its own.

Privacy: post-processing of parameters that are private already. Trying lengths costs nothing; a
choice among them by scores on private images is as little covered as any choice by such scores.
"""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.utils import vector_to_parameters

from core import distributed
from core.diffusion.ema import NUM_SNAPSHOTS, TRACKED, PowerAverages, weights
from core.errors import ConfigError, storage_errors
from core.io.files import write_whole

SHORTEST, LONGEST = 0.04, 0.25
_WORST = 0.05


def keep_snapshot(averages: PowerAverages, step: int, num_steps: int, folder: Path) -> None:
    """Writes `folder/STEP.pt` if the step is one of 12, evenly spaced, the last among them.

    Raises:
        StorageError: it cannot be written; on all ranks.
    """

    def keep() -> None:
        with storage_errors(folder):
            write_whole(folder / f"{step:08d}.pt", partial(torch.save, averages.values.cpu()))

    if step in {round(num_steps * (k + 1) / NUM_SNAPSHOTS) for k in range(NUM_SNAPSHOTS)} - {0}:
        distributed.on_rank_0(keep)


def combination(sigma_rel: float, steps: Iterable[int], num_steps: int) -> tuple[np.ndarray, float]:
    """How much of each snapshot, `[steps, 2]`, and the relative error of the resulting weights."""
    columns = [weights(length, step, num_steps) for step in steps for length in TRACKED]
    basis, wanted = np.stack(columns, axis=1), weights(sigma_rel, num_steps, num_steps)
    parts = np.linalg.lstsq(basis, wanted, rcond=None)[0]
    error = np.linalg.norm(basis @ parts - wanted) / np.linalg.norm(wanted)
    return parts.reshape(-1, len(TRACKED)), float(error)


def reconstruct(module: nn.Module, folder: Path, num_steps: int, sigma_rel: float) -> None:
    """Gives a module the average of length `sigma_rel` over a finished training.

    Raises:
        ConfigError: the length is out of range, or the folder holds too few snapshots for it.
    """
    if not SHORTEST <= sigma_rel <= LONGEST:
        raise ConfigError(f"--ema-length={sigma_rel:g} must lie in [{SHORTEST}, {LONGEST}]")
    paths = sorted(folder.glob("*.pt"))
    if not paths:
        raise ConfigError(
            f"'{folder}' holds no snapshots: train with training.posthoc_ema=true to choose the "
            "length of the average afterwards"
        )
    parts, error = combination(sigma_rel, [int(path.stem) for path in paths], num_steps)
    if error > _WORST:
        raise ConfigError(
            f"the {len(paths)} snapshots in '{folder}' give --ema-length={sigma_rel:g} to "
            f"{error:.0%} only, not to {_WORST:.0%}: choose one nearer to {TRACKED[0]} or "
            f"{TRACKED[1]}, or train for more steps, without a shared warm-up"
        )
    total: torch.Tensor = torch.zeros(())
    for path, shares in zip(paths, parts, strict=True):
        kept = torch.load(path, map_location="cpu", weights_only=True).double()
        total = total + torch.from_numpy(shares) @ kept
    device = next(module.parameters()).device
    vector_to_parameters(total.float().to(device), module.parameters())
