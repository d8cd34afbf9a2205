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
from justforward.noise.spec import TILE
from justforward.shards import cut, pieces_of
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
        found: Tensor = self.second(torch.tanh(self.first(x))) * self.scale
        return found


def batch(step: int, part: int, parts: int) -> tuple[Tensor, Tensor]:
    """Four rows for each process."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(4 * parts, 6, generator=generator)[4 * part : 4 * part + 4]
    return x, x.argmax(1)


def sharded(kind: str, size: int) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    net, mesh = Net(), init_device_mesh("cpu", (size,))
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


def run(kind: str, log: Path, options: dict[str, Any]) -> tuple[str, list[float]]:
    """Some steps of each process, with rows of its own (fsdp) or all with the same (tp)."""
    rank, size = dist.get_rank(), dist.get_world_size()
    net = sharded(kind, size)
    opt = jf.MeZO(net, log=log, **{**OPTIONS, **options})
    losses = []
    for step in range(STEPS):
        x, y = batch(step, rank, size) if kind == "fsdp" else batch(step, 0, 1)
        losses.append(opt.step(lambda x=x, y=y: F.cross_entropy(net(x), y)))
    opt.close()
    return jf.fingerprint(net), losses


def whole(kind: str, log: Path, size: int, options: dict[str, Any]) -> str:
    """The same by one process: the mean of the losses of the parts."""
    net = Net()
    opt = jf.MeZO(net, log=log, **{**OPTIONS, **options})
    parts = size if kind == "fsdp" else 1
    for step in range(STEPS):
        rows = [batch(step, k, parts) for k in range(parts)]
        opt.step(lambda rows=rows: torch.stack([F.cross_entropy(net(x), y).double() for x, y in rows]).mean())  # fmt: skip
    opt.close()
    return jf.fingerprint(net)


@pytest.mark.parametrize(
    ("kind", "size", "options"),
    [
        ("fsdp", 2, {"rule": "rms"}),
        ("fsdp", 3, {"family": "rademacher", "num_samples": 2, "looks": "one-sided", "rule": "spread"}),
        ("tp", 2, {"rule": "sgd+momentum(window=3)"}),
    ],
    ids=["fsdp", "rademacher", "tp"],
)  # fmt: skip
def test_steps_have_the_bits_of_the_whole_model(
    tmp_path: Path, kind: str, size: int, options: dict[str, Any]
) -> None:
    log = tmp_path / "run.jfl"
    found = together(size, tmp_path, run, kind, log, options)
    assert all(one == found[0] for one in found)
    steps = jf.read_log(log).steps
    assert len(steps) == STEPS
    # the log is that of the whole model
    net = Net()
    assert jf.replay(net, log) == STEPS
    assert jf.fingerprint(net) == found[0][0]
    assert jf.fingerprint(net) != jf.fingerprint(Net())
    alone = whole(kind, tmp_path / "alone.jfl", size, options)
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
    r"parameter .* is torch\.float64 on cpu: parts are moved in float32 on the CPU so far",
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
