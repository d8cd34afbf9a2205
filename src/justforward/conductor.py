"""The hub's run: its log, its rule, its rounds. It has no model and no rows: scalars come in, steps go out.

A step is in the log before anybody hears of it. So a hub that was killed goes on from its log, and no worker is ahead of it.
"""

from __future__ import annotations

import json
import secrets
from collections import Counter, deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import justforward
from justforward.config import TrainConfig
from justforward.durable import sync_folder
from justforward.errors import UserError
from justforward.folder import RunFolder, write_whole, writing
from justforward.groups import family_of
from justforward.playback import said_of_settings, short
from justforward.prepare import environment_now
from justforward.recipe import Recipe
from justforward.robust import drawn_in
from justforward.rounds import Plan, Rounds
from justforward.rules import parse
from justforward.schedules import forwards_at, forwards_until, learning_rate, samples_at
from justforward.settings import kept_values
from justforward.sights import Sight
from justforward.trajectory import Step, Writer, read_log
from justforward.variants import settings_of
from justforward.wire import BEHIND, DONE, PROTOCOL, REPLAY, History, Order, Turn

MOST_BEHIND = 256  # steps; a worker that is further behind reads them from the log
KEPT_HASHES = 4
# A projected gradient beyond which its square, which rules keep, is not safe in float32.
MOST_GRADIENT = 1e17


@dataclass(frozen=True)
class Terms:
    """What a run is agreed to be, besides its config: kept in hub.json, and told to every worker.

    Attributes:
        plan: how rounds go.
        deviations: how far from the others a rise may be (`robust`); None: as far as it is.
        hash_every: steps between two comparisons of the workers' weights.
    """

    plan: Plan
    deviations: float | None
    hash_every: int


class Conductor:
    """One run.

    Args:
        folder: the run folder; made now, or gone on in.
        config: what the steps are.
        terms: what else is agreed.
        now: seconds, of a clock that only rises.
        kept: what `read_kept` says of a run to go on with; None: a new one.

    Raises:
        UserError: the folder exists, or cannot be written, or its log is damaged.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: TrainConfig,
        terms: Terms,
        now: float,
        kept: dict[str, Any] | None = None,
    ) -> None:
        self.folder, self.config, self.terms = folder, config, terms
        self.rule = parse(config.rule)
        self.failed: str | None = None
        self.told: set[int] = set()  # that there is no further step, or why not
        self.recent: deque[Step] = deque(maxlen=MOST_BEHIND)
        self.header: dict[str, Any] | None = None
        self.seconds = 0.0
        self._writer: Writer | None = None
        self._history = History()
        self._digests = bytearray(self._history.digest)  # 8 bytes a step: after each, who is right
        self._hashes: dict[int, dict[int, bytes]] = {}
        self._to_replay: set[int] = set()
        self._last: Step | None = None
        self._began = now
        if kept is None:
            folder.make()
            kept = {"run": secrets.token_hex(16), "rows_sha256": None, "tokens_sha256": None}
        else:
            folder.lock()
        self.kept: dict[str, Any] = {**kept, "protocol": PROTOCOL, "terms": asdict(terms)}
        try:
            folder.write_config(config)
            self._write_state()
            if folder.log.exists():
                self._go_on()
        except BaseException:
            folder.unmake()  # of one that was there: lets go of it
            raise
        self.rounds = Rounds(terms.plan, self.steps, lambda step: samples_at(config, step), now)

    @property
    def run(self) -> bytes:
        """The run's own number."""
        return bytes.fromhex(self.kept["run"])

    @property
    def steps(self) -> int:
        """How many there are."""
        return len(self._digests) // 8 - 1

    @property
    def finished(self) -> bool:
        """Whether there is no further step."""
        done = forwards_until(self.config, self.steps)
        return done + forwards_at(self.config, self.steps) > self.config.max_forwards

    # ------------------------------------------------------------------------------------- keeping

    def _write_state(self) -> None:
        write_whole(_state(self.folder), json.dumps(self.kept, indent=2) + "\n")

    def _go_on(self) -> None:
        log = read_log(self.folder.log)
        self.header = log.header
        self._writer = Writer.resume(log)
        for step in log.steps:
            self._remember(step)
        metrics, _ = self.folder.read_metrics()
        self.folder.keep_metrics([m for m in metrics if m["step"] <= self.steps])
        self.seconds = max((float(m["seconds"]) for m in metrics), default=0.0)

    def _remember(self, step: Step) -> None:
        self._history.add(step)
        self._digests += self._history.digest
        self.recent.append(step)
        self._last = step

    def close(self) -> None:
        """Seal the log and write down who took part."""
        if self._writer is not None:
            self._writer.close()
        self.kept["members"] = self.status()["members"]
        self._write_state()
        self.folder.unlock()

    # ------------------------------------------------------------------------------------- joining

    def info(self) -> dict[str, Any]:
        """What a worker needs to know before it can join."""
        plan = self.terms.plan
        return {
            "protocol": PROTOCOL,
            "version": justforward.__version__,
            "config": kept_values(self.config),
            "private": plan.private,
            "rows": plan.rows,
            "hash_every": self.terms.hash_every,
            "log": self.folder.log.stat().st_size if self._writer is not None else 0,
        }

    def join(self, said: dict[str, Any], number: int, name: str) -> None:
        """Let a worker take part. The first one's header and rows are the run's; it makes the log.

        Args:
            said: by the worker: "protocol", "version", "header" (of its log), "rows" (sha256 of what it draws from), "tokens"
                (sha256 of what its tokenizer makes of texts).
            number: the worker's from now on.
            name: what to call it.

        Raises:
            UserError: naming what differs from the run.
        """
        header, rows, tokens = said.get("header"), said.get("rows"), said.get("tokens")
        for what, theirs, ours in (
            ("protocol", said.get("protocol"), PROTOCOL),
            ("version of justforward", said.get("version"), justforward.__version__),
        ):
            if theirs != ours:
                raise UserError(f"{name}: its {what} is {theirs!r}, and the hub's is {ours!r}: use the same")  # fmt: skip
        texts = isinstance(rows, str | None) and isinstance(tokens, str)
        if not isinstance(header, dict) or not texts:
            raise UserError(f"{name}: it says neither what it tunes nor what its rows are")
        expected = self.header if self.header is not None else self._expected()
        wrong = difference(expected, header)
        if wrong is not None:
            raise UserError(f"{name}: {wrong}")
        if self._writer is None:
            self._found(header, rows, str(tokens))
        if not self.terms.plan.private and rows != self.kept["rows_sha256"]:
            raise UserError(
                f"{name}: its rows have sha256 {short(rows)}, and the run's {short(self.kept['rows_sha256'])}: with shared "
                "rows all workers must have the same file"
            )
        if tokens != self.kept["tokens_sha256"]:
            raise UserError(
                f"{name}: its tokenizer makes other tokens than the first worker's (sha256 {short(tokens)}, and the run's "
                f"{short(self.kept['tokens_sha256'])}): give all workers the same tokenizer files"
            )
        if number in self.rounds.members and self.rounds.dropped(number):
            raise UserError(f"{name}: it sent what is no answer, and is not listened to any more")
        self.rounds.join(number, name)

    def _expected(self) -> dict[str, Any]:
        """What the header of a log of this config says, as far as that is known without a model."""
        config = self.config
        assert config.eps is not None  # resolved
        return said_of_settings(
            seed=config.seed,
            family=family_of(config.family, config.estimator),
            eps=[config.eps],
            rule=self.rule,
            rule_state=self.rule.state_size,
            settings=settings_of(config.estimator, config.looks),
        )

    def _found(self, header: dict[str, Any], rows: str | None, tokens: str) -> None:
        """The log is the last of the run's files: where this fails or is killed before, the next worker founds the run."""
        draft = self.folder.log.with_name(f".{self.folder.log.name}.new")
        draft.unlink(missing_ok=True)
        try:
            Writer.create(draft, header).close()
            try:
                found = read_log(draft).header
            except UserError as error:
                raise UserError(f"what it tunes makes no log: {error}") from None
            self.kept.update(rows_sha256=rows, tokens_sha256=tokens)
            self._write_state()
            self.folder.write_environment(
                {
                    **environment_now(self.config.quantize),
                    "base_fingerprint": found["base"],
                    "data_sha256": rows or "",
                }
            )
            with writing(self.folder.log):
                draft.replace(self.folder.log)
                sync_folder(self.folder.path)
        finally:
            draft.unlink(missing_ok=True)
        self._writer = Writer.resume(read_log(self.folder.log))
        self.header = found

    # -------------------------------------------------------------------------------------- turns

    def turn(self, worker: int, turn: Turn, now: float) -> Order | None:
        """What a worker is told that says this; None: nothing yet.

        Raises:
            UserError: it is not listened to any more, or the run cannot go on.
        """
        self.rounds.heard(worker)
        self._check(worker)
        place = 8 * turn.step
        if turn.step > self.steps or self._digests[place : place + 8] != turn.history:
            self._to_replay.add(worker)
        elif turn.weights is not None and turn.step % self.terms.hash_every == 0:
            self._compare(worker, turn.step, turn.weights)
        if worker in self._to_replay:
            self._to_replay.discard(worker)
            self.rounds.members[worker].replays += 1
            self.leave(worker)
            return Order(REPLAY)
        try:
            for sight in turn.sights:
                self._check_size(sight)
                self.rounds.take(worker, turn.attempt, sight, now)
            for first, count in turn.blank if turn.step == self.steps else ():
                self.rounds.take_blank(worker, turn.attempt, range(first, first + count), now)
        except UserError as error:
            self.strike(worker, str(error))
        self.tick(now)
        return self.order(worker, turn.step, now)

    def order(self, worker: int, step: int, now: float) -> Order | None:
        """What a worker that has taken so many steps is told; None: nothing yet."""
        self._check(worker)
        if self.failed is not None:
            self.told.add(worker)
            raise UserError(f"the run cannot go on: {self.failed}")
        if worker in self._to_replay:
            return Order(REPLAY)
        if self.steps - step > len(self.recent):
            return Order(BEHIND)
        taken = tuple(self.recent)[len(self.recent) - (self.steps - step) :]
        if self.finished:
            self.told.add(worker)
            return Order(DONE, taken)
        work = self.rounds.work(worker, now)
        return Order(steps=taken, work=work) if taken or work is not None else None

    def _check(self, worker: int) -> None:
        if self.rounds.dropped(worker):
            why = self.rounds.members[worker].why
            raise UserError(f"this worker is not listened to any more: it sent what is no answer: {why}")  # fmt: skip

    def _check_size(self, sight: Sight) -> None:
        """Refuse what no loss can be, before it meets those of others.

        Raises:
            UserError: naming the number.
        """
        assert self.config.eps is not None
        largest, most = _largest(sight), MOST_GRADIENT * self.config.eps
        for what, value in (("rise of the loss", largest), ("loss", abs(sight.loss))):
            if value > most:
                raise UserError(
                    f"a {what} of {value:.3g}: beyond {most:.3g} ({MOST_GRADIENT:g} times eps) it is no loss that a step can be made of"
                )

    def leave(self, worker: int) -> None:
        """A worker goes: its rows are for others, and its weights are compared with nobody's."""
        self.rounds.leave(worker)
        for here in self._hashes.values():
            here.pop(worker, None)

    def forget(self, worker: int) -> bool:
        """Let go of one that is gone, if nothing hangs on it; whether it is forgotten."""
        if not self.rounds.forget(worker):
            return False
        self.told.discard(worker)
        self._to_replay.discard(worker)
        for here in self._hashes.values():
            here.pop(worker, None)
        return True

    def strike(self, worker: int, why: str) -> None:
        """A worker sent what is no answer; after three of them it is as one that has left."""
        self.rounds.strike(worker, why)
        if self.rounds.dropped(worker):
            self.leave(worker)

    def _compare(self, worker: int, step: int, weights: bytes) -> None:
        """Whoever has other weights than most is to replay; without a majority, all that differ. What a worker said first counts."""
        here = self._hashes.setdefault(step, {})
        if worker in here:
            return
        here[worker] = weights
        while len(self._hashes) > KEPT_HASHES:
            del self._hashes[min(self._hashes)]
        counts = Counter(here.values())
        most, times = counts.most_common(1)[0]
        if len(counts) > 1:
            right = most if 2 * times > len(here) else None
            differing = [number for number, own in here.items() if own != right]
            self._to_replay.update(differing)
            for number in differing:
                del here[number]

    def tick(self, now: float) -> bool:
        """Make the step if it is time to; whether one was made."""
        if self.failed is not None or self.finished:
            return False
        found = self.rounds.due(now)
        if found is None:
            return False
        index = self.steps
        if not found:
            self.failed = f"step {index}: no worker has a finite loss: lower lr or eps"
            return False
        apart = self.config.estimator == "activation"
        sights, counts = [sight for _, sight in found], Counter[int]()
        if self.terms.deviations is not None:
            sights, counts = drawn_in(found, self.terms.deviations, apart)
        done = forwards_until(self.config, index)
        rate = learning_rate(self.config, done)
        try:
            step = self._recipe(rate).combined(
                sights, samples=self.rounds.samples, of=self.rounds.of, apart=apart
            )
            assert self._writer is not None
            self._writer.append(step)
        except UserError as error:
            largest, worker = max((_largest(sight), worker) for worker, sight in found)
            self.failed = f"{error} (the largest rise of the loss, {largest:.3g}, is from {self.rounds.members[worker].name})"
            return False
        self._remember(step)
        self.rounds.go_on(counts)
        line = {
            "kind": "step",
            "step": self.steps,
            "forwards": done + forwards_at(self.config, index),
            "seconds": round(self.seconds + now - self._began, 3),
            "loss": step.loss,
            "lr": rate,
        }
        try:
            self.folder.append_metric(line)
        except UserError as error:  # the step itself is in the log
            self.failed = str(error)
        return True

    def _recipe(self, rate: float) -> Recipe:
        last = self._last
        assert self.config.eps is not None
        return Recipe(
            index=self.steps,
            rule=self.rule,
            state=last.rule_state if last is not None else (0.0,) * self.rule.state_size,
            eps=(self.config.eps,),
            rates=(rate,),
            decays=(self.config.weight_decay,),
            shape=((1.0, 1.0),),
            scales=last.scales if last is not None else (1.0,),
        )

    def status(self) -> dict[str, Any]:
        """How far it is, and what is known of each worker."""
        return {
            "steps": self.steps,
            "finished": self.finished,
            "failed": self.failed,
            "members": [asdict(member) for member in self.rounds.members.values()],
        }


def _largest(sight: Sight) -> float:
    return max(max(map(abs, own)) for own in sight.rises)


def _state(folder: RunFolder) -> Path:
    return folder.path / "hub.json"


def read_kept(folder: RunFolder) -> tuple[dict[str, Any], Terms]:
    """What a hub has kept of its run besides config and log.

    Raises:
        UserError: the folder is no hub's, or was made by another version's protocol.
    """
    try:
        kept: dict[str, Any] = json.loads(_state(folder).read_text(encoding="utf-8"))
        bytes.fromhex(kept["run"])
        terms = Terms(**{**kept["terms"], "plan": Plan(**kept["terms"]["plan"])})
        protocol = kept["protocol"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(
            f"{folder.path}: no hub's folder: {_state(folder).name}: {said}: check the path; what is left of a hub that was "
            "killed before it listened can only be removed"
        ) from None
    if protocol != PROTOCOL:
        raise UserError(
            f"{folder.path}: made with protocol {protocol}, this version has {PROTOCOL}: use the version that made it"
        )
    return kept, terms


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """What of two headers differs, in words; only what the first says is compared."""
    names = {"base": "the fingerprint of its base model", "groups": "its eps"}
    for key, value in ours.items():
        other = theirs.get(key)
        if other == value:
            continue
        if key == "tensors" and isinstance(other, list):
            pairs = [(a, b) for a, b in zip(value, other, strict=False) if a != b]
            a, b = pairs[0] if pairs else (f"{len(value)} tensors", f"{len(other)}")
            return f"it tunes {short(b)}, and the run {short(a)}"
        return f"{names.get(key, key)} is {short(other)}, and the run's {short(value)}"
    return None
