"""What torchrun, or whoever starts processes as it does, says to each of them: variables of the environment."""

from __future__ import annotations

import os


def several() -> bool:
    """Whether this process was started as one of a number, which may be 1."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def number() -> int:
    """Of this process, from 0; 0 where it is not one of several."""
    return int(os.environ["RANK"]) if several() else 0


def attempt() -> int:
    """How often torchrun has started the processes again, after one of them had failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) if several() else 0
