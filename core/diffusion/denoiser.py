"""The EDM preconditioned denoiser (Karras et al. 2022, equation 7 and table 1)."""

import torch
from torch import nn

from core.config import Config
from core.diffusion.unet import UNet


class Denoiser(nn.Module):
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise).

    This is v-prediction (Salimans and Ho 2022) for data scaled to unit variance: c_in x is their
    z, F is -v, and the EDM loss is their "SNR+1" loss, the squared error of v. What is left of
    the difference is how often each sigma is drawn: their cosine schedule, uniform in time, draws
    log sigma with mean log(sigma_data) and standard deviation pi/2, about as
    `diffusion.p_mean=-0.69 diffusion.p_std=1.57` does at sigma_data 0.5.

    Args:
        network: raw network F with `(x, c_noise, labels)`.
        sigma_data: standard deviation of the data in [-1, 1], a public constant.
    """

    def __init__(self, network: nn.Module, sigma_data: float) -> None:
        super().__init__()
        self.network = network
        self.sigma_data = sigma_data

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Estimates clean images.

        Args:
            x: noisy images `[B, C, H, W]`.
            sigma: noise level `[B]`, > 0.
            labels: int64 `[B]`; `num_classes` means "no label".

        Returns:
            Denoised images `[B, C, H, W]`.
        """
        s, d = sigma.view(-1, 1, 1, 1), self.sigma_data
        c_skip = d**2 / (s**2 + d**2)
        c_out = s * d / (s**2 + d**2).sqrt()
        c_in = 1 / (s**2 + d**2).sqrt()
        c_noise = sigma.log() / 4
        return c_skip * x + c_out * self.network(c_in * x, c_noise, labels)


def build_denoiser(config: Config) -> Denoiser:
    """A freshly initialised denoiser; the same public seed gives the same weights.

    Global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = UNet(config.model, config.dataset, config.runtime.channels_last)
        return Denoiser(network, config.diffusion.sigma_data)
