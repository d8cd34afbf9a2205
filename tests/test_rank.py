"""Curvature against explicit Hessians; predicted against observed steps; the command."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import justforward as jf
from conftest import make_model, make_tokenizer
from justforward import noise
from justforward.cli import main
from justforward.config import RankConfig
from justforward.data import Example, read_examples
from justforward.descent import Descent, Trial, gamma, mean_change, observe
from justforward.errors import NonFiniteLoss, UserError
from justforward.evaluate import Scorer
from justforward.hessian import Estimate, Objective, dot, lanczos
from justforward.progress import Progress
from justforward.rank import MULTIPLES, bare, measure, rank
from justforward.tasks import Task

SEEDS = st.integers(0, 2**32 - 1)
TASK = Task(template="{text} It was", labels={"neg": "terrible", "pos": "great"})


def close(a: Any, b: Any, within: float = 1e-4) -> None:
    """Relative to the largest element."""
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= within * (float(b.abs().max()) + 1e-12)


class Net(nn.Module):
    """17 x tanh; smooth, with a Hessian of both signs."""

    def __init__(self, seed: int, rows: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.first = nn.Parameter(torch.randn(5, 3, generator=draw))
        self.bias = nn.Parameter(torch.randn(5, generator=draw))
        self.last = nn.Parameter(torch.randn(5, generator=draw))
        self.unused = nn.Parameter(torch.randn(2, generator=draw))
        self.x = torch.randn(rows, 3, generator=draw)
        self.y = torch.randn(rows, generator=draw)

    def forward(self, flat: Tensor, rows: Sequence[int]) -> Tensor:
        """Losses [len] at other values of the parameters."""
        first, bias, last, _ = flat.split([15, 5, 5, 2])
        chosen = list(rows)
        made = torch.tanh(self.x[chosen].to(flat.dtype) @ first.view(5, 3).T + bias) @ last
        return (made - self.y[chosen].to(flat.dtype)) ** 2

    def losses(self, rows: Sequence[int]) -> Tensor:
        return self(torch.cat([p.view(-1) for p in self.parameters()]), rows)

    def at(self) -> Tensor:
        return torch.cat([p.detach().view(-1) for p in self.parameters()]).double()

    def hessian(self, rows: Sequence[int]) -> Tensor:
        found = torch.autograd.functional.hessian(lambda flat: self(flat, rows).mean(), self.at())
        assert isinstance(found, Tensor)
        return found


# ---------------------------------------------------------------------------------------- derivatives


@settings(max_examples=20)
@given(seed=SEEDS, rows=st.integers(1, 7), at_once=st.integers(1, 8))
def test_derivatives_are_those_of_the_explicit_hessian(seed: int, rows: int, at_once: int) -> None:
    net = Net(seed, rows)
    everything = range(rows)
    objective = Objective(list(net.parameters()), net.losses, rows, at_once)
    theta, h = net.at(), net.hessian(everything)
    jacobian = torch.autograd.functional.jacobian(lambda flat: net(flat, everything), theta)
    assert isinstance(jacobian, Tensor)
    assert objective.size == 27
    assert objective.value() == pytest.approx(float(net(theta, everything).mean()), rel=1e-4)
    close(objective.gradient(), jacobian.mean(0))
    weights = torch.linspace(-1.0, 2.0, rows)
    close(objective.gradient(weights.tolist()), weights.double() @ jacobian, 1e-3)
    close(objective.row_squares(), (jacobian**2).sum(1), 1e-3)
    v = torch.randn(2, 27, generator=torch.Generator().manual_seed(seed))
    close(objective.product(v[0]), h @ v[0].double(), 1e-3)
    scale = float(torch.linalg.matrix_norm(h, 2) * 40.0)
    for found, vector in zip(objective.forms(lambda i: v[i], 2), v.double(), strict=True):
        assert found == pytest.approx(float(vector @ h @ vector), abs=1e-5 * scale)


@settings(max_examples=8)
@given(seed=SEEDS)
def test_lanczos_finds_the_eigenvalues_and_says_how_far_it_is(seed: int) -> None:
    net = Net(seed, 6)
    h = net.hessian(range(6))
    true = torch.linalg.eigvalsh(h)
    objective = Objective(list(net.parameters()), net.losses, 6, 4)
    start = torch.randn(27, generator=torch.Generator().manual_seed(seed))
    norm = float(true.abs().max())
    for steps in (1, 4, 10, 60):
        found = lanczos(objective.product, start, steps)
        assert len(found.ritz) == len(found.basis) <= min(steps, 27)
        close(found.basis @ found.basis.T, torch.eye(len(found.basis)), 1e-4)
        assert [r.value for r in found.ritz] == sorted((r.value for r in found.ritz), reverse=True)
        for ritz in found.ritz:
            nearest = float((true - ritz.value).abs().min())
            assert nearest <= ritz.bound + 1e-4 * norm
        inside = found.basis.double()
        trace = float(torch.trace(inside @ h @ inside.T))
        assert found.trace == pytest.approx(trace, abs=1e-4 * norm)
    assert found.ritz[0].value == pytest.approx(float(true[-1]), abs=1e-4 * norm)
    assert found.ritz[-1].value == pytest.approx(float(true[0]), abs=1e-4 * norm)
    # all of the space but that of the unused parameters: nothing is left to chance
    assert found.trace == pytest.approx(float(torch.trace(h)), abs=1e-3 * norm)
    close(objective.trace_samples(3, seed, found), [float(torch.trace(h))] * 3, 1e-2)


@pytest.mark.parametrize("steps", [0, 2, 5])
def test_trace_samples_are_unbiased(steps: int) -> None:
    net = Net(3, 4)
    h = net.hessian(range(4))
    objective = Objective(list(net.parameters()), net.losses, 4, 4)
    known = lanczos(objective.product, torch.ones(27), steps) if steps else None
    found = Estimate.of(objective.trace_samples(400, 11, known))
    assert abs(found.mean - float(torch.trace(h))) < 4.0 * found.error
    if known is None:  # the known variance of Rademacher probes
        off = h - torch.diag(torch.diag(h))
        spread = math.sqrt(2.0 * float((off**2).sum()) / 400)
        assert found.error == pytest.approx(spread, rel=0.2)
    else:
        assert found.error < Estimate.of(objective.trace_samples(400, 11)).error


@pytest.mark.parametrize("architecture", ["opt", "gpt2", "llama"])
def test_a_language_model_is_differentiated_twice(architecture: str) -> None:
    """Through attention, against central differences of its gradient."""
    model = make_model(architecture)
    if architecture == "opt":  # a difference sees the kinks of a ReLU, a derivative does not
        for layer in model.model.decoder.layers:
            layer.activation_fn = nn.GELU()
    scorer = Scorer(model, make_tokenizer(), TASK)
    texts = ("film was bad", "a good film with great acting")
    rows = [Example({"text": t}, "pos", "rows", i) for i, t in enumerate(texts)]
    tensors = list(model.parameters())
    objective = Objective(
        tensors, lambda r: scorer.loss_of(scorer.encode([rows[i] for i in r])), 2, 1
    )
    g = objective.gradient()
    noisy = torch.randn(len(g), generator=torch.Generator().manual_seed(0))
    v = g / math.sqrt(dot(g, g)) + 0.01 * noisy
    hv = objective.product(v)
    assert dot(v, hv) == pytest.approx(objective.forms(lambda i: v, 1)[0], rel=1e-4)
    sides = []
    for sign in (1e-3, -2e-3):
        with torch.no_grad():
            for tensor, part in zip(tensors, v.split([t.numel() for t in tensors]), strict=True):
                tensor += sign * part.view_as(tensor)
        sides.append(objective.gradient())
    close(hv, (sides[0] - sides[1]) / 2e-3, 0.02)


def test_what_cannot_be_differentiated_is_said() -> None:
    net = Net(0, 2)
    with pytest.raises(UserError, match="no parameter has requires_grad"):
        Objective([], net.losses, 2, 2)
    frozen = Objective(list(net.parameters()), lambda rows: net.losses(rows).detach(), 2, 2)
    with pytest.raises(UserError, match=r"the loss has no gradient: .*--tune"):
        frozen.gradient()

    q = nn.Parameter(torch.randn(1, 1, 4, 8))

    def fused(rows: Sequence[int]) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, q, q).sum((0, 1, 3))[list(rows)]

    with pytest.raises(
        UserError, match=r"cannot be differentiated twice: derivative for .* is not"
    ):
        Objective([q], fused, 4, 4).product(torch.ones(32))
    linear = Objective([net.last], lambda rows: net.last[list(rows)], 2, 2)
    assert linear.product(torch.ones(5)).tolist() == [0.0] * 5


# ----------------------------------------------------------------------------------------- prediction


@settings(max_examples=10)
@given(seed=SEEDS)
def test_the_fourth_moment_of_a_direction(seed: int) -> None:
    d, count = 5, 60_000
    draw = torch.Generator().manual_seed(seed)
    a = torch.randn(d, generator=draw).double()
    h = torch.randn(d, d, generator=draw).double()
    h = h + h.T
    z = noise.normal(seed, 0, 0, d * count).view(count, d).double()
    samples = (z @ a) ** 2 * torch.einsum("si,ij,sj->s", z, h, z)
    trace, along = Estimate(float(torch.trace(h)), 0.0), float(a @ h @ a)
    found = Descent.predicted(1.0, float(a @ a), trace, along, Estimate(0.0, 0.0)).curvature
    assert abs(found - float(samples.mean())) < 5.0 * float(samples.std()) / math.sqrt(count)


@pytest.mark.parametrize("samples", [1, 3])
def test_gamma_is_reached_where_the_gradient_is_the_leading_eigenvector(samples: int) -> None:
    """Theorem 1 takes z from the sphere of radius sqrt(d); then its bound is an equality."""
    d, count = 8, 200_000
    eigenvalues = torch.linspace(3.0, 0.1, d, dtype=torch.float64)
    g = torch.zeros(d, dtype=torch.float64)
    g[0] = 2.0
    z = torch.randn(count, samples, d, generator=torch.Generator().manual_seed(0)).double()
    z = math.sqrt(d) * z / z.norm(dim=-1, keepdim=True)
    estimate = (z * (z @ g)[..., None]).mean(1)
    forms = (estimate**2) @ eigenvalues
    r = float(eigenvalues.sum()) / 3.0
    bound = gamma(d, r, samples) * 3.0 * 4.0
    assert abs(float(forms.mean()) - bound) < 4.0 * float(forms.std()) / math.sqrt(count)


def test_descent() -> None:
    trace, across = Estimate(10.0, 2.0), Estimate(1.0, 0.5)
    descent = Descent.predicted(4.0, 5.0, trace, 3.0, across)
    assert descent.curvature == 2.0 * (3.0 + 1.0) + 5.0 * 10.0
    assert descent.error == pytest.approx(math.hypot(2.0 * 0.5, 5.0 * 2.0))
    assert descent.unit == 4.0 / 58.0
    assert descent.at(descent.unit) == pytest.approx(-0.5 * 4.0 * descent.unit)
    assert min(descent.at(descent.unit * m) for m in (0.9, 1.1)) > descent.at(descent.unit)
    assert descent.at(2.0 * descent.unit) == pytest.approx(0.0, abs=1e-12)
    assert Descent(4.0, -8.0).unit == 0.5


@pytest.mark.parametrize(
    ("template", "plain"),
    [
        ("{text} It was", "{text}"),
        ("{premise}\nQuestion: {hypothesis} True?\n", "{premise} {hypothesis}"),
        ("{b} {a} and {b}", "{b} {a}"),
        ("{text} It was {mask}.", "{text} {mask}"),
        ("{text}", "{text}"),
    ],
)
def test_without_a_prompt_the_fields_remain(template: str, plain: str) -> None:
    task = bare(replace(TASK, template=template))
    assert (task.template, task.labels) == (plain, TASK.labels)


# --------------------------------------------------------------------------------- predicted, observed


class Quadratic(nn.Module):
    """Rows 0.5 (theta - c_i)^T A (theta - c_i): everything is known, and the second order is all there is."""

    def __init__(self, rows: int = 6, d: int = 8) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(5)
        made = torch.randn(d, d, generator=draw)
        self.a = made @ made.T / d
        self.centres = torch.randn(rows, d, generator=draw)
        self.theta = nn.Parameter(torch.randn(d, generator=draw))

    def losses(self, rows: Sequence[int]) -> Tensor:
        away = self.theta - self.centres[list(rows)]
        return 0.5 * ((away @ self.a) * away).sum(1)


@pytest.mark.parametrize("step_rows", [6, 2])
def test_a_quadratic_descends_as_predicted(step_rows: int) -> None:
    rows, d = 6, 8
    model = Quadratic(rows, d)
    optimizer = jf.MeZO(model, lr=1.0, eps=1e-2, seed=7)
    objective = Objective(optimizer.weights.tensors, model.losses, rows, 4)
    before = jf.fingerprint(model)
    grids = [e.clone() for e in optimizer.weights.exponents]
    a = model.a.double()
    each = (model.theta.detach().double() - model.centres.double()) @ a
    g = each.mean(0)
    spread = (each - g).T @ (each - g) / rows * (rows - step_rows) / (rows - 1) / step_rows
    square = float(g @ g + torch.trace(spread))
    descent = Descent.predicted(
        float(g @ g),
        square,
        Estimate(float(torch.trace(a)), 0.0),
        float(g @ a @ g),
        Estimate(float(torch.trace(a @ spread)), 0.0),
    )
    rates = [multiple * descent.unit for multiple in MULTIPLES]
    trials = observe(
        optimizer, objective, objective.gradient(), rates, directions=300, step_rows=step_rows
    )
    assert jf.fingerprint(model) == before
    assert optimizer.steps == 0
    for mine, kept in zip(optimizer.weights.exponents, grids, strict=True):
        assert torch.equal(mine, kept)

    along = (float(g @ a @ g) + float(torch.trace(a @ spread))) / square
    for place, lr in enumerate(rates):
        for index, trial in enumerate(trials[:20]):
            z = noise.normal(noise.direction_seed(7, index, 0), 0, 0, d).double()
            assert trial.full == pytest.approx(float(z @ g), rel=1e-4, abs=1e-4)
            assert trial.seen == pytest.approx(trial.part, rel=1e-2, abs=1e-2)
            assert trial.bent == pytest.approx(float(z @ a @ z), rel=1e-2, abs=1.0)
            step = -lr * trial.seen * z
            exact = float(g @ step + 0.5 * step @ a @ step)
            assert trial.changes[place] == pytest.approx(exact, rel=1e-3, abs=1e-4)
        found = mean_change(trials, place, lr, float(torch.trace(a)), along)
        plain = Estimate.of([trial.changes[place] for trial in trials])
        assert abs(found.mean - descent.at(lr)) < 4.0 * found.error
        assert abs(plain.mean - descent.at(lr)) < 4.0 * plain.error
        if step_rows == rows:
            assert found.error < 0.9 * plain.error
    assert len({trial.square for trial in trials}) == math.comb(rows, step_rows)


def test_what_is_observed_is_the_optimizers_own_step() -> None:
    model = Quadratic()
    rates = [0.01, 0.03]
    optimizer = jf.MeZO(model, lr=1.0, seed=3)
    objective = Objective(optimizer.weights.tensors, model.losses, 6, 6)
    trials = observe(optimizer, objective, objective.gradient(), rates, directions=3, step_rows=6)
    start = model.theta.detach().clone()
    value = objective.value()
    for index, trial in enumerate(trials):
        for lr, change in zip(rates, trial.changes, strict=True):
            with torch.no_grad():
                model.theta.copy_(start)
            other = jf.MeZO(model, lr=lr, seed=3)
            other.steps = index
            other.step(lambda: objective.value())
            assert objective.value() - value == change


@given(seed=SEEDS, trace=st.floats(-50.0, 50.0), along=st.floats(-5.0, 5.0))
@settings(max_examples=20)
def test_the_control_variates_have_mean_zero(seed: int, trace: float, along: float) -> None:
    """Whatever t and k are: on changes that are zero the mean is zero within its error."""
    draw = torch.Generator().manual_seed(seed)
    g, gb = torch.randn(2, 4, generator=draw).double()
    trials = []
    for z in torch.randn(4000, 4, generator=draw).double():
        trials.append(
            Trial(float(z @ g), float(z @ gb), float(g @ gb), float(gb @ gb), 0.0, 0.0, (0.0,))
        )
    found = mean_change(trials, 0, 0.1, trace, along)
    assert abs(found.mean) < 5.0 * found.error


def test_a_step_into_nothing_leaves_the_weights_alone() -> None:
    model = Quadratic()
    optimizer = jf.MeZO(model, lr=1.0, seed=3)
    objective = Objective(optimizer.weights.tensors, model.losses, 6, 6)
    before = jf.fingerprint(model)
    with pytest.raises(NonFiniteLoss, match="after a step with lr"):
        observe(optimizer, objective, objective.gradient(), [1e30], directions=1, step_rows=6)
    assert jf.fingerprint(model) == before
    assert optimizer.steps == 0


@pytest.mark.parametrize("step_rows", [None, 4])
def test_a_language_model_descends_as_predicted(sentiment_csv: Path, step_rows: int | None) -> None:
    model = make_model("gpt2")
    rows = read_examples(sentiment_csv, TASK)[:8]
    config = RankConfig(
        model="", data="", out="", probes=24, iterations=24, directions=40, step_rows=step_rows
    )
    found = measure(model, make_tokenizer(), TASK, rows, config, Progress(bar=False))
    assert found["dimension"] == sum(p.numel() for p in model.parameters())
    assert found["operator_norm"] == pytest.approx(
        max(abs(found["largest_eigenvalue"]["value"]), abs(found["smallest_eigenvalue"]["value"]))
    )
    assert found["effective_rank"] == found["trace"]["mean"] / found["operator_norm"]
    assert 0.0 < found["g_h_g"] <= found["operator_norm"] * found["gradient_square"] * 1.0001
    assert found["trace_sigma"] > 0.0
    assert (found["step_gradient_square"] > found["gradient_square"]) == (step_rows is not None)
    assert found["asymmetry"] < 1e-4
    assert found["looks"]["slope"] == pytest.approx(1.0, abs=0.01)
    assert found["looks"]["residual"] < 0.01
    by_looks, trace = found["looks"]["trace"], found["trace"]
    error = math.hypot(by_looks["error"], trace["error"])
    assert abs(by_looks["mean"] - trace["mean"]) < 4.0 * error
    assert error < found["operator_norm"]
    positive = sum(max(pair["value"], 0.0) for pair in found["eigenvalues"])
    assert found["positive_trace_at_least"] >= positive
    rank_of_it = found["positive_trace_at_least"] / found["largest_eigenvalue"]["value"]
    assert found["positive_rank_at_least"] == rank_of_it
    assert found["gamma_at_least"] == gamma(found["dimension"], rank_of_it)
    small, middle, _, best, _ = found["observed"]
    assert best["lr"] == found["best_lr"]
    assert best["predicted"] == found["best_change"] < 0.0
    for seen in found["observed"]:
        off = seen["plain_change"] - seen["predicted_here"]
        assert off == pytest.approx(seen["change"] - seen["predicted"], abs=1e-9)
    for seen in (small, middle):  # where the loss is near its second order
        error = math.hypot(seen["error"], seen["predicted_error"])
        assert abs(seen["change"] - seen["predicted"]) < 4.0 * error
        assert error < 0.25 * abs(seen["predicted"])


# ------------------------------------------------------------------------------------------ the command


@pytest.fixture
def options(model_folder: Path, sentiment_csv: Path, tmp_path: Path) -> list[str]:
    return [
        "rank", "--model", str(model_folder), "--data", str(sentiment_csv), "--template",
        "{text} It was", "--labels", "neg=terrible,pos=great", "--rows", "4", "--probes", "2",
        "--iterations", "3", "--directions", "2", "--threads", "1",
        "--out", str(tmp_path / "made" / "rank"),
    ]  # fmt: skip


def test_the_command(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*options, "--json"]) == 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    out = tmp_path / "made" / "rank"
    assert json.loads((out / "rank.json").read_text()) == result
    assert (out / "rank.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert {path.name for path in out.iterdir()} == {"rank.json", "rank.png"}
    assert {name: m["template"] for name, m in result["prompts"].items()} == {
        "with": "{text} It was",
        "without": "{text}",
    }
    for m in result["prompts"].values():
        assert (m["rows"], len(m["observed"]), len(m["eigenvalues"])) == (4, 5, 3)
    assert main(options) == 2
    assert "exists: choose another --out" in capsys.readouterr().err
    again = [str(tmp_path / "again") if part == str(out) else part for part in options]
    assert main([*again, "--prompt", "without", "--tune", "ln_f"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("without a prompt: '{text}'\n  dimension d            32;")
    assert "with a prompt:" not in text.replace("without a prompt:", "")
    for word in ("tr H", "effective rank", "|g|^2", "best lr", "predicted"):
        assert word in text


def test_the_same_command_gives_the_same_numbers(options: list[str], tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        config = [*options[:-1], str(tmp_path / name), "--prompt", "with"]
        assert main(config) == 0
        found.append(json.loads((tmp_path / name / "rank.json").read_text())["prompts"])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": 0}, "--rows is 0: it must be at least 1"),
        ({"rows": 61}, "--rows is 61: .*rows.csv has 60: give at most that"),
        ({"step_rows": 3}, "--step-rows is 3: it must divide --rows, which is 4"),
        ({"probes": 1}, "--probes is 1: it must be at least 2"),
        ({"directions": 1}, "--directions is 1: it must be at least 2"),
        ({"tune": "nothing"}, "--tune is 'nothing': it finds none of the"),
        ({"tune": "("}, r"--tune is '\(': not a regular expression"),
        ({"prompt": "half"}, "--prompt is 'half': it must be one of both, with, without"),
        ({"template": None}, "--template is missing"),
        ({"eps": 0.0}, "--eps is 0.0: it must be positive"),
    ],
)
def test_bad_input(
    change: dict[str, Any], said: str, model_folder: Path, sentiment_csv: Path, tmp_path: Path
) -> None:
    config = RankConfig(
        model=str(model_folder),
        data=str(sentiment_csv),
        out=str(tmp_path / "rank"),
        template="{text} It was",
        labels=TASK.labels,
        rows=4,
    )
    with pytest.raises(UserError, match=said):
        rank(RankConfig(**{**asdict(config), **change}), Progress(bar=False))
    assert not (tmp_path / "rank").exists()


@pytest.mark.parametrize(
    ("tuned", "said"), [("ln_f", "the gradient of the loss is zero: .*--tune"), (None, "to tune")]
)
def test_nothing_to_descend(sentiment_csv: Path, tuned: str | None, said: str) -> None:
    """Every label has the same score whatever the last norm is, or all is frozen."""
    model = make_model("gpt2")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(tuned is not None and tuned in name)
    rows = read_examples(sentiment_csv, TASK)[:4]
    config = RankConfig(model="", data="", out="")
    with pytest.raises(UserError, match=said):
        measure(model, make_tokenizer(), TASK, rows, config, Progress(bar=False))
