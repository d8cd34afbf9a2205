"""Tuned tensors that saving a model leaves out: they are kept beside it, and taken up again.

peft saves what its method is known to train. Of p-tuning, and of a prefix with a projection, that is what the trained network
gives, not the network; and norms that were unfrozen by hand are not an adapter's. transformers leaves out what a model class
says it can do without, and renames experts. Trainer loads what it finds and goes on with the rest as it is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from justforward.errors import UserError

logger = logging.get_logger(__name__)

BESIDE = "tuned.safetensors"


def learns_prompt(model: Any) -> bool:
    """Whether a peft model learns a prompt or a prefix."""
    config = getattr(model, "active_peft_config", None)
    return bool(getattr(config, "is_prompt_learning", False))


def left_out(model: nn.Module, folder: Path) -> list[str]:
    """Names of the tuned parameters that what was saved of a model in a folder does not give back."""
    state = model.state_dict()
    tuned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if _has_model(folder):
        known = _names_in(folder)
        # tied parameters are saved under one of their names
        kept = {_place(tensor) for name, tensor in state.items() if name in known}
    else:
        kept = {_place(tensor) for tensor in _of_adapter(model, state).values()}
    return [name for name, p in tuned.items() if _place(p) not in kept]


def save_beside(model: nn.Module, folder: Path) -> None:
    """Save what a folder lacks of the tuned parameters of the model that has just been saved there. They are plain."""
    path = folder / BESIDE
    names = left_out(model, folder)
    if not names:
        path.unlink(missing_ok=True)
        return
    alone = learns_prompt(model)  # what peft saves of a prompt says nothing of what made it
    if not alone and not _has_model(folder):
        logger.warning_once(
            f"{len(names)} tuned parameters ({names[0]}, ...) are no part of the adapter that is saved, and not loaded with "
            f"it: they are in {BESIDE} beside it"
        )
    save_file(
        {
            name: p.detach().contiguous()
            for name, p in model.named_parameters()
            if name in names or (alone and p.requires_grad)
        },
        path,
    )


def load_beside(model: nn.Module, folder: Path) -> None:
    """Take up what `save_beside` saved, if it did.

    Raises:
        UserError: the model has no such parameters.
    """
    path = folder / BESIDE
    if not path.is_file():
        return
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, saved in load_file(path).items():
            mine = own.get(name)
            if mine is None or mine.shape != saved.shape or mine.dtype != saved.dtype:
                here = "none" if mine is None else f"one of {tuple(mine.shape)}, {mine.dtype}"
                raise UserError(
                    f"{path}: {name} is {tuple(saved.shape)}, {saved.dtype}; the model has {here}: make the model as it "
                    "was made for that training"
                )
            mine.copy_(saved)


def is_whole(model: nn.Module, folder: Path) -> bool:
    """Whether what `save_beside` saved is all that there is to load: Trainer would take a prompt for what makes it."""
    from peft import PeftModel

    if not (folder / BESIDE).is_file():
        return False
    # an adapter within a model of transformers is saved without it, and Trainer looks for the model
    return learns_prompt(model) or not (_has_model(folder) or isinstance(model, PeftModel))


def _has_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))


def _place(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.numel()


def _names_in(folder: Path) -> set[str]:
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    with safe_open(folder / SAFE_WEIGHTS_NAME, "pt") as file:
        return set(file.keys())


def _of_adapter(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What peft saves of the adapter that Trainer loads: the first of the active ones."""
    from peft import PeftModel, get_peft_model_state_dict

    if not isinstance(model, PeftModel):
        return {}
    found: dict[str, Tensor] = get_peft_model_state_dict(
        model, state, model.active_adapters[0], save_embedding_layers=False
    )
    return found
