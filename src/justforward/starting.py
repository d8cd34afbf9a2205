"""Where a run starts: what "auto" comes to, which layers move, what is fitted to training rows before the first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from justforward.added import added_hindrance, start_added, written_by
from justforward.config import PROBED, Layers, TrainConfig
from justforward.data import Example, Splits
from justforward.deep import MOST_ROWS, deep_hindrance, start_deep
from justforward.errors import UserError
from justforward.evaluate import Scorer
from justforward.head import Inside, hindrance, rows_to_fit, start_head
from justforward.last import last_hindrance, start_last
from justforward.models import inner_model
from justforward.prepare import choose_tuned
from justforward.settings import eval_every_of, task_of
from justforward.spared import Spared
from justforward.trunk import rest_below, stack_of
from justforward.tuners import find_targets

THIRD = 0.333  # of the layers are tuned behind what was fitted

MOST_OF_HALF = 512  # rows that a fit sees of a small budget


def choose_layers(model: torch.nn.Module, config: TrainConfig) -> None:
    """Freeze what a run does not tune: by name, by layers, and a head that is where a probe has put it.

    Raises:
        UserError: as `choose_tuned` and `rest_below`.
    """
    choose_tuned(model, config.tune)
    if config.layers is None:
        return
    head: Any = inner_model(model).get_output_embeddings() if config.start in PROBED else None
    if head is not None and config.tuner == "full":
        head.requires_grad_(False)
    rest_below(model, 1.0 if config.layers == "auto" else config.layers)


def decided(
    config: TrainConfig, scorer: Scorer, train: Sequence[Example], note: Callable[[str], None]
) -> TrainConfig:
    """A run's configuration with its start settled, and how often it is validated, which follows from that.

    Arguments and errors are those of `decided_start`.
    """
    config = decided_start(config, scorer, train, note)
    return replace(
        config, eval_every=config.eval_every or eval_every_of(config.start, config.max_forwards)
    )


def decided_start(
    config: TrainConfig, scorer: Scorer, train: Sequence[Example], note: Callable[[str], None]
) -> TrainConfig:
    """A run's configuration with its start settled: what "auto" comes to, how many rows a fit sees, which layers move.

    Args:
        config: resolved.
        scorer: of the base model.
        train: the training rows.
        note: called with a sentence where there is no fit, or a plainer one.
    """
    if config.start == "base":
        return config
    given = config.probe_rows
    if given is not None and given > len(train):
        raise UserError(
            f"--probe-rows is {given}: there are {len(train)} training rows: give at most that"
        )
    count = given or min(len(train), share_of(config.max_forwards * config.batch_size))
    layers = config.layers
    one_stack = stack_of(scorer.model) is not None
    if config.tuner in ("full", "lora") and config.tune is None and layers is None and one_stack:
        layers = THIRD
    start, lora = config.start, config.tuner == "lora"
    if task_of(config).kind == "generation":
        why = last_hindrance(scorer, train[0])
        if why is not None and start == "last":
            raise UserError(f"--start is 'last': {why}: choose --start base")
        if why is not None:
            note(f"the model starts as it is, its last map is not fitted to answers: {why}")
            return replace(config, start="base", probe_rows=None)
        count = count if given else min(count, MOST_ROWS)
        return replace(config, start="last", probe_rows=count, layers=layers)
    if start != "probe":  # that says itself what is in its way
        why = hindrance(scorer, train, count)
        if why is not None and start == "deep":
            raise UserError(f"--start is 'deep': {why}: choose --start base")
        if why is not None:
            what = "LoRA starts at nothing" if lora else "head starts as the base has it"
            note(f"the {what}, not as a linear probe: {why}")
            return replace(config, start="base", probe_rows=None)
        if start == "auto":
            deep = lora or (config.tuner == "full" and layers is not None)
            start = "deep" if deep else "probe"
    if start == "deep":
        count = count if given else min(count, MOST_ROWS)
        share = share_fitted(layers)
        if lora:
            targets, why = _targets(config, scorer, train[0], share)
            config = replace(config, lora_targets=targets)
        else:
            why = deep_hindrance(scorer, train[0], share)
        if why is None and count > MOST_ROWS:
            why = f"{count} rows are more than the {MOST_ROWS} that it can be fitted on"
        if why is not None and config.start == "deep":
            raise UserError(
                f"--start is 'deep': {why}: choose --start {'base' if lora else 'probe'}"
            )
        if why is not None and lora:
            note(f"the LoRA starts at nothing, not as a probe of the upper layers: {why}")
            return replace(config, start="base", probe_rows=None)
        if why is not None:
            note(f"the head alone starts as a linear probe, not the upper layers, too: {why}")
            start = "probe"
    rows = rows_to_fit(train, count, config.batch_size, config.seed)
    return replace(config, start=start, probe_rows=given or len(rows), layers=layers)


def _targets(
    config: TrainConfig, scorer: Scorer, row: Example, share: float
) -> tuple[str | None, str | None]:
    """What --lora-targets comes to where LoRA starts as a probe: with the maps that write it; and why it cannot start so."""
    given = config.lora_targets
    why = added_hindrance(scorer, row, share, config.lora_rank)
    if why is not None:
        return given, why
    found = find_targets(scorer.model, given)
    ends = {name.split(".")[-1] for name in found}
    writers = written_by(scorer, row, share)
    kinds = sorted({name.split(".")[-1] for name in writers})
    if given is not None:
        missing = next((kind for kind in kinds if kind not in ends), None)
        if missing is not None:
            return (
                given,
                f"--lora-targets leaves out {missing}, which writes to the residual stream",
            )
        if not set(writers) & set(found):
            return (
                given,
                f"--lora-targets finds none of the upper layers' maps that write to the residual stream, such as {writers[-1]}",
            )
        return given, None
    return rf"\.({'|'.join(sorted({*ends, *kinds}))})$", None


def share_fitted(layers: Layers | None) -> float:
    """Of the layers, those that a deep start writes to."""
    return THIRD if layers is None or layers == "auto" else layers


def share_of(budget: int) -> int:
    """How many rows a fit sees of a budget of so many: half up to 512, since rows are worth more there than steps; a quarter beyond."""
    return max(1, budget // 4, min(budget // 2, MOST_OF_HALF))


def begin(
    config: TrainConfig,
    scorer: Scorer,
    splits: Splits,
    note: Callable[[str], None],
    spared: Spared,
    or_base: bool,
) -> dict[str, Tensor]:
    """Fit the output head's rows of the label words to training rows (`start_head`), or upper layers, too (`start_deep`), or their
    LoRA alone (`start_added`); or the last map to answers that are written (`start_last`).

    Each training row is seen once here, in batches, which is faster than text by text as the trunk is run; it is run so
    where its outputs are kept for other runs.

    Args:
        config: as `decided` gave it.
        scorer: of the model, with its tuner.
        splits: rows to fit on, and to choose by.
        note: called with what is being done, and what came of it.
        spared: spares layers that do not move.
        or_base: leave the head as it is where that is better in validation.

    Returns:
        What the run keeps as its start.

    Raises:
        UserError: as `start_head`.
    """
    assert config.probe_rows is not None
    rows = rows_to_fit(splits.train, config.probe_rows, config.batch_size, config.seed)
    size = config.eval_batch_size
    kept = config.cache is not None  # text by text, for runs with other rows, too
    with spared.reused() if kept else nullcontext():
        inside: Inside = nullcontext if kept else partial(spared.reused, whole=True)
        if config.start == "last":
            note(f"fitting the last linear map to the answers of {len(rows)} rows")
            written = start_last(scorer, rows, splits.validation, size, inside)
            note(
                f"validation loss {written.before:.4f} before, {written.after:.4f} after, {written.forwards} forwards"
                + ("" if written.tensors else ": it stays as it was")
            )
            return written.tensors
        note(f"fitting a linear probe on the hidden states of {len(rows)} rows")
        if config.start == "deep":
            assert config.layers is not None
            make = start_added if config.tuner == "lora" else start_deep
            share = share_fitted(config.layers)
            found = make(scorer, rows, splits.validation, size, share, inside, or_base)
        else:
            found = start_head(scorer, rows, splits.validation, size, inside, or_base)
    lora = config.tuner == "lora"
    if found.kept:
        note(
            f"the {'model' if lora else 'head'} stays as it is, which is better: validation accuracy {found.accuracy:.1%}, "
            f"{found.forwards} forwards"
        )
        return found.rows
    what = "head and upper layers start" if "to" in found.rows else "the head starts"
    what = "the LoRA starts" if lora else what
    note(
        f"{what} as a linear probe: C = {found.probe.c:g}, validation accuracy {found.accuracy:.1%}, "
        f"{found.forwards} forwards"
    )
    if not found.probe.converged:
        note("note: its fit did not converge")
    return found.rows
