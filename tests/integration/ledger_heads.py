"""Program of heads that share a durable copy of their ledger: `ledger_heads.py ACT FOLDER ...`."""

import os
import signal
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from test_ledger_processes import ACTS, STEP, TERMS, begin, die_before_call, in_child, key

from core.errors import LedgerError
from core.privacy.ledger import durable_copy
from core.privacy.ledger.durable_copy import DurableCopy
from core.privacy.ledger.file import Chain, keep_copy
from core.privacy.ledger.ledger import Ledger


def reserve_when_told(folder: Path, trial: str) -> None:
    """Looks what the copy holds, says so, and waits before it makes its own line."""
    original = Chain.append

    def append(self: Chain, kind: str, body: dict[str, Any]) -> None:
        print("ready", flush=True)
        sys.stdin.readline()
        original(self, kind, body)

    Chain.append = append  # type: ignore[method-assign]
    try:
        Ledger.open(folder, TERMS, known=True).reserve(key(trial), [STEP])
    except LedgerError as error:
        sys.exit(f"error: {error}")


def reserve_until_admitted(folder: Path, name: str, number: str) -> None:
    for index in range(int(number)):
        while True:
            try:
                Ledger.open(folder, TERMS).reserve(key(f"{name}{index}"), [STEP])
                break
            except LedgerError as error:
                if "another machine went on" not in str(error):
                    raise


def die(folder: Path, address: str, act: str) -> None:
    """Kills `act` before each call to the store or the disk, and with its answer on the way."""
    for number in count():
        place = folder / f"{number:03}"

        def doomed(place: Path = place, number: int = number) -> None:
            durable_copy._client.cache_clear()  # Else it shares its parent's connection.
            original = DurableCopy.create
            ledger = Ledger.open(place, TERMS, known=True)

            def create(*arguments: Any) -> bool:
                if number == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                created = original(*arguments)
                die_before_call(number - 2)
                if number == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                return created

            DurableCopy.create = create  # type: ignore[method-assign]
            ACTS[act](ledger)

        keep_copy(place, f"{address}/{number:03}")
        begin(place)
        if os.waitpid(in_child(doomed), 0)[1] != signal.SIGKILL:
            return


if __name__ == "__main__":
    act, folder, *more = sys.argv[1:]
    acts: dict[str, Callable[..., None]] = {
        each.__name__: each for each in (reserve_when_told, reserve_until_admitted, die)
    }
    acts[act](Path(folder), *more)
