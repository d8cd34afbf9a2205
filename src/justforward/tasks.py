"""A task in words: how a row becomes a prompt, and which word answers for which label.

    Task("{text} It was", {"negative": "terrible", "positive": "great"})

turns the row ``text="A dull film."`` into ``"A dull film. It was"`` and asks the model which of
" terrible" and " great" is the likelier next. With ``{mask}`` in the template, as in
``"{text} It was {mask}."``, a masked model is asked which of them stands there. No torch in here:
it must import in no time.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from justforward.errors import UserError

Truncation = Literal["left", "right"]
Loss = Literal["choices", "vocabulary"]

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
        labels: label value in the data -> the word(s) that answer for it, in order.
        label_field: column that holds the label.
        truncation: which end of a field's text is dropped when a row is longer than max_length.
        loss: "choices" is cross-entropy over the scores of the choices; "vocabulary" is the
            negative log-likelihood of the right answer's tokens over the full vocabulary.

    Raises:
        UserError: the template or the labels cannot be used.
    """

    template: str
    labels: dict[str, str]
    label_field: str = "label"
    truncation: Truncation = "right"
    loss: Loss = "choices"

    def __post_init__(self) -> None:
        pieces = parse_template(self.template)
        fields = [name for _, name in pieces if name is not None]
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
        if self.truncation not in get_args(Truncation):
            raise UserError(f"truncation {self.truncation!r} is unknown: choose left or right")
        if self.loss not in get_args(Loss):
            raise UserError(f"loss {self.loss!r} is unknown: choose choices or vocabulary")

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
        out: list[str] = []
        for literal, name in self.pieces:
            out.append(literal)
            if name == MASK:
                out.append(mask)
            elif name is not None:
                if name not in fields:
                    raise UserError(
                        f"template {self.template!r}: unknown field {name!r}: the row has "
                        f"{_names(fields)}"
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
    if all(name in (None, MASK) for _, name in pieces):
        raise UserError(
            f"template {template!r} shows no field of the data: put one in, as in '{{text}} It was'"
        )
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
