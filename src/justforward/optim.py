"""`MeZO`: a torch optimizer that looks along random directions instead of backpropagating.

estimate(closure) -> Step     look: losses at +eps and -eps; the weights end up bit-identical
apply(step)                   move: one pass over the weights
step(closure)                 both, with one pass fewer; the same bits
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from justforward import noise, rules
from justforward.directions import FAMILIES
from justforward.errors import UserError
from justforward.estimators import Draws, RowLooks, Site, look_weights, looking_mode
from justforward.groups import (
    check_group,
    check_seed,
    check_state,
    family_of,
    parameter_groups,
    split,
)
from justforward.interrupts import Shield
from justforward.looks import resolution
from justforward.modified import measure
from justforward.moments import compile_kernels, course_of
from justforward.playback import apply_steps, begin, header_for
from justforward.private import Private, count_answers
from justforward.recipe import Recipe
from justforward.shards import check_sharded, weights_of
from justforward.sights import Sight, check_places, see_rows, see_weights, warn_alone
from justforward.stored import compute_model_wide, in_shards
from justforward.trajectory import Log, Step, Writer
from justforward.variants import (
    Blocks,
    Modified,
    check_shared,
    check_variants,
    sample_count,
    sample_schedule,
    settings_of,
)

Closure = Callable[[], Any]
LossFn = Callable[[Any], Tensor]
# A lane that no direction of a step has (a log holds fewer than 2^13 of them): it draws the step's block.
BLOCK_LANE = 1 << 31


class MeZO(Optimizer):
    """Memory-efficient zeroth-order optimizer (arXiv 2305.17333, Algorithm 1), and beyond it.

    Args:
        params: a model (best: its names go into the log and it is put in eval mode while looking), or
            parameters, or named parameters, or parameter groups with their own `lr`, `eps`, `weight_decay`.
            Only those with requires_grad are tuned. Weights are rounded to their grid here (by less than
            2^-23 of the largest of each 1,024 neighbours), never again after.
        lr: learning rate. For the plain rule the paper's 1e-6; rules that normalise ("rms", "sign", "spread") move a
            coordinate by about lr a step.
        eps: how far to look, in units of z.
        estimator: "weight", the paper's: one dense z shared by the batch, any closure with a scalar loss; or
            "activation": a rank-one z for each example, weights untouched while looking; the closure
            returns one loss a row.
        rule: "sgd", "rms", "sign", "spread", "clip", "momentum", "adam", "rmsprop", or several joined by "+" (see `rules`).
        family: "gaussian" (default), "rademacher", "rank1", "rank1-rademacher". In activation space
            directions are always rank-one, and this names the distribution of their factors.
        looks: "two-sided" (SPSA), "one-sided" (one forward fewer for two directions, and so on), or "one-point" (one
            forward a direction, against the loss of the step before; weight space only). See `estimators`.
        num_samples: directions a step (n of n-SPSA) for each closure or example; or a function of the
            step's index (`linear_samples`).
        modified: look along unlike tensors at unlike lengths (`Modified`); the groups are split for it.
        blocks: look along and move one block of tensors a step (`Blocks`); the groups are split for it.
        private: look at rows with differential privacy (`Private`; weight space only).
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
        looks: str = "two-sided",
        num_samples: int | Callable[[int], int] = 1,
        modified: Modified | None = None,
        blocks: Blocks | None = None,
        private: Private | None = None,
        weight_decay: float = 0.0,
        seed: int = 0,
        model: nn.Module | None = None,
        two_calls: bool = False,
        check_rows: bool = True,
        log: str | os.PathLike[str] | None = None,
        resume: bool = False,
    ) -> None:
        self.estimator, self.family = estimator, family_of(family, estimator)
        self.seed = check_seed(seed)
        self.rule = rules.parse(rule)
        self.looks, self.modified, self.blocks, self.private = looks, modified, blocks, private
        check_variants(looks, estimator, self.rule, modified, blocks)
        if private is not None:
            private.check(estimator, looks, modified)
        self.model = params if isinstance(params, nn.Module) else model
        self.samples = sample_schedule(num_samples)

        groups, names = parameter_groups(params, self.model)
        variant = modified or blocks
        labels = [""] * len(groups)
        if variant is not None:
            groups, names, labels = split(groups, names, variant.labels(names))
        self._turns = list(dict.fromkeys(labels))
        self._block_of = [self._turns.index(label) for label in labels]
        self.block = self._turns[0]  # which one moves, where that is given
        super().__init__(groups, {"lr": lr, "eps": eps, "weight_decay": weight_decay})
        for group in self.param_groups:
            check_group(group)
        tensors = [p for group in self.param_groups for p in group["params"]]
        owners = [g for g, group in enumerate(self.param_groups) for _ in group["params"]]
        self._longest = [group["eps"] for group in self.param_groups]
        flat = [name for called in names for name in called]
        named = list(zip(flat, tensors, strict=True))
        # What one-point looks compare with is kept as one more scalar of the rule's.
        memory = self.rule.state_size + (looks == "one-point")
        header: dict[str, Any] = {}
        old: Log | None = None
        if log is not None:  # refused, if it is, before the weights are touched
            of = header_for(
                named,
                owners,
                seed=self.seed,
                family=self.family,
                eps=self._longest,
                rule=self.rule,
                rule_state=memory,
                settings=self._settings(),
            )
            header, old = begin(self.model, named, log, resume, of)
        if self.model is not None:
            compute_model_wide(self.model)
        if any(in_shards(tensor) for tensor in tensors):
            check_sharded(estimator, self.rule.moments is not None, (modified, private))
        family_here = FAMILIES[self.family]
        self.weights = weights_of(named, owners, family_here, self._longest, self.model)
        self.weights.same({**self._kind(), "groups": owners, "log": log is None})
        if self.weights.compiled:
            compile_kernels(FAMILIES[self.family], self.rule.spec, *self.weights.dtypes)
        self._course = course_of(self.seed, self.rule.spec)
        self._rule_state: tuple[float, ...] = (0.0,) * memory
        self._scales = (1.0,) * len(labels)
        self._norms: tuple[float, ...] = ()
        self._row_looks = RowLooks(two_calls, check_rows)
        self.projected_grads: tuple[float, ...] = ()  # of the last step, one a direction
        self.steps, self.log = 0, log
        self._writer: Writer | None = None
        if old is not None:
            self._continue(old)
        elif log is not None and self.weights.writes:
            self._writer = Writer.create(log, header)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """For torch's own constructor; raises UserError once the optimizer is made."""
        if hasattr(self, "weights"):
            raise UserError(
                "add_param_group: noise, grids and log are those of the parameters that the optimizer was made with: make a new "
                "one of all groups (blocks=Blocks(...) moves one part at a time)"
            )
        super().add_param_group(param_group)

    def _settings(self) -> dict[str, Any]:
        parts = {"modified": self.modified, "blocks": self.blocks, "private": self.private}
        return settings_of(self.estimator, self.looks, **parts)

    def _kind(self) -> dict[str, Any]:
        """What a state must agree in to be this optimizer's."""
        kind = {"seed": self.seed, "family": self.family, "rule": self.rule.spec}
        return {**kind, "settings": self._settings()}

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

    def resolution(self, closure: Closure | LossFn, batch: Any = None) -> tuple[float, float]:
        """How much the losses differ between the signs of this step's looks, and how much of that rounding makes alone.

        The second is told from looks a quarter as long along the same directions (`looks.errors`), with what little the bending
        of the loss makes there. Much shorter ones would not do: they do not see a loss change that is rounded to steps. A model
        that computes in 16 bits may have no more than rounding to show: then a longer `eps`, or float32, is needed. The weights
        stay as they are.

        Args:
            closure, batch: as `estimate` has them.

        Returns:
            Root mean squares of the rises of the loss (per eps) along the directions of the step.

        Raises:
            As `estimate`; UserError where looks are one-point, which have no second sign, or private.
        """
        if self.looks == "one-point" or self.private is not None:
            raise UserError(
                "resolution: one-point looks are compared with the step before, private ones answer once: use others"
            )
        return resolution(self.param_groups, lambda: self.estimate(closure, batch).projected_grads)

    def look(
        self,
        closure: Closure | LossFn,
        batch: Any = None,
        *,
        rows: Sequence[int],
        of: int,
        samples: Sequence[int] | None = None,
    ) -> Sight:
        """A worker's part of `estimate`: look along some of this step's directions with some of the rows of its batch.

        Args:
            closure, batch: as `estimate` has them, for these rows; in weight space, too, one loss a row is best (one
                number counts for each of its rows).
            rows: which rows of the step's batch these are, from 0.
            of: how many rows that batch has.
            samples: which of the step's samples to look along (default: all).

        Returns:
            What `combine` takes. The weights are bit-identical to before, whatever happened.

        Raises:
            As `estimate`; UserError: rows or samples that the step has not; as `variants.check_shared`.
        """
        alone = self.private and self.private.alone
        check_shared(self.looks, self.modified, alone, self.weights.sharded)
        with Shield() as shield, looking_mode(self.model):
            count = sample_count(self.samples, self.steps)
            samples = range(count) if samples is None else samples
            check_places("samples", samples, count)
            check_places("rows", rows, of)
            site = replace(self._site(shield), eps=self._reaches(self._norms))
            if self.estimator == "weight":
                see = see_weights if self.private is None else self.private.see
                return see(site, closure, batch, samples, rows)
            own = [sample * of + row for sample in samples for row in rows]
            site = replace(site, seed_of=lambda lane: self._direction(self.steps, own[lane]))
            return see_rows(site, self._row_looks, closure, batch, samples, rows)

    def combine(self, sights: Iterable[Sight], *, of: int) -> Step:
        """The step that all workers' looks come to; the same of any division of the same rows and samples, in any order.

        Rows that nobody saw are left out of the mean.

        Args:
            sights: what `look` returned, of this step.
            of: how many rows the step's batch has.

        Raises:
            UserError: as `look`; there are none, or they are of another step, or contradict each other.
        """
        check_shared(self.looks, self.modified, self.private and self.private.alone)
        samples, recipe = sample_count(self.samples, self.steps), self._recipe(self._norms)
        if self.private is not None:
            return self.private.combined(sights, recipe, samples, self.looks)
        return recipe.combined(sights, samples=samples, of=of, apart=self.estimator == "activation")

    def apply(self, step: Step) -> None:
        """Write the step to the log, then move the weights.

        Raises:
            UserError: the step is not the next one, or the log cannot be written (the weights have not moved); or 16-bit weights
                were held back at the largest number of their format. That step is taken, counted and in the log. Where
                weights are in a file, steps wait until these are read: then the next call says so, and takes no step.
        """
        with Shield():
            self.weights.check_held()
            self._apply(step, None, None)
            self.weights.check_held()

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
                self.weights.check_held()
                self._apply(step, back, draws)
            except BaseException:
                if back is not None and self.steps == step.index:
                    self.weights.look(
                        self._direction(step.index, len(step.coefficients) - 1), back, 1.0
                    )
                raise
            self.weights.check_held()
        return step.loss

    def _estimate(
        self, closure: Any, batch: Any, shield: Shield, keep_back: bool
    ) -> tuple[Step, list[float] | None, Draws | None]:
        if self.weights.sharded:
            keys = ("lr", "eps", "weight_decay")
            rates = [[float(group[key]) for key in keys] for group in self.param_groups]
            self.weights.same({"steps": self.steps, "lr, eps or weight_decay": rates})
        else:
            warn_alone()
        samples = sample_count(self.samples, self.steps)
        site = self._site(shield)
        norms, extra = self._norms, 0
        back: list[float] | None = None
        draws: Draws | None = None
        with looking_mode(self.model):
            if self.modified is not None and self.modified.due(self.steps):
                norms = measure(self.modified, site, self.seed, closure, batch)
                extra = self.modified.forwards(self.steps, len(norms))
            site = replace(site, eps=self._reaches(norms))
            if self.estimator == "weight":
                look = look_weights if self.private is None else self.private.look
                seen = look(site, closure, batch, samples, keep_back)
                back = [-seen.at * e for e in site.eps] if seen.at else None
            else:
                seen, draws = self._row_looks.look(site, closure, batch, samples)
        try:
            state = (seen.ahead,) if self.looks == "one-point" else ()
            step = self._recipe(norms).step(seen.rises, state)
            forwards = seen.forwards + extra
            return replace(step, loss=seen.loss, forwards=forwards), back, draws
        except BaseException:
            if back is not None:
                self.weights.look(self._direction(self.steps, samples - 1), back, 1.0)
            raise

    def _site(self, shield: Shield) -> Site:
        self.weights.check_formats()
        before = self._rule_state[-1] if self.looks == "one-point" and self.steps else None

        def seed_of(lane: int) -> int:
            return self._direction(self.steps, lane)

        return Site(self.weights, self.steps, seed_of, self._eps(), shield, self.looks, before)

    def _reaches(self, norms: tuple[float, ...]) -> list[float]:
        """For each group, how far this step looks along z."""
        lengths = zip(self._eps(), self._shape(norms), strict=True)
        return [eps * reach for eps, (reach, _) in lengths]

    def _shape(self, norms: tuple[float, ...]) -> list[tuple[float, float]]:
        """For each group: how far this step looks along z, in its eps, and how far it moves."""
        if self.modified is not None:
            return [(1.0 / norm, self.modified.gain(norm)) for norm in norms]
        if self.blocks is not None:
            drawn = self._direction(self.steps, BLOCK_LANE)
            if self.block not in self._turns:
                raise UserError(f"block is {self.block!r}: it must be one of {self._turns}")
            given = self._turns.index(self.block)
            return self.blocks.shape(self._block_of, self.steps, drawn, given)
        return [(1.0, 1.0)] * len(self._block_of)

    # -- moving -----------------------------------------------------------------------------------------------

    def _recipe(self, norms: tuple[float, ...]) -> Recipe:
        return Recipe(
            index=self.steps,
            rule=self.rule,
            state=self._rule_state[: self.rule.state_size],
            eps=tuple(self._eps()),
            rates=tuple(float(group["lr"]) for group in self.param_groups),
            decays=tuple(float(group["weight_decay"]) for group in self.param_groups),
            shape=tuple(self._shape(norms)),
            scales=self._scales,
            norms=norms,
        )

    def _apply(self, step: Step, back: list[float] | None, draws: Draws | None) -> None:
        if step.index != self.steps:
            raise UserError(f"step {step.index} cannot be applied: the next step is {self.steps}")
        self._course.check(step)
        self.weights.check_formats()
        if self._writer is not None:
            self._writer.append(step)
        self._course.apply(self.weights, [step], back, draws)
        self._rule_state, self.projected_grads = step.rule_state, step.projected_grads
        self._scales, self._norms = step.scales, step.norms
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

    def _continue(self, log: Log) -> None:
        """Go on with a log, whose steps are the next ones."""
        self.follow(log.steps)
        if self.weights.writes:
            self._writer = Writer.resume(log)

    def follow(self, steps: Sequence[Step]) -> None:
        """Take the next steps as another optimizer of this kind took them, in few passes; raises as `apply`."""
        for step in steps:
            if self._writer is not None:
                self._writer.append(step)
        self.steps += apply_steps(self.weights, self._course, steps)
        self.weights.held(wait=True)  # was said where they were taken first
        count_answers(self.private, self.steps)
        if steps:
            self._rule_state = steps[-1].rule_state
            self._scales, self._norms = steps[-1].scales, steps[-1].norms

    def close(self) -> None:
        """Seal and close the log; raises UserError where a step that waited for its weights has held one back."""
        if self._writer is not None:
            self._writer.close()
        self.weights.check_held(wait=True)

    def state_dict(self) -> dict[str, Any]:
        """torch's, with what this optimizer keeps: a few scalars and the grids (a byte for 1,024 weights); raises as `close`."""
        self.weights.settle()
        self.weights.check_held()
        return {
            **super().state_dict(),
            "justforward": {
                **self._kind(),
                "steps": self.steps,
                "answers": getattr(self.private, "answers", 0),
                "rule_state": self._rule_state,
                "scales": self._scales,
                "norms": self._norms,
                "block": self.block,
                "past": self._course.state(),
                "exponents": [exponents.clone() for exponents in self.weights.exponents],
            },
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; the weights themselves are the model's and must be those it was saved with.

        Raises:
            UserError: the state is not of this optimizer, or of another seed, family or rule, or other tensors.
        """
        own = check_state(state_dict.get("justforward"), self._kind(), self.weights.exponents)
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "justforward"})
        self.steps, self.block = own["steps"], own.get("block", self.block)
        self._rule_state = tuple(own["rule_state"])
        self._scales, self._norms = tuple(own["scales"]), tuple(own["norms"])
        count_answers(self.private, own["answers"])
        self._course.restore(own["past"])
        for mine, theirs in zip(self.weights.exponents, own["exponents"], strict=True):
            mine.copy_(theirs)
