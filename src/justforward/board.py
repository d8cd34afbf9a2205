"""How a grid is going, on stderr: a line for each cell that has ended; on a terminal also the one under way."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from justforward.progress import spell_seconds

if TYPE_CHECKING:
    from rich.live import Live

REFRESH_SECONDS = 0.25
TAIL_BYTES = 4000

# Seconds that the rest takes once so many have been spent on the cell under way; None: not known yet.
Left = Callable[[float], float | None]


class Board:
    """Shows cells as they begin and end.

    Args:
        stream: where to (default stderr).
        live: whether to show the cell under way (default: if the stream is a terminal).
    """

    def __init__(self, stream: TextIO | None = None, live: bool | None = None) -> None:
        self._stream = stream or sys.stderr
        self._draw = self._stream.isatty() if live is None else live
        self._live: Live | None = None
        self._title = ""
        self._left: Left = lambda spent: None
        self._started = self._shown_at = 0.0

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
        self._stop()
        print(text, file=self._stream, flush=True)

    def begin(self, title: str, left: Left) -> None:
        """A cell is started."""
        self._title, self._left = title, left
        self._started, self._shown_at = time.monotonic(), 0.0
        if not self._draw:
            return
        from rich.console import Console
        from rich.live import Live

        # refreshed by `tick`, so that there is no second thread beside the processes we start
        console = Console(file=self._stream, force_terminal=True)
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._live.start()

    def tick(self, stderr: Path) -> None:
        """It is still at work; the last line of what it says is shown."""
        now = time.monotonic()
        if self._live is None or now - self._shown_at < REFRESH_SECONDS:
            return
        from rich.text import Text

        self._shown_at = now
        spent = now - self._started
        text = f"{self._title}  {spell_seconds(spent)}{_spell_left(self._left(spent))}"
        said = Text(_last_line(stderr), style="dim", no_wrap=True, overflow="ellipsis")
        self._live.update(Text.assemble(text, "\n  ", said), refresh=True)

    def end(self, text: str) -> None:
        """It has ended, with these figures."""
        spent = time.monotonic() - self._started
        self.note(f"{self._title}: {text}, {spell_seconds(spent)}{_spell_left(self._left(0.0))}")

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def _spell_left(seconds: float | None) -> str:
    return f"; about {spell_seconds(seconds)} left" if seconds else ""


def _last_line(path: Path) -> str:
    """Of a file that is being written; a progress bar's line is what follows its last return."""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        lines = file.read().decode("utf-8", "replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
