"""What compare is asked for becomes cells, and what cannot be used is refused with its line."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest

from justforward import cli
from justforward.config import BaselineConfig, CompareConfig, Method, TrainConfig
from justforward.errors import UserError
from justforward.grid import KINDS, METHODS, Cell, plan, slug
from justforward.models import load_model

FILMS = {"template": "{text} It was", "labels": {"neg": "bad", "pos": "good, really"}}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with rows and a task's folder."""
    (tmp_path / "rows.csv").write_text("text,label\n")
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)


def config(**other: Any) -> CompareConfig:
    values: dict[str, Any] = {
        "model": "smollm2",
        "out": "out",
        "tasks": {"sst2": {"data": "data", "shots": 16}},
        "methods": {"mezo": {"lr": 0.1}},
        "seeds": (0, 1),
    }
    return CompareConfig(**{**values, **other})


def test_cells_and_their_commands() -> None:
    methods = {
        "zero-shot": None, "icl": {"demonstrations": 8, "calibrate": True}, "probe": {},
        "mezo-lora": {"tuner": "lora", "max-forwards": 40}, "first-order": {"calibrate": False},
        "adam": {"method": "first-order", "tuner": "head", "seeds": 1},
    }  # fmt: skip
    grid = plan(config(methods=methods))
    assert (grid.tasks, grid.methods, grid.seeds) == (("sst2",), tuple(methods), (0, 1))
    assert [(c.method, c.kind, c.seed) for c in grid.cells] == [
        ("zero-shot", "zero-shot", 0),  # the published test rows are the same for every seed
        ("icl", "icl", 0), ("icl", "icl", 1),
        ("probe", "probe", 0), ("probe", "probe", 1),
        ("mezo-lora", "mezo", 0), ("mezo-lora", "mezo", 1),
        ("first-order", "first-order", 0), ("first-order", "first-order", 1),
        ("adam", "first-order", 0),
    ]  # fmt: skip
    by_name = {(c.method, c.seed): c for c in grid.cells}
    assert by_name["icl", 1].argv("run") == [
        "baseline", "--method=icl", "--model=smollm2", "--task=sst2", "--data=data", "--shots=16",
        "--demonstrations=8", "--calibrate", "--seed=1", "--json",
    ]  # fmt: skip
    assert by_name["mezo-lora", 0].argv(Path("x/run"), threads=1) == [
        "train", "--model=smollm2", "--task=sst2", "--data=data", "--shots=16", "--tuner=lora",
        "--max-forwards=40", "--seed=0", "--threads=1", "--json", "--out=x/run",
    ]  # fmt: skip
    assert "--calibrate" not in by_name["first-order", 0].argv("run")
    assert by_name["mezo-lora", 1].folder == Path("cells/sst2/mezo-lora/1")
    assert len({c.folder for c in grid.cells}) == len({c.key for c in grid.cells}) == 10


def test_rows_of_a_file_are_dealt_anew_for_each_seed() -> None:
    tasks = {"films": {"data": "rows.csv", **FILMS}}
    grid = plan(config(tasks=tasks, methods={"zero-shot": {}}))
    assert [c.seed for c in grid.cells] == [0, 1]  # the seed deals the test rows too
    tasks["films"]["split_seed"] = 7
    assert [c.seed for c in plan(config(tasks=tasks, methods={"zero-shot": {}})).cells] == [0]


def test_the_command_line_understands_every_command() -> None:
    """What a cell is given arrives at the command as it is, words with commas and equals signs too."""
    tasks = {"films": {"data": "rows.csv", **FILMS, "template": "-- {text} = 'so' It was"}}
    methods = {"mezo": {"lr": 1e-5, "tune": "a|b"}, "icl": {"calibrate": True}}
    for cell in plan(config(tasks=tasks, methods=methods)).cells:
        argv = cell.argv("run", threads=2)
        given = cli.parser().parse_args(cli._with_underscores(argv))[argv[0]].as_dict()
        given.pop("config", None)
        kind: Any = TrainConfig if argv[0] == "train" else BaselineConfig
        expected = {**cell.options, "threads": 2, "json": True}
        if argv[0] == "train":
            expected["out"] = "run"
        assert kind(**given) == kind(**expected)
        assert list(given["labels"].items()) == list(FILMS["labels"].items())  # type: ignore[attr-defined]


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, field.name)
        for kind in ("mezo", "first-order")
        for field in fields(KINDS[METHODS[kind]])
        if isinstance(field.default, bool) and field.name not in ("json", "resume")
    ],
)
def test_the_command_line_understands_truth_values(kind: str, name: str, value: bool) -> None:
    method = {"method": kind} if METHODS[kind] == "baseline" else {}
    cell = Cell("sst2", "x", kind, 0, {**method, "model": "m", "data": "d", name: value})
    argv = cell.argv("run")
    given = cli.parser().parse_args(cli._with_underscores(argv))[argv[0]].as_dict()
    assert given[name] is value


def test_trials() -> None:
    search = {"mezo": {"lr": [0.1, 0.2], "eps": [1e-3, 1e-2]}}
    grid = plan(config(methods={"mezo": {}, "probe": {}}, search=search))
    trials = grid.trials(grid.cells[1])
    assert [(t.seed, t.trial, t.values) for t in trials] == [
        (0, 0, {"lr": 0.1, "eps": 1e-3}),
        (0, 1, {"lr": 0.1, "eps": 1e-2}),
        (0, 2, {"lr": 0.2, "eps": 1e-3}),
        (0, 3, {"lr": 0.2, "eps": 1e-2}),
    ]
    assert "--lr=0.2" in trials[3].argv("run")
    assert "--eps=0.01" in trials[3].argv("run")
    assert trials[3].folder == Path("cells/sst2/mezo/trial-3")
    assert trials[3].name == "sst2 mezo seed 0, trying lr 0.2, eps 0.01"
    assert grid.trials(grid.cells[2]) == []


def test_a_declaration_goes_by_the_name_of_its_file(tmp_path: Path) -> None:
    source = Path(cli.catalog.FOLDER / "sst2.yaml").read_text()
    (tmp_path / "films.yaml").write_text(source)
    grid = plan(config(tasks={"films.yaml": {"data": "data"}}))
    assert grid.tasks == ("films",)
    assert grid.cells[0].options["task"] == "films.yaml"


def test_slug() -> None:
    assert slug("mezo (lr 1e-3)") == "mezo-lr-1e-3"
    assert slug("../x") == "x"
    assert slug("...") == "-"


HEAD = "model: smollm2\ntasks: {sst2: {data: data}}\n"


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("methods: {}", 3, "methods: none given: give one at least"),
        ("methods:\n  foo: {}", 4, "methods.foo: begins with none of zero-shot, icl, probe"),
        ("methods:\n  mezolora: {}", 4, "methods.mezolora: begins with none of"),
        ("methods:\n  x: {method: sgd}", 4, "methods.x.method: 'sgd' is none of zero-shot"),
        ("methods:\n  x: {method: [mezo]}", 4, "methods.x.method: ['mezo'] is none of zero-shot"),
        ("methods: {mezo: }\njobs:", 4, "jobs: None: it must be at least 1"),
        ("methods:\n  mezo:\n    lrr: 1", 5, "methods.mezo.lrr: no option of justforward train: did you mean lr?"),
        ("methods:\n  probe: {max_forwards: 3}", 4, "methods.probe.max_forwards: no option of justforward baseline"),
        ("methods:\n  mezo:\n    eps: 1\n    lr: x", 6, "methods.mezo.lr: --lr is 'x': it must be a number"),
        ("methods:\n  mezo: {tuner: lra}", 4, "methods.mezo.tuner: --tuner is 'lra': it must be one of full"),
        ("methods:\n  first-order: {lr: -1}", 4, "methods.first-order.lr: --lr is -1: it must be positive"),
        ("methods:\n  mezo: {shots: 4}", 4, "methods.mezo.shots: decides which rows are shown and tested"),
        ("methods:\n  mezo: {seed: 4}", 4, "methods.mezo.seed: no option here: give seeds"),
        ("methods:\n  mezo: {out: x}", 4, "methods.mezo.out: no option here: each cell has a folder of its own"),
        ("methods:\n  mezo: [1]", 4, "methods.mezo: [1] is no mapping of options"),
        ("methods:\n  mezo: {seeds: 2}", 4, "methods.mezo.seeds: 2: it is how many of the seeds are used, from 1 to 1"),
        ("methods:\n  mezo: {seeds: true}", 4, "methods.mezo.seeds: True"),
        ("methods:\n  mezo: {lora-rank: 2}", 4, "methods.mezo.lora_rank: --lora-rank is 2: it belongs to --tuner lora"),
        ("methods:\n  mezo: {max_length: 3, max-length: 4}", 4, "methods.mezo.max-length: given twice"),
        ("methods:\n  mezo-a b: {}\n  mezo-a-b: {}", 5, "methods.mezo-a-b: the name would be that of 'mezo-a b' in a folder"),
        ("methods:\n  mezo: {}\n  mezo: {}", 5, "'mezo' is given twice: keep one"),
        ("methods:\n  mezo:\n    lr: 1\n    lr: 2", 6, "'lr' is given twice: keep one"),
        ("methods: {mezo: }\nmethod: x", 4, "'method' is no setting of compare"),
        ("methods: {mezo: }\nseeds: []", 4, "seeds: none given"),
        ("methods: {mezo: }\nseeds: [0, 1, 0]", 4, "seeds: 0 is given twice"),
        ("methods: {mezo: }\nseeds: [-1]", 4, "seeds: -1 is not a whole number from 0"),
        ("methods: {mezo: }\ncell_minutes: 0", 4, "cell_minutes: 0.0: it must be positive"),
        ("methods: {mezo: }\nthreads: 0", 4, "threads: 0: it must be at least 1"),
        ("methods: {mezo: }\nagain: probe", 4, "again: 'probe' is none of the methods mezo"),
        ("methods: {mezo: }\nsearch:\n  probe: {}", 5, "search.probe: none of the methods mezo"),
        ("methods: {mezo: }\nsearch:\n  mezo: {lr: 0.1}", 5, "search.mezo.lr: 0.1 is no list of values"),
        ("methods: {mezo: }\nsearch:\n  mezo: {lr: []}", 5, "search.mezo.lr: [] is no list of values"),
        ("methods: {mezo: }\nsearch:\n  mezo: {lr: [1, 1]}", 5, "search.mezo.lr: 1 is given twice"),
        ("methods: {mezo: }\nsearch:\n  mezo: {lr: [1, x]}", 5, "search.mezo.lr: --lr is 'x': it must be a number"),
        ("methods: {mezo: }\nsearch:\n  mezo: {split_seed: [1, 2]}", 5, "search.mezo.split_seed: decides which rows are shown"),
        ("methods: {mezo: {lr: 1}}\nsearch:\n  mezo: {lr: [1, 2]}", 5, "search.mezo.lr: also given under methods.mezo"),
        ("methods:\n  probe:\n    draws: 5", 5, "methods.probe.draws: --draws is 5: it belongs to --method icl, and --method is 'probe'"),
        ("methods:\n  adam: {method: first-order,\n    calibrate: true}", 5, "methods.adam.calibrate: --calibrate is True: it belongs to --method zero-shot or icl"),
        ("methods:\n  zero-shot: {max-steps: 4}", 4, "methods.zero-shot.max_steps: --max-steps is 4: it belongs to --method first-order"),
        ("methods: {icl: }\nsearch:\n  icl: {lr: [0.1]}", 5, "search.icl.lr: --lr is 0.1: it belongs to --method first-order"),
    ],
)  # fmt: skip
def test_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, line: int, said: str
) -> None:
    refused(tmp_path, capsys, HEAD + text, f":{line}: {said}")


@pytest.mark.parametrize(
    ("tasks", "line", "said"),
    [
        ("{}", 2, "tasks: none given"),
        ("\n  sts2: {data: data}", 3, "tasks.sts2: no task of that name ('justforward tasks' lists them)"),
        ("\n  sst2: {}", 3, "tasks.sst2: data is missing"),
        ("\n  sst2: {data: nowhere}", 3, "tasks.sst2.data: 'nowhere': no such file or folder"),
        ("\n  sst2: {data: data, model: x}", 3, "tasks.sst2.model: no option here: it is the same for all cells"),
        ("\n  sst2: {data: data, shots: 1.5}", 3, "tasks.sst2.shots: --shots is 1.5: it must be a whole number"),
        ("\n  sst2: {data: data, max_forwards: 8}", 3, "tasks.sst2.max_forwards: no option of justforward baseline, which probe is"),
        ("\n  x: {data: rows.csv, template: '{text}'}", 3, "tasks.x: no task of that name"),
        ("\n  x: {data: rows.csv, template: '{text}', labels: a}", 3, "tasks.x: with methods.mezo: labels 'a': 'a' is not label=word"),
        ("\n  sst2: {data: data}\n  SST2: {data: data, task: rte}", 4, "tasks.SST2: the name would be that of 'sst2'"),
        ("\n  sst2: {data: data, lr: 0.1}", 3, "tasks.sst2.lr: --lr is 0.1: it belongs to --method first-order, and --method is 'probe'"),
        ("\n  sst2:\n    data: data\n    methods:\n      probe: {draws: 5}", 6, "tasks.sst2.methods.probe.draws: --draws is 5: it belongs to --method icl"),
        ("\n  sst2:\n    data: data\n    methods: {mezo: {lr: x}}", 5, "tasks.sst2.methods.mezo.lr: --lr is 'x': it must be a number"),
        ("\n  gone.yaml: {data: data}", 3, "tasks.gone.yaml: with methods.mezo: gone.yaml: no such declaration"),
    ],
)  # fmt: skip
def test_refused_tasks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tasks: str, line: int, said: str
) -> None:
    text = f"model: smollm2\ntasks: {tasks}\nmethods: {{mezo: , probe: }}\n"
    refused(tmp_path, capsys, text, f":{line}: {said}")


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("./none", "model './none': no such folder: give a folder, a hub name such as facebook/opt-125m, or smollm2"),
        ("a/b/c", "model 'a/b/c': no such folder"),
        ("../none", "model '../none': no such folder"),
        ("rows.csv", "rows.csv: is a file, not a model: give the folder that holds it"),
        ("data", "data: no config.json in the folder: give a folder that save_pretrained wrote"),
        ("adapter", "adapter: an adapter, not a whole model: merge it into its base first"),
        ("two", "two: holds 2 .gguf files (a.gguf, b.gguf): give the path of one"),
    ],
)  # fmt: skip
def test_refused_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, said: str
) -> None:
    """By its place alone, and as loading it would be."""
    places(tmp_path)
    text = f"tasks: {{sst2: {{data: data}}}}\nmodel: {model}\nmethods: {{mezo: }}\n"
    refused(tmp_path, capsys, text, f":2: model: {said}")
    with pytest.raises(UserError) as caught:
        load_model(model)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    "model", ["smollm2", "no-such", "org/no-such", "one", "one/a.gguf", "whole"]
)
def test_models_that_are_looked_at_later(tmp_path: Path, model: str) -> None:
    """Names of the hub are not looked up, and nothing is loaded."""
    places(tmp_path)
    assert plan(config(model=model)).cells[0].options["model"] == model


def places(folder: Path) -> None:
    for name in (
        "adapter/adapter_config.json", "two/a.gguf", "two/b.gguf", "one/a.gguf",
        "whole/config.json", "whole/a.gguf", "whole/a.safetensors",
    ):  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")


def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str) -> None:
    path = tmp_path / "compare.yaml"
    path.write_text(text)
    before = set(tmp_path.iterdir())
    assert cli.main(["compare", "--config", str(path), "--out", "out"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert f"{path}{said}" in err
    assert set(tmp_path.iterdir()) == before


def test_refused_without_a_file() -> None:
    with pytest.raises(UserError, match=r"^methods\.mezo\.lr: --lr is 'x': it must be a number$"):
        plan(config(methods={"mezo": {"lr": "x"}}))
    with pytest.raises(UserError, match=r"^seeds: True is not a whole number"):
        plan(config(seeds=(True,)))


def test_every_kind_of_method_is_a_choice_of_its_command() -> None:
    baselines = {kind for kind, command in METHODS.items() if command == "baseline"}
    assert baselines == set(get_args(Method))
