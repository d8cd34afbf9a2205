"""Bytes alive, operations and traffic of a computation on the meta device: nothing is computed, every shape is known.

A `TorchDispatchMode` sees each operation that torch would run, forward, backward and optimizer alike, and follows the
storages of its results from their making to their end. So this knows of no architecture. What it cannot see:

- what an operation needs within itself (workspaces of matrix products), and how an allocator rounds and scatters;
- values. Where a model asks for one, the answer is "no" or 0: whether all of a mask are ones, for one, so masks are made
  as for rows of different length.

Attention is a fused kernel, as torch chooses on CPUs and GPUs: scores [rows, heads, queries, keys] are never whole. Experts of a
mixture are multiplied by one grouped kernel, which makes nothing but its result; every expert is taken to be asked by some token.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

if TYPE_CHECKING:
    from numpy.typing import NDArray

ENDED = -1
# An operation that has not moved so many bytes does not count: views, shapes, scalars.
_SMALL = 1 << 10


Event = tuple[int, int]


@dataclass
class Trace:
    """What `traced` has seen.

    Attributes:
        events: each storage as it was made, (its number, bytes), and as it ended, (its number, ENDED).
        work: for each operation that does something, its floating-point operations and the bytes it reads and writes.
    """

    events: list[Event] = field(default_factory=list)
    work: list[tuple[int, int]] = field(default_factory=list)

    @property
    def left(self) -> list[int]:
        """Numbers of the storages that have not ended."""
        ended = {number for number, size in self.events if size == ENDED}
        return [number for number, size in self.events if size != ENDED and number not in ended]

    def alive(self) -> NDArray[np.int64]:
        """Bytes alive after each event, without what was there before."""
        sizes = {number: size for number, size in self.events if size != ENDED}
        signed = [-sizes[number] if size == ENDED else size for number, size in self.events]
        return np.cumsum(np.array([0, *signed], np.int64))

    @property
    def peak(self) -> int:
        """The most bytes alive at a time."""
        return int(self.alive().max())

    @property
    def flops(self) -> int:
        """Floating-point operations of all matrix products, a multiplication and an addition being two."""
        return sum(flops for flops, _ in self.work)

    def seconds(self, flops: float, bandwidth: float) -> float:
        """Time at so many operations and bytes a second: each operation takes the longer of its two."""
        return sum(max(f / flops, moved / bandwidth) for f, moved in self.work)


@contextmanager
def traced() -> Iterator[Trace]:
    """While inside, follow what is computed on the meta device."""
    trace = Trace()
    follow = _Follow(trace)
    with follow, _fused():
        yield trace
    follow.over = True


class _Follow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, trace: Trace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace, self.over = trace, False
        # of the storages made since, by their address: number and size
        self.sizes: dict[int, tuple[int, int]] = {}
        self.made = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return False if args[0].dtype == torch.bool else 0
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        result: Any
        of_experts = func._overloadpacket is _GROUPED and args[0].is_meta
        if of_experts:
            result, flops = _grouped(*args[:3])
        elif func is torch.ops.aten._unique2.default and args[0].is_meta:
            # as if no token came twice: the rows of a packed table that are unpacked
            result, flops = _all_different(args[0]), 0
        else:
            result, flops = func(*args, **(kwargs or {})), 0
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        held = {x.untyped_storage()._cdata for x in given}
        fresh = 0
        for x in made:
            storage = x.untyped_storage()
            key = storage._cdata
            if key not in held and key not in self.sizes and x.is_meta:
                size = storage.nbytes()
                self.sizes[key] = (self.made, size)
                self.trace.events.append((self.made, size))
                self.made += 1
                fresh += size
                weakref.finalize(storage, self._gone, key)
        in_place = func._schema.is_mutable
        if fresh or in_place:
            moved = sum(_bytes(x) for x in given) + (_bytes(given[0]) if in_place else fresh)
            counted = flop_registry.get(func._overloadpacket)
            if counted is not None and not of_experts:
                flops = counted(*args, **(kwargs or {}), out_val=result)
            if moved > _SMALL:
                self.trace.work.append((int(flops), moved))
        return result

    def _gone(self, key: int) -> None:
        number, _ = self.sizes.pop(key)
        if not self.over:
            self.trace.events.append((number, ENDED))


# The product of a mixture's experts, which torch knows on the meta device for bfloat16 alone; older versions have none.
_GROUPED: Any = getattr(torch.ops.aten, "_grouped_mm", None)


def _grouped(a: Tensor, b: Tensor, offsets: Tensor) -> tuple[Tensor, int]:
    """Its result and its operations: rows [S, K] in groups by a matrix a group [G, K, N]; the gradients of both are such, too."""
    if a.dim() == b.dim() == 2:  # groups of columns by groups of rows: a matrix a group
        shape = (offsets.numel(), a.shape[0], b.shape[1])
    else:
        shape = (*a.shape[:-1], b.shape[-1]) if a.dim() == 2 else (a.shape[1], b.shape[1])
    # of each element of what is in groups, one product with a row or a column of the other's
    single, other = (a, b.shape[-1]) if a.dim() == 2 else (b, a.shape[1])
    return a.new_empty(shape), 2 * single.numel() * other


def _all_different(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `torch.unique` makes if no value comes twice: values, places, and no counts."""
    return x.new_empty(x.numel()), torch.empty_like(x), x.new_empty(0)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


@contextmanager
def _fused() -> Iterator[None]:
    """Attention by the kernel that torch takes on a CPU; on the meta device it would take its separate steps.

    By name, because a `TorchFunctionMode` is not in force where a backward pass runs layers again.
    """
    functional: Any = torch.nn.functional
    own = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = _attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = own


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    heads, groups = query.shape[-3], key.shape[-3]
    if heads % groups or not (
        enable_gqa or groups in (1, heads)
    ):  # which the kernel does not ask here
        raise RuntimeError(f"{heads} heads of queries and {groups} of keys do not go together")
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(groups, -3) for x in (key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(
            ~attn_mask, -torch.inf
        )
    if (
        attn_mask is not None and attn_mask.requires_grad
    ):  # the kernel gives it no gradient: T5's positions
        scores = query @ key.transpose(-2, -1) + attn_mask
        return scores.softmax(-1) @ value
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return out
