"""Names of ledger files; messages and printed lines show them, so they are keyed."""

import hashlib
import json
from pathlib import Path

from core.errors import LedgerError
from core.privacy.keys import MasterSecret
from core.privacy.ledger.file import traces


def ledger_path(folder: Path, account: str) -> Path:
    """Where the ledger of a data set, or of a family of them, lies or would lie.

    A ledger is known by its first line, so it is found whatever secret named it; where it is lost,
    by what else bears its name. Ledgers of earlier versions, named by the digest itself, stay.

    Args:
        account: fingerprint of the data set, or digest of the family's name.

    Raises:
        LedgerError: two files of the folder are of this data set.

    Privacy: the digest would confirm a guess of the whole content; its HMAC does not.
    """
    found = [path for path in sorted(folder.glob("?" * 16 + ".jsonl")) if _opens(path, account)]
    if len(found) > 1:
        raise LedgerError(
            f"'{found[0]}' and '{found[1].name}' are ledgers of one data set, so none holds all "
            "that was spent: restore the one ledger that holds both, or move a copy away"
        )
    if found:
        return found[0]
    earlier = folder / f"{account[:16]}.jsonl"
    if traces(earlier):
        return earlier
    return folder / f"{shown_name(account)}.jsonl"


def charged_to(fingerprint: str, family: str | None) -> str:
    """What names the ledger of a data set: its own fingerprint, or the digest of its family's name.

    Privacy: all charges of a family are composed, which bounds what they tell together of a record
        that lies in every one of its data sets.
    """
    return hashlib.sha256(f"family {family}".encode()).hexdigest() if family else fingerprint


def shown_name(account: str) -> str:
    """What a data set is called wherever something is printed; 16 hexadecimal digits."""
    return MasterSecret.load().keyed(account)[:16]


def _opens(path: Path, account: str) -> bool:
    with path.open("rb") as file:
        for line in file:  # An accepted loss of all lines stands before the new beginning.
            try:
                entry = json.loads(line)
                if entry["kind"] != "loss":
                    return entry["fingerprint"] == account
            except (ValueError, KeyError, TypeError):
                return False
    return False
