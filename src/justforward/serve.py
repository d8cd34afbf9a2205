"""`serve`: the hub's desk, reached over HTTP or through files in a shared folder.

One thread and one event loop: messages are taken one after the other, and nothing waits for a worker but that worker's own
connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from justforward.conductor import Conductor, Terms, read_kept
from justforward.desk import Desk, Reply, Waiting
from justforward.errors import UserError
from justforward.folder import RunFolder, check_new
from justforward.line import put
from justforward.mail import Mail, hold_folder, open_folder
from justforward.offers import CLIPPED, ServeConfig, run_config
from justforward.prepare import stop_signals
from justforward.progress import Progress
from justforward.ranges import check_ranges
from justforward.robust import LEAST
from justforward.rounds import Plan
from justforward.trajectory import MOST_COEFFICIENTS
from justforward.wire import ENVELOPE, Refused, read_key

if TYPE_CHECKING:
    import uvicorn

Result = dict[str, Any]
TICK = 0.1  # seconds between two looks at the clock
FAREWELL = 10.0  # seconds in which workers are told that there is no further step
LOOKING = 60.0  # seconds since it was asked in which one that looks is waited for then, on top of twice what parts take
BODY = 30.0  # seconds in which a message must have come
SMALL = 1 << 14  # bytes of a message that are read whoever sends it
READING = 1 << 25  # bytes beyond these of all messages that are being read


class Hall:
    """Brings messages to the desk, and wakes those that wait when there is something to tell.

    Args:
        desk: of the hub.
        note: called with a sentence where there is something to tell.
    """

    def __init__(self, desk: Desk, note: Callable[[str], None]) -> None:
        self.desk, self.note = desk, note
        self.conductor = desk.conductor
        self.closing = False
        self._changed = asyncio.Event()
        self._shown: dict[int, tuple[Any, ...]] = {}
        self._said = time.monotonic()
        self._reading = 0  # bytes of messages that have not come whole

    def stir(self) -> None:
        """Something has changed: let all who wait look."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def receive(self, kind: str, raw: bytes) -> Reply | Waiting:
        """Of a message that has come whole."""
        before = self.conductor.steps
        reply = self.desk.receive(kind, raw, time.monotonic())
        if self.conductor.steps != before:
            self.stir()
        return reply

    async def answer(self, waiting: Waiting, gone: Awaitable[Any] | None = None) -> Reply | None:
        """The reply to one who waits; None where it has hung up."""
        hung_up = None if gone is None else asyncio.ensure_future(gone)
        try:
            while True:
                reply = self.desk.again(waiting, time.monotonic())
                if reply is None and self.closing:
                    reply = self.desk.again(waiting, waiting.until)
                if reply is not None:
                    return reply
                changed = asyncio.ensure_future(self._changed.wait())
                both = [changed] if hung_up is None else [changed, hung_up]
                await asyncio.wait(both, timeout=0.25, return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
                if hung_up is not None and hung_up.done():
                    self.desk.hung_up(waiting)
                    return None
        finally:
            if hung_up is not None:
                hung_up.cancel()

    async def watch(self) -> None:
        """Look at the clock until there is no further step and all who are there know it, or something has failed."""
        while not self.closing and not self.conductor.finished and self.conductor.failed is None:
            await asyncio.sleep(TICK)
            if self.conductor.tick(time.monotonic()):
                self.stir()
            self._tell()
        self.stir()
        end = time.monotonic()
        looking = [name for name, looks in self._owed(end, end) if looks]
        if looking:
            self.note(f"there is no further step: {', '.join(looking)} is still looking and will be told")  # fmt: skip
        while not self.closing and self._owed(time.monotonic(), end):
            await asyncio.sleep(TICK)
        await asyncio.sleep(2 * TICK)  # the last replies are on their way
        self._tell(last=True)
        self.closing = True
        self.stir()

    def _owed(self, now: float, end: float) -> list[tuple[str, bool]]:
        """Names of those that are still to be told that it has ended, and whether they look; those that take too long are not."""
        rounds, patience = self.conductor.rounds, LOOKING + 2.0 * self.conductor.rounds.usual
        looking = {n for n, asked in rounds.looking.items() if now - asked < patience}
        return [
            (member.name, number in looking)
            for number, member in rounds.members.items()
            if number not in self.conductor.told
            and (number in looking or (member.alive and now - end < FAREWELL))
        ]

    def _tell(self, last: bool = False) -> None:
        """Who has come and gone, and whose scalars are odd; every ten seconds how far it is."""
        members = self.conductor.rounds.members
        self._shown = {number: was for number, was in self._shown.items() if number in members}
        for number, member in members.items():
            now = (
                member.alive,
                member.drawn_in > 0,
                member.blank > 0,
                member.strikes,
                member.replays,
            )
            was = self._shown.get(number)
            if now == was or self.conductor.finished:
                continue
            self._shown[number] = now
            there = "is there" if member.alive else "does not answer, its rows are for others"
            odd = [
                f"{count} {what}"
                for count, what in (
                    (member.drawn_in, "rises drawn in"),
                    (member.blank, "parts without a finite loss"),
                    (member.strikes, f"messages that are no answer, the last {member.why}"),
                    (member.replays, "replays"),
                )
                if count
            ]
            self.note(": ".join([f"{member.name} {there}", *([", ".join(odd)] if odd else [])]))
        now_is = time.monotonic()
        if last or now_is - self._said > 10.0:
            self._said = now_is
            alive = sum(member.alive for member in self.conductor.rounds.members.values())
            self.note(f"step {self.conductor.steps}, {alive} workers")

    # ---------------------------------------------------------------------------------------- HTTP

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """The ASGI application."""
        assert scope["type"] == "http"
        reply = await self._http(scope, receive)
        if reply is None:
            return
        length = [(b"content-length", str(len(reply.body)).encode())]
        await send({"type": "http.response.start", "status": reply.status, "headers": length})
        await send({"type": "http.response.body", "body": reply.body})

    async def _http(self, scope: Any, receive: Any) -> Reply | None:
        kind = scope["path"].rpartition("/")[2]
        try:
            if scope["method"] != "POST":
                raise Refused(405, "POST only")
            raw = await asyncio.wait_for(self._body(receive, kind), BODY)
        except Refused as error:
            return Reply(error.status, str(error).encode())
        except TimeoutError:
            return Reply(408, b"too slow")
        if raw is None:
            return None
        reply = self.receive(kind, raw)
        return await self.answer(reply, receive()) if isinstance(reply, Waiting) else reply

    async def _body(self, receive: Any, kind: str) -> bytes | None:
        """What is sent; None where the other side has hung up before its end.

        What has no right session is read no further than `SMALL`; beyond it all that is being read shares `READING`.

        Raises:
            Refused: it is too large, or no message, or there is no room for it now.
        """
        most, whole, counted = self.desk.limit(kind), bytearray(), 0
        try:
            while True:
                message: dict[str, Any] = await receive()
                if message["type"] != "http.request":
                    return None
                whole += message.get("body", b"")
                if len(whole) > most:
                    raise Refused(413, "too large")
                if not message.get("more_body", False):
                    return bytes(whole)
                if len(whole) > SMALL:
                    self.desk.check_head(kind, bytes(whole[:ENVELOPE]), time.monotonic())
                    more = len(whole) - SMALL - counted
                    if self._reading + more > READING:
                        raise Refused(503, "too much is being read: try again later")
                    counted, self._reading = counted + more, self._reading + more
        finally:
            self._reading -= counted

    # -------------------------------------------------------------------------------------- folder

    async def folder(self, path: Path) -> None:
        """Answer messages that are files in `in/`, until the hall closes. A folder that is away for a while is waited for."""
        waiting: set[asyncio.Task[None]] = set()
        mail = Mail(path, self.note, time.monotonic())
        while not self.closing:
            for file, kind in mail.requests(time.monotonic()):
                task = asyncio.ensure_future(self._file(file, path / "out", kind))
                waiting.add(task)
                task.add_done_callback(waiting.discard)
                await asyncio.sleep(0)
            await asyncio.sleep(TICK / 2)
        if waiting:
            await asyncio.wait(waiting, timeout=2.0)

    async def _file(self, file: Path, out: Path, kind: str) -> None:
        with contextlib.suppress(OSError):
            with file.open("rb") as opened:
                try:
                    raw = opened.read(self.desk.limit(kind) + 1)
                    reply: Reply | Waiting | None = self.receive(kind, raw)
                except Refused as error:
                    reply = Reply(error.status, str(error).encode())
            file.unlink()
            if isinstance(reply, Waiting):
                reply = await self.answer(reply)
            assert reply is not None
            put(out / file.name, struct.pack("<H", reply.status) + reply.body)


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address.

    Raises:
        UserError: it is taken, or none of this machine's.
    """
    kind = socket.AF_INET6 if ":" in host else socket.AF_INET
    opened = socket.socket(kind)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind((host, port))
    except (OSError, OverflowError, UnicodeError) as error:
        opened.close()
        said = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"--port {port}: {host} cannot be listened at: {said}: choose another --port or --host"
        ) from None
    return opened


def server_of(hall: Hall, most: int) -> uvicorn.Server:
    """What speaks HTTP."""
    import uvicorn

    return uvicorn.Server(
        uvicorn.Config(
            hall,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=600,
            timeout_graceful_shutdown=3,
            limit_concurrency=4 * most + 64,
        )
    )


async def attend(
    hall: Hall,
    server: uvicorn.Server | None,
    at: socket.socket | Path,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Serve until the run is over, the hall is closed, or it is to stop."""
    watch = asyncio.ensure_future(hall.watch())
    if server is None:
        assert isinstance(at, Path)
        carry: asyncio.Future[Any] = asyncio.ensure_future(hall.folder(at))
    else:
        assert isinstance(at, socket.socket)
        carry = asyncio.ensure_future(server.serve(sockets=[at]))
    try:
        while not (watch.done() or carry.done() or stopped() or (server and server.should_exit)):
            await asyncio.wait([watch, carry], timeout=TICK, return_when=asyncio.FIRST_COMPLETED)
        if watch.done():
            watch.result()
    finally:
        hall.closing = True
        hall.stir()
        if server is not None:
            server.should_exit = True
        await carry
        await watch


# ------------------------------------------------------------------------------------------- command


def open_run(config: ServeConfig) -> Conductor:
    """The run of a hub, new or gone on with.

    Raises:
        UserError: something in the options or the folder cannot be used.
    """
    check_ranges(config)
    if config.workers > config.most_workers:
        raise UserError(
            f"--workers is {config.workers} and --most-workers {config.most_workers}: a step would wait for more workers than the "
            "hub takes: lower --workers or raise --most-workers"
        )
    folder = RunFolder(config.out)
    if not config.resume:
        check_new(folder.path, "go on with it with --resume or choose another --out")
        run = run_config(config, None)
        own = config.own_rows
        lanes = run.batch_size * run.num_samples
        if run.estimator == "activation" and lanes > MOST_COEFFICIENTS:
            raise UserError(
                f"--batch-size is {run.batch_size}: with {run.num_samples} samples a step has {lanes} directions, and a log "
                f"takes {MOST_COEFFICIENTS}"
            )
        deviations = config.deviations if config.deviations is not None else CLIPPED if own else 0.0
        bounded = not own and deviations > 0.0
        part = config.part or max(1, run.batch_size // (8 if bounded else 4))
        plan = Plan(
            rows=run.batch_size,
            part=run.batch_size if own else min(part, run.batch_size),
            private=own,
            patience=config.deadline or (30.0 if own else 2.0),
            quorum=config.workers,
            lanes=MOST_COEFFICIENTS if run.estimator == "activation" else None,
            bounded=bounded,
        )
        _check_share(plan)
        _check_room(plan, run.num_samples)
        return Conductor(
            folder, run, Terms(plan, deviations or None, config.hash_every), time.monotonic()
        )
    kept, terms = read_kept(folder)
    old = folder.read_config()
    run = run_config(config, old)
    for name, value, default, was in (
        ("own-rows", config.own_rows, False, terms.plan.private),
        ("part", config.part, None, terms.plan.part),
        ("deviations", config.deviations, None, terms.deviations or 0.0),
        ("hash-every", config.hash_every, 100, terms.hash_every),
    ):
        if value not in (default, was):
            raise UserError(
                f"{config.out}: --{name} is {was!r} in the run and {value!r} now: leave it out"
            )
    plan = replace(terms.plan, quorum=config.workers)
    if config.deadline is not None:
        plan = replace(plan, patience=config.deadline)
    _check_room(plan, run.num_samples)
    return Conductor(folder, run, replace(terms, plan=plan), time.monotonic(), kept)


def _check_room(plan: Plan, samples: int) -> None:
    """Refuse to wait for more clients than a step has room for.

    Raises:
        UserError: naming what is asked for and what there is room for.
    """
    room = plan.room(samples)
    if plan.private and room is not None and plan.quorum > room:
        raise UserError(
            f"--workers is {plan.quorum}: with --own-rows, --batch-size {plan.rows} and --num-samples {samples} a step has room "
            f"for {room} workers in a log ({plan.lanes} directions): lower --workers, --batch-size or --num-samples"
        )


def _check_share(plan: Plan) -> None:
    """Refuse parts so large that one of three workers has half of the rows, where outliers are to be drawn in.

    Raises:
        UserError: naming part and rows.
    """
    parts = -(-plan.rows // plan.part)
    if plan.bounded and plan.rows >= LEAST and 3 * ((parts - 1) // 2) < parts:
        advice = f"give --part {max(1, plan.rows // 8)}" if plan.rows > 4 else "give --batch-size 5 or more"  # fmt: skip
        raise UserError(
            f"--part is {plan.part}: of --batch-size {plan.rows} it makes {parts} parts, so that one of three workers has half of the "
            f"rows, which --deviations cannot bound: {advice}"
        )


def serve(config: ServeConfig, progress: Progress | None = None) -> Result:
    """Be a hub until the last step, Ctrl-C or SIGTERM; returns how it went.

    Raises:
        UserError: something in the options cannot be used, or the run cannot go on.
        KeyboardInterrupt: by Ctrl-C or SIGTERM; the run so far is kept.
    """
    note = (progress or Progress()).note
    key = read_key(config.key_file)
    at: socket.socket | Path
    held: socket.socket | IO[bytes]
    if config.folder is not None:
        at = Path(config.folder)
        held = hold_folder(at, note)
        where = f"--folder {config.folder}"
    else:
        check_installed()
        at = held = listen(config.host, config.port)
        host = f"[{config.host}]" if ":" in config.host else config.host
        where = f"http://{host}:{at.getsockname()[1]}"
    try:
        if isinstance(at, Path):
            open_folder(at)
        conductor = open_run(config)
        try:
            _serve(config, Desk(key, conductor, config.most_workers), at, where, note)
        finally:
            conductor.close()
    finally:
        held.close()
    if conductor.failed is not None:
        raise UserError(f"{config.out}: the run cannot go on: {conductor.failed}")
    status = conductor.status()
    return {"out": config.out, "log_bytes": conductor.folder.log.stat().st_size, **status}


def _serve(
    config: ServeConfig,
    desk: Desk,
    at: socket.socket | Path,
    where: str,
    note: Callable[[str], None],
) -> None:
    hall = Hall(desk, note)
    server = None if isinstance(at, Path) else server_of(hall, config.most_workers)
    note(
        f"step {desk.conductor.steps}; workers join with: justforward join {where} --model {desk.conductor.config.model} "
        "--data ..."
    )
    with stop_signals() as stop:
        asyncio.run(attend(hall, server, at, lambda: stop.asked))
    if not desk.conductor.finished and desk.conductor.failed is None:
        raise KeyboardInterrupt


def check_installed() -> None:
    """Refuse to listen at a port without the package that does it.

    Raises:
        UserError: uvicorn is not installed.
    """
    try:
        import uvicorn  # noqa: F401
    except ImportError:
        raise UserError(
            "serve: the package uvicorn is not installed: pip install 'justforward[serve]', or use a --folder"
        ) from None
