"""A run that goes astray is seen from its losses, one that rests is left alone; what a run's lines say of rewinds.

Reading order: losses, lines, runs.
"""

from __future__ import annotations

import io
import math
import random
import shutil
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import justforward as jf
from conftest import lines_of as lines
from conftest import trained as go
from justforward.config import InspectConfig, ReplayConfig, TrainConfig
from justforward.data import Example
from justforward.errors import NonFiniteLoss
from justforward.evaluate import Evaluation
from justforward.folder import RunFolder
from justforward.guard import (
    STILL,
    WINDOW,
    Astray,
    Guard,
    Stillness,
    is_worse,
    lost_forwards,
    rate_factor,
    rewinds,
)
from justforward.models import load_model
from justforward.optim import MeZO
from justforward.outcome import Interrupted, turning
from justforward.prepare import judged, stop_reason
from justforward.progress import Progress
from justforward.rebuild import rebuild
from justforward.report import inspect_run
from justforward.session import Session
from justforward.settings import resolved
from justforward.snapshots import RunOptimizer
from justforward.trajectory import Writer, read_log

# ------------------------------------------------------------------------------------------ losses


def watched(losses: list[float]) -> tuple[int, Astray] | None:
    """After how many steps a run was found astray, and what was found."""
    guard = Guard()
    for step, loss in enumerate(losses, start=1):
        found = guard.add(loss)
        if found is not None:
            return step, found
    return None


def noisy(means: list[float], spread: float, seed: int) -> list[float]:
    draw = random.Random(seed)
    return [draw.gauss(mean, spread) for mean in means]


@given(st.integers(0, 2**32), st.floats(1e-3, 10.0), st.floats(-5.0, 5.0))
def test_a_run_at_rest_is_left_alone(seed: int, spread: float, mean: float) -> None:
    assert watched(noisy([mean] * 400, spread, seed)) is None


@given(st.integers(0, 2**32), st.floats(0.01, 0.5))
def test_a_run_that_learns_is_left_alone(seed: int, spread: float) -> None:
    assert watched(noisy([2.0 * 0.99**i + 0.3 for i in range(400)], spread, seed)) is None


def test_a_long_run_at_rest_is_hardly_ever_rewound() -> None:
    found = [watched(noisy([0.5] * 10_000, 0.2, seed)) for seed in range(20)]
    assert sum(each is not None for each in found) == 0


@given(st.integers(0, 2**32), st.integers(2 * WINDOW, 200), st.floats(0.01, 0.3))
def test_a_run_that_is_carried_off_is_seen_and_taken_back(
    seed: int, turn: int, spread: float
) -> None:
    rises = [0.5 + 0.1 * max(0, i - turn) for i in range(turn + 4 * WINDOW)]
    seen = watched(noisy(rises, spread, seed))
    assert seen is not None
    at, found = seen
    assert turn < at <= turn + 2 * WINDOW
    assert WINDOW <= found.step <= at - WINDOW  # its window and the last one are apart
    assert found.step <= turn + WINDOW
    assert found.last > found.best


def test_where_all_losses_are_equal_nothing_is_astray() -> None:
    assert watched([1.0] * 300) is None


@given(st.lists(st.floats(-3, 3), max_size=200), st.integers(0, 200))
def test_watching_again_from_the_lines_is_the_same(losses: list[float], cut: int) -> None:
    whole, again = Guard(), Guard(losses[:cut])
    found = [whole.add(loss) for loss in losses]
    assert found[cut:] == [again.add(loss) for loss in losses[cut:]]
    assert whole.best() == again.best()


def test_the_best_window_of_all() -> None:
    assert Guard([1.0] * (WINDOW - 1)).best() == 0
    assert Guard([1.0] * WINDOW).best() == WINDOW
    assert Guard([2.0] * 10 + [1.0] * WINDOW + [3.0] * 50).best() == WINDOW + 10


# ------------------------------------------------------------------------------------------- lines


def test_forwards_in_vain_belong_to_the_steps_after_them() -> None:
    lines = [
        {"kind": "step", "step": 3},
        {"kind": "rewind", "step": 50, "lost": 10},
        {"kind": "rewind", "step": 30, "lost": 60},
    ]
    assert [line["step"] for line in rewinds(lines)] == [50, 30]
    assert rate_factor(lines) == 0.25
    assert lost_forwards(lines) == 70
    # step 31 and all after it were taken anew after both; the first 30 before either
    assert [lost_forwards(lines, step) for step in (1, 30, 31, 51, 80)] == [0, 0, 70, 70, 70]
    assert [lost_forwards(lines[:2], step) for step in (50, 51)] == [0, 10]


def test_a_validation_lowers_the_rate_more() -> None:
    lines = [
        {"kind": "rewind", "step": 0, "lost": 10, "validations": 1},
        {"kind": "rewind", "step": 0, "lost": 10},
    ]
    assert rate_factor(lines[:1]) == 0.25
    assert rate_factor(lines) == 0.125


@given(st.floats(0, 1), st.floats(1e-3, 10), st.floats(0, 1), st.floats(1e-3, 10))
def test_worse_is_a_higher_loss_and_no_higher_value(value: float, loss: float, best: float, had: float) -> None:  # fmt: skip
    assert is_worse((value, loss), (best, had)) == (value <= best and loss > had + 0.02 * had)
    assert not is_worse((value, loss), (value, loss))


def test_where_to_turn_back_to(config: TrainConfig) -> None:
    """By validations that are due (every 10 forwards, at two a step); the others come of a limit that may be raised."""
    asked = resolved(replace(config, eval_every=10))

    def line(step: int, accuracy: float, loss: float, forwards: int) -> dict[str, Any]:
        values = {"accuracy": accuracy, "loss": loss, "forwards": forwards}
        return {"kind": "validation", "step": step, **values}

    start, fifth = line(0, 0.5, 1.0, 0), line(5, 0.6, 0.9, 10)
    assert turning(asked, [], 0) is None
    assert turning(asked, [start], 0) is None
    assert turning(asked, [start, fifth], 5) is None
    worse = line(10, 0.6, 0.93, 20)
    found = turning(asked, [start, fifth, worse], 10)
    assert found is not None
    assert (found.step, found.validations) == (5, 1)
    assert found.why == "the validation loss is 0.9300, and was 0.9000 after step 5"
    # a step later it is too late; the loss says nothing of another objective
    assert turning(asked, [start, fifth, worse], 11) is None
    assert turning(replace(asked, objective="accuracy"), [start, fifth, worse], 10) is None
    # neither what is compared nor what it is compared with may come of a limit
    assert turning(asked, [start, fifth, line(7, 0.1, 3.0, 14)], 7) is None
    aside = line(3, 0.9, 0.1, 6)
    assert turning(asked, [start, aside, fifth], 5) is None
    # within the margin, and then not: both are taken back; a limit's does not count, so that patience sees none of it
    flat, limit = line(10, 0.6, 0.91, 20), line(12, 0.6, 0.91, 24)
    assert turning(asked, [start, fifth, flat], 10) is None
    found = turning(asked, [start, fifth, flat, limit, line(15, 0.6, 0.99, 30)], 15)
    assert found is not None
    assert (found.step, found.validations) == (5, 2)


def test_what_was_taken_back_is_no_better(config: TrainConfig) -> None:
    asked = resolved(replace(config, patience=3, max_forwards=1000))
    best = {"kind": "validation", "step": 0, "accuracy": 0.5, "loss": 1.0, "forwards": 0}
    back = {"kind": "rewind", "step": 0, "taken": 5, "lost": 10, "validations": 2}
    other = {**best, "step": 5, "loss": 1.01, "forwards": 20}
    asked = replace(asked, eval_every=10)
    assert judged(asked, [best, back, other], 5) == [
        (0.5, 1.0),
        *[(-math.inf, math.inf)] * 2,
        (0.5, 1.01),
    ]
    assert stop_reason(asked, 5, 10, 0.0, [best, back]) is None
    assert stop_reason(asked, 5, 10, 0.0, [best, back, other]) == "flat"
    assert stop_reason(asked, 5, 10, 0.0, [best, back, {**other, "accuracy": 0.6}]) is None
    plain = {
        k: v for k, v in back.items() if k != "validations"
    }  # by the step losses: it says nothing of validations
    assert stop_reason(asked, 5, 10, 0.0, [best, plain, other]) is None
    # of a limit that was raised: not one that counts
    assert stop_reason(asked, 5, 10, 0.0, [best, back, {**other, "forwards": 19}]) is None


def test_a_log_is_cut(tmp_path: Path, tiny_gpt2: Any) -> None:
    path = tmp_path / "run.jfl"
    opt = MeZO(tiny_gpt2, lr=1e-3, log=path)
    for _ in range(6):
        opt.step(lambda: sum(p.square().sum() for p in tiny_gpt2.parameters()))
    opt.close()
    whole = read_log(path)
    Writer.rewind(whole, 4)
    cut = read_log(path)
    assert cut.sealed
    assert cut.steps == whole.steps[:4]
    assert cut.header == whole.header
    assert [each.name for each in tmp_path.iterdir()] == ["run.jfl"]


# -------------------------------------------------------------------------------------------- runs


@pytest.fixture
def config(tmp_path: Path, model_folder: Path, sentiment_csv: Path) -> TrainConfig:
    """A rate that carries the weights off; validated at the end only, so that it is the step losses that tell."""
    return TrainConfig(
        model=str(model_folder), data=str(sentiment_csv), template="{text} It was",
        labels={"neg": "great", "pos": "terrible"}, out=str(tmp_path / "run"), max_forwards=400,
        eval_every=400, lr=0.3, lr_schedule="constant", threads=1, train_size=32, keep="last",
        start="base", patience=0,
    )  # fmt: skip


def test_a_run_goes_back_and_on_at_half_the_rate(config: TrainConfig, tmp_path: Path) -> None:
    result, said = go(config)
    assert result["rewinds"] >= 1
    assert "the loss has risen to" in said
    assert "at 0.5 of the learning rate" in said
    assert result["forwards"] == 400  # what was in vain counts
    assert inspect_run(InspectConfig(run=config.out))["forwards"] == 400
    metrics = lines(config)
    steps = [m for m in metrics if m["kind"] == "step"]
    assert [m["step"] for m in steps] == list(range(1, result["steps"] + 1))
    assert 2 * result["steps"] + lost_forwards(metrics) == 400
    assert steps[0]["lr"] == 0.3
    assert steps[-1]["lr"] == 0.3 * 0.5 ** result["rewinds"]
    plain, _ = go(replace(config, out=str(tmp_path / "plain"), backoff=False))
    assert plain["rewinds"] == 0
    kept = next(m["step"] for m in metrics if m["kind"] == "rewind")
    after, astray = (
        statistics.mean(m["loss"] for m in of if m["kind"] == "step" and m["step"] > kept)
        for of in (metrics, lines(replace(config, out=str(tmp_path / "plain"))))
    )
    assert after < astray
    # base + log is the tuned model, as ever
    model = load_model(config.model)[0]
    assert jf.replay(model, RunFolder(config.out).log) == result["steps"]
    assert jf.fingerprint(model) == result["fingerprint"]
    made = rebuild(ReplayConfig(config.out, str(tmp_path / "made")), Progress(io.StringIO()))
    assert made["fingerprint"] == result["fingerprint"]


def test_stopped_anywhere_and_continued_to_the_same_bits(
    config: TrainConfig, tmp_path: Path
) -> None:
    whole, _ = go(config)
    first = next(m for m in lines(config) if m["kind"] == "rewind")
    assert first["taken"] > first["step"]
    for forwards in (2 * first["taken"] - 6, first["forwards"] + 2, 350):
        part = replace(config, out=str(tmp_path / f"part{forwards}"), max_forwards=forwards)
        go(part)
        again, _ = go(replace(part, max_forwards=400, resume=True))
        for key in ("fingerprint", "steps", "forwards", "rewinds", "validation_loss"):
            assert again[key] == whole[key]
        stepped = [m for m in lines(part) if m["kind"] in ("step", "rewind")]
        assert stepped == [m for m in lines(config) if m["kind"] in ("step", "rewind")]


def test_cut_off_between_log_and_lines(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    whole, _ = go(config)
    part = replace(config, out=str(tmp_path / "part"))
    real = RunFolder.keep_metrics

    def killed(self: RunFolder, metrics: list[Any]) -> None:
        if any(m["kind"] == "rewind" for m in metrics):
            shutil.copytree(part.out, tmp_path / "left")  # as a SIGKILL would leave it
            raise KeyboardInterrupt
        real(self, metrics)

    monkeypatch.setattr(RunFolder, "keep_metrics", killed)
    with pytest.raises(Interrupted):
        go(part)
    monkeypatch.setattr(RunFolder, "keep_metrics", real)
    again, said = go(replace(part, out=str(tmp_path / "left"), resume=True))
    assert "metrics.jsonl was cut back" in said
    for key in ("fingerprint", "steps", "forwards", "rewinds"):
        assert again[key] == whole[key]


def test_a_worse_validation_turns_a_run_back(config: TrainConfig, tmp_path: Path) -> None:
    """Sooner than the step losses could; what follows has a quarter of the rate, and is not worse any more."""
    config = replace(config, eval_every=10, max_forwards=200, lr=1.0)
    result, said = go(config)
    metrics = lines(config)
    back = rewinds(metrics)
    assert result["rewinds"] == len(back) >= 1
    assert all(line["validations"] >= 1 for line in back)
    assert "the validation loss is" in said
    assert "at 0.25 of the learning rate" in said
    assert result["forwards"] == 200
    assert [m["step"] for m in metrics if m["kind"] == "step"] == list(
        range(1, result["steps"] + 1)
    )
    plain, _ = go(replace(config, out=str(tmp_path / "plain"), backoff=False))
    assert result["validation_loss"] < plain["validation_loss"]
    made = rebuild(ReplayConfig(config.out, str(tmp_path / "made")), Progress(io.StringIO()))
    assert made["fingerprint"] == result["fingerprint"]


def test_patience_counts_validations_that_were_taken_back(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A turn counts for as many as it took back: after the next one that is no better the run ends."""
    real, figures = Session._evaluate, iter([(0.5, 1.0), (0.6, 0.9), (0.6, 2.0), (0.6, 0.9)])

    def scripted(self: Session, rows: list[Example]) -> Evaluation:
        found = real(self, rows)
        if rows is not self.splits.validation:
            return found
        accuracy, loss = next(figures)
        return replace(found, accuracy=accuracy, value=accuracy, loss=loss)

    monkeypatch.setattr(Session, "_evaluate", scripted)
    config = replace(config, eval_every=10, patience=2, lr=1e-4)
    result, _ = go(config)
    assert result["stopped_by"] == "flat"
    kinds = [(m["kind"], m["step"]) for m in lines(config) if m["kind"] not in ("step", "before")]
    # the one after step 5 is better; the first one after step 10 was taken back
    assert kinds == [("validation", 0), ("validation", 5), ("rewind", 5), ("validation", 10)]
    assert (result["best_step"], result["steps"], result["forwards"]) == (5, 10, 30)
    again, said = go(replace(config, resume=True))
    assert "nothing to do" in said
    assert again == result


@pytest.mark.parametrize("at", ["before the turn", "between log and lines"])
def test_killed_at_a_turn_and_continued_to_the_same_bits(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:  # fmt: skip
    config = replace(config, eval_every=10, max_forwards=100)
    whole, _ = go(config)
    assert whole["rewinds"] >= 1
    part = replace(config, out=str(tmp_path / "part"))
    name = "_rewind" if at == "before the turn" else "_load_base"
    real = getattr(Session, name)

    def killed(self: Session, *args: Any, **more: Any) -> None:
        if at == "before the turn" or rewinds(self.lines.all):
            monkeypatch.setattr(Session, name, real)
            shutil.copytree(part.out, tmp_path / "left")  # as a SIGKILL would leave it
            raise KeyboardInterrupt
        real(self, *args, **more)

    monkeypatch.setattr(Session, name, killed)
    with pytest.raises(Interrupted):
        go(part)
    again, _ = go(replace(part, out=str(tmp_path / "left"), resume=True))
    for key in ("fingerprint", "steps", "forwards", "rewinds", "validation_loss"):
        assert again[key] == whole[key]
    left = replace(part, out=str(tmp_path / "left"))
    assert lines(left) == lines(config)


@pytest.mark.parametrize("backoff", [True, False])
def test_a_loss_that_is_no_number(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, backoff: bool) -> None:  # fmt: skip
    """At a rate that breaks the weights there is no second step; halved a few times there is."""
    real: Callable[..., float] = RunOptimizer.step
    calls = 0

    def broken(self: RunOptimizer, *args: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise NonFiniteLoss(self.steps, float("nan"), "at +eps")
        return real(self, *args)

    monkeypatch.setattr(RunOptimizer, "step", broken)
    config = replace(config, lr=1e-3, max_forwards=20, backoff=backoff)
    if not backoff:
        with pytest.raises(NonFiniteLoss):
            go(config)
        return
    result, said = go(config)
    assert (result["rewinds"], result["steps"], result["forwards"]) == (1, 8, 20)
    assert "back to step 0 of 2, at 0.5 of the learning rate" in said
    assert {m["lr"] for m in lines(config) if m["kind"] == "step"} == {5e-4}


def test_it_gives_up_in_the_end(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: RunOptimizer, *args: Any) -> float:
        raise NonFiniteLoss(self.steps, float("nan"), "at +eps")

    monkeypatch.setattr(RunOptimizer, "step", broken)
    with pytest.raises(NonFiniteLoss):
        go(config)
    assert len(rewinds(lines(config))) == 8


# ------------------------------------------------------------------------------- looks that see nothing


def test_looks_that_see_nothing_are_told_once() -> None:
    still = Stillness()
    said = [still.add((0.0, 0.0), 0.5, 1e-3) for _ in range(10)]
    assert [text is not None for text in said] == [i == STILL - 1 for i in range(10)]
    assert "give a longer --eps than 0.001" in str(said[STILL - 1])


@pytest.mark.parametrize("at", range(STILL + 1))
def test_one_step_that_sees_something_is_enough(at: int) -> None:
    still = Stillness()
    said = [still.add((1.0 if i == at else 1e-7,), 0.5, 1e-3) for i in range(STILL + 2)]
    assert (said.count(None) == len(said)) == (at < STILL)


def test_a_loss_that_is_small_has_small_rises() -> None:
    still = Stillness()
    assert [still.add((1e-8,), 1e-8, 1e-3) for _ in range(8)] == [None] * 8
