"""Private runs: what is planned, spent, said and refused; what their folder does not hold. Tiny runs, in this process."""

from __future__ import annotations

import io
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import justforward as jf
from justforward.budget import KEPT, SHARED, with_delta
from justforward.cli import main
from justforward.config import TrainConfig
from justforward.data import Example
from justforward.errors import UserError
from justforward.evaluate import Scorer
from justforward.feed import feed
from justforward.folder import RunFolder
from justforward.models import load_model
from justforward.progress import Progress
from justforward.run import train
from justforward.schedules import forwards_until, planned_steps
from justforward.settings import resolved, task_of
from justforward.spared import Spared

DELTA = 1e-5


@pytest.fixture
def config(tmp_path: Path, model_folder: Path, sentiment_csv: Path) -> TrainConfig:
    """Six steps, one validation at the end. The words are swapped, so that there is everything to learn."""
    return TrainConfig(
        model=str(model_folder),
        data=str(sentiment_csv),
        template="{text} It was",
        labels={"neg": "great", "pos": "terrible"},
        out=str(tmp_path / "run"),
        estimator="weight",
        private=True,
        noise_multiplier=1.0,
        target_delta=DELTA,
        max_forwards=12,
        eval_every=100,
        lr=3e-2,
        lr_schedule="constant",
        threads=1,
    )


def said(config: TrainConfig) -> str:
    out = io.StringIO()
    train(config, Progress(out))
    return out.getvalue()


def header(config: TrainConfig) -> dict[str, Any]:
    settings: dict[str, Any] = jf.read_log(RunFolder(config.out).log).header["settings"]
    return settings


def epsilon(config: TrainConfig, answers: int) -> float:
    private = header(config)["private"]
    return jf.epsilon_of(
        noise_multiplier=private["noise_multiplier"],
        rate=private["batch_size"] / private["rows"],
        answers=answers,
        delta=DELTA,
    )


def test_from_the_command_line(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train", "--model", config.model, "--data", config.data, "--template", "{text} It was"]
    argv += ["--labels", "neg=great,pos=terrible", "--out", config.out, "--threads", "1", "--json"]
    argv += ["--estimator", "weight", "--max-forwards", "12", "--eval-every", "6"]
    assert main([*argv, "--private", "--target-epsilon", "6"]) == 0
    out, err = capsys.readouterr()
    privacy = json.loads(out)["privacy"]
    assert 5.8 < privacy["epsilon"] <= 6.0
    assert (privacy["delta"], privacy["answers"], privacy["batch_size"]) == (DELTA, 6, 8)
    assert "validation and test rows are not protected" in err
    assert f"may be shared: {SHARED}; keep to yourself: {KEPT}" in err
    assert f"epsilon {privacy['epsilon']:.3f} at delta 1e-05 after 6 private answers" in err

    assert header(config)["private"]["noise_multiplier"] == privacy["noise_multiplier"]
    environment = json.loads((Path(config.out) / "environment.json").read_text())
    assert environment["versions"]["dp-accounting"]
    base, _ = load_model(config.model)
    jf.replay(base, RunFolder(config.out).log)
    assert jf.fingerprint(base) == json.loads(out)["fingerprint"]

    assert main(["inspect", config.out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["privacy"]["epsilon"] == privacy["epsilon"]
    assert main(["inspect", config.out]) == 0
    assert f"private   epsilon {privacy['epsilon']:.3f} at delta 1e-05" in capsys.readouterr().out
    assert main(["train", "--resume", "--out", config.out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["privacy"]["epsilon"] == privacy["epsilon"]


def test_no_loss_of_a_training_row_is_written_or_said(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training losses are made a number that would be seen anywhere, and one that is none."""
    true = Scorer.losses
    monkeypatch.setattr(Spared, "find", lambda *arguments: None)

    def marked(self: Scorer, batch: Any) -> torch.Tensor:
        return true(self, batch) * 0 + 77123.0

    monkeypatch.setattr(Scorer, "losses", marked)
    text = said(config)
    for file in Path(config.out).iterdir():
        assert b"77123" not in file.read_bytes(), file.name
    assert "77123" not in text
    kinds = {m["kind"]: m for m in RunFolder(config.out).read_metrics()[0]}
    assert set(kinds) == {"before", "validation", "private"}
    assert "loss" not in kinds["private"]

    monkeypatch.setattr(Scorer, "losses", lambda self, batch: marked(self, batch) * math.nan)
    train(
        replace(config, out=config.out + "2"), Progress(io.StringIO())
    )  # it does not crash either


def test_epsilon_goes_on_after_a_resume(config: TrainConfig) -> None:
    config = replace(config, eval_every=6)
    first = train(replace(config, max_forwards=6), Progress(io.StringIO()))
    assert first["privacy"]["epsilon"] == epsilon(config, 3)
    folder = RunFolder(config.out)
    folder.keep_metrics([m for m in folder.read_metrics()[0] if m["kind"] != "validation"])
    folder.forget_result()  # as if killed after the log's last record
    again = train(replace(config, resume=True), Progress(io.StringIO()))
    assert again["privacy"]["answers"] == again["steps"] == 6
    assert again["privacy"]["epsilon"] == epsilon(config, 6)
    lines = [m for m in folder.read_metrics()[0] if m["kind"] == "validation"]
    assert [m["epsilon"] for m in lines if m["step"]] == [epsilon(config, 3), epsilon(config, 6)]
    with pytest.raises(UserError, match=r"--noise-multiplier is 1\.0 in the run and 2\.0 now"):
        train(replace(config, resume=True, noise_multiplier=2.0), Progress(io.StringIO()))


def test_a_target_is_for_the_steps_that_were_planned(config: TrainConfig) -> None:
    config = replace(config, noise_multiplier=None, target_epsilon=5.0)
    train(config, Progress(io.StringIO()))
    assert 4.8 < epsilon(config, 6) <= 5.0
    with pytest.raises(UserError, match="which sets the noise for the target"):
        train(replace(config, resume=True, max_forwards=14), Progress(io.StringIO()))


def test_the_same_seed_twice_is_not_the_same_run(config: TrainConfig) -> None:
    first = train(config, Progress(io.StringIO()))
    second = train(replace(config, out=config.out + "2"), Progress(io.StringIO()))
    assert first["fingerprint"] != second["fingerprint"]


def test_validation_chooses_where_it_is_told_to_and_that_is_said(config: TrainConfig) -> None:
    plain = resolved(config)
    assert (plain.keep, plain.patience, plain.backoff, plain.start) == ("last", 0, False, "base")
    other = resolved(replace(config, private=False, noise_multiplier=None, target_delta=None))
    assert (other.keep, other.patience, other.backoff) == ("best", 2, True)
    text = said(replace(config, keep="best", patience=3))
    assert "--keep best and --patience 3 choose by validation rows, so those must be public" in text


def test_rows_are_looked_at_one_by_one(config: TrainConfig) -> None:
    model, tokenizer = load_model(config.model)
    scorer = Scorer(model, tokenizer, task_of(config), None)
    rows = [Example({"text": "good " * n}, "pos", "rows.csv", n) for n in (1, 5, 9, 2)]
    private = jf.Private(rows=4, batch_size=4, noise_multiplier=1.0)
    opt = jf.MeZO(model, private=private)
    closure, batch = feed(config, opt, scorer, None, rows)
    alone = [scorer.losses(scorer.encode_training([row])).item() for row in rows]
    assert closure(batch).tolist() == alone


def test_whether_layers_are_spared_is_found_out_with_validation_rows(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(Spared, "find", lambda self, m, s, rows: asked.append(len(rows)))
    train(replace(config, max_forwards=2), Progress(io.StringIO()))
    assert asked == [6]


def test_delta_follows_from_the_rows(config: TrainConfig) -> None:
    open_ = replace(config, target_delta=None)
    assert with_delta(open_, 42).target_delta == DELTA
    assert with_delta(open_, 10**6).target_delta == pytest.approx(1e-7)
    assert with_delta(replace(open_, private=False), 42).target_delta is None
    with pytest.raises(UserError, match=r"--target-delta is 0\.03, and there are 42 training rows"):
        with_delta(replace(config, target_delta=0.03), 42)
    with pytest.raises(UserError, match="--batch-size is 8: with --private"):
        with_delta(config, 7)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("schedule", ["constant", "linear"])
@pytest.mark.parametrize("looks", ["two-sided", "one-sided"])
@pytest.mark.parametrize("forwards", [6, 31])
def test_planned_steps_are_those_that_fit(
    config: TrainConfig, samples: int, schedule: Any, looks: Any, forwards: int
) -> None:
    config = replace(
        config, num_samples=samples, sample_schedule=schedule, looks=looks, max_forwards=forwards
    )
    steps = planned_steps(config)
    assert forwards_until(config, steps) <= forwards < forwards_until(config, steps + 1)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"estimator": "activation"}, "--estimator is 'activation', with --private: in activation space"),
        ({"looks": "one-point"}, "--looks is 'one-point', with --private"),
        ({"modified": "variance"}, "--modified is 'variance', with --private"),
        ({"objective": "accuracy"}, "--objective is 'accuracy', with --private"),
        ({"start": "probe"}, "--start is 'probe', with --private: it is fitted to training rows"),
        ({"start": "deep"}, "--start is 'deep', with --private"),
        ({"backoff": True}, "--backoff is True, with --private: it takes steps back by the losses"),
        ({"max_minutes": 5.0}, "--max-minutes is 5.0, with --private: how long steps take depends on the rows"),
        ({"cache": "kept"}, "--cache is 'kept', with --private"),
        ({"target_epsilon": 3.0}, "--private takes either --target-epsilon or --noise-multiplier"),
        ({"noise_multiplier": None}, "--private takes either --target-epsilon or"),
        ({"private": False}, "--target-delta is 1e-05: it is for --private"),
        ({"private": False, "target_delta": None}, "--noise-multiplier is 1.0: it is for --private"),
        ({"noise_multiplier": 0.05}, "--noise-multiplier is 0.05: it must be 0.1 to 1e6"),
        ({"clip": 0.0}, "--clip is 0.0: it must be positive"),
        ({"target_delta": 1.0}, "--target-delta is 1.0: it must be between 0 and 1"),
        ({"target_epsilon": math.inf}, "--target-epsilon is inf: it must be positive and finite"),
        ({"batch_size": 43}, "--batch-size is 43: with --private"),
    ],
)  # fmt: skip
def test_what_is_refused_before_anything_is_made(
    config: TrainConfig, values: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError) as error:
        train(replace(config, **values), Progress(io.StringIO()))
    assert said in str(error.value)
    assert not Path(config.out).exists()


def test_a_library_that_is_missing_is_named(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(UserError, match=r"pip install 'justforward\[private\]'"):
        train(config, Progress(io.StringIO()))
    assert not Path(config.out).exists()
