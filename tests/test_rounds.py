"""Whatever happens to messages and workers, a step is what one worker that looks at all of its rows would make."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from justforward import Sight, Step, UserError
from justforward.recipe import Recipe
from justforward.rounds import STRIKES, Plan, Rounds
from justforward.rules import parse
from justforward.wire import Work

ROWS, PART, SAMPLES = 7, 2, 2
SHARED = Plan(rows=ROWS, part=PART)
PRIVATE = Plan(rows=2, part=2, private=True, patience=5.0)


def rise(step: int, row: int, sample: int) -> float:
    """Of any row: some number of its own."""
    return float(np.float32(math.sin(1.0 + 7 * step + 3 * row + 11 * sample)))


def sights_of(work: Work) -> list[Sight]:
    """What an honest worker sees: a sight a part."""
    out = []
    for first, count in work.parts:
        rows = tuple(range(first, first + count))
        samples = range(work.samples)
        rises = tuple(tuple(rise(work.step, row, s) for row in rows) for s in samples)
        out.append(Sight(work.step, tuple(samples), rows, rises, 1.0, 2 * work.samples))
    return out


def made(step: int, sights: list[Sight], of: int, state: tuple[float, ...]) -> Step:
    recipe = Recipe(step, parse("rms"), state, (1e-3,), (0.1,), (0.0,), ((1.0, 1.0),), (1.0,))
    return recipe.combined(sights, samples=SAMPLES, of=of, apart=False)


def alone(steps: int) -> list[Step]:
    """The log of one worker that does everything."""
    log: list[Step] = []
    for step in range(steps):
        work = Work(step, 0, ROWS, SAMPLES, ((0, ROWS),))
        log.append(made(step, sights_of(work), ROWS, log[-1].rule_state if log else (0.0,)))
    return log


class Simulation:
    """Workers, and messages of theirs that are on their way."""

    def __init__(self, plan: Plan) -> None:
        self.now = 0.0
        self.rounds = Rounds(plan, 0, lambda step: SAMPLES, self.now)
        self.mail: list[tuple[int, int, Sight]] = []
        self.log: list[Step] = []

    def ask(self, worker: int) -> Work | None:
        self.rounds.join(worker, f"worker {worker}")
        return self.rounds.work(worker, self.now)

    def look(self, worker: int) -> None:
        work = self.ask(worker)
        if work is not None:
            self.mail += [(worker, work.attempt, sight) for sight in sights_of(work)]

    def deliver(self, place: int, keep: bool) -> None:
        worker, attempt, sight = self.mail[place]
        if not keep:
            del self.mail[place]
        with contextlib.suppress(UserError):  # of one that has left since
            self.rounds.take(worker, attempt, sight, self.now)
        self.go_on()

    def go_on(self) -> None:
        found = self.rounds.due(self.now)
        if found is not None:
            state = self.log[-1].rule_state if self.log else (0.0,)
            sights = [sight for _, sight in found]
            self.log.append(made(self.rounds.step, sights, self.rounds.of, state))
            self.rounds.go_on()


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["look", "deliver", "again", "lose", "leave", "wait", "tick"]),
        st.integers(0, 3),
        st.integers(0, 1000),
    ),
    max_size=80,
)


@given(EVENTS)
def test_the_log_is_that_of_one_worker_with_all_the_rows(events: list[Any]) -> None:
    simulation = Simulation(SHARED)
    for event, worker, number in events:
        some = simulation.mail and number % len(simulation.mail)
        if event == "look":
            simulation.look(worker)
        elif event in ("deliver", "again") and simulation.mail:
            simulation.deliver(some, keep=event == "again")
        elif event == "lose" and simulation.mail:
            del simulation.mail[some]
        elif event == "leave" and worker in simulation.rounds.members:
            simulation.rounds.leave(worker)
        elif event == "wait":
            simulation.now += number / 250
        elif event == "tick":
            simulation.go_on()
    # One that has come through all of it brings the step to its end.
    steps = len(simulation.log) + 1
    for _ in range(2 * ROWS):
        if len(simulation.log) == steps:
            break
        simulation.now += 30.0
        simulation.look(9)
        while simulation.mail and len(simulation.log) < steps:
            simulation.deliver(len(simulation.mail) - 1, keep=False)
    assert len(simulation.log) == steps
    assert simulation.log == alone(steps)


def test_parts_are_shared_and_those_left_over_are_taken_at_once() -> None:
    simulation = Simulation(SHARED)
    simulation.rounds.join(0, "a")
    simulation.rounds.join(1, "b")
    first = simulation.ask(0)
    assert first == Work(0, 0, ROWS, SAMPLES, ((0, 2), (2, 2)))
    assert simulation.ask(0) == first  # asking again: the same
    simulation.look(0)
    simulation.deliver(0, keep=False)
    simulation.deliver(0, keep=False)
    second = simulation.ask(0)  # the other has not asked yet: it need not be waited for
    assert second == Work(0, 0, ROWS, SAMPLES, ((4, 2), (6, 1)))
    assert simulation.ask(1) is None


def test_the_rows_of_a_worker_that_is_silent_are_given_to_another() -> None:
    simulation = Simulation(SHARED)
    simulation.rounds.join(1, "b")
    simulation.ask(0)
    simulation.look(1)
    simulation.deliver(0, keep=False)
    simulation.deliver(0, keep=False)
    simulation.now = SHARED.patience - 0.1
    simulation.go_on()
    assert simulation.ask(1) is None
    simulation.now = SHARED.patience + 0.1
    simulation.go_on()
    assert not simulation.rounds.members[0].alive
    assert simulation.rounds.members[0].late == 1
    taken_over = simulation.ask(1)
    assert taken_over is not None
    assert taken_over.parts == ((0, 2), (2, 2))
    # The step after it does not wait for the silent one at all.
    simulation.look(1)
    for _ in range(2):
        simulation.deliver(0, keep=False)
    assert len(simulation.log) == 1
    work = simulation.ask(1)
    assert work is not None
    assert len(work.parts) == 4


@given(
    st.integers(3, 8),
    st.sampled_from([(16, 2), (8, 1), (9, 2), (16, 6), (5, 1), (13, 2)]),
    st.lists(st.integers(0, 7), max_size=60),
    st.booleans(),
)
def test_none_of_three_or_more_has_half_of_the_rows_where_they_are_bounded(
    workers: int, rows_part: tuple[int, int], order: list[int], leaves: bool
) -> None:
    rows, part = rows_part
    rounds = Rounds(Plan(rows=rows, part=part, bounded=True), 0, lambda step: SAMPLES, 0.0)
    for worker in range(workers):
        rounds.join(worker, str(worker))
    for worker in [n % workers for n in order] + list(range(workers)) * rows:
        work = rounds.work(worker, 0.0)
        if leaves and worker == 0 and work is not None:
            rounds.leave(0)  # and asks for other rows, having kept these
            rounds.join(0, "0")
            rounds.work(0, 0.0)
            leaves = False
        for sight in sights_of(work) if work is not None else ():
            rounds.take(worker, 0, sight, 0.0)
    found = rounds.due(0.0)
    assert found is not None
    for worker in range(workers):
        assert 2 * sum(len(sight.rows) for by, sight in found if by == worker) < rows


def test_a_bounded_round_does_not_wait_for_one_that_never_asks() -> None:
    simulation = Simulation(Plan(rows=16, part=2, bounded=True))
    rounds = simulation.rounds
    for worker in range(3):
        rounds.join(worker, str(worker))
    for worker in (0, 1):
        simulation.look(worker)
    while simulation.mail:
        simulation.deliver(0, keep=False)
    assert simulation.ask(0) is None
    simulation.now = simulation.rounds.plan.patience + 0.1
    simulation.go_on()
    assert not rounds.members[2].alive
    simulation.look(0)
    while simulation.mail:
        simulation.deliver(0, keep=False)
    assert len(simulation.log) == 1


def test_one_that_leaves_is_not_waited_for() -> None:
    simulation = Simulation(SHARED)
    simulation.rounds.join(1, "b")
    simulation.ask(0)
    simulation.ask(1)
    simulation.rounds.leave(0)
    simulation.look(1)
    for _ in range(2):
        simulation.deliver(0, keep=False)
    work = simulation.ask(1)
    assert work is not None
    assert work.parts == ((0, 2), (2, 2))


@pytest.mark.parametrize("plan", [SHARED, PRIVATE], ids=["shared", "private"])
def test_an_answer_of_rows_that_were_taken_away_counts_and_is_no_strike(plan: Plan) -> None:
    simulation = Simulation(plan)
    simulation.rounds.join(1, "b")
    simulation.look(0)
    simulation.rounds.leave(0)  # its connection seemed to have ended
    while simulation.mail:
        _, attempt, sight = simulation.mail.pop()
        assert simulation.rounds.take(0, attempt, sight, 1.0)
    assert simulation.rounds.members[0].alive
    simulation.look(1)
    while simulation.mail:
        simulation.deliver(0, keep=False)
    assert len(simulation.log) == 1
    if plan is SHARED:
        assert simulation.log == alone(1)


def test_private_rows_have_places_of_their_own_and_a_deadline() -> None:
    simulation = Simulation(PRIVATE)
    for worker in range(3):
        simulation.rounds.join(worker, str(worker))
    works = [simulation.ask(worker) for worker in range(3)]
    assert [w and (w.of, w.parts) for w in works] == [(6, ((2 * i, 2),)) for i in range(3)]
    for worker in (0, 2):
        simulation.look(worker)
        simulation.deliver(0, keep=False)
    assert simulation.log == []
    simulation.now = 5.1
    simulation.go_on()
    assert (
        simulation.log[0].coefficients
        == made(0, [sights_of(w)[0] for w in (works[0], works[2]) if w], 6, (0.0,)).coefficients
    )
    # The late one's places are not kept in the next round, until it asks.
    work = simulation.ask(0)
    assert work is not None
    assert work.of == 4
    assert simulation.ask(1) is None


def test_a_private_round_without_a_quorum_is_opened_anew() -> None:
    simulation = Simulation(Plan(rows=2, part=2, private=True, patience=5.0, quorum=2))
    simulation.rounds.join(1, "b")
    first = simulation.ask(0)
    assert first is not None
    simulation.look(0)
    simulation.deliver(0, keep=True)
    simulation.now = 6.0
    simulation.go_on()
    assert simulation.log == []
    simulation.deliver(0, keep=True)  # of the attempt before: too late
    second = simulation.ask(0)
    assert second is None  # the other is not there
    second = simulation.ask(1)
    assert second is not None
    assert (second.step, second.attempt) == (0, 1)
    for worker in (0, 1):
        simulation.look(worker)
    while len(simulation.mail) > 1:
        simulation.deliver(1, keep=False)
    assert len(simulation.log) == 1


def test_who_leaves_a_private_round_is_not_waited_for() -> None:
    simulation = Simulation(PRIVATE)
    simulation.rounds.join(1, "b")
    simulation.look(0)
    simulation.rounds.leave(1)
    simulation.deliver(0, keep=False)
    assert len(simulation.log) == 1


def test_as_many_clients_as_a_log_has_room_for() -> None:
    simulation = Simulation(Plan(rows=2, part=2, private=True, lanes=2 * SAMPLES * 2))
    for worker in range(3):
        simulation.rounds.join(worker, str(worker))
    assert [simulation.ask(worker) is not None for worker in range(3)] == [True, True, False]


def test_rows_without_a_finite_loss_are_left_out() -> None:
    simulation = Simulation(SHARED)
    work = simulation.ask(0)
    assert work is not None
    sights = sights_of(work)
    assert simulation.rounds.take_blank(0, 0, range(2), 0.0)
    assert not simulation.rounds.take_blank(0, 0, range(2), 0.0)
    for sight in sights[1:]:
        simulation.rounds.take(0, 0, sight, 0.0)
    found = simulation.rounds.due(0.0)
    assert found is not None
    assert [sight.rows for _, sight in found] == [(2, 3), (4, 5), (6,)]
    assert simulation.rounds.members[0].blank == 1


WRONG = Sight(0, (0, 1), (0, 1), ((0.0, 0.0),) * 2, 1.0, 4)


@pytest.mark.parametrize(
    ("sight", "attempt", "said"),
    [
        (Sight(1, *[getattr(WRONG, n) for n in ("samples", "rows", "rises", "loss", "forwards")]), 0, "of step 1, attempt 0: the hub is at step 0"),
        (WRONG, 1, "of step 0, attempt 1"),
        (Sight(0, (0,), (0, 1), ((0.0, 0.0),), 1.0, 2), 0, "of samples .0,.: the step has 2"),
        (Sight(0, (0, 1), (0,), ((0.0,),) * 2, 1.0, 4), 0, "not those that were asked for"),
        (Sight(0, (0, 1), (0, 0), ((0.0, 0.0),) * 2, 1.0, 4), 0, "one is there twice"),
        (Sight(0, (0, 1), (6, 7), ((0.0, 0.0),) * 2, 1.0, 4), 0, "not those that were asked for"),
    ],
)  # fmt: skip
def test_what_is_no_answer(sight: Sight, attempt: int, said: str) -> None:
    simulation = Simulation(SHARED)
    simulation.rounds.join(1, "b")
    simulation.ask(0)
    with pytest.raises(UserError, match=said):
        simulation.rounds.take(0, attempt, sight, 0.0)
    with pytest.raises(UserError, match="not those that were asked for"):
        simulation.rounds.take(1, 0, WRONG, 0.0)  # rows that another was asked for
    with pytest.raises(UserError, match="an answer of 1000000 rows"):
        simulation.rounds.take_blank(0, 0, range(1000000), 0.0)
    assert simulation.rounds.due(0.0) is None


def test_after_three_strikes_a_client_is_not_listened_to() -> None:
    simulation = Simulation(SHARED)
    simulation.ask(0)
    for strike in range(STRIKES):
        assert not simulation.rounds.dropped(0), strike
        simulation.rounds.strike(0, "rubbish")
    assert simulation.rounds.dropped(0)
    work = simulation.ask(1)
    assert work is not None
    assert len(work.parts) == 4  # what it had is free
