"""Bytes by key in one bounded file: what was computed once is read again.

Entries are appended and never change. When the file is full, nothing more goes in and nothing goes out: over epochs
rows come round in turn, and whatever would make room for a newcomer (least recently used, say) throws out what is
needed next. The file is read and not mapped: what the page cache holds of it then counts as no process's memory.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
import tempfile
import threading
import zlib
from pathlib import Path
from typing import Any

from justforward.errors import UserError

HEADER = struct.Struct("<16sQI4s")  # digest of the key, bytes, their crc32, END
END = b"jfs1"


class Store:
    """Bytes by key.

    Args:
        path: the file, made if it is not there; None for a temporary one that nobody else sees.
        limit: its largest size in bytes.
        beside: where a temporary file is to lie (default the system's place, which may be memory).

    Attributes:
        note: why a file that was asked for is not used: another process has it. A temporary one is then.

    Raises:
        UserError: the file cannot be made or read, or is something else.
    """

    def __init__(
        self, path: str | Path | None, limit: int, beside: str | Path | None = None
    ) -> None:
        self.limit = limit
        self.note: str | None = None
        self._places: dict[bytes, tuple[int, int, int]] = {}  # digest -> offset, bytes, crc
        self._size = 0
        self._lock = threading.Lock()  # of the file's position
        try:
            own = None if path is None else self._open(Path(path))
            self._file: Any = own or tempfile.TemporaryFile(buffering=0, dir=beside)  # noqa: SIM115 - `close`
        except OSError as error:
            where = path if path is not None else beside or tempfile.gettempdir()
            raise UserError(
                f"{where}: cannot keep outputs there: {error.strerror or error}: name another place, or keep none"
            ) from error

    def _open(self, path: Path) -> Any:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            self.note = f"{path} is in use by another process: outputs are kept for this one alone"
            return None
        end = os.fstat(file.fileno()).st_size
        while self._size + HEADER.size <= end:
            file.seek(self._size)
            digest, length, crc, mark = HEADER.unpack(file.read(HEADER.size))
            if mark != END:
                file.close()
                raise UserError(f"{path}: is no file of kept outputs, or damaged: delete it")
            start = self._size + HEADER.size
            if start + length > end:
                break  # cut short by a kill
            self._places[digest] = (start, length, crc)
            self._size = start + length
        file.truncate(self._size)
        return file

    def get(self, key: bytes) -> bytearray | None:
        """What is kept under a key; None if nothing is (or the disk has spoilt it)."""
        found = self._places.get(_digest(key))
        if found is None:
            return None
        start, length, crc = found
        data = bytearray(length)
        done = 0
        with self._lock:
            self._file.seek(start)
            while done < length:  # a read may be short, beyond 2 GB always
                count = self._file.readinto(memoryview(data)[done:])
                if not count:
                    return None
                done += count
        return data if zlib.crc32(data) == crc else None

    def put(self, key: bytes, data: bytes) -> bool:
        """Keep bytes under a key that has none; whether there was room."""
        with self._lock:
            return self._put(_digest(key), data)

    def _put(self, digest: bytes, data: bytes) -> bool:
        size = HEADER.size + len(data)
        if digest in self._places or self._size + size > self.limit:
            return False
        crc = zlib.crc32(data)
        try:
            self._file.seek(self._size)
            for part in (memoryview(HEADER.pack(digest, len(data), crc, END)), memoryview(data)):
                while part:
                    part = part[self._file.write(part) :]
        except OSError:  # a full disk: what is there stays good
            self.limit = self._size
            return False
        self._places[digest] = (self._size + HEADER.size, len(data), crc)
        self._size += size
        return True

    def __len__(self) -> int:
        return len(self._places)

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self._size

    def close(self) -> None:
        self._file.close()


def _digest(key: bytes) -> bytes:
    return hashlib.blake2b(key, digest_size=16).digest()
