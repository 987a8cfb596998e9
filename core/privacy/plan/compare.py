"""Comparison of all scopes for one run and its search: the noise that each leaves."""

from dataclasses import dataclass
from typing import Any

from core.config import Config, load, nested
from core.config.scopes import SCOPES
from core.errors import ConfigError, InfeasibleError
from core.privacy.plan.plan import (
    estimated_composition,
    estimated_noise_multiplier,
    sweep_reference,
    tuning_config,
    tuning_references,
)

_OWN: dict[str, Any] = {
    "privacy.selection_reference": (),
    "privacy.tuning_reference": (),
    "privacy.final_reference": (),
    "privacy.is_final_run": False,
    "privacy.data_set_budget": None,
}
"""What a scope derives, or refuses; cleared before another is asked."""


@dataclass(frozen=True)
class Figures:
    """What a scope asks for and gives.

    Attributes:
        noise_multiplier: of DP-SGD in the run that is released; None: it cannot be paid.
        epsilon: end to end, of the release with all that chose it.
        trainings: how many runs of that length are trained, on average.
    """

    scope: str
    noise_multiplier: float | None
    epsilon: float
    trainings: float


def under(config: Config, scope: str, **privacy: object) -> Config:
    """The same run under another scope."""
    settings = {f"privacy.{key}": value for key, value in privacy.items()}
    return load(nested(config), {**_OWN, "privacy.scope": scope, **settings})


def final_noise(config: Config, scope: str, **privacy: object) -> float | None:
    """DP-SGD's noise multiplier of the run that is released; None where it cannot be paid."""
    try:
        asked = under(config, scope, **privacy)
        found = dict[str, tuple[float, ...]]()
        if asked.privacy.covers.tunes_first:
            found = tuning_references(tuning_config(asked), asked)
        elif asked.privacy.covers.splits_target and asked.privacy.adaptive:
            found = sweep_reference(asked, [])
        if not found:
            return estimated_noise_multiplier(asked)
    except (ConfigError, InfeasibleError):
        return None
    *_, noise_multiplier, _ = [*found.values()][-1]
    return noise_multiplier


def compare_scopes(config: Config, trials: int, adaptive: bool) -> list[Figures]:
    """Every scope of the table, for a search with so many trials before a run like `config`.

    Args:
        adaptive: whether the search learns from results.
    """
    figures: list[Figures] = []
    for name, scope in SCOPES.items():
        shares = {"num_shares": trials, "adaptive": adaptive} if scope.covers_choice else {}
        noise = final_noise(config, name, **shares)
        epsilon, trainings = config.privacy.target_epsilon, float(trials)
        if scope.claims_each and noise is not None:
            epsilon = estimated_composition(under(config, name), noise, trials)[0]
        if scope.is_secret:
            trainings = config.privacy.selection_mean
        if scope.tunes_first:
            trainings = trials * config.privacy.tuning_steps + 1
        if scope.chosen_on_public_data:
            trainings += 1
        figures.append(Figures(name, noise, epsilon, trainings))
    return figures
