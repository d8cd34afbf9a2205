"""The examples that need no packaged model run, in a small form."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import justforward as jf
from conftest import CORPUS
from justforward import catalog
from justforward.config import CompareConfig
from justforward.grid import plan

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_anything(capsys: pytest.CaptureFixture[str]) -> None:
    """A tenth of the steps: chance before, well above it after."""
    before, after = load("anything").main(["--steps", "300"])
    assert 0.0 <= before < 0.25
    assert after > before + 0.1
    said = capsys.readouterr().out.splitlines()
    assert said[-2] == f"held-out accuracy: {before:.1%} before, {after:.1%} after 300 steps"
    assert said[-1].startswith("black box: 6.00 before, ")
    assert float(said[-1].split()[-2]) < 5.0


def test_workers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By one process, which needs no torchrun; it goes on from its log."""
    main = load("workers").main
    whole = main(["--steps", "30", str(tmp_path / "whole.jfl")])
    main(["--steps", "10", str(tmp_path / "parts.jfl")])
    assert main(["--steps", "30", str(tmp_path / "parts.jfl")]) == whole
    assert whole[0] > 0.15
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"held-out accuracy {whole[0]:.1%} after 30 steps, workers: 1"


def test_comparisons_and_declarations() -> None:
    """What the command would read of the YAML files; test_compare runs others like them."""
    values = yaml.safe_load((EXAMPLES / "compare.yaml").read_text())
    grid = plan(CompareConfig(**values, out="out"), str(EXAMPLES / "compare.yaml"))
    assert len(grid.cells) == 6 + 3 * 32  # zero-shot has nothing to draw
    declared = catalog.load(str(EXAMPLES / "f1.yaml"))
    assert (declared.metrics, declared.positive) == (("f1",), "negative")
    known = catalog.load("sst2")
    assert replace(declared, name="sst2", title=known.title, where=known.where, metrics=known.metrics, positive=None) == known  # fmt: skip


# ------------------------------------------------------------------------------------ in other loops

TRAINER = EXAMPLES / "trainer"
LOOPS = ("plain_loop", "with_accelerate", "with_lightning")


def after() -> str:
    """`before.py` with the diff applied: each line that goes stands there once."""
    text = (TRAINER / "before.py").read_text(encoding="utf-8")
    lines = (TRAINER / "trainer.diff").read_text(encoding="utf-8").splitlines()[2:]
    gone = [line[1:] + "\n" for line in lines if line.startswith("-")]
    come = [line[1:] + "\n" for line in lines if line.startswith("+")]
    assert 0 < len(gone) == len(come) <= 3
    for old, new in zip(gone, come, strict=True):
        assert text.count(old) == 1
        text = text.replace(old, new)
    return text


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(CORPUS), encoding="utf-8")
    return path


def start(script: Path | str, *arguments: Any) -> subprocess.Popen[str]:
    """A script as a process that warnings end, and that Ctrl-C reaches."""
    return subprocess.Popen(
        [sys.executable, str(script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "default"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def run(script: Path | str, *arguments: Any) -> str:
    process = start(script, *arguments)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


@pytest.mark.slow
def test_a_trainer_script_with_the_diff_is_interrupted_and_resumed(
    tmp_path: Path, model_folder: Path, lines: Path
) -> None:
    """By a real signal at some moment after the first checkpoint; the files are those of an undisturbed run."""
    script = tmp_path / "after.py"
    script.write_text(after(), encoding="utf-8")
    given = ("--model", model_folder, "--data", lines, "--steps", 60, "--save-steps", 20)
    run(script, *given, "--out", tmp_path / "whole")

    process = start(script, *given, "--out", tmp_path / "cut")
    while not (tmp_path / "cut" / "checkpoint-20" / "trainer_state.json").is_file():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=300)
    if process.returncode == 0:
        pytest.skip("it was over before the signal came")
    assert "KeyboardInterrupt" in said
    run(script, *given, "--out", tmp_path / "cut", "--resume")

    whole, cut = (tmp_path / name / "final" / "model.safetensors" for name in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(model_folder)
    assert jf.replay(base, tmp_path / "cut" / "trajectory.jfl") == 60
    tuned: Any = AutoModelForCausalLM.from_pretrained(cut.parent)
    assert jf.fingerprint(base) == jf.fingerprint(tuned)


@pytest.mark.parametrize("kind", [pytest.param("before", marks=pytest.mark.slow), "after"])
def test_the_script_with_and_without_the_diff(
    tmp_path: Path, model_folder: Path, lines: Path, kind: str
) -> None:
    script = TRAINER / "before.py"
    if kind == "after":
        script = tmp_path / "after.py"
        script.write_text(after(), encoding="utf-8")
    run(script, "--model", model_folder, "--data", lines, "--steps", 2, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "final" / "model.safetensors").is_file()
    assert (tmp_path / "out" / "trajectory.jfl").is_file() == (kind == "after")


def test_a_trainer_script_with_the_diff_is_started_by_torchrun(
    tmp_path: Path, model_folder: Path, lines: Path
) -> None:
    """Two processes, one log; what they have trained is the model that is saved. Without --cpu they would not see each other."""
    script, out = tmp_path / "after.py", tmp_path / "out"
    script.write_text(after(), encoding="utf-8")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script)
    given = ("--model", model_folder, "--data", lines, "--out", out, "--steps", 3)
    run(*launch, "--cpu", "--save-steps", 2, *given)
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(model_folder)
    tuned: Any = AutoModelForCausalLM.from_pretrained(out / "final")
    assert [path.name for path in out.glob("*.jfl")] == ["trajectory.jfl"]
    assert jf.replay(base, out / "trajectory.jfl") == 3
    assert jf.fingerprint(base) == jf.fingerprint(tuned)
    assert (out / "checkpoint-2" / "rng_state_1.pth").is_file()


@pytest.mark.parametrize("name", LOOPS)
def test_other_loops(tmp_path: Path, model_folder: Path, lines: Path, name: str) -> None:
    if name == "with_lightning":
        pytest.importorskip("lightning")
    log = tmp_path / "run.jfl"
    run(TRAINER / f"{name}.py", model_folder, lines, log)
    found = jf.read_log(log)
    assert found.sealed
    assert len(found.steps) == 3  # 20 lines, 8 a step


@pytest.mark.parametrize("name", LOOPS)
def test_other_loops_are_short(name: str) -> None:
    assert len((TRAINER / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 40
