"""Steps taken together: the same bits for any number of workers; one that differs, fails, dies or hangs is named.

Every process has the same tiny model; what each returns is compared.
"""

from __future__ import annotations

import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import together
from torch import Tensor, nn

import justforward as jf
from justforward.workers import Workers

ROWS = 7
VARIANTS: list[dict[str, Any]] = [
    {"rule": "rms", "num_samples": 2},
    {"rule": "adam(window=3)", "num_samples": 2, "looks": "one-sided"},
    {"rule": "sgd+momentum(0.9, window=2)", "estimator": "activation"},
    {"rule": "rms", "estimator": "activation", "num_samples": 3},
]
IDS = ["weight", "one-sided adam", "activation", "activation samples"]


def model(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 300), nn.Tanh(), nn.Linear(300, 3))


def batch(step: int, rows: int = ROWS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(rows, 5, generator=generator)
    return {"x": x, "y": x.argmax(1) % 3}


def losses(net: nn.Module) -> Any:
    return lambda rows: F.cross_entropy(net(rows["x"]), rows["y"], reduction="none")


def run(
    variant: dict[str, Any],
    steps: int = 4,
    log: Path | None = None,
    own: bool = False,
    **arguments: Any,
) -> tuple[str, str, int, bytes]:
    """Fingerprint of model and course after so many steps; the log is worker 0's."""
    net = model()
    rank = dist.get_rank() if dist.is_initialized() else 0
    mine = log if rank == 0 else None
    opt = jf.MeZO(net, lr=1e-2, eps=1e-3, seed=3, log=mine, resume=True, **variant)
    workers = Workers(opt, **arguments)
    for step in range(opt.steps, steps):
        if own:
            part = workers.rows(ROWS)
            rows = {name: x[part.start : part.stop] for name, x in batch(step).items()}
            workers.step(losses(net), rows, of=ROWS)
        else:
            workers.step(losses(net), batch(step))
    workers.close()
    state = opt.state_dict()["justforward"]
    course = str((state["steps"], state["rule_state"], state["scales"], state["past"]))
    return jf.fingerprint(net), course, opt.steps, b"" if mine is None else mine.read_bytes()


def everything(rows_at_once: int) -> list[Any]:
    """All variants, in the group at hand or alone."""
    return [run(variant, rows_at_once=rows_at_once)[:3] for variant in VARIANTS]


@pytest.mark.parametrize("rows_at_once", [1, 2])
def test_two_workers_have_the_bits_of_one(tmp_path: Path, rows_at_once: int) -> None:
    alone = everything(rows_at_once)
    assert len({fingerprint for fingerprint, *_ in alone}) == len(VARIANTS)
    assert together(2, tmp_path, everything, rows_at_once) == [alone, alone]


@pytest.mark.slow
@pytest.mark.parametrize("size", [3, 4, 9])
def test_any_number_of_workers_has_the_bits_of_one(tmp_path: Path, size: int) -> None:
    """Nine are more than there are rows: some have nothing to do."""
    assert together(size, tmp_path, everything, 1) == [everything(1)] * size
