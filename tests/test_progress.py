"""Plain lines now and then; a bar on a terminal; a clock that is right after a resume."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from justforward import progress
from justforward.progress import Progress, spell_seconds


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_spell_seconds() -> None:
    spelled = [spell_seconds(s) for s in (0, 0.4, 59.6, 75.3, 3599.4, 3600, 36125)]
    assert spelled == ["0:00", "0:00", "1:00", "1:15", "59:59", "1:00:00", "10:02:05"]


@given(st.floats(0, 1e7))
def test_spell_seconds_reads_back(seconds: float) -> None:
    parts = [int(part) for part in spell_seconds(seconds).split(":")]
    assert sum(n * 60**i for i, n in enumerate(reversed(parts))) == round(seconds)
    assert all(part < 60 for part in parts[1:])


def test_lines_come_every_twentieth_or_ten_seconds(clock: Clock) -> None:
    out = io.StringIO()
    with Progress(out) as shown:
        shown.start(0, 1000, None)
        for step in range(1, 101):  # a tenth of the way, two lines' worth
            clock.now += 0.01
            shown.step(2 * step, 1.0)
        assert len(out.getvalue().splitlines()) == 4  # after 50, 100, 150, 200 forwards
        for step in range(101, 105):
            clock.now += 6.0
            shown.step(2 * step, 1.0)
    lines = out.getvalue().splitlines()
    assert [int(re.findall(r"\d+", line)[0]) for line in lines] == [50, 100, 150, 200, 204, 208]


def test_what_a_line_says(clock: Clock) -> None:
    out = io.StringIO()
    shown = Progress(out)
    shown.start(0, 100, None)
    clock.now += 4.0
    shown.step(10, 0.70314)
    shown.validation(10, "accuracy", 0.755, 0.69)
    clock.now += 4.0
    shown.step(20, 0.6)
    assert out.getvalue().splitlines() == [
        "forwards 10/100  loss 0.7031  validation -  2.50 forwards/s  0:36 left",
        "forwards 10: validation accuracy 75.5%, loss 0.6900",
        "forwards 20/100  loss 0.6000  validation 75.5%  2.50 forwards/s  0:32 left",
    ]


def test_the_limit_in_seconds_counts(clock: Clock) -> None:
    out = io.StringIO()
    shown = Progress(out)
    shown.start(0, 10_000, 90.0)
    clock.now += 30.0
    shown.step(10, 1.0)
    assert out.getvalue().endswith("1:00 left\n")  # not the 8:19:30 that 10,000 forwards take
    clock.now += 70.0
    shown.step(20, 1.0)
    assert out.getvalue().endswith("0:00 left\n")


def test_the_rate_is_of_this_session(clock: Clock) -> None:
    out = io.StringIO()
    shown = Progress(out)
    shown.start(900, 1000, None)
    clock.now += 10.0
    shown.step(950, 1.0)
    assert "  5.00 forwards/s  0:10 left" in out.getvalue()


def test_a_step_in_no_time(clock: Clock) -> None:
    out = io.StringIO()
    shown = Progress(out)
    shown.start(0, 10, None)
    shown.step(2, 1.0)
    assert out.getvalue().endswith("0:00 left\n")


def test_notes_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Progress()
    shown.note("[red]100%[/red] of C:\\x")
    assert capsys.readouterr() == ("", "[red]100%[/red] of C:\\x\n")


@pytest.mark.parametrize("make", [Terminal, lambda: io.StringIO()])
def test_a_bar_only_on_a_terminal(make: Callable[[], io.StringIO]) -> None:
    out = make()
    with Progress(out) as shown:
        shown.start(0, 4, None)
        shown.step(2, 0.5)
        shown.note("a note [b]with brackets[/b] " + "and many words " * 20)
        shown.validation(2, "accuracy", 0.5, 0.7)
        shown.step(4, 0.25)
    text = out.getvalue()
    assert "a note [b]with brackets[/b] " + "and many words " * 20 in text
    assert "validation accuracy 50.0%, loss 0.7000" in text
    assert "forwards 4/4  loss 0.2500  validation 50.0%" in text
    assert ("━" in text) == out.isatty()
    ends_shown = text.count("\x1b[?25l") == text.count("\x1b[?25h")
    assert ends_shown, "the cursor stays hidden"


def test_a_bar_ends_with_an_exception() -> None:
    out = Terminal()
    shown = Progress(out)

    def interrupted() -> None:
        with shown:
            shown.start(0, 4, None)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    shown.note("after")
    assert out.getvalue().endswith("after\n")
    assert out.getvalue().count("\x1b[?25l") == out.getvalue().count("\x1b[?25h")
