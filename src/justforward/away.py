"""Looks of weights that are stored in 16 bits: they are not moved, what is computed with is. Parts of such weights are, and put back."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from justforward import pool
from justforward.noise import spec
from justforward.stored import SLICE, plain

Factors = Callable[[Any], tuple[Any, Any]]
_LEAST = 64 * spec.TILE  # elements: a thread's smallest share


class LookAway:
    """Where one tensor stands, as `stored.Away` has it: so far along these directions.

    Args:
        p: the parameter (`stored.Stored`).
        stream: its noise stream.
        signs: z is rademacher.
        factors: of rank-one directions, by seeds; None where z is dense.
        kernels: `noise.half`'s for its format, or those of `noise.devices`.
        compiled: whether these are Numba's.

    Attributes:
        kernels, compiled: as given.
        skip: how many tiles of the whole tensor come before it, where it is a part.
    """

    skip = 0

    def __init__(
        self,
        p: nn.Parameter,
        stream: int,
        signs: bool,
        factors: Factors | None,
        kernels: Any,
        compiled: bool,
    ) -> None:
        self.kernels, self.compiled = kernels, compiled
        self._p, self._stream, self._factors = p, np.uint64(stream), factors
        self._signs = signs
        self._lengths: dict[int, float] = {}
        self._known: dict[int, tuple[Any, Any]] = {}

    def keep(self) -> None:
        """Make room for what the next `move` needs: nothing."""

    def move(self, seed: int, length: float) -> None:
        """Go on along a direction; whole multiples of one length add up to 0 exactly."""
        length += self._lengths.pop(seed, 0.0)
        if length:
            self._lengths[seed] = length
        self._known = {s: pair for s, pair in self._known.items() if s in self._lengths}
        self._p._jf_away = self if self._lengths else None  # type: ignore[attr-defined]

    def values(self, first: int, last: int, out: Tensor) -> None:
        """Fill `out` [last - first] with elements first .. last: float32, or 16 bits, each rounded once."""
        flat = self._base()
        if out.dtype != torch.float32 and (self.compiled or self._factors is not None):
            wide = torch.empty(last - first, device=out.device)
            self.values(first, last, wide)
            out.copy_(wide)
        elif self._factors is not None:
            columns = self._p.shape[1]
            matrix = out.view(-1, columns)
            matrix.copy_(flat[first:last].view(-1, columns))
            self._add_outer(matrix, slice(first // columns, last // columns))
        elif self.compiled:
            bits, room = flat.view(torch.int16).numpy().view(np.uint16), out.numpy()
            rest, widen, skip = self._directions(), self._widen, self.skip * spec.TILE
            bits = behind(bits, skip)

            def part(start: int, end: int) -> None:
                widen(bits, room[start - first : end - first], skip + start, skip + end, *rest)

            pool.share(part, first, last, _LEAST)
        else:
            skip = self.skip * spec.TILE
            self._widen(flat, out, skip + first, skip + last, *self._directions(), skip=self.skip)

    def rows(self, which: Tensor, out: Tensor) -> None:
        """Fill `out` [R, columns] with rows `which` (int64 [R]) of a matrix; as `values`."""
        if self._factors is not None:
            wide = plain(self._p)[which].float()
            self._add_outer(wide, which)
            out.copy_(wide)
        elif self.compiled:
            columns = self._p.shape[1]
            for row, at in zip(out, which.tolist(), strict=True):
                self.values(at * columns, (at + 1) * columns, row)
        else:
            flat = plain(self._p).view(-1)
            self.kernels.widen_rows(flat, out, which, *self._directions(), self._signs)

    def _base(self) -> Tensor:
        """What it goes out from, in order."""
        return plain(self._p).view(-1)

    @property
    def _widen(self) -> Any:
        return self.kernels.widen_signs if self._signs else self.kernels.widen

    def _directions(self) -> tuple[Any, ...]:
        """What `widen` takes behind the range: stream, seeds, lengths."""
        seeds = np.array(list(self._lengths), np.uint64)
        return self._stream, seeds, np.array(list(self._lengths.values()), np.float32)

    def _add_outer(self, matrix: Tensor, rows: Any) -> None:
        """Add the rank-one directions to these rows."""
        for seed, length in self._lengths.items():
            if seed not in self._known:
                self._known[seed] = self._factors(np.array([seed], np.uint64))  # type: ignore[misc]
            a, b = (torch.as_tensor(part[0]) for part in self._known[seed])
            matrix.addr_(a[rows] * length, b)


class LookHere(LookAway):
    """Where a part of a tensor stands that others compute with as it is: a look moves it, each weight rounded once, and a copy is kept.

    Args:
        skip: as the attribute.
    """

    def __init__(self, *given: Any, skip: int) -> None:
        super().__init__(*given)
        self.skip = skip
        self._kept: Tensor | None = None

    def keep(self) -> None:
        """Copy the part before it moves. Where memory runs out for one of them none has moved."""
        if not self._lengths:
            self._kept = plain(self._p).view(-1).clone()

    def move(self, seed: int, length: float) -> None:
        """See `LookAway.move`; back where it began, every bit is as it was."""
        flat = plain(self._p).view(-1)
        super().move(seed, length)
        if self._lengths:
            for start in range(0, len(flat), SLICE):
                end = min(start + SLICE, len(flat))
                self.values(start, end, flat[start:end])
        elif self._kept is not None:
            flat.copy_(self._kept)
            self._kept = None

    def _base(self) -> Tensor:
        assert self._kept is not None
        return self._kept


def behind(array: Any, count: int) -> Any:
    """The array of which this one is what comes after `count` numbers that are not there: nobody may ask for those."""
    if not count:
        return array
    start = array.ctypes.data - count * array.itemsize
    room = (ctypes.c_char * (array.nbytes + count * array.itemsize)).from_address(start)
    return np.frombuffer(room, array.dtype)
