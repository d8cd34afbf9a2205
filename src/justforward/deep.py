"""A head that starts as a probe of all that the upper layers compute, and not of the last hidden state alone.

What a layer writes to the residual stream is a linear map of an inner state (attention's values, the MLP's inner
units), and the stream is a sum. So a linear function of all inner states of the upper layers *is* a model's output if each of their
linear maps also writes it, in its part, along a direction of the stream that the head reads: one row [in] a map for a label.
The function is a logistic regression; the direction is one in which the stream hardly varies and which the layers above hardly
read, and how strongly it is written is chosen by trying: too weak drowns in what the stream holds there anyway, too strong
disturbs the layers above. Of this and the probe of the last hidden state that is kept which is better in validation.

With n rows everything is fitted in their n x n products, whatever the width of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from justforward.data import Example
from justforward.evaluate import Scorer
from justforward.head import Inside, Started, fit_head, kept_head, own_head, put_probe, stays
from justforward.models import inner_model
from justforward.probe import Features, Probe, fit_probe, head_of, hidden_states, seen_at
from justforward.prompts import eval_mode
from justforward.stream import Norm, Stream, dense_of, find_norm, find_stream, write, writing_too
from justforward.trunk import stack_of

MOST_ROWS = 4000  # that a probe is fitted on: products of all pairs are kept
# Inverse strengths of the penalty; a row's features are about 1 long.
GRID = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
STRENGTHS = (5.0, 10.0, 20.0, 40.0)  # of what is written, in what the stream holds there anyway
TRIED = 16  # rows that each strength is tried on
READ = 0.1  # how much being read by the layers above counts, against varying


def deep_hindrance(scorer: Scorer, row: Example, share: float) -> str | None:
    """Why the upper layers of a model, this share of all, cannot be probed; None if they can."""
    kind = scorer.model.config.model_type
    if stack_of(scorer.model) is None:
        return f"a {kind} model has no single stack of layers"
    stream = stream_of(scorer, row, share)
    if stream is None:
        return f"the layers of a {kind} model write to the residual stream by more than linear maps"
    if find_norm(*everywhere(scorer, stream, row)) is None:
        return f"there is more than a norm between the layers of a {kind} model and its head"
    return None


def stream_of(scorer: Scorer, row: Example, share: float) -> Stream | None:
    """The last layers of a model, this share of all (`find_stream`), found by running a row's prompt."""
    with eval_mode(scorer.model):
        return find_stream(scorer.model, _tokens(scorer, row), share)


def _tokens(scorer: Scorer, row: Example) -> Tensor:
    return torch.tensor([scorer.prompts.rows([row])[0].prompt], device=scorer.model.device)


@torch.no_grad()
def everywhere(scorer: Scorer, stream: Stream, row: Example) -> tuple[Tensor, Tensor]:
    """What leaves the last layer and what the head sees, [L, hidden] each, at every place of a text."""
    watched = [(stream.layers[-1], False), (head_of(scorer.model), True)]
    with eval_mode(scorer.model), seen_at(watched, lambda states: states[0]) as seen:
        inner_model(scorer.model)(input_ids=_tokens(scorer, row))
    return seen[0], seen[1]


# ------------------------------------------------------------------------------------------ the fit


@dataclass(frozen=True)
class Fitted:
    """A probe of inner states: scores = head (what the head sees) + mix (sum over maps of what (input) / size).

    Attributes:
        probe: the regression; its C and whether its fit converged.
        head: [labels, hidden].
        what: for each linear map that writes to the stream, [J, in].
        mix: [labels, J]: of two labels J is 1, of more one each.
    """

    probe: Probe
    head: Tensor
    what: dict[str, Tensor]
    mix: Tensor

    def signals(self, states: Features, sizes: Tensor) -> Tensor:
        """[N, J]: what is summed over the maps."""
        parts = (x @ v.T for x, v in zip(states.inputs, self.what.values(), strict=True))
        return torch.stack(list(parts)).sum(0) / sizes

    def scores(self, states: Features, sizes: Tensor) -> Tensor:
        """[N, labels]."""
        return states.features @ self.head.T + self.signals(states, sizes) @ self.mix.T


def _fit(
    scorer: Scorer, names: Sequence[str], seen: Features, chosen: Features, norm: Norm
) -> Fitted:  # fmt: skip
    """The regression on all inner states of the training rows, its penalty chosen by the validation rows."""
    sizes = norm.sizes(seen.outputs[-1])
    usual = sizes.mean()
    blocks = [(x * (usual / sizes)) for x in seen.inputs] + [seen.features]
    others = norm.sizes(chosen.outputs[-1])
    blocks_chosen = [(x * (usual / others)) for x in chosen.inputs] + [chosen.features]
    # each feature of size 1, each block of as much weight, a row about 1 long
    scales = [
        (x.square().mean(0).sqrt() * (x.shape[1] * len(blocks)) ** 0.5).clamp_min(1e-12)
        for x in blocks
    ]
    gram = torch.zeros(len(seen.answers), len(seen.answers), dtype=torch.float64)
    cross = torch.zeros(len(chosen.answers), len(seen.answers), dtype=torch.float64)
    for x, y, scale in zip(blocks, blocks_chosen, scales, strict=True):
        scaled = (x / scale).double()
        gram += scaled @ scaled.T
        cross += (y / scale).double() @ scaled.T
    values, vectors = torch.linalg.eigh(gram)
    kept = values > 1e-10 * values[-1]
    basis = vectors[:, kept] / values[kept].sqrt()
    probe = fit_probe(
        (gram @ basis, seen.answers), (cross @ basis, chosen.answers), len(scorer.labels), GRID,
        value=lambda predicted: 0.0, intercept=False, standardise=False,  # by the loss alone
    )  # fmt: skip
    by_row = probe.weight @ basis.T  # [labels, N]
    labels = len(scorer.labels)
    if labels == 2:  # only the difference counts
        mix = torch.tensor([[-0.5], [0.5]])
        by_signal = (by_row[1] - by_row[0])[None]
    else:
        mix, by_signal = torch.eye(labels), by_row
    what = {
        name: ((by_signal @ (x / scale).double()) / scale).float() * usual
        for name, x, scale in zip(names, blocks[:-1], scales[:-1], strict=True)
    }
    head = ((by_row @ (blocks[-1] / scales[-1]).double()) / scales[-1]).float()
    return Fitted(probe, head, what, mix)


@torch.no_grad()
def silent_directions(stream: Stream, norm: Norm, seen: Features, count: int) -> Tensor:
    """[hidden, count], orthonormal: where the stream holds little and the upper layers read little.

    Args:
        stream, norm, seen: as for `loudness`.
        count: how many.
    """
    vectors: Tensor = torch.linalg.eigh(loudness(stream, norm, seen))[1]
    return vectors[:, :count].float().contiguous()


@torch.no_grad()
def loudness(stream: Stream, norm: Norm, seen: Features, heard: float = READ) -> Tensor:
    """[hidden, hidden] float64, positive: of a direction, how much the stream holds there and how strongly it is read.

    Args:
        stream: the upper layers.
        norm: what is behind them.
        seen: of some rows, what leaves each of these layers.
        heard: how much being read counts, against what is held.
    """
    width = seen.features.shape[1]
    held = torch.zeros(width, width)
    for x in (*seen.outputs[:-1], (seen.features / _safe(norm.scale))):
        scaled = x / x.square().mean(dim=1, keepdim=True).sqrt()
        held += scaled.T @ scaled / len(x)
    read = torch.zeros(width, width)
    for maps, scale in stream.readers:
        for linear in maps:
            weight = dense_of(linear) * scale.cpu()
            read += weight.T @ weight / len(weight)
    total = held / held.trace() + heard * read / read.trace().clamp_min(1e-12)
    if norm.centred:  # the mean is taken off what is written there
        total += 1.0 / width
    return total.double()


def _safe(scale: Tensor) -> Tensor:
    return torch.where(scale.abs() < 1e-6, torch.full_like(scale, 1e-6), scale)


# -------------------------------------------------------------------------------------- the start


@torch.no_grad()
def start_deep(
    scorer: Scorer,
    train: Sequence[Example],
    validation: Sequence[Example],
    batch_size: int,
    share: float,
    spared: Inside = nullcontext,
    or_base: bool = False,
) -> Started:
    """Make head and upper layers a probe of their inner states, or the head alone one of the last, whichever is better.

    Args:
        scorer: of a causal model whose head is not tied to its embeddings, and of which `deep_hindrance` knows nothing.
        train: rows to fit on.
        validation: rows to choose by.
        batch_size: rows a forward.
        share: of the layers, the last ones: these are probed and written to.
        spared: as for `start_head`.
        or_base: likewise.

    Returns:
        What was made; `rows` also holds, where upper layers were written to, "to" [hidden, J] and for each linear
        map "what." and its name [J, in].
    """
    stream = stream_of(scorer, train[0], share)
    assert stream is not None
    modules = list(stream.writers.values())
    seen = hidden_states(scorer, train, batch_size, modules, stream.layers)
    with spared():
        chosen = hidden_states(scorer, validation, batch_size, modules, stream.layers)
    norm = find_norm(*everywhere(scorer, stream, train[0]))
    assert norm is not None
    plain = fit_head(scorer, seen, chosen, validation)
    fitted = _fit(scorer, list(stream.writers), seen, chosen, norm)
    to = silent_directions(stream, norm, seen, fitted.mix.shape[1])
    read = to / _safe(norm.scale)[:, None]
    sizes = norm.sizes(seen.outputs[-1])
    spread = fitted.signals(seen, sizes).std(0).clamp_min(1e-12)
    held = (seen.features @ read).square().mean(0).sqrt()
    held = held.clamp_min(1e-4 * float(seen.features.square().mean().sqrt()))  # not nothing at all

    def made(strength: float) -> tuple[Tensor, Probe]:
        """The directions as they are written, and the head that reads them."""
        by = strength * held / spread
        weight = fitted.head + fitted.mix @ (read / by).T
        bias = torch.zeros(len(weight), dtype=torch.float64)
        return (to * by).contiguous(), Probe(
            weight.double(), bias, fitted.probe.c, fitted.probe.converged, 0.0
        )

    def under(strength: float, rows: Sequence[Example]) -> Features:
        with spared(), writing_too(stream.writers, made(strength)[0], fitted.what):
            return hidden_states(scorer, rows, batch_size)

    few = train[:TRIED]
    forwards = seen.forwards + chosen.forwards
    wanted = fitted.scores(seen, sizes)[:TRIED]

    def apart(strength: float) -> float:
        nonlocal forwards
        tried = under(strength, few)
        forwards += tried.forwards
        found = made(strength)[1].scores(tried.features)
        return float((found - wanted.double().log_softmax(-1)).square().mean())

    strength = min(STRENGTHS, key=apart)
    directions, deep = made(strength)
    actual = under(strength, validation)
    forwards += actual.forwards

    # by the loss, which says more of a few rows than how many are right
    is_plain = plain.judged(*chosen.pair)[1] <= deep.judged(*actual.pair)[1]
    best = plain.scores(chosen.features) if is_plain else deep.scores(actual.features)
    own = own_head(scorer)
    if or_base and stays(own.scores(chosen.features), best, chosen.answers):
        return kept_head(scorer, own, chosen, forwards)
    if is_plain:
        return Started(plain, plain.judged(*chosen.pair)[0], forwards, put_probe(scorer, plain))
    tensors = put_probe(scorer, deep)
    for name, module in stream.writers.items():
        write(module, directions, fitted.what[name])
    tensors |= {
        "to": directions,
        **{f"what.{name}": v for name, v in fitted.what.items()},
    }
    return Started(deep, deep.judged(*actual.pair)[0], forwards, tensors)
