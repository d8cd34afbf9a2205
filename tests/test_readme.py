"""What the README shows runs as it stands there."""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conftest import make_model

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_loop_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = make_model("llama")
    ids = torch.arange(24).view(2, 12) % 97
    names: dict[str, Any] = {
        "model": model,
        "base": deepcopy(model),
        "loader": [{"input_ids": ids, "labels": ids}] * 3,
    }
    exec(BLOCKS[0], names)  # noqa: S102 - our own README
    assert (tmp_path / "run.jfl").stat().st_size < 2000
    assert names["opt"].steps == 3
    before = names["jf"].fingerprint(model)

    def losses_of_rows(batch: Any) -> Tensor:
        logits = model(input_ids=batch["ids"]).logits[:, -1]
        return F.cross_entropy(logits, batch["answer"], reduction="none")

    names["losses_of_rows"] = losses_of_rows
    names["batch"] = {"ids": ids, "answer": ids[:, 0]}
    exec(BLOCKS[1], names)  # noqa: S102
    assert names["loss"] > 0
    assert names["jf"].fingerprint(model) != before


def test_the_file_map_is_of_files_that_are_there() -> None:
    table = README.split("## Where things are")[1]
    named = re.findall(r"`([\w/]+\.py)`", table)
    assert len(named) > 15
    for name in named:
        assert (ROOT / "src" / "justforward" / name).exists() or (ROOT / name).exists(), name
    rooms = {p.name for p in (ROOT / "src" / "justforward").glob("*.py")} - {
        "__init__.py",
        "__main__.py",
    }
    assert rooms <= {Path(name).name for name in named}, "a file is missing from the file map"


def test_the_commands_of_the_readme_are_targets() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"^make (\w+)", README, re.M)) <= targets
