"""The rate and the length of looks that follow from looks: as numbers, and in runs.

Reading order: numbers, runs, what is refused.
"""

from __future__ import annotations

import io
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import justforward as jf
from conftest import lines_of as lines
from conftest import refusal, small_run
from conftest import trained as go
from justforward import gauge
from justforward.config import InspectConfig, ReplayConfig, TrainConfig
from justforward.errors import UserError
from justforward.evaluate import Scorer
from justforward.folder import RunFolder
from justforward.gauge import ENOUGH, FARTHER, SHARE, changed, moved, rate, stretch
from justforward.looks import NEARER, errors
from justforward.models import load_model
from justforward.outcome import Interrupted
from justforward.progress import Progress
from justforward.rebuild import rebuild
from justforward.report import inspect_run, spell_inspect
from justforward.rules import parse
from justforward.schedules import gauge_forwards
from justforward.session import Session
from justforward.settings import LONGEST_LOSS_EPS, LOSS_EPS, METRIC_EPS, RATES
from justforward.trajectory import read_log

# ----------------------------------------------------------------------------------------- numbers


def rms(values: list[float]) -> float:
    return math.sqrt(math.fsum(value * value for value in values) / len(values))


sizes = st.floats(1e-3, 1e3)
some = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=16).filter(lambda g: rms(g) > 1e-3)


@pytest.mark.parametrize("spec", ["sgd", "rms", "rms(beta=0)+momentum"])
@given(some, sizes)
def test_a_first_step_means_to_change_the_loss_by_as_much_everywhere(spec: str, grads: list[float], scale: float) -> None:  # fmt: skip
    """The mean loss of rows that each have a direction, by their own: in whatever units weights and losses are."""
    chain, grads = parse(spec), [g * scale for g in grads]
    lr = rate(rms(grads), len(grads), chain)
    assert lr is not None
    values, _ = chain(grads, (0.0,) * chain.state_size, 0)
    coefficients = [lr * s / len(grads) for s in values]
    change = math.fsum(c * g for c, g in zip(coefficients, grads, strict=True)) / len(grads)
    assert change == pytest.approx(SHARE)


@given(some)
def test_rules_that_normalise_have_the_same_rate(grads: list[float]) -> None:
    found = {
        rate(rms(grads), len(grads), parse(spec))
        for spec in ("rms", "sign", "spread", "adam", "rmsprop", "rms+clip(3)")
    }
    assert len(found) == 1


def test_nothing_seen_has_no_rate() -> None:
    assert rate(0.0, 8, parse("rms")) is None


pairs = st.lists(st.tuples(st.floats(0.1, 10), st.floats(-1, 1)), min_size=1, max_size=8)


@given(pairs, st.sampled_from([1, 2]), st.floats(2, 8))
def test_a_loss_that_bends(parts: list[tuple[float, float]], order: int, times: float) -> None:
    def seen(by: float) -> list[float]:
        return [slope + 0.01 * bent * by**order for slope, bent in parts]

    rounding, bend = errors(seen(1), seen(times), seen(NEARER), times, order)
    assert rounding == pytest.approx(0.0, abs=1e-6)
    assert bend == pytest.approx(rms([0.01 * bent for _, bent in parts]) / rms(seen(1)), abs=1e-6)


@given(st.sampled_from([1, 2]), st.integers(0, 2**32), st.floats(-3, 0.25))
def test_a_loss_that_is_rounded(order: int, seed: int, power: float) -> None:
    """To multiples of a step, at most nearly twice what looks see."""
    draw, step = random.Random(seed), 10.0**power
    slopes = [draw.gauss(0, 1) for _ in range(400)]

    def seen(by: float) -> list[float]:
        places = [draw.uniform(0, step) for _ in slopes]
        return [
            (round((place + slope * by) / step) - round(place / step)) * step / by
            for place, slope in zip(places, slopes, strict=True)
        ]

    here = seen(1)
    off = rms([a - b for a, b in zip(here, slopes, strict=True)])
    rounding, bend = errors(here, seen(FARTHER), seen(NEARER), FARTHER, order)
    assert 0.6 * off / rms(here) <= rounding <= 1.25 * off / rms(here)
    assert bend <= 0.6 * rounding


def test_looks_that_see_nothing_are_rounded_away() -> None:
    assert errors([0.0, 0.0], [0.0, 0.0], [0.0, 0.0], 4.0, 2) == (1.0, 0.0)
    assert stretch(1.0, 0.0, 2, 32.0) == 32.0


@given(st.floats(0, 2), st.floats(0, 2), st.sampled_from([1, 2]), st.floats(1, 64))
def test_looks_are_stretched_to_where_both_errors_together_are_least(
    rounding: float, bend: float, order: int, most: float
) -> None:
    found = stretch(rounding, bend, order, most)
    if math.hypot(rounding, bend) <= ENOUGH:
        assert found == 1.0
        return
    assert 0.0 < found <= most
    rounding, bend = max(rounding, 2.0**-20), max(bend, 2.0**-20)

    def error(times: float) -> float:
        return math.hypot(rounding / times, bend * times**order)

    assert all(error(found) <= error(min(most, found * by)) * (1 + 1e-9) for by in (0.5, 0.9, 1.1, 2.0))  # fmt: skip


def test_which_looks_change_anything() -> None:
    assert changed([0.0, 1.0, 0.0, -2.0]) == 0.5
    assert moved([0.0] * 7 + [1.0])
    assert not moved([0.0] * 9 + [1.0])


# -------------------------------------------------------------------------------------------- runs


@pytest.fixture
def config(tmp_path: Path, model_folder: Path, sentiment_csv: Path) -> TrainConfig:
    out = tmp_path / "run"
    return small_run(model_folder, sentiment_csv, out, gauge=2, lr=None, max_forwards=40)


def test_a_run_finds_its_rate_and_says_so(config: TrainConfig, tmp_path: Path) -> None:
    result, said = go(config)
    kept = RunFolder(config.out).read_config()
    assert kept.lr is not None
    assert kept.lr not in RATES.values()
    assert kept.eps == LOSS_EPS  # float32: nothing is wrong with it
    assert f"lr {kept.lr:.2g}, eps 0.001, after 10 forwards" in said
    assert gauge_forwards(kept) == 10  # two steps' looks, and a first step's at three lengths
    assert result["steps"] == 15
    assert result["forwards"] == 40
    assert lines(config)[2]["forwards"] == 12  # before, validation, the first step
    # the looks left nothing behind: base and log are the tuned model
    model = load_model(config.model)[0]
    assert read_log(RunFolder(config.out).log).header["base"] == jf.fingerprint(model)
    assert jf.replay(model, RunFolder(config.out).log) == 15
    made = rebuild(ReplayConfig(config.out, str(tmp_path / "made")), Progress(io.StringIO()))
    assert made["fingerprint"] == result["fingerprint"]


def test_the_same_run_gauged_by_hand(config: TrainConfig) -> None:
    """The rate is that of the looks that the first steps would have taken."""
    go(config)
    kept = RunFolder(config.out).read_config()
    by_hand = replace(config, out=config.out + "2", gauge=0, lr=1e-9, lr_schedule="constant", max_forwards=6)  # fmt: skip
    seen: list[float] = []

    class Watching(Session):
        def _step(self) -> float:
            loss = super()._step()
            assert self.opt is not None
            seen.extend(self.opt.projected_grads if self.opt.steps > 1 else ())
            return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("justforward.run.Session", Watching)
        go(by_hand)
    assert len(seen) == 16  # steps 1 and 2, of 8 rows
    assert kept.lr == pytest.approx(SHARE * math.sqrt(8) / rms(seen), rel=1e-4)


@pytest.mark.parametrize(
    "given",
    [
        {"estimator": "weight"},
        {"estimator": "weight", "rule": "sgd"},
        {"looks": "one-sided", "num_samples": 4, "rule": "spread"},
        {"tuner": "lora", "lora_rank": 2},
        {"tuner": "prefix", "prefix_length": 2},
        {"tuner": "head"},
        {"start": "probe", "max_forwards": 60},
        {"layers": 0.5},
        {"dtype": "bfloat16"},
        {"num_samples": 2, "sample_schedule": "linear"},
        {"objective": "accuracy"},
        {"objective": "accuracy", "estimator": "weight"},
    ],
    ids=str,
)
def test_all_kinds_of_runs(config: TrainConfig, tmp_path: Path, given: dict[str, Any]) -> None:
    """Each says what it has found, replays, and resumes behind its first step to the same bits."""
    config = replace(config, **given)
    whole, said = go(config)
    kept = RunFolder(config.out).read_config()
    assert kept.lr is not None
    assert kept.eps is not None
    assert f"lr {kept.lr:.2g}, eps {kept.eps:.2g}" in said
    part = replace(config, out=str(tmp_path / "part"))
    first = next(m for m in lines(config) if m["kind"] == "step")["forwards"]
    if config.sample_schedule == "constant":
        go(replace(part, max_forwards=first, lr_schedule="constant"))
        steady = replace(config, out=str(tmp_path / "steady"), lr_schedule="constant")
        end, _ = go(steady)
        again, _ = go(replace(part, lr_schedule="constant", resume=True))
        assert again["fingerprint"] == end["fingerprint"]
        assert again["forwards"] == end["forwards"]
    made = rebuild(ReplayConfig(config.out, str(tmp_path / "made")), Progress(io.StringIO()))
    assert made["fingerprint"] == whole["fingerprint"]


def test_killed_before_it_has_found_anything(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    whole, _ = go(config)
    part = replace(config, out=str(tmp_path / "part"))

    def killed(self: Session) -> None:
        shutil.copytree(part.out, tmp_path / "left")  # as a SIGKILL would leave it
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Session, "_gauge", killed)
        with pytest.raises(Interrupted):
            go(part)
    assert not Path(part.out).exists()
    left = replace(part, out=str(tmp_path / "left"))
    assert RunFolder(left.out).read_config().lr is None
    shown = inspect_run(InspectConfig(run=left.out))
    assert "lr not found yet (" in spell_inspect(shown)
    again, said = go(replace(left, resume=True))
    assert "after 10 forwards" in said
    assert again["fingerprint"] == whole["fingerprint"]
    assert lines(left) == lines(config)


def test_a_longer_look_where_a_metric_does_not_change(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    config = replace(config, objective="accuracy")
    real = gauge.looked

    def seen(opt: Any, eps: float, step: int, made: Any) -> Any:
        found = real(opt, eps, step, made)
        if eps == METRIC_EPS:
            return [0.0] * len(found)
        return [1.0] * len(found) if eps > METRIC_EPS else found

    monkeypatch.setattr(gauge, "looked", seen)
    _, said = go(config)
    assert RunFolder(config.out).read_config().eps == 4.0 * METRIC_EPS
    assert "looks of 0.02 change 0% of what they look at, of 0.08 100%" in said


def test_behind_a_fitted_start(config: TrainConfig) -> None:
    """Its forwards count beside those of the fit, and its rate is that of what the fit has left."""
    result, said = go(replace(config, start="probe", max_forwards=60))
    kept = RunFolder(config.out).read_config()
    assert kept.lr not in (None, *RATES.values())
    assert said.index("the head starts as a linear probe") < said.index(
        "projected gradients of the"
    )
    assert result["forwards"] == 60


def test_what_is_given_stays(config: TrainConfig) -> None:
    go(replace(config, lr=0.0123))
    go(replace(config, eps=2e-3, out=config.out + "2"))
    assert RunFolder(config.out).read_config().lr == 0.0123
    assert RunFolder(config.out + "2").read_config().eps == 2e-3
    assert RunFolder(config.out + "2").read_config().lr not in (None, *RATES.values())


def test_a_loss_that_is_rounded_asks_for_longer_looks(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """As where a model computes in 16 bits: what is rounded to 1/64 shows hardly a slope at 1e-3."""
    real = Scorer.losses
    monkeypatch.setattr(
        Scorer, "losses", lambda self, batch: (real(self, batch) * 64.0).round() / 64.0
    )
    _, said = go(replace(config, reuse=False))
    eps = RunFolder(config.out).read_config().eps
    assert eps is not None
    assert LOSS_EPS < eps <= LONGEST_LOSS_EPS
    assert f"eps {eps:.2g}" in said


# ------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"gauge": -1}, "--gauge is -1: it must be from 0 to 1000"),
        ({"looks": "one-point", "estimator": "weight"}, "--gauge is 2 and --looks 'one-point'"),
        ({"modified": "variance(weights)", "estimator": "weight"}, "--gauge is 2 and --modified"),
        ({"blocks": "layers", "estimator": "weight"}, "--gauge is 2 and --blocks 'layers'"),
        (
            {"private": True, "noise_multiplier": 1.0, "estimator": "weight", "rule": "sgd"},
            "--gauge is 2 and --private True",
        ),
    ],
    ids=str,
)
def test_refused(config: TrainConfig, given: dict[str, Any], said: str) -> None:
    assert said in refusal(replace(config, **given))


def test_a_budget_that_looks_alone_would_spend(config: TrainConfig) -> None:
    with pytest.raises(
        UserError,
        match=r"--max-forwards is 11: the first step takes 12 forwards, with what comes before it",
    ):
        go(replace(config, max_forwards=11))
    assert not Path(config.out).exists()
