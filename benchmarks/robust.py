"""What the robust rule takes from honest rows: rises of real texts beyond k median absolute deviations, and what that does to their mean.

SmolLM2 on rows of a declared task; weight space (one direction for all rows) and activation space (a direction a row).

    python benchmarks/robust.py --data FOLDER [--task sst2] [--rows 32] [--steps 16]
"""

from __future__ import annotations

import argparse
import math
import statistics

import torch

from justforward.data import batches
from justforward.evaluate import Scorer
from justforward.models import load_model
from justforward.optim import MeZO
from justforward.prepare import read_data
from justforward.published import Published
from justforward.robust import drawn_in
from justforward.settings import make_task
from justforward.sights import Sight

LIMITS = (3.0, 6.0, 10.0, 20.0, 40.0)


def main() -> None:
    """Looks, then bounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--steps", type=int, default=16)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model("smollm2", print)
    task = make_task(given.task, "smollm2", None, None)
    found, _ = read_data(given.task, given.data, task)
    assert isinstance(found, Published)
    scorer = Scorer(model, tokenizer, task)
    for estimator in ("weight", "activation"):
        opt = MeZO(model, lr=1e-6, eps=1e-3, estimator=estimator, seed=1)
        seen: list[list[Sight]] = []
        for step in range(given.steps):
            opt.steps = step  # the directions of so many steps, from where the model is
            rows = batches(len(found.examples), given.rows, 0, step)
            sights = []
            for first in range(0, given.rows, 8):
                places = range(first, min(first + 8, given.rows))
                batch = scorer.encode_training([found.examples[rows[i]] for i in places])
                sights.append(opt.look(scorer.losses, batch, rows=places, of=given.rows))
            seen.append(sights)
        for k in LIMITS:
            print(estimator, _cost(seen, k, estimator == "activation"))


def _cost(steps: list[list[Sight]], k: float, apart: bool) -> str:
    drawn, total, moved = 0, 0, []
    for sights in steps:
        kept, counts = drawn_in(list(enumerate(sights)), k, apart)
        before = [x for sight in sights for x in sight.rises[0]]
        after = [x for sight in kept for x in sight.rises[0]]
        drawn, total = drawn + counts.total(), total + len(before)
        if apart:  # every rise is a coefficient: how much of their length is left
            moved.append(math.dist(before, after) / math.hypot(*before))
        else:
            error = statistics.stdev(before) / math.sqrt(len(before))
            moved.append(abs(statistics.fmean(before) - statistics.fmean(after)) / error)
    of = "of the coefficients' length" if apart else "of the mean's standard error"
    return f"k = {k:g}: {drawn} of {total} rises drawn in; moved by {statistics.fmean(moved):.3f} {of} (worst step {max(moved):.3f})"


if __name__ == "__main__":
    main()
