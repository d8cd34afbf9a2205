"""What a step of a run looks at: its rows as a batch, and the function of the batch that is made less."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from justforward.data import batches
from justforward.evaluate import Scorer
from justforward.generate import Sampling
from justforward.objectives import Objective
from justforward.optim import MeZO
from justforward.schedules import probe_steps

if TYPE_CHECKING:
    from torch import Tensor

    from justforward.config import TrainConfig
    from justforward.data import Example
    from justforward.tasks import Task


def objective_of(config: TrainConfig, task: Task) -> Objective | None:
    """What is made better in place of the loss, if anything is.

    Raises:
        UserError: as `Objective`; in activation space one that is a number for all rows.
    """
    if config.objective == "loss":
        return None
    objective = Objective(config.objective, task, Sampling(config.temperature, config.seed))
    if config.estimator == "activation":
        objective.check_by_row()
    return objective


def feed(
    config: TrainConfig,
    opt: MeZO,
    scorer: Scorer,
    objective: Objective | None,
    train: Sequence[Example],
) -> tuple[Callable[..., Tensor], Any]:
    """The loss of each row as a function of a batch, and the batch of the next step."""
    if opt.private is not None:
        return _privately(scorer, [train[row] for row in opt.private.draw()])
    by_gradient = opt.modified is not None and opt.modified.by == "gradient"
    closure: Callable[..., Tensor] = scorer.loss_of if by_gradient else scorer.losses
    encode: Callable[[list[Example]], Any] = scorer.encode_training
    if objective is not None:
        encode = partial(objective.batch, scorer)
        closure = objective.closure(scorer, opt.steps)
    rows = batches(len(train), config.batch_size, config.seed, opt.steps + probe_steps(config))
    return closure, encode([train[row] for row in rows])


def _privately(scorer: Scorer, rows: list[Example]) -> tuple[Callable[..., Tensor], Any]:
    # Each row by itself: in company its length would pad others, and the last bits of their losses would tell.
    alone = [scorer.encode_training([row]) for row in rows]

    def losses(places: Tensor) -> Tensor:
        return torch.cat([scorer.losses(alone[place]) for place in places.tolist()])

    return losses, torch.arange(len(rows))
