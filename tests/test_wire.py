"""What is sent arrives, or is refused: nothing damaged, old, or meant for others is taken for a message."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from justforward import Sight, Step, UserError
from justforward.wire import (
    DONE,
    ENVELOPE,
    GO,
    History,
    Order,
    Refused,
    Turn,
    Work,
    pack_step,
    read_key,
    seal,
    seal_reply,
    unpack_step,
    unseal,
    unseal_reply,
    unzipped,
    zipped,
)

KEY, RUN, SESSION = b"k" * 16, b"r" * 16, b"s" * 16
numbers = st.floats(-(2.0**99), 2.0**99, width=32).map(lambda x: float(np.float32(x)))


@st.composite
def steps(draw: Any) -> Step:
    groups = draw(st.integers(1, 3))

    def several(least: int, most: int) -> tuple[float, ...]:
        return tuple(draw(st.lists(numbers, min_size=least, max_size=most)))

    return Step(
        draw(st.integers(0, 2**64 - 1)),
        several(1, 9),
        several(groups, groups),
        several(groups, groups),
        several(0, 3),
        norms=several(0, 3),
        rates=several(0, 3),
    )


def same(a: Step, b: Step) -> bool:
    """But for what is not in the log."""
    return pack_step(a) == pack_step(b)


@given(st.lists(steps(), max_size=4), st.booleans())
def test_orders_arrive(taken: list[Step], done: bool) -> None:
    work = Work(7, 1, 8, 2, ((0, 2), (4, 4)))
    order = Order(DONE if done else GO, tuple(taken), None if done else work)
    found = Order.unpack(order.pack())
    assert (found.says, found.work) == (order.says, order.work)
    assert all(same(a, b) for a, b in zip(found.steps, taken, strict=True))


@given(steps())
def test_a_step_takes_18_bytes_and_4_a_number(step: Step) -> None:
    raw = pack_step(step)
    groups = len(step.scales) + len(step.decays) + len(step.norms) + len(step.rates)
    assert len(raw) == 18 + 4 * (len(step.coefficients) + groups + len(step.rule_state))
    assert unpack_step(raw, 0)[1] == len(raw)


@st.composite
def turns(draw: Any) -> Turn:
    sight = Sight(3, (0, 1), (2, 4), ((0.5, -1.5), (0.25, 3.0)), 1.25, 4)
    return Turn(
        draw(st.integers(0, 2**64 - 1)),
        draw(st.binary(min_size=8, max_size=8)),
        draw(st.integers(0, 2**16 - 1)),
        (sight,) * draw(st.integers(0, 2)),
        tuple(draw(st.lists(st.tuples(*[st.integers(0, 2**32 - 1)] * 2), max_size=3))),
        draw(st.none() | st.binary(min_size=32, max_size=32)),
    )


@given(turns())
def test_turns_arrive(turn: Turn) -> None:
    assert Turn.unpack(turn.pack()) == turn


@given(turns(), st.data())
def test_a_turn_that_is_cut_short_is_no_other_turn(turn: Turn, data: Any) -> None:
    raw = turn.pack()
    cut = raw[: data.draw(st.integers(0, len(raw) - 1))]
    try:
        found = Turn.unpack(cut)
    except UserError:
        return
    assert found.pack() == cut  # it ended where a sight does
    assert len(found.sights) < len(turn.sights)


@given(st.binary(max_size=300))
def test_rubbish_is_no_turn(raw: bytes) -> None:
    with contextlib.suppress(UserError):
        assert Turn.unpack(raw).pack() == raw


@given(st.binary(max_size=60), st.integers(0, 2**32 - 1))
def test_what_is_sealed_is_let_in(payload: bytes, counter: int) -> None:
    raw = seal(KEY, RUN, "turn", SESSION, counter, payload)
    letter = unseal(KEY, RUN, "turn", raw)
    assert (letter.session, letter.counter, letter.payload) == (SESSION, counter, payload)
    assert len(raw) == ENVELOPE + len(payload)
    reply = seal_reply(KEY, letter.proof, 200, payload)
    assert unseal_reply(KEY, raw[-16:], 200, reply) == payload


@given(st.data())
def test_a_message_that_was_changed_is_not(data: Any) -> None:
    raw = bytearray(seal(KEY, RUN, "turn", SESSION, 5, b"payload"))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(Refused):
        unseal(KEY, RUN, "turn", bytes(raw))


@pytest.mark.parametrize(
    ("key", "run", "kind"),
    [(b"K" * 16, RUN, "turn"), (KEY, b"R" * 16, "turn"), (KEY, RUN, "join")],
)
def test_of_another_key_run_or_kind(key: bytes, run: bytes, kind: str) -> None:
    raw = seal(KEY, RUN, "turn", SESSION, 5, b"payload")
    with pytest.raises(Refused, match="the proof is not that of this key and run"):
        unseal(key, run, kind, raw)


def test_a_reply_answers_one_request_with_one_status() -> None:
    reply = seal_reply(KEY, b"p" * 16, 200, b"yes")
    assert unseal_reply(KEY, b"p" * 16, 200, reply) == b"yes"
    assert unseal_reply(KEY, b"q" * 16, 200, reply) is None
    assert unseal_reply(KEY, b"p" * 16, 409, reply) is None
    assert unseal_reply(b"K" * 16, b"p" * 16, 200, reply) is None
    assert unseal_reply(KEY, b"p" * 16, 200, b"short") is None


@given(st.binary(max_size=200))
def test_rubbish_is_not_what_a_worker_says_of_itself(raw: bytes) -> None:
    with pytest.raises(Refused):
        unzipped(raw)


def test_what_a_worker_says_of_itself() -> None:
    said = {"name": "a", "header": {"tensors": [["w", [2, 3], "torch.float32", 0]]}}
    assert unzipped(zipped(said)) == said
    with pytest.raises(Refused):  # a megabyte from a kilobyte, and so on
        unzipped(zipped({"name": " " * (1 << 25)}))


def test_histories_differ_where_steps_do() -> None:
    one, other = Step(0, (1.0,)), Step(0, (1.5,))
    assert History().digest == bytes(8)
    assert History([one]).digest != History([other]).digest
    grown = History()
    grown.add(one)
    assert grown.digest == History([one]).digest
    assert History([one, one]).digest != grown.digest


def test_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    file.write_text("  " + "x" * 16 + "\n")
    assert read_key(str(file)) == b"x" * 16
    monkeypatch.setenv("JUSTFORWARD_KEY", "y" * 20)
    assert read_key(None) == b"y" * 20
    monkeypatch.setenv("JUSTFORWARD_KEY", "short")
    with pytest.raises(UserError, match="JUSTFORWARD_KEY: a key of 5 bytes: it must have at least"):
        read_key(None)
    monkeypatch.delenv("JUSTFORWARD_KEY")
    with pytest.raises(UserError, match="there is no key: give --key-file FILE"):
        read_key(None)
    with pytest.raises(UserError, match="nothing: cannot be read: No such file"):
        read_key(str(tmp_path / "nothing"))


def test_a_message_of_too_few_bytes() -> None:
    with pytest.raises(Refused, match="too few for a message") as caught:
        unseal(KEY, RUN, "turn", b"x" * (ENVELOPE - 1))
    assert caught.value.status == 400
    assert struct.calcsize("<I") + 32 == ENVELOPE
