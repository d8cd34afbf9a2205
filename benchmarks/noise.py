"""Noise added to 64 M float32 weights: each family against what torch offers.

python benchmarks/noise.py
"""

from __future__ import annotations

import numpy as np
import torch
from _timing import Table, Things, arguments, in_turns

from justforward.directions import FAMILIES, Move, Weights


def main() -> None:
    """Measure and print."""
    given = arguments(__doc__, millions=64, rounds=15)
    torch.set_num_threads(given.threads)
    rows, columns = given.millions * 1024, 1024
    plain = torch.empty(rows, columns).normal_(0.0, 0.02)
    scratch = torch.empty_like(plain)
    ours = plain.clone()
    weights = {
        name: Weights([("w", ours)], [0], FAMILIES[name], [1e-3])
        for name in ("gaussian", "rademacher", "rank1")
    }
    move = Move(
        3, np.array([5], np.uint64), np.full((1, 1), 1e-5, np.float32), np.zeros(1, np.float32)
    )
    signs = dict.fromkeys(weights, 1.0)

    def look(name: str) -> None:
        weights[name].look(5, [1e-3], signs[name])
        signs[name] = -signs[name]  # there and back: the weights stay what they are

    things: Things = {
        "torch.normal + add_": lambda: plain.add_(
            torch.normal(0.0, 1.0, plain.shape, out=scratch), alpha=1e-9
        ),
        "read-modify-write": lambda: plain.add_(1e-9),
        **{f"{name} look": lambda name=name: look(name) for name in weights},
        **{f"{name} update": lambda name=name: weights[name].update([move]) for name in weights},
    }
    seconds = in_turns(things, given.rounds)
    table = Table(given.json)
    normal, plain_pass = seconds["torch.normal + add_"], seconds["read-modify-write"]
    table.ratio("torch.normal + add_ / gaussian add", normal, seconds["gaussian look"], at_least=8)
    for name in ("rademacher", "rank1"):
        what = f"{name} add / read-modify-write"
        table.ratio(what, seconds[f"{name} look"], plain_pass, at_most=1.5)
    for name in weights:
        what = f"{name} update (rounds by dither) / read-modify-write"
        table.ratio(what, seconds[f"{name} update"], plain_pass)
    table.print()


if __name__ == "__main__":
    main()
