"""Layers that are chosen as the run goes: which part, from what, and when; the log and every way to go on.

Reading order: parts, choices, runs, what is refused.
"""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import justforward as jf
from conftest import ARCHITECTURES, MASKED, make_model, refusal, small_run
from conftest import lines_of as lines
from conftest import trained as go
from justforward.config import ReplayConfig, TrainConfig
from justforward.depth import Choice, Depth, parts_of
from justforward.errors import UserError
from justforward.folder import RunFolder
from justforward.guard import lost_forwards, rate_factor
from justforward.lines import Lines
from justforward.outcome import Interrupted
from justforward.prepare import choose_tuned, judged
from justforward.progress import Progress
from justforward.rebuild import rebuild
from justforward.session import Session
from justforward.starting import choose_layers
from justforward.trajectory import read_log
from justforward.trunk import frozen_layers
from justforward.variants import Blocks

# ------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MASKED])
def test_each_tensor_that_moves_is_in_one_part(architecture: str) -> None:
    model = make_model(architecture)
    choose_layers(model, small_run(Path("m"), Path("d"), Path("o"), layers="auto"))
    depth = Depth(model)
    assert [(part.first, part.last) for part in depth.parts] == [(0, 0), (1, 1)]
    assert [part.share for part in depth.parts] == [1.0, 0.5]
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    labels = depth.blocks.labels([names])[0]
    assert set(labels) == {part.pattern for part in depth.parts}
    lower = {name for name, label in zip(names, labels, strict=True) if label}
    assert lower
    assert all(".0." in name for name in lower)
    assert not any(".0." in name for name in set(names) - lower)
    assert not any("embed" in name and ".1." not in name for name in names)  # they are below all


@given(st.integers(2, 40), st.integers(2, 5))
def test_parts_are_of_like_size_and_leave_no_layer_out(count: int, wanted: int) -> None:
    class Model(jf.optim.nn.Module):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.layers = jf.optim.nn.ModuleList(jf.optim.nn.Linear(1, 1) for _ in range(count))  # type: ignore[attr-defined]

    model = Model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("justforward.depth.stack_of", lambda model: model.layers)
        parts = parts_of(model, wanted)
    assert len(parts) == min(count, wanted)
    numbers = [n for part in parts for n in range(part.first, part.last + 1)]
    assert numbers == list(range(count))
    sizes = {part.last - part.first + 1 for part in parts}
    assert max(sizes) - min(sizes) <= 1


def test_parts_without_anything_to_tune_are_left_out() -> None:
    model = make_model("gpt2")
    choose_tuned(model, r"h\.1\.")
    with pytest.raises(UserError, match=r"--layers is 'auto': all that is tuned is in layers 1 to 1: leave it out"):  # fmt: skip
        Depth(model)
    choose_tuned(model := make_model("gpt2"), "ln_f")
    with pytest.raises(UserError, match="all that is tuned is outside of the layers"):
        Depth(model)


def test_what_rests_is_below_the_part_that_moves() -> None:
    model = make_model("llama")
    choose_layers(model, small_run(Path("m"), Path("d"), Path("o"), layers="auto"))
    depth = Depth(model)
    flags = [p.requires_grad for p in model.parameters()]
    for metrics, layers in (([], 1), ([line(0)], 0), ([line(0), line(1)], 1)):
        with depth.resting(model, metrics):
            assert frozen_layers(model) == layers
        assert [p.requires_grad for p in model.parameters()] == flags


# ----------------------------------------------------------------------------------------- choices


def line(part: int, **more: Any) -> dict[str, Any]:
    return {"kind": "layers", "step": 0, "forwards": 0, "part": part, "rate": 1.0, "lost": 0} | more


def test_the_part_that_sees_the_most_for_its_cost() -> None:
    model = make_model("llama")
    choose_layers(model, small_run(Path("m"), Path("d"), Path("o"), layers="auto"))
    depth = Depth(model)
    assert depth.chosen({"0": 1.9, "1": 1.0}, []) == 1  # of half the cost
    assert depth.chosen({"0": 2.0, "1": 1.0}, []) == 1
    assert depth.chosen({"0": 2.1, "1": 1.0}, []) == 0
    assert depth.chosen({"0": 0.0, "1": 9.0}, [line(1)]) == 0  # the other has moved
    assert (depth.asked([]), depth.asked([line(1)]), depth.asked([line(1), line(0)])) == ([0, 1], [1, 0], [0])  # fmt: skip
    config = small_run(Path("m"), Path("d"), Path("o"), layers="auto", num_samples=3)
    assert depth.cost(config, []) == 2 * 2 * 6
    assert depth.cost(config, [line(1)], first=True) == 0
    said = depth.spelled(Choice(0, 0.25, {"1": 3.0, "0": 12.0}))
    assert said == "layers 0 to 0 move from here on, at 0.25 of the learning rate: projected gradients are about of layers 1 to 1 3, of layers 0 to 0 12"  # fmt: skip


def test_a_choice_counts_in_rate_forwards_and_flatness() -> None:
    def check(step: int, accuracy: float) -> dict[str, Any]:
        return {
            "kind": "validation",
            "step": step,
            "accuracy": accuracy,
            "loss": 1.0,
            "forwards": 4 * step,
        }

    back = {"kind": "rewind", "step": 1, "taken": 3, "lost": 4, "flat": True}
    metrics = [line(1, lost=8), check(0, 0.5), check(1, 0.7), back, line(0, lost=6, rate=0.5), check(2, 0.6)]  # fmt: skip
    assert rate_factor(metrics) == 0.5  # going back for that lowers nothing
    assert lost_forwards(metrics) == 18
    config = small_run(Path("m"), Path("d"), Path("o"), eval_every=4)
    assert judged(config, metrics, 2) == [(0.7, 1.0), (0.6, 1.0)]  # from the best one on


# -------------------------------------------------------------------------------------------- runs


@pytest.fixture
def config(
    tmp_path: Path, model_folder: Path, sentiment_csv: Path, monkeypatch: pytest.MonkeyPatch
) -> TrainConfig:
    """Flat at its first validation, so that both parts move: each step is said to do harm."""
    made = Lines.made

    def worse(self: Lines, kind: str, step: int, forwards: int, **values: Any) -> Any:
        if kind == "validation":
            values = values | {"accuracy": 0.5, "value": 0.5, "loss": 1.0 + 0.01 * step}
        return made(self, kind, step, forwards, **values)

    monkeypatch.setattr(Lines, "made", worse)
    return small_run(
        model_folder, sentiment_csv, tmp_path / "run", layers="auto", patience=1, max_forwards=60,
        lr=3e-2, lr_schedule="constant", backoff=False, eval_every=4,
    )  # fmt: skip


def test_a_run_moves_one_part_after_the_other(config: TrainConfig) -> None:
    result, said = go(config)
    choices = [m for m in lines(config) if m["kind"] == "layers"]
    assert sorted(m["part"] for m in choices) == [0, 1]
    assert [set(m["spreads"]) for m in choices] == [{"0", "1"}] * 2
    first, second = (m["part"] for m in choices)
    before, after = (choices[1]["spreads"][str(part)] for part in (first, second))
    assert choices[1]["rate"] == pytest.approx(before / after)  # a step means to do as much
    assert said.count("move from here on") == 2
    assert "validation is flat: back to step 0" in said
    assert result["stopped_by"] == "flat"
    # 8 looks and 2 steps, in vain, 8 looks, 2 steps
    assert result["forwards"] == 8 + 4 + 8 + 4
    assert result["steps"] == 2
    log = read_log(RunFolder(config.out).log)
    moved = [tuple(scale != 0.0 for scale in step.scales) for step in log.steps]
    assert moved == [(second == 0, second == 1)] * 2


def test_only_the_part_that_moves_moves(config: TrainConfig) -> None:
    go(replace(config, keep="last", patience=99, lr=1e-2))
    base = make_model("gpt2")
    part = next(m["part"] for m in lines(config) if m["kind"] == "layers")
    made = make_model("gpt2")
    jf.replay(made, RunFolder(config.out).log)
    for (name, old), (_, new) in zip(base.named_parameters(), made.named_parameters(), strict=True):
        # the embeddings rest, and the head, which is tied to them
        inside = f".{part}." in name or (part == 1 and "ln_f" in name)
        changed = (old - new).abs().max() > 1e-4
        assert changed == inside, name


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"estimator": "weight"},
        {"estimator": "weight", "rule": "sgd"},
        {"looks": "one-sided", "num_samples": 2},
        {"tuner": "lora", "lora_rank": 2},
        {"start": "probe"},
        {"start": "auto"},
        {"gauge": 2, "lr": None},
        {"dtype": "bfloat16"},
        {"objective": "accuracy"},
        {"reuse": False},
        {"snapshot_every": 2},
    ],
    ids=str,
)
def test_all_kinds_of_runs(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]
) -> None:
    """Each replays, and interrupted after any of its steps goes on to the same bits and lines."""
    config = replace(config, max_forwards=120, **given)
    step, taken, most = Session._step, [0], [10**9]

    def counted(self: Session) -> float:
        if taken[0] == most[0]:
            raise KeyboardInterrupt
        taken[0] += 1
        return float(step(self))

    monkeypatch.setattr(Session, "_step", counted)
    whole, _ = go(config)
    total = taken[0]
    assert total >= 2
    made = rebuild(ReplayConfig(config.out, str(tmp_path / "made")), Progress(io.StringIO()))
    assert made["fingerprint"] == whole["fingerprint"]
    assert len([m for m in lines(config) if m["kind"] == "layers"]) == 2
    for after in range(1, total):
        part = replace(config, out=str(tmp_path / f"part{after}"))
        taken[0], most[0] = 0, after
        with pytest.raises(Interrupted):
            go(part)
        most[0] = 10**9
        again, _ = go(replace(part, resume=True))
        assert again["fingerprint"] == whole["fingerprint"]
        assert again["forwards"] == whole["forwards"]
        kept = [m for m in lines(part) if m["kind"] not in ("step", "validation")]
        assert kept == [m for m in lines(config) if m["kind"] not in ("step", "validation")]


@pytest.mark.parametrize("where", ["_choose_part", "_move_part"])
def test_killed_while_it_chooses(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:  # fmt: skip
    """Between going back and the choice, and right after the choice."""
    whole, _ = go(config)
    part = replace(config, out=str(tmp_path / "part"))
    left, real, calls = tmp_path / "left", getattr(Session, where), [0]

    def killed(self: Session, *rest: Any) -> None:
        calls[0] += 1
        lines = [m["kind"] for m in self.lines.all]
        if lines.count("rewind") == 1 and (where == "_choose_part" or lines.count("layers") == 2):
            shutil.copytree(part.out, left)  # as a SIGKILL would leave it
            raise KeyboardInterrupt
        real(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Session, where, killed)
        with pytest.raises(Interrupted):
            go(part)
    again, _ = go(replace(part, out=str(left), resume=True))
    assert again["fingerprint"] == whole["fingerprint"]
    assert again["forwards"] == whole["forwards"]
    assert lines(replace(part, out=str(left))) == lines(config)


def test_layers_below_what_moves_run_once(config: TrainConfig) -> None:
    """Whichever moves: the lower of the two has nothing below it."""
    _, said = go(config)
    parts = [m["part"] for m in lines(config) if m["kind"] == "layers"]
    texts = said.split("move from here on")
    spared = ["the first 1 of 2 layers do not move" in text for text in texts[1:]]
    assert spared == [part == 1 for part in parts]
    losses = [m["loss"] for m in lines(config) if m["kind"] == "step"]
    other = replace(config, out=config.out + "2", reuse=False)
    go(other)
    assert losses == pytest.approx([m["loss"] for m in lines(other) if m["kind"] == "step"], rel=1e-4)  # fmt: skip


def test_no_choice_that_the_budget_does_not_allow(config: TrainConfig) -> None:
    result, _ = go(replace(config, max_forwards=8 + 4 + 8))
    assert [m["kind"] for m in lines(config)].count("layers") == 1
    assert result["stopped_by"] in ("flat", "max_forwards")
    with pytest.raises(UserError, match=r"--max-forwards is 9: the first step takes 10 forwards"):
        go(replace(config, max_forwards=9, out=config.out + "2"))
    assert not Path(config.out + "2").exists()


def test_blocks_that_are_given() -> None:
    model = make_model("gpt2")
    opt = jf.MeZO(model, lr=1e-2, blocks=Blocks([r"h\.0\.", ""], order="given"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert opt.block == ""  # the first, of the embeddings
    opt.block = r"h\.0\."
    opt.step(lambda: sum(float(p.detach().square().sum()) for p in model.parameters()))
    moved = {name for name, p in model.named_parameters() if not p.equal(before[name])}
    assert moved
    assert all(".h.0." in name for name in moved)
    state = opt.state_dict()
    other = jf.MeZO(model, lr=1e-2, blocks=Blocks([r"h\.0\.", ""], order="given"))
    other.load_state_dict(state)
    assert other.block == r"h\.0\."
    opt.block = "h.7"
    with pytest.raises(UserError, match=r"block is 'h\.7': it must be one of"):
        opt.step(lambda: 1.0)


# ------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"layers": "all"}, "--layers is 'all'"),
        ({"tuner": "prefix"}, "--layers is auto: it is for --tuner full or lora"),
        ({"patience": 0}, "--layers is 'auto' and --patience 0"),
        (
            {"looks": "one-point", "estimator": "weight"},
            "--layers is 'auto' and --looks 'one-point'",
        ),
        (
            {"modified": "variance(weights)", "estimator": "weight"},
            "--layers is 'auto' and --modified",
        ),
        ({"blocks": "layers", "estimator": "weight"}, "--layers is 'auto' and --blocks 'layers'"),
        ({"rule": "rms+momentum"}, "--layers is 'auto' and --rule 'rms+momentum'"),
        ({"rule": "adam"}, "--layers is 'auto' and --rule 'adam'"),
        (
            {
                "private": True,
                "noise_multiplier": 1.0,
                "estimator": "weight",
                "rule": "sgd",
                "backoff": None,
            },
            "--layers is 'auto' and --private True",
        ),
    ],
    ids=str,
)
def test_refused(config: TrainConfig, given: dict[str, Any], said: str) -> None:
    assert said in refusal(replace(config, **given))


def test_a_run_is_resumed_as_it_was_begun(config: TrainConfig) -> None:
    go(replace(config, max_forwards=14))
    with pytest.raises(UserError, match=r"--layers is 'auto' in the run and 0\.5 now"):
        go(replace(config, layers=0.5, resume=True))
    again, _ = go(replace(config, layers=None, resume=True, max_forwards=60))
    assert again["stopped_by"] == "flat"
