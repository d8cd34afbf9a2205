"""What comes before a run: checks against the model, the split, the machine, the signals."""

from __future__ import annotations

import contextlib
import math
import platform
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import justforward
from justforward.catalog import load
from justforward.config import WORKERS, TrainConfig
from justforward.data import Example, Splits, read_examples, split_examples
from justforward.directions import FAMILIES
from justforward.errors import UserError
from justforward.folder import Metric, RunFolder, best_step, data_hash, validated, value_of
from justforward.groups import ESTIMATORS
from justforward.guard import is_flat, turned
from justforward.hub import HUB, downloaded
from justforward.playback import fingerprint
from justforward.published import TEST_SIZE, Published, deal, read_published
from justforward.quantised import library_version
from justforward.schedules import forwards_at, was_due
from justforward.settings import task_of
from justforward.tasks import Task
from justforward.trajectory import Log, read_log

MOST_TEST, MOST_VALIDATION = 400, 200


def check_names(config: TrainConfig) -> None:
    """Refuse an unknown estimator or family, and a place for weights that is none.

    Raises:
        UserError: naming those that there are.
    """
    if config.offload is not None and not Path(config.offload).is_dir():
        raise UserError(
            f"--offload is {config.offload!r}: no such folder: make it, on a local disk"
        )
    for option, value, known in (
        ("estimator", config.estimator, ESTIMATORS),
        ("family", config.family or "gaussian", FAMILIES),
    ):
        if value not in known:
            raise UserError(f"--{option} is {value!r}: it must be one of {', '.join(known)}")


def use_threads(threads: int | None) -> None:
    """Let torch (and the kernels, which follow it) use so many CPU threads."""
    if threads is not None:
        torch.set_num_threads(threads)


def check_there(folder: RunFolder, data: str) -> None:
    """Refuse to go on without a run's rows, which nobody has named now.

    Args:
        folder: of the run.
        data: as its configuration has it.

    Raises:
        UserError: there is no such file or folder.
    """
    path = Path(data)
    if data in (HUB, WORKERS) or path.exists():
        return
    here = "" if path.is_absolute() else " here, and the path is from where train was started"
    raise UserError(
        f"{folder.path}: the run's rows are {data!r}: no such file{here}: give --data with where they are"
    )


def read_data(
    name: str | None, data: str, task: Task, notify: Callable[[str], None] | None = None
) -> tuple[list[Example] | Published, str]:
    """The rows of a file, or of a declared task's folder; and their digest.

    Args:
        name: of a declared task.
        data: the file or folder; "hub" for the folder of what is downloaded.
        task: what is read.
        notify: called with a sentence before a download.

    Raises:
        UserError: as `read_examples`, `read_published` and `downloaded`.
    """
    if data == HUB and name is None:
        raise UserError(
            f"--data is {HUB!r}: it is for the rows of a --task: give that too, or ./{HUB} for a file of this name"
        )
    if name is not None:
        declared = load(name)
        folder = downloaded(declared, notify) if data == HUB else data
        found = read_published(declared, folder, task)
        return found, found.digest
    digest = data_hash(data) if Path(data).is_file() else ""
    return read_examples(data, task), digest  # says best what is wrong with the file


def split_rows(
    config: TrainConfig, examples: list[Example] | Published
) -> tuple[TrainConfig, Splits]:
    """Deal the rows as the configuration says; sizes left open are filled in.

    Raises:
        UserError: as `split_examples` and `deal`.
    """
    if isinstance(examples, Published):
        config = replace(config, test_size=config.test_size or TEST_SIZE)
        assert config.split_seed is not None
        assert config.test_size is not None
        return config, deal(
            examples,
            seed=config.split_seed,
            test_size=config.test_size,
            validation_size=config.validation_size,
            train_size=config.train_size,
            shots=config.shots,
        )
    least = 2 * len(task_of(config).labels)
    test, validation = config.test_size, config.validation_size
    config = replace(
        config,
        test_size=min(MOST_TEST, max(least, len(examples) // 5)) if test is None else test,
        validation_size=min(MOST_VALIDATION, max(least, len(examples) // 10))
        if validation is None
        else validation,
    )
    assert config.split_seed is not None
    assert config.test_size is not None
    assert config.validation_size is not None
    splits = split_examples(
        examples,
        seed=config.split_seed,
        test_size=config.test_size,
        validation_size=config.validation_size,
        train_size=config.train_size,
    )
    return config, splits


def choose_tuned(model: torch.nn.Module, pattern: str | None) -> None:
    """Freeze the parameters whose name the pattern does not find; what is frozen already stays so.

    Raises:
        UserError: it finds none, or all are frozen.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not names:
        raise UserError(
            f"{type(model).__name__}: all its parameters are frozen, so there is nothing to tune: "
            "set requires_grad on those that are to be tuned"
        )
    tuned = {name for name in names if pattern is None or re.search(pattern, name)}
    if not tuned:
        raise UserError(
            f"--tune is {pattern!r}: it finds none of the {len(names)} parameters, such as {names[0]!r}"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in tuned)


def judged(
    config: TrainConfig, metrics: Iterable[Metric], steps: int, parts: int = 1
) -> list[tuple[float, float]]:
    """Value and loss of each validation up to a step that was due, in order; those that were taken back as worse than any number."""
    found: list[tuple[float, float]] = []
    for metric in metrics:
        if metric["kind"] == "rewind":
            found += [(-math.inf, math.inf)] * turned(metric)
        if (
            metric["kind"] == "layers" and found
        ):  # others move: a new beginning, from the best so far
            found = [max(found, key=lambda pair: (pair[0], -pair[1]))]
        found += [
            (value_of(m), float(m["loss"]))
            for m in validated([metric], steps)
            if was_due(config, m, parts)
        ]
    return found


def stop_reason(
    config: TrainConfig,
    steps: int,
    forwards: int,
    seconds: float,
    metrics: list[Metric],
    parts: int = 1,
) -> str | None:
    """The limit that ends the run here: after so many steps, forwards and seconds, by the run's lines, with so many parameter groups."""
    best = best_step(metrics, steps)
    goal = config.target_accuracy
    if goal is not None and best is not None and value_of(best) >= goal:
        return "target_accuracy"
    if forwards + forwards_at(config, steps, parts) > config.max_forwards:
        return "max_forwards"
    if config.max_minutes is not None and seconds >= 60.0 * config.max_minutes:
        return "max_minutes"
    if config.patience and is_flat(judged(config, metrics, steps, parts), config.patience):
        return "flat"
    return None


def environment_now(quantize: str | None = None, private: bool = False) -> dict[str, Any]:
    """What may change the last bits of a loss; no names of hosts, users or folders."""
    packages = ("torch", "numpy", "numba", "transformers", "tokenizers", "safetensors", "peft")
    return {
        "versions": {
            "justforward": justforward.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
            **library_version(quantize),
            **({"dp-accounting": version("dp-accounting")} if private else {}),
        },
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
    }


def keep_environment(folder: RunFolder, config: TrainConfig, data_sha256: str) -> None:
    """Write what a run was begun with: `environment_now`, and which base and rows."""
    folder.write_environment(
        {
            **environment_now(config.quantize, config.private),
            "base_fingerprint": read_log(folder.log).header["base"],
            "data_sha256": data_sha256,
        }
    )


def check_model(model: torch.nn.Module, name: str, log: Log, folder: RunFolder) -> None:
    """Refuse to go on with another model.

    Raises:
        UserError: it is not the log's base.
    """
    base = fingerprint(model)
    if base != log.header["base"]:
        raise UserError(
            f"{folder.path}: --model is {name!r}, whose fingerprint is {base[:12]}; the run "
            f"was started from {log.header['base'][:12]}: give that model"
        )


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        if match:
            return match[1].strip()
    return platform.processor() or "unknown"


class Stop:
    """Whether a signal has asked to stop where no exception could be raised for it."""

    def __init__(self) -> None:
        self.asked = False

    def check(self) -> None:
        if self.asked:
            raise KeyboardInterrupt


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """SIGTERM does what Ctrl-C does, at the moments when `Shield` lets Ctrl-C through.

    Where SIGINT is ignored, as for a job in the background of a script, it is heard between steps.
    """
    stop = Stop()

    def terminate(number: int, frame: Any) -> None:
        if callable(signal.getsignal(signal.SIGINT)):
            signal.raise_signal(signal.SIGINT)
        else:
            stop.asked = True

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, previous)
