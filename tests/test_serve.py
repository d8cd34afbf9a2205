"""Hub and workers as processes and over real connections: killed, started again, late; what is sent that is no message."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from justforward import UserError, fingerprint, read_log, replay
from justforward.desk import Desk
from justforward.line import FolderLink, HttpLink, HubGone, Line
from justforward.mail import Mail, hold_folder, open_folder
from justforward.serve import Hall, attend, listen, open_run, serve
from justforward.wire import Order, seal
from parties import (
    KEY,
    Party,
    Running,
    close_all,
    end_of,
    open_desk,
    run_alone,
    running,
    serve_config,
    start,
    until,
    worker,
)


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    close_all()


def test_a_worker_that_is_killed_is_not_waited_for_and_one_that_joins_later_has_the_same_weights(
    tmp_path: Path,
) -> None:
    with running(tmp_path / "run", max_forwards=120) as hub:
        killed, stays = start(hub.url, 0.02), start(hub.url, 0.02)
        rounds = hub.desk.conductor.rounds
        until(lambda: sum(member.alive for member in rounds.members.values()) == 2)
        first = hub.desk.conductor.steps
        until(lambda: hub.desk.conductor.steps > first + 3)
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        dead, taken = time.monotonic(), hub.desk.conductor.steps
        until(lambda: hub.desk.conductor.steps > taken + 1)
        waited = time.monotonic() - dead
        assert waited < 5.0
        joiner, own, log = worker(HttpLink(hub.url), "joiner")
        assert joiner.run(log) == 60
        done = end_of(stays)
    assert any("does not answer, its rows are for others" in note for note in hub.notes)
    assert hub.notes[-1].startswith("step 60, ")
    assert done["fingerprint"] == fingerprint(own.model)
    alone = run_alone(tmp_path / "alone", max_forwards=120)
    assert read_log(hub.desk.conductor.folder.log).steps == read_log(alone.folder.log).steps


def test_a_hub_that_is_killed_or_stopped_and_started_again_goes_on(tmp_path: Path) -> None:
    port = listen("127.0.0.1", 0)
    number = port.getsockname()[1]
    port.close()
    key = tmp_path / "key"
    key.write_bytes(KEY)
    config = serve_config(tmp_path / "run", max_forwards=500)
    given = ["template", "labels", "estimator", "lr", "max_forwards", "hash_every", "seed", "model"]
    options = [f"--{name.replace('_', '-')}={getattr(config, name)}" for name in given]
    place = ["--out", str(tmp_path / "run"), f"--port={number}", f"--key-file={key}"]

    def hub(*more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "justforward", "serve", *place, *more]
        return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    log = tmp_path / "run" / "trajectory.jfl"
    first = hub(*options)
    part = start(f"http://127.0.0.1:{number}", 0.002)
    until(lambda: log.exists() and log.stat().st_size > 400)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert read_log(log).steps
    second, size = hub("--resume"), log.stat().st_size
    until(lambda: log.stat().st_size > size + 400)
    second.send_signal(signal.SIGINT)
    assert "go on with: justforward serve --resume" in second.communicate(timeout=60)[1]
    assert second.returncode == 130
    assert read_log(log).sealed
    third = hub("--resume", "--json")
    said, err = third.communicate(timeout=120)
    assert third.returncode == 0, err
    assert json.loads(said)["steps"] == 250
    done = end_of(part)
    fresh = Party({"config": {**vars(config)}, "private": False}).model
    assert replay(fresh, log) == 250
    assert fingerprint(fresh) == done["fingerprint"]
    alone = run_alone(tmp_path / "alone", max_forwards=500)
    assert read_log(log).steps == read_log(alone.folder.log).steps


def test_files_in_a_folder_do_what_a_port_does(tmp_path: Path) -> None:
    place = tmp_path / "mail"
    with pytest.raises(UserError, match="no hub has opened it"):
        FolderLink(place)
    with running(tmp_path / "run", place, max_forwards=8) as hub:
        (place / "in" / "turn-0").write_bytes(b"somebody else's")
        (place / "in" / f"turn-{'0' * 32}").write_bytes(bytes(10**5))
        (place / "in" / f"nothing-{'0' * 32}").write_bytes(b"x")
        made, own, log = worker(FolderLink(place))
        assert made.run(log) == 4
    kept = sorted(file.name for file in (place / "out").iterdir())
    assert kept == [f"nothing-{'0' * 32}", f"turn-{'0' * 32}"]
    assert (place / "out" / kept[0]).read_bytes() == b"\x94\x01no such thing"
    assert (place / "out" / kept[1]).read_bytes() == b"\x9d\x01too large"
    assert [file.name for file in (place / "in").iterdir()] == ["turn-0"]
    open_folder(place)  # by the next hub: what is left over is removed, what is not its own stays
    assert [*(place / "out").iterdir()] == []
    assert (place / "in" / "turn-0").exists()
    fresh = Party({"config": hub.desk.conductor.info()["config"], "private": False}).model
    replay(fresh, hub.desk.conductor.folder.log)
    assert fingerprint(fresh) == fingerprint(own.model)


def test_a_folder_that_is_away_for_a_moment_is_waited_for(tmp_path: Path) -> None:
    place, away = tmp_path / "mail", tmp_path / "away"
    with running(tmp_path / "run", place) as hub:
        place.rename(away)
        until(lambda: hub.notes)
        away.rename(place)
        made, _, log = worker(FolderLink(place))
        assert made.run(log) == 20
    said = [note for note in hub.notes if note.startswith("--folder")]
    assert said == [
        f"--folder {place}: cannot be read: No such file or directory: waiting for it",
        f"--folder {place}: is there again",
    ]


def test_what_nobody_takes_from_a_folder_is_removed(tmp_path: Path) -> None:
    place = tmp_path / "mail"
    open_folder(place)
    now = time.monotonic()
    mail = Mail(place, print, now)
    name = f"turn-{'0' * 32}"
    stale = [place / "out" / name, place / "out" / f".{name}", place / "in" / f".{name}"]
    others = [place / "out" / "notes.txt", place / "in" / name, place / "in" / ".notes"]
    for file in (*stale, *others):
        file.touch()
    assert mail.requests(now + 100.0) == [(place / "in" / name, "turn")]
    fresh = place / "out" / f"turn-{'1' * 32}"
    fresh.touch()
    mail.requests(now + 650.0)
    assert all(file.exists() for file in (*stale, *others, fresh))
    mail.requests(now + 750.0)
    assert not any(file.exists() for file in stale)
    assert all(file.exists() for file in (*others, fresh))


def test_two_hubs_on_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUSTFORWARD_KEY", "k" * 16)
    place = tmp_path / "mail"
    notes: list[str] = []
    with hold_folder(place, notes.append):
        open_folder(place)
        request = place / "in" / f"turn-{'0' * 32}"
        request.touch()
        with pytest.raises(UserError, match="another hub is at work in it: stop that one"):
            serve(serve_config(tmp_path / "second", folder=str(place)))
        assert request.exists()
        assert not (tmp_path / "second").exists()
    hold_folder(place, notes.append).close()  # the first one is gone
    assert notes == []

    def cannot(file: Any) -> bool:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("justforward.mail.claim", cannot)
    hold_folder(place, notes.append).close()
    assert notes == [
        f"--folder {place}: cannot be locked: Operation not supported: see to it that no other hub uses it"
    ]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: cannot be used: File exists"):
        hold_folder(tmp_path / "file", notes.append)


def test_one_that_looks_when_the_run_ends_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows are taken over while it looks, and the hub has no farewell for others."""
    monkeypatch.setattr("justforward.serve.FAREWELL", 0.0)
    with running(tmp_path / "run", deadline=0.05, max_forwards=4) as hub:
        slow, own, log = worker(HttpLink(hub.url), "slow")
        losses, begun, over = own.losses, threading.Event(), threading.Event()

        def looks(rows: Any) -> Any:
            begun.set()
            assert over.wait(30)
            return losses(rows)

        slow.rows = replace(slow.rows, losses=looks)
        taken: list[int] = []
        thread = threading.Thread(target=lambda: taken.append(slow.run(log)))
        thread.start()
        assert begun.wait(30)
        fast, other, log = worker(HttpLink(hub.url), "fast")
        assert fast.run(log) == 2
        time.sleep(0.5)
        assert hub.thread.is_alive()
        over.set()
        thread.join(30)
        assert taken == [2]
        assert fingerprint(own.model) == fingerprint(other.model)
        hub.thread.join(30)
        assert not hub.thread.is_alive()
    assert "there is no further step: slow is still looking and will be told" in hub.notes


def test_one_that_was_killed_while_it_looked_is_waited_for_at_the_end_for_a_while_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("justforward.serve.LOOKING", 0.3)
    with running(tmp_path / "run", deadline=0.05, max_forwards=4) as hub:
        killed, _, log = worker(HttpLink(hub.url), "killed")
        with tempfile.TemporaryDirectory() as folder:
            killed._begin(Path(folder), log)
            assert Order.unpack(killed.line.call("turn", killed._turn().pack())).work is not None
            assert killed.opt is not None
            killed.opt.close()
            killed.line.link.close()
        fast, _, log = worker(HttpLink(hub.url), "fast")
        assert fast.run(log) == 2
        hub.thread.join(5)
        assert not hub.thread.is_alive()


def test_a_worker_whose_hub_is_gone_says_that_the_run_may_be_over(tmp_path: Path) -> None:
    with running(tmp_path / "run") as hub:
        made, own, log = worker(HttpLink(hub.url), wait=0.3)
        losses = own.losses

        def ends(rows: Any) -> Any:
            if hub.desk.conductor.steps == 3:
                hub.stop()
            return losses(rows)

        made.rows = replace(made.rows, losses=ends)
        with pytest.raises(
            HubGone,
            match="check that it runs, or, where the run is over, that it has this worker's 3 steps",
        ):
            made.run(log)


def test_one_that_waits_and_hangs_up_is_not_counted_on(tmp_path: Path) -> None:
    with running(tmp_path / "run", workers=2) as hub:
        made, _, log = worker(HttpLink(hub.url))
        with tempfile.TemporaryDirectory() as folder:
            made._begin(Path(folder), log)
            line, member = made.line, hub.desk.conductor.rounds.members[0]
            raw = seal(KEY, line._run, "turn", line._session, 99, made._turn().pack())
            host, port = hub.url.removeprefix("http://").split(":")
            with socket.create_connection((host, int(port)), timeout=10) as connection:
                head = f"POST /turn HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n"
                connection.sendall(head.encode() + raw)
                until(lambda: member.alive)
                time.sleep(0.2)  # it waits for a second worker
                assert member.alive
            until(lambda: not member.alive, 5.0)
            assert made.opt is not None
            made.opt.close()
            made.line.link.close()


@pytest.fixture(scope="module")
def open_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    desk = Desk(KEY, open_run(serve_config(tmp_path_factory.mktemp("hub") / "run")), 8)
    hub = Running(desk, listen("127.0.0.1", 0))
    link = HttpLink(hub.url)
    Line(link, KEY, 30.0).open()  # its thread has come to listen
    link.close()
    yield hub
    hub.stop()
    desk.conductor.close()


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    path=st.sampled_from(["hello", "run", "log", "join", "turn", "leave", "status", "", "x/y"]),
    body=st.binary(max_size=200),
    method=st.sampled_from(["POST", "GET", "PUT", "DELETE"]),
)
def test_rubbish_over_http(open_hub: Running, path: str, body: bytes, method: str) -> None:
    request = urllib.request.Request(f"{open_hub.url}/{path}", data=body, method=method)
    before = open_hub.desk.conductor.status()
    if path == "hello" and not body and method == "POST":
        return
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=10)
    with caught.value as error:
        assert 400 <= error.code < 500
        assert b"Traceback" not in error.read()
    assert open_hub.desk.conductor.status() == before


@settings(max_examples=20, suppress_health_check=list(HealthCheck))
@given(raw=st.binary(min_size=1, max_size=300))
def test_what_is_not_even_http(open_hub: Running, raw: bytes) -> None:
    host, port = open_hub.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(raw)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(4096):
            pass
    assert Line(HttpLink(open_hub.url), KEY, 1.0).open() is None  # it is still there


def test_a_body_that_is_too_large_is_not_read(open_hub: Running) -> None:
    host, port = open_hub.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"POST /turn HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")
        connection.sendall(bytes(1 << 16))
        assert connection.recv(4096).startswith(b"HTTP/1.1 413")


@contextlib.contextmanager
def sending(hub: Running, kind: str, beginning: bytes, whole: int) -> Iterator[socket.socket]:
    """A connection that has sent the beginning of a message."""
    host, port = hub.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = f"POST /{kind} HTTP/1.1\r\nHost: x\r\nContent-Length: {whole}\r\n\r\n"
        connection.sendall(head.encode() + beginning)
        yield connection


@pytest.mark.parametrize("session", ["none", "old"])
def test_a_long_message_without_a_session_is_not_read_to_its_end(
    open_hub: Running, session: str
) -> None:
    line = Line(HttpLink(open_hub.url), KEY, 1.0)
    line.open()
    beginning, said = bytes(1 << 15), b"no such session"
    if session == "old":
        line._counter = 5
        line.call("run")
        beginning, said = line._session + bytes(1 << 15), b"an old message"
    with sending(open_hub, "join", beginning, 1 << 20) as connection:
        got = connection.recv(4096)
        while said not in got:
            more = connection.recv(4096)
            assert more
            got += more
        assert got.startswith(b"HTTP/1.1 401")
    line.link.close()


def test_all_that_is_being_read_has_a_bound_and_others_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("justforward.serve.SMALL", 64)
    monkeypatch.setattr("justforward.serve.READING", 1 << 15)
    with running(tmp_path / "run") as hub:
        line = Line(HttpLink(hub.url), KEY, 1.0)
        line.open()
        beginning = line._session + bytes(30000)
        with sending(hub, "join", beginning, 1 << 20):
            until(lambda: hub.hall._reading > 29000)
            with sending(hub, "join", beginning, 1 << 20) as second:
                assert second.recv(4096).startswith(b"HTTP/1.1 503")
            until(lambda: hub.hall._reading < 31000)
            line.call("run")  # a short one is taken
        until(lambda: hub.hall._reading == 0)
        line.link.close()
        made, _, log = worker(HttpLink(hub.url))
        assert made.run(log) == 20
        assert hub.hall._reading == 0


@contextlib.contextmanager
def answering(reply: bytes) -> Iterator[str]:
    """The address of what gives this answer to the first who asks."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                connection.recv(65536)
                connection.sendall(reply)

        thread = threading.Thread(target=answer)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        thread.join(10)


def test_a_reply_without_end_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("justforward.line.MOST_REPLY", 1000)
    for head in (b"Content-Length: 1000000000\r\n", b""):
        reply = b"HTTP/1.1 200 OK\r\n" + head + b"\r\n" + bytes(100000)
        with answering(reply) as url:
            link = HttpLink(url)
            with pytest.raises(UserError, match="no hub: its reply is longer than 16 MiB"):
                Line(link, KEY, 1.0).open()
            link.close()
    open_folder(tmp_path)
    monkeypatch.setattr("justforward.line.secrets.token_hex", lambda size: "0" * 32)
    (tmp_path / "out" / f"hello-{'0' * 32}").write_bytes(bytes(1003))
    with pytest.raises(UserError, match="no hub: its reply is longer than 16 MiB"):
        Line(FolderLink(tmp_path), KEY, 1.0).open()


def test_a_reply_is_not_unpacked() -> None:
    packed = gzip.compress(bytes(1 << 20))
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: {len(packed)}\r\n\r\n"
    with answering(head.encode() + packed) as url:
        link = HttpLink(url)
        assert link.post("hello", b"") == (200, packed)
        link.close()


def test_a_hub_that_is_told_to_stop_stops(tmp_path: Path) -> None:
    notes: list[str] = []
    open_folder(tmp_path / "mail")
    hall = Hall(open_desk(tmp_path / "run"), notes.append)
    asyncio.run(attend(hall, None, tmp_path / "mail", lambda: True))
    assert notes == ["step 0, 0 workers"]


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    taken = listen("127.0.0.1", 0)
    taken.listen()
    key = tmp_path / "key"
    key.write_bytes(KEY)
    number = taken.getsockname()[1]
    with pytest.raises(
        UserError, match=f"--port {number}: 127.0.0.1 cannot be listened at: Address"
    ):
        serve(serve_config(tmp_path / "run", port=number, key_file=str(key)))
    taken.close()
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"--port 0: 203.0.113.9 cannot be listened at: Cannot"):
        listen("203.0.113.9", 0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"port": 70000}, "--port is 70000: it must be from 0 to 65535"),
        ({"deadline": 0.0}, "--deadline is 0.0: it must be positive"),
        ({"deviations": -1.0}, "--deviations is -1.0: it must be finite and at least 0"),
        ({"tuner": "prefix"}, "--tuner is 'prefix': a prefix starts from what the model computes"),
        ({"looks": "one-point"}, "--looks is 'one-point': workers cannot share it"),
        ({"model": None}, "--model is missing"),
        ({"template": None}, "--template is missing"),
        ({"estimator": "activation", "batch_size": 9000}, "a step has 9000 directions"),
        ({"max_forwards": 1}, "--max-forwards is 1: one step takes 2"),
        (
            {"deviations": 6.0, "part": 4, "batch_size": 16},
            "--part is 4: of --batch-size 16 it makes 4 parts.*give --part 2",
        ),
        (
            {"deviations": 6.0, "batch_size": 4},
            "it makes 4 parts, .*: give --batch-size 5 or more",
        ),
        (
            {"workers": 3, "most_workers": 2},
            "--workers is 3 and --most-workers 2: a step would wait for more",
        ),
        (
            {
                "own_rows": True,
                "estimator": "activation",
                "batch_size": 64,
                "num_samples": 64,
                "workers": 2,
                "max_forwards": 999,
            },
            "--workers is 2: with --own-rows, --batch-size 64 and --num-samples 64 a step has room for 1 workers",
        ),
    ],
)
def test_options_that_cannot_be(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        open_desk(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_libraries_that_are_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUSTFORWARD_KEY", "k" * 16)
    for name in ("uvicorn", "urllib3"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="the package uvicorn is not installed"):
        serve(serve_config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="the package urllib3 is not installed"):
        HttpLink("http://127.0.0.1:1")


@pytest.mark.parametrize(
    "url",
    [
        *("hub:80", "http://", "https://:80", "http://127.0.0.1:99999", "http://host:80a", "http://[::1"),
        *("http://127.0.0.1 :80", "http://host:80/a b", "http://a..b:80", "http://" + 70 * "x", "http://h\n", ""),
    ],
)  # fmt: skip
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(UserError) as caught:
        HttpLink(url)
    assert str(caught.value).startswith(f"{url!r} is not the address of a hub: ")
    assert "\n" not in str(caught.value)


@settings(max_examples=200)
@given(st.text(max_size=20), st.sampled_from(["", "http://", "https://", "http://127.0.0.1:"]))
def test_any_address_is_one_or_is_refused(text: str, scheme: str) -> None:
    with contextlib.suppress(UserError):
        HttpLink(scheme + text).close()


@pytest.mark.parametrize(
    "url", ["http://hub", "https://hub:80/a/b", "http://[::1]:8765", "http://höst:1"]
)
def test_addresses_that_could_be_a_hub_s(url: str) -> None:
    HttpLink(url).close()


def test_hosts_that_cannot_be_listened_at() -> None:
    with pytest.raises(UserError, match=r"--port 0: a\.\.b cannot be listened at"):
        listen("a..b", 0)
