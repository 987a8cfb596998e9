"""Usage of a sweep and its limits: device hours, GPU hours, money.

The driver notes what it used in one small file of the sweep's folder, every few seconds, so that
also an interrupted trial, a failed one, and a driver that was killed count after a restart.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core.io.files import read_json, write_json
from sweep.config.prices import price_of
from sweep.config.sweep import SweepConfig

_INTERVAL = 5.0
"""Seconds between two notes; a driver that is killed loses at most as many."""
FILE = "usage.json"


@dataclass(frozen=True)
class Usage:
    """What a sweep has used, over all its drivers.

    Attributes:
        trial_seconds: of all trials, each from its start, waiting for its workers included.
        device_seconds: the same times the devices that a trial holds: GPUs if it has any, else
            CPU cores.
        driver_seconds: of the search, and so of the machine that holds the trials.
    """

    trial_seconds: float = 0.0
    device_seconds: float = 0.0
    driver_seconds: float = 0.0

    @property
    def device_hours(self) -> float:
        """Device seconds in hours."""
        return self.device_seconds / 3600

    def cost(self, sweep: SweepConfig) -> float:
        """USD, every GPU at the price on demand, as a spot machine may not be had."""
        assert sweep.cloud is not None
        return price_of(sweep.cloud).of(self.device_hours, self.driver_seconds / 3600)


def read_usage(folder: Path) -> Usage:
    """What a sweep's folder says that it has used; nothing, if it says nothing."""
    path = folder / FILE
    return Usage(**read_json(path)) if path.exists() else Usage()


def devices_per_trial(sweep: SweepConfig) -> float:
    """GPUs of a trial, or its CPU cores if it has none."""
    return sweep.workers_per_trial * (sweep.gpus_per_worker or sweep.cpus_per_worker)


def device_name(sweep: SweepConfig) -> str:
    """What a device is."""
    return "GPU" if sweep.gpus_per_worker else "CPU core"


def reached(sweep: SweepConfig, usage: Usage) -> str:
    """The limit that is reached, what was used and how to go on; empty if none is."""
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
    """

    def __init__(self, sweep: SweepConfig) -> None:
        self.reason = ""
        self._sweep = sweep
        self._earlier = read_usage(sweep.folder)
        self._began = self._noted = time.monotonic()
        self._running: dict[str, float] = {}
        self._ended = 0.0

    def usage(self) -> Usage:
        """Earlier and now."""
        now = time.monotonic()
        seconds = self._ended + sum(now - began for began in self._running.values())
        return Usage(
            self._earlier.trial_seconds + seconds,
            self._earlier.device_seconds + seconds * devices_per_trial(self._sweep),
            self._earlier.driver_seconds + now - self._began,
        )

    def note(self) -> None:
        """Writes the usage down."""
        self._noted = time.monotonic()
        write_json(self._sweep.folder / FILE, asdict(self.usage()))

    def tick(self) -> bool:
        """Notes the usage now and then; whether a limit is reached."""
        if time.monotonic() - self._noted >= _INTERVAL:
            self.note()
        self.reason = self.reason or reached(self._sweep, self.usage())
        return bool(self.reason)

    def started(self, trial: str, point: dict[str, Any]) -> None:
        """A trial begins, or begins again after its process died, which counts from its begin."""
        self._running.setdefault(trial, time.monotonic())

    def reported(self, trial: str, report: Mapping[str, Any]) -> None:
        """Nothing: use is counted by time."""

    def ended(self, trial: str, last: Mapping[str, Any]) -> None:
        """A trial has ended, in whatever way."""
        if (began := self._running.pop(trial, None)) is not None:
            self._ended += time.monotonic() - began

    def died(self, trial: str) -> None:
        """Nothing: its devices are held until it begins again."""
