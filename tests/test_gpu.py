"""The Triton kernels: plain torch's bits on a GPU, or interpreted on the CPU; and what they compile to.

Reading order: roundings, noise, weights, those of 16 bits, whole runs, compiled code. `make test-triton` installs Triton apart and runs these;
without it they are skipped. `python tests/test_gpu.py 80` compiles each kernel for compute capability 8.0, which takes no
GPU, and prints the arithmetic in it (`... 80 float16`: those of float32 and this format alone).
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from justforward import stored
from justforward.directions import FAMILIES, Move, Place, Weights
from justforward.moments import Moments
from justforward.noise import devices, plain, reference, spec
from justforward.rules import Adam
from justforward.trajectory import Step

pytest.importorskip("triton", reason="Triton is not installed: make test-triton")
import triton
import triton.language as tl

from justforward.noise import gpu, tiles

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # conftest's doing, where there is no GPU
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
SEEDS = st.integers(0, 2**64 - 1)
STREAMS = st.integers(0, 2**32 - 1)
SIZES = st.one_of(st.sampled_from([1, 1023, 1024, 1025, 2048]), st.integers(1, 3000))
KERNELS = [
    f"{what}{how}" for what in ("look", "update", "adapt") for how in ("", "_signs", "_outer")
]
STEPS = KERNELS[3:]  # those that 16 bits have too: looks do not move them
DTYPE = st.sampled_from(stored.HALVES)


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(
        torch.equal(a.cpu().view(torch.int8), b.cpu().view(torch.int8))
        for a, b in zip(one, other, strict=True)
    )


# -------------------------------------------------------------------------------------------- roundings


@triton.jit
def rounding_kernel(x, down, nearest, SIZE: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    at = tl.arange(0, SIZE)
    value = tl.load(x + at)
    tl.store(down + at, tiles._floor(value))
    tl.store(nearest + at, tiles._rint(value))


@given(seed=st.integers(0, 2**32))
@settings(max_examples=5)
def test_roundings_to_an_integer(seed: int) -> None:
    rng = np.random.default_rng(seed)
    halves = rng.integers(-(2**25), 2**25, 300) * 0.5
    edges = [0.0, -0.0, 0.5, -0.5, 1.5, -1.5, 1e-40, -1e-40, 2.0**22 - 0.5, 2.0**23 - 0.5, -(2.0**23), 2.0**24, 1e30, -1e30]  # fmt: skip
    spread = rng.normal(0, 1, 1024 - 314) * 10.0 ** rng.integers(-40, 30, 1024 - 314)
    x = np.concatenate([halves, edges, spread]).astype(np.float32)
    down, nearest = (torch.empty(1024, device=DEVICE) for _ in range(2))
    rounding_kernel[(1,)](torch.from_numpy(x).to(DEVICE), down, nearest, SIZE=1024, **gpu.OPTIONS)
    assert np.array_equal(down.cpu().numpy(), np.floor(x))
    assert np.array_equal(nearest.cpu().numpy(), np.rint(x))


# ------------------------------------------------------------------------------------------------ noise


@given(seeds=st.lists(SEEDS, min_size=1, max_size=3), stream=STREAMS, size=SIZES)
@settings(max_examples=10)
@pytest.mark.parametrize(
    ("domain", "signs"),
    [(spec.DOMAIN_GAUSSIAN, False), (spec.DOMAIN_RADEMACHER, True), (spec.DOMAIN_OUT, False), (spec.DOMAIN_IN, True)],
)  # fmt: skip
def test_noise_in_every_bit(
    domain: int, signs: bool, seeds: list[int], stream: int, size: int
) -> None:
    out = torch.empty(len(seeds), size, device=DEVICE)
    gpu.fill_rows(out, np.array(seeds, np.uint64), np.uint64(stream), domain, signs)
    draw = reference.rademacher if signs else reference.normal
    assert same([out], [torch.stack([draw(seed, stream, 0, size, domain) for seed in seeds])])


@triton.jit
def far_kernel(  # type: ignore[no-untyped-def]
    out, tile, seed, stream, SIZE: tl.constexpr, DOMAIN: tl.constexpr, SIGNS: tl.constexpr
) -> None:
    k0, k1 = tiles.key(seed.to(tl.int64))
    z = tiles.draw(tile.to(tl.int64), k0, k1, stream.to(tl.uint32), DOMAIN, SIGNS)
    tl.store(out + tl.arange(0, SIZE), z)


@pytest.mark.parametrize("tile", [2**24 + 5, 2**29 + 3, 2**40 + 7])
@pytest.mark.parametrize("signs", [False, True])
def test_noise_far_out_where_the_counter_has_a_high_word(signs: bool, tile: int) -> None:
    found = torch.empty(1024, device=DEVICE)
    domain = spec.DOMAIN_RADEMACHER if signs else spec.DOMAIN_GAUSSIAN
    far_kernel[(1,)](found, tile, 7, 3, SIZE=1024, DOMAIN=domain, SIGNS=signs, **gpu.OPTIONS)
    draw = reference.rademacher if signs else reference.normal
    assert same([found], [draw(7, 3, tile * spec.TILE, spec.TILE)])


# ---------------------------------------------------------------------------------------------- weights


def some_weights(rng: np.random.Generator, size: int) -> Tensor:
    scale = rng.choice([1e-12, 0.02, 3.0])
    return torch.from_numpy(rng.normal(0, scale, size).astype(np.float32))


def f32(values: Any) -> Any:
    return np.asarray(values, np.float32)


def arguments(
    name: str, rng: np.random.Generator, size: int, dtype: torch.dtype = torch.float32
) -> list[Any]:
    """What a kernel takes behind the range of tiles; tensors are on the CPU."""
    half = dtype != torch.float32
    stream = np.uint64(rng.choice([0, 3, 2**32 - 1]))
    columns = int(rng.choice([1, 5, 33, 1500]))
    far = [4e4, 3e37] if half else []  # up to the largest numbers, and beyond
    scale = rng.choice([1e-18, 3e-8, 1e-3, 5.0, *(far if name.startswith("update") else [])])

    def seeds(count: int) -> Any:
        return rng.integers(0, 2**64, count, np.uint64)

    def factors(count: int) -> list[Any]:
        a = rng.normal(0, scale, (count, -(-size // columns)))
        return [torch.from_numpy(f32(x)) for x in (a, rng.normal(0, 1, (count, columns)))]

    what, _, how = name.partition("_")
    back = f32(0.0 if half else rng.choice([0.0, 1e-3, -1e-3]))
    if what == "look":
        times = f32(rng.choice([1.0, -2.0]))
        if how == "outer":
            return [columns, *factors(1), times]
        return [seeds(1)[0], stream, f32(rng.choice([1e-3, 1e-5])), times]
    steps = int(rng.integers(1, 4))
    window = int(rng.integers(0, 4)) if what == "adapt" else 1
    before = int(rng.integers(0, max(window, 1)))
    lanes = rng.integers(1, 4, before + steps)
    count = int(lanes.sum())
    dithers, ends, decays = seeds(steps), np.cumsum(lanes), f32(rng.choice([0.0, 1e-3], steps))
    directions = factors(count) if how == "outer" else [seeds(count), f32(rng.normal(0, scale, count))]  # fmt: skip
    if what == "update":
        if how == "outer":
            return [columns, stream, dithers, ends, *directions, decays]
        return [stream, dithers, ends, *directions, decays, back]
    sums = [rng.normal(0, 1, size), rng.uniform(0, 3, size)]
    moments = (
        f32(rng.choice([1e-2, 1e-6, *far], steps)), decays, f32(rng.uniform(0.01, 1, (steps, 2))),
        *(f32(rng.choice([0.0, 0.5, 0.999])) for _ in range(2)), f32(rng.choice([1e-8, 1e-30])), window, stream,
    )  # fmt: skip
    last = [columns, *directions] if how == "outer" else [*directions, back]
    return [*(torch.from_numpy(f32(x)) for x in sums), dithers, ends, *moments, *last]


def moved(
    module: ModuleType, name: str, theta: Tensor, given: list[Any], device: torch.device
) -> list[Tensor]:
    """Weights, grid and, of rules with moments, sums after a kernel."""
    here, *rest = (x.clone().to(device) if isinstance(x, Tensor) else x for x in (theta, *given))
    exponents = torch.zeros(-(-len(theta) // spec.TILE), dtype=torch.int8, device=device)
    if theta.dtype == torch.float32:
        assert module.lay_grid(here, exponents, -29) == -1
    getattr(module, name)(here, exponents, 0, len(exponents), *rest)
    return [here, exponents, *(rest[:2] if name.startswith("adapt") else [])]


@pytest.mark.parametrize("name", KERNELS)
@given(seed=st.integers(0, 2**63), size=SIZES)
@settings(max_examples=10)
def test_kernels_move_weights_as_plain_torch(name: str, seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    theta = some_weights(rng, size)
    given = arguments(name, rng, size)
    ours = moved(gpu, name, theta, given, DEVICE)
    assert same(ours, moved(plain, name, theta, given, torch.device("cpu")))
    assert not (ours[0].cpu().view(torch.int32) == -(2**31)).any()  # no -0.0 on the grid


@pytest.mark.parametrize("name", KERNELS)
def test_the_arguments_drawn_reach_what_matters(name: str) -> None:
    """Weights move, tiles are laid anew, sums are kept: or the test above would compare nothing."""
    seen = {"moved": False, "laid": False, "kept": False}
    for seed in range(40):
        rng = np.random.default_rng(seed)
        theta = some_weights(rng, 1500)
        given = arguments(name, rng, 1500)
        start = [theta.clone(), torch.zeros(2, dtype=torch.int8)]
        plain.lay_grid(*start, -29)
        now = moved(plain, name, theta, given, torch.device("cpu"))
        seen["moved"] |= not torch.equal(start[0], now[0])
        seen["laid"] |= not torch.equal(start[1], now[1])
        seen["kept"] |= len(now) > 2 and not torch.equal(now[2], given[0])
    assert seen["moved"]
    assert seen["laid"] or not name.startswith("update")
    assert seen["kept"] == name.startswith("adapt")


@pytest.mark.parametrize("name", KERNELS)
def test_any_range_of_tiles_gives_the_same_bits(name: str) -> None:
    rng = np.random.default_rng(1)
    theta = some_weights(rng, 3000)
    given = arguments(name, rng, 3000)
    whole = moved(gpu, name, theta, given, DEVICE)
    here, *rest = (x.clone().to(DEVICE) if isinstance(x, Tensor) else x for x in (theta, *given))
    exponents = torch.zeros(3, dtype=torch.int8, device=DEVICE)
    gpu.lay_grid(here, exponents, -29)
    for first, last in ((2, 3), (1, 1), (0, 2)):
        getattr(gpu, name)(here, exponents, first, last, *rest)
    assert same(whole, [here, exponents, *(rest[:2] if name.startswith("adapt") else [])])


@pytest.mark.parametrize("scale", [0.0, 1e-12, 0.02, 1e4, 1e20])
def test_the_grid_is_plain_torch_s(scale: float) -> None:
    theta = torch.from_numpy(np.random.default_rng(0).normal(0, scale, 2500).astype(np.float32))
    theta[:512] = torch.arange(-256, 256) * (scale * 2.0**-25)  # ties between two multiples of q
    theta[700] = -0.0
    ours, twin = (
        [theta.clone().to(device), torch.zeros(3, dtype=torch.int8, device=device)]
        for device in (DEVICE, "cpu")
    )
    assert gpu.lay_grid(*ours, -29) == plain.lay_grid(*twin, -29) == -1
    assert same(ours, twin)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_grid_names_a_weight_that_is_not_finite(bad: float) -> None:
    theta = torch.full((3000,), 0.1, device=DEVICE)
    theta[2500] = bad
    before = theta.clone()
    assert gpu.lay_grid(theta, torch.zeros(3, dtype=torch.int8, device=DEVICE), -29) == 2500
    assert same([theta], [before])


def test_nothing_to_move() -> None:
    nothing, none = torch.empty(0, device=DEVICE), torch.empty(0, dtype=torch.int8, device=DEVICE)
    assert gpu.lay_grid(nothing, none, -29) == -1
    for name in KERNELS:
        rng = np.random.default_rng(2)
        rest = [x.to(DEVICE) if isinstance(x, Tensor) else x for x in arguments(name, rng, 1)]
        getattr(gpu, name)(nothing, none, 0, 0, *rest)
    gpu.fill_rows(torch.empty(2, 0, device=DEVICE), np.zeros(2, np.uint64), 0, 0, False)


# -------------------------------------------------------------------------------------------- 16 bits


def some_halves(rng: np.random.Generator, size: int, dtype: torch.dtype) -> Tensor:
    """Any numbers of a format by their bits, subnormal ones and the largest among them; or ordinary weights."""
    largest = torch.finfo(dtype).max
    if rng.integers(2):
        theta = some_weights(rng, size) * float(rng.choice([1.0, 1e4]))
        return theta.clamp(-largest, largest).to(dtype)
    bits = rng.integers(-(2**15), 2**15, size).astype(np.int16)
    theta = torch.from_numpy(bits).view(dtype).nan_to_num(1.0, largest, -largest)
    theta[torch.from_numpy(rng.random(size) < 0.02)] = largest
    return theta


@pytest.mark.parametrize("name", STEPS)
@given(seed=st.integers(0, 2**63), size=SIZES, dtype=DTYPE)
@settings(max_examples=10)
def test_kernels_move_16_bits_as_plain_torch(
    name: str, seed: int, size: int, dtype: torch.dtype
) -> None:
    rng = np.random.default_rng(seed)
    theta = some_halves(rng, size, dtype)
    given = arguments(name, rng, size, dtype)
    with np.errstate(over="ignore"):  # the interpreter's: what goes beyond float32 is held
        ours = moved(gpu, name, theta, given, DEVICE)
    assert same(ours, moved(plain, name, theta, given, torch.device("cpu")))
    assert ours[0].isfinite().all()


@pytest.mark.parametrize("name", STEPS)
def test_the_16_bits_drawn_reach_what_matters(name: str) -> None:
    """Weights move, to subnormal numbers too, and tiles are held back, others not."""
    for dtype in stored.HALVES:
        seen = {"moved": False, "held": False, "not held": False, "subnormal": False}
        for seed in range(60):
            rng = np.random.default_rng(seed)
            theta = some_halves(rng, 1500, dtype)
            given = arguments(name, rng, 1500, dtype)
            now, flags, *_ = moved(plain, name, theta, given, torch.device("cpu"))
            changed = now.view(torch.int16) != theta.view(torch.int16)
            seen["moved"] |= bool(changed.any())
            seen["held"] |= bool(flags.any())
            seen["not held"] |= bool(changed.any() and not flags.all())
            small = (now.float().abs() < torch.finfo(dtype).tiny) & (now != 0)
            # Steps of bfloat16 have no unit below the least normal number, and leave none.
            seen["subnormal"] |= bool((changed & small).any()) or dtype == torch.bfloat16
        assert all(seen.values()), (dtype, seen)


@pytest.mark.parametrize("dtype", stored.HALVES)
def test_a_flag_stays_and_other_tiles_of_16_bits_are_not_touched(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(3)
    theta, given = some_weights(rng, 3000).to(dtype), arguments("update", rng, 3000, dtype)
    whole = moved(gpu, "update", theta, given, DEVICE)
    here, flags = theta.clone().to(DEVICE), torch.tensor([1, 0, 0], dtype=torch.int8, device=DEVICE)
    gpu.update(here, flags, 1, 2, *given)
    assert same([here[:1024], here[2048:]], [theta[:1024], theta[2048:]])
    for first, last in ((2, 3), (1, 1), (0, 1)):
        gpu.update(here, flags, first, last, *given)
    assert same([here], [whole[0]])
    assert flags.tolist() == [1, 0, 0]


@given(
    dtype=DTYPE, narrow=st.booleans(), signs=st.booleans(), seed=st.integers(0, 2**63),
    seeds=st.lists(SEEDS, max_size=3), stream=STREAMS, first=st.integers(0, 2100), size=SIZES,
)  # fmt: skip
@settings(max_examples=25)
def test_any_range_of_16_bits_is_widened_as_by_plain_torch(
    dtype: torch.dtype, narrow: bool, signs: bool, seed: int, seeds: list[int], stream: int, first: int, size: int
) -> None:  # fmt: skip
    """Several directions on the way; into float32, or rounded once to the same format."""
    rng = np.random.default_rng(seed)
    theta = some_halves(rng, first + size + 7, dtype)
    cs = f32(rng.choice([1e-3, -1e-5, 3e-40], len(seeds)))
    out = [torch.full((size,), 7.0, dtype=dtype if narrow else torch.float32) for _ in range(2)]
    ours, twin = out[0].to(DEVICE), out[1]
    name = "widen_signs" if signs else "widen"
    for module, here, there in ((gpu, theta.to(DEVICE), ours), (plain, theta, twin)):
        given = (here, there, first, first + size, np.uint64(stream), np.array(seeds, np.uint64))
        with np.errstate(
            over="ignore"
        ):  # the interpreter's: a look may go beyond the largest number
            getattr(module, name)(*given, cs)
    assert same([ours], [twin])


@pytest.mark.parametrize("dtype", stored.HALVES)
@pytest.mark.parametrize("columns", [1, 37, 1024, 1500])
def test_rows_are_widened_as_by_plain_torch(columns: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(columns)
    theta = some_weights(rng, 9 * columns).to(dtype)
    rows = torch.tensor([8, 0, 3, 3])
    seeds, cs = np.array([5, 2**64 - 2], np.uint64), f32([1e-3, -2e-3])
    for signs in (False, True):
        ours, twin = torch.empty(4, columns, device=DEVICE), torch.empty(4, columns)
        gpu.widen_rows(theta.to(DEVICE), ours, rows.to(DEVICE), np.uint64(2), seeds, cs, signs)
        plain.widen_rows(theta, twin, rows, np.uint64(2), seeds, cs, signs)
        assert same([ours], [twin])
    gpu.widen_rows(theta.to(DEVICE), ours[:0], rows[:0].to(DEVICE), 2, seeds, cs, False)
    gpu.widen(theta.to(DEVICE), ours[0, :0], 5, 5, 2, seeds, cs)


# ------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_whole_runs_end_at_the_cpu_s_bits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks, updates from the looks' end, a replay of all steps in one pass, and a rule with moments."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) * 0.02 for shape in ((33, 40), (7,), (1, 1100), (0, 5))]  # fmt: skip
    monkeypatch.setattr(devices, "kernels", lambda _: gpu)

    def run(device: torch.device, compiled: bool) -> list[Tensor]:
        named = [(f"w{i}", tensor.clone().to(device)) for i, tensor in enumerate(start)]
        weights = Weights(named, [0, 1, 0, 1], FAMILIES[family], [1e-3, 1e-3])
        weights.compiled = compiled
        moves = [
            Move(s, np.array([s, 2**63 + s], np.uint64), f32([[1e-3, -2e-5], [3e-6, 0.0]]), f32([1e-3, 0.0]))
            for s in range(3)
        ]  # fmt: skip
        weights.look(1, [1e-3, 0.0], 1.0)
        weights.look(1, [1e-3, 0.0], -1.0)
        weights.look(2**63, [1e-3, 1e-3], -1.0)
        weights.update(moves[:1], back=[1e-3, 1e-3])
        weights.update(moves)
        steps = [
            Step(i, (0.5, -2.0), scales=(1.0, 0.25), decays=(0.0, 0.5), rates=(0.015625, 0.5))
            for i in range(3)
        ]
        for window in (0, 2):
            moments = Moments(3, Adam(window=window))
            moments.apply(weights, steps[:1])
            moments.apply(weights, steps[1:])
        z = torch.as_tensor(weights.dense(1, np.arange(2, dtype=np.uint64)))
        return [*weights.tensors, *weights.exponents, z]

    assert same(run(DEVICE, False), run(torch.device("cpu"), True))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_whole_runs_in_16_bits_end_at_the_cpu_s_bits(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What looks hand out, of all and of some rows, and what steps leave."""
    dtype = torch.float16 if FAMILIES[family].signs else torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) * 0.02 for shape in ((33, 40), (7,), (0, 5))]
    monkeypatch.setattr(devices, "kernels", lambda _: gpu)

    def run(device: torch.device, compiled: bool) -> list[Tensor]:
        named = [
            (f"w{i}", torch.nn.Parameter(t.to(device, dtype), False)) for i, t in enumerate(start)
        ]
        weights = Weights(named, [0, 1, 0], FAMILIES[family], [1e-3, 1e-3])
        weights.compiled = compiled
        for i, away in weights._away.items():
            away.kernels, away.compiled = weights.kernels(i), compiled
        weights.look(1, [1e-3, 0.0], 1.0)
        weights.look(2**63, [1e-3, 1e-3], -1.0)
        matrix = weights.tensors[0]
        matrix._jf_dtype = torch.float32  # type: ignore[attr-defined]
        rows = torch.nn.functional.embedding(torch.tensor([[5, 2], [5, 32]], device=device), matrix)
        seen = [stored.values(matrix), stored.values(matrix, 3, 9), rows]
        weights.look(1, [1e-3, 0.0], -1.0)
        moves = [
            Move(s, np.array([s, 2**63 + s], np.uint64), f32([[1e-3, -2e-5], [3e-6, 0.0]]), f32([1e-3, 0.0]))
            for s in range(2)
        ]  # fmt: skip
        weights.update(moves[:1], back=[1e-3, 1e-3])
        assert matrix._jf_away is None  # type: ignore[attr-defined]
        weights.update(moves)
        steps = [Step(i, (0.5, -2.0), scales=(1.0, 0.25), decays=(0.0, 0.5), rates=(0.015625, 0.5)) for i in range(2)]  # fmt: skip
        Moments(3, Adam(window=2)).apply(weights, steps)
        return [*seen, *(stored.plain(t) for t in weights.tensors), *weights.exponents]

    assert same(run(DEVICE, False), run(torch.device("cpu"), True))


@pytest.mark.parametrize("signs", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *stored.HALVES])
def test_parts_of_weights_end_at_the_cpu_s_bits(
    dtype: torch.dtype, signs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What processes have of a model in shards: tiles of the whole from some place on."""
    monkeypatch.setattr(devices, "kernels", lambda _: gpu)
    theta = (torch.randn(1500, generator=torch.Generator().manual_seed(0)) * 0.05).to(dtype)
    move = Move(4, np.array([3, 2**63], np.uint64), f32([[1e-3, -2e-2]]), f32([1e-3]))

    def run(device: torch.device, compiled: bool) -> list[Tensor]:
        p = torch.nn.Parameter(theta.clone().to(device), False)
        family = FAMILIES["rademacher" if signs else "gaussian"]
        weights = Weights([("w", p)], [0], family, [1e-2], [Place(7, 2**21 + 5, True)])
        weights.compiled = compiled
        for away in weights._away.values():
            away.kernels, away.compiled = weights.kernels(0), compiled
        weights.look(1, [1e-2], 1.0)
        looked = stored.plain(p).clone()
        weights.look(1, [1e-2], -1.0)
        weights.look(2**63, [1e-2], -1.0)
        weights.update([move], back=[1e-2])
        weights.update([move, move])
        return [looked, stored.plain(p), *weights.exponents]

    assert same(run(DEVICE, False), run(torch.device("cpu"), True))


# ---------------------------------------------------------------------------------------- compiled code

ARITHMETIC = r"^\s*(?:@!?%p\d+ )?((?:add|sub|mul|mad|fma|div|sqrt|rsqrt|rcp|cvt|ex2|lg2|sin|cos|tanh|abs|neg|min|max)\.[\w.]*f(?:16|32|64)[\w.]*)"
# Those that IEEE 754 rounds correctly, exact ones, and integers to float; .ftz would flush subnormal numbers.
ALLOWED = {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "div.rn.f32", "sqrt.rn.f32", "abs.f32", "neg.f32", "cvt.rn.f32.s32", "cvt.rn.f32.u32", "cvt.rn.f16.f32", "cvt.rn.f16x2.f32"}  # fmt: skip


def compile_all(capability: int, halves: list[torch.dtype]) -> dict[str, dict[str, Any]]:
    """Of each launch that the kernels' names lead to: the arithmetic on floats in it, and machine instructions that fuse."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    triton.runtime.JITFunction.run = lambda *given, **named: launches.append((given[0], given[1:], named))  # fmt: skip
    for seed in range(12):  # so that all windows, with and without kept sums, are among them
        for dtype in (torch.float32, *halves):
            for name in KERNELS if dtype == torch.float32 else STEPS:
                given = arguments(name, np.random.default_rng(seed), 3000, dtype)
                moved(gpu, name, torch.zeros(3000, dtype=dtype), given, torch.device("cpu"))
    nothing = np.zeros(2, np.uint64), np.zeros(2, np.float32)
    for signs in (False, True):
        gpu.fill_rows(torch.zeros(2, 3000), nothing[0], 3, int(signs), signs)
        for dtype in halves:
            for out in (torch.float32, dtype):
                gpu.widen(torch.zeros(3000, dtype=dtype), torch.zeros(9, dtype=out), 5, 14, 3, *nothing, signs=signs)  # fmt: skip
    kinds = {torch.float32: "*fp32", torch.int8: "*i8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64"}  # fmt: skip
    out: dict[str, dict[str, Any]] = {}
    for kernel, rest, named in launches:
        names = list(inspect.signature(kernel.fn).parameters)
        constants = {name: value for name, value in named.items() if name in names}
        called = f"{kernel.fn.__name__} {constants}"
        if called in out:
            continue
        types = {
            name: kinds[x.dtype] if isinstance(x, Tensor) else "fp32" if isinstance(x, float) else "i32"
            for name, x in zip(names, rest, strict=False)
        }  # fmt: skip
        source = ASTSource(
            kernel,
            {**types, **dict.fromkeys(constants, "constexpr")},
            {(names.index(name),): value for name, value in constants.items()},
        )
        options = {x: named[x] for x in set(named) - {*names, "grid", "warmup"}}
        target = GPUTarget("cuda", capability, 32)
        assembled = triton.compile(source, target=target, options=options).asm
        out[called] = {
            "arithmetic": sorted(set(re.findall(ARITHMETIC, assembled["ptx"], re.M))),
            "fused": len(re.findall(r"\b[FHD]FMA", assembled["sass"])),
        }
    return out


@pytest.mark.parametrize(("capability", "half"), [(75, "float16"), (100, "bfloat16")])
def test_compiled_code_rounds_every_operation(capability: int, half: str, tmp_path: Any) -> None:
    """Triton compiles for a GPU that is not there; in a process of its own, which does not interpret."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, __file__, str(capability), half]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout)
    assert len(compiled) == 16 + 13, sorted(compiled)  # the latter of 16 bits
    everything = {name for code in compiled.values() for name in code["arithmetic"]}
    everything = {name.removesuffix("x2") for name in everything}  # two at once
    assert {"add.rn.f32", "mul.rn.f32", "sqrt.rn.f32", "div.rn.f32"} <= everything <= ALLOWED
    for called, code in compiled.items():
        # The machine's own code for a correctly rounded root or quotient fuses; nothing else may.
        if not {"sqrt.rn.f32", "div.rn.f32"} & set(code["arithmetic"]):
            assert code["fused"] == 0, called


if __name__ == "__main__":
    chosen = [stored.FORMATS[name] for name in sys.argv[2:]] or list(stored.HALVES)
    print(json.dumps(compile_all(int(sys.argv[1]), chosen), indent=1))
