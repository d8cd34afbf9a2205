"""The forms in which weights are stored, as Numba sees them: a tile read, moved by a step, and written back.

    float32    on its grid: a tile is read and moved where it is
    bfloat16, float16   as uint16 [n]: a weight is widened to float32, moved there, and rounded stochastically to a number that
               16 bits hold: a multiple of the unit q in the last place, of the larger of where it was and where it goes. In
               place of the grid's exponents a tile has a flag, 1 once a weight of it was held back at the largest number

Equal in every bit to `plain`. Inlined into the kernels of `cpu`, `half` and `moments`.
"""

# mypy: ignore-errors
# (Numba types what is in here; mypy cannot follow its intrinsics.)
from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

from justforward.noise import spec
from justforward.noise.llvm import as_float, as_int, floor, rint, select

u32, u64, i32, f32 = np.uint32, np.uint64, np.int32, np.float32

TILE = spec.TILE
FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
_D0 = u32(spec.DITHER_MULTIPLIER)
_ZERO = f32(0.0)  # -0.0 + 0.0 is +0.0: a negative zero would not survive a look
_POW_M24 = f32(2.0**-24)
_UP, _DOWN = f32(2.0**112), f32(2.0**-112)
_SIZE, _EXPONENT, _TWICE_BIAS = i32(0x7FFFFFFF), i32(0x7F800000), i32(254 << 23)

# The grid: a tile's weights are integers n times q = 2^k with |n| <= 1.5 x 2^23; a look may add 2^22 and is
# still exact, below 2^24. A tile that grows beyond is laid anew, on the next coarser grid.
_LIMIT = f32(spec.GRID_LIMIT)

# Numba's cache looks at a kernel's own file alone, and at the constants that it closes over: of these this is one.
SOURCES = zlib.crc32(
    b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
)


def inline(function: Any) -> Any:
    return njit(inline="always")(function)


def kernel(function: Any) -> Any:
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no folder to keep the cache in: compiled anew in each process
        return njit(nogil=True)(function)


@inline
def power(k):
    """2^k as float32, -126 <= k <= 127."""
    return as_float(i32(i32(k + 127) << i32(23)))


@inline
def take_decay(part, acc, decay):
    if decay != f32(0.0):
        for i in range(part.size):
            acc[i] = f32(acc[i] - f32(decay * part[i]))


@inline
def settle(part, exponents, tile, values, scale, lanes, word):
    """part += q floor(scale values / q + dither), and a coarser grid when the headroom is used up."""
    k = i32(exponents[tile])
    q, inverse = power(k), f32(scale * power(-k))
    largest = i32(0)
    for i in range(part.size):
        h = u32(lanes[i] + word)
        h = u32(u32(h ^ u32(h >> u32(16))) * _D0)
        u = f32(f32(i32(u32(h >> u32(8)))) * _POW_M24)
        moved = f32(part[i] + f32(floor(f32(f32(values[i] * inverse) + u)) * q))
        part[i] = moved
        size = i32(as_int(moved) & _SIZE)
        largest = select(size > largest, size, largest)
    if as_float(largest) > f32(_LIMIT * q):
        while k < 100 and as_float(largest) > f32(_LIMIT * power(k)):
            k += 1
        exponents[tile] = k
        q, inverse = power(k), power(-k)
        for i in range(part.size):
            part[i] = f32(f32(rint(f32(part[i] * inverse)) * q) + _ZERO)


@inline
def wide_bfloat16(bits):
    return as_float(i32(u32(u32(bits) << u32(16))))


@inline
def narrow_bfloat16(value):
    return np.uint16(u32(u32(as_int(value)) >> u32(16)))


@inline
def wide_float16(bits):
    # Exponents differ by 112; the product makes of subnormal numbers what they are, too.
    size = f32(as_float(i32(u32(u32(bits) & u32(0x7FFF)) << u32(13))) * _UP)
    return as_float(i32(as_int(size) | i32(u32(u32(bits) & u32(0x8000)) << u32(16))))


@inline
def narrow_float16(value):
    whole = u32(as_int(value))
    size = u32(as_int(f32(as_float(i32(u32(whole & u32(0x7FFFFFFF)))) * _DOWN)))
    return np.uint16(u32(u32(size >> u32(13)) | u32(u32(whole >> u32(16)) & u32(0x8000))))


def _store(WIDE: Any, NARROW: Any, form: spec.Form) -> Any:
    LARGEST = f32(form.largest)
    UNIT, LEAST = i32((form.bits - 127) * 2**23), i32((form.least + 127) * 2**23)

    @inline
    def open_tile(theta, tile, room):
        start, end = tile * TILE, min((tile + 1) * TILE, theta.size)
        here, part = theta[start:end], room[: end - start]
        for i in range(part.size):
            part[i] = WIDE(
                here[i]
            )  # not theta[start + i]: an index that may be negative is not vectorised
        return part

    @inline
    def settle(part, flags, tile, values, scale, lanes, word):
        """part <- q floor(part / q + scale values / q + dither), within the largest number."""
        largest = i32(0)
        for i in range(part.size):
            h = u32(lanes[i] + word)
            h = u32(u32(h ^ u32(h >> u32(16))) * _D0)
            u = f32(f32(i32(u32(h >> u32(8)))) * _POW_M24)
            move = f32(scale * values[i])
            here = i32(as_int(part[i]) & _SIZE)
            there = i32(as_int(f32(part[i] + move)) & _SIZE)
            # q and 1 / q by their bits: powers of two, whose exponents stand where those of the weights do
            unit = i32(i32(select(here > there, here, there) & _EXPONENT) - UNIT)
            unit = i32(select(unit > LEAST, unit, LEAST))
            q, inverse = as_float(unit), as_float(i32(_TWICE_BIAS - unit))
            n = f32(part[i] * inverse)
            whole = floor(n)
            rest = f32(f32(n - whole) + u)
            moved = f32(f32(whole + floor(f32(f32(move * inverse) + rest))) * q)
            part[i] = moved
            size = i32(as_int(moved) & _SIZE)
            largest = select(size > largest, size, largest)
        if largest > as_int(LARGEST):
            for i in range(part.size):
                if abs(part[i]) > LARGEST:
                    flags[tile] = 1
                    part[i] = LARGEST if part[i] > f32(0.0) else f32(-LARGEST)

    @inline
    def close_tile(theta, tile, part):
        here = theta[tile * TILE : min((tile + 1) * TILE, theta.size)]
        for i in range(part.size):
            here[i] = NARROW(part[i])

    return open_tile, settle, close_tile


open_bfloat16, settle_bfloat16, close_bfloat16 = _store(
    wide_bfloat16, narrow_bfloat16, spec.BFLOAT16
)
open_float16, settle_float16, close_float16 = _store(wide_float16, narrow_float16, spec.FLOAT16)


@inline
def settle_as(WHOLE, BRAIN, part, exponents, tile, values, scale, lanes, word):
    """`settle` of float32 if WHOLE, else of bfloat16 if BRAIN, else of float16."""
    if WHOLE:
        settle(part, exponents, tile, values, scale, lanes, word)
    elif BRAIN:
        settle_bfloat16(part, exponents, tile, values, scale, lanes, word)
    else:
        settle_float16(part, exponents, tile, values, scale, lanes, word)
