"""A tiny model, its rows and its hub, for tests of hubs and workers. Run as a script it is a worker: `parties.py URL [seconds a look]`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from justforward import MeZO, fingerprint
from justforward.conductor import Conductor
from justforward.desk import Desk, Waiting
from justforward.line import HttpLink, Line, Unreachable, greet
from justforward.mail import open_folder
from justforward.offers import ServeConfig
from justforward.serve import Hall, attend, listen, open_run, server_of
from justforward.worker import Rows, Worker

KEY = b"a key that all of them share"
SIZE = 8


def serve_config(out: Path, **options: Any) -> ServeConfig:
    given: dict[str, Any] = {
        "model": "tiny",
        "template": "{text}",
        "labels": "a=b,c=d",
        "estimator": "weight",
        "rule": "rms",
        "lr": 1e-3,
        "batch_size": SIZE,
        "max_forwards": 40,
        "hash_every": 5,
        "seed": 3,
    }
    return ServeConfig(out=str(out), **{**given, **options})


OPENED: list[Desk] = []


def open_desk(out: Path, most: int = 8, **options: Any) -> Desk:
    OPENED.append(Desk(KEY, open_run(serve_config(out, **options)), most))
    return OPENED[-1]


def close_all() -> None:
    """Let go of every run that was opened since the last time."""
    for desk in OPENED:
        desk.conductor.close()
    OPENED.clear()


def net() -> nn.Module:
    made = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    generator = torch.Generator().manual_seed(
        0
    )  # torch's own is shared by the threads that make nets
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.uniform_(-0.4, 0.4, generator=generator)
    return made


class Party:
    """One worker's model and rows."""

    def __init__(self, told: dict[str, Any], seconds: float = 0.0, digest: str | None = "d" * 64):
        self.config, self.seconds = told["config"], seconds
        self.rows = Rows(self.batch, self.losses, None if told["private"] else digest)
        self.seed = 1 if not told["private"] else hash(time.monotonic()) % 1000
        self.model = net()
        self.looks = 0

    def build(self, log: Path, resume: bool) -> MeZO:
        self.model = net()
        names = ("lr", "eps", "estimator", "rule", "seed", "num_samples", "looks", "weight_decay")
        given = {name: self.config[name] for name in names}
        return MeZO(self.model, log=log, resume=resume, **given)

    def batch(self, step: int, first: int, stop: int, of: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1000 * self.seed + step)
        x = torch.randn(of, 5, generator=generator)[first:stop]
        return {"x": x, "y": x.argmax(1) % 3}

    def losses(self, rows: Any) -> Tensor:
        time.sleep(self.seconds)
        self.looks += 1
        return F.cross_entropy(self.model(rows["x"]), rows["y"], reduction="none")


class DeskLink:
    """Straight to a desk: a hub without a network. Where there is nothing to tell, it says so at once."""

    def __init__(self, desk: Desk, now: float = 0.0) -> None:
        self.desk, self.now = desk, now
        self.sent: list[tuple[str, bytes]] = []
        self.bytes = 0

    def post(self, kind: str, raw: bytes) -> tuple[int, bytes]:
        self.now += 1e-4
        self.sent.append((kind, raw))
        reply = self.desk.receive(kind, raw, self.now)
        if isinstance(reply, Waiting):
            later = self.desk.again(reply, reply.until)
            assert later is not None
            reply = later
        self.bytes += len(raw) + len(reply.body)
        return reply.status, reply.body

    def close(self) -> None:
        """Nothing is held."""


class Down:
    """A hub that is not there."""

    def post(self, kind: str, raw: bytes) -> tuple[int, bytes]:
        raise Unreachable("connection refused")

    def close(self) -> None:
        """Nothing is held."""


def worker(
    link: Any, name: str = "w", wait: float = 5.0, **party: Any
) -> tuple[Worker, Party, int]:
    """A worker, its party, and the bytes of the hub's log."""
    line = Line(link, KEY, wait)
    told = greet(line)
    own = Party(told, **party)
    made = Worker(line, name, own.build, own.rows, told["hash_every"])
    return made, own, told["log"]


def run_alone(out: Path, **options: Any) -> Conductor:
    """The run of one worker with all the rows."""
    desk = open_desk(out, **options)
    taking_part, _, log = worker(DeskLink(desk))
    taking_part.run(log)
    desk.conductor.close()
    return desk.conductor


class Running:
    """A hub in a thread of its own, at an address or a folder."""

    def __init__(self, desk: Desk, at: socket.socket | Path) -> None:
        self.desk, self.notes = desk, list[str]()
        self.url = f"http://127.0.0.1:{at.getsockname()[1]}" if not isinstance(at, Path) else ""
        self.hall = Hall(desk, self.notes.append)
        self._at = at
        server = None if isinstance(at, Path) else server_of(self.hall, desk.most)
        self.thread = threading.Thread(
            target=lambda: asyncio.run(attend(self.hall, server, self._at)), daemon=True
        )
        self.thread.start()

    def stop(self) -> None:
        self.hall.closing = True
        self.thread.join(30)
        assert not self.thread.is_alive()
        if not isinstance(self._at, Path):
            self._at.close()


@contextlib.contextmanager
def running(out: Path, at: Path | None = None, **options: Any) -> Iterator[Running]:
    if at is not None:
        open_folder(at)
    hub = Running(open_desk(out, **options), at or listen("127.0.0.1", 0))
    try:
        yield hub
    finally:
        hub.stop()


def start(url: str, seconds: float = 0.0) -> subprocess.Popen[str]:
    """A worker in a process of its own."""
    return subprocess.Popen(
        [sys.executable, __file__, url, str(seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def end_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def until(said: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not said():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)


if __name__ == "__main__":
    torch.set_num_threads(1)
    link = HttpLink(sys.argv[1])
    slow = float(sys.argv[2]) if len(sys.argv) > 2 else 0.0
    began = time.monotonic()
    taking_part, own, log = worker(link, f"{time.time_ns():x}", wait=60.0, seconds=slow)
    steps = taking_part.run(log)
    print(json.dumps({"steps": steps, "looks": own.looks, "fingerprint": fingerprint(own.model)}))
