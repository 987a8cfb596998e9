"""What dp-accounting's own accountants say, to compare the project's figures with."""

from collections.abc import Iterable, Sequence

from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from core.privacy.accounting import renyi
from core.privacy.accounting.mechanism import FINE, Mechanism
from core.privacy.accounting.quick import LIBRARY_RELATIONS


def subsampled_gaussian(
    sample_rate: float, noise_multiplier: float, count: int
) -> dp_event.DpEvent:
    step = dp_event.PoissonSampledDpEvent(sample_rate, dp_event.GaussianDpEvent(noise_multiplier))
    return dp_event.SelfComposedDpEvent(step, count)


def dp_events(mechanisms: Iterable[Mechanism]) -> list[dp_event.DpEvent]:
    return [subsampled_gaussian(*mechanism) for mechanism in mechanisms]


def epsilon_of(
    events: Sequence[dp_event.DpEvent], delta: float, relation: str, discretization: float = FINE
) -> float:
    accountant = PLDAccountant(LIBRARY_RELATIONS[relation], discretization)
    for event in events:
        accountant.compose(event)
    return accountant.get_epsilon(delta)


def rdp_epsilon_of(events: Sequence[dp_event.DpEvent], delta: float, relation: str) -> float:
    """Never smaller than by PLD, beyond rounding."""
    accountant = RdpAccountant(renyi.ORDERS, LIBRARY_RELATIONS[relation])
    for event in events:
        accountant.compose(event)
    return accountant.get_epsilon(delta)
