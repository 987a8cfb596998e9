"""What a sweep must not leave behind: processes, known by a mark in their environment."""

import os
import time
from pathlib import Path

MARK = "FETA_SWEEP_TEST"
OF_TRIALS = (
    "ray::ImplicitFunc",
    "ray::TrainController",
    "ray::RayTrainWorker",
    "ray::PlacementGroupCleaner",
    "ray::SynchronizationActor",
    "ray::_QueueActor",
    "ray::Keeper",
    "ray::Verdicts",
    "ray::execute",
)
"""How the processes of trials are called, on clusters that outlive their sweeps."""


def marked_processes(mark: str) -> dict[int, str]:
    """Ids and command lines of processes whose environment holds MARK=mark, but for this one."""
    found: dict[int, str] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            marked = f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # Gone, or another user's.
            continue
        if marked and int(folder.name) != os.getpid():
            found[int(folder.name)] = command
    return found


def assert_none_left(mark: str, seconds: float = 60, titles: tuple[str, ...] = ("",)) -> None:
    """What has been told to end may take some seconds for it.

    Args:
        titles: beginnings of the commands that must not be left; all that carry the mark.
    """
    deadline = time.monotonic() + seconds
    while left := [each for each in marked_processes(mark).values() if each.startswith(titles)]:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.5)
