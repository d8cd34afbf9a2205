"""The batched scores are held to an oracle that feeds one choice at a time, token by token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import ARCHITECTURES, CONTEXT, make_model, make_tokenizer
from justforward.data import Example
from justforward.errors import UserError
from justforward.evaluate import Scorer
from justforward.tasks import Task

SINGLE = {"neg": "bad", "pos": "great"}
SEVERAL = {"neg": "not good at all", "pos": "great", "mid": "not", "far": "not good", "x": "bad"}
# two beginnings, of different length, that no single row shows
APART = {"a": "very good", "b": "great", "c": "not good at all", "d": "not"}
TEXTS = ["a fine film", "bad", "", "the story is wonderful , the music is great", "dull é film  "]


def rows(texts: list[str] = TEXTS, labels: dict[str, str] = SINGLE) -> list[Example]:
    names = list(labels)
    return [
        Example({"text": text}, names[i % len(names)], "rows.csv", i + 2)
        for i, text in enumerate(texts)
    ]


def oracle(model: Any, tokenizer: Any, task: Task, example: Example) -> list[float]:
    """Log-likelihood of each choice: the text as a whole is tokenised, tokens are fed one by one
    more each time, no padding, no mask."""
    prompt = task.prompt(example.fields).rstrip()
    start = [1] if tokenizer.bos_token_id is not None else []
    context = start + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    scores = []
    for word in task.labels.values():
        whole = start + tokenizer(f"{prompt} {word}", add_special_tokens=False)["input_ids"]
        assert whole[: len(context)] == context
        total = 0.0
        for i in range(len(context), len(whole)):
            with torch.no_grad():
                logits = model(torch.tensor([whole[:i]])).logits[0, -1]
            total += float(logits.double().log_softmax(-1)[whole[i]])
        scores.append(total)
    return scores


@pytest.mark.parametrize("labels", [SINGLE, SEVERAL, APART], ids=["single", "several", "apart"])
@pytest.mark.parametrize("kind", ["bytelevel", "metaspace"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_are_the_oracles(architecture: str, kind: str, labels: dict[str, str]) -> None:
    model, tokenizer = make_model(architecture), make_tokenizer(kind)
    task = Task("{text} It was", labels)
    examples = rows(labels=labels)
    scorer = Scorer(model, tokenizer, task)
    together = scorer.scores(scorer.encode(examples))
    assert together.dtype == torch.float32
    assert together.shape == (len(examples), len(labels))
    for example, row in zip(examples, together, strict=True):
        expected = torch.tensor(oracle(model, tokenizer, task, example))
        torch.testing.assert_close(row, expected, atol=2e-4, rtol=1e-5)
        alone = scorer.scores(scorer.encode([example]))[0]
        torch.testing.assert_close(row, alone, atol=1e-4, rtol=1e-5)


@settings(max_examples=25)
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=12), min_size=1, max_size=4),
    kind=st.sampled_from(["bytelevel", "metaspace"]),
)
def test_any_text_scores_alike_in_any_company(texts: list[str], kind: str) -> None:
    model, tokenizer = make_model("llama"), make_tokenizer(kind)
    scorer = Scorer(model, tokenizer, Task("{text} It was", SEVERAL))
    examples = rows(texts, SEVERAL)
    try:
        together = scorer.scores(scorer.encode(examples))
    except UserError as error:  # bytes as tokens make twelve characters long
        if "context" not in str(error):
            raise
        return
    for i, example in enumerate(examples):
        alone = scorer.scores(scorer.encode([example]))[0]
        torch.testing.assert_close(together[i], alone, atol=1e-4, rtol=1e-5)


def test_batch_shapes_rows_first(tiny_model: Any, tokenizer: Any) -> None:
    scorer = Scorer(tiny_model, tokenizer, Task("{text} It was", SINGLE))
    batch = scorer.encode(rows())
    assert batch["input_ids"].dim() == 2
    assert {tensor.shape[0] for tensor in batch.values()} == {len(TEXTS)}
    # "not good at all" shows the beginnings of "not good" and "not" as well
    scorer = Scorer(tiny_model, tokenizer, Task("{text} It was", SEVERAL))
    assert scorer.encode(rows())["input_ids"].dim() == 2
    apart = {"a": "not good", "b": "very good", "c": "great"}
    scorer = Scorer(tiny_model, tokenizer, Task("{text} It was", apart))
    batch = scorer.encode(rows(labels=apart))
    assert batch["input_ids"].shape[:2] == (len(TEXTS), 2)
    assert {tensor.shape[0] for tensor in batch.values()} == {len(TEXTS)}


def test_doubled_batch_gives_doubled_losses(tiny_model: Any, tokenizer: Any) -> None:
    """What the activation-space estimator does to a batch."""
    task = Task("{text} It was", {"a": "not good", "b": "very good", "c": "great"})
    scorer = Scorer(tiny_model, tokenizer, task)
    batch = scorer.encode(rows(labels=task.labels))
    losses = scorer.losses(batch)
    doubled = scorer.losses({name: torch.cat([t, t]) for name, t in batch.items()})
    torch.testing.assert_close(doubled, torch.cat([losses, losses]), atol=1e-5, rtol=1e-5)
    assert losses.shape == (len(TEXTS),)
    assert not losses.requires_grad


def test_the_two_losses(tiny_model: Any, tokenizer: Any) -> None:
    examples = rows(labels=SEVERAL)
    task = Task("{text} It was", SEVERAL)
    scorer = Scorer(tiny_model, tokenizer, task)
    batch = scorer.encode(examples)
    scores = scorer.scores(batch)
    expected = torch.nn.functional.cross_entropy(scores, batch["label"], reduction="none")
    torch.testing.assert_close(scorer.losses(batch), expected)
    scorer = Scorer(tiny_model, tokenizer, Task("{text} It was", SEVERAL, loss="vocabulary"))
    own = -scores[torch.arange(len(examples)), batch["label"]]
    torch.testing.assert_close(scorer.losses(scorer.encode(examples)), own)


def test_only_the_needed_positions_reach_the_head(tiny_llama: Any, tokenizer: Any) -> None:
    seen: list[torch.Size] = []
    tiny_llama.lm_head.register_forward_hook(lambda _m, args, _out: seen.append(args[0].shape))
    scorer = Scorer(tiny_llama, tokenizer, Task("{text} It was", SINGLE))
    scorer.scores(scorer.encode(rows()))
    assert [shape[1] for shape in seen] == [1]


def test_a_model_without_logits_to_keep(tiny_llama: Any, tokenizer: Any) -> None:
    task = Task("{text} It was", SEVERAL)
    scorer = Scorer(tiny_llama, tokenizer, task)
    batch = scorer.encode(rows(labels=SEVERAL))
    expected = scorer.scores(batch)
    scorer.prompts.accepts = scorer.prompts.accepts - {"logits_to_keep"}
    torch.testing.assert_close(scorer.scores(batch), expected)


def test_evaluate_keeps_the_order(tiny_model: Any, tokenizer: Any) -> None:
    model = tiny_model.train()
    scorer = Scorer(model, tokenizer, Task("{text} It was", SINGLE))
    examples = rows([text * n for n in (1, 3, 2) for text in TEXTS])
    small, large = scorer.evaluate(examples, 2), scorer.evaluate(examples, 64)
    assert model.training
    model.eval()
    assert (small.rows, small.forwards, large.forwards) == (15, 8, 1)
    scores = torch.cat([scorer.scores(scorer.encode([example])) for example in examples])
    expected = [list(SINGLE)[i] for i in scores.argmax(1).tolist()]
    assert small.predictions == large.predictions == expected
    right = [p == e.label for p, e in zip(expected, examples, strict=True)]
    assert small.accuracy == sum(right) / len(right)
    losses = [scorer.losses(scorer.encode([example])).item() for example in examples]
    assert math.isclose(small.loss, sum(losses) / len(losses), rel_tol=1e-5)
    assert math.isclose(small.loss, large.loss, rel_tol=1e-5)


def test_broken_weights_are_said(tiny_opt: Any, tokenizer: Any) -> None:
    with torch.no_grad():
        tiny_opt.lm_head.weight.fill_(math.nan)
    scorer = Scorer(tiny_opt, tokenizer, Task("{text} It was", SINGLE))
    with pytest.raises(UserError, match=r"rows\.csv:\d+: the scores are not finite"):
        scorer.evaluate(rows(), 2)


# ----------------------------------------------------------------------------------------- joining


@pytest.mark.parametrize("ending", ["", " ", " It was", " It was  ", ":\n", ":\n\n", ":\n "])
def test_word_follows_as_the_text_would_be_tokenised(any_tokenizer: Any, ending: str) -> None:
    scorer = Scorer(make_model("opt"), any_tokenizer, Task("{text}" + ending, SINGLE))
    prompt, join = "a fine film" + ending.rstrip(" "), "" if "\n" in ending else " "
    scorer.prepare(examples := rows(["a fine film  " if not ending.strip() else "a fine film"]))
    [start] = [row.prompt for row in scorer.prompts.rows(examples)]
    for word, tokens in zip(SINGLE.values(), scorer.prompts.words, strict=True):
        whole = any_tokenizer(prompt + join + word, add_special_tokens=False)["input_ids"]
        assert start + tokens == scorer.prompts.before + whole


def test_special_tokens_once(tiny_llama: Any) -> None:
    tokenizer = make_tokenizer("metaspace")
    for template in ("{text} It was", "<s>{text} It was"):
        scorer = Scorer(tiny_llama, tokenizer, Task(template, SINGLE))
        ids = scorer.encode(rows(["a film"]))["input_ids"][0].tolist()
        assert ids.count(1) == 1  # <s>
        assert ids[0] == 1
        assert 2 not in ids  # </s>, which this tokenizer puts after a text


@pytest.mark.parametrize(
    "labels",
    [
        {"a": "\U0001f600", "b": "\U0001f601"},
        {"a": "good", "b": "good\u200b"},
        {"a": "x", "b": "xy"},
    ],
)
def test_odd_words_score(any_tokenizer: Any, labels: dict[str, str]) -> None:
    scorer = Scorer(make_model("opt"), any_tokenizer, Task("{text} It was", labels))
    assert scorer.scores(scorer.encode(rows(labels=labels))).isfinite().all()


def test_words_that_are_the_same_tokens_are_refused(tiny_opt: Any) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fast: Any = PreTrainedTokenizerFast
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "it": 1}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = fast(tokenizer_object=inner, unk_token="<unk>")
    with pytest.raises(UserError, match="'bad' and 'great' become the same tokens"):
        Scorer(tiny_opt, tokenizer, Task("{text} it", SINGLE))
    inner.normalizer = normalizers.Replace("bad", "")
    tokenizer = fast(tokenizer_object=inner, unk_token="<unk>")
    with pytest.raises(UserError, match="'bad' becomes no token"):
        Scorer(tiny_opt, tokenizer, Task("{text} it", SINGLE))


def test_a_foreign_tokenizer_is_refused(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="belongs to the model"):
        Scorer(make_model("gpt2", vocab_size=300), tokenizer, Task("{text} It was", SINGLE))
    scorer = Scorer(
        make_model("gpt2", vocab_size=300), tokenizer, Task("{text}", {"neg": "b", "pos": "c"})
    )
    with pytest.raises(UserError, match=r"rows\.csv:2: token \d+ where the model knows 300"):
        scorer.encode(rows(["wonderful story music great"]))


# --------------------------------------------------------------------------------------- truncation

LONG = " ".join(f"film{i}" for i in range(60))


def shown(scorer: Scorer, tokenizer: Any, example: Example) -> str:
    batch = scorer.encode([example])
    ids = batch["input_ids"][0][batch["attention_mask"][0].bool()].tolist()
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def test_a_text_beyond_the_context_is_refused(tiny_model: Any, any_tokenizer: Any) -> None:
    scorer = Scorer(tiny_model, any_tokenizer, Task("{text} It was", SINGLE))
    with pytest.raises(
        UserError, match=rf"rows\.csv:3: the text makes \d+ tokens .* {CONTEXT}: .*max_length"
    ):
        scorer.prepare(rows(["short", LONG]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_keeps_the_template(tiny_model: Any, any_tokenizer: Any, side: Any) -> None:
    task = Task("Film: {text} It was", SINGLE, truncation=side)
    for max_length in (20, 33, CONTEXT):
        scorer = Scorer(tiny_model, any_tokenizer, task, max_length=max_length)
        text = shown(scorer, any_tokenizer, rows([LONG])[0]).strip()
        assert text.startswith("Film: ")
        assert text.endswith(" It was")
        kept = text.removeprefix("Film: ").removesuffix(" It was")
        assert kept
        assert LONG.startswith(kept) if side == "right" else LONG.endswith(kept)
        used = scorer.encode(rows([LONG]))["input_ids"].shape[1] + 1
        assert max_length - 3 <= used <= max_length
        assert shown(scorer, any_tokenizer, rows(["a film"])[0]).strip() == "Film: a film It was"
        assert scorer.scores(scorer.encode(rows([LONG]))).isfinite().all()


@given(
    st.text(st.characters(codec="utf-8"), max_size=60),
    st.text(st.characters(codec="utf-8"), max_size=60),
    st.sampled_from(["left", "right"]),
    st.integers(14, 40),
)
def test_truncation_always_fits(a: str, b: str, side: Any, max_length: int) -> None:
    tokenizer = make_tokenizer("bytelevel")
    task = Task("{a} and {b} and {a}", SINGLE, truncation=side)
    scorer = Scorer(make_model("opt"), tokenizer, task, max_length=max_length)
    example = Example({"a": a, "b": b}, "neg", "rows.csv", 2)
    assert scorer.encode([example])["input_ids"].shape[1] < max_length


def test_the_longest_field_gives_way(tiny_opt: Any, tokenizer: Any) -> None:
    task = Task("{a} Question: {b}?", SINGLE)
    scorer = Scorer(tiny_opt, tokenizer, task, max_length=40)
    text = shown(scorer, tokenizer, Example({"a": LONG, "b": "was it good"}, "neg", "f", 1))
    assert text.endswith(" Question: was it good?")
    assert text.startswith("film0 film1")


@pytest.mark.parametrize(
    ("max_length", "said"),
    [(0, "below 1"), (CONTEXT + 1, "beyond the model's context"), (2, "leaves no room")],
)
def test_max_length_refused(tiny_model: Any, tokenizer: Any, max_length: int, said: str) -> None:
    with pytest.raises(UserError, match=f"max_length {max_length} {said}|max_length.*{said}"):
        Scorer(tiny_model, tokenizer, Task("{text} It was", SINGLE), max_length=max_length)


def test_no_rows_no_batch_no_prompt(tiny_opt: Any, tokenizer: Any) -> None:
    scorer = Scorer(tiny_opt, tokenizer, Task("{text}", SINGLE))
    with pytest.raises(UserError, match="no rows to encode"):
        scorer.encode([])
    with pytest.raises(UserError, match="no rows to evaluate"):
        scorer.evaluate([], 2)
    with pytest.raises(UserError, match="batch_size 0"):
        scorer.evaluate(rows(), 0)
    with pytest.raises(UserError, match=r"rows\.csv:2: the prompt becomes no token"):
        scorer.encode(rows([" "]))
    with pytest.raises(UserError, match=r"x\.csv:1: label 'odd' has no word"):
        scorer.encode([Example({"text": "a"}, "odd", "x.csv", 1)])
