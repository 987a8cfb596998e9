"""Driver process of a sweep: whether it runs, and how to stop it."""

import fcntl
import json
import os
import signal
import socket
from dataclasses import dataclass
from pathlib import Path

from core.errors import ConfigError

LOCK = "driver.lock"


@dataclass(frozen=True)
class Driver:
    """What a running driver wrote about itself into the lock that it holds."""

    host: str
    pid: int


def running_driver(folder: Path) -> Driver | None:
    """The driver that holds the lock of a sweep's folder.

    The file outlives its driver; only the lock, which the system frees with the process, tells.

    Raises:
        ConfigError: the lock is held, but its content is not what a driver writes.
    """
    path = folder / LOCK
    if not path.exists():
        return None
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            try:
                content = json.load(file)
                return Driver(str(content["host"]), int(content["pid"]))
            except (ValueError, KeyError, TypeError):
                raise ConfigError(
                    f"'{path}' is held, but does not say by whom: wait a moment, or stop the "
                    "driver where it was started with Ctrl-C"
                ) from None
    return None


def stop_driver(folder: Path) -> Driver:
    """Asks the driver to stop as Ctrl-C would: trials keep their checkpoints.

    Raises:
        ConfigError: no driver runs, or it runs on another machine or as another user.
    """
    driver = running_driver(folder)
    if driver is None:
        raise ConfigError(f"sweep '{folder.name}' is not running: nothing to stop")
    if driver.host != socket.gethostname():
        raise ConfigError(
            f"sweep '{folder.name}' runs on host '{driver.host}', this is "
            f"'{socket.gethostname()}': run there `kill -INT {driver.pid}`"
        )
    try:
        os.kill(driver.pid, signal.SIGINT)
    except PermissionError:
        raise ConfigError(
            f"process {driver.pid} of sweep '{folder.name}' belongs to another user: ask them, "
            f"or run `sudo kill -INT {driver.pid}`"
        ) from None
    return driver
