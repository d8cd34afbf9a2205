"""Looks of weights that are stored in 16 bits: they are not moved, what is computed with is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from justforward import pool
from justforward.noise import spec
from justforward.stored import plain

Factors = Callable[[Any], tuple[Any, Any]]
_LEAST = 64 * spec.TILE  # elements: a thread's smallest share


class LookAway:
    """Where one tensor stands, as `stored.Away` has it: so far along these directions.

    Args:
        p: the parameter (`stored.Stored`).
        stream: its noise stream.
        signs: z is rademacher.
        factors: of rank-one directions, by seeds; None where z is dense.
        kernels: `noise.half`'s for its format, or `noise.plain`.
        compiled: whether these are Numba's.
    """

    def __init__(
        self,
        p: nn.Parameter,
        stream: int,
        signs: bool,
        factors: Factors | None,
        kernels: Any,
        compiled: bool,
    ) -> None:
        self._p, self._stream, self._factors, self._compiled = (
            p,
            np.uint64(stream),
            factors,
            compiled,
        )
        self._widen = kernels.widen_signs if signs else kernels.widen
        self._lengths: dict[int, float] = {}
        self._known: dict[int, tuple[Any, Any]] = {}

    def move(self, seed: int, length: float) -> None:
        """Go on along a direction; whole multiples of one length add up to 0 exactly."""
        length += self._lengths.pop(seed, 0.0)
        if length:
            self._lengths[seed] = length
        self._known = {s: pair for s, pair in self._known.items() if s in self._lengths}
        self._p._jf_away = self if self._lengths else None  # type: ignore[attr-defined]

    def values(self, first: int, last: int, out: Tensor) -> None:
        """Fill `out`, float32 [last - first], with elements first .. last."""
        flat = plain(self._p).view(-1)
        if self._factors is not None:
            columns = self._p.shape[1]
            matrix = out.view(-1, columns)
            matrix.copy_(flat[first:last].view(-1, columns))
            for seed, length in self._lengths.items():
                if seed not in self._known:
                    self._known[seed] = self._factors(np.array([seed], np.uint64))
                a, b = (torch.as_tensor(part[0]) for part in self._known[seed])
                matrix.addr_(a[first // columns : last // columns] * length, b)
            return
        seeds = np.array(list(self._lengths), np.uint64)
        lengths = np.array(list(self._lengths.values()), np.float32)
        if not self._compiled:
            self._widen(flat, out, first, last, self._stream, seeds, lengths)
            return
        bits, room = flat.view(torch.int16).numpy().view(np.uint16), out.numpy()

        def part(start: int, end: int) -> None:
            self._widen(
                bits, room[start - first : end - first], start, end, self._stream, seeds, lengths
            )

        pool.share(part, first, last, _LEAST)
