"""The EDM preconditioned denoiser (Karras et al. 2022, equation 7 and table 1), also of moments."""

import torch
from torch import nn

from core.config import Config
from core.diffusion.gaussians import Gaussians
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


class MomentsDenoiser(Denoiser):
    """D(x; sigma) = D_c(x; sigma) + c(sigma) F(c_in x, D_c(x; sigma); c_noise).

    D_c is the posterior mean of the mixture of class c and c^2 its expected squared error, so
    that F, whose last layer starts at zero, learns what is not Gaussian, at unit variance.

    Args:
        network: raw network F, whose input has twice the channels of an image.
    """

    def __init__(self, network: nn.Module, sigma_data: float, gaussians: Gaussians) -> None:
        super().__init__(network, sigma_data)
        self.gaussians = gaussians

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """As of `Denoiser`; the closed form in float32, whatever the network's precision."""
        with torch.autocast(x.device.type, enabled=False):
            closed = self.gaussians(x, sigma, labels)
            c_out = self.gaussians.error(sigma, labels).sqrt().view(-1, 1, 1, 1)
            c_in = (sigma**2 + self.sigma_data**2).rsqrt().view(-1, 1, 1, 1)
        return closed + c_out * self.network(
            torch.cat((c_in * x, closed), dim=1), sigma.log() / 4, labels
        )

    def weight(self, sigma: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Of the loss: 1 / c^2, `[B]`, so that F's own error counts the same at all levels."""
        return 1 / self.gaussians.error(sigma, labels)


def build_denoiser(
    config: Config, components: int | None = None, clusters: int | None = None
) -> Denoiser:
    """A freshly initialised denoiser; the same public seed gives the same weights.

    Global random state is left as it was.

    Args:
        components: of Gaussians that are still to be loaded; 0 for none. By default as the
            configuration says, like the next.
        clusters: of each class.
    """
    dataset, settings = config.dataset, config.central_images
    if components is None:
        components = settings.num_components if config.uses_moments else 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        inputs = 2 if components else 1
        network = UNet(config.model, dataset, config.runtime.channels_last, inputs)
    if not components:
        return Denoiser(network, config.diffusion.sigma_data)
    pixels = dataset.channels * dataset.image_size**2
    clusters = clusters or settings.num_clusters
    gaussians = Gaussians(pixels, components, dataset.num_classes, clusters)
    return MomentsDenoiser(network, config.diffusion.sigma_data, gaussians)
