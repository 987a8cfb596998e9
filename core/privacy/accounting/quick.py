"""Quick accountant: dp-accounting's distributions in a tenth of its time, for search and display.

The library visits every point of its grid in Python; here an array holds them all. What a plan
states in the end is the library's own figure: see `accounting`.
"""
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateUsage=false

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

import dp_accounting
import numpy as np
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss
from numpy.typing import NDArray
from scipy import fft

from core.privacy.accounting.mechanism import Mechanism

LIBRARY_RELATIONS = {
    # Zero-out replaces a record by an empty one, so N is public; its figures equal add/remove.
    "zero_out": dp_accounting.NeighboringRelation.REPLACE_SPECIAL,
    "replace_one": dp_accounting.NeighboringRelation.REPLACE_ONE,
}


_TAIL = 1e-15
"""Probability that may be cut off, and counts as infinite loss."""
_LARGEST = 700.0
"""Larger losses count as infinite: their exponentials are, nearly."""
_NEAR = 2.0 ** np.arange(-3, 3.5, 0.5)
"""Orders of Chernoff's bound, over the best one of a normal law."""
_BLOCK = 16


class _SampledGaussian(GaussianPrivacyLoss):
    """With deltas for a whole grid of losses at once (zero-out alone)."""

    def get_delta_for_epsilon(self, epsilon: float | Sequence[float]) -> Any:
        """Hockey-stick divergences at the losses `epsilon`, of any shape."""
        losses = np.asarray(epsilon, dtype=float)
        adds = self.adjacency_type == AdjacencyType.ADD
        # No loss is below log(1 - q), or in the other direction above its negative.
        lowest = math.log1p(-self.sampling_prob) if self.sampling_prob < 1 else -math.inf
        within = -losses > lowest if adds else losses > lowest
        deltas = np.zeros_like(losses) if adds else -np.expm1(np.minimum(losses, 0.0))
        inner = losses[within]
        if adds:
            ends = self.sensitivity + self._end(-self._unsampled(-inner))
        else:
            ends = self._end(self._unsampled(inner))
        upper, lower = self.mu_upper_cdf(ends), self.mu_lower_log_cdf(ends)
        deltas[within] = np.asarray(upper) - np.exp(inner + np.asarray(lower))
        return np.clip(deltas, 0.0, 1.0)

    def _unsampled(self, losses: NDArray[np.float64]) -> NDArray[np.float64]:
        """log(1 + (exp(loss) - 1) / q), the loss that sampling at rate q turned into `losses`."""
        rate = self.sampling_prob
        with np.errstate(divide="ignore"):  # No outcome has the least loss.
            near = np.log1p(np.expm1(np.minimum(losses, 1.0)) / rate)
        far = losses - math.log(rate) + np.log1p(-(1 - rate) * np.exp(-np.maximum(losses, 1.0)))
        return np.where(losses < 1.0, near, far)

    def _end(self, losses: NDArray[np.float64]) -> Any:
        """The largest outcome whose loss, without sampling, is at least so large."""
        return self._inverse_privacy_loss_without_subsampling_remove(losses)  # type: ignore[arg-type]  # Linear.


@lru_cache(maxsize=32)  # Megabytes each, on the finest grid.
def library_release(
    sample_rate: float, noise_multiplier: float, relation: str, discretization: float
) -> PrivacyLossDistribution:
    """The library's loss distribution of one Poisson-sampled Gaussian release."""
    return privacy_loss_distribution.from_gaussian_mechanism(
        noise_multiplier,
        value_discretization_interval=discretization,
        sampling_prob=sample_rate,
        neighboring_relation=LIBRARY_RELATIONS[relation],
    )


@lru_cache(maxsize=1024)
def one_release(
    sample_rate: float, noise_multiplier: float, relation: str, discretization: float
) -> PrivacyLossDistribution:
    """The same, rounded pessimistically as there, but sooner (zero-out alone)."""
    if relation != "zero_out":
        return library_release(sample_rate, noise_multiplier, relation, discretization)

    def one_way(adjacency: AdjacencyType) -> Any:
        return privacy_loss_distribution._create_pld_pmf_from_monotone_privacy_loss(
            _SampledGaussian(noise_multiplier, sampling_prob=sample_rate, adjacency_type=adjacency),
            value_discretization_interval=discretization,
            use_connect_dots=True,
        )

    return privacy_loss_distribution._pld_for_subsampled_mechanism(one_way, sample_rate)


class Losses(NamedTuple):
    """Distribution of the privacy loss of a composition, rounded pessimistically.

    Attributes:
        first: the least loss, in steps of the grid.
        probabilities: of it and the losses that follow, one step apart.
        infinite: probability of more than these, with all that was cut off.
    """

    first: int
    probabilities: NDArray[np.float64]
    infinite: float


_ALL_INFINITE = Losses(0, np.zeros(1), 1.0)
"""Of what has no loss that the grid holds."""


def composed_losses(
    mechanisms: Sequence[Mechanism], relation: str, discretization: float
) -> tuple[Losses, Losses]:
    """The losses of all mechanisms together, with the record against without, and the reverse.

    Connect the dots (Doroshenko et al. 2022), composed by one discrete Fourier transform (Koskela
    et al. 2020), on a grid of losses `discretization` apart.
    """
    releases = [one_release(*each[:2], relation, discretization) for each in mechanisms]
    counts = [count for *_, count in mechanisms]
    one = composed([_losses(each._pmf_remove) for each in releases], counts, discretization)
    if all(each._symmetric for each in releases):
        return one, one
    ways = [_losses(each._pmf_add) for each in releases]
    return one, composed(ways, counts, discretization)


def _losses(pmf: Any) -> Losses:
    dense = pmf.to_dense_pmf()
    probabilities = np.asarray(dense._probs, dtype=float)
    return Losses(dense._lower_loss, probabilities, dense._infinity_mass)


def quick_epsilon(
    mechanisms: Sequence[Mechanism], delta: float, relation: str, discretization: float
) -> float:
    """Epsilon at `delta` of all mechanisms together, on a grid of losses `discretization` apart.

    Equal to the library's figure on the same grid to about 1e-6; infinite where that exceeds about
    700.
    """
    ways = composed_losses(mechanisms, relation, discretization)
    return max(_epsilon(way, delta, discretization) for way in ways)


def composed(releases: Sequence[Losses], counts: Sequence[int], discretization: float) -> Losses:
    """The losses of `counts` copies of each of `releases` together, in one direction."""
    if any(each.infinite >= 1 for each in releases):
        return _ALL_INFINITE
    parts = [each.probabilities for each in releases]
    first, last = _range(parts, counts)
    size = cast(int, fft.next_fast_len(max(last - first + 1, *map(len, parts)), real=True))
    spectrum, log_finite, least = np.ones(size // 2 + 1, dtype=complex), 0.0, 0
    for release, part, count in zip(releases, parts, counts, strict=True):
        spectrum *= np.fft.rfft(part, size) ** count
        log_finite += count * math.log1p(-release.infinite)
        least += count * release.first
    probabilities = np.roll(np.fft.irfft(spectrum, size), -first)[: last - first + 1]
    finite = max(0, math.floor(_LARGEST / discretization) - least - first + 1)
    infinite = _TAIL - math.expm1(log_finite) + float(probabilities[finite:].sum())
    if not finite:
        return _ALL_INFINITE
    return Losses(least + first, probabilities[:finite], infinite)


def _epsilon(way: Losses, delta: float, discretization: float) -> float:
    if way.infinite > delta:
        return math.inf
    losses = (way.first + np.arange(len(way.probabilities))) * discretization
    above = losses > 0  # Epsilon is not negative.
    losses, probabilities = losses[above][::-1], way.probabilities[above][::-1]
    # From the largest loss down: the masses of both outcomes' laws at or above each loss.
    upper = way.infinite + np.cumsum(probabilities)
    lower = np.cumsum(probabilities * np.exp(-losses))
    reached = np.flatnonzero(upper - np.exp(losses) * lower > delta)
    place = reached[0] - 1 if len(reached) else len(losses) - 1
    if place < 0 or upper[place] <= delta + lower[place]:
        return 0.0
    return math.log((upper[place] - delta) / lower[place])


def _range(parts: Sequence[NDArray[np.float64]], counts: Sequence[int]) -> tuple[int, int]:
    """Between which points of the grid the sum lies but for `_TAIL`, by Chernoff's bound."""
    most = sum(count * (len(part) - 1) for part, count in zip(parts, counts, strict=True))
    if max(counts) == 1:  # Whole, in less time than the bound takes.
        return 0, most
    variance = 0.0
    for part, count in zip(parts, counts, strict=True):
        points = np.arange(len(part))
        mean = part @ points
        variance += count * float(part @ (points - mean) ** 2)
    normal = math.sqrt(2 * math.log(2 / _TAIL) / max(variance, 1e-12)) * _NEAR
    rare = np.arange(1, 21) / max(map(len, parts))  # For a large loss that is improbable.
    orders = np.concatenate([normal, rare])
    with np.errstate(divide="ignore"):
        positive = [part.clip(min=0) for part in parts]  # Transforms leave a little below 0.
        fine = [np.log(part) for part in positive]
        coarse = [np.log(_in_blocks(part)) for part in positive]

    def farthest(sign: float) -> float:
        # Every order gives a bound; which of them gives the least is known from blocks of points.
        best = orders[[(_chernoff(coarse, counts, sign * _BLOCK * orders) / orders).argmin()]]
        return float((_chernoff(fine, counts, sign * best) / best).item())

    return max(0, math.floor(-farthest(-1.0))), min(most, math.ceil(farthest(1.0)))


def _in_blocks(part: NDArray[np.float64]) -> NDArray[np.float64]:
    whole = np.zeros(-(-len(part) // _BLOCK) * _BLOCK)
    whole[: len(part)] = part
    return whole.reshape(-1, _BLOCK).sum(axis=1)


def _chernoff(
    logs: Sequence[NDArray[np.float64]], counts: Sequence[int], orders: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The exponents that the sum exceeds with probability `_TAIL` / 2 at most, at each order."""
    total = np.full_like(orders, math.log(2 / _TAIL))
    for log, count in zip(logs, counts, strict=True):
        exponent = orders[:, None] * np.arange(len(log)) + log
        largest = exponent.max(axis=1)
        total += count * (largest + np.log(np.exp(exponent - largest[:, None]).sum(axis=1)))
    return total
