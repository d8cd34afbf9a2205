"""The project's own rules: direction of imports, size of files, public API, lazy command.

`python tests/test_project.py` rewrites tests/api.txt after a change of the API that is meant.
"""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import justforward

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "justforward"
API = Path(__file__).with_name("api.txt")

# A room may import those before it, never those after it.
ROOMS = [
    "errors",
    "durable",
    "interrupts",
    "launched",
    "memory",
    "noise",
    "pool",
    "lent",
    "stored",
    "trainable",
    "moves",
    "away",
    "directions",
    "shards",
    "batches",
    "activations",
    "rules",
    "variants",
    "trajectory",
    "course",
    "moments",
    "playback",
    "estimators",
    "sights",
    "recipe",
    "private",
    "wire",
    "robust",
    "rounds",
    "groups",
    "modified",
    "ondisk",
    "looks",
    "optim",
    "sockets",
    "peers",
    "workers",
    "reference",
    "hessian",
    "sources",
    "quantised",
    "blocks",
    "mapped",
    "kept",
    "checkpoints",
    "models",
    "training_arguments",
    "accounting",
    "loop",
    "mode",
    "rowwise",
    "drawn",
    "beside",
    "card",
    "trainer",
    "alone",
    "store",
    "trunk",
    "stream",
    "prompted",
    "adapters",
    "tasks",
    "declaration",
    "catalog",
    "data",
    "documents",
    "metrics",
    "answers",
    "published",
    "hub",
    "prompts",
    "cached",
    "causal",
    "masked",
    "seq2seq",
    "generate",
    "evaluate",
    "objectives",
    "ranges",
    "config",
    "settings",
    "offers",
    "schedules",
    "folder",
    "snapshots",
    "lowrank",
    "tuners",
    "probe",
    "head",
    "deep",
    "added",
    "last",
    "progress",
    "guard",
    "lines",
    "budget",
    "prepare",
    "conductor",
    "desk",
    "line",
    "worker",
    "mail",
    "serve",
    "spared",
    "starting",
    "feed",
    "gauge",
    "depth",
    "keeping",
    "outcome",
    "team",
    "session",
    "run",
    "join",
    "rebuild",
    "first_order",
    "baselines",
    "descent",
    "rank",
    "alive",
    "heap",
    "machine",
    "skeleton",
    "rehearse",
    "limits",
    "fits",
    "shown",
    "report",
    "grid",
    "cells",
    "records",
    "board",
    "svg",
    "tables",
    "page",
    "compare",
    "cli",
    "__main__",
]
CORE = set(ROOMS[: ROOMS.index("reference")])
CORE_NEEDS = {
    "torch",
    "numpy",
    "numba",
    "llvmlite",
    "triton",
}  # numba's and torch's own, the last two
TORCH_FREE = {
    "looks",
    "errors",
    "durable",
    "interrupts",
    "launched",
    "rules",
    "variants",
    "sources",
    "tasks",
    "declaration",
    "catalog",
    "accounting",
    "ranges",
    "config",
    "settings",
    "offers",
    "schedules",
    "guard",
    "progress",
    "heap",
    "grid",
    "cells",
    "records",
    "board",
    "svg",
    "tables",
    "page",
    "compare",
    "cli",
    "__main__",
}
MOST_LINES = 500
FILES = sorted(SOURCE.rglob("*.py"))


def room_of(file: Path) -> str:
    first = file.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


def imports_of(file: Path) -> Iterator[tuple[str, int]]:
    """Dotted names of all that a file imports, also within functions, with the line."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            assert node.module is not None
            if node.module == "justforward":
                yield from ((f"justforward.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield node.module, node.lineno


def test_every_room_has_its_place() -> None:
    rooms = {room_of(file) for file in FILES} - {"__init__"}
    assert rooms <= set(ROOMS), f"give {rooms - set(ROOMS)} a place in ROOMS"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_point_downwards(file: Path) -> None:
    room = room_of(file)
    if room == "__init__":
        return  # the front door: it hands out names from all rooms, lazily
    for name, line in imports_of(file):
        where = f"{file.relative_to(ROOT)}:{line} imports {name}"
        parts = name.split(".")
        if parts[0] == "justforward":
            if len(parts) == 1 or parts[1] == "__version__":
                continue
            if parts[1] == room and (SOURCE / room).is_dir():
                continue
            assert parts[1] in ROOMS, where
            assert ROOMS.index(parts[1]) < ROOMS.index(room), f"{where}: upwards"
        elif room in CORE:
            assert parts[0] in sys.stdlib_module_names | CORE_NEEDS, f"{where}: not in the core"


def test_only_named_rooms_are_in_the_core() -> None:
    assert set(ROOMS) >= CORE


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_files_are_short(file: Path) -> None:
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES, f"{file.relative_to(ROOT)} has {lines} lines"


@pytest.mark.parametrize(
    "statement",
    [
        "import justforward",
        "import justforward.cli as c; assert c.main(['--help']) == 0",
        "import justforward.cli as c; assert c.main(['train', '--help']) == 0",
        "import justforward.cli as c; assert c.main(['--version']) == 0",
        "import justforward.cli as c; assert c.main(['train', '--lr', 'x']) == 2",
    ],
)
def test_help_waits_for_nothing_heavy(statement: str) -> None:
    heavy = ["torch", "numpy", "numba", "transformers", "matplotlib", "rich", "safetensors"]
    code = f"{statement}; import sys; print('heavy', [m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy []", done.stdout


@pytest.mark.parametrize("room", sorted(TORCH_FREE))
def test_light_rooms_import_no_torch_at_the_top(room: str) -> None:
    tree = ast.parse((SOURCE / f"{room}.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names.append(getattr(node, "module", None) or "")
            assert not any(name.split(".")[0] in ("torch", "transformers") for name in names)


def test_no_pickle_and_no_code_from_checkpoints() -> None:
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(import|from) (pickle|dill|cloudpickle|joblib)", text, re.M)
        assert "trust_remote_code=True" not in text
        assert '"trust_remote_code": True' not in text
        assert "torch.load(" not in text


def test_constraints_name_what_the_metadata_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints" / "cpu.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower() for line in lines if line and line[0] != "#"}
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    for requirement in wanted:
        name = re.split(r"[^\w.-]", requirement)[0].lower()
        assert name in pinned, f"constraints/cpu.txt lacks {name}"


# --------------------------------------------------------------------------------------- public API


def describe_api() -> str:
    """All public names with their signatures, one a line."""
    lines = [f"# Public API of justforward; rewrite with: python tests/{Path(__file__).name}"]
    for name in sorted(justforward.__all__):
        lines += _describe(name, getattr(justforward, name))
    return "\n".join(lines) + "\n"


def _describe(name: str, thing: Any) -> Iterator[str]:
    if isinstance(thing, ModuleType):
        yield f"{name}: module"
        for inner in sorted(thing.__all__):
            yield from _describe(f"{name}.{inner}", getattr(thing, inner))
    elif inspect.isclass(thing):
        bases = ", ".join(base.__name__ for base in thing.__bases__)
        yield f"class {name}({bases})"
        yield f"{name}{_signature(thing)}"
        for member, value in sorted(vars(thing).items()):
            if member.startswith("_"):
                continue
            if isinstance(value, property):
                yield f"{name}.{member}: property"
            elif callable(value) or isinstance(value, classmethod | staticmethod):
                yield f"{name}.{member}{_signature(getattr(thing, member))}"
    elif callable(thing):
        yield f"{name}{_signature(thing)}"
    else:
        yield f"{name}: {type(thing).__name__}"


def _signature(thing: Any) -> str:
    if inspect.isclass(thing) and "__init__" not in vars(thing):
        return "(*args)"  # an exception: built-in types have no signature
    if inspect.isclass(thing) and "TrainingArguments" in [base.__name__ for base in thing.__mro__]:
        # of transformers' many fields only what is ours
        own = vars(thing).get("__annotations__", {})
        return f"({', '.join(f'{name}: {kind!r} = {getattr(thing, name)!r}' for name, kind in own.items())})"
    # the spelling of default objects differs between Python versions; names and kinds do not
    return re.sub(r" at 0x[0-9a-f]+", "", str(inspect.signature(thing)))


def test_public_api_is_as_recorded() -> None:
    assert describe_api() == API.read_text(encoding="utf-8"), (
        "the public API changed: if that is meant, run python tests/test_project.py and name it in CHANGELOG.md"
    )


def test_public_names_resolve_and_are_listed() -> None:
    for name in justforward.__all__:
        assert getattr(justforward, name) is not None
        assert name in dir(justforward)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = justforward.nothing


def test_version_is_the_installed_one() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", justforward.__version__)


if __name__ == "__main__":
    API.write_text(describe_api(), encoding="utf-8")
    print(f"{API} written")
