"""Parameters in groups, as torch has them: read, checked, and split where a variant treats tensors unlike others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from torch import Tensor, nn

from justforward.directions import FAMILIES
from justforward.errors import UserError

LONGEST_EPS = 100.0
ESTIMATORS = ("weight", "activation")


def check_seed(seed: int) -> int:
    """The seed, if it is one; else UserError."""
    if not isinstance(seed, Integral) or not 0 <= seed < 2**64:
        raise UserError(f"seed is {seed!r}: it must be a whole number, at least 0 and below 2^64")
    return int(seed)


def parameter_groups(
    params: Any, model: nn.Module | None
) -> tuple[list[dict[str, Any]], list[list[str]]]:
    """torch's parameter groups with the frozen parameters left out, and the names of the others, by group.

    Args:
        params: a module, parameters, (name, parameter) pairs, or groups of either.
        model: where names come from.

    Raises:
        UserError: something is not a parameter, or is there twice; or nothing is left.
    """
    known = {} if model is None else {id(p): name for name, p in model.named_parameters()}
    if isinstance(params, nn.Module):
        params = list(params.parameters())
    items = list(params)
    groups = items if items and isinstance(items[0], dict) else [{"params": items}]
    out: list[dict[str, Any]] = []
    names: list[list[str]] = []
    seen: set[int] = set()
    count = 0
    for group in groups:
        members = group["params"]
        members = [members] if isinstance(members, Tensor) else list(members)
        kept: list[Tensor] = []
        called: list[str] = []
        for member in members:
            name, tensor = member if isinstance(member, tuple) else (None, member)
            if not isinstance(tensor, Tensor):
                raise UserError(
                    f"params: a {type(tensor).__name__} is not a parameter: pass a model, parameters, or groups of them"
                )
            if id(tensor) in seen:
                raise UserError(
                    f"params: parameter {known.get(id(tensor), name or count)} is there twice"
                )
            if not tensor.requires_grad:
                continue
            seen.add(id(tensor))
            kept.append(tensor)
            called.append(known.get(id(tensor), name or f"param{count}"))
            count += 1
        if kept:
            out.append({**group, "params": kept})
            names.append(called)
    if not out:
        raise UserError("there is nothing to tune: no parameter has requires_grad")
    return out, names


def check_group(group: dict[str, Any]) -> None:
    """Refuse a group whose lr, eps or weight_decay is out of range; numbers of other kinds (numpy's) become Python's.

    Raises:
        UserError: naming the value and what it may be.
    """
    for key, low, high, allowed in (
        ("lr", 0.0, math.inf, "positive and finite"),
        # beyond this the grid, which holds a look of eps exactly, would round weights away
        ("eps", 0.0, LONGEST_EPS, f"positive and at most {LONGEST_EPS:g}"),
        ("weight_decay", -1e-300, math.inf, "finite and at least 0"),
    ):
        value = group[key]
        number = float(value) if isinstance(value, (Real, Tensor)) else math.nan
        if not low < number <= high or math.isinf(number):
            raise UserError(f"{key} is {value!r}: it must be {allowed}")
        if not isinstance(value, (int, float, Tensor)):
            group[key] = number


def check_state(own: Any, kind: dict[str, Any], exponents: Sequence[Tensor]) -> dict[str, Any]:
    """A state, if it is of an optimizer of this kind, with grids like these.

    Raises:
        UserError: naming what differs.
    """
    if own is None:
        raise UserError("load_state_dict: not the state of a MeZO optimizer")
    for key, here in kind.items():
        if own[key] != here:
            raise UserError(
                f"load_state_dict: the {key} is {own[key]} in the state and {here} here"
            )
    if [tuple(e.shape) for e in own["exponents"]] != [tuple(e.shape) for e in exponents]:
        raise UserError("load_state_dict: the state is of other tensors")
    state: dict[str, Any] = own
    return state


def split(
    groups: Sequence[dict[str, Any]],
    names: Sequence[Sequence[str]],
    labels: Sequence[Sequence[str]],
) -> tuple[list[dict[str, Any]], list[list[str]], list[str]]:
    """Every group in parts, one a label, in order of appearance.

    Args:
        groups, names: as `parameter_groups` gives them.
        labels: one for each name.

    Returns:
        Groups, their names, and the label of each group.
    """
    out: list[dict[str, Any]] = []
    out_names: list[list[str]] = []
    out_labels: list[str] = []
    for group, called, marked in zip(groups, names, labels, strict=True):
        for label in dict.fromkeys(marked):
            mine = [i for i, other in enumerate(marked) if other == label]
            out.append({**group, "params": [group["params"][i] for i in mine]})
            out_names.append([called[i] for i in mine])
            out_labels.append(label)
    return out, out_names, out_labels


def family_of(family: str | None, estimator: str) -> str:
    """Name in `FAMILIES` of the directions that an estimator takes; UserError if either is unknown."""
    if estimator not in ESTIMATORS:
        raise UserError(f"estimator is {estimator!r}: it must be one of {', '.join(ESTIMATORS)}")
    name = family or "gaussian"
    if name not in FAMILIES:
        raise UserError(f"family is {family!r}: it must be one of {', '.join(FAMILIES)}")
    if estimator == "activation":
        return {"gaussian": "rank1", "rademacher": "rank1-rademacher"}.get(name, name)
    return name
