"""Where LoRA starts: A drawn from the seed and B = 0; or, over the first ranks, what was fitted to training rows (`added`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from justforward import noise
from justforward.errors import UserError


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """The layers of peft that add a LoRA to a linear map, by name, in order."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


@torch.no_grad()
def draw(model: nn.Module, seed: int) -> None:
    """Start all of them: A normal with the variance that LoRA is usually started with, 1 / (3 inputs); B = 0."""
    for stream, layer in enumerate(lora_layers(model).values()):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        z = noise.normal(seed, stream, 0, a.numel()).view(a.shape)
        a.copy_(z.mul_(1.0 / math.sqrt(3.0 * a.shape[1])))
        b.zero_()


def ranks_of(layer: Any, what: Tensor, to: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of A [J, inputs] and columns of B [outputs, J] with which a map writes to (what x) in addition.

    Their product is given, how it is shared is not: what A makes of x is as large as what a drawn A makes of it, so that
    steps and looks along B move what is written as far as in ranks that are drawn. Rows that were merely as long as drawn ones
    would leave B far too large: x mostly lies where a fitted row is small, and there steps in A would be heard through B.

    Args:
        layer: peft's.
        what: [J, inputs].
        to: [outputs, J].
        x: [N, inputs], what enters the map.
    """
    drawn = x.square().sum(dim=1).mean().sqrt() / math.sqrt(3.0 * x.shape[1])
    size = (drawn / (x @ what.T).square().mean(dim=0).sqrt().clamp_min(1e-12))[:, None]
    return (what * size).contiguous(), (to / size.T / float(layer.scaling["default"])).contiguous()


@torch.no_grad()
def put(model: nn.Module, tensors: Mapping[str, Tensor], path: Path | None = None) -> None:
    """Make the first ranks of some LoRAs what was fitted.

    Args:
        model: as `tuners.attach` gives it, at its start.
        tensors: for a map of that name "a." [J, inputs], rows of A, and "b." [outputs, J], columns of B; none: nothing is put.
        path: the file that they are from.

    Raises:
        UserError: they are not of this model.
    """
    layers = lora_layers(model)
    names = {name.partition(".")[2] for name in tensors}
    nothing = torch.empty(0, 0)
    for name in names:
        a, b = tensors.get(f"a.{name}", nothing), tensors.get(f"b.{name}", nothing)
        whole = _pair(layers[name]) if name in layers else (nothing, nothing)
        ranks = a.shape[:1]
        shapes = (ranks + whole[0].shape[1:], whole[1].shape[:1] + ranks)
        good = (a.shape, b.shape) == shapes and 0 < len(a) <= len(whole[0])
        if not good or {a.dtype, b.dtype} != {torch.float32}:
            raise UserError(
                f"{path}: {name} has no LoRA for {list(a.shape)} and {list(b.shape)} in the run's model: another run's file"
            )
    for name in names:
        a, b = tensors[f"a.{name}"], tensors[f"b.{name}"]
        whole = _pair(layers[name])
        whole[0][: len(a)] = a
        whole[1][:, : len(a)] = b


def _pair(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight
