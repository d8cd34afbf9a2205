"""The kernels of `cpu` in plain torch: the same names, the same bits, on any device.

Tests hold `cpu` to these, and tensors that are not on the CPU use them. Slow: noise passes through memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from justforward.noise import reference, spec

TILE = spec.TILE
_LIMIT = spec.GRID_LIMIT
_CHUNK = 1024  # tiles


def _powers(exponents: Tensor) -> Tensor:
    """2^k as float32, by its bits."""
    return ((exponents.to(torch.int32) + 127) << 23).view(torch.float32)


def _power(exponents: Tensor, size: int) -> Tensor:
    """2^k of each element: float32 [size]."""
    return _powers(exponents).repeat_interleave(TILE)[:size]


def _z(seed: Any, stream: Any, start: int, size: int, signs: bool, device: torch.device) -> Tensor:
    draw = reference.rademacher if signs else reference.normal
    return draw(int(seed), int(stream), start, size, device=device)


def fill_rows(out: Tensor, seeds: Any, stream: Any, domain: int, signs: bool) -> None:
    """See `cpu.fill_rows`."""
    draw = reference.rademacher if signs else reference.normal
    for r, seed in enumerate(seeds):
        out[r] = draw(int(seed), int(stream), 0, out.shape[1], domain, out.device)


def lay_grid(theta: Tensor, exponents: Tensor, floor: int) -> int:
    """See `cpu.lay_grid`."""
    bad = (~theta.isfinite()).nonzero()
    if len(bad):
        return int(bad[0])
    _lay(theta, exponents, torch.full_like(exponents, floor))
    return -1


def _lay(theta: Tensor, exponents: Tensor, least: Tensor) -> None:
    """The smallest grid at or above `least` that holds each tile; weights rounded to it."""
    padded = torch.zeros(len(exponents) * TILE, device=theta.device)
    padded[: len(theta)] = theta.abs()
    largest = padded.view(-1, TILE).amax(1) if len(exponents) else padded
    k = least.clone()
    for _ in range(256):
        short = (largest > _LIMIT * _powers(k)) & (k < 100)
        if not short.any():
            break
        k += short.to(k.dtype)
    exponents.copy_(k)
    theta.copy_(
        (theta * _power(-k, len(theta))).round() * _power(k, len(theta)) + 0.0
    )  # never -0.0


def _look(theta: Tensor, exponents: Tensor, moves: Tensor, times: float) -> None:
    size = len(theta)
    steps = (moves * _power(-exponents, size)).round()
    theta.add_(steps * (_power(exponents, size) * float(times)))


def _chunks(theta: Tensor, exponents: Tensor, first: int, last: int) -> Any:
    for tile in range(first, last, _CHUNK):
        end = min(tile + _CHUNK, last)
        yield tile * TILE, theta[tile * TILE : end * TILE], exponents[tile:end]


def look(
    theta: Tensor,
    exponents: Tensor,
    first: int,
    last: int,
    seed: Any,
    stream: Any,
    c: Any,
    times: Any,
    signs: bool = False,
) -> None:
    """See `cpu.look`; scaling by a power of two is exact, so c z / q and (c / q) z are the same."""
    for start, part, grid in _chunks(theta, exponents, first, last):
        z = _z(seed, stream, start, len(part), signs, theta.device)
        _look(part, grid, z * float(c), times)


def look_signs(
    theta: Tensor,
    exponents: Tensor,
    first: int,
    last: int,
    seed: Any,
    stream: Any,
    c: Any,
    times: Any,
) -> None:
    """See `cpu.look_signs`."""
    look(theta, exponents, first, last, seed, stream, c, times, signs=True)


def _outer(start: int, size: int, columns: int, a: Tensor, b: Tensor) -> Tensor:
    index = torch.arange(start, start + size, device=a.device)
    total = torch.zeros(size, device=a.device)
    for d in range(len(a)):
        total = total + a[d, index // columns] * b[d, index % columns]
    return total


def look_outer(
    theta: Tensor,
    exponents: Tensor,
    first: int,
    last: int,
    columns: int,
    a: Tensor,
    b: Tensor,
    times: Any,
) -> None:
    """See `cpu.look_outer`."""
    for start, part, grid in _chunks(theta, exponents, first, last):
        _look(part, grid, _outer(start, len(part), columns, a, b), times)


def _settle(
    part: Tensor, grid: Tensor, total: Tensor, start: int, step: int, stream: Any, decay: float
) -> None:
    size = len(part)
    if decay != 0.0:
        total = total - part * decay
    u = reference.dither(step, int(stream), start, size, part.device)
    part.add_((total * _power(-grid, size) + u).floor() * _power(grid, size))
    padded = torch.zeros(len(grid) * TILE, device=part.device)
    padded[:size] = part.abs()
    q = _powers(grid)
    for tile in (padded.view(-1, TILE).amax(1) > _LIMIT * q).nonzero()[:, 0].tolist():
        _lay(part[tile * TILE : (tile + 1) * TILE], grid[tile : tile + 1], grid[tile : tile + 1])


def update(
    theta: Tensor,
    exponents: Tensor,
    first: int,
    last: int,
    stream: Any,
    steps: Any,
    ends: Any,
    seeds: Any,
    cs: Any,
    decays: Any,
    back: Any,
    signs: bool = False,
) -> None:
    """See `cpu.update`."""
    for start, part, grid in _chunks(theta, exponents, first, last):
        d = 0
        for s, step in enumerate(steps):
            total = torch.zeros_like(part)
            z = total
            while d < int(ends[s]):
                z = _z(seeds[d], stream, start, len(part), signs, theta.device)
                total = total + z * float(cs[d])
                d += 1
            if s == 0 and float(back) != 0.0:
                _look(part, grid, z * float(back), 1.0)
            _settle(part, grid, total, start, int(step), stream, float(decays[s]))


def update_signs(
    theta: Tensor,
    exponents: Tensor,
    first: int,
    last: int,
    stream: Any,
    steps: Any,
    ends: Any,
    seeds: Any,
    cs: Any,
    decays: Any,
    back: Any,
) -> None:
    """See `cpu.update_signs`."""
    update(theta, exponents, first, last, stream, steps, ends, seeds, cs, decays, back, signs=True)


def update_outer(
    theta: Tensor,
    exponents: Tensor,
    first: int,
    last: int,
    columns: int,
    stream: Any,
    steps: Any,
    ends: Any,
    a: Tensor,
    b: Tensor,
    decays: Any,
) -> None:
    """See `cpu.update_outer`."""
    for start, part, grid in _chunks(theta, exponents, first, last):
        d = 0
        for s, step in enumerate(steps):
            total = _outer(start, len(part), columns, a[d : int(ends[s])], b[d : int(ends[s])])
            d = int(ends[s])
            _settle(part, grid, total, start, int(step), stream, float(decays[s]))
