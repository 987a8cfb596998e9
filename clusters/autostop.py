"""End of an idle cluster: its head ends itself.

`python -m clusters.autostop --minutes 60` runs on the head, beside Ray. When for so long no job ran
and no worker was there, it runs `--end`. A Ray that does not answer counts as idle, as such a head
costs money for nothing. A sweep that was running goes on when it is submitted again.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.job_submission import JobStatus, JobSubmissionClient
from ray.util.state import list_nodes

_END = f"bash {Path(__file__).with_name('end_head.sh')}"
_ADDRESS = os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")


def main(arguments: list[str] | None = None) -> int:
    """Waits until the cluster is idle; returns the exit code of what ends it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, required=True, help="idle time before the end")
    parser.add_argument("--end", default=_END, help="what ends the cluster")
    options = parser.parse_args(arguments)
    wait_until_idle(is_busy, 60 * options.minutes)
    print(f"nothing ran for {options.minutes:g} minutes: {options.end}", flush=True)
    return subprocess.call(shlex.split(options.end))


def wait_until_idle(
    busy: Callable[[], bool],
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Returns when nothing was busy for `seconds` without a break."""
    idle_since = clock()
    while clock() - idle_since < seconds:
        sleep(min(30.0, seconds / 4))
        if busy():
            idle_since = clock()


def is_busy() -> bool:
    """Whether a job is running or waits, or a worker is there."""
    try:
        jobs = JobSubmissionClient(_ADDRESS).list_jobs()
        nodes: list[Any] = list_nodes(address=_ADDRESS, timeout=20)
    except Exception as error:  # As idle as a head without Ray.
        print(f"Ray does not answer: {error}", flush=True)
        return False
    return any(job.status in (JobStatus.PENDING, JobStatus.RUNNING) for job in jobs) or any(
        node.state == "ALIVE" and not node.is_head_node for node in nodes
    )


if __name__ == "__main__":
    sys.exit(main())
