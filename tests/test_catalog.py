"""Declarations: each built-in one on rows as they are published; what is wrong with one is named."""

from __future__ import annotations

import json
import re
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from justforward import catalog
from justforward.catalog import FOLDER, KEYS, load
from justforward.cli import main
from justforward.config import TrainConfig
from justforward.data import Example
from justforward.declaration import CHANGES, Declaration
from justforward.errors import UserError
from justforward.metrics import figures
from justforward.objectives import Objective
from justforward.published import Published, deal, read_published, scored_rows
from justforward.settings import resolved
from justforward.tasks import METRICS

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
NAMES = catalog.names()

# A row as published, the label it has, and how it is put to a causal and to a masked model.
Shown = tuple[dict[str, Any], str, str, str | None]
NLI = {"premise": "A dog runs.", "hypothesis": "The dog moves."}
NLI_CAUSAL = 'Suppose A dog runs. Can we infer that "The dog moves."? Yes, No, or Maybe?\n'
NLI_MASKED = "A dog runs? {mask}, the dog moves."
RTE_CAUSAL = 'A dog runs.\nDoes this mean that "The dog moves." is true? Yes or No?\n'
PASSAGE = {
    "text": "Ann has a cat.",
    "questions": [
        {
            "question": "Who has a cat?",
            "answers": [{"text": "Ann", "label": 1}, {"text": "Bob", "label": 0}],
        }
    ],
}
MULTIRC = (
    "Ann has a cat.\nQuestion: Who has a cat?\n"
    'I found this answer "Ann". Is that correct? Yes or No?\n'
)
WSC = (
    "Ann saw Bo; He waved.\nIn the previous sentence, does the pronoun "
    '"he" refer to Bo? Yes or No?\n'
)
WIC = (
    'Does the word "bank" have the same meaning in these two sentences? Yes, No?\n'
    "A bank lends.\nA bank floods.\n"
)
PAIR = {"sentence1": "Snow fell.", "sentence2": "It snowed."}
COPA = {"premise": "It rained.", "choice1": "The road got wet.", "choice2": "I slept."}
RECORD = {
    "passage": {"text": "Ann met Bo.\n@highlight\nBo waved", "entities": [{"start": 0, "end": 2}, {"start": 8, "end": 9}]},
    "qas": [{"query": "Then @placeholder left.", "answers": [{"start": 8, "end": 9, "text": "Bo"}]}],
}  # fmt: skip
SQUAD = {"title": "Rome", "context": "Rome is in Italy.", "question": "Where is it? "}
SQUAD_SHOWN = "Title: Rome\nContext: Rome is in Italy.\nQuestion: Where is it?\nAnswer:"
DROP = {"passage": "Ann has 3 cats.", "question": "How many?"}
DROP_SHOWN = "Passage: Ann has 3 cats.\nQuestion: How many?\nAnswer:"
QUESTIONS = {"question1": "How old is he?", "question2": "What is his age?"}

SHOWN: dict[str, list[Shown]] = {
    "sst2": [
        ({"sentence": "a fine film ", "label": 1}, "positive", "a fine film It was", "a fine film It was {mask}."),
        ({"text": "dull", "label": "negative"}, "negative", "dull It was", "dull It was {mask}."),
    ],
    "sst5": [({"sentence": "so so", "label": 2}, "neutral", "so so It was", "so so It was {mask}.")],
    "mr": [({"text": "dull", "label": 0}, "negative", "dull It was", "dull It was {mask}.")],
    "cr": [({"text": "handy", "label": 1}, "positive", "handy It was", "handy It was {mask}.")],
    "mpqa": [({"text": "hope", "label": 1}, "positive", "hope It was", "hope It was {mask}.")],
    "subj": [
        ({"text": "he flees", "label": 1}, "objective", "he flees This is", "he flees This is {mask}."),
        ({"text": "i wept", "label": 1, "label_text": "subjective"}, "subjective", "i wept This is", "i wept This is {mask}."),
    ],
    "cola": [({"sentence": "He go.", "label": 0, "idx": 3}, "unacceptable", "He go. This is", "He go. This is {mask}.")],
    "trec": [
        ({"text": "How far ?", "label": 5}, "number", "Question: How far ? Answer type:", "{mask}: How far ?"),
        ({"text": "What is NASA ?", "coarse_label": 0}, "abbreviation", "Question: What is NASA ? Answer type:", "{mask}: What is NASA ?"),
        ({"text": "What is ice ?", "coarse_label": 2}, "description", "Question: What is ice ? Answer type:", "{mask}: What is ice ?"),
    ],
    "rte": [
        ({**NLI, "label": "entailment"}, "entailment", RTE_CAUSAL, NLI_MASKED),
        ({"sentence1": NLI["premise"], "sentence2": NLI["hypothesis"], "label": 1}, "not_entailment", RTE_CAUSAL, NLI_MASKED),
    ],
    "cb": [
        ({**NLI, "label": "contradiction", "idx": 1}, "contradiction", NLI_CAUSAL, None),
        ({**NLI, "label": 2}, "neutral", NLI_CAUSAL, None),
    ],
    "sick": [({**NLI, "label": "neutral"}, "neutral", NLI_CAUSAL, NLI_MASKED)],
    "snli": [
        ({**NLI, "label": 2}, "contradiction", NLI_CAUSAL, NLI_MASKED),
        ({"sentence1": NLI["premise"], "sentence2": NLI["hypothesis"], "gold_label": "neutral", "label": "x"}, "neutral", NLI_CAUSAL, NLI_MASKED),
    ],
    "mnli": [({**NLI, "label": 0, "idx": 9}, "entailment", NLI_CAUSAL, NLI_MASKED)],
    "boolq": [({"question": "is it so", "passage": "It is so.", "label": True}, "yes", "It is so. Is it so?\n", None)],
    "wic": [({"word": "bank", "sentence1": "A bank lends.", "sentence2": "A bank floods.", "label": False}, "no", WIC, None)],
    "wsc": [
        ({"text": "Ann saw Bo; He waved.", "target": {"span1_text": "Bo", "span2_text": "He"}, "label": True}, "yes", WSC, None),
        ({"text": "Ann saw Bo; He waved.", "span1_text": "Bo", "span2_text": "He", "label": 0}, "no", WSC, None),
    ],
    "multirc": [
        ({"idx": 0, "passage": PASSAGE}, "right", MULTIRC, None),
        ({"paragraph": "Ann has a cat.", "question": "Who has a cat?", "answer": "Ann", "label": 1}, "right", MULTIRC, None),
    ],
    "copa": [
        ({**COPA, "question": "effect", "label": 0}, "the road got wet.", "It rained so", None),
        ({**COPA, "question": "cause", "label": 1}, "I slept.", "It rained because", None),
    ],
    "record": [
        (RECORD, "Bo", "Ann met Bo.\n- Bo waved\n-", None),
        ({"passage": "Ann met Bo.", "query": "@placeholder left.", "entities": ["Bo", "Ann"], "answers": ["Ann"]}, "Ann", "Ann met Bo.\n-", None),
    ],
    "squad": [
        ({**SQUAD, "answers": {"text": ["in Italy", "Italy"], "answer_start": [8, 11]}}, "in Italy", SQUAD_SHOWN, None),
        ({**SQUAD, "answers": [{"text": "Italy", "answer_start": 11}]}, "Italy", SQUAD_SHOWN, None),
    ],
    "drop": [
        ({**DROP, "answer": {"number": "3", "date": {}, "spans": []}, "validated_answers": []}, "3", DROP_SHOWN, None),
        ({**DROP, "answers_spans": {"spans": ["three"], "types": ["span"]}}, "three", DROP_SHOWN, None),
    ],
    "mrpc": [({**PAIR, "label": 1}, "same", "Snow fell.\nIt snowed.\nDo these two sentences say the same? Yes or No?\n", "Snow fell. {mask}, it snowed.")],
    "qqp": [({**QUESTIONS, "label": 0}, "different", "How old is he?\nWhat is his age?\nDo these two questions ask the same? Yes or No?\n", "How old is he? {mask}, what is his age?")],
    "qnli": [({"question": "Who won?", "sentence": "Bo won.", "label": 0}, "entailment", 'Bo won.\nDoes this answer the question "Who won?"? Yes or No?\n', "Who won? {mask}, bo won.")],
}  # fmt: skip


def write(folder: Path, **splits: list[Any]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def read(declared: Declaration, folder: Path, kind: Any = "causal") -> Published:
    return read_published(declared, folder, declared.task_for(kind))


# ------------------------------------------------------------------------------- the built-in tasks


@pytest.mark.parametrize("name", NAMES)
def test_rows_as_published(name: str, tmp_path: Path) -> None:
    declared = load(name)
    assert declared.name == name
    for row, label, causal, masked in SHOWN[name]:
        files = {Path(declared.splits[split][0]).stem: [row] for split in ("train", "test")}
        folder = write(tmp_path / "data", **files)
        for kind, prompt in (("causal", causal), ("masked", masked)):
            if prompt is None:
                assert kind not in declared.kinds
                continue
            found = read(declared, folder, kind)
            example = found.rows["test"][0]
            assert example.label == label
            assert declared.task_for(kind).prompt(example.fields) == prompt  # type: ignore[arg-type]


def test_words_of_the_paper() -> None:
    assert load("sst2").labels == {"negative": "terrible", "positive": "great"}
    assert list(load("sst5").labels.values()) == ["terrible", "bad", "okay", "good", "great"]
    assert load("cb").labels == {"entailment": "Yes", "contradiction": "No", "neutral": "Maybe"}
    assert load("boolq").labels == {"no": "No", "yes": "Yes"}
    assert load("trec").task_for("masked").labels["abbreviation"] == "Expression"
    for name in ("snli", "mnli", "sick"):
        words = {"entailment": "Yes", "neutral": "Maybe", "contradiction": "No"}
        assert load(name).task_for("masked").labels == words


# What the paper asks without a row's content, where it calibrates (templates of its repository, encode_sfc).
NULLS = {
    "sst2": " It was", "copa": "so", "record": "-",
    **dict.fromkeys(("boolq", "cb", "multirc", "rte", "wic", "wsc"), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", NULLS)
def test_null_prompts_of_the_paper(name: str, tmp_path: Path) -> None:
    declared = load(name)
    row = SHOWN[name][0][0]
    files = {Path(declared.splits[split][0]).stem: [row] for split in ("train", "test")}
    example = read(declared, write(tmp_path / "d", **files)).rows["test"][0]
    assert declared.task_for().null_prompt(example.fields) == NULLS[name]
    if "masked" in declared.kinds:
        assert declared.task_for("masked").null is None
    own = declared.task_for(template=f"So: {declared.template}")
    assert own.null is None


DOCUMENTED = (ROOT / "docs" / "tasks.md").read_text()
BLOCKS = re.findall(r"```yaml\n(.*?)```", DOCUMENTED, re.S)


def documented(name: str, folder: Path) -> Declaration:
    """The declaration of that name in docs/tasks.md."""
    [written] = [each for each in BLOCKS if each.startswith(f"name: {name}\n")]
    (folder / f"{name}.yaml").write_text(written)
    return load(str(folder / f"{name}.yaml"))


def test_the_documentation_names_all_there_is() -> None:
    kinds = [yaml.safe_load(each).get("kind", "classification") for each in BLOCKS]
    assert kinds == list(METRICS)
    words = set(re.findall(r"`(\w+)`", DOCUMENTED))
    metrics = {metric for each in METRICS.values() for metric in each}
    inner = {
        "from",
        "columns",
        "text",
        "into",
        "at",
        "also",
        "within",
        "values",
        "change",
        "replace",
    }
    assert words >= {*CHANGES, *KEYS, *metrics, *METRICS, *inner}
    named = set(re.findall(r"^\| (`.*?) \|", DOCUMENTED.split("## All keys")[1], re.M))
    told = {word for cell in named for word in re.findall(r"`(\w+)", cell)}
    assert told == set(KEYS)


def test_the_documented_classification(tmp_path: Path) -> None:
    declared = documented("spam", tmp_path)
    rows = [{"mail": {"text": " hello"}, "label": 0}, {"body": "win!", "label": 1}, {"label": -1}]
    found = read(declared, write(tmp_path / "d", train=rows, eval=rows))
    assert found.dropped == 2
    prompts = [declared.task_for().prompt(row.fields) for row in found.rows["test"]]
    assert prompts[0] == "Hello\nIs this mail wanted? Yes or No?\n"
    assert [row.label for row in found.rows["test"]] == ["ham", "spam"]


def test_the_documented_choice(tmp_path: Path) -> None:
    declared = documented("ending", tmp_path)
    row = {"story": "It rained. ", "ending1": "I slept.", "ending2": "The road was wet."}
    rows = [{**row, "right": 1}, {**row, "right": "I slept."}]
    first, second = read(declared, write(tmp_path / "d", train=rows, test=rows)).rows["test"]
    assert declared.task_for().prompt(first.fields) == "It rained. Then"
    assert declared.task_for().null_prompt(first.fields) == "Then"
    assert first.options == second.options == ("I slept.", "the road was wet.")
    assert [first.label, second.label] == ["the road was wet.", "I slept."]
    assert declared.task_for().score == "mean"


def test_the_documented_generation(tmp_path: Path) -> None:
    declared = documented("places", tmp_path)

    def row(i: int) -> dict[str, Any]:
        text = f"{i} is in Oslo, Norway."
        answers = {"text": ["Oslo"]}
        return {"town": f"t{i // 3}", "text": text, "question": "Where", "answers": answers, "more": ["Norway"]}  # fmt: skip

    found = read(declared, write(tmp_path / "d", test=[row(i) for i in range(30)]))
    example = found.rows["test"][0]
    task = declared.task_for()
    assert task.prompt(example.fields) == "0 is in Oslo, Norway.\nQ: Where?\nA:"
    assert example.answers == (("Oslo",), ("Norway",))
    assert (task.stop, task.max_new_tokens) == (("\n", "Q:"), 20)
    splits = deal(found, seed=0)
    towns = [{e.fields["town"] for e in part} for part in (splits.train, splits.validation, splits.test)]  # fmt: skip
    assert all(towns)
    assert sum(map(len, towns)) == len(set.union(*towns)) == 10
    assert len(splits.test) == 12


def test_the_documented_objective(tmp_path: Path) -> None:
    [written] = re.findall(r"```python\n(.*?)```", DOCUMENTED, re.S)
    (tmp_path / "rewards.py").write_text(written)
    objective = Objective(
        f"{tmp_path}/rewards.py:reward", documented("ending", tmp_path).task_for()
    )
    row = Example({"story": "x"}, "a", "f", 1, ("a", "b"), (("a",),))
    assert objective.values([row, row], ["a", "b"]) == [1.0, 0.0]


def test_the_declarations_are_shipped() -> None:
    """hatchling takes all files of the package that git does not ignore."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert project["targets"]["wheel"] == {"packages": ["src/justforward"]}
    assert "src" in project["targets"]["sdist"]["include"]
    assert FOLDER.parent == ROOT / "src" / "justforward"
    ignored = (ROOT / ".gitignore").read_text().split()
    assert not {"*.yaml", "declarations/", "*.yml"} & set(ignored)


# --------------------------------------------------------------------------------------- real rows


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real rows: {SHARED} is absent")
@pytest.mark.parametrize(
    ("name", "folder", "rows", "dealt"),
    [
        ("sst2", "sst2", (6920, 0, 872), (None, 200, 872)),
        ("sst5", "sst5", (8544, 1101, 2210), (None, 200, 1000)),
        ("trec", "trec", (5452, 0, 500), (None, 200, 500)),
        ("rte", "glue_rte", (2490, 0, 277), (None, 200, 277)),
        ("sick", "sick", (4500, 500, 4927), (None, 200, 1000)),
        ("rte", "superglue/RTE", (32, 32, 277), (32, 32, 277)),
        ("cb", "superglue/CB", (32, 32, 56), (32, 32, 56)),
        ("boolq", "superglue/BoolQ", (32, 32, 3270), (32, 32, 1000)),
        ("wic", "superglue/WiC", (32, 32, 638), (32, 32, 638)),
        ("wsc", "superglue/WSC", (32, 32, 104), (None, 32, None)),
        ("multirc", "superglue/MultiRC", (None, None, 4848), (None, None, None)),
    ],
)
def test_real_rows(name: str, folder: str, rows: tuple[Any, ...], dealt: tuple[Any, ...]) -> None:
    if not (SHARED / folder).is_dir():
        pytest.skip(f"{SHARED / folder} is absent")
    declared = load(name)
    for kind in declared.kinds:
        found = read(declared, SHARED / folder, kind)
        for split, count in zip(("train", "validation", "test"), rows, strict=True):
            assert count is None or len(found.rows[split]) == count
        splits = deal(found, seed=13)
        for part, count in zip((splits.train, splits.validation, splits.test), dealt, strict=True):
            assert count is None or len(part) == count
            assert {row.label for row in part} == set(declared.labels)
        texts = [set(map(text, part)) for part in (splits.train, splits.validation, splits.test)]
        assert not texts[0] & texts[1]
        assert not (texts[0] | texts[1]) & texts[2]
        again = deal(found, seed=21)
        assert again.test == splits.test
        assert again.train != splits.train
        task = declared.task_for(kind)
        assert all(task.prompt(row.fields) for row in splits.train)


def text(example: Example) -> tuple[str, ...]:
    return tuple(example.fields.values())


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real rows: {SHARED} is absent")
def test_real_rows_of_one_label() -> None:
    splits = deal(read(load("wsc"), SHARED / "superglue" / "WSC"), seed=0)
    assert Counter(row.label for row in splits.train).keys() == {"yes", "no"}
    assert all(row.file.endswith("validation.jsonl") for row in splits.train + splits.test)
    assert "not of two labels" in splits.notes[0]


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real rows: {SHARED} is absent")
@pytest.mark.parametrize("seed", [13, 21, 42, 87, 100])
def test_real_rows_k_shot(seed: int) -> None:
    found = read(load("trec"), SHARED / "trec", "masked")
    splits = deal(found, seed=seed, shots=16)
    for part in (splits.train, splits.validation):
        assert set(Counter(row.label for row in part).values()) == {16}
    many = deal(found, seed=seed, shots=512)
    assert Counter(row.label for row in many.train)["human"] == 512
    assert 80 <= Counter(row.label for row in many.train)["abbreviation"] <= 86
    assert many.notes == ["validation has no row of label 'abbreviation'"]


# ------------------------------------------------------------------------------------------ dealing


def film(i: int, label: int | None = None) -> dict[str, Any]:
    return {"sentence": f"film {i}", "label": i % 2 if label is None else label}


@pytest.fixture
def films(tmp_path: Path) -> Path:
    return write(
        tmp_path / "films",
        train=[film(i) for i in range(100)],
        validation=[film(i) for i in range(90, 140)],
    )


def test_what_is_tested_is_not_trained_on(films: Path) -> None:
    found = read(load("sst2"), films)
    splits = deal(found, seed=0)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (81, 9, 50)
    assert (splits.duplicates, splits.conflicts) == (10, 0)
    assert scored_rows(found) == splits.test
    fewer = deal(found, seed=5, test_size=20, validation_size=0.5, train_size=11)
    assert (len(fewer.train), len(fewer.validation), len(fewer.test)) == (11, 45, 20)
    assert set(map(text, fewer.test)) <= set(map(text, splits.test))
    assert deal(found, seed=6, test_size=20).test == fewer.test


def test_the_same_text_with_another_label_is_not_trained_on(tmp_path: Path) -> None:
    test = [film(i) for i in range(10)]
    train = [film(i) for i in range(20, 60)] + [film(3, 0), film(21, 0), film(0, 0)]
    splits = deal(read(load("sst2"), write(tmp_path / "f", train=train, validation=test)), seed=0)
    assert (splits.duplicates, splits.conflicts) == (1, 3)  # 0; 3 and both of 21
    assert len(splits.test) == 10
    assert len(splits.train) + len(splits.validation) == 39


def test_shots(films: Path) -> None:
    found = read(load("sst2"), films)
    for shots in (1, 22):
        splits = deal(found, seed=13, shots=shots)
        for part in (splits.train, splits.validation):
            assert set(Counter(row.label for row in part).values()) == {shots}
    assert len(deal(found, seed=13, shots=40, validation_size=6).validation) == 6
    for values, said in (
        ({"shots": 23}, r"'\w+' has 45 training rows, and as many are needed .* give at most 22, or"),
        ({"shots": 46}, "'negative' has 45 training rows: give at most 45"),
        ({"shots": 4, "train_size": 9}, "--shots and --train-size both"),
        ({"train_size": 99}, "99 rows asked for train, 81 different rows are left"),
        ({"validation_size": 99}, "99 rows asked for validation, 90 different"),
        ({"validation_size": 1}, "the validation split has only label"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            deal(found, seed=13, **values)


def test_validation_rows_as_published(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "d",
        train=[{**NLI, "premise": f"p {i}", "label": i % 2} for i in range(8)],
        dev32=[{**NLI, "premise": f"q {i}", "label": i % 2} for i in range(6)],
        validation=[{**NLI, "premise": f"r {i}", "label": i % 2} for i in range(6)],
    )
    found = read(load("rte"), folder)
    splits = deal(found, seed=0)
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [8, 6, 6]
    assert all(row.file.endswith("dev32.jsonl") for row in splits.validation)
    assert all(row.file.endswith("train.jsonl") for row in deal(found, seed=0, shots=2).validation)
    many = deal(found, seed=0, shots=4)
    assert all(row.file.endswith("dev32.jsonl") for row in many.validation)
    assert len(many.validation) == 6


def test_training_rows_of_one_label(tmp_path: Path) -> None:
    def row(i: int, label: bool) -> dict[str, Any]:
        return {"text": f"t {i}", "span1_text": "Ann", "span2_text": "She", "label": label}

    folder = write(
        tmp_path / "d",
        train=[row(i, True) for i in range(32)],
        validation=[row(i, i % 4 == 0) for i in range(40, 80)],
    )
    found = read(load("wsc"), folder)
    splits = deal(found, seed=0, validation_size=5)
    assert splits.notes == [
        "the training rows are not of two labels: 20 of the 40 different test rows are trained on instead"
    ]
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [15, 5, 20]
    assert Counter(row.label for row in splits.test) == {"no": 15, "yes": 5}
    assert deal(found, seed=1, validation_size=5).test == splits.test
    write(folder, train=[row(i, i % 2 == 0) for i in range(32)])
    assert len(deal(read(load("wsc"), folder), seed=0).test) == 40


def test_rows_without_a_label_are_left_out(tmp_path: Path) -> None:
    rows = [{**NLI, "premise": f"p {i}", "label": i % 4 - 1} for i in range(60)]
    folder = write(tmp_path / "d", train=rows[:40], validation=rows[40:])
    splits = deal(read(load("snli"), folder), seed=0)
    assert splits.notes == ["15 rows left out that have no label"]
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 45


def test_a_question_is_tested_whole(tmp_path: Path) -> None:
    def paragraph(i: int) -> dict[str, Any]:
        answers = [{"text": f"a {j}", "label": j % 2} for j in range(5)]
        questions = [{"question": f"q {j}", "answers": answers} for j in range(3)]
        return {"passage": {"text": f"p {i}", "questions": questions}}

    folder = write(
        tmp_path / "d",
        train=[paragraph(i) for i in range(4)],
        validation=[paragraph(i) for i in range(10, 20)],
    )
    found = read(load("multirc"), folder)
    assert [len(found.rows[split]) for split in ("train", "test")] == [60, 150]
    splits = deal(found, seed=0, test_size=33)
    assert len(splits.test) == 30
    questions = Counter((row.fields["paragraph"], row.fields["question"]) for row in splits.test)
    assert set(questions.values()) == {5}


def test_figures() -> None:
    def rows(declared: str, labels: list[str], **fields: str) -> list[Example]:
        return [Example(dict(fields), label, declared, 1) for label in labels]

    def found(name: str, truth: str, told: str) -> dict[str, float]:
        labels = {label[0]: label for label in load(name).labels}
        examples = rows(name, [labels[letter] for letter in truth])
        return figures(load(name).task_for(), examples, [labels[letter] for letter in told])

    assert found("sst2", "np", "nn") == {"accuracy": 0.5}
    assert found("mrpc", "ssdd", "sdsd") == {"accuracy": 0.5, "f1": 0.5}
    assert found("mrpc", "dd", "dd") == {"accuracy": 1.0, "f1": 0.0}
    # sklearn.metrics.f1_score(average="macro") of the same: (2/3 + 2/3 + 0) / 3
    assert found("cb", "eecn", "ecce")["f1_macro"] == pytest.approx((1 / 2 + 2 / 3) / 3)
    assert found("cola", "aaauu", "aauua")["matthews"] == pytest.approx(1 / 6)
    assert found("cola", "aa", "aa")["matthews"] == 0.0
    answers = rows("m", ["right", "wrong"], paragraph="p", question="a")
    answers += rows("m", ["right", "wrong"], paragraph="p", question="b")
    told = ["right", "wrong", "right", "right"]
    expected = {"accuracy": 0.75, "f1": 0.8, "exact_match": 0.5}
    assert figures(load("multirc").task_for(), answers, told) == expected


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "the train rows of task 'sst2' are missing: put train.jsonl there .on the hub: nyu-mll/glue"),
        ({"train": [film(0)]}, "the test rows of task 'sst2' are missing: put validation.jsonl or dev.jsonl"),
        ({"train": [film(0), {"label": 1}]}, r"train\.jsonl:2: task 'sst2' reads 'sentence' from sentence or text, which is not there: there are 'label'"),
        ({"train": [{"sentence": "a"}]}, r"train\.jsonl:1: task 'sst2' reads the label from label, which is not there: there are 'sentence'"),
        ({"train": [film(0, -1)]}, r"train\.jsonl:1: 'label' is '-1', no label of task 'sst2': a test file without labels"),
        ({"train": [film(0, 7)]}, r"train\.jsonl:1: 'label' is '7', no label of task 'sst2': known are \(0, 1, negative, positive\)"),
        ({"train": [{"sentence": ["a"], "label": 1}]}, r"train\.jsonl:1: 'sentence' is .*not a text"),
        ({"train": [{"sentence": "a", "label": None}]}, r"train\.jsonl:1: 'label' is 'null', not a text"),
    ],
)  # fmt: skip
def test_rows_refused(tmp_path: Path, files: dict[str, list[Any]], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        read(load("sst2"), write(tmp_path / "d", **files))
    assert "\n" not in str(caught.value)


def test_folders_refused(films: Path) -> None:
    with pytest.raises(
        UserError, match=r"train\.jsonl: is a file: --data for task 'sst2' is the folder"
    ):
        read(load("sst2"), films / "train.jsonl")
    with pytest.raises(UserError, match="none: no such folder: --data"):
        read(load("sst2"), films / "none")
    broken = write(films, train=[{"passage": {"text": "x", "questions": "none"}}], validation=[])
    with pytest.raises(UserError, match=r"train\.jsonl:1: passage\.questions is not a list"):
        read(load("multirc"), broken)


OWN = {
    "name": "spam",
    "splits": {"train": "train.jsonl", "test": "test.jsonl"},
    "template": "{text} It is",
    "labels": {"ham": "fine", "spam": "spam"},
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": None}, "name is missing: add it"),
        ({"colour": "red"}, "key 'colour' is unknown: known are name, title"),
        ({"templat": "x"}, "key 'templat' is unknown: did you mean template"),
        ({"kind": "poetry"}, "kind is 'poetry': it must be one of classification"),
        ({"metrics": ["bleu"]}, "metric 'bleu' is unknown for kind 'classification': known are accuracy, f1"),
        ({"metrics": "f1"}, "metric f1 needs positive"),
        ({"metrics": "f1", "positive": "eggs"}, "positive is 'eggs': it must be one of the labels"),
        ({"metrics": ["exact_match"]}, "exact_match needs group"),
        ({"template": None}, "template is missing: write one"),
        ({"template": 3}, "template is 3: it must be a text"),
        ({"template": "It is"}, "shows no field of the data"),
        ({"template": "{text} {mask}."}, "template has a {mask}"),
        ({"masked_template": "{text} so"}, "masked_template needs {mask}"),
        ({"labels": None}, "labels are missing: give the word of each label"),
        ({"labels": {"ham": "fine"}}, "labels: 1 given, at least 2 needed"),
        ({"labels": {"ham": "fine", "spam": ""}}, "the word '' of label 'spam' is empty"),
        ({"labels": {"ham": True, "spam": "x"}}, "labels has 'ham': True, not texts: put quotes around yes"),
        ({"masked_labels": {"ham": "a", "eggs": "b"}}, "label 'eggs' is in one of labels and masked_labels only"),
        ({"label": {"values": {0: "ham", 1: "eggs"}}}, "the value '1' is called 'eggs', which has no word"),
        ({"label": {"from": "text"}}, "field 'text' is read from 'text', where the right answer is"),
        ({"label": [{"from": "kind"}, {"from": "sort"}], "fields": {"text": {"from": ["body", "sort"]}}}, "is read from 'sort', where the right"),
        ({"label": {"values": {0: ["ham"], 1: "spam"}}}, "the value '0' is called ['ham'], which has no word"),
        ({"label": {"values": {0: {"ham": 1}}}}, "the value '0' is called {'ham': 1}, which has no word"),
        ({"label": {"value": {}}}, "label: key 'value' is unknown: did you mean values"),
        ({"label": "spam"}, "label is 'spam': it must be a mapping"),
        ({"fields": {"text": {"from": "body", "change": "reverse"}}}, "field text has the change 'reverse': known are strip"),
        ({"fields": {"mask": "body"}}, "fields has 'mask', which cannot be a field's name"),
        ({"fields": "text"}, "fields is 'text': it must be a mapping"),
        ({"splits": None}, "splits are missing: name the file of each"),
        ({"splits": {"train": "train.jsonl"}}, "splits has no test"),
        ({"splits": {"test": "../test.jsonl"}}, "the file '../test.jsonl': give the name of a .jsonl"),
        ({"splits": {"test": "test.py"}}, "the file 'test.py'"),
        ({"splits": {"exam": "test.jsonl"}}, "splits: key 'exam' is unknown"),
        ({"train_from_test": 3}, "train_from_test is 3: it must be a fraction"),
        ({"whole_small_classes": "no"}, "whole_small_classes is 'no': it must be true or false"),
    ],
)  # fmt: skip
def test_declarations_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = tmp_path / "spam.yaml"
    path.write_text(yaml.safe_dump(OWN))
    assert load(str(path)).task_for().labels == OWN["labels"]
    changed = {key: value for key, value in {**OWN, **change}.items() if value is not None}
    path.write_text(yaml.safe_dump(changed))
    with pytest.raises(UserError) as caught:
        load(str(path))
    assert said in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


WHOLE = b"name: a\ntitle: b\nlabels: {a: X, b: Y}\nsplits:\n  test: t.csv\ntemplate: it {text}\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such declaration: check the path"),
        (b"name: [\n", ":2: not a declaration in YAML"),
        (b"- name\n", "not a declaration: write one"),
        (b"name: a\nname: b\n", ":2: not a declaration in YAML: 'name' is given twice"),
        (b"name: a\n\ntitel: b\n", "own.yml:3: key 'titel' is unknown: did you mean title?"),
        (b"name: a\nkind:\n  poem\n", "own.yml:2: kind is 'poem'"),
        (b"name: a\nlabels: {a: b}\nsplits:\n  test: a.csv\n  train: 7\n", "own.yml:5: splits: train is 7"),
        (b"name: a\nlabels: {a: b}\nfields:\n  x:\n    change: up\n", "own.yml:5: field x has the change 'up'"),
        (b"name: a\nlabels: {a: b}\nfields:\n  x: 3\n", "own.yml:4: field x: from is 3"),
        (b"name: a\nsplits: {test: t.csv}\nkind: choice\noptions: 3\n", "own.yml:4: options: from is 3"),
        (b"name: a\nsplits: {test: t.csv}\nkind: choice\nanswers:\n  [3]\n", "own.yml:4: answers: from is [3]"),
        (b"name: a\nlabels:\n", "own.yml:2: labels are missing"),
        (WHOLE + b"metrics:\n  [bleu]\n", "own.yml:7: metric 'bleu' is unknown for kind"),
        (WHOLE + b"positive: c\n", "own.yml:7: positive is 'c': it must be one of the labels (a, b)"),
        (WHOLE + b"masked_template: it {text}\n", "own.yml:7: masked_template needs {mask}"),
        (WHOLE + b"masked_template: '{text}{mask}{mask}'\n", "own.yml:7: template '{text}{mask}{mask}': {mask} stands there 2 times"),
        (WHOLE + b"masked_template: '{text} {mask}'\nmasked_labels: {a: b, c: d}\n", "own.yml:8: label 'b' is in one of"),
        (WHOLE + b"masked_template: '{text} {mask}'\nmasked_labels: {a: x, b: x}\n", "own.yml:8: labels: 'a' and 'b' have the same"),
        (WHOLE.replace(b"{text}", b"{label}"), "own.yml:6: template 'it {label}': field 'label' is the label"),
        (WHOLE.replace(b"it {text}", b"it {text} {mask}"), "own.yml:6: template has a {mask}"),
        (WHOLE.replace(b"{a: X, b: Y}", b"{a: X}"), "own.yml:3: labels: 1 given"),
        (WHOLE + b"kind: choice\n", "own.yml:3: labels are for kind"),
        (b"name: a\ntemplate: it {x}\nkind: choice\nsplits: {test: t.csv}\n", "own.yml:3: kind 'choice' needs options"),
        (b"name: a\ntemplate: it {x}\nkind: generation\nsplits: {test: t.csv}\n", "own.yml:3: kind 'generation' needs answers"),
        (b"name: \xff\n", "not UTF-8"),
        (b"name: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
    ],
)  # fmt: skip
def test_files_refused(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "own.yml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load(str(path))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_demonstrations_may_stand_without_anything_between(tmp_path: Path) -> None:
    for given, separator in (("", ""), ("' | '", " | "), (None, "\n\n")):
        path = tmp_path / "own.yml"
        line = b"" if given is None else f"separator: {given or chr(39) * 2}\n".encode()
        path.write_bytes(WHOLE + line)
        assert load(str(path)).task_for().separator == separator


def test_unknown_names() -> None:
    with pytest.raises(UserError, match=r"--task is 'SST-2': .*did you mean sst2\?"):
        load("SST-2")
    with pytest.raises(UserError, match=r"a declaration of your own ends in \.yaml"):
        load("chess")


def test_a_template_for_the_other_kind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="task 'cb' has no masked_template, which a masked model"):
        load("cb").task_for("masked")
    (tmp_path / "config.json").write_text('{"architectures": ["RobertaForMaskedLM"]}')
    given = TrainConfig(str(tmp_path), "d", "o", task="rte")
    assert resolved(given).template == load("rte").masked_template
    (tmp_path / "config.json").write_text('{"architectures": ["OPTForCausalLM"]}')
    assert resolved(given).template == load("rte").template


# -------------------------------------------------------------------------------- the command line


def command(capsys: pytest.CaptureFixture[str], *argv: Any) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([str(argument) for argument in argv])
    return code, *capsys.readouterr()


def test_train_eval_resume_replay(
    model_folder: Path, films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def last(*argv: Any) -> dict[str, Any]:
        code, out, err = command(capsys, *argv, "--json")
        assert code == 0, err
        found: dict[str, Any] = json.loads(out.splitlines()[-1])
        return found

    out = tmp_path / "run"
    given = ["--model", model_folder, "--task", "sst2", "--data", films, "--threads", 1]
    train = [
        "train",
        *given,
        "--start",
        "base",
        "--patience",
        0,
        "--backoff",
        "false",
        "--lr",
        3e-2,
        "--shots",
        8,
        "--test-size",
        30,
        "--split-seed",
        13,
    ]
    whole = last(*train, "--max-forwards", 12, "--lr-schedule", "constant", "--out", tmp_path / "w")
    part = [*train, "--max-forwards", 6, "--lr-schedule", "constant", "--eval-every", 2]
    assert last(*part, "--out", out)["steps"] == 3
    rows = {"train": 16, "validation": 16, "test": 30, "duplicates": 10, "conflicts": 0}
    assert whole["rows"] == rows
    kept = yaml.safe_load((out / "config.yaml").read_text())
    assert (kept["task"], kept["template"], kept["shots"]) == ("sst2", "{sentence} It was", 8)
    assert kept["labels"] == {"negative": "terrible", "positive": "great"}

    trained = last("train", "--resume", "--out", out, "--max-forwards", 12)
    assert (trained["steps"], trained["rows"]) == (6, rows)
    for key in ("fingerprint", "accuracy", "loss"):
        assert trained[key] == whole[key]

    scored = last("eval", "--run", out)
    assert (scored["accuracy"], scored["loss"]) == (trained["accuracy"], trained["loss"])
    assert scored["rows"] == 30
    assert last("eval", "--run", out, "--split", "train")["rows"] == 16
    made = last("replay", out, "--out", tmp_path / "tuned")
    assert made["fingerprint"] == trained["fingerprint"]
    tuned = last("eval", "--model", tmp_path / "tuned", *given[2:])
    assert tuned["fingerprint"] == trained["fingerprint"]
    assert (tuned["split"], tuned["rows"]) == ("task", 50)

    other = write(tmp_path / "other", train=[film(1)], validation=[film(i) for i in range(200)])
    found = last("eval", "--run", out, "--data", other)
    assert (found["split"], found["rows"], found["dropped"]) == ("task", 168, 32)
    (tmp_path / "own.csv").write_text("sentence,label\nnew,positive\nold,negative\n")
    assert last("eval", "--run", out, "--data", tmp_path / "own.csv")["rows"] == 2

    write(films, train=[film(i) for i in range(101)])
    code, _, err = command(capsys, "train", "--resume", "--out", out, "--max-forwards", 20)
    assert code == 2
    assert "whose content is not what the run was started with" in err


def test_metrics_of_a_run(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def pair(i: int) -> dict[str, Any]:
        return {"sentence1": f"a {i}", "sentence2": f"b {i}", "label": i % 2}

    data = write(
        tmp_path / "d",
        train=[pair(i) for i in range(40)],
        validation=[pair(i) for i in range(50, 70)],
    )
    argv = ["train", "--model", model_folder, "--task", "mrpc", "--data", data, "--threads", 1]
    code, out, err = command(
        capsys, *argv, "--out", tmp_path / "run", "--max-forwards", 2, "--json"
    )
    assert code == 0, err
    trained = json.loads(out.splitlines()[-1])
    code, out, err = command(capsys, "eval", "--run", tmp_path / "run", "--json")
    assert json.loads(out.splitlines()[-1])["f1"] == trained["f1"]
    code, out, err = command(capsys, "eval", "--run", tmp_path / "run")
    assert f"; f1 {trained['f1']:.4f} on 20 rows" in out


def test_own_declaration(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "spam.yaml"
    path.write_text(yaml.safe_dump(OWN))
    rows = [{"text": f"mail {i}", "label": ("ham", "spam")[i % 2]} for i in range(60)]
    data = write(tmp_path / "mail", train=rows[:40], test=rows[40:])
    argv = ["train", "--model", model_folder, "--task", path, "--data", data, "--threads", 1]
    code, _, err = command(capsys, *argv, "--out", tmp_path / "run", "--max-forwards", 4)
    assert code == 0, err
    path.unlink()  # replay needs the base and the log only
    code, _, err = command(capsys, "replay", tmp_path / "run", "--out", tmp_path / "tuned")
    assert code == 0, err


def test_tasks_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = command(capsys, "tasks")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == NAMES
    code, out, _ = command(capsys, "tasks", "--json", "--task", "wsc")
    [found] = json.loads(out)
    assert found["hub"] == "aps/super_glue, wsc.fixed"
    code, _, err = command(capsys, "tasks", "--task", tmp_path / "none.yaml")
    assert code == 2
    assert "none.yaml: no such declaration" in err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "--template is missing: give --template and --labels, or --task"),
        (["--template", "{text}"], "--labels is missing: give"),
        (["--task", "chess"], "--task is 'chess': no task of that name"),
        (["--task", "sst2"], "no such folder: --data for task 'sst2' is the folder"),
        (["--task", "sst2", "--shots", "0"], "--shots is 0: it must be at least 1"),
        (["--template={text}", "--labels=a=b,c=d", "--shots=3"], "--shots is 3: it is for the rows of a --task"),
    ],
)  # fmt: skip
def test_command_lines_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], said: str
) -> None:
    given = ["train", "--model", tmp_path / "m", "--data", tmp_path / "d", "--out", tmp_path / "o"]
    code, _, err = command(capsys, *given, *argv)
    assert code == 2
    assert said in err
    assert list(tmp_path.iterdir()) == []
