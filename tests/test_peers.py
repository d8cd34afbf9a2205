"""Bytes between processes arrive whole, whatever their length; who is missing is named."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from justforward.errors import UserError
from justforward.peers import Peers, spell
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
