"""Quantised bases: only weights are rounded, the log knows them by all their bits, and a run is one like any other.

Reading order: fingerprints, what is rounded, runs, what is refused. What needs torchao or bitsandbytes is skipped where
they are not installed; the tests of fingerprints and of refusals are not.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import justforward as jf
from conftest import make_model, make_tokenizer
from justforward import cli, quantised, tuners
from justforward.baselines import run_baseline
from justforward.config import BaselineConfig, EvalConfig, ReplayConfig, TrainConfig
from justforward.data import Example
from justforward.errors import UserError
from justforward.evaluate import Scorer
from justforward.folder import RunFolder
from justforward.models import load_model
from justforward.progress import Progress
from justforward.quantised import LIBRARIES, is_quantised, quantised_maps
from justforward.rebuild import evaluate, rebuild
from justforward.run import train
from justforward.settings import resolved
from justforward.stream import dense_of
from justforward.tasks import Task

Result = dict[str, Any]
TASK = Task("{text} It was", {"neg": "terrible", "pos": "great"})
TEXTS = ["a fine film", "bad", "the story is wonderful , the music is great", "dull and long"]
ROWS = [Example({"text": text}, ("neg", "pos")[i % 2], "rows.csv", i + 2) for i, text in enumerate(TEXTS)]  # fmt: skip
# NF4, QLoRA (arXiv 2305.14314), appendix E
NF4 = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)  # fmt: skip


@pytest.fixture(params=sorted(LIBRARIES))
def quantize(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    pytest.importorskip(LIBRARIES[name])
    return name


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., str]:
    """The folder of a tiny model, changed by `change` first."""

    def make(architecture: str, name: str = "", change: Callable[[Any], Any] | None = None) -> str:
        path = tmp_path / f"{architecture}{name}"
        if not path.exists():
            model = make_model(architecture)
            if change is not None:
                change(model)
            model.save_pretrained(path)
            make_tokenizer(
                "bytelevel"
                if architecture == "gpt2"
                else "wordpiece"
                if architecture == "bert"
                else "metaspace"
            ).save_pretrained(path)
        return str(path)

    return make


# ----------------------------------------------------------------------------------- fingerprints


class Pair(torch.Tensor):
    """A number as codes times a scale, as torchao keeps it: a tensor made of two."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Any:
        made: Any = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)  # type: ignore[attr-defined]
        made.codes, made.scale = codes, scale
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(func)


def inside(code: int, scale: float) -> nn.Module:
    module = nn.Module()
    codes = torch.tensor([[code, 1]], dtype=torch.int8)
    module.weight = nn.Parameter(Pair(codes, torch.tensor([scale])), requires_grad=False)
    return module


class Beside(nn.Module):
    """Codes as a parameter, and a scale that is in the state_dict alone, as bitsandbytes has it."""

    def __init__(self, code: int, scale: float) -> None:
        super().__init__()
        codes = torch.tensor([[code, 1]], dtype=torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.scale = (torch.tensor([scale]), "a name")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "SCB"], destination[prefix + "format"] = self.scale


@pytest.mark.parametrize("make", [inside, Beside])
def test_a_fingerprint_covers_codes_and_scales(make: Callable[[int, float], nn.Module]) -> None:
    found = [jf.fingerprint(nn.Sequential(make(*of))) for of in ((3, 0.5), (4, 0.5), (3, 0.25))]
    assert len(set(found)) == 3
    assert found[0] == jf.fingerprint(nn.Sequential(make(3, 0.5)))


def test_a_fingerprint_of_plain_weights_is_what_it_was(tiny_model: Any) -> None:
    """Logs made before keep their base."""
    import hashlib

    digest = hashlib.sha256()
    named = dict(tiny_model.named_parameters(remove_duplicate=False))
    named |= dict(tiny_model.named_buffers(remove_duplicate=False))
    first: dict[int, str] = {}
    for name, tensor in sorted(named.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        if id(tensor) in first:
            digest.update(f"tied to {first[id(tensor)]}\0".encode())
        else:
            digest.update(tensor.detach().numpy().tobytes())
        first.setdefault(id(tensor), name)
    assert jf.fingerprint(tiny_model) == digest.hexdigest()


def test_bases_that_differ_in_scale_alone(folder: Any, quantize: str) -> None:
    @torch.no_grad()
    def double(model: Any) -> None:
        model.model.layers[1].mlp.up_proj.weight.mul_(2.0)

    one, other = folder("llama"), folder("llama", "-doubled", double)
    found = jf.fingerprint(load_model(one, quantize=quantize)[0])
    assert found == jf.fingerprint(load_model(one, quantize=quantize)[0])
    assert found != jf.fingerprint(load_model(other, quantize=quantize)[0])
    assert found != jf.fingerprint(load_model(one)[0])


# -------------------------------------------------------------------------------- what is rounded


def effective(module: Any) -> Tensor:
    """The weights [out, in] that a map multiplies by, from what it makes of unit vectors."""
    with torch.no_grad():
        y = module(torch.eye(module.in_features))
    return (y if module.bias is None else y - module.bias).T


def architectures(quantize: str) -> list[str]:
    return ["llama", "opt", "bert"] + (["gpt2"] if quantize != "int8" else [])


def test_every_map_but_the_head_is_rounded_to_its_nearest_level(folder: Any, quantize: str) -> None:
    for architecture in architectures(quantize):
        plain, _ = load_model(folder(architecture))
        model: Any = load_model(folder(architecture), quantize=quantize)[0]
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
        assert not is_quantised(model.get_output_embeddings().weight)
        head = plain.get_output_embeddings()
        maps = {
            name: module
            for name, module in plain.named_modules()
            if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
            and module is not head
        }
        names = {name for name, module in model.named_modules() if is_quantised(getattr(module, "weight", None))}  # fmt: skip
        assert names == set(maps), architecture
        for name, module in maps.items():
            weight = module.weight.detach()
            weight = weight.T if type(module).__name__ == "Conv1D" else weight
            found = effective(model.get_submodule(name))
            if quantize == "bnb4":
                size = weight.reshape(-1, 64).abs().amax(1, keepdim=True)
                nearest = (weight.reshape(-1, 64, 1) / size[..., None] - NF4).abs().argmin(-1)
                torch.testing.assert_close(found, (NF4[nearest] * size).view_as(weight))
            else:
                step = weight.abs().amax(1, keepdim=True) / (127.5 if quantize == "int8" else 127.0)
                # bitsandbytes rounds to float16 first
                assert ((found - weight).abs() <= 0.5 * step + weight.abs() / 1024).all()
                levels = found / step
                torch.testing.assert_close(levels, levels.round(), atol=0.07, rtol=0)
                assert len(levels[0].round().unique()) > 4
        for name, parameter in plain.named_parameters():
            if name.rpartition(".")[0] not in maps or not name.endswith("weight"):
                assert torch.equal(model.get_parameter(name), parameter), name


def test_what_flows_is_not_rounded(folder: Any, quantize: str) -> None:
    """Not on the way back either, for the baselines that need a gradient."""
    model: Any = load_model(folder("opt"), quantize=quantize)[0]
    generator = torch.Generator().manual_seed(0)
    for module in quantised_maps(model):
        weights = effective(module).double()
        x = torch.randn(3, 5, module.in_features, generator=generator, requires_grad=True)
        g = torch.randn(3, 5, module.out_features, generator=generator)
        y = module(x)
        wanted = x.double() @ weights.T + module.bias.double()
        torch.testing.assert_close(y.double(), wanted, atol=1e-5, rtol=1e-5)
        y.backward(g)
        assert x.grad is not None
        torch.testing.assert_close(x.grad.double(), g.double() @ weights, atol=1e-5, rtol=1e-5)
    # large inputs of one row leave the others alone, to the bit
    ids = torch.arange(24).view(2, 12) + 7
    vectors = model.get_input_embeddings()(ids).detach()
    loud = vectors.clone()
    loud[1] *= 100.0
    with torch.no_grad():
        a, b = (model(inputs_embeds=v).logits for v in (vectors, loud))
    assert torch.equal(a[0], b[0])
    assert not torch.equal(a[1], b[1])


def test_forwards_leave_the_base_as_it_is(folder: Any, quantize: str) -> None:
    model, _ = load_model(folder("llama"), quantize=quantize)
    before = jf.fingerprint(model)
    with torch.no_grad():
        model(input_ids=torch.arange(24).view(2, 12))
    assert jf.fingerprint(model) == before


def held(x: Any) -> int:
    """Bytes of a tensor, or of those that it is made of."""
    parts = x.__tensor_flatten__()[0] if hasattr(x, "__tensor_flatten__") else []
    return sum(held(getattr(x, part)) for part in parts) or x.numel() * x.element_size()


def test_a_map_takes_a_quarter_or_an_eighth(folder: Any, quantize: str) -> None:
    plain, _ = load_model(folder("llama"))
    model, _ = load_model(folder("llama"), quantize=quantize)
    state = model.state_dict()
    named = dict(model.named_parameters())
    for name, module in plain.named_modules():
        key = f"{name}.weight"
        if key not in named or not is_quantised(named[key]):
            continue
        rows, columns = module.weight.shape  # type: ignore[misc,union-attr]
        scales = 4 * (rows * columns // 64 if quantize == "bnb4" else rows)
        codes = rows * columns // (2 if quantize == "bnb4" else 1)
        beside = [f"{key}.absmax", f"{name}.SCB"]
        found = held(named[key]) + sum(held(state[each]) for each in beside if each in state)
        assert found <= codes + scales + rows  # torchao has a zero point, of a byte, for each row


# -------------------------------------------------------------------------------------------- runs


@pytest.fixture
def settings(folder: Any, tmp_path: Path, sentiment_csv: Path, quantize: str) -> Callable[..., TrainConfig]:  # fmt: skip
    def make(architecture: str, tuner: Any, **values: Any) -> TrainConfig:
        base: dict[str, Any] = {
            "model": folder(architecture), "data": str(sentiment_csv), "template": "{text} It was",
            "labels": {"neg": "great", "pos": "terrible"}, "out": str(tmp_path / "run"), "tuner": tuner,
            "max_forwards": 16, "eval_every": 8, "lr": 3e-2, "threads": 1, "lr_schedule": "constant",
            "quantize": quantize, "keep": "last", "start": "base",
        }  # fmt: skip
        return TrainConfig(**{**base, **values})

    return make


def quiet(command: Callable[[Any, Progress], Result], asked: Any) -> Result:
    return command(asked, Progress(io.StringIO()))


def scores(model: Any) -> Tensor:
    scorer = Scorer(model, make_tokenizer("metaspace"), TASK)
    return scorer.scores(scorer.encode(ROWS))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("quantize", "tuner", "estimator"),
    [
        ("int8", "lora", "weight"),
        ("int8", "prompt", "activation"),
        ("bnb8", "lora", "activation"),
        ("bnb4", "lora", "activation"),
        ("bnb4", "prefix", "weight"),
    ],
    indirect=["quantize"],
)
def test_a_run(settings: Any, tuner: str, estimator: str, tmp_path: Path, capfd: Any) -> None:
    from peft import PeftModel

    asked = settings("llama", tuner, estimator=estimator)
    capfd.readouterr()
    result = quiet(train, asked)
    assert LIBRARIES[asked.quantize] in RunFolder(asked.out).read_environment()["versions"]
    found = quiet(evaluate, EvalConfig(run=asked.out))
    for key in ("fingerprint", "accuracy", "loss"):
        assert found[key] == result[key]
    # stopped half way and continued
    half = replace(asked, out=f"{asked.out}-half", max_forwards=8)
    quiet(train, half)
    again = quiet(train, replace(half, max_forwards=16, resume=True))
    assert again["fingerprint"] == result["fingerprint"]
    # replayed, and put on the base as peft does it
    made = quiet(rebuild, ReplayConfig(asked.out, str(tmp_path / "adapter")))
    assert (made["fingerprint"], made["saved"]) == (result["fingerprint"], "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    base, tokenizer = load_model(asked.model, quantize=asked.quantize)
    before, untouched = scores(base), jf.fingerprint(base)
    model = tuners.attach(base, tokenizer, asked, RunFolder(asked.out).start)
    jf.replay(model, RunFolder(asked.out).log)
    wanted = scores(model)
    assert not torch.allclose(wanted, before, atol=1e-4)
    if tuner != "prompt":  # which peft has without positions
        base, _ = load_model(asked.model, quantize=asked.quantize)
        loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
        assert torch.equal(scores(loaded), wanted)
    # the adapter is scored on the base that it is given: rounded as in the run, or not
    shared = {"data": asked.data, "template": asked.template, "labels": asked.labels}
    own = EvalConfig(model=str(tmp_path / "adapter"), quantize=asked.quantize, **shared)
    of_run = quiet(evaluate, EvalConfig(run=asked.out, split="all"))
    assert quiet(evaluate, own)["loss"] == pytest.approx(of_run["loss"], rel=1e-6)
    assert quiet(evaluate, replace(own, quantize=None))["loss"] != pytest.approx(of_run["loss"], rel=1e-6)  # fmt: skip
    assert jf.fingerprint(load_model(asked.model, quantize=asked.quantize)[0]) == untouched
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("quantize", ["bnb4", "int8"], indirect=True)
def test_it_learns(settings: Any) -> None:
    asked = settings("llama", "lora", max_forwards=160, lr_schedule="linear", lr=5e-2, keep="best")
    result = quiet(train, asked)
    assert result["loss"] < result["before_loss"] - 0.03


def test_lora_starts_deep_on_it(settings: Any, quantize: str) -> None:
    asked = settings("llama", "lora", start="deep", max_forwards=24, probe_rows=40)
    result = quiet(train, asked)
    folder = RunFolder(asked.out)
    assert folder.read_config().start == "deep"
    assert quiet(evaluate, EvalConfig(run=asked.out))["fingerprint"] == result["fingerprint"]
    linear = load_model(asked.model, quantize=quantize)[0].get_submodule(
        "model.layers.1.mlp.up_proj"
    )
    x = torch.randn(5, linear.in_features)
    torch.testing.assert_close(x @ dense_of(linear).T, linear(x), atol=1e-4, rtol=1e-3)


def test_a_part_of_it_on_a_masked_model(settings: Any) -> None:
    asked = settings("bert", "lora", template="{text} It was {mask}.", labels="neg=great,pos=bad")
    asked = replace(asked, tune=r"layer\.1\.")
    result = quiet(train, asked)
    names = [name for name, *_ in jf.read_log(RunFolder(asked.out).log).header["tensors"]]
    assert len(names) == 4
    assert all("layer.1" in name for name in names)
    assert quiet(evaluate, EvalConfig(run=asked.out))["fingerprint"] == result["fingerprint"]


def test_another_rounding_is_another_base(settings: Any) -> None:
    asked = settings("llama", "lora")
    quiet(train, asked)
    with pytest.raises(UserError, match=f"--quantize is '{asked.quantize}' in the run and None now"):  # fmt: skip
        quiet(train, replace(asked, quantize=None, max_forwards=20, resume=True))
    other = next(name for name in LIBRARIES if name != asked.quantize)
    with pytest.raises(UserError, match=f"--quantize is '{other}', and the run's base model was quantised as"):  # fmt: skip
        quiet(evaluate, EvalConfig(run=asked.out, quantize=other))
    with pytest.raises(UserError, match=f"--merge adds .* quantised .{asked.quantize}.: leave it out"):  # fmt: skip
        quiet(rebuild, ReplayConfig(asked.out, f"{asked.out}-m", merge=True))
    model = tuners.attach(*load_model(asked.model), asked)
    with pytest.raises(UserError, match="made from a base model with fingerprint"):
        jf.replay(model, RunFolder(asked.out).log)


def test_baselines(settings: Any) -> None:
    asked = settings("llama", "lora")
    shared = {name: getattr(asked, name) for name in ("model", "data", "template", "labels", "quantize", "threads")}  # fmt: skip
    found = quiet(run_baseline, BaselineConfig("zero-shot", **shared))
    plain = quiet(run_baseline, BaselineConfig("zero-shot", **{**shared, "quantize": None}))
    assert found["loss"] == pytest.approx(plain["loss"], abs=0.3)
    assert found["loss"] != plain["loss"]
    tuned = BaselineConfig("first-order", **shared, tuner="lora", lr=0.05, max_steps=30)
    assert quiet(run_baseline, tuned)["loss"] < found["loss"] - 0.03


@pytest.mark.parametrize("quantize", ["int8"], indirect=True)
def test_from_the_command_line(settings: Any, capfd: Any) -> None:
    asked = settings("llama", "lora")
    argv = ["train", "--model", asked.model, "--data", asked.data, "--template", asked.template,
            "--labels", "neg=great,pos=terrible", "--out", asked.out, "--max-forwards", "8", "--tuner", "lora",
            "--quantize", asked.quantize]  # fmt: skip
    assert cli.main(argv) == 0
    assert RunFolder(asked.out).read_config().quantize == asked.quantize
    assert cli.main(["train", "--resume", "--out", asked.out]) == 0
    assert cli.main(["replay", asked.out, "--out", f"{asked.out}-adapter"]) == 0
    capfd.readouterr()


# ------------------------------------------------------------------------------------- what is refused


def test_a_library_that_is_missing_or_broken(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(said: str, quantize: str) -> None:
        with pytest.raises(UserError, match=said) as caught:
            load_model(model_folder, quantize=quantize)
        assert "\n" not in str(caught.value)

    def missing(name: str) -> Any:
        raise PackageNotFoundError(name)

    def broken(name: str) -> Any:
        raise ImportError("no symbol\nin the library")

    # of this module alone: transformers asks importlib too
    empty = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None))
    monkeypatch.setattr(quantised, "importlib", empty)
    monkeypatch.setattr(quantised, "version", missing)
    for name, library in LIBRARIES.items():
        refused(f"--quantize is '{name}': it needs {library}, which is not installed: pip", name)
        assert quantised.library_version(name) == {}
    empty.util.find_spec = lambda name: True
    empty.import_module = broken
    for name, library in LIBRARIES.items():
        refused(f"--quantize is '{name}': {library} cannot be used here: no symbol in", name)


def test_matrices_that_cannot_be_dealt_into_blocks(folder: Any) -> None:
    pytest.importorskip("bitsandbytes")

    def narrow(model: Any) -> None:
        model.config.intermediate_size = 30
        for layer in model.model.layers:
            layer.mlp = type(layer.mlp)(model.config)

    with pytest.raises(UserError, match="a scale among 64 weights, and a matrix of 30 x 16 cannot"):
        load_model(folder("llama", "-narrow", narrow), quantize="bnb4")
    load_model(folder("llama", "-narrow"), quantize="bnb8")


def test_a_model_without_maps_that_it_knows(model_folder: Path) -> None:
    pytest.importorskip("torchao")
    with pytest.raises(UserError, match="'int8': torchao finds no linear map that it could quantise in a gpt2 model: choose"):  # fmt: skip
        load_model(model_folder, quantize="int8")


@pytest.mark.parametrize("tuner", ["full", "head"])
def test_tuners_that_move_the_weights(tuner: Any) -> None:
    said = f"--quantize is 'bnb4': quantised weights are frozen, and --tuner is '{tuner}': choose --tuner lora"
    shared: dict[str, Any] = {"model": "m", "data": "d.csv", "template": "{text}", "labels": "a=b,c=d"}  # fmt: skip
    with pytest.raises(UserError, match=said):
        resolved(TrainConfig(**shared, out="o", tuner=tuner, quantize="bnb4"))
    with pytest.raises(UserError, match=said):
        quiet(run_baseline, BaselineConfig("first-order", **shared, tuner=tuner, quantize="bnb4"))
    with pytest.raises(UserError, match="--quantize is 'int4': it must be one of int8, bnb8, bnb4"):
        resolved(TrainConfig(**shared, out="o", tuner="lora", quantize="int4"))  # type: ignore[arg-type]
