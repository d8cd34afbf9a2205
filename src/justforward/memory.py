"""How much memory there is for this process: what its control groups allow it, and what is free (Linux)."""

from __future__ import annotations

from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
PROCESSES = Path("/proc")


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
