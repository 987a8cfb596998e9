"""Files and folders that their owner alone may read, whatever the umask."""

import contextlib
import os
from pathlib import Path


def private_opener(path: str, flags: int) -> int:
    """An `opener` for `open`: the file becomes its owner's alone, also one that was there.

    Where a file system knows no owners, or the file is another user's, its mode stays.
    """
    descriptor = os.open(path, flags, 0o600)
    with contextlib.suppress(PermissionError):
        os.fchmod(descriptor, 0o600)
    return descriptor


def private_folder(path: Path) -> None:
    """Makes a folder for its owner alone; one that was there stays as it is: it may be shared."""
    if not path.is_dir():
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        with contextlib.suppress(PermissionError):
            path.chmod(0o700)
