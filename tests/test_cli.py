"""The command as a user meets it: exit codes, one line for each mistake, JSON on the last line."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from justforward import cli, folder, rebuild, report
from justforward import session as session_module
from justforward.causal import CausalPrompts
from justforward.cli import COMMANDS, main
from justforward.config import TrainConfig
from justforward.errors import UserError
from justforward.evaluate import Scorer
from justforward.folder import RunFolder

Said = tuple[int, str, str]
Run = Callable[..., Said]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """`run("eval", "--run", path)` -> exit code, stdout, stderr."""

    def command(*argv: Any) -> Said:
        capsys.readouterr()
        code = main([str(argument) for argument in argv])
        return code, *capsys.readouterr()

    return command


@pytest.fixture
def options(model_folder: Path, sentiment_csv: Path, tmp_path: Path) -> dict[str, Any]:
    """Of a run of ten steps. The words are swapped, so that the model has everything to learn."""
    return {
        "--model": model_folder,
        "--data": sentiment_csv,
        "--template": "{text} It was",
        "--labels": "neg=great,pos=terrible",
        "--out": tmp_path / "run",
        "--max-forwards": 20,
        "--eval-every": 6,
        "--lr": 3e-2,
        "--threads": 1,
        "--start": "base",
        "--patience": 0,
    }


def flat(options: dict[str, Any], **other: Any) -> list[Any]:
    """As arguments, with some changed (`max_minutes=1`) or left out (`lr=None`)."""
    changed = {"--" + name.replace("_", "-"): value for name, value in other.items()}
    pairs = {**options, **changed}.items()
    return [part for pair in pairs if pair[1] is not None for part in pair]


def last(said: Said) -> dict[str, Any]:
    """The object on the last line of --json output."""
    code, out, err = said
    assert code == 0, err
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    assert found.keys() >= {"accuracy", "loss", "forwards", "seconds", "fingerprint"}
    return found


def error(said: Said) -> str:
    """The one line of a refusal."""
    code, out, err = said
    assert code == 2, err
    assert out == ""
    assert err.startswith("error: "), err
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    return err[len("error: ") : -1]


# --------------------------------------------------------------------------------------- end to end


@pytest.mark.parametrize("estimator", ["activation", "weight"])
def test_train_eval_replay_inspect(
    run: Run, options: dict[str, Any], tmp_path: Path, estimator: str
) -> None:
    out = options["--out"]
    said = run("train", *flat(options, estimator=estimator), "--json")
    trained = last(said)
    assert len(said[1].splitlines()) == 1
    assert "rows: 42 train, 6 validation, 12 test" in said[2].splitlines()
    assert (trained["forwards"], trained["steps"]) == (20, 10)
    assert {path.name for path in out.iterdir()} == {
        "config.yaml", "environment.json", "trajectory.jfl", "metrics.jsonl", "seen.txt",
        "result.json", "plot.png", ".lock",
    }  # fmt: skip
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert json.loads((out / "result.json").read_text()) == trained

    scored = last(run("eval", "--run", out, "--json"))
    for key in ("accuracy", "loss", "fingerprint"):
        assert scored[key] == trained[key]
    given = [f"{n}={options[n]}" for n in ("--model", "--data", "--template", "--labels")]
    assert last(run("eval", "--run", out, *given, "--json")) | {"seconds": 0} == {
        **scored, "seconds": 0,
    }  # fmt: skip

    made = last(run("replay", out, "--out", tmp_path / "tuned", "--json"))
    for key in ("accuracy", "loss", "fingerprint"):
        assert made[key] == trained[key]
    tuned = flat(
        {n: options[n] for n in ("--data", "--template", "--labels")}, model=tmp_path / "tuned"
    )
    assert last(run("eval", *tuned, "--json"))["fingerprint"] == trained["fingerprint"]

    code, shown, err = run("inspect", out, "--last", 2, "--json")
    assert (code, err) == (0, "")
    found = json.loads(shown)
    assert found["result"] == trained
    assert len(found["last"]) == 2
    assert found["estimator"] == estimator


def test_words_for_people(run: Run, options: dict[str, Any], tmp_path: Path) -> None:
    out = options["--out"]
    code, shown, _ = run("train", *flat(options))
    assert code == 0
    result = json.loads((out / "result.json").read_text())
    assert shown == report.spell_train(result) + "\n"
    code, shown, err = run("eval", "--run", out)
    assert code == 0
    assert f"step {result['kept_step']}: accuracy {result['accuracy']:.1%}" in shown
    assert err == f"scoring 12 rows of {options['--data']} (the run's test rows)\n"
    code, shown, err = run("replay", out, "--out", tmp_path / "new", "--steps", "4")
    assert (code, err) == (0, "")
    assert f"{tmp_path / 'new'}: the model of {out} after 4 steps" in shown
    code, shown, err = run("inspect", out)
    assert (code, err) == (0, "")
    assert "run       finished (max_forwards): 10 steps, 20 of 20 forwards" in shown


def test_how_it_stops(run: Run, options: dict[str, Any], tmp_path: Path) -> None:
    for name, limits in (
        ("max_forwards", {"max_forwards": 13}),
        ("max_minutes", {"max_forwards": 10**6, "max_minutes": 0.01, "eval_every": 10**6}),
        ("target_accuracy", {"max_forwards": 400, "target_accuracy": 0.8}),
    ):
        found = last(run("train", *flat(options, out=tmp_path / name, **limits), "--json"))
        assert found["stopped_by"] == name
        assert found["forwards"] == 2 * found["steps"] <= limits["max_forwards"]
    assert found["validation_accuracy"] >= 0.8
    assert found["steps"] < 200


# ------------------------------------------------------------------------------------------- config


def test_config_file(run: Run, options: dict[str, Any], tmp_path: Path) -> None:
    trained = last(run("train", *flat(options), "--json"))
    file = tmp_path / "run.yaml"
    values = {name[2:].replace("-", "_"): value for name, value in options.items()}
    values = {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}
    values["labels"] = {"neg": "great", "pos": "terrible"}
    file.write_text(yaml.safe_dump({**values, "out": str(tmp_path / "two"), "json": True}))
    again = last(run("train", "--config", file))
    assert again["fingerprint"] == trained["fingerprint"]
    third = last(run("train", f"--config={file}", "--out", tmp_path / "three", "--seed", 1))
    assert third["fingerprint"] != trained["fingerprint"]
    kept = options["--out"] / "config.yaml"
    fourth = last(run("train", "--config", kept, "--out", tmp_path / "four", "--json"))
    assert fourth["fingerprint"] == trained["fingerprint"]
    assert (tmp_path / "four" / "config.yaml").read_bytes() == kept.read_bytes()
    file.write_text(yaml.safe_dump({"run": str(options["--out"]), "split": "train"}))
    assert last(run("eval", "--config", file, "--json"))["rows"] == 42


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, r"--config .*none\.yaml: cannot be read: No such file"),
        (b"lr: 1\nspeed: 2\n", r"--config .*c\.yaml:2: 'speed' is no setting of train"),
        (b"lr: 1\n  eps: 2\n", r"--config .*c\.yaml:2: not YAML"),
        (b"lr: [\n", r"--config .*c\.yaml:2: not YAML"),
        (b"- lr\n", r"c\.yaml: not a mapping"),
        (b"# nothing yet\n", r"c\.yaml: not a mapping: write one 'option: value' a line"),
        (b"lr: \xff\n", r"c\.yaml: not UTF-8"),
        (b"seed: 1\nlr: fast\n", r"^[^ ]*c\.yaml:2: --lr: 'fast' is not a finite number"),
        (b"lr: .nan\n", r"^[^ ]*c\.yaml:1: --lr is nan: it must be positive and finite"),
        (b"\nmax_length: 0\n", r"^[^ ]*c\.yaml:2: --max-length is 0: it must be at least 1"),
        (b"batch_size: 0\n", r"^--batch-size is -1: it must be at least 1"),  # the option decides
        (b"labels: {no: bad, yes: good}\n", "put quotes around yes, no, true, null"),
        (b"labels: [bad, good]\n", "is not label=word,label=word or a mapping"),
    ],
)
def test_config_refused(
    run: Run, options: dict[str, Any], tmp_path: Path, content: bytes | None, said: str
) -> None:
    file = tmp_path / ("none.yaml" if content is None else "c.yaml")
    if content is not None:
        file.write_bytes(content)
    given = flat(options, labels=None) if content and b"labels" in content else flat(options)
    given = [part for part in given if part not in ("--lr", 3e-2)]
    given += ["--batch-size=-1"] if content and b"batch_size" in content else []
    assert re.search(said, error(run("train", "--config", file, *given)))
    assert not options["--out"].exists()


# ---------------------------------------------------------------------------------------- bad input

GOOD = "".join(
    f"film {i} was {('bad', 'good')[i % 2]},{('neg', 'pos')[i % 2]}\n" for i in range(60)
)
LONG = "film " * 100


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.csv", None, r"none\.csv: no such file: check the path"),
        ("a.txt", "x", r"a\.txt: the ending '\.txt' is not known: give a file that ends in \.csv"),
        ("a.csv", "", r"a\.csv: the file is empty"),
        ("a.csv", "text,label\n", r"a\.csv: no rows in the file: give"),
        ("a.csv", "words,label\n" + GOOD, r"a\.csv:2: template field 'text' is not a column: there are 'words', 'label'"),
        ("a.csv", "text,sentiment\n" + GOOD, r"a\.csv:2: label column 'label' is not a column"),
        ("a.csv", "text,label\n" + GOOD + "so,mixed\n", r"a\.csv:62: label 'mixed' has no word: add it to the labels"),
        ("a.csv", b"text,label\n" + GOOD.encode() + b"\xe9t\xe9,neg\n", r"a\.csv:62: byte 0xe9 is not UTF-8: save"),
        ("a.jsonl", '{"text": "x", "label": "neg"}\n{"text": oops}\n', r"a\.jsonl:2: not JSON .*oops.*: write one JSON object a line"),
        ("a.csv", "text,label\n" + "".join(f"film {i},neg\n" for i in range(40)), r"a\.csv: the test split has only label 'neg'.*give more rows of each label"),
        ("a.csv", "text,label\nx,neg\ny,pos\n", r"a\.csv: 4 rows asked for test, 2 different rows are left: ask for fewer"),
        ("a.csv", "text,label\n" + "x,neg\n" * 30 + "x,pos\n" * 30, "no rows are left once duplicates are dropped"),
        ("a.csv", "text,label\n" + GOOD + LONG + ",neg\n", r"a\.csv:62: the text makes 10\d tokens with the answer, the model's context is 64: shorten it"),
    ],
)  # fmt: skip
def test_bad_data(
    run: Run,
    options: dict[str, Any],
    tmp_path: Path,
    name: str,
    content: str | bytes | None,
    said: str,
) -> None:
    data = tmp_path / name
    if content is not None:
        data.write_bytes(content.encode() if isinstance(content, str) else content)
    found = error(run("train", *flat(options, data=data), "--json"))
    assert re.search(said, found), found
    assert not options["--out"].exists()
    if "split" in said or "rows" in said:  # eval does not split, and needs fewer
        return
    given = {n: options[n] for n in ("--model", "--template", "--labels")}
    assert error(run("eval", *flat(given, data=data))) == found


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"labels": "neg=great"}, "labels: 1 given, at least 2 needed"),
        ({"labels": "neg=great,pos="}, "'pos=' is not label=word: write them as"),
        ({"labels": "neg=great,pos=great"}, "'neg' and 'pos' have the same word 'great'"),
        ({"labels": "neg=great,neg=bad"}, "label 'neg' is given twice: keep one"),
        ({"template": ""}, "template is empty"),
        ({"template": "It was"}, "shows no field of the data: put one in"),
        ({"template": "{text} {title}"}, "rows.csv:2: template field 'title' is not a column"),
        ({"template": "{text"}, "double a brace that is meant as text"),
        ({"rule": "lion"}, "'lion' is unknown; known are sgd, rms, sign, spread, clip, momentum"),
        ({"rule": "rms(beta=2)"}, "rms's beta is '2': it must be in [0, 1)"),
        ({"estimator": "both"}, "--estimator is 'both': it must be one of weight, activation"),
        ({"family": "cauchy"}, "--family is 'cauchy': it must be one of gaussian, rademacher"),
        ({"lr": 0}, "--lr is 0.0: it must be positive and finite"),
        ({"lr": -1}, "--lr is -1.0: it must be positive and finite"),
        ({"lr": "-1e-3"}, "--lr is -0.001: it must be positive and finite"),
        ({"lr": "nan"}, "--lr: 'nan' is not a finite number: see justforward train --help"),
        ({"lr": "inf"}, "--lr: 'inf' is not a finite number"),
        ({"lr": "1e999"}, "--lr"),
        ({"lr": "abc"}, "--lr: 'abc' is not a finite number: see justforward train --help"),
        ({"lr": ""}, "--lr: '' is not a finite number"),
        ({"eps": "-.5"}, "--eps is -0.5: it must be positive and at most 100"),
        ({"eps": "-inf"}, "--eps"),
        ({"eps": "0.0"}, "--eps is 0.0: it must be positive and at most 100"),
        ({"max_forwards": "1.5"}, "--max-forwards: '1.5' is not a whole number"),
        ({"max_forwards": 1}, "--max-forwards is 1: one step takes 2 forwards"),
        ({"max_minutes": "soon"}, "--max-minutes: 'soon' is not a finite number"),
        ({"target_accuracy": 80}, "--target-accuracy is 80.0: it must be above 0 and at most 1"),
        ({"threads": "all"}, "--threads: 'all' is not a whole number"),
        ({"test_size": "half"}, "--test-size: 'half' is not a finite number"),
        ({"test_size": 0}, "--test-size is 0: it must be a number of rows from 1, or a fraction"),
        ({"keep": "first"}, "--keep: 'first' is not one of 'best', 'last'"),
        ({"loss": "mse"}, "--loss: 'mse' is not one of 'choices', 'vocabulary'"),
        ({"tune": "("}, "--tune is '(': not a regular expression"),
        ({"tune": "decoder"}, "--tune is 'decoder': it finds none of the 28 parameters"),
        ({"max_length": 2}, "max_length 2 leaves no room"),
        ({"max_length": 99}, "max_length 99 is beyond the model's context of 64"),
        ({"model": "./none"}, "model './none': no such folder: give a folder, a hub name"),
        ({"seed": 2**64}, "--seed is 18446744073709551616: it must be at least 0 and below 2^64"),
        ({"speed": 1}, "unrecognized arguments: --speed 1: see justforward train --help"),
        ({"model": None}, "the following arguments are required: --model: see justforward train"),
    ],
)  # fmt: skip
def test_bad_options(run: Run, options: dict[str, Any], values: dict[str, Any], said: str) -> None:
    assert said in error(run("train", *flat(options, **values), "--json"))
    assert not options["--out"].exists()


def test_label_words_that_become_the_same_tokens(
    run: Run, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = CausalPrompts._word_tokens
    monkeypatch.setattr(
        CausalPrompts, "_word_tokens", lambda self, word: tokens(self, word.replace("\u0301", ""))
    )  # what a tokenizer that strips accents does
    said = error(run("train", *flat(options, labels="neg=ole\u0301,pos=ole")))
    assert "'ole\u0301' and 'ole' become the same tokens [" in said
    assert "choose words that the tokenizer tells apart" in said
    assert not options["--out"].exists()


def test_where_the_run_cannot_be(
    run: Run, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("precious")
    for name, said in (
        ("folder", "folder: exists: continue it with --resume or choose another --out"),
        ("file", "file: exists and is not a folder"),
        ("file/run", "file/run: cannot be made: "),
    ):
        assert said in error(run("train", *flat(options, out=tmp_path / name)))
    assert (tmp_path / "file").read_text() == "precious"
    assert list((tmp_path / "folder").iterdir()) == []
    monkeypatch.setattr(folder.os, "access", lambda path, mode: False)
    assert "is read-only: choose another --out" in error(run("train", *flat(options)))
    assert not options["--out"].exists()


def test_no_space_left(run: Run, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def full(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    code, out, err = run("train", *flat(options))
    assert (code, out) == (2, "")
    assert "cannot be written: No space left on device: make room" in err.splitlines()[-1]
    assert not options["--out"].exists()
    monkeypatch.setattr(os, "fsync", fsync)
    assert run("train", *flat(options))[0] == 0


@pytest.mark.parametrize("estimator", ["activation", "weight"])
def test_a_loss_that_becomes_nan(
    run: Run, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, estimator: str
) -> None:
    losses, calls = Scorer.losses, []

    def spoiled(self: Scorer, batch: Any) -> Any:
        calls.append(1)
        return losses(self, batch) * (float("nan") if len(calls) == 8 else 1.0)

    monkeypatch.setattr(Scorer, "losses", spoiled)
    code, out, err = run("train", *flat(options, estimator=estimator, backoff="false"), "--json")
    line = err.splitlines()[-1]
    assert (code, out) == (2, "")
    assert re.match(
        r"error: step [1-9]: the loss is nan at [+-]eps.*the weights are as before", line
    )
    assert line.endswith(f"; the run up to there is in {options['--out']}")
    code, shown, _ = run("inspect", options["--out"])
    assert code == 0
    assert "run       failed (non-finite loss)" in shown


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "name a command, one of train, eval, baseline, compare, replay, inspect, rank, fits, serve, join, tasks: see justforward --help"),
        (["tune"], "invalid choice: 'tune'"),
        (["--fast"], "unrecognized arguments: --fast: see justforward --help"),
        (["train"], "required: --model, --data, --out: see justforward train --help"),
        (["train", "--lr"], "argument --lr: expected one argument: see justforward train --help"),
        (["train", "here"], "justforward train --help"),
        (["eval"], "eval needs --model, or --run with a run folder to take it from"),
        (["eval", "--run", "none"], "none: no such run folder: check the path"),
        (["eval", "--split", "some"], "--split: 'some' is not one of 'train', 'validation', 'test', 'all'"),
        (["replay"], "required: DIR, --out: see justforward replay --help"),
        (["replay", "none", "--out", "new"], "none: no such run folder"),
        (["inspect"], "required: DIR: see justforward inspect --help"),
        (["inspect", "none"], "none: no such run folder"),
        (["inspect", ".", "--last", "0"], "--last is 0: it must be at least 1"),
        (["train", "--resume", "--out", "none"], "none: there is no run folder to continue: check --out"),
        (["train", "--resume", "--out=."], ".: not a run folder: config.yaml is missing"),
        (["train", "--resume"], "required: --model"),
    ],
)  # fmt: skip
def test_bad_command_lines(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in error(run(*argv))
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------- stop and continue


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_and_continue(
    run: Run,
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    trained = last(run("train", *flat(options), "--json"))
    cut = tmp_path / "cut"
    losses, calls = Scorer.losses, []

    def interrupted(self: Scorer, batch: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            signal.raise_signal(number)
        return losses(self, batch)

    monkeypatch.setattr(Scorer, "losses", interrupted)
    code, out, err = run("train", *flat(options, out=cut), "--json")
    assert code == 130
    assert err.splitlines()[-1] == (
        f"stopped: continue with: justforward train --resume --out {cut}"
    )
    so_far = json.loads(out.splitlines()[-1])
    assert (so_far["status"], so_far["accuracy"]) == ("interrupted", None)
    assert 0 < so_far["steps"] < 10
    assert (cut / "plot.png").exists()
    done = last(run("train", "--resume", "--out", cut, "--json"))
    assert done["fingerprint"] == trained["fingerprint"]
    before = {p.name: p.read_bytes() for p in cut.iterdir() if p.name != "plot.png"}
    code, out, err = run("train", "--resume", "--out", cut, "--json")
    assert json.loads(out) == done
    assert err == f"{cut}: the run is finished (max_forwards): nothing to do\n"
    assert {p.name: p.read_bytes() for p in cut.iterdir() if p.name != "plot.png"} == before


def test_stopped_before_the_first_step(
    run: Run, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scorer, "evaluate", lambda *arguments: signal.raise_signal(signal.SIGINT))
    code, out, err = run("train", *flat(options), "--json")
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == "stopped before the first step: nothing was written"
    assert not options["--out"].exists()


@pytest.mark.parametrize(
    ("command", "module"), [("eval", rebuild), ("replay", rebuild), ("train", session_module)]
)
def test_ctrl_c_in_other_places(
    run: Run, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, command: str, module: Any
) -> None:
    run("train", *flat(options))
    out = options["--out"]

    def interrupted(*arguments: Any, **more: Any) -> Any:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(module, "load_model", interrupted)
    argv = {
        "eval": ["eval", "--run", out],
        "replay": ["replay", out, "--out", out.with_name("new")],
        "train": ["train", "--resume", "--out", out, "--target-accuracy", "1"],
    }[command]
    (out / "result.json").unlink()
    code, shown, err = run(*argv)
    assert (code, shown) == (130, "")
    assert err.splitlines()[-1].startswith("stopped")
    assert not out.with_name("new").exists()


@pytest.mark.parametrize(
    "other",
    [
        ["--lr", "0.5"], ["--seed=1"], ["--estimator", "weight"], ["--rule", "sgd"],
        ["--batch-size", "4"], ["--max-forwards", "40"], ["--template", "{text} So"],
        ["--labels", "neg=bad,pos=good"], ["--eps", "0.01"], ["--family", "rademacher"],
    ],
)  # fmt: skip
def test_another_config_is_not_resumed(run: Run, options: dict[str, Any], other: list[str]) -> None:
    assert run("train", *flat(options))[0] == 0
    out = options["--out"]
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    said = error(run("train", "--resume", "--out", out, *other))
    name = other[0].split("=")[0]
    assert re.search(
        f"run: {name} is .* in the run and .* now.*: resume with the run's value", said
    )
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_a_place_at_home_where_no_shell_has_seen_it(
    run: Run, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a folder called ~ would be made, for somebody to remove."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    given = {n[2:].replace("-", "_"): v for n, v in options.items() if n not in ("--out", "--data")}
    file = tmp_path / "given.yaml"
    file.write_text(yaml.safe_dump({**given, "model": str(given["model"]), "data": "~/rows.csv"}))
    code, _, err = run("train", "--config", file, "--out=~/run", "--max-forwards", 4)
    assert code == 0, err
    assert (tmp_path / "run" / "result.json").is_file()
    assert run("eval", "--run=~/run")[0] == 0
    assert run("train", "--resume", "--out=~/run")[0] == 0
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("option", ["--model", "--data", "--out", "--task"])
def test_a_path_that_is_none(run: Run, options: dict[str, Any], option: str) -> None:
    """Such as a text in the place of one."""
    long = "a film, " * 100
    said = error(run("train", *flat({**options, option: long})))
    assert said.startswith(("a film, a film, ", f"{option[2:]} 'a film, a film, ", f"--{option[2:]}"))  # fmt: skip


def test_a_second_session_is_refused(run: Run, options: dict[str, Any]) -> None:
    assert run("train", *flat(options))[0] == 0
    first = RunFolder(options["--out"])
    first.lock()
    said = error(run("train", "--resume", "--out", options["--out"]))
    assert said == f"{first.path}: another train is at work in this folder: wait for it or stop it"
    first.unlock()


def test_in_a_process_of_its_own(run: Run, options: dict[str, Any], tmp_path: Path) -> None:
    """Exit codes and streams as a shell sees them; a real signal while training."""
    command = [sys.executable, "-m", "justforward"]
    bad = subprocess.run([*command, "train", "--lr", "abc"], capture_output=True, text=True)
    assert error((bad.returncode, bad.stdout, bad.stderr)).startswith("--lr: 'abc'")

    argv = ["train", *flat(options, max_forwards=100_000, eval_every=40), "--json"]
    process = subprocess.Popen(
        [*command, *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("forwards 40: validation accuracy"):
            break
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1].startswith("stopped: continue with: justforward train --resume")
    result = json.loads(out)
    assert result["steps"] >= 20
    assert result == json.loads((options["--out"] / "result.json").read_text())


# --------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("command", COMMANDS)
def test_help(run: Run, command: str) -> None:
    code, out, err = run(command, "--help")
    assert (code, err) == (0, "")
    kind = COMMANDS[command]
    text = " ".join(out.split())
    for name in kind.__dataclass_fields__:
        if (command, name) in (("replay", "run"), ("inspect", "run")):
            assert "DIR" in out
        elif (command, name) in (("fits", "model"), ("join", "url")):
            assert name.upper() in out
        else:
            assert f"--{name.replace('_', '-')}" in out, name
    assert not re.search(r"--[a-z]+_[a-z]", out)
    assert (kind.__doc__ or "").splitlines()[0] in text
    assert "typing." not in out
    assert "<class" not in out


def test_help_of_all(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for name, kind in COMMANDS.items():
        assert name in out
        assert (kind.__doc__ or "").splitlines()[0][:40] in " ".join(out.split())
    code, out, _ = run("--version")
    assert (code, out.strip().split()[-1]) == (0, __import__("justforward").__version__)


# ------------------------------------------------------------------------------------------ in pieces


def test_a_reader_that_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """`justforward inspect DIR | head` ends without a traceback."""
    muted: list[int] = []

    def gone() -> int:
        raise BrokenPipeError

    monkeypatch.setattr(cli, "main", gone)
    with monkeypatch.context() as patch:  # no longer: pytest itself needs dup2
        patch.setattr(os, "dup2", lambda old, new: os.close(old) or muted.append(new))
        with pytest.raises(SystemExit) as caught:
            cli.entry()
    assert caught.value.code == 141
    assert muted == [1, 2]
    monkeypatch.setattr(cli, "main", lambda: 2)
    with pytest.raises(SystemExit) as caught:
        cli.entry()
    assert caught.value.code == 2


def test_with_underscores() -> None:
    given = ["train", "--max-forwards=9", "--eval-every", "-3", "--lr", "-1e-3", "--template",
             "a-b --x-y", "--data", "my-rows.csv", "--json", "-.5", "--out=a-b=--c-d"]  # fmt: skip
    assert cli._with_underscores(given) == [
        "train", "--max_forwards=9", "--eval_every=-3", "--lr=-1e-3", "--template",
        "a-b --x-y", "--data", "my-rows.csv", "--json=-.5", "--out=a-b=--c-d",
    ]  # fmt: skip


def test_with_run(tmp_path: Path) -> None:
    config = str(tmp_path / "config.yaml")
    for argv in ([], ["eval", "--resume"], ["train", "--out", "x"], ["train", "--resume"]):
        assert cli._with_run(argv) == argv
    with pytest.raises(UserError, match=r"not a run folder: config\.yaml is missing"):
        cli._with_run(["train", "--resume", f"--out={tmp_path}"])
    Path(config).touch()
    for given in (["--out", str(tmp_path)], [f"--out={tmp_path}"]):
        argv = ["train", *given, "--resume", "--lr", "1"]
        assert cli._with_run(argv) == ["train", "--config", config, *argv[1:]]
    for given in (["--out"], ["--out="], ["--out", "--json"], ["--out", "none"]):
        with pytest.raises(UserError, match="there is no run folder to continue"):
            cli._with_run(["train", "--resume", *given])


def test_defaults_are_those_of_the_dataclass() -> None:
    argv = ["train", "--model=m", "--data=d", "--template=t", "--labels=l", "--out=o"]
    given = cli.parser().parse_args(argv)["train"].as_dict()
    given.pop("config")
    assert TrainConfig(**given) == TrainConfig("m", "d", "o", template="t", labels="l")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("? [a]\n: b\n", "c.yaml:1: not YAML: found unhashable key"),
        ("labels: {? [a] : b}\n", "c.yaml:1: not YAML: found unhashable key"),
        ("labels: &a {b: *a}\n", "c.yaml: a mapping holds itself: write it out"),
        ("seed: " + "9" * 5000, "c.yaml: not YAML: Exceeds the limit"),
        ("labels: " + "[" * 2000, "c.yaml: not YAML: maximum recursion depth"),
    ],
)
def test_yaml_beyond_all_measure(run: Run, tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(content)
    assert said in error(run("train", "--config", path))


def test_ctrl_c_before_anything_is_begun(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop() -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "parser", stop)
    assert run("train", "--help") == (130, "", "stopped\n")
