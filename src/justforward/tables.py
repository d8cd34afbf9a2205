"""What a grid of cells comes to: figures for each method and task, as Markdown and as LaTeX. No torch in here.

A figure is the mean over the seeds with the sample standard deviation, in percent. A record is a line of results.jsonl
(`compare`).
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Record = Mapping[str, Any]

GIB = 2**30
NOTHING = "-"


@dataclass(frozen=True)
class Figure:
    """The values of one method on one task, one a seed, and what they come to."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return math.fsum(self.values) / len(self.values)

    @property
    def sd(self) -> float | None:
        """Sample standard deviation (n - 1); None of a single value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        spread = "" if self.sd is None else f" ({100 * self.sd:.1f})"
        return percent(self.mean) + spread


@dataclass(frozen=True)
class Cost:
    """What a cell of a method takes: of each task the median over seeds, of these the median; None: not known.

    Attributes:
        peak: largest resident memory of the process, in bytes.
        seconds: from its start to its end.
        forwards: forward passes over a batch while tuning.
        backwards: the same of backward passes.
    """

    peak: float | None
    seconds: float | None
    forwards: float | None
    backwards: float | None


@dataclass(frozen=True)
class Summary:
    """Figures by (method, task), where there are any, and costs by method.

    Attributes:
        metrics: of each task the metric that its figures are of.
        best: the methods with the highest mean of each task, as it is shown; of "mean" that over tasks.
        means: mean over tasks of the methods that have a figure on all of several.
    """

    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    metrics: dict[str, str]
    figures: dict[tuple[str, str], Figure]
    costs: dict[str, Cost]
    means: dict[str, float] = field(default_factory=dict)
    best: dict[str, set[str]] = field(default_factory=dict)

    def runs(self, method: str) -> str:
        """How many seeds a method's figures are over: "3", or "2 to 3" where tasks differ."""
        found = {len(f.values) for (m, _), f in self.figures.items() if m == method}
        if not found:
            return NOTHING
        return str(min(found)) if len(found) == 1 else f"{min(found)} to {max(found)}"


def percent(value: float) -> str:
    """``0.7834`` -> ``"78.3"``."""
    return f"{100 * value:.1f}"


def summarise(tasks: Sequence[str], methods: Sequence[str], records: Sequence[Record]) -> Summary:
    """What the records of finished cells come to; trials and failed cells do not count."""
    done = [r for r in records if r["status"] == "ok" and r["trial"] is None]
    figures: dict[tuple[str, str], Figure] = {}
    metrics: dict[str, str] = {}
    for task in tasks:
        for method in methods:
            mine = [r for r in done if (r["task"], r["method"]) == (task, method)]
            if mine:
                figures[method, task] = Figure(tuple(float(r["value"]) for r in mine))
                metrics.setdefault(task, str(mine[0]["metric"]))
    means: dict[str, float] = {}
    if len(tasks) > 1:
        for method in methods:
            mine_of = [figures[method, task].mean for task in tasks if (method, task) in figures]
            if len(mine_of) == len(tasks):
                means[method] = math.fsum(mine_of) / len(tasks)
    best = {
        task: _best({m: figures[m, task].mean for m in methods if (m, task) in figures})
        for task in tasks
    }
    return Summary(
        tasks=tuple(tasks),
        methods=tuple(methods),
        metrics=metrics,
        figures=figures,
        costs={method: _cost([r for r in done if r["method"] == method]) for method in methods},
        means=means,
        best={**best, "mean": _best(means)},
    )


def _best(means: Mapping[str, float]) -> set[str]:
    """Those that show the highest figure; of one alone there is no best."""
    shown = {method: round(100 * mean, 1) for method, mean in means.items()}
    return (
        {m for m, value in shown.items() if value == max(shown.values())}
        if len(shown) > 1
        else set()
    )


def _cost(records: Sequence[Record]) -> Cost:
    def median(name: str) -> float | None:
        tasks: dict[str, list[float]] = {}
        for record in records:
            if record.get(name) is not None:
                tasks.setdefault(record["task"], []).append(float(record[name]))
        return statistics.median(map(statistics.median, tasks.values())) if tasks else None

    return Cost(median("peak_bytes"), median("seconds"), median("forwards"), median("backwards"))


# ------------------------------------------------------------------------------------------- tables


def values(summary: Summary) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    """Heads, and for each method its texts, each with whether it is the best."""
    heads = [
        "method",
        "seeds",
        *(f"{t} ({summary.metrics.get(t, NOTHING)})" for t in summary.tasks),
    ]
    heads += ["mean"] if summary.means else []
    rows = []
    for method in summary.methods:
        row = [(method, False), (summary.runs(method), False)]
        for task in summary.tasks:
            figure = summary.figures.get((method, task))
            row.append((str(figure or NOTHING), method in summary.best[task]))
        if summary.means:
            mean = summary.means.get(method)
            text = NOTHING if mean is None else percent(mean)
            row.append((text, method in summary.best["mean"]))
        rows.append(row)
    return heads, rows


def costs(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Heads, and for each method its peak memory (GiB), seconds and passes."""
    rows = []
    for method in summary.methods:
        cost = summary.costs[method]
        gib = None if cost.peak is None else cost.peak / GIB
        texts = [
            (gib, ".2f"),
            (cost.seconds, ".0f" if (cost.seconds or 0) >= 100 else ".1f"),
            (cost.forwards, ".0f"),
            (cost.backwards, ".0f"),
        ]
        rows.append([method, *(NOTHING if x is None else format(x, spec) for x, spec in texts)])
    return ["method", "peak memory (GiB)", "seconds", "forwards", "backwards"], rows


VALUES_ARE = (
    "Test figures in percent: mean over seeds, with the sample standard deviation in brackets where there are "
    "two seeds or more; the best of each column in bold."
)
COSTS_ARE = (
    "Peak resident memory and wall time of the whole process, and forward and backward passes over a batch while "
    "tuning: of each task the median over seeds, of these the median."
)


def markdown(summary: Summary) -> str:
    """Both tables, with what they show."""
    heads, rows = values(summary)
    marked = [[f"**{_md(t)}**" if best else _md(t) for t, best in row] for row in rows]
    scores = _grid([_md(head) for head in heads], marked)
    heads, plain = costs(summary)
    spent = _grid([_md(head) for head in heads], [[_md(text) for text in row] for row in plain])
    return f"{VALUES_ARE}\n\n{scores}\n\n{COSTS_ARE}\n\n{spent}\n"


def _grid(heads: list[str], rows: list[list[str]]) -> str:
    """Columns of equal width: the first to the left, figures to the right."""
    widths = [max(3, *map(len, column)) for column in zip(heads, *rows, strict=True)]

    def line(texts: Sequence[str]) -> str:
        cells = [texts[0].ljust(widths[0])]
        cells += [text.rjust(width) for text, width in zip(texts[1:], widths[1:], strict=True)]
        return f"| {' | '.join(cells)} |"

    rule = "|".join([":" + "-" * (widths[0] + 1), *("-" * (w + 1) + ":" for w in widths[1:])])
    return "\n".join([line(heads), f"|{rule}|", *map(line, rows)])


def _md(text: str) -> str:
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", " ".join(text.split()))


def latex(summary: Summary) -> str:
    """Both tables for a paper; they need the package booktabs."""
    heads, rows = values(summary)
    bold = [[rf"\textbf{{{_tex(t)}}}" if best else _tex(t) for t, best in row] for row in rows]
    scores = _tabular([_tex(head) for head in heads], bold, VALUES_ARE)
    heads, plain = costs(summary)
    spent = _tabular([_tex(h) for h in heads], [[_tex(t) for t in row] for row in plain], COSTS_ARE)
    return f"% needs \\usepackage{{booktabs}}\n{scores}\n{spent}"


def _tabular(heads: list[str], rows: list[list[str]], caption: str) -> str:
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_tex(caption)}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}",
        r"\toprule",
        " & ".join(heads) + r" \\",
        r"\midrule",
        *(" & ".join(row) + r" \\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    **{c: "\\" + c for c in "&%$#_{}"},
}


def _tex(text: str) -> str:
    if text == NOTHING:
        return "--"
    return "".join(_TEX.get(c, c) for c in " ".join(text.split()))
