"""Maps over the cores of this machine that keep the order and let few results wait."""

import os
import pickle
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import count, islice
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

Item = TypeVar("Item")
Value = TypeVar("Value")
_WAITING = 2
"""Results for each core that are computed ahead; bounds the memory."""
_CHUNK, _CHUNK_BYTES = 64, 2**25
"""Items that a process works on at once: fewer where results are large, as of photographs."""
_MOST_PROCESSES = 8
"""More would wait for the one that takes their results."""


def on_all_cores(function: Callable[[Item], Value], items: Iterable[Item]) -> Iterator[Value]:
    """Yields `function(item)` in the order of the items, computed by a thread for each core.

    For functions that release Python's lock while they work, as those of torch do. What an item
    raises is raised in its place.
    """
    cores, threads = _cores(), torch.get_num_threads()
    waiting: deque[Future[Value]] = deque()
    # One thread of torch for each core, not as many threads as cores for each.
    pool = ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= _WAITING * cores:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def by_processes(
    function: Callable[[Item], Value], items: Callable[[], Iterable[Item]]
) -> Iterator[Value]:
    """Yields `function(item)` in the order of the items, computed by a process for each core.

    For functions that hold Python's lock. What an item raises is raised in its place. Few items are
    computed here, as processes take a while to start.

    Args:
        function: can be pickled, as `items` can.
        items: opens the items anew in each process.
    """
    first, largest = list(islice(items(), _CHUNK)), 1
    for value in map(function, first):
        largest = max(largest, len(pickle.dumps(value)))
        yield value
    if len(first) < _CHUNK:
        return
    loader = DataLoader(
        _Computed(function, items, max(1, min(_CHUNK, _CHUNK_BYTES // largest))),
        batch_size=None,
        num_workers=min(_cores(), _MOST_PROCESSES),
        collate_fn=list,
        prefetch_factor=_WAITING,
        worker_init_fn=partial(_end_with, os.getpid()),
        generator=torch.Generator(),  # The global one stays as it is.
    )
    for chunk in loader:
        for value in chunk:
            if isinstance(value, Exception):
                raise value
            yield value


class _Computed(IterableDataset[Any]):
    """Chunks of results, of which the loader's processes take turns, and an error as a chunk."""

    def __init__(
        self, function: Callable[[Any], Any], items: Callable[[], Iterable[Any]], chunk: int
    ) -> None:
        self.function, self.items, self.chunk = function, items, chunk

    def __iter__(self) -> Iterator[list[Any]]:
        process = get_worker_info()
        assert process is not None
        try:
            left = islice(self.items(), _CHUNK, None)  # The first ones have been computed.
            for turn in count():
                if not (chunk := list(islice(left, self.chunk))):
                    return
                if turn % process.num_workers == process.id:
                    yield [*map(self.function, chunk)]
        except Exception as error:  # As a value: the loader would raise it with other words.
            yield [error]


def _end_with(parent: int, worker: int) -> None:
    """Ends this process with its parent, also where it waits to hand over more than a pipe holds.

    Args:
        worker: its number, which the loader hands over.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _cores() -> int:
    return len(os.sched_getaffinity(0))
