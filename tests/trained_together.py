"""Trainings that `test_trainer` has several processes take through together. Each returns what is to be the same in all."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import justforward as jf
from conftest import make_model
from justforward.errors import UserError
from justforward.trainer import MeZOConfig, MeZOTrainer

Rows = list[dict[str, Any]]
ROWS = 16


def texts(count: int) -> Rows:
    """Rows with unlike numbers of labels."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(count):
        ids = torch.randint(5, 60, (10,), generator=generator)
        labels = ids.clone()
        labels[: 1 + i % 7] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def trainer(out: Path, rows: Rows, **changes: Any) -> MeZOTrainer:
    given: dict[str, Any] = {
        "output_dir": str(out),
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
    }
    more = {"eval_dataset": changes.pop("evaluated", None)}
    return MeZOTrainer(
        changes.pop("model", None) or make_model("llama"),
        MeZOConfig(**{**given, **changes}),
        train_dataset=rows,
        **more,
    )


def join() -> None:
    """Say what torchrun says."""
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")


def shown(found: MeZOTrainer, key: str) -> list[float]:
    return [line[key] for line in found.state.log_history if key in line]


def run(out: Path, rows: Rows, **changes: Any) -> tuple[str, list[float]]:
    found = trainer(out, rows, **changes)
    found.train()
    return jf.fingerprint(found.model), shown(found, "loss")


def all_of_it(folder: Path) -> dict[str, Any]:
    join()
    found: dict[str, Any] = {}
    rows = texts(ROWS)
    found["weight"] = run(folder / "weight", rows, gradient_accumulation_steps=2)
    print("weight", found, flush=True)
    found["activation"] = run(folder / "activation", rows, estimator="activation")
    print("act", found["activation"], flush=True)
    return found
