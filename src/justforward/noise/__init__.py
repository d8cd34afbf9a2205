"""Noise as a pure function: `z = noise(seed, stream, index)`. Knows nothing of models.

spec.py       the definition: domains, layouts, coefficients, the version
reference.py  plain torch, slow and readable: the twin
cpu.py        Numba kernels: z, and z added to weights without ever being stored
moments.py    the same for rules with moments
llvm.py       what those take from LLVM by name
formats.py    how a tile of each format is read, moved by a step and written back
half.py       the kernels of both for weights of 16 bits, and these as a look sees them
gpu.py        all of them in Triton, for NVIDIA GPUs
tiles.py      what those do with one tile
plain.py      the same kernels in plain torch, for all other devices
devices.py    which of those two a device gets
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from justforward.errors import UserError
from justforward.noise import reference, spec
from justforward.noise.spec import NOISE_VERSION

__all__ = ["NOISE_VERSION", "direction_seed", "normal", "rademacher", "step_seed"]


def _check(seed: int, stream: int, start: int, count: int) -> None:
    for name, value, bits in (("seed", seed, 64), ("stream", stream, 32), ("start", start, 63)):
        if not 0 <= value < 2**bits:
            raise UserError(f"{name} is {value}: it must be at least 0 and below 2^{bits}")
    if count < 0:
        raise UserError(f"count is {count}: it must be at least 0")


def normal(seed: int, stream: int, start: int, count: int) -> Tensor:
    """Standard normal values of one stream of one direction.

    Args:
        seed: the direction, 0 <= seed < 2^64.
        stream: the parameter tensor, 0 <= stream < 2^32.
        start: index of the first element, 0 <= start < 2^63.
        count: how many.

    Returns:
        float32 [count] on the CPU; element i is a function of (seed, stream, start + i) alone.

    Raises:
        UserError: an argument is out of range.
    """
    return _fill(seed, stream, start, count, spec.DOMAIN_GAUSSIAN, rademacher=False)


def rademacher(seed: int, stream: int, start: int, count: int) -> Tensor:
    """+1 or -1 with equal probability; arguments, result and errors as for `normal`."""
    return _fill(seed, stream, start, count, spec.DOMAIN_RADEMACHER, rademacher=True)


def _fill(seed: int, stream: int, start: int, count: int, domain: int, rademacher: bool) -> Tensor:
    from justforward.noise import cpu  # Numba takes a while to import: only when noise is asked for

    seed, stream, start, count = int(seed), int(stream), int(start), int(count)
    _check(seed, stream, start, count)
    out = torch.empty(count, dtype=torch.float32)
    cpu.fill(out.numpy(), np.uint64(seed), np.uint64(stream), start, domain, rademacher)
    return out


def direction_seed(seed: int, step: int, lane: int) -> int:
    """The seed of direction `lane` of step `step` of the run with this seed."""
    return reference.derive(seed, step, lane, spec.DOMAIN_DIRECTION)


def step_seed(seed: int, step: int) -> int:
    """The seed of the dither that rounds the update of step `step`."""
    return reference.derive(seed, step, 0, spec.DOMAIN_STEP)
