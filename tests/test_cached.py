"""A beginning that all prompts have in common, read once, against each prompt read whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import make_model, make_tokenizer
from justforward import causal, tuners
from justforward.config import TrainConfig
from justforward.data import Example
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
