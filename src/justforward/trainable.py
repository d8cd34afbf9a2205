"""Which tensors can be moved exactly in place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from justforward.errors import UserError
from justforward.stored import HALVES, Stored, is_half, packed_in, plain, stored_dtype

NOT_THERE = (
    "load it first; where accelerate keeps it elsewhere (cpu_offload, disk_offload, device_map), keep it in memory, or in a "
    "file by --offload FOLDER (justforward.ondisk.keep_on_disk)"
)


def check_trainable(name: str, tensor: Tensor) -> tuple[torch.dtype, torch.device]:
    """Raise UserError where a tensor cannot be moved exactly in place; else what it is stored as, and where."""
    advice = "freeze it (requires_grad_(False))"
    if tensor.is_meta:
        raise UserError(f"parameter {name} is on the meta device and has no values: {NOT_THERE}")
    packed = packed_in(tensor)
    if packed is not None:
        raise UserError(
            f"parameter {name} is kept as {packed.form}, which has no room for a step: {advice}"
        )
    if tensor.dtype not in (torch.float32, *HALVES):
        raise UserError(
            f"parameter {name} is {tensor.dtype}: only float32, bfloat16 and float16 can be tuned; "
            f"convert the model (model.float()) or {advice}"
        )
    if is_half(tensor) and type(tensor) not in (nn.Parameter, Stored):
        raise UserError(
            f"parameter {name} is {stored_dtype(tensor)} and no nn.Parameter: looks at 16-bit weights are taken where a module "
            f"uses them: make it one or {advice}"
        )
    if tensor.layout != torch.strided or not tensor.is_contiguous():
        raise UserError(
            f"parameter {name} is not contiguous (shape {tuple(tensor.shape)}, strides "
            f"{tensor.stride() if tensor.layout == torch.strided else tensor.layout}): "
            f"replace it by its .contiguous() copy or {advice}"
        )
    return stored_dtype(tensor), tensor.device


def formats_of(tensors: Sequence[Tensor]) -> list[tuple[torch.dtype, torch.device]]:
    """What each tensor is stored as, and where."""
    return [(stored_dtype(tensor), tensor.device) for tensor in tensors]


def check_formats(
    names: Sequence[str],
    tensors: Sequence[Tensor],
    formats: Sequence[tuple[torch.dtype, torch.device]],
) -> None:
    """Raise UserError where a tensor is not as it was found: kernels and grids are made for what it was."""
    now = formats_of(tensors)
    if now == formats:
        return
    for name, there, here in zip(names, formats, now, strict=True):
        if there != here:
            raise UserError(
                f"parameter {name} was {there[0]} on {there[1]} when the optimizer was made and is {here[0]} on {here[1]} now: "
                "convert or move the model first, and make the optimizer after that"
            )


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise UserError where a number is NaN or infinite."""
    if tensor.numel() and not math.isfinite(torch.linalg.vector_norm(plain(tensor), math.inf)):
        flat = plain(tensor).reshape(-1)
        bad = int((~flat.isfinite()).nonzero()[0])
        raise UserError(
            f"parameter {name} is {flat[bad].item()} at element {bad}: "
            "all weights must be finite before tuning"
        )


def check_apart(names: Sequence[str], tensors: Sequence[Tensor]) -> None:
    """Raise UserError where two tensors share memory but are not one parameter."""
    spans = sorted(
        (t.data_ptr(), t.data_ptr() + t.element_size() * t.numel(), name)
        for name, t in zip(names, tensors, strict=True)
        if t.numel()
    )
    for (_, end, first), (start, _, second) in pairwise(spans):
        if start < end:
            raise UserError(
                f"parameters {first} and {second} share memory but are not one parameter: "
                "tie them (the same nn.Parameter in both places) or freeze one"
            )
