"""Trainable weights in a file, for models larger than memory.

A model's weights are mapped from its checkpoint when it is loaded: they are read when they are needed, and forgotten when the
memory is. Weights that move cannot be, without a place to move to. So those that are tuned are copied into a scratch file
and mapped from there, shared: the system reads and writes it. A step of a tensor waits until the next forward reads the
tensor anyway (`Weights.sweep`), so a step reads each weight once and writes it once, and while one tensor is computed with
the next ones are asked for.

The file has no name once it is open, and goes with the process, however that ends: what lasts is the log. A run that is
continued makes the file anew, from base and log.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from justforward.errors import UserError
from justforward.memory import free, give_back, in_memory, mapped_files
from justforward.stored import make_stored, plain, settle

_LINUX = sys.platform == "linux"
_PAGE = mmap.PAGESIZE
_PIECE = 1 << 22
AHEAD = 1 << 27  # bytes that are read ahead of what is computed with
# Linux, whose names Python does not know
_POPULATE_READ, _POPULATE_WRITE = 22, 23  # madvise
_WAIT_BEFORE, _WRITE, _WAIT_AFTER = 1, 2, 4  # sync_file_range


def keep_on_disk(tensors: Iterable[nn.Parameter], folder: str | Path) -> int:
    """Move parameters into a scratch file of this process; they stay the same objects.

    Args:
        tensors: on the CPU, contiguous, as they are when no optimizer has them yet.
        folder: on a local disk.

    Returns:
        Bytes of the file.

    Raises:
        UserError: the folder cannot be written, has no room, is on a file system of memory, or is no place for mapped files.
    """
    found = [p for p in dict.fromkeys(tensors) if p.numel() and p.device.type == "cpu"]
    if not found:
        return 0
    kind = in_memory(folder)
    if kind is not None:
        raise UserError(
            f"--offload is {str(folder)!r}: that is on a {kind}, which is memory itself: give a folder on a local disk"
        )
    overlay = _Overlay(folder, [plain(p) for p in found])
    mapped = mapped_files()
    for place, p in enumerate(found):
        old = plain(p)
        start, end = old.data_ptr(), old.data_ptr() + old.numel() * old.element_size()
        overlay.take(place, p)
        # a checkpoint stays mapped, and what was read of it in memory, as long as any part of it is used
        if any(first <= start and end <= last for first, last, _ in mapped):
            give_back(start, end)
    return overlay.size


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    library.sync_file_range.argtypes = [
        ctypes.c_int,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_uint,
    ]
    return library


class _Overlay:
    """The file, and in which order what is in it is used.

    Pages are valid whatever happens here: what threads do beside the one that computes only says early what will be read,
    and what will not be for long (on Linux; elsewhere the system is told no more than what comes next).

    - One reads ahead: it has the next tensors' pages mapped, for writing where a step waits for them; another takes that step.
    - One writes behind: what was used is taken out of the mapping, written, and forgotten. The system would let go of what was
      used longest ago, which in a cycle is what is needed next, and would look for it while the model waits; and it
      would take pages that are written out of the mapping one by one, each with an interrupt to the thread that computes, which costs
      more than all else. Tensors at the cycle's beginning stay in memory, as many as half of what is free holds.
    """

    def __init__(self, folder: str | Path, tensors: list[Tensor]) -> None:
        self._starts, self._sizes, self.size = [], [], 0
        for tensor in tensors:
            size = tensor.numel() * tensor.element_size()
            self._starts.append(self.size)
            self._sizes.append(size)
            self.size += -(-size // _PAGE) * _PAGE
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                if hasattr(os, "posix_fallocate"):  # or a full disk would be a SIGBUS later
                    os.posix_fallocate(file.fileno(), 0, self.size)
                else:
                    os.truncate(file.fileno(), self.size)
                self._map = mmap.mmap(file.fileno(), self.size, mmap.MAP_SHARED)
                self._file = os.dup(file.fileno())
        except OSError as error:
            raise UserError(
                f"--offload is {str(folder)!r}: {self.size / 1e9:.3g} GB cannot be kept there: {error.strerror}: give a folder on a "
                "local disk with that much room"
            ) from error
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._parameters: dict[int, weakref.ref[Any]] = {}
        self._next: dict[int, int] = {}
        self._last = self._front = -1
        self._asked: dict[int, Future[None]] = {}
        room = free()
        if room is None or self.size <= room:
            self._ahead, self._left = AHEAD, self.size
        else:
            self._ahead, self._left = min(AHEAD, room // 4), room // 2
        self._stays: dict[int, bool] = {}  # those that were used; while there is something left
        self._behind: deque[int] = deque()  # begun to be written
        self._process = os.getpid()
        self._turn = threading.Lock()  # passes may go side by side (`alone`)
        self._reads, self._moves, self._writes = (
            ThreadPoolExecutor(1, f"justforward-disk-{what}")
            for what in ("reads", "moves", "writes")
        )

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def take(self, place: int, p: nn.Parameter) -> None:
        """Let a parameter be in the file."""
        old = plain(p)
        # written and not copied into the mapping: so the system keeps pages in large pieces, and has blocks with numbers in
        # them, both of which it is much quicker with
        left, at = old.reshape(-1).view(torch.uint8).numpy().data, self._starts[place]
        while left:
            done = os.pwrite(self._file, left[:_PIECE], at)
            at, left = at + done, left[done:]
        new = torch.frombuffer(
            self._map, dtype=old.dtype, count=old.numel(), offset=self._starts[place]
        )
        p.data = new.view(old.shape)
        make_stored(p)
        kept: Any = p
        kept._jf_turn = threading.RLock()
        kept._jf_used = lambda: self._used(place)
        kept._jf_disk = lambda: self._written(place)
        self._parameters[place] = weakref.ref(p)
        if _LINUX:
            self._write(place)

    def _used(self, place: int) -> None:
        """Have what comes next read, and what came before let go; wait for this one."""
        if place == self._last or os.getpid() != self._process:  # threads do not survive a fork
            return
        with self._turn:
            under_way = self._follow(place)
        if under_way is not None:
            under_way.result()

    def _follow(self, place: int) -> Future[None] | None:
        """What has been asked for of a tensor that is used now, once all else is."""
        before = self._last
        if place not in self._stays:
            self._stays[place] = self._sizes[place] <= self._left
            self._left -= self._sizes[place] if self._stays[place] else 0
        self._last = place
        if before >= 0:
            self._next[before] = place
            self._leave(before)
        under_way = self._asked.pop(place, None)
        if under_way is None:
            self._asked, self._front = {}, place
        left = self._ahead - sum(self._sizes[other] for other in self._asked)
        while left > 0:
            ahead = self._next.get(self._front)
            if ahead is None or ahead == place or ahead in self._asked:
                break
            read = self._reads.submit(self._read, ahead)
            self._asked[ahead] = self._moves.submit(self._move, ahead, read)
            self._front, left = ahead, left - self._sizes[ahead]
        return under_way

    def _read(self, place: int) -> None:
        """Have a tensor's pages mapped; for writing where a step waits for it."""
        p = self._parameters[place]()
        waits = p is not None and p._jf_due is not None
        if not _LINUX or self._advise(place, _POPULATE_WRITE if waits else _POPULATE_READ):
            self._map.madvise(mmap.MADV_WILLNEED, self._starts[place], self._sizes[place])

    def _move(self, place: int, read: Future[None]) -> None:
        """Take the step that waits for a tensor."""
        read.result()
        p = self._parameters[place]()
        if p is not None:
            settle(p)

    def _written(self, place: int) -> None:
        """Have a tensor written that a step has moved; one that is about to be used, or is, once it was."""
        if place != self._last and place not in self._asked:
            self._leave(place)

    def _leave(self, place: int) -> None:
        if _LINUX and os.getpid() == self._process:
            self._writes.submit(self._write, place)

    def _write(self, place: int) -> None:
        """Begin to write what was used, and forget what is written."""
        self._advise(place, mmap.MADV_DONTNEED)  # of a shared mapping: what is in the file stays
        self._sync(place, _WRITE)
        self._behind.append(place)
        while sum(self._sizes[other] for other in self._behind) > self._ahead:
            done = self._behind.popleft()
            if self._stays.get(done, False):
                continue
            self._sync(done, _WAIT_BEFORE | _WRITE | _WAIT_AFTER)
            start, size = self._starts[done], self._sizes[done]
            os.posix_fadvise(self._file, start, size, os.POSIX_FADV_DONTNEED)

    def _sync(self, place: int, what: int) -> None:
        start, size = self._starts[place], self._sizes[place]
        _library().sync_file_range(self._file, start, size, what)

    def _advise(self, place: int, what: int) -> int:
        """0, or -1 where the system cannot."""
        where = self._address + self._starts[place]
        found: int = _library().madvise(where, self._sizes[place], what)
        return found
