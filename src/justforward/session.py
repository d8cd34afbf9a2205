"""One process's part of a run: steps until a limit, then the best step's model, scored on the test rows.

A step is in the log before its line is in metrics.jsonl.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from justforward.budget import budget_of
from justforward.config import FITTED, TrainConfig
from justforward.data import Example, Splits
from justforward.durable import Pace, seconds_of
from justforward.errors import NonFiniteLoss, UserError, memory_errors
from justforward.evaluate import Evaluation, Scorer
from justforward.feed import feed
from justforward.folder import Metric, RunFolder, best_step, value_of
from justforward.gauge import gauge, set_eps
from justforward.generate import Sampling
from justforward.guard import MOST_REWINDS, Guard, Stillness, lost_forwards, rate_factor, rewinds
from justforward.interrupts import Shield
from justforward.models import load_model
from justforward.objectives import Objective
from justforward.ondisk import keep_on_disk
from justforward.outcome import Interrupted, Result, figures, turning
from justforward.playback import fingerprint
from justforward.prepare import Stop, keep_environment, stop_reason
from justforward.progress import Progress
from justforward.schedules import (
    forwards_at,
    forwards_until,
    gauge_forwards,
    learning_rate,
    optimizer_options,
    validation_due,
)
from justforward.snapshots import RunOptimizer, Snapshots, replay
from justforward.spared import Spared
from justforward.starting import begin, choose_layers, decided
from justforward.tasks import Task
from justforward.team import Team
from justforward.trajectory import Log, Writer, read_log
from justforward.tuners import attach, keep_start

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Session:
    """One process's part of a run."""

    config: TrainConfig
    task: Task
    splits: Splits
    folder: RunFolder
    progress: Progress
    metrics: list[Metric]
    started: float
    data_sha256: str
    log: Log | None
    team: Team

    def __post_init__(self) -> None:
        self.seconds_before = max((float(m["seconds"]) for m in self.metrics), default=0.0)
        self._sort()
        self.model: PreTrainedModel | None = None
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.scorer: Scorer | None = None
        self.objective: Objective | None = None
        if self.config.objective != "loss":
            sampling = Sampling(self.config.temperature, self.config.seed)
            self.objective = Objective(self.config.objective, self.task, sampling)
            if self.config.estimator == "activation":
                self.objective.check_by_row()
        self.spared = Spared(self.config, self.progress.note)
        self.budget = budget_of(self.config, len(self.splits.train), self.log)
        self.begun: dict[str, Tensor] = {}  # what was fitted before the first step
        self.snapshots = Snapshots(self.folder.snapshots, self.progress.note)
        self.folder.pace = Pace(seconds_of(self.config.sync))
        self.opt: RunOptimizer | None = None
        self.parts = 1 if self.log is None else len(self.log.header["groups"])  # parameter groups
        self.steps_taken = 0  # once the optimizer is gone
        self.forwards = 0

    @property
    def seconds(self) -> float:
        """Of all sessions of the run, loading and scoring included."""
        return self.seconds_before + time.monotonic() - self.started

    @property
    def steps(self) -> int:
        return self.opt.steps if self.opt is not None else self.steps_taken

    def load(self) -> None:
        """Load the model, score what must be scored before training, make the folder and the optimizer."""
        self._load_base(first=True)
        if self.log is not None:
            self._repair(self.log)
        else:
            self._score_before()
        assert self.model is not None
        try:
            with Shield():  # all of it or nothing
                if self.log is None:
                    self.folder.make()
                self._make_optimizer()
            self._gauge()
        except BaseException:
            self._unmake()
            raise
        self.forwards = self._forwards_so_far()

    def _forwards_so_far(self) -> int:
        """Also of steps that were taken back."""
        return forwards_until(self.config, self.steps, self.parts) + lost_forwards(self.metrics)

    def _load_base(self, rows: bool = True, first: bool = False) -> None:
        self.model = self.scorer = None  # before a second one is loaded
        model, self.tokenizer = load_model(
            self.config.model, self.progress.note, self.config.quantize, self.config.dtype
        )
        begins, free = rows and self.log is None, self.config.start == "auto"
        if begins:
            self.config = decided(
                self.config, self._scorer(model), self.splits.train, self.progress.note
            )
        start = None if begins else self.folder.start
        self.model = attach(model, self.tokenizer, self.config, start)
        self.scorer = self._scorer(self.model)
        choose_layers(self.model, self.config)
        if rows:  # tokenised now, so that a bad row is found before anything is written
            for split in (self.splits.test, self.splits.validation, self.splits.train):
                self.scorer.prepare(split)
        if first:
            for note in self.splits.notes:
                self.progress.note(f"note: {note}")
            self.progress.note(f"rows: {self.splits.spelled()}")
        compared = self.splits.validation if self.budget else self.splits.train
        self.spared.find(self.model, self.scorer, compared)
        if begins:
            self._score_before("before")
        if begins and self.config.start in FITTED:
            self.begun = begin(
                self.config, self.scorer, self.splits, self.progress.note, self.spared, free
            )
        if self.config.offload is not None:
            tuned = [p for p in self.model.parameters() if p.requires_grad]
            keep_on_disk(tuned, self.config.offload)

    def _scorer(self, model: PreTrainedModel) -> Scorer:
        assert self.tokenizer is not None
        return Scorer(model, self.tokenizer, self.task, self.config.max_length)

    def _score_before(self, *kinds: str) -> None:
        have = {metric["kind"] for metric in self.metrics if metric["step"] == 0}
        for kind, rows in (("before", self.splits.test), ("validation", self.splits.validation)):
            if kind not in have and kind in (kinds or ("before", "validation")):
                self.progress.note(f"scoring {len(rows)} {_WHAT[kind]}")
                found = self._evaluate(rows)
                forwards = 0 if kind == "before" else forwards_until(self.config, 0)
                self._remember(self._metric(kind, 0, forwards, **self.team.agree_on(found)))

    def _repair(self, log: Log) -> None:
        """Score again what the last session did not live to write down."""
        self._check_base(log)
        written = len(self.metrics)
        self._score_before()
        have = {metric["step"] for metric in self.validations}
        after, taken_back = forwards_until(self.config, 0, self.parts), rewinds(self.metrics)
        for step in range(1, len(log.steps) + 1):
            before, after = after, after + forwards_at(self.config, step - 1, self.parts)
            lost = lost_forwards(taken_back, step)
            if step not in have and validation_due(self.config, before + lost, after + lost):
                assert self.model is not None
                replay(self.model, log.path, step, self.snapshots)
                self._remember(self._validation(step, after + lost))
                self._load_base()
        for metric in self.metrics[written:]:
            self.folder.append_metric(metric)

    def _check_base(self, log: Log) -> None:
        assert self.model is not None
        base = fingerprint(self.model)
        if base != log.header["base"]:
            raise UserError(
                f"{self.folder.path}: --model is {self.config.model!r}, whose fingerprint is {base[:12]}; the run "
                f"was started from {log.header['base'][:12]}: give that model"
            )

    def _make_optimizer(self) -> None:
        config, folder = self.config, self.folder
        assert self.model is not None
        if self.log is None:
            folder.write_config(config)
            keep_start(self.model, config, folder.start, self.begun)
        self.opt = RunOptimizer(
            self.model,
            snapshots=self.snapshots,
            sync=seconds_of(config.sync),
            private=self.budget.private if self.budget else None,
            **optimizer_options(config),
            log=folder.log,
            resume=self.log is not None,
        )
        set_eps(self.opt, config.eps)
        self.team.join(self.opt, config.rows_at_once, self.data_sha256)
        self.parts = len(self.opt.param_groups)
        first = forwards_at(config, 0, self.parts) + forwards_until(config, 0, self.parts)
        if first > config.max_forwards:
            what = f"it measures of {self.parts} parts" if config.modified else "comes before it"
            raise UserError(
                f"--max-forwards is {config.max_forwards}: the first step takes {first} forwards, with what {what}: give at least that"
            )
        if self.log is None:
            keep_environment(folder, config, self.data_sha256)
            folder.write_seen(self.splits.train, self.splits.validation)
            folder.keep_metrics(self.metrics)
        else:
            folder.write_config(config)  # limits may have changed
            folder.forget_result()

    def _gauge(self) -> None:
        """Find the rate and the length of looks that were left open."""
        if self.config.lr is not None and self.config.eps is not None:
            return
        assert self.opt is not None
        assert self.scorer is not None
        with self.spared.reused():
            found = gauge(self.config, self.opt, self.scorer, self.objective, self.splits.train)
        lr, eps = self.team.agree([found.lr, found.eps])
        spent = gauge_forwards(self.config)
        self.progress.note(f"{found.why}: lr {lr:.2g}, eps {eps:.2g}, after {spent} forwards")
        self.config = replace(self.config, lr=lr, eps=eps)
        self.folder.write_config(self.config)
        set_eps(self.opt, eps)

    # ---------------------------------------------------------------------------------- training

    def run(self, stop: Stop) -> Result:
        """Take steps until a limit; then keep the best, and score it on the test rows."""
        first = self.steps
        try:
            with memory_errors(self._without_memory):
                self._train(stop)
                return self._finish()
        except (KeyboardInterrupt, NonFiniteLoss) as error:
            by = "interrupt" if isinstance(error, KeyboardInterrupt) else "non-finite loss"
            result = self._end_early(by)
            if isinstance(error, NonFiniteLoss):
                raise
            raise Interrupted(result) from None
        except UserError:
            if first == self.steps == 0 and self.log is None:
                self._unmake()  # the first look found out that this cannot be trained
            else:
                # a full disk, say: then this cannot be written either; the log's whole records are enough
                with contextlib.suppress(UserError):
                    self._end_early("error")
            raise
        finally:
            self.progress.stop()
            self.spared.close()
            self.folder.unlock()

    def _without_memory(self) -> str:
        return (
            f"{self.steps} steps were taken, all of them are in the log: free memory and continue with --resume, "
            "or start anew with a smaller --batch-size or --eval-batch-size"
        )

    def _train(self, stop: Stop) -> None:
        config = self.config
        left = None if config.max_minutes is None else 60.0 * config.max_minutes - self.seconds
        self.progress.start(self.forwards, config.max_forwards, left)
        self._watch()
        while self._reason() is None:
            stop.check()
            if self._turn():
                continue
            before = self.forwards
            try:
                loss = self._step()
            except NonFiniteLoss as error:
                if not self._may_rewind():
                    raise
                best = best_step(self.validations, self.steps) or {"step": 0}
                self._rewind(self.guard.best() or best["step"], str(error))
                continue
            self.progress.step(self.forwards, loss)
            self._tell_stillness(loss)
            found = self.guard.add(loss)
            if found is not None and self._may_rewind():
                self._rewind(
                    found.step,
                    f"the loss has risen to {found.last:.4f}, from {found.best:.4f} at step {found.step}",
                )
                continue
            assert self.opt is not None
            self.opt.snapshot_due(config.snapshot_every, config.keep_snapshots, self.progress.note)
            if validation_due(config, before, self.forwards):
                self._append(self._validation(self.steps, self.forwards))
        if not any(m["step"] == self.steps for m in self.validations):
            self._append(self._validation(self.steps, self.forwards))
        self.progress.stop()

    def _step(self) -> float:
        """One step and its line; its loss."""
        config, opt, scorer = self.config, self.opt, self.scorer
        assert opt is not None
        assert scorer is not None
        lr = learning_rate(config, self.forwards) * self.factor
        for group in opt.param_groups:
            group["lr"] = lr
        closure, batch = feed(config, opt, scorer, self.objective, self.splits.train)
        clock = time.monotonic()
        with Shield() as shield, self.spared.reused():  # a step and its line: both or neither
            loss = self.team.step(opt, partial(shield.call, closure), batch)
            self.forwards += forwards_at(config, opt.steps - 1, self.parts)
            took = round(time.monotonic() - clock, 4)
            kind, seen = ("private", {}) if self.budget else ("step", {"loss": loss})
            values = {**seen, "lr": lr, "step_seconds": took}
            self._append(self._metric(kind, self.steps, self.forwards, **values))
        return loss

    # ------------------------------------------------------------------------------------ going back

    def _watch(self) -> None:
        self.guard = Guard(m["loss"] for m in self.metrics if m["kind"] == "step")
        self.factor = rate_factor(self.metrics)
        self.still = Stillness()

    def _tell_stillness(self, loss: float) -> None:
        assert self.opt is not None
        if self.budget is None:  # private answers are noise as well
            eps = float(self.opt.param_groups[0]["eps"])
            said = self.still.add(self.opt.projected_grads, loss, eps)
            if said is not None:
                self.progress.note(said)

    def _may_rewind(self) -> bool:
        return bool(self.config.backoff) and len(rewinds(self.metrics)) < MOST_REWINDS

    def _turn(self) -> bool:
        """Go back if the last validation was worse. Asked before each step, so that a resumed run does likewise."""
        found = turning(self.config, self.validations, self.steps, self.parts)
        if found is None or not self._may_rewind():
            return False
        self._rewind(found.step, found.why, validations=found.validations)
        return True

    def _rewind(self, step: int, why: str, **more: int) -> None:
        """Take the steps after the first `step` back, and go on from there at a lower rate."""
        taken = self.steps
        self._close()
        self.opt, self.steps_taken = None, step
        lost = self.forwards - self._forwards_so_far()
        line = {**self._metric("rewind", step, self.forwards), "taken": taken, "lost": lost, **more}
        self.metrics = [m for m in self.metrics if m["kind"] == "rewind" or m["step"] <= step]
        self.metrics.append(line)
        self._sort()
        with Shield():  # if only the first is done, the very same rewind follows again
            Writer.rewind(read_log(self.folder.log), step)
            self.folder.keep_metrics(self.metrics)
            self.snapshots.forget(step)
        self.progress.note(
            f"{why}: back to step {step} of {taken}, at {rate_factor(self.metrics):g} of the learning rate"
        )
        self.log = read_log(self.folder.log)
        self._load_base()
        self._make_optimizer()
        self._watch()

    def _validation(self, step: int, forwards: int) -> Metric:
        try:
            found = self._evaluate(self.splits.validation)
        except UserError as error:
            raise UserError(f"step {step}: {error}, or start again with a lower --lr") from error
        self.progress.validation(forwards, found.metric, found.value, found.loss)
        worth = self.team.agree_on(found)
        if self.budget is not None:
            self.progress.note(self.budget.spell(step))
            worth["epsilon"] = self.budget.spent(step)
        return self._metric("validation", step, forwards, **worth)

    def _finish(self) -> Result:
        """Close the log, go back to the best step if that is not the last, score the test rows."""
        config, steps = self.config, self.steps
        reason = self._reason()
        best = best_step(self.validations, steps)
        assert best is not None
        assert reason is not None
        kept = best["step"] if config.keep == "best" else steps
        self._close()
        if kept != steps:
            self.opt, self.steps_taken = None, steps
            self._load_base(rows=False)
            assert self.model is not None
            replay(self.model, self.folder.log, kept, self.snapshots)
        self.progress.note(
            f"scoring {len(self.splits.test)} test rows with the model of step {kept}"
        )
        test = self._evaluate(self.splits.test)
        assert self.model is not None
        at = next(m for m in self.validations if m["step"] == kept)
        result = {
            "accuracy": test.accuracy,
            "loss": test.loss,
            "fingerprint": fingerprint(self.model),
            **{name: value for name, value in test.metrics.items() if name != "accuracy"},
            "value": test.value,
            **self._so_far("finished", reason, steps),
            "validation_accuracy": at["accuracy"],
            "validation_loss": at["loss"],
            "validation_value": value_of(at),
            "kept_step": kept,
        }
        self.folder.write_result(result)
        return result

    def _end_early(self, by: str) -> Result:
        steps = self.steps
        self._close()
        result = {
            # the test rows are scored once, at the end
            **dict.fromkeys(("accuracy", "loss", "fingerprint")),
            **self._so_far("failed" if by != "interrupt" else "interrupted", by, steps),
        }
        self.folder.write_result(result)
        return result

    def _so_far(self, status: str, by: str, steps: int) -> Result:
        return {
            "status": status,
            "stopped_by": by,
            **figures(self.config, self.task, self.splits, self.metrics, steps, self.parts),
            "seconds": round(self.seconds, 3),
            "privacy": self.budget.so_far() if self.budget else None,
            "log_bytes": self.folder.log.stat().st_size,
            "out": str(self.folder.path),
        }

    def _unmake(self) -> None:
        with contextlib.suppress(UserError):
            self._close()
        self.folder.unmake()

    def _close(self) -> None:
        if self.opt is not None:
            with Shield():  # a seal is written once
                self.opt.close()

    # ----------------------------------------------------------------------------------- metrics

    def _evaluate(self, rows: list[Example]) -> Evaluation:
        assert self.scorer is not None
        with self.spared.scored(self.scorer, rows):
            found = self.scorer.evaluate(rows, self.config.eval_batch_size)
        if self.objective is None:
            return found
        value = self.objective.score(rows, found.predictions)
        return replace(found, metric=self.objective.name, value=value)

    def _metric(self, kind: str, step: int, forwards: int, **values: float) -> Metric:
        seconds = round(self.seconds, 3)
        return {"kind": kind, "step": step, "forwards": forwards, "seconds": seconds, **values}

    def _sort(self) -> None:
        """Lines that are asked for before each step, apart from those of steps."""
        self.marks = [m for m in self.metrics if m["kind"] in ("validation", "rewind")]
        self.validations = [m for m in self.marks if m["kind"] == "validation"]

    def _remember(self, metric: Metric) -> None:
        self.metrics.append(metric)
        if metric["kind"] == "validation":
            self.marks.append(metric)
            self.validations.append(metric)

    def _append(self, metric: Metric) -> None:
        self.folder.append_metric(metric)
        self._remember(metric)

    def _reason(self) -> str | None:
        timed = self.config.max_minutes is not None
        seconds: float = self.team.agree(self.seconds) if timed else 0.0
        return stop_reason(self.config, self.steps, self.forwards, seconds, self.marks, self.parts)


_WHAT = {"before": "test rows, for the figure before", "validation": "validation rows"}
