"""What a run does at which step: functions of the configuration and the step alone. No torch in here."""

from __future__ import annotations

import math

from justforward.config import TrainConfig


def learning_rate(config: TrainConfig, forwards: int) -> float:
    """Learning rate of the step that starts after so many forwards: a function of nothing else."""
    done = min(forwards / config.max_forwards, 1.0)
    if config.lr_schedule == "linear":
        return config.lr * (1.0 - done)
    if config.lr_schedule == "cosine":
        return config.lr * 0.5 * (1.0 + math.cos(math.pi * done))
    return config.lr


def samples_at(config: TrainConfig, step: int) -> int:
    """Directions that step `step` looks along (for each example in activation space)."""
    last = config.num_samples
    if config.sample_schedule == "constant" or last == 1:
        return last
    steps = max(1, config.max_forwards // (1 + last))  # 2 (1 + last) / 2 forwards a step on average
    return round(1 + (last - 1) * min(step / steps, 1.0))


def forwards_until(config: TrainConfig, steps: int) -> int:
    """Forwards that the first `steps` steps take."""
    if config.sample_schedule == "constant":
        return 2 * config.num_samples * steps
    return 2 * sum(samples_at(config, step) for step in range(steps))


def validation_due(config: TrainConfig, before: int, after: int) -> bool:
    """Whether a validation follows the step that took the forwards from `before` to `after`."""
    assert config.eval_every is not None
    return before // config.eval_every < after // config.eval_every
