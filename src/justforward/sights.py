"""A part of a step's looks, as scalars: taken by one worker, sent, and put together with those of others.

Rises of the loss are kept row by row, rounded to float32, and summed exactly. So a step made of them depends on which rows
were seen along which directions, and never on how many workers saw them or whose came first.

The row of a sight is its place in the batch of the whole step. In weight space all rows share the direction of a
sample; in activation space each has its own, named by sample and row.
"""

from __future__ import annotations

import math
import struct
import warnings
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor

from justforward.errors import NonFiniteLoss, UserError
from justforward.estimators import RowLooks, Site, describe, look_weights

# Version, step, mean loss, forwards, samples, rows, the first of each and the distance to the next; then the rises.
_HEAD = struct.Struct("<BQfIHIHHII")
_VERSION = 1
MOST_SAMPLES, MOST_ROWS = (1 << 13) - 1, 1 << 20


@dataclass(frozen=True)
class Sight:
    """What was seen of one step along some of its directions with some of its rows.

    Attributes:
        step: index of the step.
        samples: which of the step's directions (of each row in activation space).
        rows: which rows of the step's batch.
        rises: of each sample and row, how much the loss grows for one eps along the direction (`estimators`), float32.
        loss: mean over all looks and rows, float32.
        forwards: passes over these rows.
    """

    step: int
    samples: tuple[int, ...]
    rows: tuple[int, ...]
    rises: tuple[tuple[float, ...], ...]
    loss: float
    forwards: int

    def pack(self) -> bytes:
        """As bytes: 39 and 4 for each rise. Samples and rows must be evenly spaced, as slices are.

        Raises:
            UserError: they are not.
        """
        samples, rows = _spaced("samples", self.samples), _spaced("rows", self.rows)
        raw = _HEAD.pack(
            *(_VERSION, self.step, self.loss, self.forwards, len(self.samples), len(self.rows)),
            *(*samples, *rows),
        )
        raw += np.array(self.rises, "<f4").tobytes()
        return raw + struct.pack("<I", zlib.crc32(raw))

    @classmethod
    def unpack(cls, raw: bytes, finite: bool = True) -> Sight:
        """What `pack` made.

        Args:
            raw: the bytes.
            finite: refuse numbers that are not.

        Raises:
            UserError: it was not made by `pack`, or is damaged, or has a number that is not finite.
        """
        if len(raw) < _HEAD.size + 8:
            raise UserError(f"a sight of {len(raw)} bytes: too short to be one")
        if zlib.crc32(raw[:-4]) != struct.unpack("<I", raw[-4:])[0]:
            raise UserError(f"a sight of {len(raw)} bytes: its checksum differs")
        version, step, loss, forwards, samples, rows, *places = _HEAD.unpack_from(raw)
        if version != _VERSION:
            raise UserError(f"a sight of version {version}: this version reads {_VERSION}")
        if not (1 <= samples <= MOST_SAMPLES and 1 <= rows <= MOST_ROWS):
            raise UserError(f"a sight of {samples} samples and {rows} rows: too few or too many")
        if len(raw) != _HEAD.size + 4 * samples * rows + 4:
            raise UserError(f"a sight of {len(raw)} bytes: not those of {samples} x {rows} rises")
        rises = np.frombuffer(raw, "<f4", samples * rows, _HEAD.size).reshape(samples, rows)
        if finite and not (np.isfinite(rises).all() and math.isfinite(loss)):
            raise UserError("a sight with a number that is not finite")
        first, apart, first_row, rows_apart = places
        return cls(
            step=step,
            samples=tuple(first + apart * i for i in range(samples)),
            rows=tuple(first_row + rows_apart * i for i in range(rows)),
            rises=tuple(map(tuple, rises.tolist())),
            loss=loss,
            forwards=forwards,
        )


def _spaced(what: str, places: Sequence[int]) -> tuple[int, int]:
    apart = places[1] - places[0] if len(places) > 1 else 0
    if any(b - a != apart for a, b in pairwise(places)) or apart < 0:
        raise UserError(f"{what} {list(places)}: to be sent they must be evenly spaced")
    return places[0], apart


# ------------------------------------------------------------------------------------------- looking


def warn_alone() -> None:
    """Warn a process that takes steps by itself though it is one of several."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        warnings.warn(
            f"torch.distributed has {dist.get_world_size()} processes, and each of them moves its own weights by its own losses: "
            "let justforward.Workers take the steps (unless the closure returns the same number in all of them)",
            stacklevel=5,
        )


def see_weights(
    site: Site, closure: Any, batch: Any, samples: Sequence[int], rows: Sequence[int]
) -> Sight:
    """Weight space: look along the directions of these samples with these rows.

    Args:
        site: where from; its seeds by sample.
        closure: of nothing, or of the batch if that is not None; returns one loss a row [rows], or one that
            counts for each of them.
        batch: its argument: these rows.
        samples, rows: their places in the step.

    Raises:
        NonFiniteLoss (naming the row), UserError, whatever the closure raises: the weights are home.
    """
    kept: list[list[float]] = []

    def mean(*arguments: Any) -> float:
        kept.append(row_losses(closure(*arguments), len(rows)))
        return math.fsum(kept[-1]) / len(rows)

    here = replace(site, seed_of=lambda lane: site.seed_of(samples[lane]))
    try:
        seen = look_weights(here, mean, batch, len(samples), stay=False)
    except NonFiniteLoss as error:
        for row, value in zip(rows, kept[-1], strict=True):
            if not math.isfinite(value):
                raise NonFiniteLoss(site.step, value, f"{error.where} in row {row}") from None
        raise
    rises = rises_by_row(site.kind, kept, len(samples))
    return _sight(site, samples, rows, rises, seen.loss, seen.forwards)


def rises_by_row(kind: str, kept: Sequence[Sequence[float]], samples: int) -> list[list[float]]:
    """Of each sample and row, how much the loss grows for one eps: from the losses of all looks, in their order."""
    ahead, behind = kept[0::2], kept[1::2]
    half = 0.5
    if kind == "one-sided":
        ahead, behind, half = kept[1:], [kept[0]] * samples, 1.0
    return [
        [half * (plus - minus) for plus, minus in zip(*pair, strict=True)]
        for pair in zip(ahead, behind, strict=True)
    ]


def see_rows(
    site: Site,
    looks: RowLooks,
    closure: Any,
    batch: Any,
    samples: Sequence[int],
    rows: Sequence[int],
) -> Sight:
    """Activation space: look along the directions that these rows have in these samples.

    Args:
        site: where from; its seeds by sample * (rows of the step) + row, `of` them.
        looks: of the optimizer.
        closure, batch: see `RowLooks.look`.
        samples, rows: their places in the step.

    Raises:
        NonFiniteLoss, UserError, whatever the closure raises.
    """
    seen, _ = looks.look(site, closure, batch, len(samples))
    count = len(seen.rises) // len(samples)
    if count != len(rows):
        raise UserError(
            f"look: the closure has {count} rows, and the places of {len(rows)} were given"
        )
    rises = [seen.rises[i * count : (i + 1) * count] for i in range(len(samples))]
    return _sight(site, samples, rows, rises, seen.loss, seen.forwards)


def _sight(
    site: Site,
    samples: Sequence[int],
    rows: Sequence[int],
    rises: Sequence[Sequence[float]],
    loss: float,
    forwards: int,
) -> Sight:
    kept = np.array(rises, np.float32).tolist()
    return Sight(
        site.step,
        tuple(samples),
        tuple(rows),
        tuple(map(tuple, kept)),
        float(np.float32(loss)),
        forwards,
    )


def merged(parts: Sequence[Sight]) -> Sight:
    """One sight of what a worker has seen block by block.

    Args:
        parts: each of some rows and samples; together every sample of every row, once.
    """
    places = {
        (sample, row): rise
        for part in parts
        for sample, rises in zip(part.samples, part.rises, strict=True)
        for row, rise in zip(part.rows, rises, strict=True)
    }
    samples = tuple(sorted({sample for sample, _ in places}))
    rows = tuple(sorted({row for _, row in places}))
    weights = [len(part.samples) * len(part.rows) for part in parts]
    loss = math.fsum(part.loss * weight for part, weight in zip(parts, weights, strict=True))
    passes = sum(part.forwards * len(part.rows) for part in parts)
    return Sight(
        parts[0].step,
        samples,
        rows,
        tuple(tuple(places[sample, row] for row in rows) for sample in samples),
        float(np.float32(loss / sum(weights))),
        math.ceil(passes / len(rows)),
    )


def row_losses(losses: Any, rows: int) -> list[float]:
    """Of a closure in weight space: one a row, or one for all."""
    if isinstance(losses, Tensor):
        if losses.dim() == 1 and len(losses) == rows:
            return [float(x) for x in losses.detach().double().tolist()]
        if losses.numel() == 1:
            losses = losses.item()
    if isinstance(losses, (int, float)):
        return [float(losses)] * rows
    raise UserError(
        f"look: the closure returned {describe(losses)}: it must return one loss for each of its {rows} rows, or one number"
    )


# ---------------------------------------------------------------------------------- putting together


@dataclass(frozen=True)
class View:
    """All sights of a step.

    Attributes:
        rises: by sample, then by row.
        loss: mean over all looks.
        forwards: passes over a batch that they come to.
    """

    rises: dict[int, dict[int, float]]
    loss: float
    forwards: int

    def along_samples(self) -> dict[int, float]:
        """Weight space: of each sample's direction the mean over the rows that were seen, summed exactly."""
        return {
            sample: math.fsum(rows.values()) / len(rows)
            for sample, rows in sorted(self.rises.items())
        }

    def along_rows(self, of: int) -> dict[int, float]:
        """Activation space: of each direction, by its lane among those of `of` rows."""
        found = {
            sample * of + row: rise
            for sample, rows in self.rises.items()
            for row, rise in rows.items()
        }
        return dict(sorted(found.items()))


def check_places(what: str, places: Sequence[int], count: int) -> None:
    """Refuse places that a step has not.

    Raises:
        UserError: there are none, one is out of range, or one is there twice.
    """
    if not places:
        raise UserError(f"there are no {what}: give at least one")
    for place in places:
        if not 0 <= place < count:
            raise UserError(f"{what}: {place} is not one of the step's {count}, counted from 0")
    if len(set(places)) != len(places):
        raise UserError(f"{what} {list(places)}: one is there twice")


def put_together(sights: Iterable[Sight], step: int, samples: int, of: int) -> View:
    """One view of a step from all its sights, in whatever order.

    Args:
        sights: what was seen; the same rise may be there twice.
        step: index of the step that they must be of.
        samples: how many the step has.
        of: rows that its batch has.

    Raises:
        UserError: there are none, or one is of another step, or of a sample or row that the step has not, or two say
            different things of the same rise.
    """
    rises: dict[int, dict[int, float]] = {}
    known = set(sights)
    if not known:
        raise UserError(f"there are no sights of step {step}")
    for sight in known:
        if sight.step != step:
            raise UserError(f"a sight is of step {sight.step}: the next step is {step}")
        check_places("samples", sight.samples, samples)
        check_places("rows", sight.rows, of)
        for sample, values in zip(sight.samples, sight.rises, strict=True):
            mine = rises.setdefault(sample, {})
            for row, value in zip(sight.rows, values, strict=True):
                kept = mine.setdefault(row, value)
                if kept != value and not (math.isnan(kept) and math.isnan(value)):
                    raise UserError(
                        f"two sights of step {step} differ in row {row}, sample {sample}: {kept} and {value}"
                    )
    sizes = [len(sight.samples) * len(sight.rows) for sight in known]
    loss = math.fsum(sight.loss * size for sight, size in zip(known, sizes, strict=True)) / sum(
        sizes
    )
    passes = sum(sight.forwards * len(sight.rows) for sight in known)
    return View(rises, loss, math.ceil(passes / of))
