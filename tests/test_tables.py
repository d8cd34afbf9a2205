"""Means, spreads, the best, and both spellings of the tables."""

from __future__ import annotations

import re
import statistics
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from justforward.tables import Figure, costs, latex, markdown, percent, summarise, values


def record(task: str, method: str, value: float | None, **other: Any) -> dict[str, Any]:
    """A line of results.jsonl, as far as tables look at it."""
    return {
        "task": task, "method": method, "trial": None, "status": "ok", "metric": "accuracy",
        "value": value, "peak_bytes": 2**30, "seconds": 10.0, "forwards": 20, **other,
    }  # fmt: skip


RECORDS = [
    record("sst2", "mezo", 0.70, seconds=1.0),
    record("sst2", "mezo", 0.74, seconds=2.0),
    record("sst2", "mezo", 0.99, seconds=6.0),
    record("rte", "mezo", 0.50, seconds=40.0, metric="f1"),
    record("sst2", "probe", 0.81, forwards=None, peak_bytes=None),
    record("rte", "probe", 0.5004, metric="f1", forwards=None, peak_bytes=None),
    record("sst2", "mezo", None, trial=0, validation_value=1.0, seconds=1e6),
    record("sst2", "probe", None, status="failed", seconds=1e6),
    record("sst2", "icl", None, status="failed"),
]
SUMMARY = summarise(["sst2", "rte"], ["mezo", "probe", "icl"], RECORDS)


def test_figures_by_hand() -> None:
    figure = SUMMARY.figures["mezo", "sst2"]
    assert figure.mean == pytest.approx(0.81)
    assert figure.sd == pytest.approx(((0.11**2 + 0.07**2 + 0.18**2) / 2) ** 0.5)
    assert str(figure) == "81.0 (15.7)"
    one = SUMMARY.figures["probe", "sst2"]
    assert (one.sd, str(one)) == (None, "81.0")
    assert ("icl", "sst2") not in SUMMARY.figures
    assert [SUMMARY.runs(method) for method in SUMMARY.methods] == ["1 to 3", "1", "-"]
    assert SUMMARY.metrics == {"sst2": "accuracy", "rte": "f1"}


def test_the_best_is_that_which_is_shown() -> None:
    # 81.0 both, though the means differ in their last bits; 50.0 and 50.04 show as the same
    assert SUMMARY.best["sst2"] == {"mezo", "probe"}
    assert SUMMARY.best["rte"] == {"mezo", "probe"}
    alone = summarise(["sst2"], ["mezo", "icl"], [record("sst2", "mezo", 0.9)])
    assert alone.best["sst2"] == set()
    two = summarise(["t"], ["a", "b"], [record("t", "a", 0.9), record("t", "b", 0.8)])
    assert two.best["t"] == {"a"}


def test_the_mean_is_over_all_tasks_or_not_there() -> None:
    assert SUMMARY.means == {
        "mezo": pytest.approx((0.81 + 0.5) / 2),
        "probe": pytest.approx((0.81 + 0.5004) / 2),
    }
    part = summarise(["sst2", "rte"], ["mezo"], RECORDS[:3])
    assert part.means == {}
    assert values(part)[0] == ["method", "seeds", "sst2 (accuracy)", "rte (-)"]
    assert summarise(["sst2"], ["mezo"], RECORDS).means == {}


def test_costs_are_medians_of_medians() -> None:
    cost = SUMMARY.costs["mezo"]
    assert cost.seconds == statistics.median([2.0, 40.0])
    assert (cost.peak, cost.forwards, cost.backwards) == (2**30, 20, None)
    _, rows = costs(SUMMARY)
    assert rows == [
        ["mezo", "1.00", "21.0", "20", "-"],
        ["probe", "-", "10.0", "-", "-"],
        ["icl", "-", "-", "-", "-"],
    ]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_figures_are_those_of_statistics(found: list[float]) -> None:
    figure = Figure(tuple(found))
    assert figure.mean == pytest.approx(statistics.mean(found))
    if len(found) == 1:
        assert figure.sd is None
        assert str(figure) == percent(found[0])
    else:
        assert figure.sd == pytest.approx(statistics.stdev(found))
        assert re.fullmatch(r"\d+\.\d \(\d+\.\d\)", str(figure))


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from("xyz"), st.floats(0, 1)), max_size=20
    )
)
def test_bold_is_never_below_another(found: list[tuple[str, str, float]]) -> None:
    records = [record(task, method, value) for task, method, value in found]
    summary = summarise("abc", "xyz", records)
    heads, rows = values(summary)
    for column in range(2, len(heads)):
        texts = [row[column] for row in rows]
        shown = [float(text.split()[0]) for text, _ in texts if text != "-"]
        for text, best in texts:
            assert not best or (len(shown) > 1 and float(text.split()[0]) == max(shown))
        assert len(shown) < 2 or any(best for _, best in texts)


def test_markdown() -> None:
    text = markdown(SUMMARY)
    tables = re.findall(r"(?:^\|.*\|\n)+", text, re.M)
    assert len(tables) == 2
    for table in tables:
        assert len({len(line) for line in table.splitlines()}) == 1  # columns of equal width
    plain = re.sub(" +", " ", text)
    assert "| mezo | 1 to 3 | **81.0 (15.7)** | **50.0** | **65.5** |" in plain
    assert "| icl | - | - | - | - |" in plain
    assert "sample standard deviation" in text


def test_markdown_keeps_names_as_they_are() -> None:
    odd = summarise(["a|b"], ["x_y*z"], [record("a|b", "x_y*z", 0.5)])
    text = markdown(odd)
    assert r"x\_y\*z" in text
    assert r"a\|b (accuracy)" in text


def test_latex() -> None:
    text = latex(SUMMARY)
    assert text.startswith("% needs \\usepackage{booktabs}\n")
    for part in (r"\toprule", r"\midrule", r"\bottomrule", r"\end{table}", r"\caption{"):
        assert text.count(part) == 2
    assert r"mezo & 1 to 3 & \textbf{81.0 (15.7)} & \textbf{50.0} & \textbf{65.5} \\" in text
    assert r"icl & -- & -- & -- & -- \\" in text
    for line in text.splitlines():
        if line.endswith(r"\\"):
            assert line.count("&") == 4


def test_latex_is_escaped() -> None:
    name = r"50% & $x_1^2$ #{a} ~\b <c>"
    text = latex(summarise(["t"], [name], [record("t", name, 0.5)]))
    assert (
        r"50\% \& \$x\_1\textasciicircum{}2\$ \#\{a\} \textasciitilde{}\textbackslash{}b "
        r"\textless{}c\textgreater{} & 1 & 50.0 \\"
    ) in text
