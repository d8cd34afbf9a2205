"""A shared folder in which messages are files, as the hub sees it: requests in `in/`, replies in `out/`, one hub a folder."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO

from justforward.durable import claim
from justforward.errors import UserError

STALE = 600.0  # seconds after which a file that nobody took is removed
_NAME = re.compile(r"([a-z]+)-[0-9a-f]{32}")


class Mail:
    """The messages of a folder.

    Args:
        path: the folder.
        note: called with a sentence when the folder is away, and when it is there again.
        now: seconds, of a clock that only rises; likewise everywhere.
    """

    def __init__(self, path: Path, note: Callable[[str], None], now: float) -> None:
        self.path, self._note = path, note
        self._away = False
        self._swept = now
        self._left: dict[Path, float] = {}  # files that nobody took, and when they were seen first

    def requests(self, now: float) -> list[tuple[Path, str]]:
        """Those that are there, with their kinds; none while the folder cannot be read."""
        try:
            found = [(f, _NAME.fullmatch(f.name)) for f in sorted((self.path / "in").iterdir())]
            there = [(f, n[1]) for f, n in found if n and not f.is_symlink() and f.is_file()]
            self._sweep(now)
        except OSError as error:
            if not self._away:
                self._note(
                    f"--folder {self.path}: cannot be read: {error.strerror}: waiting for it"
                )
            self._away = True
            return []
        if self._away:
            self._note(f"--folder {self.path}: is there again")
        self._away = False
        return there

    def _sweep(self, now: float) -> None:
        """Remove what nobody took: replies to workers that are gone, files that they have not written to their end.

        Their age is by this machine's clock, from when they were seen first: the folder's machine may have another.
        """
        if now - self._swept < STALE / 10:
            return
        self._swept = now
        there = [file for file in (self.path / "out").iterdir() if _ours(file)]
        there += [f for f in (self.path / "in").iterdir() if f.name[:1] == "." and _ours(f)]
        self._left = {file: self._left.get(file, now) for file in there}
        for file, since in self._left.items():
            if now - since > STALE:
                with contextlib.suppress(OSError):
                    file.unlink()


def _ours(file: Path) -> bool:
    """Whether it is a message, or a part of one."""
    return _NAME.fullmatch(file.name.removeprefix(".")) is not None


def hold_folder(path: Path, note: Callable[[str], None]) -> IO[bytes]:
    """Keep other hubs off a shared folder for as long as what is returned is open.

    Raises:
        UserError: another hub is at work in it, or it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / ".hub").open("ab")
    except OSError as error:
        raise UserError(f"--folder {path}: cannot be used: {error.strerror}") from None
    try:
        if claim(lock):
            return lock
    except OSError as error:  # not every shared folder can; a hub can be without
        note(f"--folder {path}: cannot be locked: {error.strerror}: see to it that no other hub uses it")  # fmt: skip
        return lock
    lock.close()
    raise UserError(
        f"--folder {path}: another hub is at work in it: stop that one or choose another --folder"
    )


def open_folder(path: Path) -> None:
    """Make the two folders, without what is left in them of a hub before.

    Raises:
        UserError: they cannot be made.
    """
    try:
        for part in (path / "in", path / "out"):
            part.mkdir(parents=True, exist_ok=True)
            for file in part.iterdir():
                if _ours(file) and file.is_file():
                    file.unlink()
    except OSError as error:
        raise UserError(f"--folder {path}: cannot be used: {error.strerror}") from None
