"""Tiny models with random weights and small real tokenizers, all made here: no network, no files.

Reading order: tokenizers, models, rows.
"""

from __future__ import annotations

import io
import json
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from justforward import ondisk
from justforward.config import TrainConfig
from justforward.memory import in_memory

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Where the tests are a job in the background of a script SIGINT is ignored, also by all they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile(
    "justforward",
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("justforward")

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

# tiny models gain nothing from threads, and lose much where the cores are busy with other work
torch.set_num_threads(1)

CONTEXT = 64
ARCHITECTURES = ("opt", "gpt2", "llama")
MASKED = {"bert": "wordpiece", "roberta": "roberta", "distilbert": "wordpiece"}  # and tokenizers
SEQ2SEQ = {"t5": "t5", "bart": "roberta"}  # and tokenizers
CORPUS = [
    "a fine film with great acting . It was great",
    "a dull and terrible film , not good at all . It was terrible",
    "the story is wonderful , the music is great and the end is very good",
    "bad acting , bad music and a terrible story that was not very good",
    "Premise: the film was long. Question: was it short? Answer: yes no maybe\n",
] * 4


@pytest.fixture(autouse=True, scope="session")
def any_folder_will_do() -> Iterator[None]:
    """Where the tests' folders are on a tmpfs, weights in a file are tested there."""
    with pytest.MonkeyPatch.context() as patch:
        if in_memory(tempfile.gettempdir()) is not None:
            patch.setattr(ondisk, "in_memory", lambda folder: None)
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reliability", type=Path, help="write the table of the fault suite there")


def pytest_sessionfinish(session: pytest.Session) -> None:
    page = session.config.getoption("--reliability")
    if page is not None:
        import reliability

        there = getattr(session.config, "workeroutput", None)  # a process of xdist's
        if there is not None:
            there["faults"] = reliability.counted()
        else:
            reliability.write(page)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """What was counted in a process of xdist's is counted here, too."""
    import reliability

    reliability.add(getattr(node, "workeroutput", {}).get("faults", {}))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "real: loads the packaged SmolLM2 (half a gigabyte)")


# --------------------------------------------------------------------------------------- tokenizers


def _bytelevel(vocab_size: int) -> Any:
    """GPT-2's kind: bytes, a space belongs to the word after it, no special token added."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    fast: Any = PreTrainedTokenizerFast
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return fast(tokenizer_object=inner, eos_token="<|endoftext|>")


def _metaspace(vocab_size: int) -> Any:
    """Sentencepiece's kind: ▁ before a word, bytes as fallback, <s> put before a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    fast: Any = PreTrainedTokenizerFast
    inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    inner.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=vocab_size + 256,
            special_tokens=["<unk>", "<s>", "</s>", *byte_tokens],
            initial_alphabet=[chr(code) for code in range(33, 127)],
            show_progress=False,
        ),
    )
    # bytes are ordinary tokens in a real one: decoding must not leave them out as special
    state = json.loads(inner.to_str())
    state["added_tokens"] = state["added_tokens"][:3]
    inner = Tokenizer.from_str(json.dumps(state))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return fast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _wordpiece(vocab_size: int) -> Any:
    """BERT's kind: lower case, words whole or in pieces, [CLS] and [SEP] around a text."""
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    fast: Any = PreTrainedTokenizerFast
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    inner.train_from_iterator(
        CORPUS,
        trainers.WordPieceTrainer(
            vocab_size=vocab_size, special_tokens=special, show_progress=False
        ),
    )
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return fast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def _roberta(vocab_size: int) -> Any:
    """RoBERTa's kind: bytes, <s> and </s> around a text, a mask that takes the space before it."""
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    fast: Any = PreTrainedTokenizerFast
    mask = AddedToken("<mask>", lstrip=True, special=True)
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=vocab_size + 260,
            special_tokens=["<s>", "<pad>", "</s>", "<unk>", mask],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    inner.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), add_prefix_space=False
    )
    return fast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token=mask,
    )


def _t5(vocab_size: int) -> Any:
    """T5's kind: \u2581 before a word, </s> behind a text, <pad> as the first token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    fast: Any = PreTrainedTokenizerFast
    inner = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    inner.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<pad>", "</s>", "<unk>"],
            initial_alphabet=[chr(code) for code in range(33, 127)],
            show_progress=False,
        ),
    )
    inner.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return fast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


TOKENIZERS: dict[str, Callable[[int], Any]] = {
    "bytelevel": _bytelevel,
    "metaspace": _metaspace,
    "wordpiece": _wordpiece,
    "roberta": _roberta,
    "t5": _t5,
}


@cache
def make_tokenizer(kind: str = "bytelevel", vocab_size: int = 340) -> Any:
    return TOKENIZERS[kind](vocab_size)


@pytest.fixture
def tokenizer() -> Any:
    """A byte-level BPE without a padding token."""
    return make_tokenizer("bytelevel")


@pytest.fixture(params=["bytelevel", "metaspace"])
def any_tokenizer(request: pytest.FixtureRequest) -> Any:
    return make_tokenizer(request.param)


# ------------------------------------------------------------------------------------------- models


def make_model(architecture: str, *, vocab_size: int = 1024, seed: int = 0) -> Any:
    """A language model of some ten thousand weights: fp32, eval mode, the head tied or not (Llama)."""
    from transformers import (
        BartConfig,
        BartForConditionalGeneration,
        BertConfig,
        BertForMaskedLM,
        DistilBertConfig,
        DistilBertForMaskedLM,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        OPTConfig,
        OPTForCausalLM,
        RobertaConfig,
        RobertaForMaskedLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    encoder: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": 0.2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if architecture == "opt":
            model: Any = OPTForCausalLM(
                OPTConfig(
                    vocab_size=vocab_size,
                    hidden_size=16,
                    word_embed_proj_dim=16,
                    ffn_dim=32,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    max_position_embeddings=CONTEXT,
                    init_std=0.2,
                    dropout=0.0,
                )
            )
        elif architecture == "gpt2":
            model = GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=vocab_size,
                    n_embd=16,
                    n_layer=2,
                    n_head=2,
                    n_positions=CONTEXT,
                    initializer_range=0.2,
                    resid_pdrop=0.0,
                    embd_pdrop=0.0,
                    attn_pdrop=0.0,
                    bos_token_id=0,
                    eos_token_id=0,
                )
            )
        elif architecture == "llama":
            model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=vocab_size,
                    hidden_size=16,
                    intermediate_size=32,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    num_key_value_heads=1,
                    max_position_embeddings=CONTEXT,
                    initializer_range=0.2,
                )
            )
        elif architecture == "bert":
            model = BertForMaskedLM(
                BertConfig(**encoder, max_position_embeddings=CONTEXT, pad_token_id=0)
            )
        elif architecture == "roberta":
            model = RobertaForMaskedLM(
                RobertaConfig(
                    **encoder,
                    max_position_embeddings=CONTEXT + 2,  # the first two are for the padding
                    type_vocab_size=1,
                    pad_token_id=1,
                )
            )
        elif architecture == "distilbert":
            model = DistilBertForMaskedLM(
                DistilBertConfig(
                    vocab_size=vocab_size,
                    dim=16,
                    hidden_dim=32,
                    n_layers=2,
                    n_heads=2,
                    max_position_embeddings=CONTEXT,
                    initializer_range=0.2,
                    pad_token_id=0,
                )
            )
        elif architecture == "t5":
            model = T5ForConditionalGeneration(
                T5Config(
                    vocab_size=vocab_size,
                    d_model=16,
                    d_kv=8,
                    d_ff=32,
                    num_layers=2,
                    num_heads=2,
                    relative_attention_num_buckets=8,
                    relative_attention_max_distance=16,
                    decoder_start_token_id=0,
                )
            )
        elif architecture == "bart":
            model = BartForConditionalGeneration(
                BartConfig(
                    vocab_size=vocab_size,
                    d_model=16,
                    encoder_layers=2,
                    decoder_layers=2,
                    encoder_attention_heads=2,
                    decoder_attention_heads=2,
                    encoder_ffn_dim=32,
                    decoder_ffn_dim=32,
                    max_position_embeddings=CONTEXT,
                    init_std=0.2,
                    pad_token_id=1,
                    forced_eos_token_id=None,
                )
            )
        else:
            raise ValueError(architecture)
    return model.eval()


def check_alone_and_together(scorer: Any, examples: list[Any], atol: float) -> None:
    """Each row has the scores that it has by itself; rows that do not fit are none."""
    from justforward.errors import UserError

    try:
        together = scorer.scores(scorer.encode(examples))
    except UserError as error:  # bytes as tokens make characters long
        if "context" not in str(error):
            raise
        return
    for i, example in enumerate(examples):
        alone = scorer.scores(scorer.encode([example]))[0]
        torch.testing.assert_close(together[i], alone, atol=atol, rtol=1e-5)


@pytest.fixture
def tiny_opt() -> Any:
    return make_model("opt")


@pytest.fixture
def tiny_gpt2() -> Any:
    return make_model("gpt2")


@pytest.fixture
def tiny_llama() -> Any:
    return make_model("llama")


@pytest.fixture(params=ARCHITECTURES)
def tiny_model(request: pytest.FixtureRequest) -> Any:
    """Each of the three in turn."""
    return make_model(request.param)


def materialise(weights: Any, i: int, seed: int) -> torch.Tensor:
    """z of tensor i along one direction of `directions.Weights`, float64: what kernels never hold."""
    seeds = np.array([seed], np.uint64)
    if weights.is_outer(i):
        a, b = (torch.as_tensor(x)[0].double() for x in weights.factors(i, seeds))
        return torch.outer(a, b)
    return torch.as_tensor(weights.dense(i, seeds)).double().view(weights.tensors[i].shape)


@pytest.fixture
def model_folder(tmp_path: Path, tokenizer: Any) -> Path:
    """A folder with a tiny GPT-2 and its tokenizer, as save_pretrained writes it."""
    folder = tmp_path / "model"
    make_model("gpt2").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(params=sorted(MASKED))
def masked_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The same with each of the masked models in turn."""
    folder = tmp_path / "masked"
    make_model(request.param).save_pretrained(folder)
    make_tokenizer(MASKED[request.param]).save_pretrained(folder)
    return folder


@pytest.fixture(params=sorted(SEQ2SEQ))
def seq2seq_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The same with each of the encoder-decoders in turn."""
    folder = tmp_path / "seq2seq"
    make_model(request.param).save_pretrained(folder)
    make_tokenizer(SEQ2SEQ[request.param]).save_pretrained(folder)
    return folder


# --------------------------------------------------------------------------------------------- rows


@pytest.fixture
def sentiment_csv(tmp_path: Path) -> Path:
    """60 different rows, two labels in turn."""
    path = tmp_path / "rows.csv"
    rows = [
        f'"film {i} was {"good, great" if i % 2 else "bad, dull"}",{"pos" if i % 2 else "neg"}\n'
        for i in range(60)
    ]
    path.write_text("text,label\n" + "".join(rows))
    return path


def small_run(model: Path, data: Path, out: Path, **given: Any) -> TrainConfig:
    """Ten steps from the base, on few rows. The words are swapped, so that the model has everything to learn."""
    usual: dict[str, Any] = {
        "template": "{text} It was",
        "labels": {"neg": "great", "pos": "terrible"},
        "max_forwards": 20,
        "eval_every": 6,
        "lr": 3e-2,
        "threads": 1,
        "start": "base",
        "patience": 0,
    }
    return TrainConfig(model=str(model), data=str(data), out=str(out), **{**usual, **given})


def trained(config: TrainConfig) -> tuple[dict[str, Any], str]:
    """A run: its result, and what it said."""
    from justforward.progress import Progress
    from justforward.run import train

    out = io.StringIO()
    return train(config, Progress(out)), out.getvalue()


def refusal(config: TrainConfig) -> str:
    """What is said of a configuration that is refused."""
    from justforward.errors import UserError
    from justforward.settings import resolved

    with pytest.raises(UserError) as caught:
        resolved(config)
    return str(caught.value)


def lines_of(config: TrainConfig) -> list[dict[str, Any]]:
    """A run's metrics.jsonl, without what the clock says."""
    from justforward.folder import RunFolder

    metrics, _ = RunFolder(config.out).read_metrics()
    return [{k: v for k, v in m.items() if "seconds" not in k} for m in metrics]


@pytest.fixture(autouse=True, scope="session")
def _no_hub() -> Iterator[None]:
    """A test that would reach the hub fails at once instead of waiting for the network."""
    import huggingface_hub.constants as constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    yield
    constants.HF_HUB_OFFLINE = before
