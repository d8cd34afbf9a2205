"""One cell of a grid: its process, what that took, and what it said. No torch in here.

A cell is our own command line in a process of its own, so that its peak memory and time are those of the
command and of nothing else.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from justforward.errors import UserError
from justforward.folder import RunFolder, writing
from justforward.grid import Cell
from justforward.tasks import METRICS

Record = dict[str, Any]

TICK = 0.05  # seconds between looks at a cell: how far off its time may be
GRACE_SECONDS = 60.0  # how long a cell has to end by itself once it is asked to

# The command line; on Linux it ends with the process that started it, which might be killed: it would go on unseen.
_BOUND = """\
import ctypes, os, signal
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
os.getppid() == {parent} or os._exit(1)
from justforward.cli import entry
entry()
"""


def launcher() -> tuple[str, ...]:
    """What starts the command line of a cell."""
    if sys.platform == "linux":
        return (sys.executable, "-c", _BOUND.format(parent=os.getpid()))
    return (sys.executable, "-m", "justforward")


class Stop:
    """How often Ctrl-C or SIGTERM has come. It is heeded between looks, never in the middle of a write."""

    def __init__(self) -> None:
        self.asked = 0

    def hear(self, number: int, frame: Any) -> None:
        """A signal."""
        self.asked += 1


@contextlib.contextmanager
def counted_signals() -> Iterator[Stop]:
    """While inside, signals are counted and do nothing else."""
    stop = Stop()
    before: dict[signal.Signals, Any] = {}
    with contextlib.suppress(ValueError):  # not the main thread: signals are not ours
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, stop.hear)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Shop:
    """Where and how cells are run.

    Attributes:
        path: the folder of the grid.
        launcher: what starts a command line.
        stop: the signals so far.
        held: a file that each process keeps open, and with it the lock that is on it.
        threads: CPU threads of each.
        minutes: the longest that one may take.
        tick: called now and then with the file that a process says things in.
    """

    path: Path
    launcher: Sequence[str]
    stop: Stop
    held: int
    threads: int | None
    minutes: float | None
    tick: Callable[[Path], None]

    def stderr(self, cell: Cell) -> Path:
        """The file that its process says things in."""
        return self.path / cell.folder / "stderr"

    def run(self, cell: Cell) -> Record:
        """Run a cell to its end, or go on with its run; returns its record.

        Raises:
            KeyboardInterrupt: it was stopped by a signal.
            UserError: a file cannot be written.
        """
        place = self.path / cell.folder
        run = RunFolder(place / "run")
        with writing(place):
            place.mkdir(parents=True, exist_ok=True)
        resumed = cell.makes_run and _can_resume(run)
        command = [*self.launcher, *cell.argv(run.path, self.threads)]
        end = self._wait(command + ["--resume"] * resumed, place)
        seconds = round(end.seconds, 3)
        if end.late:
            error = f"not done after {self.minutes:g} minutes"
            return outcome(cell, "timeout", error=error, seconds=seconds)
        took = {"seconds": seconds, "peak_bytes": end.peak, "resumed": resumed}
        if end.code != 0:
            said = (place / "stderr").read_text(encoding="utf-8", errors="replace")
            return outcome(cell, "failed", error=_why(end.code, said), **took)
        try:
            lines = (place / "stdout").read_text(encoding="utf-8").splitlines()
            result = json.loads(lines[-1])
            found = _figures(result)
            if cell.makes_run:
                found["curve"] = _curve(run.read_metrics()[0])
            if resumed:  # the run counts the seconds of all its processes
                took["seconds"] = max(seconds, float(result["seconds"]))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            text = f"no result on the last line of {place / 'stdout'}: {error!r}"
            return outcome(cell, "failed", error=text, **took)
        if cell.trial is not None:
            found.update(value=None, loss=None, metrics={})  # of the test rows: not to choose by
            if found["validation_value"] is None:
                text = "it has no validation figure to choose by"
                return outcome(cell, "failed", error=text, **took)
        return outcome(cell, "ok", **found, **took)

    def _wait(self, command: Sequence[str], place: Path) -> _End:
        """Start a process and wait until it has ended.

        In a session of its own the terminal's Ctrl-C does not reach it: it is told once, by us.
        """
        with (place / "stdout").open("wb") as out, (place / "stderr").open("wb") as err:
            started = time.monotonic()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
                pass_fds=(self.held,),
            )
        own = _own_peak()
        late_at = math.inf if self.minutes is None else started + 60.0 * self.minutes
        kill_at = math.inf
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            now = time.monotonic()
            if pid:
                break
            if self.stop.asked > 1 or now > kill_at:
                os.kill(process.pid, signal.SIGKILL)
            elif (self.stop.asked or now > late_at) and kill_at == math.inf:
                os.kill(process.pid, signal.SIGINT)
                kill_at = now + GRACE_SECONDS
            self.tick(place / "stderr")
            time.sleep(TICK)
        process.returncode = os.waitstatus_to_exitcode(status)
        if self.stop.asked and process.returncode != 0:
            raise KeyboardInterrupt
        late = kill_at < math.inf and process.returncode != 0
        return _End(process.returncode, _peak(usage.ru_maxrss, own), now - started, late)


@dataclass(frozen=True)
class _End:
    code: int
    peak: int | None
    seconds: float
    late: bool


_UNIT = 1 if sys.platform == "darwin" else 1024  # of getrusage's figure, in bytes


def _peak(maxrss: int, own: int) -> int | None:
    """Bytes of a process's largest resident set; None where it may be that of this process.

    Linux takes the peak of the process that starts another for that other's first: so this one stays small.
    """
    return maxrss * _UNIT if maxrss * _UNIT > own else None


def _own_peak() -> int:
    """Of the memory that this process has now, in bytes; getrusage's would have our own parent's in it."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT


def _can_resume(run: RunFolder) -> bool:
    """Whether a run goes on from where it is; one that cannot is removed.

    So is one that is finished: it has no record, and its peak memory went unseen.
    """
    with contextlib.suppress(UserError):
        run.check_run()
        result = run.read_result()
        if result is None or result["status"] != "finished":
            return True
    if run.path.exists():
        with writing(run.path):
            shutil.rmtree(run.path)
    return False


# ------------------------------------------------------------------------------------------ records


def outcome(cell: Cell, status: str, **values: Any) -> Record:
    """A line of results.jsonl."""
    command = ["justforward", *cell.argv(cell.folder / "run")]
    blank = dict.fromkeys(("error", "metric", "value", "validation_value", "seconds", "peak_bytes"))
    return {**cell.plain(), "command": command, "status": status, **blank, **values}


def spell_outcome(record: Record) -> str:
    """Its figures in words."""
    if record["status"] != "ok":
        return f"{record['status']}: {record['error']}"
    parts = [] if record["value"] is None else [f"{record['metric']} {record['value']:.1%}"]
    if record["validation_value"] is not None:
        parts.append(f"validation {record['validation_value']:.1%}")
    if record["peak_bytes"] is not None:
        parts.append(f"{record['peak_bytes'] / 2**30:.2f} GiB")
    return ", ".join(parts)


def _figures(result: dict[str, Any]) -> dict[str, Any]:
    """What a record keeps of a command's result."""
    metric = result.get("metric", "accuracy")
    value = float(result["value"] if "value" in result else result[metric])
    if not math.isfinite(value):
        raise ValueError(f"{metric} is {value}")
    known = {name for names in METRICS.values() for name in names}
    passes = {name: result.get(name) for name in ("steps", "forwards", "backwards")}
    return {
        "metric": metric,
        "value": value,
        "validation_value": result.get("validation_value", result.get("validation_accuracy")),
        "loss": result.get("loss"),
        "metrics": {name: result[name] for name in result if name in known},
        **passes,
        "rows": dict(result["rows"]),
        "curve": _curve(result.get("curve") or []),
    }


def _curve(metrics: Sequence[dict[str, Any]]) -> list[list[float]]:
    """[forwards, seconds, value] of each validation."""
    return [
        [m["forwards"], m["seconds"], m["value"] if "value" in m else m["accuracy"]]
        for m in metrics
        if m.get("kind", "validation") == "validation"
    ]


def _why(code: int, said: str) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        return f"ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ") if lines else f"exit code {code}, and nothing said"
