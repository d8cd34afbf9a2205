"""What answers cost: known values, an independent formula, targets that are reached and not exceeded."""

from __future__ import annotations

import math
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from justforward import UserError, epsilon_of, noise_for


def test_the_value_of_the_library_s_own_example() -> None:
    """MNIST in Abadi et al. 2016 as the tutorials have it: 60,000 rows, batches of 256, 60 epochs, noise 1.1: Renyi's accountant says 2.59 or so."""
    dp = pytest.importorskip("dp_accounting")
    from dp_accounting.rdp import RdpAccountant

    steps, rate = 60 * 60000 // 256, 256 / 60000
    event = dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(1.1)), steps)
    renyi = RdpAccountant(orders=range(2, 64)).compose(event).get_epsilon(1e-5)
    found = epsilon_of(noise_multiplier=1.1, rate=rate, answers=steps, delta=1e-5)
    assert found == pytest.approx(2.388, abs=0.01)
    assert found < renyi == pytest.approx(2.597, abs=0.05)


def gaussian(noise: float, answers: int, delta: float) -> float:
    """Epsilon of answers on all rows, in closed form (Balle and Wang 2018, arXiv 1805.06530, Theorem 8)."""
    mu = math.sqrt(answers) / noise

    def over(epsilon: float) -> float:
        tail = norm.cdf(mu / 2 - epsilon / mu)
        return float(tail - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu) - delta)

    return float(brentq(over, 0.0, 100.0))


@pytest.mark.parametrize(("noise", "answers"), [(1.0, 1), (2.0, 3), (20.0, 400), (0.8, 1)])
def test_without_sampling_it_is_the_closed_form(noise: float, answers: int) -> None:
    found = epsilon_of(noise_multiplier=noise, rate=1.0, answers=answers, delta=1e-5)
    exact = gaussian(noise, answers, 1e-5)
    assert exact - 1e-9 <= found <= exact + 0.01


@pytest.mark.parametrize(
    ("noise", "rate", "answers"),
    [(20.0, 0.001, 100_000), (2.0, 0.001, 20_000), (10.0, 0.01, 10_000)],
)
def test_many_answers_that_cost_little_each(noise: float, rate: float, answers: int) -> None:
    """What is rounded up is no part of the figure that matters: a far finer accountant says almost the same."""
    dp = pytest.importorskip("dp_accounting")
    from dp_accounting.pld.pld_privacy_accountant import PLDAccountant

    one = dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(noise))
    accountant = PLDAccountant(dp.NeighboringRelation.REPLACE_SPECIAL, 3e-6)
    fine = accountant.compose(dp.SelfComposedDpEvent(one, answers)).get_epsilon(1e-6)
    found = epsilon_of(noise_multiplier=noise, rate=rate, answers=answers, delta=1e-6)
    assert fine <= found < 1.02 * fine


@settings(max_examples=10)
@given(st.floats(0.4, 3.0), st.floats(0.01, 0.3), st.integers(1, 200))
def test_it_grows_with_answers_and_rate_and_falls_with_noise(
    noise: float, rate: float, answers: int
) -> None:
    def spent(noise: float = noise, rate: float = rate, answers: int = answers) -> float:
        return epsilon_of(noise_multiplier=noise, rate=rate, answers=answers, delta=1e-5)

    assert spent(answers=answers + 20) > spent() > spent(noise=1.3 * noise)
    assert spent() < spent(rate=min(1.0, 1.5 * rate))
    assert spent(answers=0) == 0.0


@pytest.mark.parametrize(
    ("epsilon", "rate", "answers"), [(8.0, 0.02, 100), (1.0, 0.02, 100), (2.0, 1.0, 10)]
)
def test_a_target_is_reached_and_not_exceeded(epsilon: float, rate: float, answers: int) -> None:
    noise = noise_for(epsilon=epsilon, delta=1e-5, rate=rate, answers=answers)
    found = epsilon_of(noise_multiplier=noise, rate=rate, answers=answers, delta=1e-5)
    assert 0.97 * epsilon < found <= epsilon


def test_targets_at_either_end() -> None:
    assert noise_for(epsilon=1e4, delta=1e-5, rate=0.5, answers=2) == 0.1
    with pytest.raises(UserError, match="cannot be kept by any noise"):
        noise_for(epsilon=1e-9, delta=1e-12, rate=1.0, answers=10)


def test_numbers_out_of_range_and_a_library_that_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    good = {"noise_multiplier": 1.0, "rate": 0.1, "answers": 3, "delta": 1e-5}
    for name, value in (
        ("noise_multiplier", 0.01),
        ("rate", 0.0),
        ("rate", 1.1),
        ("answers", -1),
        ("answers", 1.5),
        ("delta", 0.0),
        ("delta", 1.0),
        ("delta", math.nan),
    ):
        with pytest.raises(UserError, match=f"privacy: {name} is {value}"):
            epsilon_of(**{**good, name: value})
    with pytest.raises(UserError, match="epsilon is 0"):
        noise_for(epsilon=0.0, delta=1e-5, rate=0.1, answers=3)
    with pytest.raises(UserError, match="epsilon is 1"):
        noise_for(epsilon=1.0, delta=1e-5, rate=0.1, answers=0)
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(UserError, match=r"pip install 'justforward\[private\]'"):
        epsilon_of(**{**good, "answers": 4})
