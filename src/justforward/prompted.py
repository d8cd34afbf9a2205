"""A causal model with a soft prompt before the text: peft's prompt tuning, with positions that are counted.

peft's own forward leaves `position_ids` out, so that a row padded on the left is read at the positions of its
padding. Here the prompt stands at 0 to n - 1 and each row's text goes on from n, wherever its padding is: what a
row is scored does not depend on the rows beside it.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from peft import PeftModelForCausalLM
from torch import Tensor


class Prompted(PeftModelForCausalLM):
    """peft's model, to be saved and loaded as such; `counted` makes one."""

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
        encoder: Any = self.get_submodule(f"prompt_encoder.{self.active_adapter}.embedding")
        count = int(encoder.num_embeddings)
        # looked up once a row: in activation space each row has a direction of its own
        places = torch.arange(count, device=input_ids.device).expand(len(input_ids), count)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if position_ids is None:
            position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        given = {
            "inputs_embeds": torch.cat(
                [encoder(places), model.get_input_embeddings()(input_ids)], dim=1
            ),
            "attention_mask": torch.cat(
                [attention_mask.new_ones(len(input_ids), count), attention_mask], dim=1
            ),
        }
        if "position_ids" in inspect.signature(model.forward).parameters:
            given["position_ids"] = torch.cat([places, position_ids + count], dim=1)
        return model(**given, **rest)


def counted(model: Any) -> Any:
    """`model`, a peft.PeftModelForCausalLM with a soft prompt, made a `Prompted` in place."""
    model.__class__ = Prompted
    return model
