"""`MeZO`: a torch optimizer that looks along random directions instead of backpropagating.

estimate(closure) -> Step     look: losses at +eps and -eps; the weights end up bit-identical
apply(step)                   move: one pass over the weights
step(closure)                 both, with one pass fewer; the same bits
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from justforward import noise, rules
from justforward.directions import FAMILIES, Weights
from justforward.errors import UserError
from justforward.estimators import (
    Draws,
    Pairs,
    RowLooks,
    Site,
    describe,
    look_weights,
    looking_mode,
)
from justforward.interrupts import Shield
from justforward.playback import apply_steps, check_base, fingerprint, header_for
from justforward.trajectory import Course, Log, Step, Writer, read_log, rounded

Closure = Callable[[], Any]
LossFn = Callable[[Any], Tensor]
ESTIMATORS = ("weight", "activation")
LONGEST_EPS = 100.0


class MeZO(Optimizer):
    """Memory-efficient zeroth-order optimizer (arXiv 2305.17333, Algorithm 1), and beyond it.

    Args:
        params: a model (best: its names go into the log and it is put in eval mode while looking), or
            parameters, or named parameters, or parameter groups with their own `lr`, `eps`, `weight_decay`.
            Only those with requires_grad are tuned. Weights are rounded to their grid here (by less than
            2^-23 of the largest of each 1,024 neighbours), never again after.
        lr: learning rate. For the plain rule the paper's 1e-6; rules that normalise ("rms", "sign") move a
            coordinate by about lr a step.
        eps: how far to look, in units of z.
        estimator: "weight", the paper's: one dense z shared by the batch, any closure with a scalar loss; or
            "activation": a rank-one z for each example, weights untouched while looking; the closure
            returns one loss a row.
        rule: "sgd", "rms", "sign", "clip", "momentum", or several joined by "+" (see `rules`).
        family: "gaussian" (default), "rademacher", "rank1", "rank1-rademacher". In activation space
            directions are always rank-one, and this names the distribution of their factors.
        num_samples: directions a step (n of n-SPSA) for each closure or example; or a function of the
            step's index (`linear_samples`).
        weight_decay: decoupled, times lr; skips biases and norm scales.
        seed: of all directions of the run.
        model: the module, when `params` is not one: for names, eval mode and the log.
        two_calls: activation space with a batch: call loss_fn once for each sign and sample instead of once
            for all (a half or less of the activation memory; the same numbers within rounding).
        check_rows: activation space: at the first step, make sure (two more forwards, once) that looking
            along one row's direction leaves the losses of other rows alone.
        log: file to append every step to.
        resume: continue the log if the file exists: the model must be the base; its steps are replayed.

    Raises:
        UserError: an argument is out of range or unknown, or a parameter cannot be tuned.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-6,
        eps: float = 1e-3,
        *,
        estimator: str = "weight",
        rule: str = "sgd",
        family: str | None = None,
        num_samples: int | Callable[[int], int] = 1,
        weight_decay: float = 0.0,
        seed: int = 0,
        model: nn.Module | None = None,
        two_calls: bool = False,
        check_rows: bool = True,
        log: str | os.PathLike[str] | None = None,
        resume: bool = False,
    ) -> None:
        if estimator not in ESTIMATORS:
            raise UserError(
                f"estimator is {estimator!r}: it must be one of {', '.join(ESTIMATORS)}"
            )
        self.estimator = estimator
        self.family = family_of(family, estimator)
        self.rule = rules.parse(rule)
        self.seed = seed
        self.model = params if isinstance(params, nn.Module) else model
        if not callable(num_samples) and (not isinstance(num_samples, int) or num_samples < 1):
            raise UserError(
                f"num_samples is {num_samples!r}: it must be a whole number, at least 1, or a function of the step"
            )
        if not isinstance(seed, int) or not 0 <= seed < 2**64:
            raise UserError(
                f"seed is {seed!r}: it must be a whole number, at least 0 and below 2^64"
            )
        self._samples = (lambda step: num_samples) if isinstance(num_samples, int) else num_samples

        groups, names = _groups(params, self.model)
        super().__init__(groups, {"lr": lr, "eps": eps, "weight_decay": weight_decay})
        for group in self.param_groups:
            _check_positive(group)
        base = ""
        if log is not None:
            if self.model is None:
                raise UserError(
                    "log: the log names the model's parameters: pass the model (or model=...)"
                )
            # A log that exists must not cost the model its exact base values: look before the grid is laid.
            if not resume and os.path.exists(log):
                raise UserError(
                    f"{log}: the log exists: resume it (resume=True) or choose another name"
                )
            if not os.path.isdir(os.path.dirname(log) or "."):
                raise UserError(f"{log}: there is no folder {os.path.dirname(log)}: make it first")
            base = fingerprint(self.model)
        old = read_log(log) if log is not None and resume and os.path.exists(log) else None
        if old is not None and self.model is not None:
            check_base(self.model, old)

        tensors = [p for group in self.param_groups for p in group["params"]]
        if not tensors:
            raise UserError("there is nothing to tune: no parameter has requires_grad")
        owners = [g for g, group in enumerate(self.param_groups) for _ in group["params"]]
        looks = [group["eps"] for group in self.param_groups]
        self.weights = Weights(
            list(zip(names, tensors, strict=True)), owners, FAMILIES[self.family], looks
        )
        self._longest = looks
        momentum = self.rule.momentum
        self._course = Course(seed, momentum.beta, momentum.window) if momentum else Course(seed)
        self._rule_state: tuple[float, ...] = (0.0,) * self.rule.state_size
        self._scales = (1.0,) * len(looks)
        self._row_looks = RowLooks(two_calls, check_rows)
        self.steps = 0
        self._writer: Writer | None = None
        if log is not None:
            header = header_for(
                self.weights,
                seed=seed,
                family=self.family,
                eps=looks,
                rule=self.rule.spec,
                rule_state=self.rule.state_size,
                momentum=(momentum.beta, momentum.window) if momentum else (0.0, 1),
                base=base,
                settings={"estimator": estimator},
            )
            if old is not None:
                self._continue(old, header)
            else:
                self._writer = Writer.create(log, header)

    # -- looking ----------------------------------------------------------------------------------------------

    def estimate(self, closure: Closure | LossFn, batch: Any = None) -> Step:
        """Look along this step's directions.

        Args:
            closure: without `batch`, a function of nothing: a scalar loss (weight space; one loss a row is
                averaged) or one loss a row (activation space). With `batch`, `loss_fn(batch)`, one loss a row.
            batch: tensors nested in dicts, lists, tuples, rows first. In activation space all signs and
                samples go through loss_fn as rows of one batch.

        Returns:
            What `apply` would do. The weights are bit-identical to before, whatever happened.

        Raises:
            NonFiniteLoss: a loss was NaN or infinite.
            UserError: the closure's result or the model does not fit the estimator.
        """
        with Shield() as shield:
            return self._estimate(closure, batch, shield, keep_back=False)[0]

    def apply(self, step: Step) -> None:
        """Write the step to the log, then move the weights.

        Raises:
            UserError: the step is not the next one, or the log cannot be written (the weights have not moved).
        """
        with Shield():
            self._apply(step, None, None)

    def step(self, closure: Any = None, batch: Any = None) -> float:  # type: ignore[override]
        """`apply(estimate(closure, batch))` with one pass over the weights fewer.

        Returns:
            The mean loss of all looks.

        Raises:
            As `estimate` and `apply`.
        """
        if closure is None:
            raise UserError(
                "step() needs a closure that returns the loss: step(closure) or step(loss_fn, batch)"
            )
        with Shield() as shield:
            step, back, draws = self._estimate(closure, batch, shield, keep_back=True)
            try:
                self._apply(step, back, draws)
            except BaseException:
                if back is not None and self.steps == step.index:
                    self.weights.look(
                        self._direction(step.index, len(step.coefficients) - 1), back, 1.0
                    )
                raise
        return step.loss

    def _estimate(
        self, closure: Any, batch: Any, shield: Shield, keep_back: bool
    ) -> tuple[Step, list[float] | None, Draws | None]:
        eps = self._eps()
        samples = self._samples(self.steps)
        if not isinstance(samples, int) or samples < 1:
            raise UserError(
                f"num_samples gave {samples!r} at step {self.steps}: it must be a whole number, at least 1"
            )
        site = Site(
            self.weights,
            self.steps,
            lambda lane: noise.direction_seed(self.seed, self.steps, lane),
            eps,
            shield,
        )
        back: list[float] | None = None
        draws: Draws | None = None
        with looking_mode(self.model):
            if self.estimator == "weight":
                losses = look_weights(site, closure, batch, samples, keep_back)
                back = eps if keep_back else None
            else:
                losses, draws = self._row_looks.look(site, closure, batch, samples)
        try:
            grads = [(plus - minus) / (2.0 * eps[0]) for plus, minus in losses]
            return self._step_from(losses, grads, samples), back, draws
        except BaseException:
            if back is not None:
                self.weights.look(self._direction(self.steps, samples - 1), eps, 1.0)
            raise

    # -- moving -----------------------------------------------------------------------------------------------

    def _step_from(self, losses: Pairs, grads: list[float], samples: int) -> Step:
        signal, state = self.rule(grads, self._rule_state, self.steps)
        rates = [float(group["lr"]) for group in self.param_groups]
        lr = max(rates)
        eps = self._eps()
        scales = self._scales
        if lr > 0.0:
            scales = tuple(
                rounded(rate / lr * eps[0] / e) for rate, e in zip(rates, eps, strict=True)
            )
        return Step(
            index=self.steps,
            coefficients=tuple(rounded(-lr * s / len(signal)) for s in signal),
            scales=scales,
            decays=tuple(
                rounded(rate * group["weight_decay"])
                for rate, group in zip(rates, self.param_groups, strict=True)
            ),
            rule_state=tuple(rounded(s) for s in state),
            loss=math.fsum(p + m for p, m in losses) / (2 * len(losses)),
            projected_grads=tuple(grads),
            forwards=2 * samples,
        )

    def _apply(self, step: Step, back: list[float] | None, draws: Draws | None) -> None:
        if step.index != self.steps:
            raise UserError(f"step {step.index} cannot be applied: the next step is {self.steps}")
        if self._writer is not None:
            self._writer.append(step)
        move = self._course.move(step)
        # What was drawn are this step's directions only: momentum brings older ones.
        self.weights.update([move], back, draws if self.rule.momentum is None else None)
        self._rule_state = step.rule_state
        self._scales = step.scales
        self.steps += 1
        self._opt_called = True  # torch's schedulers ask for it: a step may be taken without `step`

    def _eps(self) -> list[float]:
        values = [float(group["eps"]) for group in self.param_groups]
        for value, longest in zip(values, self._longest, strict=True):
            if not 0.0 < value <= longest:
                raise UserError(
                    f"eps is {value}: it must be positive and at most {longest}, the eps that the optimizer was made "
                    "with and its grid is laid for"
                )
        return values

    def _direction(self, step: int, lane: int) -> int:
        return noise.direction_seed(self.seed, step, lane)

    # -- keeping ----------------------------------------------------------------------------------------------

    def _continue(self, log: Log, header: dict[str, Any]) -> None:
        for key, value in header.items():
            if log.header[key] != value:
                raise UserError(
                    f"{log.path}: cannot be resumed: {key} is {_short(log.header[key])} in the log and {_short(value)} now"
                )
        self._course = log.course()
        self.steps = apply_steps(self.weights, self._course, log.steps)
        if log.steps:
            self._rule_state = log.steps[-1].rule_state
            self._scales = log.steps[-1].scales
        self._writer = Writer.resume(log)

    def close(self) -> None:
        """Seal and close the log."""
        if self._writer is not None:
            self._writer.close()

    def state_dict(self) -> dict[str, Any]:
        """torch's, with what this optimizer keeps: a few scalars and the grids (a byte for 1,024 weights)."""
        return {
            **super().state_dict(),
            "justforward": {
                "steps": self.steps,
                "seed": self.seed,
                "family": self.family,
                "rule": self.rule.spec,
                "rule_state": self._rule_state,
                "scales": self._scales,
                "past": list(self._course.past),
                "exponents": [exponents.clone() for exponents in self.weights.exponents],
            },
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; the weights themselves are the model's and must be those it was saved with.

        Raises:
            UserError: the state is not of this optimizer, or of another seed, family or rule, or other tensors.
        """
        own = state_dict.get("justforward")
        if own is None:
            raise UserError("load_state_dict: not the state of a MeZO optimizer")
        for key, here in (("seed", self.seed), ("family", self.family), ("rule", self.rule.spec)):
            if own[key] != here:
                raise UserError(
                    f"load_state_dict: the {key} is {own[key]} in the state and {here} here"
                )
        shapes = [tuple(e.shape) for e in own["exponents"]]
        if shapes != [tuple(e.shape) for e in self.weights.exponents]:
            raise UserError("load_state_dict: the state is of other tensors")
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "justforward"})
        self.steps = own["steps"]
        self._rule_state = tuple(own["rule_state"])
        self._scales = tuple(own["scales"])
        self._course.past.clear()
        self._course.past.extend((list(seeds), tuple(cs)) for seeds, cs in own["past"])
        for mine, theirs in zip(self.weights.exponents, own["exponents"], strict=True):
            mine.copy_(theirs)


def linear_samples(first: int, last: int, steps: int) -> Callable[[int], int]:
    """A sample schedule for `num_samples`: from `first` to `last` directions over so many steps, then `last`."""
    if not (first >= 1 and last >= 1 and steps >= 1):
        raise UserError(f"linear_samples({first}, {last}, {steps}): all must be at least 1")

    def schedule(step: int) -> int:
        return round(first + (last - first) * min(step / steps, 1.0))

    return schedule


def family_of(family: str | None, estimator: str) -> str:
    """Name in `FAMILIES` of the directions that an estimator takes."""
    name = family or "gaussian"
    if name not in FAMILIES:
        raise UserError(f"family is {family!r}: it must be one of {', '.join(FAMILIES)}")
    if estimator == "activation":
        return {"gaussian": "rank1", "rademacher": "rank1-rademacher"}.get(name, name)
    return name


def _groups(params: Any, model: nn.Module | None) -> tuple[list[dict[str, Any]], list[str]]:
    """torch's parameter groups with the frozen parameters left out, and the names of the others."""
    known = {} if model is None else {id(p): name for name, p in model.named_parameters()}
    if isinstance(params, nn.Module):
        params = list(params.parameters())
    items = list(params)
    groups = items if items and isinstance(items[0], dict) else [{"params": items}]
    out: list[dict[str, Any]] = []
    names: list[str] = []
    seen: set[int] = set()
    for group in groups:
        members = group["params"]
        members = [members] if isinstance(members, Tensor) else list(members)
        kept: list[Tensor] = []
        for member in members:
            name, tensor = member if isinstance(member, tuple) else (None, member)
            if not isinstance(tensor, Tensor):
                raise UserError(
                    f"params: {describe(tensor)} is not a parameter: pass a model, parameters, or groups of them"
                )
            if id(tensor) in seen:
                raise UserError(
                    f"params: parameter {known.get(id(tensor), name or len(names))} is there twice"
                )
            if not tensor.requires_grad:
                continue
            seen.add(id(tensor))
            kept.append(tensor)
            names.append(known.get(id(tensor), name or f"param{len(names)}"))
        if kept:
            out.append({**group, "params": kept})
    if not out:
        raise UserError("there is nothing to tune: no parameter has requires_grad")
    return out, names


def _check_positive(group: dict[str, Any]) -> None:
    for key, low, high, allowed in (
        ("lr", 0.0, math.inf, "positive and finite"),
        # beyond this the grid, which holds a look of eps exactly, would round weights away
        ("eps", 0.0, LONGEST_EPS, f"positive and at most {LONGEST_EPS:g}"),
        ("weight_decay", -1e-300, math.inf, "finite and at least 0"),
    ):
        value = group[key]
        good = isinstance(value, (int, float, Tensor)) and low < value <= high
        if not good or math.isinf(value):
            raise UserError(f"{key} is {value!r}: it must be {allowed}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
