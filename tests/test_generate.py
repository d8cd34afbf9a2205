"""Texts against transformers' own generate, token by token; where they end; what a draw depends on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from conftest import ARCHITECTURES, CONTEXT, make_model, make_tokenizer
from justforward import generate as module
from justforward import noise, tuners
from justforward.config import TrainConfig
from justforward.data import Example
from justforward.errors import UserError
from justforward.evaluate import Scorer
from justforward.generate import GREEDY, Generated, Sampling, generate
from justforward.tasks import Task

TEXTS = ["a fine film", "bad", "the story is wonderful , the music is great", "dull"]
TOKENS = 12
NEVER = ("\0never\0",)


def task(**keys: Any) -> Task:
    values = {"stop": NEVER, "max_new_tokens": TOKENS, **keys}
    return Task("{text} It was", kind="generation", loss="vocabulary", **values)


def rows(texts: Sequence[str] = TEXTS) -> list[Example]:
    return [
        Example({"text": t}, "great", "rows.jsonl", i + 1, answers=(("great",),))
        for i, t in enumerate(texts)
    ]


@torch.no_grad()
def made(architecture: str, tuner: Any = "full", kind: str = "bytelevel") -> Scorer:
    """A model whose vocabulary is the tokenizer's, so that every token is text; with a stirred adapter."""
    tokenizer = make_tokenizer(kind)
    config = TrainConfig("m", "d", "o", template="{text} It was", labels="a=b,c=d", tuner=tuner)
    base = make_model(architecture, vocab_size=len(tokenizer), seed=1)
    base.generation_config.eos_token_id = None
    base.generation_config.pad_token_id = 0
    model: Any = tuners.attach(base, tokenizer, config, None)
    if tuner != "full":
        tuned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for i, parameter in enumerate(tuned):
            parameter.add_(
                noise.normal(9, i, 0, parameter.numel()).view(parameter.shape), alpha=0.3
            )
    return Scorer(model, tokenizer, task())


@torch.no_grad()
def written(scorer: Scorer, texts: Sequence[str] = TEXTS, **keys: Any) -> Generated:
    batch = scorer.encode(rows(texts), "none")
    values: dict[str, Any] = {"stop": NEVER, "max_new_tokens": TOKENS, **keys}
    return generate(scorer.model, scorer.tokenizer, batch, scorer.prompts.accepts, **values)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every token that is chosen, place by place [N]."""
    seen: list[Tensor] = []
    choose = module._next

    def watched(*arguments: Any) -> Tensor:
        seen.append(choose(*arguments))
        return seen[-1]

    monkeypatch.setattr(module, "_next", watched)
    return seen


# ------------------------------------------------------------------------------------------- greedy


@pytest.mark.parametrize("tuner", ["full", "lora", "prefix"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_is_that_of_transformers(
    chosen: list[Tensor], architecture: str, tuner: str
) -> None:
    scorer = made(architecture, tuner)
    model: Any = scorer.model
    found = written(scorer)
    batch = scorer.encode(rows(), "none")
    assert batch["attention_mask"].min() == 0  # rows of different length
    expected = []
    for row in range(len(TEXTS)):  # each by itself, without padding
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()][None]
        with torch.no_grad():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=TOKENS,
                do_sample=False,
            )
        expected.append(out[0, ids.shape[1] :])
    assert torch.equal(torch.stack(chosen, dim=1), torch.stack(expected))
    assert found.texts == [str(scorer.tokenizer.decode(ids)).strip() for ids in expected]
    assert found.forwards == TOKENS
    assert len(set(found.texts)) > 1
    if tuner == "full":
        with torch.no_grad():  # and as a batch that transformers pads
            whole = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=TOKENS,
                do_sample=False,
            )
        assert torch.equal(torch.stack(chosen, dim=1), whole[:, batch["input_ids"].shape[1] :])


@pytest.mark.parametrize("tuner", ["lora", "prefix"])
def test_the_adapter_matters(tuner: str) -> None:
    assert written(made("llama", tuner)).texts != written(made("llama")).texts


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_do_not_see_each_other(architecture: str) -> None:
    scorer = made(architecture, kind="metaspace")
    together = written(scorer).texts
    assert together == [written(scorer, [text]).texts[0] for text in TEXTS]
    assert together[::-1] == written(scorer, TEXTS[::-1]).texts


# -------------------------------------------------------------------------------------- where it ends


TEXT = " the film was great , not good\nQuestion"


@pytest.mark.parametrize("kind", ["bytelevel", "metaspace"])
@pytest.mark.parametrize(
    "stop",
    [
        ("rea",),
        ("eat ,",),
        ("\n",),
        ("zz", "t"),
        ("eat", "re"),
        ("not", "rea"),
        ("zz",),
        ("good\nQ",),
    ],
)
def test_stops_within_tokens(kind: str, stop: tuple[str, ...]) -> None:
    """A stop string may begin and end within tokens, and go over several."""
    tokenizer = make_tokenizer(kind)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert any("great" in str(tokenizer.decode([token])) for token in ids)
    read: list[int] = []
    found = [module._ended(read, token, {10**6}, tokenizer, stop) for token in ids]
    assert read == ids
    text = str(tokenizer.decode(ids))
    at = min((text.index(one) for one in stop if one in text), default=None)
    first = next((one for one in found if one is not None), None)
    assert first == (None if at is None else text[:at])
    assert module._ended(read, 10**6, {10**6}, tokenizer, stop=("zz",)) == text


def test_stops() -> None:
    """A stop string anywhere ends the text before it."""
    scorer = made("gpt2")
    whole = written(scorer).texts
    tried = 0
    for row, text in enumerate(whole):
        for start in range(1, len(text) - 1):
            stop = text[start : start + 2]
            if not stop.isascii() or text.startswith(stop):
                continue
            found = written(scorer, stop=("\0", stop))
            assert found.texts[row] == text[: text.index(stop)].strip()
            tried += 1
            break
    stop = whole[0][:1]
    assert written(scorer, TEXTS[:1], stop=(stop,)).texts == [""]
    assert written(scorer, TEXTS[:1], stop=(stop,)).forwards <= 2  # a token may be a space
    assert tried >= 2


def test_the_first_of_several_stops_counts() -> None:
    scorer = made("llama")
    text = written(scorer, TEXTS[:1]).texts[0]
    places = [i for i in range(1, len(text)) if text[i].isascii() and text[i] not in text[:i]]
    later, sooner = places[-1], places[0]
    assert sooner < later
    found = written(scorer, TEXTS[:1], stop=(text[later], text[sooner]))
    assert found.texts == [text[:sooner].strip()]


def test_end_of_text(chosen: list[Tensor]) -> None:
    scorer = made("opt")
    written(scorer)
    first = torch.stack(chosen, dim=1)[0].tolist()
    end = next(token for token in first[2:] if token != first[0])
    for ends in (end, [end, 10**6]):
        scorer.model.generation_config.eos_token_id = ends
        found = written(scorer, TEXTS[:1])
        assert found.texts == [str(scorer.tokenizer.decode(first[: first.index(end)])).strip()]
        assert found.forwards == first.index(end) + 1
    scorer.model.generation_config.eos_token_id = None
    many = written(scorer, TEXTS, max_new_tokens=3)
    assert many.forwards == 3
    assert many.texts[0] == str(scorer.tokenizer.decode(first[:3])).strip()


def test_special_tokens_are_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """As T5's <extra_id_0>, which would be a word to F1; but what ends a text may be one."""
    scorer = made("llama", kind="metaspace")
    tokenizer = scorer.tokenizer
    told = tokenizer("the film was great", add_special_tokens=False)["input_ids"]
    script = [1, 0, *told, 1, *told]
    assert tokenizer.convert_ids_to_tokens([1, 0]) == ["<s>", "<unk>"]

    def next_of(logits: Tensor, sampling: Any, keys: Any, place: int) -> Tensor:
        return torch.full((len(logits),), script[place])

    monkeypatch.setattr(module, "_next", next_of)
    both = written(scorer, TEXTS[:1], max_new_tokens=len(script))
    assert both.texts[0].split() == ["the", "film", "was", "great"] * 2
    assert both.texts[0] == str(tokenizer.decode(script, skip_special_tokens=True)).strip()
    ended = written(scorer, TEXTS[:1], stop=("great<s>",), max_new_tokens=len(script))
    assert ended.texts == ["the film was"]
    assert ended.forwards == 3 + len(told)


def test_rows_that_have_ended_wait_for_the_others() -> None:
    scorer = made("gpt2")
    whole = written(scorer).texts
    stop = next(c for c in whole[0] if c.isascii() and c not in whole[1])
    found = written(scorer, stop=(stop,))
    assert found.texts[0] == whole[0][: whole[0].index(stop)].strip()
    assert found.texts[1] == whole[1]
    assert found.forwards == TOKENS


# ------------------------------------------------------------------------------------------- sampling


def test_a_draw_depends_on_seed_key_and_place() -> None:
    scorer = made("gpt2")
    warm = Sampling(1.0, seed=5)
    keys = [11, 22, 33, 44]
    texts = written(scorer, sampling=warm, keys=keys).texts
    assert texts == written(scorer, sampling=warm, keys=keys).texts
    for text, key, expected in zip(TEXTS, keys, texts, strict=True):
        assert written(scorer, [text], sampling=warm, keys=[key]).texts == [expected]
    back = written(scorer, TEXTS[::-1], sampling=warm, keys=keys[::-1]).texts
    assert back[::-1] == texts
    assert written(scorer, sampling=Sampling(1.0, seed=6), keys=keys).texts != texts
    assert written(scorer, sampling=warm, keys=[1, 2, 3, 4]).texts != texts
    same = written(scorer, ["bad"] * 4, sampling=warm, keys=[7, 7, 8, 9]).texts
    assert same[0] == same[1]
    assert len(set(same)) == 3
    cold = written(scorer, sampling=Sampling(1e-6), keys=keys).texts
    assert cold == written(scorer).texts == written(scorer, sampling=GREEDY).texts


def test_a_prediction_is_drawn_by_the_row() -> None:
    scorer = made("llama")
    examples = rows()
    scorer.prepare(examples)
    warm = Sampling(1.0, seed=3)
    texts = scorer.predict(scorer.encode(examples, "none"), warm)
    some = scorer.predict(scorer.encode([examples[2], examples[0]], "none"), warm)
    assert some == [texts[2], texts[0]]
    assert scorer.evaluate(examples, 3).predictions == scorer.predict(
        scorer.encode(examples, "none")
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_are_of_the_softmax(temperature: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5, -math.inf])
    expected = (logits.double() / temperature).softmax(-1)[:5]
    sampling = Sampling(temperature, seed=8)
    count = 6000
    by_key = module._next(logits.expand(count, -1), sampling, range(count), 3)
    by_place = torch.cat([module._next(logits[None], sampling, [4], p) for p in range(count)])
    for drawn in (by_key, by_place):
        found = torch.bincount(drawn, minlength=6)
        assert found[5] == 0
        assert stats.chisquare(found[:5], count * expected).pvalue > 1e-4
    for drawn in (by_key, by_place):  # one draw says nothing about the next
        table = torch.zeros(5, 5).index_put(
            (drawn[:-1], drawn[1:]), torch.ones(()), accumulate=True
        )
        assert stats.chi2_contingency(table).pvalue > 1e-4


@settings(max_examples=20)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.integers(0, 60))
def test_any_key_draws(seed: int, key: int, place: int) -> None:
    logits = torch.randn(1, 7, generator=torch.Generator().manual_seed(0))
    drawn = module._next(logits, Sampling(2.0, seed), [key], place)
    assert 0 <= int(drawn) < 7
    assert torch.equal(drawn, module._next(logits, Sampling(2.0, seed), [key], place))


# --------------------------------------------------------------------------------- rows and what is refused


def test_training_is_on_the_answer_and_its_end() -> None:
    scorer = Scorer(make_model("gpt2"), make_tokenizer("bytelevel"), task(stop=("\n", "x")))
    batch = scorer.encode_training(rows(["a film"]))
    ids = make_tokenizer("bytelevel")("a film It was great\n")["input_ids"]
    assert batch["input_ids"].tolist() == [ids[:-1]]
    with torch.no_grad():
        logs = scorer.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    start = len(make_tokenizer("bytelevel")("a film It was")["input_ids"])
    total = -sum(float(logs[i - 1, ids[i]]) for i in range(start, len(ids)))
    assert float(scorer.losses(batch)) / (len(ids) - start) == pytest.approx(
        total / (len(ids) - start), rel=1e-4
    )


def test_a_prompt_leaves_room_for_the_answer() -> None:
    long = " ".join(["film"] * 80)
    tokenizer = make_tokenizer("bytelevel")
    with pytest.raises(UserError, match=rf"rows\.jsonl:1: the text makes \d+ tokens.*{CONTEXT}"):
        Scorer(make_model("opt"), tokenizer, task()).prepare(rows([long]))
    scorer = Scorer(make_model("opt"), tokenizer, task(), max_length=CONTEXT)
    batch = scorer.encode(rows([long]), "none")
    assert CONTEXT - TOKENS - 3 <= batch["input_ids"].shape[1] <= CONTEXT - TOKENS
    assert len(scorer.predict(batch)) == 1
    with pytest.raises(UserError, match="max_length 10 leaves no room"):
        Scorer(make_model("opt"), tokenizer, task(), max_length=10)


@pytest.mark.parametrize("temperature", [-1.0, math.nan, math.inf, -math.inf])
def test_temperatures_refused(temperature: float) -> None:
    with pytest.raises(UserError, match=r"temperature is .*: it must be finite and at least 0"):
        Sampling(temperature)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_refused(seed: int) -> None:
    with pytest.raises(UserError, match=f"seed is {seed}: it must be at least 0 and below 2"):
        Sampling(1.0, seed)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("broken", [math.nan, -math.inf])
def test_broken_weights_are_said(sampling: Sampling, broken: float) -> None:
    scorer = made("llama")
    model: Any = scorer.model
    with torch.no_grad():
        model.lm_head.weight[0].fill_(math.nan)
    with pytest.raises(
        UserError, match="the logits are not finite: the model's weights are broken"
    ):
        written(scorer, sampling=sampling)
    with pytest.raises(UserError, match="the logits are not finite"):
        module._next(torch.full((2, 5), broken), sampling, [0, 1], 0)


def test_a_model_without_a_cache_is_refused() -> None:
    scorer = made("opt")
    scorer.prompts.accepts = scorer.prompts.accepts - {"past_key_values"}
    with pytest.raises(UserError, match="OPTForCausalLM keeps no keys and values to write texts"):
        written(scorer)


def test_a_model_that_takes_a_cache_and_hands_out_none_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """RecurrentGemma's forward has the argument all the same."""
    scorer = made("opt")
    forward = scorer.model.forward

    def without(*args: Any, **given: Any) -> Any:
        output = forward(*args, **given)
        output.past_key_values = None
        return output

    monkeypatch.setattr(scorer.model, "forward", without)
    with pytest.raises(UserError, match="OPTForCausalLM keeps no keys and values to write texts"):
        written(scorer)
