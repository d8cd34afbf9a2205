"""Weight space: weights on their grids, looks that leave no trace, moves that any order of work gives alike."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import justforward as jf
from conftest import materialise
from justforward import UserError
from justforward.directions import FAMILIES, Weights, grid_floor
from justforward.moves import Move
from justforward.noise import spec

SHAPES = [(), (0,), (1,), (7,), (1023,), (1024,), (1025,), (2049,), (1, 1), (3, 5), (33, 65), (1, 1500), (1500, 1),
          (0, 7), (4, 3, 90), (2, 1, 3, 3)]  # fmt: skip
SEEDS = st.integers(0, 2**64 - 1)
LAYOUTS = st.lists(st.sampled_from(SHAPES), min_size=1, max_size=5)
FAMILY = st.sampled_from(sorted(FAMILIES))
EPS = 1e-3


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def tensors_of(
    shapes: Sequence[tuple[int, ...]], seed: int = 0, scale: float = 0.02
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed % 2**63)
    return [torch.randn(shape, generator=generator) * scale for shape in shapes]


def weights_of(
    tensors: Sequence[Tensor],
    family: str = "gaussian",
    groups: Sequence[int] | None = None,
    eps: Sequence[float] = (EPS,),
) -> Weights:
    """Clones, on their grids."""
    named = [(f"w{i}", tensor.clone()) for i, tensor in enumerate(tensors)]
    return Weights(named, groups or [0] * len(named), FAMILIES[family], eps)


def bits(weights: Weights) -> list[Tensor]:
    """Everything a move may change, to the last bit."""
    return [t.clone().view(torch.int32) for t in weights.tensors] + [
        e.clone() for e in weights.exponents
    ]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def q_of(weights: Weights, i: int) -> Tensor:
    """The grid of each element, float64."""
    q = torch.pow(2.0, weights.exponents[i].double()).repeat_interleave(spec.TILE)
    shape = weights.tensors[i].shape
    return q[: shape.numel()].view(shape)


def move_of(
    dither: int, seeds: Sequence[int], coefficients: Sequence[Sequence[float]], decays: Sequence[float]
) -> Move:  # fmt: skip
    return Move(
        dither,
        np.array(seeds, np.uint64),
        np.array(coefficients, np.float32),
        np.array(decays, np.float32),
    )


def random_moves(seed: int, steps: int, groups: int = 1, scale: float = 1e-4) -> list[Move]:
    """Moves of one to three directions, some with decay, some without."""
    rng = np.random.default_rng(seed % 2**63)
    moves = []
    for _ in range(steps):
        count = int(rng.integers(1, 4))
        moves.append(
            move_of(
                int(rng.integers(2**63)),
                [int(s) for s in rng.integers(0, 2**63, count)],
                rng.normal(0, scale, (groups, count)),
                rng.choice([0.0, 1e-3], groups),
            )
        )
    return moves


# ------------------------------------------------------------------------------------------- the grid


@given(
    shapes=LAYOUTS, seed=SEEDS, scale=st.sampled_from([0.0, 1e-9, 0.02, 1.0, 1e6]), family=FAMILY
)
def test_construction_rounds_to_a_fine_power_of_two_and_only_once(
    shapes, seed, scale, family
) -> None:
    tensors = tensors_of(shapes, seed, scale)
    weights = weights_of(tensors, family)
    for i, (before, after) in enumerate(zip(tensors, weights.tensors, strict=True)):
        q = q_of(weights, i)
        n = after.double() / q
        assert torch.equal(n, n.round())
        assert (n.abs() <= spec.GRID_LIMIT).all()
        assert ((after.double() - before.double()).abs() <= q / 2).all()
        assert not (after.signbit() & (after == 0)).any()
        # no coarser than the weights or the look want it
        floor = grid_floor(EPS, FAMILIES[family])
        for tile, k in enumerate(weights.exponents[i].tolist()):
            largest = float(
                before.reshape(-1)[tile * spec.TILE : (tile + 1) * spec.TILE].abs().max()
            )
            assert k == floor or largest > spec.GRID_LIMIT * 2.0 ** (k - 1)
    again = weights_of(weights.tensors, family)
    assert same(bits(again), bits(weights))


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("eps", [1e-6, 1e-3, 1.0])
def test_the_longest_look_keeps_its_room(family: str, eps: float) -> None:
    k = grid_floor(eps, FAMILIES[family])
    room = eps * FAMILIES[family].largest / 2.0**k
    assert spec.GRID_LOOK / 2 < room <= spec.GRID_LOOK
    assert (
        spec.GRID_LIMIT + spec.GRID_LOOK <= 2**24
    )  # the last integer up to which float32 has them all


# --------------------------------------------------------------------------------------------- looking


@given(
    shapes=LAYOUTS, seed=SEEDS, family=FAMILY, scale=st.sampled_from([0.0, 1e-6, 0.02, 1.0, 1e4])
)
@settings(max_examples=80)
def test_a_look_goes_where_z_says_and_home_to_the_last_bit(shapes, seed, family, scale) -> None:
    weights = weights_of(tensors_of(shapes, seed, scale), family)
    before = bits(weights)
    start = [t.double() for t in weights.tensors]
    weights.look(seed, [EPS], 1.0)
    plus = [t.double() for t in weights.tensors]
    weights.look(seed, [EPS], -2.0)
    minus = [t.double() for t in weights.tensors]
    weights.look(seed, [EPS], 1.0)
    assert same(bits(weights), before)
    for i, at in enumerate(start):
        q, z = q_of(weights, i), materialise(weights, i, seed)
        assert torch.equal(plus[i] - at, at - minus[i])
        assert ((plus[i] - at - EPS * z).abs() <= q / 2 + 1e-6 * EPS * z.abs()).all()
        n = plus[i] / q
        assert torch.equal(n, n.round())
        assert (n.abs() <= 2**24).all()
        if scale < 1.0 and at.numel() > 10:  # q is far below eps
            assert (plus[i] != at).double().mean() > 0.9


@given(shapes=LAYOUTS, seeds=st.lists(SEEDS, min_size=2, max_size=4), family=FAMILY)
@settings(max_examples=30)
def test_looks_may_pile_up_and_come_home_in_any_order(shapes, seeds, family) -> None:
    eps = EPS / len(seeds)  # together within the room of one
    weights = weights_of(tensors_of(shapes), family)
    before = bits(weights)
    for seed in seeds:
        weights.look(seed, [eps], 1.0)
    for seed in sorted(seeds):
        weights.look(seed, [eps], -1.0)
    assert same(bits(weights), before)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_group_looks_its_own_eps_far(family: str) -> None:
    shapes = [(40, 40), (1025,), (40, 40)]
    weights = weights_of(tensors_of(shapes), family, groups=[0, 1, 1], eps=[1e-2, 1e-4])
    start = [t.double() for t in weights.tensors]
    weights.look(3, [5e-3, 1e-4], 1.0)
    for i, eps in enumerate([5e-3, 1e-4, 1e-4]):
        z = materialise(weights, i, 3)
        assert (
            (weights.tensors[i].double() - start[i] - eps * z).abs() <= 1.01 * q_of(weights, i)
        ).all()
        assert (weights.tensors[i] != start[i]).any()
    weights.look(3, [5e-3, 1e-4], -1.0)
    assert same([t.double() for t in weights.tensors], start)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_equal_tensors_are_looked_at_along_different_directions(family: str) -> None:
    one = tensors_of([(40, 40)])[0]
    weights = weights_of([one, one], family)
    weights.look(3, [EPS], 1.0)
    moved = [t - one for t in weights.tensors]
    correlation = torch.corrcoef(torch.stack([m.flatten() for m in moved]))[0, 1]
    assert abs(correlation) < 0.5


# ---------------------------------------------------------------------------------------------- moving


@given(
    shapes=LAYOUTS, seed=SEEDS, family=FAMILY, c=st.sampled_from([1e-8, 1e-5, 1e-3]), count=st.integers(1, 3),
    decay=st.sampled_from([0.0, 0.1]),
)  # fmt: skip
@settings(max_examples=60)
def test_a_move_goes_where_it_says_within_the_grid(shapes, seed, family, c, count, decay) -> None:
    weights = weights_of(tensors_of(shapes, seed), family)
    start = [t.double() for t in weights.tensors]
    seeds = [(seed + k) % 2**64 for k in range(count)]
    weights.update([move_of(7, seeds, [[c, -2 * c, 3 * c][:count]], [decay])])
    for i, at in enumerate(start):
        factors = torch.tensor([c, -2 * c, 3 * c][:count], dtype=torch.float64)
        z = torch.stack([materialise(weights, i, s) for s in seeds])
        wanted = torch.tensordot(factors, z, 1) - (decay * at if at.dim() >= 2 else 0.0)
        slack = 1e-5 * (factors.abs() @ z.abs().reshape(count, -1)).view(at.shape) + 1e-6 * at.abs()
        assert ((weights.tensors[i].double() - at - wanted).abs() <= q_of(weights, i) + slack).all()


@given(
    shapes=LAYOUTS, seed=SEEDS, family=FAMILY, groups=st.integers(1, 2), count=st.integers(1, 3), decay=st.booleans()
)  # fmt: skip
@settings(max_examples=60)
def test_coming_home_within_the_update_is_home_then_update(
    shapes, seed, family, groups, count, decay
) -> None:
    owners = [i % groups for i in range(len(shapes))]
    eps = [EPS, EPS / 3][:groups]
    move = move_of(
        seed ^ 1,
        [(seed + k) % 2**64 for k in range(count)],
        [[1e-4, -1e-5, 2e-4][:count], [1e-3, 0.0, 1e-6][:count]][:groups],
        [0.01 * decay, 0.0][:groups],
    )
    last = int(move.seeds[-1])
    apart, fused = (weights_of(tensors_of(shapes, seed), family, owners, eps) for _ in range(2))
    for weights in (apart, fused):
        weights.look(last, eps, 1.0)
        weights.look(last, eps, -2.0)
    apart.look(last, eps, 1.0)
    apart.update([move])
    fused.update([move], back=eps)
    assert same(bits(apart), bits(fused))


@given(shapes=LAYOUTS, seed=SEEDS, family=FAMILY, steps=st.integers(2, 12), data=st.data())
@settings(max_examples=40)
def test_many_moves_in_a_pass_are_the_moves_one_by_one(shapes, seed, family, steps, data) -> None:
    owners = [i % 2 for i in range(len(shapes))]
    moves = random_moves(seed, steps, groups=2)
    by_one, at_once = (
        weights_of(tensors_of(shapes, seed), family, owners, [EPS, EPS]) for _ in range(2)
    )
    for move in moves:
        by_one.update([move])
    cut = data.draw(st.integers(1, steps))
    for part in (moves[:cut], moves[cut:]):
        if part:
            at_once.update(part)
    assert same(bits(by_one), bits(at_once))


@pytest.mark.parametrize("family", ["rank1", "rank1-rademacher"])
def test_a_long_replay_along_rank_one_directions_is_cut_without_a_trace(family: str) -> None:
    moves = random_moves(3, 150)
    assert sum(len(move.seeds) for move in moves) > 2 * 128  # so it is halved more than once
    by_one, at_once = (weights_of(tensors_of([(33, 65), (7,)]), family) for _ in range(2))
    for move in moves:
        by_one.update([move])
    at_once.update(moves)
    assert same(bits(by_one), bits(at_once))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_was_drawn_gives_the_bits_of_what_is_drawn_again(family: str) -> None:
    shapes = [(33, 65), (7,), (1, 1500), (2, 3, 4), ()]
    given_, made = (weights_of(tensors_of(shapes), family) for _ in range(2))
    [move] = random_moves(5, 1)
    drawn = made.draw(move.seeds)
    for i in range(len(shapes)):
        alone = made.factors(i, move.seeds) if made.is_outer(i) else (made.dense(i, move.seeds),)
        assert len(alone) == len(drawn[i])
        assert all(np.array_equal(a, b) for a, b in zip(alone, drawn[i], strict=True))
    made.update([move])
    given_.update([move], draws=drawn)
    assert same(bits(given_), bits(made))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_threads_never_change_a_bit(family: str) -> None:
    shapes = [(1024 * 3 + 5,), (70, 130), (), (0,), (4, 30, 30), (1,)]
    results = []
    for threads in (1, 2, 3, 64):  # 64: more threads than tiles
        torch.set_num_threads(threads)
        weights = weights_of(tensors_of(shapes), family)
        looked = []
        for times in (1.0, -2.0):
            weights.look(11, [EPS], times)
            looked += bits(weights)
        moves = random_moves(1, 3)
        weights.look(11, [EPS], 1.0)
        weights.look(int(moves[0].seeds[-1]), [EPS], -1.0)
        weights.update(moves[:1], back=[EPS])
        weights.update(moves[1:])
        results.append(looked + bits(weights))
    for other in results[1:]:
        assert same(results[0], other)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_an_error_in_another_thread_comes_out(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from justforward.noise import cpu

    other_is_here = threading.Event()

    def fail(theta: object, grid: object, first: int, last: int, *rest: object) -> None:
        if threading.current_thread() is threading.main_thread():
            assert other_is_here.wait(60)  # or this thread could do all the shares alone
        else:
            other_is_here.set()
            raise MemoryError(first)

    for name in ("look", "look_signs", "look_outer"):
        monkeypatch.setattr(cpu, name, fail)
    torch.set_num_threads(2)
    weights = weights_of(tensors_of([(600, 1024)]), family)
    with pytest.raises(MemoryError):
        weights.look(1, [EPS], 1.0)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_decay_leaves_biases_and_norms_alone(family: str) -> None:
    weights = weights_of(tensors_of([(), (1025,), (30, 40), (4, 3, 90)], scale=1.0), family)
    start = [t.clone() for t in weights.tensors]
    weights.update([move_of(1, [5], [[0.0]], [0.25])])
    assert same(bits(weights)[:2], [t.view(torch.int32) for t in start[:2]])
    for i in (2, 3):
        lost = start[i].double() * 0.75 - weights.tensors[i].double()
        assert (lost.abs() <= 1.01 * q_of(weights, i)).all()


# ---------------------------------------------------------------------------------------------- growth


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_tiles_that_grow_get_a_coarser_grid_and_replay_alike(family: str) -> None:
    tensors = tensors_of([(33, 65), (1500,), ()], scale=1e-3)
    moves = random_moves(9, 30, scale=3.0)
    by_one, at_once = (weights_of(tensors, family) for _ in range(2))
    finest = [e.clone() for e in by_one.exponents]
    for move in moves:
        by_one.update([move])
        for i, t in enumerate(by_one.tensors):
            n = t.double() / q_of(by_one, i)
            assert torch.equal(n, n.round())
            assert (n.abs() <= spec.GRID_LIMIT).all()
    for before, after in zip(finest, by_one.exponents, strict=True):
        assert (after > before + 5).all()
    torch.set_num_threads(2)
    at_once.update(moves)
    assert same(bits(by_one), bits(at_once))
    before = bits(by_one)
    for times in (1.0, -2.0, 1.0):
        by_one.look(2, [EPS], times)
    assert same(bits(by_one), before)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_tile_grows_alone(family: str) -> None:
    tensor = torch.full((3 * spec.TILE,), 1e-3)
    tensor[spec.TILE : 2 * spec.TILE] = 1.0
    weights = weights_of([tensor], family)
    first, second, third = weights.exponents[0].tolist()
    assert first == third < second
    weights.update([move_of(1, [5], [[0.1]], [0.0])])
    assert weights.exponents[0][1] == second
    assert first < weights.exponents[0][0] < second


# -------------------------------------------------------------------------------------------- refusals


def overlapping() -> list[tuple[str, Tensor]]:
    whole = torch.zeros(10)
    return [("head.weight", whole[:6]), ("body.weight", whole[5:])]


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ([("a.w", torch.zeros(3, device="meta"))], "parameter a.w is on the meta device"),
        ([("a.w", torch.zeros(3).half())], r"parameter a.w is torch.float16 and no nn.Parameter: .*freeze it"),
        ([("a.w", torch.zeros(3).bfloat16())], "parameter a.w is torch.bfloat16"),
        ([("a.w", torch.zeros(3).double())], r"parameter a.w is torch.float64: only float32, .*freeze it"),
        ([("a.w", torch.zeros(3, dtype=torch.int8))], "parameter a.w is torch.int8"),
        ([("a.w", torch.zeros(3, 4).T)], r"parameter a.w is not contiguous \(shape \(4, 3\), strides \(1, 4\)\)"),
        ([("a.w", torch.zeros(6)[::2])], "parameter a.w is not contiguous"),
        ([("a.w", torch.zeros(1).expand(4))], "parameter a.w is not contiguous"),
        ([("a.w", torch.zeros(3, 4).to_sparse())], "parameter a.w is not contiguous"),
        ([("a.w", torch.tensor([[0.0, 1.0], [torch.nan, 0.0]]))], "parameter a.w is nan at element 2: all weights must be"),
        ([("ok", torch.zeros(2)), ("a.w", torch.tensor(-torch.inf))], "parameter a.w is -inf at element 0"),
        (overlapping(), "parameters head.weight and body.weight share memory"),
        (overlapping()[::-1], "parameters head.weight and body.weight share memory"),
    ],
)  # fmt: skip
def test_tensors_that_cannot_be_moved_are_refused_by_name(
    named: list[tuple[str, Tensor]], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Weights(named, [0] * len(named), FAMILIES["gaussian"], [EPS])
    assert "\n" not in str(caught.value)


def test_neighbours_in_one_buffer_are_not_refused() -> None:
    whole = torch.zeros(10)
    parts = [("a", whole[:5]), ("b", whole[5:]), ("empty", whole[3:3])]
    Weights(parts, [0] * 3, FAMILIES["gaussian"], [EPS]).look(1, [EPS], 1.0)
    assert (whole != 0).all()


# ---------------------------------------------------------------------------------------------- models


class Tied(nn.Module):
    """An embedding that is also the head, and a frozen bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 4)
        self.head = nn.Linear(4, 12)
        self.head.weight = self.embedding.weight
        self.head.bias.requires_grad_(False)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_tied_tensor_is_moved_once_and_a_frozen_one_never(family: str) -> None:
    torch.manual_seed(0)
    model = Tied()
    frozen = model.head.bias.clone()
    optimizer = jf.MeZO(model, lr=1.0, family=family)
    assert optimizer.weights.names == ["embedding.weight"]
    start = model.embedding.weight.detach().double()
    step = optimizer.estimate(lambda: model.head(model.embedding.weight).square().mean())
    optimizer.apply(step)
    z = materialise(optimizer.weights, 0, jf.noise.direction_seed(0, 0, 0))
    moved = model.embedding.weight.detach().double() - start
    assert model.head.weight is model.embedding.weight
    assert (
        (moved - step.coefficients[0] * z).abs() <= 1e-5 * z.abs() + q_of(optimizer.weights, 0)
    ).all()
    assert (moved != 0).any()
    assert torch.equal(model.head.bias.view(torch.int32), frozen.view(torch.int32))
