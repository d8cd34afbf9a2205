"""What follows from the options of a command: the task, the values left open, what may change on resume. No torch in here."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import asdict, fields, replace
from typing import Any

from justforward import catalog, rules
from justforward.config import FREE, NOT_KEPT, PROBED, BaselineConfig, RankConfig, TrainConfig
from justforward.errors import UserError
from justforward.ranges import check_ranges
from justforward.tasks import Loss, Task, Truncation, parse_labels
from justforward.variants import Blocks, Modified, check_variants, forwards_of, undivided

# How far to look, in units of z, unless asked otherwise. An answer changes only where a look is long enough to
# change it: with 3e-3 hardly any of SmolLM2's do (README, objectives).
LOSS_EPS, METRIC_EPS = 1e-3, 2e-2
# The longest looks that `--gauge` may find, which weights are laid on their grids for: their steps are 2^-25 and 2^-22, or what the
# weights themselves ask for.
LONGEST_LOSS_EPS, LONGEST_METRIC_EPS = 16.0 * LOSS_EPS, 4.0 * METRIC_EPS

# How far to move, by what is tuned: at the rate of weights adapters hardly move (docs/race.md has what was tried).
RATES = {"full": 1e-3, "lora": 5e-3, "prefix": 3e-2, "prompt": 1e-2, "head": 1e-3}


def labels_of(labels: str | dict[str, str]) -> dict[str, str]:
    """The mapping that `--labels` or a YAML file spells.

    Raises:
        UserError: it is not label=word,label=word, or YAML read a bare yes or no as a truth value.
    """
    if isinstance(labels, str):
        return parse_labels(labels)
    out: dict[str, str] = {}
    for label, word in labels.items():
        for value in (label, word):
            if isinstance(value, bool) or value is None:
                raise UserError(
                    f"labels: YAML reads {label!r}: {word!r} here: put quotes around yes, no, true, null"
                )
            if isinstance(value, list | dict):
                raise UserError(f"labels: {label!r}: {word!r} is no word: give the text of one")
        out[str(label)] = str(word)
    return out


def task_of(config: TrainConfig | RankConfig) -> Task:
    """The task that a configuration describes: what it does not give is the declared task's.

    Raises:
        UserError: as `Task` and `catalog.load`; or neither a task nor its parts are given.
    """
    return make_task(
        config.task,
        config.model,
        config.template,
        config.labels,
        label_field=config.label_field,
        truncation=config.truncation,
        loss=config.loss,
    )


def make_task(
    name: str | None,
    model: str,
    template: str | None,
    labels: str | dict[str, str] | None,
    *,
    label_field: str = "label",
    truncation: Truncation = "right",
    loss: Loss | None = None,
) -> Task:
    """A declared task with template and labels of one's own where they are given, or one made of these alone.

    Raises:
        UserError: as `Task` and `catalog.load`; or there is neither a name nor both of template and labels, or a name and
            a column of labels, which a declared task has of its own.
    """
    words = labels_of(labels) if labels else None
    if name is not None and label_field != "label":
        raise UserError(
            f"--label-field is {label_field!r}: task {name!r} says itself where its labels are: leave it out"
        )
    if name is not None:
        return catalog.load(name).task_for(
            catalog.kind_of(model),
            truncation=truncation,
            loss=loss,
            template=template,
            labels=words,
        )
    if template is None or words is None:
        missing = "template" if template is None else "labels"
        raise UserError(
            f"--{missing} is missing: give --template and --labels, or --task with the name of a "
            "task ('justforward tasks' lists them)"
        )
    return Task(
        template=template,
        labels=words,
        label_field=label_field,
        truncation=truncation,
        loss=loss or "choices",
    )


def resolved(config: TrainConfig) -> TrainConfig:
    """`config` checked, with what depends on other values filled in.

    Raises:
        UserError: a value is out of range or unknown.
    """
    check_ranges(config)
    for option, pattern in (("tune", config.tune), ("lora-targets", config.lora_targets)):
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise UserError(
                f"--{option} is {pattern!r}: not a regular expression: {error}"
            ) from None
    for field in fields(config):
        owner = field.name.partition("_")[0]
        value = getattr(config, field.name)
        if (
            owner in ("lora", "prefix", "prompt")
            and owner != config.tuner
            and value != field.default
        ):
            raise UserError(
                f"--{field.name.replace('_', '-')} is {value!r}: it belongs to --tuner {owner}, "
                f"and --tuner is {config.tuner!r}: leave it out"
            )
    check_frozen(config.quantize, config.tuner)
    if config.quantize is not None and config.dtype != "float32":
        raise UserError(
            f"--dtype is {config.dtype!r}: what --quantize leaves as it is stays float32: leave it out"
        )
    modified, blocks = variants_of(config)
    rule = rules.parse(config.rule)
    check_variants(config.looks, config.estimator, rule, modified, blocks)
    if modified is not None and modified.by == "gradient" and config.objective != "loss":
        raise UserError(
            f"--modified is {config.modified!r}: {config.objective} has no gradient: measure by looks"
        )
    if config.block_order != "cyclic" and blocks is None:
        raise UserError(
            f"--block-order is {config.block_order!r}: it is for --blocks: leave it out"
        )
    samples = config.num_samples if config.sample_schedule == "constant" else 1
    first = forwards_of(config.looks, samples)
    if config.max_forwards < first:
        raise UserError(
            f"--max-forwards is {config.max_forwards}: one step takes {first} forwards: give at least that"
        )
    _check_of_use(config)
    if config.task is None and config.shots is not None:
        raise UserError(
            f"--shots is {config.shots}: it is for the rows of a --task: give --train-size"
        )
    config = _privately(config)
    _check_gauge(config)
    task = task_of(config)
    if config.temperature and (config.objective == "loss" or task.kind != "generation"):
        raise UserError(
            f"--temperature is {config.temperature}: it is for an --objective on texts that the model writes, and no step "
            "has it write any: leave it out"
        )
    whole = config.tuner in ("full", "head")
    able = whole or (config.tuner, config.start) == ("lora", "deep")
    if config.start in PROBED and (not able or task.kind != "classification"):
        what = f"a task of kind {task.kind!r}" if able else f"--tuner {config.tuner}"
        raise UserError(
            f"--start is {config.start!r}: it fits the output head (--tuner head or full) to labels that rows share, and this is "
            f"{what}: leave it out"
        )
    if config.start == "deep" and (config.tuner == "head" or config.tune is not None):
        what = "--tuner head" if config.tuner == "head" else f"--tune {config.tune!r}"
        raise UserError(
            f"--start is 'deep': it writes to the upper layers (--layers says to how many), and this is {what}: "
            "choose --start probe"
        )
    if config.start == "last":
        what = "" if task.kind == "generation" else f"a task of kind {task.kind!r}"
        what = what if config.tuner == "full" else f"--tuner {config.tuner}"
        what = what or ("" if config.tune is None else f"--tune {config.tune!r}")
        if what:
            raise UserError(
                f"--start is 'last': it fits the whole model's last map to answers that are written, and this is {what}: "
                "leave it out"
            )
    start = config.start
    tuners = {"classification": ("full", "head", "lora"), "generation": ("full",)}
    fits = config.tuner in tuners.get(task.kind, ())
    if start == "auto" and (not fits or config.tune is not None):
        start = "base"
    if config.probe_rows is not None and start == "base":
        raise UserError(
            f"--probe-rows is {config.probe_rows}: it is for what is fitted before the first step, and the run starts from the base: leave it out"
        )
    if config.layers is not None and config.tuner not in ("full", "lora"):
        raise UserError(
            f"--layers is {config.layers}: it is for --tuner full or lora, and this is {config.tuner}: leave it out"
        )
    _check_auto_layers(config, rule)
    _check_parts(config)
    return replace(
        config,
        template=task.template,
        labels=task.labels,
        loss=task.loss,
        start=start,
        rule=rules.parse(config.rule).spec,
        lr=config.lr or (None if config.gauge else RATES[config.tuner]),
        eps=config.eps or (None if config.gauge else usual_eps(config)),
        eval_every=config.eval_every
        or (None if start == "auto" else eval_every_of(start, config.max_forwards)),
        split_seed=config.seed if config.split_seed is None else config.split_seed,
    )


def _check_of_use(config: TrainConfig) -> None:
    """Refuse what would change nothing, since something else is not as it has to be for that.

    Raises:
        UserError: naming both.
    """
    if config.sample_schedule != "constant" and config.num_samples == 1:
        raise UserError(
            f"--sample-schedule is {config.sample_schedule!r}: it goes from 1 to --num-samples, which is 1: give more, or "
            "leave it out"
        )
    if config.cache is not None and not config.reuse:
        raise UserError(
            f"--cache is {config.cache!r}: it keeps what --reuse gives, and that is off: leave one of them out"
        )
    if config.keep_snapshots != TrainConfig.keep_snapshots and config.snapshot_every is None:
        raise UserError(
            f"--keep-snapshots is {config.keep_snapshots}: there are none without --snapshot-every: give that, or leave it out"
        )


def _check_parts(config: TrainConfig) -> None:
    """Refuse a step in parts where these have to be seen together.

    Raises:
        UserError: naming the option that wants it.
    """
    whole, size = undivided(config.looks, config.modified), config.rows_at_once
    if config.private and size not in (None, 1):
        raise UserError(
            f"--rows-at-once is {size}: a step with --private runs each row by itself: in company the last bits of a row's loss "
            "tell of the others: leave it out"
        )
    if size is not None and whole is not None:
        raise UserError(
            f"--rows-at-once is {size}: a step with --{whole} sees all its rows at once: leave one of them out"
        )


def usual_eps(config: TrainConfig) -> float:
    """How far a run looks that is told nothing, and finds nothing."""
    return LOSS_EPS if config.objective == "loss" else METRIC_EPS


def longest_look(config: TrainConfig) -> float:
    """How far a run may look at most: what its weights' grids are laid for."""
    given = config.eps or 0.0
    if not config.gauge:
        return given
    return max(given, LONGEST_LOSS_EPS if config.objective == "loss" else LONGEST_METRIC_EPS)


def _check_auto_layers(config: TrainConfig, rule: rules.Chain) -> None:
    """Refuse `--layers auto` where steps cannot be of some layers alone, or nothing says when they are done.

    Raises:
        UserError: naming what is in its way.
    """
    for name, value, good, why in (
        ("private", config.private, not config.private, "looks at training rows would be seen in what it chooses"),
        ("blocks", config.blocks, config.blocks is None, "that chooses what a step moves, too"),
        ("modified", config.modified, config.modified is None, "it looks along each layer at another length"),
        ("looks", config.looks, config.looks != "one-point", "a one-point look is compared with the step before"),
        ("rule", config.rule, not (rule.momentum or rule.moments), "its past directions are of layers that rest now"),
        ("patience", config.patience, config.patience != 0, "other layers move when validation has been flat so many times"),
    ):  # fmt: skip
        if config.layers == "auto" and not good:
            raise UserError(
                f"--layers is 'auto' and --{name} {value!r}: {why}: leave one of them out"
            )


def _check_gauge(config: TrainConfig) -> None:
    """Refuse `--gauge` where looks before the first step are not those of a step, or say more than they may.

    Raises:
        UserError: naming what is in its way.
    """
    for name, value, good, why in (
        ("private", config.private, (False,), "looks at training rows would be seen in its rate"),
        ("looks", config.looks, ("two-sided", "one-sided"), "a one-point look is compared with the step before"),
        ("modified", config.modified, (None,), "it looks along each layer at another length"),
        ("blocks", config.blocks, (None,), "its steps look along different weights"),
    ):  # fmt: skip
        if config.gauge and value not in good:
            raise UserError(
                f"--gauge is {config.gauge} and --{name} {value!r}: {why}: leave out --gauge, and give --lr and --eps where the "
                "usual ones do not do"
            )


def _privately(config: TrainConfig) -> TrainConfig:
    """`config` with the defaults that differ in a private run filled in.

    Raises:
        UserError: an option is for private runs only, or would say more of the training rows than their noisy answers.
    """
    private = config.private
    config = replace(
        config,
        backoff=not private if config.backoff is None else config.backoff,
        patience=(0 if private else 2) if config.patience is None else config.patience,
        keep=config.keep or ("last" if private else "best"),
    )
    if not private:
        for name in ("target_epsilon", "target_delta", "noise_multiplier", "clip"):
            value = getattr(config, name)
            if value is not None:
                raise UserError(
                    f"--{name.replace('_', '-')} is {value!r}: it is for --private: give that too, or leave it out"
                )
        return config
    if (config.target_epsilon is None) == (config.noise_multiplier is None):
        raise UserError(
            "--private takes either --target-epsilon or --noise-multiplier: give one of them"
        )
    for name, value, good, why in (
        ("estimator", config.estimator, "weight", "in activation space each row has directions of its own, so the log would show which rows took part"),
        ("looks", config.looks, ("two-sided", "one-sided"), "it keeps a loss of training rows, without noise, for the next step"),
        ("modified", config.modified, None, "it measures layers by the losses of training rows, without noise"),
        ("objective", config.objective, "loss", "what is bounded for each row is its loss"),
        ("start", config.start, ("auto", "base"), "it is fitted to training rows without noise"),
        ("backoff", config.backoff, False, "it takes steps back by the losses of training rows, without noise"),
        ("max_minutes", config.max_minutes, None, "how long steps take depends on the rows that were drawn, and the log would show how many there were in that time"),
        ("cache", config.cache, None, "it shows what the model makes of training rows to other runs, and takes it from them"),
    ):  # fmt: skip
        if value not in (good if isinstance(good, tuple) else (good,)):
            use = good[-1] if isinstance(good, tuple) else good
            option = f"--{name.replace('_', '-')}"
            advice = "leave it out" if use in (None, False) else f"choose {option} {use}"
            raise UserError(f"{option} is {value!r}, with --private: {why}: {advice}")
    return replace(config, start="base")


def eval_every_of(start: str, forwards: int) -> int:
    """Forwards between validations, which cost less where lower layers are spared; not after every few steps, either."""
    if start == "base":
        return max(2, forwards // 8)
    return max(2, min(16, forwards // 4), forwards // 16)


def check_frozen(quantize: str | None, tuner: str, dtype: str = "float32") -> None:
    """Refuse a tuner that moves the weights of a quantised model, or that is saved with them.

    Args:
        quantize, tuner: as `TrainConfig` has them.
        dtype: of first-order tuning, which does not move 16-bit weights here.

    Raises:
        UserError: naming those that do not.
    """
    if dtype != "float32" and tuner in ("full", "head"):
        raise UserError(
            f"--dtype is {dtype!r}: AdamW's updates are too small for 16-bit weights, and --tuner is {tuner!r}: "
            "choose lora, prefix or prompt"
        )
    if quantize is not None and tuner in ("full", "head"):
        raise UserError(
            f"--quantize is {quantize!r}: quantised weights are frozen, and --tuner is {tuner!r}: "
            "choose --tuner lora, prefix or prompt"
        )


# Options of `baseline` that only some methods have a use for.
_BELONGS = {
    "demonstrations": ("icl",),
    "draws": ("icl",),
    "calibrate": ("zero-shot", "icl"),
    "out": ("probe", "first-order"),
    **dict.fromkeys(
        ("tuner", "lora_rank", "lora_alpha", "lora_targets", "prefix_length", "prompt_length", "tune", "lr", "max_steps",
         "max_minutes", "batch_size", "eval_every", "gradient_checkpointing"),
        ("first-order",),
    ),
}  # fmt: skip


def check_belongs(config: BaselineConfig) -> None:
    """Refuse options of another method of `baseline` than the one that is asked for.

    Raises:
        UserError: naming the option and the methods that have a use for it.
    """
    for field in fields(config):
        methods = _BELONGS.get(field.name)
        value = getattr(config, field.name)
        if methods is not None and config.method not in methods and value != field.default:
            raise UserError(
                f"--{field.name.replace('_', '-')} is {value!r}: it belongs to --method {' or '.join(methods)}, "
                f"and --method is {config.method!r}: leave it out"
            )


def variants_of(config: TrainConfig) -> tuple[Modified | None, Blocks | None]:
    """What `--modified` and `--blocks` spell.

    Raises:
        UserError: as `Modified.parse` and `Blocks.parse`.
    """
    modified = None if config.modified is None else Modified.parse(config.modified)
    blocks = None if config.blocks is None else Blocks.parse(config.blocks, config.block_order)
    return modified, blocks


def kept_values(config: TrainConfig) -> dict[str, Any]:
    """What config.yaml holds."""
    return {key: value for key, value in asdict(config).items() if key not in NOT_KEPT}


def check_same(
    old: TrainConfig, new: TrainConfig, where: str, names: Collection[str] | None = None
) -> None:
    """Refuse to resume a run with settings that would have changed what was already done.

    Args:
        old, new: what the run was begun with, and what is asked for now.
        where: the run's folder.
        names: of the settings that are looked at; None for all.

    Raises:
        UserError: naming the option and both values.
    """
    free = set(FREE)
    if new.lr_schedule == "constant" and new.sample_schedule == "constant":
        free.add("max_forwards")  # else the schedules depend on it
    if new.target_epsilon is not None:
        free.discard("max_forwards")
    for field in fields(TrainConfig):
        if field.name in free or (names is not None and field.name not in names):
            continue
        a, b = getattr(old, field.name), getattr(new, field.name)
        same = list(a.items()) == list(b.items()) if isinstance(a, dict) else a == b
        if not same:
            option = field.name.replace("_", "-")
            sets = "schedules" if new.target_epsilon is None else "noise for the target"
            why = f", which sets the {sets}" if field.name == "max_forwards" else ""
            raise UserError(
                f"{where}: --{option} is {a!r} in the run and {b!r} now{why}: "
                "resume with the run's value, or choose another --out"
            )
