"""Models without weights, from a configuration alone: on the meta device, where a tensor is a shape and nothing else.

The OPT family is built in, so that planning for it needs no file and no network: layers, heads and hidden sizes are
those of Table 1 of the OPT paper (arXiv 2205.01068); feed-forward layers of four times the hidden size, 50,272 tokens,
2,048 positions and the 350M model's narrower embeddings and norms behind its layers are those of the published checkpoints.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from justforward.errors import UserError
from justforward.mapped import outline, settings_of
from justforward.models import Kind, auto_class, config_of, header_of, kind_of
from justforward.quantised import multiply
from justforward.stored import packed_in

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from justforward.mapped import Header

# Layers, heads, hidden size.
OPT = {
    "opt-125m": (12, 12, 768),
    "opt-350m": (24, 16, 1024),
    "opt-1.3b": (24, 32, 2048),
    "opt-2.7b": (32, 32, 2560),
    "opt-6.7b": (32, 32, 4096),
    "opt-13b": (40, 40, 5120),
    "opt-30b": (48, 56, 7168),
    "opt-66b": (64, 72, 9216),
    "opt-175b": (96, 96, 12288),
}
# What configurations call the sizes that a stand-in needs, in the order in which they are looked for.
_CALLED = {
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "n_heads"),
    "vocab_size": ("vocab_size",),
    "intermediate_size": ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size"),
    "num_key_value_heads": ("num_key_value_heads", "n_head_kv", "num_kv_heads"),
    "max_position_embeddings": ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len"),
    "tie_word_embeddings": ("tie_word_embeddings",),
}  # fmt: skip
# What transformers and torch raise of a model that cannot be made of its configuration, or be run without values.
FAILS = (RuntimeError, NotImplementedError, ValueError, TypeError, LookupError, AttributeError, ImportError, AssertionError, ArithmeticError)  # fmt: skip
_NEEDED = ("hidden_size", "num_hidden_layers", "vocab_size")


@dataclass(frozen=True)
class Plan:
    """What a model is, before it is made.

    Attributes:
        name: as it was asked for.
        config: transformers' configuration.
        kind: causal, masked or seq2seq.
        assumed: what could not be known and was assumed, a sentence each: of a stand-in, how it differs.
        header: of the .gguf whose matrices it keeps as they are stored.
    """

    name: str
    config: PretrainedConfig
    kind: Kind
    assumed: tuple[str, ...] = ()
    header: Header | None = None

    @property
    def tokens(self) -> int:
        """How many tokens it has; 0 where the configuration does not say it."""
        found = getattr(self.config.get_text_config(), "vocab_size", 0)
        return max(found, 0) if isinstance(found, int) else 0

    @cached_property
    def context(self) -> int | None:
        """The most tokens that a text may have, if the configuration bounds them."""
        found = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if not isinstance(found, int) or found < 1:
            return None
        return found - (_skipped(self) if self.kind == "masked" else 0)


@dataclass(frozen=True)
class Counts:
    """Parameters of a model by kind; a tensor that is used twice counts once.

    Attributes:
        embedding: of the tables that tokens and positions are looked up in.
        head: of the output head; 0 where it is tied to the embedding.
        tied: whether it is.
        matrices: of all other tensors with two dimensions or more.
        vectors: of norms and biases.
    """

    embedding: int
    head: int
    tied: bool
    matrices: int
    vectors: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.embedding + self.head + self.matrices + self.vectors


def read_plan(src: str, quantize: str | None = None) -> Plan:
    """What a model is.

    Args:
        src: a folder with config.json, that file itself, a .gguf, "smollm2", a hub name, or one of the OPT family
            ("opt-13b"), where there is no folder of that name.
        quantize: as for train; with "gguf" `src` must be a .gguf, or hold one.

    Raises:
        UserError: there is no such model, it is no language model, its configuration contradicts itself, or its
            architecture is not known and its configuration does not say the sizes that a stand-in needs; it is no .gguf.
    """
    path = Path(src).expanduser()
    if quantize == "gguf":
        header = header_of(src)
        config = settings_of(header)
        return Plan(src, config, kind_of(src, config), header=header)
    if src.lower() in OPT and not path.exists():
        config = opt_config(src)
        return Plan(src, config, "causal")
    file = path / "config.json" if path.is_dir() else path
    raw = _raw(file) if file.suffix == ".json" and file.is_file() else None
    for key, kind, wanted in (("model_type", str, "a name"), ("architectures", list, "names")):
        value = None if raw is None else raw.get(key)
        inner = value if isinstance(value, list) else []
        if value is not None and not (
            isinstance(value, kind) and all(isinstance(x, str) for x in inner)
        ):
            raise UserError(f"{file}: {key} is {value!r}, not {wanted}: copy it again")
    if raw is not None and not _known(raw.get("model_type")):
        found = _stand_in(
            src, raw, f"model type {raw.get('model_type')!r} is not known to transformers"
        )
        said = f"{found.assumed[0]}: all that follows is that Llama's, its weights, too"
        return replace(found, assumed=(said,))
    where = str(path.parent) if path.name == "config.json" and path.is_file() else src
    config = config_of(where)
    found = Plan(src, config, kind_of(src, config))
    check_sizes(found, vocabulary=True)
    return found


def check_sizes(plan: Plan, vocabulary: bool = False) -> None:
    """Refuse a configuration whose sizes contradict each other; asked where a model cannot be made or run.

    Args:
        plan: the model.
        vocabulary: look at whether there is one alone: the rest may be meant otherwise by an architecture that runs.

    Raises:
        UserError: naming file, key and value.
    """
    config = plan.config.get_text_config()
    path = Path(plan.name).expanduser()
    file = path / "config.json" if path.is_dir() else path

    def size(key: str) -> int | None:
        value = getattr(config, key, None)
        return value if isinstance(value, int) else None

    tokens, padding = size("vocab_size"), size("pad_token_id")
    heads, groups = size("num_attention_heads"), size("num_key_value_heads")
    hint = "copy it again from where it came"
    if tokens is not None and tokens < 1:
        raise UserError(f"{file}: vocab_size is {tokens}: a model has one token at least: {hint}")
    if vocabulary:
        return
    if tokens is not None and padding is not None and padding >= tokens:
        raise UserError(
            f"{file}: pad_token_id is {padding}, and there are {tokens} tokens (vocab_size), from 0: {hint}"
        )
    if heads and groups and (groups < 0 or heads % groups):
        raise UserError(
            f"{file}: num_key_value_heads is {groups}, which does not divide num_attention_heads, {heads}: {hint}"
        )


def opt_config(name: str) -> PretrainedConfig:
    """The configuration of a model of the OPT family, a key of `OPT` in any case."""
    from transformers import OPTConfig

    layers, heads, hidden = OPT[name.lower()]
    small = name.lower() == "opt-350m"
    return OPTConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        ffn_dim=4 * hidden,
        word_embed_proj_dim=512 if small else hidden,
        do_layer_norm_before=not small,
        architectures=["OPTForCausalLM"],
    )


def stand_in(plan: Plan, reason: str) -> Plan:
    """A Llama of the same sizes, for the steps of a model that cannot be run without its weights.

    Raises:
        UserError: its configuration does not say the sizes.
    """
    found = _stand_in(plan.name, plan.config.to_dict(), reason)
    own, other = (count(build(p, torch.float32)).total for p in (plan, found))
    said = (
        f"{found.assumed[0]}, {other:,} parameters where the model has {own:,}, for what a step has alive and its seconds alone: weights, what "
        "is tuned and what is kept are the model's own, gradients in proportion. A Llama is dense and has no encoder: where "
        "the model is otherwise, its steps take something else, and whether activation space knows it is not known"
    )
    return Plan(plan.name, found.config, "causal", (*plan.assumed, said))


def _stand_in(name: str, raw: dict[str, Any], reason: str) -> Plan:
    from transformers import LlamaConfig

    nested = raw.get("text_config")
    raw = {**raw, **nested} if isinstance(nested, dict) else raw
    sizes: dict[str, Any] = {}
    for key, names in _CALLED.items():
        value = next((raw[n] for n in names if raw.get(n) is not None), None)
        if isinstance(value, int) and (value > 0 or isinstance(value, bool)):
            sizes[key] = value
    lacking = [key for key in _NEEDED if key not in sizes]
    if lacking:
        raise UserError(
            f"{name}: {reason}, and its configuration does not say {', '.join(lacking)}, from which a Llama could stand in "
            "for it: give a model that transformers knows"
        )
    hidden = sizes["hidden_size"]
    heads = sizes.setdefault("num_attention_heads", max(hidden // 64, 1))
    if hidden % heads or heads % sizes.get("num_key_value_heads", heads):
        raise UserError(
            f"{name}: {reason}, and {heads} heads do not divide its hidden size {hidden}: give another model"
        )
    sizes.setdefault("intermediate_size", 4 * hidden)
    said = (
        f"{reason}: assumed a Llama of {sizes['num_hidden_layers']} layers, hidden size {hidden}, {heads} heads, "
        f"feed-forward size {sizes['intermediate_size']}, {sizes['vocab_size']} tokens"
    )
    return Plan(name, LlamaConfig(**sizes), "causal", (said,))


def _raw(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"{file}: cannot be read: {said}: copy it again") from error
    if not isinstance(found, dict):
        raise UserError(
            f"{file}: not a JSON object: give a config.json as save_pretrained writes it"
        )
    return found


def _known(model_type: Any) -> bool:
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def build(plan: Plan, dtype: torch.dtype) -> PreTrainedModel:
    """The model on the meta device, in eval mode.

    Raises:
        UserError: transformers cannot make it of this configuration.
    """
    try:
        with torch.device("meta"):
            model: Any = auto_class(plan.kind).from_config(plan.config, dtype=dtype)
    except FAILS as error:
        check_sizes(plan)
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{plan.name}: no model can be made of its configuration: {said}"
        ) from error
    made: PreTrainedModel = model.eval()
    return made


def count(model: Any) -> Counts:
    """Parameters by kind."""
    tables = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    head = getattr(model.get_output_embeddings(), "weight", None)
    tied = id(head) in tables
    rest = {id(p): p for p in model.parameters()}
    embedding = sum(rest.pop(key).numel() for key in tables if key in rest)
    own = 0 if tied or head is None else rest.pop(id(head)).numel()
    vectors = sum(p.numel() for p in rest.values() if p.dim() < 2)
    return Counts(embedding, own, tied, sum(p.numel() for p in rest.values()) - vectors, vectors)


def _skipped(plan: Plan) -> int:
    """Positions that no token has: those of RoBERTa and its kin begin behind the one of the padding."""
    for name, module in build(plan, torch.float32).named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


def held_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, a storage that is shared once."""
    held = [*model.parameters(), *model.buffers()]
    packed = {id(p): p.nbytes for p in map(packed_in, held) if p is not None}
    plain = [t for t in held if packed_in(t) is None]
    storages = {s._cdata: s for s in (t.untyped_storage() for t in plain)}
    return sum(storage.nbytes() for storage in storages.values()) + sum(packed.values())


# ------------------------------------------------------------------------------------------ quantised


def quantise(model: Any, plan: Plan, quantize: str) -> None:
    """Put in place of a model's matrices what `--quantize` keeps of them, and freeze the model.

    Raises:
        UserError: there is none that it knows; as `mapped.outline`.
    """
    if plan.header is not None:
        outline(model, plan.name, plan.header)
    else:
        round_maps(model, quantize)


def round_maps(model: Any, quantize: str) -> None:
    """Put in place of the linear maps what `quantised` keeps of them, and freeze the model.

    int8 and bnb8: a byte a weight and a float32 an output; bnb4: half a byte a weight and a float32 for each 64. As
    transformers has it, embeddings, the output head and what is tied to them stay as they are. GPT-2's maps
    are of a class that torchao does not know.

    Raises:
        UserError: there is no such map.
    """
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert

    kept = set(get_keys_to_not_convert(model))
    kinds = (nn.Linear,) if quantize == "int8" else (nn.Linear, Conv1D)
    maps = [m for n, m in model.named_modules() if isinstance(m, kinds) and n not in kept]
    if not maps:
        raise UserError(
            f"--quantize is {quantize!r}: it knows no linear map of a {model.config.model_type} model: choose another"
        )
    model.requires_grad_(False)
    for module in maps:
        _round(module, quantize, isinstance(module, Conv1D))


def _round(module: Any, quantize: str, turned: bool) -> None:
    weight = module.weight
    outputs, inputs = weight.shape[::-1] if turned else weight.shape
    four = quantize == "bnb4"
    size = (weight.numel() // 2, 1) if four else (outputs, inputs)
    integers = torch.empty(size, dtype=torch.uint8 if four else torch.int8, device="meta")
    scales = torch.empty(-(-weight.numel() // 64) if four else outputs, device="meta")
    module.weight = nn.Parameter(integers, requires_grad=False)
    module.register_buffer("scales", scales, persistent=False)

    def held(dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        if four:
            return torch.empty(outputs, inputs, dtype=dtype, device="meta"), None
        return integers.to(dtype), scales.to(dtype)

    module.forward = multiply(module, held)
