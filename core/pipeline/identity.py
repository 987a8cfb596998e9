"""Identity of a run: a digest of all that decides what it releases, which enters every key.

Masks and noise depend on the identity alone, so the same noise never falls on another computation
that could be named: code, versions, settings, data, device. What is left differs in rounding.

- To the bit replays: the same identity on the same CPU model with as many workers and threads.
- To rounding replays: other numbers of workers or threads, another CPU model of the architecture, a
  physical batch that was halved, and every GPU, which adds in no fixed order. These may change
  when a run is resumed: else a cluster of several CPU models could not go on with a lost worker's
  trial, and the vector units alone would not tell what its libraries choose.

Privacy: a replay to rounding shows, to whoever sees both, the difference of two roundings of one
    sum, which no noise hides. Only steps after the last checkpoint are replayed, and what they
    released before lies in the run's folder, so it must stay inside.
"""

import json
import platform
import secrets
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core import distributed
from core.config import Config, flatten
from core.device import config_device
from core.errors import ConfigError
from core.io.code_digest import code_digest
from core.io.files import read_json, to_json, write_first, write_json
from core.io.locks import locked
from core.privacy.keys import SECRET_FILE_VARIABLE
from core.privacy.mechanisms.kernels import fused_kernels
from core.privacy.plan.plan import PrivacyPlan
from core.record.folder import CODE, COMPUTED_BY, RunFolder, identity_of

Parts = dict[str, dict[str, Any]]
"""What decides a run, by group and name: plain data."""
_CENTRAL = ("dataset.", "central_images.")
"""Settings that decide the central images, beside their plan."""
_LOCK_TIMEOUT_S = 60.0
SHOWN = "changed since this run was finished ({}): its result is shown as it was, nothing is drawn"
_AGAIN = "changed since this run was begun ({}): it draws new noise and is charged again"
_NOT_NOTED = "what it was begun with is not noted"
_PERHAPS = f"{_NOT_NOTED}: where that differs, it draws new noise and is charged again"
_REDRAWN = (
    "changed since the sweep drew its central images ({}): others are drawn, and charged once more"
)
_NOT_IDENTITY = (
    "runtime.",
    "dataset.path",  # The fingerprint stands for the content, wherever it lies.
)


def origin_of(path: Path) -> str:
    """Random and kept, made by whoever is first: a new or emptied folder never reuses noise."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_first(path, secrets.token_hex(16))
    return path.read_text()


def computed_by(config: Config) -> dict[str, str]:
    """What computes, beside the settings; to be called on all ranks.

    Python's version and scipy's decide nothing but the plan, whose numbers are parts themselves.
    """
    device = config_device(config)
    model = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    return {
        CODE: code_digest(),
        "torch": torch.__version__,
        "torchvision": _version("torchvision"),
        "numpy": np.__version__,
        "opacus": _version("opacus"),
        "device": device,
        "device model": ", ".join(sorted(set(distributed.all_gather_object(model)))),
        "memory format": "channels_last" if config.runtime.channels_last else "contiguous",
        "float32 products": torch.get_float32_matmul_precision(),
        "kernels": f"triton {_version('triton')}" if fused_kernels(config) else "torch",
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def digest_of(parts: Parts) -> str:
    """Digest of all that decides what is released.

    Raises:
        ConfigError: the ranks do not agree on it.
    """
    for theirs in distributed.all_gather_object(parts):
        if changed := differences(theirs, parts) or differences(parts, theirs):
            raise ConfigError(
                f"the ranks differ ({'; '.join(changed)}): give every machine the same code, "
                f"packages and secret file (${SECRET_FILE_VARIABLE})"
            )
    return identity_of(parts)


def differences(earlier: Parts, now: Parts) -> list[str]:
    """What has changed, in words."""
    changed: list[str] = []
    for group, named in now.items():
        for name, value in named.items():
            if (before := earlier.get(group, {}).get(name)) != value:
                short = group != "others" and name != CODE
                changed.append(f"{name} {before} -> {value}" if short else f"{name} changed")
    return changed


@dataclass(frozen=True)
class Identity:
    """Of one run, and of the central images that the trials of a sweep share.

    Attributes:
        run: digest that enters every key of the run.
        shared_central: that of the shared central images; empty where the run has its own.
        changed: what differs from how the folder was begun, in words.
    """

    run: str
    shared_central: str
    changed: list[str]
    parts: Parts
    charged: bool

    @property
    def central(self) -> str:
        """What enters the keys of the central images."""
        return self.shared_central or self.run

    def note(self, folder: RunFolder, shared: Path | None) -> list[str]:
        """Notes what the folders are begun with, once it is charged; returns what to tell of it.

        Privacy: the file holds the fingerprint of the data; it is its owner's alone.
        """
        told: list[str] = []
        if self.changed and self.charged:
            unknown = self.changed == [_NOT_NOTED]
            told.append(_PERHAPS if unknown else _AGAIN.format("; ".join(self.changed)))
        distributed.on_rank_0(lambda: _note_parts(folder.identity, self.parts))
        if shared is not None and self.shared_central:
            by = {COMPUTED_BY: self.parts[COMPUTED_BY]}
            central = RunFolder(shared).identity
            if changed := distributed.on_rank_0(lambda: _note_parts(central, by)):
                told.append(_REDRAWN.format("; ".join(changed)))
        return told


def identify(
    config: Config,
    plan: PrivacyPlan,
    fingerprint: str,
    secret: str,
    folder: RunFolder,
    shared: Path | None,
) -> Identity:
    """What this run is; to be called on all ranks.

    Args:
        fingerprint: of the data's content.
        secret: public id of the master secret.
        folder: keeps the random origin of the run, and what it was begun with.
        shared: folder that keeps the origin of the central images that trials share; or None.

    Raises:
        ConfigError: the ranks do not agree on it.
    """

    def parts_of(sections: tuple[str, ...], mechanisms: Any, origin: Path) -> Parts:
        # Were another version to solve another noise multiplier, the same key would draw the same
        # noise at another scale, and the difference would give the gradients away.
        others = {
            "plan": mechanisms,
            "data": fingerprint,
            origin.name: distributed.on_rank_0(lambda: origin_of(origin)),
            "master secret": secret,
        }
        settings = {
            key: value
            for key, value in flatten(config).items()
            if key.startswith(sections) and not key.startswith(_NOT_IDENTITY)
        }
        parts = {COMPUTED_BY: computed_by(config), "settings": settings, "others": others}
        return json.loads(to_json(parts))  # As a file gives it back.

    shared_central = ""
    if shared is not None and (released := plan.central or plan.moments) is not None:
        central = parts_of(_CENTRAL, asdict(released), shared / "central_id")
        shared_central = digest_of(central)
    parts = parts_of(("",), plan.mechanisms, folder.nonce)
    parts["others"]["shared central images"] = shared_central
    run = digest_of(parts)
    changed = distributed.on_rank_0(lambda: _changed_since(folder.identity, parts))
    if changed is None:  # Of an earlier version, if it was charged.
        known = not distributed.on_rank_0(folder.charged.exists)
        changed = [] if known else [_NOT_NOTED]
    return Identity(run, shared_central, changed, parts, plan.is_private)


def _changed_since(path: Path, now: Parts) -> list[str] | None:
    """What has changed since the folder of the file was begun; None where nothing is noted."""
    return differences(read_json(path), now) if path.exists() else None


def _note_parts(path: Path, parts: Parts) -> list[str]:
    """Notes what the folder is begun with; returns what has changed since the last note."""
    # Trials share what a sweep notes.
    with locked(path.with_name(f"{path.name}.lock"), _LOCK_TIMEOUT_S):
        changed = _changed_since(path, parts) or []
        write_json(path, parts, private=True)
    return changed
