"""The demo with three seeds in fresh processes: accuracy, time, and what a replay takes.

python benchmarks/tuning.py
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _timing import Table, arguments

DEMO = Path(__file__).parent.parent / "examples" / "demo.py"


def command(*parts: str) -> dict[str, Any]:
    """Run justforward in a fresh process; its JSON."""
    line = [sys.executable, "-m", "justforward", *parts, "--json"]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Measure and print."""
    given = arguments(__doc__, seeds=3)
    table = Table(given.json)
    before, after, took, ratios, equal = [], [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(given.seeds):
            start = time.perf_counter()
            demo = [sys.executable, str(DEMO), "--folder", folder, "--seed", str(seed)]
            subprocess.run(
                [*demo, "--threads", str(given.threads)], check=True, stdout=subprocess.DEVNULL
            )
            took.append(time.perf_counter() - start)
            run = Path(folder) / f"demo-{seed + 1}"
            result = json.loads((run / "result.json").read_text())
            before.append(result["before_accuracy"])
            after.append(result["accuracy"])
            rebuilt = command("replay", str(run), "--out", str(run / "last"), "--steps", "last")
            ratios.append(rebuilt["replay_seconds"] / result["train_seconds"])
            scored = command("replay", str(run), "--out", str(run / "kept"))
            equal.append(scored["fingerprint"] == result["fingerprint"])

    def spell(values: list[float], form: str) -> str:
        return ", ".join(form.format(value) for value in values)

    middle = statistics.median(after)
    table.add("held-out accuracy, median", middle, "at least 0.82", middle >= 0.82,
              f"{spell(after, '{:.4f}')} from {spell(before, '{:.4f}')}")  # fmt: skip
    table.add("seconds for the demo, longest", max(took), "at most 90", max(took) <= 90,
              f"{spell(took, '{:.0f}')}")  # fmt: skip
    table.add("replay of all steps / training", max(ratios), "at most 0.2", max(ratios) <= 0.2,
              spell(ratios, "{:.3f}"))  # fmt: skip
    table.add("replays with an equal hash", sum(equal), f"{len(equal)}", all(equal))
    table.print()


if __name__ == "__main__":
    main()
