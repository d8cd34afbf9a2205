"""`--start last`: which map is the last, its fit to the tokens of answers, runs that start from it."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import justforward as jf
from conftest import ARCHITECTURES, make_model, make_tokenizer
from justforward import last
from justforward.config import ReplayConfig, TrainConfig
from justforward.data import Example
from justforward.errors import UserError
from justforward.evaluate import Scorer
from justforward.folder import RunFolder
from justforward.last import Fit, answer_tokens, find_last, fit_last, last_hindrance, start_last
from justforward.progress import Progress
from justforward.rebuild import rebuild
from justforward.run import train
from justforward.settings import resolved
from justforward.stream import matrix_of
from justforward.tasks import Task

TOKENIZER = {"opt": "metaspace", "gpt2": "bytelevel", "llama": "metaspace"}
WRITTEN = {"great": "very good film", "bad": "not good", "dull": "terrible story at the end"}
WRITING = Task("{text} It was", kind="generation", loss="vocabulary", max_new_tokens=6)


def rows(count: int, seed: int = 0) -> list[Example]:
    """Texts whose answer follows from one of their words."""
    draw = np.random.default_rng(seed)
    found = []
    for i in range(count):
        word = list(WRITTEN)[draw.integers(0, len(WRITTEN))]
        text = f"{'a film ' * int(draw.integers(1, 4))}{word} {i % 7} one"
        answer = WRITTEN[word]
        found.append(Example({"text": text}, answer, "rows.csv", i + 2, answers=((answer,),)))
    return found


def scorer_for(architecture: str, score: Any = "sum") -> Scorer:
    model = make_model(architecture)
    return Scorer(model, make_tokenizer(TOKENIZER[architecture]), replace(WRITING, score=score))


def the_last(scorer: Scorer) -> last.Last:
    found = find_last(scorer, rows(1)[0])
    assert found is not None
    return found


# ------------------------------------------------------------------------------------------- the map


@pytest.mark.parametrize(
    ("architecture", "name"),
    [("opt", "fc2"), ("gpt2", "mlp.c_proj"), ("llama", "mlp.down_proj")],
)
def test_the_last_map_is_the_one_that_no_other_reads(architecture: str, name: str) -> None:
    scorer = scorer_for(architecture)
    found = the_last(scorer)
    assert found.name.endswith(f"1.{name}")  # of two layers
    assert scorer.model.get_submodule(found.name) is found.module
    assert last_hindrance(scorer, rows(1)[0]) is None


@pytest.mark.parametrize("score", ["sum", "mean"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_loss_of_kept_tokens_is_the_model_s(architecture: str, score: str) -> None:
    """Whatever is added to the map, in one batch or many; against whole forwards with the map moved."""
    scorer, given = scorer_for(architecture, score), rows(11)
    found = the_last(scorer)
    seen = answer_tokens(scorer, found, given, 4)
    assert seen.forwards == 3
    single = answer_tokens(scorer, found, given, 1)
    torch.testing.assert_close(seen.enters, single.enters, atol=1e-4, rtol=1e-3)
    assert seen.token.equal(single.token)
    fit = Fit(scorer, found, seen)
    assert fit.loss() == pytest.approx(scorer.evaluate(given, 4).loss, abs=1e-4)
    draw = torch.Generator().manual_seed(1)
    weight = matrix_of(found.module)
    added = 0.3 * torch.randn(weight.shape, generator=draw) * weight.std()
    with torch.no_grad():
        weight += added
    moved = fit.loss(seen.enters, added)
    assert moved == pytest.approx(scorer.evaluate(given, 4).loss, abs=1e-4)
    assert abs(moved - fit.loss()) > 1e-3


def test_the_gradient_is_that_of_backpropagation() -> None:
    scorer, given = scorer_for("llama", "mean"), rows(9)
    found = the_last(scorer)
    weight: Any = found.module.weight
    seen = answer_tokens(scorer, found, given, 4)
    by = torch.zeros_like(weight).requires_grad_()
    Fit(scorer, found, seen).loss(seen.enters, by)
    weight.grad = None
    for example in given:
        (scorer.loss_of(scorer.encode_training([example])).sum() / len(given)).backward()
    assert by.grad is not None
    torch.testing.assert_close(by.grad, weight.grad, atol=1e-5, rtol=1e-3)


def test_logits_of_likely_tokens_alone_are_the_same_at_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The others' sum is kept: only what moves them apart later is not seen."""
    monkeypatch.setattr(last, "CANDIDATES", 3)
    monkeypatch.setattr(last, "MOST_LOGITS", 2000)  # several parts
    scorer = scorer_for("gpt2")
    found = the_last(scorer)
    seen = answer_tokens(scorer, found, rows(9), 4)
    fit = Fit(scorer, found, seen)
    before = fit.loss()
    fit.narrow()
    assert fit._weight.shape[0] < 100
    assert fit.loss() == pytest.approx(before, abs=1e-5)


# ------------------------------------------------------------------------------------------- the fit


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_said_of_a_start_is_what_the_model_then_does(architecture: str) -> None:
    scorer, other = scorer_for(architecture), rows(30, 1)
    weights = {n: p.detach().clone() for n, p in scorer.model.named_parameters()}
    before, name = scorer.evaluate(other, 8), the_last(scorer).name
    started = start_last(scorer, rows(60), other, 8)
    after = scorer.evaluate(other, 8)
    assert started.before == pytest.approx(before.loss, abs=1e-4)
    assert started.after == pytest.approx(after.loss, rel=3e-4)
    assert started.after < 0.9 * started.before
    moved = [n for n, p in scorer.model.named_parameters() if not torch.equal(p, weights[n])]
    assert moved == [f"{name}.weight"]
    to, what = started.tensors["to"], started.tensors[f"what.{name}"]
    assert to.shape[1] == what.shape[0] <= last.RANK
    assert all(tensor.is_contiguous() for tensor in started.tensors.values())


def test_a_weaker_penalty_is_taken_only_where_it_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[float] = []
    real = last._descend

    def descend(fit: Any, features: Any, by: Any, penalty: float) -> None:
        tried.append(penalty)
        real(fit, features, by, penalty)

    monkeypatch.setattr(last, "_descend", descend)
    # far weaker ones, too: where it becomes worse depends on last bits
    monkeypatch.setattr(last, "PENALTIES", (*last.PENALTIES, *(10.0**-k for k in range(5, 12))))
    scorer = scorer_for("llama")
    found = the_last(scorer)
    seen = answer_tokens(scorer, found, rows(12), 8)
    others = [replace(e, label="one film", answers=(("one film",),)) for e in rows(12, 1)]
    unlike = answer_tokens(scorer, found, others, 8)
    before, after, added = fit_last(scorer, found, seen, unlike)
    assert tried == list(last.PENALTIES[: len(tried)])
    assert len(tried) < len(last.PENALTIES)  # given up where it became worse
    assert after <= before
    assert (added is None) == (after == before)


@pytest.mark.parametrize("size", [100.0, float("nan")])
def test_what_does_not_help_is_not_written(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    def descend(fit: Any, features: Any, by: Any, penalty: float) -> None:
        with torch.no_grad():
            by += size * torch.randn(by.shape, generator=torch.Generator().manual_seed(0))

    monkeypatch.setattr(last, "_descend", descend)
    scorer = scorer_for("llama")
    before = jf.fingerprint(scorer.model)
    started = start_last(scorer, rows(12), rows(6, 1), 8)
    assert (started.after, started.tensors) == (started.before, {})
    assert jf.fingerprint(scorer.model) == before


@pytest.mark.parametrize(("tokens", "width"), [(40, 9), (6, 9)])
def test_main_directions_hold_as_much_as_any_others(tokens: int, width: int) -> None:
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0))
    found = last._main_directions(x, 4)
    torch.testing.assert_close(found.T @ found, torch.eye(4), atol=1e-5, rtol=0)
    values = torch.linalg.svdvals(x)[:4]
    torch.testing.assert_close((x @ found).norm(), values.norm(), atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------- where it cannot be


class Twice(nn.Module):
    """A norm that does more than one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).tanh()


def test_hindrances() -> None:
    both = Scorer(make_model("t5"), make_tokenizer("t5"), WRITING)
    assert last_hindrance(both, rows(1)[0]) == "a t5 model has no single stack of layers"
    scorer = scorer_for("llama")
    model: Any = scorer.model
    model.model.norm = Twice(model.model.norm)
    said = last_hindrance(scorer, rows(1)[0])
    assert said == "the last layer of a llama model does not end in a linear map with a norm alone before the head"  # fmt: skip
    scorer = scorer_for("llama")
    plain = scorer.model.forward

    def capped(**given: Any) -> Any:
        output = plain(**given)
        output.logits = 3.0 * (output.logits / 3.0).tanh()
        return output

    scorer.model.forward = capped  # type: ignore[assignment]
    said = last_hindrance(scorer, rows(1)[0])
    assert said == "a llama model does more to its logits than its head's matrix"


@pytest.fixture
def config(tmp_path: Path, model_folder: Path) -> TrainConfig:
    task = tmp_path / "write.yaml"
    task.write_text(
        'name: write\ntitle: Write\nkind: generation\ntemplate: "{text} It was"\nanswers: answer\n'
        "max_new_tokens: 6\nsplits: {train: train.csv, test: test.csv}\n"
    )
    for name, seed in (("train", 0), ("test", 1)):
        lines = [f"{name} {i} {e.fields['text']},{e.label}" for i, e in enumerate(rows(60, seed))]
        (tmp_path / f"{name}.csv").write_text("\n".join(["text,answer", *lines, ""]))
    return TrainConfig(
        model=str(model_folder), data=str(tmp_path), task=str(task), out=str(tmp_path / "run"),
        test_size=12, validation_size=12, max_forwards=20, eval_every=6, lr=1e-3, threads=1,
        start="last", patience=0, keep="last", layers=0.5, probe_rows=32,
        lr_schedule="constant",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tuner": "lora", "layers": None}, "this is --tuner lora"),
        ({"tuner": "head", "layers": None}, "this is --tuner head"),
        ({"tune": "mlp"}, "this is --tune 'mlp'"),
        ({"task": "copa"}, "this is a task of kind 'choice'"),
        ({"task": "sst2"}, "this is a task of kind 'classification'"),
    ],
)  # fmt: skip
def test_what_it_does_not_go_with(config: TrainConfig, options: Any, said: str) -> None:
    with pytest.raises(UserError, match=f"--start is 'last': .* and {said}: leave it out"):
        resolved(replace(config, **options))


@pytest.mark.parametrize(
    ("options", "start"),
    [
        ({}, "auto"),
        ({"tuner": "lora", "layers": None, "probe_rows": None}, "base"),
        ({"tuner": "head", "layers": None, "probe_rows": None}, "base"),
        ({"tune": "mlp", "probe_rows": None}, "base"),
        ({"task": "copa", "probe_rows": None}, "base"),
    ],
)
def test_what_auto_comes_to(config: TrainConfig, options: Any, start: str) -> None:
    assert resolved(replace(config, start="auto", **options)).start == start


# ------------------------------------------------------------------------------------------------ runs


def go(config: TrainConfig) -> tuple[dict[str, Any], TrainConfig, str]:
    out = io.StringIO()
    result = train(config, Progress(out))
    return result, RunFolder(config.out).read_config(), out.getvalue()


@pytest.mark.parametrize("start", ["last", "auto"])
def test_base_start_and_log_are_the_tuned_model(
    config: TrainConfig, tmp_path: Path, start: Any
) -> None:
    result, kept, said = go(replace(config, start=start))
    assert "fitting the last linear map to the answers of 32 rows" in said
    assert (kept.start, kept.probe_rows, kept.layers) == ("last", 32, 0.5)
    assert result["steps"] == 8  # 4 batches were read before the first
    written = {"to", "what.transformer.h.1.mlp.c_proj"}
    assert set(load_file(RunFolder(config.out).start)) == written
    out = tmp_path / "rebuilt"
    again = rebuild(ReplayConfig(config.out, str(out), threads=1), Progress(io.StringIO()))
    assert again["fingerprint"] == result["fingerprint"]


def test_a_run_goes_on_as_it_began(config: TrainConfig) -> None:
    whole, _, _ = go(config)
    part = replace(config, out=f"{config.out}-part", max_forwards=12)
    go(part)
    again, _, _ = go(replace(part, max_forwards=20, resume=True))
    assert again["fingerprint"] == whole["fingerprint"]


def test_nothing_written_is_a_start_too(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(last, "PENALTIES", ())
    result, _, said = go(config)
    assert ": it stays as it was" in said
    assert load_file(RunFolder(config.out).start) == {}
    replay = ReplayConfig(config.out, str(tmp_path / "rebuilt"), threads=1)
    again = rebuild(replay, Progress(io.StringIO()))
    assert again["fingerprint"] == result["fingerprint"]


def test_a_file_that_is_lost_or_of_another_run_is_refused(
    config: TrainConfig, tmp_path: Path
) -> None:
    go(config)
    file = RunFolder(config.out).start
    good = load_file(file)
    name = next(n for n in good if n.startswith("what."))
    replay = ReplayConfig(config.out, str(tmp_path / "rebuilt"), threads=1)
    save_file({**good, name: good[name][:, :3].contiguous()}, file)
    with pytest.raises(UserError, match=r"start\.safetensors: .*another run's file"):
        rebuild(replay, Progress(io.StringIO()))
    file.unlink()
    with pytest.raises(UserError, match=r"start\.safetensors: is missing: the run started from"):
        rebuild(replay, Progress(io.StringIO()))


def test_auto_says_why_there_is_no_fit(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("justforward.starting.last_hindrance", lambda *given: "so it is")
    with pytest.raises(UserError, match="--start is 'last': so it is: choose --start base"):
        go(config)
    _, kept, said = go(replace(config, start="auto"))
    assert (kept.start, kept.probe_rows) == ("base", None)
    assert "its last map is not fitted to answers: so it is" in said


def test_more_rows_than_there_are_are_refused(config: TrainConfig) -> None:
    with pytest.raises(UserError, match="--probe-rows is 500: there are"):
        go(replace(config, probe_rows=500))
