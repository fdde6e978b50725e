"""Spread a compiled loop over the threads that PyTorch was told to use.

numba's own parallel loops are not used: their thread pools end the process after a fork or when two
threads enter them at once.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch


@lru_cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="nf4")


# The threads of a pool do not survive a fork; a child makes its own.
os.register_at_fork(after_in_child=_pool.cache_clear)


def spread(loop: Callable[..., Any], items: range, grain: int, *args: Any) -> None:
    """Call ``loop(*args, begin, end)`` over the parts of a range, one part a thread.

    Args:
        loop: a function compiled to run without the interpreter's lock.
        items: what to go over.
        grain: fewest items worth a thread.
        *args: passed on.
    """
    threads = max(1, min(torch.get_num_threads(), len(items) // grain))
    if threads == 1:
        loop(*args, items.start, items.stop)
        return
    edges = [items.start + len(items) * i // threads for i in range(threads + 1)]
    others = [
        _pool(threads - 1).submit(loop, *args, begin, end)
        for begin, end in zip(edges[1:], edges[2:], strict=False)
    ]
    loop(*args, edges[0], edges[1])
    for other in others:
        other.result()
