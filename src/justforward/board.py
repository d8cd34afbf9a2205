"""How a grid is going, on stderr: a line for each cell that has ended; on a terminal also those under way."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from justforward.progress import spell_seconds

if TYPE_CHECKING:
    from rich.live import Live

REFRESH_SECONDS = 0.25
TAIL_BYTES = 4000

# Seconds that the rest takes once so many have been spent on each of the cells under way; None: not known yet.
Left = Callable[[Sequence[float]], float | None]


class Board:
    """Shows cells as they begin and end; of several at a time each has its lines. Ticks may come from any thread.

    Args:
        stream: where to (default stderr).
        live: whether to show the cells under way (default: if the stream is a terminal).
    """

    def __init__(self, stream: TextIO | None = None, live: bool | None = None) -> None:
        self._stream = stream or sys.stderr
        self._draw = self._stream.isatty() if live is None else live
        self._live: Live | None = None
        self._cells: dict[Path, tuple[str, float]] = {}  # title, begun at
        self._left: Left = lambda spent: None
        self._shown_at = 0.0
        self._lock = threading.RLock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def note(self, text: str) -> None:
        """A sentence of its own line."""
        with self._lock:
            self._stop()
            print(text, file=self._stream, flush=True)

    def begin(self, title: str, stderr: Path, left: Left) -> None:
        """A cell is started, which says things in that file."""
        with self._lock:
            self._cells[stderr] = (title, time.monotonic())
            self._left, self._shown_at = left, 0.0

    def tick(self, stderr: Path) -> None:
        """It is still at work; the last line of what each cell says is shown."""
        now = time.monotonic()
        with self._lock:
            if not self._draw or now - self._shown_at < REFRESH_SECONDS:
                return
            from rich.console import Console
            from rich.live import Live
            from rich.text import Text

            self._shown_at = now
            if self._live is None:
                # refreshed by ticks, so that there is no thread of rich's beside the processes we start
                console = Console(file=self._stream, force_terminal=True)
                self._live = Live(console=console, auto_refresh=False, transient=True)
                self._live.start()
            left = _spell_left(self._left(self._spent(now)))
            lines = []
            for file, (title, begun) in self._cells.items():
                said = Text(_last_line(file), style="dim", no_wrap=True, overflow="ellipsis")
                text = f"{title}  {spell_seconds(now - begun)}{left}"
                lines.append(Text.assemble(text, "\n  ", said))
                left = ""  # of all of them: said once
            self._live.update(Text("\n").join(lines), refresh=True)

    def end(self, stderr: Path, text: str) -> None:
        """The cell has ended, with these figures."""
        with self._lock:
            now = time.monotonic()
            title, begun = self._cells.pop(stderr)
            left = _spell_left(self._left(self._spent(now)))
            self.note(f"{title}: {text}, {spell_seconds(now - begun)}{left}")

    def _spent(self, now: float) -> list[float]:
        return [now - begun for _, begun in self._cells.values()]

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def _spell_left(seconds: float | None) -> str:
    return f"; about {spell_seconds(seconds)} left" if seconds else ""


def _last_line(path: Path) -> str:
    """Of a file that is being written; a progress bar's line is what follows its last return."""
    try:
        file = path.open("rb")
    except FileNotFoundError:  # its process is not there yet
        return ""
    with file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        lines = file.read().decode("utf-8", "replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
