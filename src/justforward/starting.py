"""Where a run starts: what "auto" comes to, which layers move, the head fitted as a probe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from justforward.config import TrainConfig
from justforward.data import Example, Splits
from justforward.errors import UserError
from justforward.evaluate import Scorer
from justforward.models import inner_model
from justforward.prepare import choose_tuned
from justforward.probe import hindrance, rows_to_fit, start_head
from justforward.trunk import rest_below

THIRD = 0.333  # of the layers are tuned behind a head that starts as a probe


def choose_layers(model: torch.nn.Module, config: TrainConfig) -> None:
    """Freeze what a run does not tune: by name, by layers, and a head that is where a probe has put it.

    Raises:
        UserError: as `choose_tuned` and `rest_below`.
    """
    choose_tuned(model, config.tune)
    if config.layers is None:
        return
    head: Any = inner_model(model).get_output_embeddings() if config.start == "probe" else None
    if head is not None and config.tuner == "full":
        head.requires_grad_(False)
    rest_below(model, config.layers)


def decided(
    config: TrainConfig, scorer: Scorer, train: Sequence[Example], note: Callable[[str], None]
) -> TrainConfig:
    """A run's configuration with its start settled: what "auto" comes to, how many rows a probe sees, which layers move.

    Args:
        config: resolved.
        scorer: of the base model.
        train: the training rows.
        note: called with a sentence where there is no probe.
    """
    if config.start == "base":
        return config
    given = config.probe_rows
    if given is not None and given > len(train):
        raise UserError(
            f"--probe-rows is {given}: there are {len(train)} training rows: give at most that"
        )
    count = given or min(len(train), max(1, config.max_forwards * config.batch_size // 4))
    if config.start == "auto":
        why = hindrance(scorer, train, count)
        if why is not None:
            note(f"the head starts as the base has it, not as a linear probe: {why}")
            return replace(config, start="base", probe_rows=None)
    rows = rows_to_fit(train, count, config.batch_size, config.seed)
    layers = config.layers
    if config.tuner == "full" and config.tune is None and layers is None:
        layers = THIRD
    return replace(config, start="probe", probe_rows=given or len(rows), layers=layers)


def begin_head(
    config: TrainConfig, scorer: Scorer, splits: Splits, note: Callable[[str], None]
) -> None:
    """Fit the output head's rows of the label words to training rows (`start_head`).

    Raises:
        UserError: as `start_head`.
    """
    assert config.probe_rows is not None
    rows = rows_to_fit(splits.train, config.probe_rows, config.batch_size, config.seed)
    note(f"fitting a linear probe on the hidden states of {len(rows)} rows")
    found = start_head(scorer, rows, splits.validation, config.eval_batch_size)
    note(
        f"the head starts as a linear probe: C = {found.probe.c:g}, validation accuracy {found.accuracy:.1%}, "
        f"{found.forwards} forwards"
    )
    if not found.probe.converged:
        note("note: its fit did not converge")
