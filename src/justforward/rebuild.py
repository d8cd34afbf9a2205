"""`eval` and `replay`: what a run folder is good for once training is over."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from justforward.adapters import base_of, load_adapter
from justforward.config import WORKERS, EvalConfig, ReplayConfig, TrainConfig
from justforward.data import Example, read_examples
from justforward.errors import UserError
from justforward.evaluate import Scorer
from justforward.folder import RunFolder, best_step, check_new, row_hash
from justforward.hub import HUB
from justforward.keeping import step_kept
from justforward.models import load_model, save_model
from justforward.ondisk import keep_on_disk
from justforward.playback import fingerprint
from justforward.prepare import check_there, read_data, split_rows, use_threads
from justforward.progress import Progress
from justforward.published import Published, scored_rows
from justforward.ranges import check_ranges
from justforward.schedules import forwards_until
from justforward.settings import make_task, task_of
from justforward.snapshots import Snapshots
from justforward.snapshots import replay as replay_log
from justforward.tasks import Task
from justforward.trajectory import read_log
from justforward.tuners import attach, merged

Result = dict[str, Any]


def kept_step(folder: RunFolder, config: TrainConfig, note: Callable[[str], None]) -> int:
    """The step whose model a run keeps; of an unfinished run, as it would be if it ended now.

    Args:
        folder, config: of the run.
        note: called with a sentence where nothing is left that tells, and it is the last step.

    Raises:
        UserError: the log, the metrics or the result are damaged.
    """
    steps = len(read_log(folder.log).steps)
    kept = step_kept(config, folder.read_metrics()[0], steps)
    if kept is not None:
        return int(kept["step"])
    if config.keep == "best":  # of a folder that was handed on without its metrics
        result = folder.read_result() or {}
        if (result.get("status"), result.get("steps")) == ("finished", steps):
            return int(result["kept_step"])
        note(
            f"note: {folder.path} has no validation in metrics.jsonl to tell the best step by: this is the last one, {steps}"
        )
    return steps


def evaluate(config: EvalConfig, progress: Progress | None = None) -> Result:
    """Score a model, or what a run made of it.

    Raises:
        UserError: something in the input cannot be used.
    """
    started = time.monotonic()
    note = (progress or Progress()).note
    check_ranges(config)
    folder: RunFolder | None = None
    run: TrainConfig | None = None
    if config.run is not None:
        folder = RunFolder(config.run)
        folder.check_run()
        run = folder.read_config()
        if config.data is None:
            check_there(folder, run.data)
    source, base, data, task, name = _inputs(config, run)
    if run is None and config.offload is not None:
        raise UserError(
            f"--offload is {config.offload!r}: a model that is only scored is mapped from its own files: leave it out"
        )
    quantize = config.quantize if run is None else run.quantize
    dtype = (config.dtype or "float32") if run is None else run.dtype
    use_threads(config.threads)
    examples, digest = read_data(name, data, task, note)
    split, rows, dropped = _rows(config, folder, run, data, examples, digest, task, note)
    if base is None:
        model, tokenizer = load_model(source, note, quantize, dtype)
    else:
        model, tokenizer = load_adapter(source, base, note, quantize, dtype)
    if folder is not None and run is not None:
        model = attach(model, tokenizer, run, folder.start)
    max_length = config.max_length
    if max_length is None and run is not None:
        max_length = run.max_length
    scorer = Scorer(model, tokenizer, task, max_length)
    scorer.prepare(rows, note)
    step: int | None = None
    if folder is not None and run is not None:
        step = kept_step(folder, run, note)
        _offload(model, folder, config.offload)
        replay_log(model, folder.log, step, Snapshots(folder.snapshots, note))
    note(f"scoring {len(rows)} rows of {data} ({_SPLITS[split]})")
    if split == "all" and run is not None and run.data == WORKERS:
        note(
            "note: which rows its workers were trained on is not known here: these may be among them"
        )
    if dropped:
        note(f"{dropped} rows left out: the run was trained or validated on them")
    found = scorer.evaluate(rows, config.batch_size)
    return {
        "accuracy": found.accuracy,
        "loss": found.loss,
        "forwards": found.forwards,
        "seconds": round(time.monotonic() - started, 3),
        "fingerprint": fingerprint(model),
        "metric": found.metric,
        "value": found.value,
        **{name: value for name, value in found.metrics.items() if name != "accuracy"},
        "model": source,
        "run": config.run,
        "step": step,
        "data": data,
        "split": split,
        "rows": len(rows),
        "dropped": dropped,
    }


def _offload(model: Any, folder: RunFolder, where: str | None) -> None:
    """Put what the run's log moves into a file."""
    if where is not None:
        have = dict(model.named_parameters(remove_duplicate=False))
        tuned = [name for name, *_ in read_log(folder.log).header["tensors"]]
        keep_on_disk([have[name] for name in tuned if name in have], where)


_SPLITS = {
    "all": "all of them",
    "task": "the task's test rows",
    "train": "the run's training rows",
    "validation": "the run's validation rows",
    "test": "the run's test rows",
}


def _inputs(
    config: EvalConfig, run: TrainConfig | None
) -> tuple[str, str | None, str, Task, str | None]:
    """Model, the base of an adapter, data, task and its name in the catalogue: as given, or as the run has them."""

    def choose(name: str) -> Any:
        value = getattr(config, name)
        return getattr(run, name) if value is None and run is not None else value

    name, template, labels = choose("task"), config.template, config.labels
    if config.task is None:  # what is given counts for more than a run's
        if name is not None and config.data not in (None, HUB) and not Path(config.data).is_dir():
            if not (labels or choose("labels")):
                raise UserError(
                    f"--data is {config.data!r}: rows of task {name!r} are read from the folder of its files: "
                    "give that folder"
                )
            name = None  # a file of rows, for the model of a run on a task
        template = choose("template") if template is None else template
        labels = choose("labels") if labels is None else labels
    needed = {"model": choose("model"), "data": choose("data")}
    if needed["data"] == WORKERS:
        raise UserError(
            f"{config.run} was a hub's run, whose workers have the rows: give rows to score with --data"
        )
    if name is None:
        needed |= {"template": template, "labels": labels}
    for option, value in needed.items():
        if value is None:
            raise UserError(f"eval needs --{option}, or --run with a run folder to take it from")
    if run is not None and config.base is not None:
        raise UserError(
            f"--base is {config.base!r}: a run's base is its --model: give that, or leave out --run"
        )
    if run is not None and config.quantize not in (None, run.quantize):
        raise UserError(
            f"--quantize is {config.quantize!r}, and the run's base model was "
            f"{'not quantised' if run.quantize is None else f'quantised as {run.quantize!r}'}: leave it out"
        )
    if run is not None and config.dtype not in (None, run.dtype):
        raise UserError(
            f"--dtype is {config.dtype!r}, and the run's weights are stored in {run.dtype}: leave it out"
        )
    base = None if run is not None else base_of(choose("model"), config.base)
    task = make_task(
        name,
        base or choose("model"),
        template,
        labels,
        label_field=(config.label_field if name else choose("label_field")) or "label",
        truncation=choose("truncation") or "right",
        loss=choose("loss"),
    )
    return choose("model"), base, choose("data"), task, name


def _rows(
    config: EvalConfig,
    folder: RunFolder | None,
    run: TrainConfig | None,
    data: str,
    found: list[Example] | Published,
    digest: str,
    task: Task,
    note: Callable[[str], None],
) -> tuple[str, list[Example], int]:
    """Which split to score, its rows, and how many were left out because the run has seen them."""
    examples = found.examples if isinstance(found, Published) else found
    if folder is None or run is None:
        if isinstance(found, Published) and config.split in (None, "test"):
            return "task", scored_rows(found), 0
        if config.split not in (None, "all"):
            raise UserError(f"--split is {config.split!r}: splits are a run's: give --run")
        return "all", examples, 0
    held = digest == folder.read_environment()["data_sha256"]
    if run.data == WORKERS:  # which has set none aside
        if config.split not in (None, "all"):
            raise UserError(
                f"--split is {config.split!r}: the run was a hub's, whose workers train on all of their rows: leave it out"
            )
        if held and config.split is None:
            raise UserError(
                f"{data}: the run's workers were trained on all of its rows: give others, or --split all to score these all "
                "the same"
            )
        if isinstance(found, Published) and config.split is None:
            return "task", scored_rows(found), 0
        return "all", examples, 0
    if held:
        split = config.split or "test"
        if split == "all":
            return split, examples, 0
        # the run's own task decides which rows are the same; a row is known by its place
        own = read_data(run.task, data, task_of(run))[0]
        chosen: list[Example] = getattr(split_rows(run, own)[1], split)
        rows = own.examples if isinstance(own, Published) else own
        place = {id(example): i for i, example in enumerate(rows)}
        return split, [examples[place[id(example)]] for example in chosen], 0
    if config.split not in (None, "all"):
        raise UserError(
            f"--split is {config.split!r}: {data} is not the data that the run has split: leave it out"
        )
    seen = folder.read_seen()
    if isinstance(found, Published):
        examples = scored_rows(found)
    shown = _as_shown(run, data, examples, task, note)
    rows = [e for e, own in zip(examples, shown, strict=True) if row_hash(own) not in seen]
    if not rows:
        raise UserError(
            f"{data}: the run was trained or validated on all {len(examples)} rows: give others"
        )
    return (
        "task" if isinstance(found, Published) else "all",
        rows,
        len(examples) - len(rows),
    )


def _as_shown(
    run: TrainConfig,
    data: str,
    examples: list[Example],
    task: Task,
    note: Callable[[str], None],
) -> list[Example]:
    """Rows as the run's own template shows them: by that it knows those that it has seen."""
    if run.task is not None or set(task_of(run).fields) == set(task.fields):
        return examples
    try:
        own = read_examples(data, replace(task, template=task_of(run).template))
    except UserError:  # it has not these columns; under other names, maybe
        own = examples
        if len(task_of(run).fields) != len(task.fields):
            note(
                f"note: {data} has not all columns of the run's template, so that rows which the run has seen may be among these"
            )
    return own


def rebuild(config: ReplayConfig, progress: Progress | None = None) -> Result:
    """Base + log = the tuned model, saved as a folder; of lora, prefix and prompt the adapter, in peft's format.

    Raises:
        UserError: the folder, the base or the log cannot be used, or `out` exists.
    """
    started = time.monotonic()
    note = (progress or Progress()).note
    check_ranges(config)
    folder = RunFolder(config.run)
    folder.check_run()
    run = folder.read_config()
    check_new(Path(config.out), "choose another --out")
    steps = _steps(config.steps, folder, run, note)
    if config.merge and run.tuner != "lora":
        raise UserError(
            f"{folder.path}: --merge adds a LoRA into the weights, and the run's tuner is {run.tuner!r}: leave it out"
        )
    if config.merge and run.quantize is not None:
        raise UserError(
            f"{folder.path}: --merge adds a LoRA into the weights, and the run's are quantised ({run.quantize}): leave it out"
        )
    use_threads(config.threads)
    model, tokenizer = load_model(config.model or run.model, note, run.quantize, run.dtype)
    model = attach(model, tokenizer, run, folder.start)
    clock = time.monotonic()
    _offload(model, folder, config.offload)
    replay_log(model, folder.log, steps, Snapshots(folder.snapshots, note))
    took = time.monotonic() - clock
    tuned = fingerprint(model)
    if config.merge and run.dtype != "float32":
        note(
            f"note: the sum of weights and LoRA is rounded to {run.dtype}, as the weights are: scores may differ from the run's, "
            "which the adapter (without --merge) keeps"
        )
    save_model(merged(model) if config.merge else model, tokenizer, config.out)
    result = folder.read_result() or {}
    scored = result.get("kept_step") == steps  # the figures that train measured are of this model
    return {
        "accuracy": result["accuracy"] if scored else None,
        "loss": result["loss"] if scored else None,
        "forwards": forwards_until(run, steps, len(read_log(folder.log).header["groups"])),
        "seconds": round(time.monotonic() - started, 3),
        "fingerprint": tuned,
        "steps": steps,
        "replay_seconds": round(took, 3),
        "run": config.run,
        "out": config.out,
        "saved": "merged model" if config.merge else _SAVED.get(run.tuner, "model"),
    }


_SAVED = dict.fromkeys(("lora", "prefix", "prompt"), "adapter")


def _steps(
    asked: str | None, folder: RunFolder, run: TrainConfig, note: Callable[[str], None]
) -> int:
    last = len(read_log(folder.log).steps)
    if asked is None:
        return kept_step(folder, run, note)
    if asked == "last":
        return last
    if asked == "best":
        best = best_step(folder.read_metrics()[0], last)
        if best is None:
            raise UserError(f"{folder.path}: no validation yet: give a number of steps, or last")
        return int(best["step"])
    if not (asked.isascii() and asked.isdigit() and int(asked) <= last):
        raise UserError(
            f"--steps is {asked!r}: it must be best, last, or a number from 0 to {last}"
        )
    return int(asked)
