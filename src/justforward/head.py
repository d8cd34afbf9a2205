"""An output head that starts as a linear probe (`probe`): its rows of the label words are the regression's ("LP-MeZO", arXiv 2305.17333).

Choices are then scored as the probe scores them; a head that knows better than what was found stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from justforward.data import Example, batches
from justforward.errors import UserError
from justforward.evaluate import Scorer
from justforward.metrics import figures
from justforward.models import inner_model, is_seq2seq
from justforward.probe import Features, Probe, fit_probe, head_of, hidden_states, seen_at
from justforward.prompts import eval_mode
from justforward.tuners import put_rows, rows_of

Inside = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Started:
    """How a head was started: the probe, its accuracy in validation, the forward passes it took, the rows (`rows_of`);
    and whether it is the model's own head that was better.
    """

    probe: Probe
    accuracy: float
    forwards: int
    rows: dict[str, Tensor]
    kept: bool = False


def hindrance(scorer: Scorer, train: Sequence[Example], count: int) -> str | None:
    """Why a head cannot start as a probe of `count` training rows; None if it can, as far as can be told beforehand."""
    if inner_model(scorer.model).get_output_embeddings() is None:
        return f"a {scorer.model.config.model_type} model has no output head"
    unfit = _unfit(scorer, train)
    if unfit is not None:
        return unfit[0]
    if count < 2 * len(scorer.labels):
        return f"{count} rows are too few to fit a probe on"
    if not gives_logits(scorer, train[0]):
        return f"a {scorer.model.config.model_type} model does more to its logits than its head's matrix"
    return None


def _unfit(scorer: Scorer, train: Sequence[Example]) -> tuple[str, str] | None:
    """Which label word or label cannot have a probe, and what to do; None if all can."""
    for word, tokens in zip(scorer.task.labels.values(), scorer.prompts.words, strict=True):
        if len(tokens) != 1:
            return (
                f"label word {word!r} is {len(tokens)} tokens, and a probe has the scores of one",
                "choose words that the tokenizer has whole, or --start base",
            )
    present = {example.label for example in train}
    for label in scorer.labels:
        if label not in present:
            return f"label {label!r} has no training row to fit it on", "give rows of it"
    return None


@torch.no_grad()
def gives_logits(scorer: Scorer, example: Example) -> bool:
    """Whether a model's logits are what its head's matrix gives, neither capped nor scaled."""
    model = inner_model(scorer.model)
    tokens = torch.tensor([scorer.prompts.rows([example])[0].prompt], device=model.device)
    given = {"input_ids": tokens}
    if is_seq2seq(model):
        given["decoder_input_ids"] = tokens[:, :1]  # whichever
    with eval_mode(model), seen_at([(head_of(model), True)], lambda states: states) as seen:
        logits = model(**given).logits
    wanted = model.get_output_embeddings()(seen[0].to(logits))
    return torch.allclose(logits, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def rows_to_fit(train: Sequence[Example], count: int, batch_size: int, seed: int) -> list[Example]:
    """The training rows that a fit sees: the first `count` that steps would, and one of each label that rows share among them."""
    order = dict.fromkeys(
        row
        for step in range(math.ceil(len(train) / batch_size))
        for row in batches(len(train), batch_size, seed, step)
    )
    rows = [train[row] for row in order]
    chosen = rows[:count]
    present = {example.stratum for example in chosen}
    for example in rows[count:]:
        if example.stratum not in present:
            present.add(example.stratum)
            chosen.append(example)
    return chosen


@torch.no_grad()
def start_head(
    scorer: Scorer,
    train: Sequence[Example],
    validation: Sequence[Example],
    batch_size: int,
    spared: Inside = nullcontext,
    or_base: bool = False,
) -> Started:
    """Make the output head's rows of the label words a linear probe: choices are then scored as the probe scores them.

    The rows keep their mean, so that the words together stand to all other tokens as before. A head without a bias gets a
    probe without one: exactly a linear map of the hidden state.

    Args:
        scorer: of a causal or masked model whose head is not tied to its embeddings.
        train: rows to fit on.
        validation: rows to choose the penalty by.
        batch_size: rows a forward.
        spared: while inside, layers that do not move are spared; the validation rows, which are scored again and again, run so.
        or_base: leave the head as it is where that is better in validation (`stays`).

    Raises:
        UserError: a label word of several tokens, a label without training rows, or a model that does more to its logits than
            its head's matrix.
    """
    unfit = _unfit(scorer, train)
    if unfit is not None:
        raise UserError(f"--start is 'probe': {': '.join(unfit)}")
    seen = hidden_states(scorer, train, batch_size)
    with spared():
        chosen = hidden_states(scorer, validation, batch_size)
    probe = fit_head(scorer, seen, chosen, validation)
    forwards = seen.forwards + chosen.forwards
    own = own_head(scorer)
    if or_base and stays(
        own.scores(chosen.features), probe.scores(chosen.features), chosen.answers
    ):
        return kept_head(scorer, own, chosen, forwards)
    rows = put_probe(scorer, probe)
    _check_scores(scorer, rows, train[:batch_size], seen.features[:batch_size])
    return Started(probe, probe.judged(*chosen.pair)[0], forwards, rows)


def own_head(scorer: Scorer) -> Probe:
    """The head's rows of the label words as they are, as a probe."""
    rows = _rows_of_words(scorer)
    weight = rows["weight"].double().cpu()
    bias = rows["bias"].double().cpu() if "bias" in rows else weight.new_zeros(len(weight))
    return Probe(weight, bias, math.inf, True, 0.0)


def kept_head(scorer: Scorer, own: Probe, chosen: Features, forwards: int) -> Started:
    """A start that leaves the head as it is."""
    return Started(own, own.judged(*chosen.pair)[0], forwards, _rows_of_words(scorer), kept=True)


def stays(own: Tensor, found: Tensor, answers: Tensor) -> bool:
    """Whether a model's own head is better than what was found: no fewer rows right and less loss, or more right than luck has.

    More than luck: of the rows that one of them alone has right, by two standard errors of a fair coin.

    Args:
        own: [N, labels], log-probabilities of the model as it is.
        found: likewise, of what it would become.
        answers: [N].
    """
    ours, others = (scores.argmax(dim=1) == answers for scores in (own, found))
    only_ours, only_others = int((ours & ~others).sum()), int((others & ~ours).sum())
    loss, loss_found = (-float(s.gather(1, answers[:, None]).mean()) for s in (own, found))
    if loss < loss_found and only_ours >= only_others:
        return True
    return only_ours - only_others > 2.0 * math.sqrt(only_ours + only_others)


def fit_head(
    scorer: Scorer, seen: Features, chosen: Features, validation: Sequence[Example]
) -> Probe:
    """The probe of the training rows' features that is best on those of the validation rows."""
    bias = "bias" in _rows_of_words(scorer)
    value = partial(worth, scorer, validation)
    return fit_probe(seen.pair, chosen.pair, len(scorer.labels), value=value, intercept=bias)


def worth(scorer: Scorer, rows: Sequence[Example], predicted: Sequence[int]) -> float:
    """The task's metric of the labels predicted for some rows."""
    names = [scorer.labels[label] for label in predicted]
    return figures(scorer.task, rows, names)[scorer.task.metric]


def put_probe(scorer: Scorer, probe: Probe) -> dict[str, Tensor]:
    """Make the head's rows of the label words the probe, about the mean that they have; the rows as they are then."""
    rows = _rows_of_words(scorer)
    for name, new in (("weight", probe.weight), ("bias", probe.bias)):
        if name in rows:
            old = rows[name].double().cpu()
            moved = old.mean(dim=0) + new - new.mean(dim=0)
            rows[name] = moved.to(rows[name]).contiguous()
    put_rows(scorer.model, rows)
    return rows


def _rows_of_words(scorer: Scorer) -> dict[str, Tensor]:
    return rows_of(scorer.model, [word[0] for word in scorer.prompts.words])


def _check_scores(
    scorer: Scorer, put: dict[str, Tensor], rows: Sequence[Example], features: Tensor
) -> None:
    """That the model scores choices by the head's rows alone: not where it caps or scales its logits."""
    with eval_mode(scorer.model):
        found = scorer.scores(scorer.encode(rows)).double().cpu().log_softmax(dim=-1)
    logits = features.double() @ put["weight"].double().cpu().T
    if "bias" in put:
        logits += put["bias"].double().cpu()
    wanted = logits.log_softmax(dim=-1)
    apart = float((found - wanted).abs().max())
    if not apart <= 1e-3 * (1.0 + float(wanted.abs().max())):
        raise UserError(
            f"--start is 'probe': a {scorer.model.config.model_type} model does more to its logits than its head's "
            f"matrix (scores are {apart:.2g} from the probe's): use --start base"
        )
