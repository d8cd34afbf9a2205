"""The folder of a grid. Every file is whole at any moment, or its torn last line is recognised. No torch in here.

compare.yaml      what was asked for, ready for another call
environment.json  machine and versions
results.jsonl     one object a cell or trial that has ended; of several of the same the last counts
cells/            of each its stdout, its stderr and its run folder
table.md, table.tex, index.html  what the records come to (`tables`, `page`)
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Self

import yaml

from justforward.cells import Record
from justforward.config import CompareConfig
from justforward.errors import UserError
from justforward.folder import check_new, write_whole, writing
from justforward.grid import Cell, Grid

LOCK_SECONDS = 60.0  # how long to wait for the last cell of a compare that was killed
LOOK_SECONDS = 0.1

Key = tuple[str, str, int, int | None]
Note = Callable[[str], None]

# What a line must hold to be of use.
_NEEDED = ("options", "search", "values", "status", "folder", "seconds")


class GridFolder:
    """The files of one grid, and the records in it by `Cell.key`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.records: dict[Key, Record] = {}
        self._asked = self.path / "compare.yaml"
        self._environment = self.path / "environment.json"
        self._results = self.path / "results.jsonl"
        self._lock: IO[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._lock is not None:
            self._lock.close()

    @property
    def held(self) -> int:
        """The file with the lock: whoever keeps it open keeps others off the folder."""
        assert self._lock is not None
        return self._lock.fileno()

    def open(self, config: CompareConfig, grid: Grid, note: Note) -> None:
        """Make the folder, or go on in it.

        Raises:
            UserError: it is no compare's, another compare is at work in it, it is damaged, or a cell
                was run with other options than now.
        """
        if not self._asked.is_file():
            # one killed at the very start has left nothing, or hidden files
            if not self.path.is_dir() or any(p.name[0] != "." for p in self.path.iterdir()):
                check_new(self.path, "it has no compare.yaml: choose another --out")
            with writing(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
        self._wait_for_lock(note)
        self._read(note)
        if config.again is not None:
            self._forget(config.again)
        self._check(grid)
        write_whole(self._asked, _spell(config))

    def _wait_for_lock(self, note: Note) -> None:
        """A cell holds the lock too, so that one which outlives its compare is waited for."""
        with writing(self.path):
            self._lock = (self.path / ".lock").open("wb")
        until = time.monotonic() + LOCK_SECONDS
        told = False
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > until:
                    raise UserError(
                        f"{self.path}: another compare is at work in this folder: wait for it or stop it"
                    ) from None
                if not told:
                    note(f"{self.path}: another compare is at work in this folder: waiting")
                told = True
                time.sleep(LOOK_SECONDS)
            else:
                return

    def _read(self, note: Note) -> None:
        try:
            raw = self._results.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(f"{self._results}: cannot be read: {error.strerror}") from error
        whole, newline, torn = raw.rpartition(b"\n")
        for number, line in enumerate(whole.split(b"\n") if newline else [], start=1):
            try:
                record = json.loads(line)
                _ = [record[name] for name in _NEEDED]
                self.records[_key(record)] = record
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(
                    f"{self._results}:{number}: damaged: {line[:60]!r}: remove the line"
                ) from error
        if torn:
            note(f"note: results.jsonl ended in {len(torn)} bytes of a torn line: cut off")
            with writing(self._results):
                os.truncate(self._results, len(raw) - len(torn))

    def _forget(self, method: str) -> None:
        """Remove the records and folders of a method."""
        for key, record in list(self.records.items()):
            if record["method"] == method:
                del self.records[key]
                with writing(self.path):
                    shutil.rmtree(self.path / record["folder"], ignore_errors=True)
        write_whole(self._results, "".join(json.dumps(r) + "\n" for r in self.records.values()))

    def _check(self, grid: Grid) -> None:
        """Refuse results of other options than those asked for now."""
        for cell in grid.cells:
            for asked in (*grid.trials(cell), cell):
                record = self.records.get(asked.key)
                if record is not None and record["status"] == "ok":
                    self.check_same(asked, record)

    def check_same(self, cell: Cell, record: Record) -> None:
        """Refuse a record of other options than the cell's.

        Raises:
            UserError: naming the cell, the option and both values.
        """
        now = cell.plain()
        for part in ("options", "search", "values"):
            if part == "values" and cell.search and not cell.values:
                continue  # they are chosen later
            for name in dict.fromkeys((*record[part], *now[part])):
                was, value = record[part].get(name), now[part].get(name)
                if was != value:
                    what = f"search of {name}" if part == "search" else name
                    then, today = ("not given" if x is None else repr(x) for x in (was, value))
                    raise UserError(
                        f"{self.path}: {cell.name}: {what} was {then} and is {today} now: take it back, "
                        f"run the method again with --again {cell.method}, or choose another --out"
                    )

    def note_machine(self, now: dict[str, Any], note: Note) -> None:
        """Keep what the cells run on; say so where the first ones ran on something else.

        Raises:
            UserError: environment.json is damaged, or cannot be written.
        """
        if not self._environment.exists():
            write_whole(self._environment, json.dumps(now, indent=2) + "\n")
            return
        try:
            before = json.loads(self._environment.read_text(encoding="utf-8"))
            changed = [name for name in now if before.get(name) != now[name]]
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise UserError(f"{self._environment}: damaged: {error}: remove the file") from error
        if changed:
            note(
                f"note: {' and '.join(changed)} differ from {self._environment}: "
                "times and last digits of the cells to come may differ for that"
            )

    def append(self, record: Record) -> None:
        """Write one record, in one call of the system, and wait until the disk has it.

        Raises:
            UserError: no space left, or the like.
        """
        line = json.dumps(record).encode() + b"\n"
        with writing(self._results), self._results.open("ab", buffering=0) as file:
            size = file.tell()
            if file.write(line) != len(line):
                file.truncate(size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        self.records[_key(record)] = record

    def write(self, name: str, text: str) -> None:
        """Replace a file of what the records come to."""
        write_whole(self.path / name, text)


def _key(record: Record) -> Key:
    return record["task"], record["method"], record["seed"], record["trial"]


def _spell(config: CompareConfig) -> str:
    asked = {
        name: value
        for name, value in asdict(config).items()
        if name not in ("out", "again", "json") and value is not None
    }
    asked["seeds"] = list(config.seeds)
    values = yaml.safe_dump(asked, sort_keys=False, allow_unicode=True)
    return f"# justforward compare --config compare.yaml --out ...\n{values}"
