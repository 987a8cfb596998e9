"""Usage of a sweep and its limits: device hours, GPU hours, money.

The driver notes what it used in one small file of the sweep's folder, every few seconds, so that
also an interrupted trial, a failed one, and a driver that was killed count after a restart. Device
hours are those of trials that have their workers; money is that of the machines that are there.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core.io.files import read_json, write_json
from sweep.config.prices import price_of
from sweep.config.sweep import SweepConfig

_INTERVAL = 5.0
"""Seconds between two notes; a driver that is killed loses at most as many."""
FILE = "usage.json"
WAITING = "waiting for workers"
"""Stage of a trial whose workers are not there: it holds no device."""


@dataclass(frozen=True)
class Machines:
    """What a cluster is billed for at a moment, whoever uses it.

    Attributes:
        gpus: of machines that are there or start.
        passing: of them those of workers, which are billed for idle minutes once they are done.
        plain: machines without a GPU, such as the head.
    """

    gpus: float = 0.0
    passing: float = 0.0
    plain: float = 0.0


@dataclass(frozen=True)
class Usage:
    """What a sweep has used, over all its drivers.

    Attributes:
        trial_seconds: of all trials while they had their workers.
        device_seconds: the same times the devices that a trial holds: GPUs if it has any, else
            CPU cores.
        gpu_seconds: of the GPUs of all machines that were there, used or not.
        plain_seconds: of the machines without one.
    """

    trial_seconds: float = 0.0
    device_seconds: float = 0.0
    gpu_seconds: float = 0.0
    plain_seconds: float = 0.0

    @property
    def device_hours(self) -> float:
        """Device seconds in hours."""
        return self.device_seconds / 3600

    def cost(self, sweep: SweepConfig) -> float:
        """USD, every machine at the price on demand, as a spot machine may not be had."""
        assert sweep.cloud is not None
        return price_of(sweep.cloud).of(self.gpu_seconds / 3600, self.plain_seconds / 3600)


def read_usage(folder: Path) -> Usage:
    """What a sweep's folder says that it has used; nothing, if it says nothing."""
    path = folder / FILE
    content = read_json(path) if path.exists() else {}
    if "driver_seconds" in content:  # Of a version that counted what trials held, and the head.
        content["gpu_seconds"] = content["device_seconds"]
        content["plain_seconds"] = content.pop("driver_seconds")
    return Usage(**content)


def devices_per_trial(sweep: SweepConfig) -> float:
    """GPUs of a trial, or its CPU cores if it has none."""
    return sweep.workers_per_trial * (sweep.gpus_per_worker or sweep.cpus_per_worker)


def device_name(sweep: SweepConfig) -> str:
    """What a device is."""
    return "GPU" if sweep.gpus_per_worker else "CPU core"


def reached(sweep: SweepConfig, usage: Usage) -> str:
    """The limit that is reached, what was used and how to go on; empty if none is.

    Args:
        usage: with what will be billed after a stop.
    """
    checks = (
        ("max_hours", sweep.max_hours, usage.device_hours, "device hours"),
        ("max_gpu_hours", sweep.max_gpu_hours, usage.device_hours, "GPU hours"),
        ("max_cost", sweep.max_cost, usage.cost(sweep) if sweep.max_cost else 0.0, "USD"),
    )
    for key, most, used, unit in checks:
        if most is not None and used >= most:
            return (
                f"{key}={most:g} is reached: {used:.4g} {unit} were used; trials keep their "
                f"checkpoints, and the same command with a larger {key} goes on"
            )
    return ""


class Meter:
    """Counts what the trials of a driver use, on top of what the sweep's folder says.

    Attributes:
        reason: as of `reached`, once a limit was reached while trials ran.
        machines: tells what is billed now; None where that cannot be told at the moment.
    """

    def __init__(self, sweep: SweepConfig) -> None:
        self.reason = ""
        self.machines: Callable[[], Machines | None] = Machines
        self._sweep = sweep
        self._earlier = read_usage(sweep.folder)
        self._noted = self._looked = time.monotonic()
        self._there = Machines()
        self._running: dict[str, float] = {}
        self._ended = self._gpu_seconds = self._plain_seconds = 0.0

    def usage(self) -> Usage:
        """Earlier and now, with the idle minutes that are still to be billed."""
        now = time.monotonic()
        seconds = self._ended + sum(now - began for began in self._running.values())
        since, there = now - self._looked, self._there
        idle = 60 * price_of(self._sweep.cloud).idle if self._sweep.cloud else 0.0
        return Usage(
            self._earlier.trial_seconds + seconds,
            self._earlier.device_seconds + seconds * devices_per_trial(self._sweep),
            self._earlier.gpu_seconds
            + self._gpu_seconds
            + since * there.gpus
            + idle * there.passing,
            self._earlier.plain_seconds + self._plain_seconds + since * there.plain,
        )

    def note(self) -> None:
        """Looks which machines are there, and writes the usage down."""
        now, there = time.monotonic(), self._there
        self._gpu_seconds += (now - self._looked) * there.gpus
        self._plain_seconds += (now - self._looked) * there.plain
        self._noted = self._looked = now
        self._there = self.machines() or there
        write_json(self._sweep.folder / FILE, asdict(self.usage()))

    def tick(self) -> bool:
        """Notes the usage now and then; whether a limit is reached."""
        if time.monotonic() - self._noted >= _INTERVAL:
            self.note()
        self.reason = self.reason or reached(self._sweep, self.usage())
        return bool(self.reason)

    def started(self, trial: str, point: dict[str, Any]) -> None:
        """Nothing: it waits for its workers."""

    def reported(self, trial: str, report: Mapping[str, Any]) -> None:
        """A trial has its workers, or has lost them and waits."""
        if report.get("stage") == WAITING:
            self._stopped(trial)
        elif "failure" not in report:
            self._running.setdefault(trial, time.monotonic())

    def ended(self, trial: str, last: Mapping[str, Any]) -> None:
        """A trial has ended, in whatever way."""
        self._stopped(trial)

    def died(self, trial: str) -> None:
        """Nothing: its devices are held until it begins again, and tells what it has."""

    def _stopped(self, trial: str) -> None:
        if (began := self._running.pop(trial, None)) is not None:
            self._ended += time.monotonic() - began
