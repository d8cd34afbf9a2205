"""The race's contenders on a quadratic: each looks along what it says and comes down; and those with a special case
that is MeZO are MeZO there."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import justforward as jf
from justforward import noise
from justforward.reference import direction

PATH = Path(__file__).parent.parent / "benchmarks" / "race" / "contenders.py"
_spec = importlib.util.spec_from_file_location("contenders", PATH)
assert _spec is not None
assert _spec.loader is not None
contenders: Any = importlib.util.module_from_spec(_spec)
sys.modules["contenders"] = contenders
_spec.loader.exec_module(contenders)
TWINS: dict[str, Any] = contenders.TWINS

SHAPES = {"layers.0.up.weight": (6, 4), "layers.1.up.weight": (4, 6), "head.bias": (3,)}
ROWS = 32


def curves() -> tuple[Tensor, Tensor]:
    """Where each row's quadratic has its least, and how bent it is."""
    generator = torch.Generator().manual_seed(0)
    d = sum(math.prod(s) for s in SHAPES.values())
    middle = torch.randn(d, generator=generator, dtype=torch.float64)
    around = 0.2 * torch.randn(ROWS, d, generator=generator, dtype=torch.float64)
    return middle + around, torch.linspace(0.5, 1.5, d, dtype=torch.float64)


LEAST, BENT = curves()


def losses(at: Tensor, rows: Tensor) -> Tensor:
    """0.5 sum bent (theta - least)^2 of each row."""
    return 0.5 * ((at - LEAST[rows]).square() * BENT).sum(1)


def gradient(at: Tensor) -> Tensor:
    """Of the mean over all rows."""
    return BENT * (at - LEAST.mean(0))


def inputs(at: Tensor, rows: Tensor) -> dict[str, Tensor]:
    """As if two columns only were ever used."""
    seen = torch.zeros(len(rows), 4, dtype=at.dtype)
    seen[:, :2] = LEAST[rows, :2]
    return {"layers.0.up.weight": seen}


def walk(seed: int = 0, start: float = 0.5) -> Any:
    """A walk over whole batches."""
    pieces, at = [], 0
    for name, shape in SHAPES.items():
        pieces.append(contenders.Piece(name, at, shape))
        at += math.prod(shape)
    theta = torch.full((at,), start, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.Generator().manual_seed(seed)

    def draw(size: int) -> Tensor:
        return torch.randperm(ROWS, generator=draws)[: min(size, ROWS)]

    return contenders.Walk(theta, pieces, losses, draw, inputs, generator)


# What suits the quadratic where 0.02 does not: an anchor's one direction must not be followed for long.
RATES = {
    "muon": 0.05,
    "fzoo": 0.03,
    "centred": 0.03,
    "fzoo-4": 0.03,
    "fzoo-16": 0.03,
    "fzoo-32": 0.03,
    "centred-16": 0.03,
    "svrg": 0.01,
    "layer-bandit": 0.01,
}
ALSO: dict[str, dict[str, Any]] = {"svrg": {"every": 2}}


@pytest.mark.parametrize("name", TWINS)
def test_each_comes_down(name: str) -> None:
    here = walk()
    everything = torch.arange(ROWS)
    before = float(losses(here.theta, everything).mean())
    floor = float(losses(LEAST.mean(0), everything).mean())
    rate = RATES.get(name, 0.02)
    twin = TWINS[name]
    for step in range(300):
        here.done, here.step = step / 300, step
        move = twin.move(here, **twin.settings, **ALSO.get(name, {}))
        here.theta = here.theta - rate * (1.0 - here.done) * move
    assert here.used > 0
    shown = here.theta if here.shown is None else here.shown
    after = float(losses(shown, everything).mean())
    assert after - floor < 0.3 * (before - floor), (before, after, floor)


# What the mean of many moves is, in units of the gradient: all of it for those without bias. Others look along a part.
UNBIASED = [
    "twin-mezo", "leave-one-out", "orthogonal", "lozo", "subzero", "layer-bandit", "per-example", "per-example-rank-4", "growing",
]  # fmt: skip


@pytest.mark.parametrize("name", UNBIASED)
def test_the_mean_of_many_moves_is_the_gradient(name: str) -> None:
    here = walk()
    total = torch.zeros_like(here.theta)
    count = 300 if "per-example" in name else 2000
    for _ in range(count):
        here.kept = {}  # at step 0 again, what is kept is drawn anew each time
        total += TWINS[name](here) / count
    right = gradient(here.theta)
    cosine = float(total @ right / (total.norm() * right.norm()))
    assert cosine > 0.9
    assert float(total @ right / right.norm() ** 2) == pytest.approx(1.0, abs=0.15)


def moved(name: str, **settings: Any) -> Tensor:
    """A method's first move."""
    return contenders.TWINS[name].move(walk(), **settings)


# Settings with which a method is MeZO itself.
SPECIAL: dict[str, dict[str, Any]] = {
    "twin-mezo": {},
    "sparse": {"share": 1.0},
    "head-first": {"share": 0.0},
    "growing": {"first": 1.0, "last": 1.0},
    "averaged": {},
    "guided": {},
}


@pytest.mark.parametrize("name", SPECIAL)
def test_the_special_case_is_mezo(name: str) -> None:
    torch.testing.assert_close(moved(name, **SPECIAL[name]), moved("twin-mezo"))


def test_mezo_is_the_packages() -> None:
    """The same move along the package's own z, to what float32 and its grid allow."""

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.full((6, 4), 0.5))

    def loss(at: Tensor) -> Tensor:
        return 0.5 * ((at.double().flatten() - LEAST[0, :24]).square() * BENT[:24]).sum()

    module = Module()
    opt = jf.MeZO(module, lr=1e-2, eps=1e-3, seed=3)
    z = direction([module.weight], noise.direction_seed(3, 0, 0))[0]
    opt.step(lambda: loss(module.weight))
    here = contenders.Walk(
        torch.full((24,), 0.5, dtype=torch.float64),
        [contenders.Piece("weight", 0, (6, 4))],
        lambda at, rows: loss(at)[None],
        lambda size: torch.arange(1),
    )
    here.normal = lambda *shape: z.double().flatten()
    expected = here.theta - 1e-2 * contenders.mezo(here)
    torch.testing.assert_close(
        module.weight.detach().double().flatten(), expected, rtol=1e-4, atol=1e-5
    )


def rank(move: Tensor) -> list[int]:
    """Ranks of the two matrices of a move."""
    return [
        int(torch.linalg.matrix_rank(m)) for m in (move[:24].view(6, 4), move[24:48].view(4, 6))
    ]


def still(name: str, **settings: Any) -> int:
    """How many weights a move leaves alone."""
    return int((moved(name, **settings) == 0).sum())


CLAIMS: dict[str, Callable[[], bool]] = {
    "lozo": lambda: rank(moved("lozo")) == [2, 2],
    "subzero": lambda: rank(moved("subzero", rank=3)) == [3, 3],
    "agzo": lambda: rank(moved("agzo")) == [2, 4] and still("agzo") == 12,
    "sparse": lambda: still("sparse", share=0.5) == 0,  # all weights are equal, so none is above the limit
    "layer-bandit": lambda: still("layer-bandit") in (51 - 24, 48),
    "head-first": lambda: still("head-first") == 48,
    "muon": lambda: bool(
        torch.linalg.svdvals(moved("muon", rank=4)[:24].view(6, 4)).std() < 1e-6
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CLAIMS)
def test_it_looks_where_it_says(name: str) -> None:
    assert CLAIMS[name]()


def test_orthogonal_directions_are_unlike_each_other() -> None:
    """With as many of them as weights the estimate is the gradient itself."""
    here = walk()
    here.size = ROWS
    found = contenders.orthogonal(here, samples=len(here.theta))
    torch.testing.assert_close(found, gradient(here.theta), rtol=1e-6, atol=1e-8)


def test_the_spread_sets_the_length() -> None:
    """Losses that are 10 times as large make the same move."""
    for move in (contenders.fzoo, contenders.centred):
        here, there = walk(), walk()
        there.losses = lambda at, rows: 10.0 * losses(at, rows)
        torch.testing.assert_close(move(here), move(there), rtol=1e-5, atol=1e-7)


def test_svrg_at_its_anchor_is_the_large_batch() -> None:
    here = walk()
    move = contenders.svrg(here)
    torch.testing.assert_close(move, here.kept["all"])


def test_looks_are_counted() -> None:
    counts = {}
    for name, twin in TWINS.items():
        here = walk()
        twin(here)
        counts[name] = here.used
    assert counts["twin-mezo"] == 32  # twice 16
    assert counts["fzoo"] == 9 * 16
    assert counts["centred"] == counts["leave-one-out"] == 8 * 16
    assert counts["orthogonal"] == counts["muon"] == 8 * 16
    assert counts["hizoo"] == counts["agzo"] == 48
    assert counts["per-example"] == 32
    assert counts["svrg"] == 2 * ROWS + 4 * 16
    assert counts["growing"] == 2 * 4
