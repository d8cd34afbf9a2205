"""What is kept is read again, whole or not at all."""

from __future__ import annotations

import multiprocessing
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from justforward.errors import UserError
from justforward.store import HEADER, Store

PLENTY = 2**20


@given(st.dictionaries(st.binary(), st.binary(max_size=200), max_size=20))
def test_what_is_put_is_got(entries: dict[bytes, bytes]) -> None:
    with closing(Store(None, PLENTY)) as store:
        for key, value in entries.items():
            assert store.put(key, value)
        assert len(store) == len(entries)
        assert {key: bytes(store.get(key) or b"") for key in entries} == entries
        assert store.get(b"a key of no dictionary that is drawn here " * 4) is None


def test_a_key_keeps_its_first_value() -> None:
    with closing(Store(None, PLENTY)) as store:
        assert store.put(b"k", b"first")
        assert not store.put(b"k", b"second")
        assert store.get(b"k") == b"first"


@given(st.lists(st.integers(0, 60), max_size=30), st.integers(0, 600))
def test_never_beyond_its_limit_and_what_is_in_stays(sizes: list[int], limit: int) -> None:
    with closing(Store(None, limit)) as store:
        kept = [i for i, size in enumerate(sizes) if store.put(b"%d" % i, bytes([i]) * size)]
        assert store.size <= limit
        assert all(store.get(b"%d" % i) == bytes([i]) * sizes[i] for i in kept)
        for i, size in enumerate(sizes):  # what did not go in had no room
            assert i in kept or store.size + HEADER.size + size > limit or size > 0


def test_a_file_is_there_the_next_time(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "kept"
    with closing(Store(path, PLENTY)) as store:
        store.put(b"a", b"alpha")
        store.put(b"b", b"")
    with closing(Store(path, PLENTY)) as store:
        assert (store.get(b"a"), store.get(b"b"), store.get(b"c")) == (b"alpha", b"", None)
        store.put(b"c", b"gamma")
    with closing(Store(path, PLENTY)) as store:
        assert (len(store), store.get(b"c"), store.note) == (3, b"gamma", None)


@given(cut=st.integers(0, 400))
def test_a_file_cut_short_keeps_its_whole_entries(
    cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("store") / "kept"
    values = [bytes([i]) * (10 * i) for i in range(5)]
    with closing(Store(path, PLENTY)) as store:
        for i, value in enumerate(values):
            store.put(b"%d" % i, value)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - min(cut, len(whole))])
    with closing(Store(path, PLENTY)) as store:
        for i, value in enumerate(values):
            assert store.get(b"%d" % i) in (value, None)
            store.put(b"%d" % i, value)
    assert path.read_bytes() == whole
    with closing(Store(path, PLENTY)) as store:
        assert [store.get(b"%d" % i) for i in range(5)] == values


def test_a_flipped_bit_is_as_good_as_nothing(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    with closing(Store(path, PLENTY)) as store:
        store.put(b"a", b"alpha")
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with closing(Store(path, PLENTY)) as store:
        assert store.get(b"a") is None


def test_another_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(b"somebody's own words, more than a header's length of them")
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"notes\.txt: is no file of kept outputs, or damaged"):
        Store(path, PLENTY)
    assert path.read_bytes() == before


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot keep outputs there"):
        Store(tmp_path / "file" / "kept", PLENTY)


def _hold(path: Path, ready: object, done: object) -> None:
    with closing(Store(path, PLENTY)):
        ready.set()  # type: ignore[attr-defined]
        done.wait(30)  # type: ignore[attr-defined]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    with closing(Store(path, PLENTY)) as store:
        store.put(b"a", b"alpha")
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(path, ready, done))
    other.start()
    try:
        assert ready.wait(30)
        with closing(Store(path, PLENTY)) as store:
            assert store.note is not None
            assert "in use by another process" in store.note
            assert store.get(b"a") is None
            assert store.put(b"a", b"alpha")
    finally:
        done.set()
        other.join(30)
    with closing(Store(path, PLENTY)) as store:
        assert (store.note, len(store)) == (None, 1)
