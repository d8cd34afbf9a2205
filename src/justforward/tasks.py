"""A task in words: how a row becomes a prompt, and which word answers for which label.

    Task("{text} It was", {"negative": "terrible", "positive": "great"})

turns the row ``text="A dull film."`` into ``"A dull film. It was"`` and asks the model which of
" terrible" and " great" is the likelier next. With ``{mask}`` in the template, as in
``"{text} It was {mask}."``, a masked model is asked which of them stands there. A task of kind "choice" has other options in every
row, one of kind "generation" has answers in the model's own words; rows bring both (`data.Example`).
No torch in here: it must import in no time.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

from justforward.errors import UserError

Truncation = Literal["left", "right"]
Loss = Literal["choices", "vocabulary"]
Kind = Literal["classification", "choice", "generation"]
Score = Literal["sum", "mean"]

# What each kind reports, the first of which chooses the best step unless a task says otherwise.
METRICS: dict[str, tuple[str, ...]] = {
    "classification": ("accuracy", "f1", "f1_macro", "matthews", "exact_match"),
    "choice": ("accuracy", "f1", "exact_match"),
    "generation": ("f1", "exact_match", "drop_f1", "drop_exact_match"),
}

# The field of a template that is no column of the data: where a masked model puts the answer.
MASK = "mask"

# A template in pieces: (literal text, name of the field that follows it, or None at the end).
Pieces = tuple[tuple[str, str | None], ...]


@dataclass(frozen=True)
class Task:
    """What to ask of a row, and what the answers are called.

    Attributes:
        template: text with ``{field}`` for each column of the data to show; a literal brace is
            doubled, as in str.format. The answer follows it after one space, or stands where
            ``{mask}`` is.
        labels: label value in the data -> the word(s) that answer for it, in order; none for the
            kinds whose answers are in the rows.
        label_field: column that holds the label.
        truncation: which end of a field's text is dropped when a row is longer than max_length.
        loss: "choices" is cross-entropy over the scores of the choices; "vocabulary" is the
            negative log-likelihood of the right answer's tokens over the full vocabulary.
        kind: "classification": one of the labels' words; "choice": one of the row's options;
            "generation": text that the model writes.
        score: a choice's score is the "sum" of its tokens' log-probabilities, or their "mean".
        null: template without the row's content, whose scores are taken off with calibration; None:
            the template with every field empty.
        stop: what ends an answer of kind "generation"; an answer is trained on with the first.
        max_new_tokens: longest answer of kind "generation".
        separator: what stands between demonstrations.
        metrics: what is reported; the first chooses the best step.
        positive: the label that metric f1 counts, in classification.
        group: fields that the rows of one question share, for exact_match in classification.

    Raises:
        UserError: the template or the labels cannot be used.
    """

    template: str
    labels: dict[str, str] = field(default_factory=dict)
    label_field: str = "label"
    truncation: Truncation = "right"
    loss: Loss = "choices"
    kind: Kind = "classification"
    score: Score = "sum"
    null: str | None = None
    stop: tuple[str, ...] = ("\n",)
    max_new_tokens: int = 50
    separator: str = "\n\n"
    metrics: tuple[str, ...] = ()
    positive: str | None = None
    group: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        pieces = parse_template(self.template)
        fields = [name for _, name in pieces if name is not None]
        if self.null is not None:
            odd = {name for _, name in _split(self.null) if name is not None} - set(fields)
            if odd:
                raise UserError(
                    f"null {self.null!r}: field {sorted(odd)[0]!r} is not in the template {self.template!r}: "
                    "leave it out"
                )
        if not self.label_field:
            raise UserError("label_field is empty: name the column that holds the label")
        if fields.count(MASK) > 1:
            raise UserError(
                f"template {self.template!r}: {{mask}} stands there {fields.count(MASK)} times: "
                "the answer is one word at one place: keep one"
            )
        if self.label_field == MASK and MASK in fields:
            raise UserError(
                "label_field 'mask' is what the template calls the place of the answer: "
                "rename the column"
            )
        if self.label_field in fields:
            raise UserError(
                f"template {self.template!r}: field {self.label_field!r} is the label, which "
                "would show the model the answer: leave it out"
            )
        self._check_labels()
        if self.truncation not in get_args(Truncation):
            raise UserError(f"truncation {self.truncation!r} is unknown: choose left or right")
        if self.loss not in get_args(Loss):
            raise UserError(f"loss {self.loss!r} is unknown: choose choices or vocabulary")
        if self.score not in get_args(Score):
            raise UserError(f"score {self.score!r} is unknown: choose sum or mean")
        if self.kind == "generation" and self.loss != "vocabulary":
            raise UserError(
                "loss 'choices' is over options, and a task of kind 'generation' has none: "
                "choose vocabulary"
            )
        if self.max_new_tokens < 1 or not self.stop or not all(self.stop):
            raise UserError(
                f"max_new_tokens {self.max_new_tokens} and stop {list(self.stop)}: an answer needs one "
                "token at least, and something that ends it, which cannot be empty"
            )
        for metric in self.metrics:
            self.check_metric(metric)
        if self.positive is not None and self.positive not in self.labels:
            raise UserError(
                f"positive is {self.positive!r}: it must be one of the labels "
                f"({', '.join(self.labels) or 'there are none'})"
            )

    def check_metric(self, name: str) -> None:
        """Whether the task says what a metric needs.

        Raises:
            UserError: it does not, or its kind has no metric of that name.
        """
        if name not in METRICS[self.kind]:
            raise UserError(
                f"metric {name!r} is unknown for kind {self.kind!r}: known are "
                f"{', '.join(METRICS[self.kind])}"
            )
        if self.kind != "classification":
            return
        if name == "f1" and self.positive is None:
            raise UserError("metric f1 needs positive: the label that it counts")
        if name == "exact_match" and not self.group:
            raise UserError("metric exact_match needs group: the fields of one question")
        if name == "matthews" and len(self.labels) != 2:
            raise UserError("metric matthews is of two labels: leave it out")

    def _check_labels(self) -> None:
        if self.kind not in get_args(Kind):
            raise UserError(
                f"kind {self.kind!r} is unknown: choose one of {', '.join(get_args(Kind))}"
            )
        if self.kind != "classification":
            if self.labels:
                raise UserError(
                    f"labels are for kind 'classification', and the kind is {self.kind!r}: leave them out"
                )
            if self.masked:
                raise UserError(
                    f"template {self.template!r} has {{mask}}, which holds one word: a task of kind "
                    f"{self.kind!r} needs a causal model: end the template where the answer follows"
                )
            return
        if len(self.labels) < 2:
            raise UserError(
                f"labels: {len(self.labels)} given, at least 2 needed: "
                "for example negative=terrible,positive=great"
            )
        seen: dict[str, str] = {}
        for label, word in self.labels.items():
            if not label or label != label.strip():
                raise UserError(f"labels: {label!r} is empty or has spaces around it: remove them")
            if not word or word != word.strip():
                raise UserError(
                    f"labels: the word {word!r} of label {label!r} is empty or has spaces around "
                    "it: give the bare word, one space is put before it"
                )
            if word in seen:
                raise UserError(
                    f"labels: {seen[word]!r} and {label!r} have the same word {word!r}: "
                    "give each label its own"
                )
            seen[word] = label

    @cached_property
    def pieces(self) -> Pieces:
        """The parsed template."""
        return parse_template(self.template)

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """Names of the columns that the template shows, each once, in order of first use."""
        names = dict.fromkeys(name for _, name in self.pieces if name is not None)
        return tuple(name for name in names if name != MASK)

    @property
    def masked(self) -> bool:
        """Whether the template has a ``{mask}``: it asks a masked model, not a causal one."""
        return any(name == MASK for _, name in self.pieces)

    @property
    def metric(self) -> str:
        """The metric that chooses the best step."""
        return self.metrics[0] if self.metrics else METRICS[self.kind][0]

    @property
    def tail(self) -> str:
        """The template's literal text after its last field."""
        literal, name = self.pieces[-1]
        return literal if name is None else ""

    def prompt(self, fields: Mapping[str, str], mask: str = "{mask}") -> str:
        """The template with each field's text put in (braces in the text stay as they are).

        Args:
            fields: text of each column.
            mask: what to write for ``{mask}``.
        """
        return _filled(self.template, self.pieces, fields, mask)

    def null_prompt(self, fields: Mapping[str, str], mask: str = "{mask}") -> str:
        """The prompt without the row's content: `null`, or the template with every field empty."""
        if self.null is None:
            return self.prompt(dict.fromkeys(self.fields, ""), mask)
        return _filled(self.null, _split(self.null), fields, mask)


def _filled(template: str, pieces: Pieces, fields: Mapping[str, str], mask: str) -> str:
    out: list[str] = []
    for literal, name in pieces:
        out.append(literal)
        if name == MASK:
            out.append(mask)
        elif name is not None:
            if name not in fields:
                raise UserError(
                    f"template {template!r}: unknown field {name!r}: the row has {_names(fields)}"
                )
            out.append(fields[name])
    return "".join(out)


def parse_template(template: str) -> Pieces:
    """Splits a template into literal text and field names.

    Raises:
        UserError: empty, unbalanced braces, no field, or anything but a plain ``{name}``.
    """
    if not template.strip():
        raise UserError("template is empty: write one such as '{text} It was'")
    pieces = _split(template)
    if all(name in (None, MASK) for _, name in pieces):
        raise UserError(
            f"template {template!r} shows no field of the data: put one in, as in '{{text}} It was'"
        )
    return pieces


def _split(template: str) -> Pieces:
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(
            f"template {template!r}: {error}: write {{name}} for a field and double a brace "
            "that is meant as text"
        ) from error
    pieces: list[tuple[str, str | None]] = []
    for literal, name, spec, conversion in parsed:
        if name is not None and (not name.strip() or spec or conversion):
            shown = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise UserError(
                f"template {template!r}: {'{' + shown + '}'!r} is not a plain field: "
                "write {name} with the name of a column"
            )
        pieces.append((literal, name))
    return tuple(pieces)


def parse_labels(text: str) -> dict[str, str]:
    """``"negative=terrible,positive=great"`` -> ``{"negative": "terrible", ...}``, order kept.

    Words may have spaces within. A label is cut at its first ``=``, so a word may hold one.

    Raises:
        UserError: naming the part that is not ``label=word``.
    """
    labels: dict[str, str] = {}
    for part in text.split(","):
        label, equals, word = (piece.strip() for piece in part.partition("="))
        if not (equals and label and word):
            raise UserError(
                f"labels {text!r}: {part.strip()!r} is not label=word: "
                "write them as negative=terrible,positive=great"
            )
        if label in labels:
            raise UserError(f"labels {text!r}: label {label!r} is given twice: keep one")
        labels[label] = word
    return labels


def _names(names: Mapping[str, object]) -> str:
    return ", ".join(repr(name) for name in names) or "none"
