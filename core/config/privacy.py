"""Budget section of the configuration: the target, and what it covers."""

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from core.config.network import Positive, PositiveInt, Section
from core.config.scopes import SCOPES, Scope


class PrivacyConfig(Section):
    """The total budget, and what it covers."""

    target_epsilon: Positive = 10.0
    target_delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    neighboring_relation: Literal["zero_out", "replace_one"] = "zero_out"
    scope: Literal["trial", "sweep", "tune_then_train", "selection", "public"] = "trial"
    """What the target covers: one trial; all trials of a sweep together; cheap tuning trials and
    the final run after them; the best of a secret number of trials; or the one run on this data,
    after tuning on public data."""
    num_shares: PositiveInt = 1
    """Scope `sweep`: how many complete trials the target pays for; scope `tune_then_train`: how
    many tuning trials, beside the final run."""
    adaptive: bool = True
    """Scope `sweep`: whether the noise of a trial may depend on the results of others."""
    selection_law: Literal["geometric", "logarithmic"] = "logarithmic"
    """Scope `selection`: law of the secret number of trials (Papernot and Steinke 2022)."""
    selection_mean: Annotated[float, Field(gt=1, le=10_000)] = 16.0
    """Scope `selection`: its mean."""
    selection_reference: tuple[Positive, ...] = ()
    """Scope `selection`: sample rate, noise multiplier and count, three numbers for each, of the
    mechanisms whose privacy profile bounds that of every trial. A sweep derives them."""
    tuning_epsilon: Positive | None = 0.6
    """Scope `tune_then_train`: what a tuning trial spends."""
    tuning_noise: Positive | None = None
    """Scope `tune_then_train`: in its place the DP-SGD noise multiplier of a tuning trial."""
    tuning_steps: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Scope `tune_then_train`: share of `training.num_steps` that a tuning trial has."""
    tuning_reference: tuple[Positive, ...] = ()
    """As `selection_reference`, of the tuning trials of scope `tune_then_train`; of all trials of
    scope `sweep`, where that takes less noise than a filter of Renyi DP."""
    final_reference: tuple[Positive, ...] = ()
    """Scope `tune_then_train`: as `selection_reference`, of the final run."""
    is_final_run: bool = False
    """Scope `tune_then_train`: whether this is the run after the tuning trials. A sweep sets it."""
    dp_accuracy_stddev: Annotated[float, Field(ge=1, le=1e9)] | None = None
    """Noise, in images, on the number of private images that the downstream classifier gets
    right; its charge is part of the trial's. Null: there is no `dp_accuracy`."""
    data_set_budget: Positive | None = None
    """Epsilon that all runs ever made on this data set may spend together; null is no cap."""

    @property
    def covers(self) -> Scope:
        """The scope's entry in `SCOPES`."""
        return SCOPES[self.scope]

    @property
    def part(self) -> str:
        """What of its run a trial is, in the ledger."""
        if not self.covers.tunes_first:
            return "all"
        return "final run" if self.is_final_run else "tuning"

    @property
    def has_shares(self) -> bool:
        """Whether each trial has a bound of its own, a share; else PLD composes all."""
        covers = self.covers
        return covers.is_secret or covers.tunes_first or (covers.splits_target and self.adaptive)

    @model_validator(mode="after")
    def _proven(self) -> Self:
        if self.has_shares and self.neighboring_relation != "zero_out":
            raise ValueError(
                f"privacy.scope={self.scope!r} is proven for privacy.neighboring_relation="
                f"'zero_out' alone, not for {self.neighboring_relation!r}: choose that, or "
                "scope 'trial'"
            )
        for key in ("selection_reference", "tuning_reference", "final_reference"):
            _check_mechanisms(key, getattr(self, key))
        if (self.tuning_epsilon is None) == (self.tuning_noise is None):
            raise ValueError(
                f"privacy.tuning_epsilon={self.tuning_epsilon} and privacy.tuning_noise="
                f"{self.tuning_noise} say the same: give one of them, and null for the other"
            )
        if self.covers.is_secret and self.data_set_budget is not None:
            raise ValueError(
                f"privacy.data_set_budget cannot be combined with privacy.scope={self.scope!r}: a "
                "refused trial would change the law of their secret number; set it to null"
            )
        return self


def mechanisms_of(numbers: Sequence[float]) -> tuple[tuple[float, float, int], ...]:
    """The mechanisms of a reference, of each of which it holds three numbers."""
    return tuple(zip(numbers[::3], numbers[1::3], map(int, numbers[2::3]), strict=True))


def _check_mechanisms(key: str, numbers: Sequence[float]) -> None:
    if (
        len(numbers) % 3
        or any(rate > 1 for rate in numbers[::3])
        or any(count % 1 for count in numbers[2::3])
    ):
        raise ValueError(
            f"privacy.{key}={list(numbers)} must hold a sample rate in (0, 1], a noise "
            "multiplier and a whole count for each mechanism: leave it to the sweep"
        )


def without_promises(privacy: PrivacyConfig) -> None:
    """Refuses settings that promise what a run without privacy breaks.

    Raises:
        ValueError: names the key.
    """
    for key, allowed in (
        ("scope", "trial"),
        ("dp_accuracy_stddev", None),
        ("data_set_budget", None),
    ):
        if (value := getattr(privacy, key)) != allowed:
            raise ValueError(
                f"method='non_private' spends without bound, which privacy.{key}={value!r} "
                f"excludes: set that to {'null' if allowed is None else allowed}, or choose "
                "another method"
            )
