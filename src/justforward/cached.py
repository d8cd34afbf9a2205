"""A prompt encoded once: its keys and values, repeated for several answers, extended token by token.

Works with every model of transformers that takes `past_key_values`, also with a peft prefix, which stands in the
cache before the prompt, and while looking in activation space: a row's direction follows the row.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from justforward.errors import UserError
from justforward.models import inner_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Of transformers' layers of a cache those that keep nothing else, or those of another layer.
KEYS_AND_VALUES = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}


def can_share(model: PreTrainedModel, accepts: set[str]) -> bool:
    """Whether the model hands out keys and values, nothing else, and takes them back, with positions."""
    if not {"past_key_values", "position_ids", "use_cache"} <= accepts:
        return False
    # gradient checkpointing computes layers twice, and so keeps none of what they computed
    layers = inner_model(model).modules()
    if any(getattr(layer, "gradient_checkpointing", False) for layer in layers):
        return False
    return reach(model) > 0


def reach(model: PreTrainedModel) -> float:
    """How many places of a sequence every layer looks back over, its own included: infinity where none has a window.

    Padding takes places too. Where it stands between a beginning and its text, as in `Encoded.after`, a text of so many
    places with it is read as without; a longer one would see less of its beginning than it does by itself. 0 where a layer
    keeps something else than keys and values, such as a recurrent state, which cannot be repeated for several rows.
    """
    from transformers.cache_utils import DynamicCache

    config: Any = inner_model(model).config.get_text_config(decoder=True)
    layers = DynamicCache(config=config).layers
    if not {type(layer).__name__ for layer in layers} <= KEYS_AND_VALUES:
        return 0
    windows = [each.sliding_window for each in layers if hasattr(each, "sliding_window")]
    if "local" in getattr(
        config, "attention_layers", ()
    ):  # GPT-Neo's, which keep all they do not look at
        windows.append(config.window_size)
    return min(windows, default=math.inf)


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
        """Read prompts: ``input_ids``, ``attention_mask``, ``position_ids`` [N, L]. One forward pass.

        Raises:
            UserError: the model hands out no keys and values.
        """
        ids, mask = batch["input_ids"], batch["attention_mask"]
        arguments: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": batch["position_ids"],
            "use_cache": True,
            "logits_to_keep": 1,
        }
        output = model(**{k: v for k, v in arguments.items() if k in accepts})
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            raise UserError(
                f"{type(inner_model(model)).__name__} keeps no keys and values to write texts with: give another model"
            )
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
