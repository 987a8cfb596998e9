"""Copy of a folder at an address of a store, such as S3: what outlasts the machine that writes it.

Every writer has a session, a folder of its own below the address. A file there lies under a number
that is used once. A manifest, written after them, names the files that make up the folder, with
their digests. Only then do files go that it does not name, and the manifest before it. Sessions and
manifests sort by their names, and the last that is whole counts.

- A writer killed at any point leaves the state before or the state after, never parts of both.
- One that was given up, and writes late, changes nothing that is read; it stops when it sees that a
  later session was begun.

Privacy: the copy holds what the folder holds, so the store must be as private.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from core.errors import ConfigError, StorageError, printable
from core.io.files import write_whole
from core.record.folder import RunFolder
from sweep.config.sweep import SweepConfig

Value = TypeVar("Value")
LeftOut = Callable[[PurePosixPath], bool]
_MANIFEST = ".manifest"
_NOT_KEPT = (".lock", ".tmp")
_KEEP_S, _FETCH_S = 600.0, 60.0
"""Seconds in which a store that is away is asked again: less than workers wait for each other."""
_PAUSE_S = 5.0
_CONNECT_S, _ANSWER_S = 5, 30
_BLOCK = 2**23


def _nothing(_: PurePosixPath) -> bool:
    return False


@dataclass(frozen=True)
class _Stored:
    """A file of the folder: the number under which it lies in the session, and what it was."""

    number: int
    size: int
    mtime: int
    sha256: str


class FolderCopy:
    """The copy of one folder.

    Every call raises `StorageError` where the store does not answer or refuses.

    Args:
        address: of the folder, below that of the storage folder.
        launch: token of the driver on whose behalf it is written.
    """

    def __init__(self, address: str, launch: int = 0) -> None:
        self.address, self._launch = address, launch
        self.session = ""
        self._files: dict[str, _Stored] = {}
        self._written: set[str] = set()
        self._number = 0

    def begin(self) -> str:
        """Begins a session, later than all that are there; returns its name.

        Raises:
            ConfigError: a newer driver has begun one.
        """

        def begin(store: Any, root: str) -> str:
            last = (["", *_folders(store, root)])[-1]
            self.session = f"{self._launch:012}-{int(last[13:] or 0) + 1:06}"
            self._require_last(last)
            store.create_dir(f"{root}/{self.session}")
            return self.session

        return self._answered(begin, _FETCH_S)

    def newest_launch(self) -> int:
        """Token of the driver that wrote last; 0 where nobody has."""
        sessions = self._answered(_folders, 0)
        return int(sessions[-1][:12]) if sessions else 0

    def fetch(self, folder: Path, left_out: LeftOut = _nothing, patience: float = _FETCH_S) -> bool:
        """Makes the folder's files those of the copy; what else lies there stays.

        Args:
            left_out: whether a file, by its name in the folder, does not belong to it.
            patience: seconds in which a store that is away is asked again.

        Returns:
            Whether there is a copy.
        """

        def fetch(store: Any, root: str) -> bool:
            sessions = _folders(store, root)
            for session in reversed(sessions):
                place = f"{root}/{session}"
                if (files := _manifest(store, place)) is None:
                    continue
                # As they were written: whoever looks meanwhile sees an earlier state.
                for name, stored in sorted(files.items(), key=lambda each: each[1].mtime):
                    if not left_out(PurePosixPath(name)):
                        _receive(store, place, folder, name, stored)
                return True
            if sessions != _folders(store, root):
                raise OSError("it is being written")
            return False

        return self._answered(fetch, patience)

    def keep(self, folder: Path, left_out: LeftOut = _nothing, patience: float = _KEEP_S) -> None:
        """Makes the copy what the folder is; when this returns, it outlasts this machine.

        Args:
            left_out: as of `fetch`; asked of folders, too.
            patience: as of `fetch`.

        Raises:
            ConfigError: a later session was begun, so this one counts no more.
        """

        def keep(store: Any, root: str) -> None:
            sessions = _folders(store, root)
            self._require_last(*sessions[-1:])
            self._send_all(store, f"{root}/{self.session}", folder, left_out)
            for session in sessions:
                if session < self.session:
                    store.delete_dir(f"{root}/{session}")

        self._answered(keep, patience)

    def _send_all(self, store: Any, place: str, folder: Path, left_out: LeftOut) -> None:
        self._number += 1
        names = _files_of(folder, left_out)
        files = {name: self._sent(store, place, folder / name, name) for name in names}
        manifest = f"{self._number:06}{_MANIFEST}"
        self._written.add(manifest)
        with store.open_output_stream(f"{place}/{manifest}") as stream:
            stream.write(json.dumps({name: asdict(each) for name, each in files.items()}).encode())
        self._files = files
        for key in self._written - {manifest, *(_key(name, each) for name, each in files.items())}:
            with suppress(FileNotFoundError):  # A first try may not have come so far.
                store.delete_file(f"{place}/{key}")
            self._written.discard(key)

    def _sent(self, store: Any, place: str, path: Path, name: str) -> _Stored:
        """Sends a file, unless this session has it as it is."""
        state, known = path.stat(), self._files.get(name)
        if known and (known.size, known.mtime) == (state.st_size, state.st_mtime_ns):
            return known
        key = _key(name, _Stored(self._number, 0, 0, ""))
        self._written.add(key)
        size, digest = 0, hashlib.sha256()
        with path.open("rb") as file, store.open_output_stream(f"{place}/{key}") as stream:
            while block := file.read(_BLOCK):
                stream.write(block)
                digest.update(block)
                size += len(block)
        return _Stored(self._number, size, state.st_mtime_ns, digest.hexdigest())

    def _require_last(self, last: str = "") -> None:
        if last > self.session:
            raise ConfigError(
                f"'{self.address}' was taken over (session {last}) by a newer driver or worker: "
                "this one stops; what it kept goes on there"
            )

    def _answered(self, act: Callable[[Any, str], Value], patience: float) -> Value:
        deadline = time.monotonic() + patience
        while True:
            try:
                return act(*_file_system(self.address))
            except (OSError, ValueError) as error:  # ValueError: Arrow's, and of a torn manifest.
                if time.monotonic() >= deadline:
                    raise StorageError(
                        f"'{self.address}' cannot be reached, read or written ({_reason(error)}): "
                        "see to the bucket, and to its address and the credentials on this "
                        "machine; what was kept there stays, and the same command goes on from it"
                    ) from None
            time.sleep(_PAUSE_S)


def copy_of_sweep(sweep: SweepConfig, launch: int = 0) -> FolderCopy:
    """The copy of what the driver alone writes into the sweep's folder."""
    return FolderCopy(f"{sweep.storage_address}/{sweep.name}/sweep", launch)


def copy_of_trial(sweep: SweepConfig, trial: str, launch: int = 0) -> FolderCopy:
    """The copy of a trial's folder."""
    return FolderCopy(f"{_trials(sweep)}/{trial}", launch)


def fetch_trial(sweep: SweepConfig, trial: str, patience: float = _FETCH_S) -> None:
    """Brings what tables, reports and MLflow read of a trial: all but its checkpoints."""
    folder = RunFolder(sweep.folder / "trials" / trial)
    left_out = folder.checkpoints.name
    copy_of_trial(sweep, trial).fetch(folder.path, lambda name: name.parts[0] == left_out, patience)


def trials_kept(sweep: SweepConfig) -> list[str]:
    """Trials that have a copy."""
    return FolderCopy(_trials(sweep))._answered(_folders, 0)


def forget_trials(sweep: SweepConfig) -> None:
    """Removes the copies of all trials."""
    if trials_kept(sweep):
        FolderCopy(_trials(sweep))._answered(lambda store, root: store.delete_dir(root), _FETCH_S)


def require_store(address: str) -> None:
    """Writes and removes a small file there.

    Raises:
        StorageError: that cannot be done; without a second try.
    """

    def act(store: Any, root: str) -> None:
        key = f"{root}/written-{os.urandom(8).hex()}"
        with store.open_output_stream(key) as stream:
            stream.write(b"1")
        store.delete_file(key)

    FolderCopy(address)._answered(act, 0)


def _trials(sweep: SweepConfig) -> str:
    return f"{sweep.storage_address}/{sweep.name}/trials"


def _files_of(folder: Path, left_out: LeftOut) -> Iterator[str]:
    for place, folders, files in os.walk(folder):
        here = PurePosixPath(os.path.relpath(place, folder))
        folders[:] = [name for name in folders if not left_out(here / name)]
        for name in files:
            if not name.endswith(_NOT_KEPT) and not left_out(here / name):
                yield str(here / name)


def _key(name: str, stored: _Stored) -> str:
    return f"{stored.number:06}/{name}"


def _folders(store: Any, place: str) -> list[str]:
    """Names of the folders at a place, sorted; none where there is nothing."""
    return [each.base_name for each in _listed(store, place) if not each.is_file]


def _listed(store: Any, place: str) -> list[Any]:
    from pyarrow.fs import FileSelector

    found = store.get_file_info(FileSelector(place, allow_not_found=True))
    return sorted(found, key=lambda each: each.base_name)


def _manifest(store: Any, place: str) -> dict[str, _Stored] | None:
    """What the last whole manifest of a session names; None where there is none."""
    for each in reversed(_listed(store, place)):
        if each.is_file and each.base_name.endswith(_MANIFEST):
            with suppress(FileNotFoundError, ValueError):  # Replaced meanwhile; or torn.
                content = json.loads(_read(store, each.path))
                return {name: _Stored(**entry) for name, entry in content.items()}
    return None


def _read(store: Any, key: str) -> bytes:
    with store.open_input_stream(key) as stream:
        return stream.read()


def _receive(store: Any, place: str, folder: Path, name: str, stored: _Stored) -> None:
    """Fetches a file, unless the folder has it as it was sent."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise OSError(f"{name} lies outside of the folder")
    if path.exists():
        state = path.stat()
        if (state.st_size, state.st_mtime_ns) == (stored.size, stored.mtime):
            return
    content = _read(store, f"{place}/{_key(name, stored)}")
    if hashlib.sha256(content).hexdigest() != stored.sha256:
        raise OSError(f"{name} is not as it was written")
    write_whole(path, content, private=True)
    os.utime(path, ns=(stored.mtime, stored.mtime))  # By which trials sort.


@cache
def _file_system(address: str) -> tuple[Any, str]:
    """The store, and the address within it."""
    from pyarrow import fs

    kind, _, place = address.partition("://")
    if kind != "s3":
        return fs.FileSystem.from_uri(address)
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if not region and not endpoint:
        region = fs.resolve_s3_region(place.partition("/")[0])
    store = fs.S3FileSystem(
        region=region,
        endpoint_override=endpoint,
        connect_timeout=_CONNECT_S,
        request_timeout=_ANSWER_S,
        allow_delayed_open=True,  # One call for a small file.
    )
    return store, place


def _reason(error: Exception) -> str:
    """What the store said, in a few words."""
    found = re.search(r"AWS Error (\w+)", str(error))
    return found[1] if found else printable(str(error).strip())[:200]
