"""Snapshots of a run: its weights after some step, so that what is rebuilt from its log need not begin at the base.

snapshots/step-00000120/
    part-00000.safetensors ...  of each tensor that is tuned its weights, the exponents of its grid and, where the rule
                                keeps them, its moments: "weights:NAME", "grid:NAME", "moment0:NAME", "moment1:NAME"
    manifest.json               written last: the step, what the log says up to there (by hash), size and sha256 of each part

Everything else that a run goes on with is in the log. A snapshot appears whole or not at all, and is used only if every
byte of it is as it was written and its steps are the log's; the log alone is always enough. So a snapshot can be removed
at any time, and one that cannot be written costs time and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from justforward.course import Course
from justforward.directions import Weights
from justforward.durable import Pace, sync_folder
from justforward.errors import UserError
from justforward.folder import data_hash, write_whole
from justforward.kept import whole_folder
from justforward.moments import Moments
from justforward.optim import MeZO
from justforward.playback import apply_steps, at_base, check_steps
from justforward.stored import raw
from justforward.trajectory import Log, Step, read_log

PART = 1 << 26  # bytes; a larger tensor has a part of its own
_FORMAT = 1
_MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")

Note = Callable[[str], None]


@dataclass(frozen=True)
class Snapshot:
    """A snapshot whose bytes have been checked.

    Attributes:
        path: its folder.
        step: so many steps of the log were taken.
        parts: its files.
    """

    path: Path
    step: int
    parts: list[Path]

    def restore(self, weights: Weights, course: Course | Moments, steps: Sequence[Step]) -> None:
        """Let weights at the base, and what turns steps into moves, be as they were after the snapshot's step.

        Args:
            weights, course: as `playback.at_base` gives them.
            steps: of the log, from its first.

        Raises:
            UserError: it is of other tensors.
        """
        wanted = dict(_tensors(weights, _with_moments(weights, course)))
        weights.settle()
        for part in self.parts:
            for name, tensor in load_file(part).items():
                into = wanted.pop(name, None)
                if into is None or (into.shape, into.dtype) != (tensor.shape, tensor.dtype):
                    raise UserError(f"{self.path}: {name} is of another model: remove this folder")
                into.copy_(tensor)
        if wanted:
            raise UserError(f"{self.path}: {next(iter(wanted))} is missing: remove this folder")
        course.recall(steps[: self.step])


class Snapshots:
    """The snapshots of one run.

    Args:
        path: their folder, made when it is needed.
        note: told in a sentence of one that is damaged.
    """

    def __init__(self, path: Path, note: Note) -> None:
        self.path, self._note = path, note

    def newest(self, log: Log, steps: int) -> Snapshot | None:
        """The last one at or before a step of a log that is whole; each that is not is named."""
        for step, folder in reversed(self._found()):
            if step > steps:
                continue
            try:
                return _checked(folder, step, log)
            except UserError as error:
                self._note(f"note: {error}: not used, as if it were not there")
        return None

    def write(self, weights: Weights, course: Course | Moments, log: Log, keep: int) -> None:
        """Write one of the weights as they are after the last step of a log, and remove all but the newest `keep`.

        Raises:
            UserError: it cannot be written; those before are as they were.
        """
        step = len(log.steps)
        out = self.path / f"step-{step:08d}"
        if out.is_dir():  # left from before a kill, or damaged
            self._remove(out)
        with whole_folder(out) as folder:
            files = {}
            for number, part in enumerate(_parts(_tensors(weights, _moments(course)))):
                file = folder / f"part-{number:05d}.safetensors"
                content = save(part)
                write_whole(file, content)
                files[file.name] = [len(content), hashlib.sha256(content).hexdigest()]
            manifest = {"format": _FORMAT, "step": step, "log": _digest(log, step), "files": files}
            write_whole(folder / _MANIFEST, json.dumps(manifest, indent=2) + "\n")
        for _, old in self._found()[:-keep]:
            self._remove(old)

    def forget(self, steps: int) -> None:
        """Remove those after a step: the run has gone back to it."""
        for step, folder in self._found():
            if step > steps:
                self._remove(folder)

    def _found(self) -> list[tuple[int, Path]]:
        """Step and folder of each, in order."""
        if not self.path.is_dir():
            return []
        names = ((_NAME.fullmatch(p.name), p) for p in self.path.iterdir() if p.is_dir())
        return sorted((int(match[1]), p) for match, p in names if match)

    def _remove(self, folder: Path) -> None:
        """It goes as a whole, too: half of one would look damaged."""
        hidden = folder.with_name(f".{folder.name}.tmp")
        with contextlib.suppress(OSError):  # it is in nobody's way
            folder.rename(hidden)
            sync_folder(self.path)
        shutil.rmtree(hidden, ignore_errors=True)


def _tensors(weights: Weights, moments: Sequence[Sequence[Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """All that a snapshot holds, by name, as it lies in memory."""
    for i, name in enumerate(weights.names):
        yield f"weights:{name}", raw(weights.tensors[i])
        yield f"grid:{name}", weights.exponents[i]
        for number, moment in enumerate(moments[i] if moments else ()):
            yield f"moment{number}:{name}", moment


def _moments(course: Course | Moments) -> Sequence[Sequence[Tensor]]:
    return course.kept if isinstance(course, Moments) else []


def _with_moments(weights: Weights, course: Course | Moments) -> Sequence[Sequence[Tensor]]:
    """The same, and room for moments that are kept."""
    if isinstance(course, Moments):
        course.keep(weights)
    return _moments(course)


def _parts(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Tensors in order, so many at a time that a part is about of one size."""
    part: dict[str, Tensor] = {}
    held = 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if part and held + size > PART:
            yield part
            part, held = {}, 0
        part[name] = tensor.cpu()
        held += size
    if part:
        yield part


def _digest(log: Log, steps: int) -> str:
    """sha256 of what a log says up to a step, whatever seals are in it."""
    digest = hashlib.sha256(json.dumps(log.header, sort_keys=True).encode())
    for s in log.steps[:steps]:
        said = (s.coefficients, s.scales, s.decays, s.rule_state, s.norms, s.rates)
        digest.update(repr(said).encode())
    return digest.hexdigest()


def _checked(folder: Path, step: int, log: Log) -> Snapshot:
    """A snapshot if it is whole and of this log.

    Raises:
        UserError: naming what is wrong with it.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        said, at, of = manifest["format"], manifest["step"], manifest["log"]
        files = {
            str(name): (int(size), str(sha)) for name, (size, sha) in manifest["files"].items()
        }
    except FileNotFoundError:
        raise UserError(f"{folder}: {_MANIFEST} is missing: half a snapshot") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder}: {_MANIFEST} is damaged: {type(error).__name__}") from error
    if said != _FORMAT:
        raise UserError(f"{folder}: a snapshot of format {said!r}, this version reads {_FORMAT}")
    if at != step or of != _digest(log, step):
        raise UserError(f"{folder}: a snapshot of other steps than the log's")
    for name, (size, sha) in files.items():
        file = folder / name
        if os.path.basename(name) != name or not file.is_file():
            raise UserError(f"{folder}: {name} is missing")
        if file.stat().st_size != size or data_hash(file) != sha:
            raise UserError(f"{folder}: {name} is damaged: its size or checksum differs")
    parts = [folder / name for name in sorted(files)]
    return Snapshot(folder, step, parts)


# ---------------------------------------------------------------------------------------- from the log


def replay(model: nn.Module, path: Path, steps: int | None, snapshots: Snapshots) -> int:
    """`playback.replay`, from the newest snapshot that is whole: the same bits.

    Raises:
        UserError: as `playback.replay`.
    """
    log = read_log(path)
    check_steps(log, steps)
    last = len(log.steps) if steps is None else steps
    weights, course = at_base(model, log)
    first = _restored(snapshots, log, last, weights, course)
    return first + apply_steps(weights, course, log.steps[first:last])


def _restored(
    snapshots: Snapshots, log: Log, last: int, weights: Weights, course: Course | Moments
) -> int:
    """Go to the newest snapshot up to a step; how many steps that is."""
    found = snapshots.newest(log, last)
    if found is None:
        return 0
    try:
        found.restore(weights, course, log.steps)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{found.path}: cannot be read: {error}: try again, or remove this folder"
        ) from error
    return found.step


class RunOptimizer(MeZO):
    """`MeZO` of a run folder: it goes on from a snapshot, and its log is forced to the disk as the run asks.

    Args:
        snapshots: of the run.
        sync: seconds between forced writes of the log (`durable.Pace`).
        arguments, options: as `MeZO` takes them.
    """

    def __init__(self, *arguments: Any, snapshots: Snapshots, sync: float, **options: Any) -> None:
        self._snapshots = snapshots
        super().__init__(*arguments, **options)
        if self._writer is not None:
            self._writer.pace = Pace(sync)

    def _continue(self, log: Log) -> None:
        first = _restored(self._snapshots, log, len(log.steps), self.weights, self._course)
        if first:
            last = log.steps[first - 1]
            self._rule_state, self._scales, self._norms = last.rule_state, last.scales, last.norms
        self.steps = first
        super()._continue(replace(log, steps=log.steps[first:]))

    def snapshot(self, keep: int) -> None:
        """Write a snapshot of the run as it is.

        Raises:
            UserError: it cannot be written.
        """
        assert self._writer is not None
        self._writer.sync()  # a snapshot is never ahead of the log
        self.weights.settle()
        self._snapshots.write(self.weights, self._course, read_log(self._writer.path), keep)

    def snapshot_due(self, every: int | None, keep: int, note: Note) -> None:
        """Write a snapshot if one is due after this step; where it cannot be written the run goes on."""
        if every is None or self.steps % every:
            return
        try:
            self.snapshot(keep)
        except UserError as error:
            note(
                f"note: no snapshot of step {self.steps}: {error}: the run goes on, its log is enough to continue from"
            )
