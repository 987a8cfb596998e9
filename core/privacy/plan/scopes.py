"""Scopes: what the target epsilon covers beyond one trial, and the share of one trial.

`trial`: each trial spends the target. `public`: likewise, by the only run on the data. `sweep`: all
trials together; where they learn from results, each stays below one privacy profile, fixed
beforehand, or has a share at one order of Renyi DP, whose sum keeps the bound whatever they
release. `tune_then_train`: tuning trials and one final run, each below a privacy profile of its
own. `selection`: the best of a secret number of trials; all stay below one privacy profile.
"""

import math
from dataclasses import replace
from functools import lru_cache

from core.config import PrivacyConfig
from core.config.privacy import mechanisms_of
from core.errors import ConfigError, InfeasibleError
from core.privacy.accounting import renyi
from core.privacy.accounting.mechanism import LARGEST, Mechanism
from core.privacy.accounting.rounding import upward
from core.privacy.plan.shares import (
    ProfileShare,
    RenyiShare,
    SelectionShare,
    Share,
    SweepShare,
    TuningShare,
)

_LEAST_DELTA = 1e-9
"""Smaller ones of a trial are too close to the error of PLD's transforms."""
_LEAST_COMPOSED_DELTA = 4e-9
"""Likewise, where references are composed."""
_LARGEST_EXPONENT = 700.0
_ROUNDING = 1e-6
"""By how much another version's accountant may find another delta for a reference."""
STAYS_INSIDE = (
    "For the owner of the data alone, to stay inside: this tells of a selection's trials, whose "
    "number must be secret for its guarantee to hold."
)
"""Stands above whatever gives the number of a selection's trials away."""


def share_of(privacy: PrivacyConfig) -> Share | None:
    """The share of one trial; None where PLD composes what was fixed beforehand.

    It depends on public numbers alone, so all trials of a sweep have the same; of a selection once
    the sweep has fixed `selection_reference`.

    Raises:
        InfeasibleError: the bound itself takes the whole target, or the reference exceeds it.
    """
    if not privacy.has_shares:
        return None
    if privacy.covers.tunes_first:
        return _tuning_share(privacy)
    if privacy.covers.splits_target:
        return _sweep_share(privacy) if privacy.tuning_reference else filter_share(privacy)
    if not has_profile(privacy):
        return _selection_share(privacy)
    alike = SelectionShare(
        _within_pld(privacy), privacy.target_delta, privacy.selection_law, privacy.selection_mean
    )
    reference = mechanisms_of(privacy.selection_reference)
    return _bounded(alike, reference, "selection_reference", replace(alike, reference=reference))


def _within_pld(privacy: PrivacyConfig) -> float:
    return min(privacy.target_epsilon, LARGEST / 2)


def alike_share(privacy: PrivacyConfig) -> SweepShare | None:
    """The share of a sweep's trial if all release the same, from which a reference follows; None
    where PLD does not reach.
    """
    delta, trials = privacy.target_delta, privacy.num_shares
    if delta / trials < _LEAST_COMPOSED_DELTA:
        return None
    return SweepShare(_within_pld(privacy), delta, trials)


def _sweep_share(privacy: PrivacyConfig) -> ProfileShare:
    """The share of a trial below the one reference of a sweep; see `SweepShare`."""
    alike, reference = alike_share(privacy), mechanisms_of(privacy.tuning_reference)
    if alike is None:
        raise InfeasibleError(
            f"privacy.tuning_reference cannot bound {privacy.num_shares} trials at "
            f"privacy.target_delta={upward(privacy.target_delta, 6)}, where PLD ends: leave it out"
        )
    return _bounded(alike, reference, "tuning_reference", replace(alike, reference=reference))


def _tuning_share(privacy: PrivacyConfig) -> ProfileShare:
    """The share of a tuning trial or of the final run; see `TuningShare`."""
    delta, trials = privacy.target_delta, privacy.num_shares
    if delta / trials < _LEAST_COMPOSED_DELTA:
        raise InfeasibleError(
            f"privacy.target_delta={upward(delta, 6)} is below {_LEAST_COMPOSED_DELTA * trials:g}, "
            f"where PLD proves {trials} tuning trials and a final run: raise it, or choose "
            "another privacy.scope"
        )
    tuning, final = map(mechanisms_of, (privacy.tuning_reference, privacy.final_reference))
    if not tuning:
        raise ConfigError(
            f"privacy.scope={privacy.scope!r} needs trials before its final run: start a sweep, "
            "which solves for privacy.tuning_reference"
        )
    if not final and not privacy.is_final_run:
        raise ConfigError(
            "a tuning trial needs privacy.final_reference, which leaves it its share: start a "
            "sweep, which solves for it"
        )
    alike = TuningShare(_within_pld(privacy), delta, trials, tuning)
    last = privacy.is_final_run
    bounded = replace(alike, final=final, is_final=last, reference=final if last else tuning)
    return _bounded(alike, final, "final_reference", bounded)


def _bounded(
    alike: ProfileShare, reference: tuple[Mechanism, ...], key: str, bounded: ProfileShare
) -> ProfileShare:
    """What bounds a trial by a reference, if there is one; it must itself be within the target."""
    if not reference:
        return alike
    if (used := _used(alike, reference)) > 1 + _ROUNDING:
        raise InfeasibleError(
            f"what trials like privacy.{key} release has {used:.4g} times the delta "
            f"{upward(alike.delta, 6)} at epsilon {upward(alike.epsilon)}: leave the reference to "
            "the sweep, which solves for it"
        )
    return bounded


@lru_cache(maxsize=8)
def _used(share: ProfileShare, reference: tuple[Mechanism, ...]) -> float:
    return share.used(reference)


def members_found(privacy: PrivacyConfig, false_alarms: float) -> float:
    """Largest share of members that any attack finds on all trials that the target covers.

    Where privacy profiles bound the trials it is that of these. Under the filter's order a,
    at which the divergence is at most r, it is (exp(r) false_alarms)^(1 - 1/a) (Mironov 2017,
    proposition 10). All are at most what the target's epsilon and delta say, and where trials have
    no shares it is that.

    Args:
        false_alarms: share of non-members that it is wrong about, in [0, 1].
    """
    epsilon, delta, share = privacy.target_epsilon, privacy.target_delta, share_of(privacy)
    bounds = [1.0, math.exp(min(epsilon, _LARGEST_EXPONENT)) * false_alarms + delta]
    if isinstance(share, ProfileShare) and share.reference:
        bounds.append(share.members_found(false_alarms))
    elif share is not None and privacy.covers.splits_target:
        order = renyi.best_order(epsilon, delta)
        exponent = min(epsilon - renyi.offset(order, delta), _LARGEST_EXPONENT)
        bounds.append((math.exp(exponent) * false_alarms) ** (1 - 1 / order))
    return min(bounds)


def has_profile(privacy: PrivacyConfig) -> bool:
    """Whether a selection's bound is that of privacy profiles, as far as PLD is exact.

    Below, at deltas under 1e-9 times the mean number of trials, it is that of Renyi DP. Above
    epsilon 300 the profiles spend 300.
    """
    return (
        privacy.covers.is_secret and privacy.target_delta / privacy.selection_mean >= _LEAST_DELTA
    )


def filter_share(privacy: PrivacyConfig) -> RenyiShare:
    """One of `num_shares` parts of what a filter at the best order leaves."""
    epsilon, delta = privacy.target_epsilon, privacy.target_delta
    order = renyi.best_order(epsilon, delta)
    room = epsilon - renyi.offset(order, delta)
    if room <= 0:
        raise InfeasibleError(
            f"at delta {upward(delta, 6)} the bound on adaptively chosen trials takes all of "
            f"epsilon {upward(epsilon)}: raise privacy.target_epsilon or privacy.target_delta, "
            "or search with sampler=random or grid"
        )
    return RenyiShare(
        (order,), math.sqrt(2 * room / order / privacy.num_shares), privacy.covers.theorem
    )


def _selection_share(privacy: PrivacyConfig) -> RenyiShare:
    """The pair of orders that leaves a Gaussian mechanism the most room; see `renyi`.

    Whatever the trials release, the largest of them keeps the bound.
    """
    shape = renyi.SHAPES[privacy.selection_law]
    mean, delta = privacy.selection_mean, privacy.target_delta

    def mu_squared(first: int, second: int) -> float:
        taken = renyi.selection_epsilon(
            (0.0, 0.0), (first, second), privacy.selection_law, mean, delta
        )
        return 2 * (privacy.target_epsilon - taken) / (first + (1 + shape) * (second - 1))

    pairs = [(one, other) for one in renyi.ORDERS for other in renyi.ORDERS]
    orders = max(pairs, key=lambda pair: mu_squared(*pair))
    if mu_squared(*orders) <= 0:
        raise InfeasibleError(
            f"selecting among {mean:g} trials on average takes all of epsilon "
            f"{upward(privacy.target_epsilon)}: raise privacy.target_epsilon or lower "
            "privacy.selection_mean"
        )
    return RenyiShare(orders, math.sqrt(mu_squared(*orders)), privacy.covers.theorem)


def num_trials_at(uniform: float, law: str, mean: float) -> int:
    """The number of trials, at least 1, at a quantile of Papernot and Steinke's (2022) law.

    Args:
        uniform: quantile in (0, 1); drawn from a secret stream, it gives the secret number.
        law: `geometric` or `logarithmic`.
        mean: of the law, above 1.

    Privacy: the number must stay secret, as the guarantee rests on its being random.
    """
    gamma = renyi.halting_probability(law, mean)
    if law == "geometric":
        return 1 + math.floor(math.log1p(-uniform) / math.log1p(-gamma))
    number, weight, below = 1, (1 - gamma) / -math.log(gamma), 0.0
    while below + weight <= uniform:
        below += weight
        weight *= (1 - gamma) * number / (number + 1)
        number += 1
        if weight < 1e-18:  # Past all 53 bits of the quantile.
            break
    return number
