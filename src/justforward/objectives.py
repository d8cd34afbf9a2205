"""What a step makes smaller: the task's loss, or a metric with its sign turned, which needs no gradient.

A metric is one of the task's own by name, or any Python function `f(predictions, references)`: predictions are texts
(label, option, or what the model wrote), references a list of right answers for each; it returns one number a row,
or one for all of them, the larger the better.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from justforward import noise
from justforward.data import Example
from justforward.errors import UserError
from justforward.evaluate import Scorer
from justforward.generate import Sampling
from justforward.metrics import BY_ROW, figures, joined
from justforward.prompts import Batch
from justforward.tasks import METRICS, Task

References = list[list[str]]
Function = Callable[[list[str], References], Any]


class Objective:
    """A metric as an objective.

    Args:
        name: a metric of the task's kind, "file.py:function" or "package.module:function".
        task: the task.
        sampling: how a task of kind "generation" writes while it is trained (validation is greedy).

    Raises:
        UserError: no such metric or function; or the task lacks what the metric needs.
    """

    def __init__(self, name: str, task: Task, sampling: Sampling | None = None) -> None:
        self.name = name
        self.task = task
        self.sampling = sampling or Sampling()
        self._function: Function | None = None
        if ":" in name:
            self._function = _load(name)
        elif name not in METRICS[task.kind]:
            raise UserError(
                f"--objective is {name!r}: it must be loss, one of {', '.join(METRICS[task.kind])}, or a "
                "function as in rewards.py:my_function"
            )
        else:
            task.check_metric(name)

    def by_row(self) -> bool | None:
        """Whether a row has a number of its own; None: not known before the function was called."""
        if self._function is not None:
            return None
        return self.task.kind != "classification" or self.name == "accuracy"

    def check_by_row(self) -> None:
        """Refuse a metric that is known to be one number for a whole batch: activation space needs one a row.

        Raises:
            UserError: naming it.
        """
        if self.by_row() is False:
            raise UserError(
                f"--objective is {self.name!r}, one number for a whole batch, and --estimator is 'activation', which "
                "needs one a row: choose --estimator weight"
            )

    def batch(self, scorer: Scorer, rows: Sequence[Example]) -> Batch:
        """The rows as `closure` needs them."""
        return scorer.encode(rows, "none" if self.task.kind == "generation" else "all")

    def closure(self, scorer: Scorer, step: int = 0) -> Callable[[Batch], Tensor]:
        """A function of a batch: minus the metric, [B] or for all rows [], float32.

        Args:
            step: index of the step: each draws its texts anew, and both its signs draw alike.
        """
        sampling = replace(self.sampling, seed=noise.step_seed(self.sampling.seed, step))

        def minus(batch: Batch) -> Tensor:
            values = self.values(scorer.examples(batch), scorer.predict(batch, sampling))
            return -torch.tensor(values, device=batch["row"].device)

        return minus

    def values(self, examples: Sequence[Example], predictions: list[str]) -> list[float] | float:
        """The metric of each row, or of all.

        Raises:
            UserError: the function raises, or returns something else; naming the row where it can be known.
        """
        if self._function is None:
            return self._metric(examples, predictions)
        references = [
            [joined(answer) for answer in example.answers] or [example.label]
            for example in examples
        ]
        where = f"{examples[0].where} and {len(examples) - 1} more" if examples else "no rows"
        try:
            found = self._function(list(predictions), references)
        except Exception as error:
            raise UserError(
                f"--objective {self.name} raised {type(error).__name__}: {' '.join(str(error).split())} "
                f"(rows: {self._culprit(examples, predictions, references) or where})"
            ) from error
        return self._numbers(found, examples, where)

    def score(self, examples: Sequence[Example], predictions: list[str]) -> float:
        """The metric of a whole set."""
        values = self.values(examples, predictions)
        return values if isinstance(values, float) else math.fsum(values) / len(values)

    def _metric(self, examples: Sequence[Example], predictions: list[str]) -> list[float] | float:
        if self.task.kind != "classification":
            one = BY_ROW[self.name]
            return [one(p, e.answers) for p, e in zip(predictions, examples, strict=True)]
        if self.name == "accuracy":
            return [float(p == e.label) for p, e in zip(predictions, examples, strict=True)]
        asked = replace(self.task, metrics=(self.name,))  # which need not be one of its own
        return figures(asked, examples, predictions)[self.name]

    def _numbers(self, found: Any, examples: Sequence[Example], where: str) -> list[float] | float:
        if isinstance(found, Tensor):
            found = found.detach().tolist()
        if hasattr(found, "tolist"):  # numpy
            found = found.tolist()
        if isinstance(found, bool | int | float):
            if _is_usable(found):
                return float(found)
            raise UserError(
                f"--objective {self.name} returned {found} (rows: {where}): it must be {_USABLE}"
            )
        if not isinstance(found, list | tuple) or len(found) != len(examples):
            shape = (
                f"{len(found)} values" if isinstance(found, list | tuple) else type(found).__name__
            )
            raise UserError(
                f"--objective {self.name} returned {shape} for {len(examples)} rows: it must return one number a "
                "row, or one for all"
            )
        values = [_plain(value) for value in found]
        for example, value in zip(examples, values, strict=True):
            if not isinstance(value, bool | int | float) or not _is_usable(value):
                raise UserError(
                    f"--objective {self.name} returned {value!r} for {example.where}: it must be {_USABLE}"
                )
        return [float(value) for value in values]

    def _culprit(
        self, examples: Sequence[Example], predictions: list[str], references: References
    ) -> str | None:
        """The first row that the function cannot take by itself."""
        assert self._function is not None
        for example, prediction, reference in zip(examples, predictions, references, strict=True):
            try:
                self._function([prediction], [reference])
            except Exception:
                return example.where
        return None


def _plain(value: Any) -> Any:
    """A number of torch or numpy as one of Python's; of several at once the list."""
    if not hasattr(value, "tolist"):
        return value
    several = value.tolist()
    return several[0] if isinstance(several, list) and len(several) == 1 else several


_MOST = torch.finfo(torch.float32).max
_USABLE = "a finite number that float32 holds"


def _is_usable(value: float) -> bool:
    """Whether a look can be told it: looks count in float32."""
    return abs(value) <= _MOST  # also of an int beyond all floats; nan is not


def _load(name: str) -> Function:
    place, _, attribute = name.rpartition(":")
    try:
        if place.endswith(".py"):
            path = Path(place)
            if not path.is_file():
                raise UserError(f"--objective is {name!r}: there is no file {place}")
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules.setdefault(path.stem, module)  # dataclasses look their module up
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"--objective is {name!r}: {place} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(f"--objective is {name!r}: {place} has no function {attribute!r}")
    found: Function = function
    return found
