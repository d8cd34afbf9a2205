"""Scores each choice of a row by its log-likelihood, whole batches in one forward pass; or has the model write.

A causal model is asked for what follows the prompt (`causal`), a masked one for what stands at the mask
(`masked`), an encoder-decoder for what its decoder answers to the prompt (`seq2seq`); what is common to them is here and
in `prompts`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from justforward.alone import hands, spread
from justforward.causal import CausalPrompts
from justforward.data import Example
from justforward.errors import UserError
from justforward.generate import GREEDY, Sampling, generate
from justforward.masked import MaskedPrompts
from justforward.metrics import accuracy, exact_match, figures
from justforward.models import is_masked, is_seq2seq
from justforward.prompts import Batch, Prompts, Row, eval_mode, feed_head_whole
from justforward.seq2seq import Seq2SeqPrompts
from justforward.tasks import Task
from justforward.trunk import is_small

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Which answers of a row are put into a batch.
Answers = Literal["all", "right", "none"]


@dataclass(frozen=True)
class Evaluation:
    """How well the model answers.

    Attributes:
        accuracy: share of rows answered rightly, in [0, 1]; of generated texts the exact matches.
        loss: mean of the task's loss over the rows, in nats.
        predictions: what is predicted for each row, in the order the rows were given: a label, an option,
            or a text.
        rows: how many rows.
        forwards: how many forward passes of a batch it took.
        metric: name of the task's first metric.
        value: that metric.
        metrics: all that the task reports, by name.
        losses: of each row, in the order the rows were given.
        rights: likewise 1 where it is answered rightly, 0 where not.
    """

    accuracy: float
    loss: float
    predictions: list[str]
    rows: int
    forwards: int
    metric: str = "accuracy"
    value: float = math.nan
    metrics: dict[str, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    rights: list[float] = field(default_factory=list)


# Of which `Scorer.digest` wants to know the tokens.
_TEXTS = (
    "The quick brown fox jumps over 12,345 lazy dogs.",
    "  Zażółć gęślą jaźń — 漢字, ελληνικά, 🙂\n\tdef f(x):",
    "",
)


class Scorer:
    """Turns rows into batches and batches into one score a choice, or one loss a row.

    Args:
        model: a causal, masked or encoder-decoder language model.
        tokenizer: its tokenizer; it needs no padding token.
        task: template and label words; the template has ``{mask}`` if the model is a masked one.
        max_length: longest sequence in tokens, prompt and answer together (of an encoder-decoder the
            prompt alone); a longer row has the text of its longest field shortened (the template and the answer stay whole). None
            truncates nothing: a row longer than the model's context is an error.
        demonstrations: rows to show with their answers before each row (in-context learning), as many
            of the last of them as fit.
        calibrate: take off each choice's score what it has where the row's content is left out
            (arXiv 2104.08315; the paper's "SFC"); scores are then sums.

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
        demonstrations: Sequence[Example] = (),
        calibrate: bool = False,
    ) -> None:
        if calibrate and task.kind == "generation":
            raise UserError(
                "calibration is of the scores of choices, and a task of kind 'generation' has none: "
                "leave --calibrate out"
            )
        feed_head_whole(model)
        self.model = model
        self.tokenizer = tokenizer
        self.task = task
        self.labels = list(task.labels)
        self.max_length = max_length
        self.calibrate = calibrate
        kind: type[Prompts] = CausalPrompts
        if is_seq2seq(model):
            kind = Seq2SeqPrompts
        elif is_masked(model):
            kind = MaskedPrompts
        self.prompts: Prompts = kind(model, tokenizer, task, max_length, demonstrations)
        self._numbers: dict[int, int] = {}  # of an example's id
        # The examples are kept too: their ids stay taken as long as the entries live.
        self._known: list[tuple[Example, Row]] = []

    # ------------------------------------------------------------------------------------ public

    def prepare(
        self, examples: Sequence[Example], note: Callable[[str], None] | None = None
    ) -> None:
        """Tokenises rows ahead of their first batch, so that a bad one is found before training.

        Args:
            note: told how many of the rows were shortened, if any.

        Raises:
            UserError: a row longer than the context, or than max_length with its text left out;
                naming its file and line.
        """
        new = list({id(e): e for e in examples if id(e) not in self._numbers}.values())
        before = self.prompts.shortened
        for example, row in zip(new, self.prompts.rows(new), strict=True):
            self._numbers[id(example)] = len(self._known)
            self._known.append((example, row))
        shortened = self.prompts.shortened - before
        if shortened and note is not None:
            note(
                f"note: {shortened} of {len(new)} rows are longer than max_length ({self.max_length} tokens): the text of their "
                "longest field was shortened"
            )

    def digest(self, examples: Sequence[Example]) -> str:
        """sha256 of the tokens of some rows, and of a few texts: two tokenizers that agree in it make the same batches of them."""
        self.prepare(examples)
        rows = [self._known[self._numbers[id(e)]][1] for e in examples]
        said = [self.tokenizer(text)["input_ids"] for text in _TEXTS]
        said += [[row.prompt, list(row.choices), row.right] for row in rows]
        return sha256(json.dumps(said).encode()).hexdigest()

    def encode(
        self, examples: Sequence[Example], answers: Answers = "all", common: bool = False
    ) -> Batch:
        """A batch of B rows: every tensor has B as its first dimension.

        ``label`` [B] is the index of the right choice, ``row`` [B] what `example` knows a row by; the others
        are the model's input, as `CausalPrompts.batch`, `MaskedPrompts.batch` or
        `Seq2SeqPrompts.batch` has it.

        Args:
            answers: "all" choices, the "right" one alone (enough for the loss over the vocabulary), or
                "none" (to write an answer).
            common: what all prompts begin with may be apart, in ``start_ids`` [1, P]: not for looks.

        Raises:
            UserError: no rows, or as `prepare`.
        """
        if not examples:
            raise UserError("there are no rows to encode: give at least one")
        self.prepare(examples)
        numbers = [self._numbers[id(example)] for example in examples]
        rows = [self._known[number][1] for number in numbers]
        if self.task.kind != "classification" and answers != "all":
            rows = [r.only_right() if answers == "right" else r.without_answers() for r in rows]
        device = self.model.device
        return {
            **self.prompts.batch(rows, common),
            "label": torch.tensor([row.right for row in rows], device=device),
            "row": torch.tensor(numbers, device=device),
        }

    def encode_training(self, examples: Sequence[Example]) -> Batch:
        """`encode` with no more answers than the task's loss needs."""
        return self.encode(examples, "right" if self.task.loss == "vocabulary" else "all")

    def examples(self, batch: Batch) -> list[Example]:
        """The rows of a batch."""
        return [self._known[number][0] for number in batch["row"].tolist()]

    def length(self, example: Example) -> int:
        """Tokens of a row's prompt."""
        self.prepare([example])
        return len(self._known[self._numbers[id(example)]][1].prompt)

    @torch.no_grad()
    def scores(self, batch: Batch) -> Tensor:
        """[B, C] float32: score of each choice in its place. One forward pass, or two (`causal`)."""
        return self.prompts.scores(batch)

    def loss_of(self, batch: Batch) -> Tensor:
        """[B] float32: the task's loss of each row, differentiable."""
        return self._losses(self.prompts.scores(batch), batch["label"])

    @torch.no_grad()
    def losses(self, batch: Batch) -> Tensor:
        """[B] float32: the task's loss of each row, without a graph."""
        return self.loss_of(batch)

    @torch.no_grad()
    def predict(self, batch: Batch, sampling: Sampling = GREEDY) -> list[str]:
        """What the model answers to each row of a batch: a label, an option, or a text.

        For kind "generation" the batch is one encoded with answers "none".
        """
        return self._predict(batch, sampling)[0]

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
        order = sorted(range(len(examples)), key=lambda i: self.length(examples[i]), reverse=True)
        predictions = [""] * len(examples)
        losses = [0.0] * len(examples)
        # a text that is written has steps of few tokens, for which all weights are read
        among = hands(self.task.kind != "generation" and is_small(self.model))
        batches, parts = in_parts(order, batch_size, among)
        forwards = [0] * batches

        def judged(part: Part) -> tuple[list[str], list[float], int]:
            return self._judged([examples[i] for i in part.places])

        with eval_mode(self.model), torch.no_grad():
            for part, (names, found, passes) in zip(
                parts, spread(judged, parts, among), strict=True
            ):
                forwards[part.batch] = max(forwards[part.batch], passes)
                for i, name, loss in zip(part.places, names, found, strict=True):
                    predictions[i], losses[i] = name, loss
        metrics = figures(self.task, examples, predictions)
        count = len(examples)
        rights = [self._right(p, e) for p, e in zip(predictions, examples, strict=True)]
        # fsum: the mean does not depend on the order of the batches
        return Evaluation(
            accuracy=sum(rights) / count,
            loss=math.fsum(losses) / count,
            predictions=predictions,
            rows=count,
            forwards=sum(forwards),
            metric=self.task.metric,
            value=metrics[self.task.metric],
            metrics=metrics,
            losses=losses,
            rights=rights,
        )

    # ----------------------------------------------------------------------------------- private

    def _judged(self, rows: list[Example]) -> tuple[list[str], list[float], int]:
        """What is predicted for the rows of a batch, their losses, and how many passes that took."""
        batch = self.encode(rows, common=True)
        scores = self.prompts.scores(batch)
        passes = _passes(batch)
        self._check_finite(scores, batch, rows)
        losses = self._losses(scores, batch["label"]).tolist()
        if self.task.kind == "generation":
            predicted, more = self._predict(self.encode(rows, "none", common=True), GREEDY)
            return predicted, losses, passes + more
        if self.calibrate:
            scores, more = self._calibrated(rows, batch, scores)
            passes += more
        return self._names(rows, scores), losses, passes

    def _right(self, predicted: str, example: Example) -> float:
        if self.task.kind == "classification":
            return float(predicted == example.label)
        of_row = exact_match if self.task.kind == "generation" else accuracy
        return of_row(predicted, example.answers)

    def _predict(self, batch: Batch, sampling: Sampling) -> tuple[list[str], int]:
        rows = self.examples(batch)
        if self.task.kind != "generation":
            return self._names(rows, self.prompts.scores(batch)), 1
        written = generate(
            self.model,
            self.tokenizer,
            batch,
            self.prompts.accepts,
            stop=self.task.stop,
            max_new_tokens=self.task.max_new_tokens,
            sampling=sampling,
            keys=batch["row"].tolist(),
        )
        return written.texts, written.forwards

    def _names(self, rows: Sequence[Example], scores: Tensor) -> list[str]:
        chosen = scores.argmax(dim=1).tolist()
        return [(e.options or self.labels)[c] for e, c in zip(rows, chosen, strict=True)]

    def _losses(self, scores: Tensor, label: Tensor) -> Tensor:
        if self.task.loss == "choices":
            scores = scores.log_softmax(dim=-1)
        return -scores.gather(1, label[:, None]).squeeze(1)

    def _calibrated(
        self, rows: Sequence[Example], batch: Batch, scores: Tensor
    ) -> tuple[Tensor, int]:
        """Summed scores minus those without the rows' content; and the forward passes it took.

        Args:
            batch: of the rows.
            scores: of the batch, [B, C].
        """
        known = [self._known[self._numbers[id(example)]][1] for example in rows]
        nulls = [self.prompts.null_row(e, row) for e, row in zip(rows, known, strict=True)]
        # the word scores of one null prompt are the same for all rows: asked once
        first = nulls[0]
        same = all(n.prompt == first.prompt and n.choices is first.choices for n in nulls)
        null = self.prompts.batch(nulls[:1] if same else nulls)
        without, forwards = self.prompts.summed(null), _passes(null)
        if self.task.score != "sum":
            scores = self.prompts.summed(batch)
            forwards += _passes(batch)
        # options that a row lacks are minus infinity in both
        return torch.where(scores.isfinite(), scores - without, scores), forwards

    def _check_finite(self, scores: Tensor, batch: Batch, rows: Sequence[Example]) -> None:
        wanted = batch.get("present", torch.ones_like(scores, dtype=torch.bool))
        finite = (scores.isfinite() | ~wanted).all(dim=1).tolist()
        if not all(finite):
            raise UserError(
                f"{rows[finite.index(False)].where}: the scores are not finite: the model's weights are broken: "
                "load another model or replay to an earlier step"
            )


@dataclass(frozen=True)
class Part:
    """Some places of a batch, which is the `batch`th."""

    batch: int
    places: list[int]


def in_parts(order: Sequence[int], batch_size: int, among: int) -> tuple[int, list[Part]]:
    """Places in batches, and each batch in parts for so many hands: how many batches there are, and the parts in order."""
    size = -(-batch_size // among)
    starts = range(0, len(order), batch_size)
    parts = [
        Part(batch, list(order[at : min(at + size, start + batch_size)]))
        for batch, start in enumerate(starts)
        for at in range(start, min(start + batch_size, len(order)), size)
    ]
    return len(starts), parts


def _passes(batch: Batch) -> int:
    """Forward passes that scoring a batch takes: what is read once for several rows is one of its own."""
    return 1 + ("shown_ids" in batch) + ("start_ids" in batch)
