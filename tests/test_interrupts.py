"""Ctrl-C at every moment of a shielded stretch: at once inside a call, after the end anywhere else."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from justforward.interrupts import Shield


@pytest.fixture(autouse=True)
def _python_handler() -> Iterator[None]:
    """Python's own handler, also where the tests run in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def test_outside_of_a_call_it_waits_for_the_end() -> None:
    done: list[str] = []

    def body() -> None:
        with Shield() as shield:
            ctrl_c()
            done.append("before")
            assert shield.call(lambda: "result") == "result"
            ctrl_c()
            done.append("after")
        done.append("beyond the end")

    with pytest.raises(KeyboardInterrupt):
        body()
    assert done == ["before", "after"]


def test_inside_of_a_call_it_comes_at_once() -> None:
    done: list[str] = []

    def closure() -> None:
        done.append("in")
        ctrl_c()
        done.append("never")

    with pytest.raises(KeyboardInterrupt), Shield() as shield:
        shield.call(closure)
    assert done == ["in"]


def test_a_second_one_does_not_reach_the_code_that_restores() -> None:
    restored: list[str] = []

    def body() -> None:
        with Shield() as shield:
            try:
                shield.call(ctrl_c)
            finally:
                ctrl_c()
                restored.append("whole")

    with pytest.raises(KeyboardInterrupt):
        body()
    assert restored == ["whole"]


def test_a_second_one_waits_while_the_closure_cleans_up_after_the_first() -> None:
    done: list[str] = []

    def closure() -> None:
        try:
            ctrl_c()
        except KeyboardInterrupt:
            ctrl_c()
            done.append("clean")

    def body() -> None:
        with Shield() as shield:
            shield.call(closure)
            done.append("whole")

    with pytest.raises(KeyboardInterrupt):
        body()
    assert done == ["clean", "whole"]


def test_one_that_the_closure_swallows_does_not_cost_the_next() -> None:
    def closure() -> str:
        try:
            ctrl_c()
        except KeyboardInterrupt:
            return "swallowed"
        return "missed"

    with Shield() as shield:
        assert shield.call(closure) == "swallowed"
        assert shield.call(closure) == "swallowed"


def test_an_error_in_a_call_passes_and_closes_the_window() -> None:
    done: list[str] = []

    def fail(*values: int) -> None:
        raise ValueError(values)

    def body() -> None:
        with Shield() as shield:
            with pytest.raises(ValueError, match=r"\(1, 2\)"):
                shield.call(fail, 1, 2)
            ctrl_c()
            done.append("whole")

    with pytest.raises(KeyboardInterrupt):
        body()
    assert done == ["whole"]


def test_an_error_in_the_body_passes_and_does_not_lose_a_pending_one() -> None:
    def body(interrupted: bool) -> None:
        with Shield():
            if interrupted:
                ctrl_c()
            raise ValueError("in the body")

    with pytest.raises(ValueError, match="in the body"):
        body(interrupted=False)
    with pytest.raises(KeyboardInterrupt) as caught:
        body(interrupted=True)
    assert isinstance(caught.value.__context__, ValueError)


def test_shields_nest() -> None:
    done: list[str] = []

    def body() -> None:
        with Shield() as outer:
            with Shield():
                ctrl_c()
                done.append("inner")
            done.append("outer")
            outer.call(lambda: None)
            done.append("end")

    with pytest.raises(KeyboardInterrupt):
        body()
    assert done == ["inner", "outer", "end"]


def test_the_users_handler_is_called_and_comes_back() -> None:
    calls: list[tuple[int, Any]] = []
    signal.signal(signal.SIGINT, lambda number, frame: calls.append((number, frame)))
    mine = signal.getsignal(signal.SIGINT)
    with Shield() as shield:
        ctrl_c()
        assert calls == []
        shield.call(ctrl_c)
        assert [number for number, _ in calls] == [signal.SIGINT]
        assert calls[0][1] is not None
    assert [number for number, _ in calls] == [signal.SIGINT] * 2
    assert signal.getsignal(signal.SIGINT) is mine
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_an_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Shield() as shield:
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        ctrl_c()
        shield.call(ctrl_c)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_other_threads_leave_the_handler_alone() -> None:
    seen: list[Any] = []

    def work() -> None:
        with Shield() as shield:
            seen.append(signal.getsignal(signal.SIGINT))
            seen.append(shield.call(lambda: 7))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler, 7]
