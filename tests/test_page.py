"""The page needs nothing else, says what was run, and can be read; its plots say what they should."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from justforward.config import CompareConfig
from justforward.grid import Cell, Grid
from justforward.page import TEMPLATES, page
from justforward.svg import SERIES, Line, Row, bars, curves, dots, spread, ticks
from justforward.tables import summarise

MACHINE = {"cpu": "A CPU", "platform": "Linux", "threads": 2, "versions": {"torch": "2.13.0"}}
VOID = {"meta", "circle", "rect", "line", "polyline"}


def made(methods: dict[str, Any] | None = None, **other: Any) -> tuple[CompareConfig, Grid]:
    config = CompareConfig(
        model="model", out="out", tasks={"sst2": {"data": "d", "shots": 16}},
        methods=methods or {"zero-shot": None, "mezo": {"lr": 0.1}}, seeds=(0, 1), **other,
    )  # fmt: skip
    cells = []
    for method, own in config.methods.items():
        kind = "mezo" if method.startswith("mezo") else "zero-shot"
        options = {"data": "d", "shots": 16, **(own or {})}
        search = (config.search or {}).get(method, {})
        cells += [Cell("sst2", method, kind, seed, options, search) for seed in config.seeds]
    return config, Grid(("sst2",), tuple(config.methods), config.seeds, tuple(cells))


def record(cell: Cell, value: float | None, **other: Any) -> dict[str, Any]:
    curve = [[0, 1.0, 0.5], [10, 2.0, value]] if cell.kind == "mezo" else []
    return {
        **cell.plain(), "status": "ok", "error": None, "metric": "accuracy", "value": value,
        "validation_value": 0.7, "peak_bytes": 2**30, "seconds": 3.0, "forwards": 10, "curve": curve,
        "command": ["justforward", "train", "--template={text} It was"], "resumed": False,
        "rows": {"train": 32, "validation": 32, "test": 872}, **other,
    }  # fmt: skip


def render(config: CompareConfig, grid: Grid, records: list[dict[str, Any]]) -> str:
    summary = summarise(grid.tasks, grid.methods, records)
    return page(config, grid, summary, records, MACHINE)


class Tags(HTMLParser):
    """Checks that elements are closed in order; collects their names and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)


def test_a_page_that_needs_nothing_else() -> None:
    config, grid = made()
    html = render(config, grid, [record(cell, 0.8) for cell in grid.cells])
    tags = Tags(html)
    names = {name for name, _ in tags.seen}
    assert not names & {"script", "link", "img", "iframe", "object", "base"}
    for _, attributes in tags.seen:
        assert not attributes.keys() & {"src", "href", "srcset", "xlink:href", "onload", "onclick"}
    assert not re.search(r"https?:|@import|url\(", html)
    assert (
        "meta",
        {"name": "viewport", "content": "width=device-width, initial-scale=1"},
    ) in tags.seen
    assert "prefers-color-scheme: dark" in html
    assert [name for name, _ in tags.seen].count("h1") == 1
    assert [name for name, _ in tags.seen].count("svg") == 4  # dots, curves, memory, time
    text = " ".join(" ".join(tags.texts).split())
    for part in (
        "2 methods on 1 task", "4 of 4 cells have a result", "A CPU", "torch 2.13.0",
        "32 train, 32 validation, 872 test", "justforward compare --config compare.yaml --out NEW",
        "justforward train '--template={text} It was'", "80.0 (0.0)",
        "1.00 GiB", "3.0 s",
    ):  # fmt: skip
        assert part in text, part


def test_tables_scroll_in_a_box_of_their_own() -> None:
    config, grid = made()
    tags = Tags(render(config, grid, [record(cell, 0.8) for cell in grid.cells]))
    before: dict[str, str | None] = {}
    tables = 0
    for name, attributes in tags.seen:
        if name == "table":
            tables += 1
            assert before.get("class") == "box"
            assert before.get("tabindex") == "0"  # for the keyboard
        before = attributes
    assert tables == 3


def test_hostile_names_stay_text() -> None:
    bad = "mezo-<script>alert(1)</script>&\"'"
    config, grid = made({bad: {"lr": "<b>"}})
    records = [record(cell, 0.5, metric="<i>") for cell in grid.cells]
    records[1].update(status="failed", error="<img src=x>", value=None)
    tags = Tags(render(config, grid, records))
    assert not {name for name, _ in tags.seen} & {"script", "b", "i", "img"}
    assert bad in "".join(tags.texts)
    assert "<img src=x>" in "".join(tags.texts)


def test_failed_cells_and_caveats() -> None:
    config, grid = made()
    records = [record(cell, 0.8) for cell in grid.cells]
    records[3].update(status="failed", error="the loss is nan", value=None)
    records[2].update(resumed=True, peak_bytes=None)
    records[0]["rows"] = {"train": 32, "validation": 32, "test": 871}
    text = " ".join(" ".join(Tags(render(config, grid, records)).texts).split())
    assert "1 cell without a result" in text
    assert "sst2 · mezo · seed 1: failed: the loss is nan" in text
    assert "3 of 4 cells have a result" in text
    assert "1 cell of 4 have no result" in text
    assert "1 cell went on after a stop" in text
    assert "Some cells have no memory figure" in text
    assert "Not all methods were tested on as many rows of sst2" in text
    assert "No options were searched" in text


def test_long_times_are_spelled_as_clocks_do() -> None:
    config, grid = made()
    html = render(config, grid, [record(cell, 0.8, seconds=4000.0) for cell in grid.cells])
    assert ">1:06:40</text>" in html


def test_an_empty_grid_has_a_page_too() -> None:
    config, grid = made()
    text = " ".join(Tags(render(config, grid, [])).texts)
    assert "0 of 4 cells have a result" in text


def test_a_search_is_shown_with_what_was_chosen() -> None:
    config, grid = made({"mezo": {}}, search={"mezo": {"lr": [0.1, 0.2]}})
    trials = grid.cells[0].trials()
    records = [
        record(trial, None, validation_value=v) for trial, v in zip(trials, (0.6, 0.9), strict=True)
    ]
    cells = [replace(cell, values={"lr": 0.2}) for cell in grid.cells]
    html = render(config, grid, records + [record(cell, 0.8) for cell in cells])
    assert re.search(r'lr 0\.2</th><td class="best">90\.0', html)
    assert re.search(r"lr 0\.1</th><td>60\.0</td>", html)
    assert "searched with the first seed for mezo." in html
    assert "lr one of [0.1, 0.2]" in html


# ------------------------------------------------------------------------------------------- colours


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_can_be_told_from_what_is_behind_them(scheme: int) -> None:
    text = (TEMPLATES / "compare.html.j2").read_text(encoding="utf-8")
    block = re.findall(r":root \{(.*?)\}", text, re.S)[scheme]
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))
    for ink, paper in itertools.product(("ink", "soft", "bad"), ("paper", "card", "good", "code")):
        assert contrast(colours[ink], colours[paper]) >= 4.5, (ink, paper)  # AA, text
    for series in range(SERIES):
        assert contrast(colours[f"s{series}"], colours["card"]) >= 3.0, series  # AA, graphics


# --------------------------------------------------------------------------------------------- plots


@given(
    st.lists(st.floats(0, 100), min_size=1, max_size=7).filter(lambda x: len(x) * 14 < 200),
    st.floats(1, 14),
)
def test_labels_move_apart_and_keep_their_order(places: list[float], least: float) -> None:
    out = spread(places, least, -50.0, 150.0)
    order = sorted(range(len(places)), key=lambda i: places[i])
    for a, b in itertools.pairwise(order):
        assert out[b] - out[a] >= least - 1e-9
    assert min(out) >= -50.0 - 1e-9
    assert max(out) <= 150.0 + 1e-9
    if all(places[b] - places[a] >= least for a, b in itertools.pairwise(order)):
        assert out == pytest.approx(places)


@given(st.floats(-100, 100), st.floats(0.01, 1000))
def test_ticks_are_round_and_within(low: float, span: float) -> None:
    found = ticks(low, low + span)
    assert 1 <= len(found) <= 6
    assert all(low - 1e-6 * span <= t <= low + span + 1e-6 * span for t in found)
    assert found == sorted(set(found))
    steps = {round(b - a, 9) for a, b in itertools.pairwise(found)}
    assert len(steps) <= 1


def texts_of(svg: str) -> list[str]:
    return ["".join(e.itertext()) for e in ElementTree.fromstring(svg).iter("text")]


def places_of(svg: str, tag: str, kind: str) -> list[dict[str, str]]:
    root = ElementTree.fromstring(svg)
    return [e.attrib for e in root.iter(tag) if kind in e.attrib.get("class", "").split()]


def test_curves() -> None:
    low = Line("low & slow", 0, [(0, 0.5), (10, 0.6)])
    high = Line("high", 1, [(0, 0.5), (20, 0.9)], [[(0, 0.5), (20, 0.8)], [(0, 0.5), (20, 1.0)]])
    svg = curves("a title", [low, high], "forwards")
    assert {"low & slow", "high", "forwards"} <= set(texts_of(svg))
    assert len(places_of(svg, "polyline", "line")) == 2
    assert len(places_of(svg, "polyline", "part")) == 2
    (first,) = places_of(svg, "polyline", "s0")
    (x0, y0), (x1, y1) = (map(float, p.split(",")) for p in first["points"].split())
    assert x1 > x0
    assert y1 < y0  # up is more
    ends = {e["class"]: float(e["cx"]) for e in places_of(svg, "circle", "dot") if e["r"] == "3.5"}
    assert ends["dot s0"] - x0 == pytest.approx((ends["dot s1"] - x0) / 2, abs=0.2)  # linear


def test_curves_of_very_different_length_are_on_a_logarithmic_scale() -> None:
    short = Line("short", 0, [(0, 0.5), (50, 0.9)])
    long = Line("long", 1, [(0, 0.5), (20000, 0.8)])
    svg = curves("", [short, long], "forwards")
    ends = {e["class"]: float(e["cx"]) for e in places_of(svg, "circle", "dot") if e["r"] == "3.5"}
    (line,) = places_of(svg, "polyline", "s1")
    left = float(line["points"].split(",")[0])
    assert 0.2 < (ends["dot s0"] - left) / (ends["dot s1"] - left) < 0.5  # on a linear one 0.0025
    assert {"0", "10", "100", "1,000", "10,000"} & set(texts_of(svg)) >= {"0", "1,000", "10,000"}


def test_dots_and_bars() -> None:
    rows = [Row("a", 0, (0.5, 0.7), "60.0 (14.1)"), Row("b", 9, (0.7,), "70.0")]
    svg = dots("t", rows, "accuracy (%)")
    assert {"a", "b", "60.0 (14.1)", "70.0", "accuracy (%)"} <= set(texts_of(svg))
    seeds = [float(e["cx"]) for e in places_of(svg, "circle", "seed")]
    marks = [float(e["x"]) + 2 for e in places_of(svg, "rect", "dot")]
    assert len(seeds) == 2
    assert marks == pytest.approx([sum(seeds) / 2, max(seeds)], abs=0.2)
    assert "again" in places_of(svg, "rect", "dot")[1]["class"]  # the ninth series looks different

    svg = bars("t", [Row("a", 0, (4.0,), "4 s"), Row("b", 1, (1.0,), "1 s"), Row("c", 2, (), "-")])
    widths = [float(e["width"]) for e in places_of(svg, "rect", "dot")]
    assert len(widths) == 2
    assert widths[0] == pytest.approx(4 * widths[1], rel=0.01)
