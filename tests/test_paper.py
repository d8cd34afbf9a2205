"""The paper's own trainer, step for step: the same z, the same losses.

The other side is written after the authors' code (github.com/princeton-nlp/MeZO at 552cb1b): large_models/trainer.py `zo_step` and
`zo_update` for OPT, and for RoBERTa medium_models/src/trainer.py with its optimizer, a torch.optim.SGD over gradients that are written out.
Both draw z from `torch.normal`, once a parameter, again for each use after setting the seed: here that gives our noise.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from conftest import make_model
from justforward import MeZO, noise

STEPS, EPS, DECAY, SEED = 20, 1e-3, 0.1, 4
# Names that each of the two trainers keeps from decaying.
STILL = {"opt": ("bias", "layer_norm", "layernorm"), "roberta": ("bias", "LayerNorm.weight")}


# Model, its seed, learning rate; the loss falls by 0.06 to 0.08.
CASES = [("opt", 0, 2e-3), ("opt", 2, 2e-3), ("roberta", 3, 3e-3), ("roberta", 3, 4e-3)]


def linear(step: int) -> float:
    return 1.0 - step / STEPS


class Draws:
    """`torch.manual_seed` and `torch.normal`, where z is our noise: a parameter a stream, in the model's order."""

    def __init__(self) -> None:
        self.seed, self.stream = 0, 0

    def manual_seed(self, seed: int) -> None:
        self.seed, self.stream = seed, 0

    def normal(self, mean: float, std: float, size: torch.Size, device: Any, dtype: Any) -> Tensor:
        assert (mean, std, str(device), dtype) == (0, 1, "cpu", torch.float32)
        z = noise.normal(self.seed, self.stream, 0, size.numel()).view(size)
        self.stream += 1
        return z


class Theirs:
    """The trainer: perturb by +1, -2, +1 times eps z, each rounded as it comes; then update."""

    def __init__(self, model: nn.Module, closure: Callable[[], Tensor], rate: float) -> None:
        self.closure, self.rate, self.draws = closure, rate, Draws()
        self.named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]

    def z(self, p: nn.Parameter) -> Tensor:
        return self.draws.normal(mean=0, std=1, size=p.size(), device=p.device, dtype=p.dtype)

    def perturb(self, seed: int, times: float) -> None:
        self.draws.manual_seed(seed)
        for _, p in self.named:
            p.data = p.data + times * self.z(p) * EPS

    @torch.no_grad()
    def step(self, index: int, still: tuple[str, ...]) -> list[float]:
        seed = noise.direction_seed(SEED, index, 0)
        self.perturb(seed, 1)
        plus = self.closure()
        self.perturb(seed, -2)
        minus = self.closure()
        grad = ((plus - minus) / (2 * EPS)).item()
        self.perturb(seed, 1)
        self.update(seed, grad, self.rate * linear(index), still)
        return [plus.item(), minus.item()]

    def update(self, seed: int, grad: float, lr: float, still: tuple[str, ...]) -> None:
        self.draws.manual_seed(seed)
        for name, p in self.named:
            z = self.z(p)
            if any(part in name for part in still):
                p.data = p.data - lr * (grad * z)
            else:
                p.data = p.data - lr * (grad * z + DECAY * p.data)


class TheirsWithSgd(Theirs):
    """The medium models' trainer: the estimate goes into `grad`, and torch's SGD moves."""

    def update(self, seed: int, grad: float, lr: float, still: tuple[str, ...]) -> None:
        self.draws.manual_seed(seed)
        groups: list[dict[str, Any]] = [
            {"params": [], "weight_decay": DECAY},
            {"params": [], "weight_decay": 0.0},
        ]
        for name, p in self.named:
            p.grad = grad * self.z(p)
            groups[any(part in name for part in still)]["params"].append(p)
        torch.optim.SGD(groups, lr=lr).step()
        for _, p in self.named:
            p.grad = None


def closure_of(kind: str, model: nn.Module) -> Callable[[], Tensor]:
    """96 prompts of 12 tokens; the loss over two words, after the prompt or at a mask within.

    So many because each loss is a float32 rounded in its own way on either side: the mean over rows has less of it.
    """
    ids = torch.randint(5, 200, (96, 12), generator=torch.Generator().manual_seed(1))
    words, answers = torch.tensor([7, 31]), torch.arange(96) % 2
    place = -1 if kind == "opt" else 6
    return lambda: F.cross_entropy(model(input_ids=ids).logits[:, place, words], answers)


def theirs_and_ours(
    kind: str,
    seed: int,
    rate: float,
    still: tuple[str, ...],
    *,
    decay: float = DECAY,
    schedule: Callable[[int], float] = linear,
    eps: float = EPS,
) -> tuple[list[float], list[float], nn.Module, nn.Module]:
    """All 40 losses of both, and both models; what is given after `still` is ours alone."""
    one = make_model(kind, seed=seed)
    other = copy.deepcopy(one)
    trainer = (Theirs if kind == "opt" else TheirsWithSgd)(one, closure_of(kind, one), rate)
    theirs = [loss for index in range(STEPS) for loss in trainer.step(index, still)]
    optimizer = MeZO(other, lr=rate, eps=eps, weight_decay=decay, seed=SEED)
    scheduler = LambdaLR(optimizer, schedule)
    ours: list[float] = []
    good = closure_of(kind, other)

    def closure() -> Tensor:
        loss = good()
        ours.append(loss.item())
        return loss

    for _ in range(STEPS):
        optimizer.step(closure)
        scheduler.step()
    return theirs, ours, one, other


def apart(theirs: list[float], ours: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(theirs, ours, strict=True))


@pytest.mark.parametrize(("kind", "seed", "rate"), CASES)
def test_losses_are_those_of_the_papers_trainer(kind: str, seed: int, rate: float) -> None:
    still = (*STILL[kind], "layer_norm")  # see below
    theirs, ours, one, other = theirs_and_ours(kind, seed, rate, still)
    assert len(theirs) == len(ours) == 2 * STEPS
    assert apart(theirs, ours) < 1e-6
    assert theirs[0] - theirs[-1] > 0.05
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=4e-6, rtol=0)


@pytest.mark.parametrize("changed", [
    {"decay": 0.0}, {"decay": 1.01 * DECAY}, {"schedule": lambda step: 1.0}, {"schedule": lambda step: linear(step + 1)},
    {"eps": 3 * EPS},
])  # fmt: skip
def test_a_difference_of_the_algorithms_would_show(changed: dict[str, Any]) -> None:
    kind, seed, rate = CASES[0]
    theirs, ours, _, _ = theirs_and_ours(kind, seed, rate, STILL[kind], **changed)
    assert apart(theirs, ours) > 3e-6


def test_their_roberta_decays_one_norm_that_ours_leaves_alone() -> None:
    """The head's own norm is called lm_head.layer_norm, which their list of names does not find."""
    kind, seed, rate = CASES[-1]
    _, _, one, other = theirs_and_ours(kind, seed, rate, STILL[kind])
    decayed = math.prod(1.0 - rate * linear(index) * DECAY for index in range(STEPS))
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        far = float((p - q).detach().abs().max())
        if name == "lm_head.layer_norm.weight":
            assert far == pytest.approx(1.0 - decayed, rel=0.1)
        else:
            assert far < 0.1 * (1.0 - decayed)
