"""Membership inference attacks by diffusion loss, beside the bound that epsilon gives.

The loss of the released denoiser is lower on what it was trained on (Carlini et al. 2023, section
5). How much so depends on the noise level (Duan et al. 2023; Dubinski et al. 2024), so each of
several is an attack of its own, beside the one that averages over all.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import nn

from core.config import DiffusionConfig
from core.data import Split, to_float, to_model_range
from core.diffusion.denoiser import MomentsDenoiser

FALSE_POSITIVE_RATE = 0.01
LEVELS = 8
"""Noise levels at which each image's loss is measured."""
_DRAWS = 2
"""Of noise at each level."""
_CONFIDENCE = 0.95
_RESAMPLES = 1000


def noise_levels(config: DiffusionConfig) -> list[float]:
    """`LEVELS` quantiles of the sigma that training draws (Karras et al. 2022, table 1)."""
    quantiles = (torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS
    return (config.p_mean + config.p_std * torch.special.ndtri(quantiles)).exp().tolist()


@torch.no_grad()
def denoising_losses(
    denoiser: nn.Module,
    split: Split,
    config: DiffusionConfig,
    batch_size: int,
    seed: int,
    device: torch.device | str,
) -> np.ndarray:
    """Loss of each image, as it was trained on, at each noise level; float64 `[N, LEVELS]`.

    All images get the same draws of noise, so that they differ by themselves alone.

    Privacy: of real images, the losses are not private.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (LEVELS, _DRAWS, *split.images.shape[1:])
    noise = torch.randn(shape, generator=generator).to(device)
    sigmas, parts = noise_levels(config), list[torch.Tensor]()
    for images, labels in zip(
        split.images.split(batch_size), split.labels.to(device).split(batch_size), strict=True
    ):
        clean = to_model_range(to_float(images.to(device)))
        losses: list[torch.Tensor] = []
        for sigma, draws in zip(sigmas, noise, strict=True):
            level = torch.full((len(images),), sigma, device=device)
            weight = (level**2 + config.sigma_data**2) / (level * config.sigma_data) ** 2
            if isinstance(denoiser, MomentsDenoiser):
                weight = denoiser.weight(level, labels)
            denoised = [denoiser(clean + sigma * draw, level, labels) for draw in draws]
            errors = [(each - clean).square().mean((1, 2, 3)) for each in denoised]
            losses.append(weight * torch.stack(errors).mean(0))
        parts.append(torch.stack(losses, dim=1).cpu())
    return torch.cat(parts).double().numpy()


def attacks(
    members: np.ndarray,
    others: np.ndarray,
    sigmas: Sequence[float],
    epsilon: float,
    delta: float,
    seed: int,
) -> dict[str, Any]:
    """`attack` by the loss averaged over all noise levels, and under `levels` by each alone.

    Args:
        members: losses of training images `[N, levels]`.
        others: losses of held-out images `[M, levels]`, in random order.
        sigmas: the noise levels.

    Privacy: computed from real images without protection: not private.
    """
    levels = [
        {"sigma": sigma, **attack(mine, theirs, epsilon, delta, seed)}
        for sigma, mine, theirs in zip(sigmas, members.T, others.T, strict=True)
    ]
    combined = attack(members.mean(1), others.mean(1), epsilon, delta, seed)
    return {**combined, "levels": levels}


def attack(
    members: np.ndarray, others: np.ndarray, epsilon: float, delta: float, seed: int = 0
) -> dict[str, Any]:
    """How well a low loss tells training images from held-out ones (Yeom et al. 2018).

    The threshold is a quantile of every other held-out loss; the rates are those of the images
    that did not choose it, with exact intervals (Clopper and Pearson 1934). For every attack on an
    (epsilon, delta)-private model TPR <= e^epsilon FPR + delta (Kairouz et al. 2015).

    Args:
        members: losses of training images `[N]`.
        others: losses of held-out images `[M]`, in random order.
        epsilon: of the model.
        delta: of the model.

    Returns:
        `auc` with its bootstrap interval; `tpr` and `fpr` at a threshold of nominally
        `FALSE_POSITIVE_RATE`, with intervals; `tpr_bound`, what epsilon allows at the upper end of
        the interval of `fpr`; `epsilon_lower_bound`, which the attack proves; and whether the
        bound holds.

    Raises:
        ValueError: fewer than 4 images on a side.

    Privacy: computed from real images without protection: not private.
    """
    if min(len(members), len(others)) < 4:
        raise ValueError(f"{len(members)} members and {len(others)} others: 4 of each are needed")
    choosing, judging = np.sort(others[::2]), others[1::2]
    threshold = choosing[max(1, int(FALSE_POSITIVE_RATE * len(choosing))) - 1]
    hits, alarms = int((members <= threshold).sum()), int((judging <= threshold).sum())
    tpr, fpr = interval(hits, len(members)), interval(alarms, len(judging))
    bound = _bound(epsilon, delta, fpr[1])
    proven = (tpr[0] - delta) / fpr[1]
    return {
        "num_members": len(members),
        "num_others": len(others),
        "auc": area(members, others),
        "auc_interval": _bootstrap(members, others, seed),
        "tpr": hits / len(members),
        "tpr_interval": tpr,
        "fpr": alarms / len(judging),
        "fpr_interval": fpr,
        "nominal_fpr": FALSE_POSITIVE_RATE,
        "epsilon": epsilon,
        "delta": delta,
        "tpr_bound_at_nominal_fpr": _bound(epsilon, delta, FALSE_POSITIVE_RATE),
        "tpr_bound": bound,
        "epsilon_lower_bound": math.log(proven) if proven > 1 else 0.0,
        "within_bound": tpr[0] <= bound,
    }


def interval(successes: int, trials: int) -> tuple[float, float]:
    """Exact 95 % interval of a share (Clopper and Pearson 1934)."""
    tail = (1 - _CONFIDENCE) / 2
    low = stats.beta.ppf(tail, successes, trials - successes + 1) if successes else 0.0
    high = stats.beta.ppf(1 - tail, successes + 1, trials - successes) if successes < trials else 1
    return float(low), float(high)


def area(members: np.ndarray, others: np.ndarray) -> float:
    """Chance that a random member has a lower loss than a random other; ties count half."""
    ordered = np.sort(others)
    below = np.searchsorted(ordered, members, "left")
    up_to = np.searchsorted(ordered, members, "right")
    return float(1 - (below + up_to).mean() / (2 * len(others)))


def _bound(epsilon: float, delta: float, fpr: float) -> float:
    return min(1.0, math.exp(min(epsilon, 700.0)) * fpr + delta)


def _bootstrap(members: np.ndarray, others: np.ndarray, seed: int) -> tuple[float, float]:
    random = np.random.default_rng(seed)
    areas = [
        area(random.choice(members, len(members)), random.choice(others, len(others)))
        for _ in range(_RESAMPLES)
    ]
    low, high = np.quantile(areas, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return float(low), float(high)
