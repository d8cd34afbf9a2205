"""`train`: rows and a model in, a run folder out. What is checked and read before the first step is here.

Everything that could be wrong with the input is found before the folder is made. The order of the rows, the
learning rate and what is due when are functions of the step alone: so a session that ended anywhere is
continued to the same bits.
"""

from __future__ import annotations

import time
from dataclasses import replace

from justforward.budget import with_delta
from justforward.config import WORKERS, TrainConfig
from justforward.directions import FAMILIES
from justforward.errors import UserError
from justforward.folder import Metric, RunFolder, check_new
from justforward.groups import family_of
from justforward.guard import KEPT, lost_forwards
from justforward.moments import compile_kernels
from justforward.outcome import Interrupted, Result
from justforward.prepare import (
    check_names,
    check_there,
    environment_now,
    read_data,
    split_rows,
    stop_reason,
    stop_signals,
    use_threads,
)
from justforward.progress import Progress
from justforward.schedules import forwards_until
from justforward.session import Session
from justforward.settings import check_same, resolved, task_of
from justforward.stored import FORMATS
from justforward.tasks import Task
from justforward.team import Team, gathered
from justforward.trajectory import Log, Writer, read_log


def train(config: TrainConfig, progress: Progress | None = None) -> Result:
    """Tune a model, or continue; returns what result.json holds.

    Raises:
        UserError: something in the input cannot be used, or a file cannot be written.
        NonFiniteLoss: a loss became NaN or infinite; the run so far is kept.
        Interrupted: by Ctrl-C or SIGTERM; the run so far is kept.
    """
    with (
        progress or Progress() as shown,
        stop_signals() as stop,
        gathered(config, shown) as (config, shown, team),
    ):
        try:
            session = _open(config, shown, team)
        except KeyboardInterrupt:
            raise Interrupted(None) from None
        if isinstance(session, dict):
            return session
        return session.run(stop)


# ------------------------------------------------------------------------------ before the folder


def _open(config: TrainConfig, progress: Progress, team: Team) -> Session | Result:
    """Check everything, load everything, make or reopen the folder; a finished run's result."""
    started = time.monotonic()
    folder = RunFolder(config.out)
    old: TrainConfig | None = None
    if config.resume:
        folder.check_run()
        old = folder.read_config()
        if old.data == WORKERS:
            raise UserError(
                f"{folder.path}: is a hub's run, whose workers have the rows: continue it with serve --resume"
            )
        filled = {
            name: getattr(old, name)
            for name in (
                "lr",
                "eps",
                "eval_every",
                "test_size",
                "validation_size",
                "probe_rows",
                "layers",
                "lora_targets",
                "start",
                "target_delta",
                "backoff",
                "patience",
                "keep",
            )
            if getattr(config, name) is None or (name, getattr(config, name)) == ("start", "auto")
        }
        config = replace(config, **filled)
        if config.data == old.data:
            check_there(folder, old.data)
        # else what belongs to the run's own tuner or start would be said to be in the way of another
        check_same(old, config, str(folder.path), ("tuner", "start"))
    config = resolved(config)
    check_names(config)
    task = task_of(config)
    if old is None:
        check_new(folder.path, "continue it with --resume or choose another --out")
    else:
        check_same(resolved(old), config, str(folder.path))
        folder.lock()
        folder.tidy()
    use_threads(config.threads)
    try:
        session = _load(config, task, folder, progress, started, team)
    except BaseException:
        folder.unlock()
        raise
    if isinstance(session, dict):
        folder.unlock()
    return session


def _load(
    config: TrainConfig,
    task: Task,
    folder: RunFolder,
    progress: Progress,
    started: float,
    team: Team,
) -> Session | Result:
    examples, digest = read_data(config.task, config.data, task, progress.note)
    config, splits = split_rows(config, examples)
    config = with_delta(config, len(splits.train))
    log: Log | None = None
    metrics: list[Metric] = []
    if config.resume:
        log, metrics, done = _reopen(config, folder, digest, progress)
        if done is not None:
            return done
    # adapters are float32 whatever the base is
    dtype = FORMATS[config.dtype if config.tuner in ("full", "head") else "float32"]
    compile_kernels(FAMILIES[family_of(config.family, config.estimator)], config.rule, dtype)
    session = Session(config, task, splits, folder, progress, metrics, started, digest, log, team)
    for note in session.budget.plan(config) if session.budget else ():
        progress.note(note)
    try:
        session.load()
    except BaseException:
        session.spared.close()
        raise
    return session


def _reopen(
    config: TrainConfig, folder: RunFolder, digest: str, progress: Progress
) -> tuple[Log, list[Metric], Result | None]:
    """The log and metrics of a run to continue; and its result if there is nothing to do."""
    environment = folder.read_environment()
    if digest != environment["data_sha256"]:
        raise UserError(
            f"{folder.path}: --data is {config.data!r}, whose content is not what the run was "
            f"started with (sha256 {digest[:12]}, then {environment['data_sha256'][:12]}): give that file"
        )
    log = read_log(folder.log)
    if log.truncated:
        progress.note(
            f"note: the log ends in {log.truncated} bytes of a torn step: continued after step {len(log.steps)}"
        )
    metrics, torn = folder.read_metrics()
    told = max((m["step"] for m in metrics if m["kind"] == "step"), default=0)
    # Its loss is in no file, and the guard judges by all of them. A private answer is given once.
    if told == len(log.steps) - 1 and not config.private:
        progress.note(f"note: step {told + 1} has no line in metrics.jsonl: it is taken again")
        Writer.rewind(log, told)
        log = read_log(folder.log)
    kept = [m for m in metrics if m["kind"] in KEPT or m["step"] <= len(log.steps)]
    if torn or len(kept) < len(metrics):
        progress.note("note: metrics.jsonl was cut back to the end of the log")
        folder.keep_metrics(kept)
    now = environment_now(config.quantize, config.private)
    for name, was in environment["versions"].items():
        if now["versions"].get(name) != was:
            progress.note(
                f"note: {name} was {was} and is {now['versions'].get(name)}: losses may differ in their last bits"
            )
    if now["threads"] != environment["threads"]:
        progress.note(
            f"note: {environment['threads']} threads then, {now['threads']} now: losses may differ in "
            f"their last bits (--threads {environment['threads']} for the same)"
        )
    result = folder.read_result()
    if result is not None and result["status"] == "finished":
        steps, seconds, parts = len(log.steps), float(result["seconds"]), len(log.header["groups"])
        forwards = forwards_until(config, steps, parts) + lost_forwards(kept)
        reason = stop_reason(config, steps, forwards, seconds, kept, parts)
        if reason is not None:
            progress.note(f"{folder.path}: the run is finished ({reason}): nothing to do")
            return log, kept, result
    return log, kept, None
