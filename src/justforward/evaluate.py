"""Scores each choice of a row by its log-likelihood, whole batches in one forward pass.

A causal model is asked for what follows the prompt (`causal`), a masked one for what stands at the
mask (`masked`); what is common to both is here and in `prompts`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from justforward.causal import CausalPrompts
from justforward.data import Example
from justforward.errors import UserError
from justforward.masked import MaskedPrompts
from justforward.models import is_masked
from justforward.prompts import Batch, Prompts, eval_mode
from justforward.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Evaluation:
    """How well the model answers.

    Attributes:
        accuracy: share of rows whose likeliest choice is the label, in [0, 1].
        loss: mean of the task's loss over the rows, in nats.
        predictions: the label predicted for each row, in the order the rows were given.
        rows: how many rows.
        forwards: how many forward passes of a batch it took.
    """

    accuracy: float
    loss: float
    predictions: list[str]
    rows: int
    forwards: int


class Scorer:
    """Turns rows into batches and batches into one score a choice, or one loss a row.

    Args:
        model: a causal or masked language model.
        tokenizer: its tokenizer; it needs no padding token.
        task: template and label words; the template has ``{mask}`` if the model is a masked one.
        max_length: longest sequence in tokens, prompt and answer together; a longer row has the
            text of its longest field shortened (the template and the answer stay whole). None
            truncates nothing: a row longer than the model's context is an error.

    Raises:
        UserError: a template for the other kind of model; label words that become the same tokens
            or none, or for a masked model more than one; a max_length that is beyond the model's
            context or leaves no room for the template.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        max_length: int | None = None,
    ) -> None:
        self.model = model
        self.task = task
        self.labels = list(task.labels)
        self.max_length = max_length
        kind = MaskedPrompts if is_masked(model) else CausalPrompts
        self.prompts: Prompts = kind(model, tokenizer, task, max_length)
        self._tokens: dict[int, tuple[Example, list[int]]] = {}

    # ------------------------------------------------------------------------------------ public

    def prepare(self, examples: Sequence[Example]) -> None:
        """Tokenises rows ahead of their first batch, so that a bad one is found before training.

        Raises:
            UserError: a row longer than the context, or than max_length with its text left out;
                naming its file and line.
        """
        new = [example for example in examples if id(example) not in self._tokens]
        for example, tokens in zip(new, self.prompts.tokens(new), strict=True):
            # the example is kept too: its id stays taken as long as the entry lives
            self._tokens[id(example)] = (example, tokens)

    def encode(self, examples: Sequence[Example]) -> Batch:
        """A batch of B rows: every tensor has B as its first dimension.

        ``label`` [B] is the index of the right choice; the others are the model's input, as
        `CausalPrompts.batch` or `MaskedPrompts.batch` has it.

        Raises:
            UserError: no rows, or as `prepare`.
        """
        if not examples:
            raise UserError("there are no rows to encode: give at least one")
        self.prepare(examples)
        batch = self.prompts.batch([self._tokens[id(example)][1] for example in examples])
        labels = [self._label(example) for example in examples]
        return {**batch, "label": torch.tensor(labels, device=self.model.device)}

    @torch.no_grad()
    def scores(self, batch: Batch) -> Tensor:
        """[B, C] float32: log-likelihood of each choice in its place. One forward pass."""
        return self.prompts.scores(batch)

    @torch.no_grad()
    def losses(self, batch: Batch) -> Tensor:
        """[B] float32: the task's loss of each row. One forward pass."""
        return self._losses(self.prompts.scores(batch), batch["label"])

    def evaluate(self, examples: Sequence[Example], batch_size: int) -> Evaluation:
        """Predicts each row; rows of like length share a batch, results keep the given order.

        Raises:
            UserError: no rows, a batch size below 1, a score that is not finite; or as `prepare`.
        """
        if not examples:
            raise UserError("there are no rows to evaluate: give at least one")
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size} is below 1: give a whole number from 1")
        self.prepare(examples)
        # longest first: what is too big for the memory fails at once
        order = sorted(
            range(len(examples)), key=lambda i: len(self._tokens[id(examples[i])][1]), reverse=True
        )
        predicted = [0] * len(examples)
        losses = [0.0] * len(examples)
        forwards = 0
        with eval_mode(self.model), torch.no_grad():
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                batch = self.encode([examples[i] for i in rows])
                scores = self.prompts.scores(batch)
                forwards += 1
                finite = scores.isfinite().all(dim=1).tolist()
                if not all(finite):
                    bad = examples[rows[finite.index(False)]]
                    raise UserError(
                        f"{bad.where}: the scores are not finite: the model's weights are broken: "
                        "load another model or replay to an earlier step"
                    )
                row_losses = self._losses(scores, batch["label"]).tolist()
                for i, choice, loss in zip(
                    rows, scores.argmax(dim=1).tolist(), row_losses, strict=True
                ):
                    predicted[i], losses[i] = choice, loss
        predictions = [self.labels[choice] for choice in predicted]
        right = sum(p == example.label for p, example in zip(predictions, examples, strict=True))
        count = len(examples)
        # fsum: the mean does not depend on the order of the batches
        return Evaluation(right / count, math.fsum(losses) / count, predictions, count, forwards)

    def _losses(self, scores: Tensor, label: Tensor) -> Tensor:
        if self.task.loss == "choices":
            scores = scores.log_softmax(dim=-1)
        return -scores.gather(1, label[:, None]).squeeze(1)

    def _label(self, example: Example) -> int:
        try:
            return self.labels.index(example.label)
        except ValueError:
            raise UserError(
                f"{example.where}: label {example.label!r} has no word: the task has "
                f"{', '.join(self.labels)}"
            ) from None
