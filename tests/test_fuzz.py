"""Every parser of what a person, or a fault, may have written: any input is read, or refused by a `UserError` of one line.

Counted in `reliability`: 200 inputs each with `make faults`, a few by default.
"""

from __future__ import annotations

import gc
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from conftest import make_model, make_tokenizer
from justforward import catalog, cli, rules
from justforward.config import TrainConfig
from justforward.data import read_examples
from justforward.durable import Pace
from justforward.errors import UserError
from justforward.folder import RunFolder
from justforward.grid import plan
from justforward.models import load_model
from justforward.settings import labels_of, resolved, task_of
from justforward.snapshots import RunOptimizer, Snapshots
from justforward.tasks import Task, parse_template
from justforward.trajectory import read_log
from justforward.variants import Blocks, Modified
from reliability import trial
from test_faults import Loop
from test_gguf import write_gguf

MUCH = pytest.mark.parametrize("much", [12, pytest.param(200, marks=pytest.mark.slow)])
TASK = Task(template="{text} It was", labels={"neg": "bad", "pos": "good"})
# What parsers of configurations and rows have a meaning for, and what has none of its own.
ATOMS = [
    "", " ", "\n", "\t", "\0", "\ufeff", "\r", "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"), "é",
    "null", "true", "no", "~", "[]", "{}", "- a", "1", "-1", "0", "1e400", ".nan", ".inf", "1_000", "0x1F", "2020-01-01",
    "a: b", "a:\n  b", "? x", "&a", "*a", "<<: *a", "!!python/object/apply:os.getcwd []", "!x", "|", ">", "%", "@", "'", '"',
    "#", ",", ";", ":", "{", "}", "[", "]", "(", ")", "{text}", "{mask}", "{{", "=", "==", "clip(3)", "adam", "momentum(",
    "variance", "per=layer", "every=0", "\\d+", "(?P<", "*", "+", "[" * 1500, "{" * 1500, "9" * 5000, "label", "text", "x" * 9000,
]  # fmt: skip
TEXTS = st.lists(st.one_of(st.sampled_from(ATOMS), st.text(max_size=8)), max_size=6).map("".join)


def spoilt(good: Any, pieces: Any) -> Any:
    """A good input with one to three of its stretches replaced, or its end cut off."""

    @st.composite
    def made(draw: Any) -> Any:
        out = good
        for _ in range(draw(st.integers(1, 3))):
            first = draw(st.integers(0, len(out)))
            last = draw(st.integers(first, min(len(out), first + 12)))
            out = out[:first] + draw(pieces) + (out[last:] if draw(st.integers(0, 7)) else out[:0])
        return out

    return made()


def spoilt_lines(good: str) -> Any:
    """A good text, one of whose values is another, or one of whose lines is missing or there twice."""
    lines = good.splitlines()

    @st.composite
    def made(draw: Any) -> str:
        out = list(lines)
        at = draw(st.integers(0, len(out) - 1))
        what = draw(st.integers(0, 3))
        if what == 0:
            del out[at]
        elif what == 1:
            out.insert(at, out[at])
        else:
            out[at] = out[at].partition(":")[0] + ": " + draw(TEXTS)
        return "\n".join(out)

    return made()


def as_bytes(texts: Any) -> Any:
    return texts.map(lambda text: text.encode("utf-8", "surrogatepass"))


def fuzz(name: str, much: int, inputs: Any, read: Callable[[Any], Any]) -> None:
    """Read so many inputs: each is fine, or refused in one line."""

    @settings(
        max_examples=much,
        phases=[Phase.generate],
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def check(given_input: Any) -> None:
        with trial(name), warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # Python's, of regular expressions that may change their meaning
            try:
                read(given_input)
            except UserError as error:
                said = str(error)
                assert said
                assert "\n" not in said

    check()


def in_file(path: Path, read: Callable[[Path], Any]) -> Callable[[bytes], Any]:
    def through(content: bytes) -> Any:
        path.write_bytes(content)
        return read(path)

    return through


BYTES = st.binary(max_size=64)


@MUCH
def test_logs(much: int, tmp_path: Path) -> None:
    Loop(tmp_path / "good", "weight").finish()
    good = (tmp_path / "good").read_bytes()
    fuzz("log", much, st.one_of(BYTES, spoilt(good, BYTES)), in_file(tmp_path / "log", read_log))


@MUCH
def test_rules(much: int) -> None:
    fuzz(
        "rule",
        much,
        st.one_of(TEXTS, spoilt("rms+clip(3)+momentum(beta=0.9, window=4)", TEXTS)),
        rules.parse,
    )


@MUCH
def test_modified(much: int) -> None:
    good = "variance(by=looks, per=layer, every=100, samples=1)"
    fuzz("Modified.parse", much, st.one_of(TEXTS, spoilt(good, TEXTS)), Modified.parse)


@MUCH
def test_blocks(much: int) -> None:
    def read(text: str) -> None:
        Blocks.parse(text).labels([["a.0.weight", "a.1.weight", "b"]])

    fuzz("Blocks.parse", much, st.one_of(TEXTS, spoilt(r"a\.0 a\.1 b", TEXTS)), read)


@MUCH
def test_declarations(much: int, tmp_path: Path) -> None:
    for name in ("sst2", "squad", "record"):
        good = (catalog.FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
        inputs = as_bytes(st.one_of(TEXTS, spoilt(good, TEXTS), spoilt_lines(good)))
        fuzz(
            "task declaration (YAML)",
            much // 3 + 1,
            inputs,
            in_file(tmp_path / "t.yaml", lambda p: catalog.load(str(p))),
        )


CONFIG = TrainConfig("m", "d.csv", "out", template="{text} It was", labels="neg=bad,pos=good")


@MUCH
def test_config_of_a_run(much: int, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_config(resolved(CONFIG))
    path = tmp_path / "config.yaml"
    good = path.read_text(encoding="utf-8")
    inputs = as_bytes(st.one_of(TEXTS, spoilt(good, TEXTS), spoilt_lines(good)))
    fuzz("run's config.yaml", much, inputs, in_file(path, lambda _: resolved(folder.read_config())))


def said_by(
    monkeypatch: pytest.MonkeyPatch, act: Callable[[Any, Any], Any]
) -> Callable[[list[str]], None]:
    """The command up to what it would do: its exit code is 0 or 2."""

    def instead(command: str, config: Any, source: Any = None) -> int:
        act(config, source)
        return 0

    monkeypatch.setattr(cli, "_run", instead)

    def call(argv: list[str]) -> None:
        assert cli.main(argv) in (0, 2)

    return call


@MUCH
def test_options(much: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = said_by(monkeypatch, lambda config, source: task_of(resolved(config)))
    good = "model: m\ndata: d.csv\nout: o\ntemplate: '{text} It was'\nlabels:\n  neg: bad\n  pos: good\nlr: 1e-3\nsync: step\n"
    inputs = as_bytes(st.one_of(TEXTS, spoilt(good, TEXTS), spoilt_lines(good)))
    read = in_file(tmp_path / "c.yaml", lambda p: call(["train", "--config", str(p)]))
    fuzz("--config and options of train", much // 2 + 1, inputs, read)
    names = [
        "--lr",
        "--seed",
        "--labels",
        "--rule",
        "--sync",
        "--test-size",
        "--layers",
        "--keep",
        "--blocks",
        "--x",
        "train",
    ]
    words = st.lists(st.one_of(st.sampled_from(names), TEXTS), max_size=6)
    argv = [
        "train",
        "--model",
        "m",
        "--data",
        "d",
        "--out",
        "o",
        "--template",
        "{text}",
        "--labels",
        "a=b,c=d",
    ]
    fuzz("--config and options of train", much // 2 + 1, words, lambda more: call([*argv, *more]))


@MUCH
def test_templates_and_labels(much: int) -> None:
    def read(pair: tuple[str, Any]) -> None:
        template, labels = pair
        parse_template(template)
        Task(template=template, labels=labels_of(labels))

    labels = st.one_of(
        TEXTS, spoilt("neg=bad,pos=good", TEXTS), st.dictionaries(TEXTS, TEXTS, max_size=3)
    )
    fuzz(
        "template and labels",
        much,
        st.tuples(st.one_of(TEXTS, spoilt("{text} It was", TEXTS)), labels),
        read,
    )


@MUCH
@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_rows(much: int, suffix: str, tmp_path: Path) -> None:
    good = {
        "csv": 'text,label\n"a, b",neg\nc,pos\n',
        "tsv": "text\tlabel\na\tneg\nb\tpos\n",
        "jsonl": '{"text": "a", "label": "neg"}\n{"text": "b", "label": "pos"}\n',
    }[suffix]
    values = st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS),
        lambda inner: st.one_of(
            st.lists(inner, max_size=2),
            st.dictionaries(st.sampled_from(["text", "label", "x"]), inner),
        ),
        max_leaves=4,
    )
    objects = as_bytes(
        st.lists(values, max_size=3).map(lambda rows: "\n".join(json.dumps(row) for row in rows))
    )
    inputs = st.one_of(
        BYTES, as_bytes(TEXTS), as_bytes(spoilt(good, TEXTS)), spoilt(good.encode(), BYTES), objects
    )
    read = in_file(tmp_path / f"rows.{suffix}", lambda path: read_examples(path, TASK))
    fuzz(f"rows ({suffix.upper()})", much, inputs, read)


@MUCH
def test_comparisons(much: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = said_by(monkeypatch, plan)
    good = (
        "model: m\nout: o\ntasks:\n  mine: {data: d.csv, template: '{text} It was', labels: {a: x, b: y}}\n  sst2:\n    data: F\n"
        "methods:\n  zero-shot: {}\n  mezo: {lr: 1e-4}\n  icl:\n    draws: 2\nseeds: [0, 1]\nsearch:\n  mezo: {lr: [1e-3, 1e-4]}\n"
    )
    inputs = as_bytes(st.one_of(TEXTS, spoilt(good, TEXTS), spoilt_lines(good)))
    fuzz(
        "compare.yaml",
        much,
        inputs,
        in_file(tmp_path / "c.yaml", lambda p: call(["compare", "--config", str(p)])),
    )


@MUCH
def test_gguf(much: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its header and what follows from it, as a model that is mapped."""
    whole = write_gguf(make_model("llama"), tmp_path / "whole.gguf", ["F32", "Q8_0"])
    good = whole.read_bytes()
    monkeypatch.setenv("JUSTFORWARD_CACHE", str(tmp_path / "cache"))

    def read(content: bytes) -> None:
        load_model(str(whole), quantize="gguf")
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        gc.collect()

    header = len(good) // 2
    inputs = st.one_of(
        st.tuples(st.integers(0, header), BYTES.filter(bool)).map(
            lambda p: good[: p[0]] + p[1] + good[p[0] + len(p[1]) :]
        ),
        st.integers(0, len(good)).map(lambda size: good[:size]),
    )
    fuzz("GGUF header", much, inputs, in_file(whole, lambda path: read(b"")))


@MUCH
def test_checkpoints(much: int, tmp_path: Path) -> None:
    good = tmp_path / "good"
    make_model("gpt2").save_pretrained(good)
    make_tokenizer("bytelevel").save_pretrained(good)
    contents = {p.name: p.read_bytes() for p in sorted(good.iterdir())}
    shares = {
        "model.safetensors": 3,
        "config.json": 2,
        "tokenizer.json": 1,
        "tokenizer_config.json": 1,
    }

    def read(change: tuple[str, bytes]) -> None:
        name, content = change
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        shutil.copytree(good, tmp_path / "model")
        (tmp_path / "model" / name).write_bytes(content)
        load_model(str(tmp_path / "model"))

    parts = []
    for name, share in shares.items():
        if name in contents:
            parts += [st.tuples(st.just(name), spoilt(contents[name], BYTES))] * share
    # the header of safetensors is at the front
    head = contents["model.safetensors"]
    parts.append(
        st.tuples(
            st.just("model.safetensors"),
            spoilt(head[:200], BYTES).map(lambda raw: raw + head[200:]),
        )
    )
    fuzz("safetensors checkpoint", much, st.one_of(parts), read)


@MUCH
def test_manifests(much: int, tmp_path: Path) -> None:
    notes: list[str] = []
    kept = Snapshots(tmp_path / "snapshots", notes.append)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Linear(3, 2)
    opt = RunOptimizer(net, log=tmp_path / "log", snapshots=kept, sync=Pace().seconds)
    opt.step(lambda: net.weight.sum())
    opt.snapshot(1)
    opt.close()
    log = read_log(tmp_path / "log")
    path = tmp_path / "snapshots" / "step-00000001" / "manifest.json"
    good = path.read_text()

    def read(path: Path) -> None:
        notes.clear()
        found = kept.newest(log, 1)
        assert (found is None) == (len(notes) == 1)
        for said in notes:
            raise UserError(said)

    inputs = as_bytes(st.one_of(TEXTS, spoilt(good, TEXTS), spoilt_lines(good)))
    fuzz("manifest of a snapshot", much, st.one_of(BYTES, inputs), in_file(path, read))


@MUCH
def test_metrics(much: int, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    good = "".join(
        json.dumps(
            {
                "kind": kind,
                "step": 1,
                "forwards": 2,
                "seconds": 0.1,
                "loss": 1.0,
                "lr": 0.1,
                "accuracy": 1.0,
            }
        )
        + "\n"
        for kind in ("before", "step", "validation")
    )
    inputs = st.one_of(BYTES, as_bytes(TEXTS), as_bytes(spoilt(good, TEXTS)))
    fuzz(
        "metrics.jsonl",
        much,
        inputs,
        in_file(tmp_path / "metrics.jsonl", lambda _: folder.read_metrics()),
    )
