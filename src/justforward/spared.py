"""A run's trunk: found, checked against the whole model, its outputs kept in the run's or the user's place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from justforward.config import TrainConfig
from justforward.data import Example
from justforward.evaluate import Scorer
from justforward.store import Store
from justforward.trunk import Trunk

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCORED = 0.25  # of the room at most is for rows that are only scored


class Spared:
    """Spares a run the layers below what it tunes (`trunk`), where it may and can.

    Args:
        config: says whether, and where outputs are kept.
        note: called with a sentence on what was found.
    """

    def __init__(self, config: TrainConfig, note: Callable[[str], None]) -> None:
        self._config = config
        self._note = note
        self._trunk: Trunk | None = None
        self._good = ""  # name of the trunk without which losses came out the same
        self._store: tuple[str, Store] | None = None  # by what its outputs depend on

    def find(self, model: PreTrainedModel, scorer: Scorer, rows: Sequence[Example]) -> None:
        """Take the model's trunk from now on, if the losses of some rows come out the same without it.

        Another copy of a model whose losses did is not asked again.
        """
        self._trunk = None
        if not self._config.reuse:
            return
        trunk = Trunk(model, self._outputs)
        if trunk.depth == 0:
            return
        if trunk.name == self._good:
            self._trunk = trunk
            return
        batch = scorer.encode_training(rows[: self._config.batch_size])
        plain = scorer.losses(batch)
        with trunk.reused():
            spared = scorer.losses(batch)
        if not torch.allclose(plain, spared, rtol=1e-4, atol=1e-4):
            self._note(
                f"note: the first {trunk.depth} layers do not move, but the losses differ when they are left out: "
                "they are run each time"
            )
            return
        self._trunk, self._good = trunk, trunk.name
        self._note(
            f"the first {trunk.depth} of {trunk.layers} layers do not move: a text runs through them once"
        )

    def reused(self, whole: bool = False) -> contextlib.AbstractContextManager[None]:
        """While inside, the trunk is spared, as `Trunk.reused` has it."""
        return contextlib.nullcontext() if self._trunk is None else self._trunk.reused(whole)

    def scored(
        self, scorer: Scorer, rows: Sequence[Example]
    ) -> contextlib.AbstractContextManager[None]:
        """`reused` for rows that are scored more than once, if they leave the most of the room to those that steps look at."""
        model = scorer.model
        tokens = sum(map(scorer.length, rows))
        needed = tokens * model.config.get_text_config().hidden_size * model.dtype.itemsize
        fits = needed <= SCORED * self._config.cache_gb * 2**30
        return self.reused(whole=True) if fits else contextlib.nullcontext()

    def leave(self) -> None:
        """Spare nothing until the next `find`, and let the model go."""
        self._trunk = None

    def close(self) -> None:
        """Close the file of what the trunk gave; a temporary one is gone then."""
        if self._store is not None:
            self._store[1].close()
            self._store = None

    def _outputs(self, name: str) -> Store:
        config = self._config
        if self._store is None or self._store[0] != name:
            self.close()
            path = None if config.cache is None else Path(config.cache) / f"{name[:32]}.outputs"
            beside = next(each for each in Path(config.out).absolute().parents if each.is_dir())
            store = Store(path, int(config.cache_gb * 2**30), beside)
            if store.note is not None:
                self._note(f"note: {store.note}")
            self._store = name, store
        return self._store[1]
