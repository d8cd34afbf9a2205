"""AdamW with backpropagation: the stated update, the stated rows, the step that validation chose.

Reading order: one step, learning, choosing, limits, checkpointing, what is refused.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import ARCHITECTURES, MASKED, make_model, make_tokenizer
from justforward import first_order, tuners
from justforward.config import TrainConfig
from justforward.data import Example, batches
from justforward.errors import UserError
from justforward.evaluate import Evaluation, Scorer
from justforward.first_order import Settings, checkpointable, checkpointed, tune
from justforward.prepare import Stop, choose_tuned
from justforward.progress import Progress
from justforward.tasks import Task

TOKENIZER = {"opt": "metaspace", "gpt2": "bytelevel", "llama": "metaspace", **MASKED}
# The words are swapped, so that the model has everything to learn.
WORDS = {"neg": "great", "pos": "terrible"}
ROWS = [
    Example(
        {"text": f"film {i} was {('bad, dull', 'good, great')[i % 2]}"},
        ("neg", "pos")[i % 2],
        "rows.csv",
        i + 2,
    )
    for i in range(24)
]
TRAIN, VALIDATION = ROWS[:16], ROWS[16:]


def scorer_for(architecture: str, tuner: Any = "full", **values: Any) -> Scorer:
    template = "{text} It was {mask}." if architecture in MASKED else "{text} It was"
    tokenizer, model = make_tokenizer(TOKENIZER[architecture]), make_model(architecture)
    config = TrainConfig("m", "d.csv", "out", template=template, labels=WORDS, tuner=tuner)
    model = tuners.attach(model, tokenizer, config)
    choose_tuned(model, None)
    return Scorer(model, tokenizer, Task(template, WORDS, **values))


def go(scorer: Scorer, stop: Stop | None = None, **values: Any) -> first_order.Tuned:
    base: dict[str, Any] = {"lr": 1e-2, "max_steps": 8, "eval_every": 4, "batch_size": 4}
    settings = Settings(**{**base, **values})
    return tune(scorer, TRAIN, VALIDATION, settings, Progress(io.StringIO()), stop)


def weights_of(scorer: Scorer, tuned: bool = True) -> dict[str, Tensor]:
    named = scorer.model.named_parameters()
    return {name: p.detach().clone() for name, p in named if p.requires_grad == tuned}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------------- one step


def test_the_updates_by_hand() -> None:
    """Adam's own formulas in float64, on the rows that `batches` deals, decayed linearly, clipped."""
    scorer = scorer_for("gpt2")
    slow = copy.deepcopy(scorer)
    go(scorer, lr=3e-3, max_steps=3, eval_every=3, seed=5)
    weights = [p for p in slow.model.parameters() if p.requires_grad]
    theta = [p.detach().double().clone() for p in weights]
    m, v = ([torch.zeros_like(t) for t in theta] for _ in range(2))
    least = [torch.full_like(t, math.inf) for t in theta]
    clipped = False
    for step in range(3):
        rows = [TRAIN[row] for row in batches(len(TRAIN), 4, 5, step)]
        loss = slow.loss_of(slow.encode(rows)).mean()
        gradients = [g.double() for g in torch.autograd.grad(loss, weights)]
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        clipped |= norm > 1
        for t, g, first, second, small in zip(theta, gradients, m, v, least, strict=True):
            small.copy_(torch.minimum(small, g.abs()))
            g = g * min(1.0, 1.0 / norm)
            first.mul_(0.9).add_(g, alpha=0.1)
            second.mul_(0.999).add_(g * g, alpha=0.001)
            up, down = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
            t -= 3e-3 * (1 - step / 3) * up / (down.sqrt() + 1e-8)
        with torch.no_grad():
            for p, t in zip(weights, theta, strict=True):
                p.copy_(t)
    assert clipped
    compared = 0
    for p, t, small in zip(scorer.model.parameters(), theta, least, strict=True):
        # a gradient that is rounding error alone, as of the keys' biases, is moved by its sign
        clear = small > 1e-5
        torch.testing.assert_close(p.double()[clear], t[clear], atol=2e-6, rtol=1e-5)
        compared += int(clear.sum())
    assert compared > 1000


@pytest.mark.parametrize("kind", ["choices", "vocabulary"])
def test_the_loss_is_the_task_s(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = scorer_for("opt", loss=kind)
    before = scorer.evaluate([TRAIN[row] for row in batches(len(TRAIN), 4, 0, 0)], 4).loss
    shown: list[float] = []
    monkeypatch.setattr(Progress, "step", lambda self, forwards, loss: shown.append(loss))
    go(scorer, max_steps=1)
    assert shown == [pytest.approx(before, rel=1e-5)]


# ------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MASKED])
def test_it_learns(architecture: str) -> None:
    scorer = scorer_for(architecture)
    before = scorer.evaluate(VALIDATION, 8)
    found = go(scorer, max_steps=40, eval_every=20, lr=3e-3)
    after = scorer.evaluate(VALIDATION, 8)
    assert after.loss < 0.8 * before.loss
    assert after.accuracy >= 0.75
    assert (found.best["value"], found.best["loss"]) == (after.value, after.loss)
    assert [m["step"] for m in found.curve] == [0, 20, 40]
    assert found.curve[0]["loss"] == before.loss


@pytest.mark.parametrize("tuner", ["lora", "prefix", "head"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_only_what_is_tuned_moves(
    architecture: str, tuner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = scorer_for(architecture, tuner)
    tuned, rest = weights_of(scorer), weights_of(scorer, tuned=False)
    assert rest
    monkeypatch.setattr(first_order, "best_step", lambda curve, steps: curve[-1])
    found = go(scorer, max_steps=20, eval_every=20, lr=3e-2)
    assert found.curve[-1]["loss"] < found.curve[0]["loss"] - 0.01
    assert equal(rest, weights_of(scorer, tuned=False))
    assert not any(torch.equal(a, b) for a, b in zip(tuned.values(), weights_of(scorer).values(), strict=True))  # fmt: skip


def test_dropout_is_off_and_the_mode_as_before() -> None:
    plain, dropping = scorer_for("gpt2"), scorer_for("gpt2")
    for module in dropping.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    dropping.model.train()
    go(plain)
    go(dropping)
    assert equal(weights_of(plain), weights_of(dropping))
    assert dropping.model.training
    assert not plain.model.training


# ------------------------------------------------------------------------------------------- choosing


def scripted(
    monkeypatch: pytest.MonkeyPatch, values: Sequence[tuple[float, float]]
) -> list[dict[str, Tensor]]:
    """Make the validations come out as (value, loss); returns the weights at each."""
    seen: list[dict[str, Tensor]] = []

    def evaluate(self: Scorer, rows: Sequence[Example], batch_size: int) -> Evaluation:
        assert rows is VALIDATION
        seen.append(weights_of(self))
        value, loss = values[len(seen) - 1]
        return Evaluation(0.5, loss, [], len(rows), 1, "f1", value, {"f1": value})

    monkeypatch.setattr(Scorer, "evaluate", evaluate)
    return seen


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ([(0.5, 9.0), (0.9, 1.0), (0.6, 0.1)], 1),  # value before loss
        ([(0.5, 0.1), (0.5, 0.3), (0.5, 0.2)], 0),  # then loss; nothing learned is a step too
        ([(0.1, 1.0), (0.5, 0.3), (0.5, 0.3)], 1),  # then the earliest
        ([(0.1, 1.0), (0.2, 0.3), (0.5, 0.3)], 2),
        ([(0.3, 1.0), (0.2, 1.0), (0.1, 1.0)], 0),
    ],
)
def test_the_step_that_validation_chose(
    monkeypatch: pytest.MonkeyPatch, values: list[tuple[float, float]], best: int
) -> None:
    scorer = scorer_for("gpt2")
    seen = scripted(monkeypatch, values)
    found = go(scorer)
    assert len(seen) == 3
    assert [m["step"] for m in found.curve] == [0, 4, 8]
    assert found.best is found.curve[best]
    assert equal(weights_of(scorer), seen[best])
    assert not equal(seen[0], seen[1])
    assert not equal(seen[1], seen[2])


def test_what_is_kept_is_what_is_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = scorer_for("gpt2", "lora")
    seen = scripted(monkeypatch, [(0.1, 1.0), (0.9, 1.0), (0.2, 1.0)])
    kept: list[dict[str, Tensor]] = []
    keep = first_order._Run._keep

    def watched(self: first_order._Run) -> None:
        keep(self)
        kept.append(self.kept)

    monkeypatch.setattr(first_order._Run, "_keep", watched)
    go(scorer)
    assert len(kept) == 2
    assert kept[0].keys() == weights_of(scorer).keys()
    assert all(tensor.device.type == "cpu" for tensor in kept[0].values())
    assert equal(weights_of(scorer), seen[1])


# --------------------------------------------------------------------------------------------- limits


def test_when_it_validates_and_what_it_counts() -> None:
    found = go(scorer_for("gpt2"), max_steps=10, eval_every=4)
    assert [(m["step"], m["forwards"], m["backwards"]) for m in found.curve] == [
        (0, 0, 0), (4, 4, 4), (8, 8, 8), (10, 10, 10),
    ]  # fmt: skip
    assert found.curve[0].keys() == {
        "kind", "step", "forwards", "backwards", "seconds", "accuracy", "loss", "value",
    }  # fmt: skip
    times = [m["seconds"] for m in found.curve]
    assert times == sorted(times)
    assert 0 < found.train_seconds <= times[-1]
    assert (found.steps, found.stopped_by) == (10, "max_steps")


def test_time_is_up() -> None:
    scorer = scorer_for("gpt2")
    before = weights_of(scorer)
    found = go(scorer, until=time.monotonic())
    assert (found.steps, found.stopped_by, found.best["step"]) == (0, "max_minutes", 0)
    assert equal(before, weights_of(scorer))
    found = go(scorer, until=time.monotonic() + 0.5, max_steps=10**6, eval_every=10**6)
    assert 0 < found.steps < 10**5
    assert found.stopped_by == "max_minutes"
    assert [m["step"] for m in found.curve] == [0, found.steps]


def test_a_signal_is_heard_between_steps() -> None:
    stop = Stop()
    stop.asked = True
    with pytest.raises(KeyboardInterrupt):
        go(scorer_for("gpt2"), stop)


# -------------------------------------------------------------------------------------- checkpointing


def saved_bytes(run: Callable[[], Any]) -> int:
    """Of the tensors that a graph keeps for the way back, each storage once."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(sizes.values())


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MASKED])
def test_checkpointing_changes_memory_and_nothing_else(architecture: str) -> None:
    plain, checked = scorer_for(architecture), scorer_for(architecture)
    go(plain)
    found = go(checked, checkpointing=True)
    assert [(m["forwards"], m["backwards"]) for m in found.curve] == [(0, 0), (8, 4), (16, 8)]
    for a, b in zip(weights_of(plain).values(), weights_of(checked).values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    batch = plain.encode(TRAIN)
    layers = checkpointable(plain.model)
    assert len(layers) == 2
    usual = saved_bytes(lambda: plain.loss_of(batch))
    with checkpointed(layers):
        less = saved_bytes(lambda: plain.loss_of(batch))
    assert less < 0.8 * usual
    assert saved_bytes(lambda: plain.loss_of(batch)) == usual


def test_layers_are_themselves_again_after_an_error() -> None:
    scorer = scorer_for("gpt2")
    layers = checkpointable(scorer.model)
    with contextlib.suppress(KeyboardInterrupt), checkpointed(layers):
        assert all("forward" in vars(layer) for layer in layers)
        raise KeyboardInterrupt
    assert not any("forward" in vars(layer) for layer in layers)


def test_checkpointing_of_lora_works_and_of_a_prefix_is_refused() -> None:
    plain, checked = scorer_for("llama", "lora"), scorer_for("llama", "lora")
    go(plain)
    go(checked, checkpointing=True)
    for a, b in zip(weights_of(plain).values(), weights_of(checked).values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    with pytest.raises(UserError, match="leave it out with --tuner prefix"):
        go(scorer_for("llama", "prefix"), checkpointing=True)


# --------------------------------------------------------------------------------------------- refused


def test_a_loss_that_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = scorer_for("gpt2")
    loss_of, calls = Scorer.loss_of, [0]

    def broken(self: Scorer, batch: Any) -> Tensor:
        losses = loss_of(self, batch)
        if losses.requires_grad:
            calls[0] += 1
            if calls[0] == 3:
                losses = losses * torch.tensor([1.0, math.nan, 1.0, 1.0])
        return losses

    monkeypatch.setattr(Scorer, "loss_of", broken)
    line = TRAIN[batches(len(TRAIN), 4, 0, 2)[1]].line
    with pytest.raises(
        UserError, match=rf"^step 2: the loss of rows\.csv:{line} is nan: lower --lr"
    ):
        go(scorer)


def test_a_gradient_that_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = scorer_for("gpt2")
    loss_of = Scorer.loss_of

    def steep(self: Scorer, batch: Any) -> Tensor:  # sqrt at 0: a value, and no slope
        return loss_of(self, batch) + (0 * loss_of(self, batch)).sqrt()

    monkeypatch.setattr(Scorer, "loss_of", steep)
    with pytest.raises(
        UserError, match=r"^step 0: the gradient's norm is nan: lower --lr.*rows\.csv"
    ):
        go(scorer)


def test_weights_that_run_away_are_noticed_in_validation() -> None:
    scorer = scorer_for("gpt2")
    with pytest.raises(UserError, match=r"^step [1-4]: .*lower --lr"):
        go(scorer, lr=1e3, max_steps=4, eval_every=1)
    with pytest.raises(UserError, match=r"^--lr is 1001: .*give at most 1000"):
        go(scorer, lr=1001.0)


def test_nothing_to_tune() -> None:
    scorer = scorer_for("gpt2")
    scorer.model.requires_grad_(False)
    with pytest.raises(UserError, match="no parameter has requires_grad"):
        go(scorer)
    scorer.model.requires_grad_(True)
    whole: Any = scorer.model
    whole.transformer.h = torch.nn.ModuleList()
    with pytest.raises(UserError, match="a gpt2 model has no layers that can be run again"):
        go(scorer, checkpointing=True)
