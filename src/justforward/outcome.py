"""What a run has come to, in figures: for result.json and for a line of metrics.jsonl."""

from __future__ import annotations

from typing import Any

from justforward.config import TrainConfig
from justforward.data import Splits
from justforward.evaluate import Evaluation
from justforward.folder import Metric, best_step, value_of
from justforward.guard import lost_forwards, rewinds
from justforward.schedules import forwards_until
from justforward.tasks import Task


def figures(
    config: TrainConfig, task: Task, splits: Splits, metrics: list[Metric], steps: int, parts: int
) -> dict[str, Any]:
    """Figures before and in validation, steps, forwards and rows: the part of result.json that the clock does not touch.

    Args:
        config, task, splits: of the run.
        metrics: its lines so far.
        steps: that it has taken.
        parts: its parameter groups.
    """
    before = next((m for m in metrics if m["kind"] == "before"), None)
    best = best_step(metrics, steps)
    return {
        "metric": task.metric if config.objective == "loss" else config.objective,
        "before_accuracy": before["accuracy"] if before else None,
        "before_loss": before["loss"] if before else None,
        "before_value": value_of(before) if before else None,
        "validation_accuracy": best["accuracy"] if best else None,
        "validation_loss": best["loss"] if best else None,
        "validation_value": value_of(best) if best else None,
        "best_step": best["step"] if best else None,
        "steps": steps,
        "forwards": forwards_until(config, steps, parts) + lost_forwards(metrics),
        "rewinds": len(rewinds(metrics)),
        "train_seconds": round(sum(m.get("step_seconds", 0.0) for m in metrics), 3),
        "rows": splits.counts(),
    }


def worth_of(found: Evaluation) -> dict[str, float]:
    """What a line of metrics.jsonl says of an evaluation."""
    worth = {"accuracy": found.accuracy, "loss": found.loss}
    return worth if found.metric == "accuracy" else {**worth, "value": found.value}
