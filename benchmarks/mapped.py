"""A .gguf as it is stored (`--quantize gguf`) against the same converted to float32: memory and time of a forward, fresh processes, SmolLM2.

    python benchmarks/mapped.py

Resident memory is given in its two parts: the process's own (anonymous), and pages of mapped files, which the system may
forget and read again. Both are sampled every two milliseconds; the peaks need not be at the same time. Processes take turns.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from _timing import Table, arguments

WARM, TIMES = 1, 3
PARTS = {"own": "RssAnon", "files": "RssFile", "both": "VmRSS"}


class Peaks:
    """The largest sizes of this process while inside, in MiB."""

    def __init__(self) -> None:
        self.found = dict.fromkeys(PARTS, 0.0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _look(self) -> None:
        lines = Path("/proc/self/status").read_text().splitlines()
        said = dict(line.split(":", 1) for line in lines)
        for part, key in PARTS.items():
            self.found[part] = max(self.found[part], int(said[key].split()[0]) / 1024)

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self._look()

    def __enter__(self) -> Peaks:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._look()
        self._stop.set()
        self._thread.join()


def child(kind: str, threads: int, rows: int, length: int) -> None:
    """Load the model and run it a few times; print the peaks from the beginning on, and the median time of a forward."""
    torch.set_num_threads(threads)
    with Peaks() as peaks:
        from step import answer_losses, make_batch

        from justforward.models import load_model

        seconds = [0.0]
        if kind == "libraries":
            import transformers.models.llama.modeling_llama  # noqa: F401 - what the model is made of
        else:
            how: dict[str, Any] = {"quantize": "gguf"} if kind == "gguf" else {"dtype": kind}
            loaded, _ = load_model("smollm2", **how)
            model: Any = loaded
            batch = make_batch(rows, length, model.config.vocab_size)
            losses = answer_losses(model)
            with torch.no_grad():
                for _ in range(WARM + TIMES):
                    start = time.perf_counter()
                    losses(batch)
                    seconds.append(time.perf_counter() - start)
    print(json.dumps({**peaks.found, "seconds": statistics.median(seconds[-TIMES:])}))


def measure(kind: str, threads: int, rows: int, length: int) -> dict[str, float]:
    """Of a fresh process."""
    given = [kind, str(threads), str(rows), str(length)]
    command = [sys.executable, __file__, "--child", *given]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure and print."""
    given = arguments(__doc__, rounds=5)
    table = Table(given.json)
    # converted, read and compiled before
    for kind in ("float32", "gguf"):
        measure(kind, given.threads, 1, 8)
    libraries = measure("libraries", given.threads, 1, 8)
    for rows, length, slower in ((8, 64, 1.5), (2, 32, 2.0)):
        found: dict[str, list[dict[str, float]]] = {"float32": [], "gguf": []}
        for _ in range(given.rounds):
            for kind, those in found.items():
                those.append(measure(kind, given.threads, rows, length))
        size = f"{rows} x {length} tokens"
        a, b = ([each["seconds"] for each in found[kind]] for kind in ("gguf", "float32"))
        table.ratio(f"{size}: a forward, as stored / float32", a, b, at_most=slower)
        for part, limit, bare in (("own", 1.15, 2.0), ("files", 0.5, 0.35), ("both", 0.7, 0.45)):
            a, b = ([each[part] for each in found[kind]] for kind in ("gguf", "float32"))
            own, other, less = statistics.median(a), statistics.median(b), libraries[part]
            what = f"{size}: peak memory, {part}"
            value = own / other
            detail = f"{own:.0f} MiB against {other:.0f} MiB; libraries {less:.0f} MiB"
            table.add(what, value, f"at most {limit:g}", value <= limit, detail)
            value = (own - less) / (other - less)
            what = f"{what}, libraries taken off"
            table.add(what, value, f"at most {bare:g}", value <= bare, detail)
    table.print()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], *map(int, sys.argv[3:6]))
    else:
        main()
