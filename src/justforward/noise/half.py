"""Numba kernels for weights stored in 16 bits: bfloat16 and float16, as uint16 [n].

A weight is widened to float32, moved there, and rounded stochastically to a number that 16 bits hold: a multiple of the
unit q in the last place, of the larger of where it was and where it goes. In place of the grid's exponents a tile has a
flag, 1 once a weight of it was held back at the largest number that there is. Equal in every bit to `plain`.
"""

# mypy: ignore-errors
# (Numba types what is in here; mypy cannot follow its intrinsics.)
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from justforward.noise import cpu, moments, spec
from justforward.noise.cpu import TILE, draw_tile, f32, i32, inline, kernel, power, u32, u64
from justforward.noise.llvm import as_float, as_int, floor, select

_GAUSSIAN, _RADEMACHER = u64(spec.DOMAIN_GAUSSIAN), u64(spec.DOMAIN_RADEMACHER)
_D0, _POW_M24 = u32(spec.DITHER_MULTIPLIER), f32(2.0**-24)
_UP, _DOWN = f32(2.0**112), f32(2.0**-112)


@inline
def _wide_bfloat16(bits):
    return as_float(i32(u32(u32(bits) << u32(16))))


@inline
def _narrow_bfloat16(value):
    return np.uint16(u32(u32(as_int(value)) >> u32(16)))


@inline
def _wide_float16(bits):
    # Exponents differ by 112; the product makes of subnormal numbers what they are, too.
    size = f32(as_float(i32(u32(u32(bits) & u32(0x7FFF)) << u32(13))) * _UP)
    return as_float(i32(as_int(size) | i32(u32(u32(bits) & u32(0x8000)) << u32(16))))


@inline
def _narrow_float16(value):
    whole = u32(as_int(value))
    size = u32(as_int(f32(as_float(i32(u32(whole & u32(0x7FFFFFFF)))) * _DOWN)))
    return np.uint16(u32(u32(size >> u32(13)) | u32(u32(whole >> u32(16)) & u32(0x8000))))


def _store(WIDE: Any, NARROW: Any, form: spec.Form) -> Any:
    BITS, LEAST, LARGEST = i32(form.bits), i32(form.least), f32(form.largest)

    @inline
    def open_tile(theta, tile, room):
        start, end = tile * TILE, min((tile + 1) * TILE, theta.size)
        part = room[: end - start]
        for i in range(part.size):
            part[i] = WIDE(theta[start + i])
        return part

    @inline
    def settle(part, flags, tile, values, scale, lanes, word):
        """part <- q floor(part / q + scale values / q + dither), within the largest number."""
        held = i32(0)
        for i in range(part.size):
            h = u32(lanes[i] + word)
            h = u32(u32(h ^ u32(h >> u32(16))) * _D0)
            u = f32(f32(i32(u32(h >> u32(8)))) * _POW_M24)
            move = f32(scale * values[i])
            here = i32(as_int(part[i]) & i32(0x7FFFFFFF))
            there = i32(as_int(f32(part[i] + move)) & i32(0x7FFFFFFF))
            k = i32(i32(select(here > there, here, there) >> i32(23)) - BITS)
            k = i32(select(k > LEAST, k, LEAST))
            q, inverse = power(k), power(-k)
            n = f32(part[i] * inverse)
            whole = floor(n)
            rest = f32(f32(n - whole) + u)
            moved = f32(f32(whole + floor(f32(f32(move * inverse) + rest))) * q)
            large = abs(moved) > LARGEST
            held = i32(select(large, i32(1), held))
            most = f32(select(moved > f32(0.0), LARGEST, f32(-LARGEST)))
            part[i] = f32(select(large, most, moved))
        if held != i32(0):
            flags[tile] = 1

    @inline
    def close_tile(theta, tile, part):
        start = tile * TILE
        for i in range(part.size):
            theta[start + i] = NARROW(part[i])

    return open_tile, settle, close_tile


def _make_widen(SIGNS: bool, DOMAIN: Any, WIDE: Any) -> Any:
    def _widen(theta, out, first, last, stream, seeds, cs):
        """out[i - first] = theta[i] + sum_d cs[d] z_d[i] for elements first .. last; theta uint16 [n], out float32."""
        z = np.empty(TILE, np.float32)
        w0, w1 = np.empty(256, np.uint32), np.empty(256, np.uint32)
        w2, w3 = np.empty(256, np.uint32), np.empty(256, np.uint32)
        for tile in range(first // TILE, (last + TILE - 1) // TILE):
            start, end = max(tile * TILE, first), min((tile + 1) * TILE, last)
            lane = start - tile * TILE
            part = out[start - first : end - first]
            for i in range(part.size):
                part[i] = WIDE(theta[start + i])
            for d in range(seeds.size):
                draw_tile(tile, seeds[d], stream, DOMAIN, SIGNS, z, w0, w1, w2, w3)
                values, c = z[lane : lane + part.size], cs[d]
                for i in range(part.size):
                    part[i] = f32(part[i] + f32(c * values[i]))

    return kernel(_widen)


def _kernels(WIDE: Any, NARROW: Any, form: spec.Form) -> SimpleNamespace:
    store = _store(WIDE, NARROW, form)
    return SimpleNamespace(
        update=cpu.make_update(False, _GAUSSIAN, store),
        update_signs=cpu.make_update(True, _RADEMACHER, store),
        update_outer=cpu.make_update_outer(store),
        adapt=moments.make_adapt(False, _GAUSSIAN, store),
        adapt_signs=moments.make_adapt(True, _RADEMACHER, store),
        adapt_outer=moments.make_adapt_outer(store),
        widen=_make_widen(False, _GAUSSIAN, WIDE),
        widen_signs=_make_widen(True, _RADEMACHER, WIDE),
    )


OF = {
    torch.bfloat16: _kernels(_wide_bfloat16, _narrow_bfloat16, spec.BFLOAT16),
    torch.float16: _kernels(_wide_float16, _narrow_float16, spec.FLOAT16),
}
