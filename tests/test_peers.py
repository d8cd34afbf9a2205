"""Bytes between processes arrive whole, whatever their length; who is missing is named."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from justforward.errors import UserError
from justforward.peers import Peers, spell
from justforward.sockets import Share, Sockets, _address
from processes import together

LENGTHS = [0, 1, 100, (1 << 16) - 5, (1 << 16) - 4, (1 << 16) - 3, 300_000]


def talks() -> list[Any]:
    """Everything that there is to say, in three processes; the lengths of what came, and whether it was right."""
    peers = Peers()
    found: list[Any] = [peers.rank, peers.size]
    for shift in range(len(LENGTHS)):
        lengths = [LENGTHS[(shift + rank) % len(LENGTHS)] for rank in range(peers.size)]
        said = peers.swap(bytes([peers.rank + 1]) * lengths[peers.rank], 30.0, "here")
        found.append(said == [bytes([r + 1]) * n for r, n in enumerate(lengths)])
        found.append(
            peers.tell(bytes([peers.rank]) * lengths[1], 1, 30.0, "here") == b"\1" * lengths[1]
        )
    found.append(peers.ask({"rank": peers.rank}, 30.0, "here"))
    found.append(peers.decide(peers.rank + 0.1, 30.0, "here"))
    pair = dist.new_group([0, 2])
    if peers.rank != 1:
        apart = Peers(pair)  # type: ignore[arg-type]
        found.append([apart.rank, apart.size, apart.ask(peers.rank, 30.0, "here")])
    peers.close()
    return found


def test_what_is_said_arrives(tmp_path: Path) -> None:
    for rank, found in enumerate(together(3, tmp_path, talks)):
        assert found[:2] == [rank, 3]
        assert found[2:16] == [True] * 14
        assert found[16] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert found[17] == 0.1
        assert found[18:] == ([] if rank == 1 else [[rank // 2, 2, [0, 2]]])


def dies(how: int) -> str:
    """Process 1 is gone, or does not answer, and process 0 has left for a reason of its own."""
    peers = Peers()
    peers.swap(b"here", 30.0, "at first")
    if peers.rank == 1:
        os.kill(os.getpid(), how)
    peers.swap(b"still here", 2.0, "in step 7")
    return "nothing was missed"


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (signal.SIGKILL, "worker 1 of 3 ended in step 7"),
        (signal.SIGSTOP, "worker 1 of 3 said nothing for 2 s in step 7"),
    ],
    ids=["ended", "silent"],
)
def test_who_is_missing_is_named_by_all_others(tmp_path: Path, how: int, said: str) -> None:
    stopped = 1 if how == signal.SIGSTOP else None
    found = together(3, tmp_path, dies, how, stopped=stopped)
    assert found == [("UserError", said), None, ("UserError", said)]


# ------------------------------------------------------------------------------------------- on the wire


def sent(peers: Peers) -> int:
    """Bytes that its connections have sent, as Linux counts them (TCP_INFO's tcpi_bytes_sent, less tcpi_bytes_retrans: a machine
    that is busy sends some twice).
    """
    assert peers._sockets is not None
    told = (s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256) for s in peers._sockets._to.values())  # fmt: skip
    return sum(first - again for first, again in (struct.unpack_from("<QQ", i, 200) for i in told))


def counted() -> list[int]:
    peers, found = Peers(), []
    for length in (0, 60, 1000):
        before = sent(peers)
        peers.swap(bytes(length), 30.0, "here")
        peers.swap(b"", 30.0, "here")  # what the others had to say has been read by then
        found.append(sent(peers) - before)
    peers.close()
    return found


def test_a_message_is_its_length_and_itself_on_the_wire(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("counted by Linux")
    for found in together(3, tmp_path, counted):
        assert found == [2 * (4 + length + 4) for length in (0, 60, 1000)]


def in_threads(size: int, act: Callable[[int, Share], Any]) -> list[Any]:
    """`act(rank, share)` in threads that share what they say."""
    said: list[bytes] = [b""] * size
    together, out = threading.Barrier(size), [None] * size

    def share(rank: int, raw: bytes) -> list[bytes]:
        said[rank] = raw
        together.wait(30)
        found = list(said)
        together.wait(30)
        return found

    def run(rank: int) -> None:
        try:
            out[rank] = act(rank, partial(share, rank))
        except UserError as error:
            out[rank] = str(error)  # type: ignore[call-overload]

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return out


def test_a_stranger_at_the_port_is_not_listened_to() -> None:
    """Nor waited for; one who says nothing, either."""
    strangers: list[socket.socket] = []

    def act(rank: int, share: Share) -> Any:
        def watched(raw: bytes) -> list[bytes]:
            found = share(raw)
            told = [json.loads(one) for one in found]
            if rank == 0 and "port" in told[1]:
                for greeting in (
                    b"",
                    bytes(20),
                    b"short",
                    bytes.fromhex(told[0]["token"]) + bytes(4),
                ):
                    made = socket.create_connection((told[1]["address"], told[1]["port"]))
                    made.sendall(greeting)
                    if greeting == b"short":
                        made.shutdown(socket.SHUT_WR)
                    strangers.append(made)
            return found

        made = Sockets(rank, 2, watched)
        other = 1 - rank
        found = made.exchange(b"from %d" % rank, [other], [other], time.monotonic() + 30)
        made.close()
        return found

    assert in_threads(2, act) == [({1: b"from 1"}, {}), ({0: b"from 0"}, {})]
    for stranger in strangers:
        stranger.close()


def test_one_who_cannot_be_reached_is_named_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(at: Any, timeout: float) -> Any:
        raise ConnectionRefusedError("Connection refused")

    monkeypatch.setattr("justforward.sockets.socket.create_connection", refused)
    monkeypatch.setattr("justforward.sockets._SECONDS", 0.2)
    first, second = in_threads(2, lambda rank, share: Sockets(rank, 2, share))
    assert first == second
    assert re.match(r"worker 0 cannot reach worker 1 at 127\.0\.0\.1, port \d+: Connection refused: workers need a TCP", first)  # fmt: skip


def test_an_address_that_others_can_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert socket.inet_aton(_address())
    monkeypatch.setenv("MASTER_ADDR", "no such host")
    assert socket.inet_aton(_address())


def beside() -> list[Any]:
    """As if the processes had come together by NCCL."""
    group = dist.new_group([0, 1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
        found = Peers().ask(dist.get_rank(), 30.0, "here")
        with pytest.raises(
            UserError, match=r"make it with dist.new_group\(ranks, backend='gloo'\)"
        ):
            Peers(group)
    return list(found)


def test_a_group_of_gpus_gets_one_of_gloo_beside_it(tmp_path: Path) -> None:
    assert together(2, tmp_path, beside) == [[0, 1]] * 2


def test_alone() -> None:
    peers = Peers()
    assert (peers.rank, peers.size) == (0, 1)
    assert peers.swap(b"a", 1.0, "") == [b"a"]
    assert peers.tell(b"b", 0, 1.0, "") == b"b"
    assert peers.ask([1], 1.0, "") == [[1]]
    peers.close()


def test_numbers_in_words() -> None:
    assert [spell([0]), spell([0, 2]), spell([0, 1, 2])] == [
        "worker 0",
        "workers 0 and 2",
        "workers 0, 1 and 2",
    ]
