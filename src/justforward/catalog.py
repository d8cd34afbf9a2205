"""Tasks as declarations: one YAML file a task, the built-in ones in `declarations/`.

`declaration` has what a file becomes, docs/tasks.md explains each key. No torch in here: `justforward tasks` must answer in no time.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any, get_args

import yaml

from justforward.declaration import (
    CHANGES,
    SPLITS,
    Answers,
    Declaration,
    Field,
    LabelColumn,
    ModelKind,
    Options,
)
from justforward.errors import UserError
from justforward.tasks import MASK, METRICS, Kind, Loss, Score

FOLDER = Path(__file__).with_name("declarations")


# ---------------------------------------------------------------------------------------- the catalogue


def names() -> list[str]:
    """The built-in tasks."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str) -> Declaration:
    """A built-in task by its name, or a file that ends in .yaml or .yml.

    Raises:
        UserError: no such task or file, or the file is no declaration; naming file, key and value.
    """
    if name.endswith((".yaml", ".yml")):
        return _declaration(Path(name), _read(Path(name)))
    if name not in names():
        near = difflib.get_close_matches(name.lower().replace("-", ""), names(), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"--task is {name!r}: no task of that name: {hint}'justforward tasks' lists them; "
            "a declaration of your own ends in .yaml"
        )
    path = FOLDER / f"{name}.yaml"
    return _declaration(path, _read(path))


def kind_of(model: str | None) -> ModelKind:
    """Which template suits a model, by the architecture that its folder names; "causal" elsewhere.

    Torch-free, so a hub name is not looked up: a masked one there needs --template.
    """
    if not model:
        return "causal"
    try:
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
        saved_as = str(config["architectures"][0])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return "causal"  # what is wrong with the folder is said when it is loaded
    return "masked" if saved_as.endswith(("ForMaskedLM", "ForPreTraining")) else "causal"


def spell_tasks(declarations: list[Declaration]) -> str:
    """A line for each task."""
    lines = [
        f"{declared.name:<10} {declared.kind:<15} {', '.join(declared.kinds):<15} "
        f"{', '.join(declared.metrics):<25} {declared.title}"
        for declared in declarations
    ]
    return "\n".join(lines)


def described(declared: Declaration) -> dict[str, Any]:
    """A declaration as plain values, for JSON."""
    return {
        "name": declared.name,
        "title": declared.title,
        "kind": declared.kind,
        "models": list(declared.kinds),
        "template": declared.template,
        "options": declared.options is not None,
        "labels": declared.labels,
        "masked_template": declared.masked_template,
        "masked_labels": declared.masked_labels or declared.labels,
        "metrics": list(declared.metrics),
        "files": {split: list(files) for split, files in declared.splits.items()},
        "hub": declared.hub,
        "notes": declared.notes,
    }


# ------------------------------------------------------------------------------------------- reading


class _Mapping(dict[Hashable, Any]):
    """A mapping of the file, and the line that each of its keys is in."""

    lines: dict[str, int]


def _spelled_out(given: Any, of: Any, key: str) -> Any:
    """A mapping as it is; what else is written behind `key` of the mapping `of` as {from: that}, in the key's line."""
    if isinstance(given, dict):
        return given
    found = _Mapping({"from": given})
    found.lines = {"from": of.lines[key]}
    return found


class _Loader(yaml.SafeLoader):
    """Keys are texts as they are written, so that true and 1 are two; one given twice is refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        found = _Mapping()
        found.lines = {}
        for key, value in node.value:
            name = str(key.value)
            if name in found.lines:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} is given twice: keep one", key.start_mark
                )
            found.lines[name] = key.start_mark.line + 1
            found[name] = self.construct_object(value, deep=True)
        return found


_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_mapping)


def _read(path: Path) -> dict[Any, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such declaration: check the path") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: save the file as UTF-8") from error
    try:
        values = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = str(path) if mark is None else f"{path}:{mark.line + 1}"
        said = getattr(error, "problem", None) or " ".join(str(error).split())
        raise UserError(f"{where}: not a declaration in YAML: {said}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a declaration: write one 'key: value' a line")
    return values


def spelled(value: Any) -> str:
    """A published value as a key: true and false in small letters, numbers as they are written."""
    text = str(value).strip()
    return text.lower() if text.lower() in ("true", "false") else text


class _Check:
    """Takes keys out of a mapping, each checked; what is left at the end is unknown."""

    def __init__(
        self, file: str, values: dict[Any, Any], known: tuple[str, ...], part: str = ""
    ) -> None:
        """`part`: of the file, which messages name after it."""
        self.file = file
        self.values = values
        self.part = part and f": {part}"
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
                raise UserError(f"{self.at(key)}: key {key!r} is unknown: {hint}")

    def line(self, key: str) -> str:
        """The file, and its line of `key` if it has that."""
        line = getattr(self.values, "lines", {}).get(key)
        return self.file if line is None else f"{self.file}:{line}"

    def at(self, key: str) -> str:
        """Where `key` is, as messages begin."""
        return self.line(key) + self.part

    def bad(self, key: str, must: str) -> UserError:
        return UserError(f"{self.at(key)}: {key} is {self.values.get(key)!r}: it must be {must}")

    def text(self, key: str) -> str | None:
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, str) or not value.strip():
            raise self.bad(key, "a text")
        return value

    def needed(self, key: str, example: str) -> str:
        value = self.text(key)
        if value is None:
            raise UserError(f"{self.at(key)}: {key} is missing: add it, such as {key}: {example}")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """One text or several."""
        value = self.values.get(key)
        several = [value] if isinstance(value, str) else value
        if several is None:
            return ()
        if (
            not isinstance(several, list)
            or not several
            or not all(isinstance(one, str) and one.strip() for one in several)
        ):
            raise self.bad(key, "a text or a list of texts")
        return tuple(several)

    def choice(self, key: str, known: Any) -> Any:
        """One of the words of a Literal, or None."""
        value = self.values.get(key)
        if value is not None and value not in get_args(known):
            raise self.bad(key, f"one of {', '.join(get_args(known))}")
        return value

    def words_or_none(self, key: str) -> str | None:
        """A text that may be empty or of spaces alone."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            raise self.bad(key, "a text")
        return value

    def endings(self, key: str) -> tuple[str, ...]:
        """Texts, also of white space alone."""
        value = self.values.get(key)
        several = [value] if isinstance(value, str) else value or []
        if not isinstance(several, list) or not all(isinstance(x, str) and x for x in several):
            raise self.bad(key, "a text or a list of texts, none of them empty")
        return tuple(several)

    def count(self, key: str, usual: int) -> int:
        value = self.values.get(key, usual)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.bad(key, "a whole number from 1")
        return value

    def flag(self, key: str) -> bool:
        value = self.values.get(key, False)
        if not isinstance(value, bool):
            raise self.bad(key, "true or false")
        return value

    def words(self, key: str) -> dict[str, str] | None:
        """A mapping of texts to texts."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict) or not value:
            raise self.bad(key, "a mapping of label: word")
        for name, word in value.items():
            if not isinstance(name, str) or not isinstance(word, str):
                raise UserError(
                    f"{self.at(key)}: {key} has {name!r}: {word!r}, not texts: put quotes around "
                    "yes, no, true, false, null and numbers"
                )
        return dict(value)


KEYS = (
    *("name", "title", "kind", "hub", "splits", "train_from_test", "whole_small_classes", "rows"),
    *("fields", "label", "template", "labels", "masked_template", "masked_labels", "metrics"),
    *("positive", "group", "apart", "options", "answers", "loss", "score", "null"),
    *("stop", "max_new_tokens", "separator", "notes"),
)


def _declaration(path: Path, values: dict[Any, Any]) -> Declaration:
    where = str(path) if path.parent != FOLDER else f"declarations/{path.name}"
    check = _Check(where, values, KEYS)
    kind: Kind = check.choice("kind", Kind) or "classification"
    name = check.needed("name", path.stem)
    labels = check.words("labels") or {}
    if kind == "classification" and not labels:
        raise UserError(
            f"{check.at('labels')}: labels are missing: give the word of each label, such as "
            "labels: {negative: terrible, positive: great}"
        )
    separator = check.words_or_none("separator")
    declared = Declaration(
        name=name,
        where=where,
        title=check.text("title") or name,
        labels=labels,
        template=check.text("template"),
        masked_template=check.text("masked_template"),
        masked_labels=check.words("masked_labels"),
        rows=check.text("rows") or "",
        fields=_fields(check),
        label=_label(check, labels),
        splits=_splits(check),
        train_from_test=_share(check),
        whole_small_classes=check.flag("whole_small_classes"),
        kind=kind,
        metrics=check.texts("metrics") or METRICS[kind][:1],
        positive=check.text("positive"),
        group=check.texts("group"),
        apart=check.texts("apart"),
        options=_options(check),
        answers=_answers(check),
        loss=check.choice("loss", Loss),
        score=check.choice("score", Score),
        null=check.words_or_none("null"),
        stop=check.endings("stop") or ("\n",),
        max_new_tokens=check.count("max_new_tokens", 50),
        separator="\n\n" if separator is None else separator,
        hub=check.text("hub"),
        notes=check.text("notes") or "",
    )
    _check_whole(declared, check)
    return declared


def _share(check: _Check) -> float | None:
    value = check.values.get("train_from_test")
    if value is None:
        return None
    if not isinstance(value, float) or not 0.0 < value < 1.0:
        raise check.bad("train_from_test", "a fraction between 0 and 1")
    return value


def _splits(top: _Check) -> dict[str, tuple[str, ...]]:
    value, where = top.values.get("splits"), top.at("splits")
    if not isinstance(value, dict):
        raise UserError(
            f"{where}: splits are missing: name the file of each, such as "
            "splits: {train: train.jsonl, test: test.jsonl}"
        )
    check = _Check(top.file, value, SPLITS, "splits")
    splits = {name: check.texts(name) for name in SPLITS}
    if not splits["test"]:
        raise UserError(f"{where}: splits has no test: name the file whose rows are the test")
    for split, files in splits.items():
        for file in files:
            if not file.endswith((".jsonl", ".json", ".csv", ".tsv")) or Path(file).name != file:
                raise UserError(
                    f"{check.line(split)}: splits has the file {file!r}: give the name of a .jsonl, .json, .csv or "
                    ".tsv file in the folder of the data"
                )
    return splits


def _fields(top: _Check) -> dict[str, Field]:
    value, where = top.values.get("fields"), top.at("fields")
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{where}: fields is {value!r}: it must be a mapping of field: column")
    fields: dict[str, Field] = {}
    for name, given in value.items():
        if not isinstance(name, str) or name == MASK:
            raise UserError(
                f"{where}: fields has {name!r}, which cannot be a field's name: choose another"
            )
        known = ("from", "change", "values", "replace")
        check = _Check(top.file, _spelled_out(given, value, name), known, f"field {name}")
        values = {spelled(k): v for k, v in (check.words("values") or {}).items()}
        replace = check.words("replace") or {}
        fields[name] = Field(check.texts("from") or (name,), _changes(check), values, replace)
    return fields


def _changes(check: _Check) -> tuple[str, ...]:
    changes = check.texts("change")
    for change in changes:
        if change not in CHANGES:
            raise UserError(
                f"{check.at('change')} has the change {change!r}: known are {', '.join(CHANGES)}"
            )
    return changes


def _options(top: _Check) -> Options | None:
    value, where = top.values.get("options"), top.at("options")
    if value is None:
        return None
    known = ("from", "columns", "text", "into", "at", "change", "replace")
    check = _Check(top.file, _spelled_out(value, top.values, "options"), known, "options")
    places, columns = check.texts("from"), check.texts("columns")
    if bool(places) == bool(columns):
        raise UserError(
            f"{where}: options are either from: a column that lists them, or columns: one each"
        )
    into, at = check.texts("into"), check.text("at")
    if bool(into) != bool(at):
        raise UserError(f"{where}: options: into and at go together: give both or neither")
    return Options(
        places=places,
        changes=_changes(check),
        replace=check.words("replace") or {},
        columns=columns,
        text=check.text("text"),
        into=into,
        at=at or "",
    )


def _answers(top: _Check) -> Answers | None:
    value, where = top.values.get("answers"), top.at("answers")
    if value is None:
        return None
    known = ("from", "also", "one", "within")
    check = _Check(top.file, _spelled_out(value, top.values, "answers"), known, "answers")
    places = check.texts("from")
    if not places:
        raise UserError(f"{where}: answers: from is missing: name the column that holds them")
    also, within = check.texts("also") or None, check.texts("within") or None
    return Answers(places, also, check.flag("one"), within)


def _label(top: _Check, labels: dict[str, str]) -> tuple[LabelColumn, ...]:
    value, where = top.values.get("label"), top.at("label")
    if value is None:
        return (LabelColumn("label"),)
    columns: list[LabelColumn] = []
    for given in value if isinstance(value, list) else [value]:
        if not isinstance(given, dict):
            raise UserError(
                f"{where}: label is {given!r}: it must be a mapping such as "
                "{from: label, values: {0: negative, 1: positive}}"
            )
        check = _Check(top.file, given, ("from", "values", "drop"), "label")
        place = check.text("from") or "label"
        values = given.get("values") or {}
        drop = given.get("drop") or []
        if not isinstance(values, dict) or not isinstance(drop, list):
            raise UserError(
                f"{where}: label {place!r}: values must be a mapping of value: label, drop a list"
            )
        for published, name in values.items():
            if not isinstance(name, str) or name not in labels:
                raise UserError(
                    f"{where}: label {place!r}: the value {published!r} is called {name!r}, which "
                    f"has no word: add it to the labels ({', '.join(labels)})"
                )
        columns.append(
            LabelColumn(
                place, {spelled(k): v for k, v in values.items()}, tuple(map(spelled, drop))
            )
        )
    return tuple(columns)


def _at_fault(error: UserError, kind: ModelKind, check: _Check) -> str:
    """The key that a `Task`'s message is about: its first word, or the masked models' own."""
    word = str(error).partition(" ")[0].rstrip(":")
    key = "metrics" if word == "metric" else word
    own = f"masked_{key}"
    return own if kind == "masked" and own in check.values else key


def _check_whole(declared: Declaration, check: _Check) -> None:
    """What holds between the keys."""
    if not declared.kinds:
        raise UserError(
            f"{check.file}: template is missing: write one such as template: '{{text}} It was'"
        )
    masked = declared.masked_labels
    if masked is not None and set(masked) != set(declared.labels):
        odd = sorted(set(masked) ^ set(declared.labels))[0]
        where = check.at("masked_labels")
        raise UserError(f"{where}: label {odd!r} is in one of labels and masked_labels only")
    for kind in declared.kinds:
        try:
            task = declared.task_for(kind)
        except UserError as error:
            raise UserError(f"{check.at(_at_fault(error, kind, check))}: {error}") from error
        if task.masked != (kind == "masked"):
            key = "masked_template" if kind == "masked" else "template"
            must = "needs {mask} where the answer stands" if kind == "masked" else "has a {mask}"
            raise UserError(f"{check.at(key)}: {key} {must}: {task.template!r}")
    if (declared.options is not None) != (declared.kind == "choice"):
        must = "needs options" if declared.kind == "choice" else "has no options"
        raise UserError(f"{check.at('kind')}: kind {declared.kind!r} {must}")
    if declared.kind != "classification":
        if declared.answers is None:
            raise UserError(
                f"{check.at('kind')}: kind {declared.kind!r} needs answers: where they are in a row"
            )
        return
    if declared.answers is not None:
        where = check.at("answers")
        raise UserError(f"{where}: kind 'classification' has no answers: give label and labels")
