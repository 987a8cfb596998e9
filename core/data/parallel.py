"""Map over the cores of this machine that keeps the order and lets few results wait."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Value = TypeVar("Value")
_WAITING = 2
"""Results for each core that are computed ahead; bounds the memory."""


def on_all_cores(function: Callable[[Item], Value], items: Iterable[Item]) -> Iterator[Value]:
    """Yields `function(item)` in the order of the items, computed by a thread for each core.

    Threads, as decoders and torch release Python's lock while they work. What an item raises is
    raised in its place.
    """
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
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
