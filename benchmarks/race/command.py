"""Forwards and seconds that each method of a race takes to the best validation loss of tuned MeZO.

    justforward compare --config benchmarks/race/command.yaml --out race
    python benchmarks/race/command.py race

A forward is one over a batch, through however many layers: those of MeZO go through the last third but for the first
time that a text is met, so in work it has the better of this count. Seconds are those after the base model was scored.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

BASELINE = "mezo"


def curve(run: Path) -> list[tuple[int, float, float]]:
    """Forwards, seconds and loss of each validation of a run, in order."""
    lines: list[dict[str, Any]] = [
        json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    begun = next(line["seconds"] for line in lines if line["kind"] == "before")
    return [
        (m["forwards"], m["seconds"] - begun, m["loss"]) for m in lines if m["kind"] == "validation"
    ]


def reached(points: list[tuple[int, float, float]], loss: float) -> tuple[int, float] | None:
    """Forwards and seconds at the first validation with at most this loss."""
    return next(((f, s) for f, s, at in points if at <= loss), None)


def row(task: str, seed: int, method: str, folder: Path) -> tuple[str, float | None, float | None]:
    """A line of the table, and the ratios of forwards and of seconds."""
    cells = folder / "cells" / task
    base = curve(cells / BASELINE / str(seed) / "run")
    own = curve(cells / method / str(seed) / "run")
    goal = min(loss for _, _, loss in base)
    full = reached(base, goal)
    assert full is not None
    found = reached(own, goal)
    result = json.loads((cells / method / str(seed) / "run" / "result.json").read_text())
    ends = f"{own[-1][0]} | {min(p[2] for p in own):.3f} | {100 * result['value']:.1f}"
    if found is None:
        return f"| {task} | {seed} | {method} | {goal:.3f} | not reached | - | {ends} |", None, None
    forwards, seconds = found[0] / full[0], found[1] / full[1]
    text = f"{found[0]} ({forwards:.3f}) | {found[1]:.0f} s ({seconds:.2f})"
    return f"| {task} | {seed} | {method} | {goal:.3f} | {text} | {ends} |", forwards, seconds


def main() -> None:
    """The table, and the medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of justforward compare")
    folder = parser.parse_args().folder
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    done = {
        (r["task"], r["seed"], r["method"])
        for r in records
        if r["status"] == "ok" and r["trial"] is None
    }
    raced = [key for key in sorted(done) if (key[0], key[1], BASELINE) in done]
    if not raced:
        sys.exit(f"{folder}: no task has a result of {BASELINE} yet")
    print("| task | seed | method | loss to reach | forwards (of MeZO's) | seconds (of MeZO's) | forwards in all | best loss | test |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    ratios: dict[str, list[tuple[float, float]]] = {}
    for task, seed, method in raced:
        line, forwards, seconds = row(task, seed, method, folder)
        print(line)
        never = float("inf")
        ratios.setdefault(method, []).append((forwards or never, seconds or never))
    for method, found in ratios.items():
        medians = (statistics.median(pair[i] for pair in found) for i in (0, 1))
        print("{}: median ratio of forwards {:.3f}, of seconds {:.3f}".format(method, *medians))


if __name__ == "__main__":
    main()
