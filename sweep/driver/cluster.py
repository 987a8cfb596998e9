"""Start of a Ray cluster, or the way into one and out of it."""

import gc
import logging
import os
import socket
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.errors import ConfigError
from core.io.mounts import passes_no_locks
from core.privacy.ledger.durable_copy import DurableCopy
from core.privacy.ledger.file import keep_copy
from sweep.config.sweep import SweepConfig
from sweep.results.folder_copy import require_store

DRIVER_RESOURCE = "trial_driver"
"""Trials hold this and no CPU: a trial that held CPUs could keep its own workers from starting."""
_LOCAL_DRIVERS = 64
_ANSWER = 10.0
"""Seconds that the head of a cluster has to answer."""

# Ray reads these when it is imported.
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # A sweep has its own.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def check_places(sweep: SweepConfig) -> None:
    """Refuses folders of results and of the ledger that cannot be written, or would not last.

    Raises:
        ConfigError: names the key and the remedy.
        StorageError: an address as `storage_path` cannot be written.
        LedgerError: `runtime.ledger_copy` cannot be used, or differs from the ledger.
    """
    check_storage(sweep.storage_path)
    if sweep.storage_address is not None:
        require_store(sweep.storage_address)
    runtime = sweep.trial_config({}).runtime
    check_folder("runtime.ledger", runtime.ledger, mode=0o700)
    keep_copy(Path(runtime.ledger), runtime.ledger_copy)
    if copy := DurableCopy.of(Path(runtime.ledger)):
        copy.require_conditions()  # It answers, or every trial would fail.


def check_storage(storage_path: str) -> None:
    """Refuses results where they cannot be written, or would not last.

    Raises:
        ConfigError: `storage_path` is no folder that can be written, or lies where Ray unpacked
            a submitted job's files, which it deletes with the job.
    """
    submitted = "working_dir" in os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "")
    if submitted and Path(storage_path).is_relative_to(Path.cwd()):
        raise ConfigError(
            f"storage_path='{storage_path}' lies in the copy that Ray made of the submitted "
            "folder, and would be deleted with it: name a folder that all nodes see, such as "
            "storage_path=/mnt/shared/runs"
        )
    check_folder("storage_path", storage_path)


def check_folder(key: str, folder: str, mode: int = 0o777) -> None:
    """Refuses a folder that cannot be made or written, or on a cluster passes no locks.

    Raises:
        ConfigError: names its key.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True, mode=mode)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"1")
    except (OSError, ValueError) as error:  # ValueError: a zero byte.
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise ConfigError(
            f"{key}={folder!r} is no folder that can be written ({reason}): name one with room in "
            "it"
        ) from None
    if os.environ.get("RAY_ADDRESS") and (why := passes_no_locks(Path(folder))):
        raise ConfigError(
            f"{key}={folder!r} lies where locks do not hold ({why}), and two machines could spend "
            "the same budget: name a folder on NFS 4.1"
        )


def join_cluster() -> None:
    """Joins the cluster of RAY_ADDRESS (set for submitted jobs), or starts a local one.

    Raises:
        ConfigError: the cluster cannot be joined, or does not offer the resource that trials hold.
    """
    import ray._private.worker

    if ray.is_initialized():
        raise ConfigError(
            "this process uses a Ray cluster already: call ray.shutdown() first, and to have the "
            "sweep join that cluster, set RAY_ADDRESS"
        )

    def leave_submitted_files() -> None:
        # A submitted job's processes begin in Ray's copy of its files. When the agent of another
        # node on this machine unpacks the same files, the folder is a new one of the same name,
        # and whatever asks a process in the old one for its directory fails.
        os.chdir("/")

    warnings.filterwarnings("ignore", module="ray")
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # The table tells of failed trials.
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    # Warnings of the node, which are printed also where log_to_driver is false; Ray is pinned.
    ray._private.worker._worker_logs_enabled = False
    shared: dict[str, Any] = {
        "runtime_env": {
            "env_vars": {"PYTHONPATH": path},
            "worker_process_setup_hook": leave_submitted_files,
        },
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": True,
    }
    address = os.environ.get("RAY_ADDRESS")
    try:
        _join(address, shared) if address else _start(shared)
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"Ray takes no name that is not text in UTF-8, as in {error.object!r}: rename it"
        ) from None


def leave_cluster() -> None:
    """Leaves it, or ends a local one.

    Ray ends this process if any thread collects a reference to a result while it shuts down. So
    those in cycles, of which Tune leaves many, are collected before, and none meanwhile.
    """
    import ray

    gc.collect()
    gc.disable()
    try:
        ray.shutdown()
    finally:
        gc.enable()


def _join(address: str, shared: Mapping[str, Any]) -> None:
    import ray
    from ray.exceptions import AuthenticationError

    _require_answer(address)
    try:
        ray.init(**shared)
    except UnicodeEncodeError:  # A ValueError, too.
        raise
    except (ConnectionError, ValueError, AuthenticationError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ConfigError(
            f"RAY_ADDRESS={address!r} cannot be joined ({reason}): name the head of a running "
            "cluster as host:port, on one of its machines; if it asks for a token, set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH as where it was started"
        ) from error
    if not ray.cluster_resources().get(DRIVER_RESOURCE):
        raise ConfigError(
            f"the cluster at RAY_ADDRESS offers no '{DRIVER_RESOURCE}' resource, which trials "
            f"hold: start its head with --resources '{{\"{DRIVER_RESOURCE}\": 64}}'"
        )


def _start(shared: Mapping[str, Any]) -> None:
    """Without Ray's dashboard: who wants it starts a cluster and joins it; here it would live for
    one sweep."""
    import ray
    from ray.exceptions import AuthenticationError

    # Workers that start with the cluster have no runtime environment, so they would idle.
    settings = {"prestart_worker_first_driver": False}
    local = {"address": "local", "resources": {DRIVER_RESOURCE: _LOCAL_DRIVERS}}
    try:
        ray.init(**local, **shared, include_dashboard=False, _system_config=settings)
    except (OSError, AuthenticationError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"Ray cannot start here ({reason}): set RAY_TMPDIR to a short folder that can be "
            "written, such as /tmp, and HOME to one that can, or RAY_AUTH_TOKEN_PATH to a "
            "file of yours with 64 random hexadecimal digits"
        ) from error


def _require_answer(address: str) -> None:
    """Refuses a head that does not answer, for which Ray would wait minutes.

    Raises:
        ConfigError: nothing listens there.
    """
    host, _, port = address.rpartition(":")
    if "://" not in address and host and port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), _ANSWER).close()
        except (OSError, UnicodeError) as error:
            raise ConfigError(
                f"RAY_ADDRESS={address!r} does not answer ({error}): start the cluster, or name "
                "its head as host:port"
            ) from None
