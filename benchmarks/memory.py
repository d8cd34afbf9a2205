"""Peak memory of training over peak memory of evaluation, of bfloat16 over float32, of AdamW over both: fresh processes, SmolLM2.

A process that has only loaded its libraries has some 400 MiB already: figures are given with and without them. Weights are kept in a
file (`--offload`) in TMPDIR by a process that may not use more: its control group's limit needs the rights to make one (root).

python benchmarks/memory.py
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from itertools import product
from typing import Any

import torch
from _timing import Table, arguments
from ondisk import entering, limited

TIMES = 3
ROW_BY_ROW, FROM_DISK = ", row by row", ", from disk"
# bytes for a process with its weights in a file; what it shares with others is not counted by the system
LIMIT = 480 << 20


def child(kind: str, dtype: str, rows: int, length: int) -> None:
    """Evaluate or train on one batch a few times; print the peak resident size in MiB."""
    from step import answer_losses, make_batch

    import justforward as jf
    from justforward.models import load_model
    from justforward.ondisk import keep_on_disk

    if kind == "libraries":
        import transformers.models.llama.modeling_llama  # noqa: F401 - what the model is made of

        print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
        return
    loaded, _ = load_model("smollm2", dtype=dtype)
    model: Any = loaded
    batch = make_batch(rows, length, model.config.vocab_size)
    losses = answer_losses(model)
    if kind == "evaluation":
        with torch.no_grad():
            for _ in range(TIMES):
                losses(batch)
    elif kind == "adamw":
        model.requires_grad_(True)
        adam = torch.optim.AdamW(model.parameters(), lr=1e-6)
        for _ in range(TIMES):
            losses(batch).mean().backward()
            adam.step()
            adam.zero_grad()
    else:
        estimator: Any = kind.partition(",")[0]
        options: dict[str, Any] = {"rule": "rms"} if estimator == "activation" else {}
        if FROM_DISK in kind:
            keep_on_disk(model.parameters(), tempfile.gettempdir())
        opt = jf.MeZO(model, lr=1e-6, estimator=estimator, **options)
        step = jf.Workers(opt, rows_at_once=1).step if ROW_BY_ROW in kind else opt.step
        for _ in range(TIMES):
            step(losses, batch)
    print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def peak(kind: str, dtype: str = "float32", rows: int = 8, length: int = 64) -> float:
    """Peak of a fresh process."""
    command = [sys.executable, __file__, "--child", kind, dtype, str(rows), str(length)]
    with limited(LIMIT) if FROM_DISK in kind else nullcontext() as group:
        done = subprocess.run(command, capture_output=True, text=True, check=True, preexec_fn=entering(group))  # fmt: skip
    return float(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Measure and print."""
    given = arguments(__doc__)
    table = Table(given.json)
    for dtype in ("float32", "bfloat16"):  # stored so, for the others
        peak("evaluation", dtype)
    evaluation = peak("evaluation")
    for kind, limit in (("weight", 1.03), ("activation", 1.10)):
        training = peak(kind)
        value = training / evaluation
        detail = f"{training:.0f} MiB against {evaluation:.0f} MiB"
        table.add(
            f"{kind} training / evaluation", value, f"at most {limit:g}", value <= limit, detail
        )
    libraries = peak("libraries")
    half = peak("evaluation", "bfloat16")
    for name, less, limit in (("", 0.0, 0.80), (", libraries taken off both", libraries, 0.60)):
        value = (half - less) / (evaluation - less)
        detail = f"{half:.0f} MiB against {evaluation:.0f} MiB, libraries {libraries:.0f} MiB"
        what = f"evaluation stored in bfloat16 / in float32{name}"
        table.add(what, value, f"at most {limit:g}", value <= limit, detail)
    long = {"rows": 8, "length": 256}
    adamw = peak("adamw", **long)
    ways = ["", ROW_BY_ROW]
    try:
        with limited(LIMIT):
            ways.append(ROW_BY_ROW + FROM_DISK)
    except OSError as error:
        print(f"not measured: weights in a file, which needs a control group: {error}")
    kinds = [f"{kind}{how}" for how in ways for kind in ("weight", "activation")]
    for kind, dtype in product(kinds, ("bfloat16", "float32")):
        own = peak(kind, dtype, **long)
        for name, less, limit in (("", 0.0, 5.0), (", libraries taken off both", libraries, 8.0)):
            value = (adamw - less) / (own - less)
            detail = f"{adamw:.0f} MiB against {own:.0f} MiB"
            what = f"8 x 256 tokens: AdamW, all weights / {kind}, {dtype}{name}"
            table.add(what, value, f"at least {limit:g}", value >= limit, detail)
    table.print()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    else:
        main()
