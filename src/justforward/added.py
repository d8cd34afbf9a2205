"""A LoRA that starts as a probe of all that the upper layers compute: `deep` for a model whose weights stay as they are.

The maps that write to the residual stream get to write a linear function of their inputs in addition, along the
directions that the model's own head reads as its label words; nothing else of the model changes, its head and the
embeddings tied to it least of all. One direction a label, so that is the rank of the addition.

Since the head cannot be told how strongly it is written, and what is written disturbs the layers above, the function
is found in rounds, as Gauss and Newton would: what the model says with it is measured on all rows, and the logistic regression is
fitted anew beside what it says without. A round whose validation loss is not lower goes half as far again.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from justforward.data import Example
from justforward.deep import GRID, deep_hindrance, everywhere, loudness, stream_of
from justforward.evaluate import Scorer
from justforward.head import Inside, Started, own_head, stays
from justforward.lowrank import lora_layers, put, ranks_of
from justforward.probe import WORSE, Features, Probe, hidden_states
from justforward.stream import Norm, Stream, find_norm, writing_too

ROUNDS = 6
READ = 1.0  # how much being read by the layers above counts, against what the stream holds
ITERATIONS = 500  # of a fit
_BASE = ".base_layer"  # what peft calls a map that it adds to


def added_hindrance(scorer: Scorer, row: Example, share: float, rank: int) -> str | None:
    """Why no LoRA of this rank can start so; None if it can."""
    if _signals(len(scorer.labels)) > rank:
        return f"{len(scorer.labels)} labels take a rank of as many, and --lora-rank is {rank}"
    return deep_hindrance(scorer, row, share)


def _signals(labels: int) -> int:
    """Of two labels only the difference counts."""
    return 1 if labels == 2 else labels


def written_by(scorer: Scorer, row: Example, share: float) -> list[str]:
    """The names of the maps of the upper layers that write to the stream, in order."""
    stream = stream_of(scorer, row, share)
    assert stream is not None
    return [name.removesuffix(_BASE) for name in stream.writers]


@torch.no_grad()
def start_added(
    scorer: Scorer,
    train: Sequence[Example],
    validation: Sequence[Example],
    batch_size: int,
    share: float,
    spared: Inside = nullcontext,
    or_base: bool = False,
) -> Started:
    """Put the probe into the LoRA of the maps that write to the stream.

    Args:
        scorer: of a model with LoRA that adds nothing yet, of which `added_hindrance` knows nothing.
        train: rows to fit on.
        validation: rows to choose by.
        batch_size: rows a forward.
        share: of the layers, the last ones: these are probed and written to.
        spared: as for `start_head`; all rows are run again and again.
        or_base: leave the model as it is where that is better in validation (`stays`), not only where no round was better.

    Returns:
        What was made: `rows` are what `lowrank.put` takes, none where the model stays as it is.
    """
    stream = stream_of(scorer, train[0], share)
    assert stream is not None
    norm = find_norm(*everywhere(scorer, stream, train[0]))
    assert norm is not None
    places = lora_layers(scorer.model)
    writers = {
        name.removesuffix(_BASE): module
        for name, module in stream.writers.items()
        if name.removesuffix(_BASE) in places
    }
    own = own_head(scorer)

    def look(rows: Sequence[Example]) -> Features:
        with spared():
            return hidden_states(scorer, rows, batch_size, list(writers.values()), stream.layers)

    seen, chosen = look(train), look(validation)
    forwards = seen.forwards + chosen.forwards
    before, answers = own.scores(chosen.features), chosen.answers
    to = spoken(stream, norm, seen, own.weight)
    mix = _mix(len(scorer.labels))
    what = [torch.zeros(mix.shape[1], x.shape[1]) for x in seen.inputs]
    entering, least, probe = seen.inputs, own.judged(*chosen.pair)[1], own
    aims, part = what, 0.0
    for left in reversed(range(ROUNDS)):
        if not part:  # the last round was one for the better
            aims, c, converged = _fit(norm, own, mix, what, seen, chosen)
            part = 1.0
        tried = [v + part * (aim - v) for v, aim in zip(what, aims, strict=True)]
        with writing_too(writers, to, dict(zip(writers, tried, strict=True))):
            found = look(validation)
            forwards += found.forwards
            loss = own.judged(*found.pair)[1]
            if not loss < least:
                part *= 0.5
                continue
            what, chosen, least, part = tried, found, loss, 0.0
            probe = replace(own, c=c, converged=converged)
            if left:
                seen = look(train)
                forwards += seen.forwards
    after = own.scores(chosen.features)
    right = float((after.argmax(dim=1) == answers).double().mean())
    if probe is own or (or_base and stays(before, after, answers)):
        right = float((before.argmax(dim=1) == answers).double().mean())
        return Started(own, right, forwards, {}, kept=True)
    tensors: dict[str, Tensor] = {}
    for name, v, x in zip(writers, what, entering, strict=True):
        tensors[f"a.{name}"], tensors[f"b.{name}"] = ranks_of(places[name], v, to, x)
    put(scorer.model, tensors)
    return Started(probe, right, forwards, tensors)


def _mix(labels: int) -> Tensor:
    """[labels, J]: what a signal says of each label."""
    if labels == 2:
        return torch.tensor([[-0.5], [0.5]], dtype=torch.float64)
    return torch.eye(labels, dtype=torch.float64)


@torch.no_grad()
def spoken(stream: Stream, norm: Norm, seen: Features, head: Tensor) -> Tensor:
    """[hidden, J]: the directions that the head reads as its label words, one each (of two, the one between them), and of those
    the ones where the stream holds least and the upper layers read least.

    Args:
        stream, norm, seen: as for `loudness`.
        head: [labels, hidden] float64, its rows of the label words.
    """
    read = (head - head.mean(dim=0)) * norm.scale.double().cpu()
    if norm.centred:
        read = read - read.mean(dim=1, keepdim=True)
    wanted = torch.eye(len(read), dtype=torch.float64) - 1.0 / len(read)
    if len(read) == 2:
        read, wanted = read[1:] - read[:1], torch.ones(1, 1, dtype=torch.float64)
    loud = loudness(stream, norm, seen, READ)
    loud += 1e-6 * loud.trace() / len(loud) * torch.eye(len(loud), dtype=torch.float64)
    quiet = torch.linalg.solve(loud, read.T)
    found: Tensor = quiet @ torch.linalg.pinv(read @ quiet) @ wanted
    return found.float().contiguous()


def _fit(
    norm: Norm, own: Probe, mix: Tensor, what: Sequence[Tensor], seen: Features, chosen: Features
) -> tuple[list[Tensor], float, bool]:
    """The function anew, where the model has been seen with `what`; its penalty, and whether the fit converged.

    Scores are what the model says without it, and it: least sum of losses and |weight|^2 / 2c, on features of size 1.
    """
    sizes, others = norm.sizes(seen.outputs[-1]), norm.sizes(chosen.outputs[-1])
    usual = sizes.mean()
    scales = [
        (x * (usual / sizes)).square().mean(0).sqrt().clamp_min(1e-12)
        * (x.shape[1] * len(what)) ** 0.5
        for x in seen.inputs
    ]
    gram = torch.zeros(len(seen.answers), len(seen.answers), dtype=torch.float64)
    cross = torch.zeros(len(chosen.answers), len(seen.answers), dtype=torch.float64)
    for x, y, scale in zip(seen.inputs, chosen.inputs, scales, strict=True):
        scaled = (x * (usual / sizes) / scale).double()
        gram += scaled @ scaled.T
        cross += (y * (usual / others) / scale).double() @ scaled.T
    values, vectors = torch.linalg.eigh(gram)
    kept = values > 1e-10 * values[-1]
    basis = vectors[:, kept] / values[kept].sqrt()
    x, y = gram @ basis, cross @ basis
    had, had_chosen = _signal(seen, what, sizes), _signal(chosen, what, others)
    without = own.scores(seen.features) - had @ mix.T
    without_chosen = own.scores(chosen.features) - had_chosen @ mix.T
    weight = (basis.T @ had).T
    found: list[tuple[float, Tensor, float, bool]] = []
    for c in GRID:
        weight, converged = _regression(x, without, seen.answers, mix, c, weight)
        scores = (without_chosen + (y @ weight.T) @ mix.T).log_softmax(-1)
        loss = -float(scores.gather(1, chosen.answers[:, None]).mean())
        found.append((loss, weight, c, converged))
        if len(found) - 1 - min(range(len(found)), key=lambda i: found[i][0]) >= WORSE:
            break
    _, weight, c, converged = min(found, key=lambda f: f[0])
    by_row = weight @ basis.T  # [J, N]
    return (
        [
            ((by_row @ (x * (usual / sizes) / scale).double()) / scale).float() * usual
            for x, scale in zip(seen.inputs, scales, strict=True)
        ],
        c,
        converged,
    )


def _signal(seen: Features, what: Sequence[Tensor], sizes: Tensor) -> Tensor:
    """[N, J]: what is written, as the head is given it."""
    parts = [x @ v.T for x, v in zip(seen.inputs, what, strict=True)]
    return (torch.stack(parts).sum(0) / sizes).double()


def _regression(
    x: Tensor, beside: Tensor, answers: Tensor, mix: Tensor, c: float, begun: Tensor
) -> tuple[Tensor, bool]:
    """[J, K]: the logistic regression of features x [N, K] beside scores [N, labels], from `begun`."""
    from scipy.optimize import minimize

    right = torch.nn.functional.one_hot(answers, beside.shape[1]).double()

    def loss(flat: Any) -> tuple[float, Any]:
        weight = torch.from_numpy(flat).view(begun.shape)
        scores = (beside + (x @ weight.T) @ mix.T).log_softmax(-1)
        value = -(scores * right).sum() + weight.square().sum() / (2 * c)
        slope = ((scores.exp() - right) @ mix).T @ x + weight / c
        return float(value), slope.reshape(-1).numpy()

    start = begun.reshape(-1).numpy().copy()
    found = minimize(
        loss, start, jac=True, method="L-BFGS-B", options={"maxiter": ITERATIONS, "gtol": 1e-4}
    )
    return torch.from_numpy(found.x).view(begun.shape), bool(found.success)
