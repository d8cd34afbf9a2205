"""Folders that appear whole or not at all; where converted models are kept."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from justforward.durable import is_alive, sync_file, sync_folder
from justforward.errors import UserError

STALE_SECONDS = 3600.0


def cache_folder() -> Path:
    """Where converted models are kept: $JUSTFORWARD_CACHE, or ~/.cache/justforward."""
    named = os.environ.get("JUSTFORWARD_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "justforward"


@contextlib.contextmanager
def whole_folder(out: Path, *, keep_existing: bool = False) -> Iterator[Path]:
    """A temporary sibling of `out` to write into, synced and renamed to `out` at the end.

    Left by an exception, or by Ctrl-C, it is removed. With keep_existing, another process that
    was faster wins and this one's work is dropped.
    """
    temporary = out.parent / f".{out.name}.{os.getpid()}.{time.monotonic_ns()}.tmp"
    try:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            _remove_stale(out)
            temporary.mkdir()
            yield temporary
            mode = temporary.stat().st_mode & 0o666
            for file in temporary.iterdir():
                file.chmod(mode)  # safetensors writes 0600 whatever the umask says
                sync_file(file)
            sync_folder(temporary)
        except (OSError, SafetensorError) as error:
            said = " ".join(str(getattr(error, "strerror", None) or error).split())
            raise UserError(
                f"{out}: cannot be written: {said}: make room or give a folder you may write to"
                + (" in JUSTFORWARD_CACHE" if keep_existing else "")
            ) from error
        try:
            temporary.rename(out)
            sync_folder(out.parent)
        except OSError as error:
            if not (keep_existing and out.is_dir()):
                raise UserError(f"{out}: cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_stale(out: Path) -> None:
    """Removes what a killed process left half-written beside `out`.

    Of a process that is there, never: a clock that is set forward makes everything old.
    """
    for left in out.parent.glob(f".{out.name}.*.tmp"):
        owner = left.name.split(".")[-3]
        if owner.isdigit() and is_alive(int(owner)):
            continue
        with contextlib.suppress(FileNotFoundError):  # another process may be removing it too
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
