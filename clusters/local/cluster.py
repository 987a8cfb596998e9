"""Rehearsal of a cloud: a command on an autoscaling cluster of this machine.

`python clusters/local/cluster.py -- python sweep/run.py --config ... max_concurrent_trials=2`
starts a head that holds the trials, adds worker "nodes" (each a few processes) as trials need
them, removes them when idle, and prints when their number changed. Everything that it started has
ended when it ends.
"""

import argparse
import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Ray reads these when it is imported. The token is this cluster's alone and is written nowhere.
os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))

import ray  # noqa: F401  # Before psutil, which comes with it.
import yaml
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from ray.util.state import list_nodes

from clusters.local.ports import free_ports

import psutil  # isort: skip

_ROOT = Path(__file__).resolve().parents[2]
_CONFIG = Path(__file__).with_name("autoscaling.yaml")
_UP_SECONDS = 90
_IDLE_SECONDS = 120
_END_SECONDS = 20


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        The command's exit code; 1 if it is 0 but workers stayed although idle.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", nargs="+", help="what to run, after `--`")
    command = parser.parse_args(arguments).command
    with _head() as (dashboard, environment):
        timeline = Timeline(dashboard)
        try:
            code = subprocess.call(command, env=environment)
            print(f"{timeline.now} the command has ended with exit code {code}", flush=True)
            left = timeline.wait_for_none(_IDLE_SECONDS)
        finally:
            timeline.stop()
    if left:
        print(
            f"error: {left} idle workers stayed for {_IDLE_SECONDS} s: see idle_timeout_minutes in "
            f"{_CONFIG.name}",
            file=sys.stderr,
        )
    return code or int(left > 0)


class Timeline:
    """Prints the number of worker nodes whenever it changes.

    Args:
        dashboard: address of the cluster's dashboard, which knows its nodes.
    """

    def __init__(self, dashboard: str) -> None:
        self._dashboard = dashboard
        self._began = time.monotonic()
        self._count = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @property
    def now(self) -> str:
        """Seconds since the head was up, for the start of a line."""
        return f"[{time.monotonic() - self._began:6.1f} s]"

    def wait_for_none(self, seconds: float) -> int:
        """Waits until no worker is left, at most `seconds`; returns how many are."""
        deadline = time.monotonic() + seconds
        while self._count and time.monotonic() < deadline:
            time.sleep(0.5)
        return self._count

    def stop(self) -> None:
        """Ends the printing."""
        self._stopping.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopping.wait(1.0):
            try:
                nodes: list[Any] = list_nodes(address=self._dashboard, timeout=5)
            except Exception:  # Busy for a moment; a number that stays unknown fails the caller.
                continue
            count = sum(node.state == "ALIVE" and not node.is_head_node for node in nodes)
            if count != self._count:
                print(f"{self.now} workers: {self._count} -> {count}", flush=True)
                self._count = count


@contextlib.contextmanager
def _head() -> Iterator[tuple[str, dict[str, str]]]:
    """A head node; yields its dashboard's address and the environment of its clients."""
    folder = Path(tempfile.mkdtemp(prefix="feta-ray-"))  # Short: it holds sockets.
    gcs, dashboard, agent, client = free_ports(4)
    address = f"127.0.0.1:{gcs}"
    config = yaml.safe_load(_CONFIG.read_text())
    head = config["available_node_types"][config["head_node_type"]]["resources"]
    config["provider"] |= {"gcs_address": address, "folder": str(folder)}
    (folder / "autoscaling.yaml").write_text(yaml.safe_dump(config))
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    environment = os.environ | {"PATH": path, "RAY_USAGE_STATS_ENABLED": "0"}
    log = (folder / "head.log").open("w")
    process = subprocess.Popen(
        [
            *("ray", "start", "--head", "--block"),
            *(f"--port={gcs}", f"--dashboard-port={dashboard}", f"--temp-dir={folder}"),
            *(f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"),
            *("--num-cpus=0", "--resources", f'{{"trial_driver": {head["trial_driver"]}}}'),
            f"--autoscaling-config={folder / 'autoscaling.yaml'}",
        ],
        cwd=_ROOT,
        env=environment
        | {
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
            "RAY_NODE_TYPE_NAME": config["head_node_type"],
        },
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    log.close()
    try:
        url = f"http://127.0.0.1:{dashboard}"
        _wait_until_up(process, url)
        environment |= {"RAY_ADDRESS": address, "RAY_API_SERVER_ADDRESS": url}
        yield url, environment
    finally:
        died = process.poll()
        _end(process)
        if died is None:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            raise SystemExit(
                f"error: Ray's head ended by itself (exit code {died}): see {folder}/head.log and "
                "session_latest/logs beside it, then remove the folder"
            )


def _wait_until_up(process: subprocess.Popen, dashboard: str) -> None:
    deadline = time.monotonic() + _UP_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if list_nodes(address=dashboard, timeout=5):
                return
        except Exception:  # Not up yet.
            time.sleep(0.5)
    raise SystemExit(
        f"error: Ray's head was not up within {_UP_SECONDS} s (exit code {process.poll()}): look "
        "whether `ray start --head` works on this machine"
    )


def _end(process: subprocess.Popen) -> None:
    """Ends the head and all that came of it, by process id: other clusters may run here."""
    begun = _begun(process.pid)
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_END_SECONDS)
    for one in begun:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.terminate()
    for one in psutil.wait_procs(begun, timeout=10)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    if process.poll() is None:
        process.kill()
        process.wait()


def _begun(head: int) -> list[psutil.Process]:
    """What the head began, jobs included, or left behind, if it has ended by itself."""
    begun = [one for one in psutil.process_iter() if one.pid != head and _session(one.pid) == head]
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(head).children(recursive=True)
        begun += [one for one in children if one not in begun]  # Jobs have sessions of their own.
    return begun


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:  # It has ended.
        return 0


if __name__ == "__main__":
    sys.exit(main())
