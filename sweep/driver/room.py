"""Room of a cluster: whether a trial fits, and how many do at a time."""

import math
import os
from collections.abc import Mapping, Sequence

from core.errors import ConfigError
from sweep.config.sweep import SweepConfig
from sweep.driver.cluster import DRIVER_RESOURCE

TRIAL_BYTES = 0.45e9
"""Memory of the head that a trial and its supervisor take, as measured on Ray 2.60."""


def node_resources() -> list[dict[str, float]]:
    """What each node of the cluster offers."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def check_room(sweep: SweepConfig, nodes: Sequence[Mapping[str, float]]) -> None:
    """Refuses a trial that a cluster of these nodes cannot hold.

    Raises:
        ConfigError: it is too small for one trial.
    """
    workers = sweep.min_workers_per_trial or sweep.workers_per_trial
    joined = bool(os.environ.get("RAY_ADDRESS"))
    where = "the cluster at RAY_ADDRESS" if joined else "this machine"
    remedy = "add nodes" if joined else "submit the sweep to a cluster"
    for name, per_worker in worker_needs(sweep).items():
        need, has = workers * per_worker, sum(node.get(name, 0) for node in nodes)
        if need > has:
            key = f"{name.lower()}s_per_worker"
            raise ConfigError(
                f"one trial needs {need:g} {name}s (workers_per_trial={workers} with {key}="
                f"{per_worker:g}), {where} has {has:g}: lower workers_per_trial or {key}, or "
                f"{remedy}"
            )
    if (fit := _room(sweep, nodes)) < workers:
        each = " and ".join(f"{need:g} {name}s" for name, need in worker_needs(sweep).items())
        raise ConfigError(
            f"one trial needs {workers} workers with {each} each, the nodes of {where} hold {fit}: "
            f"lower what a worker needs, or {remedy}"
        )


def _room(sweep: SweepConfig, nodes: Sequence[Mapping[str, float]]) -> int:
    """Workers that fit on the nodes, each on one."""
    needs = worker_needs(sweep).items()
    return sum(int(min(node.get(name, 0) / need for name, need in needs)) for node in nodes)


def most_trials(nodes: Sequence[Mapping[str, float]]) -> int:
    """Trials that the head holds at a time: it has a driver, and memory, for each."""
    return sum(
        int(min(node.get(DRIVER_RESOURCE, 0), node.get("memory", math.inf) / TRIAL_BYTES))
        for node in nodes
    )


def max_concurrent(
    sweep: SweepConfig, nodes: Sequence[Mapping[str, float]], grows: bool = False
) -> int:
    """As many trials as the cluster has room for, at least one.

    Args:
        grows: whether an autoscaler adds workers as trials ask for them: then there is room for as
            many trials as the head holds; those for which it may add no more wait.
    """
    if sweep.max_concurrent_trials is not None:
        return sweep.max_concurrent_trials
    held = most_trials(nodes)
    return max(1, held if grows else min(held, _room(sweep, nodes) // sweep.workers_per_trial))


def worker_needs(sweep: SweepConfig) -> dict[str, float]:
    """Resources of one worker."""
    needs = {"CPU": sweep.cpus_per_worker}
    return {**needs, "GPU": sweep.gpus_per_worker} if sweep.gpus_per_worker else needs


def unused_gpus(sweep: SweepConfig, nodes: Sequence[Mapping[str, float]]) -> str:
    """What to tell of GPUs that nobody asked for; empty if there are none."""
    count = sum(node.get("GPU", 0) for node in nodes)
    if sweep.gpus_per_worker or not count:
        return ""
    return (
        f"trials compute on CPUs, as gpus_per_worker=0: to use the {count:g} GPUs of the nodes, "
        "set it to 1, or to less where workers share a GPU"
    )
