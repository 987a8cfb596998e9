"""Folder of a sweep on the head's disk, kept at the sweep's address."""

import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from core.errors import UserError
from core.record.folder import STEPS_BEGUN, RunFolder
from sweep.config.sweep import SweepConfig
from sweep.driver.observers import TrialObserver
from sweep.results.claim import newest_launch
from sweep.results.folder_copy import copy_of_sweep, fetch_trial, trials_kept

_OF_A_TRIAL = RunFolder(Path())
_DRIVERS = {path.name for path in (_OF_A_TRIAL.selected, _OF_A_TRIAL.error, _OF_A_TRIAL.traceback)}
"""What of a trial's folder its workers do not write."""
_AT_ONCE = 8
_LAST_S = 60.0


def bring(sweep: SweepConfig) -> None:
    """Fetches what another head has left at the address, and trials that ended without this one.

    Raises:
        StorageError: the store does not answer.
    """
    if sweep.storage_address is None:
        return
    copy = copy_of_sweep(sweep)
    if copy.newest_launch() > (earlier := newest_launch(sweep.folder)):
        if earlier:
            _forget_counts(sweep)
        copy.fetch(sweep.folder, patience=0)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        missing = [
            trial
            for trial in trials_kept(sweep)
            if RunFolder(sweep.folder / "trials" / trial).result() is None
        ]
        list(pool.map(partial(fetch_trial, sweep), missing))


def _forget_counts(sweep: SweepConfig) -> None:
    """Removes how many steps of open trials began here: another head may have begun more since.

    Privacy: where the count is missing, the ledger counts all steps.
    """
    ledger = Path(sweep.trial_config({}).runtime.ledger)
    for trial in (sweep.folder / "trials").glob("*/"):
        for own in RunFolder(trial).charged.glob(f"*{STEPS_BEGUN}"):
            (ledger / own.name).unlink(missing_ok=True)
            own.unlink()


@contextmanager
def kept(sweep: SweepConfig, launch: int) -> Iterator[list[TrialObserver]]:
    """Keeps the sweep's folder: before anything is charged, as trials end, and at the end.

    Yields:
        Who must be told of the trials; nobody without an address.

    Raises:
        StorageError: the store does not answer at the beginning.
    """
    if sweep.storage_address is None:
        yield []
        return
    observer = _Keeping(sweep, launch)
    observer.keep(0)
    try:
        yield [observer]
    finally:
        try:
            observer.keep(_LAST_S)
        except UserError as error:
            print(f"warning: {error}", file=sys.stderr)


def _is_of_others(name: PurePosixPath) -> bool:
    """Whether Ray keeps a file for itself, or a trial's workers keep it."""
    top, *rest = name.parts
    return top == "ray" or (top == "trials" and len(rest) > 1 and rest[1] not in _DRIVERS)


class _Keeping(TrialObserver):
    def __init__(self, sweep: SweepConfig, launch: int) -> None:
        self._folder, self._copy = sweep.folder, copy_of_sweep(sweep, launch)
        self._copy.begin()

    def keep(self, patience: float) -> None:
        self._copy.keep(self._folder, _is_of_others, patience)

    def ended(self, trial: str, last: Mapping[str, Any]) -> None:
        """A trial has ended; a store that is away gets it with the next, or at the end."""
        try:
            self.keep(0)
        except UserError:
            return
