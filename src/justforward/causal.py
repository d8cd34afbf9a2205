"""Causal models: each choice scored by its log-likelihood after the prompt, all rows in one forward pass.

The answer " great" after the prompt "A fine film. It was" is scored as the sum of the log
probabilities of its tokens. The prompt alone predicts a first token; a further token needs a row
that also shows the ones before it. A model that reads left to right gives every shorter beginning
within a longer row, so a prompt needs one row for each *longest* such beginning: one row where all
choices are single tokens, and never more rows than choices. Rows are padded on the left, which
puts the few positions that predict answers at the end: only those go through the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from justforward.errors import UserError
from justforward.models import inner_model
from justforward.prompts import Batch, Prompts
from justforward.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class CausalPrompts(Prompts):
    """The answer follows the prompt. Arguments and errors are those of `Prompts`."""

    alone = "the template and the longest label word alone make"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        max_length: int | None = None,
    ) -> None:
        if task.masked:
            raise UserError(
                f"template {task.template!r} has {{mask}}, which only a masked model such as BERT "
                f"can fill; {type(inner_model(model)).__name__} is a causal one: end the template "
                "where the answer follows, as in '{text} It was'"
            )
        super().__init__(model, tokenizer, task, max_length)
        self.behind = []  # the answer comes there
        # the template's end says how the word is joined: see _bodies
        self._tail = task.tail.rstrip(" ")
        self._join = "" if self._tail and self._tail[-1].isspace() else " "
        self._read_words()
        self._plan_rows()
        self._check_room()

    def batch(self, prompts: Sequence[list[int]]) -> Batch:
        """``input_ids``, ``attention_mask`` and ``position_ids``, all [B, L] where one sequence a
        row is enough (all choices are single tokens), else [B, R, L] with R <= C sequences a row.
        """
        sequences = [[prompt + shown for shown in self._shown] for prompt in prompts]
        longest = max(len(row[-1]) for row in sequences)
        ids, mask, positions = [], [], []
        for row in sequences:
            for sequence in row:
                gap = longest - len(sequence)
                ids.append([self.padding] * gap + sequence)
                mask.append([0] * gap + [1] * len(sequence))
                positions.append([0] * gap + list(range(len(sequence))))
        sequences_a_row = (len(self._shown),) if len(self._shown) > 1 else ()
        shape = (len(prompts), *sequences_a_row, longest)
        device = self.model.device
        return {
            "input_ids": torch.tensor(ids, device=device).view(shape),
            "attention_mask": torch.tensor(mask, device=device).view(shape),
            "position_ids": torch.tensor(positions, device=device).view(shape),
        }

    def scores(self, batch: Batch) -> Tensor:
        """[B, C] float32: log-likelihood of each choice after its prompt. One forward pass."""
        ids = batch["input_ids"]
        rows, length = ids.shape[0], ids.shape[-1]
        arguments: dict[str, Any] = {
            "input_ids": ids.reshape(-1, length),  # [B * R, L], example-major
            "attention_mask": batch["attention_mask"].reshape(-1, length),
            "position_ids": batch["position_ids"].reshape(-1, length),
            "use_cache": False,
            "logits_to_keep": self._kept,
        }
        output = self.model(**{k: v for k, v in arguments.items() if k in self.accepts})
        # [B, R, K, V]; a model without logits_to_keep gives all L positions: the last K count
        logits = output.logits[:, -self._kept :].unflatten(0, (rows, -1)).float()
        normaliser = logits.logsumexp(dim=-1)  # [B, R, K]
        row, position, token = self._read_row, self._read_position, self._read_token
        found = logits[:, row, position, token] - normaliser[:, row, position]  # [B, tokens]
        scores: Tensor = found.new_zeros(rows, len(self.words))
        return scores.index_add(1, self._read_choice.to(found.device), found)

    def _plan_rows(self) -> None:
        """Decides which beginnings of answers are shown, and where each answer token is read."""
        self.after = max(map(len, self.words))
        beginnings = sorted({tuple(word[:-1]) for word in self.words}, key=lambda b: (len(b), b))
        self._shown = [
            list(shown)
            for shown in beginnings
            if not any(b != shown and b[: len(shown)] == shown for b in beginnings)
        ]  # ascending in length: the last is the longest
        self._kept = len(self._shown[-1]) + 1
        read: list[tuple[int, int, int, int]] = []
        for choice, word in enumerate(self.words):
            row = next(r for r, s in enumerate(self._shown) if s[: len(word) - 1] == word[:-1])
            first = self._kept - 1 - len(self._shown[row])  # where the prompt's last token is
            read += [(choice, row, first + i, token) for i, token in enumerate(word)]
        columns = [torch.tensor(column) for column in zip(*read, strict=True)]
        self._read_choice, self._read_row, self._read_position, self._read_token = columns

    def _bodies(self, rows: Sequence[dict[str, str]]) -> list[list[int]]:
        """The prompts without the space that belongs to the word.

        A tokenizer of words makes " great" one token, so spaces at the prompt's end are left out
        and one is put before the word; after a newline in the template the word follows directly.
        """
        texts = [self.task.prompt(fields) for fields in rows]
        return self._bare_all([t.rstrip(" ") if self._tail else t.rstrip() for t in texts])

    def _word_tokens(self, word: str) -> list[int]:
        for before in dict.fromkeys((self._tail, "a" if self._join else "a\n")):
            tokens = self._joined(before, self._join, word) if before else None
            if tokens is not None:
                return tokens
        return self._bare(self._join + word)
