"""What "auto" comes to, and which layers move then."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import justforward as jf
from conftest import MASKED, make_model, make_tokenizer
from justforward.config import ReplayConfig, TrainConfig
from justforward.data import Example, batches
from justforward.errors import UserError
from justforward.evaluate import Scorer
from justforward.folder import RunFolder
from justforward.guard import is_flat
from justforward.head import hindrance, rows_to_fit
from justforward.models import load_model
from justforward.prepare import stop_reason
from justforward.progress import Progress
from justforward.rebuild import rebuild
from justforward.run import train
from justforward.settings import resolved
from justforward.starting import share_of
from justforward.tasks import Task
from justforward.trunk import rest_below


@pytest.fixture
def config(tmp_path: Path, model_folder: Path, sentiment_csv: Path) -> TrainConfig:
    return TrainConfig(
        model=str(model_folder), data=str(sentiment_csv), template="{text} It was",
        labels={"neg": "great", "pos": "terrible"}, out=str(tmp_path / "run"), max_forwards=20,
        eval_every=6, lr=3e-3, threads=1, start="auto", patience=0,
    )  # fmt: skip


def go(config: TrainConfig) -> tuple[dict[str, Any], TrainConfig, str]:
    out = io.StringIO()
    result = train(config, Progress(out))
    return result, RunFolder(config.out).read_config(), out.getvalue()


def test_a_probe_of_half_a_small_budget_and_the_last_third(config: TrainConfig) -> None:
    result, kept, said = go(replace(config, max_forwards=10, eval_every=4))
    assert (kept.start, kept.probe_rows, kept.layers) == ("deep", 40, 0.333)  # 10 x 8 / 2
    assert "fitting a linear probe on the hidden states of 40 rows" in said
    assert result["steps"] == 2  # 5 of 10 forwards are the probe's
    assert result["forwards"] == 9
    names = [t[0] for t in jf.read_log(RunFolder(config.out).log).header["tensors"]]
    assert all(name.startswith(("transformer.h.1.", "transformer.ln_f.")) for name in names)


@pytest.mark.parametrize(
    ("labels", "start", "every"),
    [
        ({"neg": "great", "pos": "terrible"}, "deep", 16),
        ({"neg": "not good", "pos": "great"}, "base", 10),  # two tokens: no probe
    ],
)
def test_how_often_it_is_validated_follows_from_what_auto_comes_to(
    config: TrainConfig, labels: dict[str, str], start: str, every: int
) -> None:
    config = replace(config, labels=labels, max_forwards=80, eval_every=None)
    result, kept, _ = go(config)
    assert (kept.start, kept.eval_every) == (start, every)
    assert go(replace(config, resume=True))[0] == result
    _, kept, _ = go(replace(config, eval_every=30, out=f"{config.out}-given"))
    assert kept.eval_every == 30


@pytest.mark.parametrize("start", ["auto", "deep", "probe"])
def test_only_auto_asks_whether_the_head_was_better(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, start: Any
) -> None:
    for module in ("deep", "head"):
        monkeypatch.setattr(f"justforward.{module}.stays", lambda *given: True)
    result, kept, said = go(replace(config, start=start))
    assert ("the head stays as it is, which is better: validation accuracy" in said) == (
        start == "auto"
    )
    assert kept.start == ("deep" if start == "auto" else start)
    replay = ReplayConfig(config.out, str(tmp_path / "rebuilt"), threads=1)
    assert rebuild(replay, Progress(io.StringIO()))["fingerprint"] == result["fingerprint"]


def test_a_probe_of_all_the_rows_that_there_are(config: TrainConfig) -> None:
    result, kept, said = go(config)
    assert (kept.start, kept.probe_rows, kept.layers) == ("deep", 42, 0.333)  # not 20 x 8 / 2
    assert "fitting a linear probe on the hidden states of 42 rows" in said
    assert result["steps"] == 7  # 6 of 20 forwards are the probe's
    assert result["forwards"] == 20


@pytest.mark.parametrize(
    ("budget", "rows"),
    [(1, 1), (2, 1), (3, 1), (160, 80), (1024, 512), (1026, 512), (2048, 512), (2052, 513), (8000, 2000)],
)  # fmt: skip
def test_half_of_a_small_budget_and_a_quarter_of_a_large_one(budget: int, rows: int) -> None:
    assert share_of(budget) == rows


def elsewhere(
    config: TrainConfig, architecture: str, tokenizer: str, **options: Any
) -> TrainConfig:
    folder = Path(config.out).parent / architecture
    make_model(architecture).save_pretrained(folder)
    make_tokenizer(tokenizer).save_pretrained(folder)
    labels = {"neg": "bad", "pos": "great"}
    return replace(config, model=str(folder), labels=labels, max_forwards=12, **options)


@pytest.mark.parametrize(
    ("architecture", "words"),
    [("gpt2", "bytelevel"), ("opt", "metaspace"), ("llama", "metaspace")],
)
def test_what_auto_comes_to(config: TrainConfig, architecture: str, words: str) -> None:
    config = elsewhere(config, architecture, words)
    _, kept, said = go(config)
    assert (kept.start, kept.layers) == ("deep", 0.333)
    assert "the head alone" not in said
    _, kept, said = go(replace(config, tuner="head", out=f"{config.out}-head"))
    assert (kept.start, kept.layers) == ("probe", None)
    assert "the head starts as a linear probe" in said


@pytest.mark.parametrize("architecture", sorted(MASKED))
def test_auto_where_layers_write_by_more_than_linear_maps(config: TrainConfig, architecture: str) -> None:  # fmt: skip
    template = "{text} It was {mask}."
    _, kept, said = go(elsewhere(config, architecture, MASKED[architecture], template=template))
    assert (kept.start, kept.layers) == ("probe", 0.333)
    assert "the head alone starts as a linear probe, not the upper layers, too: the layers" in said


def test_steps_go_on_with_rows_that_the_probe_has_not_seen(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    dealt: list[int] = []

    def watched(count: int, size: int, seed: int, step: int) -> list[int]:
        dealt.append(step)
        return batches(count, size, seed, step)

    monkeypatch.setattr("justforward.feed.batches", watched)
    for start, first in (("deep", 3), ("probe", 3), ("base", 0)):
        rows = None if start == "base" else 20  # 3 batches of 8, the last not full
        dealt.clear()
        given = replace(config, start=start, probe_rows=rows, backoff=False)  # type: ignore[arg-type]
        result, *_ = go(replace(given, out=f"{config.out}-{start}"))
        assert dealt == list(range(first, first + result["steps"])), start


def test_it_goes_on_as_it_began(config: TrainConfig) -> None:
    config = replace(config, lr_schedule="constant", keep="last", probe_rows=40)
    whole, _, _ = go(config)
    part = replace(config, out=f"{config.out}-part", max_forwards=12)
    go(part)
    again, kept, _ = go(replace(part, max_forwards=20, resume=True, probe_rows=None))
    assert again["fingerprint"] == whole["fingerprint"]
    assert (kept.start, kept.probe_rows, kept.layers) == ("deep", 40, 0.333)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"labels": {"neg": "not good", "pos": "great"}}, "label word 'not good' is 2 tokens"),
        ({"max_forwards": 2, "batch_size": 3, "eval_every": 2}, "3 rows are too few"),
    ],
)
def test_where_a_probe_cannot_be_the_base_starts(config: TrainConfig, options: Any, said: str) -> None:  # fmt: skip
    _, kept, told = go(replace(config, **options))
    assert f"not as a linear probe: {said}" in told
    assert (kept.start, kept.probe_rows, kept.layers) == ("base", None, None)


@pytest.mark.parametrize(
    "options", [{"tuner": "prefix"}, {"tuner": "lora", "tune": "lora_A"}, {"tune": "mlp"}]
)
def test_what_is_asked_for_by_name_starts_from_the_base(config: TrainConfig, options: Any) -> None:
    assert resolved(replace(config, **options)).start == "base"


def test_bad_options(config: TrainConfig) -> None:
    with pytest.raises(UserError, match="--probe-rows is 4000: there are 42 training rows"):
        go(replace(config, probe_rows=4000))
    with pytest.raises(UserError, match="--probe-rows is 4: it is for what is fitted"):
        resolved(replace(config, start="base", probe_rows=4))
    with pytest.raises(UserError, match=r"--layers is 0\.5: it is for --tuner full or lora"):
        resolved(replace(config, tuner="head", layers=0.5))
    assert not Path(config.out).exists()


def test_logits_that_are_capped_are_a_hindrance(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("gpt2")
    scorer = Scorer(model, make_tokenizer("bytelevel"), Task("{text} It was", {"n": "bad", "p": "good"}))  # fmt: skip
    rows = [Example({"text": f"film {i}"}, "np"[i % 2], "r.csv", i + 2) for i in range(8)]
    assert hindrance(scorer, rows, 8) is None
    forward: Callable[..., Any] = model.forward

    def capped(**arguments: Any) -> Any:
        output = forward(**arguments)
        output.logits = 0.1 * torch.tanh(output.logits / 0.1)
        return output

    monkeypatch.setattr(model, "forward", capped)
    assert "does more to its logits" in str(hindrance(scorer, rows, 8))
    assert "label 'p' has no training row" in str(hindrance(scorer, rows[::2], 8))


def test_rows_to_fit_are_the_first_steps_rows_and_one_of_each_label() -> None:
    rows = [Example({"text": str(i)}, "b" if i == 39 else "a", "r.csv", i) for i in range(40)]
    chosen = rows_to_fit(rows, 10, 8, seed=3)
    assert len(chosen) in (10, 11)
    assert {row.label for row in chosen} == {"a", "b"}
    assert len({id(row) for row in chosen}) == len(chosen)
    assert rows_to_fit(rows, 40, 8, seed=3)[:10] == chosen[:10]


@pytest.mark.parametrize(
    ("architecture", "behind"),
    [("gpt2", {"ln_f"}), ("llama", {"norm", "lm_head"}), ("opt", {"final_layer_norm"})],
)
def test_layers_from_the_last(architecture: str, behind: set[str]) -> None:
    model = make_model(architecture)
    rest_below(model, 0.5)
    tuned = [name for name, p in model.named_parameters() if p.requires_grad]
    assert tuned
    assert all(".1." in name or any(part in name for part in behind) for name in tuned)
    assert any(".1." in name for name in tuned)
    whole = make_model(architecture)
    rest_below(whole, 1.0)
    frozen = [name for name, p in whole.named_parameters() if not p.requires_grad]
    assert frozen
    assert all("emb" in name or "wte" in name or "wpe" in name for name in frozen)


def test_layers_of_a_run_without_a_probe(config: TrainConfig) -> None:
    result, kept, said = go(replace(config, start="base", layers=0.5))
    assert (kept.start, kept.layers) == ("base", 0.5)
    assert "the first 1 of 2 layers do not move" in said
    model = load_model(config.model)[0]
    jf.replay(model, RunFolder(config.out).log, result["kept_step"])
    assert jf.fingerprint(model) == result["fingerprint"]


def test_patience(config: TrainConfig) -> None:
    asked = resolved(replace(config, patience=2, max_forwards=1000, eval_every=2))
    flat = [
        {"kind": "validation", "step": i, "accuracy": 0.5, "loss": loss, "forwards": 2 * i}
        for i, loss in enumerate((1.0, 0.8, 0.9, 0.85))
    ]
    assert stop_reason(asked, 3, 6, 0.0, flat[:3]) is None
    assert stop_reason(asked, 3, 6, 0.0, flat) == "flat"
    assert stop_reason(replace(asked, patience=0), 3, 6, 0.0, flat) is None
    better = [*flat[:3], {**flat[3], "accuracy": 0.6, "loss": 2.0}]
    assert stop_reason(asked, 3, 6, 0.0, better) is None


def test_a_loss_that_falls_by_less_than_a_hundredth_is_flat() -> None:
    assert is_flat([(0.8, 0.3), (0.8, 0.298), (0.8, 0.2975)], 2)
    assert not is_flat([(0.8, 0.3), (0.8, 0.298), (0.8, 0.296)], 2)
    assert not is_flat([(0.8, 0.3), (0.8, 0.298), (0.81, 0.5)], 2)  # the value counts first
    assert not is_flat([(0.8, 0.3), (0.8, 0.4)], 2)  # too few to tell
