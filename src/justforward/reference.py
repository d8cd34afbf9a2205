"""The paper's Algorithm 1 with z materialised, in float64: read it first. Tests hold `MeZO` to it.

MeZO, arXiv 2305.17333, Algorithm 1: for a step with seed s,

    theta <- theta + eps z(s);    l+ = L(theta; batch)
    theta <- theta - 2 eps z(s);  l- = L(theta; batch)
    theta <- theta + eps z(s)
    g = (l+ - l-) / (2 eps);      theta <- theta - lr g z(s)

with z ~ N(0, I). Here z is the noise of this package (Section 2 of the algorithm leaves its source open).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from justforward import noise
from justforward.noise import reference


def direction(tensors: Sequence[Tensor], seed: int) -> list[Tensor]:
    """z for each tensor: stream = its place in the list."""
    return [
        reference.normal(seed, stream, 0, t.numel()).view(t.shape).to(t.dtype)
        for stream, t in enumerate(tensors)
    ]


@torch.no_grad()
def mezo_step(
    tensors: Sequence[Tensor],
    closure: Callable[[], float | Tensor],
    *,
    lr: float,
    eps: float,
    seed: int,
    step: int,
    num_samples: int = 1,
) -> list[float]:
    """One step of Algorithm 1 (n-SPSA, Definition 1, for num_samples > 1), in place.

    Args:
        tensors: what is tuned, any dtype.
        closure: the loss at the current values.
        lr, eps: as in the paper.
        seed, step: name the directions.
        num_samples: n of n-SPSA.

    Returns:
        The projected gradients, one a sample.
    """
    grads: list[float] = []
    directions: list[list[Tensor]] = []
    for lane in range(num_samples):
        z = direction(tensors, noise.direction_seed(seed, step, lane))
        losses = []
        for sign in (1.0, -1.0):
            kept = [t.clone() for t in tensors]
            for t, zt in zip(tensors, z, strict=True):
                t.add_(zt, alpha=sign * eps)
            losses.append(float(closure()))
            for t, before in zip(tensors, kept, strict=True):
                t.copy_(before)
        grads.append((losses[0] - losses[1]) / (2.0 * eps))
        directions.append(z)
    for g, z in zip(grads, directions, strict=True):
        for t, zt in zip(tensors, z, strict=True):
            t.add_(zt, alpha=-lr * g / num_samples)
    return grads
