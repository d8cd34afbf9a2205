"""`--start deep` with LoRA: the regression, the directions that a head reads, what ranks are left to steps, runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression

import justforward as jf
from conftest import ARCHITECTURES, MASKED, make_model, make_tokenizer
from justforward import added, lowrank
from justforward.added import added_hindrance, start_added, written_by
from justforward.config import EvalConfig, ReplayConfig, TrainConfig
from justforward.errors import UserError
from justforward.evaluate import Scorer
from justforward.folder import RunFolder
from justforward.head import own_head
from justforward.probe import Features, hidden_states
from justforward.rebuild import evaluate, rebuild
from justforward.settings import resolved
from justforward.stream import Norm, Stream
from justforward.tasks import Task
from justforward.tuners import attach
from test_deep import TOKENIZER, WORDS, go, rows

TARGETS = r"(c_attn|c_proj|out_proj|fc2|q_proj|v_proj|o_proj|down_proj)$"


def scorer_for(architecture: str, labels: int = 2, rank: int = 4) -> Scorer:
    tokenizer = make_tokenizer(TOKENIZER[architecture])
    words = dict(list(WORDS.items())[:labels])
    config = TrainConfig(
        "m", "d", "o", template="{text} It was", labels=words, tuner="lora", lora_rank=rank,
        lora_targets=TARGETS, start="base",
    )  # fmt: skip
    return Scorer(
        attach(make_model(architecture), tokenizer, config), tokenizer, Task("{text} It was", words)
    )


# ------------------------------------------------------------------------------------------- the fit


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.sampled_from([2, 3, 5]), st.sampled_from([0.1, 1.0, 30.0]))
def test_the_regression_is_logistic(seed: int, labels: int, c: float) -> None:
    """Beside nothing scikit-learn's; beside anything the slope is none."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 6, generator=draw, dtype=torch.float64)
    answers = torch.cat([torch.arange(labels), torch.randint(labels, (40 - labels,), generator=draw)])  # fmt: skip
    mix = added._mix(labels)
    nothing = torch.zeros(mix.shape[1], 6, dtype=torch.float64)
    found, converged = added._regression(x, torch.zeros(40, labels).double(), answers, mix, c, nothing)  # fmt: skip
    assert converged
    twin = LogisticRegression(C=c, fit_intercept=False, tol=1e-10, max_iter=5000)
    twin.fit(x.numpy(), answers.numpy())
    np.testing.assert_allclose(found, twin.coef_, atol=1e-3, rtol=1e-3)
    beside = torch.randn(40, labels, generator=draw, dtype=torch.float64)
    found, _ = added._regression(x, beside, answers, mix, c, nothing)
    found.requires_grad_()
    scores = beside + (x @ found.T) @ mix.T
    loss = torch.nn.functional.cross_entropy(scores, answers, reduction="sum") + found.square().sum() / (2 * c)  # fmt: skip
    slope = torch.autograd.grad(loss, found)[0]
    assert slope.abs().max() < 1e-2


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.sampled_from([2, 3, 6]), st.booleans())
def test_the_head_reads_a_direction_as_its_label_and_no_other(
    seed: int, labels: int, centred: bool
) -> None:
    draw = torch.Generator().manual_seed(seed)
    width = 16
    x = torch.randn(50, width, generator=draw)
    norm = Norm(torch.rand(width, generator=draw) + 0.5, torch.zeros(width), centred)
    seen = Features(norm.of(x), torch.zeros(50), 1, outputs=[x, x])
    reader = torch.nn.Linear(width, 3)
    stream = Stream([], {}, [([reader], torch.ones(width))])
    head = torch.randn(labels, width, generator=draw, dtype=torch.float64)
    to = added.spoken(stream, norm, seen, head)
    assert to.dtype == torch.float32
    away = to - to.mean(dim=0) if centred else to
    said = head @ (away * norm.scale[:, None]).double()
    said = said - said.mean(dim=0)
    wanted = added._mix(labels) - added._mix(labels).mean(dim=0)
    np.testing.assert_allclose(said, wanted, atol=1e-4)


# ------------------------------------------------------------------------------------------ into LoRA


@pytest.mark.parametrize("labels", [2, 3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_start_is_what_is_said_of_it(architecture: str, labels: int) -> None:
    scorer, given, other = scorer_for(architecture, labels), rows(120, labels), rows(40, labels, 1)
    weights = {n: p.detach().clone() for n, p in scorer.model.named_parameters()}
    before = own_head(scorer).judged(*hidden_states(scorer, other, 8).pair)[1]
    started = start_added(scorer, given, other, 8, 0.5)
    found = scorer.evaluate(other, 8)
    assert found.accuracy == pytest.approx(started.accuracy)
    assert found.loss <= before + 1e-4
    names = [n.removeprefix("a.") for n in started.rows if n.startswith("a.")]
    assert len(names) == (0 if started.kept else 2)  # of the upper one of two layers
    moved = {n for n, p in scorer.model.named_parameters() if not torch.equal(p, weights[n])}
    assert moved == {f"{n}.lora_{x}.default.weight" for n in names for x in "AB"}
    # 15 passes over the rows and 5 over the validation's, and in each round those, and those again where it was one for the better
    passes = 20 + 5 * added.ROUNDS
    assert started.forwards in range(passes, passes + 15 * added.ROUNDS + 1, 15)


def test_it_learns_what_the_model_does_not_know() -> None:
    wins = 0
    for seed in range(3):
        scorer, other = scorer_for("gpt2"), rows(60, 2, seed + 10)
        wins += start_added(scorer, rows(200, 2, seed), other, 16, 0.5).accuracy > 0.6
    assert wins >= 2


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.sampled_from([1, 3]), st.floats(0.01, 100.0))
def test_ranks_write_what_was_fitted_as_loud_as_drawn_ones(
    seed: int, count: int, loud: float
) -> None:
    draw = torch.Generator().manual_seed(seed)
    layer = next(iter(lowrank.lora_layers(scorer_for("opt").model).values()))
    x = torch.randn(30, 50, generator=draw)
    x[:, 3] *= loud
    what, to = torch.randn(count, 50, generator=draw), torch.randn(7, count, generator=draw)
    a, b = lowrank.ranks_of(layer, what, to, x)
    torch.testing.assert_close(b @ a * layer.scaling["default"], to @ what, atol=1e-4, rtol=1e-4)
    drawn = torch.randn(4000, 50, generator=draw) / (3 * 50) ** 0.5
    usual = float((x @ drawn.T).square().mean().sqrt())
    np.testing.assert_allclose((x @ a.T).square().mean(dim=0).sqrt(), usual, rtol=0.15)


def test_a_model_that_knows_better_is_left_alone_where_that_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(added, "stays", lambda *given: True)
    scorer = scorer_for("llama")
    before = jf.fingerprint(scorer.model)
    found = start_added(scorer, rows(60, 2), rows(20, 2, 1), 8, 0.5, or_base=True)
    assert (found.kept, found.rows) == (True, {})
    assert jf.fingerprint(scorer.model) == before
    assert not start_added(scorer, rows(60, 2), rows(20, 2, 1), 8, 0.5).kept
    assert jf.fingerprint(scorer.model) != before


def test_what_is_in_its_way() -> None:
    row = rows(1, 2)[0]
    scorer = scorer_for("llama", 3)
    assert added_hindrance(scorer, row, 0.5, 3) is None
    assert added_hindrance(scorer, row, 0.5, 2) == "3 labels take a rank of as many, and --lora-rank is 2"  # fmt: skip
    assert (
        added_hindrance(scorer_for("llama", 2), row, 0.5, 1) is None
    )  # only the difference counts
    wanted = [f"base_model.model.model.layers.1.{n}" for n in ("self_attn.o_proj", "mlp.down_proj")]
    assert written_by(scorer, row, 0.5) == wanted
    tokenizer = make_tokenizer(MASKED["bert"])
    masked = Scorer(make_model("bert"), tokenizer, Task("{text} It was {mask}.", {"neg": "bad", "pos": "good"}))  # fmt: skip
    said = added_hindrance(masked, rows(1, 2)[0], 0.5, 8)
    assert said is not None
    assert "more than linear maps" in said


# ------------------------------------------------------------------------------------------------ runs


@pytest.fixture
def config(tmp_path: Path, model_folder: Path, sentiment_csv: Path) -> TrainConfig:
    return TrainConfig(
        model=str(model_folder), data=str(sentiment_csv), template="{text} It was",
        labels={"neg": "great", "pos": "terrible"}, out=str(tmp_path / "run"), max_forwards=20,
        eval_every=6, threads=1, start="deep", patience=0, keep="last", layers=0.5, tuner="lora",
        lr_schedule="constant", probe_rows=40,
    )  # fmt: skip


def test_base_start_and_log_are_the_tuned_model(config: TrainConfig, tmp_path: Path) -> None:
    result, kept, said = go(config)
    assert "the LoRA starts as a linear probe: C = " in said
    assert kept.lora_targets == r"\.(c_attn|c_proj)$"
    assert result["steps"] > 2
    names = [t[0] for t in jf.read_log(RunFolder(config.out).log).header["tensors"]]
    assert all(".h.1." in name and ".lora_" in name for name in names)
    out = tmp_path / "rebuilt"
    again = rebuild(ReplayConfig(config.out, str(out), threads=1))
    assert again["fingerprint"] == result["fingerprint"]
    scored = evaluate(EvalConfig(run=config.out, threads=1))
    assert (scored["accuracy"], scored["loss"]) == (result["accuracy"], result["loss"])
    # the adapter that was saved is all of it, for peft too
    alone = evaluate(EvalConfig(model=str(out), data=config.data, template=config.template, labels=config.labels, threads=1))  # fmt: skip
    whole = evaluate(EvalConfig(run=config.out, split="all", threads=1))
    assert alone["loss"] == pytest.approx(whole["loss"], abs=1e-6)
    merged = rebuild(ReplayConfig(config.out, str(tmp_path / "merged"), merge=True, threads=1))
    assert merged["steps"] == result["steps"]


def test_a_run_goes_on_as_it_began(config: TrainConfig) -> None:
    config = replace(config, start="auto", layers=None)
    whole, kept, _ = go(config)
    assert (kept.start, kept.layers) == ("deep", 0.333)
    part = replace(config, out=f"{config.out}-part", max_forwards=12)
    go(part)
    again, _, _ = go(replace(part, max_forwards=20, resume=True, probe_rows=None))
    assert again["fingerprint"] == whole["fingerprint"]


def test_another_start_or_tuner_is_named_as_what_it_is(config: TrainConfig) -> None:
    """And not what the run's own has brought with it, such as --lora-targets."""
    go(config)
    kept = replace(RunFolder(config.out).read_config(), resume=True)
    for option, was in (({"tuner": "full"}, "lora"), ({"start": "base"}, "deep")):
        ((name, value),) = option.items()
        with pytest.raises(UserError, match=f"--{name} is '{was}' in the run and '{value}' now"):
            go(replace(kept, **option))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"labels": {"neg": "not good", "pos": "great"}}, "label word 'not good' is 2 tokens"),
        ({"lora_targets": "c_attn"}, "--lora-targets leaves out c_proj, which writes to the res"),
        # of the lower layer alone; and of the upper one only what reads
        (
            {"lora_targets": r"h\.0\."},
            "--lora-targets finds none of the upper layers' maps that wr",
        ),
        ({"lora_targets": r"h\.0\.|c_attn"}, "--lora-targets finds none of the upper layers' maps"),
    ],
)
def test_where_it_cannot_be(config: TrainConfig, options: Any, said: str) -> None:
    with pytest.raises(UserError, match=f"--start is 'deep': {said}.*: choose --start base"):
        go(replace(config, **options))
    assert not Path(config.out).exists()
    _, kept, told = go(replace(config, start="auto", layers=None, **options))
    assert (kept.start, kept.layers, kept.probe_rows) == ("base", None, None)
    assert kept.lora_targets == options.get("lora_targets")
    assert f"the LoRA starts at nothing, not as a linear probe: {said}" in told or f"the LoRA starts at nothing, not as a probe of the upper layers: {said}" in told  # fmt: skip


def test_what_it_does_not_go_with(config: TrainConfig) -> None:
    with pytest.raises(UserError, match=r"--start is 'deep': .*and this is --tune 'lora_A'"):
        resolved(replace(config, tune="lora_A"))
    with pytest.raises(UserError, match=r"--start is 'probe': .*and this is --tuner lora"):
        resolved(replace(config, start="probe"))


def test_a_file_of_another_run_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    go(config)
    file = RunFolder(config.out).start
    good = load_file(file)
    a = next(n for n in good if n.startswith("a."))
    b = a.replace("a.", "b.", 1)
    replay = ReplayConfig(config.out, str(tmp_path / "rebuilt"), threads=1)
    for bad in (
        {"a.no.such": good[a].clone()},
        {a: good[a][:, :3].contiguous()},
        {a: good[a].double()},
        {b: good[b][:3].contiguous()},
        {a: good[a].repeat(9, 1), b: good[b].repeat(1, 9)},
    ):
        save_file({**good, **bad}, file)
        with pytest.raises(UserError, match=r"start\.safetensors: .*another run's file"):
            rebuild(replay)
    file.unlink()
    with pytest.raises(UserError, match=r"start\.safetensors: is missing"):
        rebuild(replay)
