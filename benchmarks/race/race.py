"""Race zeroth-order methods at equal example-forwards, each at its own best rate.

    python examples/masked.py --from-nothing ...       # the small model, see race.yaml
    python benchmarks/race/race.py --round choose      # goes on where it stopped
    python benchmarks/race/report.py                   # docs/race.md

Each method's rate is searched on a grid of quarter powers of ten, from a start outwards until the best one has a worse
neighbour on both sides, by the validation loss at the end of a run of a seed that is not raced. So every method has
the same fineness, and as many points as it needs. Then it runs with each seed of the round. All methods see the same
batches in the same order; one whose search ends worse than MeZO's by more than the round's margin is left at that. The rate falls linearly to 0 over the budget where nothing else is said.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from contenders import EPS, TWINS
from problems import Draws, Problem, fit_head, load, walk_on

import justforward as jf
from justforward.errors import NonFiniteLoss

HERE = Path(__file__).parent
TUNING_SEED = 100
SCORES = 10  # of a run
BASELINE = "mezo"
Curve = list[tuple[int, float]]


class Scored:
    """The curve of a run, and when it is over: with the budget, or when the loss has run away."""

    def __init__(self, problem: Problem, model: torch.nn.Module, budget: int) -> None:
        self.problem, self.model, self.budget = problem, model, budget
        self.points: Curve = []
        self.lost = False

    def __call__(self, used: int) -> bool:
        """Score if it is due; whether to go on."""
        if used * SCORES >= len(self.points) * self.budget or used >= self.budget:
            loss = self.problem.score(self.model, self.problem.validation)[0]
            self.points.append((used, loss))
            self.lost = not loss < 2.0 * self.points[0][1]
        return used < self.budget and not self.lost


def run(
    problem: Problem, name: str, settings: dict[str, Any], lr: float, seed: int, budget: int
) -> dict[str, Any]:
    """One run: its curve and its end."""
    begun = time.process_time()  # the machine may be busy with other work
    settings = dict(settings)
    model = copy.deepcopy(problem.model)
    used = 0
    if settings.pop("start", None) == "probe":
        used = fit_head(problem, model, min(settings.pop("probe_rows"), budget // 2), seed)
    scored = Scored(problem, model, budget)
    size = settings.pop("batch", 16)
    falls = settings.pop("falls", True)
    settings.pop("rate", None)
    try:
        twin = TWINS.get(settings.pop("twin", name))
        if twin is not None:
            follow(problem, model, scored, twin, lr, seed, size, used)
        else:
            package(problem, model, scored, settings, lr, falls, seed, size, used)
    except NonFiniteLoss:
        scored.lost = True
    losses = [loss for _, loss in scored.points]
    final = math.inf if scored.lost else losses[-1]
    return {
        "final": final,
        "best": min(losses),
        "test": None if scored.lost else problem.score(model, problem.test),
        "seconds": time.process_time() - begun,
        "curve": scored.points,
    }


def package(
    problem: Problem,
    model: torch.nn.Module,
    scored: Scored,
    settings: dict[str, Any],
    lr: float,
    falls: bool,
    seed: int,
    size: int,
    used: int,
) -> None:
    """A method that `MeZO` has."""
    for key, kind in (("modified", jf.Modified), ("blocks", jf.Blocks)):
        if key in settings:
            settings[key] = kind(**settings[key])
    opt = jf.MeZO(
        model, lr=lr, eps=settings.pop("eps", EPS), seed=seed, check_rows=False, **settings
    )
    draw = Draws(problem.train, seed)
    while scored(used):
        for group in opt.param_groups:
            group["lr"] = lr * (1.0 - used / scored.budget if falls else 1.0)
        step = opt.estimate(lambda rows: problem.losses(model, rows), draw(size))
        opt.apply(step)
        used += step.forwards * size


def follow(
    problem: Problem,
    model: torch.nn.Module,
    scored: Scored,
    twin: Any,
    lr: float,
    seed: int,
    size: int,
    used: int,
) -> None:
    """A method of `contenders`."""
    walk = walk_on(problem, model, seed, size)
    walk.used = used
    buffer = next(iter(model.parameters())).data
    buffer = buffer.as_strided((walk.theta.numel(),), (1,), 0)  # all of them are parts of it

    def home() -> None:
        buffer.copy_(walk.theta if walk.shown is None else walk.shown)

    home()
    while scored(walk.used):
        walk.done = walk.used / scored.budget
        move = twin(walk)
        walk.theta -= lr * (1.0 - walk.done if twin.falls else 1.0) * move
        if not torch.isfinite(walk.theta).all():
            raise NonFiniteLoss(walk.step, math.nan, "in the weights")
        walk.step += 1
        home()


class Results:
    """The file: a line a run, appended as it ends; what is there is not run again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.lines = {self.key(line): line for line in map(json.loads, lines)}

    @staticmethod
    def key(line: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(
            line[k] for k in ("model", "task", "method", "batch", "budget", "notch", "seed")
        )

    def start(self, model: str, method: str, rate: float) -> int:
        """Where a search starts: at the notch last raced on this model, or near the rate."""
        raced = [
            line["notch"]
            for line in self.lines.values()
            if (line["model"], line["method"]) == (model, method) and "curve" in line
        ]
        return raced[-1] if raced else round(4 * math.log10(rate))

    def append(self, line: dict[str, Any]) -> None:
        self.lines[self.key(line)] = line
        with self.path.open("a") as file:
            file.write(json.dumps(line, separators=(",", ":")) + "\n")
            file.flush()
            os.fsync(file.fileno())


def rate_of(notch: int) -> float:
    """Quarter powers of ten."""
    return float(10.0 ** (notch / 4.0))


class Round:
    """A method on a problem: searched, then run."""

    def __init__(
        self, results: Results, problem: Problem, where: dict[str, Any], tuning: list[int]
    ) -> None:
        self.results, self.problem, self.where, self.tuning = results, problem, where, tuning

    def cell(self, method: str, settings: dict[str, Any], notch: int, seed: int) -> float:
        """Validation loss at the end."""
        line = {**self.where, "method": method, "notch": notch, "seed": seed}
        known = self.results.lines.get(Results.key(line))
        if known is None:
            settings = {"batch": self.where["batch"], **settings}
            found = run(self.problem, method, settings, rate_of(notch), seed, self.where["budget"])
            known = {**line, **compact(found, seed in self.tuning)}
            self.results.append(known)
        value = known["final"]
        return math.inf if value is None else float(value)

    def search(self, method: str, settings: dict[str, Any], notch: int) -> int:
        """The best notch by the mean over the tuning seeds; its neighbours are worse."""

        def at(n: int) -> float:
            return sum(self.cell(method, settings, n, seed) for seed in self.tuning)

        while True:
            here, up, down = at(notch), at(notch + 1), at(notch - 1)
            if math.isinf(here) or (down < here and down <= up):
                notch -= 1
            elif up < here:
                notch += 1
            else:
                return notch
            if not -40 <= notch <= 20:
                raise ValueError(f"{method}: no rate is better than its neighbours")


def compact(found: dict[str, Any], tuning: bool) -> dict[str, Any]:
    """What is kept of a run; of a search no curve."""
    out: dict[str, Any] = {
        "final": None if math.isinf(found["final"]) else round(found["final"], 4),
        "seconds": round(found["seconds"], 1),
    }
    if not tuning:
        test = found["test"]
        out["test"] = None if test is None else [round(v, 4) for v in test]
        out["curve"] = [[used, round(loss, 4)] for used, loss in found["curve"]]
    return out


def main() -> None:
    """The rounds that are named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--plan", type=Path, default=HERE / "race.yaml")
    parser.add_argument("--round", action="append", required=True)
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    given = parser.parse_args()
    torch.set_num_threads(1)
    plan = yaml.safe_load(given.plan.read_text())
    results = Results(given.results)
    for name in given.round:
        part = plan["rounds"][name]
        for model in part["models"]:
            for task in part["tasks"]:
                problem = load(plan["models"][model], plan["tasks"][task])
                for budget in part["budgets"]:
                    race(results, problem, plan, part, model, task, budget)


def race(
    results: Results,
    problem: Problem,
    plan: dict[str, Any],
    part: dict[str, Any],
    model: str,
    task: str,
    budget: int,
) -> None:
    """All methods on one problem with one budget."""
    where = {"model": model, "task": task, "batch": part["batch"], "budget": budget}
    tuning = part.get("tuning", [TUNING_SEED])
    this = Round(results, problem, where, tuning)
    methods = part["methods"]
    limit = math.inf
    if methods == "all":
        methods = [m for m in (*plan["methods"], *TWINS) if m not in part.get("without", [])]
    for method in methods:
        settings = plan["methods"].get(method, {})
        rate = settings["rate"] if method in plan["methods"] else TWINS[method].rate
        notch = this.search(method, settings, results.start(model, method, rate))
        found = statistics.mean(this.cell(method, settings, notch, seed) for seed in tuning)
        if method == BASELINE:
            limit = found + part.get("margin", math.inf)
        if found > limit:
            print(f"{model} {task} {budget} {method}: rate 1e{notch / 4:g}, {found:.4f}: left at that", flush=True)  # fmt: skip
            continue
        ends = [this.cell(method, settings, notch, seed) for seed in part["seeds"]]
        mean = sum(ends) / len(ends)
        print(
            f"{model} {task} {budget} {method}: rate 1e{notch / 4:g}, loss {mean:.4f}", flush=True
        )


if __name__ == "__main__":
    main()
