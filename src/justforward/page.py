"""A grid as one page that needs nothing else: no script, no font, no network. No torch in here.

The words and the style are in templates/compare.html.j2; what is shown in them is made here.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from justforward.config import CompareConfig
from justforward.grid import METHODS, Grid
from justforward.progress import spell_seconds
from justforward.svg import SERIES, Line, Row, bars, curves, dots, series_class
from justforward.tables import COSTS_ARE, GIB, VALUES_ARE, Record, Summary, costs, percent, values

TEMPLATES = Path(__file__).with_name("templates")


def page(
    config: CompareConfig,
    grid: Grid,
    summary: Summary,
    records: Sequence[Record],
    machine: Mapping[str, Any],
) -> str:
    """index.html.

    Args:
        config: what was asked for.
        grid: its cells.
        summary: what the records come to.
        records: of the cells and trials that have ended.
        machine: what they ran on.
    """
    templates = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    cells = [r for r in records if r["trial"] is None]
    done = [r for r in cells if r["status"] == "ok"]
    return templates.get_template("compare.html.j2").render(
        title=f"{_count(len(grid.methods), 'method')} on {_count(len(grid.tasks), 'task')}",
        model=config.model,
        seeds=grid.seeds,
        done=len(done),
        total=len(grid.cells),
        failed=[r for r in cells if r["status"] != "ok"],
        values=values(summary),
        values_are=VALUES_ARE,
        costs=costs(summary),
        costs_are=COSTS_ARE,
        dots=_dots(summary),
        curves=_curves(summary, done),
        bars=_bars(summary),
        searches=_searches(grid, records),
        tasks={task: _common(grid, task=task) for task in grid.tasks},
        methods={method: _own(config, grid, method) for method in grid.methods},
        rows=_rows(grid, done),
        machine={key: machine[key] for key in ("cpu", "platform", "threads") if key in machine},
        versions=machine.get("versions", {}),
        again="justforward compare --config compare.yaml --out NEW",
        commands=[(_name(r), shlex.join(r["command"])) for r in cells],
        caveats=_caveats(config, grid, records),
        spell=_spell,
        series=range(SERIES),
        key={method: series_class(i) for i, method in enumerate(grid.methods)},
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _name(record: Record) -> str:
    return f"{record['task']} · {record['method']} · seed {record['seed']}"


def _spell(value: Any) -> str:
    """A value of an option."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# ------------------------------------------------------------------------------------------ plots


def _dots(summary: Summary) -> list[tuple[str, str]]:
    plots = []
    for task in summary.tasks:
        rows = [
            Row(method, i, figure.values, str(figure))
            for i, method in enumerate(summary.methods)
            if (figure := summary.figures.get((method, task))) is not None
        ]
        if rows:
            metric = summary.metrics[task]
            plots.append((task, dots(f"{task}: test {metric}", rows, f"test {metric} (%)")))
    return plots


def _curves(summary: Summary, done: Sequence[Record]) -> list[tuple[str, str]]:
    plots = []
    for task in summary.tasks:
        lines = []
        for i, method in enumerate(summary.methods):
            mine = [r for r in done if (r["task"], r["method"]) == (task, method)]
            parts = [[(p[0], p[2]) for p in r["curve"]] for r in mine if len(r["curve"]) > 1]
            if parts:
                lines.append(Line(method, i, _mean(parts), parts if len(parts) > 1 else ()))
        if lines:
            title = f"{task}: validation {summary.metrics[task]} against forward passes"
            plots.append((task, curves(title, lines, "forward passes over a batch")))
    return plots


def _mean(parts: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Mean of several curves, at the places that all of them have."""
    tables = [dict(part) for part in parts]
    shared = sorted(set.intersection(*(set(table) for table in tables)))
    return [(x, math.fsum(table[x] for table in tables) / len(tables)) for x in shared]


def _bars(summary: Summary) -> list[tuple[str, str]]:
    spelled = {
        "Peak memory": {
            m: (c.peak, f"{(c.peak or 0) / GIB:.2f} GiB") for m, c in summary.costs.items()
        },
        "Time of a cell": {m: (c.seconds, _time(c.seconds or 0)) for m, c in summary.costs.items()},
    }
    plots = []
    for title, costs_of in spelled.items():
        rows = [
            Row(method, i, (), "not known") if value is None else Row(method, i, (value,), said)
            for i, (method, (value, said)) in enumerate(costs_of.items())
        ]
        if any(row.values for row in rows):
            plots.append((title, bars(title, rows)))
    return plots


def _time(seconds: float) -> str:
    return spell_seconds(seconds) if seconds >= 60 else f"{seconds:.1f} s"


# ------------------------------------------------------------------------------------------ tables


def _searches(grid: Grid, records: Sequence[Record]) -> list[dict[str, Any]]:
    """Of each search its trials, with what they reached in validation, and which one was chosen."""
    found = []
    for task in grid.tasks:
        for method in grid.methods:
            cells = [c for c in grid.cells if (c.task, c.method) == (task, method)]
            mine = [r for r in records if (r["task"], r["method"]) == (task, method)]
            chosen = next((r["values"] for r in mine if r["trial"] is None), None)
            trials = [
                {
                    "values": ", ".join(f"{k} {_spell(v)}" for k, v in r["values"].items()),
                    "reached": percent(r["validation_value"])
                    if r["status"] == "ok"
                    else r["status"],
                    "chosen": r["values"] == chosen,
                }
                for r in mine
                if r["trial"] is not None
            ]
            if cells and cells[0].search and trials:
                found.append({"task": task, "method": method, "trials": trials})
    return found


def _common(grid: Grid, task: str) -> dict[str, Any]:
    """The options that a task's cells share."""
    first, *others = [c.options for c in grid.cells if c.task == task]
    shared = {k: v for k, v in first.items() if all(o.get(k) == v for o in others)}
    return {k: v for k, v in shared.items() if k not in ("method", "model", "seed")}


def _own(config: CompareConfig, grid: Grid, method: str) -> dict[str, Any]:
    """The command and the options that a method's cells have of their own."""
    cells = [c for c in grid.cells if c.method == method]
    kind = cells[0].kind
    command = METHODS[kind] + (f" --method {kind}" if METHODS[kind] == "baseline" else "")
    shared = {key for task in grid.tasks for key in _task_options(config, task)}
    own = {
        k: v
        for k, v in cells[0].options.items()
        if k not in shared and k not in ("method", "model", "seed", "task")
    }
    searched = {k: f"one of {_spell(v)}" for k, v in cells[0].search.items()}
    return {"command": f"justforward {command}", "options": {**own, **searched}}


def _task_options(config: CompareConfig, task: str) -> list[str]:
    for key, options in config.tasks.items():
        if task in (str(key), Path(str(key)).stem):
            return [str(name).replace("-", "_") for name in options or {}]
    return []


def _rows(grid: Grid, done: Sequence[Record]) -> dict[str, str]:
    """How many rows each task was learned from, chosen by and tested on."""
    out = {}
    for task in grid.tasks:
        rows = next((r["rows"] for r in done if r["task"] == task and r["rows"].get("train")), None)
        if rows is not None:
            out[task] = (
                f"{rows['train']} train, {rows['validation']} validation, {rows['test']} test"
            )
    return out


# ----------------------------------------------------------------------------------------- caveats


def _caveats(config: CompareConfig, grid: Grid, records: Sequence[Record]) -> list[str]:
    """What a reader should know before believing the figures."""
    cells = [r for r in records if r["trial"] is None]
    done = [r for r in cells if r["status"] == "ok"]
    out = [
        "Test rows choose nothing: the step that is kept and the values that are searched are chosen by validation "
        "rows, and a cell's model is scored on the test rows once it is final.",
        "Memory is the largest resident set of a whole process: Python, libraries, weights and scoring included. Time "
        "is that of the same process, loading and scoring included; what else the machine did is in it too.",
        "A backward pass counts apart from the forward pass before it, and costs about as much as two more.",
    ]
    if len(grid.seeds) == 1:
        out.append("One seed shows no spread: a difference between two methods may be chance.")
    else:
        out.append(
            f"The spread is over {len(grid.seeds)} seeds, each with rows, order and noise of its own; of so few it "
            "is itself a rough figure."
        )
    fewer = [
        m
        for m in grid.methods
        if sum(c.method == m for c in grid.cells) < len(grid.seeds) * len(grid.tasks)
    ]
    if fewer:
        out.append(f"Run with fewer seeds: {', '.join(fewer)}.")
    searched = [m for m in grid.methods if any(c.search for c in grid.cells if c.method == m)]
    if searched:
        rest = [m for m in grid.methods if m not in searched]
        out.append(
            f"Options were searched with the first seed for {', '.join(searched)}"
            + (f"; not for {', '.join(rest)}." if rest else ".")
        )
    else:
        out.append(
            "No options were searched: each method ran with those shown, which may suit some better than others."
        )
    for task in grid.tasks:
        tested = {r["rows"].get("test") for r in done if r["task"] == task}
        if len(tested) > 1:
            out.append(
                f"Not all methods were tested on as many rows of {task}: {sorted(map(str, tested))}."
            )
    resumed = sum(bool(r.get("resumed")) for r in done)
    if resumed:
        out.append(
            f"{_count(resumed, 'cell')} went on after a stop: the memory is that of the last process."
        )
    if any(r["peak_bytes"] is None for r in done):
        out.append(
            "Some cells have no memory figure: theirs could not be told from that of the process that started them."
        )
    missing = len(grid.cells) - len(done)
    if missing:
        out.append(
            f"{_count(missing, 'cell')} of {len(grid.cells)} have no result, and no part in the figures."
        )
    return out
