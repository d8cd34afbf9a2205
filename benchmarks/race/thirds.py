"""How much a step along each third of a model's layers can do: signal and noise of projected gradients, by rows.

    python examples/demo.py                                       # leaves runs/texts.csv and runs/demo-1/model
    python benchmarks/race/thirds.py --model smollm2              # before anything
    python benchmarks/race/thirds.py --model runs/demo-1/model    # behind the deep start, with rows that it has not seen

Along a direction z of one third the rows' projected gradients g have a mean, whose square is on average the squared length
of the mean gradient there (signal), and a mean square, which is the trace of the Fisher matrix (all). The first is
estimated without the rows' own noise: (N mean^2 - mean square) / (N - 1). A step of B rows lowers the loss at best by
signal / all x signal / (signal + (all - signal) / B), in units of what one along the gradient of one row would, if
the trace of the Hessian is that of the Fisher matrix.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from justforward import MeZO, noise
from justforward.config import TrainConfig
from justforward.depth import Depth
from justforward.evaluate import Scorer
from justforward.models import load_model
from justforward.prepare import read_data, split_rows
from justforward.progress import Progress
from justforward.settings import resolved, task_of
from justforward.starting import choose_layers, rows_to_fit
from justforward.store import Store
from justforward.trunk import Trunk

EPS = 1e-3


def main() -> None:
    """A line for each third."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", default="runs/texts.csv")
    parser.add_argument("--template", default="{text} It was")
    parser.add_argument("--labels", default="negative=terrible,positive=great")
    parser.add_argument("--skip", type=int, default=800, help="rows that a start was fitted on")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--looks", type=int, default=24)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    config = resolved(
        TrainConfig(
            model=given.model, data=given.data, out="none", template=given.template, labels=given.labels,
            start="base", layers="auto",
        )
    )  # fmt: skip
    task = task_of(config)
    with Progress() as progress:
        examples, _ = read_data(None, given.data, task, progress.note)
    config, splits = split_rows(config, examples)
    model, tokenizer = load_model(given.model)
    scorer = Scorer(model, tokenizer, task)
    choose_layers(model, config)
    depth = Depth(model)
    order = rows_to_fit(splits.train, len(splits.train), given.batch, 0)
    rows = order[given.skip : given.skip + given.rows]
    batches = [scorer.encode_training(rows[i : i + 32]) for i in range(0, len(rows), 32)]
    print(f"{Path(given.model).name}: {len(rows)} rows, {given.looks} looks of {EPS:g}")
    print(
        "| layers | loss | root of all | signal / all (its error) | best step |\n|---|---|---|---|---|"
    )
    for number in reversed(range(len(depth.parts))):
        with depth.resting(model, [{"kind": "layers", "part": number}]):
            trunk = Trunk(model, lambda name: Store(None, 2**31))
            opt = MeZO(model, eps=EPS)

            def losses(trunk: Trunk = trunk) -> torch.Tensor:
                with trunk.reused(whole=True):
                    return torch.cat([scorer.losses(batch) for batch in batches]).double()

            found = []
            for look in range(given.looks):
                seed = noise.direction_seed(11, look, 0)
                opt.weights.look(seed, [EPS], 1.0)
                ahead = losses()
                opt.weights.look(seed, [EPS], -2.0)
                behind = losses()
                opt.weights.look(seed, [EPS], 1.0)
                found.append((ahead - behind) / (2.0 * EPS))
            grads = torch.stack(found)  # [looks, rows]
            loss = float(losses().mean())
        count = grads.shape[1]
        square = grads.square().mean(1)
        signals = (count * grads.mean(1).square() - square) / (count - 1)
        everything, signal = float(square.mean()), float(signals.mean())
        error = float(signals.std()) / math.sqrt(given.looks)
        part = max(signal, 0.0)
        best = part / everything * part / (part + (everything - part) / given.batch)
        print(
            f"| {depth.parts[number]} | {loss:.3f} | {math.sqrt(everything):.3g} "
            f"| {signal / everything:.4f} ({error / everything:.4f}) | {best:.4f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
