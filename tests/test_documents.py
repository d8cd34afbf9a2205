"""One JSON document of rows: what is in it, on which line, and what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from justforward.documents import read_document
from justforward.errors import UserError

ROW = st.dictionaries(
    st.text(max_size=4),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=4,
    ),
    max_size=3,
)  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(ROW, max_size=4) | st.dictionaries(st.text(max_size=4), ROW, max_size=4),
    indent=st.sampled_from([None, 0, 3]),
    ascii_only=st.booleans(),
    mark=st.sampled_from(["", "\ufeff"]),
)
def test_any_document(tmp_path: Path, rows: Any, indent: Any, ascii_only: bool, mark: str) -> None:
    """The objects of a list or of an object, in order, each at the line where it (or its name) begins."""
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    path = tmp_path / "rows.json"
    path.write_text(mark + text + " \n", encoding="utf-8", newline="")
    found = list(read_document(path, "no such name"))
    assert [row for _, row in found] == list(rows.values() if isinstance(rows, dict) else rows)
    if indent is None:
        assert {line for line, _ in found} <= {1}
        return
    sizes = [json.dumps(row, indent=indent).count("\n") + 1 for _, row in found]
    assert [line for line, _ in found] == [2 + sum(sizes[:i]) for i in range(len(sizes))]


def test_one_object_where_the_rows_have_a_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('{"version": "1.1",\n "data": [{"a": 1}]}')
    assert list(read_document(path, "data")) == [(2, {"version": "1.1", "data": [{"a": 1}]})]
    path.write_text('[{"data": 1}, {"data": 2}]')
    assert [row for _, row in read_document(path, "data")] == [{"data": 1}, {"data": 2}]


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("", "", "the file is empty"),
        ("3", ":1", "not JSON (Expecting a list or an object at column 1)"),
        (" \n", ":2", "not JSON (Expecting a list or an object at column 1)"),
        ('{"a": {}}\n{"b": {}}', ":2", "not JSON (Extra data at column 1)"),
        ('{"a": {},\n}', ":2", "not JSON (Expecting property name enclosed in double quotes"),
        ('{"a": {},\n3: {}}', ":2", "not JSON (Expecting property name enclosed in double quotes"),
        ('{"a"\n{}}', ":2", "not JSON (Expecting ':' delimiter at column 1)"),
        ('{"a":', ":1", "not JSON (Expecting value"),
        ('{"a": {}\n"b": {}}', ":2", "not JSON (Expecting ',' delimiter at column 1)"),
        ('{"a": {}', ":1", "not JSON (Expecting ',' delimiter at column 9)"),
        ("[{},\n]", ":2", "not JSON (Expecting value at column 1)"),
        ("[{}\n}", ":2", "not JSON (Expecting ',' delimiter at column 1)"),
        ('[{},\n{"a": tru}]', ":2", "not JSON (Expecting value at column 7)"),
        ('[{},\n\n"x"]', ":3", "'\"x\"' is not a JSON object that holds rows: give the file as it was published"),
        ('{"a": {},\n"version": 1}', ":2", "'version': '1' is not a JSON object that holds rows"),
        ("[" * 100_000, "", "JSON that cannot be read"),
    ],
)  # fmt: skip
def test_faults_are_named(tmp_path: Path, text: str, line: str, said: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        list(read_document(path, "data"))
    assert str(caught.value).startswith(f"{path}{line}: {said}")
    assert "\n" not in str(caught.value)
