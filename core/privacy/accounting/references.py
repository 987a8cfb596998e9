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
record. It is this pair that is composed, on the same grid. Two references keep their own grids: the
delta of both is the mean, over the losses x of the first, of that of the second at epsilon - x,
which is known between the points of its grid, too. So no error of a grid is left out.

**The far tail.** With probability d a reference gives the record away. So a trial may be above its
profile H by d (1 - H), and all together by at most the sum of d.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from core.privacy.accounting.mechanism import Mechanism, quick_grid
from core.privacy.accounting.profile import deltas_at, transform_error
from core.privacy.accounting.quick import Losses, composed, composed_losses

Reference = tuple[tuple[Mechanism, ...], int]
"""What a trial may release at most, and how many trials may."""
_COARSEST = 2e-2
"""Of little noise, where many losses are large; what it costs is in the noise that is solved."""
_FINER = 4
"""Parts of its own grid, where two references meet between its points: what is too much falls with
the square.
"""
_NOTHING = Losses(0, np.ones(1), 0.0)
"""Of no other trial."""


def composed_delta(references: tuple[Reference, ...], relation: str, epsilon: float) -> float:
    """Delta at `epsilon` of trials below the one or two `references`, whatever chose them.

    Returns:
        The larger one of both directions, without the far tails; never too small.
    """
    *others, (last, step) = zip(references, grids(references), strict=True)
    deltas = list[float]()
    for way, losses in enumerate(_copies(last, relation, step)):
        given, apart = _NOTHING, 0.0
        for other, apart in others:
            given = _copies(other, relation, apart)[way]
        left = epsilon - apart * (given.first + np.arange(len(given.probabilities), dtype=float))
        deltas.append(given.infinite + float(given.probabilities @ deltas_at(losses, step, left)))
    # In a trial's delta, in the reference's that it is compared with, and in what is composed. As a
    # composition is a mean over the rest, such a surplus at every epsilon adds up.
    error = sum(3 * count * transform_error(mechanisms) for mechanisms, count in references)
    return max(deltas) + error


def grids(references: Sequence[Reference]) -> list[float]:
    """On which trials are compared with each of the references."""
    parts = 2 if len(references) == 1 else 2 * _FINER
    return [quick_grid(mechanisms, _COARSEST) / parts for mechanisms, _ in references]


@lru_cache(maxsize=4)  # Megabytes each.
def _copies(reference: Reference, relation: str, step: float) -> tuple[Losses, Losses]:
    """Losses of all trials that have this reference, in both directions."""
    mechanisms, count = reference
    forth, back = composed_losses(mechanisms, relation, step)
    pairs = _pair(forth, back, step), _pair(back, forth, step)
    one, other = (each if count == 1 else composed([each], [count], step) for each in pairs)
    return one, other


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
