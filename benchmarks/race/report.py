"""The race's tables and plots: from results.jsonl into docs/race.md, between its marks, and docs/race/.

    python benchmarks/race/report.py

The goal of a problem is the mean over seeds of the validation loss that MeZO ends with. A run reaches it where the
line between two of its scores crosses it. The area is the mean of that line over the budget.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

HERE = Path(__file__).parent
DOCS = HERE.parent.parent / "docs"
BASELINE = "mezo"
NAMED = 7  # lines of a plot that have a colour
# Not in the summary: hardly anything comes below the loss of always giving the labels' frequencies (docs/race.md)
APART = ("mlp", "mlp-calibrated")
Line = dict[str, Any]
Problem = tuple[str, str, int]  # model, task, budget


def crossing(curve: list[list[float]], goal: float) -> float:
    """Example-forwards at which a curve first is at the goal; infinite if it never is."""
    before: list[float] | None = None
    for used, loss in curve:
        if loss <= goal:
            if before is None or before[1] == loss:
                return used
            share = (before[1] - goal) / (before[1] - loss)
            return before[0] + share * (used - before[0])
        before = [used, loss]
    return math.inf


def area(curve: list[list[float]]) -> float:
    """Mean loss over the run."""
    whole = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(curve))
    return whole / (curve[-1][0] - curve[0][0])


class Entry:
    """A method's runs on a problem."""

    def __init__(self, runs: list[Line], goal: float, budget: int) -> None:
        self.runs = sorted(runs, key=lambda run: int(run["seed"]))
        self.finals = [math.inf if r["final"] is None else r["final"] for r in self.runs]
        self.mean = statistics.mean(self.finals)
        self.sd = statistics.stdev(self.finals) if math.isfinite(self.mean) else math.nan
        # a baseline that ends at its goal takes the budget, whatever its seeds' ends differ by
        self.ratios = [crossing(r["curve"], goal) / budget for r in self.runs]
        self.ratio = statistics.median(self.ratios)
        self.area = statistics.mean(area(r["curve"]) for r in self.runs)
        self.test = statistics.mean(math.nan if not r["test"] else r["test"][1] for r in self.runs)
        self.seconds = statistics.mean(r["seconds"] for r in self.runs)
        self.notch = self.runs[0]["notch"]


def entries(lines: list[Line]) -> dict[Problem, dict[str, Entry]]:
    """All that has at least two seeds, by problem and method, in the order of their losses."""
    runs: dict[Problem, dict[str, list[Line]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        if "curve" in line:
            runs[line["model"], line["task"], line["budget"]][line["method"]].append(line)
    out = {}
    for problem, methods in runs.items():
        whole = max(b for m, t, b in runs if (m, t) == problem[:2])
        full = runs[*problem[:2], whole].get(BASELINE, [])
        ends = [line["final"] for line in full]
        goal = statistics.mean(ends) if len(ends) > 1 else -math.inf
        found = {m: Entry(r, goal, whole) for m, r in methods.items() if len(r) > 1}
        out[problem] = dict(sorted(found.items(), key=lambda pair: pair[1].mean))
    return out


def left(lines: list[Line], problem: Problem, raced: dict[str, Entry]) -> str:
    """Methods whose search ended too far behind MeZO's, with the mean loss of its best rate."""
    ends: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        if "curve" not in line and (line["model"], line["task"], line["budget"]) == problem:
            final = math.inf if line["final"] is None else line["final"]
            ends[line["method"]][line["notch"]].append(final)
    best = {m: min(map(statistics.mean, e.values())) for m, e in ends.items()}
    behind = sorted((loss, m) for m, loss in best.items() if m not in raced)
    if not behind or BASELINE not in best:
        return ""
    said = ", ".join(f"{m} {loss:.3f}" for loss, m in behind)
    return (
        f"\n\nLeft after the search (loss of its seeds, MeZO's there {best[BASELINE]:.3f}): {said}."
    )


def number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


def table(found: dict[str, Entry]) -> str:
    """One problem's."""
    rows = [
        "| method | rate | loss (sd) | area | forwards to MeZO's loss | reached | test | CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method, e in found.items():
        reached = sum(map(math.isfinite, e.ratios))
        rows.append(
            f"| {method} | 1e{e.notch / 4:g} | {number(e.mean, 3)} ({number(e.sd, 3)}) | {e.area:.3f} | {number(e.ratio, 2)} "
            f"| {reached} of {len(e.ratios)} | {number(100 * e.test, 1)} | {e.seconds:.1f} |"
        )
    return "\n".join(rows)


def plot(problem: Problem, found: dict[str, Entry], path: Path) -> None:
    """Mean validation loss of the seeds."""
    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), dpi=90)
    for place, (method, e) in enumerate(found.items()):
        if not math.isfinite(e.mean):
            continue
        longest = min(len(r["curve"]) for r in e.runs)
        points = [
            [statistics.mean(r["curve"][i][k] for r in e.runs) for k in (0, 1)]
            for i in range(longest)
        ]
        xs, ys = zip(*points, strict=True)
        if method == BASELINE:
            axes.plot(xs, ys, color="black", linewidth=2.5, label=method, zorder=5)
        elif place < NAMED:
            axes.plot(xs, ys, linewidth=1.5, label=method, zorder=4)
        else:
            axes.plot(xs, ys, color="0.8", linewidth=0.7)
    axes.set_xlabel("example-forwards")
    axes.set_ylabel("validation loss")
    axes.set_title(f"{problem[0]}, {problem[1]}", fontsize=10)
    axes.legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def summary(found: dict[Problem, dict[str, Entry]]) -> str:
    """By median over the problems of the ratio of forwards; MeZO's loss less the method's, in MeZO's sd."""
    whole = {
        p: e
        for p, e in found.items()
        if BASELINE in e
        and p[0] not in APART
        and p[2] == max(b for m, t, b in found if (m, t) == p[:2])
    }
    names = [f"{m} {t}" for m, t, _ in whole]
    rows = [
        f"| method | median ratio | {' | '.join(names)} |",
        "|---|---|" + "---|" * len(names),
    ]
    methods = {m for e in whole.values() for m in e}
    ranked = []
    for method in methods:
        ratios = [e[method].ratio for e in whole.values() if method in e]
        cells = []
        for e in whole.values():
            if method not in e:
                cells.append("")
                continue
            gain = e[BASELINE].mean - e[method].mean
            cells.append(f"{number(e[method].ratio, 2)} ({number(gain, 3)})")
        losses = statistics.mean(
            e[method].mean - e[BASELINE].mean for e in whole.values() if method in e
        )
        ranked.append((statistics.median(ratios), losses, method, cells))
    for ratio, _, method, cells in sorted(ranked):
        rows.append(f"| {method} | {number(ratio, 2)} | {' | '.join(cells)} |")
    return "\n".join(rows)


def horizons(found: dict[Problem, dict[str, Entry]]) -> str:
    """What shorter budgets end with, each with a rate of its own, beside MeZO's goal."""
    rows = ["| problem | method | budget | loss (sd) | MeZO's with the whole budget |", "|---|---|---|---|---|"]  # fmt: skip
    for (model, task, budget), methods in sorted(found.items()):
        whole = max(b for m, t, b in found if (m, t) == (model, task))
        base = found[model, task, whole].get(BASELINE)
        if budget == whole or base is None:
            continue
        for method, e in methods.items():
            rows.append(
                f"| {model} {task} | {method} | {budget / whole:g} | {number(e.mean, 3)} ({number(e.sd, 3)}) | {base.mean:.3f} ({base.sd:.3f}) |"
            )
    return "\n".join(rows)


def variances(path: Path) -> str:
    """Of variance.jsonl."""
    keys = ("loss", "signal", "data", "rounding", "trace", "rank", "best_step", "per_example")
    rows = [
        "| model, task | step | loss | signal | data | rounding | tr(F) (its error) | rank | best step | for each example |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for line in map(json.loads, path.read_text().splitlines()):
        values = [f"{line[k]:.3g}" for k in keys]
        values[4] += f" ({line['trace_error']:.2g})"
        rows.append(f"| {line['model']} {line['task']} | {line['step']} | {' | '.join(values)} |")
    return "\n".join(rows)


def fill(text: str, name: str, content: str) -> str:
    """Put a part between its marks."""
    marks = f"<!-- {name} -->", f"<!-- /{name} -->"
    found, count = re.subn(
        f"{marks[0]}.*?{marks[1]}",
        lambda _: f"{marks[0]}\n{content}\n{marks[1]}",
        text,
        flags=re.DOTALL,
    )
    if count != 1:
        raise SystemExit(f"docs/race.md must have {marks[0]} ... {marks[1]} once")
    return found


def main() -> None:
    """All parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    parser.add_argument("--docs", type=Path, default=DOCS)
    given = parser.parse_args()
    lines = [json.loads(line) for line in given.results.read_text().splitlines()]
    found = entries(lines)
    page = given.docs / "race.md"
    parts = []
    for problem, methods in found.items():
        model, task, budget = problem
        if budget == max(b for m, t, b in found if (m, t) == problem[:2]) and methods:
            part = f"### {model}, {task}: {budget} example-forwards\n\n{table(methods)}"
            part += left(lines, problem, methods)
            if model not in APART:
                plot(problem, methods, given.docs / "race" / f"{model}-{task}.png")
                part += f"\n\n![{model}, {task}](race/{model}-{task}.png)"
            parts.append(part)
    text = page.read_text()
    text = fill(text, "summary", summary(found))
    text = fill(text, "tables", "\n\n".join(parts))
    text = fill(text, "horizons", horizons(found))
    if (HERE / "variance.jsonl").exists():
        text = fill(text, "variance", variances(HERE / "variance.jsonl"))
    page.write_text(text)


if __name__ == "__main__":
    main()
