"""Rows of GGUF's blocks as float32: the common forms by Numba kernels, all others by the package gguf.

Equal to gguf's own `dequantize` in every bit: the same products and sums, rounded one by one. A block of 32 (Q4_0 to Q8_0)
or 256 weights (Q2_K to Q6_K) has a scale d in float16, some a minimum m; of 256, each 16 or 32 have a small integer to
multiply d and m by. Layouts: ggml-quants.h of ggml (https://github.com/ggml-org/ggml), as gguf.quants reads them.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (Numba types the kernels; what is called from elsewhere has types.)
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from justforward import pool
from justforward.noise.formats import kernel

f32, i32 = np.float32, np.int32
_LEAST = 1 << 16  # weights: a thread's smallest share
_GROUP = 1 << 20  # weights: what gguf is given at a time, which needs several times their memory

HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


def unpack(form: str, data: np.ndarray, rows: Tensor, out: Tensor) -> None:
    """Fill `out` with rows of a matrix that is stored in blocks.

    Args:
        form: a name of gguf's `GGMLQuantizationType` that gguf can dequantise.
        data: uint8 [rows, bytes]; for F32, F16 and BF16 as well.
        rows: int64 [n], which rows.
        out: float32 [n, columns].
    """
    numbers, room = rows.numpy(), out.numpy()
    least = max(_LEAST // max(out.shape[1], 1), 1)
    pool.share(
        functools.partial(_KERNELS.get(form) or _by_gguf(form), data, numbers, room),
        0,
        len(numbers),
        least,
    )


def warm() -> None:
    """Compile the kernels of two common forms, or load them from Numba's cache."""
    for form, size in (("Q4_K", 144), ("Q6_K", 210)):
        unpack(form, np.zeros((1, size), np.uint8), torch.zeros(1).long(), torch.empty(1, 256))


def _compiled(fill: Any, data: Any, numbers: Any, room: Any, first: int, last: int) -> None:
    fill(data, numbers[first:last], room[first:last], HALVES)


def _by_torch(
    dtype: torch.dtype, data: Any, numbers: Any, room: Any, first: int, last: int
) -> None:
    kept = torch.from_numpy(data).view(dtype)
    torch.from_numpy(room[first:last]).copy_(kept[torch.from_numpy(numbers[first:last])])


def _by_gguf(form: str) -> Callable[..., None]:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    def call(data: Any, numbers: Any, room: Any, first: int, last: int) -> None:
        step = max(_GROUP // max(room.shape[1], 1), 1)
        for start in range(first, last, step):
            end = min(start + step, last)
            room[start:end] = dequantize(data[numbers[start:end]], GGMLQuantizationType[form])

    return call


# ------------------------------------------------------------------------------------------- kernels


@njit
def _half(b, at, halves):
    return halves[i32(b[at]) | (i32(b[at + 1]) << 8)]


@njit
def _four(b, high):
    """The lower or the upper four bits of a byte."""
    return i32((i32(b) >> (4 if high else 0)) & 15)


@kernel
def _q4_0(data, rows, out, halves):
    for i in range(rows.size):
        row, part = data[rows[i]], out[i]
        for k in range(row.size // 18):
            b, o = row[18 * k : 18 * k + 18], part[32 * k : 32 * k + 32]
            d = _half(b, 0, halves)
            for j in range(16):
                o[j] = f32(d * f32(i32(_four(b[2 + j], False) - 8)))
                o[16 + j] = f32(d * f32(i32(_four(b[2 + j], True) - 8)))


@kernel
def _q4_1(data, rows, out, halves):
    for i in range(rows.size):
        row, part = data[rows[i]], out[i]
        for k in range(row.size // 20):
            b, o = row[20 * k : 20 * k + 20], part[32 * k : 32 * k + 32]
            d, m = _half(b, 0, halves), _half(b, 2, halves)
            for j in range(16):
                o[j] = f32(f32(d * f32(_four(b[4 + j], False))) + m)
                o[16 + j] = f32(f32(d * f32(_four(b[4 + j], True))) + m)


@njit
def _word(b, at):
    return i32(b[at]) | (i32(b[at + 1]) << 8) | (i32(b[at + 2]) << 16) | (i32(b[at + 3]) << 24)


@kernel
def _q5_0(data, rows, out, halves):
    for i in range(rows.size):
        row, part = data[rows[i]], out[i]
        for k in range(row.size // 22):
            b, o = row[22 * k : 22 * k + 22], part[32 * k : 32 * k + 32]
            d, fifth = _half(b, 0, halves), i32(_word(b, 2))
            for j in range(16):
                low = _four(b[6 + j], False) | (((fifth >> j) & 1) << 4)
                high = _four(b[6 + j], True) | (((fifth >> (16 + j)) & 1) << 4)
                o[j] = f32(d * f32(i32(low - 16)))
                o[16 + j] = f32(d * f32(i32(high - 16)))


@kernel
def _q5_1(data, rows, out, halves):
    for i in range(rows.size):
        row, part = data[rows[i]], out[i]
        for k in range(row.size // 24):
            b, o = row[24 * k : 24 * k + 24], part[32 * k : 32 * k + 32]
            d, m, fifth = _half(b, 0, halves), _half(b, 2, halves), i32(_word(b, 4))
            for j in range(16):
                low = _four(b[8 + j], False) | (((fifth >> j) & 1) << 4)
                high = _four(b[8 + j], True) | (((fifth >> (16 + j)) & 1) << 4)
                o[j] = f32(f32(d * f32(i32(low))) + m)
                o[16 + j] = f32(f32(d * f32(i32(high))) + m)


@kernel
def _q8_0(data, rows, out, halves):
    for i in range(rows.size):
        row, part = data[rows[i]], out[i]
        for k in range(row.size // 34):
            b, o = row[34 * k : 34 * k + 34], part[32 * k : 32 * k + 32]
            d = _half(b, 0, halves)
            for j in range(32):
                o[j] = f32(f32(np.int8(b[2 + j])) * d)


@kernel
def _q2_k(data, rows, out, halves):
    for i in range(rows.size):
        row, part = data[rows[i]], out[i]
        for k in range(row.size // 84):
            b, o = row[84 * k : 84 * k + 84], part[256 * k : 256 * k + 256]
            d, m = _half(b, 80, halves), _half(b, 82, halves)
            for g in range(16):
                scale, least = f32(d * f32(_four(b[g], False))), f32(m * f32(_four(b[g], True)))
                at, shift = 16 + 32 * (g // 8) + 16 * (g % 2), 2 * ((g % 8) // 2)
                for j in range(16):
                    q = f32(i32((i32(b[at + j]) >> shift) & 3))
                    o[16 * g + j] = f32(f32(scale * q) - least)


@kernel
def _q3_k(data, rows, out, halves):
    for i in range(rows.size):
        row, part = data[rows[i]], out[i]
        for k in range(row.size // 110):
            b, o = row[110 * k : 110 * k + 110], part[256 * k : 256 * k + 256]
            d = _half(b, 108, halves)
            for g in range(16):
                low = _four(b[96 + g % 8], g >= 8)
                high = (i32(b[104 + g % 4]) >> (2 * (g // 4))) & 3
                scale = f32(d * f32(i32((low | (high << 4)) - 32)))
                at, shift = 32 + 32 * (g // 8) + 16 * (g % 2), 2 * ((g % 8) // 2)
                mask, bit = 16 * (g % 2), g // 2
                for j in range(16):
                    borrow = 4 - (((i32(b[mask + j]) >> bit) & 1) << 2)
                    q = ((i32(b[at + j]) >> shift) & 3) - borrow
                    o[16 * g + j] = f32(scale * f32(i32(q)))


@njit
def _six(b, at, g):
    """Scale and minimum of group g of 8, six bits each: twelve bytes for all."""
    if g < 4:
        return i32(i32(b[at + g]) & 63), i32(i32(b[at + 4 + g]) & 63)
    both = i32(b[at + 4 + g])
    scale = (both & 15) | ((i32(b[at + g - 4]) >> 2) & 48)
    return i32(scale), i32((both >> 4) | ((i32(b[at + g]) >> 2) & 48))


@kernel
def _q4_k(data, rows, out, halves):
    for i in range(rows.size):
        row, part = data[rows[i]], out[i]
        for k in range(row.size // 144):
            b, o = row[144 * k : 144 * k + 144], part[256 * k : 256 * k + 256]
            d, m = _half(b, 0, halves), _half(b, 2, halves)
            for g in range(8):
                s, n = _six(b, 4, g)
                scale, least, at, shift = f32(d * f32(s)), f32(m * f32(n)), 16 + 32 * (g // 2), 4 * (g % 2)  # fmt: skip
                for j in range(32):
                    q = f32(i32((i32(b[at + j]) >> shift) & 15))
                    o[32 * g + j] = f32(f32(scale * q) - least)


@kernel
def _q5_k(data, rows, out, halves):
    for i in range(rows.size):
        row, part = data[rows[i]], out[i]
        for k in range(row.size // 176):
            b, o = row[176 * k : 176 * k + 176], part[256 * k : 256 * k + 256]
            d, m = _half(b, 0, halves), _half(b, 2, halves)
            for g in range(8):
                s, n = _six(b, 4, g)
                scale, least, at, shift = f32(d * f32(s)), f32(m * f32(n)), 48 + 32 * (g // 2), 4 * (g % 2)  # fmt: skip
                for j in range(32):
                    q = ((i32(b[at + j]) >> shift) & 15) | (((i32(b[16 + j]) >> g) & 1) << 4)
                    o[32 * g + j] = f32(f32(scale * f32(i32(q))) - least)


@kernel
def _q6_k(data, rows, out, halves):
    for i in range(rows.size):
        row, part = data[rows[i]], out[i]
        for k in range(row.size // 210):
            b, o = row[210 * k : 210 * k + 210], part[256 * k : 256 * k + 256]
            d = _half(b, 208, halves)
            for g in range(16):
                scale = f32(d * f32(np.int8(b[192 + g])))
                h, t, start = g // 8, (g % 8) // 2, 16 * (g % 2)
                low, high = 64 * h + 32 * (t % 2) + start, 128 + 32 * h + start
                for j in range(16):
                    q = ((i32(b[low + j]) >> (4 * (t // 2))) & 15) | (((i32(b[high + j]) >> (2 * t)) & 3) << 4)  # fmt: skip
                    o[16 * g + j] = f32(scale * f32(i32(q - 32)))


_KERNELS: dict[str, Callable[..., None]] = {
    **{
        form: functools.partial(_compiled, fill)
        for form, fill in {
            "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
            "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
        }.items()
    },
    "F32": functools.partial(_by_torch, torch.float32),
    "F16": functools.partial(_by_torch, torch.float16),
    "BF16": functools.partial(_by_torch, torch.bfloat16),
}  # fmt: skip
