"""EDM samplers (Karras et al. 2022, algorithms 1 and 2) with classifier-free guidance."""

import torch
from torch import nn

from core.config import SamplerConfig
from core.diffusion.denoiser import MomentsDenoiser


def sigma_steps(config: SamplerConfig) -> torch.Tensor:
    """Noise levels from sigma_max down to sigma_min, then 0 (equation 5), `[num_steps + 1]`."""
    i = torch.arange(config.num_steps, dtype=torch.float64)
    low, high = config.sigma_min ** (1 / config.rho), config.sigma_max ** (1 / config.rho)
    sigmas = (high + i / (config.num_steps - 1) * (low - high)) ** config.rho
    return torch.cat((sigmas, sigmas.new_zeros(1)))


@torch.no_grad()
def sample(
    denoiser: nn.Module,
    labels: torch.Tensor,
    shape: tuple[int, int, int],
    config: SamplerConfig,
    num_classes: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Draws one image for each label.

    Starts from pure noise, or at the same level from noisy draws of the mixtures of moments, where
    `sigma_max` may be small: no step is then spent on what the closed form knows.
    `ddim` is the first-order deterministic solver (Song et al. 2021, eta 0), `heun` the second
    order one; `s_churn` > 0 makes either stochastic. Of a network that starts from moments,
    `closed_form_share` of the images, chosen at random, are draws of the moments themselves.

    Args:
        labels: int64 `[B]` on the device of the denoiser.
        shape: `(C, H, W)`.
        generator: source of all randomness, on the same device.

    Returns:
        Images `[B, C, H, W]`, nominally in [-1, 1], not clamped.
    """
    device = labels.device
    if config.closed_form_share > 0 and isinstance(denoiser, MomentsDenoiser):
        few = torch.rand((), generator=generator, device=device)
        count = int(config.closed_form_share * len(labels) + few)  # One size for all whole chunks.
        order = torch.randperm(len(labels), generator=generator, device=device)
        closed, others = order[:count], order[count:]
        images = torch.empty((len(labels), *shape), device=device)
        images[closed] = denoiser.gaussians.draw(labels[closed], generator).view(-1, *shape)
        if len(others):
            rest = config.model_copy(update={"closed_form_share": 0.0})
            images[others] = sample(denoiser, labels[others], shape, rest, num_classes, generator)
        return images

    def noise() -> torch.Tensor:
        return torch.randn((len(labels), *shape), generator=generator, device=device)

    low = config.precision == "bfloat16"

    @torch.autocast(device.type, dtype=torch.bfloat16, enabled=low)
    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        level = x.new_full((len(x),), float(sigma))
        denoised = denoiser(x, level, labels)
        if config.guidance == 1:
            return denoised
        free = denoiser(x, level, torch.full_like(labels, num_classes))
        return free + config.guidance * (denoised - free)

    t = sigma_steps(config)  # On the CPU, where no comparison waits for a GPU.
    gamma_max = min(config.s_churn / config.num_steps, 2**0.5 - 1)
    x = noise() * t[0].float()
    if isinstance(denoiser, MomentsDenoiser):  # Exact from any level at which F adds nothing.
        x = denoiser.gaussians.with_outside(labels, generator).view_as(x) + x
    for i in range(config.num_steps):
        t_cur, t_next = t[i], t[i + 1]
        if gamma_max > 0 and config.s_min <= t_cur <= config.s_max:
            t_hat = t_cur * (1 + gamma_max)
            x = x + (t_hat**2 - t_cur**2).sqrt().float() * config.s_noise * noise()
            t_cur = t_hat
        slope = (x - denoise(x, t_cur)) / t_cur.float()
        step = (t_next - t_cur).float()
        x_next = x + step * slope
        if config.name == "heun" and t_next > 0:
            slope_next = (x_next - denoise(x_next, t_next)) / t_next.float()
            x_next = x + step * 0.5 * (slope + slope_next)
        x = x_next
    return x
