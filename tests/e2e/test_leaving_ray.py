"""Ray would end a process that collects a reference while it shuts down; ours goes on."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
# Another thread may meet the core worker when it is down and not yet forgotten.
import gc, sys
from sweep.driver.cluster import join_cluster, leave_cluster
join_cluster()
import ray
from ray._private.worker import global_worker

class Away:
    def __init__(self, real):
        self.real = real
    def __getattr__(self, name):
        return getattr(self.real, name)
    def shutdown_driver(self):
        self.real.shutdown_driver()
        gc.collect()

@ray.remote(num_cpus=0)
class Actor:
    def name(self):
        return "an actor"

cycle = [Actor.remote()]
cycle.append(cycle[0].name.remote())
print(ray.get(cycle[1]))
cycle.append(cycle)
gc.disable()  # Only what is said here collects.
del cycle
global_worker.core_worker = Away(global_worker.core_worker)
{leave}()
print("went on")
"""


@pytest.mark.parametrize(("leave", "code"), [("ray.shutdown", 1), ("leave_cluster", 0)])
def test_what_tune_leaves_behind_does_not_end_the_process(joined, leave, code):
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("{leave}", leave)],
        env={**os.environ, **joined},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == code, ended.stderr
    assert ("went on" in ended.stdout) == (code == 0)
