"""A log applied to its base model: fingerprint, the checks, replay.

Base + log = the tuned model, bit for bit, on any number of threads and in any number of passes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from justforward import noise
from justforward.course import Course
from justforward.directions import FAMILIES, Weights
from justforward.errors import UserError
from justforward.moments import Moments, compile_kernels, course_of
from justforward.rules import Chain, parse
from justforward.shards import check_sharded, weights_of
from justforward.stored import compute_model_wide, in_shards, packed_in, plain, stored_dtype
from justforward.trainable import NOT_THERE
from justforward.trajectory import Log, Step, read_log


def fingerprint(model: nn.Module) -> str:
    """sha256 over name, dtype, shape and bytes of every parameter and buffer (tied ones under each name).

    Of quantised weights, over the integers and what gives them their values: that is inside the tensor (torchao), or
    in the state_dict beside the parameters (bitsandbytes), or what holds them in its place (`stored.Packed`). Works in slices, so that it never holds a copy of a tensor,
    but for weights in shards, which are made whole one at a time: every process must call this then.
    """
    state = model.state_dict()
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    known = {name for name, _ in named}
    named += [(n, x) for n, x in state.items() if n not in known and isinstance(x, Tensor)]
    return fingerprint_of(sorted(named, key=lambda item: item[0]))


def fingerprint_of(named: Iterable[tuple[str, Tensor]]) -> str:
    """The same of these tensors alone, in this order."""
    digest = hashlib.sha256()
    seen: dict[int, str] = {}
    for name, tensor in named:
        digest.update(f"{name}\0{stored_dtype(tensor)}\0{tuple(tensor.shape)}\0".encode())
        if id(tensor) in seen:
            digest.update(f"tied to {seen[id(tensor)]}\0".encode())
            continue
        seen[id(tensor)] = name
        if tensor.is_meta:
            raise UserError(f"{name} is on the meta device and has no values: {NOT_THERE}")
        for part in _slices(tensor.full_tensor() if in_shards(tensor) else tensor):  # type: ignore[attr-defined]
            digest.update(part)
    return digest.hexdigest()


def _slices(tensor: Any) -> Iterable[Any]:
    if hasattr(tensor, "__tensor_flatten__"):  # torch's protocol for a tensor made of tensors
        for name in tensor.__tensor_flatten__()[0]:
            part = getattr(tensor, name)
            yield f"{name}\0{part.dtype}\0{tuple(part.shape)}\0".encode()
            yield from _slices(part)
        return
    packed = packed_in(tensor)
    if packed is not None:
        yield from packed.parts()
        return
    flat = plain(tensor).reshape(-1)
    for start in range(0, flat.numel(), 1 << 24):
        yield flat[start : start + (1 << 24)].cpu().contiguous().view(torch.uint8).numpy().data


def begin(
    model: nn.Module | None,
    named: Sequence[tuple[str, Tensor]],
    path: str | os.PathLike[str],
    resume: bool,
    header: dict[str, Any],
) -> tuple[dict[str, Any], Log | None]:
    """The header of a log that is to be started, or gone on with, and what there is of it. For before the weights are touched.

    Args:
        model: that the parameters are of.
        named: what is tuned.
        path: of the log.
        resume: go on with it, if it is there.
        header: `header_for`; the base is put in here.

    Raises:
        UserError: there is no model, or it has not all that is tuned; the log's place will not do; or a log that is there is of
            another model or other settings. A log must not cost the model its exact base values, and a refused one neither.
    """
    if model is None:
        raise UserError("log: the log names the model's parameters: pass the model (or model=...)")
    there = os.path.exists(path)
    if not resume and there:
        raise UserError(f"{path}: the log exists: resume it (resume=True) or choose another name")
    folder = os.path.dirname(path)
    if not os.path.isdir(folder or "."):
        raise UserError(f"{path}: there is no folder {folder}: make it first")
    have = {id(p) for p in model.parameters()}
    for name, tensor in named:
        if id(tensor) not in have:
            raise UserError(
                f"log: parameter {name}, of shape {tuple(tensor.shape)}, is none of the model's, by whose names a log is replayed: "
                "make it one (register_parameter), or leave the log out"
            )
    header = {**header, "base": fingerprint(model)}
    if not there:
        return header, None
    log = read_log(path)
    check_base(model, log, header["base"])
    check_header(log, header)
    return header, log


def check_header(log: Log, header: dict[str, Any]) -> None:
    """Refuse to go on with a log under another header than its own.

    Raises:
        UserError: naming what differs, and both values.
    """
    for key, value in header.items():
        if key not in log.header:
            raise UserError(
                f"{log.path}: cannot be resumed: the log does not say its {key}, which is {short(value)} now: use the version "
                "that wrote it"
            )
        if log.header[key] != value:
            raise UserError(
                f"{log.path}: cannot be resumed: {key} is {short(log.header[key])} in the log and {short(value)} now"
            )


def short(value: Any) -> str:
    """A value as Python writes it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def said_of_settings(
    *,
    seed: int,
    family: str,
    eps: Sequence[float],
    rule: Chain,
    rule_state: int,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """What a log's header says that does not depend on the model."""
    return {
        "noise": noise.NOISE_VERSION,
        "seed": seed,
        "family": family,
        "groups": [float(e) for e in eps],
        "rule": rule.spec,
        "rule_state": rule_state,
        "momentum": [last.beta, last.window] if (last := rule.momentum) else [0.0, 1],
        "settings": settings,
    }


def header_for(
    named: Sequence[tuple[str, Tensor]],
    groups: Sequence[int],
    *,
    seed: int,
    family: str,
    eps: Sequence[float],
    rule: Chain,
    rule_state: int,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """All that a replay needs to know, and what resuming compares; but for the base (`begin`)."""
    said = said_of_settings(
        seed=seed, family=family, eps=eps, rule=rule, rule_state=rule_state, settings=settings
    )
    return {
        "noise": noise.NOISE_VERSION,
        "base": "",
        **said,
        "tensors": [
            [name, list(tensor.shape), str(stored_dtype(tensor)), group]
            for (name, tensor), group in zip(named, groups, strict=True)
        ],
    }


def check_base(model: nn.Module, log: Log, base: str | None = None) -> list[tuple[str, Tensor]]:
    """The log's tensors in the model, in the log's order; `base` is the model's fingerprint, where that is known.

    Raises:
        UserError: the model is not the log's base: noise version, a name, shape or dtype, or the values differ.
    """
    header = log.header
    if header["noise"] != noise.NOISE_VERSION:
        raise UserError(
            f"{log.path}: made with noise version {header['noise']}, this is version {noise.NOISE_VERSION}: use the version that wrote it"
        )
    if header["family"] not in FAMILIES:
        raise UserError(
            f"{log.path}: directions are {header['family']!r}, this version knows {', '.join(FAMILIES)}: use the version that wrote it"
        )
    found = _tensors_of(model, log)
    base = fingerprint(model) if base is None else base
    if base != header["base"]:
        raise UserError(
            f"{log.path}: made from a base model with fingerprint {header['base'][:16]}..., this model has {base[:16]}...: "
            "the values differ: load the very base the run started from"
        )
    return found


def _tensors_of(model: nn.Module, log: Log, dtypes: bool = True) -> list[tuple[str, Tensor]]:
    """The log's tensors in the model: of the same names, shapes and, if asked for, types; else UserError."""
    have = dict(model.named_parameters(remove_duplicate=False))
    found: list[tuple[str, Tensor]] = []
    for name, shape, dtype, _ in log.header["tensors"]:
        if name not in have:
            raise UserError(
                f"{log.path}: tunes parameter {name}, which this model does not have: another model or layout"
            )
        for what, theirs, ours in (
            ("shape", shape, list(have[name].shape)),
            ("dtype", dtype, str(stored_dtype(have[name]))),
        )[: 2 if dtypes else 1]:
            if theirs != ours:
                raise UserError(
                    f"{log.path}: parameter {name} has {what} {theirs} in the log and {ours} in this model: another base model"
                )
        found.append((name, have[name]))
    return found


def same_records(model: nn.Module, path: str | os.PathLike[str]) -> int:
    """Take the steps of a log from another base than its own: another format of the same weights, say.

    What comes of it is not the log's model. The model is changed in place.

    Returns:
        How many steps were applied.

    Raises:
        UserError: the log is damaged, or tunes a parameter that the model has not, or has in another shape; or its steps
            go beyond the largest number of the format here.
    """
    log = read_log(path)
    tensors = _tensors_of(model, log, dtypes=False)
    compute_model_wide(model)
    weights, course = _of_log(tensors, log, model)
    count = apply_steps(weights, course, log.steps)
    weights.check_held(wait=True)
    return count


def replay(model: nn.Module, path: str | os.PathLike[str], steps: int | None = None) -> int:
    """Rebuild the tuned model: base + log, bit for bit, in one pass over the weights.

    Args:
        model: the base model; changed in place.
        path: the log.
        steps: how many steps (default all).

    Returns:
        How many steps were applied.

    Raises:
        UserError: the log is damaged, the model is not its base (naming what differs), or it has fewer steps.
    """
    log = read_log(path)
    check_steps(log, steps)
    return apply_steps(*at_base(model, log), log.steps[:steps])


def check_steps(log: Log, steps: int | None) -> None:
    """Raise UserError where a log has not so many steps."""
    if steps is not None and not 0 <= steps <= len(log.steps):
        raise UserError(f"{log.path}: has {len(log.steps)} whole steps; {steps} were asked for")


def at_base(model: nn.Module, log: Log) -> tuple[Weights, Course | Moments]:
    """What a log moves, before its first step: the model's weights on their grids, and what turns steps into moves.

    Raises:
        UserError: as `check_base`.
    """
    tensors = check_base(model, log)
    compute_model_wide(model)  # as it was for the run
    return _of_log(tensors, log, model)


def _of_log(
    tensors: Sequence[tuple[str, Tensor]], log: Log, model: nn.Module
) -> tuple[Weights, Course | Moments]:
    header = log.header
    groups = [group for *_, group in header["tensors"]]
    family = FAMILIES[header["family"]]
    weights = weights_of(tensors, groups, family, header["groups"], model)
    if weights.sharded:
        check_sharded("weight", parse(header["rule"]).moments is not None, ())
    if weights.compiled:
        compile_kernels(family, header["rule"], *weights.dtypes)
    return weights, course_of(header["seed"], header["rule"])


def apply_steps(weights: Weights, course: Course | Moments, steps: Sequence[Step]) -> int:
    """Apply steps in bounded batches, each one pass over the weights."""
    for start in range(0, len(steps), 1024):
        course.apply(weights, steps[start : start + 1024])
    return len(steps)
