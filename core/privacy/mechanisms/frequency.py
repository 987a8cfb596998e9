"""Frequency features: noisy random Fourier features of all private images.

FETA-Pro (Gong et al. 2025) with the features of Rahimi and Recht (2007) as DP-MERF (Harder et al.
2021) uses them: an image x has `phi(x) = sqrt(2/D) [cos(W x), sin(W x)]`, and for each class the
released object is `(sum over its images of phi(x)) + N(0, (sigma * S)^2 I)`. As cos^2 + sin^2 = 1,
every image has norm exactly 1, whatever its pixels, so S = 1 without any clipping. Dividing by the
public expected class count and everything later is post-processing.
"""

import torch

from core.config import Config
from core.data import Split, to_float
from core.privacy.keys import KeyedStream
from core.privacy.plan.releases import FrequencyPlan
from core.seeds import public_seed

_CHUNK = 1024


class FourierFeatures:
    """The map phi, of which `phi(x) . phi(y)` approximates a Gaussian kernel.

    The kernel is `exp(-d^2 / (2 l^2))`, d being the root-mean-square difference of the pixels of x
    and y and l the `frequency.length_scale`, so that one value serves all image sizes.

    Args:
        config: its public seed draws the frequencies.
        device: where features are computed.

    Attributes:
        count: D.

    Privacy: made of public numbers alone; no image has a part in it.
    """

    def __init__(self, config: Config, device: str) -> None:
        dataset, frequency = config.dataset, config.frequency
        pixels = dataset.channels * dataset.image_size**2
        generator = torch.Generator().manual_seed(public_seed(f"{config.seed}/frequencies", 0))
        drawn = torch.randn((pixels, frequency.num_features // 2), generator=generator)
        self.count, self._device = frequency.num_features, device
        self._frequencies = (drawn / (frequency.length_scale * pixels**0.5)).to(device)

    def __call__(
        self, images: torch.Tensor, precision: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """The features of images.

        Args:
            images: finite float32 `[B, C, H, W]`, in [0, 1].
            precision: of what follows the product `W x`.

        Returns:
            `[B, D]`, each row of norm 1 to rounding.
        """
        phases = (images.to(self._device).flatten(1) @ self._frequencies).to(precision)
        return torch.cat((phases.cos(), phases.sin()), dim=1) * phases.shape[1] ** -0.5


def release_features(
    train: Split,
    features: FourierFeatures,
    num_classes: int,
    plan: FrequencyPlan,
    noise: KeyedStream,
) -> torch.Tensor:
    """Draws the noisy mean features of each class; call once per trial and keep the result.

    Args:
        train: private images uint8 `[N, C, H, W]` with labels in [0, num_classes).
        plan: noise and divisor; the only source of these numbers.
        noise: secret stream of the Gaussian noise.

    Returns:
        float32 `[num_classes, D]`, on the CPU.

    Privacy: the Gaussian mechanism on all records, once. Each record adds a vector of norm
    `plan.sensitivity` to the row of its class and nothing to the others; every entry of every
    class gets noise of `plan.noise_stddev`, in float64. All after the noise is post-processing.
    """
    sums = feature_sums(train, features, num_classes)
    noisy = sums + plan.noise_stddev * noise.normal(0, sums.numel()).view_as(sums)
    return (noisy / plan.expected_class_count).float()


def feature_sums(train: Split, features: FourierFeatures, num_classes: int) -> torch.Tensor:
    """The sensitive statistic: a sum of features for each class, before any noise.

    Returns:
        float64 `[num_classes, D]`, on the CPU.

    Privacy: not private by itself. Each image is made finite and clamped to [0, 1], so its phases
    are finite and its features, taken in float64, have norm 1 to 1e-12.
    """
    sums = torch.zeros((num_classes, features.count), dtype=torch.float64)
    parts = zip(torch.split(train.images, _CHUNK), torch.split(train.labels, _CHUNK), strict=True)
    for images, labels in parts:
        pixels = torch.nan_to_num(to_float(images), nan=0.0).clamp(0.0, 1.0)
        rows = features(pixels, precision=torch.float64).cpu()
        sums.index_add_(0, labels, rows)
    return sums
