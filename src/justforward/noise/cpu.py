"""Numba kernels: the noise of `spec`, and noise added to weights without ever being stored.

Equal in every bit to `reference`: no fast-math, so LLVM neither contracts nor reorders. What makes LLVM
vectorise it (and a change here should be measured with `benchmarks/noise.py`): Philox in 64-bit lanes of
which only the low halves matter, every other integer cast back to 32 bits explicitly, selects instead of
branches, bit-casts and roundings as LLVM intrinsics, one-dimensional buffers of one tile, and one loop for
each stage. Kernels release the GIL and take a range of tiles, so any number of threads gives the same bits.
"""

# mypy: ignore-errors
# (Numba types what is in here; mypy cannot follow its intrinsics.)
from __future__ import annotations

from typing import Any

import numpy as np

from justforward.noise import spec
from justforward.noise.formats import (
    BFLOAT16,
    FLOAT32,
    SOURCES,
    TILE,
    close_bfloat16,
    close_float16,
    f32,
    i32,
    inline,
    kernel,
    open_bfloat16,
    open_float16,
    power,
    settle_as,
    take_decay,
    u32,
    u64,
)
from justforward.noise.llvm import as_float, as_int, prefetch, rint, select, sqrt

_M0, _M1 = (u64(m) for m in spec.PHILOX_MULTIPLIERS)
_W0, _W1 = (u32(w) for w in spec.PHILOX_WEYL)
_ROUNDS = spec.PHILOX_ROUNDS
_MASK, _32 = u64(0xFFFFFFFF), u64(32)
_L0, _L1, _L2, _L3, _L4, _L5, _L6 = (f32(c) for c in spec.LOG_COEFFICIENTS)
_LN2, _ROOT = f32(spec.MINUS_TWO_LN_2), i32(spec.SQRT_HALF_BITS)
_S0, _S1, _S2 = (f32(c) for c in spec.SIN_COEFFICIENTS)
_C0, _C1, _C2, _C3 = (f32(c) for c in spec.COS_COEFFICIENTS)
_DITHER_TILE, _DITHER_LANE = u64(spec.DOMAIN_DITHER_TILE), u64(spec.DOMAIN_DITHER_LANE)
_GAUSSIAN, _RADEMACHER = u64(spec.DOMAIN_GAUSSIAN), u64(spec.DOMAIN_RADEMACHER)
_HALF, _ONE, _SIGN = f32(0.5), f32(1.0), u32(0x80000000)
_ZERO = f32(0.0)  # -0.0 + 0.0 is +0.0: a negative zero would not survive a look
_LINE = 16  # float32 values of a cache line
_POW_M32 = f32(2.0**-32)

_LIMIT = f32(spec.GRID_LIMIT)


@inline
def fetch_tile(theta, tile, last):
    """Bring a tile into the cache while something else is computed: prefetchers stop at the end of a page."""
    if tile < last:
        start, end = tile * TILE, min((tile + 1) * TILE, theta.size)
        for i in range(start, end, _LINE):
            prefetch(theta, i)


@inline
def _philox(c0, c1, c2, c3, k0, k1):
    for _ in range(_ROUNDS):
        p0 = u64((c0 & _MASK) * _M0)
        p1 = u64((c2 & _MASK) * _M1)
        c0 = u64((p1 >> _32) ^ c1 ^ u64(k0))
        c2 = u64((p0 >> _32) ^ c3 ^ u64(k1))
        c1 = p1
        c3 = p0
        k0 = u32(k0 + _W0)
        k1 = u32(k1 + _W1)
    return c0, c1, c2, c3


@inline
def _words(first, blocks, seed, stream, domain, w0, w1, w2, w3):
    """The four words of blocks first .. first + blocks, one array for each.

    `first` is a multiple of `blocks`, a power of two: only the low word of the counter varies.
    """
    k0 = u32(seed & _MASK)
    k1 = u32(seed >> _32)
    low, high = u64(first & _MASK), u64(first >> _32)
    for b in range(blocks):
        a0, a1, a2, a3 = _philox(u64(low + u64(b)), high, stream, domain, k0, k1)
        w0[b] = u32(a0)
        w1[b] = u32(a1)
        w2[b] = u32(a2)
        w3[b] = u32(a3)


@inline
def _box_muller(x, y):
    v = f32(f32(i32(u32(x >> u32(1)))) + _HALF)
    i = as_int(v)
    e = i32(i32(i - _ROOT) >> i32(23))
    f = f32(as_float(i32(i - i32(e << i32(23)))) - _ONE)
    p = f32(f32(f * _L6) + _L5)
    p = f32(f32(p * f) + _L4)
    p = f32(f32(p * f) + _L3)
    p = f32(f32(p * f) + _L2)
    p = f32(f32(p * f) + _L1)
    p = f32(f32(p * f) + _L0)
    radius = sqrt(f32(f32(f32(i32(e - i32(31))) * _LN2) + f32(p * f)))
    t = f32(f32(i32(u32(y << u32(2)))) * _POW_M32)
    s = f32(t * t)
    sine = f32(f32(f32(f32(f32(s * _S2) + _S1) * s) + _S0) * t)
    cosine = f32(f32(f32(f32(f32(f32(s * _C3) + _C2) * s) + _C1) * s) + _C0)
    odd = (y & u32(0x40000000)) != u32(0)
    first = as_int(select(odd, sine, cosine))
    second = as_int(select(odd, cosine, sine))
    # Quadrants 1 and 2 flip the first, 2 and 3 the second: sign bits, not branches.
    first = as_float(i32(first ^ i32(u32(y ^ u32(y << u32(1))) & _SIGN)))
    second = as_float(i32(second ^ i32(y & _SIGN)))
    return f32(radius * first), f32(radius * second)


@inline
def draw_tile(tile, seed, stream, domain, signs, z, w0, w1, w2, w3):
    """z of one tile: float32 [1024]. w0 .. w3: room for 256 words each."""
    if signs:
        _words(u64(tile) * u64(8), 8, seed, stream, domain, w0[0:8], w0[8:16], w0[16:24], w0[24:32])
        z[:] = _ZERO
        for j in range(32):
            row = z[32 * j : 32 * j + 32]
            shift = u32(31 - j)
            for k in range(32):
                # 1.0 with the bit as its sign. Added: were rows written only, LLVM would take sixteen of them at once
                # and scatter what belongs side by side, eight times as slow.
                sign = u32(u32(w0[k] << shift) & _SIGN)
                row[k] = f32(row[k] + as_float(i32(sign | u32(0x3F800000))))
    else:
        _words(u64(tile) * u64(256), 256, seed, stream, domain, w0, w1, w2, w3)
        z0, z1, z2, z3 = z[:256], z[256:512], z[512:768], z[768:]
        for b in range(256):
            z0[b], z1[b] = _box_muller(w0[b], w1[b])
        for b in range(256):
            z2[b], z3[b] = _box_muller(w2[b], w3[b])


@inline
def one_word(index, seed, stream, domain):
    block = u64(index) >> u64(2)
    k0, k1 = u32(seed & _MASK), u32(seed >> _32)
    a0, a1, a2, a3 = _philox(block & _MASK, block >> _32, stream, domain, k0, k1)
    lane = u64(index) & u64(3)
    if lane == u64(0):
        return u32(a0)
    if lane == u64(1):
        return u32(a1)
    if lane == u64(2):
        return u32(a2)
    return u32(a3)


@kernel
def fill(out, seed, stream, start, domain, signs):
    """out[i] = z(seed, stream, start + i) of a domain; `signs` for rademacher. out: float32 [count]."""
    z = np.empty(TILE, np.float32)
    w0, w1 = np.empty(256, np.uint32), np.empty(256, np.uint32)
    w2, w3 = np.empty(256, np.uint32), np.empty(256, np.uint32)
    domain = u64(domain)
    done = 0
    while done < out.size:
        at = start + done
        tile = at // TILE
        lane = at - tile * TILE
        size = min(TILE - lane, out.size - done)
        draw_tile(tile, seed, stream, domain, signs, z, w0, w1, w2, w3)
        here, part = z[lane : lane + size], out[done : done + size]
        for i in range(size):
            part[i] = here[i]
        done += size


@kernel
def fill_rows(out, seeds, stream, domain, signs):
    """out[r, i] = z(seeds[r], stream, i): factors or dense values of several directions. out: [R, count]."""
    for r in range(seeds.size):
        fill(out[r], seeds[r], stream, 0, domain, signs)


@kernel
def lay_grid(theta, exponents, floor):
    """Choose q = 2^k for each tile and round the weights to multiples of it.

    Args:
        theta: float32 [n], rounded in place to nearest (ties to even).
        exponents: int8 [tiles], filled with k: the smallest with max |theta| <= 1.5 x 2^23 q, at least `floor`.

    Returns:
        Index of the first weight that is not finite, or -1.
    """
    for tile in range(exponents.size):
        part = theta[tile * TILE : min((tile + 1) * TILE, theta.size)]
        largest = f32(0.0)
        for i in range(part.size):
            if not np.isfinite(part[i]):
                return tile * TILE + i
            largest = max(largest, abs(part[i]))
        k = floor
        while k < 100 and largest > f32(_LIMIT * power(k)):
            k += 1
        exponents[tile] = k
        q, inverse = power(k), power(-k)
        for i in range(part.size):
            part[i] = f32(f32(rint(f32(part[i] * inverse)) * q) + _ZERO)
    return -1


@kernel
def look(theta, exponents, first, last, seed, stream, c, times):
    """theta += times * q * rint(c z / q), z gaussian, tiles first .. last. Exact: -1 undoes +1."""
    z = np.empty(TILE, np.float32)
    w0, w1 = np.empty(256, np.uint32), np.empty(256, np.uint32)
    w2, w3 = np.empty(256, np.uint32), np.empty(256, np.uint32)
    for tile in range(first, last):
        fetch_tile(theta, tile, last)
        draw_tile(tile, seed, stream, _GAUSSIAN, False, z, w0, w1, w2, w3)
        part = theta[tile * TILE : min((tile + 1) * TILE, theta.size)]
        scale = f32(c * power(-i32(exponents[tile])))
        q = f32(times * power(i32(exponents[tile])))
        for i in range(part.size):
            part[i] = f32(part[i] + f32(rint(f32(z[i] * scale)) * q))


@kernel
def look_signs(theta, exponents, first, last, seed, stream, c, times):
    """`look` with z rademacher: one multiple of q a tile, added with the sign of a bit."""
    w0, w1 = np.empty(256, np.uint32), np.empty(256, np.uint32)
    w2, w3 = np.empty(256, np.uint32), np.empty(256, np.uint32)
    w = np.empty(32, np.uint32)
    group = -1
    for tile in range(first, last):
        if tile // 32 != group:  # 32 tiles of words at once keep Philox's pipeline full
            group = tile // 32
            _words(u64(group) * u64(256), 256, seed, stream, _RADEMACHER, w0, w1, w2, w3)
        b = 8 * (tile % 32)
        for i in range(8):
            w[i] = w0[b + i]
            w[8 + i] = w1[b + i]
            w[16 + i] = w2[b + i]
            w[24 + i] = w3[b + i]
        q = power(i32(exponents[tile]))
        move = u32(as_int(f32(f32(times * q) * rint(f32(c * power(-i32(exponents[tile])))))))
        part = theta[tile * TILE : min((tile + 1) * TILE, theta.size)]
        if part.size == TILE:
            for j in range(32):
                row = part[32 * j : 32 * j + 32]
                shift = u32(31 - j)
                for i in range(32):
                    sign = u32(u32(w[i] << shift) & _SIGN)
                    row[i] = f32(row[i] + as_float(i32(move ^ sign)))
        else:
            for i in range(part.size):
                sign = u32(u32(w[i % 32] << u32(31 - i // 32)) & _SIGN)
                part[i] = f32(part[i] + as_float(i32(move ^ sign)))


@inline
def lane_words(seeds, stream):
    """The dither's lane words of each step: uint32 [S, 1024]."""
    lanes = np.empty((seeds.size, TILE), np.uint32)
    w0, w1 = np.empty(256, np.uint32), np.empty(256, np.uint32)
    w2, w3 = np.empty(256, np.uint32), np.empty(256, np.uint32)
    for s in range(seeds.size):
        _words(u64(0), 256, seeds[s], stream, _DITHER_LANE, w0, w1, w2, w3)
        for b in range(256):
            lanes[s, 4 * b] = w0[b]
            lanes[s, 4 * b + 1] = w1[b]
            lanes[s, 4 * b + 2] = w2[b]
            lanes[s, 4 * b + 3] = w3[b]
    return lanes


def make_update(SIGNS: bool, DOMAIN: Any, FORM: int) -> Any:
    # Several kernels from one text: with the family a constant LLVM keeps one branch, and vectorises it.
    WHOLE, BRAIN, KEY = FORM == FLOAT32, FORM == BFLOAT16, SOURCES

    def _update(theta, exponents, first, last, stream, steps, ends, seeds, cs, decays, back):
        """Apply any number of steps to tiles first .. last in one pass over the weights.

        theta <- theta + q floor((sum_d cs[d] z_d - decays[s] theta) / q + dither_s), step after step.

        Args:
            theta, exponents: the weights float32 [n] and their grid int8 [tiles]; both change.
            steps: uint64 [S], the seeds of the steps' dither.
            ends: int64 [S], step s has the directions ends[s - 1] .. ends[s].
            seeds, cs: uint64 [D] and float32 [D], the directions and their coefficients.
            decays: float32 [S], the part of the weight that a step takes away.
            back: where not 0, the weights still stand at -back along the last direction of the first step,
                and are first brought home, with the same z.
        """
        _ = KEY
        z, acc = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
        room = np.empty(TILE, np.float32)
        w0, w1 = np.empty(256, np.uint32), np.empty(256, np.uint32)
        w2, w3 = np.empty(256, np.uint32), np.empty(256, np.uint32)
        lanes = lane_words(steps, stream)
        for tile in range(first, last):
            fetch_tile(theta, tile, last)
            if WHOLE:
                part = theta[tile * TILE : min((tile + 1) * TILE, theta.size)]
            elif BRAIN:
                part = open_bfloat16(theta, tile, room)
            else:
                part = open_float16(theta, tile, room)
            d = 0
            for s in range(steps.size):
                # One direction and no decay, the common case: z goes straight into the move. Scaling by a
                # power of two is exact, so the bits are those of the general case.
                plain = ends[s] - d == 1 and decays[s] == f32(0.0)
                values, scale = (z, cs[d]) if plain else (acc, _ONE)
                if not plain:
                    acc[:] = f32(0.0)
                while d < ends[s]:
                    draw_tile(tile, seeds[d], stream, DOMAIN, SIGNS, z, w0, w1, w2, w3)
                    if not plain:
                        c = cs[d]
                        for i in range(TILE):
                            acc[i] = f32(acc[i] + f32(c * z[i]))
                    d += 1
                if back != f32(0.0) and s == 0:
                    k = i32(exponents[tile])
                    home, q = f32(back * power(-k)), power(k)
                    for i in range(part.size):
                        part[i] = f32(part[i] + f32(rint(f32(z[i] * home)) * q))
                word = one_word(tile, steps[s], stream, _DITHER_TILE)
                take_decay(part, acc, decays[s])
                settle_as(WHOLE, BRAIN, part, exponents, tile, values, scale, lanes[s], word)
            if not WHOLE:
                if BRAIN:
                    close_bfloat16(theta, tile, part)
                else:
                    close_float16(theta, tile, part)

    return kernel(_update)


update = make_update(False, _GAUSSIAN, FLOAT32)
update_signs = make_update(True, _RADEMACHER, FLOAT32)


@inline
def outer_tile(acc, start, size, columns, a, b, d0, d1):
    """acc[i] = sum over d of a[d, row] * b[d, column] for elements start .. start + size."""
    done = 0
    while done < size:
        row = (start + done) // columns
        column = start + done - row * columns
        length = min(columns - column, size - done)
        sums = acc[done : done + length]
        for i in range(length):
            sums[i] = f32(0.0)
        d = d0
        while d + 4 <= d1:  # four at a time, in order: a sum is read and written once for all four
            c0, c1, c2, c3 = a[d, row], a[d + 1, row], a[d + 2, row], a[d + 3, row]
            v0 = b[d, column : column + length]
            v1 = b[d + 1, column : column + length]
            v2 = b[d + 2, column : column + length]
            v3 = b[d + 3, column : column + length]
            for i in range(length):
                s = f32(f32(sums[i] + f32(c0 * v0[i])) + f32(c1 * v1[i]))
                sums[i] = f32(f32(s + f32(c2 * v2[i])) + f32(c3 * v3[i]))
            d += 4
        while d < d1:
            c = a[d, row]
            values = b[d, column : column + length]
            for i in range(length):
                sums[i] = f32(sums[i] + f32(c * values[i]))
            d += 1
        done += length


@kernel
def look_outer(theta, exponents, first, last, columns, a, b, times):
    """`look` along a rank-one direction: theta += times * q * rint(a b^T / q); a: [1, rows], b: [1, columns]."""
    for tile in range(first, last):
        inverse = power(-i32(exponents[tile]))
        q = f32(times * power(i32(exponents[tile])))
        start, end = tile * TILE, min((tile + 1) * TILE, theta.size)
        while start < end:
            row = start // columns
            column = start - row * columns
            length = min(columns - column, end - start)
            part, values, c = (
                theta[start : start + length],
                b[0, column : column + length],
                a[0, row],
            )
            for i in range(length):
                part[i] = f32(part[i] + f32(rint(f32(f32(c * values[i]) * inverse)) * q))
            start += length


def make_update_outer(FORM: int) -> Any:
    WHOLE, BRAIN, KEY = FORM == FLOAT32, FORM == BFLOAT16, SOURCES

    def _update_outer(theta, exponents, first, last, columns, stream, steps, ends, a, b, decays):
        """`update` along rank-one directions; a: float32 [D, rows] times the coefficients, b: float32 [D, columns]."""
        _ = KEY
        acc, room = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
        lanes = lane_words(steps, stream)
        for tile in range(first, last):
            if WHOLE:
                part = theta[tile * TILE : min((tile + 1) * TILE, theta.size)]
            elif BRAIN:
                part = open_bfloat16(theta, tile, room)
            else:
                part = open_float16(theta, tile, room)
            start = 0
            for s in range(steps.size):
                outer_tile(acc, tile * TILE, part.size, columns, a, b, start, ends[s])
                start = ends[s]
                word = one_word(tile, steps[s], stream, _DITHER_TILE)
                take_decay(part, acc, decays[s])
                settle_as(WHOLE, BRAIN, part, exponents, tile, acc, _ONE, lanes[s], word)
            if not WHOLE:
                if BRAIN:
                    close_bfloat16(theta, tile, part)
                else:
                    close_float16(theta, tile, part)

    return kernel(_update_outer)


update_outer = make_update_outer(FLOAT32)


@kernel
def philox_words(c0, c1, c2, c3, k0, k1):
    """The four words of one counter, for the known-answer test."""
    a0, a1, a2, a3 = _philox(c0, c1, c2, c3, k0, k1)
    return u32(a0), u32(a1), u32(a2), u32(a3)
