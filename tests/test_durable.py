"""What lasts: the pace of forced writes, folders that are forced, one writer at a time, who is alive."""

from __future__ import annotations

import fcntl
import math
import os
import time
from pathlib import Path

import pytest

from justforward import durable
from justforward.durable import Pace, claim, hold, is_alive, seconds_of, sync_file, sync_folder
from justforward.errors import UserError


def test_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    each, some, never = Pace(0.0), Pace(5.0), Pace(math.inf)
    seen = []
    for clock[0] in (100.0, 103.0, 105.0, 109.9, 110.0, 1e9):
        seen.append((each.due(), some.due(), never.due()))
    assert seen == [(True, due, False) for due in (False, False, True, False, True, True)]


def test_what_sync_spells() -> None:
    assert [seconds_of(x) for x in ("step", "end", 5, 0.5)] == [0.0, math.inf, 5.0, 0.5]


def test_files_and_folders_are_forced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forced: list[str] = []

    def fsync(file: int) -> None:
        forced.append(os.readlink(f"/proc/self/fd/{file}"))

    monkeypatch.setattr(durable.os, "fsync", fsync)
    (tmp_path / "file").touch()
    sync_file(tmp_path / "file")
    sync_folder(tmp_path)
    assert forced == [str(tmp_path / "file"), str(tmp_path)]

    def cannot(file: int) -> None:
        raise OSError("this file system forces no folders")

    monkeypatch.setattr(durable.os, "fsync", cannot)
    sync_folder(tmp_path)
    with pytest.raises(OSError, match="forces no"):
        sync_file(tmp_path / "file")


def test_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.touch()
    with path.open() as first, path.open() as second:
        assert claim(first)
        assert not claim(second)
        with pytest.raises(
            UserError, match=r"log: another process.*: stop it or close\(\) it first"
        ):
            hold(second, path)
        fcntl.flock(first, fcntl.LOCK_UN)
        hold(second, path)


def test_who_is_alive() -> None:
    assert is_alive(os.getpid())
    assert is_alive(1)  # someone else's
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    assert not is_alive(child)
