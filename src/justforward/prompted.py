"""A soft prompt before the text: peft's prompt tuning, each row with a look-up of its own, and positions that are counted.

peft's own forward of a causal model leaves `position_ids` out, so that a row padded on the left is read at the
positions of its padding. Here the prompt stands at 0 to n - 1 and each row's text goes on from n, wherever its padding
is: what a row is scored does not depend on the rows beside it. A masked model's rows are padded on the right, and it
counts by itself.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from peft import PeftModelForCausalLM, PeftModelForFeatureExtraction
from torch import Tensor


class Prompted(PeftModelForCausalLM):
    """peft's model, to be saved and loaded as such; `counted` makes one of a causal model."""

    def forward(  # type: ignore[override]  # of the tokens alone: what a prompt is put before
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **rest: Any,
    ) -> Any:
        """The base model's output for the prompt and tokens [N, L] behind it: of N x (n + L) positions.

        Args:
            attention_mask, position_ids: [N, L], of the tokens alone, as the base model takes them.
            rest: as the base model takes it.
        """
        model: Any = self.get_base_model()
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if position_ids is None:
            position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        places, given = _put_before(self, input_ids, attention_mask)
        if "position_ids" in inspect.signature(model.forward).parameters:
            given["position_ids"] = torch.cat([places, position_ids + places.shape[1]], dim=1)
        return model(**given, **rest)


class PromptedMasked(PeftModelForFeatureExtraction):
    """The same of a masked model."""

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **rest: Any
    ) -> Any:
        """As `Prompted`'s, of rows padded on the right."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        return self.get_base_model()(**_put_before(self, input_ids, attention_mask)[1], **rest)


def _put_before(
    model: Any, input_ids: Tensor, attention_mask: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The prompt's positions [N, n], and embeddings and mask [N, n + L] of prompt and tokens."""
    encoder: Any = model.get_submodule(f"prompt_encoder.{model.active_adapter}.embedding")
    count = int(encoder.num_embeddings)
    # looked up once a row: in activation space each row has a direction of its own
    places = torch.arange(count, device=input_ids.device).expand(len(input_ids), count)
    embedded = model.get_base_model().get_input_embeddings()(input_ids)
    ones = attention_mask.new_ones(len(input_ids), count)
    return places, {
        "inputs_embeds": torch.cat([encoder(places), embedded], dim=1),
        "attention_mask": torch.cat([ones, attention_mask], dim=1),
    }


def counted(model: Any) -> Any:
    """`model`, a peft.PeftModelForCausalLM or -ForFeatureExtraction with a soft prompt, made one of these in place."""
    model.__class__ = Prompted if isinstance(model, PeftModelForCausalLM) else PromptedMasked
    return model
