"""What a sweep must not leave behind: processes, known by a mark in their environment."""

import os
import time
from pathlib import Path

MARK = "FETA_SWEEP_TEST"


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


def assert_none_left(mark: str, seconds: float = 60) -> None:
    """What has been told to end may take some seconds for it."""
    deadline = time.monotonic() + seconds
    while left := marked_processes(mark):
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.5)
