"""`--start deep`: the regression, what is written into the weights, runs that start from it."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

import justforward as jf
from conftest import ARCHITECTURES, MASKED, make_model, make_tokenizer
from justforward import deep
from justforward.config import ReplayConfig, TrainConfig
from justforward.data import Example
from justforward.deep import deep_hindrance, silent_directions, start_deep
from justforward.errors import UserError
from justforward.evaluate import Scorer
from justforward.folder import RunFolder
from justforward.probe import hidden_states
from justforward.progress import Progress
from justforward.rebuild import rebuild
from justforward.run import train
from justforward.settings import resolved
from justforward.stream import Norm, find_norm, find_stream
from justforward.tasks import Task
from justforward.tuners import attach

TOKENIZER = {"opt": "metaspace", "gpt2": "bytelevel", "llama": "metaspace", **MASKED}
WORDS = {"neg": "terrible", "pos": "great", "so": "good"}
ADJECTIVES = ("great", "bad", "good", "dull", "fine", "poor", "nice", "cold")


def rows(count: int, labels: int, seed: int = 0) -> list[Example]:
    """Texts whose label follows from two of their words, not from their last."""
    draw = np.random.default_rng(seed)
    found = []
    for i in range(count):
        first, second = draw.integers(0, len(ADJECTIVES), 2)
        label = list(WORDS)[(first + second) % labels]
        text = f"{ADJECTIVES[first]} film {ADJECTIVES[second]} {i % 7} one"
        found.append(Example({"text": text}, label, "rows.csv", i + 2))
    return found


def scorer_for(architecture: str, labels: int = 2) -> Scorer:
    tokenizer = make_tokenizer(TOKENIZER[architecture])
    words = dict(list(WORDS.items())[:labels])
    config = TrainConfig("m", "d", "o", template="{text} It was", labels=words, start="deep")
    model = attach(make_model(architecture), tokenizer, config)
    template = "{text} It was {mask}." if architecture in MASKED else "{text} It was"
    return Scorer(model, tokenizer, Task(template, words))


def parts(scorer: Scorer, train: list[Example], other: list[Example]) -> Any:
    stream = deep.stream_of(scorer, train[0], 0.5)
    assert stream is not None
    modules = list(stream.writers.values())
    seen, chosen = (hidden_states(scorer, r, 8, modules, stream.layers) for r in (train, other))
    norm = find_norm(*deep.everywhere(scorer, stream, train[0]))
    assert norm is not None
    return stream, norm, seen, chosen


# ------------------------------------------------------------------------------------------- the fit


@pytest.mark.parametrize("labels", [2, 3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_fit_is_a_logistic_regression_on_all_inner_states(
    architecture: str, labels: int
) -> None:
    """Against one on the features themselves, one after the other, without the products of rows."""
    scorer, given, other = scorer_for(architecture, labels), rows(60, labels), rows(20, labels, 1)
    stream, norm, seen, chosen = parts(scorer, given, other)
    fitted = deep._fit(scorer, list(stream.writers), seen, chosen, norm)

    def features(states: Any, scales: list[Any] | None) -> tuple[Any, list[Any]]:
        sizes = norm.sizes(states.outputs[-1])
        usual = norm.sizes(seen.outputs[-1]).mean()
        blocks = [(x * usual / sizes).numpy() for x in states.inputs] + [states.features.numpy()]
        many = len(blocks)
        found = scales or [
            np.sqrt((x**2).mean(0)) * np.sqrt(x.shape[1] * many) + 1e-12 for x in blocks
        ]
        return np.concatenate([x / s for x, s in zip(blocks, found, strict=True)], 1), found

    x, scales = features(seen, None)
    twin = LogisticRegression(C=fitted.probe.c, fit_intercept=False, max_iter=5000, tol=1e-8)
    twin.fit(x.astype(np.float64), seen.answers.numpy())
    # the validation rows say how sure it may be
    logits, answers = twin.predict_log_proba(features(chosen, scales)[0]), chosen.answers.numpy()

    def loss(scale: float) -> float:
        return float(log_loss(answers, softmax(scale * logits, axis=1), labels=range(labels)))

    scale = minimize_scalar(loss, bounds=(0.01, 1.0), method="bounded").x
    for states in (seen, chosen):
        wanted = log_softmax(scale * twin.predict_log_proba(features(states, scales)[0]), axis=1)
        found = fitted.scores(states, norm.sizes(states.outputs[-1])).log_softmax(-1)
        # both end where their steps become small, and the loss is flat there
        assert np.abs(found.numpy() - wanted).mean() < 0.02
        np.testing.assert_allclose(found.numpy(), wanted, atol=0.1, rtol=0.05)


def test_silent_directions_avoid_what_the_stream_holds_and_what_is_read() -> None:
    scorer = scorer_for("llama")
    stream, norm, seen, _ = parts(scorer, rows(30, 2), rows(8, 2))
    found = silent_directions(stream, norm, seen, 3)
    torch.testing.assert_close(found.T @ found, torch.eye(3), atol=1e-5, rtol=0)
    held = seen.features / norm.scale
    along = held.square().sum() / 16  # of a direction like any other
    assert (held @ found).square().sum(0).max() < along
    # the mean is no direction where a norm takes it off
    off = silent_directions(stream, Norm(norm.scale, norm.shift, centred=True), seen, 3)
    assert off.sum(0).abs().max() < 1.0


# ----------------------------------------------------------------------------------- into the weights


@pytest.mark.parametrize("labels", [2, 3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_start_is_what_is_said_of_it(architecture: str, labels: int) -> None:
    """The model that is left scores the validation rows as was found before anything was written."""
    scorer, other = scorer_for(architecture, labels), rows(40, labels, 1)
    weights = {n: p.detach().clone() for n, p in scorer.model.named_parameters()}
    started = start_deep(scorer, rows(120, labels), other, 8, 0.5)
    assert (
        started.forwards == 15 + 5 + 4 * 2 + 5
    )  # rows, validation, four strengths of 16 rows, validation
    found = scorer.evaluate(other, 8)
    assert found.accuracy == pytest.approx(started.accuracy)
    states = hidden_states(scorer, other, 8)
    assert found.loss == pytest.approx(started.probe.judged(*states.pair)[1], abs=1e-4)
    moved = {n for n, p in scorer.model.named_parameters() if not torch.equal(p, weights[n])}
    assert all(tensor.is_contiguous() for tensor in started.rows.values())  # safetensors insists
    written = {n.removeprefix("what.") for n in started.rows if n.startswith("what.")}
    assert {f"{n}.weight" for n in written} == {n for n in moved if "head" not in n and "wte" not in n}  # fmt: skip


def test_it_beats_the_probe_of_the_last_state_where_inner_states_know_more() -> None:
    """In validation by the loss; else it would not have been kept."""
    wins = 0
    for seed in range(3):
        given, other = rows(200, 2, seed), rows(60, 2, seed + 10)
        scorer = scorer_for("llama")
        started = start_deep(scorer, given, other, 16, 1.0)
        wins += "to" in started.rows
    assert wins >= 1


def test_the_better_in_validation_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deep, "STRENGTHS", (1e-3,))  # what is written drowns in what is there
    scorer = scorer_for("llama")
    started = start_deep(scorer, rows(120, 2), rows(40, 2, 1), 8, 0.5)
    assert set(started.rows) == {"tokens", "weight"}
    assert find_stream(scorer.model, torch.tensor([[5, 6, 7, 8]]), 0.5) is not None


def test_a_head_that_knows_better_is_left_alone_where_that_is_asked() -> None:
    scorer, given = scorer_for("llama"), rows(120, 2)
    start_deep(scorer, given, rows(40, 2, 1), 8, 0.5)  # the model's own from here on
    before = jf.fingerprint(scorer.model)
    wrong = [replace(row, label="pos" if row.label == "neg" else "neg") for row in given]
    found = start_deep(scorer, wrong, rows(40, 2, 1), 8, 0.5, or_base=True)
    assert found.kept
    assert set(found.rows) == {"tokens", "weight"}
    assert jf.fingerprint(scorer.model) == before
    assert not start_deep(scorer, wrong, rows(40, 2, 1), 8, 0.5).kept


# ---------------------------------------------------------------------------------- where it cannot be


@pytest.mark.parametrize("architecture", sorted(MASKED))
def test_layers_without_a_plain_stream_are_a_hindrance(architecture: str) -> None:
    scorer = Scorer(make_model(architecture), make_tokenizer(TOKENIZER[architecture]), Task("{text} It was {mask}.", {"neg": "bad", "pos": "good"}))  # fmt: skip
    said = deep_hindrance(scorer, rows(1, 2)[0], 0.5)
    assert said is not None
    assert "write to the residual stream by more than linear maps" in said


@pytest.fixture
def config(tmp_path: Path, model_folder: Path, sentiment_csv: Path) -> TrainConfig:
    return TrainConfig(
        model=str(model_folder), data=str(sentiment_csv), template="{text} It was",
        labels={"neg": "great", "pos": "terrible"}, out=str(tmp_path / "run"), max_forwards=20,
        eval_every=6, lr=3e-3, threads=1, start="deep", patience=0, keep="last", layers=0.5,
        lr_schedule="constant", probe_rows=40,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tuner": "head", "layers": None}, "writes to the upper layers .* and this is --tuner head"),
        ({"tune": "mlp"}, "and this is --tune 'mlp'"),
        ({"tuner": "prefix", "layers": None}, "it fits the output head .* and this is --tuner prefix"),
    ],
)  # fmt: skip
def test_what_it_does_not_go_with(config: TrainConfig, options: Any, said: str) -> None:
    with pytest.raises(UserError, match=f"--start is 'deep': .*{said}"):
        resolved(replace(config, **options))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"labels": {"neg": "not good", "pos": "great"}}, "label word 'not good' is 2 tokens"),
        ({"probe_rows": 3}, "3 rows are too few"),
    ],
)
def test_what_is_in_its_way(config: TrainConfig, options: Any, said: str) -> None:
    with pytest.raises(UserError, match=f"--start is 'deep': {said}.*: choose --start base"):
        go(replace(config, **options))
    assert not Path(config.out).exists()


def test_too_many_rows(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("justforward.starting.MOST_ROWS", 30)
    with pytest.raises(UserError, match=r"40 rows are more than the 30 .*: choose --start probe"):
        go(config)
    assert not Path(config.out).exists()
    _, kept, said = go(replace(config, start="auto"))
    assert kept.start == "probe"
    assert "the head alone starts as a linear probe, not the upper layers, too: 40 rows" in said
    _, kept, _ = go(replace(config, probe_rows=None, max_forwards=40, out=config.out + "2"))
    assert (kept.start, kept.probe_rows) == ("deep", 30)


# ------------------------------------------------------------------------------------------------ runs


def go(config: TrainConfig) -> tuple[dict[str, Any], TrainConfig, str]:
    out = io.StringIO()
    result = train(config, Progress(out))
    return result, RunFolder(config.out).read_config(), out.getvalue()


@pytest.fixture
def written(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """A configuration whose start is written into upper layers: the plain probe has no chance."""
    real = deep.fit_head

    def poor(*given: Any) -> Any:
        found = real(*given)
        return replace(found, weight=-50.0 * found.weight)

    monkeypatch.setattr(deep, "fit_head", poor)
    return config


def test_base_start_and_log_are_the_tuned_model(written: TrainConfig, tmp_path: Path) -> None:
    result, kept, said = go(written)
    assert "head and upper layers start as a linear probe" in said
    assert (kept.start, kept.probe_rows, kept.layers) == ("deep", 40, 0.5)
    assert result["steps"] > 2
    start = load_file(RunFolder(written.out).start)
    assert start["to"].shape[1] == 1
    out = tmp_path / "rebuilt"
    again = rebuild(ReplayConfig(written.out, str(out), threads=1), Progress(io.StringIO()))
    assert again["fingerprint"] == result["fingerprint"]


def test_a_run_goes_on_as_it_began(written: TrainConfig) -> None:
    whole, _, _ = go(written)
    part = replace(written, out=f"{written.out}-part", max_forwards=12)
    go(part)
    again, _, _ = go(replace(part, max_forwards=20, resume=True))
    assert again["fingerprint"] == whole["fingerprint"]


def test_a_file_of_another_run_is_refused(written: TrainConfig, tmp_path: Path) -> None:
    go(written)
    file = RunFolder(written.out).start
    good = load_file(file)
    name = next(n for n in good if n.startswith("what."))
    replay = ReplayConfig(written.out, str(tmp_path / "rebuilt"), threads=1)
    for bad in (
        {"what.no.such": good[name].clone()},
        {name: good[name][:, :3].contiguous()},
        {name: good[name].double()},
        {"to": good["to"][:3].contiguous()},
    ):
        save_file({**good, **bad}, file)
        with pytest.raises(UserError, match=r"start\.safetensors: .*another run's file"):
            rebuild(replay, Progress(io.StringIO()))
    save_file(good, file)
    rebuild(replay, Progress(io.StringIO()))
    assert jf.read_log(RunFolder(written.out).log).header["base"]
