"""What `justforward fits` predicts against what fresh processes take: peak memory and seconds a step, every method.

python benchmarks/fits.py            # all models; about a quarter of an hour
python benchmarks/fits.py --models smollm2,llama

SmolLM2-135M, and models of 60 to 125M random weights in the shapes of OPT, GPT-2, Llama and BERT, which another process
has written to a file: making them takes more than evaluating them. Two steps of each method, a batch of rows of
different length.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ROWS, LENGTH, STEPS = 8, 64, 2
FEWER = (
    "evaluation",
    "MeZO, weight space",
    "MeZO, activation space",
    "MeZO, LoRA, activation space",
    "AdamW",
    "AdamW, checkpointing",
    "AdamW, LoRA",
    "AdamW, LoRA, checkpointing",
)  # of models other than SmolLM2


def config_of(name: str) -> Any:
    """The configuration of a model that is measured."""
    from transformers import BertConfig, GPT2Config, LlamaConfig, MixtralConfig

    from justforward.skeleton import opt_config

    return {
        "opt": lambda: opt_config("opt-125m"),
        "gpt2": lambda: GPT2Config(architectures=["GPT2LMHeadModel"]),
        "llama": lambda: LlamaConfig(
            vocab_size=16000,
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=8,
            num_attention_heads=12,
            num_key_value_heads=4,
            architectures=["LlamaForCausalLM"],
        ),
        "bert": lambda: BertConfig(architectures=["BertForMaskedLM"]),
        "mixtral": lambda: MixtralConfig(
            vocab_size=8000,
            hidden_size=512,
            intermediate_size=896,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            num_local_experts=8,
            architectures=["MixtralForCausalLM"],
        ),
        "small": lambda: LlamaConfig(
            vocab_size=16000,
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=4,
            num_attention_heads=8,
            architectures=["LlamaForCausalLM"],
        ),
    }[name]()


TOKENS = 49_152  # of SmolLM2, whose tokenizer is loaded; the others have none
PACKED = "smollm2-gguf"  # SmolLM2 as its .gguf stores it, --quantize gguf
MODELS = ("smollm2", PACKED, "opt", "gpt2", "llama", "bert")


def make(model_name: str, folder: str) -> None:
    """Write a model of random weights."""
    from justforward.models import auto_class, kind_of

    torch.manual_seed(0)
    config = config_of(model_name)
    kind = kind_of(model_name, config)
    auto_class(kind).from_config(config, dtype=torch.float32).save_pretrained(folder)


def child(model_name: str, method_name: str, rows: int, length: int, folder: str) -> None:
    """Carry out steps of one method; print the peak resident bytes and the seconds of the last step."""
    import justforward as jf
    from justforward.config import TrainConfig
    from justforward.first_order import CLIP_NORM, checkpointable, checkpointed
    from justforward.models import auto_class, kind_of, load_model
    from justforward.rehearse import METHODS, Tokens, losses_of
    from justforward.tuners import attach

    torch.manual_seed(0)
    if model_name in ("smollm2", PACKED):
        quantize = "gguf" if model_name == PACKED else None
        loaded, tokenizer = load_model("smollm2", quantize=quantize)
        model: Any = loaded
        kind: Any = "causal"
    else:
        config = config_of(model_name)
        kind = kind_of(model_name, config)
        model = auto_class(kind).from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = Tokens(config)
    (method,) = [m for m in METHODS if m.name == method_name]
    tuned = attach(
        model, tokenizer, TrainConfig(model="", data="", out="", tuner=method.tuner, start="base")
    )
    batch = make_batch(rows, length, model.config.vocab_size)
    losses = losses_of(tuned, kind)
    seconds: list[float] = []

    def timed(step: Any) -> None:
        for _ in range(STEPS):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)

    if method.way == "evaluation":
        with torch.no_grad():
            timed(lambda: losses(batch))
    elif not method.first_order:
        rule = "adam" if method.moments else "sgd"
        if method.moments:
            rule = "adam(window=0)"
        opt = jf.MeZO(tuned, lr=1e-9, estimator=method.way, rule=rule)
        timed(lambda: opt.step(losses, batch))
    else:
        weights = [p for p in tuned.parameters() if p.requires_grad]
        layers = checkpointable(tuned) if method.checkpointing else []
        kept = [p.detach().clone() for p in weights]
        adamw = method.way == "adamw"
        optimizer = (
            torch.optim.AdamW(weights, lr=1e-9, weight_decay=0.0)
            if adamw
            else torch.optim.SGD(weights, lr=1e-9)
        )

        def step() -> None:
            with checkpointed(layers):
                losses(batch).mean().backward()
            torch.nn.utils.clip_grad_norm_(weights, CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad()

        timed(step)
        del kept
    print(json.dumps({"bytes": peak(), "seconds": min(seconds[1:])}))


def peak() -> int:
    """The most bytes that this process has had in memory: since it became this program, where the system says that.

    What `getrusage` says includes what the process was made from had, which may be more.
    """
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.is_file() else []:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make_batch(rows: int, length: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """Random tokens; the first row is shorter than the others, which are padded."""
    ids = torch.randint(5, vocabulary, (rows, length))
    mask = torch.ones_like(ids)
    mask[0, : length // 4] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp_min(0),
        "tokens": ids[:, :2].contiguous(),
        "right": torch.zeros(rows, dtype=torch.int64),
    }


def measured(
    model: str, method: str, rows: int = ROWS, length: int = LENGTH, folder: str | None = None
) -> dict[str, float]:
    """Peak bytes and seconds a step in a fresh process of as many threads; `folder` has the weights, or is made for this once."""
    if folder is None:
        with written(model) as made:
            return measured(model, method, rows, length, made)
    threads = torch.get_num_threads()
    said = _run("--child", model, method, str(rows), str(length), folder, str(threads))
    found: dict[str, float] = json.loads(said.splitlines()[-1])
    return found


@contextmanager
def written(model: str) -> Iterator[str]:
    """A folder with the model's weights for as long as it is needed; an empty one for SmolLM2, packed or not."""
    with tempfile.TemporaryDirectory() as folder:
        if model not in ("smollm2", PACKED):
            _run("--make", model, folder)
        yield folder


def _run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return done.stdout


def main() -> None:
    """Predict, measure and print, a line a method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="print a JSON object a line")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    from justforward.fits import plan
    from justforward.machine import device_of
    from justforward.models import kind_of
    from justforward.rehearse import METHODS
    from justforward.skeleton import Plan

    for name in given.models.split(","):
        whole = name in ("smollm2", PACKED)
        packed = name == PACKED
        what: Any = "smollm2"
        if not whole:
            what = Plan(name, config_of(name), kind_of(name, config_of(name)))
        found = plan(
            what,
            batch_size=ROWS,
            length=LENGTH,
            quantize="gguf" if packed else None,
            device=device_of("cpu", packed=packed, tokens=TOKENS if whole else 0),
            methods=tuple(m for m in METHODS if whole or m.name in FEWER),
            limits=False,
        )
        for row, seen in _each(name, found.rows):
            if given.json:
                print(json.dumps({"model": name, "method": row.method, "predicted": row.memory, "measured": seen["bytes"],
                                  "seconds": row.seconds, "seconds_measured": seen["seconds"]}), flush=True)  # fmt: skip
                continue
            print(
                f"{name:12} {row.method:42} predicted {row.memory / 1e6:6.0f} MB, measured {seen['bytes'] / 1e6:6.0f} MB, "
                f"ratio {row.memory / seen['bytes']:.2f}; {row.seconds:5.2f} s a step, measured {seen['seconds']:5.2f} s",
                flush=True,
            )


def _each(name: str, rows: Sequence[Any]) -> Iterator[tuple[Any, dict[str, float]]]:
    with written(name) as folder:
        for row in rows:
            if row.why_not is None:
                yield row, measured(name, row.method, folder=folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        torch.set_num_threads(int(sys.argv[7]))
        child(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), sys.argv[6])
    elif sys.argv[1:2] == ["--make"]:
        make(sys.argv[2], sys.argv[3])
    else:
        main()
