"""`MeZO` for a loop that calls `optimizer.step()` for itself, and its log in and out of checkpoints.

A checkpoint has a copy of the log, as long as it was then. So the log of a run that is resumed is that copy, and what a killed
run had logged beyond it is done again, to the same bits.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.utils import logging

from justforward.errors import UserError
from justforward.groups import family_of
from justforward.optim import MeZO
from justforward.playback import check_header, said_of_settings
from justforward.private import count_answers
from justforward.rules import parse
from justforward.stored import plain
from justforward.trajectory import Log, Step, Writer, read_log
from justforward.variants import settings_of

logger = logging.get_logger(__name__)

LOG = "trajectory.jfl"
OPTIMIZER, STATE = "optimizer.pt", "trainer_state.json"  # of a checkpoint: Trainer's names


class LoopMeZO(MeZO):
    """`MeZO` as a loop wants it that calls `step()` for itself, and whose log moves in and out of checkpoints.

    Args:
        model: what is tuned.
        beside: the folder that the log is to be in.
        writes: whether this process writes it: of several that take steps together, one.
        settings: of `MeZO`.

    Attributes:
        writes: as given.
        path: of the log, whoever writes it; None until it has a name.
        last: the last step that was taken.
        ahead: steps that the log has behind those that the weights have taken: of a private run that is resumed.
        step_was_skipped: whether the last one was not: accelerate's name, by which the learning rate stays.
    """

    _is_accelerate_prepared = True  # accelerate is to leave it as it is: there is nothing to scale

    def __init__(
        self, model: nn.Module, beside: Path, *, writes: bool = True, **settings: Any
    ) -> None:
        self.writes = writes
        self.last: Step | None = None
        self.step_was_skipped = False
        self.path: Path | None = None
        self._left: list[int] | None = None
        self.ahead: list[Step] = []
        # Its place is taken when it is known that no checkpoint is resumed, which has one.
        self._new = beside / f".{LOG}.new"
        if writes:
            beside.mkdir(parents=True, exist_ok=True)
            self._new.unlink(missing_ok=True)
        super().__init__(model, log=self._new if writes else None, **settings)
        self._header = read_log(self._new).header if writes else {}

    def step(self, closure: Any = None, batch: Any = None) -> float:  # type: ignore[override]
        """As `MeZO.step`; without a closure the step has been taken, and this is the loop's own call.

        Returns:
            The mean loss of all looks, of the last step if there is no closure.
        """
        if closure is None:
            return math.nan if self.last is None else self.last.loss
        return super().step(closure, batch)

    def _apply(self, step: Step, *rest: Any) -> None:
        super()._apply(step, *rest)
        self.last = step

    def check_free(self) -> None:
        """Raise UserError where a parameter has been frozen since it was taken to be tuned."""
        for name, tensor in zip(self.weights.names, self.weights.tensors, strict=True):
            if not tensor.requires_grad:
                raise UserError(
                    f"{name} was frozen when training had begun (by a callback?): which parameters are tuned is in the log's "
                    "header: freeze them before train(), or say blocks=..., which moves one part of them a step"
                )

    def open_log(self, path: Path) -> None:
        """Give a new log its name, or go on with the one there was; another run's that is there gets another name."""
        if not self.writes:
            self.path = path
            return
        if self.path is None:
            set_aside(path)
            os.replace(self._new, path)
            self.path = self.log = path
        if self._writer is None:
            self._writer = Writer.resume(read_log(self.path))

    def let_ahead(self, log: Log) -> None:
        """Count what a log has behind the steps that the weights have taken as answered: `again` takes it."""
        self.ahead = list(log.steps[self.steps :])
        count_answers(self.private, len(log.steps))

    def again(self) -> bool:
        """Take the next step that the log has already; whether there was one."""
        if not self.ahead:
            return False
        writer, self._writer = self._writer, None  # it is written
        try:
            self.follow([self.ahead.pop(0)])
        finally:
            self._writer = writer
        self.last = None
        return True

    def log_bytes(self) -> bytes:
        """The whole log, whatever of it is ahead."""
        assert self.path is not None
        return self.path.read_bytes()

    def copy_log(self, to: Path) -> None:
        """The log up to where the weights are."""
        assert self.path is not None
        shutil.copyfile(self.path, to)
        if self.ahead:
            Writer.rewind(read_log(to), self.steps)

    def take_log(self, path: Path, saved: Path) -> None:
        """Go on with a checkpoint's log, whose state has been loaded, under a name.

        Where steps are private and the log there goes on where the checkpoint's ends, it stays: its steps are `ahead`.

        Raises:
            UserError: it is of other settings, or does not end where the state does.
        """
        log = read_log(saved)
        check_header(log, {k: value for k, value in self._header.items() if k != "base"})
        if len(log.steps) != self.steps:
            raise UserError(
                f"{saved}: has {len(log.steps)} steps, the state beside it {self.steps}: take another checkpoint"
            )
        self.ahead = []
        if self.writes:
            self.let_go()
            self._new.unlink(missing_ok=True)
            longer = longer_log(log, path) if self.private is not None else None
            if longer is None:
                put_log(log, path)
            else:
                self.let_ahead(longer)
            self.log = path
            self._writer = Writer.resume(read_log(path))
        self.path = path

    def let_go(self) -> None:
        """Seal the log and close it."""
        self.close()
        self._writer = None

    def close_log(self) -> None:
        """`let_go` at the end of a training, until the log is opened again."""
        if self.ahead:
            logger.warning(
                f"{self.path}: has {len(self.ahead)} steps more than the weights, which were answered before: the next train() takes them first"
            )
        self.let_go()
        self._left = self._sums()

    def was_left_alone(self) -> bool:
        """Whether the weights are as the last step left them, when the log was closed."""
        return self._left is None or self._left == self._sums()

    def _sums(self) -> list[int]:
        """Of each tuned tensor's bits, as integers."""
        halves = [plain(p).view(-1).view(torch.int16) for p in self.weights.tensors]
        return [int(x.sum(dtype=torch.int64)) for x in halves]


class SavesAtStepEnd(JITCheckpointCallback):
    """transformers' checkpoint on SIGTERM; where theirs comes before `optimizer.step()` this one waits for the step's end."""

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the weights have moved and the step has not been counted."""


def set_aside(path: Path) -> None:
    """Keep a log that is in the way, as trajectory-1.jfl and so on."""
    if path.exists():
        numbers = iter(range(1, 1 << 30))
        other = path
        while other.exists():
            other = path.with_stem(f"{path.stem}-{next(numbers)}")
        path.rename(other)
        logger.warning(f"{path} is kept as {other.name}: another log takes its place")


def put_log(log: Log, path: Path) -> None:
    """Copy a log to a place; one that is there is kept, unless it goes on where this one ends."""
    if path.exists():
        whole = log.path.read_bytes()[: log.size]
        if not path.read_bytes().startswith(whole):
            set_aside(path)
    new = path.with_name(f".{path.name}.copy")
    shutil.copyfile(log.path, new)
    os.replace(new, path)


def longer_log(log: Log, path: Path) -> Log | None:
    """What is at a place, if it goes on where a log ends."""
    if not path.exists():
        return None
    found = read_log(path)
    same = found.header == log.header and found.steps[: len(log.steps)] == log.steps
    return found if same and len(found.steps) > len(log.steps) else None


def check_settings(saved: Path, given: dict[str, Any]) -> None:
    """Refuse a checkpoint's log of other settings than those that `MeZO` is given, before its weights are loaded.

    Raises:
        UserError: naming the first that differs, or that the log is damaged.
    """
    log, rule = read_log(saved), parse(given["rule"])
    parts = {name: given[name] for name in ("modified", "blocks")}
    expected = said_of_settings(
        seed=given["seed"],
        family=family_of(given["family"], given["estimator"]),
        eps=[given["eps"]],
        rule=rule,
        rule_state=rule.state_size + (given["looks"] == "one-point"),
        settings=settings_of(given["estimator"], given["looks"], **parts),
    )
    said = {**log.header, "settings": dict(log.header["settings"])}
    said["settings"].pop("private", None)  # whose noise the log decides
    if len(said["groups"]) != 1 or any(parts.values()):  # how many there are depends on the model
        del expected["groups"]
    check_header(replace(log, header=said), expected)


def what_lacks(checkpoint: Path) -> str:
    """What a checkpoint lacks that resuming needs, in words; "" if nothing."""
    for name in (LOG, OPTIMIZER, STATE):
        if not (checkpoint / name).is_file():
            why = " (save_only_model)" if name == OPTIMIZER else ""
            return f"it has no {name}{why}"
    try:
        json.loads((checkpoint / STATE).read_text(encoding="utf-8"))  # what is written last
    except ValueError:
        return f"its {STATE} is cut short"
    return ""
