"""Plot, sparkline and the texts of a run, from run folders made by hand and by train."""

from __future__ import annotations

import io
import math
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import make_model, make_tokenizer
from justforward.config import InspectConfig, TrainConfig
from justforward.errors import UserError
from justforward.folder import RunFolder
from justforward.progress import Progress
from justforward.report import (
    inspect_run,
    plot,
    sparkline,
    spell_eval,
    spell_inspect,
    spell_replay,
    spell_train,
)
from justforward.run import train
from justforward.settings import resolved

BARS = "▁▂▃▄▅▆▇█"


def png_size(path: Path) -> tuple[int, int]:
    raw = path.read_bytes()
    assert raw.startswith(b"\x89PNG\r\n\x1a\n")
    assert raw.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", raw[16:24])
    return width, height


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, dict[str, Any]]:
    """A run of ten steps, and its result. Only to be read."""
    place = tmp_path_factory.mktemp("report")
    make_model("gpt2").save_pretrained(place / "model")
    make_tokenizer().save_pretrained(place / "model")
    rows = [f"film {i} was {('bad', 'good')[i % 2]},{('neg', 'pos')[i % 2]}" for i in range(60)]
    (place / "rows.csv").write_text("text,label\n" + "\n".join(rows))
    config = TrainConfig(
        model=str(place / "model"),
        data=str(place / "rows.csv"),
        template="{text} It was",
        labels="neg=great,pos=terrible",
        out=str(place / "run"),
        max_forwards=20,
        eval_every=6,
        lr=3e-2,
        start="base",
        patience=0,
    )
    result = train(config, Progress(io.StringIO()))
    return RunFolder(config.out), result


# ---------------------------------------------------------------------------------------- sparkline


def test_sparkline_known_answers() -> None:
    assert sparkline([]) == ""
    assert sparkline([math.nan, math.inf]) == ""
    assert sparkline([3.0]) == "▁"
    assert sparkline([1, 2, 3, 4, 5, 6, 7, 8]) == BARS
    assert sparkline([8, 1, math.nan]) == "█▁"
    assert sparkline([0, 0, 8, 8], width=2) == "▁█"
    assert sparkline([5.0] * 9) == "▁" * 9


@given(st.lists(st.floats(-1e100, 1e100), min_size=1, max_size=200), st.integers(1, 60))
def test_sparkline(values: list[float], width: int) -> None:
    line = sparkline(values, width)
    assert len(line) == min(width, len(values))
    assert set(line) <= set(BARS)
    if len(values) <= width:
        assert line[values.index(min(values))] == "▁"
        if max(values) > min(values):
            assert line[values.index(max(values))] == "█"


# --------------------------------------------------------------------------------------------- plot


def test_plot_of_a_run(finished: tuple[RunFolder, dict[str, Any]]) -> None:
    folder, _ = finished
    plot(folder)
    assert png_size(folder.plot) == (840, 672)
    assert not list(folder.path.glob(".*.*"))


def test_plot_of_what_there_is(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.make()
    folder.unlock()
    config = TrainConfig("m", "d.csv", str(folder.path), template="{text} It was", labels="a=b,c=d")
    folder.write_config(resolved(config))
    plot(folder.path)  # nothing yet
    empty = folder.plot.read_bytes()
    check = {"kind": "validation", "step": 0, "forwards": 0, "accuracy": 0.5, "loss": 0.7}
    folder.append_metric({**check, "seconds": 1.0})
    plot(str(folder.path))
    one = folder.plot.read_bytes()
    for step in (2, 1):  # out of order, as a repaired file may be
        line = {"kind": "step", "step": step, "forwards": 2 * step, "loss": 0.6, "lr": 0.1}
        folder.append_metric({**line, "seconds": 1.0})
    cut = {"status": "interrupted", "stopped_by": "interrupt", "seconds": 1.0, "rows": {}}
    folder.write_result({**cut, "before_accuracy": 0.4, "accuracy": None, "kept_step": 7})
    plot(folder)
    assert len({empty, one, folder.plot.read_bytes()}) == 3
    assert png_size(folder.plot) == (840, 672)


def test_plot_that_cannot_be_written(
    finished: tuple[RunFolder, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = finished
    plot(folder)
    before = folder.plot.read_bytes()

    def replace(self: Path, target: Path) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(UserError, match=r"plot\.png: cannot be written: No space left on device"):
        plot(folder)
    assert folder.plot.read_bytes() == before
    assert not list(folder.path.glob(".*.*"))


# ------------------------------------------------------------------------------------------ inspect


def test_inspect(finished: tuple[RunFolder, dict[str, Any]]) -> None:
    folder, result = finished
    found = inspect_run(InspectConfig(str(folder.path), last=3))
    assert found["result"] == result
    assert (found["status"], found["stopped_by"]) == ("finished", "max_forwards")
    assert (found["steps"], found["forwards"], found["max_forwards"]) == (10, 20, 20)
    assert found["labels"] == {"neg": "great", "pos": "terrible"}
    model = make_model("gpt2")
    assert found["weights"] == sum(p.numel() for p in model.parameters())
    assert found["tensors"] == len(list(model.parameters()))
    assert found["base_fingerprint"] != result["fingerprint"]
    assert found["log"]["sealed"]
    assert found["log"]["torn_bytes"] == found["log"]["torn_metric_bytes"] == 0
    assert found["log"]["bytes"] == folder.log.stat().st_size == result["log_bytes"]
    assert [m["step"] for m in found["curve"]] == [0, 3, 6, 9, 10]
    assert len(found["losses"]) == 10
    assert [step["step"] for step in found["last"]] == [8, 9, 10]
    for step in found["last"]:
        assert step["directions"] == len(step["coefficients"]) == 8  # one for each row
        mean = math.fsum(c * c for c in step["coefficients"]) / 8
        assert step["rms_coefficient"] == pytest.approx(math.sqrt(mean))
        assert step["loss"] == found["losses"][step["step"] - 1]
    assert [step["lr"] for step in found["last"]] == pytest.approx([9e-3, 6e-3, 3e-3])
    assert len(inspect_run(InspectConfig(str(folder.path), last=99))["last"]) == 10


def test_inspect_as_text(finished: tuple[RunFolder, dict[str, Any]]) -> None:
    folder, result = finished
    found = inspect_run(InspectConfig(str(folder.path)))
    text = spell_inspect(found)
    for part in (
        "'{text} It was', neg=great, pos=terrible",
        "activation space, two-sided, rms(beta=0.9), lr 0.03 (linear), eps 0.001, samples 1, batch 8, seed 0",
        "finished (max_forwards): 10 steps, 20 of 20 forwards",
        f"{result['log_bytes']:,} bytes",
        ", sealed",
        f"{result['before_accuracy']:.1%} before, {result['accuracy']:.1%} after",
        sparkline(found["losses"]),
    ):
        assert part in text, part
    marked = [line for line in text.splitlines() if line.endswith("  best")]
    assert len(marked) == 1
    assert marked[0].split()[0] == str(result["best_step"])


def test_inspect_a_run_that_was_cut_short(
    finished: tuple[RunFolder, dict[str, Any]], tmp_path: Path
) -> None:
    source, _ = finished
    folder = RunFolder(tmp_path / "run")
    folder.make()
    folder.unlock()
    for name in ("config.yaml", "environment.json"):
        (folder.path / name).write_bytes((source.path / name).read_bytes())
    raw = source.log.read_bytes()
    whole = len(raw) - 12  # the seal
    folder.log.write_bytes(raw[: whole - 5])  # within the tenth step
    metrics = source.read_metrics()[0]
    folder.keep_metrics([m for m in metrics if m["step"] != 8])  # a line that was lost
    with (folder.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "st')
    found = inspect_run(InspectConfig(str(folder.path), last=2))
    assert (found["status"], found["result"], found["steps"]) == ("unfinished", None, 9)
    assert found["log"]["torn_bytes"] > 0
    assert found["log"]["torn_metric_bytes"] == 12
    assert [m["step"] for m in found["curve"]] == [0, 3, 6, 9]  # nothing beyond the log
    assert [step["loss"] is None for step in found["last"]] == [True, False]
    text = spell_inspect(found)
    assert "run       unfinished: 9 steps, 18 of 20 forwards" in text
    assert "bytes after the last whole step" in text
    assert "test " not in text
    assert text.splitlines()[-2].split()[:3] == ["8", "-", "-"]


def test_inspect_refuses(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run folder"):
        inspect_run(InspectConfig(str(tmp_path / "none")))
    with pytest.raises(UserError, match=r"config\.yaml is missing"):
        inspect_run(InspectConfig(str(tmp_path)))
    with pytest.raises(UserError, match="--last is 0"):
        inspect_run(InspectConfig(str(tmp_path), last=0))


# ---------------------------------------------------------------------------------------- summaries


def test_summaries(finished: tuple[RunFolder, dict[str, Any]]) -> None:
    folder, result = finished
    text = spell_train(result)
    assert text.startswith("finished (max_forwards): 10 steps, 20 forwards, 0:0")
    assert f"{result['accuracy']:.1%} after" in text
    assert f"fingerprint {result['fingerprint']}" in text
    assert f"justforward replay {folder.path} --out NEW" in text

    early = {**result, "accuracy": None, "loss": None, "status": "interrupted", "stopped_by": "x"}
    lines = spell_train(early).splitlines()
    assert lines[0].startswith("interrupted (x): 10 steps")
    assert lines[1:] == [f"best validation accuracy so far {result['validation_accuracy']:.1%}"]
    assert len(spell_train({**early, "validation_value": None}).splitlines()) == 1

    scored = {"metric": "f1", "value": 0.5, "loss": 0.25, "fingerprint": "ff", "rows": 8, "step": 3}
    scored |= {"accuracy": 0.25, "f1": 0.5, "exact_match": 0.125}
    alone = spell_eval({**scored, "model": "m", "run": None})
    assert alone == "m: f1 50.0%, loss 0.2500; exact_match 0.1250 on 8 rows\nfingerprint ff"
    assert spell_eval({**scored, "model": "m", "run": "r"}).startswith("r, step 3: ")

    made = {"out": "o", "run": "r", "steps": 3, "replay_seconds": 0.25, "fingerprint": "ff"}
    assert spell_replay(made) == (
        "o: the model of r after 3 steps, replayed in 0.2 s\nfingerprint ff"
    )
