"""Snapshots: from one the same bits as from the base; damaged ones are named and not used; a kill leaves whole ones."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import justforward as jf
from justforward import kept, snapshots
from justforward.errors import UserError
from justforward.ondisk import keep_on_disk
from justforward.snapshots import RunOptimizer, Snapshots, replay
from justforward.trajectory import Writer, read_log


def make_net(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 3), nn.LayerNorm(3))
    return net.to(dtype)


X, Y = torch.randn(8, 40, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3


class Run:
    """A net, its log and its snapshots; each `open` is a process that begins anew."""

    def __init__(self, path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        self.path, self.dtype, self.options = path, dtype, options
        self.notes: list[str] = []
        self.snapshots = Snapshots(path / "snapshots", self.notes.append)
        self.log = path / "log"

    def open(self, prepare: Callable[[nn.Module], Any] = lambda net: None) -> RunOptimizer:
        net = make_net(self.dtype)
        prepare(net)
        return RunOptimizer(
            net,
            log=self.log,
            resume=True,
            snapshots=self.snapshots,
            sync=0.0,
            **{"lr": 1e-2, **self.options},
        )

    def folder(self, step: int) -> Path:
        return self.path / "snapshots" / f"step-{step:08d}"


def go(opt: RunOptimizer, steps: int, every: int = 3, keep: int = 9) -> str:
    net = opt.model
    assert net is not None
    for _ in range(steps):
        opt.step(lambda: nn.functional.cross_entropy(net(X), Y))
        if opt.steps % every == 0:
            opt.snapshot(keep)
    opt.close()
    return jf.fingerprint(net)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def count_applied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many steps each rebuilding from the log applies."""
    applied: list[int] = []
    from justforward import optim

    for module in (optim, snapshots):
        real = module.apply_steps  # type: ignore[attr-defined]

        def counted(weights: Any, course: Any, steps: Any, real: Any = real) -> int:
            applied.append(len(steps))
            return int(real(weights, course, steps))

        monkeypatch.setattr(module, "apply_steps", counted)
    return applied


# ------------------------------------------------------------------------------------ the same bits


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rule": "rms+clip(3)+momentum(window=4)"},
        {"rule": "adam(window=5)"},
        {"rule": "adam(window=0)"},
        {"rule": "rmsprop(window=0)", "family": "rank1"},
        {"rule": "momentum(window=50)", "family": "rademacher", "weight_decay": 0.1},
        {"looks": "one-point", "rule": "rms"},
        {"modified": jf.Modified("variance", every=4)},
        {"blocks": jf.Blocks.parse("0\\. .*", "random")},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16, "rule": "adam(window=3)"},
    ],
    ids=str,
)
def test_from_a_snapshot_the_same_bits_as_from_the_base(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = go(Run(_made(tmp_path / "whole"), **options).open(), 11, every=99)
    run = Run(_made(tmp_path / "run"), **options)
    go(run.open(), 7)
    applied = count_applied(monkeypatch)
    assert go(run.open(), 4) == whole
    assert applied == [1]  # step 7 alone is replayed, from the snapshot of step 6
    plain = make_net(run.dtype)
    jf.replay(plain, run.log)
    assert jf.fingerprint(plain) == whole
    for steps, after in ((None, 2), (11, 2), (9, 0), (8, 2), (2, 2), (0, 0)):
        ours, theirs = make_net(run.dtype), make_net(run.dtype)
        assert replay(ours, run.log, steps, run.snapshots) == jf.replay(theirs, run.log, steps)
        assert jf.fingerprint(ours) == jf.fingerprint(theirs)
        assert applied[-1] == after
    assert run.notes == []


def _made(path: Path) -> Path:
    path.mkdir()
    return path


def test_at_the_very_step_of_a_snapshot(run: Run, tmp_path: Path) -> None:
    """No step is left to replay: what the rule goes on with comes from the log."""
    whole = go(Run(_made(tmp_path / "whole"), rule="rms+momentum").open(), 8, every=99)
    run.options = {"rule": "rms+momentum"}
    go(run.open(), 6)
    opt = run.open()
    assert opt.steps == 6
    assert go(opt, 2) == whole


def test_weights_in_a_file(run: Run, tmp_path: Path) -> None:
    """Steps that wait until a tensor is read are in the snapshot."""

    def offload(net: nn.Module) -> int:
        return keep_on_disk(net.parameters(), tmp_path)

    whole = go(Run(_made(tmp_path / "whole")).open(), 8, every=99)
    go(run.open(offload), 6)
    shutil.rmtree(run.folder(3))
    assert go(run.open(offload), 2) == whole
    ours = make_net()
    replay(ours, run.log, 6, run.snapshots)
    assert jf.fingerprint(ours) == jf.fingerprint(_replayed(run, 6))


def _replayed(run: Run, steps: int) -> nn.Module:
    net = make_net(run.dtype)
    jf.replay(net, run.log, steps)
    return net


def test_tensors_are_dealt_to_parts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "PART", 700)
    whole = go(run.open(), 3)
    files = sorted(p.name for p in run.folder(3).iterdir())
    assert files[0] == "manifest.json"
    assert len(files) == 4
    net = make_net()
    replay(net, run.log, None, run.snapshots)
    assert jf.fingerprint(net) == whole


# -------------------------------------------------------------------------------- which of them is used


def test_the_newest_are_kept(run: Run) -> None:
    go(run.open(), 12, every=2, keep=3)
    assert sorted(p.name for p in run.snapshots.path.iterdir()) == [
        "step-00000008", "step-00000010", "step-00000012",
    ]  # fmt: skip


def _spoil(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 8
    file.write_bytes(bytes(raw))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: _spoil(f / "part-00000.safetensors"), "part-00000.safetensors is damaged"),
        (lambda f: (f / "part-00000.safetensors").write_bytes(b""), "part-00000.safetensors is damaged"),
        (lambda f: (f / "part-00000.safetensors").unlink(), "part-00000.safetensors is missing"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing: half a snapshot"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda f: (f / "manifest.json").write_bytes(b"\xff"), "manifest.json is damaged"),
        (lambda f: _edit(f, format=2), "a snapshot of format 2, this version reads 1"),
        (lambda f: _edit(f, step=5), "a snapshot of other steps than the log's"),
        (lambda f: _edit(f, log="0" * 64), "a snapshot of other steps than the log's"),
        (lambda f: _edit(f, files={"../../log": [1, "x"]}), "log is missing"),
        (lambda f: _edit(f, files=3), "manifest.json is damaged"),
    ],
)  # fmt: skip
def test_a_damaged_one_is_named_and_an_older_one_used(
    run: Run, spoil: Callable[[Path], Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = go(run.open(), 7)
    spoil(run.folder(6))
    applied = count_applied(monkeypatch)
    net = make_net()
    replay(net, run.log, None, run.snapshots)
    assert jf.fingerprint(net) == whole
    assert applied == [4]  # from the snapshot of step 3
    assert len(run.notes) == 1
    assert run.notes[0].startswith(f"note: {run.folder(6)}: ")
    assert said in run.notes[0]
    spoil(run.folder(3))
    net = make_net()
    replay(net, run.log, None, run.snapshots)
    assert jf.fingerprint(net) == whole
    assert applied[-1] == 7  # from the base
    assert len(run.notes) == 3


def _edit(folder: Path, **values: Any) -> None:
    file = folder / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_one_of_steps_that_were_taken_back_is_not_used(run: Run) -> None:
    go(run.open(), 7)
    saved = run.path / "saved"
    shutil.copytree(run.folder(6), saved)
    Writer.rewind(read_log(run.log), 4)
    run.snapshots.forget(4)
    assert [p.name for p in run.snapshots.path.iterdir()] == ["step-00000003"]
    run.options = {"lr": 5e-3}  # as after a rewind: other steps follow
    other = go(run.open(), 3, every=99)
    saved.rename(run.folder(6))
    net = make_net()
    replay(net, run.log, None, run.snapshots)
    assert jf.fingerprint(net) == other
    assert "a snapshot of other steps than the log's" in run.notes[0]


def test_one_ahead_of_the_log_is_passed_over(run: Run) -> None:
    go(run.open(), 7)
    Writer.rewind(read_log(run.log), 5)
    net = make_net()
    assert replay(net, run.log, None, run.snapshots) == 5
    assert jf.fingerprint(net) == jf.fingerprint(_replayed(run, 5))


def test_the_base_is_checked_first(run: Run) -> None:
    go(run.open(), 3)
    net = make_net()
    with torch.no_grad():
        net[0].weight[0, 0] += 1.0  # type: ignore[union-attr, index]
    before = deepcopy(net)
    with pytest.raises(UserError, match="load the very base"):
        replay(net, run.log, None, run.snapshots)
    assert jf.fingerprint(net) == jf.fingerprint(before)
    with pytest.raises(UserError, match="has 3 whole steps; 4 were asked for"):
        replay(make_net(), run.log, 4, run.snapshots)


# ------------------------------------------------------------------------------------- bad places


def test_a_full_disk_leaves_those_before(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    opt = run.open()
    assert opt.model is not None
    for _ in range(3):
        opt.step(lambda: opt.model(X).square().mean())  # type: ignore[misc]
    opt.snapshot(2)

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    opt.step(lambda: opt.model(X).square().mean())  # type: ignore[misc]
    with monkeypatch.context() as patched:
        patched.setattr(kept, "sync_file", full)
        with pytest.raises(UserError, match="step-00000004: cannot be written: No space left"):
            opt.snapshot(2)
    assert [p.name for p in run.snapshots.path.iterdir()] == ["step-00000003"]
    opt.snapshot(2)
    assert sorted(p.name for p in run.snapshots.path.iterdir()) == [
        "step-00000003",
        "step-00000004",
    ]
    opt.close()
