"""Weights in a file: the bits of weights in memory, whatever is asked for in between."""

from __future__ import annotations

import copy
import errno
import gc
import io
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import justforward as jf
from conftest import make_model
from justforward import UserError, directions, ondisk
from justforward.config import EvalConfig, ReplayConfig, TrainConfig
from justforward.ondisk import keep_on_disk
from justforward.pool import share
from justforward.progress import Progress
from justforward.rebuild import evaluate, rebuild
from justforward.run import train
from justforward.stored import settle
from test_stored import RULES, batch_for, loss_of


def moved(model: Any, folder: Path) -> Any:
    keep_on_disk([p for p in model.parameters() if p.requires_grad], folder)
    return model


def both_after(steps: int, folder: Path) -> tuple[Any, Any, Any]:
    """A model in memory and one in a file, after the same steps; and the batch."""
    base = make_model("llama", vocab_size=300)
    memory, disk = copy.deepcopy(base), moved(copy.deepcopy(base), folder)
    batch = batch_for(base)
    for model in (memory, disk):
        opt = jf.MeZO(model, lr=1e-2, rule="rms", estimator="activation")
        for _ in range(steps):
            opt.step(loss_of(model), batch)
    return memory, disk, batch


def waiting_in(model: Any) -> list[Any]:
    return [p for p in model.parameters() if p._jf_due is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_steps_have_the_bits_of_steps_in_memory(
    rule: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = make_model("llama", vocab_size=300).to(dtype)
    batch = batch_for(base)
    memory, disk = copy.deepcopy(base), moved(copy.deepcopy(base), tmp_path)
    one = jf.MeZO(memory, **RULES[rule], weight_decay=0.01)
    other = jf.MeZO(disk, **RULES[rule], weight_decay=0.01, log=tmp_path / "log")
    for _ in range(4):
        assert one.step(loss_of(memory), batch) == other.step(loss_of(disk), batch)
    other.close()
    for name, tensor in disk.state_dict().items():
        assert torch.equal(tensor, memory.state_dict()[name]), name
    assert jf.fingerprint(disk) == jf.fingerprint(memory)
    again = moved(copy.deepcopy(base), tmp_path)
    jf.replay(again, tmp_path / "log")
    assert jf.fingerprint(again) == jf.fingerprint(memory)
    assert {p.name for p in tmp_path.iterdir()} == {"log"}  # the files have no names


@pytest.mark.skipif(sys.platform != "linux", reason="says nothing to other systems")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_little_memory_changes_no_bit(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors that were used are let go of, steps are taken by the thread that reads ahead."""
    base = make_model("llama", vocab_size=300).to(dtype)
    batch = batch_for(base)
    size = sum(p.numel() * p.element_size() for p in base.parameters())
    forgotten: list[int] = []
    monkeypatch.setattr(ondisk, "free", lambda: size // 2)
    monkeypatch.setattr(os, "posix_fadvise", lambda file, start, *_: forgotten.append(start))
    steps: list[str] = []

    def noted(*given: Any) -> None:
        steps.append(threading.current_thread().name)
        share(*given)

    monkeypatch.setattr(directions, "share", noted)
    memory, disk = copy.deepcopy(base), moved(copy.deepcopy(base), tmp_path)
    tensors = dict.fromkeys(disk.parameters())
    forgotten.clear()
    one = jf.MeZO(memory, lr=1e-2, rule="rms", estimator="activation")
    other = jf.MeZO(disk, lr=1e-2, rule="rms", estimator="activation")
    for _ in range(5):
        assert one.step(loss_of(memory), batch) == other.step(loss_of(disk), batch)
    assert any(name.startswith("justforward-disk-moves") for name in steps)
    assert len(steps) > 3 * len(tensors)  # of the four steps that were needed, most
    assert jf.fingerprint(disk) == jf.fingerprint(memory)
    assert len(steps) == 5 * len(tensors)
    assert 1 < len(set(forgotten)) < len(tensors)  # those at the beginning stay


def test_a_step_that_is_waited_for_is_taken_once(tmp_path: Path) -> None:
    memory, disk, _ = both_after(1, tmp_path)
    waiting = waiting_in(disk)
    assert waiting
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(settle, waiting * 8))
    assert jf.fingerprint(disk) == jf.fingerprint(memory)


def test_passes_may_go_side_by_side(tmp_path: Path) -> None:
    memory, disk, batch = both_after(3, tmp_path)
    found = []
    for model in (memory, disk):
        go = torch.no_grad()(lambda _, model=model: loss_of(model)(batch))
        with ThreadPoolExecutor(4) as threads:
            found.append(list(threads.map(go, range(40))))
    for here, there in zip(*found, strict=True):
        assert torch.equal(here, there)
    assert jf.fingerprint(disk) == jf.fingerprint(memory)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing to fork with")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("waits", [False, True])
def test_a_forked_process_reads_and_takes_no_step(waits: bool, tmp_path: Path) -> None:
    """The weights are shared with it: a step that both take would be taken twice."""
    model = moved(make_model("llama", vocab_size=300), tmp_path)
    batch = batch_for(model)
    opt = jf.MeZO(model, lr=1e-2, rule="rms", estimator="activation")
    for _ in range(2):
        opt.step(loss_of(model), batch)
    if not waits:
        jf.fingerprint(model)
    child = os.fork()
    if not child:
        refused = 0
        for p in model.parameters():
            try:
                p + 0.0
            except UserError as error:
                refused += "belongs to the process that took it" in str(error)
        os._exit(refused)
    for _ in range(600):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert done
    assert (os.waitstatus_to_exitcode(status) > 0) is waits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_waits_until_its_tensor_is_read(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ondisk, "AHEAD", 0)
    model = moved(make_model("llama", vocab_size=300).to(dtype), tmp_path)
    opt = jf.MeZO(model, lr=1e-2, rule="rms", estimator="activation")
    batch = batch_for(model)
    opt.step(loss_of(model), batch)
    waiting = waiting_in(model)
    assert waiting
    first, second, third, fourth = waiting[:4]
    with torch.no_grad():
        seen = [first.detach(), second + 0.0, third.data, copy.deepcopy(fourth)]
    assert [p._jf_due for p in waiting[:4]] == [None] * 4
    assert all(p._jf_due is not None for p in waiting[4:])
    assert torch.equal(seen[3].detach(), fourth.detach())
    with torch.no_grad():
        loss_of(model)(batch)
    assert all(p._jf_due is None for p in waiting)
    opt.step(loss_of(model), batch)
    opt.apply(opt.estimate(loss_of(model), batch))
    opt.state_dict()
    assert all(p._jf_due is None for p in waiting)


def test_two_steps_may_wait_for_one_tensor(tmp_path: Path) -> None:
    """One that a forward does not use."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(3, 1), nn.Linear(40, 40)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x).square().sum(1)

    torch.manual_seed(0)
    base = Model()
    memory, disk = copy.deepcopy(base), moved(copy.deepcopy(base), tmp_path)
    x = torch.ones(2, 3)
    for model in (memory, disk):
        opt = jf.MeZO(model, lr=1e-2, rule="rms", estimator="activation")
        for _ in range(3):
            opt.step(model, x)
    assert torch.equal(disk.idle.weight.detach(), memory.idle.weight.detach())
    assert not torch.equal(disk.idle.weight.detach(), base.idle.weight.detach())


def test_ctrl_c_in_a_forward_leaves_no_step_half_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ondisk, "AHEAD", 0)
    memory, disk, batch = both_after(1, tmp_path)
    waiting = waiting_in(disk)
    written = waiting[3]._jf_disk
    waiting[3]._jf_disk = lambda: (os.kill(os.getpid(), signal.SIGINT), time.sleep(0.01), written())
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        loss_of(disk)(batch)
    assert waiting[3]._jf_due is None
    assert any(p._jf_due is not None for p in waiting)
    assert jf.fingerprint(disk) == jf.fingerprint(memory)


def test_what_is_tied_stays_tied_and_the_file_goes_with_the_model(tmp_path: Path) -> None:
    gc.collect()
    files = len(os.listdir("/proc/self/fd"))
    model = make_model("opt", vocab_size=300)
    size = keep_on_disk(model.parameters(), tmp_path)
    assert size >= sum(p.numel() * 4 for p in model.parameters())
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert len(os.listdir("/proc/self/fd")) > files
    del model
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == files
    assert keep_on_disk([], tmp_path) == 0


def resident(file: Path) -> int:
    """KiB of a file that are in this process's memory."""
    found, here = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            here = line.endswith(str(file))
        elif here and line.startswith("Rss:"):
            found += int(line.split()[1])
    return found


def test_a_checkpoint_that_was_copied_takes_no_more_memory(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    values = {name: torch.randn(512, 512) for name in ("a", "b", "c", "d")}
    save_file(values, file)
    with file.open() as written:  # pages that are not yet written stay
        os.fsync(written.fileno())
    mapped = load_file(file)
    model = nn.ParameterDict(mapped)
    assert all(torch.equal(mapped[name], values[name]) for name in values)
    assert resident(file) >= 4 * 1024
    keep_on_disk([model[name] for name in ("a", "b", "c")], tmp_path)
    assert 1024 <= resident(file) <= 1024 + 16  # d, and pages that two of them share
    assert all(torch.equal(model[name], values[name]) for name in values)
    assert all(torch.equal(mapped[name], values[name]) for name in values)  # read again


def test_a_place_that_cannot_keep_them_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("opt", vocab_size=300)
    before = jf.fingerprint(model)
    with pytest.raises(
        UserError, match=r"--offload is '.*nowhere': .* GB cannot be kept there: No such file"
    ):
        keep_on_disk(model.parameters(), tmp_path / "nowhere")

    with monkeypatch.context() as patch:
        patch.setattr(ondisk, "in_memory", lambda folder: "tmpfs")
        with pytest.raises(UserError, match=r"--offload is '.*on a tmpfs, which is memory itself"):
            keep_on_disk(model.parameters(), tmp_path)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="No space left on device: give a folder"):
        keep_on_disk(model.parameters(), tmp_path)
    assert jf.fingerprint(model) == before
    assert {type(p) for p in model.parameters()} == {nn.Parameter}


# ------------------------------------------------------------------------------------------ commands


@pytest.mark.parametrize(
    ("dtype", "start"), [("float32", "base"), ("bfloat16", "base"), ("float32", "deep")]
)
def test_a_run_on_disk_is_the_run_in_memory(
    dtype: str, start: str, tmp_path: Path, model_folder: Path, sentiment_csv: Path
) -> None:
    config = TrainConfig(model=str(model_folder), data=str(sentiment_csv), template="{text} It was", labels={"neg": "great", "pos": "terrible"},
                         out=str(tmp_path / "memory"), max_forwards=30, eval_every=10, lr=3e-2, threads=1, start=start,  # type: ignore[arg-type]
                         patience=0, dtype=dtype)  # type: ignore[arg-type]  # fmt: skip
    quiet = Progress(io.StringIO())
    with pytest.raises(UserError, match=r"--offload is '.*/none': no such folder: make it"):
        train(replace(config, offload=str(tmp_path / "none")), quiet)
    memory = train(config, quiet)
    config = replace(
        config, out=str(tmp_path / "disk"), offload=str(tmp_path), lr_schedule="linear"
    )
    disk = train(config, quiet)
    assert (disk["fingerprint"], disk["loss"]) == (memory["fingerprint"], memory["loss"])
    parts = replace(config, out=str(tmp_path / "parts"), lr_schedule="constant", keep="last")
    train(replace(parts, max_forwards=16), quiet)
    whole = replace(parts, out=str(tmp_path / "whole"), offload=None)
    resumed = train(replace(parts, resume=True), quiet)  # its file is made anew, from base and log
    assert resumed["fingerprint"] == train(whole, quiet)["fingerprint"]
    out, run = str(tmp_path / "tuned"), config.out
    again = rebuild(ReplayConfig(run, out, offload=str(tmp_path), threads=1), quiet)
    scored = evaluate(EvalConfig(run=run, offload=str(tmp_path), threads=1), quiet)
    assert again["fingerprint"] == scored["fingerprint"] == memory["fingerprint"]
    with pytest.raises(UserError, match=r"--offload is .* mapped from its own files"):
        evaluate(
            EvalConfig(
                model=out,
                data=config.data,
                offload=str(tmp_path),
                template="{text} It was",
                labels=config.labels,
            )
        )
