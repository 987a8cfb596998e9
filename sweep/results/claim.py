"""Claim of a sweep's folder: one configuration, one release, one driver at a time."""

import secrets
import shutil
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from core.errors import ConfigError
from core.io.files import read_json, write_json, write_whole
from core.io.locks import locked
from core.privacy.ledger.account import RELEASE_ID
from core.record.folder import RunFolder
from sweep.config.sweep import SweepConfig, dump_sweep, flat
from sweep.results.driver import LOCK
from sweep.results.find import JOURNAL, SWEEP_FILE

_LAUNCH = "launch"
_FREE = (
    *("fixed.", "num_trials", "max_concurrent_trials", "cpus_per_worker", "storage_path"),
    "experiment",
    *("min_workers_per_trial", "max_failures", "max_preemptions", "max_same_error", "max_wait"),
    *("max_hours", "max_gpu_hours", "max_cost", "cloud", "published"),
)
"""What may change when a sweep is continued; what is fixed stands in the base run too."""
_LEDGER = "base.runtime.ledger"
"""What may not, although it changes no result: another ledger would know nothing of the sweep."""


@contextmanager
def driver_lock(folder: Path) -> Generator[int]:
    """Keeps a second driver out; yields the token of this launch, larger than all before.

    The token goes into the ledger with every trial, where workers of an older launch are refused.

    Raises:
        ConfigError: another driver runs this sweep.
    """
    with locked(folder / LOCK):
        # By the clock, so that it also grows over a folder that was deleted and begun anew.
        token = max(newest_launch(folder) + 1, int(time.time()))
        write_whole(folder / _LAUNCH, str(token))
        yield token


def newest_launch(folder: Path) -> int:
    """Token of the driver that started last; 0 before the first."""
    path = folder / _LAUNCH
    return int(path.read_text()) if path.exists() else 0


def require_newest_launch(folder: Path, token: int) -> None:
    """Stops what an older driver has left running.

    Raises:
        ConfigError: another driver has started since that of `token`.
    """
    if (newest := newest_launch(folder)) > token:
        raise ConfigError(
            f"a newer driver (launch {newest}) runs sweep '{folder.name}': this worker of launch "
            f"{token} stops; its trial goes on from its checkpoint there"
        )


def claim(sweep: SweepConfig) -> bool:
    """Writes the resolved sweep, or compares it with the one this name began with.

    What was refused before any trial was charged makes room for another sweep of the name.

    Returns:
        Whether it did.

    Raises:
        ConfigError: another sweep of this name was begun in the folder.
    """
    path, now = sweep.folder / SWEEP_FILE, dump_sweep(sweep)
    if not path.exists():
        sweep.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, now)
        return False
    old, new = flat(read_json(path)), flat(now)
    changed = [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in sorted(old | new)
        if old.get(key) != new.get(key)
        and (key == _LEDGER or not key.startswith((*_FREE, "base.runtime.")))
    ]
    folders = (sweep.folder / "trials").glob("*/")
    if changed and any(RunFolder(folder).is_charged for folder in folders):
        raise ConfigError(
            f"'{sweep.folder}' holds another sweep named '{sweep.name}' ({'; '.join(changed)}): "
            "choose another name=..., or restore what it was started with"
        )
    if changed:
        shutil.rmtree(sweep.folder / "trials", ignore_errors=True)
        (sweep.folder / JOURNAL).unlink(missing_ok=True)
    write_json(path, now)
    return bool(changed)


def release_id(sweep: SweepConfig) -> str:
    """Random and kept: a sweep begun anew draws another secret number and other settings.

    The ledger tells by it that a selection begun anew is another release.
    """
    path = sweep.folder / "charged" / RELEASE_ID
    if not path.exists():
        write_whole(path, secrets.token_hex(16))
    return path.read_text()
