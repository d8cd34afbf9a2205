"""Side by side or in turn: the same results, in order, and nothing of torch's threads has changed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from justforward.alone import hands, in_turn, spread, workers


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_how_many_hands() -> None:
    assert hands(True) == 3
    assert hands(False) == 1
    with in_turn():
        assert hands(True) == 1
        with in_turn():
            assert hands(True) == 1
        assert hands(True) == 1
    assert hands(True) == 3


def test_in_turn_ends_with_an_error_too() -> None:
    with pytest.raises(ValueError, match="so it is"), in_turn():
        raise ValueError("so it is")
    assert hands(True) == 3


@pytest.mark.parametrize("among", [1, 3])
def test_results_come_in_order(among: int) -> None:
    def slow(i: int) -> int:
        time.sleep(0.002 * (i % 3))
        return i * i

    assert list(spread(slow, range(20), among)) == [i * i for i in range(20)]


def test_each_has_a_thread_that_computes_by_itself_without_gradients() -> None:
    met = threading.Barrier(3)

    def work(_: int) -> tuple[int, int, bool]:
        met.wait(10)  # three at once
        return threading.get_ident(), torch.get_num_threads(), torch.is_grad_enabled()

    found = list(spread(work, range(3), hands(True)))
    assert len({thread for thread, _, _ in found}) == 3
    assert threading.get_ident() not in {thread for thread, _, _ in found}
    assert {(threads, graph) for _, threads, graph in found} == {(1, False)}
    assert torch.get_num_threads() == 3
    assert torch.is_grad_enabled()


def test_with_one_hand_it_is_this_thread() -> None:
    found = list(spread(lambda _: (threading.get_ident(), torch.get_num_threads()), range(2), 1))
    assert found == [(threading.get_ident(), 3)] * 2


@pytest.mark.parametrize("among", [1, 3])
def test_the_first_error_comes_through(among: int) -> None:
    def fails(i: int) -> int:
        if i >= 2:
            raise ValueError(f"number {i}")
        return i

    given = spread(fails, range(9), among)
    assert [next(given), next(given)] == [0, 1]
    with pytest.raises(ValueError, match="number 2"):
        next(given)


def test_threads_are_kept_for_each_number_of_them() -> None:
    first = workers()
    assert workers() is first
    torch.set_num_threads(2)
    assert workers() is not first
    torch.set_num_threads(3)
    assert workers() is first
