"""Rows of a declared task: a folder of published files in, training, validation and test rows out.

The test rows are those that the task publishes (at most `test_size` of them, the same for every
seed); the split seed chooses which rows are trained on and which choose the step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from justforward.answers import MISSING, read_answers, read_options, read_shown
from justforward.catalog import spelled
from justforward.data import (
    Example,
    Splits,
    drop_duplicates,
    proportional,
    rank,
    read_rows,
    short,
    size_of,
    take,
    text_key,
    text_of,
)
from justforward.declaration import SPLITS, Declaration, Field
from justforward.documents import read_document
from justforward.errors import UserError
from justforward.metrics import joined
from justforward.tasks import Task

TEST_SIZE = 1000  # the paper's
TEST_SEED = 42  # of the rows that are tested where there are more
MOST_VALIDATION = 200

Pools = dict[str, list[Example]]


@dataclass(frozen=True)
class Published:
    """All rows of a task's folder.

    Attributes:
        digest: of the files and of what the declaration says about reading them.
        dropped: rows left out because they have no label.
    """

    declaration: Declaration
    folder: Path
    rows: dict[str, list[Example]]
    digest: str
    dropped: int

    @property
    def examples(self) -> list[Example]:
        """The rows of all splits."""
        return [example for name in SPLITS for example in self.rows[name]]


# ------------------------------------------------------------------------------------------- reading


def read_published(declared: Declaration, folder: str | Path, task: Task) -> Published:
    """Reads the files of a task.

    Raises:
        UserError: a file that is missing, or a row that is not as declared; naming file and line.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise UserError(
            f"{folder}: {what}: --data for task {declared.name!r} is the folder that holds "
            f"{declared.splits['test'][0]}"
        )
    digest = sha256(repr(_reading(declared)).encode())
    rows: dict[str, list[Example]] = {}
    dropped = 0
    for split in SPLITS:
        path = _file_of(declared, split, folder)
        found = [] if path is None else list(_examples(declared, path, task))
        rows[split] = [example for example in found if example is not None]
        dropped += len(found) - len(rows[split])
        digest.update(b"" if path is None else sha256(path.read_bytes()).digest())
        if path is not None and not rows[split]:
            raise UserError(f"{path}: no rows with a label in the file: give at least two")
    return Published(declared, folder, rows, digest.hexdigest(), dropped)


def _reading(declared: Declaration) -> tuple[Any, ...]:
    """What changes the rows that are read, or which of them are dealt to which split."""
    reading = (declared.rows, declared.fields, declared.label, declared.splits)
    dealing = (declared.train_from_test, declared.whole_small_classes, declared.group)
    # kept apart, so that the digests of tasks without them stay what they were
    inner = (declared.kind, declared.options, declared.answers, declared.apart)
    usual = ("classification", None, None, ())
    return (*reading, *dealing, tuple(declared.labels), *(inner if inner != usual else ()))


def _file_of(declared: Declaration, split: str, folder: Path) -> Path | None:
    files = declared.splits[split]
    for name in files:
        if (folder / name).is_file():
            return folder / name
    needed = split == "test" or (split == "train" and declared.train_from_test is None and files)
    if needed:
        hub = f" (on the hub: {declared.hub})" if declared.hub else ""
        raise UserError(
            f"{folder}: the {split} rows of task {declared.name!r} are missing: "
            f"put {' or '.join(files)} there{hub}"
        )
    return None


def _examples(declared: Declaration, path: Path, task: Task) -> Iterator[Example | None]:
    """The rows of a file in order; None for one without a label."""
    # what rows are grouped by is read also where a template of one's own does not show it
    names = dict.fromkeys((*task.fields, *declared.group, *declared.apart))
    fields = {name: declared.fields.get(name, Field((name,))) for name in names}
    for line, outer in _objects(declared, path):
        for row in _inner_rows(outer, declared.rows, line, path):
            try:
                example = _example(declared, fields, row, line, path)
            except UserError as error:
                if not row.at:
                    raise
                raise UserError(f"{error} (in {row.at})") from error  # of many on a line
            yield example


def _example(
    declared: Declaration, fields: dict[str, Field], row: _Row, line: int, path: Path
) -> Example | None:
    classes = declared.kind == "classification"
    label = _label(declared, row, line, path) if classes else ""
    if label is None:
        return None
    texts: dict[str, str] = {}
    for name, wanted in fields.items():
        value = row.first(wanted.places)
        if value is MISSING:
            raise UserError(
                f"{path}:{line}: task {declared.name!r} reads {name!r} from "
                f"{' or '.join(wanted.places)}, which is not there: there are {row.names}"
            )
        texts[name] = _text(wanted, value, name, line, path)
    if classes:
        return Example(texts, label, str(path), line)
    options: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()
    if declared.options is not None:
        options = read_options(declared.options, row.first, line, path)
    answers = read_answers(declared, options, row.first, line, path)
    options = tuple(dict.fromkeys(options))
    if declared.options is not None:
        shown = read_shown(declared.options, options, row.first, line, path)
    return Example(texts, joined(answers[0]), str(path), line, options, answers, shown)


def _objects(declared: Declaration, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line and columns of each object of a file that is a row or holds rows."""
    if path.suffix == ".json":
        return read_document(path, _first_key(declared.rows))
    return read_rows(path)


def _first_key(rows: str) -> str:
    return rows.split(".")[0].removesuffix("[*]")


def _text(wanted: Field, value: Any, name: str, line: int, path: Path) -> str:
    text = text_of(value, name, line, path)
    if wanted.values:
        if spelled(text) not in wanted.values:
            raise UserError(
                f"{path}:{line}: {name!r} is {short(text)}: known are {', '.join(wanted.values)}"
            )
        text = wanted.values[spelled(text)]
    return wanted.changed(text)


def _label(declared: Declaration, row: _Row, line: int, path: Path) -> str | None:
    for column in declared.label:
        value = row.first((column.place,))
        if value is MISSING:
            continue
        text_of(value, column.place, line, path)  # refuses what is no plain value
        label = spelled(value)
        if label in column.drop:
            return None
        known = column.values or {name: name for name in declared.labels}
        if label not in known:
            hint = "a test file without labels cannot be scored" if label == "-1" else "known are"
            raise UserError(
                f"{path}:{line}: {column.place!r} is {short(label)}, no label of task "
                f"{declared.name!r}: {hint} ({', '.join(known)})"
            )
        return known[label]
    places = " or ".join(column.place for column in declared.label)
    raise UserError(
        f"{path}:{line}: task {declared.name!r} reads the label from {places}, which is not there: "
        f"there are {row.names}"
    )


class _Row:
    """An object of a file, with the items that this row of it is in: path -> item; `at` is its place in there."""

    def __init__(self, items: dict[str, Any], at: str = "") -> None:
        self.items = items  # the innermost last
        self.at = at

    def first(self, places: Sequence[str]) -> Any:
        """What stands at the first of the places that is there."""
        for place in places:
            for prefix in reversed(self.items):
                if prefix == "" or place == prefix or place.startswith(prefix + "."):
                    value = _walk(self.items[prefix], place[len(prefix) :].lstrip("."))
                    break
            if value is not MISSING:
                return value
        return MISSING

    @property
    def names(self) -> str:
        """The columns of the object, for messages."""
        return ", ".join(repr(name) for name in self.items[""]) or "none"


def _walk(value: Any, path: str) -> Any:
    if path == "":
        return value
    if isinstance(value, dict) and path in value:  # also a column whose own name has a dot
        return value[path]
    for name in path.split("."):
        if not isinstance(value, dict) or name not in value:
            return MISSING
        value = value[name]
    return value


def _inner_rows(outer: dict[str, Any], path: str, line: int, file: Path) -> list[_Row]:
    """One row for each item of the lists on the path: an object without the first is a row itself."""
    rows = [_Row({"": outer})]
    if not path or _first_key(path) not in outer:
        return rows
    steps = path.split("[*]")
    done = ""
    for step in steps[:-1]:
        place = done + step
        deeper: list[_Row] = []
        for row in rows:
            items = row.first((place,))
            if not isinstance(items, list):
                raise UserError(
                    f"{file}:{line}: {place} is not a list, of which each item is a row: "
                    "give the file as it was published"
                )
            deeper += [
                _Row({**row.items, f"{place}[*]": item}, f"{row.at}{step}[{i}]")
                for i, item in enumerate(items)
            ]
        rows, done = deeper, f"{place}[*]"
    return rows


# ------------------------------------------------------------------------------------------- splitting


def deal(
    published: Published,
    *,
    seed: int,
    test_size: int | float = TEST_SIZE,
    validation_size: int | float | None = None,
    train_size: int | None = None,
    shots: int | None = None,
) -> Splits:
    """Deals a task's rows; a text that is tested is in no other split.

    Args:
        seed: of the training and validation rows; the test rows are the same for all.
        test_size: at most so many of the published test rows, or that fraction of them.
        validation_size: rows to choose the step by (default those that the task publishes or a tenth
            of the training rows, at most 200; with shots as many as are trained on).
        train_size: rows to train on; None takes all that are left.
        shots: rows of each label to train on, in place of train_size.

    Raises:
        UserError: fewer rows than asked for, or a split that would hold only one label.
    """
    declared, where = published.declaration, str(published.folder)
    if shots is not None and train_size is not None:
        raise UserError("--shots and --train-size both say how many rows are trained on: give one")
    counts: Counter[str] = Counter()
    notes: list[str] = []
    test, chosen, train = _apart(published, test_size, counts, notes)
    if declared.apart and not chosen:
        chosen, train = _parted(train, declared.apart, max(1, len(train) // 5), seed)
        if train and not chosen:
            raise UserError(
                f"{where}: all training rows share {' and '.join(declared.apart)}, by which the splits are apart: "
                "none are left to choose the step by: give more rows"
            )
    pools = _pools(train, seed)
    if shots is not None:
        train, validation = _few(
            declared, pools, _pools(chosen, seed), shots, validation_size, seed
        )
    else:
        least = 2 * len(declared.labels) or 2
        source = _pools(chosen, seed) if chosen else pools
        size = validation_size
        if size is None:
            size = min(MOST_VALIDATION, len(chosen) or max(least, len(train) // 10))
        total = len(chosen) or len(train)
        count = size_of("validation_size", size, total)
        validation = take(source, proportional(source, count, "validation", where), seed)
        rest = sum(map(len, pools.values()))
        count = rest if train_size is None else size_of("train_size", train_size, rest)
        train = take(pools, proportional(pools, count, "train", where), seed)
    for name, rows in (("test", test), ("validation", validation), ("train", train)):
        present = {row.stratum for row in rows}
        if not present or (len(present) < 2 and declared.labels):
            only = f"has only label {next(iter(present))!r}" if present else "is empty"
            raise UserError(f"{where}: the {name} split {only}: give more rows or other sizes")
        notes += [f"{name} has no row of label {x!r}" for x in declared.labels if x not in present]
    return Splits(train, validation, test, counts["duplicates"], counts["conflicts"], notes)


def scored_rows(published: Published, test_size: int | float = TEST_SIZE) -> list[Example]:
    """The rows that `deal` tests, whatever the seed."""
    return _apart(published, test_size, Counter(), [])[0]


def _apart(
    published: Published, test_size: int | float, counts: Counter[str], notes: list[str]
) -> tuple[list[Example], list[Example], list[Example]]:
    """Test rows as they are scored, and what there is to validate and to train on, none in two."""
    declared, where = published.declaration, str(published.folder)
    if published.dropped:
        notes.append(f"{published.dropped} rows left out that have no label")
    taken: dict[tuple[str, ...], str] = {}
    test = published.rows["test"]  # as published, for figures that can be compared
    taken.update({text_key(example): example.label for example in test})
    chosen, train = (
        _fresh(published.rows[split], taken, counts) for split in ("validation", "train")
    )
    if declared.apart:
        chosen = _others(chosen, test, declared.apart, "validation", notes)
        train = _others(train, test + chosen, declared.apart, "training", notes)
    usable = len({example.stratum for example in train}) >= (2 if declared.labels else 1)
    if not usable and declared.train_from_test is not None:
        test = _fresh(test, {}, counts)
        total, count = len(test), round(declared.train_from_test * len(test))
        if declared.apart:
            train, test = _parted(test, declared.apart, count, TEST_SEED)
        else:
            pools = _pools(test, TEST_SEED)
            train = take(pools, proportional(pools, count, "train", where), TEST_SEED)
            test = [example for pool in pools.values() for example in pool]
        why = "the training rows are not of two labels" if declared.labels else "no training rows"
        notes.append(
            f"{why}: {len(train)} of the {total} different test rows are trained on instead"
        )
    count = min(len(test), size_of("test_size", test_size, len(test)))
    if declared.group:
        return _whole_groups(test, declared.group, count), chosen, train
    pools = _pools(test, TEST_SEED)
    test = take(pools, proportional(pools, count, "test", where), TEST_SEED)
    return test, chosen, train


def _parted(
    rows: list[Example], names: tuple[str, ...], count: int, seed: int
) -> tuple[list[Example], list[Example]]:
    """About `count` rows and the others, none of which share their fields `names` across."""
    groups = _groups(rows, names, seed)
    taken: list[Example] = []
    left: list[Example] = []
    for group in groups:
        nearer = abs(len(taken) + len(group) - count) <= abs(len(taken) - count)
        (taken if (nearer or not taken) and group is not groups[-1] else left).extend(group)
    return taken, left


def _others(
    rows: list[Example], taken: list[Example], names: tuple[str, ...], split: str, notes: list[str]
) -> list[Example]:
    """The rows that share no fields `names` with a row that is taken."""
    known = {_shared(row, names) for row in taken}
    left = [row for row in rows if _shared(row, names) not in known]
    if len(left) < len(rows):
        notes.append(
            f"{len(rows) - len(left)} {split} rows left out that share {' and '.join(names)} with rows of another "
            "split"
        )
    return left


def _shared(row: Example, names: tuple[str, ...]) -> tuple[str, ...]:
    return text_key(Example({name: row.fields[name] for name in names}, "", row.file, row.line))


def _groups(rows: list[Example], names: tuple[str, ...], seed: int) -> list[list[Example]]:
    """Rows that share the fields, group by group in the order of the seed."""
    groups: dict[bytes, list[Example]] = {}
    for row in rows:
        shared = Example({name: row.fields.get(name, "") for name in names}, "", row.file, row.line)
        groups.setdefault(rank(shared, seed), []).append(row)
    return [groups[key] for key in sorted(groups)]


def _fresh(
    rows: list[Example], taken: dict[tuple[str, ...], str], counts: Counter[str]
) -> list[Example]:
    """The rows whose text no split before has; what is left out is counted."""
    unique, duplicates, conflicts = drop_duplicates(rows)
    counts.update(duplicates=duplicates, conflicts=conflicts)
    fresh: list[Example] = []
    for example in unique:
        key = text_key(example)
        if key in taken:
            counts["duplicates" if taken[key] == example.label else "conflicts"] += 1
        else:
            fresh.append(example)
    # also the texts of conflicting rows, which are in no split
    taken.update({text_key(example): example.label for example in rows})
    return fresh


def _pools(rows: list[Example], seed: int) -> Pools:
    """The rows of each label, in the order of the seed."""
    pools: Pools = {}
    for example in sorted(rows, key=lambda example: rank(example, seed)):
        pools.setdefault(example.stratum, []).append(example)
    return dict(sorted(pools.items()))


def _whole_groups(rows: list[Example], group: tuple[str, ...], count: int) -> list[Example]:
    """At most `count` rows (one group at least), no group of which is left out in part."""
    taken: list[Example] = []
    for rows_of_one in _groups(rows, group, TEST_SEED):
        if taken and len(taken) + len(rows_of_one) > count:
            break
        taken += rows_of_one
    return taken


def _few(
    declared: Declaration,
    pools: Pools,
    chosen: Pools,
    shots: int,
    validation_size: int | float | None,
    seed: int,
) -> tuple[list[Example], list[Example]]:
    """`shots` training rows of each label, and as many others for validation.

    Those come from the training rows where each label has enough; else from the validation rows.
    """
    sizes = {label: len(pools.get(label, ())) for label in declared.labels or ("",)}
    short_of = {label: size for label, size in sizes.items() if size < shots}
    if short_of and not declared.whole_small_classes:
        label, size = min(short_of.items(), key=lambda item: item[1])
        raise UserError(
            f"--shots is {shots}: {_spelled(label)} {size} training rows: give at most {size}"
            if size
            else f"--shots is {shots}: {_spelled(label)} no training row: give rows of it"
        )
    train = take(pools, {label: min(shots, len(pool)) for label, pool in pools.items()}, seed)
    enough = all(len(pool) >= shots for pool in pools.values())
    source = chosen if chosen and (declared.apart or not enough) else pools
    if validation_size is not None:
        total = sum(map(len, source.values()))
        count = size_of("validation_size", validation_size, total)
        return train, take(source, proportional(source, count, "validation", "--shots"), seed)
    if source is pools and not enough and not declared.whole_small_classes:
        label, size = min(sizes.items(), key=lambda item: item[1])
        raise UserError(
            f"--shots is {shots}: {_spelled(label)} {size} training rows, and as many are needed "
            f"for validation: give at most {size // 2}, or --validation-size"
        )
    return train, take(source, {label: min(shots, len(p)) for label, p in source.items()}, seed)


def _spelled(label: str) -> str:
    return f"label {label!r} has" if label else "there are"
