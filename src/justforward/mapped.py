"""A .gguf as it is stored: a model whose matrices stay the file's blocks, mapped, and are unpacked where they are used.

What a tensor of the file is to the model, transformers' own conversion says (`modeling_gguf_pytorch_utils`: its table of
names, its processors). A processor is asked with numbers of rows and of columns in place of weights: where it hands all
rows back in some order, or turned, the matrix stays as it is stored and the order is kept beside it; where it does anything
else, or the tensor is a vector, the values are made as the conversion makes them, once.
"""

from __future__ import annotations

import importlib
import json
import struct
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from justforward import blocks
from justforward.errors import UserError
from justforward.stored import pack

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

HEADER = "gguf.json"


class Blocks:
    """A matrix of a .gguf (`stored.Packed`).

    Args:
        data: uint8 [rows, bytes], mapped from the file.
        form: how it is stored, by gguf's name.
        order: int64 [rows], the file's number of each row; None where they are the same.
        transposed: the parameter is [columns, rows].
    """

    def __init__(self, data: np.ndarray, form: str, order: Tensor | None, transposed: bool) -> None:
        self.form, self.transposed = form, transposed
        self.nbytes = _held(data.nbytes, order)
        self._data, self._order = data, order

    def unpack(self, rows: Tensor, out: Tensor) -> None:
        """Fill `out`, float32 [n, columns], with the rows of these numbers, int64 [n]."""
        numbers = rows if self._order is None else self._order[rows]
        blocks.unpack(self.form, self._data, numbers, out)

    def parts(self) -> Iterator[Any]:
        """How it is stored, the order of its rows, and the file's bytes."""
        yield f"{self.form}\0{self.transposed}\0{self._data.shape}\0".encode()
        if self._order is not None:
            yield self._order.numpy().data
        step = max((1 << 24) // max(self._data.shape[1], 1), 1)
        for start in range(0, len(self._data), step):
            yield self._data[start : start + step].data


class Outline:
    """A matrix of a .gguf of which nothing but the size is there (`stored.Packed`), for models on the meta device.

    Args:
        form, order, transposed: as for `Blocks`.
        size: bytes in the file.
    """

    def __init__(self, form: str, order: Tensor | None, transposed: bool, size: int) -> None:
        self.form, self.transposed, self.nbytes = form, transposed, _held(size, order)

    def unpack(self, rows: Tensor, out: Tensor) -> None:
        """As if `out` was filled."""
        out.zero_()

    def parts(self) -> Iterator[Any]:
        """Nothing that numbers would follow from."""
        yield from ()


def _held(size: int, order: Tensor | None) -> int:
    return size + (0 if order is None else order.nbytes)


@dataclass
class Header:
    """What a .gguf says before its weights, which is kept: gguf's reader takes seconds and memory for long vocabularies,
    and transformers' table of names as long.

    Attributes:
        architecture: its name in gguf.
        config: as transformers reads it.
        saved_as: the model's class.
        names: the model's parameter for a tensor.
        tensors: name, form, shape as torch has it, first byte, bytes.
    """

    architecture: str
    config: dict[str, Any]
    saved_as: str
    names: dict[str, str]
    tensors: list[tuple[str, str, list[int], int, int]]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write it, and the model's config beside it."""
        settings_of(self).save_pretrained(folder)
        (Path(folder) / HEADER).write_text(json.dumps(asdict(self)), encoding="utf-8")


_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TEXT, _ARRAY = 8, 9


def check_header(path: Path) -> None:
    """Walk through a .gguf's header, whose layout is that of ggml's gguf.md.

    gguf's own reader believes the counts in a damaged one, and goes on beyond the end of the file until memory is used up.

    Raises:
        UserError: something in it reaches beyond the end of the file, or is of no known type.
    """
    end = path.stat().st_size
    with path.open("rb") as file:

        def number(form: str) -> int:
            size = struct.calcsize(form)
            raw = file.read(size)
            if len(raw) < size:
                raise UserError(f"{path}: the .gguf is cut short or damaged: copy it again")
            return int(struct.unpack(order + form, raw)[0])

        def skip(size: int) -> None:
            if file.tell() + size > end:
                raise UserError(f"{path}: the .gguf is cut short or damaged: copy it again")
            file.seek(size, 1)

        def value(kind: int, count: int = 1) -> None:
            if kind in _SIZES:
                skip(_SIZES[kind] * count)
            elif kind == _TEXT:
                for _ in range(count):
                    skip(number("Q"))
            elif kind == _ARRAY and count == 1:
                inner = number("I")
                value(inner if inner != _ARRAY else -1, number("Q"))
            else:
                raise UserError(
                    f"{path}: the .gguf has a value of type {kind}: damaged, or newer than this version"
                )

        order = "<"
        if file.read(4) != b"GGUF":
            return  # something else, which its reader says best
        if number("I") & 0xFFFF == 0:  # a small number, unless its bytes are the other way round
            order = ">"
        tensors, values = number("Q"), number("Q")
        for _ in range(values):
            value(_TEXT)
            value(number("I"))
        for _ in range(tensors):
            value(_TEXT)
            skip(8 * number("I"))
            skip(12)


def read_header(path: Path, auto: Any) -> Header:
    """Read a .gguf up to its weights.

    Args:
        path: the file.
        auto: the class of transformers that makes the model.

    Raises:
        UserError: its numbers are stored the other way round, or transformers converts its architecture by other means.
    """
    from gguf import GGUFReader
    from transformers.modeling_gguf_pytorch_utils import (
        get_gguf_hf_weights_map,
        load_gguf_checkpoint,
        read_field,
    )

    reader: Any = GGUFReader(path)
    if reader.byte_order != "I":
        raise UserError(
            f"{path}: --quantize is 'gguf': its numbers are stored in the other byte order: leave it out"
        )
    architecture = str(read_field(reader, "general.architecture")[0])  # type: ignore[no-untyped-call]
    if architecture in _otherwise():
        raise UserError(
            f"{path}: --quantize is 'gguf': transformers converts {architecture!r} in a way of its own, which is not "
            "known here: leave it out"
        )
    tensors = [
        (t.name, t.tensor_type.name, [int(n) for n in reversed(t.shape)], int(t.data_offset), int(t.n_bytes))
        for t in reader.tensors
    ]  # fmt: skip
    config: dict[str, Any] = load_gguf_checkpoint(str(path))["config"]  # type: ignore[no-untyped-call]
    model = _empty(auto, _config_of(config))
    names = get_gguf_hf_weights_map(model, _processor(architecture, config))
    return Header(architecture, config, type(model).__name__, names, tensors)


def build(
    auto: Any,
    config: PretrainedConfig,
    path: Path,
    folder: Path,
    note: Callable[[str], None] | None = None,
) -> PreTrainedModel:
    """The model of a .gguf with the file's own matrices, frozen.

    Args:
        auto: as `read_header` has it.
        config: the model's.
        path: the file, which stays mapped.
        folder: where its header was saved.
        note: called with a sentence where matrices could not be kept as they are stored.

    Raises:
        UserError: a tensor is stored in a form that gguf cannot dequantise, does not fit, or is missing.
    """
    header = Header(**json.loads((folder / HEADER).read_text(encoding="utf-8")))
    config.name_or_path = str(path)  # what an adapter will name as its base
    model = _empty(auto, config)
    _put_weights(model, path, header, note)
    return model


def outline(model: PreTrainedModel, path: str, header: Header) -> None:
    """Put in the place of a model's matrices, on the meta device, what `build` would, without numbers; freeze the model.

    Args:
        model: of the header's settings.
        path: of the file, for messages.

    Raises:
        UserError: as `build`, for what is seen without the weights.
    """
    processor, same = _processor(header.architecture, header.config), _shared(model)
    for name, form, shape, _, size in header.tensors:
        found = _place(processor, name, (shape[0], shape[1]), header.names) if len(shape) == 2 else None  # fmt: skip
        if found is None:
            continue
        target, order, transposed = found
        _check_form(path, name, form)
        if form == "F32" and order is None and not transposed:
            continue  # which is a plain parameter, and as large
        turned = shape[::-1] if transposed else shape
        given = pack(Outline(form, order, transposed, size), turned, "meta")
        for other in same.get(target, [target]):
            _set(model, path, other, given)
    model.requires_grad_(False)


def _shared(model: nn.Module) -> dict[str, list[str]]:
    """All names of each parameter, by its first."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return {found[0]: found for found in names.values()}


def settings_of(header: Header) -> PretrainedConfig:
    """transformers' configuration of a .gguf's model."""
    config = _config_of(header.config)
    config.architectures = [header.saved_as]
    return config


def _config_of(config: dict[str, Any]) -> PretrainedConfig:
    from transformers import AutoConfig

    settings = dict(config)
    made: PretrainedConfig = AutoConfig.for_model(settings.pop("model_type"), **settings)
    return made


def _empty(auto: Any, config: PretrainedConfig) -> PreTrainedModel:
    """A model whose parameters have no memory; buffers, which are computed, have."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = auto.from_config(config, dtype=torch.float32)
    return model


def _processor(architecture: str, config: dict[str, Any]) -> Any:
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    processors: dict[str, Any] = TENSOR_PROCESSORS
    return processors.get(architecture, TensorProcessor)(config=config)


def _otherwise() -> set[str]:
    """Architectures that a newer transformers converts by rules of another kind."""
    try:
        rules = importlib.import_module("transformers.integrations.gguf")
    except ImportError:
        return set()
    return set(rules.GGUF_ARCHS)


def _put_weights(
    model: PreTrainedModel, path: Path, header: Header, note: Callable[[str], None] | None
) -> None:
    processor, names = _processor(header.architecture, header.config), header.names
    # copied where it is written to, which nobody does: torch knows no read-only memory
    file = np.asarray(np.memmap(path, mode="c"))
    made: dict[str, Any] = {"tensors": {}}  # by the model's names, as processors have it
    for name, form, shape, first, size in header.tensors:
        data = file[first : first + size]
        if len(data) < size:
            raise UserError(f"{path}: ends within {name}: copy the file again")
        if len(shape) == 2:
            found = _place(processor, name, (shape[0], shape[1]), names)
            if found is not None:
                target, order, transposed = found
                _check_form(path, name, form)
                rows = data.reshape(shape[0], -1)
                if form == "F32" and order is None and not transposed:
                    given = nn.Parameter(torch.from_numpy(rows).view(torch.float32), False)
                else:
                    turned = shape[::-1] if transposed else shape
                    given = pack(Blocks(rows, form, order, transposed), turned)
                _set(model, path, target, given)
                continue
        _convert(processor, path, name, form, shape, data, names, made)
    for target, values in made["tensors"].items():
        _set(model, path, target, nn.Parameter(values.float(), requires_grad=False))
    missing = {name for name, p in model.named_parameters(remove_duplicate=False) if p.is_meta}
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    for name, p in model.named_parameters():
        if p.is_meta:
            raise UserError(
                f"{path}: no weights for {name}, which would be random: give a .gguf of a whole model"
            )
        p.requires_grad_(False)
    left = {
        target: values.numel() for target, values in made["tensors"].items() if values.dim() > 1
    }
    if left and note is not None:
        size = 4 * sum(left.values()) / 2**20
        note(
            f"note: {len(left)} of the matrices in {path.name} cannot stay as they are stored and are float32 "
            f"({size:.1f} MiB), such as {next(iter(left))}"
        )


def _check_form(path: str | Path, name: str, form: str) -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType[form]
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        raise _unknown(path, name, form) from None


def _unknown(path: str | Path, name: str, form: str) -> UserError:
    return UserError(
        f"{path}: {name} is stored as {form}, which the package gguf cannot dequantise: give a .gguf of another form"
    )


Processed = tuple[str, np.ndarray]


def _processed(
    processor: Any, name: str, given: np.ndarray, names: dict[str, str], made: dict[str, Any]
) -> Processed | None:
    """What transformers makes of a tensor, with the model's name for it; None where it puts it into `made` itself, or leaves it."""
    result = processor.process(
        weights=given, name=name, tensor_key_mapping=names, parsed_parameters=made
    )
    return None if result.name not in names else (names[result.name], result.weights)


def _place(
    processor: Any, name: str, shape: tuple[int, int], names: dict[str, str]
) -> tuple[str, Tensor | None, bool] | None:
    """The parameter that a matrix is, in which order of rows, and whether transposed; None where that is not all there is to it."""
    columns = np.arange(shape[1], dtype=np.int32)
    # without memory of their own: one number a row, one a column
    asked = [np.arange(shape[0], dtype=np.int32)[:, None], columns[None]]
    given = [np.broadcast_to(numbers, shape) for numbers in asked]
    answers: list[Processed] = []
    for numbers in given:
        made: dict[str, Any] = {"tensors": {}}
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # of logarithms of such numbers, say
            answer = _processed(processor, name, numbers, names, made)
        if answer is None and len(made["tensors"]) == 1:
            target, values = next(iter(made["tensors"].items()))
            answer = target, values.numpy()
        if answer is None:
            return None
        if answer[1] is numbers:
            return answer[0], None, False
        answers.append(answer)
    (target, rows), (_, places) = answers
    for transposed in (False, True):
        r, c = (rows.T, places.T) if transposed else (rows, places)
        if r.shape != shape or not (r == r[:, :1]).all() or not (c == columns).all():
            continue
        order, as_stored = torch.from_numpy(r[:, 0].astype(np.int64)), torch.arange(shape[0])
        if torch.equal(order.sort().values, as_stored):
            return target, None if torch.equal(order, as_stored) else order, transposed
    return None


def _convert(
    processor: Any,
    path: Path,
    name: str,
    form: str,
    shape: list[int],
    data: np.ndarray,
    names: dict[str, str],
    made: dict[str, Any],
) -> None:
    """Put a tensor's values into `made` as transformers' conversion does, if the model has a use for it."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    try:
        values = dequantize(data.reshape(*shape[:-1], -1), GGMLQuantizationType[form])
    except NotImplementedError:
        if name in names:
            raise _unknown(path, name, form) from None
        return
    answer = _processed(processor, name, values, names, made)
    if answer is not None:
        made["tensors"][answer[0]] = torch.from_numpy(np.copy(answer[1]))


def _set(model: nn.Module, path: str | Path, target: str, given: nn.Parameter) -> None:
    """Put a parameter in the place of one of that name."""
    parent, _, leaf = target.rpartition(".")
    module = model.get_submodule(parent)
    old = module._parameters.get(leaf)
    if old is None:
        raise UserError(
            f"{path}: --quantize is 'gguf': {target} is no parameter of a {type(model).__name__}: leave it out"
        )
    if old.shape != given.shape:
        raise UserError(
            f"{path}: {target} is {tuple(given.shape)} in the file and {tuple(old.shape)} by its own settings: "
            "the file is damaged, or of a kind that transformers does not know"
        )
    setattr(module, leaf, given)
