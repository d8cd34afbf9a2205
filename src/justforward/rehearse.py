"""Steps rehearsed on the meta device: what is alive during a step of each method, by running it without values.

It is the project's own code that runs: the tuner is put on by `tuners.attach`, activation space looks by
`activations.looking`, layers are run twice by `first_order.checkpointed`. What is rehearsed is a step on one batch of rows of the
same padded length, with the logits of one answer position a row, as for label words of one token.

    evaluation          one forward
    weight space        the same forwards, one after the other; a byte for each 1,024 trainable weights (their grid); the
                        rules sgd, rms, sign, clip, momentum, adam and rmsprop with a window keep nothing else
    moments kept        and two float32 for each trainable weight (adam, rmsprop with window=0)
    activation space    one forward of twice the rows; a direction a row: for each matrix rows + columns float32, and a
                        float32 for each weight of a vector
    first-order         forward, backward, clipping and update; on a CPU, where `baseline` keeps them, the best weights so far
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from justforward.activations import Look, entering, looking, repeat_rows
from justforward.alive import ENDED, Event, Trace, traced
from justforward.causal import log_probabilities
from justforward.config import TrainConfig, Tuner
from justforward.directions import Weights
from justforward.errors import UserError
from justforward.first_order import CLIP_NORM, checkpointable, checkpointed
from justforward.models import inner_model
from justforward.noise import spec
from justforward.skeleton import Plan, build, held_bytes, quantise
from justforward.stored import HALVES, make_stored, rehearsed
from justforward.tuners import attach

Way = Literal["evaluation", "weight", "activation", "adamw", "sgd"]
Batch = dict[str, Tensor]
CHOICES = 2  # label words that an answer is scored among


@dataclass(frozen=True)
class Method:
    """One way to use or tune a model.

    Attributes:
        name: for people.
        way: evaluation, weight or activation (MeZO's looks), adamw or sgd (backpropagation).
        tuner: what is tuned.
        moments: MeZO: the sums of adam are kept (window=0).
        checkpointing: backpropagation: layers are run twice.
        options: what asks the command for it, after `justforward`; none for what it has no command for.
    """

    name: str
    way: Way
    tuner: Tuner = "full"
    moments: bool = False
    checkpointing: bool = False
    options: str | None = None

    @property
    def first_order(self) -> bool:
        """Whether it needs a backward pass."""
        return self.way in ("adamw", "sgd")


METHODS = (
    Method("evaluation", "evaluation", options="eval"),
    Method("MeZO, weight space", "weight", options="train --estimator weight"),
    Method("MeZO, weight space, adam with kept moments", "weight", moments=True),
    Method("MeZO, activation space", "activation", options="train --estimator activation"),
    Method("MeZO, LoRA, weight space", "weight", "lora", options="train --tuner lora --estimator weight"),
    Method("MeZO, LoRA, activation space", "activation", "lora", options="train --tuner lora"),
    Method("MeZO, prefix, weight space", "weight", "prefix", options="train --tuner prefix --estimator weight"),
    Method("MeZO, prefix, activation space", "activation", "prefix", options="train --tuner prefix"),
    Method("AdamW", "adamw", options="baseline --method first-order"),
    Method("AdamW, checkpointing", "adamw", checkpointing=True, options="baseline --method first-order --gradient-checkpointing"),
    Method("SGD", "sgd"),
    Method("SGD, checkpointing", "sgd", checkpointing=True),
    Method("AdamW, LoRA", "adamw", "lora", options="baseline --method first-order --tuner lora"),
    Method("AdamW, LoRA, checkpointing", "adamw", "lora", checkpointing=True, options="baseline --method first-order --tuner lora --gradient-checkpointing"),
    Method("AdamW, prefix", "adamw", "prefix", options="baseline --method first-order --tuner prefix"),
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What a rehearsal is of, besides the method and the size of the batch.

    Attributes:
        plan: the model.
        dtype: of its weights.
        quantize: its linear maps in 8 or 4 bits, as `quantised` has it, or the matrices of the plan's .gguf as stored.
        lora_rank, lora_targets, prefix_length: as for train.
        keep_best: first-order: a copy of the trainable weights is kept in the same memory.
        wide: 16-bit weights are computed with in float32, as on a CPU (`stored`).
        stand_in: what is run in the model's place, where that cannot be run without values; all that is held from step
            to step stays the model's own.
    """

    plan: Plan
    dtype: torch.dtype = torch.float32
    quantize: str | None = None
    lora_rank: int = 8
    lora_targets: str | None = None
    prefix_length: int = 5
    keep_best: bool = True
    wide: bool = False
    stand_in: Plan | None = None


@dataclass(frozen=True)
class Rehearsal:
    """What a step takes.

    Attributes:
        weights: bytes of the model's parameters and buffers, those of the tuner included.
        trainable: how many weights are tuned.
        kept: bytes kept from step to step besides: grid, moments, best weights.
        made: bytes kept from step to step that the trace makes (AdamW's moments).
        trace: what is alive besides during a step, of backpropagation two (activations, gradients, directions), and
            the work of one; that of MeZO's sweeps over the weights is not in it.
        sweeps: passes over the trainable weights that MeZO makes in a step.
    """

    weights: int
    trainable: int
    kept: int
    made: int
    trace: Trace
    sweeps: int


class Stage:
    """Where steps are rehearsed; models, and what several methods have in common, are made once.

    Args:
        settings: see there.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        stand_in = settings.stand_in
        # what runs; whoever asks for certain maps of the model names none of the stand-in's
        self._runs = (
            settings
            if stand_in is None
            else replace(settings, plan=stand_in, lora_targets=None, stand_in=None)
        )
        self._models: dict[tuple[Tuner, bool], Any] = {}
        self._traces: dict[tuple[Any, ...], Trace] = {}

    def run(self, method: Method, rows: int, length: int) -> Rehearsal:
        """A step of a method on a batch of so many rows and tokens.

        Raises:
            UserError: the method does not go with the model, its quantisation or its type of weights.
            FAILS: the model cannot be run on the meta device.
        """
        settings = self.settings
        _check(settings, method)
        model, runs = self._model(method.tuner, False), self._model(method.tuner, True)
        tensors = [p for p in model.parameters() if p.requires_grad]
        moved = [p for p in runs.parameters() if p.requires_grad]
        way = (
            "forward"
            if method.way in ("evaluation", "weight")
            else "backward"
            if method.first_order
            else method.way
        )
        key = (method.tuner, way, method.checkpointing, rows, length)
        if key not in self._traces:
            batch = _batch(self._runs, rows, length)
            losses = losses_of(runs, self._runs.plan.kind)
            if way == "backward":
                trace = _backward(runs, moved, method.checkpointing, losses, batch)
                self._traces[key] = trace if runs is model else _scaled(trace, tensors, moved)
            elif way == "activation":
                self._traces[key] = _looked(runs, losses, batch, rows)
            else:
                with torch.no_grad(), traced() as self._traces[key], rehearsed():
                    losses(batch)
        trace = self._traces[key]
        if method.way == "weight":
            trace = Trace(trace.events, trace.work * 2)
        elif method.first_order:
            own = (method.tuner, method.way)
            if own not in self._traces:
                self._traces[own] = _updated(tensors, method.way)
            trace = _two_steps(trace, self._traces[own])
        sweeps = {"weight": 3, "activation": 1}.get(method.way, 0)
        trainable = 0 if method.way == "evaluation" else sum(p.numel() for p in tensors)
        kept, made = _state(settings, method, tensors)
        return Rehearsal(held_bytes(model), trainable, kept, made, trace, sweeps)

    def _model(self, tuner: Tuner, runs: bool) -> Any:
        runs = runs and self.settings.stand_in is not None
        if (tuner, runs) not in self._models:
            self._models[tuner, runs] = _tuned(self._runs if runs else self.settings, tuner)
        return self._models[tuner, runs]


def _scaled(trace: Trace, tensors: Sequence[Tensor], moved: Sequence[Tensor]) -> Trace:
    """A stand-in's backward pass, whose gradients (what is left) are as large together as those of the model."""
    ratio = sum(p.numel() for p in tensors) / sum(p.numel() for p in moved)
    gradients = set(trace.left)
    events = [(n, round(ratio * size) if n in gradients else size) for n, size in trace.events]
    return Trace(events, trace.work)


def _state(settings: Settings, method: Method, tensors: Sequence[Tensor]) -> tuple[int, int]:
    """What is kept from step to step: bytes that the trace does not have, and of those that it has."""
    held = sum(p.numel() * p.element_size() for p in tensors)
    if method.way == "evaluation":
        return 0, 0
    if method.first_order:
        return settings.keep_best * held, 2 * (method.way == "adamw") * held
    grid = sum(-(-p.numel() // spec.TILE) for p in tensors)
    return grid + (8 * sum(p.numel() for p in tensors) if method.moments else 0), 0


def _check(settings: Settings, method: Method) -> None:
    if settings.quantize is not None and method.way != "evaluation" and method.tuner == "full":
        raise UserError("rounded weights cannot be tuned")
    if (
        settings.dtype != torch.float32
        and settings.wide
        and method.first_order
        and method.tuner == "full"
    ):
        raise UserError("backpropagation does not tune 16-bit weights here")


def _tuned(settings: Settings, tuner: Tuner) -> Any:
    model: Any = build(settings.plan, settings.dtype)
    if settings.quantize is not None:
        quantise(model, settings.plan, settings.quantize)
    if settings.wide:
        for p in model.parameters():
            if p.dtype in HALVES:
                make_stored(p, torch.float32)
    if tuner == "full":
        return model
    config = TrainConfig(
        model="",
        data="",
        out="",
        tuner=tuner,
        lora_rank=settings.lora_rank,
        lora_targets=settings.lora_targets,
        prefix_length=settings.prefix_length,
        start="base",
    )
    with traced():  # a prefix asks the model for keys and values
        return attach(model, cast(Any, Tokens(settings.plan.config)), config)


class Tokens:
    """As much of a tokenizer as a prefix asks for; its tokens are looked up in no table that has values."""

    def __init__(self, config: Any) -> None:
        self.all_special_ids: list[int] = []
        self._size = int(config.get_text_config().vocab_size)

    def __len__(self) -> int:
        return self._size


def _batch(settings: Settings, rows: int, length: int) -> Batch:
    def whole(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.int64, device="meta")

    batch = {name: whole(rows, length) for name in ("input_ids", "attention_mask")}
    if settings.plan.kind == "causal":
        batch["position_ids"] = whole(rows, length)
    elif settings.plan.kind == "seq2seq":
        batch["decoder_input_ids"] = whole(rows, 1)
    batch["tokens"], batch["right"] = whole(rows, CHOICES), whole(rows)
    return batch


def losses_of(model: Any, kind: str) -> Callable[[Batch], Tensor]:
    """The batch's losses [rows] as `causal`, `masked` and `seq2seq` have them: the answer's places alone go through the head."""
    from inspect import signature

    accepts = signature(inner_model(model).forward).parameters

    def logits_of(batch: Batch) -> Tensor:
        given: dict[str, Any] = {k: v for k, v in batch.items() if k in accepts}
        if kind == "causal":
            more = {"use_cache": False, "logits_to_keep": 1}
            given |= {k: v for k, v in more.items() if k in accepts}
            found: Tensor = model(**given).logits[:, -1:]
            return found
        if kind == "seq2seq":
            entering(len(batch["input_ids"]))
            encoded = inner_model(model).get_encoder()(
                input_ids=given.pop("input_ids"), attention_mask=given["attention_mask"]
            )
            logits: Tensor = inner_model(model)(
                encoder_outputs=encoded, use_cache=False, **given
            ).logits
            return logits
        body = inner_model(model).base_model

        def pick(module: nn.Module, arguments: Any, output: Any) -> Any:
            output.last_hidden_state = output.last_hidden_state[:, :1].clone()
            return output

        handle = body.register_forward_hook(pick)
        try:
            answered: Tensor = model(**given).logits
            return answered
        finally:
            handle.remove()

    def losses(batch: Batch) -> Tensor:
        logits = logits_of(batch).float()[:, None]
        first = torch.zeros_like(batch["tokens"])
        scores = log_probabilities(logits, first, first, batch["tokens"])
        return nn.functional.cross_entropy(scores, batch["right"], reduction="none")

    return losses


def _looked(model: Any, losses: Callable[[Batch], Tensor], batch: Batch, rows: int) -> Trace:
    """Both signs in one forward, each row along a direction of its own."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    tensors = [p for _, p in named]
    groups = [0] * len(tensors)
    # what `Look` reads of `Weights`, whose grids need values
    weights = SimpleNamespace(names=[n for n, _ in named], tensors=tensors, groups=groups)
    both, _ = repeat_rows(batch, 2)
    with torch.no_grad(), traced() as trace, rehearsed():
        draws = _draws(tensors, rows)
        signs = [1.0] * rows + [-1.0] * rows
        with looking(Look(cast(Weights, weights), draws, rows, signs, [1e-3])):
            losses(both)
    return trace


def _draws(tensors: Sequence[Tensor], rows: int) -> list[tuple[Tensor, ...]]:
    """As `Weights.draw`: views of one buffer."""
    shapes = [tuple(t.shape) if t.dim() == 2 else (t.numel(),) for t in tensors]
    buffer = torch.empty(rows * sum(map(sum, shapes)), device="meta")
    draws, at = [], 0
    for shape in shapes:
        parts = []
        for size in shape:
            parts.append(buffer[at : at + rows * size].view(rows, size))
            at += rows * size
        draws.append(tuple(parts))
    return draws


def _backward(
    model: Any,
    tensors: Sequence[Tensor],
    checkpointing: bool,
    losses: Callable[[Batch], Tensor],
    batch: Batch,
) -> Trace:
    """Forward, backward, clipping; what is left at the end are the gradients."""
    layers = checkpointable(model) if checkpointing else []
    try:
        with torch.enable_grad(), traced() as trace, rehearsed(), checkpointed(layers):
            losses(batch).mean().backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(tensors, CLIP_NORM, foreach=False)
    finally:
        for tensor in tensors:
            tensor.grad = None
    return trace


def _updated(tensors: Sequence[Tensor], way: Way) -> Trace:
    """The first step of an optimizer, whose gradients are there; what is left at the end are its moments."""
    optimizer: torch.optim.Optimizer
    if way == "adamw":
        optimizer = torch.optim.AdamW(tensors, lr=1e-5, weight_decay=0.0, foreach=False)
    else:
        optimizer = torch.optim.SGD(tensors, lr=1e-5, foreach=False)
    for tensor in tensors:
        tensor.grad = torch.empty_like(tensor, requires_grad=False)
    try:
        with traced() as trace:
            optimizer.step()
    finally:
        for tensor in tensors:
            tensor.grad = None
    return trace


def _two_steps(backward: Trace, update: Trace) -> Trace:
    """Two steps one after the other: the first makes the moments, amid what its backward pass leaves free."""
    events: list[Event] = []
    gradients, moments = backward.left, set(update.left)
    for step in range(2):
        start = 1 + max((number for number, _ in events), default=-1)
        events += [(start + number, size) for number, size in backward.events]
        behind = 1 + max((number for number, _ in events), default=-1)
        events += [(behind + n, size) for n, size in update.events if step == 0 or n not in moments]
        events += [(start + number, ENDED) for number in gradients]
    return Trace(events, backward.work + update.work)
