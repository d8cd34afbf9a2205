"""What `fits` has found, for people: a table in the terminal, and a plot of memory against model size."""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from justforward.errors import UserError
from justforward.fits import Forecast, plan, size
from justforward.folder import writing
from justforward.machine import Device
from justforward.rehearse import METHODS
from justforward.skeleton import OPT

_LEAST_WIDTH = 132
# Methods of the plot, with colour and style; weight space is drawn on evaluation, which it equals.
_LINES = {
    "evaluation": ("#999999", "-", 5.0),
    "MeZO, weight space": ("#08519c", "--", 1.8),
    "MeZO, activation space": ("#4292c6", "-", 1.8),
    "AdamW, LoRA": ("#41ab5d", "-", 1.8),
    "AdamW, LoRA, checkpointing": ("#41ab5d", ":", 1.8),
    "SGD": ("#fd8d3c", "-", 1.8),
    "AdamW": ("#d94801", "-", 1.8),
    "AdamW, checkpointing": ("#d94801", ":", 1.8),
}
_DEVICES = {"24 GB": 24e9, "80 GB": 80e9, "8 x 80 GB": 640e9}


def spell_fits(found: Forecast) -> str:
    """A forecast as text."""
    from rich.console import Console
    from rich.table import Table

    counts, device = found.parameters, found.device
    head = "tied to it" if counts.tied else f"{counts.head:,}"
    bound = "" if found.context is None else f" (context {found.context:,})"
    kept = {None: "", "gguf": ", matrices as the .gguf stores them"}
    lines = [
        f"{found.model}: {counts.total:,} parameters (embedding {counts.embedding:,}, head {head}, other matrices "
        f"{counts.matrices:,}, vectors {counts.vectors:,}), {found.kind}, {found.dtype}"
        + kept.get(found.quantize, f", linear maps in {found.quantize}"),
        f"{found.batch_size} rows of {found.length} tokens{bound}",
        f"{device.kind}: {size(device.memory)} ({device.sources['memory']}); {device.bandwidth / 1e9:.4g} GB/s "
        f"({device.sources['bandwidth']}); {device.flops / 1e12:.4g} TFLOP/s ({device.sources['flops']}); a look "
        f"{device.sweep * 1e9:.2g} ns a weight ({device.sources['sweep']}); besides the model "
        f"{size(device.overhead.base)}, with compiled directions {size(device.overhead.base + device.overhead.kernels)}, with a drawn LoRA "
        f"{size(device.overhead.base + device.overhead.drawn)} "
        f"({device.sources['overhead']})",
    ]
    if found.stand_in is not None:
        lines.insert(1, f"STAND-IN, NOT THE MODEL: {found.stand_in}")
    table = Table(box=None, pad_edge=False, header_style="")
    table.add_column("method", no_wrap=True)
    for title in (
        "memory",
        "weights",
        "kept",
        "in a step",
        "process",
        "fits",
        "batch",
        "length",
        "s/step",
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for row in found.rows:
        if row.why_not is not None:
            continue
        table.add_row(
            row.method,
            *(size(b) for b in (row.memory, row.weights, row.kept, row.working, row.process)),
            "yes" if row.fits else "no",
            _limit(row.largest_batch),
            _limit(row.largest_length),
            f"{row.seconds:.3g}",
        )
    out = io.StringIO()
    width = max(shutil.get_terminal_size((_LEAST_WIDTH, 24)).columns, _LEAST_WIDTH)
    Console(file=out, width=width, highlight=False, markup=False).print(table)
    lines += ["", *(line.rstrip() for line in out.getvalue().splitlines()), ""]
    lines.append("batch, length: the largest that fit, with the other as asked for")
    lines += [
        f"not possible: {row.method}: {row.why_not}"
        for row in found.rows
        if row.why_not is not None
    ]
    lines += [f"does not fit: {said}" for said in found.advice]
    lines += [f"assumed: {said}" for said in found.assumed if said != found.stand_in]
    return "\n".join(lines)


def _limit(value: int) -> str:
    return f"{value:,}" if value else "none"


def check_plot(path: str) -> None:
    """Raise UserError for a name that a plot cannot be written to, before anything is computed."""
    if Path(path).suffix not in (".png", ".svg"):
        raise UserError(f"--plot is {path!r}: it must end in .png or .svg")
    if not Path(path).absolute().parent.is_dir():
        raise UserError(
            f"--plot is {path!r}: there is no folder {Path(path).parent}: make it first"
        )


def plot_family(
    path: Path, like: Forecast, models: Sequence[str] = tuple(OPT)
) -> dict[str, list[tuple[int, int]]]:
    """Draw the memory of the OPT family by method, tensors alone, with the batch, length and type of a forecast.

    Args:
        path: a .png or .svg.
        like: see above.
        models: of the family, ascending.

    Returns:
        For each method its points: parameters, bytes.

    Raises:
        UserError: the file cannot be written.
    """
    given = vars(like.device) | {"kind": "gpu", "overhead": type(like.device.overhead)(0, 0)}
    methods = tuple(m for m in METHODS if m.name in _LINES)
    points: dict[str, list[tuple[int, int]]] = {name: [] for name in _LINES}
    for model in models:
        found = plan(
            model,
            batch_size=like.batch_size,
            length=min(like.length, 2048),
            dtype=like.dtype,
            device=Device(**given),
            methods=methods,
            limits=False,
        )
        for row in found.rows:
            if row.why_not is None:
                points[row.method].append((found.parameters.total, row.memory))
    points = {name: found for name, found in points.items() if found}
    _draw(path, points, like)
    return points


def _draw(path: Path, points: dict[str, list[tuple[int, int]]], like: Forecast) -> None:
    # not pyplot: no global state, no window system
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 5.2), dpi=110, layout="constrained")
    axes = figure.subplots()
    for name, found in points.items():
        colour, style, width = _LINES[name]
        x, y = [p for p, _ in found], [b / 1e9 for _, b in found]
        axes.plot(x, y, style, color=colour, linewidth=width, marker="o", markersize=3, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    left: Any = axes.get_xlim()[0]
    for name, held in _DEVICES.items():
        axes.axhline(held / 1e9, color="#555555", linewidth=0.8, linestyle=(0, (6, 4)))
        at = (left, held / 1e9)
        axes.annotate(
            name, at, va="bottom", fontsize="small", xytext=(4, 1), textcoords="offset points"
        )
    sizes = sorted({p for found in points.values() for p, _ in found})
    axes.set_xticks(sizes, [_short(p) for p in sizes], fontsize="small")
    axes.set_xticks([], minor=True)
    axes.set_xlabel("parameters (OPT)")
    axes.set_ylabel("memory of a step, GB")
    axes.set_title(
        f"{like.batch_size} rows of {like.length} tokens, {like.dtype}; weights, what is kept, and what a step has alive",
        fontsize="small",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="lower right")
    FigureCanvasAgg(figure)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    with writing(path):
        try:
            figure.savefig(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _short(count: int) -> str:
    return f"{count / 1e9:.3g}B" if count >= 1e9 else f"{count / 1e6:.0f}M"
