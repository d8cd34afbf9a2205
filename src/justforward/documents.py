"""A file of rows that is one JSON document, as SQuAD and DROP were first published."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from json import JSONDecodeError
from pathlib import Path

from justforward.data import read_text, short
from justforward.errors import UserError

_SPACE = re.compile(r"[ \t\n\r]*")


def read_document(path: Path, first: str) -> Iterator[tuple[int, dict[str, object]]]:
    """Line and columns of each object that holds rows.

    They are the items of a list, or the values of an object, whatever their names (DROP's passages). An object
    with the name `first`, with which the path of the rows begins, is the only one (SQuAD's `data`).

    Raises:
        UserError: the file cannot be read, is no JSON, or has something else; naming file, line and value.
    """
    text = read_text(path)
    try:
        members = list(_members(text))
    except JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: not JSON ({error.msg} at column {error.colno}): give the file as it was published"
        ) from error
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond all measure
        raise UserError(f"{path}: JSON that cannot be read: {error}") from error
    lines = {name: line for name, line, _ in members if name is not None}
    if first in lines:
        yield lines[first], {name: value for name, _, value in members if name is not None}
        return
    for name, line, value in members:
        if not isinstance(value, dict):
            what = "" if name is None else f"{name!r}: "
            raise UserError(
                f"{path}:{line}: {what}{short(json.dumps(value))} is not a JSON object that holds rows: "
                "give the file as it was published"
            )
        yield line, value


def _members(text: str) -> Iterator[tuple[str | None, int, object]]:
    """Name (None in a list), line and value of each member of the document.

    Of `json`, which says where nothing is, only values are read with.
    """
    decode = json.JSONDecoder().raw_decode
    at = _skip(text, 0)
    opening = text[at : at + 1]
    if opening not in ("[", "{"):
        raise JSONDecodeError("Expecting a list or an object", text, at)
    closing = "]" if opening == "[" else "}"
    at = _skip(text, at + 1)
    line, counted = 1, 0
    more = text[at : at + 1] != closing
    while more:
        line, counted = line + text.count("\n", counted, at), at
        name: str | None = None
        if opening == "{":
            if text[at : at + 1] != '"':
                raise JSONDecodeError("Expecting property name enclosed in double quotes", text, at)
            name, at = decode(text, at)
            at = _skip(text, at)
            if text[at : at + 1] != ":":
                raise JSONDecodeError("Expecting ':' delimiter", text, at)
            at = _skip(text, at + 1)
        value, at = decode(text, at)
        yield name, line, value
        at = _skip(text, at)
        more = text[at : at + 1] == ","
        if more:
            at = _skip(text, at + 1)
        elif text[at : at + 1] != closing:
            raise JSONDecodeError("Expecting ',' delimiter", text, at)
    at = _skip(text, at + 1)
    if at < len(text):
        raise JSONDecodeError("Extra data", text, at)


def _skip(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    return at if space is None else space.end()
