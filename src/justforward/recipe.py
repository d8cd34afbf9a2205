"""What a step is made with besides what was seen: rule, its scalars, rates. No weights: whoever has none can make steps, too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from justforward.rules import Chain
from justforward.sights import Sight, put_together
from justforward.trajectory import Step, rounded


@dataclass(frozen=True)
class Recipe:
    """All that makes rises of the loss a step.

    Attributes:
        index: of the step.
        rule: projected gradients to coefficients.
        state: the rule's scalars after the step before.
        eps: per parameter group, how far a look goes.
        rates: per parameter group, the learning rate.
        decays: per parameter group, the weight decay, which the rate is multiplied with.
        shape: per parameter group, how far this step looks, in its eps, and how far it moves.
        scales: of the step before, kept where no group has a rate; but with momentum, where past steps would move, they are 0.
        norms: what a modified estimate divides its looks by; () for the others.
    """

    index: int
    rule: Chain
    state: tuple[float, ...]
    eps: tuple[float, ...]
    rates: tuple[float, ...]
    decays: tuple[float, ...]
    shape: tuple[tuple[float, float], ...]
    scales: tuple[float, ...]
    norms: tuple[float, ...] = ()

    def step(self, rises: Sequence[float], memory: tuple[float, ...] = ()) -> Step:
        """What these rises of the loss come to; `memory` is kept behind the rule's own scalars."""
        grads = [rise / self.eps[0] for rise in rises]
        signal, state = self.rule(grads, self.state, self.index)
        lr = max(self.rates)
        gains = [gain for _, gain in self.shape]
        reaches = [self.eps[0] / e * gain for e, gain in zip(self.eps, gains, strict=True)]
        # The coefficients move; with moments they are a gradient estimate, and the rates stand apart.
        apart = self.rule.moments is not None
        scales, factor = self.scales, 1.0 if apart else -lr
        if apart:
            scales = tuple(rounded(reach) for reach in reaches)
        elif lr > 0.0:
            scales = tuple(
                rounded(rate / lr * reach) for rate, reach in zip(self.rates, reaches, strict=True)
            )
        elif self.rule.momentum is not None:
            scales = (0.0,) * len(reaches)
        return Step(
            index=self.index,
            coefficients=tuple(rounded(factor * s / len(signal)) for s in signal),
            scales=scales,
            decays=tuple(
                rounded(rate * decay) if gain else 0.0
                for rate, gain, decay in zip(self.rates, gains, self.decays, strict=True)
            ),
            rule_state=tuple(rounded(s) for s in (*state, *memory)),
            projected_grads=tuple(grads),
            norms=self.norms,
            rates=tuple(rounded(rate) for rate in self.rates) if apart else (),
        )

    def combined(self, sights: Iterable[Sight], *, samples: int, of: int, apart: bool) -> Step:
        """The step that sights come to; the same of any division of the same rows and samples, in any order.

        Args:
            sights: of this step.
            samples: how many the step has.
            of: rows that its batch has; those that nobody saw are left out of the mean.
            apart: whether each row has directions of its own (activation space).

        Raises:
            UserError: there are none, or they are of another step, or contradict each other.
        """
        view = put_together(sights, self.index, samples, of)
        seen = view.along_rows(of) if apart else view.along_samples()
        step = self.step(list(seen.values()))
        # A direction that nobody looked along keeps its place in the log, and is not moved along.
        own = [0.0] * (samples * of if apart else samples)
        for lane, coefficient in zip(seen, step.coefficients, strict=True):
            own[lane] = coefficient
        return replace(step, coefficients=tuple(own), loss=view.loss, forwards=view.forwards)
