"""Runs of the command in children of one process that has everything loaded, and what is done to them there.

A child is a whole `justforward train`, but for the seconds that imports and compiled kernels take. `Fault` says what
happens to it: nothing, a signal after some time, or something at the n-th operation on the files of its run, which is
about to be carried out. No hook of the product is needed: Python announces most operations (PEP 578), `fsync` is wrapped.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from justforward.config import TrainConfig

ZYGOTE = """
import json, os, resource, signal, sys, time
from justforward import report
from justforward.cli import main

report.plot = lambda run: None
NAMES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "fsync")

def watch(case):
    # what is to happen at the n-th operation happens before it
    seen = 0
    def act(event, path, flags):
        nonlocal seen
        if path is None or not str(path).startswith(case["place"]):
            return
        writes = event != "open" or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if case["kind"] in ("fail", "stay") and (not writes or event == "os.remove"):
            return
        seen += 1
        if case["kind"] == "list":
            os.write(listed, (json.dumps([event, str(path)]) + "\\n").encode())
        if case["kind"] == "kill" and seen == case["number"]:
            os.kill(os.getpid(), signal.SIGKILL)
        if seen == case["number"] and case["kind"] == "fail" or seen >= case["number"] and case["kind"] == "stay":
            raise OSError(case["errno"], os.strerror(case["errno"]))
    def hook(event, arguments):
        if event in NAMES and isinstance(arguments[0], (str, os.PathLike)):
            act(event, arguments[0], arguments[2] if event == "open" else 0)
    fsync = os.fsync
    def forced(file):
        number = file if isinstance(file, int) else file.fileno()
        act("fsync", os.readlink(f"/proc/self/fd/{number}"), 0)
        fsync(file)
    listed = os.open(case["said"] + ".list", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.fsync = forced
    sys.addaudithook(hook)

answers = os.fdopen(os.dup(1), "w")
quiet = os.open(os.devnull, os.O_WRONLY)
os.dup2(quiet, 1)
os.dup2(quiet, 2)
for line in sys.stdin:
    case = json.loads(line)
    started = time.monotonic()
    inwards, outwards = os.pipe()  # a file would meet the limits that are tried
    child = os.fork() if case["fork"] else 0
    if child:
        os.close(outwards)
        if case["kind"] == "signal":
            time.sleep(case["after"])
            os.kill(child, case["number"])
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with open(inwards, "rb") as said, open(case["said"], "wb") as kept:
            kept.write(said.read())
    else:
        if case["fork"]:
            os.dup2(outwards, 2)
        if case["kind"] in ("kill", "fail", "stay", "list"):
            watch(case)
        if case["kind"] == "limit":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (case["number"],) * 2)
        if case["kind"] == "clock":
            real = time.time
            time.time = lambda: real() + case["after"]
        try:
            status = main(case["argv"])
        except BaseException as error:
            import traceback
            traceback.print_exc()
            status = 99
        if case["fork"]:
            os._exit(status)
    print(json.dumps([status, time.monotonic() - started]), file=answers, flush=True)
"""


@dataclass(frozen=True)
class Fault:
    """What happens to a child.

    Attributes:
        kind: none; signal: `number` after so many seconds; at the operation `number`: kill, fail (with `errno`) or stay
            (all that follow fail, too); limit: no file longer than `number` bytes; clock: off by `after` seconds;
            list: nothing, but the operations are listed.
    """

    kind: str = "none"
    number: int = 0
    errno: int = 0
    after: float = 0.0


KILLED = -signal.SIGKILL
NOTHING = Fault()


@dataclass
class Ended:
    """How a child has ended: exit code (-9 after SIGKILL, 99 after an exception), seconds, stderr, operations."""

    status: int
    seconds: float
    said: str
    operations: list[list[str]]


class Zygote:
    """The process with everything loaded."""

    def __init__(self, scratch: Path) -> None:
        self.said = scratch / "stderr"
        self.process = subprocess.Popen(
            [sys.executable, "-c", ZYGOTE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )

    def run(self, config: TrainConfig, fault: Fault | None = NOTHING) -> Ended:
        """`train` in a child; without a fault in the process itself, which warms it up."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        case = {
            "argv": spelled(config),
            "place": config.out,
            "said": str(self.said),
            "fork": fault is not None,
            **asdict(fault or NOTHING),
        }
        print(json.dumps(case), file=self.process.stdin, flush=True)
        status, seconds = json.loads(self.process.stdout.readline())
        listed = self.said.with_name(self.said.name + ".list")
        lines = listed.read_text().splitlines() if (fault or NOTHING).kind == "list" else []
        said = self.said.read_text() if fault is not None else ""
        return Ended(status, seconds, said, [json.loads(line) for line in lines])


def spelled(config: TrainConfig) -> list[str]:
    """A configuration as a command line."""
    if config.resume:
        return ["train", "--resume", "--out", config.out]
    out = ["train"]
    for field in fields(config):
        value = getattr(config, field.name)
        if value == field.default or field.name == "labels":
            continue
        out.append(f"--{field.name.replace('_', '-')}={value}")
    labels: Any = config.labels
    return [*out, "--labels=" + ",".join(f"{k}={v}" for k, v in labels.items())]


@contextmanager
def zygote(scratch: Path) -> Iterator[Zygote]:
    """One for as long as the block lasts."""
    made = Zygote(scratch)
    try:
        yield made
    finally:
        assert made.process.stdin is not None
        assert made.process.stdout is not None
        made.process.stdin.close()
        made.process.wait(60)
        made.process.stdout.close()
