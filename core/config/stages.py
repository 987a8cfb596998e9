"""Configuration sections of the two stages: what each releases, and how it trains."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from core.config.network import Positive, PositiveInt, Section

Share = Annotated[float, Field(gt=0, lt=1)]


class CentralImagesConfig(Section):
    """The easy stage's release: noisy aggregates of private images."""

    kind: Literal["mean", "mode", "moments"] = "mean"
    """Means or per-pixel modes of random samples; or, of all images, means and covariances of
    clusters within each class, from which the denoiser starts in closed form."""
    per_class: Annotated[int, Field(ge=1, le=100_000)] = 5
    """Images of each class; of kind moments those drawn from its Gaussians, which cost nothing."""
    noise_multiplier: Annotated[float, Field(ge=0.3, le=1e9)] = 5.0
    """Noise standard deviation over sensitivity, of the moments all together; below 0.3 a single
    release is hardly private."""
    expected_batch_size: PositiveInt = 144
    """Expected number of images in the Poisson sample of one release, over all classes; moments
    are of all images."""
    image_size: Annotated[int, Field(ge=2, le=512)] = 8
    """Side to which private images are down-scaled before they are summed."""
    pixel_center: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Public value subtracted from pixels in [0, 1] before the sum; 0.5 halves the sensitivity."""
    max_norm: Positive | None = None
    """Public bound to which each centred image's L2 norm is clipped, but for mode images; lowers
    sensitivity and noise, and draws images of larger norm towards the centre. Null: no clipping."""
    num_bins: Annotated[int, Field(ge=2, le=256)] = 8
    """Bins of the per-pixel histogram; used by mode images alone."""
    median_filter: bool = False
    """3x3 median over the released images; post-processing, hence free."""
    sharpen: bool = False
    """Sharpened afterwards, as the paper does with grey images; free like all that follows."""
    num_components: PositiveInt = 25
    """Of kind moments, like all that follows: leading principal components of all images, in
    which the moments of the clusters are taken."""
    num_clusters: Annotated[int, Field(ge=1, le=1_000)] = 1
    """Of each class, each with a mean and a covariance of its own."""
    num_rounds: Annotated[int, Field(ge=2, le=100)] = 4
    """Of Lloyd's algorithm, each of which releases counts and means of clusters; several clusters
    alone need more than one."""
    mean_share: Share = 0.02
    """Part of the squared privacy parameter, 1 / noise_multiplier^2, for the mean of all images."""
    subspace_share: Share = 0.18
    """Part for their second moment, which gives the principal components."""
    class_mean_share: Share = 0.1
    """Part for counts and means of clusters, all rounds together; the rest is for their second
    moments."""
    eigenvalue_floor: Annotated[float, Field(ge=0, le=10)] = 0.5
    """Variances below this part of the largest that the noise alone makes count as zero."""

    @model_validator(mode="after")
    def _clips_no_modes(self) -> Self:
        if self.max_norm is not None and self.kind == "mode":
            raise ValueError(
                f"central_images.max_norm={self.max_norm:g} applies to central_images.kind='mean' "
                "and 'moments', not to 'mode': set max_norm to null, or choose another kind"
            )
        return self

    @model_validator(mode="after")
    def _leaves_a_share(self) -> Self:
        if (total := self.mean_share + self.subspace_share + self.class_mean_share) >= 1:
            raise ValueError(
                f"central_images.mean_share, subspace_share and class_mean_share add up to "
                f"{total:g}, which must be below 1: the clusters' second moments have the rest"
            )
        return self


class FrequencyConfig(Section):
    """The easy stage's second release, of method `feta_pro`, and the generator fitted to it."""

    noise_multiplier: Annotated[float, Field(ge=0.3, le=1e9)] = 26.0
    """Noise standard deviation over sensitivity of the one release, which covers all images."""
    num_features: Annotated[int, Field(ge=2, le=1_000_000)] = 4000
    """Random Fourier features of an image: cosine and sine of half as many frequencies."""
    length_scale: Positive = 0.4
    """Public width of the kernel: the root-mean-square distance of two images' pixels, in [0, 1],
    at which their similarity is exp(-1/2). Never a median of distances in private data."""
    share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the warm-up's steps on the generator's images, after those on central images."""
    num_images: PositiveInt = 10_000
    """Images that the generator draws for the warm-up."""
    num_steps: PositiveInt = 1000
    """Optimisation steps of the generator."""
    batch_size: PositiveInt = 200
    """Images of one such step, divided evenly among the classes."""
    learning_rate: Positive = 1e-2

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        if self.num_features % 2:
            raise ValueError(
                f"frequency.num_features={self.num_features} must be even: a cosine and a sine of "
                "each frequency"
            )
        return self


class WarmUpConfig(Section):
    """Training on the central images; post-processing, hence free of charge."""

    batch_size: PositiveInt = 64
    learning_rate: Positive = 3e-4
    augmentation: Literal["none", "shift", "affine", "rand_augment"] = "affine"


class PrivateTrainingConfig(Section):
    """DP-SGD on the private images."""

    expected_batch_size: PositiveInt = 128
    max_grad_norm: Positive = 1.0
    noise_multiplicity: Annotated[int, Field(ge=1, le=256)] = 4
    learning_rate: Positive = 3e-4
    optimizer: Literal["adam", "adam_bc"] = "adam"
    """`adam_bc` (Tang et al. 2024) takes the noise's known variance off the second moment."""
    adam_bc_floor: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Smallest second moment of `adam_bc`, as a share of the noise's variance."""
    max_physical_batch_size: PositiveInt | Literal["auto"] = 64
    """Most images (each with K noise draws) in memory at once; does not change the result. `auto`
    halves it whenever memory runs out, and remembers."""


class TrainingConfig(Section):
    """Length of the two stages together."""

    num_steps: PositiveInt = 400
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    posthoc_ema: bool = False
    """Keeps 24 copies of the weights, of which `--ema-length` makes the average of any length."""
    label_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the network while it is trained; weights are float32, norms, sums and noise float64."""
