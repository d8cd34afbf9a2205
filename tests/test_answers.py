"""Options and answers in rows: each shape in which data sets are published, and what is wrong at its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from justforward import catalog
from justforward.data import Example
from justforward.declaration import Declaration
from justforward.errors import UserError
from justforward.published import deal, read_published

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"
SPLITS = {"train": "train.jsonl", "test": "test.jsonl"}


def read(declared: Declaration, folder: Path, rows: list[Any]) -> list[Example]:
    """Rows of a declaration, as its test rows."""
    folder.mkdir(exist_ok=True)
    for split in ("train", "test"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / declared.splits[split][0]).write_text(text)
    return read_published(declared, folder, declared.task_for()).rows["test"]


def declare(folder: Path, **keys: Any) -> Declaration:
    """A declaration of one's own, `kind` choice unless said otherwise."""
    usual = {"name": "own", "kind": "choice", "splits": SPLITS, "template": "{text} So"}
    folder.mkdir(exist_ok=True)
    (folder / "own.yaml").write_text(yaml.safe_dump({**usual, **keys}))
    return catalog.load(str(folder / "own.yaml"))


# ------------------------------------------------------------------------------- the built-in shapes

COPA = {
    "premise": "It rained. ",
    "choice1": "The road got wet.",
    "choice2": "I slept.",
    "question": "effect",
    "label": 0,
}


def test_copa(tmp_path: Path) -> None:
    first, second = read(catalog.load("copa"), tmp_path, [COPA, {**COPA, "label": 1}])
    assert first.options == second.options == ("the road got wet.", "I slept.")
    assert (first.label, first.answers) == ("the road got wet.", (("the road got wet.",),))
    assert second.label == "I slept."
    assert first.shown == ()
    task = catalog.load("copa").task_for()
    assert task.prompt(first.fields) == "It rained so"
    assert task.null_prompt(first.fields) == "so"
    assert (task.score, task.loss) == ("mean", "choices")


TEXT = "Ann met Bo in Rome.\n@highlight\nBo waved\n@highlight\nAnn left"
SHOWN_TEXT = "Ann met Bo in Rome.\n- Bo waved\n- Ann left"
QUERY = "@placeholder lives in Rome, @placeholder said."


def span(text: str) -> dict[str, int]:
    start = TEXT.index(text)
    return {"start": start, "end": start + len(text) - 1}


RECORD = {
    "source": "x",
    "passage": {"text": TEXT, "entities": [span("Ann"), span("Bo"), span("Rome"), span("Bo")]},
    "qas": [
        {"query": QUERY, "answers": [{**span("Bo"), "text": "Bo"}, {**span("Ann"), "text": "Ann"}]},
        {"query": "In @placeholder.", "answers": [{**span("Rome"), "text": "Rome"}]},
    ],
}
HUB_RECORD = {
    "passage": TEXT,
    "query": QUERY,
    "entities": ["Ann", "Bo", "Rome", "Bo"],
    "answers": ["Bo", "Ann"],
}


@pytest.mark.parametrize("row", [RECORD, HUB_RECORD], ids=["original", "hub"])
def test_record(tmp_path: Path, row: dict[str, Any]) -> None:
    found = read(catalog.load("record"), tmp_path, [row])
    first = found[0]
    assert first.fields == {"passage": SHOWN_TEXT}
    assert first.options == ("Ann", "Bo", "Rome")
    assert first.shown[1] == "Bo lives in Rome, Bo said."
    assert len(first.shown) == 3
    assert (first.label, first.answers) == ("Bo", (("Bo",), ("Ann",)))
    task = catalog.load("record").task_for()
    assert task.prompt(first.fields) == f"{SHOWN_TEXT}\n-"
    assert (task.loss, task.score, task.null) == ("vocabulary", "mean", "-")
    if row is RECORD:
        assert found[1].shown == ("In Ann.", "In Bo.", "In Rome.")
        assert (found[1].label, found[1].line) == ("Rome", 1)


def test_queries_of_one_passage_are_different_rows(tmp_path: Path) -> None:
    declared = catalog.load("record")
    other = {**RECORD, "passage": {**RECORD["passage"], "text": TEXT.replace("met", "saw")}}  # type: ignore[dict-item]
    read(declared, tmp_path, [RECORD])
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, [RECORD, other, other])))
    splits = deal(
        read_published(declared, tmp_path, declared.task_for()), seed=0, validation_size=1
    )
    assert len(splits.test) == 2
    assert splits.duplicates == 4  # both queries of `other` again, and those of the test
    assert len(splits.train) + len(splits.validation) == 2


SQUAD = {
    "id": "1",
    "title": "Rome",
    "context": "Rome is in Italy, of Italy.",
    "question": " Where? ",
}
HUB_ANSWERS = {"text": ["Italy", "in Italy", "Italy"], "answer_start": [11, 8, 21]}
LIST_ANSWERS = [{"text": "Italy", "answer_start": 11}, {"text": "in Italy", "answer_start": 8}]


@pytest.mark.parametrize("answers", [HUB_ANSWERS, LIST_ANSWERS], ids=["hub", "list"])
def test_squad(tmp_path: Path, answers: Any) -> None:
    [row] = read(catalog.load("squad"), tmp_path, [{**SQUAD, "answers": answers}])
    assert (row.label, row.answers) == ("Italy", (("Italy",), ("in Italy",)))
    assert row.options == ()
    task = catalog.load("squad").task_for()
    shown = "Title: Rome\nContext: Rome is in Italy, of Italy.\nQuestion: Where?\nAnswer:"
    assert task.prompt(row.fields) == shown
    assert (task.kind, task.loss, task.stop, task.max_new_tokens) == (
        "generation",
        "vocabulary",
        ("\n",),
        50,
    )


NO_DATE = {"day": "", "month": "", "year": ""}
NUMBER = {"number": "3", "date": NO_DATE, "spans": []}
DATE = {"number": "", "date": {"day": "4", "month": "May", "year": "1980"}, "spans": []}
YEAR = {"number": "", "date": {"year": "1980"}, "spans": []}
SPANS = {"number": "", "date": NO_DATE, "spans": ["Bo", "Ann"]}
HUB_OBJECTS = {
    "number": ["3", "", ""],
    "date": [NO_DATE, NO_DATE, DATE["date"]],
    "spans": [[], ["Bo", "Ann"], []],
    "worker_id": ["a", "b", "c"],
}


@pytest.mark.parametrize(
    ("keys", "answers"),
    [
        ({"answer": NUMBER}, [("3",)]),
        ({"answer": {**NUMBER, "number": 0}}, [("0",)]),
        ({"answer": DATE}, [("4 May 1980",)]),
        ({"answer": YEAR}, [("1980",)]),
        ({"answer": SPANS}, [("Bo", "Ann")]),
        ({"answer": NUMBER, "validated_answers": [DATE, NUMBER, SPANS]}, [("3",), ("4 May 1980",), ("Bo", "Ann")]),
        ({"answer": SPANS, "validated_answers": HUB_OBJECTS}, [("Bo", "Ann"), ("3",), ("4 May 1980",)]),
        ({"answer": NUMBER, "validated_answers": {"number": [], "date": [], "spans": []}}, [("3",)]),
        ({"answers_spans": {"spans": ["3", "three"], "types": ["number", "span"]}}, [("3",), ("three",)]),
    ],
)  # fmt: skip
def test_drop(tmp_path: Path, keys: dict[str, Any], answers: list[tuple[str, ...]]) -> None:
    row = {"passage": "Bo, Ann.", "question": "How many? ", **keys}
    [found] = read(catalog.load("drop"), tmp_path, [row])
    assert list(found.answers) == answers
    assert found.label == ", ".join(answers[0])
    task = catalog.load("drop").task_for()
    assert task.prompt(found.fields) == "Passage: Bo, Ann.\nQuestion: How many?\nAnswer:"
    assert task.metric == "drop_f1"


# The files as they were first published: one JSON document each.

ARTICLES = {
    "version": "1.1",
    "data": [
        {
            "title": title,
            "paragraphs": [
                {"context": f"{text} in Italy.", "qas": [
                    {"id": f"{title}{text}{i}", "question": f" Where {i}? ", "answers": LIST_ANSWERS[i:]}
                    for i in range(2)
                ]}
                for text in texts
            ],
        }
        for title, texts in (("Rome", ("Rome is", "It is")), ("Bari", ("Bari is",)), ("None", ()))
    ],
}  # fmt: skip
PASSAGES = {
    "nfl_1184": {
        "passage": "Bo, Ann.",
        "qa_pairs": [
            {"question": "How many? ", "answer": NUMBER, "query_id": "a", "validated_answers": [DATE, NUMBER]},
            {"question": "When?", "answer": DATE, "query_id": "b"},
        ],
        "wiki_url": "x",
    },
    "history_2": {"passage": "None.", "qa_pairs": []},
    "history_1": {"passage": "Ann.", "qa_pairs": [{"question": "Who?", "answer": SPANS, "validated_answers": []}]},
}  # fmt: skip


def read_whole(name: str, folder: Path, document: Any, indent: int | None) -> list[Example]:
    """Rows of a built-in task whose files are one document each, as its test rows."""
    declared = catalog.load(name)
    for split in ("train", "test"):
        [file] = [file for file in declared.splits[split] if file.endswith(".json")]
        (folder / file).write_text(json.dumps(document, indent=indent))
    return read_published(declared, folder, declared.task_for()).rows["test"]


@pytest.mark.parametrize("indent", [None, 4])
def test_squad_as_first_published(tmp_path: Path, indent: int | None) -> None:
    found = read_whole("squad", tmp_path, ARTICLES, indent)
    assert {row.file for row in found} == {str(tmp_path / "dev-v1.1.json")}
    assert [tuple(row.fields.values()) for row in found] == [
        (title, f"{text} in Italy.", f"Where {i}?")
        for title, text in (("Rome", "Rome is"), ("Rome", "It is"), ("Bari", "Bari is"))
        for i in range(2)
    ]
    assert [row.answers for row in found] == [(("Italy",), ("in Italy",)), (("in Italy",),)] * 3
    assert {row.line for row in found} == {1 if indent is None else 3}
    flat = [
        {"title": a["title"], "context": p["context"], **question}
        for a in ARTICLES["data"] for p in a["paragraphs"] for question in p["qas"]  # type: ignore[index, union-attr]
    ]  # fmt: skip
    by_lines = read(catalog.load("squad"), tmp_path / "lines", flat)
    assert [(r.fields, r.label, r.answers) for r in by_lines] == [
        (r.fields, r.label, r.answers) for r in found
    ]


@pytest.mark.parametrize("indent", [None, 4])
def test_drop_as_first_published(tmp_path: Path, indent: int | None) -> None:
    found = read_whole("drop", tmp_path, PASSAGES, indent)
    assert [(row.fields, row.answers) for row in found] == [
        ({"passage": "Bo, Ann.", "question": "How many?"}, (("3",), ("4 May 1980",))),
        ({"passage": "Bo, Ann.", "question": "When?"}, (("4 May 1980",),)),
        ({"passage": "Ann.", "question": "Who?"}, (("Bo", "Ann"),)),
    ]
    text = json.dumps(PASSAGES, indent=indent).split("\n")
    starts = [i for i, line in enumerate(text, 1) for name in PASSAGES if f'"{name}"' in line]
    assert [row.line for row in found] == [starts[0], starts[0], starts[2]]


@pytest.mark.parametrize(
    ("name", "document", "said"),
    [
        ("drop", {**PASSAGES, "x": {"passage": "a", "qa_pairs": [{"question": "b", "answer": SPANS}, {"question": "c"}]}},
         ":1: task 'drop' reads the answers from .* (in qa_pairs[1])"),
        ("drop", {**PASSAGES, "x": {"passage": "a"}}, ":1: task 'drop' reads 'question' from .*: there are 'passage'"),
        ("drop", {**PASSAGES, "x": {"passage": "a", "qa_pairs": 3}}, ":1: qa_pairs is not a list"),
        ("drop", {**PASSAGES, "version": 3}, ":1: 'version': '3' is not a JSON object"),
        ("squad", {"data": [*ARTICLES["data"], {"title": "a", "paragraphs": [{"context": "b", "qas": [{"question": "c", "answers": LIST_ANSWERS}]}]}]},
         ":1: the answer 'Italy' is not in 'data[*].paragraphs[*].context' or 'context': .* (in data[3].paragraphs[0].qas[0])"),
        ("squad", {"data": [{"title": "a", "paragraphs": [{"context": "b", "qas": [{"question": "c", "answers": [], "is_impossible": True}]}]}]},
         ":1: no right answer in the row: .* (in data[0].paragraphs[0].qas[0])"),
        ("squad", {"data": {}}, ":1: data is not a list"),
    ],
)  # fmt: skip
def test_documents_refused(tmp_path: Path, name: str, document: Any, said: str) -> None:
    with pytest.raises(UserError) as caught:
        read_whole(name, tmp_path, document, None)
    assert "\n" not in str(caught.value)
    [file] = [f for f in catalog.load(name).splits["train"] if f.endswith(".json")]
    start, _, end = said.partition(".*")
    assert str(caught.value).startswith(f"{tmp_path / file}{start}")
    assert end in str(caught.value)


def test_several_places_of_answers(tmp_path: Path) -> None:
    """The first that is there is read, of `also` and `within` as of `from`."""
    answers = {"from": ["b", "a"], "also": ["y", "x"], "within": ["u", "text"]}
    declared = declare(tmp_path, kind="generation", answers=answers)
    row = {"text": "one two", "a": "one", "x": "two"}
    [found] = read(declared, tmp_path, [row])
    assert found.answers == (("one",), ("two",))
    [found] = read(declared, tmp_path, [{**row, "u": "three", "b": "three", "y": "three"}])
    assert found.answers == (("three",),)
    with pytest.raises(UserError, match="the answer 'one' is not in 'u' or 'text'"):
        read(declared, tmp_path, [{**row, "u": "three"}])


# ---------------------------------------------------------------------------------- shapes of one's own


@pytest.mark.parametrize(
    ("options", "row", "right"),
    [
        ({"columns": ["a", "b"]}, {"a": "Yes ", "b": "No"}, [("No",)]),
        ("options", {"options": ["Yes", "No", "No"]}, [("No",)]),
        ({"from": ["list", "options"]}, {"options": ["Yes", {"text": "No", "id": 7}]}, [("No",)]),
        ({"from": "options", "change": "small"}, {"options": ["Yes", "No"]}, [("no",)]),
        ({"from": "options", "replace": {"N": "n"}}, {"options": ["Yes", "No"]}, [("no",)]),
        ("options", {"options": [True, 5, "No"]}, [("No",)]),
    ],
)
def test_options(tmp_path: Path, options: Any, row: dict[str, Any], right: list[Any]) -> None:
    declared = declare(tmp_path, options=options, answers="right")
    found = read(declared, tmp_path, [{"text": "x", "right": "No", **row}])
    assert list(found[0].answers) == right
    assert found[0].label in found[0].options
    assert len(set(found[0].options)) == len(found[0].options)


@pytest.mark.parametrize(
    ("right", "expected"),
    [
        (2, ["blue"]),
        ("2", ["blue"]),
        ("red", ["red"]),
        (["blue", 0], ["blue", "red"]),
        (["blue", "blue", 2], ["blue"]),
        ({"text": ["blue"]}, ["blue"]),
    ],
)
def test_places_are_those_of_the_file(tmp_path: Path, right: Any, expected: list[str]) -> None:
    """A text that a list names twice is one option; a place counts in the list as it is published."""
    declared = declare(tmp_path, options="options", answers="right")
    rows = [{"text": "x", "options": ["red", "red", "blue"], "right": right}]
    [found] = read(declared, tmp_path, rows)
    assert found.options == ("red", "blue")
    assert [bag for (bag,) in found.answers] == expected
    assert found.label == expected[0]


def test_options_in_a_table(tmp_path: Path) -> None:
    keys = {"options": {"columns": ["a", "b"]}, "answers": {"from": "right", "one": True}}
    declared = declare(tmp_path, **keys, splits={"train": "train.csv", "test": "test.csv"})
    for name in ("train", "test"):
        (tmp_path / f"{name}.csv").write_text('text,a,b,right\nx,"no, never",yes,0\ny,u,v,v\n')
    found = read_published(declared, tmp_path, declared.task_for()).rows["test"]
    assert [row.label for row in found] == ["no, never", "v"]


def test_answers_of_generation(tmp_path: Path) -> None:
    declared = declare(tmp_path, kind="generation", answers={"from": "a", "also": "more"})
    rows = [
        {"text": "x", "a": "Rome"},
        {"text": "x", "a": 5, "more": ["five", " ", ["2", "3"]]},
        {"text": "x", "a": [["Ann", "Bo"]], "more": []},
    ]
    found = [list(row.answers) for row in read(declared, tmp_path, rows)]
    assert found == [[("Rome",)], [("5",), ("five",), ("2", "3")], [("Ann", "Bo")]]


CHARACTERS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=9)


@given(texts=st.lists(CHARACTERS, min_size=2, max_size=5, unique=True), place=st.integers(0, 4))
def test_any_texts(tmp_path_factory: pytest.TempPathFactory, texts: list[str], place: int) -> None:
    folder = tmp_path_factory.getbasetemp() / "any"
    declared = declare(folder, options="options", answers="right")
    texts = [f"{text}!" for text in texts]  # neither blank nor a place
    right = texts[place % len(texts)]
    by_text, by_place = read(
        declared,
        folder,
        [{"text": "x", "options": texts, "right": r} for r in (right, place % len(texts))],
    )
    assert by_text.options == tuple(texts)
    assert by_text.label == by_place.label == right


# --------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("keys", "row", "said"),
    [
        ({}, {"right": None}, "'an answer' is 'null', not a text"),
        ({}, {"right": []}, "no right answer in the row: fill it in or drop the row"),
        ({}, {"right": " "}, "no right answer in the row"),
        ({}, {"right": 2}, "the right answer '2' is none of the 2 options, such as 'Yes'"),
        ({}, {"right": -1}, "the right answer '-1' is none of the 2 options"),
        ({}, {"right": "no"}, "the right answer 'no' is none of"),
        ({}, {"right": [["Yes", "No"]]}, "the right answer 'Yes, No' is none of"),
        ({}, {"right": ["Yes", "No"]}, r"2 right answers \('Yes', 'No'\) where the task is declared to have one"),
        ({}, {"right": {"spans": "Yes"}}, "an answer's 'spans' is '\"Yes\"': it must be a list of texts"),
        ({}, {"right": {"spans": 3, "number": ""}}, "an answer's 'spans' is '3': it must be a list"),
        ({}, {"right": {"date": "May"}}, "an answer's 'date' is '\"May\"': it must be day, month and year"),
        ({}, {"right": {"date": [1], "number": [""]}}, "an answer's 'date' is '1': it must be day"),
        ({}, {"b": None}, "'an option' is 'null', not a text"),
        ({}, {"b": "Yes"}, "two options are the same text: 'Yes'"),
        ({"options": {"columns": ["a", "c"]}}, {}, "option 'c' is not a column of the row"),
        ({"options": "list"}, {}, "the options at list are not a list"),
        ({"options": "list"}, {"list": "Yes"}, "the options at list are not a list"),
        ({"options": "list"}, {"list": ["Yes", "Yes"]}, "1 different options: at least two are needed"),
        ({"options": "list"}, {"list": []}, "0 different options"),
        ({"options": "list"}, {"list": ["1", "0"], "right": 0}, "the right answer '0' is one option by its text, and by its place '1'"),
        ({"options": {"from": "list", "text": "text"}}, {"list": [{"start": 0, "end": 4}]}, "an option from 0 to 4 of a text of 3 characters"),
        ({"options": {"from": "list", "text": "text"}}, {"list": [{"start": 2, "end": 1}]}, "an option from 2 to 1"),
        ({"options": {"from": "list", "text": "text"}}, {"list": [{"start": -1, "end": 1}]}, "an option from -1 to 1"),
        ({"options": {"from": "list", "text": "none"}}, {"list": [{"start": 0, "end": 1}]}, "neither a text nor a place in one"),
        ({"options": {"from": "list"}}, {"list": [{"begin": 0}]}, r"the option '{\"begin\": 0}' is neither"),
        ({"options": {"columns": ["a", "b"], "into": "query", "at": "_"}}, {}, "query has no '_' to put the options at: it is missing"),
        ({"options": {"columns": ["a", "b"], "into": "text", "at": "_"}}, {}, "text has no '_' to put the options at: it is 'x y'"),
        ({"answers": "wrong"}, {}, "task 'own' reads the answers from wrong, which is not there"),
        ({"answers": {"from": "right", "within": "text"}}, {}, "the answer 'Yes' is not in 'text': correct the row"),
        ({"answers": {"from": "right", "within": "none"}}, {}, "'none', which holds the answers, is no text"),
    ],
)  # fmt: skip
def test_rows_refused(tmp_path: Path, keys: dict[str, Any], row: dict[str, Any], said: str) -> None:
    usual = {"options": {"columns": ["a", "b"]}, "answers": {"from": "right", "one": True}}
    declared = declare(tmp_path, **{**usual, **keys})
    bad = {"text": "x y", "a": "Yes", "b": "No", "right": "Yes", **row}
    more = {"text": "Yes _", "b": "No", "c": "Maybe", "list": ["Yes", "No"], "query": "a _ z"}
    good = {**more, "a": "Yes", "right": "Yes", "wrong": "Yes", "none": "Yes"}
    with pytest.raises(UserError, match=said) as caught:
        read(declared, tmp_path, [good, bad])
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}/train.jsonl:2: ")


CHOICE = {"options": {"columns": ["a", "b"]}, "answers": "right"}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"options": None}, "kind 'choice' needs options"),
        ({"answers": None}, "kind 'choice' needs answers: where they are in a row"),
        ({"kind": "generation"}, "kind 'generation' has no options"),
        ({"kind": "classification", "labels": {"a": "A", "b": "B"}}, "kind 'classification' has no options"),
        ({"kind": "classification", "labels": {"a": "A", "b": "B"}, "options": None}, "kind 'classification' has no answers"),
        ({"labels": {"a": "A", "b": "B"}}, "labels are for kind 'classification', and the kind is 'choice'"),
        ({"template": "{text} {mask}"}, "needs a causal model: end the template where the answer follows"),
        ({"options": {"columns": ["a", "b"], "from": "c"}}, "options are either from: a column that lists them, or columns"),
        ({"options": {"text": "c"}}, "options are either from"),
        ({"options": {"columns": ["a", "b"], "into": "c"}}, "options: into and at go together"),
        ({"options": {"columns": ["a", "b"], "colour": "c"}}, "options: key 'colour' is unknown"),
        ({"options": {"columns": ["a", "b"], "change": "x"}}, "options has the change 'x'"),
        ({"answers": {"one": True}}, "answers: from is missing"),
        ({"answers": {"from": "right", "one": "yes"}}, "answers: one is 'yes': it must be true or false"),
        ({"metrics": ["drop_f1"]}, "metric 'drop_f1' is unknown for kind 'choice': known are accuracy, f1, exact_match"),
        ({"positive": "a"}, "positive is 'a': it must be one of the labels .there are none"),
        ({"score": "max"}, "score is 'max': it must be one of sum, mean"),
        ({"null": "{other}"}, "null '{other}': field 'other' is not in the template"),
        ({"null": 3}, "null is 3: it must be a text"),
        ({"stop": [""]}, "stop is .*: it must be a text or a list of texts, none of them empty"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0: it must be a whole number from 1"),
        ({"kind": "generation", "options": None, "loss": "choices"}, "a task of kind 'generation' has none: choose vocabulary"),
    ],
)  # fmt: skip
def test_declarations_refused(tmp_path: Path, keys: dict[str, Any], said: str) -> None:
    declare(tmp_path, **CHOICE)
    changed = {key: value for key, value in {**CHOICE, **keys}.items() if value is not None}
    with pytest.raises(UserError, match=said) as caught:
        declare(tmp_path, **changed)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "own.yaml"))


# ---------------------------------------------------------------------------------------- splits apart


def articles(folder: Path, **splits: list[tuple[str, int]]) -> Path:
    """Files of question rows: so many of each title."""
    folder.mkdir(exist_ok=True)
    for split, counts in splits.items():
        rows = [
            {"title": title, "text": f"{split} {title} {i}", "a": "x"}
            for title, count in counts
            for i in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def titles(rows: list[Example]) -> set[str]:
    return {row.fields["title"].casefold() for row in rows}


@pytest.mark.parametrize("seed", range(3))
def test_splits_are_apart(tmp_path: Path, seed: int) -> None:
    """By a column that the template does not show."""
    keys = {"kind": "generation", "answers": "a", "apart": "title", "train_from_test": 0.5}
    declared = declare(tmp_path, **keys)
    folder = articles(tmp_path / "d", test=[(f"t{i}", 1 + i % 3) for i in range(20)])
    found = read_published(declared, folder, declared.task_for())
    splits = deal(found, seed=seed)
    parts = [titles(part) for part in (splits.train, splits.validation, splits.test)]
    assert all(parts)
    assert sum(map(len, parts)) == len(set.union(*parts))
    assert splits.test == deal(found, seed=seed + 1).test
    assert 15 <= len(splits.test) <= 24  # half of 39, by whole titles
    few = deal(found, seed=seed, shots=3)
    assert (len(few.train), len(few.validation)) == (3, 3)
    assert not titles(few.train) & titles(few.validation)


def test_published_splits_that_share_are_parted(tmp_path: Path) -> None:
    declared = declare(
        tmp_path, kind="generation", answers="a", apart="title",
        splits={"train": "train.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"},
    )  # fmt: skip
    folder = articles(
        tmp_path / "d",
        train=[("a", 3), ("b", 2), ("c", 4)],
        validation=[("B", 2), ("d", 3)],
        test=[("d", 2), ("C", 5)],
    )
    splits = deal(read_published(declared, folder, declared.task_for()), seed=0)
    assert (titles(splits.train), titles(splits.validation), titles(splits.test)) == (
        {"a"}, {"b"}, {"c", "d"},
    )  # fmt: skip
    assert splits.notes == [
        "3 validation rows left out that share title with rows of another split",
        "6 training rows left out that share title with rows of another split",
    ]


def test_one_article_cannot_be_parted(tmp_path: Path) -> None:
    declared = declare(tmp_path, kind="generation", answers="a", apart="title")
    folder = articles(tmp_path / "d", train=[("a", 9)], test=[("b", 3)])
    found = read_published(declared, folder, declared.task_for())
    with pytest.raises(UserError, match="all training rows share title, by which the splits are"):
        deal(found, seed=0)


# ------------------------------------------------------------------------------------------- real rows


def real(name: str, folder: str) -> Any:
    if not (SHARED / folder).is_dir():
        pytest.skip(f"no real rows: {SHARED / folder} is absent")
    declared = catalog.load(name)
    return read_published(declared, SHARED / folder, declared.task_for())


def test_real_copa() -> None:
    found = real("copa", "superglue/COPA")
    assert [len(found.rows[split]) for split in ("train", "validation", "test")] == [32, 32, 100]
    row = found.rows["test"][0]
    assert found.declaration.task_for().prompt(row.fields) == "The man turned on the faucet so"
    assert row.options == ("the toilet filled with water.", "water flowed from the spout.")
    assert row.label == "water flowed from the spout."
    splits = deal(found, seed=0)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (32, 32, 100)


def test_real_record() -> None:
    found = real("record", "superglue/ReCoRD")
    assert [len(found.rows[split]) for split in ("train", "validation", "test")] == [32, 0, 32]
    row = found.rows["train"][0]
    task = found.declaration.task_for()
    shown = task.prompt(row.fields)
    assert shown.startswith("By Hamish Mackay Goals from Diego Costa and Kurt Zouma ensured")
    assert "\n- Chelsea come from behind" in shown
    assert shown.endswith("\n-")
    assert "@" not in shown
    for each in found.examples:
        assert len(each.options) == len(each.shown) == len(set(each.shown))
        assert each.label in each.options
        assert not any("@placeholder" in sentence for sentence in each.shown)
        assert all(e in s for e, s in zip(each.options, each.shown, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_real_squad(seed: int) -> None:
    found = real("squad", "squad_en")
    assert [len(found.rows[split]) for split in ("train", "validation", "test")] == [0, 0, 1190]
    row = found.rows["test"][0]
    shown = found.declaration.task_for().prompt(row.fields)
    assert shown.startswith("Title: Super_Bowl_50\nContext: The Panthers defense gave up just 308")
    assert shown.endswith(
        "\nQuestion: How many points did the Panthers defense surrender?\nAnswer:"
    )
    assert row.answers == (("308",),)
    splits = deal(found, seed=seed)
    parts = [{row.fields["title"] for row in part} for part in (splits.train, splits.validation, splits.test)]  # fmt: skip
    assert sum(map(len, parts)) == len(set.union(*parts))
    assert len(splits.validation) <= 200
    assert 800 <= len(splits.train) + len(splits.validation) + len(splits.test) <= 1190
    assert 300 <= len(splits.test) <= 420
    assert splits.test == deal(found, seed=9).test
