"""What the kernels take from LLVM by name: intrinsics that Numba has no spelling for; and its memory back."""

# mypy: ignore-errors
# (Numba types what is in here; mypy cannot follow its intrinsics.)
from __future__ import annotations

import contextlib
import ctypes
import sys
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from justforward.memory import give_back, mapped_files


def _llvm(name: str) -> Any:
    """The LLVM intrinsic of that name on one float32."""

    @intrinsic
    def call(typingctx: Any, x: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.call(
                builder.module.declare_intrinsic(f"llvm.{name}", [ir.FloatType()]), args
            )

        return types.float32(types.float32), codegen

    return call


sqrt, rint, floor = _llvm("sqrt"), _llvm("rint"), _llvm("floor")


@intrinsic
def divide(typingctx: Any, x: Any, y: Any) -> Any:
    """x / y of float32, without Python's branch for y = 0, which would keep LLVM from vectorising."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fdiv(*args)

    return types.float32(types.float32, types.float32), codegen


@intrinsic
def as_float(typingctx: Any, x: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(x), codegen


@intrinsic
def as_int(typingctx: Any, x: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), codegen


@intrinsic
def select(typingctx: Any, condition: Any, yes: Any, no: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(*args)

    return yes(types.boolean, yes, yes), codegen


@intrinsic
def prefetch(typingctx: Any, values: Any, at: Any) -> Any:
    """Ask for the cache line of values[at], to be written."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        pointer = builder.bitcast(builder.gep(array.data, [args[1]]), ir.IntType(8).as_pointer())
        word = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, word, word, word])
        fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(fetch, [pointer, word(1), word(3), word(1)])
        return context.get_dummy_value()

    return types.none(values, types.intp), codegen


def release_compiler() -> None:
    """Give back the memory of the compiler: LLVM's code, 65 MB, and what it has freed.

    Nothing needs it until something is compiled again. The pages are those of a library's file: the system reads
    them back when they are touched. Where it cannot do this (not Linux, an old kernel), they stay.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc only
    for start, end, path in mapped_files():
        if "llvmlite" in path:
            give_back(start, end)
