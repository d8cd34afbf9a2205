"""Curvature of a loss where the parameters stand: gradients, Hessian-vector products, trace, eigenvalues.

For measuring only (`rank`): nothing in here is needed to tune a model, and it takes the memory of
backpropagation. Vectors are flat, float32 [d], the parameters one after the other.

    H v      by differentiating <gradient, v> once more; exact up to rounding (Pearlmutter, 1994)
    spectrum Lanczos with full reorthogonalisation (Golub and Van Loan, Matrix Computations, section 10.3)
    tr(H)    exact on the space of Lanczos, which holds the large eigenvalues; E[z^T H z] over Rademacher z
             (Hutchinson, 1990) on what is orthogonal to it: the division of Hutch++ (arXiv 2010.09649)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean, stdev

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from justforward import noise
from justforward.errors import UserError

_PIECE = 1 << 20  # elements that are converted to float64 at a time
# A remainder this far below the matrix is rounding of the products in float32: the space is used up.
_EXHAUSTED = 1e-6


def dot(a: Tensor, b: Tensor) -> float:
    """<a, b> of two flat float32 vectors, summed in float64."""
    pieces = zip(torch.split(a, _PIECE), torch.split(b, _PIECE), strict=True)
    return math.fsum(float(torch.dot(x.double(), y.double())) for x, y in pieces)


@dataclass(frozen=True)
class Estimate:
    """A mean of independent samples and its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Estimate:
        """Of at least two samples."""
        return cls(fmean(samples), stdev(samples) / math.sqrt(len(samples)))


class Objective:
    """L(theta) = mean of the losses of N rows, as a function of some parameters, with two derivatives.

    Args:
        tensors: the parameters, each once; d elements together.
        losses: row indices to their losses, [len], as a function of the parameters.
        rows: N.
        at_once: of how many rows the graph of a derivative is held; memory grows with it, values do not change
            but for rounding.

    Raises:
        UserError: there is no parameter.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        losses: Callable[[Sequence[int]], Tensor],
        rows: int,
        at_once: int,
    ) -> None:
        if not tensors:
            raise UserError("there is nothing to differentiate by: no parameter has requires_grad")
        self.tensors = list(tensors)
        self.losses = losses
        self.rows = rows
        self.at_once = at_once
        self.size = sum(t.numel() for t in self.tensors)

    # ------------------------------------------------------------------------------------- no derivative

    @torch.no_grad()
    def value(self, rows: Sequence[int] | None = None) -> float:
        """Mean loss of these rows (default all), summed in float64."""
        chosen = range(self.rows) if rows is None else rows
        parts = [float(self.losses(part).double().sum()) for part in self._parts(chosen)]
        return math.fsum(parts) / len(chosen)

    # ------------------------------------------------------------------------------------ one derivative

    def gradient(self, weights: Sequence[float] | None = None) -> Tensor:
        """[d]: gradient of sum_i weights[i] loss_i; by default of the mean."""
        if weights is None:
            weights = [1.0 / self.rows] * self.rows
        total = self._zeros()
        for part in self._parts(range(self.rows)):
            with _differentiable():
                loss = self._weighted(part, [weights[i] for i in part])
                total += self._flat(self._grads(loss, create_graph=False))
        return total

    def row_squares(self) -> list[float]:
        """|gradient of loss_i|^2 of every row, one backward pass each."""
        squares = []
        for row in range(self.rows):
            with _differentiable():
                g = self._flat(self._grads(self._weighted([row], [1.0]), create_graph=False))
            squares.append(dot(g, g))
        return squares

    # ----------------------------------------------------------------------------------- two derivatives

    def product(self, v: Tensor) -> Tensor:
        """[d]: H v for the Hessian H of the mean loss."""
        total = self._zeros()
        for part in self._parts(range(self.rows)):
            total += self._times(self._graph(part), v)
        return total

    def forms(self, vector: Callable[[int], Tensor], count: int) -> list[float]:
        """v^T H v of `count` vectors, which are made one at a time (`vector(i)` must give the same each time).

        Cheaper than as many products: the first derivative is shared.
        """
        found = [0.0] * count
        for part in self._parts(range(self.rows)):
            grads = self._graph(part)
            for i in range(count):
                v = vector(i)
                found[i] += dot(v, self._times(grads, v))
            del grads  # before the next graph is built
        return found

    def trace_samples(self, probes: int, seed: int, known: Krylov | None = None) -> list[float]:
        """Independent samples whose mean is tr(H): z^T H z for Rademacher z keyed by (seed, probe).

        Args:
            probes: how many.
            seed: of the probes; those of a Lanczos start must be others.
            known: a space whose share of the trace is taken as it is; z is projected away from it.
        """

        def probe(i: int) -> Tensor:
            key = noise.direction_seed(seed, i, 0)
            parts = [noise.rademacher(key, s, 0, t.numel()) for s, t in enumerate(self.tensors)]
            z = torch.cat(parts).to(self.tensors[0].device)
            return z if known is None else _without(z, known.basis)

        share = 0.0 if known is None else known.trace
        return [share + form for form in self.forms(probe, probes)]

    # ------------------------------------------------------------------------------------------- within

    def _parts(self, rows: Sequence[int]) -> Iterator[Sequence[int]]:
        return (rows[i : i + self.at_once] for i in range(0, len(rows), self.at_once))

    def _zeros(self) -> Tensor:
        return torch.zeros(self.size, device=self.tensors[0].device)

    def _flat(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.reshape(-1) for part in parts])

    def _weighted(self, rows: Sequence[int], weights: Sequence[float]) -> Tensor:
        losses = self.losses(rows)
        if not losses.requires_grad:
            raise UserError(
                "the loss has no gradient: it does not depend on the tuned parameters by operations that "
                "can be differentiated: choose others with --tune"
            )
        return losses @ torch.tensor(weights, dtype=losses.dtype, device=losses.device)

    def _grads(self, loss: Tensor, *, create_graph: bool) -> tuple[Tensor, ...]:
        # a parameter that the loss does not see has derivative zero
        return torch.autograd.grad(
            loss, self.tensors, create_graph=create_graph, materialize_grads=True
        )

    def _graph(self, part: Sequence[int]) -> tuple[Tensor, ...]:
        """What some rows contribute to the gradient, itself differentiable."""
        with _differentiable():
            loss = self._weighted(part, [1.0 / self.rows] * len(part))
            return self._grads(loss, create_graph=True)

    def _times(self, grads: tuple[Tensor, ...], v: Tensor) -> Tensor:
        pieces = torch.split(v, [t.numel() for t in self.tensors])
        # where the loss is linear in a parameter and nothing else, its gradient is a constant
        pairs = [(g, p.view_as(g)) for g, p in zip(grads, pieces, strict=True) if g.requires_grad]
        if not pairs:
            return self._zeros()
        outputs, directions = zip(*pairs, strict=True)
        try:
            parts = torch.autograd.grad(
                outputs, self.tensors, directions, retain_graph=True, materialize_grads=True
            )
        except RuntimeError as error:
            said = " ".join(str(error).split())
            raise UserError(f"the model cannot be differentiated twice: {said}") from error
        return self._flat(parts)


@contextmanager
def _differentiable() -> Iterator[None]:
    """Attention written out (softmax and two products): the fused kernels have no second derivative."""
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        yield


# ----------------------------------------------------------------------------------------- eigenvalues


@dataclass(frozen=True)
class Ritz:
    """An approximate eigenvalue: within `bound` of it there is one of the matrix (in exact arithmetic)."""

    value: float
    bound: float


@dataclass(frozen=True)
class Krylov:
    """What Lanczos has found.

    Attributes:
        ritz: Ritz values from the largest down; the extreme ones converge first.
        basis: [steps, d], orthonormal rows.
        trace: of the matrix on the space that they span.
    """

    ritz: list[Ritz]
    basis: Tensor
    trace: float


def lanczos(product: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> Krylov:
    """Approximate eigenvalues of a symmetric matrix.

    Args:
        product: v [d] -> H v [d].
        start: [d], not zero; eigenvectors that are orthogonal to it are not found.
        steps: products, and float32 vectors [d] that are kept; fewer are made once the space that H makes
            of `start` is used up, and then the Ritz values are eigenvalues within rounding.
    """
    steps = min(steps, start.numel())
    basis = torch.empty(steps, start.numel(), device=start.device)
    basis[0] = start / math.sqrt(dot(start, start))
    diagonal: list[float] = []
    beside: list[float] = []
    for j in range(steps):
        w = product(basis[j])
        size = math.sqrt(dot(w, w))
        diagonal.append(dot(basis[j], w))
        w = _without(w, basis[: j + 1])
        beside.append(math.sqrt(dot(w, w)))
        if j + 1 == steps or beside[-1] <= _EXHAUSTED * max(size, *map(abs, diagonal)):
            break
        basis[j + 1] = w / beside[-1]
    inner = torch.tensor(beside[:-1], dtype=torch.float64)
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    matrix += torch.diag(inner, 1) + torch.diag(inner, -1)
    values, vectors = torch.linalg.eigh(matrix)
    bounds = beside[-1] * vectors[-1].abs()
    ritz = [Ritz(*pair) for pair in zip(values.tolist(), bounds.tolist(), strict=True)]
    return Krylov(ritz[::-1], basis[: len(diagonal)], math.fsum(diagonal))


def _without(v: Tensor, basis: Tensor) -> Tensor:
    """v with its part in the span of orthonormal rows taken out; twice, for rounding leaves some (Parlett)."""
    for _ in range(2):
        v = v - basis.T @ (basis @ v)
    return v
