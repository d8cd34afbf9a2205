"""`LoopMeZO`: its log under a name, taken from a checkpoint, kept where another is in the way."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

import justforward as jf
from conftest import make_model
from justforward.errors import UserError
from justforward.loop import LOG, LoopMeZO, put_log, set_aside, what_lacks


def make(folder: Path, **settings: object) -> LoopMeZO:
    torch.manual_seed(0)
    return LoopMeZO(nn.Linear(4, 3), folder, lr=1e-3, **settings)  # type: ignore[arg-type]


def square(opt: LoopMeZO) -> float:
    assert opt.model is not None
    return float(opt.model.weight.square().sum())  # type: ignore[union-attr,operator]


def test_the_loops_own_call_moves_nothing(tmp_path: Path) -> None:
    opt = make(tmp_path / "new")
    assert math.isnan(opt.step())
    opt.open_log(tmp_path / "new" / LOG)
    loss = opt.step(lambda: square(opt))
    before = jf.fingerprint(opt.model)  # type: ignore[arg-type]
    assert opt.step() == loss
    assert jf.fingerprint(opt.model) == before  # type: ignore[arg-type]
    assert opt.last is not None
    assert opt.last.loss == loss
    opt.close_log()
    assert [path.name for path in (tmp_path / "new").iterdir()] == [LOG]
    log = jf.read_log(tmp_path / "new" / LOG)
    assert log.sealed
    assert len(log.steps) == 1


def test_a_log_goes_on_after_it_was_closed(tmp_path: Path) -> None:
    opt = make(tmp_path)
    for _ in range(3):
        opt.open_log(tmp_path / LOG)
        opt.step(lambda: square(opt))
        opt.close_log()
        opt.close_log()
    assert len(jf.read_log(tmp_path / LOG).steps) == 3


def test_one_that_was_closed_before_it_had_a_name(tmp_path: Path) -> None:
    opt = make(tmp_path)
    opt.close_log()
    opt.open_log(tmp_path / LOG)
    opt.step(lambda: square(opt))
    opt.close_log()
    assert len(jf.read_log(tmp_path / LOG).steps) == 1


def test_logs_in_the_way_get_numbers(tmp_path: Path) -> None:
    for _ in range(3):
        opt = make(tmp_path)
        opt.open_log(tmp_path / LOG)
        opt.close_log()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "trajectory-1.jfl",
        "trajectory-2.jfl",
        "trajectory.jfl",
    ]
    set_aside(tmp_path / "nothing.jfl")


def test_a_copy_takes_the_place_of_a_log_that_goes_on_from_it_only(tmp_path: Path) -> None:
    opt = make(tmp_path)
    opt.open_log(tmp_path / LOG)
    opt.step(lambda: square(opt))
    saved = tmp_path / "saved.jfl"
    saved.write_bytes((tmp_path / LOG).read_bytes())
    opt.step(lambda: square(opt))
    opt.close_log()
    put_log(jf.read_log(saved), tmp_path / LOG)
    assert (tmp_path / LOG).read_bytes() == saved.read_bytes()
    assert not (tmp_path / "trajectory-1.jfl").exists()

    other = make(tmp_path / "other", seed=1)
    other.close_log()
    (tmp_path / "other" / f".{LOG}.new").rename(tmp_path / LOG)
    put_log(jf.read_log(saved), tmp_path / LOG)
    assert jf.read_log(tmp_path / "trajectory-1.jfl").header["seed"] == 1


def test_a_checkpoint_whose_parts_do_not_fit(tmp_path: Path) -> None:
    opt = make(tmp_path)
    opt.open_log(tmp_path / LOG)
    opt.step(lambda: square(opt))
    saved = tmp_path / "saved.jfl"
    saved.write_bytes((tmp_path / LOG).read_bytes())
    opt.step(lambda: square(opt))
    with pytest.raises(UserError, match="has 1 steps, the state beside it 2"):
        opt.take_log(tmp_path / LOG, saved)
    opt.close_log()
    assert len(jf.read_log(tmp_path / LOG).steps) == 2


def test_what_a_checkpoint_lacks(tmp_path: Path) -> None:
    assert what_lacks(tmp_path) == "it has no trajectory.jfl"
    (tmp_path / LOG).touch()
    assert what_lacks(tmp_path) == "it has no optimizer.pt (save_only_model)"
    (tmp_path / "optimizer.pt").touch()
    assert what_lacks(tmp_path) == "it has no trainer_state.json"
    (tmp_path / "trainer_state.json").write_text("{")
    assert what_lacks(tmp_path) == "its trainer_state.json is cut short"
    (tmp_path / "trainer_state.json").write_text("{}")
    assert what_lacks(tmp_path) == ""


def test_it_is_an_optimizer_for_accelerate(tmp_path: Path) -> None:
    from accelerate import Accelerator

    opt = make(tmp_path)
    accelerator = Accelerator(cpu=True)
    assert accelerator.prepare(opt) is opt
    assert accelerator.optimizer_step_was_skipped is False
    opt.step_was_skipped = True
    assert accelerator.optimizer_step_was_skipped is True
    opt.close_log()


def test_a_whole_model(tmp_path: Path) -> None:
    base, model = make_model("gpt2"), make_model("gpt2")
    opt = LoopMeZO(model, tmp_path, lr=1e-3, rule="rms")
    opt.open_log(tmp_path / LOG)
    ids = torch.arange(5, 15)[None]
    opt.step(lambda: model(input_ids=ids, labels=ids).loss)
    opt.close_log()
    assert jf.replay(base, tmp_path / LOG) == 1
    assert jf.fingerprint(base) == jf.fingerprint(model)


def test_one_that_does_not_write_leaves_the_folder_alone(tmp_path: Path) -> None:
    """Of several processes one writes; the others must end where its log does."""
    writer = make(tmp_path / "out")
    writer.open_log(tmp_path / "out" / LOG)
    other = make(tmp_path / "other", writes=False)
    other.open_log(tmp_path / "other" / LOG)
    for opt in (writer, other):
        opt.step(lambda opt=opt: square(opt))
        opt.close_log()
    assert jf.fingerprint(other.model) == jf.fingerprint(writer.model)  # type: ignore[arg-type]
    assert not (tmp_path / "other").exists()
    saved = tmp_path / "out" / LOG
    other.take_log(tmp_path / "other" / LOG, saved)
    late = make(tmp_path / "other", writes=False)
    with pytest.raises(UserError, match="has 1 steps, the state beside it 0"):
        late.take_log(tmp_path / "other" / LOG, saved)
    assert not (tmp_path / "other").exists()
