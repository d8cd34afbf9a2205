"""The user's rows: read with every error at its line, split without overlap, dealt in batches.

Nothing here draws from a random generator that has state: a split and a batch are pure functions
of (rows, seed) and (count, seed, step), so that a run can be resumed or checked anywhere.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from justforward.errors import UserError
from justforward.tasks import MASK, Task

KNOWN = (".csv", ".tsv", ".jsonl")


@dataclass(frozen=True)
class Example:
    """One row: the fields that the template shows (in its order), the label, and where it is.

    Attributes:
        label: the label's name; where the answers are in the row, the one that is trained on.
        options: what a task of kind "choice" chooses from.
        shown: the sentence that each option completes, where the model is asked for that.
        answers: every right answer of a "choice" or "generation", each a bag of spans (nearly always one).
    """

    fields: dict[str, str]
    label: str
    file: str
    line: int
    options: tuple[str, ...] = ()
    answers: tuple[tuple[str, ...], ...] = ()
    shown: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """``file:line``, as error messages name it."""
        return f"{self.file}:{self.line}"

    @property
    def stratum(self) -> str:
        """What splits are balanced over: the label, where rows share labels."""
        return "" if self.answers else self.label


@dataclass(frozen=True)
class Splits:
    """Rows for training, for choosing, and for the figure that is reported; no row in two.

    Attributes:
        duplicates: rows dropped because an earlier row has the same text and label.
        conflicts: rows dropped because rows of the same text have different labels (all of them).
        notes: what could not be done as asked, in sentences.
    """

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    duplicates: int
    conflicts: int = 0
    notes: list[str] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """How many rows there are, and how many were dropped."""
        return {
            "train": len(self.train),
            "validation": len(self.validation),
            "test": len(self.test),
            "duplicates": self.duplicates,
            "conflicts": self.conflicts,
        }

    def spelled(self) -> str:
        """How many rows there are."""
        counts = (
            f"{len(self.train)} train, {len(self.validation)} validation, {len(self.test)} test"
        )
        return counts + (f" ({self.duplicates} duplicates dropped)" if self.duplicates else "")


# ---------------------------------------------------------------------------------------- reading


def read_examples(path: str | Path, task: Task) -> list[Example]:
    """Reads the rows of a .csv, .tsv or .jsonl file (UTF-8, a byte-order mark is accepted).

    CSV follows RFC 4180 (quoted fields may hold commas and newlines). TSV is one row a line; a
    field that is wholly in double quotes is unquoted. JSONL is one object a line; numbers and
    booleans become ``str(value)``. Blank lines are skipped. Line numbers are lines of the file,
    from 1; a row that spans lines is named by its first.

    Raises:
        UserError: naming file, line, value and what to do.
    """
    path = Path(path)
    examples = [_example(row, line, path, task) for line, row in read_rows(path)]
    if not examples:
        raise UserError(f"{path}: no rows in the file: give at least two of each label")
    return examples


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """Line and columns of each row, as `read_examples` reads a file.

    Raises:
        UserError: naming file, line, value and what to do.
    """
    suffix = path.suffix.lower()
    if suffix not in KNOWN:
        raise UserError(
            f"{path}: the ending {path.suffix!r} is not known: give a file that ends in "
            f"{', '.join(KNOWN)}"
        )
    text = read_text(path)
    return _json_rows(path, text) if suffix == ".jsonl" else _table_rows(path, text, suffix)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without its byte-order mark.

    Raises:
        UserError: it cannot be read, is empty or no text; naming file, line and what to do.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder: name a file in it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not data:
        raise UserError(f"{path}: the file is empty: give one row a line")
    nul = data.find(b"\0")
    if nul >= 0:
        raise UserError(
            f"{path}:{_line_at(data, nul)}: a NUL byte: the file is not plain text "
            "(or is UTF-16): save it as UTF-8"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # the decoder leaves a byte-order mark out of its count of bytes
        start = error.start + (len(data) - len(error.object))
        raise UserError(
            f"{path}:{_line_at(data, start)}: byte 0x{data[start]:02x} is not UTF-8: "
            "save the file as UTF-8"
        ) from error


def _line_at(data: bytes, offset: int) -> int:
    return len(re.findall(rb"\r\n|\r|\n", data[:offset])) + 1


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, object]]]:
    # split at newlines only: a JSON string may hold U+2028 and friends, which splitlines() cuts at
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}:{line}: not JSON ({error.msg} at column {error.colno}: "
                f"{short(content)}): write one JSON object a line"
            ) from error
        except (ValueError, RecursionError) as error:  # a number or a nesting beyond all measure
            raise UserError(f"{path}:{line}: JSON that cannot be read: {error}") from error
        if not isinstance(row, dict):
            raise UserError(
                f"{path}:{line}: {short(content)} is not a JSON object: "
                'write rows as {"text": ..., "label": ...}'
            )
        yield line, row


def _table_rows(path: Path, text: str, suffix: str) -> Iterator[tuple[int, dict[str, object]]]:
    rows = _csv_records(path, text) if suffix == ".csv" else _tsv_records(text)
    header: list[str] | None = None
    for line, row in rows:
        if header is None:
            header = row
            signs, others = ("commas", ";|\t") if suffix == ".csv" else ("tabs", ";|,")
            between = next((sign for sign in others if sign in header[0]), None)
            if len(header) == 1 and between is not None:
                raise UserError(
                    f"{path}:{line}: the header is one column, {short(header[0])}: {suffix} has "
                    f"{signs} between columns, this file has {between!r}: save it so, or rename it"
                )
            twice = [name for name in header if header.count(name) > 1]
            if twice:
                raise UserError(
                    f"{path}:{line}: column {twice[0]!r} is named twice in the header: rename one"
                )
            continue
        if len(row) != len(header):
            hint = (
                "a tab or newline within a text needs CSV or JSONL"
                if suffix == ".tsv"
                else "put a text that holds commas in double quotes"
            )
            raise UserError(
                f"{path}:{line}: {len(row)} values where the header has {len(header)} columns "
                f"(first value {short(row[0])}): {hint}"
            )
        yield line, dict(zip(header, row, strict=True))


def _csv_records(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    limit = csv.field_size_limit(2**31 - 1)  # the default refuses texts above 128 KiB
    try:
        # newline="" hands the module the line ends as they are, as its documentation asks
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        while True:
            line = reader.line_num + 1
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise UserError(
                    f"{path}:{line}: not CSV ({error}): double a quote that is part of a text, "
                    "and close each quoted text"
                ) from error
            if row:
                yield line, row
    finally:
        csv.field_size_limit(limit)


def _tsv_records(text: str) -> Iterator[tuple[int, list[str]]]:
    for line, content in enumerate(re.split(r"\r\n|\r|\n", text), start=1):
        if content.strip():
            yield line, [_unquote(value) for value in content.split("\t")]


def _unquote(value: str) -> str:
    if re.fullmatch(r'"(?:[^"]|"")*"', value):
        return value[1:-1].replace('""', '"')
    return value


def _example(row: dict[str, object], line: int, path: Path, task: Task) -> Example:
    if task.masked and MASK in row:
        raise UserError(
            f"{path}:{line}: a column is called {MASK!r}, which in a template is the place of a "
            "masked model's answer: rename the column"
        )
    for name in (*task.fields, task.label_field):
        if name not in row:
            what = "label column" if name == task.label_field else "template field"
            raise UserError(
                f"{path}:{line}: {what} {name!r} is not a column: there are "
                f"{', '.join(repr(column) for column in row) or 'none'}"
            )
    fields = {name: text_of(row[name], name, line, path) for name in task.fields}
    label = text_of(row[task.label_field], task.label_field, line, path).strip()
    if not label:
        raise UserError(
            f"{path}:{line}: the label in {task.label_field!r} is empty: fill it in or drop the row"
        )
    if label not in task.labels:
        raise UserError(
            f"{path}:{line}: label {short(label)} has no word: add it to the labels "
            f"({', '.join(f'{name}={word}' for name, word in task.labels.items())}) "
            "or drop the row"
        )
    return Example(fields, label, str(path), line)


def text_of(value: object, name: str, line: int, path: Path) -> str:
    if not isinstance(value, str | bool | int | float):
        raise UserError(
            f"{path}:{line}: {name!r} is {short(json.dumps(value))}, "
            "not a text, number or true/false: write it as a text or drop the row"
        )
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise UserError(
            f"{path}:{line}: {name!r} holds {text[error.start]!r}, half a character that UTF-8 "
            "cannot hold: remove it"
        ) from error
    return text


def short(value: str) -> str:
    return repr(value if len(value) <= 60 else value[:57] + "...")


# -------------------------------------------------------------------------------------- splitting


def split_examples(
    examples: list[Example],
    *,
    seed: int,
    test_size: int | float,
    validation_size: int | float,
    train_size: int | None = None,
    balanced_test: bool = True,
) -> Splits:
    """Deals the rows into train, validation and test, each text in one of them only.

    Rows are ordered by a keyed hash of their own text, so a split depends on the rows and the seed
    and not on the order of the file; the test rows depend on nothing but test_size besides.

    Args:
        test_size, validation_size: a number of rows (int), or a fraction (float in (0, 1)) of the
            rows that are left once duplicates are dropped.
        train_size: rows to keep for training; None keeps all that remain.
        balanced_test: the same number of test rows for each label; else in proportion.

    Raises:
        UserError: a size that is no size, too few rows, or a split that would hold no row or only
            one label.
    """
    unique, duplicates, conflicts = drop_duplicates(examples)
    if not unique:
        raise UserError("no rows are left once duplicates are dropped: give more data")
    where = examples[0].file
    test_count = size_of("test_size", test_size, len(unique))
    validation_count = size_of("validation_size", validation_size, len(unique))
    notes: list[str] = []
    if conflicts:
        notes.append(f"{conflicts} rows dropped whose text also comes with another label")

    pools: dict[str, list[Example]] = {}
    for example in sorted(unique, key=lambda example: rank(example, seed)):
        pools.setdefault(example.stratum, []).append(example)
    pools = dict(sorted(pools.items()))

    quota = proportional(pools, test_count, "test", where)
    if balanced_test:
        each = test_count // len(pools)
        short = [label for label, pool in pools.items() if len(pool) < each + 2]
        if short:
            notes.append(
                f"test is in proportion, not balanced: label {short[0]!r} has only "
                f"{len(pools[short[0]])} rows, {each} test rows of each label were asked for"
            )
        else:
            quota = dict.fromkeys(pools, each)
            if each * len(pools) != test_count:
                notes.append(
                    f"test has {each * len(pools)} rows rather than {test_count}, "
                    f"so that each of {len(pools)} labels has the same number"
                )
    test = take(pools, quota, seed)
    validation = take(pools, proportional(pools, validation_count, "validation", where), seed)
    rest = sum(map(len, pools.values()))
    train_count = rest if train_size is None else size_of("train_size", train_size, rest)
    train = take(pools, proportional(pools, train_count, "train", where), seed)

    labels = {example.label for example in unique}
    for name, rows in (("test", test), ("validation", validation), ("train", train)):
        present = {row.label for row in rows}
        if len(present) < 2:
            only = f"has only label {next(iter(present))!r}" if present else "is empty"
            raise UserError(
                f"{where}: the {name} split {only} ({len(unique)} different rows, "
                f"test {len(test)}, validation {len(validation)}, train {len(train)}): "
                "give more rows of each label or other sizes"
            )
        if present != labels:
            notes.append(f"{name} has no row of label {sorted(labels - present)[0]!r}")
    return Splits(train, validation, test, duplicates, conflicts, notes)


def drop_duplicates(examples: list[Example]) -> tuple[list[Example], int, int]:
    """Keeps the first of the rows with one text; none where their labels differ."""
    groups: dict[tuple[str, ...], list[Example]] = {}
    for example in examples:
        groups.setdefault(text_key(example), []).append(example)
    unique: list[Example] = []
    duplicates = conflicts = 0
    for group in groups.values():
        if len({example.label for example in group}) > 1:
            conflicts += len(group)
        else:
            unique.append(group[0])
            duplicates += len(group) - 1
    return unique, duplicates, conflicts


def text_key(example: Example) -> tuple[str, ...]:
    """What makes two rows the same to a reader: case and white space do not count."""
    texts = (*example.fields.values(), *(example.shown or example.options))
    return tuple(" ".join(text.split()).casefold() for text in texts)


def rank(example: Example, seed: int) -> bytes:
    key = (seed % 2**64).to_bytes(8, "little")
    return blake2b("\0".join(text_key(example)).encode(), key=key, digest_size=16).digest()


def size_of(name: str, size: int | float, total: int) -> int:
    if isinstance(size, float) and 0.0 < size < 1.0:
        return max(1, round(size * total))
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    raise UserError(
        f"{name} {size!r} is not a size: give a whole number of rows from 1"
        + ("" if name == "train_size" else ", or a fraction between 0 and 1")
    )


def proportional(
    pools: dict[str, list[Example]], count: int, name: str, where: str
) -> dict[str, int]:
    """How many rows of each label make `count`, in proportion, largest remainders first.

    Each label that has rows gets one at least where count allows it.
    """
    total = sum(map(len, pools.values()))
    if count > total:
        raise UserError(
            f"{where}: {count} rows asked for {name}, {total} different rows are left: "
            "ask for fewer or give more data"
        )
    if total == 0:
        return dict.fromkeys(pools, 0)
    quota = {label: count * len(pool) // total for label, pool in pools.items()}
    by_remainder = sorted(pools, key=lambda label: (-(count * len(pools[label]) % total), label))
    for label in by_remainder[: count - sum(quota.values())]:
        quota[label] += 1
    for label, pool in pools.items():
        richest = max(quota, key=lambda other: quota[other])
        if pool and quota[label] == 0 and quota[richest] > 1:
            quota[label], quota[richest] = 1, quota[richest] - 1
    return quota


def take(pools: dict[str, list[Example]], quota: dict[str, int], seed: int) -> list[Example]:
    """Moves the first rows of each pool out of it, and mixes the labels by rank."""
    taken: list[Example] = []
    for label, count in quota.items():
        taken += pools[label][:count]
        del pools[label][:count]
    return sorted(taken, key=lambda example: rank(example, seed))


# ------------------------------------------------------------------------------------------ batches


def batches(examples_count: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Row indices of training step `step`: a pure function, so a resumed run needs no state.

    The steps cut one endless stream, a fresh permutation of the rows for each epoch, into pieces
    of batch_size. A batch that an epoch's end cuts short is filled from the next epoch, so each
    batch is full and each row comes once an epoch; with fewer rows than batch_size a batch holds
    each row about equally often.

    Raises:
        UserError: no rows, or a batch size below 1.
    """
    if examples_count < 1:
        raise UserError("there are no rows to make a batch of: give more data")
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size} is below 1: give a whole number from 1")
    if step < 0:
        raise UserError(f"step {step} is below 0: steps are counted from 0")
    rows: list[int] = []
    position = step * batch_size
    while len(rows) < batch_size:
        epoch, offset = divmod(position, examples_count)
        piece = _permutation(examples_count, seed % 2**64, epoch)
        piece = piece[offset : offset + batch_size - len(rows)]
        rows += piece.tolist()
        position += len(piece)
    return rows


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    # the raw words of a bit generator are promised to stay the same across numpy versions,
    # Generator.permutation is not (NEP 19)
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(count)
    return np.argsort(words, kind="stable").astype(np.int64)
