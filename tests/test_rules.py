"""Rules: what each does to projected gradients, how they chain, and how their text is read."""

from __future__ import annotations

import math
import statistics
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from justforward import UserError, rules

# Wide enough to tell a scale apart, far from where a square leaves double precision.
GRADS = st.lists(
    st.one_of(st.just(0.0), st.floats(1e-30, 1e30), st.floats(-1e30, -1e-30)),
    min_size=1,
    max_size=6,
)


def rms(values: list[float]) -> float:
    return math.sqrt(math.fsum(v * v for v in values) / len(values))


def run(spec: str, steps: list[list[float]]) -> list[list[float]]:
    chain = rules.parse(spec)
    state: rules.State = (0.0,) * chain.state_size
    out = []
    for step, grads in enumerate(steps):
        values, state = chain(grads, state, step)
        assert len(values) == len(grads)
        assert len(state) == chain.state_size
        out.append(values)
    return out


@given(grads=GRADS)
def test_sgd_and_rules_that_look_back_leave_a_step_s_numbers_alone(grads: list[float]) -> None:
    for spec in ("sgd", "momentum", "adam", "rmsprop", "adam(window=0)"):
        assert run(spec, [grads]) == [grads]


@given(steps=st.lists(GRADS, min_size=1, max_size=8), beta=st.sampled_from([0.0, 0.5, 0.9, 0.99]))
def test_rms_divides_by_the_weighted_mean_of_squares_so_far(
    steps: list[list[float]], beta: float
) -> None:
    for t, values in enumerate(run(f"rms({beta})", steps)):
        weights = [beta ** (t - s) for s in range(t + 1)]
        squares = [rms(grads) ** 2 for grads in steps[: t + 1]]
        mean = math.fsum(w * q for w, q in zip(weights, squares, strict=True)) / math.fsum(weights)
        for value, g in zip(values, steps[t], strict=True):
            expected = g * math.sqrt(len(values) / mean) if mean > 0.0 else 0.0
            assert value == pytest.approx(expected, rel=1e-9, abs=0.0)


@given(grads=GRADS.filter(any), scale=st.floats(1e-3, 1e3))
def test_rms_knows_no_unit_of_loss(grads: list[float], scale: float) -> None:
    one = run("rms", [grads, grads])
    other = run("rms", [[scale * g for g in grads]] * 2)
    assert other == [pytest.approx(values, rel=1e-9) for values in one]
    # whatever the number K of directions: c = -lr s / K moves a coordinate by lr in the root mean square
    assert rms(one[0]) == pytest.approx(math.sqrt(len(grads)))


@given(
    grads=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=6),
    scale=st.floats(1e-2, 1e2),
)
def test_spread_divides_by_how_the_directions_differ(grads: list[float], scale: float) -> None:
    if len(grads) < 2:
        with pytest.raises(UserError, match="rule spread: it compares the directions of a step"):
            run("spread", [grads])
        return
    [values] = run("spread", [grads])
    spread = statistics.stdev(grads)
    if spread == 0.0:
        assert values == [0.0] * len(grads)
        return
    expected = [g / spread * math.sqrt(len(grads)) for g in grads]
    assert values == pytest.approx(expected, rel=1e-6)
    assert run("spread", [[scale * g for g in grads]])[0] == pytest.approx(values, rel=1e-6)


@given(grads=GRADS)
def test_sign_keeps_the_sign_only(grads: list[float]) -> None:
    [values] = run("sign", [grads])
    for value, g in zip(values, grads, strict=True):
        assert value == (math.copysign(math.sqrt(len(grads)), g) if g else 0.0)


@given(grads=GRADS, limit=st.floats(1e-6, 1e6))
def test_clip_limits_the_length_and_keeps_the_direction(grads: list[float], limit: float) -> None:
    [values] = run(f"clip({limit!r})", [grads])
    if rms(grads) <= limit:
        assert values == pytest.approx(grads, rel=1e-9)
    else:
        assert rms(values) == pytest.approx(limit)
        factor = limit / rms(grads)
        assert values == pytest.approx([g * factor for g in grads], rel=1e-9)


def test_zero_gradients_and_zero_state_give_zeros_not_nan() -> None:
    for spec in rules.KINDS:
        assert run(spec, [[0.0, 0.0]] * 3) == [[0.0, 0.0]] * 3


@given(steps=st.lists(GRADS, min_size=1, max_size=5))
def test_a_chain_is_its_rules_in_order(steps: list[list[float]]) -> None:
    expected = run("clip(0.5)", run("rms(0.8)", steps))
    assert run("rms(0.8)+clip(0.5)", steps) == expected
    assert run(" rms( beta = 0.8 ) + clip(0.5)+momentum", steps) == expected
    assert run("rms(0.8)+ adam(0.5,window=7) +clip(0.5)", steps) == expected


@given(steps=st.lists(GRADS.filter(any), min_size=2, max_size=5))
def test_two_rules_keep_their_states_apart(steps: list[list[float]]) -> None:
    assert rules.parse("rms+clip+rms(0.5)").state_size == 2
    once = run("rms(0.9)", steps)
    for twice, expected in zip(run("rms(0.9)+rms(0.5)", steps), run("rms(0.5)", once), strict=True):
        assert twice == expected


@given(steps=st.lists(GRADS, min_size=2, max_size=6), cut=st.integers(1, 5))
def test_state_is_all_a_rule_remembers(steps: list[list[float]], cut: int) -> None:
    chain = rules.parse("rms+clip(2)+sign")
    state: rules.State = (0.0,)
    for step, grads in enumerate(steps):
        if step == cut:
            chain = rules.parse(chain.spec)
        values, state = chain(grads, state, step)
        assert values == run("rms+clip(2)+sign", steps[: step + 1])[-1]


@pytest.mark.parametrize(
    ("spec", "spelled", "momentum"),
    [
        ("sgd", "sgd", None),
        ("rms", "rms(beta=0.9)", None),
        ("rms()", "rms(beta=0.9)", None),
        (" clip( 3 ) ", "clip(limit=3.0)", None),
        ("clip(limit=1e-2)+sign", "clip(limit=0.01)+sign", None),
        ("momentum", "momentum(beta=0.9, window=20)", (0.9, 20)),
        ("momentum(window=5)+rms(0)", "rms(beta=0.0)+momentum(beta=0.9, window=5)", (0.9, 5)),
        ("momentum(0.5,5)+rms", "rms(beta=0.9)+momentum(beta=0.5, window=5)", (0.5, 5)),
        ("momentum(0.5, window=5)", "momentum(beta=0.5, window=5)", (0.5, 5)),
    ],
)
def test_text_is_read_and_spelled_out(
    spec: str, spelled: str, momentum: tuple[float, int] | None
) -> None:
    chain = rules.parse(spec)
    assert chain.spec == spelled
    assert rules.parse(chain.spec) == chain
    assert (chain.momentum and (chain.momentum.beta, chain.momentum.window)) == momentum


ADAM = "adam(beta1=0.9, beta2=0.99, eps=1e-08, window=20)"
RMSPROP = "rmsprop(beta2=0.99, eps=1e-08, window=20)"


@pytest.mark.parametrize(
    ("spec", "spelled", "moments"),
    [
        ("adam", ADAM, (0.9, 0.99, 1e-8, 20)),
        ("rmsprop", RMSPROP, (0.0, 0.99, 1e-8, 20)),
        ("adam+clip(3)", f"clip(limit=3.0)+{ADAM}", (0.9, 0.99, 1e-8, 20)),
        ("rmsprop(0.5, window=0)", "rmsprop(beta2=0.5, eps=1e-08, window=0)", (0.0, 0.5, 1e-8, 0)),
        (
            "adam(0, 0.999, 1e-6, 1000)+rms",
            "rms(beta=0.9)+adam(beta1=0.0, beta2=0.999, eps=1e-06, window=1000)",
            (0.0, 0.999, 1e-6, 1000),
        ),
        ("rms+sgd", "rms(beta=0.9)+sgd", None),
        ("momentum", "momentum(beta=0.9, window=20)", None),
    ],
)
def test_moments_are_read_and_spelled_out(
    spec: str, spelled: str, moments: tuple[float, float, float, int] | None
) -> None:
    chain = rules.parse(spec)
    assert chain.spec == spelled
    assert rules.parse(chain.spec) == chain
    assert chain.moments == (moments and rules.Adam(*moments))
    assert chain.state_size == spelled.count("rms(")


NUMBERS = {
    "beta": st.floats(0.0, 0.9999),
    "beta1": st.floats(0.0, 0.999999),
    "beta2": st.floats(0.0, 0.999999),
    "eps": st.floats(1e-30, 1e30),
    "limit": st.floats(min_value=0.0, exclude_min=True, allow_infinity=False),
    "window": st.integers(1, 1000),
}


@given(data=st.data(), last=st.sampled_from(["", "momentum", "adam", "rmsprop"]))
def test_what_is_spelled_out_is_read_again(data: st.DataObject, last: str) -> None:
    names = data.draw(st.lists(st.sampled_from(["sgd", "rms", "sign", "spread", "clip"]), min_size=1, max_size=3))  # fmt: skip
    texts = []
    for name in [*names, last][: len(names) + bool(last)]:
        keys = [field.name for field in fields(rules.KINDS[name])]
        parts = [f"{key}={data.draw(NUMBERS[key])!r}" for key in keys]
        texts.append(f"{name}({', '.join(parts)})" if parts else name)
    chain = rules.parse("+".join(texts))
    assert chain.spec == "+".join(texts)
    assert rules.parse(chain.spec) == chain


@pytest.mark.parametrize("spec", ["clip(1e+3)", "sgd+clip( 1e+3 )", "adam(eps=1e+16)", "clip(1e+16)+momentum"])  # fmt: skip
def test_exponents_have_signs(spec: str) -> None:
    assert len(rules.parse(spec).spec) > len(spec) - 4


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("", "'' is unknown; known are sgd, rms, sign, spread, clip, momentum, adam, rmsprop"),
        ("adamw", "'adamw' is unknown"),
        ("rms+", "'' is unknown"),
        ("rms(0.9", r"'rms\(0.9' is unknown"),
        ("rms-clip", "'rms-clip' is unknown"),
        ("Rms", "'Rms' is unknown"),
        ("rms(gamma=1)", r"rms has no parameter 'gamma=1'; it is rms\(beta: 'float' = 0.9\)"),
        ("rms(0.9, 0.9)", "rms has no parameter '0.9'"),
        ("sgd(1)", "sgd has no parameter '1'"),
        ("rms(beta=1)", r"beta is '1': it must be in \[0, 1\)"),
        ("rms(-0.1)", "beta is '-0.1'"),
        ("rms(nan)", "beta is 'nan'"),
        ("rms(x)", "beta is 'x'"),
        ("rms(beta=)", "beta is ''"),
        ("clip(0)", "limit is '0': it must be positive and finite"),
        ("clip(inf)", "limit is 'inf'"),
        ("clip(-1)", "limit is '-1'"),
        ("momentum(window=0)", "window is '0': it must be a whole number, 1 to 1000"),
        ("momentum(window=2.5)", "window is '2.5'"),
        ("momentum(window=1001)", "window is '1001'"),
        ("momentum(window=inf)", "window is 'inf'"),
        ("momentum+momentum(0.5)", "momentum is there twice; keep one"),
        ("adam+rms+adam(0.5)", "adam is there twice; keep one"),
        ("adam+momentum", "adam and momentum are both there; keep one"),
        ("rmsprop+clip+adam", "rmsprop and adam are both there; keep one"),
        ("adam(gamma=1)", r"adam has no parameter 'gamma=1'; it is adam\(beta1: "),
        ("rmsprop(beta1=0.9)", "rmsprop has no parameter 'beta1=0.9'"),
        ("adam(beta1=1)", r"beta1 is '1': it must be in \[0, 0.999999\]"),
        ("adam(beta2=0.99999999)", "beta2 is '0.99999999'"),
        ("rmsprop(nan)", "beta2 is 'nan'"),
        ("adam(eps=0)", r"eps is '0': it must be in \[1e-30, 1e30\]"),
        ("adam(eps=inf)", "eps is 'inf'"),
        ("adam(window=-1)", "window is '-1': it must be a whole number, 0 to 1000"),
        ("rmsprop(window=1.5)", "window is '1.5'"),
        ("adam(window=1001)", "window is '1001'"),
    ],
)
def test_text_that_cannot_be_read_is_named(spec: str, named: str) -> None:
    with pytest.raises(UserError, match=named) as caught:
        rules.parse(spec)
    assert str(caught.value).startswith(f"rule {spec!r}: ")
    assert "\n" not in str(caught.value)
