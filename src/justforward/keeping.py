"""Which step a run keeps: the best in validation, of those that have gained more over the start than chance makes of it.

A validation is over the rows that the start was scored on, so each row has a gain of its own, and their mean errs by
their standard deviation over the square root of how many there are. A step that has gained less, in loss and in rows that it has
right, may as well have lost, and the start is kept: the simplest within a standard error of the best, as one prunes
trees (Breiman et al., Classification and Regression Trees, 1984, 3.4.3). What that takes is in the run's lines, so that a run
that is continued keeps the same step.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from justforward.config import TrainConfig
from justforward.errors import UserError
from justforward.folder import Metric, best_step, validated, value_of

if TYPE_CHECKING:
    from justforward.evaluate import Evaluation

DIGITS = 6  # of a row's loss


def worth_of(
    found: Evaluation, config: TrainConfig, validations: Sequence[Metric] | None = None
) -> Metric:
    """What a line of metrics.jsonl says of an evaluation.

    Args:
        found: the evaluation.
        config: resolved.
        validations: of a validation the run's lines before it; of the test none.

    Raises:
        UserError: the start had another number of rows.
    """
    worth: Metric = {"accuracy": found.accuracy, "loss": found.loss}
    if found.metric != "accuracy":
        worth["value"] = found.value
    if validations is None or config.objective != "loss" or config.private:
        # a metric is not lowered by steps as the loss is, and what is private is not told row by row
        return worth
    return worth | _beside_start(config, found, validations)


def _beside_start(config: TrainConfig, found: Evaluation, validations: Sequence[Metric]) -> Metric:
    """Of the start itself ``losses`` and ``rights``, of each row; later ``gain``, by how much the mean loss is lower, and its
    standard error ``gain_error``, and how many rows are ``turned`` right and wrong.
    """
    losses, rights = [round(loss, DIGITS) for loss in found.losses], [int(r) for r in found.rights]
    if len(losses) < 2:  # nothing errs by anything that could be told
        return {}
    if not validations:
        return {"losses": losses, "rights": rights}
    start = next((m for m in validations if "losses" in m), None)
    if start is None:  # of a run that was begun before lines had them
        return {}
    had, had_right = start["losses"], start["rights"]
    if not len(had) == len(had_right) == len(losses):
        raise UserError(
            f"{config.out}: metrics.jsonl has {len(had)} losses and {len(had_right)} rights of the start, for {len(losses)} "
            "validation rows: it is damaged: take both out of that line, and the best step is kept whatever it has gained"
        )
    gains = [before - after for before, after in zip(had, losses, strict=True)]
    turns = [after - before for before, after in zip(had_right, rights, strict=True)]
    return {
        "gain": math.fsum(gains) / len(gains),
        "gain_error": statistics.stdev(gains) / math.sqrt(len(gains)),
        "turned": [turns.count(1), turns.count(-1)],
    }


def is_sure(metric: Metric) -> bool:
    """Whether a validation's gain in loss, or in rows that are right, is above its standard error, or nothing is known of that."""
    if "gain" not in metric:
        return True
    right, wrong = metric["turned"]
    return bool(metric["gain"] > metric["gain_error"] or right - wrong > math.sqrt(right + wrong))


def step_kept(config: TrainConfig, metrics: Sequence[Metric], steps: int) -> Metric | None:
    """The validation of the step that a run keeps if it ends after so many; None without one.

    A step that has reached ``target_accuracy`` is one that was asked for, whatever its loss.
    """
    found, goal = validated(metrics, steps), config.target_accuracy
    if config.keep != "best":
        return next((m for m in reversed(found) if m["step"] == steps), None)
    reached = [m for m in found if goal is not None and value_of(m) >= goal]
    return best_step(reached or [m for m in found if is_sure(m)], steps)


def left_for(config: TrainConfig, validations: Sequence[Metric], kept: Metric) -> str:
    """What to say first where the best step is not the one that is kept; else nothing."""
    best = best_step(validations, validations[-1]["step"])
    if config.keep != "best" or best is None or is_sure(best) or best["step"] == kept["step"]:
        return ""
    right, wrong = best["turned"]
    return (
        f"step {best['step']} is the best in validation, but its gain over the start may be chance: {best['gain']:.4f} with a standard "
        f"error of {best['gain_error']:.4f}, {right} rows turned right and {wrong} wrong (replay --steps best makes it); "
    )
