"""One connection from each process of a group to each other one, for messages of a few bytes: their length and they, nothing else.

The group at hand is asked once where everybody is. Who connects has to know a number that was told there, so that nobody else
who finds the port is listened to.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import selectors
import socket
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from justforward.errors import UserError

_LENGTH, _RANK = struct.Struct("<I"), struct.Struct("<I")
_TOKEN = 16
_SECONDS = 20.0  # to connect, once all have said where they are
_GREETING = 2.0  # seconds for who has connected to say who it is
_AT_ONCE = 1 << 20

Share = Callable[[bytes], list[bytes]]


class Sockets:
    """Connections to the other processes of a group, by number.

    Args:
        rank, size: the number of this process, and how many there are; all make one of these.
        share: tells all of them some bytes, and returns what each has told.

    Raises:
        UserError: one cannot reach another, naming both, the address and the reason.
    """

    def __init__(self, rank: int, size: int, share: Share) -> None:
        self._to: dict[int, socket.socket] = {}
        said = _tell(share, {"machine": _machine(), "address": _address()})
        alone = len({one["machine"] for one in said}) == 1
        own = "127.0.0.1" if alone else said[rank]["address"]
        family = socket.AF_INET6 if ":" in own else socket.AF_INET
        token = secrets.token_bytes(_TOKEN)
        with _listener(own, family, size) as listener:
            place = {"address": own, "port": listener.getsockname()[1], "token": token.hex()}
            places = _tell(share, place)
            failed = ""
            for other in range(rank + 1, size):
                at = (places[other]["address"], places[other]["port"])
                try:
                    made = socket.create_connection(at, timeout=_SECONDS)
                    made.sendall(bytes.fromhex(places[other]["token"]) + _RANK.pack(rank))
                    self._to[other] = made
                except OSError as error:
                    failed = (
                        failed
                        or f"worker {rank} cannot reach worker {other} at {at[0]}, port {at[1]}: {error}"
                    )
            self._accept(listener, token, rank)
        missing = [other for other in range(rank) if other not in self._to]
        if missing and not failed:
            failed = (
                f"worker {missing[0]} has not reached worker {rank} at {own} within {_SECONDS:g} s"
            )
        failures = [
            one["failed"] for one in _tell(share, {"failed": failed[:400]}) if one["failed"]
        ]
        if failures:
            self.close()
            raise UserError(
                f"{failures[0]}: workers need a TCP connection to each other, at any port: let them, or start them on one machine"
            )
        for made in self._to.values():
            made.setblocking(False)
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _accept(self, listener: socket.socket, token: bytes, rank: int) -> None:
        """Let those of lower number in, and nobody who does not know the token."""
        ends = time.monotonic() + _SECONDS
        while any(other not in self._to for other in range(rank)) and time.monotonic() < ends:
            try:
                listener.settimeout(max(ends - time.monotonic(), 0.01))
                made = listener.accept()[0]
            except OSError:
                continue
            other = self._greeted(made, token, ends)
            if other is not None and other < rank and other not in self._to:
                self._to[other] = made
            else:
                made.close()

    def _greeted(self, made: socket.socket, token: bytes, ends: float) -> int | None:
        """Who has connected; None for one who says nothing, or what nobody of the group would."""
        greeting = b""
        with contextlib.suppress(OSError):
            made.settimeout(max(min(_GREETING, ends - time.monotonic()), 0.01))
            while len(greeting) < _TOKEN + _RANK.size:
                part = made.recv(_TOKEN + _RANK.size - len(greeting))
                if not part:
                    return None
                greeting += part
        if len(greeting) < _TOKEN + _RANK.size or not hmac.compare_digest(greeting[:_TOKEN], token):
            return None
        return int(_RANK.unpack(greeting[_TOKEN:])[0])

    def exchange(
        self, raw: bytes, to: Iterable[int], sources: Sequence[int], ends: float
    ) -> tuple[dict[int, bytes], dict[int, str]]:
        """Send `raw` to some, and receive what some send, until `ends` (of `time.monotonic`).

        Returns:
            What came, by number; with whom it failed, and why ("timed out", or what the system says).
        """
        leaves = {rank: memoryview(_LENGTH.pack(len(raw)) + raw) for rank in to}
        comes = {rank: bytearray() for rank in sources}
        lost: dict[int, str] = {}
        with selectors.DefaultSelector() as waiting:
            for rank in {*leaves, *comes}:
                events = selectors.EVENT_WRITE * (rank in leaves) | selectors.EVENT_READ * (
                    rank in comes
                )
                waiting.register(self._to[rank], events, rank)
            while waiting.get_map():
                left = ends - time.monotonic()
                ready = waiting.select(max(left, 0.0))
                if not ready and left <= 0.0:
                    lost |= {key.data: "timed out" for key in waiting.get_map().values()}
                    break
                for key, mask in ready:
                    rank = key.data
                    try:
                        events = key.events
                        if mask & selectors.EVENT_WRITE:
                            leaves[rank] = leaves[rank][
                                self._to[rank].send(leaves[rank][:_AT_ONCE]) :
                            ]
                            events &= ~(0 if leaves[rank] else selectors.EVENT_WRITE)
                        if mask & selectors.EVENT_READ and self._receive(rank, comes[rank]):
                            events &= ~selectors.EVENT_READ
                    except BlockingIOError:
                        continue
                    except OSError as error:
                        lost[rank], events = str(error), 0
                    if not events:
                        waiting.unregister(key.fileobj)
                    elif events != key.events:
                        waiting.modify(key.fileobj, events, rank)
        return {r: bytes(got[_LENGTH.size :]) for r, got in comes.items() if r not in lost}, lost

    def _receive(self, rank: int, got: bytearray) -> bool:
        """Take what is there of a message, and nothing of the next; whether it is whole."""
        wanted = _LENGTH.size
        if len(got) >= wanted:
            wanted += _LENGTH.unpack_from(got)[0]
        if len(got) < wanted:
            part = self._to[rank].recv(min(wanted - len(got), _AT_ONCE))
            if not part:
                raise ConnectionError("ended")
            got += part
        return len(got) >= _LENGTH.size and len(got) == _LENGTH.size + _LENGTH.unpack_from(got)[0]

    def close(self) -> None:
        """Let go of all of them."""
        for made in self._to.values():
            made.close()
        self._to.clear()


def _listener(own: str, family: socket.AddressFamily, backlog: int) -> socket.socket:
    """At this address; at all where it is none of this machine's own, as behind a translation of addresses."""
    try:
        return socket.create_server((own, 0), family=family, backlog=backlog)
    except OSError:
        return socket.create_server(("", 0), family=family, backlog=backlog)


def _tell(share: Share, what: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(raw) for raw in share(json.dumps(what).encode())]


def _machine() -> str:
    """The same where processes reach each other at 127.0.0.1."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.stat('/proc/self/ns/net').st_ino}"
    except OSError:  # not Linux
        return socket.gethostname()


def _address() -> str:
    """Of this machine, as the one where the processes have come together sees it."""
    first = os.environ.get("MASTER_ADDR")
    if first:
        with contextlib.suppress(OSError):
            found = socket.getaddrinfo(
                first, int(os.environ.get("MASTER_PORT", "1")), type=socket.SOCK_DGRAM
            )[0]
            with socket.socket(found[0], socket.SOCK_DGRAM) as asked:
                asked.connect(found[4])  # nothing is sent: the system says which way it would go
                address: str = asked.getsockname()[0]
                if not address.startswith("127.") and address != "::1":
                    return address
    with contextlib.suppress(OSError):
        return socket.gethostbyname(socket.gethostname())
    return "127.0.0.1"
