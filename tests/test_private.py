"""Privacy of a step: what one row can change is bounded, noise is of the right size and secret, nothing else comes out."""

from __future__ import annotations

import math
import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import justforward as jf
from justforward import MeZO, Modified, Private, UserError
from justforward.private import GRID, bounded_sum, whole_gaussian

ROWS = 12
numbers = st.floats(allow_nan=True, allow_infinity=True)


# ------------------------------------------------------------------------------------------ the bound


@st.composite
def neighbours(draw: Any) -> tuple[list[list[float]], list[float], int]:
    samples = draw(st.integers(1, 4))
    row = st.lists(numbers, min_size=samples, max_size=samples)
    return draw(st.lists(row, max_size=5)), draw(row), samples


@given(neighbours(), st.one_of(st.none(), st.floats(1e-30, 1e30)), st.data())
def test_one_row_changes_the_sum_by_no_more_than_the_clip(
    case: tuple[list[list[float]], list[float], int], clip: float | None, data: Any
) -> None:
    rows, one, samples = case
    place = data.draw(st.integers(0, len(rows)))
    without = bounded_sum(rows, samples, clip)
    with_it = bounded_sum([*rows[:place], one, *rows[place:]], samples, clip)
    squares = sum((a - b) ** 2 for a, b in zip(with_it, without, strict=True))  # whole numbers
    assert squares <= GRID**2
    if not all(map(math.isfinite, one)):
        assert with_it == without


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=4), st.floats(1e-3, 1e3))
def test_what_is_shorter_than_the_clip_stays_as_it_is(row: list[float], clip: float) -> None:
    length = math.hypot(*row)
    kept = [part * clip / GRID for part in bounded_sum([row], len(row), clip)]
    scale = min(1.0, clip / length) if length else 1.0
    assert kept == pytest.approx([value * scale for value in row], abs=2.0 * clip / GRID)
    scaled = [part / GRID for part in bounded_sum([row], len(row), None)]
    assert scaled == pytest.approx(
        [value / length if length else 0.0 for value in row], abs=2.0 / GRID
    )


# ------------------------------------------------------------------------------------------ the noise


def test_noise_is_a_rounded_gaussian() -> None:
    from scipy import stats

    drawn = np.array([whole_gaussian(1000.0) for _ in range(4000)])
    assert stats.kstest(drawn / 1000.0, "norm").pvalue > 1e-6
    small = [whole_gaussian(0.5) for _ in range(4000)]
    seen = [small.count(k) for k in (-1, 0, 1)]
    edges = stats.norm.cdf([-3.0, -1.0, 1.0, 3.0])
    assert seen == pytest.approx(4000 * np.diff(edges), abs=6 * math.sqrt(1000))
    assert {type(value) for value in small} == {int}


def test_noise_on_an_answer_has_the_deviation_that_was_asked_for() -> None:
    private = Private(rows=1000, batch_size=10, noise_multiplier=1.5, clip=0.2)
    answers = private._noisy([GRID * 5] * 4000)
    assert np.mean(answers) == pytest.approx(5 * 0.2 / 10, abs=6 * 0.03 / math.sqrt(4000))
    assert np.std(answers) == pytest.approx(1.5 * 0.2 / 10, rel=6 / math.sqrt(2 * 4000))


# ------------------------------------------------------------------------------------------- the rows


def test_rows_are_a_poisson_sample() -> None:
    private = Private(rows=200, batch_size=20, noise_multiplier=1.0)
    counts, times = [], np.zeros(200)
    for _ in range(2000):
        rows = private.draw()
        private._drawn = None
        assert rows == sorted(set(rows))
        counts.append(len(rows))
        times[rows] += 1
    assert np.mean(counts) == pytest.approx(20, abs=6 * math.sqrt(18 / 2000))
    assert np.var(counts) == pytest.approx(18, rel=6 * math.sqrt(2 / 2000))  # 200 x 0.1 x 0.9
    assert np.abs(times - 200).max() < 6 * math.sqrt(180)
    whole = Private(rows=7, batch_size=7, noise_multiplier=1.0)
    assert whole.draw() == list(range(7))


def test_rows_and_noise_are_not_the_seed_s(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    entropy = os.urandom
    monkeypatch.setattr(os, "urandom", lambda size: asked.append(size) or entropy(size))
    drawn = set()
    for _ in range(3):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002 - what must not matter
        drawn.add(tuple(Private(rows=200, batch_size=20, noise_multiplier=1.0).draw()))
    assert len(drawn) == 3
    assert asked == [8 * 200] * 3


# ----------------------------------------------------------------------------------------- the steps


def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(1))
    return x, x.argmax(1) % 3


def losses(net: nn.Module, rows: list[int]) -> Tensor:
    """Each row by itself."""
    x, y = data()
    return torch.cat([F.cross_entropy(net(x[[r]]), y[[r]], reduction="none") for r in rows])


def optimizer(
    private: Private | None = None, net: nn.Module | None = None, **values: Any
) -> tuple[MeZO, Private, nn.Module]:
    net = model() if net is None else net
    private = private or Private(rows=ROWS, batch_size=4, noise_multiplier=0.5)
    return MeZO(net, **{"lr": 1e-2, "seed": 3, "private": private, **values}), private, net


def walk(opt: MeZO, private: Private, net: nn.Module, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        rows = private.draw()
        found.append(opt.step(lambda batch: losses(net, batch), rows))
    return found


@pytest.mark.parametrize("looks", ["two-sided", "one-sided"])
def test_without_noise_it_is_the_mean_of_clipped_gradients(
    looks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("justforward.private.whole_gaussian", lambda deviation: 0)
    plain, _, net = optimizer()
    plain = MeZO(net, lr=1e-2, seed=3, looks=looks, num_samples=2)
    each = [
        plain.estimate(lambda row=row: losses(net, [row])[0]).projected_grads for row in range(ROWS)
    ]
    clip = float(np.median(np.linalg.norm(each, axis=1)))
    expected = sum(np.array(g) * min(1.0, clip / np.linalg.norm(g)) for g in each) / ROWS
    private = Private(rows=ROWS, batch_size=ROWS, noise_multiplier=1.0, clip=clip)
    opt, _, net = optimizer(private, looks=looks, num_samples=2)
    private.draw()
    step = opt.estimate(lambda: losses(net, list(range(ROWS))))
    assert step.projected_grads == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-4 * clip)
    assert step.forwards == {"two-sided": 4, "one-sided": 3}[looks]


def test_it_learns() -> None:
    private = Private(rows=ROWS, batch_size=ROWS, noise_multiplier=0.5)
    opt, _, net = optimizer(private, rule="rms", lr=3e-2)
    before = float(losses(net, list(range(ROWS))).detach().mean())
    walk(opt, private, net, 150)
    assert float(losses(net, list(range(ROWS))).detach().mean()) < 0.7 * before


def test_the_same_seed_has_other_noise_and_every_log_is_its_model(tmp_path: Path) -> None:
    prints = set()
    for name in ("a.jfl", "b.jfl"):
        private = Private(rows=ROWS, batch_size=ROWS, noise_multiplier=0.5)  # the same rows
        opt, _, net = optimizer(private, rule="rms", num_samples=2, log=tmp_path / name)
        walk(opt, private, net, 3)
        opt.close()
        base = model()
        jf.replay(base, tmp_path / name)
        assert jf.fingerprint(base) == jf.fingerprint(net)
        prints.add(jf.fingerprint(net))
    assert len(prints) == 2


def test_the_log_and_what_a_step_returns_say_the_noisy_answers_and_no_more(tmp_path: Path) -> None:
    """Coefficients and state are worked out here from the answers alone, and the log has nothing else."""
    opt, private, net = optimizer(rule="rms", num_samples=2, log=tmp_path / "run.jfl")
    steps = []
    for _ in range(4):
        rows = private.draw()
        steps.append(opt.estimate(lambda batch: losses(net, batch), rows))
        opt.apply(steps[-1])
    opt.close()
    log = jf.read_log(tmp_path / "run.jfl")
    state: tuple[float, ...] = (0.0,)
    for step, kept in zip(steps, log.steps, strict=True):
        assert math.isnan(step.loss)
        unit = private.batch_size * GRID
        whole = [grad * unit for grad in step.projected_grads]
        assert whole == pytest.approx([round(value) for value in whole], abs=1e-4)
        signal, state = opt.rule(step.projected_grads, state, step.index)
        state = tuple(jf.trajectory.rounded(s) for s in state)
        expected = tuple(jf.trajectory.rounded(-1e-2 * s / 2) for s in signal)
        assert (kept.coefficients, kept.rule_state) == (expected, state)
        assert (kept.scales, kept.decays, kept.norms, kept.rates) == ((1.0,), (0.0,), (), ())
    assert log.header["settings"] == {"estimator": "weight", "private": private.settings()}
    assert private.settings() == {
        "rows": ROWS,
        "batch_size": 4,
        "noise_multiplier": 0.5,
        "clip": None,
    }


def test_a_step_without_rows_is_noise_alone() -> None:
    opt, private, _ = optimizer(rule="sgd", num_samples=2)
    private._drawn = 0

    def never(batch: Any) -> Tensor:
        raise AssertionError("there are no rows to look at")

    step = opt.estimate(never, [])
    assert all(0.0 < abs(grad) < 8 * 0.5 / 4 for grad in step.projected_grads)
    assert private.answers == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_whose_loss_is_not_finite_counts_as_nothing(
    bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("justforward.private.whole_gaussian", lambda deviation: 0)

    def broken(net: nn.Module, rows: list[int]) -> Tensor:
        found = losses(net, rows)
        return torch.where(torch.tensor(rows) == 2, bad, found)

    grads = []
    for rows in ([0, 1, 2, 5], [0, 1, 5]):
        opt, private, net = optimizer(rule="sgd")
        private._drawn = len(rows)
        grads.append(opt.estimate(lambda batch, net=net: broken(net, batch), rows).projected_grads)
    assert grads[0] == grads[1]


# ----------------------------------------------------------------------------------------- counting


def test_every_answer_is_counted_applied_or_not_also_after_a_resume(tmp_path: Path) -> None:
    net = model()
    base = deepcopy(net)
    opt, private, _ = optimizer(net=net, log=tmp_path / "run.jfl")
    walk(opt, private, net, 3)
    private.draw()
    opt.estimate(lambda: losses(net, list(range(ROWS)))[: private._drawn])
    assert (opt.steps, private.answers) == (3, 4)
    state = opt.state_dict()
    opt.close()
    # the answer that was not applied was never in the log
    again, other, _ = optimizer(net=base, log=tmp_path / "run.jfl", resume=True)
    assert (again.steps, other.answers) == (3, 3)
    walk(again, other, base, 1)
    assert other.answers == 4
    loaded, third, _ = optimizer(net=deepcopy(net))
    loaded.load_state_dict(state)
    assert third.answers == 4
    with pytest.raises(UserError, match="cannot be resumed: settings"):
        optimizer(
            Private(rows=ROWS, batch_size=4, noise_multiplier=0.4),
            log=tmp_path / "run.jfl",
            resume=True,
        )
    again.close()


def test_rows_wait_until_they_were_looked_at() -> None:
    opt, private, net = optimizer()
    before = jf.fingerprint(net)
    with pytest.raises(UserError, match=r"no rows were drawn for this look"):
        opt.step(lambda: losses(net, [0]))
    private.draw()
    private._drawn = 3
    with pytest.raises(UserError, match="the 3 rows drawn last were not looked at"):
        private.draw()
    for wrong in (lambda: losses(net, [0]), lambda: losses(net, [0, 1, 2]).mean(), lambda: 1.0):
        with pytest.raises(UserError, match="one loss for each of the 3 rows that were drawn"):
            opt.step(wrong)
    with pytest.raises(RuntimeError, match="no"):
        opt.step(_fails)
    assert (private.answers, jf.fingerprint(net)) == (0, before)
    opt.step(lambda: losses(net, [0, 1, 2]))
    assert private.answers == 1
    with pytest.raises(UserError, match="no rows were drawn"):
        opt.step(lambda: losses(net, [0, 1, 2]))


def _fails() -> Tensor:
    raise RuntimeError("no")


# ------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"estimator": "activation"}, "the log would show which rows took part"),
        ({"looks": "one-point"}, "a loss is kept for the next step"),
        ({"modified": Modified()}, "measures layers by the rows' losses"),
    ],
)
def test_estimates_that_say_more_than_their_answers(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        optimizer(**values)


def test_workers_would_exchange_what_has_no_noise() -> None:
    opt, _, net = optimizer()
    with pytest.raises(UserError, match="private estimates cannot be shared"):
        opt.look(lambda: losses(net, [0]), rows=[0], of=1)
    with pytest.raises(UserError, match="private estimates cannot be shared"):
        opt.combine([], of=1)
    with pytest.raises(UserError, match="private ones answer once"):
        opt.resolution(lambda: losses(net, [0]))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rows": 0}, "rows is 0: it must be a whole number, 1 to"),
        ({"batch_size": 13}, "batch_size is 13: it must be a whole number, 1 to 12"),
        ({"batch_size": 2.5}, r"batch_size is 2\.5: it must be a whole number"),
        ({"noise_multiplier": 0.0}, r"noise_multiplier is 0\.0: it must be 0\.1 to"),
        ({"noise_multiplier": math.nan}, "noise_multiplier is nan"),
        ({"clip": 0.0}, r"clip is 0\.0: it must be positive"),
        ({"clip": math.inf}, "clip is inf: it must be positive"),
        ({"noise_multiplier": "1"}, "noise_multiplier is '1'"),
        ({"clip": "1"}, "clip is '1'"),
    ],
)
def test_numbers_out_of_range(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Private(**{"rows": ROWS, "batch_size": 4, "noise_multiplier": 1.0, **values})
