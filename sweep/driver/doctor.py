"""`--doctor`: whether a sweep could run here; one line for each check, with its remedy."""

import platform
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from core.config import nested
from core.errors import ConfigError, UserError
from core.io.locks import is_free, locked
from core.io.terminal import counted
from sweep.config.address import on_this_machine
from sweep.config.sweep import SweepConfig
from sweep.driver.cluster import check_places, join_cluster, leave_cluster
from sweep.driver.machines import grows, wait_for_room
from sweep.driver.room import TRIAL_BYTES, max_concurrent, most_trials, node_resources
from sweep.results.folder_copy import require_store

_PACKAGES = ("ray", "torch", "opacus", "dp-accounting")
_LOCK = ".lock"
_SECONDS = 300
"""After which a node counts as not answering."""


@dataclass(frozen=True)
class Check:
    """What was looked at, and what is wrong with it and what helps; empty if nothing is."""

    name: str
    problem: str = ""


def print_checks(sweep: SweepConfig) -> bool:
    """Prints all checks as they are made; True if nothing is wrong.

    Privacy: reads the data on every node to compare its digest, which is not printed.
    """
    fine = True
    for check in checks(sweep):
        fine = fine and not check.problem
        print(f"{'FAIL' if check.problem else 'ok':<5} {check.name}", end="", flush=True)
        print(f": {check.problem}" if check.problem else "", flush=True)
    return fine


def checks(sweep: SweepConfig) -> Iterator[Check]:
    """Makes the checks in order; ends early where the rest would mean nothing."""
    storage = Path(sweep.storage_path)
    yield _check("results can be stored", lambda: check_places(sweep))
    yield _check("MLflow answers", lambda: _open_tracking(sweep, storage))
    joined = _check("cluster reachable", join_cluster)
    yield joined
    if joined.problem:
        return
    try:
        yield _check("room for one trial", lambda: wait_for_room(sweep, lambda _: None))
        yield _head_check(sweep)
        yield from _checks_of_nodes(sweep, storage)
        if sweep.gpus_per_worker:
            yield _gpu_check(sweep)
    finally:
        leave_cluster()


def _head_check(sweep: SweepConfig) -> Check:
    nodes = node_resources()
    held, wanted = most_trials(nodes), max_concurrent(sweep, nodes, grows())
    each = f"a trial_driver and {TRIAL_BYTES / 1e9:g} GB for each"
    remedy = f"lower max_concurrent_trials, or give the head {each}"
    return Check(
        f"the head holds {counted(held, 'trial')} at a time, this sweep runs {wanted}",
        remedy if wanted > held else "",
    )


def _checks_of_nodes(sweep: SweepConfig, storage: Path) -> Iterator[Check]:
    """Asks the nodes, who see a file that the driver has written, or not; or write to a store."""
    if sweep.storage_address is not None:
        yield from _node_checks(sweep, sweep.storage_address)
        return
    mark = storage / f".doctor-{uuid.uuid4().hex}"
    try:
        with ExitStack() as stack:
            with suppress(OSError):  # Every node says so.
                mark.write_text(mark.name)
                stack.enter_context(locked(mark.with_suffix(_LOCK)))
            yield from _node_checks(sweep, mark)
    finally:
        for path in storage.glob(f"{mark.name}*"):
            path.unlink()


def _check(name: str, act: Callable[[], object]) -> Check:
    fine, text = _tried(act)
    return Check(name, "" if fine else text)


def _tried(act: Callable[[], object]) -> tuple[bool, str]:
    """Whether it succeeds, and what it gives or, in one line, why not."""
    try:
        return True, str(act())
    except (UserError, OSError) as error:
        return False, str(error)
    except Exception as error:  # A check that fails is what this command is for.
        return False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _open_tracking(sweep: SweepConfig, storage: Path) -> None:
    from sweep.tracking.client import open_experiment, tracking_uri

    create = not sweep.run.privacy.covers.is_secret
    open_experiment(tracking_uri(storage), sweep.experiment, storage, create)


def _node_checks(sweep: SweepConfig, mark: Path | str) -> Iterator[Check]:
    """Asks every node the same questions and compares the answers with the driver's."""
    import ray

    settings = nested(sweep.trial_config({}))
    here = examine(settings, str(mark))
    answers: dict[str, dict[str, Any]] = {}
    for node in (node for node in ray.nodes() if node["Alive"]):
        name = node["NodeManagerAddress"]
        try:
            answers[name] = _asked(node, examine, settings, str(mark), True)
        except Exception as error:
            yield Check(
                f"node {name} answers",
                f"{type(error).__name__}: look whether it holds this code and its packages",
            )
    yield Check(f"{len(answers)} nodes answer" if len(answers) != 1 else "the node answers")
    for key, name, remedy in (
        ("versions", "same versions", "install constraints.txt on every node"),
        ("storage", "storage shared and writable", "name a folder that all nodes see"),
        ("secret", "same master secret", "put the same secret file on every node"),
        ("weights", "scoring weights", "put the file on every node or choose fid_extractor=cnn"),
        ("data", "data readable and the same", "put the same data at the same path everywhere"),
    ):
        wrong = {n: a[key] for n, a in answers.items() if not a[key][0] or a[key] != here[key]}
        text = "; ".join(f"node {n}: {_difference(a, here[key])}" for n, a in wrong.items())
        yield Check(name, f"{text}: {remedy}" if wrong else "")


def _gpu_check(sweep: SweepConfig) -> Check:
    """Asks the nodes that offer GPUs to Ray whether a worker could use them."""
    import ray

    low = "bfloat16" in (sweep.run.training.precision, sweep.run.sampler.precision)
    wrong: list[str] = []
    for node in ray.nodes():
        if node["Alive"] and (count := int(node["Resources"].get("GPU", 0))):
            try:
                fine, text = _asked(node, _tried, partial(usable_gpus, count, low))
            except Exception as error:  # As above, where the node did not answer.
                fine, text = False, type(error).__name__
            wrong += [] if fine else [f"node {node['NodeManagerAddress']}: {text}"]
    return Check("GPUs usable", "; ".join(wrong))


def _asked(node: dict[str, Any], question: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns on a node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    task = ray.remote(num_cpus=0, max_retries=0)(question).options(scheduling_strategy=where)
    return ray.get(task.remote(*arguments), timeout=_SECONDS)


def _difference(found: tuple[bool, str], expected: tuple[bool, str]) -> str:
    if not found[0]:
        return found[1]
    return "differs from the driver" if expected[0] else f"the driver fails ({expected[1]})"


def usable_gpus(count: int, bfloat16: bool) -> None:
    """Asks this node's torch for its GPUs.

    Raises:
        ConfigError: it sees fewer than `count`, or one without room or without what is asked for.
    """
    import torch

    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if seen < count:
        raise ConfigError(
            f"torch {torch.__version__} sees {seen} of {count} GPUs: install the driver and "
            "a torch built for CUDA"
        )
    for number in range(count):
        name, (free, total) = torch.cuda.get_device_name(number), torch.cuda.mem_get_info(number)
        if free < total / 2:
            raise ConfigError(
                f"GPU {number} ({name}) has {free / 2**30:.1f} of {total / 2**30:.1f} GiB free: "
                "end what else uses it (nvidia-smi shows what)"
            )
        # Before that generation bfloat16 is emulated, many times slower than float32.
        if bfloat16 and torch.cuda.get_device_capability(number) < (8, 0):
            raise ConfigError(
                f"GPU {number} ({name}) has no bfloat16: set training.precision=float32 and "
                "sampler.precision=float32"
            )


def examine(settings: dict[str, Any], mark: str, held: bool = False) -> dict[str, tuple[bool, str]]:
    """What one node can do: for each question whether it succeeded, and what must be the same.

    Args:
        settings: of a trial, as nested data.
        mark: file that the driver wrote into the storage folder; or the address of a store.
        held: whether another process holds the lock beside it.
    """
    from core.config import load
    from core.data import load_dataset
    from core.evaluation.features import find_weights
    from core.privacy.keys import MasterSecret

    config = on_this_machine(settings, mark) if "://" in mark else load(settings)

    def versions() -> str:
        packages = [f"{name} {metadata.version(name)}" for name in _PACKAGES]
        return ", ".join([f"Python {platform.python_version()}", *packages])

    def storage() -> str:
        if "://" in mark:
            require_store(mark)
            return ""
        path = Path(mark)
        path.with_name(f"{path.name}-{uuid.uuid4().hex}").write_text("")
        if held and is_free(path.with_suffix(_LOCK)):
            raise ConfigError("it does not see the driver's lock: name a folder on NFS 4.1")
        return path.read_text()

    def weights() -> str:
        if config.evaluation.fid_extractor == "inception":
            find_weights(config.evaluation.inception_weights)
        return config.evaluation.fid_extractor

    questions: dict[str, Callable[[], str]] = {
        "versions": versions,
        "storage": storage,
        "secret": lambda: MasterSecret.load(create=False).public_id,
        "weights": weights,
        "data": lambda: load_dataset(config.dataset, Path(config.runtime.cache)).fingerprint,
    }
    return {key: _tried(question) for key, question in questions.items()}
