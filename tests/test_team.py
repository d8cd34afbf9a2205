"""`torchrun -m justforward train`: the run of two processes is the run of one, and goes on after one of them has died."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import justforward as jf
from conftest import refusal, small_run
from justforward import cli, launched
from justforward.config import TrainConfig
from justforward.evaluate import Scorer
from justforward.folder import RunFolder
from justforward.models import load_model
from justforward.progress import Progress
from justforward.run import train
from processes import together
from reliability import trial
from test_private_workers import known_entropy

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def config(tmp_path: Path, model_folder: Path, sentiment_csv: Path) -> TrainConfig:
    """Ten steps. The words are swapped, so that the model has everything to learn."""
    return small_run(model_folder, sentiment_csv, tmp_path / "run", max_minutes=100.0)


def go(*configs: TrainConfig) -> list[Any]:
    """Runs one after the other, as the process that torchrun would have started."""
    os.environ.update(
        RANK=str(dist.get_rank()),
        WORLD_SIZE=str(dist.get_world_size()),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="1",
    )
    found = []
    for config in configs:
        said = io.StringIO()
        result = train(config, Progress(said))
        found.append([result["fingerprint"], result["steps"], result["out"], said.getvalue()])
    return found


def kept(out: str) -> tuple[list[dict[str, Any]], list[jf.Step]]:
    """metrics.jsonl without what depends on the clock, and losses to what a mean of means rounds; the steps."""
    folder = RunFolder(out)
    metrics, _ = folder.read_metrics()
    times = ("seconds", "step_seconds")
    lines = [{k: v for k, v in metric.items() if k not in times} for metric in metrics]
    lines = [{**line, "loss": f"{line.get('loss', 0.0):.5g}"} for line in lines]
    return lines, jf.read_log(folder.log).steps


def test_two_processes_do_what_one_does(config: TrainConfig, tmp_path: Path) -> None:
    """Also resumed by another number of them."""
    short = replace(config, max_forwards=12, lr_schedule="constant", out=str(tmp_path / "short"))
    one = replace(config, lr_schedule="constant", out=str(tmp_path / "one"))
    two = replace(one, out=str(tmp_path / "two"))
    (alone,) = together(1, tmp_path, go, one, short)
    first, second = together(2, tmp_path, go, two, replace(short, max_forwards=20, resume=True))
    assert isinstance(alone, list), alone
    assert isinstance(first, list), first
    for theirs, other in zip(first, second, strict=True):
        assert theirs[:2] == other[:2] == alone[0][:2]
        assert "forwards" in theirs[3]
        assert other[3] == ""
        assert not Path(other[2]).exists()
    assert kept(one.out) == kept(two.out)
    assert kept(short.out)[1] == kept(one.out)[1]
    assert {p.name for p in Path(one.out).iterdir()} == {p.name for p in Path(two.out).iterdir()}


@pytest.mark.parametrize("estimator", ["weight", "activation"])
def test_one_process_with_parts_does_what_two_do(
    estimator: Any, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    config = replace(config, rows_at_once=3, estimator=estimator)
    first, _ = together(2, tmp_path, go, replace(config, out=str(tmp_path / "two")))
    rows: list[int] = []
    real = Scorer.losses

    def losses(self: Scorer, batch: Any) -> Any:
        found = real(self, batch)
        rows.append(len(found))
        return found

    monkeypatch.setattr(Scorer, "losses", losses)
    result = train(config, Progress(io.StringIO()))
    assert [result["fingerprint"], result["steps"]] == first[0][:2]
    assert kept(config.out)[1] == kept(str(tmp_path / "two"))[1]
    both = 2 if estimator == "activation" else 1  # signs, in one forward
    assert max(rows) == 3 * both
    out = replace(config, rows_at_once=None, out=str(tmp_path / "whole"))
    train(out, Progress(io.StringIO()))
    assert max(rows) == config.batch_size * both


def go_privately(*configs: TrainConfig) -> list[Any]:
    with pytest.MonkeyPatch.context() as patch:
        known_entropy(patch, dist.get_rank())
        return go(*configs)


def test_private_steps_of_two_are_those_of_one(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With known entropy: logs byte for byte, also of a plain run; what was spent, and nothing else, is said; one goes on with two's."""
    config = replace(
        config, private=True, noise_multiplier=0.7, clip=2.0, estimator="weight", start="base"
    )
    config = replace(config, lr_schedule="constant", backoff=None, patience=None, max_minutes=None)
    short = replace(config, max_forwards=12, out=str(tmp_path / "short"))
    one, two = (replace(config, out=str(tmp_path / name)) for name in ("one", "two"))
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with monkeypatch.context() as patch:
        known_entropy(patch)
        alone = train(one, Progress(io.StringIO()))
    first, second = together(2, tmp_path, go_privately, two, short)
    assert isinstance(first, list), first
    assert first[0][:2] == second[0][:2] == [alone["fingerprint"], 10]
    assert second[0][3] == second[1][3] == ""
    assert RunFolder(one.out).log.read_bytes() == RunFolder(two.out).log.read_bytes()
    assert kept(one.out) == kept(two.out)
    lines = [m for m in RunFolder(two.out).read_metrics()[0] if m["kind"] == "private"]
    assert len(lines) == 10
    assert not any("loss" in line for line in lines)
    spent = RunFolder(two.out).read_result()["privacy"]
    assert spent == RunFolder(one.out).read_result()["privacy"]
    assert spent["answers"] == 10
    begun = jf.read_log(RunFolder(short.out).log).steps
    ((again,),) = together(1, tmp_path, go, replace(short, max_forwards=20, resume=True))
    assert again[1] == RunFolder(short.out).read_result()["privacy"]["answers"] == 10
    assert jf.read_log(RunFolder(short.out).log).steps[: len(begun)] == begun


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {
                "private": True,
                "target_epsilon": 8.0,
                "estimator": "weight",
                "max_minutes": None,
            },
            "--rows-at-once is 2: a step with --private runs each row by itself",
        ),
        ({"looks": "one-point", "estimator": "weight"}, "a step with --looks one-point"),
        ({"modified": "variance", "estimator": "weight"}, "a step with --modified sees all"),
    ],
)
def test_a_step_that_sees_all_rows_is_not_divided(
    given: dict[str, Any], said: str, config: TrainConfig
) -> None:
    assert said in refusal(replace(config, rows_at_once=2, **given))


def broken(config: TrainConfig) -> list[Any]:
    """The third step has a loss that is no number, in process 1 alone."""
    real, calls = Scorer.losses, 0

    def losses(self: Scorer, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        found = real(self, batch)
        if dist.get_rank() == 1 and calls == 12:
            found[:] = math.nan
        return found

    Scorer.losses = losses  # type: ignore[method-assign]
    try:
        return go(config)
    finally:
        Scorer.losses = real  # type: ignore[method-assign]


def test_all_processes_go_back_where_one_has_a_loss_that_is_no_number(
    config: TrainConfig, tmp_path: Path
) -> None:
    (first,), (second,) = together(2, tmp_path, broken, config)
    assert first[:2] == second[:2]
    assert "back to step " in first[3]
    (rewind,) = (line for line in kept(config.out)[0] if line["kind"] == "rewind")
    assert rewind["taken"] == 2


def whole(config: TrainConfig) -> Any:
    try:
        return go(config)
    except jf.UserError as error:
        return str(error)


def unlike(*configs: TrainConfig) -> Any:
    """Each process has its own."""
    return whole(configs[dist.get_rank()])


def test_processes_with_other_rows_or_tokens_are_refused(
    config: TrainConfig, tmp_path: Path, sentiment_csv: Path
) -> None:
    rows, tokens = tmp_path / "others.csv", tmp_path / "tokens"
    rows.write_text(sentiment_csv.read_text().replace("film 7 ", "film seven "))
    shutil.copytree(config.model, tokens)
    said = json.loads((tokens / "tokenizer.json").read_text())
    said["normalizer"] = {"type": "Lowercase"}
    (tokens / "tokenizer.json").write_text(json.dumps(said))
    for changes in ({"data": str(rows)}, {"model": str(tokens)}):
        ours = replace(config, out=str(tmp_path / f"run-{min(changes)}"))
        other = replace(config, out=str(tmp_path / "other"), **changes)
        for found in together(2, tmp_path, unlike, ours, other):
            assert "workers differ at the start: data is 'sha256 " in found, found


def test_an_objective_of_all_rows_is_refused(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    function = tmp_path / "rewards.py"
    function.write_text("def share(predictions, references):\n    return 0.5\n")
    config = replace(config, objective=f"{function}:share", estimator="weight")
    for said in together(2, tmp_path, whole, config):
        assert said.startswith(
            "--objective is one number for all rows of a batch, and here processes"
        ), said
    assert not Path(config.out).exists()
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(jf.UserError, match=r"here --rows-at-once divides the rows: .* leave that"):
        train(replace(config, rows_at_once=2), Progress(io.StringIO()))
    assert not Path(config.out).exists()


# ------------------------------------------------------------------------------------------- torchrun


def test_what_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert (launched.several(), launched.number(), launched.attempt()) == (False, 0, 0)
    for name in VARIABLES:
        monkeypatch.setenv(name, "3")
    assert (launched.several(), launched.number(), launched.attempt()) == (True, 3, 1)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert launched.attempt() == 0


def test_a_run_that_is_started_again_is_resumed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    given = ["train", "--lr", "1", "--out", str(tmp_path)]
    assert cli._with_run(given) == given
    (tmp_path / "config.yaml").write_text("")
    resumed = ["train", "--config", str(tmp_path / "config.yaml"), *given[1:], "--resume"]
    assert cli._with_run(given) == resumed
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert cli._with_run(given) == given
    cli._say("no")
    assert capsys.readouterr().err == "worker 1: no\n"


REWARDS = """
import os, signal

calls = 0

def right(predictions, references):
    global calls
    calls += 1
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if {dies} and first and os.environ["RANK"] == "1" and calls == 25:
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(len(p) + (p in r)) for p, r in zip(predictions, references)]
"""


@pytest.mark.slow
def test_a_worker_is_killed_and_torchrun_goes_on_from_the_log(
    config: TrainConfig, tmp_path: Path
) -> None:
    with trial("one of two processes of `torchrun -m -- justforward train`"):
        killed_or_not(config, tmp_path)


def killed_or_not(config: TrainConfig, tmp_path: Path) -> None:
    results = []
    for dies in (False, True):
        rewards, out = tmp_path / f"rewards{dies}.py", tmp_path / f"run{dies}"
        rewards.write_text(REWARDS.format(dies=dies))
        options = {
            "--model": config.model,
            "--data": config.data,
            "--template": config.template,
            "--labels": "neg=great,pos=terrible",
            "--out": out,
            "--max-forwards": "40",
            "--eval-every": "20",
            "--lr": "3e-2",
            "--eps": "0.3",
            "--threads": "1",
            "--start": "base",
            "--patience": "0",
            "--estimator": "weight",
            "--objective": f"{rewards}:right",
        }
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        command += ["--standalone", "--max-restarts", "1", "-m", "--", "justforward", "train"]
        command += [str(word) for option in options.items() for word in option]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        assert ("worker 1 of 2 ended in step" in done.stderr) == dies, done.stderr
        results.append(kept(str(out)))
        base, _ = load_model(config.model)
        jf.replay(base, RunFolder(out).log)
        results[-1] += (jf.fingerprint(base),)
    assert results[0][1:] == results[1][1:]
    assert len(jf.read_log(RunFolder(tmp_path / "runTrue").log).steps) == 20
