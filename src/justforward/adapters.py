"""Adapters: what a folder in peft's format was made for, and its base model with it on, for scoring.

A LoRA, a prefix or a soft prompt, written by `replay` or by peft itself. Weights come as safetensors only.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from justforward.errors import UserError
from justforward.models import LOAD_ERRORS, load_model
from justforward.sources import ADAPTER

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS = "adapter_model.safetensors"


def base_of(src: str | Path, base: str | None = None) -> str | None:
    """The base model of an adapter's folder; None where `src` is no such folder.

    Args:
        src: a model as `load_model` takes it, or an adapter's folder.
        base: instead of the one that the adapter names.

    Raises:
        UserError: its adapter_config.json is damaged or names none; a base is given for what is no adapter.
    """
    path = Path(src).expanduser() / ADAPTER
    if not path.is_file():
        if base is not None:
            raise UserError(
                f"--base is {base!r}: it is for an adapter, and {src} holds no {ADAPTER}: leave it out"
            )
        return None
    named = base or _settings(path).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise UserError(f"{path}: names no base model: give it with --base")
    return named


def load_adapter(
    src: str | Path,
    base: str,
    notify: Callable[[str], None] | None = None,
    quantize: str | None = None,
    dtype: str = "float32",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model with the adapter on it, and the base's tokenizer; nothing of it requires a gradient.

    Args:
        src: the adapter's folder.
        base: its base model, as `load_model` takes it.
        notify, quantize, dtype: as `load_model` has them.

    Raises:
        UserError: the base cannot be loaded, or the adapter does not fit it or is of a kind that moves positions in a
            way of its own.
    """
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel, PeftType, PromptLearningConfig

    folder = Path(src).expanduser()
    kind: Any = _settings(folder / ADAPTER).get("peft_type")
    makes = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
    before_text = makes is not None and issubclass(makes, PromptLearningConfig)
    known = (PeftType.PREFIX_TUNING, PeftType.PROMPT_TUNING)
    if makes is None or (before_text and kind not in known):
        raise UserError(
            f"{folder / ADAPTER}: peft_type is {kind!r}: it must be LORA, or another that adds to the model's own "
            "layers, PREFIX_TUNING or PROMPT_TUNING"
        )
    try:
        held = set(load_file(folder / WEIGHTS))  # and never the pickle that may be beside it
    except (OSError, SafetensorError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"{folder / WEIGHTS}: cannot be read: {said}: copy it again") from error
    model, tokenizer = load_model(base, notify, quantize, dtype)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
            warnings.filterwarnings("error", "Found missing adapter keys")
            adapted: Any = PeftModel.from_pretrained(model, str(folder)).eval()
    except LOAD_ERRORS as error:
        raise UserError(
            f"{folder}: does not fit {base}: {_short(error)}: give the model that it was made from with --base"
        ) from error
    _check_all_used(adapted, held, folder, base)
    if kind == PeftType.PROMPT_TUNING:
        from justforward.prompted import counted

        return counted(adapted), tokenizer
    return adapted, tokenizer


def _check_all_used(adapted: Any, held: set[str], folder: Path, base: str) -> None:
    """peft leaves out in silence what the model has no place for."""
    from peft import get_peft_model_state_dict

    places = get_peft_model_state_dict(
        adapted, save_embedding_layers=False
    )  # "auto" may ask the hub
    left = sorted(held - set(places) - set(adapted.state_dict()))
    if left:
        raise UserError(
            f"{folder}: does not fit {base}: it has no place for {left[0]} ({len(left)} such): give the model that "
            "it was made from with --base"
        )


def _settings(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}: copy the folder again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object: copy the folder again")
    return found


def _short(error: BaseException) -> str:
    said = " ".join(str(error).split()).rstrip(".:")
    return (said[:237] + "..." if len(said) > 240 else said) or type(error).__name__
