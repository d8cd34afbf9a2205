"""The Triton kernels on a GPU: their bits against the CPU's, their speed, and a step of a large model.

    python benchmarks/gpu.py

Without a GPU the same calls are run small by Triton's interpreter, where it is installed: that shows whether the bits are
equal, and no speed is measured. The model has the shapes of OPT-13B, 40 layers of 5,120, random weights: in bfloat16
(26 GB), computed with as they are, and in float32 (52 GB, where they fit; --layers 20 needs half), multiplied in TF32.
Then one of OPT-30B's shapes in bfloat16 (60 GB) takes two steps in each space, where torch may have no more than 80 GB.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _timing import Table, Things, arguments, in_turns

import justforward as jf
from justforward.directions import FAMILIES, Move, Weights
from justforward.moments import Moments
from justforward.noise import cpu, devices, plain, spec
from justforward.rules import Adam
from justforward.stored import values
from justforward.trajectory import Step

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DOMAINS = {"gaussian": spec.DOMAIN_GAUSSIAN, "rademacher": spec.DOMAIN_RADEMACHER}
STEPS = 16


def finished(thing: Callable[[], Any]) -> Callable[[], Any]:
    """The thing, and waiting until the GPU has done it."""
    if not GPU:
        return thing
    return lambda: (thing(), torch.cuda.synchronize())


def bits(table: Table, kernels: Any, count: int) -> None:
    """z of every family, made on both, in every bit."""
    seeds = np.array([2**63 + 5], np.uint64)
    for family, domain in DOMAINS.items():
        theirs = np.empty((1, count), np.float32)
        cpu.fill_rows(theirs, seeds, np.uint64(3), domain, family == "rademacher")
        ours = torch.empty(1, count, device=DEVICE)
        kernels.fill_rows(ours, seeds, np.uint64(3), domain, family == "rademacher")
        equal = (ours.cpu().view(torch.int32) == torch.from_numpy(theirs).view(torch.int32)).sum()
        share = int(equal) / count
        what = f"{family}: share of {count:,} elements with the CPU's bits"
        table.add(what, share, "1", share == 1.0)


def bits_of_halves(table: Table, kernels: Any, count: int) -> None:
    """Weights in 16 bits after two steps, and as a look sees them, on both, in every bit."""
    numbers = [np.array(x, np.uint64) for x in ([5, 2**63], [1, 2, 3])]
    given = (np.uint64(3), numbers[0], np.array([1, 3]), numbers[1], np.full(3, 1e-3, np.float32))
    for dtype in (torch.bfloat16, torch.float16):
        found = []
        for module, device in ((kernels, DEVICE), (plain, torch.device("cpu"))):
            theta = torch.linspace(-0.1, 0.1, count).to(device, dtype)
            flags = torch.zeros(-(-count // spec.TILE), dtype=torch.int8, device=device)
            module.update(
                theta, flags, 0, len(flags), *given, np.full(2, 1e-3, np.float32), np.float32(0.0)
            )
            seen = torch.empty(count - 1, dtype=dtype, device=device)
            module.widen(theta, seen, 1, count, np.uint64(3), numbers[1], given[4])
            found.append(torch.cat([theta, seen]).view(torch.int16).cpu())
        share = int((found[0] == found[1]).sum()) / len(found[0])
        table.add(
            f"{dtype}: share of {len(found[0]):,} numbers with the CPU's bits",
            share,
            "1",
            share == 1.0,
        )


def on_device(weights: Weights, kernels: Any) -> Weights:
    """By Triton's kernels, also where its interpreter runs on the CPU."""
    weights.compiled = False
    for away in weights._away.values():
        away.kernels, away.compiled = kernels, False
    return weights


def moves_of(weights: Weights) -> dict[str, Callable[[], Any]]:
    """What is done with weights, by name; the rates are such that they go nowhere."""
    moves = [
        Move(s, np.array([s], np.uint64), np.full((1, 1), 1e-9, np.float32), np.zeros(1, np.float32))
        for s in range(STEPS)
    ]  # fmt: skip
    adam = Moments(0, Adam(window=8))
    sign = iter(range(1 << 62))
    step = iter(range(1 << 62))

    def look() -> Any:
        weights.look(5, [1e-3], 1.0 - 2.0 * (next(sign) % 2))  # there and back
        if weights.halves[0]:  # not moved, but handed out
            values(weights.tensors[0])

    return {
        "look": look,
        "update": lambda: weights.update(moves[:1]),
        f"{STEPS} steps in one pass": lambda: weights.update(moves),
        "step of adam, window 8": lambda: adam.apply(
            weights, [Step(next(step), (1.0,), rates=(2.0**-40,))]
        ),
    }


def kernels_by_family(
    table: Table, kernels: Any, dtype: torch.dtype, rows: int, rounds: int
) -> None:
    """Each kernel against a plain read-modify-write of the same weights."""
    columns = 1024
    start = torch.empty(rows, columns, device=DEVICE).normal_(0.0, 0.02).to(dtype)
    things: Things = {"read-modify-write": finished(lambda: start.add_(1e-9))}
    for family in ("gaussian", "rademacher", "rank1"):
        p = torch.nn.Parameter(start.clone(), requires_grad=False)
        weights = on_device(Weights([("w", p)], [0], FAMILIES[family], [1e-3]), kernels)
        for name, thing in moves_of(weights).items():
            things[f"{dtype} {family} {name}"] = finished(thing)
    if not GPU:
        for thing in things.values():
            thing()
        return
    seconds = in_turns(things, rounds)
    for name, taken in seconds.items():
        if name == "read-modify-write":
            continue
        speed = rows * columns / statistics.median(taken) / 1e9
        table.ratio(f"{name} / read-modify-write", taken, seconds["read-modify-write"])
        table.add(f"{name}: thousand million weights a second", speed, "-", True)


def opt_of(
    dtype: torch.dtype, width: int, heads: int, layers: int, rows: int, length: int
) -> tuple[Any, torch.Tensor, Callable[[Any], torch.Tensor]]:
    """An OPT of random weights, a batch, and the losses of its rows."""
    import transformers

    width, heads = (width, heads) if GPU else (32, 2)
    torch.set_float32_matmul_precision("high")
    config = transformers.OPTConfig(
        hidden_size=width,
        word_embed_proj_dim=width,
        ffn_dim=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=50272 if GPU else 64,
        max_position_embeddings=2048 if GPU else 64,
        dtype=dtype,
    )
    with DEVICE:
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        ids = torch.randint(4, config.vocab_size, (rows, length))

    def losses(ids: Any) -> Any:
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        return torch.nn.functional.cross_entropy(logits.float(), ids[:, 0], reduction="none")

    return model, ids, losses


def large_step(
    table: Table, kernels: Any, dtype: torch.dtype, layers: int, rows: int, length: int, rounds: int
) -> None:
    """Steps of OPT-13B, in weight space and in activation space, against two bare forwards of the same batch."""
    model, ids, losses = opt_of(dtype, 5120, 40, layers, rows, length)

    @torch.no_grad()
    def two_forwards() -> None:
        losses(ids)
        losses(ids)

    things: Things = {"two forwards": finished(two_forwards)}
    bare = (
        in_turns(things, rounds)["two forwards"] if GPU else []
    )  # of a model that nothing was done to yet
    opt = jf.MeZO(model, lr=1e-12)
    on_device(opt.weights, kernels)
    rowwise = jf.MeZO(model, lr=1e-12, estimator="activation")
    on_device(rowwise.weights, kernels)
    things |= {
        "step in weight space": finished(lambda: opt.step(lambda: losses(ids).mean())),
        "step in activation space": finished(lambda: rowwise.step(losses, ids)),
    }
    if not GPU:
        for thing in things.values():
            thing()
        return
    seconds = in_turns(things, rounds)
    millions = sum(p.numel() for p in model.parameters()) // 10**6
    model_is = f"{millions:,} M {dtype} weights, {rows} x {length}"
    for name in things:
        table.ratio(f"{name} / two bare forwards, {model_is}", seconds[name], bare)
    table.add(
        f"peak GPU memory, {model_is} (GB)", torch.cuda.max_memory_allocated() / 1e9, "-", True
    )


def in_80_gb(table: Table, kernels: Any, rows: int, length: int) -> None:
    """Steps of OPT-30B where torch may have 80 GB, which the paper needs an A100 for."""
    total = torch.cuda.get_device_properties(DEVICE).total_memory if GPU else 0
    if GPU:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_per_process_memory_fraction(min(80e9 / total, 1.0))
    model, ids, losses = opt_of(torch.bfloat16, 7168, 56, 48 if GPU else 1, rows, length)
    for estimator in ("weight", "activation"):
        opt = jf.MeZO(model, lr=1e-6, eps=1e-2, estimator=estimator)  # type: ignore[arg-type]
        on_device(opt.weights, kernels)
        for _ in range(2):
            opt.step(losses, ids)
    if GPU:
        peak, millions = torch.cuda.max_memory_allocated() / 1e9, sum(p.numel() for p in model.parameters()) // 10**6  # fmt: skip
        what = f"peak GPU memory of steps, {millions:,} M bfloat16 weights, {rows} x {length} (GB)"
        table.add(what, peak, "at most 80", peak <= 80.0)


def main() -> None:
    """Measure and print."""
    given = arguments(__doc__, millions=256, rounds=12, layers=40, rows=16, length=256)
    torch.set_num_threads(given.threads)
    if importlib.util.find_spec("triton") is None:
        print("Triton is not installed: nothing was measured")
        return
    if not GPU:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    from justforward.noise import gpu

    if GPU:
        kernels = devices.kernels(DEVICE)
        if kernels is not gpu:
            sys.exit("the Triton kernels do not run on this GPU, see the warning: nothing measured")
        print(torch.cuda.get_device_name(DEVICE))
    else:
        devices.kernels = lambda _: gpu
        print("no GPU: a few thousand weights by Triton's interpreter; bits are compared, no speed is measured")  # fmt: skip
    table = Table(given.json)
    bits(table, gpu, given.millions * 10**6 if GPU else 3000)
    bits_of_halves(table, gpu, 10**7 if GPU else 3000)
    size = (given.layers, given.rows, given.length, given.rounds) if GPU else (1, 2, 8, 1)
    for dtype in (torch.bfloat16, torch.float32):
        kernels_by_family(table, gpu, dtype, given.millions * 1024 if GPU else 2, given.rounds)
        needed = dtype.itemsize * 12 * 5120**2 * given.layers * 1.1
        if GPU and torch.cuda.get_device_properties(DEVICE).total_memory < needed:
            print(f"the model in {dtype} does not fit: not measured")
            continue
        large_step(table, gpu, dtype, *size)
        torch.cuda.empty_cache()
    if GPU and torch.cuda.get_device_properties(DEVICE).total_memory < 75e9:
        print("OPT-30B in bfloat16 does not fit: not measured")
    else:
        in_80_gb(table, gpu, *((8, given.length) if GPU else (2, 8)))
    table.print()


if __name__ == "__main__":
    main()
