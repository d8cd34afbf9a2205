"""`--start probe`: the head starts as the linear probe, is kept, and is what MeZO goes on from.

Reading order: the rows by hand, runs, what is kept, what is refused.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import justforward as jf
from conftest import ARCHITECTURES, MASKED, make_model, make_tokenizer
from justforward import cli, tuners
from justforward.config import EvalConfig, ReplayConfig, TrainConfig
from justforward.data import Example
from justforward.errors import UserError
from justforward.evaluate import Scorer
from justforward.folder import RunFolder
from justforward.head import start_head, stays
from justforward.models import load_model
from justforward.probe import fit_probe, hidden_states, probe_weights
from justforward.progress import Progress
from justforward.rebuild import evaluate, rebuild
from justforward.run import train
from justforward.settings import resolved
from justforward.tasks import Task

Result = dict[str, Any]
TOKENIZER = {"opt": "metaspace", "gpt2": "bytelevel", "llama": "metaspace", **MASKED}
# the tokenizers have these words whole, with the space before them
WORDS = {"neg": "terrible", "pos": "great"}
TEXTS = [f"{w} {i} film" for i in range(8) for w in ("a great", "a very bad", "one good", "dull")]
ROWS = [Example({"text": text}, ("pos", "neg")[i % 2], "rows.csv", i + 2) for i, text in enumerate(TEXTS)]  # fmt: skip


def head_config(**values: Any) -> TrainConfig:
    base: dict[str, Any] = {
        "model": "m", "data": "d.csv", "template": "{text} It was", "labels": WORDS, "out": "out",
        "tuner": "head", "start": "probe", "patience": 0,
    }  # fmt: skip
    return TrainConfig(**{**base, **values})


def scorer_for(architecture: str, words: dict[str, str] = WORDS) -> Scorer:
    template = "{text} It was {mask}." if architecture in MASKED else "{text} It was"
    tokenizer = make_tokenizer(TOKENIZER[architecture])
    model = tuners.attach(make_model(architecture), tokenizer, head_config())
    return Scorer(model, tokenizer, Task(template, words))


# ---------------------------------------------------------------------------------- the rows by hand


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *sorted(MASKED)])
def test_choices_are_scored_as_the_probe_scores_them(architecture: str) -> None:
    scorer = scorer_for(architecture)
    base: Any = make_model(architecture)
    train_rows, others = ROWS[:20], ROWS[20:]
    before = scorer.scores(scorer.encode(others))
    seen = hidden_states(scorer, others, 5)
    found = start_head(scorer, train_rows, others, 5)
    after = scorer.scores(scorer.encode(others))
    wanted = found.probe.scores(seen.features)
    torch.testing.assert_close(after.double().log_softmax(-1), wanted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(before.log_softmax(-1), after.log_softmax(-1), atol=1e-2)
    assert found.accuracy == found.probe.judged(*seen.pair)[0]
    assert found.forwards == 4 + 3
    # and nothing but the rows of the two words has moved
    words = [word[0] for word in scorer.prompts.words]
    head, old = scorer.model.get_output_embeddings(), base.get_output_embeddings()
    others_rows = [i for i in range(len(head.weight)) if i not in words]
    assert torch.equal(head.weight[others_rows], old.weight[others_rows])
    assert torch.equal(
        scorer.model.get_input_embeddings().weight, base.get_input_embeddings().weight
    )
    torch.testing.assert_close(head.weight[words].mean(0), old.weight[words].mean(0))
    if architecture in MASKED:  # whose head has a bias: so has the probe
        assert found.probe.bias.abs().min() > 0
        torch.testing.assert_close(head.bias[words].mean(), old.bias[words].mean())
    else:
        assert not found.probe.bias.any()


def test_without_an_intercept_it_is_the_optimum_about_zero() -> None:
    scorer = scorer_for("gpt2")
    x, y = hidden_states(scorer, ROWS, 8).pair
    found = probe_weights(x, y, 2, 0.1, intercept=False)
    scale = x.double().square().mean(0).sqrt()
    standard = x.double() / scale

    def slope(factor: float) -> float:
        weight = (factor * found.weight * scale).requires_grad_()
        scores = (standard @ weight.T).log_softmax(dim=1)
        size = weight[1] - weight[0]
        loss = -scores.gather(1, y[:, None]).sum() + size.square().sum() / 0.2
        return float(torch.autograd.grad(loss, weight)[0].abs().max())

    assert slope(1.0) < 1e-2 < 0.1 * slope(1.2)
    # the penalty is chosen with it too
    assert not fit_probe((x, y), (x, y), 2, intercept=False).bias.any()


def test_three_labels_and_their_mean() -> None:
    words = {"neg": "terrible", "pos": "great", "mid": "good"}
    rows = [replace(row, label=tuple(words)[i % 3]) for i, row in enumerate(ROWS)]
    scorer = scorer_for("llama", words)
    seen = hidden_states(scorer, rows, 8)
    found = start_head(scorer, rows, rows, 8)
    after = scorer.scores(scorer.encode(rows)).double().log_softmax(-1)
    torch.testing.assert_close(after, found.probe.scores(seen.features), atol=1e-4, rtol=1e-4)


def test_a_model_that_caps_its_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = scorer_for("gpt2")
    model: Any = scorer.model
    forward = model.forward

    def capped(**arguments: Any) -> Any:
        output = forward(**arguments)
        output.logits = torch.tanh(output.logits / 0.1) * 0.1
        return output

    monkeypatch.setattr(model, "forward", capped)
    with pytest.raises(UserError, match="a gpt2 model does more to its logits than its head's"):
        start_head(scorer, ROWS, ROWS, 8)


# ----------------------------------------------------------------------------------- the model's own head


def scores_of(right: str, sure: float) -> torch.Tensor:
    """[N, 2] log-probabilities of rows whose answer is 0: right where there is a "+", with a probability of `sure`."""
    share = torch.tensor([[sure, 1 - sure] if r == "+" else [1 - sure, sure] for r in right])
    return share.double().log()


@pytest.mark.parametrize(
    ("own", "found", "sure", "stayed"),
    [
        ("+" * 10, "+" * 10, (0.9, 0.6), True),  # as many right, surer
        ("+" * 10, "+" * 10, (0.6, 0.9), False),
        ("+" * 10, "+" * 10, (0.7, 0.7), False),  # nothing speaks for it
        ("+" * 9 + "-", "+" * 10, (0.9, 0.51), False),  # less loss, fewer right
        ("+" * 10, "-" + "+" * 9, (0.55, 0.95), False),  # one more right, more loss: luck
        ("+" * 20, "-" * 4 + "+" * 16, (0.505, 0.6), False),  # four more: two standard errors
        ("+" * 20, "-" * 5 + "+" * 15, (0.505, 0.6), True),  # five more
        (
            "-" * 3 + "+" * 7,
            "+" * 3 + "-" * 7,
            (0.51, 0.52),
            True,
        ),  # seven against three: less loss
    ],
)
def test_when_a_head_stays_as_it_is(
    own: str, found: str, sure: tuple[float, float], stayed: bool
) -> None:
    answers = torch.zeros(len(own), dtype=torch.int64)
    assert stays(scores_of(own, sure[0]), scores_of(found, sure[1]), answers) is stayed


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_a_head_that_knows_better_is_left_alone_where_that_is_asked(architecture: str) -> None:
    scorer = scorer_for(architecture)
    start_head(scorer, ROWS, ROWS, 8)  # a good head: the model's own from here on
    before = jf.fingerprint(scorer.model)
    loss = scorer.evaluate(ROWS, 8).loss
    wrong = [replace(row, label="pos" if row.label == "neg" else "neg") for row in ROWS[:8]]
    found = start_head(scorer, wrong, ROWS, 8, or_base=True)
    assert found.kept
    assert jf.fingerprint(scorer.model) == before
    assert found.probe.judged(*hidden_states(scorer, ROWS, 8).pair)[1] == pytest.approx(loss, abs=1e-5)  # fmt: skip
    tuners.put_rows(scorer.model, found.rows)  # what a run would keep as its start
    assert jf.fingerprint(scorer.model) == before
    assert not start_head(scorer, wrong, ROWS, 8).kept
    assert jf.fingerprint(scorer.model) != before


# --------------------------------------------------------------------------------------------- runs


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., TrainConfig]:
    """Ten steps from a probe, on 80 rows that the hidden state tells apart."""

    def make(architecture: str = "gpt2", **values: Any) -> TrainConfig:
        folder, data = tmp_path / architecture, tmp_path / "rows.csv"
        if not folder.exists():
            make_model(architecture).save_pretrained(folder)
            make_tokenizer(TOKENIZER[architecture]).save_pretrained(folder)
        kinds = ("a great film , good music", "a dull story , bad acting")
        lines = [f'"{i} {kinds[i % 2]}",{("pos", "neg")[i % 2]}\n' for i in range(80)]
        data.write_text("text,label\n" + "".join(lines))
        masked = architecture in MASKED
        base: dict[str, Any] = {
            "model": str(folder), "data": str(data), "out": str(tmp_path / "run"), "max_forwards": 27, "probe_rows": 56,
            "template": "{text} It was {mask}." if masked else "{text} It was",
            "eval_every": 6, "lr": 3e-3, "threads": 1, "lr_schedule": "constant", "max_length": 24,
        }  # fmt: skip
        return head_config(**{**base, **values})

    return make


def quiet(command: Callable[[Any, Progress], Result], asked: Any) -> Result:
    return command(asked, Progress(io.StringIO()))


def rebuilt(asked: TrainConfig, steps: int | None = None) -> Any:
    model, tokenizer = load_model(asked.model)
    model = tuners.attach(model, tokenizer, asked, RunFolder(asked.out).start)
    jf.replay(model, RunFolder(asked.out).log, steps)
    return model


UPPER = {"gpt2": r"h\.1\.", "llama": r"layers\.1\.", "roberta": r"layer\.1\."}


@pytest.mark.parametrize("tuner", ["head", "full", "upper"])
@pytest.mark.parametrize("estimator", ["activation", "weight"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "roberta"])
def test_a_run(settings: Any, architecture: str, estimator: str, tuner: str) -> None:
    tune = {"tuner": "full", "tune": UPPER[architecture]} if tuner == "upper" else {"tuner": tuner}
    asked = settings(architecture, estimator=estimator, keep="last", **tune)
    result = quiet(train, asked)
    folder = RunFolder(asked.out)
    assert folder.start.name == "start.safetensors"
    assert jf.fingerprint(rebuilt(asked)) == result["fingerprint"]
    found = quiet(evaluate, EvalConfig(run=asked.out))
    assert found["loss"] == pytest.approx(result["loss"], rel=1e-5)
    for key in ("fingerprint", "accuracy"):
        assert found[key] == result[key]
    made = quiet(rebuild, ReplayConfig(asked.out, f"{asked.out}-model"))
    assert made["fingerprint"] == result["fingerprint"]
    assert jf.fingerprint(load_model(f"{asked.out}-model")[0]) == result["fingerprint"]
    # stopped half way and continued
    half = replace(asked, out=f"{asked.out}-half", max_forwards=17)
    quiet(train, half)
    again = quiet(train, replace(half, max_forwards=27, resume=True))
    assert again["fingerprint"] == result["fingerprint"]


def test_it_starts_where_the_probe_is_and_goes_on(settings: Any) -> None:
    """Step 0 has the probe's figures, in validation and on the test rows before; steps move on from there."""
    asked = settings(max_forwards=87, lr=3e-3)
    base = quiet(
        train,
        replace(asked, start="base", probe_rows=None, out=f"{asked.out}-base", max_forwards=2),
    )
    result = quiet(train, asked)
    metrics, _ = RunFolder(asked.out).read_metrics()
    at_start = next(m for m in metrics if m["kind"] == "validation" and m["step"] == 0)
    assert at_start["accuracy"] == 1.0
    assert result["before_accuracy"] == base["before_accuracy"] < 0.8  # the base model's
    assert result["before_loss"] == base["before_loss"]
    assert at_start["loss"] < 0.5 * base["before_loss"]
    assert at_start["forwards"] == 7  # 56 rows of 8
    assert result["best_step"] > 0
    assert result["accuracy"] == 1.0
    assert result["validation_loss"] < at_start["loss"]
    zero = quiet(rebuild, ReplayConfig(asked.out, f"{asked.out}-zero", steps="0"))
    asked_of_it = EvalConfig(
        model=f"{asked.out}-zero", data=asked.data, template=asked.template, labels=WORDS
    )
    scored = quiet(evaluate, asked_of_it)
    assert (scored["accuracy"], scored["fingerprint"]) == (1.0, zero["fingerprint"])


def test_layers_move_and_the_head_stays_where_the_probe_put_it(settings: Any) -> None:
    asked = settings("gpt2", tuner="full", tune=UPPER["gpt2"], max_forwards=47, keep="last")
    result = quiet(train, asked)
    start, tuned = rebuilt(asked, 0), rebuilt(asked)
    moved = {name for (name, a), b in zip(start.named_parameters(), tuned.parameters(), strict=True)
             if not torch.equal(a, b)}  # fmt: skip
    assert moved
    assert all("h.1." in name for name in moved)
    base = load_model(asked.model)[0]
    assert base.lm_head.weight is base.transformer.wte.weight
    assert start.lm_head.weight is not start.transformer.wte.weight
    assert torch.equal(start.transformer.wte.weight, base.transformer.wte.weight)
    differ = (start.lm_head.weight != base.lm_head.weight).any(dim=1).nonzero()[:, 0].tolist()
    assert len(differ) == 2  # the label words' rows
    assert result["loss"] < result["before_loss"]


def test_what_is_kept(settings: Any, tmp_path: Path) -> None:
    asked = settings("llama")
    quiet(train, asked)
    start = RunFolder(asked.out).start
    held = load_file(start)
    assert {name: list(t.shape) for name, t in held.items()} == {"tokens": [2], "weight": [2, 16]}
    tokenizer = make_tokenizer("metaspace")
    assert tokenizer.convert_ids_to_tokens(held["tokens"].tolist()) == ["▁terrible", "▁great"]
    raw = start.read_bytes()
    start.unlink()
    for command, given in (
        (evaluate, EvalConfig(run=asked.out)),
        (rebuild, ReplayConfig(asked.out, str(tmp_path / "m"))),
        (train, replace(asked, max_forwards=37, resume=True)),
    ):
        with pytest.raises(UserError, match=r"start\.safetensors: is missing: the run started"):
            quiet(command, given)
    start.write_bytes(raw[:-4])
    with pytest.raises(UserError, match=r"start\.safetensors: cannot be read: .*: copy it again"):
        quiet(evaluate, EvalConfig(run=asked.out))
    for changes, said in (
        ({"tokens": torch.tensor([0, 5000])}, "holds no tokens of the run's model"),
        ({"tokens": torch.tensor([0, 1], dtype=torch.int32)}, "holds no tokens"),
        (
            {"weight": torch.zeros(2, 15)},
            r"holds weight \[2, 15\], the run's model takes \[2, 16\]",
        ),
        ({"weight": torch.zeros(2, 16).double()}, r"holds weight"),
        ({"weight": held["weight"] * 1.0001}, "made from a base model with fingerprint"),
    ):
        save_file({**held, **changes}, start)
        with pytest.raises(UserError, match=said):
            quiet(evaluate, EvalConfig(run=asked.out))
    start.write_bytes(raw)
    quiet(evaluate, EvalConfig(run=asked.out))


def test_from_the_command_line(settings: Any, capsys: pytest.CaptureFixture[str]) -> None:
    asked = settings()
    argv = ["train", "--model", asked.model, "--data", asked.data, "--template", asked.template,
            "--labels", "neg=terrible,pos=great", "--out", asked.out, "--max-forwards", "8", "--probe-rows", "16",
            "--tuner", "head", "--start", "probe"]  # fmt: skip
    assert cli.main(argv) == 0
    assert "the head starts as a linear probe: C = " in capsys.readouterr().err
    assert cli.main(["train", "--resume", "--out", asked.out, "--max-forwards", "8"]) == 0
    assert cli.main(["eval", "--run", asked.out]) == 0
    capsys.readouterr()
    assert cli.main(["train", "--resume", "--out", asked.out, "--start", "base"]) == 2
    assert "--start is 'probe' in the run and 'base' now" in capsys.readouterr().err
    argv = [*argv[:-2], "--start", "base"]
    argv[argv.index("--out") + 1] = f"{asked.out}-other"
    assert cli.main(argv) == 2
    assert "it is for what is fitted before the first step" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ what is refused


def test_bad_options() -> None:
    with pytest.raises(UserError, match="--start is 'prob': it must be one of auto, base, probe"):
        resolved(head_config(start="prob"))
    for tuner in ("lora", "prefix", "prompt"):
        with pytest.raises(UserError, match=f"--tuner head or full.*and this is --tuner {tuner}"):
            resolved(head_config(tuner=tuner))
    with pytest.raises(UserError, match="this is a task of kind 'choice': leave it out"):
        resolved(head_config(task="copa", template=None, labels=None))


def test_a_run_that_is_refused_leaves_nothing(settings: Any) -> None:
    asked = settings(labels={"neg": "unbelievable", "pos": "great"})
    with pytest.raises(UserError, match=r"label word 'unbelievable' is .* tokens, and a probe has"):
        quiet(train, asked)
    assert not Path(asked.out).exists()
    scorer = scorer_for("gpt2")
    with pytest.raises(UserError, match="label 'neg' has no training row to fit it on"):
        start_head(scorer, [row for row in ROWS if row.label == "pos"], ROWS, 8)
