"""Releases of a trial: one class for each kind, in one table that plan, ledger and card read."""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from core.config import Config
from core.errors import ConfigError
from core.privacy.accounting.mechanism import Mechanism

NO_SAMPLING = 1.0


def _reach(center: float) -> float:
    """Largest distance of a pixel in [0, 1] from the public centre."""
    return max(center, 1 - center)


class Release:
    """One kind of release.

    Attributes:
        kind: its name in the ledger.
        title: what messages call it.
        is_shared: whether several trials of a sweep may have it from one release.
    """

    kind: ClassVar[str]
    title: ClassVar[str]
    is_shared: ClassVar[bool] = False

    @property
    def mechanism(self) -> Mechanism:
        """Sample rate, noise multiplier, count: what the accountant composes."""
        raise NotImplementedError

    @classmethod
    def of(cls, config: Config) -> Self | None:
        """The plan of this release; None where the configuration asks for none."""
        raise NotImplementedError

    @staticmethod
    def remedy(config: Config) -> str:
        """How it costs less."""
        raise NotImplementedError


class Aggregate(Release):
    """A release of the easy stage: a noisy sum over images."""

    noise_multiplier: float
    sensitivity: float

    @property
    def noise_stddev(self) -> float:
        """Absolute noise standard deviation on every entry of a sum."""
        return self.noise_multiplier * self.sensitivity

    @property
    def mechanism(self) -> Mechanism:
        """As of `Release`: of all images at once, and once."""
        return NO_SAMPLING, self.noise_multiplier, 1


@dataclass(frozen=True)
class CentralPlan(Aggregate):
    """The central images.

    Attributes:
        num_releases: central images of each class, n.
        sample_rate: Poisson sample rate q of one release.
        noise_multiplier: standard deviation over sensitivity.
        sensitivity: largest L2 norm that one image adds to a sum, sqrt(h * w * channels) times
            the largest distance of a pixel from the public centre (mean) or 1 (mode); at most
            `central_images.max_norm`, to which images are then clipped.
        expected_class_count: public divisor, q * N / number of classes; never a count of data.
    """

    kind, title, is_shared = "central_images", "central images", True
    num_releases: int
    sample_rate: float
    noise_multiplier: float
    sensitivity: float
    expected_class_count: float

    @property
    def mechanism(self) -> Mechanism:
        """As of `Release`."""
        return self.sample_rate, self.noise_multiplier, self.num_releases

    @classmethod
    def of(cls, config: Config) -> Self | None:
        """The plan; None where no step trains on them: then none is made or charged."""
        if config.warm_up_steps == config.frequency_steps or config.uses_moments:
            return None
        central, dataset = config.central_images, config.dataset
        # So far a pixel in [0, 1] lies from the public centre; a histogram entry is 0 or 1.
        reach = _reach(central.pixel_center) if central.kind == "mean" else 1.0
        sensitivity = reach * math.sqrt(central.image_size**2 * dataset.channels)
        return cls(
            num_releases=central.per_class,
            sample_rate=central.expected_batch_size / dataset.num_examples,
            noise_multiplier=central.noise_multiplier,
            sensitivity=min(sensitivity, central.max_norm or math.inf),
            expected_class_count=central.expected_batch_size / dataset.num_classes,
        )

    @staticmethod
    def remedy(config: Config) -> str:
        """As of `Release`."""
        central = config.central_images
        return (
            f"lower central_images.per_class ({central.per_class}) or raise "
            f"central_images.noise_multiplier ({central.noise_multiplier:g})"
        )


@dataclass(frozen=True)
class MomentsPlan(Aggregate):
    """The moments of all images and of clusters within each class: Gaussian mechanisms in a row.

    Each sum is scaled to norm 1 and has the square root of its share of the squared privacy
    parameter mu^2 = 1 / noise_multiplier^2; as the shares add up to 1, all of them together are
    exactly one Gaussian mechanism of this noise multiplier (Dong, Roth and Su 2022, corollary 3.3),
    also where a later one depends on what an earlier one released.

    Attributes:
        noise_multiplier: of all together.
        mean_norm: largest L2 norm that one image adds to the sum of centred images.
        max_norm: C, to which the difference of an image from the mean of all is clipped; its
            products with itself, of which those off the diagonal count twice, have norm C^2.
            Differences from clusters are clipped to at most that, as what is released tells.
        num_clusters: of each class.
        num_rounds: in which their counts and means are released; 1 where a class is one cluster.
        round_share: of each of these.
        second_share: of the clusters' second moments.
        num_examples: public divisor N of what is summed over all images.
        sensitivity: of the sums, each scaled to its share, as one vector.
    """

    kind, title, is_shared = "moments", "moments", True
    noise_multiplier: float
    mean_norm: float
    max_norm: float
    num_clusters: int
    num_rounds: int
    mean_share: float
    subspace_share: float
    round_share: float
    second_share: float
    num_examples: int
    sensitivity: float = 1.0

    def stddev(self, norm: float, share: float) -> float:
        """Absolute noise standard deviation on every entry of a sum; an image adds up to `norm`."""
        return self.noise_stddev * norm / math.sqrt(share)

    @property
    def count_norm(self) -> float:
        """What an image adds to the count of its cluster, beside at most C to the sum."""
        return self.max_norm / 2

    @property
    def cluster_norm(self) -> float:
        """Of what an image adds to count and sum of its cluster, as one vector."""
        return math.hypot(self.max_norm, self.count_norm)

    @property
    def smallest_count(self) -> float:
        """Number of images below which the noise hides the mean of a cluster."""
        return max(5 * self.stddev(self.cluster_norm, self.round_share) / self.count_norm, 1.0)

    @classmethod
    def of(cls, config: Config) -> Self | None:
        """The plan; None where the configuration asks for none."""
        if not config.uses_moments:
            return None
        central, dataset = config.central_images, config.dataset
        largest = math.sqrt(central.image_size**2 * dataset.channels)
        rounds = central.num_rounds if central.num_clusters > 1 else 1
        shares = (central.mean_share, central.subspace_share, central.class_mean_share)
        return cls(
            central.noise_multiplier,
            _reach(central.pixel_center) * largest,
            min(largest, central.max_norm or math.inf),
            central.num_clusters,
            rounds,
            central.mean_share,
            central.subspace_share,
            central.class_mean_share / rounds,
            1 - sum(shares),
            dataset.num_examples,
        )

    @staticmethod
    def remedy(config: Config) -> str:
        """As of `Release`."""
        central = config.central_images
        return f"raise central_images.noise_multiplier ({central.noise_multiplier:g})"


@dataclass(frozen=True)
class FrequencyPlan(Aggregate):
    """The frequency stage's one release: a sum of random Fourier features of all images.

    Attributes:
        noise_multiplier: standard deviation over sensitivity.
        expected_class_count: public divisor, N / number of classes; never a count of data.
        sensitivity: L2 norm that one image adds, exactly 1 as the features are cosines and sines
            of the same phases.
    """

    kind, title = "frequency", "frequency features"
    noise_multiplier: float
    expected_class_count: float
    sensitivity: float = 1.0

    @classmethod
    def of(cls, config: Config) -> Self | None:
        """The plan; None where the configuration asks for none."""
        if not config.uses_frequency:
            return None
        return cls(
            noise_multiplier=config.frequency.noise_multiplier,
            expected_class_count=config.dataset.num_examples / config.dataset.num_classes,
        )

    @staticmethod
    def remedy(config: Config) -> str:
        """As of `Release`."""
        return f"raise frequency.noise_multiplier ({config.frequency.noise_multiplier:g})"


@dataclass(frozen=True)
class DpSgdPlan(Release):
    """The hard stage's releases: `num_steps` noisy sums of clipped per-example gradients.

    Attributes:
        num_steps: 0 for a method without this stage, which then releases nothing.
    """

    kind, title = "dp_sgd", "DP-SGD"
    num_steps: int
    sample_rate: float
    noise_multiplier: float
    max_grad_norm: float
    expected_batch_size: int

    @property
    def noise_stddev(self) -> float:
        """Absolute noise standard deviation on every entry of a gradient sum."""
        return self.noise_multiplier * self.max_grad_norm

    @property
    def mechanism(self) -> Mechanism:
        """As of `Release`."""
        return self.sample_rate, self.noise_multiplier, self.num_steps

    @classmethod
    def of(cls, config: Config) -> Self:
        """The plan before its noise is solved for; `method=non_private` clips nothing."""
        private = config.private_training
        return cls(
            num_steps=config.private_steps,
            sample_rate=private.expected_batch_size / config.dataset.num_examples,
            noise_multiplier=math.inf,
            max_grad_norm=math.inf if config.method == "non_private" else private.max_grad_norm,
            expected_batch_size=private.expected_batch_size,
        )

    @staticmethod
    def remedy(config: Config) -> str:
        """As of `Release`."""
        return "lower training.num_steps or private_training.expected_batch_size"


@dataclass(frozen=True)
class ScorePlan(Release):
    """The score's releases: how many private images the classifier gets right, with noise.

    One image changes the count by at most 1, so the noise multiplier is the standard deviation.

    Attributes:
        num_releases: the score at the end, those during training if they are private, too, and
            those of each classifier's epochs if they choose one.
    """

    kind, title = "dp_accuracy", "private scores"
    noise_stddev: float
    num_releases: int = 1

    @property
    def mechanism(self) -> Mechanism:
        """As of `Release`."""
        return NO_SAMPLING, self.noise_stddev, self.num_releases

    @classmethod
    def of(cls, config: Config) -> Self | None:
        """The plan of all private scores; None without any.

        Raises:
            ConfigError: there are some, but their noise is not stated.
        """
        stddev, early = config.privacy.dp_accuracy_stddev, config.early_scores
        settings = config.evaluation
        at_early = len(early.at) if early.metric == "dp_accuracy" else 0
        by_epoch = len(settings.classifiers) * settings.num_repeats * settings.classifier_epochs
        by_epoch = by_epoch if settings.epoch_chosen_on == "dp" else 0
        if stddev is None:
            if at_early or by_epoch:
                key = "early_scores.metric" if at_early else "evaluation.epoch_chosen_on"
                raise ConfigError(
                    f"{key}={'dp_accuracy' if at_early else 'dp'!r} needs its noise: set "
                    "privacy.dp_accuracy_stddev, in images, such as 50"
                )
            return None
        return cls(stddev, 1 + at_early + by_epoch)

    @staticmethod
    def remedy(config: Config) -> str:
        """As of `Release`."""
        return f"raise privacy.dp_accuracy_stddev ({config.privacy.dp_accuracy_stddev:g})"


RELEASES: dict[str, type[Release]] = {
    "central": CentralPlan,
    "moments": MomentsPlan,
    "frequency": FrequencyPlan,
    "dp_sgd": DpSgdPlan,
    "score": ScorePlan,
}
"""All kinds by their field in the privacy plan, in the order in which they run."""


def planned(config: Config, noise_multiplier: float | None = None) -> dict[str, Release | None]:
    """The plan of each kind, by its field; None for one that is not made.

    Args:
        noise_multiplier: of the release for which the budget is solved, see `solved`.
    """
    plans: dict[str, Any] = {name: kind.of(config) for name, kind in RELEASES.items()}
    if noise_multiplier is not None:
        name = solved(config)
        plans[name] = replace(plans[name], noise_multiplier=noise_multiplier)
    return plans


def solved(config: Config) -> str:
    """Field of the release that has what the others leave of the budget: mostly DP-SGD."""
    if not config.trains_nothing:
        return "dp_sgd"
    return "moments" if config.uses_moments else "frequency"
