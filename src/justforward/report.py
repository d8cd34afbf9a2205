"""What a run was and how it went: the plot, the text of `inspect`, the summaries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from justforward.budget import spent_by
from justforward.config import InspectConfig, TrainConfig
from justforward.folder import Metric, RunFolder, best_step, value_of, writing
from justforward.guard import lost_forwards
from justforward.progress import spell_seconds
from justforward.ranges import check_ranges
from justforward.schedules import forwards_until
from justforward.tasks import METRICS
from justforward.trajectory import Log, read_log

Result = dict[str, Any]
_BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int = 48) -> str:
    """The course of `values` in at most `width` characters, each the mean of its share of them."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    count = min(width, len(finite))
    edges = [i * len(finite) // count for i in range(count + 1)]
    means = [math.fsum(finite[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    span = high - low or 1.0
    return "".join(_BARS[round((mean - low) / span * (len(_BARS) - 1))] for mean in means)


def plot(run: str | RunFolder) -> None:
    """Draw plot.png: loss above, accuracy below, against forwards.

    Raises:
        UserError: the metrics are damaged, or the file cannot be written.
    """
    # not pyplot: no global state, no window system
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    folder = run if isinstance(run, RunFolder) else RunFolder(run)
    metrics = sorted(folder.read_metrics()[0], key=lambda metric: metric["step"])
    steps = [m for m in metrics if m["kind"] == "step"]
    checks = [m for m in metrics if m["kind"] == "validation"]
    result = folder.read_result() or {}

    figure = Figure(figsize=(7.0, 5.6), dpi=120, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    if steps:
        x = [m["forwards"] for m in steps]
        y = [m["loss"] for m in steps]
        above.plot(x, y, color="#9ecae1", linewidth=0.8, label="training, each step")
        above.plot(x, _smooth(y), color="#2171b5", label="training, running mean")
    if checks:
        x = [m["forwards"] for m in checks]
        above.plot(x, [m["loss"] for m in checks], "o-", color="#d94801", label="validation")
        below.plot(x, [value_of(m) for m in checks], "o-", color="#d94801", label="validation")
    for found, name, style in zip(
        _before_after(result), ("test before", "test after"), (":", "--"), strict=True
    ):
        if found is not None:
            label = f"{name}: {found:.1%}"
            below.axhline(found, color="#555555", linestyle=style, linewidth=1.0, label=label)
    if result.get("kept_step") is not None:
        kept = next((m for m in checks if m["step"] == result["kept_step"]), None)
        if kept is not None:
            spot = {"s": 130, "facecolors": "none", "edgecolors": "#d94801"}
            below.scatter([kept["forwards"]], [value_of(kept)], label="kept", **spot)
    config = folder.read_config()
    above.set_ylabel(
        "loss (nats)" if config.objective == "loss" else "loss (nats), or minus the objective"
    )
    below.set_ylabel(result.get("metric") or "accuracy")
    below.set_xlabel("forward passes over a batch")
    below.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in (above, below):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    rate = "" if config.lr is None else f", lr {config.lr:g}"
    figure.suptitle(
        f"{config.estimator} space, {config.rule}{rate}, batch {config.batch_size}",
        fontsize="medium",
    )
    FigureCanvasAgg(figure)
    temporary = folder.plot.with_name(".plot.tmp.png")
    with writing(folder.plot):
        try:
            figure.savefig(temporary)
            temporary.replace(folder.plot)
        finally:
            temporary.unlink(missing_ok=True)


def _before_after(result: Result) -> tuple[float | None, float | None]:
    """What the test rows were judged by; runs of older versions have the accuracy alone."""
    name = "value" if "value" in result else "accuracy"
    return result.get(f"before_{name}"), result.get(name)


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential running mean over about a twentieth of the run, without a bias at the start."""
    keep = 1.0 - 1.0 / max(5.0, len(values) / 20.0)
    total = weight = 0.0
    out: list[float] = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1.0
        out.append(total / weight)
    return out


# ------------------------------------------------------------------------------------------ inspect


def inspect_run(config: InspectConfig) -> Result:
    """What a run folder holds.

    Raises:
        UserError: it is no run folder, or damaged.
    """
    check_ranges(config)
    folder = RunFolder(config.run)
    folder.check_run()
    run = folder.read_config()
    log = read_log(folder.log)
    metrics, torn = folder.read_metrics()
    steps = len(log.steps)
    lost = lost_forwards(metrics)
    metrics = sorted((m for m in metrics if m["step"] <= steps), key=lambda m: m["step"])
    lines = {m["step"]: m for m in metrics if m["kind"] in ("step", "private")}
    result = folder.read_result()
    best = best_step(metrics, steps)
    last: list[Metric] = []
    for step in log.steps[-config.last :]:
        line = lines.get(step.index + 1, {})
        square = math.fsum(c * c for c in step.coefficients) / len(step.coefficients)
        last.append(
            {
                "step": step.index + 1,
                "loss": line.get("loss"),
                "lr": line.get("lr"),
                "directions": len(step.coefficients),
                "rms_coefficient": math.sqrt(square),
                "coefficients": list(step.coefficients),
            }
        )
    shown = [
        "model",
        "data",
        "task",
        "template",
        "labels",
        "objective",
        "estimator",
        "rule",
        "family",
        "looks",
        "modified",
        "blocks",
        "block_order",
        "lr",
        "eps",
        "lr_schedule",
        "num_samples",
    ]
    shown += ["batch_size", "seed", "tuner", "start", "tune", "keep", "private"]
    return {
        **{name: getattr(run, name) for name in shown},
        "base_fingerprint": log.header["base"],
        "tensors": len(log.header["tensors"]),
        "weights": sum(math.prod(shape) for _, shape, *_ in log.header["tensors"]),
        "status": result["status"] if result else "unfinished",
        "stopped_by": result["stopped_by"] if result else None,
        "result": result,
        "steps": steps,
        "forwards": forwards_until(run, steps, len(log.header["groups"])) + lost,
        "max_forwards": run.max_forwards,
        "seconds": max((m["seconds"] for m in metrics), default=0.0),
        "privacy": _privacy(run, log),
        "log": {
            "bytes": log.size,
            "bytes_per_step": round(log.size / steps, 2) if steps else None,
            "sealed": log.sealed,
            "torn_bytes": log.truncated,
            "torn_metric_bytes": torn,
        },
        "best_step": best["step"] if best else None,
        "curve": [_without_rows(m) for m in metrics if m["kind"] == "validation"],
        "losses": [m["loss"] for m in metrics if m["kind"] == "step"],
        "last": last,
    }


def _without_rows(validation: Metric) -> Metric:
    return {name: value for name, value in validation.items() if name not in ("losses", "rights")}


def _privacy(run: TrainConfig, log: Log) -> Result | None:
    """What a private run's log has cost its training rows."""
    if not run.private:
        return None
    assert run.target_delta is not None
    epsilon = spent_by(log, run.target_delta)
    return {"epsilon": epsilon, "delta": run.target_delta, **log.header["settings"]["private"]}


def _rate(value: float | None) -> str:
    """Of a run that was killed before `gauge` found it there is none yet."""
    return "not found yet" if value is None else f"{value:g}"


def spell_inspect(found: Result) -> str:
    """`inspect_run` as text."""
    words = ", ".join(f"{label}={word}" for label, word in found["labels"].items())
    labels = words or f"answers in the rows ({found['task']})"
    log, result = found["log"], found["result"] or {}
    state = "sealed" if log["sealed"] else "not sealed (the run was cut short or is going on)"
    if log["torn_bytes"]:
        state = f"torn: {log['torn_bytes']} bytes after the last whole step"
    each = f", {log['bytes_per_step']:g} a step" if log["bytes_per_step"] else ""
    lines = [
        f"model     {found['model']} ({found['base_fingerprint'][:16]})",
        f"tuned     {found['tuner']}: {found['weights']:,} weights in {found['tensors']} tensors"
        + (f" ({found['tune']})" if found["tune"] else ""),
        f"task      {found['template']!r}, {labels}",
        f"data      {found['data']}",
        f"method    {found['estimator']} space, {found['looks']}, {found['rule']}, "
        + (f"modified by {found['modified']}, " if found["modified"] else "")
        + (f"blocks {found['blocks']} ({found['block_order']}), " if found["blocks"] else "")
        + (f"objective {found['objective']}, " if found["objective"] != "loss" else "")
        + f"lr {_rate(found['lr'])} "
        f"({found['lr_schedule']}), eps {_rate(found['eps'])}, samples {found['num_samples']}, "
        f"batch {found['batch_size']}, seed {found['seed']}",
        f"run       {found['status']}"
        + (f" ({found['stopped_by']})" if found["stopped_by"] else "")
        + f": {found['steps']} steps, {found['forwards']} of {found['max_forwards']} forwards, "
        f"{spell_seconds(found['seconds'])}",
        f"log       {log['bytes']:,} bytes{each}, {state}",
    ]
    if result.get("accuracy") is not None:
        before, after = _before_after(result)
        lines.append(
            f"test      {result.get('metric', 'accuracy')} {before:.1%} before, {after:.1%} after "
            f"(step {result['kept_step']}, {result['rows']['test']} rows)"
        )
    if found["privacy"]:
        lines.append(f"private   {_spell_privacy(found['privacy'])}")
    if found["losses"]:
        low, high = min(found["losses"]), max(found["losses"])
        lines.append(f"loss      {sparkline(found['losses'])}  {low:.3f} to {high:.3f}")
    if found["curve"]:
        lines += ["", f"   step  forwards  {result.get('metric', 'accuracy'):>8}    loss"]
        for m in found["curve"]:
            mark = "  best" if m["step"] == found["best_step"] else ""
            lines.append(
                f"{m['step']:7d}  {m['forwards']:8d}  {value_of(m):8.1%}  {m['loss']:6.4f}{mark}"
            )
    if found["last"]:
        lines += ["", "   step    loss         lr  directions  rms coefficient  first coefficients"]
        for step in found["last"]:
            loss = "     -" if step["loss"] is None else f"{step['loss']:6.4f}"
            lr = "        -" if step["lr"] is None else f"{step['lr']:9.3g}"
            some = " ".join(f"{c:+.2e}" for c in step["coefficients"][:3])
            lines.append(
                f"{step['step']:7d}  {loss}  {lr}  {step['directions']:10d}  "
                f"{step['rms_coefficient']:15.3e}  {some}"
            )
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------- summaries


def spell_train(result: Result) -> str:
    """The outcome of `train` as text."""
    out = result["out"]
    head = (
        f"{result['status']} ({result['stopped_by']}): {result['steps']} steps, "
        f"{result['forwards']} forwards, {spell_seconds(result['seconds'])}"
    )
    if result["accuracy"] is None:
        best = result["validation_value"]
        return head + (
            f"\nbest validation {result['metric']} so far {best:.1%}" if best is not None else ""
        )
    name, (before, after) = result["metric"], _before_after(result)
    return "\n".join(
        [
            head,
            f"test {name} {before:.1%} before, {after:.1%} after; "
            f"loss {result['before_loss']:.4f} before, {result['loss']:.4f} after{_more(result)} "
            f"({result['rows']['test']} rows, drawn first and never used to choose)",
            f"kept step {result['kept_step']} of {result['steps']} "
            f"(validation {name} {result['validation_value']:.1%})",
            f"fingerprint {result['fingerprint']}",
            *_share(result.get("privacy")),
            f"{out}: base + a log of {result['log_bytes']:,} bytes = the tuned model; "
            f"as a folder: justforward replay {out} --out NEW",
        ]
    )


def _spell_privacy(said: Result) -> str:
    clip = "scaled to length 1" if said["clip"] is None else f"clipped to {said['clip']:g}"
    return (
        f"epsilon {said['epsilon']:.3f} at delta {said['delta']:g} for each of {said['rows']} training rows "
        f"(noise multiplier {said['noise_multiplier']:.4g}, {said['batch_size']} rows a step on average, {clip})"
    )


def _share(said: Result | None) -> list[str]:
    """Of a private run what it has cost, and what may be shown to others."""
    if said is None:
        return []
    return [
        f"private: {_spell_privacy(said)}",
        f"may be shared: {said['share']}; keep to yourself: {said['keep']}",
    ]


def _more(result: Result) -> str:
    """What a declared task reports beside the accuracy."""
    more = [
        name
        for name in dict.fromkeys(name for names in METRICS.values() for name in names)
        if name in result and name not in ("accuracy", result.get("metric"))
    ]
    return "".join(f"; {name} {result[name]:.4f}" for name in more)


def spell_eval(result: Result) -> str:
    """The outcome of `eval` as text."""
    what = result["model"] if result["run"] is None else f"{result['run']}, step {result['step']}"
    return (
        f"{what}: {result['metric']} {result['value']:.1%}, loss {result['loss']:.4f}{_more(result)} "
        f"on {result['rows']} rows\n"
        f"fingerprint {result['fingerprint']}"
    )


def spell_baseline(result: Result) -> str:
    """The outcome of `baseline` as text."""
    rows = result["rows"]
    lines = [
        f"{result['method']}: {result['metric']} {result['value']:.1%}, loss {result['loss']:.4f}{_more(result)} "
        f"on {rows['test']} test rows, {result['metric']} {result['validation_value']:.4f} "
        f"on {rows['validation']} validation rows, {spell_seconds(result['seconds'])}"
    ]
    if result["method"] == "icl":
        spread = "" if result["sd"] is None else f", standard deviation {result['sd']:.4f}"
        lines.append(
            f"mean of {len(result['draws'])} draws of {result['demonstrations']} demonstrations{spread}; "
            f"{result['demonstrations_used']:.1f} fit a row on average"
        )
    if result["method"] == "probe":
        lines.append(f"C = {result['c']:g} by validation, fitted in {result['fit_seconds']:.2f} s")
    if result["method"] == "first-order":
        lines.append(
            f"{result['tuner']}, lr {result['lr']:g}: step {result['best_step']} of {result['steps']} is the best in "
            f"validation ({result['stopped_by']})"
        )
    if result["out"] is not None:
        lines.append(f"saved in {result['out']}")
    return "\n".join(lines)


def spell_replay(result: Result) -> str:
    """The outcome of `replay` as text."""
    return (
        f"{result['out']}: the {result.get('saved', 'model')} of {result['run']} after {result['steps']} steps, "
        f"replayed in {result['replay_seconds']:.1f} s\nfingerprint {result['fingerprint']}"
    )
