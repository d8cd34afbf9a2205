"""The examples that need no packaged model run, in a small form."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

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
