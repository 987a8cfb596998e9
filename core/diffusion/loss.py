"""The EDM loss with noise multiplicity (Karras et al. 2022, eq. 8; Dockhorn et al. 2023, eq. 7)."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from core.config import DiffusionConfig

Weight = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Draws:
    """Diffusion randomness of B examples, K draws each.

    Attributes:
        log_sigma: standard normal `[B, K]`.
        noise: standard normal `[B, K, C, H, W]`.
        dropout: uniform in [0, 1) `[B, K]`; a label is dropped below the dropout rate.
    """

    log_sigma: torch.Tensor
    noise: torch.Tensor
    dropout: torch.Tensor


def draw(
    stream: str,
    step: int,
    ids: torch.Tensor,
    copies: int,
    shape: tuple[int, ...],
    device: str,
    fused: bool = False,
) -> Draws:
    """Draws from a generator of each example's own, seeded by (stream, step, id).

    What an example draws depends on neither the rest of its batch, nor the rank, nor the physical
    batch size; without the first, removing one record would change the others' gradients and the
    clip norm would not bound the sensitivity.

    Args:
        stream: public name, such as the run's seed and stage.
        ids: int64 `[B]`, identity of each example in its data set.
        fused: whether one Triton kernel draws for all, other numbers than torch's generators.
    """
    entries = 2 + torch.Size(shape).numel()
    base = hashlib.sha256(f"{stream}/{step}".encode()).digest()
    digests = [hashlib.sha256(base + i.to_bytes(8, "big")).digest() for i in ids.tolist()]
    seeds = [int.from_bytes(digest[:8], "big") >> 1 for digest in digests]
    if fused:
        from core.diffusion.draws_kernel import normal  # Triton is optional.

        keys = torch.tensor(seeds, dtype=torch.long).to(device, non_blocking=True)
        values = normal(keys, copies * entries)
    else:
        generator = torch.Generator(device)
        values = torch.empty((len(ids), copies * entries), device=device)
        for row, seed in enumerate(seeds):
            values[row].normal_(generator=generator.manual_seed(seed))
    values = values.view(len(ids), copies, entries)
    uniform = torch.special.ndtr(values[..., 1])
    return Draws(values[..., 0], values[..., 2:].reshape(len(ids), copies, *shape), uniform)


def edm_loss(
    denoiser: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    draws: Draws,
    config: DiffusionConfig,
    label_dropout: float,
    num_classes: int,
    weight_of: Weight | None = None,
) -> torch.Tensor:
    """Loss of each example: weighted squared error, mean over pixels and over its K draws.

    Args:
        denoiser: `(x, sigma, labels) -> denoised`, called once on `[B * K, C, H, W]`, the copies
            of an example next to each other.
        images: clean images in [-1, 1], `[B, C, H, W]`.
        labels: int64 `[B]`.
        weight_of: `(sigma, labels) -> weight`, both `[B * K]`; EDM's of `sigma_data` by default.

    Returns:
        `[B]`, fp32.
    """
    copies = draws.noise.shape[1]
    sigma = (config.p_mean + config.p_std * draws.log_sigma).exp()
    weight = (sigma**2 + config.sigma_data**2) / (sigma * config.sigma_data) ** 2
    noisy = images[:, None] + sigma[..., None, None, None] * draws.noise
    conditions = torch.where(draws.dropout < label_dropout, num_classes, labels[:, None])
    denoised = denoiser(noisy.flatten(0, 1), sigma.flatten(), conditions.flatten())
    if weight_of is not None:
        weight = weight_of(sigma.flatten(), conditions.flatten()).view_as(sigma)
    error = (denoised.float().view_as(noisy) - images[:, None]).square().mean((2, 3, 4))
    return (weight * error).sum(1) / copies
