"""Batches: tensors nested in dicts, lists and tuples, an example a row, whose rows are repeated or taken in parts."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable
from typing import Any

from torch import Tensor

from justforward.errors import UserError


def repeat_rows(batch: Any, times: int) -> tuple[Any, int]:
    """The batch concatenated with itself along the first axis of every tensor, and its number of rows.

    Args:
        batch: tensors nested in dicts, lists, tuples; other leaves are passed on as they are.
        times: how often.

    Raises:
        UserError: no tensor, or tensors whose first axes differ.
    """

    def repeat(x: Tensor) -> Tensor:
        return x.repeat(times, *([1] * (x.dim() - 1))) if times > 1 else x

    return change_rows(batch, repeat)


def change_rows(batch: Any, change: Callable[[Tensor], Tensor]) -> tuple[Any, int]:
    """The batch with every tensor changed, and the number of rows that all of them had.

    Args:
        batch: tensors nested in dicts, lists, tuples; other leaves are passed on as they are.
        change: what becomes of a tensor, rows first.

    Raises:
        UserError: no tensor, or tensors whose first axes differ.
    """
    rows: set[int] = set()

    def changed(x: Any) -> Any:
        if isinstance(x, Tensor):
            if x.dim() == 0:
                raise UserError(
                    "the batch has a tensor without rows (0-d): move it into the closure"
                )
            rows.add(x.shape[0])
            return change(x)
        if isinstance(x, dict) or hasattr(x, "keys"):
            parts = {key: changed(x[key]) for key in x.keys()}  # noqa: SIM118 - BatchEncoding iterates otherwise
            if type(x) is dict or not isinstance(x, (dict, UserDict)):
                return parts
            like = copy.copy(x)  # BatchEncoding and its kin have attributes besides
            for key, part in parts.items():
                like[key] = part
            return like
        if isinstance(x, tuple) and hasattr(x, "_fields"):
            return type(x)(*(changed(y) for y in x))
        if isinstance(x, (list, tuple)):
            return type(x)(changed(y) for y in x)
        return x

    result = changed(batch)
    if len(rows) != 1:
        raise UserError(
            "every tensor of the batch must have one row an example; first axes are "
            f"{sorted(rows) or 'none: the batch has no tensors'}"
        )
    return result, rows.pop()
