"""What each command takes: one dataclass a command, defaults in one place. No torch in here.

The command line and `--config run.yaml` are made from these classes and their docstrings; a run
folder keeps a `TrainConfig` as config.yaml.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from justforward import catalog, rules
from justforward.errors import UserError
from justforward.ranges import check_ranges
from justforward.tasks import Loss, Task, Truncation, parse_labels

Schedule = Literal["constant", "linear", "cosine"]
Samples = Literal["constant", "linear"]
Keep = Literal["best", "last"]
Split = Literal["train", "validation", "test", "all"]
Tuner = Literal["full", "lora", "prefix", "head"]

# What says where and how a command runs, and not what a run is: kept out of config.yaml.
NOT_KEPT = ("out", "resume", "json")
# What may change between the sessions of one run. `model` and `data` are compared by content.
FREE = ("max_minutes", "target_accuracy", "threads", "model", "data", *NOT_KEPT)


@dataclass(frozen=True)
class TrainConfig:
    """Tune a model on labelled rows with forward passes only.

    Args:
        model: a folder with safetensors or one .gguf, a hub name, or "smollm2" (the packaged model).
        data: the rows: a .csv, .tsv or .jsonl file; with --task the folder that holds its files.
        out: the run folder to make.
        task: a task by name, such as sst2 ("justforward tasks" lists them), or a declaration in YAML.
        template: how a row becomes a prompt, such as "{text} It was" (default the task's).
        labels: the word that answers for each label: negative=terrible,positive=great (or a YAML mapping).
        label_field: the column that holds the label; a task has its own.
        loss: cross-entropy over the choices, or over the full vocabulary.
        truncation: which end of a text is dropped where a row is longer than max_length.
        max_length: longest row in tokens; none: a row beyond the model's context is an error.
        estimator: "activation" (a direction for each example) or "weight" (the paper's).
        rule: projected gradients to coefficients: sgd, rms, sign, clip(3), momentum, joined by "+".
        family: gaussian, rademacher, rank1 or rank1-rademacher (default gaussian).
        lr: learning rate; with rules that normalise (rms, sign), the distance a coordinate moves in a step.
        eps: how far to look.
        num_samples: directions a step (for each example in activation space).
        sample_schedule: constant, or linear from 1 to num_samples over the run.
        weight_decay: decoupled, times lr; skips biases and norms.
        lr_schedule: constant, or linear or cosine to 0 over max_forwards.
        batch_size: rows a step.
        seed: of the directions and the order of the rows.
        tuner: what is tuned: the whole model (full), low-rank additions (lora), keys and values before the text (prefix), the output head (head).
        lora_rank: rank of the additions.
        lora_alpha: their scale: alpha / sqrt(rank), which makes a look equally strong for every rank.
        lora_targets: regular expression; linear maps whose name it finds get LoRA (default the attention's queries and values).
        prefix_length: tokens of the prefix; it takes that much of the model's context.
        tune: regular expression; of the tuner's parameters those whose name it finds are tuned (default all).
        max_forwards: stop after so many forward passes over a batch (a step is 2 for each sample).
        max_minutes: stop after so many minutes.
        target_accuracy: stop when validation reaches it, in (0, 1].
        eval_every: forwards between validations (default an eighth of max_forwards).
        eval_batch_size: rows a forward in validation and test.
        test_size: rows, or a fraction, set aside for the final figure (default a fifth, at most 400; with --task at most 1000 of the task's test rows).
        validation_size: rows, or a fraction, for choosing the best step (default a tenth, at most 200).
        train_size: rows to train on (default all the others).
        shots: with --task: rows of each label to train on; as many others choose the step.
        split_seed: of the split into train, validation and test (default seed).
        keep: the step to keep: the best in validation (accuracy, then loss, then the earliest), or the last.
        threads: CPU threads (default torch's choice).
        resume: continue the run in `out`; what is not given again is taken from there.
        json: print the result as one JSON object, the last line on stdout.
    """

    model: str
    data: str
    out: str
    task: str | None = None
    template: str | None = None
    labels: str | dict[str, str] | None = None
    label_field: str = "label"
    loss: Loss = "choices"
    truncation: Truncation = "right"
    max_length: int | None = None
    estimator: str = "activation"
    rule: str = "rms"
    family: str | None = None
    lr: float = 1e-3
    eps: float = 1e-3
    num_samples: int = 1
    sample_schedule: Samples = "constant"
    weight_decay: float = 0.0
    lr_schedule: Schedule = "linear"
    batch_size: int = 8
    seed: int = 0
    tuner: Tuner = "full"
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_targets: str | None = None
    prefix_length: int = 5
    tune: str | None = None
    max_forwards: int = 400
    max_minutes: float | None = None
    target_accuracy: float | None = None
    eval_every: int | None = None
    eval_batch_size: int = 32
    test_size: int | float | None = None
    validation_size: int | float | None = None
    train_size: int | None = None
    shots: int | None = None
    split_seed: int | None = None
    keep: Keep = "best"
    threads: int | None = None
    resume: bool = False
    json: bool = False


@dataclass(frozen=True)
class EvalConfig:
    """Score a model, or what a run made of it, on labelled rows.

    Args:
        model: as for train; with --run the run's.
        data: the rows; with --run the run's file, of which only the test rows are scored.
        task: as for train: the test rows of the task's folder are scored; with --run the run's.
        template: as for train; with --run the run's.
        labels: as for train; with --run the run's.
        run: a run folder: score the model that the run keeps.
        split: which rows of the run's own data file to score.
        label_field: the column that holds the label (default label, or the run's).
        loss: as for train (default choices, or the run's).
        truncation: as for train (default right, or the run's).
        max_length: as for train (default none, or the run's).
        batch_size: rows a forward.
        threads: CPU threads (default torch's choice).
        json: print the result as one JSON object, the last line on stdout.
    """

    model: str | None = None
    data: str | None = None
    task: str | None = None
    template: str | None = None
    labels: str | dict[str, str] | None = None
    run: str | None = None
    split: Split | None = None
    label_field: str | None = None
    loss: Loss | None = None
    truncation: Truncation | None = None
    max_length: int | None = None
    batch_size: int = 32
    threads: int | None = None
    json: bool = False


@dataclass(frozen=True)
class ReplayConfig:
    """Rebuild a run's model from its base and its log, bit for bit, and save it as a folder.

    Args:
        run: the run folder.
        out: the model folder to make.
        steps: how many steps: a number, "best", "last" (default: the step that the run keeps).
        model: the base model, if it is no longer where the run found it.
        merge: save the whole model with its LoRA added into the weights, instead of the adapter.
        threads: CPU threads (default torch's choice); never changes a bit.
        json: print the result as one JSON object, the last line on stdout.
    """

    run: str
    out: str
    steps: str | None = None
    model: str | None = None
    merge: bool = False
    threads: int | None = None
    json: bool = False


@dataclass(frozen=True)
class TasksConfig:
    """List the tasks that --task knows.

    Args:
        task: one only: a name, or a declaration in YAML to check.
        json: print them as one JSON list instead.
    """

    task: str | None = None
    json: bool = False


@dataclass(frozen=True)
class InspectConfig:
    """Show a run: model, task, curve, last steps.

    Args:
        run: the run folder.
        last: how many of the last steps to show.
        json: print it as one JSON object instead.
    """

    run: str
    last: int = 5
    json: bool = False


# --------------------------------------------------------------------------- what follows from settings


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
        out[str(label)] = str(word)
    return out


def task_of(config: TrainConfig) -> Task:
    """The task that a configuration describes: what it does not give is the declared task's.

    Raises:
        UserError: as `Task` and `catalog.load`; or neither a task nor its parts are given.
    """
    template, labels = config.template, config.labels
    if template is None or labels is None:
        if config.task is None:
            name = "template" if template is None else "labels"
            raise UserError(
                f"--{name} is missing: give --template and --labels, or --task with the name of a "
                "task ('justforward tasks' lists them)"
            )
        declared = catalog.load(config.task).task_for(catalog.kind_of(config.model))
        template = declared.template if template is None else template
        labels = declared.labels if labels is None else labels
    return Task(
        template=template,
        labels=labels_of(labels),
        label_field=config.label_field,
        truncation=config.truncation,
        loss=config.loss,
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
        if owner in ("lora", "prefix") and owner != config.tuner and value != field.default:
            raise UserError(
                f"--{field.name.replace('_', '-')} is {value!r}: it belongs to --tuner {owner}, "
                f"and --tuner is {config.tuner!r}: leave it out"
            )
    first = 2 * (config.num_samples if config.sample_schedule == "constant" else 1)
    if config.max_forwards < first:
        raise UserError(
            f"--max-forwards is {config.max_forwards}: one step takes {first} forwards: give at least that"
        )
    if config.task is None and config.shots is not None:
        raise UserError(
            f"--shots is {config.shots}: it is for the rows of a --task: give --train-size"
        )
    task = task_of(config)
    return replace(
        config,
        template=task.template,
        labels=task.labels,
        rule=rules.parse(config.rule).spec,
        eval_every=config.eval_every or max(2, config.max_forwards // 8),
        split_seed=config.seed if config.split_seed is None else config.split_seed,
    )


def kept_values(config: TrainConfig) -> dict[str, Any]:
    """What config.yaml holds."""
    return {key: value for key, value in asdict(config).items() if key not in NOT_KEPT}


def check_same(old: TrainConfig, new: TrainConfig, where: str) -> None:
    """Refuse to resume a run with settings that would have changed what was already done.

    Raises:
        UserError: naming the option and both values.
    """
    free = set(FREE)
    if new.lr_schedule == "constant" and new.sample_schedule == "constant":
        free.add("max_forwards")  # else the schedules depend on it
    for field in fields(TrainConfig):
        a, b = getattr(old, field.name), getattr(new, field.name)
        same = list(a.items()) == list(b.items()) if isinstance(a, dict) else a == b
        if field.name not in free and not same:
            option = field.name.replace("_", "-")
            why = ", which sets the schedules" if field.name == "max_forwards" else ""
            raise UserError(
                f"{where}: --{option} is {a!r} in the run and {b!r} now{why}: "
                "resume with the run's value, or choose another --out"
            )
