"""What MeZO is compared with: AdamW and backpropagation, on the rows, prompts and tuners of `train`.

Order of the rows, linear decay of the learning rate, and the rule that keeps a step (best in validation, step 0
included) are those of a run. Betas (0.9, 0.999), no weight decay, gradients clipped to norm 1: the defaults of the
trainer that the paper (arXiv 2305.17333) fine-tunes with. Dropout is off, as it is while looking: so a
difference in the figures is the optimizer's and not the regulariser's.

In memory are the trainable weights, their gradients, Adam's two moments, and the best weights so far; with
checkpointing the activations of one layer at a time.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from justforward.data import Example, batches
from justforward.errors import UserError
from justforward.evaluate import Scorer
from justforward.folder import Metric, best_step
from justforward.models import inner_model
from justforward.prepare import Stop
from justforward.progress import Progress
from justforward.prompts import eval_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The paper's for OPT (README of its code); of head tuning, which it has no recipe for, ours.
LEARNING_RATES = {"full": 1e-5, "lora": 1e-4, "prefix": 1e-2, "prompt": 1e-2, "head": 1e-3}
CLIP_NORM = 1.0
MOST_LR = 1e3


@dataclass(frozen=True)
class Settings:
    """How to tune.

    Attributes:
        lr: of the first step; it falls linearly to 0 over `max_steps`.
        max_steps: updates, each of one batch.
        eval_every: steps between validations; there is one before the first and one after the last too.
        batch_size: rows a step.
        eval_batch_size: rows a forward in validation.
        seed: of the order of the rows.
        until: `time.monotonic()` after which no step begins.
        checkpointing: keep the inputs of the model's layers alone, and run them again on the way back.
    """

    lr: float
    max_steps: int
    eval_every: int
    batch_size: int = 8
    eval_batch_size: int = 32
    seed: int = 0
    until: float = math.inf
    checkpointing: bool = False


@dataclass(frozen=True)
class Tuned:
    """What `tune` did; the model has the weights of the best step.

    Attributes:
        curve: the validations: step, forwards and backwards of a batch until then (a layer that is run
            again on the way back counts as a forward), seconds, accuracy, loss, value.
        best: the one of them whose weights are kept.
        steps: updates made.
        stopped_by: "max_steps" or "max_minutes".
        train_seconds: of the steps alone.
    """

    curve: list[Metric]
    best: Metric
    steps: int
    stopped_by: str
    train_seconds: float


def tune(
    scorer: Scorer,
    train: Sequence[Example],
    validation: Sequence[Example],
    settings: Settings,
    progress: Progress | None = None,
    stop: Stop | None = None,
) -> Tuned:
    """Tune what has requires_grad in the scorer's model, and leave it as it was best in validation.

    Args:
        scorer: prompts, loss and model, whose trainable weights are float32.
        train: rows to learn from.
        validation: rows to choose the step by.
        settings: see there.
        progress: where to show it.
        stop: a signal that is heard between steps.

    Raises:
        UserError: a loss or gradient that is not finite, naming the step; a model whose layers cannot
            be checkpointed; nothing to tune; an absurd lr.
    """
    run = _Run(scorer, train, validation, settings, progress or Progress(), stop or Stop())
    with eval_mode(scorer.model):
        return run.go()


@dataclass
class _Run:
    scorer: Scorer
    train: Sequence[Example]
    validation: Sequence[Example]
    settings: Settings
    progress: Progress
    stop: Stop
    steps: int = 0
    train_seconds: float = 0.0
    curve: list[Metric] = field(default_factory=list)
    kept: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        model = self.scorer.model
        self.started = time.monotonic()
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if self.settings.lr > MOST_LR:
            raise UserError(
                f"--lr is {self.settings.lr:g}: a first step moves every weight by about that much: give at most "
                f"{MOST_LR:g}"
            )
        if not self.weights:
            raise UserError("no parameter has requires_grad: there is nothing to tune")
        self.layers = checkpointable(model) if self.settings.checkpointing else []
        self.optimizer = torch.optim.AdamW(
            self.weights.values(), lr=self.settings.lr, weight_decay=0.0
        )

    @property
    def forwards(self) -> int:
        return (2 if self.layers else 1) * self.steps

    def go(self) -> Tuned:
        settings = self.settings
        total = (2 if self.layers else 1) * settings.max_steps
        left = settings.until - self.started
        self.progress.start(0, total, None if math.isinf(left) else left)
        self._validate()
        while (reason := self._reason()) is None:
            self.stop.check()
            loss = self._step()
            self.progress.step(self.forwards, loss)
            if self.steps % settings.eval_every == 0:
                self._validate()
        if self.curve[-1]["step"] != self.steps:
            self._validate()
        self.progress.stop()
        best = best_step(self.curve, self.steps)
        assert best is not None
        if best["step"] != self.steps:
            with torch.no_grad():
                for name, weight in self.weights.items():
                    weight.copy_(self.kept[name])
        return Tuned(self.curve, best, self.steps, reason, self.train_seconds)

    def _reason(self) -> str | None:
        if self.steps >= self.settings.max_steps:
            return "max_steps"
        return "max_minutes" if time.monotonic() >= self.settings.until else None

    def _step(self) -> float:
        clock = time.monotonic()
        settings, scorer = self.settings, self.scorer
        chosen = batches(len(self.train), settings.batch_size, settings.seed, self.steps)
        rows = [self.train[row] for row in chosen]
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * (1.0 - self.steps / settings.max_steps)
        with checkpointed(self.layers):
            losses = scorer.loss_of(scorer.encode_training(rows))
            finite = losses.isfinite().tolist()
            if not all(finite):
                bad = finite.index(False)
                raise UserError(
                    f"step {self.steps}: the loss of {rows[bad].where} is {losses[bad].item()}: "
                    "lower --lr, or look for what is odd in that row"
                )
            loss = losses.mean()
            loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.weights.values(), CLIP_NORM)
        if not norm.isfinite():
            raise UserError(
                f"step {self.steps}: the gradient's norm is {norm.item()}: lower --lr, or look for an odd "
                f"row in the batch that begins with {rows[0].where}"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        self.train_seconds += time.monotonic() - clock
        return loss.item()

    def _validate(self) -> None:
        try:
            found = self.scorer.evaluate(self.validation, self.settings.eval_batch_size)
        except UserError as error:
            raise UserError(f"step {self.steps}: {error}, or start with a lower --lr") from error
        self.progress.validation(self.forwards, found.metric, found.value, found.loss)
        self.curve.append(
            {
                "kind": "validation",
                "step": self.steps,
                "forwards": self.forwards,
                "backwards": self.steps,
                "seconds": round(time.monotonic() - self.started, 3),
                "accuracy": found.accuracy,
                "loss": found.loss,
                "value": found.value,
            }
        )
        if (
            best_step(self.curve, self.steps) is self.curve[-1]
            and self.steps < self.settings.max_steps
        ):
            self._keep()

    @torch.no_grad()
    def _keep(self) -> None:
        """Remember the weights, in the CPU's memory; those of the last step are where they are."""
        for name, weight in self.weights.items():
            if name in self.kept:
                self.kept[name].copy_(weight)
            else:
                self.kept[name] = weight.detach().to("cpu", copy=True)


# ------------------------------------------------------------------------------- gradient checkpointing


def checkpointable(model: PreTrainedModel) -> Sequence[nn.Module]:
    """The layers that transformers knows how to run twice.

    Raises:
        UserError: there are none, or a prefix is before the text, whose keys and values a layer that ran
            twice would append to twice.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    kind = model.config.model_type
    if getattr(getattr(model, "active_peft_config", None), "peft_type", None) == "PREFIX_TUNING":
        raise UserError(
            "--gradient-checkpointing runs layers twice, and a prefix is changed by the first time: "
            "leave it out with --tuner prefix"
        )
    layers = [m for m in inner_model(model).modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(
            f"--gradient-checkpointing: a {kind} model has no layers that can be run again: leave it out"
        )
    return layers


@contextlib.contextmanager
def checkpointed(layers: Sequence[Any]) -> Iterator[None]:
    """While inside, a layer keeps its input alone, whether the model is in training mode or not.

    transformers' own switch works in training mode only, which would turn dropout on.
    """
    try:
        for layer in layers:
            again = partial(
                checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
            )
            layer.forward = again
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
