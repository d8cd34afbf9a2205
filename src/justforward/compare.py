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
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from justforward.board import Board
from justforward.cells import Record, Shop, counted_signals, launcher, outcome, spell_outcome
from justforward.config import CompareConfig
from justforward.errors import UserError
from justforward.grid import Cell, Grid, plan
from justforward.page import page
from justforward.records import GridFolder, Key
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
        KeyboardInterrupt: by Ctrl-C or SIGTERM, once the cells under way have ended.
    """
    grid = plan(config, source)
    with board or Board() as shown, GridFolder(config.out) as folder:
        folder.open(config, grid, shown.note)
        now = machine()
        now = {**now, "threads": config.threads or now["threads"]}  # what a cell has
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
    begun: set[Key] = field(default_factory=set)  # in this call: none is tried twice

    def run(self) -> None:
        """All cells and trials that are due, in order, so many side by side as were asked for."""
        failures: list[BaseException] = []
        with ThreadPoolExecutor(self.config.jobs) as pool:
            under_way: dict[Future[Record], Cell] = {}
            while True:
                try:
                    self._fill(pool, under_way)
                except UserError as error:
                    self._stop_for(error, failures)
                if not under_way:
                    break
                for ended in wait(under_way, return_when=FIRST_COMPLETED).done:
                    cell = under_way.pop(ended)
                    try:
                        self._keep(ended.result(), cell)
                    except BaseException as error:
                        self._stop_for(error, failures)
        if failures:
            raise failures[0]
        if self.shop.stop.asked:
            raise KeyboardInterrupt

    def _fill(self, pool: ThreadPoolExecutor, under_way: dict[Future[Record], Cell]) -> None:
        """Begin as many cells as may be."""
        while len(under_way) < self.config.jobs and not self.shop.stop.asked:
            cell = self._next([busy.key for busy in under_way.values()])
            if cell is None:
                return
            self.begun.add(cell.key)
            self.board.begin(self._title(cell), self.shop.stderr(cell), self._seconds_left)
            under_way[pool.submit(self.shop.run, cell)] = cell

    def _stop_for(self, error: BaseException, failures: list[BaseException]) -> None:
        """The cells beside it are asked to end, and are continued by another call."""
        failures.append(error)
        self.shop.stop.asked = max(self.shop.stop.asked, 1)

    def _next(self, busy: Sequence[Key]) -> Cell | None:
        """The first cell or trial that is due and can be begun now."""
        for cell in self.grid.cells:
            trials = self.grid.trials(cell)
            for trial in trials if cell.seed == self.grid.seeds[0] else ():
                if trial.key not in self.begun and self._due(trial):
                    return trial
            if cell.key in self.begun or any(trial.key in busy for trial in trials):
                continue
            if trials and not any(map(self._is_ok, trials)):
                self.begun.add(cell.key)
                lost = outcome(cell, "failed", error="no trial of its search has ended well")
                self.folder.append(lost)
                self.write()
                continue
            chosen = replace(cell, values=self._best(trials)) if trials else cell
            if self._due(chosen):
                return chosen
            self.folder.check_same(chosen, self.folder.records[chosen.key])
            self.begun.add(cell.key)
        return None

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

    def _title(self, cell: Cell) -> str:
        keys = [each.key for each in self._all()]
        return f"[{keys.index(cell.key) + 1}/{len(keys)}] {cell.name}"

    def _keep(self, record: Record, cell: Cell) -> None:
        self.folder.append(record)
        self.write()
        self.board.end(self.shop.stderr(cell), spell_outcome(record))

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

    def _seconds_left(self, spent: Sequence[float]) -> float | None:
        """By the mean of the method's cells on that task, else on all tasks, else of all cells; None before the first."""
        ok = [r for r in self.folder.records.values() if r["status"] == "ok"]

        def expected(cell: Cell) -> float:
            same = [r for r in ok if r["method"] == cell.method]
            some = [r for r in same if r["task"] == cell.task] or same or ok
            return math.fsum(float(r["seconds"]) for r in some) / len(some)

        left = [expected(cell) for cell in self._all() if self._open(cell)] if ok else []
        if not left:
            return None
        return max(0.0, math.fsum(left) - math.fsum(spent)) / min(self.config.jobs, len(left))

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
