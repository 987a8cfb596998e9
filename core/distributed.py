"""Collective operations of the trainers; all are no-ops in a single process."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn

Value = TypeVar("Value")


_group = threading.Event()
"""Set while this process belongs to a process group, as it was last seen to."""


def rank() -> int:
    """Rank of this process, 0 without a process group."""
    return dist.get_rank() if _in_group() else 0


def world_size() -> int:
    """Number of processes that train together, 1 without a process group."""
    return dist.get_world_size() if _in_group() else 1


def leave() -> None:
    """Ends this process's part in the group; called by who trains, after the last step."""
    _group.clear()
    dist.destroy_process_group()


def _in_group() -> bool:
    """Whether there is a process group.

    Privacy: a rank whose group is gone in the middle of a step, as a supervisor may end it from
    another thread, would take its own gradients for the sum of all.

    Raises:
        RuntimeError: there was one, and this process has not left it.
    """
    if dist.is_initialized():
        _group.set()
    elif _group.is_set():
        raise RuntimeError("the process group of this rank was ended while it trained")
    return _group.is_set()


def broadcast_module(module: nn.Module) -> None:
    """Gives every rank the parameters and buffers of rank 0."""
    if world_size() > 1:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, src=0)


def broadcast_object(value: Any) -> Any:
    """Returns rank 0's picklable `value` on every rank."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def on_rank_0(function: Callable[[], Value]) -> Value:
    """Calls `function` on rank 0 alone; every rank returns its value or raises its error."""
    return broadcast_object(on_all_ranks(function if rank() == 0 else lambda: None))


def on_all_ranks(function: Callable[[], Value]) -> Value:
    """Calls `function` on every rank; an error on one is raised on all, so that none waits."""
    value, failure = None, None
    try:
        value = function()
    except Exception as error:
        failure = error
    for other in all_gather_object(failure):
        if other is not None:
            raise other
    return cast(Value, value)


def all_gather_object(value: Any) -> list[Any]:
    """Returns every rank's picklable `value`, in the order of ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """Returns the sum of `value` over ranks."""
    if world_size() > 1:
        dist.all_reduce(value)
    return value
