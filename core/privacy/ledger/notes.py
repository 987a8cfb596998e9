"""Notes of a ledger's last line, kept where they are not lost with it.

A ledger's own head finds a file that was cut. A folder that is gone, or an older copy with its
head, is found by notes: one beside the master secret, one in the folder of each run. A note is
written after its line has reached the disk, so it may lag behind the ledger, never run ahead.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from core.io.files import write_whole
from core.privacy.keys import secret_path

_LOG = logging.getLogger("core")


def beside_secret(path: Path) -> Path:
    """Where the owner's note of the ledger at `path` lies."""
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    return secret_path().parent / "ledgers" / f"{place}.json"


def noted_in(folder: Path) -> dict[str, str]:
    """Ledgers in a folder of which notes beside the master secret tell: name and last hash."""
    noted: dict[str, str] = {}
    for place in beside_secret(folder).parent.glob("*.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            note = json.loads(place.read_bytes())
            if (path := Path(note["ledger"])).parent == folder.resolve():
                noted[path.stem] = str(note["hash"])
    return noted


def write_notes(path: Path, places: Sequence[Path], entries: Sequence[dict[str, Any]]) -> None:
    """Notes the last line beside the master secret and at `places`; the lock must be held.

    The secret may lie in a folder that only its owner elsewhere can write, as on Kubernetes; then
    the run's log says that nothing is noted there.

    Raises:
        OSError: one of `places` cannot be written.
    """
    losses = {entry["hash"] for entry in entries if entry["kind"] == "loss"}
    for place in (*places, beside_secret(path)):  # Also losses whose own lines were lost since.
        losses |= _known_losses(place)
    note = {name: entries[-1][name] for name in ("sequence", "hash", "time")}
    note |= {"ledger": str(path.resolve()), "losses": sorted(losses)}
    content = json.dumps(note).encode()
    for place in places:
        write_whole(place, content, private=True)
    _keep_beside_secret(path, lambda: content)


def copy_note(path: Path, place: Path) -> None:
    """Keeps what a run's note knows beside the master secret too, as far as that can be written."""
    _keep_beside_secret(path, place.read_bytes)


def _keep_beside_secret(path: Path, content: Callable[[], bytes]) -> None:
    own = beside_secret(path)
    try:
        write_whole(own, content(), private=True)
    except OSError as error:
        _LOG.warning("no note of the ledger beside the master secret: %s", error)


def _known_losses(place: Path) -> set[str]:
    """Hashes of the lines of accepted losses that the note at `place` tells of."""
    try:
        return set(json.loads(place.read_bytes())["losses"])
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def contradiction(place: Path, entries: Sequence[dict[str, Any]]) -> str:
    """What the note at `place` knows that the lines of the ledger do not; empty if they agree.

    Only the line of an accepted loss that was unknown when the note was written explains a
    difference: an older copy holds none, whatever the clocks say.
    """
    if not place.exists() or not (content := place.read_bytes()):  # Empty: of an older version.
        return ""
    try:
        note: dict[str, Any] = json.loads(content)
        number, digest, time = int(note["sequence"]), note["hash"], note["time"]
        if 0 <= number < len(entries) and entries[number]["hash"] == digest:
            return ""
        losses = [entry for entry in entries if entry["kind"] == "loss"]
        if "losses" in note:
            explained = any(entry["hash"] not in note["losses"] for entry in losses)
        else:  # Earlier versions noted the time alone.
            explained = any(entry["time"] >= time for entry in losses)
        if explained:
            return ""
    except (ValueError, KeyError, TypeError):
        return f"the note '{place}' of its last line is not as it was written"
    if number < len(entries):
        return f"it is another than '{place}' knows"
    return f"it is shorter than '{place}' knows"  # How long would tell of a selection's trials.
