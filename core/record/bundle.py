"""Digests of a released bundle, by which whoever has it checks it."""

import hashlib
import json
from pathlib import Path

from core.errors import ConfigError
from core.record.folder import NON_PRIVATE

DIGESTS = "digests.json"


def verify_release(folder: Path) -> int:
    """Checks every file of a bundle against its digest; returns the number of files.

    Raises:
        ConfigError: a file is missing, changed or was added.
    """
    try:
        stated: dict[str, str] = json.loads((folder / DIGESTS).read_text())
    except (OSError, ValueError):
        raise ConfigError(f"'{folder}' is no release: it holds no {DIGESTS}") from None
    found = digests(folder)
    for name in sorted(set(stated) | set(found)):
        if stated.get(name) != found.get(name):
            state = "missing" if name not in found else "not listed"
            state = "changed" if name in stated and name in found else state
            raise ConfigError(f"'{folder / name}' is {state}: this is not the bundle as released")
    return len(found)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but the list itself.

    Raises:
        ConfigError: something in the folder may not be published at all.
    """
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_symlink():
            raise ConfigError(f"'{path}' is a link: a bundle holds files alone")
        if NON_PRIVATE in name.parts:
            raise ConfigError(f"'{path}' is not private: remove it, and publish nothing of it")
        if path.is_file() and name != Path(DIGESTS):
            found[name.as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found
