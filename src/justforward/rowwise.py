"""Activation space in a loop like Trainer's: what each row of a step's micro-batches adds to the loss.

Trainer knows one loss a batch. Here are the rows' own, and the check that they add up to it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer

from justforward.activations import among, repeat_rows
from justforward.errors import UserError
from justforward.estimators import looking_mode
from justforward.mode import seen_in_training
from justforward.models import is_causal, is_seq2seq
from justforward.training_arguments import MeZOConfig

MicroBatches = Sequence[tuple[Any, Any]]  # inputs, and items of the whole step or None


def reads_prompt(model: Any) -> bool:
    """Whether a peft model puts tokens of its own before a text; a prefix is none, it has keys and values."""
    config: Any = getattr(model, "active_peft_config", None)
    return config is not None and config.peft_type in ("PROMPT_TUNING", "P_TUNING")


@contextmanager
def prompt_by_row(model: Any) -> Iterator[None]:
    """While inside, a peft model makes its prompt for each row; else it makes one, which has no row's direction, and repeats it."""
    if not reads_prompt(model) or model.active_peft_config.inference_mode:
        yield
        return

    def get_prompt(batch_size: int, *args: Any, **kwargs: Any) -> Any:
        encoder, tokens = (
            x[model.active_adapter] for x in (model.prompt_encoder, model.prompt_tokens)
        )
        return encoder(tokens.expand(batch_size, -1).to(encoder.embedding.weight.device))

    model.get_prompt = get_prompt
    try:
        yield
    finally:
        del model.get_prompt


class RowwiseTrainer(Trainer):
    """Trainer, and the losses of rows. A part of `MeZOTrainer`, never used alone."""

    args: MeZOConfig
    model: Any
    _rows_checked = _ignores_items = False

    def _seen_in_training(self) -> AbstractContextManager[None]:
        """Where `compute_loss` sees a model in training, as with Trainer; a compiled one does not hear of it."""
        return nullcontext() if self.args.torch_compile else seen_in_training(self.model)

    def _part_of_loss(self, model: nn.Module, inputs: Any, items: Any, times: int = 1) -> float:
        """A micro-batch's part of the loss of the step, as Trainer weights it, so many times."""
        with self.compute_loss_context_manager(), self._seen_in_training():
            # `compute_loss` may take the labels out of its inputs
            loss: Any = self.compute_loss(model, copy.copy(inputs), num_items_in_batch=items)
        return float(loss) * times / self._parts(items)

    def _parts(self, items: Any) -> int:
        """By what Trainer divides the loss of a micro-batch."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            scaled = self.compute_loss_func is not None or (
                self.model_accepts_loss_kwargs and items is not None
            )
        return 1 if scaled else int(self.current_gradient_accumulation_steps)

    def row_losses(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """What each row of a batch adds to the loss, for estimator="activation": override it where the loss is another.

        The default is the cross-entropy of logits and `labels`, with label smoothing: one label a row, or a label a token,
        that of the token before it in a causal model; -100 counts for nothing.

        Returns:
            A tensor [rows]: the sum over the row's items (tokens), which the trainer divides by how many there are in all; of
            a batch without `labels` a row is one item.

        Raises:
            UserError: there are no labels that are whole numbers.
        """
        labels = inputs.get("labels")
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            raise UserError(
                'estimator="activation": the batch has no labels that are whole numbers: override row_losses, or use '
                'estimator="weight"'
            )
        given = dict(inputs)
        if not is_seq2seq(self.model):
            del given["labels"]  # an encoder-decoder makes the decoder's input of them
        logits = model(**given).logits
        if logits.dim() == 3 and reads_prompt(self.model):
            # a prompt's tokens have logits and no labels; the last of them predicts the text's first token
            before = logits.shape[1] - labels.shape[1]
            logits = logits[:, before - 1 : -1] if is_causal(self.model) else logits[:, before:]
        elif is_causal(self.model):
            logits, labels = logits[:, :-1], labels[:, 1:]
        losses = F.cross_entropy(
            logits.reshape(-1, logits.shape[-1]).float(),
            labels.reshape(-1),
            reduction="none",
            label_smoothing=self.args.label_smoothing_factor,
        )
        return losses.view(len(labels), -1).sum(dim=1)

    def _row_losses(
        self, model: nn.Module, micro: MicroBatches
    ) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """A function of the rows' numbers, each as often as there are signs and samples, and these numbers.

        Each micro-batch is run once, with all signs and samples of its rows; the rows' directions are those of the step.
        """
        sizes = [repeat_rows(dict(inputs), 1)[1] for inputs, _ in micro]
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        rows = ends[-1]
        shares = [self._divisor(*part) for part in micro]
        weights = [rows / share if share else math.nan for share in shares]

        def losses(numbers: Tensor) -> Tensor:
            times = len(numbers) // rows
            found = []
            for (inputs, _), size, end, weight in zip(micro, sizes, ends, weights, strict=True):
                with (
                    among(end - size, end, rows),
                    prompt_by_row(self.model),
                    self.compute_loss_context_manager(),
                ):
                    batch = repeat_rows(dict(inputs), times)[0]
                    found.append(self.row_losses(model, batch).view(times, size) * weight)
            return torch.cat(found, dim=1).flatten()

        return losses, torch.arange(rows)

    def _divisor(self, inputs: Any, items: Any) -> float:
        """By what the losses of a micro-batch's rows are divided, so that they add up to its part of the loss."""
        told = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        shared = self.args.average_tokens_across_devices and told and items is not None
        # `compute_loss` multiplies what is divided by the items of all processes, of which the mean is taken
        times = self.accelerator.num_processes if shared else 1
        if items is not None and not self._ignores_items:
            return float(items) / times
        labels = inputs.get("labels")
        if not isinstance(labels, Tensor):
            return repeat_rows(dict(inputs), 1)[1] * self._parts(items) / times
        if is_causal(self.model) and not reads_prompt(self.model):
            labels = labels[:, 1:]
        return float(labels.ne(-100).sum()) * self._parts(items) / times

    def _check_rows(self, model: nn.Module, micro: MicroBatches) -> bool:
        """Refuse losses of rows that do not add up to Trainer's, and find out what these are divided by.

        Trainer tells a model that takes any keyword how many items there are in all, and takes its loss to be divided by
        that. Some models (classifiers, T5) divide by their own number all the same.

        Returns:
            Whether it could be told: a loss that is NaN says nothing.
        """
        with looking_mode(self.model):
            whole = sum(self._part_of_loss(model, *part) for part in micro)
            for self._ignores_items in (False, True):
                losses, numbers = self._row_losses(model, micro)
                mean = float(losses(numbers).double().mean())
                if not math.isfinite(whole):
                    return False
                if math.isclose(mean, whole, rel_tol=1e-3, abs_tol=1e-4):
                    return True
        raise UserError(
            f'estimator="activation": the losses of the rows come to {mean:.6g}, compute_loss says {whole:.6g}: override '
            'row_losses, one loss a row, or use estimator="weight"'
        )
