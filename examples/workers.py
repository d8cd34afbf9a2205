"""A loop that several processes, on one machine or many, take through together.

    torchrun --nproc-per-node 2 --max-restarts 3 examples/workers.py digits.jfl

Every process has all rows and a model of its own; each looks with its part of a step's rows, and scalars go round. If one
dies, torchrun starts all of them again and they go on from the log. `python examples/workers.py digits.jfl` does the same alone, to
the same bits. Half a minute.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import justforward as jf


def main(argv: list[str] | None = None) -> tuple[float, str]:
    """Tune; returns the accuracy on held-out digits and the model's fingerprint."""
    parser = argparse.ArgumentParser(description="MeZO in several processes")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("log", help="a file, continued if it is there")
    given = parser.parse_args(argv)

    torch.manual_seed(0)  # the same model everywhere
    images, digits = (torch.tensor(x) for x in load_digits(return_X_y=True))
    train_x, test_x, train_y, test_y = train_test_split(
        images.float() / 8.0 - 1.0, digits, random_state=0
    )
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    log = given.log if os.environ.get("LOCAL_RANK", "0") == "0" else None  # one a machine
    opt = jf.MeZO(net, lr=1e-2, estimator="activation", rule="rms", log=log, resume=True)
    workers = jf.Workers(opt, rows_at_once=32)
    for step in range(opt.steps, given.steps):
        rows = torch.randint(len(train_x), (256,), generator=torch.Generator().manual_seed(step))
        batch = {"x": train_x[rows], "y": train_y[rows]}
        workers.step(lambda b: F.cross_entropy(net(b["x"]), b["y"], reduction="none"), batch)
    workers.close()

    accuracy = float((net(test_x).argmax(dim=1) == test_y).float().mean())
    if workers.rank == 0:
        print(f"held-out accuracy {accuracy:.1%} after {opt.steps} steps, workers: {workers.size}")
    return accuracy, jf.fingerprint(net)


if __name__ == "__main__":
    main()
