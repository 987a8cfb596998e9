"""Classifiers by name: a small convolutional one, residual ones, two without convolution."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from core.evaluation.residual import (
    BasicBlock,
    GroupedBottleneck,
    PreActivationBlock,
    ResidualNetwork,
    conv,
    initialize,
)

FEATURES = 64
"""Width of the convolutional classifier's penultimate layer."""


class Classifier(nn.Module):
    """Convolution, batch norm, ReLU, 2x2 pooling; below 9 pixels no more pooling; two dense layers.

    Args:
        channels: of the images.
        size: `(H, W)`, each at least 8.
        num_classes: number of classes, >= 1.
        generator: CPU generator from which all weights are drawn.

    Raises:
        ValueError: the images are smaller than 8x8.
    """

    def __init__(
        self, channels: int, size: tuple[int, int], num_classes: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        if min(size) < 8:
            raise ValueError(f"images are {size[0]}x{size[1]}: the classifier needs at least 8x8")
        halvings = max(1, math.ceil(math.log2(min(size) / 8)))
        widths = [channels, *(min(32 * 2**level, 128) for level in range(max(3, halvings + 1)))]
        layers: list[nn.Module] = []
        for level, (before, after) in enumerate(itertools.pairwise(widths)):
            layers += [conv(before, after, 3), nn.BatchNorm2d(after), nn.ReLU()]
            if level < halvings:
                layers.append(nn.MaxPool2d(2))
        layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
        layers += [nn.utils.skip_init(nn.Linear, 4 * 128, FEATURES), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.utils.skip_init(nn.Linear, FEATURES, num_classes)
        initialize(self, generator)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits `[B, num_classes]` of images `[B, C, H, W]` in [0, 1]."""
        return self.head(self.penultimate(x))

    def penultimate(self, x: torch.Tensor) -> torch.Tensor:
        """Features `[B, FEATURES]`, >= 0, of images `[B, C, H, W]` in [0, 1]."""
        return self.features((2 * x - 1).contiguous(memory_format=torch.channels_last))


class Flat(nn.Module):
    """Dense layers on the pixels in [-1, 1]; with no hidden layer, logistic regression.

    Args:
        hidden: width of the hidden layer; 0 for none. The rest is as of `Classifier`.
    """

    def __init__(
        self,
        hidden: int,
        channels: int,
        size: tuple[int, int],
        num_classes: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        inputs = channels * size[0] * size[1]
        widths = [inputs, *([hidden] if hidden else []), num_classes]
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in itertools.pairwise(widths):
            layers += [nn.utils.skip_init(nn.Linear, before, after), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])
        initialize(self, generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits `[B, num_classes]` of images `[B, C, H, W]` in [0, 1]."""
        return self.layers(2 * x - 1)


@dataclass(frozen=True)
class Network:
    """How a classifier is built and trained.

    Attributes:
        build: from channels, `(H, W)`, number of classes and a CPU generator for all weights.
        learning_rate: peak of AdamW's.
        what: the network in words, with its source.
    """

    build: Callable[[int, tuple[int, int], int, torch.Generator], nn.Module]
    learning_rate: float
    what: str


NETWORKS = {
    "cnn": Network(Classifier, 3e-3, "small convolutional network, 64 features"),
    "resnet": Network(
        partial(ResidualNetwork, BasicBlock, 18, (16, 32, 64)),
        1e-3,
        "ResNet-110 (He et al. 2016)",
    ),
    "wrn": Network(
        partial(ResidualNetwork, PreActivationBlock, 4, (160, 320, 640)),
        1e-3,
        "WRN-28-10 without dropout (Zagoruyko and Komodakis 2016)",
    ),
    "resnext": Network(
        partial(ResidualNetwork, GroupedBottleneck, 3, (256, 512, 1024)),
        1e-3,
        "ResNeXt-29, 8x64d (Xie et al. 2017)",
    ),
    "mlp": Network(partial(Flat, 100), 3e-3, "one hidden layer of 100"),
    "logistic": Network(partial(Flat, 0), 1e-2, "multinomial logistic regression"),
}
"""Every classifier that `evaluation.classifiers` may name."""
