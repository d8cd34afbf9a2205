"""The two ways to look along directions: closures in, rises of the loss out; weights as they were.

Weight space (arXiv 2305.17333, Algorithm 1) moves every weight along one dense direction shared by the batch.
Activation space gives each row of the batch a rank-one direction of its own and moves no weight (`activations`).

A rise is how much the loss grows for one eps along z, by the kind of look:

    two-sided   (L(theta + eps z) - L(theta - eps z)) / 2          SPSA: two forwards a direction
    one-sided    L(theta + eps z) - L(theta)                       one forward a direction and one for all of them
    one-point    L(theta + eps z) - the mean of the same, a step   one forward a direction (arXiv 2006.10820,
                 before at its own theta, z and batch              residual feedback; weight space only)

One-sided ones carry eps/2 z^T H z z, which is zero on average where z is symmetric, as ours are.
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

Draws = Sequence[tuple[Any, ...]]
Losses = dict[str, list[float]]  # by where they were seen
HOME, AHEAD, BEHIND = "at the weights themselves", "at +eps", "at -eps"


@dataclass(frozen=True)
class Site:
    """Where a step looks from.

    Attributes:
        weights: the trainable tensors.
        step: index of the step.
        seed_of: seed of each direction of the step, by lane.
        eps: length of a look, per parameter group; groups of length 0 rest.
        shield: lets Ctrl-C through inside closures only.
        kind: of looks, one of `variants.LOOKS`.
        before: mean loss of the step before at its +eps; None at the first one.
    """

    weights: Weights
    step: int
    seed_of: Callable[[int], int]
    eps: Sequence[float]
    shield: Shield
    kind: str = "two-sided"
    before: float | None = None


@dataclass(frozen=True)
class Seen:
    """What the looks of a step have seen.

    Attributes:
        losses: by where they were seen.
        rises: of each direction.
        forwards: passes over the batch.
        at: where weights that stay stand along the last direction, in eps: 1, -1, or 0 for home.
    """

    losses: Losses
    rises: list[float]
    forwards: int
    at: int = 0

    @property
    def loss(self) -> float:
        """Mean of all looks."""
        return _mean([loss for losses in self.losses.values() for loss in losses])

    @property
    def ahead(self) -> float:
        """Mean at +eps."""
        return _mean(self.losses[AHEAD])


def look_weights(site: Site, closure: Any, batch: Any, samples: int, stay: bool) -> Seen:
    """The rise along each sample's direction.

    Args:
        site: where from.
        closure: of nothing, or of the batch if that is not None; returns the loss.
        batch: its argument.
        samples: how many directions.
        stay: leave the weights where the last look was, for an update that brings them home.

    Raises:
        NonFiniteLoss, UserError, whatever the closure raises: the weights are home, `stay` or not.
    """
    arguments = () if batch is None else (batch,)
    weights, eps = site.weights, site.eps

    def loss(where: str) -> float:
        return _scalar(weights.average(site.shield.call(closure, *arguments)), site.step, where)

    losses: Losses = {HOME: [loss(HOME)]} if site.kind == "one-sided" else {}
    losses[AHEAD] = ahead = []
    at = 0
    for lane in range(samples):
        seed = site.seed_of(lane)
        stays = False
        try:
            weights.look(seed, eps, 1.0)
            at = 1
            ahead.append(loss(AHEAD))
            if site.kind == "two-sided":
                weights.look(seed, eps, -2.0)
                at = -1
                losses.setdefault(BEHIND, []).append(loss(BEHIND))
            stays = stay and lane == samples - 1
        finally:
            if at and not stays:
                weights.look(seed, eps, -float(at))
                at = 0
    forwards = sum(len(values) for values in losses.values())
    return Seen(losses, _rises(losses, 1, site.before), forwards, at)


def _rises(losses: Losses, rows: int, before: float | None) -> list[float]:
    ahead = losses[AHEAD]
    if BEHIND in losses:
        return [(plus - minus) / 2.0 for plus, minus in zip(ahead, losses[BEHIND], strict=True)]
    if HOME in losses:
        return [plus - losses[HOME][i % rows] for i, plus in enumerate(ahead)]
    return [0.0 if before is None else plus - before for plus in ahead]


class RowLooks:
    """Activation space: one direction a row and sample.

    Args:
        two_calls: with a batch, call loss_fn once for each sign and sample instead of once for all.
        check: when tensors move for the first time make sure that one row's direction leaves the losses of other
            rows alone.
    """

    def __init__(self, two_calls: bool, check: bool) -> None:
        self._two_calls = two_calls
        self._check = check
        self._checked: set[tuple[bool, ...]] = set()  # the groups that moved
        self._rows = 0  # of the last closure without a batch

    def look(self, site: Site, closure: Any, batch: Any, samples: int) -> tuple[Seen, Draws | None]:
        """The rise along each direction, sample-major, and what was drawn for all of them, if it was.

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
            rows = self._rows or len(run.bare())
            try:
                losses = run.apart(rows, samples)
            except Exception:
                # Of whatever kind: one row where three were is spread to three, and meets one label.
                again = len(run.bare())
                if again == rows:
                    raise
                rows = again
                losses = run.apart(rows, samples)
            self._rows = rows
        else:
            _, rows = repeat_rows(batch, 1)
            one = run.apart if self._two_calls else run.together
            losses = one(rows, samples)
        for where, values in losses.items():
            for row, value in enumerate(values):
                if not math.isfinite(value):
                    raise NonFiniteLoss(site.step, value, f"{where} in row {row % rows}")
        moving = tuple(length > 0.0 for length in site.eps)
        if self._check and moving not in self._checked:
            run.check(rows, run.draws if samples == 1 else None)
            self._checked.add(moving)
        forwards = sum(len(values) for values in losses.values()) // rows
        return Seen(losses, _rises(losses, rows, None), forwards), run.draws


class _Rows:
    """Forwards of one step along a direction a row."""

    def __init__(self, site: Site, closure: Any, batch: Any) -> None:
        self.site, self.function, self.data = site, closure, batch
        self.draws: Draws | None = None  # of all the directions of the step
        self.signs = {AHEAD: 1.0, BEHIND: -1.0} if site.kind == "two-sided" else {AHEAD: 1.0}

    def _call(self, draws: Draws, count: int, signs: list[float], batch: Any) -> list[float]:
        """Losses [R] of rows that look along `count` directions in turn, each as far as its sign says."""
        look = Look(self.site.weights, draws, count, signs, self.site.eps)
        arguments = () if batch is None else (batch,)
        with looking(look):
            losses = self.site.shield.call(self.function, *arguments)
        return _per_row(losses, len(signs), batch is not None)

    def _draw(self, lanes: Iterable[int]) -> Draws:
        seeds = np.array([self.site.seed_of(lane) for lane in lanes], np.uint64)
        return self.site.weights.draw(seeds, self.site.eps)

    def bare(self) -> list[float]:
        """Losses of the rows as they are."""
        arguments = () if self.data is None else (self.data,)
        losses = self.site.shield.call(self.function, *arguments)
        if not isinstance(losses, Tensor) or losses.dim() != 1:
            raise UserError(
                f"activation space: the closure must return one loss a row, a tensor [rows]; it returned {describe(losses)}"
            )
        return [float(x) for x in losses.detach().double().tolist()]

    def _start(self, rows: int) -> Losses:
        if self.site.kind == "two-sided":
            return {}
        losses = self.bare()
        if len(losses) != rows:
            raise UserError(
                f"activation space: the closure returned {len(losses)} losses for {rows} rows: it must return one loss a row"
            )
        return {HOME: losses}

    def apart(self, rows: int, samples: int) -> Losses:
        """A call for each sign and sample, rows as they are."""
        losses = self._start(rows)
        for sample in range(samples):
            draws = self._draw(range(sample * rows, (sample + 1) * rows))
            for where, sign in self.signs.items():
                found = self._call(draws, rows, [sign] * rows, self.data)
                losses[where] = [*losses.get(where, []), *found]
            self.draws = draws if samples == 1 else None
        return losses

    def together(self, rows: int, samples: int) -> Losses:
        """All signs and samples as rows of one batch."""
        losses = self._start(rows)
        count = rows * samples
        repeated, _ = repeat_rows(self.data, len(self.signs) * samples)
        self.draws = self._draw(range(count))
        signs = [sign for sign in self.signs.values() for _ in range(count)]
        values = self._call(self.draws, count, signs, repeated)
        for i, where in enumerate(self.signs):
            losses[where] = values[i * count : (i + 1) * count]
        return losses

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
        bare = self._call(draws, lanes, [0.0] * rows, batch)
        looked = self._call(draws, lanes, some, batch)
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


def _mean(losses: Sequence[float]) -> float:
    return math.fsum(losses) / len(losses)


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
