"""Rules with moments: held to the definition with z written out, to torch's Adam, and to themselves in every bit.

Reading order: sums of weights, the kernels and their twin, the definition, Adam, passes and threads, what is kept, refusals.
"""

from __future__ import annotations

import copy
import math
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import justforward as jf
from conftest import materialise
from justforward import MeZO, Step, UserError, moments, noise
from justforward.directions import FAMILIES, Weights
from justforward.moments import Moments, course_of, powers_sum
from justforward.noise import cpu, plain
from justforward.noise import moments as compiled
from justforward.playback import apply_steps
from justforward.rules import Adam
from justforward.trajectory import rounded

FAMILY = st.sampled_from(sorted(FAMILIES))
SEEDS = st.integers(0, 2**64 - 1)
BETAS = st.sampled_from([0.0, 0.5, 0.9, 0.999])
SHAPES: list[tuple[int, ...]] = [(33, 65), (7,), (1025,), (1, 1500), (2, 3, 4), (), (0, 5)]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def tensors_of(seed: int = 0, scale: float = 0.02) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * scale for shape in SHAPES]


def weights_of(family: str, seed: int = 0, groups: int = 1) -> Weights:
    named = [(f"w{i}", tensor) for i, tensor in enumerate(tensors_of(seed))]
    owners = [i % groups for i in range(len(named))]
    return Weights(named, owners, FAMILIES[family], [1e-3] * groups)


def bits(weights: Weights) -> list[Tensor]:
    return [t.clone().view(torch.int32) for t in weights.tensors] + [
        e.clone() for e in weights.exponents
    ]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def random_steps(seed: int, count: int, groups: int = 1, first: int = 0) -> list[Step]:
    """Steps of one to three directions, some with decay, at a rate that changes now and then."""
    rng = np.random.default_rng(seed % 2**63)

    def numbers(size: int, scale: float) -> tuple[float, ...]:
        return tuple(rounded(x) for x in rng.normal(0, scale, size))

    return [
        Step(
            first + index,
            numbers(int(rng.integers(1, 4)), 3.0),
            scales=tuple(rng.choice([1.0, 0.25], groups)),
            decays=tuple(rng.choice([0.0, rounded(1e-3)], groups)),
            rates=tuple(rng.choice([rounded(1e-3), rounded(1e-5)], groups)),
        )
        for index in range(count)
    ]


# ---------------------------------------------------------------------------------- sums of the weights


@given(beta=st.floats(0.0, 0.999999), count=st.integers(1, 3000))
def test_the_sum_of_powers(beta: float, count: int) -> None:
    assert powers_sum(beta, count) == pytest.approx(
        math.fsum(beta**age for age in range(count)), rel=1e-12
    )


def test_the_sum_of_powers_of_a_long_run() -> None:
    assert powers_sum(0.99, 10**7) == pytest.approx(100.0, rel=1e-12)
    assert powers_sum(1.0, 10**7) == 10**7
    assert powers_sum(0.0, 10**7) == 1.0
    assert powers_sum(0.999999, 10**6) == pytest.approx((1 - 0.999999**10**6) / 1e-6, rel=1e-9)


# ------------------------------------------------------------------------------- kernels and their twin


def u(values: Any) -> np.ndarray:
    return np.asarray(values, np.uint64)


@given(data=st.data(), size=st.sampled_from([1, 7, 1023, 1025, 3000]), window=st.integers(0, 6), before=st.integers(0, 5),
       steps=st.integers(1, 4), betas=st.tuples(BETAS, BETAS), seed=st.integers(0, 2**32))  # fmt: skip
@settings(max_examples=60)
@pytest.mark.parametrize("name", ["adapt", "adapt_signs", "adapt_outer"])
def test_kernels_move_weights_as_their_twins(
    name: str, data: Any, size: int, window: int, before: int, steps: int, betas: tuple[float, float], seed: int
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    before = min(before, max(window - 1, 0))
    lanes = rng.integers(1, 4, before + steps)
    count, columns = int(lanes.sum()), 5
    theta = rng.normal(0, 0.02, size).astype(np.float32)
    exponents = np.zeros(-(-size // 1024), np.int8)
    cpu.lay_grid(theta, exponents, -29)
    sums = [rng.normal(0, 1, size).astype(np.float32), rng.uniform(0, 3, size).astype(np.float32)]
    scale = data.draw(st.sampled_from([1e-18, 1e-3, 3.0, 1e14]))
    c = rng.normal(0, scale, count).astype(np.float32)
    a = rng.normal(0, scale, (count, -(-size // columns))).astype(np.float32)
    b = rng.normal(0, 1, (count, columns)).astype(np.float32)
    rest = (
        u(rng.integers(0, 2**63, steps)), np.cumsum(lanes),
        rng.choice([1e-2, 1e-6], steps).astype(np.float32), rng.choice([0.0, 1e-3], steps).astype(np.float32),
        rng.uniform(0.01, 1, (steps, 2)).astype(np.float32), *(np.float32(beta) for beta in betas),
        np.float32(data.draw(st.sampled_from([1e-8, 1e-30, 1.0]))), window, np.uint64(3),
    )  # fmt: skip
    back = np.float32(data.draw(st.sampled_from([0.0, 1e-3, -1e-3])))
    last: tuple[Any, ...] = (u(rng.integers(0, 2**63, count)), c, back)
    twin_last = last
    if name == "adapt_outer":
        last, twin_last = (columns, a, b), (columns, torch.from_numpy(a), torch.from_numpy(b))
    start, kept = theta.copy(), [s.copy() for s in sums]
    twin = [torch.from_numpy(x.copy()) for x in (theta, exponents, *sums)]
    tiles = len(exponents)
    getattr(compiled, name)(theta, exponents, 0, tiles, *sums, *rest, *last)
    getattr(plain, name)(twin[0], twin[1], 0, tiles, *twin[2:], *rest, *twin_last)
    for mine, other in zip((theta, exponents, *sums), twin, strict=True):
        assert np.array_equal(mine.view(np.int8), other.numpy().view(np.int8))
    assert np.isfinite(theta).all()
    assert (theta != start).any() or scale <= 1e-3 or size == 1
    assert all(
        (np.array_equal(now, was)) == bool(window) for now, was in zip(sums, kept, strict=True)
    )


@pytest.mark.parametrize("window", [0, 3])
def test_plain_torch_takes_whole_runs_to_the_same_bits(window: int) -> None:
    for family in sorted(FAMILIES):
        ours, twin = weights_of(family, groups=2), weights_of(family, groups=2)
        steps = random_steps(5, 7, groups=2)
        Moments(3, Adam(window=window)).apply(ours, steps)
        twin.compiled = False  # what tensors on another device get
        other = Moments(3, Adam(window=window))
        for step in steps:
            other.apply(twin, [step])
        assert same(bits(ours), bits(twin))


# --------------------------------------------------------------------------------------- the definition


class Net(nn.Module):
    """Matrices and vectors, more than a tile of them."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first = nn.Linear(30, 40)
            self.norm = nn.LayerNorm(40)
            self.last = nn.Linear(40, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).tanh())


X = torch.randn(6, 30, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1, 2])


def closure_of(model: nn.Module, estimator: str) -> Any:
    if estimator == "weight":
        return lambda: F.cross_entropy(model(X), Y)
    return lambda: F.cross_entropy(model(X), Y, reduction="none")


def grouped(model: Net) -> list[dict[str, Any]]:
    return [
        {"params": [model.first.weight, model.norm.weight], "lr": 3e-3, "eps": 4e-3, "weight_decay": 0.3},
        {"params": [model.first.bias, model.norm.bias, model.last.weight]},
    ]  # fmt: skip


def estimate_of(optimizer: MeZO, i: int, step: Step) -> Tensor:
    """g = (1 / K) sum_k s_k z_k of tensor i, from the projected gradients, in units of its group's own eps."""
    eps = [group["eps"] for group in optimizer.param_groups]
    total = torch.zeros(optimizer.weights.tensors[i].shape, dtype=torch.float64)
    for lane, s in enumerate(step.projected_grads):
        z = materialise(
            optimizer.weights, i, noise.direction_seed(optimizer.seed, step.index, lane)
        )
        total += s * eps[0] / eps[optimizer.weights.groups[i]] * z
    return total / len(step.projected_grads)


def definition(past: list[Tensor], beta1: float, beta2: float, eps: float, window: int) -> Tensor:
    """m / (sqrt(v) + eps) over the last `window` estimates (0: over all), in float64."""
    used = past[-window:] if window else past
    ages = range(len(used) - 1, -1, -1)
    first, second = torch.zeros_like(used[0]), torch.zeros_like(used[0])
    for age, g in zip(ages, used, strict=True):
        first += beta1**age * g
        second += beta2**age * g * g
    m = first / sum(beta1**age for age in ages)
    v = second / sum(beta2**age for age in ages)
    return m / (v.sqrt() + eps)


RULES = [
    ("adam(0.8, 0.95, 1e-2, window=4)", (0.8, 0.95, 1e-2, 4)),
    ("adam", (0.9, 0.99, 1e-8, 20)),
    ("adam(0.8, 0.95, window=0)", (0.8, 0.95, 1e-8, 0)),
    ("rmsprop(0.9, window=3)", (0.0, 0.9, 1e-8, 3)),
    ("rmsprop(0.9, 1e-3, window=0)", (0.0, 0.9, 1e-3, 0)),
]


@pytest.mark.parametrize(("rule", "numbers"), RULES)
@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize(
    ("estimator", "family"),
    [("weight", "gaussian"), ("weight", "rademacher"), ("weight", "rank1"), ("activation", "gaussian"),
     ("activation", "rademacher")],
)  # fmt: skip
def test_steps_are_those_of_the_definition(
    estimator: str, family: str, samples: int, rule: str, numbers: tuple[float, float, float, int]
) -> None:
    model = Net()
    optimizer = MeZO(
        grouped(model), lr=1e-3, eps=1e-3, weight_decay=0.1, estimator=estimator, family=family,
        rule=rule, num_samples=samples, seed=7, model=model,
    )  # fmt: skip
    weights = optimizer.weights
    lr, decay = [3e-3, 1e-3], [0.3, 0.1]
    past: list[list[Tensor]] = [[] for _ in weights.tensors]
    slow = [t.detach().double() for t in weights.tensors]
    moved = 0.0
    for _ in range(11):
        step = optimizer.estimate(closure_of(model, estimator))
        optimizer.apply(step)
        for i, t in enumerate(weights.tensors):
            group = weights.groups[i]
            past[i].append(estimate_of(optimizer, i, step))
            move = lr[group] * definition(past[i], *numbers)
            if t.dim() == 2:
                move += lr[group] * decay[group] * slow[i]
            slow[i] = slow[i] - move
            assert torch.allclose(t.detach().double(), slow[i], rtol=0, atol=1e-3 * lr[group])
            moved = max(moved, float(move.abs().max() / lr[group]))
    assert moved > 0.5  # of lr: the tolerance is far below a step


def test_after_a_rule_that_changes_the_gradients_moments_are_of_what_it_gives() -> None:
    model = Net()
    optimizer = MeZO(model, lr=1e-3, rule="clip(1e-2)+adam(eps=1.0, window=3)", num_samples=2)
    start = [t.detach().double() for t in optimizer.weights.tensors]
    step = optimizer.estimate(closure_of(model, "weight"))
    rms = math.sqrt(sum(s * s for s in step.projected_grads) / 2)
    assert rms > 0.1
    assert step.coefficients == pytest.approx(
        [s / rms * 1e-2 / 2 for s in step.projected_grads], rel=1e-5
    )
    optimizer.apply(step)
    for i, (t, at) in enumerate(zip(optimizer.weights.tensors, start, strict=True)):
        g = estimate_of(optimizer, i, step) * (1e-2 / rms)
        wanted = at - 1e-3 * g / (g.abs() + 1.0)
        torch.testing.assert_close(t.detach().double(), wanted, rtol=0, atol=3e-7)


# -------------------------------------------------------------------------------------------------- Adam


@pytest.mark.parametrize(
    ("rule", "betas"), [("adam(0.9, 0.99{})", (0.9, 0.99)), ("rmsprop(0.99{})", (0.0, 0.99))]
)
@pytest.mark.parametrize("window", [12, 0])
@pytest.mark.parametrize("estimator", ["weight", "activation"])
def test_until_the_window_is_full_it_is_torch_s_adamw(
    estimator: str, window: int, rule: str, betas: tuple[float, float]
) -> None:
    model = Net()
    optimizer = MeZO(
        model, lr=2e-3, rule=rule.format(f", window={window}"), num_samples=2, estimator=estimator
    )
    matrices = [i for i, t in enumerate(optimizer.weights.tensors) if t.dim() == 2]
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.2
    twin = [nn.Parameter(t.detach().clone()) for t in optimizer.weights.tensors]
    decayed = [p for i, p in enumerate(twin) if i in matrices]
    others = [p for i, p in enumerate(twin) if i not in matrices]
    torch_s = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.2}, {"params": others, "weight_decay": 0.0}],
        lr=2e-3, betas=betas, eps=1e-8,
    )  # fmt: skip
    for _ in range(12):
        step = optimizer.estimate(closure_of(model, estimator))
        optimizer.apply(step)
        for i, p in enumerate(twin):
            p.grad = estimate_of(optimizer, i, step).float()
        torch_s.step()
        for t, p in zip(optimizer.weights.tensors, twin, strict=True):
            torch.testing.assert_close(t.detach(), p.detach(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_window_that_holds_all_steps_gives_the_bits_of_kept_moments(family: str) -> None:
    steps = random_steps(1, 13, groups=2)
    results = []
    for window in (12, 0):
        weights = weights_of(family, groups=2)
        course = Moments(3, Adam(window=window))
        course.apply(weights, steps[:12])
        results.append([bits(weights)])
        course.apply(weights, steps[12:])  # the first that leaves the window
        results[-1].append(bits(weights))
    assert same(results[0][0], results[1][0])
    assert not same(results[0][1], results[1][1])


# ------------------------------------------------------------------------------------ passes and threads


@given(seed=SEEDS, family=FAMILY, window=st.integers(0, 5), count=st.integers(1, 9), data=st.data())
@settings(max_examples=60)
def test_many_steps_in_a_pass_are_the_steps_one_by_one(
    seed: int, family: str, window: int, count: int, data: Any
) -> None:
    steps = random_steps(seed, count, groups=2)
    by_one, at_once = (weights_of(family, groups=2) for _ in range(2))
    course = Moments(seed, Adam(0.8, 0.9, window=window))
    for step in steps:
        course.apply(by_one, [step])
    course = Moments(seed, Adam(0.8, 0.9, window=window))
    cut = data.draw(st.integers(1, count))
    for part in (steps[:cut], steps[cut:]):
        if part:
            course.apply(at_once, part)
    assert same(bits(by_one), bits(at_once))


@pytest.mark.parametrize("rule", ["adam(window=8)", "adam(window=0)"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_long_log_is_cut_without_a_trace(family: str, rule: str) -> None:
    steps = random_steps(
        2, 1040
    )  # more than a batch of `apply_steps`; halved on, along rank-one directions
    by_one, at_once = (weights_of(family) for _ in range(2))
    course = course_of(3, rule)
    for start in range(0, len(steps), 13):
        course.apply(by_one, steps[start : start + 13])
    assert apply_steps(at_once, course_of(3, rule), steps) == len(steps)
    assert same(bits(by_one), bits(at_once))


@pytest.mark.parametrize("family", ["rank1", "rank1-rademacher"])
@pytest.mark.parametrize("window", [0, 3])
def test_the_room_for_factors_changes_nothing(
    family: str, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for floats in (1 << 24, 1):
        monkeypatch.setattr(moments, "_FACTORS_AT_ONCE", floats)
        weights = weights_of(family)
        sweeps = []
        sweep = weights.sweep
        monkeypatch.setattr(
            weights, "sweep",
            lambda calls, later=False, sweep=sweep, sweeps=sweeps: (sweeps.append(calls), sweep(calls, later)),
        )  # fmt: skip
        Moments(3, Adam(window=window)).apply(weights, random_steps(4, 5))
        results.append(bits(weights))
        assert len(sweeps) == (1 if floats > 1 else sum(map(weights.is_outer, range(len(SHAPES)))))
    assert same(*results)


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_was_drawn_gives_the_bits_of_what_is_drawn_again(family: str, window: int) -> None:
    given_, made = weights_of(family), weights_of(family)
    one, other = Moments(3, Adam(window=window)), Moments(3, Adam(window=window))
    for step in random_steps(6, 5):
        lanes = range(len(step.coefficients))
        seeds = u([noise.direction_seed(3, step.index, lane) for lane in lanes])
        one.apply(given_, [step], draws=given_.draw(seeds))
        other.apply(made, [step])
        assert same(bits(given_), bits(made))


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_coming_home_within_the_update_is_home_then_update(
    sign: float, family: str, window: int
) -> None:
    apart, fused = weights_of(family, groups=2), weights_of(family, groups=2)
    one, other = Moments(3, Adam(window=window)), Moments(3, Adam(window=window))
    back = [sign * 1e-3, sign * 5e-4]
    for step in random_steps(8, 5, groups=2):
        seed = noise.direction_seed(3, step.index, len(step.coefficients) - 1)
        for weights in (apart, fused):
            weights.look(seed, back, -1.0)
        apart.look(seed, back, 1.0)
        one.apply(apart, [step])
        other.apply(fused, [step], back=back)
        assert same(bits(apart), bits(fused))


@pytest.mark.parametrize("rule", ["adam(window=3)", "rmsprop(window=0)"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_threads_never_change_a_bit(family: str, rule: str) -> None:
    results = []
    for threads in (1, 2, 3, 64):
        torch.set_num_threads(threads)
        named = [
            ("long", torch.zeros(1024 * 300)),
            *((f"w{i}", t) for i, t in enumerate(tensors_of())),
        ]
        weights = Weights(named, [0] * len(named), FAMILIES[family], [1e-3])
        course = course_of(3, rule)
        for step in random_steps(9, 5):
            course.apply(weights, [step])
        results.append(bits(weights))
    for other in results[1:]:
        assert same(results[0], other)


def test_a_window_takes_no_memory_for_moments() -> None:
    weights = Weights([("w", torch.zeros(2048, 1024))], [0], FAMILIES["gaussian"], [1e-3])
    course = Moments(3, Adam())
    steps = random_steps(1, 25)
    course.apply(weights, steps[:1])
    tracemalloc.start()
    try:
        course.apply(weights, steps[1:])
        for step in random_steps(2, 2, first=25):
            course.apply(weights, [step])
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert course.kept == []
    assert most < weights.tensors[0].numel() * 4 / 16


# ----------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("rule", ["adam(window=4)", "adam(window=0)", "rms+rmsprop(window=0)"])
@pytest.mark.parametrize("estimator", ["weight", "activation"])
def test_state_is_all_that_is_remembered_and_is_not_shared(
    estimator: str, rule: str, tmp_path: Path
) -> None:
    model = Net()
    options: dict[str, Any] = {"lr": 1e-2, "rule": rule, "estimator": estimator, "num_samples": 2}
    optimizer = MeZO(model, **options)
    for _ in range(6):
        optimizer.step(closure_of(model, estimator))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    copied = copy.deepcopy(model)
    state = optimizer.state_dict()
    for _ in range(3):
        optimizer.step(closure_of(model, estimator))
    for loaded in (state, torch.load(tmp_path / "state.pt", weights_only=True)):
        again = copy.deepcopy(copied)
        other = MeZO(again, **options)
        other.load_state_dict(loaded)
        for _ in range(3):
            other.step(closure_of(again, estimator))
        assert jf.fingerprint(again) == jf.fingerprint(model)
        assert str(other.state_dict()) == str(optimizer.state_dict())


def test_a_rate_of_zero_remembers_the_gradient_and_moves_nothing(tmp_path: Path) -> None:
    model, base = Net(), Net()
    optimizer = MeZO(model, lr=1e-2, rule="adam(window=3)", log=tmp_path / "log")
    optimizer.param_groups[0]["lr"] = 0.0
    before = jf.fingerprint(model)
    step = optimizer.estimate(closure_of(model, "weight"))
    optimizer.apply(step)
    assert jf.fingerprint(model) == before
    assert step.coefficients[0] != 0.0
    assert step.rates == (0.0,)
    optimizer.param_groups[0]["lr"] = 1e-2
    optimizer.step(closure_of(model, "weight"))
    optimizer.close()
    header = jf.read_log(tmp_path / "log").header
    assert header["rule"] == "adam(beta1=0.9, beta2=0.99, eps=1e-08, window=3)"
    assert jf.replay(base, tmp_path / "log") == 2
    assert jf.fingerprint(base) == jf.fingerprint(model) != before


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_gradients_of_any_size_move_by_no_more_than_adam_would(family: str, window: int) -> None:
    weights = weights_of(family)
    before = bits(weights)
    course = Moments(3, Adam(window=window))
    course.apply(weights, [Step(i, (0.0,), rates=(1.0,)) for i in range(3)])
    assert same(bits(weights), before)  # 0 / (0 + eps)
    for index, c in ((3, rounded(1e-38)), (4, rounded(9e13)), (5, rounded(-9e13)), (6, 0.0)):
        start = [t.double() for t in weights.tensors]
        step = Step(index, (c,), rates=(rounded(1e-3),))
        course.check(step)
        course.apply(weights, [step])
        for t, at in zip(weights.tensors, start, strict=True):
            assert ((t.double() - at).abs() <= 1e-2).all()  # and finite


# ---------------------------------------------------------------------------------------------- refusals


def test_a_step_of_another_kind_of_rule_is_refused_before_it_is_logged(tmp_path: Path) -> None:
    model = Net()
    with_log = MeZO(copy.deepcopy(model), lr=0.1, log=tmp_path / "log", rule="adam")
    plain_step = MeZO(copy.deepcopy(model), lr=0.1).estimate(lambda: 1.0)
    adam_step = MeZO(copy.deepcopy(model), lr=0.1, rule="adam").estimate(lambda: 1.0)
    size = (tmp_path / "log").stat().st_size
    with pytest.raises(UserError, match="step 0 has 0 rates for 1 parameter groups: it was not"):
        with_log.apply(plain_step)
    assert (tmp_path / "log").stat().st_size == size
    with pytest.raises(
        UserError, match="step 0 has rates: it was estimated by a rule with moments"
    ):
        MeZO(model, lr=0.1).apply(adam_step)
    with_log.apply(adam_step)
    with_log.close()


@pytest.mark.parametrize("rule", ["adam", "rmsprop(window=0)"])
def test_gradients_whose_squares_do_not_fit_are_refused(rule: str) -> None:
    model = Net()
    optimizer = MeZO(model, lr=1e-3, eps=1e-3, rule=rule)
    before = jf.fingerprint(model)
    losses = iter([1e13, -1e13])
    with pytest.raises(UserError, match=r"step 0: .* 1e\+16, of which the squares .*: put a clip"):
        optimizer.step(lambda: next(losses))
    assert jf.fingerprint(model) == before
    clipped = MeZO(copy.deepcopy(model), lr=1e-3, eps=1e-3, rule=f"clip(10)+{rule}")
    losses = iter([1e13, -1e13])
    clipped.step(lambda: next(losses))


def test_a_log_of_other_moments_is_not_resumed(tmp_path: Path) -> None:
    base = Net()
    MeZO(copy.deepcopy(base), rule="adam", log=tmp_path / "log").close()
    for rule in ("adam(window=19)", "rmsprop", "sgd"):
        with pytest.raises(UserError, match=r"cannot be resumed: rule is 'adam\(beta1=0.9, beta2"):
            MeZO(copy.deepcopy(base), rule=rule, log=tmp_path / "log", resume=True)
