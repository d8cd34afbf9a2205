"""Steps of rules with moments (`rules.Adam`): scalars of the log to moves of the weights.

Of each tile of 1,024 weights the gradient estimates of the window are made again from their seeds, and the sums
m <- beta1 m + g and v <- beta2 v + g^2 run over them in float32, oldest first; nothing of a weight's size is stored. Both
are divided by the sum of their weights, so that one recurrence serves the window and the kept moments (window 0):
until a step leaves the window the two give the same bits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from justforward import directions, noise
from justforward.course import Course, directions_of
from justforward.directions import Family, Weights
from justforward.errors import UserError
from justforward.moves import Move
from justforward.rules import Adam, parse
from justforward.trajectory import Step

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Rank-one factors: so many directions are materialised at a time in a long replay, and so many float32 (64 MiB).
_DIRECTIONS_AT_ONCE, _FACTORS_AT_ONCE = 128, 1 << 24
# times |z| of at most 44.5, squared and summed over at most a million steps, this is below 2^127.
_LONGEST_ESTIMATE = 1e14


@dataclass(frozen=True)
class MomentMove(Move):
    """One step as the weights see it; directions and coefficients are those of the gradient estimates g_j in use.

    theta <- theta - decay theta - rate m / (sqrt(v) + eps), with m and v the weighted means of g_j and g_j^2.

    Attributes:
        ends: int64 [n], estimate j = sum_d coefficients[g, d] z_d has the directions ends[j - 1] .. ends[j]; oldest
            first, the step's own last.
        count: how many estimates the moments are of: n, or all so far where moments are kept (and n is 1).
        rates: float32 [groups].
    """

    ends: NDArray[np.int64]
    count: int
    rates: NDArray[np.float32]


class Moments:
    """Turns steps of a rule with moments into moves: `Course` for these rules.

    Args:
        seed: of the run.
        rule: its last rule.
    """

    def __init__(self, seed: int, rule: Adam) -> None:
        self.seed, self.rule = seed, rule
        # Seeds, coefficients and the groups' scales of the steps in use, oldest first.
        self.past: deque[tuple[list[int], tuple[float, ...], tuple[float, ...]]] = deque(
            maxlen=max(rule.window, 1)
        )
        self.kept: list[tuple[Tensor, Tensor]] = []  # the two sums of each tensor, if window is 0

    def check(self, step: Step) -> None:
        """Raise UserError if the step is one of a rule without moments, or its squares would not fit float32."""
        if len(step.rates) != len(step.scales):
            raise UserError(
                f"step {step.index} has {len(step.rates)} rates for {len(step.scales)} parameter groups: it was not "
                "estimated by a rule with moments"
            )
        longest = sum(map(abs, step.coefficients)) * max(map(abs, step.scales))
        if longest > _LONGEST_ESTIMATE:
            raise UserError(
                f"step {step.index}: the projected gradients add up to {longest:.3g}, of which the squares do not fit "
                f"float32 (at most {_LONGEST_ESTIMATE:g}): put a clip before the rule, or scale the loss down"
            )

    def move(self, step: Step) -> MomentMove:
        """The move of a step; steps must come in order."""
        self._remember(step)
        return MomentMove(
            dither=noise.step_seed(self.seed, step.index),
            seeds=np.array([seed for seeds, _, _ in self.past for seed in seeds], np.uint64),
            coefficients=np.concatenate(
                [
                    np.array(values, np.float32) * np.array(scales, np.float32)[:, None]
                    for _, values, scales in self.past
                ],
                axis=1,
            ),
            decays=np.array(step.decays, np.float32),
            ends=np.cumsum([len(seeds) for seeds, _, _ in self.past], dtype=np.int64),
            count=min(step.index + 1, self.rule.window or step.index + 1),
            rates=np.array(step.rates, np.float32),
        )

    def recall(self, steps: Sequence[Step]) -> None:
        """Remember steps that the weights (and kept moments) have taken already, in order."""
        for step in steps[-max(self.rule.window, 1) :]:
            self._remember(step)

    def _remember(self, step: Step) -> None:
        self.past.append((directions_of(step, self.seed), step.coefficients, step.scales))

    def apply(
        self,
        weights: Weights,
        steps: Sequence[Step],
        back: Sequence[float] | None = None,
        draws: Sequence[tuple[Any, ...]] | None = None,
    ) -> None:
        """Move the weights by steps, in order, in one pass; `back` and `draws` as for `Weights.update`."""
        moves = [self.move(step) for step in steps]
        self.keep(weights)
        self._update(weights, moves, back, draws)

    def keep(self, weights: Weights) -> None:
        """Make room for moments that are kept, if the rule keeps them and there is none."""
        if self.rule.window == 0 and not self.kept:
            self.kept = [
                (torch.zeros(t.shape, device=t.device), torch.zeros(t.shape, device=t.device))
                for t in weights.tensors
            ]

    def _update(
        self,
        weights: Weights,
        moves: Sequence[MomentMove],
        back: Sequence[float] | None = None,
        draws: Sequence[tuple[Any, ...]] | None = None,
    ) -> None:
        # Of the moves after the first only their own estimates are new: a pass makes each z once.
        fresh = [moves[0].seeds, *(move.seeds[_own(move)] for move in moves[1:])]
        seeds = np.concatenate(fresh)
        outer = weights.family.outer
        if outer and len(moves) > 1 and len(seeds) > max(_DIRECTIONS_AT_ONCE, 2 * len(fresh[0])):
            half = len(moves) // 2
            self._update(weights, moves[:half])
            self._update(weights, moves[half:])
            return
        if back is not None and outer:
            weights.look(int(seeds[-1]), back, 1.0)
            back = None
        elif back is not None:
            weights.come_home(int(seeds[-1]), back)
        run = _Pass(weights, self.rule, self.kept, moves, seeds, back, draws)
        floats = 0
        calls: list[Callable[[int, int], None] | None] = [None] * len(weights.tensors)
        for i, tensor in enumerate(weights.tensors):
            size = len(seeds) * sum(tensor.shape) if weights.is_outer(i) else 0
            if floats and floats + size > _FACTORS_AT_ONCE:
                weights.sweep(calls, later=len(moves) == 1)
                calls, floats = [None] * len(calls), 0
            calls[i] = run.call(i)
            floats += size
        weights.sweep(calls, later=len(moves) == 1)

    def state(self) -> dict[str, Any]:
        """All it remembers, for `restore`: some scalars, and copies of kept moments."""
        return {
            "past": list(self.past),
            "kept": [(first.clone(), second.clone()) for first, second in self.kept],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Remember what another one's `state` gave."""
        self.past.clear()
        self.past.extend((list(s), tuple(c), tuple(g)) for s, c, g in state["past"])
        self.kept = [(first.clone(), second.clone()) for first, second in state["kept"]]


class _Pass:
    """Moves as the kernels take them, for one pass over the weights."""

    def __init__(
        self,
        weights: Weights,
        rule: Adam,
        kept: Sequence[tuple[Tensor, Tensor]],
        moves: Sequence[MomentMove],
        seeds: NDArray[np.uint64],
        back: Sequence[float] | None,
        draws: Sequence[tuple[Any, ...]] | None,
    ) -> None:
        self.weights, self.kept, self.back, self.draws = weights, kept, back, draws
        self.seeds = seeds
        self.fresh = len(moves[0].seeds[_own(moves[0])])  # what `draws` is of
        lengths = [
            *np.diff(moves[0].ends, prepend=0),
            *(len(move.seeds[_own(move)]) for move in moves[1:]),
        ]
        self.ends = np.cumsum(lengths, dtype=np.int64)
        self.coefficients = np.concatenate(
            [moves[0].coefficients, *(move.coefficients[:, _own(move)] for move in moves[1:])],
            axis=1,
        )
        self.dithers = np.array([move.dither for move in moves], np.uint64)
        self.rates = np.stack([move.rates for move in moves], axis=1)
        self.decays = np.stack([move.decays for move in moves], axis=1)
        betas = [float(np.float32(beta)) for beta in (rule.beta1, rule.beta2)]
        self.shares = np.array(
            [[1.0 / powers_sum(beta, move.count) for beta in betas] for move in moves], np.float32
        )
        self.constants = (*(np.float32(x) for x in (*betas, rule.eps)), rule.window)

    def call(self, i: int) -> Callable[[int, int], None]:
        """The kernel of tensor i, ready to be called with a range of tiles."""
        weights, group = self.weights, self.weights.groups[i]
        kernels = _kernels(weights, i)
        sums: list[Any] = [s.view(-1) for s in self.kept[i]] if self.kept else [torch.empty(0)] * 2
        if weights.compiled:
            sums = [s.numpy() for s in sums]
        decays = weights.decays_of(i, self.decays[group])
        c = np.ascontiguousarray(self.coefficients[group])
        steps = (
            self.dithers,
            self.ends,
            self.rates[group],
            decays,
            self.shares,
            *self.constants,
            np.uint64(i),
        )
        if weights.is_outer(i):
            a, b = self._factors(i, c)
            columns = weights.tensors[i].shape[1]
            return weights.bind(i, kernels.adapt_outer, *sums, *steps, columns, a, b)
        kernel = kernels.adapt_signs if weights.family.signs else kernels.adapt
        away = self.back is not None and not weights.halves[i]
        home = np.float32(self.back[group] if self.back is not None and away else 0.0)
        return weights.bind(i, kernel, *sums, *steps, self.seeds, c, home)

    def _factors(self, i: int, c: NDArray[np.float32]) -> tuple[Any, Any]:
        """a, times the coefficients, and b of all directions; the newest may have been drawn already."""
        if self.draws is None:
            a, b = self.weights.factors(i, self.seeds)
        else:
            known = self.fresh
            older = self.weights.factors(i, self.seeds[:-known])
            join = np.concatenate if isinstance(older[0], np.ndarray) else torch.cat
            a, b = (join([old, new]) for old, new in zip(older, self.draws[i], strict=True))
        a *= (
            c[:, None]
            if isinstance(a, np.ndarray)
            else torch.as_tensor(c[:, None], device=a.device)
        )
        return a, b


def _kernels(weights: Weights, i: int) -> Any:
    if weights.compiled and not weights.halves[i]:  # Numba's have a file of their own
        from justforward.noise import moments

        return moments
    return weights.kernels(i)


def _own(move: MomentMove) -> slice:
    """Where a move's own directions are among those of its window."""
    return slice(int(move.ends[-2]) if len(move.ends) > 1 else 0, None)


def powers_sum(beta: float, count: int) -> float:
    """1 + beta + ... + beta^(count - 1), in O(log count) additions and multiplications.

    No library's pow or exp, whose last bits differ: the number is part of what a log means.
    """
    total, power = 0.0, 1.0
    for bit in f"{count:b}":
        total, power = total * (1.0 + power), power * power
        if bit == "1":
            total, power = 1.0 + beta * total, power * beta
    return total


def course_of(seed: int, rule: str) -> Course | Moments:
    """What turns the steps of a run with this seed and rule into moves."""
    chain = parse(rule)
    if chain.moments is not None:
        return Moments(seed, chain.moments)
    if chain.momentum is not None:
        return Course(seed, chain.momentum.beta, chain.momentum.window)
    return Course(seed)


_compiled: set[tuple[Family, torch.dtype]] = set()


def compile_kernels(family: Family, rule: str, *dtypes: torch.dtype) -> None:
    """Compile what a family and a rule need ahead of the first look; see `directions.compile_kernels`."""
    dtypes = dtypes or (torch.float32,)
    directions.compile_kernels(family, *dtypes)
    new = [(family, dtype) for dtype in dtypes if (family, dtype) not in _compiled]
    if parse(rule).moments is not None and new:
        _compiled.update(new)
        for _, dtype in new:
            tiny = directions.tiny_weights(family, dtype)
            Moments(0, Adam(window=1)).apply(tiny, [Step(0, (0.0,), rates=(0.0,))])
        from justforward.noise import llvm

        llvm.release_compiler()
