"""Bytes between the processes of a torch.distributed group, and which of them has gone.

They go over sockets (`sockets`), also where the group at hand is one of GPUs: a few scalars are not worth a device's time, and
a wait can end. Every process hears from every other one itself, so whoever is missing is known by number. The group,
by gloo, tells them at the start where everybody is.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from justforward import launched
from justforward.errors import UserError
from justforward.sockets import Sockets

# Longest wait for each other before the first step, while models are loaded and logs replayed.
START_SECONDS = 1800.0
_ROOM = 1024  # bytes that each says of itself at the start


class Peers:
    """The processes of a group.

    torchrun's environment is taken where nobody has called `init_process_group`; without either, this process is alone.

    Args:
        group: of `torch.distributed` (default: all processes). Every process of the group makes one of these; where the default
            group has no gloo, every process there is.

    Attributes:
        rank: the number of this process in the group.
        size: how many there are.

    Raises:
        UserError: the group has no gloo, or one process cannot reach another.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.rank, self.size = 0, 1
        self._ranks = [0]
        self._group: dist.ProcessGroup | None = None
        self._opened = False
        self._sockets: Sockets | None = None
        start = timedelta(seconds=START_SECONDS)
        if not dist.is_available():
            return
        if not dist.is_initialized():
            if not launched.several():
                return
            # torchrun's store still has the addresses of the processes before a restart: each attempt gets keys of its own.
            store, rank, size = next(dist.rendezvous("env://", timeout=start))  # type: ignore[attr-defined]
            store = dist.PrefixStore(f"attempt {launched.attempt()}", store)  # type: ignore[attr-defined]
            dist.init_process_group("gloo", timeout=start, store=store, rank=rank, world_size=size)
            self._opened = True
        self._ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        self.rank, self.size = self._ranks.index(dist.get_rank()), len(self._ranks)
        self._group = group
        if "cpu:gloo" not in dist.get_backend_config(group):
            if group is not None:
                raise UserError(
                    f"group: its backend is {dist.get_backend(group)}, which has no messages between CPUs: make it with "
                    "dist.new_group(ranks, backend='gloo')"
                )
            made = dist.new_group(timeout=start, backend="gloo")
            assert isinstance(made, dist.ProcessGroup)
            self._group = made
        if self.size > 1:
            self._sockets = Sockets(self.rank, self.size, self._share)

    def swap(self, raw: bytes, seconds: float, when: str) -> list[bytes]:
        """What every process has to say, by number.

        Args:
            raw: what this one says.
            seconds: how long to wait for the others.
            when: said of those that are missing.

        Raises:
            UserError: naming those that have ended, or are silent for too long. There is no further swap then.
        """
        others = [rank for rank in range(self.size) if rank != self.rank]
        got = self._exchange(raw, others, others, seconds, when)
        return [got.get(rank, raw) for rank in range(self.size)]

    def tell(self, raw: bytes, source: int, seconds: float, when: str) -> bytes:
        """What process `source` says; the others' `raw` is not looked at. Raises as `swap`."""
        if self.rank != source:
            return self._exchange(b"", [], [source], seconds, when)[source]
        others = [rank for rank in range(self.size) if rank != source]
        self._exchange(raw, others, [], seconds, when)
        return raw

    def decide(self, value: Any, seconds: float, when: str) -> Any:
        """What process 0 gives: anything that JSON knows. Raises as `swap`."""
        return json.loads(self.tell(json.dumps(value).encode(), 0, seconds, when))

    def ask(self, what: Any, seconds: float, when: str) -> list[Any]:
        """What every process says, by number: anything that JSON knows. Raises as `swap`."""
        return [json.loads(said) for said in self.swap(json.dumps(what).encode(), seconds, when)]

    def _exchange(
        self, raw: bytes, to: Sequence[int], sources: Sequence[int], seconds: float, when: str
    ) -> dict[int, bytes]:
        """Send `raw` to some, and receive what some send."""
        if self._sockets is None:
            return {}
        ends = time.monotonic() + seconds
        got, lost = self._sockets.exchange(raw, to, sources, ends)
        if lost:
            raise UserError(_missing(lost, self.size, seconds, when))
        return got

    def _share(self, raw: bytes) -> list[bytes]:
        """What all say at the start, over the group itself."""
        mine = torch.zeros(_ROOM, dtype=torch.uint8)
        mine[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        said = [torch.empty_like(mine) for _ in range(self.size)]
        try:
            dist.all_gather(said, mine, group=self._group)
        except RuntimeError as error:
            raise UserError(
                f"a worker ended, or said nothing for {START_SECONDS:g} s, at the start: {error}"
            ) from error
        return [one.numpy().tobytes().rstrip(b"\0") for one in said]

    def close(self) -> None:
        """Let go of the connections, and leave the group if it was joined here."""
        if self._sockets is not None:
            self._sockets.close()
        if self._opened:
            self._opened = False
            dist.destroy_process_group()


def spell(ranks: Sequence[int]) -> str:
    """``[0, 2]`` -> ``"workers 0 and 2"``."""
    if len(ranks) == 1:
        return f"worker {ranks[0]}"
    return f"workers {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


def _missing(lost: dict[int, str], size: int, seconds: float, when: str) -> str:
    silent = sorted(rank for rank, why in lost.items() if "timed out" in why.lower())
    ended = sorted(set(lost) - set(silent))
    parts = [f"{spell(ended)} of {size} ended"] if ended else []
    parts += [f"{spell(silent)} of {size} said nothing for {seconds:g} s"] if silent else []
    return f"{', '.join(parts)} {when}"
