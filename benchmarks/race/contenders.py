"""Zeroth-order methods that the package does not have, as slow readable twins: z written out, one flat vector of weights.

Each takes a `Walk` and returns what is subtracted, times the rate, from the weights. `TWINS` is the list; the table in
`tests/test_contenders.py` holds each of them to what it claims. What is counted is example-forwards, so nothing here is fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from justforward.errors import NonFiniteLoss
from justforward.variants import layer_of

EPS = 1e-3


@dataclass(frozen=True)
class Piece:
    """A tensor's place in the flat vector."""

    name: str
    start: int
    shape: tuple[int, ...]

    @property
    def place(self) -> slice:
        return slice(self.start, self.start + math.prod(self.shape))


@dataclass
class Walk:
    """A training under way.

    Attributes:
        theta: all weights [d], moved by the race.
        pieces: the tensors in it.
        losses: (weights [d], rows [B]) -> losses [B].
        draw: size -> rows, numbers of training examples.
        inputs: (weights, rows) -> what enters each matrix, [tokens, columns] by the piece's name.
        generator: of the directions.
        size: rows of a batch.
        done: share of the budget that is used.
        step: number of the step.
        used: example-forwards so far.
        shown: weights to be scored in place of theta.
        kept: what a method keeps from step to step.
    """

    theta: Tensor
    pieces: list[Piece]
    losses: Callable[[Tensor, Tensor], Tensor]
    draw: Callable[[int], Tensor]
    inputs: Callable[[Tensor, Tensor], dict[str, Tensor]] | None = None
    generator: torch.Generator = field(default_factory=torch.Generator)
    size: int = 16
    done: float = 0.0
    step: int = 0
    used: int = 0
    shown: Tensor | None = None
    kept: dict[str, Any] = field(default_factory=dict)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal; without a shape one for every weight."""
        return torch.randn(
            shape or self.theta.shape, generator=self.generator, dtype=self.theta.dtype
        )

    def loss(self, at: Tensor, rows: Tensor) -> float:
        """Mean over the rows; counted."""
        self.used += len(rows)
        value = float(self.losses(at, rows).double().mean())
        if not math.isfinite(value):
            raise NonFiniteLoss(self.step, value, "in a look")
        return value

    def slope(self, z: Tensor, rows: Tensor, at: Tensor | None = None) -> float:
        """SPSA's projected gradient: two forwards."""
        at = self.theta if at is None else at
        return (self.loss(at + EPS * z, rows) - self.loss(at - EPS * z, rows)) / (2.0 * EPS)

    def matrices(self) -> Iterator[Piece]:
        """Pieces with two axes, neither of one element."""
        return (p for p in self.pieces if len(p.shape) == 2 and min(p.shape) > 1)

    def due(self, every: int) -> bool:
        """Whether what is kept for so many steps is to be made anew."""
        return self.step % every == 0


def mezo(walk: Walk) -> Tensor:
    """arXiv 2305.17333, Algorithm 1."""
    z = walk.normal()
    return walk.slope(z, walk.draw(walk.size)) * z


def fzoo(walk: Walk, samples: int = 8) -> Tensor:
    """FZOO (arXiv 2506.09034): one-sided looks along Rademacher directions, divided by the spread of their losses."""
    rows = walk.draw(walk.size)
    home = walk.loss(walk.theta, rows)
    signs = [walk.normal().sign_() for _ in range(samples)]
    found = torch.tensor(
        [walk.loss(walk.theta + EPS * u, rows) for u in signs], dtype=torch.float64
    )
    rises = ((found - home) / (samples * found.std().clamp(min=1e-12))).tolist()
    return torch.stack([r * u for r, u in zip(rises, signs, strict=True)]).sum(0)


def leave_one_out(walk: Walk, samples: int = 8) -> Tensor:
    """One look a direction, each compared with the mean of the others (RLOO)."""
    rows = walk.draw(walk.size)
    z = [walk.normal() for _ in range(samples)]
    found = torch.tensor(
        [walk.loss(walk.theta + EPS * one, rows) for one in z], dtype=torch.float64
    )
    # x - mean of the others = n / (n - 1) (x - mean of all)
    rises = ((found - found.mean()) * samples / (samples - 1)).tolist()
    return torch.stack([r / (EPS * samples) * one for r, one in zip(rises, z, strict=True)]).sum(0)


def centred(walk: Walk, samples: int = 8) -> Tensor:
    """FZOO without its look at the weights themselves: losses less their mean, over their spread."""
    rows = walk.draw(walk.size)
    signs = [walk.normal().sign_() for _ in range(samples)]
    found = torch.tensor(
        [walk.loss(walk.theta + EPS * u, rows) for u in signs], dtype=torch.float64
    )
    rises = ((found - found.mean()) / (samples * found.std().clamp(min=1e-12))).tolist()
    return torch.stack([r * u for r, u in zip(rises, signs, strict=True)]).sum(0)


def orthogonal(walk: Walk, samples: int = 4) -> Tensor:
    """Directions at right angles to each other, of the length that normal ones have."""
    rows = walk.draw(walk.size)
    q = torch.linalg.qr(walk.normal(len(walk.theta), samples))[0].T * math.sqrt(len(walk.theta))
    return torch.stack([walk.slope(z, rows) * z for z in q]).mean(0)


def lozo(walk: Walk, rank: int = 2, every: int = 50) -> Tensor:
    """LOZO (arXiv 2410.07698): z = U V^T / sqrt(rank), V kept for some steps."""
    if walk.due(every):
        walk.kept["v"] = {p.name: walk.normal(p.shape[1], rank) for p in walk.matrices()}
    z = walk.normal()
    for p in walk.matrices():
        low = walk.normal(p.shape[0], rank) @ walk.kept["v"][p.name].T
        z[p.place] = (low / math.sqrt(rank)).flatten()
    return walk.slope(z, walk.draw(walk.size)) * z


def subzero(walk: Walk, rank: int = 4, every: int = 50) -> Tensor:
    """SubZero (arXiv 2410.08989): z = P C Q^T with orthonormal P and Q kept for some steps, C fresh; unit variance."""
    if walk.due(every):
        walk.kept["pq"] = {
            p.name: tuple(
                torch.linalg.qr(walk.normal(n, min(rank, *p.shape)))[0] * math.sqrt(n)
                for n in p.shape
            )
            for p in walk.matrices()
        }
    z = walk.normal()
    for p in walk.matrices():
        left, right = walk.kept["pq"][p.name]
        r = left.shape[1]
        z[p.place] = (left @ walk.normal(r, r) @ right.T / r).flatten()
    return walk.slope(z, walk.draw(walk.size)) * z


def muon(walk: Walk, rank: int = 8, every: int = 50, samples: int = 4, beta: float = 0.9) -> Tensor:
    """ZO-Muon: several directions in a kept subspace of columns, their estimate averaged over steps, all its singular
    values made equal; moves of unit rms."""
    if walk.due(every):
        walk.kept["q"] = {
            p.name: torch.linalg.qr(walk.normal(p.shape[1], min(rank, *p.shape)))[0]
            for p in walk.matrices()
        }
        walk.kept["m"] = torch.zeros_like(walk.theta)
    rows, estimate = walk.draw(walk.size), torch.zeros_like(walk.theta)
    for _ in range(samples):
        z = walk.normal()
        for p in walk.matrices():
            q = walk.kept["q"][p.name]
            core = walk.normal(p.shape[0], q.shape[1])
            z[p.place] = (core @ q.T * math.sqrt(p.shape[1] / q.shape[1])).flatten()
        estimate += walk.slope(z, rows) * z / samples
    m = walk.kept["m"] = beta * walk.kept["m"] + (1.0 - beta) * estimate
    out = m.clone()
    spectral = {p.name for p in walk.matrices()}
    for p in walk.pieces:
        part = m[p.place].view(p.shape)
        if p.name in spectral:
            q = walk.kept["q"][p.name]
            u, _, v = torch.linalg.svd(part @ q, full_matrices=False)
            part = u @ v @ q.T
        out[p.place] = (part / part.square().mean().sqrt().clamp(min=1e-20)).flatten()
    return out


def hizoo(walk: Walk, smooth: float = 1e-3) -> Tensor:
    """HiZOO (arXiv 2402.15173): a running diagonal of the curvature from a third forward; looks and moves are shorter
    where it is large."""
    rows, u = walk.draw(walk.size), walk.normal()
    h = walk.kept.setdefault("h", torch.ones_like(walk.theta))
    z = u / h.sqrt()
    home = walk.loss(walk.theta, rows)
    ahead, behind = walk.loss(walk.theta + EPS * z, rows), walk.loss(walk.theta - EPS * z, rows)
    bend = abs(ahead + behind - 2.0 * home) / (2.0 * EPS**2)
    walk.kept["h"] = (1.0 - smooth) * h + smooth * bend * h * u.square()
    return (ahead - behind) / (2.0 * EPS) * z


def svrg(walk: Walk, every: int = 20, large: int = 8) -> Tensor:
    """MeZO-SVRG (arXiv 2404.08080): what a batch says here less what it said at an anchor along the same direction, and
    what a large batch said there."""
    if walk.due(every):
        z = walk.normal()
        many = walk.draw(large * walk.size)
        walk.kept["anchor"] = walk.theta.clone()
        walk.kept["all"] = walk.slope(z, many) * z
    rows, z = walk.draw(walk.size), walk.normal()
    change = walk.slope(z, rows) - walk.slope(z, rows, walk.kept["anchor"])
    all_rows: Tensor = walk.kept["all"]
    return change * z + all_rows


def sparse(walk: Walk, share: float = 0.25) -> Tensor:
    """Sparse-MeZO (arXiv 2402.15751): only the smallest weights of each tensor look and move."""
    z = walk.normal()
    for p in walk.pieces:
        sizes = walk.theta[p.place].abs()
        limit = sizes.kthvalue(max(1, round(share * len(sizes)))).values
        z[p.place] *= sizes <= limit
    return walk.slope(z, walk.draw(walk.size)) * z


def layer_bandit(walk: Walk, beta: float = 0.9) -> Tensor:
    """AdaLeZO: one layer a step, drawn by how steep it has been, weighted by the inverse of its chance."""
    layers = list(dict.fromkeys(layer_of(p.name) for p in walk.pieces))
    steep = walk.kept.setdefault("steep", torch.ones(len(layers), dtype=torch.float64))
    chances = 0.5 * steep / steep.sum().clamp(min=1e-30) + 0.5 / len(layers)
    chances /= chances.sum()  # where nothing has been steep yet
    at = int(torch.multinomial(chances, 1, generator=walk.generator))
    z = walk.normal()
    for p in walk.pieces:
        if layer_of(p.name) != layers[at]:
            z[p.place] = 0.0
    grad = walk.slope(z, walk.draw(walk.size))
    first = walk.step == 0
    steep[:] = steep * abs(grad) if first else steep  # all as steep as the first one seen
    steep[at] = beta * steep[at] + (1.0 - beta) * abs(grad)
    return grad / float(chances[at]) * z


def activations(walk: Walk, rank: int = 8) -> Tensor:
    """AGZO: matrices look only along what the batch puts in (gradients of a matrix lie in the span of its inputs)."""
    assert walk.inputs is not None
    rows, z = walk.draw(walk.size), walk.normal()
    seen = walk.inputs(walk.theta, rows)
    walk.used += len(rows)
    for p in walk.matrices():
        if p.name in seen:
            _, sizes, v = torch.linalg.svd(seen[p.name], full_matrices=False)
            v = v[: min(rank, int((sizes > 1e-6 * sizes[0]).sum()))]
            r = v.shape[0]
            z[p.place] = (walk.normal(p.shape[0], r) @ v * math.sqrt(p.shape[1] / r)).flatten()
    return walk.slope(z, rows) * z


def scaled(walk: Walk, floor: float = 0.1) -> Tensor:
    """Each tensor looks and moves in proportion to the rms of its weights (of all, at least a tenth of the largest)."""
    sizes = [float(walk.theta[p.place].square().mean().sqrt()) for p in walk.pieces]
    z, largest = walk.normal(), max(sizes)
    for p, size in zip(walk.pieces, sizes, strict=True):
        z[p.place] *= max(size / largest, floor)
    return walk.slope(z, walk.draw(walk.size)) * z


def per_example(walk: Walk, rank: int = 0) -> Tensor:
    """A direction of its own for every example, dense (rank 0) or of this rank in matrices; the mean of all."""
    out = torch.zeros_like(walk.theta)
    rows = walk.draw(walk.size)
    for row in rows:
        z = walk.normal()
        for p in walk.matrices() if rank else ():
            low = walk.normal(p.shape[0], rank) @ walk.normal(rank, p.shape[1])
            z[p.place] = (low / math.sqrt(rank)).flatten()
        out += walk.slope(z, row[None]) * z / len(rows)
    return out


def averaged(walk: Walk, memory: float = 0.25) -> Tensor:
    """MeZO whose weights are scored as their mean over the last quarter of the steps so far (exponential weights)."""
    shown = walk.theta.clone() if walk.shown is None else walk.shown
    walk.shown = shown + (walk.theta - shown) / max(1.0, memory * walk.step)
    return mezo(walk)


def growing(walk: Walk, first: float = 0.25, last: float = 4.0) -> Tensor:
    """Batches grow from a quarter of the size to four times it, as a power of what is used."""
    z = walk.normal()
    rows = walk.draw(max(1, round(walk.size * first * (last / first) ** walk.done)))
    return walk.slope(z, rows) * z


def head_first(walk: Walk, share: float = 0.3) -> Tensor:
    """The head alone for a part of the budget, then everything."""
    z = walk.normal()
    if walk.done < share:
        for p in walk.pieces:
            if not p.name.startswith("head"):
                z[p.place] = 0.0
    return walk.slope(z, walk.draw(walk.size)) * z


def guided(walk: Walk, share: float = 0.5, beta: float = 0.95) -> Tensor:
    """Half of each direction's length lies along the mean of past estimates (as Guided ES has it, arXiv 1806.10230)."""
    past = walk.kept.setdefault("past", torch.zeros_like(walk.theta))
    z = walk.normal()
    if walk.step:
        line = past / past.norm().clamp(min=1e-30)
        along = math.sqrt(share * len(z)) * walk.normal(1)
        z = math.sqrt(1.0 - share) * z + along * line
    out = walk.slope(z, walk.draw(walk.size)) * z
    past.mul_(beta).add_(out, alpha=1.0 - beta)
    return out


@dataclass(frozen=True)
class Twin:
    """A row of the table: the method, its settings, a rate to start the search from, and whether the rate falls."""

    move: Callable[..., Tensor]
    rate: float = 3e-3
    settings: dict[str, Any] = field(default_factory=dict)
    falls: bool = True

    def __call__(self, walk: Walk) -> Tensor:
        return self.move(walk, **self.settings)


TWINS: dict[str, Twin] = {
    "twin-mezo": Twin(mezo),
    "fzoo": Twin(fzoo, 1e-2),
    "fzoo-4": Twin(fzoo, 3e-2, {"samples": 4}),
    "fzoo-16": Twin(fzoo, 1e-1, {"samples": 16}),
    "fzoo-32": Twin(fzoo, 2e-1, {"samples": 32}),
    "centred": Twin(centred, 5.6e-2),
    "centred-16": Twin(centred, 1e-1, {"samples": 16}),
    "leave-one-out": Twin(leave_one_out, 1e-2),
    "orthogonal": Twin(orthogonal, 1e-2),
    "lozo": Twin(lozo),
    "subzero": Twin(subzero),
    "muon": Twin(muon, 3e-3),
    "hizoo": Twin(hizoo),
    "svrg": Twin(svrg, 3e-4),
    "sparse": Twin(sparse),
    "layer-bandit": Twin(layer_bandit),
    "agzo": Twin(activations),
    "scaled": Twin(scaled),
    "per-example": Twin(per_example, 1e-2),
    "per-example-rank-4": Twin(per_example, 1e-2, settings={"rank": 4}),
    "averaged": Twin(averaged, falls=False),
    "growing": Twin(growing),
    "head-first": Twin(head_first),
    "guided": Twin(guided),
}
