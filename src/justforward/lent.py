"""Values of a parameter made for whoever asked: a part of them may be read, and is not the place to write."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from justforward.errors import UserError

_plain = torch._C.DisableTorchFunctionSubclass


def writes(name: str) -> bool:
    """Whether the operation of this name writes to what it is given first."""
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def written(args: tuple[Any, ...], kwargs: dict[str, Any], name: str, kind: type) -> Any:
    """What an operation of this name would write to, if that is of a class: alone or in a list, as `out` or where it stands first."""
    given = [kwargs.get("out"), args[0] if args and writes(name) else None]
    for target in given:
        for item in target if isinstance(target, (list, tuple)) else (target,):
            if isinstance(item, kind):
                return item
    return None


class Lent(Tensor):
    """A view of values that were made for the occasion, which a write would be lost in. What is computed with it is a plain tensor.

    Raises:
        UserError: it is written to.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        with _plain():
            target = written(args, kwargs, name, Lent)
            if target is not None:
                raise UserError(
                    f"a part {tuple(target.shape)} of a parameter that is not stored as it is computed with is written by {name}, "
                    "which would change a copy of it: write to the parameter's .data"
                )
            return lend(func(*args, **kwargs), [x for x in args[:1] if isinstance(x, Lent)])

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as the tensor that it is."""
        with _plain():
            whole: Any = self.as_subclass(Tensor)
            return whole.__reduce_ex__(protocol)


def lend(result: Any, made: list[Tensor]) -> Any:
    """A result of an operation; where it is a view of what was made for it, marked as such."""
    if isinstance(result, (list, tuple)) and made:
        parts = [lend(item, made) for item in result]
        return type(result)(parts) if type(result) in (list, tuple) else result
    if not isinstance(result, Tensor) or not any(_views(result, whole) for whole in made):
        return result
    return result.as_subclass(Lent)


def _views(result: Tensor, whole: Tensor) -> bool:
    return (
        result is not whole
        and result.device == whole.device
        and result.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() != 0
    )
