"""Trials whose settings depend on results, by PLD: each is below a reference, fixed beforehand.

**Setting.** Of n trials every setting, and so its noise, may depend on all that earlier ones
released. Each trial has one of n references, and its hockey-stick divergence is at no epsilon, in
neither direction, above that of the pair (A_i, B_i) of its reference. How many trials have which
reference, and the references, are public and fixed beforehand: under scope `sweep` all trials have
the same, under scope `tune_then_train` the tuning trials have one and the final run another.

**Theorem** (Zhu, Dong and Wang 2022, theorem 10). All trials together are dominated by the pair of
products, (A_1 x ... x A_n, B_1 x ... x B_n). *Proof.* By induction on the number of trials:
given what the first released, the others are by hypothesis dominated by the product of their
references. So the divergence of all is at most that of (first, product of the others), and as
a divergence from a product is a mean over the second factor of divergences of the first at other
epsilons, at most that of (A_1, B_1) x the product. QED. The product does not depend on the order,
so that which reference comes next may depend on results, too; fewer trials release less.

**Trials at the same time, and stopped ones.** A trial reads nothing of others once it has begun,
but whether it stops. So all that it would ever release could be handed out as it begins, and what
is seen, whenever that is and however much of it, is made from that: post-processing of trials one
after the other. A release that an earlier trial has made already costs a trial nothing more.

**The pair.** A reference is given as mechanisms. On a grid, its losses with the record against
without are bounded by one distribution, and those without against with by another; a trial is
compared at epsilon >= 0 with both (`core.privacy.accounting.profile`). One pair that is in
neither direction below them has the positive losses of the first, and as negative losses those of
the second, seen from the other side: where that law has mass p at loss x, this one has
p exp(-x) at -x. What is left of both laws has loss 0, rounded up if less is left without the
record. It is this pair that is composed, on the same grid, or one whose steps are parts of its: so
no error of a grid is left out.

**The far tail.** With probability d a reference gives the record away. So a trial may be above its
profile H by d (1 - H), and all together by at most the sum of d.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from core.privacy.accounting.mechanism import Mechanism
from core.privacy.accounting.profile import profile_step, transform_error
from core.privacy.accounting.quick import Losses, composed, composed_losses

Reference = tuple[tuple[Mechanism, ...], int]
"""What a trial may release at most, and how many trials may."""
_FARTHEST = 64
"""Most steps of the finest grid in one of the coarsest's own; a coarser grid rounds losses up."""
_FINER = 4
"""Parts of a profile's own step, where another needs it finer: the error falls with the square."""


def steps(references: Sequence[Reference]) -> list[float]:
    """The grid on which trials are compared with each reference: multiples of the finest."""
    own = [profile_step(mechanisms) for mechanisms, _ in references]
    finest = max(min(own), max(own) / _FARTHEST)
    return [finest * max(1, math.floor(each / finest / _FINER)) for each in own]


def composed_delta(references: tuple[Reference, ...], relation: str, epsilon: float) -> float:
    """Delta at `epsilon` of trials that stay below the `references`, whatever chose them.

    Returns:
        The larger one of both directions, without the far tails; never too small.
    """
    together, finest = _together(references, relation)
    deltas = list[float]()
    for each in together:
        losses = (each.first + np.arange(len(each.probabilities))) * finest
        far = losses > epsilon
        excess = each.probabilities[far] @ np.expm1(epsilon - losses[far])
        deltas.append(each.infinite - float(excess))
    # In a trial's delta, in the reference's that it is compared with, and in what is composed. As a
    # composition is a mean over the rest, such a surplus at every epsilon adds up.
    error = sum(3 * count * transform_error(mechanisms) for mechanisms, count in references)
    return max(deltas) + error


@lru_cache(maxsize=1)  # Megabytes.
def _together(references: tuple[Reference, ...], relation: str) -> tuple[list[Losses], float]:
    """Losses of all trials in both directions, and their grid."""
    grids = steps(references)
    finest, found = min(grids), list[Losses]()
    pairs = [
        [_spread(pair, round(step / finest)) for pair in _pairs(each, relation, step)]
        for (each, _), step in zip(references, grids, strict=True)
    ]
    counts = [count for _, count in references]
    for one_way in zip(*pairs, strict=True):
        copies = [composed([pair], [n], finest) for pair, n in zip(one_way, counts, strict=True)]
        found.append(composed(copies, [1] * len(copies), finest))
    return found, finest


@lru_cache(maxsize=8)
def _pairs(mechanisms: tuple[Mechanism, ...], relation: str, step: float) -> tuple[Losses, Losses]:
    forth, back = composed_losses(mechanisms, relation, step)
    return _pair(forth, back, step), _pair(back, forth, step)


def _pair(forth: Losses, back: Losses, step: float) -> Losses:
    """Losses of one pair that is below neither `forth` nor, from the other side, `back`."""
    above, below = _positive(forth), _positive(back)
    against = np.exp(-step * np.arange(1, 1 + max(len(above), len(below))))
    seen = below * against[: len(below)]
    rest = max(0.0, 1 - forth.infinite - above.sum() - seen.sum())
    rest_without = 1 - back.infinite - below.sum() - float(above @ against[: len(above)])
    infinite, middle, place = forth.infinite, np.zeros(1 + len(above)), 0
    if rest > rest_without:
        place = math.ceil(math.log(rest / rest_without) / step) if rest_without > 0 else len(middle)
    middle[1:] = above
    if place < len(middle):
        middle[place] += rest
    else:
        infinite += rest
    return Losses(-len(below), np.concatenate([seen[::-1], middle]), infinite)


def _positive(way: Losses) -> NDArray[np.float64]:
    """Probabilities of 1, 2, ... steps; what the transforms left below 0 counts as 0."""
    nothing = np.zeros(max(0, way.first - 1))
    return np.concatenate([nothing, way.probabilities[max(0, 1 - way.first) :]]).clip(min=0)


def _spread(losses: Losses, parts: int) -> Losses:
    """The same on a grid with so many parts of each step."""
    probabilities = np.zeros((len(losses.probabilities), parts))
    probabilities[:, 0] = losses.probabilities
    last = probabilities.size - parts + 1
    return Losses(losses.first * parts, probabilities.ravel()[:last], losses.infinite)
