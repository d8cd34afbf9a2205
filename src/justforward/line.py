"""A worker's line to the hub: over HTTP, or as files in a shared folder. Goes on trying where the hub is not there.

Both carry the very same bytes (`wire`). The folder needs no port: a request is a file in `in/`, its reply one of the same
name in `out/`.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import justforward
from justforward.errors import UserError
from justforward.wire import PROOF, PROTOCOL, SESSION, seal, unseal_reply

PATIENCE = 40.0  # seconds that a reply may take; the hub keeps nobody waiting for longer than 10
# The largest that a hub gives: 256 steps of as many scalars as a log takes, a status of thousands of workers.
MOST_REPLY = 1 << 24
_TOO_LONG = f"what answers there is no hub: its reply is longer than {MOST_REPLY >> 20} MiB: check the address"
_POLL = 0.05
_GREETINGS = 3  # the hub may be started anew in between


class Unreachable(Exception):
    """The hub is not there; it may be, later."""


class HubGone(UserError):
    """The hub has not answered for as long as it was to be waited for."""


class SessionLost(Exception):
    """The hub does not know this session (any more): join again."""


class Link(Protocol):
    """What carries a request and its reply."""

    def post(self, kind: str, raw: bytes) -> tuple[int, bytes]:
        """Status (HTTP's) and body of the reply; raises Unreachable."""
        ...

    def close(self) -> None:
        """Let go."""
        ...


class HttpLink:
    """One connection that is kept.

    Args:
        url: http://HOST:PORT or https://..., with nothing behind it or a path where a proxy has put the hub.

    Raises:
        UserError: it is no such address, or the package urllib3 is not installed.
    """

    def __init__(self, url: str) -> None:
        try:
            import urllib3
        except ImportError:
            raise UserError(
                "join: the package urllib3 is not installed: pip install 'justforward[serve]'"
            ) from None
        self._prefix = self._checked(url)
        self._errors = urllib3.exceptions.HTTPError
        # What the library adds to every request by itself, and the hub has no use for.
        skipped = urllib3.util.SKIP_HEADER
        self._headers = {"User-Agent": skipped, "Accept-Encoding": skipped}
        self._pool = urllib3.connection_from_url(
            url, maxsize=1, retries=False, timeout=urllib3.Timeout(connect=5.0, read=PATIENCE)
        )

    @staticmethod
    def _checked(url: str) -> str:
        """The path of an address that could be a hub's."""
        import urllib3

        wrong, host = "", ""
        try:
            parsed = urllib3.util.parse_url(url)
            host = parsed.host or ""
            host.encode("idna")
        except (
            ValueError,
            urllib3.exceptions.HTTPError,
        ) as error:  # UnicodeError, LocationParseError
            wrong = f": {_short(str(error))}"
        if (
            wrong
            or not host
            or not url.startswith(("http://", "https://"))
            or any(letter.isspace() or not letter.isprintable() for letter in url)
        ):
            raise UserError(
                f"{url!r} is not the address of a hub{wrong}: give http://HOST:PORT, with a port from 0 to 65535"
            )
        return parsed.path or ""

    def post(self, kind: str, raw: bytes) -> tuple[int, bytes]:
        """See `Link`."""
        whole = bytearray()
        try:
            reply = self._pool.urlopen(
                *("POST", f"{self._prefix.rstrip('/')}/{kind}"),
                body=raw,
                headers=self._headers,
                preload_content=False,
            )
            try:
                # As it comes: nobody was asked to compress it, and what is compressed has no bound.
                for part in reply.stream(1 << 16, decode_content=False):
                    whole += part
                    if len(whole) > MOST_REPLY:
                        reply.close()
                        raise UserError(_TOO_LONG)
            finally:
                reply.release_conn()
        except self._errors as error:
            raise Unreachable(str(error)) from None
        return reply.status, bytes(whole)

    def close(self) -> None:
        """See `Link`."""
        self._pool.close()


class FolderLink:
    """Files in a folder that both can write.

    Raises:
        UserError: it is no hub's.
    """

    def __init__(self, folder: str | Path) -> None:
        self._in, self._out = Path(folder) / "in", Path(folder) / "out"
        if not (self._in.is_dir() and self._out.is_dir()):
            raise UserError(
                f"--folder {folder}: no hub has opened it: start the hub with the same folder first"
            )

    def post(self, kind: str, raw: bytes) -> tuple[int, bytes]:
        """See `Link`."""
        name = f"{kind}-{secrets.token_hex(16)}"
        request, reply = self._in / name, self._out / name
        try:
            put(request, raw)
            until = time.monotonic() + PATIENCE
            while not reply.exists():
                if time.monotonic() > until:
                    raise Unreachable("there was no reply")
                time.sleep(_POLL)
            with reply.open("rb") as opened:
                found = opened.read(MOST_REPLY + 3)
            if len(found) > MOST_REPLY + 2:
                raise UserError(_TOO_LONG)
            return struct.unpack_from("<H", found)[0], found[2:]
        except (OSError, struct.error) as error:
            raise Unreachable(str(error)) from None
        finally:
            for file in (request, reply):
                with contextlib.suppress(OSError):
                    file.unlink()

    def close(self) -> None:
        """See `Link`."""


def put(path: Path, content: bytes) -> None:
    """A file that is there whole or not at all."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_bytes(content)
    os.replace(temporary, path)


class Line:
    """Signed requests of one worker, and replies that are the hub's.

    Args:
        link: what carries them.
        key: that all share.
        wait: seconds to go on trying where the hub is not there.
        note: called with a sentence when it is not.
    """

    def __init__(
        self, link: Link, key: bytes, wait: float, note: Callable[[str], None] | None = None
    ) -> None:
        self.link, self.key, self.wait = link, key, wait
        self._note = note or (lambda text: None)
        self._run, self._session, self._counter = b"", b"", 0

    def open(self) -> None:
        """Begin a session.

        Raises:
            UserError: what answers is no hub, or of another run than before.
            HubGone: nothing answers.
        """
        status, body = self._post("hello", b"", lambda status, body: status == 200)
        if status != 200 or len(body) != 16 + SESSION:
            raise UserError("what answers there is no hub of this version: check the address")
        if self._run and body[:16] != self._run:
            raise UserError("the hub there has another run now: join that one from the start")
        self._run, self._session, self._counter = body[:16], body[16:], 0

    def call(self, kind: str, payload: bytes = b"") -> bytes:
        """What the hub says to this.

        Raises:
            SessionLost: it does not know the session: `open` another.
            UserError: it refuses, saying why.
            HubGone: nothing answers.
        """
        self._counter += 1
        raw = seal(self.key, self._run, kind, self._session, self._counter, payload)
        # The same bytes again are answered again, and counted once.
        proof = raw[-PROOF:]
        status, body = self._post(
            kind, raw, lambda status, body: unseal_reply(self.key, proof, status, body) is not None
        )
        own = unseal_reply(self.key, proof, status, body)
        if own is None:
            if status == 401:
                raise SessionLost(body.decode(errors="replace")[:200])
            raise UserError(
                f"the hub's reply to {kind!r} has not the proof of the key (status {status}): check key and address"
            )
        if status == 403:
            raise SessionLost(own.decode())
        if status != 200:
            raise UserError(f"the hub refuses: {own.decode(errors='replace')}")
        return own

    def ask(self, kind: str, payload: bytes = b"") -> Any:
        """`call`, of a reply that is JSON."""
        return json.loads(self.call(kind, payload))

    def _post(
        self, kind: str, raw: bytes, proved: Callable[[int, bytes], bool]
    ) -> tuple[int, bytes]:
        """The reply; goes on trying while nothing answers, or what does is not the hub and says "later"."""
        pause, since, said = 0.1, time.monotonic(), False
        while True:
            try:
                status, body = self.link.post(kind, raw)
                if not proved(status, body) and _later(status):
                    raise Unreachable(f"status {status}: {body[:200].decode(errors='replace')}")
            except Unreachable as error:
                waited = time.monotonic() - since
                if waited + pause > self.wait:
                    raise HubGone(
                        f"the hub does not answer ({_short(str(error))}), for {waited:.0f} s now: check that it runs"
                    ) from None
                if not said and waited > 0.5:
                    self._note("the hub does not answer: waiting for it")
                    said = True
                time.sleep(pause)
                pause = min(2.0 * pause, 2.0)
            else:
                return status, body


def _later(status: int) -> bool:
    """Whether who says so may not say it again: a proxy whose hub is away, a hub that has too much to do."""
    return status in (408, 429) or status >= 500


def greet(line: Line) -> dict[str, Any]:
    """What the hub tells of its run.

    Raises:
        UserError: the key is not the hub's, or the hub is of another version.
    """
    told: dict[str, Any] | None = None
    for _ in range(_GREETINGS):
        line.open()
        with contextlib.suppress(SessionLost):
            told = line.ask("run")
            break
    if told is None:
        raise UserError("the hub does not take this key: check that it is the hub's")
    for what, theirs, ours in (
        ("protocol", told["protocol"], PROTOCOL),
        ("version of justforward", told["version"], justforward.__version__),
    ):
        if theirs != ours:
            raise UserError(
                f"the hub's {what} is {theirs!r}, and this one's {ours!r}: use the same"
            )
    return told


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 120 else text[:117] + "..."
