"""Composition that is kept in a file, so that the next one composes only what is new.

The file says of which mechanisms it is the composition, on which grid. So it may be older than
what asks for it, or be lost: what it lacks is composed and added, and where it holds anything that
is not asked for it is made anew. It is sealed with a key of the master secret: one that was damaged
or written by others, or by other code, is made anew, too.
"""
# dp_accounting's types come without stubs:
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportPrivateUsage=false

import hmac
import io
import json
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from dp_accounting.pld.pld_pmf import DensePLDPmf
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

from core.errors import ConfigError
from core.io.code_digest import code_digest
from core.io.files import write_whole
from core.privacy.accounting.exact import composed, epsilon_of
from core.privacy.accounting.mechanism import Mechanism
from core.privacy.keys import MasterSecret

_Counts = Mapping[tuple[float, float], int]
_SIDES = ("remove", "add")
_SEAL = 32
"""Bytes of an HMAC, with which the file begins."""


def epsilon_beside(
    path: Path,
    settled: Sequence[Mechanism],
    everything: Sequence[Mechanism],
    delta: float,
    relation: str,
    grid: float,
) -> float:
    """Epsilon at `delta` of `everything` together, of which `settled` will be asked for again.

    Args:
        path: of the file that keeps the composition of `settled`; one process at a time.
        settled: a part of `everything`, each as of `grouped`.
        grid: of privacy losses, their distance.

    Returns:
        An upper bound as of `epsilon_of_many`, to rounding whatever the file holds.

    Privacy: the figure bounds all of `everything`, whatever the file holds: a sealed one is what
        was composed of the mechanisms that it names, and these alone are left out, each as often
        as it is in it. Who has the master secret could write another.
    """
    wanted, total = dict[tuple[float, float], int](), None
    if (key := _key()) is not None:
        wanted = _counts(settled)
        have, total = _read(path, key, relation, grid)
        if any(count > wanted.get(mechanism, 0) for mechanism, count in have.items()):
            have, total = {}, None
        if new := _less(wanted, have):
            total = _joined(total, new, relation, grid)
            content = partial(_write, total, settled, key, relation, grid)
            write_whole(path, content, private=True)
    total = _joined(total, _less(_counts(everything), wanted), relation, grid)
    return 0.0 if total is None else epsilon_of(total, delta)


def _counts(mechanisms: Sequence[Mechanism]) -> dict[tuple[float, float], int]:
    return {(rate, noise): count for rate, noise, count in mechanisms}


def _less(counts: _Counts, others: _Counts) -> list[Mechanism]:
    """What is left of the counts without those of others."""
    left = {key: count - others.get(key, 0) for key, count in counts.items()}
    return [(*key, count) for key, count in left.items() if count > 0]


def _joined(
    total: PrivacyLossDistribution | None,
    mechanisms: Sequence[Mechanism],
    relation: str,
    grid: float,
) -> PrivacyLossDistribution | None:
    if not mechanisms:
        return total
    new = composed(mechanisms, relation, grid)
    return new if total is None else total.compose(new)


def _write(
    total: Any,
    mechanisms: Sequence[Mechanism],
    key: bytes,
    relation: str,
    grid: float,
    file: Any,
) -> None:
    sides = [total._pmf_remove.to_dense_pmf()]
    sides += [] if total._symmetric else [total._pmf_add.to_dense_pmf()]
    about = {
        "by": _version(),
        "relation": relation,
        "grid": grid,
        "mechanisms": mechanisms,
        "sides": [[int(each._lower_loss), float(each._infinity_mass)] for each in sides],
    }
    losses = {name: each._probs for name, each in zip(_SIDES, sides, strict=False)}
    losses["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **losses)
    file.write(hmac.digest(key, content.getvalue(), "sha256") + content.getvalue())


def _read(
    path: Path, key: bytes, relation: str, grid: float
) -> tuple[dict[tuple[float, float], int], PrivacyLossDistribution | None]:
    """Mechanisms and composition of the file; none where it is of another kind, or not sealed."""
    try:
        whole = path.read_bytes()
    except OSError:
        return {}, None
    if not hmac.compare_digest(whole[:_SEAL], hmac.digest(key, whole[_SEAL:], "sha256")):
        return {}, None
    with np.load(io.BytesIO(whole[_SEAL:])) as content:
        about = json.loads(content["about"].tobytes())
        if (about["by"], about["relation"], about["grid"]) != (_version(), relation, grid):
            return {}, None
        sides = [
            DensePLDPmf(grid, lower, content[name], infinite, True)
            for name, (lower, infinite) in zip(_SIDES, about["sides"], strict=False)
        ]
        return _counts(about["mechanisms"]), PrivacyLossDistribution(*sides)


def _version() -> str:
    return f"{metadata.version('dp-accounting')} {code_digest()}"


def _key() -> bytes | None:
    """Of the seal; None where there is no master secret, and nothing is kept."""
    try:
        master = MasterSecret.load(create=False)
    except ConfigError:
        return None
    return master.derive(fingerprint="", trial="", stage="ledger", purpose="kept composition")
