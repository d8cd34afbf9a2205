"""A run on disk: files that are whole or known to be torn, and one session at a time."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from justforward.config import TrainConfig
from justforward.data import Example
from justforward.errors import UserError
from justforward.folder import (
    RunFolder,
    best_step,
    check_new,
    data_hash,
    row_hash,
    write_whole,
    writing,
)
from justforward.settings import resolved

CONFIG = resolved(
    TrainConfig("m", "d.csv", "out", template="{text} ¿It was", labels="neg=no,pos=très bon")
)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "a" / "run")
    made.make()
    made.unlock()
    return made


def line(step: int, kind: str = "step", **values: Any) -> dict[str, Any]:
    made = {
        "kind": kind,
        "step": step,
        "forwards": 2 * step,
        "seconds": 0.1,
        "loss": 1.0,
        "lr": 0.1,
    }
    return {**made, **values}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*")}


# ------------------------------------------------------------------------------------------ writing


def test_write_whole_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for text in ("one\n", "", "zwei ½ drei\n"):
        write_whole(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert names(tmp_path) == {"a.txt"}


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.ENOSPC, "make room"), (errno.EDQUOT, "make room"), (errno.EROFS, "make it writable")],
)
def test_a_full_disk_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, advice: str
) -> None:
    path = tmp_path / "a.txt"
    write_whole(path, "old")

    def fsync(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match=f"a.txt: cannot be written: .*: {advice}") as caught:
        write_whole(path, "new")
    assert os.strerror(number) in str(caught.value)
    assert path.read_text() == "old"
    assert names(tmp_path) == {"a.txt"}


def test_writing_lets_other_errors_through(tmp_path: Path) -> None:
    with pytest.raises(KeyError), writing(tmp_path):
        raise KeyError("x")


# ------------------------------------------------------------------------------------------- making


def test_check_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_new(tmp_path / "a" / "b", "hint")
    assert names(tmp_path) == set()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, said in (
        ("", "exists: hint"),
        ("file", "exists and is not a folder: hint"),
        ("link", "exists and is not a folder: hint"),
        ("file/run", "cannot be made: .*/file is a file: choose another --out"),
        ("file/a/b", "cannot be made: .*/file is a file"),
    ):
        with pytest.raises(UserError, match=said):
            check_new(tmp_path / name, "hint")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(UserError, match=r"a/b: cannot be made: .* is read-only: choose another"):
        check_new(tmp_path / "a" / "b", "hint")


def test_unmake_takes_back_what_make_made(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    made = RunFolder(tmp_path / "old" / "a" / "b")
    made.make()
    made.write_config(CONFIG)
    made.unmake()
    assert names(tmp_path) == {"old"}

    made.make()
    (tmp_path / "old" / "a" / "other").touch()  # someone else's: the folder around stays
    made.unmake()
    assert names(tmp_path) == {"old", "a", "other"}

    there = RunFolder(tmp_path / "old")
    with pytest.raises(UserError, match="cannot be made: it exists"):
        there.make()
    there.unmake()
    assert (tmp_path / "old").is_dir()


def test_tidy_removes_what_a_kill_leaves(folder: RunFolder) -> None:
    folder.write_config(CONFIG)
    (folder.snapshots / "step-00000003").mkdir(parents=True)
    before = names(folder.path)
    (folder.path / ".config.yaml.tmp").touch()
    (folder.path / ".trajectory.jfl.rewound").touch()
    (folder.snapshots / ".step-00000006.1.2.tmp").mkdir()
    (folder.snapshots / ".step-00000006.1.2.tmp" / "part").touch()
    folder.tidy()
    assert names(folder.path) == before
    assert ".lock" in before


def test_make_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mkdir = Path.mkdir

    def full(self: Path, *args: Any, **kwargs: Any) -> None:
        if self.name == "c":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        mkdir(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(UserError, match=r"b/c: cannot be made: No space left on device"):
        RunFolder(tmp_path / "a" / "b" / "c").make()
    assert names(tmp_path) == set()


def test_one_session_at_a_time(folder: RunFolder) -> None:
    folder.log.write_bytes(b"x")
    folder.lock()
    other = RunFolder(folder.path)
    with pytest.raises(UserError, match="another train is at work in this folder"):
        other.lock()
    folder.unlock()
    other.lock()
    with (folder.path / ".lock").open("rb") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    other.unlock()
    other.unlock()


# --------------------------------------------------------------------------- config and environment


def test_check_run_names_what_is_missing(tmp_path: Path, folder: RunFolder) -> None:
    with pytest.raises(UserError, match="no such run folder"):
        RunFolder(tmp_path / "none").check_run()
    for name, write in (
        ("config.yaml", lambda: folder.write_config(CONFIG)),
        ("environment.json", lambda: folder.write_environment({})),
        ("trajectory.jfl", lambda: folder.log.touch()),
    ):
        with pytest.raises(UserError, match=f"not a run folder: {name} is missing"):
            folder.check_run()
        write()
    folder.check_run()


def test_config_comes_back(folder: RunFolder) -> None:
    folder.write_config(CONFIG)
    assert folder.read_config() == replace(CONFIG, out=str(folder.path))
    assert "très bon" in (folder.path / "config.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", r"\(not a mapping\)"),
        (b"- a\n", r"\(not a mapping\)"),
        (b"lr: 1\nspeed: 2\n", "'speed' is no setting of train"),
        (b"lr: 1\n", "incomplete: missing 2 required"),
        (b"a: [\n", "cannot be read: .*line 2"),
        (b"\xff\n", "cannot be read"),
        (b"1: 2\n", "1 is no setting of train"),
        (
            b"model: 3\ndata: d\ntemplate: t\nlabels: a=b,c=d",
            "config.yaml: --model is 3: it must be a text",
        ),
        (
            b"model: m\ndata: d\ntemplate: t\nlabels: a",
            "config.yaml: labels 'a': 'a' is not label=word",
        ),
        (b"model: m\ndata: d\ntask: sst2\n", "incomplete: template or labels are missing"),
        (b"model: m\ndata: d\ntemplate: t\nlabels: a=b,c=d\nlr: .nan", "config.yaml: --lr is nan"),
        (b"!!python/object/apply:os.getcwd []\n", "cannot be read: could not determine"),
        (b"lr: " + b"9" * 5000, "cannot be read: Exceeds the limit"),
        (b"[" * 2000, "cannot be read: maximum recursion depth"),
    ],
)
def test_config_refused(folder: RunFolder, content: bytes, said: str) -> None:
    (folder.path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        folder.read_config()
    assert "config.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"null", b"[" * 100000])
def test_objects_refused(folder: RunFolder, content: bytes) -> None:
    for name, read in (
        ("environment.json", folder.read_environment),
        ("result.json", folder.read_result),
    ):
        (folder.path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: (cannot be read|not a JSON object)"):
            read()


def test_result(folder: RunFolder) -> None:
    assert folder.read_result() is None
    folder.forget_result()
    cut = {"status": "interrupted", "stopped_by": "interrupt", "seconds": 1.5, "rows": {}}
    scores = (
        "accuracy",
        "loss",
        "before_accuracy",
        "before_loss",
        "kept_step",
        "validation_accuracy",
    )
    finished = {**cut, "status": "finished", **dict.fromkeys(scores, 0)}
    for result in (cut, finished):
        folder.write_result(result)
        assert folder.read_result() == result
        for name in result:
            folder.write_result({k: v for k, v in result.items() if k != name})
            with pytest.raises(UserError, match=f"result.json: damaged: {name} is missing"):
                folder.read_result()
    folder.forget_result()
    assert folder.read_result() is None


def test_environment(folder: RunFolder) -> None:
    whole = {"data_sha256": "a", "base_fingerprint": "b", "versions": {}, "threads": 1}
    folder.write_environment(whole)
    assert folder.read_environment() == whole
    for name in whole:
        folder.write_environment({**whole, name: None})
        with pytest.raises(UserError, match=f"environment.json: damaged: {name} is missing"):
            folder.read_environment()


# --------------------------------------------------------------------------------------------- rows


def row(**fields: str) -> Example:
    return Example(fields, "pos", "a.csv", 1)


def test_row_hash() -> None:
    one = row_hash(row(text="A fine  film", title="x"))
    assert one == row_hash(row(name="X", words=" a FINE\tfilm "))  # other columns, same texts
    assert one != row_hash(row(text="A fine film"))
    assert one != row_hash(row(text="A finefilm", title="x"))
    assert row_hash(row(a="b", c="d")) != row_hash(row(a="bd", c=""))
    assert len(one) == 16


def test_seen(folder: RunFolder) -> None:
    train, validation = [row(text="a"), row(text="b")], [row(text="c")]
    folder.write_seen(train, validation)
    assert folder.read_seen() == {row_hash(r) for r in train + validation}
    text = (folder.path / "seen.txt").read_text()
    assert [entry.split()[1] for entry in text.splitlines()] == ["train", "train", "validation"]
    (folder.path / "seen.txt").unlink()
    with pytest.raises(UserError, match=r"seen\.txt: cannot be read"):
        folder.read_seen()


def test_data_hash(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert data_hash(tmp_path / "a").startswith("ba7816bf")
    with pytest.raises(UserError, match="none: cannot be read: No such file"):
        data_hash(tmp_path / "none")


# ------------------------------------------------------------------------------------------ metrics


@given(st.integers(0, 6), st.data())
def test_metrics_torn_anywhere(
    tmp_path_factory: pytest.TempPathFactory, count: int, data: st.DataObject
) -> None:
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    written = [line(step, accuracy=0.1 + 0.2) for step in range(count)]
    for metric in written:
        folder.append_metric(metric)
    path = folder.path / "metrics.jsonl"
    raw = path.read_bytes() if count else b""
    cut = data.draw(st.integers(0, len(raw)))
    path.write_bytes(raw[:cut])
    metrics, torn = folder.read_metrics()
    whole = raw[:cut].count(b"\n")
    assert metrics == written[:whole]
    assert torn == cut - len(b"".join(raw.splitlines(keepends=True)[:whole]))
    folder.keep_metrics(metrics)
    folder.append_metric(line(99))
    assert folder.read_metrics() == ([*written[:whole], line(99)], 0)


def test_no_metrics_yet(folder: RunFolder) -> None:
    assert folder.read_metrics() == ([], 0)


@pytest.mark.parametrize(
    "bad",
    [
        "{",
        "[]",
        "3",
        '{"step": 1}',
        '{"kind": "step"}',
        "",
        json.dumps({**line(1), "step": "x"}),
        json.dumps(line(1, "walk")),
        json.dumps(line(1, lr=None)),
        json.dumps(line(1, "validation")),
    ],
)
def test_metrics_damaged_in_the_middle(folder: RunFolder, bad: str) -> None:
    lines = [json.dumps(line(0)), bad, json.dumps(line(2))]
    (folder.path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: damaged: .*: remove the line"):
        folder.read_metrics()


def test_a_metric_that_does_not_fit_is_not_half_written(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.append_metric(line(0))
    before = (folder.path / "metrics.jsonl").read_bytes()
    open_path = Path.open

    class Short:
        """A file on a disk with room for ten more bytes."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, raw: bytes) -> Any:
            return self.file.write(raw[:10])

        def __enter__(self) -> Short:
            return self

        def __exit__(self, *args: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    monkeypatch.setattr(Path, "open", lambda path, *a, **k: Short(open_path(path, *a, **k)))
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written: No space left"):
        folder.append_metric(line(1))
    monkeypatch.undo()
    assert (folder.path / "metrics.jsonl").read_bytes() == before


METRICS = st.lists(
    st.builds(
        line,
        st.integers(0, 9),
        st.sampled_from(["step", "validation", "before"]),
        accuracy=st.sampled_from([0.0, 0.5, 1.0]),
        loss=st.sampled_from([0.1, 0.2]),
    )
)


@given(METRICS, st.integers(0, 9))
def test_best_step(metrics: list[dict[str, Any]], steps: int) -> None:
    best = best_step(metrics, steps)
    fit = [m for m in metrics if m["kind"] == "validation" and m["step"] <= steps]
    if best is None:
        assert not fit
        return
    assert best in fit
    for other in fit:
        better = (other["accuracy"], -other["loss"]) > (best["accuracy"], -best["loss"])
        assert not better
        if (other["accuracy"], other["loss"]) == (best["accuracy"], best["loss"]):
            assert best["step"] <= other["step"]


@pytest.mark.parametrize("name", ["seed", "patience", "eval_every"])
def test_a_config_without_one_of_its_settings_is_refused(folder: RunFolder, name: str) -> None:
    """A default in its place might not be what the run had."""
    folder.write_config(CONFIG)
    path = folder.path / "config.yaml"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(x for x in lines if not x.startswith(f"{name}:")), encoding="utf-8")
    with pytest.raises(UserError, match=rf"config\.yaml: incomplete: {name} is missing"):
        folder.read_config()
