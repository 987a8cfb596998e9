"""Files that are whole or absent, on the disk when a call returns, and their owner's alone."""

import os
from pathlib import Path


def write_and_sync(descriptor: int, content: bytes) -> None:
    """Writes all of `content`, forces it to the disk and closes the descriptor."""
    try:
        while content:
            content = content[os.write(descriptor, content) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Makes the names beside `path` durable: without it a new file can vanish with the power."""
    write_and_sync(os.open(path.parent, os.O_RDONLY), b"")


def replace_durably(path: Path, content: bytes) -> None:
    """Gives the file new content, all of it or none; one writer at a time."""
    temporary = path.with_name(f"{path.name}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    write_and_sync(os.open(temporary, flags, 0o600), content)
    os.replace(temporary, path)
    sync_folder(path)
