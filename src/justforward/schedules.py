"""What a run does at which step: functions of the configuration and the step alone. No torch in here."""

from __future__ import annotations

import math
from typing import Any

from justforward.config import FITTED, TrainConfig
from justforward.errors import UserError
from justforward.settings import RATES, longest_look, variants_of
from justforward.variants import Blocks, Modified, forwards_of


def learning_rate(config: TrainConfig, forwards: int) -> float:
    """Learning rate of the step that starts after so many forwards: a function of nothing else."""
    assert config.lr is not None
    done = min(forwards / config.max_forwards, 1.0)
    if config.lr_schedule == "linear":
        return config.lr * (1.0 - done)
    if config.lr_schedule == "cosine":
        return config.lr * 0.5 * (1.0 + math.cos(math.pi * done))
    return config.lr


def optimizer_options(config: TrainConfig, given: Blocks | None = None) -> dict[str, Any]:
    """What a resolved configuration says a `MeZO` is made with; and blocks that follow from the model, if there are any."""
    modified, blocks = variants_of(config)
    return {
        "lr": config.lr or RATES[config.tuner],  # until `gauge` has found one nothing is moved
        "eps": longest_look(config),
        "estimator": config.estimator,
        "rule": config.rule,
        "family": config.family,
        "looks": config.looks,
        "num_samples": lambda step: samples_at(config, step),
        "modified": modified,
        "blocks": given or blocks,
        "weight_decay": config.weight_decay,
        "seed": config.seed,
    }


def samples_at(config: TrainConfig, step: int) -> int:
    """Directions that step `step` looks along (for each example in activation space)."""
    last = config.num_samples
    if config.sample_schedule == "constant" or last == 1:
        return last
    # as many as there are if a step takes what the first and the last take on average
    ends = forwards_of(config.looks, 1) + forwards_of(config.looks, last)
    steps = max(1, 2 * config.max_forwards // ends)
    return round(1 + (last - 1) * min(step / steps, 1.0))


def forwards_at(config: TrainConfig, step: int, parts: int = 1) -> int:
    """Forwards that step `step` takes, with so many parameter groups: what is measured is measured for each."""
    measured = _modified(config).forwards(step, parts) if config.modified else 0
    return forwards_of(config.looks, samples_at(config, step)) + measured


def forwards_until(config: TrainConfig, steps: int, parts: int = 1) -> int:
    """Forwards that the first `steps` steps take, and what is fitted or gauged before them."""
    measured = _modified(config).forwards_until(steps, parts) if config.modified else 0
    measured += probe_steps(config) + gauge_forwards(config)
    if config.sample_schedule == "constant":
        return forwards_of(config.looks, config.num_samples) * steps + measured
    looks = (forwards_of(config.looks, samples_at(config, step)) for step in range(steps))
    return sum(looks) + measured


def planned_steps(config: TrainConfig) -> int:
    """How many steps fit into max_forwards, where none measures anything besides (`modified`)."""
    steps, left = 0, config.max_forwards - forwards_until(config, 0)
    while (left := left - forwards_at(config, steps)) >= 0:
        steps += 1
    return steps


def probe_steps(config: TrainConfig) -> int:
    """How many batches what was fitted before the first step has seen; steps go on with the rows after those."""
    if config.start not in FITTED or config.probe_rows is None:
        return 0
    return math.ceil(config.probe_rows / config.batch_size)


def gauge_forwards(config: TrainConfig) -> int:
    """Forwards that find the rate and the length of looks (`gauge`): looks of steps, and of the first one at other lengths."""
    if not config.gauge:
        return 0
    lengths = 3 if config.objective == "loss" else 2
    return lengths * forwards_at(config, 0) + sum(
        forwards_at(config, step) for step in range(1, config.gauge + 1)
    )


def check_enough(config: TrainConfig, parts: int, more: int) -> None:
    """Refuse a budget in which there is no step.

    Args:
        config: resolved.
        parts: parameter groups.
        more: forwards before the first step besides.

    Raises:
        UserError: saying how many forwards that takes.
    """
    first = forwards_at(config, 0, parts) + forwards_until(config, 0, parts) + more
    if first > config.max_forwards:
        what = f"it measures of {parts} parts" if config.modified else "comes before it"
        raise UserError(
            f"--max-forwards is {config.max_forwards}: the first step takes {first} forwards, with what {what}: give at least that"
        )


def _modified(config: TrainConfig) -> Modified:
    assert config.modified is not None
    return Modified.parse(config.modified)


def validation_due(config: TrainConfig, before: int, after: int) -> bool:
    """Whether a validation follows the step that took the forwards from `before` to `after`."""
    assert config.eval_every is not None
    return before // config.eval_every < after // config.eval_every


def was_due(config: TrainConfig, validation: dict[str, Any], parts: int = 1) -> bool:
    """Whether a validation's line is of one that was due, not one that a limit brought about: the limit may be raised, and
    the run then has to go as one that never had it.
    """
    step, after = validation["step"], validation["forwards"]
    before = after - (forwards_at(config, step - 1, parts) if step else 0)
    return step == 0 or validation_due(config, before, after)
