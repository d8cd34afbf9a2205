"""Noise added to 64 M weights: each family against what torch offers, in float32 and 16 bits, and against the machine's limit.

    python benchmarks/noise.py

The second table is the roofline: bytes that a kernel must move (each weight read once and written once, or read once and written
as float32), elements and bytes a second, and how much of the speed of torch's read-modify-write over as many weights that is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from _timing import Table, Things, arguments, in_turns
from torch import nn

from justforward.directions import FAMILIES, Weights
from justforward.moves import Move
from justforward.stored import values

FAMILIES_TIMED = ("gaussian", "rademacher", "rank1")


def main() -> None:
    """Measure and print."""
    given = arguments(__doc__, millions=64, rounds=15)
    torch.set_num_threads(given.threads)
    rows, columns = given.millions * 1024, 1024
    plain = torch.empty(rows, columns).normal_(0.0, 0.02)
    small = plain.bfloat16()
    scratch = torch.empty_like(plain)
    ours = plain.clone()
    half: Any = nn.Parameter(small.clone(), requires_grad=False)
    weights = {name: Weights([("w", ours)], [0], FAMILIES[name], [1e-3]) for name in FAMILIES_TIMED}
    halves = {name: Weights([("w", half)], [0], FAMILIES[name], [1e-3]) for name in FAMILIES_TIMED}
    one = np.full((1, 1), 1e-5, np.float32)
    move = Move(3, np.array([5], np.uint64), one, np.zeros(1, np.float32))
    signs = dict.fromkeys(weights, 1.0)

    def look(name: str) -> None:
        weights[name].look(5, [1e-3], signs[name])
        signs[name] = -signs[name]  # there and back: the weights stay what they are

    def widen(name: str) -> None:
        """All values of a look, a slice at a time, as a forward takes them."""
        halves[name].look(5, [1e-3], 1.0)
        step = (1 << 22) // columns
        with torch.no_grad():
            for start in range(0, rows, step):
                values(half, start, start + step, keep=False)
        halves[name].look(5, [1e-3], -1.0)

    things: Things = {
        "torch.normal + add_": lambda: plain.add_(
            torch.normal(0.0, 1.0, plain.shape, out=scratch), alpha=1e-9
        ),
        "read-modify-write": lambda: plain.add_(1e-9),
        "read-modify-write, bfloat16": lambda: small.add_(0.0),
        **{f"{name} look": lambda name=name: look(name) for name in weights},
        **{f"{name} update": lambda name=name: weights[name].update([move]) for name in weights},
        **{f"{name} look, bfloat16": lambda name=name: widen(name) for name in weights},
        **{
            f"{name} update, bfloat16": lambda name=name: halves[name].update([move])
            for name in weights
        },
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
    for kind in ("look", "update"):
        for name in weights:
            what = f"{name} {kind} in bfloat16 / in float32"
            table.ratio(what, seconds[f"{name} {kind}, bfloat16"], seconds[f"{name} {kind}"])
    table.print()
    if not given.json:
        roofline(seconds, rows * columns)


def roofline(seconds: dict[str, list[float]], elements: int) -> None:
    """Print what each moves, and how fast."""
    print(f"\n{'':30} {'bytes':>6} {'G elements/s':>13} {'GB/s':>7} {'of read-modify-write':>21}")
    limit = None
    for name in ("read-modify-write", *(n for n in seconds if " look" in n or " update" in n)):
        each = 8 if "bfloat16" not in name else 6 if "look" in name else 4
        took = float(np.median(seconds[name]))
        speed = each * elements / took
        limit = limit or speed
        print(
            f"{name:30} {each:6} {elements / took / 1e9:13.2f} {speed / 1e9:7.1f} {speed / limit:21.0%}"
        )


if __name__ == "__main__":
    main()
