"""Causal models: each choice scored by its log-likelihood after the prompt, all rows in one forward pass.

The answer " great" after the prompt "A fine film. It was" is scored by the log probabilities of its tokens.
The prompt alone predicts a first token; a further token needs a row that also shows the ones before it. A
model that reads left to right gives every shorter beginning within a longer row, so a prompt needs one row
for each *longest* such beginning: one row where all choices are single tokens, and never more rows than
choices. Rows are padded on the left, which puts the few positions that predict answers at the end: only those
go through the head.

Where several rows would repeat a long prompt, it is encoded once and its keys and values are shared
(`cached`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from justforward.cached import Encoded, can_share, reach
from justforward.data import Example
from justforward.errors import UserError
from justforward.models import inner_model
from justforward.prompts import Batch, Prompts, Row, before_text
from justforward.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Prompt tokens that sharing must save: a second forward pass reads all weights again.
WORTH_SHARING = 256
FEWER = 8  # tokens that a demonstration may lose at its ends where it is joined to others
MOST_LOGITS = 2**26  # numbers in the logits of one pass over options


@dataclass(frozen=True)
class Plan:
    """Which beginnings of a row's answers are shown, and where each answer token is read.

    Attributes:
        shown: the beginnings, in ascending length: one sequence each.
        reads: (choice, sequence, how many tokens of the beginning are before it, token).
        lengths: tokens of each choice.
    """

    shown: list[list[int]]
    reads: list[tuple[int, int, int, int]]
    lengths: list[int]


def plan(choices: Sequence[list[int]]) -> Plan:
    """The fewest sequences in which every token of every choice is predicted."""
    beginnings = sorted({tuple(word[:-1]) for word in choices}, key=lambda b: (len(b), b))
    shown = [
        list(one)
        for one in beginnings
        if not any(b != one and b[: len(one)] == one for b in beginnings)
    ]
    reads: list[tuple[int, int, int, int]] = []
    for choice, word in enumerate(choices):
        sequence = next(i for i, s in enumerate(shown) if s[: len(word) - 1] == word[:-1])
        reads += [(choice, sequence, place, token) for place, token in enumerate(word)]
    return Plan(shown, reads, [len(word) for word in choices])


class CausalPrompts(Prompts):
    """The answer follows the prompt. Arguments and errors are those of `Prompts`."""

    alone = "the template and the longest label word alone make"
    unlike_masked = "is a causal one"
    together = True  # prompt and answer are one sequence

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        max_length: int | None = None,
        demonstrations: Sequence[Example] = (),
    ) -> None:
        if task.masked:
            raise UserError(
                f"template {task.template!r} has {{mask}}, which only a masked model such as BERT "
                f"can fill; {type(inner_model(model)).__name__} {self.unlike_masked}: end the template "
                "where the answer follows, as in '{text} It was'"
            )
        kinds = {type(module) for module in model.modules()} if self.together else set()
        if any(hasattr(kind, "create_position_ids_from_input_ids") for kind in kinds):
            raise UserError(
                f"{type(inner_model(model)).__name__} counts positions from its padding token on, not from 0, and would be read "
                "at places it does not know: give the masked model ({mask} in the template), or another causal one"
            )
        super().__init__(model, tokenizer, task, max_length, demonstrations)
        if self.together:
            self.behind = []  # the answer comes there
        # the template's end says how the word is joined: see _texts
        self._tail = task.tail.rstrip(" ")
        self._join = "" if self._tail and self._tail[-1].isspace() else " "
        self._read_words()
        self._plan = plan(self.words)
        if self.together:
            longest = max(map(len, self.words), default=1)
            self.after = task.max_new_tokens if task.kind == "generation" else longest
        self._check_room()
        self._shots = [
            (text, len(self._bare(text))) for text in map(self._shown_row, demonstrations)
        ]
        # those that count positions by themselves, or keep a state
        if self.together and ("position_ids" not in self.accepts or not reach(model)):
            self._watch_padding()

    # -------------------------------------------------------------------------------------- batches

    def batch(self, rows: Sequence[Row], common: bool = False) -> Batch:
        """``input_ids``, ``attention_mask`` and ``position_ids``, and where answers are read (``read_*``
        [B, T], ``present`` [B, C]).

        The first three are [B, L] where one sequence a row is enough (all choices are single tokens),
        else [B, R, L] with R sequences a row. Where sharing the prompts pays, they are the prompts alone
        [B, L], and ``shown_ids`` and ``shown_mask`` [B, R, S] the beginnings of answers behind them.
        With `common`, what all prompts begin with may be apart in ``start_ids`` [1, P].
        """
        start = self._common_start(rows) if common else []
        if start:
            rest = [Row(row.prompt[len(start) :], row.choices, row.right) for row in rows]
            return {**self.batch(rest), "start_ids": self._tensor([start])}
        plans, shown = self._planned(rows)
        sequences = len(shown[0])
        longest = max(len(each.shown[-1]) for each in plans)
        saved = sum(
            len(row.prompt) * (len(p.shown) - 1) for row, p in zip(rows, plans, strict=True)
        )
        several = sequences > 1 and saved >= WORTH_SHARING
        if several and can_share(self.model, self.accepts):
            batch = self._sequences([[row.prompt] for row in rows])
            batch["shown_ids"], batch["shown_mask"] = self._padded_right(shown, longest)
            first = [[0] * sequences for _ in plans]
        else:
            batch = self._sequences(
                [[row.prompt + s for s in each] for row, each in zip(rows, shown, strict=True)]
            )
            first = [[longest - len(s) for s in each] for each in shown]
        return {**batch, **self._reads(plans, first)}

    def _planned(self, rows: Sequence[Row]) -> tuple[list[Plan], list[list[list[int]]]]:
        """Each row's plan, and the beginnings of answers that it shows: of every row as many."""
        plans = [self._plan if row.choices is self.words else plan(row.choices) for row in rows]
        most = max(len(each.shown) for each in plans)
        # the first again for those that are lacking
        return plans, [p.shown + [p.shown[0]] * (most - len(p.shown)) for p in plans]

    def _common_start(self, rows: Sequence[Row]) -> list[int]:
        """What all prompts begin with, if reading it once saves enough."""
        first, last = min(row.prompt for row in rows), max(row.prompt for row in rows)
        most = min(len(row.prompt) for row in rows) - 1  # something of its own predicts the answer
        length = 0
        while length < most and first[length] == last[length]:
            length += 1
        saved = length * (len(rows) - 1)
        if saved < WORTH_SHARING or not can_share(self.model, self.accepts):
            return []
        # the padding of shorter rows stands behind the beginning, and takes places of a window
        places = max(len(row.prompt) + self._room(row.choices) for row in rows)
        return first[:length] if before_text(self.model) + places <= reach(self.model) else []

    def _sequences(self, rows: list[list[list[int]]]) -> Batch:
        """Padded on the left, [B, L], or [B, R, L] where there are R > 1 sequences a row."""
        longest = max(len(sequence) for row in rows for sequence in row)
        ids, mask, positions = [], [], []
        for row in rows:
            for sequence in row:
                gap = longest - len(sequence)
                ids.append([self.padding] * gap + sequence)
                mask.append([0] * gap + [1] * len(sequence))
                positions.append([0] * gap + list(range(len(sequence))))
        shape = (len(rows), *((len(rows[0]),) if len(rows[0]) > 1 else ()), longest)
        named = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        return {name: self._tensor(value).view(shape) for name, value in named.items()}

    def _padded_right(self, rows: list[list[list[int]]], longest: int) -> tuple[Tensor, Tensor]:
        ids = [[s + [self.padding] * (longest - len(s)) for s in row] for row in rows]
        mask = [[[1] * len(s) + [0] * (longest - len(s)) for s in row] for row in rows]
        return self._tensor(ids), self._tensor(mask)

    def _reads(self, plans: Sequence[Plan], first: list[list[int]]) -> Batch:
        """Where each answer token is read: sequence, position among those kept, token, choice, weight."""
        most = max(len(each.reads) for each in plans)
        choices = max(len(each.lengths) for each in plans)
        columns: list[list[list[int]]] = [[], [], [], []]
        weights: list[list[float]] = []
        for each, starts in zip(plans, first, strict=True):
            filler = [0] * (most - len(each.reads))
            reads = [(c, s, starts[s] + place, token) for c, s, place, token in each.reads]
            for column, values in zip(
                columns, zip(*reads, strict=True) if reads else [()] * 4, strict=True
            ):
                column.append([*values, *filler])
            mean = self.task.score == "mean"
            weight = [1.0 / each.lengths[c] if mean else 1.0 for c, *_ in reads]
            weights.append([*weight, *map(float, filler)])
        names = ("read_choice", "read_sequence", "read_position", "read_token")
        present = [[c < len(each.lengths) for c in range(choices)] for each in plans]
        return {
            **{name: self._tensor(column) for name, column in zip(names, columns, strict=True)},
            "read_weight": self._tensor(weights),
            "present": self._tensor(present),
        }

    def _tensor(self, values: Any) -> Tensor:
        return torch.tensor(values, device=self.model.device)

    # --------------------------------------------------------------------------------------- scores

    def scores(self, batch: Batch) -> Tensor:
        """[B, C] float32: score of each choice after its prompt; minus infinity where a row has fewer."""
        return self._added(batch, batch["read_weight"])

    def summed(self, batch: Batch) -> Tensor:
        """`scores` where a choice's is the sum over its tokens."""
        return self._added(batch, (batch["read_weight"] > 0).float())

    def _added(self, batch: Batch, weight: Tensor) -> Tensor:
        found = self._read_shared(batch) if "shown_ids" in batch else self._read(batch)
        weighted = torch.where(weight > 0, found * weight, 0.0)
        present = batch["present"]
        scores = found.new_zeros(present.shape).scatter_add(1, batch["read_choice"], weighted)
        return scores.masked_fill(~present, -torch.inf)

    def _read(self, batch: Batch) -> Tensor:
        """[B, T] float32: log-probability of each answer token. One forward pass."""
        ids = batch["input_ids"]
        rows, length = ids.shape[0], ids.shape[-1]
        kept = int(batch["read_position"].max()) + 1 if batch["read_position"].numel() else 1
        arguments: dict[str, Any] = {
            "input_ids": ids.reshape(-1, length),  # [B * R, L], example-major
            "attention_mask": batch["attention_mask"].reshape(-1, length),
            "position_ids": batch["position_ids"].reshape(-1, length),
            "use_cache": False,
            "logits_to_keep": kept,
        }
        if "start_ids" in batch:
            flat, mask = arguments["input_ids"], arguments["attention_mask"]
            begun = Encoded.begun(self.model, batch, self.accepts, len(flat))
            output = begun.advanced(flat, mask, keep=kept)
        else:
            output = self.model(**{k: v for k, v in arguments.items() if k in self.accepts})
        # [B, R, K, V]; a model without logits_to_keep gives all L positions: the last K count
        logits = output.logits[:, -kept:].unflatten(0, (rows, -1)).float()
        return log_probabilities(
            logits, batch["read_sequence"], batch["read_position"], batch["read_token"]
        )

    def _read_shared(self, batch: Batch) -> Tensor:
        """The same with every prompt encoded once, and the beginnings of answers behind it."""
        prompts = Encoded.after(self.model, batch, self.accepts)
        rows, sequences, length = batch["shown_ids"].shape
        sequence, position, token = (
            batch[f"read_{name}"] for name in ("sequence", "position", "token")
        )
        zero = torch.zeros_like(sequence)
        logits = prompts.logits.float()[:, None]  # [B, 1, 1, V]
        found = log_probabilities(logits, zero, zero, token)
        each = max(1, MOST_LOGITS // (rows * length * logits.shape[-1]))
        for start in range(0, sequences, each):
            part = slice(start, min(start + each, sequences))
            count = part.stop - start
            shown, mask = batch["shown_ids"][:, part], batch["shown_mask"][:, part]
            output = prompts.repeated(count).advanced(
                shown.reshape(-1, length), mask.reshape(-1, length)
            )
            logits = output.logits.unflatten(0, (rows, count)).float()
            here = (position > 0) & (sequence >= start) & (sequence < part.stop)
            behind = log_probabilities(
                logits,
                torch.where(here, sequence - start, zero),
                torch.where(here, position - 1, zero),
                token,
            )
            found = torch.where(here, behind, found)
        return found

    # --------------------------------------------------------------------------------- tokenisation

    def _context_length(self) -> int | None:
        """Positions that the model has; behind a prefix or soft prompt no more than every layer looks back over.

        The padding of shorter rows stands between it and their text: in a longer sequence they would see less of it than
        they do alone.
        """
        positions = super()._context_length()
        if not before_text(self.model):
            return positions
        window = reach(self.model)
        if not window:
            raise UserError(
                f"a {self.model.config.model_type} model keeps a state that runs through all that it reads, also the "
                "padding between a prompt before the text and the text of a short row: use --tuner lora"
            )
        return positions if window == math.inf else int(min(window, positions or window))

    def null_row(self, example: Example, row: Row) -> Row:
        """The row asked without its content, for calibration: `Task.null_prompt`."""
        text = self.task.null_prompt(example.fields)
        tokens = self._dressed(self._bare(text.rstrip(" ")))
        if not tokens:
            start = self.tokenizer.bos_token_id
            start = self.tokenizer.eos_token_id if start is None else start
            if not isinstance(start, int):
                raise UserError(
                    f"null {self.task.null!r} becomes no token, and the tokenizer has none to begin a text "
                    "with: put words into null"
                )
            tokens = [start]
        return Row(tokens, row.choices, row.right)

    def _answers_of(self, example: Example) -> tuple[Sequence[list[int]], int]:
        if self.task.kind == "classification":
            return super()._answers_of(example)
        if self.task.kind == "generation":
            return [self._word_tokens(example.label + self.task.stop[0])], 0
        tokens = [self._word_tokens(text) for text in example.shown or example.options]
        seen: dict[tuple[int, ...], str] = {}
        for option, found in zip(example.options, tokens, strict=True):
            other = seen.setdefault(tuple(found), option)
            if not found or other != option:
                what = f"and {other!r} become the same tokens" if found else "becomes no token"
                raise UserError(f"{example.where}: option {option!r} {what}: correct the row")
        return tokens, example.options.index(example.label)

    def _room(self, choices: Sequence[list[int]]) -> int:
        longest = max(map(len, choices))
        return max(longest, self.after) if self.task.kind == "generation" else longest

    def _bodies(self, rows: Sequence[dict[str, str]]) -> list[list[int]]:
        return self._bare_all([self._text(fields) for fields in rows])

    def _text(self, fields: dict[str, str]) -> str:
        """The prompt without the space that belongs to the word.

        A tokenizer of words makes " great" one token, so spaces at the prompt's end are left out
        and one is put before the word; after a newline in the template the word follows directly.
        """
        text = self.task.prompt(fields)
        return text.rstrip(" ") if self._tail else text.rstrip()

    def _shown_row(self, example: Example) -> str:
        """A row with its answer."""
        word = self.task.labels.get(example.label, example.label)
        if example.shown:
            word = example.shown[example.options.index(example.label)]
        return self._text(example.fields) + self._join + word

    def _demonstrated(self, example: Example, tokens: list[int], room: int) -> list[int]:
        limit = self.max_length if self.max_length is not None else self.context
        text, separator = self._text(example.fields), self.task.separator
        lengths = [length + len(self._bare(separator)) for _, length in self._shots]
        count = len(lengths)
        # joined up, each may take a few tokens less: what surely does not fit is left out without trying
        while limit is not None and count:
            if len(tokens) + sum(lengths[-count:]) + room <= limit + FEWER * (count + 1):
                break
            count -= 1
        while count:
            texts = [shown for shown, _ in self._shots[-count:]]
            joined = self._dressed(self._bare(separator.join([*texts, text])))
            if limit is None or len(joined) + room <= limit:
                self.demonstrations_shown.append(count)
                return joined
            count -= 1
        self.demonstrations_shown.append(0)
        return tokens

    def _word_tokens(self, word: str) -> list[int]:
        for before in dict.fromkeys((self._tail, "a" if self._join else "a\n")):
            tokens = self._joined(before, self._join, word) if before else None
            if tokens is not None:
                return tokens
        return self._bare(self._join + word)


def log_probabilities(logits: Tensor, sequence: Tensor, position: Tensor, token: Tensor) -> Tensor:
    """[B, T]: of logits [B, R, K, V] what stands at (sequence, position, token) [B, T], normalised."""
    normaliser = logits.logsumexp(dim=-1)
    row = torch.arange(len(logits), device=logits.device)[:, None].expand_as(token)
    return logits[row, sequence, position, token] - normaliser[row, sequence, position]
