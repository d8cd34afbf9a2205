"""Encoder-decoder models (T5, BART and kin): the encoder reads the prompt, the decoder is asked for the answer.

The prompt "A fine film. It was" with the tokenizer's own end goes to the encoder; the answer "great" is a text of its own,
scored by the decoder behind the token that it starts with. BART's answers were trained with what its tokenizer puts before
a text, so that stands there too: "</s> <s> great", where T5 has "<pad> great".

A row's text runs through the encoder once, whatever the number of answers: what it gives is repeated for the decoder's
sequences, which are as few as a causal model's would be (`causal.plan`). The encoder's padding is on the right and masked;
the decoder's is on the right too, behind all that is read, where no mask is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from justforward import causal
from justforward.activations import entering
from justforward.causal import CausalPrompts, log_probabilities
from justforward.data import Example
from justforward.errors import UserError
from justforward.models import inner_model
from justforward.prompts import Batch, Row, accepted_arguments
from justforward.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Arguments without which a model cannot be run in two parts.
NEEDED = {"input_ids", "attention_mask", "decoder_input_ids", "encoder_outputs", "past_key_values", "use_cache"}  # fmt: skip


class Seq2SeqPrompts(CausalPrompts):
    """The answer is a text of the decoder's. Arguments and errors are those of `Prompts`; max_length is of the prompt alone."""

    alone = "the template alone makes"
    unlike_masked = "writes the answer apart from the text, with its decoder"
    together = False

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        max_length: int | None = None,
        demonstrations: Sequence[Example] = (),
    ) -> None:
        _check_model(model)
        super().__init__(model, tokenizer, task, max_length, demonstrations)
        self.prefix = self._before_answer()
        for word, tokens in zip(task.labels.values(), self.words, strict=True):
            self._check_answer(tokens, f"label word {word!r}")
        if task.kind == "generation":
            self._end = self._end_of_answer()
            self._check_answer([0] * task.max_new_tokens, f"max_new_tokens {task.max_new_tokens}")

    # -------------------------------------------------------------------------------------- batches

    def batch(self, rows: Sequence[Row], common: bool = False) -> Batch:
        """``input_ids`` and ``attention_mask`` [B, L] of the encoder, ``decoder_input_ids`` [B, R, S], and where answers
        are read (``read_*`` [B, T], ``present`` [B, C]), as `CausalPrompts.batch` has it.
        """
        plans, shown = self._planned(rows)
        answers = [[self.prefix + s for s in each] for each in shown]
        longest = max(len(s) for each in answers for s in each)
        prompts = [[row.prompt] for row in rows]
        ids, mask = self._padded_right(prompts, max(len(row.prompt) for row in rows))
        first = len(self.prefix) - 1  # what the prefix ends with predicts the answer's first token
        return {
            "input_ids": ids[:, 0],
            "attention_mask": mask[:, 0],
            "decoder_input_ids": self._padded_right(answers, longest)[0],
            **self._reads(plans, [[first] * len(each) for each in shown]),
        }

    # --------------------------------------------------------------------------------------- scores

    def _read(self, batch: Batch) -> Tensor:
        """[B, T] float32: log-probability of each answer token. One forward pass."""
        text = EncodedText.of(self.model, batch)
        rows, sequences, length = batch["decoder_input_ids"].shape
        sequence, position, token = (
            batch[f"read_{name}"] for name in ("sequence", "position", "token")
        )
        zero = torch.zeros_like(sequence)
        found = batch["read_weight"].new_zeros(sequence.shape)
        each = max(1, causal.MOST_LOGITS // (rows * length * self.vocabulary))
        for start in range(0, sequences, each):
            ids = batch["decoder_input_ids"][:, start : start + each]
            count = ids.shape[1]
            logits = text.repeated(count).answered(ids.reshape(-1, length))
            here = (sequence >= start) & (sequence < start + count)
            part = log_probabilities(
                logits.view(rows, count, length, -1).float(),
                torch.where(here, sequence - start, zero),
                position,
                token,
            )
            found = torch.where(here, part, found)
        return found

    # --------------------------------------------------------------------------------- tokenisation

    def _before_answer(self) -> list[int]:
        """What the decoder is shown before an answer: the token that it starts with, and what the tokenizer puts before a text."""
        model = inner_model(self.model)
        name = type(model).__name__
        start = getattr(model.config, "decoder_start_token_id", None)
        if start is None:
            start = getattr(
                getattr(model, "generation_config", None), "decoder_start_token_id", None
            )
        if not isinstance(start, int):
            raise UserError(
                f"{name}: its config names no decoder_start_token_id, the token behind which answers are written: put it "
                "into config.json (that of the padding for T5, of </s> for BART)"
            )
        if not 0 <= start < self.vocabulary:
            raise UserError(
                f"{name}: decoder_start_token_id is {start}, the model knows {self.vocabulary}: correct its config.json"
            )
        return self.before if self.before[:1] == [start] else [start, *self.before]

    def _end_of_answer(self) -> int:
        end = self.tokenizer.eos_token_id
        if not isinstance(end, int):
            raise UserError(
                f"the tokenizer has no end-of-text token, with which {type(inner_model(self.model)).__name__} ends an "
                "answer: give the tokenizer that belongs to the model"
            )
        return end

    def _answers_of(self, example: Example) -> tuple[Sequence[list[int]], int]:
        if self.task.kind == "classification":
            return super()._answers_of(example)  # checked once
        if self.task.kind == "generation":
            choices: Sequence[list[int]] = [[*self._word_tokens(example.label), self._end]]
            right = 0
        else:
            choices, right = super()._answers_of(example)
        for tokens in choices:
            self._check_answer(tokens, f"{example.where}: an answer")
        return choices, right

    def _check_answer(self, tokens: Sequence[int], what: str) -> None:
        length = len(self.prefix) + len(tokens) - 1  # the last is only predicted
        if self.context is not None and length > self.context:
            raise UserError(
                f"{what} takes {length} of the decoder's positions with what stands before an answer, and it has "
                f"{self.context}: give less"
            )

    def _room(self, choices: Sequence[list[int]]) -> int:
        return 0

    def _word_tokens(self, word: str) -> list[int]:
        return self._bare(word)

    def _context_length(self) -> int | None:
        """T5's n_positions is how long its training texts were: relative positions have no bound."""
        if any(hasattr(module, "relative_attention_bias") for module in self.model.modules()):
            return None
        return super()._context_length()


def _check_model(model: Any) -> None:
    inner = inner_model(model)
    name = type(inner).__name__
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise UserError(
            f"{name} is an encoder-decoder, and a {model.active_peft_config.peft_type.value} adapter puts tokens before the "
            "text of a causal model: give a LoRA"
        )
    if not accepted_arguments(model) >= NEEDED or inner.main_input_name != "input_ids":
        raise UserError(
            f"{name} is an encoder-decoder that does not read text, or not apart from writing it: give another, such as T5 or "
            "BART"
        )
    known, answers = inner.get_input_embeddings(), inner.get_output_embeddings()
    if answers is None or len(answers.weight) != len(known.weight):
        raise UserError(
            f"{name} reads and answers in different vocabularies: give an encoder-decoder with one tokenizer, such as T5 or BART"
        )


@dataclass(frozen=True)
class EncodedText:
    """What the encoder makes of texts.

    Attributes:
        model: without an adapter around it (LoRA's layers are within it).
        states: [N, L, n].
        mask: [N, L].
    """

    model: Any
    states: Tensor
    mask: Tensor

    @classmethod
    def of(cls, model: PreTrainedModel, batch: Batch) -> EncodedText:
        """Read ``input_ids`` and ``attention_mask`` [N, L]."""
        inner: Any = inner_model(model)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        entering(len(ids))
        output = inner.get_encoder()(input_ids=ids, attention_mask=mask)
        return cls(inner, output.last_hidden_state, mask)

    def repeated(self, times: int) -> EncodedText:
        """Each text so many times, next to each other."""
        if times == 1:
            return self
        states, mask = (x.repeat_interleave(times, 0) for x in (self.states, self.mask))
        return replace(self, states=states, mask=mask)

    def answered(self, ids: Tensor) -> Tensor:
        """[N, S, V]: logits behind each token of the decoder's sequences [N, S]."""
        logits: Tensor = self.run(ids).logits
        return logits

    def run(self, ids: Tensor, **more: Any) -> Any:
        """The model's output for the decoder's tokens [N, S]."""
        from transformers.modeling_outputs import BaseModelOutput

        entering(len(ids))
        states: Any = self.states
        given = {"use_cache": False, **more}
        return self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=self.mask,
            decoder_input_ids=ids,
            **given,
        )


@dataclass
class Answering:
    """Answers that are being written, token by token.

    Attributes:
        text: what is answered.
        cache: the decoder's keys and values, of transformers' kind.
        logits: [N, 1, V] that predict the next token.
    """

    text: EncodedText
    cache: Any
    logits: Tensor

    @classmethod
    def begun(cls, model: PreTrainedModel, batch: Batch) -> Answering:
        """Read texts and what stands before their answers, ``decoder_input_ids`` [N, 1, S]. One forward pass."""
        text = EncodedText.of(model, batch)
        output = text.run(batch["decoder_input_ids"][:, 0], use_cache=True)
        return cls(text, output.past_key_values, output.logits[:, -1:])

    def advanced(self, ids: Tensor, mask: Tensor) -> None:
        """Read tokens [N, 1] behind those before, all of them: `mask` is ones."""
        output = self.text.run(ids, use_cache=True, past_key_values=self.cache)
        self.cache, self.logits = output.past_key_values, output.logits[:, -1:]
