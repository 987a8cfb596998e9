"""File of a ledger, and its lines: append-only, chained, locked.

Every line holds its number, the time, a kind, the SHA-256 of the line before and its own SHA-256
over canonical JSON, so an edited, deleted, inserted or moved line is found. A head file beside
it names the last line, so a shortened file is found too. Both are fsynced before an append
returns. There is no secret: whoever rewrites the file together with its head is not found out.

A process killed inside an append leaves one of two states, both repaired by the next reader: a
last line without its newline (dropped: its append never returned) or one whole line more than
the head names (kept, the head follows). The lock is made after the file, so a lock alone tells of a
loss, and from the second use on it says that there was a head. All must lie where flock works: a
local disk, or a shared one that passes locks between hosts.
"""

import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from core.errors import LedgerError
from core.io.files import private_opener, sync_folder, write_and_sync, write_whole
from core.privacy.ledger.durable_copy import PLACE, DurableCopy
from core.privacy.ledger.notes import beside_secret, contradiction, copy_note, write_notes
from core.privacy.ledger.terms import require

Entry = dict[str, Any]
_BEFORE_FIRST = "0" * 64
_PATIENCE_S = 900.0
"""Seconds to wait for the lock: as long as many workers that come at once may take."""
_HOLDER = 200
"""Bytes of the lock file that name its last holder."""


class Chain:
    """The verified lines of a ledger while its lock is held.

    Attributes:
        entries: all lines, oldest first.
    """

    def __init__(
        self,
        path: Path,
        entries: list[Entry],
        notes: Sequence[Path] = (),
        copy: DurableCopy | None = None,
    ) -> None:
        self._path, self._notes, self._copy = path, notes, copy
        self.entries = entries
        self._num_copied = 0

    def append(self, kind: str, body: Mapping[str, Any]) -> None:
        """Adds one line; when this returns, its copy is made; line, head and notes are on the disk.

        Args:
            kind: what the line is.
            body: plain JSON data; floats survive exactly.

        Raises:
            LedgerError: the copy cannot be made, or another machine has made it of another line.
            ValueError: `body` holds NaN or infinity; nothing was written.
        """
        entry: Entry = {
            **body,
            "kind": kind,
            "sequence": len(self.entries),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "previous": self.entries[-1]["hash"] if self.entries else _BEFORE_FIRST,
        }
        entry["hash"] = _digest(entry)
        if self._copy and not self._copied(self._copy, entry):
            raise LedgerError(
                f"another machine went on with '{self._copy.of_ledger(self._path.stem)}', the copy "
                f"of the ledger '{self._path}': this line was refused, so nothing was spent or "
                "claimed here; the same command first takes over what was added there"
            )
        self._write(entry)
        write_notes(self._path, self._notes, self.entries)

    def take_over(self) -> None:
        """Writes the lines that the copy holds beyond the file.

        Raises:
            LedgerError: they do not follow, or the copy is of another history.
        """
        if not self._copy:
            return
        name, known = self._path.stem, len(self.entries)
        copied = self._copy.count(name, known)
        last = min(known, copied) - 1  # It proves those before it.
        if last >= 0 and self._copy.line(name, last) != _canonical(self.entries[last]):
            raise _apart(self._path, self._copy)
        for number in range(known, copied):
            line = self._copy.line(name, number)
            try:
                entry = _verified(self._path, line, self.entries)
            except LedgerError:
                raise _apart(self._path, self._copy) from None
            self._write(entry)
        self._num_copied = copied

    def copy_rest(self) -> None:
        """Copies the lines that the copy lacks, after `take_over`."""
        for entry in self.entries[self._num_copied :]:
            if self._copy and not self._copied(self._copy, entry):
                raise _apart(self._path, self._copy)

    def _copied(self, copy: DurableCopy, entry: Entry) -> bool:
        return copy.create(self._path.stem, entry["sequence"], _canonical(entry))

    def _write(self, entry: Entry) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        write_and_sync(private_opener(str(self._path), flags), _canonical(entry) + b"\n")
        sync_folder(self._path)
        _write_head(self._path, entry)
        self.entries.append(entry)


def traces(path: Path) -> list[Path]:
    """What there is of a ledger at `path`, beside it and beside the master secret."""
    beside = (path, _head(path), path.with_suffix(".lock"), beside_secret(path))
    return [place for place in beside if os.path.exists(place)]


@contextmanager
def locked(
    path: Path,
    create: bool = False,
    notes: Sequence[Path] = (),
    copy: DurableCopy | None = None,
) -> Generator[Chain, None, None]:
    """Holds the exclusive lock of the ledger at `path` and gives its verified lines.

    Where there is a copy, lines that it holds beyond the file are taken over first: all of a file
    that is gone with its head.

    Args:
        path: the `.jsonl` file; head and lock lie beside it.
        create: also where there is no ledger yet; its folder is made, the chain is empty.
        notes: files that note its last line, beside that of the master secret.
        copy: that of its folder, if the folder does not name it yet.

    Raises:
        LedgerError: the file is missing though it is to be there or anything knows of it; it is
            edited, truncated, or shorter or another than noted or copied; or it or its copy cannot
            be read or written.
    """
    copy = copy or DurableCopy.of(path.parent)
    known = [place for place in (beside_secret(path), *notes) if os.path.exists(place)]
    witnesses = [*known, *filter(Path.exists, [path.with_suffix(".lock")])]
    absent = not path.exists() and not _head(path).exists()
    copied = copy is not None and not _head(path).exists() and copy.count(path.stem, 0) > 0
    if absent and (witnesses or not create) and not copied:
        if witnesses and not traces(path):  # So that the loss can be accepted.
            copy_note(path, witnesses[0])
        raise _missing(path, witnesses)
    with _lock(path, create=absent) as descriptor:
        begun = os.fstat(descriptor).st_size > 0
        if begun and not _head(path).exists() and not copied:
            raise _damaged(path, "its head is gone") if path.exists() else _missing(path, known)
        chain = Chain(path, _read_and_repair(path), notes, copy)
        chain.take_over()
        entries = chain.entries
        if not entries and (known or not create):
            raise _missing(path, known)
        for finding in (contradiction(place, entries) for place in known):
            if finding:
                raise _damaged(path, finding)
        chain.copy_rest()
        if entries:
            holder = f"begun; held last by process {os.getpid()} on {socket.gethostname()}"
            os.pwrite(descriptor, f"{holder:<{_HOLDER}}\n".encode(), 0)
        yield chain


def keep_copy(folder: Path, address: str | None, anew: bool = False) -> None:
    """Gives the ledgers of a folder a durable copy, and the folder the ledgers that it holds.

    From then on the folder names it, and nothing is left to do.

    Args:
        address: `s3://BUCKET/FOLDER`; None: what the folder names, if anything.
        anew: also where the folder names it already.

    Raises:
        LedgerError: the folder has another copy, a ledger and its copy differ, or the store does
            not answer or makes an object twice.
    """
    kept = DurableCopy.of(folder)
    copy = DurableCopy(address) if address else kept
    if copy is None or (copy == kept and not anew):
        return
    if kept not in (None, copy):
        raise LedgerError(
            f"runtime.ledger_copy='{address}', but the ledgers in '{folder}' are copied to "
            f"'{kept.address}': name that, or delete '{folder / PLACE}' to have them copied anew"
        )
    copy.require_conditions()
    names = {path.stem for path in folder.glob("*.jsonl")} | copy.names()
    for name in sorted(name for name in names if len(name) == 16):
        with locked(folder / f"{name}.jsonl", create=True, copy=copy):
            pass
    write_whole(folder / PLACE, copy.address, private=True, by_many=True)


@contextmanager
def _lock(path: Path, create: bool) -> Generator[int, None, None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if create:  # Before the lock, which without a ledger then tells that one was lost.
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
        descriptor = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            _wait_for(descriptor, path)
            yield descriptor
        finally:
            os.close(descriptor)
    except OSError as error:
        raise LedgerError(
            f"the ledger '{path}' cannot be used ({error.strerror}): it needs a folder that this "
            "user may write to, with space left"
        ) from None


def _wait_for(descriptor: int, path: Path) -> None:
    """Locks an open file, which the kernel frees when this process dies.

    Raises:
        LedgerError: it was not to be had in minutes; says who has it.
    """
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.02)
                continue
        text = os.pread(descriptor, _HOLDER, 0).decode(errors="replace").strip()
        raise LedgerError(
            f"the ledger '{path}' was locked for {_PATIENCE_S:g} s ({text}): end that process; a "
            "machine that vanished frees its locks within minutes on NFS 4.1, and never on NFS 3"
        )


def accept_loss(path: Path, reason: str, known: bool = False) -> int:
    """Goes on with the lines that still verify, and a new one that says that others were lost.

    A file with other lines, or none, is kept aside. What was spent in lost lines counts no more:
    the new line stays, for every card that is made from the ledger.

    Args:
        known: whether anything else than `traces` tells that there was a ledger.

    Returns:
        How many lines are left.

    Raises:
        LedgerError: no reason is given, or `path` is no name of a ledger of which anything knows.
    """
    reason = " ".join(reason.split())
    require(bool(reason), "--reason", reason, "a sentence, which every privacy card will quote")
    is_name = path.suffix == ".jsonl" and len(path.stem) == 16
    require(is_name, "--file", str(path), "a ledger, such as FOLDER/0123456789abcdef.jsonl")
    exists = known or bool(traces(path))
    require(exists, "--file", str(path), "a ledger that was begun: nothing knows of this one")
    with _lock(path, create=False):
        content = path.read_bytes() if path.exists() else b""
        entries: list[Entry] = []
        for line in content.split(b"\n")[:-1]:
            try:
                entries.append(_verified(path, line, entries))
            except LedgerError:
                break
        whole = b"".join(_canonical(entry) + b"\n" for entry in entries)
        if content != whole:
            write_whole(path.with_suffix(f".lost-{len(content)}"), content, private=True)
            write_whole(path, whole, private=True)
        if entries:
            _write_head(path, entries[-1])
        else:
            _head(path).unlink(missing_ok=True)
        chain = Chain(path, entries, copy=DurableCopy.of(path.parent))
        chain.take_over()
        chain.copy_rest()
        kept = len(entries)
        chain.append("loss", {"reason": reason, "kept": kept})
        return kept


def _read_and_repair(path: Path) -> list[Entry]:
    """All lines; no message says how many, which would tell the number of a selection's trials."""
    content = path.read_bytes() if path.exists() else b""
    known, last_hash = _read_head(path)
    entries, torn = _verified_lines(path, content)
    if len(entries) < known:
        raise _damaged(path, "it is shorter than its head says")
    if len(entries) > known + 1:
        raise _damaged(path, "it is longer than its head says")
    if known and entries[known - 1]["hash"] != last_hash:
        raise _damaged(path, "its last line is not the one that its head names")
    if torn and len(entries) > known:  # A writer moves the head on before it appends again.
        raise _damaged(path, "its last line is incomplete")
    if torn:
        os.truncate(path, len(content) - len(torn))
        write_and_sync(os.open(path, os.O_WRONLY), b"")
    elif len(entries) > known:
        # Whoever wrote it may have died before it was on the disk.
        write_and_sync(os.open(path, os.O_WRONLY), b"")
        _write_head(path, entries[-1])
    return entries


_verified_before: dict[Path, tuple[int, bytes, tuple[Entry, ...]]] = {}
"""Of each ledger the length and digest of what this process verified last, and its lines."""


def _verified_lines(path: Path, content: bytes) -> tuple[list[Entry], bytes]:
    """All whole lines as data, and what follows them.

    What is to the byte what this process has verified before is not parsed again, so that a call
    does not take longer with every trial.
    """
    length, digest, before = _verified_before.get(path, (0, b"", ()))
    if hashlib.sha256(content[:length]).digest() != digest:
        length, before = 0, ()
    entries = [*before]
    *lines, torn = content[length:].split(b"\n")
    for line in lines:
        entries.append(_verified(path, line, entries))
    length = len(content) - len(torn)
    digest = hashlib.sha256(content[:length]).digest()
    _verified_before[path] = (length, digest, tuple(entries))
    return entries, torn


def _verified(path: Path, line: bytes, before: list[Entry]) -> Entry:
    """The line as data, if it is just what `append` would have written after `before`."""
    try:
        entry: Entry = json.loads(line)
        # Canonical form admits no other spacing, order or spelling of numbers.
        if _canonical(entry) == line and entry["hash"] == _digest(entry):
            previous = before[-1]["hash"] if before else _BEFORE_FIRST
            if (entry["sequence"], entry["previous"]) == (len(before), previous):
                return entry
            raise _damaged(path, "a line does not follow the line before it")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise _damaged(path, "a line is not as it was written")


def _read_head(path: Path) -> tuple[int, str]:
    """How many lines the head vouches for, and the hash of the last; (0, "") where none is."""
    if not _head(path).exists():
        return 0, ""
    try:
        content = _head(path).read_bytes()
        head: Entry = json.loads(content)
        if _canonical(head) + b"\n" == content and head["sequence"] >= 0:
            return int(head["sequence"]) + 1, head["hash"]
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise _damaged(path, f"its head '{_head(path).name}' is not as it was written")


def _write_head(path: Path, entry: Entry) -> None:
    head = {"sequence": entry["sequence"], "hash": entry["hash"]}
    write_whole(_head(path), _canonical(head) + b"\n", private=True)


def _head(path: Path) -> Path:
    return path.with_suffix(".head")


def _canonical(value: Entry) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _digest(entry: Entry) -> str:
    content = {key: value for key, value in entry.items() if key != "hash"}
    return hashlib.sha256(_canonical(content)).hexdigest()


def _apart(path: Path, copy: DurableCopy) -> LedgerError:
    return LedgerError(
        f"the ledger '{path}' and its copy '{copy.of_ledger(path.stem)}' hold different lines: "
        f"where the copy is right, move '{path.stem}.*' away and it is restored; else name another "
        f"place for the copy and delete '{path.with_name(PLACE)}'"
    )


_ACCEPT = "or accept the loss: python -m core ledger accept-loss --file '{}' --reason '...'"


def _missing(path: Path, known: Sequence[Path] = ()) -> LedgerError:
    witness = f" ('{known[0]}' knows of it)" if known else ""
    return LedgerError(
        f"no ledger at '{path}'{witness}: it must hold what was spent on this data set so far, so "
        "restore the file and its head, or name the folder in which they are, "
        + _ACCEPT.format(path)
    )


def _damaged(path: Path, finding: str) -> LedgerError:
    return LedgerError(
        f"the ledger '{path}' was edited or truncated: {finding}; nothing more can be spent on "
        "this data set until the file and its head are restored from a copy, "
        + _ACCEPT.format(path)
    )
