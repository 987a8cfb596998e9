"""Errors that a user can cause, each one clear sentence: value, allowed range, remedy."""

import unicodedata
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """Base of every error whose text is meant for the user; printed without a traceback."""

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(UserError):
    """A configuration key is unknown, missing, of the wrong type or out of range."""


class DataError(UserError):
    """A data set is missing, malformed or differs from what the configuration states."""


class InfeasibleError(UserError):
    """The privacy budget cannot pay for the configuration; nothing was read or spent."""


class LedgerError(UserError):
    """A ledger is missing, edited, truncated, of other terms, or used against its rules."""


class StorageError(UserError):
    """The folder of a run is full, gone or cannot be written: nothing is trained unsaved."""


class NotFiniteError(UserError):
    """Training, drawing or scoring gave a number that is not finite, as it would again: the run has
    failed for good."""


class StoppedError(UserError):
    """A run reached its time limit and left a checkpoint; its argument says where."""

    def __str__(self) -> str:
        return f"runtime.max_seconds is over {self.args[0]}: the same command goes on from there"


def printable(text: str) -> str:
    """One line that every terminal takes: line ends, control characters and undecodable bytes,
    as names of files may hold them, are written as escapes."""
    unsafe = ("Cc", "Cs", "Zl", "Zp")
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) in unsafe else c for c in text)


@contextmanager
def storage_errors(path: Path) -> Generator[None]:
    """Turns what the file system refuses into a user's error that names the folder.

    Raises:
        StorageError: the block raised OSError.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"'{path}' cannot be written ({error.strerror or error}): free space or restore the "
            "storage; the same command goes on from the last checkpoint"
        ) from error
