"""Steps of the log to moves of the weights, for rules whose coefficients are moves."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from justforward import noise
from justforward.directions import Weights
from justforward.errors import UserError
from justforward.moves import Move
from justforward.trajectory import Step


def directions_of(step: Step, seed: int) -> list[int]:
    """Seeds of a step's directions, in a run of this seed."""
    lanes = range(len(step.coefficients))
    return [noise.direction_seed(seed, step.index, lane) for lane in lanes]


@dataclass
class Course:
    """Turns steps into moves: knows the run's seed and momentum, remembers the window of past coefficients."""

    seed: int
    beta: float = 0.0
    window: int = 1
    past: deque[tuple[list[int], tuple[float, ...]]] = field(default_factory=deque)

    def move(self, step: Step) -> Move:
        """The move of a step; steps must come in order."""
        self._remember(step)
        seeds: list[int] = []
        values: list[float] = []
        # Oldest first: the newest direction is last, where `Weights.update` looks for the one to come back from.
        for age, (past_seeds, coefficients) in reversed(list(enumerate(self.past))):
            seeds.extend(past_seeds)
            values.extend(c * self.beta**age for c in coefficients)
        scales = np.array(step.scales, np.float32)[:, None]
        return Move(
            dither=noise.step_seed(self.seed, step.index),
            seeds=np.array(seeds, np.uint64),
            coefficients=np.array(values, np.float32)[None] * scales,
            decays=np.array(step.decays, np.float32),
        )

    def recall(self, steps: Sequence[Step]) -> None:
        """Remember steps that the weights have taken already, in order."""
        for step in steps[-self.window :]:
            self._remember(step)

    def _remember(self, step: Step) -> None:
        self.past.appendleft((directions_of(step, self.seed), step.coefficients))
        while len(self.past) > self.window:
            self.past.pop()

    def check(self, step: Step) -> None:
        """Raise UserError if the step is one of a rule with moments, whose coefficients are no moves."""
        if step.rates:
            raise UserError(
                f"step {step.index} has rates: it was estimated by a rule with moments, which this one has not"
            )

    def apply(
        self,
        weights: Weights,
        steps: Sequence[Step],
        back: Sequence[float] | None = None,
        draws: Sequence[tuple[Any, ...]] | None = None,
    ) -> None:
        """Move the weights by steps, in order; `back` and `draws` as for `Weights.update`."""
        # What was drawn are one step's own directions: momentum brings older ones.
        weights.update(
            [self.move(step) for step in steps], back, draws if self.window == 1 else None
        )

    def state(self) -> list[Any]:
        """All it remembers, for `restore`."""
        return list(self.past)

    def restore(self, state: Sequence[Any]) -> None:
        """Remember what another one's `state` gave."""
        self.past.clear()
        self.past.extend((list(seeds), tuple(coefficients)) for seeds, coefficients in state)
