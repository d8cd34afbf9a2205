"""The step that a run keeps: the best of those that have surely gained over the start."""

from __future__ import annotations

import io
import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import small_run, trained
from justforward.config import EvalConfig, InspectConfig, ReplayConfig, TrainConfig
from justforward.errors import UserError
from justforward.evaluate import Evaluation
from justforward.folder import RunFolder, best_step, value_of
from justforward.keeping import is_sure, left_for, step_kept, worth_of
from justforward.progress import Progress
from justforward.rebuild import evaluate, kept_step, rebuild
from justforward.report import inspect_run

PLAIN = TrainConfig(model="m", data="d", out="o", template="{text}", labels="0=a,1=b", keep="best")
ROWS = st.lists(
    st.tuples(st.floats(0, 9, width=32), st.floats(0, 9, width=32), st.booleans(), st.booleans()),
    min_size=2,
    max_size=40,
)


def found(losses: list[float], rights: list[float], metric: str = "accuracy") -> Evaluation:
    right = sum(rights) / len(rights)
    mean = math.fsum(losses) / len(losses)
    return Evaluation(
        right, mean, [], len(losses), 1, metric, right / 2, {}, losses=losses, rights=rights
    )


def line(step: int, **values: Any) -> dict[str, Any]:
    return {"kind": "validation", "step": step, "forwards": 2 * step, "seconds": 0.0, **values}


@given(ROWS)
def test_a_gain_is_paired_by_row(rows: list[tuple[float, float, bool, bool]]) -> None:
    before, after = [r[0] for r in rows], [r[1] for r in rows]
    was, now = [float(r[2]) for r in rows], [float(r[3]) for r in rows]
    start = worth_of(found(before, was), PLAIN, [])
    assert start["losses"] == pytest.approx(before, abs=1e-6)
    assert start["rights"] == was
    assert "gain" not in start
    said = worth_of(found(after, now), PLAIN, [line(0, **start)])
    gains = np.array(before) - np.array(after)
    assert said["gain"] == pytest.approx(gains.mean(), abs=1e-5)
    assert said["gain_error"] == pytest.approx(gains.std(ddof=1) / len(rows) ** 0.5, abs=1e-5)
    assert said["turned"] == [
        sum(b > a for a, b in zip(was, now, strict=True)),
        sum(b < a for a, b in zip(was, now, strict=True)),
    ]
    assert "losses" not in said
    assert json.loads(json.dumps(said)) == said


def test_rows_alone_have_no_error() -> None:
    assert worth_of(found([1.0], [1.0]), PLAIN, []) == {"accuracy": 1.0, "loss": 1.0}


@pytest.mark.parametrize(
    "config",
    [replace(PLAIN, objective="accuracy"), replace(PLAIN, private=True)],
    ids=["a metric is the objective", "private"],
)
def test_what_is_not_told_row_by_row(config: TrainConfig) -> None:
    said = worth_of(found([1.0, 2.0], [1.0, 0.0], "f1"), config, [])
    assert said == {"accuracy": 0.5, "loss": 1.5, "value": 0.25}


def test_a_test_has_no_rows() -> None:
    assert worth_of(found([1.0, 2.0], [1.0, 0.0]), PLAIN) == {"accuracy": 0.5, "loss": 1.5}


def test_of_an_earlier_run_nothing_is_known() -> None:
    old = line(0, accuracy=0.5, loss=1.5)
    said = worth_of(found([1.0, 2.0], [1.0, 0.0]), PLAIN, [old])
    assert said == {"accuracy": 0.5, "loss": 1.5}
    assert is_sure(said)


def test_rows_that_are_others() -> None:
    start = line(0, accuracy=0.5, loss=1.5, losses=[1.0, 2.0, 3.0], rights=[0, 1, 1])
    with pytest.raises(UserError, match=r"o: metrics.jsonl has 3 losses and 3 rights .* for 2 v"):
        worth_of(found([1.0, 2.0], [1.0, 0.0]), PLAIN, [start])


@pytest.mark.parametrize(
    ("gain", "turned", "sure"),
    [
        (0.2, [0, 0], True),
        (0.1, [0, 0], False),  # not above its error
        (-0.2, [1, 0], False),  # one row more is one row
        (-0.2, [2, 0], True),
        (0.0, [5, 3], False),
        (0.0, [6, 2], True),
        (0.0, [0, 9], False),
    ],
)
def test_sure(gain: float, turned: list[int], sure: bool) -> None:
    assert is_sure(line(3, gain=gain, gain_error=0.1, turned=turned)) is sure


LINES = st.lists(
    st.builds(
        line,
        st.integers(1, 9),
        accuracy=st.sampled_from([0.25, 0.5, 0.75]),
        loss=st.sampled_from([0.1, 0.2]),
        gain=st.sampled_from([-0.1, 0.05, 0.2]),
        gain_error=st.just(0.1),
        turned=st.sampled_from([[0, 0], [3, 1]]),
    ),
    unique_by=lambda m: m["step"],
)


@given(LINES, st.integers(0, 9), st.sampled_from([None, 0.75]))
def test_none_is_kept_that_may_be_chance(
    later: list[dict[str, Any]], steps: int, goal: float | None
) -> None:
    start = line(0, accuracy=0.5, loss=0.2)
    lines = [start, *sorted(later, key=lambda m: int(m["step"]))]
    config = replace(PLAIN, target_accuracy=goal)
    kept = step_kept(config, lines, steps)
    assert kept is not None
    until = [m for m in lines if m["step"] <= steps]
    reached = [m for m in until if goal is not None and value_of(m) >= goal]
    if reached:  # it was asked for
        assert kept == best_step(reached, steps)
        return
    assert is_sure(kept)
    for other in until:
        if is_sure(other):
            assert (-value_of(kept), kept["loss"], kept["step"]) <= (
                -value_of(other),
                other["loss"],
                other["step"],
            )
    best = best_step(until, steps)
    assert best is not None
    assert (left_for(config, until, kept) == "") is (best["step"] == kept["step"])


def test_the_last_is_the_last() -> None:
    lines = [line(0, accuracy=0.9, loss=0.1), line(4, accuracy=0.1, loss=1.0)]
    config = replace(PLAIN, keep="last")
    assert step_kept(config, lines, 4) == lines[1]
    assert step_kept(config, lines, 5) is None
    assert left_for(config, lines, lines[1]) == ""


# --------------------------------------------------------------------------------------- whole runs


def test_a_run_that_gains_nothing_keeps_its_start(
    tmp_path: Path, model_folder: Path, sentiment_csv: Path
) -> None:
    """Labels that have nothing to do with the texts: some validation is better by luck, and its step is not kept for it."""
    head, *rows = sentiment_csv.read_text().splitlines()
    texts = [row.rpartition(",")[0] for row in rows]
    names = ["neg", "pos"]
    rows = [f"{text},{names[i * i // 3 % 2]}" for i, text in enumerate(texts)]
    sentiment_csv.write_text("\n".join([head, *rows]) + "\n")
    config = small_run(model_folder, sentiment_csv, tmp_path / "run", lr=1e-2, seed=1, eval_every=2)
    result, said = trained(config)
    assert result["kept_step"] == 0 < result["best_step"]
    assert result["accuracy"] == result["before_accuracy"]
    assert result["loss"] == pytest.approx(result["before_loss"], abs=1e-6)  # the base on its grid
    assert f"step {result['best_step']} is the best in validation, but" in said
    folder = RunFolder(config.out)
    assert kept_step(folder, folder.read_config(), pytest.fail) == 0
    quietly = Progress(io.StringIO())
    found = evaluate(EvalConfig(run=config.out), quietly)
    assert found["fingerprint"] == result["fingerprint"]
    made = rebuild(ReplayConfig(config.out, str(tmp_path / "best"), steps="best"), quietly)
    assert made["steps"] == result["best_step"]
    assert made["fingerprint"] != result["fingerprint"]
    # what rows lost is for the folder alone
    lines = [m for m in folder.read_metrics()[0] if m["kind"] == "validation"]
    assert len(lines[0]["losses"]) == len(lines[0]["rights"]) == result["rows"]["validation"]
    assert statistics.mean(lines[0]["losses"]) == pytest.approx(lines[0]["loss"], abs=1e-5)
    for m in lines[1:]:
        assert m["gain"] == pytest.approx(lines[0]["loss"] - m["loss"], abs=1e-5)
    shown = inspect_run(InspectConfig(config.out))["curve"]
    assert not any({"losses", "rights"} & set(m) for m in shown)


def test_a_line_with_rows_that_are_no_numbers_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    folder = RunFolder(tmp_path / "run")
    for bad in (
        {"losses": [0.1, None], "rights": [0, 1]},
        {"losses": [0.1, 0.2]},
        {"losses": 3, "rights": [1]},
        {"gain": 0.1},
        {"gain": 0.1, "gain_error": 0.1, "turned": None},
        {"gain": 0.1, "gain_error": 0.1, "turned": [1]},
    ):
        folder.keep_metrics([line(0, accuracy=0.5, loss=1.0, **bad)])
        with pytest.raises(UserError, match=r"metrics.jsonl:1: damaged"):
            folder.read_metrics()
