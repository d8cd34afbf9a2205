"""Reading names each fault at its line; splits never overlap; batches are pure and fair."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from justforward.data import (
    Example,
    Splits,
    batches,
    drop_duplicates,
    rank,
    read_examples,
    split_examples,
)
from justforward.errors import UserError
from justforward.tasks import Task

TASK = Task("{text} It was", {"neg": "terrible", "pos": "great"})


def write(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# ------------------------------------------------------------------------------------------ reading


def test_the_three_kinds_read_alike(tmp_path: Path) -> None:
    rows = [("a, b", "neg"), ('say "hi"', "pos"), ("été", "neg")]
    buffer = io.StringIO()
    csv.writer(buffer).writerows([("text", "label"), *rows])
    table = io.StringIO()
    csv.writer(table, delimiter="\t").writerows([("text", "label"), *rows])
    files = [
        write(tmp_path, "a.csv", buffer.getvalue()),
        write(tmp_path, "a.tsv", table.getvalue()),
        write(tmp_path, "a.JSONL", "\n".join(json.dumps({"text": t, "label": y}) for t, y in rows)),
    ]
    for path in files:
        examples = read_examples(path, TASK)
        assert [(e.fields["text"], e.label) for e in examples] == rows
        assert {e.file for e in examples} == {str(path)}
        first = 1 if path.suffix == ".JSONL" else 2
        assert [e.line for e in examples] == [first, first + 1, first + 2]


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), min_size=1))
def test_csv_and_jsonl_give_back_any_text(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([("text", "label"), *((text, "neg") for text in texts)])
    read = read_examples(write(folder, "a.csv", buffer.getvalue()), TASK)
    assert [e.fields["text"] for e in read] == texts
    lines = (json.dumps({"text": text, "label": "neg"}, ensure_ascii=False) for text in texts)
    read = read_examples(write(folder, "a.jsonl", "\n".join(lines)), TASK)
    assert [e.fields["text"] for e in read] == texts
    assert [e.line for e in read] == list(range(1, len(texts) + 1))


def test_lines_are_lines_of_the_file(tmp_path: Path) -> None:
    content = 'text,label\r\n"one\r\ntwo",neg\r\n\r\nthree,pos\r\n'
    examples = read_examples(write(tmp_path, "a.csv", content), TASK)
    assert [e.line for e in examples] == [2, 5]
    examples = read_examples(write(tmp_path, "bom.csv", b"\xef\xbb\xbftext,label\nx,neg\n"), TASK)
    assert examples[0].fields == {"text": "x"}
    long = "x" * 300_000  # beyond the csv module's own limit
    assert read_examples(write(tmp_path, "l.csv", f"text,label\n{long},neg\n"), TASK)[0].line == 2


def test_numbers_and_booleans_of_jsonl(tmp_path: Path) -> None:
    task = Task("{text}", {"0": "no", "1": "yes", "True": "sure"})
    content = '{"text": 3, "label": 0}\n\n{"text": 1.5, "label": "1"}\n{"text": "x", "label": true}'
    examples = read_examples(write(tmp_path, "a.jsonl", content), task)
    assert [(e.fields["text"], e.label, e.line) for e in examples] == [
        ("3", "0", 1), ("1.5", "1", 3), ("x", "True", 4),
    ]  # fmt: skip


ROW = '{"text": "x", "label": "neg"}\n'


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "x", r"a\.txt.*\.txt.*\.csv, \.tsv, \.jsonl"),
        ("a.csv", "", "empty"),
        ("a.csv", "text,label\n", "no rows"),
        ("a.jsonl", "\n\n", "no rows"),
        ("a.csv", "words,label\nx,neg\n", r"a\.csv:2: template field 'text'.*'words', 'label'"),
        ("a.csv", "text,y\nx,neg\n", r"label column 'label'.*'text', 'y'"),
        ("a.csv", "text;label\nwell, x;neg\n", r"a\.csv:1: the header is one column, 'text;label': \.csv has commas between columns, this file has ';': save it so"),
        ("a.csv", "text\tlabel\nx\tneg\n", r"a\.csv:1: .* commas between columns, this file has '\\t': save it so, or rename it"),
        ("a.tsv", "text,label\nx,neg\n", r"a\.tsv:1: .* tabs between columns, this file has ','"),
        ("a.csv", "text,text\nx,neg\n", r"a\.csv:1: column 'text' is named twice"),
        ("a.csv", b"text,label\nx,neg\n\xffy,neg\n", r"a\.csv:3: byte 0xff is not UTF-8"),
        ("a.csv", b"\xef\xbb\xbftext,label\nx\xff,neg\n", r"a\.csv:2: byte 0xff"),
        ("a.csv", "text,label\nx\0,neg\n", r"a\.csv:2: a NUL byte"),
        ("a.csv", 'text,label\n"a\nb",neg\nx\n', r"a\.csv:4: 1 values .* 2 columns .*'x'"),
        ("a.csv", "text,label\na,b,neg\n", r"a\.csv:2: 3 values .*quotes"),
        ("a.csv", 'text,label\n"a"b,neg\n', r"a\.csv:2: not CSV"),
        ("a.csv", 'text,label\nx,neg\n"a,neg\n', r"a\.csv:3: not CSV"),
        ("a.csv", "text,label\nx,maybe\n", r"a\.csv:2: label 'maybe' has no word: .*pos=great"),
        ("a.csv", 'text,label\nx,"a\nb"\n', r"a\.csv:2: label 'a\\nb' has no word"),
        ("a.csv", "text,label\nx, \n", r"a\.csv:2: the label in 'label' is empty"),
        ("a.tsv", "text\tlabel\nx\ty\tneg\n", r"a\.tsv:2: 3 values.*CSV or JSONL"),
        ("a.jsonl", ROW + "{oops}\n", r"a\.jsonl:2: not JSON .*column 2.*\{oops\}"),
        ("a.jsonl", ROW + "[1]\n", r"a\.jsonl:2: '\[1\]' is not a JSON object"),
        ("a.jsonl", ROW + "[" * 100_000, r"a\.jsonl:2: JSON that cannot be read|2: not JSON"),
        ("a.jsonl", ROW + '{"text": "x"}', r"a\.jsonl:2: label column 'label'.*'text'"),
        ("a.jsonl", '{"text": null, "label": "neg"}', r"a\.jsonl:1: 'text' is 'null'"),
        ("a.jsonl", '{"text": ["x"], "label": "neg"}', r"""a\.jsonl:1: 'text' is '\["x"\]'"""),
        ("a.jsonl", '{"text": "\\ud800", "label": "neg"}', r"a\.jsonl:1: .*half a character"),
    ],
)  # fmt: skip
def test_faults_are_named(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        read_examples(write(tmp_path, name, content), TASK)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


def test_a_column_called_mask_is_refused_where_the_template_has_one(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "text,mask,label\nx,y,neg\n")
    assert len(read_examples(path, TASK)) == 1
    with pytest.raises(UserError, match=r"a\.csv:2: a column is called 'mask'.*: rename"):
        read_examples(path, Task("{text} It was {mask}.", TASK.labels))


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no\.csv: no such file"):
        read_examples(tmp_path / "no.csv", TASK)
    (tmp_path / "dir.csv").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        read_examples(tmp_path / "dir.csv", TASK)


@given(st.binary(max_size=80), st.sampled_from(["a.csv", "a.tsv", "a.jsonl"]))
def test_any_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, name: str
) -> None:
    path = write(tmp_path_factory.mktemp("any"), name, b"text,label\n" + content)
    try:
        read_examples(path, TASK)
    except UserError as error:
        said = str(error)
    else:
        said = ""
    assert "\n" not in said


# ---------------------------------------------------------------------------------------- splitting


def example(text: str, label: str, line: int = 0) -> Example:
    return Example({"text": text}, label, "rows.csv", line)


def rows_of(counts: dict[str, int]) -> list[Example]:
    return [example(f"{label} text {i}", label, i) for label, n in counts.items() for i in range(n)]


def split(examples: list[Example], seed: int = 0, **sizes: Any) -> Splits:
    return split_examples(examples, seed=seed, **{"test_size": 10, "validation_size": 10, **sizes})


def texts(rows: list[Example]) -> list[str]:
    return [row.fields["text"] for row in rows]


@given(
    st.lists(
        st.tuples(st.text("ab A\n", min_size=1, max_size=5), st.sampled_from(["n", "p"])),
        min_size=20,
        max_size=120,
    ),
    st.integers(-(2**70), 2**70),
)
def test_splits_never_overlap(rows: list[tuple[str, str]], seed: int) -> None:
    examples = [example(text, label, i) for i, (text, label) in enumerate(rows)]
    try:
        splits = split(examples, seed, test_size=4, validation_size=0.2)
    except UserError:
        return
    kept = [*splits.train, *splits.validation, *splits.test]
    keys = [" ".join(row.fields["text"].split()).casefold() for row in kept]
    assert len(keys) == len(set(keys))
    assert len(kept) + splits.duplicates + splits.conflicts == len(examples)
    label_of: dict[str, set[str]] = {}
    for text, label in rows:
        label_of.setdefault(" ".join(text.split()).casefold(), set()).add(label)
    assert all(label_of[key] == {row.label} for key, row in zip(keys, kept, strict=True))
    for part in (splits.train, splits.validation, splits.test):
        assert len({row.label for row in part}) == 2


def test_duplicates_and_conflicts_are_counted() -> None:
    examples = rows_of({"n": 40, "p": 40})
    examples += [example("N  TEXT 3", "n", 90), example("n text 3\n", "n", 91)]
    examples += [example("p text 5", "n", 92), example("p text 5", "p", 93)]
    splits = split(examples)
    assert (splits.duplicates, splits.conflicts) == (2, 3)
    kept = texts([*splits.train, *splits.validation, *splits.test])
    assert kept.count("n text 3") == 1
    assert "p text 5" not in kept
    assert any("3 rows dropped" in note for note in splits.notes)


def test_test_rows_depend_on_nothing_else() -> None:
    examples = rows_of({"n": 200, "p": 100})
    first = split(examples, 3, train_size=50)
    assert first.test == split(examples, 3, validation_size=0.3).test
    assert first.validation == split(examples, 3, train_size=20).validation
    assert texts(first.test) == texts(split(examples[::-1], 3).test)
    assert texts(first.test) != texts(split(examples, 4).test)
    assert Counter(row.label for row in first.test) == {"n": 5, "p": 5}
    assert len(first.train) == 50
    assert Counter(row.label for row in first.validation) == {"n": 7, "p": 3}


def test_unbalanced_on_request_or_when_a_label_is_short() -> None:
    examples = rows_of({"n": 90, "p": 10})
    assert Counter(r.label for r in split(examples, test_size=20, balanced_test=False).test) == {
        "n": 18, "p": 2,
    }  # fmt: skip
    short = split(examples, test_size=20)
    assert len(short.test) == 20
    assert any("not balanced: label 'p'" in note for note in short.notes)
    uneven = split(rows_of({"a": 30, "b": 30, "c": 30}), test_size=10)
    assert len(uneven.test) == 9
    assert any("9 rows rather than 10" in note for note in uneven.notes)


@pytest.mark.parametrize(
    ("counts", "sizes", "said"),
    [
        ({"n": 50}, {}, "test split has only label 'n'"),
        ({"n": 50, "p": 50}, {"test_size": 1}, "test split"),
        ({"n": 50, "p": 50}, {"validation_size": 1}, "validation split has only label"),
        ({"n": 50, "p": 50}, {"train_size": 1}, "train split has only label"),
        ({"n": 5, "p": 5}, {}, "train split is empty|asked for validation"),
        ({"n": 50, "p": 50}, {"test_size": 101}, "101 rows asked for test, 100"),
        ({"n": 50, "p": 50}, {"train_size": 81}, "81 rows asked for train, 80"),
        ({"n": 50, "p": 50}, {"test_size": 0}, "test_size 0 is not a size"),
        ({"n": 50, "p": 50}, {"validation_size": 1.0}, "validation_size 1.0 is not a size"),
        ({"n": 50, "p": 50}, {"validation_size": True}, "validation_size True"),
        ({"n": 50, "p": 50}, {"test_size": float("nan")}, "test_size nan"),
    ],
)
def test_splits_refused(counts: dict[str, int], sizes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        split(rows_of(counts), **sizes)


def test_nothing_to_split() -> None:
    with pytest.raises(UserError, match="no rows are left"):
        split([])


def answered(text: str, right: str, options: tuple[str, ...] = (), **keys: Any) -> Example:
    return Example({"text": text}, right, "f", 1, options, ((right,),), **keys)


def test_rows_with_answers_of_their_own_are_one_stratum() -> None:
    assert answered("x", "a", ("a", "b")).stratum == answered("y", "z").stratum == ""
    assert Example({"text": "x"}, "a", "f", 1).stratum == "a"


def test_options_belong_to_the_text_of_a_row() -> None:
    same = answered("X ", "b", ("A", " b"))
    rows = [answered("x", "a", ("a", "b")), answered("x", "a", ("a", "c")), answered("y", "a")]
    assert drop_duplicates([*rows, answered("X", "a", ("A", "B"))]) == (rows, 1, 0)
    assert drop_duplicates([*rows, same]) == (rows[1:], 0, 2)  # another of the two is right
    # of options that complete a sentence, the sentences count: queries share a passage and its names
    names = ("Ann", "Bo")
    queries = [
        answered("p", "Ann", names, shown=("Ann left", "Bo left")),
        answered("p", "Bo", names, shown=("Ann came", "Bo came")),
    ]
    assert drop_duplicates(queries) == (queries, 0, 0)
    assert rank(queries[0], 0) != rank(queries[1], 0)


# ------------------------------------------------------------------------------------------ batches


@given(
    count=st.integers(1, 40),
    size=st.integers(1, 50),
    seed=st.integers(-5, 2**64),
    epochs=st.integers(1, 3),
)
def test_batches_are_full_and_every_epoch_sees_every_row(
    count: int, size: int, seed: int, epochs: int
) -> None:
    steps = -(-count * epochs // size)
    dealt = [batches(count, size, seed, step) for step in range(steps)]
    assert all(len(batch) == size for batch in dealt)
    stream = [row for batch in dealt for row in batch]
    for epoch in range(epochs):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))
    assert dealt[-1] == batches(count, size, seed, steps - 1)


def test_batches_known_answer() -> None:
    """A change here would break the resuming of every run made before it."""
    assert batches(7, 3, 0, 0) + batches(7, 3, 0, 1) + batches(7, 3, 0, 2) == KNOWN_STREAM
    assert batches(100, 8, 0, 0) != batches(100, 8, 1, 0)


KNOWN_STREAM = [0, 2, 1, 5, 4, 3, 6, 5, 3]


@pytest.mark.parametrize("arguments", [(0, 1, 0, 0), (3, 0, 0, 0), (3, 1, 0, -1)])
def test_batches_refused(arguments: tuple[int, int, int, int]) -> None:
    with pytest.raises(UserError):
        batches(*arguments)
