"""Rules: projected gradients in, coefficients out. They see scalars only.

A rule is a chain of transformations of the K projected gradients of a step, written `"rms+clip(3)+momentum"`.
The optimizer turns the result s into coefficients c_k = -lr s_k / K. Transformations that normalise multiply by
sqrt(K), so that lr is the rms distance a coordinate moves in a step, whatever the number of directions.

At the end of a chain stands at most one rule that looks back along past directions: `momentum`, or one of those
with moments (`adam`, `rmsprop`), which take the gradient estimate (1 / K) sum_k s_k z_k element by element. These
are carried out where the weights are (`moments`).
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

from justforward.errors import UserError

State = tuple[float, ...]


@dataclass(frozen=True)
class Rule:
    """One transformation. Subclasses say how many scalars of state they keep between steps (all in the log)."""

    state_size: ClassVar[int] = 0

    def __call__(
        self, grads: Sequence[float], state: State, step: int
    ) -> tuple[list[float], State]:
        """Transform the projected gradients of a step.

        Args:
            grads: one number a direction.
            state: what the previous step returned; zeros at step 0.
            step: index of the step.
        """
        return list(grads), state


@dataclass(frozen=True)
class Sgd(Rule):
    """The paper's rule (Algorithm 1): the projected gradients as they are."""


@dataclass(frozen=True)
class Rms(Rule):
    """Divide by the running root mean square of the projected gradients, with Adam's bias correction."""

    beta: float = 0.9
    state_size: ClassVar[int] = 1

    def __call__(
        self, grads: Sequence[float], state: State, step: int
    ) -> tuple[list[float], State]:
        """See `Rule`."""
        square = sum(g * g for g in grads) / len(grads)
        mean = self.beta * state[0] + (1.0 - self.beta) * square
        rms = math.sqrt(mean / (1.0 - self.beta ** (step + 1)))
        scale = math.sqrt(len(grads)) / rms if rms > 0.0 else 0.0
        return [g * scale for g in grads], (mean,)


@dataclass(frozen=True)
class Sign(Rule):
    """The sign of each projected gradient."""

    def __call__(
        self, grads: Sequence[float], state: State, step: int
    ) -> tuple[list[float], State]:
        """See `Rule`."""
        root = math.sqrt(len(grads))
        return [math.copysign(root, g) if g != 0.0 else 0.0 for g in grads], state


@dataclass(frozen=True)
class Spread(Rule):
    """Divide by the standard deviation of the projected gradients of this step alone, over its directions.

    FZOO (arXiv 2506.09034, section 3) with one-sided looks along Rademacher directions: where the loss is steep in some directions
    and not in others the step is shorter, and no state is kept. It takes several directions: one-sided looks have
    them for one forward each and one for all.
    """

    def __call__(
        self, grads: Sequence[float], state: State, step: int
    ) -> tuple[list[float], State]:
        """See `Rule`.

        Raises:
            UserError: the step has one direction.
        """
        count = len(grads)
        if count < 2:
            raise UserError(
                "rule spread: it compares the directions of a step, and this one has 1: take several (num_samples=8, "
                "looks='one-sided')"
            )
        mean = math.fsum(grads) / count
        spread = math.sqrt(math.fsum((g - mean) ** 2 for g in grads) / (count - 1))
        scale = math.sqrt(count) / spread if spread > 0.0 else 0.0
        return [g * scale for g in grads], state


@dataclass(frozen=True)
class Clip(Rule):
    """Limit the root mean square over directions to `limit` (as gradient clipping limits the norm).

    Alone it is in units of the loss a unit of z; after `rms` in units of a normal step.
    """

    limit: float = 1.0

    def __call__(
        self, grads: Sequence[float], state: State, step: int
    ) -> tuple[list[float], State]:
        """See `Rule`."""
        rms = math.sqrt(sum(g * g for g in grads) / len(grads))
        scale = min(1.0, self.limit / rms) if rms > 0.0 else 1.0
        return [g * scale for g in grads], state


@dataclass(frozen=True)
class Momentum(Rule):
    """Each direction is followed for `window` steps with weight beta^age: a heavy ball without a buffer.

    Not a transformation of one step's scalars: the optimizer and replay read it off the chain, and take the
    past coefficients, which are in the log, along their regenerated directions again. A step's update makes
    `window` times as much noise.
    """

    beta: float = 0.9
    window: int = 20


@dataclass(frozen=True)
class Adam(Rule):
    """MeZO-Adam (arXiv 2305.17333, appendix B.2), its moments made again from the log instead of kept.

    With gradient estimates g_i = (1 / K) sum_k s_ik z_ik, element by element over the last n = min(t + 1, window)
    steps:

        m = sum_i beta1^(t-i) g_i   / sum_i beta1^(t-i)
        v = sum_i beta2^(t-i) g_i^2 / sum_i beta2^(t-i)
        theta <- theta - lr m / (sqrt(v) + eps)

    Dividing by the sum of the weights in use is Adam's own bias correction, 1 / (1 - beta^(t+1)), for as long as
    t < window: until then this is Adam exactly. From then on v is over `window` steps however large beta2 is:
    with the defaults 0.99^20 = 0.82, nearly their plain mean. A step's update makes `window` times as much noise and
    takes no memory; a replay makes it once. `window=0` keeps both sums instead, a float32 each for every
    weight: Adam without truncation, in three times the memory.
    """

    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    window: int = 20


@dataclass(frozen=True)
class RmsProp(Rule):
    """`Adam` with beta1 = 0: this step's gradient estimate over the root of v."""

    beta2: float = 0.99
    eps: float = 1e-8
    window: int = 20


KINDS: dict[str, type[Rule]] = {
    "sgd": Sgd,
    "rms": Rms,
    "sign": Sign,
    "spread": Spread,
    "clip": Clip,
    "momentum": Momentum,
    "adam": Adam,
    "rmsprop": RmsProp,
}

# What a parameter may be: "name.parameter" where a rule has bounds of its own. Betas stay below 1 in float32 too.
_ALLOWED: dict[str, tuple[Callable[[float], bool], str]] = {
    "beta": (lambda x: 0.0 <= x < 1.0, "in [0, 1)"),
    "beta1": (lambda x: 0.0 <= x <= 0.999999, "in [0, 0.999999]"),
    "beta2": (lambda x: 0.0 <= x <= 0.999999, "in [0, 0.999999]"),
    "eps": (lambda x: 1e-30 <= x <= 1e30, "in [1e-30, 1e30]"),
    "limit": (lambda x: 0.0 < x < math.inf, "positive and finite"),
    "window": (lambda x: x.is_integer() and 0 <= x <= 1000, "a whole number, 0 to 1000"),
    "momentum.window": (
        lambda x: x.is_integer() and 1 <= x <= 1000,
        "a whole number, 1 to 1000",
    ),
}


@dataclass(frozen=True)
class Chain:
    """Rules one after the other.

    Attributes:
        spec: the text it was made from, with all parameters spelled out.
        rules: the transformations in order.
        momentum: the window, if the chain has one.
        moments: what is done with moments, if the chain ends so (rmsprop as the `Adam` that it is).
    """

    spec: str
    rules: tuple[Rule, ...]
    momentum: Momentum | None = None
    moments: Adam | None = None

    @property
    def state_size(self) -> int:
        """Scalars kept between steps."""
        return sum(rule.state_size for rule in self.rules)

    def __call__(
        self, grads: Sequence[float], state: State, step: int
    ) -> tuple[list[float], State]:
        """Apply all rules; state is the concatenation of theirs."""
        values = list(grads)
        after: State = ()
        at = 0
        for rule in self.rules:
            values, new = rule(values, state[at : at + rule.state_size], step)
            after += new
            at += rule.state_size
        return values, after


def parse(spec: str) -> Chain:
    """Read `"rms"`, `"rms(beta=0.95)+clip(3)+momentum(0.9, window=10)"` and the like.

    Raises:
        UserError: an unknown rule or parameter, a value out of range, or two rules that look back.
    """
    rules: list[Rule] = []
    last: Rule | None = None
    for part in re.split(r"\+(?![^()]*\))", str(spec)):  # not within parentheses: 1e+16
        match = re.fullmatch(r"\s*([A-Za-z0-9_]+)\s*(?:\((.*)\))?\s*", part)
        if match is None or match[1] not in KINDS:
            raise UserError(
                f"rule {spec!r}: {part.strip()!r} is unknown; known are {', '.join(KINDS)}, "
                "joined by '+', with parameters as in 'rms(beta=0.9)'"
            )
        rule = _build(spec, match[1], match[2] or "")
        if not isinstance(rule, (Momentum, Adam, RmsProp)):
            rules.append(rule)
        elif last is None:
            last = rule
        else:
            both = f"{_name(last)} and {match[1]} are both there"
            if type(last) is type(rule):
                both = f"{match[1]} is there twice"
            raise UserError(f"rule {spec!r}: {both}; keep one")
    return Chain(
        "+".join(_spell(rule) for rule in (*rules, *([last] if last else []))),
        tuple(rules),
        momentum=last if isinstance(last, Momentum) else None,
        moments=Adam(0.0, last.beta2, last.eps, last.window)
        if isinstance(last, RmsProp)
        else last
        if isinstance(last, Adam)
        else None,
    )


def _build(spec: str, name: str, arguments: str) -> Rule:
    kind = KINDS[name]
    values: dict[str, float | int] = {}
    names = [field.name for field in fields(kind)]
    for place, argument in enumerate(a for a in arguments.split(",") if a.strip()):
        key, _, text = argument.rpartition("=")
        key = key.strip() or (names[place] if place < len(names) else "?")
        if key not in names:
            known = str(inspect.signature(kind)).split(" ->")[0]
            raise UserError(
                f"rule {spec!r}: {name} has no parameter {argument.strip()!r}; it is {name}{known}"
            )
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        good, allowed = _ALLOWED.get(f"{name}.{key}") or _ALLOWED[key]
        if not good(value):
            raise UserError(
                f"rule {spec!r}: {name}'s {key} is {text.strip()!r}: it must be {allowed}"
            )
        values[key] = int(value) if key == "window" else value
    return kind(**values)


def _name(rule: Rule) -> str:
    return next(key for key, kind in KINDS.items() if kind is type(rule))


def _spell(rule: Rule) -> str:
    name = _name(rule)
    parameters = ", ".join(f"{field.name}={getattr(rule, field.name)!r}" for field in fields(rule))
    return f"{name}({parameters})" if parameters else name
