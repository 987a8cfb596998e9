"""Configuration sections of the diffusion model, and the base of every section."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A frozen part of the configuration that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(Section):
    """UNet size."""

    base_channels: Annotated[int, Field(ge=4, le=1024)] = 16
    channel_multipliers: tuple[PositiveInt, ...] = (1, 2)
    blocks_per_level: PositiveInt = 1
    patch_size: PositiveInt = 1
    """Pixels of a patch of this side become channels (Hoogeboom et al. 2023): a cheaper network."""
    attention_sizes: tuple[PositiveInt, ...] = ()
    """Feature-map sides at which self-attention is applied."""
    layout: Literal["ddpm", "ncsnpp"] = "ddpm"
    """`ddpm`: convolutions change the side, attention follows every block of a chosen side.
    `ncsnpp` (Song et al. 2021; published runs): residual blocks change it, and on the way up
    attention follows the last block of a side alone."""


class DiffusionConfig(Section):
    """EDM training distribution (Karras et al. 2022, table 1)."""

    sigma_data: Positive = 0.5
    sigma_outside: Positive = 0.06
    """Least that stands for it outside of the components of central_images.kind=moments, whose
    noisy trace tells it; of images larger than central_images.image_size it knows no details."""
    p_mean: Annotated[float, Field(allow_inf_nan=False)] = -1.2
    p_std: Positive = 1.2


class SamplerConfig(Section):
    """Samplers of Karras et al. 2022 (algorithms 1 and 2)."""

    name: Literal["ddim", "heun"] = "heun"
    num_steps: Annotated[int, Field(ge=2, le=4096)] = 18
    sigma_min: Positive = 0.002
    sigma_max: Positive = 80.0
    """With central_images.kind=moments sampling starts from their noisy draws, so 1 may do."""
    rho: Positive = 7.0
    s_churn: NonNegative = 0.0
    s_min: NonNegative = 0.0
    s_max: Positive = 1e9
    s_noise: Positive = 1.0
    guidance: NonNegative = 1.0
    """Classifier-free guidance weight; 1 is none."""
    closed_form_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the images that are drawn from the moments alone, without the network, with
    central_images.kind=moments. RESULTS.md has what it gave."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the network while images are drawn; the images themselves are always float32."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(
                f"sigma_min={self.sigma_min} must be smaller than sigma_max={self.sigma_max}"
            )
        return self
