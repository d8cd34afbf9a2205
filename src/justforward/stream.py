"""The residual stream of a model: who writes to it, who reads it, what its last layer hands to the head.

Found by running the model, not by its name: in a layer those linear maps write whose outputs add up to the difference
between what leaves the layer and what enters it. That holds where layers normalise what they read (GPT-2, OPT, Llama and
kin) and not where they normalise what they write (BERT); experts that are chosen by the token are no linear maps, either.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from justforward.models import inner_model
from justforward.noise.plain import add_rounded
from justforward.stored import HALVES, plain
from justforward.trunk import first_above, stack_of

MOST_MAPS = 8  # of a layer, as wide as the stream: their subsets are tried


@dataclass(frozen=True)
class Stream:
    """The upper layers of a model, as writers and readers of the residual stream.

    Attributes:
        layers: they themselves, in order.
        writers: the linear maps that write to the stream, by their names in the model.
        readers: for each layer, the linear maps that read it and their elementwise scale before that, [hidden].
    """

    layers: list[nn.Module]
    writers: dict[str, nn.Module]
    readers: list[tuple[list[nn.Module], Tensor]]


def matrix_of(linear: Any) -> Tensor:
    """[out, in] of a linear map; a view, of GPT-2's transposed ones too."""
    weight: Tensor = linear.weight.detach()
    return weight.T if _is_transposed(linear) else weight


def dense_of(linear: Any) -> Tensor:
    """[out, in] float32 on the CPU, of a map whose matrix is kept in any way: of one that is not plain, what it makes of unit vectors."""
    if type(linear.weight) is nn.Parameter and linear.weight.is_floating_point():
        return matrix_of(linear).float().cpu()
    units = torch.eye(_inputs(linear), device=linear.weight.device)
    columns: Tensor = linear(units) - linear(torch.zeros_like(units[:1]))  # without the bias
    return columns.T.float().cpu()


def _is_transposed(linear: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(linear, Conv1D)


@torch.no_grad()
def find_stream(model: nn.Module, ids: Tensor, share: float) -> Stream | None:
    """The last layers of a model, this share of all; None if they do not write by linear maps alone.

    Args:
        model: a language model in eval mode.
        ids: [1, L] tokens of any text.
        share: in (0, 1].
    """
    inner: Any = inner_model(model)
    stack = stack_of(inner)
    if stack is None:
        return None
    layers = list(stack)[first_above(stack, share) :]
    maps = [
        [m for name, m in layer.named_modules() if _is_linear(m) and ".lora_" not in name]
        for layer in layers
    ]
    enters: dict[int, Tensor] = {}
    leaves: dict[int, Tensor] = {}
    with ExitStack() as hooks:
        for layer, linear in zip(layers, maps, strict=True):
            hooks.enter_context(_ends(layer, enters, leaves))
            for module in linear:
                hooks.enter_context(_ends(module, None, leaves))
        inner(input_ids=ids)
    names = {id(module): name for name, module in model.named_modules()}
    writers: dict[str, nn.Module] = {}
    readers: list[tuple[list[nn.Module], Tensor]] = []
    for layer, linear in zip(layers, maps, strict=True):
        entered = enters[id(layer)]
        width = entered.shape[-1]
        own = [m for m in linear if id(m) in leaves and leaves[id(m)].shape[-1] == width]
        found = _adding_up(own, leaves, leaves[id(layer)] - entered)
        if found is None:
            return None
        writers |= {names[id(module)]: module for module in found}
        others = [m for m in linear if m not in found and _inputs(m) == width]
        readers.append((others, _scale_before(layer, width)))
    return Stream(layers, writers, readers)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_transposed(module)


def _inputs(linear: Any) -> int:
    """How many a linear map has, however its matrix is kept."""
    return int(linear.nx if _is_transposed(linear) else linear.in_features)


@contextmanager
def _ends(
    module: nn.Module, enters: dict[int, Tensor] | None, leaves: dict[int, Tensor]
) -> Iterator[None]:
    """While inside, what last entered and left a module is put there."""

    def ran(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if enters is not None:
            enters[id(module)] = args[0] if args else kwargs["hidden_states"]
        leaves[id(module)] = output[0] if isinstance(output, tuple) else output

    handle = module.register_forward_hook(ran, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _adding_up(
    maps: Sequence[nn.Module], leaves: Mapping[int, Tensor], wanted: Tensor
) -> list[nn.Module] | None:
    """The fewest of some maps whose outputs add up to what is wanted."""
    if len(maps) > MOST_MAPS:
        return None
    for count in range(1, len(maps) + 1):
        for some in itertools.combinations(maps, count):
            total = torch.stack([leaves[id(m)].reshape(wanted.shape) for m in some]).sum(0)
            if (total - wanted).abs().max() <= 1e-3 * wanted.abs().max():
                return list(some)
    return None


def _scale_before(layer: nn.Module, width: int) -> Tensor:
    """[hidden]: the layer's norms multiply each place of the stream by about so much, before it is read."""
    found = [
        parameter.detach().float().square()
        for module in layer.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if name == "weight" and parameter.shape == (width,)
    ]
    return torch.stack(found).mean(0).sqrt() if found else torch.ones(width)


# ------------------------------------------------------------------------------------ behind the stack


@dataclass(frozen=True)
class Norm:
    """What stands between the last layer's output x and the head's input: scale * (x - mean) / size + shift.

    Attributes:
        scale: [hidden].
        shift: [hidden].
        centred: whether the mean of x is taken off (LayerNorm) or not (RMSNorm).
    """

    scale: Tensor
    shift: Tensor
    centred: bool

    def of(self, x: Tensor) -> Tensor:
        """[N, hidden]: what the head is given where x [N, hidden] leaves the last layer."""
        away = x - x.mean(dim=-1, keepdim=True) if self.centred else x
        return away / self.sizes(x) * self.scale + self.shift

    def to(self, device: torch.device) -> Norm:
        """The same there."""
        return Norm(self.scale.to(device), self.shift.to(device), self.centred)

    def sizes(self, x: Tensor) -> Tensor:
        """[N, 1]: what x [N, hidden] is divided by."""
        return _sizes(x, self.centred)


def _sizes(x: Tensor, centred: bool) -> Tensor:
    away = x - x.mean(dim=-1, keepdim=True) if centred else x
    return away.square().mean(dim=-1, keepdim=True).sqrt()


def find_norm(x: Tensor, seen: Tensor) -> Norm | None:
    """The norm that makes of x [N, hidden] what the head has seen [N, hidden]; None if it is another function."""
    x, seen = x.double(), seen.double()
    if x.shape != seen.shape or len(x) < 3:
        return None
    for centred in (False, True):
        away = x - x.mean(dim=-1, keepdim=True) if centred else x
        n = away / _sizes(x, centred)
        apart, rise = n - n.mean(0), seen - seen.mean(0)
        scale = (apart * rise).sum(0) / apart.square().sum(0).clamp_min(1e-12)
        shift = seen.mean(0) - scale * n.mean(0)
        if (n * scale + shift - seen).abs().max() <= 1e-3 * seen.abs().max():
            return Norm(scale.float(), shift.float(), centred)
    return None


# ---------------------------------------------------------------------------------------- new writers


@contextmanager
def writing_too(
    writers: Mapping[str, nn.Module], to: Tensor, what: Mapping[str, Tensor]
) -> Iterator[None]:
    """While inside, each writer of input m adds to (what m) to its output, as if `write` had moved its weights.

    Args:
        writers: by name.
        to: [hidden, J].
        what: for each writer [J, in].
    """

    def adds(v: Tensor) -> Any:
        def added(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            said: Tensor = (args[0] @ v.T.to(args[0])) @ to.T.to(args[0])
            return output + said

        return added

    handles = [writers[name].register_forward_hook(adds(v)) for name, v in what.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def write(linear: nn.Module, to: Tensor, what: Tensor) -> None:
    """Add to what, [hidden, J] times [J, in], to a linear map: products and sums one by one, the same bits everywhere.

    Into 16 bits the whole sum is rounded once, and stochastically: most of it is smaller than their last place.
    """
    weight = matrix_of(linear)
    if weight.dtype not in HALVES:
        for u, v in zip(to.T, what, strict=True):
            weight.add_(u[:, None] * v[None, :])
        return
    total = torch.zeros(weight.shape, device=weight.device)
    for u, v in zip(to.T, what, strict=True):
        total.add_(u[:, None] * v[None, :])
    stored: Any = linear.weight
    add_rounded(plain(stored).view(-1), (total.T if _is_transposed(linear) else total).reshape(-1))
