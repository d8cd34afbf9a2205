"""Activation space: one rank-one direction an example, looked along without touching a weight.

While `looking`, every trainable parameter of the model intercepts the torch functions it is passed to
(`__torch_function__`; its class is swapped, the object stays the same, so tied weights stay tied) and adds to
the result what the perturbed weight of each row would have added:

    linear   y[r] += c[r] a[r] (b[r] . x[r])        for z[r] = a[r] b[r]^T
    lookup   y[r] += c[r] a[r, token] b[r]
    norm     y[r]  = norm(x[r]) * (w + c[r] z[r])   vectors take a dense z[r]

with c[r] = +eps or -eps. A table of positions that a model looks up once for all rows is looked up once for each
instead (`_FOR_ALL_ROWS`). A use of a parameter that is not known here is refused by name: no direction is ever
half applied in silence. Flipout (arXiv 1803.04386) has the rank-one signs, EGGROLL (arXiv 2511.16652) and GRZO
(arXiv 2606.02857) the per-example rank-one directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from justforward.batches import change_rows as change_rows
from justforward.batches import repeat_rows as repeat_rows
from justforward.directions import Weights
from justforward.errors import UserError
from justforward.stored import addmm, embedding, linear, matmul, values

_plain = torch._C.DisableTorchFunctionSubclass

# Tables that are looked up by so many axes none of which is the rows, which no operation can tell from a batch of texts. So
# they are known by their names: relative positions by [queries, keys] in T5 and its kin (not LongT5, whose axes are others),
# positions by [places] in Pegasus, Marian and Blenderbot.
_FOR_ALL_ROWS = {".SelfAttention.relative_attention_bias.weight": 2, ".embed_positions.weight": 1}


class Look:
    """The directions of one step, row by row.

    Args:
        weights: the trainable tensors.
        draws: their directions (`Weights.draw`); a tensor that has none rests, and is not intercepted.
        count: how many directions, D.
        signs: whole numbers [R]; row r of the model's batch looks along direction r mod D, this many eps
            away. R is a multiple of D.
        eps: per parameter group.
    """

    def __init__(
        self,
        weights: Weights,
        draws: Sequence[tuple[Any, ...]],
        count: int,
        signs: Sequence[float],
        eps: Sequence[float],
    ) -> None:
        self.weights = weights
        self.rows = len(signs)
        self.leading = 0  # rows of the model's own batch, once seen: rows x choices
        self._draws = draws
        self._signs = torch.tensor(signs).view(-1, count)
        self.times = len(self._signs)  # rows that share a direction
        self._eps = eps
        self._lengths: dict[tuple[int, torch.device], Tensor] = {}

    def part(self, first: int, last: int, rows: int) -> Look:
        """The look of rows `first` to `last` alone, of a batch that has `rows`."""
        count = self._signs.shape[1]  # samples x rows
        signs = self._signs.view(-1, count // rows, rows)[:, :, first:last]
        draws = [
            tuple(
                x.reshape(count // rows, rows, -1)[:, first:last].reshape(-1, x.shape[1])
                for x in parts
            )
            for parts in self._draws
        ]
        few = signs.shape[1] * signs.shape[2]
        return Look(self.weights, draws, few, signs.flatten().tolist(), self._eps)

    def moves(self, i: int) -> bool:
        """Whether tensor i has directions."""
        return bool(self._draws[i])

    def outer(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """Factors a [D, rows] and b [D, columns] of matrix i, and how far each row looks, [R / D, D, 1]."""
        a, b = self._draws[i]
        return torch.as_tensor(a), torch.as_tensor(b), self._length(i)

    def vector(self, i: int) -> Tensor:
        """c z [R, elements] of a tensor that is not a matrix."""
        return (self._length(i) * torch.as_tensor(self._draws[i][0])).view(self.rows, -1)

    def _length(self, i: int) -> Tensor:
        group, device = self.weights.groups[i], self.weights.tensors[i].device
        if (group, device) not in self._lengths:
            c = self._signs.to(device)[:, :, None] * self._eps[group]
            self._lengths[group, device] = c
        return self._lengths[group, device]


class _Looking(nn.Parameter):
    """A parameter that adds its direction to whatever it is used in. Set up by `looking`, never constructed."""

    _jf_look: Look
    _jf_index: int

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with _plain():
            handler = _HANDLERS.get(func)
            if handler is not None:
                result = handler(func, *args, **kwargs)
                if result is not NotImplemented:
                    return result
            elif func in _HARMLESS or (
                getattr(func, "__name__", "") == "__get__" and _getter(func)
            ):
                result = func(*args, **kwargs)
                if isinstance(result, torch.dtype):  # of 16-bit weights what they compute in
                    return getattr(args[0], "_jf_dtype", result)
                return result
            raise _unknown(func, args, kwargs)


def _getter(func: Any) -> bool:
    """Attributes of a tensor that say nothing of its values."""
    return getattr(func.__self__, "__name__", "") in _ATTRIBUTES


_ATTRIBUTES = {"shape", "dtype", "device", "requires_grad", "ndim", "is_meta", "layout", "is_leaf", "is_cpu", "is_cuda",
               "is_mps", "is_xla", "is_sparse", "is_quantized", "is_nested", "itemsize", "nbytes", "names", "grad", "grad_fn"}  # fmt: skip
_HARMLESS = {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_contiguous, Tensor.stride,
             Tensor.is_complex, Tensor.element_size, Tensor.__len__, Tensor.__hash__, Tensor.data_ptr,
             torch.is_floating_point, torch.numel, torch.is_complex}  # fmt: skip


def _unknown(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> UserError:
    given = [
        x
        for argument in (*args, *kwargs.values())
        for x in (argument if isinstance(argument, (list, tuple)) else [argument])
    ]
    names = dict.fromkeys(_name(x) for x in given if isinstance(x, _Looking))
    what = getattr(func, "__qualname__", None) or str(func)
    if what.endswith("__get__"):
        what = f"attribute {getattr(func.__self__, '__name__', what)}"
    return UserError(
        f"activation space: parameter {' and '.join(names)} is used by {what}, which it does not "
        "know how to look along: use estimator='weight' or freeze the parameter"
    )


def _name(p: _Looking) -> str:
    return p._jf_look.weights.names[p._jf_index]


def _group(look: Look, x: Tensor, p: _Looking) -> int:
    """How many leading rows of x belong to one row of the batch (1, or the number of choices)."""
    leading = x.shape[0] if x.dim() else 0
    if leading == 0 or leading % look.rows:
        raise UserError(
            f"activation space: parameter {_name(p)} sees an input of shape {tuple(x.shape)} while the batch has "
            f"{look.rows} rows: the first axis must be the batch's rows (mixture-of-experts and sequence-first "
            "models are not like that): use estimator='weight' or freeze the parameter"
        )
    look.leading = max(look.leading, leading) if x.dim() > 1 else look.leading
    return leading // look.rows


def _spread(look: Look, x: Tensor) -> Tensor:
    """Input shared by all rows (first axis 1, as GPT-2's position numbers): one copy a row."""
    if x.dim() and x.shape[0] == 1 and look.rows > 1:
        return x.expand(look.leading or look.rows, *x.shape[1:])
    return x


class _EachRow:
    """What a table that is looked up once for all rows holds for each of them, [R k, queries, keys, heads].

    It passes for [queries, keys, heads] until the model itself puts an axis for the rows in front. It can do no more
    than that, so a model that does something else with it is refused.
    """

    def __init__(self, values: Tensor, name: str) -> None:
        self._values = values
        self._name = name

    def permute(self, *axes: Any) -> _EachRow:
        given = axes[0] if len(axes) == 1 else axes
        return _EachRow(self._values.permute(0, *(1 + axis for axis in given)), self._name)

    def unsqueeze(self, dim: int) -> Tensor:
        if dim != 0:
            raise self._unknown("unsqueeze")
        return self._values

    def __getattr__(self, name: str) -> Any:
        raise self._unknown(name)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = (*args, *(kwargs or {}).values())
        raise next(x for x in given if isinstance(x, cls))._unknown(getattr(func, "__name__", ""))

    def _unknown(self, what: str) -> UserError:
        return UserError(
            f"activation space: what parameter {self._name} gives for all rows at once is used by {what}, which it "
            "does not know: use estimator='weight' or freeze the parameter"
        )


def _add_outer(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, c: Tensor, look: Look, p: _Looking
) -> Tensor:
    """y += c a (b . x), row by row; x [R k, ..., n], y [R k, ..., m], a [D, m], b [D, n], c [R / D, D, 1]."""
    _group(look, x, p)
    shape = (look.times, len(a), -1)
    a, b, c = a.to(y.dtype), b.to(x.dtype), c.to(x.dtype)
    # Pointwise operations: matrix products with one column or one inner index are five times slower on a CPU.
    dots = torch.linalg.vecdot(x.reshape(*shape, x.shape[-1]), b[:, None, :]).mul_(c)
    # A view: y is a fresh result, contiguous.
    y.view(*shape, y.shape[-1]).addcmul_(dots[..., None], a[:, None, :])
    return y


def _add_vector(y: Tensor, p: _Looking) -> Tensor:
    """y += c z row by row: a bias of shape [m] added to y [R k, ..., m]."""
    look = p._jf_look
    z = _rows_of(look.vector(p._jf_index), y, look, p)
    return y.add_(z)


def _rows_of(z: Tensor, x: Tensor, look: Look, p: _Looking) -> Tensor:
    """z [R, m] shaped to broadcast against x [R k, ..., m]."""
    z = z.repeat_interleave(_group(look, x, p), 0)
    return z.view(z.shape[0], *([1] * (x.dim() - 2)), z.shape[1])


def _linear(func: Any, input: Tensor, weight: Any, bias: Any = None) -> Any:
    if isinstance(input, _Looking):
        return NotImplemented
    look = (weight if isinstance(weight, _Looking) else bias)._jf_look
    input = _spread(look, input)
    y = linear(input, weight, bias)
    if isinstance(weight, _Looking):
        if weight.dim() != 2:
            return NotImplemented
        a, b, c = look.outer(weight._jf_index)
        y = _add_outer(y, input, a, b, c, look, weight)
    return _add_vector(y, bias) if isinstance(bias, _Looking) else y


def _addmm(func: Any, input: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    """GPT-2's Conv1D: bias + x W with W [in, out], x flattened to [B L, in]."""
    if isinstance(mat1, _Looking) or beta != 1 or alpha != 1:
        return NotImplemented
    y = addmm(input, mat1, mat2)
    if isinstance(mat2, _Looking):
        a, b, c = mat2._jf_look.outer(mat2._jf_index)
        y = _add_outer(y, mat1, b, a, c, mat2._jf_look, mat2)
    if isinstance(input, _Looking):
        return _add_vector(y, input) if input.dim() == 1 else NotImplemented
    return y


def _matmul(func: Any, input: Any, other: Any) -> Any:
    if isinstance(input, _Looking) or other.dim() != 2 or input.dim() < 2:
        return NotImplemented
    input = _spread(other._jf_look, input)
    a, b, c = other._jf_look.outer(other._jf_index)
    return _add_outer(matmul(input, other), input, b, a, c, other._jf_look, other)


def _embedding(
    func: Any,
    input: Tensor,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if max_norm is not None or not isinstance(weight, _Looking):
        return NotImplemented
    look, name = weight._jf_look, _name(weight)
    for_all = any(name.endswith(n) and input.dim() == axes for n, axes in _FOR_ALL_ROWS.items())
    input = _spread(look, input[None] if for_all else input)
    _group(look, input, weight)
    a, b, c = look.outer(weight._jf_index)
    y = embedding(input, weight)
    shape = (look.times, len(a), -1)
    picked = a.expand(look.times, -1, -1).gather(2, input.reshape(shape)) * c
    picked, b = picked.to(y.dtype), b.to(y.dtype)
    y.view(*shape, y.shape[-1]).addcmul_(picked[..., None], b[:, None, :])
    # a vector a place is added to the text's, rows in front or not; biases go through some hands first
    return _EachRow(y, name) if for_all and input.dim() == 3 else y


def _affine(y: Tensor, weight: Any, bias: Any) -> Tensor:
    if isinstance(weight, _Looking):
        z = _rows_of(weight._jf_look.vector(weight._jf_index), y, weight._jf_look, weight)
        y = y * (values(weight) + z).to(y.dtype)
    elif weight is not None:
        y = y * values(weight)
    if bias is None:
        return y
    y = y + values(bias)
    return _add_vector(y, bias) if isinstance(bias, _Looking) else y


def _layer_norm(
    func: Any,
    input: Tensor,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
) -> Any:
    if isinstance(input, _Looking) or len(normalized_shape) != 1:
        return NotImplemented
    return _affine(F.layer_norm(input, normalized_shape, None, None, eps), weight, bias)


def _rms_norm(
    func: Any, input: Tensor, normalized_shape: Any, weight: Any = None, eps: float | None = None
) -> Any:
    if isinstance(input, _Looking) or len(normalized_shape) != 1:
        return NotImplemented
    return _affine(F.rms_norm(input, normalized_shape, None, eps), weight, None)


def _pointwise(func: Any, input: Any, other: Any, *, alpha: Any = 1) -> Any:
    """x * w and x + w with a vector w along the last axis of x [R k, ..., m]."""
    x, p = (other, input) if isinstance(input, _Looking) else (input, other)
    if (
        isinstance(x, _Looking)
        or not isinstance(x, Tensor)
        or p.dim() != 1
        or x.dim() < 2
        or alpha != 1
    ):
        return NotImplemented
    if x.shape[-1] != p.shape[0]:
        return NotImplemented
    x = _spread(p._jf_look, x)
    z = _rows_of(p._jf_look.vector(p._jf_index), x, p._jf_look, p)
    moved = (values(p) + z).to(x.dtype)
    return x * moved if func in _MULTIPLY else x + moved


def _same_type(func: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
    """`.to(x.dtype)`, `.float()` and the like where they change nothing hand back the parameter itself."""
    dtype = getattr(input, "_jf_dtype", None)
    if dtype is not None:  # what it says it is, by which it is asked for
        asked = func(torch.empty(0, dtype=dtype, device=input.device), *args, **kwargs)
        return input if (asked.dtype, asked.device) == (dtype, input.device) else NotImplemented
    result = func(input, *args, **kwargs)
    return input if result is input else NotImplemented


_MULTIPLY = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply}
_ADD = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__}
_HANDLERS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    F.embedding: _embedding,
    torch.embedding: lambda func, weight, input, *rest: _embedding(func, input, weight),
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    Tensor.to: _same_type,
    Tensor.float: _same_type,
    Tensor.contiguous: _same_type,
    **dict.fromkeys((*_MULTIPLY, *_ADD), _pointwise),
}


_under_way: list[Look] = []


def entering(rows: int) -> None:
    """Say that what the model runs next has so many rows: what has no axis of rows of its own is then repeated as often.

    Without, they are taken to be as many as the most that were seen, which is wrong where one look runs parts of a model
    on batches of different size. Outside of looks nothing happens.
    """
    if _under_way:
        _under_way[-1].leading = rows


@contextmanager
def looking(look: Look) -> Iterator[None]:
    """While inside, every parameter that does not rest adds its rows' directions to the results it takes part in."""
    places = [i for i in range(len(look.weights.tensors)) if look.moves(i)]
    tensors = [look.weights.tensors[i] for i in places]
    classes = [type(tensor) for tensor in tensors]
    _under_way.append(look)
    try:
        for i, tensor in zip(places, tensors, strict=True):
            tensor.__class__ = _Looking
            tensor._jf_look, tensor._jf_index = look, i  # type: ignore[attr-defined]
        yield
    finally:
        _under_way.pop()
        for tensor, kind in zip(tensors, classes, strict=True):
            with _plain():
                tensor.__dict__.pop("_jf_look", None)
                tensor.__dict__.pop("_jf_index", None)
                tensor.__class__ = kind


@contextmanager
def among(first: int, last: int, rows: int) -> Iterator[None]:
    """While inside, the model runs rows `first` to `last` of a batch only, which look along the directions they have in the whole.

    Args:
        first, last: a part of the batch's own rows, each of which may be there several times, for signs and samples.
        rows: how many the batch has. Outside of looks nothing happens.
    """
    if not _under_way:
        yield
        return
    whole = _under_way[-1]
    part = whole.part(first, last, rows)
    tensors = [t for i, t in enumerate(whole.weights.tensors) if whole.moves(i)]
    _under_way.append(part)
    try:
        for tensor in tensors:
            tensor._jf_look = part  # type: ignore[attr-defined]
        yield
    finally:
        _under_way.pop()
        for tensor in tensors:
            tensor._jf_look = whole  # type: ignore[attr-defined]
