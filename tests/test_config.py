"""Settings: each out of range is named with its value; schedules are functions of the step alone."""

from __future__ import annotations

import math
from dataclasses import asdict, fields, replace
from itertools import pairwise
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from justforward.config import FREE, EvalConfig, InspectConfig, ReplayConfig, TrainConfig, Tuner
from justforward.errors import UserError
from justforward.ranges import check_ranges
from justforward.schedules import forwards_until, learning_rate, samples_at, validation_due
from justforward.settings import check_same, kept_values, labels_of, resolved, task_of

BASE = TrainConfig(
    "m", "d.csv", "out", template="{text} It was", labels="neg=terrible,pos=great", start="base"
)


def config(**values: Any) -> TrainConfig:
    return replace(BASE, **values)


# ------------------------------------------------------------------------------------------- ranges


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("lr", [0.0, -1.0, math.nan, math.inf, "abc", True], [1e-30, 1, 1e3]),
        ("eps", [0.0, -1e-3, math.nan, -math.inf, ""], [None, 1e-3, 2]),
        ("weight_decay", [-0.1, math.inf, math.nan], [0.0, 0.1]),
        ("max_minutes", [0.0, -1.0, math.inf, "1"], [None, 0.5, 3]),
        ("target_accuracy", [0.0, 1.1, math.nan, -0.5], [None, 0.5, 1.0]),
        ("seed", [-1, 2**64, 0.5, True], [0, 2**64 - 1]),
        ("split_seed", [-1, 2**64], [None, 0]),
        ("test_size", [0, -3, 0.0, 1.0, 1.5, math.nan, True], [None, 1, 40, 0.2]),
        ("validation_size", [0, 1.0, False], [None, 1, 0.9]),
        ("train_size", [0, 0.5], [None, 1]),
        ("num_samples", [0, 1.5], [1, 3]),
        ("batch_size", [0, -8], [1]),
        ("max_forwards", [0, -4, 1.5], [2]),
        ("eval_every", [0], [None, 1]),
        ("eval_batch_size", [0], [1]),
        ("max_length", [0, -1], [None, 1]),
        ("threads", [0], [None, 1]),
        ("lr_schedule", ["cosin", 1], ["constant", "linear", "cosine"]),
        ("sample_schedule", ["cosine"], ["constant", "linear"]),
        ("loss", ["mse"], ["choices", "vocabulary"]),
        ("truncation", ["middle"], ["left", "right"]),
        ("keep", ["first", 3], ["best", "last"]),
        ("template", [3, ["{text}"], {"a": "b"}], ["{text}"]),
        ("labels", [3, ["a=b"], True], ["a=b,c=d", {"a": "b"}]),
        ("model", [7], ["m"]),
        ("tune", [1.5], [None, "mlp"]),
    ],
)  # fmt: skip
def test_ranges(name: str, bad: list[Any], good: list[Any]) -> None:
    for value in good:
        check_ranges(config(**{name: value}))
    option = "--" + name.replace("_", "-")
    for value in bad:
        with pytest.raises(UserError, match=f"^{option} is ") as caught:
            check_ranges(config(**{name: value}))
        assert repr(value) in str(caught.value)
        assert ": it must be " in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["model", "data", "batch_size", "rule", "max_forwards", "tuner", "json"]
)
def test_empty_values(name: str) -> None:
    with pytest.raises(UserError, match=f"^--{name.replace('_', '-')} is empty: it must be given"):
        check_ranges(config(**{name: None}))


def test_ranges_of_the_other_commands() -> None:
    check_ranges(EvalConfig())
    for name, value in (("batch_size", 0), ("split", "half"), ("threads", 0), ("max_length", 0)):
        with pytest.raises(UserError, match=name.replace("_", "-")):
            check_ranges(replace(EvalConfig(), **{name: value}))
    with pytest.raises(UserError, match="--last is 0"):
        check_ranges(InspectConfig("run", last=0))
    with pytest.raises(UserError, match="--threads is -1"):
        check_ranges(ReplayConfig("run", "out", threads=-1))


def test_every_setting_is_explained() -> None:
    for kind in (TrainConfig, EvalConfig, ReplayConfig, InspectConfig):
        for field in fields(kind):
            assert f"        {field.name}: " in (kind.__doc__ or ""), (kind, field.name)


# ------------------------------------------------------------------------------------------- labels


def test_labels_spelled_either_way() -> None:
    assert labels_of("b=x,a=y z") == {"b": "x", "a": "y z"}
    assert list(labels_of({"b": "x", "a": "y"})) == ["b", "a"]
    numbers: Any = {0: "no", 1: 2.5}
    assert labels_of(numbers) == {"0": "no", "1": "2.5"}


@pytest.mark.parametrize("text", ["{no: terrible, yes: great}", "{a: no, b: yes}", "{a: , b: c}"])
def test_labels_that_yaml_reads_as_something_else(text: str) -> None:
    with pytest.raises(UserError, match="put quotes around yes, no, true, null"):
        labels_of(yaml.safe_load(text))


@pytest.mark.parametrize("text", ["{a: [b], c: d}", "{a: b, c: {d: e}}"])
def test_labels_that_are_no_words(text: str) -> None:
    with pytest.raises(UserError, match="is no word: give the text of one"):
        labels_of(yaml.safe_load(text))


# ----------------------------------------------------------------------------------------- resolved


def test_resolved_fills_in_what_depends_on_other_values() -> None:
    out = resolved(config(seed=5, max_forwards=80, rule="rms"))
    assert out.labels == {"neg": "terrible", "pos": "great"}
    assert out.rule == "rms(beta=0.9)"
    assert (out.eval_every, out.split_seed) == (10, 5)
    assert resolved(out) == out
    assert resolved(config(max_forwards=2)).eval_every == 2
    assert (out.eps, resolved(config(objective="accuracy")).eps) == (1e-3, 2e-2)
    assert resolved(config(objective="accuracy", eps=5e-3)).eps == 5e-3
    rates = {tuner: resolved(config(tuner=tuner)).lr for tuner in get_args(Tuner)}
    assert rates == {"full": 1e-3, "lora": 5e-3, "prefix": 3e-2, "prompt": 1e-2, "head": 1e-3}
    assert resolved(config(tuner="lora", lr=1e-4)).lr == 1e-4
    kept = resolved(config(seed=5, split_seed=0, eval_every=3))
    assert (kept.split_seed, kept.eval_every) == (0, 3)
    assert task_of(out).prompt({"text": "A"}) == "A It was"


def test_where_a_run_starts_and_how_patient_it_is_unless_told() -> None:
    plain = TrainConfig("m", "d.csv", "out", template="{text} It was", labels="neg=bad,pos=good")
    assert (plain.start, resolved(plain).patience) == ("auto", 2)
    assert resolved(plain).start == "auto"  # until model and rows are there
    assert resolved(plain).eval_every is None  # likewise
    assert resolved(replace(plain, eval_every=7)).eval_every == 7
    given: tuple[dict[str, Any], ...] = (
        {"tuner": "prefix"}, {"tuner": "prompt"}, {"tune": "mlp"}, {"tuner": "lora", "tune": "B"},
    )  # fmt: skip
    for options in given:
        assert resolved(replace(plain, **options)).start == "base", options
    for tuner in ("head", "lora"):
        assert resolved(replace(plain, tuner=tuner)).start == "auto"


@pytest.mark.parametrize("start", ["probe", "deep"])
@pytest.mark.parametrize(
    ("forwards", "every"),
    [(2, 2), (8, 2), (40, 10), (64, 16), (240, 16), (256, 16), (400, 25), (4000, 250)],
)
def test_validations_are_not_after_every_few_steps(start: Any, forwards: int, every: int) -> None:
    assert resolved(config(start=start, max_forwards=forwards)).eval_every == every


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"tune": "("}, r"--tune is '\(': not a regular expression"),
        ({"max_forwards": 1}, "--max-forwards is 1: one step takes 2 forwards"),
        ({"max_forwards": 7, "num_samples": 4}, "one step takes 8 forwards"),
        ({"rule": "lion"}, "rule 'lion'.*unknown; known are sgd, rms"),
        ({"lr": math.nan}, "--lr is nan"),
        ({"labels": "neg=terrible"}, "at least 2"),
        ({"labels": "neg"}, "'neg' is not label=word"),
        ({"labels": "neg=great,pos=great"}, "the same word 'great'"),
        ({"template": "It was"}, "shows no field"),
        ({"template": "{text!r}"}, "is not a plain field"),
        ({"template": "{label}"}, "'label' is the label"),
        ({"sample_schedule": "linear"}, "--sample-schedule is 'linear'.*--num-samples, which is 1"),
        ({"cache": "c", "reuse": False}, "--cache is 'c': it keeps what --reuse gives"),
        ({"keep_snapshots": 5}, "--keep-snapshots is 5: there are none without --snapshot-every"),
        ({"temperature": 0.5}, "--temperature is 0.5: it is for an --objective on texts"),
        (
            {"temperature": 0.5, "objective": "accuracy"},
            "--temperature is 0.5: it is for an --object",
        ),
        (
            {"task": "sst2", "template": None, "labels": None, "label_field": "y"},
            "--label-field is 'y': task 'sst2' says itself",
        ),
    ],
)
def test_resolved_refuses(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        resolved(config(**values))
    assert resolved(config(max_forwards=7, num_samples=4, sample_schedule="linear"))


def test_kept_values_are_a_config_without_its_place() -> None:
    kept = kept_values(resolved(config(resume=True, json=True)))
    assert set(asdict(BASE)) - set(kept) == {"out", "resume", "json"}
    again = TrainConfig(**yaml.safe_load(yaml.safe_dump(kept)), out="out")
    assert again == resolved(config())


# --------------------------------------------------------------------------------------------- same

CHANGED: dict[str, Any] = {
    "reuse": False,
    "rows_at_once": 4,
    "probe_rows": 7,
    "layers": 0.5,
    "backoff": False,
    "private": True,
    "target_epsilon": 8.0,
    "target_delta": 1e-6,
    "noise_multiplier": 2.0,
    "clip": 0.5,
    "template": "{text} So",
    "labels": {"pos": "great", "neg": "terrible"},  # the order of the choices
    "task": "sst2",
    "label_field": "y",
    "loss": "vocabulary",
    "objective": "accuracy",
    "temperature": 1.0,
    "truncation": "left",
    "max_length": 9,
    "estimator": "weight",
    "rule": "sgd",
    "family": "rademacher",
    "looks": "one-sided",
    "modified": "variance",
    "blocks": "layers",
    "block_order": "random",
    "lr": 2e-3,
    "eps": 2e-3,
    "gauge": 2,
    "num_samples": 2,
    "sample_schedule": "linear",
    "weight_decay": 0.1,
    "lr_schedule": "cosine",
    "batch_size": 4,
    "seed": 1,
    "tuner": "lora",
    "start": "probe",
    "lora_rank": 4,
    "lora_alpha": 8.0,
    "lora_targets": "q_proj",
    "prefix_length": 3,
    "prompt_length": 3,
    "tune": "mlp",
    "quantize": "int8",
    "dtype": "bfloat16",
    "max_forwards": 402,
    "eval_every": 7,
    "eval_batch_size": 3,
    "test_size": 30,
    "validation_size": 30,
    "train_size": 30,
    "shots": 4,
    "split_seed": 9,
    "keep": "last",
}


def test_every_setting_is_either_free_or_compared() -> None:
    assert set(CHANGED) | set(FREE) == {field.name for field in fields(TrainConfig)}
    assert not set(CHANGED) & set(FREE)


@pytest.mark.parametrize("name", CHANGED)
def test_a_run_is_not_resumed_with_another(name: str) -> None:
    old = resolved(BASE)
    with pytest.raises(UserError) as caught:
        check_same(old, replace(old, **{name: CHANGED[name]}), "some/run")
    said = str(caught.value)
    assert said.startswith(f"some/run: --{name.replace('_', '-')} is ")
    assert f"{getattr(old, name)!r} in the run and {CHANGED[name]!r} now" in said


def test_limits_may_change() -> None:
    old = resolved(config(lr_schedule="constant"))
    check_same(old, replace(old, max_minutes=1.0, target_accuracy=0.5, threads=1, out="o"), "run")
    check_same(old, replace(old, max_forwards=1000), "run")  # no schedule depends on it
    linear = resolved(config(lr_schedule="constant", sample_schedule="linear", num_samples=2))
    with pytest.raises(UserError, match=r"max-forwards.*, which sets the schedules"):
        check_same(linear, replace(linear, max_forwards=1000), "run")


# ---------------------------------------------------------------------------------------- schedules

CONFIGS = st.builds(
    config,
    max_forwards=st.integers(2, 400),
    num_samples=st.integers(1, 9),
    sample_schedule=st.sampled_from(["constant", "linear"]),
    lr_schedule=st.sampled_from(["constant", "linear", "cosine"]),
    lr=st.floats(1e-6, 1.0),
    eval_every=st.integers(1, 50),
)


@given(CONFIGS)
def test_learning_rate(config: TrainConfig) -> None:
    rates = [learning_rate(config, forwards) for forwards in range(config.max_forwards + 3)]
    assert rates[0] == config.lr
    assert rates == sorted(rates, reverse=True)
    end = config.lr if config.lr_schedule == "constant" else 0.0
    assert rates[-1] == pytest.approx(end, abs=1e-12)
    assert min(rates[: config.max_forwards]) > 0.0


def test_learning_rate_known_answers() -> None:
    linear, cosine = config(lr=1.0, max_forwards=8), config(lr=1.0, lr_schedule="cosine")
    assert [learning_rate(linear, f) for f in (0, 2, 4, 8)] == [1.0, 0.75, 0.5, 0.0]
    assert learning_rate(cosine, 200) == pytest.approx(0.5)
    assert learning_rate(cosine, 100) == pytest.approx(0.5 + math.sqrt(0.5) / 2)


@given(CONFIGS, st.integers(0, 60))
def test_forwards_add_up(config: TrainConfig, steps: int) -> None:
    samples = [samples_at(config, step) for step in range(steps)]
    assert forwards_until(config, steps) == 2 * sum(samples)
    assert samples == sorted(samples)
    assert all(1 <= n <= config.num_samples for n in samples)
    if config.sample_schedule == "linear":
        assert samples[:1] in ([], [1])
    else:
        assert set(samples) <= {config.num_samples}


def test_linear_samples_reach_the_last_within_the_run() -> None:
    linear = config(num_samples=7, sample_schedule="linear", max_forwards=160)
    steps = next(n for n in range(100) if forwards_until(linear, n + 1) > 160)
    assert samples_at(linear, steps - 1) in (6, 7)
    assert samples_at(linear, 1000) == 7


@given(CONFIGS, st.integers(1, 60))
def test_validations_come_once_each_eval_every(config: TrainConfig, steps: int) -> None:
    forwards = [forwards_until(config, step) for step in range(steps + 1)]
    due = [f for before, f in pairwise(forwards) if validation_due(config, before, f)]
    assert config.eval_every is not None
    crossed = {f // config.eval_every for f in forwards} - {0}
    assert len(due) == len(crossed)
    if 2 * config.num_samples <= config.eval_every:
        assert len(due) == forwards[-1] // config.eval_every
