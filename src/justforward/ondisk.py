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
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from justforward.errors import UserError
from justforward.stored import make_stored, plain

_PAGE = mmap.PAGESIZE
AHEAD = 1 << 26  # bytes that are asked for while a tensor is computed with
_WRITE = 2  # SYNC_FILE_RANGE_WRITE


def keep_on_disk(tensors: Iterable[nn.Parameter], folder: str | Path) -> int:
    """Move parameters into a scratch file of this process; they stay the same objects.

    Args:
        tensors: on the CPU, contiguous, as they are when no optimizer has them yet.
        folder: on a local disk.

    Returns:
        Bytes of the file.

    Raises:
        UserError: the folder cannot be written, has no room, or is no place for mapped files.
    """
    found = [p for p in dict.fromkeys(tensors) if p.numel() and p.device.type == "cpu"]
    if not found:
        return 0
    overlay = _Overlay(folder, [plain(p) for p in found])
    for place, p in enumerate(found):
        overlay.take(place, p)
    return overlay.size


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None)


class _Overlay:
    """The file, and in which order what is in it is used."""

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
        self._next: dict[int, int] = {}
        self._last = self._front = -1
        self._asked: set[int] = set()

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def take(self, place: int, p: nn.Parameter) -> None:
        """Let a parameter be in the file."""
        old = plain(p)
        new = torch.frombuffer(
            self._map, dtype=old.dtype, count=old.numel(), offset=self._starts[place]
        )
        new.copy_(old.reshape(-1))
        p.data = new.view(old.shape)
        make_stored(p)
        kept: Any = p
        kept._jf_used = lambda: self._used(place)
        kept._jf_disk = lambda: self._written(place)
        self._written(place)

    def _used(self, place: int) -> None:
        """Learn what is used after what, and ask for what comes next."""
        if place == self._last:
            return
        if self._last >= 0:
            self._next[self._last] = place
        self._last = place
        if place in self._asked:
            self._asked.remove(place)
        else:
            self._asked, self._front = set(), place
        left = AHEAD - sum(self._sizes[other] for other in self._asked)
        while left > 0:
            ahead = self._next.get(self._front)
            if ahead is None or ahead == place or ahead in self._asked:
                return
            self._map.madvise(mmap.MADV_WILLNEED, self._starts[ahead], self._sizes[ahead])
            self._asked.add(ahead)
            self._front, left = ahead, left - self._sizes[ahead]

    def _written(self, place: int) -> None:
        """Begin to write it back, so that its pages can be forgotten when memory is short."""
        if sys.platform == "linux":
            start, size = (ctypes.c_int64(x) for x in (self._starts[place], self._sizes[place]))
            _library().sync_file_range(self._file, start, size, _WRITE)
