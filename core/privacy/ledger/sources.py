"""Sources of data that a folder of ledgers knows, with the fingerprint that each had."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from core.errors import LedgerError
from core.io.files import write_whole
from core.io.locks import locked
from core.privacy.ledger.names import charged_to, ledger_path
from core.privacy.ledger.notes import noted_in

_LOCK_TIMEOUT_S = 60.0
_KINDS = ("jsonl", "head", "lock")
"""Endings of a ledger's files."""


@dataclass(frozen=True)
class Source:
    """What a source held when a run opened it last.

    Attributes:
        fingerprint: of the content.
        path: folder or file; None for data that comes with a package.
        family: public name of the data sets that it is charged with.
        charged: whether any private run was charged for it.
    """

    fingerprint: str
    path: str | None = None
    family: str | None = None
    charged: bool = True


@dataclass(frozen=True)
class Sources:
    """The file `sources.json` of a folder of ledgers, readable by its owner alone."""

    folder: Path

    @property
    def _path(self) -> Path:
        return self.folder / "sources.json"

    def read(self) -> dict[str, Source]:
        """Every source by the digest of its settings.

        Raises:
            LedgerError: the file is damaged.
        """
        try:
            content: dict[str, Any] = json.loads(self._path.read_text())
            return {key: _source(value) for key, value in content.items()}
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, AttributeError):
            raise LedgerError(
                f"'{self._path}' is not as it was written: restore it from a copy, as it tells "
                "which data sets have a ledger"
            ) from None

    def remember(self, key: str, source: Source) -> None:
        """Keeps what a source held; what was ever charged stays so, with the family it was with."""
        if self._after(key, source) == self.read():
            return
        with locked(self.folder / "sources.lock", _LOCK_TIMEOUT_S):
            content = {k: asdict(v) for k, v in self._after(key, source).items()}
            write_whole(self._path, json.dumps(content, indent=1).encode(), private=True)

    def _after(self, key: str, source: Source) -> dict[str, Source]:
        sources = self.read()
        before = sources.get(key)
        if before and before.charged and before.fingerprint == source.fingerprint:
            family = source.family if source.charged else before.family
            source = replace(source, charged=True, family=family)
        return sources | {key: source}

    @property
    def ledgers(self) -> set[Path]:
        """Those to which anything was charged."""
        charged = [source for source in self.read().values() if source.charged]
        accounts = {charged_to(source.fingerprint, source.family) for source in charged}
        return {ledger_path(self.folder, account) for account in accounts}

    def shared_paths(self) -> list[str]:
        """Paths that were read as several data sets, each with a ledger of its own."""
        accounts: dict[str, set[str]] = {}
        for source in self.read().values():
            if source.path is not None and source.charged:
                account = source.family or source.fingerprint
                accounts.setdefault(source.path, set()).add(account)
        return sorted(path for path, found in accounts.items() if len(found) > 1)


def known_ledgers(folder: Path) -> list[Path]:
    """All that were begun in a folder, also those that are lost, as far as anything tells of them
    there or beside the master secret.
    """
    beside = {each for kind in _KINDS for each in folder.glob(f"{'?' * 16}.{kind}")}
    names = {path.stem for path in beside}
    contents = [path.read_bytes() for path in beside if path.suffix == ".jsonl"]
    for name, last in noted_in(folder).items():
        if not any(last.encode() in content for content in contents):  # Else it was renamed.
            names.add(name)
    return sorted({folder / f"{name}.jsonl" for name in names} | Sources(folder).ledgers)


def _source(value: str | Mapping[str, Any]) -> Source:
    # Older versions noted the digest alone, also where nothing was charged: it proves no ledger;
    # a lock, head or note of one does.
    return Source(value, charged=False) if isinstance(value, str) else Source(**value)
