"""What control groups allow, by files such as Linux has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from justforward import memory


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(memory, "PROCESSES", tmp_path / "proc")
    return tmp_path


def test_the_least_limit_above_a_process_counts(system: Path) -> None:
    write(system / "proc/self/cgroup", "0::/outer/inner\n")
    write(system / "groups/outer/inner/memory.max", "max\n")
    write(system / "groups/outer/memory.max", "5000000\n")
    assert memory.allowed() == 5000000
    write(system / "groups/outer/inner/memory.max", "3000000\n")
    assert memory.allowed() == 3000000


def test_the_older_groups_are_read_too(system: Path) -> None:
    write(system / "proc/self/cgroup", "9:cpu:/a\n4:memory:/a/b\n0::/\n")
    write(system / "groups/memory/a/b/memory.limit_in_bytes", "9223372036854771712\n")
    write(system / "groups/memory/memory.limit_in_bytes", "7000000\n")
    assert memory.allowed() == 7000000


def test_a_container_sees_its_own_group_at_the_top(system: Path) -> None:
    write(system / "proc/self/cgroup", "0::/not/here\n")
    write(system / "groups/memory.max", "2000000\n")
    assert memory.allowed() == 2000000


def test_a_folder_in_memory_is_known(system: Path) -> None:
    assert memory.in_memory(system) is None
    root = Path(os.path.realpath(system))
    inside = str(root / "a b").replace(" ", "\\040")
    write(
        system / "proc/self/mounts",
        f"/dev/vda / ext4 rw 0 0\ntmpfs {inside} tmpfs rw 0 0\n"
        f"none {root}/a ramfs rw 0 0\n/dev/vdb {root}/a/disk ext4 rw 0 0\n",
    )
    (root / "a/disk").mkdir(parents=True)
    (root / "link").symlink_to(root / "a b")
    for place, kind in (("a", "ramfs"), ("a b", "tmpfs"), ("a b/c", "tmpfs"), ("link", "tmpfs"),
                        ("ab", None), ("a/disk", None), ("a/disk/x", None)):  # fmt: skip
        assert memory.in_memory(root / place) == kind, place


def test_what_is_free_is_what_the_limit_leaves(system: Path) -> None:
    assert memory.allowed() is None
    assert memory.free() is None
    write(system / "proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    write(system / "proc/self/status", "Name:\tpython\nRssAnon:\t    1000 kB\n")
    assert memory.free() == 4000 * 1024
    write(system / "proc/self/cgroup", "0::/\n")
    write(system / "groups/memory.max", str(3000 * 1024))
    assert memory.free() == 2000 * 1024
    write(system / "groups/memory.max", str(500 * 1024))
    assert memory.free() == 0
