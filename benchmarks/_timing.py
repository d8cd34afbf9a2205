"""Two things timed in the same run, in turns, so that a busy machine disturbs both alike."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

Things = dict[str, Callable[[], Any]]


def in_turns(things: Things, rounds: int, warm: int = 2) -> dict[str, list[float]]:
    """Seconds of each thing in each round; every round does all of them once, in alternating order."""
    seconds: dict[str, list[float]] = {name: [] for name in things}
    for turn in range(warm + rounds):
        order = list(things.items())
        for name, thing in order if turn % 2 else reversed(order):
            start = time.perf_counter()
            thing()
            took = time.perf_counter() - start
            if turn >= warm:
                seconds[name].append(took)
    return seconds


def ratio(above: Sequence[float], below: Sequence[float]) -> tuple[float, float, float]:
    """Median of the ratios of the rounds, with their quartiles."""
    ratios = sorted(a / b for a, b in zip(above, below, strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, low, high


def arguments(description: str | None, **defaults: int) -> argparse.Namespace:
    """--threads, --json, and whole numbers with these defaults."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", action="store_true", help="print the table as one JSON object")
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


class Table:
    """Rows of what, measured, target, printed when all are there."""

    def __init__(self, as_json: bool) -> None:
        self.rows: list[dict[str, Any]] = []
        self._json = as_json

    def add(self, what: str, value: float, target: str, met: bool, detail: str = "") -> None:
        """A row."""
        row = {"what": what, "value": value, "target": target, "met": met, "detail": detail}
        self.rows.append(row)

    def ratio(
        self,
        what: str,
        above: Sequence[float],
        below: Sequence[float],
        *,
        at_most: float | None = None,
        at_least: float | None = None,
    ) -> None:
        """A row with above / below as its value, the median of the rounds."""
        value, low, high = ratio(above, below)
        spread = f"quartiles {low:.2f} to {high:.2f}; {_ms(above)} against {_ms(below)}"
        if at_most is not None:
            self.add(what, value, f"at most {at_most:g}", value <= at_most, spread)
        elif at_least is not None:
            self.add(what, value, f"at least {at_least:g}", value >= at_least, spread)
        else:
            self.add(what, value, "-", True, spread)

    def print(self) -> None:
        """Print the table."""
        if self._json:
            print(json.dumps(self.rows))
            return
        width = max(len(row["what"]) for row in self.rows)
        for row in self.rows:
            mark = "" if row["met"] else "  MISSED"
            print(
                f"{row['what']:{width}}  {row['value']:7.3f}  target {row['target']}{mark}\n"
                f"{'':{width}}  {row['detail']}"
            )


def _ms(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds) * 1e3:.1f} ms"
