"""The frequency stage's generator: small, fitted to noisy features, and free of charge.

DP-MERF (Harder et al. 2021): the generator's mean features of each class are brought close to the
released ones; FETA-Pro (Gong et al. 2025) warms the diffusion model up on what it then draws.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from core.config import Config
from core.data import Split
from core.device import config_device
from core.diffusion.unet import group_norm
from core.errors import NotFiniteError
from core.privacy.mechanisms.frequency import FourierFeatures
from core.seeds import public_seed

_LATENT, _WIDTH = 16, 16


class AuxiliaryGenerator(nn.Module):
    """Images of a label: a quarter of the side, doubled twice, then cropped to the side.

    Args:
        channels: of the images.
        side: of the images, at least 4.
    """

    def __init__(self, channels: int, side: int, num_classes: int) -> None:
        super().__init__()
        self._side, self._first, self._classes = side, math.ceil(side / 4), num_classes
        self.dense = nn.Linear(_LATENT + num_classes, 2 * _WIDTH * self._first**2)
        self.norm = group_norm(2 * _WIDTH)
        self.middle = nn.Conv2d(2 * _WIDTH, _WIDTH, 3, padding=1)
        self.middle_norm = group_norm(_WIDTH)
        self.out = nn.Conv2d(_WIDTH, 4 * channels, 3, padding=1)

    def forward(self, latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """`[B, 16]` and int64 `[B]` to images in (0, 1), `[B, C, H, W]`."""
        conditions = F.one_hot(labels, self._classes).to(latents.dtype)
        x = self.dense(torch.cat((latents, conditions), dim=1))
        x = F.relu(self.norm(x.unflatten(1, (2 * _WIDTH, self._first, self._first))))
        x = F.relu(self.middle_norm(self.middle(F.interpolate(x, scale_factor=2.0))))
        x = F.pixel_shuffle(self.out(x), 2)
        return x[..., : self._side, : self._side].sigmoid()

    @torch.no_grad()
    def draw(self, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Images in [-1, 1], `[B, C, H, W]`."""
        shape = (len(labels), _LATENT)
        latents = torch.randn(shape, generator=generator, device=labels.device)
        return 2 * self(latents, labels) - 1


def fitted_images(
    config: Config, features: FourierFeatures, released: torch.Tensor
) -> tuple[Split, AuxiliaryGenerator]:
    """Fits a generator to the released features and draws images from it.

    Args:
        features: the public map of the release.
        released: noisy mean features of each class, `[num_classes, D]`.

    Returns:
        uint8 `[frequency.num_images, C, H, W]`, image i of class `i % num_classes`; and the
        generator.

    Raises:
        NotFiniteError: the generator diverged.

    Privacy: post-processing of the release; on one machine a function of it and the public seed.
    """
    device, dataset, settings = config_device(config), config.dataset, config.frequency
    num_classes = dataset.num_classes
    stream = f"{config.seed}/auxiliary"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(public_seed(stream, 0))
        generator = AuxiliaryGenerator(dataset.channels, dataset.image_size, num_classes)
    generator = generator.to(device)
    optimizer = torch.optim.Adam(generator.parameters(), lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.num_steps)
    targets = released.to(device)
    of_each = settings.batch_size // num_classes
    labels = torch.arange(num_classes, device=device).repeat_interleave(of_each)

    def latents(number: int, count: int) -> torch.Tensor:
        drawn = torch.Generator().manual_seed(public_seed(stream, 1 + number))
        return torch.randn((count, _LATENT), generator=drawn).to(device)

    for number in range(settings.num_steps):
        images = generator(latents(number, len(labels)), labels)
        means = features(images).unflatten(0, (num_classes, of_each)).mean(dim=1)
        distances_to(targets, means, of_each).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
    labels = torch.arange(settings.num_images) % num_classes
    parts: list[torch.Tensor] = []
    with torch.no_grad():
        for number, part in enumerate(labels.split(settings.batch_size)):
            drawn = generator(latents(settings.num_steps + number, len(part)), part.to(device))
            if not drawn.isfinite().all():
                raise NotFiniteError(
                    "the generator of the frequency stage diverged: its images are not finite; "
                    f"start anew with frequency.learning_rate below {settings.learning_rate:g}"
                )
            parts.append((drawn * 255).round().to(torch.uint8).cpu())
    return Split(torch.cat(parts), labels), generator


def distances_to(targets: torch.Tensor, means: torch.Tensor, count: int) -> torch.Tensor:
    """Squared distance of each class's targets to the generator's expected features.

    Without bias (Gretton et al. 2012, equation 3): features have norm 1, so the mean of `count`
    of them has on average a squared norm of 1/count too much from each being compared with itself.

    Args:
        targets: `[num_classes, D]`.
        means: of `count` images of each class, at least 2.

    Returns:
        `[num_classes]`; negative where chance outweighs the distance.
    """
    own = (count * means.square().sum(1) - 1) / (count - 1)
    return own - 2 * (means * targets).sum(1) + targets.square().sum(1)
