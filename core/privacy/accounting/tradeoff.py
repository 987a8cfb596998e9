"""Trade-off of attacks: how many members are found at a rate of false alarms, from PLD.

Let Q be the law of all that is released with a record, and P that without it. An attacker calls a
record a member on the outcomes S, and so finds Q(S) of members and is wrong about P(S) of others.
With H(t) = sup over S of Q(S) - t P(S), Q(S) <= t P(S) + H(t) for every t >= 0, with equality at
the best t (Neyman and Pearson 1933; Dong, Roth and Su 2022, proposition 2.12).
"""

from functools import lru_cache

from core.privacy.accounting import renyi
from core.privacy.accounting.mechanism import LARGEST, Mechanism
from core.privacy.accounting.profile import Deltas, hockey_sticks, profile, profile_step

_DELTA = 1e-5
"""At which epsilon says whether PLD reaches so far."""


def members_found(mechanisms: tuple[Mechanism, ...], relation: str, false_alarms: float) -> float:
    """The largest share of members that any attack on all mechanisms together finds.

    Args:
        false_alarms: share of non-members that it is wrong about, in [0, 1].

    Returns:
        Share in [0, 1], at most about 0.1 % too large, never too small; 1 where PLD ends.
    """
    if not mechanisms:
        return false_alarms
    if any(noise_multiplier == 0 for _, noise_multiplier, _ in mechanisms):
        return 1.0
    if renyi.epsilon(mechanisms, _DELTA) > LARGEST:
        return 1.0
    ratios, sticks = _sticks(mechanisms, relation)
    return min(1.0, float((ratios * false_alarms + sticks).min()))


@lru_cache(maxsize=4)  # Megabytes each.
def _sticks(mechanisms: tuple[Mechanism, ...], relation: str) -> tuple[Deltas, Deltas]:
    """Ratios t, and H(t) at each."""
    step = profile_step(mechanisms)
    with_record, without = profile(mechanisms, relation, step)
    return hockey_sticks(with_record, without, step)
