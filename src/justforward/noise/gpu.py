"""Triton kernels: `cpu` and `moments` for tensors on a GPU. The same names, meaning and bits.

A program takes one tile of 1,024 weights, keeps it in registers for all steps and writes it once. What keeps the bits:
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

TILE = spec.TILE
OPTIONS = {"enable_fp_fusion": False}  # Triton's default is to fuse a * b + c, which rounds once

_TILE = tl.constexpr(TILE)
_ROUNDS = tl.constexpr(spec.PHILOX_ROUNDS)
_M0, _M1 = (tl.constexpr(m) for m in spec.PHILOX_MULTIPLIERS)
_W0, _W1 = (tl.constexpr(w) for w in spec.PHILOX_WEYL)
_L0, _L1, _L2, _L3, _L4, _L5, _L6 = (tl.constexpr(c) for c in spec.LOG_COEFFICIENTS)
_LN2, _ROOT = tl.constexpr(spec.MINUS_TWO_LN_2), tl.constexpr(spec.SQRT_HALF_BITS)
_S0, _S1, _S2 = (tl.constexpr(c) for c in spec.SIN_COEFFICIENTS)
_C0, _C1, _C2, _C3 = (tl.constexpr(c) for c in spec.COS_COEFFICIENTS)
_POW_M32, _POW_M24 = tl.constexpr(2.0**-32), tl.constexpr(2.0**-24)
_POW_23, _POW_23_BITS = tl.constexpr(2.0**23), tl.constexpr(0x4B000000)
_SIGN, _SIZE, _ONE_BITS = (tl.constexpr(b) for b in (0x80000000, 0x7FFFFFFF, 0x3F800000))
_D0 = tl.constexpr(spec.DITHER_MULTIPLIER)
_DITHER_TILE = tl.constexpr(spec.DOMAIN_DITHER_TILE)
_DITHER_LANE = tl.constexpr(spec.DOMAIN_DITHER_LANE)
_GAUSSIAN = tl.constexpr(spec.DOMAIN_GAUSSIAN)
_RADEMACHER = tl.constexpr(spec.DOMAIN_RADEMACHER)
_LIMIT = tl.constexpr(spec.GRID_LIMIT)

# ------------------------------------------------------------------------------------- within a program


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):
    for _ in tl.static_range(_ROUNDS):
        h0, l0 = tl.umulhi(c0, _M0), c0 * _M0
        h1, l1 = tl.umulhi(c2, _M1), c2 * _M1
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = k0 + _W0, k1 + _W1
    return c0, c1, c2, c3


@triton.jit
def _key(seed):
    """The two words of a seed, which is an int64 of the same bits."""
    return seed.to(tl.uint32), (seed >> 32).to(tl.uint32)


@triton.jit
def _blocks(first, within, k0, k1, stream, DOMAIN: tl.constexpr):
    """The four words of blocks first + within; as in `cpu`, only the low word of the counter varies."""
    low, high = first.to(tl.uint32) + within.to(tl.uint32), (first >> 32).to(tl.uint32)
    return _philox(low, high, stream, DOMAIN, k0, k1)


@triton.jit
def _box_muller(x, y):
    v = (x >> 1).to(tl.int32).to(tl.float32) + 0.5
    i = v.to(tl.int32, bitcast=True)
    e = (i - _ROOT) >> 23
    f = (i - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    p = ((((((f * _L6 + _L5) * f + _L4) * f + _L3) * f + _L2) * f + _L1) * f) + _L0
    radius = tl.sqrt_rn((e - 31).to(tl.float32) * _LN2 + p * f)
    t = (y << 2).to(tl.int32, bitcast=True).to(tl.float32) * _POW_M32
    s = t * t
    sine = ((s * _S2 + _S1) * s + _S0) * t
    cosine = ((s * _C3 + _C2) * s + _C1) * s + _C0
    odd = (y & 0x40000000) != 0
    first = tl.where(odd, sine, cosine).to(tl.uint32, bitcast=True) ^ ((y ^ (y << 1)) & _SIGN)
    second = tl.where(odd, cosine, sine).to(tl.uint32, bitcast=True) ^ (y & _SIGN)
    return radius * first.to(tl.float32, bitcast=True), radius * second.to(
        tl.float32, bitcast=True
    )


@triton.jit
def _gaussian(tile, k0, k1, stream, DOMAIN: tl.constexpr):
    w0, w1, w2, w3 = _blocks(tile * 256, tl.arange(0, 256), k0, k1, stream, DOMAIN)
    z0, z1 = _box_muller(w0, w1)
    z2, z3 = _box_muller(w2, w3)
    z = tl.join(tl.join(z0, z2), tl.join(z1, z3))  # [b, i, j]: element 512 i + 256 j + b
    return tl.reshape(tl.permute(z, (1, 2, 0)), (_TILE,))


@triton.jit
def _signs(tile, k0, k1, stream, DOMAIN: tl.constexpr):
    lane = tl.arange(0, 32)
    w0, w1, w2, w3 = _blocks(tile * 8, lane % 8, k0, k1, stream, DOMAIN)
    word = tl.where(lane < 16, tl.where(lane < 8, w0, w1), tl.where(lane < 24, w2, w3))
    shift = (31 - tl.arange(0, 32)).to(tl.uint32)
    sign = (word[None, :] << shift[:, None]) & _SIGN
    return tl.reshape((sign | _ONE_BITS).to(tl.float32, bitcast=True), (_TILE,))


@triton.jit
def _draw(tile, k0, k1, stream, SIGNS: tl.constexpr):
    """z of one tile: float32 [1024]."""
    if SIGNS:
        z = _signs(tile, k0, k1, stream, _RADEMACHER)
    else:
        z = _gaussian(tile, k0, k1, stream, _GAUSSIAN)
    return z


@triton.jit
def _power(k):
    """2^k, -126 <= k <= 127."""
    return ((k + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _rint(x):
    """To the nearest integer, ties to even: adding 2^23 leaves no bits for a fraction."""
    bits = x.to(tl.uint32, bitcast=True)
    large = ((bits & _SIGN) | _POW_23_BITS).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(x) < _POW_23, (x + large) - large, x)


@triton.jit
def _largest(w):
    bits = w.to(tl.int32, bitcast=True) & _SIZE
    return tl.max(bits, axis=0).to(tl.float32, bitcast=True)


@triton.jit
def _lay(w, k, largest):
    """The smallest grid at or above k that holds a tile, and its weights rounded to it; never -0.0."""
    while (k < 100) & (largest > _power(k) * _LIMIT):
        k += 1
    return _rint(w * _power(-k)) * _power(k) + 0.0, k


@triton.jit
def _place(first, size):
    """This program's tile, where its weights are, and which of them are there."""
    tile = first + tl.program_id(0).to(tl.int64)
    at = tile * _TILE + tl.arange(0, _TILE)
    return tile, at, at < size


@triton.jit
def _word(tile, seed, stream):
    """The dither's word of a tile."""
    k0, k1 = _key(seed)
    w0, w1, w2, w3 = _blocks(tile >> 2, tl.zeros((1,), tl.int32), k0, k1, stream, _DITHER_TILE)
    lane = tile & 3
    return tl.where(lane < 2, tl.where(lane < 1, w0, w1), tl.where(lane < 3, w2, w3))


@triton.jit
def _settle(w, k, total, inside, tile, seed, stream, lanes, decay):
    """w += q floor((total - decay w) / q + dither), and a coarser grid when the headroom is used up."""
    if decay != 0.0:
        total = total - w * decay
    q = _power(k)
    h = tl.load(lanes + tl.arange(0, _TILE)).to(tl.uint32, bitcast=True)
    h = h + _word(tile, seed, stream)
    h = (h ^ (h >> 16)) * _D0
    u = (h >> 8).to(tl.int32).to(tl.float32) * _POW_M24
    w = tl.where(inside, w + tl.floor(total * _power(-k) + u) * q, 0.0)
    largest = _largest(w)
    if largest > q * _LIMIT:
        w, k = _lay(w, k, largest)
    return w, k


@triton.jit
def _cross(tile, columns):
    """Row and column of each element of a tile."""
    start = tile * _TILE
    row = start // columns
    within = (start - row * columns).to(tl.int32) + tl.arange(0, _TILE)
    return row + within // columns, within % columns


@triton.jit
def _outer(a, b, row, column, inside, rows, columns, d0, d1):
    """The sum over d of a[d, row] b[d, column], in order."""
    a += d0 * rows
    b += d0 * columns
    total = tl.zeros((_TILE,), tl.float32)
    for _ in range(d0.to(tl.int32), d1.to(tl.int32)):
        x = tl.load(a + row, mask=inside, other=0.0)
        total = total + x * tl.load(b + column, mask=inside, other=0.0)
        a += rows
        b += columns
    return total


@triton.jit
def _look_at(w, k, z, c, times):
    return w + _rint(z * (_power(-k) * c)) * (_power(k) * times)


@triton.jit
def _adapted(m, v, shares, rate, eps):
    size = tl.sqrt_rn(v * tl.load(shares + 1)) + eps
    return tl.div_rn(m * tl.load(shares), size) * -rate


# ---------------------------------------------------------------------------------------------- kernels
# Numbers that change from call to call are not to be specialised on: that would compile anew.


@triton.jit(do_not_specialize=["tiles", "stream"])
def _fill_kernel(out, seeds, size, tiles, stream, DOMAIN: tl.constexpr, SIGNS: tl.constexpr):
    row, tile = tl.program_id(0) // tiles, (tl.program_id(0) % tiles).to(tl.int64)
    k0, k1 = _key(tl.load(seeds + row))
    if SIGNS:
        z = _signs(tile, k0, k1, stream.to(tl.uint32), DOMAIN)
    else:
        z = _gaussian(tile, k0, k1, stream.to(tl.uint32), DOMAIN)
    at = tile * _TILE + tl.arange(0, _TILE)
    tl.store(out + row.to(tl.int64) * size + at, z, mask=at < size)


@triton.jit(do_not_specialize=["stream"])
def _lanes_kernel(out, steps, stream):
    k0, k1 = _key(tl.load(steps + tl.program_id(0)))
    first = tl.program_id(0).to(tl.int64) * 0
    w0, w1, w2, w3 = _blocks(
        first, tl.arange(0, 256), k0, k1, stream.to(tl.uint32), _DITHER_LANE
    )
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (_TILE,))
    at = tl.program_id(0).to(tl.int64) * _TILE + tl.arange(0, _TILE)
    tl.store(out + at, words.to(tl.int32, bitcast=True))


@triton.jit(do_not_specialize=["floor"])
def _lay_kernel(theta, exponents, size, floor):
    tile, at, inside = _place(0, size)
    w = tl.load(theta + at, mask=inside, other=0.0)
    w, k = _lay(w, floor, _largest(w))
    tl.store(theta + at, w, mask=inside)
    tl.store(exponents + tile, k.to(tl.int8))


@triton.jit(do_not_specialize=["first", "low", "high", "stream"])
def _look_kernel(theta, exponents, size, first, low, high, stream, c, times, SIGNS: tl.constexpr):
    tile, at, inside = _place(first, size)
    w = tl.load(theta + at, mask=inside, other=0.0)
    k = tl.load(exponents + tile).to(tl.int32)
    z = _draw(tile, low.to(tl.uint32), high.to(tl.uint32), stream.to(tl.uint32), SIGNS)
    tl.store(theta + at, _look_at(w, k, z, c, times), mask=inside)


@triton.jit(do_not_specialize=["first"])
def _look_outer_kernel(theta, exponents, size, first, a, b, columns, times):
    tile, at, inside = _place(first, size)
    w = tl.load(theta + at, mask=inside, other=0.0)
    k = tl.load(exponents + tile).to(tl.int32)
    row, column = _cross(tile, columns)
    x = tl.load(a + row, mask=inside, other=0.0)
    z = x * tl.load(b + column, mask=inside, other=0.0)
    tl.store(theta + at, _look_at(w, k, z, 1.0, times), mask=inside)


@triton.jit(do_not_specialize=["first", "stream", "count"])
def _update_kernel(
    theta, exponents, size, first, stream, steps, ends, count, decays, lanes,
    seeds, cs, back, SIGNS: tl.constexpr,
):  # fmt: skip
    tile, at, inside = _place(first, size)
    w = tl.load(theta + at, mask=inside, other=0.0)
    k = tl.load(exponents + tile).to(tl.int32)
    stream = stream.to(tl.uint32)
    for s in range(count):
        total = tl.zeros((_TILE,), tl.float32)
        z = tl.zeros((_TILE,), tl.float32)
        for d in range(tl.load(ends + s).to(tl.int32), tl.load(ends + s + 1).to(tl.int32)):
            k0, k1 = _key(tl.load(seeds + d))
            z = _draw(tile, k0, k1, stream, SIGNS)
            total = total + z * tl.load(cs + d)
        if (s == 0) & (back != 0.0):
            w = _look_at(w, k, z, back, 1.0)
        seed, decay = tl.load(steps + s), tl.load(decays + s)
        w, k = _settle(w, k, total, inside, tile, seed, stream, lanes + s * _TILE, decay)
    tl.store(theta + at, w, mask=inside)
    tl.store(exponents + tile, k.to(tl.int8))


@triton.jit(do_not_specialize=["first", "stream", "count"])
def _update_outer_kernel(
    theta, exponents, size, first, stream, steps, ends, count, decays, lanes, a, b, rows, columns
):
    tile, at, inside = _place(first, size)
    w = tl.load(theta + at, mask=inside, other=0.0)
    k = tl.load(exponents + tile).to(tl.int32)
    row, column = _cross(tile, columns)
    stream = stream.to(tl.uint32)
    for s in range(count):
        d0, d1 = tl.load(ends + s), tl.load(ends + s + 1)
        total = _outer(a, b, row, column, inside, rows, columns, d0, d1)
        seed, decay = tl.load(steps + s), tl.load(decays + s)
        w, k = _settle(w, k, total, inside, tile, seed, stream, lanes + s * _TILE, decay)
    tl.store(theta + at, w, mask=inside)
    tl.store(exponents + tile, k.to(tl.int8))


@triton.jit(do_not_specialize=["first", "stream", "count", "before", "window"])
def _adapt_kernel(
    theta, exponents, size, first, stream, steps, ends, count, decays, lanes,
    sum1, sum2, rates, shares, beta1, beta2, eps, before, window, seeds, cs, back, a, b, rows, columns,
    SIGNS: tl.constexpr, OUTER: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    tile, at, inside = _place(first, size)
    w = tl.load(theta + at, mask=inside, other=0.0)
    k = tl.load(exponents + tile).to(tl.int32)
    stream = stream.to(tl.uint32)
    if OUTER:
        row, column = _cross(tile, columns)
    elif back != 0.0:
        k0, k1 = _key(tl.load(seeds + tl.load(ends + before + 1) - 1))
        w = _look_at(w, k, _draw(tile, k0, k1, stream, SIGNS), back, 1.0)
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
                g = _outer(a, b, row, column, inside, rows, columns, d0, d1)
            else:
                g = tl.zeros((_TILE,), tl.float32)
                for d in range(d0.to(tl.int32), d1.to(tl.int32)):
                    k0, k1 = _key(tl.load(seeds + d))
                    g = g + _draw(tile, k0, k1, stream, SIGNS) * tl.load(cs + d)
            m = m * beta1 + g
            v = v * beta2 + g * g
        total = _adapted(m, v, shares + 2 * s, tl.load(rates + s), eps)
        seed, decay = tl.load(steps + s), tl.load(decays + s)
        w, k = _settle(w, k, total, inside, tile, seed, stream, lanes + s * _TILE, decay)
    tl.store(theta + at, w, mask=inside)
    tl.store(exponents + tile, k.to(tl.int8))
    if KEPT:
        tl.store(sum1 + at, m, mask=inside)
        tl.store(sum2 + at, v, mask=inside)


# -------------------------------------------------------------------------------- the names of `cpu`


def _launch(kernel: Any, programs: int, device: torch.device, *arguments: Any, **constants: Any) -> None:
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


def look(theta, exponents, first, last, seed, stream, c, times, *, signs: bool = False) -> None:
    """See `cpu.look`."""
    seed = int(seed)
    words = (_signed(seed & 0xFFFFFFFF), _signed(seed >> 32), _signed(int(stream)))
    _launch(_look_kernel, last - first, theta.device, theta, exponents, len(theta), first, *words,
            float(c), float(times), SIGNS=signs)  # fmt: skip


def look_signs(*arguments: Any) -> None:
    """See `cpu.look_signs`."""
    look(*arguments, signs=True)


def look_outer(theta, exponents, first, last, columns, a, b, times) -> None:
    """See `cpu.look_outer`."""
    _launch(_look_outer_kernel, last - first, theta.device, theta, exponents, len(theta), first,
            a.contiguous(), b.contiguous(), int(columns), float(times))  # fmt: skip


def update(
    theta, exponents, first, last, stream, steps, ends, seeds, cs, decays, back, *, signs: bool = False
) -> None:  # fmt: skip
    """See `cpu.update`."""
    device = theta.device
    directions = _put(seeds, np.uint64, device), _put(cs, np.float32, device)
    _launch(_update_kernel, last - first, device, theta, exponents, len(theta), first,
            *_taken(theta, stream, steps, ends, decays), *directions, float(back), SIGNS=signs)  # fmt: skip


def update_signs(*arguments: Any) -> None:
    """See `cpu.update_signs`."""
    update(*arguments, signs=True)


def update_outer(
    theta, exponents, first, last, columns, stream, steps, ends, a, b, decays
) -> None:  # fmt: skip
    """See `cpu.update_outer`."""
    _launch(_update_outer_kernel, last - first, theta.device, theta, exponents, len(theta), first,
            *_taken(theta, stream, steps, ends, decays), a.contiguous(), b.contiguous(), a.shape[1], int(columns))  # fmt: skip


def _adapt(
    theta, exponents, first, last, sum1, sum2, steps, ends, rates, decays, shares,
    beta1, beta2, eps, window, stream, directions: tuple[Any, ...], **constants: bool,
) -> None:  # fmt: skip
    device, kept = theta.device, int(window) == 0
    sums = (sum1, sum2) if kept else (theta, theta)  # not touched
    _launch(_adapt_kernel, last - first, device, theta, exponents, len(theta), first,
            *_taken(theta, stream, steps, ends, decays), *sums, _put(rates, np.float32, device),
            _put(shares, np.float32, device), float(beta1), float(beta2), float(eps), len(ends) - len(steps),
            int(window), *directions, **constants, KEPT=kept)  # fmt: skip


def adapt(
    theta, exponents, first, last, sum1, sum2, steps, ends, rates, decays, shares,
    beta1, beta2, eps, window, stream, seeds, cs, back, *, signs: bool = False,
) -> None:  # fmt: skip
    """See `moments.adapt`."""
    held = _put(seeds, np.uint64, theta.device), _put(cs, np.float32, theta.device), float(back)
    _adapt(theta, exponents, first, last, sum1, sum2, steps, ends, rates, decays, shares, beta1, beta2, eps, window,
           stream, (*held, theta, theta, 0, 0), SIGNS=signs, OUTER=False)  # fmt: skip


def adapt_signs(*arguments: Any) -> None:
    """See `moments.adapt_signs`."""
    adapt(*arguments, signs=True)


def adapt_outer(
    theta, exponents, first, last, sum1, sum2, steps, ends, rates, decays, shares,
    beta1, beta2, eps, window, stream, columns, a, b,
) -> None:  # fmt: skip
    """See `moments.adapt_outer`."""
    directions = (theta, theta, 0.0, a.contiguous(), b.contiguous(), a.shape[1], int(columns))
    _adapt(theta, exponents, first, last, sum1, sum2, steps, ends, rates, decays, shares, beta1, beta2, eps, window,
           stream, directions, SIGNS=False, OUTER=True)  # fmt: skip
