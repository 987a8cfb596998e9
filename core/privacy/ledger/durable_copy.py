"""Durable copy of a folder's ledgers: line n of a ledger is an object that is never written again.

The folder's file `durable_copy` names the place, so that whoever opens a ledger there knows it.
An object is made by a conditional create (RFC 9110, section 13.1.2: `If-None-Match: *`): of two
machines that want to make line n, however they came by the lines before, one is refused.

The object is made first, the line of the file after it. A process killed, or left without an
answer, at any point leaves one of these states; whoever locks the ledger next first looks what
the copy holds beyond the file.

- Neither object nor line: nothing happened, and nothing ran on it.
- The object alone: the line is taken over from there. It counts in full, though nothing ran on it
  yet, and the same question finds it and adds no other.
- Object and half a line: the half is dropped as without a copy, which makes it the state before.
- Both, with a head or notes that lag behind: as without a copy.
- An object under way that the store makes after that look: it is one of two writers of the line.

A line alone is of a time before the folder had a copy, or the copy lost it: it is copied, once
the notes agree with the ledger. In the other order a refused line would stand in the file already.

Privacy: the copy holds what the ledgers hold, and its place must be as private as theirs.
"""
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from core.errors import LedgerError

PLACE = "durable_copy"
"""File in a folder of ledgers with the address of their copy."""
_CONNECT_S, _ANSWER_S, _TRIES = 5.0, 10.0, 3
"""Seconds to wait for the store, each time, and how often: less than a minute together."""


@dataclass(frozen=True)
class DurableCopy:
    """Copies of ledgers in S3, or in a store that speaks its protocol.

    Every call raises `LedgerError` where the store does not answer or refuses.

    Args:
        address: `s3://BUCKET/FOLDER`, as `runtime.ledger_copy` allows.
    """

    address: str

    @classmethod
    def of(cls, folder: Path) -> "DurableCopy | None":
        """The copy that the ledgers of a folder have; None where they have none."""
        try:
            return cls((folder / PLACE).read_text().strip())  # Also where an editor wrote it.
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise LedgerError(
                f"'{folder / PLACE}' cannot be read ({error.strerror}): it says where the copy of "
                "the ledgers is, so let this user read it"
            ) from None

    def of_ledger(self, name: str) -> str:
        """The address of the copy of one ledger, named by the stem of its file."""
        return f"{self.address}/{name}"

    def line(self, name: str, number: int) -> bytes:
        """One line, which is there."""
        with self._answered() as client:
            found = client.get_object(Bucket=self._bucket, Key=self._key(name, number))
            return found["Body"].read()

    def count(self, name: str, known: int) -> int:
        """How many lines it holds of a ledger, of which `known` are in the file.

        Raises:
            LedgerError: one before the last is missing.
        """
        first = max(known - 1, 0)
        numbers = self._numbers(name, first)
        if first and not numbers:
            first, numbers = 0, self._numbers(name, 0)
        if numbers != [*range(first, first + len(numbers))]:
            raise LedgerError(
                f"the copy '{self.of_ledger(name)}' of a ledger lacks a line: restore what was "
                "deleted there, as nothing else may tell what was spent"
            )
        return first + len(numbers)

    def create(self, name: str, number: int, line: bytes) -> bool:
        """Makes a line.

        Returns:
            Whether the copy holds it now; another one stays as it is.
        """
        if self._created(self._key(name, number), line):
            return True
        return self.line(name, number) == line  # As where the answer to a first try got lost.

    def names(self) -> set[str]:
        """Of all ledgers that have a copy here."""
        prefix = self._key("")
        with self._answered() as client:
            pages = client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=prefix, Delimiter="/"
            )
            found = [each["Prefix"] for page in pages for each in page.get("CommonPrefixes", [])]
        return {each.removeprefix(prefix).rstrip("/") for each in found}

    def require_conditions(self) -> None:
        """Tries whether the store refuses to make an object twice.

        Raises:
            LedgerError: it made it twice, so it would let two machines write one line.
        """
        key = self._key("conditional")
        self._created(key, b"")  # Unless an earlier try did.
        if self._created(key, b""):
            raise LedgerError(
                f"the store of '{self.address}' does not refuse to make an object twice "
                "(If-None-Match), so it cannot hold the copy of a ledger: choose another one"
            )

    def _created(self, key: str, content: bytes) -> bool:
        with self._answered() as client:
            try:
                client.put_object(Bucket=self._bucket, Key=key, Body=content, IfNoneMatch="*")
            except client.exceptions.ClientError as error:
                # 409: another one is being made at this moment.
                if error.response["ResponseMetadata"]["HTTPStatusCode"] in (409, 412):
                    return False
                raise
        return True

    def _numbers(self, name: str, first: int) -> list[int]:
        prefix = self._key(name) + "/"
        before = {"StartAfter": self._key(name, first - 1)} if first else {}
        with self._answered() as client:
            pages = client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=prefix, **before
            )
            keys = [each["Key"] for page in pages for each in page.get("Contents", [])]
        ends = (key.removeprefix(prefix) for key in keys)
        return sorted(int(end) for end in ends if end.isdecimal())

    @property
    def _bucket(self) -> str:
        return self.address.removeprefix("s3://").partition("/")[0]

    def _key(self, name: str, number: int | None = None) -> str:
        """In the order of the numbers, by which the store lists."""
        folder = self.address.removeprefix("s3://").partition("/")[2]
        key = f"{folder}/{name}" if folder else name
        return key if number is None else f"{key}/{number:08}"

    @contextmanager
    def _answered(self) -> Generator[Any]:
        """Gives the client; what it raises is told without what it holds, such as keys."""
        try:
            import boto3
            from botocore.exceptions import BotoCoreError, ClientError
        except ImportError:
            raise LedgerError(
                "runtime.ledger_copy needs boto3: install this package with its extra 's3'"
            ) from None
        try:
            yield _client(boto3.Session)
        except (BotoCoreError, ClientError, ValueError) as error:  # ValueError: no such endpoint.
            response: Any = getattr(error, "response", None)
            reason = response["Error"]["Code"] if response else type(error).__name__
            raise LedgerError(
                f"the copy of the ledger in '{self.address}' cannot be reached or written "
                f"({reason}): see to the bucket, and to AWS_ENDPOINT_URL and the credentials here; "
                "nothing was begun without it, and the same command goes on"
            ) from None


@cache
def _client(session: Callable[[], Any]) -> Any:
    from botocore.config import Config

    bounds = Config(
        connect_timeout=_CONNECT_S,
        read_timeout=_ANSWER_S,
        retries={"total_max_attempts": _TRIES, "mode": "standard"},
    )
    return session().client("s3", config=bounds)
