"""What each stage of a trial releases: the parts of its privacy plan, made by `plan` alone."""

from dataclasses import dataclass

from core.privacy.mechanisms import Mechanism

NO_SAMPLING = 1.0


@dataclass(frozen=True)
class CentralPlan:
    """The easy stage's releases.

    Attributes:
        num_releases: central images of each class, n.
        sample_rate: Poisson sample rate q of one release.
        noise_multiplier: standard deviation over sensitivity.
        sensitivity: largest L2 norm that one image adds to a sum, sqrt(h * w * channels) times
            the largest distance of a pixel from the public centre (mean) or 1 (mode); at most
            `central_images.max_norm`, to which images are then clipped.
        expected_class_count: public divisor, q * N / number of classes; never a count of data.
    """

    num_releases: int
    sample_rate: float
    noise_multiplier: float
    sensitivity: float
    expected_class_count: float

    @property
    def noise_stddev(self) -> float:
        """Absolute noise standard deviation on every entry of a sum."""
        return self.noise_multiplier * self.sensitivity

    @property
    def mechanism(self) -> Mechanism:
        """Sample rate, noise multiplier, count: what the accountant composes."""
        return self.sample_rate, self.noise_multiplier, self.num_releases


@dataclass(frozen=True)
class FrequencyPlan:
    """The frequency stage's one release: a sum of random Fourier features of all images.

    Attributes:
        noise_multiplier: standard deviation over sensitivity.
        expected_class_count: public divisor, N / number of classes; never a count of data.
        sensitivity: L2 norm that one image adds, exactly 1 as the features are cosines and sines
            of the same phases.
    """

    noise_multiplier: float
    expected_class_count: float
    sensitivity: float = 1.0

    @property
    def noise_stddev(self) -> float:
        """Absolute noise standard deviation on every entry of the sum."""
        return self.noise_multiplier * self.sensitivity

    @property
    def mechanism(self) -> Mechanism:
        """Sample rate, noise multiplier, count: what the accountant composes."""
        return NO_SAMPLING, self.noise_multiplier, 1


@dataclass(frozen=True)
class DpSgdPlan:
    """The hard stage's releases: `num_steps` noisy sums of clipped per-example gradients."""

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
        """Sample rate, noise multiplier, count: what the accountant composes."""
        return self.sample_rate, self.noise_multiplier, self.num_steps


@dataclass(frozen=True)
class ScorePlan:
    """The score's releases: how many private images the classifier gets right, with noise.

    One image changes the count by at most 1, so the noise multiplier is the standard deviation.

    Attributes:
        num_releases: the score at the end, those during training if they are private, too, and
            those of each classifier's epochs if they choose one.
    """

    noise_stddev: float
    num_releases: int = 1

    @property
    def mechanism(self) -> Mechanism:
        """Sample rate, noise multiplier, count."""
        return NO_SAMPLING, self.noise_stddev, self.num_releases
