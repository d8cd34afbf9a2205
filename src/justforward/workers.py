"""Steps that the processes of torchrun take together: each looks with some of the rows, along some of the directions, or both.

Scalars are all that they send: each a `Sight`, to every other one. All put the same sights together to the same step,
summed exactly, and move their own copy of the weights. So the step has the same bits for any number of workers,
as long as the losses have; these depend on which rows go through the model at once, and that is fixed.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import tempfile
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import justforward
from justforward import noise
from justforward.activations import change_rows
from justforward.errors import NonFiniteLoss, UserError
from justforward.interrupts import Shield
from justforward.optim import MeZO
from justforward.peers import START_SECONDS, Peers, spell
from justforward.playback import fingerprint, fingerprint_of
from justforward.sights import Sight, merged, row_losses
from justforward.trajectory import Step, read_log
from justforward.variants import check_shared, sample_count

# What a message is, behind the checksum of what its worker is about to do.
_SIGHT, _IDLE, _NONFINITE, _ERROR, _INTERRUPT = b"SINEC"
_HEAD, _LOSS = struct.Struct("<IB"), struct.Struct("<f")
_AGAIN = (
    "start again and resume the log: base and log give every worker the same weights (torchrun --max-restarts N starts again by "
    "itself)"
)


class Workers:
    """The fixed group of processes that take an optimizer's steps together.

    At the start they compare version, settings and weights, and those that have taken fewer steps, or write no log, follow the
    log of the one that is furthest. All end together: where one is gone, silent, fails or differs, every other one says
    which, and nobody takes the step. The log has all steps before.

    With `private`, `opt.private.draw()` gives all of them the same rows, which one has drawn, and a step has one noise, of the same one.
    What they send each other has none: all of them, and the network between them, must be its owner's who has the rows.

    Args:
        opt: the optimizer of this worker; of the same base model and settings in all. One worker of each machine
            should write a log, and no two the same file.
        rows_at_once: rows that go through the model at once. Losses have the same bits for any number of workers; more
            rows are faster, as long as there are enough parts for all workers. With `private` it must be 1.
        populations: into how many parts the samples of a step are divided; each is looked along with all rows. The
            number of workers must be a multiple.
        check_every: compare the weights that are tuned after so many steps, by their hash; 0 for never.
        timeout: seconds to wait for the others in a step, once this one is ready.
        data: what the rows are read from, as a text or number: compared at the start.
        group: of `torch.distributed` (default: all processes; torchrun's, where `init_process_group` was not called).

    Attributes:
        opt: the optimizer.
        rank: the number of this worker, from 0.
        size: how many there are.

    Raises:
        UserError: an argument is out of range, or the workers differ, naming what in which.
    """

    def __init__(
        self,
        opt: MeZO,
        *,
        rows_at_once: int = 1,
        populations: int = 1,
        check_every: int = 100,
        timeout: float = 60.0,
        data: Any = "",
        group: dist.ProcessGroup | Peers | None = None,
    ) -> None:
        check_shared(opt.looks, opt.modified, None, opt.weights.sharded)
        self.opt = opt
        self._peers = group if isinstance(group, Peers) else Peers(group)
        self.rank, self.size = self._peers.rank, self._peers.size
        for name, value, least in (
            ("rows_at_once", rows_at_once, 1),
            ("populations", populations, 1),
            ("check_every", check_every, 0),
        ):
            if not isinstance(value, int) or value < least:
                raise UserError(f"{name} is {value!r}: it must be a whole number from {least}")
        if opt.private is not None and rows_at_once > 1:
            raise UserError(
                f"rows_at_once is {rows_at_once}, with private: rows that go through the model together change the last bits of each "
                "other's losses: leave it out"
            )
        if self.size % populations:
            raise UserError(
                f"populations is {populations}, with {self.size} workers: their number must be a multiple of it"
            )
        if not isinstance(timeout, int | float) or not timeout > 0.0:
            raise UserError(f"timeout is {timeout!r}: it must be positive, in seconds")
        self._rows_at_once, self._populations = rows_at_once, populations
        self._check_every = check_every if self.size > 1 else 0
        self._timeout = timeout
        self._chain = 0  # checksum of the steps taken together
        settings = {
            "the version of justforward": justforward.__version__,
            "the version of the noise": noise.NOISE_VERSION,
            "seed": opt.seed,
            "rule": opt.rule.spec,
            "family": opt.family,
            "estimator": opt.estimator,
            "looks": opt.looks,
            "blocks": None if opt.blocks is None else opt.blocks.settings(),
            "private": None if opt.private is None else opt.private.settings(),
            **self._rates(),
            "what is tuned": _layout(opt),
            "rows_at_once": rows_at_once,
            "populations": populations,
            "check_every": check_every,
            "data": data,
        }
        self._compare(settings, "at the start", "give all the same", START_SECONDS)
        self._catch_up()
        if opt.private is not None:
            opt.private.join(self._first_draws)
        if self.size == 1:
            return
        whole = isinstance(opt.model, nn.Module)
        found = fingerprint(opt.model) if whole else self._fingerprint()  # type: ignore[arg-type]
        hint = "load the same base model in all, and resume logs of the same run"
        name = "the fingerprint of the model"
        self._compare({name: found[:16]}, "at the start", hint, START_SECONDS)

    # -- stepping ---------------------------------------------------------------------------------------------

    def rows(self, of: int) -> range:
        """Which rows of a step's batch of `of` rows this worker looks with."""
        teams = self.size // self._populations
        team, blocks = self.rank % teams, -(-of // self._rows_at_once)
        first, last = (blocks * k // teams * self._rows_at_once for k in (team, team + 1))
        return range(min(first, of), min(last, of))

    def step(
        self, loss_fn: Callable[..., Any], batch: Any = None, *, of: int | None = None
    ) -> float:
        """Look with this worker's part of the rows, exchange what was seen, move.

        Args:
            loss_fn: `loss_fn(batch)`, one loss a row; in weight space one number is taken for each of its rows. Without
                `batch`, a function of nothing, for the rows `rows(of)`, all at once.
            batch: the whole step's, the same in every worker: tensors nested in dicts, lists, tuples, rows first. With `of`
                only this worker's part of it, `rows(of)`.
            of: how many rows the step's batch has.

        Returns:
            The mean loss of all looks; NaN with `private`.

        Raises:
            NonFiniteLoss: in all workers, if it was in one. The weights are as before.
            UserError: a worker is gone, silent, has failed or differs, naming it; or as `MeZO.look`.
        """
        least = int(self.opt.private is None)  # a private sample may be empty
        if of is not None and (not isinstance(of, int) or of < least):
            raise UserError(
                f"of is {of!r}: it must be a whole number from {least}, the rows of the batch"
            )
        with Shield() as shield:
            step = self._together(partial(shield.call, loss_fn), batch, of)
            self.opt.apply(step)
            self._chain = zlib.crc32(
                repr((step.coefficients, step.rule_state)).encode(), self._chain
            )
            if self._check_every and self.opt.steps % self._check_every == 0:
                self.check()
        return step.loss

    def _together(self, loss_fn: Callable[..., Any], batch: Any, of: int | None) -> Step:
        """The step that all sights come to."""
        when = f"in step {self.opt.steps}"
        samples = sample_count(self.opt.samples, self.opt.steps)
        chain = f"{self._chain:08x}"
        intent: dict[str, Any] = {
            "the steps so far": chain,
            "num_samples": samples,
            **self._rates(),
        }
        failure: BaseException | None = None
        try:
            digest: list[int] = []
            drawn = None if self.opt.private is None else self.opt.private.waiting()
            if of is None and drawn == 0:
                of = 0  # what the batch is then made of is nobody's business
            elif of is None:
                _, of = change_rows(batch, partial(_digest, digest))
                mine = self.rows(of)
                batch, _ = change_rows(batch, lambda x: x[mine.start : mine.stop])
            if drawn is not None and of != drawn:
                raise UserError(
                    f"private: the batch has {of} rows, and {drawn} were drawn: step with all of them and no others"
                )
            intent |= {
                "rows of the batch": of,
                "the batch": f"{zlib.crc32(repr(digest).encode()):08x}",
            }
            sight = self._look(loss_fn, batch, of)
            kind, body = (_IDLE, b"") if sight is None else (_SIGHT, sight.pack())
        except NonFiniteLoss as error:
            failure, kind, body = error, _NONFINITE, _LOSS.pack(error.loss) + error.where.encode()
        except BaseException as error:
            failure, body = error, f"{type(error).__name__}: {error}".encode()
            kind = _INTERRUPT if isinstance(error, KeyboardInterrupt) else _ERROR
        head = _HEAD.pack(zlib.crc32(json.dumps(intent).encode()), kind)
        messages = self._swap(head + body, when)
        if failure is not None:
            raise failure
        assert of is not None
        return self.opt.combine(self._read(messages, intent, when), of=of)

    def _look(self, loss_fn: Callable[..., Any], batch: Any, of: int) -> Sight | None:
        """This worker's part, or None where it has none."""
        mine, opt = self.rows(of), self.opt
        team = self.rank // (self.size // self._populations)
        samples = range(team, sample_count(opt.samples, opt.steps), self._populations)
        if not mine or not samples:
            return None
        if batch is None:
            return opt.look(loss_fn, rows=mine, of=of, samples=samples)
        _, have = change_rows(batch, lambda x: x)
        if have != len(mine):
            raise UserError(
                f"the batch has {have} rows, and worker {self.rank} has rows {mine.start} to {mine.stop - 1} of {of}: give it "
                f"those ({len(mine)}), or all of them without of="
            )
        size = self._rows_at_once
        cuts = [range(a, min(a + size, have)) for a in range(0, have, size)]
        parts = [change_rows(batch, lambda x, cut=cut: x[cut.start : cut.stop])[0] for cut in cuts]  # type: ignore[misc]
        if opt.estimator == "weight":

            def losses(parts: Sequence[Any]) -> Tensor:
                found = [
                    row_losses(loss_fn(part), len(cut))
                    for part, cut in zip(parts, cuts, strict=True)
                ]
                return torch.tensor([loss for part in found for loss in part], dtype=torch.float64)

            return opt.look(losses, parts, rows=mine, of=of, samples=samples)
        places = [range(mine.start + cut.start, mine.start + cut.stop) for cut in cuts]
        return merged(
            [
                opt.look(loss_fn, part, rows=rows, of=of, samples=[sample])
                for part, rows in zip(parts, places, strict=True)
                for sample in samples
            ]
        )

    def _read(self, messages: Sequence[bytes], intent: dict[str, Any], when: str) -> list[Sight]:
        """The sights in the messages, if all of them are sights of the same step."""
        sights: list[Sight] = []
        heads = [_HEAD.unpack_from(message) for message in messages]
        bodies = [message[_HEAD.size :] for message in messages]
        if any(kind == _INTERRUPT for _, kind in heads):
            raise KeyboardInterrupt
        for rank, ((_, kind), body) in enumerate(zip(heads, bodies, strict=True)):
            if kind == _ERROR:
                raise UserError(f"worker {rank} failed {when}: {body.decode(errors='replace')}")
        for (_, kind), body in zip(heads, bodies, strict=True):
            if kind == _NONFINITE:
                where = body[_LOSS.size :].decode()
                raise NonFiniteLoss(self.opt.steps, _LOSS.unpack_from(body)[0], where)
            if kind == _SIGHT:
                # private rows count as nothing there, and stop nobody
                sights.append(Sight.unpack(body, finite=self.opt.private is None))
        if len({intended for intended, _ in heads}) > 1:
            self._compare(intent, when, "give all the same; " + _AGAIN, self._timeout)
        return sights

    # -- comparing --------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Compare the weights that are tuned, by their hash; every worker calls this, or none.

        Raises:
            UserError: they differ, naming the workers.
        """
        name = "the fingerprint of what is tuned"
        when = f"after {self.opt.steps} steps"
        self._compare({name: self._fingerprint()[:16]}, when, _AGAIN, self._timeout)

    def agree(self, value: Any) -> Any:
        """What worker 0 gives, in all of them: for what clocks or unlike machines decide. Anything that JSON knows."""
        return self._peers.decide(value, self._timeout, f"after {self.opt.steps} steps: {_AGAIN}")

    def _first_draws(self, draw: Callable[[], Any]) -> Any:
        """What worker 0 draws, in all of them."""
        return self.agree(draw() if self.rank == 0 else None)

    def close(self) -> None:
        """Close the log, and leave the group if it was joined here."""
        self.opt.close()
        self._peers.close()

    def _swap(self, raw: bytes, when: str) -> list[bytes]:
        before = f"{when}; the {self.opt.steps} steps before it are in the log: {_AGAIN}"
        return self._peers.swap(raw, self._timeout, before)

    def _rates(self) -> dict[str, Any]:
        """What a step is made with, by group."""
        keys = ("lr", "eps", "weight_decay")
        return {key: [float(group[key]) for group in self.opt.param_groups] for key in keys}

    def _fingerprint(self) -> str:
        weights = self.opt.weights
        weights.settle()
        return fingerprint_of(zip(weights.names, weights.tensors, strict=True))

    def _compare(self, what: dict[str, Any], when: str, hint: str, seconds: float) -> None:
        """Refuse to go on where the workers say different things, by name.

        Raises:
            UserError: naming the first thing that differs, what it is, and in which workers.
        """
        said = self._peers.ask(what, seconds, when)
        for key in dict.fromkeys(key for each in said for key in each):
            by_value: dict[str, list[int]] = {}
            for rank, each in enumerate(said):
                by_value.setdefault(repr(each.get(key)), []).append(rank)
            if len(by_value) > 1:
                found = ", ".join(f"{value} in {spell(ranks)}" for value, ranks in by_value.items())
                raise UserError(f"workers differ {when}: {key} is {found}: {hint}")

    def _catch_up(self) -> None:
        """Take the steps that the furthest worker has in its log and this one has not."""
        opt, when = self.opt, "at the start"
        said = self._peers.ask([opt.steps, _identity(opt.log)], START_SECONDS, when)
        logs = [log for _, log in said if log]
        for log in logs:
            if logs.count(log) > 1:
                both = [rank for rank, (_, other) in enumerate(said) if other == log]
                raise UserError(
                    f"{spell(both)} write the same log: one worker a machine is enough: log=None in all but that of LOCAL_RANK 0"
                )
        most = max(steps for steps, _ in said)
        if all(steps == most for steps, _ in said):
            return
        ahead = [rank for rank, (steps, log) in enumerate(said) if steps == most and log]
        if not ahead:
            counts = ", ".join(str(steps) for steps, _ in said)
            raise UserError(
                f"the workers have taken {counts} steps, and none of those ahead writes a log, by which the others could follow: "
                "resume a log in one of them"
            )
        mine = Path(opt.log).read_bytes() if self.rank == ahead[0] and opt.log is not None else b""
        raw = self._peers.tell(mine, ahead[0], START_SECONDS, when)
        if opt.steps == most:
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "ahead.jfl"
            path.write_bytes(raw)
            steps = read_log(path).steps[:most]
        if opt.log is not None and read_log(opt.log).steps != steps[: opt.steps]:
            raise UserError(
                f"{opt.log}: its {opt.steps} steps are not those that worker {ahead[0]} has taken first, of {most}: it is the log of "
                "another run: give each worker its own, or a new one to those that have lost it"
            )
        opt.follow(steps[opt.steps :])


def _layout(opt: MeZO) -> str:
    """Parameters in a few words, and a hash of names, shapes and groups."""
    weights = opt.weights
    what = [
        (name, tuple(tensor.shape), group)
        for name, tensor, group in zip(weights.names, weights.tensors, weights.groups, strict=True)
    ]
    count = sum(tensor.numel() for tensor in weights.tensors)
    return f"{len(what)} parameters of {count} numbers ({zlib.crc32(repr(what).encode()):08x})"


def _identity(log: str | os.PathLike[str] | None) -> str:
    """Of a file, wherever it is seen from."""
    if log is None:
        return ""
    found = os.stat(log)
    return f"{socket.gethostname()} {found.st_dev} {found.st_ino}"


def _digest(into: list[int], tensor: Tensor) -> Tensor:
    """Remember a checksum of a tensor."""
    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    into.append(zlib.crc32(raw))
    return tensor
