"""The rate and the length of looks that a run starts with, found by looks at its own model and rows before the first step.

A step moves the weights by sum_k c_k z_k, and a rule that normalises makes c_k = -lr g_k / (sqrt(K) m) of its K projected
gradients g_k, m being their root mean square. To second order the loss is changed least where

    lr = sqrt(K) S / (m tr H),   S = |G|^2 the signal, tr H the trace of the Hessian

and along the way that training goes tr H is near the trace of the Fisher matrix, which for a direction of each example's own
is m^2, but for a factor (1.5 to 12 was measured): the model that is unsure of an answer is the one whose answer moves. What is left
of lr m / sqrt(K) is S / m^2, a pure number, which falls as training goes. So the rate is `SHARE` sqrt(K) / m: however weights are
scaled, whatever is tuned, a first step means to change the loss by so much. Where looks see nothing it is the usual one.
(docs/race.md: where this comes to, beside rates that were searched.)

Looks stay as long as they usually are where neither rounding nor the bending of the loss is more than `ENOUGH` of what they see;
else they are so long that both together are least.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from justforward import rules
from justforward.feed import feed
from justforward.looks import NEARER, Grads, errors, rms
from justforward.schedules import gauge_forwards
from justforward.settings import LOSS_EPS, RATES, longest_look, usual_eps

if TYPE_CHECKING:
    from justforward.config import TrainConfig
    from justforward.data import Example
    from justforward.evaluate import Scorer
    from justforward.objectives import Objective
    from justforward.optim import MeZO

SHARE = 0.014  # nats
ENOUGH = 1.0 / 16.0
FARTHER = 4.0  # times as long are the looks that see how the loss bends
MOVED = 1.0 / 8.0  # of a step's looks see an answer change


@dataclass(frozen=True)
class Found:
    """What looks have come to.

    Attributes:
        lr, eps: to start with: those that were given, where they were.
        why: what was seen, in words.
    """

    lr: float
    eps: float
    why: str


def gauge(
    config: TrainConfig,
    opt: MeZO,
    scorer: Scorer,
    objective: Objective | None,
    train: Sequence[Example],
) -> Found:
    """Look at the rows of the first steps, along their directions.

    Args:
        config: resolved; where `lr` or `eps` is given it stays.
        opt: the run's, before its first step; as it was afterwards.
        scorer, objective, train: as `feed` has them. The rate is that of the loss, whatever the objective.

    Raises:
        As `MeZO.estimate`.
    """

    def look(eps: float, step: int, seen: Objective | None) -> Grads:
        return looked(opt, eps, step, lambda: feed(config, opt, scorer, seen, train))

    begun, most = config.eps or usual_eps(config), longest_look(config)
    longer = min(FARTHER, most / begun)
    here, far = look(begun, 0, objective), look(begun * longer, 0, objective)
    if objective is None:
        order = 2 if config.looks == "two-sided" else 1
        rounding, bend = errors(here, far, look(begun * NEARER, 0, None), longer, order)
        by = 1.0 if config.eps else stretch(rounding, bend, order, most / begun)
        eps, length = begun * by, begun * by
        seen = f"in a look of {eps:.2g} rounding makes {rounding / by:.2%} of what is seen, the bending of the loss {bend * by**order:.2%}"
    else:
        eps = begun if config.eps or moved(here) or not moved(far) else begun * longer
        seen = f"looks of {begun:.2g} change {changed(here):.0%} of what they look at, of {begun * longer:.2g} {changed(far):.0%}"
        length = LOSS_EPS
    size = rms([g for step in range(1, config.gauge + 1) for g in look(length, step, None)])
    lr = config.lr or rate(size, len(here), rules.parse(config.rule)) or RATES[config.tuner]
    return Found(lr, eps, f"projected gradients of the loss are about {size:.3g}; {seen}")


def settled(config: TrainConfig, found: Found, lr: float, eps: float) -> tuple[TrainConfig, str]:
    """A run's configuration with what was found, as all processes have agreed, and a sentence on it."""
    said = f"{found.why}: lr {lr:.2g}, eps {eps:.2g}, after {gauge_forwards(config)} forwards"
    return replace(config, lr=lr, eps=eps), said


def rate(size: float, count: int, rule: rules.Chain) -> float | None:
    """The learning rate for projected gradients of this size, `count` of them a step; None where nothing was seen."""
    if size == 0.0:
        return None
    normal = rule.moments is not None or any(
        isinstance(part, (rules.Rms, rules.Sign, rules.Spread)) for part in rule.rules
    )
    lr = SHARE * math.sqrt(count) / size
    return lr if normal else lr * math.sqrt(count) / size


def stretch(rounding: float, bend: float, order: int, most: float) -> float:
    """How many times as long looks should be.

    With looks x times as long the error is rounding / x and bend x^order: together least where x^(2 order + 2) =
    (rounding / bend)^2 / order. But looks that are good enough stay as they are.

    Args:
        rounding, bend, order: as `errors` has them.
        most: the answer is at most this.
    """
    if math.hypot(rounding, bend) <= ENOUGH:
        return 1.0
    least = 2.0**-20  # of what a look sees, rounding makes that at least
    bend = max(bend, least)
    best: float = ((max(rounding, least) / bend) ** 2 / order) ** (1.0 / (2.0 * order + 2.0))
    return min(most, best)


def changed(grads: Grads) -> float:
    """Which part of the looks has seen a change."""
    return sum(1 for grad in grads if grad != 0.0) / len(grads)


def moved(grads: Grads) -> bool:
    """Whether enough of them have."""
    return changed(grads) >= MOVED


def set_eps(opt: MeZO, eps: float | None) -> None:
    """Let an optimizer look as far as this, which is no more than its weights' grids are laid for; None: as far as that."""
    for group in opt.param_groups if eps is not None else ():
        group["eps"] = eps


def looked(opt: MeZO, eps: float, step: int, made: Callable[[], tuple[Any, Any]]) -> Grads:
    """The projected gradients of a step that is not taken.

    Args:
        opt: as it was afterwards.
        eps: how far it looks.
        step: its index.
        made: gives the closure and the batch of the step that `opt` is at.
    """
    taken, lengths = opt.steps, [group["eps"] for group in opt.param_groups]
    try:
        opt.steps = step
        set_eps(opt, eps)
        return opt.estimate(*made()).projected_grads
    finally:
        opt.steps = taken
        for group, length in zip(opt.param_groups, lengths, strict=True):
            group["eps"] = length
