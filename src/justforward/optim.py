"""`MeZO`: a torch optimizer that looks along random directions instead of backpropagating.

estimate(closure) -> Step     look: losses at +eps and -eps; the weights end up bit-identical
apply(step)                   move: one pass over the weights
step(closure)                 both, with one pass fewer; the same bits
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from justforward import noise, rules
from justforward.activations import Look, direction_array, looking, repeat_rows
from justforward.directions import FAMILIES, Weights
from justforward.errors import NonFiniteLoss, UserError
from justforward.interrupts import Shield
from justforward.trajectory import (
    Course,
    Log,
    Step,
    Writer,
    apply_steps,
    check_base,
    fingerprint,
    header_for,
    read_log,
    rounded,
)

Closure = Callable[[], Any]
LossFn = Callable[[Any], Tensor]
ESTIMATORS = ("weight", "activation")


class MeZO(torch.optim.Optimizer):
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
        self.family = _family(family, estimator)
        self.rule = rules.parse(rule)
        self.seed = seed
        self.model = params if isinstance(params, nn.Module) else model
        self.two_calls = two_calls
        if isinstance(num_samples, int) and num_samples < 1:
            raise UserError(f"num_samples is {num_samples}: it must be at least 1")
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
        self._unchecked = check_rows
        self._rows = 0
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
            step, back, factors = self._estimate(closure, batch, shield, keep_back=True)
            try:
                self._apply(step, back, factors)
            except BaseException:
                if back is not None and self.steps == step.index:
                    self.weights.look(
                        self._direction(step.index, len(step.coefficients) - 1), back, 1.0
                    )
                raise
        return step.loss

    def _estimate(
        self, closure: Any, batch: Any, shield: Shield, keep_back: bool
    ) -> tuple[Step, list[float] | None, dict[int, Any] | None]:
        eps = self._eps()
        samples = self._samples(self.steps)
        if not isinstance(samples, int) or samples < 1:
            raise UserError(
                f"num_samples gave {samples!r} at step {self.steps}: it must be a whole number, at least 1"
            )
        back: list[float] | None = None
        factors: dict[int, Any] | None = None
        with _looking_mode(self.model):
            if self.estimator == "weight":
                losses = self._look_weights(closure, batch, eps, samples, shield, keep_back)
                back = eps if keep_back else None
            else:
                factors = {}
                losses = self._look_activations(closure, batch, eps, samples, shield, factors)
        try:
            grads = [(plus - minus) / (2.0 * eps[0]) for plus, minus in losses]
            return self._step_from(losses, grads, samples), back, factors
        except BaseException:
            if back is not None:
                self.weights.look(self._direction(self.steps, samples - 1), eps, 1.0)
            raise

    def _look_weights(
        self,
        closure: Any,
        batch: Any,
        eps: list[float],
        samples: int,
        shield: Shield,
        keep_back: bool,
    ) -> list[tuple[float, float]]:
        """Losses at +eps and -eps of each sample; with `keep_back` the weights stay at -eps of the last."""
        losses: list[tuple[float, float]] = []
        arguments = () if batch is None else (batch,)
        for lane in range(samples):
            seed = self._direction(self.steps, lane)
            at = 0
            try:
                self.weights.look(seed, eps, 1.0)
                at = 1
                plus = _scalar(shield.call(closure, *arguments), self.steps, "at +eps")
                self.weights.look(seed, eps, -2.0)
                at = -1
                minus = _scalar(shield.call(closure, *arguments), self.steps, "at -eps")
                losses.append((plus, minus))
                if keep_back and lane == samples - 1:
                    at = 0
            finally:
                if at:
                    self.weights.look(seed, eps, -float(at))
        return losses

    def _look_activations(
        self,
        closure: Any,
        batch: Any,
        eps: list[float],
        samples: int,
        shield: Shield,
        factors: dict[int, Any],
    ) -> list[tuple[float, float]]:
        """Losses at +eps and -eps of each direction, sample-major."""
        run = _Rows(self, closure, batch, eps, shield, factors)
        if batch is None:
            rows = self._rows or run.count()
            try:
                losses = run.closure(rows, samples)
            except (_OtherRows, UserError):
                again = run.count()
                if again == rows:
                    raise
                rows = again
                factors.clear()
                losses = run.closure(rows, samples)
            self._rows = rows
        else:
            losses = run.batch(samples)
            rows = len(losses) // samples
        if self._unchecked:
            run.check(rows)
            self._unchecked = False
        return losses

    # -- moving -----------------------------------------------------------------------------------------------

    def _step_from(
        self, losses: list[tuple[float, float]], grads: list[float], samples: int
    ) -> Step:
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

    def _apply(self, step: Step, back: list[float] | None, factors: dict[int, Any] | None) -> None:
        if step.index != self.steps:
            raise UserError(f"step {step.index} cannot be applied: the next step is {self.steps}")
        if self._writer is not None:
            self._writer.append(step)
        move = self._course.move(step)
        # Known factors are those of this step's directions only: momentum brings older ones.
        self.weights.update([move], back, factors if self.rule.momentum is None else None)
        self._rule_state = step.rule_state
        self._scales = step.scales
        self.steps += 1

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
            UserError: the state is not of this optimizer, or of another rule or other tensors.
        """
        own = state_dict.get("justforward")
        if own is None:
            raise UserError("load_state_dict: not the state of a MeZO optimizer")
        if own["rule"] != self.rule.spec:
            raise UserError(
                f"load_state_dict: the rule is {own['rule']} in the state and {self.rule.spec} here"
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


class _OtherRows(Exception):
    """A closure returned another number of losses than the rows it was looked at with."""


class _Rows:
    """Activation-space forwards of one step."""

    def __init__(
        self,
        opt: MeZO,
        closure: Any,
        batch: Any,
        eps: list[float],
        shield: Shield,
        factors: dict[int, Any],
    ) -> None:
        self.opt, self.function, self.data = opt, closure, batch
        self.eps, self.shield, self.factors = eps, shield, factors

    def _call(
        self, seeds: Any, signs: list[float], batch: Any, factors: dict[int, Any]
    ) -> list[float]:
        look = Look(self.opt.weights, seeds, signs, self.eps, factors)
        arguments = () if batch is None else (batch,)
        with looking(look):
            losses = self.shield.call(self.function, *arguments)
        return _per_row(losses, len(signs), batch is not None)

    def _seeds(self, rows: int, lanes: Iterable[int]) -> Any:
        return direction_array([self.opt._direction(self.opt.steps, lane) for lane in lanes])

    def count(self) -> int:
        """How many rows the closure has: one bare forward."""
        losses = self.shield.call(self.function)
        if not isinstance(losses, Tensor) or losses.dim() != 1:
            raise UserError(
                f"activation space: the closure must return one loss a row, a tensor [rows]; it returned {_describe(losses)}"
            )
        return len(losses)

    def closure(self, rows: int, samples: int) -> list[tuple[float, float]]:
        """Two calls a sample, rows as the closure has them."""
        losses: list[tuple[float, float]] = []
        for sample in range(samples):
            seeds = self._seeds(rows, range(sample * rows, (sample + 1) * rows))
            factors = self.factors if samples == 1 else {}
            plus = self._call(seeds, [1.0] * rows, None, factors)
            minus = self._call(seeds, [-1.0] * rows, None, factors)
            losses += zip(plus, minus, strict=True)
        return self._finite(losses)

    def batch(self, samples: int) -> list[tuple[float, float]]:
        """All signs and samples as rows of one batch, or a call for each."""
        _, rows = repeat_rows(self.data, 1)
        if self.opt.two_calls:
            losses: list[tuple[float, float]] = []
            for sample in range(samples):
                seeds = self._seeds(rows, range(sample * rows, (sample + 1) * rows))
                factors = self.factors if samples == 1 else {}
                plus = self._call(seeds, [1.0] * rows, self.data, factors)
                minus = self._call(seeds, [-1.0] * rows, self.data, factors)
                losses += zip(plus, minus, strict=True)
            return self._finite(losses)
        count = rows * samples
        seeds = self._seeds(rows, range(count))
        repeated, _ = repeat_rows(self.data, 2 * samples)
        values = self._call(seeds, [1.0] * count + [-1.0] * count, repeated, self.factors)
        return self._finite(list(zip(values[:count], values[count:], strict=True)))

    def _finite(self, losses: list[tuple[float, float]]) -> list[tuple[float, float]]:
        for row, pair in enumerate(losses):
            for value, where in zip(pair, ("+eps", "-eps"), strict=True):
                if not math.isfinite(value):
                    raise NonFiniteLoss(self.opt.steps, value, f"at {where} in row {row}")
        return losses

    def check(self, rows: int) -> None:
        """Refuse a model in which one row's direction reaches another row's loss."""
        batch = self.data
        if batch is not None:
            batch, rows = repeat_rows(batch, 2)[0], 2 * rows
        elif rows < 2:
            return
        lanes = rows if batch is None else rows // 2
        seeds = self._seeds(lanes, range(lanes))
        some = [float(row % 2) for row in range(rows)]
        bare = self._call(seeds, [0.0] * rows, batch, {})
        looked = self._call(seeds, some, batch, {})
        effect = max(abs(a - b) for a, b, on in zip(bare, looked, some, strict=True) if on)
        for row, (a, b, on) in enumerate(zip(bare, looked, some, strict=True)):
            if not on and abs(a - b) > 1e-3 * effect + 1e-5 * (1.0 + abs(a)):
                raise UserError(
                    f"activation space: looking along the directions of other rows changed the loss of row {row} from {a} "
                    f"to {b}: the model mixes the rows of a batch, or its first axis is not the batch; use "
                    "estimator='weight' (or, if the loss itself is random, check_rows=False)"
                )


def linear_samples(first: int, last: int, steps: int) -> Callable[[int], int]:
    """A sample schedule for `num_samples`: from `first` to `last` directions over so many steps, then `last`."""
    if not (1 <= first and 1 <= last and 1 <= steps):
        raise UserError(f"linear_samples({first}, {last}, {steps}): all must be at least 1")

    def schedule(step: int) -> int:
        return round(first + (last - first) * min(step / steps, 1.0))

    return schedule


def _family(family: str | None, estimator: str) -> str:
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
                    f"params: {_describe(tensor)} is not a parameter: pass a model, parameters, or groups of them"
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
    for key, least in (("lr", 0.0), ("eps", 0.0), ("weight_decay", 0.0)):
        value = group[key]
        good = isinstance(value, (int, float, Tensor)) and math.isfinite(value) and value >= least
        if not good or (key != "weight_decay" and value == 0.0):
            allowed = "finite and at least 0" if key == "weight_decay" else "positive and finite"
            raise UserError(f"{key} is {value!r}: it must be {allowed}")


def _scalar(loss: Any, step: int, where: str) -> float:
    if isinstance(loss, Tensor):
        if loss.numel() == 0:
            raise UserError("the closure returned an empty tensor: it must return the loss")
        value = float(loss.detach().float().mean()) if loss.numel() > 1 else float(loss)
    else:
        try:
            value = float(loss)
        except (TypeError, ValueError):
            raise UserError(
                f"the closure returned {_describe(loss)}: it must return the loss"
            ) from None
    if not math.isfinite(value):
        raise NonFiniteLoss(step, value, where)
    return value


def _per_row(losses: Any, rows: int, whole: bool) -> list[float]:
    if not isinstance(losses, Tensor) or losses.dim() != 1 or len(losses) != rows:
        if not whole and isinstance(losses, Tensor) and losses.dim() == 1:
            raise _OtherRows
        raise UserError(
            f"activation space: loss_fn must return one loss a row, here a tensor [{rows}]; it returned {_describe(losses)}"
        )
    return [float(x) for x in losses.detach().double().tolist()]


def _describe(value: Any) -> str:
    return (
        f"a tensor {list(value.shape)}"
        if isinstance(value, Tensor)
        else f"a {type(value).__name__}"
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


@contextmanager
def _looking_mode(model: nn.Module | None) -> Iterator[None]:
    """No gradients, and the model in eval mode: dropout would drown a look in noise."""
    modules: Sequence[nn.Module] = (
        [] if model is None else [m for m in model.modules() if m.training]
    )
    for module in modules:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in modules:
            module.training = True
