"""What a run folder is good for: scored and rebuilt, to the same bits, without the rows it has seen."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import justforward as jf
from conftest import make_model, make_tokenizer, small_run
from justforward.config import EvalConfig, InspectConfig, ReplayConfig, TrainConfig
from justforward.errors import UserError
from justforward.folder import RunFolder
from justforward.models import load_model
from justforward.progress import Progress
from justforward.rebuild import evaluate, kept_step, rebuild
from justforward.report import inspect_run
from justforward.run import train

Result = dict[str, Any]
ROWS = [f"film {i} was {('bad', 'good')[i % 2]},{('neg', 'pos')[i % 2]}" for i in range(60)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Result]:
    """A run of ten steps that keeps the last but one. Only to be read."""
    place = tmp_path_factory.mktemp("rebuild")
    make_model("gpt2").save_pretrained(place / "model")
    make_tokenizer().save_pretrained(place / "model")
    (place / "rows.csv").write_text("text,label\n" + "\n".join(ROWS))
    config = small_run(place / "model", place / "rows.csv", place / "run")
    result = quiet(train, config)
    folder = RunFolder(config.out)
    metrics = folder.read_metrics()[0]
    for metric in metrics:
        if metric["kind"] == "validation":
            metric["accuracy"] = 1.0 if metric["step"] == 9 else 0.5
    folder.keep_metrics(metrics)
    return config, result


@pytest.fixture
def run(finished: tuple[TrainConfig, Result], tmp_path: Path) -> TrainConfig:
    """The same run in a folder that may be changed."""
    config = replace(finished[0], out=str(tmp_path / "run"))
    shutil.copytree(finished[0].out, config.out)
    return config


def quiet(command: Callable[[Any, Progress], Result], config: Any) -> Result:
    return command(config, Progress(io.StringIO()))


def replayed(config: TrainConfig, steps: int) -> str:
    model, _ = load_model(config.model)
    jf.replay(model, RunFolder(config.out).log, steps)
    return jf.fingerprint(model)


# --------------------------------------------------------------------------------------------- eval


def test_eval_of_a_run(finished: tuple[TrainConfig, Result]) -> None:
    config, _ = finished
    found = quiet(evaluate, EvalConfig(run=config.out))
    assert found["fingerprint"] == replayed(config, 9)
    assert (found["step"], found["split"], found["rows"], found["dropped"]) == (9, "test", 12, 0)
    assert (found["model"], found["data"]) == (config.model, config.data)
    assert found["forwards"] == 1
    assert quiet(evaluate, EvalConfig(run=config.out, batch_size=5))["forwards"] == 3


def test_eval_says_what_train_said(model_folder: Path, sentiment_csv: Path, tmp_path: Path) -> None:
    for keep, estimator in (("best", "weight"), ("last", "activation")):
        config = TrainConfig(
            model=str(model_folder), data=str(sentiment_csv), template="{text} It was",
            labels="neg=great,pos=terrible", out=str(tmp_path / keep), max_forwards=12, lr=3e-2,
            keep=keep, estimator=estimator, loss="vocabulary", max_length=20,
            start="base", patience=0,
        )  # fmt: skip
        result = quiet(train, config)
        found = quiet(evaluate, EvalConfig(run=config.out))
        for key in ("fingerprint", "accuracy", "loss"):
            assert found[key] == result[key]


@pytest.mark.parametrize(("split", "rows"), [("train", 42), ("validation", 6), ("test", 12)])
def test_splits_of_the_run(run: TrainConfig, split: Any, rows: int) -> None:
    found = quiet(evaluate, EvalConfig(run=run.out, split=split))
    assert (found["split"], found["rows"]) == (split, rows)
    moved = Path(run.out).with_name("copy.csv")
    moved.write_bytes(Path(run.data).read_bytes())
    again = quiet(evaluate, EvalConfig(run=run.out, split=split, data=str(moved)))
    for key in ("accuracy", "loss", "rows"):
        assert again[key] == found[key]


def test_all_rows_are_the_splits_together(finished: tuple[TrainConfig, Result]) -> None:
    config, _ = finished
    right = loss = 0.0
    for split in ("train", "validation", "test"):
        found = quiet(evaluate, EvalConfig(run=config.out, split=split))  # type: ignore[arg-type]
        right += found["accuracy"] * found["rows"]
        loss += found["loss"] * found["rows"]
    whole = quiet(evaluate, EvalConfig(run=config.out, split="all"))
    assert whole["rows"] == 60
    assert whole["accuracy"] == pytest.approx(right / 60)
    assert whole["loss"] == pytest.approx(loss / 60, abs=1e-5)


def test_another_file_loses_the_rows_that_the_run_has_seen(
    finished: tuple[TrainConfig, Result], tmp_path: Path
) -> None:
    config, _ = finished
    data = tmp_path / "more.csv"
    rows = [row.replace("film", "FILM ", 1) for row in ROWS]  # the same to a reader
    data.write_text("text,label\n" + "\n".join([*rows, "a new one,neg", "and another,pos"]))
    found = quiet(evaluate, EvalConfig(run=config.out, data=str(data)))
    assert (found["rows"], found["dropped"], found["split"]) == (14, 48, "all")
    with pytest.raises(UserError, match=r"more\.csv is not the data that the run has split"):
        quiet(evaluate, EvalConfig(run=config.out, data=str(data), split="test"))
    seen = tmp_path / "seen.csv"
    texts = {line.split()[0] for line in (Path(config.out) / "seen.txt").read_text().splitlines()}
    assert texts == RunFolder(config.out).read_seen()
    config_rows = [ROWS[i] for i in _lines_of(config, "train")]
    seen.write_text("text,label\n" + "\n".join(config_rows))
    with pytest.raises(UserError, match="trained or validated on all 42 rows: give others"):
        quiet(evaluate, EvalConfig(run=config.out, data=str(seen)))


def test_rows_are_known_whatever_else_of_them_is_shown(
    finished: tuple[TrainConfig, Result], tmp_path: Path
) -> None:
    """A template with another column makes no row of the run's a new one."""
    config, _ = finished
    for name in ("text", "film"):
        data = tmp_path / f"{name}.csv"
        rows = [f"{i}: seen,{row}" for i, row in enumerate([*ROWS, "a new one,neg", "another,pos"])]
        data.write_text(f"title,{name},label\n" + "\n".join(rows))
        for template in (f"{{title}} {{{name}}} It was", f"{{{name}}} It was"):
            said = io.StringIO()
            found = evaluate(EvalConfig(run=config.out, data=str(data), template=template), Progress(said))  # fmt: skip
            # the file's own columns alone say nothing of a text in a column of another name
            known = name == "text" or "title" not in template
            assert (found["rows"], found["dropped"]) == ((14, 48) if known else (62, 0))
            warned = "rows which the run has seen may be among these" in said.getvalue()
            assert warned == (not known)


def _lines_of(config: TrainConfig, split: str) -> list[int]:
    from justforward.data import read_examples
    from justforward.prepare import split_rows, task_of

    kept = RunFolder(config.out).read_config()
    splits = split_rows(kept, read_examples(kept.data, task_of(kept)))[1]
    return [row.line - 2 for row in getattr(splits, split)]


def test_another_task_on_the_rows_of_the_run(finished: tuple[TrainConfig, Result]) -> None:
    config, _ = finished
    same = quiet(evaluate, EvalConfig(run=config.out))
    other = quiet(
        evaluate, EvalConfig(run=config.out, template="{text} So", labels="neg=bad,pos=good")
    )
    assert other["rows"] == same["rows"]
    assert other["fingerprint"] == same["fingerprint"]
    assert other["loss"] != same["loss"]
    swapped = quiet(evaluate, EvalConfig(run=config.out, labels="neg=terrible,pos=great"))
    assert swapped["accuracy"] == pytest.approx(1.0 - same["accuracy"])


def test_eval_of_a_model(finished: tuple[TrainConfig, Result]) -> None:
    config, _ = finished
    asked = EvalConfig(
        model=config.model, data=config.data, template=config.template, labels=config.labels
    )
    found = quiet(evaluate, asked)
    assert found["fingerprint"] == jf.fingerprint(load_model(config.model)[0])
    assert (found["run"], found["step"], found["split"], found["rows"]) == (None, None, "all", 60)
    assert 0.0 < found["accuracy"] < 1.0
    for name in ("model", "data", "template", "labels"):
        with pytest.raises(UserError, match=f"eval needs --{name}, or --run"):
            quiet(evaluate, replace(asked, **{name: None}))
    with pytest.raises(UserError, match="--split is 'test': splits are a run's: give --run"):
        quiet(evaluate, replace(asked, split="test"))


def test_eval_of_an_unfinished_run(run: TrainConfig) -> None:
    folder = RunFolder(run.out)
    (folder.path / "result.json").unlink()
    raw = folder.log.read_bytes()
    folder.log.write_bytes(raw[:-60])  # the seal and two steps, one of them in part
    steps = len(jf.read_log(folder.log).steps)
    assert steps == 8
    found = quiet(evaluate, EvalConfig(run=run.out))
    assert (
        found["step"] == kept_step(folder, folder.read_config(), pytest.fail) in (0, 3, 6)
    )  # the ninth is no more
    assert found["fingerprint"] == replayed(run, found["step"])
    assert kept_step(folder, replace(run, keep="last"), pytest.fail) == 8
    (folder.path / "metrics.jsonl").unlink()
    said: list[str] = []
    assert kept_step(folder, folder.read_config(), said.append) == 8
    assert "no validation in metrics.jsonl to tell the best step by: this is the last one, 8" in said[0]  # fmt: skip


def test_rows_that_have_gone(run: TrainConfig, tmp_path: Path) -> None:  # fmt: skip
    """Nobody has named them now: the run is named, and where the path is from."""
    folder = RunFolder(run.out)
    for data, here in (("rows.csv", " here, and the path is from where train was started"), (str(tmp_path / "rows.csv"), "")):  # fmt: skip
        folder.write_config(replace(folder.read_config(), data=data))
        said = re.escape(f"{run.out}: the run's rows are {data!r}: no such file{here}: give --data with where they are")  # fmt: skip
        with pytest.raises(UserError, match=said):
            quiet(evaluate, EvalConfig(run=run.out))
        with pytest.raises(UserError, match=said):
            quiet(train, replace(folder.read_config(), out=run.out, resume=True))
        named = quiet(evaluate, EvalConfig(run=run.out, data=run.data))
        assert named["split"] == "test"
    with pytest.raises(UserError, match=r"^else\.csv: no such file: check the path"):
        quiet(evaluate, EvalConfig(run=run.out, data="else.csv"))


def test_a_run_handed_on_without_its_metrics(finished: tuple[TrainConfig, Result], run: TrainConfig, tmp_path: Path) -> None:  # fmt: skip
    """The result says which step its figures are of; without it there is a note."""
    _, result = finished
    assert result["kept_step"] < 10
    (Path(run.out) / "metrics.jsonl").unlink()
    found = quiet(evaluate, EvalConfig(run=run.out))
    assert (found["step"], found["fingerprint"]) == (result["kept_step"], result["fingerprint"])
    made = quiet(rebuild, ReplayConfig(run.out, str(tmp_path / "made")))
    assert (made["steps"], made["accuracy"]) == (result["kept_step"], result["accuracy"])
    (Path(run.out) / "result.json").unlink()
    said = io.StringIO()
    assert evaluate(EvalConfig(run=run.out), Progress(said))["step"] == 10
    assert "note: " in said.getvalue()
    assert "this is the last one, 10" in said.getvalue()


# ------------------------------------------------------------------------------------------- replay


def test_replay_is_the_model(finished: tuple[TrainConfig, Result], tmp_path: Path) -> None:
    config, result = finished
    out = tmp_path / "new" / "model"
    made = quiet(rebuild, ReplayConfig(config.out, str(out)))
    assert (made["steps"], made["forwards"]) == (9, 18)
    assert made["fingerprint"] == replayed(config, 9)
    scored = result if result["kept_step"] == 9 else {"accuracy": None, "loss": None}
    assert (made["accuracy"], made["loss"]) == (scored["accuracy"], scored["loss"])
    model, tokenizer = load_model(str(out))
    assert jf.fingerprint(model) == made["fingerprint"]
    assert tokenizer("a fine film")["input_ids"] == make_tokenizer()("a fine film")["input_ids"]
    assert all(t.dtype == torch.float32 for t in load_file(out / "model.safetensors").values())
    scored = quiet(
        evaluate,
        EvalConfig(
            model=str(out), data=config.data, template=config.template, labels=config.labels
        ),
    )
    assert scored["fingerprint"] == made["fingerprint"]


@pytest.mark.parametrize(("asked", "steps"), [("last", 10), ("best", 9), ("0", 0), ("4", 4)])
def test_any_step(
    finished: tuple[TrainConfig, Result], tmp_path: Path, asked: str, steps: int
) -> None:
    config, result = finished
    made = quiet(rebuild, ReplayConfig(config.out, str(tmp_path / "m"), steps=asked))
    assert (made["steps"], made["forwards"]) == (steps, 2 * steps)
    assert made["fingerprint"] == replayed(config, steps)
    if steps == result["kept_step"]:
        assert (made["accuracy"], made["loss"]) == (result["accuracy"], result["loss"])
        assert made["fingerprint"] == result["fingerprint"]


def test_threads_change_no_bit(finished: tuple[TrainConfig, Result], tmp_path: Path) -> None:
    config, _ = finished
    before = torch.get_num_threads()
    try:
        made = [
            quiet(rebuild, ReplayConfig(config.out, str(tmp_path / f"m{n}"), threads=n))
            for n in (1, 3)
        ]
    finally:
        torch.set_num_threads(before)
    assert made[0]["fingerprint"] == made[1]["fingerprint"]


def test_a_base_that_has_moved(run: TrainConfig, tmp_path: Path) -> None:
    shutil.copytree(run.model, tmp_path / "base")
    text = (Path(run.out) / "config.yaml").read_text().replace(run.model, "gone/away/it/is")
    (Path(run.out) / "config.yaml").write_text(text)
    with pytest.raises(UserError, match="'gone/away/it/is': no such folder"):
        quiet(rebuild, ReplayConfig(run.out, str(tmp_path / "m")))
    made = quiet(rebuild, ReplayConfig(run.out, str(tmp_path / "m"), model=str(tmp_path / "base")))
    assert made["fingerprint"] == replayed(run, 9)


@pytest.mark.parametrize("asked", ["11", "-1", "first", "1.5", "", "٣"])
def test_steps_that_are_not_there(run: TrainConfig, tmp_path: Path, asked: str) -> None:
    with pytest.raises(
        UserError, match="it must be best, last, or a number from 0 to 10"
    ) as caught:
        quiet(rebuild, ReplayConfig(run.out, str(tmp_path / "m"), steps=asked))
    assert f"--steps is {asked!r}" in str(caught.value)
    assert not (tmp_path / "m").exists()


def test_replay_refuses(run: TrainConfig, tmp_path: Path) -> None:
    out = tmp_path / "m"
    (tmp_path / "file").touch()
    for place, said in (
        (run.out, "exists: choose another --out"),
        (str(tmp_path / "file"), "exists and is not a folder: choose another --out"),
        (str(tmp_path / "file" / "m"), "is a file: choose another --out"),
    ):
        with pytest.raises(UserError, match=said):
            quiet(rebuild, ReplayConfig(run.out, place))
    with pytest.raises(UserError, match="no such run folder"):
        quiet(rebuild, ReplayConfig(str(tmp_path / "none"), str(out)))
    tuned = tmp_path / "tuned"
    quiet(rebuild, ReplayConfig(run.out, str(tuned)))
    with pytest.raises(
        UserError, match=r"trajectory\.jfl: made from a base model with fingerprint"
    ):
        quiet(rebuild, ReplayConfig(run.out, str(out), model=str(tuned)))
    (Path(run.out) / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="no validation yet: give a number of steps, or last"):
        quiet(rebuild, ReplayConfig(run.out, str(out), steps="best"))
    (Path(run.out) / "trajectory.jfl").unlink()
    with pytest.raises(UserError, match=r"not a run folder: trajectory\.jfl is missing"):
        quiet(rebuild, ReplayConfig(run.out, str(out)))
    assert {p.name for p in tmp_path.iterdir()} == {"run", "file", "tuned"}


def test_nothing_is_left_of_a_replay_without_room(
    run: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedModel

    def full(self: Any, folder: Path, **options: Any) -> None:
        (folder / "model.safetensors").write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(UserError, match="m: cannot be written: No space left on device: make room"):
        quiet(rebuild, ReplayConfig(run.out, str(tmp_path / "m")))
    assert {p.name for p in tmp_path.iterdir()} == {"run"}


# ----------------------------------------------------------------------------------------- adapters


@pytest.fixture(params=["lora", "prefix", "prompt"])
def adapter(
    request: pytest.FixtureRequest, finished: tuple[TrainConfig, Result], tmp_path: Path
) -> tuple[TrainConfig, Result, Path]:
    """A run with each kind of adapter, and the folder that replay has made of it."""
    config = replace(
        finished[0], tuner=request.param, out=str(tmp_path / "run"), max_forwards=8, keep="last"
    )
    result = quiet(train, config)
    quiet(rebuild, ReplayConfig(config.out, str(tmp_path / "adapter")))
    return config, result, tmp_path / "adapter"


def scored(config: TrainConfig, model: Path, **values: Any) -> Result:
    asked = EvalConfig(
        model=str(model), data=config.data, template=config.template, labels=config.labels, **values
    )
    return quiet(evaluate, asked)


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_eval_takes_an_adapter(
    adapter: tuple[TrainConfig, Result, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, result, folder = adapter
    whole = quiet(evaluate, EvalConfig(run=config.out, split="all"))
    found = scored(config, folder)
    assert found["fingerprint"] == whole["fingerprint"] == result["fingerprint"]
    for name in ("accuracy", "loss", "rows"):
        assert found[name] == whole[name]
    base = scored(config, Path(config.model))
    assert found["loss"] != base["loss"]
    # a base that has moved, and one that does not fit
    shutil.copytree(config.model, tmp_path / "moved")
    change(folder / "adapter_config.json", base_model_name_or_path="gone/away/it/is")
    with pytest.raises(UserError, match="'gone/away/it/is': no such folder"):
        scored(config, folder)
    assert scored(config, folder, base=str(tmp_path / "moved"))["loss"] == found["loss"]
    make_model("llama").save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    if config.tuner != "prompt":  # embeddings are all of one width here
        with pytest.raises(UserError, match=r"adapter: does not fit .*other") as caught:
            scored(config, folder, base=str(tmp_path / "other"))
        assert "\n" not in str(caught.value)


def test_an_adapter_is_no_model_to_train(
    adapter: tuple[TrainConfig, Result, Path], tmp_path: Path
) -> None:
    config, _, folder = adapter
    for command, asked in (
        (train, replace(config, model=str(folder), out=str(tmp_path / "again"), tuner="full")),
        (rebuild, ReplayConfig(config.out, str(tmp_path / "again"), model=str(folder))),
        (evaluate, EvalConfig(run=config.out, model=str(folder))),
    ):
        with pytest.raises(UserError, match="adapter: an adapter, not a whole model: merge it"):
            quiet(command, asked)
    assert not (tmp_path / "again").exists()


def test_broken_adapters(adapter: tuple[TrainConfig, Result, Path], tmp_path: Path) -> None:
    config, _, folder = adapter

    def refused(said: str, **values: Any) -> None:
        with pytest.raises(UserError, match=said) as caught:
            scored(config, folder, **values)
        assert "\n" not in str(caught.value)

    settings, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    text, raw = settings.read_text(), weights.read_bytes()
    tensors = load_file(weights)
    change(settings, base_model_name_or_path=None)
    refused("adapter_config.json: names no base model: give it with --base")
    for kind in ("P_TUNING", "CPT", "MARTIAN", None, 3):
        settings.write_text(text)
        change(settings, peft_type=kind)
        refused(rf"adapter_config.json: peft_type is {kind!r}: it must be LORA")
    for damaged in ("{", "[]", ""):
        settings.write_text(damaged)
        refused("adapter_config.json: (cannot be read|not a JSON object)")
    settings.write_text(text)
    weights.write_bytes(raw[:-8])
    refused(r"adapter_model.safetensors: cannot be read: .*: copy it again")
    save_file({**tensors, "another.weight": torch.zeros(2)}, weights)
    refused(r"it has no place for another.weight \(1 such\)")
    name = sorted(tensors)[0]
    save_file({**tensors, name: torch.zeros(3, 3)}, weights)
    refused("does not fit")
    if config.tuner == "lora":
        save_file({n: t for n, t in tensors.items() if n != name}, weights)
        refused("does not fit .*Found missing adapter keys")
    weights.rename(folder / "adapter_model.bin")  # never unpickled
    refused("adapter_model.safetensors: cannot be read")


def test_a_base_is_for_an_adapter(finished: tuple[TrainConfig, Result]) -> None:
    config, _ = finished
    with pytest.raises(UserError, match=r"it is for an adapter, and .*model holds no adapter_conf"):
        scored(config, Path(config.model), base="smollm2")
    with pytest.raises(UserError, match="--base is 'x': a run's base is its --model"):
        quiet(evaluate, EvalConfig(run=config.out, base="x"))


# ------------------------------------------------------------------------------------ damaged folders

FILES = ["config.yaml", "environment.json", "metrics.jsonl", "result.json", "seen.txt"]


@given(st.sampled_from(FILES), st.data())
def test_a_damaged_file_is_refused_or_harmless(
    finished: tuple[TrainConfig, Result],
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    data: st.DataObject,
) -> None:
    """Cut, overwritten or with an entry missing: one line, or what the other files say."""
    config, _ = finished
    path = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(config.out, path)
    file = path / name
    raw = file.read_bytes()
    how = data.draw(st.sampled_from(["cut", "bytes", "entry", "other"]))
    if how == "cut":
        raw = raw[: data.draw(st.integers(0, len(raw)))]
    elif how == "bytes":
        at = data.draw(st.integers(0, len(raw) - 1))
        raw = raw[:at] + data.draw(st.binary(max_size=5)) + raw[at + 3 :]
    elif how == "entry":
        lines = raw.splitlines(keepends=True)
        if name.endswith(".jsonl"):  # a key less in one line
            row = data.draw(st.integers(0, len(lines) - 1))
            entry = json.loads(lines[row])
            del entry[data.draw(st.sampled_from(sorted(entry)))]
            lines[row] = json.dumps(entry).encode() + b"\n"
        elif name.endswith(".json"):
            entry = json.loads(raw)
            del entry[data.draw(st.sampled_from(sorted(entry)))]
            lines = [json.dumps(entry).encode()]
        else:
            del lines[data.draw(st.integers(0, len(lines) - 1))]
        raw = b"".join(lines)
    else:
        raw = data.draw(st.sampled_from([b"", b"{}", b"[]", b"null", b"3\n", b"\xff", b'"x": 1\n']))
    file.write_bytes(raw)
    resumed = replace(config, out=str(path), resume=True)
    commands: list[tuple[Callable[..., Result], Any]] = [
        (lambda asked, shown: inspect_run(asked), InspectConfig(str(path))),
        (evaluate, EvalConfig(run=str(path))),
        (rebuild, ReplayConfig(str(path), str(path.parent / "m"))),
        (train, resumed),
    ]
    command, asked = data.draw(st.sampled_from(commands), label="command")
    said = "nothing"
    try:
        found = quiet(command, asked)
    except UserError as error:
        said = str(error)
    else:
        assert found.get("steps", 10) in range(11)
    assert said
    assert "\n" not in said
