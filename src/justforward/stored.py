"""Weights that are stored otherwise than they are computed with: in 16 bits, in a file, or packed in a form of their own.

Matrix products of 16-bit numbers are slow on most CPUs, and too coarse to see what a look changes. So a parameter of this
class hands the operations that it is passed to (`__torch_function__`) its values as float32, made where they are needed: one
matrix at a time, large ones (an embedding, a head) a slice of rows at a time, in one buffer a thread that is used again. It
tells a model that it is float32, so that what flows through the model is; `plain` gives what is stored.

It may also be kept in a file (`ondisk`): then what it is computed with is read when it is needed, and a step waits until that is
read anyway; `plain` and all other uses see it done.

A matrix may also be packed: frozen, kept by someone else (`Packed`; the blocks of a .gguf, say) and unpacked where it is used.

A look along a dense direction (weight space) is taken here too: the direction is added to the values that are handed out,
and what is stored is only read. So looks leave every bit where it was whatever the format, and lose nothing to rounding.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from justforward.errors import UserError
from justforward.lent import lend, written

FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HALVES = (torch.bfloat16, torch.float16)
# Matrices of more elements are widened a slice of rows at a time.
SLICE = 1 << 20

_plain = torch._C.DisableTorchFunctionSubclass


class Away(Protocol):
    """A look under way: what a parameter's values are while it lasts."""

    def values(self, first: int, last: int, out: Tensor) -> None:
        """Fill `out` [last - first], float32 or of the type it is stored in, with elements first .. last."""

    def rows(self, which: Tensor, out: Tensor) -> None:
        """Fill `out` [R, columns] with rows `which` (int64 [R]) of a matrix."""


class Packed(Protocol):
    """A matrix in a form of its own: what it holds, and its numbers where they are wanted.

    Attributes:
        form: its name, for messages.
        transposed: the rows that it has are the columns of the parameter.
        nbytes: what it takes.
    """

    form: str
    transposed: bool
    nbytes: int

    def unpack(self, rows: Tensor, out: Tensor) -> None:
        """Fill `out`, float32 [n, columns], with the rows of these numbers, int64 [n]."""

    def parts(self) -> Iterable[Any]:
        """All that its numbers follow from, as bytes, for a fingerprint."""


class Stored(nn.Parameter):
    """A parameter stored in 16 bits, in a file or packed. Set up by `compute_wide`, `ondisk` and `pack`, never constructed."""

    _jf_away: Away | None
    _jf_dtype: torch.dtype  # what it computes in
    _jf_due: Callable[[], None] | None  # what is still to be done to what is stored
    _jf_used: Callable[[], None] | None  # told of each use in a forward
    _jf_packed: Packed | None  # what holds its numbers in its place

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A parameter of its own, stored and computed with alike."""
        packed = self._jf_packed
        if packed is not None:
            return memo.setdefault(id(self), pack(packed, self.shape, self.device.type))
        if id(self) not in memo:
            with _plain():
                copied = nn.Parameter(plain(self).clone(), self.requires_grad)
            make_stored(copied, self._jf_dtype)
            memo[id(self)] = copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as what is stored."""
        refuse_packed(self, "be pickled")
        with _plain():
            stored: Any = nn.Parameter(plain(self), self.requires_grad)
            return stored.__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        with _plain():
            operation = _OPERATIONS.get(func)
            if operation is not None:
                return operation(*args, **kwargs)
            if name == "__get__":
                attribute = getattr(func.__self__, "__name__", "")
                if attribute == "dtype":
                    return args[0]._jf_dtype
                if attribute == "data":
                    refuse_packed(args[0], "be had by .data")
                    settle(args[0])
                if attribute not in _OF_VALUES:
                    return func(*args, **kwargs)
            elif name in ("__set__", "__delete__") or func in _AS_STORED:
                if func is Tensor.detach:
                    packed = packed_in(args[0])
                    if packed is not None:
                        return pack(packed, args[0].shape, args[0].device.type)
                    settle(args[0])
                return func(*args, **kwargs)
            if func is Tensor.copy_ and isinstance(args[0], Stored):  # load_state_dict's
                refuse_packed(args[0], "be written by copy_")
                settle(args[0])
                return func(args[0], *_wide(args[1:]), **_wide(kwargs))
            target = written(args, kwargs, name, Stored)
            if target is not None:
                refuse_packed(target, f"be written by {name}")
                raise UserError(
                    f"a parameter of {tuple(target.shape)} stored as {target.dtype} is written by {name}, which would "
                    "change a copy of it: write to its .data"
                )
            given = _wide(args)
            made = [
                new for new, old in zip(given[:1], args, strict=False) if isinstance(old, Stored)
            ]
            return lend(func(*given, **_wide(kwargs)), made)


# Attributes that are not the same of what is stored.
_OF_VALUES = {"T", "mT", "H", "mH", "real", "imag"}
_AS_STORED = {Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.is_floating_point, Tensor.is_contiguous,
              Tensor.stride, Tensor.is_complex, Tensor.__len__, Tensor.__hash__, Tensor.data_ptr, Tensor.detach, Tensor.element_size,
              Tensor.requires_grad_, Tensor.untyped_storage, Tensor.get_device, Tensor.storage_offset, Tensor.ndimension,
              Tensor.__format__, Tensor.register_hook, Tensor.is_shared, Tensor.share_memory_,
              torch.is_floating_point, torch.numel, torch.is_complex}  # fmt: skip


def _wide(given: Any) -> Any:
    if isinstance(given, Stored):
        return values(given)
    if isinstance(given, (tuple, list)):
        return type(given)(_wide(item) for item in given)
    if isinstance(given, dict):
        return {key: _wide(item) for key, item in given.items()}
    return given


# --------------------------------------------------------------------------------------- whole models


def compute_wide(tensors: Sequence[nn.Parameter]) -> None:
    """Let the 16-bit ones among some parameters compute in float32 on the CPU; elsewhere in their own type.

    They stay the same objects, so what is tied stays tied.
    """
    for p in tensors:
        if type(p) is nn.Parameter and p.dtype in HALVES:
            make_stored(p)


def make_stored(p: nn.Parameter, dtype: torch.dtype | None = None) -> None:
    """Let a parameter hand out its values where they are used, in a type: default, of 16 bits on a CPU float32, else its own."""
    cpu: Any = p.device.type == "cpu"
    set_up: Any = p
    set_up._jf_dtype = dtype or (torch.float32 if cpu and p.dtype in HALVES else p.dtype)
    set_up._jf_away = set_up._jf_due = set_up._jf_used = set_up._jf_packed = None
    p.__class__ = Stored


def pack(packed: Packed, shape: Sequence[int], device: str = "cpu") -> nn.Parameter:
    """A frozen parameter whose numbers are packed: float32 for the model, and no memory but that of `packed`.

    Args:
        packed: what holds its numbers.
        shape: of the parameter, [rows, columns].
        device: where it is computed with; meta: nowhere, to find out what that would take.
    """
    # whatever would go round what is below meets no numbers
    numbers = torch.full((), torch.nan, device=device).expand(*shape)
    p = nn.Parameter(numbers, requires_grad=False)
    make_stored(p)
    p._jf_packed = packed  # type: ignore[attr-defined]
    return p


def packed_in(tensor: Any) -> Packed | None:
    """What holds a tensor's numbers in its place; None where it holds them itself."""
    found: Packed | None = getattr(tensor, "__dict__", {}).get("_jf_packed")
    return found


def refuse_packed(tensor: Any, what: str) -> None:
    """Raise UserError where a tensor is packed, and so cannot be done this to."""
    packed = packed_in(tensor)
    if packed is not None:
        raise UserError(
            f"a parameter of {tuple(tensor.shape)} is kept as {packed.form}, frozen, and cannot {what}: load the model "
            "without --quantize (quantize=None)"
        )


def settle(p: Tensor) -> None:
    """Do what is still to be done to what is stored."""
    due: Callable[[], None] | None = p.__dict__.get("_jf_due")
    if due is not None:
        due()


def in_shards(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor: of what it says it is this process may have a part."""
    return hasattr(tensor, "device_mesh")


def compute_model_wide(model: nn.Module) -> None:
    """`compute_wide` of all parameters; 16-bit buffers, which are small, become float32 where these compute so.

    A model in shards computes with what it has.
    """
    if any(map(in_shards, model.parameters())):
        return
    compute_wide(list(model.parameters()))
    if any(type(p) is Stored and p.dtype == torch.float32 for p in model.parameters()):
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.dtype in HALVES:
                    setattr(module, name, buffer.float())
            if callable(getattr(type(module), "save_pretrained", None)):
                # transformers and peft write down a type that they ask the parameters for
                module.save_pretrained = MethodType(_save_as_stored, module)  # type: ignore[assignment]


def _save_as_stored(model: Any, *args: Any, **kwargs: Any) -> Any:
    with as_stored(model):
        return type(model).save_pretrained(model, *args, **kwargs)


@contextmanager
def as_stored(model: nn.Module) -> Iterator[None]:
    """While inside, the model's parameters are what they are stored as, packed ones as ever: for saving."""
    found = [p for p in model.parameters() if type(p) is Stored and packed_in(p) is None]
    for p in found:
        settle(p)
    with _plain():
        for p in found:
            p.__class__ = nn.Parameter  # type: ignore[assignment]
        try:
            yield
        finally:
            for p in found:
                p.__class__ = Stored


def plain(tensor: Tensor) -> Tensor:
    """What is stored, sharing its memory.

    Raises:
        UserError: it is packed.
    """
    refuse_packed(tensor, "be had as plain numbers")
    settle(tensor)
    with _plain():
        return tensor.detach()


def raw(tensor: Tensor) -> Tensor:
    """What is stored, whatever is still to be done to it."""
    with _plain():
        return tensor.detach()


def stored_dtype(tensor: Tensor) -> torch.dtype:
    """The type that it is stored in."""
    with _plain():
        return tensor.dtype


def is_half(tensor: Tensor) -> bool:
    """Whether it is stored in 16 bits."""
    return stored_dtype(tensor) in HALVES


# ---------------------------------------------------------------------------------------- operations

_rooms = threading.local()


def _room(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A buffer of this thread, used again; one of its own where a graph might keep it."""
    kind = device.type
    if torch.is_grad_enabled() or kind not in ("cpu", "meta") or dtype != torch.float32:
        return torch.empty(size, dtype=dtype, device=device)
    have: Tensor | None = _rooms.__dict__.get(kind)
    if have is None or len(have) < size:
        have = torch.empty(size, dtype=torch.float32, device=device)
        _rooms.__dict__[kind] = have
    return have[:size]


@contextmanager
def rehearsed() -> Iterator[None]:
    """While inside, the buffer of the meta device is one of its own, which ends there."""
    _rooms.__dict__.pop("meta", None)
    try:
        yield
    finally:
        _rooms.__dict__.pop("meta", None)


def values(p: Tensor, first: int = 0, last: int | None = None, *, keep: bool = True) -> Tensor:
    """Rows first .. last (default all) of a parameter as it is computed with, looks that are under way included.

    Args:
        p: a parameter; one that is no `Stored` is handed back itself, or its rows.
        keep: the result may be kept; else the next call may overwrite it.
    """
    with _plain():
        rows = p if last is None else p[first:last]
        dtype = getattr(p, "_jf_dtype", None)
        if dtype is None:
            return rows
        _use(p)
        packed = packed_in(p)
        if packed is not None:
            return _unpacked(p, packed, first, p.shape[0] if last is None else last, keep)
        away: Away | None = p._jf_away  # type: ignore[attr-defined]
        if away is None and (keep or rows.dtype == dtype):
            return rows.to(dtype)
        size = rows.numel()
        out = (
            torch.empty(size, dtype=dtype, device=p.device)
            if keep
            else _room(size, dtype, p.device)
        )
        if away is None:
            out.copy_(rows.reshape(-1))
        else:
            start = first * (p.numel() // max(p.shape[0], 1)) if p.dim() else 0
            away.values(start, start + size, out)
        return out.view(rows.shape)


def _unpacked(p: Tensor, packed: Packed, first: int, last: int, keep: bool) -> Tensor:
    start, end = (0, p.shape[1]) if packed.transposed else (first, last)
    columns = p.shape[0] if packed.transposed else p.shape[1]
    size = (end - start) * columns
    room = torch.empty(size, device=p.device) if keep else _room(size, torch.float32, p.device)
    out = room.view(end - start, columns)
    packed.unpack(torch.arange(start, end, device=p.device), out)
    return out.T[first:last] if packed.transposed else out


class _Frozen(torch.autograd.Function):
    """x W^T, or x W, with a packed W, which is unpacked again for the gradient: a graph would keep all of the model."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: tuple[Tensor], turned: bool) -> Tensor:
        ctx.weight, ctx.turned = weight, turned
        return linear(x, *weight) if turned else matmul(x, *weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # itself, so that it can be differentiated again
        return _Frozen.apply(grad, ctx.weight, not ctx.turned), None, None  # type: ignore[no-untyped-call]


def _graphed(x: Any, weight: Any) -> bool:
    return packed_in(weight) is not None and torch.is_grad_enabled() and bool(x.requires_grad)


def _use(p: Any) -> None:
    if p._jf_used is not None:
        p._jf_used()
    settle(p)


def linear(x: Tensor, weight: Any, bias: Any = None) -> Tensor:
    """`F.linear`; a weight of many rows a slice at a time."""
    with _plain():
        bias = bias if bias is None else values(bias)
        if _graphed(x, weight):
            y: Tensor = _Frozen.apply(x, (weight,), True)  # type: ignore[no-untyped-call]
            return y if bias is None else y + bias
        if not _sliced(weight):
            return F.linear(x, values(weight, keep=False), bias)
        out, columns = weight.shape
        step = max(SLICE // columns, 1)
        flat = x.reshape(-1, columns)
        y = flat.new_empty(len(flat), out)
        for start in range(0, out, step):
            end = min(start + step, out)
            w = values(weight, start, end, keep=False)
            b = None if bias is None else bias[start:end]
            y[:, start:end] = F.linear(flat, w, b)
        return y.view(*x.shape[:-1], out)


def _sliced(weight: Any) -> bool:
    packed = packed_in(weight)
    return (
        getattr(weight, "_jf_dtype", None) == torch.float32
        and not (packed is not None and packed.transposed)  # whose rows lie across
        and weight.numel() > SLICE
        and not torch.is_grad_enabled()
    )


def addmm(input: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    """`torch.addmm`."""
    with _plain():
        if _graphed(mat1, mat2):
            y: Tensor = beta * values(input) + alpha * matmul(mat1, mat2)
            return y
        return torch.addmm(
            values(input), values(mat1), values(mat2, keep=False), beta=beta, alpha=alpha
        )


def matmul(input: Any, other: Any) -> Tensor:
    """`torch.matmul`."""
    with _plain():
        if _graphed(input, other):
            y: Tensor = _Frozen.apply(input, (other,), False)  # type: ignore[no-untyped-call]
            return y
        if packed_in(other) is not None and _sliced(other):
            y = torch.zeros(*input.shape[:-1], other.shape[1], device=input.device)
            step = max(SLICE // other.shape[1], 1)
            for start in range(0, other.shape[0], step):
                end = min(start + step, other.shape[0])
                y += input[..., start:end] @ values(other, start, end, keep=False)
            return y
        return torch.matmul(values(input), values(other, keep=False))


def embedding(
    input: Tensor,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """`F.embedding`: only the rows that are looked up are widened.

    Raises:
        UserError: a number has no row in the table, whose memory would be read beyond its ends; it has a max_norm.
    """
    with _plain():
        if max_norm is not None:
            raise UserError(
                "an embedding with max_norm moves its own weights, which are stored in 16 bits: use float32"
            )
        dtype = getattr(weight, "_jf_dtype", None)
        if dtype is not None:
            _use(weight)
        packed = packed_in(weight)
        away: Any = getattr(weight, "_jf_away", None)
        if packed is not None and packed.transposed:
            return F.embedding(input, values(weight))
        if packed is None and away is None:
            y = F.embedding(input, weight, padding_idx)
            return y if dtype is None else y.to(dtype)
        used, place = torch.unique(input, return_inverse=True)  # in order
        for one in map(int, used[:: max(len(used) - 1, 1)]):
            if not 0 <= one < weight.shape[0]:
                raise UserError(
                    f"an embedding of {weight.shape[0]} rows is asked for row {one}: token ids go from 0 to {weight.shape[0] - 1}: "
                    "is the tokenizer another model's, or has it got tokens that the model has no rows for "
                    "(resize_token_embeddings)?"
                )
        rows = torch.empty(len(used), weight.shape[1], dtype=dtype, device=weight.device)
        (away.rows if packed is None else packed.unpack)(used, rows)
        return F.embedding(place, rows)


_OPERATIONS: dict[Any, Any] = {
    F.linear: linear,
    torch.addmm: addmm,
    torch.matmul: matmul,
    torch.mm: matmul,
    Tensor.matmul: matmul,
    Tensor.__matmul__: matmul,
    F.embedding: embedding,
    torch.embedding: lambda weight, input, *rest: embedding(input, weight),
}
