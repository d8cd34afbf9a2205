"""A beginning that all prompts have in common, read once, against each prompt read whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import make_model, make_tokenizer
from justforward import causal, tuners
from justforward.cached import can_share, reach
from justforward.config import TrainConfig
from justforward.data import Example
from justforward.errors import UserError
from justforward.evaluate import Scorer
from justforward.prompts import Row
from justforward.tasks import Task

NEVER = 2**40
WORDS = {"neg": "bad", "pos": "very good"}
TEXTS = ["a fine film", "bad", "the story is wonderful", "the music is"]
TASKS = {
    "classification": Task("{text} It was", WORDS),
    "choice": Task("{text} So", kind="choice", score="mean"),
    "generation": Task("{text} So", kind="generation", loss="vocabulary", max_new_tokens=4),
}


def examples(kind: str) -> list[Example]:
    options = ("the end is bad", "great", "the end is very good")
    if kind == "classification":
        labels = list(WORDS) * 2
        return [
            Example({"text": t}, y, "m", i)
            for i, (t, y) in enumerate(zip(TEXTS, labels, strict=True))
        ]
    shown = options if kind == "choice" else ()
    return [
        Example({"text": text}, options[i % 3], "m", i, shown, ((options[i % 3],),))
        for i, text in enumerate(TEXTS)
    ]


def tuned(architecture: str, tuner: Any) -> Any:
    model, tokenizer = make_model(architecture), make_tokenizer()
    config = TrainConfig("m", "d", "o", tuner=tuner, prefix_length=3)
    return tuners.attach(model, tokenizer, config) if tuner != "full" else model


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("tuner", ["full", "lora", "prefix"])
@pytest.mark.parametrize("architecture", ["opt", "gpt2", "llama"])
def test_reading_the_beginning_once_changes_nothing(
    architecture: str, tuner: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = examples(kind)
    scorer = Scorer(
        tuned(architecture, tuner), make_tokenizer(), TASKS[kind], demonstrations=rows[:2]
    )
    monkeypatch.setattr(causal, "WORTH_SHARING", NEVER)
    whole = scorer.encode(rows, common=True)
    expected, told = scorer.scores(whole), scorer.evaluate(rows, 4)
    assert "start_ids" not in whole
    monkeypatch.setattr(causal, "WORTH_SHARING", 1)
    batch = scorer.encode(rows, common=True)
    start = batch["start_ids"]
    assert start.shape[0] == 1
    assert start.shape[1] > 5
    torch.testing.assert_close(scorer.scores(batch), expected, rtol=1e-4, atol=1e-5)
    found = scorer.evaluate(rows, 4)
    assert found.predictions == told.predictions
    assert found.loss == pytest.approx(told.loss, rel=1e-5)
    assert found.forwards > told.forwards
    assert "start_ids" not in scorer.encode(rows)  # a look's rows have weights of their own


def test_a_prompt_keeps_a_token_of_its_own(tiny_opt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal, "WORTH_SHARING", 1)
    scorer = Scorer(tiny_opt, make_tokenizer(), TASKS["classification"])
    words = scorer.prompts.words
    rows = [Row([5, 6, 7, 8], words, 0), Row([5, 6, 7], words, 0), Row([5, 6, 7, 9], words, 1)]
    batch = scorer.prompts.batch(rows, common=True)
    assert batch["start_ids"].tolist() == [[5, 6]]
    assert batch["attention_mask"].view(3, -1).sum(dim=1).tolist() != [0, 0, 0]
    expected = scorer.prompts.scores(scorer.prompts.batch(rows))
    torch.testing.assert_close(scorer.prompts.scores(batch), expected, rtol=1e-4, atol=1e-5)
    others = [Row([4, 6, 7], words, 0), *rows]
    assert "start_ids" not in scorer.prompts.batch(others, common=True)
    assert "start_ids" not in scorer.prompts.batch(rows[:1], common=True)  # nothing to save


# ------------------------------------------------------------------------- models that look back so far only

WINDOW = 6
SMALL: dict[str, Any] = {
    "vocab_size": 340,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}


def of_another_family(name: str, window: int = WINDOW) -> Any:
    """A causal model with layers that look back over `window` places, or that keep a state."""
    import transformers as t

    mixed = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": window}
    configs: dict[str, Any] = {
        "mistral": lambda: t.MistralConfig(**SMALL, sliding_window=window),
        "gemma": lambda: t.Gemma3TextConfig(**SMALL, **mixed, head_dim=8),
        "gpt-neo": lambda: t.GPTNeoConfig(
            vocab_size=340,
            hidden_size=16,
            num_layers=2,
            num_heads=2,
            attention_types=[[["global", "local"], 1]],
            window_size=window,
            max_position_embeddings=128,
            initializer_range=0.3,
        ),
        "lfm": lambda: t.Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = t.AutoModelForCausalLM.from_config(configs[name]())
    return model.eval()


def by_itself(model: Any, scorer: Scorer, row: Example) -> list[float]:
    """Score of each choice, from the bare model: one sequence at a time, without padding."""
    scorer.prepare([row])
    known = scorer._known[scorer._numbers[id(row)]][1]
    found = []
    for choice in known.choices:
        logits = model(input_ids=torch.tensor([known.prompt + choice])).logits[0].float()
        told = logits.log_softmax(-1)[len(known.prompt) - 1 : -1]
        each = told[range(len(choice)), choice]
        found.append(float(each.mean() if scorer.task.score == "mean" else each.sum()))
    return found


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("family", ["mistral", "gemma", "gpt-neo", "lfm"])
def test_what_a_row_is_scored_does_not_depend_on_those_beside_it(
    family: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding behind a common beginning takes places of a window; a state cannot be repeated for several rows."""
    model, rows = of_another_family(family), examples(kind)
    scorer = Scorer(model, make_tokenizer(), TASKS[kind], demonstrations=rows[:2])
    monkeypatch.setattr(causal, "WORTH_SHARING", 1)
    batch = scorer.encode(rows, common=True)
    with torch.no_grad():
        expected = torch.tensor([by_itself(model, scorer, row) for row in rows])
    torch.testing.assert_close(scorer.scores(batch), expected, rtol=1e-4, atol=1e-4)
    if kind == "generation":
        asked = scorer.encode(rows, "none", common=True)
        alone = [scorer.predict(scorer.encode([row], "none"))[0] for row in rows]
        assert scorer.predict(asked) == alone


def test_a_beginning_is_shared_as_long_as_all_is_within_the_window(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(causal, "WORTH_SHARING", 1)
    rows = examples("generation")
    for window, shared in ((128, True), (WINDOW, False)):
        model = of_another_family("gemma", window)
        assert reach(model) == window
        scorer = Scorer(model, make_tokenizer(), TASKS["generation"], demonstrations=rows[:2])
        assert can_share(model, scorer.prompts.accepts)
        assert ("start_ids" in scorer.encode(rows, "none", common=True)) is shared
    room = TASKS["generation"].max_new_tokens
    longest = max(scorer.length(row) for row in rows)
    for window in (longest + room, longest + room - 1):
        scorer = Scorer(
            of_another_family("gemma", window),
            make_tokenizer(),
            TASKS["generation"],
            demonstrations=rows[:2],
        )
        shared = window == longest + room
        assert ("start_ids" in scorer.encode(rows, "none", common=True)) is shared
    assert reach(make_model("llama")) == float("inf")
    assert reach(of_another_family("lfm")) == 0


@pytest.mark.parametrize("tuner", ["prefix", "prompt"])
def test_what_is_before_a_text_is_within_the_window(tuner: Any) -> None:
    rows = examples("classification")
    config = TrainConfig("m", "d", "o", tuner=tuner, prefix_length=3, prompt_length=3)

    def scorer(family: str, window: int) -> Scorer:
        model = tuners.attach(of_another_family(family, window), make_tokenizer(), config)
        return Scorer(model, make_tokenizer(), TASKS["classification"])

    wide = scorer("gemma", 32)
    together = wide.scores(wide.encode(rows))
    alone = torch.cat([wide.scores(wide.encode([row])) for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match=r"m:0: the text makes .* context is 7"):
        scorer("gemma", 10).encode(rows)
    with pytest.raises(UserError, match=r"lfm2 model .*--tuner lora"):
        scorer("lfm", 0)


def test_a_model_that_reads_padding_is_told_of() -> None:
    import transformers as t

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = t.RwkvForCausalLM(
            t.RwkvConfig(vocab_size=340, hidden_size=16, num_hidden_layers=2, context_length=64)
        ).eval()
        for weight in model.parameters():  # biases and norms of a new model are the same everywhere
            weight.data.add_(0.3 * torch.randn(weight.shape))
    with pytest.warns(UserWarning, match="a rwkv model scores a row otherwise where"):
        scorer = Scorer(model, make_tokenizer(), TASKS["classification"])
    rows = examples("classification")
    alone = torch.cat([scorer.scores(scorer.encode([row])) for row in rows])
    assert not torch.allclose(scorer.scores(scorer.encode(rows)), alone, atol=1e-3)
