"""A .gguf as it is stored: the values that the conversion makes, kept as blocks, and a run like any other.

Reading order: kernels, whole models against transformers' own conversion, operations, runs, what is refused.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import justforward as jf
from conftest import make_tokenizer
from justforward import blocks, cli, mapped, stored, tuners
from justforward.baselines import run_baseline
from justforward.config import BaselineConfig, EvalConfig, ReplayConfig, TrainConfig
from justforward.errors import UserError
from justforward.folder import RunFolder
from justforward.models import load_model, save_model
from justforward.progress import Progress
from justforward.rebuild import evaluate, rebuild
from justforward.run import train
from justforward.settings import resolved
from justforward.stored import Stored, pack, packed_in, values

Result = dict[str, Any]
COMPILED = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
OTHERS = ["F32", "F16", "BF16", "IQ4_NL", "IQ4_XS", "IQ2_XXS", "TQ1_0"]
HALVES = {
    "Q4_K": (0, 2),
    "Q6_K": (208,),
}  # where float16 numbers are in blocks that gguf cannot make


# ------------------------------------------------------------------------------------------- kernels


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(COMPILED + OTHERS),
    rows=st.integers(1, 40),
    wide=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_rows_have_the_bits_that_gguf_gives_them(
    form: str, rows: int, wide: int, seed: int
) -> None:
    """Of any bytes at all: infinite scales, subnormal ones, none."""
    kind = GGMLQuantizationType[form]
    count, size = gguf.GGML_QUANT_SIZES[kind]
    draw = np.random.default_rng(seed)
    columns = 256 * wide
    data = draw.integers(0, 256, (rows, columns // count * size), dtype=np.uint8)
    data[draw.random(data.shape) < 0.1] = 0
    order = torch.from_numpy(draw.integers(0, rows, draw.integers(1, 50)))
    out = torch.full((len(order), columns), torch.nan)
    with np.errstate(all="ignore"):
        blocks.unpack(form, data, order, out)
        wanted = torch.from_numpy(dequantize(data, kind).copy())[order]
    nan = wanted.isnan()
    assert torch.equal(out.isnan(), nan)
    assert torch.equal(out[~nan].view(torch.int32), wanted[~nan].view(torch.int32))


def test_the_same_bits_on_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(blocks, "_LEAST", 64)
    monkeypatch.setattr(blocks, "_GROUP", 500)
    for form in ("Q4_0", "BF16", "IQ4_NL"):
        kind = GGMLQuantizationType[form]
        count, size = gguf.GGML_QUANT_SIZES[kind]
        data = np.random.default_rng(0).integers(0, 60, (37, 64 // count * size), dtype=np.uint8)
        out = torch.empty(37, 64)
        blocks.unpack(form, data, torch.arange(37), out)
        assert torch.equal(out, torch.from_numpy(dequantize(data, kind).copy())), form


# --------------------------------------------------------------------------------------- whole models


def config_of(architecture: str, **values: Any) -> Any:
    from transformers import AutoConfig

    sizes: dict[str, Any] = {
        "vocab_size": 340, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
        "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    if architecture not in ("gpt2", "bloom", "mamba"):
        sizes |= {"num_key_value_heads": 2, "intermediate_size": 96}
    if architecture == "gpt2":
        sizes |= {"max_position_embeddings": 1024}  # the file's own is not read
    return AutoConfig.for_model(architecture, **{**sizes, **values})


def make_large(architecture: str, **values: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config_of(architecture, **values)).eval()
        for p in model.parameters():
            p.data.normal_(std=0.2)
    return model


def permuted(weight: Tensor, heads: int) -> Tensor:
    """Rows of a Llama's query or key map as llama.cpp writes them (`LlamaModel.permute` in its convert_hf_to_gguf.py)."""
    shape = weight.shape
    return weight.reshape(heads, 2, shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(shape)


def as_blocks(weight: np.ndarray, form: str, seed: int) -> np.ndarray:
    """A matrix in a form; blocks that gguf cannot make are drawn."""
    kind = GGMLQuantizationType[form]
    if form not in HALVES:
        return quantize(weight, kind)
    count, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(seed).integers(
        0, 256, (weight.size // count, size), dtype=np.uint8
    )
    for at in HALVES[form]:
        data[:, at : at + 2] = np.array([0.004], np.float16).view(np.uint8)
    return data.reshape(len(weight), -1)


def write_gguf(model: Any, path: Path, forms: list[str]) -> Path:
    """A .gguf of a model: names by gguf's table, settings by transformers' (read the other way round), matrices in forms in turn."""
    from transformers.integrations import GGUF_CONFIG_MAPPING

    config, architecture = model.config, model.config.model_type
    writer = GGUFWriter(path, architecture)
    for key, attribute in GGUF_CONFIG_MAPPING[architecture].items():
        value = None if attribute in (None, -1) else getattr(config, attribute, None)
        if attribute == "rope_theta":
            value = 10000.0
        if isinstance(value, bool):
            writer.add_bool(f"{architecture}.{key}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"{architecture}.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{architecture}.{key}", value)
    inner = make_tokenizer("bytelevel")
    tokens = inner.convert_ids_to_tokens(range(len(inner)))
    merges = [" ".join(pair) for pair in _merges(inner)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    key = {value: kind for kind, value in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(key, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    count = 0
    for name, weight in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        stem, dot, suffix = name.rpartition(".")
        known = names.get_name(stem) or names.get_name(stem.removeprefix("transformer."))
        assert known is not None, name
        known += dot + suffix
        w = weight.float()
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            w = permuted(w, heads)
        if architecture == "gpt2" and ("c_" in name and suffix == "weight"):
            w = w.T
        array = np.ascontiguousarray(w.numpy())
        form = "F32"
        if array.ndim == 2:
            form = forms[count % len(forms)]
            count += 1
            if array.shape[1] % gguf.GGML_QUANT_SIZES[GGMLQuantizationType[form]][0]:
                form = "F16"
        writer.add_tensor(known, as_blocks(array, form, count) if form != "F32" else array,
                          raw_dtype=GGMLQuantizationType[form])  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _merges(tokenizer: Any) -> list[tuple[str, str]]:
    import json

    found: list[tuple[str, str]] = json.loads(tokenizer.backend_tokenizer.to_str())["model"][
        "merges"
    ]
    return found


def converted(path: Path) -> Any:
    """The whole model in float32, as transformers converts it."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM
    return model.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32).eval()


def kept(path: Path, folder: Path, note: Callable[[str], None] | None = None) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir()
    mapped.read_header(path, AutoModelForCausalLM).save_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    return mapped.build(AutoModelForCausalLM, config, path, folder, note).eval()


def check_same(model: Any, wanted: Any) -> None:
    ours = dict(model.named_parameters(remove_duplicate=False))
    theirs = dict(wanted.named_parameters(remove_duplicate=False))
    assert ours.keys() == theirs.keys()
    for name, p in theirs.items():
        found = values(ours[name])
        assert torch.equal(found.contiguous().view(torch.int32), p.detach().view(torch.int32)), name
        assert not ours[name].requires_grad
    for name, buffer in wanted.named_buffers():
        assert torch.equal(dict(model.named_buffers())[name], buffer), name


QUANTISED = ["Q4_0", "Q8_0", "Q4_1", "Q5_1", "F16", "Q5_0", "BF16"]
CASES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}, QUANTISED),
    "llama-tied": ("llama", {"tie_word_embeddings": True}, QUANTISED),
    "llama-k": ("llama", {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}, ["Q4_K", "Q6_K"]),
    "llama-plain": ("llama", {"tie_word_embeddings": False}, ["F32"]),
    "gpt2": ("gpt2", {"tie_word_embeddings": True}, QUANTISED),
    "gpt2-head": ("gpt2", {"tie_word_embeddings": False}, ["Q8_0", "F32"]),
    "qwen2": ("qwen2", {}, QUANTISED),
    "qwen3": ("qwen3", {"head_dim": 128}, ["Q4_0"]),
    "mistral": ("llama", {"num_key_value_heads": 4}, ["Q4_1"]),
    "bloom": ("bloom", {"n_head": 4, "n_layer": 2}, ["Q4_0"]),
    "starcoder2": ("starcoder2", {}, ["Q5_0"]),
    "stablelm": ("stablelm", {}, ["Q5_1"]),
    "nemotron": ("nemotron", {}, ["Q4_1"]),
    "gemma2": ("gemma2", {"head_dim": 16}, ["Q8_0"]),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_the_conversion(case: str, tmp_path: Path) -> None:
    architecture, sizes, forms = CASES[case]
    original = make_large(architecture, **sizes)
    path = write_gguf(original, tmp_path / "m.gguf", forms)
    notes: list[str] = []
    model = kept(path, tmp_path / "folder", notes.append)
    wanted = converted(path)
    check_same(model, wanted)
    if case == "llama-plain":  # and what is written is what is read
        check_same(model, original)
    assert notes == []
    if "F32" not in forms:
        matrices = {name for name, p in original.named_parameters() if p.dim() == 2}
        assert {
            name for name, p in model.named_parameters() if packed_in(p) is not None
        } == matrices
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        ours, theirs = (m(input_ids=ids).logits for m in (model, wanted))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert jf.fingerprint(model) != jf.fingerprint(wanted)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_more_than_an_order_of_rows_is_float32_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.modeling_gguf_pytorch_utils as conversion

    class Odd(conversion.LlamaTensorProcessor):
        def process(self, weights: Any, name: str, **kwargs: Any) -> Any:
            found = super().process(weights, name, **kwargs)  # type: ignore[no-untyped-call]
            change = {".ffn_down.": lambda w: w - 1, ".ffn_up.": lambda w: w[:, ::-1]}
            for part, do in change.items():
                if part in name:
                    return found._replace(weights=do(found.weights))
            if ".ffn_gate." in name:  # rows alone
                return found._replace(weights=found.weights[::-1])
            return found

    monkeypatch.setitem(conversion.TENSOR_PROCESSORS, "llama", Odd)
    path = write_gguf(make_large("llama"), tmp_path / "m.gguf", ["Q4_0"])
    notes: list[str] = []
    model = kept(path, tmp_path / "folder", notes.append)
    check_same(model, converted(path))
    assert len(notes) == 1
    # 2 layers, 2 maps, 64 x 96 weights, 4 bytes
    assert (
        "4 of the matrices in m.gguf cannot stay as they are stored and are float32 (0.1 MiB)"
        in notes[0]
    )
    left = {n for n, p in model.named_parameters() if p.dim() == 2 and packed_in(p) is None}
    assert left == {f"model.layers.{i}.mlp.{m}_proj.weight" for i in (0, 1) for m in ("down", "up")}


@pytest.mark.real
def test_smollm2_is_the_converted_one() -> None:
    model: Any = load_model("smollm2", quantize="gguf")[0]
    tokenizer = load_model("smollm2", quantize="gguf")[1]
    wanted, as_ever = load_model("smollm2")
    check_same(model, wanted)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    count = {name: packed_in(p).form for name, p in model.named_parameters() if packed_in(p)}  # type: ignore[union-attr]
    assert len(count) == 211
    assert set(count.values()) == {"Q4_1", "Q8_0"}
    text = "The film was great, wasn't it?\n <|im_start|> 1234"
    assert tokenizer(text)["input_ids"] == as_ever(text)["input_ids"]
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        ours, theirs = (m(input_ids=ids).logits for m in (model, wanted))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


# ----------------------------------------------------------------------------------------- operations


def packed_matrix(
    rows: int, columns: int, transposed: bool, seed: int = 0
) -> tuple[nn.Parameter, Tensor]:
    """A packed parameter in an order of its own, and the same as float32."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).numpy()
    data = quantize(weight, GGMLQuantizationType.Q8_0)
    order = torch.randperm(rows, generator=generator)
    wide = torch.from_numpy(dequantize(data, GGMLQuantizationType.Q8_0).copy())[order]
    wide = wide.T.contiguous() if transposed else wide
    return pack(mapped.Blocks(data, "Q8_0", order, transposed), wide.shape), wide


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 70),
    wide=st.integers(1, 3),
    transposed=st.booleans(),
    sliced=st.booleans(),
    graph=st.booleans(),
)
def test_operations_are_those_of_its_values(
    rows: int, wide: int, transposed: bool, sliced: bool, graph: bool
) -> None:
    p, w = packed_matrix(rows, 32 * wide, transposed)
    generator = torch.Generator().manual_seed(rows)
    x, y = (torch.randn(3, 5, n, generator=generator, requires_grad=graph) for n in w.T.shape)
    flat = y.detach()[0].requires_grad_(graph)
    bias, over = torch.randn(len(w), generator=generator), torch.randn(w.shape[1], generator=generator)  # fmt: skip
    tokens = torch.randint(0, len(w), (2, 7), generator=generator)
    calls: list[tuple[Callable[[Any], Tensor], Tensor | None]] = [
        (lambda m: F.linear(x, m, bias), x),
        (lambda m: F.linear(x, m), x),
        (lambda m: y @ m, y),
        (lambda m: torch.addmm(over, flat, m), flat),
        (lambda m: F.embedding(tokens, m), None),
        (lambda m: m * 2.0, None),
        (lambda m: m.float().sum(0), None),
        (lambda m: m.T[:1], None),
    ]
    before, stored.SLICE = stored.SLICE, 100 if sliced else stored.SLICE
    try:
        with torch.set_grad_enabled(graph):
            for call, entering in calls:
                ours, theirs = call(p), call(w)
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)
                if graph and entering is not None:
                    g = torch.randn(ours.shape, generator=generator)
                    a, b = (torch.autograd.grad(out, entering, g)[0] for out in (ours, theirs))
                    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)
    finally:
        stored.SLICE = before


def test_a_graph_keeps_no_weights() -> None:
    p, w = packed_matrix(64, 96, False)
    kept_sizes: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept_sizes.append(tensor.numel())
        return tensor

    x = torch.randn(2, 96, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = F.linear(F.linear(x, p), torch.ones(3, 64, requires_grad=True)).sum()
    assert max(kept_sizes) < p.numel()
    y.backward()  # type: ignore[no-untyped-call]
    hessians = [
        torch.autograd.functional.hessian(
            lambda v, m=m: (F.linear(v, m) ** 2).sum(), torch.ones(1, 96)
        )
        for m in (p, w)
    ]
    torch.testing.assert_close(*hessians)


def test_what_it_says_of_itself_and_what_it_refuses() -> None:
    p, w = packed_matrix(40, 64, False)
    assert (p.shape, p.dtype, p.device.type, p.numel()) == (
        w.shape,
        torch.float32,
        "cpu",
        w.numel(),
    )
    assert isinstance(p, nn.Parameter)
    assert type(p) is Stored
    for same in (copy.deepcopy(p), p.detach()):
        assert torch.equal(values(same), w)
        assert packed_in(same) is packed_in(p)
    module = nn.Linear(64, 40, bias=False)
    module.weight = p
    assert torch.equal(values(module.state_dict()["weight"]), w)
    assert torch.equal(copy.deepcopy(module)(torch.eye(64)).T, w)
    refusals: dict[str, Callable[[], Any]] = {
        "cannot be had by .data": lambda: p.data,
        "cannot be written by add_": lambda: p.add_(1.0),
        "cannot be pickled": lambda: pickle.dumps(p),
        "cannot be had as plain numbers": lambda: stored.plain(p),
    }
    for said, do in refusals.items():
        with pytest.raises(UserError, match=f"is kept as Q8_0, frozen, and {said}: load the model without"), torch.no_grad():  # fmt: skip
            do()
    for token in (40, -1):
        with pytest.raises(UserError, match=f"an embedding of 40 rows is asked for row {token}: "):
            nn.functional.embedding(torch.tensor([[3, token]]), p)
    p.requires_grad_(True)
    with pytest.raises(UserError, match="parameter weight is kept as Q8_0, which has no room for a step: freeze it"):  # fmt: skip
        jf.MeZO(module, lr=1e-3)
    assert torch.equal(values(p), w)


def test_a_fingerprint_covers_what_is_stored() -> None:
    def of(data: np.ndarray, order: Any, form: str = "Q8_0", transposed: bool = False) -> str:
        module = nn.Module()
        module.weight = pack(mapped.Blocks(data, form, order, transposed), (32, 32))
        return jf.fingerprint(module)

    data = np.random.default_rng(0).integers(0, 50, (32, 34), dtype=np.uint8)
    other = data.copy()
    other[7, 11] ^= 1
    turned = torch.arange(31, -1, -1)
    found = {of(data, None), of(other, None), of(data, turned), of(data, None, transposed=True), of(data[:, :18].copy(), None, "Q4_0")}  # fmt: skip
    assert len(found) == 5
    assert of(data.copy(), None) in found


# ---------------------------------------------------------------------------------------------- runs


@pytest.fixture
def asked(tmp_path: Path, sentiment_csv: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TrainConfig]:  # fmt: skip
    monkeypatch.setenv("JUSTFORWARD_CACHE", str(tmp_path / "cache"))

    def make(architecture: str, tuner: Any, **given: Any) -> TrainConfig:
        path = tmp_path / f"{architecture}.gguf"
        if not path.exists():
            write_gguf(make_large(architecture), path, ["Q4_0", "Q8_0", "Q4_1"])
        base: dict[str, Any] = {
            "model": str(path), "data": str(sentiment_csv), "template": "{text} It was",
            "labels": {"neg": "bad", "pos": "great"}, "out": str(tmp_path / "run"), "tuner": tuner,
            "max_forwards": 16, "eval_every": 8, "lr": 3e-2, "threads": 1, "lr_schedule": "constant",
            "quantize": "gguf", "keep": "last", "start": "base",
        }  # fmt: skip
        return TrainConfig(**{**base, **given})

    return make


def quiet(command: Callable[[Any, Progress], Result], given: Any) -> Result:
    return command(given, Progress(io.StringIO()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("architecture", "tuner", "estimator"),
    [
        ("llama", "lora", "activation"),
        ("gpt2", "lora", "weight"),
        ("qwen2", "prefix", "weight"),
        ("llama", "prompt", "activation"),
    ],
)
def test_a_run(asked: Any, architecture: str, tuner: str, estimator: str, tmp_path: Path) -> None:
    run = asked(architecture, tuner, estimator=estimator)
    result = quiet(train, run)
    environment = RunFolder(run.out).read_environment()["versions"]
    assert environment["gguf"]
    found = quiet(evaluate, EvalConfig(run=run.out))
    for key in ("fingerprint", "accuracy", "loss"):
        assert found[key] == result[key]
    # stopped half way and continued; from a copy of the file under another name
    moved = Path(run.model).rename(tmp_path / "moved.gguf")
    half = replace(run, out=f"{run.out}-half", max_forwards=8, model=str(moved))
    quiet(train, half)
    again = quiet(train, replace(half, max_forwards=16, resume=True))
    assert again["fingerprint"] == result["fingerprint"]
    # replayed: saved as an adapter, and put on a base of one's own
    made = quiet(rebuild, ReplayConfig(half.out, str(tmp_path / "adapter")))
    assert (made["fingerprint"], made["saved"]) == (result["fingerprint"], "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    base, tokenizer = load_model(moved, quantize="gguf")
    untouched = jf.fingerprint(base)
    model = tuners.attach(base, tokenizer, half, RunFolder(half.out).start)
    jf.replay(model, RunFolder(half.out).log)
    assert jf.fingerprint(model) == result["fingerprint"]
    assert jf.fingerprint(load_model(moved, quantize="gguf")[0]) == untouched
    # the adapter names the file, and is scored on it as stored, or converted: the same values
    shared = {"data": run.data, "template": run.template, "labels": run.labels}
    of_run = quiet(evaluate, EvalConfig(run=half.out, split="all"))
    for quantize_so in ("gguf", None):
        own = EvalConfig(model=str(tmp_path / "adapter"), quantize=quantize_so, **shared)  # type: ignore[arg-type]
        assert quiet(evaluate, own)["loss"] == pytest.approx(of_run["loss"], rel=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_learns_and_baselines_too(asked: Any) -> None:
    run = asked("llama", "lora", max_forwards=120, lr_schedule="linear", keep="best")
    result = quiet(train, run)
    assert result["loss"] < result["before_loss"] - 0.03
    shared = {name: getattr(run, name) for name in ("model", "data", "template", "labels", "quantize", "threads")}  # fmt: skip
    found = quiet(run_baseline, BaselineConfig("zero-shot", **shared))
    plain = quiet(run_baseline, BaselineConfig("zero-shot", **{**shared, "quantize": None}))
    assert found["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    tuned = BaselineConfig("first-order", **shared, tuner="lora", lr=0.02, max_steps=20)
    assert quiet(run_baseline, tuned)["loss"] < found["loss"] - 0.03
    # bits of another file, and the same values as plain numbers, are other bases
    model = tuners.attach(*load_model(run.model), run)
    with pytest.raises(UserError, match="made from a base model with fingerprint"):
        jf.replay(model, RunFolder(run.out).log)
    raw = bytearray(Path(run.model).read_bytes())
    raw[-40] ^= 1
    Path(run.model).write_bytes(raw)
    with pytest.raises(UserError, match="made from a base model with fingerprint"):
        quiet(evaluate, EvalConfig(run=run.out))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_from_the_command_line(asked: Any, capfd: pytest.CaptureFixture[str]) -> None:
    run = asked("llama", "lora")
    argv = ["train", "--model", run.model, "--data", run.data, "--template", run.template, "--labels", "neg=bad,pos=great",
            "--out", run.out, "--max-forwards", "8", "--tuner", "lora", "--quantize", "gguf"]  # fmt: skip
    assert cli.main(argv) == 0
    assert RunFolder(run.out).read_config().quantize == "gguf"
    assert "reading tokenizer and settings of llama.gguf once" in capfd.readouterr().err
    assert cli.main(["eval", "--model", run.model, "--data", run.data, "--template", run.template, "--labels",
                     "neg=bad,pos=great", "--quantize", "gguf"]) == 0  # fmt: skip
    assert cli.main(["replay", run.out, "--out", f"{run.out}-m", "--merge"]) == 2
    said = capfd.readouterr().err
    assert "--merge adds a LoRA into the weights, and the run's are quantised (gguf): leave it out" in said  # fmt: skip
    assert "converting" not in said


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_deep_start_of_lora(asked: Any, architecture: str, tmp_path: Path) -> None:
    run = asked(architecture, "lora", start="deep", max_forwards=24, probe_rows=40)
    result = quiet(train, run)
    assert result["steps"] > 0
    kept = RunFolder(run.out).read_config()
    assert (kept.start, kept.layers) == ("deep", 0.333)
    made = quiet(rebuild, ReplayConfig(run.out, str(tmp_path / "adapter")))
    assert made["fingerprint"] == result["fingerprint"]


# ------------------------------------------------------------------------------------- what is refused


def test_what_is_no_gguf_or_no_frozen_base(asked: Any, model_folder: Path, tmp_path: Path) -> None:
    def refused(said: str, do: Callable[[], Any]) -> None:
        with pytest.raises(UserError, match=said) as caught:
            do()
        assert "\n" not in str(caught.value)

    run = asked("llama", "lora")
    this_is_none = "--quantize is 'gguf': it keeps the matrices of a .gguf as they are stored, and this is none"
    refused(this_is_none, lambda: load_model(model_folder, quantize="gguf"))
    refused(this_is_none, lambda: load_model("org/name", quantize="gguf"))
    refused("--dtype is 'bfloat16': what --quantize leaves", lambda: load_model(run.model, quantize="gguf", dtype="bfloat16"))  # fmt: skip
    refused("--dtype is 'bfloat16': what --quantize leaves", lambda: resolved(replace(run, dtype="bfloat16")))  # fmt: skip
    for tuner in ("full", "head"):
        said = (
            f"--quantize is 'gguf': quantised weights are frozen, and --tuner is '{tuner}': choose"
        )
        refused(said, lambda tuner=tuner: resolved(replace(run, tuner=tuner)))
    for start in ("probe", "last"):
        refused(f"--start is '{start}': it", lambda start=start: resolved(replace(run, start=start)))  # fmt: skip
    model, tokenizer = load_model(run.model, quantize="gguf")
    refused("cannot be saved whole", lambda: save_model(model, tokenizer, tmp_path / "saved"))
    assert not (tmp_path / "saved").exists()


def test_files_that_cannot_be_used(asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    def refused(said: str, path: Path) -> None:
        with pytest.raises(UserError, match=said) as caught:
            load_model(path, quantize="gguf")
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value) or str(path.stem) in str(caught.value)

    whole = Path(asked("llama", "lora").model)
    junk = tmp_path / "junk.gguf"
    junk.write_bytes(b"junk" * 100)
    refused("junk.gguf: cannot load it: .*GGUF magic", junk)
    load_model(whole, quantize="gguf")
    folder = next((tmp_path / "cache").iterdir())
    header = mapped.Header(**__import__("json").loads((folder / mapped.HEADER).read_text()))

    def changed(change: Callable[[mapped.Header], None]) -> None:
        other = copy.deepcopy(header)
        change(other)
        other.save_pretrained(folder)

    def form(to: mapped.Header) -> None:
        to.tensors = [(n, "I8" if n == "blk.0.ffn_up.weight" else f, s, a, b) for n, f, s, a, b in to.tensors]  # fmt: skip

    changed(form)
    refused("blk.0.ffn_up.weight is stored as I8, which the package gguf cannot dequantise", whole)
    changed(lambda to: setattr(to, "tensors", [t for t in to.tensors if t[0] != "blk.1.ffn_up.weight"]))  # fmt: skip
    refused("no weights for model.layers.1.mlp.up_proj.weight, which would be random", whole)
    changed(lambda to: setattr(to, "tensors", [(n, f, s, a + 10**9, b) for n, f, s, a, b in to.tensors]))  # fmt: skip
    refused("ends within .*: copy the file again", whole)
    changed(lambda to: to.names.update({"token_embd.weight": "model.layers.0.mlp.up_proj.weight"}))
    refused(r"up_proj.weight is \(340, 64\) in the file and \(96, 64\) by its own settings", whole)
    other = write_gguf(make_large("qwen2"), tmp_path / "other.gguf", ["Q4_0"])
    monkeypatch.setattr(mapped, "_otherwise", lambda: {"qwen2"})
    refused("--quantize is 'gguf': transformers converts 'qwen2' in a way of its own", other)


def test_a_count_beyond_the_file_is_found_before_it_is_believed(tmp_path: Path) -> None:
    """gguf's reader would go on until memory is used up."""
    path = tmp_path / "many.gguf"
    head = b"GGUF" + (3).to_bytes(4, "little") + bytes(8) + (1).to_bytes(8, "little")
    key = (1).to_bytes(8, "little") + b"k" + (9).to_bytes(4, "little") + bytes(4)
    path.write_bytes(head + key + (1 << 60).to_bytes(8, "little"))
    with pytest.raises(UserError, match=r"many\.gguf: the \.gguf is cut short or damaged"):
        load_model(str(path), quantize="gguf")
