"""SmolLM2 trained in bfloat16 against float32: the same rows, the same directions, 300 steps, three seeds.

    python benchmarks/half.py --data FOLDER_OF_SST2

For each seed: a run in float32, the records of that very run applied to the weights in bfloat16, and a run in bfloat16 of
its own. Loss of 200 rows that none of them has seen.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from justforward.config import TrainConfig
from justforward.evaluate import Scorer
from justforward.folder import RunFolder
from justforward.models import load_model
from justforward.playback import same_records
from justforward.prepare import read_data, split_rows, use_threads
from justforward.run import train
from justforward.settings import resolved, task_of

SEEDS, STEPS = (0, 1, 2), 300


def config_of(data: str, out: Path, seed: int, dtype: Any, steps: int, threads: int) -> TrainConfig:
    """SST-2, last third of the layers, from the base model's own head, no choice by validation."""
    return TrainConfig(model="smollm2", task="sst2", data=data, out=str(out), seed=seed, dtype=dtype, layers=0.333,
                       start="base", patience=0, keep="last", backoff=False, max_forwards=2 * steps, eval_every=2 * steps,
                       train_size=320, validation_size=50, test_size=200, lr=1e-3, threads=threads)  # fmt: skip


def main() -> None:
    """Train, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="the folder of SST-2's files")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    use_threads(given.threads)
    rows: list[dict[str, Any]] = []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            found: dict[str, Any] = {"seed": seed}
            for dtype in ("float32", "bfloat16"):
                config = config_of(
                    given.data, Path(folder, dtype), seed, dtype, given.steps, given.threads
                )
                result: Any = train(config)
                print(
                    f"seed {seed}, {dtype}: {result['before_loss']:.4f} to {result['loss']:.4f}",
                    file=sys.stderr,
                    flush=True,
                )
                found |= {
                    "before": result["before_loss"],
                    dtype: result["loss"],
                    f"{dtype}_accuracy": result["accuracy"],
                }
            config = resolved(config)
            task = task_of(config)
            examples, _ = read_data(config.task, config.data, task)
            config, splits = split_rows(config, examples)
            model, tokenizer = load_model("smollm2", dtype="bfloat16")
            scorer = Scorer(model, tokenizer, task)
            same_records(model, RunFolder(Path(folder, "float32")).log)
            found["records"] = scorer.evaluate(splits.test, config.eval_batch_size).loss
            rows.append(found)
            print(json.dumps(found), file=sys.stderr, flush=True)
    if given.json:
        print(json.dumps(rows))
        return
    print(f"{given.steps} steps: loss of 200 test rows")
    for row in rows:
        apart = max(abs(row[name] - row["float32"]) for name in ("records", "bfloat16"))
        print(
            f"seed {row['seed']}: before {row['before']:.4f}; float32 {row['float32']:.4f}, the same records in bfloat16 "
            f"{row['records']:.4f}, trained in bfloat16 {row['bfloat16']:.4f}: {apart:.4f} apart (wanted at most 0.01)"
        )


if __name__ == "__main__":
    main()
