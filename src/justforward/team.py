"""A run in several processes: `torchrun -m justforward train ...`. Each has all rows and a model of its own; they divide the rows of a step.
A single process that is told how many rows go through the model at once takes the very steps that several would.

Process 0 keeps the run folder. The others do the same in a temporary one, so that every process can score, go back and
go on by itself; what clocks or unlike machines decide, process 0 decides.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from justforward import launched
from justforward.config import TrainConfig
from justforward.errors import UserError
from justforward.optim import MeZO
from justforward.peers import START_SECONDS, Peers
from justforward.progress import Progress
from justforward.workers import Workers

if TYPE_CHECKING:
    from torch import Tensor

    from justforward.data import Example
    from justforward.evaluate import Scorer

# Longest wait within a run: one machine may take so much longer over a validation than another.
PATIENCE = 300.0


class Team:
    """What a run needs of the other processes. Alone it takes steps as `MeZO.step` does, or a part of the rows at a time.

    Args:
        peers: the processes, if torchrun has started them.
    """

    def __init__(self, peers: Peers | None = None) -> None:
        self._peers = peers
        self._workers: Workers | None = None

    def join(
        self,
        opt: MeZO,
        rows_at_once: int | None,
        data: str,
        scorer: Scorer | None,
        rows: Sequence[Example],
    ) -> None:
        """Take this optimizer's steps from now on; `data` is the digest of the rows, which this scorer reads.

        Raises:
            UserError: the processes differ.
        """
        if self._peers is not None or rows_at_once is not None:
            size = 1 if rows_at_once is None else rows_at_once
            assert scorer is not None
            data = f"sha256 {data[:12]}, tokens {scorer.digest(rows)[:12]}"
            self._workers = Workers(
                opt, rows_at_once=size, data=data, timeout=PATIENCE, group=self._peers
            )

    def step(self, opt: MeZO, closure: Callable[[Any], Tensor], batch: Any) -> float:
        """A step; its loss.

        Raises:
            UserError: the closure has one number for all rows, which the processes divide; or as `Workers.step`.
        """
        if self._workers is None:
            return opt.step(closure, batch)

        def by_row(rows: Any) -> Tensor:
            found = closure(rows)
            if found.dim() == 0:
                who, other = "processes divide", "train without torchrun"
                if self._peers is None:
                    who, other = "--rows-at-once divides", "leave that out"
                raise UserError(
                    f"--objective is one number for all rows of a batch, and here {who} the rows: choose one that has a "
                    f"number for each, or {other}"
                )
            return found

        return self._workers.step(by_row, batch)

    def agree(self, value: Any) -> Any:
        """What process 0 gives: anything that JSON knows."""
        if self._peers is None:
            return value
        return self._peers.decide(value, PATIENCE, "outside of a step")


@contextlib.contextmanager
def gathered(
    config: TrainConfig, progress: Progress
) -> Iterator[tuple[TrainConfig, Progress, Team]]:
    """The run as this process is to do it."""
    if not launched.several():
        yield config, progress, Team()
        return
    peers = Peers()
    with contextlib.ExitStack() as stack:
        stack.callback(peers.close)
        if peers.rank != 0:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="justforward-")))
            progress = Progress(stack.enter_context(open(os.devnull, "w")), bar=False)
            if config.resume and Path(config.out).is_dir():
                # it is made from the log: a copy of weights would be large
                left_out = shutil.ignore_patterns("snapshots")
                shutil.copytree(config.out, folder / "run", ignore=left_out)
            config = replace(config, out=str(folder / "run"), snapshot_every=None)
        peers.ask("the folder is copied", START_SECONDS, "at the start")
        yield config, progress, Team(peers)
