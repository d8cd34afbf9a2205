"""A run on disk. Every file is whole at any moment, or its torn last line is recognised.

config.yaml       the resolved TrainConfig
environment.json  versions, machine, what base model and data were (by hash)
trajectory.jfl    the log: base + log = the tuned model (`trajectory`)
start.safetensors where tuning starts, with --tuner prefix or --start probe (`tuners`)
metrics.jsonl     one object a step (kind "step", or without a loss "private"), validation ("validation"; `keeping` says what it is told from chance by),
                  the test before ("before"), and steps
                  taken back ("rewind": `step` of `taken` were kept, `lost` forwards were in vain; `validations` of them
                  were taken back, where the last of these is the reason), and with --layers auto which layers move from there
                  on ("layers": the `part` with that number, at `rate` times the rate before; `spreads`: what looks saw; `lost`: their forwards)
seen.txt          a hash of each row trained or validated on, for `eval --run` on another file
result.json       the outcome, rewritten whenever a session ends
snapshots/        weights after some steps, with --snapshot-every (`snapshots`)
.lock             held by the session at work
plot.png          loss and accuracy against forwards
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import fields
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import IO, Any

import yaml

from justforward.config import NOT_KEPT, TrainConfig
from justforward.data import Example
from justforward.durable import Pace, claim, sync_folder
from justforward.errors import UserError
from justforward.ranges import check_ranges
from justforward.settings import kept_values, labels_of

Metric = dict[str, Any]

# Numbers that each kind of line in metrics.jsonl holds, and what other files must hold to be of use.
_NUMBERS = {
    "step": ("loss", "lr"),
    "private": ("lr",),
    "validation": ("accuracy", "loss"),
    "before": ("accuracy", "loss"),
    "rewind": ("taken", "lost"),
    "layers": ("part", "rate", "lost"),
}
_ENVIRONMENT = {"data_sha256": str, "base_fingerprint": str, "versions": dict, "threads": int}
_RESULT = {"status": str, "stopped_by": str, "seconds": (int, float), "rows": dict}
_SCORES = ("accuracy", "loss", "before_accuracy", "before_loss", "kept_step", "validation_accuracy")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the system says about a file that cannot be written into one line."""
    try:
        yield
    except OSError as error:
        said = error.strerror or str(error)
        full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "make room" if error.errno in full else "make it writable"
        raise UserError(
            f"{path}: cannot be written: {said}: {advice} and try again (with --resume if the run folder exists)"
        ) from error


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace a file in one step: a reader finds the old content or the new one. Text is UTF-8.

    Raises:
        UserError: it cannot be written; the old file is as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        try:
            with temporary.open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def data_hash(path: str | Path) -> str:
    """sha256 of a file's bytes."""
    try:
        with Path(path).open("rb") as file:
            return file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def row_hash(example: Example) -> str:
    """64 bits over the texts of a row; case, white space and the names of columns do not count."""
    texts = sorted(" ".join(text.split()).casefold() for text in example.fields.values())
    return blake2b("\0".join(texts).encode(), digest_size=8).hexdigest()


def check_new(path: Path, hint: str) -> None:
    """Refuse what could not become a new folder, having written nothing.

    Raises:
        UserError: it exists, or the folder around it is not a writable folder.
    """
    if path.exists() or path.is_symlink():
        kind = "exists" if path.is_dir() else "exists and is not a folder"
        raise UserError(f"{path}: {kind}: {hint}")
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir():
        raise UserError(f"{path}: cannot be made: {parent} is a file: choose another --out")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{path}: cannot be made: {parent} is read-only: choose another --out")


class RunFolder:
    """The files of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.log = self.path / "trajectory.jfl"
        self.start = self.path / "start.safetensors"
        self.plot = self.path / "plot.png"
        self.snapshots = self.path / "snapshots"
        self._config = self.path / "config.yaml"
        self._environment = self.path / "environment.json"
        self._metrics = self.path / "metrics.jsonl"
        self._result = self.path / "result.json"
        self._seen = self.path / "seen.txt"
        self._locked = self.path / ".lock"
        self._lock: IO[bytes] | None = None
        self.pace = Pace()  # of metrics.jsonl
        self._made: list[Path] = []

    # ------------------------------------------------------------------------------------ making

    def make(self) -> None:
        """Make the folder (and those around it), and lock it.

        Raises:
            UserError: it exists or cannot be made.
        """
        missing = [p for p in (self.path, *self.path.parents) if not p.exists()]
        try:
            for folder in reversed(missing):
                folder.mkdir()
                self._made.append(folder)
                sync_folder(folder.parent)
            if not missing:
                raise FileExistsError(errno.EEXIST, "it exists")
        except OSError as error:
            self.unmake()
            raise UserError(
                f"{self.path}: cannot be made: {error.strerror}: choose another --out"
            ) from error
        try:
            self.lock()
        except BaseException:
            self.unmake()
            raise

    def unmake(self) -> None:
        """Take back `make`, with all that was written since; no-op on a folder that was there."""
        self.unlock()
        if self.path in self._made:
            shutil.rmtree(self.path, ignore_errors=True)
        for folder in reversed(self._made):
            with contextlib.suppress(OSError):  # another process may use it by now
                folder.rmdir()
        self._made.clear()

    def lock(self) -> None:
        """Keep a second session off the folder for as long as this process lives.

        Raises:
            UserError: another session is at work in it.
        """
        with writing(self._locked):
            # a file of its own, which nothing replaces: a rewind replaces the log
            self._lock = self._locked.open("ab")
        try:
            if claim(self._lock):
                return
        except OSError as error:
            self.unlock()
            raise UserError(
                f"{self.path}: cannot be locked: {error.strerror}: choose a folder on another file system"
            ) from error
        self.unlock()
        raise UserError(
            f"{self.path}: another train is at work in this folder: wait for it or stop it"
        )

    def unlock(self) -> None:
        """Let others in."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def tidy(self) -> None:
        """Remove what a kill has left half-written; whoever holds the lock may."""
        for left in (*self.path.glob(".*.*"), *self.snapshots.glob(".*")):
            with contextlib.suppress(OSError):  # it is in nobody's way
                if left.is_dir():
                    shutil.rmtree(left)
                else:
                    left.unlink()

    # ------------------------------------------------------------------- config and environment

    def check_run(self) -> None:
        """Refuse what is not a run folder.

        Raises:
            UserError: no such folder, or its config or log is missing.
        """
        if not self.path.is_dir():
            raise UserError(f"{self.path}: no such run folder: check the path")
        for file in (self._config, self._environment, self.log):
            if not file.is_file():
                raise UserError(
                    f"{self.path}: not a run folder: {file.name} is missing: check the path; what is left "
                    "of a train that was killed before its first step can only be removed"
                )

    def write_config(self, config: TrainConfig) -> None:
        """Write config.yaml."""
        values = yaml.safe_dump(kept_values(config), sort_keys=False, allow_unicode=True)
        write_whole(
            self._config, f"# justforward train --config {self._config.name} --out ...\n{values}"
        )

    def read_config(self) -> TrainConfig:
        """Read config.yaml.

        Raises:
            UserError: it is not what `write_config` writes.
        """
        try:
            values = yaml.safe_load(self._config.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            said = " ".join(str(error).split())
            raise UserError(f"{self._config}: cannot be read: {said}") from error
        names = {field.name for field in fields(TrainConfig)}
        unknown = sorted(set(values) - names) if isinstance(values, dict) else ["(not a mapping)"]
        if unknown:
            raise UserError(f"{self._config}: {unknown[0]!r} is no setting of train")
        try:
            config = TrainConfig(**{**values, "out": str(self.path)})
            check_ranges(config)
            if config.template is None or config.labels is None:
                raise UserError("incomplete: template or labels are missing")
            labels_of(config.labels)
        except TypeError as error:
            said = str(error).removeprefix("TrainConfig.__init__() ")
            raise UserError(f"{self._config}: incomplete: {said}") from error
        except UserError as error:
            raise UserError(f"{self._config}: {error}") from error
        lacking = sorted(names - set(values) - set(NOT_KEPT))
        if lacking:  # its default may not be what the run had
            raise UserError(f"{self._config}: incomplete: {lacking[0]} is missing: copy it again")
        return config

    def write_environment(self, environment: dict[str, Any]) -> None:
        """Write environment.json."""
        write_whole(self._environment, json.dumps(environment, indent=2) + "\n")

    def read_environment(self) -> dict[str, Any]:
        """Read environment.json."""
        return _read_object(self._environment, _ENVIRONMENT)

    # -------------------------------------------------------------------------------------- rows

    def write_seen(self, train: Iterable[Example], validation: Iterable[Example]) -> None:
        """Remember which rows the run chooses its weights and its step by."""
        lines = [f"{row_hash(row)} train" for row in train]
        lines += [f"{row_hash(row)} validation" for row in validation]
        write_whole(self._seen, "\n".join(lines) + "\n")

    def read_seen(self) -> set[str]:
        """Hashes of all rows trained or validated on.

        Raises:
            UserError: seen.txt is missing or unreadable.
        """
        try:
            lines = self._seen.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self._seen}: cannot be read: {error}") from error
        return {line.split()[0] for line in lines if line}

    # ----------------------------------------------------------------------------------- metrics

    def append_metric(self, metric: Metric) -> None:
        """Write one line, in one call of the system; it is forced to the disk at the folder's `pace`.

        Raises:
            UserError: no space left, or the like.
        """
        line = json.dumps(metric).encode() + b"\n"
        with writing(self._metrics), self._metrics.open("ab", buffering=0) as file:
            size = file.tell()
            written = file.write(line)
            if written != len(line):
                file.truncate(size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self.pace.due():
                os.fsync(file.fileno())

    def read_metrics(self) -> tuple[list[Metric], int]:
        """All whole lines, and the bytes of a torn last one.

        Raises:
            UserError: another line than the last is damaged.
        """
        try:
            raw = self._metrics.read_bytes()
        except FileNotFoundError:
            return [], 0
        except OSError as error:
            raise UserError(f"{self._metrics}: cannot be read: {error.strerror}") from error
        whole, _, torn = raw.rpartition(b"\n")
        metrics: list[Metric] = []
        for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
            try:
                metric = json.loads(line)
                for name in ("step", "forwards", "seconds", *_NUMBERS[metric["kind"]]):
                    metric[name] = metric[name] + 0  # a number
                if "losses" in metric:
                    math.fsum((*metric["losses"], *metric["rights"]))
                if "gain" in metric:
                    right, wrong = metric["turned"]
                    math.fsum((metric["gain"], metric["gain_error"], right, wrong))
                metrics.append(metric)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(
                    f"{self._metrics}:{number}: damaged: {line[:60]!r}: remove the line"
                ) from error
        return metrics, len(torn)

    def keep_metrics(self, metrics: list[Metric]) -> None:
        """Make metrics.jsonl hold these lines and no others."""
        write_whole(self._metrics, "".join(json.dumps(metric) + "\n" for metric in metrics))

    # ------------------------------------------------------------------------------------ result

    def write_result(self, result: dict[str, Any]) -> None:
        """Write result.json."""
        write_whole(self._result, json.dumps(result, indent=2) + "\n")

    def forget_result(self) -> None:
        """Remove result.json: the run goes on."""
        with writing(self._result):
            self._result.unlink(missing_ok=True)

    def read_result(self) -> dict[str, Any] | None:
        """Read result.json; None where no session has ended yet."""
        if not self._result.exists():
            return None
        result = _read_object(self._result, _RESULT)
        for name in _SCORES if result["status"] == "finished" else ():
            if not isinstance(result.get(name), (int, float)):
                raise UserError(f"{self._result}: damaged: {name} is missing: remove the file")
        return result


def validated(metrics: Iterable[Metric], steps: int) -> list[Metric]:
    """The validations up to a step."""
    return [m for m in metrics if m["kind"] == "validation" and m["step"] <= steps]


def best_step(metrics: Iterable[Metric], steps: int) -> Metric | None:
    """The best validation up to a step: highest value, then lowest loss, then the earliest."""
    return min(
        validated(metrics, steps), key=lambda m: (-value_of(m), m["loss"], m["step"]), default=None
    )


def value_of(metric: Metric) -> float:
    """What a validation is judged by: the task's first metric."""
    return float(metric["value"] if "value" in metric else metric["accuracy"])


def _read_object(path: Path, needed: dict[str, Any]) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object")
    for name, kind in needed.items():
        if not isinstance(value.get(name), kind):
            raise UserError(f"{path}: damaged: {name} is missing")
    return value
