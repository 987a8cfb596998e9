"""Ray would end a process that collects a reference while it shuts down; ours goes on.

It would also keep what an actor that died had asked the cluster for.
"""

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


def ended(program: str, joined: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **joined},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(("leave", "code"), [("ray.shutdown", 1), ("leave_cluster", 0)])
def test_what_tune_leaves_behind_does_not_end_the_process(joined, leave, code):
    done = ended(PROGRAM.replace("{leave}", leave), joined)
    assert done.returncode == code, done.stderr
    assert ("went on" in done.stdout) == (code == 0)


ORPHANS = """
import time
from sweep.driver.cluster import join_cluster, leave_cluster
from sweep.driver.machines import free_orphans
join_cluster()
import ray
from ray.util.placement_group import placement_group, placement_group_table

def asked():
    group = placement_group([{"trial_driver": 0.5}])
    assert group.wait(60)
    return group

@ray.remote(num_cpus=0)
class Supervisor:
    def ask(self):
        self.group = asked()
        return self.group

own, alive, dead = asked(), Supervisor.remote(), Supervisor.remote()
groups = [own, *ray.get([each.ask.remote() for each in (alive, dead)])]

def states():
    return [placement_group_table(group)["state"] for group in groups]

print(*states())
free_orphans()
print(*states())
ray.kill(dead)
deadline = time.monotonic() + 60
while states()[-1] != "REMOVED" and time.monotonic() < deadline:
    free_orphans()
    time.sleep(0.2)
print(*states())
leave_cluster()
"""


def test_what_a_supervisor_that_died_had_asked_for_is_given_back(joined):
    done = ended(ORPHANS, joined)
    assert done.returncode == 0, done.stderr
    there = "CREATED CREATED CREATED"
    assert done.stdout.splitlines() == [there, there, "CREATED CREATED REMOVED"]
