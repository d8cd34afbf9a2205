"""Scores each choice of a row by its log-likelihood, all rows of a batch in one forward pass.

The answer " great" after the prompt "A fine film. It was" is scored as the sum of the log
probabilities of its tokens. The prompt alone predicts a first token; a further token needs a row
that also shows the ones before it. A model that reads left to right gives every shorter beginning
within a longer row, so a prompt needs one row for each *longest* such beginning: one row where all
choices are single tokens, and never more rows than choices. Rows are padded on the left, which
puts the few positions that predict answers at the end: only those go through the head.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from justforward.data import Example
from justforward.errors import UserError
from justforward.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Batch = dict[str, Tensor]
ENCODE_AT_ONCE = 512


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
        model: a causal language model.
        tokenizer: its tokenizer; it needs no padding token.
        task: template and label words.
        max_length: longest sequence in tokens, prompt and answer together; a longer row has the
            text of its longest field shortened (the template and the answer stay whole). None
            truncates nothing: a row longer than the model's context is an error.

    Raises:
        UserError: label words that become the same tokens or none; a max_length that is beyond
            the model's context or leaves no room for the template.
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
        self._tokenizer = tokenizer
        self._context = _context_length(model)
        self._vocabulary = len(_embedding_weight(model))
        pad = tokenizer.pad_token_id
        self._pad = pad if isinstance(pad, int) and pad < self._vocabulary else 0  # masked, so any
        self._prefix = self._special_prefix()
        # the template's end says how the word is joined: see _prompt_text
        self._tail = task.tail.rstrip(" ")
        self._join = "" if self._tail and self._tail[-1].isspace() else " "
        self._words = [self._word_tokens(word) for word in task.labels.values()]
        self._check_words()
        self._answer_length = max(map(len, self._words))
        self._plan_rows()
        self._accepts = _accepted_arguments(model)
        self._prompts: dict[int, tuple[Example, list[int]]] = {}
        if max_length is not None:
            self._check_max_length(max_length)

    # ------------------------------------------------------------------------------------ public

    def prepare(self, examples: Sequence[Example]) -> None:
        """Tokenises rows ahead of their first batch, so that a bad one is found before training.

        Raises:
            UserError: a row longer than the context, or than max_length with its text left out;
                naming its file and line.
        """
        new = [example for example in examples if id(example) not in self._prompts]
        for start in range(0, len(new), ENCODE_AT_ONCE):
            part = new[start : start + ENCODE_AT_ONCE]
            texts = [self._prompt_text(example.fields) for example in part]
            for example, tokens in zip(part, self._tokens(texts), strict=True):
                # the example is kept too: its id stays taken as long as the entry lives
                self._prompts[id(example)] = (example, self._fitted(example, tokens))

    def encode(self, examples: Sequence[Example]) -> Batch:
        """A batch of B rows: every tensor has B as its first dimension.

        ``input_ids``, ``attention_mask`` and ``position_ids`` are [B, L] where one sequence a row
        is enough (all choices are single tokens), else [B, R, L] with R <= C sequences a row;
        ``label`` [B] is the index of the right choice.

        Raises:
            UserError: no rows, or as `prepare`.
        """
        if not examples:
            raise UserError("there are no rows to encode: give at least one")
        self.prepare(examples)
        prompts = [self._prompts[id(example)][1] for example in examples]
        sequences = [[prompt + shown for shown in self._shown] for prompt in prompts]
        longest = max(len(row[-1]) for row in sequences)
        ids, mask, positions = [], [], []
        for row in sequences:
            for sequence in row:
                gap = longest - len(sequence)
                ids.append([self._pad] * gap + sequence)
                mask.append([0] * gap + [1] * len(sequence))
                positions.append([0] * gap + list(range(len(sequence))))
        sequences_a_row = (len(self._shown),) if len(self._shown) > 1 else ()
        shape = (len(examples), *sequences_a_row, longest)
        device = self.model.device
        return {
            "input_ids": torch.tensor(ids, device=device).view(shape),
            "attention_mask": torch.tensor(mask, device=device).view(shape),
            "position_ids": torch.tensor(positions, device=device).view(shape),
            "label": torch.tensor([self._label(example) for example in examples], device=device),
        }

    @torch.no_grad()
    def scores(self, batch: Batch) -> Tensor:
        """[B, C] float32: log-likelihood of each choice after its prompt. One forward pass."""
        return self._scores(batch)

    @torch.no_grad()
    def losses(self, batch: Batch) -> Tensor:
        """[B] float32: the task's loss of each row. One forward pass."""
        return self._losses(self._scores(batch), batch["label"])

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
            range(len(examples)), key=lambda i: len(self._prompts[id(examples[i])][1]), reverse=True
        )
        predicted = [0] * len(examples)
        losses = [0.0] * len(examples)
        forwards = 0
        with _eval_mode(self.model), torch.no_grad():
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                batch = self.encode([examples[i] for i in rows])
                scores = self._scores(batch)
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

    # ------------------------------------------------------------------------------- forward pass

    def _scores(self, batch: Batch) -> Tensor:
        ids = batch["input_ids"]
        rows, length = ids.shape[0], ids.shape[-1]
        arguments: dict[str, Any] = {
            "input_ids": ids.reshape(-1, length),  # [B * R, L], example-major
            "attention_mask": batch["attention_mask"].reshape(-1, length),
            "position_ids": batch["position_ids"].reshape(-1, length),
            "use_cache": False,
            "logits_to_keep": self._kept,
        }
        output = self.model(**{k: v for k, v in arguments.items() if k in self._accepts})
        # [B, R, K, V]; a model without logits_to_keep gives all L positions: the last K count
        logits = output.logits[:, -self._kept :].unflatten(0, (rows, -1)).float()
        normaliser = logits.logsumexp(dim=-1)  # [B, R, K]
        row, position, token = self._read_row, self._read_position, self._read_token
        found = logits[:, row, position, token] - normaliser[:, row, position]  # [B, tokens]
        scores: Tensor = found.new_zeros(rows, len(self._words))
        return scores.index_add(1, self._read_choice.to(found.device), found)

    def _losses(self, scores: Tensor, label: Tensor) -> Tensor:
        if self.task.loss == "choices":
            scores = scores.log_softmax(dim=-1)
        return -scores.gather(1, label[:, None]).squeeze(1)

    def _plan_rows(self) -> None:
        """Decides which beginnings of answers are shown, and where each answer token is read."""
        beginnings = sorted({tuple(word[:-1]) for word in self._words}, key=lambda b: (len(b), b))
        self._shown = [
            list(shown)
            for shown in beginnings
            if not any(b != shown and b[: len(shown)] == shown for b in beginnings)
        ]  # ascending in length: the last is the longest
        self._kept = len(self._shown[-1]) + 1
        read: list[tuple[int, int, int, int]] = []
        for choice, word in enumerate(self._words):
            row = next(r for r, s in enumerate(self._shown) if s[: len(word) - 1] == word[:-1])
            first = self._kept - 1 - len(self._shown[row])  # where the prompt's last token is
            read += [(choice, row, first + i, token) for i, token in enumerate(word)]
        columns = [torch.tensor(column) for column in zip(*read, strict=True)]
        self._read_choice, self._read_row, self._read_position, self._read_token = columns

    # ------------------------------------------------------------------------------- tokenisation

    def _prompt_text(self, fields: dict[str, str]) -> str:
        """The prompt without the space that belongs to the word.

        A tokenizer of words makes " great" one token, so spaces at the prompt's end are left out
        and one is put before the word; after a newline in the template the word follows directly.
        """
        text = self.task.prompt(fields)
        return text.rstrip(" ") if self._tail else text.rstrip()

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        encoded = self._tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        tokens = [list(ids) for ids in encoded]
        # a template that spells the special tokens itself does not get them twice
        prefix = self._prefix
        return [ids if ids[: len(prefix)] == prefix else prefix + ids for ids in tokens]

    def _special_prefix(self) -> list[int]:
        """Special tokens that the tokenizer puts before a text (those after it are left out)."""
        bare = self._tokenizer("a", add_special_tokens=False)["input_ids"]
        dressed = self._tokenizer("a", add_special_tokens=True)["input_ids"]
        for start in range(len(dressed) - len(bare) + 1):
            if dressed[start : start + len(bare)] == bare:
                return list(dressed[:start])
        return []

    def _word_tokens(self, word: str) -> list[int]:
        """Tokens of the word as they stand after the template, told apart from what precedes.

        Encoding " great" by itself would give sentencepiece tokenizers a doubled space marker.
        """
        for before in dict.fromkeys((self._tail, "a" if self._join else "a\n")):
            if not before:
                continue
            alone, joined = self._bare(before), self._bare(before + self._join + word)
            if joined[: len(alone)] == alone:
                return joined[len(alone) :]
        return self._bare(self._join + word)

    def _bare(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _check_words(self) -> None:
        seen: dict[tuple[int, ...], str] = {}
        for word, tokens in zip(self.task.labels.values(), self._words, strict=True):
            if not tokens:
                raise UserError(f"label word {word!r} becomes no token: choose another word")
            if max(tokens) >= self._vocabulary:
                raise UserError(
                    f"label word {word!r} has token {max(tokens)}, the model knows "
                    f"{self._vocabulary}: give the tokenizer that belongs to the model"
                )
            other = seen.setdefault(tuple(tokens), word)
            if other != word:
                raise UserError(
                    f"label words {other!r} and {word!r} become the same tokens {tokens}: "
                    "choose words that the tokenizer tells apart"
                )

    def _label(self, example: Example) -> int:
        try:
            return self.labels.index(example.label)
        except ValueError:
            raise UserError(
                f"{example.where}: label {example.label!r} has no word: the task has "
                f"{', '.join(self.labels)}"
            ) from None

    # --------------------------------------------------------------------------------- truncation

    def _check_max_length(self, max_length: int) -> None:
        if max_length < 1:
            raise UserError(f"max_length {max_length} is below 1: give a whole number of tokens")
        if self._context is not None and max_length > self._context:
            raise UserError(
                f"max_length {max_length} is beyond the model's context of {self._context} "
                f"tokens: give at most {self._context}"
            )
        bare = self._tokens([self._prompt_text(dict.fromkeys(self.task.fields, ""))])[0]
        needed = max(len(bare), 1) + self._answer_length  # something must predict the answer
        if needed > max_length:
            raise UserError(
                f"max_length {max_length} leaves no room: the template and the longest label word "
                f"alone make {needed} tokens: give more or shorten the template"
            )

    def _fitted(self, example: Example, tokens: list[int]) -> list[int]:
        """The prompt's tokens, its fields shortened if max_length asks for it."""
        length = len(tokens) + self._answer_length
        if tokens and max(tokens) >= self._vocabulary:
            raise UserError(
                f"{example.where}: token {max(tokens)} where the model knows {self._vocabulary}: "
                "give the tokenizer that belongs to the model"
            )
        if not tokens:
            raise UserError(
                f"{example.where}: the prompt becomes no token: fill in its text or put words "
                "into the template"
            )
        if self.max_length is None:
            if self._context is not None and length > self._context:
                raise UserError(
                    f"{example.where}: the text makes {length} tokens with the answer, the model's "
                    f"context is {self._context}: shorten it, or pass max_length (at most "
                    f"{self._context}) to have texts truncated"
                )
            return tokens
        return tokens if length <= self.max_length else self._truncated(example, length)

    def _truncated(self, example: Example, length: int) -> list[int]:
        """Drops tokens from whichever field is longest at the time, until the whole fits.

        A field is cut where one of its tokens ends, then all is tokenised again, since a cut can
        change the tokens around it; what is still too much is dropped in a further round.
        """
        assert self.max_length is not None
        shown = [name for _, name in self.task.pieces if name is not None]
        cuts = {name: self._cuts(example.fields[name]) for name in self.task.fields}
        keep = {name: len(cuts[name]) - 1 for name in cuts}
        while True:
            excess = length - self.max_length
            while excess > 0:
                name = max(keep, key=lambda field: keep[field])
                if keep[name] == 0:
                    raise UserError(
                        f"{example.where}: the template and the longest label word alone make "
                        f"{length} tokens, max_length is {self.max_length}: give more"
                    )
                keep[name] -= 1
                excess -= shown.count(name)
            fields = {
                name: self._cut(text, cuts[name], keep[name])
                for name, text in example.fields.items()
                if name in cuts
            }
            tokens = self._tokens([self._prompt_text(fields)])[0]
            length = len(tokens) + self._answer_length
            if not tokens:
                raise UserError(
                    f"{example.where}: max_length {self.max_length} leaves nothing of the text: "
                    "give more"
                )
            if length <= self.max_length:
                return tokens

    def _cuts(self, text: str) -> list[int]:
        """Where `text` may be cut, in characters: entry n leaves n of its tokens."""
        if self._tokenizer.is_fast:
            encoded = self._tokenizer(
                text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            spans = encoded["offset_mapping"]
        else:  # no offsets: cut between any two characters
            spans = [(i, i + 1) for i in range(len(text))]
        if self.task.truncation == "right":
            return [0, *(end for _, end in spans)]
        return [len(text), *(start for start, _ in reversed(spans))]

    def _cut(self, text: str, cuts: list[int], keep: int) -> str:
        if keep == len(cuts) - 1:
            return text
        if self.task.truncation == "right":
            return text[: cuts[keep]].rstrip()
        return text[cuts[keep] :].lstrip()


def _context_length(model: PreTrainedModel) -> int | None:
    """Positions that the model has; None for one whose config names no bound."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _embedding_weight(model: PreTrainedModel) -> Tensor:
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def _accepted_arguments(model: Any) -> set[str]:
    """What the model's forward takes of the arguments that only some models know."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft
    return set(inspect.signature(inner.forward).parameters)


@contextmanager
def _eval_mode(model: torch.nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
