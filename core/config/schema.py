"""Configuration of one run: frozen, validated, the same dotted keys everywhere.

`load(path_or_dict, overrides)` is the only way in. `flatten(config)` gives the dotted keys that
YAML, the command line, the search space and MLflow params share: `load(base, flatten(c)) == c`.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    ValidationError,
    model_validator,
)

from core.config.files import load_yaml, merge
from core.config.keys import explain
from core.config.metrics import DISTRIBUTION_METRICS, SUFFIXES
from core.config.network import (
    DiffusionConfig,
    ModelConfig,
    Positive,
    PositiveInt,
    SamplerConfig,
    Section,
)
from core.config.privacy import PrivacyConfig, without_promises
from core.config.stages import (
    CentralImagesConfig,
    FrequencyConfig,
    PrivateTrainingConfig,
    TrainingConfig,
    WarmUpConfig,
)
from core.errors import ConfigError
from core.io.files import local_folder

Model = TypeVar("Model", bound=BaseModel)
MOST_CLASSES = 1000
MOST_PIXELS = 4096
"""Values of an image of which second moments are taken: in about 0.6 GiB of memory."""


class DatasetConfig(Section):
    """The data set and every public fact about it; none of these is computed from the data."""

    name: Literal[
        "digits",
        "idx",
        "image_folder",
        "cifar10",
        "cifar100",
        "eurosat",
        "celeba",
        "camelyon17",
        "parquet",
    ] = "digits"
    """How it is stored; `idx` are MNIST and its kin."""
    path: str | None = None
    """Folder; `python -m core prepare` says what it must hold."""
    image_column: str = "image"
    """Column of `parquet` files with the encoded images."""
    label_column: str = "label"
    """Column of `parquet` files with the class numbers."""
    image_size: Annotated[int, Field(ge=4, le=512)] = 8
    channels: Literal[1, 3] = 1
    num_classes: Annotated[int, Field(ge=1, le=MOST_CLASSES)] = 10
    num_examples: Annotated[int, Field(ge=4)] = 1437
    """Public number N of private training images; refused when the data disagrees."""
    public: bool = False
    """Whether the images are public, so that scores on them are: a stand-in to tune on."""
    family: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}$")] | None = None
    """Public name that data sets with records in common share: all charge one ledger and budget.
    Null: a data set of this very content, order, format and numbering of classes has its own."""


class EvaluationConfig(Section):
    """How many images are drawn and how they are scored."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Public seed of the classifier and the extractor; scores compare under one seed alone."""
    num_images: Annotated[int, Field(ge=4)] = 1000
    batch_size: PositiveInt = 500
    fid_extractor: Literal["inception", "cnn"] = "inception"
    """`inception` scores as `fid`; `cnn` trains a small network on real data: `fid_cnn`. So do
    `kid`, `precision` and `recall`."""
    inception_weights: str | None = None
    """A copy of the published weights; null takes torch hub's cache, or downloads them there."""
    num_features: Annotated[int, Field(ge=4)] = 10_000
    """Most features of either side that `kid`, `precision` and `recall` use; bounds the memory."""
    extractor_epochs: PositiveInt = 8
    """Passes of the `cnn` extractor over the real training images."""
    classifiers: Annotated[
        tuple[Literal["cnn", "resnet", "wrn", "resnext", "mlp", "logistic"], ...],
        Field(min_length=1),
    ] = ("cnn",)
    """Trained on synthetic images and tested on real ones; `accuracy` is the mean over all."""
    classifier_epochs: PositiveInt = 10
    classifier_batch_size: PositiveInt = 128
    num_repeats: PositiveInt = 1
    """Trainings of each classifier, with seeds of their own."""
    epoch_chosen_on: Literal["synthetic", "dp"] = "synthetic"
    """What chooses the epoch of a classifier: synthetic images held out from its training, or the
    private ones, with the noise of privacy.dp_accuracy_stddev, charged for every epoch."""

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if len(set(self.classifiers)) < len(self.classifiers):
            raise ValueError(
                f"evaluation.classifiers={list(self.classifiers)} names one twice: name each once "
                "and raise evaluation.num_repeats to train it again"
            )
        return self


class EarlyScoresConfig(Section):
    """Scores of small samples during training: what a sweep's scheduler stops poor trials by."""

    at: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    """Shares of training.num_steps, ascending; none: only the end is scored."""
    metric: Literal["accuracy", "dp_accuracy", "fid", "kid", "precision", "recall"] = "accuracy"
    num_images: Annotated[int, Field(ge=2)] = 500


def default_ledger() -> str:
    """`feta-sweep/ledger` in the user's data folder: the same wherever a command is typed."""
    home = os.environ.get("XDG_DATA_HOME", "")
    home = home if os.path.isabs(home) else os.path.expanduser("~/.local/share")
    return os.path.join(home, "feta-sweep", "ledger")


Folder = Annotated[
    str, AfterValidator(lambda text, info: local_folder(f"runtime.{info.field_name}", text))
]


def _in_s3(address: str) -> str:
    """Refuses what is no place in S3, or in a store that speaks its protocol."""
    if not re.fullmatch(r"s3://[a-z0-9][a-z0-9.\-]+(/[^/\s]+)*/?", address):
        raise ValueError(
            f"runtime.ledger_copy={address!r} is refused: it must be s3://BUCKET/FOLDER, as no "
            "other kind of store, such as gs:// or abfs://, is supported"
        )
    return address.rstrip("/")


class RuntimeConfig(Section):
    """Where and how verbosely; what changes the result by more than rounding says so."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Decides the draws of diffusion noise as well."""
    channels_last: bool = False
    """Feature maps in memory position by position: faster for large ones, slower for 8x8."""
    fused_kernels: bool = True
    """Kernels of this project on GPUs, for gradients of convolutions, for norms in DP-SGD and in
    sampling and, by numbers of their own, for draws of diffusion noise. They are checked first;
    false takes torch's alone."""
    log_every: PositiveInt = 25
    checkpoint_every: PositiveInt = 200
    keep_checkpoints: bool = False
    """Also once the run has ended, when nothing needs them."""
    num_pictures: Annotated[int, Field(ge=0, le=100)] = 4
    """Grids of samples that are drawn while training, evenly over its steps, to watch it."""
    max_seconds: Positive | None = None
    """After so long a run leaves a checkpoint and stops; the same command goes on from it. A step,
    the frequency stage's generator, a chunk of images and the scoring are never cut."""
    cache: Folder = "runs/cache"
    """Folder of what depends on real images alone, such as FID's real side; not to be released."""
    ledger: Folder = Field(default_factory=default_ledger)
    """Folder of the privacy ledgers; one for all runs on the same data. If it is not given,
    `feta-sweep/ledger` in the user's data folder, ~/.local/share or $XDG_DATA_HOME."""
    ledger_copy: Annotated[str, AfterValidator(_in_s3)] | None = None
    """`s3://BUCKET/FOLDER`, where every line of the ledgers is copied before it counts."""


class Config(Section):
    """One run, complete: both stages, evaluation and budget."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Public seed of weights, diffusion noise and sampling; never of privacy noise or masks."""
    method: Literal["dp_feta", "feta_pro", "dpdm", "moments", "dp_merf", "non_private"] = "dp_feta"
    """`dp_feta`: both stages (Li et al. 2024; `central_images.kind` mean or mode). `feta_pro`: the
    easy stage goes on with images fitted to noisy frequency features (Gong et al. 2025). `dpdm`:
    DP-SGD alone, whatever `stage_split` (Dockhorn et al. 2023). Without any DP-SGD, for the whole
    budget: `moments`, mixtures of Gaussians, and `dp_merf`, the generator of the frequency
    stage alone (Harder et al. 2021). `non_private`: no noise, no clipping, no epsilon; a ceiling to
    compare with that must never leave."""
    stage_split: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of the optimisation steps given to the easy stage; 0 is plain DP-SGD diffusion."""
    dataset: DatasetConfig = DatasetConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    central_images: CentralImagesConfig = CentralImagesConfig()
    frequency: FrequencyConfig = FrequencyConfig()
    training: TrainingConfig = TrainingConfig()
    warm_up: WarmUpConfig = WarmUpConfig()
    private_training: PrivateTrainingConfig = PrivateTrainingConfig()
    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    sampler: SamplerConfig = SamplerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    early_scores: EarlyScoresConfig = EarlyScoresConfig()
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig)

    @property
    def _has_both_stages(self) -> bool:
        return self.method in ("dp_feta", "feta_pro")

    @property
    def warm_up_steps(self) -> int:
        """Optimisation steps of the easy stage, in [0, training.num_steps)."""
        if not self._has_both_stages:
            return 0
        return min(round(self.stage_split * self.training.num_steps), self.training.num_steps - 1)

    @property
    def frequency_steps(self) -> int:
        """The last steps of the easy stage, on images of the frequency stage; 0 without it."""
        return round(self.frequency.share * self.warm_up_steps) if self.method == "feta_pro" else 0

    @property
    def private_steps(self) -> int:
        """Optimisation steps of the hard stage; 0 for a method without it."""
        return 0 if self.trains_nothing else self.training.num_steps - self.warm_up_steps

    @property
    def trains_nothing(self) -> bool:
        """Whether the method is a release of the easy stage alone, for the whole budget."""
        return self.method in ("moments", "dp_merf")

    @property
    def uses_moments(self) -> bool:
        """Whether class moments are released."""
        staged = self._has_both_stages and self.central_images.kind == "moments"
        return staged or self.method == "moments"

    @property
    def is_final(self) -> bool:
        """Whether this is the one run for which a search was made before."""
        on_public_data = self.privacy.covers.chosen_on_public_data
        return self.privacy.is_final_run or (on_public_data and not self.dataset.public)

    @property
    def is_plain(self) -> bool:
        """Whether DP-SGD is all, without any easy stage."""
        return not (self.warm_up_steps or self.uses_moments or self.uses_frequency)

    @property
    def uses_frequency(self) -> bool:
        """Whether frequency features are released."""
        return self.frequency_steps > 0 or self.method == "dp_merf"

    @property
    def early_metric(self) -> str:
        """Name of the scores during training; of a small sample, so no `accuracy`; empty: none."""
        name = self.early_scores.metric
        name += SUFFIXES[self.evaluation.fid_extractor] if name in DISTRIBUTION_METRICS else ""
        return f"early_{name}" if self.early_scores.at else ""

    @property
    def early_steps(self) -> dict[int, float]:
        """The shares of `early_scores.at` by the number of steps that are then done."""
        steps = self.training.num_steps
        return {min(max(1, round(f * steps)), steps - 1): f for f in self.early_scores.at}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        dataset, count = self.dataset, self.dataset.num_examples
        for key, size in (
            ("private_training.expected_batch_size", self.private_training.expected_batch_size),
            ("central_images.expected_batch_size", self.central_images.expected_batch_size),
        ):
            if size > count:
                raise ValueError(
                    f"{key}={size} must lie in [1, dataset.num_examples={count}]: "
                    "the sample rate may not exceed 1"
                )
        if self.privacy.target_delta >= 1 / count:
            raise ValueError(
                f"privacy.target_delta={self.privacy.target_delta:g} must lie in (0, "
                f"1/dataset.num_examples={1 / count:.3g}): a larger delta allows publishing records"
            )
        if self.method == "non_private":
            without_promises(self.privacy)
        self._check_easy_stage()
        self._check_images()
        factor = self.model.patch_size * 2 ** (len(self.model.channel_multipliers) - 1)
        if dataset.image_size % factor:
            raise ValueError(
                f"dataset.image_size={dataset.image_size} must be a multiple of {factor}: "
                f"model.patch_size={self.model.patch_size} times a halving for each level of "
                "model.channel_multipliers but the first"
            )
        return self

    def _check_easy_stage(self) -> None:
        """Whether what it releases fits the images and their classes."""
        if self.central_images.image_size > self.dataset.image_size:
            raise ValueError(
                f"central_images.image_size={self.central_images.image_size} must lie in "
                f"[2, dataset.image_size={self.dataset.image_size}]"
            )
        if self.uses_moments:
            _few_enough_moments(self.central_images, self.dataset)
        if self.sampler.closed_form_share > 0 and self.central_images.kind != "moments":
            raise ValueError(
                f"sampler.closed_form_share={self.sampler.closed_form_share:g} needs moments to "
                "draw from: set it to 0, or choose central_images.kind=moments"
            )
        if self.method in ("feta_pro", "dp_merf"):
            _enough_for_each_class(self.frequency, self.dataset.num_classes)

    def _check_images(self) -> None:
        """Whether there are enough synthetic images to be scored, early ones in their order."""
        classes, early = self.dataset.num_classes, self.early_scores
        sizes = {"evaluation.num_images": self.evaluation.num_images}
        sizes |= {"early_scores.num_images": early.num_images} if early.at else {}
        for key, count in sizes.items():
            if count < 2 * classes:
                raise ValueError(
                    f"{key}={count} must be at least {2 * classes}, two for each of "
                    f"dataset.num_classes={classes}: one to train the classifier, one to choose "
                    "its epoch"
                )
        if early.at and self.trains_nothing:
            raise ValueError(
                f"early_scores.at={list(early.at)} needs training steps, of which method="
                f"{self.method!r} has none: set it to [], or choose another method"
            )
        points = list(self.early_steps)
        if points != sorted(points) or not len(early.at) == len(points) < self.training.num_steps:
            raise ValueError(
                f"early_scores.at={list(early.at)} must ascend and name different steps before the "
                f"last of training.num_steps={self.training.num_steps}: these are {points}"
            )


def _few_enough_moments(central: CentralImagesConfig, dataset: DatasetConfig) -> None:
    pixels = central.image_size**2 * dataset.channels
    if pixels > MOST_PIXELS:
        side = math.isqrt(MOST_PIXELS // dataset.channels)
        raise ValueError(
            f"central_images.image_size={central.image_size} gives images of {pixels} values, "
            f"whose second moment takes {40 * pixels**2 / 2**30:.1f} GiB: choose at most {side}, "
            f"of {MOST_PIXELS} values"
        )
    if central.num_components > pixels:
        raise ValueError(
            f"central_images.num_components={central.num_components} must lie in [1, {pixels}], "
            "the values of an image at central_images.image_size"
        )


def _enough_for_each_class(frequency: FrequencyConfig, num_classes: int) -> None:
    for key, each in (("num_images", 1), ("batch_size", 2)):
        if (value := getattr(frequency, key)) < each * num_classes:
            raise ValueError(
                f"frequency.{key}={value} must be at least {each * num_classes}, {each} for "
                f"each of dataset.num_classes={num_classes}"
            )


def load(
    base: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None
) -> Config:
    """Builds the configuration from a YAML file or mapping and dotted overrides.

    Args:
        base: path of a YAML file, or a nested mapping.
        overrides: flat mapping from dotted key to value; wins over `base`.

    Raises:
        ConfigError: names the key, its allowed range and the nearest valid name.
    """
    content = load_yaml(base) if isinstance(base, (str, Path)) else base
    return validate(Config, merge(content, overrides or {}))


def flatten(section: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Returns every leaf of the configuration under its dotted key, tuples as lists."""
    flat: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def short_digest(config: "Config") -> str:
    """Names a configuration by all that decides its result; 8 hexadecimal digits."""
    settings = {k: v for k, v in flatten(config).items() if not k.startswith("runtime.")}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def nested(section: BaseModel) -> dict[str, Any]:
    """Returns the configuration as plain nested data, ready for YAML."""
    return section.model_dump(mode="json")


def validate(model: type[Model], content: Mapping[str, Any]) -> Model:
    """Validates `content`; the first problem becomes one sentence."""
    try:
        return model.model_validate(content)
    except ValidationError as failure:
        raise ConfigError(explain(model, failure)) from None
