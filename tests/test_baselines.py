"""Baselines: the rows, prompts and choices of `train`; test rows last and once; the command and its refusals.

Reading order: the same rows, zero-shot, demonstrations, probe, first-order, the command, what is refused.
"""

from __future__ import annotations

import io
import json
import signal
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from conftest import make_model, make_tokenizer
from justforward import baselines, report
from justforward.baselines import choose_demonstrations, run_baseline
from justforward.cli import main
from justforward.config import BaselineConfig, EvalConfig, TrainConfig
from justforward.data import Example, read_examples
from justforward.errors import UserError
from justforward.evaluate import Evaluation, Scorer
from justforward.first_order import LEARNING_RATES
from justforward.models import load_model
from justforward.playback import fingerprint
from justforward.progress import Progress
from justforward.rebuild import evaluate
from justforward.run import train
from justforward.tasks import Task

Result = dict[str, Any]
METHODS = ("zero-shot", "icl", "probe", "first-order")
# The words are swapped, so that the model has everything to learn.
TASK: dict[str, Any] = {"template": "{text} It was", "labels": {"neg": "great", "pos": "terrible"}}


@pytest.fixture
def config(model_folder: Path, sentiment_csv: Path) -> BaselineConfig:
    """60 rows: 42 for training, 6 for validation, 12 for the test."""
    return BaselineConfig(
        method="zero-shot", model=str(model_folder), data=str(sentiment_csv), threads=1, **TASK
    )


@pytest.fixture
def films(tmp_path: Path) -> tuple[Path, Path]:
    """A declared task whose metric is F1, and the folder with its files."""
    folder = tmp_path / "films"
    folder.mkdir()
    for name, count in (("train", 40), ("test", 30)):
        rows = [
            {"text": f"{name} {i} was {('bad', 'good')[i % 2]}", "label": ("neg", "pos")[i % 2]}
            for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    declared = tmp_path / "films.yaml"
    declared.write_text(
        'name: films\ntitle: Films\ntemplate: "{text} It was"\nlabels: {neg: great, pos: terrible}\n'
        "metrics: [f1, accuracy]\npositive: pos\n"
        "splits: {train: [train.jsonl], test: [test.jsonl]}\n"
    )
    return declared, folder


def go(config: BaselineConfig, **values: Any) -> Result:
    return run_baseline(replace(config, **values), Progress(io.StringIO()))


def first_order(config: BaselineConfig, **values: Any) -> Result:
    base: dict[str, Any] = {"max_steps": 8, "eval_every": 4, "lr": 1e-2}
    return go(config, method="first-order", **{**base, **values})


def watch(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Which rows are evaluated, in order of the evaluations."""
    seen: list[list[str]] = []
    original = Scorer.evaluate

    def watched(self: Scorer, rows: Sequence[Example], batch_size: int) -> Evaluation:
        seen.append([row.where for row in rows])
        return original(self, rows, batch_size)

    monkeypatch.setattr(Scorer, "evaluate", watched)
    return seen


def task_of(config: BaselineConfig) -> Task:
    assert config.template is not None
    return Task(config.template, TASK["labels"])


def timeless(result: Result) -> Result:
    """Without what depends on the clock."""
    curve = [{**m, "seconds": 0} for m in result.get("curve", [])]
    clocks = {"seconds": 0, "train_seconds": 0, "fit_seconds": 0}
    return {**result, **clocks, "curve": curve}


# -------------------------------------------------------------------------------------- the same rows


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"seed": 3},
        {"split_seed": 5, "seed": 1},
        {"test_size": 20, "validation_size": 10, "train_size": 12},
        {"test_size": 0.25, "validation_size": 0.2},
    ],
)
def test_the_rows_of_train(
    config: BaselineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    seen = watch(monkeypatch)
    trained = train(
        TrainConfig(model=config.model, data=config.data, out=str(tmp_path / "run"), threads=1,
                    max_forwards=2, start="base", **TASK, **options),
        Progress(io.StringIO()),
    )  # fmt: skip
    test, validation = seen[0], seen[1]
    assert len(test) > len(validation)
    for method in ("zero-shot", "first-order"):
        seen.clear()
        more = {"max_steps": 1} if method == "first-order" else {}
        found = go(config, method=method, **options, **more)
        assert seen == [*([validation] * (1 + len(more))), test]
        assert found["rows"] == trained["rows"]
    monkeypatch.setattr(Scorer, "evaluate", None)  # a probe has scores of its own
    assert go(config, method="probe", **options)["rows"] == trained["rows"]


def test_the_rows_of_a_task(
    config: BaselineConfig,
    films: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    declared, folder = films
    seen = watch(monkeypatch)
    options: dict[str, Any] = {
        "task": str(declared),
        "data": str(folder),
        "shots": 4,
        "split_seed": 2,
    }
    trained = train(
        TrainConfig(model=config.model, out=str(tmp_path / "run"), threads=1, max_forwards=2, start="base", **options),
        Progress(io.StringIO()),
    )  # fmt: skip
    test, validation = seen[0], seen[1]
    seen.clear()
    found = go(config, template=None, labels=None, **options)
    assert seen == [validation, test]
    assert found["rows"] == trained["rows"]
    assert (found["rows"]["train"], found["rows"]["validation"]) == (8, 8)
    assert found["metric"] == "f1"
    assert found["value"] == found["f1"]
    assert {"f1", "accuracy", "loss"} <= found.keys()
    for method in METHODS:
        more = {"max_steps": 2} if method == "first-order" else {}
        each = go(config, template=None, labels=None, method=method, **more, **options)
        assert each["metric"] == "f1"
        assert each["value"] == pytest.approx(each["f1"])
        assert each["rows"] == trained["rows"]


def test_a_tuner_starts_where_it_does_in_train(config: BaselineConfig, tmp_path: Path) -> None:
    """With a step of no length, both have the same model."""
    for tuner in ("lora", "prefix"):
        options: dict[str, Any] = {"tuner": tuner, "seed": 7}
        trained = train(
            TrainConfig(model=config.model, data=config.data, out=str(tmp_path / tuner), threads=1,
                        max_forwards=2, lr=1e-30, start="base", **TASK, **options),
            Progress(io.StringIO()),
        )  # fmt: skip
        found = first_order(config, lr=1e-30, max_steps=1, **options)
        assert found["loss"] == pytest.approx(trained["before_loss"], abs=1e-6)


# -------------------------------------------------------------------------------------------- zero-shot


def test_zero_shot_is_eval_on_the_test_rows(config: BaselineConfig, tmp_path: Path) -> None:
    found = go(config)
    trained = train(
        TrainConfig(model=config.model, data=config.data, out=str(tmp_path / "run"), threads=1,
                    max_forwards=2, start="base", **TASK),
        Progress(io.StringIO()),
    )  # fmt: skip
    assert (found["accuracy"], found["loss"]) == (
        trained["before_accuracy"],
        trained["before_loss"],
    )
    assert (found["metric"], found["value"]) == ("accuracy", found["accuracy"])
    assert (found["steps"], found["forwards"], found["backwards"]) == (0, 0, 0)
    assert 0 <= found["validation_value"] <= 1


def test_calibration_by_hand(config: BaselineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each word's score less what it has where the text is empty."""
    tested: list[list[Example]] = []
    original = Scorer.evaluate

    def watched(self: Scorer, rows: list[Example], batch_size: int) -> Evaluation:
        tested.append(rows)
        return original(self, rows, batch_size)

    monkeypatch.setattr(Scorer, "evaluate", watched)
    plain, calibrated = go(config), go(config, calibrate=True)
    rows, task = tested[-1], task_of(config)
    scorer = Scorer(*load_model(config.model), task)
    null = scorer.scores(scorer.encode([Example({"text": ""}, "neg", "null", 1)]))
    choices = (scorer.scores(scorer.encode(rows)) - null).argmax(dim=1).tolist()
    right = [scorer.labels[choice] == row.label for choice, row in zip(choices, rows, strict=True)]
    assert calibrated["value"] == sum(right) / len(rows)
    assert calibrated["value"] != plain["value"]
    assert calibrated["loss"] == plain["loss"]


# ---------------------------------------------------------------------------------------- demonstrations


def rows_of(counts: dict[str, int]) -> list[Example]:
    return [
        Example({"text": f"{label} {i}"}, label, "rows.csv", i)
        for label, count in counts.items()
        for i in range(count)
    ]


@given(
    st.dictionaries(st.sampled_from("abcde"), st.integers(1, 9), min_size=1),
    st.integers(0, 45),
    st.integers(0, 2**64 - 1),
    st.integers(0, 5),
    st.randoms(use_true_random=False),
)
def test_demonstrations_are_balanced_and_keyed(
    counts: dict[str, int], count: int, seed: int, draw: int, random: Any
) -> None:
    train = rows_of(counts)
    count = min(count, len(train))
    shown = choose_demonstrations(train, count, seed, draw)
    assert len(shown) == count
    assert len({id(row) for row in shown}) == count
    assert {id(row) for row in shown} <= {id(row) for row in train}
    found = Counter(row.label for row in shown)
    for label, most in counts.items():  # nobody has two more than one who has rows left
        if found[label] < most:
            assert max(found.values(), default=0) <= found[label] + 1
    mixed = list(train)
    random.shuffle(mixed)
    assert choose_demonstrations(mixed, count, seed, draw) == shown


def test_draws_differ_and_no_label_has_a_place_of_its_own() -> None:
    train = rows_of({"few": 4, "many": 200})
    draws = [choose_demonstrations(train, 4, 0, draw) for draw in range(200)]
    assert len({tuple(row.where for row in shown) for shown in draws}) > 190
    first = Counter(shown[0].label for shown in draws)
    assert 70 < first["few"] < 130  # 100 expected; 4 standard deviations are 28
    chosen = Counter(row.line for shown in draws for row in shown if row.label == "few")
    assert all(70 < chosen[i] < 130 for i in range(4))
    odd = Counter(
        Counter(row.label for row in choose_demonstrations(rows_of({"a": 50, "b": 50}), 3, s, 0))[
            "a"
        ]
        for s in range(200)
    )
    assert odd.keys() == {1, 2}
    assert min(odd.values()) > 70


def test_icl(config: BaselineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watch(monkeypatch)
    shown: list[list[Example]] = []
    make = Scorer.__init__

    def watched(self: Scorer, *args: Any, demonstrations: Any = (), **others: Any) -> None:
        shown.append(list(demonstrations))
        make(self, *args, demonstrations=demonstrations, **others)

    monkeypatch.setattr(Scorer, "__init__", watched)
    found = go(config, method="icl", demonstrations=2, draws=4)
    assert len(shown) == len(found["draws"]) == 4
    held_out = {row for rows in seen for row in rows}
    assert len(held_out) == 18
    for demonstrations, draw in zip(shown, found["draws"], strict=True):
        assert not held_out & {row.where for row in demonstrations}
        assert Counter(row.label for row in demonstrations) == {"neg": 1, "pos": 1}
        assert draw["demonstrations"] == [row.where for row in demonstrations]
        assert draw["demonstrations_used"] == 2.0
    assert found["demonstrations"] == 2
    for name in ("value", "accuracy", "loss", "validation_value"):
        assert found[name] == pytest.approx(statistics.fmean(draw[name] for draw in found["draws"]))
    assert found["sd"] == pytest.approx(statistics.stdev(d["value"] for d in found["draws"]))
    assert found["metric"] == "accuracy"
    assert timeless(go(config, method="icl", demonstrations=2, draws=4)) == timeless(found)
    other = go(config, method="icl", demonstrations=2, draws=1, seed=1, split_seed=0)
    assert other["draws"][0]["demonstrations"] != found["draws"][0]["demonstrations"]
    assert other["sd"] is None


def test_demonstrations_that_do_not_fit_are_left_out(config: BaselineConfig) -> None:
    """About 18 tokens a row, a context of 64."""
    found = go(config, method="icl", demonstrations=12, draws=1)
    used = found["draws"][0]["demonstrations_used"]
    assert 1 <= used <= 4
    fewer = go(config, method="icl", demonstrations=12, draws=1, max_length=40)
    assert fewer["draws"][0]["demonstrations_used"] < used
    few = go(config, method="icl", draws=1, train_size=10)
    assert few["demonstrations"] == 10
    assert go(config, method="icl", draws=1)["demonstrations"] == 32


def test_icl_of_the_demonstrations_as_text(config: BaselineConfig) -> None:
    """The figures are those of a template that has the solved rows in front."""
    found = go(config, method="icl", demonstrations=2, draws=1)["draws"][0]
    lines = Path(config.data).read_text().splitlines()
    words = TASK["labels"]
    solved = []
    for where in found["demonstrations"]:
        text, label = lines[int(where.rpartition(":")[2]) - 1].rsplit(",", 1)
        solved.append(f"{text.strip(chr(34))} It was {words[label]}")
    before = go(config, template="\n\n".join([*solved, "{text} It was"]))
    for name in ("value", "loss", "validation_value"):
        assert found[name] == pytest.approx(before[name], abs=1e-5)


# ------------------------------------------------------------------------------------------------ probe


def test_probe(config: BaselineConfig, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "probe"
    found = go(config, method="probe", out=str(out), eval_batch_size=10)
    assert found["accuracy"] == found["value"] == 1.0
    assert go(config)["accuracy"] < 1.0
    assert found["validation_value"] == 1.0
    assert (found["forwards"], found["steps"]) == (6, 0)
    assert found["converged"]
    with safe_open(out / "probe.safetensors", framework="pt") as file:  # type: ignore[no-untyped-call]
        weight, bias = file.get_tensor("weight"), file.get_tensor("bias")
        assert json.loads(file.metadata()["labels"]) == TASK["labels"]
    assert [path.name for path in out.iterdir()] == ["probe.safetensors"]
    # as rows of the output head they answer as the probe does
    model, _ = load_model(config.model)
    tokenizer: Any = make_tokenizer("bytelevel")
    for text, label in (("film 1 was good, great", 1), ("film 0 was bad, dull", 0)):
        ids = torch.tensor([tokenizer(f"{text} It was")["input_ids"]])
        with torch.no_grad():
            state = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1]
        assert (weight @ state + bias).argmax().item() == label


def test_a_probe_needs_rows_of_every_label(config: BaselineConfig, tmp_path: Path) -> None:
    path = tmp_path / "three.csv"
    rows = [f"film {i} was {('bad', 'good')[i % 2]},{('neg', 'pos')[i % 2]}\n" for i in range(60)]
    path.write_text("text,label\n" + "".join(rows) + "odd,mixed\n")
    labels = {**TASK["labels"], "mixed": "good"}
    with pytest.raises(UserError, match="label 'mixed' has no training row to fit it on"):
        go(config, method="probe", data=str(path), labels=labels)


# ------------------------------------------------------------------------------------------ first-order


def test_first_order_chooses_by_validation_and_tests_once(
    config: BaselineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation is made to be best at step 4, the test at step 8."""
    calls: list[tuple[int, str]] = []

    def scripted(self: Scorer, rows: Sequence[Example], batch_size: int) -> Evaluation:
        calls.append((len(rows), fingerprint(self.model)))
        value = {1: 0.2, 2: 0.9, 3: 0.4}.get(len(calls), 0.1)
        return Evaluation(value, 1.0, [], len(rows), 1, "accuracy", value, {"accuracy": value})

    monkeypatch.setattr(Scorer, "evaluate", scripted)
    found = first_order(config)
    assert [count for count, _ in calls] == [6, 6, 6, 12]
    assert len({mark for _, mark in calls}) == 3
    assert calls[3][1] == calls[1][1] == found["fingerprint"]
    assert (found["best_step"], found["validation_value"], found["value"]) == (4, 0.9, 0.1)


def test_first_order(config: BaselineConfig) -> None:
    before = go(config)
    found = first_order(config, max_steps=20, eval_every=8)
    assert found["loss"] < 0.3 * before["loss"]
    assert found["accuracy"] == found["validation_value"] == 1.0
    assert [m["step"] for m in found["curve"]] == [0, 8, 16, 20]
    assert (found["steps"], found["forwards"], found["backwards"]) == (20, 20, 20)
    assert found["stopped_by"] == "max_steps"
    best = next(m for m in found["curve"] if m["step"] == found["best_step"])
    assert best["value"] == max(m["value"] for m in found["curve"])
    assert timeless(first_order(config, max_steps=20, eval_every=8)) == timeless(found)
    assert first_order(config, seed=1, split_seed=0)["curve"][1] != found["curve"][1]


def test_rates_and_limits_left_open(config: BaselineConfig) -> None:
    for tuner, rate in LEARNING_RATES.items():
        found = go(config, method="first-order", tuner=tuner, max_steps=16)
        assert (found["lr"], found["tuner"]) == (rate, tuner)
        assert [m["step"] for m in found["curve"]] == list(range(0, 17, 2))
    found = first_order(config, max_minutes=1e-9)
    assert (found["steps"], found["stopped_by"], found["best_step"]) == (0, "max_minutes", 0)
    found = first_order(config, gradient_checkpointing=True)
    assert (found["forwards"], found["backwards"]) == (16, 8)


def base_loss(config: BaselineConfig, rows: list[Example]) -> float:
    return Scorer(*load_model(config.model), task_of(config)).evaluate(rows, 32).loss


@pytest.mark.parametrize("tuner", ["full", "head", "lora", "prefix"])
def test_what_is_saved(config: BaselineConfig, tmp_path: Path, tuner: str) -> None:
    out = tmp_path / "tuned"
    found = first_order(config, tuner=tuner, out=str(out))
    names = {path.name for path in out.iterdir()}
    assert not any(name.endswith((".bin", ".pt", ".pth", ".pkl")) for name in names)
    if tuner in ("lora", "prefix"):
        from peft import PeftModel

        base, tokenizer = load_model(config.model)
        with warnings.catch_warnings():  # peft asks models an outdated question
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
            model: Any = PeftModel.from_pretrained(base, str(out)).eval()
        assert "adapter_model.safetensors" in names
    else:
        assert "model.safetensors" in names
        model, tokenizer = load_model(str(out))
    task = task_of(config)
    rows = read_examples(config.data, task)
    losses = Scorer(model, tokenizer, task).evaluate(rows, 32).loss, base_loss(config, rows)
    assert losses[0] < losses[1] - 0.01
    if tuner in ("full", "head"):
        scored = evaluate(
            EvalConfig(model=str(out), data=config.data, threads=1, **TASK),
            Progress(io.StringIO()),
        )
        assert scored["fingerprint"] == found["fingerprint"]


def test_tune_narrows_it_down(config: BaselineConfig) -> None:
    whole, part = first_order(config), first_order(config, tune="ln")
    assert whole["fingerprint"] != part["fingerprint"]
    assert part["curve"][-1]["loss"] > whole["curve"][-1]["loss"]
    with pytest.raises(UserError, match="--tune is 'decoder': it finds none of the 28 parameters"):
        first_order(config, tune="decoder")


# ------------------------------------------------------------------------------------------ the command

Said = tuple[int, str, str]


@pytest.fixture
def command(config: BaselineConfig, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """`command("--method", "icl")` -> exit code, stdout, stderr."""

    def run(*argv: Any) -> Said:
        given = ["--model", config.model, "--data", config.data, "--threads", "1",
                 "--template", "{text} It was", "--labels", "neg=great,pos=terrible"]  # fmt: skip
        capsys.readouterr()
        code = main(["baseline", *given, *map(str, argv)])
        return code, *capsys.readouterr()

    return run


CONTRACT = {
    "method", "accuracy", "loss", "metric", "value", "validation_value", "seconds", "steps", "rows",
}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("zero-shot", []),
        ("zero-shot", ["--calibrate"]),
        ("icl", ["--demonstrations", 2, "--draws", 2, "--calibrate"]),
        ("probe", []),
        ("first-order", ["--max-steps", 4, "--gradient-checkpointing"]),
        ("first-order", ["--max-steps", 4, "--tuner", "lora", "--lora-rank", 2]),
        ("first-order", ["--max-steps", 4, "--tuner", "prefix", "--prefix-length", 3]),
    ],
)
def test_the_command(command: Callable[..., Said], method: str, options: list[Any]) -> None:
    code, out, err = command("--method", method, *options, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert out.count("\n") == 1
    assert found.keys() >= CONTRACT
    assert found["method"] == method
    assert found["rows"] == {
        "train": 42, "validation": 6, "test": 12, "duplicates": 0, "conflicts": 0,
    }  # fmt: skip
    code, out, err = command("--method", method, *options)
    assert code == 0, err
    assert out.startswith(f"{method}: accuracy {found['accuracy']:.1%}, loss {found['loss']:.4f}")
    assert "on 12 test rows" in out
    assert "scoring 12 test rows" in err or method == "probe"


def test_words_for_people(config: BaselineConfig, tmp_path: Path) -> None:
    said = report.spell_baseline(go(config, method="icl", demonstrations=2, draws=2))
    assert "mean of 2 draws of 2 demonstrations, standard deviation 0." in said
    assert "2.0 fit a row on average" in said
    alone = report.spell_baseline(go(config, method="icl", demonstrations=2, draws=1))
    assert "standard deviation" not in alone
    said = report.spell_baseline(go(config, method="probe", out=str(tmp_path / "probe")))
    assert f"saved in {tmp_path / 'probe'}" in said
    assert " by validation, fitted in 0." in said
    said = report.spell_baseline(first_order(config))
    assert "full, lr 0.01: step 8 of 8 is the best in validation (max_steps)" in said


def test_a_file_of_options(command: Callable[..., Said], tmp_path: Path) -> None:
    file = tmp_path / "b.yaml"
    file.write_text("method: icl\ndemonstrations: 2\ndraws: 2\njson: true\n")
    code, out, err = command("--config", file)
    assert code == 0, err
    assert json.loads(out)["demonstrations"] == 2
    file.write_text("method: icl\nspeed: 2\n")
    code, _, err = command("--config", file)
    assert code == 2
    assert "b.yaml:2: 'speed' is no setting of baseline" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_in_the_middle(
    command: Callable[..., Said],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    """130, one line, nothing left."""
    out, calls, loss_of = tmp_path / "tuned", [0], Scorer.loss_of

    def interrupted(self: Scorer, batch: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            signal.raise_signal(number)
        return loss_of(self, batch)

    monkeypatch.setattr(Scorer, "loss_of", interrupted)
    code, said, err = command("--method", "first-order", "--max-steps", 9, "--out", out)
    assert (code, said, calls[0]) == (130, "", 3)
    assert err.splitlines()[-1] == "stopped"
    assert not out.exists()


# ---------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "magic"], "--method: 'magic' is not one of 'zero-shot', 'icl', 'probe', 'first-order'"),
        ([], "required: --method: see justforward baseline"),
        (["--method", "zero-shot", "--demonstrations", 4], "--demonstrations is 4: it belongs to --method icl, and --method is 'zero-shot': leave it out"),
        (["--method", "probe", "--calibrate"], "--calibrate is True: it belongs to --method zero-shot or icl"),
        (["--method", "probe", "--lr", 1], "--lr is 1.0: it belongs to --method first-order"),
        (["--method", "icl", "--tuner", "lora"], "--tuner is 'lora': it belongs to --method first-order"),
        (["--method", "icl", "--max-steps", 3], "--max-steps is 3: it belongs to --method first-order"),
        (["--method", "zero-shot", "--gradient-checkpointing"], "--gradient-checkpointing is True: it belongs to --method first-order"),
        (["--method", "zero-shot", "--out", "x"], "--out is 'x': it belongs to --method probe or first-order"),
        (["--method", "first-order", "--draws", 2], "--draws is 2: it belongs to --method icl"),
        (["--method", "first-order", "--lora-rank", 2], "--lora-rank is 2: it belongs to --tuner lora, and --tuner is 'full'"),
        (["--method", "first-order", "--lr", 0], "--lr is 0.0: it must be positive and finite"),
        (["--method", "first-order", "--lr", 1e9], "--lr is 1e+09: a first step moves every weight by about that much: give at most 1000"),
        (["--method", "first-order", "--lr", "fast"], "--lr: 'fast' is not a finite number"),
        (["--method", "first-order", "--max-steps", 0], "--max-steps is 0: it must be at least 1"),
        (["--method", "first-order", "--eval-every", 0], "--eval-every is 0: it must be at least 1"),
        (["--method", "first-order", "--batch-size", 0], "--batch-size is 0: it must be at least 1"),
        (["--method", "first-order", "--tune", "("], "--tune is '(': not a regular expression"),
        (["--method", "first-order", "--tuner", "prefix", "--gradient-checkpointing"], "leave it out with --tuner prefix"),
        (["--method", "first-order", "--lr", 1000, "--max-steps", 4, "--eval-every", 1], "lower --lr"),
        (["--method", "icl", "--demonstrations", 0], "--demonstrations is 0: it must be at least 1"),
        (["--method", "icl", "--demonstrations", 43], "--demonstrations is 43: there are 42 training rows to show: give at most that"),
        (["--method", "icl", "--draws", 0], "--draws is 0: it must be at least 1"),
        (["--method", "icl", "--seed", -1], "--seed is -1: it must be at least 0 and below 2^64"),
        (["--method", "zero-shot", "--shots", 4], "--shots is 4: it is for the rows of a --task"),
        (["--method", "zero-shot", "--test-size", 100], "100 rows asked for test, 60 different rows are left"),
        (["--method", "zero-shot", "--max-length", 2], "max_length 2 leaves no room"),
        (["--method", "zero-shot", "--eval-batch-size", 0], "--eval-batch-size is 0: it must be at least 1"),
        (["--method", "zero-shot", "--task", "nothing", "--template", "{text} so"], "--task is 'nothing': no task of that name"),
        (["--method", "zero-shot", "--model", "./none"], "model './none': no such folder"),
        (["--method", "zero-shot", "--data", "none.csv"], "none.csv: no such file: check the path"),
        (["--method", "zero-shot", "--max-forwards", 4], "--max-forwards"),
    ],
)  # fmt: skip
def test_refused(command: Callable[..., Said], options: list[Any], said: str) -> None:
    code, out, err = command(*options, "--json")
    assert code == 2, err
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith("error: ")
    assert said in last, last


def test_where_it_cannot_be_saved(
    command: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "load_model", None)  # refused before anything is loaded
    (tmp_path / "file").write_text("precious")
    for place, said in (("file", "exists and is not a folder"), ("file/x", "is a file: choose")):
        code, _, err = command("--method", "probe", "--out", tmp_path / place)
        assert code == 2
        assert said in err
    assert (tmp_path / "file").read_text() == "precious"


def test_kinds_of_task_and_model(
    config: BaselineConfig, films: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = films[1]
    generation = tmp_path / "write.yaml"
    generation.write_text(
        'name: write\ntitle: Write\nkind: generation\ntemplate: "{text} It was"\nanswers: label\n'
        "loss: vocabulary\nmax_new_tokens: 3\nsplits: {train: [train.jsonl], test: [test.jsonl]}\n"
    )
    options: dict[str, Any] = {
        "template": None,
        "labels": None,
        "data": str(folder),
        "max_length": 64,
    }
    options["task"] = str(generation)
    with pytest.raises(
        UserError, match=r"--method is 'probe': .* a task of kind 'generation' has none"
    ):
        go(config, method="probe", **options)
    with pytest.raises(UserError, match="calibration is of the scores of choices"):
        go(config, calibrate=True, **options)
    found = first_order(config, max_steps=4, test_size=6, validation_size=6, **options)
    assert found["metric"] == "f1"
    assert found["curve"][-1]["loss"] < found["curve"][0]["loss"]
    shown = go(
        config, method="icl", demonstrations=2, draws=1, test_size=4, validation_size=4, **options
    )
    assert shown["metric"] == "f1"
    masked = tmp_path / "masked"
    make_model("roberta").save_pretrained(masked)
    make_tokenizer("roberta").save_pretrained(masked)
    template = "{text} It was {mask}."
    masked_options: dict[str, Any] = {"model": str(masked), "template": template}
    assert go(config, method="probe", **masked_options)["accuracy"] > 0.8
    with pytest.raises(UserError, match="demonstrations are put before the text"):
        go(config, method="icl", **masked_options)
    for tuner in ("prefix", "prompt"):
        said = first_order(config, tuner=tuner, max_steps=4, **masked_options)
        assert said["curve"][-1]["loss"] < said["curve"][0]["loss"]
