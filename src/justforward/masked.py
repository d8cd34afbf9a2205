"""Masked models: each choice scored by its log-probability at the mask, one short row an example.

The template says where the answer stands: "A fine film. It was {mask}." becomes "[CLS] a fine film .
it was [MASK] . [SEP]", and the choices are the log probabilities of "great" and "terrible" at that
position. A mask is one token, so a label word must be one too, and the very one that the tokenizer
would put there: " great" with its space for RoBERTa, "great" for BERT.

Only the mask's position goes through the head, which is most of the work of a small model: the
output of the model's body is cut down to that position on its way to the head. That is exact where the head
looks at each position by itself, as all do that we know; it is tried once, and otherwise left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from justforward.data import Example
from justforward.errors import UserError
from justforward.models import inner_model
from justforward.prompts import Batch, Prompts, Row, eval_mode
from justforward.tasks import MASK, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class MaskedPrompts(Prompts):
    """The answer stands at the mask. Arguments and errors are those of `Prompts`."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        max_length: int | None = None,
        demonstrations: Sequence[Example] = (),
    ) -> None:
        name = type(inner_model(model)).__name__
        if task.kind != "classification":
            raise UserError(
                f"a task of kind {task.kind!r} has answers of many tokens, and the masked model {name} "
                "fills in one: give a causal model"
            )
        if not task.masked:
            raise UserError(
                f"template {task.template!r} has no {{mask}}, which the masked model {name} needs: "
                "put it where the answer stands, as in '{text} It was {mask}.'"
            )
        mask = tokenizer.mask_token_id
        if not isinstance(mask, int):
            raise UserError(
                f"the tokenizer has no mask token, which the masked model {name} needs: "
                "give the tokenizer that belongs to the model"
            )
        super().__init__(model, tokenizer, task, max_length, demonstrations)
        if mask >= self.vocabulary:
            raise UserError(
                f"the mask is token {mask}, the model knows {self.vocabulary}: "
                "give the tokenizer that belongs to the model"
            )
        self._mask = mask
        self._lead = self._text_before_mask()
        self._read_words()
        self._check_room()
        self._choices = torch.tensor([word[0] for word in self.words])
        self._body = self._find_body()
        if self._body is not None:  # what cannot be tried the rows will tell
            self._watch_padding()

    def batch(self, rows: Sequence[Row], common: bool = False) -> Batch:
        """``input_ids`` and ``attention_mask`` [B, L], padded on the right; ``mask_position`` [B]."""
        prompts = [row.prompt for row in rows]
        longest = max(map(len, prompts))
        gaps = [longest - len(prompt) for prompt in prompts]
        device = self.model.device
        ids = [p + [self.padding] * gap for p, gap in zip(prompts, gaps, strict=True)]
        shown = [[1] * (longest - gap) + [0] * gap for gap in gaps]
        at = [prompt.index(self._mask) for prompt in prompts]
        return {
            "input_ids": torch.tensor(ids, device=device),
            "attention_mask": torch.tensor(shown, device=device),
            "mask_position": torch.tensor(at, device=device),
        }

    def scores(self, batch: Batch) -> Tensor:
        """[B, C] float32: log-probability of each choice at the mask. One forward pass."""
        logits = self._logits(batch, self._body).float()
        return logits[:, self._choices] - logits.logsumexp(dim=-1, keepdim=True)

    # ------------------------------------------------------------------------------- forward pass

    def _logits(self, batch: Batch, body: nn.Module | None) -> Tensor:
        """[B, V] at the masks; with the body given, the head sees nothing else."""
        arguments = {name: batch[name] for name in ("input_ids", "attention_mask")}
        # counted from the end: a soft prompt is put before the text
        behind = batch["input_ids"].shape[1] - batch["mask_position"]
        if body is None:
            logits: Tensor = self.model(**arguments).logits
            return _picked(logits, behind)[:, 0]
        with _only(body, behind):
            logits = self.model(**arguments).logits
        return logits[:, 0]

    def _find_body(self) -> nn.Module | None:
        """The model without its head, if the head may be given the masks' positions alone."""
        inner = inner_model(self.model)
        prefix = getattr(inner, "base_model_prefix", "")
        body = getattr(inner, prefix, None) if prefix else None
        if not isinstance(body, nn.Module) or body is inner:
            return None
        prompt = self._tokens([dict.fromkeys(self.task.fields, "a")])[0]
        if (
            prompt.count(self._mask) != 1
            or max(prompt) >= self.vocabulary
            or (self.context is not None and len(prompt) > self.context)
        ):
            return None  # the rows will say what is wrong
        batch = self.batch([Row(prompt, self.words, 0)])
        try:
            with eval_mode(self.model), torch.no_grad():
                whole = self._logits(batch, None)
                part = self._logits(batch, body)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            return None
        same = part.shape == whole.shape and torch.allclose(
            part, whole, rtol=1e-4, atol=1e-4 * _size(whole), equal_nan=True
        )
        return body if same else None

    def _padding(self) -> int:
        """The model's own: RoBERTa's position numbers leave it out."""
        pad = getattr(self.model.config.get_text_config(), "pad_token_id", None)
        return pad if isinstance(pad, int) and 0 <= pad < self.vocabulary else super()._padding()

    def _context_length(self) -> int | None:
        """RoBERTa and its kin number positions from beyond the one of the padding."""
        context = super()._context_length()
        for name, module in self.model.named_modules():
            if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
                if module.padding_idx is None:
                    return context
                return module.num_embeddings - module.padding_idx - 1
        return context

    # ------------------------------------------------------------------------------- tokenisation

    def _bodies(self, rows: Sequence[dict[str, str]]) -> list[list[int]]:
        """The text with a label word in it, whose token then gives way to the mask.

        So the tokens around the mask are those around a word. Writing the mask into the text would depend
        on what a tokenizer makes of a space or a newline before it, and of a comma behind it.
        """
        word, token = next(iter(self.task.labels.values())), self.words[0][0]
        sides = [self._sides(fields) for fields in rows]
        heads = self._bare_all([left + word for left, _ in sides])
        wholes = self._bare_all([left + word + right for left, right in sides])
        bodies = []
        for (left, right), head, whole in zip(sides, heads, wholes, strict=True):
            at = len(head) - 1
            if head[-1:] == [token] and whole[: at + 1] == head:
                bodies.append([*whole[:at], self._mask, *whole[at + 1 :]])
            else:  # the word clings to what is around it
                bodies.append([*self._bare(left), self._mask, *self._bare(right)])
        return bodies

    def _sides(self, fields: dict[str, str]) -> tuple[str, str]:
        """The text before the mask and behind it."""
        out, left = "", ""
        for literal, name in self.task.pieces:
            out += literal
            if name == MASK:
                out, left = "", out
            elif name is not None:
                out += fields[name]
        return left, out.rstrip(" ")

    def _text_before_mask(self) -> str:
        """What a label word stands after: the template's own text, or any word where that is a field."""
        after_field = False
        for literal, name in self.task.pieces:
            if name == MASK:
                return ("a" if after_field else "") + literal
            after_field = True
        raise AssertionError("the template has a mask")

    def _word_tokens(self, word: str) -> list[int]:
        lead = self._lead.rstrip(" ")
        join = " " if lead != self._lead else ""
        tokens = self._joined(lead, join, word)
        return self._bare(join + word) if tokens is None else tokens

    def _check_words(self) -> None:
        for word, tokens in zip(self.task.labels.values(), self.words, strict=True):
            pieces = ", ".join(map(repr, self.tokenizer.convert_ids_to_tokens(tokens)))
            if len(tokens) > 1:
                spaced = self._joined("a", " ", word)
                hint = (
                    "put a space before {mask} in the template, with which it is one"
                    if spaced is not None and len(spaced) == 1
                    else "choose a word that the tokenizer has whole"
                )
                raise UserError(
                    f"label word {word!r} is {len(tokens)} tokens at the mask ({pieces}), where "
                    f"one is needed: {hint}"
                )
            if tokens and tokens[0] in self.tokenizer.all_special_ids:
                raise UserError(
                    f"label word {word!r} is {pieces} to the tokenizer, which stands for no word: "
                    "choose a word that it knows"
                )
        super()._check_words()

    def _fitted(self, example: Example, tokens: list[int], room: int) -> list[int]:
        if tokens.count(self._mask) != 1:
            raise UserError(
                f"{example.where}: the text itself holds {self.tokenizer.mask_token!r}, which marks the place "
                "of the answer: remove it"
            )
        return super()._fitted(example, tokens, room)


def _size(logits: Tensor) -> float:
    largest = float(logits.abs().max())
    return largest if largest < float("inf") else 1.0  # also where it is not a number


def _picked(x: Tensor, behind: Tensor) -> Tensor:
    """[B, 1, n]: of x [B, L, n] the position of each row that is so far from its end, `behind` [B]."""
    at = x.shape[1] - behind
    return x.gather(1, at[:, None, None].expand(-1, 1, x.shape[-1]))


@contextmanager
def _only(body: nn.Module, behind: Tensor) -> Iterator[None]:
    """While inside, what the body hands on is its output at the masks, in this thread's passes."""
    mine = get_ident()

    def pick(module: nn.Module, arguments: Any, output: Any) -> Any:
        if get_ident() == mine:
            output.last_hidden_state = _picked(output.last_hidden_state, behind)
        return output

    handle = body.register_forward_hook(pick)
    try:
        yield
    finally:
        handle.remove()
