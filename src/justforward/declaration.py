"""What a task's file says, as dataclasses: where published rows are, how they are read and asked.

What a declaration cannot say, it cannot do: there is no code in one. `catalog` reads the files, `published` and
`answers` read rows with them. No torch in here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

from justforward.errors import UserError
from justforward.tasks import Kind, Loss, Score, Task, Truncation

ModelKind = Literal["causal", "masked"]
SPLITS = ("train", "validation", "test")
END_MARKS = ".!?;:,"

# What may be done to a field's text, by name.
CHANGES: dict[str, Callable[[str], str]] = {
    "strip": str.strip,
    "lower": str.lower,
    "capital": lambda text: text[:1].upper() + text[1:],
    "small": lambda text: text[:1].lower() + text[1:],
    # "I" stays large
    "small_word": lambda text: text if text.split(" ")[0] == "I" else text[:1].lower() + text[1:],
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
    values: dict[str, str] = field(default_factory=dict)
    replace: dict[str, str] = field(default_factory=dict)

    def changed(self, text: str) -> str:
        """`text` after all changes, in order, and all replacements."""
        for name in self.changes:
            text = CHANGES[name](text)
        for old, new in self.replace.items():
            text = text.replace(old, new)
        return text


@dataclass(frozen=True)
class Options(Field):
    """What the rows of a "choice" offer.

    Attributes:
        columns: one option each; or else `places`: a list of texts, or of {start, end} in `text`.
        text: the text that options are cut out of.
        into: places of a sentence that each option completes, standing in for `at`: the model is asked for that.
    """

    columns: tuple[str, ...] = ()
    text: str | None = None
    into: tuple[str, ...] = ()
    at: str = ""


@dataclass(frozen=True)
class Answers:
    """Where the right answers of a "choice" or "generation" are.

    Attributes:
        places: of which the first that is there is read; of a "choice" texts or numbers of options.
        also: places of further right answers, of which the first that is there is read.
        one: whether there must be exactly one.
        within: places of the text that must hold every answer.
    """

    places: tuple[str, ...]
    also: tuple[str, ...] | None = None
    one: bool = False
    within: tuple[str, ...] | None = None


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
        apart: fields that no row of one split shares with a row of another: SQuAD's articles.
        options, answers: where they are, for the kinds that have them in the rows.
    """

    name: str
    where: str
    title: str
    labels: dict[str, str] = field(default_factory=dict)
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
    apart: tuple[str, ...] = ()
    options: Options | None = None
    answers: Answers | None = None
    loss: Loss | None = None
    score: Score | None = None
    null: str | None = None
    stop: tuple[str, ...] = ("\n",)
    max_new_tokens: int = 50
    separator: str = "\n\n"
    hub: str | None = None
    notes: str = ""

    def task_for(
        self,
        kind: ModelKind = "causal",
        *,
        truncation: Truncation = "right",
        loss: Loss | None = None,
        template: str | None = None,
        labels: dict[str, str] | None = None,
    ) -> Task:
        """Template and label words for one kind of model, or those given; loss None: the declared one, or the kind's.

        Raises:
            UserError: the declaration has no template for it, or it shows what is to be answered.
        """
        own = self.template if kind == "causal" else self.masked_template
        template = own if template is None else template
        if template is None:
            key = "template" if kind == "causal" else "masked_template"
            raise UserError(
                f"{self.where}: task {self.name!r} has no {key}, which a {kind} model needs: "
                "add one, or give --template"
            )
        words = self.labels if kind == "causal" else self.masked_labels or self.labels
        usual: Loss = "vocabulary" if self.kind == "generation" else "choices"
        task = Task(
            template=template,
            labels=dict(words if labels is None else labels),
            truncation=truncation,
            loss=loss or self.loss or usual,
            kind=self.kind,
            score=self.score or ("sum" if self.kind == "classification" else "mean"),
            # it belongs to that template
            null=self.null if kind == "causal" and template == own else None,
            stop=self.stop,
            max_new_tokens=self.max_new_tokens,
            separator=self.separator,
            metrics=self.metrics,
            positive=self.positive,
            group=self.group,
        )
        for name in task.fields:
            told = set(self._places(name)) & set(self._answered_at())
            if told:
                raise UserError(
                    f"template {template!r}: field {name!r} is read from {min(told)!r}, where the right answer is, which "
                    "would show it to the model: leave it out"
                )
        return task

    def _places(self, name: str) -> tuple[str, ...]:
        """Where a field of a template is read."""
        return self.fields[name].places if name in self.fields else (name,)

    def _answered_at(self) -> tuple[str, ...]:
        """Where a row says what is right."""
        if self.kind == "classification":
            return tuple(column.place for column in self.label)
        return () if self.answers is None else (*self.answers.places, *(self.answers.also or ()))

    @property
    def kinds(self) -> tuple[ModelKind, ...]:
        """The kinds of model that there is a template for."""
        have = {"causal": self.template, "masked": self.masked_template}
        return tuple(kind for kind in get_args(ModelKind) if have[kind] is not None)
