"""How much memory there is for this process: what its control groups allow it, and what is free; files' pages given back (Linux)."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
PROCESSES = Path("/proc")
_PAGEOUT = 21  # Linux's name for it, which Python does not know


def allowed() -> int | None:
    """The least limit of the control groups that this process is in, in bytes; None where there is none."""
    limits = []
    own = PROCESSES / "self/cgroup"
    for line in own.read_text().splitlines() if own.is_file() else []:
        _, controllers, inside = line.split(":", 2)
        if not controllers:  # version 2
            top, name = GROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            top, name = GROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = top / inside.lstrip("/")  # in a container this may not be there, but the top is
        for folder in (group, *group.parents):
            text = (folder / name).read_text().strip() if (folder / name).is_file() else "max"
            if text.isdecimal():
                limits.append(int(text))
            if folder == top:
                break
    return min(limits, default=None)


def free() -> int | None:
    """Bytes that could be used beside what this process holds that is of no file; None where the system does not say."""
    available = _kilobytes("meminfo", "MemAvailable")
    limit, held = allowed(), _kilobytes("self/status", "RssAnon")
    if available is None or limit is None or held is None:
        return available
    return max(min(available, limit - held), 0)


def _kilobytes(file: str, name: str) -> int | None:
    """A line "name:  number kB" of a file, in bytes."""
    path = PROCESSES / file
    for line in path.read_text().splitlines() if path.is_file() else []:
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    return None


def in_memory(folder: str | Path) -> str | None:
    """What a folder is on, if that is a file system of memory: "tmpfs" or "ramfs"; None elsewhere, and where the system does not say."""
    table = PROCESSES / "self/mounts"
    path, best, found = os.path.realpath(folder), "", ""
    for line in table.read_text(errors="replace").splitlines() if table.is_file() else []:
        _, where, kind, *_ = line.split(" ")
        where = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), where)
        inside = path == where or path.startswith(where.rstrip("/") + "/")
        if inside and len(where) >= len(best):  # of two at one place the later one is seen
            best, found = where, kind
    return found if found in ("tmpfs", "ramfs") else None


def mapped_files() -> list[tuple[int, int, str]]:
    """Where files are in this process's memory: first address, the one behind the last, path; none where the system does not say."""
    try:
        maps = (PROCESSES / "self/maps").read_text(errors="replace")
    except OSError:
        return []
    found = []
    for line in maps.splitlines():
        where, _, _, _, inode, *path = line.split(maxsplit=5)
        if inode != "0":
            start, _, end = where.partition("-")
            found.append((int(start, 16), int(end, 16), path[0] if path else ""))
    return found


def give_back(start: int, end: int) -> None:
    """Give back the memory of a mapped file's pages. Nothing is lost: the system reads them again where they are touched.

    Where it cannot do this (an old kernel), they stay.
    """
    start -= start % mmap.PAGESIZE
    with contextlib.suppress(AttributeError):
        advise = ctypes.CDLL(None).madvise
        advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _PAGEOUT)
