"""The planner: counts, bytes alive, the heap, what fits, and what fresh processes take."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BertConfig,
    DebertaV2Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
    RobertaConfig,
    SwitchTransformersConfig,
    T5Config,
)

import justforward.fits as fits
from justforward import cli, machine, shown, skeleton
from justforward.alive import traced
from justforward.config import TrainConfig
from justforward.errors import UserError
from justforward.fits import plan
from justforward.fits import size as spelled
from justforward.heap import LOST, Heap, taken
from justforward.limits import MOST_ROWS, account_of, process_of
from justforward.machine import Device, Overhead, parse_rate, parse_size
from justforward.models import auto_class, kind_of
from justforward.rehearse import METHODS, Method, Settings, Stage, Tokens
from justforward.skeleton import Plan, build, count, held_bytes, quantise, read_plan, round_maps
from justforward.stored import packed_in
from justforward.tuners import attach
from test_gguf import kept, write_gguf

SMALL: dict[str, Any] = {
    "opt": OPTConfig(vocab_size=199, hidden_size=16, word_embed_proj_dim=16, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=96),
    "gpt2": GPT2Config(vocab_size=199, n_embd=16, n_layer=2, n_head=2, n_positions=96),
    "llama": LlamaConfig(vocab_size=199, hidden_size=16, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=96),
    "bert": BertConfig(vocab_size=199, hidden_size=16, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=96),
    "t5": T5Config(vocab_size=199, d_model=16, d_ff=48, num_layers=2, num_heads=2, d_kv=8),
}  # fmt: skip
NAMES = sorted(SMALL)
SOURCES = dict.fromkeys(("memory", "bandwidth", "flops", "sweep", "overhead"), "given")


def small(name: str) -> Plan:
    return Plan(name, SMALL[name], kind_of(name, SMALL[name]))


def some(*names: str) -> tuple[Method, ...]:
    return tuple(method for method in METHODS if method.name in names)


SOME = some(
    "evaluation", "MeZO, weight space", "MeZO, activation space", "AdamW", "AdamW, checkpointing"
)


def device(memory: int = 10**12, kind: Any = "gpu") -> Device:
    return Device(kind, memory, 1e11, 1e12, 1e-10, Overhead(0, 0), SOURCES)


# ---------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_a_real_model(name: str) -> None:
    what = small(name)
    real = auto_class(what.kind).from_config(what.config)
    counted = count(build(what, torch.float32))
    assert counted.total == sum(p.numel() for p in real.parameters())
    assert counted.tied == (
        real.get_output_embeddings().weight is real.get_input_embeddings().weight
    )
    assert held_bytes(build(what, torch.float32)) == held_bytes(real)
    assert counted.vectors == sum(p.numel() for p in real.parameters() if p.dim() < 2)


@pytest.mark.parametrize("tuner", ["lora", "prefix"])
def test_trainable_weights_are_those_of_a_real_tuner(tuner: Any) -> None:
    what = small("llama")
    config = TrainConfig(
        model="", data="", out="", tuner=tuner, lora_rank=3, prefix_length=4, start="base"
    )
    real = attach(auto_class("causal").from_config(what.config).eval(), Tokens(what.config), config)  # type: ignore[arg-type]
    stage = Stage(Settings(what, lora_rank=3, prefix_length=4))
    found = stage.run(next(m for m in METHODS if m.tuner == tuner), 2, 8)
    assert found.trainable == sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert found.weights == held_bytes(real)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("opt-125m", 125_239_296), ("OPT-350m", 331_196_416), ("opt-1.3b", 1_315_758_080)],
)
def test_the_family_has_the_sizes_of_its_checkpoints(name: str, parameters: int) -> None:
    assert count(build(read_plan(name), torch.float16)).total == parameters


def test_rounded_maps_take_their_bits() -> None:
    plain = build(small("llama"), torch.float32)
    maps = sum(m.weight.numel() for n, m in plain.named_modules() if n.endswith("_proj"))
    outputs = sum(m.weight.shape[0] for n, m in plain.named_modules() if n.endswith("_proj"))
    for quantize, held in (
        ("int8", maps + 4 * outputs),
        ("bnb8", maps + 4 * outputs),
        ("bnb4", maps // 2 + 4 * -(-maps // 64)),
    ):
        model = build(small("llama"), torch.float32)
        round_maps(model, quantize)
        expected = held_bytes(plain) - 4 * maps + held
        assert abs(held_bytes(model) - expected) <= (
            4 * 21 if quantize == "bnb4" else 0
        )  # a started block a map
    with pytest.raises(UserError, match="knows no linear map"):
        round_maps(build(small("gpt2"), torch.float32), "int8")


# ----------------------------------------------------------------------------------------------- alive


def test_what_is_alive_is_followed_to_its_end() -> None:
    x = torch.empty(10, 100, device="meta")
    with traced() as trace:
        a = x + 1.0  # 4,000 bytes
        b = a.sum(1)  # 40 more
        del a
        c = x[:5].t()  # a view
        d = c @ x[5:, :5]  # 100 x 5: does not fit the shapes of values, but those of bytes
        d.add_(1.0)
    assert trace.alive().tolist() == [0, 4000, 4040, 40, 2040]
    assert trace.peak == 4040
    assert trace.flops == 2 * 100 * 5 * 5
    assert len(trace.left) == 2
    del b, d
    assert trace.peak == 4040


def test_values_that_are_asked_for_are_none() -> None:
    x = torch.ones(3, device="meta")
    with traced():
        assert not bool((x > 0).all())
        assert x.sum().item() == 0
    assert torch.tensor(2.0).item() == 2.0


@pytest.mark.parametrize("name", NAMES)
def test_more_is_alive_with_a_backward_pass(name: str) -> None:
    stage = Stage(Settings(small(name), keep_best=False))
    peaks = {m.name: stage.run(m, 3, 24).trace.peak for m in METHODS if m.tuner == "full"}
    assert peaks["evaluation"] == peaks["MeZO, weight space"] < peaks["MeZO, activation space"]
    assert peaks["evaluation"] < peaks["SGD"] < peaks["AdamW"]
    assert peaks["SGD, checkpointing"] <= peaks["SGD"]


def test_a_gradient_and_two_moments_a_weight() -> None:
    stage = Stage(Settings(small("llama")))
    by_name = {m.name: stage.run(m, 2, 8) for m in METHODS if m.tuner == "full"}
    weights = 4 * by_name["AdamW"].trainable
    assert by_name["AdamW"].kept == weights  # the best so far
    assert by_name["AdamW"].made == 2 * weights
    assert by_name["AdamW"].trace.peak >= 3 * weights
    assert by_name["SGD"].trace.peak >= weights
    kept = (
        by_name["MeZO, weight space, adam with kept moments"].kept
        - by_name["MeZO, weight space"].kept
    )
    assert kept == 2 * weights
    assert by_name["MeZO, weight space"].kept == sum(
        -(-p.numel() // 1024) for p in build(small("llama"), torch.float32).parameters()
    )


# ------------------------------------------------------------------------------------------------ heap


@given(st.lists(st.tuples(st.integers(1, 1 << 22), st.integers(0, 40)), max_size=60))
def test_pieces_of_a_heap_never_overlap(steps: list[tuple[int, int]]) -> None:
    heap, held, alive, most = Heap(), {}, 0, 0
    for number, (size, drop) in enumerate(steps):
        heap.take(number, size)
        held[number] = size
        alive += size
        most = max(most, alive)
        places = sorted(heap._places.values())
        assert all(a + n <= b for (a, n), (b, _) in pairwise(places))
        assert heap.peak >= most
        if drop in held:
            heap.give(drop)
            alive -= held.pop(drop)
    for piece in held:
        heap.give(piece)
    lost = heap._taken // LOST * 64
    assert heap._end - sum(size for size, _ in heap._free) <= lost  # nothing else is missing
    assert heap._mapped == 0


def test_a_hole_serves_again_and_a_pinned_one_is_lost() -> None:
    kib = 1024
    assert taken([(0, 64 * kib), (0, -1), (1, 64 * kib)]) == 64 * kib + 128
    # 96 KiB do not fit where 64 were, because something still lies behind them
    assert taken([(0, 64 * kib), (1, 64), (0, -1), (2, 96 * kib)]) == 160 * kib + 192


def test_the_heap_starts_where_earlier_frees_have_left_it() -> None:
    kib = 1024
    steps = [(0, 500 * kib), (1, 64), (0, -1), (2, 600 * kib)]
    assert taken(steps) == 600 * kib + 192  # pages of their own, given back
    # from the heap: the hole is too small, and something lies behind it
    assert taken(steps, threshold=1 << 20) == 1100 * kib + 192
    pairs = [(n, 4 * kib) for n in range(64)]
    freed = [(n, -1) for n in range(64)]
    again = [*pairs, *freed, (99, 250 * kib)]
    torn, whole = (taken(again, 1 << 20, graphed) for graphed in (True, False))
    assert whole < torn  # nothing of a graph lies between the pieces


def test_a_process_is_measured_with_a_tokenizer_and_what_draws() -> None:
    without, many = machine.measure_overhead(), machine.measure_overhead(tokens=60_000)
    assert many.base > without.base
    # without one it is what imports happen to have freed
    assert min(many.threshold, without.threshold) > machine.START
    over = Overhead(100, 7, 30)
    here = replace(device(kind="cpu"), overhead=over)
    for method in METHODS:
        looks = method.way in ("weight", "activation")
        expected = 7 if looks else 30 if method.tuner == "lora" else 0
        assert process_of(method, here) == 100 + expected


# ------------------------------------------------------------------------------------------- accounts


@settings(max_examples=4, deadline=None)
@given(
    st.sampled_from(NAMES),
    st.integers(0, 14),
    st.integers(1, 9),
    st.integers(3, 40),
    st.integers(1, 60),
    st.integers(1, 96),
)
def test_an_account_is_what_a_rehearsal_says_elsewhere(
    name: str, which: int, rows: int, length: int, other: int, longer: int
) -> None:
    stage, method = Stage(Settings(small(name))), METHODS[which]
    try:
        account = account_of(stage, method, rows, length, device())
    except UserError:
        return  # a prefix for BERT
    assert account.of_rows(rows) == stage.run(method, rows, length).trace.peak
    assert account.of_length(length) == account.of_rows(rows)
    if other > 1:
        assert account.of_rows(other) == stage.run(method, other, length).trace.peak
    assert account.of_length(longer) == stage.run(method, rows, longer).trace.peak


@settings(max_examples=40, deadline=None)
@given(st.integers(10**4, 10**8), st.integers(10**4, 10**8), st.sampled_from([0, 3, 8, 9]))
def test_more_memory_never_fits_less(one: int, two: int, which: int) -> None:
    account = _account(which)
    less, more = sorted((one, two))
    assert account.most_rows(less) <= account.most_rows(more)
    assert account.longest(less, 96) <= account.longest(more, 96)
    for found, at in (
        (account.most_rows(less), account.at_rows),
        (account.longest(less, 96), account.at_length),
    ):
        assert not found or at(found) <= less
        assert found in (96, MOST_ROWS) or at(found + 1) > less


_ACCOUNTS: dict[int, Any] = {}


def _account(which: int) -> Any:
    if which not in _ACCOUNTS:
        _ACCOUNTS[which] = account_of(
            Stage(Settings(small("opt"))), METHODS[which], 4, 20, device()
        )
    return _ACCOUNTS[which]


def test_what_is_said_to_fit_does_and_one_more_does_not() -> None:
    here = device(700_000)
    found = plan(small("llama"), batch_size=4, length=24, device=here, methods=SOME)
    for row, method in zip(found.rows, SOME, strict=True):
        assert row.fits == (row.memory <= here.memory)
        assert row.memory == row.weights + row.kept + row.working + row.process
        assert row.largest_batch > 2
        for rows, fit in ((row.largest_batch, True), (row.largest_batch + 1, False)):
            again = plan(
                small("llama"),
                batch_size=rows,
                length=24,
                device=here,
                methods=(method,),
                limits=False,
            )
            assert again.rows[0].fits == fit


@settings(max_examples=6, deadline=None)
@given(st.sampled_from(NAMES), st.sampled_from([0, 3, 8]), st.integers(1, 40), st.integers(15, 60))
def test_what_fits_a_cpu_does_by_its_own_forecast(
    name: str, which: int, asked: int, tenths: int
) -> None:
    stage, method = Stage(Settings(small(name))), METHODS[which]
    here = device(kind="cpu")
    memory = account_of(stage, method, 30, 24, here, limits=False).at_rows(30) * tenths // 10
    account = account_of(stage, method, asked, 24, here)
    found = account.most_rows(memory)

    def at(rows: int) -> int:
        return account_of(stage, method, rows, 24, here, limits=False).at_rows(rows)

    assert found == 0 or at(found) <= memory
    assert any(at(more) > memory for more in range(found + 1, found + 2 + found // 200))
    other = account_of(stage, method, 8, 24, here)
    assert other.most_rows(memory) == found or asked == 1


def test_advice_names_what_fits() -> None:
    whole = plan(small("opt"), length=64, device=device(), methods=SOME, limits=False)
    memory = whole.row("AdamW").memory - 1
    found = plan(small("opt"), length=64, device=device(memory), methods=SOME)
    (said,) = [line for line in found.advice if line.startswith("AdamW:")]
    assert f"a batch of {found.row('AdamW').largest_batch}" in said
    assert "AdamW, checkpointing" in said
    assert not [line for line in found.advice if line.startswith("evaluation")]
    none = plan(small("opt"), length=64, device=device(10), methods=SOME)
    assert all(row.largest_batch == row.largest_length == 0 for row in none.rows)
    assert any("whatever the batch" in line for line in none.advice)
    disk = "--offload FOLDER, which keeps its weights on a disk"
    assert not any(disk in line for line in none.advice)  # which is no GPU's
    none = plan(small("opt"), length=64, device=device(10, "cpu"), methods=SOME)
    for line in none.advice:
        assert line.endswith(disk) is line.startswith(("MeZO, weight", "MeZO, activation")), line


def test_advice_names_half_the_memory_for_weights_where_they_then_fit() -> None:
    def plan_in(memory: int, dtype: str) -> Any:
        return plan(small("opt"), length=64, device=device(memory), methods=SOME, dtype=dtype)

    row = plan_in(10, "float32").row("MeZO, weight space")
    there = row.weights // 2 + row.kept + row.process
    said = f"--dtype bfloat16, in which the weights take {spelled(row.weights // 2)}"
    advised = [line for line in plan_in(there, "float32").advice if said in line]
    assert {line.partition(":")[0] for line in advised} >= {"evaluation", "MeZO, weight space"}
    assert all(line.startswith(("MeZO", "evaluation")) for line in advised)
    for found in (plan_in(there - 1, "float32"), plan_in(there // 2, "bfloat16")):
        assert not any("--dtype" in line for line in found.advice if line.startswith("MeZO, w"))


def test_a_step_that_does_not_fit_may_in_parts() -> None:
    method = some("MeZO, activation space")
    whole = plan(small("opt"), length=64, device=device(), methods=method, limits=False)
    found = plan(small("opt"), length=64, device=device(whole.rows[0].memory - 1), methods=method)
    (said,) = found.advice
    largest = found.rows[0].largest_batch
    assert 0 < largest < 8
    assert f"--rows-at-once {largest}," in said


def test_seconds_follow_the_device() -> None:
    twice = replace(device(), bandwidth=2e11, flops=2e12, sweep=0.5e-10)
    slow, fast = (
        plan(small("opt"), device=here, length=16, methods=SOME, limits=False)
        for here in (device(), twice)
    )
    for one, two in zip(slow.rows, fast.rows, strict=True):
        assert one.seconds == pytest.approx(2 * two.seconds)
    flops = {row.method: row.flops for row in slow.rows}
    assert flops["MeZO, weight space"] == 2 * flops["evaluation"]
    assert flops["AdamW"] == pytest.approx(3 * flops["evaluation"], rel=0.05)
    # layers run again, the head does not, and of the last layer only what its gradients need
    assert 3.5 * flops["evaluation"] < flops["AdamW, checkpointing"] < 4 * flops["evaluation"]


def test_sixteen_bits_halve_the_weights() -> None:
    given: dict[str, Any] = {
        "device": device(kind="cpu"),
        "length": 16,
        "methods": SOME[:3],
        "limits": False,
    }
    whole = plan(small("llama"), **given)
    half = plan(small("llama"), dtype="bfloat16", **given)
    assert half.row("evaluation").weights == pytest.approx(
        whole.row("evaluation").weights / 2, rel=0.01
    )
    refused = "backpropagation does not tune 16-bit weights here"
    assert {half.row(method.name).why_not for method in SOME[:3]} <= {None, refused}
    assert any("computed with in float32" in said for said in half.assumed)


def test_quantised_bases_take_adapters_only() -> None:
    found = plan(small("llama"), device=device(), length=16, quantize="int8", limits=False)
    assert {row.method for row in found.rows if row.why_not} == {
        m.name for m in METHODS if m.tuner == "full" and m.way != "evaluation"
    }


# ---------------------------------------------------------------------------------------------- models


def test_an_unknown_architecture_is_stood_in_for_and_said(tmp_path: Path) -> None:
    sizes = {"model_type": "novel", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    for src in (tmp_path, tmp_path / "config.json"):
        found = plan(str(src), device=device(), length=16, methods=SOME[:1], limits=False)
        assert "'novel' is not known" in found.assumed[0]
        assert (
            "Llama of 2 layers, hidden size 32, 4 heads, feed-forward size 128" in found.assumed[0]
        )
        assert found.parameters.embedding == 3200
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "novel", "n_embd": 32}))
    with pytest.raises(UserError, match="does not say num_hidden_layers, vocab_size"):
        read_plan(str(tmp_path))


def test_a_model_that_cannot_be_run_without_weights_is_stood_in_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = Stage.run

    def run(self: Stage, *given: Any) -> Any:
        if self.settings.stand_in is None:
            raise RuntimeError("needs a kernel")
        return own(self, *given)

    monkeypatch.setattr(Stage, "run", run)
    found = plan(small("gpt2"), device=device(), length=16, methods=SOME, limits=False)
    assert "gpt2 model cannot be run without its weights (needs a kernel)" in found.assumed[0]
    assert found.parameters.total == count(build(small("gpt2"), torch.float32)).total


def test_what_is_held_is_the_models_own_where_another_runs_in_its_place() -> None:
    config = SwitchTransformersConfig(vocab_size=199, d_model=16, d_ff=48, num_layers=2, num_heads=2, d_kv=8, num_experts=4)  # fmt: skip
    what = Plan("switch", config, "seq2seq")
    found = plan(what, device=device(), length=16, limits=False)
    real = auto_class("seq2seq").from_config(config)
    own = sum(p.numel() for p in real.parameters())
    assert found.row("evaluation").weights == held_bytes(real)
    assert found.row("MeZO, weight space").trainable == own
    assert found.row("AdamW").kept == 2 * 4 * own  # two moments
    assert found.row("AdamW").working > 4 * own  # gradients among what a step has alive
    assert "an encoder-decoder" in str(found.row("AdamW, prefix").why_not)
    assert found.stand_in is not None
    assert f"where the model has {own:,}" in found.stand_in
    text = shown.spell_fits(found).splitlines()
    assert text[1] == f"STAND-IN, NOT THE MODEL: {found.stand_in}"


MIXTURE = MixtralConfig(vocab_size=199, hidden_size=16, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, max_position_embeddings=96)  # fmt: skip


def test_a_mixture_of_experts_is_planned_as_it_runs() -> None:
    what = Plan("mixtral", MIXTURE, "causal")
    for dtype in ("float32", "bfloat16"):
        found = plan(what, device=device(kind="cpu"), length=16, dtype=dtype, limits=False)
        assert found.stand_in is None
        assert found.row("evaluation").weights == held_bytes(build(what, getattr(torch, dtype)))
    real = auto_class("causal").from_config(MIXTURE)
    assert found.row("MeZO, weight space").trainable == sum(p.numel() for p in real.parameters())


@pytest.mark.parametrize("turned", [False, True])
def test_products_of_experts_make_what_they_make_of_numbers(turned: bool) -> None:
    made = []
    for where in ("cpu", "meta"):
        x = torch.ones(6, 64, device=where, requires_grad=True)
        w = torch.ones(*((4, 32, 64) if turned else (4, 64, 32)), device=where, requires_grad=True)
        offsets = torch.tensor([1, 3, 4, 6], dtype=torch.int32, device=where)
        with traced() as trace:
            y = torch.nn.functional.grouped_mm(x, w.mT if turned else w, offs=offsets)
            (y * y).sum().backward()
        made.append([(t.shape, t.stride(), t.untyped_storage().nbytes()) for t in (y, x.grad, w.grad) if t is not None])  # fmt: skip
    assert made[0] == made[1]
    assert trace.flops == 3 * 2 * 6 * 64 * 32
    assert trace.peak < 2 * 4 * (w.numel() + 4 * x.numel())


def test_a_folder_needs_no_weights(tmp_path: Path) -> None:
    SMALL["opt"].save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"architectures": ["OPTForCausalLM"]}))
    found = read_plan(str(tmp_path))
    assert (found.kind, found.context) == ("causal", 96)
    with pytest.raises(UserError, match="no such folder"):
        read_plan(str(tmp_path / "none"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        read_plan(str(tmp_path))


LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **{k: v for k, v in SMALL["llama"].to_dict().items() if k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")}}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("vocab_size", 0, "vocab_size is 0"),
        ("pad_token_id", 300, "pad_token_id is 300, and there are 199 tokens"),
        ("num_key_value_heads", 3, "num_key_value_heads is 3, which does not divide"),
        ("model_type", ["a"], r"model_type is \['a'\]"),
        ("architectures", [None], r"architectures is \[None\]"),
        ("architectures", "LlamaForCausalLM", "architectures is 'LlamaForCausalLM'"),
    ],
)
def test_what_a_configuration_contradicts_is_named(
    key: str, value: Any, said: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {key: value}))
    with pytest.raises(UserError, match=rf"config\.json: {said}"):
        plan(str(tmp_path), device=device(), length=16, batch_size=2, limits=False)


def test_a_method_that_does_not_go_leaves_the_others() -> None:
    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8)
    found = plan(Plan("mamba", config, "causal"), device=device(), length=16, limits=False)
    assert "do not all keep keys and values" in str(found.row("AdamW, prefix").why_not)
    assert found.row("AdamW").why_not is found.stand_in is None
    masked = DebertaV2Config(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)  # fmt: skip
    found = plan(Plan("deberta", masked, "masked"), device=device(), length=16, limits=False)
    assert "do not all keep keys and values" in str(found.row("AdamW, prefix").why_not)
    assert found.row("MeZO, weight space").why_not is found.stand_in is None
    found = plan(small("llama"), device=device(), length=16, lora_targets="(", limits=False)
    assert "--lora-targets is '(': no regular expression" in str(found.row("AdamW, LoRA").why_not)
    assert found.row("AdamW").why_not is None


def test_quantisation_that_train_refuses_is_refused() -> None:
    for name, quantize, dtype, said in (
        ("llama", "int8", "bfloat16", "--dtype is 'bfloat16'"),
        ("t5", "int8", "float32", "an encoder-decoder"),
        ("llama", "gguf", "float32", "--quantize is 'gguf': .* give the path of one"),
    ):
        with pytest.raises(UserError, match=said):
            plan(small(name), device=device(), length=16, quantize=quantize, dtype=dtype)


# -------------------------------------------------------------------------------- a .gguf as it is stored


def whole_matrices(config: Any) -> Any:
    """A small model whose matrices are whole numbers of blocks."""
    torch.manual_seed(0)
    return auto_class("causal").from_config(config).eval()


GGUFS: dict[str, tuple[Any, list[str]]] = {
    "llama": (LlamaConfig(vocab_size=340, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=96, tie_word_embeddings=False), ["Q8_0", "Q4_1"]),
    "tied": (LlamaConfig(vocab_size=340, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=96, tie_word_embeddings=True), ["Q4_0"]),
    "gpt2": (GPT2Config(vocab_size=340, n_embd=64, n_layer=2, n_head=2), ["Q8_0", "F32", "F16"]),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", GGUFS)
def test_a_gguf_is_planned_as_it_is_kept(name: str, tmp_path: Path) -> None:
    config, forms = GGUFS[name]
    path = write_gguf(whole_matrices(config), tmp_path / "m.gguf", forms)
    real = kept(path, tmp_path / "folder")
    what = read_plan(str(path), "gguf")
    drawn = build(what, torch.float32)
    quantise(drawn, what, "gguf")
    ours, theirs = (dict(m.named_parameters(remove_duplicate=False)) for m in (drawn, real))
    assert ours.keys() == theirs.keys()
    for key, p in theirs.items():
        packed, held = packed_in(ours[key]), packed_in(p)
        assert ours[key].shape == p.shape
        assert (packed is None) == (held is None)
        if packed is not None and held is not None:
            assert (packed.nbytes, packed.form, packed.transposed) == (held.nbytes, held.form, held.transposed)  # fmt: skip
    assert held_bytes(drawn) == held_bytes(real)
    assert held_bytes(drawn) < (0.8 if "F32" in forms else 0.5) * held_bytes(build(what, torch.float32))  # fmt: skip
    found = plan(str(path), device=device(kind="cpu"), length=16, quantize="gguf", limits=False)
    assert found.stand_in is None
    assert {row.method for row in found.rows if row.why_not} == {
        m.name for m in METHODS if m.tuner == "full" and m.way != "evaluation"
    }
    assert found.row("evaluation").weights == held_bytes(real)
    assert any("mapped from the file" in said for said in found.assumed)
    with pytest.raises(UserError, match="unpacks on a CPU: give --device cpu"):
        plan(str(path), device=device(kind="gpu"), length=16, quantize="gguf")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_packed_matrix_is_alive_only_while_it_is_used(tmp_path: Path) -> None:
    config = LlamaConfig(
        **GGUFS["tied"][0].to_dict() | {"vocab_size": 340, "intermediate_size": 4096}
    )
    path = write_gguf(whole_matrices(config), tmp_path / "m.gguf", ["Q8_0"])
    what = read_plan(str(path), "gguf")
    largest = 4 * 64 * 4096
    peaks = {}
    for quantize, stage in (
        ("gguf", Stage(Settings(what, quantize="gguf"))),
        (None, Stage(Settings(replace(what, header=None)))),
    ):
        for method in some("evaluation", "MeZO, LoRA, weight space", "AdamW, LoRA"):
            trace = stage.run(method, 2, 8).trace
            assert trace.left == [] or method.first_order
            peaks[quantize, method.name] = trace.peak
    for name in ("evaluation", "MeZO, LoRA, weight space", "AdamW, LoRA"):
        more = peaks["gguf", name] - peaks[None, name]
        # one matrix, not the eighteen of the model; the room of one is there while nothing is multiplied, too
        assert 0 < more <= 1.2 * largest, name


def test_what_is_no_gguf_is_not_planned_as_one(folder: str) -> None:
    with pytest.raises(
        UserError, match=r"--quantize is 'gguf': .* this is none: give the path of one"
    ):
        plan(folder, device=device(kind="cpu"), length=16, quantize="gguf")


def test_positions_of_a_padding_are_no_context() -> None:
    sizes = SMALL["bert"].to_dict() | {"model_type": "roberta", "pad_token_id": 1}
    assert Plan("roberta", RobertaConfig(**sizes), "masked").context == 94
    assert small("bert").context == 96


def test_a_length_beyond_the_context_is_refused() -> None:
    with pytest.raises(UserError, match="context of 96 tokens"):
        plan(small("opt"), length=97, device=device())


# ----------------------------------------------------------------------------------- device and command


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("80GB", 80 * 10**9),
        ("80GiB", 80 * 2**30),
        ("1.5 TB", 15 * 10**11),
        ("512MiB", 2**29),
        ("1e9", 10**9),
        ("7B", 7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, "--memory") == size


@pytest.mark.parametrize(
    "text", ["", "GB", "80gb?", "-1GB", "1.2.3GB", "nan", "0GB", "1e999", "80 XB"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--memory is "):
        parse_size(text, "--memory")


def test_a_number_alone_is_hardly_bytes() -> None:
    with pytest.raises(UserError, match=r"--memory is '80', which is bytes: .* such as 80GB"):
        parse_size("80", "--memory")
    assert parse_size("1000000", "--memory") == 10**6


def test_rates() -> None:
    assert parse_rate("2TB/s", "--bandwidth") == 2e12
    assert parse_rate("312 TFLOP/s", "--flops") == parse_rate("312T", "--flops") == 312e12
    for text in ("fast", "0", "-1T", ""):
        with pytest.raises(UserError, match="--flops is "):
            parse_rate(text, "--flops")


def test_what_is_not_given_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_SECONDS", 0.01)
    found = machine.device_of("cpu", memory="1GB", overhead="1MB")
    assert (found.memory, found.overhead.base) == (10**9, 10**6)
    assert found.bandwidth > 1e8
    assert found.flops > 1e8
    assert 0 < found.sweep < 1e-6
    assert found.sources["memory"] == "given"
    assert "measured here" in found.sources["bandwidth"]


GIVEN = [
    "--device",
    "gpu",
    "--memory",
    "2MB",
    "--bandwidth",
    "100GB/s",
    "--flops",
    "1T",
    "--length",
    "16",
]


@pytest.fixture
def folder(tmp_path: Path) -> str:
    config = LlamaConfig(**SMALL["llama"].to_dict())
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_the_command(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fits", folder, *GIVEN, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"]["total"] == count(build(small("llama"), torch.float32)).total
    assert [row["method"] for row in found["rows"]] == [m.name for m in METHODS]
    rows = {row["method"]: row for row in found["rows"]}
    again = plan(folder, device=device(2_000_000), length=16, methods=SOME, limits=False)
    text = shown.spell_fits(again)
    for row in again.rows:
        assert rows[row.method]["memory"] == row.memory
        (line,) = [line for line in text.splitlines() if line.startswith(row.method + "  ")]
        assert fits.size(row.memory) in line
        assert "…" not in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--memory", "much"], "--memory is 'much'"),
        (["--flops", "fast"], "--flops is 'fast'"),
        (["--length", "0"], "--length is 0"),
        (["--length", "97"], "--length is 97"),
        (["--dtype", "int4"], "'int4' is not one of"),
        (["--plot", "x.pdf"], "--plot is 'x.pdf'"),
        (["--plot", "/none/x.png"], "there is no folder /none"),
    ],
)
def test_errors_are_one_line(
    folder: str, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["fits", folder, *GIVEN, *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_a_model_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fits"]) == 2
    assert "MODEL" in capsys.readouterr().err


def test_the_plot_is_of_the_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(skeleton.OPT, "opt-1m", (2, 2, 16))
    monkeypatch.setitem(skeleton.OPT, "opt-2m", (3, 2, 32))
    like = plan("opt-1m", device=device(), length=16, batch_size=2, limits=False)
    points = shown.plot_family(tmp_path / "p.svg", like, ("opt-1m", "opt-2m"))
    assert points["evaluation"][0] == (like.parameters.total, like.row("evaluation").memory)
    assert all(a < b for line in points.values() for a, b in zip(line[0], line[1], strict=True))
    assert (tmp_path / "p.svg").read_text().startswith("<?xml")
    assert list(tmp_path.iterdir()) == [tmp_path / "p.svg"]


# ------------------------------------------------------------------------------------- fresh processes


def benchmark() -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks" / "fits.py"
    spec = importlib.util.spec_from_file_location("benchmark_fits", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _check(name: str, method: str) -> None:
    bench = benchmark()
    packed = name == bench.PACKED
    what: Any = "smollm2" if packed else name
    if what != "smollm2":
        config = bench.config_of(name)
        what = Plan(name, config, kind_of(name, config))
    tokens = bench.TOKENS if what == "smollm2" else 0
    here = replace(device(kind="cpu"), overhead=machine.measure_overhead(packed, tokens))
    (chosen,) = [m for m in METHODS if m.name == method]
    found = plan(
        what,
        batch_size=bench.ROWS,
        length=bench.LENGTH,
        device=here,
        quantize="gguf" if packed else None,
        methods=(chosen,),
        limits=False,
    )
    if found.rows[0].why_not is not None:
        assert packed
        assert chosen.tuner == "full"
        return
    seen = bench.measured(name, method)
    assert found.rows[0].memory == pytest.approx(seen["bytes"], rel=0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is played through as glibc has it")
@pytest.mark.filterwarnings("ignore")
def test_a_fresh_process_takes_what_is_predicted() -> None:
    _check("small", "AdamW")


# By 12 to 20 %: known, and not understood well enough to be predicted.
TOO_LITTLE = {
    ("gpt2", "AdamW, LoRA, checkpointing"),
    ("smollm2-gguf", "AdamW, LoRA"),
    ("smollm2-gguf", "AdamW, prefix"),
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is played through as glibc has it")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", [m.name for m in METHODS])
@pytest.mark.parametrize("name", ["smollm2", "smollm2-gguf", "llama", "opt", "gpt2", "bert"])
def test_every_method_takes_what_is_predicted(
    name: str, method: str, request: pytest.FixtureRequest
) -> None:
    if (name, method) in TOO_LITTLE:
        reason = "a heap that is torn more than it is played through (docs/fits.md)"
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    _check(name, method)
