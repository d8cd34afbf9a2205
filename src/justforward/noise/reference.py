"""The noise in plain torch operations, one line a step of the definition: the twin that kernels are held to.

Slow (it walks through 64-bit integers) and device-independent: every operation used is exact or correctly
rounded as IEEE 754 wants it, none is ever fused with another, so the bits are equal on every device. See `spec` for
the definition.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from justforward.noise import spec

_MASK = 0xFFFFFFFF


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> tuple[Any, Any, Any, Any]:
    """Philox4x32-10: four words in [0, 2^32) for each counter.

    Args:
        counter: four words, each an int or an int64 tensor; tensors broadcast.
        key: two words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    m0, m1 = spec.PHILOX_MULTIPLIERS
    for _ in range(spec.PHILOX_ROUNDS):
        # A product of two 32-bit words wraps into the sign of int64; the masks make both halves right again.
        p0, p1 = c0 * m0, c2 * m1
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + spec.PHILOX_WEYL[0]) & _MASK, (k1 + spec.PHILOX_WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _key(seed: int) -> tuple[int, int]:
    return seed & _MASK, (seed >> 32) & _MASK


def _blocks(blocks: Tensor, seed: int, stream: int, domain: int) -> Tensor:
    """The four words of each block, shape [4, *blocks.shape]."""
    return torch.stack(philox((blocks & _MASK, (blocks >> 32) & _MASK, stream, domain), _key(seed)))


def words(
    seed: int, stream: int, start: int, count: int, domain: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Raw words start .. start + count of a domain, int64 in [0, 2^32)."""
    index = torch.arange(start, start + count, dtype=torch.int64, device=device)
    return _blocks(index // 4, seed, stream, domain).gather(0, (index % 4)[None])[0]


def _float(value: Tensor) -> Tensor:
    return value.to(torch.float32)


def _horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    value = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        value = value * x + c  # two roundings: eager torch never fuses them
    return value


def _box_muller(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    v = _float(x >> 1) + 0.5
    bits = v.view(torch.int32)
    e = (bits - spec.SQRT_HALF_BITS) >> 23
    f = (bits - (e << 23)).view(torch.float32) - 1.0
    log = _float(e - 31) * spec.MINUS_TWO_LN_2 + _horner(f, spec.LOG_COEFFICIENTS) * f
    # Through float64: torch's own float32 square root is off by a unit in the last place on some CPUs.
    radius = log.double().sqrt().float()
    low = (y << 2) & _MASK
    t = _float(torch.where(low >= 2**31, low - 2**32, low)) * 2.0**-32
    square = t * t
    sine = _horner(square, spec.SIN_COEFFICIENTS) * t
    cosine = _horner(square, spec.COS_COEFFICIENTS)
    quadrant = y >> 30
    odd = (quadrant & 1).bool()
    first = torch.where(odd, sine, cosine)
    second = torch.where(odd, cosine, sine)
    first = torch.where((quadrant == 1) | (quadrant == 2), -first, first)
    second = torch.where(quadrant >= 2, -second, second)
    return radius * first, radius * second


def normal(
    seed: int,
    stream: int,
    start: int,
    count: int,
    domain: int = spec.DOMAIN_GAUSSIAN,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal values start .. start + count of a stream: float32 [count]."""
    index = torch.arange(start, start + count, dtype=torch.int64, device=device)
    lane = index % spec.TILE
    w = _blocks(index // spec.TILE * 256 + lane % 256, seed, stream, domain)
    low = lane < 512
    first, second = _box_muller(torch.where(low, w[0], w[2]), torch.where(low, w[1], w[3]))
    return torch.where((lane // 256) % 2 == 0, first, second)


def rademacher(
    seed: int,
    stream: int,
    start: int,
    count: int,
    domain: int = spec.DOMAIN_RADEMACHER,
    device: torch.device | str = "cpu",
) -> Tensor:
    """+1 or -1 with equal probability, values start .. start + count of a stream: float32 [count]."""
    index = torch.arange(start, start + count, dtype=torch.int64, device=device)
    lane = index % spec.TILE
    word = lane % 32
    w = _blocks(index // spec.TILE * 8 + word % 8, seed, stream, domain)
    bit = (w.gather(0, (word // 8)[None])[0] >> (lane // 32)) & 1
    return 1.0 - 2.0 * _float(bit)


def dither(
    seed: int, stream: int, start: int, count: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Uniform values in [0, 1) on a 2^-24 lattice, pairwise independent: float32 [count]."""
    index = torch.arange(start, start + count, dtype=torch.int64, device=device)
    lanes = words(seed, stream, 0, spec.TILE, spec.DOMAIN_DITHER_LANE, device)
    first = start // spec.TILE
    last = (start + max(count, 1) - 1) // spec.TILE
    tiles = words(seed, stream, first, last - first + 1, spec.DOMAIN_DITHER_TILE, device)
    h = (tiles[index // spec.TILE - first] + lanes[index % spec.TILE]) & _MASK
    h = ((h ^ (h >> 16)) * spec.DITHER_MULTIPLIER) & _MASK
    return _float(h >> 8) * 2.0**-24


def follow(
    first: Tensor, second: Tensor, estimate: Tensor, beta1: float, beta2: float
) -> tuple[Tensor, Tensor]:
    """The sums of a rule with moments one gradient estimate later: beta1 m + g, beta2 v + g^2; float32."""
    return first * beta1 + estimate, second * beta2 + estimate * estimate


def adapted(
    first: Tensor, second: Tensor, shares: tuple[float, float], rate: float, eps: float
) -> Tensor:
    """-rate m / (sqrt(v) + eps) with the sums times `shares` as m and v; float32.

    Square root and quotient go through float64, which leaves them correctly rounded: 53 bits are more than twice
    24 and 2.
    """
    size = (second * shares[1]).double().sqrt().float() + eps
    return ((first * shares[0]).double() / size.double()).float() * -rate


def derive(seed: int, index: int, lane: int, domain: int) -> int:
    """A 64-bit seed that is a pure function of another seed and two counters (index < 2^64, lane < 2^32)."""
    w = philox((index & _MASK, (index >> 32) & _MASK, lane, domain), _key(seed))
    return int(w[0] | w[1] << 32)
