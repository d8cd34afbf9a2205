"""`baseline`: what a run is compared with. Zero-shot and in-context learning are here, `probe` and `first_order` apart.

Every method is given the rows, the split, the prompts, the metrics and the rule of choosing that `train` would have with
the same options, by the same code. Test rows are scored once, when everything is chosen.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from justforward import metrics, noise
from justforward.config import BaselineConfig, TrainConfig
from justforward.data import Example, Splits, rank
from justforward.errors import UserError
from justforward.evaluate import Evaluation, Scorer
from justforward.first_order import LEARNING_RATES, Settings, tune
from justforward.folder import check_new, write_whole, writing
from justforward.models import load_model, save_model
from justforward.playback import fingerprint
from justforward.prepare import (
    Stop,
    choose_tuned,
    read_data,
    split_rows,
    stop_signals,
    use_threads,
)
from justforward.probe import Features, Probe, fit_probe, hidden_states
from justforward.progress import Progress
from justforward.ranges import check_ranges
from justforward.settings import check_belongs, check_frozen, resolved, task_of
from justforward.tasks import Task
from justforward.tuners import attach

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Result = dict[str, Any]

MOST_DEMONSTRATIONS, DRAWS, MAX_STEPS = 32, 3, 200


def run_baseline(config: BaselineConfig, progress: Progress | None = None) -> Result:
    """Score a baseline on the test rows.

    Returns:
        method; accuracy, loss and the task's other metrics on the test rows; metric, the main one's name, and
        value, its value; validation_value, the same on the validation rows; steps, forwards and backwards of a
        batch that tuning took; seconds in all; rows of each split. Besides: of icl `draws`, whose mean the
        figures are, and `sd` of value; of first-order the `curve` of validations and `best_step`; of probe
        its penalty `c`, chosen in validation, and `fit_seconds`.

    Raises:
        UserError: something in the input cannot be used, or the tuned model cannot be written.
    """
    started = time.monotonic()
    check_ranges(config)
    check_belongs(config)
    if config.method == "first-order":
        check_frozen(config.quantize, config.tuner, config.dtype)
    run = resolved(_as_train(config))
    task = task_of(run)
    if config.method == "probe" and task.kind != "classification":
        raise UserError(
            f"--method is 'probe': it fits one map for labels that rows share, and a task of kind {task.kind!r} "
            "has none: choose another method"
        )
    if config.out is not None:
        check_new(Path(config.out), "choose another --out")
    use_threads(config.threads)
    with progress or Progress() as shown, stop_signals() as stop:
        examples, _ = read_data(run.task, run.data, task, shown.note)
        run, splits = split_rows(run, examples)
        _check_demonstrations(config, splits)
        for note in splits.notes:
            shown.note(f"note: {note}")
        model, tokenizer = load_model(config.model, shown.note, config.quantize, config.dtype)
        bench = _Bench(config, run, task, splits, model, tokenizer, shown, stop, started)
        found = getattr(bench, config.method.replace("-", "_"))()
    return {
        "method": config.method,
        "validation_value": None,
        "steps": 0,
        "forwards": 0,
        "backwards": 0,
        **found,
        "seconds": round(time.monotonic() - started, 3),
        "rows": splits.counts(),
        "model": config.model,
        "data": config.data,
        "task": config.task,
        "out": config.out,
    }


# ------------------------------------------------------------------------------------ what is asked for


def _as_train(config: BaselineConfig) -> TrainConfig:
    """The run that has these rows, prompts and tuner: what makes all methods see the same."""
    shared = {field.name for field in fields(TrainConfig)}
    shared -= {"out", "json", "lr", "eval_every", "max_minutes", "quantize", "dtype"}
    given = {
        field.name: getattr(config, field.name)
        for field in fields(config)
        if field.name in shared and getattr(config, field.name) != field.default
    }
    return TrainConfig(out="", **given)


def _check_demonstrations(config: BaselineConfig, splits: Splits) -> None:
    if config.demonstrations is not None and config.demonstrations > len(splits.train):
        raise UserError(
            f"--demonstrations is {config.demonstrations}: there are {len(splits.train)} training rows to show: "
            "give at most that"
        )


def choose_demonstrations(
    train: Sequence[Example], count: int, seed: int, draw: int
) -> list[Example]:
    """Rows to show before a prompt: as many of each label, as far as there are; a function of rows, seed and draw.

    Which rows, and in which order, comes from two keyed hashes of their text: with one, the rows of a label that
    has many would come first.

    Args:
        train: the training rows; of no other is ever one shown.
        count: how many, at most len(train).
        seed: of the run.
        draw: which of several choices.
    """
    choice, order = noise.step_seed(seed, 2 * draw), noise.step_seed(seed, 2 * draw + 1)
    pools: dict[str, list[Example]] = {}
    for example in sorted(train, key=lambda example: rank(example, choice)):
        pools.setdefault(example.stratum, []).append(example)
    # the first row of each label, then the second of each: labels in the order of their first row's hash, so that
    # which of them has one more where the count does not divide is drawn too
    rounds = [
        pool[place]
        for place in range(max(map(len, pools.values()), default=0))
        for pool in pools.values()
        if place < len(pool)
    ]
    return sorted(rounds[:count], key=lambda example: rank(example, order))


# ------------------------------------------------------------------------------------------ methods


@dataclass
class _Bench:
    """Everything that a method is given."""

    config: BaselineConfig
    run: TrainConfig
    task: Task
    splits: Splits
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    progress: Progress
    stop: Stop
    started: float

    def zero_shot(self) -> Result:
        scorer = self._scorer()
        return {**self._validated(scorer), **_figures(self._test(scorer))}

    def icl(self) -> Result:
        config, train = self.config, self.splits.train
        count = config.demonstrations or min(MOST_DEMONSTRATIONS, len(train))
        draws: list[Result] = []
        for draw in range(config.draws or DRAWS):
            self.stop.check()
            shown = choose_demonstrations(train, count, config.seed, draw)
            scorer = self._scorer(shown)
            found = {**self._validated(scorer), **_figures(self._test(scorer))}
            used = scorer.prompts.demonstrations_shown[: len(self.splits.test)]
            self.progress.note(
                f"draw {draw}: {found['metric']} {found['value']:.4f}, {statistics.fmean(used):.1f} of "
                f"{count} demonstrations fit a row on average"
            )
            places = [example.where for example in shown]
            draws.append(
                {**found, "demonstrations_used": statistics.fmean(used), "demonstrations": places}
            )
        numbers = [name for name, value in draws[0].items() if isinstance(value, float)]
        means = {name: statistics.fmean(draw[name] for draw in draws) for name in numbers}
        values = [draw["value"] for draw in draws]
        return {
            **means,
            "metric": draws[0]["metric"],
            "sd": statistics.stdev(values) if len(values) > 1 else None,
            "demonstrations": count,
            "draws": draws,
        }

    def probe(self) -> Result:
        scorer, splits, size = self._scorer(), self.splits, self.config.eval_batch_size
        present = {example.label for example in splits.train}
        for label in scorer.labels:
            if label not in present:
                raise UserError(
                    f"--method is 'probe': label {label!r} has no training row to fit it on: give rows of it"
                )
        self.progress.note(
            f"reading the hidden states of {len(splits.train)} training and "
            f"{len(splits.validation)} validation rows"
        )
        train = hidden_states(scorer, splits.train, size)
        validation = hidden_states(scorer, splits.validation, size)
        probe = fit_probe(
            train.pair,
            validation.pair,
            len(scorer.labels),
            value=lambda chosen: self._worth(splits.validation, chosen)[self.task.metric],
        )
        if not probe.converged:
            self.progress.note(f"note: the fit with C = {probe.c:g} did not converge")
        if self.config.out is not None:
            save_probe(probe, self.task, Path(self.config.out))
        test = hidden_states(scorer, splits.test, size)
        chosen = self._judged(probe, splits.validation, validation)
        found = self._judged(probe, splits.test, test)
        return {
            **found,
            "validation_value": chosen["value"],
            "forwards": train.forwards + validation.forwards,
            "c": probe.c,
            "converged": probe.converged,
            "fit_seconds": round(probe.seconds, 3),
        }

    def first_order(self) -> Result:
        config, run, splits = self.config, self.run, self.splits
        self.model = attach(self.model, self.tokenizer, run)
        choose_tuned(self.model, config.tune)
        scorer = self._scorer()
        scorer.prepare(splits.train, self.progress.note)
        minutes = math.inf if config.max_minutes is None else config.max_minutes
        steps = config.max_steps or MAX_STEPS
        settings = Settings(
            lr=LEARNING_RATES[config.tuner] if config.lr is None else config.lr,
            max_steps=steps,
            eval_every=config.eval_every or max(1, steps // 8),
            batch_size=config.batch_size,
            eval_batch_size=config.eval_batch_size,
            seed=config.seed,
            until=self.started + 60.0 * minutes,
            checkpointing=config.gradient_checkpointing,
        )
        tuned = tune(scorer, splits.train, splits.validation, settings, self.progress, self.stop)
        found = _figures(self._test(scorer))
        if config.out is not None:
            save_model(self.model, self.tokenizer, config.out)
        last = tuned.curve[-1]
        return {
            **found,
            "validation_value": tuned.best["value"],
            "steps": tuned.steps,
            "forwards": last["forwards"],
            "backwards": last["backwards"],
            "best_step": tuned.best["step"],
            "stopped_by": tuned.stopped_by,
            "train_seconds": round(tuned.train_seconds, 3),
            "tuner": config.tuner,
            "lr": settings.lr,
            "fingerprint": fingerprint(self.model),
            "curve": tuned.curve,
        }

    # -------------------------------------------------------------------------------------- scoring

    def _scorer(self, demonstrations: Sequence[Example] = ()) -> Scorer:
        scorer = Scorer(
            self.model,
            self.tokenizer,
            self.task,
            self.config.max_length,
            demonstrations=demonstrations,
            calibrate=self.config.calibrate,
        )
        # a bad one is found before the work
        scorer.prepare([*self.splits.test, *self.splits.validation], self.progress.note)
        return scorer

    def _validated(self, scorer: Scorer) -> Result:
        rows = self.splits.validation
        self.progress.note(f"scoring {len(rows)} validation rows")
        found = scorer.evaluate(rows, self.config.eval_batch_size)
        return {"validation_value": found.value}

    def _test(self, scorer: Scorer) -> Evaluation:
        self.progress.note(f"scoring {len(self.splits.test)} test rows")
        return scorer.evaluate(self.splits.test, self.config.eval_batch_size)

    def _judged(self, probe: Probe, rows: Sequence[Example], features: Features) -> Result:
        accuracy, loss = probe.judged(*features.pair)
        found = self._worth(rows, probe.predictions(features.features))
        name = self.task.metric
        return {**found, "accuracy": accuracy, "loss": loss, "metric": name, "value": found[name]}

    def _worth(self, rows: Sequence[Example], chosen: Sequence[int]) -> dict[str, float]:
        labels = list(self.task.labels)
        return metrics.figures(self.task, rows, [labels[choice] for choice in chosen])


def _figures(found: Evaluation) -> Result:
    return {
        **found.metrics,
        "accuracy": found.accuracy,
        "loss": found.loss,
        "metric": found.metric,
        "value": found.value,
    }


def save_probe(probe: Probe, task: Task, out: Path) -> None:
    """Write probe.safetensors into a new folder: weight [labels, hidden], bias [labels], float32; the labels as metadata.

    Raises:
        UserError: it cannot be written.
    """
    from safetensors.torch import save

    tensors = {"weight": probe.weight.float().contiguous(), "bias": probe.bias.float()}
    with writing(out):
        out.mkdir(parents=True)
    words = {"labels": json.dumps(task.labels), "template": task.template}
    write_whole(out / "probe.safetensors", save(tensors, metadata=words))
