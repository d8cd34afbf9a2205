"""What of a model is tuned: all of it (full), low-rank additions (lora), a prefix, a soft prompt, or the output head.

    full     nothing is added
    lora     W x becomes W x + s B (A x), A drawn from the run's seed, B = 0 (peft's layers)
    prefix   keys and values of a few tokens before the text, in every layer (peft's prefix encoder)
    prompt   embeddings of a few tokens before the text (arXiv 2104.08691; peft's format, `prompted`)
    head     the matrix that turns the last hidden state into logits, untied from the embeddings

Everything here is a function of base model and configuration alone, so base + config + log = the tuned
model. The exceptions are where a prefix starts, and what is fitted to training rows before the first step: both come out of
forward passes, whose last bits differ between machines and thread counts, so a run folder keeps them (`keep_start`).

All adapters work with both estimators: peft applies LoRA by two linear maps and looks a prefix up as rows of one
matrix [tokens, layers x 2 x heads x head size], a prompt is looked up too, and activation space knows both.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from justforward import lowrank, noise
from justforward.config import FITTED, PROBED, TrainConfig
from justforward.errors import UserError
from justforward.folder import write_whole
from justforward.models import inner_model, is_seq2seq
from justforward.stored import compute_wide, plain
from justforward.stream import matrix_of, write

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Names of the attention's query and value maps, for architectures that peft has no default for.
USUAL_TARGETS = ("q_proj", "v_proj")


def attach(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
    start: Path | None = None,
) -> PreTrainedModel:
    """The model with the tuner of `config` on it, at its start; only what the tuner tunes has requires_grad.

    Args:
        model: the base model; changed in place.
        tokenizer: its tokenizer: a prefix and a prompt start from ordinary tokens.
        config: tuner and its options, seed.
        start: what `keep_start` has written, of a run that has begun. None, of one that begins: a prefix is
            computed (as it is where the file is lost), all else is the base's, for `starting.begin` to fit.

    Returns:
        The model (full, head), or a peft.PeftModel around it (lora, prefix, prompt).

    Raises:
        UserError: the model cannot take the tuner, a pattern finds nothing, or the start is damaged, or lost where it
            came from training rows.
    """
    if config.tuner == "lora":
        return _lora(model, config, start)
    if config.tuner in ("prefix", "prompt") and is_seq2seq(model):
        raise UserError(
            f"--tuner is {config.tuner!r}: a {model.config.model_type} model is an encoder-decoder, and a {config.tuner} "
            "is put before the text of a causal or masked one: use --tuner lora"
        )
    if config.tuner == "prefix":
        return _prefix(model, tokenizer, config, start)
    if config.tuner == "prompt":
        return _prompt(model, tokenizer, config)
    if config.tuner == "head" or config.start in PROBED:
        head = _own_head(model, config)
        if config.tuner == "head":
            mine = {id(parameter) for parameter in head.parameters()}
            for parameter in model.parameters():
                parameter.requires_grad_(id(parameter) in mine)
    if start is not None and (tensors := _fitted(config, start)):
        if config.start in PROBED:
            _check_rows(tensors, model, start)
            put_rows(model, tensors)
        _write_maps(model, tensors, start)
    return model


def _fitted(config: TrainConfig, start: Path | None) -> dict[str, Tensor]:
    """What was fitted to training rows, of a run that has begun with that."""
    if config.start not in FITTED or start is None:
        return {}
    if not start.exists():
        raise UserError(
            f"{start}: is missing: the run started from what was fitted to training rows, which is kept there: copy it again"
        )
    return _read_start(start, "copy it again")


def keep_start(
    model: nn.Module, config: TrainConfig, path: Path, begun: dict[str, Tensor] | None = None
) -> None:
    """Write where a prefix starts, or what was fitted to training rows; of others nothing needs to be written.

    Args:
        model: what `attach` gave, at its start.
        config: its tuner.
        path: the file.
        begun: what was fitted before the first step (`starting.begin`).

    Raises:
        UserError: the file cannot be written.
    """
    from safetensors.torch import save

    if config.tuner == "prefix":
        encoder: Any = model.get_submodule("prompt_encoder.default.embedding")
        write_whole(path, save({_PREFIX: encoder.weight.detach()}))
    elif config.start in FITTED:
        assert begun is not None
        write_whole(path, save(begun))


def merged(model: Any) -> PreTrainedModel:
    """The base model with its LoRA added into the weights; what `attach` gave is used up.

    The sum is rounded as the weights are: to float32, where scores change in their last digits, or to 16 bits.
    """
    whole: PreTrainedModel = model.merge_and_unload()
    return whole


def _wrapped(model: PreTrainedModel, settings: Any) -> Any:
    from peft import get_peft_model

    # torch fills new layers from its global generator; peft asks models an outdated question
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        return get_peft_model(model, settings).eval()


# ------------------------------------------------------------------------------------------- LoRA


def _lora(model: PreTrainedModel, config: TrainConfig, start: Path | None) -> PreTrainedModel:
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    targets = find_targets(model, config.lora_targets)
    alpha: Any = config.lora_alpha  # peft says int, and any number will do
    settings = LoraConfig(
        r=config.lora_rank,
        lora_alpha=alpha,
        target_modules=targets,
        # s = alpha / sqrt(rank). At the start B = 0 and a look moves the output by s eps Z_B (A x): a sum over
        # `rank` independent terms, which grows with sqrt(rank). So this s makes a look as long for every rank;
        # the usual alpha / rank would make it shrink, and with it the difference of losses that a step sees.
        use_rslora=True,
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in targets),
        task_type=_task_type(model),
    )
    tuned = _wrapped(model, settings)
    lowrank.draw(tuned, config.seed)
    if tensors := _fitted(config, start):
        lowrank.put(tuned, tensors, start)
    whole: PreTrainedModel = tuned
    return whole


def find_targets(model: PreTrainedModel, pattern: str | None) -> list[str]:
    """Names of the linear maps that get LoRA.

    Args:
        model: the base model.
        pattern: regular expression that finds them by name; None: peft's choice for the architecture,
            which is the attention's queries and values wherever they are matrices of their own.

    Raises:
        UserError: it is no regular expression, finds none, or a head that is tied to the embeddings.
    """
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN
    from transformers.pytorch_utils import Conv1D

    maps = [
        name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))
    ]
    kind = str(model.config.model_type)
    if pattern is None:
        names = KNOWN.get(kind, USUAL_TARGETS)
        if isinstance(names, str):
            found = [name for name in maps if re.fullmatch(names, name)]
        else:
            found = [name for name in maps if name.split(".")[-1] in names]
        if not found:
            raise UserError(
                f"--tuner is 'lora': no default targets are known for model type {kind!r}: "
                f"name its attention's maps with --lora-targets (there are {_some(maps)})"
            )
        return found
    try:
        found = [name for name in maps if re.search(pattern, name)]
    except re.error as error:
        raise UserError(f"--lora-targets is {pattern!r}: no regular expression: {error}") from error
    if not found:
        raise UserError(
            f"--lora-targets is {pattern!r}: it finds none of the {len(maps)} linear maps, such as {_some(maps)}"
        )
    whole: Any = model
    head = whole.get_output_embeddings()
    for name in found:
        if model.get_submodule(name) is head and _is_tied(model, head):
            raise UserError(
                f"--lora-targets is {pattern!r}: it finds {name}, whose weight is the embeddings' too, "
                "which an addition to one of them would part: leave it out, or use --tuner head"
            )
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) or "no linear maps"


def _task_type(model: PreTrainedModel) -> str | None:
    """peft's name for the kind of model; None (any) for a masked one."""
    from transformers import GenerationMixin

    if is_seq2seq(model):
        return "SEQ_2_SEQ_LM"
    return "CAUSAL_LM" if isinstance(model, GenerationMixin) else None


# peft's name for a model of any kind whose forward puts a prefix or a prompt before the text.
_MASKED = "FEATURE_EXTRACTION"


# ------------------------------------------------------------------------------------------ prefix

_PREFIX = "prefix"  # the tensor's name in the file of `keep_start`


def _prefix(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
    start: Path | None,
) -> PreTrainedModel:
    from peft import PrefixTuningConfig

    length = config.prefix_length
    _check_room(model, "prefix-length", length)
    keys, values = real_activations(model, ordinary_tokens(tokenizer, model, length, config.seed))
    layers, heads, _, size = keys.shape
    # peft's layout: a row a token, in it layer by layer the keys of all heads and then the values
    rows = torch.stack([keys, values], dim=1).permute(3, 0, 1, 2, 4).reshape(length, -1)
    settings = PrefixTuningConfig(
        task_type=_task_type(model) or _MASKED,
        num_virtual_tokens=length,
        num_layers=layers,
        num_attention_heads=heads,  # those of keys and values: fewer than of queries where they are grouped
        token_dim=heads * size,
        num_transformer_submodules=1,
    )
    tuned = _wrapped(model, settings)
    weight = tuned.prompt_encoder["default"].embedding.weight
    if weight.shape != rows.shape:
        raise UserError(
            f"--tuner is 'prefix': peft makes one of shape {list(weight.shape)} for this "
            f"{model.config.model_type} model, whose keys and values need {list(rows.shape)}: use --tuner lora"
        )
    with torch.no_grad():
        weight.copy_(
            rows if start is None or not start.exists() else _read_prefix(start, rows.shape)
        )
    whole: PreTrainedModel = tuned
    return whole


def _check_room(model: PreTrainedModel, option: str, length: int) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(context, int) and length >= context:
        raise UserError(
            f"--{option} is {length}: the model's context is {context} tokens, and the text needs "
            "room in it too: give less"
        )


def ordinary_tokens(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, length: int, seed: int
) -> Tensor:
    """[1, length]: ordinary tokens of the vocabulary, a function of the seed alone."""
    special = set(tokenizer.all_special_ids)
    size = min(len(tokenizer), int(model.get_input_embeddings().num_embeddings))  # type: ignore[arg-type]
    ordinary = [token for token in range(size) if token not in special]
    chosen = [ordinary[noise.step_seed(seed, i) % len(ordinary)] for i in range(length)]
    return torch.tensor([chosen], device=model.device)


@torch.no_grad()
def real_activations(model: PreTrainedModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values that the model computes for these tokens at the start of a text.

    Args:
        model: a causal or masked language model.
        tokens: [1, T].

    Returns:
        Keys and values, each [layers, heads, T, head size]; heads are those of keys and values.

    Raises:
        UserError: the model keeps none, or not the same for every layer.
    """
    cache = _cache_of(model, tokens)
    kept = [
        (getattr(layer, "keys", None), getattr(layer, "values", None))
        for layer in getattr(cache, "layers", ())
    ]
    pairs = [(k[0], v[0]) for k, v in kept if isinstance(k, Tensor) and isinstance(v, Tensor)]
    shapes = {tuple(tensor.shape) for pair in pairs for tensor in pair}
    if not pairs or len(pairs) < len(kept) or len(shapes) != 1 or pairs[0][0].dim() != 3 \
            or pairs[0][0].shape[1] != tokens.shape[1]:  # fmt: skip
        raise UserError(
            f"--tuner is 'prefix': the layers of a {model.config.model_type} model do not all keep keys and "
            "values of one shape for every token: use --tuner lora"
        )
    return torch.stack([k for k, _ in pairs]), torch.stack([v for _, v in pairs])


def _cache_of(model: PreTrainedModel, tokens: Tensor) -> Any:
    if _task_type(model) is not None:
        output = model(input_ids=tokens, use_cache=True)
        return getattr(output, "past_key_values", None)  # Mamba and RWKV hand out none
    from transformers import DynamicCache

    cache = DynamicCache()  # a masked model hands none out, and some fill one that they are given
    with contextlib.suppress(TypeError):
        model(input_ids=tokens, past_key_values=cache)
    return cache


def _read_start(path: Path, hint: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read: {said}: {hint}") from error


def _read_prefix(path: Path, shape: torch.Size) -> Tensor:
    hint = "copy it again; without the file the prefix is computed anew"
    rows = _read_start(path, hint).get(_PREFIX)
    if rows is None:
        raise UserError(f"{path}: cannot be read: it holds no {_PREFIX}: {hint}")
    if rows.shape != shape or rows.dtype != torch.float32:
        raise UserError(
            f"{path}: holds a prefix {list(rows.shape)}, the run's model takes {list(shape)}: another run's file"
        )
    return rows


# ------------------------------------------------------------------------------------------ prompt


def _prompt(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: TrainConfig
) -> PreTrainedModel:
    """Started from embeddings of ordinary tokens, which is better than noise (arXiv 2104.08691, section 3.2)."""
    from peft import PromptTuningConfig

    from justforward.prompted import counted

    if "inputs_embeds" not in inspect.signature(model.forward).parameters:
        raise UserError(
            f"--tuner is 'prompt': a {model.config.model_type} model does not take embeddings in place of tokens: use "
            "--tuner lora"
        )
    length = config.prompt_length
    _check_room(model, "prompt-length", length)
    tokens = ordinary_tokens(tokenizer, model, length, config.seed)
    with torch.no_grad():  # scaled, where the model does that in its lookup
        rows = model.get_input_embeddings()(tokens)[0]
    shape = model.config.get_text_config()
    settings = PromptTuningConfig(
        task_type=_task_type(model) or _MASKED,
        num_virtual_tokens=length,
        num_layers=shape.num_hidden_layers,  # which peft looks up under some of their names only
        num_attention_heads=shape.num_attention_heads,
        token_dim=rows.shape[1],
        num_transformer_submodules=1,
    )
    tuned = counted(_wrapped(model, settings))
    with torch.no_grad():
        tuned.prompt_encoder["default"].embedding.weight.copy_(rows)
    whole: PreTrainedModel = tuned
    return whole


# -------------------------------------------------------------------------------------------- head


def _is_tied(model: PreTrainedModel, head: nn.Module | None) -> bool:
    weight = getattr(head, "weight", None)
    return weight is not None and weight is getattr(model.get_input_embeddings(), "weight", None)


def _own_head(model: PreTrainedModel, config: TrainConfig) -> nn.Module:
    """The output head; one that is tied to the embeddings is given weights of its own first.

    Otherwise the embeddings would move with it. That costs the memory of one more embedding matrix, and the
    tuned model is saved as one whose head is not tied.
    """
    whole: Any = model
    head: Any = whole.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is None:
        option = "tuner is 'head'" if config.tuner == "head" else f"start is {config.start!r}"
        raise UserError(
            f"--{option}: a {model.config.model_type} model has no output head: use --tuner lora"
        )
    if _is_tied(model, head):
        for name, parameter in list(head.named_parameters(recurse=False)):
            setattr(head, name, nn.Parameter(parameter.detach().clone()))
        compute_wide(list(head.parameters()))
        if is_seq2seq(model):
            # The same switch ties the embeddings of encoder and decoder, which would be missing when the model is loaded
            # again. Loading leaves a head alone that is in the file with values of its own.
            mine = {name for name, module in model.named_modules() if module is head}
            model.all_tied_weights_keys = {
                name: source
                for name, source in model.all_tied_weights_keys.items()
                if name.rpartition(".")[0] not in mine
            }
        else:
            for settings in (model.config, model.config.get_text_config()):
                settings.tie_word_embeddings = False
            model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    found: nn.Module = head
    return found


def rows_of(model: Any, tokens: Sequence[int]) -> dict[str, Tensor]:
    """The output head's rows of some tokens: tokens [n]; weight [n, hidden]; bias [n], if the head has one."""
    head = inner_model(model).get_output_embeddings()
    found = {"tokens": torch.tensor(tokens), "weight": head.weight.detach()[tokens]}
    if getattr(head, "bias", None) is not None:
        found["bias"] = head.bias.detach()[tokens]
    return found


@torch.no_grad()
def put_rows(model: Any, rows: dict[str, Tensor]) -> None:
    """Make the output head's rows those that `rows_of` gave."""
    head = inner_model(model).get_output_embeddings()
    plain(head.weight)[rows["tokens"]] = rows["weight"]
    if "bias" in rows:
        plain(head.bias)[rows["tokens"]] = rows["bias"]


def _check_rows(rows: dict[str, Tensor], model: Any, path: Path) -> None:
    tokens = rows.get("tokens", torch.empty(0))
    known = len(inner_model(model).get_output_embeddings().weight)
    if (
        tokens.dtype != torch.int64
        or tokens.dim() != 1
        or not ((tokens >= 0) & (tokens < known)).all()
    ):
        raise UserError(f"{path}: holds no tokens of the run's model: another run's file")
    for name, wanted in rows_of(model, tokens.tolist()).items():
        held = rows.get(name, torch.empty(0))
        if held.shape != wanted.shape or held.dtype != wanted.dtype:
            raise UserError(
                f"{path}: holds {name} {list(held.shape)}, the run's model takes {list(wanted.shape)}: another run's file"
            )


def _write_maps(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Write what linear maps are to write in addition (`deep`, `last`), if there is any."""
    what = {n.removeprefix("what."): v for n, v in tensors.items() if n.startswith("what.")}
    to = tensors.get("to", torch.empty(0, 0))
    maps = dict(model.named_modules())
    for name, v in what.items():
        shape = matrix_of(maps[name]).shape if hasattr(maps.get(name), "weight") else ()
        if (to.shape[:1] + v.shape[1:], v.shape[:1]) != (shape, to.shape[1:]) or {
            v.dtype,
            to.dtype,
        } != {torch.float32}:
            raise UserError(
                f"{path}: {name} is no map {list(v.shape[1:])} of the run's model: another run's file"
            )
    for name, v in what.items():
        write(maps[name], to, v)
