"""`fits`: what a model takes to run and to tune, and what fits a device, from its configuration alone.

Memory of a method = the weights (parameters and buffers of the real classes, on the meta device)
                   + what is kept from step to step (grid, moments, best weights)
                   + what a step has alive at its peak (`rehearse`: the step itself, run without values)
                   + on a CPU what glibc's heap scatters (`heap`), and what a process takes by itself (`machine`).

How that grows with batch and length, and what fits, is in `limits`.

Seconds of a step = the sum over its operations of max(floating-point operations / FLOP/s, bytes read and written / bandwidth),
a roofline, forward by forward; of MeZO and for each sweep besides trainable weights x the time of a look, and for updates
along a direction a row 2 x rows x weights / FLOP/s. Nothing is added for starting operations, and caches are not thought of.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from justforward.config import FitsConfig
from justforward.errors import UserError
from justforward.limits import account_of, process_of
from justforward.machine import Device, device_of
from justforward.prepare import use_threads
from justforward.ranges import check_ranges
from justforward.rehearse import METHODS, Method, Settings, Stage
from justforward.skeleton import (
    FAILS,
    Counts,
    Plan,
    build,
    check_sizes,
    count,
    read_plan,
    stand_in,
)
from justforward.stored import FORMATS, SLICE


@dataclass(frozen=True)
class Row:
    """What one method takes.

    Attributes:
        method: its name.
        options: of the command, if it has some for it.
        why_not: why the method does not go with this model; then nothing else is said.
        trainable: weights that are tuned.
        weights, kept, working, process: bytes: parameters and buffers; from step to step; alive in a step at its
            peak, with what the heap scatters; of the process itself.
        memory: their sum.
        fits: whether that is at most the device's.
        largest_batch: rows that fit at the length asked for; 0 if not one does.
        largest_length: tokens that fit with the batch asked for; 0 likewise.
        flops: floating-point operations of matrix products in a step.
        seconds: of a step.
    """

    method: str
    options: str | None = None
    why_not: str | None = None
    trainable: int = 0
    weights: int = 0
    kept: int = 0
    working: int = 0
    process: int = 0
    memory: int = 0
    fits: bool = False
    largest_batch: int = 0
    largest_length: int = 0
    flops: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Forecast:
    """What `plan` says.

    Attributes:
        model, kind, dtype, quantize, batch_size, length: what was asked.
        context: the most tokens that a text may have; None: not bounded.
        parameters: by kind.
        device: see there.
        rows: one a method.
        advice: what to change for what does not fit, a sentence each.
        assumed: what was assumed.
        stand_in: how what was run differs from the model, where something else was run in its place.
    """

    model: str
    kind: str
    dtype: str
    quantize: str | None
    batch_size: int
    length: int
    context: int | None
    parameters: Counts
    device: Device
    rows: list[Row] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)
    stand_in: str | None = None

    def row(self, method: str) -> Row:
        """That of a method."""
        return next(row for row in self.rows if row.method == method)


def plan(
    model: str | Plan,
    *,
    batch_size: int = 8,
    length: int = 128,
    dtype: str = "float32",
    quantize: str | None = None,
    lora_rank: int = 8,
    lora_targets: str | None = None,
    prefix_length: int = 5,
    device: Device | None = None,
    methods: tuple[Method, ...] = METHODS,
    limits: bool = True,
) -> Forecast:
    """What a model takes with each method, and what fits.

    Args:
        model: as for `skeleton.read_plan`.
        batch_size: rows a step.
        length: tokens of each.
        dtype: of the weights: float32, bfloat16, float16.
        quantize: as for train.
        lora_rank, lora_targets, prefix_length: as for train.
        device: None: this machine, measured (`machine.device_of`).
        methods: which.
        limits: find out the largest batch and length too, which takes four times as long.

    Raises:
        UserError: there is no such model, a length that it does not have, or a quantisation that train refuses too, or
            that is of a .gguf where there is none.
    """
    _check_stored(quantize, dtype)
    what = read_plan(model, quantize) if isinstance(model, str) else model
    if what.context is not None and length > what.context:
        raise UserError(
            f"--length is {length}: {what.name} has a context of {what.context} tokens: give at most that"
        )
    if quantize is not None:
        _check_quantised(what, quantize)
    packed = quantize == "gguf"
    device = device or device_of(dtype=FORMATS[dtype], packed=packed, tokens=what.tokens)
    if packed and device.kind == "gpu":
        raise UserError(
            "--quantize is 'gguf', which unpacks on a CPU: give --device cpu, or leave --quantize out"
        )
    whole = build(what, FORMATS[dtype])
    parameters = count(whole)
    settings = Settings(
        what,
        FORMATS[dtype],
        quantize,
        lora_rank,
        lora_targets,
        prefix_length,
        keep_best=device.kind == "cpu",
        wide=device.kind == "cpu",
    )
    stage = Stage(settings)
    try:
        stage.run(METHODS[0], batch_size, length)
    except UserError:
        raise
    except FAILS as error:
        reason = (
            f"a {what.config.model_type} model cannot be run without its weights ({_short(error)})"
        )
        check_sizes(what)
        other = stand_in(what, reason)
        what = replace(what, assumed=other.assumed)
        stage = Stage(replace(settings, stand_in=other))
    rows = [_row(stage, method, batch_size, length, device, limits) for method in methods]
    found = Forecast(
        what.name,
        what.kind,
        dtype,
        quantize,
        batch_size,
        length,
        what.context,
        parameters,
        device,
        rows,
        [],
        [*what.assumed, *_assumed(dtype, device, quantize)],
        "; ".join(what.assumed) or None,
    )
    found.advice.extend(_advice(found))
    return found


def _check_stored(quantize: str | None, dtype: str) -> None:
    """What train refuses whatever the model, before that is looked at."""
    if quantize is not None and dtype != "float32":
        raise UserError(
            f"--dtype is {dtype!r}: what --quantize leaves as it is stays float32: leave it out"
        )


def _check_quantised(what: Plan, quantize: str) -> None:
    """What `load_model` and `train` refuse."""
    if what.kind == "seq2seq":
        raise UserError(
            f"--quantize is {quantize!r}: {what.name} is an encoder-decoder, whose layers are not quantised: leave it out"
        )
    if quantize == "gguf" and what.header is None:
        raise UserError(
            f"--quantize is 'gguf': it keeps the matrices of a .gguf as they are stored, and {what.name} was planned without "
            "one: give the path of one"
        )


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


def _assumed(dtype: str, device: Device, quantize: str | None) -> list[str]:
    out = [
        "rows of the same padded length; logits of one answer position a row, two label words of one token",
        "fused attention: scores of all pairs of tokens are never whole",
    ]
    if dtype != "float32":
        out.append(
            f"{dtype} weights are computed with "
            + (
                f"in float32, one matrix, or {4 * SLICE >> 20} MiB of one, at a time"
                if device.kind == "cpu"
                else f"in {dtype}"
            )
        )
    if quantize == "gguf":
        out.append(
            "all of the .gguf's tensors stay in memory, mapped from the file: the system can take their pages back; matrices are "
            f"unpacked to float32 where they are used, one, or {4 * SLICE >> 20} MiB of one, at a time"
        )
    if device.kind == "gpu":
        out.append(
            "tensors alone: what the GPU's allocator rounds up and its libraries' workspaces come on top"
        )
    return out


def _row(stage: Stage, method: Method, rows: int, length: int, device: Device, limits: bool) -> Row:
    try:
        here = stage.run(method, rows, length)
        account = account_of(stage, method, rows, length, device, limits)
    except UserError as error:
        return Row(method.name, method.options, str(error).split(": use ")[0])
    except FAILS as error:
        return Row(
            method.name, method.options, f"its step cannot be run without values ({_short(error)})"
        )
    memory = account.at_length(length)
    process = process_of(method, device)
    seconds = (
        here.trace.seconds(device.flops, device.bandwidth)
        + here.sweeps * here.trainable * device.sweep
    )
    if method.way == "activation":
        seconds += 2 * rows * here.trainable / device.flops
    kept = here.kept + here.made
    return Row(
        method.name,
        method.options,
        None,
        here.trainable,
        here.weights,
        kept,
        memory - here.weights - kept - process,
        process,
        memory,
        memory <= device.memory,
        account.most_rows(device.memory) if limits else 0,
        account.longest(device.memory, stage.settings.plan.context) if limits else 0,
        here.trace.flops,
        seconds,
    )


# ---------------------------------------------------------------------------------------------- advice


def _advice(found: Forecast) -> list[str]:
    """What to change for what does not fit: less of the batch or the length, or the method nearest to it that fits."""
    out = []
    cpu = found.device.kind == "cpu"
    possible = [row for row in found.rows if row.why_not is None]
    smallest = {row.method: row for row in possible}
    for row in possible:
        if row.fits:
            continue
        ways = []
        if row.largest_batch:
            parts = "--rows-at-once" if row.method.startswith("MeZO") else "a batch of"
            ways.append(f"{parts} {row.largest_batch}")
        if row.largest_length:
            ways.append(f"a length of {row.largest_length}")
        for name in _NEARER.get(row.method, ()):
            other = smallest.get(name)
            if other is not None and other.fits:
                ways.append(f"{other.method} ({size(other.memory)})")
                break
        lacking = size(row.memory - found.device.memory)
        if not ways:
            least = row.weights + row.kept + row.process
            ways.append(
                f"a device of more than {size(least)}: weights and what is kept take that whatever the batch"
                if least > found.device.memory
                else f"a device of {size(row.memory)}; a smaller batch and a smaller length together may do"
            )
            half = row.weights // 2
            if (
                found.dtype == "float32"
                and found.quantize is None
                and row.method.startswith(("evaluation", "MeZO"))
                and least - half <= found.device.memory
            ):
                ways.append(f"--dtype bfloat16, in which the weights take {size(half)}")
            if row.method in ("MeZO, weight space", "MeZO, activation space") and cpu:
                ways.append("--offload FOLDER, which keeps its weights on a disk")
            if found.quantize is None and row.method.startswith(
                ("MeZO, LoRA", "MeZO, prefix", "AdamW, LoRA", "evaluation")
            ):
                ways.append(
                    "--quantize int8 or bnb4, which keep its linear maps in a quarter or an eighth"
                )
        out.append(f"{row.method}: {lacking} too much: {', or '.join(ways)}")
    return out


# Methods that do nearly the same for less memory, the nearest first.
_NEARER = {
    "AdamW": ("AdamW, checkpointing", "AdamW, LoRA", "AdamW, LoRA, checkpointing", "MeZO, activation space", "MeZO, weight space"),
    "AdamW, checkpointing": ("AdamW, LoRA, checkpointing", "MeZO, activation space", "MeZO, weight space"),
    "SGD": ("SGD, checkpointing", "MeZO, activation space", "MeZO, weight space"),
    "SGD, checkpointing": ("MeZO, activation space", "MeZO, weight space"),
    "AdamW, LoRA": ("AdamW, LoRA, checkpointing", "MeZO, LoRA, activation space", "MeZO, LoRA, weight space"),
    "AdamW, LoRA, checkpointing": ("MeZO, LoRA, activation space", "MeZO, LoRA, weight space"),
    "AdamW, prefix": ("MeZO, prefix, activation space", "MeZO, prefix, weight space"),
    "MeZO, weight space, adam with kept moments": ("MeZO, weight space",),
    "MeZO, activation space": ("MeZO, weight space",),
    "MeZO, LoRA, activation space": ("MeZO, LoRA, weight space",),
    "MeZO, prefix, activation space": ("MeZO, prefix, weight space",),
}  # fmt: skip


def size(count: float) -> str:
    """Bytes in decimal units, three digits."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 999.5 or unit == "TB":
            break
        count /= 1000.0
    return f"{count:.0f} {unit}" if unit == "B" or abs(count) >= 99.95 else f"{count:.3g} {unit}"


# --------------------------------------------------------------------------------------------- command


def fits(config: FitsConfig) -> Forecast:
    """The command: the forecast that a configuration asks for.

    Raises:
        UserError: something in the input cannot be used.
    """
    check_ranges(config)
    use_threads(config.threads)
    _check_stored(config.quantize, config.dtype)
    what = read_plan(config.model, config.quantize)
    device = device_of(
        config.device,
        config.memory,
        config.bandwidth,
        config.flops,
        config.overhead,
        FORMATS[config.dtype],
        packed=config.quantize == "gguf",
        tokens=what.tokens,
    )
    return plan(
        what,
        batch_size=config.batch_size,
        length=config.length,
        dtype=config.dtype,
        quantize=config.quantize,
        lora_rank=config.lora_rank,
        lora_targets=config.lora_targets,
        prefix_length=config.prefix_length,
        device=device,
    )


def as_json(found: Forecast) -> dict[str, Any]:
    """A forecast as plain values; sizes are bytes."""
    out = asdict(found)
    out["parameters"]["total"] = found.parameters.total
    return out
