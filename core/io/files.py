"""Files that are whole or absent, on the disk when a call returns; folders; JSON."""

import contextlib
import io
import json
import math
import os
import secrets
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from shutil import rmtree
from typing import Any, BinaryIO

from core.errors import ConfigError

Content = bytes | str | Callable[[BinaryIO], object]
"""Of a file: as it is, as text, or what writes it into the open file."""


def local_folder(name: str, folder: str) -> str:
    """A folder as a person names it; `~` is the home.

    Raises:
        ConfigError: it is an address, which would become a folder of that name.
    """
    if "://" in folder:
        raise ConfigError(f"{name}={folder!r} is an address: name a folder")
    return os.path.expanduser(folder)


def write_whole(path: Path, content: Content, private: bool = False, by_many: bool = False) -> None:
    """Gives a file new content, all of it or none, also after a power cut; makes its folder.

    Args:
        private: the file is its owner's alone, and so is its folder where that is new.
        by_many: several processes may write the file at the same time; else there is one.
    """
    buffer = io.BytesIO()
    if callable(content):  # In memory: what fails below is the storage, and raises OSError.
        content(buffer)
    else:
        buffer.write(content.encode() if isinstance(content, str) else content)
    if private:
        private_folder(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(_name(path) if by_many else f"{path.name}.tmp")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        name = str(temporary)
        descriptor = private_opener(name, flags) if private else os.open(name, flags, 0o666)
        write_and_sync(descriptor, buffer.getbuffer())
        temporary.replace(path)
        sync_folder(path)
    finally:
        temporary.unlink(missing_ok=True)  # Half a file would keep the space.


def write_first(path: Path, content: str | bytes, private: bool = True) -> None:
    """Gives a file its content, unless it is there: whoever is first decides, for good.

    Args:
        private: as of `write_whole`; else its folder is there.
    """
    whole, flags = path.with_name(_name(path)), os.O_WRONLY | os.O_CREAT | os.O_EXCL
    if private:
        private_folder(path.parent)
    try:
        name = str(whole)
        descriptor = private_opener(name, flags) if private else os.open(name, flags, 0o666)
        write_and_sync(descriptor, content.encode() if isinstance(content, str) else content)
        with contextlib.suppress(FileExistsError):
            os.link(whole, path)
        sync_folder(path)
    finally:
        whole.unlink(missing_ok=True)


def _name(path: Path) -> str:
    """Of a temporary file: hosts that share the folder may have processes of the same number."""
    return f"{path.name}.{secrets.token_hex(8)}.tmp"


@contextlib.contextmanager
def whole_folder(path: Path, private: bool = False) -> Generator[Path]:
    """Yields a new folder that becomes `path`, which is absent or empty, when the block ends.

    Nothing is left of it where the block raises. A power cut soon after may undo it.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    rmtree(temporary, ignore_errors=True)
    try:
        if private:
            private_folder(temporary)
        temporary.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    finally:
        rmtree(temporary, ignore_errors=True)


def write_and_sync(descriptor: int, content: bytes | memoryview) -> None:
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


def to_json(content: Any, indent: int | None = None) -> str:
    """Strict JSON (RFC 8259), which knows no number that is not finite.

    Such numbers, as the epsilon of a run without privacy, are written as the texts "NaN",
    "Infinity" and "-Infinity", as in the JSON form of Protocol Buffers; `numbers` reads them.
    """
    return json.dumps(_strict(content), indent=indent, allow_nan=False)


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: _strict(each) for key, each in value.items()}
    return [_strict(each) for each in value] if isinstance(value, list | tuple) else value


def numbers(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A flat mapping that `to_json` wrote, with its numbers as they were.

    Args:
        stored: holds no text that a user chose, such as a name, which might be "NaN".
    """
    texts = ("NaN", "Infinity", "-Infinity")
    return {key: float(value) if value in texts else value for key, value in stored.items()}


def write_json(path: Path, content: Mapping[str, Any], private: bool = False) -> None:
    """Writes indented, strict JSON as of `write_whole`."""
    write_whole(path, to_json(content, indent=2) + "\n", private)


def read_json(path: Path) -> dict[str, Any]:
    """Reads what `write_json` wrote.

    Raises:
        ConfigError: the file is damaged or cannot be read.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"'{path}' cannot be read ({type(error).__name__}): restore it, or choose a new run "
            "folder"
        ) from None
