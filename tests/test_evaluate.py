"""The batched scores are held to an oracle that feeds one choice at a time, token by token."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace
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


def test_rows_that_are_shortened_are_counted(tiny_opt: Any, tokenizer: Any) -> None:
    said: list[str] = []
    some = rows(["a film", LONG, LONG])
    scorer = Scorer(tiny_opt, tokenizer, Task("{text} It was", SINGLE), max_length=20)
    scorer.prepare(some[:2], said.append)
    scorer.prepare(some, said.append)
    scorer.prepare(some, said.append)
    which = (
        "rows are longer than max_length (20 tokens): the text of their longest field was shortened"
    )
    assert said == [f"note: 1 of 2 {which}", f"note: 1 of 1 {which}"]


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


# --------------------------------------------------------------------------------- options and texts

OPTIONS = [("great", "not good at all"), ("bad", "not", "not good", "very good"), ("good", "bad")]


def choices(texts: list[str] = TEXTS[:3]) -> list[Example]:
    """Rows with different numbers of options."""
    return [
        Example({"text": text}, offered[0], "rows.jsonl", i + 1, offered, ((offered[0],),))
        for i, (text, offered) in enumerate(zip(texts, OPTIONS, strict=True))
    ]


def written() -> list[Example]:
    return [
        Example({"text": text}, "very good", "rows.jsonl", i + 1, answers=(("very good",), ("x",)))
        for i, text in enumerate(TEXTS[:3])
    ]


CHOICE = Task("{text} It was", kind="choice", score="mean")
WRITING = Task("{text} It was", kind="generation", loss="vocabulary", max_new_tokens=5)


def test_which_answers_a_batch_has(tiny_model: Any, tokenizer: Any) -> None:
    scorer = Scorer(tiny_model, tokenizer, CHOICE)
    every, right, none = (scorer.encode(choices(), which) for which in ("all", "right", "none"))  # type: ignore[arg-type]
    assert every["present"].tolist() == [[True] * 2 + [False] * 2, [True] * 4, [True] * 2 + [False] * 2]  # fmt: skip
    assert right["present"].shape == none["present"].shape == (3, 1)
    assert none["read_token"].shape == (3, 0)
    lengths = none["attention_mask"].sum(-1).tolist()
    assert lengths == [scorer.length(example) for example in choices()]
    scores, alone = scorer.scores(every), scorer.scores(right)
    torch.testing.assert_close(scores[:, :1], alone, atol=1e-5, rtol=1e-5)
    assert scorer.examples(every)[1].options == OPTIONS[1]
    labelled = Scorer(tiny_model, tokenizer, Task("{text} It was", SINGLE))
    for which in ("right", "none"):  # words that all rows share
        batch = labelled.encode(rows(), which)  # type: ignore[arg-type]
        assert batch["present"].shape == (len(TEXTS), 2)
        assert batch.keys() == labelled.encode(rows()).keys()
    texts = Scorer(tiny_model, tokenizer, WRITING)
    assert texts.encode_training(written())["read_token"].shape[1] >= 2
    assert texts.encode(written(), "none")["read_token"].shape[1] == 0


def test_evaluating_texts(tiny_model: Any, tokenizer: Any) -> None:
    told = Scorer(tiny_model, tokenizer, WRITING).evaluate(written(), 2)
    assert (told.metric, list(told.metrics)) == ("f1", ["f1"])
    both = replace(WRITING, metrics=("exact_match", "f1"))
    made = told.predictions[0]
    examples = [
        Example(e.fields, "very good", e.file, e.line, answers=((made,), ("very good",)))
        for e in written()
    ]
    found = Scorer(tiny_model, tokenizer, both).evaluate(examples, 2)
    assert found.predictions == told.predictions
    assert found.metric == "exact_match"
    assert found.value == found.accuracy == found.metrics["exact_match"] >= 1 / 3
    assert found.forwards == told.forwards > 2
    assert math.isclose(found.loss, told.loss, rel_tol=1e-6)


@pytest.mark.parametrize("kind", ["choice", "generation"])
def test_masked_models_only_fill_in(kind: Any) -> None:
    task = Task("{text} It was", kind=kind, loss="vocabulary")
    with pytest.raises(UserError, match="mask"):
        Scorer(make_model("bert"), make_tokenizer("wordpiece"), task)


# ------------------------------------------------------------------------------------ demonstrations

SHOTS = rows(["dull", "a film", "music"])  # bad, great, bad


def with_shots(model: Any, tokenizer: Any, task: Task, **keys: Any) -> Scorer:
    return Scorer(model, tokenizer, task, demonstrations=keys.pop("shots", SHOTS), **keys)


@pytest.mark.parametrize("separator", ["\n\n", " | ", ""])
def test_demonstrations_come_before_the_row(
    tiny_model: Any, tokenizer: Any, separator: str
) -> None:
    task = Task("{text} It was", SINGLE, separator=separator)
    scorer = with_shots(tiny_model, tokenizer, task)
    examples = rows(["the end"])
    texts = ["dull It was bad", "a film It was great", "music It was bad", "the end It was"]
    assert shown(scorer, tokenizer, examples[0]) == separator.join(texts)
    assert scorer.prompts.demonstrations_shown == [3]
    before = separator.join([*texts[:3], ""])
    whole = rows([before + "the end"])
    bare = Scorer(tiny_model, tokenizer, Task("{text} It was", SINGLE))
    torch.testing.assert_close(
        scorer.scores(scorer.encode(examples)), bare.scores(bare.encode(whole))
    )


def test_special_tokens_stand_before_all_demonstrations(tiny_llama: Any) -> None:
    scorer = with_shots(tiny_llama, make_tokenizer("metaspace"), Task("{text} It was", SINGLE))
    ids = scorer.encode(rows(["a film"]))["input_ids"][0].tolist()
    assert ids[0] == 1
    assert (ids.count(1), ids.count(2)) == (1, 0)


def test_demonstrations_of_the_other_kinds(tiny_opt: Any, tokenizer: Any) -> None:
    sentences = ("so it is great", "so it is bad")
    shot = Example({"text": "a"}, "Bo", "f", 1, ("Ann", "Bo"), (("Bo",),), sentences)
    scorer = with_shots(tiny_opt, tokenizer, CHOICE, shots=[shot, choices()[1]])
    batch = scorer.encode([choices()[0]], "none")
    assert tokenizer.decode(batch["input_ids"][0]) == (
        "a It was so it is bad\n\nbad It was bad\n\na fine film It was"
    )
    scorer = with_shots(tiny_opt, tokenizer, WRITING, shots=written()[:1])
    batch = scorer.encode(written()[1:2], "none")
    assert tokenizer.decode(batch["input_ids"][0]) == "a fine film It was very good\n\nbad It was"


@pytest.mark.parametrize("task", [Task("{text} It was", SEVERAL), CHOICE, WRITING], ids=lambda t: t.kind)  # fmt: skip
def test_as_many_demonstrations_as_fit(tiny_opt: Any, tokenizer: Any, task: Task) -> None:
    """The first are left out; one more would not fit; where none fits, the row stands alone."""
    pool = {"classification": rows(labels=SEVERAL), "choice": choices(), "generation": written()}
    shots, example = pool[task.kind][:3], pool[task.kind][1]
    texts = [scorer_text(tokenizer, task, shot) for shot in shots]
    counts = []
    for max_length in (12, 15, 20, 25, 30, 35, 40, 50, CONTEXT):
        scorer = with_shots(tiny_opt, tokenizer, task, shots=shots, max_length=max_length)
        prompt = tokenizer.decode(scorer.prompts.rows([example])[0].prompt)
        [count] = scorer.prompts.demonstrations_shown
        expected = "\n\n".join([*texts[3 - count :], "bad It was"])
        assert prompt == expected
        options = example.options or tuple(task.labels.values())
        answers = [f" {option}" for option in options] or [""]
        room = max(len(tokenizer(answer)["input_ids"]) for answer in answers) if options else 5
        assert len(tokenizer(expected)["input_ids"]) + room <= max_length
        if count < 3:
            more = "\n\n".join([texts[2 - count], expected])
            assert len(tokenizer(more)["input_ids"]) + room > max_length
        counts.append(count)
    assert counts == sorted(counts)
    assert counts[-1] == 3
    assert len(set(counts)) >= 3


@pytest.mark.parametrize("separator", [" ", ". ", "\n\n"])
def test_demonstrations_that_are_shorter_joined_up_fit(tiny_opt: Any, separator: str) -> None:
    """Where each loses tokens to the separator, many lose many."""
    tokenizer = make_tokenizer("metaspace")
    task = Task("{text} was", {"neg": "bad", "pos": "good"}, separator=separator)
    shots = [Example({"text": "it"}, "pos", "rows.csv", i) for i in range(12)]
    text = "it was good"
    for max_length in range(20, CONTEXT + 1):
        scorer = with_shots(tiny_opt, tokenizer, task, shots=shots, max_length=max_length)
        scorer.prompts.rows([Example({"text": "the end"}, "neg", "rows.csv", 2)])
        whole = [separator.join([*[text] * count, "the end was"]) for count in range(13)]
        lengths = [1 + len(scorer.prompts._bare(one)) + scorer.prompts.after for one in whole]
        fit = max(count for count, length in enumerate(lengths) if length <= max_length)
        assert scorer.prompts.demonstrations_shown == [fit]


def scorer_text(tokenizer: Any, task: Task, example: Example) -> str:
    word = task.labels.get(example.label, example.label)
    return f"{example.fields['text'].rstrip()} It was {word}"


def test_demonstrations_do_not_save_a_row_that_is_too_long(tiny_opt: Any, tokenizer: Any) -> None:
    task = Task("{text} It was", SINGLE)
    with pytest.raises(UserError, match=r"rows\.csv:2: the text makes \d+ tokens"):
        with_shots(tiny_opt, tokenizer, task).prepare(rows([LONG]))
    scorer = with_shots(tiny_opt, tokenizer, task, max_length=30)
    assert shown(scorer, tokenizer, rows([LONG])[0]).endswith(" It was")
    assert scorer.prompts.demonstrations_shown == [0]


# ---------------------------------------------------------------------------------------- calibration


def total(model: Any, ids: list[int], word: list[int]) -> float:
    """Log-likelihood of a word's tokens after others, one forward of the whole."""
    with torch.no_grad():
        logs = model(torch.tensor([ids + word])).logits[0].double().log_softmax(-1)
    return sum(float(logs[len(ids) + i - 1, token]) for i, token in enumerate(word))


@pytest.mark.parametrize("null", [None, " It was", "Then", ""])
@pytest.mark.parametrize("kind", ["bytelevel", "metaspace"])
def test_calibration_is_as_defined(kind: str, null: str | None) -> None:
    model, tokenizer = make_model("opt"), make_tokenizer(kind)
    task = Task("{text} It was", SEVERAL, null=null)
    # not the empty text, which is the null prompt itself
    examples = rows([text * n for n in (1, 2, 3) for text in TEXTS if text], SEVERAL)
    plain, scorer = Scorer(model, tokenizer, task), Scorer(model, tokenizer, task, calibrate=True)
    bare = tokenizer(" It was" if null is None else null, add_special_tokens=False)["input_ids"]
    start = [*plain.prompts.before, *bare] or [tokenizer.eos_token_id]
    nothing = torch.tensor([total(model, start, word) for word in plain.prompts.words])
    calibrated = plain.scores(plain.encode(examples)) - nothing
    expected = [list(SEVERAL)[i] for i in calibrated.argmax(1).tolist()]
    found, before = scorer.evaluate(examples, 4), plain.evaluate(examples, 4)
    assert found.predictions == expected
    assert found.predictions != before.predictions
    assert found.loss == before.loss
    assert found.forwards == 2 * before.forwards  # one of the rows, one of the null prompt


@pytest.mark.parametrize("score", ["sum", "mean"])
def test_calibration_counts_what_the_model_reads(
    tiny_llama: Any, tokenizer: Any, score: Any
) -> None:
    """Also where prompts are shared; the rows are read again only for sums that the score is not."""
    task = Task("{text} It was", APART, score=score, null=" It was")
    examples = rows([f"{i} " + "a fine film " * 9 for i in range(9)], APART)
    calls: list[int] = []
    hook = tiny_llama.register_forward_hook(lambda *_: calls.append(1))
    plain = Scorer(tiny_llama, tokenizer, task).evaluate(examples, 9)
    assert plain.forwards == len(calls) == 2  # the prompts, and the beginnings of answers behind
    calls.clear()
    found = Scorer(tiny_llama, tokenizer, task, calibrate=True).evaluate(examples, 9)
    hook.remove()
    assert found.forwards == len(calls) == (3 if score == "sum" else 5)


def test_calibration_of_options(tiny_llama: Any, tokenizer: Any) -> None:
    """By sums whatever the score is; each row has a null prompt and options of its own."""
    task = Task("{text} {word}", kind="choice", score="mean", null="{word}")
    offers = [
        ("bad", "very bad film"),
        ("bad", "the film", "great"),
        ("not good", "bad", "a", "dull"),
    ]
    examples = [
        Example({"text": text, "word": word}, "bad", "f", i, offered, (("bad",),))
        for i, (word, offered) in enumerate(itertools.product(["so", "because", "and"], offers))
        for text in TEXTS
    ]
    scorer = Scorer(tiny_llama, tokenizer, task, calibrate=True)
    expected = []
    for example in examples:
        prompt = tokenizer(f"{example.fields['text']} {example.fields['word']}")["input_ids"]
        null = tokenizer(example.fields["word"])["input_ids"]
        words = [tokenizer(f" {option}")["input_ids"] for option in example.options]
        gains = [total(tiny_llama, prompt, w) - total(tiny_llama, null, w) for w in words]
        expected.append(example.options[gains.index(max(gains))])
    assert scorer.evaluate(examples, 4).predictions == expected
    assert Scorer(tiny_llama, tokenizer, task).evaluate(examples, 4).predictions != expected


def test_nothing_to_begin_with(tiny_opt: Any, tokenizer: Any) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.eos_token = None
    scorer = Scorer(tiny_opt, bare, Task("{text} It was", SINGLE, null=""), calibrate=True)
    with pytest.raises(UserError, match="null '' becomes no token, and the tokenizer has none"):
        scorer.evaluate(rows(), 2)


def test_what_masked_models_and_texts_refuse(tiny_opt: Any, tokenizer: Any) -> None:
    model, words = make_model("bert"), make_tokenizer("wordpiece")
    task = Task("{text} It was {mask}.", SINGLE)
    with pytest.raises(UserError, match="a masked model is not trained for: use a causal model"):
        with_shots(model, words, task).encode(rows())
    with pytest.raises(UserError, match="calibration is for causal models"):
        Scorer(model, words, task, calibrate=True).evaluate(rows(), 2)
    with pytest.raises(UserError, match="calibration is of the scores of choices"):
        Scorer(tiny_opt, tokenizer, WRITING, calibrate=True)


# ------------------------------------------------------------------------------------------ the head


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_head_gets_its_input_in_one_piece(architecture: str) -> None:
    """However often a scorer is made, and whatever is no tensor."""
    model, tokenizer = make_model(architecture), make_tokenizer("metaspace")
    task = Task("{text} It was", SINGLE)
    scorer = Scorer(model, tokenizer, task)
    head: Any = model.get_output_embeddings()
    seen: list[bool] = []
    head.register_forward_pre_hook(lambda module, args: seen.append(args[0].is_contiguous()))
    scorer.scores(scorer.encode(rows()))
    assert seen == [True]
    count = len(head._forward_pre_hooks)
    Scorer(model, tokenizer, task)
    assert len(head._forward_pre_hooks) == count
    own = next(iter(head._forward_pre_hooks.values()))
    whole, rest = own(head, (torch.zeros(3, 4).T, None))
    assert whole.is_contiguous()
    assert rest is None
