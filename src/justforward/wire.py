"""Messages between hub and workers: bytes, each with a proof of the shared key.

A request is an envelope around a payload:

    session (16 bytes) | counter (uint32) | payload | HMAC-SHA256, its first 16 bytes

The proof is over the run, the kind of the message, session, counter and payload. A session is a number that the hub has made,
good for one worker and one life of the hub; counters only rise. So an old message is refused, and one of another run, or
kind, too. A reply has the proof over the request's own proof and the reply, so that it answers this request and no other.
Nothing is encrypted: that is for what carries the bytes (TLS, a tunnel).
"""

from __future__ import annotations

import hmac
import json
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from justforward.errors import UserError
from justforward.sights import Sight
from justforward.trajectory import Step

PROTOCOL = 3
KEY_VARIABLE = "JUSTFORWARD_KEY"
LEAST_KEY = 16
SESSION, PROOF = 16, 16
COUNTER = struct.Struct("<I")
ENVELOPE = SESSION + COUNTER.size + PROOF
# Index; how many coefficients, groups with scales and decays, scalars of state, norms, rates.
_STEP = struct.Struct("<QHHHHH")
# State of the history; step; attempt; flags.
_TURN = struct.Struct("<8sQHB")
# What it says; steps; then step, attempt, rows, samples, parts of the work.
_ORDER = struct.Struct("<BHQHIHH")
_PART = struct.Struct("<II")
_HASHED, _BLANK = 1, 2
MOST_JSON = 1 << 25


class Refused(Exception):
    """A message that is not accepted, and has changed nothing.

    Attributes:
        status: HTTP's number for it.
    """

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


# ------------------------------------------------------------------------------------------------ key


def read_key(file: str | None) -> bytes:
    """The shared key: of a file, or of the variable JUSTFORWARD_KEY; white space around it does not count.

    Raises:
        UserError: there is none, it cannot be read, or it is shorter than 16 bytes.
    """
    make = "make one with: python -c 'import secrets; print(secrets.token_hex())' > FILE"
    if file is None:
        key, where = os.environ.get(KEY_VARIABLE, "").encode().strip(), KEY_VARIABLE
        if not key:
            raise UserError(f"there is no key: give --key-file FILE, or set {KEY_VARIABLE}; {make}")
    else:
        where = f"--key-file {file}"
        try:
            key = Path(file).read_bytes().strip()
        except OSError as error:
            raise UserError(f"{where}: cannot be read: {error.strerror}; {make}") from None
    if len(key) < LEAST_KEY:
        raise UserError(
            f"{where}: a key of {len(key)} bytes: it must have at least {LEAST_KEY}; {make}"
        )
    return key


def _proof(key: bytes, *parts: bytes) -> bytes:
    """Of parts, each with its length before it, so that no two lists of parts are alike."""
    whole = b"".join(struct.pack("<Q", len(part)) + part for part in parts)
    return hmac.new(key, whole, sha256).digest()[:PROOF]


@dataclass(frozen=True)
class Letter:
    """A request whose proof was right.

    Attributes:
        session: of whom.
        counter: its number in the session.
        payload: what is said.
        proof: its own, which the reply is bound to.
    """

    session: bytes
    counter: int
    payload: bytes
    proof: bytes


def seal(key: bytes, run: bytes, kind: str, session: bytes, counter: int, payload: bytes) -> bytes:
    """A request as bytes; its proof is the last 16 of them."""
    head = session + COUNTER.pack(counter)
    return head + payload + _proof(key, b"request", run, kind.encode(), head, payload)


def unseal(key: bytes, run: bytes, kind: str, raw: bytes) -> Letter:
    """The request that `seal` made.

    Raises:
        Refused: it is too short, or its proof is not that of this key, run and kind.
    """
    if len(raw) < ENVELOPE:
        raise Refused(400, f"{len(raw)} bytes: too few for a message")
    head, payload, proof = (
        raw[:-PROOF][: ENVELOPE - PROOF],
        raw[ENVELOPE - PROOF : -PROOF],
        raw[-PROOF:],
    )
    if not hmac.compare_digest(proof, _proof(key, b"request", run, kind.encode(), head, payload)):
        raise Refused(401, "the proof is not that of this key and run")
    return Letter(head[:SESSION], COUNTER.unpack(head[SESSION:])[0], payload, proof)


def seal_reply(key: bytes, proof: bytes, status: int, payload: bytes) -> bytes:
    """A reply to the request with this proof."""
    return payload + _proof(key, b"reply", proof, struct.pack("<H", status), payload)


def unseal_reply(key: bytes, proof: bytes, status: int, raw: bytes) -> bytes | None:
    """What `seal_reply` was given; None if it is not from the hub, or answers something else."""
    payload, own = raw[:-PROOF], raw[-PROOF:]
    good = _proof(key, b"reply", proof, struct.pack("<H", status), payload)
    return payload if hmac.compare_digest(own, good) else None


# ---------------------------------------------------------------------------------------------- steps


def pack_step(step: Step) -> bytes:
    """A step as bytes: 18 and 4 for each number; exact, since its numbers are float32."""
    numbers = (*step.coefficients, *step.scales, *step.decays, *step.rule_state)
    numbers += (*step.norms, *step.rates)
    sizes = map(len, (step.coefficients, step.scales, step.rule_state, step.norms, step.rates))
    return _STEP.pack(step.index, *sizes) + struct.pack(f"<{len(numbers)}f", *numbers)


def unpack_step(raw: bytes, at: int) -> tuple[Step, int]:
    """The step that starts there, and where it ends.

    Raises:
        struct.error: it is cut short.
    """
    index, own, groups, state, norms, rates = _STEP.unpack_from(raw, at)
    at += _STEP.size
    numbers: list[tuple[float, ...]] = []
    for count in (own, groups, groups, state, norms, rates):
        numbers.append(struct.unpack_from(f"<{count}f", raw, at))
        at += 4 * count
    own_numbers, scales, decays, rule_state, norm, rate = numbers
    return Step(index, own_numbers, scales, decays, rule_state, norms=norm, rates=rate), at


class History:
    """A digest of all steps so far: two that agree in it have taken the same."""

    def __init__(self, steps: Sequence[Step] = ()) -> None:
        self._state = b""
        for step in steps:
            self.add(step)

    def add(self, step: Step) -> None:
        """Take one more step into it."""
        self._state = sha256(self._state + pack_step(step)).digest()

    @property
    def digest(self) -> bytes:
        """8 bytes."""
        return self._state[:8] or bytes(8)


# ---------------------------------------------------------------------------------------------- turns


@dataclass(frozen=True)
class Turn:
    """What a worker says: how far it is, what it has seen; and it asks for what there is to do.

    Attributes:
        step: how many steps it has taken.
        history: digest of them.
        attempt: of the round that the sights are of.
        sights: what it has seen of step `step`.
        blank: rows (first, count) of which it has no finite loss.
        weights: sha256 of its weights after `step` steps, where that is due.
    """

    step: int
    history: bytes
    attempt: int = 0
    sights: tuple[Sight, ...] = ()
    blank: tuple[tuple[int, int], ...] = ()
    weights: bytes | None = None

    def pack(self) -> bytes:
        """As bytes: 19, and those of the sights (43 and 4 a rise each)."""
        flags = (_HASHED if self.weights else 0) | (_BLANK if self.blank else 0)
        out = _TURN.pack(self.history, self.step, self.attempt, flags) + (self.weights or b"")
        if self.blank:
            out += struct.pack("<H", len(self.blank))
            out += b"".join(_PART.pack(*part) for part in self.blank)
        for sight in self.sights:
            raw = sight.pack()
            out += struct.pack("<I", len(raw)) + raw
        return out

    @classmethod
    def unpack(cls, raw: bytes) -> Turn:
        """What `pack` made.

        Raises:
            UserError: it was not made by `pack`.
        """
        try:
            history, step, attempt, flags = _TURN.unpack_from(raw)
            at = _TURN.size
            weights, blank = None, []
            if flags & _HASHED:
                weights, at = raw[at : at + 32], at + 32
            if flags & _BLANK:
                (count,) = struct.unpack_from("<H", raw, at)
                at += 2
                blank = [_PART.unpack_from(raw, at + _PART.size * i) for i in range(count)]
                at += _PART.size * count
            sights = []
            while at < len(raw):
                (size,) = struct.unpack_from("<I", raw, at)
                sights.append(Sight.unpack(raw[at + 4 : at + 4 + size]))
                at += 4 + size
        except struct.error as error:
            raise UserError(f"a turn of {len(raw)} bytes: {error}") from None
        if at != len(raw) or flags & ~(_HASHED | _BLANK):
            raise UserError(f"a turn of {len(raw)} bytes: not those of what it says it holds")
        return cls(step, history, attempt, tuple(sights), tuple(blank), weights)


GO, DONE, REPLAY, BEHIND = range(4)


@dataclass(frozen=True)
class Work:
    """What a worker is to look at.

    Attributes:
        step: index of the step.
        attempt: how often its round was opened anew.
        of: rows of the step's batch.
        samples: how many the step has.
        parts: rows (first, count), each to be looked at by itself.
    """

    step: int
    attempt: int
    of: int
    samples: int
    parts: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Order:
    """What the hub says: the steps that the worker has not taken yet, and what to look at then.

    Attributes:
        says: GO; DONE: there is no further step; REPLAY: start again from the base and the log; BEHIND: there are too many
            steps to be told here, read the log on.
        steps: to take now.
        work: to look at after them; None: ask again.
    """

    says: int = GO
    steps: tuple[Step, ...] = ()
    work: Work | None = None

    def pack(self) -> bytes:
        """As bytes: 21, the steps', and 8 a part."""
        work = self.work or Work(0, 0, 0, 0, ())
        out = _ORDER.pack(
            *(self.says, len(self.steps), work.step, work.attempt, work.of, work.samples),
            len(work.parts),
        )
        out += b"".join(_PART.pack(*part) for part in work.parts)
        return out + b"".join(map(pack_step, self.steps))

    @classmethod
    def unpack(cls, raw: bytes) -> Order:
        """What `pack` made.

        Raises:
            struct.error: it was not.
        """
        says, count, step, attempt, of, samples, parts = _ORDER.unpack_from(raw)
        at = _ORDER.size
        own = tuple(_PART.unpack_from(raw, at + _PART.size * i) for i in range(parts))
        at += _PART.size * parts
        steps = []
        for _ in range(count):
            taken, at = unpack_step(raw, at)
            steps.append(taken)
        work = Work(step, attempt, of, samples, own) if own else None
        return cls(says, tuple(steps), work)


# -------------------------------------------------------------------------------------------- joining


def zipped(said: dict[str, Any]) -> bytes:
    """JSON, compressed: what a worker says of itself when it joins."""
    return zlib.compress(json.dumps(said, separators=(",", ":")).encode(), 9)


def unzipped(raw: bytes) -> dict[str, Any]:
    """What `zipped` was given.

    Raises:
        Refused: it was not made by `zipped`, or is larger than 32 MiB.
    """
    try:
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(raw, MOST_JSON)
        said = json.loads(text) if not unpacker.unconsumed_tail else None
    except (zlib.error, ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise Refused(400, "not what a worker says when it joins")
    return said
