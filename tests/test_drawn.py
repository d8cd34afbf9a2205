"""`MeZOTrainer` with privacy: rows drawn and looked at one by one, what is spent, resumed and refused; alone and in two processes."""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import DataCollatorForLanguageModeling, TrainerCallback, default_data_collator

import justforward as jf
from conftest import make_model
from justforward.drawn import _own_luck
from justforward.errors import UserError
from justforward.private import Private
from justforward.trainer import MeZOTrainer
from processes import together
from test_private_workers import known_entropy
from test_trainer import as_torchrun, config, make_trainer, shown, texts

ROWS, SIZE = 10, 4
PRIVATE: dict[str, Any] = {
    "private": True,
    "noise_multiplier": 0.7,
    "clip": 2.0,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "lr_scheduler_type": "constant",
    "max_steps": 6,
}
DELTA = 1e-5


def private_trainer(out: Path, **changes: Any) -> MeZOTrainer:
    return make_trainer(make_model("llama"), out, texts(ROWS), **{**PRIVATE, **changes})


def epsilon(answers: int, noise: float = 0.7) -> float:
    return jf.epsilon_of(noise_multiplier=noise, rate=SIZE / ROWS, answers=answers, delta=DELTA)


def count_draws(patch: pytest.MonkeyPatch) -> list[int]:
    drawn: list[int] = []
    real = Private.draw

    def draw(self: Private) -> list[int]:
        rows = real(self)
        drawn.append(len(rows))
        return rows

    patch.setattr(Private, "draw", draw)
    return drawn


# ------------------------------------------------------------------------------------------ the steps


def test_its_log_is_that_of_the_optimizer_in_a_plain_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same entropy, byte for byte: a step for the rows that are drawn, each with the loss of a batch of its own."""
    known_entropy(monkeypatch)
    trainer = private_trainer(tmp_path / "run")
    trainer.train()

    known_entropy(monkeypatch)
    net, rows = make_model("llama"), texts(ROWS)
    private = Private(rows=ROWS, batch_size=SIZE, noise_multiplier=0.7, clip=2.0)
    log = tmp_path / "plain.jfl"
    opt = jf.MeZO(net, lr=1e-3, seed=42, rule="rms", private=private, log=log)

    def losses(drawn: list[int]) -> Tensor:
        return torch.tensor([float(net(**default_data_collator([rows[r]])).loss) for r in drawn])

    for _ in range(6):
        opt.step(losses, private.draw())
    opt.close()
    assert (tmp_path / "run" / "trajectory.jfl").read_bytes() == log.read_bytes()
    base = make_model("llama")
    assert jf.replay(base, log) == 6
    assert jf.fingerprint(base) == jf.fingerprint(trainer.model)


def test_epsilon_is_told_and_no_loss(tmp_path: Path) -> None:
    trainer = private_trainer(
        tmp_path, logging_steps=2, eval_strategy="steps", eval_steps=3, save_strategy="steps",
        save_steps=3, more={"eval_dataset": texts(3, seed=1)},
    )  # fmt: skip
    found = trainer.train()
    assert shown(trainer, "epsilon") == [epsilon(n) for n in (2, 4, 6)] + [epsilon(6)]
    assert not shown(trainer, "loss")
    assert not shown(trainer, "train_loss")
    assert "train_loss" not in found.metrics
    assert (found.metrics["epsilon"], found.metrics["delta"]) == (epsilon(6), DELTA)
    assert all(0.0 < size < 1e3 for size in shown(trainer, "grad_norm"))
    assert len(shown(trainer, "eval_loss")) == 2
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["total_flos"] == 0
    assert state["log_history"][0].keys() == {
        "epsilon",
        "epoch",
        "grad_norm",
        "learning_rate",
        "step",
    }
    header = jf.read_log(tmp_path / "trajectory.jfl").header
    assert header["settings"]["private"] == {
        "rows": ROWS, "batch_size": SIZE, "noise_multiplier": 0.7, "clip": 2.0,
    }  # fmt: skip


def test_the_losses_of_training_rows_are_nowhere(tmp_path: Path) -> None:
    """They are made a number that would be seen anywhere; a NaN stops nothing, and skips no step."""

    class Marked(MeZOTrainer):
        mark = 77123.0

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return torch.tensor(self.mark)

    for mark in (77123.0, float("nan")):
        Marked.mark = mark
        trainer = private_trainer(
            tmp_path, kind=Marked, save_strategy="steps", save_steps=6, logging_steps=1
        )
        trainer.train()
        assert trainer.optimizer.steps == 6
        for file in tmp_path.rglob("*"):
            if file.is_file():
                assert b"77123" not in file.read_bytes(), file
        assert "77123" not in str(trainer.state.log_history)


def test_a_row_is_collated_by_itself_and_by_luck_of_its_own(tmp_path: Path) -> None:
    seen: list[int] = []

    def collator(rows: list[Any]) -> Any:
        seen.append(len(rows))
        batch = default_data_collator(rows)
        batch["labels"] = torch.randint(0, 64, batch["labels"].shape)
        return batch

    trainer = private_trainer(tmp_path, more={"data_collator": collator})
    states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tobytes()  # type: ignore[index,union-attr]  # noqa: NPY002
    batches = [trainer._collated(3)["labels"].tolist() for _ in range(2)]
    assert batches[0] != batches[1]  # whatever was drawn before
    now = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tobytes()  # type: ignore[index,union-attr]  # noqa: NPY002
    assert states[0] == now[0]
    assert states[1].equal(now[1])
    assert states[2] == now[2]
    trainer.train()
    assert set(seen) == {1}
    draws = set()
    for _ in range(3):
        torch.manual_seed(0)
        with _own_luck():
            draws.add((random.random(), float(torch.rand(1)), float(np.random.rand())))  # noqa: NPY002
    assert len({a for a, _, _ in draws}) == len({c for _, _, c in draws}) == len(draws) == 3


def test_a_row_is_collated_once_a_step(tmp_path: Path) -> None:
    """Both looks are at what was drawn for it."""
    calls: list[int] = []

    def collator(rows: list[Any]) -> Any:
        calls.append(1)
        return default_data_collator(rows)

    with pytest.MonkeyPatch.context() as patch:
        drawn = count_draws(patch)
        private_trainer(tmp_path, more={"data_collator": collator}).train()
    assert len(calls) == sum(drawn)


# ------------------------------------------------------------------------------------- what is spent


def test_a_target_is_for_the_planned_steps(tmp_path: Path) -> None:
    given = {"noise_multiplier": None, "target_epsilon": 5.0}
    trainer = private_trainer(tmp_path, **given)
    trainer.train()
    noise = trainer.optimizer.private.noise_multiplier
    assert 4.8 < epsilon(6, noise) <= 5.0
    assert shown(trainer, "epsilon")[-1] == epsilon(6, noise)
    with pytest.raises(UserError, match=r"12 answers cost epsilon .* more than target_epsilon, 5"):
        trainer.train()
    assert trainer.optimizer.steps == 6
    with pytest.raises(UserError, match=r"which train\(\) knows"):
        private_trainer(tmp_path / "other", **given).create_optimizer()


def test_training_ends_when_all_that_was_planned_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where an answer was given that no step came of."""
    drawn = count_draws(monkeypatch)

    class Wasteful(MeZOTrainer):
        def _plan(self, steps: int) -> None:
            super()._plan(steps)
            self.optimizer.private.answers += 2

    trainer = private_trainer(tmp_path, kind=Wasteful)
    trainer.train()
    assert len(drawn) == trainer.optimizer.steps == 4
    assert trainer.optimizer.private.answers == 6


class Dies(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise OSError("the power is gone")


def saves(**changes: Any) -> dict[str, Any]:
    return {"save_strategy": "steps", "save_steps": 3, "max_steps": 8, **changes}


def died(out: Path, **changes: Any) -> None:
    """A checkpoint after the third step, and seven steps in the log."""
    with pytest.raises(OSError, match="the power is gone"):
        private_trainer(out, more={"callbacks": [Dies(7)]}, **saves(**changes)).train()
    shutil.rmtree(out / "checkpoint-6")


def test_what_the_log_has_behind_a_checkpoint_is_taken_again_and_not_answered_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    died(tmp_path)
    before = jf.read_log(tmp_path / "trajectory.jfl").steps
    assert len(before) == 7
    drawn = count_draws(monkeypatch)
    trainer = private_trainer(tmp_path, **saves())
    trainer.train(resume_from_checkpoint=True)
    after = jf.read_log(tmp_path / "trajectory.jfl").steps
    assert (len(after), after[:7], len(drawn)) == (8, before, 1)
    assert not list(tmp_path.glob("trajectory-*"))
    # known from the first moment on
    assert shown(trainer, "epsilon")[3:] == [epsilon(n) for n in (7, 7, 7, 7, 8, 8)]
    assert trainer.optimizer.private.answers == 8
    base = make_model("llama")
    jf.replay(base, tmp_path / "trajectory.jfl")
    assert jf.fingerprint(base) == jf.fingerprint(trainer.model)
    # a checkpoint that was saved on the way has the log of its own weights
    assert jf.read_log(tmp_path / "checkpoint-6" / "trajectory.jfl").steps == before[:6]
    shutil.rmtree(tmp_path / "checkpoint-8")
    again = private_trainer(tmp_path, **saves())
    again.train(resume_from_checkpoint=True)
    assert len(drawn) == 1
    assert jf.fingerprint(again.model) == jf.fingerprint(trainer.model)


def test_it_cannot_end_before_what_was_answered(tmp_path: Path) -> None:
    died(tmp_path)
    trainer = private_trainer(tmp_path, **saves(max_steps=5))
    with pytest.raises(
        UserError, match="has 4 steps behind the checkpoint, and max_steps leaves 2"
    ):
        trainer.train(resume_from_checkpoint=True)


def test_steps_that_are_left_when_training_ends_are_the_first_of_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    died(tmp_path)
    before = jf.read_log(tmp_path / "trajectory.jfl").steps
    drawn = count_draws(monkeypatch)
    trainer = private_trainer(tmp_path, more={"callbacks": [Dies(5)]}, **saves())
    said: list[str] = []
    monkeypatch.setattr("justforward.loop.logger.warning", said.append)
    with pytest.raises(OSError, match="the power is gone"):
        trainer.train(resume_from_checkpoint=True)
    assert "has 2 steps more than the weights" in said[0]
    trainer.callback_handler.pop_callback(Dies)
    trainer.train()
    log = jf.read_log(tmp_path / "trajectory.jfl").steps
    assert log[:7] == before
    assert (len(log), len(drawn), trainer.optimizer.private.answers) == (13, 6, 13)
    base = make_model("llama")
    jf.replay(base, tmp_path / "trajectory.jfl")
    assert jf.fingerprint(base) == jf.fingerprint(trainer.model)


def test_the_noise_for_a_target_is_that_of_the_run(tmp_path: Path) -> None:
    given = {"noise_multiplier": None, "target_epsilon": 5.0}
    died(tmp_path, **given)
    noise = jf.read_log(tmp_path / "trajectory.jfl").header["settings"]["private"][
        "noise_multiplier"
    ]
    assert 4.8 < epsilon(8, noise) <= 5.0
    longer = private_trainer(tmp_path, **saves(max_steps=12), **given)
    with pytest.raises(
        UserError, match=r"12 answers cost epsilon .* 7 were given: plan fewer steps"
    ):
        longer.train(resume_from_checkpoint=True)
    shorter = private_trainer(tmp_path, **saves(max_steps=7), **given)
    shorter.train(resume_from_checkpoint=True)
    assert shown(shorter, "epsilon")[-1] == epsilon(7, noise)
    other = make_trainer(
        make_model("llama"), tmp_path, texts(ROWS + 1), **{**PRIVATE, **saves(), **given}
    )
    with pytest.raises(UserError, match=r"the settings is .* in the state and .*'rows': 11"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"private": False}, "noise_multiplier is 0.7: it is for private=True"),
        ({"target_epsilon": 3.0}, "private takes either target_epsilon or noise_multiplier"),
        ({"noise_multiplier": None}, "private takes either target_epsilon or noise_multiplier"),
        ({"estimator": "activation"}, "estimator is 'activation', with private: in activation space"),
        ({"modified": "variance"}, "modified is 'variance', with private: it measures layers"),
        ({"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}, "load_best_model_at_end is True, with private"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy is 'group_by_length', with private"),
        ({"include_num_input_tokens_seen": True}, "include_num_input_tokens_seen is 'all', with private"),
        ({"save_on_each_node": True}, "save_on_each_node is True, with private"),
    ],
)  # fmt: skip
def test_arguments_that_would_void_it(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        config(tmp_path, **{**PRIVATE, **changes})
    assert said in str(error.value)


class Deals(MeZOTrainer):
    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return super()._get_train_sampler(*args, **kwargs)


class Endless(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(texts(ROWS))


ROW = texts(ROWS)


@pytest.mark.parametrize(
    ("more", "changes", "said"),
    [
        ({"kind": Deals}, {}, "Deals has a _get_train_sampler of its own"),
        ({"train_dataset": Endless()}, {}, "train_dataset has no length"),
        ({"train_dataset": ROW, "eval_dataset": ROW}, {}, "eval_dataset is train_dataset"),
        ({"train_dataset": ROW, "eval_dataset": {"a": texts(3), "b": ROW}}, {}, "eval_dataset is train_dataset"),
        ({"data_collator": "seeded"}, {}, r"data_collator has a seed \(3\)"),
        ({}, {"looks": "one-point"}, "a loss is kept for the next step"),
        ({}, {"target_delta": 0.2}, "target_delta is 0.2, and there are 10 training rows"),
        ({}, {"per_device_train_batch_size": 6}, "batch_size is 12: it must be a whole number, 1 to 10"),
        ({}, {"clip": -1.0}, "clip is -1.0: it must be positive"),
    ],
)  # fmt: skip
def test_what_would_void_it_is_refused_before_the_first_step(
    tmp_path: Path, more: dict[str, Any], changes: dict[str, Any], said: str, tokenizer: Any
) -> None:
    more = dict(more)
    kind = more.pop("kind", MeZOTrainer)
    if more.get("data_collator") == "seeded":
        more["data_collator"] = DataCollatorForLanguageModeling(tokenizer, mlm=False, seed=3)
    model = make_model("llama")
    before = jf.fingerprint(model)
    with pytest.raises(UserError, match=said):
        make_trainer(
            model, tmp_path, texts(ROWS), kind=kind, more=more, **{**PRIVATE, **changes}
        ).train()
    assert jf.fingerprint(model) == before
    assert not (tmp_path / "trajectory.jfl").exists()


def test_searches_other_rows_and_a_library_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = private_trainer(tmp_path)
    with pytest.raises(UserError, match="each trial of a search spends epsilon"):
        trainer.train(trial={"learning_rate": 1e-3})
    trainer.train()
    trainer.train_dataset = texts(ROWS + 1)
    with pytest.raises(UserError, match="train_dataset has 11 rows, and had 10"):
        trainer.train()
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(UserError, match=r"pip install 'justforward\[private\]'"):
        private_trainer(tmp_path)


def test_weights_that_were_changed_do_not_begin_a_log_that_forgets(tmp_path: Path) -> None:
    trainer = private_trainer(tmp_path)
    trainer.train()
    log = (tmp_path / "trajectory.jfl").read_bytes()
    trainer.model.load_state_dict(make_model("llama").state_dict())
    with pytest.raises(UserError, match=r"would not know what the answers in .*trajectory\.jfl"):
        trainer.train()
    assert (tmp_path / "trajectory.jfl").read_bytes() == log


# ------------------------------------------------------------------------------------ two processes


def trained(folder: Path) -> Any:
    """One training with known entropy; one that dies in its seventh step, and is resumed from the third."""
    as_torchrun()
    size = dist.get_world_size()
    found: list[Any] = []
    common = {"gradient_accumulation_steps": 2 // size}
    with pytest.MonkeyPatch.context() as patch:
        known_entropy(patch, dist.get_rank())
        trainer = private_trainer(folder / "whole", **common)
        trainer.train()
        found.append([jf.fingerprint(trainer.model), shown(trainer, "epsilon")])
    out = folder / "resumed"
    try:
        more = {"callbacks": [Dies(7)]}
        private_trainer(out, more=more, **saves(), **common).train()
    except OSError as error:
        found.append(str(error))
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(out / "checkpoint-6")
        shutil.copyfile(out / "trajectory.jfl", folder / "before.jfl")
    dist.barrier()
    with pytest.MonkeyPatch.context() as patch:
        drawn = count_draws(patch)
        trainer = private_trainer(out, **saves(), **common)
        trainer.train(resume_from_checkpoint=True)
    answers = trainer.optimizer.private.answers
    found.append([jf.fingerprint(trainer.model), shown(trainer, "epsilon"), answers, len(drawn)])
    return found


def test_two_processes_have_the_log_of_one_and_answer_nothing_twice(tmp_path: Path) -> None:
    logs = []
    for size in (1, 2):
        (tmp_path / f"group{size}").mkdir()
        out = tmp_path / f"run{size}"
        found = together(size, tmp_path / f"group{size}", trained, out)
        assert found == found[:1] * size
        whole, failed, resumed = found[0]
        assert whole[1] == [epsilon(n) for n in (1, 2, 3, 4, 5, 6, 6)]
        assert failed == "the power is gone"
        assert resumed[1:] == [[epsilon(n) for n in (1, 2, 3, 7, 7, 7, 7, 8, 8)], 8, 1]
        before = jf.read_log(out / "before.jfl").steps
        assert jf.read_log(out / "resumed" / "trajectory.jfl").steps[:7] == before
        base = make_model("llama")
        assert jf.replay(base, out / "resumed" / "trajectory.jfl") == 8
        assert jf.fingerprint(base) == resumed[0]
        logs.append((out / "whole" / "trajectory.jfl").read_bytes())
    assert logs[0] == logs[1]
