"""A training step of SmolLM2 against two bare forwards over the same batch, and against PyPI `mezo`.

    python benchmarks/step.py

The closure is what training on a task evaluates: the answer's cross-entropy, one loss a row, logits
at the last position only. `mezo==0.0.1` (the paper authors' package) is timed with the same closure
where it is installed: pip install --no-deps mezo==0.0.1
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _timing import Table, Things, arguments, in_turns
from torch import Tensor

import justforward as jf
from justforward.models import load_model

Batch = dict[str, Tensor]


def make_batch(rows: int, length: int, vocabulary: int) -> Batch:
    """Random tokens, and a token to predict after them."""
    generator = torch.Generator().manual_seed(rows * length)
    ids = torch.randint(0, vocabulary, (rows, length + 1), generator=generator)
    return {"input_ids": ids[:, :-1].contiguous(), "answer": ids[:, -1].contiguous()}


def answer_losses(model: Any) -> Callable[[Batch], Tensor]:
    """One loss a row: cross-entropy of the token after the last."""

    def losses(batch: Batch) -> Tensor:
        out = model(input_ids=batch["input_ids"], use_cache=False, logits_to_keep=1)
        return F.cross_entropy(out.logits[:, -1], batch["answer"], reduction="none")

    return losses


def measure(table: Table, rows: int, length: int, rounds: int) -> None:
    """Time all of them on one batch size and add the rows of the table."""
    name = f"{rows} x {length}"
    torch.manual_seed(0)
    loaded, _ = load_model("smollm2")
    model: Any = loaded
    batch = make_batch(rows, length, model.config.vocab_size)
    losses = answer_losses(model)

    @torch.no_grad()
    def two_forwards() -> None:
        losses(batch)
        losses(batch)

    things: Things = {"two forwards": two_forwards}
    # The rates are such that no weight goes anywhere: it is time that is measured.
    weight = jf.MeZO(model, lr=1e-12)
    things["weight"] = lambda: weight.step(losses, batch)
    rademacher = jf.MeZO(model, lr=1e-12, family="rademacher")
    things["weight, rademacher"] = lambda: rademacher.step(losses, batch)
    row = jf.MeZO(model, lr=1e-12, estimator="activation", rule="rms")
    things["activation"] = lambda: row.step(losses, batch)
    try:
        rival = importlib.import_module("mezo")
    except ModuleNotFoundError:
        rival = None
    if rival is not None:
        things["mezo"] = lambda: rival.update(
            model,
            batch,
            lambda _, b: losses(b).mean(),
            epsilon=1e-3,
            learning_rate=1e-12,
            random_seed=1,
        )
    seconds = in_turns(things, rounds)
    bare, small = seconds["two forwards"], rows * length < 256
    limits: dict[str, float | None] = {
        "weight": None if small else 1.12,
        "weight, rademacher": None,
        "activation": 1.0 if small else 1.10,
    }
    for kind, limit in limits.items():
        table.ratio(f"{name}: {kind} step / two forwards", seconds[kind], bare, at_most=limit)
    if rival is not None:
        table.ratio(f"{name}: PyPI mezo / two forwards", seconds["mezo"], bare)
        what = f"{name}: PyPI mezo / weight step"
        table.ratio(what, seconds["mezo"], seconds["weight"], at_least=7 if small else None)


def main() -> None:
    """Measure and print."""
    given = arguments(__doc__, rounds=12)
    torch.set_num_threads(given.threads)
    table = Table(given.json)
    measure(table, 8, 64, given.rounds)
    measure(table, 2, 32, given.rounds)
    table.print()


if __name__ == "__main__":
    main()
