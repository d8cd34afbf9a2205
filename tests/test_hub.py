"""`--data hub`: rows are downloaded once, become the files that a task is declared with, and are read like them.

No network: `datasets.load_dataset` is replaced, its datasets are real ones where the package is installed.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from justforward import catalog, cli
from justforward.config import EvalConfig, TrainConfig
from justforward.errors import UserError
from justforward.folder import RunFolder
from justforward.hub import downloaded
from justforward.prepare import read_data
from justforward.progress import Progress
from justforward.rebuild import evaluate
from justforward.run import train

Rows = list[dict[str, Any]]


def glue(count: int, first: int = 0, label: Any = None) -> Rows:
    """Rows as the hub has those of SST-2."""
    return [
        {
            "sentence": f"film {i} was {('bad', 'good')[i % 2]} \u2028 é ",
            "label": i % 2 if label is None else label,
            "idx": i,
        }
        for i in range(first, first + count)
    ]


SST2 = {"train": glue(40), "validation": glue(20, 40), "test": glue(6, 60, -1)}


class Rowed(list[Any]):
    """A split: rows, and where they are from."""

    info = SimpleNamespace(download_checksums={"hf://datasets/nyu-mll/glue@abc/sst2.parquet": {}})


@pytest.fixture(params=["plain", "installed"])
def hub(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[tuple[str, ...]]]:
    """Puts splits on the hub, or an error; returns the list of what is asked for from then on."""
    monkeypatch.setenv("JUSTFORWARD_CACHE", str(tmp_path / "cache"))

    def put(found: dict[str, Rows] | Exception) -> list[tuple[str, ...]]:
        asked: list[tuple[str, ...]] = []

        def load_dataset(*names: str, **options: Any) -> Any:
            assert not options  # nothing of a checkpoint's code, above all
            asked.append(names)
            if isinstance(found, Exception):
                raise found
            if request.param == "plain":
                return {split: Rowed(rows) for split, rows in found.items()}
            return datasets.DatasetDict(
                {split: datasets.Dataset.from_list(rows) for split, rows in found.items()}
            )

        if request.param == "plain":
            module = SimpleNamespace(load_dataset=load_dataset, __version__="9.9.9")
            monkeypatch.setitem(sys.modules, "datasets", module)
        else:
            datasets = pytest.importorskip("datasets")
            monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    return put


def lines(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_splits_become_the_declared_files_once(hub: Any) -> None:
    asked = hub(SST2)
    said: list[str] = []
    folder = downloaded(catalog.load("sst2"), said.append)
    assert asked == [("nyu-mll/glue", "sst2")]
    assert said == [f"downloading nyu-mll/glue, sst2 once into {folder}"]
    # the test rows of GLUE have no labels: no file of the task is called so
    assert sorted(os.listdir(folder)) == ["source.json", "train.jsonl", "validation.jsonl"]
    assert lines(folder / "train.jsonl") == SST2["train"]
    assert lines(folder / "validation.jsonl") == SST2["validation"]
    source = json.loads((folder / "source.json").read_text())
    assert source["hub"] == "nyu-mll/glue, sst2"
    assert source["rows"] == {"train.jsonl": 40, "validation.jsonl": 20}
    assert downloaded(catalog.load("sst2"), said.append) == folder
    assert len(asked) == len(said) == 1
    assert [name for name in os.listdir(folder.parent) if name.startswith(".")] == []


def test_a_hub_name_without_a_configuration(hub: Any) -> None:
    asked = hub({"train": [{"text": "x", "label": 0}], "test": [{"text": "y", "label": 1}]})
    folder = downloaded(catalog.load("subj"))
    assert asked == [("SetFit/subj",)]
    assert sorted(os.listdir(folder)) == ["source.json", "test.jsonl", "train.jsonl"]


def test_nested_rows_are_kept(hub: Any) -> None:
    rows = [
        {"id": "1", "context": "a b c", "question": "?", "title": "t",
         "answers": {"text": ["b", "c"], "answer_start": [2, 4]}},
    ]  # fmt: skip
    hub({"train": rows, "validation": rows})
    folder = downloaded(catalog.load("squad"))
    assert lines(folder / "validation.jsonl") == rows


def test_a_run_from_the_hub(hub: Any, model_folder: Path, tmp_path: Path) -> None:
    """Trained, scored and continued like a run on the folder; the network is asked once."""
    asked = hub(SST2)
    config = TrainConfig(
        model=str(model_folder), data="hub", out=str(tmp_path / "run"), task="sst2", max_forwards=4,
        threads=1, lr_schedule="constant", start="base", patience=0, labels={"negative": "bad", "positive": "good"}, max_length=40,
    )  # fmt: skip
    shown = io.StringIO()
    result = train(config, Progress(shown))
    assert "downloading nyu-mll/glue, sst2 once" in shown.getvalue()
    assert result["rows"]["test"] == 20
    assert RunFolder(config.out).read_config().data == "hub"
    found = evaluate(EvalConfig(run=config.out), Progress(io.StringIO()))
    assert (found["fingerprint"], found["loss"]) == (result["fingerprint"], result["loss"])
    zero = EvalConfig(model=str(model_folder), data="hub", task="sst2", labels=config.labels)
    assert evaluate(zero, Progress(io.StringIO()))["rows"] == 20
    folder = downloaded(catalog.load("sst2"))
    task = catalog.load("sst2").task_for()
    assert read_data("sst2", "hub", task)[1] == read_data("sst2", str(folder), task)[1]
    again = train(replace(config, max_forwards=6, resume=True), Progress(io.StringIO()))
    assert again["steps"] == 3
    assert len(asked) == 1


# ------------------------------------------------------------------------------------ what is refused


def refused(task: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        downloaded(catalog.load(task))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("no route\nto host"),
        FileNotFoundError("Dataset 'nyu-mll/glue' doesn't exist on the Hub"),
        ValueError("Unknown configuration"),
        RuntimeError("Dataset scripts are no longer supported"),
        Exception(),
    ],
)
def test_rows_that_cannot_be_had(hub: Any, error: Exception, tmp_path: Path) -> None:
    hub(error)
    words = " ".join(str(error).split()) or "Exception"
    refused("sst2", f"--data is 'hub': nyu-mll/glue, sst2 cannot be had: {words}: it needs the net")
    assert not (tmp_path / "cache").exists()


def test_splits_that_are_not_the_tasks(hub: Any, tmp_path: Path) -> None:
    hub({"train": glue(4), "test": glue(4)})
    refused("sst2", "has the splits train, test, of which none makes validation.jsonl or dev.jsonl")
    assert not (tmp_path / "cache").exists()


def test_rows_that_are_no_text(hub: Any, tmp_path: Path) -> None:
    hub({"train": glue(4), "validation": [{"sentence": b"raw", "label": 0}]})
    refused("sst2", "a row of nyu-mll/glue, sst2 is no plain text: Object of type bytes")
    assert not any((tmp_path / "cache").rglob("*.jsonl"))


def test_no_package_no_name_no_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JUSTFORWARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused("sst2", r"the package datasets is not installed: pip install 'justforward\[hub\]'")
    refused("mpqa", "task 'mpqa' names no rows on the hub: give the folder that holds test.jsonl")
    argv = ["eval", "--model", "m", "--data", "hub", "--template", "{text}", "--labels", "a=b,c=d"]
    assert cli.main(argv) == 2
    assert "--data is 'hub': it is for the rows of a --task" in capsys.readouterr().err
