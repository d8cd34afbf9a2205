"""Encoder-decoders, held to the bare transformers model that is given one row and one answer at a time.

Reading order: scores, answers written, lengths, looks, other families, the command line, what is refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import justforward as jf
from conftest import CONTEXT, SEQ2SEQ, check_alone_and_together, make_model, make_tokenizer
from justforward import causal, tuners
from justforward import generate as generate_module
from justforward.cli import main
from justforward.config import TrainConfig
from justforward.data import Example
from justforward.errors import UserError
from justforward.evaluate import Scorer
from justforward.generate import Sampling
from justforward.masked import MaskedPrompts
from justforward.models import is_masked, is_seq2seq, load_model, save_model
from justforward.probe import hidden_states
from justforward.seq2seq import Seq2SeqPrompts
from justforward.tasks import Task
from justforward.trunk import Trunk

KINDS = sorted(SEQ2SEQ)
TEMPLATE = "{text} It was"
WORDS = {"neg": "not good at all", "pos": "great", "mid": "not great"}
TEXTS = ["a fine film", "bad", "", "the story is wonderful , the music is great", "dull  "]
# rows with two, four and three options, of one token and of several, some of which begin alike
OPTIONS = [
    ("great", "not good at all"),
    ("bad", "not", "not good", "very good"),
    ("the end is very good", "the end is bad", "wonderful"),
    ("good", "bad"),
    ("good film", "good"),
]


def rows(texts: Sequence[str] = TEXTS, labels: dict[str, str] = WORDS) -> list[Example]:
    names = list(labels)
    return [
        Example({"text": text}, names[i % len(names)], "rows.csv", i + 2)
        for i, text in enumerate(texts)
    ]


def choices(texts: Sequence[str] = TEXTS) -> list[Example]:
    return [
        Example({"text": text}, options[1], "rows.jsonl", i + 1, options, ((options[1],),))
        for i, (text, options) in enumerate(zip(texts, OPTIONS, strict=False))
    ]


def questions(texts: Sequence[str] = TEXTS) -> list[Example]:
    return [
        Example({"text": text}, "very good", "rows.jsonl", i + 1, answers=(("very good",),))
        for i, text in enumerate(texts)
    ]


def generation(**keys: Any) -> Task:
    values = {"max_new_tokens": 10, **keys}
    return Task(TEMPLATE, kind="generation", loss="vocabulary", **values)


@torch.no_grad()
def lively(kind: str) -> Any:
    """A model whose vocabulary is the tokenizer's, and which does not write the same to every text."""
    model = make_model(kind, vocab_size=len(make_tokenizer(SEQ2SEQ[kind])))
    for i, (name, parameter) in enumerate(model.named_parameters()):
        spread = 1.0 if "relative" in name else 0.4
        drawn = jf.noise.normal(3, i, 0, parameter.numel()).view(parameter.shape)
        parameter.add_(drawn, alpha=spread)
    return model


def scorer_of(kind: str, task: Task | None = None, max_length: int | None = None) -> Scorer:
    task = task or Task(TEMPLATE, WORDS)
    return Scorer(lively(kind), make_tokenizer(SEQ2SEQ[kind]), task, max_length)


def labels_of(kind: str, answer: str, end: bool) -> list[int]:
    """An answer as transformers' own training has it: the tokenizer's own tokens, special ones included."""
    tokenizer = make_tokenizer(SEQ2SEQ[kind])
    ids: list[int] = tokenizer(answer)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    return ids if end else ids[:-1]


@torch.no_grad()
def oracle(
    scorer: Scorer, kind: str, text: str, answer: str, *, end: bool = False, mean: bool = False
) -> float:
    """Teacher forcing of one answer, which the model itself shifts to the right; no padding, no mask."""
    tokenizer = make_tokenizer(SEQ2SEQ[kind])
    prompt = f"{text} It was"
    labels = torch.tensor([labels_of(kind, answer, end)])
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    model: Any = jf.models.inner_model(scorer.model)
    given = {"labels": labels}
    if model.config.model_type == "mbart":  # it would take the last of the labels for the first
        start = torch.tensor([[model.config.decoder_start_token_id]])
        given = {"decoder_input_ids": torch.cat([start, labels[:, :-1]], dim=1)}
    output = model(input_ids=ids, **given)
    logs = output.logits[0].double().log_softmax(-1)
    found = logs.gather(1, labels[0, :, None])[:, 0]
    if kind == "bart":  # <s> is put before every answer, and so is no part of it
        assert labels[0, 0] == tokenizer.bos_token_id
        found = found[1:]
    return float(found.mean() if mean else found.sum())


# ------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("most_logits", [2**26, 1], ids=["at once", "one by one"])
@pytest.mark.parametrize("score", ["sum", "mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_labels(
    monkeypatch: pytest.MonkeyPatch, kind: str, score: Any, most_logits: int
) -> None:
    monkeypatch.setattr(causal, "MOST_LOGITS", most_logits)
    scorer = scorer_of(kind, Task(TEMPLATE, WORDS, score=score))
    assert isinstance(scorer.prompts, Seq2SeqPrompts)
    together = scorer.scores(scorer.encode(rows()))
    assert together.dtype == torch.float32
    assert together.shape == (len(TEXTS), len(WORDS))
    for example, found in zip(rows(), together, strict=True):
        text = example.fields["text"]
        expected = [
            oracle(scorer, kind, text, word, mean=score == "mean") for word in WORDS.values()
        ]
        torch.testing.assert_close(found, torch.tensor(expected), atol=1e-3, rtol=1e-5)
        alone = scorer.scores(scorer.encode([example]))[0]
        torch.testing.assert_close(found, alone, atol=1e-3, rtol=1e-5)
    assert together.std(0).min() > 0.01  # the text matters


@pytest.mark.parametrize("score", ["sum", "mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_options(kind: str, score: Any) -> None:
    scorer = scorer_of(kind, Task(TEMPLATE, kind="choice", score=score))
    together = scorer.scores(scorer.encode(choices()))
    assert together.shape == (len(TEXTS), 4)
    for example, found in zip(choices(), together, strict=True):
        text, count = example.fields["text"], len(example.options)
        expected = [
            oracle(scorer, kind, text, option, mean=score == "mean") for option in example.options
        ]
        torch.testing.assert_close(found[:count], torch.tensor(expected), atol=1e-3, rtol=1e-5)
        assert (found[count:] == -torch.inf).all()
    found = scorer.evaluate(choices(), 2)
    best = [e.options[int(s.argmax())] for e, s in zip(choices(), together, strict=True)]
    assert found.predictions == best
    assert (found.rows, found.forwards) == (5, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_losses(kind: str) -> None:
    """Cross-entropy over the choices; the negative log-likelihood of the right one; of an answer, with its end."""
    scorer = scorer_of(kind)
    batch = scorer.encode_training(rows())
    expected = torch.nn.functional.cross_entropy(
        scorer.scores(batch), batch["label"], reduction="none"
    )
    torch.testing.assert_close(scorer.losses(batch), expected)
    by_words = scorer_of(kind, Task(TEMPLATE, WORDS, loss="vocabulary"))
    for example, loss in zip(
        rows(), by_words.losses(by_words.encode_training(rows())), strict=True
    ):
        wanted = -oracle(by_words, kind, example.fields["text"], WORDS[example.label])
        torch.testing.assert_close(loss, torch.tensor(wanted), atol=1e-3, rtol=1e-5)
    written = scorer_of(kind, generation())
    for example, loss in zip(
        questions(), written.losses(written.encode_training(questions())), strict=True
    ):
        wanted = -oracle(written, kind, example.fields["text"], "very good", end=True)
        torch.testing.assert_close(loss, torch.tensor(wanted), atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_calibration(kind: str) -> None:
    """What the choices have where the text is left out is taken off."""
    task = Task(TEMPLATE, WORDS, null=" It was")
    scorer = Scorer(lively(kind), make_tokenizer(SEQ2SEQ[kind]), task, calibrate=True)
    found = scorer.evaluate(rows(), 3)
    null = torch.tensor([oracle(scorer, kind, "", word) for word in WORDS.values()])
    plain = torch.tensor(
        [[oracle(scorer, kind, text, word) for word in WORDS.values()] for text in TEXTS]
    )
    assert found.predictions == [list(WORDS)[i] for i in (plain - null).argmax(1).tolist()]
    assert (plain - null).argmax(1).tolist() != plain.argmax(1).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_is_read_once_for_all_its_answers(kind: str) -> None:
    scorer = scorer_of(kind)
    model: Any = scorer.model
    batch = scorer.encode(rows())
    seen: list[tuple[int, ...]] = []
    body = model if kind == "t5" else model.model
    for part in (body.encoder, body.decoder):
        norm = part.block[0] if kind == "t5" else part.layers[0]
        norm.register_forward_hook(lambda _m, args, _out: seen.append(tuple(args[0].shape[:2])))
    scorer.scores(batch)
    count, sequences, length = batch["decoder_input_ids"].shape
    assert sequences == len(causal.plan(scorer.prompts.words).shown) < len(WORDS)
    assert seen == [tuple(batch["input_ids"].shape), (count * sequences, length)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_rows_first_with_the_texts_end_and_padded_on_the_right(kind: str) -> None:
    scorer, tokenizer = scorer_of(kind), make_tokenizer(SEQ2SEQ[kind])
    batch = scorer.encode(rows())
    assert {tensor.shape[0] for tensor in batch.values()} == {len(TEXTS)}
    for text, ids, shown in zip(TEXTS, batch["input_ids"], batch["attention_mask"], strict=True):
        count = int(shown.sum())
        assert shown.tolist() == [1] * count + [0] * (len(shown) - count)
        assert ids[:count].tolist() == tokenizer(f"{text} It was")["input_ids"]
        assert ids[count - 1] == tokenizer.eos_token_id
        assert set(ids[count:].tolist()) <= {tokenizer.pad_token_id}
    assert 0 in batch["attention_mask"]
    prefix = {"t5": [0], "bart": [2, 0]}[kind]
    assert (batch["decoder_input_ids"][..., : len(prefix)] == torch.tensor(prefix)).all()


@settings(max_examples=15)
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=10), min_size=1, max_size=4),
    kind=st.sampled_from(KINDS),
)
def test_any_text_scores_alike_in_any_company(texts: list[str], kind: str) -> None:
    check_alone_and_together(scorer_of(kind), rows(texts), atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_demonstrations_are_read_by_the_encoder(kind: str) -> None:
    shown = rows(["the end", "a bad film"])
    tokenizer, task = make_tokenizer(SEQ2SEQ[kind]), Task(TEMPLATE, WORDS, separator=" . ")
    scorer = Scorer(lively(kind), tokenizer, task, demonstrations=shown)
    example = rows(["dull"])[0]
    text = "the end It was not good at all . a bad film It was great . dull"
    expected = [oracle(scorer, kind, text, word) for word in WORDS.values()]
    found = scorer.scores(scorer.encode([example]))[0]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-3, rtol=1e-5)
    assert scorer.prompts.demonstrations_shown == [2]


# -------------------------------------------------------------------------------------- answers written


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_that_of_transformers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row, without padding; the cache of the decoder is transformers' there and here."""
    seen: list[Tensor] = []
    choose = generate_module._next
    monkeypatch.setattr(
        generate_module, "_next", lambda *given: seen.append(choose(*given)) or seen[-1]
    )
    scorer, tokenizer = scorer_of(kind, generation(stop=("\0",))), make_tokenizer(SEQ2SEQ[kind])
    model: Any = scorer.model
    texts = scorer.predict(scorer.encode(questions(), "none"))
    assert len(set(texts)) > 1
    end, before = tokenizer.eos_token_id, 2 if kind == "bart" else 1
    model.generation_config.forced_bos_token_id = tokenizer.bos_token_id  # BART's answers begin so
    drawn = torch.stack(seen, dim=1).tolist()
    for text, ours, row in zip(texts, drawn, TEXTS, strict=True):
        ids = torch.tensor([tokenizer(f"{row} It was")["input_ids"]])
        out = model.generate(input_ids=ids, max_new_tokens=before + 9, do_sample=False)
        theirs = out[0, before:].tolist()
        theirs = theirs[: theirs.index(end)] if end in theirs else theirs
        assert ours[: len(theirs)] == theirs
        assert text == tokenizer.decode(theirs).strip()


@pytest.mark.parametrize("kind", KINDS)
def test_texts_do_not_see_each_other(kind: str) -> None:
    scorer = scorer_of(kind, generation(stop=("\0",)))
    together = scorer.predict(scorer.encode(questions(), "none"))
    assert together == [scorer.predict(scorer.encode([q], "none"))[0] for q in questions()]
    found = scorer.evaluate(questions(), 2)
    assert found.predictions == together
    warm = Sampling(1.0, seed=5)
    examples = questions()
    drawn = scorer.predict(scorer.encode(examples, "none"), warm)
    assert drawn != together
    some = scorer.predict(scorer.encode([examples[3], examples[0]], "none"), warm)
    assert some == [drawn[3], drawn[0]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_string_ends_a_text(kind: str) -> None:
    whole = scorer_of(kind, generation(stop=("\0",)))
    texts = whole.predict(whole.encode(questions(), "none"))
    row = max(range(len(texts)), key=lambda i: len(texts[i]))
    at = next(i for i in range(1, len(texts[row])) if texts[row][i : i + 1].isascii())
    stop = texts[row][at : at + 2]
    cut = scorer_of(kind, generation(stop=("\0", stop)))
    found = cut.predict(cut.encode(questions(), "none"))
    assert found[row] == texts[row][: texts[row].index(stop)].strip()


# ------------------------------------------------------------------------------------------- lengths

LONG = " ".join(["wonderful", *["film"] * 60, "music"])


def test_the_context_is_what_the_model_can_number() -> None:
    """BART has a table of positions. T5 has none: n_positions says how long its training texts were."""
    scorer = scorer_of("bart")
    around = len(scorer.encode(rows(["a"]))["input_ids"][0]) - 1
    fits, beyond = (" ".join(["a"] * (CONTEXT - around + more)) for more in (0, 1))
    batch = scorer.encode(rows([fits]))
    assert batch["input_ids"].shape == (1, CONTEXT)
    assert scorer.scores(batch).isfinite().all()
    with pytest.raises(UserError, match=rf"rows\.csv:2: the text makes {CONTEXT + 1} tokens, the "):
        scorer.encode(rows([beyond]))
    model = lively("t5")
    model.config.n_positions = 8
    scorer = Scorer(model, make_tokenizer("t5"), Task(TEMPLATE, WORDS))
    batch = scorer.encode(rows([LONG * 3]))
    assert batch["input_ids"].shape[1] > 180
    expected = [oracle(scorer, "t5", LONG * 3, word) for word in WORDS.values()]
    torch.testing.assert_close(
        scorer.scores(batch)[0], torch.tensor(expected), atol=1e-3, rtol=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
def test_truncation_keeps_the_template_and_leaves_answers_alone(kind: str) -> None:
    tokenizer = make_tokenizer(SEQ2SEQ[kind])
    scorer = scorer_of(kind, Task("the film: {text} It was", WORDS), max_length=20)
    batch = scorer.encode(rows([LONG, "a"]))
    count = int(batch["attention_mask"][0].sum())
    assert 17 <= count <= 20
    text = str(tokenizer.decode(batch["input_ids"][0][:count], skip_special_tokens=True))
    assert text.startswith("the film")
    assert text.endswith("It was")
    assert batch["input_ids"][0][count - 1] == tokenizer.eos_token_id
    with pytest.raises(UserError, match=r"max_length 2 leaves no room: the template alone makes"):
        scorer_of(kind, max_length=2)


def test_answers_beyond_the_decoders_positions_are_refused() -> None:
    said = rf"of the decoder's positions .*, and it has {CONTEXT}: give less"
    with pytest.raises(UserError, match=rf"label word '.*' takes \d+ {said}"):
        scorer_of("bart", Task(TEMPLATE, {"a": "great", "b": "film " * 70 + "x"}))
    with pytest.raises(UserError, match=rf"max_new_tokens {CONTEXT} takes 65 {said}"):
        scorer_of("bart", generation(max_new_tokens=CONTEXT))
    scorer_of("bart", generation(max_new_tokens=CONTEXT - 1))
    scorer_of("t5", generation(max_new_tokens=CONTEXT))
    long = Example({"text": "a"}, "b", "f", 7, ("b", "film " * 70), (("b",),))
    with pytest.raises(UserError, match=rf"f:7: an answer takes \d+ {said}"):
        scorer_of("bart", Task(TEMPLATE, kind="choice")).prepare([long])
    answer = Example({"text": "a"}, "film " * 70, "f", 8, answers=(("b",),))
    with pytest.raises(UserError, match=rf"f:8: an answer takes \d+ {said}"):
        scorer_of("bart", generation()).prepare([answer])


# --------------------------------------------------------------------------------------------- looks


def adapted(kind: str, tuner: Any) -> Any:
    config = TrainConfig("m", "d", "o", template=TEMPLATE, labels="a=b,c=d", tuner=tuner)
    return tuners.attach(lively(kind), make_tokenizer(SEQ2SEQ[kind]), config, None)


@pytest.mark.parametrize("estimator", ["weight", "activation"])
@pytest.mark.parametrize("tuner", ["full", "lora", "head"])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_lower_the_loss_and_are_replayed(
    kind: str, tuner: str, estimator: str, tmp_path: Path
) -> None:
    model = adapted(kind, tuner)
    scorer = Scorer(model, make_tokenizer(SEQ2SEQ[kind]), Task(TEMPLATE, WORDS))
    batch = scorer.encode_training(rows())
    log = tmp_path / "run.jfl"
    before = float(scorer.losses(batch).mean())
    opt = jf.MeZO(model, lr=3e-3, eps=1e-3, estimator=estimator, rule="rms", log=log)
    for _ in range(20):
        opt.step(scorer.losses, batch)
    opt.close()
    assert float(scorer.losses(batch).mean()) < before
    again = adapted(kind, tuner)
    jf.replay(again, log)
    assert jf.fingerprint(again) == jf.fingerprint(model)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_bare_model(kind: str) -> None:
    scorer = scorer_of(kind, generation())
    tokenizer, model = make_tokenizer(SEQ2SEQ[kind]), scorer.model
    example = questions()[:1]
    scorer.loss_of(scorer.encode_training(example)).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    ids = torch.tensor([tokenizer(f"{TEXTS[0]} It was")["input_ids"]])
    labels = torch.tensor([labels_of(kind, "very good", end=True)])
    logs = model(input_ids=ids, labels=labels).logits[0].log_softmax(-1)
    logs = logs.gather(1, labels[0, :, None])
    (-logs[1 if kind == "bart" else 0 :].sum()).backward()
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_probed_is_what_predicts_the_answer(kind: str) -> None:
    labels = {"neg": "b", "pos": "w"} if kind == "bart" else {"neg": "bad", "pos": "great"}
    scorer = scorer_of(kind, Task(TEMPLATE, labels))
    assert {len(word) for word in scorer.prompts.words} == {1}
    found = hidden_states(scorer, rows(labels=labels), 2)
    head: Any = scorer.model.get_output_embeddings()
    scores = head(found.features).double().log_softmax(-1)
    first = [word[0] for word in scorer.prompts.words]
    batch = scorer.encode(rows(labels=labels))
    torch.testing.assert_close(scores[:, first].float(), scorer.scores(batch), atol=1e-3, rtol=1e-4)
    prefix = batch["decoder_input_ids"][:, 0, : len(scorer.prompts.prefix)]  # type: ignore[attr-defined]
    with torch.no_grad():
        for i in range(len(TEXTS)):
            shown = batch["attention_mask"][i].bool()
            ids = batch["input_ids"][i][shown][None]
            logits = scorer.model(input_ids=ids, decoder_input_ids=prefix[i : i + 1]).logits[0, -1]
            wanted = logits.double().log_softmax(-1)
            torch.testing.assert_close(scores[i], wanted, atol=1e-3, rtol=1e-4)


# ------------------------------------------------------------------------------------ other families


def other(kind: str) -> Any:
    import transformers as hf

    bart: dict[str, Any] = {
        "vocab_size": 1024, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32, "max_position_embeddings": CONTEXT, "init_std": 0.3,
        "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
    }  # fmt: skip
    t5: dict[str, Any] = {
        "vocab_size": 1024, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2,
        "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16,
        "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu",
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: dict[str, Any] = {
            "mt5": lambda: hf.MT5ForConditionalGeneration(hf.MT5Config(**t5)),
            "umt5": lambda: hf.UMT5ForConditionalGeneration(hf.UMT5Config(**t5)),
            "t5 1.1": lambda: hf.T5ForConditionalGeneration(
                hf.T5Config(**t5, tie_word_embeddings=False)
            ),
            "mbart": lambda: hf.MBartForConditionalGeneration(hf.MBartConfig(**bart)),
            "pegasus": lambda: hf.PegasusForConditionalGeneration(hf.PegasusConfig(**bart)),
            "marian": lambda: hf.MarianMTModel(hf.MarianConfig(**bart)),
            "blenderbot-small": lambda: hf.BlenderbotSmallForConditionalGeneration(
                hf.BlenderbotSmallConfig(**bart)
            ),
        }
        return made[kind]().eval()


FAMILIES = ["mt5", "umt5", "t5 1.1", "mbart", "pegasus", "marian", "blenderbot-small"]


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_are_scored_written_and_stepped(family: str, tmp_path: Path) -> None:
    other(family).save_pretrained(tmp_path)
    make_tokenizer("t5").save_pretrained(tmp_path)
    model, tokenizer = load_model(tmp_path)
    scorer = Scorer(model, tokenizer, Task(TEMPLATE, WORDS))
    together = scorer.scores(scorer.encode(rows()))
    for example, found in zip(rows(), together, strict=True):
        expected = [oracle(scorer, "t5", example.fields["text"], w) for w in WORDS.values()]
        torch.testing.assert_close(found, torch.tensor(expected), atol=1e-3, rtol=1e-4)
    for estimator in ("weight", "activation"):
        opt = jf.MeZO(model, lr=1e-3, eps=1e-2, estimator=estimator)
        step = opt.estimate(scorer.losses, scorer.encode(rows()))
        assert any(step.projected_grads)
    writer = Scorer(model, tokenizer, generation(stop=("\0",)))
    texts = writer.predict(writer.encode(questions(), "none"))
    assert texts == [writer.predict(writer.encode([q], "none"))[0] for q in questions()]


# ----------------------------------------------------------------------------------- loading and saving


def test_encoder_decoders_come_back_with_the_same_bits(
    seq2seq_folder: Path, tmp_path: Path
) -> None:
    loaded: Any
    loaded, tokenizer = load_model(seq2seq_folder)
    kind = json.loads((seq2seq_folder / "config.json").read_text())["model_type"]
    assert is_seq2seq(loaded)
    assert not is_masked(loaded)
    assert not loaded.training
    assert jf.fingerprint(loaded) == jf.fingerprint(make_model(kind))
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    save_model(loaded, tokenizer, tmp_path / "again")
    weights = "model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (seq2seq_folder / weights).read_bytes()
    again, _ = load_model(tmp_path / "again")
    task = Task(TEMPLATE, WORDS)
    scored = [
        (s := Scorer(m, tokenizer, task)).scores(s.encode(rows()))
        for m in (make_model(kind), again)
    ]
    assert torch.equal(*scored)


@pytest.mark.parametrize("kind", KINDS)
def test_a_body_alone_is_whole_where_the_head_is_tied_to_it(kind: str, tmp_path: Path) -> None:
    from transformers import BartModel, T5Model

    model = make_model(kind)
    body = BartModel(model.config) if kind == "bart" else T5Model(model.config)
    wanted = model.model if kind == "bart" else model
    body.load_state_dict(wanted.state_dict(), strict=False)
    body.save_pretrained(tmp_path)
    make_tokenizer(SEQ2SEQ[kind]).save_pretrained(tmp_path)
    assert jf.fingerprint(load_model(tmp_path)[0]) == jf.fingerprint(model)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_head_of_its_own_is_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    model, tokenizer = adapted(kind, "head"), make_tokenizer(SEQ2SEQ[kind])
    model.get_output_embeddings().weight.mul_(1.5)
    save_model(model, tokenizer, tmp_path / "out")
    again: Any = load_model(tmp_path / "out")[0]
    assert again.get_output_embeddings().weight is not again.get_input_embeddings().weight
    assert jf.fingerprint(again) == jf.fingerprint(model)
    task = Task(TEMPLATE, WORDS)
    scored = [
        (s := Scorer(m, tokenizer, task)).scores(s.encode(rows()))
        for m in (model, again, lively(kind))
    ]
    assert torch.equal(scored[0], scored[1])
    assert not torch.allclose(scored[0], scored[2], atol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_that_did_not_move_is_tied_again(kind: str, tmp_path: Path) -> None:
    model, tokenizer = adapted(kind, "head"), make_tokenizer(SEQ2SEQ[kind])
    save_model(model, tokenizer, tmp_path / "out")
    again: Any = load_model(tmp_path / "out")[0]
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert jf.fingerprint(again) == jf.fingerprint(lively(kind))
    one, two = (Scorer(m, tokenizer, Task(TEMPLATE, WORDS)) for m in (model, again))
    assert torch.equal(one.scores(one.encode(rows())), two.scores(two.encode(rows())))


# ------------------------------------------------------------------------------------ the command line


def last(capsys: Any, *argv: Any) -> dict[str, Any]:
    capsys.readouterr()
    code = main([str(argument) for argument in argv])
    out, err = capsys.readouterr()
    assert code == 0, err
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def refused(capsys: Any, *argv: Any) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    said: str = err.splitlines()[-1]
    assert said.startswith("error: ")
    return said


def asked(folder: Path, csv: Path) -> list[Any]:
    # one token each where the tokenizer has them whole
    labels = "neg=bad,pos=great"
    if json.loads((folder / "config.json").read_text())["model_type"] == "bart":
        labels = "neg=b,pos=w"
    return ["--model", folder, "--data", csv, "--template", TEMPLATE, "--labels", labels]


DEPRECATED = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # peft asks it


@pytest.mark.filterwarnings(DEPRECATED)
@pytest.mark.parametrize("estimator", ["activation", "weight"])
@pytest.mark.parametrize("tuner", ["full", "lora", "head"])
def test_train_eval_replay(
    seq2seq_folder: Path, sentiment_csv: Path, tmp_path: Path, capsys: Any, tuner: str, estimator: str
) -> None:  # fmt: skip
    task = asked(seq2seq_folder, sentiment_csv)
    run = ["--out", tmp_path / "run", "--estimator", estimator, "--tuner", tuner, "--threads", 1]
    limits = ["--max-forwards", 40, "--eval-every", 20, "--lr", 1e-2, "--start", "base", "--json"]
    trained = last(capsys, "train", *task, *run, *limits, "--keep", "last")
    assert trained["status"] == "finished"
    assert trained["loss"] != trained["before_loss"]
    scored = last(capsys, "eval", "--run", tmp_path / "run", "--json")
    made = last(capsys, "replay", tmp_path / "run", "--out", tmp_path / "tuned", "--json")
    for key in ("accuracy", "loss", "fingerprint"):
        assert scored[key] == made[key] == trained[key]
    tuned = last(capsys, "eval", "--model", tmp_path / "tuned", *task[2:], "--json")
    assert tuned["fingerprint"] == trained["fingerprint"]
    if tuner == "lora":
        from peft import PeftModel

        base, tokenizer = load_model(seq2seq_folder)
        theirs: Any = PeftModel.from_pretrained(base, str(tmp_path / "tuned"))
        assert type(theirs).__name__ == "PeftModelForSeq2SeqLM"
        assert jf.fingerprint(theirs) == trained["fingerprint"]
        merged = last(capsys, "replay", tmp_path / "run", "--merge", "--out", tmp_path / "merged", "--json")  # fmt: skip
        assert merged["fingerprint"] == trained["fingerprint"]
        whole, _ = load_model(tmp_path / "merged")
        task = Task(TEMPLATE, WORDS)
        one, two = (Scorer(m, tokenizer, task) for m in (theirs.eval(), whole))
        torch.testing.assert_close(
            one.scores(one.encode(rows())), two.scores(two.encode(rows())), atol=1e-4, rtol=1e-5
        )


@pytest.mark.parametrize("tuner", ["full", "head"])
def test_auto_is_a_probe(
    seq2seq_folder: Path, sentiment_csv: Path, tmp_path: Path, capsys: Any, tuner: str
) -> None:
    """There are two stacks of layers, so all of them move behind the probe."""
    task = asked(seq2seq_folder, sentiment_csv)
    run = ["--out", tmp_path / "run", "--tuner", tuner, "--threads", 1, "--max-forwards", 16]
    trained = last(capsys, "train", *task, *run, "--eval-every", 8, "--keep", "last", "--json")
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert "start: probe" in config
    assert "layers: null" in config
    scored = last(capsys, "eval", "--run", tmp_path / "run", "--json")
    made = last(capsys, "replay", tmp_path / "run", "--out", tmp_path / "tuned", "--json")
    again = last(capsys, "eval", "--model", tmp_path / "tuned", *task[2:], "--json")
    assert scored["fingerprint"] == made["fingerprint"] == trained["fingerprint"]
    assert again["fingerprint"] == trained["fingerprint"]
    assert scored["loss"] == trained["loss"] < trained["before_loss"]


def test_auto_is_the_base_where_there_is_no_probe(
    seq2seq_folder: Path, sentiment_csv: Path, tmp_path: Path, capsys: Any
) -> None:
    task = asked(seq2seq_folder, sentiment_csv)[:-1]
    run = ["--out", tmp_path / "run", "--threads", 1, "--max-forwards", 4, "--json"]
    last(capsys, "train", *task, "neg=not good at all,pos=great", *run)
    assert "start: base" in (tmp_path / "run" / "config.yaml").read_text()


def test_baselines(seq2seq_folder: Path, sentiment_csv: Path, tmp_path: Path, capsys: Any) -> None:
    task = [*asked(seq2seq_folder, sentiment_csv), "--threads", 1, "--json"]
    plain = last(capsys, "baseline", "--method", "zero-shot", *task)
    assert 0.0 <= plain["accuracy"] <= 1.0
    shown = last(capsys, "baseline", "--method", "icl", "--demonstrations", 2, "--draws", 1, *task)
    assert shown["draws"][0]["demonstrations_used"] == 2
    probe = last(capsys, "baseline", "--method", "probe", *task)
    assert probe["accuracy"] == 1.0  # the text says it in as many words
    for more in ([], ["--tuner", "lora"], ["--tuner", "head"], ["--gradient-checkpointing"]):
        steps = ["--max-steps", 8, "--lr", 3e-2 if more == ["--tuner", "lora"] else 3e-3, *more]
        found = last(capsys, "baseline", "--method", "first-order", *steps, *task)
        assert found["loss"] < plain["loss"]


@pytest.mark.parametrize("objective", ["loss", "f1"])
def test_answers_in_its_own_words_are_trained(
    seq2seq_folder: Path, tmp_path: Path, capsys: Any, objective: str
) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "own.yaml").write_text(
        "name: own\ntitle: own\nkind: generation\n"
        "splits: {train: train.jsonl, test: test.jsonl}\nfields: {text: {from: text}}\n"
        "template: '{text} It was'\nanswers: {from: answers}\nmax_new_tokens: 4\n"
    )
    for split, count in (("train", 24), ("test", 8)):
        lines = [
            json.dumps({"text": f"{split} film {i}", "answers": ["great"]}) for i in range(count)
        ]
        (tmp_path / "rows" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    task = ["--model", seq2seq_folder, "--task", tmp_path / "own.yaml", "--data", tmp_path / "rows"]
    run = [
        "--out",
        tmp_path / "run",
        "--threads",
        1,
        "--max-forwards",
        24,
        "--objective",
        objective,
    ]
    run += ["--lr", 1e-2, "--keep", "last", "--json"]
    trained = last(capsys, "train", *task, *run)
    scored = last(capsys, "eval", "--run", tmp_path / "run", "--json")
    assert scored["fingerprint"] == trained["fingerprint"]
    assert scored["loss"] == trained["loss"]
    if objective == "loss":
        assert trained["loss"] < trained["before_loss"]


# ------------------------------------------------------------------------------------ what is refused


def test_what_an_encoder_decoder_cannot(
    seq2seq_folder: Path, sentiment_csv: Path, tmp_path: Path, capsys: Any
) -> None:
    task = ["train", *asked(seq2seq_folder, sentiment_csv), "--out", tmp_path / "run"]
    kind = json.loads((seq2seq_folder / "config.json").read_text())["model_type"]
    for options, said in (
        (["--tuner", "prefix"], f"--tuner is 'prefix': a {kind} model is an encoder-decoder, and"),
        (["--tuner", "prompt"], f"--tuner is 'prompt': a {kind} model is an encoder-decoder, and"),
        (["--start", "deep"], f"--start is 'deep': a {kind} model has no single stack of layers: "),
        (["--layers", "0.5"], "has no single stack of layers: say what is tuned with --tune"),
        (["--quantize", "int8", "--tuner", "lora"], "is an encoder-decoder, whose layers are not"),
    ):
        assert said in refused(capsys, *task, *options)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_is_refused(kind: str) -> None:
    said = r"has {mask}, which only a masked model .*ForConditionalGeneration writes the answer apart from the text"
    with pytest.raises(UserError, match=said):
        scorer_of(kind, Task("{text} It was {mask}.", WORDS))
    assert not isinstance(scorer_of(kind).prompts, MaskedPrompts)


def test_no_trunk_is_found() -> None:
    model = make_model("bart")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("decoder.layers.1" in name)
    made: list[str] = []
    trunk = Trunk(model, lambda name: made.append(name))  # type: ignore[arg-type,return-value]
    assert (trunk.depth, trunk.share, made) == (0, 1.0, [])


def test_models_that_cannot_be_asked() -> None:
    model = make_model("t5")
    model.config.decoder_start_token_id = None
    model.generation_config.decoder_start_token_id = 0
    task, tokenizer = Task(TEMPLATE, WORDS), make_tokenizer("t5")
    assert Scorer(model, tokenizer, task).prompts.prefix == [0]  # type: ignore[attr-defined]
    model.generation_config.decoder_start_token_id = None
    said = r"T5ForConditionalGeneration: its config names no decoder_start_token_id, .*: put it into config\.json"
    with pytest.raises(UserError, match=said):
        Scorer(model, tokenizer, task)
    model.config.decoder_start_token_id = 1024
    with pytest.raises(UserError, match="decoder_start_token_id is 1024, the model knows 1024"):
        Scorer(model, tokenizer, task)
    endless = make_tokenizer("t5").__class__(tokenizer_object=tokenizer.backend_tokenizer)
    Scorer(make_model("t5"), endless, task)
    with pytest.raises(UserError, match="the tokenizer has no end-of-text token, with which T5For"):
        Scorer(make_model("t5"), endless, generation())
    model = make_model("t5")
    model.lm_head = torch.nn.Linear(16, 99, bias=False)
    with pytest.raises(UserError, match="reads and answers in different vocabularies"):
        Scorer(model, tokenizer, task)


def test_an_encoder_decoder_of_something_else_than_text_is_refused() -> None:
    class Hears(type(make_model("t5"))):  # type: ignore[misc]
        main_input_name = "input_features"

    model = Hears(make_model("t5").config)
    with pytest.raises(UserError, match="Hears is an encoder-decoder that does not read text"):
        Scorer(model, make_tokenizer("t5"), Task(TEMPLATE, WORDS))


@pytest.mark.filterwarnings(DEPRECATED)
def test_an_adapter_that_is_put_before_a_text_is_refused(tmp_path: Path, capsys: Any) -> None:
    from peft import PrefixTuningConfig, get_peft_model

    base = tmp_path / "base"
    make_model("bart").save_pretrained(base)
    make_tokenizer("roberta").save_pretrained(base)
    settings = PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=2, num_layers=2,
                                  token_dim=16, num_attention_heads=2)  # fmt: skip
    wrapped = get_peft_model(load_model(base)[0], settings)
    said = "is an encoder-decoder, and a PREFIX_TUNING adapter puts tokens before the text of a"
    with pytest.raises(UserError, match=said):
        Scorer(wrapped, make_tokenizer("roberta"), Task(TEMPLATE, WORDS))  # type: ignore[arg-type]
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    (tmp_path / "rows.csv").write_text("text,label\na,neg\nb,pos\n")
    argv = ["--data", tmp_path / "rows.csv", "--template", TEMPLATE, "--labels", "neg=a,pos=w"]
    assert said in refused(capsys, "eval", "--model", tmp_path / "adapter", "--base", base, *argv)
