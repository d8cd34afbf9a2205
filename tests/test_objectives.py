"""Metrics as objectives: what they return, what is said of a function that errs, and that they rise in training."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import justforward as jf
from conftest import make_model, make_tokenizer
from justforward.data import Example
from justforward.errors import UserError
from justforward.evaluate import Scorer
from justforward.generate import Sampling
from justforward.objectives import Objective
from justforward.tasks import Task

LABELS = {"neg": "terrible", "pos": "great"}
CLASSES = Task("{text} It was", LABELS, metrics=("accuracy", "f1", "f1_macro"), positive="pos")
CHOICE = Task("{text} It was", kind="choice", score="mean")
WRITING = Task("{text} It was", kind="generation", loss="vocabulary", max_new_tokens=4)
TASKS = {"classification": CLASSES, "choice": CHOICE, "generation": WRITING}
NOUNS = ["film", "story", "music", "end", "acting", "the film", "a story"]


def rows(kind: str, count: int = 8) -> list[Example]:
    out = []
    for i in range(count):
        text = {"text": f"{NOUNS[i % 7]} {i // 7} was {'good' if i % 2 else 'bad'}"}
        label = list(LABELS)[i % 2]
        if kind == "classification":
            out.append(Example(text, label, "rows.csv", i + 2))
            continue
        answers = (("very good",), ("the good",)) if i % 2 else (("bad",),)
        options = ("bad", "very good", "the good") if kind == "choice" else ()
        out.append(Example(text, answers[0][0], "rows.csv", i + 2, options, answers))
    return out


def scorer(kind: str, architecture: str = "llama") -> Scorer:
    return Scorer(make_model(architecture), make_tokenizer("bytelevel"), TASKS[kind])


def of_file(tmp_path: Path, body: str, name: str = "reward") -> str:
    path = tmp_path / "rewards.py"
    path.write_text(f"def {name}(predictions, references):\n    {body}\n")
    return f"{path}:{name}"


# ----------------------------------------------------------------------------------------- own metrics


@pytest.mark.parametrize(
    ("kind", "name", "by_row"),
    [
        ("classification", "accuracy", True),
        ("classification", "f1", False),
        ("classification", "f1_macro", False),
        ("choice", "accuracy", True),
        ("choice", "f1", True),
        ("choice", "exact_match", True),
        ("generation", "f1", True),
        ("generation", "drop_f1", True),
    ],
)
def test_objective_is_minus_the_metric(kind: str, name: str, by_row: bool) -> None:
    asked, examples = scorer(kind), rows(kind)
    objective = Objective(name, TASKS[kind])
    assert objective.by_row() is by_row
    batch = objective.batch(asked, examples)
    found = objective.closure(asked)(batch)
    assert found.dtype == torch.float32
    assert found.shape == ((len(examples),) if by_row else ())
    assert not found.requires_grad
    told = asked.predict(batch)
    assert float(-found.mean()) == pytest.approx(objective.score(examples, told))
    task = replace(TASKS[kind], metrics=(name,))
    evaluated = Scorer(asked.model, asked.tokenizer, task).evaluate(examples, 3)
    assert evaluated.predictions == told
    assert evaluated.value == pytest.approx(float(-found.mean()))


@pytest.mark.parametrize(
    ("kind", "name", "told", "values"),
    [
        ("classification", "accuracy", ["neg", "neg", "pos", "pos"], [1, 0, 0, 1]),
        ("choice", "accuracy", ["bad", "the good", "bad", "bad"], [1, 1, 1, 0]),
        ("choice", "f1", ["good", "good", "bad", "bad"], [0, 1, 1, 0]),
        ("choice", "exact_match", ["the bad", "good", "bad", "x"], [1, 1, 1, 0]),
        ("generation", "f1", ["bad bad", "very", "", "a good"], [2 / 3, 2 / 3, 0, 1]),
    ],
)
def test_values_by_hand(kind: str, name: str, told: list[str], values: list[float]) -> None:
    objective = Objective(name, TASKS[kind])
    assert objective.values(rows(kind, 4), told) == pytest.approx(values)
    assert objective.score(rows(kind, 4), told) == pytest.approx(sum(values) / 4)


@pytest.mark.parametrize("name", ["f1", "f1_macro", "matthews", "accuracy"])
def test_a_metric_need_not_be_one_that_the_task_reports(name: str) -> None:
    told = ["pos", "pos", "neg", "neg"]
    bare = Objective(name, replace(CLASSES, metrics=("accuracy",)))
    reported = Objective(name, replace(CLASSES, metrics=(name,)))
    assert bare.score(rows("classification", 4), told) == reported.score(
        rows("classification", 4), told
    )


def test_f1_is_of_the_whole_batch() -> None:
    objective = Objective("f1", CLASSES)
    values = objective.values(rows("classification", 4), ["pos", "pos", "neg", "neg"])
    assert values == objective.score(rows("classification", 4), ["pos", "pos", "neg", "neg"]) == 0.5


def test_writing_is_drawn_as_asked() -> None:
    asked, examples = scorer("generation"), rows("generation")
    seen: list[list[str]] = []

    def texts(sampling: Sampling | None) -> list[str]:
        objective = Objective("f1", WRITING, sampling)
        watched = objective.values
        objective.values = lambda e, p: seen.append(p) or watched(e, p)  # type: ignore[method-assign, func-returns-value]
        objective.closure(asked)(objective.batch(asked, examples))
        return seen[-1]

    greedy, warm = texts(None), texts(Sampling(1.5, seed=1))
    assert greedy == asked.predict(asked.encode(examples, "none"))
    assert warm != greedy
    assert warm == texts(Sampling(1.5, seed=1)) != texts(Sampling(1.5, seed=2))


@pytest.mark.parametrize(
    ("task", "name"), [(CLASSES, "drop_f1"), (CHOICE, "matthews"), (WRITING, "accuracy"), (CLASSES, "loss")]
)  # fmt: skip
def test_metrics_of_another_kind_are_refused(task: Task, name: str) -> None:
    with pytest.raises(UserError, match=f"--objective is '{name}': it must be loss, one of "):
        Objective(name, task)


def test_f1_needs_to_know_the_label() -> None:
    with pytest.raises(UserError, match="positive"):
        Objective("f1", Task("{text} It was", LABELS))
    with pytest.raises(UserError, match="group"):
        Objective("exact_match", Task("{text} It was", LABELS))


# ------------------------------------------------------------------------------------- own functions


def test_functions_get_texts_and_lists_of_right_ones(tmp_path: Path) -> None:
    body = (
        "return [float(p in r) + 10 * len(r) for p, r in zip(predictions, references, strict=True)]"
    )
    name = of_file(tmp_path, body)
    objective = Objective(name, CHOICE)
    assert objective.by_row() is None
    told = ["bad", "the good", "no", "no"]
    assert objective.values(rows("choice", 4), told) == [11.0, 21.0, 10.0, 20.0]
    by_label = Objective(name, CLASSES)
    assert by_label.values(rows("classification", 2), ["neg", "neg"]) == [11.0, 10.0]
    spans = Example({"text": "x"}, "a, b", "f", 1, answers=(("a", "b"), ("c",)))
    assert Objective(name, WRITING).values([spans], ["a, b"]) == [21.0]
    assert objective.score(rows("choice", 4), told) == pytest.approx(15.5)


def test_functions_of_modules() -> None:
    assert Objective("operator:eq", CHOICE).values(rows("choice", 2), ["bad", "bad"]) == 0.0
    objective = Objective("operator:concat", CHOICE)
    with pytest.raises(UserError, match="--objective operator:concat returned 4 values for 2 rows"):
        objective.values(rows("choice", 2), ["bad", "bad"])


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (lambda: [1, True, 0.5], [1.0, 1.0, 0.5]),
        (lambda: (1, 2, 3), [1.0, 2.0, 3.0]),
        (lambda: np.array([1.0, 2.0, 3.0], np.float32), [1.0, 2.0, 3.0]),
        (lambda: [np.float32(0.5), np.int64(2), np.bool_(True)], [0.5, 2.0, 1.0]),
        (lambda: torch.tensor([1.0, 2.0, 3.0], requires_grad=True), [1.0, 2.0, 3.0]),
        (lambda: [torch.tensor(0.5), 1, 2], [0.5, 1.0, 2.0]),
        (lambda: [torch.tensor([0.5]), np.array([1]), 3e38], [0.5, 1.0, 3e38]),
        (lambda: 0.25, 0.25),
        (lambda: True, 1.0),
        (lambda: np.float32(0.25), 0.25),
        (lambda: torch.tensor(0.25), 0.25),
    ],
)
def test_numbers_of_any_kind(
    monkeypatch: pytest.MonkeyPatch, made: Callable[[], Any], expected: Any
) -> None:
    objective = Objective("operator:eq", CHOICE)
    monkeypatch.setattr(objective, "_function", lambda _p, _r: made())
    found = objective.values(rows("choice", 3), ["bad"] * 3)
    assert found == expected
    assert isinstance(found, type(expected))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return None", "returned NoneType for 8 rows: it must return one number a row, or one for all"),
        ("return 'good'", "returned str for 8 rows"),
        ("return [1.0] * 7", "returned 7 values for 8 rows"),
        ("return [[1.0]] * 8", r"returned \[1.0\] for rows.csv:2: it must be a finite number"),
        ("return [1.0, None] + [1.0] * 6", r"returned None for rows.csv:3"),
        ("return [1.0, 0.0, float('nan')] + [1.0] * 5", "returned nan for rows.csv:4: it must be a finite number"),
        ("return [1.0] * 7 + [float('inf')]", "returned inf for rows.csv:9"),
        ("return float('nan')", r"returned nan \(rows: rows.csv:2 and 7 more\)"),
        ("return [10**400] + [1.0] * 7", r"returned 1000+ for rows.csv:2: it must be a finite number that float32 holds"),
        ("return [1.0, 1e39] + [1.0] * 6", r"returned 1e\+39 for rows.csv:3: it must be a finite number that float32 holds"),
        ("return 10**400", r"returned 1000+ \(rows: rows.csv:2 and 7 more\): it must be a finite number"),
        ("return -1e300", r"returned -1e\+300 \(rows: rows.csv:2 and 7 more\)"),
        ("import torch; return [torch.ones(2)] + [1.0] * 7", r"returned \[1.0, 1.0\] for rows.csv:2"),
        ("import numpy; return [1.0, numpy.ones((2, 1))] + [1.0] * 6", r"returned \[\[1.0\], \[1.0\]\] for rows.csv:3"),
        ("raise ValueError('one\\ntwo')", r"raised ValueError: one two \(rows: rows.csv:2\)"),
        ("return [1 / (r != ['bad']) for r in references]", r"raised ZeroDivisionError: .* \(rows: rows.csv:2\)"),
        ("return [1 / (r == ['bad']) for r in references]", r"raised ZeroDivisionError: .* \(rows: rows.csv:3\)"),
        ("return {}['x'] if len(references) > 1 else 0", r"raised KeyError: 'x' \(rows: rows.csv:2 and 7 more\)"),
    ],
)  # fmt: skip
def test_functions_that_err(tmp_path: Path, body: str, said: str) -> None:
    """The row is named, and every weight is as before."""
    caught = failed_step(of_file(tmp_path, body), "weight")
    assert re.search(said, caught)


@pytest.mark.parametrize(
    "body", ["return [1 / 0]", "return None", "return [1.0]", "return [float('nan') for _ in predictions]"]
)  # fmt: skip
@pytest.mark.parametrize("estimator", ["weight", "activation"])
def test_weights_are_as_before(tmp_path: Path, estimator: str, body: str) -> None:
    """Also where the function errs at the second look only."""
    failed_step(of_file(tmp_path, body), estimator)
    path = tmp_path / "rewards.py"
    path.write_text(
        "calls = []\n"
        "def reward(predictions, references):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 1:\n"
        "        return [0.0 for _ in predictions]\n"
        f"    {body}\n"
    )
    failed_step(f"{path}:reward", estimator)


def failed_step(name: str, estimator: str) -> str:
    """What a step with an objective that errs says, once it is clear that nothing has moved."""
    asked = scorer("choice")
    objective = Objective(name, CHOICE)
    opt = jf.MeZO(asked.model, eps=0.1, estimator=estimator)
    before = jf.fingerprint(asked.model)
    batch = objective.batch(asked, rows("choice"))
    with pytest.raises(UserError, match=r"^--objective ") as caught:
        opt.step(objective.closure(asked), batch)
    assert "\n" not in str(caught.value)
    assert jf.fingerprint(asked.model) == before
    assert opt.steps == 0
    return str(caught.value)


@pytest.mark.parametrize("kind", ["classification", "function"])
def test_one_number_for_all_is_refused_in_activation_space(tmp_path: Path, kind: str) -> None:
    name = "f1" if kind == "classification" else of_file(tmp_path, "return 0.5")
    asked = scorer("classification")
    objective = Objective(name, CLASSES)
    batch = objective.batch(asked, rows("classification"))
    opt = jf.MeZO(asked.model, eps=0.1, estimator="activation")
    before = jf.fingerprint(asked.model)
    with pytest.raises(UserError, match="activation space: loss_fn must return one loss a row"):
        opt.step(objective.closure(asked), batch)
    assert jf.fingerprint(asked.model) == before
    weights = jf.MeZO(asked.model, eps=0.1)
    assert -1.0 <= weights.step(lambda: objective.closure(asked)(batch)) <= 0.0


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none.py:f", "there is no file none.py"),
        ("no.such.module:f", "no.such.module cannot be imported: ModuleNotFoundError"),
        ("math:none", "math has no function 'none'"),
        ("math:pi", "math has no function 'pi'"),
        (":f", "cannot be imported"),
        ("math:", "math has no function ''"),
    ],
)
def test_functions_refused(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        Objective(name, CHOICE)
    assert str(caught.value).startswith(f"--objective is {name!r}: ")


@pytest.mark.parametrize(
    ("content", "said"),
    [("def f(:\n", "SyntaxError"), ("1 / 0\n", "ZeroDivisionError: division by zero"), ("g = 1\n", "has no function 'f'")],
)  # fmt: skip
def test_files_refused(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "broken.py").write_text(content)
    with pytest.raises(UserError, match=said) as caught:
        Objective(f"{tmp_path}/broken.py:f", CHOICE)
    assert "\n" not in str(caught.value)


def test_a_file_may_hold_dataclasses(tmp_path: Path) -> None:
    (tmp_path / "with_class.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n"
        "@dataclass\nclass A:\n    x: int = 2\n\ndef f(predictions, references):\n    return A().x\n"
    )
    objective = Objective(f"{tmp_path}/with_class.py:f", CHOICE)
    assert objective.values(rows("choice", 3), ["bad"] * 3) == 2.0


# --------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    ("architecture", "name", "lr"),
    [("llama", "accuracy", 1e-2), ("llama", "f1_macro", 1e-2), ("opt", "function", 2e-2)],
)
def test_the_objective_rises_on_rows_not_trained_on(
    tmp_path: Path, architecture: str, name: str, lr: float
) -> None:
    """A metric that has no gradient, from chance to nearly right."""
    if name == "function":
        body = "return [float(p in r) for p, r in zip(predictions, references)]"
        name = of_file(tmp_path, body)
    examples = rows("classification", 192)
    train, held = examples[:128], examples[128:]
    asked = scorer("classification", architecture)
    objective = Objective(name, CLASSES)
    batch, closure = objective.batch(asked, train), objective.closure(asked)

    def score() -> float:
        return objective.score(held, asked.predict(objective.batch(asked, held)))

    before = score()
    opt = jf.MeZO(asked.model, lr=lr, eps=0.1, rule="rms")
    losses = [opt.step(lambda: closure(batch)) for _ in range(150)]
    assert before < 0.7
    assert score() > 0.8
    assert math.fsum(losses[-30:]) / 30 < math.fsum(losses[:30]) / 30 - 0.15


def test_the_objective_rises_in_activation_space() -> None:
    examples = rows("classification", 192)
    train, held = examples[:128], examples[128:]
    asked = scorer("classification")
    objective = Objective("accuracy", CLASSES)
    batch, closure = objective.batch(asked, train), objective.closure(asked)
    opt = jf.MeZO(asked.model, lr=1e-2, eps=0.1, rule="rms", estimator="activation")
    before = objective.score(held, asked.predict(objective.batch(asked, held)))
    for _ in range(100):
        opt.step(closure, batch)
    after = objective.score(held, asked.predict(objective.batch(asked, held)))
    assert before < 0.7
    assert after > 0.8
