"""Which layers move, where that is left to the data (`--layers auto`): a third of them at a time.

Before the first step each third is looked along by itself, a few steps' directions with their rows. That third moves which
sees the most of the loss for what its steps cost: its projected gradients, by the layers that have to run, its own and those above
(what is below runs once a text). When validation has been flat, where a run with other settings would stop, it goes back to
its best step, looks again along that third and those that have not moved yet, and goes on with one of these. Its rate is changed
so that a step means to change the loss by as much as before. When the last one is flat, too, the run ends.

Each choice is a line of metrics.jsonl. The log says of each step which weights it moved, so replay needs none of this.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from justforward import rules
from justforward.errors import UserError
from justforward.feed import feed
from justforward.gauge import looked, rate
from justforward.looks import rms
from justforward.trunk import stack_of
from justforward.variants import Blocks, forwards_of

if TYPE_CHECKING:
    from justforward.config import TrainConfig
    from justforward.data import Example
    from justforward.evaluate import Scorer
    from justforward.folder import Metric
    from justforward.optim import MeZO

PARTS = 3
LOOKS = 2  # steps whose directions are looked along, for each part


@dataclass(frozen=True)
class Part:
    """Some layers, one after the other.

    Attributes:
        pattern: a regular expression that finds the names of their parameters and of no others that move; of the last layers
            "", which finds all that those before it have left.
        first, last: their numbers.
        share: of all layers, those that a step runs: these and the ones above.
    """

    pattern: str
    first: int
    last: int
    share: float

    def __str__(self) -> str:
        return f"layers {self.first} to {self.last}"


@dataclass(frozen=True)
class Choice:
    """What looks have come to.

    Attributes:
        part: its number.
        rate: what the learning rate is times, for this part.
        spreads: root mean square of the projected gradients of each part that was looked along, by its number as text
            (JSON has no other keys).
    """

    part: int
    rate: float
    spreads: dict[str, float]


def parts_of(model: nn.Module, count: int = PARTS) -> list[Part]:
    """A model's layers in so many parts, from the lowest up; those without anything to tune are left out.

    Raises:
        UserError: there are not two.
    """
    layers = stack_of(model)
    assert layers is not None  # or `rest_below` would have said so
    path = next(name for name, module in model.named_modules() if module is layers)
    count = min(count, len(layers))
    edges = [round(i * len(layers) / count) for i in range(count + 1)]
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    found: list[Part] = []
    for first, end in itertools.pairwise(edges):
        numbers = "|".join(map(str, range(first, end)))
        pattern = rf"^{re.escape(path)}\.(?:{numbers})\."
        if any(re.search(pattern, name) for name in names):
            share = (len(layers) - first) / len(layers)
            found.append(Part("" if end == len(layers) else pattern, first, end - 1, share))
    if len(found) < 2:
        where = f"in {found[0]}" if found else "outside of the layers"
        raise UserError(f"--layers is 'auto': all that is tuned is {where}: leave it out")
    return found


class Depth:
    """The parts of a run's model, and by the run's lines which of them moves.

    Args:
        model: what is tuned has `requires_grad`.

    Raises:
        UserError: as `parts_of`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parts = parts_of(model)
        # of which a caller says which moves
        self.blocks = Blocks([part.pattern for part in self.parts], order="given")

    def now(self, metrics: Sequence[Metric]) -> int | None:
        """The number of the part that moves; None before the first choice."""
        found = [int(m["part"]) for m in metrics if m["kind"] == "layers"]
        return found[-1] if found else None

    def left(self, metrics: Sequence[Metric]) -> list[int]:
        """Numbers of the parts that have not moved yet."""
        moved = {m["part"] for m in metrics if m["kind"] == "layers"}
        return [number for number in range(len(self.parts)) if number not in moved]

    def asked(self, metrics: Sequence[Metric]) -> list[int]:
        """Numbers of the parts that the next choice looks along: what moves, and what has not yet."""
        now = self.now(metrics)
        return self.left(metrics) if now is None else [now, *self.left(metrics)]

    def cost(self, config: TrainConfig, metrics: Sequence[Metric], first: bool = False) -> int:
        """Forwards of these looks; with `first` only of those before the first step, if they are still to come."""
        if first and self.now(metrics) is not None:
            return 0
        return LOOKS * len(self.asked(metrics)) * forwards_of(config.looks, config.num_samples)

    @contextmanager
    def resting(self, model: nn.Module, metrics: Sequence[Metric]) -> Iterator[None]:
        """While inside, what is not of the part that moves (the last one, before the first choice) counts as frozen."""
        now = self.now(metrics)
        part = self.parts[-1 if now is None else now]
        tuned = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        rests = [p for name, p in tuned if self._of(name) != part]
        for parameter in rests:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in rests:
                parameter.requires_grad_(True)

    def _of(self, name: str) -> Part:
        return next(part for part in self.parts if re.search(part.pattern, name))

    def choose(
        self,
        config: TrainConfig,
        opt: MeZO,
        scorer: Scorer,
        train: Sequence[Example],
        metrics: Sequence[Metric],
    ) -> Choice:
        """Look along the part that moves and those that have not yet, and choose one of these.

        Args:
            config: resolved.
            opt: the run's, made with `blocks`; as it was afterwards.
            scorer, train: as `feed` has them. What is looked at is the loss, whatever the objective.
            metrics: the run's lines.

        Raises:
            As `MeZO.estimate`.
        """
        block, count = opt.block, 1
        length = min(group["eps"] for group in opt.param_groups)
        spreads: dict[str, float] = {}
        asked = self.asked(metrics)
        try:
            for number in asked:
                opt.block = self.parts[number].pattern
                grads: list[float] = []
                for step in range(opt.steps, opt.steps + LOOKS):
                    seen = looked(opt, length, step, lambda: feed(config, opt, scorer, None, train))
                    count = len(seen)
                    grads += seen
                spreads[str(number)] = rms(grads)
        finally:
            opt.block = block
        part, now = self.chosen(spreads, metrics), self.now(metrics)
        rule = rules.parse(config.rule)
        before = None if now is None else rate(spreads[str(now)], count, rule)
        after = rate(spreads[str(part)], count, rule)
        return Choice(part, 1.0 if before is None or after is None else after / before, spreads)

    def chosen(self, spreads: dict[str, float], metrics: Sequence[Metric]) -> int:
        """Of the parts that have not moved the one that sees the most for what its steps cost; of equals the upper one."""
        return max(self.left(metrics), key=lambda n: (spreads[str(n)] / self.parts[n].share, n))

    def spelled(self, choice: Choice) -> str:
        """A choice in words."""
        seen = [f"of {self.parts[int(n)]} {spread:.3g}" for n, spread in choice.spreads.items()]
        rate = "" if choice.rate == 1.0 else f", at {choice.rate:.2g} of the learning rate"
        return f"{self.parts[choice.part]} move from here on{rate}: projected gradients are about {', '.join(seen)}"
