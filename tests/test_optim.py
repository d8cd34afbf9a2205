"""The optimizer: held to Algorithm 1, one table of all its variants, and what it leaves behind when things go wrong.

Reading order: problems, the table, Algorithm 1 and momentum, groups and schedules, exactness, state, log, refusals.
"""

from __future__ import annotations

import copy
import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

import justforward as jf
from conftest import materialise
from justforward import Blocks, MeZO, Modified, NonFiniteLoss, UserError, noise
from justforward.directions import FAMILIES
from justforward.playback import check_header
from justforward.reference import direction, mezo_step
from justforward.trajectory import Writer

# ------------------------------------------------------------------------------------------- problems


class Classifier(nn.Module):
    """A norm, a hidden layer with dropout (off while looking), a head without bias, something frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.hidden = nn.Linear(6, 8)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8, 2, bias=False)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.hidden(self.norm(x)).tanh()))


def classifier() -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Classifier()


def rows(count: int) -> dict[str, Tensor]:
    """Logistic regression: the label is the side of a plane."""
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, 6, generator=generator)
    return {"x": x, "y": (x[:, 0] + x[:, 1] > x[:, 2]).long()}


DATA = rows(32)


def loss_a_row(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def closure_of(model: nn.Module, estimator: str = "weight") -> Callable[[], Tensor]:
    """A scalar for weight space, one loss a row for activation space."""
    if estimator == "weight":
        return lambda: loss_a_row(model, DATA).mean()
    return lambda: loss_a_row(model, DATA)


@torch.no_grad()
def mean_loss(model: nn.Module) -> float:
    model.eval()
    return float(loss_a_row(model, DATA).mean())


def train(optimizer: MeZO, model: nn.Module, steps: int) -> list[float]:
    closure = closure_of(model, optimizer.estimator)
    return [optimizer.step(closure) for _ in range(steps)]


# ------------------------------------------------------------------- every variant, on the same checks

RATES = {"sgd": 0.1, "rms": 0.02, "sign": 0.01, "clip(0.5)": 0.1, "momentum(0.8, window=8)": 0.02,
         "rms+clip(2)+momentum(0.8, window=8)": 0.005, "adam(0.8, window=4)": 0.02, "clip(0.5)+rmsprop": 0.01,
         "adam(0.8, window=0)": 0.02}  # fmt: skip
VARIANTS = [
    pytest.param({"estimator": estimator, "rule": rule, "family": family, "num_samples": samples}, RATES[rule],
                 id=f"{estimator}-{rule}-{family}-{samples}")
    for estimator, families in (("weight", sorted(FAMILIES)), ("activation", ["gaussian", "rademacher"]))
    for family in families
    for rule in RATES
    for samples in (1, 3)
]  # fmt: skip

HALVES = ["norm|head", "hidden"]
VARIANTS += [
    pytest.param({"estimator": estimator, "num_samples": samples, **options}, lr,
                 id="-".join([estimator, *map(str, options.values()), str(samples)]))
    for estimator, samples in (("weight", 1), ("weight", 3), ("activation", 1), ("activation", 3))
    for options, lr in [
        ({"looks": "one-sided"}, 0.1),
        ({"looks": "one-sided", "rule": "rms+clip(2)+momentum(0.8, window=8)"}, 0.005),
        *[({"looks": "one-sided", "rule": "spread", "family": "rademacher"}, 0.01)] * (samples > 1),
        ({"looks": "one-point", "eps": 0.1}, 0.05),
        ({"looks": "one-point", "eps": 0.1, "rule": "rms", "blocks": Blocks(HALVES)}, 0.02),
        *(({"modified": Modified(form, by, "tensor", every, 2)}, lr) for form, lr in (("variance", 0.02), ("expectation", 0.3))
          for by, every in (("weights", 3), ("looks", 4), ("gradient", None))),
        ({"modified": Modified("variance", "looks", "tensor", 3), "family": "rademacher", "rule": "rms+momentum"}, 1e-4),
        ({"blocks": Blocks(HALVES)}, 0.1),
        ({"blocks": Blocks(HALVES, "random"), "rule": "rms", "looks": "one-sided"}, 0.02),
    ]
    if estimator == "weight" or options.get("looks") != "one-point"
]  # fmt: skip


@pytest.mark.parametrize(("variant", "lr"), VARIANTS)
def test_every_variant_looks_without_a_trace_moves_and_replays(
    variant: dict[str, Any], lr: float, tmp_path: Path
) -> None:
    base = classifier()
    options = {"lr": lr, "weight_decay": 0.01, "seed": 3, **variant}
    model, twin, rebuilt, part = (copy.deepcopy(base) for _ in range(4))
    one = MeZO(model, log=tmp_path / "log", **options)
    other = MeZO(twin, **options)
    closure, twin_closure = (closure_of(m, variant["estimator"]) for m in (model, twin))
    marks = []
    for _ in range(6):
        before = jf.fingerprint(model)
        step = one.estimate(closure)
        assert jf.fingerprint(model) == before
        assert one.estimate(closure) == step
        one.apply(step)
        assert other.step(twin_closure) == step.loss
        marks.append(jf.fingerprint(model))
        assert jf.fingerprint(twin) == marks[-1] != before
    one.close()
    assert jf.replay(rebuilt, tmp_path / "log") == 6
    assert jf.fingerprint(rebuilt) == marks[-1]
    assert jf.replay(part, tmp_path / "log", steps=4) == 4
    assert jf.fingerprint(part) == marks[3]
    assert torch.equal(model.frozen, base.frozen)


@pytest.mark.parametrize(("variant", "lr"), VARIANTS)
def test_every_variant_learns(variant: dict[str, Any], lr: float) -> None:
    model = classifier()
    start = mean_loss(model)
    optimizer = MeZO(model, lr=lr, **variant)
    rounds = 100 if variant["num_samples"] == 1 else 60
    train(optimizer, model, rounds)
    assert mean_loss(model) < 0.8 * start
    assert optimizer.steps == rounds


@pytest.mark.parametrize("two_calls", [False, True])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("estimator", ["weight", "activation"])
def test_a_loss_function_with_a_batch_is_the_closure(
    estimator: str, samples: int, two_calls: bool
) -> None:
    with_batch, with_closure = classifier(), classifier()
    options: dict[str, Any] = {"lr": 0.1, "estimator": estimator, "num_samples": samples}
    one = MeZO(with_batch, two_calls=two_calls, **options)
    other = MeZO(with_closure, **options)
    for _ in range(3):
        loss = one.step(lambda batch: loss_a_row(with_batch, batch), DATA)
        assert loss == pytest.approx(other.step(closure_of(with_closure, estimator)), rel=1e-5)
    for p, q in zip(with_batch.parameters(), with_closure.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-4, rtol=0)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("estimator", ["weight", "activation"])
def test_a_parameter_that_the_loss_does_not_use_is_moved_all_the_same(
    estimator: str, samples: int
) -> None:
    model, twin = classifier(), classifier()
    optimizers = []
    for m in (model, twin):
        m.unused = nn.Linear(3, 2)
        nn.init.zeros_(m.unused.weight)
        nn.init.zeros_(m.unused.bias)
        optimizers.append(MeZO(m, lr=0.1, estimator=estimator, num_samples=samples))
    one, other = optimizers
    for _ in range(3):
        one.step(closure_of(model, estimator))
        other.apply(other.estimate(closure_of(twin, estimator)))
    assert (model.unused.weight != 0).any()
    assert jf.fingerprint(model) == jf.fingerprint(twin)


# ------------------------------------------------------------------------- Algorithm 1, and momentum


@given(
    seed=st.integers(0, 2**64 - 1), samples=st.integers(1, 3), lr=st.sampled_from([1e-2, 0.1]),
    eps=st.sampled_from([1e-2, 1e-1]),
)  # fmt: skip
@settings(max_examples=12)
def test_steps_are_those_of_algorithm_1(seed: int, samples: int, lr: float, eps: float) -> None:
    model = classifier().eval()
    optimizer = MeZO(model, lr=lr, eps=eps, num_samples=samples, seed=seed)
    twin = copy.deepcopy(model).double()
    tuned = [p for p in twin.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in tuned]
    data = {"x": DATA["x"].double(), "y": DATA["y"]}
    for index in range(4):
        step = optimizer.estimate(closure_of(model))
        grads = mezo_step(
            tuned, lambda: loss_a_row(twin, data).mean(), lr=lr, eps=eps, seed=seed, step=index, num_samples=samples
        )  # fmt: skip
        assert list(step.projected_grads) == pytest.approx(grads, abs=2e-4)
        assert list(step.coefficients) == pytest.approx(
            [-lr * g / samples for g in grads], abs=2e-4 * lr
        )
        assert step.forwards == 2 * samples
        optimizer.apply(step)
    moved = 0.0
    for p, q, at in zip(optimizer.weights.tensors, tuned, start, strict=True):
        torch.testing.assert_close(p.double(), q, atol=1e-4, rtol=0)
        moved = max(moved, float((q.detach() - at).abs().max()))
    assert moved > 1e-3


@pytest.mark.parametrize(
    "rule", ["momentum(0.7, window=3)", "momentum(0.9)", "rms+momentum(0.5, window=2)"]
)
@pytest.mark.parametrize("samples", [1, 2])
def test_momentum_is_a_window_of_past_moves(rule: str, samples: int) -> None:
    model = classifier()
    optimizer = MeZO(model, lr=0.02, rule=rule, num_samples=samples, seed=7)
    momentum = optimizer.rule.momentum
    assert momentum is not None
    tensors = optimizer.weights.tensors
    slow = [t.detach().double() for t in tensors]
    moves: list[list[Tensor]] = []
    for index in range(7):
        step = optimizer.estimate(closure_of(model))
        total = [torch.zeros_like(t) for t in slow]
        for lane, c in enumerate(step.coefficients):
            for t, z in zip(
                total, direction(slow, noise.direction_seed(7, index, lane)), strict=True
            ):
                t += c * z
        moves.append(total)
        for age, past in enumerate(reversed(moves[-momentum.window :])):
            for t, move in zip(slow, past, strict=True):
                t += momentum.beta**age * move
        optimizer.apply(step)
        for t, expected in zip(tensors, slow, strict=True):
            torch.testing.assert_close(t.double(), expected, atol=2e-6, rtol=0)
    assert max(float(m.abs().max()) for m in moves[-1]) > 1e-3


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("rule", ["rms", "sign"])
def test_normalised_rules_move_a_coordinate_by_lr(rule: str, samples: int) -> None:
    model = classifier()
    optimizer = MeZO(model, lr=1e-3, rule=rule, num_samples=samples)
    lengths = []
    for _ in range(30):
        before = torch.cat([t.detach().flatten() for t in optimizer.weights.tensors])
        optimizer.step(closure_of(model))
        after = torch.cat([t.detach().flatten() for t in optimizer.weights.tensors])
        lengths.append(float((after - before).square().mean()))
    assert math.sqrt(sum(lengths) / len(lengths)) == pytest.approx(1e-3, rel=0.25)


def test_clip_limits_the_coefficients() -> None:
    model = classifier()
    free, clipped = MeZO(model, lr=0.1), MeZO(model, lr=0.1, rule="clip(1e-3)")
    assert abs(free.estimate(closure_of(model)).coefficients[0]) > 1e-3
    assert abs(clipped.estimate(closure_of(model)).coefficients[0]) == pytest.approx(1e-4, rel=1e-4)


# ------------------------------------------------------------------------------- groups and schedules


def grouped(model: Classifier, **first: float) -> list[dict[str, Any]]:
    return [
        {"params": [model.norm.weight, model.head.weight], **first},
        {"params": model.hidden.parameters()},
    ]


@torch.no_grad()
@pytest.mark.parametrize("family", ["gaussian", "rank1"])
def test_groups_have_their_own_lr_eps_and_decay(family: str) -> None:
    model = classifier()
    optimizer = MeZO(
        grouped(model, lr=1e-3, eps=4e-3, weight_decay=0.5), lr=0.2, eps=1e-3, model=model, family=family
    )  # fmt: skip
    weights = optimizer.weights
    assert weights.names == ["norm.weight", "head.weight", "hidden.weight", "hidden.bias"]
    seed = noise.direction_seed(0, 0, 0)
    z = [materialise(weights, i, seed) for i in range(4)]
    eps, lr = [4e-3, 4e-3, 1e-3, 1e-3], [1e-3, 1e-3, 0.2, 0.2]
    start = [t.detach().double() for t in weights.tensors]
    twin = copy.deepcopy(model).double().eval()
    losses = []
    for sign in (1.0, -1.0):
        for i, name in enumerate(weights.names):
            twin.get_parameter(name).data = start[i] + sign * eps[i] * z[i]
        losses.append(float(loss_a_row(twin, {"x": DATA["x"].double(), "y": DATA["y"]}).mean()))
    step = optimizer.estimate(closure_of(model))
    assert step.loss == pytest.approx(sum(losses) / 2, rel=1e-5)
    optimizer.apply(step)
    for i, t in enumerate(weights.tensors):
        # what a group's own (L+ - L-) / (2 eps) makes of it
        wanted = -lr[i] * (losses[0] - losses[1]) / (2 * eps[i]) * z[i]
        if weights.names[i] == "head.weight":
            wanted -= 1e-3 * 0.5 * start[i]
        assert wanted.abs().max() > 1e-5
        torch.testing.assert_close(t.detach().double() - start[i], wanted, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("named", [True, False])
def test_groups_that_say_the_same_are_one_group(named: bool) -> None:
    one, other = classifier(), classifier()
    parameters: Any = list(other.named_parameters()) if named else list(other.parameters())
    first = MeZO(one, lr=0.1)
    second = MeZO(
        [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.1}], lr=0.1, model=other
    )
    assert first.weights.names == second.weights.names
    assert train(first, one, 3) == train(second, other, 3)
    assert jf.fingerprint(one) == jf.fingerprint(other)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: LambdaLR(optimizer, lambda t: 0.5**t),
        lambda optimizer: LambdaLR(optimizer, [lambda t: 0.5**t, lambda t: float(t != 1)]),
        lambda optimizer: CosineAnnealingLR(optimizer, T_max=3),
    ],
    ids=["decay", "a group pauses", "cosine to zero"],
)
def test_torch_schedulers_drive_it(schedule: Any, apart: bool, tmp_path: Path) -> None:
    model = classifier()
    base = copy.deepcopy(model)
    optimizer = MeZO(grouped(model, lr=0.05), lr=0.2, model=model, log=tmp_path / "log")
    scheduler = schedule(optimizer)
    for _ in range(5):
        rates = [group["lr"] for group in optimizer.param_groups]
        before = copy.deepcopy(optimizer.weights.tensors)
        step = optimizer.estimate(closure_of(model))
        if apart:
            optimizer.apply(step)
        else:
            optimizer.step(closure_of(model))
        scheduler.step()
        seed = noise.direction_seed(0, step.index, 0)
        for i, t in enumerate(optimizer.weights.tensors):
            rate = rates[optimizer.weights.groups[i]]
            wanted = -rate * step.projected_grads[0] * materialise(optimizer.weights, i, seed)
            moved = t.detach().double() - before[i].double()
            torch.testing.assert_close(moved, wanted, atol=1e-6, rtol=1e-3)
            assert rate > 0.0 or not moved.any()
    assert [group["lr"] for group in optimizer.param_groups] != [0.05, 0.2]
    optimizer.close()
    jf.replay(base, tmp_path / "log")
    assert jf.fingerprint(base) == jf.fingerprint(model)


def test_a_schedule_of_samples() -> None:
    schedule = jf.linear_samples(1, 5, 4)
    assert [schedule(step) for step in range(7)] == [1, 2, 3, 4, 5, 5, 5]
    assert [jf.linear_samples(4, 1, 3)(step) for step in range(5)] == [4, 3, 2, 1, 1]
    model = classifier()
    optimizer = MeZO(model, lr=0.01, num_samples=schedule)
    for step in range(4):
        record = optimizer.estimate(closure_of(model))
        assert (len(record.coefficients), record.forwards) == (step + 1, 2 * step + 2)
        optimizer.apply(record)


@pytest.mark.parametrize("arguments", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_a_schedule_of_no_samples_is_refused(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(UserError, match="all must be at least 1"):
        jf.linear_samples(*arguments)


@pytest.mark.parametrize("bad", [0, -1, 2.0, None])
def test_a_function_of_bad_sample_counts_is_refused_at_its_step(bad: Any) -> None:
    model = classifier()
    optimizer = MeZO(model, lr=0.01, num_samples=lambda step: bad if step == 1 else 1)
    train(optimizer, model, 1)
    before = jf.fingerprint(model)
    with pytest.raises(UserError, match=f"num_samples gave {bad!r} at step 1"):
        optimizer.step(closure_of(model))
    assert jf.fingerprint(model) == before


# ------------------------------------------------------------------------------------------ exactness


@pytest.fixture
def _python_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def fail() -> float:
    raise OSError("in the closure")


def interrupt() -> float:
    raise KeyboardInterrupt


FAILURES: list[tuple[Callable[[], Any], type[BaseException]]] = [
    (fail, OSError),
    (interrupt, KeyboardInterrupt),
    (lambda: signal.raise_signal(signal.SIGINT), KeyboardInterrupt),
    (lambda: math.nan, NonFiniteLoss),
    (lambda: math.inf, NonFiniteLoss),
    (lambda: torch.tensor(-math.inf), NonFiniteLoss),
]


@pytest.mark.usefixtures("_python_handler")
@pytest.mark.parametrize("stepping", [True, False])
@pytest.mark.parametrize("at", [1, 2, 3, 4])
@pytest.mark.parametrize(("act", "error"), FAILURES)
@pytest.mark.parametrize("estimator", ["weight", "activation"])
def test_a_failure_at_either_sign_leaves_every_bit_and_the_step_can_be_taken_again(
    estimator: str, act: Callable[[], Any], error: type[BaseException], at: int, stepping: bool
) -> None:
    model, twin = classifier().train(), classifier().train()
    optimizer, other = (
        MeZO(m, lr=0.1, estimator=estimator, num_samples=2, rule="rms+momentum")
        for m in (model, twin)
    )
    train(optimizer, model, 2)
    train(other, twin, 2)
    before, state = jf.fingerprint(model), copy.deepcopy(optimizer.state_dict())
    good, calls = closure_of(model, estimator), iter(range(1, 99))

    def closure() -> Tensor:
        losses = good()
        return losses + act() if next(calls) == at else losses

    with pytest.raises(error) as caught:
        (optimizer.step if stepping else optimizer.estimate)(closure)
    if isinstance(caught.value, NonFiniteLoss):
        assert caught.value.step == 2
        assert ("+eps" if at % 2 else "-eps") in str(caught.value)
    assert jf.fingerprint(model) == before
    assert {type(p) for p in model.parameters()} == {nn.Parameter}
    assert str(optimizer.state_dict()) == str(state)
    assert all(module.training for module in model.modules())
    assert optimizer.step(good) == other.step(closure_of(twin, estimator))
    assert jf.fingerprint(model) == jf.fingerprint(twin)


@pytest.mark.usefixtures("_python_handler")
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_ctrl_c_while_weights_move_waits_until_they_are_home(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, twin = classifier(), classifier()
    optimizer, other = (MeZO(m, lr=0.1, family=family) for m in (model, twin))
    look = optimizer.weights.look

    def interrupted_look(*arguments: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        look(*arguments)

    monkeypatch.setattr(optimizer.weights, "look", interrupted_look)
    before = jf.fingerprint(model)
    with pytest.raises(KeyboardInterrupt):
        optimizer.estimate(closure_of(model))
    assert jf.fingerprint(model) == before
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure_of(model))
    other.step(closure_of(twin))  # the step had been estimated: it is taken whole
    assert optimizer.steps == 1
    assert jf.fingerprint(model) == jf.fingerprint(twin)


def test_a_coefficient_too_large_to_keep_is_refused_with_the_weights_home() -> None:
    model = classifier()
    optimizer = MeZO(model, lr=1e300)
    before = jf.fingerprint(model)
    with pytest.raises(UserError, match="lower lr"):
        optimizer.step(closure_of(model))
    assert jf.fingerprint(model) == before
    assert optimizer.steps == 0


@pytest.mark.parametrize("estimator", ["weight", "activation"])
def test_the_model_is_in_eval_mode_while_looking_only(estimator: str) -> None:
    model = classifier().train()
    model.hidden.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    seen: list[bool] = []
    good = closure_of(model, estimator)

    def closure() -> Tensor:
        seen.extend(module.training for module in model.modules())
        seen.append(torch.is_grad_enabled())
        return good()

    optimizer = MeZO(model, lr=0.1, estimator=estimator)
    optimizer.step(closure)
    assert seen
    assert not any(seen)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in model.parameters())


def test_bare_parameters_have_no_mode_but_the_same_steps() -> None:
    one, other = classifier().eval(), classifier().eval()
    first, second = MeZO(one, lr=0.1), MeZO(other.parameters(), lr=0.1)
    assert train(first, one, 3) == train(second, other, 3)
    assert jf.fingerprint(one) == jf.fingerprint(other)


@pytest.mark.parametrize(
    "result", [float, lambda x: x.reshape(1), lambda x: x.double(), lambda x: x.repeat(4)]
)
def test_a_loss_is_anything_that_is_one_number(result: Callable[[Tensor], Any]) -> None:
    one, other = classifier(), classifier()
    good = closure_of(other)
    assert train(MeZO(one, lr=0.1), one, 1) == pytest.approx(
        [MeZO(other, lr=0.1).step(lambda: result(good()))]
    )


def test_a_closure_may_turn_gradients_on() -> None:
    one, other = classifier(), classifier()
    good = closure_of(one)
    torch.set_warn_always(True)
    try:
        loss = MeZO(one, lr=0.1).step(torch.enable_grad()(good))
    finally:
        torch.set_warn_always(False)
    assert loss == MeZO(other, lr=0.1).step(closure_of(other))


@pytest.mark.parametrize(
    ("result", "said"),
    [(None, "a NoneType"), ("text", "a str"), ([1.0], "a list"), (torch.zeros(0), "an empty tensor")],
)  # fmt: skip
def test_what_is_not_a_loss_is_refused(result: Any, said: str) -> None:
    model = classifier()
    optimizer = MeZO(model)
    before = jf.fingerprint(model)
    with pytest.raises(UserError, match=f"the closure returned {said}"):
        optimizer.step(lambda: result)
    assert jf.fingerprint(model) == before


def test_step_without_a_closure_says_what_it_needs() -> None:
    with pytest.raises(UserError, match="needs a closure"):
        MeZO(classifier()).step()


def test_steps_are_taken_in_order() -> None:
    model = classifier()
    optimizer = MeZO(model, lr=0.1)
    step = optimizer.estimate(closure_of(model))
    optimizer.apply(step)
    before = jf.fingerprint(model)
    with pytest.raises(UserError, match="step 0 cannot be applied: the next step is 1"):
        optimizer.apply(step)
    assert jf.fingerprint(model) == before


def test_eps_may_shrink_but_not_outgrow_its_grid() -> None:
    model = classifier()
    optimizer = MeZO(model, lr=0.1, eps=1e-2)
    before = jf.fingerprint(model)
    full = optimizer.estimate(closure_of(model)).projected_grads[0]
    optimizer.param_groups[0]["eps"] = 1e-3
    assert optimizer.estimate(closure_of(model)).projected_grads[0] == pytest.approx(full, rel=0.1)
    for eps in (0.02, 0.0, -1.0, math.nan):
        optimizer.param_groups[0]["eps"] = eps
        with pytest.raises(UserError, match=f"eps is {eps}: it must be positive and at most 0.01"):
            optimizer.step(closure_of(model))
    assert jf.fingerprint(model) == before


# ---------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("rule", RATES)
@pytest.mark.parametrize(
    "variant",
    [
        {"estimator": "weight"},
        {"estimator": "activation", "num_samples": jf.linear_samples(1, 3, 6)},
        {"weight_decay": 0.8},
    ],
)
def test_state_goes_on_to_the_same_bits(variant: dict[str, Any], rule: str) -> None:
    model = classifier()
    options = {"lr": RATES[rule], "rule": rule, "seed": 9, **variant}
    if (
        "weight_decay" in variant
    ):  # so strong that a fresh grid would be finer than the one they are on
        options["weight_decay"] /= RATES[rule]
    optimizer = MeZO(model, **options)
    train(optimizer, model, 5)
    copied = copy.deepcopy(model)
    state = copy.deepcopy(optimizer.state_dict())
    other = MeZO(copied, **options)
    if "weight_decay" in variant:
        fresh = other.weights.exponents
        assert any((a < b).any() for a, b in zip(fresh, optimizer.weights.exponents, strict=True))
    other.load_state_dict(state)
    assert other.steps == 5
    assert train(other, copied, 4) == train(optimizer, model, 4)
    assert jf.fingerprint(copied) == jf.fingerprint(model)
    assert str(other.state_dict()) == str(optimizer.state_dict())
    assert state["justforward"]["steps"] == 5  # what was handed over is not shared


def test_state_carries_the_scales_of_moves_that_momentum_still_follows() -> None:
    model = classifier()
    groups = {"lr": 0.02, "rule": "momentum"}
    optimizer = MeZO(grouped(model, lr=0.002), model=model, **groups)
    train(optimizer, model, 3)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    copied = copy.deepcopy(model)
    other = MeZO(grouped(copied, lr=0.002), model=copied, **groups)
    other.load_state_dict(optimizer.state_dict())
    before = jf.fingerprint(model)
    assert train(other, copied, 2) == train(optimizer, model, 2)
    assert jf.fingerprint(copied) == jf.fingerprint(model) == before  # momentum has no rate either
    for each in (optimizer, other):
        each.param_groups[1]["lr"] = 0.02
    assert train(other, copied, 2) == train(optimizer, model, 2)
    assert jf.fingerprint(copied) == jf.fingerprint(model) != before


def test_state_carries_the_rates() -> None:
    model = classifier()
    optimizer = MeZO(model, lr=0.1, weight_decay=0.5)
    optimizer.param_groups[0]["lr"] = 0.025
    other = MeZO(model, lr=0.1)
    other.load_state_dict(optimizer.state_dict())
    assert (other.param_groups[0]["lr"], other.param_groups[0]["weight_decay"]) == (0.025, 0.5)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda: torch.optim.SGD(classifier().parameters()), "not the state of a MeZO optimizer"),
        (lambda: MeZO(classifier(), rule="rms"), r"the rule is rms\(beta=0.9\) in the state and sgd here"),
        (lambda: MeZO(classifier(), seed=4), "the seed is 4 in the state and 0 here"),
        (lambda: MeZO(classifier(), family="rank1"), "the family is rank1 in the state and gaussian here"),
        (lambda: MeZO(classifier().head), "the state is of other tensors"),
    ],
)  # fmt: skip
def test_a_state_of_something_else_is_refused(other: Callable[[], Any], said: str) -> None:
    model = classifier()
    optimizer = MeZO(model, lr=0.1)
    before = str(optimizer.state_dict())
    with pytest.raises(UserError, match=said):
        optimizer.load_state_dict(other().state_dict())
    assert str(optimizer.state_dict()) == before


# ------------------------------------------------------------------------------------------------ log


@pytest.mark.parametrize("torn", [0, 1, 6])
@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize(
    "rule", ["sgd", "rms+momentum(0.8, window=4)", "rms+adam(window=4)", "rmsprop(window=0)"]
)
def test_a_resumed_run_goes_on_to_the_same_bits(
    rule: str, sealed: bool, torn: int, tmp_path: Path
) -> None:
    base = classifier()
    log = tmp_path / "log"
    options: dict[str, Any] = {"lr": 0.1, "rule": rule, "weight_decay": 0.1, "num_samples": 2}
    whole, first, second = (copy.deepcopy(base) for _ in range(3))
    losses = train(MeZO(whole, **options), whole, 9)
    optimizer = MeZO(first, log=log, **options)
    train(optimizer, first, 5)
    raw = log.read_bytes()
    optimizer.close()
    optimizer.close()
    if sealed:
        raw = log.read_bytes()
    log.write_bytes(raw[: len(raw) - torn])
    resumed = MeZO(second, log=log, resume=True, **options)
    kept = 5 if sealed or not torn else 4
    assert resumed.steps == kept
    assert train(resumed, second, 9 - kept) == losses[kept:]
    assert jf.fingerprint(second) == jf.fingerprint(whole)
    resumed.close()
    assert jf.replay(base, log) == 9
    assert jf.fingerprint(base) == jf.fingerprint(whole)


def test_resume_starts_a_log_that_is_not_there(tmp_path: Path) -> None:
    model = classifier()
    optimizer = MeZO(model, lr=0.1, log=tmp_path / "log", resume=True)
    train(optimizer, model, 2)
    assert len(jf.read_log(tmp_path / "log").steps) == 2
    optimizer.close()


def test_a_log_names_its_base_before_the_grid_is_laid(tmp_path: Path) -> None:
    model = classifier()
    model.head.weight.data.mul_(1 / 3)  # nothing that lies on a grid
    base = jf.fingerprint(model)
    MeZO(model, log=tmp_path / "log").close()
    assert jf.read_log(tmp_path / "log").header["base"] == base != jf.fingerprint(model)


def test_a_log_that_exists_costs_neither_itself_nor_the_model_a_bit(tmp_path: Path) -> None:
    model = classifier()
    MeZO(copy.deepcopy(model), log=tmp_path / "log").close()
    raw, before = (tmp_path / "log").read_bytes(), jf.fingerprint(model)
    with pytest.raises(UserError, match=r"log: the log exists: resume it \(resume=True\)"):
        MeZO(model, lr=0.1, log=tmp_path / "log")
    assert (tmp_path / "log").read_bytes() == raw
    assert jf.fingerprint(model) == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seed": 1}, "cannot be resumed: seed is 0 in the log and 1 now"),
        ({"family": "rademacher"}, "family is 'gaussian' in the log and 'rademacher' now"),
        ({"rule": "rms"}, r"rule is 'sgd' in the log and 'rms\(beta=0.9\)' now"),
        ({"eps": 1e-2}, r"groups is \[0.001\] in the log and \[0.01\] now"),
        ({"rule": "sgd+momentum"}, "cannot be resumed: rule is"),
    ],
)
def test_a_log_of_another_run_is_not_resumed(
    options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    base = classifier()
    model = copy.deepcopy(base)
    optimizer = MeZO(model, lr=0.1, log=tmp_path / "log")
    train(optimizer, model, 2)
    optimizer.close()
    raw = (tmp_path / "log").read_bytes()
    again = copy.deepcopy(base)
    with pytest.raises(UserError, match=said):
        MeZO(again, log=tmp_path / "log", resume=True, **{"lr": 0.1, **options})
    assert jf.fingerprint(again) == jf.fingerprint(base)  # so that it can be tried again
    resumed = MeZO(again, lr=0.1, log=tmp_path / "log", resume=True)
    assert resumed.steps == 2
    resumed.close()
    raw = (tmp_path / "log").read_bytes()
    with pytest.raises(UserError, match="the values differ"):
        MeZO(model, lr=0.1, log=tmp_path / "log", resume=True)
    with pytest.raises(UserError, match=r"parameter .*: another model or layout|which this model"):
        MeZO(nn.Linear(3, 2), lr=0.1, log=tmp_path / "log", resume=True)
    assert (tmp_path / "log").read_bytes() == raw


@pytest.mark.parametrize("stepping", [True, False])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_step_that_cannot_be_logged_is_not_taken(
    family: str, stepping: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = classifier()
    model, twin = copy.deepcopy(base), copy.deepcopy(base)
    optimizer = MeZO(model, lr=0.1, family=family, rule="momentum", log=tmp_path / "log")
    other = MeZO(twin, lr=0.1, family=family, rule="momentum")
    train(optimizer, model, 2)
    before = jf.fingerprint(model)

    def full(self: Writer, step: jf.Step) -> None:
        raise UserError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "append", full)
        act, argument = optimizer.step, closure_of(model)
        if not stepping:
            act, argument = optimizer.apply, optimizer.estimate(argument)
        with pytest.raises(UserError, match="no space left"):
            act(argument)
    assert jf.fingerprint(model) == before
    train(optimizer, model, 2)
    train(other, twin, 4)
    assert jf.fingerprint(model) == jf.fingerprint(twin)
    optimizer.close()
    assert jf.replay(base, tmp_path / "log") == 4
    assert jf.fingerprint(base) == jf.fingerprint(twin)


def test_a_log_that_says_too_little_is_not_resumed(tmp_path: Path) -> None:
    MeZO(classifier(), log=tmp_path / "log").close()
    log = jf.read_log(tmp_path / "log")
    header = {key: value for key, value in log.header.items() if key != "settings"}
    with pytest.raises(UserError, match="the log does not say its settings, which is"):
        check_header(replace(log, header=header), log.header)


def test_a_log_takes_parameters_of_the_model_alone(tmp_path: Path) -> None:
    """No replay would find another one."""
    model = classifier()
    before = jf.fingerprint(model)
    outside = nn.Parameter(torch.zeros(6))
    with pytest.raises(UserError, match=r"parameter param5, of shape \(6,\), is none of the model"):
        MeZO([*model.parameters(), outside], model=model, log=tmp_path / "log")
    assert jf.fingerprint(model) == before
    assert list(tmp_path.iterdir()) == []
    MeZO([*model.parameters(), outside], model=model)


@pytest.mark.parametrize(
    ("place", "said"), [("missing/log", "there is no folder"), (".", "the log exists")]
)
def test_a_log_that_cannot_be_made_is_refused(place: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        MeZO(classifier(), log=tmp_path / place)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16),
    ],
)
def test_a_model_that_was_converted_since_is_named(
    before: torch.dtype, after: torch.dtype, tmp_path: Path
) -> None:
    model = nn.Linear(4, 1).to(before)
    optimizer = MeZO(model, lr=1e-3, log=tmp_path / "log")
    step = optimizer.estimate(lambda: model(torch.ones(2, 4)).sum())
    model.to(after)
    said = f"parameter weight was {before} on cpu when the optimizer was made and is {after} on"
    with pytest.raises(UserError, match=said):
        optimizer.step(lambda: model(torch.ones(2, 4, dtype=after)).sum())
    with pytest.raises(UserError, match=said):
        optimizer.apply(step)
    assert len(jf.read_log(tmp_path / "log").steps) == optimizer.steps == 0
    optimizer.close()


def test_no_group_is_added_to_an_optimizer() -> None:
    model = classifier()
    optimizer = MeZO(model.head, model=model)
    with pytest.raises(UserError, match=r"add_param_group: .* make a new one of all groups"):
        optimizer.add_param_group({"params": list(model.hidden.parameters())})
    train(optimizer, model, 1)


@pytest.mark.parametrize("rule", ["momentum(0.9, 3)", "sgd", "rms+adam(window=3)"])
def test_a_rate_of_zero_moves_nothing(rule: str, tmp_path: Path) -> None:
    """With momentum the steps of before would."""
    base = classifier()
    model = copy.deepcopy(base)
    optimizer = MeZO(model, lr=0.1, rule=rule, log=tmp_path / "log")
    train(optimizer, model, 2)
    before = jf.fingerprint(model)
    optimizer.param_groups[0]["lr"] = 0.0
    train(optimizer, model, 2)
    assert jf.fingerprint(model) == before
    optimizer.param_groups[0]["lr"] = 0.1
    train(optimizer, model, 2)
    assert jf.fingerprint(model) != before
    optimizer.close()
    assert jf.replay(base, tmp_path / "log") == 6
    assert jf.fingerprint(base) == jf.fingerprint(model)


def test_numbers_may_be_those_of_numpy(tmp_path: Path) -> None:
    found = []
    for number, whole in ((float, int), (np.float64, np.int64)):
        model = classifier()
        optimizer = MeZO(
            model, lr=number(0.5), eps=number(0.25), weight_decay=number(0.125), seed=whole(3),
            num_samples=whole(2), log=tmp_path / f"log-{whole.__name__}",
        )  # fmt: skip
        train(optimizer, model, 2)
        optimizer.param_groups[0]["lr"] = np.float32(0.25)
        train(optimizer, model, 1)
        optimizer.close()
        found.append(jf.fingerprint(model))
    assert found[0] == found[1]
    group = MeZO(classifier(), lr=np.float32(0.5), num_samples=lambda step: np.int32(1))
    assert type(group.param_groups[0]["lr"]) is float


def frozen() -> nn.Module:
    return classifier().requires_grad_(False)


WEIGHT = nn.Parameter(torch.zeros(3))
REFUSALS: list[tuple[Callable[[], Any], dict[str, Any], str]] = [
    (classifier, {"lr": 0.0}, "lr is 0.0: it must be positive and finite"),
    (classifier, {"lr": -1e-3}, "lr is -0.001"),
    (classifier, {"lr": math.nan}, "lr is nan"),
    (classifier, {"lr": math.inf}, "lr is inf"),
    (classifier, {"lr": "fast"}, "lr is 'fast'"),
    (classifier, {"eps": 0.0}, "eps is 0.0: it must be positive and at most 100"),
    (classifier, {"eps": -1e-3}, "eps is -0.001"),
    (classifier, {"eps": math.nan}, "eps is nan"),
    (classifier, {"eps": math.inf}, "eps is inf"),
    (classifier, {"eps": None}, "eps is None"),
    (classifier, {"weight_decay": -0.1}, "weight_decay is -0.1: it must be finite and at least 0"),
    (classifier, {"weight_decay": math.nan}, "weight_decay is nan"),
    (classifier, {"rule": "adagrad"}, "rule 'adagrad': 'adagrad' is unknown; known are sgd"),
    (classifier, {"rule": "clip(0)"}, "clip's limit is '0'"),
    (classifier, {"estimator": "backprop"}, "estimator is 'backprop': it must be one of weight, activation"),
    (classifier, {"family": "cauchy"}, "family is 'cauchy': it must be one of gaussian, rademacher, rank1"),
    (classifier, {"family": "cauchy", "estimator": "activation"}, "family is 'cauchy'"),
    (classifier, {"num_samples": 0}, "num_samples is 0: it must be a whole number, at least 1"),
    (classifier, {"num_samples": -3}, "num_samples is -3"),
    (classifier, {"num_samples": 1.5}, "num_samples is 1.5"),
    (classifier, {"num_samples": None}, "num_samples is None"),
    (classifier, {"seed": -1}, r"seed is -1: it must be a whole number, at least 0 and below 2\^64"),
    (classifier, {"seed": 2**64}, "seed is 18446744073709551616"),
    (classifier, {"seed": 1.0}, "seed is 1.0"),
    (classifier, {"seed": None}, "seed is None"),
    (frozen, {}, "there is nothing to tune: no parameter has requires_grad"),
    (nn.ReLU, {}, "there is nothing to tune"),
    (list, {}, "there is nothing to tune"),
    (lambda: [{"params": []}], {}, "there is nothing to tune"),
    (lambda: [WEIGHT, WEIGHT], {}, "parameter 1 is there twice"),
    (lambda: [{"params": [WEIGHT]}, {"params": WEIGHT}], {}, "is there twice"),
    (lambda: [("w", WEIGHT), ("v", WEIGHT)], {}, "parameter v is there twice"),
    (lambda: ["hidden.weight"], {}, "params: a str is not a parameter"),
    (lambda: [WEIGHT, 3.0], {}, "params: a float is not a parameter"),
    (lambda: [{"params": [WEIGHT], "lr": -1.0}], {}, "lr is -1.0"),
    (lambda: [{"params": [WEIGHT], "eps": math.nan}], {}, "eps is nan"),
    (lambda: [nn.Parameter(torch.zeros(3).double())], {}, "param0 is torch.float64"),
    (lambda: classifier().double(), {}, "parameter norm.weight is torch.float64"),
    (lambda: nn.Linear(2, 2, device="meta"), {}, "parameter weight is on the meta device.*cpu_offload.*keep_on_disk"),
    (lambda: [nn.Parameter(torch.zeros(3, 2).T)], {}, "param0 is not contiguous"),
    (lambda: [nn.Parameter(torch.tensor([0.0, math.nan]))], {}, "param0 is nan at element 1"),
    (lambda: [WEIGHT], {"log": "never-made"}, "pass the model"),
]  # fmt: skip


@pytest.mark.parametrize(("params", "options", "said"), REFUSALS)
def test_what_cannot_be_used_is_named(
    params: Callable[[], Any], options: dict[str, Any], said: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    given_ = params()
    values = (
        [p.detach().clone() for p in given_.parameters()] if isinstance(given_, nn.Module) else []
    )
    with pytest.raises(UserError, match=said) as caught:
        MeZO(given_, **options)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    for value, p in zip(values, given_.parameters() if values else [], strict=True):
        assert value.is_meta or torch.equal(value, p)
