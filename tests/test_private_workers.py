"""Privacy in several processes: one sample, one bound and one noise a step, whatever they are divided into; nothing spent twice.

With known entropy the log is that of one process, byte for byte. What is drawn elsewhere than in process 0 fails the test.
"""

from __future__ import annotations

import math
import os
import random
import re
import signal
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import justforward as jf
from justforward import private as module
from justforward import rules
from justforward.private import GRID, Private
from justforward.recipe import Recipe
from justforward.sights import Sight
from justforward.workers import Workers
from processes import together
from test_private import ROWS, losses, model

VARIANTS: list[dict[str, Any]] = [
    {"rule": "rms", "num_samples": 3},
    {"rule": "adam(window=3)", "num_samples": 2, "looks": "one-sided"},
]
EMPTY = 1  # rows a step, on average: a third of the samples are empty


def known_entropy(patch: pytest.MonkeyPatch, rank: int = 0) -> None:
    """The same rows and noise every time, in process 0; no other may draw any."""
    source = random.Random(7)

    def none(_: int) -> Any:
        raise AssertionError(f"process {rank} draws")

    patch.setattr(module, "os", SimpleNamespace(urandom=none if rank else source.randbytes))
    patch.setattr(module, "secrets", SimpleNamespace(randbits=none if rank else source.getrandbits))


def broken(net: Any, rows: list[int]) -> torch.Tensor:
    """Row 2 has a loss that is no number."""
    found = losses(net, rows)
    return torch.where(torch.tensor(rows) == 2, math.nan, found)


def private_run(
    log: Path | None,
    steps: int,
    variant: dict[str, Any],
    size: int = 4,
    clip: float | None = None,
    plain: bool = False,
    **arguments: Any,
) -> tuple[str, int, list[int]]:
    """Fingerprint, answers, and how many rows each step had; the log is process 0's. `plain`: without Workers."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    net, private = model(), Private(rows=ROWS, batch_size=size, noise_multiplier=0.5, clip=clip)
    mine = log if rank == 0 else None
    opt = jf.MeZO(net, lr=1e-2, seed=3, private=private, log=mine, resume=True, **variant)
    workers = None if plain else Workers(opt, **arguments)
    counts = []
    while opt.steps < steps:
        drawn = private.draw()
        counts.append(len(drawn))

        def by_place(places: torch.Tensor, drawn: list[int] = drawn) -> torch.Tensor:
            return torch.cat([broken(net, [drawn[place]]) for place in places.tolist()])

        taken = opt.step if workers is None else workers.step
        assert math.isnan(taken(by_place, torch.arange(len(drawn))))
    (opt if workers is None else workers).close()
    return jf.fingerprint(net), private.answers, counts


def everything(folder: Path, plain: bool = False) -> list[Any]:
    with pytest.MonkeyPatch.context() as patch:
        found = []
        for number, variant in enumerate(VARIANTS):
            for size, clip in ((4, None), (EMPTY, 0.05), (ROWS, 0.05)):
                known_entropy(patch, dist.get_rank() if dist.is_initialized() else 0)
                log = folder / f"{number}-{size}.jfl"
                found.append(private_run(log, 5, variant, size, clip, plain))
        return found


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_log_is_that_of_one_process(tmp_path: Path, size: int) -> None:
    """Also of one that has no Workers, with rows whose losses are no numbers, and with samples that are empty."""
    one, many = tmp_path / "one", tmp_path / "many"
    one.mkdir()
    many.mkdir()
    alone = everything(one, plain=True)
    assert any(0 in counts for *_, counts in alone)
    assert together(size, tmp_path, everything, many) == [alone] * size
    logs = sorted(path.name for path in one.iterdir())
    assert len(logs) == 6
    for name in logs:
        assert (one / name).read_bytes() == (many / name).read_bytes(), name


def divided(log: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        rank = dist.get_rank() if dist.is_initialized() else 0
        known_entropy(patch, rank)
        size = dist.get_world_size() if dist.is_initialized() else 1
        return private_run(log, 4, VARIANTS[0], ROWS, populations=size)


def test_directions_are_divided_like_rows(tmp_path: Path) -> None:
    alone = divided(tmp_path / "one.jfl")
    assert together(2, tmp_path, divided, tmp_path / "two.jfl") == [alone] * 2
    assert (tmp_path / "one.jfl").read_bytes() == (tmp_path / "two.jfl").read_bytes()


# ------------------------------------------------------------------------------------------ the bound

RECIPE = Recipe(0, rules.parse("sgd"), (), (0.5,), (1.0,), (0.0,), ((1.0, 1.0),), (1.0,))
numbers = st.floats(width=32, allow_nan=True, allow_infinity=True)


@st.composite
def divisions(draw: Any) -> tuple[list[list[float]], int, list[list[range]]]:
    """Rises of rows along samples; and two ways to divide the rows, and those without the last."""
    samples, rows = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    row = st.lists(numbers, min_size=samples, max_size=samples)
    rises = draw(st.lists(row, min_size=rows, max_size=rows))
    cuts = []
    for count in (rows, rows, rows - 1):
        workers = draw(st.integers(1, 4))
        edges = [count * k // workers for k in range(workers + 1)]
        cuts.append([range(a, b) for a, b in pairwise(edges) if b > a])
    return rises, samples, cuts


@settings(deadline=None)
@given(divisions(), st.one_of(st.none(), st.floats(1e-20, 1e20)))
def test_one_row_changes_what_all_workers_add_up_by_no_more_than_the_clip(
    case: tuple[list[list[float]], int, list[list[range]]], clip: float | None
) -> None:
    rises, samples, cuts = case
    private = Private(rows=9, batch_size=3, noise_multiplier=1.0, clip=clip)
    totals: list[list[int]] = []
    for cut in cuts:
        count = sum(map(len, cut))
        private._drawn = count
        sights = [
            Sight(
                0,
                tuple(range(samples)),
                tuple(part),
                tuple(tuple(rises[r][s] for r in part) for s in range(samples)),
                0.0,
                2,
            )
            for part in cut
        ]
        sent = [Sight.unpack(sight.pack(), finite=False) for sight in sights]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "whole_gaussian", lambda deviation: 0)
            patch.setattr(private, "_in_one", lambda drawn: totals.append(drawn()) or totals[-1])
            private.combined(reversed(sent), RECIPE, samples, "two-sided")
    assert totals[0] == totals[1]
    assert sum((a - b) ** 2 for a, b in zip(totals[0], totals[2], strict=True)) <= GRID**2


# --------------------------------------------------------------------------------- starts and restarts


def restarted(folder: Path) -> list[Any]:
    """Process 1 dies within the third step, where the others have drawn and looked."""
    rank, calls, looks = dist.get_rank(), 0, 2 * 3 * (ROWS // 3)  # of its rows, by themselves
    real = losses

    def dying(net: Any, rows: list[int]) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if rank == 1 and calls == 2 * looks + 1 and (folder / "first").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return real(net, rows)

    globals()["losses"] = dying
    try:
        return list(private_run(folder / "run.jfl", 6, VARIANTS[0], ROWS)[:2])
    finally:
        globals()["losses"] = real


def test_what_was_spent_before_a_worker_died_is_counted_once(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "first").touch()
    found = together(3, tmp_path, restarted, folder)
    assert found[1] is None
    for said in (found[0], found[2]):
        assert said[0] == "UserError"
        assert "worker 1 of 3 ended in step" in said[1]
    before = jf.read_log(folder / "run.jfl")
    assert 0 < len(before.steps) < 6
    (folder / "first").unlink()
    # by another number of processes; those that have no log follow, and have counted as many
    found = together(2, tmp_path, restarted, folder)
    assert found[0] == found[1]
    assert found[0][1] == 6
    after = jf.read_log(folder / "run.jfl")
    assert after.steps[: len(before.steps)] == before.steps
    assert len(after.steps) == 6
    base = model()
    jf.replay(base, folder / "run.jfl")
    assert jf.fingerprint(base) == found[0][0]


def asked(what: str) -> str:
    """What is said where process 1 differs, or the processes do what they must not."""
    odd = dist.get_rank() == 1
    net = model()
    private = Private(
        rows=ROWS, batch_size=4, noise_multiplier=0.6 if odd and what == "noise" else 0.5
    )
    opt = jf.MeZO(net, lr=1e-2, private=None if odd and what == "none" else private)
    if what == "drawn":
        private.draw()
    try:
        workers = Workers(opt, rows_at_once=2 if what == "rows_at_once" else 1)
        if what == "not drawn":
            workers.step(lambda rows: losses(net, rows.tolist()), torch.arange(4))
        rows = torch.tensor(private.draw() or [0])
        if what == "twice":
            private.draw()
        if what == "fewer":
            workers.step(lambda rows: losses(net, rows.tolist()), torch.cat([rows, rows]))
    except jf.UserError as error:
        return str(error)
    return ""


ASKED = {
    "noise": r"at the start: private is .*'noise_multiplier': 0.5.* in worker 0, .*0.6.* in worker 1",
    "none": r"private is .* in worker 0, None in worker 1",
    "drawn": r"drawn last are this process's own: draw when the processes are together",
    "rows_at_once": "rows_at_once is 2, with private: rows that go through the model together",
    "not drawn": "private: no rows were drawn for this look",
    "twice": "rows drawn last were not looked at",
    "fewer": "private: the batch has .* rows, and .* were drawn: step with all of them and no others",
}


def all_asked() -> list[str]:
    return [asked(what) for what in ASKED]


def test_what_would_void_it_is_refused_in_all(tmp_path: Path) -> None:
    for found in together(2, tmp_path, all_asked):
        for said, pattern in zip(found, ASKED.values(), strict=True):
            assert re.search(pattern, said), (pattern, said)


def test_processes_draw_the_same_rows_from_the_system_s_entropy() -> None:
    """Alone in Workers it is the same as without: rows differ from run to run."""
    drawn = set()
    for _ in range(3):
        private = Private(rows=200, batch_size=20, noise_multiplier=1.0)
        Workers(jf.MeZO(model(), private=private))
        drawn.add(tuple(private.draw()))
    assert len(drawn) == 3
    assert np.mean([len(rows) for rows in drawn]) == pytest.approx(20, abs=15)
