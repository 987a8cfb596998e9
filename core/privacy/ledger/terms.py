"""Terms of a ledger, events and keys of its reservations: plain data that refuse what cannot be."""

import math
import operator
from dataclasses import dataclass

from core.errors import LedgerError
from core.privacy.accounting.mechanism import RELATIONS
from core.privacy.plan.releases import RELEASES


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raises the one-sentence error of a value out of its range.

    Raises:
        LedgerError: `condition` is false.
    """
    if not condition:
        raise LedgerError(f"{name}={value!r} is refused: it must be {allowed}")


@dataclass(frozen=True)
class Terms:
    """What a ledger states in its first line and never changes.

    Attributes:
        fingerprint: SHA-256 of the data set, 64 hexadecimal digits; of a family, that of its name.
        num_examples: public N, at least 1; of a family, that of the data set that began it.
        delta: in (0, 1/N).
        neighboring_relation: `zero_out` or `replace_one`.
        budget: total epsilon of all that is ever computed on the data, or None for no cap.
        family: public name of several data sets that charge together; None for a single one.
    """

    fingerprint: str
    num_examples: int
    delta: float
    neighboring_relation: str
    budget: float | None = None
    family: str | None = None

    def __post_init__(self) -> None:
        digits, count, relation = self.fingerprint, self.num_examples, self.neighboring_relation
        is_hash = len(digits) == 64 and set(digits) <= set("0123456789abcdef")
        require(is_hash, "fingerprint", digits, "64 hexadecimal digits")
        require(count >= 1, "num_examples", count, "at least 1")
        require(0 < self.delta < 1 / count, "delta", self.delta, f"in (0, 1/N={1 / count:.3g})")
        known = " or ".join(RELATIONS)
        require(relation in RELATIONS, "neighboring_relation", relation, known)
        positive = self.budget is None or 0 < self.budget < math.inf
        require(positive, "budget", self.budget, "a positive, finite epsilon, or none for no cap")


@dataclass(frozen=True)
class Event:
    """`count` releases of a Poisson-subsampled Gaussian mechanism, as plain data.

    Attributes:
        kind: of `RELEASES`, of which `dp_sgd` alone can stop half-way.
        sample_rate: q in (0, 1].
        noise_multiplier: standard deviation over sensitivity, positive and finite.
        count: at least 1.
        release: identity of the released object, where several trials have it from one release;
            equal events of one identity are the same object and count once.
    """

    kind: str
    sample_rate: float
    noise_multiplier: float
    count: int
    release: str = ""

    def __post_init__(self) -> None:
        kinds = {each.kind: each.is_shared for each in RELEASES.values()}
        sigma = self.noise_multiplier
        require(self.kind in kinds, "event kind", self.kind, f"one of {', '.join(kinds)}")
        require(0 < self.sample_rate <= 1, "sample_rate", self.sample_rate, "in (0, 1]")
        require(0 < sigma < math.inf, "noise_multiplier", sigma, "positive and finite")
        require(operator.index(self.count) >= 1, "count", self.count, "at least 1")
        whole = not self.release or kinds[self.kind]
        allowed = "empty but for central images or moments, drawn as a whole"
        require(whole, "release", self.release, allowed)


@dataclass(frozen=True)
class Key:
    """What makes a reservation the same as an earlier one, so that it is charged once.

    Attributes:
        run: sweep or single run.
        trial: identity from which masks and noise are drawn. Other noise is another trial: only
            an exact replay is free.
        stage: name of what runs, such as `all`.
        first_step: first DP-SGD step, from 0.
        end_step: DP-SGD step after the last; the difference is the DP-SGD count.
    """

    run: str
    trial: str
    stage: str
    first_step: int
    end_step: int

    def __str__(self) -> str:
        steps = f"steps {self.first_step} to {self.end_step}"
        return f"trial {self.trial[:16]} of run {self.run} ({self.stage}, {steps})"
