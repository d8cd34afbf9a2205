"""Any module, any number: a small image classifier tuned for its accuracy, which has no gradient.

    python examples/anything.py

scikit-learn's handwritten digits (8 x 8 pixels), a small convolutional net with random weights, MeZO in weight space. The
closure returns what a look costs: here the share of wrong answers, which moves in jumps, so a look goes far (eps) and
sees many rows. At the end the same with a numpy function. Half a minute on one core.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import justforward as jf


def black_box(point: np.ndarray) -> float:
    """Anything that returns a number: a simulator, a person, a score of another program."""
    return float(np.abs(point - np.arange(4)).sum())


def main(argv: list[str] | None = None) -> tuple[float, float]:
    """Tune both; returns the accuracy on held-out digits before and after."""
    parser = argparse.ArgumentParser(description="MeZO on what has no gradient")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)

    torch.manual_seed(given.seed)
    images, digits = (torch.tensor(x) for x in load_digits(return_X_y=True))
    images = images.float().view(-1, 1, 8, 8) / 8.0 - 1.0
    train_x, test_x, train_y, test_y = train_test_split(images, digits, random_state=0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10)
    )

    @torch.no_grad()
    def accuracy(x: Tensor, y: Tensor) -> float:
        return float((net(x).argmax(dim=1) == y).float().mean())

    before = accuracy(test_x, test_y)
    opt = jf.MeZO(net, lr=1e-2, eps=0.1, rule="rms", seed=given.seed)
    for step in range(given.steps):
        rows = torch.randint(len(train_x), (512,))
        opt.param_groups[0]["lr"] = 1e-2 * (1.0 - step / given.steps)
        wrong = opt.step(lambda rows=rows: 1.0 - accuracy(train_x[rows], train_y[rows]))
        if (step + 1) % 500 == 0:
            print(f"step {step + 1}: {wrong:.1%} of the batch wrong", flush=True)
    opt.close()
    after = accuracy(test_x, test_y)
    print(f"held-out accuracy: {before:.1%} before, {after:.1%} after {given.steps} steps")

    point = nn.ParameterList([torch.zeros(4)])
    opt = jf.MeZO(point, lr=1e-2, eps=1e-2, rule="rms", seed=given.seed)
    for _ in range(given.steps):
        opt.step(lambda: black_box(point[0].detach().numpy()))
    opt.close()
    found = black_box(point[0].detach().numpy())
    print(f"black box: {black_box(np.zeros(4)):.2f} before, {found:.2f} after")
    return before, after


if __name__ == "__main__":
    main()
