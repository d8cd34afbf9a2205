"""What `compare` is asked for: checked before anything runs, and spelled out as cells. No torch in here.

A cell is one command: a method on a task with a seed. Where options are to be searched, a cell has trials:
the same command with the first seed, once for each combination of values. The best of them in
validation gives the cell its values; the test rows have no say.
"""

from __future__ import annotations

import difflib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from justforward import catalog
from justforward.config import BaselineConfig, CompareConfig, TrainConfig
from justforward.errors import UserError
from justforward.ranges import check_ranges
from justforward.settings import check_belongs, resolved
from justforward.sources import check_source

Options = dict[str, Any]

# Each method and the command that runs it.
METHODS = {
    "zero-shot": "baseline",
    "icl": "baseline",
    "probe": "baseline",
    "first-order": "baseline",
    "mezo": "train",
}
KINDS: dict[str, type[Any]] = {"train": TrainConfig, "baseline": BaselineConfig}

# Options that a cell gets from elsewhere than a task or a method.
_ELSEWHERE = {
    "model": "it is the same for all cells: give it once, as model",
    "seed": "give seeds",
    "threads": "it is the same for all cells: give it once, as threads",
    "out": "each cell has a folder of its own",
    "resume": "a cell that was cut short is continued anyway",
    "json": "cells answer in JSON anyway",
    "method": "a method's kind: it belongs to the methods",
}
# Options that decide which rows are trained on, chosen by and tested: the same for all methods.
_ROWS = (
    *("data", "task", "template", "labels", "label_field", "shots", "split_seed"),
    *("test_size", "validation_size", "train_size"),
)


class _Refused(UserError):
    """With the place in the configuration, from the top: ("methods", "mezo", "lr")."""

    def __init__(self, keys: tuple[str, ...], text: str) -> None:
        super().__init__(f"{'.'.join(keys)}: {text}")
        self.keys = keys


@dataclass(frozen=True)
class Cell:
    """A method on a task with a seed.

    Attributes:
        kind: one of `METHODS`.
        options: of the command that runs it, without those that say where and how it runs.
        search: for each option that is to be chosen, its candidates.
        trial: which combination of the candidates this is; None for the cell itself.
        values: that combination; of the cell itself the chosen one, empty until it is known.
    """

    task: str
    method: str
    kind: str
    seed: int
    options: Options
    search: dict[str, list[Any]] = field(default_factory=dict)
    trial: int | None = None
    values: Options = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, int, int | None]:
        """Tells it from all other cells of a grid."""
        return self.task, self.method, self.seed, self.trial

    @property
    def name(self) -> str:
        """For people."""
        what = f"{self.task} {self.method} seed {self.seed}"
        if self.trial is None:
            return what
        return f"{what}, trying {', '.join(f'{k} {v}' for k, v in self.values.items())}"

    @property
    def folder(self) -> Path:
        """Its place within the folder of the grid."""
        last = str(self.seed) if self.trial is None else f"trial-{self.trial}"
        return Path("cells", slug(self.task), slug(self.method), last)

    @property
    def makes_run(self) -> bool:
        """Whether its command makes a run folder, which can be continued."""
        return METHODS[self.kind] == "train"

    def trials(self) -> list[Cell]:
        """One for each combination of the values to search."""
        combinations = itertools.product(*self.search.values())
        return [
            replace(self, trial=number, values=dict(zip(self.search, values, strict=True)))
            for number, values in enumerate(combinations)
        ]

    def plain(self) -> dict[str, Any]:
        """Its own part of its record, as JSON gives it back."""
        parts = {name: value for name, value in asdict(self).items() if name != "kind"}
        back: dict[str, Any] = json.loads(json.dumps({**parts, "folder": str(self.folder)}))
        return back

    def argv(self, run: str | Path, threads: int | None = None) -> list[str]:
        """The command with its arguments; `run` is where a run folder goes."""
        given = {**self.options, **self.values, "threads": threads, "json": True}
        if self.makes_run:
            given["out"] = str(run)
        command = METHODS[self.kind]
        usual = {field.name: field.default for field in fields(KINDS[command])}
        return [command, *_arguments(given, usual)]


@dataclass(frozen=True)
class Grid:
    """All cells, task by task and method by method, without the trials."""

    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]

    def trials(self, cell: Cell) -> list[Cell]:
        """The trials that choose a cell's values: they have the first seed."""
        first = next(c for c in self.cells if (c.task, c.method) == (cell.task, cell.method))
        return first.trials() if cell.search else []


def slug(name: str) -> str:
    """A name as that of a folder."""
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "-"


def _arguments(options: Mapping[str, Any], usual: Mapping[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool) and usual[name] is True:  # no flag: it can be turned off
            yield f"{option}={str(value).lower()}"
        elif value is True:
            yield option
        elif isinstance(value, dict):
            yield f"{option}={json.dumps(value, ensure_ascii=False)}"
        elif value is not None and value is not False:
            yield f"{option}={value}"


# --------------------------------------------------------------------------------------------- plan


def plan(config: CompareConfig, source: str | None = None) -> Grid:
    """The cells of a configuration.

    Args:
        config: what is asked for.
        source: the YAML file that it came from, for the line of what is wrong.

    Raises:
        UserError: something in it cannot be used; naming file, line, place and value.
    """
    try:
        return _plan(config)
    except _Refused as error:
        line = None if source is None else _line_of(source, error.keys)
        raise UserError(str(error) if line is None else f"{source}:{line}: {error}") from error


def _plan(config: CompareConfig) -> Grid:
    if config.threads is not None and config.threads < 1:
        raise _Refused(("threads",), f"{config.threads}: it must be at least 1")
    if type(config.jobs) is not int or config.jobs < 1:  # empty in a file: None
        raise _Refused(("jobs",), f"{config.jobs}: it must be at least 1")
    try:
        check_source(config.model)
    except UserError as error:
        raise _Refused(("model",), str(error)) from error
    if config.cell_minutes is not None and not config.cell_minutes > 0:
        raise _Refused(("cell_minutes",), f"{config.cell_minutes}: it must be positive")
    seeds = _seeds(config.seeds)
    tasks = {
        name: (str(key), _task(str(key), config.tasks[key]))
        for key, name in _named("tasks", config.tasks).items()
    }
    methods = {
        name: _method(name, config.methods[key], seeds)
        for key, name in _named("methods", config.methods).items()
    }
    if config.again is not None and config.again not in methods:
        raise _Refused(("again",), f"{config.again!r} is none of the methods {_list(methods)}")
    searches = _searches(config.search or {}, methods)
    cells: list[Cell] = []
    for task, (key, shared) in tasks.items():
        special = _special(key, config.tasks[key], methods)
        for method, (kind, own, count) in methods.items():
            there = special.get(method, {})
            if there is None:
                continue
            given = {"method": kind} if METHODS[kind] == "baseline" else {}
            options = {**given, "model": config.model, **shared, **own, **there}
            cell = Cell(task, method, kind, seeds[0], options, searches.get(method, {}))
            for trial in cell.trials():
                _check(trial, ("tasks", key), shared, own, there)
            if count is None:
                count = 1 if kind == "zero-shot" and _same_test(options) else len(seeds)
            cells += [
                replace(cell, seed=seed, options={**options, "seed": seed})
                for seed in seeds[:count]
            ]
    return Grid(tuple(tasks), tuple(methods), seeds, tuple(cells))


def _seeds(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if not seeds:
        raise _Refused(("seeds",), "none given: give one at least, such as [0]")
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
            raise _Refused(("seeds",), f"{seed!r} is not a whole number from 0 to 2^64 - 1")
        if seeds.count(seed) > 1:
            raise _Refused(("seeds",), f"{seed} is given twice: keep one")
    return tuple(seeds)


def _named(part: str, given: Mapping[Any, Any]) -> dict[Any, str]:
    """The name of each key: a declaration's file goes by its stem, as long as names differ."""
    if not given:
        raise _Refused((part,), "none given: give one at least")
    names = {key: str(key) for key in given}
    if part == "tasks":
        names = {key: Path(n).stem if _is_file(n) else n for key, n in names.items()}
    folders: dict[str, Any] = {}
    for key, name in names.items():
        folder = slug(name).casefold()
        if folder in folders:
            raise _Refused(
                (part, str(key)),
                f"the name would be that of {folders[folder]!r} in a folder: choose another",
            )
        folders[folder] = key
    return names


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _options(keys: tuple[str, ...], given: Any, known: set[str], what: str) -> Options:
    """A mapping of options by name, with dashes or underscores; an empty entry is none."""
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise _Refused(keys, f"{given!r} is no mapping of options: write them as {{option: value}}")
    out: Options = {}
    for written, value in given.items():
        name = str(written).replace("-", "_")
        place = (*keys, str(written))
        if name in _ELSEWHERE and name not in known:
            raise _Refused(place, f"no option here: {_ELSEWHERE[name]}")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f": did you mean {near[0]}?" if near else f": see {what} --help"
            raise _Refused(place, f"no option of {what}{hint}")
        if name in out:
            raise _Refused(place, "given twice: keep one")
        out[name] = value
    return out


def _known(command: str) -> set[str]:
    return {field.name for field in fields(KINDS[command])} - set(_ELSEWHERE)


def _special(
    key: str, given: Any, methods: Mapping[str, tuple[str, Options, int | None]]
) -> dict[str, Any]:
    """What methods do otherwise on a task: options of their own, or None for one that is left out."""
    special = given.get("methods") if isinstance(given, dict) else None
    keys = ("tasks", key, "methods")
    if special is None:
        return {}
    if not isinstance(special, dict):
        raise _Refused(
            keys, f"{special!r} is no mapping: write it as {{method: {{option: value}}}}"
        )
    out: dict[str, Any] = {}
    for method, options in special.items():
        place = (*keys, str(method))
        if method not in methods:
            raise _Refused(place, f"none of the methods {_list(methods)}")
        command = METHODS[methods[method][0]]
        known = _known(command) - set(_ROWS)
        left_out = options is None
        out[method] = (
            None if left_out else _options(place, options, known, f"justforward {command}")
        )
    return out


def _task(key: str, given: Any) -> Options:
    keys = ("tasks", key)
    if isinstance(given, dict):
        given = {name: value for name, value in given.items() if name != "methods"}
    options = _options(keys, given, _known("train"), "justforward train")
    if "task" not in options and (_is_file(key) or key in catalog.names()):
        options = {"task": key, **options}
    if "task" not in options and not {"template", "labels"} <= options.keys():
        raise _Refused(
            keys,
            "no task of that name ('justforward tasks' lists them), and no task, or template and labels, in it: give them",
        )
    if options.get("data") is None:
        raise _Refused(keys, "data is missing: give the task's folder or file of rows")
    data = options["data"]
    if not isinstance(data, str) or not (data == "hub" or os.path.exists(data)):
        raise _Refused((*keys, "data"), f"{options['data']!r}: no such file or folder")
    return options


def _method(name: str, given: Any, seeds: tuple[int, ...]) -> tuple[str, Options, int | None]:
    """Its kind, its options, and with how many of the seeds it is run (None: left open)."""
    keys = ("methods", name)
    entry = dict(given) if isinstance(given, dict) else given
    kind, count = None, None
    if isinstance(entry, dict):
        kind, count = entry.pop("method", None), entry.pop("seeds", None)
    if kind is None:
        found = [known for known in METHODS if name == known or name.startswith(f"{known}-")]
        if not found:
            raise _Refused(
                keys, f"begins with none of {_list(METHODS)}: say which it is, as method"
            )
        kind = max(found, key=len)
    if not isinstance(kind, str) or kind not in METHODS:
        raise _Refused((*keys, "method"), f"{kind!r} is none of {_list(METHODS)}")
    if count is not None and (type(count) is not int or not 1 <= count <= len(seeds)):
        raise _Refused(
            (*keys, "seeds"),
            f"{count!r}: it is how many of the seeds are used, from 1 to {len(seeds)}",
        )
    command = METHODS[kind]
    own = _options(keys, entry, _known(command), f"justforward {command}")
    for option in own:
        if option in _ROWS:
            raise _Refused(
                (*keys, option),
                "decides which rows are shown and tested, which is the same for all methods: give it under tasks",
            )
    return kind, own, count


def _searches(
    given: Mapping[str, Any], methods: Mapping[str, tuple[str, Options, int | None]]
) -> dict[str, dict[str, list[Any]]]:
    out: dict[str, dict[str, list[Any]]] = {}
    for method, candidates in given.items():
        keys = ("search", str(method))
        if method not in methods:
            raise _Refused(keys, f"none of the methods {_list(methods)}")
        kind, own, _ = methods[method]
        command = METHODS[kind]
        wanted = _options(keys, candidates, _known(command), f"justforward {command}")
        for option, values in wanted.items():
            place = (*keys, option)
            if option in _ROWS:
                raise _Refused(place, "decides which rows are shown and tested: not to be searched")
            if option in own:
                raise _Refused(place, f"also given under methods.{method}: keep one of the two")
            if not isinstance(values, list) or not values:
                raise _Refused(
                    place, f"{values!r} is no list of values: write it as [value, value]"
                )
            twice = [value for value in values if values.count(value) > 1]
            if twice:
                raise _Refused(place, f"{twice[0]!r} is given twice: keep one")
        if wanted:
            out[method] = wanted
    return out


def _same_test(options: Options) -> bool:
    """Whether the test rows are the same for every seed: a declared task publishes them."""
    return options.get("task") is not None or options.get("split_seed") is not None


def _check(
    cell: Cell, task: tuple[str, str], shared: Options, own: Options, there: Options
) -> None:
    """Types, ranges and what belongs together, as the command itself would find them.

    Args:
        task: its place.
        shared: options of the task for all methods.
        own: options of the method.
        there: those that the method has on this task alone.
    """
    command = METHODS[cell.kind]
    options = {**cell.options, **cell.values}
    for name in shared:
        if name not in _known(command):
            raise _Refused(
                (*task, name),
                f"no option of justforward {command}, which {cell.method} is: give it under the methods that have it",
            )
    try:
        if command == "train":
            resolved(TrainConfig(**options, out="run"))
        else:
            baseline = BaselineConfig(**options)
            check_ranges(baseline)
            check_belongs(baseline)
            rows = {name: options[name] for name in ("model", *_ROWS) if name in options}
            resolved(TrainConfig(**rows, out="run"))
    except _Refused:
        raise
    except UserError as error:
        found = re.match(r"--([a-z-]+)", str(error))
        name = "" if found is None else found[1].replace("-", "_")
        for place, part in (
            (("search", cell.method, name), cell.values),
            ((*task, "methods", cell.method, name), there),
            (("methods", cell.method, name), own),
            ((*task, name), shared),
        ):
            if name in part:
                raise _Refused(place, str(error)) from error
        raise _Refused(task, f"with methods.{cell.method}: {error}") from error


def _list(names: Mapping[str, Any]) -> str:
    return ", ".join(names)


# ----------------------------------------------------------------------------------- place in the file


def _line_of(source: str, keys: tuple[str, ...]) -> int | None:
    """The line of the last of `keys` that the file has; None where it has none of them."""
    try:
        node: Any = yaml.compose(Path(source).read_text(encoding="utf-8"), yaml.SafeLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    line = None
    for key in keys:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        found = [
            (k, value) for k, value in pairs if k.value.replace("-", "_") == key.replace("-", "_")
        ]
        if not found:
            break
        line, node = found[0][0].start_mark.line + 1, found[0][1]
    return line
