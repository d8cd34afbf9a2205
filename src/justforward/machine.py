"""What a machine has, given or measured here: memory, bandwidth, floating-point operations, and what a process takes by itself.

Each measurement takes a second or two and is the best of several: other work on the machine makes it worse, never better.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from justforward.config import DeviceKind
from justforward.directions import FAMILIES, Weights
from justforward.errors import UserError
from justforward.memory import allowed

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{i}B": (1024 if i else 1000) ** power
    for power, prefix in enumerate("KMGTP", start=1)
    for i in ("", "i")
}
_PREFIXES = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
# Where a process that has a tokenizer of none begins: what its imports have freed (measured).
START = 2_030_000
_MOST_TOKENS = 300_000  # more than any tokenizer has
LEAST_BARE = 1e6  # whoever gives fewer bytes without a unit means another one
_SECONDS = 0.7  # of each measurement
# What a process has in memory before its model: imports, a forward, a backward; then the kernel that draws a LoRA's start, whose
# compiler stays; then those of the directions, after which the compiler's memory is given back.
_ALONE = """
import ctypes, json, sys, torch
import justforward.first_order, justforward.tuners, justforward.evaluate
from transformers import AutoModelForCausalLM, LlamaConfig
def own_pages(size):  # whether malloc asks the system for so much by itself
    before = libc.mallinfo2().hblks
    at = libc.malloc(size)
    own = libc.mallinfo2().hblks > before
    if not own:  # freed, it would be the new threshold
        libc.free(at)
    return own
def threshold():  # from which size on it does
    low, high = 1 << 17, 1 << 25
    while high - low > 1 << 12:
        middle = (low + high) // 2
        low, high = (low, middle) if own_pages(middle) else (middle, high)
    return high
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
if sys.argv[2]:
    from transformers import PreTrainedTokenizerFast
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=sys.argv[2])
    tokenizer("a text")
model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, hidden_size=256, intermediate_size=512,
    num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4)).eval()
model(input_ids=torch.zeros(8, 64, dtype=torch.long)).logits.sum().backward()
if sys.argv[1] == "1":
    from justforward.blocks import warm
    warm()
base = resident()
libc = ctypes.CDLL(None)
class Info(ctypes.Structure):
    _fields_ = [(n, ctypes.c_size_t) for n in ("arena", "ordblks", "smblks", "hblks", *"abcdef")]
try:
    libc.mallinfo2.restype, libc.malloc.restype = Info, ctypes.c_void_p
    libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
    begin = threshold()
except AttributeError:  # not glibc, or older than 2.33
    begin = 2_030_000
from justforward import noise
noise.normal(0, 0, 0, 4096)
drawn = resident() - base
from justforward.directions import FAMILIES, compile_kernels
compile_kernels(FAMILIES["gaussian"])
print(json.dumps([base, max(resident() - base, 0), max(drawn, 0), begin]))
"""


@dataclass(frozen=True)
class Overhead:
    """Bytes of a process besides its model: interpreter and libraries; and the compiled kernels of the directions.

    Attributes:
        base: interpreter and libraries.
        kernels: more, where looks are taken: the directions' kernels, the compiler's memory given back.
        drawn: more, where none are and a LoRA is drawn: its kernel, and the compiler, which stays.
        threshold: what malloc asks the system for by itself from this size on, when steps begin.
    """

    base: int
    kernels: int
    drawn: int = 0
    threshold: int = START


@dataclass(frozen=True)
class Device:
    """What a step runs on.

    Attributes:
        kind: "cpu": memory is that of a process, from glibc's heap; "gpu": tensors alone.
        memory: bytes.
        bandwidth: bytes read and written a second.
        flops: floating-point operations a second, of matrix products.
        sweep: seconds that a look takes for each weight that it moves.
        overhead: what is taken besides.
        sources: for each of these where it is from, in words.
    """

    kind: DeviceKind
    memory: int
    bandwidth: float
    flops: float
    sweep: float
    overhead: Overhead
    sources: dict[str, str]


def parse_size(text: str, option: str) -> int:
    """ "80GB" (10^9 bytes each), "80GiB" (2^30), "512 MiB", "1e9".

    Raises:
        UserError: it is no size; names the option.
    """
    match = re.fullmatch(r"\s*([\d.]+(?:[eE][+-]?\d+)?)\s*([KMGTP]?i?B?)\s*", text)
    number = _number(match[1]) if match else None
    if match is None or number is None or match[2] not in _UNITS or number * _UNITS[match[2]] < 1:
        raise UserError(
            f"{option} is {text!r}: it must be a size such as 80GB (10^9 bytes) or 80GiB (2^30)"
        )
    if match[2] == "" and number < LEAST_BARE:
        raise UserError(f"{option} is {text!r}, which is bytes: give a unit, such as {match[1]}GB")
    return int(number * _UNITS[match[2]])


def parse_rate(text: str, option: str) -> float:
    """ "2TB/s", "312TFLOP/s", "312T", "3.12e14": a number a second.

    Raises:
        UserError: it is no rate; names the option.
    """
    match = re.fullmatch(
        r"\s*([\d.]+(?:[eE][+-]?\d+)?)\s*([KMGTP]?)(?:B|FLOPs?|FLOPS)?(?:/s)?\s*", text
    )
    number = _number(match[1]) if match else None
    if match is None or number is None or number <= 0:
        raise UserError(
            f"{option} is {text!r}: it must be a rate such as 2TB/s, 312TFLOP/s or 3e14"
        )
    return number * _PREFIXES[match[2]]


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def device_of(
    kind: DeviceKind | None = None,
    memory: str | None = None,
    bandwidth: str | None = None,
    flops: str | None = None,
    overhead: str | None = None,
    dtype: torch.dtype = torch.float32,
    packed: bool = False,
    tokens: int = 0,
) -> Device:
    """The device that is described, and for what is not said this machine, measured.

    Args:
        kind: None: a GPU where there is one.
        memory, overhead: sizes (`parse_size`).
        bandwidth, flops: rates (`parse_rate`).
        dtype: of the matrix products that are measured.
        packed: the process that is measured unpacks a .gguf's matrices.
        tokens: it has a tokenizer of so many; 0: of none.

    Raises:
        UserError: a size or rate cannot be read.
    """
    here: DeviceKind = "gpu" if torch.cuda.is_available() else "cpu"
    kind = kind or here
    sources = dict.fromkeys(("memory", "bandwidth", "flops", "sweep", "overhead"), "given")
    # what is given is read before anything is measured
    size = None if memory is None else parse_size(memory, "--memory")
    besides = None if overhead is None else parse_size(overhead, "--overhead")
    moves = None if bandwidth is None else parse_rate(bandwidth, "--bandwidth")
    works = None if flops is None else parse_rate(flops, "--flops")
    where = torch.device("cuda" if kind == "gpu" and here == "gpu" else "cpu")
    name = (
        f"measured here, {torch.get_num_threads()} threads"
        if where.type == "cpu"
        else "measured here, on the GPU"
    )
    if size is None:
        size, sources["memory"] = (
            _memory(where),
            f"this machine's {'RAM' if where.type == 'cpu' else 'GPU'}",
        )
    if moves is None:
        moves, sources["bandwidth"] = _bandwidth(where), f"{name}: reading and writing 256 MiB"
    if where.type == "cpu":
        dtype = torch.float32  # what 16-bit weights are computed with there (`stored`)
    if works is None:
        works, sources["flops"] = (
            _flops(where, dtype),
            f"{name}: products of 1,024 x 1,024 in {str(dtype)[6:]}",
        )
    if bandwidth is None and where.type == "cpu":
        sweep, sources["sweep"] = _sweep(), f"{name}: looks along 16 M weights"
    else:
        sweep, sources["sweep"] = 8 / moves, "a float32 read and written at that bandwidth"
    if besides is not None:
        taken = Overhead(besides, 0)
    elif kind == "gpu":
        taken, sources["overhead"] = (
            Overhead(0, 0),
            "none: not known; the driver's context goes into --overhead",
        )
    else:
        taken, sources["overhead"] = (
            measure_overhead(packed, tokens),
            "measured here: a process with a model of nothing",
        )
    return Device(kind, size, moves, works, sweep, taken, sources)


def _memory(where: torch.device) -> int:
    if where.type == "cuda":
        return int(torch.cuda.get_device_properties(where).total_memory)
    if not hasattr(os, "sysconf"):
        raise UserError("the machine's memory cannot be found out here: give it with --memory")
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = allowed()  # of a container
    return ram if limit is None else min(ram, limit)


@cache
def measure_overhead(packed: bool = False, tokens: int = 0) -> Overhead:
    """What a process takes before its model, by one that has none; on Linux only, elsewhere a figure from there.

    Args:
        packed: with what unpacks a .gguf's matrices.
        tokens: with a tokenizer of so many; 0: with none.

    Raises:
        UserError: the process fails.
    """
    if not Path("/proc/self/statm").is_file():
        return Overhead(
            430_000_000, 104_000_000, 104_000_000
        )  # Linux, Python 3.11, torch 2.13, transformers 5
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder) / "tokenizer.json"
        if tokens:
            _write_tokenizer(tokenizer, min(tokens, _MOST_TOKENS))
        given = [str(int(packed)), str(tokenizer) if tokens else ""]
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _ALONE, *given], capture_output=True, text=True
        )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no word"]
        raise UserError(
            f"the memory of a process cannot be measured here ({last[0]}): give it with --overhead"
        )
    return Overhead(*json.loads(done.stdout.splitlines()[-1]))


def _write_tokenizer(path: Path, tokens: int) -> None:
    """A byte-pair tokenizer of so many tokens, each a pair of two before it; they are as long as those of real ones."""
    drawn = random.Random(0)
    names = [chr(0x100 + i) for i in range(min(tokens, 256))]
    have, merges = set(names), []
    while len(names) < tokens:
        one, other = drawn.choice(names), drawn.choice(names[:256])
        if one + other not in have:
            have.add(one + other)
            names.append(one + other)
            merges.append([one, other])
    model = {"type": "BPE", "vocab": {name: i for i, name in enumerate(names)}, "merges": merges}
    settings = {"version": "1.0", "added_tokens": [], "model": model}
    path.write_text(json.dumps(settings, indent=1, ensure_ascii=False), encoding="utf-8")


def _best(step: Callable[[], Any], where: torch.device) -> float:
    """Seconds of the fastest of some calls."""
    wait: Callable[[], None] = torch.cuda.synchronize if where.type == "cuda" else lambda: None
    step()
    wait()
    best, begun = math.inf, time.perf_counter()
    while time.perf_counter() - begun < _SECONDS:
        start = time.perf_counter()
        step()
        wait()
        best = min(best, time.perf_counter() - start)
    return best


@cache
def _bandwidth(where: torch.device) -> float:
    x = torch.zeros(1 << 26, device=where)
    return 8 * x.numel() / _best(lambda: x.add_(1.0), where)


@cache
def _flops(where: torch.device, dtype: torch.dtype) -> float:
    size = 1024 if where.type == "cpu" else 8192
    a = torch.ones(size, size, dtype=dtype, device=where)
    out = torch.empty_like(a)
    return 2 * size**3 / _best(lambda: torch.mm(a, a, out=out), where)


@cache
def _sweep() -> float:
    x = torch.ones(1 << 24)
    weights = Weights([("x", x)], [0], FAMILIES["gaussian"], [1e-3])
    signs = iter([1.0, -1.0] * 10_000)
    return _best(lambda: weights.look(0, [1e-3], next(signs)), x.device) / x.numel()
