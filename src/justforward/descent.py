"""A step of MeZO in expectation, and in fact: how it is predicted to change the loss, and how it does.

A step is theta - lr z (z.g_B), for a Gaussian z and the gradient g_B of its rows (eps -> 0). To second order

    E[L(after) - L(before)] = -lr E[g.z z.g_B] + lr^2/2 E[(z.g_B)^2 z^T H z]
                            = -lr |g|^2 + lr^2/2 (2 E[g_B^T H g_B] + E|g_B|^2 tr H)

by the fourth moment of z: E[(z.a)^2 z^T H z] = 2 a^T H a + |a|^2 tr H. With g_B^T H g_B <= |H| |g_B|^2 and
tr H = r |H| this is the descent lemma of Theorem 1 (arXiv 2305.17333, section 4.1) with its factor
(d r + d - 2) / (d + 2) + 1 ~ r + 2, which is for z on a sphere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from justforward import noise
from justforward.data import batches
from justforward.errors import NonFiniteLoss
from justforward.hessian import Estimate, Objective, dot
from justforward.optim import MeZO
from justforward.trajectory import rounded

# ------------------------------------------------------------------------------------------ prediction


@dataclass(frozen=True)
class Descent:
    """The expected change of the loss by one step, to second order: -lr slope + lr^2 / 2 curvature.

    Attributes:
        slope: |g|^2, the gradient being that of the loss whose change is meant.
        curvature: E[(z.g_B)^2 z^T H z].
        error: standard error of the curvature.
    """

    slope: float
    curvature: float
    error: float = 0.0

    @classmethod
    def predicted(
        cls, slope: float, square: float, trace: Estimate, along: float, across: Estimate
    ) -> Descent:
        """From what is measured.

        Args:
            slope: |g|^2.
            square: E|g_B|^2 over the rows of a step.
            trace: tr H.
            along: g^T H g.
            across: tr(H Sigma_B), Sigma_B the covariance of g_B: E[g_B^T H g_B] = along + across.
        """
        curvature = 2.0 * (along + across.mean) + square * trace.mean
        return cls(slope, curvature, math.hypot(2.0 * across.error, square * trace.error))

    def at(self, lr: float) -> float:
        """The expected change at this learning rate."""
        return -lr * self.slope + 0.5 * lr * lr * self.curvature

    @property
    def unit(self) -> float:
        """slope / |curvature|: the best learning rate where the curvature is positive."""
        return self.slope / abs(self.curvature)


def gamma(dimension: int, effective_rank: float, samples: int = 1) -> float:
    """How many times smaller a step than SGD's Theorem 1 asks for (arXiv 2305.17333, section 4.1)."""
    d, r, n = dimension, effective_rank, samples
    return (d * r + d - 2) / (n * (d + 2)) + 1


# ----------------------------------------------------------------------------------------- observation


@dataclass(frozen=True)
class Trial:
    """One direction z: what it was in theory, what the look saw, and the loss after a step at each rate.

    Attributes:
        full: z.g, g the gradient of the loss of all rows.
        part: z.g_B, g_B that of the step's rows.
        inner: g.g_B, the mean of z.g z.g_B over z.
        square: |g_B|^2, the mean of (z.g_B)^2.
        seen: the projected gradient that the look found for z.g_B.
        bent: what the look found for z^T H_B z: (l+ + l- - 2 l) / eps^2.
        changes: L(after) - L(before) over all rows, for each learning rate.
    """

    full: float
    part: float
    inner: float
    square: float
    seen: float
    bent: float
    changes: tuple[float, ...]


def observe(
    optimizer: MeZO,
    objective: Objective,
    gradient: Tensor,
    rates: Sequence[float],
    *,
    directions: int,
    step_rows: int,
) -> list[Trial]:
    """Take the optimizer's steps 0, 1, ... from the same weights, each at several rates, and undo them.

    Args:
        optimizer: weight space, rule sgd, no log, at step 0; one group. Left as it was, weights too.
        objective: the loss of all rows, of the optimizer's weights in their order.
        gradient: [d], g.
        rates: learning rates.
        directions: how many steps.
        step_rows: rows that a step sees; divides the number of rows.

    Returns:
        A trial for each direction.

    Raises:
        NonFiniteLoss: a look or a step came to no number.
    """
    weights = optimizer.weights
    kept = [t.detach().clone() for t in [*weights.tensors, *weights.exponents]]

    def go_home() -> None:
        with torch.no_grad():
            for tensor, before in zip([*weights.tensors, *weights.exponents], kept, strict=True):
                tensor.copy_(before)

    eps = float(optimizer.param_groups[0]["eps"])
    before = objective.value()
    trials = []
    try:
        for index in range(directions):
            rows = range(objective.rows)
            chosen = batches(objective.rows, step_rows, optimizer.seed, index)
            optimizer.steps = index
            step = optimizer.estimate(lambda chosen=chosen: objective.value(chosen))
            seen = step.projected_grads[0]
            home = before if step_rows == objective.rows else objective.value(chosen)
            bent = 2.0 * (step.loss - home) / eps**2  # step.loss is (l+ + l-) / 2
            of_step = gradient
            if step_rows < objective.rows:
                share = [(row in chosen) / step_rows for row in rows]
                of_step = objective.gradient(share)
            full, part = _along(optimizer, index, gradient, of_step)
            changes = []
            for lr in rates:
                # what `estimate` gives at this learning rate: the rule is linear in it
                optimizer.apply(replace(step, coefficients=(rounded(-lr * seen),)))
                after = objective.value()
                if not math.isfinite(after):
                    raise NonFiniteLoss(index, after, f"after a step with lr {lr:g}")
                changes.append(after - before)
                go_home()
                optimizer.steps = index
            inner, square = dot(gradient, of_step), dot(of_step, of_step)
            trials.append(Trial(full, part, inner, square, seen, bent, tuple(changes)))
    finally:
        go_home()
        optimizer.steps = 0
    return trials


def _along(optimizer: MeZO, index: int, *vectors: Tensor) -> list[float]:
    """z.v of flat vectors, for the direction z of step `index`."""
    seed = noise.direction_seed(optimizer.seed, index, 0)
    sums = [0.0] * len(vectors)
    start = 0
    for stream, tensor in enumerate(optimizer.weights.tensors):
        z = noise.normal(seed, stream, 0, tensor.numel()).to(tensor.device)
        for k, v in enumerate(vectors):
            sums[k] += dot(z, v[start : start + z.numel()])
        start += z.numel()
    return sums


def mean_change(
    trials: Sequence[Trial], place: int, lr: float, trace: float, along: float
) -> Estimate:
    """The mean change at rate number `place`, with most of what it owes to the choice of z taken out.

    Given b = z.g_B a step is expected to change the loss by -lr z.g b + lr^2/2 b^2 (t - k + k b^2 / |g_B|^2), for
    t = tr H and k = g_B^T H g_B / |g_B|^2. The mean of that over z is known, so its deviation is subtracted (a
    control variate). It is zero on average for any t and k, so the mean is unbiased even where they are wrong.
    Its standard error is to be believed where the loss is near its second order. Where it is not, a large |z.g|
    counts for something else than the correction says, and few trials have one: see the plain mean too.

    Args:
        trials: of `observe`.
        place: of the learning rate.
        lr: it.
        trace: t.
        along: k.
    """

    def chance(t: Trial) -> float:
        b = t.part**2
        curved = (trace - along) * (b - t.square) + along * (b * b / t.square - 3.0 * t.square)
        return -lr * (t.full * t.part - t.inner) + 0.5 * lr * lr * curved

    return Estimate.of([t.changes[place] - chance(t) for t in trials])
