"""Numba kernels of rules with moments: sums over a window of gradient estimates that are never stored.

Equal in every bit to `plain` and `reference.follow`, and vectorised by the means that `cpu` names. The estimates of a
tile are kept in a ring of `window` rows while its steps are taken, so that a pass over many steps makes each z once.
"""

# mypy: ignore-errors
# (Numba types what is in here; mypy cannot follow its intrinsics.)
from __future__ import annotations

from typing import Any

import numpy as np

from justforward.noise import spec
from justforward.noise.cpu import draw_tile, fetch_tile, lane_words, one_word, outer_tile
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
    u64,
)
from justforward.noise.llvm import divide, rint, sqrt

_GAUSSIAN, _RADEMACHER = u64(spec.DOMAIN_GAUSSIAN), u64(spec.DOMAIN_RADEMACHER)
_DITHER_TILE = u64(spec.DOMAIN_DITHER_TILE)
_ZERO, _ONE = f32(0.0), f32(1.0)


@inline
def _follow(first, second, ring, j0, j1, beta1, beta2):
    """first <- beta1 first + g and second <- beta2 second + g^2 with estimates j0 .. j1 of the ring, in order."""
    rows = ring.shape[0]
    j = j0
    while j + 4 <= j1:  # four at a time, in order: a sum is read and written once for all four
        g0, g1 = ring[j % rows], ring[(j + 1) % rows]
        g2, g3 = ring[(j + 2) % rows], ring[(j + 3) % rows]
        for i in range(first.size):
            m = f32(f32(beta1 * first[i]) + g0[i])
            m = f32(f32(beta1 * m) + g1[i])
            m = f32(f32(beta1 * m) + g2[i])
            first[i] = f32(f32(beta1 * m) + g3[i])
            v = f32(f32(beta2 * second[i]) + f32(g0[i] * g0[i]))
            v = f32(f32(beta2 * v) + f32(g1[i] * g1[i]))
            v = f32(f32(beta2 * v) + f32(g2[i] * g2[i]))
            second[i] = f32(f32(beta2 * v) + f32(g3[i] * g3[i]))
        j += 4
    while j < j1:
        g = ring[j % rows]
        for i in range(first.size):
            first[i] = f32(f32(beta1 * first[i]) + g[i])
            second[i] = f32(f32(beta2 * second[i]) + f32(g[i] * g[i]))
        j += 1


@inline
def _adapted(acc, first, second, share1, share2, rate, eps):
    """acc = -rate m / (sqrt(v) + eps) with m = share1 first, v = share2 second."""
    for i in range(first.size):
        size = f32(sqrt(f32(share2 * second[i])) + eps)
        acc[i] = f32(f32(-rate) * divide(f32(share1 * first[i]), size))


def make_adapt(SIGNS: bool, DOMAIN: Any, FORM: int) -> Any:
    WHOLE, BRAIN, KEY = FORM == FLOAT32, FORM == BFLOAT16, SOURCES

    def _adapt(theta, exponents, first, last, sum1, sum2, steps, ends, rates, decays, shares,
               beta1, beta2, eps, window, stream, seeds, cs, back):  # fmt: skip
        """Apply any number of steps of a rule with moments to tiles first .. last in one pass over the weights.

        theta <- theta + q floor((-rate m / (sqrt(v) + eps) - decay theta) / q + dither), step after step.

        Args:
            theta, exponents: the weights float32 [n] and their grid int8 [tiles]; both change.
            sum1, sum2: float32 [n], the kept sums where window is 0, which change; else not used.
            steps: uint64 [S], the seeds of the steps' dither.
            ends: int64 [P], gradient estimate j has the directions ends[j - 1] .. ends[j]. The last S are the
                steps' own, those before them are of steps already taken.
            rates, decays: float32 [S].
            shares: float32 [S, 2], the sums times these are m and v.
            beta1, beta2, eps: float32.
            window: estimates that m and v are of, 1 or more; or 0: all, by way of the kept sums.
            stream: the tensor.
            seeds, cs: uint64 [D] and float32 [D], the directions and their coefficients.
            back: where not 0, the weights still stand at -back along the last direction of the first step,
                and are first brought home, with the same z.
        """
        _ = KEY
        z, acc = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
        mean, square = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
        room = np.empty(TILE, np.float32)
        w0, w1 = np.empty(256, np.uint32), np.empty(256, np.uint32)
        w2, w3 = np.empty(256, np.uint32), np.empty(256, np.uint32)
        ring = np.empty((max(window, 1), TILE), np.float32)
        lanes = lane_words(steps, stream)
        before = ends.size - steps.size
        for tile in range(first, last):
            fetch_tile(theta, tile, last)
            start, end = tile * TILE, min((tile + 1) * TILE, theta.size)
            if WHOLE:
                part = theta[tile * TILE : min((tile + 1) * TILE, theta.size)]
            elif BRAIN:
                part = open_bfloat16(theta, tile, room)
            else:
                part = open_float16(theta, tile, room)
            d = 0
            for j in range(ends.size):
                g = ring[j % ring.shape[0]]
                g[:] = _ZERO
                while d < ends[j]:
                    draw_tile(tile, seeds[d], stream, DOMAIN, SIGNS, z, w0, w1, w2, w3)
                    c = cs[d]
                    for i in range(TILE):
                        g[i] = f32(g[i] + f32(c * z[i]))
                    d += 1
                if j >= before:
                    s = j - before
                    if back != _ZERO and s == 0:
                        k = i32(exponents[tile])
                        home, q = f32(back * power(-k)), power(k)
                        for i in range(part.size):
                            part[i] = f32(part[i] + f32(rint(f32(z[i] * home)) * q))
                    if window == 0:
                        m, v, oldest = sum1[start:end], sum2[start:end], j
                    else:
                        m, v, oldest = mean[:], square[:], max(j + 1 - window, 0)
                        m[:] = _ZERO
                        v[:] = _ZERO
                    _follow(m, v, ring, oldest, j + 1, beta1, beta2)
                    _adapted(acc, m, v, shares[s, 0], shares[s, 1], rates[s], eps)
                    word = one_word(tile, steps[s], stream, _DITHER_TILE)
                    take_decay(part, acc, decays[s])
                    settle_as(WHOLE, BRAIN, part, exponents, tile, acc, _ONE, lanes[s], word)
            if not WHOLE:
                if BRAIN:
                    close_bfloat16(theta, tile, part)
                else:
                    close_float16(theta, tile, part)

    return kernel(_adapt)


adapt = make_adapt(False, _GAUSSIAN, FLOAT32)
adapt_signs = make_adapt(True, _RADEMACHER, FLOAT32)


def make_adapt_outer(FORM: int) -> Any:
    WHOLE, BRAIN, KEY = FORM == FLOAT32, FORM == BFLOAT16, SOURCES

    def _adapt_outer(theta, exponents, first, last, sum1, sum2, steps, ends, rates, decays, shares,
                    beta1, beta2, eps, window, stream, columns, a, b):  # fmt: skip
        """`adapt` along rank-one directions; a: float32 [D, rows] times the coefficients, b: float32 [D, columns]."""
        _ = KEY
        acc, room = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
        mean, square = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
        ring = np.empty((max(window, 1), TILE), np.float32)
        lanes = lane_words(steps, stream)
        before = ends.size - steps.size
        for tile in range(first, last):
            start, end = tile * TILE, min((tile + 1) * TILE, theta.size)
            if WHOLE:
                part = theta[tile * TILE : min((tile + 1) * TILE, theta.size)]
            elif BRAIN:
                part = open_bfloat16(theta, tile, room)
            else:
                part = open_float16(theta, tile, room)
            d = 0
            for j in range(ends.size):
                outer_tile(ring[j % ring.shape[0]], start, part.size, columns, a, b, d, ends[j])
                d = ends[j]
                if j >= before:
                    s = j - before
                    if window == 0:
                        m, v, oldest = sum1[start:end], sum2[start:end], j
                    else:
                        m, v, oldest = (
                            mean[: part.size],
                            square[: part.size],
                            max(j + 1 - window, 0),
                        )
                        m[:] = _ZERO
                        v[:] = _ZERO
                    _follow(m, v, ring, oldest, j + 1, beta1, beta2)
                    _adapted(acc, m, v, shares[s, 0], shares[s, 1], rates[s], eps)
                    word = one_word(tile, steps[s], stream, _DITHER_TILE)
                    take_decay(part, acc, decays[s])
                    settle_as(WHOLE, BRAIN, part, exponents, tile, acc, _ONE, lanes[s], word)
            if not WHOLE:
                if BRAIN:
                    close_bfloat16(theta, tile, part)
                else:
                    close_float16(theta, tile, part)

    return kernel(_adapt_outer)


adapt_outer = make_adapt_outer(FLOAT32)
