"""`MeZOConfig`: what goes to `MeZO`, and what is refused before anything is loaded."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser, TrainingArguments

from justforward.errors import UserError
from justforward.training_arguments import REFUSED, MeZOConfig, MeZOSeq2SeqConfig
from justforward.variants import Blocks, Modified


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bf16", True),
        ("fp16", True),
        ("bf16_full_eval", True),
        ("fp16_full_eval", True),
        ("deepspeed", {"zero_optimization": {"stage": 3}}),
        ("fsdp", "full_shard"),
        ("parallelism_config", object()),
        ("auto_find_batch_size", True),
        ("neftune_noise_alpha", 5.0),
        ("optim", "adafactor"),
        ("optim_args", "a=1"),
        ("optim_target_modules", ["q_proj"]),
        ("adam_beta1", 0.8),
        ("adam_beta1", 0.0),
        ("adam_beta2", 0.95),
        ("adam_epsilon", 1e-6),
    ],
)
def test_what_has_no_meaning_without_gradients_is_refused(
    tmp_path: Path, name: str, value: Any
) -> None:
    with pytest.raises(UserError, match=re.escape(f"MeZOConfig: {name} is {value!r}: ")) as info:
        MeZOConfig(str(tmp_path), use_cpu=True, **{name: value})
    assert REFUSED[name] in str(info.value)


def test_every_refusal_is_tried_above() -> None:
    mark = test_what_has_no_meaning_without_gradients_is_refused.pytestmark[0]  # type: ignore[attr-defined]
    assert {name for name, _ in mark.args[1]} == set(REFUSED)
    assert set(REFUSED) <= {field.name for field in dataclasses.fields(TrainingArguments)}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"torch_compile": True, "estimator": "activation"}, "torch_compile with estimator"),
        ({"max_skipped_steps": -1}, "max_skipped_steps is -1: it must be at least 0"),
    ],
)
def test_bad_values(tmp_path: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        MeZOConfig(str(tmp_path), use_cpu=True, **given)


@pytest.mark.parametrize(
    ("given", "said"), [({"modified": "wild"}, "form is 'wild'"), ({"blocks": "("}, "blocks")]
)
def test_variants_that_cannot_be_read(tmp_path: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        MeZOConfig(str(tmp_path), use_cpu=True, **given).mezo()


def test_what_is_set_later_is_refused_too(tmp_path: Path) -> None:
    args = MeZOConfig(str(tmp_path), use_cpu=True)
    args.check()
    args.set_dataloader(auto_find_batch_size=True)
    with pytest.raises(UserError, match="auto_find_batch_size is True"):
        args.check()
    args.auto_find_batch_size = False
    args.set_optimizer(name="adafactor")
    with pytest.raises(UserError, match="optim is 'adafactor'"):
        args.check()
    args.optim = MeZOConfig(str(tmp_path), use_cpu=True).optim
    args.max_skipped_steps = -1
    with pytest.raises(UserError, match="max_skipped_steps is -1"):
        args.check()


def test_mixed_precision_said_to_accelerate_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(UserError, match="mixed precision is 'bf16'"):
        MeZOConfig(str(tmp_path), use_cpu=True)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_checkpointing_of_activations_has_no_effect(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from justforward import training_arguments

    said: list[str] = []
    monkeypatch.setattr(training_arguments.logger, "warning", said.append)
    args = MeZOConfig(str(tmp_path), use_cpu=True, **{name: True})
    assert not args.activation_checkpointing
    assert said == [
        f"{name} is for backpropagation: a look keeps no activations, so it has no effect"
    ]


def test_what_goes_to_mezo(tmp_path: Path) -> None:
    args = MeZOConfig(
        str(tmp_path),
        use_cpu=True,
        learning_rate=1e-4,
        weight_decay=0.1,
        seed=3,
        rule="rms+momentum",
        max_grad_norm=2.0,
        blocks="embed .",
        block_order="random",
    )
    found = args.mezo()
    assert found["lr"] == 1e-4
    assert found["weight_decay"] == 0.1
    assert found["seed"] == 3
    assert found["rule"] == "clip(2.0)+rms+momentum"
    assert found["blocks"] == Blocks(("embed", "."), "random")
    assert found["modified"] is None
    args.modified = "expectation"
    assert args.mezo()["modified"] == Modified("expectation")


def test_a_config_is_arguments_like_any(tmp_path: Path) -> None:
    """Read from a command line, copied, saved as JSON; the defaults do not refuse themselves."""
    line = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--rule", "sgd", "--eps", "0.01"]
    (args,) = HfArgumentParser(MeZOConfig).parse_args_into_dataclasses(line)
    assert (args.rule, args.eps, args.learning_rate) == ("sgd", 0.01, 1e-3)
    again = dataclasses.replace(args)
    assert again.to_json_string() == args.to_json_string()
    both = MeZOSeq2SeqConfig(str(tmp_path), use_cpu=True, predict_with_generate=True, rule="sign")
    assert both.mezo()["rule"] == "sign"
    assert both.max_grad_norm == 0.0
    assert both.logging_nan_inf_filter is False
