"""One process's part of a run: steps until a limit, then the best step's model, scored on the test rows.

A step is in the log before its line is in metrics.jsonl.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import InitVar, asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from justforward.budget import budget_of
from justforward.config import FITTED, TrainConfig
from justforward.data import Example, Splits
from justforward.depth import Choice, Depth
from justforward.durable import Pace, seconds_of
from justforward.errors import NonFiniteLoss, UserError, memory_errors
from justforward.evaluate import Evaluation, Scorer
from justforward.feed import feed, objective_of
from justforward.folder import Metric, RunFolder
from justforward.gauge import gauge, set_eps, settled
from justforward.guard import (
    MOST_REWINDS,
    Guard,
    Stillness,
    lost_forwards,
    rate_factor,
    rewinds,
)
from justforward.interrupts import Shield
from justforward.keeping import left_for, step_kept, worth_of
from justforward.lines import Lines
from justforward.models import load_model
from justforward.ondisk import keep_on_disk
from justforward.outcome import Interrupted, Result, best_due, chosen_by, figures, tested, turning
from justforward.playback import fingerprint
from justforward.prepare import Stop, check_model, keep_environment, stop_reason
from justforward.progress import Progress
from justforward.schedules import (
    check_enough,
    forwards_at,
    forwards_until,
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
    metrics: InitVar[list[Metric]]
    started: float
    data_sha256: str
    log: Log | None
    team: Team

    def __post_init__(self, metrics: list[Metric]) -> None:
        self.lines = Lines(self.folder, metrics, self.started)
        self.model: PreTrainedModel | None = None
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.scorer: Scorer | None = None
        self.objective = objective_of(self.config, self.task)
        self.depth: Depth | None = None  # where layers are chosen as the run goes
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
            if self.depth and self.depth.now(self.lines.all) is None:
                self._choose_part(self.depth)
            self._gauge()
        except BaseException:
            self._unmake()
            raise
        self.forwards = self._forwards_so_far()

    def _forwards_so_far(self) -> int:
        """Also of steps that were taken back."""
        return forwards_until(self.config, self.steps, self.parts) + lost_forwards(self.lines.all)

    def _load_base(self, rows: bool = True, first: bool = False) -> None:
        self.model = self.scorer = None  # before a second one is loaded
        self.spared.leave()
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
        self.depth = Depth(self.model) if self.config.layers == "auto" else None
        if rows:  # tokenised now, so that a bad row is found before anything is written
            held = [*self.splits.test, *self.splits.validation, *self.splits.train]
            self.scorer.prepare(held, self.progress.note if first else None)
        if first:
            for note in self.splits.notes:
                self.progress.note(f"note: {note}")
            self.progress.note(f"rows: {self.splits.spelled()}")
        if begins or not self.depth:  # else when layers below are where the log has brought them
            self._find_trunk()
        if begins:
            self._score_before("before")
        if begins and self.config.start in FITTED:
            self.begun = begin(
                self.config, self.scorer, self.splits, self.progress.note, self.spared, free
            )
        if self.config.offload is not None:
            tuned = [p for p in self.model.parameters() if p.requires_grad]
            keep_on_disk(tuned, self.config.offload)

    def _find_trunk(self) -> None:
        assert self.model is not None
        assert self.scorer is not None
        rows = self.splits.validation if self.budget else self.splits.train
        depth = self.depth
        with depth.resting(self.model, self.lines.all) if depth else contextlib.nullcontext():
            self.spared.find(self.model, self.scorer, rows)

    def _scorer(self, model: PreTrainedModel) -> Scorer:
        assert self.tokenizer is not None
        return Scorer(model, self.tokenizer, self.task, self.config.max_length)

    def _score_before(self, *kinds: str) -> None:
        have = {metric["kind"] for metric in self.lines.all if metric["step"] == 0}
        for kind, rows in (("before", self.splits.test), ("validation", self.splits.validation)):
            if kind not in have and kind in (kinds or ("before", "validation")):
                self.progress.note(f"scoring {len(rows)} {_WHAT[kind]}")
                found = self._evaluate(rows)
                forwards = 0 if kind == "before" else forwards_until(self.config, 0)
                beside = self.lines.validations if kind == "validation" else None
                worth = self.team.agree(worth_of(found, self.config, beside))
                self.lines.remember(self.lines.made(kind, 0, forwards, **worth))

    def _repair(self, log: Log) -> None:
        """Score again what the last session did not live to write down."""
        assert self.model is not None
        check_model(self.model, self.config.model, log, self.folder)
        written = len(self.lines.all)
        self._score_before()
        have = {metric["step"] for metric in self.lines.validations}
        after, taken_back = forwards_until(self.config, 0, self.parts), list(self.lines.all)
        for step in range(1, len(log.steps) + 1):
            before, after = after, after + forwards_at(self.config, step - 1, self.parts)
            lost = lost_forwards(taken_back, step)
            if step not in have and validation_due(self.config, before + lost, after + lost):
                assert self.model is not None
                replay(self.model, log.path, step, self.snapshots)
                self.lines.remember(self._validation(step, after + lost))
                self._load_base()
        for metric in self.lines.all[written:]:
            self.folder.append_metric(metric)

    def _make_optimizer(self) -> None:
        config, folder, rows = self.config, self.folder, (self.scorer, self.splits.train)
        assert self.model is not None
        if self.log is None:
            folder.write_config(config)
            keep_start(self.model, config, folder.start, self.begun)
        self.opt = RunOptimizer(
            self.model,
            snapshots=self.snapshots,
            sync=seconds_of(config.sync),
            private=self.budget.private if self.budget else None,
            **optimizer_options(config, self.depth.blocks if self.depth else None),
            log=folder.log,
            resume=self.log is not None,
        )
        set_eps(self.opt, config.eps)
        self._move_part()
        self.team.join(self.opt, config.rows_at_once, self.data_sha256, *rows)
        self.parts = len(self.opt.param_groups)
        first = self.depth.cost(config, self.lines.all, first=True) if self.depth else 0
        check_enough(config, self.parts, first)
        if self.log is None:
            keep_environment(folder, config, self.data_sha256)
            folder.write_seen(self.splits.train, self.splits.validation)
            self.lines.write()
        else:
            folder.write_config(config)  # limits may have changed
            folder.forget_result()

    def _gauge(self) -> None:
        """Find the rate and the length of looks that were left open."""
        assert self.opt is not None
        assert self.scorer is not None
        if self.config.lr is None or self.config.eps is None:
            with self.spared.reused():
                found = gauge(self.config, self.opt, self.scorer, self.objective, self.splits.train)
            self.config, said = settled(self.config, found, *self.team.agree([found.lr, found.eps]))
            self.progress.note(said)
            self.folder.write_config(self.config)
            set_eps(self.opt, self.config.eps)

    # ---------------------------------------------------------------------------------- training

    def run(self, stop: Stop) -> Result:
        """Take steps until a limit; then keep the best, and score it on the test rows."""
        first = self.steps
        try:
            with memory_errors(lambda: _MEMORY.format(self.steps)):
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

    def _train(self, stop: Stop) -> None:
        config = self.config
        left = (
            None if config.max_minutes is None else 60.0 * config.max_minutes - self.lines.seconds
        )
        self.progress.start(self.forwards, config.max_forwards, left)
        self._watch()
        while self._deepens() or self._reason() is None:
            stop.check()
            if self._turn():
                continue
            before = self.forwards
            try:
                loss = self._step()
            except NonFiniteLoss as error:
                if not self._may_rewind():
                    raise
                best = best_due(self.config, self.lines.validations, self.steps, self.parts)
                self._rewind(self.guard.best() or (best["step"] if best else 0), str(error))
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
                self.lines.append(self._validation(self.steps, self.forwards))
        if not any(m["step"] == self.steps for m in self.lines.validations):
            self.lines.append(self._validation(self.steps, self.forwards))
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
            self.lines.add(kind, self.steps, self.forwards, **values)
        return loss

    # ------------------------------------------------------------------------------------ going back

    def _watch(self) -> None:
        self.guard = Guard(m["loss"] for m in self.lines.all if m["kind"] == "step")
        self.factor = rate_factor(self.lines.all)
        self.still = Stillness()

    def _tell_stillness(self, loss: float) -> None:
        assert self.opt is not None
        eps = float(self.opt.param_groups[0]["eps"])
        # private answers are noise as well
        said = self.still.add(self.opt.projected_grads, loss, eps) if self.budget is None else None
        if said is not None:
            self.progress.note(said)

    def _may_rewind(self) -> bool:
        return bool(self.config.backoff) and len(rewinds(self.lines.all)) < MOST_REWINDS

    def _turn(self) -> bool:
        """Go back if the last validation was worse. Asked before each step, so that a resumed run does likewise."""
        found = turning(self.config, self.lines.validations, self.steps, self.parts)
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
        line = self.lines.made("rewind", step, self.forwards, taken=taken, lost=lost, **more)
        self.lines.take_back(step, line)
        with Shield():  # if only the first is done, the very same rewind follows again
            Writer.rewind(read_log(self.folder.log), step)
            self.lines.write()
            self.snapshots.forget(step)
        self.progress.note(
            f"{why}: back to step {step} of {taken}, at {rate_factor(self.lines.all):g} of the learning rate"
        )
        self.log = read_log(self.folder.log)
        self._load_base()
        self._make_optimizer()
        self._watch()

    def _deepens(self) -> bool:
        """Let other layers move where validation is flat, from the best step on. Asked before each step."""
        if self.depth is None or not self.depth.left(self.lines.all):
            return False
        if not self.lines.marks[-1].get("flat"):  # else it has gone back for that already
            spent = self.forwards + self.depth.cost(self.config, self.lines.all)
            if self._reason() != "flat" or spent >= self.config.max_forwards:
                return False
            best = best_due(self.config, self.lines.validations, self.steps, self.parts)
            if best is not None and best["step"] < self.steps:
                self._rewind(best["step"], "validation is flat", flat=True)
        self._choose_part(self.depth)
        return True

    def _choose_part(self, depth: Depth) -> None:
        assert self.opt is not None
        assert self.scorer is not None
        self.spared.leave()  # looks are along all that may move
        lines = self.lines.all
        lost = depth.cost(self.config, lines)
        found = depth.choose(self.config, self.opt, self.scorer, self.splits.train, lines)
        found = Choice(*self.team.agree([found.part, found.rate, found.spreads]))
        self.forwards = self._forwards_so_far() + lost
        self.lines.add("layers", self.steps, self.forwards, lost=lost, **asdict(found))
        self.factor = rate_factor(lines)
        self.progress.note(depth.spelled(found))
        self._move_part()

    def _move_part(self) -> None:
        now = self.depth.now(self.lines.all) if self.depth else None
        if self.depth and self.opt and now is not None:
            self.opt.block = self.depth.parts[now].pattern
            self._find_trunk()

    def _validation(self, step: int, forwards: int) -> Metric:
        try:
            found = self._evaluate(self.splits.validation)
        except UserError as error:
            raise UserError(f"step {step}: {error}, or start again with a lower --lr") from error
        self.progress.validation(forwards, found.metric, found.value, found.loss)
        worth: Metric = self.team.agree(worth_of(found, self.config, self.lines.validations))
        if self.budget is not None:
            self.progress.note(self.budget.spell(step))
            worth["epsilon"] = self.budget.spent(step)
        return self.lines.made("validation", step, forwards, **worth)

    def _finish(self) -> Result:
        """Close the log, go back to the best step if that is not the last, score the test rows."""
        config, steps = self.config, self.steps
        rows, reason = self.splits.test, self._reason()
        at = step_kept(config, self.lines.validations, steps)
        assert at is not None
        assert reason is not None
        kept = at["step"]
        self._close()
        if kept != steps:
            self.opt, self.steps_taken = None, steps
            self._load_base(rows=False)
            assert self.model is not None
            replay(self.model, self.folder.log, kept, self.snapshots)
            if self.depth:
                self._find_trunk()
        why = left_for(config, self.lines.validations, at)
        self.progress.note(f"{why}scoring {len(rows)} test rows with the model of step {kept}")
        test = self._evaluate(rows)
        assert self.model is not None
        result = {
            **tested(test, fingerprint(self.model)),
            **self._so_far("finished", reason, steps),
            **chosen_by(at),
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
            **figures(self.config, self.task, self.splits, self.lines.all, steps, self.parts),
            "seconds": round(self.lines.seconds, 3),
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

    def _reason(self) -> str | None:
        timed = self.config.max_minutes is not None
        seconds: float = self.team.agree(self.lines.seconds) if timed else 0.0
        return stop_reason(
            self.config, self.steps, self.forwards, seconds, self.lines.marks, self.parts
        )


_WHAT = {"before": "test rows, for the figure before", "validation": "validation rows"}
_MEMORY = (
    "{} steps were taken, all of them are in the log: free memory and continue with --resume, "
    "or start anew with a smaller --batch-size or --eval-batch-size"
)
