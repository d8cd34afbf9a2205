"""A run is a log of scalars: write it, read it, replay it.

Layout (all little-endian):

    "JFLOG 1\\n" | uint32 length | header: zlib-compressed JSON | uint32 CRC-32 of all before
    then 32-bit words: 26 bits of data, 6 bits of check

A data word is a float32 rounded to its upper 26 bits (18 significant bits), which is the number that training
itself uses: 4 bytes a plain step. Words whose exponent bits are all ones are marks: the number of coefficients,
the scales, decays, norms and rates of the parameter groups (written only when they change), and the seal. The check
of a word is six bits of a CRC-32 chained from the header through every word before it: one flipped bit always shows, in
its own word; other damage with odds of 63 in 64 there and in each word that follows. The seal, written on a
clean end, holds the whole of that CRC. A step is written by one system call: what a kill leaves behind is whole
steps and at most one torn one.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import struct
import zlib
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from justforward.durable import Pace, hold, sync_folder
from justforward.errors import UserError
from justforward.rules import parse

MAGIC = b"JFLOG 1\n"
_COUNT, _SCALES, _DECAYS, _SEAL, _NORMS, _RATES = range(6)
# Marks of numbers that parameter groups have, and what they are in a `Step`.
_GROUPS = {_SCALES: "scales", _DECAYS: "decays", _NORMS: "norms", _RATES: "rates"}
MOST_COEFFICIENTS = (1 << 13) - 1
# Where in the CRC the six bits of check stand: chosen so that each of a word's 26 bits changes at least one of them.
_CHECK = 14
_HEADER = {
    "noise": int,
    "base": str,
    "seed": int,
    "family": str,
    "groups": list,
    "rule": str,
    "rule_state": int,
    "momentum": list,
    "tensors": list,
}


def rounded(value: float) -> float:
    """`value` as the log keeps it: a float32 with 18 significant bits, to nearest even."""
    with np.errstate(over="ignore"):
        bits = int(np.float32(value).view(np.uint32))
    even = (bits + 31 + (bits >> 6 & 1)) & ~63
    # Rounding may carry the largest numbers to infinity, and a NaN anywhere: look before and after.
    if bits & 0x7F800000 == 0x7F800000 or even & 0x7F800000 == 0x7F800000:
        raise UserError(f"a coefficient of the step is {value}: lower lr")
    return float(np.uint32(even).view(np.float32))


@dataclass(frozen=True)
class Step:
    """What a step did to the weights, in a few scalars.

    Attributes:
        index: number of the step, from 0.
        coefficients: of this step's directions: theta <- theta + sum_k coefficients[k] z_k (times the group's
            scale). With momentum, later steps follow these directions again. Of a rule with moments (`rates`): this
            step's gradient estimate instead, sum_k coefficients[k] z_k.
        scales: per parameter group, what the coefficients are multiplied by.
        decays: per parameter group, the part of each weight taken away.
        rule_state: the rule's scalars after the step.
        loss: mean loss over all looks (not in the log: NaN when read from one).
        projected_grads: (L+ - L-) / (2 eps) of each direction (not in the log).
        forwards: passes over the batch it took to estimate (not in the log).
        norms: per parameter group, what a modified estimate divided its look by; () for the others. Replay does
            not need them, resuming does.
        rates: per parameter group, the learning rate of a rule with moments; () for the others.
    """

    index: int
    coefficients: tuple[float, ...]
    scales: tuple[float, ...] = (1.0,)
    decays: tuple[float, ...] = (0.0,)
    rule_state: tuple[float, ...] = ()
    loss: float = field(default=math.nan, compare=False)  # a NaN is unequal to itself
    projected_grads: tuple[float, ...] = ()
    forwards: int = 0
    norms: tuple[float, ...] = ()
    rates: tuple[float, ...] = ()


class _Words:
    """The chain of checked words, for writer and reader alike."""

    def __init__(self, state: int, header: dict[str, Any]) -> None:
        self.state = state
        self.count = 1
        count = len(header["groups"])
        self.sizes = (count, header["rule_state"])
        rates = (0.0,) * count if parse(header["rule"]).moments else ()
        self.groups: dict[int, tuple[float, ...]] = {
            _SCALES: (1.0,) * count,
            _DECAYS: (0.0,) * count,
            _NORMS: (),
            _RATES: rates,
        }

    def copy(self) -> _Words:
        """The chain at this point."""
        return copy(self)

    def next(self, data: int) -> int:
        """The word for 26 bits of data (which stand in the upper bits)."""
        self.state = zlib.crc32(struct.pack("<I", data), self.state)
        return data | self.state >> _CHECK & 63

    def mark(self, kind: int, argument: int = 0) -> int:
        return self.next((0xFF0 | kind) << 19 | argument << 6)

    def number(self, value: float) -> int:
        return self.next(int(np.float32(value).view(np.uint32)))


def _check_fits(step: Step, words: _Words) -> None:
    groups, rule_state = words.sizes
    norms = groups if step.norms or words.groups[_NORMS] else 0
    rates = len(words.groups[_RATES])
    for what, have, least, most in (
        ("directions", len(step.coefficients), 1, MOST_COEFFICIENTS),
        ("scales", len(step.scales), groups, groups),
        ("decays", len(step.decays), groups, groups),
        ("norms", len(step.norms), norms, norms),
        ("rates", len(step.rates), rates, rates),
        ("scalars of rule state", len(step.rule_state), rule_state, rule_state),
    ):
        if not least <= have <= most:
            allowed = f"{least}" if least == most else f"{least} to {most}"
            raise UserError(f"step {step.index} has {have} {what}: this log takes {allowed}")
    for value in (
        *step.coefficients,
        *step.scales,
        *step.decays,
        *step.norms,
        *step.rates,
        *step.rule_state,
    ):
        if rounded(value) != value:
            raise UserError(
                f"step {step.index} has the number {value}, which the log would keep as {rounded(value)}: "
                "round it before (trajectory.rounded)"
            )


def _encode(words: _Words, step: Step) -> bytes:
    _check_fits(step, words)
    out: list[int] = []
    if len(step.coefficients) != words.count:
        words.count = len(step.coefficients)
        out.append(words.mark(_COUNT, words.count))
    groups = {kind: getattr(step, name) for kind, name in _GROUPS.items()}
    for kind, values in groups.items():
        if values != words.groups[kind]:
            out.append(words.mark(kind))
            out.extend(words.number(v) for v in values)
    words.groups = groups
    out.extend(words.number(v) for v in (*step.coefficients, *step.rule_state))
    return struct.pack(f"<{len(out)}I", *out)


@dataclass(frozen=True)
class Log:
    """A log as read from disk.

    Attributes:
        path: the file.
        header: what it was made with.
        steps: all whole steps.
        size: bytes up to the last whole step.
        truncated: bytes after that: the torn end of a step whose writing was cut short.
        sealed: whether the run that wrote it ended cleanly.
    """

    path: Path
    header: dict[str, Any]
    steps: list[Step]
    size: int
    truncated: int
    sealed: bool
    _words: _Words


def read_log(path: str | os.PathLike[str]) -> Log:
    """Read and check a log.

    Raises:
        UserError: not a log, another format version, or damaged (naming the byte and the step). A torn end is
            not an error: `Log.truncated` says how many bytes were left out.
    """
    file = Path(path)
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: the log cannot be read: {error.strerror}") from None
    if not raw.startswith(MAGIC[:6]):
        raise UserError(
            f"{file}: not a justforward log (it does not start with {MAGIC[:6].decode()!r})"
        )
    if MAGIC.startswith(raw):
        raise UserError(f"{file}: the header is cut short: there is no step in it: remove it")
    if not raw.startswith(MAGIC):
        version = raw[6:16].split(b"\n")[0].decode("latin-1")
        raise UserError(
            f"{file}: log format {version!r}, this version reads format '1': use the version that wrote it"
        )
    header, at = _read_header(file, raw)
    words = _Words(zlib.crc32(raw[: at - 4]), header)
    steps, good, sealed = _read_steps(file, raw, at, words)
    return Log(file, header, steps, good, len(raw) - good, sealed, words)


def _read_header(file: Path, raw: bytes) -> tuple[dict[str, Any], int]:
    start = len(MAGIC) + 4
    length = struct.unpack("<I", raw[len(MAGIC) : start])[0] if len(raw) >= start else 0
    end = start + length
    if len(raw) < end + 4 or length == 0:
        raise UserError(
            f"{file}: the header is cut short or damaged: the log cannot be used: if it was longer, restore it from a copy"
        )
    if zlib.crc32(raw[:end]) != struct.unpack("<I", raw[end : end + 4])[0]:
        raise UserError(
            f"{file}: the header is damaged (its checksum differs): the log cannot be used: restore it from a copy"
        )
    try:
        header = json.loads(zlib.decompress(raw[start:end]))
    except (zlib.error, ValueError, RecursionError):
        header = None
    if (
        not isinstance(header, dict)
        or any(not isinstance(header.get(key), kind) for key, kind in _HEADER.items())
        or header["rule_state"] < 0
    ):
        raise UserError(f"{file}: the header is not one of a log: use the version that wrote it")
    try:
        parse(header["rule"])
    except UserError as error:
        raise UserError(f"{file}: {error}: use the version that wrote it") from None
    return header, end + 4


def _read_steps(file: Path, raw: bytes, at: int, words: _Words) -> tuple[list[Step], int, bool]:
    groups, state_size = words.sizes
    steps: list[Step] = []
    good, sealed = at, False
    kept = (words.state, words.count, words.groups)
    values = np.frombuffer(raw, "<u4", (len(raw) - at) // 4, at)
    floats: list[float] = (values & np.uint32(0xFFFFFFC0)).view(np.float32).tolist()
    data = (values & np.uint32(0xFFFFFFC0)).tolist()
    checks = (values & np.uint32(63)).tolist()
    place = 0
    total = len(data)

    def take(count: int) -> list[float] | None:
        nonlocal place
        # The words of a torn step are checked too: it could be a whole one whose count is damaged.
        for i in range(place, min(place + count, total)):
            words.state = zlib.crc32(struct.pack("<I", data[i]), words.state)
            if words.state >> _CHECK & 63 != checks[i]:
                raise UserError(
                    f"{file}: damaged at byte {at + 4 * i}, in step {len(steps)}: a checksum differs: the log cannot "
                    "be used: restore it from a copy"
                )
        if place + count > total:
            return None
        place += count
        return floats[place - count : place]

    while place < total:
        if data[place] >> 23 & 0xFF == 0xFF:
            kind, argument = data[place] >> 19 & 15, data[place] >> 6 & MOST_COEFFICIENTS
            before = words.state
            if take(1) is None:
                break
            if kind == _COUNT and argument:
                words.count = argument
            elif kind in _GROUPS:
                taken = take(groups)
                if taken is None:
                    break
                words.groups = {**words.groups, kind: tuple(taken)}
            elif kind == _SEAL:
                first = place
                if take(2) is None:
                    break
                if (data[first] >> 6, data[first + 1] >> 6) != (before >> 16, before & 0xFFFF):
                    raise UserError(
                        f"{file}: damaged before byte {at + 4 * first}: the seal differs: the log cannot be used: restore it from a copy"
                    )
                good, sealed = at + 4 * place, place == total and (len(raw) - at) % 4 == 0
                kept = (words.state, words.count, words.groups)
            else:
                raise UserError(
                    f"{file}: unknown mark {kind} at byte {at + 4 * place - 4}: written by a newer version?"
                )
            continue
        taken = take(words.count + state_size)
        if taken is None:
            break
        scales, decays, norms, rates = words.groups.values()
        own, state = tuple(taken[: words.count]), tuple(taken[words.count :])
        steps.append(Step(len(steps), own, scales, decays, state, norms=norms, rates=rates))
        good, kept = at + 4 * place, (words.state, words.count, words.groups)
    words.state, words.count, words.groups = kept
    return steps, good, sealed


class Writer:
    """Appends steps to a log; each is with the system when `append` returns, and on the disk at its `pace`.

    Holds the file against other writers, of this process or another, until it is closed.

    Args:
        path: the file.
        words: its chain so far.
        size: where its last whole step ends.
        found: bytes that it had when it was read.

    Attributes:
        pace: when steps are forced to the disk; a seal always is.
    """

    def __init__(self, path: Path, words: _Words, size: int, found: int) -> None:
        self.path = path
        self._words = words
        self._size = size
        self.pace = Pace()
        try:
            self._file = open(path, "r+b", buffering=0)  # noqa: SIM115 - lives as long as the run
        except OSError as error:
            raise UserError(f"{path}: the log cannot be written: {error.strerror}") from None
        try:
            hold(self._file, path)
            if os.fstat(self._file.fileno()).st_size != found:
                raise UserError(f"{path}: the log has changed since it was read: try again")
            self._torn = found > size
            self._cut()
        except (OSError, UserError) as error:
            self._file.close()
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path}: the log cannot be written: {error.strerror}") from None

    @classmethod
    def create(cls, path: str | os.PathLike[str], header: dict[str, Any]) -> Writer:
        """Start a log.

        Raises:
            UserError: the file exists, or cannot be written.
        """
        file = Path(path)
        packed = zlib.compress(json.dumps(header, separators=(",", ":")).encode(), 9)
        raw = MAGIC + struct.pack("<I", len(packed)) + packed
        # The chain starts from this checksum: a checksum over data and its own checksum is the same for any data.
        state = zlib.crc32(raw)
        raw += struct.pack("<I", state)
        created = False
        try:
            with open(file, "xb") as out:
                created = True
                out.write(raw)
                out.flush()
                os.fsync(out.fileno())
            sync_folder(file.absolute().parent)
        except FileExistsError:
            raise UserError(
                f"{file}: the log exists: resume it (resume=True) or choose another name"
            ) from None
        except OSError as error:
            if created:
                file.unlink(missing_ok=True)
            raise UserError(f"{file}: the log cannot be written: {error.strerror}") from None
        return cls(file, _Words(state, header), len(raw), len(raw))

    @classmethod
    def resume(cls, log: Log) -> Writer:
        """Go on after the last whole step of a log; a torn end is cut off.

        Raises:
            UserError: it cannot be written, another writer is at it, or it has changed since it was read.
        """
        return cls(log.path, log._words, log.size, log.size + log.truncated)

    @classmethod
    def rewind(cls, log: Log, steps: int) -> None:
        """Make a log that nobody writes to end after its first `steps` steps; it has all or those at any moment.

        Raises:
            UserError: it cannot be written, or another writer is at it.
        """
        short = log.path.with_name(f".{log.path.name}.rewound")
        try:
            with open(log.path, "rb") as old:
                hold(old, log.path)
                short.unlink(missing_ok=True)
                writer = cls.create(short, log.header)
                writer.pace = Pace(math.inf)
                try:
                    for step in log.steps[:steps]:
                        writer.append(step)
                    writer.close()
                    os.replace(short, log.path)
                finally:
                    writer._file.close()
                    with contextlib.suppress(OSError):
                        short.unlink(missing_ok=True)
            sync_folder(log.path.absolute().parent)
        except OSError as error:
            raise UserError(
                f"{log.path}: the log cannot be written: {error.strerror}; it is as it was"
            ) from None

    def append(self, step: Step) -> None:
        """Write one step.

        Raises:
            UserError: it could not be written (disk full); the log is as before.
        """
        self._write(lambda words: _encode(words, step), self.pace.due)

    def seal(self) -> None:
        """Write the whole checksum: the mark of a clean end. More steps may follow a seal."""

        def encode(words: _Words) -> bytes:
            crc = words.state
            marks = [
                words.mark(_SEAL),
                words.next((crc >> 16) << 6),
                words.next((crc & 0xFFFF) << 6),
            ]
            return struct.pack("<3I", *marks)

        self._write(encode, lambda: True)

    def _cut(self) -> None:
        """Cut a torn end off; what is written next stands behind the last whole step."""
        if self._torn:
            self._file.truncate(self._size)
            self._torn = False
        self._file.seek(self._size)

    def _write(self, encode: Callable[[_Words], bytes], due: Callable[[], bool]) -> None:
        words = self._words.copy()
        raw = encode(words)
        try:
            self._cut()
            self._torn = True
            written = self._file.write(raw)
            if written != len(raw):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if due():
                os.fsync(self._file.fileno())
            self._torn = False
        except OSError as error:
            with contextlib.suppress(OSError):  # then before the next step, or by who resumes
                self._cut()
            raise UserError(
                f"{self.path}: the log cannot be written: {error.strerror}; the step was not taken"
            ) from None
        self._words = words
        self._size += len(raw)

    def sync(self) -> None:
        """Force the log to the disk.

        Raises:
            UserError: it could not be done.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(f"{self.path}: the log cannot be written: {error.strerror}") from None

    def close(self) -> None:
        """Seal and close, also where there is no room for the seal; does nothing the second time."""
        if not self._file.closed:
            with self._file:
                self.seal()


def verify(path: str | os.PathLike[str]) -> Log:
    """Check every byte of a log against its checksums; the same as `read_log`, under the name of the intent."""
    return read_log(path)
