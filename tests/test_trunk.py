"""The losses are those of the whole model, each text runs once, and a run is the same with and without a cache.

Reading order: which layers can be spared, losses, what is kept, runs.
"""

from __future__ import annotations

import gc
import io
import json
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import justforward as jf
import justforward.session as session
from conftest import ARCHITECTURES, MASKED, make_model, make_tokenizer
from justforward.alone import workers
from justforward.config import TrainConfig
from justforward.data import Example
from justforward.evaluate import Scorer
from justforward.folder import RunFolder
from justforward.prepare import choose_tuned
from justforward.progress import Progress
from justforward.run import train
from justforward.store import Store
from justforward.tasks import Task
from justforward.trunk import Trunk, frozen_layers, stack_of
from justforward.tuners import attach

PLENTY = 2**24
TOKENIZER = {"opt": "metaspace", "gpt2": "bytelevel", "llama": "metaspace", **MASKED}
UPPER = {  # of the two layers the upper one
    "opt": r"layers\.1\.", "gpt2": r"h\.1\.", "llama": r"layers\.1\.", "bert": r"layer\.1\.",
    "roberta": r"layer\.1\.", "distilbert": r"layer\.1\.",
}  # fmt: skip
TEXTS = ["a fine film", "bad", "the story is wonderful , the music is great", "dull and long"]
ROWS = [Example({"text": text}, ("neg", "pos")[i % 2], "rows.csv", i + 2) for i, text in enumerate(TEXTS)]  # fmt: skip


OPEN: list[Store] = []


def in_memory(name: str = "", limit: int = PLENTY) -> Store:
    OPEN.append(Store(None, limit))
    return OPEN[-1]


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while OPEN:
        OPEN.pop().close()


def task_for(architecture: str, **labels: str) -> Task:
    template = "{text} It was {mask}." if architecture in MASKED else "{text} It was"
    return Task(template, labels or {"neg": "bad", "pos": "good"})


def scorer_of(architecture: str, model: Any, **labels: str) -> Scorer:
    return Scorer(model, make_tokenizer(TOKENIZER[architecture]), task_for(architecture, **labels))


@pytest.fixture(params=[*ARCHITECTURES, *MASKED])
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# ------------------------------------------------------------------------------------ which layers


def test_one_stack_is_found(architecture: str) -> None:
    stack = stack_of(make_model(architecture))
    assert stack is not None
    assert len(stack) == 2


def test_what_is_tuned_says_how_many_layers_rest(architecture: str) -> None:
    model = make_model(architecture)
    assert frozen_layers(model) == 0  # the embeddings move
    choose_tuned(model, UPPER[architecture])
    assert frozen_layers(model) == 1


def test_one_lower_parameter_is_enough(architecture: str) -> None:
    model = make_model(architecture)
    choose_tuned(model, UPPER[architecture])
    first = next(p for n, p in model.named_parameters() if UPPER[architecture].replace("1", "0")[:-2].replace("\\", "") in n)  # fmt: skip
    first.requires_grad_(True)
    assert frozen_layers(model) == 0


def test_embeddings_are_below_also_where_they_are_the_head() -> None:
    model = make_model("gpt2")  # tied
    choose_tuned(model, "wte")
    assert frozen_layers(model) == 0
    model = make_model("llama")  # a head of its own
    choose_tuned(model, "lm_head")
    assert frozen_layers(model) == 2
    choose_tuned(model := make_model("llama"), "embed_tokens")
    assert frozen_layers(model) == 0


def test_last_norm_is_above_all() -> None:
    for architecture, name in (("gpt2", "ln_f"), ("llama", r"^model\.norm"), ("opt", "final_layer_norm")):  # fmt: skip
        model = make_model(architecture)
        choose_tuned(model, name)
        assert frozen_layers(model) == (0 if architecture == "opt" else 2)  # OPT's layers have one


@pytest.mark.parametrize("tuner", ["lora", "prefix", "prompt"])
def test_adapters(tuner: Any) -> None:
    config = TrainConfig(
        model="m", data="d", out="o", template="{text} It was", labels="neg=bad,pos=good", tuner=tuner
    )  # fmt: skip
    model = attach(make_model("llama"), make_tokenizer("metaspace"), config)
    assert frozen_layers(model) == 0
    if tuner == "lora":
        choose_tuned(model, r"layers\.1\.")
        assert frozen_layers(model) == 1


def test_an_unusual_model_is_left_alone() -> None:
    class Config:
        is_encoder_decoder = True

    model = torch.nn.Module()
    assert stack_of(model) is None
    model.config = Config()
    assert stack_of(model) is None
    assert frozen_layers(model) == 0


# ------------------------------------------------------------------------------------------ losses


def test_losses_are_the_whole_models(architecture: str) -> None:
    model = make_model(architecture)
    choose_tuned(model, UPPER[architecture])
    scorer = scorer_of(architecture, model)
    batch = scorer.encode(ROWS)
    plain = scorer.losses(batch)
    trunk = Trunk(model, in_memory)
    assert (trunk.depth, trunk.layers, trunk.share) == (1, 2, 0.5)
    with trunk.reused():
        spared = scorer.losses(batch)
        again = scorer.losses(batch)
    assert torch.allclose(plain, spared, rtol=1e-5, atol=1e-6)
    assert torch.equal(spared, again)
    assert torch.equal(scorer.losses(batch), plain)  # outside nothing is left


def test_words_of_several_tokens_have_sequences_of_their_own() -> None:
    model = make_model("gpt2")
    choose_tuned(model, UPPER["gpt2"])
    scorer = scorer_of("gpt2", model, neg="not good", pos="very very good")
    batch = scorer.encode(ROWS)
    assert batch["input_ids"].dim() == 3
    plain = scorer.losses(batch)
    with Trunk(model, in_memory).reused():
        assert torch.allclose(plain, scorer.losses(batch), rtol=1e-5, atol=1e-6)


def test_a_text_runs_through_the_trunk_once(architecture: str) -> None:
    model = make_model(architecture)
    choose_tuned(model, UPPER[architecture])
    scorer = scorer_of(architecture, model)
    trunk = Trunk(model, in_memory)
    stack = stack_of(model)
    assert stack is not None
    ran = [0, 0]
    for i, layer in enumerate(stack):
        whole = layer.self_attn if hasattr(layer, "self_attn") else next(iter(layer.children()))
        whole.register_forward_hook(lambda *_, i=i: ran.__setitem__(i, ran[i] + 1))
    with trunk.reused():
        for _ in range(3):
            scorer.losses(scorer.encode([*ROWS, *ROWS]))
        scorer.losses(scorer.encode(ROWS[:2]))
    assert trunk.texts == len(ROWS)
    assert ran == [len(ROWS), 4]


def test_the_numbers_of_a_text_do_not_depend_on_its_company(architecture: str) -> None:
    outputs = []
    for rows in (ROWS, ROWS[::-1], ROWS[1:3]):
        model = make_model(architecture)
        choose_tuned(model, UPPER[architecture])
        scorer = scorer_of(architecture, model)
        trunk = Trunk(model, in_memory)
        with trunk.reused():
            scorer.losses(scorer.encode(rows))
            outputs.append(scorer.losses(scorer.encode(ROWS)))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_what_moves_above_is_seen(architecture: str) -> None:
    model = make_model(architecture)
    choose_tuned(model, UPPER[architecture])
    scorer = scorer_of(architecture, model)
    batch = scorer.encode(ROWS)
    trunk = Trunk(model, in_memory)
    with trunk.reused():
        before = scorer.losses(batch)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1.5)
        after = scorer.losses(batch)
    assert not torch.allclose(before, after)
    assert torch.allclose(after, scorer.losses(batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["weight", "activation"])
def test_a_step_is_the_same_step(architecture: str, kind: str) -> None:
    def losses(reuse: bool) -> list[float]:
        model = make_model(architecture)
        choose_tuned(model, UPPER[architecture])
        scorer = scorer_of(architecture, model)
        opt = jf.MeZO(model, lr=1e-3, eps=1e-2, estimator=kind, rule="sgd")
        out = []
        for _ in range(3):
            if reuse:
                with Trunk(model, in_memory).reused():
                    out.append(opt.step(scorer.losses, scorer.encode(ROWS)))
            else:
                out.append(opt.step(scorer.losses, scorer.encode(ROWS)))
        opt.close()
        return out

    assert losses(True) == pytest.approx(losses(False), rel=1e-4)


def test_calls_that_need_more_than_tokens_run_as_ever() -> None:
    model = make_model("llama")
    choose_tuned(model, UPPER["llama"])
    ids = torch.tensor([[5, 6, 7]])
    mask = torch.ones_like(ids)
    calls: list[dict[str, Any]] = [
        {"input_ids": ids},  # no mask
        {"input_ids": ids, "attention_mask": mask, "use_cache": True},
        {"input_ids": ids, "attention_mask": mask, "position_ids": torch.tensor([[4, 5, 6]])},
        {"inputs_embeds": model.get_input_embeddings()(ids), "attention_mask": mask},
        {"input_ids": ids, "attention_mask": mask, "output_hidden_states": True},
    ]
    trunk = Trunk(model, in_memory)
    with torch.no_grad():
        plain = [model(**call).logits for call in calls]
        with trunk.reused():
            assert all(torch.equal(model(**c).logits, p) for c, p in zip(calls, plain, strict=True))
            assert trunk.texts == 0
            model.train()
            model(input_ids=ids, attention_mask=mask)
            assert trunk.texts == 0  # dropout is another forward each time
            model.eval()
            model(input_ids=ids, attention_mask=mask)
            assert trunk.texts == 1


def test_an_exception_leaves_the_model_as_it_was() -> None:
    model = make_model("gpt2")
    choose_tuned(model, UPPER["gpt2"])
    stack = stack_of(model)
    assert stack is not None
    scorer = scorer_of("gpt2", model)
    batch = scorer.encode(ROWS)
    plain = scorer.losses(batch)
    trunk = Trunk(model, in_memory)
    with trunk.reused():
        scorer.losses(batch)
    with pytest.raises(IndexError), trunk.reused():
        model(input_ids=torch.tensor([[10**6]]), attention_mask=torch.ones(1, 1))
    assert all("forward" not in vars(layer) for layer in stack)
    assert torch.equal(scorer.losses(batch), plain)
    with trunk.reused():
        assert torch.allclose(scorer.losses(batch), plain, rtol=1e-5)


# -------------------------------------------------------------------------------------------- kept


def test_kept_outputs_belong_to_the_layers_they_come_from() -> None:
    names: list[str] = []

    def note(name: str) -> Store:
        names.append(name)
        return in_memory(name)

    def changed(change: Callable[[Any], None]) -> str:
        model = make_model("llama")
        choose_tuned(model, UPPER["llama"])
        change(model)
        Trunk(model, note)
        return names[-1]

    @torch.no_grad()
    def add(name: str, model: Any) -> None:
        model.get_parameter(name).add_(1.0)

    same = changed(lambda model: None)
    assert changed(lambda model: None) == same
    assert changed(partial(add, "model.layers.1.mlp.up_proj.weight")) == same  # it is above
    assert changed(partial(add, "model.layers.0.mlp.up_proj.weight")) != same
    assert changed(partial(add, "model.embed_tokens.weight")) != same
    assert changed(lambda model: setattr(model.config, "rms_norm_eps", 1e-3)) != same


def test_nothing_kept_is_only_slower() -> None:
    model = make_model("gpt2")
    choose_tuned(model, UPPER["gpt2"])
    scorer = scorer_of("gpt2", model)
    batch = scorer.encode([*ROWS, *ROWS])
    full, empty = Trunk(model, in_memory), Trunk(model, lambda name: in_memory(name, 0))
    found = []
    for trunk in (full, empty):
        with trunk.reused():
            found += [scorer.losses(batch), scorer.losses(batch)]
    assert all(torch.equal(found[0], each) for each in found)
    assert (full.texts, empty.texts) == (4, 8)  # twice in a batch, and yet once a call


# ------------------------------------------------------------------------------------ whole batches


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def upper(architecture: str) -> tuple[Any, Scorer, Trunk]:
    model = make_model(architecture)
    choose_tuned(model, UPPER[architecture])
    return model, scorer_of(architecture, model), Trunk(model, in_memory)


def test_a_whole_batch_has_the_bits_of_the_models_own_forward(architecture: str) -> None:
    _, scorer, trunk = upper(architecture)
    batches = [scorer.encode(ROWS), scorer.encode(ROWS[1:]), scorer.encode([*ROWS, *ROWS])]
    plain = [scorer.losses(batch) for batch in batches]
    for _ in range(2):
        with trunk.reused(whole=True):
            assert all(
                torch.equal(scorer.losses(b), p) for b, p in zip(batches, plain, strict=True)
            )
    assert trunk.texts == 4 + 3 + 8  # each batch once
    with trunk.reused():  # a text by itself is something else
        scorer.losses(batches[0])
    assert trunk.texts == 15 + 4


def test_a_whole_batch_that_is_not_kept_runs_again() -> None:
    model, scorer, _ = upper("llama")
    batch = scorer.encode(ROWS)
    plain = scorer.losses(batch)
    trunk = Trunk(model, lambda name: in_memory(name, 0))
    with trunk.reused(whole=True):
        assert torch.equal(scorer.losses(batch), plain)
        assert torch.equal(scorer.losses(batch), plain)
    assert trunk.texts == 8


def test_batches_that_differ_in_padding_alone_are_two() -> None:
    model, _, trunk = upper("llama")
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    with torch.no_grad():
        plain = [
            model(input_ids=ids, attention_mask=m).logits for m in (mask, torch.ones_like(mask))
        ]
        with trunk.reused(whole=True):
            for m, wanted in zip((mask, torch.ones_like(mask)), plain, strict=True):
                for _ in range(2):
                    assert torch.equal(model(input_ids=ids, attention_mask=m).logits, wanted)


def test_scoring_in_threads_is_scoring(architecture: str, three_threads: None) -> None:
    _, scorer, trunk = upper(architecture)
    rows = [*ROWS, *ROWS, *ROWS]
    plain = [scorer.evaluate(rows, 5)]
    with trunk.reused(whole=True):
        plain += [scorer.evaluate(rows, 5), scorer.evaluate(rows, 5)]
    assert plain[0] == plain[1] == plain[2]
    with trunk.reused():  # the trunk has the threads
        alone = scorer.evaluate(rows, 5)
    assert alone.loss == pytest.approx(plain[0].loss, rel=1e-5)
    assert (alone.predictions, alone.forwards) == (plain[0].predictions, plain[0].forwards)


# ----------------------------------------------------------------------------- short texts, a thread each


@pytest.mark.parametrize(("name", "value"), [("SMALL", 0), ("SHORT", 0), ("SHORT", 8)])
def test_a_thread_for_each_text_gives_what_all_threads_give(
    architecture: str, three_threads: None, monkeypatch: pytest.MonkeyPatch, name: str, value: int
) -> None:
    workers: set[str] = set()

    def ran(trunk: Trunk) -> None:
        run = trunk._run

        def noted(*given: Any) -> torch.Tensor:
            workers.add(threading.current_thread().name)
            return run(*given)

        monkeypatch.setattr(trunk, "_run", noted)

    found = []
    for changed in (False, True):
        if changed:
            monkeypatch.setattr(f"justforward.trunk.{name}", value)
        _, scorer, trunk = upper(architecture)
        ran(trunk)
        batch = scorer.encode(ROWS)
        with trunk.reused():
            found.append([scorer.losses(batch), scorer.losses(batch)])
        assert trunk.texts == len(ROWS)
        if not changed:
            assert "MainThread" not in workers
            workers.clear()
    assert "MainThread" in workers  # of the longer texts
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)
    plain = scorer.losses(batch)
    torch.testing.assert_close(found[0][0], plain, atol=1e-5, rtol=1e-5)


def test_threads_of_torch_are_what_they_were(three_threads: None) -> None:
    _, scorer, trunk = upper("llama")
    with trunk.reused():
        scorer.losses(scorer.encode(ROWS))
    assert torch.get_num_threads() == 3
    seen: list[int] = []
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert seen == [3]
    assert [workers().submit(torch.get_num_threads).result() for _ in range(6)] == [1] * 6


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_goes_wrong_with_a_text_comes_through(
    three_threads: None, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    model, scorer, trunk = upper("llama")
    batch = scorer.encode(ROWS)
    wanted = scorer.losses(batch)
    run, calls = trunk._run, []

    def fails(*given: Any) -> torch.Tensor:
        calls.append(given)
        if len(calls) == 2:
            raise error("so it is")
        return run(*given)

    monkeypatch.setattr(trunk, "_run", fails)
    with trunk.reused():
        with pytest.raises(error, match="so it is"):
            scorer.losses(batch)
        torch.testing.assert_close(scorer.losses(batch), wanted, atol=1e-5, rtol=1e-5)
    assert not any("forward" in vars(layer) for layer in stack_of(model) or ())
    torch.testing.assert_close(scorer.losses(batch), wanted, atol=1e-5, rtol=1e-5)


# -------------------------------------------------------------------------------------------- runs


@pytest.fixture
def config(tmp_path: Path, model_folder: Path, sentiment_csv: Path) -> TrainConfig:
    return TrainConfig(
        model=str(model_folder), data=str(sentiment_csv), template="{text} It was",
        labels={"neg": "great", "pos": "terrible"}, out=str(tmp_path / "run"), max_forwards=24,
        eval_every=6, lr=3e-2, threads=1, tune=r"h\.1\.", train_size=16,
        start="base", patience=0,
    )  # fmt: skip


def go(config: TrainConfig) -> tuple[dict[str, Any], str]:
    out = io.StringIO()
    return train(config, Progress(out)), out.getvalue()


def losses_of(config: TrainConfig) -> list[float]:
    return [m["loss"] for m in RunFolder(config.out).read_metrics()[0]]


def test_a_run_says_so_and_learns_alike(config: TrainConfig, tmp_path: Path) -> None:
    result, said = go(config)
    assert "the first 1 of 2 layers do not move: a text runs through them once" in said
    other = replace(config, out=str(tmp_path / "plain"), reuse=False)
    plain, said = go(other)
    assert "do not move" not in said
    assert losses_of(config) == pytest.approx(losses_of(other), rel=1e-3)
    assert result["accuracy"] == plain["accuracy"]
    base = jf.fingerprint(make_model("gpt2"))
    assert len({base, result["fingerprint"], plain["fingerprint"]}) == 3


@pytest.mark.parametrize("lr", [3e-2, 3.0])
def test_a_model_is_gone_before_another_is_loaded(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, lr: float
) -> None:
    """Also when a run goes back, and at its end, where the best step is not the last: two would be twice the memory."""
    loaded: list[weakref.ref[Any]] = []
    real = session.load_model

    def watched(*given: Any) -> Any:
        gc.collect()
        assert all(model() is None for model in loaded)
        model, tokenizer = real(*given)
        loaded.append(weakref.ref(model))
        return model, tokenizer

    monkeypatch.setattr(session, "load_model", watched)
    result, _ = go(replace(config, lr=lr, max_forwards=60, lr_schedule="constant"))
    reloads = result["rewinds"] + (result["kept_step"] != result["steps"])
    assert len(loaded) == 1 + reloads
    assert lr < 1.0 or reloads


def test_a_cache_changes_no_bit(config: TrainConfig, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    none, _ = go(replace(config, cache_gb=0.0))
    results = [none]
    for name in ("first", "second"):
        results.append(go(replace(config, out=str(tmp_path / name), cache=str(cache)))[0])
    assert len({result["fingerprint"] for result in results}) == 1
    kept = list(cache.iterdir())
    assert len(kept) == 1
    assert kept[0].stat().st_size > 0
    assert losses_of(replace(config, out=str(tmp_path / "second"))) == losses_of(config)


def test_resumed_to_the_same_bits(config: TrainConfig, tmp_path: Path) -> None:
    whole, _ = go(config)
    part = replace(config, out=str(tmp_path / "part"))
    stopped = replace(part, max_minutes=1e-9)
    assert go(stopped)[0]["stopped_by"] == "max_minutes"
    resumed, _ = go(replace(part, resume=True, max_minutes=None))
    assert resumed["fingerprint"] == whole["fingerprint"]
    assert json.loads(json.dumps(losses_of(part))) == losses_of(config)


def test_a_head_is_tuned_without_the_layers(config: TrainConfig, tmp_path: Path) -> None:
    _, said = go(replace(config, tune=None, tuner="head"))
    assert "the first 2 of 2 layers do not move" in said


def test_nothing_is_left_beside_the_run(config: TrainConfig, tmp_path: Path) -> None:
    before = {path.name for path in tmp_path.iterdir()}
    go(config)
    assert {path.name for path in tmp_path.iterdir()} == before | {"run"}
    assert not [path for path in Path(config.out).iterdir() if "outputs" in path.name]
