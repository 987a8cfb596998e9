"""What `privacy.scope` demands of a search, and what it decides for its trials."""

from collections.abc import Sequence
from typing import Any

from core.config import Config, load
from core.errors import ConfigError
from core.evaluation.names import LIKENESS, SUFFIXES
from core.privacy.keys import KeyedStream, MasterSecret
from core.privacy.scopes import num_trials_at

DEFAULT_NUM_TRIALS = 8
SEED = "seed"
"""Under scope `selection` each trial draws its own, so that equal settings are trials apart."""


def scope_settings(
    base: Config, objective: str, sampler: str, num_trials: int | None, final: dict[str, Any]
) -> dict[str, Any]:
    """Keys of the run that follow from the scope and the search.

    Args:
        base: the run with all that is fixed.
        objective: metric that chooses.
        num_trials: as given by the user.
        final: keys of the run on sensitive data, under scope `public`.

    Returns:
        Values by dotted key, for every trial.

    Raises:
        ConfigError: the claim of the scope would be false for this search.
    """
    privacy = base.privacy
    if objective == "dp_accuracy" and privacy.dp_accuracy_stddev is None:
        raise ConfigError(
            "objective.metric='dp_accuracy' needs its noise: set privacy.dp_accuracy_stddev, in "
            "images, such as 50"
        )
    extractor, name = base.evaluation.fid_extractor, objective.removesuffix("_cnn")
    if name in LIKENESS and objective != name + SUFFIXES[extractor]:
        raise ConfigError(
            f"objective.metric={objective!r} is not what evaluation.fid_extractor={extractor!r} "
            f"scores: choose {name + SUFFIXES[extractor]!r}, or the other extractor"
        )
    private = objective == "dp_accuracy" or base.dataset.public
    if privacy.scope in ("sweep", "selection") and not private:
        raise ConfigError(
            f"privacy.scope={privacy.scope!r} cannot choose by objective.metric={objective!r}, "
            "which is computed on real images without noise: choose dp_accuracy, or a data set "
            "with dataset.public=true"
        )
    if (privacy.scope == "public") != bool(final):
        raise ConfigError(
            "privacy.scope='public' and final belong together: final holds the keys, such as "
            "final.dataset.path, of the one run on the sensitive data"
        )
    if privacy.scope == "public":
        _check_final(base, final)
    if privacy.scope == "selection":
        if sampler != "random":
            raise ConfigError(
                f"privacy.scope='selection' is proven for settings drawn alike and independently, "
                f"not for sampler={sampler!r}, which learns from results: set sampler=random"
            )
        if num_trials is not None:
            raise ConfigError(
                f"num_trials={num_trials} is not allowed under privacy.scope='selection', as the "
                "best of a fixed number of trials is not covered: set num_trials=null; the number "
                "is drawn secretly with mean privacy.selection_mean"
            )
    if privacy.scope == "sweep":
        # Given, the shares stay; else the target is divided among the trials asked for.
        shares = privacy.num_shares if privacy.num_shares > 1 else num_trials or DEFAULT_NUM_TRIALS
        return {"privacy.num_shares": shares, "privacy.adaptive": sampler != "random"}
    return {}


def shares_central_images(config: Config) -> bool:
    """Whether trials with equal settings of the central images have them from one release.

    Not under scope `selection`, whose theorem needs trials that are independent.
    """
    return config.privacy.scope != "selection"


def check_searched(base: Config, keys: Sequence[str]) -> None:
    """Refuses to search what decides the claim, or where it is recorded.

    Raises:
        ConfigError: names the key.
    """
    never = ("runtime.", *(f"privacy.{key}" for key in ("scope", "num_", "adaptive", "selection_")))
    shared = ("privacy.", "dataset.") if base.privacy.scope != "trial" else ()
    for key in keys:
        if key.startswith(never + shared):
            raise ConfigError(
                f"search_space.{key} cannot be searched under privacy.scope="
                f"{base.privacy.scope!r}: all trials share what is claimed, its budget and its "
                "ledger, so fix it"
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
    if last.privacy.scope != "public":
        raise ConfigError(
            f"final.privacy.scope={last.privacy.scope!r}: the final run is the one that scope "
            "public is about, so leave it out"
        )


def count_trials(
    base: Config, num_trials: int | None, master: MasterSecret, release_id: str
) -> int:
    """How many trials the sweep has; under scope `selection` the secret number.

    Privacy: derived from the master secret, so that a restart continues with the same number.
    """
    privacy = base.privacy
    if privacy.scope != "selection":
        return num_trials or DEFAULT_NUM_TRIALS
    uniform = _selection_stream(master, release_id, "number of trials").uniform(0)
    return num_trials_at(uniform, privacy.selection_law, privacy.selection_mean)


def settings_entropy(base: Config, search_seed: int, master: MasterSecret, release_id: str) -> int:
    """What random settings are drawn from.

    Privacy: under scope `selection` secret, as the theorem needs draws that nobody can foresee: of
        known settings the published ones would tell which trial won, and so how many there were.
    """
    if base.privacy.scope != "selection":
        return search_seed
    bits = _selection_stream(master, release_id, "settings").bits(0, 4)
    return int.from_bytes(bits.tobytes(), "little")


def _selection_stream(master: MasterSecret, release_id: str, purpose: str) -> KeyedStream:
    return KeyedStream(
        master.derive(fingerprint="", trial=release_id, stage="selection", purpose=purpose)
    )
