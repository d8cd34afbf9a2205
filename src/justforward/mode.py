"""A model that says it is in training and computes as in evaluation: what a loss sees while a look is under way.

trl's trainers file their numbers under `self.model.training`, which they ask within compute_loss, where a look has every module
in eval mode. So the whole model's flag, no module's within it, is True there, but not while its forward runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from types import CodeType
from typing import Any

from torch import nn

# Whose own methods turn the flag, and compute nothing by it.
_KNOWN = {"builtins", "torch.nn.modules.module", "transformers.modeling_utils"}


@contextmanager
def seen_in_training(model: nn.Module) -> Iterator[None]:
    """While inside, `model.training` is True to all but the model's forward, where it is as it was.

    A model with other methods that ask for it stays as it is: they may be called from without, and drop units by it.
    """
    if model.training or asks_outside(type(model)):  # type: ignore[arg-type]  # a class has a hash
        yield
        return
    depth = 0

    def enter(*_: Any) -> None:
        nonlocal depth
        depth += 1
        model.training = False

    def leave(*_: Any) -> None:
        nonlocal depth
        depth -= 1
        model.training = not depth

    hooks = (
        model.register_forward_pre_hook(enter, prepend=True),
        model.register_forward_hook(leave, always_call=True),
    )
    model.training = True
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        model.training = False


@cache
def asks_outside(kind: type) -> bool:
    """Whether a method of a module's class other than forward names `training`."""
    return any(
        "training" in _names(code)
        for base in kind.__mro__
        if base.__module__ not in _KNOWN
        for name, member in vars(base).items()
        if name != "forward"
        for code in _codes(member)
    )


def _codes(member: Any) -> Iterator[CodeType]:
    """Of a function, a property and what else is callable in a class; of what was decorated, too."""
    if isinstance(member, property):
        for part in (member.fget, member.fset):
            yield from _codes(part)
    elif isinstance(member, cached_property):
        yield from _codes(member.func)
    elif isinstance(member, staticmethod | classmethod):
        yield from _codes(member.__func__)
    while member is not None:
        code = getattr(member, "__code__", None)
        if isinstance(code, CodeType):
            yield code
        member = getattr(member, "__wrapped__", None)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
        elif isinstance(constant, str):
            yield constant
