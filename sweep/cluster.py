"""Starts or joins a Ray cluster."""

import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.errors import ConfigError
from sweep.config import SweepConfig

DRIVER_RESOURCE = "trial_driver"
"""Trials hold this and no CPU: a trial that held CPUs could keep its own workers from starting."""
_LOCAL_DRIVERS = 64

# Ray reads these when it is imported.
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def check_storage(storage_path: str) -> None:
    """Refuses results in the folder into which Ray unpacked a submitted job's files.

    Raises:
        ConfigError: `storage_path` lies there; Ray deletes the folder with the job.
    """
    submitted = "working_dir" in os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "")
    if submitted and Path(storage_path).is_relative_to(Path.cwd()):
        raise ConfigError(
            f"storage_path='{storage_path}' lies in the copy that Ray made of the submitted "
            "folder, and would be deleted with it: name a folder that all nodes see, such as "
            "storage_path=/mnt/shared/runs"
        )


def join_cluster() -> None:
    """Joins the cluster of RAY_ADDRESS (set for submitted jobs), or starts a local one.

    Raises:
        ConfigError: the cluster does not offer the resource that trials hold.
    """
    import ray

    warnings.filterwarnings("ignore", module="ray")
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # The table tells of failed trials.
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    shared: dict[str, Any] = {
        "runtime_env": {"env_vars": {"PYTHONPATH": path}},
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": True,
    }
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**shared)
        if not ray.cluster_resources().get(DRIVER_RESOURCE):
            raise ConfigError(
                f"the cluster at RAY_ADDRESS offers no '{DRIVER_RESOURCE}' resource, which trials "
                f"hold: start its head with --resources '{{\"{DRIVER_RESOURCE}\": 64}}'"
            )
    else:
        ray.init(address="local", resources={DRIVER_RESOURCE: _LOCAL_DRIVERS}, **shared)


def check_room(sweep: SweepConfig, resources: Mapping[str, float]) -> None:
    """Refuses a trial that this machine could never hold, rather than wait for ever.

    A cluster that was joined may yet grow: its autoscaler adds nodes for what waits.

    Raises:
        ConfigError: the machine is too small for one trial.
    """
    if os.environ.get("RAY_ADDRESS"):
        return
    needs = {
        "CPU": sweep.workers_per_trial * sweep.cpus_per_worker,
        "GPU": sweep.workers_per_trial * sweep.gpus_per_worker,
    }
    for name, need in needs.items():
        if need > (has := resources.get(name, 0)):
            key = f"{name.lower()}s_per_worker"
            raise ConfigError(
                f"one trial needs {need:g} {name}s (workers_per_trial={sweep.workers_per_trial} "
                f"with {key}={need / sweep.workers_per_trial:g}), this machine has {has:g}: "
                f"lower workers_per_trial or {key}, or submit the sweep to a cluster"
            )


def max_concurrent(sweep: SweepConfig, resources: Mapping[str, float]) -> int:
    """As many trials as the cluster has room for, at least one."""
    if sweep.max_concurrent_trials is not None:
        return sweep.max_concurrent_trials
    rooms = [resources.get("CPU", 0) / (sweep.workers_per_trial * sweep.cpus_per_worker)]
    if sweep.gpus_per_worker:
        rooms.append(resources.get("GPU", 0) / (sweep.workers_per_trial * sweep.gpus_per_worker))
    rooms.append(resources.get(DRIVER_RESOURCE, 1))
    return max(1, int(min(rooms)))
