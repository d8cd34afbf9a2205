"""The table of docs/reliability.md: what the fault suite has tried in this session, and what came of it.

Tests count here; `pytest --reliability FILE` (`make faults`) writes the table at the end of the session.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

# Every fault that the suite tries, and how. Those of workers have a section of their own: add them there.
RUNS = {
    "kill -9 at a random instant": "`train` with snapshots; a second kill in the resumed one every third time",
    "kill -9 before each operation on the run's files": "open, rename, mkdir, remove, fsync; of the folder, its log, its lines, its result",
    "kill -9 at each file boundary of a snapshot": "the same operations, of snapshots",
    "SIGTERM at a random instant": "`train`",
    "SIGINT at a random instant": "`train`",
    "disk full at each operation": "ENOSPC once, at each operation that writes",
    "read-only from each operation on": "EROFS at it and all that follow",
    "disk full at a byte": "no file may grow beyond it (RLIMIT_FSIZE)",
    "log cut at each byte of its last records": "a loop with `MeZO(log=...)`, resumed",
    "a bit flipped in the log": "each bit of it: refused by name, the model untouched; or the file is put back and goes on",
    "a bit flipped in a snapshot": "in each of its files: named, an older one or the base is used",
    "NaN on one sign": "`MeZO`, each call of the closure in turn, both ways to look",
    "NaN in one row": "activation space, each row of both signs",
    "NaN in a step of `train`": "without `--backoff`; resumed",
    "an exception in the closure": "ValueError, KeyboardInterrupt, SystemExit at each call, both ways to look",
    "memory runs out in the closure": "MemoryError, torch.OutOfMemoryError at each call; and in `train`, resumed",
    "wrong base, dtype, adapter or order at replay": "refused by name, the model untouched",
    "run folder moved or copied": "between two sessions; each goes on",
    "the clock is wrong": "an hour, a year back or ahead; files from the future; another process's unfinished files stay",
    "a second writer": "a `train --resume`, an optimizer on the same log, a rewind: refused, the first goes on",
}  # fmt: skip
# Faults of workers: one row each, as above; tests count by `trial` as all others do.
WORKERS = {
    "a worker is killed": "kill -9 at a random instant, one of two over HTTP; the other goes on, to the steps of one worker alone",
    "a worker hangs": "SIGSTOP likewise; goes on later, to the weights of all",
    "a worker is slow": "twenty times slower than the other",
    "the hub is killed": "kill -9 at a random instant; started again on the same port, its worker has waited",
    "a request is lost": "three messages in ten, as if the connection broke before",
    "a reply is lost": "likewise behind",
    "a message comes twice": "likewise",
    "an old message comes again": "one from long ago, before the next",
    "a bit flipped in a message": "refused, nothing moves; the right one after it is taken",
    "a worker answers NaN or infinity": "refused and, the third time, struck off; the step waits for another worker",
    "another version, model, rows or settings": "refused by name, the others go on",
    "another key, or a hub that is not the hub": "refused on both sides",
    "one of two processes of torchrun": "killed, stopped, NaN, an exception, Ctrl-C: no process takes a step that one cannot; all say which one",
    "one of two processes of `torchrun -m -- justforward train`": "killed; torchrun starts again, the run goes on to the same bits",
}  # fmt: skip
PARSERS = {
    "log": "bytes, and a good log with some changed",
    "rule": "texts",
    "Modified.parse": "texts",
    "Blocks.parse": "texts",
    "task declaration (YAML)": "texts, and a good one with some of it changed",
    "run's config.yaml": "texts, and a good one with some of it changed",
    "--config and options of train": "texts, and a good one with some of it changed",
    "template and labels": "texts",
    "rows (CSV)": "bytes and texts",
    "rows (TSV)": "bytes and texts",
    "rows (JSONL)": "bytes, texts and objects",
    "compare.yaml": "texts, and a good one with some of it changed",
    "GGUF header": "a good file with some bytes changed, or cut",
    "safetensors checkpoint": "a good folder with some bytes changed, or cut",
    "manifest of a snapshot": "bytes, and a good one with some of it changed",
    "metrics.jsonl": "bytes, and good lines with some changed",
}
SECTIONS = {"Runs and loops": RUNS, "Workers": WORKERS, "Parsers": PARSERS}


@dataclass
class Count:
    """Of one fault: how often it was tried and survived, in how many trials data were lost, most steps taken again."""

    tried: int = 0
    survived: int = 0
    lost: int = 0
    again: int = 0


counts: dict[str, Count] = {}


@contextmanager
def trial(name: str) -> Iterator[Count]:
    """One trial of a fault: survived unless the block raises. The block asserts that nothing is lost, too."""
    assert any(name in rows for rows in SECTIONS.values()), name
    count = counts.setdefault(name, Count())
    count.tried += 1
    try:
        yield count
    except AssertionError:
        count.lost += 1
        raise
    count.survived += 1


def counted() -> dict[str, list[int]]:
    """All counts as plain numbers."""
    return {name: list(astuple(count)) for name, count in counts.items()}


def add(found: dict[str, list[int]]) -> None:
    """Count what another process has counted."""
    for name, (tried, survived, lost, again) in found.items():
        count = counts.setdefault(name, Count())
        count.tried += tried
        count.survived += survived
        count.lost += lost
        count.again = max(count.again, again)


def table(before: dict[str, tuple[int, int, int, int]]) -> str:
    """The page.

    Args:
        before: figures of faults that were not tried in this session, which may be a part of the suite.

    Raises:
        KeyError: a fault was never tried.
    """
    known = {name: Count(*figures) for name, figures in before.items()} | counts
    lines = [
        "# Faults tried, survived, data lost",
        "",
        "Written by `make faults`, which takes some minutes. A fault is survived if the command or the loop goes on, or says in one line what",
        "to do; data are lost if a step that was in the log is gone, or if what is continued comes to other bits than the run that",
        "nothing was done to. `again`: most steps that were taken a second time after a fault (their record was there, their loss was not, or",
        "they were under way).",
        "",
        f"Python {platform.python_version()}, {platform.system()}; models of a few thousand weights made from nothing, as in all tests.",
    ]
    for title, rows in SECTIONS.items():
        lines += ["", f"## {title}", ""]
        if not rows:
            lines.append("None yet.")
            continue
        lines += [
            "| fault | how | tried | survived | data lost | again |",
            "|---|---|---|---|---|---|",
        ]
        for name, how in rows.items():
            c = known[name]
            lines.append(f"| {name} | {how} | {c.tried} | {c.survived} | {c.lost} | {c.again} |")
    every = [known[name] for rows in SECTIONS.values() for name in rows]
    tried, survived, lost = (
        sum(getattr(c, n) for c in every) for n in ("tried", "survived", "lost")
    )
    lines += ["", f"All: {tried} tried, {survived} survived, data lost in {lost}.", ""]
    return "\n".join(lines)


def read_table(text: str) -> dict[str, tuple[int, int, int, int]]:
    """The figures of a page by fault."""
    found = re.findall(r"^\| (.+?) \| .* \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", text, re.M)
    return {name: (int(a), int(b), int(c), int(d)) for name, a, b, c, d in found}


def write(path: Path) -> None:
    """Write the page of this session."""
    before = read_table(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(table(before), encoding="utf-8")
