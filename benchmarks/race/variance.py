"""What limits a zeroth-order step: signal, noise of the data, noise of the direction, at points of a training.

    python benchmarks/race/variance.py --model tiny --task trec --rate 1e-2      # appends to variance.jsonl

With G the gradient of the training loss, S the covariance of one example's, B examples a batch and F the Fisher matrix
(the Hessian less a part without a sign, whose trace by Hutchinson's method was lost in its noise here), a step
of MeZO has a projected gradient of variance

    |G|^2  +  tr(S) / B  +  rounding
    signal    data

and moves by it along z, of which G is one part in tr(F) / (G'FG / |G|^2) = r, the effective rank: to second order the
best rate lowers the loss by |G|^4 / (2 tr(F) (|G|^2 + tr(S) / B)), which is 1/r times signal / (signal + data) of what a
step along G itself would. With a direction for each example tr(F) (|G|^2 + tr(S) / B) becomes
tr(F) (|G|^2 + tr(S)) / B + G'FG: B times less where the signal is most of it, the same where it is the data.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from contenders import EPS
from problems import Draws, Problem, load
from torch import Tensor, nn

import justforward as jf

HERE = Path(__file__).parent
POINTS = (0.0, 0.1, 0.3, 1.0)  # of the training
BATCHES, PROBES, ROWS = 64, 24, 256


def gradient(problem: Problem, model: nn.Module, rows: Tensor) -> Tensor:
    """Of the mean loss of the rows, flat."""
    loss = problem.losses(model, rows).mean()
    found = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([g.flatten() for g in found])


@torch.no_grad()
def shift(model: nn.Module, along: Tensor, length: float) -> None:
    """Move all weights."""
    at = 0
    for p in model.parameters():
        p.add_(along[at : at + p.numel()].view(p.shape), alpha=length)
        at += p.numel()


def curvature(
    problem: Problem, model: nn.Module, rows: Tensor, along: Tensor, generator: torch.Generator
) -> tuple[float, float, float]:
    """tr(F), its standard error, and along' F along: means over rows, each with a label drawn from the model's own."""
    sizes, parts = [], []
    for row in rows:
        logits = model(*problem.batch(row[None]))
        label = torch.multinomial(logits.detach().softmax(1), 1, generator=generator)[0]
        found = torch.autograd.grad(F.cross_entropy(logits, label), list(model.parameters()))
        flat = torch.cat([g.flatten() for g in found])
        sizes.append(float(flat @ flat))
        parts.append(float(flat @ along) ** 2)
    error = statistics.stdev(sizes) / math.sqrt(len(rows))
    return statistics.mean(sizes), error, statistics.mean(parts)


def measure(problem: Problem, model: nn.Module, size: int, seed: int) -> dict[str, float]:
    """All of it at the model's weights."""
    draw, generator = Draws(problem.train, seed), torch.Generator().manual_seed(seed)
    batches = [draw(size) for _ in range(BATCHES)]
    grads = torch.stack([gradient(problem, model, rows) for rows in batches])
    mean = grads.mean(0)
    data = float((grads - mean).square().sum() / (BATCHES - 1))  # tr(S) / B
    signal = float(mean.square().sum()) - data / BATCHES
    errors = []
    for probe in range(PROBES):
        z = torch.randn(mean.shape, generator=generator)
        losses = []
        for sign in (1.0, -1.0):
            moved = copy.deepcopy(model)
            shift(moved, z, sign * EPS)
            with torch.no_grad():
                losses.append(float(problem.losses(moved, batches[probe]).double().mean()))
        errors.append((losses[0] - losses[1]) / (2.0 * EPS) - float(grads[probe] @ z))
    rows = draw(ROWS)
    trace, error, along = curvature(problem, model, rows, mean / mean.norm(), generator)
    signal = max(signal, 0.0)
    example = size * data
    return {
        "signal": signal,
        "data": data,
        "rounding": sum(e * e for e in errors) / PROBES,
        "trace": trace,
        "trace_error": error,
        "along": along,
        "rank": trace / along,
        "best_step": signal**2 / (2.0 * trace * (signal + data)),
        "per_example": (signal + data) / ((signal + example) / size + signal * along / trace),
    }


def main() -> None:
    """A training of plain MeZO, measured on the way."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", required=True)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    plan = yaml.safe_load((HERE / "race.yaml").read_text())
    problem = load(plan["models"][given.model], plan["tasks"][given.task])
    model: Any = problem.model
    opt = jf.MeZO(model, lr=given.rate, eps=EPS, seed=given.seed)
    draw = Draws(problem.train, given.seed)
    due = [round(point * given.steps) for point in POINTS]
    for step in range(given.steps + 1):
        if step in due:
            loss = problem.score(model, problem.validation)[0]
            found = measure(problem, model, given.batch, given.seed + 1)
            line = {"model": given.model, "task": given.task, "step": step, "loss": loss, **found}
            line = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in line.items()}
            print(line, flush=True)
            with (HERE / "variance.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
        for group in opt.param_groups:
            group["lr"] = given.rate * (1.0 - step / given.steps)
        opt.step(lambda rows: problem.losses(model, rows), draw(given.batch))


if __name__ == "__main__":
    main()
