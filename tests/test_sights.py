"""Parts of a step: any division among workers comes to the same step, and what is sent arrives whole or is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from justforward import MeZO, NonFiniteLoss, Sight, UserError, fingerprint
from justforward.sights import MOST_ROWS, put_together

ROWS = 6


def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, 5, generator=generator)
    return {"x": x, "y": x.argmax(1) % 3}


def losses(net: nn.Module) -> Any:
    """One loss a row."""
    return lambda rows: F.cross_entropy(net(rows["x"]), rows["y"], reduction="none")


def alone(net: nn.Module) -> Any:
    """The same, each row computed by itself: it has the same bits in any company."""
    one = losses(net)
    return lambda rows: torch.cat(
        [one({"x": x[None], "y": y[None]}) for x, y in zip(rows["x"], rows["y"], strict=True)]
    )


def some(rows: list[int]) -> dict[str, Tensor]:
    return {name: value[rows] for name, value in batch().items()}


VARIANTS: list[dict[str, Any]] = [
    {"rule": "sgd"},
    {"rule": "rms+clip(1)", "num_samples": 2},
    {"rule": "adam(window=3)", "num_samples": 2, "looks": "one-sided"},
    {"rule": "rms", "estimator": "activation"},
    {"rule": "sgd+momentum(0.9, window=2)", "estimator": "activation", "num_samples": 2},
    {"rule": "sgd", "estimator": "activation", "looks": "one-sided", "family": "rademacher"},
]
IDS = [" ".join(str(value) for value in variant.values()) for variant in VARIANTS]


def optimizer(variant: dict[str, Any]) -> tuple[MeZO, Any]:
    net = model()
    return MeZO(net, lr=1e-2, eps=1e-3, seed=3, **variant), losses(net)


def run(variant: dict[str, Any], division: list[list[int]], steps: int = 2) -> str:
    """Every step by so many workers, each with its rows; in activation space one after the other, for their bits."""
    opt, loss = optimizer(variant)
    assert opt.model is not None
    if opt.estimator == "weight":
        loss = alone(opt.model)
    else:
        division = [[row] for rows in division for row in rows]
    for _ in range(steps):
        sights = [opt.look(loss, some(rows), rows=rows, of=ROWS) for rows in division if rows]
        opt.apply(opt.combine(sights, of=ROWS))
    return fingerprint(opt.model)


@st.composite
def divisions(draw: Any) -> list[list[int]]:
    rows = draw(st.permutations(range(ROWS)))
    cuts = sorted(draw(st.lists(st.integers(0, ROWS), max_size=4)))
    return [list(rows[a:b]) for a, b in pairwise([0, *cuts, ROWS])]


@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
@settings(max_examples=5, deadline=None)
@given(division=divisions())
def test_any_division_of_the_rows_comes_to_the_same_weights(
    variant: dict[str, Any], division: list[list[int]]
) -> None:
    assert run(variant, division) == run(variant, [list(range(ROWS))])


@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
def test_one_worker_does_what_a_step_does(variant: dict[str, Any]) -> None:
    opt, loss = optimizer(variant)
    if opt.estimator == "weight":
        plain = opt.estimate(lambda: loss(batch()))
    else:
        plain = opt.estimate(loss, batch())
    shared = opt.combine([opt.look(loss, batch(), rows=range(ROWS), of=ROWS)], of=ROWS)
    assert shared.forwards == plain.forwards
    assert shared.loss == pytest.approx(plain.loss, rel=1e-6)
    assert shared.projected_grads == pytest.approx(plain.projected_grads, rel=1e-3, abs=1e-4)
    assert shared.coefficients == pytest.approx(plain.coefficients, rel=1e-3, abs=1e-6)
    assert shared.scales == plain.scales
    assert shared.rates == plain.rates


@pytest.mark.parametrize("variant", [VARIANTS[1], VARIANTS[4]], ids=[IDS[1], IDS[4]])
def test_samples_are_shared_among_workers_like_rows(variant: dict[str, Any]) -> None:
    opt, loss = optimizer(variant)
    rows = range(ROWS)
    whole = opt.combine([opt.look(loss, batch(), rows=rows, of=ROWS)], of=ROWS)
    parts = [opt.look(loss, batch(), rows=rows, of=ROWS, samples=[s]) for s in (1, 0)]
    step = opt.combine(parts, of=ROWS)
    assert step.forwards == whole.forwards
    if opt.estimator == "weight":
        assert step.coefficients == whole.coefficients
    else:  # the samples were rows of one batch, whose products round otherwise
        assert step.coefficients == pytest.approx(whole.coefficients, rel=1e-2, abs=1e-6)


def test_looking_leaves_the_weights_alone() -> None:
    for variant in VARIANTS:
        opt, loss = optimizer(variant)
        assert opt.model is not None
        before = fingerprint(opt.model)
        opt.look(loss, some([1, 2]), rows=[1, 2], of=ROWS)

        def fails(rows: Any) -> Tensor:
            raise RuntimeError("no")

        with pytest.raises(RuntimeError, match="no"):
            opt.look(fails, some([1, 2]), rows=[1, 2], of=ROWS)
        assert fingerprint(opt.model) == before


@pytest.mark.parametrize("estimator", ["weight", "activation"])
def test_rows_that_nobody_saw_are_left_out_of_the_mean(estimator: str) -> None:
    opt, loss = optimizer({"estimator": estimator, "rule": "sgd"})
    seen = [opt.look(loss, some([row]), rows=[row], of=ROWS) for row in (4, 1)]
    step = opt.combine(seen, of=ROWS)
    rises = {sight.rows[0]: sight.rises[0][0] / 1e-3 for sight in seen}
    if estimator == "weight":
        assert step.coefficients == pytest.approx([-1e-2 * (rises[1] + rises[4]) / 2], rel=1e-5)
    else:
        expected = [0.0] * ROWS
        expected[1], expected[4] = -1e-2 * rises[1] / 2, -1e-2 * rises[4] / 2
        assert step.coefficients == pytest.approx(expected, rel=1e-5)


def test_one_number_counts_for_each_of_its_rows() -> None:
    opt, loss = optimizer({"rule": "sgd"})
    parts = [
        opt.look(lambda rows: loss(rows).mean(), some(rows), rows=rows, of=ROWS)
        for rows in ([0, 1, 2, 3], [4, 5])
    ]
    whole = opt.combine([opt.look(loss, batch(), rows=range(ROWS), of=ROWS)], of=ROWS)
    assert opt.combine(parts, of=ROWS).coefficients == pytest.approx(whole.coefficients, rel=1e-3)


def test_a_row_without_a_finite_loss_is_named_by_its_place_in_the_step() -> None:
    opt, loss = optimizer({"rule": "sgd"})

    def broken(rows: dict[str, Tensor]) -> Tensor:
        found = loss(rows)
        found[1] = math.nan
        return found

    with pytest.raises(NonFiniteLoss, match=r"the loss is nan at \+eps in row 5"):
        opt.look(broken, some([2, 5]), rows=[2, 5], of=ROWS)


# ------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"rows": [], "of": 6}, "there are no rows"),
        ({"rows": [6], "of": 6}, "rows: 6 is not one of the step's 6"),
        ({"rows": [1, 1], "of": 6}, r"rows \[1, 1\]: one is there twice"),
        ({"rows": [0, 1], "of": 6, "samples": [1]}, "samples: 1 is not one of the step's 1"),
        ({"rows": [0, 1], "of": 6, "samples": []}, "there are no samples"),
        ({"rows": [0, 1, 2], "of": 6}, "one loss for each of its 3 rows"),
    ],
)
def test_places_that_a_step_has_not(arguments: dict[str, Any], said: str) -> None:
    opt, loss = optimizer({"rule": "sgd"})
    with pytest.raises(UserError, match=said):
        opt.look(loss, some([0, 1]), **arguments)


def test_places_of_rows_that_the_closure_has_not() -> None:
    opt, loss = optimizer({"estimator": "activation"})
    with pytest.raises(UserError, match="the closure has 2 rows, and the places of 3 were given"):
        opt.look(loss, some([0, 1]), rows=[0, 1, 2], of=6)


def test_estimates_that_workers_cannot_share() -> None:
    opt, loss = optimizer({"looks": "one-point"})
    with pytest.raises(UserError, match="cannot be shared by workers"):
        opt.look(loss, batch(), rows=range(ROWS), of=ROWS)


SIGHT = Sight(7, (0, 1), (2, 4), ((0.5, -1.5), (0.25, 3.0)), 1.25, 4)


def test_sights_that_do_not_belong_together() -> None:
    assert put_together([SIGHT, SIGHT], 7, 2, 6) == put_together([SIGHT], 7, 2, 6)
    with pytest.raises(UserError, match="there are no sights of step 7"):
        put_together([], 7, 2, 6)
    with pytest.raises(UserError, match="a sight is of step 7: the next step is 8"):
        put_together([SIGHT], 8, 2, 6)
    with pytest.raises(UserError, match="samples: 1 is not one of the step's 1"):
        put_together([SIGHT], 7, 1, 6)
    with pytest.raises(UserError, match="rows: 4 is not one of the step's 4"):
        put_together([SIGHT], 7, 2, 4)
    other = replace(SIGHT, rises=((0.5, -1.5), (0.25, 2.0)))
    with pytest.raises(UserError, match="differ in row 4, sample 1"):
        put_together([SIGHT, other], 7, 2, 6)


# -------------------------------------------------------------------------------------------- sending

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def sights(draw: Any) -> Sight:
    samples, rows = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    start, apart = draw(st.integers(0, 100)), draw(st.integers(1, 50))
    rises = [[draw(finite) for _ in range(rows)] for _ in range(samples)]
    return Sight(
        step=draw(st.integers(0, 2**64 - 1)),
        samples=tuple(range(samples)),
        rows=tuple(start + apart * i for i in range(rows)),
        rises=tuple(map(tuple, rises)),
        loss=draw(finite),
        forwards=draw(st.integers(0, 2**32 - 1)),
    )


@given(sights())
def test_what_is_sent_arrives(sight: Sight) -> None:
    raw = sight.pack()
    assert Sight.unpack(raw) == sight
    assert len(raw) == 39 + 4 * len(sight.samples) * len(sight.rows)


@given(sights(), st.data())
def test_what_was_damaged_on_its_way_is_refused(sight: Sight, data: Any) -> None:
    raw = bytearray(sight.pack())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(UserError, match="a sight of"):
        Sight.unpack(bytes(raw))
    with pytest.raises(UserError, match="a sight of"):
        Sight.unpack(sight.pack()[: data.draw(st.integers(0, len(raw) - 1))])


@given(st.binary(max_size=200))
def test_rubbish_is_refused(raw: bytes) -> None:
    with pytest.raises(UserError, match="a sight of"):
        Sight.unpack(raw)


def test_numbers_that_are_not_finite_and_places_out_of_line_are_not_sent() -> None:
    with pytest.raises(UserError, match="a number that is not finite"):
        Sight.unpack(replace(SIGHT, loss=math.inf).pack())
    with pytest.raises(UserError, match="they must be evenly spaced"):
        replace(SIGHT, rows=(0, 1, 3)).pack()
    assert MOST_ROWS >= 2**16
