"""What rounding and the bending of the loss make of a look, from looks of other lengths along the same directions. No torch in here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

Grads = Sequence[float]
NEARER = 1.0 / 4.0  # times as long are the looks that see how the loss is rounded


def errors(
    grads: Grads, farther: Grads, nearer: Grads, times: float, order: int
) -> tuple[float, float]:
    """What rounding and the bending of the loss make of what looks see, each as a part of it; 1 and 0 of looks that see nothing.

    A look x times as long is off by rounding / x and bend x^order, so that both are found from how far looks along the same
    directions differ. (Much shorter ones would not do: what is rounded to steps does not change at all there, and so agrees.)

    Args:
        grads: projected gradients along some directions.
        farther, nearer: along the same ones, seen by looks `times` and `NEARER` times as long.
        times: at least 1; with 1 nothing is known of the bending, and it counts as none.
        order: the error of looks without rounding grows with this power of their length.
    """
    size = rms(grads)
    if size == 0.0:
        return 1.0, 0.0
    near = rms([b - a for a, b in zip(grads, nearer, strict=True)]) ** 2
    far = rms([b - a for a, b in zip(grads, farther, strict=True)]) ** 2
    # near = r^2 near_r + b^2 near_b, and far likewise
    near_r, near_b = 1.0 + NEARER**-2, (1.0 - NEARER**order) ** 2
    far_r, far_b = 1.0 + times**-2, (times**order - 1.0) ** 2
    if times == 1.0:
        return math.sqrt(near / near_r) / size, 0.0
    both = near_r * far_b - near_b * far_r
    rounding = math.sqrt(max(0.0, near * far_b - far * near_b) / both)
    bend = math.sqrt(max(0.0, far * near_r - near * far_r) / both)
    return rounding / size, bend / size


def rms(values: Sequence[float]) -> float:
    """Root mean square."""
    return math.sqrt(math.fsum(value * value for value in values) / len(values))


def resolution(groups: Sequence[dict[str, Any]], look: Callable[[], Grads]) -> tuple[float, float]:
    """How much the loss changes between the signs of some looks, and how much of that its rounding makes alone.

    Args:
        groups: of parameters, whose `eps` says how far a look goes; it is as it was afterwards, whatever happens.
        look: gives the projected gradients along the same directions each time.
    """
    seen, lengths = [], [group["eps"] for group in groups]
    for part in (1.0, NEARER):
        try:
            for group, eps in zip(groups, lengths, strict=True):
                group["eps"] = eps * part
            seen.append(look())
        finally:
            for group, eps in zip(groups, lengths, strict=True):
                group["eps"] = eps
    here, near = seen
    # of looks that are no longer the order is not asked
    rounding, _ = errors(here, here, near, 1.0, 2)
    rise = rms(here) * float(lengths[0])
    return rise, rounding * rise
