"""Activation space, held to perturbing the weights of each example by hand with z = a b^T written out.

Reading order: models, what a look must give, modules of every kind, what is refused, what is left behind.
"""

from __future__ import annotations

import copy
import re
import signal
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import BatchEncoding

import justforward as jf
from conftest import CONTEXT, MASKED, SEQ2SEQ, make_model, make_tokenizer, materialise
from justforward import NonFiniteLoss, UserError, causal, noise
from justforward.activations import Look, among, looking, repeat_rows
from justforward.data import Example
from justforward.directions import FAMILIES, Weights
from justforward.estimators import AHEAD, BEHIND, RowLooks, Seen, Site
from justforward.evaluate import Scorer
from justforward.interrupts import Shield
from justforward.tasks import Task

Batch = dict[str, Tensor]
LossFn = Callable[[Any, Batch], Tensor]
EPS = 1e-2
ROWS = 3


# --------------------------------------------------------------------------------------------- models


def roberta(kind: str) -> Any:
    from transformers import RobertaConfig, RobertaForMaskedLM, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=96,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
        pad_token_id=1,
    )
    kinds: dict[str, Any] = {
        "masked": RobertaForMaskedLM,
        "classifier": RobertaForSequenceClassification,
    }
    return kinds[kind](config).eval()


def pegasus() -> Any:
    """Its positions are looked up as [L], without an axis for rows."""
    from transformers import PegasusConfig, PegasusForConditionalGeneration

    return PegasusForConditionalGeneration(
        PegasusConfig(
            vocab_size=96,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_position_embeddings=CONTEXT,
            init_std=0.2,
        )
    ).eval()


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=96,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=3,
            max_position_embeddings=CONTEXT,
        )
    ).eval()


def untied(model: Any) -> Any:
    model.get_output_embeddings().weight = nn.Parameter(
        model.get_output_embeddings().weight.detach().clone()
    )
    return model


def tied(model: Any) -> Any:
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    return model


def token_loss(model: Any, batch: Batch) -> Tensor:
    """Next-token cross-entropy, the mean over each row's own tokens."""
    arguments = {k: v for k, v in batch.items() if k != "label"}
    logits = model(**arguments).logits[:, :-1]
    losses = F.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
    mask = batch["attention_mask"][:, 1:]
    return (losses * mask).sum(1) / mask.sum(1)


def answer_loss(model: Any, batch: Batch) -> Tensor:
    """Cross-entropy of the text itself as the decoder's answer, as one trains an encoder-decoder."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    shown = torch.cat([torch.zeros_like(ids[:, :1]), ids[:, :-1]], dim=1)
    logits = model(input_ids=ids, attention_mask=mask, decoder_input_ids=shown).logits
    losses = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
    return (losses * mask).sum(1) / mask.sum(1)


def class_loss(model: Any, batch: Batch) -> Tensor:
    arguments = {k: v for k, v in batch.items() if k != "label"}
    return F.cross_entropy(model(**arguments).logits, batch["label"], reduction="none")


def token_batch(rows: int = ROWS, length: int = 7) -> Batch:
    """Rows of different lengths, padded on the right."""
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(3, 96, (rows, length), generator=generator)
    mask = (torch.arange(length) < length - torch.arange(rows)[:, None] % 3).long()
    return {
        "input_ids": torch.where(mask.bool(), ids, 1),
        "attention_mask": mask,
        "label": torch.arange(rows) % 2,
    }


MODELS: dict[str, tuple[Callable[[], Any], LossFn]] = {
    "opt": (lambda: make_model("opt", vocab_size=96), token_loss),
    "opt untied": (lambda: untied(make_model("opt", vocab_size=96)), token_loss),
    "gpt2": (lambda: make_model("gpt2", vocab_size=96), token_loss),
    "gpt2 untied": (lambda: untied(make_model("gpt2", vocab_size=96)), token_loss),
    "llama": (lambda: make_model("llama", vocab_size=96), token_loss),
    "llama tied": (lambda: tied(make_model("llama", vocab_size=96)), token_loss),
    "roberta masked": (lambda: roberta("masked"), token_loss),
    "bert masked": (lambda: make_model("bert", vocab_size=96), token_loss),
    "bert masked untied": (lambda: untied(make_model("bert", vocab_size=96)), token_loss),
    "distilbert masked": (lambda: make_model("distilbert", vocab_size=96), token_loss),
    "t5": (lambda: make_model("t5", vocab_size=96), answer_loss),
    "t5 untied": (lambda: untied(make_model("t5", vocab_size=96)), answer_loss),
    "bart": (lambda: make_model("bart", vocab_size=96), answer_loss),
    "pegasus": (pegasus, answer_loss),
    "roberta classifier": (lambda: roberta("classifier"), class_loss),
}


def build(name: str) -> tuple[Any, LossFn]:
    make, loss_fn = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return stirred(make()), loss_fn


@torch.no_grad()
def stirred(model: Any) -> Any:
    """Norm scales that are not all one and biases that are not all zero."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


# --------------------------------------------------------------------------- what a look must give


def seed_of(lane: int) -> int:
    return noise.direction_seed(5, 0, lane)


def weights_of(
    model: nn.Module, family: str = "rank1", groups: Sequence[int] | None = None, eps: Sequence[float] = (EPS,)
) -> Weights:  # fmt: skip
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return Weights(named, groups or [0] * len(named), FAMILIES[family], eps)


@torch.no_grad()
def looked(
    weights: Weights, closure: Any, batch: Any, *, eps: Sequence[float] = (EPS,), samples: int = 1,
    two_calls: bool = False, check: bool = True,
) -> Tensor:  # fmt: skip
    """Losses [samples * rows, 2] at +eps and -eps, as the estimator sees them."""
    site = Site(weights, 0, seed_of, eps, Shield())
    seen, _ = RowLooks(two_calls, check).look(site, closure, batch, samples)
    return pairs(seen)


def pairs(seen: Seen) -> Tensor:
    """Losses [samples * rows, 2] at +eps and -eps."""
    both = zip(seen.losses[AHEAD], seen.losses[BEHIND], strict=True)
    return torch.tensor(list(both), dtype=torch.float64)


@torch.no_grad()
def by_hand(
    model: Any, weights: Weights, loss_fn: LossFn, batch: Any, *, eps: Sequence[float] = (EPS,), samples: int = 1,
    dtype: torch.dtype = torch.float64,
) -> Tensor:  # fmt: skip
    """The same, each row alone through a float64 copy of the model whose weights stand at +-eps z."""
    rows = len(next(iter(batch.values())))
    losses = []
    for lane in range(samples * rows):
        row = {name: values[lane % rows : lane % rows + 1] for name, values in batch.items()}
        for sign in (1.0, -1.0):
            moved = copy.deepcopy(model).to(dtype)
            for i, name in enumerate(weights.names):
                z = materialise(weights, i, seed_of(lane))
                moved.get_parameter(name).add_(z, alpha=sign * eps[weights.groups[i]])
            losses.append(float(loss_fn(moved, row)))
    return torch.tensor(losses, dtype=torch.float64).view(-1, 2)


def agree(one: Tensor, other: Tensor) -> None:
    """Equal within rounding, where a look makes a difference a hundred times larger."""
    effect = float((other[:, 0] - other[:, 1]).abs().mean())
    assert effect > 5e-4
    torch.testing.assert_close(one, other, atol=min(2e-5, effect / 100), rtol=0.0)


@settings(max_examples=10)
@given(samples=st.integers(1, 3), parts=st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_parts_of_the_rows_look_along_their_directions_in_the_whole(
    samples: int, parts: list[int]
) -> None:
    """Each part with all its signs and samples, run by itself: the rows of the whole, in another order."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5))
    weights = Weights(list(net.named_parameters()), [0] * 4, FAMILIES["rank1"], [EPS])
    rows = sum(parts)
    draws = weights.draw(np.arange(samples * rows, dtype=np.uint64))
    signs = [sign for sign in (1.0, -1.0) for _ in range(samples * rows)]
    batch = torch.randn(rows, 4)
    with torch.no_grad(), looking(Look(weights, draws, samples * rows, signs, [EPS])):
        whole = net(batch.repeat(2 * samples, 1)).view(2 * samples, rows, 5)
        at = 0
        for size in parts:
            with among(at, at + size, rows):
                found = net(batch[at : at + size].repeat(2 * samples, 1))
            torch.testing.assert_close(
                found.view(2 * samples, size, 5), whole[:, at : at + size], rtol=1e-5, atol=1e-6
            )
            at += size
        again = net(batch.repeat(2 * samples, 1)).view(2 * samples, rows, 5)
    assert torch.equal(again, whole)
    bare = net(batch)
    with among(0, 1, rows):  # nothing looks: nothing happens
        assert torch.equal(net(batch), bare)


@pytest.mark.parametrize("family", ["rank1", "rank1-rademacher"])
@pytest.mark.parametrize("name", MODELS)
def test_a_look_is_each_rows_weights_moved_by_hand(name: str, family: str) -> None:
    model, loss_fn = build(name)
    weights, batch = weights_of(model, family), token_batch()
    expected = by_hand(model, weights, loss_fn, batch)
    before = jf.fingerprint(model)
    for two_calls in (False, True):
        agree(looked(weights, lambda b: loss_fn(model, b), batch, two_calls=two_calls), expected)
    agree(looked(weights, lambda: loss_fn(model, batch), None), expected)
    assert jf.fingerprint(model) == before


@pytest.mark.parametrize("name", ["opt", "gpt2", "llama tied"])
def test_several_samples_are_looks_of_their_own(name: str) -> None:
    model, loss_fn = build(name)
    weights, batch = weights_of(model), token_batch(rows=2)
    expected = by_hand(model, weights, loss_fn, batch, samples=3)
    for two_calls in (False, True):
        losses = looked(weights, lambda b: loss_fn(model, b), batch, samples=3, two_calls=two_calls)
        agree(losses, expected)
    agree(looked(weights, lambda: loss_fn(model, batch), None, samples=3), expected)
    assert len({round(float(x), 9) for x in (expected[:, 0] - expected[:, 1])}) == 6


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_groups_look_their_own_eps_far(name: str) -> None:
    model, loss_fn = build(name)
    count = len(list(model.parameters()))
    eps = (EPS, EPS / 4)
    weights = weights_of(model, groups=[i % 2 for i in range(count)], eps=eps)
    batch = token_batch()
    expected = by_hand(model, weights, loss_fn, batch, eps=eps)
    agree(looked(weights, lambda b: loss_fn(model, b), batch, eps=eps), expected)


@given(data=st.data())
@settings(max_examples=12)
@pytest.mark.parametrize("name", ["gpt2", "llama", "roberta masked"])
def test_any_part_may_be_frozen(name: str, data: st.DataObject) -> None:
    model, loss_fn = build(name)
    names = [name for name, _ in model.named_parameters()]
    tuned = data.draw(st.sets(st.sampled_from(names), min_size=1, max_size=3))
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter_name in tuned)
    weights, batch = weights_of(model), token_batch(rows=2, length=5)
    expected = by_hand(model, weights, loss_fn, batch)
    losses = looked(weights, lambda b: loss_fn(model, b), batch)
    torch.testing.assert_close(losses, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("positions", [True, False])
def test_position_numbers_shared_by_all_rows(positions: bool) -> None:
    """GPT-2 looks its positions up as [1, L] where it is not given them."""
    model, loss_fn = build("gpt2")
    weights = weights_of(model)
    batch = {"input_ids": token_batch()["input_ids"], "attention_mask": torch.ones(ROWS, 7).long()}
    if positions:
        batch["position_ids"] = torch.arange(7).repeat(ROWS, 1)
    expected = by_hand(model, weights, loss_fn, batch)
    agree(looked(weights, lambda b: loss_fn(model, b), batch), expected)


def test_position_numbers_shared_by_all_choices_of_all_rows() -> None:
    model = build("gpt2")[0]
    weights = weights_of(model)

    def loss_fn(of: Any, batch: Batch) -> Tensor:
        ids = batch["input_ids"].flatten(0, 1)
        scores = of(input_ids=ids).logits[:, -1].logsumexp(-1).unflatten(0, (-1, 2))
        return F.cross_entropy(scores, batch["label"], reduction="none")

    ids = torch.randint(3, 96, (ROWS, 2, 6), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "label": torch.arange(ROWS) % 2}
    expected = by_hand(model, weights, loss_fn, batch)
    for two_calls in (False, True):
        agree(looked(weights, lambda b: loss_fn(model, b), batch, two_calls=two_calls), expected)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("architecture", ["opt", "gpt2", "llama"])
def test_several_choices_a_row_share_its_direction(architecture: str, rows: int) -> None:
    model = stirred(make_model(architecture))
    tokenizer = make_tokenizer("bytelevel")
    task = Task("{text} It was", {"a": "not good", "b": "very good", "c": "great"})
    texts = ["a fine film", "bad", "the story is wonderful"][:rows]
    examples = [Example({"text": t}, "abc"[i], "rows.csv", i) for i, t in enumerate(texts)]

    def loss_fn(of: Any, batch: Batch) -> Tensor:
        return Scorer(of, tokenizer, task).losses(batch)

    batch = Scorer(model, tokenizer, task).encode(examples)
    assert batch["input_ids"].dim() == 3
    weights = weights_of(model)
    expected = by_hand(model, weights, loss_fn, batch)
    for two_calls in (False, True):
        agree(looked(weights, lambda b: loss_fn(model, b), batch, two_calls=two_calls), expected)


@pytest.mark.parametrize("architecture", sorted(MASKED))
def test_answers_at_a_mask(architecture: str) -> None:
    """As a masked task is trained: the head sees the mask's position of each row alone."""
    model, tokenizer = stirred(make_model(architecture)), make_tokenizer(MASKED[architecture])
    task = Task("{text} It was {mask}.", {"a": "bad", "b": "great", "c": "good"})
    texts = ["a fine film", "", "the story is wonderful , the music is great"]
    examples = [Example({"text": t}, "abc"[i], "rows.csv", i) for i, t in enumerate(texts)]

    def loss_fn(of: Any, batch: Batch) -> Tensor:
        return Scorer(of, tokenizer, task).losses(batch)

    scorer = Scorer(model, tokenizer, task)
    batch = scorer.encode(examples)
    weights = weights_of(model)
    expected = by_hand(model, weights, loss_fn, batch)
    for two_calls in (False, True):
        agree(looked(weights, scorer.losses, batch, two_calls=two_calls), expected)


@pytest.mark.parametrize("rows", [3, 7])
def test_relative_positions_shared_by_all_rows(rows: int) -> None:
    """T5 looks them up as [queries, keys], which are as many as the rows here: still not rows."""
    model, loss_fn = build("t5")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("relative_attention_bias" in name)
    weights, batch = weights_of(model, eps=(1.0,)), token_batch(rows, 7)
    expected = by_hand(model, weights, loss_fn, batch, eps=(1.0,))
    for two_calls in (False, True):
        found = looked(weights, lambda b: loss_fn(model, b), batch, two_calls=two_calls, eps=(1.0,))
        agree(found, expected)


def answering(kind: str) -> tuple[Any, LossFn, Batch]:
    """An encoder-decoder with several sequences of the decoder's a row, of labels of several tokens."""
    model, tokenizer = stirred(make_model(kind)), make_tokenizer(SEQ2SEQ[kind])
    task = Task("{text} It was", {"a": "not good at all", "b": "very good", "c": "great"})
    texts = ["a fine film", "", "the story is wonderful , the music is great"]
    examples = [Example({"text": t}, "abc"[i], "rows.csv", i) for i, t in enumerate(texts)]

    def loss_fn(of: Any, batch: Batch) -> Tensor:
        return Scorer(of, tokenizer, task).losses(batch)

    batch = Scorer(model, tokenizer, task).encode(examples)
    assert batch["decoder_input_ids"].shape[1] > 1
    return model, loss_fn, batch


@pytest.mark.parametrize("most_logits", [2**26, 1], ids=["at once", "one by one"])
@pytest.mark.parametrize("kind", sorted(SEQ2SEQ))
def test_answers_of_a_decoder(monkeypatch: pytest.MonkeyPatch, kind: str, most_logits: int) -> None:
    monkeypatch.setattr(causal, "MOST_LOGITS", most_logits)
    model, loss_fn, batch = answering(kind)
    weights = weights_of(model)
    expected = by_hand(model, weights, loss_fn, batch)
    for two_calls in (False, True):
        agree(looked(weights, lambda b: loss_fn(model, b), batch, two_calls=two_calls), expected)


@pytest.mark.parametrize(
    ("kind", "tuned"),
    [
        ("t5", r"encoder\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias"),
        ("t5", r"decoder\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias"),
        ("t5", r"relative_attention_bias"),
        ("t5", r"decoder\.block\.1"),
        ("bart", r"decoder\.embed_positions"),
        ("bart", r"encoder\.embed_positions"),
        ("bart", r"embed_positions|layernorm"),
    ],
)
def test_any_part_of_an_encoder_decoder_may_be_frozen(kind: str, tuned: str) -> None:
    """Nothing else then shows how many rows the encoder has, and how many the decoder."""
    model, loss_fn, batch = answering(kind)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(re.search(tuned, name) is not None)
    weights = weights_of(model, eps=(0.3,))
    expected = by_hand(model, weights, loss_fn, batch, eps=(0.3,))
    for two_calls in (False, True):
        found = looked(weights, lambda b: loss_fn(model, b), batch, two_calls=two_calls, eps=(0.3,))
        agree(found, expected)


def test_segments_are_looked_up_as_given() -> None:
    model, loss_fn = build("bert masked")
    weights, batch = weights_of(model), token_batch()
    batch["token_type_ids"] = (torch.arange(7) > 3).long().repeat(ROWS, 1)
    agree(
        looked(weights, lambda b: loss_fn(model, b), batch), by_hand(model, weights, loss_fn, batch)
    )


def test_the_optimizer_moves_along_what_was_looked_at() -> None:
    model, loss_fn = build("gpt2")
    optimizer = jf.MeZO(model, lr=1e-2, eps=EPS, estimator="activation", seed=5)
    batch = token_batch()
    expected = by_hand(model, optimizer.weights, loss_fn, batch)
    before = {name: p.detach().double() for name, p in model.named_parameters()}
    step = optimizer.estimate(lambda b: loss_fn(model, b), batch)
    grads = (expected[:, 0] - expected[:, 1]) / (2 * EPS)
    assert step.loss == pytest.approx(float(expected.mean()), rel=1e-5)
    torch.testing.assert_close(
        torch.tensor(step.projected_grads).double(), grads, atol=5e-3, rtol=1e-3
    )
    optimizer.apply(step)
    for i, name in enumerate(optimizer.weights.names):
        wanted = sum(
            -1e-2 * float(g) / ROWS * materialise(optimizer.weights, i, seed_of(lane))
            for lane, g in enumerate(grads)
        )
        moved = model.get_parameter(name).detach().double() - before[name]
        torch.testing.assert_close(moved, wanted, atol=1e-3, rtol=1e-2)
        assert moved.abs().max() > 1e-3


# ----------------------------------------------------------------------------- modules of every kind


class Use(nn.Module):
    """One parameter (or two) in one expression, between an input of numbers or tokens and a loss a row."""

    def __init__(self, use: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.use = use
        generator = torch.Generator().manual_seed(1)
        self.p = nn.ParameterList(torch.randn(shape, generator=generator) for shape in shapes)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.use(x, t, *self.p)


def use_loss(model: Any, batch: Batch) -> Tensor:
    x = batch["x"].to(next(model.parameters()).dtype)
    y = model(x, batch["t"])
    return y.square().flatten(1).mean(1).add(1).log()


def use_batch(rows: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(2)
    return {
        "x": torch.randn(rows, 5, 6, generator=generator),
        "t": torch.randint(0, 9, (rows, 5), generator=generator),
    }


def rms(x: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()


KNOWN: dict[str, Use] = {
    "linear": Use(lambda x, t, w: F.linear(x, w), (4, 6)),
    "linear with bias": Use(lambda x, t, w, b: F.linear(x, w, b), (4, 6), (4,)),
    "linear by keyword": Use(lambda x, t, w, b: F.linear(x, weight=w, bias=b), (4, 6), (4,)),
    "linear of vectors": Use(lambda x, t, w, b: F.linear(x[:, 0], w, b), (4, 6), (4,)),
    "linear of four axes": Use(lambda x, t, w: F.linear(x.unflatten(2, (2, 3)), w), (4, 3)),
    "linear flattened": Use(lambda x, t, w, b: F.linear(x.reshape(-1, 6), w, b).view(len(x), -1), (4, 6), (4,)),
    "linear of what is not contiguous": Use(lambda x, t, w: F.linear(x.transpose(1, 2), w), (4, 5)),
    "linear of an input without rows": Use(lambda x, t, w: F.linear(x[:1] * 0 + 1, w) + x[..., :4], (4, 6)),
    "linear twice": Use(lambda x, t, w: F.linear(F.linear(x, w).tanh(), w), (6, 6)),
    "conv1d of gpt-2": Use(lambda x, t, w, b: torch.addmm(b, x.reshape(-1, 6), w).view(len(x), -1), (6, 4), (4,)),
    "addmm, matrix alone": Use(lambda x, t, w: torch.addmm(x[:, 1, :4], x[:, 0], w), (6, 4)),
    "addmm, bias alone": Use(lambda x, t, b: torch.addmm(b, x[:, 0], x.new_ones(6, 5)), (5,)),
    "matmul": Use(lambda x, t, w: torch.matmul(x, w), (6, 4)),
    "at": Use(lambda x, t, w: x @ w, (6, 4)),
    "mm": Use(lambda x, t, w: torch.mm(x[:, 0], w), (6, 4)),
    "method matmul": Use(lambda x, t, w: x.matmul(w), (6, 4)),
    "embedding": Use(lambda x, t, w: F.embedding(t, w), (9, 4)),
    "embedding of one token": Use(lambda x, t, w: F.embedding(t[:, 0], w), (9, 4)),
    "embedding with padding": Use(lambda x, t, w: F.embedding(t, w, padding_idx=1), (9, 4)),
    "embedding of shared positions": Use(lambda x, t, w: F.embedding(torch.arange(5)[None], w) + x[..., :4], (9, 4)),
    "embedding and head tied": Use(lambda x, t, w: F.linear(F.embedding(t, w), w), (9, 4)),
    "layer norm": Use(lambda x, t, w, b: F.layer_norm(x, (6,), w, b), (6,), (6,)),
    "layer norm, scale alone": Use(lambda x, t, w: F.layer_norm(x, (6,), w), (6,)),
    "layer norm, bias alone": Use(lambda x, t, b: F.layer_norm(x, (6,), None, b), (6,)),
    "layer norm, large eps": Use(lambda x, t, w: F.layer_norm(x, (6,), w, None, 0.5), (6,)),
    "layer norm flattened": Use(lambda x, t, w, b: F.layer_norm(x.reshape(-1, 6), (6,), w, b).view(x.shape), (6,), (6,)),
    "rms norm": Use(lambda x, t, w: F.rms_norm(x, (6,), w), (6,)),
    "rms norm of llama": Use(lambda x, t, w: w * rms(x), (6,)),
    "rms norm of gemma": Use(lambda x, t, w, v: rms(x) * w.float() + x * v.to(x.dtype), (6,), (6,)),
    "scale and shift": Use(lambda x, t, w, b: torch.add(torch.mul(x, w), b), (6,), (6,)),
    "shift from the left": Use(lambda x, t, b: b + x, (6,)),
}  # fmt: skip


@pytest.mark.parametrize("family", ["rank1", "rank1-rademacher"])
@pytest.mark.parametrize("use", KNOWN)
def test_known_uses_are_the_weights_moved_by_hand(use: str, family: str) -> None:
    model, batch = KNOWN[use], use_batch()
    if "gemma" in use:  # .float() changes nothing here, and would in a float64 copy
        batch["x"] = batch["x"].float()
    weights = weights_of(model, family)
    expected = by_hand(model, weights, use_loss, batch, samples=2)
    agree(looked(weights, lambda b: use_loss(model, b), batch, samples=2), expected)
    agree(looked(weights, lambda: use_loss(model, batch), None, samples=2), expected)


@given(rows=st.integers(1, 5), samples=st.integers(1, 3), use=st.sampled_from(sorted(KNOWN)))
def test_any_number_of_rows_and_samples(rows: int, samples: int, use: str) -> None:
    model, batch = KNOWN[use], use_batch(rows)
    weights = weights_of(model)
    one = looked(weights, lambda b: use_loss(model, b), batch, samples=samples)
    two = looked(weights, lambda b: use_loss(model, b), batch, samples=samples, two_calls=True)
    assert one.shape == two.shape == (rows * samples, 2)
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


def test_all_that_says_nothing_of_values_may_be_asked() -> None:
    asked: list[Any] = []

    def use(x: Tensor, t: Tensor, w: Tensor) -> Tensor:
        asked.append(
            (w.shape, w.dtype, w.device, w.requires_grad, w.size(0), w.dim(), w.numel(), len(w))
        )
        asked.append(
            (w.stride(), w.is_contiguous(), w.is_floating_point(), torch.is_floating_point(w))
        )
        return F.linear(x.to(w.dtype), w.contiguous())

    model, batch = Use(use, (4, 6)), use_batch()
    weights = weights_of(model)
    looked(weights, lambda b: use_loss(model, b), batch)
    here = list(asked)
    asked.clear()
    model(batch["x"], batch["t"])
    assert here[:2] == asked


# ------------------------------------------------------------------------------------ what is refused


UNKNOWN: dict[str, tuple[nn.Module, str]] = {
    "slice": (Use(lambda x, t, w: x @ w[:, :2], (6, 4)), "getitem"),
    "transpose": (Use(lambda x, t, w: x @ w.t(), (4, 6)), "t"),
    "T": (Use(lambda x, t, w: x @ w.T, (4, 6)), "attribute T"),
    "data": (Use(lambda x, t, w: F.linear(x, w.data), (4, 6)), "attribute data"),
    "detach": (Use(lambda x, t, w: F.linear(x, w.detach()), (4, 6)), "detach"),
    "clone": (Use(lambda x, t, w: F.linear(x, w.clone()), (4, 6)), "clone"),
    "view": (Use(lambda x, t, w: F.linear(x, w.view(4, 6)), (24,)), "view"),
    "double": (Use(lambda x, t, w: F.linear(x.double(), w.double()), (4, 6)), "double"),
    "to": (Use(lambda x, t, w: F.linear(x.double(), w.to(torch.float64)), (4, 6)), "to"),
    "einsum": (Use(lambda x, t, w: torch.einsum("bld,kd->blk", x, w), (4, 6)), "einsum"),
    "stack": (Use(lambda x, t, w: F.linear(x, torch.cat([w, w])), (4, 6)), "cat"),
    "subtraction": (Use(lambda x, t, w: x - w, (6,)), "sub"),
    "in place": (Use(lambda x, t, w: x.clone().mul_(w), (6,)), "mul_"),
    "operator in place": (Use(lambda x, t, w: torch.Tensor.__iadd__(x.clone(), w), (6,)), "add_"),
    "add with a factor": (Use(lambda x, t, w: torch.add(x, w, alpha=2), (6,)), "add"),
    "addmm with a factor": (Use(lambda x, t, w: torch.addmm(x[:, 1, :4], x[:, 0], w, beta=2), (6, 4)), "addmm"),
    "matrix times numbers": (Use(lambda x, t, w: x * w, (5, 6)), "mul"),
    "scalar parameter": (Use(lambda x, t, w: x * w, ()), "mul"),
    "vector along another axis": (Use(lambda x, t, w: x.transpose(1, 2) * w, (1,)), "mul"),
    "parameter times parameter": (Use(lambda x, t, w, v: F.linear(x, w * v), (4, 6), (4, 6)), "mul"),
    "matrix times parameter": (Use(lambda x, t, w, v: F.linear(x, w @ v), (4, 6), (6, 6)), "matmul"),
    "parameter as input": (Use(lambda x, t, w: F.linear(w, x[0]), (2, 6)), "linear"),
    "vector as weight": (Use(lambda x, t, w: F.linear(x, w), (6,)), "linear"),
    "embedding with max_norm": (Use(lambda x, t, w: F.embedding(t, w, max_norm=1.0), (9, 4)), "embedding"),
    "layer norm of two axes": (Use(lambda x, t, w: F.layer_norm(x, (5, 6), w), (5, 6)), "layer_norm"),
    "batch norm": (Use(lambda x, t, w: F.batch_norm(x, torch.zeros(5), torch.ones(5), w), (5,)), "batch_norm"),
    "conv": (Use(lambda x, t, w: F.conv1d(x, w), (4, 5, 3)), "conv1d"),
    "prelu": (Use(lambda x, t, w: F.prelu(x, w), (5,)), "prelu"),
    "sum": (Use(lambda x, t, w: x * w.sum(), (6,)), "sum"),
    "item": (Use(lambda x, t, w: x * float(w), ()), "__float__"),
}  # fmt: skip


@pytest.mark.parametrize("use", UNKNOWN)
def test_unknown_uses_are_refused_by_name(use: str) -> None:
    model, what = UNKNOWN[use]
    weights = weights_of(model)
    with pytest.raises(UserError, match=rf"parameter p\.[01].* is used by .*{what}") as caught:
        looked(weights, lambda b: use_loss(model, b), use_batch())
    assert "estimator='weight' or freeze the parameter" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("use", "what"),
    [
        (lambda values: values.permute([2, 0, 1]).unsqueeze(1), "unsqueeze"),
        (lambda values: values.transpose(0, 2), "transpose"),
        (lambda values: torch.add(1.0, values.permute(2, 0, 1)), "add"),
        (lambda values: F.softmax(values, -1), "softmax"),
    ],
)
def test_another_use_of_relative_positions_is_refused_by_name(use: Any, what: str) -> None:
    """Put together as T5 does it and as nobody does."""
    model: Any = nn.Module()
    model.SelfAttention = nn.Module()
    model.SelfAttention.relative_attention_bias = nn.Embedding(8, 2)
    whole: Any = nn.Module()
    whole.layer = model

    def loss_fn(batch: Batch) -> Tensor:
        places = torch.arange(5)[:, None].expand(5, 5)
        return use(model.SelfAttention.relative_attention_bias(places)).sum() + batch["x"].sum()

    said = rf"layer\.SelfAttention\.relative_attention_bias\.weight gives for all rows at once is used by .*({what})"
    with pytest.raises(UserError, match=said):
        looked(weights_of(whole), loss_fn, use_batch())


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_are_refused(kind: Any) -> None:
    model = kind(6, 4, batch_first=True)
    weights = weights_of(model)
    with pytest.raises(UserError, match=r"parameter weight_ih_l0 and .* is used by"):
        looked(weights, lambda b: model(b["x"])[0].mean((1, 2)), use_batch())


def test_torch_attention_is_refused_by_name() -> None:
    model = nn.MultiheadAttention(6, 2, batch_first=True).eval()
    weights = weights_of(model)
    with pytest.raises(UserError, match=r"parameter in_proj_weight and .* is used by"):
        looked(weights, lambda b: model(b["x"], b["x"], b["x"])[0].mean((1, 2)), use_batch())


def test_mixture_of_experts_is_refused_by_name_unless_the_experts_are_frozen() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = stirred(mixtral())
    batch = token_batch()
    with pytest.raises(
        UserError, match=r"parameter model\.layers\.0\..*experts.*estimator='weight'"
    ):
        looked(weights_of(model), lambda b: token_loss(model, b), batch)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".experts." not in name)
    weights = weights_of(model)
    # torch's grouped product, which the experts are, knows no float64
    expected = by_hand(model, weights, token_loss, batch, dtype=torch.float32)
    agree(looked(weights, lambda b: token_loss(model, b), batch), expected)


def test_mixture_of_experts_is_tuned_in_weight_space() -> None:
    model, batch = mixtral(), token_batch()
    optimizer = jf.MeZO(model, lr=1e-3, seed=5)
    before = jf.fingerprint(model)
    step = optimizer.estimate(lambda: token_loss(model, batch))
    assert jf.fingerprint(model) == before
    assert step.projected_grads[0] != 0.0
    optimizer.apply(step)
    assert jf.fingerprint(model) != before


MIXING: dict[str, Use] = {
    "rows centred": Use(lambda x, t, w: F.linear(x, w) - F.linear(x, w).mean(0), (4, 6)),
    "rows reversed": Use(lambda x, t, w: F.linear(F.linear(x, w).flip(0), w), (6, 6)),
    "sequence first": Use(lambda x, t, w: F.linear(x.transpose(0, 1), w).transpose(0, 1), (4, 6)),
    "positions without an axis for rows": Use(lambda x, t, w: x + F.embedding(torch.arange(4), w), (9, 6)),
}  # fmt: skip


@pytest.mark.parametrize("with_batch", [True, False])
@pytest.mark.parametrize("use", MIXING)
def test_rows_that_reach_other_rows_are_refused(use: str, with_batch: bool) -> None:
    model, batch = MIXING[use], use_batch()
    batch = {"x": batch["x"][:, :4], "t": batch["t"][:, :4]}  # 4 rows of 4: no shape gives it away
    weights = weights_of(model)
    arguments: Any = (lambda b: use_loss(model, b), batch)
    if not with_batch:
        arguments = (lambda: use_loss(model, batch), None)
    with pytest.raises(UserError, match=r"changed the loss of row \d|the first axis must be"):
        looked(weights, *arguments, check=True)


def test_the_check_is_made_once_and_can_be_left_out() -> None:
    model, batch = MIXING["rows centred"], use_batch()
    weights = weights_of(model)
    assert looked(weights, lambda b: use_loss(model, b), batch, check=False).shape == (4, 2)
    calls: list[int] = []

    def loss_fn(b: Batch) -> Tensor:
        calls.append(len(b["x"]))
        return use_loss(KNOWN["linear"], b)

    weights = weights_of(KNOWN["linear"])
    looks = RowLooks(two_calls=False, check=True)
    with torch.no_grad():
        for _ in range(3):
            looks.look(Site(weights, 0, seed_of, (EPS,), Shield()), loss_fn, batch, 1)
    assert calls == [8, 8, 8, 8, 8]


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (lambda losses: losses.mean(), r"one loss a row.* returned a tensor \[\]"),
        (lambda losses: losses[:, None], r"returned a tensor \[\d, 1\]"),
        (lambda losses: losses.tolist(), "returned a list"),
        (lambda losses: None, "returned a NoneType"),
        (lambda losses: losses[1:], r"returned a tensor \[7\]|sees an input of shape \(4, 5, 6\)"),
    ],
)
@pytest.mark.parametrize("with_batch", [True, False])
def test_a_result_that_is_not_one_loss_a_row_is_refused(
    result: Callable[[Tensor], Any], said: str, with_batch: bool
) -> None:
    model, batch = KNOWN["linear"], use_batch()
    weights = weights_of(model)
    arguments: Any = (lambda b: result(use_loss(model, b)), batch)
    if not with_batch:
        arguments = (lambda: result(use_loss(model, batch)), None)
    with pytest.raises(UserError, match=said):
        looked(weights, *arguments)


@pytest.mark.parametrize("name", ["gpt2", "llama", "roberta classifier"])
def test_a_closure_may_bring_another_number_of_rows_each_step(name: str) -> None:
    model, loss_fn = build(name)
    weights, looks = weights_of(model), RowLooks(two_calls=False, check=True)
    for rows in (4, 2, 3, 1, 4, 8):
        batch = token_batch(rows)
        with torch.no_grad():
            site = Site(weights, 0, seed_of, (EPS,), Shield())
            seen, _ = looks.look(site, lambda batch=batch: loss_fn(model, batch), None, 1)
        agree(pairs(seen), by_hand(model, weights, loss_fn, batch))


def test_a_closure_that_brings_other_rows_each_call_is_told_so() -> None:
    model, batch = KNOWN["linear"], use_batch()
    turns = iter(range(100))

    def closure() -> Tensor:
        rows = 4 if next(turns) % 2 else 2
        return use_loss(model, {name: values[:rows] for name, values in batch.items()})

    with pytest.raises(UserError, match="rows"):
        looked(weights_of(model), closure, None)


Pair = namedtuple("Pair", "first second")


def test_batches_of_any_nesting_are_repeated() -> None:
    x, y = torch.arange(6).view(3, 2), torch.arange(3)
    batch = {"a": [x, (y, "text")], "b": Pair(y, None), "c": 3}
    repeated, rows = repeat_rows(batch, 2)
    assert rows == 3
    assert list(repeated) == ["a", "b", "c"]
    assert torch.equal(repeated["a"][0], torch.cat([x, x]))
    assert torch.equal(repeated["a"][1][0], torch.cat([y, y]))
    assert repeated["a"][1][1] == "text"
    assert isinstance(repeated["b"], Pair)
    assert torch.equal(repeated["b"].first, torch.cat([y, y]))
    assert (repeated["b"].second, repeated["c"]) == (None, 3)
    assert repeat_rows(x, 1)[0] is x


def test_a_batch_stays_what_it_is() -> None:
    """A function may read attributes of a BatchEncoding."""
    x = torch.arange(3)
    for given_ in (BatchEncoding({"x": x}), OrderedDict(x=x), UserDict(x=x)):
        repeated, rows = repeat_rows(given_, 2)
        assert (type(repeated), rows) == (type(given_), 3)
        assert torch.equal(repeated["x"], torch.cat([x, x]))
        assert torch.equal(given_["x"], x)  # nothing of it was changed
    model = nn.Linear(3, 1)
    opt = jf.MeZO(model, estimator="activation")
    opt.step(lambda b: model(b.x).mean(1), BatchEncoding({"x": torch.ones(4, 3)}))


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({"a": torch.zeros(3, 2), "b": torch.zeros(2)}, r"first axes are \[2, 3\]"),
        ({"a": torch.zeros(3), "b": torch.tensor(1.0)}, "a tensor without rows"),
        ({"a": "text"}, "the batch has no tensors"),
        ([], "the batch has no tensors"),
    ],
)
def test_batches_without_rows_are_refused(batch: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        repeat_rows(batch, 2)


# --------------------------------------------------------------------------------- what is left behind


@pytest.fixture
def _python_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Own(nn.Parameter):
    """A subclass of Parameter, as quantisation libraries have them."""


def fail() -> None:
    raise OSError("in the closure")


@pytest.mark.usefixtures("_python_handler")
@pytest.mark.parametrize("name", ["opt", "gpt2", "llama", "roberta masked"])
@pytest.mark.parametrize(
    ("act", "error"),
    [
        (fail, OSError),
        (lambda: signal.raise_signal(signal.SIGINT), KeyboardInterrupt),
        (lambda: torch.nan, NonFiniteLoss),
        (lambda: -torch.inf, NonFiniteLoss),
        (lambda: "text", TypeError),
    ],
)
def test_parameters_are_what_they_were_whatever_happened(
    name: str, act: Callable[[], Any], error: type[BaseException]
) -> None:
    model, loss_fn = build(name)
    first = next(iter(model.parameters()))
    first.__class__ = Own
    first.mine = "kept"
    batch = token_batch()
    weights = weights_of(model)
    objects = {name: (id(p), type(p), dict(p.__dict__)) for name, p in model.named_parameters()}
    print_, plain = jf.fingerprint(model), loss_fn(model, batch)
    for at in (1, 2):
        calls = iter(range(1, 10))

        def closure(calls: Iterator[int] = calls, at: int = at) -> Tensor:
            losses = loss_fn(model, batch)
            if next(calls) == at + 1:  # the first call counts the rows
                losses = losses + act()
            return losses

        with pytest.raises(error):
            looked(weights, closure, None)
        assert jf.fingerprint(model) == print_
        assert {
            name: (id(p), type(p), dict(p.__dict__)) for name, p in model.named_parameters()
        } == objects
        assert torch.equal(loss_fn(model, batch), plain)


def test_a_bad_row_is_named() -> None:
    model, batch = KNOWN["linear"], use_batch()
    batch["x"][2] = torch.inf
    with pytest.raises(NonFiniteLoss, match=r"step 0: the loss is (nan|inf) at \+eps in row 2"):
        looked(weights_of(model), lambda b: use_loss(model, b), batch, samples=2)
