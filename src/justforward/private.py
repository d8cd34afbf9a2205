"""Differential privacy of the steps, in weight space: rows drawn in secret, each row's part bounded, noise on the sum.

A step asks one question of the rows: along n directions that everybody may know, how much does the loss grow? So the
answer is n numbers, whatever the model's size (DPZero, arXiv 2310.09639; DP-ZO, arXiv 2401.04343):

    rows      each of the N training rows takes part with probability q = batch_size / N, by itself: a Poisson sample,
              drawn from the system's entropy. It may be empty: then the answer is noise alone.
    bound     the vector of a row's projected gradients is clipped to length C, or, without C, scaled to length 1
              (automatic clipping, arXiv 2206.07136); a row with a loss that is not finite counts as 0
    noise     one Gaussian of standard deviation noise_multiplier x C on each of the n sums over rows
    answer    the noisy sums over batch_size, the expected number of rows

All of it is done in whole numbers, of C / 2^20 each: bounds and sums are exact, and noise is a Gaussian rounded to a
whole number, which has the privacy of the Gaussian (rounding is post-processing) and none of the holes that one in
floating point has (Mironov 2012, "On significance of the least significant bits for differential privacy").

Everything that follows from answers costs nothing more. What they cost is counted in `accounting`.

Processes of one owner that look at a part of the rows each (`Workers`) send each other what they saw of each row, and make the
answer of all of it. Rows and noise are drawn in one of them, which tells the others: so there is one sample and one noise a
step, however many processes there are, and none that could be drawn again.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from decimal import Context
from typing import Any

import numpy as np
from torch import Tensor

from justforward.errors import UserError
from justforward.estimators import AHEAD, Seen, Site, describe, look_weights
from justforward.recipe import Recipe
from justforward.sights import Sight, put_together, rises_by_row
from justforward.trajectory import Step
from justforward.variants import LEAST_NOISE, MOST_NOISE, forwards_of

GRID = 1 << 20  # steps of the answer's grid that C is long
# A little less than all of it: what floating point makes too long in the last bit stays within.
_FULL = GRID * (1.0 - 2.0**-40)
# 50 decimal digits from 192 random bits: what comes out differs from a rounded Gaussian less than 2^-100 shows.
_EXACT, _BITS = Context(prec=50), 192


class Private:
    """The private way for a `MeZO` to look at rows: `MeZO(..., private=Private(...))`.

    Every step is `opt.step(loss_fn, batch)` for the rows that `draw` gave before it, all of them and no others, with one
    loss a row [rows]; the loss of a row must depend on no other row. Where `draw` gave none, loss_fn is not called. What
    `step` returns is NaN: a mean of losses would not be private.

    Args:
        rows: N, how many rows there are to train on. It counts as public.
        batch_size: how many of them a step has on average.
        noise_multiplier: standard deviation of the noise, in units of what one row can change. `noise_for` finds it.
        clip: C, the length that a row's projected gradients are clipped to. None: they are scaled to length 1, which
            needs to know nothing of the rows, but is a vote: bad where few pull hard one way and many a little the other
            (docs/privacy.md says how to choose C).

    Attributes:
        answers: how many noisy answers were given, of steps that were applied or not, also before a resume.

    Raises:
        UserError: an argument is out of range.
    """

    def __init__(
        self, rows: int, batch_size: int, noise_multiplier: float, clip: float | None = None
    ) -> None:
        for name, number, most in (("rows", rows, 2**40), ("batch_size", batch_size, rows)):
            if not isinstance(number, int) or not 1 <= number <= most:
                raise UserError(
                    f"private: {name} is {number!r}: it must be a whole number, 1 to {most}"
                )
        real = isinstance(noise_multiplier, int | float)
        if not real or not LEAST_NOISE <= noise_multiplier <= MOST_NOISE:
            raise UserError(
                f"private: noise_multiplier is {noise_multiplier!r}: it must be {LEAST_NOISE} to {MOST_NOISE:g}; "
                "less protects nobody"
            )
        if clip is not None and not (isinstance(clip, int | float) and 1e-30 <= clip <= 1e30):
            raise UserError(f"private: clip is {clip!r}: it must be positive, 1e-30 to 1e30")
        self.rows, self.batch_size = rows, batch_size
        self.noise_multiplier, self.clip = float(noise_multiplier), clip
        self.answers = 0
        self._drawn: int | None = None  # rows that wait to be looked at
        self._decided: Callable[[Callable[[], Any]], Any] | None = None  # by the first of several

    @property
    def alone(self) -> bool:
        """Whether all rows are looked at in this process."""
        return self._decided is None

    def join(self, decided: Callable[[Callable[[], Any]], Any]) -> None:
        """Look at a part of the rows from now on, in one of several processes that have the same rows and the same owner.

        Args:
            decided: gives all processes what its argument comes to in one of them; it is not called in the others.

        Raises:
            UserError: rows wait, which this process has drawn by itself.
        """
        if self._drawn is not None:
            raise UserError(
                f"private: the {self._drawn} rows drawn last are this process's own: draw when the processes are together"
            )
        self._decided = decided

    @property
    def rate(self) -> float:
        """Probability of a row to take part in a step."""
        return self.batch_size / self.rows

    def settings(self) -> dict[str, Any]:
        """What the log says of it: all that is needed to count what the answers cost."""
        names = ("rows", "batch_size", "noise_multiplier", "clip")
        return {name: getattr(self, name) for name in names}

    def check(self, estimator: str, looks: str, modified: object) -> None:
        """Refuse estimates that would say more of the rows than their noisy answers.

        Raises:
            UserError: naming what would be said.
        """
        if estimator != "weight":
            raise UserError(
                f"private: estimator is {estimator!r}: each row has directions of its own there, so the log would show which "
                "rows took part, and noise would be needed on each of them: use estimator='weight'"
            )
        if looks == "one-point":
            raise UserError(
                "private: looks is 'one-point': a loss is kept for the next step, and it is no private one: use "
                "'two-sided' or 'one-sided'"
            )
        if modified is not None:
            raise UserError(
                "private: modified measures layers by the rows' losses, which no noise hides: leave it out"
            )

    def draw(self) -> list[int]:
        """Which rows the next step looks at: each with probability `rate`, from the system's entropy.

        Raises:
            UserError: the rows drawn last were not looked at. Drawing until one likes the rows is no Poisson sampling.
        """
        if self._drawn is not None:
            raise UserError(
                f"private: the {self._drawn} rows drawn last were not looked at: step with them, whatever they are"
            )
        rows: list[int] = self._in_one(self._sample)
        self._drawn = len(rows)
        return rows

    def _sample(self) -> list[int]:
        taken = np.arange(self.rows)
        if self.batch_size < self.rows:
            words = np.frombuffer(os.urandom(8 * self.rows), "<u8")
            taken = np.flatnonzero(words < np.uint64((self.batch_size << 64) // self.rows))
        rows: list[int] = taken.tolist()
        return rows

    def _in_one(self, drawn: Callable[[], Any]) -> Any:
        """What is drawn, in one of the processes, for all of them."""
        return drawn() if self._decided is None else self._decided(drawn)

    def waiting(self) -> int:
        """How many rows were drawn for the look that is next.

        Raises:
            UserError: none were drawn.
        """
        if self._drawn is None:
            raise UserError(
                "private: no rows were drawn for this look: each needs its own, rows = private.draw()"
            )
        return self._drawn

    def look(self, site: Site, closure: Any, batch: Any, samples: int, stay: bool) -> Seen:
        """As `estimators.look_weights`; what comes of it are the noisy answers alone.

        Raises:
            UserError: rows were not drawn, or the closure returns other than one loss for each of them; whatever the
                closure raises. Weights are home, nothing was answered, and the rows wait.
        """
        seen, rises = _unmarked(site, closure, batch, samples, self.waiting(), stay)
        return replace(
            seen, losses={AHEAD: [math.nan]}, rises=self._answer(rises, samples, site.eps)
        )

    def see(
        self, site: Site, closure: Any, batch: Any, samples: Sequence[int], rows: Sequence[int]
    ) -> Sight:
        """As `sights.see_weights`: what one of several processes sees of its rows. It has no noise: it is for the others alone.

        Rises that are not finite are in it as they are. Raises as `look`.
        """
        here = replace(site, seed_of=lambda lane: site.seed_of(samples[lane]))
        seen, rises = _unmarked(here, closure, batch, len(samples), len(rows), stay=False)
        found = tuple(map(tuple, rises))
        return Sight(site.step, tuple(samples), tuple(rows), found, 0.0, seen.forwards)

    def combined(self, sights: Iterable[Sight], recipe: Recipe, samples: int, looks: str) -> Step:
        """The step that all processes' sights come to, with one noise: the one that a process takes which sees all rows.

        Raises:
            UserError: rows were not drawn; a sight is of another step, or of rows that were not drawn.
        """
        rows = range(self.waiting())
        rises: list[list[float]] = [[] for _ in range(samples)]
        if rows:
            view = put_together(sights, recipe.index, samples, len(rows)).rises
            rises = [[view[sample][row] for row in rows] for sample in range(samples)]
        eps = [each * reach for each, (reach, _) in zip(recipe.eps, recipe.shape, strict=True)]
        step = recipe.step(self._answer(rises, samples, eps))
        return replace(step, loss=math.nan, forwards=forwards_of(looks, samples))

    def _answer(
        self, rises: Sequence[Sequence[float]], samples: int, lengths: Sequence[float]
    ) -> list[float]:
        """Noisy rises along each direction, from those of each row; the rows that were drawn have been looked at."""
        eps = max(lengths)
        grads = zip(*([rise / eps for rise in row] for row in rises), strict=True)
        sums = bounded_sum(grads, samples, self.clip)
        self._drawn = None
        self.answers += 1
        return [answer * eps for answer in self._noisy(sums)]

    def _noisy(self, sums: Sequence[int]) -> list[float]:
        deviation = self.noise_multiplier * GRID
        unit = (1.0 if self.clip is None else self.clip) / GRID / self.batch_size
        noisy = self._in_one(lambda: [total + whole_gaussian(deviation) for total in sums])
        return [total * unit for total in noisy]


def count_answers(private: Private | None, given: int) -> None:
    """Let it know of answers that were given before."""
    if private is not None:
        private.answers = max(private.answers, given)


def bounded_sum(grads: Iterable[Sequence[float]], samples: int, clip: float | None) -> list[int]:
    """The sum of all rows' bounded vectors, in steps of clip / 2^20 (1 / 2^20 where they are scaled): exact.

    Any one row changes it by a vector of at most 2^20 in length, whatever its projected gradients are.

    Args:
        grads: of each row its projected gradients, one a sample, in any numbers at all.
        samples: how many each has.
        clip: as `Private` has it.
    """
    total = [0] * samples
    for row in grads:
        for i, part in enumerate(_bounded(row, clip)):
            total[i] += part
    return total


def _bounded(row: Sequence[float], clip: float | None) -> list[int]:
    largest = max(map(abs, row))
    if not all(map(math.isfinite, row)) or largest == 0.0:
        return [0] * len(row)
    parts = [value / largest for value in row]  # first, so that nothing overflows
    length = math.hypot(*parts)
    size = 1.0 if clip is None else min(1.0, largest / clip * length)
    return [int(part / length * size * _FULL) for part in parts]


def whole_gaussian(deviation: float) -> int:
    """A Gaussian of mean 0, rounded to a whole number, from the system's entropy (Marsaglia's polar method)."""
    while True:
        x, y = (_EXACT.divide(_EXACT.create_decimal(_odd()), 1 << _BITS) for _ in range(2))
        square = _EXACT.add(_EXACT.multiply(x, x), _EXACT.multiply(y, y))
        if square < 1:
            break
    radius = _EXACT.sqrt(_EXACT.divide(_EXACT.multiply(-2, _EXACT.ln(square)), square))
    value = _EXACT.multiply(_EXACT.multiply(x, radius), _EXACT.create_decimal_from_float(deviation))
    return int(_EXACT.to_integral_value(value))


def _odd() -> int:
    """Evenly in (-2^_BITS, 2^_BITS), and never 0."""
    return 2 * secrets.randbits(_BITS) + 1 - (1 << _BITS)


def _unmarked(
    site: Site, closure: Any, batch: Any, samples: int, rows: int, stay: bool
) -> tuple[Seen, list[list[float]]]:
    """Looks of which nothing but rises is kept: of each sample and row, in float32, as processes send them to each other."""
    kept: list[list[float]] = []

    def hidden(*arguments: Any) -> float:
        kept.append(_row_losses(closure(*arguments), rows) if rows else [])
        return 0.0

    seen = look_weights(site, hidden, batch, samples, stay)
    with np.errstate(over="ignore"):  # counts as 0, like what is infinite
        rises = np.array(rises_by_row(site.kind, kept, samples), np.float32)
    return seen, rises.tolist()


def _row_losses(losses: Any, count: int) -> list[float]:
    if not isinstance(losses, Tensor) or losses.shape != (count,):
        raise UserError(
            f"private: the closure returned {describe(losses)}: it must return one loss for each of the {count} rows that "
            "were drawn"
        )
    return [float(x) for x in losses.detach().double().tolist()]
