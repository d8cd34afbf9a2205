"""`compare`: methods on tasks over seeds, cell by cell. No torch in here: see `cells`.

It can be stopped at any moment and called again: a cell with a record is not run again, a run that was cut
short is continued. Hyper-parameters are chosen by validation; figures of the test rows are read of the chosen only.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from justforward.board import Board
from justforward.cells import Record, Shop, counted_signals, launcher, outcome, spell_outcome
from justforward.config import CompareConfig
from justforward.grid import Cell, Grid, plan
from justforward.page import page
from justforward.records import GridFolder
from justforward.tables import latex, markdown, summarise

Result = dict[str, Any]
Machine = dict[str, Any]


def machine_now() -> Machine:
    """`prepare.environment_now`, in a process of its own: it needs torch."""
    code = "import json; from justforward.prepare import environment_now as now; print(json.dumps(now()))"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    found: Machine = json.loads(done.stdout)
    return found


def compare(
    config: CompareConfig,
    source: str | None = None,
    board: Board | None = None,
    start: Sequence[str] | None = None,
    machine: Callable[[], Machine] = machine_now,
) -> Result:
    """Run all cells that have no result yet; write the tables and the page.

    Args:
        config: what to compare.
        source: the YAML file that it came from, for messages.
        board: where to show how it goes (default stderr).
        start: what starts a cell's command line (default this Python).
        machine: tells what the cells run on.

    Returns:
        out, cells, ok (how many), failed (task, method, seed, status and error of each), figures (method, task,
        metric, mean, sd, n), costs (by method).

    Raises:
        UserError: something in the input cannot be used, or a file cannot be written.
        KeyboardInterrupt: by Ctrl-C or SIGTERM, once the cell under way has ended.
    """
    grid = plan(config, source)
    with board or Board() as shown, GridFolder(config.out) as folder:
        folder.open(config, grid, shown.note)
        now = machine()
        folder.note_machine(now, shown.note)
        with counted_signals() as stop:
            shop = Shop(
                path=folder.path,
                launcher=launcher() if start is None else start,
                stop=stop,
                held=folder.held,
                threads=config.threads,
                minutes=config.cell_minutes,
                tick=shown.tick,
            )
            work = _Work(config, grid, folder, shop, shown, now)
            try:
                work.run()
            finally:
                result = work.write()
    return result


@dataclass(frozen=True)
class _Work:
    """One call's part of a grid."""

    config: CompareConfig
    grid: Grid
    folder: GridFolder
    shop: Shop
    board: Board
    machine: Machine

    def run(self) -> None:
        """All cells and trials that are due, in order."""
        for cell in self.grid.cells:
            trials = self.grid.trials(cell)
            for trial in trials if cell.seed == self.grid.seeds[0] else ():
                if self._due(trial):
                    self._do(trial)
            if trials and not any(map(self._is_ok, trials)):
                self._keep(outcome(cell, "failed", error="no trial of its search has ended well"))
                continue
            chosen = replace(cell, values=self._best(trials)) if trials else cell
            if self._due(chosen):
                self._do(chosen)
            else:
                self.folder.check_same(chosen, self.folder.records[chosen.key])

    def _due(self, cell: Cell) -> bool:
        """Whether it is to be run.

        A trial that failed is tried again only as long as no cell has been run with what its search chose:
        it might be the best now.
        """
        if cell.trial is None or cell.key not in self.folder.records:
            return not self._is_ok(cell)
        siblings = [c for c in self.grid.cells if (c.task, c.method) == (cell.task, cell.method)]
        return not self._is_ok(cell) and not any(map(self._is_ok, siblings))

    def _is_ok(self, cell: Cell) -> bool:
        record = self.folder.records.get(cell.key)
        return record is not None and record["status"] == "ok"

    def _best(self, trials: Sequence[Cell]) -> dict[str, Any]:
        """The values that are best in validation, of equal ones the first."""
        good = [trial for trial in trials if self._is_ok(trial)]
        best = max(good, key=lambda trial: self.folder.records[trial.key]["validation_value"])
        return best.values

    def _do(self, cell: Cell) -> None:
        if self.shop.stop.asked:
            raise KeyboardInterrupt
        keys = [each.key for each in self._all()]
        place = f"[{keys.index(cell.key) + 1}/{len(keys)}]"
        self.board.begin(f"{place} {cell.name}", self._seconds_left)
        record = self.shop.run(cell)
        self._keep(record)
        self.board.end(spell_outcome(record))

    def _keep(self, record: Record) -> None:
        self.folder.append(record)
        self.write()

    # ------------------------------------------------------------------------------- what it comes to

    def _all(self) -> list[Cell]:
        """Cells and trials."""
        first = self.grid.seeds[0]
        return [
            each
            for cell in self.grid.cells
            for each in (*(self.grid.trials(cell) if cell.seed == first else ()), cell)
        ]

    def _open(self, cell: Cell) -> bool:
        """Whether it has no result so far; a trial may have failed for good."""
        return (
            cell.key not in self.folder.records if cell.trial is not None else not self._is_ok(cell)
        )

    def _seconds_left(self, spent: float) -> float | None:
        """By the mean of the method's cells on that task, else on all tasks, else of all cells; None before the first."""
        ok = [r for r in self.folder.records.values() if r["status"] == "ok"]

        def expected(cell: Cell) -> float:
            same = [r for r in ok if r["method"] == cell.method]
            some = [r for r in same if r["task"] == cell.task] or same or ok
            return math.fsum(float(r["seconds"]) for r in some) / len(some)

        left = [expected(cell) for cell in self._all() if self._open(cell)] if ok else []
        return math.fsum(left) - min(spent, left[0]) if left else None

    def write(self) -> Result:
        """Write tables and page of the records so far; returns the result of the command."""
        grid, records = self.grid, self.folder.records
        found = [records[cell.key] for cell in self._all() if cell.key in records]
        summary = summarise(grid.tasks, grid.methods, found)
        self.folder.write("table.md", markdown(summary))
        self.folder.write("table.tex", latex(summary))
        self.folder.write("index.html", page(self.config, grid, summary, found, self.machine))
        cells = [record for record in found if record["trial"] is None]
        return {
            "out": str(self.folder.path),
            "cells": len(grid.cells),
            "ok": sum(record["status"] == "ok" for record in cells),
            "failed": [
                {name: record[name] for name in ("task", "method", "seed", "status", "error")}
                for record in cells
                if record["status"] != "ok"
            ],
            "figures": [
                {
                    "method": m,
                    "task": t,
                    "metric": summary.metrics[t],
                    "mean": f.mean,
                    "sd": f.sd,
                    "n": len(f.values),
                }
                for (m, t), f in summary.figures.items()
            ],
            "costs": {method: asdict(cost) for method, cost in summary.costs.items()},
        }


def spell_compare(result: Result) -> str:
    """The outcome of `compare` as text."""
    with open(os.path.join(result["out"], "table.md"), encoding="utf-8") as file:
        lines = [file.read()]
    lines += [
        f"{r['task']} {r['method']} seed {r['seed']}: {r['status']}: {r['error']}"
        for r in result["failed"]
    ]
    page_at = os.path.join(result["out"], "index.html")
    lines.append(f"{result['ok']} of {result['cells']} cells have a result; the page: {page_at}")
    return "\n".join(lines)
