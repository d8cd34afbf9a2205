"""Scoring SST-2's 872 validation sentences against the bare forwards over the same tokens without padding.

python benchmarks/evaluation.py --data FOLDER

The folder has validation.jsonl as it is published (sentence, label). The bare forwards see as many tokens, cut into rows
of one length, through the head at one position a row; the scoring is `Scorer.evaluate`, tokenising included. Beside it: options of many
tokens (COPA's shape, made up here), each behind its prompt, with the prompt's keys and values shared and not.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from _timing import Table, in_turns

from justforward import causal
from justforward.catalog import load
from justforward.data import Example
from justforward.evaluate import Scorer
from justforward.models import load_model
from justforward.published import read_published, scored_rows
from justforward.tasks import Task

BATCH = 32


def bare(model: Any, tokens: int, rows: int) -> None:
    """Forwards over so many tokens in so many rows, no two lengths in a batch."""
    short, longer = divmod(tokens, rows)
    for length, count in ((short + 1, longer), (short, rows - longer)):
        for start in range(0, count, BATCH):
            ids = torch.full((min(BATCH, count - start), length), 1000)
            model(input_ids=ids, use_cache=False, logits_to_keep=1)


def shared_prompts(model: Any, tokenizer: Any, rounds: int) -> dict[str, list[float]]:
    """Eight options behind a prompt of some 200 tokens, shared or repeated."""
    words = ["the", "weather", "in", "the", "north", "was", "rather", "cold", "that", "year", "and"]
    rows = [
        Example(
            {"text": " ".join(words * 18)},
            f"the {i} ended here",
            "made up",
            i,
            tuple(f"the {i + k} ended here" for k in range(8)),
            ((f"the {i} ended here",),),
        )
        for i in range(4)
    ]
    task = Task("{text}", kind="choice", score="mean")

    def scored(worth: int) -> None:
        causal.WORTH_SHARING = worth
        Scorer(model, tokenizer, task).evaluate(rows, 4)

    usual = causal.WORTH_SHARING
    seconds = in_turns({"shared": lambda: scored(0), "repeated": lambda: scored(10**9)}, rounds, 1)
    causal.WORTH_SHARING = usual
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="../shared/data/sst2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if not Path(given.data).is_dir():
        print(f"{given.data} is not there: give the folder of SST-2 with --data")
        return
    torch.set_num_threads(given.threads)
    loaded, tokenizer = load_model("smollm2")
    model: Any = loaded
    declared = load("sst2")
    task = declared.task_for()
    rows = scored_rows(read_published(declared, given.data, task), 872)
    scorer = Scorer(model, tokenizer, task)
    tokens = sum(scorer.length(row) for row in rows)
    table = Table(given.json)
    with torch.no_grad():
        seconds = in_turns(
            {
                "ours": lambda: Scorer(model, tokenizer, task).evaluate(rows, BATCH),
                "bare": lambda: bare(model, tokens, len(rows)),
            },
            given.rounds,
            1,
        )
    what = f"scoring {len(rows)} sentences / bare forwards over {tokens} tokens"
    table.ratio(what, seconds["ours"], seconds["bare"], at_most=1.3)
    seconds = shared_prompts(model, tokenizer, given.rounds)
    table.ratio("8 options: prompt shared / repeated", seconds["shared"], seconds["repeated"])
    table.print()


if __name__ == "__main__":
    main()
