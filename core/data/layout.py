"""Entries of a data set's folder: hidden ones, splits, and the order of the rest."""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from core.errors import DataError

FOLDER = "folder"
"""Among suffixes: what is no file."""
_SYSTEM = (
    "__macosx",
    "@eadir",
    "$recycle.bin",
    "desktop.ini",
    "lost+found",
    "system volume information",
    "thumbs.db",
)
"""Left by operating systems and archivers, in small letters."""
_SPLIT = re.compile(
    "(?:(?P<train>train(?:ing)?)|(?P<test>test(?:ing)?|eval(?:uation)?)"
    r"|(?P<validation>val(?:id(?:ation)?)?|dev))(?:[-_ ]?(?:set|split|data|images?|\d+))*",
    re.IGNORECASE,
)


def is_hidden(name: str) -> bool:
    """Whether an entry is no part of the data: `.name`, `__MACOSX`, `Thumbs.db` and their kin."""
    return name.startswith(".") or name.lower() in _SYSTEM


def split_named(name: str) -> str | None:
    """`train`, `test` or `validation` if that is what the name of a folder says, in any case."""
    match = _SPLIT.fullmatch(name)
    return match and match.lastgroup


def plain(name: str) -> str:
    """The name in NFC: file systems store the same accents in two ways."""
    return unicodedata.normalize("NFC", name)


def listing(folder: Path) -> tuple[list[Path], list[Path]]:
    """Folders and files that are not hidden, numbers by their value before other names in NFC.

    Raises:
        DataError: two names differ only in how their accents are stored.
    """
    found: dict[str, os.DirEntry[str]] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                continue
            if (name := plain(entry.name)) in found:
                raise DataError(
                    f"'{folder}' holds '{name}' twice, its accents stored in two ways (NFC, NFD): "
                    "remove one"
                )
            found[name] = entry
    ordered = [found[name] for name in sorted(found, key=_place)]
    return (
        [folder / entry.name for entry in ordered if entry.is_dir()],
        [folder / entry.name for entry in ordered if not entry.is_dir()],
    )


def _place(name: str) -> tuple[bool, int, str]:
    is_number = name.isascii() and name.isdecimal()
    return not is_number, int(name) if is_number else 0, name


def suffixes(files: Iterable[Path]) -> Counter[str]:
    """How many files there are of each suffix."""
    return Counter(path.suffix.lower() or "none" for path in files)


def in_words(unread: Counter[str]) -> str:
    """Such as `3 files of suffix .avif, .txt and 1 folder`; nothing of nothing."""
    files = sorted(unread.keys() - {FOLDER})
    counts = {"file": unread.total() - unread[FOLDER], "folder": unread[FOLDER]}
    parts = [f"{n} {word}{'s' * (n > 1)}" for word, n in counts.items() if n]
    if files:
        parts[0] += f" of suffix {', '.join(files)}"
    return " and ".join(parts)
