"""Ray Train as trials use it: a torch process group, without loading torch where none trains.

Ray's own TorchTrainer loads torch into each trial's process and its supervisor too, which all live
on the head of a cluster: seconds and most of a gigabyte each.
"""

import os
import socket
from datetime import timedelta
from typing import Any

import ray
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import TrainControllerStateType as State
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from core.errors import ConfigError
from core.io.terminal import Report

_TIMEOUT = timedelta(minutes=30)
"""How long workers wait for each other: one evaluates while the others wait."""
_CONTEXT = 2**30
"""Bytes of a GPU that each process on it needs beside what torch allocates, at most."""


class Trainer(DataParallelTrainer):
    """Also without two processes that Ray would start for each trial on the head.

    That of Ray Data would do nothing. The other frees what a supervisor that died had asked for;
    the driver does so (`free_orphans`), with or without Ray's dashboard, and leaves nothing behind.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, backend_config=TorchGroup(), **settings)

    def _create_default_callbacks(self) -> list[Any]:  # Ray's own, and Ray is pinned.
        every = super()._create_default_callbacks()
        unused = DatasetsCallback | PlacementGroupCleanerCallback
        return [each for each in every if not isinstance(each, unused)]


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
