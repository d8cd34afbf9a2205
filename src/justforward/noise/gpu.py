"""Triton kernels: `cpu`, `moments` and `half` for tensors on a GPU. The same names, meaning and bits.

A program takes one tile of 1,024 weights, of float32 or of 16 bits (each a kernel of its own, from the same text), keeps it in registers for all steps and writes it once. What keeps the bits:
products and sums are never fused (`_launch` says so at every launch), square root and quotient are those that round
correctly, and rounding to an integer is arithmetic of its own. `TRITON_INTERPRET=1`, set before Triton is imported,
runs the same text on the CPU.
"""

# mypy: ignore-errors
# (Triton compiles what is in here; mypy cannot follow its types.)
from __future__ import annotations

import contextlib
import functools
import math
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from justforward.noise import spec
from justforward.noise.tiles import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    adapted,
    cross,
    draw,
    key,
    lane_words,
    lay,
    look_along,
    magnitude,
    outer,
    place,
    read,
    settle,
    write,
    write_nearest,
)

TILE = spec.TILE
OPTIONS = {"enable_fp_fusion": False}  # Triton's default is to fuse a * b + c, which rounds once
_TILE = tl.constexpr(TILE)
_FORMS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
_FAMILY = [
    {"DOMAIN": spec.DOMAIN_GAUSSIAN, "SIGNS": False},
    {"DOMAIN": spec.DOMAIN_RADEMACHER, "SIGNS": True},
]

# ---------------------------------------------------------------------------------------------- kernels
# Numbers that change from call to call are not to be specialised on: that would compile anew.
# `skip` tiles of a tensor come before theta and exponents, where these are a part of it: `size` and `first` count them.


@triton.jit(do_not_specialize=["tiles", "stream"])
def _fill_kernel(out, seeds, size, tiles, stream, DOMAIN: tl.constexpr, SIGNS: tl.constexpr):
    row, tile = tl.program_id(0) // tiles, (tl.program_id(0) % tiles).to(tl.int64)
    k0, k1 = key(tl.load(seeds + row))
    z = draw(tile, k0, k1, stream.to(tl.uint32), DOMAIN, SIGNS)
    at = tile * _TILE + tl.arange(0, _TILE)
    tl.store(out + row.to(tl.int64) * size + at, z, mask=at < size)


@triton.jit(do_not_specialize=["stream"])
def _lanes_kernel(out, steps, stream):
    words = lane_words(tl.load(steps + tl.program_id(0)), stream.to(tl.uint32))
    at = tl.program_id(0).to(tl.int64) * _TILE + tl.arange(0, _TILE)
    tl.store(out + at, words.to(tl.int32, bitcast=True))


@triton.jit(do_not_specialize=["floor"])
def _lay_kernel(theta, exponents, size, floor):
    tile, at, inside = place(0, size)
    w = tl.load(theta + at, mask=inside, other=0.0)
    w, k = lay(w, floor, magnitude(w))
    tl.store(theta + at, w, mask=inside)
    tl.store(exponents + tile, k.to(tl.int8))


@triton.jit(do_not_specialize=["skip", "first", "low", "high", "stream"])
def _look_kernel(
    theta, exponents, size, skip, first, low, high, stream, c, times, DOMAIN: tl.constexpr, SIGNS: tl.constexpr,
):  # fmt: skip
    theta, exponents = theta - skip.to(tl.int64) * _TILE, exponents - skip
    tile, at, inside = place(first, size)
    w = tl.load(theta + at, mask=inside, other=0.0)
    k = tl.load(exponents + tile).to(tl.int32)
    z = draw(tile, low.to(tl.uint32), high.to(tl.uint32), stream.to(tl.uint32), DOMAIN, SIGNS)
    tl.store(theta + at, look_along(w, k, z, c, times), mask=inside)


@triton.jit(do_not_specialize=["first"])
def _look_outer_kernel(theta, exponents, size, first, a, b, columns, times):
    tile, at, inside = place(first, size)
    w = tl.load(theta + at, mask=inside, other=0.0)
    k = tl.load(exponents + tile).to(tl.int32)
    row, column = cross(tile, columns)
    x = tl.load(a + row, mask=inside, other=0.0)
    z = x * tl.load(b + column, mask=inside, other=0.0)
    tl.store(theta + at, look_along(w, k, z, 1.0, times), mask=inside)


@triton.jit(do_not_specialize=["skip", "first", "stream", "count"])
def _update_kernel(
    theta, exponents, size, skip, first, stream, steps, ends, count, decays, lanes,
    seeds, cs, back, FORM: tl.constexpr, DOMAIN: tl.constexpr, SIGNS: tl.constexpr,
):  # fmt: skip
    theta, exponents = theta - skip.to(tl.int64) * _TILE, exponents - skip
    tile, at, inside = place(first, size)
    w = read(theta, at, inside, FORM)
    k = tl.load(exponents + tile).to(tl.int32)
    stream = stream.to(tl.uint32)
    for s in range(count):
        total = tl.zeros((_TILE,), tl.float32)
        z = tl.zeros((_TILE,), tl.float32)
        for d in range(tl.load(ends + s).to(tl.int32), tl.load(ends + s + 1).to(tl.int32)):
            k0, k1 = key(tl.load(seeds + d))
            z = draw(tile, k0, k1, stream, DOMAIN, SIGNS)
            total = total + z * tl.load(cs + d)
        if (s == 0) & (back != 0.0):
            w = look_along(w, k, z, back, 1.0)
        seed, decay = tl.load(steps + s), tl.load(decays + s)
        w, k = settle(w, k, total, inside, tile, seed, stream, lanes + s * _TILE, decay, FORM)
    write(theta, at, inside, w, FORM)
    tl.store(exponents + tile, k.to(tl.int8))


@triton.jit(do_not_specialize=["first", "stream", "count"])
def _update_outer_kernel(
    theta, exponents, size, first, stream, steps, ends, count, decays, lanes,
    a, b, rows, columns, FORM: tl.constexpr,
):  # fmt: skip
    tile, at, inside = place(first, size)
    w = read(theta, at, inside, FORM)
    k = tl.load(exponents + tile).to(tl.int32)
    row, column = cross(tile, columns)
    stream = stream.to(tl.uint32)
    for s in range(count):
        d0, d1 = tl.load(ends + s), tl.load(ends + s + 1)
        total = outer(a, b, row, column, inside, rows, columns, d0, d1)
        seed, decay = tl.load(steps + s), tl.load(decays + s)
        w, k = settle(w, k, total, inside, tile, seed, stream, lanes + s * _TILE, decay, FORM)
    write(theta, at, inside, w, FORM)
    tl.store(exponents + tile, k.to(tl.int8))


@triton.jit(do_not_specialize=["first", "stream", "count", "before", "window"])
def _adapt_kernel(
    theta, exponents, size, first, stream, steps, ends, count, decays, lanes,
    sum1, sum2, rates, shares, beta1, beta2, eps, before, window, seeds, cs, back, a, b, rows, columns,
    FORM: tl.constexpr, DOMAIN: tl.constexpr, SIGNS: tl.constexpr, OUTER: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    tile, at, inside = place(first, size)
    w = read(theta, at, inside, FORM)
    k = tl.load(exponents + tile).to(tl.int32)
    stream = stream.to(tl.uint32)
    if OUTER:
        row, column = cross(tile, columns)
    elif back != 0.0:
        k0, k1 = key(tl.load(seeds + tl.load(ends + before + 1) - 1))
        w = look_along(w, k, draw(tile, k0, k1, stream, DOMAIN, SIGNS), back, 1.0)
    m = tl.zeros((_TILE,), tl.float32)
    v = tl.zeros((_TILE,), tl.float32)
    if KEPT:
        m = tl.load(sum1 + at, mask=inside, other=0.0)
        v = tl.load(sum2 + at, mask=inside, other=0.0)
    for s in range(count):
        newest = before + s
        oldest = newest
        if not KEPT:
            # The window's estimates are made again: a ring of them would have to be in the GPU's own memory.
            oldest = tl.maximum(newest + 1 - window, 0)
            m = tl.zeros((_TILE,), tl.float32)
            v = tl.zeros((_TILE,), tl.float32)
        for j in range(oldest, newest + 1):
            d0, d1 = tl.load(ends + j), tl.load(ends + j + 1)
            if OUTER:
                g = outer(a, b, row, column, inside, rows, columns, d0, d1)
            else:
                g = tl.zeros((_TILE,), tl.float32)
                for d in range(d0.to(tl.int32), d1.to(tl.int32)):
                    k0, k1 = key(tl.load(seeds + d))
                    g = g + draw(tile, k0, k1, stream, DOMAIN, SIGNS) * tl.load(cs + d)
            m = m * beta1 + g
            v = v * beta2 + g * g
        total = adapted(m, v, shares + 2 * s, tl.load(rates + s), eps)
        seed, decay = tl.load(steps + s), tl.load(decays + s)
        w, k = settle(w, k, total, inside, tile, seed, stream, lanes + s * _TILE, decay, FORM)
    write(theta, at, inside, w, FORM)
    tl.store(exponents + tile, k.to(tl.int8))
    if KEPT:
        tl.store(sum1 + at, m, mask=inside)
        tl.store(sum2 + at, v, mask=inside)


@triton.jit(do_not_specialize=["skip", "length", "most", "stream", "count"])
def _widen_kernel(
    theta, out, skip, starts, length, most, stream, seeds, cs, count,
    FORM: tl.constexpr, OUT: tl.constexpr, DOMAIN: tl.constexpr, SIGNS: tl.constexpr,
):  # fmt: skip
    theta = theta - skip.to(tl.int64) * _TILE
    row = (tl.program_id(0) // most).to(tl.int64)
    first = tl.load(starts + row)
    tile = first // _TILE + tl.program_id(0) % most
    stream = stream.to(tl.uint32)
    if tile * _TILE < first + length:
        at = tile * _TILE + tl.arange(0, _TILE)
        inside = (at >= first) & (at < first + length)
        w = read(theta, at, inside, FORM)
        for d in range(count):
            k0, k1 = key(tl.load(seeds + d))
            w = w + draw(tile, k0, k1, stream, DOMAIN, SIGNS) * tl.load(cs + d)
        write_nearest(out, row * length + (at - first), inside, w, OUT)


# -------------------------------------------------------------------------------- the names of `cpu`


def _launch(
    kernel: Any, programs: int, device: torch.device, *arguments: Any, **constants: Any
) -> None:
    if programs > 0:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            kernel[(programs,)](*arguments, **constants, **OPTIONS)


@functools.lru_cache(maxsize=64)
def _copied(data: bytes, kind: str, device: torch.device) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, kind).copy()).to(device)


def _put(values: Any, kind: Any, device: torch.device) -> Tensor:
    """An array on the device, to be read only: a step has the same ones for all tensors."""
    array = np.asarray(values, kind)
    return _copied(array.tobytes(), "<i8" if array.dtype == np.uint64 else array.dtype.str, device)


def _signed(word: int) -> int:
    """The int32 with the bits of a word, so that the type of an argument never depends on its value."""
    return word - (1 << 32) if word >> 31 else word


def _seen(theta: Tensor) -> Tensor:
    """Weights as the kernels see them."""
    return theta if theta.dtype == torch.float32 else theta.view(torch.int16)


def _size(theta: Tensor, skip: int) -> int:
    """How many elements the tensor has up to the end of this part."""
    return skip * TILE + len(theta)


def _tiles(size: int) -> int:
    return -(-size // TILE)


def _taken(theta: Tensor, stream: Any, steps: Any, ends: Any, decays: Any) -> tuple[Any, ...]:
    """What all kernels of steps take, from `stream` on."""
    device = theta.device
    seeds, number = _put(steps, np.uint64, device), _signed(int(stream))
    lanes = torch.empty(len(steps) * TILE, dtype=torch.int32, device=device)
    _launch(_lanes_kernel, len(steps), device, lanes, seeds, number)
    starts = np.concatenate([[0], np.asarray(ends, np.int64)])
    held = _put(starts, np.int64, device), len(steps), _put(decays, np.float32, device)
    return (number, seeds, *held, lanes)


def fill_rows(out: Tensor, seeds: Any, stream: Any, domain: int, signs: bool) -> None:
    """See `cpu.fill_rows`."""
    rows, size = out.shape
    tiles = _tiles(size)
    held = _put(seeds, np.uint64, out.device)
    _launch(_fill_kernel, rows * tiles, out.device, out, held, size, tiles, _signed(int(stream)),
            DOMAIN=int(domain), SIGNS=bool(signs))  # fmt: skip


def lay_grid(theta: Tensor, exponents: Tensor, floor: int) -> int:
    """See `cpu.lay_grid`; where a weight is not finite, none is moved."""
    if len(theta) and not math.isfinite(torch.linalg.vector_norm(theta, math.inf)):
        return int((~theta.isfinite()).nonzero()[0])
    _launch(_lay_kernel, len(exponents), theta.device, theta, exponents, len(theta), int(floor))
    return -1


def look(
    theta, exponents, first, last, seed, stream, c, times, *, signs: bool = False, skip: int = 0
) -> None:  # fmt: skip
    """See `plain.look`."""
    seed = int(seed)
    words = (_signed(seed & 0xFFFFFFFF), _signed(seed >> 32), _signed(int(stream)))
    _launch(_look_kernel, last - first, theta.device, theta, exponents, _size(theta, skip), skip, first, *words,
            float(c), float(times), **_FAMILY[signs])  # fmt: skip


def look_signs(*arguments: Any, skip: int = 0) -> None:
    """See `plain.look_signs`."""
    look(*arguments, signs=True, skip=skip)


def look_outer(theta, exponents, first, last, columns, a, b, times) -> None:
    """See `cpu.look_outer`."""
    _launch(_look_outer_kernel, last - first, theta.device, theta, exponents, len(theta), first,
            a.contiguous(), b.contiguous(), int(columns), float(times))  # fmt: skip


def update(
    theta, exponents, first, last, stream, steps, ends, seeds, cs, decays, back, *, signs: bool = False, skip: int = 0
) -> None:  # fmt: skip
    """See `plain.update`."""
    device = theta.device
    directions = _put(seeds, np.uint64, device), _put(cs, np.float32, device)
    _launch(_update_kernel, last - first, device, _seen(theta), exponents, _size(theta, skip), skip, first,
            *_taken(theta, stream, steps, ends, decays), *directions, float(back), FORM=_FORMS[theta.dtype], **_FAMILY[signs])  # fmt: skip


def update_signs(*arguments: Any, skip: int = 0) -> None:
    """See `plain.update_signs`."""
    update(*arguments, signs=True, skip=skip)


def update_outer(
    theta, exponents, first, last, columns, stream, steps, ends, a, b, decays
) -> None:  # fmt: skip
    """See `cpu.update_outer`."""
    _launch(_update_outer_kernel, last - first, theta.device, _seen(theta), exponents, len(theta), first,
            *_taken(theta, stream, steps, ends, decays), a.contiguous(), b.contiguous(), a.shape[1], int(columns),
            FORM=_FORMS[theta.dtype])  # fmt: skip


def _adapt(
    theta, exponents, first, last, sum1, sum2, steps, ends, rates, decays, shares,
    beta1, beta2, eps, window, stream, directions: tuple[Any, ...], **constants: bool,
) -> None:  # fmt: skip
    device, kept = theta.device, int(window) == 0
    sums = (sum1, sum2) if kept else (exponents, exponents)  # not touched
    _launch(_adapt_kernel, last - first, device, _seen(theta), exponents, len(theta), first,
            *_taken(theta, stream, steps, ends, decays), *sums, _put(rates, np.float32, device),
            _put(shares, np.float32, device), float(beta1), float(beta2), float(eps), len(ends) - len(steps),
            int(window), *directions, **constants, FORM=_FORMS[theta.dtype], KEPT=kept)  # fmt: skip


def adapt(
    theta, exponents, first, last, sum1, sum2, steps, ends, rates, decays, shares,
    beta1, beta2, eps, window, stream, seeds, cs, back, *, signs: bool = False,
) -> None:  # fmt: skip
    """See `moments.adapt`."""
    held = _put(seeds, np.uint64, theta.device), _put(cs, np.float32, theta.device), float(back)
    _adapt(theta, exponents, first, last, sum1, sum2, steps, ends, rates, decays, shares, beta1, beta2, eps, window,
           stream, (*held, exponents, exponents, 0, 0), **_FAMILY[signs], OUTER=False)  # fmt: skip


def adapt_signs(*arguments: Any) -> None:
    """See `moments.adapt_signs`."""
    adapt(*arguments, signs=True)


def adapt_outer(
    theta, exponents, first, last, sum1, sum2, steps, ends, rates, decays, shares,
    beta1, beta2, eps, window, stream, columns, a, b,
) -> None:  # fmt: skip
    """See `moments.adapt_outer`."""
    directions = (
        exponents,
        exponents,
        0.0,
        a.contiguous(),
        b.contiguous(),
        a.shape[1],
        int(columns),
    )
    _adapt(theta, exponents, first, last, sum1, sum2, steps, ends, rates, decays, shares, beta1, beta2, eps, window,
           stream, directions, **_FAMILY[0], OUTER=True)  # fmt: skip


def _widen(
    theta, out, starts: Tensor, length: int, stream, seeds, cs, signs: bool, skip: int = 0
) -> None:  # fmt: skip
    most = (length + TILE - 2) // TILE + 1  # tiles that so many elements touch, wherever they begin
    directions = _put(seeds, np.uint64, theta.device), _put(cs, np.float32, theta.device)
    _launch(_widen_kernel, len(starts) * most, theta.device, _seen(theta), _seen(out), skip, starts, length, most,
            _signed(int(stream)), *directions, len(seeds), FORM=_FORMS[theta.dtype], OUT=_FORMS[out.dtype],
            **_FAMILY[signs])  # fmt: skip


def widen(
    theta, out, first, last, stream, seeds, cs, *, signs: bool = False, skip: int = 0
) -> None:  # fmt: skip
    """See `plain.widen`."""
    if last > first:
        starts = _put([first], np.int64, theta.device)
        _widen(theta, out, starts, last - first, stream, seeds, cs, signs, skip)


def widen_signs(*arguments: Any, skip: int = 0) -> None:
    """See `plain.widen_signs`."""
    widen(*arguments, signs=True, skip=skip)


def widen_rows(theta, out, rows, stream, seeds, cs, signs) -> None:
    """See `plain.widen_rows`."""
    length = out.shape[1]
    if length:
        _widen(theta, out, rows.to(torch.int64) * length, length, stream, seeds, cs, bool(signs))
