"""A log of 1,000 steps of SmolLM2: replayed in one pass over the weights against step by step, to the same hash.

    python benchmarks/replay.py

The steps are made up: their times do not depend on what is in them. Step by step, each step is a pass of its own by the same kernels,
and, as another user of a seed would do it, `torch.normal` and `add_`.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from _timing import Table, arguments

import justforward as jf
from justforward.course import Course
from justforward.directions import FAMILIES, Weights
from justforward.models import load_model
from justforward.playback import apply_steps
from justforward.trajectory import Step


def main() -> None:
    """Measure and print."""
    given = arguments(__doc__, steps=1000, sampled=25)
    torch.set_num_threads(given.threads)
    table = Table(given.json)
    steps = [Step(i, ((-1.0) ** i * 1e-7,)) for i in range(given.steps)]
    for dtype in ("float32", "bfloat16"):
        for family in ("gaussian", "rademacher", "rank1"):
            found, hashes = {}, []
            for way in ("one pass", "step by step"):
                model: Any = load_model("smollm2", dtype=dtype)[0]
                named = list(model.named_parameters())
                weights = Weights(named, [0] * len(named), FAMILIES[family], [1e-3])
                course = Course(0)
                apply_steps(weights, course, [])
                start = time.perf_counter()
                if way == "one pass":
                    apply_steps(weights, course, steps)
                else:
                    for step in steps:
                        course.apply(weights, [step])
                found[way] = time.perf_counter() - start
                hashes.append(jf.fingerprint(model))
            detail = f"{found['step by step']:.1f} s against {found['one pass']:.1f} s, hashes {'equal' if hashes[0] == hashes[1] else 'DIFFER'}"
            value = found["step by step"] / found["one pass"]
            table.add(f"{dtype} {family}: step by step / one pass", value, "at least 5", value >= 5, detail)  # fmt: skip
            if dtype == "float32" and family == "gaussian":
                torch_way(table, given.sampled, given.steps, found["one pass"], model)
    table.print()


def torch_way(table: Table, sampled: int, steps: int, ours: float, model: Any) -> None:
    """`torch.normal` and `add_`, timed for some of the steps."""
    start = time.perf_counter()
    with torch.no_grad():
        for step in range(sampled):
            generator = torch.Generator().manual_seed(step)
            for p in model.parameters():
                p.data.add_(torch.normal(0.0, 1.0, p.shape, generator=generator), alpha=1e-9)
    took = (time.perf_counter() - start) / sampled * steps
    detail = f"{took:.1f} s (from {sampled} steps) against {ours:.1f} s"
    table.add("gaussian: torch.normal + add_ / one pass", took / ours, "-", True, detail)


if __name__ == "__main__":
    main()
