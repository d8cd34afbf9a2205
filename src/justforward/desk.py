"""Where messages to the hub are let in or turned away, whatever carried them.

What is turned away has changed nothing, and is told nothing but why. What costs memory is bounded: the size of a message by its
kind, sessions by number, and one that nobody has proved to know the key for takes none.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import struct
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256

from justforward.conductor import Conductor
from justforward.errors import UserError
from justforward.wire import (
    COUNTER,
    ENVELOPE,
    PROOF,
    SESSION,
    Letter,
    Order,
    Refused,
    Turn,
    seal_reply,
    unseal,
    unzipped,
)

HOLD = 10.0  # seconds that a worker is kept waiting for something to do, at most
FRESH = 60.0  # seconds in which a session must be begun
CHUNK = 1 << 20  # bytes of the log in one reply
MOST_HEADER = 1 << 22
MOST_NAME = 64
NAMES = 64  # workers that are remembered, for each that may be there
_OFFSET = struct.Struct("<Q")


@dataclass
class _Session:
    counter: int
    proof: bytes
    heard: float
    worker: int | None = None


@dataclass(frozen=True)
class Reply:
    """What goes back: HTTP's number, and bytes."""

    status: int
    body: bytes


@dataclass(frozen=True)
class Waiting:
    """A worker that there is nothing to tell yet."""

    worker: int
    step: int
    proof: bytes
    until: float
    number: int = 0  # of its requests


class Desk:
    """Lets messages in.

    Args:
        key: that all share.
        conductor: what they are for.
        most: workers at a time.
    """

    def __init__(self, key: bytes, conductor: Conductor, most: int) -> None:
        self.key, self.conductor, self.most = key, conductor, most
        self._boot = secrets.token_bytes(32)
        self._issued = 0
        self._sessions: dict[bytes, _Session] = {}
        self._numbers: dict[str, int] = {}
        self._next = 0  # number of the next worker that comes
        self._turns: dict[int, int] = {}  # of each worker, how often it has asked
        self._kinds: dict[str, Callable[[_Session, Letter, float], bytes | Waiting]] = {
            "run": self._run,
            "log": self._log,
            "join": self._join,
            "turn": self._turn,
            "leave": self._leave,
            "status": self._status,
        }

    def limit(self, kind: str) -> int:
        """Bytes that a message of this kind may have.

        Raises:
            Refused: there is no such kind.
        """
        if kind == "hello":
            return 0
        if kind not in self._kinds:
            raise Refused(404, "no such thing")
        plan, config = self.conductor.terms.plan, self.conductor.config
        rises = 4 * plan.rows * config.num_samples
        sizes = {"log": _OFFSET.size, "join": MOST_HEADER, "turn": 256 + 60 * plan.rows + rises}
        return ENVELOPE + sizes.get(kind, 0)

    def check_head(self, kind: str, head: bytes, now: float) -> None:
        """Turn away a long message by its beginning, where this alone shows that it is none.

        Raises:
            Refused: its session was not made here, or it is older than another.
        """
        if kind == "hello" or len(head) < ENVELOPE - PROOF:
            return
        session, counter = head[:SESSION], COUNTER.unpack_from(head, SESSION)[0]
        known = self._sessions.get(session)
        if known is None:
            self._check_new(session, now)
        elif counter < known.counter:
            raise Refused(401, "an old message")

    def receive(self, kind: str, raw: bytes, now: float) -> Reply | Waiting:
        """Answer a message, or say who waits for an answer."""
        try:
            if len(raw) > self.limit(kind):
                raise Refused(413, "too large")
            if kind == "hello":
                return Reply(200, self.conductor.run + self._token(now))
            letter = unseal(self.key, self.conductor.run, kind, raw)
            session = self._session(letter, now)
        except Refused as error:
            return Reply(error.status, str(error).encode())
        try:
            body = self._kinds[kind](session, letter, now)
        except Refused as error:
            return self._sealed(letter.proof, error.status, str(error).encode())
        except UserError as error:
            return self._sealed(letter.proof, 409, str(error).encode())
        if isinstance(body, Waiting):
            return body
        return self._sealed(letter.proof, 200, body)

    def again(self, waiting: Waiting, now: float) -> Reply | None:
        """The answer to one who waits, if there is one by now; after a while that there is none."""
        if waiting.worker not in self.conductor.rounds.members:
            return self._sealed(
                waiting.proof, 403, b"join first"
            )  # it has left by another connection
        try:
            order = self.conductor.order(waiting.worker, waiting.step, now)
        except UserError as error:
            return self._sealed(waiting.proof, 409, str(error).encode())
        if order is None and now < waiting.until:
            return None
        return self._sealed(waiting.proof, 200, (order or Order()).pack())

    def hung_up(self, waiting: Waiting) -> None:
        """One who waits has gone, unless it has asked again since: then an old connection has ended late."""
        if self._turns.get(waiting.worker) == waiting.number:
            self.conductor.leave(waiting.worker)

    def _sealed(self, proof: bytes, status: int, body: bytes) -> Reply:
        return Reply(status, seal_reply(self.key, proof, status, body))

    # ------------------------------------------------------------------------------------ sessions

    def _token(self, now: float) -> bytes:
        """A session that may be begun within a minute: when it was made, and a proof that it was made here."""
        self._issued = max(self._issued + 1, int(now * 1e6))
        at = struct.pack("<Q", self._issued)
        return at + hmac.new(self._boot, at, sha256).digest()[: SESSION - 8]

    def _session(self, letter: Letter, now: float) -> _Session:
        known = self._sessions.get(letter.session)
        if known is not None:
            if letter.counter == known.counter and letter.proof == known.proof:
                known.heard = now  # sent again: it is answered again
                return known
            if letter.counter <= known.counter:
                raise Refused(401, "an old message")
            known.counter, known.proof, known.heard = letter.counter, letter.proof, now
            return known
        self._check_new(letter.session, now)
        self._make_room(now)
        self._sessions[letter.session] = session = _Session(letter.counter, letter.proof, now)
        return session

    def _check_new(self, session: bytes, now: float) -> None:
        at, tag = session[:8], session[8:]
        age = now - struct.unpack("<Q", at)[0] / 1e6
        good = hmac.new(self._boot, at, sha256).digest()[: SESSION - 8]
        if not hmac.compare_digest(tag, good) or age > FRESH:
            raise Refused(401, "no such session")

    def _make_room(self, now: float) -> None:
        """Forget sessions of nobody; those that could begin anew are kept, so that nothing old is taken for new."""
        if len(self._sessions) < 2 * self.most + 16:
            return
        for session, known in list(self._sessions.items()):
            if now - known.heard > FRESH and not self._at_work(known):
                del self._sessions[session]
        if len(self._sessions) >= 2 * self.most + 16:
            raise Refused(429, "too many sessions: try again in a minute")

    def _at_work(self, session: _Session) -> bool:
        return session.worker is not None and self.conductor.rounds.members[session.worker].alive

    # --------------------------------------------------------------------------------------- kinds

    def _run(self, session: _Session, letter: Letter, now: float) -> bytes:
        return json.dumps(self.conductor.info()).encode()

    def _log(self, session: _Session, letter: Letter, now: float) -> bytes:
        if len(letter.payload) != _OFFSET.size:
            raise Refused(400, "not an offset")
        (offset,) = _OFFSET.unpack(letter.payload)
        try:
            with self.conductor.folder.log.open("rb") as file:
                file.seek(min(offset, file.seek(0, os.SEEK_END)))
                return file.read(CHUNK)
        except FileNotFoundError:
            return b""

    def _join(self, session: _Session, letter: Letter, now: float) -> bytes:
        said = unzipped(letter.payload)
        name = said.get("name")
        if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= MOST_NAME:
            raise Refused(400, f"a worker needs a name of 1 to {MOST_NAME} letters")
        if session.worker is None:
            others = {s.worker for s in self._sessions.values() if self._at_work(s)}
            number = self._numbers.get(name, self._next)
            if len(others | {number}) > self.most:
                raise Refused(429, f"there are {len(others)} workers already: the hub takes {self.most}")  # fmt: skip
            if name not in self._numbers:
                self._make_names()
            self.conductor.join(said, number, name)
            self._numbers[name] = number
            self._next = max(self._next, number + 1)
            for other in self._sessions.values():
                if other.worker == number:
                    other.worker = None  # its session before
            session.worker = number
        return b""

    def _make_names(self) -> None:
        """Forget workers that have come and gone, where as many as are remembered have."""
        if len(self._numbers) < NAMES * self.most:
            return
        forgotten = {n for n in self._numbers.values() if self.conductor.forget(n)}
        self._numbers = {name: n for name, n in self._numbers.items() if n not in forgotten}
        for session in self._sessions.values():
            if session.worker in forgotten:
                session.worker = None
        for number in forgotten:
            self._turns.pop(number, None)
        if len(self._numbers) >= NAMES * self.most:
            raise Refused(
                429,
                f"of the {len(self._numbers)} workers that have been there most have sent what is no answer, and the hub remembers "
                "no more: see its status, and start it again with --resume",
            )

    def _worker(self, session: _Session) -> int:
        if session.worker is None:
            raise Refused(403, "join first")
        return session.worker

    def _turn(self, session: _Session, letter: Letter, now: float) -> bytes | Waiting:
        worker = self._worker(session)
        self._turns[worker] = number = self._turns.get(worker, 0) + 1
        try:
            turn = Turn.unpack(letter.payload)
        except UserError as error:
            self.conductor.strike(worker, str(error))
            raise Refused(400, str(error)) from None
        order = self.conductor.turn(worker, turn, now)
        if order is None:
            return Waiting(worker, turn.step, letter.proof, now + HOLD, number)
        return order.pack()

    def _leave(self, session: _Session, letter: Letter, now: float) -> bytes:
        self.conductor.leave(self._worker(session))
        session.worker = None
        return b""

    def _status(self, session: _Session, letter: Letter, now: float) -> bytes:
        return json.dumps(self.conductor.status()).encode()
