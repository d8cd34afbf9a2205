"""`justforward train` without a numeric option against plain MeZO at the best of twelve settings, on tasks and prompts.

    python benchmarks/race/defaults.py --part grid --part again --part default --part short    # goes on where it stopped
    python benchmarks/race/defaults.py --where smollm2-rte --part grid              # one place
    python benchmarks/race/defaults.py --table                                      # into docs/race.md

Every run is the command itself, in this process. MeZO: weight space, the paper's rule, from the base model, the rate
falling to 0 over the default's own 400 forwards of 8 rows; all weights, or those that a place's `plain` options name.
Of the grid's seed 0 runs the one with the least validation loss is the tuned one; its own best loss is the goal.
`short` and `shorter` are the default with 50 and 24 forwards, of which half go into its start.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from report import DOCS, HERE, fill, number

from justforward.cli import main as justforward
from justforward.folder import value_of

SHORT = {"short": 50, "shorter": 24}  # --max-forwards
PLAIN = ["--estimator=weight", "--rule=sgd", "--start=base", "--patience=0", "--keep=best"]
RESULTS = HERE / "defaults.jsonl"
Line = dict[str, Any]


def points(grid: dict[str, list[float]]) -> list[tuple[float, float]]:
    """Rates and lengths of looks."""
    return [(lr, eps) for eps in grid["eps"] for lr in grid["lr"]]


def setting(line: Line) -> tuple[float, float]:
    return line["lr"], line["eps"]


def run(where: dict[str, Any], options: list[str], seed: int) -> Line:
    """One command, and what its folder says."""
    folder = Path(tempfile.mkdtemp())
    begun = time.process_time()
    given = ["train", *where["options"], *options, f"--seed={seed}", "--split-seed=0", "--threads=1", "--json", f"--out={folder}/run"]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        code = justforward(given)
    try:
        return {
            "code": code,
            "seconds": round(time.process_time() - begun, 1),
            **read(folder / "run"),
        }
    finally:
        shutil.rmtree(folder)


def read(folder: Path) -> Line:
    """The curve of validations (forwards, loss, metric, seconds since the base was scored), their gains over the start (with standard
    errors), test figures before and after, and the step that is kept.
    """
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    by: dict[str, list[Line]] = {}
    for line in lines:
        by.setdefault(line["kind"], []).append(line)

    def pair(line: Line) -> list[float]:
        return [round(line["loss"], 4), round(value_of(line), 4)]

    begun = by["before"][0]["seconds"]
    result = folder / "result.json"
    after = json.loads(result.read_text()) if result.exists() else {}
    return {
        "curve": [
            [m["forwards"], *pair(m), round(m["seconds"] - begun, 1)]
            for m in by.get("validation", [])
        ],
        "gains": [
            [round(m["gain"], 4), round(m["gain_error"], 4)]
            for m in by.get("validation", [])
            if "gain" in m
        ],
        "before": pair(by["before"][0]),
        "after": [round(after["loss"], 4), round(after["value"], 4)] if after else None,
        "kept": [after["kept_step"], after["best_step"]] if after else None,
    }


def load(path: Path) -> dict[tuple[Any, ...], Line]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {key(line): line for line in map(json.loads, lines)}


def key(line: Line) -> tuple[Any, ...]:
    return tuple(line.get(k) for k in ("where", "kind", "lr", "eps", "seed"))


def at(known: dict[tuple[Any, ...], Line], name: str) -> list[Line]:
    """The lines of a place."""
    return [line for line in known.values() if line["where"] == name]


def best(curve: list[list[float]]) -> float:
    return min((point[1] for point in curve), default=math.inf)


def first(curve: list[list[float]], loss: float) -> list[float]:
    """The first validation with at most this loss; nothing but infinities where there is none."""
    return next((point for point in curve if point[1] <= loss), [math.inf] * 4)


def of_setting(known: list[Line], top: Line) -> list[Line]:
    """The runs of the grid, of all seeds, with a line's setting."""
    return [k for k in known if k["kind"] == "grid" and setting(k) == setting(top)]


def tuned(known: list[Line]) -> Line:
    """The setting of the grid with the least validation loss, of seed 0."""
    return min((k for k in known if k["kind"] == "grid" and k["seed"] == 0), key=lambda k: best(k["curve"]))  # fmt: skip


def goal_of(here: list[Line]) -> tuple[list[Line], float, float, float] | None:
    """Of a place's lines the tuned runs, the loss to reach, and their forwards and seconds to their least; None without a grid,
    or where MeZO's least loss is the base model's.
    """
    if not any(k["kind"] == "grid" for k in here):
        return None
    same = of_setting(here, tuned(here))
    firsts = [first(k["curve"], best(k["curve"])) for k in same]
    full, seconds = (statistics.median(point[i] for point in firsts) for i in (0, 3))
    if not full:
        return None
    return same, statistics.mean(best(k["curve"]) for k in same), full, seconds


def whole(where: dict[str, Any], forwards: float) -> float:
    """MeZO's forwards as whole ones: a part of the layers for each look, and the rest once for each training row."""
    if "rows" not in where:
        return forwards
    batch = 8
    met = min(forwards / 2 * batch, where["rows"]) / batch
    return float(where["moved"] * forwards + (1 - where["moved"]) * met)


def table(plan: dict[str, Any], known: dict[tuple[Any, ...], Line]) -> str:
    """Goal, forwards to it, and how often the end is worse than the beginning."""
    rows = [
        "| model, task | best lr, eps (of so many) | its loss (seeds) | forwards to it (whole ones) | default's loss (seeds) | forwards to MeZO's loss | ratio, each seed (of whole ones) | test loss before, default after | accuracy | runs with a worse loss, accuracy |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, where in plan["defaults"]["where"].items():
        here, of = at(known, name), at(known, where.get("of", name))
        ours = [k for k in of if k["kind"] == "default"]
        worse = sum(1 for k in ours if k["after"] is None or k["after"][0] > k["before"][0])
        fewer = sum(1 for k in ours if k["after"] is None or k["after"][1] < k["before"][1])
        ends = [k["after"][0] for k in ours if k["after"]]
        if not ours:
            continue
        before, right = ours[0]["before"]
        found = statistics.mean(k["after"][1] for k in ours if k["after"])
        tail = f"{before:.3f}, {statistics.mean(ends):.3f} | {right:.3f}, {found:.3f} | {worse}, {fewer} of {len(ours)} |"
        losses = ", ".join(number(best(k["curve"]), 3) for k in ours)
        aim = goal_of(here)
        tried = sum(1 for k in here if k["kind"] == "grid" and k["seed"] == 0)
        if aim is None:
            missing = f"no gain ({tried})" if tried else "not run"
            if "of" not in where:
                rows.append(f"| {name} | {missing} | | | {losses} | | | {tail}")
            continue
        same, goal, full, _ = aim
        top = same[0]
        taken = [first(k["curve"], goal)[0] for k in ours]
        work = whole(where, full)
        rows.append(
            f"| {name} | {top['lr']:g}, {top['eps']:g} ({tried}) | {', '.join(number(best(k['curve']), 3) for k in same)} | {full:g} ({work:.0f}) | {losses} "
            f"| {', '.join(number(t, 0) for t in taken)} "
            f"| {', '.join(f'{number(t / full, 2)} ({number(t / work, 2)})' for t in taken)} | {tail}"
        )
    return "\n".join(rows)


def shorter(plan: dict[str, Any], known: dict[tuple[Any, ...], Line]) -> str:
    """What the default needs with few forwards to be where tuned MeZO ends."""
    rows = [
        "| model, task | loss to reach | MeZO: forwards (whole ones), seconds | `--max-forwards` | forwards | of MeZO's, median (of its whole ones) | seconds | of MeZO's, median | least loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    ratios: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for name, where in plan["defaults"]["where"].items():
        aim, of = goal_of(at(known, name)), at(known, where.get("of", name))
        for kind, forwards in SHORT.items():
            ours = [k for k in of if k["kind"] == kind]
            if aim is None or not ours:
                continue
            _, goal, full, seconds = aim
            found = [first(k["curve"], goal) for k in ours]
            taken, clock = ([point[i] for point in found] for i in (0, 3))
            work = whole(where, full)
            share, of_work, of_time = (
                statistics.median(taken) / full,
                statistics.median(taken) / work,
                statistics.median(clock) / seconds,
            )
            moved = "last third" if "moved" in where else "all layers"
            ratios.setdefault((kind, moved), []).append((share, of_work, of_time))
            losses = ", ".join(number(best(k["curve"]), 3) for k in ours)
            rows.append(
                f"| {name} | {goal:.3f} | {full:g} ({work:.0f}), {seconds:.0f} | {forwards} "
                f"| {', '.join(number(t, 0) for t in taken)} | {number(share, 3)} ({number(of_work, 3)}) "
                f"| {', '.join(number(t, 0) for t in clock)} | {number(of_time, 2)} | {losses} |"
            )
    for (kind, moved), each in sorted(ratios.items()):
        middle = [number(statistics.median(column), 3) for column in zip(*each, strict=True)]
        rows.append(f"| median, MeZO on {moved} | | | {SHORT[kind]} | | {middle[0]} ({middle[1]}) | | {middle[2]} | |")  # fmt: skip
    return "\n".join(rows)


def main() -> None:
    """The parts that are named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--part", action="append", choices=["grid", "default", "again", *SHORT], default=[]
    )
    parser.add_argument("--where", action="append")
    parser.add_argument(
        "--points", type=int, default=12, help="so many of the grid, from its first"
    )
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    plan = yaml.safe_load((HERE / "race.yaml").read_text())
    known = load(RESULTS)
    for name in given.where or plan["defaults"]["where"]:
        where = plan["defaults"]["where"][name]
        for part in given.part:
            by_default = part == "default" or part in SHORT
            if by_default and "of" in where:
                continue  # they are run there
            if part != "default" and "grid" not in where:
                continue  # the default alone, to see whether it ends worse
            todo: list[tuple[Line, list[str]]] = []
            if by_default:
                options = [f"--max-forwards={SHORT[part]}"] if part in SHORT else []
                seeds = where["seeds"] if part == "default" else [0, *where["again"]]
                todo = [({"kind": part, "seed": seed}, options) for seed in seeds]
            else:
                chosen, seeds = points(where["grid"])[: given.points], [0]
                if part == "again":  # the best one with the other seeds
                    chosen, seeds = [setting(tuned(at(known, name)))], where["again"]
                for lr, eps in chosen:
                    for seed in seeds:
                        line = {"kind": "grid", "lr": lr, "eps": eps, "seed": seed}
                        plain = [*PLAIN, *where.get("plain", [])]
                        todo.append((line, [*plain, f"--lr={lr}", f"--eps={eps}"]))
            for line, options in todo:
                line = {"where": name, **line}
                if key(line) in known:
                    continue
                line |= run(where, options, line["seed"])
                known[key(line)] = line
                with RESULTS.open("a") as file:
                    file.write(json.dumps(line, separators=(",", ":")) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                print(name, line["kind"], line.get("lr"), line.get("eps"), line["seed"], line["code"], best(line["curve"]), line["seconds"], flush=True)  # fmt: skip
    if given.table:
        page = DOCS / "race.md"
        text = fill(page.read_text(), "defaults", table(plan, known))
        page.write_text(fill(text, "short", shorter(plan, known)))


if __name__ == "__main__":
    main()
