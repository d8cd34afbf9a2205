"""How unlike tensors are, for estimates that look along them at unlike lengths (`variants.Modified`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from justforward import noise
from justforward.directions import Weights
from justforward.errors import NonFiniteLoss, UserError
from justforward.estimators import Site, describe, look_weights
from justforward.trajectory import rounded
from justforward.variants import Modified

# Lanes that no direction of a step has (a log holds fewer than 2^13 of them).
PROBE_LANE = 1 << 20
# A smaller d counts as this part of the largest: one part's looks would be lost in the rounding of the loss.
SPREAD = 0.01


def measure(
    modified: Modified, site: Site, seed: int, closure: Any, batch: Any
) -> tuple[float, ...]:
    """d of each parameter group, relative to the smallest, as the log keeps it. The weights are bit-identical after.

    Args:
        modified: what is measured.
        site: where from; its lengths are those of the looks.
        seed: of the run.
        closure, batch: as of a step in weight space: losses of rows are averaged.

    Raises:
        NonFiniteLoss: a loss, or the gradient, was NaN or infinite.
        UserError: the loss is not differentiable where it must be.
    """
    if modified.by == "weights":
        return relative(weight_sizes(site.weights))
    if modified.by == "gradient":
        return relative(gradient_norms(site, closure, batch))
    return relative(looked_norms(site, seed, closure, batch, modified.samples))


def relative(values: Sequence[float]) -> tuple[float, ...]:
    """Sizes over the smallest, as `Modified` says; rounded to what the log keeps."""
    floor = SPREAD * max(values)
    if floor == 0.0:
        return (1.0,) * len(values)
    smallest = max(min(values), floor)
    return tuple(rounded(max(v, floor) / smallest) for v in values)


def weight_sizes(weights: Weights) -> list[float]:
    """Root mean square of the weights of each group."""
    squares, counts = [0.0] * len(weights.floors), [0] * len(weights.floors)
    for group, tensor in zip(weights.groups, weights.tensors, strict=True):
        squares[group] += _square(tensor)
        counts[group] += tensor.numel()
    return [
        math.sqrt(square / max(count, 1)) for square, count in zip(squares, counts, strict=True)
    ]


def looked_norms(site: Site, seed: int, closure: Any, batch: Any, samples: int) -> list[float]:
    """Norm of the loss's gradient g in each group: E (z . g)^2 = |g|^2 for z of that group alone.

    The directions are of lanes that no step has.

    Raises:
        NonFiniteLoss, UserError, whatever the closure raises: the weights are home.
    """
    out: list[float] = []
    for part, length in enumerate(site.eps):
        alone = [length if group == part else 0.0 for group in range(len(site.eps))]

        def seed_of(lane: int, first: int = PROBE_LANE + part * samples) -> int:
            return noise.direction_seed(seed, site.step, first + lane)

        probe = replace(site, eps=alone, seed_of=seed_of, kind="two-sided")
        seen = look_weights(probe, closure, batch, samples, stay=False)
        out.append(math.sqrt(math.fsum((r / length) ** 2 for r in seen.rises) / samples))
    return out


def gradient_norms(site: Site, closure: Any, batch: Any) -> list[float]:
    """Norm of the loss's gradient in each group, by one backward pass; no `grad` is touched.

    Raises:
        NonFiniteLoss, UserError: as `measure`.
    """
    with torch.enable_grad():
        loss = site.shield.call(closure, *(() if batch is None else (batch,)))
        if not isinstance(loss, Tensor) or not loss.requires_grad or loss.numel() == 0:
            raise UserError(
                f"modified by the gradient: the closure returned {describe(loss)} that torch cannot differentiate: "
                'use by="looks"'
            )
        loss = loss.float().mean()
        grads = torch.autograd.grad(loss, site.weights.tensors, allow_unused=True)
    squares = [0.0] * len(site.eps)
    for group, grad in zip(site.weights.groups, grads, strict=True):
        squares[group] += 0.0 if grad is None else _square(grad)
    for value in (float(loss.detach()), *squares):
        if not math.isfinite(value):
            raise NonFiniteLoss(site.step, value, "in the gradient")
    return [math.sqrt(square) for square in squares]


def _square(tensor: Tensor) -> float:
    """Sum of the squares, part by part: a float64 copy of a large tensor would double the memory."""
    flat = tensor.detach().reshape(-1)
    parts = (flat[start : start + (1 << 20)] for start in range(0, len(flat), 1 << 20))
    return math.fsum(float(torch.linalg.vector_norm(p, dtype=torch.float64)) ** 2 for p in parts)
