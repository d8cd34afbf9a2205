"""Algorithm 1 as written: on a quadratic its estimate can be worked out by hand."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from justforward import noise
from justforward.reference import direction, mezo_step

SLOPE = torch.tensor([[3.0, -1.0, 0.5], [0.0, 2.0, -4.0]], dtype=torch.float64)
START = [torch.zeros(2, 3, dtype=torch.float64), torch.tensor([1.0, -2.0], dtype=torch.float64)]


def quadratic(tensors: list[torch.Tensor]) -> float:
    """Slope and curvature; its gradient at `START` is (SLOPE, 2 t)."""
    matrix, vector = tensors
    return float((matrix * SLOPE).sum() + matrix.square().sum() + vector.square().sum())


@given(
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**40),
    samples=st.integers(1, 4),
    eps=st.sampled_from([1e-1, 1e-3]),
)
@settings(max_examples=25)
def test_a_step_follows_each_direction_by_its_exact_slope(
    seed: int, step: int, samples: int, eps: float
) -> None:
    tensors = [t.clone() for t in START]
    grads = mezo_step(
        tensors,
        lambda: quadratic(tensors),
        lr=0.01,
        eps=eps,
        seed=seed,
        step=step,
        num_samples=samples,
    )
    expected = [t.clone() for t in START]
    assert len(grads) == samples
    for lane, g in enumerate(grads):
        z = direction(START, noise.direction_seed(seed, step, lane))
        # the curvature cancels between +eps and -eps
        slope = float((SLOPE * z[0]).sum() + (2 * START[1] * z[1]).sum())
        assert abs(g - slope) < 1e-9
        for t, zt in zip(expected, z, strict=True):
            t -= 0.01 * slope / samples * zt
    for t, e in zip(tensors, expected, strict=True):
        torch.testing.assert_close(t, e, rtol=0, atol=1e-9)


def test_the_estimate_is_unbiased() -> None:
    samples = 4000
    tensors = [t.clone() for t in START]
    mezo_step(
        tensors, lambda: quadratic(tensors), lr=1, eps=1e-2, seed=5, step=0, num_samples=samples
    )
    gradient = [SLOPE, 2 * START[1]]
    square = sum(float(t.square().sum()) for t in gradient)
    for t, before, expected in zip(tensors, START, gradient, strict=True):
        # the variance of an element of g z is |gradient|^2 plus its own square
        error = (before - t - expected).abs()
        assert (error < 5 * ((square + expected**2) / samples) ** 0.5).all()


def test_directions_are_one_stream_a_tensor() -> None:
    z = direction([torch.zeros(3, 4), torch.zeros(5)], 9)
    assert torch.equal(z[0].flatten(), noise.normal(9, 0, 0, 12))
    assert torch.equal(z[1], noise.normal(9, 1, 0, 5))
