"""The numbers that define the noise: counters, domains, layouts and polynomial coefficients.

Every backend (plain torch, Numba, Triton) reads them from here, so that they cannot drift apart. Changing any
value changes z, and therefore what every existing log means: bump `NOISE_VERSION` with it.

z = noise(seed, stream, index) is a pure function built on Philox4x32-10 (Salmon, Moraes, Dror, Shaw,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011):

    key      = (seed low word, seed high word)
    counter  = (block low word, block high word, stream, domain)

`seed` names a direction, `stream` a parameter tensor, `index` an element of it in row-major order, and
`domain` what the words are used for. Elements come in tiles of 1,024:

    gaussian    256 blocks a tile; words (0, 1) and (2, 3) of block b are Box-Muller pairs and give the
                elements b, 256 + b and 512 + b, 768 + b of the tile
    rademacher  8 blocks a tile; bit j of word 8 l + b (word l of block b) is element 32 j + 8 l + b
    words       (seeds, dither) word i is word i mod 4 of block i // 4
"""

from __future__ import annotations

import math
from dataclasses import dataclass

NOISE_VERSION = 1

TILE = 1024

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10

DOMAIN_GAUSSIAN = 0
DOMAIN_RADEMACHER = 1
DOMAIN_OUT = 2  # factor a of a rank-one direction a b^T: one value for each row of the tensor
DOMAIN_IN = 3  # factor b: one value for each column
DOMAIN_DITHER_TILE = 4
DOMAIN_DITHER_LANE = 5
DOMAIN_DIRECTION = 6  # seeds of directions
DOMAIN_STEP = 7  # seeds of the dither of a step

# Box-Muller. The radius is sqrt(-2 ln u) with u = (floor(word / 2) + 1/2) / 2^31, so |z| <= 6.661. ln u is
# taken apart as e ln 2 + f P(f), where 1 + f is in [sqrt(1/2), sqrt(2)). The coefficients are those of a
# minimax fit (relative error 1.1e-6 in the logarithm, 1.5e-6 in the sine, 2.8e-8 in the cosine, all far
# below what any statistic of z can see), times -2.
LOG_COEFFICIENTS = tuple(
    -2.0 * c
    for c in (
        1.0000009748223597,
        -0.500011128834468,
        0.3331450891745387,
        -0.2490974429489043,
        0.2049632935987235,
        -0.18667853624630196,
        0.11896104668510678,
    )
)
MINUS_TWO_LN_2 = -2.0 * math.log(2.0)
SQRT_HALF_BITS = 0x3F3504F3
# The angle: the two top bits of the second word choose the quadrant, the other thirty (as a signed fraction
# t of a quarter turn, -1/2 <= t < 1/2) the place in it.
SIN_COEFFICIENTS = (1.5707939594277205, -0.6457980450318785, 0.07793992932044101)
COS_COEFFICIENTS = (1.0, -1.2336970142479335, 0.2535986441116826, -0.02040835254070771)
MAX_ABS_GAUSSIAN = 6.67

# Dither: h = tile word + lane word, then h ^= h >> 16 and h *= the multiplier; the top 24 bits are a fraction
# in [0, 1). The sums are pairwise independent, the mixing is a bijection that keeps them so.
DITHER_MULTIPLIER = 0x7FEB352D

# Weights are integers n times a power of two q, |n| <= GRID_LIMIT; a look adds up to GRID_LOOK. Their sum is at
# most 2^24, the last integer up to which float32 has them all.
GRID_LIMIT = 1.5 * 2.0**23
GRID_LOOK = 2.0**22


@dataclass(frozen=True)
class Form:
    """How 16 bits hold a weight: +-1.f x 2^e.

    Attributes:
        bits: such that float32's exponent field, minus this, is k for the unit 2^k in the last place.
        least: the smallest k.
        largest: the largest number.
    """

    bits: int
    least: int
    largest: float


BFLOAT16 = Form(bits=127 + 7, least=-126, largest=float.fromhex("0x1.fep+127"))
FLOAT16 = Form(bits=127 + 10, least=-24, largest=65504.0)
