"""Peak memory of training over peak memory of evaluation: fresh processes, the same batch of SmolLM2.

python benchmarks/memory.py
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from typing import Any

import torch
from _timing import Table, arguments

ROWS, LENGTH, TIMES = 8, 64, 3


def child(kind: str) -> None:
    """Evaluate or train on one batch a few times; print the peak resident size in MiB."""
    from step import answer_losses, make_batch

    import justforward as jf
    from justforward.models import load_model

    loaded, _ = load_model("smollm2")
    model: Any = loaded
    batch = make_batch(ROWS, LENGTH, model.config.vocab_size)
    losses = answer_losses(model)
    if kind == "evaluation":
        with torch.no_grad():
            for _ in range(TIMES):
                losses(batch)
    else:
        options: dict[str, Any] = {"rule": "rms"} if kind == "activation" else {}
        opt = jf.MeZO(model, lr=1e-6, estimator=kind, **options)
        for _ in range(TIMES):
            opt.step(losses, batch)
    print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def peak(kind: str) -> float:
    """Peak of a fresh process."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", kind], capture_output=True, text=True, check=True
    )
    return float(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Measure and print."""
    given = arguments(__doc__)
    table = Table(given.json)
    evaluation = peak("evaluation")
    for kind, limit in (("weight", 1.03), ("activation", 1.10)):
        training = peak(kind)
        value = training / evaluation
        detail = f"{training:.0f} MiB against {evaluation:.0f} MiB"
        table.add(
            f"{kind} training / evaluation", value, f"at most {limit:g}", value <= limit, detail
        )
    table.print()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2])
    else:
        main()
