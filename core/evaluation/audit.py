"""Audit in one run: lower bounds of epsilon from planted canaries.

The one-run audit of Steinke, Nasr and Jagielski (2023). Canaries are made-up examples, each in the
data with probability 1/2. Whoever sees what is released guesses of some whether they are in it and
abstains for the others; the more guesses are right, the larger epsilon must be. The white box sees
the noisy updates of DP-SGD, where each canary's gradient has a coordinate of its own, which no
other example touches: the worst case that DP-SGD must withstand. The black box sees synthetic
images alone, of a model trained on images as canaries.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

from core.config import DatasetConfig
from core.data import Split
from core.evaluation.neighbors import nearest, pixels
from core.privacy.keys import KeyedStream
from core.privacy.mechanisms.dp_sgd import DpSgdOptimizer
from core.privacy.mechanisms.sampling import PoissonSampler
from core.privacy.plan.releases import DpSgdPlan

CONFIDENCE = 0.95
"""With which the bounds of both forms hold at once."""
_GUESSED = (0.01, 0.03, 0.1)
"""Shares of the canaries that are guessed."""
_FAILURE = (1 - CONFIDENCE) / (2 * len(_GUESSED))
"""Of the bound by each share in each form: together they fail as often as `CONFIDENCE` allows."""
_GRID = 8
"""Most squares along the side of an image that is a canary."""
_VALUES = 2**24
"""Values of gradients in memory at once."""
_INCLUSION = 2**63
"""Step of the stream of masks at which the canaries are drawn; training has fewer."""
_MOST = 50.0


def coins(stream: KeyedStream, num_canaries: int) -> torch.Tensor:
    """Whether each canary is in the data, with probability 1/2; bool `[num_canaries]`."""
    return torch.as_tensor(stream.bits(_INCLUSION, num_canaries) < np.uint64(2**63))


def canary_scores(
    plan: DpSgdPlan, num_canaries: int, masks: KeyedStream, noise: KeyedStream, device: str
) -> tuple[np.ndarray, np.ndarray]:
    """Trains on canaries alone by the sampler and the optimizer that runs use.

    Returns:
        Of each canary the sum of its coordinate over all noisy updates, and whether it was in the
        data; `[num_canaries]` each.

    Privacy: opens no data.
    """
    included = coins(masks, num_canaries)
    parameter = nn.Parameter(torch.zeros(num_canaries, device=device))
    optimizer = DpSgdOptimizer(torch.optim.SGD([parameter], 1.0), plan, noise)
    sampler = PoissonSampler(masks, num_canaries, plan.sample_rate)
    for step in range(plan.num_steps):
        chosen = sampler.indices(step)
        for part in chosen[included[chosen]].split(max(1, _VALUES // num_canaries)):
            gradients = torch.zeros(len(part), num_canaries, device=device)
            gradients[torch.arange(len(part)), part] = 2 * plan.max_grad_norm  # To be clipped.
            parameter.grad_sample = gradients  # type: ignore[attr-defined]
            optimizer.accumulate()
        optimizer.release(step)
    return -parameter.detach().cpu().numpy(), included.numpy()


def canary_images(dataset: DatasetConfig, num_canaries: int, seed: int) -> Split:
    """Images of random black and white squares, equally many of each class, all unlike any other.

    Each channel of each square is 0 or 255, so that all lie equally far from grey.
    """
    side, grid = dataset.image_size, min(_GRID, dataset.image_size)
    generator = torch.Generator().manual_seed(seed)
    shape = (num_canaries, dataset.channels, grid, grid)
    squares = torch.randint(0, 2, shape, generator=generator).float()
    images = F.interpolate(squares * 255, size=(side, side)).to(torch.uint8)
    return Split(images, torch.arange(num_canaries) % dataset.num_classes)


def closeness(canaries: Split, synthetic: Split, batch_size: int) -> np.ndarray:
    """Minus each canary's distance to the nearest synthetic image of its class; float64 `[m]`."""
    scores = torch.empty(len(canaries.labels), dtype=torch.float64)
    for label in canaries.labels.unique():
        own, drawn = canaries.labels == label, synthetic.labels == label
        found = nearest(canaries.images[own], synthetic.images[drawn], pixels, batch_size)
        scores[own] = -found.distances
    return scores.numpy()


def audit(scores: np.ndarray, included: np.ndarray, delta: float) -> dict[str, Any]:
    """Epsilon that the scores of canaries prove, at `delta` and with `CONFIDENCE`.

    The highest scores are guessed to be in the data and as many of the lowest not to be.

    Args:
        scores: of the canaries `[m]`.
        included: whether each was in the data `[m]`.

    Returns:
        `epsilon_lower_bound`, the `guesses` that prove it and how many of them are `correct`, the
        number of `canaries`, and `provable`, the bound if the most guesses were all right.
    """
    order, total = np.argsort(scores), len(scores)
    best: dict[str, Any] = {"epsilon_lower_bound": 0.0, "guesses": 0, "correct": 0}
    for share in _GUESSED:
        half = max(1, int(share * total / 2))
        correct = int(included[order[-half:]].sum() + (~included[order[:half]]).sum())
        bound = epsilon_bound(correct, 2 * half, total, delta, _FAILURE)
        if bound > best["epsilon_lower_bound"]:
            best = {"epsilon_lower_bound": bound, "guesses": 2 * half, "correct": correct}
    most = 2 * max(1, int(max(_GUESSED) * total / 2))
    provable = epsilon_bound(most, most, total, delta, _FAILURE)
    return {**best, "canaries": total, "provable": provable}


def epsilon_bound(correct: int, guesses: int, canaries: int, delta: float, failure: float) -> float:
    """Largest epsilon at which so many correct guesses have at most the probability `failure`."""
    if p_value(correct, guesses, canaries, 0.0, delta) > failure:
        return 0.0
    low, high = 0.0, _MOST
    while high - low > 1e-4:
        middle = (low + high) / 2
        if p_value(correct, guesses, canaries, middle, delta) > failure:
            high = middle
        else:
            low = middle
    return low


def p_value(correct: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """Most that the probability of so many correct guesses can be under (epsilon, delta)-DP.

    Steinke, Nasr and Jagielski (2023), theorem 5.2: with f(v) the probability that a binomial
    number of `guesses` trials of chance e^epsilon / (1 + e^epsilon) reaches v, it is
    f(v) + 2 m delta max over i of (f(v - i) - f(v)) / i.
    """
    chance = 1 / (1 + math.exp(-epsilon))
    reached = float(stats.binom.sf(correct - 1, guesses, chance))
    fewer = stats.binom.pmf(np.arange(correct)[::-1], guesses, chance)
    steepest = float((np.cumsum(fewer) / np.arange(1, correct + 1)).max(initial=0.0))
    return min(1.0, reached + 2 * canaries * delta * steepest)
