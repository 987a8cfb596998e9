"""Summary of a set of images for distribution metrics: moments, and some features."""

from dataclasses import dataclass

import torch

from core.evaluation.features import FeatureExtractor
from core.evaluation.fid import Moments


@dataclass(frozen=True)
class Summary:
    """A set of images as an extractor sees it.

    Attributes:
        moments: of the features of all images.
        features: of a random part of the images, float32 `[K, D]`.
    """

    moments: Moments
    features: torch.Tensor


def summarize(
    extractor: FeatureExtractor,
    images: torch.Tensor,
    batch_size: int,
    device: torch.device | str = "cpu",
    num_features: int = 0,
    seed: int = 0,
) -> Summary:
    """Visits `images` once, in batches.

    Args:
        images: uint8 `[N, C, H, W]`, N >= 2.
        batch_size: most images given to the extractor at once, >= 1.
        device: where the moments are summed and the features lie.
        num_features: most features to keep; they bound the memory of scores that need more than
            moments.
        seed: chooses which are kept where there are more images.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    kept = torch.zeros(len(images), dtype=torch.bool)
    kept[order[:num_features]] = True
    moments = Moments(extractor.dimension, device)
    parts = [torch.zeros((0, extractor.dimension), device=device)]
    for batch, chosen in zip(images.split(batch_size), kept.split(batch_size), strict=True):
        features = extractor(batch)
        moments.update(features)
        parts.append(features[chosen.to(features.device)].to(device, torch.float32))
    return Summary(moments, torch.cat(parts))
