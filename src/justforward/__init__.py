"""Fine-tuning language models with forward passes only. Start at `MeZO`; `reference` is the paper's algorithm."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from justforward import noise
    from justforward.accounting import epsilon_of, noise_for
    from justforward.errors import NonFiniteLoss, UserError
    from justforward.optim import MeZO
    from justforward.playback import fingerprint, replay
    from justforward.private import Private
    from justforward.sights import Sight
    from justforward.trainer import MeZOSeq2SeqTrainer, MeZOTrainer
    from justforward.training_arguments import MeZOConfig, MeZOSeq2SeqConfig
    from justforward.trajectory import Log, Step, read_log, verify
    from justforward.variants import Blocks, Modified, linear_samples
    from justforward.workers import Workers

__version__ = "0.1.0"

__all__ = [
    "Blocks",
    "Log",
    "MeZO",
    "MeZOConfig",
    "MeZOSeq2SeqConfig",
    "MeZOSeq2SeqTrainer",
    "MeZOTrainer",
    "Modified",
    "NonFiniteLoss",
    "Private",
    "Sight",
    "Step",
    "UserError",
    "Workers",
    "epsilon_of",
    "fingerprint",
    "linear_samples",
    "noise",
    "noise_for",
    "read_log",
    "replay",
    "verify",
]

# Imported on first use: the command line answers --help without waiting for torch.
_HOMES = {
    "Blocks": "variants",
    "Log": "trajectory",
    "MeZO": "optim",
    "MeZOConfig": "training_arguments",
    "MeZOSeq2SeqConfig": "training_arguments",
    "MeZOSeq2SeqTrainer": "trainer",
    "MeZOTrainer": "trainer",
    "Modified": "variants",
    "NonFiniteLoss": "errors",
    "Private": "private",
    "Sight": "sights",
    "Step": "trajectory",
    "UserError": "errors",
    "Workers": "workers",
    "epsilon_of": "accounting",
    "fingerprint": "playback",
    "linear_samples": "variants",
    "noise_for": "accounting",
    "read_log": "trajectory",
    "replay": "playback",
    "verify": "trajectory",
}


def __getattr__(name: str) -> Any:
    if name == "noise":
        return importlib.import_module("justforward.noise")
    if name in _HOMES:
        return getattr(importlib.import_module(f"justforward.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'justforward' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
