"""`--data hub`: the rows of a declared task, downloaded once, as the files that its declaration names.

Through the library `datasets` (the extra `hub`), only where it was asked for. A split "validation" becomes validation.jsonl, a
row one JSON object; from then on the folder is read like any other, without the network.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from justforward.declaration import SPLITS, Declaration
from justforward.errors import UserError
from justforward.kept import cache_folder, whole_folder

HUB = "hub"  # what --data says; ./hub is a folder of that name
SOURCE = "source.json"  # where the rows came from


def downloaded(declared: Declaration, notify: Callable[[str], None] | None = None) -> Path:
    """The folder with the task's rows, in the cache: downloaded now if it is not there.

    It is named after what is asked for, so that a run is continued with the rows that it was started with; source.json in it
    says which revision they are of. Remove it to have the newest.

    Args:
        declared: a task with a `hub` name: "owner/name", or "owner/name, configuration".
        notify: called with a sentence before the download.

    Raises:
        UserError: the declaration names none, `datasets` is not installed, the rows cannot be had, or no split is one
            that the task is tested on.
    """
    if declared.hub is None:
        raise UserError(
            f"--data is {HUB!r}: task {declared.name!r} names no rows on the hub: give the folder that holds "
            f"{' or '.join(declared.splits['test'])}"
        )
    names = [part.strip() for part in declared.hub.split(",")]
    wanted = [name for split in SPLITS for name in declared.splits[split]]
    digest = sha256(repr((names, wanted)).encode()).hexdigest()
    folder = cache_folder() / "data" / f"{declared.name}-{digest[:16]}"
    if folder.is_dir():
        return folder
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"--data is {HUB!r}: the package datasets is not installed: pip install 'justforward[hub]'"
        ) from None
    if notify is not None:
        notify(f"downloading {declared.hub} once into {folder}")
    try:
        found: Any = datasets.load_dataset(*names)
    except Exception as error:  # of many libraries, each with errors of its own
        said = " ".join(str(error).split()).rstrip(".:")[:240] or type(error).__name__
        raise UserError(
            f"--data is {HUB!r}: {declared.hub} cannot be had: {said}: it needs the network, or put "
            f"{' or '.join(declared.splits['test'])} and the like into a folder and give that"
        ) from error
    files = {f"{split}.jsonl": rows for split, rows in found.items()}
    if not set(files) & set(declared.splits["test"]):
        raise UserError(
            f"--data is {HUB!r}: {declared.hub} has the splits {', '.join(found)}, of which none makes "
            f"{' or '.join(declared.splits['test'])}, the test rows of task {declared.name!r}: give a folder"
        )
    with whole_folder(folder, keep_existing=True) as temporary:
        kept = {name: rows for name, rows in files.items() if name in wanted}
        for name, rows in kept.items():
            _write(temporary / name, rows, declared.hub)
        source = {
            "hub": declared.hub,
            "datasets": datasets.__version__,
            "rows": {name: len(rows) for name, rows in kept.items()},
            "files": sorted(map(str, _checksums(kept))),
        }
        (temporary / SOURCE).write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
    return folder


def _write(path: Path, rows: Any, hub: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            try:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            except TypeError as error:
                raise UserError(
                    f"--data is {HUB!r}: a row of {hub} is no plain text: {error}: give a folder of files"
                ) from error


def _checksums(splits: dict[str, Any]) -> set[str]:
    """Addresses of the files that were downloaded; a hub's name the revision."""
    return {
        address
        for rows in splits.values()
        for address in (getattr(rows.info, "download_checksums", None) or {})
    }
