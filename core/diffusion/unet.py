"""A small UNet in the manner of DDPM++ (Song et al. 2021; Dhariwal and Nichol 2021).

Built of layers that keep the examples of a batch apart (no batch norm), so that per-example
gradients exist.
"""

import torch
import torch.nn.functional as F
from torch import nn

from core.config import DatasetConfig, ModelConfig


class UNet(nn.Module):
    """Raw network F of the denoiser.

    Args:
        model: sizes; level l has `base_channels * channel_multipliers[l]` channels and a side of
            `image_size / patch_size / 2**l`.
        dataset: image shape and number of classes.
        channels_last: how feature maps lie in memory; changes the speed and roundings.
        inputs: images that the input holds, channel by channel; the output holds one.
    """

    frequencies: torch.Tensor

    def __init__(
        self,
        model: ModelConfig,
        dataset: DatasetConfig,
        channels_last: bool = False,
        inputs: int = 1,
    ) -> None:
        super().__init__()
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        base, patch = model.base_channels, model.patch_size
        side = dataset.image_size // patch
        pixels = dataset.channels * patch**2
        widths = [base * multiplier for multiplier in model.channel_multipliers]
        embedding = 4 * base
        self.num_classes = dataset.num_classes
        self.noise_embedding = nn.Sequential(
            nn.Linear(2 * base, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.label_embedding = nn.Embedding(dataset.num_classes + 1, embedding)
        self.register_buffer(
            "frequencies", torch.exp(torch.linspace(0.0, 7.0, base)) * 0.25, persistent=False
        )
        self.patch_size = patch
        self.conv_in = nn.Conv2d(inputs * pixels, base, 3, padding=1)

        def block(inputs: int, outputs: int, level: int, attends: bool = True) -> Block:
            attention = side // 2**level in model.attention_sizes
            return Block(inputs, outputs, embedding, attention and attends)

        def resample(channels: int, scale: float) -> nn.Module:
            if model.layout == "ddpm":
                return Resample(channels, scale)
            return Block(channels, channels, embedding, attention=False, scale=scale)

        channels, skips = base, [base]
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            if level:
                self.down.append(resample(channels, 0.5))
                skips.append(channels)
            for _ in range(model.blocks_per_level):
                self.down.append(block(channels, width, level))
                channels = width
                skips.append(channels)
        last = len(widths) - 1
        everywhere = model.layout == "ddpm"
        self.middle = nn.ModuleList(
            [block(channels, channels, last), block(channels, channels, last, everywhere)]
        )
        self.up = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for number in range(model.blocks_per_level + 1):
                attends = everywhere or number == model.blocks_per_level
                self.up.append(block(channels + skips.pop(), width, level, attends))
                channels = width
            if level:
                self.up.append(resample(channels, 2.0))
        self.norm_out = group_norm(channels)
        self.conv_out = zero(nn.Conv2d(channels, pixels, 3, padding=1))

    def forward(self, x: torch.Tensor, c_noise: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Maps `[B, inputs * C, H, W]`, noise condition `[B]`, labels int64 `[B]` to an image each.

        The label `num_classes` means "no label".
        """
        phase = c_noise[:, None] * self.frequencies
        emb = self.noise_embedding(torch.cat((phase.cos(), phase.sin()), dim=1))
        emb = F.silu(emb + self.label_embedding(labels))
        x = self.conv_in(F.pixel_unshuffle(x, self.patch_size))
        x = x.contiguous(memory_format=self.memory_format)  # What follows keeps the format.
        skips = [x]
        for layer in self.down:
            x = layer(x, emb)
            skips.append(x)
        for layer in self.middle:
            x = layer(x, emb)
        for layer in self.up:
            if isinstance(layer, Block) and layer.scale == 1:
                x = torch.cat((x, skips.pop()), dim=1)
            x = layer(x, emb)
        x = self.conv_out(norm_silu(self.norm_out, x))
        return F.pixel_shuffle(x, self.patch_size)


class Block(nn.Module):
    """Residual block with the embedding added between its convolutions, then attention.

    Both branches change the side by `scale`, 1 being the ordinary block.
    """

    def __init__(
        self, inputs: int, outputs: int, embedding: int, attention: bool, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.scale = scale
        self.norm_1 = group_norm(inputs)
        self.conv_1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.condition = nn.Linear(embedding, outputs)
        self.norm_2 = group_norm(outputs)
        self.conv_2 = zero(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.attention = Attention(outputs) if attention else nn.Identity()

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """`[B, inputs, H, W]` and `[B, embedding]` to `[B, outputs, scale * H, scale * W]`."""
        h = self.conv_1(rescaled(norm_silu(self.norm_1, x), self.scale))
        x = rescaled(x, self.scale)
        h = h + self.condition(emb)[:, :, None, None]
        h = self.conv_2(norm_silu(self.norm_2, h))
        return self.attention((self.skip(x) + h) * 0.5**0.5)


class Attention(nn.Module):
    """Single-head self-attention over positions (Vaswani et al. 2017)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, C, H, W]` to the same shape."""
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1).reshape(batch, 1, -1, 3, channels)
        query, key, value = qkv.unbind(3)  # With a dimension of heads: else no fused kernel.
        mixed = F.scaled_dot_product_attention(query, key, value)
        mixed = mixed.view(batch, height, width, channels).permute(0, 3, 1, 2)
        return (x + self.out(mixed)) * 0.5**0.5


class Resample(nn.Module):
    """Halves by averaging or doubles by repetition, then a convolution."""

    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """`[B, C, H, W]` to `[B, C, scale * H, scale * W]`; the embedding is not used."""
        return self.conv(rescaled(x, self.scale))


def rescaled(x: torch.Tensor, scale: float) -> torch.Tensor:
    """Halves the side by averaging, doubles it by repetition, or leaves it, for 1/2, 2 and 1."""
    if scale == 1:
        return x
    return F.avg_pool2d(x, 2) if scale < 1 else F.interpolate(x, scale_factor=2.0)


def group_norm(channels: int) -> nn.GroupNorm:
    """At most 32 groups of at least 4 channels."""
    groups = min(32, channels // 4)
    while channels % groups:
        groups -= 1
    return nn.GroupNorm(groups, channels, eps=1e-5)


def norm_silu(norm: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
    """SiLU of a norm; at once where `PerExampleGradients` or `fused_norms` let the layer do so."""
    at_once = getattr(norm, "with_silu", None)
    return F.silu(norm(x)) if at_once is None else at_once(x)


def zero(layer: nn.Conv2d) -> nn.Conv2d:
    """Starts a layer at zero, so that its branch starts as the identity."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
