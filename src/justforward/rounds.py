"""Who looks at which rows of a step, who has answered, and when the step goes on. No input or output, no clock of its own.

Shared rows: a step's batch is cut into the same parts whoever is there; each is looked at by itself, so that its losses have
the same bits in any company, and a step depends on which parts were seen alone. A worker that asks is given its share of the
parts that nobody has; once there are none, parts of others that are overdue. The first answer to a part counts.

Private rows: every client that is alive when the round opens has places for rows of its own; the round ends when all have
answered, or at its deadline with those that have. One that misses it is asked again when it is heard again.
"""

from __future__ import annotations

import statistics
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from justforward.errors import UserError
from justforward.sights import Sight
from justforward.wire import Work

STRIKES = 3  # so often a client may send what is no answer


@dataclass(frozen=True)
class Plan:
    """How rounds go.

    Attributes:
        rows: of a step's batch; of each client's, with private rows.
        part: rows that are looked at together (shared rows).
        private: whether clients have rows of their own.
        patience: seconds after which a part is given to another, on top of what parts take; with private rows those
            that a round takes at most.
        quorum: clients that must be there to begin a step, and with private rows must have answered.
        lanes: coefficients that a step may have (private rows in activation space bring some each); None: as many as
            there are.
        bounded: whether, of shared rows and while three workers or more answer in time, none may have half of them.
    """

    rows: int
    part: int
    private: bool = False
    patience: float = 2.0
    quorum: int = 1
    lanes: int | None = None
    bounded: bool = False

    def room(self, samples: int) -> int | None:
        """Clients with rows of their own that a step of so many samples has room for; None: any number."""
        return None if self.lanes is None else max(1, self.lanes // (samples * self.rows))


@dataclass
class Member:
    """What is known of a worker.

    Attributes:
        name: as it calls itself.
        alive: it has answered when it was asked last.
        answers: parts that counted.
        late: how often it has not answered in time.
        blank: parts of which it had no finite loss.
        drawn_in: rises that were outliers.
        strikes: messages that were none.
        why: the last of them was none.
        replays: how often its weights differed.
    """

    name: str
    alive: bool = True
    answers: int = 0
    late: int = 0
    blank: int = 0
    drawn_in: int = 0
    strikes: int = 0
    why: str = ""
    replays: int = 0


@dataclass
class _Part:
    rows: range
    asked: dict[int, float] = field(default_factory=dict)  # worker: when
    taken_away: set[int] = field(
        default_factory=set
    )  # workers that were asked, and are not counted on any more
    sight: Sight | None = None
    by: int | None = None  # who answered
    gone: bool = False  # nobody will: a client with rows of its own has left


def _is_of(part: _Part, worker: int) -> bool:
    """Whether it has answered a part, or may."""
    open_to = worker in part.asked or worker in part.taken_away
    return part.by == worker or (part.by is None and open_to)


class Rounds:
    """The rounds of a run, one a step.

    Args:
        plan: how they go.
        step: index of the first.
        samples: how many a step has.
        now: seconds, of a clock that only rises; likewise everywhere.
    """

    def __init__(self, plan: Plan, step: int, samples: Callable[[int], int], now: float) -> None:
        self.plan = plan
        self.step = step
        self.attempt = 0
        self.members: dict[int, Member] = {}
        self.looking: dict[int, float] = {}  # worker that was asked and not heard since: when
        self._samples = samples
        self._parts: list[_Part] = []
        self._took: deque[float] = deque(maxlen=16)
        self._opened = now

    @property
    def samples(self) -> int:
        """Of the step."""
        return self._samples(self.step)

    @property
    def of(self) -> int:
        """Rows of the step's batch."""
        return self._parts[-1].rows.stop if self._parts else 0

    # ------------------------------------------------------------------------------------- workers

    def join(self, worker: int, name: str) -> None:
        """A worker is there, or there again."""
        self.members.setdefault(worker, Member(name)).alive = True

    def leave(self, worker: int) -> None:
        """A worker goes: what it has not answered is for others at once."""
        self.members[worker].alive = False
        self.looking.pop(worker, None)
        for part in self._parts:
            if part.by is None and part.asked.pop(worker, None) is not None:
                part.taken_away.add(worker)
                part.gone = self.plan.private

    def forget(self, worker: int) -> bool:
        """Let go of one that is gone, has done nothing wrong and has no part in the round; whether it is forgotten."""
        member = self.members[worker]
        busy = any(worker == part.by or worker in part.asked for part in self._parts)
        if member.alive or member.strikes or busy:
            return False
        for part in self._parts:
            part.taken_away.discard(worker)
        del self.members[worker]
        return True

    def heard(self, worker: int) -> None:
        """A worker says something: it is not looking any more."""
        self.looking.pop(worker, None)

    def strike(self, worker: int, why: str) -> None:
        """A worker sent what is no answer; after three of them it is not listened to any more."""
        member = self.members[worker]
        member.strikes += 1
        member.why = why
        if member.strikes >= STRIKES:
            self.leave(worker)

    def dropped(self, worker: int) -> bool:
        """Whether it is not listened to any more."""
        return self.members[worker].strikes >= STRIKES

    def _alive(self) -> list[int]:
        return [number for number, member in self.members.items() if member.alive]

    # --------------------------------------------------------------------------------------- work

    def work(self, worker: int, now: float) -> Work | None:
        """What a worker that asks is to look at; None: nothing now. Asking again gives the same again."""
        self.members[worker].alive = True
        if not self._parts and not self._open(now):
            return None
        mine = [part for part in self._parts if worker in part.asked and part.by is None]
        if not mine and not self.plan.private:
            mine = self._more(worker, now)
            for part in mine:
                part.asked[worker] = now
        if not mine:
            return None
        self.looking[worker] = now
        parts = tuple((part.rows.start, len(part.rows)) for part in mine)
        return Work(self.step, self.attempt, self.of, self.samples, parts)

    def _open(self, now: float) -> bool:
        alive = self._alive()
        if len(alive) < self.plan.quorum:
            return False
        self._opened = now
        rows, part = self.plan.rows, self.plan.part
        if not self.plan.private:
            self._parts = [_Part(range(i, min(i + part, rows))) for i in range(0, rows, part)]
            return True
        alive = alive[: self.plan.room(self.samples)]
        self._parts = [
            _Part(range(place * rows, (place + 1) * rows), {worker: now})
            for place, worker in enumerate(alive)
        ]
        return True

    def _more(self, worker: int, now: float) -> list[_Part]:
        """This worker's share of what nobody has, or else what others are overdue with."""
        free = self._free()
        if free:
            share = -(-len(self._parts) // max(1, len(self._alive())))
            return self._within(worker, free[:share], now)
        overdue = [part for part in self._parts if part.by is None and self._overdue(part, now)]
        return self._within(worker, overdue, now)

    def _free(self) -> list[_Part]:
        return [part for part in self._parts if part.by is None and not part.asked]

    def _within(self, worker: int, parts: list[_Part], now: float) -> list[_Part]:
        """Of these, those that it may have: with what it has, and could still answer, fewer than half if others are there.

        Once the round has lasted for as long as parts may take, whoever asks is given them: others have not come.
        """
        count, alive = len(self._parts), len(self._alive())
        if not self.plan.bounded or alive < 3 or now - self._opened > self._limit():
            return parts
        own = [part for part in self._parts if _is_of(part, worker)]
        room = max((count - 1) // 2, -(-count // alive)) - len(own)
        kept = []
        for part in parts:
            room -= not _is_of(part, worker)
            if room >= 0:
                kept.append(part)
        return kept

    @property
    def usual(self) -> float:
        """Seconds that parts take."""
        return statistics.median(self._took) if self._took else 0.0

    def _limit(self) -> float:
        return self.plan.patience if self.plan.private else self.plan.patience + 2.0 * self.usual

    def _overdue(self, part: _Part, now: float) -> bool:
        return all(now - asked > self._limit() for asked in part.asked.values())

    # ------------------------------------------------------------------------------------- answers

    def take(self, worker: int, attempt: int, sight: Sight, now: float) -> bool:
        """Take what a worker has seen. What is late, or there already, changes nothing.

        Returns:
            Whether any of it counted.

        Raises:
            UserError: it is no answer to what the worker was asked.
        """
        if (sight.step, attempt) < (self.step, self.attempt):
            return False
        if (sight.step, attempt) != (self.step, self.attempt):
            raise UserError(f"a sight of step {sight.step}, attempt {attempt}: the hub is at step {self.step}, attempt {self.attempt}")  # fmt: skip
        if sight.samples != tuple(range(self.samples)):
            raise UserError(f"a sight of samples {sight.samples}: the step has {self.samples}")
        place = {row: i for i, row in enumerate(sight.rows)}
        if len(place) != len(sight.rows):
            raise UserError(f"a sight of rows {sight.rows}: one is there twice")
        parts = self._asked_for(worker, set(place))
        for part in parts:
            if part.by is None:
                rises = tuple(tuple(own[place[r]] for r in part.rows) for own in sight.rises)
                part.sight = replace(sight, rows=tuple(part.rows), rises=rises)
        return self._answered(worker, parts, now)

    def take_blank(self, worker: int, attempt: int, rows: range, now: float) -> bool:
        """Take that a worker has no finite loss of some rows: these are left out of the step.

        Returns, Raises:
            As `take`.
        """
        if attempt != self.attempt:
            return False
        if len(rows) > self.of:
            raise UserError(f"an answer of {len(rows)} rows: the step has {self.of}")
        parts = self._asked_for(worker, set(rows))
        self.members[worker].blank += sum(part.by is None for part in parts)
        return self._answered(worker, parts, now)

    def _asked_for(self, worker: int, rows: set[int]) -> list[_Part]:
        """The parts that these rows are. What was taken away from a worker meanwhile is an answer as good as any."""
        parts = [
            part
            for part in self._parts
            if (worker in part.asked or worker in part.taken_away) and rows & set(part.rows)
        ]
        if not parts or set().union(*(part.rows for part in parts)) != rows:
            raise UserError(f"an answer of rows {sorted(rows)[:8]}: not those that were asked for")
        return parts

    def _answered(self, worker: int, parts: list[_Part], now: float) -> bool:
        new = [part for part in parts if part.by is None]
        for part in new:
            part.by, part.gone = worker, False
            if worker in part.asked:
                self._took.append(now - part.asked[worker])
        self.members[worker].alive = True
        self.members[worker].answers += len(new)
        return bool(new)

    # ----------------------------------------------------------------------------------- going on

    def due(self, now: float) -> list[tuple[int, Sight]] | None:
        """Everything that was seen of the step, with who saw it, once it is time to make it; else None.

        An empty list: nobody had a finite loss. With private rows a round that ends without a quorum is opened anew.
        """
        if not self._parts:
            return None
        self._note_late(now)
        answered = [part for part in self._parts if part.by is not None]
        if any(part.by is None and not part.gone for part in self._parts) and (
            not self.plan.private or now - self._opened <= self._limit()
        ):
            return None
        if self.plan.private and len(answered) < self.plan.quorum:
            self._parts, self.attempt = [], (self.attempt + 1) % (1 << 16)
            return None
        return [
            (part.by, part.sight)
            for part in answered
            if part.by is not None and part.sight is not None
        ]

    def _note_late(self, now: float) -> None:
        """Those that were overdue are not counted on until they are heard again."""
        for part in self._parts:
            for worker, asked in part.asked.items():
                member = self.members[worker]
                if part.by is None and member.alive and now - asked > self._limit():
                    self._late(member)
        if self.plan.bounded and self._free() and now - self._opened > self._limit():
            for worker in self._alive():  # it has not asked in all this time, and rows wait for it
                if not any(_is_of(part, worker) for part in self._parts):
                    self._late(self.members[worker])

    def _late(self, member: Member) -> None:
        member.alive = False
        member.late += 1

    def go_on(self, drawn_in: Counter[int] | None = None) -> None:
        """The step is made: the next round is to be opened when a worker asks."""
        for worker, count in (drawn_in or Counter()).items():
            self.members[worker].drawn_in += count
        self.step += 1
        self.attempt = 0
        self._parts = []
