"""The kernels of `cpu` in plain torch: the same names, the same bits, on any device.

Tests hold `cpu`, `moments`, `half` and `gpu` to these, and tensors that none of them can take use them. Slow: noise passes
through memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
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


def _chunks(
    theta: Tensor, exponents: Tensor, first: int, last: int, most: int = _CHUNK, skip: int = 0
) -> Any:
    for tile in range(first, last, most):
        here, end = tile - skip, min(tile + most, last) - skip
        yield tile * TILE, theta[here * TILE : end * TILE], exponents[here:end]


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
    skip: int = 0,
) -> None:
    """See `cpu.look`; scaling by a power of two is exact, so c z / q and (c / q) z are the same.

    `skip` tiles of the tensor come before `theta`, which is a part of it.
    """
    for start, part, grid in _chunks(theta, exponents, first, last, skip=skip):
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
    skip: int = 0,
) -> None:
    """See `cpu.look_signs`."""
    look(theta, exponents, first, last, seed, stream, c, times, True, skip)


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


_FORMS = {torch.bfloat16: spec.BFLOAT16, torch.float16: spec.FLOAT16}


def _opened(
    theta: Tensor, exponents: Tensor, first: int, last: int, most: int = _CHUNK, skip: int = 0
) -> Iterator[tuple[int, Tensor, Tensor, spec.Form | None]]:
    """As `_chunks`, with 16-bit weights as float32: what has become of them is written back behind the caller."""
    form = _FORMS.get(theta.dtype)
    for start, part, grid in _chunks(theta, exponents, first, last, most, skip):
        wide = part.float()  # the very part where it is float32
        yield start, wide, grid, form
        if form is not None:
            part.copy_(wide)


def _settle_half(part: Tensor, flags: Tensor, total: Tensor, u: Tensor, form: spec.Form) -> None:
    largest = torch.maximum(part.abs(), (part + total).abs())
    k = ((largest.view(torch.int32) >> 23) - form.bits).clamp_min(form.least)
    q, inverse = _powers(k), _powers(-k)
    n = part * inverse
    whole = n.floor()
    moved = (whole + (total * inverse + ((n - whole) + u)).floor()) * q
    held = torch.zeros(len(flags) * TILE, dtype=torch.bool, device=part.device)
    held[: len(part)] = moved.abs() > form.largest
    flags[held.view(-1, TILE).any(1)] = 1
    part.copy_(moved.clamp(-form.largest, form.largest))


def add_rounded(theta: Tensor, total: Tensor, seed: int = 0) -> None:
    """Add float32 [n] to 16-bit weights [n], rounded stochastically with the dither of a step of that seed."""
    flags = torch.zeros(-(-len(theta) // TILE), dtype=torch.int8, device=theta.device)
    for start, part, grid, form in _opened(theta, flags, 0, len(flags)):
        own = total[start : start + len(part)]
        _settle(part, grid, own, start, seed, 0, 0.0, form)


def widen(
    theta: Tensor,
    out: Tensor,
    first: int,
    last: int,
    stream: Any,
    seeds: Any,
    cs: Any,
    signs: bool = False,
    skip: int = 0,
) -> None:
    """See `half._make_widen`; here `out` may be of 16 bits, and what is written is rounded to the nearest; `skip` as in `look`."""
    wide = theta[first - skip * TILE : last - skip * TILE].float()
    for seed, c in zip(seeds, cs, strict=True):
        wide += _z(seed, stream, first, last - first, signs, theta.device) * float(c)
    out.copy_(wide)


def widen_signs(
    theta: Tensor,
    out: Tensor,
    first: int,
    last: int,
    stream: Any,
    seeds: Any,
    cs: Any,
    skip: int = 0,
) -> None:
    """`widen` with z rademacher."""
    widen(theta, out, first, last, stream, seeds, cs, True, skip)


def widen_rows(
    theta: Tensor, out: Tensor, rows: Tensor, stream: Any, seeds: Any, cs: Any, signs: bool
) -> None:
    """`widen` of the rows (int64 [R]) of a matrix into `out` [R, columns]."""
    columns = out.shape[1]
    for r, row in enumerate(rows.tolist()):
        widen(theta, out[r], row * columns, (row + 1) * columns, stream, seeds, cs, signs)


def _settle(
    part: Tensor,
    grid: Tensor,
    total: Tensor,
    start: int,
    step: int,
    stream: Any,
    decay: float,
    form: spec.Form | None,
) -> None:
    size = len(part)
    if decay != 0.0:
        total = total - part * decay
    u = reference.dither(step, int(stream), start, size, part.device)
    if form is not None:
        _settle_half(part, grid, total, u, form)
        return
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
    skip: int = 0,
) -> None:
    """See `cpu.update`; `skip` as in `look`."""
    for start, part, grid, form in _opened(theta, exponents, first, last, skip=skip):
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
            _settle(part, grid, total, start, int(step), stream, float(decays[s]), form)


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
    skip: int = 0,
) -> None:
    """See `cpu.update_signs`."""
    given = (theta, exponents, first, last, stream, steps, ends, seeds, cs, decays, back)
    update(*given, True, skip)


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
    for start, part, grid, form in _opened(theta, exponents, first, last):
        d = 0
        for s, step in enumerate(steps):
            total = _outer(start, len(part), columns, a[d : int(ends[s])], b[d : int(ends[s])])
            d = int(ends[s])
            _settle(part, grid, total, start, int(step), stream, float(decays[s]), form)


def _adapt(
    theta: Tensor,
    exponents: Tensor,
    first: int,
    last: int,
    sums: tuple[Tensor, Tensor],
    steps: Any,
    ends: Any,
    rates: Any,
    decays: Any,
    shares: Any,
    constants: tuple[Any, Any, Any, int],
    stream: Any,
    back: float,
    draw: Callable[[int, int, int, int], tuple[Tensor, Tensor | None]],
) -> None:
    """`draw(start, size, d0, d1)`: sum of the directions d0 .. d1 times their coefficients, and the last z."""
    beta1, beta2, eps, window = (*map(float, constants[:3]), constants[3])
    before = len(ends) - len(steps)
    # A chunk holds the estimates of its window.
    most = max(_CHUNK // max(window, 1), 1)
    for start, part, grid, form in _opened(theta, exponents, first, last, most):
        mine = slice(start, start + len(part))
        ring: deque[Tensor] = deque(maxlen=max(window, 1))
        d = 0
        for j, end in enumerate(ends):
            estimate, z = draw(start, len(part), d, int(end))
            ring.append(estimate)
            d = int(end)
            if j < before:
                continue
            s = j - before
            if s == 0 and back != 0.0 and z is not None:
                _look(part, grid, z * back, 1.0)
            if window == 0:
                m, v = reference.follow(sums[0][mine], sums[1][mine], estimate, beta1, beta2)
                sums[0][mine], sums[1][mine] = m, v
            else:
                m = v = torch.zeros_like(part)
                for g in ring:
                    m, v = reference.follow(m, v, g, beta1, beta2)
            share = (float(shares[s][0]), float(shares[s][1]))
            total = reference.adapted(m, v, share, float(rates[s]), eps)
            _settle(part, grid, total, start, int(steps[s]), stream, float(decays[s]), form)


def adapt(
    theta: Tensor,
    exponents: Tensor,
    first: int,
    last: int,
    sum1: Tensor,
    sum2: Tensor,
    steps: Any,
    ends: Any,
    rates: Any,
    decays: Any,
    shares: Any,
    beta1: Any,
    beta2: Any,
    eps: Any,
    window: int,
    stream: Any,
    seeds: Any,
    cs: Any,
    back: Any,
    *,
    signs: bool = False,
) -> None:
    """See `moments.adapt`."""

    def draw(start: int, size: int, d0: int, d1: int) -> tuple[Tensor, Tensor | None]:
        total, z = torch.zeros(size, device=theta.device), None
        for d in range(d0, d1):
            z = _z(seeds[d], stream, start, size, signs, theta.device)
            total = total + z * float(cs[d])
        return total, z

    _adapt(theta, exponents, first, last, (sum1, sum2), steps, ends, rates, decays, shares,
           (beta1, beta2, eps, window), stream, float(back), draw)  # fmt: skip


def adapt_signs(*arguments: Any) -> None:
    """See `moments.adapt_signs`."""
    adapt(*arguments, signs=True)


def adapt_outer(
    theta: Tensor,
    exponents: Tensor,
    first: int,
    last: int,
    sum1: Tensor,
    sum2: Tensor,
    steps: Any,
    ends: Any,
    rates: Any,
    decays: Any,
    shares: Any,
    beta1: Any,
    beta2: Any,
    eps: Any,
    window: int,
    stream: Any,
    columns: int,
    a: Tensor,
    b: Tensor,
) -> None:
    """See `moments.adapt_outer`."""

    def draw(start: int, size: int, d0: int, d1: int) -> tuple[Tensor, Tensor | None]:
        return _outer(start, size, columns, a[d0:d1], b[d0:d1]), None

    _adapt(theta, exponents, first, last, (sum1, sum2), steps, ends, rates, decays, shares,
           (beta1, beta2, eps, window), stream, 0.0, draw)  # fmt: skip
