"""Weight space: the only code that moves weights.

`Weights` holds the trainable tensors on their grids (`docs/design.md`, "Exact weights"), looks along dense or
rank-one directions in place, and applies steps. All of it is a sweep over tiles of 1,024 elements; no tile
depends on another, so which thread does which never changes a bit.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from justforward.errors import UserError
from justforward.noise import spec

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
class Move:
    """One step as the weights see it: theta <- theta - decay theta + sum_d coefficients[g, d] z_d.

    Attributes:
        dither: seed of the stochastic rounding.
        seeds: uint64 [D], the directions.
        coefficients: float32 [groups, D].
        decays: float32 [groups].
    """

    dither: int
    seeds: NDArray[np.uint64]
    coefficients: NDArray[np.float32]
    decays: NDArray[np.float32]


@dataclass(frozen=True)
class _Part:
    """Moves as the kernels take them."""

    dithers: NDArray[np.uint64]
    ends: NDArray[np.int64]
    seeds: NDArray[np.uint64]
    coefficients: NDArray[np.float32]
    decays: NDArray[np.float32]


def _parts(moves: Sequence[Move], away: Sequence[bool]) -> list[_Part | None]:
    """Moves by parameter group; None for a group that rests.

    A move that is zero for a group changes no bit of it and is left out, unless the group is away, along its
    direction.
    """
    counts = [len(move.seeds) for move in moves]
    whole = _Part(
        np.array([move.dither for move in moves], np.uint64),
        np.cumsum(counts, dtype=np.int64),
        np.concatenate([move.seeds for move in moves]).astype(np.uint64),
        np.concatenate([move.coefficients for move in moves], axis=1).astype(np.float32),
        np.stack([move.decays for move in moves], axis=1).astype(np.float32),
    )
    moved = np.stack([move.coefficients.any(axis=1) for move in moves], axis=1)
    out: list[_Part | None] = []
    for c, decays, some in zip(whole.coefficients, whole.decays, moved, strict=True):
        mine = some | (decays != 0.0) | away[len(out)]
        if mine.all():
            out.append(_Part(whole.dithers, whole.ends, whole.seeds, c, decays))
        elif mine.any():
            theirs = np.repeat(mine, counts)
            ends = np.cumsum(np.array(counts)[mine], dtype=np.int64)
            out.append(
                _Part(whole.dithers[mine], ends, whole.seeds[theirs], c[theirs], decays[mine])
            )
        else:
            out.append(None)
    return out


def check_trainable(name: str, tensor: Tensor) -> None:
    """Raise UserError where a tensor cannot be moved exactly in place."""
    advice = "freeze it (requires_grad_(False))"
    if tensor.is_meta:
        raise UserError(f"parameter {name} is on the meta device and has no values: load it first")
    if tensor.dtype != torch.float32:
        raise UserError(
            f"parameter {name} is {tensor.dtype}: only float32 can be tuned; "
            f"convert the model (model.float()) or {advice}"
        )
    if tensor.layout != torch.strided or not tensor.is_contiguous():
        raise UserError(
            f"parameter {name} is not contiguous (shape {tuple(tensor.shape)}, strides "
            f"{tensor.stride() if tensor.layout == torch.strided else tensor.layout}): "
            f"replace it by its .contiguous() copy or {advice}"
        )


def _check_finite(name: str, tensor: Tensor) -> None:
    if tensor.numel() and not math.isfinite(torch.linalg.vector_norm(tensor.detach(), math.inf)):
        flat = tensor.detach().reshape(-1)
        bad = int((~flat.isfinite()).nonzero()[0])
        raise UserError(
            f"parameter {name} is {flat[bad].item()} at element {bad}: "
            "all weights must be finite before tuning"
        )


class Weights:
    """The trainable tensors, each with a stream number and a power-of-two grid.

    Construction rounds every weight to its grid: per tile of 1,024 elements q = 2^k, chosen so that the
    largest magnitude takes about 23 bits; the change is at most q / 2, below 2^-23 of that magnitude. Weights
    that have been on a grid before do not change.

    Args:
        tensors: (name, tensor) pairs; a tensor's place is its noise stream.
        groups: parameter group of each tensor.
        family: shape of the directions.
        eps: per group, the longest look there will be; sets the finest grid.

    Attributes:
        compiled: whether the Numba kernels take the tensors (all are on the CPU), or those of `noise.devices`.

    Raises:
        UserError: a tensor cannot be tuned, is not finite, or shares memory with another.
    """

    def __init__(
        self,
        tensors: Sequence[tuple[str, Tensor]],
        groups: Sequence[int],
        family: Family,
        eps: Sequence[float],
    ) -> None:
        self.names = [name for name, _ in tensors]
        self.tensors = [tensor for _, tensor in tensors]
        self.groups = list(groups)
        self.family = family
        self.floors = [grid_floor(e, family) for e in eps]
        for name, tensor in tensors:
            check_trainable(name, tensor)
        self._check_apart()
        self.compiled = all(tensor.device.type == "cpu" for tensor in self.tensors)
        self.exponents: list[Tensor] = []
        self._shares: tuple[tuple[int, ...], list[list[tuple[int, int, int]]]] = ((), [])
        for tensor in self.tensors:
            tiles = -(-tensor.numel() // spec.TILE)
            self.exponents.append(torch.zeros(tiles, dtype=torch.int8, device=tensor.device))
        if self.compiled:
            compile_kernels(
                family
            )  # before the weights are read for the first time, and take their memory
        for name, tensor in tensors:
            _check_finite(name, tensor)  # all of them before the first one moves
        for i, group in enumerate(self.groups):
            self.kernels(i).lay_grid(self._flat(i), self._grid(i), self.floors[group])

    def _check_apart(self) -> None:
        spans = sorted(
            (t.data_ptr(), t.data_ptr() + 4 * t.numel(), name)
            for name, t in zip(self.names, self.tensors, strict=True)
            if t.numel()
        )
        for (_, end, first), (start, _, second) in pairwise(spans):
            if start < end:
                raise UserError(
                    f"parameters {first} and {second} share memory but are not one parameter: "
                    "tie them (the same nn.Parameter in both places) or freeze one"
                )

    def kernels(self, i: int) -> Any:
        """The module that moves tensor i: one set of function names, three implementations."""
        if self.compiled:  # Numba's import is paid for on first use
            from justforward.noise import cpu

            return cpu
        from justforward.noise import devices

        return devices.kernels(self.tensors[i].device)

    def _flat(self, i: int) -> Any:
        flat = self.tensors[i].detach().view(-1)
        return flat.numpy() if self.compiled else flat

    def _grid(self, i: int) -> Any:
        return self.exponents[i].numpy() if self.compiled else self.exponents[i]

    def bind(self, i: int, kernel: Any, *rest: Any) -> Callable[[int, int], None]:
        """A kernel with tensor i, its grid and all the rest but the range of tiles: for `sweep`."""
        return _bind(kernel, self._flat(i), self._grid(i), *rest)

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
        calls: list[Callable[[int, int], None] | None] = []
        for i in range(len(self.tensors)):
            c = np.float32(eps[self.groups[i]])
            if c == 0.0:
                calls.append(None)
                continue
            theta, grid, stream, t = self._flat(i), self._grid(i), np.uint64(i), np.float32(times)
            kernels = self.kernels(i)
            if self.is_outer(i):
                a, b = self.factors(i, seeds)
                columns = self.tensors[i].shape[1]
                calls.append(_bind(kernels.look_outer, theta, grid, columns, a * c, b, t))
            else:
                look = kernels.look_signs if self.family.signs else kernels.look
                calls.append(_bind(look, theta, grid, seeds[0], stream, c, t))
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
        parts = _parts(
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
            theta, grid, stream = self._flat(i), self._grid(i), np.uint64(i)
            kernels = self.kernels(i)
            decay = self.decays_of(i, part.decays)
            if self.is_outer(i):
                a, b = self.factors(i, seeds) if draws is None else draws[i]
                a *= c[:, None] if self.compiled else torch.as_tensor(c[:, None], device=a.device)
                columns = self.tensors[i].shape[1]
                calls.append(
                    _bind(
                        kernels.update_outer,
                        theta,
                        grid,
                        columns,
                        stream,
                        dithers,
                        ends,
                        a,
                        b,
                        decay,
                    )
                )
            else:
                update = kernels.update_signs if self.family.signs else kernels.update
                home = np.float32(0.0 if back is None else back[group])
                calls.append(
                    _bind(update, theta, grid, stream, dithers, ends, seeds, c, decay, home)
                )
        self.sweep(calls)

    def decays_of(self, i: int, decays: NDArray[np.float32]) -> NDArray[np.float32]:
        """Weight decay leaves biases and norm scales (tensors of fewer than two dimensions) alone."""
        return decays if self.tensors[i].dim() >= 2 else np.zeros_like(decays)

    def sweep(self, calls: Sequence[Callable[[int, int], None] | None]) -> None:
        """Call every tensor's kernel, where it has one, over all of its tiles, with torch's number of threads.

        Threads take small shares as they come: after a forward torch's own threads spin for some milliseconds,
        and a thread of ours that has to make room for one would keep the others waiting.
        """
        threads = torch.get_num_threads() if self.compiled else 1
        key = (threads, *(call is None for call in calls))
        if self._shares[0] != key:
            tiles = [
                0 if call is None else len(exponents)
                for call, exponents in zip(calls, self.exponents, strict=True)
            ]
            most = max(sum(tiles) // _SMALLEST_SHARE, 1)
            self._shares = (key, _deal(tiles, min(_SHARES * threads, most)))
        shares = iter(self._shares[1])  # shared by all: a list's iterator hands out each item once

        def work() -> None:
            for share in shares:
                for i, first, last in share:
                    call = calls[i]
                    assert call is not None  # the shares hold no tile of a tensor that rests
                    call(first, last)

        helpers = min(threads, len(self._shares[1])) - 1
        futures = [_pool(threads - 1).submit(work) for _ in range(helpers)]
        try:
            work()
        finally:
            # Another thread's share must be done before anyone looks at the weights, whatever happened here.
            errors = [future.exception() for future in futures]
        for error in errors:
            if error is not None:
                raise error


def grid_floor(eps: float, family: Family) -> int:
    """The finest grid exponent k on which a look of length eps stays within GRID_LOOK multiples of 2^k."""
    return max(math.ceil(math.log2(eps * family.largest / spec.GRID_LOOK)), -100)


def _bind(kernel: Any, theta: Any, grid: Any, *rest: Any) -> Callable[[int, int], None]:
    def call(first: int, last: int) -> None:
        kernel(theta, grid, first, last, *rest)

    return call


def _deal(tiles: Sequence[int], count: int) -> list[list[tuple[int, int, int]]]:
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


_compiled: set[Family] = set()


def compile_kernels(family: Family) -> None:
    """Compile what a family needs (or load it from Numba's cache) ahead of the first look.

    Before a model is loaded is the best time: the compiler's memory is given back before the model needs its own.
    """
    if family in _compiled:
        return
    _compiled.add(family)
    tensors = [("matrix", torch.zeros(1, 1)), ("vector", torch.zeros(1))]
    tiny = Weights(tensors, [0, 0], family, [1e-3])
    seeds = np.zeros(1, np.uint64)
    tiny.draw(seeds)
    tiny.look(0, [1e-3], 1.0)
    tiny.update([Move(0, seeds, np.zeros((1, 1), np.float32), np.zeros(1, np.float32))])
    from justforward.noise import llvm

    llvm.release_compiler()


_pools: dict[int, ThreadPoolExecutor] = {}
os.register_at_fork(after_in_child=_pools.clear)  # threads do not survive a fork


def _pool(workers: int) -> ThreadPoolExecutor:
    if workers not in _pools:
        _pools[workers] = ThreadPoolExecutor(workers, thread_name_prefix="justforward")
    return _pools[workers]
