"""A worker: looks at what the hub gives it, sends scalars, takes the steps that come back. Its weights stay those of all others.

It holds the run's log in a temporary file, of which it can be made again at any time: base + log.
"""

from __future__ import annotations

import contextlib
import struct
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import justforward
from justforward.errors import NonFiniteLoss, UserError
from justforward.line import HubGone, Line, SessionLost
from justforward.optim import MeZO
from justforward.playback import fingerprint
from justforward.sights import Sight, merged
from justforward.trajectory import read_log
from justforward.wire import BEHIND, DONE, PROTOCOL, REPLAY, History, Order, Turn, Work, zipped

_REPLAYS = 3  # one after the other: then something is wrong that a replay does not mend
_TRIES = 5
_T = TypeVar("_T")
_LOST = "the hub takes no message of this worker: is its key the hub's?"


@dataclass(frozen=True)
class Rows:
    """What a worker looks with.

    Attributes:
        batch: rows of a step: of its index, the places wanted (from, to), and how many the step has.
        losses: of such a batch, one a row.
        digest: sha256 of what rows are drawn from; None: they are this worker's own.
        tokens: sha256 of what its tokenizer makes of texts, once the model is built; "": it has none.
    """

    batch: Callable[[int, int, int, int], Any]
    losses: Callable[[Any], Any]
    digest: str | None = None
    tokens: Callable[[], str] = str


class Worker:
    """Takes part in a run.

    Args:
        line: to the hub.
        name: what the hub calls it.
        build: makes the optimizer on a fresh base model, with this file as its log, resumed if asked to: called
            again where the weights must be made anew.
        rows: what to look at.
        hash_every: steps between two fingerprints of the weights, sent to the hub.
        note: called with a sentence where there is something to tell.
    """

    def __init__(
        self,
        line: Line,
        name: str,
        build: Callable[[Path, bool], MeZO],
        rows: Rows,
        hash_every: int,
        note: Callable[[str], None] | None = None,
    ) -> None:
        self.line, self.name, self.rows, self.hash_every = line, name, rows, hash_every
        self._build = build
        self._note = note or (lambda text: None)
        self.opt: MeZO | None = None
        self._history = History()
        self._header: dict[str, Any] = {}
        self._weights: bytes | None = None
        self._replays = self._replayed_at = 0

    def run(self, log_bytes: int) -> int:
        """Take part until there is no further step; how many there are.

        Args:
            log_bytes: what the hub says its log has.

        Raises:
            UserError: the hub refuses this worker.
            HubGone: it does not answer any more; the run may be over.
        """
        with tempfile.TemporaryDirectory(prefix="justforward-") as folder:
            try:
                self._begin(Path(folder), log_bytes)
                return self._take_part(Path(folder))
            except HubGone as error:
                taken = self.opt.steps if self.opt is not None else 0
                raise HubGone(
                    f"{error}, or, where the run is over, that it has this worker's {taken} steps: its folder holds the run"
                ) from None
            finally:
                self._leave()
                if self.opt is not None:
                    self.opt.close()

    def _leave(self) -> None:
        """Say so, if it can be said at once."""
        self.line.wait = 0.0
        with contextlib.suppress(UserError, SessionLost):
            self.line.call("leave")
        self.line.link.close()

    # -------------------------------------------------------------------------------------- begin

    def _surely(self, ask: Callable[[], _T]) -> _T:
        """Ask, in another session where the hub has forgotten this one: it was started anew, or this worker was away for long."""
        for _ in range(_TRIES):
            with contextlib.suppress(SessionLost):
                return ask()
            self.line.open()
        raise UserError(_LOST)

    def _begin(self, folder: Path, log_bytes: int) -> None:
        """Base, and the log as far as it goes; then join. Loading takes long, and is done once whatever becomes of the session."""
        path = folder / "trajectory.jfl"
        if self.opt is not None:
            self.opt.close()
            self.opt = None  # before a second model is there
        path.unlink(missing_ok=True)
        if log_bytes:
            path.write_bytes(self._surely(self._download))
        try:
            self.opt = self._build(path, bool(log_bytes))
        except UserError as error:  # this copy is gone before anybody reads of it
            raise UserError(str(error).replace(str(path), "the hub's log")) from None
        log = read_log(path)
        self._history = History(log.steps)
        self._weights = None
        if log.steps:
            self._note(f"replayed {len(log.steps)} steps")
        self._header = log.header
        self._surely(self._join)

    def _download(self) -> bytes:
        whole = b""
        while part := self.line.call("log", struct.pack("<Q", len(whole))):
            whole += part
        return whole

    def _join(self) -> None:
        said = {
            "name": self.name,
            "protocol": PROTOCOL,
            "version": justforward.__version__,
            "header": self._header,
            "rows": self.rows.digest,
            "tokens": self.rows.tokens(),
        }
        self.line.call("join", zipped(said))

    # ----------------------------------------------------------------------------------- taking part

    def _take_part(self, folder: Path) -> int:
        assert self.opt is not None
        said = self._turn()
        while True:
            try:
                order = Order.unpack(self.line.call("turn", said.pack()))
            except SessionLost:
                self.line.open()
                self._surely(self._join)
                said = replace(said, sights=(), blank=())  # nobody there has asked for them
                continue
            if order.says == REPLAY:
                self._replay(folder)
                said = self._turn()
                continue
            if order.says == BEHIND:
                self._catch_up(folder)
                said = self._turn()
                continue
            self._move(order)
            if order.says == DONE:
                return self.opt.steps
            said = self._look(order.work) if order.work is not None else self._turn()

    def _replay(self, folder: Path) -> None:
        assert self.opt is not None
        if self.opt.steps > self._replayed_at + 2 * self.hash_every:
            self._replays = 0
        self._replays += 1
        if self._replays > _REPLAYS:
            raise UserError(
                f"after {_REPLAYS} replays of the log this worker's weights still differ from the others': check its memory "
                "and its base model"
            )
        self._note(
            "the hub says that these weights differ: starting again from the base and the log"
        )
        told = self._surely(lambda: self.line.ask("run"))
        self._begin(folder, told["log"])
        self._replayed_at = self.opt.steps

    def _catch_up(self, folder: Path) -> None:
        """Others have taken more steps meanwhile than an order holds: these weights are right, and are moved on by the log."""
        assert self.opt is not None
        path = folder / "hub.jfl"
        path.write_bytes(self._surely(self._download))
        try:
            steps = read_log(path).steps
        except UserError as error:
            raise UserError(str(error).replace(str(path), "the hub's log")) from None
        finally:
            path.unlink()
        self._note(f"{len(steps) - self.opt.steps} steps behind: taking them from the hub's log")
        self._move(Order(steps=tuple(steps)))

    def _move(self, order: Order) -> None:
        assert self.opt is not None
        before = self.opt.steps
        for step in order.steps:
            if step.index < self.opt.steps:
                continue  # of a reply to a message that was sent twice
            self.opt.apply(step)
            self._history.add(step)
        if self.opt.steps == before:
            return
        self._weights = None
        if self.opt.steps % self.hash_every == 0:
            assert self.opt.model is not None
            self._weights = bytes.fromhex(fingerprint(self.opt.model))

    def _turn(self) -> Turn:
        assert self.opt is not None
        weights, self._weights = self._weights, None
        return Turn(self.opt.steps, self._history.digest, weights=weights)

    def _look(self, work: Work) -> Turn:
        """Look at all parts, each by itself."""
        assert self.opt is not None
        turn = self._turn()
        if work.step != self.opt.steps:
            return turn
        seen: list[Sight] = []
        blank: list[tuple[int, int]] = []
        for first, count in work.parts:
            batch = self.rows.batch(work.step, first, first + count, work.of)
            rows = range(first, first + count)
            try:
                seen.append(self.opt.look(self.rows.losses, batch, rows=rows, of=work.of))
            except NonFiniteLoss as error:
                self._note(str(error))
                blank.append((first, count))
        return replace(turn, attempt=work.attempt, sights=tuple(joined(seen)), blank=tuple(blank))


def joined(sights: Sequence[Sight]) -> list[Sight]:
    """Sights of rows that follow each other, as one: fewer bytes, the same rises."""
    runs: list[list[Sight]] = []
    for sight in sights:
        if runs and runs[-1][-1].rows[-1] + 1 == sight.rows[0]:
            runs[-1].append(sight)
        else:
            runs.append([sight])
    return [merged(run) for run in runs]
