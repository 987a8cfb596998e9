"""Epsilons and deltas as text: rounded up, so that no text claims more than what holds."""

import math
from collections.abc import Callable
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal

FALSE_ALARMS = (0.01, 0.001)
"""Shares of non-members that an attacker may be wrong about, in what is said of attacks."""


def upward(bound: float, digits: int = 4) -> str:
    """An epsilon or delta, rounded up to `digits` significant digits.

    What the float's shortest text says is rounded: 1.1 stays 1.1, but 10.00001 becomes 10.01.
    """
    return _rounded(bound, digits, ROUND_CEILING)


def downward(bound: float, digits: int = 4) -> str:
    """A lower bound, rounded down to `digits` significant digits."""
    return _rounded(bound, digits, ROUND_FLOOR)


def _rounded(bound: float, digits: int, rounding: str) -> str:
    exact = Decimal(repr(float(bound)))
    return f"{float(Context(prec=digits, rounding=rounding).plus(exact)):.{digits}g}"


def figure(name: str, value: object, digits: int = 4) -> str:
    """A value of any kind by its name: epsilons and deltas are rounded up, other floats nearest."""
    if not isinstance(value, float):
        return str(value)
    bounds = name.startswith("eps") or "epsilon" in name or "delta" in name
    return upward(value, digits) if bounds else f"{value:.{digits}g}"


def odds(epsilon: float) -> str:
    """Epsilon in words (Nanayakkara et al. 2023): how much more likely any outcome may become."""
    if epsilon > 700:  # Beyond the largest float.
        times = f"e^{upward(epsilon)}"
    elif (factor := math.exp(epsilon)) < 100:
        times = f"{math.ceil(100 * factor) / 100:.2f}"
    else:
        times = f"{math.ceil(factor):,}" if factor < 1e6 else upward(factor, 2)
    return (
        f"whatever somebody concludes from the release, they are at most {times} times as likely "
        "to conclude it because one record was in the data"
    )


def attack(members_found: Callable[[float], float]) -> str:
    """The trade-off of attacks in words, shares rounded up.

    Args:
        members_found: the largest share of members that is found, by the share of false alarms.
    """
    alarms = [f"{100 * share:g} %" for share in FALSE_ALARMS]
    found = [f"{upward(100 * members_found(share), 3)} %" for share in FALSE_ALARMS]
    return (
        f"an attacker who may be wrong about {alarms[0]} ({alarms[1]}) of non-members finds at "
        f"most {found[0]} ({found[1]}) of members"
    )
