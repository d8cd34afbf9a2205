"""A step of `MeZOTrainer`'s loop on SmolLM2 against the bare optimizer's, over the same batch.

    python benchmarks/trainer.py

Each round is a step of the loop (from the end of one to the end of the next: data, callbacks, logging, schedule) and
then a step of an optimizer of its own on a copy of the model, with the closure that a plain loop would have.
"""

from __future__ import annotations

import copy
import tempfile
import time
from typing import Any

import torch
import torch.nn.functional as F
from _timing import Table, arguments
from torch import Tensor
from transformers import TrainerCallback

import justforward as jf
from justforward.models import load_model

WARM = 2


class Turns(TrainerCallback):
    """After every step of the loop one of the bare optimizer's; seconds of both."""

    def __init__(self, bare: Any) -> None:
        self.seconds: dict[str, list[float]] = {"trainer": [], "bare": []}
        self._bare = bare
        self._since = 0.0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds["trainer"].append(time.perf_counter() - self._since)
        start = time.perf_counter()
        self._bare()
        self.seconds["bare"].append(time.perf_counter() - start)
        self._since = time.perf_counter()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._since = time.perf_counter()


def measure(table: Table, estimator: str, rows: int, length: int, rounds: int) -> None:
    """Time both and add a row of the table."""
    torch.manual_seed(0)
    loaded, _ = load_model("smollm2")
    model: Any = loaded
    other = copy.deepcopy(model)
    ids = torch.randint(0, model.config.vocab_size, (rows, length))
    items = rows * (length - 1)
    # The rate is such that no weight goes anywhere: it is time that is measured.
    opt = jf.MeZO(other, lr=1e-12, rule="rms", estimator=estimator)

    def scalar() -> Tensor:
        return other(input_ids=ids, labels=ids, num_items_in_batch=items).loss

    def one_a_row(ids: Tensor) -> Tensor:
        logits = other(input_ids=ids).logits[:, :-1].float()
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return losses.view(len(ids), -1).sum(dim=1) * (rows / items)

    def bare() -> None:
        if estimator == "weight":
            opt.step(scalar)
        else:
            opt.step(one_a_row, ids)

    turns = Turns(bare)
    with tempfile.TemporaryDirectory() as out:
        args = jf.MeZOConfig(
            output_dir=out,
            estimator=estimator,
            learning_rate=1e-12,
            per_device_train_batch_size=rows,
            max_steps=rounds + WARM,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        data = [{"input_ids": row, "labels": row} for row in ids] * (rounds + WARM)
        trainer = jf.MeZOTrainer(model, args, train_dataset=data, callbacks=[turns])
        trainer.train()
    seconds = {name: found[WARM:] for name, found in turns.seconds.items()}
    what = f"{estimator}, {rows} x {length}: MeZOTrainer's step / the bare optimizer's"
    table.ratio(what, seconds["trainer"], seconds["bare"], at_most=1.05)


def main() -> None:
    """Measure and print."""
    given = arguments(__doc__, rounds=12)
    torch.set_num_threads(given.threads)
    table = Table(given.json)
    for estimator in ("weight", "activation"):
        measure(table, estimator, 2, 32, given.rounds)
    table.print()


if __name__ == "__main__":
    main()
