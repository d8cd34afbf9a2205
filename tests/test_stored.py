"""Weights in 16 bits: read only while looking, stepped by stochastic rounding, computed with in float32."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import justforward as jf
from conftest import make_model, small_run
from justforward import UserError, stored
from justforward.baselines import run_baseline
from justforward.config import BaselineConfig, EvalConfig, ReplayConfig, TrainConfig
from justforward.directions import FAMILIES, Weights
from justforward.models import load_model, save_model
from justforward.moves import Move
from justforward.noise import cpu, half, plain, reference, spec
from justforward.ondisk import keep_on_disk
from justforward.progress import Progress
from justforward.rebuild import evaluate, rebuild
from justforward.run import train
from justforward.settings import resolved
from justforward.stored import HALVES, Stored, compute_model_wide, compute_wide

FORMS = {torch.bfloat16: spec.BFLOAT16, torch.float16: spec.FLOAT16}
SEEDS = st.integers(0, 2**64 - 1)
DTYPE = st.sampled_from(HALVES)
RULES = {
    "activation": {"lr": 1e-3, "rule": "rms", "estimator": "activation"},
    "weight": {"lr": 1e-4},
    "rank1": {"lr": 1e-4, "family": "rank1"},
    "signs": {"lr": 1e-4, "family": "rademacher"},
    "adam": {"lr": 1e-3, "rule": "adam(window=3)"},
    "momentum": {"lr": 1e-4, "rule": "momentum"},
}


def bits_of(dtype: torch.dtype) -> Any:
    """Any finite number of a format, by its bits."""
    size = 0x7F80 if dtype == torch.bfloat16 else 0x7C00
    return st.integers(0, size - 1)


@st.composite
def weights_and_moves(draw: Any) -> tuple[Tensor, Tensor, int]:
    """Weights of all sizes, moves of all sizes beside them, a seed."""
    dtype = draw(DTYPE)
    count = draw(st.integers(1, 40))
    bits = draw(st.lists(bits_of(dtype), min_size=count, max_size=count))
    signs = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    values = [b | (0x8000 if s else 0) for b, s in zip(bits, signs, strict=True)]
    theta = torch.tensor(np.array(values, np.uint16).view(np.int16)).view(dtype)
    scale = 2.0 ** draw(st.integers(-30, 4))
    move = torch.tensor(draw(st.lists(st.floats(-1, 1, width=32), min_size=count, max_size=count)))
    moves = (move * scale * theta.float().abs().clamp_min(2.0**-100)).clamp(-1e38, 1e38)
    return theta, moves, draw(SEEDS)


def vector(theta: Tensor) -> Weights:
    p = nn.Parameter(theta.clone(), requires_grad=False)
    return Weights([("w", p)], [0], FAMILIES["gaussian"], [1e-3])


@settings(max_examples=150)
@given(case=weights_and_moves())
def test_a_step_goes_to_a_neighbour_of_where_it_wants_to(case: tuple[Tensor, Tensor, int]) -> None:
    theta, moves, seed = case
    form, after = FORMS[theta.dtype], theta.clone()
    plain.add_rounded(after, moves, seed)
    want = theta.double() + moves.double()
    largest = torch.maximum(theta.float().abs(), (theta.float() + moves).abs())
    exponent = torch.frexp(largest)[1].double() - 1
    bits = 7 if theta.dtype == torch.bfloat16 else 10
    unit = torch.exp2(torch.clamp(exponent - bits, min=form.least))
    held = want.abs() > form.largest
    assert after.isfinite().all()
    apart = (after.double() - want).abs()
    assert (apart[~held] <= unit[~held] * (1 + 2.0**-10)).all()
    assert (after[held].abs().double() >= form.largest * (1 - 2.0**-6)).all()
    still = (moves == 0) & (theta.double() % 2.0**form.least == 0)
    assert torch.equal(after[still], theta[still])


@settings(max_examples=20)
@given(dtype=DTYPE, seed=SEEDS, scale=st.integers(-14, 6), size=st.integers(1, 2100))
def test_widening_is_exact_and_narrowing_undoes_it(
    dtype: torch.dtype, seed: int, scale: int, size: int
) -> None:
    # an update writes +0.0 for the -0.0 that a tiny number is rounded to
    theta = (reference.normal(seed, 0, 0, size) * 2.0**scale).to(dtype) + 0.0
    bits = theta.clone().view(torch.int16).numpy().view(np.uint16)
    out = np.empty(size, np.float32)
    none = np.zeros(0, np.uint64), np.zeros(0, np.float32)
    half.OF[dtype].widen(bits, out, 0, size, np.uint64(0), *none)
    assert np.array_equal(out, theta.float().numpy())
    w = vector(theta)
    w.update(
        [Move(seed, np.zeros(1, np.uint64), np.zeros((1, 1), np.float32), np.ones(1, np.float32))]
    )
    flags = np.zeros(-(-size // spec.TILE), np.int8)
    steps = np.array([seed], np.uint64), np.array([1], np.int64), np.zeros(1, np.uint64)
    half.OF[dtype].update(bits, flags, 0, len(flags), np.uint64(0), *steps, np.zeros(1, np.float32),
                          np.zeros(1, np.float32), np.float32(0.0))  # fmt: skip
    assert np.array_equal(bits.view(np.int16), theta.view(torch.int16).numpy())


def test_every_number_of_a_format_is_read_and_written_right() -> None:
    for dtype in HALVES:
        every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
        every = every[every.isfinite()].clone()
        out = np.empty(len(every), np.float32)
        none = np.zeros(0, np.uint64), np.zeros(0, np.float32)
        bits = every.view(torch.int16).numpy().view(np.uint16)
        half.OF[dtype].widen(bits, out, 0, len(every), np.uint64(0), *none)
        assert np.array_equal(out, every.float().numpy()), dtype


@settings(max_examples=25)
@given(
    dtype=DTYPE, seed=SEEDS, size=st.integers(1, 2100), family=st.sampled_from(sorted(FAMILIES)),
    count=st.integers(1, 3), decay=st.sampled_from([0.0, 1e-3]), wide=st.booleans(),
)  # fmt: skip
def test_kernels_and_their_plain_twins_give_the_same_bits(
    dtype: torch.dtype, seed: int, size: int, family: str, count: int, decay: float, wide: bool
) -> None:
    shape = (3, size // 3 + 1) if wide else (size,)
    theta = (reference.normal(seed, 9, 0, int(np.prod(shape))) * 0.05).to(dtype).view(shape)
    moves = [
        Move(
            seed ^ s,
            np.arange(1 + s, dtype=np.uint64) + np.uint64(seed // 2),
            np.full((1, 1 + s), 10.0 ** -(2 + s), np.float32),
            np.full(1, decay, np.float32),
        )
        for s in range(count)
    ]
    found = []
    for compiled in (True, False):
        p = nn.Parameter(theta.clone(), requires_grad=False)
        weights = Weights([("w", p)], [0], FAMILIES[family], [1e-3])
        weights.compiled = compiled
        weights.update(moves)
        found.append(stored.plain(p).view(torch.int16))
    assert torch.equal(*found)
    one = nn.Parameter(theta.clone(), requires_grad=False)
    weights = Weights([("w", one)], [0], FAMILIES[family], [1e-3])
    for move in moves:  # and one by one the bits of all in one pass
        weights.update([move])
    assert torch.equal(stored.plain(one).view(torch.int16), found[0])


@pytest.mark.parametrize("dtype", HALVES)
def test_updates_far_below_the_last_place_arrive_on_average(dtype: torch.dtype) -> None:
    """Rounding to nearest would lose all of them."""
    theta = (reference.normal(1, 0, 0, 4096) * 0.05).to(dtype)
    z = np.empty(4096, np.float32)
    cpu.fill(z, np.uint64(7), np.uint64(0), 0, 0, False)
    total = np.zeros(4096)
    c, times = 1e-6, 400
    lost = (theta.float() + c).to(dtype) == theta
    assert lost.float().mean() > 0.9
    for t in range(times):
        w = vector(theta)
        w.update(
            [
                Move(
                    t,
                    np.array([7], np.uint64),
                    np.full((1, 1), c, np.float32),
                    np.zeros(1, np.float32),
                )
            ]
        )
        total += w.tensors[0].detach().double().numpy() - theta.double().numpy()
    slope = np.dot(total / times, z) / np.dot(z, z) / c
    assert abs(slope - 1.0) < 0.15


def test_a_weight_that_float16_cannot_hold_is_named() -> None:
    p = nn.Parameter(torch.full((64,), 65000.0, dtype=torch.float16), requires_grad=False)
    weights = Weights([("body.w", p)], [0], FAMILIES["rademacher"], [1e-3])
    move = Move(
        0, np.zeros(1, np.uint64), np.full((1, 1), 4e4, np.float32), np.zeros(1, np.float32)
    )
    weights.update([move])
    with pytest.raises(
        UserError,
        match=r"body.w has reached 65504, the largest number of torch.float16, .*lower lr",
    ):
        weights.check_held()
    weights.check_held()  # it is said once
    assert stored.plain(p).isfinite().all()


class AtTheEdge(nn.Module):
    """A float16 matrix at the largest number that it holds, and something in float32 beside it."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(8, 8, bias=False).half(), nn.Linear(8, 1)
        self.a.weight.data.fill_(65504.0)

    def loss(self) -> Tensor:
        return self.b(torch.ones(4, 8)).square().mean() + (self.a.weight.mean() - 65504.0)


def steps_to(last: int, opt: jf.MeZO, model: AtTheEdge, end: str | None = None) -> None:
    while opt.steps < last:
        opt.step(model.loss)
    if end is not None:
        getattr(opt, end)()


@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize("rule", ["sgd", "rms+adam(window=2)"])
@pytest.mark.parametrize("family", ["gaussian", "rank1"])
def test_what_is_held_back_is_in_the_log_and_a_lower_rate_goes_on(
    family: str, rule: str, disk: bool, tmp_path: Path
) -> None:
    """In memory the step itself says so, in a file the next one, which is not taken: either way all agree."""
    options: dict[str, Any] = {"eps": 1e-2, "seed": 3, "family": family, "rule": rule}
    log = tmp_path / "log"

    def edge() -> AtTheEdge:
        model = AtTheEdge()
        if disk:
            keep_on_disk(model.parameters(), tmp_path)
        return model

    model = edge()
    opt = jf.MeZO(model, lr=20.0, log=log, **options)

    def same() -> None:
        steps = len(jf.read_log(log).steps)
        assert opt.steps == steps
        again = AtTheEdge()
        assert jf.replay(again, log) == steps
        assert jf.fingerprint(again) == jf.fingerprint(model)
        assert torch.equal(model.a.weight + 0, stored.plain(model.a.weight).float())

    with pytest.raises(UserError, match=r"a.weight has reached 65504.*stands: lower lr"):
        steps_to(50, opt, model)
    assert opt.steps > 0
    same()
    opt.param_groups[0]["lr"] = 1e-6
    for _ in range(2):
        opt.step(model.loss)
    opt.close()
    same()
    resumed = edge()
    opt = jf.MeZO(resumed, lr=1e-6, log=log, resume=True, **options)
    assert jf.fingerprint(resumed) == jf.fingerprint(model)
    opt.step(resumed.loss)
    opt.close()


@pytest.mark.parametrize("end", ["state_dict", "close"])
def test_what_the_last_step_held_back_is_said_at_the_end(end: str, tmp_path: Path) -> None:
    found = []
    for disk in (False, True):
        model = AtTheEdge()
        if disk:
            keep_on_disk(model.parameters(), tmp_path)
        opt = jf.MeZO(model, lr=20.0, eps=1e-2, seed=3)
        with pytest.raises(UserError, match="has reached 65504"):
            steps_to(found[0] if disk else 50, opt, model, end)
        found.append(opt.steps)
    assert found[0] == found[1]
    getattr(opt, end)()


# ------------------------------------------------------------------------------------- whole models


def loss_of(model: Any) -> Callable[[Any], Tensor]:
    def loss(batch: Any) -> Tensor:
        logits = model(input_ids=batch["ids"]).logits
        assert logits.dtype == torch.float32
        wanted = batch["ids"][:, 1:]
        return nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), wanted, reduction="none"
        ).mean(1)  # fmt: skip

    return loss


@pytest.fixture(params=["opt", "gpt2", "llama", "bert"])
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A model in bfloat16, and in float32 with the same numbers."""
    model = make_model(request.param, vocab_size=300).bfloat16()
    return model, copy.deepcopy(model).float()


def batch_for(model: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"ids": torch.randint(5, model.config.vocab_size, (4, 11), generator=generator)}


@pytest.mark.parametrize("rule", RULES)
def test_a_look_sees_what_it_sees_in_float32_and_moves_nothing(
    pair: tuple[Any, Any], rule: str
) -> None:
    small, wide = pair
    batch, seen = batch_for(small), []
    for model in pair:
        opt = jf.MeZO(model, **RULES[rule])
        before = jf.fingerprint(model)
        step = opt.estimate(loss_of(model), batch)
        assert jf.fingerprint(model) == before
        seen.append((step.loss, *(g * 1e-3 for g in step.projected_grads)))
    assert seen[0] == pytest.approx(seen[1], abs=2e-5, rel=1e-5)
    assert {type(p) for p in small.parameters()} == {Stored}
    assert {type(p) for p in wide.parameters()} == {nn.Parameter}


@pytest.mark.parametrize("rule", ["activation", "weight", "rank1"])
def test_native_compute_in_16_bits_sees_roughly_what_float32_does(
    pair: tuple[Any, Any], rule: str
) -> None:
    """As on a GPU, where what is stored in 16 bits is computed with in 16 bits and looked at by other kernels."""
    seen, losses = [], []
    for native in (False, True):
        model, dtype = copy.deepcopy(pair[0]), torch.bfloat16 if native else torch.float32
        opt = jf.MeZO(
            model, eps=0.03, **RULES[rule]
        )  # so long that the loss moves by more than bfloat16's rounding

        def loss(batch: Any, model: Any = model, dtype: torch.dtype = dtype) -> Tensor:
            logits = model(input_ids=batch["ids"]).logits
            assert logits.dtype == dtype
            predicted = logits[:, :-1].transpose(1, 2).float()
            return nn.functional.cross_entropy(predicted, batch["ids"][:, 1:], reduction="none").mean(1)  # fmt: skip

        for p in model.parameters():
            assert type(p) is Stored
            p._jf_dtype = dtype
        if native:
            for one in opt.weights._away.values():
                one.compiled, one.kernels = False, plain
        before = jf.fingerprint(model)
        step = opt.estimate(loss, batch_for(model))
        assert jf.fingerprint(model) == before
        opt.apply(step)
        assert jf.fingerprint(model) != before
        seen.append(step.projected_grads)
        losses.append(step.loss)
        assert opt.step(loss, batch_for(model)) == pytest.approx(step.loss, rel=0.1)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert seen[1] == pytest.approx(seen[0], abs=0.25)
    assert seen[1] != seen[0]


@pytest.mark.parametrize("rule", RULES)
def test_step_is_estimate_and_apply_and_a_log_is_the_model(rule: str, tmp_path: Path) -> None:
    base = make_model("llama", vocab_size=300).bfloat16()
    batch = batch_for(base)
    one, two, three = (copy.deepcopy(base) for _ in range(3))
    stepped = jf.MeZO(one, **RULES[rule], log=tmp_path / "log", weight_decay=0.01)
    apart = jf.MeZO(two, **RULES[rule], weight_decay=0.01)
    for _ in range(4):
        stepped.step(loss_of(one), batch)
        apart.apply(apart.estimate(loss_of(two), batch))
        assert jf.fingerprint(one) == jf.fingerprint(two)
    stepped.close()
    assert jf.fingerprint(one) != jf.fingerprint(base)
    assert jf.replay(three, tmp_path / "log") == 4
    assert jf.fingerprint(three) == jf.fingerprint(one)
    with pytest.raises(UserError, match=r"has dtype torch.bfloat16 in the log and torch.float32"):
        jf.replay(copy.deepcopy(base).float(), tmp_path / "log")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("estimator", ["weight", "activation"])
def test_a_thousand_looks_leave_no_trace(dtype: torch.dtype, estimator: str) -> None:
    model = nn.Sequential(nn.Linear(8, 30), nn.Tanh(), nn.Linear(30, 2)).to(dtype)
    x = reference.normal(0, 0, 0, 24).view(3, 8)

    def loss(batch: Tensor) -> Tensor:
        return model(batch).square().sum(1)

    opt = jf.MeZO(model, lr=1.0, rule="rms", estimator=estimator)
    for group in opt.param_groups:
        group["lr"] = 0.0
    before = jf.fingerprint(model)
    for _ in range(1000):
        opt.step(loss, x)
    assert jf.fingerprint(model) == before


def test_an_interrupted_look_is_taken_back() -> None:
    model = make_model("opt", vocab_size=300).bfloat16()
    opt = jf.MeZO(model, lr=1e-4)
    loss, batch = loss_of(model), batch_for(model)
    alone = loss(batch)
    calls = []

    def fails(batch: Any) -> Tensor:
        calls.append(loss(batch))
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return calls[0]

    with pytest.raises(RuntimeError, match="out of memory"):
        opt.step(fails, batch)
    assert not torch.equal(calls[0], calls[1])
    assert torch.equal(loss(batch), alone)


@pytest.mark.parametrize("slice_", [1, 100, 3000])
def test_a_large_matrix_is_widened_a_slice_at_a_time(
    slice_: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama", vocab_size=300).bfloat16()
    compute_model_wide(model)
    batch = batch_for(model)
    with torch.no_grad():
        whole = model(input_ids=batch["ids"]).logits
        monkeypatch.setattr(stored, "SLICE", slice_)
        parts = model(input_ids=batch["ids"]).logits
    assert torch.allclose(whole, parts, atol=1e-5)
    opt = jf.MeZO(model, lr=1e-4)
    small = opt.estimate(loss_of(model), batch).loss
    monkeypatch.undo()
    assert opt.estimate(loss_of(model), batch).loss == pytest.approx(small, abs=1e-5)


def test_what_a_parameter_says_and_does() -> None:
    linear = nn.Linear(3, 2).bfloat16()
    compute_wide(list(linear.parameters()))
    w: Any = linear.weight
    assert (w.dtype, w.detach().dtype, stored.stored_dtype(w)) == (
        torch.float32,
        torch.bfloat16,
        torch.bfloat16,
    )
    assert (w.shape, w.numel(), len(w), w.is_contiguous(), w.element_size()) == (
        (2, 3),
        6,
        2,
        True,
        2,
    )
    assert w.T.dtype == (w + 1).dtype == w[0].dtype == w.float().dtype == torch.float32
    assert torch.equal(torch.ones(1, 3) @ w.T, w.detach().float().sum(1)[None])
    for write in (
        w.zero_,
        lambda: w.add_(1.0),
        lambda: w.__setitem__(0, 1.0),
        lambda: nn.init.ones_(w),
        lambda: torch.add(torch.ones(2, 3), 1.0, out=w),
        lambda: torch._foreach_add_([linear.bias, w], 1.0),
    ):
        with pytest.raises(
            UserError, match=r"stored as torch.bfloat16 is written by .* write to its .data"
        ):
            write()
    before = w.detach().clone()
    for write in (
        w[0].zero_,
        lambda: w.view(-1).add_(1.0),
        lambda: w.T[0].__setitem__(0, 1.0),
        lambda: w.unbind()[1].mul_(2.0),
        lambda: torch.add(torch.ones(3), 1.0, out=w[0]),
    ):
        with pytest.raises(UserError, match=r"a part .* is written by .*write to the .* .data"):
            write()
    assert torch.equal(w.detach(), before)
    # what is no part of it is nobody else's
    for own in (w + 0, w[0] + 0, w[[0, 1]], w.float(), w.view(-1).clone(), w[0].tolist()):
        assert type(own) in (Tensor, list)
    w[torch.tensor([0, 1])].add_(1.0)
    part = pickle.loads(pickle.dumps(w.view(-1)))  # noqa: S301 - our own
    assert type(part) is Tensor
    assert torch.equal(part, w.detach().float().view(-1))
    w.data.add_(1.0)
    assert torch.equal(w.detach(), before + 1.0)
    again = copy.deepcopy(linear)
    assert type(again.weight) is Stored
    assert again.weight.data_ptr() != w.data_ptr()
    assert torch.equal(again.weight.detach(), w.detach())
    back = pickle.loads(pickle.dumps(w))  # noqa: S301 - our own
    assert (type(back), back.dtype) == (nn.Parameter, torch.bfloat16)
    assert linear.state_dict()["weight"].dtype == torch.bfloat16
    assert linear.float().weight.detach().dtype == torch.float32


@pytest.mark.parametrize("family", ["gaussian", "rank1"])
@pytest.mark.parametrize("token", [16, 1000, -1])
def test_a_token_that_the_table_has_no_row_for_is_named(token: int, family: str) -> None:
    """A look made rows of whatever lies beside the table."""
    table = nn.Embedding(16, 8).bfloat16()
    opt = jf.MeZO(table, family=family)
    assert opt.step(lambda: table(torch.empty(2, 0, dtype=torch.long)).sum()) == 0.0
    with pytest.raises(UserError, match=rf"of 16 rows is asked for row {token}: .* from 0 to 15"):
        opt.step(lambda: table(torch.tensor([[0, token, 15]])).square().mean())
    assert opt.step(lambda: table(torch.tensor([[0, 15]])).square().mean()) > 0.0


@pytest.mark.parametrize("dtype", HALVES)
def test_a_state_dict_is_loaded_into_what_is_stored(dtype: torch.dtype) -> None:
    """Whatever the type it comes in; also while a look is under way, which goes out from it."""
    net, other = nn.Linear(3, 2).to(dtype), nn.Linear(3, 2)
    opt = jf.MeZO(net, lr=1e-3, eps=1e-2)
    net.load_state_dict(other.state_dict())
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(stored.plain(p), q.detach().to(dtype))
    opt.weights.look(1, [1e-2], 1.0)
    net.load_state_dict({name: torch.zeros_like(x) for name, x in other.state_dict().items()})
    assert net.weight.detach().eq(0).all()
    assert (net.weight + 0.0).abs().max() > 0.0  # the look alone
    opt.weights.look(1, [1e-2], -1.0)
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        net.weight.copy_(other.weight)  # as of any parameter


def test_max_norm_is_refused_by_name() -> None:
    table = nn.Embedding(4, 2, max_norm=1.0).bfloat16()
    compute_wide(list(table.parameters()))
    with pytest.raises(UserError, match="max_norm moves its own weights"):
        table(torch.tensor([1]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_it_is_loaded_and_saved_as_what_it_is_stored_in(
    dtype: str, model_folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    model, tokenizer = load_model(model_folder, dtype=dtype)
    whole, _ = load_model(model_folder)
    kind = stored.FORMATS[dtype]
    for a, b in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a.detach(), b.detach().to(kind))
        b.data.copy_(b.detach().to(kind))
    ids = batch_for(model)["ids"]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, whole(input_ids=ids).logits)
    save_model(model, tokenizer, tmp_path / "saved")
    assert {t.dtype for t in load_file(tmp_path / "saved" / "model.safetensors").values()} == {kind}
    again, _ = load_model(tmp_path / "saved", dtype=dtype)
    assert jf.fingerprint(again) == jf.fingerprint(model)
    assert f'"dtype": "{dtype}"' in (tmp_path / "saved" / "config.json").read_text()


def test_numbers_beyond_float16_are_refused(model_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(model_folder)
    next(iter(model.parameters())).data[0] = 1e5
    save_model(model, tokenizer, tmp_path / "large")
    with pytest.raises(UserError, match=r"has numbers beyond 65504.*bfloat16"):
        load_model(tmp_path / "large", dtype="float16")
    load_model(tmp_path / "large", dtype="bfloat16")


@pytest.mark.parametrize("estimator", ["weight", "activation"])
def test_what_rounding_makes_of_a_look_is_told_from_its_slope(estimator: str) -> None:
    model = make_model("llama", vocab_size=300).bfloat16()
    opt = jf.MeZO(model, lr=1e-4, eps=1e-3, estimator=estimator)
    exact, batch, before = loss_of(model), batch_for(model), jf.fingerprint(model)
    signal, noise = opt.resolution(exact, batch)
    assert 0.0 < noise < signal / 100

    def coarse(batch: Any) -> Tensor:  # as a model would have it that computes in bfloat16
        found = exact(batch)
        return found + (torch.rand(len(found), generator=generator) - 0.5) * 2.0**-6

    generator = torch.Generator().manual_seed(0)
    signal, noise = opt.resolution(coarse, batch)
    assert noise > signal / 4

    def steps(
        batch: Any,
    ) -> Tensor:  # one that is rounded, and changes by whole steps or not at all
        return (exact(batch) * 64.0).round() / 64.0

    signal, noise = opt.resolution(steps, batch)
    assert noise > signal / 5 > 0.0  # shorter looks see nothing of it
    assert jf.fingerprint(model) == before
    assert [g["eps"] for g in opt.param_groups] == [1e-3]
    with pytest.raises(UserError, match="one-point looks are compared with the step before"):
        jf.MeZO(model, looks="one-point").resolution(exact, batch)


# ------------------------------------------------------------------------------------------ commands


@pytest.fixture
def config(tmp_path: Path, model_folder: Path, sentiment_csv: Path) -> TrainConfig:
    """The words are swapped, so that the model has everything to learn."""
    return small_run(
        model_folder,
        sentiment_csv,
        tmp_path / "run",
        max_forwards=40,
        eval_every=20,
        dtype="bfloat16",
    )


def go(config: TrainConfig) -> dict[str, Any]:
    return train(config, Progress(io.StringIO()))


@pytest.mark.parametrize(
    ("estimator", "tuner", "start"),
    [
        ("activation", "full", "base"),
        ("weight", "full", "base"),
        ("activation", "lora", "base"),
        ("activation", "prefix", "base"),
        ("activation", "full", "probe"),
        ("activation", "full", "deep"),
    ],
)
def test_a_run_is_stored_resumed_replayed_and_scored(
    config: TrainConfig, estimator: str, tuner: str, start: str, tmp_path: Path
) -> None:
    config = replace(config, estimator=estimator, tuner=tuner, start=start)  # type: ignore[arg-type]
    result = go(config)
    assert result["loss"] < result["before_loss"]
    half_way = replace(config, out=str(tmp_path / "parts"))
    go(replace(half_way, max_forwards=20, lr_schedule="constant"))
    rest = go(replace(half_way, max_forwards=40, lr_schedule="constant", resume=True))
    whole = go(replace(config, out=str(tmp_path / "whole"), lr_schedule="constant", keep="last"))
    assert rest["steps"] == whole["steps"]
    again = rebuild(
        ReplayConfig(config.out, str(tmp_path / "tuned"), threads=1), Progress(io.StringIO())
    )
    assert again["fingerprint"] == result["fingerprint"]
    scored = evaluate(EvalConfig(run=config.out, threads=1), Progress(io.StringIO()))
    assert (scored["loss"], scored["fingerprint"]) == (result["loss"], result["fingerprint"])
    if tuner == "full":
        saved = EvalConfig(model=str(tmp_path / "tuned"), data=config.data, template=config.template, labels=config.labels,
                           dtype="bfloat16", threads=1)  # fmt: skip
        assert evaluate(saved, Progress(io.StringIO()))["fingerprint"] == result["fingerprint"]


def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(
    config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(config, lr_schedule="constant", keep="last")
    whole = go(config)
    parts = replace(config, out=str(tmp_path / "parts"))
    go(replace(parts, max_forwards=22))
    assert go(replace(parts, resume=True))["fingerprint"] == whole["fingerprint"]
    with pytest.raises(UserError, match="dtype"):
        go(replace(parts, resume=True, dtype="float32"))
    with pytest.raises(
        UserError, match=r"--dtype is 'float16', and the run's weights are stored in bfloat16"
    ):
        evaluate(EvalConfig(run=config.out, dtype="float16"), Progress(io.StringIO()))


def test_what_16_bits_are_not_for_is_refused(config: TrainConfig) -> None:
    with pytest.raises(UserError, match="--dtype is 'bfloat16': what --quantize leaves"):
        resolved(replace(config, quantize="int8", tuner="lora"))
    options = {
        "model": config.model,
        "data": config.data,
        "template": config.template,
        "labels": config.labels,
    }
    with pytest.raises(UserError, match="AdamW's updates are too small for 16-bit weights"):
        run_baseline(
            BaselineConfig(method="first-order", dtype="bfloat16", **options),
            Progress(io.StringIO()),
        )
    found = run_baseline(
        BaselineConfig(method="zero-shot", dtype="bfloat16", **options), Progress(io.StringIO())
    )
    assert found["value"] == 0.0
    tuned = run_baseline(BaselineConfig(method="first-order", tuner="lora", max_steps=2, dtype="bfloat16", **options),
                     Progress(io.StringIO()))  # fmt: skip
    assert tuned["backwards"] == 2
