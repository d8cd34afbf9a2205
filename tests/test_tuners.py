"""LoRA, prefix, prompt and head: start where the base is, move nothing else, rebuilt to the same bits, saved for peft.

Reading order: starts, looks by hand, runs, what replay writes, what is refused.
"""

from __future__ import annotations

import copy
import gc
import inspect
import io
import json
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import justforward as jf
from conftest import ARCHITECTURES, CONTEXT, MASKED, make_model, make_tokenizer, materialise
from justforward import causal, cli, noise, tuners
from justforward.config import EvalConfig, ReplayConfig, TrainConfig
from justforward.data import Example
from justforward.directions import FAMILIES, Weights
from justforward.errors import UserError
from justforward.estimators import RowLooks, Site
from justforward.evaluate import Scorer
from justforward.folder import RunFolder
from justforward.generate import generate
from justforward.interrupts import Shield
from justforward.models import load_model, save_model
from justforward.prepare import choose_tuned
from justforward.progress import Progress
from justforward.prompted import counted
from justforward.rebuild import evaluate, rebuild
from justforward.run import train
from justforward.settings import resolved
from justforward.tasks import Task

Result = dict[str, Any]
TOKENIZER = {"opt": "metaspace", "gpt2": "bytelevel", "llama": "metaspace", **MASKED}
TASK = Task("{text} It was", {"neg": "terrible", "pos": "great"})
AT_MASK = Task("{text} It was {mask}.", {"neg": "bad", "pos": "great"})
# Tuners that are put before a text; DistilBERT takes no keys and values of others.
BEFORE = [
    (a, t) for a in MASKED for t in ("prefix", "prompt") if (a, t) != ("distilbert", "prefix")
]
TEXTS = ["a fine film", "bad", "the story is wonderful , the music is great", "dull and long"]
ROWS = [Example({"text": text}, ("neg", "pos")[i % 2], "rows.csv", i + 2) for i, text in enumerate(TEXTS)]  # fmt: skip


def config(tuner: Any = "lora", **values: Any) -> TrainConfig:
    base: dict[str, Any] = {
        "model": "m", "data": "d.csv", "template": "{text} It was", "labels": "neg=bad,pos=good",
        "out": "out", "tuner": tuner, "start": "base",
    }  # fmt: skip
    return TrainConfig(**{**base, **values})


def tokenizer_of(architecture: str) -> Any:
    return make_tokenizer(TOKENIZER[architecture])


def tuned(architecture: str, tuner: Any = "lora", start: Path | None = None, **values: Any) -> Any:
    model = make_model(architecture)
    return tuners.attach(model, tokenizer_of(architecture), config(tuner, **values), start)


def trainable(model: Any) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@torch.no_grad()
def stir(model: Any) -> Any:
    """Move what is tuned, so that it matters."""
    for i, (_, parameter) in enumerate(
        (n, p) for n, p in model.named_parameters() if p.requires_grad
    ):
        z = noise.normal(99, i, 0, parameter.numel()).view(parameter.shape)
        parameter.add_(z, alpha=0.2)
    return model


def task_of(architecture: str) -> Task:
    return AT_MASK if architecture in MASKED else TASK


def scores(model: Any, architecture: str, rows: list[Example] = ROWS) -> Tensor:
    scorer = Scorer(model, tokenizer_of(architecture), task_of(architecture))
    return scorer.scores(scorer.encode(rows))


# ------------------------------------------------------------------------------------------- starts


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lora_starts_as_the_base(architecture: str) -> None:
    # frozen: torch folds a batch before a matrix product where a weight asks for a gradient: other last bits
    base, model = make_model(architecture).requires_grad_(False), tuned(architecture)
    assert not any(module.training for module in model.modules())
    assert torch.equal(scores(model, architecture), scores(base, architecture))
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, base(input_ids=ids).logits)
    assert all("lora_" in name for name in trainable(model))
    linear = 1 if architecture == "gpt2" else 2  # GPT-2's queries and values are one matrix
    assert len(trainable(model)) == 2 * 2 * linear
    assert not torch.equal(scores(stir(model), architecture), scores(base, architecture))


@pytest.mark.parametrize("architecture", sorted(MASKED))
def test_lora_on_masked_models(architecture: str) -> None:
    base = make_model(architecture).requires_grad_(False)
    if architecture == "distilbert":  # peft has no default for it
        with pytest.raises(
            UserError, match="no default targets are known for model type 'distilbert'"
        ):
            tuned(architecture)
        model = tuned(architecture, lora_targets="q_lin|v_lin")
    else:
        model = tuned(architecture)
    assert len(trainable(model)) == 8
    before = scores(base, architecture)
    assert torch.equal(scores(model, architecture), before)
    assert not torch.equal(scores(stir(model), architecture), before)


@pytest.mark.parametrize("tuner", ["lora", "prefix", "prompt", "head"])
def test_starts_are_functions_of_the_seed(tuner: str) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = tuned("llama", tuner)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = tuned("llama", tuner)
    assert jf.fingerprint(first) == jf.fingerprint(second)
    other = tuned("llama", tuner, seed=1)
    assert (jf.fingerprint(first) == jf.fingerprint(other)) == (tuner == "head")


def test_lora_starts_with_the_usual_variance() -> None:
    model = tuned("llama", lora_rank=64, seed=3)
    first = [p for n, p in model.named_parameters() if "lora_A" in n]
    both = torch.cat([p.detach().flatten() for p in first])
    assert both.mean().abs() < 0.01
    assert float(both.std()) == pytest.approx(1 / math.sqrt(3 * 16), rel=0.05)
    assert not torch.equal(first[0], first[1])
    assert all(not p.any() for n, p in model.named_parameters() if "lora_B" in n)


def test_a_look_is_as_long_for_every_rank() -> None:
    """What a look moves the output of a layer by, at the start."""
    x = noise.normal(7, 0, 0, 64 * 16).view(64, 16)

    def moved(rank: int) -> float:
        squares = []
        for seed in range(12):
            model = tuned("llama", lora_rank=rank, seed=seed, lora_targets="layers.0.*q_proj")
            layer = next(module for module in model.modules() if hasattr(module, "lora_A"))
            with torch.no_grad():
                b = layer.lora_B["default"].weight
                before = layer(x)
                b.add_(noise.normal(seed, 1, 0, b.numel()).view(b.shape), alpha=1e-3)
                squares.append(float((layer(x) - before).square().mean()))
        return math.sqrt(sum(squares) / len(squares))

    lengths = [moved(rank) for rank in (1, 4, 16)]
    assert max(lengths) / min(lengths) < 1.4  # alpha / rank would give 4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_prefix_starts_as_its_tokens_in_front(architecture: str) -> None:
    """Rows of different lengths, padded on the left, against each by itself with the tokens before it."""
    base, model = make_model(architecture), tuned(architecture, "prefix", seed=4)
    tokens = tuners.ordinary_tokens(tokenizer_of(architecture), base, 5, 4)
    assert trainable(model) == ["prompt_encoder.default.embedding.weight"]
    ids = torch.randint(3, 300, (3, 9), generator=torch.Generator().manual_seed(0))
    gaps = [0, 4, 7]
    mask = torch.stack([(torch.arange(9) >= gap).long() for gap in gaps])
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "use_cache": False,
        "logits_to_keep": 2,
    }
    with torch.no_grad():
        found = model(**batch).logits
        assert found.shape[:2] == (3, 2)
        for row, gap in enumerate(gaps):
            alone = base(input_ids=torch.cat([tokens, ids[row : row + 1, gap:]], dim=1)).logits
            torch.testing.assert_close(found[row], alone[0, -2:], atol=2e-5, rtol=1e-5)
            short = model(input_ids=ids[row : row + 1, gap:]).logits  # without mask and positions
            torch.testing.assert_close(short[0, -2:], alone[0, -2:], atol=2e-5, rtol=1e-5)
            bare = base(input_ids=ids[row : row + 1, gap:]).logits
            assert not torch.allclose(found[row], bare[0, -2:], atol=1e-2)


def test_a_prefix_has_the_heads_of_keys_and_values() -> None:
    model = tuned("llama", "prefix", prefix_length=3)
    weight = model.prompt_encoder["default"].embedding.weight
    assert weight.shape == (3, 2 * 2 * 1 * 8)  # layers, keys and values, heads, size
    assert tuned("opt", "prefix").prompt_encoder["default"].embedding.weight.shape == (
        5,
        2 * 2 * 16,
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_prompt_starts_as_its_tokens_in_front(architecture: str) -> None:
    """Rows of different lengths, padded on the left, against each by itself with the tokens before it."""
    base, model = make_model(architecture), tuned(architecture, "prompt", seed=4, prompt_length=6)
    tokens = tuners.ordinary_tokens(tokenizer_of(architecture), base, 6, 4)
    assert trainable(model) == ["prompt_encoder.default.embedding.weight"]
    ids = torch.randint(3, 300, (3, 9), generator=torch.Generator().manual_seed(0))
    gaps = [0, 4, 7]
    mask = torch.stack([(torch.arange(9) >= gap).long() for gap in gaps])
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "use_cache": False,
        "logits_to_keep": 2,
    }
    with torch.no_grad():
        found = model(**batch).logits
        assert found.shape[:2] == (3, 2)
        for row, gap in enumerate(gaps):
            alone = base(input_ids=torch.cat([tokens, ids[row : row + 1, gap:]], dim=1)).logits
            torch.testing.assert_close(found[row], alone[0, -2:], atol=2e-5, rtol=1e-5)
            short = model(input_ids=ids[row : row + 1, gap:]).logits  # without mask and positions
            torch.testing.assert_close(short[0, -2:], alone[0, -2:], atol=2e-5, rtol=1e-5)
            bare = base(input_ids=ids[row : row + 1, gap:]).logits
            assert not torch.allclose(found[row], bare[0, -2:], atol=1e-2)
        # the mask alone says where a row begins
        masked = model(input_ids=ids, attention_mask=mask, logits_to_keep=2).logits
        torch.testing.assert_close(masked, found, atol=2e-5, rtol=1e-5)


def padded_right() -> tuple[Tensor, Tensor]:
    """Tokens and mask [3, 9] of rows of three lengths."""
    ids = torch.randint(10, 300, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(9) < torch.tensor([[9], [5], [2]])).long()
    return ids.where(mask == 1, 1), mask


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_a_masked_models_prefix_is_what_its_layers_see_besides(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against attention written out; it starts as what its tokens have there as a text of their own."""
    base, model = make_model(architecture), tuned(architecture, "prefix", seed=4)
    weight = model.get_parameter("prompt_encoder.default.embedding.weight")
    assert trainable(model) == ["prompt_encoder.default.embedding.weight"]
    layers = list(getattr(base, architecture).encoder.layer)
    tokens = tuners.ordinary_tokens(tokenizer_of(architecture), base, 5, 4)
    hidden = base(input_ids=tokens, output_hidden_states=True).hidden_states
    made = [
        each(h)[0] for layer, h in zip(layers, hidden, strict=False)
        for each in (layer.attention.self.key, layer.attention.self.value)
    ]  # fmt: skip
    torch.testing.assert_close(weight.detach(), torch.cat(made, dim=1).detach())
    rows = stir(model).get_parameter("prompt_encoder.default.embedding.weight").detach()
    keys_values = rows.view(5, len(layers), 2, 2, 8).permute(1, 2, 3, 0, 4)  # heads, tokens, size

    def written_out(attention: Any, before: Tensor) -> Callable[..., Any]:
        def forward(h: Tensor, *_: Any, **__: Any) -> Any:
            q, k, v = (
                each(h).view(len(h), -1, 2, 8).transpose(1, 2)
                for each in (attention.query, attention.key, attention.value)
            )
            k, v = (torch.cat([b[None], x], dim=2) for b, x in zip(before, (k, v), strict=True))
            seen = (q @ k.transpose(2, 3) / math.sqrt(8)).softmax(-1)
            return (seen @ v).transpose(1, 2).reshape(h.shape), None

        return forward

    for layer, before in zip(layers, keys_values, strict=True):
        attention = layer.attention.self
        monkeypatch.setattr(attention, "forward", written_out(attention, before))
    ids, mask = padded_right()
    first = 1 + base.config.pad_token_id if architecture == "roberta" else 0
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask).logits
        for row, shown in enumerate(mask.sum(1).tolist()):
            places = first + 5 + torch.arange(shown)[None]
            alone = base(input_ids=ids[row : row + 1, :shown], position_ids=places).logits
            torch.testing.assert_close(found[row, :shown], alone[0], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", sorted(MASKED))
def test_a_masked_models_prompt_starts_as_its_tokens_in_front(architecture: str) -> None:
    base, model = make_model(architecture), tuned(architecture, "prompt", seed=4, prompt_length=6)
    tokens = tuners.ordinary_tokens(tokenizer_of(architecture), base, 6, 4)
    assert trainable(model) == ["prompt_encoder.default.embedding.weight"]
    ids, mask = padded_right()
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask).logits
        for row, shown in enumerate(mask.sum(1).tolist()):
            text = ids[row : row + 1, :shown]
            alone = base(input_ids=torch.cat([tokens, text], dim=1)).logits
            torch.testing.assert_close(found[row, : 6 + shown], alone[0], atol=2e-5, rtol=1e-5)
            bare = model(input_ids=text).logits  # without mask
            torch.testing.assert_close(bare, alone, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("architecture", "tuner"), BEFORE)
def test_the_mask_is_found_behind_it(architecture: str, tuner: str) -> None:
    """Scores are those at the mask of the whole output, each row by itself."""
    model = stir(tuned(architecture, tuner))
    scorer = Scorer(model, tokenizer_of(architecture), AT_MASK)
    words = torch.tensor([word[0] for word in scorer.prompts.words])
    mask = tokenizer_of(architecture).mask_token_id
    wanted = []
    for row in scorer.prompts.rows(ROWS):
        ids = torch.tensor([row.prompt])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0]
        at = row.prompt.index(mask) + len(logits) - len(row.prompt)
        wanted.append(logits[at].log_softmax(-1)[words])
    found = scores(model, architecture)
    torch.testing.assert_close(found, torch.stack(wanted), atol=2e-5, rtol=1e-5)
    assert not torch.allclose(found, scores(make_model(architecture), architecture), atol=1e-3)


def in_front(architecture: str, tokens: Tensor, seen: list[int]) -> Any:
    """The base model, for one row at a time, with tokens put before what it is asked."""
    model: Any = make_model(architecture)
    forward = model.forward

    def longer(**given: Any) -> Any:
        if given.get("past_key_values") is None:
            ids = given["input_ids"]
            rows = len(ids)
            before = torch.cat([tokens.expand(rows, -1), ids], dim=1)
            given |= {
                "input_ids": before,
                "attention_mask": torch.cat(
                    [torch.ones(rows, tokens.shape[1], dtype=torch.long), given["attention_mask"]],
                    dim=1,
                ),
                "position_ids": torch.cat(
                    [
                        torch.arange(tokens.shape[1]).expand(rows, -1),
                        given["position_ids"] + tokens.shape[1],
                    ],
                    dim=1,
                ),
            }
            seen.append(before.shape[1])
        return forward(**given)

    model.forward = longer
    # what the scorer asks which arguments it takes
    longer.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return model


@pytest.mark.parametrize("tuner", ["prefix", "prompt"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_texts_and_shared_prompts_behind_it(
    architecture: str, tuner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written answers, and prompts that are read once for several answers, as with the tokens in front."""
    tokenizer = tokenizer_of(architecture)
    model = tuned(
        architecture, tuner, prefix_length=5, **({"prompt_length": 5} if tuner == "prompt" else {})
    )
    tokens = tuners.ordinary_tokens(tokenizer, model, 5, 0)
    seen: list[int] = []
    base = in_front(architecture, tokens, seen)
    # answers of several tokens, none the beginning of another: a sequence each
    task = Task("{text} It was", {"neg": "very terrible", "pos": "not good at all", "mid": "fine"})
    rows = [replace(row, label="mid") for row in ROWS]
    wanted = torch.cat(
        [(one := Scorer(base, tokenizer, task)).scores(one.encode([row])) for row in rows]
    )
    assert seen
    plain = Scorer(model, tokenizer, task)
    batch = plain.encode(rows)
    assert "shown_ids" not in batch
    torch.testing.assert_close(plain.scores(batch), wanted, atol=5e-5, rtol=1e-5)
    monkeypatch.setattr(causal, "WORTH_SHARING", 1)
    shared = Scorer(model, tokenizer, task)
    batch = shared.encode(rows)
    assert "shown_ids" in batch
    torch.testing.assert_close(shared.scores(batch), wanted, atol=5e-5, rtol=1e-5)

    # and what all rows begin with is read once
    begun = replace(task, template="the story is good {text} It was")
    wanted = torch.cat(
        [(one := Scorer(base, tokenizer, begun)).scores(one.encode([row])) for row in rows]
    )
    common = Scorer(model, tokenizer, begun)
    batch = common.encode(rows, common=True)
    assert "start_ids" in batch
    torch.testing.assert_close(common.scores(batch), wanted, atol=5e-5, rtol=1e-5)

    def written(one: Any, asked: list[Example]) -> list[str]:
        scorer = Scorer(one, tokenizer, TASK)
        batch = scorer.encode(asked)
        made = generate(
            one, tokenizer, batch, scorer.prompts.accepts, stop=("@",), max_new_tokens=8
        )
        return made.texts

    alone = [written(base, [row])[0] for row in ROWS]
    assert written(model, ROWS) == alone
    assert len(set(alone)) > 1


def test_ordinary_tokens_are_ordinary() -> None:
    model, tokenizer = make_model("llama"), tokenizer_of("llama")
    tokens = tuners.ordinary_tokens(tokenizer, model, 400, 0)[0].tolist()
    assert not set(tokens) & set(tokenizer.all_special_ids)
    assert max(tokens) < len(tokenizer) < 1024
    assert len(set(tokens)) > 100
    assert tokens[:5] == tuners.ordinary_tokens(tokenizer, model, 5, 0)[0].tolist()


def test_a_prefix_works_while_generating() -> None:
    base, model = make_model("llama"), tuned("llama", "prefix")
    tokens = tuners.ordinary_tokens(tokenizer_of("llama"), base, 5, 0)
    ids = torch.tensor([[1, 40, 50, 60]])
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)
    whole = torch.cat([tokens, ids], dim=1)
    wanted = base.generate(input_ids=whole, attention_mask=torch.ones_like(whole), **how)
    assert found[0, 4:].tolist() == wanted[0, 9:].tolist()


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *sorted(MASKED)])
def test_only_the_head_is_tuned(architecture: str, tmp_path: Path) -> None:
    base, model = make_model(architecture), tuned(architecture, "head")
    head = model.get_output_embeddings()
    assert head.weight is not model.get_input_embeddings().weight
    named = trainable(model)
    assert {id(model.get_parameter(name)) for name in named} == {id(p) for p in head.parameters()}
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, base(input_ids=ids).logits)
        stir(model)
        assert torch.equal(model.get_input_embeddings().weight, base.get_input_embeddings().weight)
        save_model(model, tokenizer_of(architecture), tmp_path / "model")
        again = load_model(tmp_path / "model")[0]
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("tuner", ["lora", "prefix", "prompt", "head"])
def test_a_pattern_restricts_further(tuner: str) -> None:
    model = tuned("llama", tuner)
    every = trainable(model)
    choose_tuned(model, "layers.1.*q_proj" if tuner == "lora" else "weight")
    some = [n for n in every if "layers.1.self_attn.q_proj" in n] if tuner == "lora" else every
    assert trainable(model) == some
    with pytest.raises(
        UserError, match=f"--tune is 'embed_tokens': it finds none of the {len(some)}"
    ):
        choose_tuned(model, "embed_tokens")  # which the tuner does not tune


@pytest.mark.parametrize("pattern", [None, "q_proj"])
def test_a_frozen_model_has_nothing_to_tune(pattern: str | None) -> None:
    model = make_model("llama").requires_grad_(False)
    with pytest.raises(
        UserError, match=r"^LlamaForCausalLM: all its parameters are frozen, .*requires_grad"
    ):
        choose_tuned(model, pattern)


@pytest.mark.parametrize("tuner", ["lora", "prefix", "prompt"])
def test_a_tuned_model_is_freed_at_once(tuner: str) -> None:
    """A run loads the base again while it goes back to its best step: no two at a time."""
    model = tuned("llama", tuner)
    scores(model, "llama")
    known = weakref.ref(model.get_base_model().get_input_embeddings().weight)
    gc.collect()
    gc.disable()
    try:
        del model
        assert known() is None
    finally:
        gc.enable()


# ------------------------------------------------------------------------------------- looks by hand


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize(
    ("architecture", "tuner"),
    [(a, t) for a in ARCHITECTURES for t in ("lora", "prefix", "prompt", "head")] + BEFORE,
)
def test_activation_space_is_each_row_moved_by_hand(
    architecture: str, tuner: str, samples: int
) -> None:
    model, eps = stir(tuned(architecture, tuner)), 1e-2
    scorer = Scorer(model, tokenizer_of(architecture), task_of(architecture))
    batch = scorer.encode(ROWS)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    weights = Weights(named, [0] * len(named), FAMILIES["rank1"], [eps])

    def seed_of(lane: int) -> int:
        return noise.direction_seed(5, 0, lane)

    with torch.no_grad():
        site = Site(weights, 0, seed_of, [eps], Shield())
        seen, _ = RowLooks(False, True).look(site, scorer.losses, batch, samples)
        pairs = list(zip(*(seen.losses[where] for where in ("at +eps", "at -eps")), strict=True))
        wanted = []
        for lane in range(samples * len(ROWS)):
            row = lane % len(ROWS)
            alone = scorer.encode([ROWS[row]])  # without padding
            for sign in (1.0, -1.0):
                moved = copy.deepcopy(model)
                for i, name in enumerate(weights.names):
                    z = materialise(weights, i, seed_of(lane)).float()
                    moved.get_parameter(name).add_(z, alpha=sign * eps)
                by_itself = Scorer(moved, tokenizer_of(architecture), task_of(architecture))
                wanted.append(float(by_itself.losses(alone)[0]))
    expected = torch.tensor(wanted).view(-1, 2)
    assert float((expected[:, 0] - expected[:, 1]).abs().mean()) > 1e-3
    torch.testing.assert_close(torch.tensor(pairs), expected, atol=3e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------------- runs


@pytest.fixture
def settings(tmp_path: Path, sentiment_csv: Path) -> Callable[..., TrainConfig]:
    """Ten steps of a tuner on an architecture."""

    def make(architecture: str, tuner: Any, **values: Any) -> TrainConfig:
        folder = tmp_path / architecture
        if not folder.exists():
            make_model(architecture).save_pretrained(folder)
            tokenizer_of(architecture).save_pretrained(folder)
        template = task_of(architecture).template
        base: dict[str, Any] = {
            "model": str(folder), "data": str(sentiment_csv), "template": template,
            "labels": {"neg": "great", "pos": "terrible"}, "out": str(tmp_path / "run"), "tuner": tuner,
            "max_forwards": 20, "eval_every": 6, "lr": 3e-2, "threads": 1, "lr_schedule": "constant",
            "start": "base", "patience": 0,
        }  # fmt: skip
        return TrainConfig(**{**base, **values})

    return make


def quiet(command: Callable[[Any, Progress], Result], asked: Any) -> Result:
    return command(asked, Progress(io.StringIO()))


def rebuilt(asked: TrainConfig, steps: int | None = None) -> Any:
    """Base + tuner + log, as anyone would from Python."""
    model, tokenizer = load_model(asked.model)
    model = tuners.attach(model, tokenizer, asked, RunFolder(asked.out).start)
    jf.replay(model, RunFolder(asked.out).log, steps)
    return model


@pytest.mark.parametrize("estimator", ["activation", "weight"])
@pytest.mark.parametrize(
    ("architecture", "tuner"),
    [(a, t) for a in ARCHITECTURES for t in ("lora", "prefix", "prompt", "head")] + BEFORE,
)
def test_a_run(settings: Any, architecture: str, tuner: str, estimator: str) -> None:
    asked = settings(architecture, tuner, estimator=estimator, keep="last")
    result = quiet(train, asked)
    folder = RunFolder(asked.out)
    assert folder.start.exists() == (tuner == "prefix")  # the others are functions of base and seed
    assert jf.fingerprint(rebuilt(asked, result["kept_step"])) == result["fingerprint"]
    start, end = rebuilt(asked, 0), rebuilt(asked)
    names = {name for name, *_ in jf.read_log(folder.log).header["tensors"]}
    for (name, a), b in zip(start.named_parameters(), end.parameters(), strict=True):
        assert torch.equal(a, b) == (name not in names), name
    assert 1 <= len(names) <= 8
    found = quiet(evaluate, EvalConfig(run=asked.out))
    for key in ("fingerprint", "accuracy", "loss"):
        assert found[key] == result[key]
    # stopped half way and continued
    half = replace(asked, out=f"{asked.out}-half", max_forwards=10)
    quiet(train, half)
    again = quiet(train, replace(half, max_forwards=20, resume=True))
    assert again["fingerprint"] == result["fingerprint"]
    assert jf.fingerprint(rebuilt(half)) == jf.fingerprint(end)


@pytest.mark.parametrize("tuner", ["lora", "prefix", "prompt", "head"])
def test_it_learns(settings: Any, tuner: str) -> None:
    result = quiet(train, settings("gpt2", tuner, max_forwards=160, lr_schedule="linear", lr=5e-2))
    assert result["loss"] < result["before_loss"] - 0.03


def test_lora_on_a_masked_model(settings: Any) -> None:
    asked = settings("bert", "lora", labels="neg=great,pos=bad")
    result = quiet(train, asked)
    assert quiet(evaluate, EvalConfig(run=asked.out))["fingerprint"] == result["fingerprint"]


def test_a_prefix_survives_another_machine(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a forward pass gives other last bits, the start that was kept is taken."""
    asked = settings("llama", "prefix")
    result = quiet(train, asked)
    real = tuners.real_activations
    monkeypatch.setattr(
        tuners, "real_activations", lambda *a: tuple(x * (1 + 3e-7) for x in real(*a))
    )
    assert quiet(evaluate, EvalConfig(run=asked.out))["fingerprint"] == result["fingerprint"]
    start = RunFolder(asked.out).start
    raw = start.read_bytes()
    start.unlink()
    with pytest.raises(UserError, match="made from a base model with fingerprint"):
        quiet(evaluate, EvalConfig(run=asked.out))
    for damaged in (raw[:20], b"", raw[:-4], raw.replace(b"prefix", b"prefiy")):
        start.write_bytes(damaged)
        with pytest.raises(UserError, match=r"start\.safetensors: cannot be read: ") as caught:
            quiet(evaluate, EvalConfig(run=asked.out))
        assert "\n" not in str(caught.value)
    tuners.keep_start(tuned("llama", "prefix", prefix_length=4), config("prefix"), start)
    with pytest.raises(
        UserError, match=r"holds a prefix \[4, 32\], the run's model takes \[5, 32\]"
    ):
        quiet(evaluate, EvalConfig(run=asked.out))
    monkeypatch.undo()
    start.unlink()  # on the same machine it is computed anew
    assert quiet(evaluate, EvalConfig(run=asked.out))["fingerprint"] == result["fingerprint"]


# ------------------------------------------------------------------------------- what replay writes


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("architecture", "tuner"),
    [(a, t) for a in ARCHITECTURES for t in ("lora", "prefix", "prompt")] + BEFORE,
)
def test_the_adapter_is_pefts(settings: Any, architecture: str, tuner: str, tmp_path: Path) -> None:
    from peft import PeftModel

    asked = settings(architecture, tuner, keep="last")
    result = quiet(train, asked)
    made = quiet(rebuild, ReplayConfig(asked.out, str(tmp_path / "adapter")))
    assert made["fingerprint"] == result["fingerprint"]
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert not names & {"model.safetensors", "config.json"}
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == asked.model
    base, _ = load_model(asked.model)
    before = scores(base, architecture)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    wanted = scores(rebuilt(asked), architecture)
    if tuner == "prompt":  # peft leaves positions out: right without padding on the left alone
        ids = torch.randint(3, 300, (1, 9), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            found = loaded.eval()(input_ids=ids).logits
            torch.testing.assert_close(found, rebuilt(asked)(input_ids=ids).logits)
        loaded = counted(loaded)
    assert torch.equal(scores(loaded.eval(), architecture), wanted)
    assert not torch.allclose(wanted, before, atol=1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_merged_model(settings: Any, architecture: str, tmp_path: Path) -> None:
    asked = settings(architecture, "lora", keep="last")
    quiet(train, asked)
    said = io.StringIO()
    rebuild(ReplayConfig(asked.out, str(tmp_path / "merged"), merge=True), Progress(said))
    assert "is rounded to" not in said.getvalue()
    loaded, _ = load_model(tmp_path / "merged")
    wanted = scores(rebuilt(asked), architecture)
    torch.testing.assert_close(scores(loaded, architecture), wanted, atol=2e-5, rtol=1e-5)
    base, _ = load_model(asked.model)
    changed = [
        name
        for (name, a), b in zip(base.named_parameters(), loaded.parameters(), strict=True)
        if not torch.equal(a, b)
    ]
    assert len(changed) == (2 if architecture == "gpt2" else 4)
    assert all("attn" in name for name in changed)


def test_a_sum_that_is_rounded_to_16_bits_is_said_to_be(settings: Any, tmp_path: Path) -> None:
    asked = settings("gpt2", "lora", dtype="bfloat16", max_forwards=4)
    quiet(train, asked)
    said = io.StringIO()
    rebuild(ReplayConfig(asked.out, str(tmp_path / "merged"), merge=True), Progress(said))
    assert "note: the sum of weights and LoRA is rounded to bfloat16" in said.getvalue()


def test_a_head_is_saved_whole(settings: Any, tmp_path: Path) -> None:
    asked = settings("opt", "head")
    result = quiet(train, asked)
    quiet(rebuild, ReplayConfig(asked.out, str(tmp_path / "model")))
    assert jf.fingerprint(load_model(tmp_path / "model")[0]) == result["fingerprint"]


def test_from_the_command_line(
    settings: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = settings("llama", "lora")
    argv = ["train", "--model", asked.model, "--data", asked.data, "--template", asked.template,
            "--labels", "neg=great,pos=terrible", "--out", asked.out, "--max-forwards", "8", "--tuner", "lora",
            "--lora-rank", "2", "--lora-alpha", "4", "--lora-targets", "self_attn", "--tune", "layers.1"]  # fmt: skip
    assert cli.main(argv) == 0
    assert cli.main(["train", "--resume", "--out", asked.out]) == 0
    capsys.readouterr()
    assert cli.main(["inspect", asked.out]) == 0
    assert "lora: " in capsys.readouterr().out
    assert RunFolder(asked.out).read_config().lora_rank == 2
    tensors = jf.read_log(RunFolder(asked.out).log).header["tensors"]
    assert len(tensors) == 8
    assert all("layers.1.self_attn" in name and 2 in shape for name, shape, *_ in tensors)
    assert cli.main(["replay", asked.out, "--out", str(tmp_path / "a")]) == 0
    assert cli.main(["replay", asked.out, "--out", str(tmp_path / "m"), "--merge", "--json"]) == 0
    assert (tmp_path / "a" / "adapter_config.json").exists()
    assert (tmp_path / "m" / "config.json").exists()
    capsys.readouterr()
    assert cli.main([*argv, "--tuner", "lara"]) == 2
    assert capsys.readouterr().err.startswith("error: --tuner: 'lara' is not one of 'full'")


# ------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"tuner": "lara"}, "--tuner is 'lara': it must be one of full, lora, prefix, prompt, head"),
        ({"tuner": "lora", "lora_rank": 0}, "--lora-rank is 0: it must be at least 1"),
        ({"tuner": "lora", "lora_rank": 1.5}, "--lora-rank is 1.5: it must be a whole number"),
        ({"tuner": "lora", "lora_alpha": 0}, "--lora-alpha is 0: it must be positive"),
        ({"tuner": "prefix", "prefix_length": -1}, "--prefix-length is -1: it must be at least 1"),
        ({"tuner": "lora", "lora_targets": "("}, "--lora-targets is '(': not a regular expression"),
        ({"tuner": "full", "lora_rank": 4}, "--lora-rank is 4: it belongs to --tuner lora"),
        ({"tuner": "head", "lora_targets": "q"}, "--lora-targets is 'q': it belongs to --tuner lora"),
        ({"tuner": "lora", "prefix_length": 9}, "--prefix-length is 9: it belongs to --tuner prefix"),
        ({"tuner": "prefix", "prompt_length": 9}, "--prompt-length is 9: it belongs to --tuner prompt"),
        ({"tuner": "prompt", "prefix_length": 9}, "--prefix-length is 9: it belongs to --tuner prefix"),
        ({"tuner": "prompt", "prompt_length": 0}, "--prompt-length is 0: it must be at least 1"),
    ],
)  # fmt: skip
def test_bad_options(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        resolved(config(**values))
    assert str(caught.value).startswith(said)


def test_patterns_that_find_nothing_or_the_wrong_thing() -> None:
    with pytest.raises(
        UserError, match="'nothing': it finds none of the 15 linear maps, such as model"
    ):
        tuned("llama", lora_targets="nothing")
    with pytest.raises(UserError, match=r"it finds lm_head, whose weight is the embeddings' too"):
        tuned("opt", lora_targets="q_proj|lm_head")
    untied = tuned("llama", lora_targets="q_proj|lm_head")
    assert any("lm_head.lora_A" in name for name in trainable(untied))


def test_a_prefix_needs_room_in_the_context(settings: Any) -> None:
    with pytest.raises(
        UserError, match=f"--prefix-length is {CONTEXT}: the model's context is {CONTEXT}"
    ):
        tuned("gpt2", "prefix", prefix_length=CONTEXT)
    with pytest.raises(
        UserError, match=f"--prompt-length is {CONTEXT}: the model's context is {CONTEXT}"
    ):
        tuned("gpt2", "prompt", prompt_length=CONTEXT)
    with pytest.raises(UserError, match="max_length 60 is beyond the model's context of 59 tokens"):
        quiet(train, settings("gpt2", "prompt", prompt_length=5, max_length=60))
    asked = settings("gpt2", "prefix", prefix_length=CONTEXT - 4)
    with pytest.raises(UserError, match="tokens with the answer, the model's context is 4"):
        quiet(train, asked)
    with pytest.raises(UserError, match="max_length 60 is beyond the model's context of 59 tokens"):
        quiet(train, settings("gpt2", "prefix", max_length=60))
    assert not Path(asked.out).exists()


def test_models_without_keys_and_values_to_put_before() -> None:
    with pytest.raises(UserError, match="layers of a distilbert model do not all keep keys and"):
        tuned("distilbert", "prefix")
    deaf: Any = make_model("bert")
    deaf.forward = lambda input_ids, attention_mask: None
    for tuner, said in (("prefix", "do not all keep"), ("prompt", "bert model does not take emb")):
        with pytest.raises(UserError, match=said):
            tuners.attach(deaf, tokenizer_of("bert"), config(tuner))
    model: Any = make_model("llama")
    model.config.layer_types = None
    forward = model.forward

    def forgetful(**arguments: Any) -> Any:
        output = forward(**arguments)
        output.past_key_values.layers[1].keys = None
        return output

    model.forward = forgetful
    with pytest.raises(UserError, match="do not all keep keys and values of one shape"):
        tuners.attach(model, tokenizer_of("llama"), config("prefix"))


@pytest.mark.parametrize("tuner", ["full", "prefix", "prompt", "head"])
def test_only_lora_can_be_merged(settings: Any, tuner: str, tmp_path: Path) -> None:
    asked = settings("gpt2", tuner, max_forwards=2)
    quiet(train, asked)
    with pytest.raises(UserError, match=f"--merge adds a LoRA .* tuner is '{tuner}': leave it out"):
        quiet(rebuild, ReplayConfig(asked.out, str(tmp_path / "m"), merge=True))
    assert not (tmp_path / "m").exists()


def test_another_tuner_is_not_resumed(settings: Any) -> None:
    asked = settings("gpt2", "lora", max_forwards=4)
    quiet(train, asked)
    for values in ({"tuner": "full"}, {"lora_rank": 4}, {"lora_targets": "c_proj"}):
        with pytest.raises(
            UserError, match=r"is .* in the run and .* now: resume with the run's value"
        ):
            quiet(train, replace(asked, resume=True, **values))
