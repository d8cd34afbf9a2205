"""Linear probing: logistic regression on what the output head sees where the answer is read.

The model stays as it is. Of a causal model the features are the last hidden state of the prompt, of a masked one
the state at the mask, of an encoder-decoder the decoder's before its answer; each as the head's matrix gets it. A linear map from there to the labels is what tuning that
matrix reaches for, found by convex optimization instead of steps (arXiv 2305.17333, table 1, "LP"). A head may start from it (`head`).
"""

from __future__ import annotations

import math
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from justforward.alone import hands, spread
from justforward.data import Example
from justforward.errors import UserError
from justforward.evaluate import Part, Scorer, in_parts
from justforward.models import inner_model
from justforward.prompts import Batch, Row, eval_mode
from justforward.trunk import is_small

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Inverse strengths of the penalty, of which validation chooses; on standardised features.
GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2)
MOST_ITERATIONS = 5000
LEAST_SCALE = 0.01  # of scores, whatever validation says: labels are still told apart
# So many weaker penalties in a row that are no better end the search: they take the longest to fit.
WORSE = 2


@dataclass(frozen=True)
class Probe:
    """A fitted probe: scores = features weight^T + bias.

    Attributes:
        weight: [labels, hidden] float64.
        bias: [labels] float64.
        c: inverse strength of the penalty.
        converged: whether the fit ended before its limit of iterations.
        seconds: of the fit; of `fit_probe` all those that were tried.
    """

    weight: Tensor
    bias: Tensor
    c: float
    converged: bool
    seconds: float

    def scores(self, features: Tensor) -> Tensor:
        """[N, labels] float64: log-probability of each label, of features [N, hidden]."""
        return (features.double() @ self.weight.T + self.bias).log_softmax(dim=-1)

    def predictions(self, features: Tensor) -> list[int]:
        """The likeliest label of each row of features [N, hidden]."""
        return [int(label) for label in self.scores(features).argmax(dim=1)]

    def judged(self, features: Tensor, answers: Tensor) -> tuple[float, float]:
        """Accuracy, and mean loss in nats, on features [N, hidden] with labels answers [N]."""
        scores = self.scores(features)
        losses = -scores.gather(1, answers[:, None])[:, 0]
        right = int((scores.argmax(dim=1) == answers).sum())
        return right / len(answers), math.fsum(losses.tolist()) / len(answers)

    def calibrated(self, features: Tensor, answers: Tensor) -> Probe:
        """The probe with its scores divided by the temperature, at least 1, at which rows that it was not fitted on have
        the least loss (arXiv 1706.04599): the same predictions, as sure as they may be.
        """
        scores = features.double() @ self.weight.T + self.bias
        right = scores.gather(1, answers[:, None])[:, 0]

        def slope(scale: float) -> float:
            """Of the mean loss, which is convex in the scale."""
            expected = ((scale * scores).softmax(dim=1) * scores).sum(dim=1)
            return float((expected - right).mean())

        if slope(1.0) <= 0.0:
            return self
        low, high = LEAST_SCALE, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if slope(middle) > 0.0 else (middle, high)
        return replace(self, weight=low * self.weight, bias=low * self.bias)


# ------------------------------------------------------------------------------------------ fitting


def probe_weights(
    features: Tensor,
    answers: Tensor,
    labels: int,
    c: float = 1.0,
    intercept: bool = True,
    standardise: bool = True,
) -> Probe:
    """The multinomial logistic regression on some rows, for features as they come.

    Least sum of the rows' losses and |weight|^2 / 2c (of two labels |weight[1] - weight[0]|^2 / 2c), the bias free,
    where features are standardised; which is then folded into weight and bias, so that the rows of an output
    head that belong to the label words may start from them.

    Args:
        features: [N, hidden].
        answers: [N], each from 0 to labels - 1.
        labels: how many there are, at least 2.
        c: inverse strength of the penalty, positive.
        intercept: whether there is a bias; without, it is zero, and features are scaled about zero.
        standardise: whether features are standardised first; if not, they are taken as they are.

    Raises:
        UserError: a label has no row, or a feature is not finite.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    x, y = features.double().cpu(), answers.cpu()
    counts = torch.bincount(y, minlength=labels)
    if int(counts.min()) == 0:
        raise UserError(f"label {int(counts.argmin())} of {labels} has no row to fit a probe on")
    if not x.isfinite().all():
        raise UserError(
            "a hidden state is not finite: the model's weights are broken: load another model"
        )
    if not standardise:
        mean, scale = torch.zeros_like(x[0]), torch.ones_like(x[0])
    elif intercept:
        mean, scale = x.mean(dim=0), x.std(dim=0, correction=0)
    else:
        mean, scale = torch.zeros_like(x[0]), x.square().mean(dim=0).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)  # a feature that is constant
    regression = LogisticRegression(C=c, max_iter=MOST_ITERATIONS, fit_intercept=intercept)
    clock = time.monotonic()
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always", ConvergenceWarning)
        regression.fit(((x - mean) / scale).numpy(), y.numpy())
    took = time.monotonic() - clock
    converged = not any(issubclass(w.category, ConvergenceWarning) for w in raised)
    weight = torch.from_numpy(regression.coef_)
    bias = torch.from_numpy(regression.intercept_) if intercept else weight.new_zeros(len(weight))
    if labels == 2:  # given as one row, the log-odds of the second
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    weight = weight / scale
    return Probe(weight, bias - weight @ mean, c, converged, took)


def fit_probe(
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    labels: int,
    grid: Sequence[float] = GRID,
    value: Callable[[list[int]], float] | None = None,
    intercept: bool = True,
    standardise: bool = True,
) -> Probe:
    """The best probe of a grid, by the rule that keeps a step: value in validation, loss, the stronger penalty. Each is
    `calibrated` by the validation rows first: a penalty that is chosen by how many are right may leave it too sure.

    Args:
        train: features [N, hidden] and answers [N] to fit on.
        validation: features and answers to choose by.
        labels: how many there are.
        grid: inverse strengths of the penalty.
        value: of the labels predicted for the validation rows, the higher the better (default accuracy).
        intercept: as `probe_weights` has it.
        standardise: likewise.

    Raises:
        UserError: as `probe_weights`.
    """

    def rating(probe: Probe) -> tuple[float, float]:
        accuracy, loss = probe.judged(*validation)
        worth = accuracy if value is None else value(probe.predictions(validation[0]))
        return -worth, loss

    probes: list[Probe] = []
    best = 0
    for c in sorted(grid):  # of equals the first, with the stronger penalty
        probes.append(
            probe_weights(*train, labels, c, intercept, standardise).calibrated(*validation)
        )
        if rating(probes[-1]) < rating(probes[best]):
            best = len(probes) - 1
        if len(probes) - 1 - best >= WORSE:
            break
    return replace(probes[best], seconds=math.fsum(probe.seconds for probe in probes))


# ----------------------------------------------------------------------------------------- features


@dataclass(frozen=True)
class Features:
    """Of some rows, in order: features [N, hidden] float32 on the CPU, answers [N], and the forward passes of it.

    Attributes:
        inputs: of modules that were asked for, in order: what entered them where the features are from, [N, in].
        outputs: likewise what left them, [N, out].
    """

    features: Tensor
    answers: Tensor
    forwards: int
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        return self.features, self.answers


@torch.no_grad()
def hidden_states(
    scorer: Scorer,
    examples: Sequence[Example],
    batch_size: int,
    inputs: Sequence[nn.Module] = (),
    outputs: Sequence[nn.Module] = (),
) -> Features:
    """What the output head's matrix sees at the position that predicts the answer's first token.

    Args:
        scorer: of the model.
        examples: the rows.
        batch_size: rows a forward.
        inputs: modules of which what enters them there is returned, too.
        outputs: modules of which what leaves them there is.

    Raises:
        UserError: no rows, a model without an output head; or as `Scorer.prepare`.
    """
    if not examples:
        raise UserError("there are no rows to probe: give at least one")
    prompts = scorer.prompts
    # the first token of an answer is predicted by the prompt alone: one short sequence a row
    asked = [Row(row.prompt, [row.choices[row.right][:1]], 0) for row in prompts.rows(examples)]
    # longest first, rows of like length together, as `Scorer.evaluate` has them
    order = sorted(range(len(asked)), key=lambda i: len(asked[i].prompt), reverse=True)
    watched = [(head_of(scorer.model), True), *((m, True) for m in inputs), *((m, False) for m in outputs)]  # fmt: skip
    found: list[list[Tensor]] = [[torch.empty(0)] * len(asked) for _ in watched]
    among = hands(is_small(scorer.model))
    forwards, parts = in_parts(order, batch_size, among)
    with eval_mode(scorer.model), watching(watched) as seen:

        def states(part: Part) -> list[Tensor]:
            batch = prompts.batch([asked[i] for i in part.places])
            seen.begin(partial(_where_answered, batch=batch, count=len(part.places)))
            prompts.scores(batch)
            return seen.states

        for part, given in zip(parts, spread(states, parts, among), strict=True):
            for of_one, several in zip(found, given, strict=True):
                for i, state in zip(part.places, several, strict=True):
                    of_one[i] = state
    answers = torch.tensor([scorer.labels.index(example.label) for example in examples])
    stacked = [torch.stack(of_one) for of_one in found]
    split = 1 + len(inputs)
    return Features(stacked[0], answers, forwards, stacked[1:split], stacked[split:])


def _where_answered(states: Tensor, batch: Batch, count: int) -> Tensor:
    """[B, n]: of states [B, L, n], or [B * L, n], the last of a prompt, or the one at the mask."""
    states = states.reshape(count, -1, states.shape[-1])
    at = batch.get("mask_position")
    if (
        at is None or states.shape[1] == 1
    ):  # prompts, and what is before answers, end together; a head may be given the masks alone
        return states[:, -1]
    return states[torch.arange(len(at), device=at.device), at]


def head_of(model: PreTrainedModel) -> nn.Module:
    """The matrix that gives the logits.

    Raises:
        UserError: there is none.
    """
    head: Any = inner_model(model).get_output_embeddings()
    if head is None:
        raise UserError(
            f"--method is 'probe': a {model.config.model_type} model has no output head, whose input is "
            "what is probed: choose another method"
        )
    module: nn.Module = head
    return module


class Seen(threading.local):
    """What has entered or left modules in a thread's last forward pass, on the CPU."""

    states: list[Tensor]
    pick: Callable[[Tensor], Tensor]

    def __init__(self, count: int) -> None:
        self._count = count

    def begin(self, pick: Callable[[Tensor], Tensor]) -> None:
        """Of this thread's next pass keep what `pick` makes of it."""
        self.pick, self.states = pick, [torch.empty(0)] * self._count


@contextmanager
def watching(watched: Sequence[tuple[nn.Module, bool]]) -> Iterator[Seen]:
    """While inside, of each module what enters it (or leaves it, where not that) is seen in each pass that is begun."""
    seen = Seen(len(watched))

    def keeps(i: int, enters: bool) -> Callable[..., None]:
        def ran(module: Any, arguments: Any, output: Any) -> None:
            given = arguments[0] if enters else output[0] if isinstance(output, tuple) else output
            seen.states[i] = seen.pick(given).float().cpu().clone()  # not a view of all places

        return ran

    handles = [m.register_forward_hook(keeps(i, enters)) for i, (m, enters) in enumerate(watched)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def seen_at(
    watched: Sequence[tuple[nn.Module, bool]], pick: Callable[[Tensor], Tensor]
) -> Iterator[list[Tensor]]:
    """`watching` the passes of this thread."""
    with watching(watched) as seen:
        seen.begin(pick)
        yield seen.states
