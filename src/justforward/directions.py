"""Weight space: the only code that moves weights.

`Weights` holds the trainable tensors on their grids (`docs/design.md`, "Exact weights"), looks along dense or
rank-one directions in place, and applies steps. All of it is a sweep over tiles of 1,024 elements; no tile
depends on another, so which thread does which never changes a bit.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from justforward.away import LookAway, LookHere, behind
from justforward.errors import UserError
from justforward.interrupts import Shield
from justforward.moves import Move, parts_of
from justforward.noise import spec
from justforward.pool import deal, share, together
from justforward.stored import compute_wide, is_half, raw, settle, stored_dtype
from justforward.trainable import check_apart, check_finite, check_formats, check_trainable

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Factors of rank-one directions are materialised for this many directions at a time in a long replay.
_FACTORS_AT_ONCE = 128
# A sweep is cut into so many shares a thread, of so many tiles at least (a quarter of a millisecond).
_SHARES, _SMALLEST_SHARE = 16, 256


@dataclass(frozen=True)
class Family:
    """What a direction z looks like.

    Attributes:
        outer: matrices take z = a b^T with keyed factors; other shapes take a dense z.
        signs: elements (or factors) are +1 or -1 instead of standard normal. E[z z^T] = I either way.
    """

    outer: bool
    signs: bool

    @property
    def largest(self) -> float:
        """A bound on |z|, for the headroom of the grid."""
        one = 1.0 if self.signs else spec.MAX_ABS_GAUSSIAN
        return one * one if self.outer else one


FAMILIES = {
    "gaussian": Family(outer=False, signs=False),
    "rademacher": Family(outer=False, signs=True),
    "rank1": Family(outer=True, signs=False),
    "rank1-rademacher": Family(outer=True, signs=True),
}


@dataclass(frozen=True)
class Place:
    """Where a tensor's numbers are in the noise, where they are only a part of a weight.

    Attributes:
        stream: that of the whole weight.
        first: the number of their first tile in it.
        decays: whether weight decay takes of it.
    """

    stream: int
    first: int
    decays: bool


class Weights:
    """The trainable tensors, each with a stream number and a power-of-two grid.

    Those of 16 bits have no grid: looks do not move them (`stored`), and updates round stochastically to what 16 bits hold.

    Construction rounds every weight to its grid: per tile of 1,024 elements q = 2^k, chosen so that the
    largest magnitude takes about 23 bits; the change is at most q / 2, below 2^-23 of that magnitude. Weights
    that have been on a grid before do not change.

    Args:
        tensors: (name, tensor) pairs; a tensor's place is its noise stream.
        groups: parameter group of each tensor.
        family: shape of the directions.
        eps: per group, the longest look there will be; sets the finest grid.
        places: of tensors that are parts of weights (`shards`); dense directions and rules without moments only.

    Attributes:
        sharded: whether each process has parts of these alone (`shards`).
        writes: whether this process writes the log.
        compiled: whether the Numba kernels take the tensors (all are on the CPU), or those of `noise.devices`.

    Raises:
        UserError: a tensor cannot be tuned, is not finite, or shares memory with another.
    """

    sharded, writes = False, True

    def __init__(
        self,
        tensors: Sequence[tuple[str, Tensor]],
        groups: Sequence[int],
        family: Family,
        eps: Sequence[float],
        places: Sequence[Place] | None = None,
    ) -> None:
        self.names = [name for name, _ in tensors]
        self.tensors = [tensor for _, tensor in tensors]
        self.groups = list(groups)
        self.family = family
        self.places = [Place(i, 0, t.dim() >= 2) for i, (_, t) in enumerate(tensors)] if places is None else places  # fmt: skip
        self.floors = [grid_floor(e, family) for e in eps]
        self.formats = [check_trainable(name, tensor) for name, tensor in tensors]
        check_apart(self.names, self.tensors)
        self.halves = [is_half(tensor) for tensor in self.tensors]
        compute_wide([t for t, half in zip(self.tensors, self.halves, strict=True) if half])  # type: ignore[misc]
        self.compiled = all(tensor.device.type == "cpu" for tensor in self.tensors)
        self.dtypes = list(dict.fromkeys(stored_dtype(tensor) for tensor in self.tensors))
        self.exponents: list[Tensor] = []
        self._shares: tuple[tuple[int, ...], list[list[tuple[int, int, int]]]] = ((), [])
        for tensor in self.tensors:
            tiles = -(-tensor.numel() // spec.TILE)
            self.exponents.append(torch.zeros(tiles, dtype=torch.int8, device=tensor.device))
        if self.compiled:
            # before the weights are read for the first time, and take their memory
            compile_kernels(family, *self.dtypes)
        for name, tensor in tensors:
            check_finite(name, tensor)  # all of them before the first one moves
        # Steps of tensors that are in a file wait until these are read anyway.
        self._waits = {i for i, t in enumerate(self.tensors) if hasattr(t, "_jf_disk")}
        self._away: dict[int, LookAway] = {}
        for i, group in enumerate(self.groups):
            if self.halves[i]:
                factors = partial(self.factors, i) if self.is_outer(i) else None
                kernels = self.kernels(i)
                place, signs = self.places[i], family.signs
                given: Any = (self.tensors[i], place.stream, signs, factors, kernels, self.compiled)
                self._away[i] = (
                    LookAway(*given) if places is None else LookHere(*given, skip=place.first)
                )
            else:
                self.kernels(i).lay_grid(self._flat(i), self._grid(i), self.floors[group])

    def kernels(self, i: int) -> Any:
        """What moves tensor i: functions of the same names for each format and device."""
        if not self.compiled:
            from justforward.noise import devices

            return devices.kernels(self.tensors[i].device)
        if self.halves[i]:
            from justforward.noise import half

            return half.OF[stored_dtype(self.tensors[i])]
        from justforward.noise import cpu  # Numba's import is paid for on first use

        return cpu

    def _flat(self, i: int) -> Any:
        flat = raw(self.tensors[i]).view(-1)
        if not self.compiled:
            return flat
        return flat.view(torch.int16).numpy().view(np.uint16) if self.halves[i] else flat.numpy()

    def _grid(self, i: int) -> Any:
        return self.exponents[i].numpy() if self.compiled else self.exponents[i]

    def bind(self, i: int, kernel: Any, *rest: Any) -> Callable[[int, int], None]:
        """A kernel with tensor i, its grid and all the rest but the range of tiles: for `sweep`."""
        theta, grid, first = self._flat(i), self._grid(i), self.places[i].first
        if first and self.compiled:  # kernels go by the whole tensor's tiles
            theta, grid = behind(theta, first * spec.TILE), behind(grid, first)
        elif first:
            kernel = partial(kernel, skip=first)
        return lambda low, high: kernel(theta, grid, first + low, first + high, *rest)

    def is_outer(self, i: int) -> bool:
        """Whether tensor i takes rank-one directions."""
        return self.family.outer and self.tensors[i].dim() == 2

    def factors(self, i: int, seeds: NDArray[np.uint64]) -> tuple[Any, Any]:
        """a [D, rows] and b [D, columns] of the rank-one directions of tensor i."""
        a, b = (self._room(i, (len(seeds), size)) for size in self.tensors[i].shape)
        self._fill(i, seeds, (a, b))
        return a, b

    def dense(self, i: int, seeds: NDArray[np.uint64]) -> Any:
        """z [D, elements] of tensor i, materialised: for small tensors only."""
        z = self._room(i, (len(seeds), self.tensors[i].numel()))
        self._fill(i, seeds, (z,))
        return z

    def draw(
        self, seeds: NDArray[np.uint64], eps: Sequence[float] | None = None
    ) -> list[tuple[Any, ...]]:
        """Directions of all tensors: (a, b) of those that take rank-one ones, (z,) of the others.

        With `eps`, lengths of a look by group, a tensor whose length is 0 gets (): it rests.

        Views of one buffer a device: hundreds of small arrays, made among the temporaries of a forward, tear the
        heap and make it grow by a quarter of the model.
        """
        count = len(seeds)
        shapes = [
            [(count, n) for n in (t.shape if self.is_outer(i) else (t.numel(),))]
            if eps is None or eps[self.groups[i]]
            else []
            for i, t in enumerate(self.tensors)
        ]
        left: dict[torch.device, Any] = {}
        for device in dict.fromkeys(t.device for t in self.tensors):
            mine = [i for i, t in enumerate(self.tensors) if t.device == device]
            size = sum(rows * n for i in mine for rows, n in shapes[i])
            left[device] = self._room(mine[0], (size,))
        out: list[tuple[Any, ...]] = []
        for i, tensor in enumerate(self.tensors):
            parts = []
            for rows, n in shapes[i]:
                buffer = left[tensor.device]
                parts.append(buffer[: rows * n].reshape(rows, n))
                left[tensor.device] = buffer[rows * n :]
            if parts:
                self._fill(i, seeds, parts)
            out.append(tuple(parts))
        return out

    def _room(self, i: int, shape: tuple[int, ...]) -> Any:
        if self.compiled:
            return np.empty(shape, np.float32)
        return torch.empty(shape, device=self.tensors[i].device)

    def _fill(self, i: int, seeds: NDArray[np.uint64], parts: Sequence[Any]) -> None:
        """(a, b) or (z,) of tensor i, one row a seed."""
        signs = self.family.signs
        one = spec.DOMAIN_RADEMACHER if signs else spec.DOMAIN_GAUSSIAN
        domains = (spec.DOMAIN_OUT, spec.DOMAIN_IN) if len(parts) == 2 else (one,)
        for part, domain in zip(parts, domains, strict=True):
            self.kernels(i).fill_rows(part, seeds, np.uint64(i), domain, signs)

    def look(self, seed: int, eps: Sequence[float], times: float) -> None:
        """theta += times * q rint(eps z / q), in place. Exact: what +1 did, -1 undoes to the last bit.

        Args:
            seed: the direction.
            eps: length of the look, one for each parameter group; tensors of a group whose length is 0 are not read.
            times: whole number of lengths, negative to go back.
        """
        seeds = np.array([seed], np.uint64)
        for i, away in self._away.items():
            if eps[self.groups[i]]:
                away.keep()
        calls: list[Callable[[int, int], None] | None] = []
        for i in range(len(self.tensors)):
            c = np.float32(eps[self.groups[i]])
            if c == 0.0 or self.halves[i]:
                calls.append(None)
                if self.halves[i]:
                    self._away[i].move(seed, float(c) * times)
                continue
            stream, t = np.uint64(self.places[i].stream), np.float32(times)
            kernels = self.kernels(i)
            if self.is_outer(i):
                a, b = self.factors(i, seeds)
                columns = self.tensors[i].shape[1]
                calls.append(self.bind(i, kernels.look_outer, columns, a * c, b, t))
            else:
                look = kernels.look_signs if self.family.signs else kernels.look
                calls.append(self.bind(i, look, seeds[0], stream, c, t))
        self.sweep(calls)

    def update(
        self,
        moves: Sequence[Move],
        back: Sequence[float] | None = None,
        draws: Sequence[tuple[Any, ...]] | None = None,
    ) -> None:
        """Apply steps, any number of them in one pass over the weights.

        Args:
            moves: the steps, in order.
            back: where each group's weights still stand along the last direction of the (single) move, times -1:
                eps for -eps; they are brought home in the same pass, with the same z.
            draws: what `draw` gave for the (single) move's directions, where already known; used up.
        """
        directions = sum(len(move.seeds) for move in moves)
        if self.family.outer and len(moves) > 1 and directions > _FACTORS_AT_ONCE:
            half = len(moves) // 2
            self.update(moves[:half])
            self.update(moves[half:])
            return
        if back is not None and self.family.outer:
            self.look(int(moves[0].seeds[-1]), back, 1.0)
            back = None
        elif back is not None:
            self.come_home(int(moves[0].seeds[-1]), back)
        parts = parts_of(
            moves, [back is not None and back[g] != 0.0 for g in range(len(self.floors))]
        )
        calls: list[Callable[[int, int], None] | None] = []
        for i in range(len(self.tensors)):
            group = self.groups[i]
            part = parts[group]
            if part is None:
                calls.append(None)
                continue
            dithers, ends, seeds, c = part.dithers, part.ends, part.seeds, part.coefficients
            stream = np.uint64(self.places[i].stream)
            decay = self.decays_of(i, part.decays)
            kernels = self.kernels(i)
            if self.is_outer(i):
                a, b = self.factors(i, seeds) if draws is None else draws[i]
                a *= c[:, None] if self.compiled else torch.as_tensor(c[:, None], device=a.device)
                columns = self.tensors[i].shape[1]
                calls.append(
                    self.bind(i, kernels.update_outer, columns, stream, dithers, ends, a, b, decay)
                )
            else:
                update = kernels.update_signs if self.family.signs else kernels.update
                home = np.float32(0.0 if back is None or self.halves[i] else back[group])
                calls.append(self.bind(i, update, stream, dithers, ends, seeds, c, decay, home))
        self.sweep(calls, later=len(moves) == 1)

    def come_home(self, seed: int, back: Sequence[float]) -> None:
        """`look` of the 16-bit tensors alone: a pass over the others brings them home itself."""
        for i, away in self._away.items():
            away.move(seed, float(np.float32(back[self.groups[i]])))

    def held(self, wait: bool = False) -> list[int]:
        """The 16-bit tensors of which weights were held back at the largest number of their format, each told once.

        Args:
            wait: take the steps that wait for tensors in a file; else what they hold back is told once they are taken.
        """
        if wait:
            for tensor, half in zip(self.tensors, self.halves, strict=True):
                if half:
                    settle(tensor)
        found = [i for i, half in enumerate(self.halves) if half and self.exponents[i].any()]
        for i in found:
            self.exponents[i].zero_()
        return found

    def check_held(self, wait: bool = False) -> None:
        """Raise UserError, once, where steps that were taken held 16-bit weights back; as `held`."""
        for i in self.held(wait)[:1]:
            kind = stored_dtype(self.tensors[i])
            raise UserError(
                f"parameter {self.names[i]} has reached {torch.finfo(kind).max:g}, the largest number of {kind}, and was held "
                "there, by a step that is taken otherwise and stands: lower lr and go on, or tune it in bfloat16 or float32"
            )

    def check_formats(self) -> None:
        """Raise UserError where a tensor has been converted or moved since."""
        check_formats(self.names, self.tensors, self.formats)

    def decays_of(self, i: int, decays: NDArray[np.float32]) -> NDArray[np.float32]:
        """Weight decay leaves biases and norm scales (tensors of fewer than two dimensions) alone."""
        return decays if self.places[i].decays else np.zeros_like(decays)

    def _wait(self, i: int, call: Callable[[int, int], None]) -> None:
        """Call a kernel once its tensor is read, or asked for."""
        p: Any = self.tensors[i]
        with p._jf_turn:
            if p._jf_due is None:
                p._jf_due = _Waiting(p, len(self.exponents[i]))
            p._jf_due.calls.append(call)

    def average(self, loss: Any) -> Any:
        """A closure's loss; over processes their mean, where each has parts of the weights alone."""
        return loss

    def same(self, what: dict[str, Any]) -> None:
        """Refuse to go on where processes that have parts of the weights were given different things."""

    def settle(self) -> None:
        """Do all that waits."""
        for tensor in self.tensors:
            settle(tensor)

    def sweep(
        self, calls: Sequence[Callable[[int, int], None] | None], later: bool = False
    ) -> None:
        """Call every tensor's kernel, where it has one, over all of its tiles, with torch's number of threads.

        With `later`, those of tensors in a file wait until they are read.

        Threads take small shares as they come: after a forward torch's own threads spin for some milliseconds,
        and a thread of ours that has to make room for one would keep the others waiting.
        """
        if self._waits:
            now = list(calls)
            for i in self._waits:
                call = calls[i]
                if call is not None and later:
                    self._wait(i, call)
                    now[i] = None
                elif call is not None:
                    settle(self.tensors[i])
            calls = now
        threads = torch.get_num_threads() if self.compiled else 1
        key = (threads, *(call is None for call in calls))
        if self._shares[0] != key:
            tiles = [
                0 if call is None else len(exponents)
                for call, exponents in zip(calls, self.exponents, strict=True)
            ]
            most = max(sum(tiles) // _SMALLEST_SHARE, 1)
            self._shares = (key, deal(tiles, min(_SHARES * threads, most)))
        shares = iter(self._shares[1])  # shared by all: a list's iterator hands out each item once

        def work() -> None:
            for part in shares:
                for i, first, last in part:
                    call = calls[i]
                    assert call is not None  # the shares hold no tile of a tensor that rests
                    call(first, last)

        together(work, max(min(threads, len(self._shares[1])), 1))


class _Waiting:
    """Kernels that wait for one tensor in a file; called by whichever thread is the first to need it, or to have it read."""

    def __init__(self, p: Any, tiles: int) -> None:
        self._p, self._tiles, self._process = p, tiles, os.getpid()
        self.calls: list[Callable[[int, int], None]] = []

    def __call__(self) -> None:
        if os.getpid() != self._process:
            raise UserError(
                f"a step of a parameter of {tuple(self._p.shape)} waits until it is read, and belongs to the process that took it: "
                "before another is forked, have it taken, by reading the weights or the optimizer's state_dict()"
            )
        # this may be within the user's closure, which Ctrl-C may leave at any moment
        with Shield(), self._p._jf_turn:
            if self._p._jf_due is not self:  # another thread was at it
                return
            try:
                for call in self.calls:
                    share(call, 0, self._tiles, _SMALLEST_SHARE)
            finally:
                self._p._jf_due = None
            self._p._jf_disk()


def grid_floor(eps: float, family: Family) -> int:
    """The finest grid exponent k on which a look of length eps stays within GRID_LOOK multiples of 2^k."""
    return max(math.ceil(math.log2(eps * family.largest / spec.GRID_LOOK)), -100)


_compiled: set[tuple[Family, torch.dtype]] = set()


def tiny_weights(family: Family, dtype: torch.dtype) -> Weights:
    """A matrix and a vector of one number each, to compile kernels by."""
    shapes = {"matrix": (1, 1), "vector": (1,)}
    tensors = {n: torch.nn.Parameter(torch.zeros(s, dtype=dtype), False) for n, s in shapes.items()}
    return Weights(list(tensors.items()), [0, 0], family, [1e-3])


def compile_kernels(family: Family, *dtypes: torch.dtype) -> None:
    """Compile what a family needs (or load it from Numba's cache) ahead of the first look.

    Args:
        family: of the directions.
        dtypes: of the weights (default float32).

    Before a model is loaded is the best time: the compiler's memory is given back before the model needs its own.
    """
    new = [(family, dtype) for dtype in dtypes or (torch.float32,)]
    new = [key for key in new if key not in _compiled]
    if not new:
        return
    _compiled.update(new)
    for _, dtype in new:
        tiny = tiny_weights(family, dtype)
        seeds = np.zeros(1, np.uint64)
        tiny.draw(seeds)
        tiny.look(0, [1e-3], 1.0)
        for p in tiny.tensors:
            if is_half(p):
                _ = p + 0.0  # by way of its look
        tiny.look(0, [1e-3], -1.0)
        tiny.update([Move(0, seeds, np.ones((1, 1), np.float32), np.zeros(1, np.float32))])
    from justforward.noise import llvm

    llvm.release_compiler()
