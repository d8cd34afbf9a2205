"""Base + log = the tuned model, bit for bit; and whatever is not the base is refused before a weight moves."""

from __future__ import annotations

import copy
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from justforward import MeZO, Step, UserError, fingerprint, linear_samples, read_log, replay
from justforward.directions import FAMILIES, Weights
from justforward.moments import course_of
from justforward.playback import apply_steps, check_base
from justforward.trajectory import Writer, rounded

STEPS = 6


class Net(nn.Module):
    """A tied language model of some tiles: every kind of tensor that estimators treat on its own."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed = nn.Embedding(50, 24)
            self.inner = nn.Linear(24, 60)
            self.norm = nn.LayerNorm(60)
            self.outer = nn.Linear(60, 24, bias=False)
            self.head = nn.Linear(24, 50, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        h = h + self.scale * self.outer(torch.tanh(self.norm(self.inner(h))))
        return self.head(h)


def loss_rows(model: nn.Module) -> Callable[[dict[str, Tensor]], Tensor]:
    def loss(batch: dict[str, Tensor]) -> Tensor:
        logits = model(batch["tokens"])
        return (
            nn.functional.cross_entropy(
                logits.flatten(0, 1), batch["next"].flatten(), reduction="none"
            )
            .view(len(batch["tokens"]), -1)
            .mean(1)
        )

    return loss


def batches(count: int) -> Iterator[dict[str, Tensor]]:
    make = torch.Generator().manual_seed(1)
    for _ in range(count):
        tokens = torch.randint(50, (3, 5), generator=make)
        yield {"tokens": tokens[:, :-1], "next": tokens[:, 1:]}


def tune(
    model: nn.Module, log: Path, steps: int = STEPS, params: Any = None, **options: Any
) -> list[str]:
    """Tune with a log; the fingerprints of the model before the first step and after each."""
    schedule = options.pop("schedule", None)
    opt = MeZO(params or model, model=model, log=log, **{"lr": 1e-3, "eps": 1e-2, **options})
    rates = schedule(opt) if schedule else None
    prints = [fingerprint(model)]
    with closing(opt):
        for batch in batches(steps):
            opt.step(loss_rows(model), batch)
            if rates:
                rates.step()
            prints.append(fingerprint(model))
    assert len(set(prints)) == steps + 1  # every step moved something
    return prints


def relabel(old: Path, new: Path, **changes: Any) -> Path:
    """The same log with another header."""
    log = read_log(old)
    writer = Writer.create(new, {**log.header, **changes})
    for step in log.steps:
        writer.append(step)
    writer.close()
    return new


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -------------------------------------------------------------------------------------- fingerprint


def by_hand(*parts: tuple[str, str, tuple[int, ...], bytes]) -> str:
    """The definition: name, dtype, shape and bytes, in the order of names."""
    text = b"".join(
        f"{name}\0{dtype}\0{shape}\0".encode() + raw for name, dtype, shape, raw in parts
    )
    return hashlib.sha256(text).hexdigest()


def holding(**tensors: Tensor) -> nn.Module:
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    return module


def test_fingerprint_by_hand() -> None:
    module = nn.Linear(2, 1)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, -2.0]]))
        module.bias.copy_(torch.tensor([0.5]))
    module.register_buffer("a", torch.tensor([True, False]))
    assert fingerprint(module) == by_hand(
        ("a", "torch.bool", (2,), b"\1\0"),
        ("bias", "torch.float32", (1,), bytes.fromhex("0000003f")),
        ("weight", "torch.float32", (1, 2), bytes.fromhex("0000803f000000c0")),
    )


@pytest.mark.parametrize(
    ("tensor", "raw"),
    [
        (torch.tensor(1.0), "0000803f"),
        (torch.tensor([]), ""),
        (torch.empty(3, 0, 2), ""),
        (torch.tensor([[True], [False]]), "0100"),
        (torch.tensor([1.0, -2.0], dtype=torch.bfloat16), "803f00c0"),
        (torch.tensor([1.0], dtype=torch.float16), "003c"),
        (torch.tensor([1.0], dtype=torch.float64), "000000000000f03f"),
        (torch.tensor([258], dtype=torch.int64), "0201000000000000"),
        (torch.tensor([7, 255], dtype=torch.uint8), "07ff"),
        (torch.tensor([1.0, 2.0, 3.0, 4.0])[::2], "0000803f00004040"),
        (torch.tensor([[1.0, 2.0], [3.0, 4.0]]).t(), "0000803f000040400000004000008040"),
        (torch.tensor([[1.0, 2.0], [3.0, 4.0]])[:, 1], "0000004000008040"),
        (torch.tensor([1.0]).expand(2), "0000803f0000803f"),
    ],
)
def test_fingerprint_of_any_tensor(tensor: Tensor, raw: str) -> None:
    expected = by_hand(("x", str(tensor.dtype), tuple(tensor.shape), bytes.fromhex(raw)))
    assert fingerprint(holding(x=tensor)) == expected


def test_fingerprint_changes_with_name_dtype_and_shape() -> None:
    zeros = torch.zeros(2, 3)
    others = {
        "itself": holding(x=zeros),
        "name": holding(y=zeros),
        "dtype": holding(x=zeros.view(torch.int32)),
        "shape": holding(x=zeros.view(3, 2)),
        "flat": holding(x=zeros.view(6)),
        "one more": holding(x=zeros, y=torch.zeros(0)),
        "split": holding(x=zeros[:1].clone(), y=zeros[1:].clone()),
        "sign of zero": holding(x=-zeros),
    }
    assert len({fingerprint(module) for module in others.values()}) == len(others)
    assert fingerprint(holding(x=zeros.clone())) == fingerprint(others["itself"])
    assert fingerprint(nn.ParameterDict({"x": zeros})) == fingerprint(others["itself"])


@given(data=st.data())
@settings(max_examples=60)
def test_fingerprint_changes_with_any_bit(data: Any) -> None:
    model = Net()
    before = fingerprint(model)
    name, tensor = data.draw(st.sampled_from([*model.named_parameters(), *model.named_buffers()]))
    raw = tensor.detach().view(-1).view(torch.int32)
    at, bit = data.draw(st.integers(0, len(raw) - 1)), data.draw(st.integers(0, 31))
    mask = (1 << bit) - (1 << 32 if bit == 31 else 0)
    raw[at] ^= mask
    assert fingerprint(model) != before, (name, at, bit)
    raw[at] ^= mask
    assert fingerprint(model) == before


def test_fingerprint_tells_tied_from_untied() -> None:
    tied, untied = Net(), Net(tied=False)
    with torch.no_grad():
        untied.head.weight.copy_(tied.head.weight)
    assert torch.equal(tied.embed.weight, untied.head.weight)
    assert fingerprint(tied) != fingerprint(untied)
    x = torch.ones(2)
    assert fingerprint(holding(a=x, b=x)) == by_hand(
        ("a", "torch.float32", (2,), bytes.fromhex("0000803f0000803f")),
        ("b", "torch.float32", (2,), b"tied to a\0"),
    )


def test_fingerprint_of_a_large_tensor_is_that_of_its_bytes() -> None:
    size = (1 << 24) + 5  # a slice and a bit more
    x = torch.arange(size).to(torch.uint8)
    module = holding(x=x)

    def whole() -> str:
        return by_hand(("x", "torch.uint8", (size,), x.numpy().tobytes()))

    prints = set()
    for at in (0, (1 << 24) - 1, 1 << 24, size - 1):
        x[at] ^= 1
        assert fingerprint(module) == whole()
        prints.add(whole())
    assert len(prints) == 4


def test_fingerprint_of_a_tensor_without_values_is_refused() -> None:
    with pytest.raises(UserError, match=r"x\.(weight|bias) is on the meta device"):
        fingerprint(nn.ModuleDict({"x": nn.Linear(2, 2, device="meta")}))


# ------------------------------------------------------------------------------------------- replay

RULES = (
    "sgd",
    "rms",
    "sign",
    "clip(0.5)",
    "momentum(0.9, window=3)",
    "rms+clip(2)+momentum",
    "adam(window=3)",
    "clip(0.5)+rmsprop",
    "adam(window=0)",
)
RUNS: dict[str, dict[str, Any]] = {
    **{
        f"weight {family} {rule}": {"family": family, "rule": rule}
        for family in FAMILIES
        for rule in ("sgd", "rms+momentum(0.5, window=2)", "adam(window=3)")
    },
    **{f"weight {rule}": {"rule": rule, "num_samples": 2} for rule in RULES},
    "weight schedule": {"num_samples": linear_samples(1, 4, 5), "rule": "momentum(0.9, window=3)"},
    "weight decay": {"weight_decay": 0.1, "seed": 2**64 - 1},
    **{
        f"activation {family} {rule}": {"estimator": "activation", "family": family, "rule": rule}
        for family in ("gaussian", "rademacher")
        for rule in RULES
    },
    "activation two calls": {"estimator": "activation", "two_calls": True, "num_samples": 2},
    "weight adam schedule": {"num_samples": linear_samples(1, 4, 5), "rule": "adam(window=3)", "weight_decay": 0.1},
    "activation adam schedule": {"estimator": "activation", "num_samples": linear_samples(3, 1, 4), "rule": "rmsprop(window=0)", "weight_decay": 0.1},
    "activation decay": {"estimator": "activation", "weight_decay": 0.1, "rule": "rms"},
    "activation schedule": {"estimator": "activation", "num_samples": linear_samples(3, 1, 4), "rule": "momentum"},
}  # fmt: skip


@pytest.mark.parametrize("run", RUNS)
def test_replay_is_the_tuned_model_at_every_step(run: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    prints = tune(Net(), log, **RUNS[run])
    for steps, expected in enumerate(prints):
        model = Net()
        assert replay(model, log, steps) == steps
        assert fingerprint(model) == expected
    model = Net()
    assert replay(model, log) == STEPS
    assert fingerprint(model) == prints[-1]
    assert prints[0] != fingerprint(Net())  # the grid is laid, in training and in replay
    assert model.head.weight is model.embed.weight


def grouped(model: Net) -> list[dict[str, Any]]:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    return [
        {"params": matrices, "weight_decay": 0.05},
        {"params": vectors, "lr": 3e-3, "eps": 1e-3},
    ]


@pytest.mark.parametrize("estimator", ["weight", "activation"])
@pytest.mark.parametrize(
    "rule", ["sgd", "rms+momentum(0.9, window=3)", "adam(window=3)", "rmsprop(window=0)"]
)
def test_replay_of_parameter_groups_on_a_schedule(
    estimator: str, rule: str, tmp_path: Path
) -> None:
    def schedule(opt: MeZO) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(opt, [lambda s: 1 / (1 + s), lambda s: 0.5**s])

    model = Net()
    prints = tune(
        model, tmp_path / "log", params=grouped(model), estimator=estimator, rule=rule, schedule=schedule
    )  # fmt: skip
    steps = read_log(tmp_path / "log").steps
    # with moments the scales are those of eps alone, and the rates stand apart
    assert len({s.rates or s.scales for s in steps}) > 3
    assert len({s.decays for s in steps}) == STEPS
    for k in (0, 1, 4, STEPS):
        model = Net()
        replay(model, tmp_path / "log", k)
        assert fingerprint(model) == prints[k]


def test_frozen_tensors_and_buffers_stay(tmp_path: Path) -> None:
    model = Net()
    model.inner.requires_grad_(False)
    prints = tune(model, tmp_path / "log")
    model, base = (
        Net(),
        Net(),
    )  # whether they are frozen is in the log: the base need not say it again
    replay(model, tmp_path / "log")
    assert fingerprint(model) == prints[-1]
    assert torch.equal(model.inner.weight, base.inner.weight)
    assert torch.equal(model.scale, base.scale)


def synthetic(path: Path, count: int, lanes: int, **options: Any) -> nn.Module:
    """A small model after many steps that no loss was needed for."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Linear(9, 7)
    opt = MeZO(model, log=path, **options)
    state = (0.0,) * opt.rule.state_size
    for i in range(count):
        values = tuple(rounded(1e-3 * ((i * 7 + k * 3) % 11 - 5)) for k in range(lanes))
        opt.apply(Step(i, values, rule_state=state))
    opt.close()
    return model


def base_of_synthetic() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(9, 7)


@pytest.mark.parametrize("family", FAMILIES)
def test_momentum_reaches_over_the_borders_of_batches(family: str, tmp_path: Path) -> None:
    count = 1030  # replay takes 1,024 steps at a time, and rank-one families fewer
    options = {"family": family, "rule": "momentum(0.9, window=8)"}
    model = synthetic(tmp_path / "log", count, lanes=2, **options)
    again = base_of_synthetic()
    assert replay(again, tmp_path / "log") == count
    assert fingerprint(again) == fingerprint(model)
    for steps in (1023, 1024, 1025):
        model = synthetic(tmp_path / f"log{steps}", steps, lanes=2, **options)
        again = base_of_synthetic()
        replay(again, tmp_path / "log", steps)
        assert fingerprint(again) == fingerprint(model)


@pytest.mark.parametrize("run", ["weight gaussian sgd", "weight rank1-rademacher sgd",
                                 "weight rms+clip(2)+momentum", "activation gaussian rms+clip(2)+momentum",
                                 "weight rank1 adam(window=3)", "weight adam(window=0)", "weight adam schedule",
                                 "activation adam schedule"])  # fmt: skip
@given(cuts=st.sets(st.integers(0, STEPS)))
@settings(max_examples=8)
def test_any_number_of_passes_gives_the_same_bits(
    run: str, cuts: set[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("passes") / "log"
    expected = tune(Net(), path, **RUNS[run])[-1]
    log = read_log(path)
    model = Net()
    weights = Weights(
        check_base(model, log),
        [group for *_, group in log.header["tensors"]],
        FAMILIES[log.header["family"]],
        log.header["groups"],
    )
    course = course_of(log.header["seed"], log.header["rule"])
    borders = sorted({0, STEPS} | cuts)
    for first, last in pairwise(borders):
        assert apply_steps(weights, course, log.steps[first:last]) == last - first
    assert fingerprint(model) == expected


@pytest.mark.parametrize("run", ["weight gaussian sgd", "weight rank1 rms+momentum(0.5, window=2)",
                                 "weight rademacher sgd", "activation gaussian rms",
                                 "weight gaussian adam(window=3)", "activation rademacher adam(window=3)",
                                 "activation adam schedule"])  # fmt: skip
def test_the_number_of_threads_changes_nothing(run: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    expected = tune(Net(), log, **RUNS[run])
    for count in (1, 2, 3):
        with threads(count):
            model = Net()
            replay(model, log)
            # Losses may depend on threads, moves of the weights by given steps may not.
            again = Net()
            opt = MeZO(again, 1e-3, 1e-2, **RUNS[run])
            for step in read_log(log).steps:
                opt.apply(step)
        assert fingerprint(model) == expected[-1]
        assert fingerprint(again) == expected[-1]


ELSEWHERE = """
import sys, torch
from test_playback import Net, fingerprint, replay
for threads in (1, 2, 3):
    torch.set_num_threads(threads)
    for log in sys.argv[1:]:
        model = Net()
        replay(model, log)
        print(fingerprint(model))
"""


def test_another_process_with_other_threads_gives_the_same_bits(tmp_path: Path) -> None:
    logs = {
        str(tmp_path / run): tune(Net(), tmp_path / run, **RUNS[run])[-1]
        for run in (
            "weight decay",
            "weight rank1 sgd",
            "activation schedule",
            "weight adam schedule",
        )
    }
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *logs],
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parent),
            "NUMBA_NUM_THREADS": "2",
            "OMP_NUM_THREADS": "2",
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == [*logs.values()] * 3, done.stderr


def test_a_torn_end_costs_the_torn_step(tmp_path: Path) -> None:
    log = tmp_path / "log"
    prints = tune(Net(), log)
    log.write_bytes(log.read_bytes()[: -12 - 1])  # the seal, and a byte of the last step
    model = Net()
    assert replay(model, log) == STEPS - 1
    assert fingerprint(model) == prints[-2]


# ------------------------------------------------------------------------------- what is not the base


def refused(model: nn.Module, log: Path, *named: str, steps: int | None = None) -> None:
    """Replay says so in one line that names the log, and leaves every bit of the model."""
    before = copy.deepcopy(model.state_dict())
    prints = fingerprint(model)
    with pytest.raises(UserError) as caught:
        replay(model, log, steps)
    text = str(caught.value)
    assert text.startswith(f"{log}: ")
    assert text.isprintable()
    for words in named:
        assert words in text
    assert fingerprint(model) == prints
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.fixture
def log(tmp_path: Path) -> Path:
    tune(Net(), tmp_path / "log", steps=2)
    return tmp_path / "log"


def test_the_base_itself_is_not_refused(log: Path) -> None:
    assert replay(Net(), log) == 2


def test_a_base_with_one_other_bit_is_refused(log: Path) -> None:
    for name in ("embed.weight", "norm.bias", "scale"):
        model = Net()
        tensor = dict([*model.named_parameters(), *model.named_buffers()])[name]
        tensor.detach().view(-1)[-1:].view(torch.int32).bitwise_xor_(1)
        ours, theirs = fingerprint(model)[:16], fingerprint(Net())[:16]
        refused(model, log, "the values differ", f"this model has {ours}", f"fingerprint {theirs}")


def test_a_tuned_model_is_not_the_base(log: Path) -> None:
    model = Net()
    replay(model, log)
    refused(model, log, "the values differ")


def test_another_shape_dtype_or_name_is_named(log: Path) -> None:
    model = Net()
    model.outer = nn.Linear(60, 25, bias=False)
    refused(model, log, "outer.weight has shape [24, 60] in the log and [25, 60] in this model")
    model = Net()
    model.norm.to(torch.bfloat16)
    refused(model, log, "norm.weight has dtype torch.float32 in the log and torch.bfloat16")
    refused(Net().double(), log, "dtype torch.float32 in the log and torch.float64")
    model = Net()
    del model.norm
    refused(model, log, "norm.weight, which this model does not have")
    refused(nn.Sequential(Net()), log, "embed.weight, which this model does not have")


def test_a_layout_that_differs_outside_the_tuned_tensors_is_refused(log: Path) -> None:
    untied = Net(tied=False)
    with torch.no_grad():
        untied.head.weight.copy_(untied.embed.weight)
    refused(untied, log, "fingerprint")
    model = Net()
    model.register_buffer("more", torch.zeros(1))
    refused(model, log, "fingerprint")


def test_more_steps_than_there_are_are_refused(log: Path) -> None:
    for steps in (3, -1, 10**9):
        refused(Net(), log, f"has 2 whole steps; {steps} were asked for", steps=steps)


def test_other_noise_and_unknown_directions_are_refused_by_name(log: Path, tmp_path: Path) -> None:
    path = relabel(log, tmp_path / "new", noise=99)
    refused(Net(), path, "noise version 99, this is version 1", "use the version that wrote it")
    path = relabel(log, tmp_path / "newer", family="cauchy")
    refused(Net(), path, "'cauchy'", "gaussian", "use the version that wrote it")


def test_a_damaged_or_missing_log_is_refused(log: Path, tmp_path: Path) -> None:
    raw = bytearray(log.read_bytes())
    raw[-14] ^= 4
    log.write_bytes(raw)
    refused(Net(), log, "damaged at byte", "in step 1")
    refused(Net(), tmp_path / "none", "cannot be read")


def test_a_weight_that_cannot_be_moved_is_refused_before_any_moves(log: Path) -> None:
    model = Net()
    columns = model.inner.weight.detach().t().contiguous().t()  # same values, same fingerprint
    model.inner.weight = nn.Parameter(columns)
    prints = fingerprint(model)
    assert prints == fingerprint(Net())
    with pytest.raises(UserError, match=r"inner\.weight is not contiguous"):
        replay(model, log)
    assert fingerprint(model) == prints


def test_a_resume_on_another_base_is_refused(log: Path) -> None:
    raw = log.read_bytes()
    model = Net()
    with torch.no_grad():
        model.inner.bias[3] += 1
    prints = fingerprint(model)
    with pytest.raises(UserError, match="the values differ"):
        MeZO(model, 1e-3, 1e-2, log=log, resume=True)
    assert fingerprint(model) == prints
    assert log.read_bytes() == raw


@pytest.mark.parametrize("run", ["weight rms+clip(2)+momentum", "activation schedule"])
def test_resumed_in_the_middle_it_is_the_very_same_run(run: str, tmp_path: Path) -> None:
    options = {"lr": 1e-3, "eps": 1e-2, **RUNS[run]}
    expected = tune(Net(), tmp_path / "whole", **RUNS[run])[-1]
    whole = (tmp_path / "whole").read_bytes()
    path = tmp_path / "log"
    end = len(whole) - 12  # the seal
    for cut in (end, end - 1, end - 13, end - 4 * STEPS):
        path.write_bytes(whole[:cut])
        model = Net()
        opt = MeZO(model, log=path, resume=True, **options)
        assert opt.steps == len(read_log(path).steps)
        for batch in list(batches(STEPS))[opt.steps :]:
            opt.step(loss_rows(model), batch)
        opt.close()
        assert fingerprint(model) == expected
        assert path.read_bytes() == whole


def test_eps_of_a_group_may_be_a_tensor(tmp_path: Path) -> None:
    prints = tune(Net(), tmp_path / "log", steps=2, eps=torch.tensor(0.01))
    model = Net()
    replay(model, tmp_path / "log")
    assert fingerprint(model) == prints[-1]
