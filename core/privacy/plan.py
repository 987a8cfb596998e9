"""The privacy plan: the only source of numbers that enter a sampler, a clip, a noise or a report.

`make_plan(config)` solves the DP-SGD noise multiplier that is left after the central images, so
that both stages together spend the target epsilon. It touches no data.
"""
# pyright: reportMissingTypeStubs=false

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import metadata
from typing import Any

from dp_accounting import dp_event

from core.config import Config
from core.errors import InfeasibleError
from core.privacy import accounting


@dataclass(frozen=True)
class CentralPlan:
    """The easy stage's releases.

    Attributes:
        num_releases: central images of each class, n.
        sample_rate: Poisson sample rate q of one release.
        noise_multiplier: standard deviation over sensitivity.
        sensitivity: largest L2 norm that one image adds to a sum, sqrt(h * w * channels) times
            the largest distance of a pixel from the public centre (mean) or 1 (mode).
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
    def event(self) -> dp_event.DpEvent:
        """What the accountant composes."""
        return accounting.subsampled_gaussian(*self.mechanism)

    @property
    def mechanism(self) -> accounting.Mechanism:
        """The same as plain numbers."""
        return self.sample_rate, self.noise_multiplier, self.num_releases


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
    def event(self) -> dp_event.DpEvent:
        """What the accountant composes."""
        return accounting.subsampled_gaussian(*self.mechanism)

    @property
    def mechanism(self) -> accounting.Mechanism:
        """The same as plain numbers."""
        return self.sample_rate, self.noise_multiplier, self.num_steps


@dataclass(frozen=True)
class PrivacyPlan:
    """Everything one trial releases, and what it costs by PLD."""

    num_examples: int
    target_epsilon: float
    delta: float
    neighboring_relation: str
    central: CentralPlan | None
    dp_sgd: DpSgdPlan
    epsilon: float
    epsilon_central: float

    @property
    def noise_multiplier(self) -> float:
        """DP-SGD's noise multiplier."""
        return self.dp_sgd.noise_multiplier

    @property
    def epsilon_dp_sgd(self) -> float:
        """Epsilon of DP-SGD alone; with that of the central images it adds up to more than all."""
        return accounting.epsilon_of([self.dp_sgd.event], self.delta, self.neighboring_relation)

    @property
    def events(self) -> list[dp_event.DpEvent]:
        """Both stages, in the order in which they run."""
        return [self.central.event, self.dp_sgd.event] if self.central else [self.dp_sgd.event]

    @property
    def statement(self) -> str:
        """The guarantee of this trial alone, in words."""
        unit = {
            "zero_out": "replacing one image and its label by an empty record",
            "replace_one": "replacing one image and its label by any other",
        }[self.neighboring_relation]
        return (
            f"This trial alone is ({self.epsilon:.4g}, {self.delta:g})-differentially private "
            f"for {unit}; the public facts are the configuration, with N={self.num_examples}."
        )

    @property
    def mechanisms(self) -> list[accounting.Mechanism]:
        """The same as plain numbers."""
        stages = [self.central, self.dp_sgd] if self.central else [self.dp_sgd]
        return [stage.mechanism for stage in stages]

    @classmethod
    def restored(cls, summary: Mapping[str, Any]) -> "PrivacyPlan":
        """The plan whose `summary` was kept; nothing is solved again."""
        central = CentralPlan(**summary["central"]) if summary["central"] else None
        dp_sgd = DpSgdPlan(**summary["dp_sgd"])
        names = ("num_examples", "target_epsilon", "delta", "neighboring_relation", "epsilon")
        numbers = {name: summary[name] for name in (*names, "epsilon_central")}
        return cls(central=central, dp_sgd=dp_sgd, **numbers)

    def summary(self) -> dict[str, Any]:
        """Plain data for privacy.json."""
        return {
            **asdict(self),
            "accountant": f"PLD, dp-accounting {metadata.version('dp-accounting')}",
            "statement": self.statement,
        }


def check_central(config: Config) -> float:
    """Epsilon that the easy stage alone spends; quick, as DP-SGD is not solved.

    Raises:
        InfeasibleError: it exceeds the target, or leaves nothing for DP-SGD.
    """
    central = _central_plan(config)
    if central is None:
        return 0.0
    privacy = config.privacy
    epsilon = accounting.epsilon_of(
        [central.event], privacy.target_delta, privacy.neighboring_relation
    )
    if epsilon >= privacy.target_epsilon:
        raise InfeasibleError(
            f"the central images alone spend epsilon {epsilon:.4g} of "
            f"{privacy.target_epsilon:g}: lower central_images.per_class "
            f"({config.central_images.per_class}) or raise central_images.noise_multiplier "
            f"({config.central_images.noise_multiplier:g})"
        )
    return epsilon


def check_feasible(config: Config) -> None:
    """Whether some DP-SGD noise keeps the total within the target, without solving for it.

    Raises:
        InfeasibleError: the budget cannot pay; the reason is that of `make_plan`.
    """
    check_central(config)
    accounting.check_room(*_question(config))


def make_plan(config: Config) -> PrivacyPlan:
    """Solves the DP-SGD noise multiplier under the total budget, in seconds.

    Raises:
        InfeasibleError: the budget cannot pay; says which stage is too dear and the remedy.
    """
    epsilon_central = check_central(config)
    central, private, privacy = _central_plan(config), config.private_training, config.privacy
    noise_multiplier, epsilon = _solve(*_question(config))
    return PrivacyPlan(
        num_examples=config.dataset.num_examples,
        target_epsilon=privacy.target_epsilon,
        delta=privacy.target_delta,
        neighboring_relation=privacy.neighboring_relation,
        central=central,
        dp_sgd=DpSgdPlan(
            num_steps=config.private_steps,
            sample_rate=_dp_sgd_sample_rate(config),
            noise_multiplier=noise_multiplier,
            max_grad_norm=private.max_grad_norm,
            expected_batch_size=private.expected_batch_size,
        ),
        epsilon=epsilon,
        epsilon_central=epsilon_central,
    )


def composed_epsilon(plans: Sequence[PrivacyPlan]) -> float:
    """Epsilon of publishing everything that several trials on the same data computed.

    Raises:
        ValueError: the plans differ in delta or neighbouring relation.
    """
    if len({(plan.delta, plan.neighboring_relation) for plan in plans}) > 1:
        raise ValueError("plans of one sweep must share delta and neighbouring relation")
    if not plans:
        return 0.0
    first = plans[0]
    mechanisms = accounting.grouped(each for plan in plans for each in plan.mechanisms)
    grid = accounting.discretization_for(mechanisms, sum(plan.epsilon for plan in plans))
    return accounting.epsilon_of_mechanisms(
        mechanisms, first.delta, first.neighboring_relation, grid
    )


def _dp_sgd_sample_rate(config: Config) -> float:
    return config.private_training.expected_batch_size / config.dataset.num_examples


def _question(
    config: Config,
) -> tuple[tuple[dp_event.DpEvent, ...], float, int, float, float, str]:
    """What is spent before DP-SGD, its sample rate and steps, target, delta, relation."""
    central, privacy = _central_plan(config), config.privacy
    return (
        (central.event,) if central else (),
        _dp_sgd_sample_rate(config),
        config.private_steps,
        privacy.target_epsilon,
        privacy.target_delta,
        privacy.neighboring_relation,
    )


def _central_plan(config: Config) -> CentralPlan | None:
    """None without an easy stage: images that nothing uses are neither made nor charged."""
    if config.warm_up_steps == 0:
        return None
    central, dataset = config.central_images, config.dataset
    # A pixel in [0, 1] lies at most this far from the public centre; a histogram entry is 0 or 1.
    reach = max(central.pixel_center, 1 - central.pixel_center) if central.kind == "mean" else 1.0
    return CentralPlan(
        num_releases=central.per_class,
        sample_rate=central.expected_batch_size / dataset.num_examples,
        noise_multiplier=central.noise_multiplier,
        sensitivity=reach * math.sqrt(central.image_size**2 * dataset.channels),
        expected_class_count=central.expected_batch_size / dataset.num_classes,
    )


_solve = lru_cache(maxsize=1024)(accounting.solve_noise_multiplier)
