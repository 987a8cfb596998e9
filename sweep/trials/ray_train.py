"""Ray Train as trials use it: a torch process group, without loading torch where none trains.

Ray's own TorchTrainer loads torch into each trial's process and its supervisor too, which all live
on the head of a cluster: seconds and most of a gigabyte each.
"""

import os
import socket
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import ray
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import TrainControllerStateType as State
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from core.errors import ConfigError
from core.io.terminal import Report

_TIMEOUT = timedelta(minutes=30)
"""How long workers wait for each other: one evaluates while the others wait."""
_NOTICE_S = 2.0
"""Seconds between two questions whether a machine is about to go."""
_CONTEXT = 2**30
"""Bytes of a GPU that each process on it needs beside what torch allocates, at most."""


class Trainer(DataParallelTrainer):
    """Also without Ray Data, which would start a process of its own in each trial, for nothing."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, backend_config=TorchGroup(), **settings)

    def _create_default_callbacks(self) -> list[Any]:  # Ray's own, and Ray is pinned.
        every = super()._create_default_callbacks()
        return [each for each in every if not isinstance(each, DatasetsCallback)]


class Presence(ControllerCallback):
    """Tells a trial when it begins to wait for its workers, and when it has them.

    Args:
        tell: hands the trial a report.
        waiting: stage of the report while it waits.
    """

    def __init__(self, tell: Report, waiting: str) -> None:
        self._tell, self._waiting, self._waits = tell, waiting, False

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """The supervisor goes from one state to another."""
        state = current_state._state_type
        if state in (State.SCHEDULING, State.RUNNING) and self._waits != (
            state == State.SCHEDULING
        ):
            self._waits = not self._waits
            self._tell({"stage": self._waiting if self._waits else "starting", "step": 0})


class DrainNotice:
    """Whether the cluster was told that it will lose a machine; true once for each.

    Training goes on until the machine is gone.

    Args:
        nodes: Ray's ids of the machines that matter.
        tell: told of it first.
    """

    def __init__(self, nodes: Iterable[str], tell: Callable[[], None]) -> None:
        self._nodes, self._tell, self._asked = {*nodes}, tell, 0.0

    def __call__(self) -> bool:
        """Asks the cluster now and then."""
        from ray._private.state import state

        if (now := time.monotonic()) - self._asked < _NOTICE_S:
            return False
        self._asked = now
        try:
            lost = self._nodes & {*state.get_draining_nodes()}
        except Exception:  # A busy cluster: the next call asks again.
            return False
        self._nodes -= lost
        if lost:
            self._tell()
        return bool(lost)


class TorchGroup(BackendConfig):
    """Workers form a torch process group by gloo; those with GPUs of their own by NCCL for tensors.

    Objects then travel on the CPU, and who waits for another does so without its GPU.
    """

    @property
    def backend_cls(self) -> type[Backend]:
        """What forms the group, by Ray's supervisor of the workers."""
        return _Group


class _Group(Backend):
    share_cuda_visible_devices = True  # NCCL's workers of a node reach each other's GPUs directly.

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        address, port = worker_group.execute_single(0, get_address_and_port)
        # NCCL does not let workers share a GPU.
        alone = worker_group.get_resources_per_worker().get("GPU", 0) >= 1
        backend = "cpu:gloo,cuda:nccl" if alone else "gloo"
        size = len(worker_group)
        joining = [
            worker_group.execute_single_async(rank, _join, backend, address, port, rank, size)
            for rank in range(size)
        ]
        ray.get(joining)


def _join(backend: str, address: str, port: int, rank: int, size: int) -> None:
    """Runs on each worker before its training."""
    import core  # noqa: F401  # Before torch is loaded, which reads what it sets.

    import torch.distributed as dist  # isort: skip

    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    dist.init_process_group(backend, rank=rank, world_size=size, timeout=_TIMEOUT)


def use_own_device(gpus: float) -> None:
    """Makes the GPU that this worker was given torch's current one; called where it trains.

    Args:
        gpus: that it was given, in [0, 1]; of a part of one it takes no more memory than that part.

    Raises:
        ConfigError: its torch does not see it.
    """
    import torch
    from ray.train.torch import get_device

    if not gpus:
        return
    device = get_device()
    if device.type != "cuda":
        raise ConfigError(
            f"torch {torch.__version__} on {socket.gethostname()} sees no GPU, but gpus_per_worker="
            f"{gpus:g}: install the driver and a torch built for CUDA there, or set it to 0"
        )
    torch.cuda.set_device(device)
    if gpus < 1:
        beside = _CONTEXT / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(max(gpus - beside, gpus / 2), device)
