"""Weights that are cut over processes (FSDP2, tensor parallel): each moves its own part, with the bits of the whole.

z, grid and rounding of a weight are functions of its place in the whole tensor, tile by tile of 1,024 numbers. So a process
moves the tiles that it has whole where they are; of a tile that a cut goes through it keeps a copy of all of it, moves that as
every other process with a part of it does, and takes its own part out. Nothing is sent for a move: a log that was written
by a model in shards is that of the whole model.

The modules of such a model compute with what FSDP or a DTensor makes of the parts, where nothing can be handed out in their
place. So a look moves parts in 16 bits, too, each weight rounded once, and what they were is kept meanwhile (`away.LookHere`).

What is sent is a loss: each process calls the closure, for whatever its model makes of it, and the step is taken along the mean.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from justforward.directions import Family, Place, Weights
from justforward.errors import UserError
from justforward.moves import Move
from justforward.noise.spec import TILE
from justforward.stored import in_shards, is_half, plain
from justforward.trainable import check_trainable, formats_of

if TYPE_CHECKING:
    from numpy.typing import NDArray


def weights_of(
    tensors: Sequence[tuple[str, Tensor]],
    groups: Sequence[int],
    family: Family,
    eps: Sequence[float],
    model: nn.Module | None,
) -> Weights:
    """`Weights`, or `Shards` where one of the tensors is cut over processes; every process must call this then.

    Raises:
        UserError: as these.
    """
    if any(in_shards(tensor) for _, tensor in tensors):
        return Shards(tensors, groups, family, eps, model)
    return Weights(tensors, groups, family, eps)


# ------------------------------------------------------------------------------------- where a part is


def cut(tensor: Any) -> tuple[NDArray[np.int64], int]:
    """Which numbers of the whole tensor, in order, this process has: runs of equal length.

    Returns:
        Where each run starts in the whole tensor, int64 [runs]; how long each is.

    Raises:
        UserError: it is cut in another way than by `Shard` and `Replicate`.
    """
    from torch.distributed.tensor import Replicate, Shard

    box = [(0, size) for size in tensor.shape]
    at = tensor.device_mesh.get_coordinate()
    for k, placement in enumerate(tensor.placements):
        if isinstance(placement, Replicate):
            continue
        if type(placement) is not Shard:
            raise UserError(
                f"is placed as {placement}: what is looked along are parts by Shard and copies by Replicate: "
                "shard it by FSDP2 or by tensor parallelism, not by both"
            )
        low, high = box[placement.dim]
        size = -(-(high - low) // tensor.device_mesh.size(k))  # as torch.chunk
        box[placement.dim] = (min(low + size * at[k], high), min(low + size * (at[k] + 1), high))
    strides = [int(np.prod(tensor.shape[d + 1 :], dtype=np.int64)) for d in range(tensor.dim())]
    partial = [d for d, (low, high) in enumerate(box) if (low, high) != (0, tensor.shape[d])]
    last = max(partial, default=0)
    starts = np.zeros(1, np.int64)
    for d in range(last):
        starts = (starts[:, None] + np.arange(*box[d]) * strides[d]).ravel()
    low, high = box[last]
    return starts + low * strides[last], (high - low) * strides[last]


@dataclass(frozen=True)
class Piece:
    """Tiles that follow each other, of which a process has all numbers.

    Attributes:
        flat: they, one after the other.
        first: the number of the first tile in the whole tensor.
        back: for copies, where what this process has of them is: in `flat`, and in its part; else None.
    """

    flat: Tensor
    first: int
    back: tuple[Tensor, Tensor] | None = None


def pieces_of(tensor: Any) -> list[Piece]:
    """A tensor's part as whole tiles: where it is, or as copies, whose other numbers are asked of the others (a collective)."""
    starts, length = cut(tensor)
    part, count = tensor.to_local().detach().view(-1), tensor.numel()
    whole = tensor.full_tensor().detach().view(-1)
    pieces: list[Piece] = []
    torn: set[int] = set()
    for run, start in enumerate(starts.tolist() if length else ()):
        end = start + length
        first, last = -(-start // TILE), (-(-end // TILE) if end == count else end // TILE)
        if last > first:
            here = run * length - start  # from a place in the whole to one in the part
            flat = part[here + first * TILE : here + min(last * TILE, count)]
            pieces.append(Piece(flat, first))
        torn.update(range(start // TILE, min(first, -(-end // TILE))))
        torn.update(range(max(last, start // TILE), -(-end // TILE)))
    order = sorted(torn)
    begin = 0
    for i in range(1, len(order) + 1):
        if i < len(order) and order[i] == order[i - 1] + 1:
            continue
        low, high = order[begin] * TILE, min((order[i - 1] + 1) * TILE, count)
        places = _mine(starts, length, low, high)
        pieces.append(Piece(whole[low:high].clone(), order[begin], places))
        begin = i
    return pieces


def _mine(starts: NDArray[np.int64], length: int, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Of the places low .. high of a whole tensor those that runs cover: from low on, and in the part."""
    runs = np.flatnonzero((starts < high) & (starts + length > low))
    inside = [
        np.arange(max(starts[run], low), min(starts[run] + length, high), dtype=np.int64)
        for run in runs
    ]
    parts = [places - starts[run] + run * length for run, places in zip(runs, inside, strict=True)]
    return torch.from_numpy(np.concatenate(inside) - low), torch.from_numpy(np.concatenate(parts))


# ------------------------------------------------------------------------------------------ the weights


class Shards(Weights):
    """`Weights` of which each process has parts. Names, shapes and groups are those of the whole tensors.

    Args:
        tensors, groups, family, eps: as `Weights` has them.
        model: that they belong to, to put FSDP's modules back in parts before their weights move.

    Raises:
        UserError: as `Weights`; parts of a kind that is not known; directions of rank one.
    """

    sharded = True

    @property
    def writes(self) -> bool:  # type: ignore[override]
        """One process does."""
        return dist.get_rank() == 0

    def __init__(
        self,
        tensors: Sequence[tuple[str, Tensor]],
        groups: Sequence[int],
        family: Family,
        eps: Sequence[float],
        model: nn.Module | None,
    ) -> None:
        from torch.distributed.fsdp import FSDPModule

        if model is None:
            raise UserError("the model is needed where weights are in shards: MeZO(model, ...)")
        if family.outer:
            raise UserError(
                "family is rank-one, whose factors are those of whole matrices: take gaussian or rademacher for weights in shards"
            )
        self.names = [name for name, _ in tensors]
        self.tensors = [tensor for _, tensor in tensors]
        self.groups, self.family = list(groups), family
        self._modules = [m for m in model.modules() if isinstance(m, FSDPModule)]
        self._copies: list[tuple[str, Tensor, Piece]] = []
        self._part()
        named: list[tuple[str, Tensor]] = []
        places, owners = [], []
        for i, (name, tensor) in enumerate(tensors):
            for piece in self._pieces(name, tensor):
                named.append((name, nn.Parameter(piece.flat, requires_grad=False)))
                places.append(Place(i, piece.first, tensor.dim() >= 2))
                owners.append(groups[i])
        self.inner = Weights(named, owners, family, eps, places)
        self._put_back()
        self.compiled, self.dtypes = self.inner.compiled, self.inner.dtypes
        self.exponents, self.floors = self.inner.exponents, self.inner.floors
        self.halves = [is_half(tensor) for tensor in self.tensors]
        self.formats = formats_of(self.tensors)
        self._held: list[int] = []

    def _pieces(self, name: str, tensor: Any) -> list[Piece]:
        part = tensor.to_local() if in_shards(tensor) else tensor
        check_trainable(name, nn.Parameter(part, requires_grad=False))
        if not in_shards(tensor):
            return [Piece(plain(tensor).view(-1), 0)]
        try:
            pieces = pieces_of(tensor)
        except UserError as error:
            raise UserError(f"parameter {name} {error}") from None
        flat = part.detach().view(-1)
        self._copies += [(name, flat, piece) for piece in pieces if piece.back is not None]
        return pieces

    def _part(self) -> None:
        """Where FSDP has left weights whole after a forward, take the parts: these are what moves."""
        for module in self._modules:
            module.reshard()

    def _put_back(self) -> None:
        """What the copies have come to, into the parts."""
        for _, part, piece in self._copies:
            assert piece.back is not None
            inside, mine = piece.back
            part[mine] = piece.flat[inside]

    def _check_copies(self) -> None:
        for name, part, piece in self._copies:
            assert piece.back is not None
            inside, mine = piece.back
            if not torch.equal(part[mine], piece.flat[inside]):
                raise UserError(
                    f"parameter {name} was changed by something else than the optimizer: make a new optimizer after that"
                )

    def look(self, seed: int, eps: Sequence[float], times: float) -> None:
        """See `Weights.look`."""
        self._part()
        self._check_copies()
        self.inner.look(seed, eps, times)
        self._put_back()

    def update(
        self,
        moves: Sequence[Move],
        back: Sequence[float] | None = None,
        draws: Sequence[tuple[Any, ...]] | None = None,
    ) -> None:
        """See `Weights.update`."""
        self._part()
        self._check_copies()
        self.inner.update(moves, back)
        self._put_back()
        if any(self.halves):
            self._held += self._all_held()

    def _all_held(self) -> list[int]:
        """Tensors of which any process has held weights back (a collective)."""
        mine = [self.inner.places[i].stream for i in self.inner.held()]
        flags = torch.zeros(len(self.tensors), dtype=torch.float64)
        flags[torch.tensor(mine, dtype=torch.int64)] = 1.0
        found: list[int] = self._gather(flags).amax(0).nonzero()[:, 0].tolist()
        return found

    def held(self, wait: bool = False) -> list[int]:
        """See `Weights.held`; the same in all processes."""
        found, self._held = sorted(set(self._held)), []
        return found

    def settle(self) -> None:
        """Nothing waits."""

    def average(self, loss: Any) -> Any:
        """The mean of what the processes' closures have returned, the same in all (a collective)."""
        found = torch.as_tensor(loss).detach().double().mean()
        return self._gather(found.reshape(1)).mean().item()

    def same(self, what: dict[str, Any]) -> None:
        """Refuse to go on where the processes were given different things (a collective).

        Raises:
            UserError: naming them.
        """
        said = [zlib.crc32(json.dumps(value).encode()) for value in what.values()]
        found = self._gather(torch.tensor(said, dtype=torch.float64))
        unlike = [name for name, column in zip(what, found.T, strict=True) if len(column.unique()) > 1]  # fmt: skip
        if unlike:
            raise UserError(
                f"the processes of a model in shards differ in {', '.join(unlike)}: give all the same"
            )

    def _gather(self, mine: Tensor) -> Tensor:
        """[processes, n] of [n], on the CPU."""
        ways = dist.get_backend_config()  # as cpu:gloo,cuda:nccl
        mine = mine.to("cpu" if "cpu:" in ways else ways.partition(":")[0])
        found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(found, mine)
        return torch.stack(found).cpu()


def check_sharded(estimator: str, moments: bool, variants: Sequence[Any]) -> None:
    """Refuse what a model in shards cannot have.

    Args:
        estimator: of the optimizer.
        moments: whether its rule has moments.
        variants: what it was given of `modified` and `private`.

    Raises:
        UserError: naming it.
    """
    for bad, what, instead in (
        (estimator != "weight", f"estimator is {estimator!r}", "estimator='weight'"),
        (moments, "rule has moments", "'rms', 'sgd' or another rule without"),
        (any(v is not None for v in variants), "modified or private is given", "neither"),
    ):
        if bad:
            raise UserError(
                f"{what}: of a model in shards (FSDP2, tensor parallel) each process has parts alone: take {instead}"
            )
