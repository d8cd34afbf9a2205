"""Ctrl-C at the right moments only: weights are never left half moved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar

Result = TypeVar("Result")


class Shield:
    """Holds SIGINT back from `with` to its end, except while `call` runs something.

    A look along a direction moves every weight, calls the user's closure, and moves them back. Inside the
    closure Ctrl-C does what it always does; anywhere else it waits until the weights are whole. The handler
    closes the window itself before it raises, so that a second Ctrl-C cannot hit the restoring code either.

    Python delivers signals to the main thread only: in any other thread this does nothing, and need not.
    """

    def __init__(self) -> None:
        self._open = False
        self._pending: tuple[int, FrameType | None] | None = None
        self._previous: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            previous = signal.getsignal(signal.SIGINT)
            if callable(previous):  # not ignored, and not a handler installed outside Python
                self._previous = previous
                signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            if self._pending is not None:
                self._previous(*self._pending)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._open:
            self._open = False
            self._previous(number, frame)
        else:
            self._pending = (number, frame)

    def call(self, function: Callable[..., Result], *args: Any) -> Result:
        """`function(*args)`, interruptible."""
        self._open = True
        try:
            return function(*args)
        finally:
            self._open = False
