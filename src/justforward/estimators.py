"""The two ways to look along directions: closures in, losses at +eps and -eps out; weights as they were.

Weight space (arXiv 2305.17333, Algorithm 1) moves every weight along one dense direction shared by the batch.
Activation space gives each row of the batch a rank-one direction of its own and moves no weight (`activations`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from justforward.activations import Look, looking, repeat_rows
from justforward.directions import Weights
from justforward.errors import NonFiniteLoss, UserError
from justforward.interrupts import Shield

Pairs = list[tuple[float, float]]
Draws = Sequence[tuple[Any, ...]]


@dataclass(frozen=True)
class Site:
    """Where a step looks from.

    Attributes:
        weights: the trainable tensors.
        step: index of the step.
        seed_of: seed of each direction of the step, by lane.
        eps: length of a look, per parameter group.
        shield: lets Ctrl-C through inside closures only.
    """

    weights: Weights
    step: int
    seed_of: Callable[[int], int]
    eps: Sequence[float]
    shield: Shield


def look_weights(site: Site, closure: Any, batch: Any, samples: int, stay: bool) -> Pairs:
    """Losses at +eps and -eps of each sample's direction.

    Args:
        site: where from.
        closure: of nothing, or of the batch if that is not None; returns the loss.
        batch: its argument.
        samples: how many directions.
        stay: leave the weights at -eps of the last direction, for an update that brings them home.

    Raises:
        NonFiniteLoss, UserError, whatever the closure raises: the weights are home, `stay` or not.
    """
    losses: Pairs = []
    arguments = () if batch is None else (batch,)
    weights, eps = site.weights, site.eps
    for lane in range(samples):
        seed = site.seed_of(lane)
        at = 0
        try:
            weights.look(seed, eps, 1.0)
            at = 1
            plus = _scalar(site.shield.call(closure, *arguments), site.step, "at +eps")
            weights.look(seed, eps, -2.0)
            at = -1
            minus = _scalar(site.shield.call(closure, *arguments), site.step, "at -eps")
            losses.append((plus, minus))
            if stay and lane == samples - 1:
                at = 0
        finally:
            if at:
                weights.look(seed, eps, -float(at))
    return losses


class RowLooks:
    """Activation space: one direction a row and sample.

    Args:
        two_calls: with a batch, call loss_fn once for each sign and sample instead of once for all.
        check: at the first step make sure that one row's direction leaves the losses of other rows alone.
    """

    def __init__(self, two_calls: bool, check: bool) -> None:
        self._two_calls = two_calls
        self._unchecked = check
        self._rows = 0  # of the last closure without a batch

    def look(
        self, site: Site, closure: Any, batch: Any, samples: int
    ) -> tuple[Pairs, Draws | None]:
        """Losses at +eps and -eps of each direction, sample-major, and what was drawn for all of them, if it was.

        Args:
            site: where from.
            closure: of nothing, or of the batch if that is not None; returns one loss a row.
            batch: its argument.
            samples: directions for each row.

        Raises:
            NonFiniteLoss, UserError, whatever the closure raises.
        """
        run = _Rows(site, closure, batch)
        if batch is None:
            rows = self._rows or run.count()
            try:
                losses = run.two_calls(rows, samples)
            except Exception:
                # Of whatever kind: one row where three were is spread to three, and meets one label.
                again = run.count()
                if again == rows:
                    raise
                rows = again
                losses = run.two_calls(rows, samples)
            self._rows = rows
        else:
            _, rows = repeat_rows(batch, 1)
            one = run.two_calls if self._two_calls else run.one_call
            losses = one(rows, samples)
        for row, pair in enumerate(losses):
            for value, where in zip(pair, ("+eps", "-eps"), strict=True):
                if not math.isfinite(value):
                    raise NonFiniteLoss(site.step, value, f"at {where} in row {row % rows}")
        if self._unchecked:
            run.check(rows, run.draws if samples == 1 else None)
            self._unchecked = False
        return losses, run.draws


class _Rows:
    """Forwards of one step along a direction a row."""

    def __init__(self, site: Site, closure: Any, batch: Any) -> None:
        self.site, self.function, self.data = site, closure, batch
        self.draws: Draws | None = None  # of all the directions of the step

    def _call(self, draws: Draws, signs: list[float], batch: Any) -> list[float]:
        look = Look(self.site.weights, draws, signs, self.site.eps)
        arguments = () if batch is None else (batch,)
        with looking(look):
            losses = self.site.shield.call(self.function, *arguments)
        return _per_row(losses, len(signs), batch is not None)

    def _draw(self, lanes: Iterable[int]) -> Draws:
        seeds = np.array([self.site.seed_of(lane) for lane in lanes], np.uint64)
        return self.site.weights.draw(seeds)

    def count(self) -> int:
        """How many rows the closure has: one bare forward."""
        losses = self.site.shield.call(self.function)
        if not isinstance(losses, Tensor) or losses.dim() != 1:
            raise UserError(
                f"activation space: the closure must return one loss a row, a tensor [rows]; it returned {describe(losses)}"
            )
        return len(losses)

    def two_calls(self, rows: int, samples: int) -> Pairs:
        """Two calls a sample, rows as they are."""
        losses: Pairs = []
        for sample in range(samples):
            draws = self._draw(range(sample * rows, (sample + 1) * rows))
            plus = self._call(draws, [1.0] * rows, self.data)
            minus = self._call(draws, [-1.0] * rows, self.data)
            losses += zip(plus, minus, strict=True)
            self.draws = draws if samples == 1 else None
        return losses

    def one_call(self, rows: int, samples: int) -> Pairs:
        """All signs and samples as rows of one batch."""
        count = rows * samples
        repeated, _ = repeat_rows(self.data, 2 * samples)
        signs = [1.0] * count + [-1.0] * count
        self.draws = self._draw(range(count))
        values = self._call(self.draws, signs, repeated)
        return list(zip(values[:count], values[count:], strict=True))

    def check(self, rows: int, draws: Draws | None) -> None:
        """Refuse a model in which one row's direction reaches another row's loss."""
        batch, lanes = self.data, rows
        if batch is not None:
            batch, rows = repeat_rows(batch, 2)[0], 2 * rows
        elif rows < 2:
            return
        draws = draws or self._draw(range(lanes))
        # Thue and Morse's sequence, the last row on: neither a shift nor a reversal of the rows leaves it as it is.
        some = [float(row.bit_count() % 2 or row == rows - 1) for row in range(rows)]
        bare = self._call(draws, [0.0] * rows, batch)
        looked = self._call(draws, some, batch)
        effect = max(abs(a - b) for a, b, on in zip(bare, looked, some, strict=True) if on)
        for row, (a, b, on) in enumerate(zip(bare, looked, some, strict=True)):
            if not on and abs(a - b) > 1e-3 * effect + 1e-5 * (1.0 + abs(a)):
                raise UserError(
                    f"activation space: looking along the directions of other rows changed the loss of row {row} from {a} "
                    f"to {b}: the model mixes the rows of a batch, or its first axis is not the batch; use "
                    "estimator='weight' (or, if the loss itself is random, check_rows=False)"
                )


@contextmanager
def looking_mode(model: nn.Module | None) -> Iterator[None]:
    """No gradients, and the model in eval mode: dropout would drown a look in noise."""
    modules: Sequence[nn.Module] = (
        [] if model is None else [m for m in model.modules() if m.training]
    )
    for module in modules:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in modules:
            module.training = True


def _scalar(loss: Any, step: int, where: str) -> float:
    if isinstance(loss, Tensor):
        if loss.numel() == 0:
            raise UserError("the closure returned an empty tensor: it must return the loss")
        loss = loss.detach()
        value = float(loss.float().mean()) if loss.numel() > 1 else float(loss)
    else:
        try:
            value = float(loss)
        except (TypeError, ValueError):
            raise UserError(
                f"the closure returned {describe(loss)}: it must return the loss"
            ) from None
    if not math.isfinite(value):
        raise NonFiniteLoss(step, value, where)
    return value


def _per_row(losses: Any, rows: int, whole: bool) -> list[float]:
    if not isinstance(losses, Tensor) or losses.dim() != 1 or len(losses) != rows:
        if not whole and isinstance(losses, Tensor) and losses.dim() == 1:
            raise UserError(
                f"activation space: the closure returned {len(losses)} losses after {rows} in the call before: all calls "
                "of a step must see the same rows"
            )
        raise UserError(
            f"activation space: loss_fn must return one loss a row, here a tensor [{rows}]; it returned {describe(losses)}"
        )
    return [float(x) for x in losses.detach().double().tolist()]


def describe(value: Any) -> str:
    return (
        f"a tensor {list(value.shape)}"
        if isinstance(value, Tensor)
        else f"a {type(value).__name__}"
    )
