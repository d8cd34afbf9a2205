"""Templates and labels: what is accepted renders as str.format would, the rest is named."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from justforward.errors import UserError
from justforward.tasks import Task, parse_labels, parse_template

LABELS = {"0": "terrible", "1": "great"}


def test_prompt_puts_the_fields_in() -> None:
    task = Task("{premise} Question: {hypothesis}?", LABELS)
    assert task.fields == ("premise", "hypothesis")
    assert task.prompt({"premise": "a {b}", "hypothesis": "c"}) == "a {b} Question: c?"
    assert task.tail == "?"
    assert Task("so {text}", LABELS).tail == ""


@given(st.lists(st.sampled_from(["a", " ", "{{", "}}", "{x}", "{y z}", "\n", "é"]), min_size=1))
def test_prompt_is_str_format(parts: list[str]) -> None:
    template = "{x}" + "".join(parts)
    fields = {"x": "{1}", "y z": "two words"}
    assert Task(template, LABELS).prompt(fields) == template.format(**fields)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("", "empty"),
        ("  \n", "empty"),
        ("It was", "no field"),
        ("{{text}} It was", "no field"),
        ("{text It was", "expected '}'"),
        ("text} It was", "Single '}'"),
        ("{} It was", "not a plain field"),
        ("{text!r}", "not a plain field"),
        ("{text:>9}", "not a plain field"),
        ("{text} {label}", "answer"),
    ],
)
def test_templates_refused(template: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        Task(template, LABELS)
    assert "\n" not in str(caught.value)


@given(st.text(alphabet="{}ab!:. \n", max_size=12))
def test_any_template_parses_or_is_refused(template: str) -> None:
    try:
        pieces = parse_template(template)
    except UserError as error:
        said = str(error)
    else:
        assert any(name for _, name in pieces)
        said = ""
    assert "\n" not in said


def test_a_mask_is_no_field() -> None:
    task = Task("{mask} : {text} {{mask}}", LABELS)
    assert task.masked
    assert task.fields == ("text",)
    assert task.prompt({"text": "a {b}"}, mask="[MASK]") == "[MASK] : a {b} {mask}"
    assert not Task("{text} {{mask}}", LABELS).masked


@pytest.mark.parametrize(
    ("template", "label_field", "said"),
    [
        ("{text} {mask} {mask}", "label", "stands there 2 times"),
        ("It was {mask}.", "label", "no field"),
        ("{text} {mask}", "mask", "label_field 'mask'"),
    ],
)
def test_masks_refused(template: str, label_field: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        Task(template, LABELS, label_field=label_field)
    assert "\n" not in str(caught.value)


def test_unknown_field_names_what_there_is() -> None:
    with pytest.raises(UserError, match=r"'text'.*'sentence'"):
        Task("{text} It was", LABELS).prompt({"sentence": "x"})


def test_parse_labels_keeps_order_and_inner_spaces() -> None:
    parsed = parse_labels(" neg = not good , pos=very good,x=a=b")
    assert list(parsed.items()) == [("neg", "not good"), ("pos", "very good"), ("x", "a=b")]


@pytest.mark.parametrize("text", ["", "a", "a=", "=b", "a=b,", "a=b,a=c"])
def test_parse_labels_refuses(text: str) -> None:
    with pytest.raises(UserError, match="labels"):
        parse_labels(text)


@pytest.mark.parametrize(
    "labels",
    [{}, {"a": "b"}, {"a": "same", "b": "same"}, {"a": "", "b": "x"}, {"a": " w", "b": "x"},
     {" a": "w", "b": "x"}],
)  # fmt: skip
def test_labels_refused(labels: dict[str, str]) -> None:
    with pytest.raises(UserError, match="labels"):
        Task("{text}", labels)


def test_options_refused() -> None:
    with pytest.raises(UserError, match="truncation 'middle'"):
        Task("{text}", LABELS, truncation="middle")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="loss 'mse'"):
        Task("{text}", LABELS, loss="mse")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="label_field"):
        Task("{text}", LABELS, label_field="")


# ----------------------------------------------------------------------------------- kinds of tasks


def own(kind: Any, **keys: Any) -> Task:
    return Task("{text} So", kind=kind, loss=keys.pop("loss", "vocabulary"), **keys)


def test_each_kind_has_a_metric_that_chooses() -> None:
    assert Task("{text}", LABELS).metric == own("choice").metric == "accuracy"
    assert own("generation").metric == "f1"
    assert own("generation", metrics=("drop_f1", "f1")).metric == "drop_f1"
    assert own("choice", loss="choices").score == "sum"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"kind": "poetry"}, "kind 'poetry' is unknown: choose one of classification, choice, generation"),
        ({"kind": "choice", "labels": LABELS}, "labels are for kind 'classification', and the kind is 'choice'"),
        ({"kind": "choice", "template": "{text} {mask}"}, "which holds one word: a task of kind 'choice'"),
        ({"kind": "classification"}, "labels: 0 given, at least 2 needed"),
        ({"kind": "generation", "loss": "choices"}, "a task of kind 'generation' has none: choose vocabulary"),
        ({"kind": "choice", "score": "best"}, "score 'best' is unknown: choose sum or mean"),
        ({"kind": "generation", "max_new_tokens": 0}, "max_new_tokens 0 and stop"),
        ({"kind": "generation", "stop": ()}, r"stop \[\]: an answer needs one token at least, and something"),
        ({"kind": "generation", "stop": ("\n", "")}, "which cannot be empty"),
        ({"kind": "generation", "metrics": ("accuracy",)}, "metric 'accuracy' is unknown for kind 'generation'"),
        ({"kind": "choice", "metrics": ("f1", "matthews")}, "metric 'matthews' is unknown for kind 'choice'"),
        ({"kind": "choice", "positive": "a"}, "positive is 'a': it must be one of the labels .there are none"),
        ({"labels": LABELS, "positive": "2"}, r"positive is '2': it must be one of the labels \(0, 1\)"),
        ({"labels": LABELS, "metrics": ("f1",)}, "metric f1 needs positive"),
        ({"labels": LABELS, "metrics": ("exact_match",)}, "metric exact_match needs group"),
        ({"labels": {**LABELS, "2": "so"}, "metrics": ("matthews",)}, "metric matthews is of two labels"),
        ({"labels": LABELS, "null": "{story}"}, "null '{story}': field 'story' is not in the template"),
        ({"labels": LABELS, "null": "{text!r}"}, "not a plain field"),
    ],
)  # fmt: skip
def test_kinds_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        Task(**{"template": "{text} So", "loss": "vocabulary", **keys})
    assert "\n" not in str(caught.value)


def test_null_prompts() -> None:
    fields = {"text": "a {b}", "word": "so"}
    template = "{text} {word} it"
    assert Task(template, LABELS).null_prompt(fields) == "  it"
    assert Task(template, LABELS, null="").null_prompt(fields) == ""
    assert Task(template, LABELS, null="{word} {{it}}").null_prompt(fields) == "so {it}"
    masked = Task("{text} {mask}.", LABELS)
    assert masked.null_prompt(fields, mask="[M]") == " [M]."
