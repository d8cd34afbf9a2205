"""How a row is put to a model, whichever kind: its text as tokens that fit, the label words as tokens.

`causal`, `masked` and `seq2seq` say what the text looks like, where the answer is read, and how it is scored.
"""

from __future__ import annotations

import inspect
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from justforward.data import Example
from justforward.errors import UserError
from justforward.models import inner_model
from justforward.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Batch = dict[str, Tensor]
ENCODE_AT_ONCE = 512
# Nats by which a score may differ with padding by rounding alone, in float32 and in 16 bits.
ROUNDING, ROUNDING_HALF = 0.01, 0.1


@dataclass(frozen=True)
class Row:
    """A row as tokens.

    Attributes:
        prompt: what comes before the answer (a masked model's has the mask in it, an encoder reads it by itself).
        choices: tokens of each possible answer; rows that share label words share the object.
        right: index of the right one.
    """

    prompt: list[int]
    choices: Sequence[list[int]]
    right: int

    def only_right(self) -> Row:
        """The row with its right answer alone."""
        return Row(self.prompt, [self.choices[self.right]], 0)

    def without_answers(self) -> Row:
        """The row's prompt alone."""
        return Row(self.prompt, [[]], 0)


class Prompts(ABC):
    """Turns rows into tokens, tokens into batches, and batches into one score a choice.

    Args:
        model: a language model of the kind that the class is for.
        tokenizer: its tokenizer; it needs no padding token.
        task: template and label words.
        max_length: longest sequence in tokens; a longer row has the text of its longest field
            shortened. None truncates nothing: a row beyond the model's context is an error.
        demonstrations: rows that are shown with their answers before each row; those in front are left
            out where all do not fit.

    Raises:
        UserError: label words that cannot be told apart or asked for; a max_length that is beyond
            the model's context or leaves no room for the template.
    """

    after = 0  # longest answer that follows a prompt, in tokens
    alone = "the template alone makes"  # what is left of a row where every field is empty

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        max_length: int | None = None,
        demonstrations: Sequence[Example] = (),
    ) -> None:
        self.model = model
        self.demonstrations = demonstrations
        self.demonstrations_shown: list[int] = []  # of each row that was tokenised
        self.tokenizer = tokenizer
        self.task = task
        self.max_length = max_length
        self.shortened = 0  # how many rows have been
        positions = self._context_length()
        self.context = None if positions is None else positions - before_text(model)
        self.vocabulary = len(_embedding_weight(model))
        self.padding = self._padding()
        self.before, self.behind = self._specials()
        self.accepts = accepted_arguments(model)
        self.words: list[list[int]] = []  # of each choice, once the subclass has read them

    # ------------------------------------------------------------------------- what a kind has its own

    @abstractmethod
    def batch(self, rows: Sequence[Row], common: bool = False) -> Batch:
        """The rows as tensors, each with the rows as its first dimension.

        Args:
            common: a beginning that all prompts have in common may be put into one of its own,
                ``start_ids`` [1, P], and read once: not for looks, where each row has its own weights.
        """

    @abstractmethod
    def scores(self, batch: Batch) -> Tensor:
        """[B, C] float32: log-likelihood of each choice. One forward pass."""

    def summed(self, batch: Batch) -> Tensor:
        """[B, C] float32: `scores` where a choice's is the sum over its tokens, whatever the task says."""
        return self.scores(batch)

    @abstractmethod
    def _bodies(self, rows: Sequence[dict[str, str]]) -> list[list[int]]:
        """Each row's tokens, whole, without the special ones around; a row is its fields."""

    @abstractmethod
    def _word_tokens(self, word: str) -> list[int]:
        """Tokens of a label word as it stands where the answer is."""

    def _watch_padding(self) -> None:
        """Warn of a model that mixes what it reads with the padding beside it: whatever the mask says, what a row is scored
        then depends on the rows of its batch.
        """
        one, longer = self._tokens(
            [dict.fromkeys(self.task.fields, text) for text in ("a", "a a a a")]
        )
        if max(one + longer) >= self.vocabulary or len(longer) >= (self.context or math.inf):
            return  # the rows will say what is wrong
        choices = self.words or [one[:1]]
        rows = [Row(one, choices, 0), Row(longer, choices, 0)]
        with eval_mode(self.model), torch.no_grad():
            alone = self.scores(self.batch(rows[:1]))[0]
            beside = self.scores(self.batch(rows))[0]
        rounding = ROUNDING if self.model.dtype == torch.float32 else ROUNDING_HALF
        if float((alone - beside).abs().max()) > rounding:
            warnings.warn(
                f"a {self.model.config.model_type} model scores a row otherwise where shorter or longer ones are in its "
                "batch, for it reads padding too: figures depend on the size of batches",
                stacklevel=2,
            )

    # ------------------------------------------------------------------------------- tokenisation

    def rows(self, examples: Sequence[Example]) -> list[Row]:
        """Each row's tokens, shortened if max_length asks for it.

        Raises:
            UserError: a row longer than the context, or than max_length with its text left out;
                naming its file and line.
        """
        found: list[Row] = []
        for start in range(0, len(examples), ENCODE_AT_ONCE):
            part = examples[start : start + ENCODE_AT_ONCE]
            all_tokens = self._tokens([example.fields for example in part])
            for example, tokens in zip(part, all_tokens, strict=True):
                choices, right = self._answers_of(example)
                room = self._room(choices)
                if self.demonstrations:
                    tokens = self._demonstrated(example, tokens, room)
                found.append(Row(self._fitted(example, tokens, room), choices, right))
        return found

    def null_row(self, example: Example, row: Row) -> Row:
        """The row asked without its content, for calibration: `Task.null_prompt`."""
        raise UserError("calibration is for causal models: leave --calibrate out")

    def _answers_of(self, example: Example) -> tuple[Sequence[list[int]], int]:
        """Tokens of what may answer the row, and which is right."""
        labels = list(self.task.labels)
        if example.label not in labels:
            raise UserError(
                f"{example.where}: label {example.label!r} has no word: the task has {', '.join(labels)}"
            )
        return self.words, labels.index(example.label)

    def _room(self, choices: Sequence[list[int]]) -> int:
        """Tokens that the longest answer takes behind the prompt."""
        return self.after

    def _demonstrated(self, example: Example, tokens: list[int], room: int) -> list[int]:
        """The row's tokens with as many demonstrations before them as fit."""
        raise UserError(
            "demonstrations are put before the text, which a masked model is not trained for: "
            "use a causal model"
        )

    def _tokens(self, rows: Sequence[dict[str, str]]) -> list[list[int]]:
        return [self._dressed(ids) for ids in self._bodies(rows)]

    def _bare_all(self, texts: list[str]) -> list[list[int]]:
        encoded = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        return [list(ids) for ids in encoded]

    def _dressed(self, ids: list[int]) -> list[int]:
        """With special tokens around; a template that spells them itself does not get them twice."""
        before, behind = self.before, self.behind
        ids = ids if ids[: len(before)] == before else before + ids
        return ids if not behind or ids[-len(behind) :] == behind else ids + behind

    def _specials(self) -> tuple[list[int], list[int]]:
        """Special tokens that the tokenizer puts before and behind a text."""
        bare = self._bare("a")
        dressed = list(self.tokenizer("a", add_special_tokens=True)["input_ids"])
        for start in range(len(dressed) - len(bare) + 1):
            end = start + len(bare)
            if dressed[start:end] == bare:
                return dressed[:start], dressed[end:]
        return [], []

    def _bare(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _joined(self, before: str, join: str, word: str) -> list[int] | None:
        """Tokens of the word as it stands after a text, told apart from what precedes.

        Encoding " great" by itself would give sentencepiece tokenizers a doubled space marker.
        None where the two cannot be told apart.
        """
        alone, joined = self._bare(before), self._bare(before + join + word)
        return joined[len(alone) :] if joined[: len(alone)] == alone else None

    def _padding(self) -> int:
        """A token for the padding: masked, so any will do."""
        pad = self.tokenizer.pad_token_id
        return pad if isinstance(pad, int) and pad < self.vocabulary else 0

    def _read_words(self) -> None:
        self.words = [self._word_tokens(word) for word in self.task.labels.values()]
        self._check_words()

    def _check_words(self) -> None:
        seen: dict[tuple[int, ...], str] = {}
        for word, tokens in zip(self.task.labels.values(), self.words, strict=True):
            if not tokens:
                raise UserError(f"label word {word!r} becomes no token: choose another word")
            if max(tokens) >= self.vocabulary:
                raise UserError(
                    f"label word {word!r} has token {max(tokens)}, the model knows "
                    f"{self.vocabulary}: give the tokenizer that belongs to the model"
                )
            other = seen.setdefault(tuple(tokens), word)
            if other != word:
                raise UserError(
                    f"label words {other!r} and {word!r} become the same tokens {tokens}: "
                    "choose words that the tokenizer tells apart"
                )

    # --------------------------------------------------------------------------------- truncation

    def _context_length(self) -> int | None:
        """Positions that the model has; None for one whose config names no bound."""
        config = self.model.config.get_text_config()
        for name in (
            "max_position_embeddings",
            "n_positions",
            "max_seq_len",
            "max_sequence_length",
        ):
            value = getattr(config, name, None)
            if isinstance(value, int) and value > 0:
                return value
        return None

    def _check_room(self) -> None:
        max_length = self.max_length
        if max_length is None:
            return
        if max_length < 1:
            raise UserError(f"max_length {max_length} is below 1: give a whole number of tokens")
        if self.context is not None and max_length > self.context:
            raise UserError(
                f"max_length {max_length} is beyond the model's context of {self.context} "
                f"tokens: give at most {self.context}"
            )
        bare = self._tokens([dict.fromkeys(self.task.fields, "")])[0]
        needed = max(len(bare), 1) + self.after  # something must predict the answer
        if needed > max_length:
            raise UserError(
                f"max_length {max_length} leaves no room: {self.alone} {needed} tokens: "
                "give more or shorten the template"
            )

    def _fitted(self, example: Example, tokens: list[int], room: int) -> list[int]:
        """The prompt's tokens, its fields shortened if max_length asks for it.

        Args:
            room: tokens to leave free for the answer.
        """
        length = len(tokens) + room
        if tokens and max(tokens) >= self.vocabulary:
            raise UserError(
                f"{example.where}: token {max(tokens)} where the model knows {self.vocabulary}: "
                "give the tokenizer that belongs to the model"
            )
        if not tokens:
            raise UserError(
                f"{example.where}: the prompt becomes no token: fill in its text or put words "
                "into the template"
            )
        if self.max_length is None:
            if self.context is not None and length > self.context:
                raise UserError(
                    f"{example.where}: the text makes {length} tokens"
                    f"{' with the answer' if room else ''}, the model's "
                    f"context is {self.context}: shorten it, or pass max_length (at most "
                    f"{self.context}) to have texts truncated"
                )
            return tokens
        return tokens if length <= self.max_length else self._truncated(example, length, room)

    def _truncated(self, example: Example, length: int, room: int) -> list[int]:
        """Drops tokens from whichever field is longest at the time, until the whole fits.

        A field is cut where one of its tokens ends, then all is tokenised again, since a cut can
        change the tokens around it; what is still too much is dropped in a further round.
        """
        assert self.max_length is not None
        self.shortened += 1
        shown = [name for _, name in self.task.pieces if name is not None]
        cuts = {name: self._cuts(example.fields[name]) for name in self.task.fields}
        keep = {name: len(cuts[name]) - 1 for name in cuts}
        while True:
            excess = length - self.max_length
            while excess > 0:
                name = max(keep, key=lambda field: keep[field])
                if keep[name] == 0:
                    raise UserError(
                        f"{example.where}: {self.alone} {length} tokens, max_length is "
                        f"{self.max_length}: give more"
                    )
                keep[name] -= 1
                excess -= shown.count(name)
            fields = {
                name: self._cut(text, cuts[name], keep[name])
                for name, text in example.fields.items()
                if name in cuts
            }
            tokens = self._tokens([fields])[0]
            length = len(tokens) + room
            if not tokens:
                raise UserError(
                    f"{example.where}: max_length {self.max_length} leaves nothing of the text: "
                    "give more"
                )
            if length <= self.max_length:
                return tokens

    def _cuts(self, text: str) -> list[int]:
        """Where `text` may be cut, in characters: entry n leaves n of its tokens."""
        if self.tokenizer.is_fast:
            encoded = self.tokenizer(
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


def _embedding_weight(model: PreTrainedModel) -> Tensor:
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def accepted_arguments(model: Any) -> set[str]:
    """What the model's forward takes of the arguments that only some models know."""
    return set(inspect.signature(inner_model(model).forward).parameters)


def feed_head_whole(model: Any) -> None:
    """Let the output head get the last places of a batch in one piece, from now on.

    They are cut out of all places, and torch multiplies a matrix that is frozen with such a piece row by row: of the
    head of SmolLM2 that takes five times as long, a third of a forward pass through the last third of its layers.
    """
    head = inner_model(model).get_output_embeddings()
    if head is not None and _in_one_piece not in head._forward_pre_hooks.values():
        head.register_forward_pre_hook(_in_one_piece)


def _in_one_piece(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(each.contiguous() if isinstance(each, Tensor) else each for each in args)


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """While inside, no dropout; afterwards what was in training mode is again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def before_text(model: PreTrainedModel) -> int:
    """Positions that a prefix or a soft prompt takes."""
    peft = getattr(model, "active_peft_config", None)
    return getattr(peft, "num_virtual_tokens", None) or 0
