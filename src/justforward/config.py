"""What each command takes: one dataclass a command, defaults in one place. No torch in here.

The command line and `--config run.yaml` are made from these classes and their docstrings; a run
folder keeps a `TrainConfig` as config.yaml.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from justforward.tasks import Loss, Truncation

Schedule = Literal["constant", "linear", "cosine"]
Samples = Literal["constant", "linear"]
Looks = Literal["two-sided", "one-sided", "one-point"]
Order = Literal["cyclic", "random"]
Layers = float | Literal["auto"]
Keep = Literal["best", "last"]
Split = Literal["train", "validation", "test", "all"]
Tuner = Literal["full", "lora", "prefix", "prompt", "head"]
Start = Literal["auto", "base", "probe", "deep", "last"]
PROBED = ("probe", "deep")  # the head starts as a probe of training rows
FITTED = (*PROBED, "last")  # something is fitted to training rows before the first step
WORKERS = "(each worker's own)"  # what a hub's config says of its data
Prompting = Literal["both", "with", "without"]
Dtype = Literal["float32", "bfloat16", "float16"]
Quantize = Literal["int8", "bnb8", "bnb4", "gguf"]
Sync = float | Literal["step", "end"]
DeviceKind = Literal["cpu", "gpu"]
Method = Literal["zero-shot", "icl", "probe", "first-order"]

# What says where and how a command runs, and not what a run is: kept out of config.yaml.
NOT_KEPT = ("out", "resume", "json")
# What may change between the sessions of one run. `model` and `data` are compared by content.
FREE = (
    *("max_minutes", "target_accuracy", "patience", "threads"),
    *("cache", "cache_gb", "offload"),
    *("sync", "snapshot_every", "keep_snapshots"),
    *("model", "data"),
    *NOT_KEPT,
)


@dataclass(frozen=True)
class TrainConfig:
    """Tune a model on labelled rows with forward passes only.

    Args:
        model: a folder with safetensors or one .gguf, a hub name, or "smollm2" (the packaged model).
        data: the rows: a .csv, .tsv or .jsonl file; with --task the folder that holds its files, or "hub" to download them once.
        out: the run folder to make.
        task: a task by name, such as sst2 ("justforward tasks" lists them), or a declaration in YAML.
        template: how a row becomes a prompt, such as "{text} It was" (default the task's).
        labels: the word that answers for each label: negative=terrible,positive=great (or a YAML mapping).
        label_field: the column that holds the label; a task has its own.
        loss: cross-entropy over the choices, or over the full vocabulary (default the task's, else choices).
        objective: what is made better: loss, a metric of the task such as accuracy or f1, or rewards.py:function.
        temperature: with an objective on written texts, how they are drawn in training; 0: the likeliest token.
        truncation: which end of a text is dropped where a row is longer than max_length.
        max_length: longest row in tokens; none: a row beyond the model's context is an error.
        estimator: "activation" (a direction for each example) or "weight" (the paper's).
        rule: projected gradients to coefficients: sgd, rms, sign, spread, clip(3), momentum, adam, rmsprop, joined by "+".
        family: gaussian, rademacher, rank1 or rank1-rademacher (default gaussian).
        looks: two-sided, one-sided (samples + 1 forwards a step) or, in weight space, one-point (samples forwards, against the loss of the step before).
        modified: look along unlike layers at unlike lengths: variance or expectation, with parameters as in "variance(by=looks, per=layer, every=100, samples=1)".
        blocks: look along and move one block a step: "layers", or regular expressions with spaces between them, one a block.
        block_order: cyclic, or random.
        lr: learning rate; with rules that normalise (rms, sign, spread), the distance a coordinate moves in a step (default full and head 1e-3, lora 5e-3, prefix 3e-2, prompt 1e-2).
        eps: how far to look (default 1e-3 for the loss, 2e-2 for other objectives: a shorter look changes hardly any answer).
        gauge: find lr and eps, where they are not given, by the looks of so many steps (and three more) before the first one, and not from what is tuned; 0: do not.
        num_samples: directions a step (for each example in activation space).
        sample_schedule: constant, or linear from 1 to num_samples over the run.
        weight_decay: decoupled, times lr; skips biases and norms.
        lr_schedule: constant, or linear or cosine to 0 over max_forwards.
        batch_size: rows a step (with private on average).
        rows_at_once: rows of a step that go through the model at once: fewer take less memory, and where it is given no bit of a step depends on how many processes there are (default all; with torchrun 1, where more are faster as long as there are enough parts for all).
        seed: of the directions and the order of the rows.
        tuner: what is tuned: the whole model (full), low-rank additions (lora), keys and values before the text (prefix), embeddings before it (prompt), the output head (head).
        start: with --tuner head, full or lora: the output head from the base model, or from a linear probe of training rows (probe), or with full or lora one of all that the upper layers compute, written into them (deep); for answers that are written, with full, the last layer's last linear map fitted to their tokens (last); auto: last or deep, probe or base, the first that task and model allow.
        probe_rows: rows that the probe, or the last map, is fitted on (default half of what max_forwards reads, up to 512, or a quarter if that is more; all if there are fewer).
        layers: the last layers are tuned and what is behind them, this share of all (default all, or where a whole model starts fitted to training rows a third, and a head that is a probe stays); auto: one third of the layers after the other, chosen by looks, another when validation is flat.
        lora_rank: rank of the additions.
        lora_alpha: their scale: alpha / sqrt(rank), which makes a look equally strong for every rank.
        lora_targets: regular expression; linear maps whose name it finds get LoRA (default the attention's queries and values, with a deep start what writes to the residual stream, too).
        prefix_length: tokens of the prefix; it takes that much of the model's context.
        prompt_length: tokens of the prompt; likewise.
        tune: regular expression; of the tuner's parameters those whose name it finds are tuned (default all).
        dtype: how weights are stored: float32, bfloat16 or float16 (half the memory; on a CPU they are computed with in float32 one matrix at a time).
        quantize: keep the base model's linear maps in 8 or 4 bits (int8: torchao; bnb8, bnb4: bitsandbytes), or the matrices of a .gguf as it stores them (gguf), for lora, prefix and prompt.
        offload: folder on a local disk for the weights that are tuned, while they are: for models larger than memory; nothing of it stays.
        reuse: run each text once through the layers below what is tuned, and keep what they give.
        cache: folder to keep that in for further runs (default a temporary file beside `out`).
        cache_gb: how much of it is kept at most.
        private: protect the training rows by differential privacy (docs/privacy.md): with target_epsilon or noise_multiplier, in weight space from the base.
        target_epsilon: private: find the noise with which all steps of max_forwards cost no more than this.
        target_delta: private: at which delta epsilon is counted (default 1e-5, or a tenth of 1 / training rows if that is less).
        noise_multiplier: private: standard deviation of the noise, in units of what one row can change.
        clip: private: the length that a row's projected gradients are clipped to (default: they are scaled to length 1, which is a vote; docs/privacy.md says how to choose).
        backoff: where the loss runs away, take steps back to where it was best and go on at half the rate, after a worse validation at a quarter (default yes; with private no).
        max_forwards: stop after so many forward passes over a batch (a two-sided step is 2 for each sample).
        max_minutes: stop after so many minutes.
        patience: stop when so many validations in a row were no better than one before, by value or by a hundredth of the loss (0: go on; default 2, with private 0).
        target_accuracy: stop when validation reaches it (the task's first metric), in (0, 1].
        eval_every: forwards between validations (default an eighth of max_forwards; a sixteenth, but 16 at least, with a --start other than base, where lower layers are spared).
        eval_batch_size: rows a forward in validation and test.
        test_size: rows, or a fraction, set aside for the final figure (default a fifth, at most 400; with --task at most 1000 of the task's test rows).
        validation_size: rows, or a fraction, for choosing the best step (default a tenth, at most 200).
        train_size: rows to train on (default all the others).
        shots: with --task: rows of each label to train on; as many others choose the step.
        split_seed: of the split into train, validation and test (default seed).
        keep: the step to keep: the best in validation (the task's first metric, then loss, then the earliest) of those whose gain over the start is above its standard error, or the last (default best, with private last).
        threads: CPU threads (default torch's choice).
        sync: when log and metrics are forced to the disk, against a failure of the machine: after so many seconds, each "step", or at the "end"; a process that is killed loses nothing of either.
        snapshot_every: steps between snapshots of the tuned weights in the run folder, so that --resume and replay need not begin at the base (default none: they cost a copy of these weights each, and a replay a fraction of the steps' time).
        keep_snapshots: how many of the newest are kept.
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
    loss: Loss | None = None
    objective: str = "loss"
    temperature: float = 0.0
    truncation: Truncation = "right"
    max_length: int | None = None
    estimator: str = "activation"
    rule: str = "rms"
    family: str | None = None
    looks: Looks = "two-sided"
    modified: str | None = None
    blocks: str | None = None
    block_order: Order = "cyclic"
    lr: float | None = None
    eps: float | None = None
    gauge: int = 0
    num_samples: int = 1
    sample_schedule: Samples = "constant"
    weight_decay: float = 0.0
    lr_schedule: Schedule = "linear"
    batch_size: int = 8
    rows_at_once: int | None = None
    seed: int = 0
    tuner: Tuner = "full"
    start: Start = "auto"
    probe_rows: int | None = None
    layers: Layers | None = None
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_targets: str | None = None
    prefix_length: int = 5
    prompt_length: int = 20
    tune: str | None = None
    dtype: Dtype = "float32"
    quantize: Quantize | None = None
    offload: str | None = None
    reuse: bool = True
    cache: str | None = None
    cache_gb: float = 4.0
    private: bool = False
    target_epsilon: float | None = None
    target_delta: float | None = None
    noise_multiplier: float | None = None
    clip: float | None = None
    backoff: bool | None = None
    max_forwards: int = 400
    max_minutes: float | None = None
    patience: int | None = None
    target_accuracy: float | None = None
    eval_every: int | None = None
    eval_batch_size: int = 32
    test_size: int | float | None = None
    validation_size: int | float | None = None
    train_size: int | None = None
    shots: int | None = None
    split_seed: int | None = None
    keep: Keep | None = None
    threads: int | None = None
    sync: Sync = 5.0
    snapshot_every: int | None = None
    keep_snapshots: int = 2
    resume: bool = False
    json: bool = False


@dataclass(frozen=True)
class EvalConfig:
    """Score a model, or what a run made of it, on labelled rows.

    Args:
        model: as for train, or an adapter in peft's format; with --run the run's.
        base: the base model of an adapter, if it is no longer where that says.
        dtype: as for train; with --run the run's.
        quantize: as for train: the model, or an adapter's base, is scored so; with --run the run's.
        data: the rows; with --run the run's file, of which only the test rows are scored.
        task: as for train: the test rows of the task's folder are scored; with --run the run's.
        template: as for train; with --run the run's.
        labels: as for train; with --run the run's.
        run: a run folder: score the model that the run keeps.
        offload: as for train; it is for --run.
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
    base: str | None = None
    offload: str | None = None
    dtype: Dtype | None = None
    quantize: Quantize | None = None


@dataclass(frozen=True)
class BaselineConfig:
    """Score what a run is compared with, on the rows, prompts and splits that train would have.

    Args:
        method: the model as it is (zero-shot), with solved rows before each prompt (icl), logistic regression on its last hidden state (probe), backpropagation with AdamW (first-order).
        model: as for train.
        data: as for train.
        task: as for train.
        template: as for train.
        labels: as for train.
        label_field: as for train.
        loss: as for train.
        truncation: as for train.
        max_length: as for train; icl drops the first demonstrations where a row would be longer.
        test_size: as for train.
        validation_size: as for train.
        train_size: as for train.
        shots: as for train.
        split_seed: as for train.
        seed: of the order of the rows, of LoRA's and the prefix's start, of the demonstrations.
        demonstrations: icl: training rows before each prompt, as many of each label (default 32, or all if there are fewer).
        draws: icl: so many choices of demonstrations; the figure is their mean (default 3).
        calibrate: zero-shot, icl: take off the scores of a prompt without content.
        tuner: first-order: as for train.
        lora_rank: as for train.
        lora_alpha: as for train.
        lora_targets: as for train.
        prefix_length: as for train.
        prompt_length: as for train.
        tune: first-order: as for train.
        dtype: as for train, for every method; first-order tunes lora, prefix or prompt on 16-bit weights.
        quantize: as for train, for every method.
        lr: first-order: of the first step, falling linearly to 0 (default full 1e-5, lora 1e-4, prefix and prompt 1e-2, head 1e-3).
        max_steps: first-order: updates (default 200).
        max_minutes: first-order: begin no step after so many minutes.
        batch_size: first-order: rows a step.
        eval_every: first-order: steps between validations (default an eighth of max_steps).
        gradient_checkpointing: first-order: keep the inputs of layers only and run these twice, for memory.
        eval_batch_size: rows a forward in validation and test.
        out: probe, first-order: save the probe, the adapter or the tuned model in this new folder.
        threads: CPU threads (default torch's choice).
        json: print the result as one JSON object, the last line on stdout.
    """

    method: Method
    model: str
    data: str
    task: str | None = None
    template: str | None = None
    labels: str | dict[str, str] | None = None
    label_field: str = "label"
    loss: Loss | None = None
    truncation: Truncation = "right"
    max_length: int | None = None
    test_size: int | float | None = None
    validation_size: int | float | None = None
    train_size: int | None = None
    shots: int | None = None
    split_seed: int | None = None
    seed: int = 0
    demonstrations: int | None = None
    draws: int | None = None
    calibrate: bool = False
    tuner: Tuner = "full"
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_targets: str | None = None
    prefix_length: int = 5
    prompt_length: int = 20
    tune: str | None = None
    dtype: Dtype = "float32"
    quantize: Quantize | None = None
    lr: float | None = None
    max_steps: int | None = None
    max_minutes: float | None = None
    batch_size: int = 8
    eval_every: int | None = None
    gradient_checkpointing: bool = False
    eval_batch_size: int = 32
    out: str | None = None
    threads: int | None = None
    json: bool = False


@dataclass(frozen=True)
class ReplayConfig:
    """Rebuild a run's model from its base and its log, bit for bit, and save it as a folder.

    Args:
        run: the run folder.
        out: the model folder to make.
        steps: how many steps: a number, "best" in validation whatever its gain, "last" (default: the step that the run keeps).
        model: the base model, if it is no longer where the run found it.
        merge: save the whole model with its LoRA added into the weights, instead of the adapter.
        offload: as for train.
        threads: CPU threads (default torch's choice); never changes a bit.
        json: print the result as one JSON object, the last line on stdout.
    """

    run: str
    out: str
    steps: str | None = None
    model: str | None = None
    merge: bool = False
    offload: str | None = None
    threads: int | None = None
    json: bool = False


@dataclass(frozen=True)
class RankConfig:
    """Measure why the rate does not depend on the dimension: the Hessian's effective rank, and steps predicted and observed.

    Args:
        model: as for train.
        data: as for train; with --task the folder that holds its files: its test rows are measured.
        out: the folder to make, for rank.json and rank.png.
        task: as for train.
        template: as for train.
        labels: as for train.
        label_field: as for train.
        loss: as for train.
        truncation: as for train.
        max_length: as for train.
        prompt: measure with the template, with its fields alone (without), or both.
        tune: regular expression; the parameters whose name it finds are tuned (default all).
        rows: how many rows the loss is of, drawn by the seed.
        step_rows: how many of them a step sees; must divide rows (default all).
        batch_size: rows whose derivatives are held in memory at a time.
        probes: random vectors for the trace.
        iterations: steps of Lanczos for the eigenvalues; so many copies of the parameters are held.
        directions: steps observed, each at five learning rates.
        eps: how far a step looks.
        seed: of rows, probes and directions.
        threads: CPU threads (default torch's choice).
        json: print the result as one JSON object, the last line on stdout.
    """

    model: str
    data: str
    out: str
    task: str | None = None
    template: str | None = None
    labels: str | dict[str, str] | None = None
    label_field: str = "label"
    loss: Loss | None = None
    truncation: Truncation = "right"
    max_length: int | None = None
    prompt: Prompting = "both"
    tune: str | None = None
    rows: int = 16
    step_rows: int | None = None
    batch_size: int = 8
    probes: int = 16
    iterations: int = 16
    directions: int = 16
    eps: float = 1e-3
    seed: int = 0
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


@dataclass(frozen=True)
class FitsConfig:
    """Predict what a model takes to run and to tune, and what fits a device, from its configuration alone.

    Args:
        model: a folder with config.json, that file, a .gguf, "smollm2", a hub name, or opt-125m to opt-175b, which are built in.
        batch_size: rows a step.
        length: tokens of each row.
        dtype: of the weights; of 16 bits what methods would take, since float32 alone is tuned so far.
        quantize: as for train.
        lora_rank: as for train.
        lora_targets: as for train.
        prefix_length: as for train.
        device: cpu: a process, from its heap; gpu: tensors alone (default gpu where there is one).
        memory: of the device, such as 80GB or 80GiB (default this machine's).
        bandwidth: of the device, such as 2TB/s (default measured here).
        flops: of the device, such as 312TFLOP/s (default measured here).
        overhead: memory that is taken besides, such as 500MB (default on a CPU measured here, on a GPU 0).
        plot: draw the memory of the OPT family by method into this .png or .svg; takes a minute.
        threads: CPU threads of the measurements (default torch's choice).
        json: print the result as one JSON object, the last line on stdout.
    """

    model: str
    batch_size: int = 8
    length: int = 128
    dtype: Dtype = "float32"
    quantize: Quantize | None = None
    lora_rank: int = 8
    lora_targets: str | None = None
    prefix_length: int = 5
    device: DeviceKind | None = None
    memory: str | None = None
    bandwidth: str | None = None
    flops: str | None = None
    overhead: str | None = None
    plot: str | None = None
    threads: int | None = None
    json: bool = False


@dataclass(frozen=True)
class CompareConfig:
    """Compare methods on tasks over seeds, each cell in a process of its own.

    Args:
        model: as for train.
        out: the folder to make, or to go on in.
        tasks: for each task the options that all its cells have: {sst2: {data: FOLDER, shots: 16}}; in it, methods: {mezo: {lr: 1e-4}, probe: null} gives one options of its own there, or leaves it out.
        methods: for each method its own: {zero-shot: {}, mezo: {lr: 1e-3}, mezo-lora: {tuner: lora}}.
        seeds: one cell each: [0, 1, 2].
        search: values to choose among by validation, with the first seed: {mezo: {lr: [3e-4, 1e-3]}}.
        again: a method whose cells are run again.
        cell_minutes: stop a cell after so many minutes (default no limit).
        threads: CPU threads of each cell (default torch's choice).
        jobs: cells run side by side; with threads, jobs x threads is best no more than the cores. Their seconds are those beside the others.
        json: print the result as one JSON object, the last line on stdout.
    """

    model: str
    out: str
    tasks: dict[str, Any]
    methods: dict[str, Any]
    seeds: tuple[int, ...] = (0,)
    search: dict[str, Any] | None = None
    again: str | None = None
    cell_minutes: float | None = None
    threads: int | None = None
    jobs: int = 1
    json: bool = False
