"""The commands `serve` and `join` on language models: rows and model of one's own, refusals that say what differs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

import justforward
from conftest import make_model
from justforward.cli import main
from justforward.join import Own
from justforward.line import HttpLink, Line
from justforward.offers import JoinConfig, worker_config
from justforward.wire import PROTOCOL
from justforward.worker import Rows, Worker
from parties import KEY, close_all
from test_serve import Running, running


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    close_all()


OPTIONS: dict[str, Any] = {
    "template": "{text} It was",
    "labels": "neg=bad,pos=good",
    "max_forwards": 6,
    "hash_every": 2,
}


@pytest.fixture
def key(tmp_path: Path) -> str:
    file = tmp_path / "key"
    file.write_bytes(KEY)
    return str(file)


def join(hub: Running, key: str, model: Path, data: Path, *more: str) -> int:
    place = [hub.url] if hub.url else []
    given = [f"--model={model}", f"--data={data}", f"--key-file={key}", "--wait=5"]
    return main(["join", *place, *given, *more])


@pytest.mark.parametrize(
    "options",
    [
        {"estimator": "activation"},
        {"estimator": "weight", "tuner": "lora"},
        {"estimator": "activation", "own_rows": True, "batch_size": 4, "rule": "sgd"},
    ],
    ids=["activation", "lora", "private"],
)
def test_join_and_replay(
    tmp_path: Path,
    model_folder: Path,
    sentiment_csv: Path,
    key: str,
    options: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    with running(run, model=str(model_folder), **{**OPTIONS, **options}) as hub:
        assert join(hub, key, model_folder, sentiment_csv, "--json", "--name", "mine") == 0
        took = json.loads(capsys.readouterr().out)
        assert took["steps"] == 3
        assert took["name"].startswith("mine-")
    close_all()
    assert main(["replay", str(run), "--out", str(tmp_path / "tuned"), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["fingerprint"] == took["fingerprint"]
    assert made["steps"] == 3
    assert main(["inspect", str(run)]) == 0
    assert "(each worker's own)" in capsys.readouterr().out


def test_no_row_of_a_hub_is_taken_for_held_out(
    tmp_path: Path,
    model_folder: Path,
    sentiment_csv: Path,
    key: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, others = tmp_path / "run", tmp_path / "others.csv"
    with running(run, model=str(model_folder), **OPTIONS) as hub:
        assert join(hub, key, model_folder, sentiment_csv) == 0
    close_all()
    others.write_text(
        "text,label\n" + "".join(f"another {i},{['neg', 'pos'][i % 2]}\n" for i in range(8))
    )
    capsys.readouterr()

    def said(*given: str, code: int = 2) -> str:
        assert main(list(given)) == code, given
        return " ".join(capsys.readouterr().err.split())

    score = ["eval", f"--run={run}"]
    assert "was a hub's run, whose workers have the rows: give rows to score with --data" in said(
        *score
    )
    trained_on = f"--data={sentiment_csv}"
    assert "workers were trained on all of its rows: give others" in said(*score, trained_on)
    assert "--split is 'test': the run was a hub's" in said(*score, trained_on, "--split=test")
    for rows in (trained_on, f"--data={others}"):
        told = said(*score, rows, *([] if rows != trained_on else ["--split=all"]), code=0)
        assert "which rows its workers were trained on is not known here" in told
    before = (run / "config.yaml").read_bytes()
    for more in ([], [trained_on]):
        assert "is a hub's run" in said("train", "--resume", f"--out={run}", *more)
    assert (run / "config.yaml").read_bytes() == before


def test_what_differs_is_named(
    tmp_path: Path,
    model_folder: Path,
    sentiment_csv: Path,
    key: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(hub: Running, model: Path, data: Path, given: str = key) -> str:
        assert join(hub, given, model, data) == 2
        return capsys.readouterr().err.splitlines()[-1]

    other_rows = tmp_path / "other.csv"
    other_rows.write_text(sentiment_csv.read_text().replace("film 7 ", "film seven "))
    other_model = tmp_path / "other"
    shutil.copytree(model_folder, other_model)
    make_model("gpt2", seed=1).save_pretrained(other_model)
    other_tokens = tmp_path / "tokens"
    shutil.copytree(model_folder, other_tokens)
    file = other_tokens / "tokenizer.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps({**said, "normalizer": {"type": "Lowercase"}}))
    other_key = tmp_path / "other.key"
    other_key.write_text("0123456789abcdef0123456789abcdef")
    with running(tmp_path / "run", model="m", workers=2, **OPTIONS) as hub:
        # the first one that joins says what the run's rows and model are
        _found(hub, model_folder, sentiment_csv)
        assert "its rows have sha256" in refused(hub, model_folder, other_rows)
        assert "its tokenizer makes other tokens" in refused(hub, other_tokens, sentiment_csv)
        said = refused(hub, other_model, sentiment_csv)
        assert said.startswith("error: the hub's log: made from a base model with fingerprint")
        assert "does not take this key" in refused(hub, model_folder, sentiment_csv, str(other_key))
        monkeypatch.setattr(
            hub.desk.conductor, "info", lambda: {"protocol": PROTOCOL, "version": "0.0.9"}
        )
        said = refused(hub, model_folder, sentiment_csv)
        assert (
            f"version of justforward is '0.0.9', and this one's '{justforward.__version__}'" in said
        )
    notice = "join takes either the address of a hub or its --folder"
    assert main(["join", "--model", "m", "--data", "d", "--key-file", key]) == 2
    assert notice in capsys.readouterr().err


def _found(hub: Running, model: Path, data: Path) -> None:
    """Join as the first, and go."""
    line = Line(HttpLink(hub.url), KEY, 5.0)
    line.open()
    told = line.ask("run")
    config = worker_config(JoinConfig(str(model), str(data)), told["config"])
    own = Own(config, False, print)
    made = Worker(
        line, "founder", own.build, Rows(own.batch, own.losses, own.digest, own.tokens), 5
    )
    with TemporaryDirectory() as folder:
        made._begin(Path(folder), 0)
        assert made.opt is not None
        made.opt.close()
    line.call("leave")
    line.link.close()


def test_a_log_of_a_newer_format(
    tmp_path: Path, model_folder: Path, sentiment_csv: Path, key: str, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    with running(tmp_path / "run", model="m", **OPTIONS) as hub:
        _found(hub, model_folder, sentiment_csv)
        log = hub.desk.conductor.folder.log
        log.write_bytes(log.read_bytes().replace(b"JFLOG 1", b"JFLOG 2", 1))
        assert join(hub, key, model_folder, sentiment_csv) == 2
        assert "log format '2', this version reads format '1'" in capsys.readouterr().err
