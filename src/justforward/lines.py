"""The lines of a run, as metrics.jsonl has them: made, kept in order, and those apart that are asked for before each step."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from justforward.folder import Metric, RunFolder
from justforward.guard import KEPT


class Lines:
    """A run's lines.

    Args:
        folder: of the run.
        metrics: those of its sessions so far.
        started: when this session began, by the monotonic clock.

    Attributes:
        all: in order.
        marks: all but those of steps and of the test.
        validations: of these.
    """

    def __init__(self, folder: RunFolder, metrics: Iterable[Metric], started: float) -> None:
        self._folder, self._started = folder, started
        self.all = list(metrics)
        self._before = max((float(m["seconds"]) for m in self.all), default=0.0)
        self._sort()

    def _sort(self) -> None:
        self.marks = [m for m in self.all if m["kind"] in ("validation", *KEPT)]
        self.validations = [m for m in self.marks if m["kind"] == "validation"]

    @property
    def seconds(self) -> float:
        """Of all sessions of the run, loading and scoring included."""
        return self._before + time.monotonic() - self._started

    def made(self, kind: str, step: int, forwards: int, **values: Any) -> Metric:
        """A line, which is nowhere yet."""
        seconds = round(self.seconds, 3)
        return {"kind": kind, "step": step, "forwards": forwards, "seconds": seconds, **values}

    def remember(self, metric: Metric) -> None:
        """Take a line, which the folder does not have yet."""
        self.all.append(metric)
        if metric["kind"] in ("validation", *KEPT):
            self.marks.append(metric)
        if metric["kind"] == "validation":
            self.validations.append(metric)

    def append(self, metric: Metric) -> None:
        """Take a line, and write it."""
        self._folder.append_metric(metric)
        self.remember(metric)

    def add(self, kind: str, step: int, forwards: int, **values: Any) -> None:
        """Make a line, take and write it."""
        self.append(self.made(kind, step, forwards, **values))

    def take_back(self, step: int, line: Metric) -> None:
        """Leave out what came after a step, but for what stays, and take a line that says so. `write` writes it."""
        self.all = [m for m in self.all if m["kind"] in KEPT or m["step"] <= step]
        self.all.append(line)
        self._sort()

    def write(self) -> None:
        """Let the folder have exactly these."""
        self._folder.keep_metrics(self.all)
