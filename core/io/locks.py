"""One writer for a folder: a lock file that names its holder and frees itself when that dies."""

import fcntl
import json
import os
import socket
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from core.errors import ConfigError


@contextmanager
def locked(path: Path, patience: float = 0.0) -> Generator[None]:
    """Holds the lock file `path` while the block runs.

    The file must lie where flock works: a local disk, or a shared one that passes locks on.

    Args:
        patience: seconds to wait for a holder that may be about to end.

    Raises:
        ConfigError: another process holds it; says which.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        deadline = time.monotonic() + patience
        while not _locked(file):
            if time.monotonic() >= deadline:
                raise ConfigError(
                    f"'{path.parent}' is in use by {holder(path)}: wait for it or stop it; two "
                    "writers would spend twice"
                )
            time.sleep(0.2)
        file.seek(0)
        file.truncate()
        json.dump({"host": socket.gethostname(), "pid": os.getpid()}, file)
        file.flush()
        yield


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_free(path: Path) -> bool:
    """Whether no other process holds the lock file `path`."""
    with path.open("a+") as file:
        return _locked(file)


def holder(path: Path) -> str:
    """Who wrote the lock file last, in words."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return "another process"
    return f"process {content['pid']} on {content['host']}"
