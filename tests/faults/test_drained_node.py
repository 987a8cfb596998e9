"""A spot machine is taken away with notice: its trial is kept at once, and none has failed."""

import http.server
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch
from lab import ROOT, Lab, Undisturbed, assert_as_undisturbed, ended, wait_for
from ray.util.state import list_actors, list_nodes

from sweep.driver.room import TRIAL_BYTES

# Nothing but the notice leads to a checkpoint before the end, and no failure is allowed.
HEAD = "max_failures: 0"
SETTINGS = ("runtime.checkpoint_every=100000", "runtime.log_every=1")
RATE, STEPS = 1e-4, 150
OF_THE_HEAD = ("ImplicitFunc", "TrainController", "SynchronizationActor", "_QueueActor")


class Metadata(http.server.BaseHTTPRequestHandler):
    """Of an AWS machine that is taken away."""

    def do_PUT(self) -> None:
        self._answer("the token")

    def do_GET(self) -> None:
        known = self.headers["X-aws-ec2-metadata-token"] == "the token"
        is_action = self.path == "/latest/meta-data/spot/instance-action"
        self._answer('{"action": "terminate"}' if known and is_action else "")

    def _answer(self, text: str) -> None:
        self.send_response(200 if text else 404)
        self.end_headers()
        self.wfile.write(text.encode())


def drain(cluster: Lab, node: str) -> None:
    """The cloud's notice, and what a worker does with it."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    where = ["--metadata", f"http://127.0.0.1:{server.server_port}", "--node-id", node]
    command = [sys.executable, "-m", "clusters.notice", *where]
    done = subprocess.run(
        command, cwd=ROOT, env=cluster.environment, capture_output=True, text=True, timeout=120
    )
    server.shutdown()
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def after_the_notice(cluster: Lab):
    """The sweep, what ran on both nodes, memory of the head, the step that was kept, its end."""
    api = {"address": cluster.environment["RAY_API_SERVER_ADDRESS"], "timeout": 30}
    sweep = cluster.sweep("drained", [RATE], HEAD, steps=STEPS)
    driver = sweep.start(*SETTINGS)
    wait_for(lambda: len(sweep.steps(driver)) > 10, "steps of the trial")
    nodes = list_nodes(**api, filters=[("state", "=", "ALIVE")])
    (node,) = (each.node_id for each in nodes if not each.is_head_node)
    there = [("node_id", "=", node), ("state", "=", "ALIVE")]
    actors = {"worker": [each.class_name for each in list_actors(**api, filters=there)]}
    there = [("node_id", "!=", node), ("state", "=", "ALIVE")]
    actors["head"] = [each.class_name for each in list_actors(**api, filters=there)]
    titles = tuple(f"ray::{name}" for name in OF_THE_HEAD)
    own = [psutil.Process(pid).memory_full_info().uss for pid in cluster.processes(titles)]
    drain(cluster, node)
    (trial,) = (path.parent for path in sweep.trials.glob("*/metrics.jsonl"))
    last = trial / "checkpoints" / "last.pt"
    wait_for(last.exists, "checkpoint after the notice", 60)
    kept = torch.load(last)["step"]
    cluster.lose_node()
    time.sleep(5)
    cluster.add_node()
    return sweep, actors, own, kept, ended(driver)


def test_the_trial_goes_on_from_the_notice_on_another_machine(
    after_the_notice, undisturbed: Undisturbed
):
    sweep, *_, kept, (code, told) = after_the_notice
    assert code == 0, told
    assert kept > 0
    assert "the cloud takes a machine of it away: its state is kept" in told
    log = (sweep.config.folder / "sweep.log").read_text()
    assert log.count("waiting for workers") >= 2, "at the start, and after the loss"
    assert_as_undisturbed(sweep, undisturbed)


def test_nothing_but_workers_runs_where_machines_come_and_go(after_the_notice):
    _, actors, *_ = after_the_notice
    assert actors["worker"] == ["RayTrainWorker"]


def test_a_trial_takes_the_part_of_the_head_that_is_reckoned(after_the_notice):
    _, actors, own, *_ = after_the_notice
    # One for all trials, one of Ray's for all sweeps; and the head of this cluster works, too.
    others = {"Keeper", "_AutoscalingCoordinatorActor", "RayTrainWorker"}
    assert sorted(each for each in actors["head"] if each not in others) == sorted(OF_THE_HEAD)
    print(f"\n{sum(own) / 1e6:.0f} MB of the head for a trial")
    assert 0.7 * TRIAL_BYTES <= sum(own) <= TRIAL_BYTES


def test_a_trial_that_has_ended_keeps_no_checkpoint(after_the_notice):
    sweep, *_ = after_the_notice
    assert not list(sweep.trials.glob("*/checkpoints/*"))
