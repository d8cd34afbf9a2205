"""`join`: a worker's model and rows, made as the hub's options say, and its part in the run."""

from __future__ import annotations

import secrets
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

from justforward.config import TrainConfig
from justforward.data import Example, batches
from justforward.errors import UserError
from justforward.evaluate import Scorer
from justforward.folder import row_hash
from justforward.line import FolderLink, HttpLink, Line, Link, greet
from justforward.models import load_model
from justforward.offers import JoinConfig, worker_config
from justforward.optim import MeZO
from justforward.playback import fingerprint
from justforward.prepare import check_names, read_data, split_rows, stop_signals, use_threads
from justforward.progress import Progress
from justforward.published import Published
from justforward.ranges import check_ranges
from justforward.schedules import optimizer_options
from justforward.settings import task_of
from justforward.starting import choose_layers
from justforward.tuners import attach
from justforward.wire import read_key
from justforward.worker import Rows, Worker

Result = dict[str, Any]


class Own:
    """A worker's model and rows.

    Args:
        config: the hub's options with this worker's model and data.
        private: whether rows are drawn by this worker's own luck.
        note: called with a sentence where there is something to tell.

    Raises:
        UserError: model or rows cannot be used.
    """

    def __init__(self, config: TrainConfig, private: bool, note: Any) -> None:
        self.config, self.note = config, note
        self.task = task_of(config)
        found, digest = read_data(config.task, config.data, self.task, note)
        if isinstance(found, Published):
            self.train: list[Example] = split_rows(config, found)[1].train
            digest = sha256("\n".join([digest, *map(row_hash, self.train)]).encode()).hexdigest()
        else:
            self.train = found
        self.digest = None if private else digest
        self.seed = secrets.randbits(63) if private else config.seed
        self.scorer: Scorer | None = None

    def build(self, log: Path, resume: bool) -> MeZO:
        """See `Worker`."""
        config = self.config
        self.scorer = None  # before a second model is there
        model, tokenizer = load_model(config.model, self.note, config.quantize, config.dtype)
        model = attach(model, tokenizer, config)
        choose_layers(model, config)
        self.scorer = Scorer(model, tokenizer, self.task, config.max_length)
        self.scorer.prepare(self.train, self.note)
        return MeZO(model, log=log, resume=resume, **optimizer_options(config))

    def batch(self, step: int, first: int, stop: int, of: int) -> Any:
        """See `Rows`."""
        assert self.scorer is not None
        size = self.config.batch_size
        drawn = batches(len(self.train), size, self.seed, step)
        rows = drawn[first:stop] if self.digest is not None else drawn[: stop - first]
        return self.scorer.encode_training([self.train[row] for row in rows])

    def tokens(self) -> str:
        """See `Rows`."""
        assert self.scorer is not None
        return self.scorer.digest(self.train if self.digest is not None else [])

    def losses(self, batch: Any) -> Any:
        """See `Rows`."""
        assert self.scorer is not None
        return self.scorer.losses(batch)


def join(config: JoinConfig, progress: Progress | None = None) -> Result:
    """Take part in a run until there is no further step; returns how it went.

    Raises:
        UserError: something in the input cannot be used, or the hub refuses this worker or does not answer.
        KeyboardInterrupt: by Ctrl-C or SIGTERM; the hub knows, and others take over.
    """
    note = (progress or Progress()).note
    check_ranges(config)
    started = time.monotonic()
    if (config.url is None) == (config.folder is None):
        raise UserError("join takes either the address of a hub or its --folder")
    key = read_key(config.key_file)
    link: Link = HttpLink(config.url) if config.url is not None else FolderLink(config.folder or "")
    with stop_signals():
        line = Line(link, key, config.wait, note)
        told = greet(line)
        own_config = worker_config(config, told["config"])
        check_names(own_config)
        use_threads(config.threads)
        own = Own(own_config, told["private"], note)
        name = f"{config.name[:48]}-{secrets.token_hex(4)}"
        rows = Rows(own.batch, own.losses, own.digest, own.tokens)
        worker = Worker(line, name, own.build, rows, told["hash_every"], note)
        note(f"joining as {name}, {len(own.train)} rows")
        steps = worker.run(told["log"])
    assert worker.opt is not None
    assert worker.opt.model is not None
    return {
        "name": name,
        "steps": steps,
        "fingerprint": fingerprint(worker.opt.model),
        "seconds": round(time.monotonic() - started, 3),
    }
