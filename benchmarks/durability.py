"""What lasting costs: a log forced to the disk at each step, and a run rebuilt from a snapshot against from its base.

    python benchmarks/durability.py

The disk is that of the system's temporary folder.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import torch
from _timing import Table, arguments, in_turns, ratio
from torch import nn

import justforward as jf
from justforward.durable import Pace
from justforward.snapshots import RunOptimizer, Snapshots, replay
from justforward.trajectory import Step, Writer, read_log

APPENDS = 50


def main() -> None:
    """Measure and print."""
    given = arguments(__doc__, rounds=9, size=2048, steps=100)
    torch.set_num_threads(given.threads)
    table = Table(given.json)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        base = nn.Linear(given.size, given.size)
        state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        snapshots = Snapshots(place / "snapshots", print)
        opt = RunOptimizer(base, log=place / "log", lr=1e-7, snapshots=snapshots, sync=math.inf)

        def look() -> float:
            return float(base.bias.sum())

        for _ in range(given.steps):
            opt.step(look)
        opt.snapshot(1)
        opt.close()
        tuned = jf.fingerprint(base)

        def append(pace: float) -> None:
            writer = Writer.create(place / f"{pace}", read_log(place / "log").header)
            writer.pace = Pace(pace)
            for index in range(APPENDS):
                writer.append(Step(index, (0.5,)))
            writer.close()
            (place / f"{pace}").unlink()

        seconds = in_turns(
            {"step": lambda: append(0.0), "end": lambda: append(math.inf)}, given.rounds
        )
        forced = [(a - b) / APPENDS for a, b in zip(seconds["step"], seconds["end"], strict=True)]
        middle = sorted(forced)[len(forced) // 2]
        table.add(
            "--sync step: milliseconds a step more",
            1e3 * middle,
            "",
            True,
            f"{APPENDS} steps of one direction",
        )

        def rebuild(kept: Snapshots) -> None:
            base.load_state_dict(state)
            replay(base, place / "log", None, kept)
            assert jf.fingerprint(base) == tuned

        nothing = Snapshots(place / "none", print)
        seconds = in_turns(
            {"log": lambda: rebuild(nothing), "snapshot": lambda: rebuild(snapshots)}, given.rounds
        )
        value, low, high = ratio(seconds["log"], seconds["snapshot"])
        detail = f"{given.size**2 / 1e6:.1f} M weights, {given.steps} steps, both fingerprints checked; quartiles {low:.2f}, {high:.2f}"
        table.add(
            "replay from the base / from a snapshot of its end",
            value,
            "more than 1",
            value > 1,
            detail,
        )
    table.print()


if __name__ == "__main__":
    main()
