"""Address of a storage folder in a store, such as S3, and each machine's own folder for it."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.config import Config, default_ledger, load
from core.errors import ConfigError

_KNOWN = re.compile(r"(s3|gs|abfs)://[A-Za-z0-9][\w.\-@]*(/[^/\s?#%]+)*/?")
"""No password and no option: the address is written down and printed."""


def known_address(address: str) -> str:
    """The address without a slash at its end.

    Raises:
        ConfigError: it is of no kind that run folders can be kept at.
    """
    if not _KNOWN.fullmatch(address):
        raise ConfigError(
            f"storage_path={address!r} is refused: name a folder that all machines see, or "
            "s3://BUCKET/FOLDER (gs://, abfs://), without password and options"
        )
    return address.rstrip("/")


def own_folder(address: str) -> Path:
    """Where the machine that asks holds what belongs to the address; the driver's is the head's."""
    digest = hashlib.sha256(address.encode()).hexdigest()[:8]
    name = re.sub(r"\W+", "-", address.partition("://")[2])
    return Path(default_ledger()).parent / "storage" / f"{name}-{digest}"


def storage_folder(place: str) -> Path:
    """The folder of sweeps that a user names, on this machine."""
    return own_folder(place.rstrip("/")) if "://" in place else Path(place).expanduser()


def on_this_machine(settings: Mapping[str, Any], address: str) -> Config:
    """The configuration of a run, whose cache lies on this machine unless it says where."""
    cache = own_folder(address).parent / load(settings).runtime.cache
    return load(settings, {"runtime.cache": str(cache)})
