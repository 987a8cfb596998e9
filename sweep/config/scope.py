"""Demands of `privacy.scope` on a search, and its settings for the trials."""

from collections.abc import Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from core.config import Config, load, nested
from core.config.metrics import DISTRIBUTION_METRICS, SUFFIXES
from core.config.scopes import Scope
from core.errors import ConfigError
from core.privacy.keys import KeyedStream, MasterSecret
from core.privacy.plan.plan import (
    flat,
    reference,
    smoothness,
    sweep_reference,
    tuning_config,
    tuning_references,
)
from core.privacy.plan.scopes import STAYS_INSIDE, has_profile, num_trials_at

DEFAULT_NUM_TRIALS = 8
EARLY_AT = "early_scores.at"
NON_ADAPTIVE = ("random", "grid")
"""Samplers whose points are fixed before the first result, and stay so over restarts."""
STEPS = "training.num_steps"
SEED = "seed"
"""Under scope `selection` each trial draws its own, so that equal settings are trials apart."""


@dataclass(frozen=True)
class Search:
    """How trials are chosen.

    Attributes:
        metrics: that choose.
        rungs: shares of the steps after which the scheduler judges a trial.
        default_num_trials: the most that there can be if no number is given.
        extremes: values of each searched key, between which all others lie.
    """

    metrics: Sequence[str]
    sampler: str
    scheduler: str
    rungs: Sequence[float]
    default_num_trials: int = DEFAULT_NUM_TRIALS
    extremes: Mapping[str, Sequence[Any]] = field(default_factory=dict[str, Sequence[Any]])


def scope_settings(
    base: Config, search: Search, num_trials: int | None, final: dict[str, Any]
) -> dict[str, Any]:
    """Keys of the run that follow from the scope and the search.

    Args:
        base: the run with all that is fixed.
        num_trials: as given by the user.
        final: keys of the run on sensitive data, under scope `public`.

    Returns:
        Values by dotted key, for every trial.

    Raises:
        ConfigError: the claim of the scope would be false for this search.
    """
    privacy, sampler = base.privacy, search.sampler
    _check_scores(base, search.metrics)
    if "dp_accuracy" in search.metrics and privacy.dp_accuracy_stddev is None:
        raise ConfigError(
            "objective.metric='dp_accuracy' needs its noise: set privacy.dp_accuracy_stddev, in "
            "images, such as 50"
        )
    if privacy.covers.is_secret and len(search.metrics) > 1:
        raise ConfigError(
            "privacy.scope='selection' releases the one best trial, so it needs one score: give "
            f"one objective, not {', '.join(search.metrics)}"
        )
    exposed = [metric for metric in search.metrics if metric != "dp_accuracy"]
    if privacy.covers.covers_choice and exposed and not base.dataset.public:
        raise ConfigError(
            f"privacy.scope={privacy.scope!r} cannot choose by objective.metric={exposed[0]!r}, "
            "which is computed on real images without noise: choose dp_accuracy, or a data set "
            "with dataset.public=true"
        )
    if privacy.covers.chosen_on_public_data != bool(final):
        raise ConfigError(
            "privacy.scope='public' and final belong together: final holds the keys, such as "
            "final.dataset.path, of the one run on the sensitive data"
        )
    if final:
        _check_final(base, final)
    ways = (("scheduler", search.scheduler, "none"), ("sampler", sampler, "random"))
    for key, way, allowed in ways:
        if way != "none" and (why := privacy.covers.refusal(way)):
            raise ConfigError(
                f"privacy.scope={privacy.scope!r} is not proven for {key}={way!r}, which {why}: "
                f"set {key}={allowed}"
            )
    if privacy.covers.is_secret and num_trials is not None:
        raise ConfigError(
            f"num_trials={num_trials} is not allowed under privacy.scope='selection', as the "
            "best of a fixed number of trials is not covered: set num_trials=null; the number "
            "is drawn secretly with mean privacy.selection_mean"
        )
    settings = _early_settings(search) if search.scheduler != "none" else {}
    asked = num_trials or search.default_num_trials
    if privacy.covers.splits_target or privacy.covers.tunes_first:
        # Given, the shares stay; else the target is divided among the trials asked for.
        shares = privacy.num_shares if privacy.num_shares > 1 else asked
        settings["privacy.num_shares"] = shares
        if privacy.covers.tunes_first:
            settings["privacy.is_final_run"] = False
            if asked > shares:
                raise ConfigError(
                    f"num_trials={asked} exceeds the {shares} tuning trials that "
                    "privacy.num_shares pays for: lower it, or leave privacy.num_shares out under "
                    "another name"
                )
    if privacy.covers.splits_target:
        settings["privacy.adaptive"] = sampler not in NON_ADAPTIVE
    return settings | _references(load(nested(base), settings), search.extremes, asked)


def _references(base: Config, extremes: Mapping[str, Sequence[Any]], asked: int) -> dict[str, Any]:
    """The mechanisms whose privacy profiles bound those of the trials, where a scope needs them.

    They are those of the base run, with each searched key at the end that leaves the most DP-SGD
    steps beside the least of other releases: its privacy loss is the nearest to a normal one, and a
    bound by it costs the other points the least noise.
    """
    privacy = base.privacy
    if privacy.covers.tunes_first and not privacy.final_reference:
        best = _smoothest(base, extremes)
        return dict(tuning_references(tuning_config(best), load(nested(best), {EARLY_AT: []})))
    # More trials than shares can be paid by what a filter counts of those that were stopped.
    has_share = privacy.covers.splits_target and privacy.adaptive and asked <= privacy.num_shares
    if has_share and not privacy.tuning_reference:
        ends = (point for key in extremes for point in _ends(base, key, extremes[key]))
        return dict(sweep_reference(_smoothest(base, extremes), [base, *ends]))
    if has_profile(privacy) and not privacy.selection_reference:
        return {"privacy.selection_reference": flat(reference(_smoothest(base, extremes)))}
    return {}


def _smoothest(base: Config, extremes: Mapping[str, Sequence[Any]]) -> Config:
    best = base
    for key, values in extremes.items():
        best = max([best, *_ends(best, key, values)], key=smoothness)
    return best


def _ends(config: Config, key: str, values: Sequence[Any]) -> list[Config]:
    """The run at the ends of a searched key, without those that are valid beside others alone."""
    points: list[Config] = []
    for value in values:
        with suppress(ConfigError):
            points.append(load(nested(config), {key: value}))
    return points


def _check_scores(base: Config, metrics: Sequence[str]) -> None:
    extractor = base.evaluation.fid_extractor
    for metric in metrics:
        name = metric.removesuffix("_cnn")
        if name in DISTRIBUTION_METRICS and metric != name + SUFFIXES[extractor]:
            raise ConfigError(
                f"objective.metric={metric!r} is not what evaluation.fid_extractor={extractor!r} "
                f"scores: choose {name + SUFFIXES[extractor]!r}, or the other extractor"
            )


def _early_settings(search: Search) -> dict[str, Any]:
    """What a scheduler judges by: the objective, of a small sample, and so as private as that.

    Under scope `sweep` the objective is private or the data public, and the plan of a trial pays
    for each of its scores.
    """
    if len(search.metrics) > 1:
        raise ConfigError(
            f"scheduler={search.scheduler!r} compares trials by one score: give one objective, not "
            f"{', '.join(search.metrics)}"
        )
    metric = search.metrics[0].removesuffix("_cnn")
    return {EARLY_AT: list(search.rungs), "early_scores.metric": metric}


def shares_central_images(config: Config, replicates: int = 1) -> bool:
    """Whether trials with equal settings of the central images have them from one release.

    Not under scope `selection`, whose theorem needs trials that are independent, and not of
    replicates, as the noise that they have in common would be missing from their estimate of it.
    """
    return not config.privacy.covers.is_secret and replicates == 1


def check_searched(base: Config, keys: Sequence[str]) -> None:
    """Refuses to search what decides the claim, or where it is recorded.

    Raises:
        ConfigError: names the key.
    """
    never = (
        "runtime.",
        "early_scores.",
        "dataset.family",
        *(f"privacy.{key}" for key in ("scope", "num_", "adaptive", "selection_", "tuning_")),
        *("privacy.final_", "privacy.is_final_run"),
    )
    shared = ("privacy.", "dataset.") if not base.privacy.covers.claims_each else ()
    for key in keys:
        if key.startswith(never + shared):
            raise ConfigError(
                f"search_space.{key} cannot be searched under privacy.scope="
                f"{base.privacy.scope!r}: all trials share what is claimed, its budget and its "
                "ledger, so fix it"
            )


def check_limits(base: Config, limits: Mapping[str, float | None]) -> None:
    """Refuses to stop a selection by what it has used.

    Args:
        limits: by key; None where there is none.

    Raises:
        ConfigError: names the key.
    """
    for key, most in limits.items():
        if most is not None and base.privacy.covers.is_secret:
            raise ConfigError(
                f"{key}={most:g} is not allowed under privacy.scope='selection': whether a limit "
                "is reached depends on the secret number of trials, whose law it would change; "
                "leave it out, or lower privacy.selection_mean"
            )


def _check_final(base: Config, final: dict[str, Any]) -> None:
    if not base.dataset.public:
        raise ConfigError(
            "privacy.scope='public' searches on public data: set dataset.public=true, and the "
            "sensitive data set's keys under final"
        )
    last = load(base.model_dump(mode="json"), {"dataset.public": False, **final})
    if last.dataset.public:
        raise ConfigError("final.dataset.public=true: the final run is on the sensitive data")
    if not last.privacy.covers.chosen_on_public_data:
        raise ConfigError(
            f"final.privacy.scope={last.privacy.scope!r}: the final run is the one that scope "
            "public is about, so leave it out"
        )


def final_point(scope: Scope, point: Mapping[str, Any], final: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the final run: those of a trial of the search, and the keys of `final`."""
    sensitive = {"dataset.public": False} if scope.chosen_on_public_data else {}
    return {**point, **sensitive, EARLY_AT: [], **final}


def tuning_settings(base: Config, keys: Container[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keys of the tuning trials, and of the final run after them; empty under other scopes.

    Args:
        base: the run with all that is fixed.
        keys: that are searched.

    Raises:
        ConfigError: the number of steps is searched, and would not be that of the final run.
    """
    if not base.privacy.covers.tunes_first:
        return {}, {}
    final: dict[str, Any] = {"privacy.is_final_run": True}
    if base.privacy.tuning_steps == 1:
        return {}, final
    if STEPS in keys:
        raise ConfigError(
            f"search_space.{STEPS} is searched, but tuning trials have privacy.tuning_steps="
            f"{base.privacy.tuning_steps:g} of its steps: fix it, or set privacy.tuning_steps=1"
        )
    steps = tuning_config(base).training.num_steps
    return {STEPS: steps}, {**final, STEPS: base.training.num_steps}


def inside(sweeps: Sequence[Any]) -> str:
    """What stands above all that tells of the trials of sweeps; a line if one is a selection."""
    secret = any(sweep.run.privacy.covers.is_secret for sweep in sweeps)
    return f"{STAYS_INSIDE}\n" if secret else ""


def count_trials(
    base: Config, num_trials: int | None, master: MasterSecret, release_id: str
) -> int:
    """How many trials the sweep has; under scope `selection` the secret number.

    Privacy: derived from the master secret, so that a restart continues with the same number.
    """
    privacy = base.privacy
    if not privacy.covers.is_secret:
        return num_trials or DEFAULT_NUM_TRIALS
    uniform = _selection_stream(master, release_id, "number of trials").uniform(0)
    return num_trials_at(uniform, privacy.selection_law, privacy.selection_mean)


def settings_entropy(base: Config, search_seed: int, master: MasterSecret, release_id: str) -> int:
    """What random settings are drawn from.

    Privacy: under scope `selection` secret, as the theorem needs draws that nobody can foresee: of
        known settings the published ones would tell which trial won, and so how many there were.
    """
    if not base.privacy.covers.is_secret:
        return search_seed
    bits = _selection_stream(master, release_id, "settings").bits(0, 4)
    return int.from_bytes(bits.tobytes(), "little")


def _selection_stream(master: MasterSecret, release_id: str, purpose: str) -> KeyedStream:
    return KeyedStream(
        master.derive(fingerprint="", trial=release_id, stage="selection", purpose=purpose)
    )
