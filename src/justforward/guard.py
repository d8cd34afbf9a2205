"""Whether a run has gone astray, from its scalars alone, and where to go back to. No torch in here.

A step's loss is that of a few rows, so it is judged by means over windows of steps: when the last window is above the
best one by more than both can err, the weights have been carried off, by a rate that is too large or by a run of bad
luck. The log rewinds for nothing to the end of the best window; from there the rate is halved. The error allowed is wide,
since the best of many windows is a lucky one: of twenty runs of 10,000 steps that have come to rest none is rewound
(`tests/test_guard.py`). A validation is over the same rows each time, so one of them can tell sooner: where its loss is above that
of the best step by more than chance makes of it, and the metric is not higher, the run goes back to that step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

WINDOW = 32  # steps
ERRORS = 6.0  # standard errors of the difference of two windows
MOST_REWINDS = 8
BACKOFF = 0.5
TURN = 0.25  # of the rate, after a validation: it has seen less of the way than a window has
WORSE = 0.02  # of the best step's validation loss
WORTH = 0.01  # of a loss: less is not worth waiting for
STILL = 4  # steps
STILL_PART = 2.0**-20  # of a loss: float32 rounds it by about so much
KEPT = (
    "rewind",
    "layers",
)  # lines that stay when steps are taken back: each says of forwards that its steps do not count


@dataclass(frozen=True)
class Astray:
    """Where to go back to.

    Attributes:
        step: so many steps are kept.
        best: mean loss of the window that ends there.
        last: mean loss of the last window.
    """

    step: int
    best: float
    last: float


class Guard:
    """Watches the losses of a run's steps, in order.

    Args:
        losses: of the steps that there are already.
    """

    def __init__(self, losses: Iterable[float] = ()) -> None:
        self._losses: list[float] = []
        self._means: list[float] = []  # of windows, by their first step
        self._variances: list[float] = []
        self._spread = 0.0  # sum of the variances of the windows that do not overlap the last one
        self._best = 0  # the best of those
        for loss in losses:
            self.add(loss)

    def add(self, loss: float) -> Astray | None:
        """The loss of a further step; where to go back to, if the run has gone astray."""
        self._losses.append(loss)
        if len(self._losses) < WINDOW:
            return None
        part = self._losses[-WINDOW:]
        mean = math.fsum(part) / WINDOW
        self._means.append(mean)
        self._variances.append(math.fsum((x - mean) ** 2 for x in part) / (WINDOW - 1))
        apart = len(self._means) - WINDOW  # windows that do not overlap the last one
        if apart < 1:
            return None
        self._spread += self._variances[apart - 1]
        if self._means[apart - 1] < self._means[self._best]:
            self._best = apart - 1
        error = math.sqrt(2.0 * self._spread / apart / WINDOW)
        best = self._means[self._best]
        return (
            Astray(self._best + WINDOW, best, mean) if mean - best > ERRORS * error > 0.0 else None
        )

    def best(self) -> int:
        """After how many steps the best window of all ends; 0 before there is one."""
        return self._means.index(min(self._means)) + WINDOW if self._means else 0


class Stillness:
    """Whether the looks of a run see nothing: told once, from its first steps.

    A metric does not change where no answer does, and a loss not by more than float32 rounds it.
    """

    def __init__(self) -> None:
        self._steps = 0

    def add(self, grads: Sequence[float], loss: float, eps: float) -> str | None:
        """A further step; what to say of it.

        Args:
            grads: its projected gradients.
            loss: its mean loss.
            eps: how far it looked.
        """
        if self._steps >= STILL:
            return None
        rise = eps * math.sqrt(math.fsum(grad * grad for grad in grads) / max(len(grads), 1))
        # one step that sees something is enough: from then on nothing is said
        self._steps = STILL if rise > STILL_PART * abs(loss) else self._steps + 1
        if self._steps < STILL or rise > STILL_PART * abs(loss):
            return None
        return (
            f"note: the looks of the first {STILL} steps have changed nothing (by {rise:.1e}, of {loss:.4g}): nothing can be "
            f"learned from them: give a longer --eps than {eps:g}, or more rows to --batch-size"
        )


# ----------------------------------------------------------------------- what a run's lines say of it


def rewinds(metrics: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of a run's rewinds, in order."""
    return [metric for metric in metrics if metric["kind"] == "rewind"]


def rate_factor(metrics: Sequence[dict[str, Any]]) -> float:
    """What the learning rate is times, after a run's rewinds and for the layers that move."""
    astray = [line for line in rewinds(metrics) if not line.get("flat")]
    times = math.prod(TURN if turned(line) else BACKOFF for line in astray)
    return times * math.prod(float(line["rate"]) for line in metrics if line["kind"] == "layers")


def turned(rewind: dict[str, Any]) -> int:
    """How many validations a rewind took back since the last of them was worse; 0 where step losses were its reason."""
    return int(rewind.get("validations", 0))


def lost_forwards(metrics: Sequence[dict[str, Any]], step: int | None = None) -> int:
    """Forwards that a run's steps do not count: of those that it has taken back, and of looks that chose layers; all, or
    those before it took step `step` as it stands.
    """
    lines = [metric for metric in metrics if metric["kind"] in KEPT]
    if step is not None:
        after = [i for i, line in enumerate(lines) if line["step"] < step]
        lines = lines[: after[-1] + 1] if after else []
    return sum(int(line["lost"]) for line in lines)


def is_worse(last: tuple[float, float], best: tuple[float, float]) -> bool:
    """Whether a validation (value, loss) says that the steps since the best one did harm."""
    return last[0] <= best[0] and last[1] - best[1] > WORSE * abs(best[1])


def is_flat(validations: Sequence[tuple[float, float]], patience: int) -> bool:
    """Whether none of the last `patience` validations (value, loss) is better than the best before them.

    Better is a higher value, or the same and a loss that is lower by `WORTH` of it.
    """
    if len(validations) <= patience:
        return False
    ranked = [(-value, loss) for value, loss in validations]
    value, loss = min(ranked[:-patience])
    return min(ranked[-patience:]) >= (value, loss - WORTH * abs(loss))
