"""Forward passes side by side, each on a thread that computes by itself.

Products of a few short texts with a small layer are too small to be shared by threads: two threads then do 1.4 times the
work of one, and two forward passes at once twice (SmolLM2, two cores of a Zen 4). What a pass gives does not depend on
which thread it has.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Given = TypeVar("Given")

_pools: dict[int, ThreadPoolExecutor] = {}
os.register_at_fork(after_in_child=_pools.clear)
_turns: list[bool] = []  # not empty: passes have to come one after the other


def _by_itself() -> None:
    """Let torch compute on this thread alone; asked for, the number is this thread's, whatever others set later."""
    torch.set_num_threads(1)
    torch.get_num_threads()


def workers() -> ThreadPoolExecutor:
    """As many as torch has threads, each of which computes by itself."""
    threads = torch.get_num_threads()
    if threads not in _pools:
        pool = _pools[threads] = ThreadPoolExecutor(threads, "justforward-alone", _by_itself)
        # what a worker has set is its own from then on; what torch gives to threads that come later is not
        barrier = threading.Barrier(threads)
        list(pool.map(lambda _: barrier.wait(), range(threads)))
        torch.set_num_threads(threads)
    return _pools[threads]


@contextlib.contextmanager
def in_turn() -> Iterator[None]:
    """While inside, `spread` does one thing after the other: what it calls uses the workers itself."""
    _turns.append(True)
    try:
        yield
    finally:
        _turns.pop()


def hands(good: bool) -> int:
    """Among how many threads passes are spread: 1 where that is not `good`, or they have to come in turn."""
    return torch.get_num_threads() if good and not _turns else 1


def spread(work: Callable[[Item], Given], items: Sequence[Item], among: int) -> Iterator[Given]:
    """What some work gives for each item, in order, on so many threads (`hands`). Without gradients.

    Raises:
        What the work raises, for the first item that it does.
    """
    if among == 1:
        return map(work, items)
    return workers().map(torch.no_grad()(work), items)
