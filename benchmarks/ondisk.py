"""A model of three times the memory that a process may use: does it train, with which bits, and how fast?

    python benchmarks/ondisk.py --folder FOLDER_ON_A_LOCAL_DISK

A random OPT-style model is written to the folder, stored in bfloat16. One process trains it for three steps in memory; another, which
may use a third of the model's size, with its weights in a file (`--offload`). The limit counts all: heap, libraries and what of
files is held in memory; it is a control group's, so this needs the rights to make one (root). The time of a step is
compared with reading and writing as many bytes in pieces of 4 MiB, under the same limit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ROWS, LENGTH, STEPS, PIECE = 2, 8, 3, 1 << 22
GROUPS = Path("/sys/fs/cgroup")


def make(folder: Path, layers: int) -> int:
    """Write the model; its size in bytes."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(hidden_size=2048, ffn_dim=8192, num_hidden_layers=layers, num_attention_heads=32,
                       word_embed_proj_dim=2048)  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = OPTForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="1GB")
    return sum(p.numel() * p.element_size() for p in model.parameters())


def child(folder: Path, offload: bool, size: int) -> None:
    """Three steps; prints the fingerprint, seconds of each step, and of reading and writing the same bytes."""
    from transformers import OPTForCausalLM

    import justforward as jf
    from justforward.ondisk import keep_on_disk
    from justforward.stored import compute_model_wide

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    model: Any = OPTForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    compute_model_wide(model)
    if offload:
        keep_on_disk(model.parameters(), folder)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50000, (ROWS, LENGTH + 1), generator=generator)

    def losses(batch: Any) -> torch.Tensor:
        out = model(input_ids=batch["ids"][:, :-1], use_cache=False, logits_to_keep=1).logits
        return torch.nn.functional.cross_entropy(out[:, -1], batch["ids"][:, -1], reduction="none")

    opt = jf.MeZO(model, lr=1e-4, rule="rms", estimator="activation", check_rows=False)
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        opt.step(losses, {"ids": ids})
        seconds.append(time.perf_counter() - start)
    found = {"fingerprint": jf.fingerprint(model), "seconds": seconds}
    if offload:
        del opt, model
        found["copy_seconds"] = copy_seconds(folder, size)
    print(json.dumps(found))


def copy_seconds(folder: Path, size: int) -> float:
    """Read as many bytes from files of the folder as they have, and write them to another."""
    piece, left = bytearray(PIECE), size
    with tempfile.TemporaryFile(dir=folder) as source, tempfile.TemporaryFile(dir=folder) as to:
        for _ in range(-(-size // PIECE)):
            source.write(piece)
        source.flush()
        os.fsync(source.fileno())
        os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        source.seek(0)
        start = time.perf_counter()
        while left > 0:
            left -= source.readinto(piece)  # type: ignore[attr-defined]
            to.write(piece)
        to.flush()
        os.fsync(to.fileno())
        return time.perf_counter() - start


@contextmanager
def limited(limit: int) -> Iterator[Path]:
    """A control group that may use so many bytes, while it is needed."""
    old = GROUPS / "memory"
    group = (old if old.is_dir() else GROUPS) / f"justforward-{os.getpid()}"
    group.mkdir()
    if old.is_dir():
        (group / "memory.limit_in_bytes").write_text(str(limit))
    else:
        (group / "memory.max").write_text(str(limit))
        (group / "memory.swap.max").write_text("0")
    try:
        yield group
    finally:
        group.rmdir()


def entering(group: Path | None) -> Callable[[], None]:
    """What a new process does first, to be in the group if there is one."""

    def enter() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    return enter


def run(folder: Path, offload: bool, size: int, group: Path | None) -> dict[str, Any]:
    """A fresh process, in the group if there is one."""
    command = [sys.executable, __file__, "--child", str(folder), str(int(offload)), str(size)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, preexec_fn=entering(group))
    if done.returncode:
        sys.exit(f"the process with offload={offload} ended with {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=36, help="of 100 MB each")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        size = make(folder, given.layers)
        limit = size // 3
        with limited(limit) as group:
            memory = run(folder, False, size, None)
            disk = run(folder, True, size, group)
    step = sum(disk["seconds"][1:]) / (STEPS - 1)
    found = {
        "bytes": size,
        "limit": limit,
        "equal": disk["fingerprint"] == memory["fingerprint"],
        "step_seconds": step,
        "memory_step_seconds": sum(memory["seconds"][1:]) / (STEPS - 1),
        "copy_seconds": disk["copy_seconds"],
        "ratio": step / disk["copy_seconds"],
    }
    if given.json:
        print(json.dumps(found))
        return
    print(
        f"{size / 1e9:.2f} GB of weights, at most {limit / 1e9:.2f} GB of memory: three steps, bits "
        f"{'equal to' if found['equal'] else 'OTHER THAN'} those in memory\n"
        f"a step {step:.1f} s; {found['copy_seconds']:.1f} s to read and write as much: ratio {found['ratio']:.2f} (wanted at "
        f"most 1.3); in memory {found['memory_step_seconds']:.1f} s"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), bool(int(sys.argv[3])), int(sys.argv[4]))
    else:
        main()
