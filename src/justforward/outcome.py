"""What a run has come to, in figures: for result.json and for a line of metrics.jsonl; and whether to go back from there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from justforward.config import TrainConfig
from justforward.data import Splits
from justforward.evaluate import Evaluation
from justforward.folder import Metric, best_step, value_of
from justforward.guard import is_worse, lost_forwards, rewinds
from justforward.schedules import forwards_until, was_due
from justforward.tasks import Task

Result = dict[str, Any]


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: the session has ended cleanly and the run can be continued.

    Attributes:
        result: the run so far; None where nothing was written yet.
    """

    def __init__(self, result: Result | None) -> None:
        super().__init__("interrupted")
        self.result = result


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


def tested(test: Evaluation, fingerprint: str) -> dict[str, Any]:
    """Figures of the test rows, and of which weights they are."""
    others = {name: value for name, value in test.metrics.items() if name != "accuracy"}
    return {
        "accuracy": test.accuracy,
        "loss": test.loss,
        "fingerprint": fingerprint,
        **others,
        "value": test.value,
    }


def chosen_by(at: Metric) -> dict[str, Any]:
    """The validation of the step that is kept."""
    return {
        "validation_accuracy": at["accuracy"],
        "validation_loss": at["loss"],
        "validation_value": value_of(at),
        "kept_step": at["step"],
    }


@dataclass(frozen=True)
class Turn:
    """Where a run goes back to: so many steps are kept, so many validations taken back, and why."""

    step: int
    validations: int
    why: str


def best_due(
    config: TrainConfig, validations: Sequence[Metric], steps: int, parts: int = 1
) -> Metric | None:
    """The best validation up to a step (`best_step`) of those that were due."""
    return best_step([m for m in validations if was_due(config, m, parts)], steps)


def turning(
    config: TrainConfig, validations: Sequence[Metric], steps: int, parts: int = 1
) -> Turn | None:
    """Where to go back to from a step whose validation was worse than the best one before it; None where it was not.

    Args:
        config: resolved; with a metric as its objective the loss is not what steps lower, and there is no turning back.
        validations: the run's. Those that only a limit brought about do not count: it may be raised.
        steps: taken.
        parts: parameter groups.
    """

    if config.objective != "loss" or not validations or validations[-1]["step"] != steps:
        return None

    found = [m for m in validations if was_due(config, m, parts)]
    best = best_step(found, steps)
    if best is None or found[-1]["step"] != steps:
        return None
    last, had = ((value_of(m), float(m["loss"])) for m in (found[-1], best))
    if not is_worse(last, had):
        return None
    taken_back = sum(1 for m in found if m["step"] > best["step"])
    why = f"the validation loss is {last[1]:.4f}, and was {had[1]:.4f} after step {best['step']}"
    return Turn(best["step"], taken_back, why)
