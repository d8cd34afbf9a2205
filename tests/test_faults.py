"""The fault suite: whatever happens to a run or a loop, it comes to the bits that it would have come to, or says what to do.

What is tried is counted in `reliability`, whose table is docs/reliability.md. By default a few trials of each fault;
`make faults` has all of them. Faults of parsers are in test_fuzz.py.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import justforward as jf
import reliability
from conftest import make_model, make_tokenizer, small_run
from justforward.config import TrainConfig
from justforward.errors import NonFiniteLoss, UserError
from justforward.folder import RunFolder
from justforward.kept import STALE_SECONDS, whole_folder
from justforward.playback import check_base
from justforward.trajectory import Writer, read_log
from killing import KILLED, NOTHING, Ended, Fault, Zygote, zygote
from reliability import trial

SLOW = pytest.mark.slow


def few_or_all(few: Any, *every: Any) -> Any:
    """Parametrised by how much is tried: by default, and by `make faults`, which shares it out."""
    return pytest.mark.parametrize(
        "much", [few, *(pytest.param(some, marks=SLOW) for some in every)]
    )


# Each operation of a run: by default one of some, else all of them.
OPERATIONS = few_or_all((23, 7), *((6, first) for first in range(6)))


# ------------------------------------------------------------------------------------ runs of the command


def begun(folder: RunFolder) -> bool:
    """Whether a run has come so far that it can be resumed."""
    files = ("config.yaml", "environment.json", "trajectory.jfl")
    return all((folder.path / name).exists() for name in files)


@dataclass
class Bench:
    """A run that nothing is done to, and a process to run others like it in."""

    config: TrainConfig
    zygote: Zygote
    fingerprint: str
    seconds: float
    made: int = 0

    def new(self, **values: Any) -> TrainConfig:
        """The same run elsewhere."""
        self.made += 1
        return replace(
            self.config, out=str(Path(self.config.out).with_name(f"run{self.made}-")), **values
        )

    def resumed(self, cut: TrainConfig, fault: Fault = NOTHING) -> Ended:
        return self.zygote.run(replace(cut, resume=True), fault)

    def check(self, cut: TrainConfig, ended: Ended, count: reliability.Count) -> None:
        """A run that something was done to goes on to the reference's bits, with every step that was in its log."""
        assert "Traceback" not in ended.said, ended.said
        folder = RunFolder(cut.out)
        if not begun(folder):
            # before the first step: there is nothing to lose
            again = self.resumed(cut)
            assert again.status == 2
            assert "run folder" in again.said
            shutil.rmtree(folder.path, ignore_errors=True)
            assert self.zygote.run(cut).status == 0
        else:
            before = read_log(folder.log).steps
            again = self.resumed(cut)
            assert again.status == 0, again.said
            taken_again = again.said.count("it is taken again")
            count.again = max(count.again, taken_again)
            after = read_log(folder.log).steps
            first = len(before) - taken_again
            assert [s.coefficients for s in after[:first]] == [
                s.coefficients for s in before[:first]
            ]
        result = folder.read_result()
        assert result is not None
        assert result["fingerprint"] == self.fingerprint
        assert not list(folder.path.glob(".*.tmp")) + list(folder.path.glob("snapshots/.*"))
        shutil.rmtree(folder.path)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    place = tmp_path_factory.mktemp("faults")
    make_model("gpt2").save_pretrained(place / "model")
    make_tokenizer("bytelevel").save_pretrained(place / "model")
    rows = [
        f'"film {i} was {"good, great" if i % 2 else "bad, dull"}",{"pos" if i % 2 else "neg"}'
        for i in range(60)
    ]
    (place / "rows.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    config = small_run(
        place / "model",
        place / "rows.csv",
        place / "reference",
        estimator="weight",
        rule="rms+momentum(window=3)",
        max_forwards=12,
        test_size=4,
        validation_size=4,
        batch_size=2,
        keep="last",
        snapshot_every=3,
        sync="step",
    )
    with zygote(place) as made:
        assert made.run(config, None).status == 0
        result = RunFolder(config.out).read_result()
        assert result is not None
        timed = made.run(replace(config, out=str(place / "timed")))
        assert timed.status == 0
        yield Bench(config, made, result["fingerprint"], timed.seconds)


@few_or_all((2, 0), *((10, seed) for seed in range(1, 6)))
def test_killed_at_a_random_instant(bench: Bench, much: tuple[int, int]) -> None:
    dealt, killed = random.Random(much[1]), 0
    while killed < much[0]:
        cut = bench.new()
        ended = bench.zygote.run(
            cut, Fault("signal", signal.SIGKILL, after=dealt.uniform(0.0, bench.seconds))
        )
        if ended.status != KILLED:  # it was faster
            shutil.rmtree(cut.out)
            continue
        killed += 1
        with trial("kill -9 at a random instant") as count:
            if killed % 3 == 0 and Path(cut.out).exists():
                bench.resumed(
                    cut, Fault("signal", signal.SIGKILL, after=dealt.uniform(0.0, bench.seconds))
                )
            bench.check(cut, ended, count)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@few_or_all(1, 10)
def test_stopped_at_a_random_instant(bench: Bench, much: int, number: signal.Signals) -> None:
    dealt, stopped = random.Random(much), 0
    while stopped < much:
        cut = bench.new()
        ended = bench.zygote.run(
            cut, Fault("signal", number, after=dealt.uniform(0.0, bench.seconds))
        )
        if ended.status in (
            0,
            -number,
        ):  # it was faster, or the signal was there before Python's handlers
            shutil.rmtree(cut.out, ignore_errors=True)
            continue
        stopped += 1
        with trial(f"{number.name} at a random instant") as count:
            assert ended.status == 130, ended.said
            assert "stopped" in ended.said
            bench.check(cut, ended, count)


@OPERATIONS
def test_killed_before_each_operation(bench: Bench, much: tuple[int, int]) -> None:
    listed = bench.zygote.run(bench.new(), Fault("list")).operations
    assert len(listed) > 40
    for number in range(1 + much[1], len(listed) + 1, much[0]):
        inside = "/snapshots" in listed[number - 1][1]
        cut = bench.new()
        with trial(
            "kill -9 at each file boundary of a snapshot" if inside
            else "kill -9 before each operation on the run's files"
        ) as count:  # fmt: skip
            ended = bench.zygote.run(cut, Fault("kill", number))
            assert ended.status == KILLED
            bench.check(cut, ended, count)


@OPERATIONS
@pytest.mark.parametrize("kind", ["fail", "stay"])
def test_a_disk_that_fails_at_each_operation(
    bench: Bench, much: tuple[int, int], kind: str
) -> None:
    """ENOSPC comes once, EROFS stays."""
    name = "disk full at each operation" if kind == "fail" else "read-only from each operation on"
    number, code = 1 + much[1], errno.ENOSPC if kind == "fail" else errno.EROFS
    while True:
        cut = bench.new()
        ended = bench.zygote.run(cut, Fault(kind, number, code))
        untouched = (
            ended.status == 0
            and "note: no snapshot" not in ended.said
            and os.strerror(code) not in ended.said
        )
        if untouched and number > 30:  # all operations are behind it
            shutil.rmtree(cut.out)
            return
        with trial(name) as count:
            assert ended.status in (0, 2), ended.said
            if ended.status == 2:
                last = ended.said.strip().splitlines()[-1]
                assert last.startswith("error: "), ended.said
                assert os.strerror(code) in last
            bench.check(cut, ended, count)
        number += much[0]


@few_or_all([1500], [0, 1, 10, 100, 500, 900, *range(1000, 3000, 150)])
def test_a_disk_that_is_full_at_a_byte(bench: Bench, much: list[int]) -> None:
    for limit in much:
        cut = bench.new()
        with trial("disk full at a byte") as count:
            ended = bench.zygote.run(cut, Fault("limit", limit))
            assert ended.status in (0, 2), ended.said
            bench.check(cut, ended, count)


def test_a_bit_flipped_in_a_snapshot(bench: Bench) -> None:
    cut = bench.new()
    assert bench.zygote.run(cut).status == 0
    folder = RunFolder(cut.out)
    kept = folder.path.with_name("kept")
    folder.path.rename(kept)
    newest = sorted((kept / "snapshots").iterdir())[-1]
    dealt = random.Random(3)
    for file in sorted(newest.iterdir()):
        for _ in range(3):
            with trial("a bit flipped in a snapshot") as count:
                shutil.copytree(kept, folder.path)
                (folder.path / "result.json").unlink()
                spoilt = folder.path / "snapshots" / newest.name / file.name
                raw = bytearray(spoilt.read_bytes())
                at = dealt.randrange(len(raw))
                raw[at] ^= 1 << dealt.randrange(8)
                spoilt.write_bytes(bytes(raw))
                again = bench.resumed(cut)
                harmless = file.name == "manifest.json"  # a space is none the worse for it
                assert harmless or f"{newest.name}: {file.name}" in again.said
                bench.check(cut, again, count)
    shutil.rmtree(kept)


def test_memory_runs_out_in_train_and_a_loss_that_is_none(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process: the loss of one call fails."""
    import io

    from justforward.evaluate import Scorer
    from justforward.progress import Progress
    from justforward.run import train

    losses = Scorer.losses
    for name, act in (
        ("memory runs out in the closure", MemoryError()),
        ("memory runs out in the closure", torch.OutOfMemoryError("CUDA out of memory")),
        ("NaN in a step of `train`", None),
    ):
        for call in (0, 5):
            cut = bench.new(backoff=False)
            calls = []

            def counted(
                self: Any, batch: Any, act: Any = act, call: int = call, calls: list[int] = calls
            ) -> Any:
                calls.append(1)
                if len(calls) == call + 1:
                    if act is not None:
                        raise act
                    return losses(self, batch) * float("nan")
                return losses(self, batch)

            with trial(name):
                with monkeypatch.context() as patch:
                    patch.setattr(Scorer, "losses", counted)
                    with pytest.raises((UserError, NonFiniteLoss)):
                        train(cut, Progress(io.StringIO()))
                folder = RunFolder(cut.out)
                if not folder.path.exists():  # the first look: as if there had been no run
                    assert call == 0
                    train(cut, Progress(io.StringIO()))
                else:
                    train(replace(cut, resume=True), Progress(io.StringIO()))
                result = folder.read_result()
                assert result is not None
                assert result["fingerprint"] == bench.fingerprint
                shutil.rmtree(folder.path)


def test_moved_and_copied(bench: Bench) -> None:
    for after in (0.5, 0.8):
        cut = bench.new()
        ended = bench.zygote.run(cut, Fault("signal", signal.SIGKILL, after=after * bench.seconds))
        if not (Path(cut.out) / "environment.json").exists():
            ended = bench.zygote.run(bench.new(), Fault("none"))
            cut = replace(cut, out=str(Path(bench.config.out).with_name(f"run{bench.made}-")))
        moved, copied = bench.new(), bench.new()
        shutil.copytree(cut.out, copied.out)
        Path(cut.out).rename(moved.out)
        for other in (moved, copied):
            with trial("run folder moved or copied") as count:
                bench.check(other, ended, count)


@pytest.mark.parametrize("seconds", [3600.0, -3600.0, 31e6, -31e6])
def test_the_clock_is_wrong(bench: Bench, seconds: float) -> None:
    with trial("the clock is wrong") as count:
        cut = bench.new()
        ended = bench.zygote.run(cut, Fault("clock", after=seconds))
        assert ended.status == 0
        folder = RunFolder(cut.out)
        (folder.path / "result.json").unlink()
        for file in folder.path.rglob("*"):
            os.utime(file, (time.time() + seconds,) * 2)
        bench.check(cut, ended, count)


def test_a_clock_set_forward_costs_no_other_process_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.time
    with trial("the clock is wrong"):
        with whole_folder(tmp_path / "model") as ours:
            (ours / "weights").write_bytes(b"half")
            monkeypatch.setattr(time, "time", lambda: real() + 2 * STALE_SECONDS)
            with (
                whole_folder(tmp_path / "model2") as _,
                whole_folder(tmp_path / "model", keep_existing=True),
            ):
                pass
            shutil.rmtree(tmp_path / "model")
            assert (ours / "weights").read_bytes() == b"half"
        assert (tmp_path / "model" / "weights").read_bytes() == b"half"


def test_a_second_train(bench: Bench) -> None:
    cut = bench.new()
    with trial("a second writer") as count:
        ended = bench.zygote.run(cut, Fault("signal", signal.SIGKILL, after=0.7 * bench.seconds))
        first = RunFolder(cut.out)
        if not begun(first):
            shutil.rmtree(first.path, ignore_errors=True)
            ended = bench.zygote.run(cut)
        first.lock()
        second = bench.resumed(cut)
        assert second.status == 2
        assert f"{cut.out}: another train is at work in this folder" in second.said
        first.unlock()
        bench.check(cut, ended, count)


# -------------------------------------------------------------------------------- loops of one's own

X, Y = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 3
ESTIMATORS = pytest.mark.parametrize("estimator", ["weight", "activation"])
STEPS = 6


def make_net(width: int = 5) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 3))


class Loop:
    """Some steps of a small net, in both ways to look; `act(call, losses)` may do something at each call of the loss."""

    def __init__(
        self, log: Path, estimator: str, act: Callable[[int, Any], Any] = lambda call, x: x
    ) -> None:
        self.net, self.act, self.calls = make_net(), act, 0
        self.opt = jf.MeZO(
            self.net, lr=1e-2, estimator=estimator, rule="rms+momentum(window=3)", num_samples=2, log=log, resume=True,
            check_rows=False,
        )  # fmt: skip

    def losses(self, batch: Any) -> Any:
        x, y = batch
        self.calls += 1
        return self.act(
            self.calls - 1, nn.functional.cross_entropy(self.net(x), y, reduction="none")
        )

    def step(self) -> None:
        if self.opt.estimator == "activation":
            self.opt.step(self.losses, (X, Y))
        else:
            self.opt.step(lambda: self.losses((X, Y)).mean())

    def finish(self) -> str:
        while self.opt.steps < STEPS:
            self.step()
        self.opt.close()
        return jf.fingerprint(self.net)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, int]]:
    """Fingerprint and calls of the loss of a loop that nothing is done to."""
    out = {}
    for estimator in ("weight", "activation"):
        loop = Loop(tmp_path_factory.mktemp("loop") / "log", estimator)
        out[estimator] = (loop.finish(), loop.calls)
    return out


Undisturbed = dict[str, tuple[str, int]]


def failing(at: int, raised: BaseException | type[BaseException]) -> Callable[[int, Any], Any]:
    def act(call: int, losses: Any) -> Any:
        if call == at:
            raise raised
        return losses

    return act


@ESTIMATORS
@pytest.mark.parametrize(
    ("name", "raised"),
    [
        ("an exception in the closure", ValueError),
        ("an exception in the closure", KeyboardInterrupt),
        ("an exception in the closure", SystemExit),
        ("memory runs out in the closure", MemoryError),
        ("memory runs out in the closure", torch.OutOfMemoryError),
    ],
)
def test_the_closure_fails(
    undisturbed: Undisturbed, estimator: str, name: str, raised: type[BaseException], tmp_path: Path
) -> None:
    """At each call: the weights are whole, and the same loop goes on, or another one from the log."""
    fingerprint, calls = undisturbed[estimator]
    for at in range(calls):
        with trial(name):
            log = tmp_path / f"{at}.jfl"
            loop = Loop(log, estimator, failing(at, raised))
            with pytest.raises(raised):
                loop.finish()
            assert len(read_log(log).steps) == loop.opt.steps
            base = make_net()
            jf.replay(base, log)
            assert jf.fingerprint(base) == jf.fingerprint(loop.net)
            if at % 2:
                loop.opt.close()
                loop = Loop(log, estimator)
            assert loop.finish() == fingerprint


@ESTIMATORS
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_none(
    undisturbed: Undisturbed, estimator: str, bad: float, tmp_path: Path
) -> None:
    fingerprint, calls = undisturbed[estimator]
    rows = 4 * len(X)  # two signs of two samples: in activation space in one call
    places = (
        [(at, None) for at in range(calls)]
        if estimator == "weight"
        else [(2, row) for row in range(rows)]
    )
    places += [] if estimator == "weight" else [(at, slice(0, rows // 2)) for at in range(calls)]
    for number, (at, row) in enumerate(places):

        def act(call: int, losses: Any, at: int = at, row: Any = row) -> Any:
            if call == at:
                losses = losses.clone()
                losses[slice(None) if row is None else row] = bad
            return losses

        with trial("NaN in one row" if isinstance(row, int) else "NaN on one sign"):
            log = tmp_path / f"{number}.jfl"
            loop = Loop(log, estimator, act)
            with pytest.raises(NonFiniteLoss, match="the weights are as before the step"):
                loop.finish()
            base = make_net()
            jf.replay(base, log)
            assert jf.fingerprint(base) == jf.fingerprint(loop.net)
            assert loop.finish() == fingerprint


@ESTIMATORS
def test_a_log_cut_at_each_byte_of_its_last_records(
    undisturbed: Undisturbed, estimator: str, tmp_path: Path
) -> None:
    log = tmp_path / "whole.jfl"
    loop = Loop(log, estimator)
    sizes = []
    while loop.opt.steps < STEPS:
        sizes.append(log.stat().st_size)
        loop.step()
    sizes.append(log.stat().st_size)
    fingerprint = loop.finish()
    assert fingerprint == undisturbed[estimator][0]
    raw = log.read_bytes()
    for size in range(sizes[-3], len(raw)):
        with trial("log cut at each byte of its last records"):
            cut = tmp_path / "cut.jfl"
            cut.write_bytes(raw[:size])
            again = Loop(cut, estimator)
            assert again.opt.steps == sum(s <= size for s in sizes[1:])
            assert again.finish() == fingerprint


@few_or_all(11, 1)
def test_a_bit_flipped_in_a_log(undisturbed: Undisturbed, much: int, tmp_path: Path) -> None:
    log = tmp_path / "log"
    fingerprint = Loop(log, "weight").finish()
    raw = log.read_bytes()
    net = make_net()
    before = jf.fingerprint(net)
    for bit in range(0, 8 * len(raw), much):
        with trial("a bit flipped in the log"):
            spoilt = bytearray(raw)
            spoilt[bit // 8] ^= 1 << bit % 8
            log.write_bytes(bytes(spoilt))
            with pytest.raises(UserError, match="log"):
                jf.replay(net, log)
            assert jf.fingerprint(net) == before
            assert log.read_bytes() == bytes(spoilt)
    log.write_bytes(raw)
    jf.replay(net, log)
    assert jf.fingerprint(net) == fingerprint == undisturbed["weight"][0]


def _nudged() -> nn.Module:
    net = make_net()
    with torch.no_grad():
        net[2].weight.view(torch.int32)[1, 2] ^= 1  # type: ignore[union-attr, operator]
    return net


def _frozen_beside() -> nn.Module:
    net = make_net()
    net.register_buffer("scale", torch.ones(2))
    return net


class Adapted(nn.Module):
    """A base with something beside each of its maps, as an adapter has it."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.base = make_net()
        self.lora_a = nn.Linear(8, rank, bias=False)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (_nudged, "the values differ: load the very base"),
        (_frozen_beside, "the values differ"),
        (lambda: make_net().to(torch.bfloat16), "has dtype torch.float32 in the log and torch.bfloat16"),
        (lambda: make_net().double(), "has dtype torch.float32 in the log and torch.float64"),
        (lambda: make_net(width=6), r"has shape \[5, 8\] in the log and \[6, 8\]"),
        (lambda: nn.Sequential(*list(make_net())[::-1]), "which this model does not have|has shape"),
        (lambda: Adapted(2), "tunes parameter 0.weight, which this model does not have"),
        (lambda: make_net()[0], "which this model does not have"),
    ],
)  # fmt: skip
def test_a_wrong_base(model: Callable[[], Any], said: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    Loop(log, "weight").finish()
    with trial("wrong base, dtype, adapter or order at replay"):
        wrong = model()
        before = {name: p.clone() for name, p in wrong.named_parameters()}
        raw = log.read_bytes()
        with pytest.raises(UserError, match=said):
            jf.replay(wrong, log)
        with pytest.raises(UserError, match=said):
            check_base(wrong, read_log(log))
        assert all(torch.equal(p, before[name]) for name, p in wrong.named_parameters())
        assert log.read_bytes() == raw


def test_records_in_another_order(tmp_path: Path) -> None:
    log = tmp_path / "log"
    loop = Loop(log, "weight")
    sizes = [log.stat().st_size]
    while loop.opt.steps < STEPS:
        loop.step()
        sizes.append(log.stat().st_size)
    loop.opt.close()
    raw = log.read_bytes()
    parts = [raw[a:b] for a, b in pairwise(sizes)]
    for first in range(len(parts) - 1):
        with trial("wrong base, dtype, adapter or order at replay"):
            mixed = list(parts)
            mixed[first], mixed[first + 1] = mixed[first + 1], mixed[first]
            log.write_bytes(raw[: sizes[0]] + b"".join(mixed) + raw[sizes[-1] :])
            net = make_net()
            with pytest.raises(UserError, match="damaged"):
                jf.replay(net, log)
            assert jf.fingerprint(net) == jf.fingerprint(make_net())


@ESTIMATORS
def test_a_second_optimizer_on_a_log(
    undisturbed: Undisturbed, estimator: str, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    loop = Loop(log, estimator)
    loop.step()
    for second in (lambda: Loop(log, estimator), lambda: Writer.rewind(read_log(log), 0)):
        with trial("a second writer"), pytest.raises(UserError, match="writes to this log"):
            second()
        loop.step()
    assert loop.finish() == undisturbed[estimator][0]
    assert len(read_log(log).steps) == STEPS


# ------------------------------------------------------------------------------------------ the table

PAGE = Path(__file__).parent.parent / "docs" / "reliability.md"


def test_the_table_is_of_this_suite() -> None:
    """docs/reliability.md has each fault, all of them survived and nothing lost: `make faults` writes it."""
    found = reliability.read_table(PAGE.read_text(encoding="utf-8"))
    assert list(found) == [name for rows in reliability.SECTIONS.values() for name in rows]
    for name, (tried, survived, lost, again) in found.items():
        assert tried > 0, name
        assert (survived, lost) == (tried, 0), name
        assert again <= 1, name
    for name in reliability.PARSERS:
        assert found[name][0] >= 200, name
    for name in ("kill -9 at a random instant",):
        assert found[name][0] >= 50, name


def test_a_trial_that_fails_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reliability, "counts", {})
    with trial("a second writer"):
        pass
    with pytest.raises(AssertionError, match="gone"), trial("a second writer"):
        raise AssertionError("gone")
    with pytest.raises(OSError, match="else"), trial("a second writer"):
        raise OSError("else")
    assert reliability.counts["a second writer"] == reliability.Count(3, 1, 1)
    with pytest.raises(KeyError):
        reliability.table({})
    assert json.dumps(reliability.read_table("| a | b | 3 | 1 | 1 | 0 |")) == '{"a": [3, 1, 1, 0]}'
