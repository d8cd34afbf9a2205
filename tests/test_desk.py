"""The hub without a network: what it lets in, what it turns away, and that its run is its workers'."""

from __future__ import annotations

import errno
import json
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import justforward
from justforward import Sight, UserError, fingerprint, read_log, replay
from justforward.desk import Desk, Reply, Waiting
from justforward.line import HubGone, Line, SessionLost, greet
from justforward.serve import open_run
from justforward.wire import DONE, PROTOCOL, REPLAY, Order, Turn, seal, zipped
from justforward.worker import joined
from parties import (
    KEY,
    DeskLink,
    Down,
    Party,
    close_all,
    open_desk,
    run_alone,
    serve_config,
    worker,
)

KINDS = ("hello", "run", "log", "join", "turn", "leave", "status")


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    close_all()
    _KEPT.clear()


def log_of(desk: Desk) -> bytes:
    return desk.conductor.folder.log.read_bytes()


def kill(desk: Desk) -> None:
    """What the system does to what a process had open."""
    writer = desk.conductor._writer
    if writer is not None:
        writer._file.close()
    desk.conductor.folder.unlock()


def ask(desk: Desk, name: str = "w") -> tuple[Any, Any, DeskLink]:
    """A worker that has joined and asked for nothing yet."""
    link = DeskLink(desk)
    made, own, log = worker(link, name)
    with tempfile.TemporaryDirectory() as folder:
        try:
            made._begin(Path(folder), log)
        finally:
            made.opt._writer._file.close()
            made.opt._writer = None  # it takes steps without a log
    return made, own, link


# ---------------------------------------------------------------------------------------- one run


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_samples": 2, "rule": "adam(window=3)", "looks": "one-sided"},
        {"estimator": "activation", "part": 8},
        {"lr_schedule": "constant", "weight_decay": 0.1, "rule": "sgd+momentum"},
    ],
    ids=["weight", "samples", "activation", "decay"],
)
def test_a_worker_alone_makes_the_log_and_replay_makes_its_weights(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    desk = open_desk(tmp_path / "run", **options)
    made, own, log = worker(DeskLink(desk))
    steps = made.run(log)
    desk.conductor.close()
    assert desk.conductor.finished
    assert steps == desk.conductor.steps > 0
    fresh = Party({"config": desk.conductor.info()["config"], "private": False}).model
    assert replay(fresh, desk.conductor.folder.log) == steps
    assert fingerprint(fresh) == fingerprint(own.model)
    assert read_log(desk.conductor.folder.log).sealed


def test_two_workers_that_take_turns_make_the_same_log(tmp_path: Path) -> None:
    alone = run_alone(tmp_path / "alone")
    desk = open_desk(tmp_path / "run")
    barrier = threading.Lock()

    class Shared(DeskLink):
        def post(self, kind: str, raw: bytes) -> tuple[int, bytes]:
            with barrier:
                return super().post(kind, raw)

    parties = [worker(Shared(desk), name, seconds=0.001) for name in "ab"]
    threads = [threading.Thread(target=made.run, args=(log,)) for made, _, log in parties]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    desk.conductor.close()
    assert read_log(desk.conductor.folder.log).steps == read_log(alone.folder.log).steps
    assert fingerprint(parties[0][1].model) == fingerprint(parties[1][1].model)
    assert all(own.looks for _, own, _ in parties)


def test_a_hub_that_was_killed_goes_on_from_its_log(tmp_path: Path) -> None:
    alone = run_alone(tmp_path / "alone")
    desk = open_desk(tmp_path / "run")

    class Dying(DeskLink):
        def post(self, kind: str, raw: bytes) -> tuple[int, bytes]:
            if self.desk.conductor.steps == 7 and self.desk is desk:
                kill(self.desk)
                self.desk = open_desk(tmp_path / "run", resume=True)
            return super().post(kind, raw)

    link = Dying(desk)
    made, _own, log = worker(link)
    made.run(log)
    assert link.desk is not desk
    link.desk.conductor.close()
    assert read_log(alone.folder.log).steps == read_log(link.desk.conductor.folder.log).steps
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, made.opt.steps + 1))


class Kill(BaseException):
    """As if the process ended there."""


@pytest.mark.parametrize("error", [Kill(), OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("file", ["hub.json", "environment.json", "trajectory.jfl"])
def test_a_hub_that_dies_or_has_no_room_while_the_first_worker_joins(
    tmp_path: Path, file: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no run then, and the next worker, with other rows, begins it; or it goes on."""
    desk = open_desk(tmp_path / "run")
    rename, left = Path.replace, [file]

    def fails(path: Path, to: Path) -> Path:
        if to.name in left:
            left.clear()
            raise error
        return rename(path, to)

    monkeypatch.setattr(Path, "replace", fails)
    made, _, log = worker(DeskLink(desk), "first")
    with pytest.raises(Kill if isinstance(error, Kill) else UserError):
        made.run(log)
    assert left == []
    if isinstance(error, Kill):
        kill(desk)
        desk = open_desk(tmp_path / "run", resume=True)
    made, own, log = worker(DeskLink(desk, now=1.0), "second", digest="e" * 64)
    assert made.run(log) == 20
    desk.conductor.close()
    folder = desk.conductor.folder
    folder.check_run()
    assert folder.read_environment()["data_sha256"] == "e" * 64
    fresh = Party({"config": desk.conductor.info()["config"], "private": False}).model
    assert replay(fresh, folder.log) == 20
    assert fingerprint(fresh) == fingerprint(own.model)
    assert not [*folder.path.glob(".*.*")]


def test_a_hub_that_has_no_room_for_its_first_files_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise UserError("cannot be written: No space left on device")

    monkeypatch.setattr("justforward.conductor.write_whole", full)
    with pytest.raises(UserError, match="No space left"):
        open_desk(tmp_path / "run")
    monkeypatch.undo()
    open_desk(tmp_path / "run")


def test_a_joiner_replays_the_log(tmp_path: Path) -> None:
    desk = open_desk(tmp_path / "run")
    first, own, log = worker(DeskLink(desk))

    class Enough(Exception):
        pass

    def stop(*arguments: Any) -> Any:
        if desk.conductor.steps == 9:
            raise Enough
        return Party.batch(own, *arguments)

    first.rows = replace(first.rows, batch=stop)
    with pytest.raises(Enough):
        first.run(log)
    link = DeskLink(desk, now=10.0)
    second, _other, log = worker(link, "second")
    assert log == len(log_of(desk))
    second.run(log)
    assert [kind for kind, _ in link.sent][:4] == ["hello", "run", "log", "log"]
    desk.conductor.close()
    assert (
        read_log(desk.conductor.folder.log).steps
        == read_log(run_alone(tmp_path / "alone").folder.log).steps
    )


def test_private_rows_never_leave_and_the_step_is_of_all_clients(tmp_path: Path) -> None:
    desk = open_desk(tmp_path / "run", own_rows=True, workers=2, max_forwards=6)
    lock = threading.Lock()

    class Shared(DeskLink):
        def post(self, kind: str, raw: bytes) -> tuple[int, bytes]:
            with lock:
                return super().post(kind, raw)

    parties = [worker(Shared(desk), name) for name in "ab"]
    threads = [threading.Thread(target=made.run, args=(log,)) for made, _, log in parties]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert desk.conductor.steps == 3
    assert fingerprint(parties[0][1].model) == fingerprint(parties[1][1].model)
    members = desk.conductor.status()["members"]
    assert [m["answers"] for m in members] == [3, 3]


# ------------------------------------------------------------------------------ weights that differ


def test_a_worker_whose_weights_differ_is_named_and_replays(tmp_path: Path) -> None:
    desk = open_desk(tmp_path / "run", hash_every=4)
    lock = threading.Lock()

    class Shared(DeskLink):
        def post(self, kind: str, raw: bytes) -> tuple[int, bytes]:
            with lock:
                return super().post(kind, raw)

    parties = {name: worker(Shared(desk), name, seconds=0.001) for name in "abc"}
    made, bad, _ = parties["b"]
    apply, notes = made._move, []
    flipped: list[int] = []
    made._note = notes.append

    def flip(order: Order) -> None:
        apply(order)
        # several steps may come at once
        if made.opt.steps >= 2 and not flipped:
            flipped.append(made.opt.steps)
            with justforward.optim.Shield():
                next(iter(bad.model.parameters())).data[0, 0] += 1.0

    made._move = flip
    threads = [threading.Thread(target=m.run, args=(log,)) for m, _, log in parties.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    prints = {fingerprint(own.model) for _, own, _ in parties.values()}
    assert len(prints) == 1
    members = {m["name"]: m for m in desk.conductor.status()["members"]}
    assert members["b"]["replays"] == 1
    assert any("these weights differ" in note for note in notes)


def test_a_worker_with_another_history_replays(tmp_path: Path) -> None:
    desk = open_desk(tmp_path / "run")
    made, _, _ = ask(desk)
    for turn in (Turn(0, b"another!"), Turn(5, bytes(8))):
        assert Order.unpack(made.line.call("turn", turn.pack())).says == REPLAY
    assert desk.conductor.status()["members"][0]["replays"] == 2


def test_a_worker_that_others_have_left_behind_reads_the_log_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not told that its weights differ, nor does it load its base again."""
    monkeypatch.setattr("justforward.conductor.MOST_BEHIND", 4)
    desk = open_desk(tmp_path / "run")
    slow, own, link = ask(desk, "slow")
    notes: list[str] = []
    slow._note, slow._build = notes.append, lambda path, resume: pytest.fail("it is built again")
    fast, other, log = worker(DeskLink(desk), "fast")
    assert fast.run(log) == 20
    link.now = 1.0
    assert slow._take_part(tmp_path) == 20
    assert fingerprint(own.model) == fingerprint(other.model)
    members = {m["name"]: m for m in desk.conductor.status()["members"]}
    assert members["slow"]["replays"] == members["slow"]["strikes"] == 0
    assert notes == ["20 steps behind: taking them from the hub's log"]
    assert [*tmp_path.iterdir()] == [tmp_path / "run"]


# ------------------------------------------------------------------------------------- let in or not


def test_an_old_message_is_refused_and_the_same_again_is_answered_once(tmp_path: Path) -> None:
    desk = open_desk(tmp_path / "run")
    made, _own, link = ask(desk)
    work = Order.unpack(made.line.call("turn", made._turn().pack())).work
    assert work is not None
    made.line.call("turn", made._look(work).pack())
    kind, raw = link.sent[-1]
    steps, size = desk.conductor.steps, len(log_of(desk))
    assert steps == 1
    again = desk.receive(kind, raw, 1.0)
    assert isinstance(again, Reply)
    assert again.status == 200
    assert (desk.conductor.steps, len(log_of(desk))) == (steps, size)
    made.line.call("status")
    for kind, raw in link.sent[1:-1]:
        reply = desk.receive(kind, raw, 1.0)
        assert isinstance(reply, Reply)
        assert (reply.status, reply.body) == (401, b"an old message")
    assert len(log_of(desk)) == size


def test_a_session_must_be_begun_within_a_minute_and_where_it_was_made(tmp_path: Path) -> None:
    desk = open_desk(tmp_path / "run")
    link = DeskLink(desk)
    line = Line(link, KEY, 1.0)
    line.open()
    link.now = 61.0
    with pytest.raises(SessionLost, match="no such session"):
        line.call("run")
    line.open()
    line.call("run")
    link.now = 500.0
    line.call("run")  # begun once, it is good for long
    other = open_desk(tmp_path / "other")
    link.desk = other
    with pytest.raises(SessionLost, match="the proof is not that of this key and run"):
        line.call("run")
    with pytest.raises(UserError, match="another run now"):
        line.open()


def test_a_wrong_key(tmp_path: Path) -> None:
    desk = open_desk(tmp_path / "run")
    line = Line(DeskLink(desk), b"some other key, as long as that", 1.0)
    with pytest.raises(UserError, match="the hub does not take this key"):
        greet(line)
    assert desk._sessions == {}


def test_somebody_who_pretends_to_be_the_hub_is_not_believed(tmp_path: Path) -> None:
    class Forged(DeskLink):
        def post(self, kind: str, raw: bytes) -> tuple[int, bytes]:
            status, body = super().post(kind, raw)
            return status, body if kind == "hello" else b"{}" + body[2:]

    line = Line(Forged(open_desk(tmp_path / "run")), KEY, 1.0)
    line.open()
    with pytest.raises(UserError, match="has not the proof of the key"):
        line.call("run")


def test_more_workers_than_the_hub_takes(tmp_path: Path) -> None:
    desk = open_desk(tmp_path / "run", most=1)
    ask(desk, "a")
    with pytest.raises(UserError, match="there are 1 workers already: the hub takes 1"):
        ask(desk, "b")
    sessions = 2 * desk.most + 16
    link = DeskLink(desk)
    for _ in range(sessions):
        line = Line(link, KEY, 1.0)
        line.open()
        if len(desk._sessions) < sessions:
            line.call("run")
    with pytest.raises(UserError, match="status 429"):
        line.call("run")
    link.now = 100.0  # those of nobody are forgotten by then
    line.open()
    line.call("run")
    assert len(desk._sessions) <= sessions


def test_any_number_of_workers_may_come_and_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("justforward.desk.NAMES", 3)
    desk = open_desk(tmp_path / "run", most=1)
    rounds = desk.conductor.rounds
    for number in range(8):
        made, _, _ = ask(desk, f"spot-{number}")
        raw = seal(KEY, desk.conductor.run, "turn", made.line._session, 9, made._turn().pack())
        assert isinstance(desk.receive("turn", raw, 0.5), Reply)
        made.line._counter = 9
        made.line.call("leave")
        assert len(rounds.members) == len(desk._numbers) <= 3 + 1
    # who is struck off is remembered: a name of its own is no way back
    for number in range(3):
        made, _, _ = ask(desk, f"bad-{number}")
        for _ in range(3):
            with pytest.raises(UserError):
                made.line.call("turn", b"rubbish")
    with pytest.raises(
        UserError, match="of the 3 workers that have been there most have sent what is no answer"
    ):
        ask(desk, "honest")


def test_one_that_is_forgotten_while_an_old_connection_waits_is_to_join(tmp_path: Path) -> None:
    desk = open_desk(tmp_path / "run", workers=2)
    made, _, link = ask(desk)
    raw = seal(KEY, desk.conductor.run, "turn", made.line._session, 9, made._turn().pack())
    waiting = desk.receive("turn", raw, link.now)
    assert isinstance(waiting, Waiting)
    made.line._counter = 9
    made.line.call("leave")
    assert desk.conductor.forget(0)
    reply = desk.again(waiting, 1.0)
    assert reply is not None
    assert reply.status == 403


def test_what_differs_is_named(tmp_path: Path) -> None:
    desk = open_desk(tmp_path / "run")
    made, _own, _link = ask(desk)
    header = made._header

    def refused(**changes: Any) -> str:
        said = {"name": "other", "protocol": PROTOCOL, "version": justforward.__version__}
        said |= {"header": header, "rows": "d" * 64, "tokens": "", **changes}
        line = Line(DeskLink(desk), KEY, 1.0)
        line.open()
        with pytest.raises(UserError) as caught:
            line.call("join", zipped(said))
        return str(caught.value)

    assert "its version of justforward is '9.9.9'" in refused(version="9.9.9")
    assert f"its protocol is 9, and the hub's is {PROTOCOL}" in refused(protocol=9)
    assert "fingerprint of its base model is 'f00'" in refused(header={**header, "base": "f00"})
    assert "rule is 'sgd', and the run's 'rms" in refused(header={**header, "rule": "sgd"})
    assert "its eps is [0.5]" in refused(header={**header, "groups": [0.5]})
    assert "noise is 99" in refused(header={**header, "noise": 99})
    tensors = [["other", *header["tensors"][0][1:]], *header["tensors"][1:]]
    assert "it tunes ['other'" in refused(header={**header, "tensors": tensors})
    assert "it tunes '1', and the run '4 tensors'" in refused(
        header={**header, "tensors": header["tensors"][:1]}
    )
    assert "its rows have sha256 'eee'" in refused(rows="eee")
    assert "its tokenizer makes other tokens" in refused(tokens="fff")
    assert "neither what it tunes" in refused(header=None)
    assert "neither what it tunes" in refused(tokens=None)
    assert "needs a name of 1 to 64 letters" in refused(name="\n")
    assert [m["name"] for m in desk.conductor.status()["members"]] == ["w"]


def test_the_first_worker_must_tune_what_the_hub_was_told(tmp_path: Path) -> None:
    desk = open_desk(tmp_path / "run", seed=4)
    link = DeskLink(desk)
    made, own, log = worker(link)
    own.config["seed"] = 5
    with pytest.raises(UserError, match="w: seed is 5, and the run's 4"):
        made.run(log)
    assert not desk.conductor.folder.log.exists()
    own.config["seed"] = 4
    made.line.wait = 1.0
    made.line.open()
    assert made.run(0) == desk.conductor.steps


# ----------------------------------------------------------------------------------------- rubbish


def test_a_client_that_sends_rubbish_is_struck_off_and_the_others_go_on(tmp_path: Path) -> None:
    desk = open_desk(tmp_path / "run")
    bad, _, _ = ask(desk, "bad")
    for _ in range(3):
        with pytest.raises(UserError, match="a turn of 7 bytes"):
            bad.line.call("turn", b"rubbish")
    with pytest.raises(UserError, match="not listened to any more"):
        bad.line.call("turn", bad._turn().pack())
    good, _, log = worker(DeskLink(desk), "good")
    steps = good.run(log)
    assert steps == desk.conductor.steps
    members = {m["name"]: m for m in desk.conductor.status()["members"]}
    assert (members["bad"]["strikes"], members["good"]["strikes"]) == (3, 0)
    line = Line(DeskLink(desk), KEY, 1.0)
    line.open()
    said = {"name": "bad", "protocol": PROTOCOL, "version": justforward.__version__, "tokens": ""}
    with pytest.raises(UserError, match="bad: it sent what is no answer"):
        line.call("join", zipped({**said, "header": good._header, "rows": "d" * 64}))


def test_one_that_is_struck_off_has_no_say_about_weights(tmp_path: Path) -> None:
    desk = open_desk(tmp_path / "run", hash_every=5)
    bad, _, _ = ask(desk, "bad")
    for _ in range(3):
        with pytest.raises(UserError):
            bad.line.call("turn", b"rubbish")
    good, _, log = worker(DeskLink(desk), "good")
    said, conductor = good._turn, desk.conductor

    def lies_first() -> Turn:
        turn = said()
        if turn.weights is not None:
            lie = replace(turn, weights=bytes(32))
            with pytest.raises(UserError, match="not listened to"):
                conductor.turn(0, lie, 1.0)
        return turn

    good._turn = lies_first
    assert good.run(log) == 20
    assert [m["replays"] for m in conductor.status()["members"]] == [0, 0]


@pytest.mark.parametrize("how", ["leaves", "is struck off", "says another", "at another step"])
def test_weights_that_are_not_compared(tmp_path: Path, how: str) -> None:
    """Of one that goes, of other steps than those that are agreed; and what a worker says first counts."""
    desk = open_desk(tmp_path / "run", hash_every=5)
    conductor = desk.conductor
    good, _, log = worker(DeskLink(desk), "good")
    assert good.run(log) == 20
    other, _, _ = ask(desk, "other")
    step = 13 if how == "at another step" else 10
    history = bytes(conductor._digests[8 * step : 8 * step + 8])
    honest, lie = (Turn(step, history, weights=weights * 32) for weights in (b"h", b"l"))
    conductor.turn(1, honest if how == "says another" else lie, 1.0)
    if how == "leaves":
        other.line.call("leave")
    elif how == "says another":
        conductor.turn(1, lie, 1.0)
    while how == "is struck off" and not conductor.rounds.dropped(1):
        conductor.strike(1, "rubbish")
    order = conductor.turn(0, honest, 1.0)
    assert order is not None
    assert order.says == DONE
    assert [m["replays"] for m in conductor.status()["members"]] == [0, 0]


def test_an_old_connection_that_ends_late_is_not_the_worker_going(tmp_path: Path) -> None:
    """It has sent the same message again on a new one, as it does where a reply was lost."""
    desk = open_desk(tmp_path / "run", workers=2)
    made, _, link = ask(desk)
    raw = seal(KEY, desk.conductor.run, "turn", made.line._session, 9, made._turn().pack())
    first, second = (desk.receive("turn", raw, link.now + after) for after in (1.0, 2.0))
    assert isinstance(first, Waiting)
    assert isinstance(second, Waiting)
    ask(desk, "second")
    work = desk.conductor.order(0, 0, 3.0)
    assert work is not None
    member = desk.conductor.rounds.members[0]
    desk.hung_up(first)
    assert member.alive
    assert desk.conductor.order(0, 0, 3.0) == work
    desk.hung_up(second)
    assert not member.alive


def test_nan_is_no_answer_and_an_outlier_is_drawn_in_and_named(tmp_path: Path) -> None:
    desk = open_desk(tmp_path / "run", deviations=6.0, max_forwards=2)
    made, _own, _link = ask(desk)
    work = Order.unpack(made.line.call("turn", made._turn().pack())).work
    assert work is not None
    turn = made._look(work)
    wild = turn.sights[0]
    nan = replace(wild, rises=((float("nan"), *wild.rises[0][1:]),))
    with pytest.raises(UserError, match="a number that is not finite"):
        made.line.call("turn", replace(turn, sights=(nan,)).pack())
    assert desk.conductor.steps == 0
    far = replace(wild, rises=((1e12, *wild.rises[0][1:]),))
    made.line.call("turn", replace(turn, sights=(far,)).pack())
    assert desk.conductor.steps == 1
    assert desk.conductor.status()["members"][0]["drawn_in"] == 1
    found = desk.conductor.recent[0].projected_grads[0]
    assert abs(found) < 1e6


@pytest.mark.parametrize("deviations", [0.0, 10.0])
@pytest.mark.parametrize("what", ["rise of the loss", "loss"])
def test_what_no_loss_can_be_is_no_answer_and_its_worker_is_named(
    tmp_path: Path, what: str, deviations: float
) -> None:
    desk = open_desk(tmp_path / "run", deviations=deviations)
    liar, _, log = worker(DeskLink(desk), "liar")
    look = liar._look

    def huge(work: Any) -> Turn:
        turn = look(work)
        if what == "loss":
            return replace(turn, sights=tuple(replace(s, loss=-3e38) for s in turn.sights))
        rises = [tuple((*own[1:], -3e38) for own in s.rises) for s in turn.sights]
        return replace(
            turn, sights=tuple(replace(s, rises=r) for s, r in zip(turn.sights, rises, strict=True))
        )

    liar._look = huge
    with pytest.raises(UserError, match=rf"no answer: a {what} of 3e\+38: beyond 1e\+14"):
        liar.run(log)
    assert desk.conductor.steps == 0
    honest, _, log = worker(DeskLink(desk), "honest")
    assert honest.run(log) == 20
    members = {m["name"]: m for m in desk.conductor.status()["members"]}
    assert (members["liar"]["strikes"], members["honest"]["strikes"]) == (3, 0)
    assert members["liar"]["why"].startswith(f"a {what} of 3e+38")


def test_a_step_that_cannot_be_made_says_whose_rise_is_the_largest(tmp_path: Path) -> None:
    desk = open_desk(tmp_path / "run", rule="sgd", lr=1e30)
    made, _, log = worker(DeskLink(desk), "largest")
    look = made._look
    made._look = lambda work: _raised(look(work), 1e12)
    with pytest.raises(UserError, match=r"the largest rise of the loss, 1e\+12, is from largest"):
        made.run(log)


def _raised(turn: Turn, rise: float) -> Turn:
    raised = [tuple(tuple(rise for _ in own) for own in sight.rises) for sight in turn.sights]
    return replace(
        turn, sights=tuple(replace(s, rises=r) for s, r in zip(turn.sights, raised, strict=True))
    )


def test_without_a_finite_loss_the_run_cannot_go_on(tmp_path: Path) -> None:
    desk = open_desk(tmp_path / "run", max_forwards=2)
    made, _own, _link = ask(desk)
    work = Order.unpack(made.line.call("turn", made._turn().pack())).work
    assert work is not None
    turn = replace(made._turn(), blank=work.parts)
    with pytest.raises(
        UserError, match="the run cannot go on: step 0: no worker has a finite loss"
    ):
        made.line.call("turn", turn.pack())
    assert desk.conductor.failed == "step 0: no worker has a finite loss: lower lr or eps"


@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from([*KINDS, "", "nothing"]), raw=st.binary(max_size=120), known=st.booleans()
)
def test_rubbish_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, kind: str, raw: bytes, known: bool
) -> None:
    desk, _made, link = _desk(tmp_path_factory)
    before = (log_of(desk), len(desk._sessions), desk.conductor.status())
    if known:  # the bytes of an envelope that is right in all but its proof
        raw = link.sent[-1][1][:20] + raw
    reply = desk.receive(kind, raw, 1.0)
    assert isinstance(reply, Reply)
    assert 400 <= reply.status < 500 or (kind == "hello" and not raw)
    assert (log_of(desk), len(desk._sessions), desk.conductor.status()) == before


_KEPT: list[Any] = []


def _desk(factory: pytest.TempPathFactory) -> Any:
    if not _KEPT:
        desk = open_desk(factory.mktemp("fuzz") / "run")
        made, _, link = ask(desk)
        _KEPT.append((desk, made, link))
    return _KEPT[0]


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(kind=st.sampled_from(KINDS[1:]), payload=st.binary(max_size=100))
def test_rubbish_of_one_who_has_the_key_makes_no_step(
    tmp_path_factory: pytest.TempPathFactory, kind: str, payload: bytes
) -> None:
    desk, _made, _link = _desk(tmp_path_factory)
    line = Line(DeskLink(desk, now=2.0), KEY, 1.0)
    line.open()
    size, sessions = len(log_of(desk)), len(desk._sessions)
    raw = seal(KEY, desk.conductor.run, kind, line._session, 1, payload)
    reply = desk.receive(kind, raw, 2.0)
    desk._sessions.pop(line._session, None)
    assert isinstance(reply, (Reply, Waiting))
    assert len(log_of(desk)) == size
    assert len(desk._sessions) == sessions
    assert reply.status < 500 if isinstance(reply, Reply) else True


def test_a_message_may_be_as_large_as_its_kind_needs(tmp_path: Path) -> None:
    desk = open_desk(tmp_path / "run")
    for kind in KINDS:
        reply = desk.receive(kind, bytes(desk.limit(kind) + 1), 0.0)
        assert isinstance(reply, Reply)
        assert (reply.status, reply.body) == (413, b"too large")


# ------------------------------------------------------------------------------------------- lines


def test_a_hub_that_is_not_there() -> None:
    notes: list[str] = []
    with pytest.raises(
        UserError, match=r"the hub does not answer \(connection refused\), for [0-9]+ s"
    ):
        Line(Down(), KEY, 2.0, notes.append).open()
    assert notes == ["the hub does not answer: waiting for it"]


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_proxy_that_says_later_is_asked_again(
    tmp_path: Path, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("justforward.line.time.sleep", lambda seconds: None)

    class Proxy(DeskLink):
        """Every third message meets a hub that is away."""

        def post(self, kind: str, raw: bytes) -> tuple[int, bytes]:
            if len(self.sent) % 3 == 2:
                self.sent.append((kind, raw))
                return status, b"<html>Bad Gateway</html>"
            return super().post(kind, raw)

    desk = open_desk(tmp_path / "run")
    made, own, log = worker(Proxy(desk))
    assert made.run(log) == desk.conductor.steps == 20
    fresh = Party({"config": desk.conductor.info()["config"], "private": False}).model
    replay(fresh, desk.conductor.folder.log)
    assert fingerprint(fresh) == fingerprint(own.model)


@pytest.mark.parametrize("status", [200, 400, 404, 409, 413])
def test_what_is_said_without_the_proof_and_not_for_later_is_an_error(
    tmp_path: Path, status: int
) -> None:
    class Proxy(DeskLink):
        def post(self, kind: str, raw: bytes) -> tuple[int, bytes]:
            return (status, b"<html>") if kind == "run" else super().post(kind, raw)

    with pytest.raises(UserError, match=f"not the proof of the key .status {status}."):
        greet(Line(Proxy(open_desk(tmp_path / "run")), KEY, 5.0))


def test_a_proxy_whose_hub_stays_away_is_named_with_what_it_says() -> None:
    class Proxy(Down):
        def post(self, kind: str, raw: bytes) -> tuple[int, bytes]:
            return 502, b"Bad Gateway"

    with pytest.raises(HubGone, match=r"does not answer .status 502: Bad Gateway., for 0 s now"):
        Line(Proxy(), KEY, 0.0).open()


@pytest.mark.parametrize("before", ["run", "log", "join"])
def test_a_hub_that_is_started_anew_while_a_worker_begins(tmp_path: Path, before: str) -> None:
    """The model is loaded once."""
    desk = open_desk(tmp_path / "run")
    ask(desk, "first")

    class Restarted(DeskLink):
        def post(self, kind: str, raw: bytes) -> tuple[int, bytes]:
            if kind == before and self.desk is desk:
                kill(self.desk)
                self.desk = open_desk(tmp_path / "run", resume=True)
            return super().post(kind, raw)

    link = Restarted(desk)
    made, own, log = worker(link)
    built: list[bool] = []
    made._build = lambda path, resume: built.append(resume) or own.build(path, resume)
    assert made.run(log) == 20
    assert link.desk is not desk
    assert built == [True]


def test_what_answers_is_no_hub() -> None:
    class Web:
        def post(self, kind: str, raw: bytes) -> tuple[int, bytes]:
            return 404, b"<html>"

        def close(self) -> None:
            """Nothing is held."""

    with pytest.raises(UserError, match="no hub of this version"):
        Line(Web(), KEY, 1.0).open()


def test_sights_of_rows_that_follow_each_other_go_as_one() -> None:
    parts = [Sight(0, (0,), (i, i + 1), ((i + 0.5, i + 1.5),), float(i), 2) for i in (0, 2, 6)]
    whole = joined(parts)
    assert [sight.rows for sight in whole] == [(0, 1, 2, 3), (6, 7)]
    assert whole[0].rises == ((0.5, 1.5, 2.5, 3.5),)
    assert whole[0].loss == 1.0
    assert len(whole[0].pack()) == 39 + 4 * 4


def test_terms_of_a_run_stay(tmp_path: Path) -> None:
    open_desk(tmp_path / "run").conductor.close()
    for changed, said in (
        ({"lr": 2.0}, "--lr is 0.001 in the run and 2.0 now"),
        ({"part": 3}, "--part is 2 in the run and 3 now"),
        ({"own_rows": True}, "--own-rows is False in the run and True now"),
        ({"hash_every": 6}, "--hash-every is 5 in the run and 6 now"),
    ):
        with pytest.raises(UserError, match=said):
            open_run(serve_config(tmp_path / "run", resume=True, **changed))
    with pytest.raises(UserError, match="exists: go on with it with --resume"):
        open_run(serve_config(tmp_path / "run"))
    with pytest.raises(UserError, match=r"no hub's folder: hub.json: No such file"):
        open_run(serve_config(tmp_path / "nothing", resume=True))
    state = tmp_path / "run" / "hub.json"
    kept = json.loads(state.read_text())
    state.write_text(json.dumps({**kept, "protocol": 9}))
    with pytest.raises(UserError, match=f"made with protocol 9, this version has {PROTOCOL}"):
        open_run(serve_config(tmp_path / "run", resume=True))
    state.write_text("[]")
    with pytest.raises(UserError, match="no hub's folder"):
        open_run(serve_config(tmp_path / "run", resume=True))
