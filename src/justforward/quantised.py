"""Frozen base models whose linear maps are kept in 8 or 4 bits, for tuners that add to them (LoRA, prefix, prompt).

(A .gguf whose matrices are kept as it has them is in `mapped`.)

    int8   torchao: int8, a float32 scale for each output
    bnb8   bitsandbytes: the int8 of LLM.int8() (arXiv 2208.07339, section 2), a float32 scale for each output
    bnb4   bitsandbytes: NF4 (QLoRA, arXiv 2305.14314, section 3), a float32 scale for each 64 weights

They are rounded while they are loaded, one at a time. Embeddings, output head, norms and biases stay float32, and so
does what is tuned.

Only weights are rounded, never what flows between them: a map turns its weights back into float32 for the time of its
own product. bitsandbytes would round the inputs too: LLM.int8() to 8 bits, with columns set apart by the largest value
of the whole batch, so that a row's loss depends on the other rows; NF4 to bfloat16, on a CPU that multiplies in it. A
look is a thousandth of a weight, and such steps hide it: over six directions in the LoRA of SmolLM2-135M, with eps 1e-3,
the projected gradients were off by up to 24 (LLM.int8(), where they are 0.7 to 3.0 in size) and by up to 1.5 (NF4 in
bfloat16, where they are 0.1 to 2.9).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from justforward.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LIBRARIES = {"int8": "torchao", "bnb8": "bitsandbytes", "bnb4": "bitsandbytes"}


def quantising(quantize: str) -> dict[str, Any]:
    """The arguments with which transformers' `from_pretrained` rounds the linear maps as it reads them.

    Args:
        quantize: a key of `LIBRARIES`.

    Raises:
        UserError: the library is not installed, or cannot be imported.
    """
    library = LIBRARIES[quantize]
    if importlib.util.find_spec(library) is None:
        raise UserError(
            f"--quantize is {quantize!r}: it needs {library}, which is not installed: "
            "pip install 'justforward[quantised]'"
        )
    try:
        importlib.import_module(library)
        settings = _settings(quantize)
    except (ImportError, OSError, RuntimeError, AttributeError, TypeError, ValueError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"--quantize is {quantize!r}: {library} cannot be used here: {said}: install another version of it"
        ) from error
    # without a device bitsandbytes would look for a GPU
    return {"quantization_config": settings, "device_map": "cpu"}


def library_version(quantize: str | None) -> dict[str, str]:
    """Name and version of the library that does it; nothing where none is needed, or where it is not installed."""
    with contextlib.suppress(PackageNotFoundError):
        name = LIBRARIES.get(quantize or "", quantize)  # "gguf" is a library's own name
        return {} if name is None else {name: version(name)}
    return {}


def _settings(quantize: str) -> Any:
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if quantize == "int8":
        torchao: Any = importlib.import_module("torchao.quantization")
        # without its settings for torch.compile, which would be the whole process's
        return TorchAoConfig(torchao.Int8WeightOnlyConfig(set_inductor_config=False))
    bits: Any = BitsAndBytesConfig  # its constructor has no types
    if quantize == "bnb8":
        return bits(load_in_8bit=True)
    return bits(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def settle(model: PreTrainedModel, quantize: str, name: str) -> None:
    """Make a model that was loaded with `quantising` compute in float32, hold nothing of its file, and be frozen.

    Args:
        model: changed in place.
        quantize: how it was loaded.
        name: of the model, for the error.

    Raises:
        UserError: none of its linear maps is quantised (GPT-2's, for one, are of a class that torchao does not know),
            or a matrix is not a whole number of NF4's blocks.
    """
    maps = quantised_maps(model)
    if not maps:
        raise UserError(
            f"{name}: --quantize is {quantize!r}: {LIBRARIES[quantize]} finds no linear map that it could quantise in "
            f"a {model.config.model_type} model: choose another of {', '.join(LIBRARIES)}, or leave it out"
        )
    for module in maps:
        block = module.weight.quant_state.blocksize if quantize == "bnb4" else 1
        if module.in_features * module.out_features % block:
            raise UserError(
                f"{name}: --quantize is {quantize!r}: it shares a scale among {block} weights, and a matrix of "
                f"{module.out_features} x {module.in_features} cannot be dealt out so: choose int8 or bnb8"
            )
        module.forward = multiply(module, functools.partial(_HELD[quantize], module))
    rounded = {id(module.weight) for module in maps}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in rounded:
            # a copy: what is left of the file would keep all of it mapped
            tensor.data = tensor.data.clone()
        if tensor.requires_grad:
            tensor.requires_grad_(False)
    with contextlib.suppress(AttributeError, OSError):
        # glibc keeps the float32 matrices that were rounded one after another: more than the integers take
        ctypes.CDLL(None).malloc_trim(0)


def quantised_maps(model: nn.Module) -> list[Any]:
    """The modules of a model whose weight is quantised."""
    return [module for module in model.modules() if is_quantised(getattr(module, "weight", None))]


def is_quantised(weight: Any) -> bool:
    """Whether a tensor holds integers and a scale in place of its numbers (torchao, bitsandbytes)."""
    return isinstance(weight, Tensor) and (
        hasattr(weight, "__tensor_flatten__")
        or type(weight).__name__ in ("Int8Params", "Params4bit")
    )


# A map's weights [out, in] in a type of floating point, short of a scale for each output [out] (None: of none).
Held = tuple[Tensor, Tensor | None]


def _torchao_int8(module: Any, dtype: torch.dtype) -> Held:
    weight = module.weight
    return weight.qdata.to(dtype), weight.scale.to(dtype).flatten()


def _bitsandbytes_int8(module: Any, dtype: torch.dtype) -> Held:
    weight = module.weight
    return weight.CB.to(dtype), weight.SCB.to(dtype) / 127.0


def _bitsandbytes_nf4(module: Any, dtype: torch.dtype) -> Held:
    """A block a row: where blocks end within rows, bitsandbytes 0.50 reads wrong scales on the CPU."""
    state = module.weight.quant_state
    rows = state.shape.numel() // state.blocksize
    operation: Any = torch.ops.bitsandbytes.dequantize_4bit.default
    blocks = operation(
        module.weight,
        state.absmax,
        state.blocksize,
        state.quant_type,
        [rows, state.blocksize],
        dtype,
    )
    return blocks.view(state.shape), None


_HELD = {"int8": _torchao_int8, "bnb8": _bitsandbytes_int8, "bnb4": _bitsandbytes_nf4}


def multiply(module: Any, held: Callable[[torch.dtype], Held]) -> Callable[[Tensor], Tensor]:
    """The forward of a linear map whose weights `held` makes again from its integers."""
    return functools.partial(_forward, module, held)


class _Linear(torch.autograd.Function):
    """x W^T, which keeps nothing for the gradient: W is made again from its integers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, held: Callable[[torch.dtype], Held]) -> Tensor:
        ctx.held = held
        weight, scale = held(x.dtype)
        y = F.linear(x, weight)
        return y if scale is None else y.mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        weight, scale = ctx.held(grad.dtype)
        return (grad if scale is None else grad * scale) @ weight, None


def _forward(module: Any, held: Callable[[torch.dtype], Held], x: Tensor) -> Tensor:
    y: Tensor = _Linear.apply(x, held)  # type: ignore[no-untyped-call]
    return y if module.bias is None else y + module.bias
