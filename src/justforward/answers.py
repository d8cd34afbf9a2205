"""Options and answers that stand in the rows themselves: of kinds "choice" and "generation".

Read as a declaration says (`declaration.Options`, `declaration.Answers`), in the shapes in which data sets are published.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from justforward.data import short, text_of
from justforward.declaration import Answers, Declaration, Options
from justforward.errors import UserError

MISSING = object()
Bag = tuple[str, ...]
# Value at the first of some places, or MISSING.
First = Callable[[tuple[str, ...]], Any]


def read_options(options: Options, first: First, line: int, path: Path) -> tuple[str, ...]:
    """What a row offers to choose from, in the order of the file; a list may name a text twice.

    Raises:
        UserError: a column is missing, or there are fewer than two different options.
    """
    if options.columns:
        found = [first((column,)) for column in options.columns]
        for column, value in zip(options.columns, found, strict=True):
            if value is MISSING:
                raise UserError(f"{path}:{line}: option {column!r} is not a column of the row")
    else:
        listed = first(options.places)
        where = " or ".join(options.places)
        if not isinstance(listed, list):
            raise UserError(f"{path}:{line}: the options at {where} are not a list")
        found = [_cut_out(item, options, first, line, path) for item in listed]
    texts = tuple(options.changed(text_of(value, "an option", line, path)) for value in found)
    twice = [text for text in texts if texts.count(text) > 1]
    if options.columns and twice:
        raise UserError(f"{path}:{line}: two options are the same text: {short(twice[0])}")
    unique = len(set(texts))
    if unique < 2:
        raise UserError(f"{path}:{line}: {unique} different options: at least two are needed")
    return texts


def _cut_out(item: Any, options: Options, first: First, line: int, path: Path) -> Any:
    """An option published as the place where it stands in a text: {start, end}, both inclusive."""
    if not isinstance(item, dict):
        return item
    if "text" in item:
        return item["text"]
    text = first((options.text,)) if options.text is not None else MISSING
    start, end = item.get("start"), item.get("end")
    if isinstance(text, str) and isinstance(start, int) and isinstance(end, int):
        if 0 <= start <= end < len(text):
            return text[start : end + 1]
        raise UserError(
            f"{path}:{line}: an option from {start} to {end} of a text of {len(text)} characters"
        )
    raise UserError(
        f"{path}:{line}: the option {short(json.dumps(item))} is neither a text nor a place in one"
    )


def read_shown(
    options: Options, texts: tuple[str, ...], first: First, line: int, path: Path
) -> tuple[str, ...]:
    """The sentence that each option completes; none where options stand for themselves.

    Raises:
        UserError: there is no sentence, or no place for an option in it.
    """
    if not options.into:
        return ()
    sentence = first(options.into)
    if not isinstance(sentence, str) or options.at not in sentence:
        raise UserError(
            f"{path}:{line}: {' or '.join(options.into)} has no {options.at!r} to put the options at: "
            f"it is {'missing' if sentence is MISSING else short(str(sentence))}"
        )
    return tuple(sentence.replace(options.at, text) for text in texts)


def read_answers(
    declared: Declaration, options: tuple[str, ...], first: First, line: int, path: Path
) -> tuple[Bag, ...]:
    """The right answers of a row, each once; the first is the one that is trained on.

    Args:
        options: as `read_options` has them; none for kind "generation".

    Raises:
        UserError: there is none, one is no option, one is not in the text that must hold it, or there are
            several where the declaration says one.
    """
    answers = declared.answers
    assert answers is not None
    value = first(answers.places)
    if value is MISSING:
        raise UserError(
            f"{path}:{line}: task {declared.name!r} reads the answers from "
            f"{' or '.join(answers.places)}, which is not there"
        )
    more = first(answers.also) if answers.also is not None else MISSING
    bags = _bags(value, line, path) + ([] if more is MISSING else _bags(more, line, path))
    bags = [bag for bag in bags if any(span.strip() for span in bag)]
    if declared.kind == "choice":
        bags = [_option_of(bag, declared, options, line, path) for bag in bags]
    unique = tuple(dict.fromkeys(bags))
    if not unique:
        raise UserError(f"{path}:{line}: no right answer in the row: fill it in or drop the row")
    if len(unique) > 1 and answers.one:
        raise UserError(
            f"{path}:{line}: {len(unique)} right answers ({short(unique[0][0])}, {short(unique[1][0])}) "
            "where the task is declared to have one: keep one, or declare one: false"
        )
    if answers.within is not None:
        _check_within(unique, answers, first, line, path)
    return unique


def _check_within(
    bags: tuple[Bag, ...], answers: Answers, first: First, line: int, path: Path
) -> None:
    assert answers.within is not None
    text, where = first(answers.within), " or ".join(map(repr, answers.within))
    if not isinstance(text, str):
        raise UserError(f"{path}:{line}: {where}, which holds the answers, is no text")
    for span in (span for bag in bags for span in bag):
        if span not in text:
            raise UserError(
                f"{path}:{line}: the answer {short(span)} is not in {where}: "
                "correct the row, or leave `within` out of the declaration"
            )


def _option_of(
    bag: Bag,
    declared: Declaration,
    options: tuple[str, ...],
    line: int,
    path: Path,
) -> Bag:
    """The option that an answer names: by its text or, counted from 0, by its place."""
    assert declared.options is not None
    (name,) = bag if len(bag) == 1 else ("",)
    text = declared.options.changed(name)
    place = int(name) if name.isdecimal() else len(options)
    if text in options:
        if place < len(options) and options[place] != text:
            raise UserError(
                f"{path}:{line}: the right answer {short(name)} is one option by its text, and by its place "
                f"{short(options[place])}: write the options in words"
            )
        return (text,)
    if place < len(options):
        return (options[place],)
    raise UserError(
        f"{path}:{line}: the right answer {short(', '.join(bag))} is none of the {len(options)} options, "
        f"such as {short(options[0])}"
    )


# ----------------------------------------------------------------------------------- published shapes


def _bags(value: Any, line: int, path: Path) -> list[Bag]:
    """Alternatives, each a bag of spans.

    A text or number is one; a list holds alternatives, each a text, an object with "text", or a list of
    spans; DROP's object has one of "number", "date" and "spans", or lists of them.
    """
    if isinstance(value, dict) and {"number", "date", "spans"} & set(value):
        return _drop_bags(value, line, path)
    if isinstance(value, dict) and "text" in value:
        return _bags(value["text"], line, path)
    if not isinstance(value, list):
        return [(text_of(value, "an answer", line, path),)]
    bags: list[Bag] = []
    for item in value:
        if isinstance(item, list):
            spans = tuple(text_of(span, "an answer", line, path) for span in item)
            bags += [spans] if spans else []
        else:
            bags += _bags(item, line, path)
    return bags


def _drop_bags(value: dict[str, Any], line: int, path: Path) -> list[Bag]:
    number, date, spans = (value.get(key) for key in ("number", "date", "spans"))
    if isinstance(number, list) or isinstance(date, list):  # several answers, key by key
        count = max(len(each) for each in (number, date, spans) if isinstance(each, list))
        keys = {k: v for k, v in value.items() if isinstance(v, list) and len(v) == count}
        rows = [{key: values[i] for key, values in keys.items()} for i in range(count)]
        return [bag for row in rows for bag in _drop_bags(row, line, path)]
    if number not in (None, ""):
        return [(text_of(number, "an answer", line, path),)]
    for key, shape, kind in (
        ("spans", list, "a list of texts"),
        ("date", dict, "day, month and year"),
    ):
        if value.get(key) and not isinstance(value[key], shape):
            raise UserError(
                f"{path}:{line}: an answer's {key!r} is {short(json.dumps(value[key]))}: it must be {kind}: "
                "give the row as it was published"
            )
    if spans:
        return [tuple(text_of(span, "an answer", line, path) for span in spans)]
    parts = [str((date or {}).get(key) or "") for key in ("day", "month", "year")]
    text = " ".join(part for part in parts if part)
    return [(text,)] if text else []
