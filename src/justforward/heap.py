"""How much of memory a sequence of allocations takes from the system: the heap of glibc, played through.

Memory that a process gives back to its heap is not always given back to the system, nor fit for what is asked for next:
steps of AdamW on SmolLM2-135M have 2.5 GB alive and take 3.2. What is played through is malloc's rule for large
requests (glibc's manual, "Tunable Parameters"; malloc/malloc.c):

- at or above a threshold a request gets pages of its own, which go back to the system when it is freed. The threshold
  starts at 128 KiB and rises to the largest such request that was freed, up to 32 MiB: before the first step by what imports and
  the tokenizer have freed, to 2 MB without and to 4 or 8 with one of 49,152 tokens (`machine` measures it);
- below it, the smallest free piece that is large enough is taken and the rest of it stays free, or the heap grows at its end;
- what is freed is joined with free neighbours; a free end of more than twice the threshold goes back to the system.

torch asks for addresses that 64 divides: malloc then looks for a piece that is larger by two such gaps, and frees what is left of
them. Where gradients are asked for, some of these gaps are then taken by small pieces of their graph, which stay in it or in malloc's
caches, so that pieces do not join again across them: how many follows from nothing that is known here. One in `LOST` is what
seven measurements of two models say (`docs/fits.md`).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

FIRST_THRESHOLD, LAST_THRESHOLD = 128 << 10, 32 << 20
LOST = 20
_PAGE, _ALIGNED = 4096, 64


class Heap:
    """The heap of a process; sizes are bytes, pieces are known by what they are called.

    Args:
        threshold: from which size on a request gets pages of its own, at first.
        graphed: gradients are asked for: small pieces of their graph stay in some gaps.

    Attributes:
        peak: the most that was taken from the system at a time.
    """

    def __init__(self, threshold: int = FIRST_THRESHOLD, graphed: bool = True) -> None:
        self.peak = 0
        self._taken = 0  # requests from the heap
        self._own: dict[int, int] = {}  # pieces with pages of their own
        self._mapped = 0
        self._end = self._resident = (
            0  # of the heap: where it ends, and how far the system has given memory
        )
        self._threshold, self._graphed = threshold, graphed
        self._places: dict[int, tuple[int, int]] = {}  # pieces in the heap: start and size
        self._free: list[tuple[int, int]] = []  # size and start
        self._starts: dict[int, int] = {}  # of free pieces, to their sizes
        self._ends: dict[int, int] = {}  # to their starts

    def take(self, piece: int, size: int) -> None:
        """Allocate."""
        if size >= self._threshold:
            self._own[piece] = size = -(-size // _PAGE) * _PAGE
            self._mapped += size
        else:
            size = -(-max(size, 1) // _ALIGNED) * _ALIGNED
            wanted = size + 2 * _ALIGNED
            at = bisect_left(self._free, (wanted, 0))
            if at < len(self._free):
                found, start = self._free[at]
                self._remove(found, start)
            else:
                found, start = wanted, self._end
                self._end += wanted
                self._resident = max(self._resident, self._end)
            self._taken += 1
            used = size + (_ALIGNED if self._graphed and self._taken % LOST == 0 else 0)
            if start + found == self._end:
                self._end = start + used
            else:
                self._add(found - used, start + used)
            self._places[piece] = (start, size)
        self.peak = max(self.peak, self._mapped + self._resident)

    def give(self, piece: int) -> None:
        """Free."""
        if piece in self._own:
            size = self._own.pop(piece)
            self._mapped -= size
            if self._threshold < size <= LAST_THRESHOLD:
                self._threshold = size
            return
        start, size = self._places.pop(piece)
        if start + size in self._starts:
            after = self._starts[start + size]
            self._remove(after, start + size)
            size += after
        if start in self._ends:
            before = self._ends[start]
            size += start - before
            self._remove(start - before, before)
            start = before
        if start + size == self._end:
            self._end = start
            if self._resident - self._end > 2 * self._threshold:
                self._resident = self._end
        else:
            self._add(size, start)

    def _add(self, size: int, start: int) -> None:
        insort(self._free, (size, start))
        self._starts[start], self._ends[start + size] = size, start

    def _remove(self, size: int, start: int) -> None:
        del self._free[bisect_left(self._free, (size, start))]
        del self._starts[start], self._ends[start + size]


def taken(
    events: Iterable[tuple[int, int]], threshold: int = FIRST_THRESHOLD, graphed: bool = True
) -> int:
    """The peak of what (piece, size) take from the system; a size of -1 frees the piece. The rest is as for `Heap`."""
    heap = Heap(threshold, graphed)
    for piece, size in events:
        if size < 0:
            heap.give(piece)
        else:
            heap.take(piece, size)
    return heap.peak
