"""What the Triton kernels of `gpu` do with one tile of 1,024 weights: functions compiled into them.

Each line is one of `reference` or `cpu`, in the same order. Rounding to an integer is arithmetic of its own, because
Triton has none that runs both compiled and interpreted and keeps subnormal numbers.
"""

# mypy: ignore-errors
# (Triton compiles what is in here; mypy cannot follow its types.)
from __future__ import annotations

import triton
import triton.language as tl

from justforward.noise import spec

_TILE = tl.constexpr(spec.TILE)
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
_LIMIT = tl.constexpr(spec.GRID_LIMIT)
# How weights are stored: FORM. Those of 16 bits are seen as int16.
FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
_WHOLE, _BRAIN = tl.constexpr(FLOAT32), tl.constexpr(BFLOAT16)
_BITS1, _BITS2 = tl.constexpr(spec.BFLOAT16.bits), tl.constexpr(spec.FLOAT16.bits)
_LEAST1, _LEAST2 = tl.constexpr(spec.BFLOAT16.least), tl.constexpr(spec.FLOAT16.least)
_LARGEST1, _LARGEST2 = tl.constexpr(spec.BFLOAT16.largest), tl.constexpr(spec.FLOAT16.largest)
_UP, _DOWN = tl.constexpr(2.0**112), tl.constexpr(2.0**-112)


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):
    for _ in tl.static_range(_ROUNDS):
        h0, l0 = tl.umulhi(c0, _M0), c0 * _M0
        h1, l1 = tl.umulhi(c2, _M1), c2 * _M1
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = k0 + _W0, k1 + _W1
    return c0, c1, c2, c3


@triton.jit
def key(seed):
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
    return radius * first.to(tl.float32, bitcast=True), radius * second.to(tl.float32, bitcast=True)


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
def draw(tile, k0, k1, stream, DOMAIN: tl.constexpr, SIGNS: tl.constexpr):
    """z of one tile: float32 [1024]."""
    return (
        _signs(tile, k0, k1, stream, DOMAIN) if SIGNS else _gaussian(tile, k0, k1, stream, DOMAIN)
    )


@triton.jit
def lane_words(seed, stream):
    """The dither's words of all lanes: uint32 [1024]."""
    k0, k1 = key(seed)
    w0, w1, w2, w3 = _blocks(seed * 0, tl.arange(0, 256), k0, k1, stream, _DITHER_LANE)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (_TILE,))


@triton.jit
def power(k):
    """2^k, -126 <= k <= 127."""
    return ((k + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _rint(x):
    """To the nearest integer, ties to even: adding 2^23 leaves no bits for a fraction."""
    bits = x.to(tl.uint32, bitcast=True)
    large = ((bits & _SIGN) | _POW_23_BITS).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(x) < _POW_23, (x + large) - large, x)


@triton.jit
def _floor(x):
    """Triton's own flushes subnormal numbers on NVIDIA: of -1e-40 it makes 0, not -1."""
    near = _rint(x)
    return tl.where(near > x, near - 1.0, near)


@triton.jit
def magnitude(w):
    """The largest absolute value; a maximum of integers, which no NaN can hide from."""
    bits = w.to(tl.int32, bitcast=True) & _SIZE
    return tl.max(bits, axis=0).to(tl.float32, bitcast=True)


@triton.jit
def lay(w, k, largest):
    """The smallest grid at or above k that holds a tile, and its weights rounded to it; never -0.0."""
    while (k < 100) & (largest > power(k) * _LIMIT):
        k += 1
    return _rint(w * power(-k)) * power(k) + 0.0, k


@triton.jit
def place(first, size):
    """This program's tile, where its weights are, and which of them are there."""
    tile = first + tl.program_id(0).to(tl.int64)
    at = tile * _TILE + tl.arange(0, _TILE)
    return tile, at, at < size


@triton.jit
def read(theta, at, inside, FORM: tl.constexpr):
    """Weights as float32, 0 where there are none."""
    stored = tl.load(theta + at, mask=inside, other=0)
    if FORM == _WHOLE:
        w = stored
    elif FORM == _BRAIN:
        w = (stored.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        # Exponents differ by 112; the product makes of subnormal numbers what they are, too.
        bits = stored.to(tl.uint16, bitcast=True).to(tl.uint32)
        size = ((bits & 0x7FFF) << 13).to(tl.float32, bitcast=True) * _UP
        w = (size.to(tl.uint32, bitcast=True) | ((bits & 0x8000) << 16)).to(
            tl.float32, bitcast=True
        )
    return w


@triton.jit
def write(theta, at, inside, w, FORM: tl.constexpr):
    """`read` undone: the weights are numbers that their form has."""
    if FORM == _WHOLE:
        tl.store(theta + at, w, mask=inside)
    else:
        bits = w.to(tl.uint32, bitcast=True)
        if FORM != _BRAIN:
            size = tl.abs(w) * _DOWN
            bits = (size.to(tl.uint32, bitcast=True) << 3) | (bits & _SIGN)
        tl.store(theta + at, (bits >> 16).to(tl.uint16).to(tl.int16, bitcast=True), mask=inside)


@triton.jit
def write_nearest(out, at, inside, w, FORM: tl.constexpr):
    """Write float32 rounded to the nearest number of a form, ties to even."""
    if FORM == _WHOLE:
        tl.store(out + at, w, mask=inside)
    elif FORM == _BRAIN:
        bits = w.to(tl.uint32, bitcast=True)
        bits = (bits + ((bits >> 16) & 1) + 0x7FFF) >> 16
        tl.store(out + at, bits.to(tl.uint16).to(tl.int16, bitcast=True), mask=inside)
    else:
        tl.store(out + at, w.to(tl.float16).to(tl.int16, bitcast=True), mask=inside)


@triton.jit
def look_along(w, k, z, c, times):
    """w += times q rint(c z / q)."""
    return w + _rint(z * (power(-k) * c)) * (power(k) * times)


@triton.jit
def _word(tile, seed, stream):
    """The dither's word of a tile."""
    k0, k1 = key(seed)
    w0, w1, w2, w3 = _blocks(tile >> 2, tl.zeros((1,), tl.int32), k0, k1, stream, _DITHER_TILE)
    lane = tile & 3
    return tl.where(lane < 2, tl.where(lane < 1, w0, w1), tl.where(lane < 3, w2, w3))


@triton.jit
def _settle_half(w, total, u, inside, FORM: tl.constexpr):
    """q (floor(w / q) + floor(total / q + (rest + dither))), and whether a weight was held at the largest number."""
    BITS: tl.constexpr = _BITS1 if FORM == _BRAIN else _BITS2
    LEAST: tl.constexpr = _LEAST1 if FORM == _BRAIN else _LEAST2
    LARGEST: tl.constexpr = _LARGEST1 if FORM == _BRAIN else _LARGEST2
    here = w.to(tl.int32, bitcast=True) & _SIZE
    there = (w + total).to(tl.int32, bitcast=True) & _SIZE
    k = tl.maximum((tl.maximum(here, there) >> 23) - BITS, LEAST)
    q, inverse = power(k), power(-k)
    n = w * inverse
    whole = _floor(n)
    moved = (whole + _floor(total * inverse + ((n - whole) + u))) * q
    large = inside & (tl.abs(moved) > LARGEST)
    most = tl.where(moved > 0.0, LARGEST, -LARGEST)
    w = tl.where(inside, tl.where(large, most, moved), 0.0)
    return w, tl.max(large.to(tl.int32), axis=0)


@triton.jit
def settle(w, k, total, inside, tile, seed, stream, lanes, decay, FORM: tl.constexpr):
    """w += q floor((total - decay w) / q + dither), and a coarser grid when the headroom is used up.

    With 16 bits, k is no grid but the flag that `_settle_half` sets.
    """
    if decay != 0.0:
        total = total - w * decay
    h = tl.load(lanes + tl.arange(0, _TILE)).to(tl.uint32, bitcast=True)
    h = h + _word(tile, seed, stream)
    h = (h ^ (h >> 16)) * _D0
    u = (h >> 8).to(tl.int32).to(tl.float32) * _POW_M24
    if FORM == _WHOLE:
        q = power(k)
        w = tl.where(inside, w + _floor(total * power(-k) + u) * q, 0.0)
        largest = magnitude(w)
        if largest > q * _LIMIT:
            w, k = lay(w, k, largest)
    else:
        w, held = _settle_half(w, total, u, inside, FORM)
        k = tl.maximum(k, held)
    return w, k


@triton.jit
def cross(tile, columns):
    """Row and column of each element of a tile."""
    start = tile * _TILE
    row = start // columns
    within = (start - row * columns).to(tl.int32) + tl.arange(0, _TILE)
    return row + within // columns, within % columns


@triton.jit
def outer(a, b, row, column, inside, rows, columns, d0, d1):
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
def adapted(m, v, shares, rate, eps):
    """-rate m / (sqrt(v) + eps) with the sums times the two shares as m and v."""
    size = tl.sqrt_rn(v * tl.load(shares + 1)) + eps
    return tl.div_rn(m * tl.load(shares), size) * -rate
