"""Training: learns, stops when told, chooses without the test rows, goes on to the same bits.

Runs are tiny and in this process; what a SIGKILL leaves behind is tried in test_faults.py.
"""

from __future__ import annotations

import gc
import io
import os
import random
import re
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import justforward as jf
from conftest import small_run
from justforward import folder as folder_module
from justforward import prepare, session
from justforward.config import TrainConfig
from justforward.data import read_examples
from justforward.errors import NonFiniteLoss, UserError
from justforward.evaluate import Evaluation, Scorer
from justforward.folder import RunFolder, row_hash
from justforward.models import load_model
from justforward.optim import MeZO
from justforward.outcome import Interrupted
from justforward.prepare import split_rows, stop_reason, stop_signals
from justforward.progress import Progress
from justforward.run import train
from justforward.settings import resolved

Result = dict[str, Any]


@pytest.fixture
def config(tmp_path: Path, model_folder: Path, sentiment_csv: Path) -> TrainConfig:
    """Ten steps. The words are swapped, so that the model has everything to learn."""
    return small_run(model_folder, sentiment_csv, tmp_path / "run")


def go(config: TrainConfig) -> Result:
    return train(config, Progress(io.StringIO()))


def said(config: TrainConfig) -> str:
    out = io.StringIO()
    train(config, Progress(out))
    return out.getvalue()


def elsewhere(config: TrainConfig, name: str = "other", **values: Any) -> TrainConfig:
    return replace(config, out=str(Path(config.out).with_name(name)), **values)


def timeless(config: TrainConfig) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    metrics, torn = RunFolder(config.out).read_metrics()
    assert torn == 0
    times = ("seconds", "step_seconds")
    return [{k: v for k, v in metric.items() if k not in times} for metric in metrics]


def in_order(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(metrics, key=lambda m: (m["step"], m["kind"]))


def contents(path: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in Path(path).iterdir()}


def free(config: TrainConfig) -> bool:
    """Whether another session could begin."""
    folder = RunFolder(config.out)
    try:
        folder.lock()
    except UserError:
        return False
    folder.unlock()
    return True


def replayed(config: TrainConfig, steps: int | None = None) -> str:
    model, _ = load_model(config.model)
    jf.replay(model, RunFolder(config.out).log, steps)
    return jf.fingerprint(model)


# ------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("estimator", ["activation", "weight"])
def test_it_learns_and_the_log_is_the_model(config: TrainConfig, estimator: str) -> None:
    config = replace(config, estimator=estimator, max_forwards=60, backoff=False)
    result = go(config)
    assert result["before_accuracy"] == 0.0
    assert result["accuracy"] >= 0.5
    assert result["loss"] < result["before_loss"]
    assert (result["status"], result["stopped_by"]) == ("finished", "max_forwards")
    assert (result["steps"], result["forwards"]) == (30, 60)
    assert result["rows"] == {
        "train": 42, "validation": 6, "test": 12, "duplicates": 0, "conflicts": 0,
    }  # fmt: skip
    assert replayed(config, result["kept_step"]) == result["fingerprint"]
    assert result == RunFolder(config.out).read_result()
    again = elsewhere(config)
    assert go(again)["fingerprint"] == result["fingerprint"]
    assert timeless(again) == timeless(config)


def test_the_folder(config: TrainConfig) -> None:
    go(config)
    folder = RunFolder(config.out)
    assert set(contents(config.out)) == {
        "config.yaml", "environment.json", "trajectory.jfl", "metrics.jsonl", "seen.txt", "result.json",
        ".lock",
    }  # fmt: skip
    kept = folder.read_config()
    assert kept == resolved(replace(config, test_size=12, validation_size=6))
    environment = folder.read_environment()
    base, _ = load_model(config.model)
    assert environment["base_fingerprint"] == jf.fingerprint(base)
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["threads"] == 1
    log = jf.read_log(folder.log)
    assert log.sealed
    assert len(log.steps) == 10
    metrics = timeless(config)
    assert [(m["kind"], m["step"]) for m in metrics if m["kind"] != "step"] == [
        ("before", 0), ("validation", 0), ("validation", 3), ("validation", 6),
        ("validation", 9), ("validation", 10),
    ]  # fmt: skip
    steps = [m for m in metrics if m["kind"] == "step"]
    assert [m["step"] for m in steps] == list(range(1, 11))
    assert [m["forwards"] for m in steps] == list(range(2, 21, 2))
    assert [m["lr"] for m in steps] == pytest.approx([3e-2 * (1 - i / 10) for i in range(10)])
    rows = split_rows(kept, read_examples(config.data, kept_task(kept)))[1]
    assert folder.read_seen() == {row_hash(row) for row in rows.train + rows.validation}


def kept_task(config: TrainConfig) -> Any:
    return prepare.task_of(config)


@pytest.mark.parametrize(
    "values",
    [
        {"rule": "sgd+momentum(0.5, window=3)", "lr": 1e-3, "lr_schedule": "constant"},
        {"family": "rademacher", "weight_decay": 0.1, "lr_schedule": "cosine"},
        {"rule": "clip(3)+adam(window=3)", "lr": 1e-3, "lr_schedule": "cosine"},
        {"num_samples": 3, "sample_schedule": "linear", "max_forwards": 36},
        {"estimator": "weight", "num_samples": 2, "tune": r"mlp|wte"},
        {"loss": "vocabulary", "truncation": "left", "max_length": 12, "batch_size": 3},
        {"train_size": 5, "test_size": 0.2, "validation_size": 0.1, "split_seed": 3},
    ],
)
def test_options_reach_the_log(config: TrainConfig, values: dict[str, Any]) -> None:
    config = replace(config, **values)
    result = go(config)
    assert result["forwards"] <= config.max_forwards
    assert replayed(config, result["kept_step"]) == result["fingerprint"]
    other = elsewhere(config, seed=1, split_seed=config.split_seed or 0)
    go(other)
    assert replayed(other) != replayed(config)


def test_only_the_tuned_parameters_move(config: TrainConfig) -> None:
    config = replace(config, tune=r"ln_f|h\.1\.mlp", keep="last")
    go(config)
    base, tuned = load_model(config.model)[0], load_model(config.model)[0]
    jf.replay(tuned, RunFolder(config.out).log)
    for (name, a), b in zip(base.named_parameters(), tuned.parameters(), strict=True):
        assert torch.equal(a, b) != ("ln_f" in name or "h.1.mlp" in name), name


# -------------------------------------------------------------------------------------- when it stops


def test_target_accuracy(config: TrainConfig) -> None:
    result = go(replace(config, max_forwards=400, target_accuracy=0.8))
    assert result["stopped_by"] == "target_accuracy"
    assert 0 < result["steps"] < 200
    assert result["validation_accuracy"] >= 0.8
    assert result["kept_step"] == result["steps"]
    done = elsewhere(config, labels={"neg": "terrible", "pos": "great"}, target_accuracy=0.9)
    result = go(done)  # knows it already
    assert (result["stopped_by"], result["steps"], result["forwards"]) == ("target_accuracy", 0, 0)
    assert result["accuracy"] == result["before_accuracy"] == 1.0
    assert result["fingerprint"] == replayed(done, 0)


def test_max_minutes(config: TrainConfig) -> None:
    config = replace(config, max_forwards=1_000_000, eval_every=None, max_minutes=0.02)
    result = go(config)
    assert result["stopped_by"] == "max_minutes"
    assert 1.2 <= result["seconds"] < 30.0
    assert 0 < result["steps"] < 500_000
    assert RunFolder(config.out).read_metrics()[0][-1]["step"] == result["steps"]
    more = go(replace(config, resume=True, max_minutes=0.02 + result["seconds"] / 60))
    assert more["steps"] > result["steps"]


def test_stop_reasons(config: TrainConfig) -> None:
    config = resolved(replace(config, max_minutes=1.0, target_accuracy=0.5, num_samples=3))
    good = [{"kind": "validation", "step": 4, "accuracy": 0.5, "loss": 1.0}]
    assert stop_reason(config, 0, 0, 0.0, []) is None
    assert stop_reason(config, 2, 14, 0.0, []) is None
    assert stop_reason(config, 2, 15, 0.0, []) == "max_forwards"
    assert stop_reason(config, 2, 0, 60.0, []) == "max_minutes"
    assert stop_reason(config, 4, 0, 0.0, good) == "target_accuracy"
    assert stop_reason(config, 3, 0, 0.0, good) is None  # of a step that is no more


def score_as(
    monkeypatch: pytest.MonkeyPatch, say: Callable[[int, int, Evaluation], tuple[float, float]]
) -> list[tuple[int, int]]:
    """Let `say(rows, count of calls with as many rows, found)` replace accuracy and loss."""
    calls: list[tuple[int, int]] = []
    evaluate = Scorer.evaluate

    def scripted(self: Scorer, examples: Any, batch_size: int) -> Evaluation:
        found = evaluate(self, examples, batch_size)
        rows = len(examples)
        number = sum(r == rows for r, _ in calls)
        calls.append((rows, number))
        accuracy, loss = say(rows, number, found)
        return replace(found, accuracy=accuracy, loss=loss)

    monkeypatch.setattr(Scorer, "evaluate", scripted)
    return calls


@pytest.mark.parametrize(
    ("validations", "best"),
    [
        ([(0.5, 1), (0.9, 1), (0.8, 0), (0.7, 0), (0.1, 0)], 3),
        ([(0.5, 1), (0.5, 2), (0.5, 0.5), (0.5, 0.7), (0.5, 0.5)], 6),  # then loss, the earliest
        ([(1.0, 1), (0.5, 0), (0.5, 0), (0.5, 0), (0.5, 0)], 0),
        ([(0.1, 1), (0.2, 1), (0.3, 1), (0.4, 1), (0.5, 1)], 10),
    ],
)
def test_the_best_step_is_kept(
    config: TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
    validations: list[tuple[float, float]],
    best: int,
) -> None:
    calls = score_as(
        monkeypatch,
        lambda rows, n, found: validations[n] if rows == 6 else (found.accuracy, found.loss),
    )
    config = replace(config, backoff=False)
    result = go(config)
    assert calls.count((6, 4)) == 1
    assert result["kept_step"] == result["best_step"] == best
    assert result["validation_accuracy"] == validations[min(best // 3, 4) if best < 10 else 4][0]
    assert result["fingerprint"] == replayed(config, best)
    assert len(jf.read_log(RunFolder(config.out).log).steps) == 10
    calls.clear()
    last = go(elsewhere(config, keep="last"))
    assert (last["kept_step"], last["best_step"]) == (10, best)
    assert last["fingerprint"] == replayed(config, 10)


# ------------------------------------------------------------------------------- the test rows are safe


def test_test_rows_choose_nothing(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their score, everything but the score itself is the same."""
    result = go(config)
    calls = score_as(
        monkeypatch,
        lambda rows, n, found: (1.0 - n, 7.0) if rows == 12 else (found.accuracy, found.loss),
    )
    other = elsewhere(config)
    lied = go(other)
    assert [call for call in calls if call[0] == 12] == [(12, 0), (12, 1)]  # before and after
    assert (lied["before_accuracy"], lied["accuracy"], lied["loss"]) == (1.0, 0.0, 7.0)
    for key in ("fingerprint", "kept_step", "validation_accuracy", "validation_loss", "steps"):
        assert lied[key] == result[key]
    assert timeless(other)[1:] == timeless(config)[1:]


def test_training_never_sees_them(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[str] = set()
    encode = Scorer.encode

    def recorded(self: Scorer, examples: Any, *more: Any, **named: Any) -> Any:
        if len(examples) == 8:  # a batch of training; no split of 60 rows has as many
            seen.update(row.fields["text"] for row in examples)
        return encode(self, examples, *more, **named)

    monkeypatch.setattr(Scorer, "encode", recorded)
    go(config)
    rows = split_rows(RunFolder(config.out).read_config(), read_examples(config.data, kept_task(config)))[1]  # fmt: skip
    texts = [{row.fields["text"] for row in part} for part in (rows.train, rows.validation, rows.test)]  # fmt: skip
    assert seen == texts[0]
    assert not seen & (texts[1] | texts[2])


def test_the_test_split_depends_on_its_own_settings_only(config: TrainConfig) -> None:
    rows = read_examples(config.data, kept_task(config))
    config = resolved(replace(config, split_seed=4))
    filled, splits = split_rows(config, rows)
    assert (filled.test_size, filled.validation_size) == (12, 6)
    for values in (
        {"validation_size": 10}, {"train_size": 4}, {"seed": 9}, {"max_forwards": 4},
        {"estimator": "weight", "lr": 0.5, "batch_size": 2}, {"test_size": 0.2},
    ):  # fmt: skip
        again = split_rows(replace(config, **values), rows)[1]
        assert again.test == splits.test, values
    assert split_rows(replace(config, split_seed=5), rows)[1].test != splits.test


# ---------------------------------------------------------------------------------------- interrupted


@contextmanager
def at_call(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> Iterator[Any]:
    """`act()` in the middle of the n-th call of the loss (from 0)."""
    calls: list[int] = []
    losses = Scorer.losses

    def counted(self: Scorer, batch: Any) -> Any:
        calls.append(1)
        if len(calls) == number + 1:
            act()
        return losses(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "losses", counted)
        yield calls


@pytest.mark.parametrize("estimator", ["activation", "weight"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_and_resume_ends_alike(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, estimator: str, number: int
) -> None:
    config = replace(config, estimator=estimator)
    result = go(config)
    for call in (0, 5, 9):
        cut = elsewhere(config, f"cut{call}")
        handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
        with (
            at_call(monkeypatch, call, lambda: signal.raise_signal(number)),
            pytest.raises(Interrupted) as caught,
        ):
            go(cut)
        assert handlers == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
        so_far = caught.value.result
        assert so_far is not None
        assert so_far == RunFolder(cut.out).read_result()
        assert (so_far["status"], so_far["accuracy"]) == ("interrupted", None)
        log = jf.read_log(RunFolder(cut.out).log)
        assert log.sealed
        assert len(log.steps) == so_far["steps"] < 10
        assert go(replace(cut, resume=True))["fingerprint"] == result["fingerprint"]
        assert in_order(timeless(cut)) == in_order(timeless(config))
        assert replayed(cut) == replayed(config)


def test_a_signal_outside_the_forwards_waits_for_the_step_and_its_line(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(config)
    apply = MeZO._apply

    def interrupted(self: MeZO, step: Any, *rest: Any) -> None:
        if step.index == 4:
            signal.raise_signal(signal.SIGINT)
        apply(self, step, *rest)

    cut = elsewhere(config)
    with monkeypatch.context() as patch:
        patch.setattr(MeZO, "_apply", interrupted)
        with pytest.raises(Interrupted) as caught:
            go(cut)
    assert caught.value.result is not None
    assert caught.value.result["steps"] == 5
    assert timeless(cut)[-1]["step"] == 5
    go(replace(cut, resume=True))
    assert in_order(timeless(cut)) == in_order(timeless(config))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_from_another_thread_at_any_time(config: TrainConfig) -> None:
    """Several sessions, each stopped by a helper after a while of its own."""
    config = replace(config, max_forwards=160, eval_every=20)
    result = go(config)
    dealt = random.Random(3)
    cut = elsewhere(config)
    sessions = 0
    # longer and longer: on a busy machine a session takes its time to begin
    while not (done := _session(cut, dealt.uniform(0.02, 0.25) * (1 + sessions / 10))):
        sessions += 1
        if Path(cut.out).exists():
            cut = replace(cut, resume=True)
        assert sessions < 100
    gc.collect()  # what an interrupt between two lines has left open
    assert done["fingerprint"] == result["fingerprint"]
    assert in_order(timeless(cut)) == in_order(timeless(config))


def _session(config: TrainConfig, seconds: float) -> Result:
    over: list[bool] = []

    def interrupt(number: int, frame: Any) -> None:
        if not over:
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, interrupt)
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        try:
            return go(config)
        finally:
            over.append(True)
    except (Interrupted, KeyboardInterrupt):
        return {}
    finally:
        timer.cancel()
        timer.join()
        signal.signal(signal.SIGINT, previous)


def test_a_signal_before_the_first_step_leaves_nothing(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    score_as(monkeypatch, lambda rows, n, found: signal.raise_signal(signal.SIGINT) or (0.0, 0.0))
    with pytest.raises(Interrupted) as caught:
        go(config)
    assert caught.value.result is None
    assert not Path(config.out).exists()
    monkeypatch.undo()
    write = RunFolder.write_environment

    def interrupted(self: RunFolder, environment: Any) -> None:
        write(self, environment)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RunFolder, "write_environment", interrupted)
    with pytest.raises(Interrupted):
        go(config)
    assert not Path(config.out).exists()


def test_sigterm_where_sigint_is_ignored(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a job in the background of a script: heard between steps."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with (
            at_call(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGTERM)) as calls,
            pytest.raises(Interrupted),
        ):
            go(config)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert len(calls) == 4
    assert len(jf.read_log(RunFolder(config.out).log).steps) > 0


def test_stop_signals_in_a_thread_do_nothing() -> None:
    found: list[bool] = []

    def inside() -> None:
        with stop_signals() as stop:
            stop.check()
            found.append(stop.asked)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert found == [False]


# ------------------------------------------------------------------------------------------- resuming


def test_a_finished_run_is_left_alone(config: TrainConfig) -> None:
    result = go(config)
    before = contents(config.out)
    assert go(replace(config, resume=True)) == result
    assert contents(config.out) == before
    assert "the run is finished (max_forwards): nothing to do" in said(replace(config, resume=True))


def test_a_finished_run_goes_on_under_another_limit(config: TrainConfig) -> None:
    config = replace(config, lr_schedule="constant", keep="last")
    go(config)
    longer = replace(config, max_forwards=30, resume=True)
    result = go(longer)
    whole = elsewhere(config, max_forwards=30)
    assert result["fingerprint"] == go(whole)["fingerprint"]
    assert (result["forwards"], result["stopped_by"]) == (30, "max_forwards")
    assert RunFolder(config.out).read_config().max_forwards == 30


def test_a_second_session_is_refused(config: TrainConfig) -> None:
    go(config)
    other = RunFolder(config.out)
    other.lock()
    before = contents(config.out)
    with pytest.raises(UserError, match="another train is at work in this folder"):
        go(replace(config, resume=True, lr_schedule=config.lr_schedule))
    assert contents(config.out) == before
    other.unlock()
    go(replace(config, resume=True))


def test_a_session_at_work_holds_the_folder(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[bool] = []

    def second() -> None:
        refused.append(not free(config))

    with at_call(monkeypatch, 5, second):
        go(config)
    assert refused == [True]
    assert free(config)


@pytest.mark.parametrize(
    "values",
    [
        {"lr": 1e-2}, {"eps": 2e-3}, {"seed": 1}, {"rule": "sgd"}, {"estimator": "weight"},
        {"batch_size": 4}, {"num_samples": 2}, {"template": "{text} So"}, {"max_forwards": 40},
        {"labels": {"neg": "bad", "pos": "good"}}, {"test_size": 10}, {"tune": "mlp"},
        {"keep": "last"}, {"family": "rademacher"}, {"max_length": 30}, {"split_seed": 3},
    ],
)  # fmt: skip
def test_another_config_is_refused(config: TrainConfig, values: dict[str, Any]) -> None:
    go(config)
    before = contents(config.out)
    name = next(iter(values)).replace("_", "-")
    with pytest.raises(UserError, match=f"run: --{name} is .* in the run and .* now") as caught:
        go(replace(config, resume=True, **values))
    assert "resume with the run's value, or choose another --out" in str(caught.value)
    assert contents(config.out) == before
    assert free(config)


def test_another_model_or_data_is_refused_and_a_moved_one_is_not(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        at_call(monkeypatch, 4, lambda: signal.raise_signal(signal.SIGINT)),
        pytest.raises(Interrupted),
    ):
        go(config)
    before = contents(config.out)
    data = tmp_path / "more.csv"
    data.write_bytes(Path(config.data).read_bytes() + b"one more row,neg\n")
    with pytest.raises(UserError, match=r"more\.csv', whose content is not what the run was"):
        go(replace(config, resume=True, data=str(data)))
    model, tokenizer = load_model(config.model)
    with torch.no_grad():
        next(model.parameters())[3, 1] += 1e-3
    model.save_pretrained(tmp_path / "nudged")
    tokenizer.save_pretrained(tmp_path / "nudged")
    with pytest.raises(UserError, match=r"nudged', whose fingerprint is .*: give that model"):
        go(replace(config, resume=True, model=str(tmp_path / "nudged")))
    assert contents(config.out) == before

    Path(config.data).rename(tmp_path / "moved.csv")
    Path(config.model).rename(tmp_path / "moved")
    moved = replace(config, data=str(tmp_path / "moved.csv"), model=str(tmp_path / "moved"))
    assert go(replace(moved, resume=True))["status"] == "finished"
    assert RunFolder(config.out).read_config().data == moved.data


def test_what_differs_in_the_machine_is_said(config: TrainConfig) -> None:
    go(config)
    folder = RunFolder(config.out)
    environment = folder.read_environment()
    environment["versions"]["torch"] = "1.0"
    folder.write_environment({**environment, "threads": 7})
    text = said(replace(config, resume=True))
    assert f"note: torch was 1.0 and is {torch.__version__}" in text
    assert "note: 7 threads then, 1 now" in text
    assert "(--threads 7 for the same)" in text


@pytest.mark.parametrize("cut", ["log", "metrics", "both", "validations", "all", "result"])
def test_lost_ends_are_made_good(config: TrainConfig, cut: str) -> None:
    """What a crash of the machine may leave: files that end at different moments."""
    result = go(config)
    whole = timeless(config)
    folder = RunFolder(config.out)
    (folder.path / "result.json").unlink()
    metrics = folder.read_metrics()[0]
    if cut in ("log", "both"):
        raw = folder.log.read_bytes()
        folder.log.write_bytes(raw[: len(raw) - 12 - 40])  # the seal, and a step and a bit
    if cut in ("metrics", "both"):
        raw = (folder.path / "metrics.jsonl").read_bytes()
        (folder.path / "metrics.jsonl").write_bytes(raw[:-7])  # the last validation
    if cut == "validations":
        folder.keep_metrics([m for m in metrics if m["kind"] == "step"])
    if cut == "all":
        (folder.path / "metrics.jsonl").unlink()
    again = go(replace(config, resume=True))
    for key in ("fingerprint", "accuracy", "loss", "kept_step", "before_accuracy", "forwards"):
        assert again[key] == result[key], key
    kept = in_order(timeless(config))
    if cut == "all":  # losses of steps are not in the log
        assert kept == [m for m in in_order(whole) if m["kind"] != "step"]
    else:
        assert kept == in_order(whole)


def test_a_damaged_folder_is_refused_by_name(config: TrainConfig) -> None:
    go(config)
    folder = RunFolder(config.out)
    raw = bytearray(folder.log.read_bytes())
    raw[-30] ^= 4
    folder.log.write_bytes(bytes(raw))
    with pytest.raises(UserError, match=r"trajectory\.jfl: damaged"):
        go(replace(config, resume=True))
    assert free(config)
    (folder.path / "environment.json").unlink()
    with pytest.raises(UserError, match=r"not a run folder: environment\.json is missing"):
        go(replace(config, resume=True))


# ------------------------------------------------------------------------------------------- bad input


def test_nothing_is_written_for_bad_input(config: TrainConfig) -> None:
    for values, text in (
        ({"estimator": "both"}, "--estimator is 'both': it must be one of weight, activation"),
        ({"family": "cauchy"}, "--family is 'cauchy': it must be one of gaussian"),
        ({"tune": "nothing"}, "--tune is 'nothing': it finds none of the 28 parameters"),
        ({"data": "none.csv"}, r"none\.csv: no such file"),
        ({"model": "no/such/model"}, "no such folder"),
        ({"max_length": 65}, "max_length 65 is beyond the model's context of 64"),
        ({"test_size": 60}, "asked for validation, 0 different rows are left"),
    ):
        out = io.StringIO()
        with pytest.raises(UserError, match=text):
            train(replace(config, **values), Progress(out))
        assert not Path(config.out).exists()
        assert out.getvalue() == ""
    go(config)
    before = contents(config.out)
    with pytest.raises(UserError, match="run: exists: continue it with --resume or choose"):
        go(config)
    assert contents(config.out) == before


def test_what_the_first_look_refuses_leaves_nothing(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scorer, "losses", lambda self, batch: torch.zeros(()))
    with pytest.raises(UserError, match="one loss a row"):
        go(config)
    assert not Path(config.out).exists()


@pytest.mark.parametrize("estimator", ["activation", "weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, estimator: str, value: float
) -> None:
    config = replace(config, estimator=estimator, backoff=False)
    result = go(config)
    broken = elsewhere(config)
    losses, models = Scorer.losses, []

    def spoiled(self: Scorer, batch: Any) -> Any:
        models.append(self.model)
        found = losses(self, batch)
        return found * value if len(models) == 9 else found

    monkeypatch.setattr(Scorer, "losses", spoiled)
    with pytest.raises(
        NonFiniteLoss, match=r"step \d+: the loss is (nan|inf) at [+-]eps"
    ) as caught:
        go(broken)
    assert caught.value.step > 0
    assert jf.fingerprint(models[-1]) == replayed(broken)  # restored
    so_far = RunFolder(broken.out).read_result()
    assert so_far is not None
    assert (so_far["status"], so_far["stopped_by"]) == ("failed", "non-finite loss")
    assert so_far["steps"] == caught.value.step
    monkeypatch.undo()
    assert go(replace(broken, resume=True))["fingerprint"] == result["fingerprint"]


def test_weights_that_break_between_steps(config: TrainConfig) -> None:
    config = replace(config, estimator="weight", rule="sgd", lr=1e25, eval_every=2, backoff=False)
    with pytest.raises(
        UserError, match=r"^step \d+: .*rows\.csv:\d+: the scores are not finite.* --lr"
    ) as caught:
        go(config)
    so_far = RunFolder(config.out).read_result()
    assert so_far is not None
    assert so_far["status"] == "failed"
    assert str(caught.value).startswith(f"step {so_far['steps']}: ")


# ------------------------------------------------------------------------------------------- full disks


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def refused_with(config: TrainConfig, limit: int) -> str:
    with files_of_at_most(limit), pytest.raises(UserError, match="cannot be ") as caught:
        go(config)
    return str(caught.value)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("samples", "file"), [(1, "metrics.jsonl"), (9, "trajectory.jfl")])
def test_files_that_may_not_grow(config: TrainConfig, samples: int, file: str) -> None:
    """Wherever the room ends, the run says so in one line, and goes on once there is room."""
    config = replace(config, num_samples=samples, max_forwards=20 * samples, eval_every=6 * samples)
    result = go(config)
    sizes = {name: len(raw) for name, raw in contents(config.out).items()}
    assert max(sizes, key=lambda name: sizes[name]) == file  # the one that ends most of the runs
    begun = 0
    # seconds are spelled with more or fewer digits: the metrics of another run are not as long
    most = sizes[file] - 1 if file == "trajectory.jfl" else sizes[file] * 17 // 20
    for limit in [0, 100, 600, 1200, *range(1300, most, sizes[file] // 14), most]:
        cut = elsewhere(config, f"full{limit}")
        text = refused_with(cut, limit)
        assert re.search("File too large|No space left", text), text
        assert "\n" not in text
        if not Path(cut.out).exists():
            assert limit < 1300  # what is written before the first step
            continue
        begun += 1
        assert not list(Path(cut.out).glob(".*.*"))
        assert go(replace(cut, resume=True))["fingerprint"] == result["fingerprint"], limit
        assert [m for m in timeless(config) if m not in timeless(cut)] == []
    assert begun >= 4
    gc.collect()  # a log that cannot be sealed is closed here


def test_a_read_only_place(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module.os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=r"cannot be made: .* is read-only: choose another --out"):
        go(config)
    assert not Path(config.out).exists()


# ----------------------------------------------------------------------------------------- snapshots


def test_a_run_goes_on_from_its_snapshot(config: TrainConfig) -> None:
    result = go(config)
    cut = elsewhere(config, "cut", snapshot_every=3, keep_snapshots=2)
    go(cut)
    folder = RunFolder(cut.out)
    assert sorted(p.name for p in folder.snapshots.iterdir()) == ["step-00000006", "step-00000009"]
    folder.log.write_bytes(folder.log.read_bytes()[:-12])
    (folder.path / "result.json").unlink()
    part = folder.snapshots / "step-00000009" / "part-00000.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    out = io.StringIO()
    again = train(replace(cut, resume=True, sync="step"), Progress(out))
    assert again["fingerprint"] == result["fingerprint"]
    assert "step-00000009: part-00000.safetensors is damaged" in out.getvalue()
    assert timeless(cut) == timeless(config)


def test_a_snapshot_that_cannot_be_written_does_not_stop_a_run(config: TrainConfig) -> None:
    result = go(config)
    largest = max(len(raw) for raw in contents(config.out).values())
    cut = elsewhere(config, "cut", snapshot_every=5)
    out = io.StringIO()
    with files_of_at_most(largest + 500):
        again = train(cut, Progress(out))
    assert again["fingerprint"] == result["fingerprint"]
    assert out.getvalue().count("note: no snapshot of step") == 2
    assert list(RunFolder(cut.out).snapshots.iterdir()) == []


def test_a_rewind_takes_snapshots_back_and_keeps_others_off(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rewind replaces the log: the folder stays locked, and a snapshot of what was taken back is gone."""
    config = replace(config, max_forwards=12, snapshot_every=1, keep_snapshots=9)
    seen: list[tuple[bool, list[str]]] = []
    rewind = session.Session._rewind

    def watched(self: Any, step: int, why: str) -> None:
        rewind(self, step, why)
        names = sorted(p.name for p in self.folder.snapshots.iterdir())
        seen.append((free(config), names))

    monkeypatch.setattr(session.Session, "_rewind", watched)
    losses = Scorer.losses

    def broken(self: Any, batch: Any) -> Any:
        out = losses(self, batch)
        return out * float("nan") if not seen and len(jf.read_log(log).steps) == 4 else out

    log = RunFolder(config.out).log
    monkeypatch.setattr(Scorer, "losses", broken)
    go(config)
    assert seen[0][0] is False
    assert "step-00000004" not in seen[0][1]


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried"),
              RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_memory_that_runs_out_in_a_step(
    config: TrainConfig, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = go(config)
    cut = elsewhere(config, "cut")

    def fail() -> None:
        raise error

    with (
        at_call(monkeypatch, 6, fail),
        pytest.raises(UserError, match=r"^out of memory \(.*\): \d steps were taken, .* --resume"),
    ):
        go(cut)
    assert free(cut)
    assert go(replace(cut, resume=True))["fingerprint"] == result["fingerprint"]


def test_a_step_without_its_line_is_taken_again(config: TrainConfig) -> None:
    result = go(config)
    folder = RunFolder(config.out)
    whole = timeless(config)
    metrics = folder.read_metrics()[0]
    folder.keep_metrics([m for m in metrics if m["step"] < 10])
    (folder.path / "result.json").unlink()
    assert "step 10 has no line in metrics.jsonl: it is taken again" in said(
        replace(config, resume=True)
    )
    assert timeless(config) == whole
    again = folder.read_result()
    assert again is not None
    assert again["fingerprint"] == result["fingerprint"]
