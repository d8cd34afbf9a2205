"""Hub and workers: bytes on the wire, seconds from a worker's death to the next step, seconds for a joiner at step 10,000.

The model is that of tests/parties.py (a hundred weights), so that what is measured is the protocol. Bytes are those of the TCP
streams, HTTP's headers included, counted by a relay between worker and hub; headers of TCP and IP are not in them.

    python benchmarks/hub.py [--kills 10] [--steps 10000] [--json]
"""

from __future__ import annotations

import asyncio
import os
import random
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from _timing import Table, arguments

TESTS = Path(__file__).parent.parent / "tests"
sys.path.insert(0, str(TESTS))

from justforward import fingerprint  # noqa: E402
from justforward.line import HttpLink  # noqa: E402
from justforward.serve import Hall, attend, listen, server_of  # noqa: E402
from parties import DeskLink, open_desk, worker  # noqa: E402


class Hub:
    """In a thread of this process."""

    def __init__(self, out: Path, **options: Any) -> None:
        self.desk = open_desk(out, **options)
        self.at = listen("127.0.0.1", 0)
        self.port = self.at.getsockname()[1]
        self.hall = Hall(self.desk, lambda text: None)
        server = server_of(self.hall, self.desk.most)
        self.thread = threading.Thread(
            target=lambda: asyncio.run(attend(self.hall, server, self.at))
        )
        self.thread.start()
        # until then the port refuses, and a relay does not ask twice
        while not server.started and self.thread.is_alive():
            time.sleep(0.01)

    def stop(self) -> None:
        self.hall.closing = True
        self.thread.join()
        self.at.close()
        self.desk.conductor.close()


class Relay:
    """Passes one connection on, and counts its bytes."""

    def __init__(self, port: int) -> None:
        self.up = self.down = self.connections = 0
        self.listener = listen("127.0.0.1", 0)
        self.listener.listen()
        self.port, self._to = self.listener.getsockname()[1], port
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            near, _ = self.listener.accept()
            self.connections += 1
            far = socket.create_connection(("127.0.0.1", self._to))
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._pass, args=(near, far, "up"), daemon=True).start()
            threading.Thread(target=self._pass, args=(far, near, "down"), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, way: str) -> None:
        while part := source.recv(1 << 16):
            setattr(self, way, getattr(self, way) + len(part))
            target.sendall(part)
        target.shutdown(socket.SHUT_WR)


def wire(table: Table, folder: Path) -> None:
    """Bytes a step of one worker that looks at all rows; fitted over the number of rows."""
    steps, found = 100, {}
    for rows in (8, 64):
        for estimator in ("weight", "activation"):
            options: dict[str, Any] = {"batch_size": rows, "part": rows, "estimator": estimator}
            short, long = (
                _counted(folder / f"{estimator}{rows}-{n}", max_forwards=2 * n, **options)
                for n in (steps, 2 * steps)
            )
            # What is sent once (joining, leaving) is the same in both.
            up, down = (long[0] - short[0]) / steps, (long[1] - short[1]) / steps
            found[estimator, rows] = up, down
    for estimator in ("weight", "activation"):
        (up8, down8), (up64, down64) = found[estimator, 8], found[estimator, 64]
        total = up8 + down8
        detail = (
            f"{up8:.1f} up, {down8:.1f} down; a further row {(up64 - up8) / 56:.2f} up, {(down64 - down8) / 56:.2f} down; "
            "64 + 4 a row is the target without HTTP"
        )
        table.add(f"bytes a step, 8 rows, {estimator} space", total, "-", True, detail)


def _counted(out: Path, **options: Any) -> tuple[int, int]:
    hub = Hub(out, hash_every=10**6, **options)
    relay = Relay(hub.port)
    taking_part, _, log = worker(HttpLink(f"http://127.0.0.1:{relay.port}"))
    taking_part.run(log)
    hub.stop()
    relay.listener.close()
    assert relay.connections == 1
    return relay.up, relay.down


def kills(table: Table, folder: Path, times: int) -> None:
    """A worker is killed at a random instant, again and again; another one stays."""
    hub = Hub(folder / "kills", max_forwards=10**7, lr_schedule="constant")
    conductor, waited = hub.desk.conductor, []

    def start() -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            str(TESTS / "parties.py"),
            f"http://127.0.0.1:{hub.port}",
            "0.02",
        ]
        return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def both() -> None:
        while sum(member.alive for member in conductor.rounds.members.values()) < 2:
            time.sleep(0.01)

    stays = start()
    luck = random.Random(0)
    for _ in range(times):
        killed = start()
        both()
        time.sleep(1.0 + luck.random())
        killed.send_signal(signal.SIGKILL)
        dead, step = time.monotonic(), conductor.steps
        # the step that it was part of, and the one after it
        while conductor.steps < step + 2:
            time.sleep(0.002)
        waited.append(time.monotonic() - dead)
        killed.wait()
        while sum(member.alive for member in conductor.rounds.members.values()) > 1:
            time.sleep(0.01)
    stays.terminate()
    stays.wait()
    hub.stop()
    worst = max(waited)
    detail = (
        f"median {statistics.median(waited):.2f}, {times} kills at random instants, default options"
    )
    table.add("seconds from kill -9 until two more steps are taken, at most", worst, "<= 5", worst <= 5.0, detail)  # fmt: skip


def late(table: Table, folder: Path, steps: int) -> None:
    """A joiner when so many steps are there."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    desk = open_desk(folder / "late", max_forwards=2 * steps + 20, hash_every=10**6)
    first, _, log = worker(DeskLink(desk))
    began = time.monotonic()
    _stop_at(first, desk, steps)
    first.run(log)
    ran = time.monotonic() - began
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    link = DeskLink(desk, now=100.0)
    began = time.monotonic()
    joiner, own, log = worker(link, "joiner")
    with tempfile.TemporaryDirectory() as place:
        joiner._begin(Path(place), log)
        took = time.monotonic() - began
        assert joiner.opt is not None
        assert joiner.opt.steps == steps
        joiner.opt.close()
    assert fingerprint(own.model)
    size = desk.conductor.folder.log.stat().st_size
    desk.conductor.close()
    detail = f"log of {size} bytes, {link.bytes} exchanged; the steps themselves took {ran:.1f} s"
    table.add(f"seconds for a joiner at step {steps}, model made included", took, "shown", True, detail)  # fmt: skip
    table.add("MiB that this process grew by meanwhile, hub and worker together", grown / 1024, "a few", grown < 2**15)  # fmt: skip


def _stop_at(first: Any, desk: Any, steps: int) -> None:
    """Let a worker leave after so many steps."""
    look = first._look

    def some(work: Any) -> Any:
        if desk.conductor.steps >= steps:
            raise _Enough
        return look(work)

    first._look = some
    run = first.run

    def until(log: int) -> None:
        try:
            run(log)
        except _Enough:
            return

    first.run = until


class _Enough(Exception):
    pass


def main() -> None:
    """All three."""
    given = arguments(__doc__, kills=10, steps=10000)
    table = Table(given.json)
    with tempfile.TemporaryDirectory() as folder:
        wire(table, Path(folder))
        late(table, Path(folder), given.steps)
        kills(table, Path(folder), given.kills)
    table.print()


if __name__ == "__main__":
    main()
