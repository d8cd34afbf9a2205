"""Functions run in several processes of one torch.distributed group."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

# One process imports everything once; the others are copies of it.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["justforward.workers", "processes_ready"])
PATIENCE = 100.0


def together(
    size: int,
    folder: Path,
    function: Callable[..., Any],
    *arguments: Any,
    stopped: int | None = None,
) -> list[Any]:
    """What `function(*arguments)` returns in each of `size` gloo processes; of one that raises, the exception's type and text.

    None for one that dies. Process `stopped` has been stopped by its function: it is killed when the others are done.
    """
    with pytest.MonkeyPatch.context() as patch:  # where the first process looks for what it imports
        patch.syspath_prepend(Path(__file__).parent)
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    store = folder / f"store-{len(list(folder.iterdir()))}"
    pairs = [_CONTEXT.Pipe(duplex=False) for _ in range(size)]
    processes = [
        _CONTEXT.Process(
            target=_one, args=(rank, size, store, write, function, arguments), daemon=True
        )
        for rank, (_, write) in enumerate(pairs)
    ]
    for process, (_, write) in zip(processes, pairs, strict=True):
        process.start()
        write.close()
    out: list[Any] = [None] * size
    try:
        for rank, (read, _) in enumerate(pairs):
            if rank != stopped and read.poll(PATIENCE):
                with contextlib.suppress(EOFError):  # it has died
                    out[rank] = read.recv()
    finally:
        for process in processes:
            if process.is_alive():
                process.join(
                    0.0 if process is processes[stopped or 0] and stopped is not None else 20.0
                )
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, signal.SIGKILL)
                process.join()
        for read, _ in pairs:
            read.close()
    return out


def _one(
    rank: int,
    size: int,
    store: Path,
    write: Connection,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # accelerate sets another number where this is not said
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        write.send(function(*arguments))
    except BaseException as error:
        if not isinstance(error, (ValueError, ArithmeticError, KeyboardInterrupt, RuntimeError)):
            traceback.print_exc()
        write.send((type(error).__name__, str(error)))
    finally:
        write.close()
