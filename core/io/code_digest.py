"""Digest of the sources of `core` that decide what a run releases; does not load torch."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from core.errors import ConfigError

_ROOT = Path(__file__).parents[1]
SHOW_ALONE = (
    *("__main__.py", "commands/", "publish/", "generation/generator.py"),
    *("evaluation/membership.py", "evaluation/neighbors.py", "privacy/ledger/card.py"),
    *("io/completion.py", "io/mounts.py", "evaluation/audit.py", "privacy/plan/compare.py"),
    *("record/bundle.py", "pipeline/single.py"),
)
"""Rooms and modules that only fetch, show or publish; every other one decides, a new one too."""


def deciding_sources(root: Path = _ROOT) -> list[Path]:
    """The files whose change makes another run."""
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    return [root / name for name in names if not name.startswith(SHOW_ALONE)]


def digest_of(paths: Iterable[Path], root: Path = _ROOT) -> str:
    """SHA-256 of names and contents; the kind of line ends does not matter."""
    digest = hashlib.sha256()
    for path in paths:
        content = path.read_bytes().replace(b"\r\n", b"\n")
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _digest_now() -> str:
    if Path(__file__) not in (sources := deciding_sources()):
        raise ConfigError(f"the sources of '{_ROOT}' cannot be read: install the project unpacked")
    return digest_of(sources)


_LOADED, _DATA = _digest_now(), digest_of(sorted((_ROOT / "data").glob("*.py")))


def code_digest() -> str:
    """Digest of what this process loaded: files that change while it runs change it no more."""
    return _LOADED


def data_code_digest() -> str:
    """The same of the part that turns files into images."""
    return _DATA
