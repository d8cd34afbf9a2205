"""`rank`: why the rate does not depend on the dimension, measured (`docs/theory.md`).

The local effective rank r = tr(H) / |H| of the Hessian where the model stands (arXiv 2305.17333, section 4.1,
Assumption 1), what a step of MeZO is then expected to do to the loss, and what such steps do (`descent`).
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from justforward import noise
from justforward.config import RankConfig
from justforward.data import Example
from justforward.data import rank as order
from justforward.descent import Descent, Trial, gamma, mean_change, observe
from justforward.errors import NonFiniteLoss, UserError
from justforward.evaluate import Scorer
from justforward.folder import check_new, write_whole, writing
from justforward.hessian import Estimate, Objective, dot, lanczos
from justforward.models import load_model
from justforward.optim import MeZO
from justforward.prepare import choose_tuned, read_data, use_threads
from justforward.progress import Progress
from justforward.prompts import Batch, eval_mode
from justforward.published import Published, scored_rows
from justforward.ranges import check_ranges
from justforward.settings import task_of
from justforward.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Result = dict[str, Any]
MULTIPLES = (0.125, 0.25, 0.5, 1.0, 2.0)  # of the best learning rate, where steps are observed
SHOWN = 10  # eigenvalues, by magnitude


# ----------------------------------------------------------------------------------------- measurement


def bare(task: Task) -> Task:
    """The task without a prompt: its template with nothing but the fields (and the mask), a space between."""
    names = dict.fromkeys(name for _, name in task.pieces if name is not None)
    return replace(task, template=" ".join("{" + name + "}" for name in names))


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: Sequence[Example],
    config: RankConfig,
    progress: Progress,
) -> Result:
    """What `rank` says about one template. The weights are rounded to MeZO's grid; nothing else stays changed.

    Raises:
        UserError: a row does not fit, the loss cannot be differentiated twice, or is not finite.
    """
    scorer = Scorer(model, tokenizer, task, config.max_length)
    scorer.prepare(examples, progress.note)
    optimizer = MeZO(model, lr=1.0, eps=config.eps, seed=config.seed)
    objective = Objective(
        optimizer.weights.tensors,
        lambda rows: _row_losses(scorer, scorer.encode([examples[row] for row in rows])),
        len(examples),
        config.batch_size,
    )
    step_rows = config.step_rows or len(examples)
    with eval_mode(model):
        return _measure(optimizer, objective, step_rows, config, progress)


def _row_losses(scorer: Scorer, batch: Batch) -> Tensor:
    """[B]: the task's loss of each row, with a graph where gradients are on."""
    return scorer.loss_of(batch)


def _measure(
    optimizer: MeZO, objective: Objective, step_rows: int, config: RankConfig, progress: Progress
) -> Result:
    count, seed = objective.rows, config.seed
    loss = objective.value()
    if not math.isfinite(loss):
        raise UserError(f"the loss of the rows is {loss}: the model's weights are broken")
    g = objective.gradient()
    slope = dot(g, g)
    if slope == 0.0:
        raise UserError(
            "the gradient of the loss is zero: there is nothing to descend: choose other "
            "parameters with --tune"
        )
    rows_square = fmean(objective.row_squares())
    # of the mean of step_rows of the rows, drawn without replacement
    thinning = (count - step_rows) / (count - 1) / step_rows if count > 1 else 0.0
    square = slope + thinning * (rows_square - slope)
    hg = objective.product(g)
    along = dot(g, hg)
    progress.note(
        f"  eigenvalues: {config.iterations} steps of Lanczos over {objective.size:,} parameters"
    )
    start, asymmetry = _start(objective, g, hg, seed)
    krylov = lanczos(objective.product, start, config.iterations)
    by_size = sorted(krylov.ritz, key=lambda pair: -abs(pair.value))
    norm = abs(by_size[0].value)
    if norm == 0.0:
        raise UserError("the Hessian is zero: the loss is linear in the tuned parameters")
    progress.note(f"  trace: {config.probes} probes")
    trace = Estimate.of(objective.trace_samples(config.probes, seed, krylov))
    largest, smallest = krylov.ritz[0], krylov.ritz[-1]
    # The H of Theorem 1 bounds the Hessian from above, so its trace is at least that of the positive part; and
    # the Ritz values bound that from below, as eigenvalues of the matrix on a subspace do (Ky Fan).
    positive = math.fsum(max(pair.value, 0.0) for pair in krylov.ritz)
    positive_rank = positive / largest.value if largest.value > 0.0 else None
    del krylov  # as large as so many models
    across = Estimate(0.0, 0.0)
    if thinning:
        found = Estimate.of(_across(objective, config.probes, seed))
        across = Estimate(thinning * found.mean, thinning * found.error)
    descent = Descent.predicted(slope, square, trace, along, across)
    rates = [multiple * descent.unit for multiple in MULTIPLES]
    progress.note(f"  steps: {config.directions} directions at {len(rates)} learning rates")
    trials = observe(
        optimizer, objective, g, rates, directions=config.directions, step_rows=step_rows
    )
    r = trace.mean / norm
    sgd = along + across.mean
    best = descent.unit if descent.curvature > 0.0 else None
    return {
        "dimension": objective.size,
        "rows": count,
        "step_rows": step_rows,
        "loss": loss,
        "trace": asdict(trace),
        "largest_eigenvalue": asdict(largest),
        "smallest_eigenvalue": asdict(smallest),
        "operator_norm": norm,
        "eigenvalues": [asdict(pair) for pair in by_size[:SHOWN]],
        "effective_rank": r,
        "effective_rank_error": trace.error / norm,
        "positive_trace_at_least": positive,
        "positive_rank_at_least": positive_rank,
        "gamma_at_least": None if positive_rank is None else gamma(objective.size, positive_rank),
        "gradient_square": slope,
        "row_gradient_square": rows_square,
        "trace_sigma": rows_square - slope,
        "step_gradient_square": square,
        "g_h_g": along,
        "trace_h_sigma_step": asdict(across),
        "asymmetry": asymmetry,
        "curvature": descent.curvature,
        "curvature_error": descent.error,
        "slowdown": descent.curvature / sgd if best is not None and sgd > 0.0 else None,
        "best_lr": best,
        "best_change": descent.at(best) if best is not None else None,
        "looks": _looks(trials),
        "observed": [
            _observed(trials, place, lr, descent, trace.mean, sgd / square)
            for place, lr in enumerate(rates)
        ],
    }


def _across(objective: Objective, probes: int, seed: int) -> list[float]:
    """Samples of tr(H Sigma), Sigma the covariance of the gradients of single rows.

    w = N^(-1/2) sum_i s_i (g_i - g) with random signs s has E[w w^T] = Sigma.
    """
    count = objective.rows

    def probe(i: int) -> Tensor:
        signs = noise.rademacher(noise.direction_seed(seed, i, 1), 0, 0, count).tolist()
        mean = fmean(signs)
        return objective.gradient([(s - mean) / math.sqrt(count) for s in signs])

    found = []
    for i in range(probes):
        w = probe(i)
        found.append(dot(w, objective.product(w)))
    return found


def _start(objective: Objective, g: Tensor, hg: Tensor, seed: int) -> tuple[Tensor, float]:
    """Where Lanczos starts, and by how much the products computed in float32 fail to be symmetric.

    The gradient leans on the leading eigenvectors; the random half is there so that none is missed.
    """
    key = noise.direction_seed(seed, 0, 2)
    parts = [noise.normal(key, s, 0, t.numel()) for s, t in enumerate(objective.tensors)]
    x = torch.cat(parts).to(g.device)
    start = g / math.sqrt(dot(g, g)) + x / math.sqrt(dot(x, x))
    one, other = dot(start, hg), dot(g, objective.product(start))
    return start, abs(one - other) / max(abs(one), abs(other), 1e-300)


def _looks(trials: Sequence[Trial]) -> Result:
    """What looks of length eps see, which theory has in the limit.

    ``slope`` and ``residual``: of the projected gradients against z.g_B, through the origin, and what is left,
    relatively. ``trace``: the mean of z^T H_B z by second differences, an estimate of tr H by forward passes
    alone; where it is not that of the Hessian, the loss is not quadratic over a look.
    """
    total = math.fsum(t.part**2 for t in trials)
    slope = math.fsum(t.seen * t.part for t in trials) / total
    left = math.fsum((t.seen - slope * t.part) ** 2 for t in trials)
    trace = Estimate.of([t.bent for t in trials])
    return {"slope": slope, "residual": math.sqrt(left / total), "trace": asdict(trace)}


def _observed(
    trials: Sequence[Trial], place: int, lr: float, descent: Descent, trace: float, along: float
) -> Result:
    change = mean_change(trials, place, lr, trace, along)
    plain = Estimate.of([t.changes[place] for t in trials])
    return {
        "lr": lr,
        "predicted": descent.at(lr),
        "predicted_error": 0.5 * lr * lr * descent.error,
        "change": change.mean,
        "error": change.error,
        # the same for the directions that were drawn: what the plain mean is to be held against
        "predicted_here": descent.at(lr) + plain.mean - change.mean,
        "plain_change": plain.mean,
        "plain_error": plain.error,
    }


# --------------------------------------------------------------------------------------------- command


def rank(config: RankConfig, progress: Progress | None = None) -> Result:
    """Measure, write rank.json and rank.png into a new folder.

    Raises:
        UserError: something in the input cannot be used.
    """
    started = time.monotonic()
    progress = progress or Progress()
    check_ranges(config)
    _check_pattern(config.tune)
    task = task_of(config)
    plain = bare(task)
    out = Path(config.out)
    check_new(out, "choose another --out")
    use_threads(config.threads)
    found, _ = read_data(config.task, config.data, task)
    rows = _choose(scored_rows(found) if isinstance(found, Published) else found, config)
    model, tokenizer = load_model(config.model, notify=progress.note)
    choose_tuned(model, config.tune)
    variants = {"with": task, "without": plain}
    if config.prompt != "both":
        variants = {config.prompt: variants[config.prompt]}
    elif plain.template == task.template:
        variants.pop("with")
    measured: dict[str, Result] = {}
    for name, variant in variants.items():
        progress.note(f"{name} a prompt: {variant.template!r}")
        try:
            measured[name] = {
                "template": variant.template,
                **measure(model, tokenizer, variant, rows, config, progress),
            }
        except NonFiniteLoss as error:
            raise UserError(f"template {variant.template!r}: {error}") from error
    result = {
        "model": config.model,
        "data": config.data,
        "task": config.task,
        "tune": config.tune,
        "seed": config.seed,
        "eps": config.eps,
        "probes": config.probes,
        "iterations": config.iterations,
        "directions": config.directions,
        "prompts": measured,
        "out": config.out,
        "seconds": round(time.monotonic() - started, 3),
    }
    with writing(out):
        out.mkdir(parents=True)
    write_whole(out / "rank.json", json.dumps(result, indent=1) + "\n")
    plot(result, out / "rank.png")
    return result


def _check_pattern(pattern: str | None) -> None:
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise UserError(f"--tune is {pattern!r}: not a regular expression: {error}") from None


def _choose(examples: Sequence[Example], config: RankConfig) -> list[Example]:
    """The rows that are measured: drawn by a keyed hash of their text, whatever their order in the file."""
    if len(examples) < config.rows:
        raise UserError(
            f"--rows is {config.rows}: {config.data} has {len(examples)}: give at most that"
        )
    if config.step_rows is not None and config.rows % config.step_rows:
        raise UserError(
            f"--step-rows is {config.step_rows}: it must divide --rows, which is {config.rows}"
        )
    chosen = sorted(examples, key=lambda example: order(example, config.seed))[: config.rows]
    # rows of like length share a batch: less padding, no other effect
    return sorted(chosen, key=lambda example: sum(map(len, example.fields.values())))


# ---------------------------------------------------------------------------------------------- output

_NAMES = {"with": "with a prompt", "without": "without a prompt"}


def spell_rank(result: Result) -> str:
    """The outcome of `rank` as text."""
    lines: list[str] = []
    for name, m in result["prompts"].items():
        top, low, trace = m["largest_eigenvalue"], m["smallest_eigenvalue"], m["trace"]
        at_best = m["observed"][MULTIPLES.index(1.0)]
        lines += [
            f"{_NAMES[name]}: {m['template']!r}",
            f"  dimension d            {m['dimension']:,}; {m['rows']} rows, loss {m['loss']:.4f}",
            f"  tr H                   {trace['mean']:.4g} +- {trace['error']:.2g} ({result['probes']} probes)",
            f"  eigenvalues            {_ritz(top)} down to {_ritz(low)}",
            f"  effective rank         {m['effective_rank']:.4g} +- {m['effective_rank_error']:.2g} = tr H / |H|",
            f"  tr H by looks          {m['looks']['trace']['mean']:.4g} +- {m['looks']['trace']['error']:.2g}, "
            f"{result['directions']} of length eps = {result['eps']:g}",
            f"  |g|^2                  {m['gradient_square']:.4g}; E|g_row|^2 {m['row_gradient_square']:.4g}",
            f"  positive part          effective rank at least {_or_none(m['positive_rank_at_least'])}; "
            f"Theorem 1's factor at least {_or_none(m['gamma_at_least'])}",
            f"  slower than SGD        {_or_dash(m['slowdown'])} times a step",
            f"  best lr                {_or_dash(m['best_lr'])}, by -|g|^2 lr + {m['curvature']:.4g} lr^2 / 2",
            f"  change there           {at_best['change']:.4g} +- {at_best['error']:.2g}, predicted "
            f"{at_best['predicted']:.4g} +- {at_best['predicted_error']:.2g}",
            f"  of these directions    {at_best['plain_change']:.4g}, predicted {at_best['predicted_here']:.4g}",
        ]
    lines.append(f"{result['out']}: rank.json, rank.png")
    return "\n".join(lines)


def _ritz(pair: dict[str, float]) -> str:
    unsure = f" +- {pair['bound']:.1g}" if pair["bound"] > 1e-3 * abs(pair["value"]) else ""
    return f"{pair['value']:.4g}{unsure}"


def _or_none(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _or_dash(value: float | None) -> str:
    return "- (the curvature is not positive)" if value is None else f"{value:.4g}"


def plot(result: Result, path: Path) -> None:
    """Predicted and observed change of the loss against the learning rate, a panel for each template.

    Raises:
        UserError: the file cannot be written.
    """
    # not pyplot: no global state, no window system
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured: dict[str, Result] = result["prompts"]
    figure = Figure(figsize=(4.6 * len(measured), 3.6), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(measured), squeeze=False)[0]
    for axes, (name, m) in zip(panels, measured.items(), strict=True):
        descent = Descent(m["gradient_square"], m["curvature"], m["curvature_error"])
        seen = m["observed"]
        rates = np.linspace(0.0, 1.05 * seen[-1]["lr"], 100)
        line = np.array([descent.at(lr) for lr in rates])
        width = 0.5 * rates**2 * descent.error
        axes.plot(rates, line, color="#2171b5", label="predicted")
        axes.fill_between(rates, line - width, line + width, color="#9ecae1", alpha=0.6)
        lrs = [o["lr"] for o in seen]
        here = [o["predicted_here"] for o in seen]
        axes.plot(lrs, here, "--", color="#777777", label="predicted, these directions")
        for key, error, color, fill, label in (
            ("plain_change", "plain_error", "#777777", "none", "observed, these directions"),
            ("change", "error", "#d94801", "#d94801", "observed, chance of z taken out"),
        ):
            axes.errorbar(
                lrs,
                [o[key] for o in seen],
                yerr=[o[error] for o in seen],
                fmt="o",
                color=color,
                markerfacecolor=fill,
                capsize=3,
                label=label,
            )
        axes.axhline(0.0, color="#555555", linewidth=0.8)
        axes.set_title(
            f"{_NAMES[name]}: r = {m['effective_rank']:.3g}, d = {m['dimension']:,}",
            fontsize="small",
        )
        axes.set_xlabel("learning rate")
        axes.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    panels[0].set_ylabel("expected change of the loss by one step")
    FigureCanvasAgg(figure)
    temporary = path.with_name(f".{path.stem}.tmp.png")
    with writing(path):
        try:
            figure.savefig(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
