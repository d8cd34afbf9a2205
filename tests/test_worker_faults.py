"""The fault suite of hubs and workers: whatever happens to one of them or to their messages, the run is the one that a single worker takes.

What is tried is counted in `reliability`, as in test_faults.py. Processes of torchrun are in test_workers.py and test_team.py.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import justforward
from justforward import UserError, fingerprint, read_log, replay
from justforward.conductor import Conductor
from justforward.desk import Desk, Reply
from justforward.line import Line, Unreachable, greet
from justforward.serve import listen
from justforward.wire import PROTOCOL, zipped
from parties import (
    KEY,
    DeskLink,
    close_all,
    end_of,
    net,
    open_desk,
    run_alone,
    running,
    serve_config,
    start,
    until,
    worker,
)
from reliability import trial
from test_desk import ask
from test_faults import few_or_all

STEPS = 60
LOOK = 0.02  # seconds


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    close_all()


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[Any]]:
    """The first steps of a run of one worker that nothing is done to; rates are constant, so that shorter runs begin alike."""
    alone = run_alone(tmp_path_factory.mktemp("alone") / "run", **options(STEPS))
    whole = read_log(alone.folder.log).steps
    assert len(whole) == STEPS
    return lambda count: whole[:count]


def options(count: int) -> dict[str, Any]:
    return {"max_forwards": 2 * count, "lr_schedule": "constant"}


def weights(conductor: Conductor) -> str:
    """The fingerprint that base and log come to."""
    fresh = net()
    replay(fresh, conductor.folder.log)
    return fingerprint(fresh)


# ------------------------------------------------------------------------------ processes, over HTTP


@pytest.mark.slow  # each starts processes; test_serve.py has one of most of them
@pytest.mark.parametrize("how", ["killed", "hangs", "is slow"])
@pytest.mark.parametrize("much", [(3, seed) for seed in range(3)])
def test_one_of_two_workers(
    tmp_path: Path, steps: Callable[[int], list[Any]], how: str, much: tuple[int, int]
) -> None:
    dealt, count = random.Random(much[1]), 10 if how == "is slow" else STEPS
    for number in range(much[0]):
        with (
            trial(f"a worker {'is killed' if how == 'killed' else how}"),
            running(tmp_path / str(number), **options(count)) as hub,
        ):
            seconds = 20 * LOOK if how == "is slow" else LOOK
            stays, other = start(hub.url, LOOK), start(hub.url, seconds)
            members = hub.desk.conductor.rounds.members
            until(lambda members=members: sum(member.alive for member in members.values()) == 2)
            time.sleep(dealt.uniform(0.0, 10 * LOOK))
            if how == "killed":
                other.send_signal(signal.SIGKILL)
                other.communicate()
            elif how == "hangs":
                other.send_signal(signal.SIGSTOP)
                taken, stopped = hub.desk.conductor.steps, time.monotonic()
                until(lambda taken=taken, hub=hub: hub.desk.conductor.steps > taken + 2)
                assert time.monotonic() - stopped < 6.0
                other.send_signal(signal.SIGCONT)
            done = end_of(stays)
            assert done["fingerprint"] == weights(hub.desk.conductor)
            if how != "killed":
                assert end_of(other)["fingerprint"] == done["fingerprint"]
            assert read_log(hub.desk.conductor.folder.log).steps == steps(count)


@pytest.mark.slow
@pytest.mark.parametrize("much", [(3, seed) for seed in range(3)])
def test_the_hub_is_killed(
    tmp_path: Path, steps: Callable[[int], list[Any]], much: tuple[int, int]
) -> None:
    """At a random instant; it is started again on the same port, and its worker has waited."""
    dealt = random.Random(much[1])
    key = tmp_path / "key"
    key.write_bytes(KEY)
    for number in range(much[0]):
        port = listen("127.0.0.1", 0)
        address = port.getsockname()[1]
        port.close()
        out = tmp_path / str(number)
        config = serve_config(out, **options(STEPS))
        names = ["template", "labels", "estimator", "rule", "lr", "lr_schedule", "batch_size", "max_forwards", "hash_every", "seed", "model"]  # fmt: skip
        given = [f"--{name.replace('_', '-')}={getattr(config, name)}" for name in names]

        def hub(*more: str, at: int = address, out: Path = out) -> subprocess.Popen[str]:
            place = [f"--out={out}", f"--port={at}", f"--key-file={key}"]
            command = [sys.executable, "-m", "justforward", "serve", *place, *more]
            return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip

        log = out / "trajectory.jfl"
        with trial("the hub is killed"):
            first = hub(*given)
            part = start(f"http://127.0.0.1:{address}", LOOK)
            until(lambda log=log: log.exists() and len(read_log(log).steps) > 0)
            time.sleep(dealt.uniform(0.0, 40 * LOOK))
            first.send_signal(signal.SIGKILL)
            first.communicate()
            second = hub("--resume", "--json")
            said, err = second.communicate(timeout=120)
            assert second.returncode == 0, err
            assert json.loads(said)["steps"] == STEPS
            fresh = net()
            replay(fresh, log)
            assert fingerprint(fresh) == end_of(part)["fingerprint"]
            assert read_log(log).steps == steps(STEPS)


# --------------------------------------------------------------------------------- messages, one by one


class Spoiling(DeskLink):
    """Does something to some messages."""

    def __init__(self, desk: Desk, dealt: random.Random, name: str, share: float) -> None:
        super().__init__(desk)
        self.dealt, self.name, self.share, self.spoilt = dealt, name, share, 0

    def post(self, kind: str, raw: bytes) -> tuple[int, bytes]:
        if self.dealt.random() >= self.share:
            return super().post(kind, raw)
        self.spoilt += 1
        if self.name == "a request is lost":
            raise Unreachable("lost")
        if self.name == "a reply is lost":
            super().post(kind, raw)
            raise Unreachable("lost")
        if self.name == "a message comes twice":
            super().post(kind, raw)
            return super().post(kind, raw)
        old = self.dealt.choice(self.sent or [(kind, raw)])
        super().post(*old)  # one from long ago comes once more, before the new one
        return super().post(kind, raw)


@pytest.mark.parametrize(
    "name",
    ["a request is lost", "a reply is lost", "a message comes twice", "an old message comes again"],
)
@few_or_all((20, 0), *((STEPS, seed) for seed in range(1, 4)))
def test_messages_are_lost_repeated_or_late(
    tmp_path: Path,
    steps: Callable[[int], list[Any]],
    name: str,
    much: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("justforward.line.time.sleep", lambda seconds: None)
    desk = open_desk(tmp_path / "run", **options(much[0]))
    link = Spoiling(desk, random.Random(much[1]), name, 0.3)
    made, own, log = worker(link, wait=60.0)
    taken = made.run(log)
    desk.conductor.close()
    assert link.spoilt > 0
    for _ in range(link.spoilt):  # a trial each: what came of the run says of all
        with trial(name):
            assert taken == much[0]
            assert read_log(desk.conductor.folder.log).steps == steps(much[0])
            assert fingerprint(own.model) == weights(desk.conductor)


@few_or_all((12, 0), *((100, seed) for seed in range(1, 4)))
def test_a_bit_flipped_in_a_message(
    tmp_path: Path, steps: Callable[[int], list[Any]], much: tuple[int, int]
) -> None:
    """It is refused, and moves nothing; the right one after it is taken."""
    dealt = random.Random(much[1])
    desk = open_desk(tmp_path / "run", **options(20))

    class Flipping(DeskLink):
        left = much[0]

        def post(self, kind: str, raw: bytes) -> tuple[int, bytes]:
            for _ in range(min(self.left, 8) if kind == "turn" else 0):
                self.left -= 1
                with trial("a bit flipped in a message"):
                    spoilt = bytearray(raw)
                    spoilt[dealt.randrange(len(raw))] ^= 1 << dealt.randrange(8)
                    size = desk.conductor.folder.log.stat().st_size
                    reply = desk.receive(kind, bytes(spoilt), self.now)
                    assert isinstance(reply, Reply)
                    assert 400 <= reply.status < 500
                    assert desk.conductor.folder.log.stat().st_size == size
            return super().post(kind, raw)

    made, own, log = worker(Flipping(desk))
    assert made.run(log) == 20
    desk.conductor.close()
    assert made.line.link.left == 0  # type: ignore[attr-defined]
    assert read_log(desk.conductor.folder.log).steps == steps(20)
    assert fingerprint(own.model) == weights(desk.conductor)


@few_or_all([0], range(8))
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_worker_answers_with_what_is_no_number(
    tmp_path: Path, steps: Callable[[int], list[Any]], much: Any, bad: float
) -> None:
    """It is refused, and struck off the third time; the step waits for the other one, and is the same."""
    for row in much:
        desk = open_desk(tmp_path / str(row), **options(10))
        with trial("a worker answers NaN or infinity"):
            liar, _, log = worker(DeskLink(desk), "liar")
            look = liar._look

            def spoilt(work: Any, look: Any = look, row: int = row) -> Any:
                turn = look(work)
                sight = turn.sights[0]
                rises = [list(one) for one in sight.rises]
                rises[0][row % len(rises[0])] = bad
                found = replace(sight, rises=tuple(tuple(one) for one in rises))
                return replace(turn, sights=(found, *turn.sights[1:]))

            liar._look = spoilt  # type: ignore[method-assign]
            with pytest.raises(UserError, match="a number that is not finite"):
                liar.run(log)
            assert desk.conductor.steps == 0
            honest, own, log = worker(DeskLink(desk), "honest")
            assert honest.run(log) == 10
            desk.conductor.close()
            assert read_log(desk.conductor.folder.log).steps == steps(10)
            assert fingerprint(own.model) == weights(desk.conductor)


# ----------------------------------------------------------------------------------- who does not belong


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": "9.9.9"}, "its version of justforward is '9.9.9'"),
        ({"protocol": 9}, "its protocol is 9"),
        ({"base": "f00"}, "fingerprint of its base model is 'f00'"),
        ({"rows": "e" * 64}, "its rows have sha256"),
        ({"rule": "sgd"}, "rule is 'sgd', and the run's 'rms"),
        ({"seed": 4}, "seed is 4, and the run's 3"),
        ({"groups": [0.5]}, r"its eps is \[0.5\]"),
        ({"noise": 99}, "noise is 99"),
        ({"tensors": []}, "it tunes"),
    ],
)
def test_another_version_model_rows_or_settings(
    tmp_path: Path, steps: Callable[[int], list[Any]], changes: dict[str, Any], said: str
) -> None:
    """Refused by name; the one that is there goes on."""
    desk = open_desk(tmp_path / "run", **options(10))
    first, own, _ = ask(desk, "first")
    with trial("another version, model, rows or settings"):
        line = Line(DeskLink(desk), KEY, 1.0)
        line.open()
        offer = {"name": "other", "protocol": PROTOCOL, "version": justforward.__version__, "rows": "d" * 64, "tokens": ""}  # fmt: skip
        outside = {name: value for name, value in changes.items() if name in offer}
        header = {**first._header, **{k: v for k, v in changes.items() if k not in offer}}
        with pytest.raises(UserError, match=said):
            line.call("join", zipped({**offer, "header": header, **outside}))
        first._take_part(tmp_path)
        desk.conductor.close()
        assert read_log(desk.conductor.folder.log).steps == steps(10)
        assert fingerprint(own.model) == weights(desk.conductor)
        assert [m["name"] for m in desk.conductor.status()["members"]] == ["first"]


@few_or_all([16], range(1, 40))
def test_another_key(tmp_path: Path, steps: Callable[[int], list[Any]], much: Any) -> None:
    desk = open_desk(tmp_path / "run", **options(10))
    for length in much:
        with (
            trial("another key, or a hub that is not the hub"),
            pytest.raises(UserError, match="the hub does not take this key"),
        ):
            greet(Line(DeskLink(desk, now=100.0 * length), bytes(range(length)), 1.0))
        with (
            trial("another key, or a hub that is not the hub"),
            pytest.raises(UserError, match="has not the proof of the key"),
        ):
            # the sessions of the ones before are forgotten by then
            greet(Line(Forged(desk, now=100.0 * length), KEY, 1.0))
    made, own, log = worker(DeskLink(desk, now=1e4))
    assert made.run(log) == 10
    desk.conductor.close()
    assert read_log(desk.conductor.folder.log).steps == steps(10)
    assert fingerprint(own.model) == weights(desk.conductor)


class Forged(DeskLink):
    """Answers with what somebody without the key could."""

    def post(self, kind: str, raw: bytes) -> tuple[int, bytes]:
        status, body = super().post(kind, raw)
        return status, body if kind == "hello" else b"{}" + body[2:]
