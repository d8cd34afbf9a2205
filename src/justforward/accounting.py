"""What private answers cost, by Google's dp-accounting: epsilon at a delta, and the noise that keeps to one. No torch in here.

The answers of `private` are Poisson-sampled Gaussian mechanisms of sensitivity 1 and standard deviation noise_multiplier,
composed; their privacy loss distribution is composed numerically, with every error on the safe side. Neighbours are two
sets of rows of the same number, one of whose rows is in the other an empty one that counts as 0.
"""

from __future__ import annotations

import math
from functools import lru_cache
from types import ModuleType
from typing import Any

from justforward.errors import UserError
from justforward.variants import LEAST_NOISE, MOST_NOISE

# Losses are rounded up to multiples of this; of epsilons in the hundreds a larger one, for time and memory. Where an answer's
# loss is small itself, it is a seventh of its standard deviation: of many answers the rounding would be more than the rest.
_INTERVAL, _LEAST_INTERVAL, _WIDE = 1e-3, 2e-5, 200.0
_TOLERANCE = 1e-3
MOST_DELTA = 1e-5


def library() -> ModuleType:
    """dp-accounting.

    Raises:
        UserError: it is not installed.
    """
    try:
        import dp_accounting
    except ImportError as error:
        raise UserError(
            f"privacy is counted by dp-accounting, which cannot be imported ({error}): pip install 'justforward[private]'"
        ) from error
    module: ModuleType = dp_accounting
    return module


def delta_for(rows: int, given: float | None, name: str) -> float:
    """The delta of a run with so many training rows: as given under this name, or 1e-5, or a tenth of 1 / rows if that is less.

    Raises:
        UserError: it is no protection.
    """
    delta = min(MOST_DELTA, 0.1 / rows) if given is None else given
    if delta * rows >= 1.0:
        raise UserError(
            f"{name} is {delta:g}, and there are {rows} training rows: with 1 / rows or more one of them could be "
            f"published as it is: choose less than {1.0 / rows:.2g}"
        )
    return delta


@lru_cache(maxsize=256)
def epsilon_of(*, noise_multiplier: float, rate: float, answers: int, delta: float) -> float:
    """Epsilon at `delta` of so many answers: an upper bound, tight to about a hundredth, from 0.02 on to a fiftieth part.

    Args:
        noise_multiplier: as `Private` has it.
        rate: probability of a row to take part in an answer, in (0, 1].
        answers: how many.
        delta: in (0, 1).

    Raises:
        UserError: an argument is out of range, or dp-accounting is not installed.
    """
    _check(noise_multiplier, rate, answers, delta)
    if answers == 0:
        return 0.0
    library()
    from dp_accounting.pld.pld_privacy_accountant import PLDAccountant

    return float(_accountant(PLDAccountant, noise_multiplier, rate, answers).get_epsilon(delta))


def noise_for(*, epsilon: float, delta: float, rate: float, answers: int) -> float:
    """The least noise multiplier (within a thousandth) whose answers cost no more than `epsilon` at `delta`.

    Args:
        epsilon: positive.
        delta, rate, answers: as `epsilon_of` has them; at least one answer.

    Raises:
        UserError: as `epsilon_of`; or no noise is enough.
    """
    if not 0.0 < epsilon < math.inf or answers < 1:
        raise UserError(
            f"privacy: epsilon is {epsilon!r}, for {answers!r} answers: both must be positive and finite"
        )

    def spent(noise: float) -> float:
        return epsilon_of(noise_multiplier=noise, rate=rate, answers=answers, delta=delta)

    high = 1.0
    while spent(high) > epsilon:
        high *= 2.0
        if high > MOST_NOISE:
            raise UserError(
                f"privacy: epsilon {epsilon:g} at delta {delta:g} in {answers} answers cannot be kept by any noise: "
                "raise epsilon or delta"
            )
    low = high / 2.0
    while spent(low) <= epsilon:  # never far below what is looked for: that would be slow
        if low == LEAST_NOISE:
            return low
        high, low = low, max(LEAST_NOISE, low / 2.0)
    while high - low > _TOLERANCE * high:
        middle = (low + high) / 2.0
        low, high = (middle, high) if spent(middle) > epsilon else (low, middle)
    return high


def _accountant(kind: Any, noise: float, rate: float, answers: int) -> Any:
    dp = library()
    # Renyi's divergence of order 2: about as large as epsilon, and in closed form.
    inverse = 1.0 / noise**2
    one = math.log1p(rate**2 * math.expm1(min(inverse, 500.0)))
    fine = max(_LEAST_INTERVAL, min(_INTERVAL, math.sqrt(2.0 * one) / 7.0))
    interval = fine * max(1.0, answers * one / _WIDE)
    sampled = dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(noise))
    return kind(dp.NeighboringRelation.REPLACE_SPECIAL, interval).compose(
        dp.SelfComposedDpEvent(sampled, answers)
    )


def _check(noise: float, rate: float, answers: int, delta: float) -> None:
    for name, value, good, allowed in (
        (
            "noise_multiplier",
            noise,
            LEAST_NOISE <= noise <= MOST_NOISE,
            f"{LEAST_NOISE} to {MOST_NOISE:g}",
        ),
        ("rate", rate, 0.0 < rate <= 1.0, "above 0 and at most 1"),
        ("answers", answers, isinstance(answers, int) and answers >= 0, "a whole number from 0"),
        ("delta", delta, 0.0 < delta < 1.0, "between 0 and 1"),
    ):
        if not good:
            raise UserError(f"privacy: {name} is {value!r}: it must be {allowed}")
