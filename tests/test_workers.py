"""Steps taken together: the same bits for any number of workers; one that differs, fails, dies or hangs is named.

Every process has the same tiny model; what each returns is compared.
"""

from __future__ import annotations

import math
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import justforward as jf
from justforward.peers import Peers
from justforward.workers import Workers
from processes import together
from reliability import trial

ROWS = 7
VARIANTS: list[dict[str, Any]] = [
    {"rule": "rms", "num_samples": 2},
    {"rule": "adam(window=3)", "num_samples": 2, "looks": "one-sided"},
    {"rule": "sgd+momentum(0.9, window=2)", "estimator": "activation"},
    {"rule": "rms", "estimator": "activation", "num_samples": 3},
]
IDS = ["weight", "one-sided adam", "activation", "activation samples"]


def model(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 300), nn.Tanh(), nn.Linear(300, 3))


def batch(step: int, rows: int = ROWS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(rows, 5, generator=generator)
    return {"x": x, "y": x.argmax(1) % 3}


def losses(net: nn.Module) -> Any:
    return lambda rows: F.cross_entropy(net(rows["x"]), rows["y"], reduction="none")


def run(
    variant: dict[str, Any],
    steps: int = 4,
    log: Path | None = None,
    own: bool = False,
    **arguments: Any,
) -> tuple[str, str, int, bytes]:
    """Fingerprint of model and course after so many steps; the log is worker 0's."""
    net = model()
    rank = dist.get_rank() if dist.is_initialized() else 0
    mine = log if rank == 0 else None
    opt = jf.MeZO(net, lr=1e-2, eps=1e-3, seed=3, log=mine, resume=True, **variant)
    workers = Workers(opt, **arguments)
    for step in range(opt.steps, steps):
        if own:
            part = workers.rows(ROWS)
            rows = {name: x[part.start : part.stop] for name, x in batch(step).items()}
            workers.step(losses(net), rows, of=ROWS)
        else:
            workers.step(losses(net), batch(step))
    workers.close()
    state = opt.state_dict()["justforward"]
    course = str((state["steps"], state["rule_state"], state["scales"], state["past"]))
    return jf.fingerprint(net), course, opt.steps, b"" if mine is None else mine.read_bytes()


def everything(rows_at_once: int) -> list[Any]:
    """All variants, in the group at hand or alone."""
    return [run(variant, rows_at_once=rows_at_once)[:3] for variant in VARIANTS]


@pytest.mark.parametrize("rows_at_once", [1, 2])
def test_two_workers_have_the_bits_of_one(tmp_path: Path, rows_at_once: int) -> None:
    alone = everything(rows_at_once)
    assert len({fingerprint for fingerprint, *_ in alone}) == len(VARIANTS)
    assert together(2, tmp_path, everything, rows_at_once) == [alone, alone]


@pytest.mark.slow
@pytest.mark.parametrize("size", [3, 4, 9])
def test_any_number_of_workers_has_the_bits_of_one(tmp_path: Path, size: int) -> None:
    """Nine are more than there are rows: some have nothing to do."""
    assert together(size, tmp_path, everything, 1) == [everything(1)] * size


@pytest.mark.parametrize("estimator", ["weight", "activation"])
def test_a_part_of_the_batch_is_enough(tmp_path: Path, estimator: str) -> None:
    variant = {"rule": "rms", "estimator": estimator}
    whole = run(variant)[:3]
    assert [found[:3] for found in together(2, tmp_path, run, variant, 4, None, True)] == [
        whole
    ] * 2


def grid() -> list[Any]:
    """Two workers, each looks along one half of the samples with all rows."""
    return [
        run({"rule": "rms", "num_samples": 3, "estimator": estimator}, populations=size)[:3]
        for estimator in ("weight", "activation")
        for size in (dist.get_world_size() if dist.is_initialized() else 1,)
    ]


def test_samples_are_divided_like_rows(tmp_path: Path) -> None:
    assert together(2, tmp_path, grid) == [grid()] * 2


def both() -> tuple[str, list[range], list[range]]:
    variant = {"rule": "rms", "num_samples": 2}
    found = run(variant, populations=2)[0]
    opt = jf.MeZO(model(), **variant)
    workers = Workers(opt, populations=2, rows_at_once=2)
    return found, [workers.rows(rows) for rows in (7, 1)], [Workers(opt).rows(7)]


@pytest.mark.slow
def test_rows_and_samples_are_divided_together(tmp_path: Path) -> None:
    alone = run({"rule": "rms", "num_samples": 2})[0]
    found = together(4, tmp_path, both)
    assert [fingerprint for fingerprint, *_ in found] == [alone] * 4
    team = [[range(4), range(0)], [range(4, 7), range(1)]]
    assert [rows for _, rows, _ in found] == [*team, *team]
    assert [row for *_, rows in found for part in rows for row in part] == list(range(7))


# -------------------------------------------------------------------------------------- catching up


def resumed(folder: Path) -> list[Any]:
    """Three steps, then one more, by a worker 0 that has the log and others that have nothing."""
    first = run({"rule": "rms+momentum"}, 3, folder / "run.jfl")
    second = run({"rule": "rms+momentum"}, 4, folder / "run.jfl")
    return [first[2], *second[:3]]


def test_a_worker_without_a_log_follows_the_one_that_has_it(tmp_path: Path) -> None:
    undisturbed = run({"rule": "rms+momentum"}, 4, tmp_path / "alone.jfl")
    (tmp_path / "two").mkdir()
    assert together(2, tmp_path, resumed, tmp_path / "two") == [[3, *undisturbed[:3]]] * 2
    raw = (tmp_path / "two" / "run.jfl").read_bytes()
    assert (
        jf.read_log(tmp_path / "two" / "run.jfl").steps == jf.read_log(tmp_path / "alone.jfl").steps
    )
    assert len(raw) < 1000
    base = model()
    jf.replay(base, tmp_path / "two" / "run.jfl")
    assert jf.fingerprint(base) == undisturbed[0]


def apart(folder: Path, kept: list[int], other: bool = False) -> tuple[int, str]:
    """Each has a log of its own, of so many steps; worker 1's may be of another run."""
    rank = dist.get_rank()
    log, net = folder / f"{rank}.jfl", model()
    opt = jf.MeZO(net, lr=1e-2, seed=3, log=log)
    for step in range(kept[rank]):
        rows = batch(step + 10 * (other and rank == 1))
        opt.apply(opt.combine([opt.look(losses(net), rows, rows=range(ROWS), of=ROWS)], of=ROWS))
    opt.close()
    workers = Workers(jf.MeZO(net := model(), lr=1e-2, seed=3, log=log, resume=True))
    workers.step(losses(net), batch(9))
    workers.close()
    return len(jf.read_log(log).steps), jf.fingerprint(net)


def test_a_log_that_ends_earlier_is_continued_from_the_other(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    ahead, behind = together(2, tmp_path, apart, tmp_path / "a", [1, 3])
    assert ahead == behind
    assert ahead[0] == 4
    (tmp_path / "b").mkdir()
    _, refused = together(2, tmp_path, apart, tmp_path / "b", [3, 1], True)
    assert refused[0] == "UserError"
    assert (
        "its 1 steps are not those that worker 0 has taken first, of 3: it is the log of another run"
        in refused[1]
    )


# ---------------------------------------------------------------------------------------- differences

Said = tuple[str, str]


def different(what: str) -> Any:
    """Worker 1 differs in one thing; returns steps taken, if it comes so far."""
    odd = dist.get_rank() == 1
    settings: dict[str, Any] = {"seed": 3, "lr": 1e-2, "eps": 1e-3, "rule": "rms"}
    arguments: dict[str, Any] = {"check_every": 2}
    net, rows = model(), batch(0)
    if what in settings and odd:
        settings[what] = {"seed": 4, "lr": 2e-2, "eps": 2e-3, "rule": "sgd"}[what]
    if what == "version" and odd:
        jf.__version__ = "0.0.1"
    if what == "data":
        arguments["data"] = f"sha256 of {dist.get_rank()}"
    if what == "model":
        net = model(int(odd))
    if what == "layout" and odd:
        net = nn.Sequential(nn.Linear(5, 300), nn.Tanh(), nn.Linear(300, 4))
    if what == "batch" and odd:
        rows = batch(1)
    if what == "rows" and odd:
        rows = batch(0, 6)
    if what == "num_samples" and odd:
        settings[what] = 2
    opt = jf.MeZO(net, **settings)
    workers = Workers(opt, **arguments)
    workers.step(losses(net), rows)
    if what == "rate later" and odd:
        opt.param_groups[0]["lr"] = 3e-2
    if what == "bit" and odd:
        with torch.no_grad():
            next(net.parameters()).view(torch.int32)[0, 0] ^= 1
    for step in (1, 2, 3):
        workers.step(losses(net), batch(step))
    return opt.steps


DIFFERENCES = {
    "seed": "at the start: seed is 3 in worker 0, 4 in worker 1: give all the same",
    "lr": r"at the start: lr is \[0.01\] in worker 0, \[0.02\] in worker 1",
    "eps": r"at the start: eps is \[0.001\] in worker 0, \[0.002\] in worker 1",
    "rule": "at the start: rule is 'rms.beta=0.9.' in worker 0, 'sgd' in worker 1",
    "version": "the version of justforward is '0.1.0' in worker 0, '0.0.1' in worker 1",
    "data": "data is 'sha256 of 0' in worker 0, 'sha256 of 1' in worker 1",
    "model": "the fingerprint of the model is '.*: load the same base model in all",
    "layout": r"what is tuned is '4 parameters of 2703 numbers .*' in worker 0, '4 parameters of 3004 numbers",
    "batch": "in step 0: the batch is '.*' in worker 0, '.*' in worker 1",
    "rows": "in step 0: rows of the batch is 7 in worker 0, 6 in worker 1",
    "num_samples": "in step 0: num_samples is 1 in worker 0, 2 in worker 1",
    "rate later": r"in step 1: lr is \[0.01\] in worker 0, \[0.03\] in worker 1",
    "bit": "after 2 steps: the fingerprint of what is tuned is .*: start again and resume the log",
}


def differences() -> dict[str, Said]:
    out = {}
    for what in DIFFERENCES:
        version = jf.__version__
        try:
            out[what] = ("steps", str(different(what)))
        except jf.UserError as error:
            out[what] = (type(error).__name__, str(error))
        jf.__version__ = version
    return out


def test_what_differs_is_named_by_all_before_anything_moves(tmp_path: Path) -> None:
    first, second = together(2, tmp_path, differences)
    assert first == second
    for what, said in DIFFERENCES.items():
        assert first[what][0] == "UserError", what
        assert re.match(f"workers differ .*{said}", first[what][1]), first[what][1]


# ---------------------------------------------------------------------------------------------- faults


def disturbed(folder: Path, how: str) -> list[Any]:
    """Worker 1 does something bad in its look of step 2."""
    rank, net = dist.get_rank(), model()
    log = folder / f"{how}-{rank}.jfl"
    opt = jf.MeZO(net, lr=1e-2, seed=3, log=log, estimator="weight")
    workers = Workers(opt, timeout=3.0)
    plain = losses(net)

    def bad(rows: Any) -> Tensor:
        found: Tensor = plain(rows)
        if rank == 1 and opt.steps == 2:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if how == "error":
                raise RuntimeError("out of memory, say")
            if how == "interrupt":
                raise KeyboardInterrupt
            if how == "nan":
                found[0] = math.nan
        return found

    start = time.monotonic()
    for step in range(2):
        workers.step(bad, batch(step))
    before, start = jf.fingerprint(net), time.monotonic()
    try:
        workers.step(bad, batch(2))
        said = "nothing"
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
    took = time.monotonic() - start
    untouched = before == jf.fingerprint(net)
    return [said, len(jf.read_log(log).steps), untouched, took < 30.0]


@pytest.mark.parametrize(
    ("how", "one", "other"),
    [
        ("nan", "NonFiniteLoss: step 2: the loss is nan at .eps in row 3", None),
        (
            "error",
            "UserError: worker 1 failed in step 2: RuntimeError: out of memory, say",
            "RuntimeError: out of memory, say",
        ),
        ("interrupt", "KeyboardInterrupt: ", None),
        (
            "kill",
            "UserError: worker 1 of 2 ended in step 2; the 2 steps before it are in the log: start again",
            "killed",
        ),
        ("stop", "UserError: worker 1 of 2 said nothing for 3 s in step 2; the 2 steps", "stopped"),
    ],
    ids=["nan", "error", "interrupt", "kill", "stop"],
)
def test_no_worker_takes_a_step_that_one_cannot(
    tmp_path: Path, how: str, one: str, other: str | None
) -> None:
    with trial("one of two processes of torchrun"):
        first, second = together(
            2, tmp_path, disturbed, tmp_path, how, stopped=1 if how == "stop" else None
        )
        assert re.match(one, first[0]), first[0]
        assert first[1:] == [2, True, True]
        if other in ("killed", "stopped"):
            assert second is None
            assert len(jf.read_log(tmp_path / f"{how}-1.jfl").steps) == 2
        else:
            assert re.match(other or one, second[0])
            assert second[1:] == first[1:]


# ------------------------------------------------------------------------------------------ one process


def test_alone_it_needs_no_group() -> None:
    net = model()
    workers = Workers(jf.MeZO(net, lr=1e-2, seed=3))
    assert (workers.rank, workers.size, workers.rows(7)) == (0, 1, range(7))
    assert workers.agree({"a": [1.5]}) == {"a": [1.5]}
    workers.step(losses(net), batch(0))
    workers.step(lambda: losses(net)(batch(1)), of=ROWS)
    workers.step(lambda rows: losses(net)(rows).mean(), batch(2))
    workers.check()
    assert workers.opt.steps == 3


@pytest.mark.parametrize("estimator", ["weight", "activation"])
def test_a_message_has_64_bytes_and_4_a_row_at_most(
    monkeypatch: pytest.MonkeyPatch, estimator: str
) -> None:
    """With the 4 bytes of its length."""
    said: list[int] = []

    def swap(self: Peers, raw: bytes, seconds: float, when: str) -> list[bytes]:
        said.append(len(raw) + 4)
        return [raw]

    monkeypatch.setattr(Peers, "swap", swap)
    workers = Workers(jf.MeZO(net := model(), estimator=estimator), check_every=0)
    said.clear()
    for rows in (1, ROWS, 500):
        workers.step(losses(net), batch(0, rows))
    assert said == [48 + 4 * rows for rows in (1, ROWS, 500)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"rows_at_once": 0}, "rows_at_once is 0: it must be a whole number from 1"),
        ({"check_every": -1}, "check_every is -1: it must be a whole number from 0"),
        ({"populations": 2}, None),
        ({"populations": 1.5}, "populations is 1.5"),
        ({"timeout": 0.0}, "timeout is 0.0: it must be positive"),
        ({"timeout": "5"}, "timeout is '5': it must be positive"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], said: str | None) -> None:
    said = said or "populations is 2, with 1 workers: their number must be a multiple of it"
    with pytest.raises(jf.UserError, match=said):
        Workers(jf.MeZO(model()), **arguments)


def test_batches_that_do_not_fit() -> None:
    net = model()
    workers = Workers(jf.MeZO(net))
    with pytest.raises(
        jf.UserError, match="the batch has 7 rows, and worker 0 has rows 0 to 7 of 8"
    ):
        workers.step(losses(net), batch(0), of=8)
    for of in (0, -1, "4", 2.0):
        with pytest.raises(jf.UserError, match=r"of is .*: it must be a whole number from 1"):
            workers.step(losses(net), batch(0), of=of)  # type: ignore[arg-type]
    with pytest.raises(jf.UserError, match=r"first axes are \[2, 3\]"):
        workers.step(losses(net), [torch.zeros(2), torch.zeros(3)])


def by_itself() -> int:
    opt = jf.MeZO(net := model())
    with pytest.warns(UserWarning, match="torch.distributed has 2 processes"):
        opt.step(losses(net), batch(0))
    return opt.steps


def test_a_step_by_oneself_in_a_group_is_warned_of(tmp_path: Path) -> None:
    assert together(2, tmp_path, by_itself) == [1, 1]


# ---------------------------------------------------------------------- models in parts, on several devices


def test_a_model_that_is_spread_over_devices_has_the_bits_of_a_whole_one(tmp_path: Path) -> None:
    """accelerate's hooks move what goes from part to part; here every part is on the CPU."""
    from accelerate import dispatch_model

    found = []
    for spread in (False, True):
        net = model()
        if spread:
            net = dispatch_model(
                net, {"0": "cpu", "1": "cpu", "2": "cpu"}, main_device="cpu", force_hooks=True
            )
            assert hasattr(net[0], "_hf_hook")
        opt = jf.MeZO(net, lr=1e-2, rule="rms")
        for step in range(3):
            opt.step(losses(net), batch(step))
        found.append(jf.fingerprint(net))
    assert found[0] == found[1] != jf.fingerprint(model())


def test_parts_that_are_offloaded_are_refused_by_name(tmp_path: Path) -> None:
    from accelerate import cpu_offload, disk_offload

    for net in (
        cpu_offload(model(), torch.device("cpu")),
        disk_offload(model(), tmp_path / "parts"),
    ):
        with pytest.raises(jf.UserError, match=r"parameter 0\.weight is on the meta device"):
            jf.MeZO(net)
