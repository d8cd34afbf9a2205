"""Differential privacy in a loop like Trainer's: a step's rows are drawn in secret, and each is looked at by itself.

Trainer's loop counts steps by a data loader. Here that one deals places without rows; with the last place of a step the
rows are drawn (`private`), fetched and collated one by one. So Trainer never sees a training row, nor a loss of one, and has
none to shuffle, count, log or save. What is spent is counted from the log, and training ends before it is more than was planned.

A checkpoint may be older than the log: steps behind it were taken, and their answers are known. They are taken again
as they are in the log, not looked at again.
"""

from __future__ import annotations

import base64
import copy
import math
import random
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer
from transformers.trainer_utils import has_length
from transformers.utils import logging
from transformers.utils.import_utils import is_datasets_available

from justforward.accounting import delta_for, epsilon_of, library, noise_for
from justforward.errors import UserError
from justforward.loop import LOG, LoopMeZO
from justforward.private import Private
from justforward.rowwise import RowwiseTrainer
from justforward.trajectory import read_log

logger = logging.get_logger(__name__)

_KEY = "place"
# Methods that would be passed over, and what they would do.
_DEALING = ("get_train_dataloader", "_get_train_sampler", "get_batch_samples", "training_step")


class Places(Dataset[dict[str, int]]):
    """As many places as there are rows, and nothing of the rows."""

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, place: int) -> dict[str, int]:
        return {_KEY: place}


class DrawnTrainer(RowwiseTrainer):
    """Trainer whose steps may be private. A part of `MeZOTrainer`, never used alone."""

    optimizer: Any
    _workers: Any
    _delta = math.nan
    _planned: int | None = None  # answers that may be given
    _noise: float | None = None  # of the log that is resumed
    _source: tuple[Any, Any, Any] = (None, None, None)  # train_dataset, and what is made of it
    _waiting: list[int] | None = None  # rows that were drawn and not looked at

    def check_private(self, trial: Any = None) -> None:
        """Refuse what would show more of the training rows than the log, before anything moves.

        Raises:
            UserError: naming it.
        """
        if not self.args.private:
            return
        library()
        rows = self._count_rows()
        if trial is not None:
            raise UserError(
                "private: each trial of a search spends epsilon of its own, and the best is chosen of all: search with public rows"
            )
        ours = _owners(type(self))
        for name in _DEALING:
            kind = next(base for base in type(self).__mro__ if name in vars(base))
            if kind not in ours:
                raise UserError(
                    f"private: {kind.__name__} has a {name} of its own: the rows of a private step are a Poisson sample, which "
                    "that would not be: leave it out"
                )
        given = self.eval_dataset
        for evaluated in given.values() if isinstance(given, dict) else (given,):
            if evaluated is self.train_dataset:
                raise UserError(
                    "private: eval_dataset is train_dataset, whose scores would be exact numbers of the rows that are protected: "
                    "give rows that are public"
                )
        seed = getattr(self.data_collator, "seed", None)
        if seed is not None:
            raise UserError(
                f"private: data_collator has a seed ({seed}): what it draws for a row would depend on the rows "
                "before it: leave the seed out"
            )
        self._delta = delta_for(rows, self.args.target_delta, "target_delta")

    def _count_rows(self) -> int:
        rows = self.train_dataset
        if not has_length(rows) or isinstance(rows, torch.utils.data.IterableDataset):
            raise UserError(
                "private: train_dataset has no length: each row must be there to be drawn, by its number: give a map-style dataset"
            )
        return len(rows)

    # -- what may be spent --------------------------------------------------------------------------------------

    def _private(self) -> Private:
        """How rows are looked at; the noise is that of the log that is resumed, if there is one."""
        args, rows = self.args, self._count_rows()
        batch = self.get_total_train_batch_size(args)
        noise = args.noise_multiplier or self._noise
        if noise is None:
            assert args.target_epsilon is not None
            if self._planned is None:
                raise UserError(
                    "private: the noise for target_epsilon depends on how many steps are planned, which train() knows: call that"
                )
            noise = noise_for(
                epsilon=args.target_epsilon,
                delta=self._delta,
                rate=min(1.0, batch / rows),
                answers=self._planned,
            )
        return Private(rows, batch, noise, args.clip)

    def _spent(self, answers: int) -> float:
        private: Private = self.optimizer.private
        return epsilon_of(
            noise_multiplier=private.noise_multiplier,
            rate=private.rate,
            answers=answers,
            delta=self._delta,
        )

    def _plan(self, steps: int) -> None:
        """Say how many answers may be given in so many more steps.

        Raises:
            UserError: there are other rows than at first, or that would cost more than the target.
        """
        private: Private = self.optimizer.private
        target = self.args.target_epsilon
        self._share_ahead()
        if private.rows != self._count_rows():
            raise UserError(
                f"private: train_dataset has {self._count_rows()} rows, and had {private.rows}: go on with the same"
            )
        ahead = len(self.optimizer.ahead)
        if ahead > steps:
            raise UserError(
                f"{self.optimizer.path}: has {ahead} steps behind the checkpoint, and max_steps leaves {steps}: what was answered is "
                f"spent: let max_steps be larger by {ahead - steps}, or more"
            )
        self._planned = private.answers + steps - ahead
        if target is not None and self._spent(self._planned) > target:
            raise UserError(
                f"private: {self._planned} answers cost epsilon {self._spent(self._planned):.3f} at delta {self._delta:g} with the noise "
                f"of this run ({private.noise_multiplier:.4g}), more than target_epsilon, {target:g}: {private.answers} were given: "
                "plan fewer steps"
            )

    def _share_ahead(self) -> None:
        """Let the processes that write no log know the steps that are ahead in it."""
        optimizer: LoopMeZO = self.optimizer
        if self._workers is None:
            return
        raw = b"" if not optimizer.ahead else optimizer.log_bytes()
        raw = base64.b64decode(self._workers.agree(base64.b64encode(raw).decode()))
        if raw and not optimizer.writes:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / LOG
                path.write_bytes(raw)
                optimizer.let_ahead(read_log(path))

    def _told(self, logs: dict[str, Any]) -> None:
        """No loss of training rows, which is not known; what was spent, beside what training says."""
        if not self.args.private:
            return
        known = [logs.pop(key, None) for key in ("loss", "train_loss")]
        if any(loss is not None for loss in known):
            logs["epsilon"] = self._spent(self.optimizer.private.answers)
        if known[1] is not None:
            logs["delta"] = self._delta

    # -- rows -----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Trainer's; of a private run places without rows, of which as many make a step as of rows would."""
        if not self.args.private:
            return super().get_train_dataloader()
        loader = DataLoader(
            Places(self._count_rows()),
            batch_size=self._train_batch_size,
            drop_last=self.args.dataloader_drop_last,
        )
        found: DataLoader[Any] = self.accelerator.prepare(loader)
        return found

    def _private_step(self, model: nn.Module) -> None:
        """Take a step with rows that are drawn for it; or again the one that the log has; or end training."""
        optimizer: LoopMeZO = self.optimizer
        private = optimizer.private
        assert private is not None
        optimizer.step_was_skipped = False
        if optimizer.again():
            return
        assert self._planned is not None
        if private.answers >= self._planned:
            logger.warning(
                f"all {self._planned} private answers that were planned are given: training ends"
            )
            optimizer.step_was_skipped = True
            self.control.should_training_stop = True
            return
        if self._waiting is None:
            self._waiting = private.draw()
        drawn, found = self._waiting, dict[int, Any]()

        def losses(places: Tensor) -> Tensor:
            rows = [self._loss_of(model, drawn[place], found) for place in places.tolist()]
            return torch.tensor(rows, dtype=torch.float64)

        take = optimizer.step if self._workers is None else self._workers.step
        take(losses, torch.arange(len(drawn)))
        self._waiting = None

    def _loss_of(self, model: nn.Module, row: int, found: dict[int, Any]) -> float:
        """What Trainer says of a batch of this row alone. `found` keeps batches, so that all looks are at the same."""
        if row not in found:
            found[row] = self._prepare_inputs(self._collated(row))
        with self.compute_loss_context_manager(), self._seen_in_training():
            # `compute_loss` may take the labels out of its inputs
            loss: Any = self.compute_loss(model, copy.copy(found[row]))
        return float(loss)

    def _collated(self, row: int) -> Any:
        """A batch of one row: what is drawn for it depends on no other."""
        given, dataset, collator = self._source
        if given is not self.train_dataset:
            dataset, collator = self._trainers_source()
            self._source = self.train_dataset, dataset, collator
        with _own_luck():
            return collator([dataset[row]])

    def _trainers_source(self) -> tuple[Any, Any]:
        """Rows and what makes a batch of them, without the columns that Trainer leaves out."""
        dataset: Any = self.train_dataset
        if is_datasets_available():
            import datasets

            if isinstance(dataset, datasets.Dataset):
                return self._remove_unused_columns(dataset, "Training"), self.data_collator
        said = "Training"
        return dataset, self._get_collator_with_removed_columns(self.data_collator, said)


def noise_of(path: Any) -> float | None:
    """The noise multiplier of a private run's log; None of another."""
    said = read_log(path).header["settings"].get("private")
    return None if said is None else float(said["noise_multiplier"])


def _owners(kind: type) -> tuple[type, ...]:
    """The classes whose loop it is: Trainer's, and those of this package."""
    home = __name__.partition(".")[0]
    return tuple(
        b
        for b in kind.__mro__
        if b is Trainer or b.__module__.partition(".")[0] in (home, "transformers")
    )


@contextmanager
def _own_luck() -> Iterator[None]:
    """While inside, global generators are seeded anew, from the system's entropy; after that they are as they were."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 - which datasets draw from
    with torch.random.fork_rng():
        seed = secrets.randbits(32)
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
