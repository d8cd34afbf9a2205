"""A model in shards takes the steps of the whole one: places of parts, bits, replay, what is refused.

Reading order: where parts are, steps, logs, refusals.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import justforward as jf
from justforward.directions import FAMILIES, Place, Weights
from justforward.moves import Move
from justforward.noise import reference
from justforward.noise.spec import TILE
from justforward.shards import cut, pieces_of
from justforward.stored import make_stored, plain
from processes import together

# ----------------------------------------------------------------------------------------- where parts are


class Cut:
    """A DTensor as `cut` and `pieces_of` see one, without processes."""

    def __init__(
        self, whole: Tensor, sizes: tuple[int, ...], at: tuple[int, ...], dims: Any
    ) -> None:
        from torch.distributed.tensor import Replicate, Shard

        self.whole, self.shape = whole, whole.shape
        self.placements = [Replicate() if d is None else Shard(d) for d in dims]
        self.device_mesh = self
        self._sizes, self._at = sizes, at
        part = whole
        for size, k, d in zip(sizes, at, dims, strict=True):
            if d is not None:
                parts = list(part.chunk(size, d))
                empty = part.narrow(d, 0, 0)
                part = (parts + [empty] * size)[k]
        self.part = part.contiguous().clone()

    def dim(self) -> int:
        return self.whole.dim()

    def numel(self) -> int:
        return self.whole.numel()

    def size(self, k: int) -> int:
        return self._sizes[k]

    def get_coordinate(self) -> tuple[int, ...]:
        return self._at

    def to_local(self) -> Tensor:
        return self.part

    def full_tensor(self) -> Tensor:
        return self.whole


@st.composite
def cuts(draw: st.DrawFn) -> Cut:
    shape = draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    if draw(st.booleans()):
        shape[-1] = draw(st.sampled_from([1024, 1500, 2048]))
    whole = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    meshes = draw(st.lists(st.tuples(st.integers(1, 5), st.one_of(st.none(), st.integers(0, len(shape) - 1))), min_size=1, max_size=2))  # fmt: skip
    sizes, dims = zip(*meshes, strict=True)
    at = tuple(draw(st.integers(0, size - 1)) for size in sizes)
    return Cut(whole, sizes, at, dims)


@given(cuts())
def test_runs_are_the_part(tensor: Cut) -> None:
    starts, length = cut(tensor)
    flat = tensor.whole.view(-1)
    found = torch.cat([flat[start : start + length] for start in starts.tolist()])
    assert torch.equal(found, tensor.part.view(-1))


@given(cuts())
def test_pieces_are_whole_tiles_and_cover_the_part_once(tensor: Cut) -> None:
    """What is not a copy is the part's own memory; what is one says where it belongs."""
    before = tensor.whole.clone().view(-1)
    part = tensor.part.view(-1)
    part.fill_(-1.0)
    seen = torch.zeros(part.numel(), dtype=torch.int64)
    tiles: list[int] = []
    for piece in pieces_of(tensor):
        count = -(-len(piece.flat) // TILE)
        tiles += range(piece.first, piece.first + count)
        inside = before[piece.first * TILE : piece.first * TILE + len(piece.flat)]
        # tiles are whole, but for the tensor's last
        assert len(piece.flat) % TILE == 0 or piece.first * TILE + len(piece.flat) == len(before)
        if piece.back is None:
            piece.flat.copy_(inside)  # writes through
            start = piece.flat.storage_offset() - part.storage_offset()
            seen[start : start + len(piece.flat)] += 1
        else:
            assert torch.equal(piece.flat, inside)
            where, mine = piece.back
            part[mine] = piece.flat[where]
            seen[mine] += 1
    assert len(set(tiles)) == len(tiles)
    assert (seen == 1).all()
    starts, length = cut(tensor)
    wanted = [before[start : start + length] for start in starts.tolist()]
    assert torch.equal(part, torch.cat(wanted))


# -------------------------------------------------------------------------------------------------- steps


class Net(nn.Module):
    """Parameters of its own and in parts; sizes that no number of processes divides, and tiles that are cut."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 300)
        self.second = nn.Linear(300, 10)
        self.scale = nn.Parameter(torch.ones(10))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.parameters():
                p.uniform_(-0.5, 0.5, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(torch.tanh(self.first(x.to(self.scale.dtype)))) * self.scale
        return found.float()


def batch(step: int, part: int, parts: int) -> tuple[Tensor, Tensor]:
    """Four rows for each process."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(4 * parts, 6, generator=generator)[4 * part : 4 * part + 4]
    return x, x.argmax(1)


def sharded(kind: str, size: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    net, mesh = Net().to(dtype), init_device_mesh("cpu", (size,))
    if kind == "fsdp":
        fully_shard(net.first, mesh=mesh)
        fully_shard(net.second, mesh=mesh)
        fully_shard(net, mesh=mesh)  # type: ignore[arg-type]
    else:
        plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
        parallelize_module(net, mesh, plan)  # type: ignore[arg-type]
    return net


OPTIONS = {"lr": 1e-2, "eps": 1e-2, "seed": 5, "weight_decay": 0.1}
STEPS = 6


def slow(weights: Any) -> None:
    """Move them as those of another device."""
    weights.compiled = weights.inner.compiled = False
    for i, away in weights.inner._away.items():
        away.kernels, away.compiled = weights.inner.kernels(i), False


def run(
    kind: str, log: Path, options: dict[str, Any], dtype: torch.dtype
) -> tuple[str, list[float]]:
    """Some steps of each process, with rows of its own (fsdp) or all with the same (tp)."""
    rank, size = dist.get_rank(), dist.get_world_size()
    net = sharded(kind, size, dtype)
    opt = jf.MeZO(net, log=log, **{**OPTIONS, **options})
    if rank == 1:
        slow(opt.weights)  # any mixture of devices leaves the same bits
    losses = []
    for step in range(STEPS):
        x, y = batch(step, rank, size) if kind == "fsdp" else batch(step, 0, 1)
        losses.append(opt.step(lambda x=x, y=y: F.cross_entropy(net(x), y)))
    opt.close()
    return jf.fingerprint(net), losses


def whole(
    kind: str, log: Path, size: int, options: dict[str, Any], dtype: torch.dtype = torch.float32
) -> str:
    """The same by one process: the mean of the losses of the parts."""
    net = Net().to(dtype)
    if dtype != torch.float32:
        for p in net.parameters():
            make_stored(p, dtype)  # computed with in 16 bits, too, as parts are
    opt = jf.MeZO(net, log=log, **{**OPTIONS, **options})
    parts = size if kind == "fsdp" else 1
    for step in range(STEPS):
        rows = [batch(step, k, parts) for k in range(parts)]
        opt.step(lambda rows=rows: torch.stack([F.cross_entropy(net(x), y).double() for x, y in rows]).mean())  # fmt: skip
    opt.close()
    return jf.fingerprint(net)


FZOO = {"family": "rademacher", "num_samples": 2, "looks": "one-sided", "rule": "spread"}


@pytest.mark.parametrize(
    ("kind", "size", "options", "dtype"),
    [
        ("fsdp", 2, {"rule": "rms"}, torch.float32),
        ("fsdp", 3, FZOO, torch.float32),
        ("tp", 2, {"rule": "sgd+momentum(window=3)"}, torch.float32),
        ("fsdp", 2, {"rule": "rms", "eps": 0.05}, torch.bfloat16),
        ("fsdp", 3, FZOO, torch.float16),
        ("tp", 2, {"rule": "rms", "eps": 0.05}, torch.bfloat16),
    ],
    ids=["fsdp", "rademacher", "tp", "bfloat16", "float16", "tp-bfloat16"],
)
def test_steps_have_the_bits_of_the_whole_model(
    tmp_path: Path, kind: str, size: int, options: dict[str, Any], dtype: torch.dtype
) -> None:
    log = tmp_path / "run.jfl"
    found = together(size, tmp_path, run, kind, log, options, dtype)
    assert all(one == found[0] for one in found)
    steps = jf.read_log(log).steps
    assert len(steps) == STEPS
    # the log is that of the whole model
    net = Net().to(dtype)
    assert jf.replay(net, log) == STEPS
    assert jf.fingerprint(net) == found[0][0]
    assert jf.fingerprint(net) != jf.fingerprint(Net().to(dtype))
    alone = whole(kind, tmp_path / "alone.jfl", size, options, dtype)
    if kind == "fsdp":  # a product that is cut in two and summed is rounded otherwise
        assert alone == found[0][0]
        assert jf.read_log(tmp_path / "alone.jfl").steps == steps


def go_on(log: Path) -> list[Any]:
    """A run of a whole model goes on in shards; then it is replayed in shards."""
    size = dist.get_world_size()
    net = sharded("fsdp", size)
    opt = jf.MeZO(net, log=log, resume=True, rule="rms", **OPTIONS)
    before = opt.steps
    for step in range(STEPS):
        x, y = batch(step, dist.get_rank(), size)
        opt.step(lambda x=x, y=y: F.cross_entropy(net(x), y))
    opt.close()
    dist.barrier()
    fresh = sharded("fsdp", size)
    return [before, jf.replay(fresh, log), jf.fingerprint(net), jf.fingerprint(fresh)]


def test_a_run_goes_on_in_shards_and_is_replayed_there(tmp_path: Path) -> None:
    log = tmp_path / "run.jfl"
    whole("tp", log, 1, {"rule": "rms"})
    found = together(2, tmp_path, go_on, log)
    net = Net()
    assert jf.replay(net, log) == 2 * STEPS
    assert found == [[STEPS, 2 * STEPS, jf.fingerprint(net), jf.fingerprint(net)]] * 2


def at_the_end(log: Path) -> list[Any]:
    """A step that takes one process's part of float16 weights to the largest number."""
    net = sharded("fsdp", 2, torch.float16)
    with torch.no_grad():
        if dist.get_rank() == 1:
            net.get_parameter("first.weight").to_local().fill_(65504.0)  # type: ignore[attr-defined]
    opt = jf.MeZO(net, log=log, **{**OPTIONS, "lr": 2.0, "weight_decay": 0.0})
    rises = iter([1.0, 0.0])
    said = ""
    try:
        opt.step(lambda: next(rises))
    except jf.UserError as error:
        said = str(error)
    opt.close()
    return [said, opt.steps, jf.fingerprint(net)]


def test_a_part_that_reaches_the_largest_number_is_named_by_all(tmp_path: Path) -> None:
    first, second = together(2, tmp_path, at_the_end, tmp_path / "run.jfl")
    assert first == second
    assert re.match(r"parameter first\.weight has reached 65504, the largest number of torch\.float16", first[0])  # fmt: skip
    assert first[1] == len(jf.read_log(tmp_path / "run.jfl").steps) == 1


@given(
    first=st.integers(0, 3),
    tiles=st.integers(1, 3),
    short=st.integers(0, TILE - 1),
    seed=st.integers(0, 2**63),
    signs=st.booleans(),
    compiled=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_a_part_moves_as_the_whole_does(
    first: int, tiles: int, short: int, seed: int, signs: bool, compiled: bool, dtype: torch.dtype
) -> None:
    """Looks, steps from a look's end and several steps at once, by Numba's kernels and by plain torch's."""
    size = (first + tiles) * TILE - short
    theta = (reference.normal(seed, 9, 0, size) * 0.05).to(dtype)
    seeds = np.array([seed, 5], np.uint64)
    rates = np.full((1, 2), 1e-2, np.float32)
    moves = [Move(s, seeds, rates, np.full(1, 1e-3, np.float32)) for s in range(2)]
    found, looked = [], []
    for start in (0, first):
        part = nn.Parameter(theta[start * TILE :].clone(), requires_grad=False)
        family = FAMILIES["rademacher" if signs else "gaussian"]
        # no tensor is the whole one of a part: looks of 16 bits move these alike
        weights = Weights([("w", part)], [0], family, [1e-2], [Place(0, start, True)])
        weights.compiled = compiled
        for away in weights._away.values():
            away.kernels, away.compiled = weights.kernels(0), compiled
        before = plain(part).clone()
        weights.look(seed, [1e-2], 1.0)
        weights.look(5, [1e-2], -1.0)
        looked.append(plain(part)[(first - start) * TILE :].clone())
        weights.look(5, [1e-2], 1.0)
        weights.look(seed, [1e-2], -1.0)
        assert torch.equal(plain(part), before)
        weights.look(5, [1e-2], -1.0)
        weights.update(moves[:1], back=[1e-2])
        weights.update(moves)
        found.append(plain(part)[(first - start) * TILE :])
    assert torch.equal(*looked)
    assert torch.equal(*found)
    assert not torch.equal(looked[0], theta[first * TILE :])
    assert not torch.equal(found[0], theta[first * TILE :])


def test_memory_that_runs_out_for_a_copy_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is a copy from before a step put back after it."""
    theta = [torch.randn(900).to(torch.bfloat16) for _ in range(2)]
    parts = [nn.Parameter(x.clone(), requires_grad=False) for x in theta]
    named = [(f"w{i}", part) for i, part in enumerate(parts)]
    places = [Place(i, 2, False) for i in range(2)]
    weights = Weights(named, [0, 0], FAMILIES["gaussian"], [1e-2], places)

    def runs_out() -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(weights._away[1], "keep", runs_out)
        with pytest.raises(MemoryError):
            weights.look(1, [1e-2], 1.0)
    assert all(torch.equal(plain(p), x) for p, x in zip(parts, theta, strict=True))
    weights.update([Move(0, np.array([3], np.uint64), np.ones((1, 1), np.float32), np.zeros(1, np.float32))])  # fmt: skip
    moved = [plain(p).clone() for p in parts]
    assert not torch.equal(moved[0], theta[0])
    weights.look(1, [1e-2], 1.0)
    assert not torch.equal(plain(parts[0]), moved[0])
    weights.look(1, [1e-2], -1.0)
    assert all(torch.equal(plain(p), x) for p, x in zip(parts, moved, strict=True))


# ----------------------------------------------------------------------------------------------- refusals


def refused() -> list[str]:
    rank, said = dist.get_rank(), []

    def tried(**options: Any) -> None:
        try:
            jf.MeZO(sharded("fsdp", 2), **{**OPTIONS, **options})
            said.append("nothing")
        except jf.UserError as error:
            said.append(str(error))

    tried(estimator="activation")
    tried(rule="adam(window=3)")
    tried(family="rank1")
    tried(modified=jf.Modified.parse("variance(per=tensor)"))
    tried(seed=rank)
    net = sharded("fsdp", 2)
    opt = jf.MeZO(net, **OPTIONS)
    for act in (
        lambda: opt.look(lambda: 0.0, rows=[0], of=1),
        lambda: jf.Workers(opt),
        lambda: jf.MeZO(list(sharded("fsdp", 2).parameters())),
        lambda: jf.MeZO(sharded("fsdp", 2).double()),
    ):
        try:
            act()
            said.append("nothing")
        except jf.UserError as error:
            said.append(str(error))
    for group in opt.param_groups:
        group["lr"] = 0.1 * (1 + rank)
    before = jf.fingerprint(net)
    for closure in (lambda: 1.0, lambda: math.nan if rank else 1.0):
        try:
            opt.step(closure)
            said.append("nothing")
        except (jf.UserError, jf.NonFiniteLoss) as error:
            said.append(str(error))
        opt.param_groups[0]["lr"] = 0.1
    said.append("as before" if jf.fingerprint(net) == before else "moved")
    with torch.no_grad():
        for p in net.parameters():
            p.to_local().mul_(2.0)
    try:
        opt.step(lambda: 1.0)
        said.append("nothing")
    except jf.UserError as error:
        said.append(str(error))
    return said


SAID = [
    "estimator is 'activation': of a model in shards",
    "rule has moments: of a model in shards",
    "family is rank-one",
    "modified or private is given",
    "the processes of a model in shards differ in seed: give all the same",
    "look, Workers: of a model in shards",
    "look, Workers: of a model in shards",
    "the model is needed where weights are in shards",
    r"parameter scale is torch\.float64: only float32, bfloat16 and float16 can be tuned",
    "the processes of a model in shards differ in lr, eps or weight_decay",
    "step 0: the loss is nan",
    "as before",
    "parameter .* was changed by something else than the optimizer",
]


def test_what_a_model_in_shards_cannot_have(tmp_path: Path) -> None:
    for found in together(2, tmp_path, refused):
        assert len(found) == len(SAID), found
        for said, wanted in zip(found, SAID, strict=True):
            assert re.match(wanted, said), (said, wanted)


def test_other_ways_to_cut_are_refused() -> None:
    class Odd:
        """Neither copies nor parts."""

    tensor = Cut(torch.zeros(4, 4), (2,), (0,), (0,))
    tensor.placements = [Odd()]  # type: ignore[list-item]
    with pytest.raises(jf.UserError, match="what is looked along are parts by Shard and copies"):
        cut(tensor)
    assert np.array_equal(cut(Cut(torch.zeros(0), (2,), (1,), (0,)))[0], [0])
