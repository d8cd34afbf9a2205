"""A grid is run cell by cell, survives whatever happens to it, and chooses by validation alone.

Most cells here are those of a small script in place of our command line: a process all the same.
"""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from justforward import cli, records
from justforward import compare as compare_module
from justforward.board import Board
from justforward.compare import compare, spell_compare
from justforward.config import CompareConfig, TrainConfig
from justforward.errors import UserError
from justforward.folder import RunFolder
from justforward.progress import Progress
from justforward.run import train
from justforward.trajectory import read_log

# Stands in for `python -m justforward`. Its validation figure is best at lr 0.01, its test figure at the ends.
FAKE = """
import json, math, os, signal, sys, time
command, *rest = sys.argv[1:]
given = dict((a[2:].split("=", 1) + [True])[:2] for a in rest)
kind, seed, lr = given.get("method", "mezo"), int(given["seed"]), float(given.get("lr", 0.01))
with open("log", "a") as log:
    print(kind, seed, given.get("lr", "-"), "resume" in given, file=log)
run = given.get("out")
if run and not os.path.exists(run):
    os.makedirs(run)
    for name in ("config.yaml", "environment.json", "trajectory.jfl"):
        open(f"{run}/{name}", "w").close()
if os.path.exists("interruptible"):
    signal.signal(signal.SIGINT, lambda *a: (open("log", "a").write("interrupted\\n"), sys.exit(130)))
while os.path.exists("wait"):
    time.sleep(0.01)
for line in open("bad").read().split() if os.path.exists("bad") else ():
    which, how = line.split("=")
    if which in (f"{kind}-{seed}", f"{kind}-{lr:g}"):
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "say":
            print("not JSON")
            sys.exit(0)
        print("a line before\\nerror: the loss is", how, file=sys.stderr)
        sys.exit(2)
distance = abs(math.log10(lr) + 2)
validation, test = 0.9 - distance / 10, 0.5 + distance / 10 + seed / 100
curve = [{"kind": "validation", "step": i, "forwards": 10 * i, "seconds": 0.1 * i,
          "accuracy": validation * i / 2, "loss": 1.0} for i in range(3)]
result = {"accuracy": test, "validation_accuracy": validation, "loss": 0.5, "seconds": 0.1, "steps": 10,
          "rows": {"train": 4, "validation": 4, "test": 9}, "status": "finished"}
if run:
    with open(f"{run}/metrics.jsonl", "w") as file:
        file.writelines(json.dumps(line) + "\\n" for line in curve)
    result["forwards"] = 20
if kind == "first-order":
    result.update(curve=curve, forwards=20, backwards=20)
if kind == "icl":  # as `baseline` prints it
    result.update(metric="f1", value=0.25, f1=0.25, validation_value=None)
print("something else\\n" + json.dumps(result))
"""

MACHINE = {"cpu": "one", "versions": {"torch": "2"}, "threads": 1}
Grid = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: with the script, the folder of a task, and a log of what was run."""
    monkeypatch.chdir(tmp_path)
    Path("fake.py").write_text(FAKE)
    Path("data").mkdir()
    return tmp_path


def asked(**other: Any) -> dict[str, Any]:
    return {
        "model": "m",
        "out": "out",
        "tasks": {"sst2": {"data": "data"}},
        "methods": {"zero-shot": {}, "mezo": {}},
        "seeds": (0, 1),
        **other,
    }


def run(stream: io.StringIO | None = None, **other: Any) -> dict[str, Any]:
    board = Board(stream or io.StringIO())
    start = (sys.executable, "-S", "fake.py")
    return compare(CompareConfig(**asked(**other)), None, board, start, lambda: MACHINE)


def log() -> list[str]:
    """What was run since the last look."""
    path = Path("log")
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def lines(out: str = "out") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(out) / "results.jsonl").read_text().splitlines()]


def lasting(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what may differ between two grids of the same cells."""
    times = ("seconds", "peak_bytes", "resumed")
    return [
        {
            **{k: v for k, v in r.items() if k not in times},
            "curve": [[p[0], p[2]] for p in r["curve"]],
        }
        for r in found
    ]


# --------------------------------------------------------------------------------- an undisturbed grid


def test_a_grid() -> None:
    stream = io.StringIO()
    methods = {"zero-shot": {}, "icl": {}, "mezo": {"lr": 0.1}, "first-order": {}}
    result = run(stream, methods=methods)
    assert log() == [
        "zero-shot 0 - False", "icl 0 - False", "icl 1 - False", "mezo 0 0.1 False",
        "mezo 1 0.1 False", "first-order 0 - False", "first-order 1 - False",
    ]  # fmt: skip
    assert (result["cells"], result["ok"], result["failed"]) == (7, 7, [])
    mezo = next(f for f in result["figures"] if f["method"] == "mezo")
    assert (mezo["task"], mezo["metric"], mezo["n"]) == ("sst2", "accuracy", 2)
    assert mezo["mean"] == pytest.approx(0.605)
    assert mezo["sd"] == pytest.approx(0.01 / 2**0.5)

    found = {(r["method"], r["seed"]): r for r in lines()}
    assert len(found) == len(lines()) == 7
    one = found["mezo", 1]
    assert one["options"] == {"model": "m", "task": "sst2", "data": "data", "lr": 0.1, "seed": 1}
    assert one["command"] == [
        "justforward", "train", "--model=m", "--task=sst2", "--data=data", "--lr=0.1", "--seed=1", "--json",
        "--out=cells/sst2/mezo/1/run",
    ]  # fmt: skip
    assert (one["status"], one["error"], one["metric"], one["steps"]) == (
        "ok",
        None,
        "accuracy",
        10,
    )
    assert (one["value"], one["validation_value"]) == (pytest.approx(0.61), pytest.approx(0.8))
    assert one["curve"] == [
        [0, 0.0, 0.0],
        [10, 0.1, pytest.approx(0.4)],
        [20, 0.2, pytest.approx(0.8)],
    ]
    assert found["first-order", 0]["curve"] == [[0, 0.0, 0.0], [10, 0.1, 0.45], [20, 0.2, 0.9]]
    assert found["first-order", 0]["backwards"] == 20
    assert (found["icl", 0]["metric"], found["icl", 0]["value"]) == ("f1", 0.25)
    assert found["icl", 0]["metrics"] == {"accuracy": 0.5, "f1": 0.25}
    assert 0 < one["seconds"] < 30

    out = Path("out")
    assert json.loads((out / "environment.json").read_text()) == MACHINE
    assert "| mezo " in (out / "table.md").read_text()
    assert r"\toprule" in (out / "table.tex").read_text()
    assert "<svg" in (out / "index.html").read_text()
    assert "7 of 7 cells have a result" in spell_compare(result)
    said = stream.getvalue().splitlines()
    assert len(said) == 7
    assert re.fullmatch(
        r"\[4/7\] sst2 mezo seed 0: accuracy 60\.0%, validation 80\.0%, 0:0\d(; about 0:\d\d left)?", said[3]
    ) or "GiB" in said[3]  # fmt: skip
    assert "\x1b" not in stream.getvalue()


def test_again_there_is_nothing_to_do() -> None:
    run()
    log()
    before = {p: p.read_bytes() for p in Path("out").rglob("*") if p.is_file()}
    result = run()
    assert result["ok"] == 3
    assert log() == []
    assert {p: p.read_bytes() for p in Path("out").rglob("*") if p.is_file()} == before


def test_its_own_compare_yaml_is_the_same_grid() -> None:
    run(search={"mezo": {"lr": [0.1, 0.01]}})
    log()
    kept = yaml.safe_load(Path("out/compare.yaml").read_text())
    assert "out" not in kept
    kept["seeds"] = tuple(kept["seeds"])
    run(**kept)
    assert log() == []


def test_more_of_it_runs_only_what_is_new() -> None:
    run()
    log()
    tasks = {"sst2": {"data": "data"}, "rte": {"data": "data"}}
    result = run(tasks=tasks, methods={"mezo": {}, "probe": {}}, seeds=(0, 1, 2))
    assert [line for line in log() if "mezo" in line] == [
        "mezo 2 - False", "mezo 0 - False", "mezo 1 - False", "mezo 2 - False"
    ]  # fmt: skip
    assert (result["cells"], result["ok"]) == (12, 12)
    assert {f["method"] for f in result["figures"]} == {
        "mezo",
        "probe",
    }  # zero-shot is not asked for


def test_a_change_of_options_is_refused_and_can_be_run_again() -> None:
    run()
    log()
    changed = {"zero-shot": {}, "mezo": {"lr": 0.1}}
    before = Path("out/results.jsonl").read_bytes()
    kept = Path("out/compare.yaml").read_bytes()
    with pytest.raises(
        UserError, match=r"out: sst2 mezo seed 0: lr was not given and is 0\.1 now: .*--again mezo"
    ):
        run(methods=changed)
    assert Path("out/results.jsonl").read_bytes() == before
    assert Path("out/compare.yaml").read_bytes() == kept
    run(methods=changed, again="mezo")
    assert log() == ["mezo 0 0.1 False", "mezo 1 0.1 False"]
    run(methods=changed)
    assert log() == []
    with pytest.raises(UserError, match=r"mezo seed 0: lr was 0\.1 and is not given now"):
        run(search={"mezo": {"lr": [0.2]}})


# ----------------------------------------------------------------------------------------- a search


def test_a_search_never_sees_the_test_rows() -> None:
    candidates = [0.1, 0.0001, 0.01, 0.001]
    result = run(methods={"mezo": {}}, search={"mezo": {"lr": candidates}})
    # the validation figure is best at 0.01, the test figure at 0.0001
    assert log() == [f"mezo 0 {lr} False" for lr in candidates] + [
        "mezo 0 0.01 False", "mezo 1 0.01 False"
    ]  # fmt: skip
    assert result["figures"][0]["mean"] == pytest.approx(0.505)
    trials = [r for r in lines() if r["trial"] is not None]
    assert [r["values"] for r in trials] == [{"lr": lr} for lr in candidates]
    for trial in trials:
        assert (trial["value"], trial["loss"], trial["metrics"]) == (None, None, {})
    assert [r["values"] for r in lines() if r["trial"] is None] == [{"lr": 0.01}] * 2
    assert "--lr=0.01" in lines()[-1]["command"]
    assert result["cells"] == 2
    run(methods={"mezo": {}}, search={"mezo": {"lr": candidates}})
    assert log() == []


def test_a_trial_that_fails_is_not_chosen() -> None:
    Path("bad").write_text("mezo-0.01=nan")
    result = run(methods={"mezo": {}}, search={"mezo": {"lr": [0.1, 0.01, 0.0001]}})
    assert result["failed"] == []
    assert [r["values"] for r in lines() if r["trial"] is None] == [{"lr": 0.1}] * 2
    log()
    Path("bad").unlink()  # it would be the best now, and cells have been run with another
    run(methods={"mezo": {}}, search={"mezo": {"lr": [0.1, 0.01, 0.0001]}})
    assert log() == []


def test_a_search_of_which_nothing_comes() -> None:
    Path("bad").write_text("mezo-0.1=nan mezo-0.2=nan")
    search = {"mezo": {"lr": [0.1, 0.2]}}
    result = run(search=search)
    assert [(f["method"], f["seed"], f["error"]) for f in result["failed"]] == [
        ("mezo", seed, "no trial of its search has ended well") for seed in (0, 1)
    ]
    assert log() == ["zero-shot 0 - False", "mezo 0 0.1 False", "mezo 0 0.2 False"]
    Path("bad").unlink()
    assert run(search=search)["failed"] == []
    assert len(log()) == 4


# --------------------------------------------------------------------------------- cells that go wrong


def test_failed_cells_are_told_and_tried_again() -> None:
    Path("bad").write_text("zero-shot-0=die mezo-0=nan mezo-1=say")
    stream = io.StringIO()
    result = run(stream)
    assert result["ok"] == 0
    errors = {(f["method"], f["seed"]): (f["status"], f["error"]) for f in result["failed"]}
    assert errors["zero-shot", 0] == ("failed", "ended by SIGKILL (out of memory?)")
    assert errors["mezo", 0] == ("failed", "the loss is nan")
    assert errors["mezo", 1][1].startswith(
        "no result on the last line of out/cells/sst2/mezo/1/stdout"
    )
    assert "[2/3] sst2 mezo seed 0: failed: the loss is nan" in stream.getvalue()
    assert "mezo seed 0: failed: the loss is nan" in spell_compare(result)
    assert "the loss is nan" in Path("out/index.html").read_text()
    log()
    Path("bad").unlink()
    result = run()
    assert (result["ok"], result["failed"]) == (3, [])
    assert len(log()) == 3
    assert len(lines()) == 6  # what failed stays on record


def test_a_cell_that_takes_too_long() -> None:
    Path("wait").touch()
    Path("interruptible").touch()
    result = run(methods={"mezo": {}}, seeds=(0,), cell_minutes=0.5 / 60)
    assert log() == ["mezo 0 - False", "interrupted"]
    (failed,) = result["failed"]
    assert failed["status"] == "timeout"
    assert failed["error"].startswith("not done after 0.00833")
    Path("wait").unlink()
    assert run(methods={"mezo": {}}, seeds=(0,))["ok"] == 1
    assert log() == ["mezo 0 - True"]  # the run is continued
    assert lines()[-1]["resumed"] is True


def test_a_run_whose_end_was_not_seen_is_run_again() -> None:
    """Its peak memory is not known: a continued one would give that of a process that has nothing to do."""
    run(methods={"mezo": {}}, seeds=(0,))
    Path("out/results.jsonl").unlink()
    made = RunFolder("out/cells/sst2/mezo/0/run")
    made.write_result(
        {"status": "finished", "stopped_by": "max_forwards", "seconds": 1.0, "rows": {}, "loss": 1,
         "accuracy": 1, "before_accuracy": 1, "before_loss": 1, "kept_step": 1, "validation_accuracy": 1}
    )  # fmt: skip
    log()
    run(methods={"mezo": {}}, seeds=(0,))
    assert log() == ["mezo 0 - False"]


# ------------------------------------------------------------------------------------------- the folder


def test_a_torn_line_is_cut_off_and_its_cell_run_again() -> None:
    run()
    whole = Path("out/results.jsonl").read_bytes()
    log()
    for torn in (whole[:-1], whole[:-40], whole[: whole.index(b"\n") + 3]):
        Path("out/results.jsonl").write_bytes(torn)
        stream = io.StringIO()
        run(stream)
        assert "torn line: cut off" in stream.getvalue()
        assert log()[-1].startswith("mezo 1")
        now = Path("out/results.jsonl").read_bytes()
        assert lasting(lines()) == lasting([json.loads(line) for line in whole.splitlines()])
        assert now.endswith(b"\n")


@pytest.mark.parametrize("line", [b"{}", b"no JSON", b"[1]", b'{"task": "sst2"}', b"\xff"])
def test_a_damaged_line_is_named(line: bytes) -> None:
    run()
    with open("out/results.jsonl", "ab") as file:
        file.write(line + b"\n")
    with pytest.raises(UserError, match=r"out/results\.jsonl:4: damaged: .*: remove the line"):
        run()


def test_folders_of_others_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("out").mkdir()
    Path("out/thesis.txt").touch()
    with pytest.raises(
        UserError, match=r"out: exists: it has no compare\.yaml: choose another --out"
    ):
        run()
    assert [p.name for p in Path("out").iterdir()] == ["thesis.txt"]
    Path("out/thesis.txt").rename(
        "out/.hidden"
    )  # as a compare leaves it that is killed at its start
    assert run()["ok"] == 3

    monkeypatch.setattr(records, "LOCK_SECONDS", 0.2)
    monkeypatch.setattr(records, "LOOK_SECONDS", 0.05)
    with records.GridFolder("out") as first:
        first._wait_for_lock(print)
        with pytest.raises(UserError, match="another compare is at work in this folder"):
            run()
    assert run()["ok"] == 3


def test_another_machine_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    run()
    stream = io.StringIO()
    monkeypatch.setitem(MACHINE, "cpu", "another")
    run(stream)
    assert stream.getvalue().startswith("note: cpu differ from out/environment.json")


def test_threads_are_those_that_cells_have() -> None:
    run(threads=3)
    assert json.loads(Path("out/environment.json").read_text())["threads"] == 3
    stream = io.StringIO()
    run(stream, threads=3)
    assert "threads differ" not in stream.getvalue()


# ------------------------------------------------------------------------------ signals, kills, memory

DRIVER = """
import json, sys
from justforward.compare import compare
from justforward.config import CompareConfig, TrainConfig
given = json.loads(sys.argv[1])
given["seeds"] = tuple(given["seeds"])
try:
    start = [sys.executable, "-S", "fake.py"] if sys.argv[2:] else None
    compare(CompareConfig(**given), start=start, machine=lambda: {"threads": 1})
except KeyboardInterrupt:
    sys.exit(130)
assert "torch" not in sys.modules, "its cells would be charged with torch's memory"
"""


def drive(fake: bool = True, **other: Any) -> subprocess.Popen[str]:
    """The same in a process of its own; with the script for cells or with our command line."""
    command = [sys.executable, "-c", DRIVER, json.dumps(asked(**other)), *["fake"] * fake]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(what: Callable[[], Any], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_killed_again_and_again_the_results_are_the_same() -> None:
    run(out="calm")
    log()
    kills = 0
    for delay in (0.0, 0.02, 0.1, 0.0, 0.3, 0.05, 0.15, 0.4):
        process = drive()
        wait_for(lambda p=process: Path("log").exists() or p.poll() is not None)
        time.sleep(delay)
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        log()
    process = drive()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert kills > 2
    by_key = {(r["method"], r["seed"]): r for r in lines()}
    assert lasting(list(by_key.values())) == lasting(lines("calm"))
    assert len(lines()) == len(by_key)  # no cell was recorded twice
    for name in ("table.md", "table.tex"):
        text = (Path("out") / name).read_text(), (Path("calm") / name).read_text()
        assert text[0].split("Peak")[0] == text[1].split("Peak")[0]


def test_a_cell_that_outlives_its_compare_is_waited_for() -> None:
    Path("wait").touch()
    process = drive(methods={"mezo": {}}, seeds=(0,))
    wait_for(Path("log").exists)
    process.kill()
    process.communicate()
    second = drive(methods={"mezo": {}}, seeds=(0,))
    assert second.stderr is not None
    assert "another compare is at work in this folder: waiting" in second.stderr.readline()
    assert log() == ["mezo 0 - False"]
    Path("wait").unlink()
    _, err = second.communicate(timeout=60)
    assert second.returncode == 0, err
    assert log() == ["mezo 0 - True"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_lets_the_cell_end_by_itself(number: signal.Signals) -> None:
    Path("wait").touch()
    Path("interruptible").touch()
    process = drive()
    wait_for(Path("log").exists)
    time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert log() == ["zero-shot 0 - False", "interrupted"]
    assert "0 of 3 cells have a result" in Path("out/index.html").read_text()
    Path("wait").unlink()
    assert run()["ok"] == 3


def test_jobs_run_side_by_side_and_come_to_the_same() -> None:
    search = {"mezo": {"lr": [0.001, 0.01, 0.1]}}
    run(out="calm", search=search)
    log()
    # each of these cells waits for another: one after the other they would wait for ever
    meet = "open(f'here-{kind}-{seed}-{lr:g}', 'w').close()\nimport glob\n"
    meet += "while len(glob.glob('here-*')) < 2: time.sleep(0.01)\n"
    Path("fake.py").write_text(FAKE.replace("run = given", meet + "run = given"))
    stream = io.StringIO()
    result = run(stream, search=search, jobs=3)
    assert result["ok"] == 3
    began = [line.split()[0] for line in log()]
    assert sorted(began) == ["mezo"] * 5 + ["zero-shot"]

    def ordered(out: str) -> list[dict[str, Any]]:
        return sorted(
            lasting(lines(out)), key=lambda r: json.dumps([r["method"], r["seed"], r["trial"]])
        )

    assert ordered("out") == ordered("calm")
    assert [r["trial"] for r in lines()][
        -1
    ] is None  # the chosen value was run once its trials had ended
    assert "zero-shot seed 0: accuracy" in stream.getvalue()
    assert run(search=search, jobs=2)["ok"] == 3
    assert log() == []


def test_jobs_all_end_by_themselves_on_ctrl_c() -> None:
    Path("wait").touch()
    Path("interruptible").touch()
    process = drive(methods={"mezo": {}}, jobs=2)
    wait_for(lambda: Path("log").exists() and Path("log").read_text().count("\n") == 2)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert log()[2:] == ["interrupted"] * 2
    Path("wait").unlink()
    assert run(methods={"mezo": {}}, jobs=2)["ok"] == 2


def test_a_full_disk_ends_the_jobs_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("interruptible").touch()
    slow = "while kind == 'mezo' and not os.path.exists('go'): time.sleep(0.01)\n"
    Path("fake.py").write_text(FAKE.replace("run = given", slow + "run = given"))

    def full(self: Any, record: Any) -> None:
        raise UserError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(records.GridFolder, "append", full)
        with pytest.raises(UserError, match="no space left"):
            run(jobs=2)
    Path("go").touch()
    assert run(jobs=2)["ok"] == 3


def test_peak_memory_is_the_cells_own() -> None:
    code = "x = bytearray(int(given['tune']) << 20)\n"
    Path("fake.py").write_text(FAKE.replace("run = given", code + "run = given"))
    process = drive(methods={"mezo-a": {"tune": "150"}, "mezo-b": {"tune": "300"}}, seeds=(0,))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    small, large = (r["peak_bytes"] / 2**20 for r in lines())
    assert 150 < small < 190
    assert small + 145 < large < small + 155


def test_live_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    Path("wait").touch()
    board = Board(stream, live=True)
    with board:
        monkeypatch.setenv("TERM", "xterm")
        board.begin("[1/1] a cell", Path("said"), lambda spent: 75.0 - sum(spent))
        Path("said").write_text("loading\nforwards 20/400  loss 0.69\n")
        board.tick(Path("said"))
        board.end(Path("said"), "accuracy 80.0%")
    text = stream.getvalue()
    assert "forwards 20/400  loss 0.69" in text
    assert "1:15 left" in text
    assert "[1/1] a cell: accuracy 80.0%, 0:00; about 1:15 left\n" in text


# ---------------------------------------------------------------------------------- the command line


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(compare_module, "machine_now", lambda: MACHINE)
    monkeypatch.setattr(compare_module, "launcher", lambda: (sys.executable, "-S", "fake.py"))
    monkeypatch.setattr(compare_module.compare, "__defaults__", (None, None, None, lambda: MACHINE))
    Path("compare.yaml").write_text(
        "model: m\ntasks: {sst2: {data: data}}\nmethods:\n  mezo: {lr: 1e-3}\n  icl:\nseeds: [3, 4]\n"
    )
    argv = ["compare", "--config", "compare.yaml", "--out", "out"]
    Path("bad").write_text("mezo-4=nan")
    assert cli.main([*argv, "--json"]) == 2  # one cell has failed
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["failed"][0]["seed"] == 4
    assert "[1/4] sst2 mezo seed 3: accuracy" in err
    Path("bad").unlink()
    assert cli.main([*argv, "--cell-minutes", "5"]) == 0
    out, _ = capsys.readouterr()
    assert "4 of 4 cells have a result; the page: out/index.html" in out
    assert [r["options"].get("lr") for r in lines()] == [0.001, 0.001, None, None, 0.001]

    tasks, methods = "{rte: {data: data}}", "{mezo: }"
    whole = ["compare", "--model=m", f"--tasks={tasks}", f"--methods={methods}", "--out=other"]
    assert cli.main([*whole, "--seeds=[1,2]", "--search={mezo: {lr: [1e-2, 1e-3]}}"]) == 0
    assert len(lines("other")) == 4
    for bad, said in (
        ("--seeds=1", "is not a list such as [0, 1, 2]"),
        ("--methods=mezo", "mapping"),
    ):
        capsys.readouterr()
        assert cli.main([*whole, bad]) == 2
        assert said in capsys.readouterr().err

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compare_module, "compare", interrupted)
    assert cli.main(argv) == 130
    assert capsys.readouterr().err == (
        "stopped: go on with: justforward compare --config out/compare.yaml --out out\n"
    )


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux tells a process of its parent's death"
)
def test_a_cell_dies_with_its_compare() -> None:
    code = (
        "import subprocess, sys\nfrom justforward.cells import launcher\n"
        "start = launcher()\n"
        "boot = start[2].replace('from justforward.cli import entry', 'import time; print(1, flush=True)')\n"
        "boot = boot.replace('entry()', 'time.sleep(60)')\n"
        "child = subprocess.Popen([*start[:2], boot], stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\nprint(child.pid, flush=True)\nchild.wait()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()

    def gone() -> bool:
        try:
            state = Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        return state == "Z"

    wait_for(gone, 10.0)


def test_cells_of_our_own_command_line_one_of_them_killed(
    model_folder: Path, sentiment_csv: Path, here: Path
) -> None:
    """The real thing: killed in the middle of a run, the figures are those of a run that was left alone."""
    films = {
        "data": str(sentiment_csv),
        "template": "{text} It was",
        "labels": "neg=great,pos=terrible",
    }
    mezo = {
        "max_forwards": 240,
        "eval_every": 60,
        "lr": 1e-3,
        "estimator": "weight",
        "start": "base",
        "patience": 0,
    }
    given: dict[str, Any] = {
        "model": str(model_folder),
        "tasks": {"films": films},
        "methods": {"zero-shot": {}, "mezo": mezo},
        "seeds": [0],
        "threads": 1,
    }
    process = drive(fake=False, **given)
    metrics = here / "out/cells/films/mezo/0/run/metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > 30)
    process.kill()
    process.communicate()
    assert [r["method"] for r in lines()] == ["zero-shot"]

    Path("compare.yaml").write_text(yaml.safe_dump(given))
    command = [sys.executable, "-m", "justforward", "compare", "--config=compare.yaml", "--out=out"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"] == 2
    zero_shot, tuned = lines()
    assert tuned["resumed"] is True
    assert tuned["peak_bytes"] > 100 * 2**20

    alone = train(
        TrainConfig(model=str(model_folder), out="alone", threads=1, **films, **mezo),  # type: ignore[arg-type]
        Progress(io.StringIO()),
    )
    assert (tuned["value"], tuned["loss"]) == (alone["accuracy"], alone["loss"])
    assert tuned["validation_value"] == alone["validation_accuracy"]
    assert [point[0] for point in tuned["curve"]] == [0, 60, 120, 180, 240]
    # Of two processes, one of them this one: on some machines their logs differ where the figures do not. A step that is
    # lost, taken twice or with other rows is another number.
    ours, theirs = (
        read_log(Path(at) / "trajectory.jfl") for at in ("alone", "out/cells/films/mezo/0/run")
    )
    assert theirs.header == ours.header
    assert len(theirs.steps) == len(ours.steps) == 120
    moves = np.array([[step.coefficients for step in log.steps] for log in (ours, theirs)])
    np.testing.assert_allclose(moves[1], moves[0], rtol=0, atol=np.abs(moves).max() / 100)
    assert zero_shot["value"] == alone["before_accuracy"]
    assert zero_shot["rows"] == tuned["rows"]
