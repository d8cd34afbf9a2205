"""Scores of options against one plain forward a choice; prompts that are shared against prompts that are repeated.

Reading order: plans, scores, sharing, looks and gradients, rows and errors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import justforward as jf
from conftest import CONTEXT, make_model, make_tokenizer
from justforward import causal, noise, tuners
from justforward.cached import can_share
from justforward.causal import plan
from justforward.config import TrainConfig
from justforward.data import Example
from justforward.errors import UserError
from justforward.evaluate import Scorer
from justforward.prompts import Batch
from justforward.tasks import Task

ARCHITECTURES = ("opt", "gpt2", "llama", "qwen")
NEVER = 2**40
TEXTS = ["a fine film", "bad", "the story is wonderful , the music is great", ""]
# rows with two, four and three options, of one token and of several, some of which begin alike
OPTIONS = [
    ("great", "not good at all"),
    ("bad", "not", "not good", "very good"),
    ("the end is very good", "the end is bad", "wonderful"),
    ("good", "bad"),
]


def make(architecture: str) -> Any:
    if architecture != "qwen":
        return make_model(architecture)
    from transformers import Qwen2Config, Qwen2ForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=1024,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            initializer_range=0.2,
            tie_word_embeddings=True,
        )
        model: Any = Qwen2ForCausalLM(config)
    return model.eval()


@torch.no_grad()
def adapted(architecture: str, tuner: Any) -> Any:
    """A model with an adapter that has moved from where it starts."""
    config = TrainConfig("m", "d", "o", template="{text} It was", labels="a=b,c=d", tuner=tuner)
    model: Any = tuners.attach(make(architecture), make_tokenizer("bytelevel"), config, None)
    tuned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for i, parameter in enumerate(tuned):
        parameter.add_(noise.normal(9, i, 0, parameter.numel()).view(parameter.shape), alpha=0.2)
    return model


def rows(
    texts: Sequence[str] = TEXTS, options: Sequence[tuple[str, ...]] = OPTIONS
) -> list[Example]:
    out = []
    for i, (text, offered) in enumerate(zip(texts, options, strict=True)):
        right = offered[i % len(offered)]
        out.append(Example({"text": text}, right, "rows.jsonl", i + 1, offered, ((right,),)))
    return out


def task(score: Any = "sum", loss: Any = "choices", template: str = "{text} It was") -> Task:
    return Task(template, kind="choice", score=score, loss=loss)


def scorer_of(model: Any, kind: str = "bytelevel", **keys: Any) -> Scorer:
    return Scorer(model, make_tokenizer(kind), task(**keys))


@torch.no_grad()
def oracle(model: Any, tokenizer: Any, example: Example, mean: bool) -> Tensor:
    """One forward a choice, of the whole text alone, without a mask."""
    start = [1] if tokenizer.bos_token_id is not None else []
    prompt = f"{example.fields['text']} It was"
    known = start + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    found = []
    for option in example.options:
        ids = start + tokenizer(f"{prompt} {option}", add_special_tokens=False)["input_ids"]
        assert ids[: len(known)] == known
        logs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        each = [logs[i - 1, ids[i]] for i in range(len(known), len(ids))]
        found.append(sum(each) / (len(each) if mean else 1))
    return torch.tensor([float(x) for x in found])


# -------------------------------------------------------------------------------------------- plans

WORDS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=5)


@given(WORDS)
def test_plans_read_every_token_behind_those_before_it(words: list[list[int]]) -> None:
    made = plan(words)
    assert made.lengths == [len(word) for word in words]
    assert 1 <= len(made.shown) <= len(words)
    read = {}
    for choice, sequence, place, token in made.reads:
        assert made.shown[sequence][:place] == words[choice][:place]
        read[choice, place] = token
    assert read == {(c, p): token for c, word in enumerate(words) for p, token in enumerate(word)}
    for i, a in enumerate(made.shown):  # none is within another, so none can be spared
        assert not any(i != j and b[: len(a)] == a for j, b in enumerate(made.shown))
        assert any(word[:-1] == a for word in words)
    assert list(map(len, made.shown)) == sorted(map(len, made.shown))


# ------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("sharing", [0, NEVER], ids=["shared", "repeated"])
@pytest.mark.parametrize("score", ["sum", "mean"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_are_the_oracles(
    monkeypatch: pytest.MonkeyPatch, architecture: str, score: str, sharing: int
) -> None:
    monkeypatch.setattr(causal, "WORTH_SHARING", sharing)
    kind = "metaspace" if architecture == "llama" else "bytelevel"
    model = make(architecture)
    scorer = scorer_of(model, kind, score=score)
    batch = scorer.encode(rows())
    assert ("shown_ids" in batch) == (sharing == 0)
    assert {tensor.shape[0] for tensor in batch.values()} == {len(TEXTS)}
    monkeypatch.setattr(causal, "WORTH_SHARING", NEVER)  # each row alone below
    found = scorer.scores(batch)
    assert found.shape == (len(TEXTS), max(map(len, OPTIONS)))
    assert found.dtype == torch.float32
    for example, row in zip(rows(), found, strict=True):
        count = len(example.options)
        expected = oracle(model, make_tokenizer(kind), example, score == "mean")
        torch.testing.assert_close(row[:count], expected, atol=1e-4, rtol=1e-5)
        assert (row[count:] == -torch.inf).all()
        alone = scorer.scores(scorer.encode([example]))[0]
        torch.testing.assert_close(row[:count], alone, atol=1e-4, rtol=1e-5)
    summed = scorer.prompts.summed(batch)
    assert torch.equal(summed, found) == (score == "sum")


def test_losses_of_options(tiny_llama: Any) -> None:
    """Cross-entropy over the row's own options; and of the right one alone, the negative score."""
    scorer = scorer_of(tiny_llama, score="mean")
    examples = rows()
    losses = scorer.losses(scorer.encode(examples))
    by_words = scorer_of(tiny_llama, score="mean", loss="vocabulary")
    alone = by_words.encode_training(examples)
    assert alone["present"].shape == (len(TEXTS), 1)
    for example, loss, negative in zip(examples, losses, by_words.losses(alone), strict=True):
        scores = oracle(tiny_llama, make_tokenizer("bytelevel"), example, mean=True)
        right = example.options.index(example.label)
        torch.testing.assert_close(loss, -scores.log_softmax(0)[right], atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(negative, -scores[right], atol=1e-4, rtol=1e-5)
    whole = by_words.losses(by_words.encode(examples))
    torch.testing.assert_close(whole, by_words.losses(alone), atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------ sharing


def both(monkeypatch: pytest.MonkeyPatch, scorer: Scorer, examples: list[Example]) -> list[Batch]:
    """The batch with prompts shared, and with prompts repeated."""
    batches = []
    for sharing in (0, NEVER):
        monkeypatch.setattr(causal, "WORTH_SHARING", sharing)
        batches.append(scorer.encode(examples))
    assert "shown_ids" in batches[0]
    assert "shown_ids" not in batches[1]
    return batches


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tuner", ["full", "lora", "prefix"])
def test_sharing_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, architecture: str, tuner: str
) -> None:
    model = adapted(architecture, tuner)
    scorer = scorer_of(model, score="mean")
    shared, repeated = both(monkeypatch, scorer, rows())
    expected = scorer.scores(repeated)
    torch.testing.assert_close(scorer.scores(shared), expected, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(causal, "MOST_LOGITS", 1)  # a sequence a pass
    torch.testing.assert_close(scorer.scores(shared), expected, atol=1e-5, rtol=1e-5)
    if tuner != "full":
        bare = scorer_of(make(architecture), score="mean")
        assert not torch.allclose(bare.scores(bare.encode(rows())), expected, atol=1e-3)


PHRASES = st.lists(
    st.sampled_from(["good", "not good", "not", "very bad film", "the end", "great great great"]),
    min_size=2,
    max_size=5,
    unique=True,
).map(tuple)


@settings(max_examples=25)
@given(st.lists(st.tuples(st.sampled_from(TEXTS), PHRASES), min_size=1, max_size=4))
def test_any_rows_are_shared_alike(given_rows: list[tuple[str, tuple[str, ...]]]) -> None:
    texts, options = zip(*given_rows, strict=True)
    scorer = scorer_of(make_model("llama"))
    known = scorer.prompts.rows(rows(texts, options))
    assume(any(len(plan(row.choices).shown) > 1 for row in known))
    with pytest.MonkeyPatch.context() as patch:
        shared, repeated = both(patch, scorer, rows(texts, options))
    torch.testing.assert_close(scorer.scores(shared), scorer.scores(repeated), atol=1e-5, rtol=1e-5)


def test_nothing_is_shared_where_nothing_is_shown(
    tiny_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(causal, "WORTH_SHARING", 0)
    scorer = scorer_of(tiny_llama)
    batch = scorer.encode(rows(["bad"], [("good", "not")]))  # a token each
    assert "shown_ids" not in batch
    assert scorer.scores(batch).shape == (1, 2)


def test_words_of_labels_are_shared_too(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Any, tokenizer: Any
) -> None:
    labels = {"a": "very good", "b": "great", "c": "not good at all", "d": "not"}
    scorer = Scorer(tiny_model, tokenizer, Task("{text} It was", labels))
    examples = [Example({"text": text}, "b", "rows.csv", 2) for text in TEXTS]
    shared, repeated = both(monkeypatch, scorer, examples)
    torch.testing.assert_close(scorer.scores(shared), scorer.scores(repeated), atol=1e-5, rtol=1e-5)


def test_shared_where_it_pays(tiny_llama: Any) -> None:
    """Long prompts of several sequences; a model that keeps no keys and values gets them repeated."""
    scorer = scorer_of(tiny_llama)
    offered = ("not good", "very bad", "good film")  # three sequences: two prompts are spared a row
    long = [" ".join(["film"] * 40)] * 4
    assert "shown_ids" not in scorer.encode(rows(long[:1], [offered]))
    batch = scorer.encode(rows(long, [offered] * 4))
    assert "shown_ids" in batch
    assert batch["input_ids"].dim() == 2
    seen: list[int] = []
    tiny_llama.model.embed_tokens.register_forward_hook(
        lambda _m, args, _out: seen.append(args[0].numel())
    )
    expected = scorer.scores(batch)
    assert len(seen) == 2
    assert seen[0] == batch["input_ids"].numel()
    assert seen[1] == batch["shown_ids"].numel() == 4 * 3
    assert "shown_ids" not in scorer.encode(rows(long, [("good", "bad")] * 4))
    for layer in tiny_llama.model.layers:  # what gradient checkpointing sets
        layer.gradient_checkpointing = True
    assert not can_share(tiny_llama, scorer.prompts.accepts)
    batch = scorer.encode(rows(long, [offered] * 4))
    assert "shown_ids" not in batch
    torch.testing.assert_close(scorer.scores(batch), expected, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------- looks and gradients


def watched(scorer: Scorer, seen: list[Tensor]) -> Callable[[Batch], Tensor]:
    def losses(batch: Batch) -> Tensor:
        seen.append(scorer.losses(batch))
        return seen[-1]

    return losses


@pytest.mark.parametrize("tuner", ["full", "lora", "prefix"])
@pytest.mark.parametrize("architecture", ["opt", "gpt2", "llama"])
@pytest.mark.parametrize("estimator", ["weight", "activation"])
def test_looks_with_shared_prompts(
    monkeypatch: pytest.MonkeyPatch, estimator: str, architecture: str, tuner: str
) -> None:
    model = adapted(architecture, tuner)
    scorer = scorer_of(model, score="mean")
    jf.MeZO(model, eps=0.05, estimator=estimator)  # lays the grid
    before = jf.fingerprint(model)
    looks: list[list[Tensor]] = []
    grads: list[Tensor] = []
    for batch in both(monkeypatch, scorer, rows()):
        looks.append([])
        opt = jf.MeZO(model, eps=0.05, estimator=estimator, num_samples=2)
        step = opt.estimate(watched(scorer, looks[-1]), batch)
        grads.append(torch.tensor(step.projected_grads))
        assert jf.fingerprint(model) == before
    assert len(looks[0]) == len(looks[1])
    for shared, repeated in zip(*looks, strict=True):
        torch.testing.assert_close(shared, repeated, atol=1e-5, rtol=1e-5)
    assert grads[0].shape == (2 * (1 if estimator == "weight" else len(TEXTS)),)
    assert grads[0].abs().min() > 0.0
    torch.testing.assert_close(*grads, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("tuner", ["full", "lora", "prefix"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_gradients_flow_through_shared_prompts(
    monkeypatch: pytest.MonkeyPatch, architecture: str, tuner: str
) -> None:
    model = adapted(architecture, tuner)
    scorer = scorer_of(model, score="mean")
    found: list[dict[str, Tensor]] = []
    for batch in both(monkeypatch, scorer, rows()):
        model.zero_grad()
        scorer.loss_of(batch).sum().backward()
        named = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert all(grad is not None and grad.isfinite().all() for grad in named.values())
        found.append({name: grad.clone() for name, grad in named.items() if grad is not None})
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], atol=1e-5, rtol=1e-4)
    assert any(grad.abs().max() > 1e-3 for grad in found[0].values())


# ---------------------------------------------------------------------------------- rows and errors


def test_what_each_option_is_shown_as(tiny_llama: Any) -> None:
    """Sentences are scored where options complete one; what is predicted is the option."""
    shown = ("not good at all", "very good")
    named = Example({"text": "a film"}, "Bo", "f", 1, ("Ann", "Bo"), (("Bo",),), shown)
    plain = Example({"text": "a film"}, shown[1], "f", 2, shown, ((shown[1],),))
    scorer = scorer_of(tiny_llama)
    scores = scorer.scores(scorer.encode([named, plain]))
    assert torch.equal(scores[0], scores[1])
    told = scorer.predict(scorer.encode([named, plain]))
    assert told[0] == named.options[shown.index(told[1])]
    found = scorer.evaluate([named, plain], 2)
    assert found.predictions == told
    assert found.accuracy == found.metrics["accuracy"] == float(told[0] == "Bo")


def test_accuracy_of_options_is_letter_by_letter(tiny_llama: Any) -> None:
    """The two are one answer to SQuAD's exact match, and two options."""
    offered = ("the end", "end")
    base = Example({"text": "a film"}, offered[0], "f", 1, offered, ((offered[0],),))
    scorer = scorer_of(tiny_llama)
    [told] = scorer.predict(scorer.encode([base]))
    wrong = next(option for option in offered if option != told)
    found = scorer.evaluate([Example(base.fields, wrong, "f", 1, offered, ((wrong,),))], 1)
    assert (found.accuracy, found.value) == (0.0, 0.0)


def test_rows_keep_their_order(tiny_opt: Any) -> None:
    scorer = scorer_of(tiny_opt, score="mean")
    examples = rows() * 2
    one, all_at_once = scorer.evaluate(examples, 1), scorer.evaluate(examples, 64)
    assert one.predictions == all_at_once.predictions
    assert (one.forwards, one.rows, one.metric) == (8, 8, "accuracy")
    assert one.loss == pytest.approx(all_at_once.loss, rel=1e-5)
    best = [scorer.scores(scorer.encode([e]))[0].argmax() for e in examples]
    assert one.predictions == [e.options[int(i)] for e, i in zip(examples, best, strict=True)]


def test_long_options_take_their_room(tiny_opt: Any, tokenizer: Any) -> None:
    long = " ".join(f"film{i}" for i in range(60))
    offered = ("good", "the story is wonderful and the end is very good")
    scorer = Scorer(tiny_opt, tokenizer, task(), max_length=40)
    batch = scorer.encode(rows([long], [offered]))
    length = batch["attention_mask"].sum(-1).max() + 1  # the last token is only predicted
    assert 36 <= length <= 40
    short = scorer.encode(rows([long], [("good", "bad")]))
    assert 36 <= short["attention_mask"].sum(-1).max() + 1 <= 40
    with pytest.raises(UserError, match=rf"rows\.jsonl:1: the text makes \d+ tokens.*{CONTEXT}"):
        Scorer(tiny_opt, tokenizer, task()).prepare(rows(["a"], [("good", long)]))


def test_options_refused(tiny_opt: Any) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fast: Any = PreTrainedTokenizerFast
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "it": 1}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    examples = rows(["a"], [("great", "bad")])
    scorer = Scorer(tiny_opt, fast(tokenizer_object=copy.copy(inner)), task())
    with pytest.raises(
        UserError, match=r"rows\.jsonl:1: option 'bad' and 'great' become the same tokens"
    ):
        scorer.encode(examples)
    inner.normalizer = normalizers.Replace("bad", "")
    scorer = Scorer(tiny_opt, fast(tokenizer_object=inner), task())
    with pytest.raises(UserError, match=r"rows\.jsonl:1: option 'bad' becomes no token"):
        scorer.encode(examples)


def test_a_masked_model_has_no_options() -> None:
    with pytest.raises(UserError, match="mask"):
        Scorer(make_model("bert"), make_tokenizer("wordpiece"), task())


def test_a_model_that_counts_positions_from_its_padding_is_refused(tokenizer: Any) -> None:
    """Of itself it begins at 2, where it is told to begin at 0."""
    from transformers import RobertaConfig, RobertaForCausalLM

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}  # fmt: skip
    model = RobertaForCausalLM(RobertaConfig(vocab_size=1024, is_decoder=True, **small)).eval()
    with pytest.raises(UserError, match="RobertaForCausalLM counts positions from its padding"):
        Scorer(model, tokenizer, Task("{text} It was", {"neg": "bad", "pos": "good"}))
