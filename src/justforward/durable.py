"""What makes a file last: forced to the disk when it is due, its name with it, one writer at a time."""

from __future__ import annotations

import contextlib
import math
import os
import time
from pathlib import Path
from typing import IO, Any

from justforward.errors import UserError

if os.name == "posix":
    import fcntl

SECONDS = (
    5.0  # what a failing machine may cost at most; a process that is killed costs nothing of it
)


class Pace:
    """When what was written is to be forced to the disk.

    Args:
        seconds: so long after the last time; 0 each time, infinity at the end only.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self._last = time.monotonic()  # which no change of the clock moves

    def due(self) -> bool:
        """Whether it is time; if so, the next wait begins."""
        now = time.monotonic()
        if now - self._last < self.seconds:
            return False
        self._last = now
        return True


def seconds_of(sync: float | str) -> float:
    """The pace that `--sync` spells."""
    return {"step": 0.0, "end": math.inf}[sync] if isinstance(sync, str) else float(sync)


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Force the names in a folder to the disk: a file that was made, renamed or removed in it is so after a power failure, too."""
    if os.name != "posix":
        return
    held = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # not every file system can; none of those loses names
            os.fsync(held)
    finally:
        os.close(held)


def claim(file: IO[Any]) -> bool:
    """Keep other processes off an open file for as long as it is open; False where another one has it.

    Raises:
        OSError: its file system cannot.
    """
    if os.name == "posix":
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def hold(log: IO[Any], path: Path) -> None:
    """`claim` a log.

    Raises:
        UserError: another writer has it.
        OSError: as `claim`.
    """
    if not claim(log):
        raise UserError(
            f"{path}: another process, or another optimizer of this one, writes to this log: stop it or close() it first"
        )


def is_alive(process: int) -> bool:
    """Whether a process of this machine is there."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def sync_file(path: Path) -> None:
    """Force a file's bytes to the disk.

    Raises:
        OSError: it could not be done.
    """
    held = os.open(path, os.O_RDONLY)
    try:
        os.fsync(held)
    finally:
        os.close(held)
