"""A prompt encoded once: its keys and values, repeated for several answers, extended token by token.

Works with every model of transformers that takes `past_key_values`, also with a peft prefix, which stands in the
cache before the prompt, and while looking in activation space: a row's direction follows the row.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from justforward.models import inner_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def can_share(model: PreTrainedModel, accepts: set[str]) -> bool:
    """Whether the model hands out keys and values and takes them back, with positions."""
    if not {"past_key_values", "position_ids", "use_cache"} <= accepts:
        return False
    # gradient checkpointing computes layers twice, and so keeps none of what they computed
    layers = inner_model(model).modules()
    return not any(getattr(layer, "gradient_checkpointing", False) for layer in layers)


@dataclass
class Encoded:
    """What a model has read so far, padded on the left.

    Attributes:
        model: the model without an adapter around it (LoRA's layers are within it).
        cache: keys and values, of transformers' kind.
        mask: [N, T] of everything read, a prefix's tokens included.
        position: [N] of the next token.
        logits: [N, 1, V] that predict it.
    """

    model: Any
    cache: Any
    mask: Tensor
    position: Tensor
    logits: Tensor
    accepts: set[str]

    @classmethod
    def of(cls, model: PreTrainedModel, batch: dict[str, Tensor], accepts: set[str]) -> Encoded:
        """Read prompts: ``input_ids``, ``attention_mask``, ``position_ids`` [N, L]. One forward pass."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        arguments: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": batch["position_ids"],
            "use_cache": True,
            "logits_to_keep": 1,
        }
        output = model(**{k: v for k, v in arguments.items() if k in accepts})
        cache = output.past_key_values
        # a prefix that peft has put before the prompts: its tokens count as read, and as positions
        before = int(cache.get_seq_length()) - ids.shape[1]
        mask = torch.cat([mask.new_ones(len(mask), before), mask], dim=1)
        return cls(inner_model(model), cache, mask, mask.sum(dim=1), output.logits[:, -1:], accepts)

    @classmethod
    def after(cls, model: PreTrainedModel, batch: dict[str, Tensor], accepts: set[str]) -> Encoded:
        """`of`, where the prompts of a batch may have a beginning in common, ``start_ids`` [1, P]."""
        if "start_ids" not in batch:
            return cls.of(model, batch, accepts)
        begun = cls.begun(model, batch, accepts, len(batch["input_ids"]))
        begun.advanced(batch["input_ids"], batch["attention_mask"], keep=1)
        return begun

    @classmethod
    def begun(
        cls, model: PreTrainedModel, batch: dict[str, Tensor], accepts: set[str], times: int
    ) -> Encoded:
        """The common beginning of a batch, read once and repeated."""
        start = batch["start_ids"]
        ones = torch.ones_like(start)
        whole = {"input_ids": start, "attention_mask": ones, "position_ids": ones.cumsum(1) - 1}
        return cls.of(model, whole, accepts).repeated(times)

    def repeated(self, times: int) -> Encoded:
        """A copy with each row so many times, next to each other."""
        cache = _copied(self.cache)
        if times > 1:
            cache.batch_repeat_interleave(times)
        return Encoded(
            self.model,
            cache,
            self.mask.repeat_interleave(times, 0),
            self.position.repeat_interleave(times, 0),
            self.logits.repeat_interleave(times, 0),
            self.accepts,
        )

    def advanced(self, ids: Tensor, mask: Tensor, keep: int = 0) -> Any:
        """Read tokens [N, S], padded on either side by `mask`; the model's output, logits [N, S, V].

        Args:
            keep: logits of so many of the last places, where the model can tell; 0: of all.
        """
        self.mask = torch.cat([self.mask, mask], dim=1)
        steps = mask.cumsum(dim=1) - 1
        positions = (self.position[:, None] + steps.clamp(min=0)).long()
        self.position = self.position + mask.sum(dim=1)
        arguments: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": self.mask,
            "position_ids": positions,
            "past_key_values": self.cache,
            "use_cache": True,
            "logits_to_keep": keep,
        }
        output = self.model(**{k: v for k, v in arguments.items() if k in self.accepts})
        self.cache = output.past_key_values
        self.logits = output.logits[:, -1:]
        return output


def _copied(cache: Any) -> Any:
    """A copy that shares its tensors where layers grow by concatenation, which leaves the old ones alone."""
    from transformers.cache_utils import DynamicLayer

    if not all(isinstance(layer, DynamicLayer) for layer in cache.layers):
        return copy.deepcopy(cache)
    new = copy.copy(cache)
    new.layers = [copy.copy(layer) for layer in cache.layers]
    return new
