"""Small plots as SVG that takes its colours from the page around it. No torch in here.

Series i has the class ``s<i>``, from which the page's style sheet gets its colour (`SERIES` different ones, then again).
Labels stand at what they name; sizes are in the units of the viewBox, about a pixel each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

SERIES = 8
WIDTH = 360.0
CHARACTER = 6.6  # about the width of a character of a label


@dataclass(frozen=True)
class Line:
    """One series of `curves`: the line itself, and those that it is the mean of."""

    label: str
    series: int
    points: Sequence[tuple[float, float]]
    parts: Sequence[Sequence[tuple[float, float]]] = ()


@dataclass(frozen=True)
class Row:
    """One row of `dots` or `bars`: its values, and how they are said."""

    label: str
    series: int
    values: Sequence[float]
    said: str


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers in [low, high], at most `most`."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    ten = 10.0 ** math.floor(math.log10(rough))
    step = next(m * ten for m in (1, 2, 2.5, 5, 10, 20) if (high - low) / (m * ten) < most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def spread(places: Sequence[float], least: float, low: float, high: float) -> list[float]:
    """Places moved apart to at least `least`, in their order, as little and as much within [low, high] as goes."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    out = list(places)
    for before, i in zip([None, *order], order, strict=False):
        out[i] = max(places[i], low if before is None else out[before] + least)
    for after, i in zip([None, *reversed(order)], reversed(order), strict=False):
        out[i] = min(out[i], high if after is None else out[after] - least)
    return out


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Of an axis: the values with some room around them."""
    low, high = min(values), max(values)
    room = max(0.08 * (high - low), 0.01)
    return low - room, high + room


def _svg(height: float, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _path(points: Sequence[tuple[float, float]], kind: str) -> str:
    return f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" class="{kind}"/>'


def _cut(text: str, room: float) -> str:
    most = max(2, int(room / CHARACTER))
    return text if len(text) <= most else text[: most - 1] + "…"


def series_class(series: int) -> str:
    """The classes of a series."""
    return f"s{series % SERIES}" + (" again" if series >= SERIES else "")


# ------------------------------------------------------------------------------------------- curves


def curves(title: str, lines: Sequence[Line], x_label: str) -> str:
    """Shares in percent against a count; the count is drawn as its logarithm where lines differ tenfold in length."""
    left, top, bottom, height = 40.0, 10.0, 206.0, 244.0
    longest = max(len(line.label) for line in lines)
    right = WIDTH - min(130.0, CHARACTER * longest + 20.0)
    everything = [p for line in lines for part in (line.points, *line.parts) for p in part]
    ends = [line.points[-1][0] for line in lines]
    x_of = _x_scale(max(x for x, _ in everything), min(ends), left, right)
    low, high = _range([y for _, y in everything])

    def y_of(y: float) -> float:
        return bottom - (y - low) / (high - low) * (bottom - top)

    parts: list[str] = []
    for tick in ticks(100 * low, 100 * high):
        y = y_of(tick / 100)
        parts += [
            _line(left, y, right, y, "grid"),
            _text(left - 6, y + 4, f"{tick:g}", "tick", "end"),
        ]
    for tick in _x_ticks(max(ends), min(ends)):
        x = x_of(tick)
        parts += [_line(x, bottom, x, bottom + 4, "axis")]
        parts += [_text(x, bottom + 16, f"{tick:,.0f}", "tick", "middle")]
    parts += [_line(left, bottom, right, bottom, "axis")]
    parts += [_text((left + right) / 2, bottom + 34, x_label, "tick", "middle")]
    places = spread([y_of(line.points[-1][1]) for line in lines], 14.0, top + 4, bottom - 4)
    for line, place in zip(lines, places, strict=True):
        series = series_class(line.series)
        for part in line.parts:
            parts.append(_path([(x_of(x), y_of(y)) for x, y in part], f"part {series}"))
        points = [(x_of(x), y_of(y)) for x, y in line.points]
        parts.append(_path(points, f"line {series}"))
        end_x, end_y = points[-1]
        parts.append(_line(end_x, end_y, right + 6, place, f"leader {series}"))
        parts.append(f'<circle cx="{end_x:.1f}" cy="{end_y:.1f}" r="3.5" class="dot {series}"/>')
        parts.append(f'<circle cx="{right + 9:.1f}" cy="{place:.1f}" r="3" class="dot {series}"/>')
        label = _cut(line.label, WIDTH - right - 16)
        parts.append(_text(right + 16, place + 4, label, "label"))
    return _svg(height, title, parts)


def _is_log(longest: float, shortest: float) -> bool:
    return shortest > 0 and longest > 10 * shortest


def _x_scale(
    longest: float, shortest: float, left: float, right: float
) -> Callable[[float], float]:
    if _is_log(longest, shortest):
        # log(1 + x / unit): 0 is at the left, and what is far above the unit is as on a logarithmic axis
        unit = shortest / 10
        whole = math.log1p(longest / unit)
        return lambda x: left + (right - left) * math.log1p(x / unit) / whole
    return lambda x: left + (right - left) * x / (longest or 1.0)


def _x_ticks(longest: float, shortest: float) -> list[float]:
    if not _is_log(longest, shortest):
        return ticks(0.0, longest, 4)
    first = 10.0 ** math.ceil(math.log10(shortest / 10))
    powers = [first * 10.0**i for i in range(20) if first * 10.0**i <= longest]
    return [0.0, *powers[-4:]]


# --------------------------------------------------------------------------------------- dots and bars


def dots(title: str, rows: Sequence[Row], unit: str) -> str:
    """One scale a row, in percent: a pale dot for each value, a line over their range, a mark at their mean."""
    left, right, top, each = 8.0, WIDTH - 8.0, 4.0, 42.0
    low, high = _range([value for row in rows for value in row.values])
    marks = ticks(100 * low, 100 * high)

    def x_of(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    parts: list[str] = []
    for i, row in enumerate(rows):
        y, series = top + each * i, series_class(row.series)
        parts.append(_text(left, y + 13, _cut(row.label, 220), "label"))
        parts.append(_text(right, y + 13, row.said, "value", "end"))
        y += 27
        parts.append(_line(left, y, right, y, "track"))
        parts += [_line(x_of(m / 100), y - 4, x_of(m / 100), y + 4, "track") for m in marks]
        parts.append(_line(x_of(min(row.values)), y, x_of(max(row.values)), y, f"range {series}"))
        if len(row.values) > 1:
            parts += [
                f'<circle cx="{x_of(v):.1f}" cy="{y:.1f}" r="4" class="seed {series}"/>'
                for v in row.values
            ]
        mean = x_of(math.fsum(row.values) / len(row.values))
        parts.append(
            f'<rect x="{mean - 2:.1f}" y="{y - 7:.1f}" width="4" height="14" rx="2" class="dot {series}"/>'
        )
    bottom = top + each * len(rows)
    parts += [_text(x_of(m / 100), bottom + 8, f"{m:g}", "tick", "middle") for m in marks]
    parts.append(_text((left + right) / 2, bottom + 26, unit, "tick", "middle"))
    return _svg(bottom + 32, title, parts)


def bars(title: str, rows: Sequence[Row]) -> str:
    """One bar a row, from 0; a row without a value has none."""
    left, right, top, each = 8.0, WIDTH - 8.0, 4.0, 36.0
    most = max((value for row in rows for value in row.values), default=1.0) or 1.0
    parts: list[str] = []
    for i, row in enumerate(rows):
        y = top + each * i
        parts.append(_text(left, y + 13, _cut(row.label, 220), "label"))
        parts.append(_text(right, y + 13, row.said, "value", "end"))
        parts.append(
            f'<rect x="{left:g}" y="{y + 19:g}" width="{right - left:g}" height="9" rx="3" class="rail"/>'
        )
        for value in row.values:
            width = max(2.0, value / most * (right - left))
            parts.append(
                f'<rect x="{left:g}" y="{y + 19:g}" width="{width:.1f}" height="9" rx="3" class="dot {series_class(row.series)}"/>'
            )
    return _svg(top + each * len(rows), title, parts)
