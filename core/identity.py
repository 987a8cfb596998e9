"""What a run is: digests of all that decides what it releases; they enter every key."""

import contextlib
import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

import torch

from core import distributed
from core.config import Config, flatten
from core.device import config_device
from core.errors import ConfigError
from core.privacy.keys import SECRET_FILE_VARIABLE

CENTRAL = ("dataset.", "central_images.")
"""Settings that decide the central images, beside their plan."""
_NOT_IDENTITY = (
    "runtime.",
    "dataset.path",  # The fingerprint stands for the content, wherever it lies.
)


def origin_of(path: Path) -> str:
    """Random and kept, made by whoever is first: a new or emptied folder never reuses noise."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(secrets.token_hex(16))
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
        temporary.unlink()
    return path.read_text()


def settings_of(config: Config, sections: tuple[str, ...] = ("",)) -> dict[str, Any]:
    """What decides a result, of the keys that begin with one of `sections`."""
    kept = {
        key: value
        for key, value in flatten(config).items()
        if key.startswith(sections) and not key.startswith(_NOT_IDENTITY)
    }
    # Other versions and devices sum or draw differently.
    return {**kept, "computed by": [torch.__version__, config_device(config)]}


def identity_of(
    settings: dict[str, Any], mechanisms: Any, fingerprint: str, origin: str, secret_id: str
) -> str:
    """Digest of all that decides what is released.

    The plan is part of it: were another version to solve another noise multiplier, the same key
    would draw the same noise at another scale, and the difference would give the gradients away.

    Args:
        settings: as of `settings_of`.
        mechanisms: of the plan.
        fingerprint: of the data set's content.
        origin: as of `origin_of`.
        secret_id: public id of the master secret.

    Raises:
        ConfigError: the ranks do not agree on it.
    """
    text = json.dumps([settings, mechanisms, fingerprint, origin, secret_id], sort_keys=True)
    identity = hashlib.sha256(text.encode()).hexdigest()
    if len(set(distributed.all_gather_object(identity))) > 1:
        raise ConfigError(
            "the ranks hold different master secrets: give every machine the same secret file "
            f"(${SECRET_FILE_VARIABLE})"
        )
    return identity
