"""Threads of our own for the kernels, as many as torch uses; they are kept, and do not survive a fork."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

_pools: dict[int, ThreadPoolExecutor] = {}
os.register_at_fork(after_in_child=_pools.clear)


def pool(workers: int) -> ThreadPoolExecutor:
    """The executor of so many threads."""
    if workers not in _pools:
        _pools[workers] = ThreadPoolExecutor(workers, thread_name_prefix="justforward")
    return _pools[workers]


def together(work: Callable[[], None], threads: int) -> None:
    """Run the same function in so many threads, this one among them, and wait for all of them.

    Raises:
        Whatever one of them raised, once all are done.
    """
    futures = [pool(threads - 1).submit(work) for _ in range(threads - 1)]
    try:
        work()
    finally:
        # Another thread's share must be done before anyone looks at the weights, whatever happened here.
        errors = [future.exception() for future in futures]
    for error in errors:
        if error is not None:
            raise error


def share(call: Callable[[int, int], None], first: int, last: int, least: int) -> None:
    """Call a function for parts of first .. last, each of `least` at the least, in torch's number of threads."""
    threads = min(torch.get_num_threads(), max((last - first) // least, 1))
    size = max(-(-(last - first) // (4 * threads)), least) if threads > 1 else last - first
    starts = iter(
        range(first, last, size or 1)
    )  # shared by all: an iterator hands out each item once

    def work() -> None:
        for start in starts:
            call(start, min(start + size, last))

    together(work, threads)


def deal(tiles: Sequence[int], count: int) -> list[list[tuple[int, int, int]]]:
    """Split all tiles of all tensors into `count` contiguous shares of (tensor, first, last)."""
    total = sum(tiles)
    shares: list[list[tuple[int, int, int]]] = [[] for _ in range(count)]
    per_share = max(-(-total // len(shares)), 1)
    done = 0
    for i, count in enumerate(tiles):
        first = 0
        while first < count:
            share = done // per_share
            last = min(count, first + (share + 1) * per_share - done)
            shares[share].append((i, first, last))
            done += last - first
            first = last
    return shares
