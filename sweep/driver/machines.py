"""Machines of a cluster: what is billed, what its autoscaler does, how long trials wait for it."""

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from core.errors import ConfigError
from core.io.terminal import counted
from sweep.config.sweep import SweepConfig
from sweep.costs.usage import WAITING, Machines
from sweep.driver.cluster import DRIVER_RESOURCE
from sweep.driver.room import check_room, node_resources, worker_needs

_LAUNCH_TIMEOUT_S = 60.0
"""Seconds that the autoscaler of a cluster without room may launch nothing; then the sweep ends."""
_INTERVAL = 10.0
"""Seconds between two looks at what the autoscaler does."""


_FAILED = re.compile(r"Failed to launch \d+ nodes of type [^:]+: (.+)")
_LOG_BYTES = 2**18


@dataclass(frozen=True)
class Launches:
    """What a cluster's autoscaler does.

    Attributes:
        nodes: that are there.
        asked: for and not there yet.
        starting: of these, machines that exist, and are billed.
        failure: why the newest launch that failed did; empty if none has.
        failed: when, in seconds since the epoch.
    """

    nodes: int = 0
    asked: int = 0
    starting: int = 0
    failure: str = ""
    failed: float = 0.0


def launches() -> Launches | None:
    """What the autoscaler does now; None where the cluster does not say at the moment."""
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status

    try:
        status = get_cluster_status(ray.get_runtime_context().gcs_address)
    except Exception:  # Busy, or gone: then whoever waits for it is told.
        return None
    starting = len(status.pending_nodes)
    asked = starting + sum(each.count for each in status.pending_launches)
    nodes = len(status.active_nodes) + len(status.idle_nodes)
    failed = max(status.failed_launches, key=lambda each: each.failed_ts_s or 0, default=None)
    if failed is None:
        return Launches(nodes, asked, starting)
    why = " ".join((_logged_failure() or failed.details or "for no known reason").split())[:500]
    return Launches(nodes, asked, starting, why, failed.failed_ts_s or 0)


def _logged_failure() -> str:
    """What the cloud said last, which Ray 2.60 writes into the head's log and not into its status.

    Empty where this machine is not the head, or the cloud said nothing.
    """
    from ray._private import worker

    node: Any = worker._global_node
    path = Path(node.get_logs_dir_path()) / "monitor.log"
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _LOG_BYTES))
            found = _FAILED.findall(file.read().decode(errors="replace"))
    except OSError:
        return ""
    return found[-1] if found else ""


def billed() -> Machines | None:
    """What the cluster is billed for now; None where it does not say."""
    import ray

    there = launches()
    return None if there is None else count_machines(ray.nodes(), there.starting)


def count_machines(nodes: Sequence[Mapping[str, Any]], starting: int) -> Machines:
    """What these nodes, as of `ray.nodes()`, and so many that start are billed for.

    One that starts counts as the largest of the workers that are there, at least with one GPU.
    """
    offers = [node["Resources"] for node in nodes if node["Alive"]]
    workers = [offer.get("GPU", 0.0) for offer in offers if DRIVER_RESOURCE not in offer]
    passing = sum(workers) + starting * max([1.0, *workers])
    own = sum(offer.get("GPU", 0.0) for offer in offers if DRIVER_RESOURCE in offer)
    return Machines(passing + own, passing, sum(not offer.get("GPU") for offer in offers))


def grows() -> bool:
    """Whether an autoscaler manages the cluster: whatever has one names the kinds of its nodes."""
    import ray

    return any(
        node["Alive"] and DRIVER_RESOURCE in node["Resources"] and _kind(node)
        for node in ray.nodes()
    )


def _kind(node: Mapping[str, Any]) -> str:
    return (node.get("Labels") or {}).get("ray.io/node-group", "")


def other_sweeps() -> list[str]:
    """The commands of other sweeps that this cluster runs."""
    import ray
    from ray._private.state import jobs

    own = ray.get_runtime_context().get_job_id()
    alive = [job for job in jobs() if not job["IsDead"] and job["JobID"] != own]
    return [job["Entrypoint"] for job in alive if "sweep/run.py" in job["Entrypoint"]]


def free_orphans() -> None:
    """Gives back what supervisors that died had asked this sweep's cluster for.

    Ray keeps it until the driver ends, and the trial that begins again may wait for just that.
    """
    import ray
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData as Group  # type: ignore
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    job = bytes.fromhex(ray.get_runtime_context().get_job_id())
    for text in state._connect_and_get_accessor().get_placement_group_table():
        group = Group.FromString(text)
        alone = group.creator_actor_dead and group.creator_actor_id.strip(b"\xff")
        if group.creator_job_id == job and alone and group.state != Group.REMOVED:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))


class Patience:
    """Tells why trials wait for workers, and ends the search when all have for `max_wait`.

    An observer of the trials.

    Args:
        note: shows a line.
        look: what the autoscaler does now.
        free: gives back what trials that died had asked for.

    Attributes:
        reason: why the search must end, and what helps; empty while it need not.
    """

    def __init__(
        self,
        sweep: SweepConfig,
        note: Callable[[str], None],
        look: Callable[[], Launches | None] = launches,
        free: Callable[[], None] = free_orphans,
    ) -> None:
        self.reason = ""
        self._most, self._note, self._look, self._free = sweep.max_wait, note, look, free
        self._waits: dict[str, bool] = {}
        self._began = time.time()
        self._looked = self._some_since = self._all_since = time.monotonic()
        self._there, self._next = Launches(), 1.0

    def started(self, trial: str, point: dict[str, Any]) -> None:
        """A trial begins, or begins again, and waits for its workers."""
        self._waits[trial] = True

    def reported(self, trial: str, report: Mapping[str, Any]) -> None:
        """A trial has its workers, or has lost them."""
        self._waits[trial] = report.get("stage") == WAITING

    def ended(self, trial: str, last: Mapping[str, Any]) -> None:
        """A trial waits no more."""
        self._waits.pop(trial, None)

    def died(self, trial: str) -> None:
        """Nothing: it begins again."""

    def tick(self) -> bool:
        """Looks now and then; whether the search must end."""
        if time.monotonic() - self._looked >= _INTERVAL:
            if waiting := sum(self._waits.values()):
                self._free()
            self.look(waiting, len(self._waits))
        return bool(self.reason)

    def look(self, waiting: int, running: int) -> Launches:
        """Looks now, while `waiting` of `running` trials wait; returns what was seen last."""
        now, before = time.monotonic(), self._there
        self._looked = now
        there = self._look() or before
        if there.failed < self._began:  # For another sweep, or an earlier one.
            there = replace(there, failure="")
        self._there = there
        if not waiting:
            self._some_since, self._next = now, 1.0
        if waiting < running or not running or there.nodes > before.nodes:
            self._all_since = now
        why = f"; one could not be started: {there.failure}" if there.failure else ""
        asked = f"{counted(there.asked, 'machine')} asked for{why}"
        minutes = (now - self._some_since) / 60
        if minutes >= self._next or (why and not before.failure):
            self._next = max(self._next, 2 * minutes)
            self._note(
                f"{waiting} of {counted(running, 'trial')} wait for workers since {minutes:.0f} "
                f"minutes: {asked}"
            )
        if (now - self._all_since) / 60 >= self._most:
            self.reason = (
                f"max_wait={self._most:g}: for so many minutes every trial waited for workers and "
                f"no machine came ({asked}): raise the cloud's quota, choose another machine or "
                "place in the launcher's file, or set a larger max_wait; the same command goes on"
            )
        return there


def wait_for_room(
    sweep: SweepConfig,
    note: Callable[[str], None],
    over: Callable[[], bool] = lambda: False,
    look: Callable[[], Launches | None] = launches,
) -> None:
    """Waits until the cluster holds one trial, as long as its autoscaler is launching nodes.

    Ray does not tell what an autoscaler could add at most, but which nodes it is launching: one
    that launches none for what it is asked has none to offer.

    Args:
        note: shows a line.
        over: whether to wait no longer, as a limit is reached.
        look: what the autoscaler does now.

    Raises:
        ConfigError: there is no room, and none is coming, or not within `max_wait`.
    """
    from ray.autoscaler.sdk import request_resources

    def missing() -> str:
        try:
            check_room(sweep, node_resources())
        except ConfigError as error:
            return str(error)
        return ""

    if not (error := missing()):
        return
    if not os.environ.get("RAY_ADDRESS"):
        raise ConfigError(error)
    if not grows():
        raise ConfigError(f"{error}; no autoscaler is there that would add nodes")
    note("the cluster has no room for a trial yet: asking its autoscaler for nodes")
    workers = sweep.min_workers_per_trial or sweep.workers_per_trial
    request_resources(bundles=[worker_needs(sweep)] * workers)
    patience, hopeful = Patience(sweep, note, look), time.monotonic()
    try:
        while (error := missing()) and not over():
            there = patience.look(1, 1)
            if patience.reason:
                raise ConfigError(f"{error}; {patience.reason}")
            if there.asked or there.failure:
                hopeful = time.monotonic()
            elif time.monotonic() - hopeful > _LAUNCH_TIMEOUT_S:
                raise ConfigError(
                    f"{error}; its autoscaler has launched no node for it in "
                    f"{_LAUNCH_TIMEOUT_S:g} s"
                )
            time.sleep(1.0)
    finally:
        request_resources(bundles=[])
