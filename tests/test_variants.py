"""Variants of the step: looks of other kinds, blocks, modified estimates; held to slow twins with z written out.

Reading order: a problem, looks, modified estimates, blocks, failures, resuming, refusals, command line. What all variants have in
common (no trace, replay, learning) is in the table of test_optim.
"""

from __future__ import annotations

import copy
import io
import math
import re
from collections.abc import Callable, Sequence
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

import justforward as jf
from conftest import make_model, materialise, small_run
from justforward import Blocks, MeZO, Modified, NonFiniteLoss, UserError, noise
from justforward.config import TrainConfig
from justforward.directions import FAMILIES, Weights
from justforward.evaluate import Scorer
from justforward.folder import RunFolder
from justforward.models import load_model
from justforward.modified import PROBE_LANE, SPREAD, relative, weight_sizes
from justforward.moves import Move
from justforward.optim import BLOCK_LANE
from justforward.outcome import Interrupted
from justforward.progress import Progress
from justforward.run import train as run_train
from justforward.settings import resolved
from justforward.trajectory import rounded
from justforward.variants import LOOKS, forwards_of, layer_of

# ------------------------------------------------------------------------------------------- a problem


class Net(nn.Module):
    """Names as a transformer has them: an embedding, two layers, a head; and something that the loss does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.norm = nn.LayerNorm(6)
        self.lm_head = nn.Linear(6, 3, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.lm_head(self.norm(x))


IDS = torch.arange(24) % 11
ANSWERS = IDS % 3
BATCH = {"ids": IDS, "answers": ANSWERS}


def net() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = Net()
        made.lm_head.weight.data *= 3.0
    return made.eval()


def loss_a_row(model: nn.Module, batch: dict[str, Tensor] = BATCH) -> Tensor:
    return F.cross_entropy(model(batch["ids"]), batch["answers"], reduction="none")


def closure_of(model: nn.Module, estimator: str = "weight") -> Callable[[], Tensor]:
    if estimator == "weight":
        return lambda: loss_a_row(model).mean()
    return lambda: loss_a_row(model)


class Twin:
    """The same weights in float64, moved by hand along z written out."""

    def __init__(self, model: nn.Module, optimizer: MeZO) -> None:
        self.model = copy.deepcopy(model).double()
        self.optimizer = optimizer
        self.weights = optimizer.weights
        self.tensors = [self.model.get_parameter(name).data for name in self.weights.names]

    def z(self, lane: int, step: int | None = None) -> list[Tensor]:
        step = self.optimizer.steps if step is None else step
        seed = noise.direction_seed(self.optimizer.seed, step, lane)
        return [materialise(self.weights, i, seed) for i in range(len(self.tensors))]

    @torch.no_grad()
    def loss(self, z: Sequence[Tensor] | None = None, lengths: Sequence[float] = (), row: int | None = None) -> float:  # fmt: skip
        """L(theta + lengths z), with a length for each tensor; of all rows or of one."""
        kept = [t.clone() for t in self.tensors]
        for t, direction, length in zip(self.tensors, z or [], lengths, strict=z is not None):
            t.add_(direction, alpha=length)
        losses = loss_a_row(self.model)
        for t, before in zip(self.tensors, kept, strict=True):
            t.copy_(before)
        return float(losses.mean() if row is None else losses[row])

    def gradient(self) -> list[Tensor]:
        loss = loss_a_row(self.model).mean()
        parameters = [self.model.get_parameter(name) for name in self.weights.names]
        return list(torch.autograd.grad(loss, parameters))

    def follow(self) -> None:
        """Stand where the optimizer's weights stand."""
        for mine, theirs in zip(self.tensors, self.weights.tensors, strict=True):
            mine.copy_(theirs.detach())

    def moved(self) -> list[Tensor]:
        """How far the optimizer has moved since."""
        pairs = zip(self.weights.tensors, self.tensors, strict=True)
        return [theirs.detach().double() - mine for theirs, mine in pairs]


def train(optimizer: MeZO, model: nn.Module, steps: int) -> list[float]:
    closure = closure_of(model, optimizer.estimator)
    return [optimizer.step(closure) for _ in range(steps)]


# ---------------------------------------------------------------------------------------------- looks


@pytest.mark.parametrize("looks", LOOKS)
@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_looks_in_weight_space_are_those_by_hand(family: str, samples: int, looks: str) -> None:
    model = net()
    eps, lr = 1e-2, 0.02
    optimizer = MeZO(model, lr=lr, eps=eps, family=family, num_samples=samples, looks=looks, seed=5)
    twin = Twin(model, optimizer)
    before = 0.0
    calls: list[int] = []

    def closure() -> Tensor:
        calls.append(1)
        return loss_a_row(model).mean()

    for index in range(5):
        twin.follow()
        ahead, rises = [], []
        for lane in range(samples):
            z = twin.z(lane)
            ahead.append(twin.loss(z, [eps] * len(z)))
            bases = {"two-sided": twin.loss(z, [-eps] * len(z)), "one-sided": twin.loss(),
                     "one-point": before if index else ahead[-1]}  # fmt: skip
            rises.append((ahead[-1] - bases[looks]) / (2 if looks == "two-sided" else 1))
        calls.clear()
        step = optimizer.estimate(closure)
        assert step.forwards == len(calls) == forwards_of(looks, samples)
        # a one-point step compares with a loss of 18 bits: 8e-6 of 2
        near = 2e-3 if looks == "one-point" else 2e-4
        assert list(step.projected_grads) == pytest.approx([r / eps for r in rises], abs=near)
        assert index == 0 or any(abs(r / eps) > 5e-3 for r in rises)
        wanted = [torch.zeros_like(t) for t in twin.tensors]
        for lane, grad in enumerate(step.projected_grads):
            for w, z in zip(wanted, twin.z(lane), strict=True):
                w.add_(z, alpha=-lr * grad / samples)
        optimizer.step(closure)
        for w, moved in zip(wanted, twin.moved(), strict=True):
            torch.testing.assert_close(moved, w, atol=1e-6, rtol=1e-5)
        before = sum(ahead) / samples


@pytest.mark.parametrize("two_calls", [False, True])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("with_batch", [False, True])
def test_one_sided_looks_of_rows_are_those_by_hand(
    with_batch: bool, samples: int, two_calls: bool
) -> None:
    model, eps = net(), 1e-2
    optimizer = MeZO(
        model, lr=0.02, eps=eps, estimator="activation", looks="one-sided", num_samples=samples, two_calls=two_calls
    )  # fmt: skip
    twin = Twin(model, optimizer)
    train(optimizer, model, 2)  # the rows have been checked and counted
    twin.follow()
    rows, wanted = len(IDS), []
    for lane in range(samples * rows):
        z = twin.z(lane)
        wanted.append((twin.loss(z, [eps] * len(z), lane % rows) - twin.loss(row=lane % rows)) / eps)  # fmt: skip
    seen: list[int] = []

    def loss_fn(batch: dict[str, Tensor]) -> Tensor:
        seen.append(len(batch["ids"]))
        return loss_a_row(model, batch)

    step = (
        optimizer.estimate(loss_fn, BATCH)
        if with_batch
        else optimizer.estimate(lambda: loss_fn(BATCH))
    )
    assert list(step.projected_grads) == pytest.approx(wanted, abs=1e-3)
    assert max(map(abs, wanted)) > 0.1
    assert sum(seen) == rows * (samples + 1)
    assert step.forwards == samples + 1


@pytest.mark.parametrize("looks", LOOKS)
def test_a_look_of_any_kind_is_unbiased(looks: str) -> None:
    """The mean of 2,500 estimates of a linear loss lies within four standard errors of its gradient."""
    weight = nn.Parameter(torch.zeros(4))
    slope = torch.tensor([1.0, -2.0, 0.5, 0.0])
    optimizer = MeZO([weight], lr=1e-3, eps=1e-2, looks=looks)
    optimizer.param_groups[0]["lr"] = 0.0  # the weights stay
    estimates = []
    for index in range(2500):
        step = optimizer.estimate(lambda: float(slope @ weight.detach()))
        z = materialise(optimizer.weights, 0, noise.direction_seed(0, index, 0))
        estimates.append(step.projected_grads[0] * z)
        optimizer.apply(step)
    every = torch.stack(estimates[1:])
    error = every.std(0) / math.sqrt(len(every))
    assert ((every.mean(0) - slope).abs() < 4 * error).all()
    assert (error < 0.12).all()


def test_the_first_one_point_step_does_not_move() -> None:
    model = net()
    optimizer = MeZO(model, lr=0.1, looks="one-point", num_samples=2)
    before = jf.fingerprint(model)
    train(optimizer, model, 1)
    assert jf.fingerprint(model) == before
    train(optimizer, model, 1)
    assert jf.fingerprint(model) != before


def test_a_one_point_step_compares_with_what_the_log_keeps(tmp_path: Path) -> None:
    model = net()
    optimizer = MeZO(model, lr=0.1, eps=0.01, looks="one-point", rule="rms", log=tmp_path / "log")
    closure = closure_of(model)
    loss = optimizer.step(closure)
    kept = optimizer.state_dict()["justforward"]["rule_state"]
    assert kept[-1] == rounded(loss) != loss
    step = optimizer.estimate(closure)
    assert step.projected_grads[0] == (step.loss - rounded(loss)) / 0.01
    optimizer.close()
    assert jf.read_log(tmp_path / "log").steps[0].rule_state == kept


# --------------------------------------------------------------------------------- modified estimates


def sizes_by_hand(modified: Modified, twin: Twin, eps: float) -> list[float]:
    """d of each group as the definition has it, in float64."""
    weights = twin.weights
    groups = range(len(twin.optimizer.param_groups))
    members = [[i for i, g in enumerate(weights.groups) if g == group] for group in groups]
    if modified.by == "weights":
        return [float(torch.cat([twin.tensors[i].flatten() for i in m]).square().mean().sqrt()) for m in members]  # fmt: skip
    if modified.by == "gradient":
        grads = twin.gradient()
        return [float(torch.cat([grads[i].flatten() for i in m]).norm()) for m in members]
    out = []
    for group, m in enumerate(members):
        squares = []
        for sample in range(modified.samples):
            z = twin.z(PROBE_LANE + group * modified.samples + sample)
            lengths = [eps if i in m else 0.0 for i in range(len(z))]
            rise = twin.loss(z, lengths) - twin.loss(z, [-length for length in lengths])
            squares.append((rise / (2 * eps)) ** 2)
        out.append(math.sqrt(sum(squares) / len(squares)))
    return out


@pytest.mark.parametrize("per", ["layer", "tensor"])
@pytest.mark.parametrize("by", ["weights", "looks", "gradient"])
@pytest.mark.parametrize("form", ["variance", "expectation"])
@pytest.mark.parametrize("looks", LOOKS)
def test_modified_steps_are_those_by_hand(looks: str, form: str, by: str, per: str) -> None:
    model = net()
    eps, lr = 1e-2, 0.01
    modified = Modified(form, by, per, every=2, samples=2)
    optimizer = MeZO(model, lr=lr, eps=eps, modified=modified, looks=looks, weight_decay=0.1)
    assert len(optimizer.param_groups) == (4 if per == "layer" else 8)
    twin = Twin(model, optimizer)
    before = 0.0
    norms: list[float] = []
    for index in range(4):
        twin.follow()
        measured = index % 2 == 0
        if measured:
            values = sizes_by_hand(modified, twin, eps)
            floor = SPREAD * max(values)
            norms = [max(v, floor) for v in values]
            norms = [v / min(norms) for v in norms]
        d = [norms[group] for group in optimizer.weights.groups]
        z = twin.z(0)
        ahead = twin.loss(z, [eps / x for x in d])
        bases = {"two-sided": twin.loss(z, [-eps / x for x in d]), "one-sided": twin.loss(),
                 "one-point": before if index else ahead}  # fmt: skip
        rise = (ahead - bases[looks]) / (2 if looks == "two-sided" else 1)
        step = optimizer.estimate(closure_of(model))
        assert list(step.norms) == pytest.approx(norms, rel=2e-2)
        assert min(step.norms) == 1.0
        assert max(step.norms) > 1.2
        assert step.projected_grads[0] == pytest.approx(rise / eps, abs=4e-3)
        extra = {"weights": 0, "looks": 4 * len(norms), "gradient": 3}[by] if measured else 0
        assert step.forwards == forwards_of(looks, 1) + extra
        optimizer.step(closure_of(model))
        gains = d if form == "variance" else [1.0] * len(d)
        for t, gain, direction, moved in zip(twin.tensors, gains, z, twin.moved(), strict=True):
            wanted = -lr * step.projected_grads[0] * gain * direction
            if t.dim() >= 2:
                wanted = wanted - lr * 0.1 * t
            torch.testing.assert_close(moved, wanted, atol=2e-6, rtol=2e-2)
        before = ahead


def test_the_variance_form_is_unbiased_and_the_expectation_form_normalises() -> None:
    """A linear loss: the means of 1,000 estimates are the gradient, and the gradient over its norms by tensor."""
    slopes = [torch.tensor([3.0, 0.0, -4.0]), torch.tensor([0.5, -0.5])]
    for form in ("variance", "expectation"):
        model = nn.ParameterList([nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))])
        modified = Modified(form, "gradient", "tensor")
        optimizer = MeZO(model, lr=1e-3, eps=1e-2, modified=modified)

        def loss(model: nn.ParameterList = model) -> Tensor:
            return sum((s * p).sum() for s, p in zip(slopes, model, strict=True))  # type: ignore[return-value]

        sums: list[list[Tensor]] = [[], []]
        for index in range(1000):
            step = optimizer.estimate(loss)
            assert step.norms == pytest.approx([5.0 / math.sqrt(0.5), 1.0], rel=1e-5)
            for i in range(2):
                z = materialise(optimizer.weights, i, noise.direction_seed(0, index, 0))
                sums[i].append(step.projected_grads[0] * step.scales[i] * z)
            optimizer.apply(replace(step, coefficients=(0.0,)))  # the weights stay
        for i, slope in enumerate(slopes):
            every = torch.stack(sums[i])
            wanted = slope if form == "variance" else slope / step.norms[i]
            error = every.std(0) / math.sqrt(len(every))
            assert ((every.mean(0) - wanted).abs() < 4 * error).all()
            assert (error < 0.3).all()


@given(st.lists(st.one_of(st.just(0.0), st.floats(1e-20, 1e20)), min_size=1, max_size=8))
@settings(max_examples=200)
def test_sizes_are_relative_to_the_smallest(values: list[float]) -> None:
    found = relative(values)
    assert len(found) == len(values)
    assert min(found) == 1.0
    assert max(found) <= 1.0001 / SPREAD
    assert all(rounded(x) == x for x in found)
    for a, x in zip(values, found, strict=True):
        for b, y in zip(values, found, strict=True):
            if a >= b:
                assert x >= y
                if b > SPREAD * max(values):
                    assert x / y == pytest.approx(a / b, rel=1e-4)


def test_sizes_of_weights_do_not_depend_on_how_they_are_cut() -> None:
    large = nn.Parameter(torch.randn(3 << 20, generator=torch.Generator().manual_seed(0)))
    weights = Weights([("large", large)], [0], FAMILIES["gaussian"], [1e-3])
    assert weight_sizes(weights) == pytest.approx(
        [float(large.detach().double().square().mean().sqrt())], rel=1e-9
    )


@pytest.mark.parametrize("estimator", ["weight", "activation"])
def test_measuring_leaves_the_weights_and_takes_directions_of_its_own(
    estimator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = net()
    modified = Modified("variance", "looks", every=2, samples=3)
    optimizer = MeZO(model, lr=1e-3, modified=modified, estimator=estimator)
    looked: set[int] = set()
    look = optimizer.weights.look

    def spy(seed: int, eps: Sequence[float], times: float) -> None:
        looked.add(seed)
        assert sum(e > 0.0 for e in eps) == (1 if seed in probes else 4)
        look(seed, eps, times)

    monkeypatch.setattr(optimizer.weights, "look", spy)
    for index in range(4):
        lanes = range(PROBE_LANE, PROBE_LANE + 3 * 4)
        probes = {noise.direction_seed(0, index, lane) for lane in lanes}
        looked.clear()
        before = jf.fingerprint(model)
        step = optimizer.estimate(closure_of(model, estimator))
        assert jf.fingerprint(model) == before
        assert all(p.grad is None for p in model.parameters())
        own = {noise.direction_seed(0, index, lane) for lane in range(len(step.coefficients))}
        assert not own & probes
        assert looked & probes == (probes if index % 2 == 0 else set())
        assert looked - probes == (own if estimator == "weight" else set())
        optimizer.apply(step)


def test_what_is_measured_once_stays() -> None:
    model = net()
    optimizer = MeZO(model, lr=0.05, modified=Modified(by="looks"))
    closure = closure_of(model)
    norms = set()
    for _ in range(4):
        step = optimizer.estimate(closure)
        norms.add(step.norms)
        optimizer.apply(step)
    assert len(norms) == 1


def test_a_group_keeps_its_own_lr_and_eps_when_it_is_split() -> None:
    model = net()
    groups = [{"params": model.layers.parameters(), "eps": 4e-3, "lr": 0.04},
              {"params": [model.embed.weight, model.lm_head.weight]}]  # fmt: skip
    optimizer = MeZO(groups, lr=0.01, eps=1e-3, model=model, modified=Modified())
    assert [(g["lr"], g["eps"]) for g in optimizer.param_groups] == [(0.04, 4e-3)] * 2 + [(0.01, 1e-3)] * 2  # fmt: skip
    step = optimizer.estimate(closure_of(model))
    # rate / largest rate x first eps / own eps x d
    wanted = [1.0, 1.0, 0.01 / 0.04 * 4.0, 0.01 / 0.04 * 4.0]
    assert step.scales == pytest.approx([w * d for w, d in zip(wanted, step.norms, strict=True)])


# --------------------------------------------------------------------------------------------- blocks


def test_norms_by_looks_do_not_depend_on_how_far_a_group_looks() -> None:
    found = []
    for eps in (1e-3, 4e-3):
        model = net()
        groups = [{"params": model.layers.parameters(), "eps": eps},
                  {"params": [model.embed.weight, model.lm_head.weight]}]  # fmt: skip
        optimizer = MeZO(groups, eps=1e-3, model=model, modified=Modified(by="looks", samples=2))
        found.append(optimizer.estimate(closure_of(model)).norms)
    assert found[0] == pytest.approx(found[1], rel=2e-2)
    assert max(found[0]) > 1.5


@pytest.mark.parametrize("order", ["cyclic", "random"])
@pytest.mark.parametrize("estimator", ["weight", "activation"])
@pytest.mark.parametrize("family", ["gaussian", "rademacher"])
def test_a_block_alone_looks_and_moves(family: str, estimator: str, order: str) -> None:
    model, eps, lr = net(), 1e-2, 0.01
    blocks = Blocks("layers", order)
    optimizer = MeZO(
        model, lr=lr, eps=eps, family=family, estimator=estimator, blocks=blocks, weight_decay=0.1, num_samples=2, seed=3
    )  # fmt: skip
    names = ["embeddings", "layers.0", "layers.1", "head"]
    assert [layer_of(name) for name in optimizer.weights.names] == [
        names[g] for g in optimizer.weights.groups
    ]
    twin = Twin(model, optimizer)
    turns = []
    rows = len(IDS) if estimator == "activation" else 1
    for index in range(8):
        turn = index % 4
        if order == "random":
            turn = noise.direction_seed(3, index, BLOCK_LANE) % 4
        turns.append(turn)
        twin.follow()
        lengths = [eps if g == turn else 0.0 for g in optimizer.weights.groups]
        step = optimizer.estimate(closure_of(model, estimator))
        assert step.scales == tuple(float(g == turn) for g in range(4))
        wanted = [torch.zeros_like(t) for t in twin.tensors]
        for lane in range(2 * rows):
            z = twin.z(lane)
            row = lane % rows if rows > 1 else None
            back = [-length for length in lengths]
            grad = (twin.loss(z, lengths, row) - twin.loss(z, back, row)) / (2 * eps)
            assert step.projected_grads[lane] == pytest.approx(grad, abs=1e-3)
            for w, direction, length in zip(wanted, z, lengths, strict=True):
                w.add_(direction, alpha=-lr * grad / (2 * rows) if length else 0.0)
        before = [t.detach().clone() for t in optimizer.weights.tensors]
        optimizer.step(closure_of(model, estimator))
        for i, (moved, w) in enumerate(zip(twin.moved(), wanted, strict=True)):
            if lengths[i]:
                decayed = lr * 0.1 * twin.tensors[i] if twin.tensors[i].dim() >= 2 else 0.0
                torch.testing.assert_close(moved, w - decayed, atol=2e-5, rtol=1e-2)
                assert moved.any()
            else:
                assert torch.equal(optimizer.weights.tensors[i], before[i])
    assert len(set(turns)) > 1


def test_a_random_order_takes_every_block_as_often() -> None:
    turns = np.array([noise.direction_seed(0, step, BLOCK_LANE) % 4 for step in range(2000)])
    counts = np.bincount(turns, minlength=4)
    assert ((counts - 500) ** 2 / 500).sum() < 16.3  # chi^2 with 3 degrees of freedom, p = 0.001
    assert 0.2 < (turns[1:] == turns[:-1]).mean() < 0.3  # and no turn depends on the one before


def test_resting_tensors_are_neither_read_nor_written(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    optimizer = MeZO(model, lr=0.01, blocks=Blocks(["layers", "."]))
    resting = {i for i, name in enumerate(optimizer.weights.names) if "layers" not in name}
    swept: set[int] = set()
    flat = optimizer.weights._flat

    def spy(i: int) -> Any:
        swept.add(i)
        return flat(i)

    monkeypatch.setattr(optimizer.weights, "_flat", spy)
    for turn in range(2):
        swept.clear()
        moving = {i for i, g in enumerate(optimizer.weights.groups) if g == turn}
        train(optimizer, model, 1)
        assert swept == moving
        assert swept == resting or not swept & resting


def test_only_parameters_of_the_block_intercept() -> None:
    model = net()
    optimizer = MeZO(model, lr=0.01, blocks=Blocks(), estimator="activation")
    for turn, wanted in enumerate(("embeddings", "layers.0", "layers.1", "head")):
        seen: list[set[str]] = []

        def closure(seen: list[set[str]] = seen) -> Tensor:
            seen.append({n for n, p in model.named_parameters() if type(p) is not nn.Parameter})
            return loss_a_row(model)

        optimizer.step(closure)
        own = {name for name in optimizer.weights.names if layer_of(name) == wanted}
        assert turn < 4
        assert [names for names in seen if names]
        assert all(names == own for names in seen if names)


def test_every_block_is_checked_for_rows_that_mix() -> None:
    model = net()

    def mixed(batch: dict[str, Tensor]) -> Tensor:
        """Rows meet before the head: the embeddings and layers reach other rows, the head does not."""
        x = model.embed(batch["ids"])
        return model.lm_head(model.norm(x.mean(0, keepdim=True).expand_as(x))).square().sum(-1)

    optimizer = MeZO(model, lr=1e-4, blocks=Blocks(["head|norm", "."]), estimator="activation")
    order = [optimizer.weights.names[optimizer.weights.groups.index(g)] for g in (0, 1)]
    assert order == ["embed.weight", "norm.weight"]
    with pytest.raises(UserError, match="the model mixes the rows"):
        optimizer.step(mixed, BATCH)
    later = MeZO(model, lr=1e-4, blocks=Blocks(["head|norm", "."]), estimator="activation")
    later.steps = 1
    later.step(mixed, BATCH)  # the head alone
    with pytest.raises(UserError, match="the model mixes the rows"):
        later.step(mixed, BATCH)


@pytest.mark.parametrize("architecture", ["opt", "gpt2", "llama", "bert", "roberta", "distilbert"])
def test_layers_of_real_models_are_found(architecture: str) -> None:
    model = make_model(architecture)
    labels = {layer_of(name) for name, _ in model.named_parameters()}
    layers = labels - {"embeddings", "head"}
    assert {"embeddings", "head"} <= labels
    assert sorted(re.findall(r"\d+$", layer)[0] for layer in layers) == ["0", "1"]
    embeddings = [n for n, _ in model.named_parameters() if layer_of(n) == "embeddings"]
    assert id(model.get_input_embeddings().weight) in {id(model.get_parameter(n)) for n in embeddings}  # fmt: skip
    optimizer = MeZO(model, lr=1e-4, blocks=Blocks())
    assert len(optimizer.param_groups) == 4


def test_a_block_needs_no_layer_number() -> None:
    assert [layer_of(n) for n in ("0.weight", "2.0.bias", "wte.weight", "shared.weight", "x")] == [
        "0", "2", "embeddings", "embeddings", "head",
    ]  # fmt: skip


@pytest.mark.parametrize("blocks", [Blocks("layers", "random"), Blocks(["1", "."])])
def test_any_number_of_threads_replays_blocks_to_the_same_bits(
    blocks: Blocks, tmp_path: Path
) -> None:
    base = nn.ParameterList(
        nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(i)))
        for i, shape in enumerate([(700, 500), (900, 600), (400, 300)])
    )
    model = nn.ModuleDict({"layers": base})
    start = copy.deepcopy(model)
    optimizer = MeZO(model, lr=0.1, blocks=blocks, log=tmp_path / "log", model=model)
    for _ in range(5):
        optimizer.step(lambda: float(sum(p.detach()[:9, :9].sum() for p in base)))
    optimizer.close()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        jf.replay(start, tmp_path / "log")
    finally:
        torch.set_num_threads(threads)
    assert jf.fingerprint(start) == jf.fingerprint(model)


def test_moves_of_different_groups_in_one_pass_are_the_same_bits() -> None:
    """What `Weights.update` leaves out for a group that rests is what changes nothing."""
    for family in FAMILIES.values():
        results = []
        for together in (False, True):
            tensors = [torch.linspace(-1, 1, 3000).view(60, 50), torch.linspace(0, 2, 1500), torch.ones(20, 80)]  # fmt: skip
            named = [(str(i), t.clone()) for i, t in enumerate(tensors)]
            weights = Weights(named, [0, 1, 2], family, [1e-3] * 3)
            moves = []
            for step in range(6):
                c = np.zeros((3, 2), np.float32)
                c[step % 3] = 1e-2 * (step + 1)
                decays = np.array([0.0, 0.0, 1e-2 if step == 1 else 0.0], np.float32)
                moves.append(Move(step, np.array([2 * step, 2 * step + 1], np.uint64), c, decays))
            for part in [moves] if together else [[move] for move in moves]:
                weights.update(part)
            results.append([t.clone() for t in weights.tensors])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ------------------------------------------------------------------------------------------- failures

VARIANTS: dict[str, dict[str, Any]] = {
    "one-sided": {"looks": "one-sided", "num_samples": 2},
    "one-point": {"looks": "one-point", "num_samples": 2, "rule": "rms+momentum"},
    "variance by looks": {"modified": Modified("variance", "looks", every=3)},
    "expectation by looks": {"modified": Modified("expectation", "looks", "tensor", 2, 2)},
    "variance by weights": {"modified": Modified(every=2), "rule": "momentum(0.5, window=4)"},
    "expectation by gradient": {"modified": Modified("expectation", "gradient", every=3)},
    "one-sided by looks": {"modified": Modified("variance", "looks", every=2), "looks": "one-sided"},
    "layers": {"blocks": Blocks()},
    "layers in random order": {"blocks": Blocks("layers", "random"), "rule": "rms", "looks": "one-sided"},
    "adam": {"modified": Modified(every=3), "rule": "adam"},
}  # fmt: skip
BOTH = [
    (name, estimator)
    for name in VARIANTS
    for estimator in ("weight", "activation")
    if (name, estimator) != ("one-point", "activation")
]


@pytest.mark.parametrize(("name", "estimator"), BOTH)
@pytest.mark.parametrize("failure", ["error", "nan"])
def test_a_failure_anywhere_leaves_every_bit_and_the_step_can_be_taken_again(
    failure: str, name: str, estimator: str
) -> None:
    model, twin = net(), net()
    options = {"lr": 1e-3, "estimator": estimator, "seed": 1, "weight_decay": 0.1, **VARIANTS[name]}
    optimizer, other = (MeZO(m, **options) for m in (model, twin))
    for o, m in ((optimizer, model), (other, twin)):
        train(o, m, 6)  # the next one measures, where something is measured
    good = closure_of(model, estimator)
    calls: list[int] = []

    def closure() -> Tensor:
        calls.append(1)
        losses = good()
        if len(calls) != at:
            return losses
        if failure == "error":
            raise OSError("in the closure")
        return losses * math.nan

    at = 0
    optimizer.estimate(closure)  # also makes sure that rows are apart, once
    calls.clear()
    optimizer.estimate(closure)
    total = len(calls)
    before, state = jf.fingerprint(model), str(optimizer.state_dict())
    for act in (optimizer.step, optimizer.estimate):
        for at in range(1, total + 1):  # noqa: B007 - the closure reads it
            calls.clear()
            with pytest.raises(OSError if failure == "error" else NonFiniteLoss):
                act(closure)
            assert jf.fingerprint(model) == before
            assert str(optimizer.state_dict()) == state
            assert {type(p) for p in model.parameters()} == {nn.Parameter}
    assert train(optimizer, model, 2) == train(other, twin, 2)
    assert jf.fingerprint(model) == jf.fingerprint(twin)


# ------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize(("name", "estimator"), BOTH)
def test_a_log_cut_anywhere_goes_on_to_the_same_bits(
    name: str, estimator: str, tmp_path: Path
) -> None:
    base, log = net(), tmp_path / "log"
    options = {"lr": 2e-3, "estimator": estimator, "weight_decay": 0.1, **VARIANTS[name]}
    whole = copy.deepcopy(base)
    optimizer = MeZO(whole, log=log, **options)
    sizes, losses = [log.stat().st_size], []
    for _ in range(7):
        losses += train(optimizer, whole, 1)
        sizes.append(log.stat().st_size)
    raw = log.read_bytes()
    optimizer.close()
    for steps in range(8):
        log.write_bytes(raw[: sizes[steps]])
        model = copy.deepcopy(base)
        resumed = MeZO(model, log=log, resume=True, **options)
        assert resumed.steps == steps
        assert train(resumed, model, 7 - steps) == losses[steps:]
        assert jf.fingerprint(model) == jf.fingerprint(whole)
        resumed.close()
        rebuilt = copy.deepcopy(base)
        assert jf.replay(rebuilt, log) == 7
        assert jf.fingerprint(rebuilt) == jf.fingerprint(whole)


@pytest.mark.parametrize(("name", "estimator"), BOTH)
def test_state_goes_on_to_the_same_bits(name: str, estimator: str) -> None:
    model = net()
    options = {"lr": 2e-3, "estimator": estimator, **VARIANTS[name]}
    optimizer = MeZO(model, **options)
    train(optimizer, model, 4)
    copied = copy.deepcopy(model)
    other = MeZO(copied, **options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(other, copied, 4) == train(optimizer, model, 4)
    assert jf.fingerprint(copied) == jf.fingerprint(model)


@pytest.mark.parametrize("options", [
    {"looks": "one-sided"}, {"modified": Modified()}, {"modified": Modified(every=3)}, {"blocks": Blocks()},
    {"blocks": Blocks(order="random")},
])  # fmt: skip
def test_another_variant_is_not_resumed(options: dict[str, Any], tmp_path: Path) -> None:
    others: list[dict[str, Any]] = [{}, {"looks": "one-sided"}, {"modified": Modified()}, {"blocks": Blocks()}]  # fmt: skip
    base = net()
    model = copy.deepcopy(base)
    optimizer = MeZO(model, log=tmp_path / "log", **options)
    train(optimizer, model, 1)
    state = optimizer.state_dict()
    optimizer.close()
    for other in others:
        if other != options:
            with pytest.raises(UserError, match=r"cannot be resumed: (settings|groups|tensors) "):
                MeZO(copy.deepcopy(base), log=tmp_path / "log", resume=True, **other)
            with pytest.raises(UserError, match=r"load_state_dict: the (settings|state)"):
                MeZO(copy.deepcopy(base), **other).load_state_dict(state)


def test_a_plain_log_says_what_it_always_said(tmp_path: Path) -> None:
    MeZO(net(), log=tmp_path / "log").close()
    assert jf.read_log(tmp_path / "log").header["settings"] == {"estimator": "weight"}


# ------------------------------------------------------------------------------------------- refusals

REFUSALS: list[tuple[Callable[[], Any], str]] = [
    (lambda: MeZO(net(), looks="both"), "looks is 'both': it must be one of two-sided, one-sided, one-point"),
    (lambda: MeZO(net(), looks="one-point", estimator="activation"), "choose 'one-sided', or estimator 'weight'"),
    (lambda: MeZO(net(), blocks=Blocks(), modified=Modified()), "blocks and modified are both given: choose one"),
    (lambda: MeZO(net(), blocks=Blocks(), rule="momentum"), r"blocks with rule 'momentum\(.*past directions"),
    (lambda: MeZO(net(), blocks=Blocks(), rule="rms+adam"), r"blocks with rule 'rms.*past directions"),
    (lambda: MeZO(net(), blocks="layers"), "blocks is 'layers': it must be a justforward.Blocks"),
    (lambda: MeZO(net(), modified="variance"), "modified is 'variance': it must be a justforward.Modified"),
    (lambda: MeZO(net().lm_head, blocks=Blocks()), "all parameters are in one block, 'head'"),
    (lambda: MeZO(net().parameters(), blocks=Blocks()), "all parameters are in one block, 'head'"),
    (lambda: MeZO(net().lm_head, modified=Modified()), "there is one layer only, 'head': leave modified out"),
    (lambda: MeZO(net(), blocks=Blocks(["layers", "norm"])), r"none of the patterns 'layers', 'norm' finds parameter embed.weight"),
    (lambda: MeZO(net(), blocks=Blocks([".", "layers"])), "the pattern 'layers' finds no parameter that those before it leave"),
    (lambda: Blocks("layer"), 'by is \'layer\': it must be "layers" or a list of regular expressions'),
    (lambda: Blocks(["("]), r"blocks: '\(' is not a regular expression"),
    (lambda: Blocks(order="last"), "order is 'last': it must be one of cyclic, random"),
    (lambda: Modified("mean"), "form is 'mean': it must be one of variance, expectation"),
    (lambda: Modified(by="size"), "by is 'size': it must be one of weights, looks, gradient"),
    (lambda: Modified(per="row"), "per is 'row': it must be one of layer, tensor"),
    (lambda: Modified(every=0), "every is 0: it must be a whole number, 1 to 1000000"),
    (lambda: Modified(samples=None), "samples is None: it must be a whole number"),
    (lambda: Modified(samples=True), "samples is True: it must be a whole number"),
    (lambda: Modified.parse("variance(by=looks, by=weights)"), r"modified is .*: it must be variance or expectation, with"),
    (lambda: Modified.parse("variance(1, 2, 3, 4, 5)"), "it must be variance or expectation, with parameters"),
    (lambda: Modified.parse("variance(size=3)"), "it must be variance or expectation, with parameters"),
    (lambda: Modified.parse(""), "it must be variance or expectation, with parameters"),
    (lambda: Modified.parse("variance(every=often)"), "every is 'often': it must be a whole number"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "said"), REFUSALS)
def test_what_cannot_be_used_is_named(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("result", "said"),
    [(lambda loss: loss.item(), "returned a float"), (lambda loss: loss.detach(), r"a tensor \[\]")],
)  # fmt: skip
def test_a_loss_without_a_gradient_is_refused_where_one_is_measured(
    result: Callable[[Tensor], Any], said: str
) -> None:
    model = net()
    optimizer = MeZO(model, modified=Modified(by="gradient"))
    before = jf.fingerprint(model)
    with pytest.raises(UserError, match=f"{said} that torch cannot differentiate"):
        optimizer.step(lambda: result(loss_a_row(model).mean()))
    assert jf.fingerprint(model) == before
    assert torch.is_grad_enabled()


def test_settings_are_read_as_they_are_spelled() -> None:
    assert Modified.parse("variance") == Modified()
    assert Modified.parse(" expectation( looks , tensor, every=100, samples = 4 )") == Modified(
        "expectation", "looks", "tensor", 100, 4
    )
    assert Blocks.parse("layers", "random") == Blocks("layers", "random")
    assert Blocks.parse("embed .") == Blocks(["embed", "."])


# --------------------------------------------------------------------------------------- command line


@pytest.fixture
def config(tmp_path: Path, model_folder: Path, sentiment_csv: Path) -> TrainConfig:
    return small_run(
        model_folder, sentiment_csv, tmp_path / "run", max_forwards=40, eval_every=10, lr=1e-3
    )


RUNS: dict[str, dict[str, Any]] = {
    "one-sided": {"looks": "one-sided", "num_samples": 3, "sample_schedule": "linear"},
    "one-point": {"looks": "one-point", "estimator": "weight", "num_samples": 2},
    "variance": {"modified": "variance(looks, every=4)"},
    "expectation": {"modified": "expectation(gradient, tensor, every=5)", "estimator": "weight"},
    "layers": {"blocks": "layers", "block_order": "random"},
    "patterns": {"blocks": "attn .", "looks": "one-sided", "estimator": "weight"},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_counts_its_forwards_and_goes_on_to_the_same_bits(
    name: str, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, **RUNS[name], backoff=False)  # a new optimizer would check rows again
    backward = "gradient" in (config.modified or "")
    rows = [0.0]
    stop = [math.inf]
    scores = Scorer.loss_of

    def counted(self: Scorer, batch: dict[str, Any]) -> Tensor:
        if rows[0] >= stop[0]:
            stop[0] = math.inf
            raise KeyboardInterrupt
        rows[0] += len(batch["label"]) / 8 * (3 if torch.is_grad_enabled() else 1)
        return scores(self, batch)

    monkeypatch.setattr(Scorer, "loss_of", counted)
    result = run_train(config, Progress(io.StringIO()))
    checks = (
        0 if config.estimator == "weight" else 2
    )  # the first step makes sure that rows are apart
    if config.blocks:
        checks = None  # and each block's first
    assert (config.max_forwards - 15 if backward or config.modified else 35) <= result["forwards"] <= 40  # fmt: skip
    if checks is not None:
        assert rows[0] == result["forwards"] + 2 * checks
    other = replace(config, out=config.out + "2")
    rows[0], stop[0] = 0, rows[0] / 2
    with pytest.raises(Interrupted):
        run_train(other, Progress(io.StringIO()))
    resumed = run_train(replace(other, resume=True), Progress(io.StringIO()))
    assert resumed["fingerprint"] == result["fingerprint"]
    assert (resumed["steps"], resumed["forwards"]) == (result["steps"], result["forwards"])
    model, _ = load_model(config.model)
    jf.replay(model, RunFolder(other.out).log, result["kept_step"])
    assert jf.fingerprint(model) == result["fingerprint"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"looks": "sideways"}, "--looks is 'sideways': it must be one of two-sided, one-sided, one-point"),
        ({"looks": "one-point"}, "choose 'one-sided', or estimator 'weight'"),
        ({"looks": "one-sided", "max_forwards": 1}, "--max-forwards is 1: one step takes 2 forwards"),
        ({"blocks": "layers", "modified": "variance"}, "blocks and modified are both given"),
        ({"blocks": "layers", "rule": "momentum"}, "past directions are of blocks that rest"),
        ({"blocks": "(", }, "is not a regular expression"),
        ({"block_order": "random"}, "--block-order is 'random': it is for --blocks: leave it out"),
        ({"modified": "size"}, "modified: form is 'size'"),
        ({"modified": "variance(gradient)", "objective": "accuracy"}, "accuracy has no gradient"),
        ({"blocks": "nothing ."}, "the pattern 'nothing' finds no parameter"),
        ({"modified": "variance(looks, samples=9)"}, "the first step takes 74 forwards, with what it measures of 4 parts"),
    ],
)  # fmt: skip
def test_a_run_that_cannot_be_is_refused_and_leaves_nothing(
    values: dict[str, Any], said: str, config: TrainConfig
) -> None:
    config = replace(config, **values)
    if said.startswith("--") or not re.search("parts|pattern", said):
        with pytest.raises(UserError, match=said):
            resolved(config)
    with pytest.raises(UserError, match=said):
        run_train(config, Progress(io.StringIO()))
    assert not Path(config.out).exists()
