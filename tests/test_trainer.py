"""`MeZOTrainer` is Trainer with other steps: what it logs, saves, resumes and refuses."""

from __future__ import annotations

import copy
import gc
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

import justforward as jf
from conftest import make_model
from justforward.errors import NonFiniteLoss, UserError
from justforward.stored import as_stored
from justforward.trainer import (
    MeZOConfig,
    MeZOSeq2SeqConfig,
    MeZOSeq2SeqTrainer,
    MeZOTrainer,
    check_workers,
)
from processes import together

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # peft asks
]

Rows = list[dict[str, Any]]


@pytest.fixture(autouse=True, scope="module")
def _quick_collections() -> Iterator[None]:
    """accelerate collects garbage before every training, which with all of torch and Numba loaded takes longer than it."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def texts(count: int, seed: int = 0, length: int = 10) -> Rows:
    """Rows whose first tokens, some to five, are a prompt without a label."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        ids = torch.randint(5, 60, (length,), generator=generator)
        labels = ids.clone()
        labels[: int(torch.randint(1, 6, (1,), generator=generator))] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def pairs(count: int) -> Rows:
    return [{"input_ids": torch.arange(5, 13) + i, "labels": torch.arange(5, 9)} for i in range(count)]  # fmt: skip


def classes(count: int) -> Rows:
    return [{"input_ids": torch.arange(5, 13) + i, "labels": i % 3} for i in range(count)]


class Prints(TrainerCallback):
    """The fingerprint of the model after every step."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_step_end(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self.seen.append(jf.fingerprint(model))


def config(out: Path, kind: type[MeZOConfig] = MeZOConfig, **changes: Any) -> MeZOConfig:
    given: dict[str, Any] = {
        "output_dir": str(out),
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return kind(**{**given, **changes})


def make_trainer(
    model: nn.Module,
    out: Path,
    rows: Rows | None = None,
    *,
    kind: type[MeZOTrainer] = MeZOTrainer,
    more: dict[str, Any] | None = None,
    **changes: Any,
) -> MeZOTrainer:
    extra = dict(more or {})
    extra.setdefault("train_dataset", rows or texts(10))
    args = config(out, extra.pop("config", MeZOConfig), **changes)
    return kind(model, args, **extra)


def assert_replayed(base: nn.Module, trained: nn.Module, out: Path, steps: int) -> None:
    again = copy.deepcopy(base)
    assert jf.replay(again, out / "trajectory.jfl") == steps
    assert jf.fingerprint(again) == jf.fingerprint(trained)


def shown(trainer: Trainer, key: str) -> list[float]:
    return [line[key] for line in trainer.state.log_history if key in line]


def small_classifier(seed: int = 0) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertForSequenceClassification(
            BertConfig(
                vocab_size=64,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_labels=3,
            )
        )


# ----------------------------------------------------------------------------- it is the plain loop


@settings(max_examples=8)
@given(
    parts=st.integers(1, 3),
    rows=st.integers(1, 3),
    rule=st.sampled_from(["sgd", "rms", "rms+momentum", "adam"]),
    samples=st.integers(1, 2),
)
def test_accumulation_is_one_estimate_over_all_micro_batches(
    tmp_path_factory: pytest.TempPathFactory, parts: int, rows: int, rule: str, samples: int
) -> None:
    """Log and weights have the bits of a plain loop that looks at the same micro-batches."""
    out = tmp_path_factory.mktemp("run")
    data = texts(parts * rows * 3)
    base = make_model("llama")
    model = copy.deepcopy(base)
    trainer = make_trainer(
        model,
        out / "trainer",
        data,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=parts,
        max_steps=3,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        rule=rule,
        num_samples=samples,
        seed=7,
    )
    trainer.train()

    plain = copy.deepcopy(base)
    opt = jf.MeZO(plain, lr=1e-3, rule=rule, num_samples=samples, seed=7, log=out / "plain.jfl")
    losses = []
    for step in range(3):
        mine = data[step * parts * rows : (step + 1) * parts * rows]
        micro = [
            {key: torch.stack([row[key] for row in mine[i : i + rows]]) for key in mine[0]}
            for i in range(0, len(mine), rows)
        ]
        items = sum(int(batch["labels"][:, 1:].ne(-100).sum()) for batch in micro)
        losses.append(
            opt.step(
                lambda micro=micro, items=items: sum(
                    float(plain(**batch, num_items_in_batch=items).loss) for batch in micro
                )
            )
        )
    opt.close()
    assert (out / "trainer" / "trajectory.jfl").read_bytes() == (out / "plain.jfl").read_bytes()
    assert jf.fingerprint(model) == jf.fingerprint(plain)
    assert shown(trainer, "loss") == pytest.approx(losses, rel=1e-6)


def test_activation_space_is_the_plain_loop_too(tmp_path: Path) -> None:
    data = texts(6)
    base = make_model("llama")
    model = copy.deepcopy(base)
    make_trainer(
        model,
        tmp_path,
        data,
        per_device_train_batch_size=3,
        max_steps=2,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        estimator="activation",
    ).train()

    plain = copy.deepcopy(base)
    opt = jf.MeZO(plain, lr=1e-3, rule="rms", estimator="activation", seed=42)

    def losses(batch: dict[str, Tensor]) -> Tensor:
        logits, labels = plain(input_ids=batch["input_ids"]).logits[:, :-1], batch["labels"][:, 1:]
        found = nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), reduction="none"
        )
        return found.view(labels.shape).sum(dim=1) * batch["weight"]

    for step in range(2):
        rows = data[3 * step : 3 * step + 3]
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        items = float(batch["labels"][:, 1:].ne(-100).sum())
        batch["weight"] = torch.full((3,), 3.0 / items)
        opt.step(losses, batch)
    assert jf.fingerprint(model) == jf.fingerprint(plain)


@pytest.mark.parametrize(
    ("samples", "looks"), [(1, "two-sided"), (2, "two-sided"), (2, "one-sided")]
)
def test_micro_batches_have_the_directions_of_the_whole_in_activation_space(
    tmp_path: Path, samples: int, looks: str
) -> None:
    """Six rows in three micro-batches or in one: each row has its own direction, the same."""
    logs = []
    for parts in (1, 3):
        out = tmp_path / str(parts)
        make_trainer(
            make_model("llama"),
            out,
            texts(6),
            per_device_train_batch_size=6 // parts,
            gradient_accumulation_steps=parts,
            max_steps=1,
            train_sampling_strategy="sequential",
            estimator="activation",
            rule="sgd",
            num_samples=samples,
            looks=looks,
        ).train()
        logs.append(jf.read_log(out / "trajectory.jfl").steps[0].coefficients)
    assert len(logs[0]) == 6 * samples
    assert logs[1] == pytest.approx(logs[0], rel=1e-2, abs=1e-6)


# ------------------------------------------------------------------------------ replay and resuming


def adapted(kind: str) -> Any:
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_peft_model(make_model(kind), LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.1))


CASES: dict[str, dict[str, Any]] = {
    "weight": {"gradient_accumulation_steps": 2},
    "activation": {"estimator": "activation", "gradient_accumulation_steps": 2},
    "momentum": {"rule": "rms+momentum"},
    "adam": {"rule": "adam(window=2)", "num_samples": 2},
    "adam, kept": {"rule": "adam(window=0)"},
    "blocks": {"blocks": "layers", "rule": "sgd"},
    "modified": {"modified": "variance"},
    "one-point": {"looks": "one-point"},
    "clipped": {"max_grad_norm": 0.5, "weight_decay": 0.1},
    "cosine": {"lr_scheduler_type": "cosine", "warmup_steps": 2},
    "workers": {"dataloader_num_workers": 1},
}


@pytest.mark.parametrize("case", sorted(CASES))
def test_resumed_from_a_checkpoint_it_has_the_bits_of_an_undisturbed_run(
    tmp_path: Path, case: str
) -> None:
    check_resume(tmp_path, lambda: make_model("gpt2"), CASES[case])


def test_the_same_with_weights_of_16_bits(tmp_path: Path) -> None:
    check_resume(tmp_path, lambda: make_model("llama").to(torch.bfloat16), {})


def test_a_model_of_16_bits_is_saved_as_one(tmp_path: Path) -> None:
    """By hand, too, and a copy of it."""
    trainer = make_trainer(make_model("llama").to(torch.bfloat16), tmp_path / "run")
    trainer.train()
    for name, model in (("it", trainer.model), ("copy", copy.deepcopy(trainer.model))):
        model.save_pretrained(tmp_path / name)
        loaded = type(model).from_pretrained(tmp_path / name)
        assert loaded.dtype == torch.bfloat16
        with as_stored(trainer.model):
            pairs_of = zip(loaded.parameters(), trainer.model.parameters(), strict=True)
            assert all(torch.equal(mine, theirs) for mine, theirs in pairs_of)


def test_the_same_with_an_adapter(tmp_path: Path) -> None:
    check_resume(tmp_path, lambda: adapted("llama"), {"estimator": "activation"})


def half_saved(case: str) -> Any:
    """A peft model of which peft, asked to save it, leaves out something that is tuned."""
    from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, get_peft_model

    kinds: dict[str, Any] = {
        "p-tuning": PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8),
        "projected prefix": PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8),
        "lora and norms": LoraConfig(),
    }  # fmt: skip
    kinds[case].task_type = "CAUSAL_LM"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(make_model("llama"), kinds[case])
    if case == "lora and norms":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or "norm" in name)
    return model


HALF_SAVED = ["p-tuning", "projected prefix", "lora and norms"]


@pytest.mark.parametrize("case", HALF_SAVED)
def test_the_same_where_peft_leaves_tuned_weights_out(tmp_path: Path, case: str) -> None:
    check_resume(tmp_path, lambda: half_saved(case), {"learning_rate": 1e-2})
    # an adapter that is another one cannot go on with it
    other = half_saved(HALF_SAVED[case == "p-tuning"])
    trainer = make_trainer(other, tmp_path / "other")
    with pytest.raises(UserError, match=r"tuned.safetensors: .* make the model as it was made"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))


@pytest.mark.parametrize("case", HALF_SAVED)
def test_the_best_model_is_whole_where_peft_leaves_tuned_weights_out(
    tmp_path: Path, case: str
) -> None:
    prints = Prints()
    trainer = make_trainer(
        half_saved(case),
        tmp_path,
        more={"eval_dataset": texts(4, seed=1), "callbacks": [prints]},
        learning_rate=0.5,
        load_best_model_at_end=True,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
    )
    trainer.train()
    best = int(str(trainer.state.best_model_checkpoint).rpartition("-")[2])
    assert best < 4
    assert jf.fingerprint(trainer.model) == prints.seen[best - 1]
    assert_replayed(half_saved(case), trainer.model, tmp_path, best)


def test_the_same_where_experts_are_saved_one_by_one(tmp_path: Path) -> None:
    """transformers renames them as it saves them, and Trainer does not find them again."""
    from transformers import MixtralConfig, MixtralForCausalLM

    def make() -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = MixtralConfig(
                vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                num_attention_heads=2, num_key_value_heads=2, num_local_experts=2,
            )  # fmt: skip
            return MixtralForCausalLM(config)

    check_resume(tmp_path, make, {})


def test_the_same_where_a_step_was_skipped(tmp_path: Path) -> None:
    """The log has one step fewer than Trainer counts."""
    rows = texts(12)
    for row in rows[2:4]:
        row["labels"] = torch.full_like(row["labels"], -100)
    changes = {"train_sampling_strategy": "sequential"}
    check_resume(tmp_path, lambda: make_model("gpt2"), changes, rows, taken=5)


def test_a_model_that_the_trainer_makes_is_made_again_by_each_train(tmp_path: Path) -> None:
    more = {"model_init": lambda: make_model("gpt2")}
    trainer = make_trainer(None, tmp_path, more=more)  # type: ignore[arg-type]
    prints = []
    for _ in range(2):
        trainer.train()
        prints.append(jf.fingerprint(trainer.model))
    assert prints[0] == prints[1]
    assert_replayed(make_model("gpt2"), trainer.model, tmp_path, 4)
    assert (tmp_path / "trajectory-1.jfl").is_file()


def check_resume(
    tmp_path: Path, make: Any, changes: dict[str, Any], rows: Rows | None = None, taken: int = 6
) -> None:
    """Six steps; then the last four again, by another process as it were, with data in the same order."""
    whole, out = Prints(), tmp_path / "run"
    common = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, **changes}
    base = make()
    model = copy.deepcopy(base)
    make_trainer(model, out, rows, more={"callbacks": [whole]}, **common).train()
    assert len(set(whole.seen)) == taken
    log = (out / "trajectory.jfl").read_bytes()
    assert_replayed(base, model, out, taken)

    shutil.rmtree(out / "checkpoint-4")
    shutil.rmtree(out / "checkpoint-6")
    (out / "trajectory.jfl").write_bytes(log[:-13])  # as a kill leaves it
    rest = Prints()
    model = make()
    make_trainer(model, out, rows, more={"callbacks": [rest]}, **common).train(
        resume_from_checkpoint=True
    )
    assert rest.seen == whole.seen[2:]
    assert_replayed(base, model, out, taken)
    assert sorted(path.name for path in out.glob("*.jfl")) == ["trajectory.jfl"]


def test_a_log_of_another_run_is_kept_and_a_second_train_goes_on(tmp_path: Path) -> None:
    base = make_model("gpt2")
    first = copy.deepcopy(base)
    make_trainer(first, tmp_path).train()
    model = copy.deepcopy(base)
    trainer = make_trainer(model, tmp_path, seed=1)
    trainer.train()
    assert_replayed(base, model, tmp_path, 4)
    again = copy.deepcopy(base)
    jf.replay(again, tmp_path / "trajectory-1.jfl")
    assert jf.fingerprint(again) == jf.fingerprint(first)
    trainer.train()  # as with Trainer: with the optimizer there is
    assert_replayed(base, model, tmp_path, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_were_loaded_between_two_trainings_begin_a_log(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """The grids and the log of the first one are of the others."""
    base = make_model("gpt2").to(dtype)
    model = copy.deepcopy(base)
    trainer = make_trainer(model, tmp_path)
    trainer.train()
    other = copy.deepcopy(base)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    model.load_state_dict(other.state_dict())
    trainer.train()
    assert_replayed(other, model, tmp_path, 4)
    jf.replay(base, tmp_path / "trajectory-1.jfl")


def test_the_newest_whole_checkpoint_is_resumed(tmp_path: Path) -> None:
    common: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    whole = Prints()
    make_trainer(make_model("gpt2"), tmp_path, more={"callbacks": [whole]}, **common).train()
    state = tmp_path / "checkpoint-6" / "trainer_state.json"
    state.write_text(state.read_text()[:100])  # killed while it was written
    os.remove(tmp_path / "checkpoint-4" / "optimizer.pt")
    rest = Prints()
    trainer = make_trainer(make_model("gpt2"), tmp_path, more={"callbacks": [rest]}, **common)
    trainer.train(resume_from_checkpoint=True)
    assert rest.seen == whole.seen[2:]
    os.remove(tmp_path / "checkpoint-4" / "optimizer.pt")
    with pytest.raises(UserError, match=r"checkpoint-4: cannot be resumed: it has no optimizer.pt"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"eps": 2e-3}, r"groups is \[0.001\] in the log and \[0.002\] now"),
        ({"seed": 1}, "seed is 42 in the log and 1 now"),
        ({"rule": "sgd"}, "rule is 'rms"),
        ({"estimator": "activation"}, "family is 'gaussian' in the log and 'rank1' now"),
        ({"looks": "one-sided"}, "settings is"),
        ({"blocks": "layers"}, "settings is"),
    ],
)
def test_other_settings_cannot_resume(tmp_path: Path, changes: Any, said: str) -> None:
    common: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(make_model("gpt2"), tmp_path, **common).train()
    log = (tmp_path / "trajectory.jfl").read_bytes()
    model = make_model("gpt2")
    trainer = make_trainer(model, tmp_path, **common, **changes)
    with pytest.raises(UserError, match=said):
        trainer.train(resume_from_checkpoint=True)
    assert (tmp_path / "trajectory.jfl").read_bytes() == log
    assert jf.fingerprint(model) == jf.fingerprint(make_model("gpt2"))  # not the checkpoint's


@pytest.mark.parametrize("only_model", [False, True])
def test_the_best_model_has_the_log_that_leads_to_it(tmp_path: Path, only_model: bool) -> None:
    """The rate is such that each evaluation is worse than the one before."""
    base = make_model("gpt2")
    model = copy.deepcopy(base)
    trainer = make_trainer(
        model,
        tmp_path,
        more={"eval_dataset": texts(4, seed=1)},
        learning_rate=0.5,
        load_best_model_at_end=True,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        save_only_model=only_model,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert_replayed(base, model, tmp_path, 2)
    assert len(jf.read_log(tmp_path / "trajectory-1.jfl").steps) == 4
    best = copy.deepcopy(model)
    trainer.train()  # from the best one: its log goes on, or without a state there is one with it for a base
    steps = int(str(trainer.state.best_model_checkpoint).rpartition("-")[2])
    if only_model:
        assert_replayed(best, trainer.model, tmp_path, steps)
    else:
        assert_replayed(base, trainer.model, tmp_path, 2 + steps)


def test_an_interrupt_leaves_the_weights_of_the_last_step_and_a_run_to_resume(
    tmp_path: Path,
) -> None:
    """Ctrl-C in the middle of a look; `examples/trainer` is interrupted by a real signal in `test_examples`."""
    common: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    whole, rest = Prints(), Prints()
    make_trainer(make_model("gpt2"), tmp_path / "a", more={"callbacks": [whole]}, **common).train()

    class Impatient(MeZOTrainer):
        calls = 0

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == 8:
                raise KeyboardInterrupt
            return super().compute_loss(*args, **kwargs)

    model = make_model("gpt2")
    trainer = make_trainer(model, tmp_path / "b", kind=Impatient, **common)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert jf.fingerprint(model) == whole.seen[2]
    trainer.add_callback(rest)
    trainer.train(resume_from_checkpoint=True)
    assert rest.seen == whole.seen[2:]
    ours, theirs = (tmp_path / name / "trajectory.jfl" for name in "ab")
    assert jf.read_log(ours).steps == jf.read_log(theirs).steps


@pytest.mark.parametrize("event", ["on_step_begin", "on_pre_optimizer_step", "on_step_end"])
def test_a_checkpoint_on_sigterm_is_one_to_go_on_from(tmp_path: Path, event: str) -> None:
    """The signal's timer fires just before an event; Trainer's callback acts in the next one."""
    whole, rest = Prints(), Prints()
    make_trainer(make_model("gpt2"), tmp_path / "a", more={"callbacks": [whole]}).train()

    class Asks(TrainerCallback):
        def ask(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                found = [c for c in trainer.callback_handler.callbacks if hasattr(c, "jit_manager")]
                found[0].jit_manager.is_checkpoint_requested = True

    asks: Any = Asks()
    setattr(asks, event, asks.ask)
    trainer = make_trainer(make_model("gpt2"), tmp_path / "b", enable_jit_checkpoint=True)
    trainer.callback_handler.callbacks.insert(0, asks)
    trainer.train()
    assert trainer.state.global_step < 4
    (saved,) = (tmp_path / "b").glob("checkpoint-*")
    steps = int(saved.name.rpartition("-")[2])
    assert len(jf.read_log(saved / "trajectory.jfl").steps) == steps
    model = make_model("gpt2")
    again = make_trainer(model, tmp_path / "b", more={"callbacks": [rest]})
    again.train(resume_from_checkpoint=True)
    assert rest.seen == whole.seen[steps:]
    assert_replayed(make_model("gpt2"), model, tmp_path / "b", 4)


@pytest.mark.parametrize(
    ("event", "refused"),
    [
        ("on_step_begin", False),
        ("on_pre_optimizer_step", True),
        ("on_optimizer_step", True),
        ("on_step_end", False),
    ],
)
def test_a_checkpoint_between_a_step_and_its_end_is_refused(
    tmp_path: Path, event: str, refused: bool
) -> None:
    class Saves(TrainerCallback):
        def save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                trainer._save_checkpoint(trainer.model, None)

    saves: Any = Saves()
    setattr(saves, event, saves.save)
    trainer = make_trainer(make_model("gpt2"), tmp_path, more={"callbacks": [saves]})
    if refused:
        with pytest.raises(UserError, match="a checkpoint of step 2 was asked for when step 3 had"):
            trainer.train()
        return
    trainer.train()
    assert len(jf.read_log(tmp_path / "checkpoint-2" / "trajectory.jfl").steps) == 2


# -------------------------------------------------------------------------------- what Trainer does


def test_evaluation_leaves_every_bit_and_the_metrics_are_trainers(tmp_path: Path) -> None:
    model = small_classifier()
    prints: list[str] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            prints.append(jf.fingerprint(model))

        def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
            assert prints.pop() == jf.fingerprint(model)

    def right(found: Any) -> dict[str, float]:
        return {"right": float((found.predictions.argmax(-1) == found.label_ids).mean())}

    rows = classes(9)
    trainer = make_trainer(
        model,
        tmp_path,
        rows,
        more={"eval_dataset": rows, "compute_metrics": right, "callbacks": [Watch()]},
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer.train()
    with torch.no_grad():
        ids = torch.stack([row["input_ids"] for row in rows])
        found = model.eval()(input_ids=ids).logits.argmax(-1)
    expected = float((found == torch.tensor([row["labels"] for row in rows])).double().mean())
    assert shown(trainer, "eval_right")[-1] == pytest.approx(expected)
    assert len(shown(trainer, "eval_loss")) == 4
    assert prints == []


def test_early_stopping(tmp_path: Path) -> None:
    trainer = make_trainer(
        make_model("gpt2"),
        tmp_path,
        more={"eval_dataset": texts(4), "callbacks": [EarlyStoppingCallback(2)]},
        learning_rate=0.5,
        max_steps=20,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="best",
        metric_for_best_model="eval_loss",
        greater_is_better=False,
    )
    trainer.train()
    assert trainer.state.global_step < 20
    assert len(jf.read_log(tmp_path / "trajectory.jfl").steps) == trainer.state.global_step


@pytest.mark.parametrize(
    "kind", ["linear", "cosine", "constant_with_warmup", "polynomial", "reduce_lr_on_plateau"]
)
def test_learning_rates_are_the_schedulers(tmp_path: Path, kind: str) -> None:
    """The same as Trainer's own, and what the log was written with."""
    common: dict[str, Any] = {
        "lr_scheduler_type": kind,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "learning_rate": 1e-3,
    }
    more = {"eval_dataset": texts(2)}
    ours = make_trainer(make_model("gpt2"), tmp_path / "a", more=more, **common, rule="sign")
    ours.train()
    given = config(tmp_path / "b", **common)
    kept = {key: getattr(given, key) for key in common} | {
        key: getattr(given, key)
        for key in ("output_dir", "per_device_train_batch_size", "max_steps", "logging_steps",
                    "save_strategy", "disable_tqdm", "use_cpu")
    }  # fmt: skip
    theirs = Trainer(
        make_model("gpt2"),
        TrainingArguments(**kept, report_to="none"),
        train_dataset=texts(10),
        **more,
    )
    theirs.train()
    assert shown(ours, "learning_rate") == shown(theirs, "learning_rate")
    moved = [abs(s.coefficients[0]) for s in jf.read_log(tmp_path / "a" / "trajectory.jfl").steps]
    assert moved == pytest.approx(shown(ours, "learning_rate"), rel=1e-4)


@pytest.mark.parametrize("estimator", ["weight", "activation"])
def test_label_smoothing_is_trainers(tmp_path: Path, estimator: str) -> None:
    """A step without a look to speak of shows the loss that Trainer would have shown."""
    common: dict[str, Any] = {"label_smoothing_factor": 0.2, "max_steps": 1, "gradient_accumulation_steps": 2}  # fmt: skip
    ours = make_trainer(make_model("gpt2"), tmp_path / "a", **common, estimator=estimator, eps=1e-6)
    ours.train()
    args = TrainingArguments(
        str(tmp_path / "b"), per_device_train_batch_size=2, logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=True, **common,
    )  # fmt: skip
    theirs = Trainer(make_model("gpt2").eval(), args, train_dataset=texts(10))
    theirs.train()
    assert shown(ours, "loss") == pytest.approx(shown(theirs, "loss"), rel=1e-4)


@pytest.mark.parametrize("kind", ["texts", "classes"])
@pytest.mark.parametrize("estimator", ["weight", "activation"])
def test_the_loss_of_unlike_micro_batches_is_trainers(
    tmp_path: Path, estimator: str, kind: str
) -> None:
    """By tokens in a language model, by micro-batches in a classifier."""
    rows = texts(8) if kind == "texts" else classes(8)

    def model() -> Any:
        return make_model("gpt2") if kind == "texts" else small_classifier()

    common: dict[str, Any] = {"max_steps": 1, "gradient_accumulation_steps": 3}
    ours = make_trainer(model(), tmp_path / "a", rows, **common, estimator=estimator, eps=1e-6)
    ours.train()
    args = TrainingArguments(
        str(tmp_path / "b"), per_device_train_batch_size=2, logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=True, **common,
    )  # fmt: skip

    class NoDropout(Trainer):
        def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(model.eval(), *args, **kwargs)

    theirs = NoDropout(model(), args, train_dataset=rows)
    theirs.train()
    assert shown(ours, "loss") == pytest.approx(shown(theirs, "loss"), rel=1e-4)


def test_a_loss_of_ones_own(tmp_path: Path) -> None:
    """By compute_loss_func, and by a subclass; neither is differentiable."""

    def wrong(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        hit = outputs.logits[:, :-1].argmax(-1) == labels[:, 1:]
        return 1.0 - hit.sum() / num_items_in_batch

    base = make_model("gpt2")
    model = copy.deepcopy(base)
    trainer = make_trainer(model, tmp_path / "a", more={"compute_loss_func": wrong}, eps=0.1)
    trainer.train()
    assert all(0.0 <= loss <= 1.0 for loss in shown(trainer, "loss"))
    assert_replayed(base, model, tmp_path / "a", 4)

    class Mine(MeZOTrainer):
        def compute_loss(
            self,
            model: Any,
            inputs: Any,
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            labels = inputs.pop("labels")  # as many do
            return wrong(model(**inputs), labels, num_items_in_batch)

    other = copy.deepcopy(base)
    make_trainer(other, tmp_path / "b", kind=Mine, eps=0.1).train()
    assert jf.fingerprint(other) == jf.fingerprint(model)

    class Number(MeZOTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return float(model(input_ids=inputs["input_ids"]).logits[0, 0, 0])  # no tensor at all

    trainer = make_trainer(other, tmp_path / "c", kind=Number, gradient_accumulation_steps=2)
    trainer.train()
    assert trainer.optimizer.steps == 4


def test_activation_space_refuses_a_loss_that_it_does_not_know(tmp_path: Path) -> None:
    def other(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return outputs.logits.square().mean()

    base = make_model("gpt2")
    model = copy.deepcopy(base)
    more = {"compute_loss_func": other}
    trainer = make_trainer(model, tmp_path, more=more, estimator="activation")
    with pytest.raises(UserError, match=r"compute_loss says .*: override row_losses"):
        trainer.train()
    assert jf.read_log(tmp_path / "trajectory.jfl").steps == []

    class Mine(MeZOTrainer):
        def row_losses(self, model: Any, inputs: Any) -> Tensor:
            # the mean over all logits of the batch is that over its rows; each row has as many items
            logits = model(input_ids=inputs["input_ids"]).logits
            return logits.square().mean(dim=(1, 2)) * 10.0

    rows = [{**row, "labels": row["input_ids"]} for row in texts(8)]
    mine = make_trainer(
        copy.deepcopy(base), tmp_path / "mine", rows, kind=Mine, more=more, estimator="activation"
    )
    mine.train()
    assert len(jf.read_log(tmp_path / "mine" / "trajectory.jfl").steps) == 4


@pytest.mark.parametrize("rows", [texts(8), [{**row, "labels": row["input_ids"]} for row in texts(8)]])  # fmt: skip
@pytest.mark.parametrize("case", ["prompt", "p-tuning", "prefix"])
def test_activation_space_with_a_learnt_prompt(tmp_path: Path, case: str, rows: Rows) -> None:
    """Its tokens have no labels, and the last of them predicts the first one of the text."""
    from peft import (
        PrefixTuningConfig,
        PromptEncoderConfig,
        PromptTuningConfig,
        get_peft_model,
    )

    kinds = {"prompt": PromptTuningConfig, "p-tuning": PromptEncoderConfig, "prefix": PrefixTuningConfig}  # fmt: skip
    torch.manual_seed(0)
    kind = kinds[case](task_type="CAUSAL_LM", num_virtual_tokens=3)
    base = get_peft_model(make_model("llama"), kind)
    shows = []
    for estimator in ("activation", "weight"):
        model = copy.deepcopy(base)
        trainer = make_trainer(
            model, tmp_path / estimator, rows, estimator=estimator, eps=1e-6, max_steps=1
        )
        trainer.train()
        shows += shown(trainer, "loss")
        assert_replayed(base, model, tmp_path / estimator, 1)
    assert shows[0] == pytest.approx(shows[1], rel=1e-4)


def test_activation_space_without_labels_divides_by_rows(tmp_path: Path) -> None:
    class Mine(MeZOTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return Mine.row_losses(self, model, inputs).mean()

        def row_losses(self, model: Any, inputs: Any) -> Tensor:
            return model(input_ids=inputs["input_ids"]).logits.square().mean(dim=(1, 2))

    rows = [{"input_ids": row["input_ids"]} for row in texts(8)]
    shows = []
    for estimator in ("activation", "weight"):
        trainer = make_trainer(
            make_model("gpt2"), tmp_path / estimator, rows, kind=Mine, estimator=estimator,
            gradient_accumulation_steps=2, eps=1e-6, max_steps=1,
        )  # fmt: skip
        trainer.train()
        shows += shown(trainer, "loss")
    assert shows[0] == pytest.approx(shows[1], rel=1e-4)


def test_activation_space_needs_labels_that_are_numbers(tmp_path: Path) -> None:
    rows = [{**row, "labels": row["labels"].float()} for row in texts(4)]
    trainer = make_trainer(
        make_model("gpt2"),
        tmp_path,
        rows,
        more={"compute_loss_func": lambda outputs, *args, **kwargs: outputs.logits.mean()},
        estimator="activation",
    )
    with pytest.raises(UserError, match="no labels that are whole numbers: override row_losses"):
        trainer.train()


@pytest.mark.parametrize("estimator", ["weight", "activation"])
def test_a_loss_that_is_nan_is_shown_and_its_step_not_taken(tmp_path: Path, estimator: str) -> None:
    rows = texts(8)
    for row in rows[2:4]:
        row["labels"] = torch.full_like(row["labels"], -100)  # 0 / 0, the mean over nothing
    prints = Prints()
    base = make_model("gpt2")
    model = copy.deepcopy(base)
    trainer = make_trainer(
        model,
        tmp_path,
        rows,
        more={"callbacks": [prints]},
        train_sampling_strategy="sequential",
        estimator=estimator,
    )
    trainer.train()
    losses = shown(trainer, "loss")
    assert [math.isnan(loss) for loss in losses] == [False, True, False, False]
    assert shown(trainer, "skipped_steps") == [1]
    assert prints.seen[0] == prints.seen[1] != prints.seen[2]
    rates = shown(trainer, "learning_rate")
    assert rates[1] == rates[2] < rates[0]  # the schedule waits, as for a loss scaler
    assert math.isnan(shown(trainer, "grad_norm")[1])
    assert_replayed(base, model, tmp_path, 3)


def test_too_many_steps_without_a_loss_end_training(tmp_path: Path) -> None:
    rows = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in texts(8)]
    model = make_model("gpt2")
    trainer = make_trainer(model, tmp_path, rows, max_steps=9, max_skipped_steps=2)
    with pytest.raises(NonFiniteLoss, match="the weights are as before"):
        trainer.train()
    assert shown(trainer, "skipped_steps") == [1, 1]
    assert jf.read_log(tmp_path / "trajectory.jfl").steps == []


def test_grad_norm_is_the_size_of_the_projected_gradients(tmp_path: Path) -> None:
    trainer = make_trainer(make_model("gpt2"), tmp_path, num_samples=3, rule="sgd", learning_rate=1e-6)  # fmt: skip
    trainer.train()
    rates = [1e-6, 0.75e-6, 0.5e-6, 0.25e-6]
    for step, rate, norm in zip(
        jf.read_log(tmp_path / "trajectory.jfl").steps,
        rates,
        shown(trainer, "grad_norm"),
        strict=True,
    ):
        grads = [3.0 * c / -rate for c in step.coefficients]
        assert norm == pytest.approx(math.sqrt(sum(g * g for g in grads) / 3.0), rel=1e-4)


def test_max_grad_norm_clips_it(tmp_path: Path) -> None:
    trainer = make_trainer(
        make_model("gpt2"), tmp_path, rule="sgd", learning_rate=1e-6, max_grad_norm=0.5,
        lr_scheduler_type="constant",
    )  # fmt: skip
    trainer.train()
    norms = shown(trainer, "grad_norm")
    assert max(norms) > 0.5
    moved = [abs(s.coefficients[0]) / 1e-6 for s in jf.read_log(tmp_path / "trajectory.jfl").steps]
    assert moved == pytest.approx([min(norm, 0.5) for norm in norms], rel=1e-4)


def test_operations_are_those_of_the_looks(tmp_path: Path) -> None:
    counts = []
    for looks in ("one-point", "two-sided"):
        trainer = make_trainer(make_model("gpt2"), tmp_path / looks, looks=looks)
        trainer.train()
        counts.append(trainer.state.total_flos)
    assert counts[1] == 2 * counts[0] > 0


def test_a_compiled_model(tmp_path: Path) -> None:
    """Weights move in place under it; without a compiler, so that it is quick."""
    whole = [make_model("gpt2"), make_model("gpt2")]
    make_trainer(whole[0], tmp_path / "a").train()
    make_trainer(
        whole[1], tmp_path / "b", torch_compile=True, torch_compile_backend="eager"
    ).train()
    assert jf.fingerprint(whole[0]) == jf.fingerprint(whole[1])
    half = make_model("gpt2").to(torch.bfloat16)
    trainer = make_trainer(half, tmp_path / "c", torch_compile=True, torch_compile_backend="eager")
    with pytest.raises(UserError, match="torch_compile with weights of 16 bits"):
        trainer.train()


@pytest.mark.parametrize("estimator", ["weight", "activation"])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_generation_in_evaluation(tmp_path: Path, kind: str, estimator: str) -> None:
    shapes: list[Sequence[int]] = []
    base = make_model(kind)
    model = copy.deepcopy(base)

    def look_at(found: Any) -> dict[str, float]:
        shapes.append(found.predictions.shape)
        return {"rows": float(len(found.predictions))}

    more = {"config": MeZOSeq2SeqConfig, "eval_dataset": pairs(3), "compute_metrics": look_at}
    trainer = make_trainer(
        model,
        tmp_path,
        pairs(8),
        kind=MeZOSeq2SeqTrainer,
        more=more,
        predict_with_generate=True,
        generation_max_length=6,
        eval_strategy="steps",
        eval_steps=2,
        estimator=estimator,
        gradient_accumulation_steps=2,
    )
    trainer.train()
    assert [shape[0] for shape in shapes] == [3, 3]
    assert shown(trainer, "eval_rows") == [3.0, 3.0]
    assert_replayed(base, model, tmp_path, 4)


class Unfinished(torch.utils.data.IterableDataset[Any]):
    """Rows without a length, five of them: half a step is left over at the end of each epoch."""

    def __iter__(self) -> Any:
        return iter(texts(5))


def test_rows_without_a_length(tmp_path: Path) -> None:
    base = make_model("gpt2")
    model = copy.deepcopy(base)
    trainer = make_trainer(
        model,
        tmp_path,
        more={"train_dataset": Unfinished()},
        gradient_accumulation_steps=2,
        per_device_train_batch_size=1,
        max_steps=3,
    )
    trainer.train()
    assert trainer.state.global_step == 3
    assert_replayed(base, model, tmp_path, 3)


@pytest.mark.filterwarnings("ignore")  # theirs, of all kinds
@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "mlflow"])
def test_trackers(tmp_path: Path, tracker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(tracker)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    if tracker == "tensorboard":
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(out / "logs"))
    trainer = make_trainer(make_model("gpt2"), out, report_to=tracker)
    trainer.train()
    assert len(shown(trainer, "grad_norm")) == 4
    assert [path for path in tmp_path.rglob("*") if tracker in str(path) or "events" in path.name]


class Hub:
    """What Trainer asks of a hub, kept in a folder: no network."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.said = folder, list[str]()

    def create_repo(self, name: str, **given: Any) -> Any:
        return SimpleNamespace(repo_id=name)

    def upload_folder(self, *, folder_path: Any, commit_message: str, **given: Any) -> Any:
        place = self.folder / given.get("path_in_repo", ".")
        shutil.copytree(folder_path, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns("checkpoint-*"))  # fmt: skip
        self.said.append(commit_message)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def test_what_is_pushed_to_a_hub_is_the_model_and_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    model = make_model("gpt2")
    base = copy.deepcopy(model)
    given = {"push_to_hub": True, "hub_model_id": "me/tuned", "hub_strategy": "checkpoint"}
    trainer = make_trainer(model, tmp_path / "run", save_strategy="steps", save_steps=2, **given)
    trainer.train()
    assert [said for said in hub.said if "step 2" in said or "step 4" in said]
    trainer.push_to_hub(commit_message="the end")
    assert hub.said[-1] == "the end"
    pushed = type(model).from_pretrained(hub.folder)
    assert jf.fingerprint(pushed) == jf.fingerprint(model)
    assert_replayed(base, model, hub.folder, 4)
    # the checkpoint beside it is one to go on from
    again = make_trainer(copy.deepcopy(base), tmp_path / "again", max_steps=6)
    again.train(resume_from_checkpoint=str(hub.folder / "last-checkpoint"))
    assert_replayed(base, again.model, tmp_path / "again", 6)


def test_the_cache_of_the_device_is_emptied_as_often_as_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emptied: list[int] = []
    monkeypatch.setattr(
        "justforward.trainer.clear_device_cache", lambda: emptied.append(trainer.state.global_step)
    )
    trainer = make_trainer(make_model("gpt2"), tmp_path, torch_empty_cache_steps=2)
    trainer.train()
    assert emptied == [0, 2]


class Filing(Trainer):
    """It files its metrics by the model's mode, as trl's trainers do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.filed: dict[bool, list[bool]] = {True: [], False: []}
        super().__init__(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        found = super().compute_loss(model, inputs, *args, **kwargs)
        self.filed[self.model.training].append(kwargs.get("num_items_in_batch") is not None)
        return found

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        training = self.model.training
        known = {f"evaluating_{name}" if not training else name: value for name, value in logs.items()}  # fmt: skip
        super().log({**known, "filed": float(len(self.filed[training]))}, *args, **kwargs)
        self.filed[training] = []


@pytest.mark.parametrize("training", [False, True])
def test_the_loss_and_the_logs_see_the_mode_that_trainer_has(
    tmp_path: Path, training: bool
) -> None:
    class Mine(MeZOTrainer, Filing):
        pass

    more = {"eval_dataset": texts(4)}
    model = make_model("gpt2").train(training)
    given = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4, "logging_steps": 2}
    ours: Any = make_trainer(model, tmp_path, kind=Mine, more=more, **given)
    ours.train()
    args = TrainingArguments(str(tmp_path / "b"), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", per_device_train_batch_size=2, **given)  # type: ignore[arg-type]  # fmt: skip
    theirs = Filing(make_model("gpt2"), args, train_dataset=texts(10), **more)
    theirs.train()
    kinds = [
        [(sorted(line), line["filed"]) for line in trainer.state.log_history[:-1]]
        for trainer in (ours, theirs)
    ]
    looked = [(keys, n / 2 if "grad_norm" in keys else n) for keys, n in kinds[0]]
    assert looked == kinds[1]
    assert ours.model.training == theirs.model.training


class Drops(nn.Module):
    """A model that drops units by its own flag, in its forward or in another method."""

    def __init__(self, outside: bool) -> None:
        super().__init__()
        self.outside = outside
        self.embed, self.head = nn.Embedding(64, 8), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        found = nn.functional.dropout(self.embed(input_ids), 0.5, self.training).mean(1)
        return {"loss": nn.functional.cross_entropy(self.head(found), labels)}


class DropsOutside(Drops):
    def encode(self, input_ids: Tensor) -> Tensor:
        return nn.functional.dropout(self.embed(input_ids), 0.5, self.training).mean()


@pytest.mark.parametrize("kind", [Drops, DropsOutside])
def test_a_look_has_no_dropout_though_the_model_is_in_training(
    tmp_path: Path, kind: type[Drops]
) -> None:
    seen: list[tuple[bool, float, float]] = []

    class Mine(MeZOTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            def once() -> Tensor:
                loss: Tensor = model(**inputs)["loss"]
                return loss + (model.encode(inputs["input_ids"]) if kind is DropsOutside else 0.0)

            seen.append((model.training, float(once()), float(once())))
            return once()

    torch.manual_seed(0)
    trainer = make_trainer(kind(True), tmp_path, classes(8), kind=Mine)
    trainer.train()
    assert all(one == other for _, one, other in seen)
    # where another method asks for the flag, exactness goes first
    assert {training for training, *_ in seen} == {kind is Drops}
    assert trainer.model.training
    assert not trainer.model._forward_hooks


@pytest.mark.parametrize("adapter", [False, True])
def test_the_model_card_has_the_recipe_that_was_followed(tmp_path: Path, adapter: bool) -> None:
    model = adapted("llama") if adapter else make_model("gpt2")
    trainer = make_trainer(
        model, tmp_path, rule="sign", eps=2e-3, seed=5, blocks="layers", max_grad_norm=2.0
    )
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(model_name="tuned")
    card = (tmp_path / "README.md").read_text()
    (line,) = [line for line in card.splitlines() if "optimizer" in line]
    assert line.startswith(
        "- optimizer: MeZO (forward passes only, justforward) with rule='clip(2.0)+sign', "
    )
    for said in (
        "estimator='weight'",
        "family='gaussian'",
        "eps=0.002",
        "seed=5",
        "blocks='layers'",
        "`trajectory.jfl` beside",
    ):
        assert said in line
    assert "adam" not in card.lower()


# -------------------------------------------------------------------------------------- refusals


def test_arguments_are_looked_at_again_before_training(tmp_path: Path) -> None:
    args = config(tmp_path)
    args.set_dataloader(auto_find_batch_size=True)
    with pytest.raises(UserError, match="auto_find_batch_size is True"):
        MeZOTrainer(make_model("gpt2"), args, train_dataset=texts(4))
    args.auto_find_batch_size = False
    trainer = MeZOTrainer(make_model("gpt2"), args, train_dataset=texts(4))
    args.set_optimizer(name="adafactor")
    with pytest.raises(UserError, match="optim is 'adafactor'"):
        trainer.train()


@pytest.mark.parametrize("event", ["on_train_begin", "on_step_end"])
def test_freezing_when_training_has_begun_is_refused(tmp_path: Path, event: str) -> None:
    class Freezes(TrainerCallback):
        def freeze(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("wte" in name)

    freezes: Any = Freezes()
    setattr(freezes, event, freezes.freeze)
    model = make_model("gpt2")
    trainer = make_trainer(model, tmp_path, more={"callbacks": [freezes]})
    with pytest.raises(UserError, match=r"transformer.wpe.weight was frozen when training had"):
        trainer.train()
    assert trainer.optimizer.steps == (event == "on_step_end")


def test_arguments_must_be_mezos(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"args is a TrainingArguments: .* justforward.MeZOConfig"):
        MeZOTrainer(make_model("gpt2"), TrainingArguments(str(tmp_path), use_cpu=True))


def test_an_optimizer_of_ones_own_is_refused(tmp_path: Path) -> None:
    model = make_model("gpt2")
    for more in (
        {"optimizers": (torch.optim.SGD(model.parameters()), None)},
        {"optimizer_cls_and_kwargs": (torch.optim.SGD, {})},
    ):
        with pytest.raises(UserError, match="optimizers: MeZOTrainer makes its own"):
            make_trainer(model, tmp_path, more=more)

    class Mine(MeZOTrainer):
        def create_optimizer(self, model: Any = None) -> Any:
            self.optimizer = torch.optim.SGD(self.model.parameters())
            return super().create_optimizer(model)

    with pytest.raises(UserError, match="the optimizer is a SGD"):
        make_trainer(model, tmp_path, kind=Mine).train()


def test_processes_without_a_group_and_several_gpus_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several cores of a TPU are processes of which torch.distributed knows nothing."""
    monkeypatch.setattr(MeZOConfig, "world_size", property(lambda self: 2))
    with pytest.raises(UserError, match=r"2 processes were started, and .* \(1\) sees fewer"):
        make_trainer(make_model("gpt2"), tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(MeZOConfig, "n_gpu", property(lambda self: 4))
    with pytest.raises(UserError, match="uses one GPU a process, this one sees 4"):
        make_trainer(make_model("gpt2"), tmp_path)


def test_workers_that_transformers_does_not_see_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun without a GPU: transformers runs as many trainings side by side, unless it is told use_cpu."""
    args = config(tmp_path)
    for said, refused in (("3", True), ("1", False), ("many", False)):
        monkeypatch.setenv("WORLD_SIZE", said)
        if refused:
            with pytest.raises(UserError, match=r"3 processes were started, .* say use_cpu=True"):
                check_workers(args)
        else:
            check_workers(args)


def test_what_accelerate_launch_says_is_refused_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Trainer.create_accelerator_and_postprocess

    def sharded(self: Any) -> None:
        whole(self)
        self.is_fsdp_enabled = True
        self.place_model_on_device = False

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", sharded)
    with pytest.raises(UserError, match="DeepSpeed and FSDP shard"):
        make_trainer(make_model("gpt2"), tmp_path)


# --------------------------------------------------------------------------------- several processes

EPOCH = 11  # rows: six micro-batches of two, the last of which has the first row once more
# As two processes have them, two micro-batches a step: the rows of one, then those of the other.
DEALT = [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 10, 0]
TOGETHER: dict[str, dict[str, Any]] = {
    "weight": {"rule": "sgd", "num_samples": 2},
    "activation": {"rule": "sgd", "estimator": "activation"},
    "classifier": {"rule": "sgd"},
    "classifier's rows": {"rule": "sgd", "estimator": "activation"},
}


def dealt(case: str, parts: int) -> dict[str, Any]:
    """What a training of two epochs is made with, of so many micro-batches a step."""
    return {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": parts,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        **TOGETHER[case],
    }


def dealt_model(case: str) -> Any:
    return small_classifier() if "classifier" in case else make_model("llama")


def dealt_rows(case: str) -> Rows:
    return classes(EPOCH) if "classifier" in case else texts(EPOCH)


class Fails(MeZOTrainer):
    """In process 1 the loss of one step is not a number, or there is none."""

    with_what: Any = math.nan

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.state.global_step == 1 and self.args.process_index == 1:
            if isinstance(self.with_what, Exception):
                raise self.with_what
            return loss * self.with_what
        return loss


class Stumbles(Fails):
    with_what = OSError("no more rows")


def rows_counted(prediction: Any) -> dict[str, float]:
    return {"rows": float(len(prediction.predictions))}


def refused(*args: Any, **changes: Any) -> str:
    with pytest.raises(UserError) as error:
        make_trainer(*args, **changes).train()
    return str(error.value)


def as_torchrun() -> None:
    """Tell this process of the group at hand what torchrun says."""
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")


def trained(folder: Path) -> dict[str, Any]:
    """Trainings of the group at hand; of each what all processes must agree in."""
    as_torchrun()
    found: dict[str, Any] = {}
    for case in TOGETHER:
        trainer = make_trainer(dealt_model(case), folder / case, dealt_rows(case), **dealt(case, 2))
        trainer.train()
        found[case] = (jf.fingerprint(trainer.model), shown(trainer, "loss"))

    out = folder / "resumed"
    common: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "rule": "adam", "max_steps": 6}  # fmt: skip
    prints = []
    for resume in (False, True):
        seen = Prints()
        trainer = make_trainer(make_model("gpt2"), out, more={"callbacks": [seen]}, **common)
        trainer.train(resume_from_checkpoint=resume)
        prints.append(seen.seen)
        dist.barrier()
        if not resume and dist.get_rank() == 0:
            shutil.copyfile(out / "trajectory.jfl", out / "whole")
            for step in (4, 6):
                shutil.rmtree(out / f"checkpoint-{step}")
        dist.barrier()
    found["resumed"] = prints

    for name, only_model in (("best", False), ("best, only", True)):
        trainer = make_trainer(
            make_model("gpt2"),
            folder / name,
            more={"eval_dataset": texts(5, seed=1), "compute_metrics": rows_counted},
            learning_rate=0.5,
            load_best_model_at_end=True,
            eval_strategy="steps",
            save_strategy="steps",
            eval_steps=2,
            save_steps=2,
            save_only_model=only_model,
        )
        trainer.train()
        keys = ("eval_rows", "eval_loss")
        found[name] = (jf.fingerprint(trainer.model), *(shown(trainer, key) for key in keys))

    trainer = make_trainer(make_model("gpt2"), folder / "skipped", kind=Fails)
    trainer.train()
    keys = ("loss", "skipped_steps", "learning_rate")
    found["skipped"] = [
        json.dumps([shown(trainer, key) for key in keys]),
        jf.fingerprint(trainer.model),
    ]

    own = dist.get_rank()
    model, where = make_model("gpt2"), folder / "refused"
    cases: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "model": ((make_model("gpt2", seed=own), where), {}),
        "rows": ((model, where, texts(10 + own)), {}),
        "rule": ((model, where), {"rule": "sgd" if own else "rms"}),
        "looks": ((model, where), {"looks": "one-point"}),
        "modified": ((model, where), {"modified": "variance"}),
        "even": ((model, where), {"accelerator_config": {"even_batches": False}}),
    }
    found["refused"] = {name: refused(*args, **said) for name, (args, said) in cases.items()}
    found["failed"] = None
    try:
        make_trainer(model, where, kind=Stumbles).train()
    except (OSError, UserError) as error:
        found["failed"] = str(error)
    return found


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What two processes have trained together, and where; all that they must agree in they do."""
    folder = tmp_path_factory.mktemp("shared")
    one, two = together(2, tmp_path_factory.mktemp("group"), trained, folder)
    assert isinstance(one, dict), one
    assert isinstance(two, dict), two
    failed = (one.pop("failed"), two.pop("failed"))
    assert one == two
    return folder, {**one, "failed": failed}


@pytest.mark.parametrize("case", sorted(TOGETHER))
def test_two_processes_train_as_one_does(
    shared: tuple[Path, dict[str, Any]], tmp_path: Path, case: str
) -> None:
    """With the same rows in its steps; alone, float32 rounds the sum of the losses and not their rises."""
    folder, found = shared
    rows = dealt_rows(case)
    alone = make_trainer(dealt_model(case), tmp_path, [rows[i] for i in DEALT], **dealt(case, 4))
    alone.train()
    fingerprint, losses = found[case]
    assert losses == pytest.approx(shown(alone, "loss"), rel=1e-5)
    again = dealt_model(case)
    assert jf.replay(again, folder / case / "trajectory.jfl") == 4
    assert jf.fingerprint(again) == fingerprint
    logs = [jf.read_log(out / "trajectory.jfl").steps for out in (folder / case, tmp_path)]
    for mine, theirs in zip(*logs, strict=True):
        assert mine.coefficients == pytest.approx(theirs.coefficients, rel=1e-2, abs=1e-6)


def test_their_log_has_the_bytes_of_one_that_looks_micro_batch_by_micro_batch(
    shared: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    rows, net = texts(EPOCH), make_model("llama")
    opt = jf.MeZO(net, lr=1e-3, seed=42, log=tmp_path / "plain.jfl", **TOGETHER["weight"])
    for places in [range(4), range(4, 6)] * 2:
        micro = [[rows[i] for i in DEALT[2 * place : 2 * place + 2]] for place in places]
        batches = [
            {key: torch.stack([row[key] for row in part]) for key in part[0]} for part in micro
        ]
        items = sum(int(batch["labels"][:, 1:].ne(-100).sum()) for batch in batches)

        def losses(batches: Any = batches, items: int = items) -> Tensor:
            found = [float(net(**batch, num_items_in_batch=items).loss) for batch in batches]
            return torch.tensor(found, dtype=torch.float64) * len(batches)

        size = len(batches)
        opt.apply(opt.combine([opt.look(losses, rows=range(size), of=size)], of=size))
    opt.close()
    log = shared[0] / "weight" / "trajectory.jfl"
    assert log.read_bytes() == (tmp_path / "plain.jfl").read_bytes()


def bits(folder: Path, parts: int) -> str:
    as_torchrun()
    trainer = make_trainer(make_model("llama"), folder, texts(16), **dealt("weight", parts))
    trainer.train()
    return jf.fingerprint(trainer.model)


@pytest.mark.slow
def test_four_processes_have_the_bits_of_two(tmp_path: Path) -> None:
    found, logs = [], []
    for size in (2, 4):
        (tmp_path / f"group{size}").mkdir()
        out = tmp_path / f"run{size}"
        found += together(size, tmp_path / f"group{size}", bits, out, 4 // size)
        logs.append((out / "trajectory.jfl").read_bytes())
    assert found == found[:1] * 6
    assert logs[0] == logs[1]


def test_all_of_them_go_on_from_a_checkpoint(shared: tuple[Path, dict[str, Any]]) -> None:
    folder, found = shared
    whole, rest = found["resumed"]
    assert len(set(whole)) == 6
    assert rest == whole[2:]
    assert (folder / "resumed" / "trajectory.jfl").read_bytes() == (folder / "resumed" / "whole").read_bytes()  # fmt: skip


@pytest.mark.parametrize("name", ["best", "best, only"])
def test_they_score_each_row_once_and_have_the_best_model(
    shared: tuple[Path, dict[str, Any]], name: str
) -> None:
    folder, found = shared
    fingerprint, counted, losses = found[name]
    assert counted == [5.0, 5.0]
    assert losses[0] < losses[1]
    again = make_model("gpt2")
    assert jf.replay(again, folder / name / "trajectory.jfl") == 2
    assert jf.fingerprint(again) == fingerprint
    assert sorted(path.name for path in (folder / name).glob("*.jfl")) == ["trajectory-1.jfl", "trajectory.jfl"]  # fmt: skip


def test_a_loss_that_is_nan_in_one_is_skipped_by_all(shared: tuple[Path, dict[str, Any]]) -> None:
    folder, found = shared
    said, fingerprint = found["skipped"]
    losses, skipped, rates = json.loads(said)
    assert [math.isnan(loss) for loss in losses] == [False, True, False, False]
    assert skipped == [1]
    assert rates == pytest.approx([1e-3, 7.5e-4, 7.5e-4, 5e-4])
    again = make_model("gpt2")
    assert jf.replay(again, folder / "skipped" / "trajectory.jfl") == 3
    assert jf.fingerprint(again) == fingerprint


def test_what_differs_or_cannot_be_shared_is_refused(shared: tuple[Path, dict[str, Any]]) -> None:
    said = shared[1]["refused"]
    assert "workers differ at the start: the fingerprint of the model is" in said["model"]
    assert "data is '10 rows, 2 x 1 a step' in worker 0, '11 rows, 2 x 1 a step'" in said["rows"]
    assert "rule is 'rms(beta=0.9)' in worker 0, 'sgd' in worker 1" in said["rule"]
    for name in ("looks", "modified"):
        assert "modified and one-point estimates cannot be shared by workers" in said[name]
    assert "even_batches=False" in said["even"]


def test_one_that_fails_is_named_by_the_others(shared: tuple[Path, dict[str, Any]]) -> None:
    first, second = shared[1]["failed"]
    assert first == "worker 1 failed in step 1: OSError: no more rows"
    assert second == "no more rows"
