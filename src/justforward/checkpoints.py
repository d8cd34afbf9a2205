"""The files of a checkpoint, by their headers alone: which of them is damaged, and what its numbers are stored as."""

from __future__ import annotations

import contextlib
import json
import math
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from justforward.errors import UserError

# Numbers that mean nothing without a scale, which is said elsewhere (quantization_config).
_SCALED = ("I8", "F8_", "F6_", "F4")  # safetensors' names


def files_of(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's weights, by its index where it has one that can be read."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [file for file in [folder / "model.safetensors"] if file.is_file()]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return []
    return [folder / name for name in sorted(map(str, names)) if (folder / name).is_file()]


def header_of(file: Path) -> dict[str, Any]:
    """What a safetensors file says it holds.

    Raises:
        ValueError: it is empty, cut short, or none.
    """
    size = file.stat().st_size
    if size == 0:
        raise ValueError(f"{file.name} is empty")
    with file.open("rb") as opened:
        start = opened.read(8).ljust(8, b"\0")
        length = struct.unpack("<Q", start)[0]
        raw = opened.read(length) if 8 + length <= size else b""
    try:
        header: dict[str, Any] = json.loads(raw)
        header.pop("__metadata__", None)
        whole = 8 + length + max((x["data_offsets"][1] for x in header.values()), default=0)
    except (ValueError, AttributeError, KeyError, TypeError, IndexError):
        raise ValueError(f"{file.name} is damaged: its header cannot be read") from None
    if whole > size:
        raise ValueError(f"{file.name} is cut short: it has {size} bytes of {whole}")
    return header


@contextlib.contextmanager
def damage_named(folder: Path | None) -> Iterator[None]:
    """Where a checkpoint cannot be read, say which of its files is damaged, the first if several are.

    Args:
        folder: None where it is none here.

    Raises:
        ValueError: naming the file; else what was raised.
    """
    try:
        yield
    except Exception:
        for file in files_of(folder) if folder is not None else ():
            header_of(file)
        raise


def check_stored(folder: Path, left_out: Iterable[str]) -> None:
    """Refuse weights in 8 bits or fewer, which transformers takes for plain numbers.

    Args:
        folder: of a checkpoint that was read, whose config says nothing of quantisation.
        left_out: tensors that the model has no place for.

    Raises:
        UserError: naming the first.
    """
    ignored = set(left_out)
    for file in files_of(folder):
        for name, entry in header_of(file).items():
            kind = str(entry["dtype"])
            if kind.startswith(_SCALED) and name not in ignored:
                raise UserError(
                    f"{file}: {name} is stored as {kind}, and config.json has no quantization_config that says what it stands for: "
                    "give the checkpoint of plain weights"
                )


def check_range(model: Any, name: str, dtype: str) -> None:
    """Refuse weights that float16 has no numbers for; bfloat16 has float32's range.

    Raises:
        UserError: naming the parameter.
    """
    if dtype != "float16":
        return
    for place, p in model.named_parameters():
        largest = float(torch.linalg.vector_norm(p.detach(), math.inf)) if p.numel() else 0.0
        if math.isnan(largest):
            raise UserError(
                f"{name}: {place} has a NaN: the checkpoint is damaged: give another one"
            )
        if math.isinf(largest):
            raise UserError(
                f"{name}: {place} has numbers beyond 65504, the largest of float16: use --dtype bfloat16"
            )
