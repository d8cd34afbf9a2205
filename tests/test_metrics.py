"""Metrics: known answers by hand, and what must hold for any texts."""

from __future__ import annotations

import itertools
import math
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from justforward.data import Example
from justforward.metrics import (
    BY_ROW,
    accuracy,
    drop_exact_match,
    drop_f1,
    exact_match,
    f1,
    figures,
    joined,
    normalised,
)
from justforward.tasks import METRICS, Task

WORDS = st.lists(
    st.sampled_from(["a", "The", "cat", "cat.", "5", "5.0", "1,000", "x-y", "--", "né", "$3"]),
    max_size=4,
).map(" ".join)
SPANS = WORDS.filter(lambda text: bool(text.strip()))
BAGS = st.lists(SPANS, min_size=1, max_size=3).map(tuple)


def one(text: str) -> list[tuple[str, ...]]:
    return [(text,)]


# -------------------------------------------------------------------------------------------- SQuAD's


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("The  Cat,", "cat"),
        ("a an the", ""),
        ("theatre anthem", "theatre anthem"),
        ("U.S.A.", "usa"),
        ("it's a-b", "its ab"),
        ("\tnew\nline ", "new line"),
        ("", ""),
    ],
)
def test_normalised(text: str, said: str) -> None:
    assert normalised(text) == said


@pytest.mark.parametrize(
    ("told", "real", "em", "overlap"),
    [
        ("the Denver Broncos!", "Denver Broncos", 1.0, 1.0),
        ("Denver", "Denver Broncos", 0.0, 2 / 3),
        ("in the city of Denver", "Denver", 0.0, 2 / 5),  # in, city, of, denver
        ("new new york", "new york", 0.0, 2 * 2 / 5),  # a word counts as often as it is in both
        ("Oslo", "Rome", 0.0, 0.0),
        ("", "Rome", 0.0, 0.0),
        ("Rome", "the", 0.0, 0.0),
        ("a", "the", 1.0, 1.0),
        ("", "...", 1.0, 1.0),
    ],
)
def test_squad(told: str, real: str, em: float, overlap: float) -> None:
    assert exact_match(told, one(real)) == em
    assert f1(told, one(real)) == pytest.approx(overlap)


def test_the_nearest_answer_counts() -> None:
    answers = [("Rome",), ("the city of Rome",), ("Oslo",)]
    assert f1("city Rome", answers) == pytest.approx(2 * 2 / 5)
    assert exact_match("oslo", answers) == 1.0
    assert exact_match("city Rome", answers) == 0.0


def test_accuracy_is_letter_by_letter() -> None:
    assert accuracy("the cat", [("dog",), ("the cat",)]) == 1.0
    assert accuracy("cat", one("the cat")) == 0.0
    assert exact_match("cat", one("the cat")) == 1.0


# --------------------------------------------------------------------------------------------- DROP's


@pytest.mark.parametrize(
    ("told", "real", "em", "overlap"),
    [
        ("5", ("5.0",), 1.0, 1.0),
        ("1000", ("1,000",), 1.0, 1.0),
        ("1,000.0", ("10000",), 1.0, 1.0),  # the evaluator's: no number with its comma, so no point either
        ("5 yards", ("5",), 0.0, 2 / 3),
        ("6 yards", ("5 yards",), 0.0, 0.0),  # a wrong number: yards counts nothing
        ("yards", ("5 yards",), 0.0, 0.0),
        ("5 yards", ("yards",), 0.0, 2 / 3),  # numbers are asked for where the answer has some
        ("5 6", ("5 7",), 0.0, 1 / 2),  # one of the answer's numbers is enough
        ("$5", ("5%",), 1.0, 1.0),
        ("-3", ("3",), 1.0, 1.0),  # a hyphen parts tokens
        ("twenty-one", ("twenty one",), 1.0, 1.0),
        ("the 49ers", ("49ers",), 1.0, 1.0),
        ("yard yard line", ("yard line",), 0.0, 1.0),  # sets of words, but not the same text
        ("Tom Brady", ("Brady",), 0.0, 2 / 3),
        ("", ("Brady",), 0.0, 0.0),
        ("the", ("a",), 1.0, 1.0),
        # bags: by comma, in any order, each span matched once
        ("Smith, Jones", ("Jones", "Smith"), 1.0, 1.0),
        ("Smith", ("Jones", "Smith"), 0.0, 1 / 2),
        ("Smith, Jones, Brady", ("Jones", "Smith"), 0.0, 2 / 3 * (1 + 1) / 2),
        ("Smith, Smith", ("Smith", "Jones"), 0.0, 1 / 2),
        ("Al Smith, Bo Jones", ("Smith", "Jones"), 0.0, 2 / 3),
        ("4 May 1980", ("4 May 1980",), 1.0, 1.0),
    ],
)  # fmt: skip
def test_drop(told: str, real: tuple[str, ...], em: float, overlap: float) -> None:
    assert drop_exact_match(told, [real]) == em
    assert drop_f1(told, [real]) == pytest.approx(overlap)


def test_text_with_a_comma_is_read_both_ways() -> None:
    assert drop_exact_match("Oslo, Norway", one("Oslo, Norway")) == 1.0
    assert drop_exact_match("Oslo, Norway", [("Norway", "Oslo")]) == 1.0
    assert drop_f1("x", [("y",), ("x", "z"), ("x",)]) == 1.0


def test_spans_are_matched_so_that_the_sum_is_greatest() -> None:
    told, real = ("a1 b1", "a1 c1"), ("a1", "a1 b1")  # greedy would take (a1 b1, a1) and lose
    scores = [[drop_f1(mine, one(theirs)) for theirs in real] for mine in told]
    best = max(sum(scores[i][p[i]] for i in range(2)) / 2 for p in itertools.permutations(range(2)))
    assert drop_f1(", ".join(told), [real]) == pytest.approx(best) == pytest.approx((1 + 2 / 3) / 2)


# ------------------------------------------------------------------------------------- what must hold


@given(WORDS, st.lists(BAGS, min_size=1, max_size=3))
def test_all_are_shares(told: str, answers: list[tuple[str, ...]]) -> None:
    for metric in BY_ROW.values():
        assert 0.0 <= metric(told, answers) <= 1.0
    assert not exact_match(told, answers) or f1(told, answers) == 1.0
    assert not drop_exact_match(told, answers) or math.isclose(drop_f1(told, answers), 1.0)
    assert not accuracy(told, answers) or exact_match(told, answers) == 1.0
    for metric in BY_ROW.values():  # another answer can only help, in any order
        assert metric(told, answers) == max(metric(told, [answer]) for answer in answers)


@given(WORDS, WORDS)
def test_squad_is_symmetric(a: str, b: str) -> None:
    assert f1(a, one(b)) == f1(b, one(a))
    assert exact_match(a, one(b)) == exact_match(b, one(a))
    assert f1(f"The {a.upper()} ", one(b)) == f1(a, one(b))


PLAIN = st.lists(st.sampled_from(["Ann", "Bo", "7", "red cat", "1990"]), min_size=1, max_size=4)


@given(PLAIN, PLAIN, st.randoms())
def test_the_order_of_a_bag_is_no_matter(told: list[str], real: list[str], luck: Random) -> None:
    shuffled = luck.sample(real, len(real))
    text = joined(tuple(told))
    for metric in (drop_f1, drop_exact_match):
        assert metric(text, [tuple(real)]) == pytest.approx(metric(text, [tuple(shuffled)]))
        assert metric(joined(tuple(shuffled)), [tuple(real)]) == pytest.approx(1.0)


# ------------------------------------------------------------------------------------------ of a set


def test_figures_of_answers() -> None:
    task = Task("{q}", kind="generation", loss="vocabulary", metrics=("exact_match", "f1"))
    rows = [
        Example({"q": "?"}, "Rome", "f", i, answers=answers)
        for i, answers in enumerate([(("Rome",),), (("New York",), ("NYC",))])
    ]
    found = figures(task, rows, ["rome", "York"])
    assert found == {"exact_match": 0.5, "f1": pytest.approx((1 + 2 / 3) / 2)}
    bare = Task("{q}", kind="generation", loss="vocabulary")
    assert list(figures(bare, rows, ["", ""])) == [bare.metric] == ["f1"]
    assert figures(bare, rows, ["", ""]) == {"f1": 0.0}


def test_a_question_is_right_where_all_its_rows_are() -> None:
    task = Task(
        "{p} {q} {a}", {"no": "No", "yes": "Yes"}, metrics=("exact_match", "f1"), positive="yes",
        group=("p", "q"),
    )  # fmt: skip
    truth = [("p", "1", "yes"), ("p", "1", "no"), ("p", "2", "no"), ("q", "1", "yes"), ("p", "2", "no")]  # fmt: skip
    rows = [Example({"p": p, "q": q, "a": "x"}, label, "f", 1) for p, q, label in truth]
    assert figures(task, rows, [label for _, _, label in truth]) == {"exact_match": 1.0, "f1": 1.0}
    told = ["yes", "no", "no", "no", "yes"]  # (p, 1) whole, (p, 2) not, (q, 1) not
    assert figures(task, rows, told) == {"exact_match": pytest.approx(1 / 3), "f1": 0.5}


LABELS = st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("ab")), min_size=1, max_size=12)


@given(LABELS)
def test_metrics_of_labels(pairs: list[tuple[str, str]]) -> None:
    task = Task(
        "{x}", {"a": "A", "b": "B"}, metrics=METRICS["classification"], positive="b", group=("x",)
    )
    rows = [Example({"x": str(i)}, real, "f", i) for i, (real, _) in enumerate(pairs)]
    found = figures(task, rows, [told for _, told in pairs])
    for name, value in found.items():
        assert (-1.0 if name == "matthews" else 0.0) - 1e-9 <= value <= 1.0 + 1e-9
    assert found["exact_match"] == found["accuracy"]  # every row is a group
    right = all(real == told for real, told in pairs)
    assert (found["accuracy"] == 1.0) == right
    if len({real for real, _ in pairs}) == 2:  # else undefined, and 0
        assert (found["matthews"] == pytest.approx(1.0)) == right
    other = figures(task, rows, ["ab"[told == "a"] for _, told in pairs])
    assert other["matthews"] == pytest.approx(-found["matthews"])


@pytest.mark.parametrize("kind", METRICS)
def test_what_a_task_reports_where_it_names_nothing(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own metric: which that is, is said in one place."""
    labels = {"a": "A", "b": "B"} if kind == "classification" else {}
    loss: Any = "vocabulary" if kind == "generation" else "choices"
    task = Task("{text}", labels, kind=kind, loss=loss)
    row = Example({"text": "x"}, "a", "f", 1, answers=(("a",),))
    assert list(figures(task, [row], ["a"])) == [METRICS[kind][0]]
    other = "exact_match" if kind != "classification" else "f1_macro"
    monkeypatch.setattr("justforward.tasks.METRICS", {kind: (other,)})
    assert list(figures(task, [row], ["a"])) == [task.metric] == [other]
