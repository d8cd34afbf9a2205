"""The memory of a method at any batch and any length, and the largest of them that fit.

Of each storage in a step the size is c, c B, c L, c B L or c B L^2 in the batch B and the length L: linear in B, quadratic in L.
So rehearsals at two batches and three lengths give the step's allocations for all others exactly. Of tensors alone the
largest sum that is alive counts; on a CPU the heap is played through with those very allocations, because what it scatters
is no fixed share: requests beyond its threshold get pages of their own. What fits is searched for from above, from where even the
bytes alive do not fit, so that the answer does not depend on the batch that was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from justforward.alive import Event, Trace
from justforward.heap import taken
from justforward.machine import Device
from justforward.rehearse import Method, Stage

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_ROWS = 1 << 20
_UNKNOWN_CONTEXT = 1 << 20  # tokens, where a configuration bounds none


# The heap is not played through for fewer places than one in so many of what fits.
_FINE = 200


@dataclass(frozen=True)
class Account:
    """The memory of one method as a function of the batch, at the length asked for, and of the length, at the batch.

    Attributes:
        fixed: bytes of weights, of what is kept, and of the process.
        of_rows, of_length: the most bytes that a step has alive besides.
        taken_by_rows, taken_by_length: what it takes from the system for them, as much or more.
    """

    fixed: int
    of_rows: Callable[[int], int]
    of_length: Callable[[int], int]
    taken_by_rows: Callable[[int], int]
    taken_by_length: Callable[[int], int]

    def at_rows(self, rows: int) -> int:
        """Bytes with a batch of so many rows."""
        return self.fixed + self.taken_by_rows(rows)

    def at_length(self, length: int) -> int:
        """Bytes with rows of so many tokens."""
        return self.fixed + self.taken_by_length(length)

    def most_rows(self, memory: int) -> int:
        """A batch that fits, and one larger by a row, or by half a per cent, does not; 0 if none does."""
        return _most(self.of_rows, self.taken_by_rows, memory - self.fixed, MOST_ROWS)

    def longest(self, memory: int, context: int | None) -> int:
        """A length that fits and that the model has (None: any), likewise; 0 if none does."""
        room = memory - self.fixed
        return _most(self.of_length, self.taken_by_length, room, context or _UNKNOWN_CONTEXT)


def process_of(method: Method, device: Device) -> int:
    """What a process takes besides model and step."""
    overhead = device.overhead
    if method.way in ("weight", "activation"):
        return overhead.base + overhead.kernels
    return overhead.base + (overhead.drawn if method.tuner == "lora" else 0)


def account_of(
    stage: Stage, method: Method, rows: int, length: int, device: Device, limits: bool = True
) -> Account:
    """The memory of a method around a batch of so many rows and tokens.

    Args:
        stage: of the model.
        method: which.
        rows, length: where exactness is asked for.
        device: whose heap and process count.
        limits: without, the account is good for these rows and this length alone.

    Raises:
        UserError and others: as `Stage.run`.
    """
    here = stage.run(method, rows, length)
    fixed = here.weights + here.kept + process_of(method, device)
    heap = None
    if device.kind == "cpu":
        heap = partial(taken, threshold=device.overhead.threshold, graphed=method.first_order)

    def run(r: int, n: int) -> Trace:
        return stage.run(method, r, n).trace

    if not limits:
        alive, most = _curves(0, 1, [], lambda _: here.trace, {}, heap)
        return Account(fixed, alive, alive, most, most)
    # with one row some copies are not made, which are with more
    base = max(rows, 2)
    curve = [run(base, length), run(base + 1, length)]
    of_rows = _curves(base, 1, curve, lambda r: run(r, length), {rows: here.trace}, heap)
    step = max(length // 4, 1) if length >= 3 else -1
    curve = [here.trace, run(rows, length - step), run(rows, length - 2 * step)]
    of_length = _curves(length, -step, curve, lambda n: run(rows, n), {length: here.trace}, heap)
    return Account(fixed, of_rows[0], of_length[0], of_rows[1], of_length[1])


Curves = tuple[Callable[[int], int], Callable[[int], int]]


def _curves(
    start: int,
    step: int,
    traces: list[Trace],
    run: Callable[[int], Trace],
    known: dict[int, Trace],
    heap: Callable[[Iterable[Event]], int] | None,
) -> Curves:
    """x -> the most bytes alive, and x -> the most that are taken for them, by the traces at start, start + step, and so on.

    Where what happens there is not the same, `run` says it for each x. Without a `heap`, what is alive is taken.
    """
    order = [[number for number, _ in trace.events] for trace in traces]
    alike = bool(traces) and all(numbers == order[0] for numbers in order)
    sizes = (
        _differences([np.array([size for _, size in t.events]) for t in traces]) if alike else None
    )
    # many events are alike
    sums = np.unique(_differences([t.alive() for t in traces]), axis=0) if alike else None

    @cache
    def alive(x: int) -> int:
        if sums is None or x in known:
            return (known.get(x) or run(x)).peak
        return int(_at(sums, (x - start) / step).max())

    @cache
    def most(x: int) -> int:
        if heap is None:
            return alive(x)
        if sizes is None or x in known:
            return max(heap((known.get(x) or run(x)).events), alive(x))
        there = _at(sizes, (x - start) / step).tolist()
        return max(heap(zip(order[0], there, strict=True)), alive(x))

    return alive, most


def _differences(values: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """[events, n]: Newton's forward differences of values [events] at n places, in whole numbers."""
    found = []
    while values:
        found.append(values[0])
        values = [after - before for before, after in pairwise(values)]
    return np.stack(found, axis=1)


def _at(differences: NDArray[np.int64], t: float) -> NDArray[np.int64]:
    """[events]: the polynomials with these differences, t steps from where they start."""
    term, weights = 1.0, []
    for k in range(differences.shape[1]):
        weights.append(term)
        term *= (t - k) / (k + 1)
    found: NDArray[np.int64] = np.rint(differences @ np.array(weights)).astype(np.int64)
    return found


def _most(alive: Callable[[int], int], used: Callable[[int], int], room: int, most: int) -> int:
    """A place up to `most` where no more than `room` is used, and a little further more is; 0 if it is everywhere."""
    # what is taken is at least what is alive: nothing beyond this fits, whatever batch was asked for
    low, high = 0, 1 + _largest(lambda x: alive(x) <= room, most)
    middle, guessed = high - 1, False
    while high - low > max(1, low // _FINE):
        here = used(middle)
        low, high = (middle, high) if here <= room else (low, middle)
        # next where it would fit if the heap scattered as much there as here; every other time in the middle
        allowed = room * alive(middle) // max(here, 1)
        middle, guessed = (low + high) // 2, not guessed
        if guessed:
            guess = _largest(partial(_within, alive, allowed), high)
            middle = min(max(guess, low + 1), high - 1)
    return low


def _within(alive: Callable[[int], int], allowed: int, x: int) -> bool:
    return alive(x) <= allowed


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest x from 1 to most that fits, of which all smaller ones do; 0 if 1 does not."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
