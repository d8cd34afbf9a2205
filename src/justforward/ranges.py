"""What each setting may be: types, ranges and choices of the dataclasses in `config`. No torch in here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any, get_args, get_origin, get_type_hints

from justforward.errors import UserError
from justforward.variants import LEAST_NOISE, MOST_NOISE


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _not_negative(value: float) -> bool:
    return math.isfinite(value) and value >= 0


def _share(value: float) -> bool:
    return 0 < value <= 1


def _size(value: float) -> bool:
    return value >= 1 if isinstance(value, int) else 0 < value < 1


def _seed(value: float) -> bool:
    return 0 <= value < 2**64


_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "lr": (_positive, "positive and finite"),
    "eps": (lambda value: 0 < value <= 100, "positive and at most 100"),
    "cache_gb": (_not_negative, "finite and at least 0"),
    "weight_decay": (_not_negative, "finite and at least 0"),
    "temperature": (_not_negative, "finite and at least 0"),
    "lora_alpha": (_positive, "positive and finite"),
    "sync": (_not_negative, "step, end, or seconds, finite and at least 0"),
    "max_minutes": (_positive, "positive and finite"),
    "target_epsilon": (_positive, "positive and finite"),
    "target_delta": (lambda value: 0 < value < 1, "between 0 and 1"),
    "noise_multiplier": (
        lambda value: LEAST_NOISE <= value <= MOST_NOISE,
        f"{LEAST_NOISE} to 1e6: less protects nobody",
    ),
    "clip": (lambda value: 1e-30 <= value <= 1e30, "positive, 1e-30 to 1e30"),
    "layers": (_share, "above 0 and at most 1"),
    "patience": (lambda value: value >= 0, "at least 0"),
    "gauge": (lambda value: 0 <= value <= 1000, "from 0 to 1000"),
    "port": (lambda value: 0 <= value < 2**16, "from 0 to 65535"),
    "deadline": (_positive, "positive and finite"),
    "deviations": (_not_negative, "finite and at least 0"),
    "wait": (_not_negative, "finite and at least 0"),
    "most_workers": (lambda value: 1 <= value <= 1000, "from 1 to 1000"),
    "target_accuracy": (_share, "above 0 and at most 1"),
    "seed": (_seed, "at least 0 and below 2^64"),
    "split_seed": (_seed, "at least 0 and below 2^64"),
    "test_size": (_size, "a number of rows from 1, or a fraction between 0 and 1"),
    "validation_size": (_size, "a number of rows from 1, or a fraction between 0 and 1"),
    **{
        name: (lambda value: value >= 2, "at least 2")
        for name in ("probes", "iterations", "directions")
    },
    **{
        name: (lambda value: value >= 1, "at least 1")
        for name in (
            "num_samples",
            "probe_rows",
            "batch_size",
            "rows_at_once",
            "max_forwards",
            "max_steps",
            "demonstrations",
            "draws",
            "eval_every",
            "eval_batch_size",
            "train_size",
            "shots",
            "max_length",
            "length",
            "lora_rank",
            "prefix_length",
            "prompt_length",
            "threads",
            "jobs",
            "last",
            "rows",
            "step_rows",
            "snapshot_every",
            "keep_snapshots",
            "workers",
            "part",
            "hash_every",
        )
    },
}


def check_ranges(config: Any) -> None:
    """Types, ranges and choices of all plain values of a configuration.

    Raises:
        UserError: naming the option, its value and what it may be.
    """
    hints = get_type_hints(type(config))
    for field in fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        kinds = get_args(hint) or (hint,)
        option = "--" + field.name.replace("_", "-")
        if value is None and type(None) not in kinds:
            raise UserError(f"{option} is empty: it must be given a value")
        choices = [
            choice for kind in (hint, *kinds) for choice in get_args(kind) if kind is not dict
        ]
        choices = [choice for choice in choices if isinstance(choice, str)]
        number = int in kinds or float in kinds
        if isinstance(value, str) and value in choices:
            continue
        if choices and value is not None and not number:
            raise UserError(f"{option} is {value!r}: it must be one of {', '.join(choices)}")
        mapping = isinstance(value, dict) and any(get_origin(kind) is dict for kind in kinds)
        if str in kinds and value is not None and not (mapping or isinstance(value, str)):
            raise UserError(f"{option} is {value!r}: it must be a text")
        if number and value is not None:
            whole = float not in kinds
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                what = (
                    "a whole number"
                    if whole
                    else ", ".join((*choices, "or a number" if choices else "a number"))
                )
                raise UserError(f"{option} is {value!r}: it must be {what}")
            if field.name in _RANGES:
                good, allowed = _RANGES[field.name]
                if not good(value):
                    raise UserError(f"{option} is {value!r}: it must be {allowed}")
