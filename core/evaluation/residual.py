"""Residual classifiers for small images: ResNet, Wide ResNet and ResNeXt as defined for CIFAR."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F


class ResidualNetwork(nn.Module):
    """3x3 convolution, three stages of blocks of which the later two halve the side, mean, dense.

    Args:
        block: class of the blocks, built from widths before and after and the stride.
        blocks: in each stage.
        widths: of the three stages.
        channels: of the images.
        size: any `(H, W)`.
        num_classes: number of classes, >= 1.
        generator: CPU generator from which all weights are drawn.
    """

    def __init__(
        self,
        block: type["BasicBlock | PreActivationBlock | GroupedBottleneck"],
        blocks: int,
        widths: Sequence[int],
        channels: int,
        size: tuple[int, int],
        num_classes: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        before = block.stem
        layers: list[nn.Module] = [conv(channels, before, 3)]
        if not block.ends_in_sum:
            layers += [nn.BatchNorm2d(before), nn.ReLU()]
        for stage, width in enumerate(widths):
            for number in range(blocks):
                layers.append(block(before, width, 2 if stage and not number else 1))
                before = width
        if block.ends_in_sum:
            layers += [nn.BatchNorm2d(before), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.utils.skip_init(nn.Linear, before, num_classes)
        initialize(self, generator)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits `[B, num_classes]` of images `[B, C, H, W]` in [0, 1]."""
        x = self.features((2 * x - 1).contiguous(memory_format=torch.channels_last))
        return self.head(x.mean((2, 3)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions (He et al. 2016, "Deep Residual Learning", figure 5 left, option B)."""

    stem, ends_in_sum = 16, False

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            conv(before, width, 3, stride),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            conv(width, width, 3),
            nn.BatchNorm2d(width),
        )
        self.shortcut = _shortcut(before, width, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Activations after the block."""
        return F.relu(self.residual(x) + self.shortcut(x))


class PreActivationBlock(nn.Module):
    """Norm and ReLU before each 3x3 convolution (Zagoruyko and Komodakis 2016, figure 1)."""

    stem, ends_in_sum = 16, True

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.activation = nn.Sequential(nn.BatchNorm2d(before), nn.ReLU())
        self.residual = nn.Sequential(
            conv(before, width, 3, stride),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            conv(width, width, 3),
        )
        self.projects = before != width
        if self.projects:
            self.shortcut = conv(before, width, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Sum, not yet activated; a projection starts from the activated input."""
        active = self.activation(x)
        return self.residual(active) + (self.shortcut(active) if self.projects else x)


class GroupedBottleneck(nn.Module):
    """1x1, 3x3 in 8 groups, 1x1 (Xie et al. 2017, figure 3c): 8 x 64 channels at width 256."""

    stem, ends_in_sum = 64, False

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        inner = 2 * width
        self.residual = nn.Sequential(
            conv(before, inner, 1),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            conv(inner, inner, 3, stride, groups=8),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            conv(inner, width, 1),
            nn.BatchNorm2d(width),
        )
        self.shortcut = _shortcut(before, width, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Activations after the block."""
        return F.relu(self.residual(x) + self.shortcut(x))


def conv(before: int, after: int, size: int, stride: int = 1, groups: int = 1) -> nn.Module:
    """Convolution without bias that keeps the side but for the stride; not yet initialised."""
    return nn.utils.skip_init(
        nn.Conv2d, before, after, size, stride, size // 2, groups=groups, bias=False
    )


def initialize(model: nn.Module, generator: torch.Generator) -> None:
    """Draws the weights of all convolutions and dense layers (He et al. 2015); biases are 0."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _shortcut(before: int, width: int, stride: int) -> nn.Module:
    if before == width and stride == 1:
        return nn.Identity()
    return nn.Sequential(conv(before, width, 1, stride), nn.BatchNorm2d(width))
