"""A start for answers that are written: the last linear map of the model, fitted to the tokens of the right answers.

Between the last map that writes to the residual stream and the logits stand a norm and the head alone. With what leaves
the last layer and what enters that map kept for each token of the right answers (one forward a row), the answers' loss
is a function of the map: it is made small by L-BFGS with a penalty that validation chooses. The gradient is that of norm
and head at those few tokens; nothing runs backwards through the model.

What is added is held down to a low rank, by what it does to the answers' tokens: that is no worse on new rows, and small to keep.
It learns what answers look like (short, no "The answer is"), which is most of what a few hundred rows can teach the last layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from justforward.data import Example
from justforward.deep import everywhere, stream_of
from justforward.evaluate import Scorer
from justforward.head import Inside, gives_logits
from justforward.models import inner_model
from justforward.probe import head_of, seen_at
from justforward.prompts import Batch, eval_mode
from justforward.stream import Norm, find_norm, write
from justforward.trunk import stack_of

# Weights of the penalty, strong to weak, on features that together are about 1 long; moves are in the stream's size.
PENALTIES = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
ITERATIONS = 15  # for each, from where the stronger one ended
FEATURES = 256  # main directions of what enters the map; with 128 of 1,536 the loss in validation was the same
RANK = 16  # of what is added
CANDIDATES = 30  # likeliest tokens at each place; the others' share is taken as it was
MOST_LOGITS = 2**24  # numbers at once


@dataclass(frozen=True)
class Last:
    """The last map that writes to the stream, the layer that it ends, and the norm behind that."""

    name: str
    module: nn.Module
    layer: nn.Module
    norm: Norm


@dataclass(frozen=True)
class Tokens:
    """The T tokens of some rows' right answers, on the model's device.

    Attributes:
        enters: [T, in], what enters the last map where a token is predicted.
        leaves: [T, hidden], what leaves the last layer there.
        token: [T].
        weight: [T], of its log-probability in the mean loss of the rows.
        forwards: passes over a batch.
    """

    enters: Tensor
    leaves: Tensor
    token: Tensor
    weight: Tensor
    forwards: int


@dataclass(frozen=True)
class Written:
    """How the last map was started.

    Attributes:
        before: the loss in validation, in nats.
        after: likewise, with the map as it is now; no larger than `before`.
        forwards: passes over a batch.
        tensors: what was added: "to" [hidden, r] times "what." and the map's name [r, in]; empty where no penalty gave
            anything better than the map as it was, which is then left alone.
    """

    before: float
    after: float
    forwards: int
    tensors: dict[str, Tensor]


def last_hindrance(scorer: Scorer, row: Example) -> str | None:
    """Why a model's last map cannot be fitted to answers; None if it can."""
    kind = scorer.model.config.model_type
    if stack_of(scorer.model) is None:
        return f"a {kind} model has no single stack of layers"
    if inner_model(scorer.model).get_output_embeddings() is None:
        return f"a {kind} model has no output head"
    if not gives_logits(scorer, row):
        return f"a {kind} model does more to its logits than its head's matrix"
    if find_last(scorer, row) is None:
        return f"the last layer of a {kind} model does not end in a linear map with a norm alone before the head"
    return None


@torch.no_grad()
def find_last(scorer: Scorer, row: Example) -> Last | None:
    """The map whose output is added to what leaves the last layer, as it is; found by running a text."""
    stream = stream_of(scorer, row, 1e-9)  # the last layer alone
    if stream is None:
        return None
    leaves, seen = everywhere(scorer, stream, row)
    norm = find_norm(leaves, seen)
    if norm is None:
        return None
    size = leaves.abs().max()
    for name, module in reversed(stream.writers.items()):
        handle = module.register_forward_hook(lambda m, args, output: output + size)
        try:
            risen = everywhere(scorer, stream, row)[0] - leaves
        finally:
            handle.remove()
        if (risen - size).abs().max() <= 1e-3 * size:  # no other map has read it
            return Last(name, module, stream.layers[-1], norm)
    return None


# ------------------------------------------------------------------------------------------- the fit


@torch.no_grad()
def answer_tokens(
    scorer: Scorer, last: Last, examples: Sequence[Example], batch_size: int
) -> Tokens:
    """What the last map and layer give at the tokens of the right answers, in the order of the rows.

    Args:
        scorer: of the model.
        last: its last map.
        examples: the rows.
        batch_size: rows a forward.
    """
    prompts, device = scorer.prompts, scorer.model.device
    rows = [row.only_right() for row in prompts.rows(examples)]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt), reverse=True)
    found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = [(torch.empty(0),) * 4] * len(rows)
    forwards = 0
    with eval_mode(scorer.model):
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            batch = prompts.batch([rows[i] for i in places])
            pick = _picker(batch, len(places))
            with seen_at([(last.module, True), (last.layer, False)], pick) as seen:
                prompts.scores(batch)
            forwards += 1
            for i, enters, leaves, token, weight in zip(
                places, *seen, batch["read_token"].cpu(), batch["read_weight"].cpu(), strict=True
            ):
                there = weight > 0  # rows of a batch are filled up to the longest
                found[i] = enters[there], leaves[there], token[there], weight[there]
    enters, leaves, token, weight = (
        torch.cat(part).to(device) for part in zip(*found, strict=True)
    )
    return Tokens(enters, leaves, token, weight / len(rows), forwards)


def _picker(batch: Batch, count: int) -> Any:
    at = batch["read_position"]  # among the last places, which go through the head
    kept = int(at.max()) + 1
    row = torch.arange(count, device=at.device)[:, None].expand_as(at)

    def pick(states: Tensor) -> Tensor:
        """[B, T, n]: of states [B, L, n] or [B * L, n]."""
        return states.reshape(count, -1, states.shape[-1])[:, -kept:][row, at]

    return pick


class Fit:
    """The loss of answers as a function of what is added to the stream at their tokens.

    Args:
        scorer: of the model, whose head is looked at.
        last: its last map.
        seen: the tokens.
    """

    def __init__(self, scorer: Scorer, last: Last, seen: Tokens) -> None:
        head: Any = head_of(scorer.model)
        self._weight: Tensor = head.weight.detach().float()
        bias = getattr(head, "bias", None)
        self._bias = self._weight.new_zeros(len(self._weight)) if bias is None else bias.detach()
        self._norm = last.norm.to(self._weight.device)
        self._seen = seen
        self._each = max(1, MOST_LOGITS // len(self._weight))
        self._chosen: Tensor | None = None  # tokens whose logits are computed
        self._rest = seen.weight.new_full((len(seen.token),), -torch.inf)

    @torch.no_grad()
    def narrow(self) -> None:
        """From now on compute logits of the answers' and other likely tokens alone; the others' sum stays what it is."""
        parts, rest = [self._seen.token], []
        for part in self._parts(self._each):
            logits = self._logits(part)
            parts.append(logits.topk(min(CANDIDATES, logits.shape[-1]), -1).indices.flatten())
        chosen: Tensor = torch.unique(torch.cat(parts))
        for part in self._parts(self._each):
            logits = self._logits(part)
            logits[:, chosen] = -torch.inf
            rest.append(logits.logsumexp(-1))
        self._rest = torch.cat(rest)
        self._chosen = chosen
        self._weight, self._bias = self._weight[chosen], self._bias[chosen]
        self._each = max(1, MOST_LOGITS // len(chosen))

    def loss(self, features: Tensor | None = None, by: Tensor | None = None) -> float:
        """Mean over the rows, with features [T, k] times `by` [hidden, k] added; by's gradient is added to where it has one."""
        total = 0.0
        for part in self._parts(self._each):
            moved = None if features is None or by is None else features[part] @ by.T
            logits = self._logits(part, moved)
            token = self._seen.token[part]
            if self._chosen is not None:
                token = torch.searchsorted(self._chosen, token)
            size = torch.logaddexp(logits.logsumexp(-1), self._rest[part])
            right = logits.gather(1, token[:, None])[:, 0] - size
            loss = -(right * self._seen.weight[part]).sum()
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    def _parts(self, each: int) -> list[slice]:
        count = len(self._seen.token)
        return [slice(i, min(i + each, count)) for i in range(0, count, each)]

    def _logits(self, part: slice, moved: Tensor | None = None) -> Tensor:
        x = self._seen.leaves[part]
        seen = self._norm.of(x if moved is None else x + moved)
        return torch.nn.functional.linear(seen, self._weight, self._bias)


def fit_last(
    scorer: Scorer, last: Last, seen: Tokens, chosen: Tokens
) -> tuple[float, float, tuple[Tensor, Tensor] | None]:
    """Fit what the last map is to write in addition to the training rows' tokens, its penalty by the validation rows'.

    Returns:
        The loss in validation before and after, and what is added: "to" [hidden, r] and "what" [r, in]; None where nothing
        is better.
    """
    held = seen.leaves.square().mean().sqrt()
    width = seen.enters.shape[1]
    scale = (seen.enters.square().mean(0).sqrt() * math.sqrt(width)).clamp_min(1e-12)
    # features = enters @ basis, in the stream's size
    basis = (_main_directions(seen.enters / scale, FEATURES) / scale[:, None]) * held
    given, others = seen.enters @ basis, chosen.enters @ basis
    fit, judge = Fit(scorer, last, seen), Fit(scorer, last, chosen)
    fit.narrow()
    by = torch.zeros(seen.leaves.shape[1], given.shape[1], device=given.device, requires_grad=True)
    before = best = judge.loss()
    kept: tuple[Tensor, Tensor] | None = None
    for penalty in PENALTIES:
        _descend(fit, given, by, penalty)
        if not by.isfinite().all():  # the search went astray
            break
        # what is added is of low rank: the main directions of what it does to the tokens
        moves = given @ by.detach().T
        to = _main_directions(moves, RANK)
        low = to @ (to.T @ by.detach())
        found = judge.loss(others, low)
        if found >= best:
            break
        best, kept = found, (to.contiguous(), (basis @ (low.T @ to)).T.contiguous())
    return before, best, kept


def _main_directions(x: Tensor, count: int) -> Tensor:
    """[n, count], orthonormal: along these x [T, n] is largest; fewer where T or n is smaller."""
    rows, width = x.shape
    x = x.double()
    values, vectors = torch.linalg.eigh(x.T @ x if rows >= width else x @ x.T)
    directions: Tensor = vectors
    if rows < width:
        kept = values > 1e-10 * values[-1]  # rows may depend on each other
        directions = x.T @ (vectors[:, kept] / values[kept].sqrt())
    return directions[:, -count:].float()


def _descend(fit: Fit, features: Tensor, by: Tensor, penalty: float) -> None:
    search = torch.optim.LBFGS(
        [by], max_iter=ITERATIONS, history_size=10, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        by.grad = 2.0 * penalty * by.detach()
        return fit.loss(features, by) + penalty * float(by.detach().square().sum())

    search.step(closure)  # type: ignore[no-untyped-call]


# -------------------------------------------------------------------------------------- the start


@torch.no_grad()
def start_last(
    scorer: Scorer,
    train: Sequence[Example],
    validation: Sequence[Example],
    batch_size: int,
    spared: Inside = nullcontext,
) -> Written:
    """Fit the model's last map to the right answers of some rows, and write to it what was found.

    Args:
        scorer: of a causal model of which `last_hindrance` knows nothing.
        train: rows to fit on.
        validation: rows to choose the penalty by.
        batch_size: rows a forward.
        spared: while inside, layers that do not move are spared; the validation rows, which are scored again and again,
            run so.
    """
    last = find_last(scorer, train[0])
    assert last is not None
    seen = answer_tokens(scorer, last, train, batch_size)
    with spared():
        chosen = answer_tokens(scorer, last, validation, batch_size)
    before, after, added = fit_last(scorer, last, seen, chosen)
    forwards = seen.forwards + chosen.forwards
    if added is None:
        return Written(before, after, forwards, {})
    to, what = added
    write(last.module, to, what)
    return Written(before, after, forwards, {"to": to.cpu(), f"what.{last.name}": what.cpu()})
