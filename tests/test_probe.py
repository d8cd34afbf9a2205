"""Linear probing: the fit is the optimum it claims to be, and the features are what the head sees.

Reading order: the fit, the choice of the penalty, features, what is refused.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from conftest import ARCHITECTURES, MASKED, make_model, make_tokenizer
from justforward import noise
from justforward import probe as probe_module
from justforward.data import Example
from justforward.errors import UserError
from justforward.evaluate import Scorer
from justforward.probe import GRID, Probe, fit_probe, hidden_states, probe_weights
from justforward.tasks import Task

TOKENIZER = {"opt": "metaspace", "gpt2": "bytelevel", "llama": "metaspace", **MASKED}
WORDS = {"neg": "terrible", "pos": "great"}
TEXTS = ["a fine film", "bad", "the story is wonderful , the music is great", "dull and long", "x"]
ROWS = [Example({"text": t}, ("neg", "pos")[i % 2], "rows.csv", i + 2) for i, t in enumerate(TEXTS)]


def clouds(
    count: int, labels: int, hidden: int, apart: float, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Gaussian clouds around corners that only the number of labels decides."""
    answers = torch.arange(count) % labels
    centres = noise.normal(7, 0, 0, labels * hidden).view(labels, hidden)
    z = noise.normal(seed + 100, 1, 0, count * hidden).view(count, hidden)
    return z + apart * centres[answers], answers


# ------------------------------------------------------------------------------------------- the fit


@pytest.mark.parametrize("labels", [2, 4])
@pytest.mark.parametrize("c", [0.01, 1.0])
def test_it_is_the_optimum(labels: int, c: float) -> None:
    """The gradient of the stated objective vanishes there, and nowhere near."""
    x, y = clouds(40, labels, 6, 0.7)
    x = x * torch.tensor([1.0, 30.0, 0.01, 1.0, 5.0, 1.0]) + 3.0
    found = probe_weights(x, y, labels, c)
    assert found.converged
    assert found.weight.shape == (labels, 6)
    mean, scale = x.double().mean(dim=0), x.double().std(dim=0, correction=0)
    standard = (x.double() - mean) / scale

    def slope(factor: float) -> float:
        weight = (factor * found.weight * scale).requires_grad_()
        bias = (found.bias + found.weight @ mean).requires_grad_()
        scores = (standard @ weight.T + bias).log_softmax(dim=1)
        size = (weight[1] - weight[0]) if labels == 2 else weight
        loss = -scores.gather(1, y[:, None]).sum() + size.square().sum() / (2 * c)
        return max(float(g.abs().max()) for g in torch.autograd.grad(loss, [weight, bias]))

    assert slope(1.0) < 1e-2 < 0.1 * slope(1.2)


@given(
    st.floats(-1e3, 1e3),
    st.floats(1e-2, 1e2),
    st.sampled_from([2, 3, 5]),
    st.integers(0, 5),
)
def test_units_of_the_features_do_not_matter(
    shift: float, scale: float, labels: int, seed: int
) -> None:
    x, y = clouds(30, labels, 4, 0.5, seed)
    x = x.double()
    moved = scale * x + shift
    here = probe_weights(x, y, labels).scores(x)
    there = probe_weights(moved, y, labels).scores(moved)
    torch.testing.assert_close(here, there, atol=2e-3, rtol=0)
    torch.testing.assert_close(here.exp().sum(dim=1), torch.ones(30, dtype=torch.float64))


@pytest.mark.parametrize("labels", [2, 3, 6])
def test_separable_rows_and_rows_with_nothing_in_them(labels: int) -> None:
    train, unseen = clouds(60, labels, 16, 3.0, 1), clouds(300, labels, 16, 3.0, 2)
    found = fit_probe(train, clouds(30, labels, 16, 3.0, 3), labels)
    assert found.judged(*unseen)[0] > 0.98
    assert found.judged(*unseen)[1] < 0.1
    nothing = fit_probe(
        clouds(60, labels, 16, 0.0, 1), clouds(30, labels, 16, 0.0, 3), labels
    ).judged(*clouds(300, labels, 16, 0.0, 2))
    assert abs(nothing[0] - 1 / labels) < 0.12


def test_a_constant_feature_has_no_say() -> None:
    x, y = clouds(30, 2, 4, 1.0)
    x[:, 2] = 5.0
    found = probe_weights(x, y, 2)
    assert found.weight[:, 2].abs().max() == 0
    assert found.weight.isfinite().all()


@given(st.integers(0, 20), st.sampled_from([2, 3, 6]), st.floats(0.0, 1.5), st.floats(-2, 3))
def test_calibrated_it_says_the_same_and_is_less_sure(seed: int, labels: int, apart: float, size: float) -> None:  # fmt: skip
    """The same predictions, never a higher loss, and the least one that a temperature of at least 1 has."""
    x, y = clouds(40, labels, 8, apart, seed)
    sure = probe_weights(*clouds(24, labels, 8, apart, seed + 1), labels, c=1.0)
    sure = replace(sure, weight=10**size * sure.weight, bias=10**size * sure.bias)
    found = sure.calibrated(x, y)
    assert found.predictions(x) == sure.predictions(x)
    (accuracy, loss), before = found.judged(x, y), sure.judged(x, y)
    assert accuracy == before[0]
    assert loss <= before[1]
    for scale in (0.02, 0.1, 0.5, 0.9, 1.0):
        other = replace(sure, weight=scale * sure.weight, bias=scale * sure.bias)
        assert loss <= other.judged(x, y)[1] + 1e-9


def test_a_probe_that_is_right_is_as_sure_as_it_was() -> None:
    found = probe_weights(*clouds(60, 3, 16, 3.0, 1), 3)
    assert found.calibrated(*clouds(60, 3, 16, 3.0, 2)) is found


def test_judged_by_hand() -> None:
    found = Probe(torch.eye(2).double(), torch.zeros(2).double(), 1.0, True, 0.0)
    x = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    accuracy, loss = found.judged(x, torch.tensor([0, 1, 1]))
    losses = torch.log1p(torch.tensor([-2.0, -1.0, 3.0]).exp())
    assert accuracy == pytest.approx(2 / 3)
    assert loss == pytest.approx(float(losses.mean()))


# -------------------------------------------------------------------------------------------- choosing


def test_validation_chooses_the_penalty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accuracy first, then loss, then the stronger penalty; of what is given as validation, not training."""
    scale = {0.1: 1.0, 1.0: 5.0, 10.0: 2.0, 100.0: 2.0}  # right on all rows, with these margins
    x, y = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
    seen: list[Any] = []

    def scripted(features: Tensor, answers: Tensor, labels: int, c: float, *scaling: bool) -> Probe:
        seen.append((features, answers))
        weight = scale[c] * torch.eye(2).double()
        return Probe(weight if c != 1.0 else -weight, torch.zeros(2).double(), c, True, 0.25)

    monkeypatch.setattr(probe_module, "probe_weights", scripted)
    train = (torch.zeros(2, 2), torch.tensor([1, 0]))
    found = fit_probe(train, (x, y), 2, (100.0, 10.0, 1.0, 0.1))
    assert found.c == 10.0  # 1 is wrong, 0.1 has the higher loss, 100 is the same and weaker
    assert found.seconds == 1.0
    assert all(pair[0] is train[0] and pair[1] is train[1] for pair in seen)
    assert fit_probe(train, (x, 1 - y), 2, (100.0, 10.0, 1.0, 0.1)).c == 1.0
    # a task's own metric counts before the loss, and accuracy not at all
    worst = fit_probe(train, (x, y), 2, (100.0, 1.0), value=lambda chosen: float(chosen == [1, 0]))
    assert worst.c == 1.0


def test_noisy_rows_want_a_strong_penalty_and_clear_ones_a_weak() -> None:
    noisy = fit_probe(clouds(40, 2, 60, 0.15, 1), clouds(400, 2, 60, 0.15, 2), 2)
    clear = fit_probe(clouds(40, 2, 60, 1.0, 1), clouds(400, 2, 60, 1.0, 2), 2)
    assert noisy.c < clear.c
    assert {noisy.c, clear.c} <= set(GRID)


# -------------------------------------------------------------------------------------------- features


def scorer_for(architecture: str, words: dict[str, str] = WORDS) -> Scorer:
    template = "{text} It was {mask}." if architecture in MASKED else "{text} It was"
    task = Task(template, words, loss="vocabulary")
    return Scorer(make_model(architecture), make_tokenizer(TOKENIZER[architecture]), task)


@pytest.mark.parametrize("body", [True, False])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MASKED])
def test_features_are_what_the_head_makes_the_scores_of(architecture: str, body: bool) -> None:
    scorer = scorer_for(architecture)
    if not body:
        scorer.prompts._body = None  # type: ignore[attr-defined]
    found = hidden_states(scorer, ROWS, batch_size=2)
    assert found.forwards == 3
    assert found.answers.tolist() == [0, 1, 0, 1, 0]
    assert found.features.shape == (5, 16)
    head: Any = scorer.model.get_output_embeddings()
    first = [word[0] for word in scorer.prompts.words]
    with torch.no_grad():
        scores = head(found.features).log_softmax(dim=-1)[:, first]
    if all(len(word) == 1 for word in scorer.prompts.words):
        each = torch.cat([scorer.scores(scorer.encode([row])) for row in ROWS])
        torch.testing.assert_close(scores, each, atol=1e-5, rtol=0)
    else:
        pytest.fail("the label words of this test are one token each")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_answer_of_several_tokens_is_asked_at_its_first(architecture: str) -> None:
    scorer = scorer_for(architecture, {"neg": "not good at all", "pos": "good"})
    assert max(map(len, scorer.prompts.words)) > 1
    found = hidden_states(scorer, ROWS, batch_size=5).features
    model: Any = scorer.model
    for state, row in zip(found, scorer.prompts.rows(ROWS), strict=True):
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([row.prompt]), output_hidden_states=True)
        torch.testing.assert_close(state, alone.hidden_states[-1][0, -1], atol=1e-5, rtol=1e-4)


def test_the_model_is_as_before() -> None:
    scorer = scorer_for("gpt2")
    scorer.model.train()
    modules = list(scorer.model.modules())
    before = [(dict(m._forward_pre_hooks), dict(m._forward_hooks)) for m in modules]
    hidden_states(scorer, ROWS, batch_size=2)
    assert scorer.model.training
    after = [(dict(m._forward_pre_hooks), dict(m._forward_hooks)) for m in modules]
    assert after == before


# ---------------------------------------------------------------------------------------------- refused


def test_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = clouds(10, 2, 3, 1.0)
    with pytest.raises(UserError, match="label 2 of 3 has no row to fit a probe on"):
        probe_weights(x, y, 3)
    x[3, 1] = torch.nan
    with pytest.raises(UserError, match="a hidden state is not finite"):
        probe_weights(x, y, 2)
    scorer = scorer_for("gpt2")
    with pytest.raises(UserError, match="there are no rows to probe"):
        hidden_states(scorer, [], 2)
    monkeypatch.setattr(scorer.model, "get_output_embeddings", lambda: None)
    with pytest.raises(UserError, match="a gpt2 model has no output head, whose input is what is"):
        hidden_states(scorer, ROWS, 2)


def test_a_fit_that_is_cut_short_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_module, "MOST_ITERATIONS", 1)
    x, y = clouds(40, 3, 6, 1.0)
    assert not probe_weights(x, y, 3, 100.0).converged
