"""The noise: known answers, kernel against twin in every bit, and the statistics of what comes out."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from justforward import UserError, noise
from justforward.noise import cpu, plain, reference, spec

SEEDS = st.integers(0, 2**64 - 1)
STREAMS = st.integers(0, 2**32 - 1)
FAMILIES = [(noise.normal, reference.normal), (noise.rademacher, reference.rademacher)]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        # Known answers of the Random123 distribution, kat_vectors, philox4x32 10.
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    assert reference.philox(counter, key) == expected
    tensors = tuple(torch.tensor([c], dtype=torch.int64) for c in counter)
    assert tuple(int(w) for w in reference.philox(tensors, key)) == expected  # type: ignore[arg-type]
    compiled = cpu.philox_words(*(np.uint64(c) for c in counter), *(np.uint32(k) for k in key))
    assert tuple(int(w) for w in compiled) == expected


@pytest.mark.parametrize(("kernel", "twin"), FAMILIES)
@given(
    seed=SEEDS,
    stream=STREAMS,
    start=st.one_of(
        st.integers(0, 5000), st.integers(2**32 - 3000, 2**32 + 3000), st.integers(0, 2**50)
    ),
    count=st.integers(0, 3000),
)
@settings(max_examples=40, deadline=None)
def test_kernel_is_the_twin_in_every_bit(kernel, twin, seed, stream, start, count) -> None:
    assert same_bits(kernel(seed, stream, start, count), twin(seed, stream, start, count))


@pytest.mark.parametrize(("kernel", "twin"), FAMILIES)
def test_a_million_elements_in_every_bit(kernel, twin) -> None:
    assert same_bits(
        kernel(2**63 + 11, 5, 2**40 - 7, 1_000_000), twin(2**63 + 11, 5, 2**40 - 7, 1_000_000)
    )


@pytest.mark.parametrize(("kernel", "twin"), FAMILIES)
@given(seed=SEEDS, start=st.integers(0, 4000), count=st.integers(1, 4000), cut=st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_any_slice_is_the_whole_sliced(kernel, twin, seed, start, count, cut) -> None:
    whole = kernel(seed, 1, start, count)
    at = int(cut * count)
    parts = torch.cat([kernel(seed, 1, start, at), kernel(seed, 1, start + at, count - at)])
    assert same_bits(whole, parts)


@given(seed=SEEDS, start=st.integers(0, 5000), count=st.integers(0, 3000))
@settings(max_examples=20, deadline=None)
def test_dither_is_uniform_in_zero_one(seed, start, count) -> None:
    u = reference.dither(seed, 3, start, count)
    assert ((u >= 0) & (u < 1)).all()
    assert torch.equal(u, reference.dither(seed, 3, 0, start + count)[start:])


N = 2_000_000


def test_normal_moments_and_distribution() -> None:
    z = noise.normal(1, 0, 0, N).double()
    root = N**-0.5
    assert abs(z.mean()) < 5 * root
    assert abs(z.var() - 1) < 5 * root * 2**0.5
    assert abs((z**3).mean()) < 5 * root * 15**0.5
    assert abs((z**4).mean() - 3) < 5 * root * 96**0.5
    assert abs((z**6).mean() - 15) < 5 * root * (10395 - 225) ** 0.5
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-4
    assert z.abs().max() < spec.MAX_ABS_GAUSSIAN
    tail = (z.abs() > 4).double().mean().item()
    assert abs(tail - 6.334e-5) < 5 * (6.334e-5 / N) ** 0.5


def test_normal_agrees_with_exact_box_muller() -> None:
    blocks = torch.arange(256)
    w = reference._blocks(blocks, 9, 2, spec.DOMAIN_GAUSSIAN).double()
    radius = torch.sqrt(-2 * torch.log((torch.floor(w[0] / 2) + 0.5) / 2**31))
    # The quadrant's two bits, then a signed fraction of a quarter turn around its axis.
    low = torch.remainder(w[1] * 4, 2**32)
    turn = (torch.floor(w[1] / 2**30) + torch.where(low >= 2**31, low - 2**32, low) / 2**32) / 4
    z = noise.normal(9, 2, 0, 512).double()
    exact = torch.cat([radius * torch.cos(2 * np.pi * turn), radius * torch.sin(2 * np.pi * turn)])
    assert (z - exact).abs().max() < 1e-5


def test_rademacher_is_fair() -> None:
    z = noise.rademacher(1, 0, 0, N)
    assert set(z.unique().tolist()) == {-1.0, 1.0}
    assert abs(z.double().mean()) < 5 * N**-0.5
    runs = (z[1:] != z[:-1]).double().mean()
    assert abs(runs - 0.5) < 5 * 0.5 * N**-0.5


@pytest.mark.parametrize("kernel", [noise.normal, noise.rademacher])
@pytest.mark.parametrize(
    ("one", "other"),
    [((1, 0), (1, 1)), ((1, 0), (2, 0)), ((1, 7), (2**32 + 1, 7)), ((0, 0), (2**63, 0))],
)
def test_streams_and_seeds_are_uncorrelated(kernel, one, other) -> None:
    a, b = kernel(*one, 0, N).double(), kernel(*other, 0, N).double()
    assert abs((a * b).mean()) < 5 * N**-0.5
    assert abs((a**2 * b**2).mean() - 1) < 5 * 8**0.5 * N**-0.5


@pytest.mark.parametrize("kernel", [noise.normal, noise.rademacher])
@pytest.mark.parametrize("lag", [1, 2, 32, 256, 512, 1024, 4096])
def test_elements_are_uncorrelated_at_the_layout_s_own_distances(kernel, lag) -> None:
    z = kernel(3, 0, 0, N + lag).double()
    assert abs((z[lag:] * z[:-lag]).mean()) < 5 * N**-0.5
    assert abs((z[lag:] ** 2 * z[:-lag] ** 2).mean() - 1) < 5 * 8**0.5 * N**-0.5


def test_rank_one_factors_have_identity_covariance() -> None:
    seeds = np.arange(1, 40_001, dtype=np.uint64)
    a, b = np.empty((len(seeds), 3), np.float32), np.empty((len(seeds), 2), np.float32)
    cpu.fill_rows(a, seeds, np.uint64(4), spec.DOMAIN_OUT, False)
    cpu.fill_rows(b, seeds, np.uint64(4), spec.DOMAIN_IN, False)
    z = (a[:, :, None] * b[:, None, :]).reshape(len(seeds), -1).astype(np.float64)
    covariance = z.T @ z / len(seeds)
    assert np.abs(covariance - np.eye(6)).max() < 5 * 3 / len(seeds) ** 0.5


# Kernels on weights: one table, Numba against plain torch.

SIZES = [0, 1, 7, 1023, 1024, 1025, 5000]


def weights(size: int, seed: int, scale: float = 0.02) -> tuple[np.ndarray, np.ndarray]:
    theta = np.random.default_rng(seed).normal(0, scale, size).astype(np.float32)
    exponents = np.zeros(-(-size // 1024), np.int8)
    cpu.lay_grid(theta, exponents, -29)
    return theta, exponents


def u(*values: int) -> np.ndarray:
    return np.array(values, np.uint64)


def f(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


A = np.random.default_rng(1).normal(0, 1e-3, (3, 1000)).astype(np.float32)
B = np.random.default_rng(2).normal(0, 1, (3, 5)).astype(np.float32)
CALLS = {
    "look": (u(2**40)[0], u(3)[0], np.float32(1e-3), np.float32(-2)),
    "look_signs": (u(2**40)[0], u(3)[0], np.float32(1e-3), np.float32(1)),
    "update one": ("update", u(3)[0], u(9), np.array([1]), u(5), f(2e-5), f(0), np.float32(0)),
    "update back": ("update", u(3)[0], u(9), np.array([1]), u(5), f(2e-5), f(0), np.float32(1e-3)),
    "update many": ("update", u(3)[0], u(9, 10), np.array([2, 3]), u(5, 6, 7), f(1e-5, -3e-8, 1e-6), f(0, 1e-4), np.float32(0)),
    "update_signs": (u(3)[0], u(9, 10), np.array([1, 3]), u(5, 6, 7), f(1e-5, -3e-8, 1e-6), f(0, 1e-4), np.float32(1e-3)),
    "update none": ("update", u(3)[0], u(9), np.array([0]), u(), f(), f(1e-3), np.float32(0)),
    "look_outer": (5, A[:1], B[:1], np.float32(1)),
    "update_outer": (5, u(3)[0], u(9, 10), np.array([1, 3]), A, B, f(0, 1e-4)),
    "update large": ("update", u(3)[0], u(9), np.array([1]), u(5), f(5.0), f(0), np.float32(0)),
}  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("call", CALLS)
def test_kernels_move_weights_as_their_twins(call: str, size: int) -> None:
    arguments = CALLS[call]
    name = arguments[0] if isinstance(arguments[0], str) else call
    rest = arguments[1:] if isinstance(arguments[0], str) else arguments
    theta, exponents = weights(size, 7)
    twin, twin_exponents = torch.from_numpy(theta.copy()), torch.from_numpy(exponents.copy())
    getattr(cpu, name)(theta, exponents, 0, len(exponents), *rest)
    tensors = [
        torch.from_numpy(x) if isinstance(x, np.ndarray) and x.ndim == 2 else x for x in rest
    ]
    getattr(plain, name)(twin, twin_exponents, 0, len(exponents), *tensors)
    assert same_bits(torch.from_numpy(theta), twin)
    assert np.array_equal(exponents, twin_exponents.numpy())
    if size > 1000 and call != "update none":
        assert not np.array_equal(theta, weights(size, 7)[0])


@pytest.mark.parametrize("call", ["look", "look_signs", "update many", "update_outer"])
def test_any_division_among_threads_gives_the_same_bits(call: str) -> None:
    arguments = CALLS[call]
    name = arguments[0] if isinstance(arguments[0], str) else call
    rest = arguments[1:] if isinstance(arguments[0], str) else arguments
    whole, exponents = weights(5000, 7)
    kernel = getattr(cpu, name)
    kernel(whole, exponents, 0, 5, *rest)
    parts, exponents = weights(5000, 7)
    with ThreadPoolExecutor(3) as pool:
        for future in [
            pool.submit(kernel, parts, exponents, t, t + 1, *rest) for t in (4, 0, 2, 1, 3)
        ]:
            future.result()
    assert np.array_equal(whole.view(np.int32), parts.view(np.int32))


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 0.02, 1.0, 1e4, 1e20])
@pytest.mark.parametrize("twin", [False, True])
def test_the_grid_is_fine_and_stays(scale: float, twin: bool) -> None:
    original = np.random.default_rng(0).normal(0, scale, 4000).astype(np.float32)
    original[1024:2048] = 0
    theta, exponents = original.copy(), np.zeros(4, np.int8)
    lay = plain.lay_grid if twin else cpu.lay_grid
    arrays = (torch.from_numpy(theta), torch.from_numpy(exponents)) if twin else (theta, exponents)
    assert lay(*arrays, -29) == -1
    q = np.repeat(np.exp2(exponents.astype(np.float64)), 1024)[:4000]
    n = theta / q
    assert np.array_equal(n, np.rint(n))
    assert np.abs(n).max() <= spec.GRID_LIMIT
    assert (np.abs(theta - original.astype(np.float64)) <= q / 2).all()
    assert exponents[1] == -29
    again, exponents_again = theta.copy(), np.zeros(4, np.int8)
    cpu.lay_grid(again, exponents_again, -29)
    assert np.array_equal(again, theta)
    assert np.array_equal(exponents, exponents_again)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_grid_names_a_weight_that_is_not_finite(bad: float) -> None:
    theta = np.zeros(3000, np.float32)
    theta[2500] = bad
    assert cpu.lay_grid(theta.copy(), np.zeros(3, np.int8), -29) == 2500
    assert plain.lay_grid(torch.from_numpy(theta), torch.zeros(3, dtype=torch.int8), -29) == 2500


@given(seed=SEEDS, c=st.floats(1e-6, 1e-3), scale=st.sampled_from([0.0, 1e-6, 0.02, 3.0]))
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("kernel", ["look", "look_signs"])
def test_a_look_and_back_leaves_every_bit(kernel, seed, c, scale) -> None:
    theta, exponents = weights(3000, 1, scale)
    before = theta.copy()
    look = getattr(cpu, kernel)
    for at, times in ((1, 1), (-1, -2), (0, 1)):
        look(
            theta, exponents, 0, 3, np.uint64(seed), np.uint64(0), np.float32(c), np.float32(times)
        )
        if at and scale < 1.0:  # q far below c: the look must have gone somewhere
            assert not np.array_equal(theta, before)
    assert np.array_equal(theta.view(np.int32), before.view(np.int32))


@pytest.mark.parametrize("c", [1e-8, 1e-7, 3e-6])
@pytest.mark.parametrize("kernel", ["update", "update_signs"])
def test_updates_smaller_than_the_grid_arrive_on_average(kernel: str, c: float) -> None:
    theta, exponents = weights(400_000, 1, 0.2)  # q is 2^-24 to 2^-23: 6e-8 to 1.2e-7
    before = theta.astype(np.float64)
    z = np.zeros(0)
    total = np.zeros_like(before)
    for step in range(10):
        draw = noise.normal if kernel == "update" else noise.rademacher
        z = draw(100 + step, 0, 0, len(theta)).numpy().astype(np.float64)
        start = theta.astype(np.float64)
        getattr(cpu, kernel)(
            theta, exponents, 0, len(exponents), np.uint64(0), u(step), np.array([1]), u(100 + step), f(c), f(0), np.float32(0),
        )  # fmt: skip
        total += (theta - start) * z
    slope = total.mean() / 10 / c
    q = 2.0**-23
    assert abs(slope - 1) < 5 * (q / c) * (len(theta) * 10) ** -0.5 + 5e-3
    assert abs((theta - before).mean()) < 5 * (q + c) * (10 / len(theta)) ** 0.5


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((-1, 0, 0, 1), "seed"), ((2**64, 0, 0, 1), "seed"), ((0, 2**32, 0, 1), "stream"),
     ((0, 0, -1, 1), "start"), ((0, 0, 0, -1), "count")],
)  # fmt: skip
def test_arguments_out_of_range_are_named(arguments: tuple[int, ...], named: str) -> None:
    with pytest.raises(UserError, match=named):
        noise.normal(*arguments)
