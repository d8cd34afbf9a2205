"""Steps as the weights see them, and as the kernels take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Move:
    """One step as the weights see it: theta <- theta - decay theta + sum_d coefficients[g, d] z_d.

    Attributes:
        dither: seed of the stochastic rounding.
        seeds: uint64 [D], the directions.
        coefficients: float32 [groups, D].
        decays: float32 [groups].
    """

    dither: int
    seeds: NDArray[np.uint64]
    coefficients: NDArray[np.float32]
    decays: NDArray[np.float32]


@dataclass(frozen=True)
class Part:
    """Moves as the kernels take them."""

    dithers: NDArray[np.uint64]
    ends: NDArray[np.int64]
    seeds: NDArray[np.uint64]
    coefficients: NDArray[np.float32]
    decays: NDArray[np.float32]


def parts_of(moves: Sequence[Move], away: Sequence[bool]) -> list[Part | None]:
    """Moves by parameter group; None for a group that rests.

    A move that is zero for a group changes no bit of it and is left out, unless the group is away, along its
    direction.
    """
    counts = [len(move.seeds) for move in moves]
    whole = Part(
        np.array([move.dither for move in moves], np.uint64),
        np.cumsum(counts, dtype=np.int64),
        np.concatenate([move.seeds for move in moves]).astype(np.uint64),
        np.concatenate([move.coefficients for move in moves], axis=1).astype(np.float32),
        np.stack([move.decays for move in moves], axis=1).astype(np.float32),
    )
    moved = np.stack([move.coefficients.any(axis=1) for move in moves], axis=1)
    out: list[Part | None] = []
    for c, decays, some in zip(whole.coefficients, whole.decays, moved, strict=True):
        mine = some | (decays != 0.0) | away[len(out)]
        if mine.all():
            out.append(Part(whole.dithers, whole.ends, whole.seeds, c, decays))
        elif mine.any():
            theirs = np.repeat(mine, counts)
            ends = np.cumsum(np.array(counts)[mine], dtype=np.int64)
            out.append(
                Part(whole.dithers[mine], ends, whole.seeds[theirs], c[theirs], decays[mine])
            )
        else:
            out.append(None)
    return out
