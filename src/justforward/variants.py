"""Variants of the step, as settings: kinds of look, blocks, modified estimates. No torch in here.

What they do is in `estimators` (looks), `modified` (how d is measured) and `optim` (lengths and scales of the groups).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any

from justforward.errors import UserError
from justforward.rules import Chain

# Of a private step's noise multiplier: less than the first protects nobody.
LEAST_NOISE, MOST_NOISE = 0.1, 1e6
LOOKS = ("two-sided", "one-sided", "one-point")
FORMS = ("variance", "expectation")
SOURCES = ("weights", "looks", "gradient")
PARTS = ("layer", "tensor")
ORDERS = ("cyclic", "random", "given")

_EMBEDDING = re.compile(r"embed|wte|wpe|(^|\.)shared\.")


def forwards_of(looks: str, samples: int) -> int:
    """Passes over the batch of a step with so many directions (for each row in activation space)."""
    return {"two-sided": 2 * samples, "one-sided": samples + 1, "one-point": samples}[looks]


def sample_schedule(num_samples: int | Callable[[int], int]) -> Callable[[int], int]:
    """`num_samples` as a function of the step.

    Raises:
        UserError: it is neither that nor a number of at least 1.
    """
    if callable(num_samples):
        return num_samples
    if not isinstance(num_samples, Integral) or num_samples < 1:
        raise UserError(
            f"num_samples is {num_samples!r}: it must be a whole number, at least 1, or a function of the step"
        )
    count = int(num_samples)
    return lambda step: count


def sample_count(schedule: Callable[[int], int], step: int) -> int:
    """Directions of a step.

    Raises:
        UserError: the schedule gives no whole number of at least 1.
    """
    samples = schedule(step)
    if not isinstance(samples, Integral) or samples < 1:
        raise UserError(
            f"num_samples gave {samples!r} at step {step}: it must be a whole number, at least 1"
        )
    return int(samples)


def linear_samples(first: int, last: int, steps: int) -> Callable[[int], int]:
    """A sample schedule for `num_samples`: from `first` to `last` directions over so many steps, then `last`."""
    if not (first >= 1 and last >= 1 and steps >= 1):
        raise UserError(f"linear_samples({first}, {last}, {steps}): all must be at least 1")

    def schedule(step: int) -> int:
        return round(first + (last - first) * min(step / steps, 1.0))

    return schedule


@dataclass(frozen=True)
class Modified:
    """An estimate that looks along unlike tensors at unlike lengths (arXiv 2305.17333, appendix B).

    With D = diag(d), one d for each layer or tensor:

        variance     (Definition 6)  look along D^-1 z, move along D z: unbiased, with another variance
        expectation  (Definition 7)  look along D^-1 z, move along z: on average D^-1 times the gradient; with the
                                     gradient's norms for d the gradient normalised layer by layer

    Args:
        form: "variance" or "expectation".
        by: what d is: "weights", the root mean square of the weights; "looks", the norm of the gradient by `samples`
            two-sided looks along each part alone; "gradient", the same by one backward pass, which takes the memory
            of backpropagation and a loss that torch can differentiate, and counts as three forwards.
        per: what has a d of its own: a "layer" (the embeddings are one, and the head), or a "tensor". Parameter groups
            are divided further.
        every: steps between measurements; None: once, at the first step.
        samples: looks for each part.

    d is taken relative to the smallest, so that the longest look is eps; what is smaller than a hundredth of the
    largest (biases of zero, say) counts as that. In the expectation form lr is therefore that of the part with the
    smallest d; the others move less far.

    Raises:
        UserError: an argument is out of range or unknown.
    """

    form: str = "variance"
    by: str = "weights"
    per: str = "layer"
    every: int | None = None
    samples: int = 1

    def __post_init__(self) -> None:
        for key, known in (("form", FORMS), ("by", SOURCES), ("per", PARTS)):
            value = getattr(self, key)
            if value not in known:
                raise UserError(
                    f"modified: {key} is {value!r}: it must be one of {', '.join(known)}"
                )
        for key in ("every", "samples"):
            value = getattr(self, key)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not (whole and 1 <= value <= 10**6) and (key != "every" or value is not None):
                raise UserError(
                    f"modified: {key} is {value!r}: it must be a whole number, 1 to 1000000"
                )

    @classmethod
    def parse(cls, text: str) -> Modified:
        """Read `"variance"`, `"expectation(looks, every=100)"` and the like.

        Raises:
            UserError: it is not spelled so, or as for the class.
        """
        match = re.fullmatch(r"\s*(\w+)\s*(?:\((.*)\))?\s*", text)
        names = [field.name for field in fields(cls)]
        values: dict[str, Any] = {}
        arguments = match[2] or "" if match else ""
        for place, argument in enumerate(a for a in arguments.split(",") if a.strip()):
            key, _, value = (part.strip() for part in argument.rpartition("="))
            key = key or names[place + 1 : place + 2][0] if place + 1 < len(names) else key
            if key not in names[1:] or key in values:
                match = None
                break
            values[key] = int(value) if value.isdecimal() else value
        if match is None:
            raise UserError(
                f"modified is {text!r}: it must be variance or expectation, with parameters as in "
                "'variance(by=weights, per=layer, every=100, samples=1)'"
            )
        return cls(match[1], **values)

    def labels(self, names: Sequence[Sequence[str]]) -> list[list[str]]:
        """The part of each parameter, by group.

        Raises:
            UserError: there is one part only.
        """
        whole = self.per == "tensor"
        labels = [[name if whole else layer_of(name) for name in called] for called in names]
        found = {label for marked in labels for label in marked}
        if len(found) < 2:
            raise UserError(
                f"modified: there is one {self.per} only, {found.pop()!r}: leave modified out"
            )
        return labels

    def due(self, step: int) -> bool:
        """Whether d is measured at this step."""
        return step == 0 or (self.every is not None and step % self.every == 0)

    def forwards(self, step: int, parts: int) -> int:
        """Forwards that a step takes for measuring."""
        if not self.due(step):
            return 0
        return {"weights": 0, "looks": 2 * self.samples * parts, "gradient": 3}[self.by]

    def forwards_until(self, steps: int, parts: int) -> int:
        """Forwards that the first `steps` steps take for measuring."""
        times = 1 + (steps - 1) // self.every if self.every else 1
        return times * self.forwards(0, parts) if steps else 0

    def gain(self, norm: float) -> float:
        """How far a part moves along z, having looked 1 / norm far."""
        return norm if self.form == "variance" else 1.0

    def settings(self) -> dict[str, Any]:
        """What the log says of it."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Blocks:
    """Block-wise steps: each looks along and moves one block of tensors, the others rest.

    A look then disturbs fewer weights, so its estimate has the variance of the block's dimension, and the sweeps over
    the weights take the block's part of their time. The forward passes cost what they cost.

    Args:
        by: "layers": every transformer layer is a block, found by the number in its parameters' names, the
            embeddings are one, and all the rest is one, the head; or regular expressions, one a block: a tensor is
            of the first that is found in its name.
        order: "cyclic": in turn, in the order of their first tensors; "random": drawn at each step from the run's
            seed; "given": the one that `MeZO.block` names, by its pattern or its layer, at first the first.

    Raises:
        UserError: `by` or `order` is unknown.
    """

    by: str | Sequence[str] = "layers"
    order: str = "cyclic"

    def __post_init__(self) -> None:
        if isinstance(self.by, str):
            if self.by != "layers":
                raise UserError(
                    f'blocks: by is {self.by!r}: it must be "layers" or a list of regular expressions'
                )
        else:
            object.__setattr__(self, "by", tuple(self.by))
            for pattern in self.by:
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise UserError(
                        f"blocks: {pattern!r} is not a regular expression: {error}"
                    ) from None
        if self.order not in ORDERS:
            raise UserError(
                f"blocks: order is {self.order!r}: it must be one of {', '.join(ORDERS)}"
            )

    @classmethod
    def parse(cls, text: str, order: str = "cyclic") -> Blocks:
        """Read `"layers"`, or regular expressions with spaces between them.

        Raises:
            UserError: as for the class.
        """
        return cls(text.strip() if text.strip() == "layers" else text.split(), order)

    def labels(self, names: Sequence[Sequence[str]]) -> list[list[str]]:
        """The block of each parameter, by group.

        Raises:
            UserError: a parameter is in no block, a pattern finds none, or there is one block only.
        """
        if isinstance(self.by, str):
            labels = [[layer_of(name) for name in called] for called in names]
        else:
            labels = [[_pattern_of(name, self.by) for name in called] for called in names]
        found = {label for marked in labels for label in marked}
        for pattern in () if isinstance(self.by, str) else self.by:
            if pattern not in found:
                raise UserError(
                    f"blocks: the pattern {pattern!r} finds no parameter that those before it leave: remove it"
                )
        if len(found) < 2:
            raise UserError(
                f"blocks: all parameters are in one block, {found.pop()!r}: give patterns, or leave blocks out"
            )
        return labels

    def shape(
        self, block_of: Sequence[int], step: int, drawn: int, given: int = 0
    ) -> list[tuple[float, float]]:
        """For each group, how far a step looks and moves: 1 in the block whose turn it is, 0 in the others.

        Args:
            block_of: of each group, which block it is of.
            step: index of the step.
            drawn: a random number, for a random order.
            given: the block whose turn it is, for one that is given.
        """
        number = {"random": drawn, "given": given}.get(self.order, step)
        turn = number % (max(block_of) + 1)
        return [(float(block == turn),) * 2 for block in block_of]

    def settings(self) -> dict[str, Any]:
        """What the log says of it."""
        return {"by": self.by if isinstance(self.by, str) else list(self.by), "order": self.order}


def settings_of(estimator: str, looks: str, **parts: Any) -> dict[str, Any]:
    """What the log says besides; an option that is not used is left out, so that older logs can be resumed."""
    out: dict[str, Any] = {"estimator": estimator}
    if looks != "two-sided":
        out["looks"] = looks
    return out | {name: part.settings() for name, part in parts.items() if part is not None}


def check_variants(
    looks: str,
    estimator: str,
    rule: Chain,
    modified: Modified | None,
    blocks: Blocks | None,
) -> None:
    """Refuse what is unknown or does not go together.

    Raises:
        UserError: naming it, or both.
    """
    if looks not in LOOKS:
        raise UserError(f"looks is {looks!r}: it must be one of {', '.join(LOOKS)}")
    if looks == "one-point" and estimator == "activation":
        raise UserError(
            "looks is 'one-point' with estimator 'activation': the losses of a step's rows say nothing of those of the "
            "next: choose 'one-sided', or estimator 'weight'"
        )
    for name, value, kind in (("modified", modified, Modified), ("blocks", blocks, Blocks)):
        if value is not None and not isinstance(value, kind):
            raise UserError(f"{name} is {value!r}: it must be a justforward.{kind.__name__}")
    if blocks is not None and modified is not None:
        raise UserError("blocks and modified are both given: choose one")
    if blocks is not None and (rule.momentum or rule.moments):
        raise UserError(
            f"blocks with rule {rule.spec!r}: its past directions are of blocks that rest now: choose a rule without "
            "momentum or moments"
        )


def undivided(looks: str, modified: object) -> str | None:
    """What makes an estimate see all its rows at once, if anything does: "looks one-point" or "modified"."""
    given = {"looks one-point": looks == "one-point", "modified": modified}
    return next((name for name, value in given.items() if value), None)


def check_shared(
    looks: str, modified: Modified | None, private: object, sharded: bool = False
) -> None:
    """Refuse estimates of which workers cannot do a part each.

    Raises:
        UserError: looks are one-point, or the estimate is modified or private, or the weights are in shards.
    """
    if private:
        raise UserError(
            "look, combine: private estimates cannot be shared: what is seen of a row has no noise yet, and noise is added once: "
            "let justforward.Workers take the steps, in processes that are all yours"
        )
    if sharded:
        raise UserError(
            "look, Workers: of a model in shards each process has parts alone: call opt.step in all, its loss is their mean"
        )
    if undivided(looks, modified):
        raise UserError(
            "look, combine: modified and one-point estimates cannot be shared by workers"
        )


def layer_of(name: str) -> str:
    """The layer that a parameter belongs to: its name up to the first number (model.layers.3 of
    model.layers.3.mlp.up_proj.weight); "embeddings"; or "head", which is all the rest."""
    match = re.match(r"(?:.*?\.)??\d+(?=\.|$)", name)
    if match:
        return match[0]
    return "embeddings" if _EMBEDDING.search(name) else "head"


def _pattern_of(name: str, patterns: Sequence[str]) -> str:
    for pattern in patterns:
        if re.search(pattern, name):
            return pattern
    raise UserError(
        f"blocks: none of the patterns {', '.join(map(repr, patterns))} finds parameter {name}: add one that does, "
        "or freeze the parameter"
    )
