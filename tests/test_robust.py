"""Outliers are drawn in, whoever sends them; rows without outliers stay as they are."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from justforward.robust import bounds, drawn_in
from justforward.sights import Sight

RISES = st.floats(-1e3, 1e3, width=32)


def sights(values: list[list[float]]) -> list[tuple[int, Sight]]:
    """One a client, each with one row in each of its values' places."""
    out, first = [], 0
    for client, own in enumerate(values):
        rows = tuple(range(first, first + len(own)))
        out.append((client, Sight(0, (0,), rows, (tuple(own),), 1.0, 2)))
        first += len(own)
    return out


@given(st.lists(RISES, min_size=3, max_size=40), st.lists(st.floats(-1e30, 1e30), max_size=19))
def test_fewer_than_half_cannot_move_the_mean_far(honest: list[float], wild: list[float]) -> None:
    wild = wild[: len(honest) - 1]
    together = [float(np.float32(x)) for x in [*honest, *wild]]
    kept, counts = drawn_in(sights([[x] for x in together]), 6.0, apart=False)
    values = [sight.rises[0][0] for sight in kept]
    # The median lies between honest ones, and so does the median distance from it.
    low, high = min(honest), max(honest)
    reach = 6.0 * 1.4826 * (high - low)
    assert all(low - reach - 1e-3 <= x <= high + reach + 1e-3 for x in values[len(honest) :]) or (
        len(together) < 4
    )
    assert set(counts) <= set(range(len(together)))


@given(st.lists(RISES, min_size=4, max_size=40))
def test_what_lies_within_the_bounds_is_left_alone(rises: list[float]) -> None:
    low, high = bounds(rises, 3.0, symmetric=False)
    kept, counts = drawn_in(sights([rises]), 3.0, apart=False)
    for was, now in zip(rises, kept[0].rises[0], strict=True):
        assert now == was if low <= was <= high else now in np.float32([low, high])
    assert counts.total() == sum(not low <= x <= high for x in rises)


def test_the_bounds_are_the_median_and_deviations_about_it() -> None:
    assert bounds([1.0, 2.0, 3.0, 4.0, 100.0], 2.0, symmetric=False) == (
        3.0 - 2.0 * 1.4826,
        3.0 + 2.0 * 1.4826,
    )
    assert bounds([-1.0, 2.0, -3.0], 1.0, symmetric=True) == (-2.0 * 1.4826, 2.0 * 1.4826)


def test_bounds_beyond_float32_are_no_warning() -> None:
    kept, counts = drawn_in(sights([[3e38], [-3e38], [3.2e38], [1.0]]), 10.0, apart=False)
    assert [sight.rises[0][0] for sight in kept] == [
        float(np.float32(x)) for x in (3e38, -3e38, 3.2e38, 1.0)
    ]
    assert counts == {}


def test_who_was_drawn_in_is_named() -> None:
    kept, counts = drawn_in(sights([[1.0, 1.1], [0.9, 1e30], [1.2, 0.8]]), 6.0, apart=False)
    assert counts == {1: 1}
    assert max(max(s.rises[0]) for s in kept) < 3.0
    assert [s.rows for s in kept] == [(0, 1), (2, 3), (4, 5)]


def test_rows_with_directions_of_their_own_are_bounded_about_zero() -> None:
    rises = [[0.5, -0.5], [0.6, -0.4], [-1e9, 0.5]]
    kept, counts = drawn_in(sights(rises), 6.0, apart=True)
    assert counts == {2: 1}
    assert math.isclose(kept[2].rises[0][0], -6.0 * 1.4826 * 0.5, rel_tol=1e-6)


def test_of_three_rows_nobody_can_say_which_is_wrong() -> None:
    few = sights([[1.0], [2.0], [1e30]])
    assert drawn_in(few, 6.0, apart=False) == ([sight for _, sight in few], {})
