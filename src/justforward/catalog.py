"""Tasks as declarations: one YAML file a task, the built-in ones in `declarations/`.

A declaration says where published rows are and how they are read; what it cannot say, it cannot do:
there is no code in one. `published` reads rows with it, docs/tasks.md explains each key.
No torch in here: `justforward tasks` must answer in no time.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from justforward.errors import UserError
from justforward.tasks import MASK, Loss, Task, Truncation

FOLDER = Path(__file__).with_name("declarations")

Kind = Literal["classification"]
ModelKind = Literal["causal", "masked"]
SPLITS = ("train", "validation", "test")
METRICS = ("accuracy", "f1", "f1_macro", "matthews", "exact_match")
END_MARKS = ".!?;:,"

# What may be done to a field's text, by name.
CHANGES: dict[str, Callable[[str], str]] = {
    "strip": str.strip,
    "lower": str.lower,
    "capital": lambda text: text[:1].upper() + text[1:],
    "small": lambda text: text[:1].lower() + text[1:],
    "no_end_mark": lambda text: (
        text.rstrip()[:-1] if text.rstrip().endswith(tuple(END_MARKS)) else text.rstrip()
    ),
    "question_mark": lambda text: text if text.rstrip().endswith("?") else text.rstrip() + "?",
}


@dataclass(frozen=True)
class Field:
    """One field of a template: the places in a row where it may be, and what is done to its text."""

    places: tuple[str, ...]
    changes: tuple[str, ...] = ()

    def changed(self, text: str) -> str:
        """`text` after all changes, in order."""
        for name in self.changes:
            text = CHANGES[name](text)
        return text


@dataclass(frozen=True)
class LabelColumn:
    """A place where a row's label may be, and the name of each published value; none: as it is."""

    place: str
    values: dict[str, str] = field(default_factory=dict)
    drop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Declaration:
    """A task as its file declares it.

    Attributes:
        where: the file, as messages name it.
        rows: path of the rows within an object of the file, such as "questions[*].answers[*]"; empty
            where an object is a row.
        splits: file names of each split, of which the first that is there is read.
        train_from_test: the share of the test rows to train on where there are no training rows of
            two labels.
        whole_small_classes: whether a class smaller than the number of shots gives all its rows.
        group: fields that rows of one question share, for exact_match.
        positive: the label that f1 counts.
    """

    name: str
    where: str
    title: str
    labels: dict[str, str]
    template: str | None = None
    masked_template: str | None = None
    masked_labels: dict[str, str] | None = None
    kind: Kind = "classification"
    rows: str = ""
    fields: dict[str, Field] = field(default_factory=dict)
    label: tuple[LabelColumn, ...] = (LabelColumn("label"),)
    splits: dict[str, tuple[str, ...]] = field(default_factory=dict)
    train_from_test: float | None = None
    whole_small_classes: bool = False
    metrics: tuple[str, ...] = ("accuracy",)
    positive: str | None = None
    group: tuple[str, ...] = ()
    hub: str | None = None
    notes: str = ""

    def task_for(
        self,
        kind: ModelKind = "causal",
        *,
        truncation: Truncation = "right",
        loss: Loss = "choices",
    ) -> Task:
        """Template and label words for one kind of model.

        Raises:
            UserError: the declaration has no template for it.
        """
        template = self.template if kind == "causal" else self.masked_template
        if template is None:
            key = "template" if kind == "causal" else "masked_template"
            raise UserError(
                f"{self.where}: task {self.name!r} has no {key}, which a {kind} model needs: "
                "add one, or give --template"
            )
        labels = self.labels if kind == "causal" else self.masked_labels or self.labels
        return Task(template=template, labels=dict(labels), truncation=truncation, loss=loss)

    @property
    def kinds(self) -> tuple[ModelKind, ...]:
        """The kinds of model that there is a template for."""
        have = {"causal": self.template, "masked": self.masked_template}
        return tuple(kind for kind in get_args(ModelKind) if have[kind] is not None)


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
    except (OSError, ValueError, LookupError, TypeError):
        return "causal"  # what is wrong with the folder is said when it is loaded
    return "masked" if saved_as.endswith(("ForMaskedLM", "ForPreTraining")) else "causal"


def spell_tasks(declarations: list[Declaration]) -> str:
    """A line for each task."""
    lines = [
        f"{declared.name:<10} {', '.join(declared.kinds):<15} {', '.join(declared.metrics):<24} {declared.title}"
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
        "labels": declared.labels,
        "masked_template": declared.masked_template,
        "masked_labels": declared.masked_labels or declared.labels,
        "metrics": list(declared.metrics),
        "files": {split: list(files) for split, files in declared.splits.items()},
        "hub": declared.hub,
        "notes": declared.notes,
    }


# ------------------------------------------------------------------------------------------- reading


class _Loader(yaml.SafeLoader):
    """Keys are texts as they are written, so that true and 1 are two; one given twice is refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} is given twice: keep one", key.start_mark
                )
            seen.add(str(key.value))
        return {
            str(key.value): self.construct_object(value, deep=True) for key, value in node.value
        }


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
    except yaml.YAMLError as error:
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

    def __init__(self, where: str, values: dict[Any, Any], known: tuple[str, ...]) -> None:
        self.where = where
        self.values = values
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
                raise UserError(f"{where}: key {key!r} is unknown: {hint}")

    def bad(self, key: str, must: str) -> UserError:
        return UserError(f"{self.where}: {key} is {self.values.get(key)!r}: it must be {must}")

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
            raise UserError(f"{self.where}: {key} is missing: add it, such as {key}: {example}")
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
                    f"{self.where}: {key} has {name!r}: {word!r}, not texts: put quotes around "
                    "yes, no, true, false, null and numbers"
                )
        return dict(value)


KEYS = (
    *("name", "title", "kind", "hub", "splits", "train_from_test", "whole_small_classes", "rows"),
    *("fields", "label", "template", "labels", "masked_template", "masked_labels", "metrics"),
    *("positive", "group", "notes"),
)


def _declaration(path: Path, values: dict[Any, Any]) -> Declaration:
    where = str(path) if path.parent != FOLDER else f"declarations/{path.name}"
    check = _Check(where, values, KEYS)
    kind = check.text("kind") or "classification"
    if kind not in get_args(Kind):
        raise check.bad("kind", f"one of {', '.join(get_args(Kind))}")
    name = check.needed("name", path.stem)
    labels = check.words("labels")
    if labels is None:
        raise UserError(
            f"{where}: labels are missing: give the word of each label, such as "
            "labels: {negative: terrible, positive: great}"
        )
    declared = Declaration(
        name=name,
        where=where,
        title=check.text("title") or name,
        labels=labels,
        template=check.text("template"),
        masked_template=check.text("masked_template"),
        masked_labels=check.words("masked_labels"),
        rows=check.text("rows") or "",
        fields=_fields(where, values.get("fields")),
        label=_label(where, values.get("label"), labels),
        splits=_splits(where, values.get("splits")),
        train_from_test=_share(check),
        whole_small_classes=check.flag("whole_small_classes"),
        metrics=check.texts("metrics") or ("accuracy",),
        positive=check.text("positive"),
        group=check.texts("group"),
        hub=check.text("hub"),
        notes=check.text("notes") or "",
    )
    _check_whole(declared)
    return declared


def _share(check: _Check) -> float | None:
    value = check.values.get("train_from_test")
    if value is None:
        return None
    if not isinstance(value, float) or not 0.0 < value < 1.0:
        raise check.bad("train_from_test", "a fraction between 0 and 1")
    return value


def _splits(where: str, value: Any) -> dict[str, tuple[str, ...]]:
    if not isinstance(value, dict):
        raise UserError(
            f"{where}: splits are missing: name the file of each, such as "
            "splits: {train: train.jsonl, test: test.jsonl}"
        )
    check = _Check(f"{where}: splits", value, SPLITS)
    splits = {name: check.texts(name) for name in SPLITS}
    if not splits["test"]:
        raise UserError(f"{where}: splits has no test: name the file whose rows are the test")
    for files in splits.values():
        for file in files:
            if not file.endswith((".jsonl", ".csv", ".tsv")) or Path(file).name != file:
                raise UserError(
                    f"{where}: splits has the file {file!r}: give the name of a .jsonl, .csv or "
                    ".tsv file in the folder of the data"
                )
    return splits


def _fields(where: str, value: Any) -> dict[str, Field]:
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
        inner = given if isinstance(given, dict) else {"from": given}
        check = _Check(f"{where}: field {name}", inner, ("from", "change"))
        changes = check.texts("change")
        for change in changes:
            if change not in CHANGES:
                raise UserError(
                    f"{where}: field {name} has the change {change!r}: known are {', '.join(CHANGES)}"
                )
        fields[name] = Field(check.texts("from") or (name,), changes)
    return fields


def _label(where: str, value: Any, labels: dict[str, str]) -> tuple[LabelColumn, ...]:
    if value is None:
        return (LabelColumn("label"),)
    columns: list[LabelColumn] = []
    for given in value if isinstance(value, list) else [value]:
        if not isinstance(given, dict):
            raise UserError(
                f"{where}: label is {given!r}: it must be a mapping such as "
                "{from: label, values: {0: negative, 1: positive}}"
            )
        check = _Check(f"{where}: label", given, ("from", "values", "drop"))
        place = check.text("from") or "label"
        values = given.get("values") or {}
        drop = given.get("drop") or []
        if not isinstance(values, dict) or not isinstance(drop, list):
            raise UserError(
                f"{where}: label {place!r}: values must be a mapping of value: label, drop a list"
            )
        for published, name in values.items():
            if name not in labels:
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


def _check_whole(declared: Declaration) -> None:
    """What holds between the keys."""
    where = declared.where
    if not declared.kinds:
        raise UserError(
            f"{where}: template is missing: write one such as template: '{{text}} It was'"
        )
    masked = declared.masked_labels
    if masked is not None and set(masked) != set(declared.labels):
        odd = sorted(set(masked) ^ set(declared.labels))[0]
        raise UserError(f"{where}: label {odd!r} is in one of labels and masked_labels only")
    for kind in declared.kinds:
        try:
            task = declared.task_for(kind)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        if task.masked != (kind == "masked"):
            key = "masked_template" if kind == "masked" else "template"
            must = "needs {mask} where the answer stands" if kind == "masked" else "has a {mask}"
            raise UserError(f"{where}: {key} {must}: {task.template!r}")
    for metric in declared.metrics:
        if metric not in METRICS:
            raise UserError(
                f"{where}: metric {metric!r} is unknown: known are {', '.join(METRICS)}"
            )
    if declared.positive is not None and declared.positive not in declared.labels:
        raise UserError(
            f"{where}: positive is {declared.positive!r}: it must be one of the labels "
            f"({', '.join(declared.labels)})"
        )
    if "f1" in declared.metrics and declared.positive is None:
        raise UserError(f"{where}: metric f1 needs positive: the label that it counts")
    if "exact_match" in declared.metrics and not declared.group:
        raise UserError(f"{where}: metric exact_match needs group: the fields of one question")
    if "matthews" in declared.metrics and len(declared.labels) != 2:
        raise UserError(f"{where}: metric matthews is of two labels: leave it out")
