"""How training is going, on stderr: a bar on a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import math
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

LINE_SECONDS, LINE_SHARE = 10.0, 0.05


def spell_seconds(seconds: float) -> str:
    """``75.3`` -> ``"1:15"``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Shows loss, last validation, forwards, forwards a second and time left.

    Args:
        stream: where to (default stderr).
        bar: whether to draw a bar (default: if the stream is a terminal).
    """

    def __init__(self, stream: TextIO | None = None, bar: bool | None = None) -> None:
        self._stream = stream or sys.stderr
        self._draw = self._stream.isatty() if bar is None else bar
        self._bar: Bar | None = None
        self._task: Any = None
        self._validation = "-"
        self._total, self._limit = 1, float("inf")
        self._first, self._started = 0, 0.0
        self._shown_at, self._shown_forwards = 0.0, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def note(self, text: str) -> None:
        """A sentence of its own line."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    def start(self, forwards: int, total: int, seconds_left: float | None) -> None:
        """Training begins, at `forwards` of `total`, with so many seconds at most."""
        self._first = self._shown_forwards = forwards
        self._started = self._shown_at = time.monotonic()
        self._total = total
        self._limit = self._started + (float("inf") if seconds_left is None else seconds_left)
        if not self._draw:
            return
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            console=Console(file=self._stream),
        )
        self._task = self._bar.add_task("looking", total=total, completed=forwards)
        self._bar.start()

    def step(self, forwards: int, loss: float) -> None:
        """A step was taken; a loss that is NaN is not shown."""
        now = time.monotonic()
        rate = (forwards - self._first) / max(now - self._started, 1e-9)
        left = min((self._total - forwards) / max(rate, 1e-9), max(self._limit - now, 0.0))
        shown = "-" if math.isnan(loss) else f"{loss:.4f}"
        text = (
            f"forwards {forwards}/{self._total}  loss {shown}  validation {self._validation}  "
            f"{rate:.2f} forwards/s  {spell_seconds(left)} left"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=forwards, description=text)
        elif (
            now - self._shown_at >= LINE_SECONDS
            or forwards - self._shown_forwards >= LINE_SHARE * self._total
        ):
            self._shown_at, self._shown_forwards = now, forwards
            print(text, file=self._stream, flush=True)

    def validation(self, forwards: int, metric: str, value: float, loss: float) -> None:
        """A validation is done."""
        self._validation = f"{value:.1%}"
        self.note(f"forwards {forwards}: validation {metric} {value:.1%}, loss {loss:.4f}")

    def stop(self) -> None:
        """Training is over: the bar stays as it was."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
